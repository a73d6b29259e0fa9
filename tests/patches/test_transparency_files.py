"""LayerDiffuse's weight files told apart by their content, and one sentence for each that cannot be used."""

import re

import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from strata.networks.transparency import OffsetEncoder, TransparentDecoder
from strata.patches import layer_files, mini_family, transparency

from . import random_transparency as random_files

# Input, output, middle blocks' attentions.
SD15_WIDTHS = [320] * 4 + [640] * 4 + [1280] * 4 + [1280] * 6 + [640] * 6 + [320] * 6 + [1280] * 2
PUBLISHED = (32, 32, 64, 128, 256, 512, 512)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    known = {**folder_paths.folder_names_and_paths, "layer_model": ([str(tmp_path)], {".safetensors", ".pth"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    folder_paths.filename_list_cache.pop("layer_model", None)
    return tmp_path


def one_sentence(text: str) -> bool:
    return len(text) < 400 and "\n" not in text and not re.search(r"[.!?] [A-Z]", text)


def test_a_missing_file_is_to_be_had_from_its_own_address(folder):
    for name in layer_files.PUBLISHED:
        said = layer_files.missing(name)
        assert one_sentence(said) and said.endswith(f"/{name} into {folder}.") and said.count("https://") == 1
    assert layer_files.missing("mine.safetensors") == f"file: mine.safetensors is not there; put it into {folder}."
    (folder / "mine.safetensors").touch()
    folder_paths.filename_list_cache.pop("layer_model", None)
    assert layer_files.missing("mine.safetensors") is None


@pytest.mark.parametrize("family", ["SDXL", "SD1.5", "Strata mini"])
def test_attention_adapters_are_known_by_their_keys(family):
    weights = random_files.adapter(transparency.structure(family), rank=2)
    found = transparency.recognise("anything.safetensors", weights)
    assert found.families == (family,) and found.extra_channels == 0
    assert sum(len(parts) for parts in found.part("adapter", "").values()) == len(weights)


@pytest.mark.parametrize("extra", [0, 4, 8])
def test_difference_files_are_known_with_the_channels_they_add(extra):
    kept = ("output_blocks.8", "attn2.to_k", random_files.FIRST)
    shapes = {key: shape for key, shape in transparency.structure("SDXL").items() if any(part in key for part in kept)}
    weights = random_files.adapter(shapes, rank=2, lora=("to_k",), diff=("output_blocks.8",), extra=extra)
    found = transparency.recognise("anything.safetensors", weights)
    assert found.families == ("SDXL",) and found.extra_channels == extra
    assert ("input channels" in found.describe()) == (extra > 0)


@pytest.mark.parametrize(
    ("key", "parts", "fit"),
    [
        ("any", {"diff::0": (6, 4, 3, 2)}, True),
        ("any", {"diff::0": (6, 5, 3, 2)}, False),
        (transparency.FIRST, {"diff::0": (6, 4, 3, 2)}, True),
        (transparency.FIRST, {"diff::0": (6, 9, 3, 2)}, True),
        (transparency.FIRST, {"diff::0": (7, 4, 3, 2)}, False),
        (transparency.FIRST, {"diff::0": (6, 4, 1, 2)}, False),
        (transparency.FIRST, {"diff::0": (6, 4, 3, 1)}, False),
        ("any", {"lora::0": (6, 5), "lora::1": (5, 4, 3, 2)}, True),
        ("any", {"lora::0": (6, 5), "lora::1": (5, 24)}, True),
        ("any", {"lora::0": (7, 5), "lora::1": (5, 24)}, False),
        ("any", {"lora::0": (6, 5), "lora::1": (5, 23)}, False),
        ("any", {"lora::0": (6, 4), "lora::1": (5, 24)}, False),
    ],
)
def test_parts_fit_a_weight_of_6_4_3_2_where_their_product_has_its_shape(key, parts, fit):
    parts = {name: torch.zeros(shape) for name, shape in parts.items()}
    assert transparency.fits(key, parts, (6, 4, 3, 2)) == fit


@pytest.mark.parametrize(("frames", "control"), [(1, 0), (3, 0), (2, 32)])
def test_attention_sharing_of_sd15_is_known(frames, control):
    widths = [(width, width if index % 2 == 0 else 768, width) for index, width in enumerate(SD15_WIDTHS)]
    weights = random_files.sharing(widths, frames, rank=2, control=control)
    found = transparency.recognise("anything.safetensors", weights)
    assert found.families == ("SD1.5",) and found.frames == frames
    assert found.describe() == f"attention sharing{f' of {frames} images' if frames > 1 else ''} for SD1.5"
    network = found.part("sharing", "").model
    assert network.state_dict().keys() == weights.keys() and hasattr(network, "kwargs_encoder") == bool(control)


@pytest.mark.parametrize(
    ("widths", "levels", "channels", "families"),
    [
        (PUBLISHED, 3, 4, ("SDXL", "SD1.5")),
        ((16, 16, 32, 64, 96), 2, 4, ("Strata mini",)),
        ((8, 8, 16, 16, 32, 32), 1, 16, ("Flux",)),
    ],
)
def test_decoders_are_built_from_their_shapes(widths, levels, channels, families):
    with torch.device("meta"):
        shapes = TransparentDecoder(widths, levels, channels).state_dict()
    found = transparency.recognise(
        "anything.safetensors", {key: torch.zeros(value.shape, dtype=torch.half) for key, value in shapes.items()}
    )
    network = found.part("decoder", "").model
    assert found.families == families and network.multiple == 2 ** (len(widths) - 1)
    assert {key: value.shape for key, value in network.state_dict().items()} == {
        key: value.shape for key, value in shapes.items()
    }
    assert not network.training and not any(value.requires_grad for value in network.parameters())


def test_the_mini_familys_encoder_is_known_though_it_has_the_published_widths(folder):
    for command, families in (("python -m training transparency", ("Strata mini",)), ("", ("SDXL", "SD1.5"))):
        save_file(OffsetEncoder().state_dict(), folder / "encoder.safetensors", {"command": command})
        assert layer_files.load("encoder.safetensors", transparency.Transparency).families == families


def test_encoders_and_fluxs_pickle_of_both_are_known(folder):
    assert transparency.recognise("x", OffsetEncoder().state_dict()).families == ("SDXL", "SD1.5")
    assert transparency.recognise("x", OffsetEncoder((16, 32, 64, 96)).state_dict()).families == ("Strata mini",)
    parts = {
        "decoder": TransparentDecoder((8, 8, 16, 16), 1, 16),
        "encoder": OffsetEncoder((8, 8, 16, 16), 16),
        "sd_vae": torch.nn.Linear(2, 2),
    }
    torch.save(
        {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()},
        folder / "TransparentVAE.pth",
    )
    found = layer_files.load("TransparentVAE.pth", transparency.Transparency)
    assert (
        found.families == ("Flux",) and set(found.parts) == {"decoder", "encoder"} and not found.latent["alpha_first"]
    )


def test_the_family_that_this_pack_trains_is_known_from_the_trainers_own_state():
    from strata.networks.transparency import published_adapter

    module = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    shapes = {"A": (16, 64), "B": (64, 16)}
    state = {f"{module}.lora_{part}.default.weight": torch.zeros(shape) for part, shape in shapes.items()}
    assert transparency.recognise("x", published_adapter(state)).families == ("Strata mini",)
    assert mini_family.CONFIG["unet"]["model_channels"] == 64


def test_a_loader_offers_the_files_that_fit_it_and_those_that_do_not_tell(folder):
    def offered(kind):
        folder_paths.filename_list_cache.pop("layer_model", None)
        return layer_files.choices(kind)

    assert "layer_xl_transparent_attn.safetensors" in offered(transparency.Transparency), "where to get one"
    random_files.write(folder / "mine.safetensors", OffsetEncoder((16, 32, 64, 96)).state_dict())
    (folder / "damaged.safetensors").write_bytes(b"no weights")
    (folder / "pickle.pth").write_bytes(b"not looked into")
    for shipped in (mini_family.PACK / "models" / "layer_model").glob("*.safetensors"):
        (folder / shipped.name).symlink_to(shipped)
    pair = [f"strata_mini_transparent_{part}.safetensors" for part in ("attn", "decoder", "encoder")]
    flux = "strata_mini_flux_transparent.safetensors"
    assert offered(transparency.Transparency) == sorted(["mine.safetensors", "pickle.pth", flux, *pair])
    for kind, name in (
        (layer_files.LayerModules, layer_files.SHIPPED),
        (layer_files.Decomposer, layer_files.DECOMPOSER),
        (layer_files.BackToFront, layer_files.BACK_TO_FRONT),
    ):
        assert offered(kind) == sorted(["pickle.pth", name])
    assert layer_files.load("mine.safetensors", transparency.Transparency).describe() == "an encoder for Strata mini"


def test_a_file_that_has_changed_is_looked_into_again(folder):
    random_files.write(folder / "file.safetensors", OffsetEncoder((16, 32, 64, 96)).state_dict())
    assert "file.safetensors" in layer_files.choices(transparency.Transparency)
    random_files.write(folder / "file.safetensors", {layer_files.layer_modules.EMBEDDING: torch.zeros(3, 4)})
    assert "file.safetensors" not in layer_files.choices(transparency.Transparency)
    assert layer_files.choices(layer_files.LayerModules) == ["file.safetensors"]


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_what_cannot_be_used_is_said_in_one_sentence(folder, capsys):
    def refused(name):
        with pytest.raises(ValueError, match="^file: ") as raised:
            layer_files.load(name, transparency.Transparency)
        assert one_sentence(str(raised.value)), raised.value
        return str(raised.value)

    assert "https://huggingface.co/LayerDiffusion" in refused("layer_xl_fg2ble.safetensors") and str(folder) in refused(
        "layer_xl_fg2ble.safetensors"
    )
    assert "not there" in refused("nobody.safetensors")
    good = random_files.write(
        folder / "good.safetensors", random_files.adapter(transparency.structure("Strata mini"), rank=2)
    )
    (folder / "cut.safetensors").write_bytes(good.read_bytes()[:-500])
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 40)
    assert "damaged" in refused("cut.safetensors") and "damaged" in refused("noise.safetensors")
    torch.save({"a": Harmful()}, folder / "evil.pth")
    assert "damaged" in refused("evil.pth") and "run" not in capsys.readouterr().out
    half = random_files.adapter(transparency.structure("Strata mini"), rank=2)
    random_files.write(
        folder / "half.safetensors",
        {key: value for key, value in half.items() if not key.endswith("attn1.to_q.weight::lora::0")},
    )
    assert "incomplete" in refused("half.safetensors")
    random_files.write(folder / "other.safetensors", {"diffusion_model.joint_blocks.0.weight::diff::0": torch.zeros(2)})
    assert "another kind of model" in refused("other.safetensors")
    decoder = TransparentDecoder((8, 8, 16, 16), 1).state_dict()
    random_files.write(
        folder / "short.safetensors",
        {key: value for key, value in decoder.items() if not key.startswith("mid_block.resnets.1")},
    )
    assert "mid_block.resnets.1" in refused("short.safetensors")
    random_files.write(folder / "lora.safetensors", {"text_model.lora_up.weight": torch.zeros(2, 2)})
    assert "neither LayerDiffuse's" in refused("lora.safetensors")


def test_a_file_of_another_kind_is_named():
    found = transparency.recognise("vae.safetensors", OffsetEncoder((16, 32, 64, 96)).state_dict())
    with pytest.raises(ValueError, match="vae.safetensors is an encoder for Strata mini; this node needs a decoder"):
        found.part("decoder", "a decoder")


def test_weights_that_do_not_fit_are_refused_with_the_start_of_torchs_reason():
    network, weights = torch.nn.Linear(2, 2), {f"not_there_{number}": torch.zeros(1) for number in range(20)}
    with pytest.raises(RuntimeError) as reason:
        network.load_state_dict(weights)
    start = " ".join(str(reason.value).split())[:160]
    with pytest.raises(ValueError) as error:
        transparency.filled("x.safetensors", network, weights)
    assert len(start) == 160 and str(error.value) == (
        f"file: x.safetensors does not have the weights of Linear ({start} …); download it again."
    )
