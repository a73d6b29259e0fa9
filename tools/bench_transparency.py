"""Transparency and LayerFusion at published width with random weights at 512×512, against plain ways; on the graphics
card where there is one.

Decode transparency (104M weights) against a plain loop over its 8 passes with the blocks of diffusers it was published
with; a step of LayerFusion on SD1.5's structure, with an adapter of rank 256 on the foreground, against a step of each
of three plain runs. Attention is torch's, ComfyUI's choice on NVIDIA cards; `default`: its choice on the processor,
three times as slow there.
`python tools/host.py exec tools/bench_transparency.py small` only shows that it works.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import host
import torch
from turns import in_turns, now, rows_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata

from patches import random_transparency  # noqa: E402


def load(default_attention: bool = False) -> None:
    """ComfyUI as a library in this process."""
    sys.path.insert(0, str(host.find_or_install().root))
    from comfy.cli_args import args

    args.cpu, args.use_pytorch_cross_attention = not torch.cuda.is_available(), not default_attention


def plain_decode(network, image, latent):
    """As published, without colours continued where nothing is seen."""
    found = []
    for flip in (False, True):
        for turns in range(4):
            views = [torch.rot90(part.flip(3) if flip else part, turns, (2, 3)) for part in (image, latent)]
            out = torch.rot90(network(*views).clip(0, 1), -turns, (2, 3))
            found.append(out.flip(3) if flip else out)
    return torch.stack(found).median(0).values


@torch.inference_mode()
def decode_rows(
    side: int, widths: Sequence[int] = (32, 32, 64, 128, 256, 512, 512), attention_levels: int = 3
) -> Iterator[tuple]:
    import comfy.model_management
    from patches.test_networks import Reference
    from strata.networks.transparency import TransparentDecoder
    from strata.patches import transparency

    torch.manual_seed(0)
    weights = TransparentDecoder(widths, attention_levels).state_dict()
    published = Reference(widths, attention_levels)
    published.load_state_dict(weights)
    device = comfy.model_management.get_torch_device()
    files = {dtype: transparency.recognise("decoder", dict(weights)) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, file in files.items():
        file.parts["decoder"].model.to(dtype)
    image, latent = torch.rand(1, 3, side, side, device=device), torch.randn(1, 4, side // 8, side // 8, device=device)
    for dtype, file in files.items():
        own = published.to(device, dtype)
        values = image.to(dtype), latent.to(dtype)
        ours, plain = in_turns(
            partial(_alpha, file, image, latent),
            lambda own=own, values=values: plain_decode(own, *values)[:, :1],
            results=True,
        )
        assert (ours.result.cpu() - plain.result.cpu()).abs().max() < {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
        yield from rows_of(f"decode in {str(dtype).removeprefix('torch.')}, 8 passes; plain in the same", ours, plain)


@torch.inference_mode()
def _alpha(file, image, latent) -> torch.Tensor:
    from strata.patches import transparent_latents

    return transparent_latents.decode(file, image, latent, clean="off")[1]


def sd15(**changes):
    """SD1.5's UNet with random weights in a ModelPatcher."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    from strata.patches.transparency import FAMILIES

    unet = {
        **FAMILIES["SD1.5"]["unet"],
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "dtype": torch.float32,
        **changes,
    }
    model = comfy.model_base.BaseModel(comfy.supported_models.SD15(unet))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))


@torch.inference_mode()
def a_step(models, side: int, pictures: int, end: int | None = None) -> float:
    """Seconds of the second sampling step with guidance, of each model one behind the other. end: position of the
    prompt's end, for LayerFusion.
    """
    import comfy.sample
    from strata.patches.layer_prompts import END_TOKENS

    seconds = 0.0
    for model in models:
        width = model.model.model_config.unet_config["context_dim"]
        positive, negative = ([[torch.randn(pictures, 77, width), {}]] for _ in range(2))
        if end is not None:
            positive[0][1][END_TOKENS] = [end]
        latent, times = torch.zeros(pictures, 4, side // 8, side // 8), []
        comfy.sample.sample(
            model,
            torch.randn_like(latent),
            2,
            7.0,
            "euler",
            "normal",
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=1,
            callback=lambda *_, times=times: times.append(now()),
        )
        seconds += times[1] - times[0]
    return seconds


@torch.inference_mode()
def layerfusion_rows(side: int, rank: int, **changes) -> Iterator[tuple]:
    from strata.patches import transparency, transparency_model
    from strata.patches.fusion import Settings, blend_attention

    model = sd15(**changes)
    dtype = str(model.model.model_config.unet_config["dtype"]).removeprefix("torch.")
    shapes = {
        key: tuple(value.shape) for key, value in model.model.state_dict().items() if key.startswith("diffusion_model.")
    }
    files = transparency.recognise("adapter", random_transparency.adapter(shapes, rank=rank, scale=0.02))
    alone, layered = transparency_model.apply(model, files, 1.0), transparency_model.apply_to_foreground(model, files)
    blends = {
        name: blend_attention(layered, Settings(reuse=reuse))
        for name, reuse in (("with prior pass", False), ("reusing the step before", True))
    }
    plain, *ours = in_turns(
        partial(a_step, (alone, model, model), side, 1),
        *(partial(a_step, (one,), side, 3, 5) for one in blends.values()),
    )
    for name, own in zip(blends, ours, strict=True):
        yield from rows_of(f"LayerFusion step {name}, {dtype}; plain: three runs' steps", own, plain)


def rows(small: bool = False, default_attention: bool = False) -> Iterator[tuple]:
    load(default_attention)
    yield from decode_rows(128, widths=(16, 16, 32, 64), attention_levels=1) if small else decode_rows(512)
    yield from layerfusion_rows(128, 4, model_channels=32, context_dim=48) if small else layerfusion_rows(512, 256)
    if torch.cuda.is_available() and not small:
        yield from layerfusion_rows(512, 256, dtype=torch.float16)


if __name__ == "__main__":
    for row in rows("small" in sys.argv[1:], "default" in sys.argv[1:]):
        print(*row, flush=True)
