"""Checks of what arrives on IMAGE and MASK sockets: one sentence that names the socket, what was wrong and what to do."""
import torch


def check_image(image: torch.Tensor, socket: str) -> torch.Tensor:
    """[B,H,W,3|4], finite; returned as float32. Raises ValueError."""
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"{socket}: {_what(image)} is not a picture of 3 or 4 channels; connect an IMAGE output.")
    return _finite(image, socket)


def check_mask(mask: torch.Tensor, socket: str) -> torch.Tensor:
    """[B,H,W], or [H,W] which becomes [1,H,W]; finite; returned as float32. Raises ValueError."""
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"{socket}: {_what(mask)} is not a mask; connect a MASK output.")
    return _finite(mask if mask.ndim == 3 else mask[None], socket)


def _finite(tensor: torch.Tensor, socket: str) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{socket}: there are NaN or infinite values in it; look at the node that made it.")
    return tensor.float()


def _what(value) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
