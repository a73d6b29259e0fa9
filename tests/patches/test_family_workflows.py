"""The workflows for Flux.1, Qwen-Image and Z-Image through ComfyUI's own loaders, node for node as they are bundled:
files under the published names with the published keys, random weights, and a tenth of the width or less.
"""

import json
import shutil
from inspect import signature
from pathlib import Path

import host
import numpy as np
import pytest
import run
import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from PIL import Image
from psd_tools import PSDImage
from safetensors.torch import save_file
from strata.networks.transparency import OffsetEncoder, TransparentDecoder

from . import random_autoencoders, small_encoders, small_transformers
from . import random_transparency as random_files

SIDE = 64
NARROW = Path(__file__).with_name("narrow_host.py")
TEXT = {"context_in_dim": small_encoders.WIDTH, "vec_in_dim": small_encoders.WIDTH}
NETWORKS = {  # by the file: the family, and what its text encoder's width changes
    "flux1-dev": ("Flux", TEXT),
    "qwen_image_fp8_e4m3fn": ("Qwen-Image", {"joint_attention_dim": small_encoders.WIDTH}),
    "z_image_turbo_bf16": ("Z-Image", {"cap_feat_dim": small_encoders.WIDTH}),
}
LAYERED_TIME = "use_additional_t_cond"  # what Qwen-Image-Layered has beyond Qwen-Image
if LAYERED_TIME in signature(QwenImageTransformer2DModel).parameters:
    family, changes = NETWORKS["qwen_image_fp8_e4m3fn"]
    NETWORKS["qwen_image_layered_fp8mixed"] = (family, {**changes, LAYERED_TIME: True})
TEXTS = {  # by the file: the family's encoder, and which of its parts
    "clip_l": ("Flux", "clip_l"),
    "t5xxl_fp8_e4m3fn": ("Flux", "t5xxl"),
    "qwen_2.5_vl_7b_fp8_scaled": ("Qwen-Image", "qwen25_7b"),
    "qwen_3_4b": ("Z-Image", "qwen3_4b"),
}
AUTOENCODERS = {"ae": "Flux", "qwen_image_vae": "Qwen-Image", "qwen_image_layered_vae": "Qwen-Image-Layered"}
LAYERED = [f"Size.{side}={SIDE}" for side in ("width", "height")]
SCENE = [f"Strata_RenderScene.{side}={SIDE}" for side in ("width", "height")] + ["Strata_TransformLayer.move_x=-12"]
COMPOSED = [
    f"Size of the {what}.{side}={SIDE}"
    for what in ("foreground", "background", "depth")
    for side in ("width", "height")
] + [
    f"Invert the {what} scene.{setting}"
    for what in ("foreground", "background")
    for setting in ("steps=3", "disk_cache=off")
]
WORDS = ["a forest floor with autumn leaves, soft morning light", "a hedgehog", "a red toadstool"]
WORKFLOWS = {  # settings, and the names of the layers in the PSD
    "layerfusion_flux": ([*LAYERED, "Strata_LayerFusionSampler.steps=2"], ["background", "foreground"]),
    "layers_from_text_flux": ([*LAYERED, "Strata_LayersSampler.steps=3"], WORDS),
    "layers_from_text_qwen": ([*LAYERED, "Strata_LayersSampler.steps=3"], WORDS),
    "layers_from_text_zimage": ([*LAYERED, "Strata_LayersSampler.steps=4"], WORDS),
    "harmonize_flux": ([*SCENE, "Strata_HarmonizeLayers.steps=4"], ["background", "octopus"]),
    "harmonize_qwen": ([*SCENE, "Strata_HarmonizeLayers.steps=4"], ["background", "octopus"]),
    "harmonize_zimage": ([*SCENE, "Strata_HarmonizeLayers.steps=4"], ["background", "octopus"]),
    "image_to_layers_flux": (
        ["Strata_ImageToLayers.steps=2"],
        ["a green meadow under a blue sky", "a house", "a dog", "a pumpkin"],
    ),
    "scene_composition_flux": ([*COMPOSED, "Strata_FeatureGuidance.iterations=1"], None),
}


def write_files(models: Path) -> None:
    """Each file of the workflows' notes in its folder."""
    for folder in ("diffusion_models", "text_encoders", "vae", "layer_model"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    for name, (kind, changes) in NETWORKS.items():
        network = small_transformers.patcher(kind, **changes).model.diffusion_model
        save_file(network.state_dict(), models / "diffusion_models" / f"{name}.safetensors")
    encoders = {kind: small_encoders.encoder(kind).cond_stage_model for kind in {kind for kind, _ in TEXTS.values()}}
    for name, (kind, part) in TEXTS.items():
        encoder = getattr(encoders[kind], part).transformer
        weights = {key: value.half().contiguous() for key, value in encoder.state_dict().items()}
        save_file(weights, models / "text_encoders" / f"{name}.safetensors")
    for name, kind in AUTOENCODERS.items():
        save_file(random_autoencoders.weights(kind), models / "vae" / f"{name}.safetensors")
    shape = small_transformers.FLUX
    lora, _ = random_files.flux_lora(shape["hidden_size"], shape["depth"])
    random_files.write(models / "layer_model" / "layerlora.safetensors", lora)
    decoder = random_files.network(TransparentDecoder((8, 8, 16, 16), 1, 16))
    decoder["conv_out.weight"] *= 0.3
    pair = {"decoder": decoder, "encoder": random_files.network(OffsetEncoder((8, 8, 16, 16), 16))}
    joined = {f"{name}.{key}": value for name, weights in pair.items() for key, value in weights.items()}
    torch.save(joined, models / "layer_model" / "TransparentVAE.pth")


def widths() -> dict:
    shapes = [{**small_transformers.KINDS[kind][1], **changes} for kind, changes in NETWORKS.values()]
    networks = {  # the file tells whether it is layered
        shape["image_model"]: {key: value for key, value in shape.items() if key != LAYERED_TIME} for shape in shapes
    }
    # CLIP-L's own is by that name where its file tells how many places it has.
    texts = {**small_encoders.CONFIGS, "model_config": small_encoders.CLIP}
    return {"networks": networks, "texts": texts, "autoencoder": random_autoencoders.WIDTH}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A running ComfyUI with the small files, whose loaders know their widths."""
    found, base = host.find_or_install(), tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    write_files(base / "models")
    own = base / "custom_nodes" / NARROW.name
    own.parent.mkdir()
    shutil.copy(NARROW, own)
    own.with_suffix(".json").write_text(json.dumps(widths()))
    server = host.Server(found, base)
    host.copy_inputs(found, base)
    photo = np.random.default_rng(0).random((SIDE, SIDE, 3))
    Image.fromarray((255 * photo).astype(np.uint8)).save(base / "input" / "strata_scene.png")
    with server:
        yield run.Client(server.url)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_workflow_runs_with_its_familys_loaders(narrow, tmp_path, workflow):
    settings, names = WORKFLOWS[workflow]
    made = run.run_file(narrow, host.PACK / "workflows" / f"{workflow}.json", settings, tmp_path, False)
    pictures = [path for path in made if path.suffix == ".png"]
    assert len(pictures) == 1
    picture = np.asarray(Image.open(pictures[0]))
    assert picture.shape == (SIDE, SIDE, 3) and picture.std() > 1
    if names is None:
        assert made == pictures
        return
    (path,) = set(made) - set(pictures)
    layers = list(PSDImage.open(path))
    assert [layer.name for layer in layers] == names
    drawn = [np.asarray(layer.composite(viewport=(0, 0, SIDE, SIDE)), float) for layer in layers]
    assert all(one[..., :3].std() > 1 for one in drawn)
    assert all(one[..., 3].std() > 1 for one in drawn[1:]), "an object's alpha is the same everywhere"


def test_what_qwen_image_layered_gives_is_fitted_to_the_image(narrow, tmp_path):
    workflow = "finish_qwen_layered"
    if narrow.lacks(workflow):
        pytest.skip("it needs a newer ComfyUI")
    image = "strata_beach.png"  # newer ComfyUI and Pillow read a JPEG a little differently
    settings = [f"LoadImage.image={image}", f"ImageScaleToMaxDimension.largest_size={SIDE}", "KSampler.steps=2"]
    (path,) = run.run_file(narrow, host.PACK / "workflows" / f"{workflow}.json", settings, tmp_path, False)
    document = PSDImage.open(path)
    with Image.open(host.PACK / "workflows" / "input" / image) as opened:
        photo = np.asarray(opened.convert("RGB"), int)
    assert len(list(document)) > 1, [layer.name for layer in document]
    assert np.abs(np.asarray(document.topil().convert("RGB"), int) - photo).max() <= 2
