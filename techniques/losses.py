"""Training losses and quality measures, as pure functions."""

import torch
from torch import Tensor


def gradient_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and of vertical neighbour differences, added; [B,C,H,W] each, a scalar
    back.

    Source: ours, keeps edges where L1 alone averages them away.
    """
    across, down = ((prediction.diff(dim=dim) - target.diff(dim=dim)).abs().mean() for dim in (-1, -2))
    return across + down


def expected_composite_error(prediction: Tensor, target: Tensor, mean: float = 0.5, variance: float = 1 / 12) -> Tensor:
    """Squared error of two RGBA images over a random background, on average over all backgrounds; a scalar.

    prediction, target: [B,4,H,W], straight alpha, 0..1. mean, variance: of a background's values; the defaults are
    those of values spread evenly over 0..1.
    Source: alphavae, the expectation of the squared error over random backgrounds
    """
    premultiplied = prediction[:, :3] * prediction[:, 3:] - target[:, :3] * target[:, 3:]
    alpha = prediction[:, 3:] - target[:, 3:]
    return ((premultiplied - alpha * mean).square() + alpha.square() * variance).mean()


def psnr(prediction: Tensor, target: Tensor, peak: float | None = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB per batch element; [B,...] in, [B] back, in float64; infinite for equal ones.

    peak: the range of values; None takes that of each target, since latents have no fixed one.
    Source: ours, the definition 10 log10(peak² / mean squared error).
    """
    target = target.flatten(1).double()
    error = (prediction.flatten(1).double() - target).square().mean(1)
    span = target.amax(1) - target.amin(1) if peak is None else peak * torch.ones_like(error)
    return 10 * torch.log10(span.square() / error)
