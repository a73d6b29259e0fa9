"""LayeringDiff's layering stage as formulas: an image is a foreground over a background, what is seen of each is
copied, and the rest is brought to add up to the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .smoothing import gaussian_blur

SPREAD = (8, 4, 2, 1) + 6 * (0.7,)  # pixels, coarse to fine
FADE = 0.01  # share^4 at which half of a correction is left
OPAQUE = 1 - 1 / 510  # alpha from which an 8-bit mask means all of it
BANDS = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]) / 2


def composite(foreground: Tensor, background: Tensor, alpha: Tensor) -> Tensor:
    """[B,3,H,W] from colours [B,3,H,W] and alpha [B,1,H,W].

    Source: layeringdiff, Eq. 1
    """
    return alpha * foreground + (1 - alpha) * background


def alpha_cells(alpha: Tensor) -> Tensor:
    """[B,1,H,W], sides multiples of 8 -> [B,64,H/8,W/8]: the pixels under each latent pixel as channels, row by row,
    as Flux-Fill packs its mask too.

    Source: layeringdiff, Sec. 3.3 (pixel unshuffle)
    """
    return F.pixel_unshuffle(alpha, 8)


def copy_visible(image: Tensor, alpha: Tensor, foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Both layers [B,3,H,W] with the image's own colours where alpha [B,1,H,W] is 1 or 0.

    Source: layeringdiff, Sec. 3.3 (copying of completely visible regions)
    """
    return (
        torch.where(alpha >= OPAQUE, image, foreground),
        torch.where(alpha <= 1 - OPAQUE, image, background),
    )


def spread_residual(image: Tensor, alpha: Tensor, foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Both layers [B,3,H,W], corrected by what the image [B,3,H,W] shows of them; alpha [B,1,H,W].

    Where a layer is almost all that is seen, its error is known. Errors of drawn layers change slowly from pixel to
    pixel, so they are carried to the pixels around, from coarse to fine, and fade where nothing is seen.
    Source: ours, the residual of Eq. 1 of LayeringDiff by normalised convolution (Knutsson and Westin 1993)
    """
    shares = alpha, 1 - alpha
    for sigma in SPREAD:
        missing = image - composite(foreground, background, alpha)
        step = missing / (shares[0].square() + shares[1].square())  # times a layer's share: the least change of both
        foreground, background = (
            layer
            + gaussian_blur(share**5 * step, sigma, 3 * sigma) / (gaussian_blur(share**4, sigma, 3 * sigma) + FADE)
            for layer, share in zip((foreground, background), shares, strict=True)
        )
    return foreground, background


def exact_layers(
    image: Tensor, alpha: Tensor, foreground: Tensor, background: Tensor, give: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Layers in 0..1 near the given ones that make up the image in every pixel; all [B,3,H,W], alpha [B,1,H,W].

    The smallest change of both that adds up, then the foreground within what the image allows, and the background as
    what is left. Where a layer is not seen at all it stays, within 0..1.
    give: how readily the background changes beside the foreground; for several layers the sum of their squared shares.
    Source: ours, the projection onto Eq. 1 of LayeringDiff, which leaves the sum to the networks
    """
    alpha, behind = alpha.double(), 1 - alpha.double()
    image, foreground, background = image.double().clamp(0, 1), foreground.double(), background.double()
    missing = image - alpha * foreground - behind * background
    foreground = foreground + alpha * missing / (alpha.square() + behind.square() * give)
    seen = alpha.clamp(min=1e-9)
    low = ((image - behind) / seen).clamp(0, 1)
    high = (image / seen).clamp(0, 1)
    foreground = torch.where(alpha > 0, foreground.clamp(low, high), foreground.clamp(0, 1))
    rest = (image - alpha * foreground) / behind.clamp(min=1e-9)
    background = torch.where(behind > 0, rest, background).clamp(0, 1)
    return foreground.float(), background.float()


def haar_bands(image: Tensor, scales: int) -> list[Tensor]:
    """Per scale, finest first: [B,C,3,h,w], horizontal, vertical and diagonal detail of the orthonormal Haar transform;
    sides are halved from scale to scale, and repeat their last pixel where they are odd.

    Source: layeringdiff, Eq. 3 (H_s,k)
    """
    bands = []
    for _ in range(scales):
        image = F.pad(image, (0, image.shape[-1] % 2, 0, image.shape[-2] % 2), mode="replicate")
        blocks = rearrange(image, "b c (h down) (w across) -> b c (down across) h w", down=2, across=2)
        bands.append(torch.einsum("kp,bcphw->bckhw", BANDS.to(image), blocks))
        image = blocks.sum(2) / 2
    return bands


def high_frequency_loss(prediction: Tensor, reference: Tensor, scales: int = 3) -> Tensor:
    """Squared difference of the details of two images [B,3,H,W]; a scalar.

    Source: layeringdiff, Eq. 3
    Differs: N_s counts the values of a scale, pixels times channels, as the mean squared error beside it does.
    """
    bands = zip(haar_bands(prediction, scales), haar_bands(reference, scales), strict=True)
    return torch.stack([(one - other).square().mean((0, 1, 3, 4)).sum() for one, other in bands]).sum()


def background_loss(prediction: Tensor, truth: Tensor, decoded: Tensor, weight: float = 0.2) -> Tensor:
    """What trains the background's alignment: near the truth, with the details of what was decoded; a scalar.

    prediction, truth, decoded: [B,3,H,W].
    Source: layeringdiff, Eq. 2
    """
    return (prediction - truth).square().mean() + weight * high_frequency_loss(prediction, decoded)


def foreground_loss(prediction: Tensor, truth: Tensor, alpha: Tensor, hidden: float = 0.1) -> Tensor:
    """What trains the foreground's alignment, counted less where it is not seen; a scalar. alpha: [B,1,H,W].

    Source: layeringdiff, Sec. 3.4 (L_FAN)
    Differs: pixels of alpha 0, whose colours nobody sees, count a tenth.
    """
    weight = hidden + (1 - hidden) * (alpha > 0).to(prediction)
    return ((prediction - truth).square().mean(1, keepdim=True) * weight).mean()


def visible_to_own(shares: Tensor) -> Tensor:
    """Alphas [K,...] of layers, front to back, from masks in 0..1 of what is seen of each; layer k covers its share of
    what the ones before it leave. Masks that overlap, as whole objects do, are alphas already.

    Source: layeringdiff, Eq. 1 for several layers
    """
    left, alphas = torch.ones_like(shares[0]), []
    for share in shares:
        alphas.append(torch.where(share <= left, share / left.clamp(min=1e-6), share))
        left = left * (1 - alphas[-1])
    return torch.stack(alphas)
