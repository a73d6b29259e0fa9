"""What training on a large base keeps in memory (LayeringDiff, BFS, LayerDiffuse's adapter, DreamLayer's modules),
computed on the meta device: nothing is loaded or run.

    python tools/host.py exec tools/training_memory.py        # docs/training.md has its tables
    python tools/host.py exec tools/training_memory.py layers # one of them: inpainting, flux, layers

Weights, gradients, Adam's two moments and the moving average, and what the forward pass keeps for the backward pass,
counted by autograd's own hooks. A card needs about 1 to 2 GB beside that for the driver and the autoencoder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

PACK = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PACK / "tests"))
import conftest  # noqa: E402, F401  makes the pack importable as strata

GIB = 2**30


def denoiser(family: str, rank: int, checkpointing: bool):
    from diffusers import UNet2DConditionModel
    from strata.training import base, layeringdiff

    shape = json.loads(base.CONFIG.read_text())[family]["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape)
        null = torch.empty(1, 77, shape["cross_attention_dim"])
        return layeringdiff.Denoiser(base.Base(family, unet, None, None, null, ""), "background", rank, checkpointing)


def kept(model, call, blocks: tuple[str, ...], most: int = 2) -> tuple[int, int]:
    """Bytes that a forward pass leaves for the backward pass, weights not counted, and those of the largest of the
    blocks that checkpointing runs again. most: bytes of a number, 2 in bf16.
    """
    saved, sizes = {}, [0]

    def pack(value):
        if not isinstance(value, torch.nn.Parameter):
            saved[id(value)] = value
        return value

    def size() -> int:
        return sum(value.numel() * min(most, value.element_size()) for value in saved.values())

    for module in model.modules():
        if type(module).__name__ in blocks:
            module.register_forward_pre_hook(lambda module, _: sizes.append(-size()))
            module.register_forward_hook(lambda module, *_: sizes.append(sizes.pop() + size()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        call(model.train())
    return size(), max(sizes)


def steps_kept(make, call, checkpointing: bool, blocks: tuple[str, ...]) -> int:
    """Bytes that a forward pass leaves, with the largest block run again. make: a model, checkpointing or not."""
    whole, block = kept(make(False), call, blocks)
    return kept(make(True), call, blocks)[0] + block if checkpointing else whole


def flux_branches(rank: int, fused: bool, checkpointing: bool, double: int, single: int):
    from strata.networks import flux
    from strata.training import back_to_front, fill_base

    shape = json.loads(fill_base.CONFIG.read_text())[fill_base.FLUX]["transformer"]
    with torch.device("meta"):
        base = flux.build(shape | {"depth": double, "depth_single_blocks": single}).requires_grad_(False)
        return back_to_front.Branches(base, rank, rank, fused, 1.0, checkpointing)


def flux_sizes(rank: int, fused: bool, fp8: bool, batch: int, double: int, single: int) -> np.ndarray:
    """Bytes of the base, numbers that learn, and bytes of activations, with so many blocks."""
    pairs = 2 * batch
    shapes = (pairs, 16, 64, 64), (pairs, 80, 64, 64), (pairs,), (pairs, 256, 4096), (pairs, 768)
    given = [torch.zeros(shape, device="meta") for shape in shapes]
    base = learnt = 0
    for name, value in flux_branches(rank, fused, True, double, single).named_parameters():
        learnt += value.numel() * value.requires_grad
        small = fp8 and "transformer_blocks." in name and value.ndim > 1
        base += value.numel() * (not value.requires_grad) * (1 if small else 2)
    activations = steps_kept(
        lambda checkpointing: flux_branches(rank, fused, checkpointing, double, single),
        lambda model: model(*given),
        True,
        ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    )
    return np.array([base, learnt, activations])


def flux_rows() -> None:
    """Of BFS on Flux.1-Fill, with what a card of that size can be given: what one block of a kind more takes is the
    same for all.
    """
    from strata.training import latent_composition

    print("| card | what learns | base | batch | base | learnt, gradients, average | Adam | activations | sum |")
    print("|---|---|---|---|---|---|---|---|---|")
    for card, rank, fused, fp8, batch in (
        (24, 16, False, True, 1),
        (48, 64, False, False, 2),
        (80, 64, True, False, 8),
    ):
        one, double, single = (flux_sizes(rank, fused, fp8, batch, *depths) for depths in ((1, 1), (2, 1), (1, 2)))
        base, learnt, activations = one + 18 * (double - one) + 37 * (single - one)
        with torch.device("meta"):
            compose = latent_composition.Composition([320, 640], 16).requires_grad_(False)
        latent = torch.zeros(batch, 16, 64, 64, device="meta", requires_grad=True)
        activations += kept(compose, lambda compose: compose(latent, latent), (), most=4)[0]  # noqa: B023
        base += 4 * sum(value.numel() for value in compose.parameters())
        sizes = base, 3 * 4 * learnt, 2 * learnt, activations
        row = (f"{card} GB", f"rank {rank}", "fp8" if fp8 else "bf16", batch, *sizes, sum(sizes))
        print(
            "| " + " | ".join(str(one) if i < 4 else f"{one / GIB:.1f}" for i, one in enumerate(row)) + " |", flush=True
        )


def inpainting_rows() -> None:
    """Of LayeringDiff on Stable Diffusion's inpainting models."""
    print("| base | what learns | checkpointing | batch | weights | gradients, Adam, average | activations | sum |")
    print("|---|---|---|---|---|---|---|---|")
    for family in ("SD1.5", "SD2"):
        for rank, batch, checkpointing in ((64, 8, True), (64, 8, False), (64, 2, True), (0, 8, True)):
            model = denoiser(family, rank, checkpointing)
            weights = sum(value.numel() for value in model.parameters()) * 4
            learnt = sum(value.numel() for value in model.parameters() if value.requires_grad) * 4 * 4
            latent, alpha = torch.empty(batch, 4, 64, 64, device="meta"), torch.empty(batch, 1, 512, 512, device="meta")
            times = torch.zeros(batch, device="meta")
            activations = steps_kept(
                lambda checkpointing: denoiser(family, rank, checkpointing),  # noqa: B023
                lambda model: model(latent, times, latent, alpha),  # noqa: B023
                checkpointing,
                ("ResnetBlock2D", "BasicTransformerBlock"),
            )
            what = f"rank {rank}" if rank else "all"
            row = (family, what, "on" if checkpointing else "off", batch)
            sizes = (weights, learnt, activations, weights + learnt + activations)
            print("| " + " | ".join([*map(str, row), *(f"{size / GIB:.1f}" for size in sizes)]) + " |", flush=True)


def layers_model(what: str, family: str, checkpointing: bool):
    """The adapter's or DreamLayer's network on a base, without contents."""
    from diffusers import UNet2DConditionModel
    from strata.networks import layered_unet
    from strata.training import dreamlayer, text_base

    config = json.loads((PACK / "models_config" / f"{what}.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel(**json.loads(text_base.CONFIG.read_text())[family]["unet"])
        own = text_base.Base(family, PACK, unet, {}, torch.nn.Identity(), {}, "")
        if what == "adapter":
            return text_base.Denoiser(own, config["rank"], checkpointing)
        model = layered_unet.LayeredUNet(unet, {}, dreamlayer.MOST, config["context_layers"])
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return model


def layers_given(what: str, model, rows: int, side: int) -> list:
    """What a step gives the network, without contents: of the adapter so many images, of DreamLayer so many layers in
    scenes of three.
    """
    scenes = () if what == "adapter" else (rows // 3, 3)
    width, pooled = model.unet.config.cross_attention_dim, 1280

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta")

    if what == "adapter":
        return [empty(rows, 4, side // 8, side // 8), empty(rows), empty(rows, 77, width), empty(rows, pooled)]
    count, layers = scenes
    words = empty(count, layers - 1, 77, width), torch.full((count, layers - 1), 5), empty(count, layers, pooled)
    return [empty(count, layers, 4, side // 8, side // 8), empty(count), words, empty(count)]


def layers_rows() -> None:
    """Of the adapter, batch in images, and of DreamLayer's modules, batch in layers, with checkpointing."""
    print("| what | base | side | batch | base | learnt, gradients, average | Adam | activations | sum |")
    print("|---|---|---|---|---|---|---|---|---|")
    for what, name, least in (("adapter", "adapter, rank 256", 4), ("dreamlayer", "layer modules", 3)):
        for family, side, batch in (("SD1.5", 512, least), ("SDXL", 1024, least)):
            model = layers_model(what, family, False)
            learnt = sum(value.numel() for value in model.parameters() if value.requires_grad)
            # matrices stay in fp16, kernels and norms are in float32
            frozen = [value for value in model.parameters() if not value.requires_grad]
            base = sum(value.numel() * (2 if value.ndim == 2 else 4) for value in frozen)
            activations = steps_kept(
                lambda checkpointing: layers_model(what, family, checkpointing),  # noqa: B023
                lambda model: model(*layers_given(what, model, batch, side)),  # noqa: B023
                True,
                ("ResnetBlock2D", "BasicTransformerBlock"),
            )
            bytes_of = (base, 3 * 4 * learnt, 2 * learnt, activations)
            row = (name, family, side, batch, *bytes_of, sum(bytes_of))
            print(
                "| " + " | ".join(str(one) if i < 4 else f"{one / GIB:.1f}" for i, one in enumerate(row)) + " |",
                flush=True,
            )


def main() -> None:
    """All tables, or those that are named: inpainting, flux, layers."""
    tables = {"inpainting": inpainting_rows, "flux": flux_rows, "layers": layers_rows}
    for name in sys.argv[1:] or tables:
        tables[name]()


if __name__ == "__main__":
    main()
