"""The workflows for Flux.1, Qwen-Image and Z-Image, and those of SD1.5 and SDXL that need more than one checkpoint,
through ComfyUI's own loaders, node for node as they are bundled: files under the published names with the published
keys, random weights, and a tenth of the width or less.
"""

import json
import shutil
from inspect import signature
from pathlib import Path

import comfy.clip_model
import comfy.clip_vision
import comfy.diffusers_convert
import comfy.ldm.flux.redux
import comfy.ops
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
from strata.training import layered_files

from . import fusion_reference, random_autoencoders, random_family, small_encoders, small_transformers, tiny_detectors
from . import random_transparency as random_files

SIDE = 64
SIDES = "width", "height"
NARROW = Path(__file__).with_name("narrow_host.py")
TEXT = {"context_in_dim": small_encoders.WIDTH, "vec_in_dim": small_encoders.WIDTH}
NETWORKS = {  # by the file: the family, and what its text encoder's width changes
    "flux1-dev": ("Flux", TEXT),
    "flux1-fill-dev": ("Flux-Fill", {**TEXT, "guidance_embed": True}),
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
WIDE = small_encoders.WIDTH
UNETS = {  # by ComfyUI's class: what a narrower text encoder changes, the pooled text beside six sizes of 256 in SDXL
    "SD15": {"model_channels": 32, "context_dim": WIDE},
    "SDXL": {"model_channels": 32, "context_dim": 2 * WIDE, "adm_in_channels": WIDE + 6 * 256},
}
VISION = {"hidden_size": WIDE, "intermediate_size": WIDE, "num_attention_heads": 2}
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
PLACED = [f"{what}.{side}={SIDE}" for what in ("Size of the depth", "All of the image") for side in ("width", "height")]
PLACED += [f"Size of the image.{side}={SIDE}" for side in ("width", "height")] + ["Strata_InvertImage.steps=3"]
PLACED += ["Strata_InvertImage.disk_cache=off", "Strata_InsertAtDepth.iterations=1", "Strata_InsertAtDepth.feather=0"]
BOX = {"x": 16, "y": 24, "width": 32, "height": 24}
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
    write_unets(models, encoders["Flux"].clip_l.transformer)
    write_reference(models)
    shape = small_transformers.FLUX
    lora, _ = random_files.flux_lora(shape["hidden_size"], shape["depth"])
    random_files.write(models / "layer_model" / "layerlora.safetensors", lora)
    decoder = random_files.network(TransparentDecoder((8, 8, 16, 16), 1, 16))
    decoder["conv_out.weight"] *= 0.3
    pair = {"decoder": decoder, "encoder": random_files.network(OffsetEncoder((8, 8, 16, 16), 16))}
    joined = {f"{name}.{key}": value for name, weights in pair.items() for key, value in weights.items()}
    torch.save(joined, models / "layer_model" / "TransparentVAE.pth")


def write_unets(models: Path, clip: torch.nn.Module) -> None:
    """SD1.5's inpainting checkpoint, SDXL's, and a ControlNet for it in diffusers' form. clip: CLIP-L, and CLIP-G."""
    from diffusers import ControlNetModel

    words, made = clip.state_dict(), {}
    great = {f"transformer.{key}": value for key, value in words.items()}
    great = comfy.diffusers_convert.convert_text_enc_state_dict_v20(great)
    for kind, family, changes in (("SD1.5", "SD15", {"in_channels": 9}), ("SDXL", "SDXL", {})):
        unet = fusion_reference.patcher(kind, **UNETS[family], **changes).model.diffusion_model
        made[kind] = {f"model.diffusion_model.{key}": value for key, value in unet.state_dict().items()}
        made[kind] |= {f"first_stage_model.{key}": value for key, value in random_autoencoders.weights("SD").items()}
    made["SD1.5"] |= {f"cond_stage_model.transformer.{key}": value for key, value in words.items()}
    made["SDXL"] |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in words.items()}
    made["SDXL"] |= {f"conditioner.embedders.1.model.{key}": value for key, value in great.items()}
    for folder in ("checkpoints", "controlnet"):
        (models / folder).mkdir(parents=True)
    torch.save({"state_dict": made["SD1.5"]}, models / "checkpoints" / "sd-v1-5-inpainting.ckpt")
    weights = {key: value.half().contiguous() for key, value in made["SDXL"].items()}
    save_file(weights, models / "checkpoints" / "sd_xl_base_1.0.safetensors")
    control = ControlNetModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(32, 64, 128),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[1, 1, 2],
        use_linear_projection=True,
        cross_attention_dim=UNETS["SDXL"]["context_dim"],
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=UNETS["SDXL"]["adm_in_channels"],
    )
    name = "diffusion_pytorch_model.safetensors"
    save_file(random_family.randomised(control), models / "controlnet" / name)


def write_reference(models: Path) -> None:
    """What Redux needs: SigLIP, and the layers that make words of what it sees."""
    config = json.loads((Path(comfy.clip_vision.__file__).parent / "clip_vision_siglip_384.json").read_text()) | VISION
    see = comfy.clip_model.CLIPVisionModelProjection(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    weights = random_family.randomised(see)
    first = "vision_model.encoder.layers.0.layer_norm1.weight"
    weights[first] = weights[first].repeat(1152 // WIDE)  # the published width, by which ComfyUI knows it
    say = random_family.randomised(comfy.ldm.flux.redux.ReduxImageEncoder(WIDE, WIDE))
    for folder, name, file in (
        ("clip_vision", "sigclip_vision_patch14_384", weights),
        ("style_models", "flux1-redux-dev", say),
    ):
        (models / folder).mkdir()
        save_file(file, models / folder / f"{name}.safetensors")


def write_folders(models: Path) -> None:
    """Detector, segmenter and depth network of the transformers library."""
    tiny_detectors.grounding_dino(models / "grounding-dino" / "grounding-dino-tiny")
    tiny_detectors.sam2(models / "sam2" / "sam2.1-hiera-small")
    tiny_detectors.depth_anything(models / "depth_estimation" / "Depth-Anything-V2-Small-hf")


def widths() -> dict:
    shapes = [{**small_transformers.KINDS[kind][1], **changes} for kind, changes in NETWORKS.values()]
    networks = {shape.pop("image_model"): shape for shape in shapes}
    for shape in networks.values():
        shape.pop("in_channels")  # which the file tells
        shape.pop(LAYERED_TIME, None)  # likewise
    # CLIP-L's own is by that name where its file tells how many places it has.
    texts = {**small_encoders.CONFIGS, "model_config": small_encoders.CLIP}
    return {
        "networks": networks,
        "texts": texts,
        "autoencoder": random_autoencoders.WIDTH,
        "unets": UNETS,
        "vision": VISION,
        "redux": (WIDE, WIDE),
    }


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A running ComfyUI with the small files, whose loaders know their widths."""
    found, base = host.find_or_install(), tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    write_files(base / "models")
    write_folders(base / "models")
    own = base / "custom_nodes" / NARROW.name
    own.parent.mkdir()
    shutil.copy(NARROW, own)
    own.with_suffix(".json").write_text(json.dumps(widths()))
    server = host.Server(found, base)
    host.copy_inputs(found, base)
    photo = np.random.default_rng(0).random((SIDE, SIDE, 3))
    Image.fromarray((255 * photo).astype(np.uint8)).save(base / "input" / "strata_scene.png")
    with server:
        client = run.Client(server.url)
        client.base = base
        yield client


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


def picture_of(narrow, workflow, settings, folder) -> np.ndarray:
    (path,) = run.run_file(narrow, host.PACK / "workflows" / f"{workflow}.json", settings, folder, False)
    return np.asarray(Image.open(path)).astype(int)


def test_a_reference_image_is_drawn_in_the_box_and_nowhere_else(narrow, tmp_path):
    settings = PLACED + [f"Strata_InsertAtDepth.{name}={value}" for name, value in BOX.items()]
    settings += ["Strata_InsertAtDepth.threshold=0"]  # so that nothing is nearer
    one, other = (
        picture_of(
            narrow, "object_insertion_reference_redux", [*settings, f"The reference image.image={name}"], tmp_path
        )
        for name in ("strata_astronaut.jpg", "strata_rocket.jpg")
    )
    before = np.asarray(Image.open(narrow.base / "input" / "strata_scene.png")).astype(int)
    inside = np.zeros((SIDE, SIDE), bool)
    inside[BOX["y"] : BOX["y"] + BOX["height"], BOX["x"] : BOX["x"] + BOX["width"]] = True
    for picture in (one, other):
        assert np.abs(picture - before)[~inside].max() <= 1 and np.abs(picture - before)[inside].mean() > 10
    assert np.abs(one - other)[inside].mean() > 1


def test_a_depth_controlnet_acts_on_a_composition(narrow, tmp_path):
    settings = [
        *COMPOSED,
        *(f"Size of the depth of the {what}.{side}={SIDE}" for what in ("foreground", "background") for side in SIDES),
        "Strata_FeatureGuidance.iterations=1",
    ]
    settings = [one for one in settings if not one.startswith("Size of the depth.")]
    with_it, without, further = (
        picture_of(narrow, "scene_composition_depth_sdxl", settings + more, tmp_path)
        for more in ([], ["Apply ControlNet.strength=0"], ["Strata_ComposeByDepth.threshold=0.2"])
    )
    assert with_it.shape == (SIDE, SIDE, 3) and with_it.std() > 1
    assert np.abs(with_it - without).mean() > 1 and np.abs(with_it - further).mean() > 1


def test_photographs_become_files_that_the_trainer_of_dreamlayer_reads(narrow, tmp_path):
    settings = [f"Size of the scene.{side}={SIDE}" for side in SIDES]
    settings += [
        f"{node}.{name}=0"
        for node in ("Find the nearest thing", "Find the next")
        for name in ("threshold", "text_threshold")
    ]
    settings += [f"{node}.steps=2" for node in ("Draw what is behind it", "Draw what is behind that")]
    settings += ["What to look for.value=a dog, a red car", "What is behind.value=a street"]
    (path,) = run.run_file(
        narrow, host.PACK / "workflows" / "layered_files_from_photos.json", settings, tmp_path, False
    )
    names = layered_files.names_of(path, 3)
    assert names[0] == "a street" and len(names) == 3 and set(names[1:]) <= {"a dog", "a red car"}
    scene = layered_files.read(path, 3, SIDE)
    assert scene.background.std() > 0.01 and (scene.objects[:, 3].amax((1, 2)) > 0.5).all()
    assert all(0 < alpha.mean() < 0.9 for alpha in scene.objects[:, 3])


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
