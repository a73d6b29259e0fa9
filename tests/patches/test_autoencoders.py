"""Every node that takes a VAE with the autoencoders of today's families: three channels and four, with a frame axis and
without.
"""

import comfy.sd
import pytest
import torch
from mini_models import MODELS
from strata import nodes
from strata.networks.transparency import TransparentDecoder
from strata.patches import autoencoder, inversion, mini_family, transparency
from strata.patches.layer_prompts import LAYERS
from strata.techniques.layers import Layer, LayerStack, read_layers, write_layers

from . import random_autoencoders, random_transparency
from .random_autoencoders import KINDS, conditioning

HEIGHT, WIDTH = 64, 80
NODES = {node.define_schema().node_id: node for module in nodes.MODULES for node in module.NODES}
TAKING = [
    name for name, node in NODES.items() if any(str(one.get_io_type()) == "VAE" for one in node.define_schema().inputs)
]
SAMPLING = {"seed": 1, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal"}
WORDS = [("a place", [1]), ("an apple", [2, 3])]
INPAINT = MODELS / "diffusion_models" / "strata_mini_inpaint.safetensors"


class Kind:
    """An autoencoder of this kind with its model and images."""

    def __init__(self, name: str):
        channels, self.family = KINDS[name]
        self.name, self.rgba, self.sd = name, channels == 4, self.family == "SD1.5"
        self.frames = (1,) * (self.family == "Qwen-Image")
        self.channels = 4 if self.sd else 16
        self.vae, self.model = random_autoencoders.autoencoder(name), random_autoencoders.model(self.family)
        draw = torch.Generator().manual_seed(2)
        self.images = torch.rand(2, HEIGHT, WIDTH, 3, generator=draw)
        self.text = conditioning(self.family)

    def latent(self, count: int) -> dict:
        shape = (count, self.channels, *self.frames, HEIGHT // 8, WIDTH // 8)
        return {"samples": torch.zeros(shape)}

    def layered(self) -> list:
        return conditioning(self.family, rows=3, **{LAYERS: WORDS})

    def run(self, name: str, **values) -> tuple:
        with torch.inference_mode():
            return NODES[name].execute(**values).args

    def inverted(self, images: torch.Tensor) -> inversion.Inversion:
        levels = inversion.noise_levels(self.model, 2, "simple")
        return inversion.invert(self.model, autoencoder.encode(self.vae, images), self.text, None, levels)

    def stack(self) -> dict:
        thing = torch.zeros(HEIGHT, WIDTH, 4)
        thing[20:40, 10:50] = torch.tensor([0.9, 0.1, 0.2, 1.0])
        return write_layers(LayerStack((WIDTH, HEIGHT), (Layer(self.images[0], "place"), Layer(thing, "thing"))))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    with torch.inference_mode():
        return Kind(request.param)


def refused(words: str, run):
    with pytest.raises(ValueError, match=f"^{words}") as found:
        run()
    assert "\n" not in str(found.value)


def has_objects(kind: Kind, document: dict) -> None:
    """Two layers, of which the second has the autoencoder's alpha, that of every pixel another one."""
    stack = read_layers(document)
    place, thing = (layer.image for layer in stack.layers)
    assert place.shape == (HEIGHT, WIDTH, 3) and thing.shape == (HEIGHT, WIDTH, 4) and thing[..., 3].std() > 0.01


def invert_image(kind: Kind) -> None:
    given = {"model": kind.model, "vae": kind.vae, "image": kind.images, "positive": kind.text, "method": "ddim"}
    given |= {"steps": 2, "scheduler": "simple", "cfg": 1.0, "inner_steps": 1, "seed": 0, "disk_cache": "off"}
    found, _, latent, after, report = kind.run("Strata_InvertImage", **given)
    shape = (2, kind.channels, *kind.frames, HEIGHT // 8, WIDTH // 8)
    assert latent["samples"].shape == shape == found.latents.shape[1:] and after.shape == kind.images.shape
    alone = autoencoder.encode(kind.vae, kind.images[1:])
    assert torch.allclose(latent["samples"][1:], alone, rtol=0, atol=1e-4) and "dB" in report
    assert (latent["samples"][0] - latent["samples"][1]).abs().mean() > 1e-3, "each image has a latent of its own"


def harmonize_layers(kind: Kind) -> None:
    given = {"model": kind.model, "positive": kind.text, "negative": kind.text, "vae": kind.vae} | SAMPLING
    given |= {"layers": kind.stack(), "start_percent": 0.2, "end_percent": 0.9, "foregrounds": "keep", "feather": 0.0}
    image, latent, document = kind.run("Strata_HarmonizeLayers", **given, start_noise=0.6, end_noise=0.2, detail=4.0)
    assert image.shape == (1, HEIGHT, WIDTH, 3) and latent["samples"].shape == kind.latent(1)["samples"].shape
    assert torch.allclose(image[0, 24:36, 14:46], torch.tensor([0.9, 0.1, 0.2]).expand(12, 32, 3), rtol=0, atol=1e-5)
    assert [layer.image.shape[-1] for layer in read_layers(document).layers] == [3, 4]
    kept = kind.run("Strata_HarmonizeLayers", **given, retained=kind.inverted(kind.images))[0]
    assert kept.shape == image.shape and kept.isfinite().all()


def layers_sampler(kind: Kind) -> None:
    given = {
        "model": kind.model,
        "vae": kind.vae,
        "positive": kind.layered(),
        "negative": kind.text,
        "noise": "one each",
    }
    given |= SAMPLING | {"denoise": 1.0, "latent_image": kind.latent(2), "harmonize": True, "harmonize_start": 0.4}
    given |= {"harmonize_end": 0.6, "harmonize_start_noise": 0.7, "harmonize_end_noise": 0.3}
    if not kind.rgba:
        refused("decoder: nothing tells", lambda: kind.run("Strata_LayersSampler", **given))
        if not kind.sd:
            return
        given["model"] = kind.run("Strata_ContextMaps", model=kind.model, strength=1.0, end_percent=1.0)[0]
    documents, composite, whole, _, latent, retained = kind.run("Strata_LayersSampler", **given)
    assert composite.shape == whole.shape == (2, HEIGHT, WIDTH, 3) and len(documents) == len(retained) == 2
    assert latent["samples"].shape == kind.latent(6)["samples"].shape
    for number, document in enumerate(documents):
        has_objects(kind, document)
        if kind.rgba:
            with torch.inference_mode():
                own = autoencoder.decode(kind.vae, latent["samples"][3 * number + 1, None])
            assert torch.allclose(read_layers(document).layers[1].image, own[0], rtol=0, atol=1e-4)
    stacked = kind.run("Strata_LayersSampler", **{**given, "harmonize": False})[1]
    assert (composite - stacked).abs().mean() > 1e-3


def image_to_layers(kind: Kind) -> None:
    given = {"model": kind.model, "vae": kind.vae, "image": kind.images, "positive": kind.layered()}
    given |= {"negative": kind.text, "steps": 2, "cfg": 1.0, "scheduler": "simple"}
    if not kind.rgba:
        refused("decoder: nothing tells", lambda: kind.run("Strata_ImageToLayers", **given))
        if not kind.sd:
            return
        given["model"] = kind.run("Strata_ContextMaps", model=kind.model, strength=1.0, end_percent=1.0)[0]
    document, recomposed, _, error = kind.run("Strata_ImageToLayers", **given)
    has_objects(kind, document)
    assert recomposed.shape == (1, HEIGHT, WIDTH, 3) and 0 < error < 1


def layerfusion_sampler(kind: Kind) -> None:
    given = {"model": kind.model, "positive": conditioning(kind.family, rows=3), "negative": kind.text}
    given |= SAMPLING | {"denoise": 1.0, "latent_image": kind.latent(2), "noise": "one each"}
    *_, documents = kind.run("Strata_LayerFusionSampler", **given)
    assert documents == [None]
    if not kind.rgba:
        refused("vae: it has no alpha", lambda: kind.run("Strata_LayerFusionSampler", **given, vae=kind.vae))
        return
    foreground, *_, documents = kind.run("Strata_LayerFusionSampler", **given, vae=kind.vae)
    rgba = kind.run("Strata_DecodeTransparency", samples=foreground, vae=kind.vae, passes="1", tile_size=0)[0]
    for document, own in zip(documents, rgba, strict=True):
        has_objects(kind, document)
        assert torch.allclose(read_layers(document).layers[1].image, own, rtol=0, atol=1e-4)


def decode_transparency(kind: Kind) -> None:
    with torch.inference_mode():
        latent = {"samples": autoencoder.encode(kind.vae, kind.images)}
        expected = autoencoder.decode(kind.vae, latent["samples"])
    given = {"samples": latent, "vae": kind.vae, "passes": "1"}
    if not kind.rgba:
        refused(
            "transparency: nothing is connected and the VAE has no alpha",
            lambda: kind.run("Strata_DecodeTransparency", **given, tile_size=0),
        )
    else:
        behind = kind.images.flip(0)
        image, mask, documents, composite = kind.run(
            "Strata_DecodeTransparency", **given, tile_size=0, background=behind
        )
        assert torch.allclose(image, expected, rtol=0, atol=1e-5) and torch.equal(mask, 1 - image[..., 3])
        over = image[..., :3] * image[..., 3:] + behind * (1 - image[..., 3:])
        assert torch.allclose(composite, over, rtol=0, atol=1e-5) and len(documents) == 2
        tiled = kind.run("Strata_DecodeTransparency", **given, tile_size=64)[0]
        assert tiled.shape == image.shape and (tiled - image).abs().mean() < 0.5 * image.std()
    decoder = transparency.recognise("decoder", random_transparency.network(TransparentDecoder((8, 8, 16, 16), 1)))
    if kind.sd:
        image = kind.run("Strata_DecodeTransparency", **given, transparency=decoder, tile_size=0)[0]
        assert image.shape == (2, HEIGHT, WIDTH, 4)
    else:
        refused(
            "samples: the latent has 16 channels",
            lambda: kind.run("Strata_DecodeTransparency", **given, transparency=decoder, tile_size=0),
        )


def encode_transparency(kind: Kind) -> None:
    image, mask = kind.images[:, :60, :76], torch.zeros(2, 60, 76)
    mask[:, 10:30] = 1
    given = {"image": image, "vae": kind.vae}
    if not kind.rgba:
        refused(
            "transparency: nothing is connected and the VAE has no alpha",
            lambda: kind.run("Strata_EncodeTransparency", **given, mask=mask),
        )
        return
    (holes,) = kind.run("Strata_EncodeTransparency", **given, mask=mask)
    (plain,) = kind.run("Strata_EncodeTransparency", **given)
    assert holes["samples"].shape == kind.latent(2)["samples"].shape
    change = (holes["samples"] - plain["samples"]).abs().flatten(1).mean(1)
    assert (change > 1e-3).all(), "the alpha of each image is in its latent"


def fill_background(kind: Kind) -> None:
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 10:40, 10:40] = 1
    given = {"positive": kind.text, "negative": kind.text, "vae": kind.vae, "background": kind.images, "mask": mask}
    positive, _, latent = kind.run("Strata_FillBackground", **given, box=True)
    assert latent["samples"].shape == kind.latent(2)["samples"].shape
    own = positive[0][1]["concat_latent_image"]
    assert own.shape == latent["samples"].shape and (own[0] - own[1]).abs().mean() > 1e-3


def decompose_image(kind: Kind) -> None:
    if not INPAINT.exists():
        pytest.skip("no trained weights: make mini")
    mini_family.register()
    loaded = kind.run("Strata_LoadDecomposer", file="strata_mini_layeringdiff.safetensors")[0]
    model, mask = comfy.sd.load_diffusion_model(str(INPAINT)), torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 20:40, 10:50] = 1
    given = {"image": kind.images[:1], "mask": mask, "vae": kind.vae, "decomposer": loaded, "align_details": False}
    given |= {"exact": True, "start": "noise", "seed": 1, "steps": 1, "sampler_name": "ddim"}
    given |= {"scheduler": "ddim_uniform", "model": model}
    if not kind.sd:
        refused("vae: it makes latents of 16 channels", lambda: kind.run("Strata_DecomposeImage", **given))
        return
    _, foreground, background, error = kind.run("Strata_DecomposeImage", **given)
    assert foreground.shape == (1, HEIGHT, WIDTH, 4) and background.shape == (1, HEIGHT, WIDTH, 3) and error < 1e-3


def insert_at_depth(kind: Kind) -> None:
    path = kind.inverted(kind.images[:1])
    depth = torch.linspace(0, 1, WIDTH).expand(1, HEIGHT, WIDTH)
    given = {"model": kind.model, "positive": kind.text, "negative": kind.text, "vae": kind.vae, "inversion": path}
    given |= {"image": kind.images, "depth": depth, "threshold": 0.5, "x": 8, "y": 8, "width": 48, "height": 40}
    given |= {"near_is": "black", "missing_depth": "zero and NaN", "cfg": 1.0, "level_weights": "0.2, 8.5"}
    given |= {"foreground": 1.0, "iterations": 1, "step_size": 0.001, "norm": "l2"}
    try:
        _, latent, visible, _ = kind.run("Strata_InsertAtDepth", **given)
    except ValueError as error:
        assert not kind.sd and str(error).startswith("model:")  # of a family whose features are not known
        return
    assert latent["samples"].shape == kind.latent(1)["samples"].shape and visible.shape == (1, HEIGHT, WIDTH)


def complete_layers(kind: Kind) -> None:
    document = kind.stack()
    place, thing = read_layers(document).layers
    hole = torch.cat([place.image, 1 - thing.image[..., 3:]], -1)
    document = write_layers(LayerStack((WIDTH, HEIGHT), (Layer(hole, "place"), thing)))
    given = {"model": kind.model, "positive": kind.text, "negative": kind.text, "vae": kind.vae} | SAMPLING
    found, drawn = kind.run("Strata_CompleteLayers", **given, layers=document, select="", grow=4)
    whole = read_layers(found).layers[0].image
    assert (whole[..., 3] == 1).all() and torch.equal(drawn[0], thing.image[..., 3])
    seen = hole[..., 3] == 1
    assert torch.equal(whole[seen], hole[seen]) and whole.isfinite().all()


def redraw_layer(kind: Kind) -> None:
    """What it draws goes through Fill background and Decode transparency, for Flux-Fill alone."""
    given = {"model": kind.model, "positive": kind.text, "negative": kind.text, "vae": kind.vae} | SAMPLING
    given |= {"layers": kind.stack(), "layer": "", "room": 0.2, "noise": "one each", "rgba_vae": kind.vae}
    refused("model: there is no Back to front on it", lambda: kind.run("Strata_RedrawLayer", **given))


CASES = {
    "Strata_CompleteLayers": complete_layers,
    "Strata_RedrawLayer": redraw_layer,
    "Strata_InvertImage": invert_image,
    "Strata_HarmonizeLayers": harmonize_layers,
    "Strata_LayersSampler": layers_sampler,
    "Strata_ImageToLayers": image_to_layers,
    "Strata_LayerFusionSampler": layerfusion_sampler,
    "Strata_DecodeTransparency": decode_transparency,
    "Strata_EncodeTransparency": encode_transparency,
    "Strata_FillBackground": fill_background,
    "Strata_DecomposeImage": decompose_image,
    "Strata_InsertAtDepth": insert_at_depth,
}


@pytest.mark.parametrize("name", TAKING)
@torch.inference_mode()
def test_every_node_takes_every_kind(kind, name):
    CASES[name](kind)


@torch.inference_mode()
def test_latents_of_either_form_are_decoded_by_either_autoencoder(kind):
    latent = autoencoder.encode(kind.vae, kind.images)
    images = autoencoder.decode(kind.vae, latent)
    assert images.shape == (2, HEIGHT, WIDTH, 4 if kind.rgba else 3)
    other = latent[:, :, 0] if kind.frames else latent[:, :, None]
    assert torch.equal(autoencoder.decode(kind.vae, other), images)


@torch.inference_mode()
def test_an_image_without_alpha_is_opaque(kind):
    whole = torch.cat([kind.images, torch.ones_like(kind.images[..., :1])], -1)
    half = torch.cat([kind.images, 0.5 * torch.ones_like(kind.images[..., :1])], -1)
    latent = autoencoder.encode(kind.vae, kind.images)
    assert torch.equal(autoencoder.encode(kind.vae, whole), latent)
    assert torch.equal(autoencoder.encode(kind.vae, half), latent) != kind.rgba
