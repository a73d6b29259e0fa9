"""Taking one image apart with the mini family, VAE, alignment and projection included, against two plain samplings of
the inpainting model with the same steps and no guidance.
"""

from __future__ import annotations

import sys
from pathlib import Path

import host
import torch
from turns import in_turns, rows_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata

STEPS = 20


class Bench:
    def __init__(self):
        sys.path.insert(0, str(host.find_or_install().root))
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
        import comfy.sd
        from mini_models import MODELS, Family
        from strata.patches import decomposer, layer_files, mini_family

        mini_family.register(decomposer.UNETS)
        self.family = Family()
        self.model = comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models" / "strata_mini_inpaint.safetensors"))
        self.loaded = layer_files.load("strata_mini_layeringdiff.safetensors", decomposer.Decomposer)
        torch.manual_seed(0)
        self.image, self.alpha = torch.rand(1, 3, 128, 128), torch.rand(1, 1, 1, 128, 128)

    @torch.inference_mode()
    def apart(self) -> torch.Tensor:
        from strata.patches import decomposer

        run = decomposer.Run(0, STEPS, "ddim", "ddim_uniform")
        return decomposer.take_apart(self.model, self.family.vae, self.loaded, self.image, self.alpha, run)[1]

    @torch.inference_mode()
    def plain(self) -> torch.Tensor:
        import nodes

        positive, negative, latent = nodes.InpaintModelConditioning().encode(
            self.family.negative,
            self.family.negative,
            self.image.movedim(1, -1),
            self.family.vae,
            self.alpha[0, :, 0],
            noise_mask=False,
        )
        for seed in range(2):
            (sampled,) = nodes.common_ksampler(
                self.model, seed, STEPS, 1.0, "ddim", "ddim_uniform", positive, negative, latent
            )
        return sampled["samples"]


def rows():
    bench = Bench()
    apart, plain = in_turns(bench.apart, bench.plain)
    yield from rows_of("an image taken apart, and two plain samplings", apart, plain)


if __name__ == "__main__":
    for row in rows():
        print(*row, flush=True)
