"""Measures against the renderer's truth. Pictures are [B,C,H,W] in 0..1, masks and alphas [B,1,H,W] in 0..1, 1 = opaque
or inside; one figure per picture, [B].

A measure over a mask is nan for a picture whose mask is empty. psnr is in techniques.losses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = 1e-3  # added to both sides of a ratio, so that black against black is one


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean structural similarity over pixels and channels, at most 1, which is equal; sides of at least 11.

    Source: ssim, Eq. 13 by scikit-image, with the paper's Gaussian window of 1.5 pixels.
    """
    from skimage.metrics import structural_similarity

    options = {
        "channel_axis": 0,
        "data_range": 1.0,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }
    pairs = zip(prediction.double().cpu().numpy(), target.double().cpu().numpy(), strict=True)
    return torch.tensor([structural_similarity(a, b, **options) for a, b in pairs])


def alpha_sad(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of absolute differences in pixels; tables of matting papers divide it by 1000.

    Source: matting, section 4.
    """
    return (prediction - target).abs().flatten(1).sum(1)


def alpha_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference, 0..1.

    Source: matting, section 4
    Differs: over the whole picture instead of a trimap's unknown region.
    """
    return (prediction - target).square().flatten(1).mean(1)


def alpha_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of soft masks, Σ min / Σ max, 0..1; 1 when both are empty.

    Source: layerd, alpha IoU of its evaluation.
    Differs: LayerD's code gives 0 when both are empty.
    """
    both, either = (
        torch.minimum(prediction, target).flatten(1).sum(1),
        torch.maximum(prediction, target).flatten(1).sum(1),
    )
    return torch.where(either > 0, both / either.clamp_min(1e-12), 1.0)


def placement(alpha: Tensor) -> Tensor:
    """[B,4] of an object's alpha: the share of the picture that it covers, the longer side of the box around it, and
    the box's centre from the top and from the left, each in 0..1 of the picture's side; nan where there is nothing.

    Source: layeringdiff, Tab. 2 (occupancy, longest span, vertical and horizontal centre)
    Differs: the paper does not define them; here a pixel counts where alpha is above 1/2.
    """
    inside = alpha[:, 0] > 0.5
    spans, centres = [], []
    for axis in (1, 2):
        lines, size = inside.any(3 - axis), inside.shape[axis]
        first, end = lines.int().argmax(1), size - lines.flip(1).int().argmax(1)
        spans.append((end - first) / size)
        centres.append((first + end) / 2 / size)
    values = torch.stack([inside.double().mean((1, 2)), torch.maximum(*spans), *centres], 1)
    return torch.where(inside.flatten(1).any(1)[:, None], values, torch.nan)


def layer_rgb_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute colour difference, mean over RGB, weighted by the true alpha; straight-alpha RGBA [B,4,H,W], 0..1.

    Source: layerd, RGB L1 of its evaluation.
    Differs: LayerD's code counts every pixel of alpha over 0 fully.
    """
    return mask_error(prediction[:, :3], target[:, :3], target[:, 3:])


def mask_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Absolute difference, mean over channels, weighted by a mask; 0..1.
    In a shadow_band it is the shadow-band error.

    Source: ours, an error inside of a soft mask
    """
    difference = (prediction - target).abs().mean(1, keepdim=True)
    return (difference * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


def shadow_band(shadow: Tensor, alpha: Tensor, reach: int) -> Tensor:
    """1 where a shadow lies or is nearer than `reach` pixels, and no object is: shadow, alpha [B,N,H,W] of a picture's
    N objects.

    The reach is there to count shadows that are too large or in the wrong place.

    Source: ours, effects of objects are judged apart from the objects
    """
    lies = F.max_pool2d((shadow.amax(1, keepdim=True) > 0.05).float(), 2 * reach + 1, 1, reach)
    return lies * (alpha.amax(1, keepdim=True) < 0.05)


def beyond_shadow(picture: Tensor, background: Tensor, darkest: float = 0.5, window: int = 5) -> Tensor:
    """[B,1,H,W], 0..1: how far a picture is from its background, and from the same background in any shadow down to
    `darkest` of its brightness.

    The largest channel's difference at that of 33 evenly spaced shades that fits the pixel best; then the median over a
    window, so that an outline of the background that moved by a pixel does not count.

    Source: ours, an object is found in a picture without its alpha
    """
    from scipy.ndimage import median_filter

    shadows = torch.linspace(darkest, 1, 33, device=picture.device)
    difference = torch.stack([(picture - background * share).abs().amax(1, keepdim=True) for share in shadows]).amin(0)
    median = median_filter(difference.cpu().numpy(), (1, 1, window, window), mode="nearest")
    return torch.from_numpy(median).to(picture.device)


def colour_ratio(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean colour inside the mask over the true one, [B,C], in sRGB values, which are what the renderer's lights
    multiply.

    Source: ours, light on an object apart from its texture
    """
    inside = [(picture * mask).flatten(2).sum(2) / mask.flatten(2).sum(2) for picture in (prediction, target)]
    return (inside[0] + GRAY) / (inside[1] + GRAY)


def lighting_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """|ln colour_ratio|, mean over channels: 0 = lit as the truth, 0.69 = half or twice as bright.

    Source: ours, light on an object apart from its texture
    """
    return colour_ratio(prediction, target, mask).log().abs().mean(1)


def seam_error(prediction: Tensor, target: Tensor, mask: Tensor, width: int = 2) -> Tensor:
    """Difference of the two pictures' gradients along the border of a mask of 0 or 1, mean over channels and neighbour
    steps, 0..2.

    Steps between neighbours, down and right, count when both are within `width` pixels of the border.

    Source: ours, what is seen of a paste is its edge
    """
    size = 2 * width + 1
    band = F.max_pool2d(mask, size, 1, width) + F.max_pool2d(1 - mask, size, 1, width) - 1
    total = count = mask.new_zeros(len(mask))
    for dim in (2, 3):
        length = mask.shape[dim] - 1
        pairs = band.narrow(dim, 1, length) * band.narrow(dim, 0, length)
        steps = (prediction.diff(dim=dim) - target.diff(dim=dim)).abs().mean(1, keepdim=True)
        total, count = total + (steps * pairs).flatten(1).sum(1), count + pairs.flatten(1).sum(1)
    return total / count


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(S₁ + S₂ − 2(S₁S₂)^½) of two sets of features [N,F], [M,F]; 0 = the same mean and covariance.

    Source: fid, Eq. 6, with features of one's own; fewer pictures than features make it larger.
    """
    first, second = first.double(), second.double()
    one, two = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return float((first.mean(0) - second.mean(0)).square().sum() + one.trace() + two.trace() - 2 * cross)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x·y/F + 1)³ of two sets of features [N,F], [M,F], at least two each; about
    0 for equal sets.

    Source: kid, Eq. 4
    Differs: over all pictures at once instead of a mean over subsets.
    """
    first, second = first.double(), second.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        values = kernel(a, a)
        return (values.sum() - values.trace()) / (len(a) * (len(a) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())
