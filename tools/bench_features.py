"""One guided step of feature guidance (5 iterations, two scenes, and the step itself) against the released loop, on
SD1.5's structure with random weights.

The released loop records the features of both scenes once a step, one scene after the other, and runs the whole UNet
forward and backward for every iteration. Both in float32, a fifth of the width and 32×32 latents. With `published`, the
width of SD1.5: at 64×64 latents and in half precision too on a graphics card, at 32×32 on a processor (20 minutes).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import host
import torch
from turns import in_turns, rows_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata

ITERATIONS, CFG = 5, 7.5
SHAPE = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
}


class Bench:
    """The same model, scenes and latent for every way."""

    def __init__(self, side: int, channels: int, dtype: torch.dtype):
        sys.path.insert(0, str(host.find_or_install().root))
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models
        from strata.patches.feature_guidance import Plane, Planes
        from strata.patches.inversion import Inversion

        self.dtype = dtype
        config = comfy.supported_models.SD15({**SHAPE, "model_channels": channels, "dtype": dtype})
        config.manual_cast_dtype = None
        torch.manual_seed(0)
        model = config.get_model({}, "", "cpu").eval().requires_grad_(False)
        for weight in model.diffusion_model.parameters():
            torch.nn.init.normal_(
                weight, 1 if weight.ndim == 1 else 0, 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
            )
        self.device = comfy.model_management.get_torch_device()
        self.model = comfy.model_patcher.ModelPatcher(model.to(self.device), self.device, torch.device("cpu"))
        self.sigma = model.model_sampling.sigmas[500].cpu()
        self.x, *scenes = torch.randn(3, 1, 4, side, side) * self.sigma
        self.texts = torch.randn(4, 1, 77, 768)
        self.mask = (torch.arange(side) >= side // 2).float().expand(side, side)
        inversions = [
            Inversion(scene[None], self.sigma[None].cpu(), [[text, {}]], "ddim")
            for scene, text in zip(scenes, self.texts, strict=False)
        ]
        self.planes = Planes((Plane(inversions[0]), Plane(inversions[1], self.mask)))

    def ours(self, **settings) -> list[float]:
        import comfy.samplers
        from strata.patches.feature_guidance import Settings, guider

        settings = Settings(iterations=ITERATIONS, step_size=1e-4, start="given latent", end_percent=1.0, **settings)
        found = guider(self.model, [[self.texts[2], {}]], [[self.texts[3], {}]], CFG, self.planes, settings)
        with torch.inference_mode():
            found.sample(
                self.x / self.sigma,
                torch.zeros_like(self.x),
                comfy.samplers.sampler_object("euler"),
                torch.stack([self.sigma, self.sigma / 2]),
                disable_pbar=True,
            )
        return found.energies[0]

    def plain(self) -> list[float]:
        unet, scale = self.model.model.diffusion_model, (1 + self.sigma**2).sqrt()
        time_ = self.model.model.model_sampling.timestep(self.sigma[None].to(self.device)).float()
        scenes = [(plane.inversion.latents[0].to(self.device) / scale).to(self.dtype) for plane in self.planes.planes]
        texts, mask = self.texts.to(self.device, self.dtype), self.mask.to(self.device)
        features: dict[int, torch.Tensor] = {}
        hooks = [
            unet.output_blocks[number][-1].register_forward_hook(
                lambda module, args, out, level=level: features.__setitem__(level, out.float())
            )
            for level, number in ((2, 8), (3, 11))
        ]
        z, energies, sources = self.x.to(self.device) / scale, [], []
        for scene, text in zip(scenes, texts[:2], strict=True):
            with torch.no_grad():
                unet(scene, time_, context=text)
            sources.append(dict(features))
        for _ in range(ITERATIONS):
            z = z.detach().requires_grad_()
            unet(z.to(self.dtype), time_, context=texts[2])
            energy = 0
            for level, weight in ((2, 0.2), (3, 8.5)):
                for visible, source in zip((1 - mask, mask), sources, strict=True):
                    energy = energy + weight * (visible * (source[level] - features[level])).square().mean(1).sum()
            (gradient,) = torch.autograd.grad(energy, z)
            energies.append(energy.item())
            z = z.detach() - 1e-4 * gradient
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            unet(z.to(self.dtype).expand(2, -1, -1, -1), time_.expand(2), context=torch.cat([texts[2], texts[3]]))
        return energies


def rows(published: bool = False):
    for dtype in (torch.float32, torch.float16) if published and torch.cuda.is_available() else (torch.float32,):
        bench = Bench(64 if published and torch.cuda.is_available() else 32, 320 if published else 64, dtype)
        runs = {"": {}, " with checkpointing": {"checkpointing": True}, ", level 2 alone": {"level_weights": "0.2, 0"}}
        plain, *ours = in_turns(
            bench.plain, *(partial(bench.ours, **settings) for settings in runs.values()), results=True
        )
        near = 1e-3 if dtype == torch.float32 else 3e-2
        for title, own in zip(runs, ours, strict=True):
            if "level" not in title:
                assert max(abs(one / other - 1) for one, other in zip(own.result, plain.result, strict=True)) < near, (
                    own,
                    plain,
                )
            yield from rows_of(f"a guided step{title}, {str(dtype).removeprefix('torch.')}", own, plain)


if __name__ == "__main__":
    for row in rows("published" in sys.argv[1:]):
        print(*row, flush=True)
