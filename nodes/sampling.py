"""The inputs that nodes with a sampler of their own have, as KSampler has them."""

import comfy.samplers
from comfy_api.latest import io

from ..patches.harmonize import level


def seed_input(tooltip: str):
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def sampler_input(default: str, tooltip: str):
    return io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default=default, tooltip=tooltip)


def scheduler_input(default: str, tooltip: str):
    return io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default=default, tooltip=tooltip)


def steps_input(tooltip: str):
    return io.Int.Input("steps", default=20, min=1, max=10000, tooltip=tooltip)


def cfg_input(default: float, tooltip: str):
    return io.Float.Input("cfg", default=default, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def sampling_inputs() -> list:
    """negative to denoise, in KSampler's order."""
    return [
        io.Conditioning.Input("negative", tooltip="What no image should show, from an ordinary text encoding."),
        io.Latent.Input(
            "latent_image",
            tooltip="Size and number of the results, from Empty Latent Image, or with denoise below 1 an "
            "image to start all of them from. Each takes memory for every output.",
        ),
        seed_input("The same seed gives the same images."),
        steps_input("Number of steps."),
        cfg_input(7.0, "How closely the prompts are followed."),
        sampler_input("euler", "The sampler, as in KSampler."),
        scheduler_input("normal", "Noise levels, as in KSampler."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 starts from noise alone, less from the latent.",
        ),
    ]


def end_below_start(
    start: float, end: float, what: str, sockets: tuple[str, str] = ("start_percent", "end_percent")
) -> list[str]:
    """A note for a range of the sampling that is empty, and what that means."""
    if start < end:
        return []
    return [f"{sockets[1]}: {end:g} is not above {sockets[0]}, {start:g}, so {what}; raise it."]


def noise_inputs(prefix: str = "", percents: tuple[str, str] = ("start_percent", "end_percent")) -> list:
    """start_noise and end_noise of harmonising, which take the places of two percents of the sampling."""
    what = (
        "How much of the image is noise at the start: 0.7 is seven parts of noise to three of image, and 0.4 of the "
        "sampling with SD1.5 and SDXL.",
        "How much of the image is noise when the layers are put back for the last time: 0.54 is 0.6 of the sampling "
        "with SD1.5 and SDXL.",
    )
    return [
        io.Float.Input(
            f"{prefix}{end}_noise",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip=f"{text} It means the same with every model, which {percent} does not. 0 goes by {percent}.",
        )
        for end, percent, text in zip(("start", "end"), percents, what, strict=True)
    ]


def never_put_back(
    model,
    sockets: tuple[str, str, str],
    start_percent: float,
    end_percent: float,
    start_noise: float = 0.0,
    end_noise: float = 0.0,
) -> list[str]:
    """A note when harmonising puts the layers back at no noise level. sockets: of the percents and of end_noise."""
    what = "the layers are never put back"
    if start_noise == end_noise == 0:
        return end_below_start(start_percent, end_percent, what, sockets[:2])
    if level(model, end_percent, end_noise) < level(model, start_percent, start_noise):
        return []
    return [f"{sockets[2 if end_noise else 1]}: there is no less noise then than at the start, so {what}; end later."]
