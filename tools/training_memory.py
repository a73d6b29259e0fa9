"""What training LayeringDiff on a large base keeps in memory, computed on the meta device: nothing is loaded or run.

    python tools/host.py exec tools/training_memory.py        # docs/training.md has its table

Weights, gradients, Adam's two moments and the moving average, and what the forward pass keeps for the backward pass,
counted by autograd's own hooks. A card needs about 1 to 2 GB beside that for the driver and the autoencoder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


def kept(model, batch: int, side: int) -> tuple[int, int]:
    """Bytes in bf16 that the forward pass leaves for the backward pass, weights not counted, and those of the largest
    of the blocks that checkpointing runs again.
    """
    saved, blocks = {}, []

    def pack(value):
        if not isinstance(value, torch.nn.Parameter):
            saved[id(value)] = value
        return value

    def size() -> int:
        return sum(value.numel() * min(2, value.element_size()) for value in saved.values())

    for module in model.modules():
        if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            module.register_forward_pre_hook(lambda module, _: blocks.append(-size()))
            module.register_forward_hook(lambda module, *_: blocks.append(blocks.pop() + size()))
    latent = torch.empty(batch, 4, side // 8, side // 8, device="meta")
    alpha, times = torch.empty(batch, 1, side, side, device="meta"), torch.zeros(batch, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model.train()(latent, times, latent, alpha)
    return size(), max(blocks)


def main() -> None:
    print("| base | what learns | checkpointing | batch | weights | gradients, Adam, average | activations | sum |")
    print("|---|---|---|---|---|---|---|---|")
    for family in ("SD1.5", "SD2"):
        for rank, batch, checkpointing in ((64, 8, True), (64, 8, False), (64, 2, True), (0, 8, True)):
            model = denoiser(family, rank, checkpointing)
            weights = sum(value.numel() for value in model.parameters()) * 4
            learnt = sum(value.numel() for value in model.parameters() if value.requires_grad) * 4 * 4
            whole, block = kept(denoiser(family, rank, False), batch, 512)
            activations = kept(model, batch, 512)[0] + block if checkpointing else whole
            what = f"rank {rank}" if rank else "all"
            row = (family, what, "on" if checkpointing else "off", batch)
            sizes = (weights, learnt, activations, weights + learnt + activations)
            print("| " + " | ".join([*map(str, row), *(f"{size / GIB:.1f}" for size in sizes)]) + " |", flush=True)


if __name__ == "__main__":
    main()
