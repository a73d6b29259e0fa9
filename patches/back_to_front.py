"""BFS on a Flux-Fill: composite and foreground as two rows of a batch that read each other's tokens in the blocks.

The blocks' own modules run once: hooks take the projections that they make anyway, and add what was read to the
attention's output. Hooks are there for one call, and other packs' replacements of a block are called as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import comfy.ldm.flux.math as flux_math
import node_helpers
import torch
import torch.nn.functional as F
from comfy.ldm.common_dit import rms_norm
from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor, nn

from ..networks import back_to_front as networks
from ..networks import flux
from ..networks.back_to_front import BackToFront, Place, Sharing
from ..techniques.geometry import filled_up
from . import autoencoder, foreground, transparency_model
from .kept import Kept
from .layer_rows import Rows, sample_rows
from .rgba_vae import FILLED_UP

KEY, GIVEN = "strata_back_to_front", "strata_given_composite"
NOISE = {"same for both": 0.0, "one each": 1.0}  # how much is each branch's own
PAIR = "pairs of composite and foreground; use Strata's Sample foreground, or an even batch."
COMPOSITE, FOREGROUND = Rows(2, 0, 1, PAIR), Rows(2, 1, 1, PAIR)
LAYOUTS = ("as in the file", *networks.PAIRINGS)
SAME = 1e-2  # how much a copy of the base's weights may differ from them, relative to their largest: half precision


class Terms(Kept):
    """A file's part for one model, as ComfyUI's layers. content: added layers by branch."""

    def __init__(self, sharing: dict[Place, Sharing], content: list[dict[str, nn.Module]], pairing: str):
        self.sharing, self.content, self.pairing = sharing, content, pairing


def apply(model: ModelPatcher, file: BackToFront, strength: float = 1.0, layout: str = LAYOUTS[0]) -> ModelPatcher:
    """A clone that samples rows of pairs, composite and foreground. layout: how queries are paired, see networks.

    Source: bfs, Sec. 3
    Differs: what was read is added to the attention's output, as the released code does, not to its input (Eq. 3), so
    that the block's projections serve both attentions.
    Raises ValueError for a model that the file is not for.
    """
    check(model, file)
    if strength == 0:
        return model
    content = [_own(model, file, branch) for branch in networks.CONTENT]
    terms = Terms(file.sharing, content, file.pairing if layout == LAYOUTS[0] else layout)
    clone = model.clone()
    foreground.load_with(clone, [*file.sharing.values(), *(layer for own in content for layer in own.values())])
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, partial(_denoise, terms, strength))
    return clone


def _own(model: ModelPatcher, file: BackToFront, branch: str) -> dict[str, nn.Module]:
    """What a branch has learnt for itself, as layers beside the model's. Raises ValueError."""
    weights = transparency_model.unpatched(model)
    joined = {}
    for name, terms in file.content[branch].items():
        key = f"diffusion_model.{name}.weight"
        rows = len(weights[key]) if key in weights else 0
        if any(term.row + len(term.up) > rows for term in terms):
            raise ValueError(
                f"model: {file.name} changes {name}, which this model lacks or has in another size; load its base."
            )
        joined[key] = networks.joined(terms, rows)
    return foreground.differences(model, joined)


def is_on(model: ModelPatcher) -> bool:
    return bool(model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY))


def check(model: ModelPatcher, file: BackToFront) -> None:
    """Raises ValueError for a model that the file is not for, or that has one already."""
    unet = model.model.diffusion_model
    if not is_fill(model):
        raise ValueError(
            "model: this is not a Flux-Fill model, which takes a background and a mask; load flux1-fill-dev, or the "
            "mini family's strata_mini_flux_fill."
        )
    if is_on(model):
        raise ValueError("model: Back to front is on it already; connect the model without it.")
    if unet.hidden_size != file.width:
        raise ValueError(
            f"model: {file.name} is for a Flux-Fill of width {file.width}, and this one has {unet.hidden_size}; load "
            "the file of this model."
        )
    counts = {"double": len(unet.double_blocks), "single": len(unet.single_blocks)}
    if any(number >= counts[kind] for kind, number in file.sharing):
        raise ValueError(
            f"model: {file.name} shares information in more blocks than this model's {counts['double']} double and "
            f"{counts['single']} single ones; load the file of this model."
        )
    _check_copies(model, file)


def is_fill(model: ModelPatcher) -> bool:
    unet = model.model.diffusion_model
    if not isinstance(unet, Flux) or unet.params.global_modulation:
        return False
    config = model.model.model_config.unet_config
    return config["in_channels"] == 2 * config["out_channels"] + 64


def _check_copies(model: ModelPatcher, file: BackToFront) -> None:
    """Raises ValueError where the file repeats weights of another base than the model."""
    if not file.copies:
        return
    weights = transparency_model.unpatched(model)
    wanted = {key.removeprefix("diffusion_model."): value for key, value in weights.items()}
    own = flux.diffusers_form(wanted)
    for key, value in file.copies.items():
        stored = own.get(key)
        if stored is None or not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
            continue  # fp8 and quantised weights are not the file's to the digit
        if (stored.float() - value.float()).abs().max() > SAME * stored.float().abs().max():
            raise ValueError(
                f"model: {file.name} was trained on another base than this one ({key} differs); load its base."
            )


def _denoise(terms: Terms, strength: float, executor, x: Tensor, *args, **kwargs):
    COMPOSITE.check(x)
    unet = executor.class_obj
    with ExitStack() as stack:
        calls = [
            stack.enter_context(_coupled(unet, place, sharing, terms.pairing, strength))
            for place, sharing in terms.sharing.items()
        ]
        for rows, own in zip((COMPOSITE, FOREGROUND), terms.content, strict=True):
            stack.enter_context(foreground.acting(unet, own, strength, rows))
        out = executor(x, *args, **kwargs)
        if not all(call.done for call in calls):
            raise ValueError(
                "model: another patch on it replaces the blocks' projections, so the branches cannot read each other; "
                "remove that patch."
            )
    return out


@contextmanager
def _coupled(unet: Flux, place: Place, sharing: Sharing, pairing: str, strength: float) -> Iterator[Any]:
    """One block's hooks for one call."""
    kind, number = place
    call = (_Single if kind == "single" else _Double)(
        (unet.single_blocks if kind == "single" else unet.double_blocks)[number], sharing, pairing, strength
    )
    hooks = call.hooks()
    try:
        yield call
    finally:
        for hook in hooks:
            hook.remove()


class _Call:
    """What a block's hooks know of one call: its positions, and the messages' queries, keys and values."""

    def __init__(self, block: nn.Module, sharing: Sharing, pairing: str, strength: float):
        self.block, self.sharing, self.pairing, self.strength = block, sharing, pairing, strength
        self.done = False

    def enter(self, _block: nn.Module, args: tuple, given: dict) -> None:
        self.given = given

    def project(self, projection: nn.Module, args: tuple, output: Tensor) -> None:
        """Right after the block's own projection, before anything is added to it."""
        width = self.block.hidden_size
        q, k, v = output[..., : 3 * width].split(width, -1)
        self.read = self.sharing(args[0], q, k, v, self.pairing)

    def messages(self, norm: nn.Module, positions: Tensor) -> Tensor:
        q, k, v = (rearrange(rows, "b t (h c) -> b h t c", h=self.block.num_heads) for rows in self.read)
        del self.read
        q, k = self._normalised(norm, q, k, v)
        return flux_math.attention(q, k, v, pe=positions, transformer_options=self.given["transformer_options"])

    def _normalised(self, norm: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.sharing.norm_q is None or self.sharing.norm_k is None:
            return norm(q, k, v)
        scales = (scale.to(q) for scale in (self.sharing.norm_q, self.sharing.norm_k))
        return tuple(rms_norm(rows, scale, 1e-6).to(v) for rows, scale in zip((q, k), scales, strict=True))


class _Single(_Call):
    """All tokens, text included; added to the attention's output before it is joined with the MLP's."""

    def hooks(self) -> list:
        return [
            self.block.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.block.linear1.register_forward_hook(self.project, prepend=True),
            self.block.linear2.register_forward_pre_hook(self.add, prepend=True),
        ]

    def add(self, projection: nn.Module, args: tuple) -> None:
        messages = self.messages(self.block.norm, self.given["pe"])
        args[0][..., : self.block.hidden_size].add_(self.sharing.added(messages), alpha=self.strength)
        self.done = True


class _Double(_Call):
    """The image's tokens alone; added to the attention's projected output before its gate."""

    def hooks(self) -> list:
        return [
            self.block.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.block.img_attn.qkv.register_forward_hook(self.project, prepend=True),
            self.block.img_attn.proj.register_forward_hook(self.add),
        ]

    def add(self, projection: nn.Module, args: tuple, output: Tensor) -> Tensor:
        text = self.given["txt"].shape[1]
        messages = self.messages(self.block.img_attn.norm, self.given["pe"][:, :, text:])
        # the module's own forward: without this hook, and without what a branch has of its own
        out = projection.forward if "to_out" in self.sharing.terms else None
        self.done = True
        return output.add_(self.sharing.added(messages, out), alpha=self.strength)


def fill_background(
    positive: list, negative: list, vae, background: Tensor, mask: Tensor
) -> tuple[list, list, dict[str, Tensor]]:
    """Both conditionings with the whole background [B,H,W,C] and the mask [B,H,W] of where the foreground goes,
    1 = there; and an empty latent of that size.

    Source: bfs, Sec. 3 (the condition of both branches)
    """
    height, width = mask.shape[-2:]
    padded = filled_up(rearrange(background[..., :3], "b h w c -> b c h w"), FILLED_UP)
    latent = autoencoder.encode(vae, rearrange(padded, "b c h w -> b h w c"))
    # nothing is painted into what is filled up
    padded_mask = F.pad(mask[:, None], (0, -width % FILLED_UP, 0, -height % FILLED_UP))
    values = {"concat_latent_image": latent, "concat_mask": padded_mask}
    conditionings = [node_helpers.conditioning_set_values(one, values) for one in (positive, negative)]
    return conditionings[0], conditionings[1], {"samples": torch.zeros_like(latent)}


def sample(
    model: ModelPatcher, positive: list, negative: list, latent: dict, noise: str, given: dict | None = None, **sampling
) -> list[dict]:
    """LATENTs of composites and foregrounds. latent: its size and number. given: composites that are there, whose
    foregrounds are to be found.

    Source: bfs, Sec. 3 and 5.4
    Raises ValueError for a model without BFS, a conditioning without a background, and composites of another size.
    """
    if not is_on(model):
        raise ValueError("model: there is no Back to front on it; connect its output.")
    for name, conditioning in (("positive", positive), ("negative", negative)):
        if not all("concat_latent_image" in entry for _, entry in conditioning):
            raise ValueError(f"{name}: it has no background; connect the output of Fill background.")
    if given is not None:
        model = extracting(model, _like(given["samples"], latent["samples"]))
    empty = {"samples": torch.zeros_like(latent["samples"])}
    rows = sample_rows(model, positive, 2, negative, empty, **sampling, own_noise=NOISE[noise])
    return rows if given is None else [given, rows[1]]


def _like(composite: Tensor, latent: Tensor) -> Tensor:
    """Raises ValueError for composites of another size or number."""
    if composite.shape[1:] != latent.shape[1:] or len(composite) not in (1, len(latent)):
        sizes = (f"{len(one)} of {8 * one.shape[-1]}×{8 * one.shape[-2]}" for one in (composite, latent))
        raise ValueError(
            f"composite: its latents ({next(sizes)} pixels) and those of Fill background ({next(sizes)}) do not go "
            "together; encode the composite in the background's size."
        )
    return composite.expand(len(latent), -1, -1, -1)


def extracting(model: ModelPatcher, composite: Tensor) -> ModelPatcher:
    """A clone whose composites are given, [B,C,h,w]: clean, with timestep 0, in every call.

    Source: bfs, Sec. 5.4
    """
    clone = model.clone()
    # the latent as the model has it
    clean = clone.get_model_object("latent_format").process_in(composite)

    def denoise(executor, x: Tensor, timestep: Tensor, *args, **kwargs):
        COMPOSITE.check(x)
        x, timestep = x.clone(), timestep.expand(len(x)).clone()
        x[0::2, : clean.shape[1]] = _repeated(clean, len(x) // 2).to(x)
        timestep[0::2] = 0
        return executor(x, timestep, *args, **kwargs)

    def predict(executor, x: Tensor, *args, **kwargs):
        denoised = executor(x, *args, **kwargs).clone()
        denoised[0::2] = _repeated(clean, len(denoised) // 2).to(denoised)
        return denoised

    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, GIVEN, denoise)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, GIVEN, predict)
    return clone


def _repeated(rows: Tensor, count: int) -> Tensor:
    """For the chunks of a call, which each have all rows."""
    return rows.repeat(count // len(rows), 1, 1, 1)
