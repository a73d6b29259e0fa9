"""LayeringDiff's trainer: it starts as the inpainting model that it is made of, learns eight pairs, takes a user's
folders, and reads checkpoints with the real key names.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from strata.networks import decomposer
from strata.networks.unet import UNet
from strata.techniques import diffusion as formulas
from strata.techniques import layering
from strata.training import base as bases
from strata.training import command, layeringdiff, published, settings, text

SMALL = {
    "side": 64,
    "pairs": 40,
    "batch": 4,
    "steps": 12,
    "warmup": 2,
    "sampling_steps": 2,
    "alignment_pairs": 8,
    "alignment_crop": 32,
    "alignment_batch": 4,
    "alignment_steps": 8,
}


def config_of(**changes) -> dict:
    return command.read_config(settings.CONFIGS / "layeringdiff.json", []) | SMALL | changes


@pytest.fixture(scope="module")
def mini():
    return bases.load(None)


@torch.no_grad()
def test_the_mini_base_is_the_published_inpainting_model_in_diffusers_class(mini):
    state, _ = published.read(settings.MODELS / published.INPAINT)
    family = settings.family()["unet"]
    plain = UNet(
        9,
        4,
        family["model_channels"],
        family["channel_mult"],
        family["num_res_blocks"][0],
        family["transformer_depth"],
        family["context_dim"],
        family["num_heads"],
    ).eval()
    plain.load_state_dict(state)
    torch.manual_seed(0)
    given, times = torch.randn(2, 9, 8, 16), torch.tensor([10, 900])
    states = published.checkpoint()[0].encode(text.rows(["a dog", ""]))
    found = mini.unet(given, times, encoder_hidden_states=states).sample
    assert torch.allclose(found, plain(given, times, states), rtol=1e-4, atol=1e-4)
    assert torch.allclose(mini.null, states[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", decomposer.LAYERS)
@torch.no_grad()
def test_before_the_first_step_it_is_the_inpainting_model(mini, layer):
    torch.manual_seed(0)
    model = layeringdiff.Denoiser(mini, layer, 4)
    noisy, image, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    cells = torch.rand(2, 1, 8, 8).round()
    alpha = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    mask = cells if layer == "background" else 1 - cells
    expected = mini.unet(
        torch.cat([noisy, mask, image], 1), times, encoder_hidden_states=mini.null.expand(2, -1, -1)
    ).sample
    assert torch.allclose(model(noisy, times, image, alpha), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_samples_of_a_perfect_model_are_the_layer(mini):
    clean, image, alpha = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.rand(2, 1, 64, 64)
    levels = formulas.noise_levels()

    class Perfect(torch.nn.Linear):
        def forward(self, noisy, timesteps, *_):
            level = levels[timesteps[0]].to(noisy)
            noise = (noisy - level.sqrt() * clean) / (1 - level).sqrt()
            return formulas.v_target(clean, noise, level.expand(len(noisy)))

    found = layeringdiff.sample(Perfect(1, 1), image, alpha, steps=5)
    # The last level that is sampled still has a little noise in it.
    assert torch.allclose(found, clean, rtol=0, atol=0.15)


def test_pairs_add_up_and_their_latents_are_the_images(mini, tmp_path):
    pairs = layeringdiff.Pairs(tmp_path, mini, 40, 64, "test")
    image, front, behind, alpha = pairs.pictures(np.array([3, 5, 3]))
    assert torch.equal(image[0], image[2]) and not torch.equal(image[0], image[1])
    assert (layering.composite(front, behind, alpha) - image).abs().max() < 2 / 255
    assert ((alpha > 0.5).sum((1, 2, 3)) > 10).all()
    batch = pairs.batch(np.array([5]))
    with torch.no_grad():
        for latent, pixels in ((batch.image, image), (batch.foreground, front), (batch.background, behind)):
            assert torch.allclose(latent, mini.encode(pixels[1:2]), rtol=0, atol=5e-3)
    assert torch.equal(batch.alpha, alpha[1:2])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layeringdiff") / "run"
    layeringdiff.train(config_of(steps=40, learning_rate=5e-3), folder, None, 1e9)
    return folder


def test_all_three_parts_are_trained_and_nothing_of_the_base_is(trained, mini):
    for layer in decomposer.LAYERS:
        state = load_file(trained / layer / "model.safetensors")
        own = mini.unet.state_dict()
        for key, value in own.items():
            twin = state.get(key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))
            if twin is not None:
                assert torch.equal(twin, value), key
        assert all(value.abs().max() > 0 for key, value in state.items() if "lora_B" in key)
    aligned = load_file(trained / "model.safetensors")
    assert aligned["foreground.last.weight"].abs().max() > 0 and aligned["background.last.weight"].abs().max() > 0


def test_folders_of_a_users_own_give_pairs(mini, tmp_path):
    rng = np.random.default_rng(0)
    for name, channels, size in (("cut", 4, (90, 70)), ("places", 3, (64, 120))):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (*size, channels), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / "deep" / f"{i}.png")
    pairs = layeringdiff.FolderPairs(tmp_path / "kept", mini, 8, 64, tmp_path / "cut", tmp_path / "places")
    image, front, behind, alpha = pairs.pictures(np.arange(4))
    assert alpha.std() > 0.1 and (layering.composite(front, behind, alpha) - image).abs().max() < 2 / 255
    (tmp_path / "empty").mkdir()
    with pytest.raises(settings.TrainingError, match="--backgrounds: .*empty has no PNG, WebP or JPEG files"):
        layeringdiff.FolderPairs(tmp_path / "kept", mini, 8, 64, tmp_path / "cut", tmp_path / "empty")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"x": torch.zeros(1)}, "holds no UNet under model.diffusion_model"),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
                f"model.diffusion_model.{bases.CROSS}": torch.zeros(320, 768),
            },
            "has 4 input channels and an inpainting model has 9; give the inpainting checkpoint of SD1.5",
        ),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)},
            "is none of SD1.5, SD2, Strata mini",
        ),
    ],
)
def test_a_base_of_another_kind_is_named(tmp_path, state, expected):
    save_file(state, tmp_path / "base.safetensors")
    with pytest.raises(settings.TrainingError, match=expected):
        bases.load(tmp_path / "base.safetensors")
    with pytest.raises(settings.TrainingError, match="cannot be read"):
        bases.load(tmp_path / "nowhere.safetensors")
    torch.save({"state_dict": state, "step": 3}, tmp_path / "base.ckpt")
    with pytest.raises(settings.TrainingError, match=expected):
        bases.load(tmp_path / "base.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(settings.TrainingError, match="cannot be read .*; give a .safetensors or .ckpt"):
        bases.load(tmp_path / "pickle.ckpt")
