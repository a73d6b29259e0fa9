"""The networks that are trained here, against ComfyUI's and diffusers' own with the same weights."""

import comfy.clip_model
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import timestep_embedding as host_timestep_embedding
from comfy.sd1_clip import SD1Tokenizer
from strata.networks.alignment import Alignment
from strata.networks.text_encoder import TextEncoder
from strata.networks.transparency import OffsetEncoder, TransparentDecoder
from strata.networks.unet import UNet, timestep_embedding
from strata.patches.mini_family import CONFIG
from strata.scenes import renderer
from strata.training import diffusion, text
from torch import nn

from . import random_family
from .transparency_reference import Reference


def randomise(module: nn.Module) -> dict:
    """Every weight random, norms around one, so that a swapped or forgotten part shows."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
        else:
            nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    return module.state_dict()


@pytest.mark.parametrize("channels", [4, 9])
def test_the_unet_equals_comfyuis(channels):
    shape = CONFIG["unet"]
    ours = UNet(
        channels,
        4,
        shape["model_channels"],
        shape["channel_mult"],
        1,
        shape["transformer_depth"],
        shape["context_dim"],
        shape["num_heads"],
    )
    theirs = random_family.unet(channels)
    theirs.load_state_dict(randomise(ours))
    latent, times, context = torch.randn(2, channels, 16, 24), torch.tensor([3, 741]), torch.randn(2, 77, 128)
    with torch.no_grad():
        expected = theirs(latent, timesteps=times, context=context, transformer_options={})
        assert torch.allclose(ours(latent, times, context), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


def test_the_timestep_embedding_equals_comfyuis():
    times = torch.tensor([0, 1, 500, 999])
    assert torch.allclose(timestep_embedding(times, 64), host_timestep_embedding(times, 64), rtol=1e-5, atol=1e-5)


def test_the_text_encoder_equals_comfyuis():
    words = CONFIG["text"]
    ours = TextEncoder(
        words["vocab_size"],
        words["hidden_size"],
        words["num_hidden_layers"],
        words["num_attention_heads"],
        words["intermediate_size"],
    )
    theirs = comfy.clip_model.CLIPTextModel_(dict(words), torch.float32, "cpu", random_family.OPS)
    theirs.load_state_dict(randomise(ours))
    rows = torch.randint(0, words["vocab_size"], (2, 77))
    with torch.no_grad():
        assert torch.allclose(ours(rows), theirs(rows)[0], rtol=1e-5, atol=1e-4)


def test_prompts_become_the_tokens_that_comfyui_makes_of_them():
    prompts = [renderer.render(renderer.Request(train=True), 32, 32, seed).prompt for seed in range(12)] + [
        "",
        text.PLAIN.format(what="a red apple"),
    ]
    tokenizer = SD1Tokenizer()
    for prompt, rows in zip(prompts, text.rows(prompts), strict=True):
        ids = [token for token, _weight in tokenizer.tokenize_with_weights(prompt)["l"][0]]
        assert [text.token_ids()[row] for row in rows] == ids, prompt


def test_every_word_of_every_prompt_is_trained():
    for seed in range(300):
        scene = renderer.render(renderer.Request(), 16, 16, seed)
        assert (text.rows([scene.prompt, scene.background_prompt]) != 0).all()


def test_trained_weights_load_in_comfyuis_unet():
    """The trainer's model, not only the network: names and shapes of what a checkpoint holds."""
    config = {"seed": 0, "in_channels": 4}
    state = diffusion.build(config).state_dict()
    prefix = "model.diffusion_model."
    random_family.unet(4).load_state_dict(
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    )


@pytest.mark.parametrize("widths, attention_levels", [((16, 16, 32, 64, 96), 2), ((8, 16, 16, 32, 32, 40), 3)])
def test_the_transparent_decoder_equals_the_published_one(widths, attention_levels):
    ours, theirs = TransparentDecoder(widths, attention_levels), Reference(widths, attention_levels)
    theirs.load_state_dict(randomise(ours))
    image, latent = torch.rand(2, 3, 64, 96), torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        expected = theirs(image, latent)
        assert torch.allclose(ours(image, latent), expected, atol=1e-3, rtol=1e-3)
    assert expected.std() > 0.1


def test_the_published_sizes_are_the_defaults():
    with torch.device("meta"):
        decoder, encoder = TransparentDecoder(), OffsetEncoder()
    assert decoder.multiple == 64 and decoder.latent_conv_in.weight.shape == (64, 4, 1, 1)
    assert decoder.down_blocks[6].attentions[0].to_q.weight.shape == (512, 512) and not hasattr(
        decoder.down_blocks[3], "attentions"
    )
    shapes = [tuple(value.shape[:2]) for key, value in encoder.state_dict().items() if key.endswith("weight")]
    assert shapes == [(32, 4), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (4, 256)]
    assert list(encoder.state_dict())[-1] == "blocks.16.bias"


def test_a_fresh_offset_encoder_adds_nothing():
    assert (OffsetEncoder()(torch.rand(1, 4, 32, 48)) == 0).all() and OffsetEncoder()(
        torch.rand(1, 4, 32, 48)
    ).shape == (1, 4, 4, 6)


def test_a_fresh_alignment_changes_nothing_and_reads_all_it_is_given():
    torch.manual_seed(0)
    network = Alignment((4, 8, 16))
    image, alpha, layer = torch.rand(2, 3, 13, 18), torch.rand(2, 1, 13, 18), torch.rand(2, 3, 13, 18)
    assert torch.equal(network(image, alpha, layer), layer)
    with torch.no_grad():
        network.last.weight.normal_(std=0.5)
    before = network(image, alpha, layer)
    for i, given in enumerate((image, alpha, layer)):
        changed = [image, alpha, layer]
        changed[i] = given.flip(-1)
        assert (network(*changed) - before).abs().max() > 1e-3
    # Sides that its levels do not divide are filled up and cut off again.
    whole = [nn.functional.pad(part, (0, 2, 0, 3), mode="replicate") for part in (image, alpha, layer)]
    assert torch.allclose(network(*whole)[..., :13, :18], before, rtol=0, atol=1e-6)
