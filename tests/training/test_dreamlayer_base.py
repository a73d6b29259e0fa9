"""DreamLayer's modules for SD1.5 and SDXL, small and with random weights: diffusers' UNet with layers in it beside the
mini family's denoiser of layers, layered files as scenes, and a run from them.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import run
import torch
from host import PACK
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strata.formats import files as layer_files
from strata.formats.raster import picture
from strata.networks import layered_denoiser, layered_unet
from strata.networks.layered_denoiser import LayeredDenoiser
from strata.scenes import renderer
from strata.techniques import diffusion as formulas
from strata.techniques.layers import Layer, LayerStack
from strata.training import base as bases
from strata.training import command, diffusion, dreamlayer, layered_files, settings, text, text_base

from . import random_bases

pytestmark = pytest.mark.usefixtures("small_bases")
PROMPTS = [["an empty place on a beach", "a red apple", "a dog"], ["", "", ""]]
RUN = {"side": 64, "held_out": 1, "rows": 7, "steps": 3, "warmup": 1, "sampling_steps": 1, "learning_rate": 1e-2}
RUN |= {"shares": [[1, 1, 1]] * 2, "optimizer": "adam"}


@pytest.fixture(scope="module")
def twins():
    """The mini family's denoiser of layers, and diffusers' UNet of the same weights with the same modules in it."""
    torch.manual_seed(0)
    plain = diffusion.build({"seed": 1, "in_channels": 4})
    with torch.no_grad():
        for value in plain.parameters():
            value.copy_(torch.randn_like(value) * value[0].numel() ** -0.5 if value.ndim > 1 else value + 0.1)
    adapter = {"input_blocks.1.1.transformer_blocks.0.attn1.to_q": 0.1 * torch.randn(64, 64)}
    adapter["output_blocks.3.1.transformer_blocks.0.attn2.to_v"] = 0.1 * torch.randn(128, 128)
    state = {f"model.{key}": value for key, value in plain.model.state_dict().items()}
    shape = json.loads(bases.CONFIG.read_text())[bases.MINI]["unet"] | {"in_channels": 4}
    unet, names = text_base._unet("mini", state, shape)
    places = {host.removeprefix("diffusion_model."): own for own, host in names.items()}
    mini = LayeredDenoiser(copy.deepcopy(plain), adapter, 3, 1, len(text.token_ids()) - 1)
    own = layered_unet.LayeredUNet(unet, {places[name]: term for name, term in adapter.items()}, 3, 1)
    learnt = [{name: value for name, value in one.named_parameters() if value.requires_grad} for one in (mini, own)]
    for name, value in learnt[0].items():
        value.data = torch.randn_like(value) * (0.5 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
        host, _, kind = name.removeprefix("model.diffusion_model.").rpartition(".")
        learnt[1].pop(f"unet.{places[host]}.{kind}" if host in places else name).data.copy_(value)
    assert not learnt[1]
    own.unet.enable_gradient_checkpointing()
    return mini, own


def test_diffusers_unet_with_layers_is_the_mini_familys_denoiser_of_layers(twins):
    mini, own = twins
    rows = dreamlayer.prompt_rows(PROMPTS)
    latent, times, early = torch.randn(2, 4, 4, 8, 8), torch.tensor([900, 300]), torch.tensor([1.0, 0.0])
    known = torch.rand(2, 2, 8, 8)
    with torch.no_grad():
        states = mini.cond_stage_model.get_submodule("transformer.text_model")(rows.flatten(0, 1)).unflatten(0, (2, 3))
    words = states, (rows == mini.end).int().argmax(-1), torch.zeros(2, 4, 1)
    found, gradients = [], []
    for model, said in ((mini, rows), (own, words)):
        outputs = model(latent, times, said, early, known)
        (outputs[0].square().mean() + outputs[1].square().sum() + outputs[2].square().sum()).backward()
        found.append([part.detach() for part in outputs])
        gradients.append(model)
    for one, other in zip(*found, strict=True):
        assert one.std() > 0.01 and torch.allclose(one, other, rtol=0, atol=2e-4)
    for name in ("layer_embedding", "context_layers.0.attn.to_q.weight", "context_layers.0.map_out.weight"):
        one, other = (model.get_parameter(name).grad for model in gradients)
        assert one.abs().max() > 0 and torch.allclose(one, other, rtol=1e-2, atol=1e-2 * one.abs().max().item()), name
    place = "transformer_blocks.0.attn1.to_k.foreground"
    one = mini.get_parameter(f"model.diffusion_model.output_blocks.3.1.{place}").grad
    other = next(
        value.grad for name, value in own.named_parameters() if name == f"unet.up_blocks.1.attentions.1.{place}"
    )
    assert one.abs().max() > 0 and torch.allclose(one, other, rtol=1e-2, atol=1e-2 * one.abs().max().item())


def test_the_joined_prompt_is_that_of_the_node():
    assert layered_unet.joined_prompt(PROMPTS[0]) == "a dog, a red apple, an empty place on a beach"
    assert layered_unet.joined_prompt(PROMPTS[1]) == ""


def disk(colour, middle, radius, size=(96, 64)) -> torch.Tensor:
    rows, columns = np.mgrid[: size[1], : size[0]]
    away = ((rows - middle[1]) ** 2 + (columns - middle[0]) ** 2) ** 0.5
    alpha = torch.from_numpy((radius - away).clip(0, 1)).float()
    return torch.cat([torch.tensor(colour).expand(*alpha.shape, 3), alpha[..., None]], -1)


def stack(count: int, seed: int, names: list[str] | None = None, **changes) -> LayerStack:
    """Disks over noise that are said to be what they are."""
    rng = np.random.default_rng(seed)
    layers = [Layer(torch.from_numpy(rng.random((64, 96, 3), np.float32)), "a noisy wall")]
    for number in range(count):
        colour = rng.random(3, np.float32).tolist()
        layers.append(Layer(disk(colour, (60 + 5 * number, 30), 12), f"a disk, number {number}", **changes))
    for number, name in enumerate(names or []):
        layers[number] = Layer(layers[number].image, name)
    return LayerStack((96, 64), tuple(layers))


def save(folder, stem, made, kind="PSD"):
    folder.mkdir(exist_ok=True)
    return layer_files.save(folder, stem, made, picture(made), kind, {})[0]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for number, count in enumerate((1, 2, 3, 4, 2)):
        save(folder, f"{number}", stack(count, number), "PSD" if number % 2 else "OpenRaster")
    return folder


def config_of(base_files, family, folder, **changes) -> dict:
    config = command.read_config(command.FOR_BASES / "dreamlayer.json", []) | RUN
    config |= {
        "base": str(base_files[family]),
        "transparent_encoder": str(base_files["encoder"]),
        "scenes": str(folder),
    }
    return config | changes


@pytest.mark.parametrize("kind", ["PSD", "OpenRaster"])
def test_a_layered_file_is_a_scene(kind, tmp_path):
    made = stack(2, 0)
    path = save(tmp_path, "scene", made, kind)
    assert layered_files.names_of(path, 3) == ["a noisy wall", "a disk, number 0", "a disk, number 1"]
    assert layered_files.names_of(path, 1) == ["a noisy wall", "a disk, number 0"]
    scene = layered_files.read(path, 3, 64)
    # as near to the objects as can be: columns 31 to 95 of 96
    assert (scene.background - made.layers[0].image[:, 31:95].permute(2, 0, 1)).abs().max() < 2 / 255
    assert (scene.objects - torch.stack([layer.image[:, 31:95].permute(2, 0, 1) for layer in made.layers[1:]]))[
        :, 3
    ].abs().max() < 2 / 255
    composites = scene.composites()
    for count in (1, 2):
        wanted = picture(made.with_layers(made.layers[: 1 + count]))[:, 31:95, :3].permute(2, 0, 1)
        assert (composites[count - 1] - wanted).abs().max() < 3 / 255
    faint = save(tmp_path, "faint", stack(1, 0, opacity=0.5), kind)
    assert layered_files.read(faint, 3, 64).objects[0, 3].max() == pytest.approx(0.5, abs=2 / 255)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (stack(1, 0, ["a wall", "2"]), "layer 2 from below of .*bad.psd is named '2'; name it after what it shows"),
        (stack(1, 0, ["", "a disk"]), "layer 1 from below of .*bad.psd is named 'Layer'"),
        (stack(1, 0, ["a wall", "Layer 7"]), "is named 'Layer 7'"),
        (stack(0, 0), "bad.psd needs two visible layers or more.* and has 1; add"),
        (stack(1, 0, visible=False), "bad.psd needs two visible layers or more.* and has 1; add"),
        (stack(1, 0, blend_mode="multiply"), "layer 'a disk, number 0' of .*bad.psd is blended by multiply"),
    ],
)
def test_layers_that_cannot_be_learnt_from_are_one_sentence(made, words, tmp_path):
    with pytest.raises(settings.TrainingError, match=f"^--scenes: .*{words}"):
        layered_files.names_of(save(tmp_path, "bad", made), 3)


def test_a_background_with_holes_and_what_is_missing_are_one_sentence(base_files, scenes, tmp_path):
    hole = stack(1, 0)
    hole = hole.with_layers([Layer(disk([1.0, 0, 0], (30, 30), 20), "a hole"), hole.layers[1]])
    with pytest.raises(settings.TrainingError, match="lowest layer of .*'a hole', is transparent in places"):
        layered_files.read(save(tmp_path, "hole", hole), 3, 64)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.psd").write_bytes(b"8BPS and nothing else")
    for changes, words in (
        ({"scenes": str(tmp_path / "none")}, "--scenes: .*none is not there"),
        ({"scenes": str(tmp_path / "broken")}, "--scenes: .*broken.psd"),
        ({"scenes": str(base_files["images"])}, "has no PSD or OpenRaster files"),
        ({"held_out": 5}, "there are 5 layered files and 5 of them are kept"),
        ({"adapter": str(base_files["encoder"])}, "--adapter: .* is no low-rank adapter for SD1.5"),
    ):
        with pytest.raises(settings.TrainingError, match=words):
            dreamlayer.train(config_of(base_files, "SD1.5", scenes, **changes), tmp_path / "run", None, 1e9)
    with pytest.raises(SystemExit, match="--scenes goes with a model of your own"):
        command.main(["dreamlayer", "--scenes", str(scenes), "--folder", str(tmp_path / "run")])


def test_files_come_as_scenes_of_their_lowest_layers(base_files, scenes, tmp_path):
    base = text_base.load(config_of(base_files, "SD1.5", scenes))
    pool = layered_files.LayeredFiles(tmp_path, base, None, scenes, 64, 3)
    assert [pool.of(count).tolist() for count in (1, 2, 3)] == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [2, 3]]
    latents, alphas = pool.layers(2, np.array([3, 1]))
    assert latents.shape == (2, 4, 4, 8, 8) and alphas.shape == (2, 2, 8, 8)
    scene = layered_files.read(pool.paths[3], 3, 64)
    with torch.no_grad():
        for row, image in ((0, scene.background), (3, scene.composites()[1])):
            assert torch.allclose(latents[0, row], base.posterior(image[None])[0][0] * base.scale, rtol=0, atol=5e-3)
    assert torch.allclose(
        alphas[0], scene.objects[:2, 3].unflatten(1, (8, 8)).unflatten(3, (8, 8)).mean((2, 4)), atol=1e-3
    )


def test_files_of_the_bundled_workflow_are_learnt_from_as_they_are(comfy, base_files, tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    for seed in (5, 6):
        workflow, settings = PACK / "workflows" / "layered_files_mini.json", [f"The image.seed={seed}"]
        (path,) = run.run_file(comfy, workflow, settings, tmp_path / "made", False)
        shutil.copy(path, folder)
        assert layered_files.names_of(path, 3) == ["an empty beach", "a penguin", "a frog"]
        scene = layered_files.read(path, 3, 128)
        rendered = renderer.render(renderer.Request("beach", ("penguin", "frog"), 2), 128, 128, seed)
        # over each other they are the image, but for shadows; the background is the place without the things
        whole, place = (torch.from_numpy(one).permute(2, 0, 1) for one in (rendered.composite, rendered.background))
        assert (scene.composites()[-1] - whole).abs().mean() < 0.02
        things = torch.from_numpy(rendered.masks[1:].sum(0)) > 0.5
        off = (scene.background - place).abs().mean(0)[things].mean()
        assert off < 0.5 * (whole - place).abs().mean(0)[things].mean()
        for alpha, mask in zip(scene.objects[:, 3], rendered.masks[1:], strict=True):
            assert (alpha - torch.from_numpy(mask)).abs().mean() < 0.02
    config = config_of(base_files, "SD1.5", folder, steps=1)
    dreamlayer.train(config, tmp_path / "run", None, 1e9)
    assert (tmp_path / "run" / dreamlayer.FILE).exists()


@pytest.fixture(scope="module", params=sorted(random_bases.SMALL))
def trained(request, base_files, scenes, tmp_path_factory):
    """A run with an adapter that was stopped after its first step and went on."""
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    base = text_base.load(config_of(base_files, family, scenes))
    terms = {}
    for name, host in base.names.items():
        if name.endswith(("attn1.to_q", "attn2.to_out.0")):
            out, width = base.unet.get_submodule(name).weight.shape
            terms |= {f"{host}.weight::lora::0": torch.randn(out, 2), f"{host}.weight::lora::1": torch.randn(2, width)}
    save_file(terms, root / "adapter.safetensors")
    config = config_of(base_files, family, scenes, adapter=str(root / "adapter.safetensors"))
    dreamlayer.train(config, root / "run", 0, 1e9)
    assert (root / "run" / "last").exists()
    dreamlayer.train(config, root / "run", None, 1e9)
    return family, root / "run", config


def test_a_run_learns_what_the_file_has_and_nothing_else(base_files, trained):
    family, run, config = trained
    state, base = load_file(run / dreamlayer.FILE), text_base.load(config)
    count = sum(name.endswith(("to_k", "to_v")) for name in base.names)
    for kind in ("shared", "foreground"):
        own = [key for key in state if key.startswith(f"{kind}.diffusion_model.")]
        assert len(own) == count and all(state[key].abs().max() > 0 for key in own)
    assert (
        state["layer_embedding"].shape == (4, base.unet.config.cross_attention_dim) and state["layer_embedding"].any()
    )
    assert any(key.startswith("context_layers.0.") for key in state)
    with safe_open(run / dreamlayer.FILE, "pt") as file:
        about = file.metadata()
    assert about["base"] == family and about["steps"] == "3" and about["command"] == "python -m training dreamlayer"
    assert about["licence"] == random_bases.entry_of(family)["licence"] and "layered files of scenes" in about["data"]
    learnt = set(load_file(run / "model.safetensors"))
    assert all(key.endswith((".shared", ".foreground")) or key.startswith(("layer_", "context_")) for key in learnt)
    # the adapter acts on the objects' rows
    found = layered_unet.LayeredUNet(base.unet, dreamlayer.own_adapter(config, base), 3, 1)
    module = found.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    terms = load_file(config["adapter"])
    host = base.names["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert torch.equal(module.adapter, terms[f"{host}.weight::lora::0"] @ terms[f"{host}.weight::lora::1"])


def test_the_losses_fall_on_one_batch(base_files, scenes, tmp_path):
    config = config_of(base_files, "SDXL", scenes) | {"learning_rate": 1e-2, "empty_prompt": 0}
    task = dreamlayer._own(config, tmp_path, text_base.load(config))
    optimizer = torch.optim.Adam([value for value in task.model.parameters() if value.requires_grad], 1e-2)
    batch, found = task.batch(2, np.array([1, 2]), 0), []
    for _ in range(12):
        terms = dreamlayer.loss_of(
            task.model, batch, config, formulas.noise_levels(), np.random.default_rng(3), task.words
        )
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        found.append({key: value.item() for key, value in terms.items()})
    assert found[-1]["error"] < 0.95 * found[0]["error"] and found[-1]["context"] < found[0]["context"], found


def test_only_scenes_that_there_are_are_drawn():
    rng, config = np.random.default_rng(0), {"shares": [[1, 0, 0], [0, 0.5, 0.5]], "steps": 10}
    assert {dreamlayer.object_count(10, config, rng, 2) for _ in range(20)} == {2}
    assert {dreamlayer.object_count(10, config, rng, 1) for _ in range(20)} == {1}
    assert layered_denoiser.LEARNING == ("to_k", "to_v")
