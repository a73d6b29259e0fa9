"""Training losses and quality measures, as pure functions."""
import torch
from torch import Tensor


def gradient_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and of vertical neighbour differences, added; [B,C,H,W] each, a scalar back.

    Source: ours, keeps edges where L1 alone averages them away.
    """
    return sum((prediction.diff(dim=dim) - target.diff(dim=dim)).abs().mean() for dim in (-1, -2))


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture; [B,C,H,W] in 0..1, [B] back; infinite for equal pictures.

    Source: ours, the definition 10 log10(1 / mean squared error).
    """
    return -10 * torch.log10((prediction - target).square().flatten(1).mean(1))
