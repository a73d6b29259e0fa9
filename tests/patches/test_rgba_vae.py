"""Autoencoders with alpha as ComfyUI's VAE: equal to the same weights run another way, whole and in tiles, and files
that are something else.
"""

import json

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from strata.networks.autoencoder import Autoencoder, with_alpha
from strata.patches import rgba_vae
from strata.techniques.transparency import extend_colours

KL = {
    "in_channels": 4,
    "out_channels": 4,
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def loaded(folder, state, name="file.safetensors"):
    state = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)} | state
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    return rgba_vae.load(name)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Autoencoder(image_channels=4).eval()
    with torch.no_grad():
        model.taesd_decoder[-1].weight *= 8
        model.taesd_decoder[-1].bias += 0.4
    return model


@torch.no_grad()
def test_the_small_layout_is_ours(folder, small):
    vae = loaded(folder, small.state_dict())
    image = torch.rand(2, 40, 48, 4)
    latent = small.encode(image.movedim(-1, 1))
    assert torch.allclose(vae.encode(image), latent, rtol=1e-5, atol=1e-5)
    decoded = vae.decode(latent)
    expected = small.decode(latent).clamp(0, 1).movedim(1, -1)
    assert decoded.shape == (2, 40, 48, 4) and expected.std((0, 1, 2)).min() > 1e-3
    assert torch.allclose(decoded, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_image_without_alpha_is_encoded_as_opaque(folder, small):
    vae, image = loaded(folder, small.state_dict()), torch.rand(1, 32, 32, 3)
    whole = torch.cat([image, torch.ones(1, 32, 32, 1)], -1)
    assert torch.equal(vae.encode(image), vae.encode(whole))
    assert not torch.allclose(vae.encode(image), vae.encode(torch.cat([image, torch.zeros(1, 32, 32, 1)], -1)))


@torch.no_grad()
def test_tiles_give_what_the_whole_gives_but_for_their_seams(folder, small):
    vae, latent = loaded(folder, small.state_dict()), torch.randn(2, 4, 32, 24)
    whole, tiled = vae.decode(latent), vae.decode_tiled(latent, tile_x=24, tile_y=24, overlap=10)
    assert tiled.shape == whole.shape == (2, 256, 192, 4)
    assert (tiled - whole).abs().mean() < 0.02 * whole.std()
    one = vae.decode_tiled(latent[:1], tile_x=64, tile_y=64, overlap=8)
    assert torch.allclose(one, whole[:1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_fourth_channel_changes_nothing_before_it_has_learnt(folder):
    torch.manual_seed(1)
    colours = Autoencoder().eval()
    vae, image = loaded(folder, with_alpha(colours.state_dict())), torch.rand(1, 32, 32, 4)
    latent = colours.encode(image[..., :3].movedim(-1, 1))
    assert torch.allclose(vae.encode(image), latent, rtol=1e-5, atol=1e-5)
    decoded = vae.decode(latent)
    assert torch.allclose(decoded[..., :3], colours.decode(latent).clamp(0, 1).movedim(1, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(decoded[..., 3], torch.ones_like(decoded[..., 3]))


@pytest.fixture(scope="module")
def kl():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(**KL).eval()


@torch.no_grad()
def test_the_published_form_is_diffusers_autoencoder_from_its_folder(folder, kl):
    kl.save_pretrained(folder / "alphavae")
    assert json.loads((folder / "alphavae" / "config.json").read_text())["out_channels"] == 4
    name = "alphavae/diffusion_pytorch_model.safetensors"
    ends = {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3), "decoder.conv_out.weight": torch.zeros(3, 8, 3, 3)}
    save_file(ends, folder / "three.safetensors")
    assert name in rgba_vae.choices() and "three.safetensors" not in rgba_vae.choices()
    vae, image = rgba_vae.load(name), torch.rand(1, 32, 40, 4)
    assert vae.latent_channels == 16
    mean = kl.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mean
    vae.first_stage_model.float(), vae.patcher.model.float()
    assert torch.allclose(vae.encode(image), mean, rtol=1e-3, atol=1e-3) and mean.std() > 1e-2
    expected = (kl.decode(mean).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    decoded = vae.decode(mean)
    assert decoded.shape == (1, 32, 40, 4) and torch.allclose(decoded, expected, rtol=0, atol=2e-3)


@torch.no_grad()
def test_the_hosts_key_names_are_read_too(folder, kl):
    theirs = rgba_vae.RGBAVAE(dict(kl.state_dict()), rgba_vae.ENDS[1])
    state = theirs.get_sd()
    assert "encoder.down.0.block.0.conv1.weight" in state and state["decoder.conv_out.weight"].shape[0] == 4
    vae, latent = loaded(folder, state), torch.randn(1, 16, 4, 4)
    assert torch.equal(vae.decode(latent), theirs.decode(latent))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"decoder.weight": torch.zeros(1)}, "is no autoencoder in the form of Flux's, Qwen-Image's or TAESD's"),
        (dict(Autoencoder().state_dict()), "is an autoencoder of 3 channels without alpha; load it by Load VAE"),
        (
            {key: value for key, value in Autoencoder(image_channels=4).state_dict().items() if "encoder.3" not in key}
            | {"taesd_encoder.2.weight": torch.zeros(3, 3)},
            "does not have the weights of an autoencoder that ComfyUI knows",
        ),
    ],
)
def test_other_files_are_refused_in_one_sentence(folder, state, expected):
    with pytest.raises(ValueError, match=f"^file: file.safetensors .*{expected}") as found:
        loaded(folder, state)
    assert "\n" not in str(found.value)


def test_a_missing_file_is_named_with_its_folder(folder):
    with pytest.raises(ValueError, match="^file: nothing.safetensors is not there; put it into "):
        rgba_vae.load("nothing.safetensors")


def test_alpha_is_kept_by_encode_transparency_and_needs_a_vae_that_has_it(folder, small):
    from strata.nodes.transparency import EncodeTransparency

    vae = loaded(folder, small.state_dict())
    image, mask = torch.rand(1, 36, 32, 3), torch.zeros(1, 36, 32)
    mask[:, 8:20] = 1
    latent = EncodeTransparency.execute(image=image, vae=vae, mask=mask).args[0]["samples"]
    assert latent.shape == (1, 4, 5, 4)
    alpha = torch.nn.functional.pad(1 - mask[:, None], (0, 0, 0, 4))
    colour = extend_colours(torch.nn.functional.pad(image.movedim(-1, 1), (0, 0, 0, 4)), alpha)
    assert torch.equal(latent, vae.encode(torch.cat([colour, alpha], 1).movedim(1, -1)))
    assert not torch.equal(latent, vae.encode(torch.nn.functional.pad(image, (0, 0, 0, 0, 0, 4))))
    plain = comfy.sd.VAE(sd=dict(Autoencoder().state_dict()))
    with pytest.raises(ValueError, match="^transparency: nothing is connected and the VAE has no alpha"):
        EncodeTransparency.execute(image=image, vae=plain)
