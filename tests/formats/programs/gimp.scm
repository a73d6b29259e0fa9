; What GIMP 2.10 sees of a layer file: a line for each layer and group, topmost first, with its pixels beside it as a PNG,
; the layer's mask applied to them.

(define (png image drawable path)
  (file-png-save2 RUN-NONINTERACTIVE image drawable path path 0 1 0 0 0 0 0 0 1)) ; colours under alpha 0 included

(define (line port words)
  (for-each (lambda (word) (display word port) (display "\t" port)) words)
  (newline port))

(define (describe image item depth prefix port)
  (let* ((group (= TRUE (car (gimp-item-is-group item))))
         (mask (car (gimp-layer-get-mask item)))
         (at (gimp-drawable-offsets item)))
    (line port (list depth (if group 1 0) (car at) (cadr at) (car (gimp-layer-get-opacity item))
                     (car (gimp-layer-get-mode item)) (car (gimp-item-get-visible item))
                     item mask (car (gimp-item-get-name item))))
    (if (> mask 0)
        (begin
          (if (= FALSE (car (gimp-drawable-has-alpha item))) (gimp-layer-add-alpha item))
          (gimp-layer-remove-mask item MASK-APPLY)))
    (if (not group) (png image item (string-append prefix (number->string item) ".png")))
    (if group
        (for-each (lambda (child) (describe image child (+ depth 1) prefix port))
                  (vector->list (cadr (gimp-item-get-children item)))))))

(define (look path)
  (let* ((image (car (gimp-file-load RUN-NONINTERACTIVE path path)))
         (port (open-output-file (string-append path ".txt"))))
    (for-each (lambda (layer) (describe image layer 0 (string-append path ".") port))
              (vector->list (cadr (gimp-image-get-layers image))))
    (close-output-port port)
    (gimp-image-delete image)))
