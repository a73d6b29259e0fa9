"""From words to layers through the nodes, on tiny random models of the transformer families with their own text
encoders.
"""

import comfy.sample
import comfy.sd
import pytest
import torch
from strata.nodes import fusion, shared_layers

from . import random_family, small_encoders, small_transformers

SAMPLING = {"seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
WIDTHS = {
    "Flux": {"context_in_dim": small_encoders.WIDTH, "vec_in_dim": small_encoders.WIDTH},
    "Qwen-Image": {"joint_attention_dim": small_encoders.WIDTH},
    "Z-Image": {"cap_feat_dim": small_encoders.WIDTH},
}


@pytest.fixture(scope="module")
def families():
    """(model, text encoder) by name."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = small_transformers.patcher(kind, **WIDTHS[kind]), small_encoders.encoder(kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(4)
    return comfy.sd.VAE(sd={key: value.float() for key, value in random_family.autoencoder(16).items()})


def negative(clip):
    return clip.encode_from_tokens_scheduled(clip.tokenize(""))


def latent(kind, count=1):
    return {"samples": torch.zeros(count, 16, *([1] if kind == "Qwen-Image" else []), 8, 6)}


def layered(model, strength=1.0):
    model = shared_layers.SharedLayers.execute(model, strength, 0.0, 1.0).args[0]
    return shared_layers.ContextMaps.execute(model, strength, 1.0).args[0]


@pytest.mark.parametrize("kind", ["Flux", "Z-Image"])
def test_layers_from_text(families, vae, kind):
    model, clip = families(kind)
    positive = shared_layers.LayerPrompts.execute(clip, "a long empty street at night", "an apple\ntwo dogs").args[0]
    with torch.no_grad():
        found = shared_layers.LayersSampler.execute(
            layered(model),
            vae,
            positive,
            "one each",
            True,
            0.4,
            0.6,
            negative=negative(clip),
            latent_image=latent(kind, 2),
            **SAMPLING,
        )
    documents, composite, whole, maps, rows, retained = found.args
    assert [[layer["name"] for layer in one["layers"]] for one in documents] == [
        ["a long empty street at night", "an apple", "two dogs"]
    ] * 2
    assert composite.shape == whole.shape == (2, 64, 48, 3) and rows["samples"].shape == (8, 16, 8, 6)
    assert maps.shape == (2 * 2, 4 * 4, 4 * 3 * 2, 3)  # two steps of two images; two objects of 4×3 tokens
    assert maps.min() == 0 and maps.max() == 1 and len(retained) == 2
    assert all(torch.isfinite(one).all() for one in (composite, whole, rows["samples"]))


@pytest.mark.parametrize("kind", list(WIDTHS))
def test_foreground_background_and_both(families, kind):
    """Prompts of three lengths; with Attention blend the three differ from those sampled side by side, and the
    foreground from both.
    """
    model, clip = families(kind)
    positive = fusion.EncodeLayerPrompts.execute(clip, "a red apple", "a wooden table by a window", "").args[0]

    def sampled(model):
        with torch.no_grad():
            found = fusion.LayerFusionSampler.execute(
                model, positive, "one each", negative=negative(clip), latent_image=latent(kind), **SAMPLING
            )
        return [branch["samples"] for branch in found.args[:3]], found.args[3]

    apart, nothing = sampled(model)
    blended, priors = sampled(
        fusion.AttentionBlend.execute(
            model, 1.0, 10.0, 0.0, 1.0, "all", fusion.STRUCTURE[0], fusion.BLENDED_TEXT[0]
        ).args[0]
    )
    assert nothing.shape == (1, 1, 1, 3) and priors.shape == (2, 4 * 4, 4 * 3 * 4, 3)
    for before, after in zip(apart, blended, strict=True):
        assert before.shape == after.shape == latent(kind)["samples"].shape
        assert torch.isfinite(after).all() and (before - after).abs().max() > 1e-3
    off = fusion.AttentionBlend.execute(
        model, 0.0, 10.0, 0.0, 1.0, "all", fusion.STRUCTURE[0], fusion.BLENDED_TEXT[0]
    ).args[0]
    assert all(torch.equal(*pair) for pair in zip(apart, sampled(off)[0], strict=True))


def test_side_by_side_each_is_what_it_is_alone(families):
    """Without Attention blend, too, a shorter prompt is not read with what fills it up."""
    model, clip = families("Qwen-Image")
    prompts = ("a red apple", "a wooden table by a window", "an apple on a table")
    positive = fusion.EncodeLayerPrompts.execute(clip, *prompts).args[0]
    with torch.no_grad():
        found = fusion.LayerFusionSampler.execute(
            model,
            positive,
            "same for the three",
            negative=negative(clip),
            latent_image=latent("Qwen-Image"),
            **SAMPLING,
        )
        for prompt, branch in zip(prompts, found.args[:3], strict=True):
            alone = comfy.sample.sample(
                model,
                comfy.sample.prepare_noise(latent("Qwen-Image")["samples"], SAMPLING["seed"]),
                SAMPLING["steps"],
                SAMPLING["cfg"],
                "euler",
                "simple",
                clip.encode_from_tokens_scheduled(clip.tokenize(prompt)),
                negative(clip),
                latent("Qwen-Image")["samples"],
                seed=1,
                disable_pbar=True,
            )
            assert (alone - branch["samples"]).abs().max() < 1e-4 * alone.abs().max()


def test_image_to_layers(families, vae):
    """The whole image follows its own way down from noise, whatever the layers do."""
    model, clip = families("Flux")
    positive = shared_layers.LayerPrompts.execute(clip, "a street", "an apple").args[0]
    image = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = shared_layers.ImageToLayers.execute(
            layered(model), vae, image, positive, negative(clip), 2, 1.5, "simple"
        )
    document, recomposed, maps, error = found.args
    assert [layer["name"] for layer in document["layers"]] == ["a street", "an apple"]
    assert recomposed.shape == image.shape and torch.isfinite(recomposed).all() and maps.shape == (2, 16, 12, 3)
    assert 0 < error < 1


def test_a_model_that_is_in_no_table_is_refused():
    known = "Flux, Qwen-Image, Z-Image, SD3.5 and the Strata mini"
    for node, values in (
        (shared_layers.SharedLayers, (1.0, 0.0, 1.0)),
        (shared_layers.ContextMaps, (0.0, 1.0)),
        (fusion.AttentionBlend, (0.0, 10.0, 0.0, 1.0, "all", fusion.STRUCTURE[0], fusion.BLENDED_TEXT[0])),
    ):
        start = "this is AuraFlow, and" if node is fusion.AttentionBlend else "AuraFlow has neither"
        with pytest.raises(ValueError, match=rf"^model: {start} .*{known}"):
            node.execute(small_transformers.unknown(), *values)
