"""Cuts whose edges are partly transparent and carry no colour of the other side: matting along the edge of
each slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from . import layering

KNOWN, PRIOR = 100.0, 0.05  # trust in a cut-out mask where it is certain, and within the width of its edge
GUESS = 1e-3  # trust in the value of a trimap where it is not known
MARGIN = 32  # pixels of known values around the unknown ones that the system includes
FILL = 8  # the factor holds at most this many times the values of the system
# Less than this of a layer is noise of the solution, which would leave specks of made-up colour in the layer behind.
FAINT = 0.03
MAX_SOLVED = 1_000_000  # pixels: the closed-form system grows with them, and finer than this no eye sees it in an edge


def refine_slices(
    image: Tensor, masks: Tensor, width: int, step: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Weights [N,H,W] and colours [N,H,W,3] of slices whose edges were refined by matting.

    image: [H,W,3] in 0..1. masks: [N,H,W] of 0 or 1, back to front, sum one. width: pixels around each edge that are
    open to change. step is called after each of the N − 1 edges. The weights still sum to one, and the layers laid over
    each other give the image within 1/255. Raises ModuleNotFoundError with advice when pymatting is missing.
    What is thinner than 3 pixels at the edge of a nearer layer is taken for depth mixed across that edge and goes to
    the layers around it.
    Source: ours, closed-form matting (Levin et al. 2008) and multi-level foreground estimation (Germer et al. 2020) of
    pymatting.
    """
    if masks[0].numel() < 2:  # the solvers need neighbours
        return masks, image.expand(len(masks), -1, -1, -1)
    nearer = hard = torch.zeros_like(masks[0])
    weights, colours, rest = [], [], image
    reach = max(1, round(width / 2))
    for mask in masks.flip(0)[:-1]:
        own = _without_slivers(mask, hard)
        hard = hard + mask
        alpha = torch.maximum(nearer, matte(image, hard, width))
        # where this layer is far and the one behind it near, both cuts follow the same edge: what they differ by is not
        # a layer
        shared = (_erode(1 - own, reach) == 1) & (_erode(hard, reach) == 0)
        alpha = torch.where(shared, nearer, alpha)
        weights.append(alpha - nearer)
        over = torch.where(nearer < 1 - 1e-4, weights[-1] / (1 - nearer).clamp_min(1e-4), 0.0).clamp(0, 1)
        front, rest = separate_colours(rest, over)
        colours.append(front)
        nearer = alpha
        step()
    return torch.stack([*weights, 1 - nearer][::-1]), torch.stack([*colours, rest][::-1])


def matte(image: Tensor, mask: Tensor, width: int) -> Tensor:
    """Alpha [H,W] for a cut-out mask [H,W] of 0 or 1, estimated within `width` pixels of its edge from the image
    [H,W,3].

    Source: ours, closed-form matting (Levin et al. 2008, A closed-form solution to natural image matting) of pymatting.
    Differs: inside the band the cut-out mask stays a weak prior, because a depth edge is roughly right and thin things
    have no certain inside; without it three of the six photographs that it was measured on got worse than the mask
    itself.
    """
    reach = max(1, round(width / 2))
    return _solved(image, mask, trimap_of(mask, reach) == 0.5, 2 * reach, PRIOR)


def trimap_of(mask: Tensor, reach: int) -> Tensor:
    """[H,W] of a mask [H,W] of 0 or 1: 0 or 1 where all within `reach` pixels is, a half between them.

    Source: layeringdiff, Sec. 3.2 (the trimap of MatteAnything)
    """
    return (1 + _erode(mask, reach) - _erode(1 - mask, reach)) / 2


def matte_of_trimap(image: Tensor, trimap: Tensor) -> Tensor:
    """Alpha [H,W] of an image [H,W,3] where the trimap [H,W] is neither 0 nor 1.

    Source: ours, closed-form matting (Levin et al. 2008, A closed-form solution to natural image matting) of pymatting.
    Differs: where nothing that is known decides, the trimap's own value does, so that there always is a solution.
    """
    return _solved(image, trimap, (trimap > 0) & (trimap < 1), MARGIN, GUESS)


def _solved(image: Tensor, mask: Tensor, unknown: Tensor, margin: int, prior: float) -> Tensor:
    """The mask [H,W] with what is unknown solved, from the image and what is known within `margin` pixels. prior: the
    weight that the mask keeps where it is unknown.
    """
    if not unknown.any():
        return mask
    rows, columns = unknown.any(1).nonzero(), unknown.any(0).nonzero()
    box = tuple(slice(max(0, int(places[0]) - margin), int(places[-1]) + margin + 1) for places in (rows, columns))
    height, wide = unknown[box].shape
    scale = min(1.0, (MAX_SOLVED / (height * wide)) ** 0.5)
    size = (max(1, round(height * scale)), max(1, round(wide * scale)))
    known = _resize((~unknown[box]).to(mask)[..., None], size, "nearest-exact")[..., 0] > 0.5
    solved = _closed_form(
        _numpy(_resize(image[box], size)),
        _numpy(_resize(mask[box][..., None], size)[..., 0]),
        known.cpu().numpy(),
        prior,
    )
    alpha = _resize(torch.from_numpy(solved).to(image)[..., None], (height, wide))[..., 0].clamp(0, 1)
    refined = mask.clone()
    alpha = torch.where(alpha < FAINT, 0.0, torch.where(alpha > 1 - FAINT, 1.0, alpha))
    refined[box] = torch.where(unknown[box], alpha, mask[box])
    return refined


def _keeping_threads(call: Callable) -> Callable:
    """numba's OpenMP layer sets the number of threads of the calling thread, torch's too, and leaves it there."""

    @functools.wraps(call)
    def kept(*args):
        threads = torch.get_num_threads()
        try:
            return call(*args)
        finally:
            torch.set_num_threads(threads)

    return kept


@_keeping_threads
def _closed_form(image: np.ndarray, mask: np.ndarray, known: np.ndarray, prior: float) -> np.ndarray:
    """argmin of aᵀLa + Σ c (a − mask)², L the matting Laplacian, c strong where the mask is known and weak
    elsewhere.
    """
    pymatting = _pymatting()
    import scipy.sparse

    trust = np.where(known.ravel(), KNOWN, prior)
    system = (pymatting.cf_laplacian(image, is_known=known.ravel()) + scipy.sparse.diags(trust)).tocsc()
    # sized by the picture: pymatting's own reserves 4 GB of addresses, which machines that do not overcommit refuse
    preconditioner = pymatting.ichol(system, max_nnz=min(FILL * system.nnz, int(4e9 / 16)))
    return pymatting.cg(system, trust * mask.ravel(), M=preconditioner, rtol=1e-5).reshape(mask.shape)


@_keeping_threads
def separate_colours(image: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground and background colours [H,W,3] of an image [H,W,3] with alpha [H,W], such that alpha·F + (1 − alpha)·B
    is the image.

    Source: ours, multi-level foreground estimation (Germer et al. 2020) of pymatting.
    Differs: its estimate is then moved to the nearest colours within 0..1 that the compositing equation holds for, so
    that nothing is lost.
    """
    front, back = _pymatting().estimate_foreground_ml(_numpy(image), _numpy(alpha), return_background=True)
    front, back = (torch.from_numpy(value).to(image) for value in (front, back))
    rows = [rearrange(value, "h w c -> 1 c h w") for value in (image, front, back)]
    exact = layering.exact_layers(rows[0], rearrange(alpha, "h w -> 1 1 h w"), *rows[1:])
    front, back = (rearrange(value, "1 c h w -> h w c") for value in exact)
    return front, back


def _without_slivers(mask: Tensor, nearer: Tensor) -> Tensor:
    """The mask [H,W] less what is thinner than 3 pixels along the edge of nearer layers [H,W]: depth that was mixed
    across that edge.
    """
    thick = 1 - _erode(1 - _erode(mask, 1), 1)
    return torch.maximum(thick, mask * _erode(1 - nearer, 2))


def _erode(mask: Tensor, reach: int) -> Tensor:
    """[H,W]: 1 where the square that reaches so many pixels to each side is all 1; the picture's border does not
    erode.
    """
    grown = F.max_pool2d((1 - mask)[None, None], (2 * reach + 1, 1), 1, (reach, 0))
    return 1 - F.max_pool2d(grown, (1, 2 * reach + 1), 1, (0, reach))[0, 0]


def _resize(image: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    if tuple(image.shape[:2]) == size:
        return image
    options = {"align_corners": False, "antialias": True} if mode == "bilinear" else {}
    resized = F.interpolate(rearrange(image, "h w c -> 1 c h w"), size, mode=mode, **options)
    return rearrange(resized, "1 c h w -> h w c")


def _numpy(tensor: Tensor):
    return tensor.double().cpu().contiguous().numpy()


def _pymatting():
    try:
        import pymatting
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "refine_edges or method: matting needs the Python package pymatting, which is not installed; run 'pip "
            "install pymatting' in ComfyUI's Python, or choose another way."
        ) from error
    return pymatting
