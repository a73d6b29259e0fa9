"""One device rule: pictures, masks and layers lie where ComfyUI keeps them, which with --gpu-only is the card. Every
node runs with its tensors on another device than the processor, and gives what it gives on the processor.

The models stay on the processor, so that ComfyUI brings everything to them and back again.
"""

import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from bad_values import Good
from mini_models import CHECKPOINT
from PIL import Image
from safetensors.torch import save_file
from strata import nodes
from strata.networks import flux
from strata.nodes import layers_io, shared_layers
from strata.nodes.back_to_front import BackToFront, FillBackground
from strata.nodes.transparency import LoadRGBAVAE
from strata.patches import depth_model, detection
from torch.utils._python_dispatch import _disable_current_modes

from . import card, tiny_detectors
from .random_flux import random_file, randomised_flux
from .sampling_helpers import conditioning
from .small_models import sharing, small

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")
NODES = {node.define_schema().node_id: node for module in nodes.MODULES for node in module.NODES}
MOVED = ("IMAGE", "MASK", "IMAGE,MASK", "LATENT", "LAYERS", "CONDITIONING")  # what comes over links as tensors
SAMPLING = {"seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
CASES = {  # further ways through a node: inputs by their type, or as they are
    "Strata_AddLayer": [{"mask": "MASK", "layers": None}],
    "Strata_AmodalMask": [{"region": "MASK"}],
    "Strata_ChangeLayer": [{"layer": "1", "mask": "MASK", "image": "IMAGE"}],
    "Strata_CompleteLayers": [{"layers": "holes"}],
    "Strata_ComposeByDepth": [{"soft_edge": 0.0, "near_is": "auto"}],
    "Strata_DecodeTransparency": [{"background": "IMAGE", "passes": "4", "clean": "off"}, {"tile_size": 32}],
    "Strata_DecomposeImage": [{"exact": False, "align_details": False, "start": "image"}],
    "Strata_DetectForeground": [{"matches": "nearest", "depth": "IMAGE"}],
    "Strata_EditLayers": [{"edits": '{"layers": [{"layer": 1, "rotation": 20, "w": 40}]}'}],
    "Strata_EncodeTransparency": [{"mask": "MASK"}],
    "Strata_FlattenLayers": [{"blending": "linear light", "background": "#ff000080"}],
    "Strata_GuidancePlane": [{"mask": "MASK", "behind": "STRATA_PLANES"}],
    "Strata_HarmonizeLayers": [{"detail": 8.0, "foregrounds": "relight"}, {"feather": 4.0, "reach": 0.3}],
    "Strata_InsertAtDepth": [{"region": "MASK"}],
    "Strata_InvertImage": [
        {"method": "null-text", "steps": 2, "inner_steps": 1},
        {"method": "noise only"},
        {"disk_cache": "on"},
    ],
    "Strata_LayersFromImages": [{"masks": "MASK", "layers": "LAYERS"}],
    "Strata_LayersSampler": [{"harmonize": False}, {"decoder": None, "model": "maps"}],
    "Strata_LayersToBatch": [{"at_canvas_size": False}],
    "Strata_MatteForeground": [{"method": "ViTMatte", "matting_model": "vitmatte", "transparent_things": "dino"}],
    "Strata_OrderLayers": [{"action": "merge"}],
    "Strata_SaveLayers": [{"format": "OpenRaster"}, {"format": "PNG layers"}],
    "Strata_SetLayer": [{"action": "change", "layer": "1", "mask": "MASK", "image": "IMAGE"}],
    "Strata_SliceByDepth": [
        {"near_is": "black", "missing_depth": "zero and NaN", "fill_holes": "blurred", "points": "0.5, 0.5"},
        {"refine_edges": "matting", "fill_holes": "blurred"},
        {"soft_edge": 3.0, "range": "whole batch"},
    ],
    "Strata_TransformLayer": [{"rotation": 20.0, "scale": 0.7, "flip_h": True}],
}


class Values(Good):
    """Those of tools/bad_values.py, and what it leaves out: files, and SD1.5's nodes with random weights."""

    def __init__(self):
        super().__init__()
        image = self.values["IMAGE"]
        self.values["IMAGE,MASK"] = image * (image > 0.3)  # with holes
        ground, thing = self.values["LAYERS"]["layers"]
        hole = torch.cat([ground["image"], 1 - thing["image"][..., 3:]], -1)
        self.values["holes"] = {**self.values["LAYERS"], "layers": [{**ground, "image": hole}, thing]}
        self.values["maps"] = shared_layers.ContextMaps.execute(
            self.own["Strata_LayersSampler"]["model"], 1.0, 1.0
        ).args[0]
        torch.manual_seed(0)
        fill = comfy.sd.load_diffusion_model_state_dict(flux.host_form(randomised_flux().state_dict()))
        text, mask = self.values["CONDITIONING"], self.values["MASK"]
        coupled = BackToFront.execute(fill, "bfs.safetensors", "as in the file", 1.0).args[0]
        rgba = LoadRGBAVAE.execute("strata_mini_rgba.safetensors").args[0]
        filled = FillBackground.execute(text, text, self.values["VAE"], image, mask, True).args
        model = small()
        words = {"positive": 1, "negative": 2, "foreground": 3, "background": 4, "blended": 5, "layer": 6}
        joint = {name: conditioning(model, seed, rows=1) for name, seed in words.items()} | SAMPLING
        joint |= {"model": model, "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}}
        self.own |= {
            "Strata_SampleJointLayers": {**joint, "transparency": sharing(model, 3)[1]},
            "Strata_SampleAroundLayer": {**joint, "transparency": sharing(model, 2, 32)[1]},
            "Strata_LoadDepth": {"file": "depth.png"},
            "Strata_LoadLayers": {"file": "layers.psd"},
            "Strata_LoadLayerImage": {"files": "depth.png"},
            "Strata_SaveLayers": {"filename_prefix": "layers", "format": "PSD"},
            "Strata_EstimateDepth": {"model": "tiny"},
            "Strata_DetectForeground": {
                "prompt": "a dog",
                "detector": "dino",
                "segmenter": "sam",
                "threshold": 0.0,
                "text_threshold": 0.0,
            },
            "Strata_BackToFront": {"model": fill, "file": "bfs.safetensors"},
            "Strata_SampleForeground": {
                "model": coupled,
                "positive": filled[0],
                "negative": filled[1],
                "latent_image": filled[2],
            },
            "Strata_RedrawLayer": {"model": coupled, "layer": "2", "rgba_vae": rgba, "sharing": None, "decoder": None},
            "Strata_RenderScene": {"kind": "beach", "objects": "apple", "width": 64, "height": 64},
        }

    def case(self, node, changed: dict) -> dict:
        found = {**self.of(node), **{name: self.values.get(value, value) for name, value in changed.items()}}
        plain = {"sampler_name": "euler", "disk_cache": "off"}
        return found | {name: value for name, value in plain.items() if name in found and name not in changed}


@pytest.fixture(scope="module", autouse=True)
def tiny_depth_model(tmp_path_factory):
    from transformers import AutoModelForDepthEstimation

    folder = tmp_path_factory.mktemp("depth")
    tiny_detectors.depth_anything(folder / "tiny")
    folder_paths.add_model_folder_path(depth_model.CONFIG["folder"], str(folder))
    load = AutoModelForDepthEstimation.from_pretrained

    def without_card(*args, **kwargs):
        """Transformers makes its models on the device that stands for the card here."""
        with _disable_current_modes():
            return load(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForDepthEstimation, "from_pretrained", without_card)
        yield


@pytest.fixture(scope="module", autouse=True)
def tiny_detectors_there(tmp_path_factory):
    root = tmp_path_factory.mktemp("detectors")
    tiny_detectors.grounding_dino(root / "grounding-dino" / "dino")
    tiny_detectors.sam(root / "sams" / "sam")
    tiny_detectors.vitmatte(root / "vitmatte" / "vitmatte")
    for kind in ("grounding-dino", "sams", "vitmatte"):
        folder_paths.add_model_folder_path(kind, str(root / kind))
    load = detection._loaded

    def without_card(*args):
        with _disable_current_modes():
            return load(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "_loaded", without_card)
        yield


@pytest.fixture(scope="module", autouse=True)
def back_to_front_there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layer_model")
    save_file(random_file("released", own=True), folder / "bfs.safetensors")
    folder_paths.add_model_folder_path("layer_model", str(folder))


@pytest.fixture(scope="module")
def here():
    with torch.inference_mode():
        return Values()


@pytest.fixture(scope="module")
def there():
    """Models and inversions that were made while ComfyUI kept its tensors on the card."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), card.card():
        patch.setattr(comfy.model_management, "intermediate_device", lambda: card.CARD)
        return Values()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Input and output folder are one."""
    for kind in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path))
    monkeypatch.setattr(layers_io.args, "disable_metadata", True)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_ENABLED", False)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "depth.png")
    return tmp_path


def cases():
    for name in NODES:
        for number, changed in enumerate([{}, *CASES.get(name, ())]):
            yield pytest.param(name, changed, id=f"{name}{number or ''}")


def run(name: str, values: dict) -> tuple:
    """What a node gives, and what a sampler makes of the model or guider among it."""
    node = NODES[name]
    torch.manual_seed(0)
    found = node.execute(**values)
    kinds = [str(one.get_io_type()) for one in node.define_schema().outputs]
    return kinds, list(found.args), sampled(kinds, found.args, values)


def sampled(kinds: list[str], outputs: tuple, values: dict):
    latent = {"samples": torch.zeros(1, 4, 8, 8).to(comfy.model_management.intermediate_device())}
    if "LATENT" in kinds and "GUIDER" in kinds:
        latent = outputs[kinds.index("LATENT")]
    if "GUIDER" not in kinds:
        return None
    guider, samples = outputs[kinds.index("GUIDER")], latent["samples"]
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "ddim_uniform", 4)
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
    return guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        disable_pbar=True,
        seed=1,
    )


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in tensors(part)] if isinstance(value, list | tuple) else []


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Up to the order in which sums are made."""
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-4 * max(1.0, float(one.abs().max()))))


@pytest.mark.parametrize(("name", "changed"), list(cases()))
def test_no_node_lets_two_devices_meet(name, changed, here, there, files, monkeypatch):
    node = NODES[name]
    if name == "Strata_LoadLayers":
        saved = here.case(NODES["Strata_SaveLayers"], {})
        with torch.inference_mode():
            NODES["Strata_SaveLayers"].execute(**saved)
        next(files.glob("*.psd")).rename(files / "layers.psd")
    inputs = {one.id: str(one.get_io_type()) for one in node.define_schema().inputs}
    with torch.inference_mode():
        kinds, expected, drawn = run(name, here.case(node, changed))
    with torch.inference_mode(), card.card():
        monkeypatch.setattr(comfy.model_management, "intermediate_device", lambda: card.CARD)
        values = there.case(node, changed)
        # Prompts come from the text encoder, and every second picture, mask or latent from a node that knows no card.
        prompts = [key for key in values if inputs[key] == "CONDITIONING"]
        others = [key for key in values if inputs[key] in MOVED and key not in prompts]
        values |= {key: card.to_card(values[key]) for key in (*prompts, *others[::2])}
        _, found, drawn_there = run(name, values)
    for kind, one, other in zip(kinds, expected, found, strict=True):
        if kind in ("IMAGE", "MASK", "LAYERS"):
            assert all(isinstance(value, card.CardTensor) for value in tensors(other)), f"{kind} left the card"
        if kind in MOVED:
            for value, same in zip(tensors(one), tensors(card.from_card(other)), strict=True):
                assert close(value, same), f"{kind}: {(value - same).abs().max()}"
    if drawn is not None:
        assert close(drawn, card.from_card(drawn_there))


def test_the_card_refuses_what_a_card_refuses():
    with card.card():
        here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).to(card.CARD)
        assert there.device == card.CARD and torch.equal(card.from_card(there * 2 + 1), here * 2 + 1)
        assert torch.zeros(2, device=card.CARD).device == there.new_ones(3).device == card.CARD
        assert torch.equal(there.cpu(), here) and there.sum().item() == 15 and there[there > 2].shape == (3,)
        there[0] = here[1]
        there += torch.tensor(1.0)
        assert torch.equal(there.cpu(), here[[1, 1]] + 1)
        for meeting in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here[there[0].long()],
            lambda: torch.randn(2, generator=torch.Generator(), device=card.CARD),
        ):
            with pytest.raises(RuntimeError):
                meeting()
        with pytest.raises((RuntimeError, TypeError), match="numpy"):
            there.numpy()
