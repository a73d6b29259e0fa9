"""Every model node behind and in front of core's and other packs' patches, on the shipped mini family: the table of
docs/compatibility.md.

A patch works when the result is finite, has the same shape and is another than without it. Where it is refused, the
error is one sentence that begins with the socket.
"""

import copy
import re
from pathlib import Path

import comfy.samplers
import comfy.weight_adapter
import pytest
import torch
from comfy_extras import (
    nodes_differential_diffusion,
    nodes_freelunch,
    nodes_hypertile,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
    nodes_tomesd,
)
from mini_models import CHECKPOINT, MODELS, Family
from strata.nodes import compositing, fusion, harmonize, shared_layers, transparency
from strata.techniques.layers import Layer, LayerStack, write_layers

import nodes as comfyui_nodes

from .guidance_helpers import with_adapter
from .sampling_helpers import Hints, conditioning
from .small_models import sharing, small

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "compatibility.md"
SIDE, STEPS = 64, 2
SAMPLING = {"seed": 1, "steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def core(node, *values):
    """A core node called as ComfyUI calls it, whichever way it is written."""
    found = node.execute(*values) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(*values)
    return found[0]


def with_lora(model, _):
    model = model.clone()
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, weight in model.model.state_dict().items():
        if name.startswith("diffusion_model.") and name.endswith(("to_q.weight", "to_v.weight")):
            up, down = (
                torch.randn(weight.shape[0], 4, generator=generator),
                torch.randn(4, weight.shape[1], generator=generator),
            )
            weights[name] = comfy.weight_adapter.LoRAAdapter(set(), (up * 0.1, down * 0.1, 4.0, None, None, None))
    assert len(model.add_patches(weights)) == len(weights) > 0
    return model


def distilled(prediction, zsnr):
    return lambda model, _: core(nodes_model_advanced.ModelSamplingDiscrete, model, prediction, zsnr)


PATCHES = {
    "FreeU": lambda model, _: core(nodes_freelunch.FreeU, model, 1.3, 1.4, 0.9, 0.2),
    "FreeU V2": lambda model, _: core(nodes_freelunch.FreeU_V2, model, 1.3, 1.4, 0.9, 0.2),
    "RescaleCFG": lambda model, _: core(nodes_model_advanced.RescaleCFG, model, 0.7),
    "Perturbed-Attention Guidance": lambda model, _: core(nodes_pag.PerturbedAttentionGuidance, model, 3.0),
    "Perp-Neg": lambda model, mini: core(nodes_perpneg.PerpNeg, model, mini.text("a picture"), 1.0),
    "Differential Diffusion": lambda model, _: core(nodes_differential_diffusion.DifferentialDiffusion, model),
    "ControlNet": lambda model, _: model,
    "IPAdapter-like": lambda model, _: with_adapter(model),
    "LoRA": with_lora,
    "v prediction": distilled("v_prediction", False),
    "v prediction, zero SNR": distilled("v_prediction", True),
    "HyperTile": lambda model, _: core(nodes_hypertile.HyperTile, model, 32, 2, 3, False),
    "Token merging": lambda model, _: core(nodes_tomesd.TomePatchModel, model, 0.5),
    "Deep Shrink": lambda model, _: core(
        nodes_model_downscale.PatchModelAddDownscale, model, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"
    ),
    "Self-Attention Guidance": lambda model, _: core(nodes_sag.SelfAttentionGuidance, model, 0.5, 2.0),
}


class Bench(Family):
    """What the nodes are given. words: conditionings with a ControlNet on them where that is the patch."""

    width, side = 192, SIDE  # channels of the middle block

    def __init__(self):
        super().__init__()
        self.joint = JointBench()
        (inpaint,) = comfyui_nodes.UNETLoader().load_unet("strata_mini_inpaint.safetensors", "default")
        self.models = {"sd": self.model, "inpaint": inpaint}
        scene = self.scene("beach", ("apple",), 1)[0]
        self.image = torch.nn.functional.interpolate(
            torch.from_numpy(scene.composite).movedim(-1, 0)[None], (SIDE, SIDE)
        ).movedim(1, -1)
        alpha = torch.nn.functional.interpolate(
            torch.from_numpy(scene.objects[0].rgba).movedim(-1, 0)[None], (SIDE, SIDE)
        ).movedim(1, -1)
        self.stack = write_layers(LayerStack((SIDE, SIDE), (Layer(self.image[0], "place"), Layer(alpha[0], "apple"))))
        (self.adapter,) = transparency.LoadTransparency.execute("strata_mini_transparent_attn.safetensors").args[:1]
        self.inversions = [
            compositing.InvertImage.execute(
                self.model, self.vae, image, self.text(words), "ddim", STEPS, "ddim_uniform", 3.0, 1, 0, "off"
            ).args[0]
            for image, words in ((self.image, "an apple"), (1 - self.image, "a beach"))
        ]
        self.mask = alpha[..., 3]

    def latent(self, patch):
        latent = {"samples": torch.zeros(1, 4, self.side // 8, self.side // 8)}
        if patch == "Differential Diffusion":
            latent["noise_mask"] = torch.linspace(0, 1, self.side).expand(1, self.side, self.side)
        return latent

    def conditioned(self, conditioning, patch):
        if patch != "ControlNet":
            return conditioning
        control = copy.copy(
            self.__dict__.setdefault(
                "control", Hints(torch.randn(1, self.width, 1, 1, generator=torch.Generator().manual_seed(4)))
            )
        )
        return [[text, {**more, "control": control, "control_apply_to_uncond": True}] for text, more in conditioning]


class JointBench:
    """The same for the nodes of SD1.5 alone: its whole structure at reduced width, with random weights, because no
    weights of it are shipped.
    """

    side, latent, conditioned = 2 * SIDE, Bench.latent, Bench.conditioned

    def __init__(self):
        self.model = small()
        self.models = {"SD1.5": self.model}
        self.width = self.model.model.diffusion_model.middle_block[-1].out_channels
        self.negative, self.weights = (
            self.text("nothing"),
            {frames: sharing(self.model, frames, 32 * (frames == 2))[1] for frames in (2, 3)},
        )
        self.image = torch.rand(1, self.side, self.side, 3, generator=torch.Generator().manual_seed(3))

    def text(self, words):
        return conditioning(self.model, len(words), rows=1)


def joint_layers(mini, model, behind, patch):
    words = [mini.conditioned(mini.text(name), patch) for name in ("a dog", "a beach", "a dog on a beach")]
    found = transparency.SampleJointLayers.execute(
        model, mini.weights[3], *words, negative=mini.negative, latent_image=mini.latent(patch), **SAMPLING
    )
    return torch.cat([branch["samples"] for branch in found.args])


def around_layer(mini, model, behind, patch):
    words = [mini.conditioned(mini.text(name), patch) for name in ("a dog", "a dog on a beach")]
    found = transparency.SampleAroundLayer.execute(
        model, mini.weights[2], mini.image, *words, negative=mini.negative, latent_image=mini.latent(patch), **SAMPLING
    )
    return torch.cat([branch["samples"] for branch in found.args])


def apply_transparency(mini, model, behind, patch):
    model = behind(transparency.ApplyTransparency.execute(model, mini.adapter, 1.0).args[0])
    values = (SAMPLING[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler"))
    (found,) = comfyui_nodes.KSampler().sample(
        model, *values, mini.conditioned(mini.text("an apple"), patch), mini.negative, mini.latent(patch)
    )
    return found["samples"]


def attention_blend(mini, model, behind, patch):
    model = behind(
        fusion.AttentionBlend.execute(
            model, 1.0, 10.0, 0.0, 1.0, "all", fusion.STRUCTURE[0], fusion.BLENDED_TEXT[0], mini.adapter
        ).args[0]
    )
    positive = mini.conditioned(fusion.EncodeLayerPrompts.execute(mini.clip, "an apple", "a beach", "").args[0], patch)
    found = fusion.LayerFusionSampler.execute(
        model, positive, next(iter(fusion.NOISE)), negative=mini.negative, latent_image=mini.latent(patch), **SAMPLING
    )
    return torch.cat([branch["samples"] for branch in found.args[:3]])


def layered(mini, model, behind):
    model = shared_layers.SharedLayers.execute(model, 1.0, 0.0, 1.0).args[0]
    return behind(shared_layers.ContextMaps.execute(model, 1.0, 1.0).args[0])


def layers_sampler(mini, model, behind, patch):
    positive = mini.conditioned(shared_layers.LayerPrompts.execute(mini.clip, "a beach", "an apple").args[0], patch)
    found = shared_layers.LayersSampler.execute(
        layered(mini, model, behind),
        mini.vae,
        positive,
        next(iter(shared_layers.NOISE)),
        True,
        0.4,
        0.6,
        mini.adapter,
        negative=mini.negative,
        latent_image=mini.latent(patch),
        **SAMPLING,
    )
    return found.args[4]["samples"]


def image_to_layers(mini, model, behind, patch):
    positive = mini.conditioned(shared_layers.LayerPrompts.execute(mini.clip, "a beach", "an apple").args[0], patch)
    return shared_layers.ImageToLayers.execute(
        layered(mini, model, behind), mini.vae, mini.image, positive, mini.negative, STEPS, 3.0, "ddim_uniform"
    ).args[1]


def invert(method):
    def run(mini, model, behind, patch):
        found = compositing.InvertImage.execute(
            model,
            mini.vae,
            mini.image,
            mini.conditioned(mini.text("an apple"), patch),
            method,
            STEPS,
            "ddim_uniform",
            3.0,
            1,
            0,
            "off",
            mini.negative,
        )
        return found.args[0].latents[0] if method == "ddim" else found.args[0].null

    return run


def guided(guider, latent):
    noise, euler = (
        torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1)),
        comfy.samplers.sampler_object("euler"),
    )
    sigmas = comfy.samplers.calculate_sigmas(
        guider.model_patcher.get_model_object("model_sampling"), "ddim_uniform", STEPS + 2
    )
    mask = latent.get("noise_mask")
    return guider.sample(
        noise,
        latent["samples"],
        euler,
        sigmas,
        denoise_mask=None if mask is None else mask[:, None],
        disable_pbar=True,
        seed=1,
    )


def feature_guidance(mini, model, behind, patch):
    planes = compositing.GuidancePlane.execute(mini.inversions[1], -1, 1.0).args[0]
    planes = compositing.GuidancePlane.execute(mini.inversions[0], -1, 1.0, mini.mask, planes).args[0]
    guider = compositing.FeatureGuidance.execute(
        model,
        mini.conditioned(mini.text("an apple"), patch),
        mini.negative,
        planes,
        3.0,
        compositing.SOURCES[0],
        iterations=1,
        start="given latent",
    ).args[0]
    found = guided(guider, mini.latent(patch))
    assert guider.energies
    return found


def insert_at_depth(mini, model, behind, patch):
    depth = mini.mask[..., None].expand(-1, -1, -1, 3)
    guider, latent, *_ = compositing.InsertAtDepth.execute(
        model,
        mini.conditioned(mini.text("a dog"), patch),
        mini.negative,
        mini.vae,
        mini.image,
        mini.inversions[0],
        depth,
        0.5,
        8,
        8,
        48,
        48,
        "white",
        "auto",
        cfg=3.0,
        level_weights="0.2, 8.5",
        foreground=1.0,
        iterations=1,
        step_size=0.1,
        norm="l2",
    ).args
    return guided(
        guider, {**latent, **{name: value for name, value in mini.latent(patch).items() if name != "samples"}}
    )


def harmonize_layers(mini, model, behind, patch):
    values = {name: SAMPLING[name] for name in ("seed", "cfg", "sampler_name", "scheduler")}
    found = harmonize.HarmonizeLayers.execute(
        model,
        mini.conditioned(mini.text("an apple"), patch),
        mini.negative,
        mini.vae,
        mini.stack,
        steps=5,
        start_percent=0.4,
        end_percent=0.6,
        foregrounds="relight",
        feather=2.0,
        **values,
    )
    return found.args[1]["samples"]


NODES = {  # node: (run, model, whether a patch may come behind it)
    "Apply transparency": (apply_transparency, "sd", True),
    "Attention blend, LayerFusion sampler": (attention_blend, "sd", True),
    "Shared layers, Context maps, Layers sampler": (layers_sampler, "sd", True),
    "Image to layers": (image_to_layers, "sd", True),
    "Invert image, ddim": (invert("ddim"), "sd", False),
    "Invert image, null-text": (invert("null-text"), "sd", False),
    "Feature guidance": (feature_guidance, "sd", False),
    "Insert at a depth": (insert_at_depth, "inpaint", False),
    "Harmonize layers": (harmonize_layers, "sd", False),
    "Sample joint layers": (joint_layers, "SD1.5", False),
    "Sample around a layer": (around_layer, "SD1.5", False),
}


@pytest.fixture(scope="module")
def mini():
    import folder_paths

    for kind in ("checkpoints", "diffusion_models", "layer_model"):
        folder_paths.add_model_folder_path(kind, str(MODELS / kind))
    with torch.inference_mode():
        return Bench()


def outcome(mini, node, patch, behind):
    run, kind, _ = NODES[node]
    mini = mini if kind in mini.models else mini.joint
    model, plain = mini.models[kind], lambda model, _=None: model
    key = node, patch == "Differential Diffusion"
    if key not in mini.__dict__.setdefault("unpatched", {}):
        mini.unpatched[key] = run(mini, model, plain, patch if key[1] else None)
    try:
        before, after = (plain, PATCHES[patch]) if behind else (PATCHES[patch], plain)
        found = run(mini, before(model, mini), lambda model: after(model, mini), patch)
    except ValueError as error:
        assert re.match(r"(model|positive|negative|planes|latent_image): [^\n]+$", str(error)), error
        return "refused"
    except AttributeError as error:
        with pytest.raises(AttributeError, match=re.escape(str(error))):
            stock(mini, model, patch)
        return "fails in ComfyUI"
    assert found.isfinite().all() and found.shape == mini.unpatched[key].shape
    return "works" if not torch.equal(found, mini.unpatched[key]) else "no effect"


@pytest.mark.parametrize("node", NODES)
def test_the_page_says_what_happens(mini, node):
    told = page()
    for patch in PATCHES:
        with torch.inference_mode():
            found = {outcome(mini, node, patch, behind) for behind in ((False, True) if NODES[node][2] else (False,))}
        assert found == {told[node][patch]}, (node, patch)


def stock(mini, model, patch):
    """ComfyUI's own inpainting with the patch."""
    words = mini.text("a dog"), mini.negative
    positive, negative, latent = comfyui_nodes.InpaintModelConditioning().encode(
        *words, mini.image, mini.vae, torch.ones(1, SIDE, SIDE), noise_mask=True
    )
    comfyui_nodes.KSampler().sample(
        PATCHES[patch](model, mini), 1, STEPS, 3.0, "euler", "normal", positive, negative, latent
    )


def page() -> dict[str, dict[str, str]]:
    """{node: {patch: outcome}} of the page's table, which has one row a patch."""
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")]
        for line in PAGE.read_text(encoding="utf-8").partition("\n## ")[0].splitlines()  # the first table
        if line.startswith("|")
    ]
    nodes = rows[0][1:]
    return {node: {row[0]: row[1 + column] for row in rows[2:]} for column, node in enumerate(nodes)}
