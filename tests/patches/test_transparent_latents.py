"""Decoding and encoding transparency against the published pipeline, written out plainly from diffusers' blocks."""

from dataclasses import replace

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from strata.networks.transparency import OffsetEncoder, TransparentDecoder
from strata.patches import transparency, transparent_latents
from strata.techniques.transparency import clean_alpha, clean_colours, extend_colours, median_of_passes

from . import random_family
from . import random_transparency as random_files
from .transparency_reference import Reference

WIDTHS, LEVELS = (16, 16, 32, 64, 96), 2


def decoder(channels=4):
    torch.manual_seed(0)
    weights = random_files.network(TransparentDecoder(WIDTHS, LEVELS, channels))
    plain = TransparentDecoder(WIDTHS, LEVELS, channels)
    plain.load_state_dict(weights)
    with torch.no_grad():
        found = plain(*inputs(48, 80, channels=channels))
    weights["conv_out.weight"] *= 0.4 / found.std((0, 2, 3)).view(-1, 1, 1, 1)
    weights["conv_out.bias"] = 0.3 - (found.mean((0, 2, 3)) - weights["conv_out.bias"]) * 0.4 / found.std((0, 2, 3))
    return transparency.recognise("decoder.safetensors", weights), weights


def published(weights, image, latent):
    """LayerDiffuse's estimate_augmented, for one picture: eight passes, torch's median, channels A, R, G, B."""
    model = Reference(WIDTHS, LEVELS)
    model.load_state_dict(weights)
    results = []
    with torch.no_grad():
        for flip in (False, True):
            for turns in range(4):
                pixels, hidden = (torch.flip(part, dims=(3,)) if flip else part for part in (image, latent))
                out = model(torch.rot90(pixels, k=turns, dims=(2, 3)), torch.rot90(hidden, k=turns, dims=(2, 3))).clip(
                    0, 1
                )
                out = torch.rot90(out, k=-turns, dims=(2, 3))
                results.append(torch.flip(out, dims=(3,)) if flip else out)
    return torch.median(torch.stack(results, dim=0), dim=0).values


def inputs(height, width, batch=1, channels=4):
    torch.manual_seed(1)
    return torch.rand(batch, 3, height, width), torch.randn(batch, channels, height // 8, width // 8)


def test_eight_passes_are_the_published_ones():
    files, weights = decoder()
    image, latent = inputs(48, 80, batch=2)
    colour, alpha = transparent_latents.decode(files, image, latent, clean="off")
    for one in range(2):
        expected = published(weights, image[one : one + 1], latent[one : one + 1])
        visible = expected[:, :1] > 0
        assert (alpha[one] - expected[0, :1]).abs().max() < 1e-4
        assert ((colour[one] - expected[0, 1:]) * visible[0]).abs().max() < 1e-4
        assert 0.2 < visible.float().mean() < 0.98 and alpha.std() > 0.1


def test_other_sizes_are_padded_and_cropped_back():
    files, weights = decoder()
    image, latent = inputs(40, 72)
    colour, alpha = transparent_latents.decode(files, image, latent, clean="off")
    wide = (
        torch.nn.functional.pad(image, (0, 8, 0, 8), mode="replicate"),
        torch.nn.functional.pad(latent, (0, 1, 0, 1), mode="replicate"),
    )
    expected = published(weights, *wide)[..., :40, :72]
    assert colour.shape == (1, 3, 40, 72) and (alpha - expected[:, :1]).abs().max() < 1e-4


def test_clean_is_on_for_the_mini_family_alone():
    files, weights = decoder()
    image, latent = inputs(48, 80)
    raw, on = (transparent_latents.decode(files, image, latent, clean=clean)[1] for clean in ("off", "on"))
    auto = transparent_latents.decode(files, image, latent)[1]
    assert (
        files.families == ("Strata mini",)
        and torch.equal(on, auto)
        and torch.equal(on, clean_alpha(raw))
        and not torch.equal(on, raw)
    )
    other = replace(files, families=("SD1.5",))
    assert torch.equal(transparent_latents.decode(other, image, latent)[1], raw)


def test_fluxs_channels_come_the_other_way_round():
    torch.manual_seed(0)
    weights = random_files.network(TransparentDecoder(WIDTHS, LEVELS, 16))
    image, latent = inputs(32, 32, channels=16)
    colour, alpha = transparent_latents.decode(transparency.recognise("flux", weights), image, latent, passes=1)
    model = TransparentDecoder(WIDTHS, LEVELS, 16)
    model.load_state_dict(weights)
    with torch.no_grad():
        expected = model(image, latent).clip(0, 1)
    assert torch.allclose(alpha, expected[:, 3:], rtol=1e-5, atol=1e-5) and torch.allclose(
        colour * (alpha > 0), expected[:, :3] * (alpha > 0), rtol=1e-5, atol=1e-5
    )


def test_fewer_passes_are_the_middle_of_those_views():
    def plain(image, latent):
        return torch.cat([image, latent.mean((1, 2, 3), keepdim=True).expand_as(image[:, :1])], 1) + torch.linspace(
            0, 0.2, image.shape[3]
        )

    image, latent = inputs(16, 16)
    views = {}
    for flip in (False, True):
        for turns in range(4):
            turned = (torch.rot90(part.flip(3) if flip else part, turns, (2, 3)) for part in (image, latent))
            out = torch.rot90(plain(*turned).clamp(0, 1), -turns, (2, 3))
            views[flip, turns] = out.flip(3) if flip else out
    assert torch.equal(median_of_passes(plain, image, latent, 1), views[False, 0])
    assert torch.allclose(
        median_of_passes(plain, image, latent, 2), (views[False, 0] + views[True, 2]) / 2, rtol=0, atol=1e-6
    )
    four = (
        torch.stack([views[key] for key in ((False, 0), (False, 2), (True, 1), (True, 3))])
        .double()
        .quantile(0.5, dim=0)
    )
    assert torch.allclose(median_of_passes(plain, image, latent, 4).double(), four, rtol=0, atol=1e-6)
    assert torch.equal(median_of_passes(plain, image, latent, 8), torch.stack(list(views.values())).median(0).values)


def test_tiles_agree_with_one_pass_where_the_network_has_only_nearby_pixels():
    """Without attention's reach (its output weights zero) tiles differ from the whole by group norms alone, so those
    are made to see the same.
    """
    files, _ = decoder()
    image = torch.full((1, 3, 160, 224), 0.4)
    latent = torch.full((1, 4, 20, 28), 0.3)
    untiled, parts = (transparent_latents.decode(files, image, latent, 1, tile)[1] for tile in (0, 128))
    assert parts.shape == untiled.shape and (untiled - parts)[..., 48:80, 80:128].abs().max() < 0.1
    same = transparent_latents.decode(files, *inputs(48, 48), passes=2, tile=512)[1]
    assert torch.equal(same, transparent_latents.decode(files, *inputs(48, 48), passes=2)[1])


def test_clean_colours_keeps_what_is_visible_and_continues_it():
    colour, alpha = torch.rand(1, 3, 20, 30), torch.rand(1, 1, 20, 30) * (torch.rand(1, 1, 20, 30) > 0.5)
    found = clean_colours(colour, alpha)
    visible = (alpha > 0).expand_as(colour)
    assert torch.equal(found[visible], colour[visible]) and torch.equal(
        found[~visible], extend_colours(colour, alpha)[~visible]
    )


def kl_vae(channels):
    """ComfyUI's own KL autoencoder at reduced width."""
    config = {
        "embed_dim": channels,
        "ddconfig": {
            "double_z": True,
            "z_channels": channels,
            "resolution": 64,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1, 2, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }
    torch.manual_seed(2)
    weights = random_files.network(comfy.sd.AutoencoderKL(**config))
    weights["quant_conv.bias"][channels:] = -1
    return comfy.sd.VAE(sd=weights, config={"params": config}, dtype=torch.float32)


@pytest.mark.parametrize(("channels", "widths"), [(4, (32, 64, 128, 256)), (16, (8, 16, 16, 24))])
def test_encoding_adds_the_offset_in_deviations_as_published(channels, widths):
    vae = kl_vae(channels)
    torch.manual_seed(3)
    weights = random_files.network(OffsetEncoder(widths, channels))
    weights["blocks.16.weight"] /= 300
    colour, alpha = torch.rand(2, 3, 32, 40), torch.rand(2, 1, 32, 40)
    found = transparent_latents.encode(transparency.recognise("e", weights), vae, colour, alpha)
    network, encoder = vae.first_stage_model, OffsetEncoder(widths, channels)
    encoder.load_state_dict(weights)
    with torch.no_grad():
        mean, logvar = network.quant_conv(network.encoder((2 * colour - 1) * alpha)).chunk(2, 1)
        padded = extend_colours(colour, alpha)
        offset = 300 * encoder(torch.cat([alpha, padded] if channels == 4 else [padded, alpha], 1))
    assert (found - (mean + (0.5 * logvar.double()).exp() * offset)).abs().max() < 1e-4 * offset.abs().max()
    assert (found - mean).std() > 0.1


def test_a_run_can_be_interrupted_between_passes_and_reports_each():
    files, _ = decoder()
    calls = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: calls.append((value, total)))
    try:
        transparent_latents.decode(files, *inputs(16, 16, batch=2), passes=4)
        reported = list(calls)
        assert reported[0] == (1, 8) and reported[-1] == (8, 8)  # newer hosts leave out what comes within a moment
        assert reported == sorted(set(reported)) and set(reported) <= {(value, 8) for value in range(1, 9)}
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            transparent_latents.decode(files, *inputs(16, 16))
        assert calls == reported
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


def test_a_vae_without_deviation_or_of_another_family_is_refused():
    published = transparency.recognise("encoder.safetensors", OffsetEncoder().state_dict())
    vae = comfy.sd.VAE(sd=random_family.autoencoder())
    colour, alpha = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    with pytest.raises(
        ValueError,
        match="vae: it gives no deviation, which encoder.safetensors scales by; load the full VAE of SDXL or SD1.5",
    ):
        transparent_latents.encode(published, vae, colour, alpha)
    with pytest.raises(
        ValueError, match="vae: it makes latents of 16 channels and encoder.safetensors is an encoder for SDXL or SD1.5"
    ):
        transparent_latents.encode(published, kl_vae(16), colour, alpha)


def test_the_mini_familys_offset_is_added_as_it_is_and_sides_are_filled_up():
    torch.manual_seed(3)
    weights = random_files.network(OffsetEncoder((16, 32, 64, 96)))
    vae = comfy.sd.VAE(sd=random_family.autoencoder())
    colour, alpha = torch.rand(1, 3, 20, 28), torch.rand(1, 1, 20, 28)
    found = transparent_latents.encode(transparency.recognise("e", weights), vae, colour, alpha)
    encoder = OffsetEncoder((16, 32, 64, 96))
    encoder.load_state_dict(weights)
    filled = torch.zeros(1, 4, 24, 32)
    filled[..., :20, :28] = torch.cat([colour, alpha], 1)
    with torch.no_grad():
        gray = 0.5 + (filled[:, :3] - 0.5) * filled[:, 3:]
        expected = vae.encode(gray.movedim(1, -1)) + encoder(
            torch.cat([filled[:, 3:], extend_colours(filled[:, :3], filled[:, 3:])], 1)
        )
    assert found.shape == (1, 4, 3, 4) and (found - expected).abs().max() < 1e-4 * expected.abs().max()
