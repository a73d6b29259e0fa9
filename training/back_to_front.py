"""Trains BFS on a Flux-Fill: composite and foreground learn together what their latents are (stage 1), then the
composites become real ones while the foregrounds stay what they are (stage 2).
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from ..networks import back_to_front as networks
from ..networks import flux
from ..networks.back_to_front import CONTENT, OUT, Sharing
from ..techniques import back_to_front as formulas
from ..techniques import diffusion
from . import base as bases
from . import export, fill_base, latent_composition, layered_images, loop, published, settings
from .fill_base import Words
from .layered_scenes import Batch

CHECK = 32  # the last scenes of the pool are kept for validation
FILE = "back_to_front.safetensors"


class Branches(nn.Module):
    """A Flux-Fill, frozen, with low-rank terms of peft for each branch, and the information sharing in its single
    blocks. Rows come in pairs, composite and foreground one after the other.

    What is frozen in the base already is shared with it, and is no part of the saved state. guidance: the strength that
    a base with a guidance embedding is told.
    Source: bfs, Sec. 3
    Differs: what was read is added to the attention's output, as the released code does, not to its input (Eq. 3).
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        shared_rank: int,
        fused: bool = True,
        guidance: float | None = None,
        checkpointing: bool = False,
    ):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        super().__init__()
        self.guidance, kept = guidance, loop.shared(base)
        transformer = copy.deepcopy(base, dict(kept)).requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=flux.linear_layers(transformer))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there are two, on purpose
            for branch in CONTENT:
                inject_adapter_in_model(config, transformer, adapter_name=branch)
        for name, value in transformer.named_parameters():
            if ".lora_" in name:
                value.data = value.data.float()  # peft gives them the base's precision, too coarse to learn in
        width = transformer.inner_dim
        self.sharing = nn.ModuleDict()
        for number, block in enumerate(transformer.single_transformer_blocks):
            own = self.sharing[f"single_{number}"] = Sharing(width, shared_rank, fused, out=False)
            block.attn.set_processor(Reading(own, block.attn.processor))
        self.transformer = transformer
        for module in transformer.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_pre_hook(_own_adapter, with_kwargs=True)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        if kept:
            self.register_state_dict_post_hook(_drop_base)
            self.register_load_state_dict_post_hook(_miss_no_base)

    def forward(self, noisy: Tensor, condition: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """Velocities: noisy [2N,C,h,w], condition [2N,C+64,h,w], sigma [2N], text [2N,T,D], pooled [2N,P]."""
        return flux.predict(self.transformer, noisy, condition, sigma, text, pooled, self.guidance)


def learns(name: str) -> bool:
    """Whether a parameter of Branches is trained, or belongs to the base."""
    return ".lora_" in name or "sharing." in name


def _drop_base(model: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for key in [key for key in state if key.startswith(prefix) and not learns(key)]:
        del state[key]


def _miss_no_base(model: nn.Module, keys) -> None:
    keys.missing_keys[:] = filter(learns, keys.missing_keys)


def _own_adapter(module: nn.Module, args: tuple, given: dict) -> tuple:
    return args, {**given, "adapter_names": list(CONTENT) * (len(args[0]) // 2)}


class Reading:
    """Attention of a single block of diffusers' class, and what each row reads of its partner."""

    def __init__(self, sharing: Sharing, plain):
        self.sharing, self.plain = sharing, plain

    def __call__(
        self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        from diffusers.models.embeddings import apply_rotary_emb

        out = self.plain(attention, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        projections = (getattr(attention, name) for name in networks.PROJECTIONS)
        # the base's own projections, without what a branch has learnt for itself
        base = [getattr(layer, "base_layer", layer)(hidden_states) for layer in projections]
        q, k, v = (
            rearrange(rows, "b t (h c) -> b t h c", h=attention.heads)
            for rows in self.sharing(hidden_states, *base, networks.PAIRINGS[0])
        )
        q, k = (
            apply_rotary_emb(norm(rows), image_rotary_emb, sequence_dim=1)
            for norm, rows in ((attention.norm_q, q), (attention.norm_k, k))
        )
        q, k, v = (rearrange(rows, "b t h c -> b h t c") for rows in (q, k, v))
        messages = nn.functional.scaled_dot_product_attention(q, k, v)
        return out + self.sharing.added(rearrange(messages, "b h t c -> b t (h c)"))


def published_key(key: str) -> str:
    """The released name of a learnt weight of Branches."""
    if key.startswith("transformer."):
        return key.removeprefix("transformer.")
    place, end = key.removeprefix("sharing.").split(".", 1)
    kind, number = place.split("_")
    block = f"{networks.BLOCKS[kind]}.{number}"
    if end == "mix.weight":
        return f"{block}.conv1n.weight"
    _, layer, source, part, _ = end.split(".")
    layer = OUT if layer == "to_out" else layer
    return f"{block}.attn1n.{layer}.lora_{'A' if part == 'down' else 'B'}.{source}.weight"


def published_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of Branches under the released key names."""
    return {published_key(key): value for key, value in state.items() if learns(key)}


def from_published(model: Branches, weights: dict[str, Tensor]) -> None:
    """What published_form gives, back into the model."""
    model.load_state_dict({key: weights[published_key(key)] for key in model.state_dict() if learns(key)}, strict=False)


def pairs(*rows: Tensor) -> Tensor:
    """[2N,...] of composites and foregrounds [N,...] each, one after the other."""
    return rearrange(torch.stack(rows, 1), "n pair ... -> (n pair) ...")


def losses(
    model: nn.Module, compose: nn.Module, batch: Batch, words: Words, config: dict, rng: np.random.Generator, kind: str
) -> dict[str, Tensor]:
    """What is minimised, and its parts. kind: "flow" (stage 1: both branches), "real" (stage 2: the composite beside a
    cut of itself) or "regular" (stage 2: the foreground beside the clean composite).

    Source: bfs, Eq. 5-9
    """
    device, size = next(model.parameters()).device, len(batch.prompts)
    sigma = torch.from_numpy(rng.normal(config["sigma_mean"], config["sigma_deviation"], size)).float().sigmoid()
    noise = torch.from_numpy(rng.standard_normal(batch.composite.shape, np.float32))
    other = noise if config["same_noise"] else torch.from_numpy(rng.standard_normal(noise.shape, np.float32))
    kept = rng.random(size) >= config["empty_prompt"]
    states, pooled = words([prompt if keep else "" for prompt, keep in zip(batch.prompts, kept, strict=True)])
    foreground = batch.cut if kind == "real" else batch.foreground
    noisy = pairs(diffusion.flow_noise(batch.composite, noise, sigma), diffusion.flow_noise(foreground, other, sigma))
    levels = pairs(sigma, sigma)
    if kind == "regular":
        noisy[0::2], levels[0::2] = batch.composite, 0
    condition = torch.cat([batch.background, batch.cells], 1)
    given = noisy, pairs(condition, condition), levels, pairs(states, states), pairs(pooled, pooled)
    predicted = model(*(part.to(device) for part in given))
    targets = diffusion.flow_velocity(batch.composite, noise), diffusion.flow_velocity(foreground, other)
    errors = [(predicted[row::2] - target.to(device)).square().mean() for row, target in enumerate(targets)]
    if kind == "real":
        return {"loss": errors[0], "composite": errors[0]}
    clean = formulas.clean_estimate(noisy.to(device), predicted, levels.to(device))
    composite = batch.composite.to(device) if kind == "regular" else clean[0::2]
    composition = formulas.composition_loss(compose(clean[1::2], batch.background.to(device)), composite)
    wanted = {"foreground": errors[1]} | ({} if kind == "regular" else {"composite": errors[0]})
    loss = sum(wanted.values()) + config["composition_weight"] * composition
    return {"loss": loss, **wanted, "composition": composition}


def learning(model: nn.Module, kind: str) -> None:
    """Which parameters a step moves: the composite's own for "real", the others for "regular", all for "flow"."""
    for name, value in model.named_parameters():
        if not learns(name):
            continue
        composite = f".{CONTENT[0]}." in name
        value.requires_grad_(kind == "flow" or composite == (kind == "real"))


def build(config: dict, base: fill_base.Base) -> Branches:
    torch.manual_seed(config["seed"])
    model = Branches(
        base.transformer(),
        config["rank"],
        config["shared_rank"],
        config.get("fused", True),
        config.get("guidance"),
        config.get("gradient_checkpointing", False),
    )
    if config.get("fp8"):
        fill_base.to_fp8(model)
    return model


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    from accelerate import PartialState

    base, scenes = fill_base.load(config), folder.parent / "scenes"
    start = None if (folder / "last").exists() else config["start"]
    before = folder.parent / (start or "") / "model.safetensors"
    if start == "published" and base.family != fill_base.MINI:
        raise settings.TrainingError("start: the published file is the mini family's; give the folder of a run.")
    if start not in (None, "published") and not before.exists():
        raise settings.TrainingError(
            f"{before} is missing; train stage 1 there first: python -m training back_to_front."
        )
    compose = latent_composition.load(folder.parent / "latent_composition", base.family).to(bases.device())
    sets = layered_images.samples(config, scenes, base, CHECK)
    words = base.words([caption for samples in sets.values() for caption in samples.captions], scenes)
    kinds = ("flow",) if config["stage"] == 1 else ("real", "regular") if config["regularise"] else ("real",)

    def loss(model, step, rank):
        rng, kind = np.random.default_rng((config["seed"], step, rank)), kinds[step % len(kinds)]
        learning(model, kind)
        samples = sets[layered_images.REAL if kind == "real" else layered_images.LAYERED]
        batch = samples.batch(rng.integers(0, samples.known(step), config["batch"]), step)
        found = losses(model, compose, batch, words, config, rng, kind)
        return {"loss": found["loss"]} if config["stage"] == 2 else found

    @torch.no_grad()
    def validate(model, step):
        report = {}
        for name in sorted(sets):
            batch, kind = sets[name].batch(sets[name].held_out, 0), "flow" if sets[name].foregrounds else "real"
            terms = losses(model, compose, batch, words, {**config, "empty_prompt": 0}, np.random.default_rng(0), kind)
            report |= {f"{key}, {name}": value.item() for key, value in terms.items() if key != "loss"}
        print(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()), flush=True)
        return report

    model = build(config, base)
    if start == "published":
        from_published(model, published.read(settings.MODELS / published.BACK_TO_FRONT)[0])
    elif start:
        model.load_state_dict(load_file(before), strict=False)
    trained = loop.fit(model, loss, validate, config, folder, minutes, save_every)
    if base.family != fill_base.MINI and PartialState().is_main_process:  # `publish` writes the mini family's
        write(folder, trained, config, base)
    return trained


def write(folder: Path, model: nn.Module, config: dict, base: fill_base.Base) -> None:
    """The file that users load."""
    path = folder / FILE
    config = export.without_folders(config)
    learnt = " and ".join(config[key] for key in ("foregrounds", "composites") if config.get(key))
    about = export.describe(
        "back_to_front" if config["stage"] == 1 else "back_to_front_real",
        folder,
        config,
        f"{learnt} with {config['backgrounds']}",
    )
    own = {"pairing": networks.PAIRINGS[0], "base": base.family, "licence": base.licence}
    export.save(path, published_form(model.state_dict()), about | own)
    print(f"{path}: put it into ComfyUI's models/layer_model.", flush=True)
