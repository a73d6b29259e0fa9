"""The inputs that every node with a depth picture has, and what arrives on them: depth in 0..1, and boxes in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from comfy_api.latest import io

from ..techniques import depth as deglad
from ..techniques.layers import Layer
from .inputs import named
from .sockets import told

AUTO = "auto"
UNSURE, WRONG = 0.2, 0.4  # how sure white_is_near has to be to be believed, and to doubt what somebody chose
SAMPLE = 512  # about as many pixels of the longer side tell near from far; sorting all of 4K takes seconds a frame
TOWARDS = {"white": "lighter", "black": "darker"}
ASPECT = 0.03  # depth models round sides to multiples of their patches
NEAR = io.Combo.Input(
    "near_is",
    ["white", "black", AUTO],
    default="white",
    tooltip=(
        "What near pixels are in the depth image: white for Depth Anything, MiDaS and disparity, black for depth "
        "cameras and metric depth. auto guesses: near is what the lower edge shows more of. It says so on the node, "
        "and can be wrong for views from above and of ceilings."
    ),
)
MISSING = io.Combo.Input(
    "missing_depth",
    ["auto", "zero and NaN", "NaN only"],
    default="auto",
    tooltip=(
        "Which values mean 'not measured' and are filled from their surroundings. auto: zero counts as missing when "
        "near is black, as depth cameras give it, and as the far end when near is white."
    ),
)
THRESHOLD = io.Float.Input(
    "threshold",
    default=0.5,
    min=0.0,
    max=1.0,
    step=0.001,
    round=0.0001,
    tooltip="Depth of the cut: 0 is the nearest depth of the image, 1 the farthest.",
)


def range_inputs() -> list:
    limit = {"min": -1e9, "max": 1e9, "step": 0.01, "optional": True}
    return [
        io.Combo.Input(
            "range",
            options=list(deglad.RANGES),
            default=deglad.RANGES[0],
            optional=True,
            tooltip=(
                "What 0 to 1 means: each image's own nearest and farthest depth, those of the whole batch (for the "
                "frames of a video, whose cuts would jump otherwise), or fixed values."
            ),
        ),
        io.Float.Input(
            "range_low",
            default=0.0,
            **limit,
            tooltip="For a fixed range: the lowest value of the depth, as it comes in.",
        ),
        io.Float.Input(
            "range_high",
            default=1.0,
            **limit,
            tooltip="For a fixed range: the highest value of the depth, as it comes in.",
        ),
    ]


def depth_input(
    name: str = "depth", tooltip: str = "Depth of the image from any depth node; another size is resized.", **options
):
    return io.MultiType.Input(name, [io.Image, io.Mask], tooltip=tooltip, **options)


def depth_layer(value: torch.Tensor, image: torch.Tensor, notes: list[str]) -> Layer:
    """A hidden layer that shows a depth image, gray in 0..1, near and far as they come in; of the size of the image
    [1,H,W,C].

    Values that are not measured are filled; values beyond 0..1 are stretched to it, with a note.
    """
    span = deglad.RANGES[2]
    if isinstance(value, torch.Tensor) and not bool(((value >= 0) & (value <= 1) | ~value.isfinite()).all()):
        span = deglad.RANGES[0]
        notes.append("The depth's values go beyond 0 to 1; its layer shows them stretched to that range.")
    depth = DepthReader("black", "NaN only", range=span).read(value, image)[0]
    return Layer(depth[..., None].expand(-1, -1, 3), "Depth", visible=False)


@dataclass
class DepthReader:
    """How a node's settings say that its depth images are to be read, and what is to be told of them afterwards."""

    near_is: str
    missing_depth: str
    range: str = deglad.RANGES[0]
    range_low: float = 0.0
    range_high: float = 1.0
    notes: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)

    def read(self, value: torch.Tensor, image: torch.Tensor, socket: str = "depth") -> torch.Tensor:
        """[B,H,W] in 0..1, 0 = nearest, at the size and batch of the image. NaN is allowed here: it means missing."""
        if not isinstance(value, torch.Tensor) or value.ndim not in (2, 3, 4) or 0 in value.shape:
            raise ValueError(f"{socket}: this is not a depth image; connect the IMAGE or MASK of a depth node.")
        value = value.float().to(image.device)
        value = value[..., :3].mean(-1) if value.ndim == 4 else value.view(-1, *value.shape[-2:])
        if len(value) not in (1, len(image)):
            raise ValueError(
                f"{socket}: there are {len(value)} depth images for {len(image)} images; connect one, or one for each "
                "image."
            )
        near = self._near(value, socket)
        zero = self.missing_depth == "zero and NaN" or (self.missing_depth == "auto" and near == "black")
        limits = (self.range_low, self.range_high)
        with named(socket, "depth"):
            depth = deglad.normalise_depth(value, near == "white", zero, self.range, limits)
        self._tell(depth, image, socket)
        return deglad.resize_depth(depth, *image.shape[1:3]).expand(len(image), -1, -1)

    def _near(self, value: torch.Tensor, socket: str) -> str:
        """What is near, guessed where near_is says auto, and a note where it looks the wrong way round."""
        step = max(1, max(value.shape[1:]) // SAMPLE)
        score = deglad.white_is_near(value[:, ::step, ::step])
        likely = "white" if score >= 0 else "black"
        if self.near_is == AUTO:
            self.guesses.append(likely)
            sure = "" if abs(score) >= UNSURE else ", but not surely"
            self.notes.append(
                f"{socket}: auto takes {likely} as near, since it gets {TOWARDS[likely]} towards the lower "
                f"edge{sure}; if that is wrong, press the flip button."
            )
            return likely
        if likely != self.near_is and abs(score) >= WRONG:
            self.notes.append(
                f"{socket}: with near_is {self.near_is} the image's lower part is farther away than the upper one, "
                f"which is rare; if the layers come in the wrong order, choose {likely}."
            )
        return self.near_is

    def _tell(self, depth: torch.Tensor, image: torch.Tensor, socket: str) -> None:
        if (depth.amax((1, 2)) == depth.amin((1, 2))).any():
            self.notes.append(
                f"{socket}: it has the same depth everywhere, so there is nothing to cut; connect the depth of this "
                "image."
            )
        (rows, columns), (height, width) = depth.shape[1:], image.shape[1:3]
        if abs(columns * height / (rows * width) - 1) > ASPECT:
            self.notes.append(
                f"{socket}: it is {columns}×{rows} and the image {width}×{height}, so it was stretched to another "
                "shape; connect the depth of this image."
            )

    def ui(self) -> dict:
        """What the node shows: the notes, and for the flip button what near_is was taken for."""
        return told(self.notes) | ({"strata_near": self.guesses} if self.guesses else {})


def box_or_region(
    depth: torch.Tensor, x: int, y: int, width: int, height: int, region: torch.Tensor | None
) -> torch.Tensor:
    """The mask [B,H,W] of a box in pixels, or the region that was given in its place, checked against the picture's
    depth [B,H,W].
    """
    if region is None:
        region = torch.zeros_like(depth)
        region[:, max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)] = 1
        if not region.any():
            raise ValueError(
                f"x, y, width, height: the box lies outside of the image of {depth.shape[2]}×{depth.shape[1]}; move "
                "it inside."
            )
    if region.shape[1:] != depth.shape[1:] or len(region) not in (1, len(depth)):
        raise ValueError(
            f"region: the mask is {region.shape[2]}×{region.shape[1]} ({len(region)}) and the image is "
            f"{depth.shape[2]}×{depth.shape[1]} ({len(depth)}); make them the same size."
        )
    return region
