"""The shipped BFS through the pack's nodes on scenes that training has not seen: a foreground with its shadow for an
empty place and a box, beside other ways to put an object there, and the foreground of a composite that is there.

"Changed" is what a composite has beyond its background in any shadow (metrics.beyond_shadow).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.sd
import numpy as np
import torch
import torch.nn.functional as F
from mini_models import MODELS, OUTPUT, Family, picture
from strata.nodes.back_to_front import FillBackground, SampleForeground
from strata.patches import back_to_front as method
from strata.patches import decomposer, layer_files, mini_family, rgba_vae, transparency_model, transparent_latents
from strata.scenes import renderer
from strata.techniques import layering, metrics
from strata.techniques.transparency import extend_colours
from strata.training import loop, oracle
from strata.training.flux_fill import object_box

import nodes as comfyui_nodes

COUNT, SAMPLE = 96, 1
FROM = 2000  # the first file's figures were of the seeds from 1000 on, in places without a bright side
BFS, APART, FILL = "BFS", "BFS without sharing", "Flux-Fill"
INPAINT, PASTED = "inpainting", "LayerDiffuse, pasted"
TRUTH, FOUND = "truth through the autoencoders", "BFS, extracted"
FORMULA, LAYERINGDIFF = "smallest alpha", "LayeringDiff, extracted"
CLAIMS = [
    (BFS, APART, "recomposed against its composite"),
    *((BFS, other, "named object") for other in (FILL, INPAINT, PASTED)),
    *((BFS, other, "darkness of the shadow, error") for other in (FILL, INPAINT)),
    *((FOUND, other, "extracted alpha") for other in (FORMULA, LAYERINGDIFF)),
]
FILE = layer_files.BACK_TO_FRONT
SIDE, STEPS = 128, 20
NOISE = "one each"
FLOW = {"steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
FIRST = 3 * 10**6  # behind the scenes of training
DIFFERS = 0.06  # as in figures_layerfusion
NEAR = 7  # pixels of the window around an object that its soft edge may reach
FAINT = 0.04  # less darkening than this is no shadow


@dataclass(frozen=True)
class Case:
    """image, background [1,3,H,W]: with the foreground [1,4,H,W], its shadow in it, and without. box: [1,1,H,W]."""

    scene: renderer.Scene
    image: torch.Tensor
    background: torch.Tensor
    foreground: torch.Tensor
    box: torch.Tensor
    seed: int

    @property
    def front(self) -> renderer.SceneObject:
        return self.scene.objects[-1]


def case_of(seed: int, side: int = SIDE) -> Case:
    """An object in a place that is empty or has one other, and that shows where its light comes from."""
    request = renderer.Request(train=True, count=1 + seed % 2, bright_side=True)
    scene = renderer.render(request, side, side, FIRST + seed)
    front = scene.objects[-1]
    foreground, background = picture(front.rgba_with_shadow), picture(scene.behind_nearest)
    left, top, right, bottom = object_box(front, np.random.default_rng((seed, 5)), shadowed=1.0)
    box = torch.zeros(1, 1, side, side)
    box[..., top:bottom, left:right] = 1
    return Case(scene, over(foreground, background), background, foreground, box, seed)


def over(rgba: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    return layering.composite(rgba[:, :3], background, rgba[:, 3:])


class Models:
    def __init__(self):
        self.family, self.judge = Family(), oracle.load()
        mini_family.register(decomposer.UNETS)
        self.fill, self.inpaint = (
            comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models" / f"strata_mini_{name}.safetensors"))
            for name in ("flux_fill", "inpaint")
        )
        self.rgba = rgba_vae.load(rgba_vae.SHIPPED)
        file = layer_files.load(FILE, layer_files.BackToFront)
        self.coupled = method.apply(self.fill, file)
        self.apart = method.apply(self.fill, replace(file, sharing={}))
        adapter, self.decoder = (
            layer_files.load(f"strata_mini_transparent_{name}.safetensors", layer_files.Transparency)
            for name in ("attn", "decoder")
        )
        self.transparent = transparency_model.apply(self.family.model, adapter, 1.0)
        self.layeringdiff = layer_files.load(layer_files.DECOMPOSER, decomposer.Decomposer)

    def foreground(
        self, model, case: Case, extract: bool = False, noise: str = NOISE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The composite of its branch [1,3,H,W] and the foreground [1,4,H,W], by the pack's nodes."""
        vae, background = self.family.vae, case.background.movedim(1, -1)
        words = self.family.text(case.front.prompt)
        told = FillBackground.execute(words, self.family.negative, vae, background, case.box[:, 0], True).args
        given = {"composite": {"samples": vae.encode(case.image.movedim(1, -1))}} if extract else {}
        found = SampleForeground.execute(model, *told, seed=case.seed, noise=noise, **FLOW, **given).args
        composite, rgba = (one.decode(latent["samples"]) for one, latent in zip((vae, self.rgba), found, strict=True))
        return composite.movedim(-1, 1)[:, :3], rgba.movedim(-1, 1)

    def filled(self, model, case: Case, **sampling) -> torch.Tensor:
        """[1,3,H,W] by stock nodes; nothing is pasted back."""
        positive, negative, latent = comfyui_nodes.InpaintModelConditioning().encode(
            self.family.text(case.front.prompt),
            self.family.negative,
            case.background.movedim(1, -1),
            self.family.vae,
            case.box[:, 0],
            noise_mask=False,
        )
        (found,) = comfyui_nodes.common_ksampler(
            model, case.seed, positive=positive, negative=negative, latent=latent, **sampling
        )
        return self.family.vae.decode(found["samples"]).movedim(-1, 1)

    def pasted(self, case: Case) -> torch.Tensor:
        """[1,4,H,W]: an object drawn alone and scaled to where the true one stands."""
        latent = {"samples": torch.zeros(1, 4, SIDE // 8, SIDE // 8)}
        words = self.family.text(case.front.prompt)
        (found,) = comfyui_nodes.common_ksampler(
            self.transparent, case.seed, STEPS, 4.0, "dpmpp_2m", "karras", words, self.family.negative, latent
        )
        image = self.family.vae.decode(found["samples"]).movedim(-1, 1)
        rgba = torch.cat(transparent_latents.decode(self.decoder, image, found["samples"]), 1)
        inside = rgba[0, 3] > 0.5
        canvas = torch.zeros_like(rgba)
        if inside.any():
            rows, columns = (inside.any(axis).nonzero() for axis in (1, 0))
            cut = rgba[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            left, top, right, bottom = case.front.box
            size = (bottom - top, right - left)
            canvas[..., top:bottom, left:right] = F.interpolate(cut, size, mode="bilinear", antialias=True)
        return canvas

    def decomposed(self, case: Case) -> torch.Tensor:
        """[1,1,H,W]: the alpha that LayeringDiff's layers have, which is that of the object alone."""
        alpha = picture(case.front.rgba)[:, 3:]
        run = decomposer.Run(case.seed, STEPS, "ddim", "ddim_uniform")
        parts = (self.inpaint, self.family.vae, self.layeringdiff)
        front, _ = decomposer.take_apart(*parts, case.image, alpha[None], run, align=False)
        return explained(over(torch.cat([front[0], alpha], 1), case.background), case.background)


def explained(image: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """[B,1,H,W]: the smallest alpha of a layer that makes the image of the background."""
    reach = torch.maximum(background, 1 - background).clamp_min(1e-3)
    return ((image - background).abs() / reach).amax(1, keepdim=True).clamp(0, 1)


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    models, shown, found = Models(), [], {}
    for seed in seeds:
        case = case_of(seed)
        composite, layer = models.foreground(models.coupled, case)
        apart = models.foreground(models.apart, case)
        vae = models.family.vae
        true = vae.decode(vae.encode(case.image.movedim(1, -1))).movedim(-1, 1), encoded(models, case.foreground)
        pasted = models.pasted(case)
        images = {
            BFS: (composite, layer),
            APART: apart,
            FILL: (models.filled(models.fill, case, **FLOW), None),
            INPAINT: (
                models.filled(models.inpaint, case, steps=STEPS, cfg=4.0, sampler_name="euler", scheduler="normal"),
                None,
            ),
            PASTED: (over(pasted, case.background), pasted),
            TRUTH: true,
        }
        values = {name: figures_of(models, case, *pair) for name, pair in images.items()}
        extracted = models.foreground(models.coupled, case, extract=True)[1]
        alphas = {
            FOUND: extracted[:, 3:],
            FORMULA: explained(case.image, case.background),
            LAYERINGDIFF: models.decomposed(case),
            TRUTH: true[1][:, 3:],
        }
        for name, alpha in alphas.items():
            error = (alpha - case.foreground[:, 3:]).abs().mean().item()
            values[name] = values.get(name, {}) | {"extracted alpha": error}
        for name, figures in values.items():
            for figure, value in figures.items():
                found.setdefault(name, {}).setdefault(figure, []).append(value)
        if len(shown) < 12:
            gray = torch.full_like(case.background, 0.6)
            shown.append([case.background, composite, over(layer, case.background), over(layer, gray)])
            shown[-1] += [images[name][0] for name in (FILL, INPAINT, PASTED)]
            shown[-1] += [case.image, over(extracted, gray)]
    loop.save_grid(OUTPUT / "back_to_front.png", torch.cat([image for row in shown for image in row]), len(shown[0]))
    return found


def encoded(models: Models, rgba: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([extend_colours(rgba[:, :3], rgba[:, 3:]), rgba[:, 3:]], 1).movedim(1, -1)
    return models.rgba.decode(models.rgba.encode(whole)).movedim(-1, 1)


def figures_of(models: Models, case: Case, composite: torch.Tensor, layer: torch.Tensor | None) -> dict[str, float]:
    """Of a composite [1,3,H,W], and of its foreground [1,4,H,W] where there is one; the image that counts is then the
    foreground over the background.
    """
    image = composite if layer is None else over(layer, case.background)
    wanted, logits = models.judge.objects.index(case.front.name), models.judge.logits(image)[1][0]
    names = {"named object": float((logits > logits[wanted]).sum() < len(case.scene.objects))}
    side, dark = shadow_of(image, case)
    true_side, true_dark = shadow_of(case.image, case)
    names |= {
        "shadow on the right side": float(side == true_side) if true_side else float("nan"),
        "darkness of the shadow, error": abs(dark - true_dark),
    }
    if layer is None:
        return names
    alpha, outside = layer[:, 3:], (1 - case.box) * (case.foreground[:, 3:] == 0)
    through = models.family.vae.decode(models.family.vae.encode(case.background.movedim(1, -1))).movedim(-1, 1)
    changed = (metrics.beyond_shadow(composite, through) > DIFFERS).float()
    return names | {
        "alpha and what changed, IoU": metrics.alpha_iou((alpha > 0.5).float(), changed).item(),
        "alpha outside": ((alpha * outside).sum() / outside.sum().clamp_min(1)).item(),
        "recomposed against its composite": metrics.mask_error(image, composite, case.box).item(),
    }


def shadow_of(image: torch.Tensor, case: Case) -> tuple[float, float]:
    """Inside the box: the side of its object that a shadow lies on, -1 or 1 (0 where there is none), and its mean
    darkening.
    """
    body = (metrics.beyond_shadow(image, case.background) > DIFFERS).float() * case.box
    around = (1 - F.max_pool2d(body, NEAR, 1, NEAR // 2)) * case.box
    drop = ((case.background - image) / case.background.clamp_min(0.1)).mean(1, keepdim=True)
    drop = torch.where(drop > FAINT, drop, 0) * around
    if not drop.any() or not body.any():
        return 0.0, 0.0
    across = torch.arange(drop.shape[-1], dtype=drop.dtype)
    centres = [(part * across).sum() / part.sum() for part in (drop, body)]
    return float((centres[0] - centres[1]).sign()), (drop.square().sum() / drop.sum()).item()
