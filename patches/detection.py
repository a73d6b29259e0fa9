"""Things found in images by words, and their masks and mattes, by models of the transformers library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import pretrained

CONFIG = json.loads((pretrained.CONFIG / "foreground.json").read_text(encoding="utf-8"))
DETECTORS, SEGMENTERS, MATTING = (
    pretrained.Folders(CONFIG[role]["folders"], CONFIG[role]["types"], CONFIG[role]["models"], socket)
    for role, socket in (("detectors", "detector"), ("segmenters", "segmenter"), ("matting", "matting_model"))
)
TRANSPARENT = CONFIG["transparent"]
# Detectors that give masks by themselves.
OF_WORDS = {"sam3": ("Sam3Model", "Sam3Processor"), "sam3_video": ("Sam3Model", "Sam3Processor")}
OF_BOXES = {
    "sam": ("SamModel", "SamProcessor"),
    "sam_hq": ("SamHQModel", "SamHQProcessor"),
    "sam2": ("Sam2Model", "Sam2Processor"),
    "sam2_video": ("Sam2Model", "Sam2Processor"),
    "edgetam": ("EdgeTamModel", "Sam2Processor"),
}
SAME = 0.7  # boxes that overlap more, by IoU, are of one thing


@dataclass(frozen=True)
class Found:
    """What was found in one image, the surest first. boxes: [N,4], left, top, right, bottom in pixels. scores: [N].
    labels: the words of each. masks: [N,H,W] of 0 or 1, of a detector that makes some.
    """

    boxes: Tensor
    scores: Tensor
    labels: list[str]
    masks: Tensor | None = None

    def lines(self) -> list[str]:
        """Words, score and box of each."""
        parts = zip(self.labels, self.scores, self.boxes, strict=True)
        return [
            f"{label} {score:.2f} ({', '.join(f'{side:.0f}' for side in box.tolist())})" for label, score, box in parts
        ]

    def __getitem__(self, rows: list[int]) -> Found:
        masks = None if self.masks is None else self.masks[rows]
        return Found(self.boxes[rows], self.scores[rows], [self.labels[i] for i in rows], masks)


def find(
    images: Tensor,
    words: list[str],
    detector: str,
    segmenter: str,
    every: bool,
    threshold: float,
    text_threshold: float,
    step: Callable[[int], None] = lambda count: None,
) -> list[Found]:
    """What the words name in images [B,H,W,3], with masks: of each image the surest match, or every one, those that
    reach lowest in the image first. step is called twice for each image. Raises ValueError where nothing is found.
    """
    found = []
    for number, one in enumerate(detect(images, words, detector, threshold, text_threshold), 1):
        if not len(one.boxes):
            raise ValueError(
                f"prompt: nothing of {', '.join(words)!r} was found in image {number}; use other words or lower the "
                "threshold."
            )
        found.append(one[one.boxes[:, 3].argsort(descending=True).tolist() if every else [0]])
        step(1)
    if found[0].masks is not None:
        step(len(found))
        return found
    masked = []
    for one, masks in zip(found, segment(images, [one.boxes for one in found], segmenter), strict=True):
        masked.append(replace(one, masks=masks))
        step(1)
    return masked


def nearest(masks: Tensor, depth: Tensor) -> int:
    """Which of masks [N,H,W] of 0 or 1 is nearest by the median of depth [H,W], 0 = nearest, in it; empty ones are
    farthest.
    """
    depth = depth.to(masks.device)
    return min(range(len(masks)), key=lambda row: depth[masks[row] > 0].median().nan_to_num(torch.inf).item())


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,H,W] of 0 and 1 from boxes [N,4]."""
    masks = torch.zeros(len(boxes), *size)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().clamp(min=0).tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def opened(images: Tensor, trimaps: Tensor, detector: str) -> Tensor:
    """Trimaps [B,H,W], with a half where they were 1 inside the boxes of transparent things in images [B,H,W,3].

    Source: layeringdiff, Sec. 3.2 (transparent objects)
    """
    thresholds = TRANSPARENT["box_threshold"], TRANSPARENT["text_threshold"]
    found = detect(images, TRANSPARENT["words"], detector, *thresholds)
    inside = torch.stack([box_masks(one.boxes, trimaps.shape[1:]).sum(0) > 0 for one in found])
    return torch.where(inside.to(trimaps.device) & (trimaps >= 1), 0.5, trimaps)


def detect(images: Tensor, words: list[str], name: str, threshold: float, text_threshold: float) -> Iterator[Found]:
    """Things that the words name in images [B,H,W,3] in 0..1, image by image. name: a folder of DETECTORS.

    Source: layeringdiff, Sec. 3.2 (Grounding DINO on the words of the foreground)
    Differs: SAM 3, which needs no boxes, and other detectors of transformers may take its place.
    """
    import transformers

    folder = DETECTORS.find(name)
    kind = pretrained.model_type(folder)
    if kind in OF_WORDS:
        model, processor = (getattr(transformers, one) for one in OF_WORDS[kind])
    else:
        model, processor = transformers.AutoModelForZeroShotObjectDetection, transformers.AutoProcessor
    network, processor = _loaded(model, folder), processor.from_pretrained(folder, local_files_only=True)
    for image in images:
        found = (_by_words if kind in OF_WORDS else _by_boxes)(
            network, processor, image, words, threshold, text_threshold
        )
        yield found[without_twins(found.boxes, found.scores)]


def _by_boxes(network, processor, image, words, threshold, text_threshold) -> Found:
    size = [tuple(image.shape[:2])]
    given = processor(images=_pixels(image), text=[words], return_tensors="pt").to(network.device)
    outputs, further = network(**given), {}
    if "grounding" in network.config.model_type:
        further = {"input_ids": given.input_ids, "text_threshold": text_threshold}
    (found,) = processor.post_process_grounded_object_detection(
        outputs, threshold=threshold, target_sizes=size, text_labels=[words], **further
    )
    labels = found["text_labels"] if "text_labels" in found else found["labels"]
    return Found(
        found["boxes"].cpu().float(), found["scores"].cpu().float(), [meant(str(one), words) for one in labels]
    )


def meant(label: str, words: list[str]) -> str:
    """Which of the words a label is of: Grounding DINO gives back those parts of them that it is sure of."""
    parts = set(label.lower().split())
    return max(words, key=lambda one: len(parts & set(one.lower().split())))


def _by_words(network, processor, image, words, threshold, text_threshold) -> Found:
    parts = []
    for word in words:
        given = processor(images=_pixels(image), text=word, return_tensors="pt").to(network.device)
        (found,) = processor.post_process_instance_segmentation(
            network(**given), threshold=threshold, target_sizes=[tuple(image.shape[:2])]
        )
        parts.append(
            Found(
                found["boxes"].cpu().float(),
                found["scores"].cpu().float(),
                [word] * len(found["scores"]),
                found["masks"].cpu().float(),
            )
        )
    return Found(
        torch.cat([part.boxes for part in parts]),
        torch.cat([part.scores for part in parts]),
        [label for part in parts for label in part.labels],
        torch.cat([part.masks for part in parts]),
    )


def without_twins(boxes: Tensor, scores: Tensor) -> list[int]:
    """Rows of boxes [N,4], the surest first, without those that nearly cover a surer one."""
    kept: list[int] = []
    for row in scores.argsort(descending=True).tolist():
        if all(box_iou(boxes[row], boxes[other]) <= SAME for other in kept):
            kept.append(row)
    return kept


def box_iou(one: Tensor, other: Tensor) -> float:
    """Of two boxes [4]: left, top, right, bottom."""
    low, high = torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])
    common = (high - low).clamp(min=0).prod()
    areas = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod()
    return float(common / (areas - common).clamp(min=1e-9))


def segment(images: Tensor, boxes: list[Tensor], name: str) -> Iterator[Tensor]:
    """Masks [N,H,W] of 0 or 1 of what lies in boxes [N,4] of images [B,H,W,3], image by image.

    Source: layeringdiff, Sec. 3.2 (SAM on the box)
    """
    import transformers

    folder = SEGMENTERS.find(name)
    model, processor = (getattr(transformers, one) for one in OF_BOXES[pretrained.model_type(folder)])
    network, processor = _loaded(model, folder), processor.from_pretrained(folder, local_files_only=True)
    for image, own in zip(images, boxes, strict=True):
        given = processor(images=_pixels(image), input_boxes=[own.tolist()], return_tensors="pt").to(network.device)
        outputs = network(**given, multimask_output=False)
        sizes = [given[key].cpu() for key in ("original_sizes", "reshaped_input_sizes") if key in given]
        (masks,) = processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        yield masks.reshape(-1, *image.shape[:2]).float()


def vitmatte(images: Tensor, trimaps: Tensor, name: str, step: Callable[[int], None] = lambda count: None) -> Tensor:
    """Alpha [B,H,W] of images [B,H,W,3] for trimaps [B,H,W]: 0, 1, and between them where it is to be found. step is
    called once for each.

    Source: layeringdiff, Sec. 3.2 (ViTMatte)
    Differs: pixels that the trimap knows are set after it, as the released code does and transformers does not.
    """
    from transformers import VitMatteForImageMatting, VitMatteImageProcessor

    folder = MATTING.find(name)
    network = _loaded(VitMatteForImageMatting, folder)
    processor = VitMatteImageProcessor.from_pretrained(folder, local_files_only=True)
    alphas = []
    for image, trimap in zip(images, trimaps, strict=True):
        levels = torch.where(trimap <= 0, 0, torch.where(trimap >= 1, 255, 128)).to(torch.uint8)
        given = processor(images=_pixels(image), trimaps=levels.cpu().numpy(), return_tensors="pt").to(network.device)
        alpha = network(**given).alphas[0, 0, : image.shape[0], : image.shape[1]].to(trimap)
        alphas.append(torch.where((trimap > 0) & (trimap < 1), alpha.clamp(0, 1), trimap))
        step(1)
    return torch.stack(alphas)


def _loaded(model, folder):
    return pretrained.on_card(model.from_pretrained(folder, local_files_only=True, use_safetensors=True))


def _pixels(image: Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
