"""From prompts and a model to layers, through the pack's nodes, on the whole structure of SD1.5 and SDXL at reduced
width.
"""

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from strata.networks.transparency import TransparentDecoder
from strata.nodes.harmonize import HarmonizeLayers
from strata.nodes.shared_layers import NOISE, ContextMaps, LayerPrompts, LayersSampler, SharedLayers
from strata.patches import mini_family, transparency
from strata.patches.layer_prompts import LAYERS
from strata.patches.layer_rows import sample_rows
from strata.techniques.compositing import flatten
from strata.techniques.layers import read_layers, write_layers
from strata.techniques.shared_layers import map_alphas

from . import fusion_reference, random_family, random_transparency
from .sampling_helpers import conditioning, with_layers
from .small_models import file_for

HEIGHT, WIDTH = 64, 128
NAMES = ["a place", "an apple", "a dog"]
SETTINGS = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
HARMONY = {"harmonize": True, "harmonize_start": 0.4, "harmonize_end": 0.6}


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=random_family.autoencoder())


@pytest.fixture(scope="module")
def decoder():
    return transparency.recognise("decoder", random_transparency.network(TransparentDecoder((8, 8, 16, 16), 1)))


def node(kind, **inputs):
    with torch.inference_mode():
        return kind.execute(**inputs).result


def sampled(model, vae, positive, count=1, **changed):
    negative = conditioning(model, 2, rows=1)
    changed = {"latent_image": {"samples": torch.zeros(count, 4, HEIGHT // 8, WIDTH // 8)}, **changed}
    return node(
        LayersSampler,
        model=model,
        vae=vae,
        positive=positive,
        negative=negative,
        **{**SETTINGS, **HARMONY, "noise": next(iter(NOISE)), **changed},
    )


def shared(model):
    (model,) = node(SharedLayers, model=model, strength=1.0, start_percent=0.0, end_percent=1.0)
    return node(ContextMaps, model=model, strength=1.0, end_percent=0.15)[0]


@pytest.mark.parametrize("kind", ["SD1.5", "SDXL"])
def test_from_the_model_to_the_layers(kind, vae, decoder):
    plain = fusion_reference.patcher(kind)
    model, positive = shared(plain), with_layers(plain)
    documents, composite, whole, maps, latent, retained = sampled(
        model, vae, positive, 2, adapter=file_for(kind, plain), decoder=decoder
    )
    assert latent["samples"].shape == (8, 4, HEIGHT // 8, WIDTH // 8) and latent["samples"].isfinite().all()
    assert (
        composite.shape == whole.shape == (2, HEIGHT, WIDTH, 3)
        and maps.shape == (2 * 2, 4 * 2, 2 * 4 * 4, 3)
        and maps.std() > 0.1
    )
    rows = latent["samples"].unflatten(0, (2, 4))
    with torch.inference_mode():
        assert torch.equal(vae.decode(rows[:, 3]), whole)
    without = sampled(model, vae, positive, 2, decoder=decoder, harmonize=False)
    changed = (without[4]["samples"] - latent["samples"]).abs().flatten(1).mean(1)
    assert (changed.view(2, 4)[:, 1:3] > 0.01).all(), "the adapter acts on the objects"
    for document, picture, stacked, kept, own in zip(documents, composite, without[1], retained, rows, strict=True):
        assert torch.allclose(
            plain.model.latent_format.process_out(kept.latents[-1]), own[:3].cpu(), rtol=1e-5, atol=1e-5
        )
        # The same noise.
        assert kept.latents.shape[:2] == (len(kept.sigmas), 3) and torch.equal(kept.latents[0, 0], kept.latents[0, 1])
        stack = read_layers(document)
        assert [layer.name for layer in stack.layers] == NAMES and [
            layer.image.shape[-1] for layer in stack.layers
        ] == [3, 4, 4]
        (again,) = node(
            HarmonizeLayers,
            model=plain,
            positive=[[positive[0][0][3:], {"pooled_output": positive[0][1]["pooled_output"][3:]}]],
            negative=conditioning(plain, 2, rows=1),
            vae=vae,
            layers=document,
            retained=kept,
            start_percent=0.4,
            end_percent=0.6,
            foregrounds="keep",
            feather=2.0,
            **{key: SETTINGS[key] for key in ("seed", "steps", "cfg", "sampler_name", "scheduler")},
        )[:1]
        assert torch.equal(again[0], picture) and not torch.allclose(picture, stacked, rtol=1e-5, atol=0.02)
    for document, picture in zip(without[0], without[1], strict=True):
        assert torch.equal(flatten(read_layers(document))[0], picture)


@pytest.fixture(scope="module")
def loaded(family):
    mini_family.register()
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(family["sd"]))[:3]


def test_without_a_decoder_the_last_maps_are_the_alphas(loaded):
    model, clip, vae = loaded
    (positive,) = node(LayerPrompts, clip=clip, background="the beach", objects="a red apple\n\n  a dog  \n")
    documents, composite, _, maps, *_ = sampled(shared(model), vae, positive, harmonize=False)
    layers = read_layers(documents[0]).layers
    assert [layer.name for layer in layers] == ["the beach", "a red apple", "a dog"] and not torch.equal(
        layers[1].image[..., 3], layers[2].image[..., 3]
    )
    for layer, shown in zip(layers[1:], maps[-1, ::4, ::4, 0].chunk(2, 1), strict=True):
        assert torch.allclose(
            layer.image[..., 3], map_alphas(shown[None, None], (HEIGHT, WIDTH))[0, 0], rtol=1e-5, atol=1e-5
        )
    assert torch.equal(flatten(read_layers(documents[0]))[0], composite[0])


def test_a_background_alone_is_the_stock_samplers(loaded):
    model, clip, vae = loaded
    (positive,) = node(LayerPrompts, clip=clip, background="the beach", objects=" \n ")
    documents, composite, whole, maps, latent, _ = sampled(shared(model), vae, positive, 2)
    settings = {
        **SETTINGS,
        "negative": conditioning(model, 2, rows=1),
        "latent_image": {"samples": torch.zeros(2, 4, HEIGHT // 8, WIDTH // 8)},
    }
    with torch.inference_mode():
        stock = sample_rows(model, clip.encode_from_tokens_scheduled(clip.tokenize("the beach")), 1, **settings)[0]
    assert (
        torch.equal(latent["samples"], stock["samples"])
        and torch.equal(composite, whole)
        and maps.shape == (1, 1, 1, 3)
    )
    assert [len(read_layers(document).layers) for document in documents] == [1, 1]
    assert torch.equal(write_layers(read_layers(documents[1]))["layers"][0]["image"][0], whole[1])


def test_the_latent_has_a_mask_for_each_of_its_rows_and_no_numbers_of_rows_that_are_gone(loaded):
    model, clip, vae = loaded
    (positive,) = node(LayerPrompts, clip=clip, background="the beach", objects="a dog")
    mask = torch.zeros(2, 1, HEIGHT, WIDTH)
    mask[1] = 1
    given = {"samples": torch.zeros(2, 4, HEIGHT // 8, WIDTH // 8), "noise_mask": mask, "batch_index": [4, 5]}
    latent = sampled(shared(model), vae, positive, latent_image=given, harmonize=False)[4]
    assert "batch_index" not in latent and torch.equal(
        latent["noise_mask"].amax((1, 2, 3)), torch.tensor([0.0, 0, 0, 1, 1, 1])
    )


def test_what_harmonising_refuses_is_said_and_the_layers_are_given_all_the_same(loaded):
    model, clip, vae = loaded
    (positive,) = node(LayerPrompts, clip=clip, background="the beach", objects="a dog")
    with pytest.raises(ValueError, match="harmonize_start: no step of 1 is left"):
        sampled(shared(model), vae, positive, steps=1)
    with pytest.raises(ValueError, match="denoise: at 0 nothing is sampled"):
        sampled(shared(model), vae, positive, denoise=0.0, harmonize=False)


@pytest.mark.parametrize("first", [True, False])
def test_patches_that_cut_or_merge_the_attention_are_refused_in_one_sentence(loaded, first):
    """HyperTile puts tiles where the layers are counted."""
    from comfy_extras.nodes_hypertile import HyperTile

    model, clip, vae = loaded

    def tiled(model):
        return HyperTile.execute(model, tile_size=32, swap_size=2, max_depth=1, scale_depth=False)[0]

    (positive,) = node(LayerPrompts, clip=clip, background="the beach", objects="a dog")
    with pytest.raises(ValueError, match="model: another patch on it .HyperTile"):
        sampled(shared(tiled(model)) if first else tiled(shared(model)), vae, positive, harmonize=False)


def test_what_is_missing_is_said(loaded):
    model, clip, vae = loaded
    (positive,) = node(LayerPrompts, clip=clip, background="the beach", objects="a dog")
    with pytest.raises(
        ValueError,
        match="decoder: nothing tells where the objects are transparent; .* or put Context maps on the model",
    ):
        sampled(model, vae, positive)
    with pytest.raises(ValueError, match="positive: .* connect Layer prompts directly"):
        sampled(
            shared(model),
            vae,
            [[positive[0][0], {key: value for key, value in positive[0][1].items() if key != LAYERS}]],
        )
    with pytest.raises(ValueError, match="clip: the checkpoint has no text encoder"):
        node(LayerPrompts, clip=None, background="", objects="")


def test_a_wrong_file_is_named_by_its_own_socket_before_anything_is_sampled(vae, decoder):
    plain = fusion_reference.patcher("SD1.5")
    model, positive, calls = shared(plain), with_layers(plain), []
    model.set_model_sampler_post_cfg_function(lambda args: calls.append(1) or args["denoised"])
    adapter = file_for("SD1.5", plain)
    flux = transparency.recognise("flux", random_transparency.network(TransparentDecoder((8, 8, 16, 16), 1, 16)))
    for files, words in (
        ({"decoder": adapter}, "^decoder: .* this node needs a decoder"),
        ({"adapter": decoder, "decoder": decoder}, "^adapter: .* this node needs"),
        ({"decoder": flux}, "^decoder: .* the model's latents have 4 channels"),
    ):
        with pytest.raises(ValueError, match=words):
            sampled(model, vae, positive, **files)
    assert not calls


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_sde", "dpmpp_2s_ancestral"])
def test_maps_have_one_entry_a_step_and_none_of_perturbed_attention(sampler, vae, decoder):
    """Samplers that call the model twice a step add none, and the first step's maps are those of the plain estimate,
    not of PAG's.
    """
    plain = fusion_reference.patcher("SD1.5")
    positive, settings = (
        with_layers(plain),
        {"decoder": decoder, "harmonize": False, "sampler_name": sampler, "steps": 3},
    )
    model = shared(plain)
    guided = PerturbedAttentionGuidance.execute(model, 3.0)[0]
    own, others = (sampled(one, vae, positive, **settings)[3] for one in (model, guided))
    assert own.shape[0] == others.shape[0] == 3
    assert torch.allclose(own[0], others[0], rtol=0, atol=1e-4) and not torch.allclose(
        own[2], others[2], rtol=0, atol=1e-2
    )


@pytest.mark.parametrize("denoise", [1.0, 0.0])
def test_what_cannot_be_harmonised_keeps_its_layers_and_says_why(denoise, vae):
    """A decoder that finds everything opaque: an object that covers the canvas is only known after the sampling."""
    network = random_transparency.network(TransparentDecoder((8, 8, 16, 16), 1))
    bias = [name for name, value in network.items() if name.endswith("bias") and value.shape == (4,)][-1]
    opaque = transparency.recognise("decoder", {**network, bias: torch.full((4,), 50.0)})
    plain = fusion_reference.patcher("SD1.5")
    negative, latent = conditioning(plain, 2, rows=1), {"samples": torch.zeros(1, 4, HEIGHT // 8, WIDTH // 8)}
    with torch.inference_mode():
        found = LayersSampler.execute(
            shared(plain),
            vae,
            with_layers(plain),
            **{**SETTINGS, **HARMONY, "denoise": denoise},
            noise=next(iter(NOISE)),
            negative=negative,
            latent_image=latent,
            decoder=opaque,
        )
    assert len(read_layers(found.result[0][0]).layers) == 3
    assert "Not harmonised: layers: layer 'an apple' covers the whole canvas" in str(found.ui)
