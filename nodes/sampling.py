"""The inputs that nodes with a sampler of their own have, as KSampler has them."""

import comfy.samplers
from comfy_api.latest import io


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
