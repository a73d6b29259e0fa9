"""Transparency and LayerFusion at published width with random weights, 512×512 on the CPU, against plain ways.

Decode transparency (104M weights) against a plain loop over its 8 passes with the blocks of diffusers it was published with; a step of LayerFusion on SD1.5's
structure, with an adapter of rank 256 on the foreground, against a step of each of three plain runs. What is compared takes turns; of each, the fastest
turn counts, and the most memory. Attention is torch's, ComfyUI's choice on NVIDIA cards; `default`: its choice on the processor, three times as slow there.
`python tools/host.py exec tools/bench_transparency.py small` only shows that it works.
"""
from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cpu_host
import host
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata

from patches import random_transparency  # noqa: E402

STEPS = 2  # the first is left out, since models are loaded in it
TURNS = 5


def load(default_attention: bool = False) -> None:
    """ComfyUI as a library in this process."""
    cpu_host.declare_operators()
    sys.path.insert(0, str(host.find_or_install().root))
    from comfy.cli_args import args
    args.cpu, args.use_pytorch_cross_attention = True, not default_attention


class Meter:
    """Seconds since it was made, and the most memory that the process has held since then beyond what it held before."""

    def __init__(self):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        self.held, self.start = self._kibibytes("VmRSS"), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(seconds, GiB)."""
        return time.perf_counter() - self.start, (self._kibibytes("VmHWM") - self.held) / 2**20

    @staticmethod
    def _kibibytes(name: str) -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def in_turns(*runs: Callable[[], tuple[float, float]]) -> list[tuple[float, float]]:
    """Seconds and GiB of each, the best and the most of its turns; other work on the machine slows one turn down and not the next."""
    turns = [[run() for run in runs] for _ in range(TURNS)]
    return [(min(seconds for seconds, _ in own), max(memory for _, memory in own)) for own in zip(*turns, strict=True)]


def compared(name: str, ours: tuple[float, float], plain: tuple[float, float]) -> Iterator[tuple]:
    for what, one, other in zip((name, f"{name}: peak memory in GiB"), ours, plain, strict=True):
        yield what, one, other, one / max(other, 1e-9)


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
def decode_rows(side: int, widths: Sequence[int] = (32, 32, 64, 128, 256, 512, 512), attention_levels: int = 3) -> Iterator[tuple]:
    from patches.test_networks import Reference
    from strata.networks.transparency import TransparentDecoder
    from strata.patches import transparency, transparent_latents
    torch.manual_seed(0)
    weights = TransparentDecoder(widths, attention_levels).state_dict()
    published = Reference(widths, attention_levels)
    published.load_state_dict(weights)
    files = {dtype: transparency.recognise("decoder", dict(weights)) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, file in files.items():
        file.parts["decoder"].model.to(dtype)
    image, latent = torch.rand(1, 3, side, side), torch.randn(1, 4, side // 8, side // 8)
    alphas = {}

    def metered(decoder) -> tuple[float, float]:
        meter = Meter()
        alphas[decoder] = plain_decode(decoder, image, latent)[:, :1] if decoder is published else transparent_latents.decode(files[decoder], image, latent)[1]
        return meter.read()

    for file in files.values():  # warm up
        transparent_latents.decode(file, image, latent, 1)
    plain, *ours = in_turns(*(partial(metered, decoder) for decoder in (published, *files)))
    assert (alphas[torch.float32] - alphas[published]).abs().max() < 1e-4
    for dtype, own in zip(files, ours, strict=True):
        yield from compared(f"decode in {str(dtype).removeprefix('torch.')}, 8 passes; plain in float32", own, plain)


def sd15(**changes):
    """SD1.5's UNet with random weights in a ModelPatcher."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    from strata.patches.transparency import FAMILIES
    unet = {**FAMILIES["SD1.5"]["unet"], "image_size": 32, "use_spatial_transformer": True, "legacy": False, "dtype": torch.float32, **changes}
    model = comfy.model_base.BaseModel(comfy.supported_models.SD15(unet))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def a_step(model, side: int, pictures: int, end: int | None = None) -> tuple[float, float]:
    """Seconds and GiB of one sampling step with guidance. end: position of the prompt's end, for LayerFusion."""
    import comfy.sample
    from strata.patches.layer_prompts import END_TOKENS
    width = model.model.model_config.unet_config["context_dim"]
    positive, negative = ([[torch.randn(pictures, 77, width), {}]] for _ in range(2))
    if end is not None:
        positive[0][1][END_TOKENS] = [end]
    latent, meters = torch.zeros(pictures, 4, side // 8, side // 8), []
    comfy.sample.sample(model, torch.randn_like(latent), STEPS, 7.0, "euler", "normal", positive, negative, latent, disable_pbar=True, seed=1,
                        callback=lambda step, *rest: meters.append(Meter()) if step == 0 else None)
    seconds, memory = meters[0].read()
    return seconds / (STEPS - 1), memory


@torch.inference_mode()
def layerfusion_rows(side: int, rank: int, **changes) -> Iterator[tuple]:
    from strata.patches import transparency, transparency_model
    from strata.patches.fusion import Settings, blend_attention
    model = sd15(**changes)
    shapes = {key: tuple(value.shape) for key, value in model.model.state_dict().items() if key.startswith("diffusion_model.")}
    files = transparency.recognise("adapter", random_transparency.adapter(shapes, rank=rank, scale=0.02))
    alone, layered = transparency_model.apply(model, files, 1.0), transparency_model.apply_to_foreground(model, files)
    blends = {name: blend_attention(layered, Settings(reuse=reuse)) for name, reuse in (("with prior pass", False), ("reusing the step before", True))}
    foreground, other, *ours = in_turns(*(partial(a_step, one, side, 1) for one in (alone, model)),
                                        *(partial(a_step, one, side, 3, end=5) for one in blends.values()))
    plain = foreground[0] + 2 * other[0], max(foreground[1], other[1])
    for name, own in zip(blends, ours, strict=True):
        yield from compared(f"LayerFusion step {name}; plain: three runs' steps", own, plain)


def rows(small: bool = False, default_attention: bool = False) -> Iterator[tuple]:
    load(default_attention)
    yield from decode_rows(128, widths=(16, 16, 32, 64), attention_levels=1) if small else decode_rows(512)
    yield from layerfusion_rows(128, 4, model_channels=32, context_dim=48) if small else layerfusion_rows(512, 256)


if __name__ == "__main__":
    for row in rows("small" in sys.argv[1:], "default" in sys.argv[1:]):
        print(*row)
