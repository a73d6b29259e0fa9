"""Things found in images by words, and their masks and mattes, by models of the transformers library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
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

    def __getitem__(self, rows: list[int]) -> Found:
        masks = None if self.masks is None else self.masks[rows]
        return Found(self.boxes[rows], self.scores[rows], [self.labels[i] for i in rows], masks)


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
    labels = found.get("text_labels") or found["labels"]
    return Found(found["boxes"].cpu().float(), found["scores"].cpu().float(), [str(one) for one in labels])


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


def vitmatte(images: Tensor, trimaps: Tensor, name: str) -> Tensor:
    """Alpha [B,H,W] of images [B,H,W,3] for trimaps [B,H,W]: 0, 1, and between them where it is to be found.

    Source: layeringdiff, Sec. 3.2 (ViTMatte)
    Differs: pixels that the trimap knows are set after it, as the released code does and transformers does not.
    """
    from transformers import VitMatteForImageMatting, VitMatteImageProcessor

    folder = MATTING.find(name)
    network = _loaded(VitMatteForImageMatting, folder)
    processor = VitMatteImageProcessor.from_pretrained(folder, local_files_only=True)
    progress, alphas = comfy.utils.ProgressBar(len(images)), []
    for image, trimap in zip(images, trimaps, strict=True):
        levels = torch.where(trimap <= 0, 0, torch.where(trimap >= 1, 255, 128)).to(torch.uint8)
        given = processor(images=_pixels(image), trimaps=levels.cpu().numpy(), return_tensors="pt").to(network.device)
        alpha = network(**given).alphas[0, 0, : image.shape[0], : image.shape[1]].to(trimap)
        alphas.append(torch.where((trimap > 0) & (trimap < 1), alpha.clamp(0, 1), trimap))
        progress.update(1)
    return torch.stack(alphas)


def _loaded(model, folder):
    return pretrained.on_card(model.from_pretrained(folder, local_files_only=True, use_safetensors=True))


def _pixels(image: Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
