"""What takes a graphics card to find out, in one go and under eight minutes: the tests of techniques and patches with
the card as their device, and models of published width with random weights at 1024×1024, with times and peak memory.

    python tools/host.py exec tools/gpu.py          # make gpu; on a machine without CUDA it says so and ends with 2
    python tools/host.py exec tools/gpu.py --small  # the same code at reduced width, on the processor

It needs neither models/ nor docs/. STRATA_DEVICE does not matter to it.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import host
import torch

TESTS = host.PACK / "tests"
sys.path.insert(0, str(TESTS))
import conftest  # noqa: E402, F401  makes the pack importable as strata

GIB = 2**30
STEPS = 4
ADAPTER_RANK, PAIR_RANK = 256, 64
SECONDS = 200  # for the tests, at most
PATCHES = (  # tests that compute where ComfyUI does, and compare on the processor
    "fusion",
    "gradients",
    "inversion",
    "joint_blending",
    "joint_layers",
    "joint_memory",
    "layer_modules",
    "layer_rows",
    "layerfusion_families",
    "shared_layers",
)
SMALL_TESTS = ("techniques/test_diffusion.py", "patches/test_layer_rows.py")


def load(small: bool) -> None:
    """ComfyUI as a library in this process."""
    sys.path.insert(0, str(host.find_or_install().root))
    from comfy.cli_args import args

    args.cpu = small


def run_tests(small: bool) -> None:
    """Pytest's last lines: those that fail, and how many passed."""
    files = SMALL_TESTS if small else ("techniques", *(f"patches/test_{name}.py" for name in PATCHES))
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "STRATA_TEST_DEVICE": "cpu" if small else "cuda"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "on_card"]
    command += [] if small else ["-n", "4", "--dist", "loadfile"]
    try:
        done = subprocess.run(
            [*command, *(f"tests/{name}" for name in files)],
            cwd=host.PACK,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        print(f"The tests took longer than {SECONDS} s and were stopped.", flush=True)
        return
    lines = done.stdout.strip().splitlines()
    print("\n".join([line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:]), flush=True)


def network(family, shape: dict, dtype: torch.dtype):
    """A model of this structure with random weights that keep a signal's size, in a ModelPatcher, on the card."""
    import comfy.model_management
    import comfy.model_patcher

    config = family({**shape, "dtype": dtype})
    config.manual_cast_dtype = None
    device = comfy.model_management.get_torch_device()
    torch.manual_seed(0)
    model = config.get_model({}, "", device).eval().requires_grad_(False)
    for name, weight in model.diffusion_model.named_parameters():
        norm = weight.ndim == 1 and not name.endswith("bias")
        torch.nn.init.normal_(weight, float(norm), 0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5)
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())


def sdxl(small: bool):
    from patches import fusion_reference

    family, shape = fusion_reference.UNETS["SDXL"]
    published = {"model_channels": 320, "context_dim": 2048, "num_head_channels": 64}
    dtype = torch.float32 if small else torch.float16
    return network(family, {**fusion_reference.SHARED, **shape, **({} if small else published)}, dtype)


def flux(small: bool, fill: bool = False):
    """(model, its blocks in words). On a card that is too small for all of Flux, as many blocks of each kind as fit."""
    import comfy.supported_models

    from patches import small_transformers

    family = comfy.supported_models.FluxInpaint if fill else comfy.supported_models.Flux
    published = {"hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56], "mlp_ratio": 4.0}
    published |= {"context_in_dim": 4096, "vec_in_dim": 768, "depth": 19, "depth_single_blocks": 38}
    if not small:
        share = min(1.0, (torch.cuda.get_device_properties(0).total_memory / GIB - 10) / 23)
        published |= {key: max(3, int(share * published[key])) for key in ("depth", "depth_single_blocks")}
    shape = {**small_transformers.FLUX, **({} if small else published), **({"in_channels": 96} if fill else {})}
    made = network(family, shape, torch.float32 if small else torch.bfloat16)
    return made, f"{shape['depth']} double and {shape['depth_single_blocks']} single blocks"


def text(model, rows: int, tokens: int, **extra) -> list:
    """A random conditioning for the model."""
    config = model.model.model_config.unet_config
    width, pooled = config.get("context_in_dim", config.get("context_dim")), config.get("vec_in_dim", 1280)
    return [[torch.randn(rows, tokens, width), {"pooled_output": torch.randn(rows, pooled), **extra}]]


def latent(model, side: int, rows: int = 1) -> torch.Tensor:
    return torch.zeros(rows, model.model.latent_format.latent_channels, side // 8, side // 8)


def stock(model, side: int, rows: int, cfg: float, tokens: int, **extra) -> Callable[[int], torch.Tensor]:
    """As many rows by ComfyUI's own sampler."""
    import comfy.sample

    empty, positive, negative = latent(model, side, rows), text(model, rows, tokens, **extra), text(model, 1, tokens)

    def sample(steps: int) -> torch.Tensor:
        noise, names = comfy.sample.prepare_noise(empty, 1), ("euler", "simple")
        return comfy.sample.sample(
            model, noise, steps, cfg, *names, positive, negative, empty, disable_pbar=True, seed=1
        )

    return sample


def layerfusion(model, side: int, cfg: float, tokens: int, transparency=None) -> Callable[[int], torch.Tensor]:
    from strata.nodes.fusion import BLENDED_TEXT, NOISE, STRUCTURE, AttentionBlend, LayerFusionSampler
    from strata.patches.layer_prompts import END_TOKENS

    blend = AttentionBlend.execute(model, 1.0, 10.0, 0.0, 1.0, "all", STRUCTURE[0], BLENDED_TEXT[0], transparency).args[
        0
    ]
    given = {"positive": text(model, 3, tokens, **{END_TOKENS: [4]}), "negative": text(model, 1, tokens)}
    given |= {"latent_image": {"samples": latent(model, side)}, "seed": 1, "cfg": cfg, "denoise": 1.0}
    given |= {"sampler_name": "euler", "scheduler": "simple", "noise": next(iter(NOISE))}
    return lambda steps: LayerFusionSampler.execute(blend, steps=steps, **given).args[2]["samples"]


def runs_sdxl(small: bool, side: int) -> Iterator[tuple[str, Callable[[int], torch.Tensor]]]:
    from strata.patches import transparency

    from patches import random_transparency

    model, tokens = sdxl(small), 77
    yield "SDXL, a plain batch of three", stock(model, side, 3, 6.0, tokens)
    shapes = {name: tuple(one.shape) for name, one in model.model.state_dict().items() if "diffusion_model" in name}
    weights = random_transparency.adapter(shapes, rank=4 if small else ADAPTER_RANK, scale=0.02)
    adapter = transparency.recognise("adapter", weights)
    yield "SDXL, LayerFusion with an adapter", layerfusion(model, side, 6.0, tokens, adapter)
    for checkpointing in (False, True):
        title = f"SDXL, a step of FeatGLaC, 5 iterations, two scenes{', checkpointing' * checkpointing}"
        yield title, guided(model, side, checkpointing)


def guided(model, side: int, checkpointing: bool) -> Callable[[int], torch.Tensor]:
    """Guided steps at the noise level in the middle."""
    import comfy.samplers
    from strata.patches.feature_guidance import Plane, Planes, Settings, guider
    from strata.patches.inversion import Inversion

    sampling = model.get_model_object("model_sampling")
    sigma = torch.as_tensor(sampling.percent_to_sigma(0.5)).reshape(1)
    empty, half = latent(model, side), torch.zeros(side, side)
    half[side // 2 :] = 1
    scenes = [Inversion(torch.randn_like(empty)[None] * sigma, sigma, text(model, 1, 77), "ddim") for _ in range(2)]
    planes = Planes((Plane(scenes[0]), Plane(scenes[1], half)))
    settings = Settings(step_size=1e-4, start="given latent", end_percent=1.0, checkpointing=checkpointing)
    positive, negative = text(model, 1, 77), text(model, 1, 77)

    def sample(steps: int) -> torch.Tensor:
        found = empty
        for _ in range(steps):
            made = guider(model, positive, negative, 7.5, planes, settings)
            found = made.sample(
                torch.randn_like(empty),
                empty,
                comfy.samplers.sampler_object("euler"),
                torch.cat([sigma, sigma / 2]),
                disable_pbar=True,
            )
        return found

    return sample


def runs_flux(small: bool, side: int) -> Iterator[tuple[str, Callable[[int], torch.Tensor]]]:
    (model, blocks), tokens = flux(small), 7 if small else 256
    yield f"Flux, {blocks}, a plain batch of three", stock(model, side, 3, 1.0, tokens)
    yield f"Flux, {blocks}, LayerFusion", layerfusion(model, side, 1.0, tokens)


def runs_pairs(small: bool, side: int) -> Iterator[tuple[str, Callable[[int], torch.Tensor]]]:
    import comfy.ops
    from strata.networks import back_to_front as networks
    from strata.patches import back_to_front

    from patches import random_flux

    (model, blocks), tokens = flux(small, fill=True), 7 if small else 256
    given = {"concat_latent_image": latent(model, side), "concat_mask": torch.ones(1, 1, side, side)}
    yield f"Flux-Fill, {blocks}, a plain batch of two", stock(model, side, 2, 1.0, tokens, **given)
    unet = model.model.diffusion_model
    counts = {"double": range(len(unet.double_blocks)), "single": range(len(unet.single_blocks))}
    rank = 4 if small else PAIR_RANK
    weights = random_flux.random_file("released", width=unet.hidden_size, rank=rank, blocks=counts)
    dtype = unet.dtype
    file = networks.recognise("bfs", {key: one.to(dtype) for key, one in weights.items()}, {}, comfy.ops.manual_cast)
    coupled = back_to_front.apply(model, file)
    sampling = {"seed": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    positive, negative = text(model, 1, tokens, **given), text(model, 1, tokens, **given)

    def sample(steps: int) -> torch.Tensor:
        empty, noise = {"samples": latent(model, side)}, next(iter(back_to_front.NOISE))
        return back_to_front.sample(coupled, positive, negative, latent=empty, noise=noise, steps=steps, **sampling)[1][
            "samples"
        ]

    yield f"Flux-Fill, {blocks}, BFS pairs", sample


def measure(small: bool, side: int) -> bool:
    """The table of all runs; False where one failed. The first step of each, which loads, is not counted."""
    print("| run | seconds a step | peak memory, GiB |\n|---|---|---|", flush=True)
    fine = True
    for runs in (runs_sdxl, runs_flux, runs_pairs):
        made = runs(small, side)
        while True:
            try:
                title, sample = next(made)
            except StopIteration:
                break
            except Exception:
                traceback.print_exc()
                fine = False
                break
            fine &= print_row(title, sample, small)
        del made
        free()
    return fine


@torch.inference_mode()
def print_row(title: str, sample: Callable[[int], torch.Tensor], small: bool) -> bool:
    try:
        sample(1)
        if not small:
            torch.cuda.reset_peak_memory_stats()
        steps = 1 if small else STEPS
        start = time.perf_counter()
        found = sample(steps).cpu()  # waits for the card
        seconds = (time.perf_counter() - start) / steps
    except Exception:
        traceback.print_exc()
        return False
    memory = "" if small else f"{torch.cuda.max_memory_allocated() / GIB:.1f}"
    print(f"| {title} | {seconds:.2f} | {memory} |", flush=True)
    if not found.isfinite().all():
        print(f"{title}: the result is not finite.", flush=True)
    return bool(found.isfinite().all())


def free() -> None:
    """The card is empty for the next model."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="reduced widths on the processor")
    parser.add_argument("--part", choices=("tests", "runs"), help="one part alone")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        print(
            "error: PyTorch finds no CUDA card here; run it where there is one, or with --small on the processor.",
            file=sys.stderr,
        )
        return 2
    name = "the processor, reduced widths" if options.small else torch.cuda.get_device_name(0)
    print(f"{name}, PyTorch {torch.__version__}, ComfyUI {host.find_or_install().version}", flush=True)
    if options.part != "runs":
        run_tests(options.small)
    if options.part == "tests":
        return 0
    load(options.small)
    return 0 if measure(options.small, 64 if options.small else 1024) else 1


if __name__ == "__main__":
    sys.exit(main())
