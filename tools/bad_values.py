"""Every input of every node with bad values made from its schema: each must be refused in one sentence that names the
input, or give a sound result.

    python tools/host.py exec tools/bad_values.py             # all nodes, some minutes; part of `make test-full`
    python tools/host.py exec tools/bad_values.py "Set layer" # nodes whose name has these words

Good values come from the shipped mini family, so that a value that is let through is really used. What would end the
process (memory) or never end (60 s) is counted as a fault too. Exit status 1 when there is any.
"""

from __future__ import annotations

import math
import re
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import figures
import torch

SIDE, SECONDS, ROOM = 64, 60, 8 * 2**30
NAN, INFINITE = math.nan, math.inf
TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "x" * 100_000,
    "a\nb\n\nc",
    "1e999",
    "-1",
    "nan",
    "../../x",
    "%date:yyyy%",
    "💥",
    '"',
    ",,,",
    "0, 0",
    "1, 2, 3",
    "0.5, 0.5; 2, 2",
    "\u202eabc",
    "/etc/passwd",
    "a" * 300,
    "1-3",
    "3-1, 3",
    "True",
    "{}",
]
NO_TEXT = [None, 7, 1.5, True, b"x", ["a"], {"a": 1}]
NO_NUMBER = [
    None,
    "7",
    "",
    [1],
    {},
    NAN,
    INFINITE,
    -INFINITE,
    torch.tensor(1.0),
    10**400,
    -(10**400),
    1e308,
    -1e308,
    2**63,
    -(2**63),
    1 + 2j,
]
# (changed, named): two inputs that do not go together, of which the sentence names the one that is rather meant
RIGHTLY = {("steps", "start_percent"), ("steps", "harmonize_start")}


class TooLong(BaseException):
    pass


class Good:
    """A value for each type of socket with which every node runs."""

    def __init__(self):
        import comfy.sd
        import folder_paths
        from mini_models import MODELS, Family
        from strata.nodes import compositing, decompose, fusion, shared_layers, transparency

        for kind in ("checkpoints", "diffusion_models", "layer_model", "vae"):
            folder_paths.add_model_folder_path(kind, str(MODELS / kind))
        mini = Family()
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, SIDE, SIDE, 3, generator=generator)
        alpha = torch.cat([image, (image[..., :1] > 0.5).float()], -1)
        layer = {"image": image, "name": "ground", "blend_mode": "normal"}
        text = mini.text("an apple")
        inversion = compositing.InvertImage.execute(
            mini.model, mini.vae, image, text, "ddim", 2, "ddim_uniform", 3.0, 1, 0, "off"
        ).args[0]
        load = transparency.LoadTransparency.execute
        files = {
            kind: load(f"strata_mini_transparent_{kind}.safetensors").args[0] for kind in ("attn", "decoder", "encoder")
        }
        self.values = {
            "IMAGE": image,
            "MASK": (image[..., 0] > 0.5).float(),
            "IMAGE,MASK": image,
            "LATENT": {"samples": torch.zeros(1, 4, SIDE // 8, SIDE // 8)},
            "MODEL": mini.model,
            "CLIP": mini.clip,
            "VAE": mini.vae,
            "CONDITIONING": text,
            "INVERSION": inversion,
            "STRATA_PLANES": compositing.GuidancePlane.execute(inversion, -1, 1.0).args[0],
            "STRATA_TRANSPARENCY": files["attn"],
            "STRATA_LAYER_MODULES": shared_layers.LoadLayerModules.execute("strata_mini_dreamlayer.safetensors").args[
                0
            ],
            "STRATA_DECOMPOSER": decompose.LoadDecomposer.execute("strata_mini_layeringdiff.safetensors").args[0],
            "LAYERS": {
                "version": 1,
                "canvas": (SIDE, SIDE),
                "layers": [layer, {**layer, "image": alpha, "name": "thing"}],
            },
        }
        self.own = {  # by node and input, where the type's value does not do
            "Strata_DecodeTransparency": {
                "transparency": files["decoder"],
                "vae": mini.vae,
                "image": None,
                "passes": "1",
            },
            "Strata_EncodeTransparency": {"transparency": files["encoder"]},
            "Strata_AttentionBlend": {"transparency": files["attn"]},
            "Strata_LayerFusionSampler": {
                "positive": fusion.EncodeLayerPrompts.execute(mini.clip, "an apple", "a beach", "").args[0],
                "vae": transparency.LoadRGBAVAE.execute("strata_mini_rgba.safetensors").args[0],
            },
            "Strata_LayersSampler": {"decoder": files["decoder"]},
            "Strata_ImageToLayers": {"decoder": files["decoder"]},
            "Strata_LoadTransparency": {"file": "strata_mini_transparent_attn.safetensors"},
            "Strata_LoadLayerModules": {"file": "strata_mini_dreamlayer.safetensors"},
            "Strata_LoadDecomposer": {"file": "strata_mini_layeringdiff.safetensors"},
            "Strata_DecomposeImage": {
                "model": comfy.sd.load_diffusion_model(
                    str(MODELS / "diffusion_models" / "strata_mini_inpaint.safetensors")
                ),
            },
            "Strata_BackToFront": None,
            "Strata_SampleForeground": None,
            "Strata_RedrawLayer": None,
            "Strata_CompleteLayers": {"decomposer": None},
            "Strata_DetectForeground": None,
            "Strata_MatteForeground": {"mask": (torch.arange(SIDE) < SIDE // 2).float().expand(1, SIDE, SIDE)},
            "Strata_SetLayer": {"action": "append"},
            "Strata_EstimateDepth": None,
            "Strata_SampleJointLayers": None,
            "Strata_SampleAroundLayer": None,
            "Strata_LoadDepth": None,
            "Strata_LoadLayers": None,
            "Strata_LoadLayerImage": None,
            "Strata_SaveLayers": None,  # files, SD1.5 and Flux-Fill: tests/server and tests/patches have them
        }
        layered = shared_layers.LayerPrompts.execute(mini.clip, "a beach", "an apple").args[0]
        for name in ("Strata_LayersSampler", "Strata_ImageToLayers"):
            self.own[name] |= {
                "positive": layered,
                "model": shared_layers.SharedLayers.execute(mini.model, 1.0, 0.0, 1.0).args[0],
            }

    def of(self, node) -> dict | None:
        schema = node.define_schema()
        own = self.own.get(schema.node_id, {})
        if own is None:
            return None
        found = {}
        for one in schema.inputs:
            default = getattr(one, "default", None)
            if default is None and str(one.get_io_type()) == "COMBO":
                default = (one.options or [None])[-1]
            found[one.id] = own.get(
                one.id,
                self.values.get(str(one.get_io_type()), default) if not one.optional or default is None else default,
            )
            if one.id == "steps":
                found[one.id] = 2
        for name in (
            "region",
            "mask",
            "masks",
            "behind",
            "retained",
            "layer",
            "blended",
            "adapter",
            "modules",
            "background",
            "below",
        ):
            if name in found and name not in own and not isinstance(found[name], str):
                found[name] = None if any(one.id == name and one.optional for one in schema.inputs) else found[name]
        return found


def bad(one, good) -> Iterator:
    """At least 20 values for an input: of no type, beyond its range, and odd ones of its own type."""
    kind = str(one.get_io_type())
    if kind in ("INT", "FLOAT"):
        yield from NO_NUMBER
        # Ten thousand steps take their time, as asked for.
        for limit in (one.min, None if one.id == "steps" else one.max):
            yield from () if limit is None else (limit - 1, limit + 1, limit * 2 + 1, limit)
    elif kind == "STRING":
        yield from [*NO_TEXT, *TEXTS]
    elif kind in ("COMBO", "BOOLEAN"):
        yield from [*NO_TEXT[:2], 2, NAN, *TEXTS]
    else:
        yield from [None, 3, "a", [], {}, [None], {"samples": None}, torch.zeros(3), object()]
        yield from odd(kind, good)


def odd(kind: str, good) -> Iterator:
    if kind in ("IMAGE", "MASK", "IMAGE,MASK"):
        yield from (
            good * NAN,
            good * 255,
            (good * 255).byte(),
            good[:0],
            good[:, :0],
            good.double(),
            good.half(),
            good[:, :1],
            good[:, :, :1],
            good[:, :1, :1],
            good.repeat(3, *[1] * (good.ndim - 1)),
            good[:, ::2],
            good.transpose(1, 2),
            -good,
            good * INFINITE,
            good[0],
            good[None],
        )
        yield from (good[..., :1], torch.cat([good, good[..., :1]], -1)) if kind != "MASK" else ()
    elif kind == "LATENT":
        samples = good["samples"]
        for changed in (
            samples * NAN,
            samples[:0],
            samples[0],
            samples[:, :3],
            samples.repeat(1, 4, 1, 1),
            samples[..., :3, :],
            samples.half(),
            samples[:, :, None],
            samples.repeat(2, 1, 1, 1),
        ):
            yield {**good, "samples": changed}
        yield from (
            {**good, "noise_mask": mask}
            for mask in (torch.full((1, 64, 64), NAN), torch.ones(3, 8, 8), torch.zeros(1, 1, 64, 64), "no")
        )
        yield from ({**good, "batch_index": numbers} for numbers in ([], [0, 1], [5]))
    elif kind == "CONDITIONING":
        text, more = good[0]
        yield from (
            [[text * NAN, more]],
            [[text[..., :5], more]],
            [[text[0], more]],
            [[text, None]],
            [[text]],
            [[text[:0], more]],
            good * 2,
            [[text, {}]],
            [[text.repeat(1, 3, 1), more]],
            [[text, {**more, "pooled_output": None}]],
            [[text, {**more, "start_percent": 0.9}]],
            [[text, {**more, "area": (4, 4, 0, 0)}]],
        )
    elif kind == "LAYERS":
        layer = good["layers"][1]
        for field, values in {
            "image": (None, 1, layer["image"][0], layer["image"] * NAN, layer["image"][..., :2]),
            "x": (NAN, "1", 10**9, None),
            "w": (-5, 10**6),
            "opacity": (2, NAN, "1"),
            "blend_mode": ("odd", 3),
            "rotation": (INFINITE, "a", 0.3),
            "name": (3, "", "\0"),
            "mask": (1, layer["image"]),
            "z_index": ("a", NAN),
            "visible": (0, "no"),
            "type": ("text",),
            "strata": ([], 3),
        }.items():
            yield from ({**good, "layers": [good["layers"][0], {**layer, field: value}]} for value in values)
        yield from ({**good, "canvas": canvas} for canvas in (None, (0, 0), (NAN, 1), (10**6, 1), "a"))
        yield from (
            {**good, "layers": []},
            {**good, "version": 2},
            {**good, "layers": [3]},
            {**good, "layers": good["layers"] * 30},
        )


def sound(value) -> bool:
    """No NaN in anything that comes out. Depth may have them: there they mean missing."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(sound(one) for one in value.values())
    return all(sound(one) for one in value) if isinstance(value, list | tuple) else True


def outcome(node, values: dict, name: str) -> tuple[str, str]:
    """(what happened, the words)."""
    signal.alarm(SECONDS)
    try:
        with torch.inference_mode():
            found = node.execute(**values)
        return ("accepted", "") if sound(found.args) else ("silent NaN", "")
    except ValueError as error:
        text = str(error)
        if "\n" in text or not re.match(r"[\w, ]+: ", text):
            return "raw error", f"ValueError: {text[:200]}"
        named = text.split(":")[0]
        return (
            ("refused", "")
            if name in re.split(", | or ", named) or (name, named) in RIGHTLY
            else ("another input named", text[:200])
        )
    except TooLong:
        return "no end", ""
    except MemoryError:
        return "out of memory", ""
    except Exception as error:  # noqa: BLE001  whatever it is, it is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = "out of memory" if "allocate" in str(error) else "raw error"
        return kind, f"{type(error).__name__}: {str(error)[:160]} ({where.filename.rsplit('/', 2)[-1]}:{where.lineno})"
    finally:
        signal.alarm(0)


def ring(*_):
    raise TooLong


def main() -> int:
    figures.prepare()
    import comfy.utils
    from strata import nodes

    comfy.utils.PROGRESS_BAR_ENABLED = False
    good = Good()
    signal.signal(signal.SIGALRM, ring)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, resource.RLIM_INFINITY))
    counts, faults = Counter(), 0
    for node in (node for module in nodes.MODULES for node in module.NODES):
        schema, values = node.define_schema(), good.of(node)
        if values is None or not all(word.lower() in schema.display_name.lower() for word in sys.argv[1:]):
            continue
        what, words = outcome(node, values, "")
        if what != "accepted":
            print(f"{schema.display_name}: the good values are not taken: {what} {words}")
            faults += 1
            continue
        for one in schema.inputs:
            start = good.values.get(str(one.get_io_type()), values[one.id])
            for value in bad(one, values[one.id] if values[one.id] is not None else start):
                if value is None and one.optional:
                    continue
                what, words = outcome(node, {**values, one.id: value}, one.id)
                counts[what] += 1
                if what not in ("accepted", "refused"):
                    faults += 1
                    shown = (
                        f"{type(value).__name__}{list(value.shape)}"
                        if isinstance(value, torch.Tensor)
                        else repr(value)[:70]
                    )
                    print(f"{schema.display_name}, {one.id} = {shown}: {what}. {words}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.most_common()))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
