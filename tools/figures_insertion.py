"""FeatGLaC's insertion at a depth (Tab. 1) on rendered scenes of two objects: the farther one is inserted behind the
nearer one, at the depth at which the renderer has it.

Depth error: an object's depth is that of the ground at its foot, as the renderer counts it. Nearer: how much what is
nearer has changed in what was sampled, before its old pixels are put back. One after the other: an empty place, into
which the nearer object is inserted first, then the farther one behind it. The pictures go to output/insertion.png, one
row a scene: scene without the object, the methods in their order, truth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.sample
import comfy.samplers
import comfy.sd
import numpy as np
import torch
from figures_back_to_front import DIFFERS
from mini_models import MODELS, OUTPUT, Family, picture
from strata.nodes.compositing import InsertAtDepth
from strata.patches.inversion import invert
from strata.scenes import renderer
from strata.techniques import metrics
from strata.techniques.depth import RANGES
from strata.techniques.harmonization import feathered
from strata.training import loop, oracle
from strata.training.flux_fill import object_box

import nodes as comfyui_nodes

COUNT, SAMPLE = 24, 0
FROM = 1000
FIRST = 6 * 10**9  # numbers of scenes that nothing was trained on
SIDE, STEPS, CFG, FEATHER = 128, 20, 6.0, 8.0  # as in object_insertion_mini.json
GUIDED, AMODAL, BOX = "FeatGLaC", "inpainting, amodal box", "inpainting, whole box"
AGAIN, TRUTH = "FeatGLaC, one after the other", "truth"
CLAIMS = [
    *((GUIDED, other, figure) for other in (AMODAL, BOX) for figure in ("object seen", "depth error", "seam")),
    (GUIDED, AGAIN, "object seen"),
]
FOOT = 2  # pixels of a row that are taken for an object's foot


@dataclass(frozen=True)
class Case:
    """image [1,3,H,W] and depth [1,H,W] before the object is there; it gets a box (left, top, right, bottom)."""

    scene: renderer.Scene
    image: torch.Tensor
    depth: torch.Tensor
    item: renderer.SceneObject
    box: tuple[int, int, int, int]
    seed: int

    @property
    def region(self) -> torch.Tensor:
        region = torch.zeros(1, 1, SIDE, SIDE)
        left, top, right, bottom = self.box
        region[..., top:bottom, left:right] = 1
        return region


def case_of(seed: int) -> Case:
    """The first scene of the seed whose farther object is half hidden at most and shows its foot."""
    for attempt in range(1000):
        request = renderer.Request(train=True, count=2)
        scene = renderer.render(request, SIDE, SIDE, FIRST + 1000 * seed + attempt)
        item, nearer = scene.objects
        lowest = np.flatnonzero(item.mask.sum(1) >= FOOT)
        on_ground = renderer.catalogue()[item.name].hover == 0 and len(lowest) and item.box[3] - lowest[-1] <= FOOT
        if on_ground and 0.5 < item.visible < 0.95:
            break
    box = object_box(item, np.random.default_rng((seed, 6)), shadowed=0.0)
    image = picture(renderer.over(nearer.rgba_with_shadow, scene.background))
    depth = np.where(nearer.rgba[..., 3] > 0.5, np.float32(nearer.depth), scene.background_depth)
    return Case(scene, image, torch.from_numpy(depth)[None], item, box, seed)


class Models:
    def __init__(self):
        self.family, self.judge = Family(), oracle.load()
        self.inpaint = comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models/strata_mini_inpaint.safetensors"))

    def words(self, case: Case):
        return self.family.text(f"{case.item.prompt} {renderer.PLACE_WORDS[case.scene.kind][0]}")

    def guided(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """What was sampled and what becomes of the image, [1,3,H,W] each."""
        family, sigmas = self.family, self.family.sigmas(STEPS)
        image, (left, top, right, bottom) = case.image.movedim(1, -1), case.box
        inversion = invert(self.inpaint, family.vae.encode(image), self.family.negative, None, sigmas)
        guider, latent, visible, _nearer = InsertAtDepth.execute(
            *(self.inpaint, self.words(case), family.negative, family.vae, image, inversion, case.depth),
            *(case.item.depth, left, top, right - left, bottom - top, "black", "NaN only", CFG),
            range=RANGES[2],
            level_weights="0.2, 8.5",
            foreground=1.0,
            iterations=3,
            step_size=0.2,
            norm="l2",
        ).args
        noise = comfy.sample.prepare_noise(latent["samples"], case.seed)
        euler = comfy.samplers.sampler_object("euler")
        found = guider.sample(
            *(noise, latent["samples"], euler, sigmas),
            denoise_mask=latent["noise_mask"][:, None],
            disable_pbar=True,
            seed=case.seed,
        )
        return self.pasted(case, found, visible[:, None])

    def inpainted(self, case: Case, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by stock nodes, in the part [1,1,H,W]."""
        positive, negative, latent = comfyui_nodes.InpaintModelConditioning().encode(
            *(self.words(case), self.family.negative, case.image.movedim(1, -1), self.family.vae, visible[:, 0])
        )
        (found,) = comfyui_nodes.common_ksampler(
            *(self.inpaint, case.seed, STEPS, CFG, "euler", "ddim_uniform", positive, negative, latent)
        )
        return self.pasted(case, found["samples"], visible * feathered(case.region, FEATHER))

    def pasted(self, case: Case, latent, visible) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.family.vae.decode(latent).movedim(-1, 1)[:, :3].clamp(0, 1)
        return made, visible * made + (1 - visible) * case.image

    def one_after_the_other(self, case: Case) -> tuple[Case, tuple[torch.Tensor, torch.Tensor]]:
        """The case whose nearer object was inserted too, and its result."""
        nearer, place = case.scene.objects[1], picture(case.scene.background)
        empty = torch.from_numpy(case.scene.background_depth)[None]
        box = object_box(nearer, np.random.default_rng((case.seed, 7)), shadowed=0.0)
        first = replace(case, image=place, depth=empty, item=nearer, box=box)
        image = self.guided(first)[1]
        depth = torch.where(body(image, first)[:, 0] > 0, torch.tensor(nearer.depth), empty)
        second = replace(case, image=image, depth=depth)
        return second, self.guided(second)


def body(image: torch.Tensor, case: Case) -> torch.Tensor:
    """1 where an object has come into the box, shadows apart, [1,1,H,W]."""
    return (metrics.beyond_shadow(image, case.image) > DIFFERS).float() * case.region


def depth_error(image: torch.Tensor, case: Case) -> float:
    """nan where nothing came in."""
    rows = (body(image, case)[0, 0].sum(1) >= FOOT).nonzero()
    if not len(rows):
        return float("nan")
    foot, horizon = (int(rows.max()) + 1) / SIDE, case.scene.horizon
    return abs(1 - (foot - horizon) / (1 - horizon) - case.item.depth)


def figures_of(models: Models, case: Case, made: torch.Tensor, image: torch.Tensor) -> dict[str, float]:
    scene, nearer = case.scene, (picture(case.scene.objects[1].rgba)[:, 3:] > 0.5).float()
    wanted, logits = models.judge.objects.index(case.item.name), models.judge.logits(image)[1][0]
    return {
        "object seen": float((logits > logits[wanted]).sum() < len(scene.objects)),
        "both objects": models.judge.text_agreement(image, [None], [[one.name for one in scene.objects]])[1].item(),
        "depth error": depth_error(image, case),
        "seam": metrics.seam_error(image, picture(scene.composite), nearer).item(),
        "nearer": metrics.mask_error(made, case.image, nearer * case.region).item(),
    }


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    models, shown, found = Models(), [], {}
    for seed in seeds:
        case = case_of(seed)
        amodal = case.region * (case.depth[:, None] >= case.item.depth)
        truth = picture(case.scene.composite)
        images = {
            GUIDED: (case, models.guided(case)),
            AMODAL: (case, models.inpainted(case, amodal)),
            BOX: (case, models.inpainted(case, case.region)),
            AGAIN: models.one_after_the_other(case),
            TRUTH: (case, (truth, truth)),
        }
        for name, (own, pair) in images.items():
            for figure, value in figures_of(models, own, *pair).items():
                if name != AGAIN or figure not in ("seam", "nearer"):  # there the nearer object is a drawn one
                    found.setdefault(name, {}).setdefault(figure, []).append(value)
        if len(shown) < 12:
            shown.append([case.image, *(pair[1] for _, pair in images.values())])
    loop.save_grid(OUTPUT / "insertion.png", torch.cat([image for row in shown for image in row]), len(shown[0]))
    return found
