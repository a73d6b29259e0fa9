"""Decode transparency at its published width (104M weights), 512×512, 8 passes, against a plain loop over them; fp32 on the CPU."""
from __future__ import annotations

import sys
import time
from pathlib import Path

import cpu_host
import host
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata

SIDE = 512


def load():
    """The pack's patches, in this process, with ComfyUI as a library; a decoder with random weights as a file holds it, and the same plain."""
    cpu_host.declare_operators()
    sys.path.insert(0, str(host.find_or_install().root))
    from comfy.cli_args import args
    args.cpu = True
    from strata.networks.transparency import TransparentDecoder
    from strata.patches import transparency, transparent_latents
    torch.manual_seed(0)
    network = TransparentDecoder().requires_grad_(False)
    return transparency.recognise("decoder", network.state_dict()), network, transparent_latents.decode


def plain(network, image, latent):
    """As published, without colours continued where nothing is seen."""
    found = []
    for flip in (False, True):
        for turns in range(4):
            views = [torch.rot90(part.flip(3) if flip else part, turns, (2, 3)) for part in (image, latent)]
            out = torch.rot90(network(*views).clip(0, 1), -turns, (2, 3))
            found.append(out.flip(3) if flip else out)
    return torch.stack(found).median(0).values


@torch.inference_mode()
def rows():
    files, network, decode = load()
    image, latent = torch.rand(1, 3, SIDE, SIDE), torch.randn(1, 4, SIDE // 8, SIDE // 8)
    decode(files, image, latent, 1), network(image, latent)  # warm up
    start = time.perf_counter()
    alpha = decode(files, image, latent)[1]
    middle = time.perf_counter()
    expected = plain(network, image, latent)[:, :1]
    end = time.perf_counter()
    assert (alpha - expected).abs().max() < 1e-4
    yield "decode, 8 passes", middle - start, end - middle, (middle - start) / (end - middle)


if __name__ == "__main__":
    for row in rows():
        print(*row)
