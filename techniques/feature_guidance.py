"""FeatGLaC: the energy between the decoder features of a composite and those of the scenes it is made of, and the
update that lowers it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .harmonization import visible_shares

NORMS = ("l2", "l1")
RELEASED_FACTORS = (3.5, 1.25, 2.5, 2.5, 1.5)  # of the iterations of a step; the last one stays
RELEASED_GAIN = 30 * 1.5

Level = int | str  # of a UNet's decoder, 0 the deepest; of Flux a block's name


def visible_masks(masks: list[Tensor | None], height: int, width: int) -> Tensor:
    """[P,H,W] in 0..1: where each plane is seen, from masks [H,W] back to front (1 = in the plane, any size, None =
    everywhere).

    A plane is seen where no nearer one covers it, so that with one foreground the background's mask is 1 - the
    foreground's.
    Source: deglad, Eq. 2 and Sec. 3.2 (several depths), with planes that may overlap
    """
    own = [
        torch.ones(1, height, width) if mask is None else masks_at_level(mask[None].float(), (height, width))
        for mask in masks
    ]
    return visible_shares(torch.stack(own))[1][:, 0]


def masks_at_level(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [P,H,W] at the size (h, w) of a feature map: [P,h,w], the mean over each place's area.

    Source: featglac, Sec. 3.3 (M is downsampled to match)
    """
    return masks if masks.shape[1:] == size else F.interpolate(masks[:, None], size, mode="area")[:, 0]


def feature_energy_l2(features: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """[B]: sum over pixels of the mean over channels of (M (Psi_source - Psi))²; features and source [B,C,h,w], mask
    [h,w] in 0..1.

    Source: featglac, Eq. 4, one term of the sum
    Differs: the mean over channels, so that one step size serves levels of any width.
    """
    return (mask * (source - features)).square().mean(1).sum((1, 2))


def feature_energy_l1(features: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """[B]: mean absolute difference over channels and masked pixels; features and source [B,C,h,w], mask [h,w]. An
    empty mask gives 0.

    Source: featglac, released code (in place of Eq. 4's norm)
    Differs: a place on the rim counts for both scenes by their shares of it; the released background mask leaves out
    every latent place that has any foreground pixel.
    """
    return (mask * (source - features)).abs().mean(1).sum((1, 2)) / mask.sum().clamp_min(torch.finfo(mask.dtype).tiny)


def composition_energy(
    features: dict[Level, Tensor],
    sources: dict[Level, Tensor],
    masks: Tensor,
    level_weights: dict[Level, float],
    plane_weights: list[float],
    norm: str = "l2",
    units: dict[Level, Tensor] | None = None,
) -> Tensor:
    """[B]: G of a composite; features {level: [B,C,h,w]}, sources {level: [P,B,C,h,w]}, masks [P,H,W] of what is seen
    of each plane.

    plane_weights [P]: 1 for the background and lambda for the foreground in the paper. units {level: [B,C,1,1]}: what
    features are divided by, see channel_units.
    Source: featglac, Eq. 4
    """
    term = {"l2": feature_energy_l2, "l1": feature_energy_l1}[norm]
    first = next(iter(features.values()))
    precise = torch.promote_types(first.dtype, torch.float32)
    energy = first.new_zeros(len(first), dtype=precise)
    for level, weight in level_weights.items():
        unit: Tensor | float = units[level] if units else 1.0
        own = features[level].to(precise) / unit
        at_level = masks_at_level(masks, (own.shape[2], own.shape[3])).to(own)
        for source, mask, share in zip(sources[level], at_level, plane_weights, strict=True):
            energy = energy + weight * share * term(own, source.to(own) / unit, mask)
    return energy


def iteration_factor(iteration: int, norm: str) -> float:
    """What the energy of an iteration within a step, 0 = the first, is multiplied by: the released code's factors for
    l1, 1 for Eq. 4's norm.

    Source: featglac, released code
    """
    return 1.0 if norm == "l2" else RELEASED_GAIN * RELEASED_FACTORS[min(iteration, len(RELEASED_FACTORS) - 1)]


def guided_update(latent: Tensor, gradient: Tensor, sigma: Tensor, step_size: float, flow: bool = False) -> Tensor:
    """The latent [B,C,H,W] after one iteration, in ComfyUI's scale: clean + sigma * noise, or with flow
    (1 - sigma) * clean + sigma * noise, sigma in 0..1. gradient: [B,C,H,W], of G by the network's input z.

    The step is z - eta grad G. The paper's z is the latent divided by sqrt(1 + sigma²); with flow matching it is the
    latent itself.
    Source: featglac, Sec. 3.3 (z - grad G, K times at each step), with the released code's step size
    """
    scale = 1 if flow else (1 + sigma**2).sqrt()
    return latent - step_size * scale * gradient.to(latent)


def composite_latent(front: Tensor, back: Tensor, mask: Tensor) -> Tensor:
    """Latents [B,C,H,W] of one noise level, pasted: front where mask [B or 1,1,H,W] is 1.

    Source: featglac, Eq. 3
    """
    return mask * front + (1 - mask) * back


def parse_level_weights(text: str, levels: int) -> dict[int, float]:
    """{level: weight} from numbers with commas between them, the last one for the finest level, number levels - 1;
    zeros are left out.

    Raises ValueError.
    Source: featglac, Sec. 4.6 (the weights of its layers 2 and 3, the last two of four)
    Differs: SDXL's decoder has three levels, of which the same two numbers are for the last two; the paper has none for
    SDXL.
    """
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"level_weights: {text[:60]!r} is not a list of numbers; write them like 0.2, 8.5.") from None
    if len(values) > levels:
        raise ValueError(
            f"level_weights: there are {len(values)} numbers and this model's decoder has {levels} levels; leave some "
            "out at the front."
        )
    if any(value < 0 or value == float("inf") or value != value for value in values):
        raise ValueError(
            f"level_weights: {text[:60]!r} has a number that is negative or not finite; weights start at 0."
        )
    return {levels - len(values) + index: value for index, value in enumerate(values) if value}


def parse_block_weights(text: str, blocks: list[str], usual: list[str]) -> dict[str, float]:
    """{block: weight} of a transformer from `block: weight` pairs with commas between them, or from numbers alone,
    which are for its usual blocks as parse_level_weights has them. blocks: the names of all, in the order in which they
    run.

    Raises ValueError.
    Source: ours, the paper has levels of a UNet's decoder alone
    """
    parts = [part for part in text.split(",") if part.strip()]
    if not any(":" in part for part in parts):
        return {usual[level]: weight for level, weight in parse_level_weights(text, len(usual)).items()}
    pairs = [part.rpartition(":")[::2] for part in parts]
    names, numbers = [" ".join(name.lower().split()) for name, _ in pairs], [number for _, number in pairs]
    for name, number in zip(names, numbers, strict=True):
        if name not in blocks or not number.strip():
            raise ValueError(
                f"level_weights: {name[:40]!r} is no block of this model with a weight behind it; write {blocks[0]} to "
                f"{blocks[-1]} with a colon and a number, like {usual[-1]}: 8.5."
            )
    return {names[place]: weight for place, weight in parse_level_weights(",".join(numbers), len(names)).items()}


def channel_units(sources: Tensor) -> Tensor:
    """[B,C,1,1]: each channel's standard deviation over the places of the scenes, the unit in which a transformer's
    features are measured; sources [P,B,C,h,w], of more than one place. The result is in float32 or more.

    A channel that hardly differs over the scenes counts by a tenth of the mean deviation.
    Source: ours, one step size for channels of any size
    Differs: a transformer adds its blocks' results to one stream, whose channels differ in size by orders of magnitude,
    and from model to model; a UNet's features are taken as they are, as in the paper.
    """
    deviation = sources.to(torch.promote_types(sources.dtype, torch.float32)).std((0, 3, 4))[..., None, None]
    return deviation.maximum(0.1 * deviation.mean(1, keepdim=True))
