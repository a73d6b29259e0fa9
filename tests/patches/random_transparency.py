"""LayerDiffuse's files with random weights, put together key by key from what is published about them, not from the
code that reads them.
"""

import torch
from safetensors.torch import save_file

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def seeded(*shape, scale=None):
    return torch.randn(*shape) * (
        scale or (shape[-1] if len(shape) == 2 else max(1, torch.Size(shape[1:]).numel())) ** -0.5
    )


def adapter(weights, rank=8, lora=PROJECTIONS, diff=(), extra=0, scale=None):
    """weights: {key: shape} of a UNet. Low-rank terms on its attentions, differences where a key has one of `diff` in
    it; half precision as published.
    """
    found = {}
    for key, shape in weights.items():
        if any(key.endswith(f".{name}.weight") and ".attn" in key for name in lora):
            found[f"{key}::lora::0"], found[f"{key}::lora::1"] = (
                seeded(shape[0], rank, scale=scale),
                seeded(rank, shape[1], scale=scale),
            )
        elif any(part in key for part in diff):
            found[f"{key}::diff::0"] = seeded(*shape, scale=0.02)
    if extra:
        shape = list(weights[FIRST])
        shape[1] += extra
        found[f"{FIRST}::diff::0"] = seeded(*shape, scale=0.05)
    return {key: value.half() for key, value in found.items()}


FIRST = "diffusion_model.input_blocks.0.0.weight"


def sharing(widths, frames, rank=4, control=0):
    """widths: (query, context, inner) of each attention, the middle block's last."""
    found = {}

    def linear(name, outputs, inputs, bias=True):
        found[f"{name}.weight"] = seeded(outputs, inputs)
        if bias:
            found[f"{name}.bias"] = torch.randn(outputs) * 0.1

    def conv(name, outputs, inputs, side):
        found[f"{name}.weight"], found[f"{name}.bias"] = seeded(outputs, inputs, side, side), torch.randn(outputs) * 0.1

    for index, (query, context, inner) in enumerate(widths):
        prefix = f"hookers.layers.{index}"
        for name, inputs, outputs in (
            ("to_q", query, inner),
            ("to_k", context, inner),
            ("to_v", context, inner),
            ("to_out", inner, query),
        ):
            for frame in range(frames):
                linear(f"{prefix}.{name}_lora.{frame}.down", rank, inputs, bias=False)
                linear(f"{prefix}.{name}_lora.{frame}.up", outputs, rank, bias=False)
        for name in "iqkvo":
            linear(f"{prefix}.temporal_{name}", inner, inner)
        found[f"{prefix}.temporal_n.weight"], found[f"{prefix}.temporal_n.bias"] = (
            torch.rand(inner) + 0.5,
            torch.randn(inner) * 0.1,
        )
        for frame in range(frames if control else 0):
            conv(f"{prefix}.control_convs.{frame}.0", control, control, 3)
            conv(f"{prefix}.control_convs.{frame}.2", inner, control, 1)
    if control:
        eighth = control // 8
        steps = [3, eighth, eighth, 2 * eighth, 2 * eighth, 4 * eighth, 4 * eighth, control, control]
        first = list(zip(steps, steps[1:], strict=False))
        for block, convs in enumerate([first, *[[(control, control)] * 2] * 3]):
            for index, (inputs, outputs) in enumerate(convs):
                conv(f"kwargs_encoder.blocks_{block}.{2 * index}", outputs, inputs, 3)
    return found


def flux_lora(width=32, blocks=2, alpha=None):
    """(a layer LoRA in diffusers' names, as published; of each of its layers ComfyUI's weight that it is a part of, and
    the first row): to_q, to_k and to_v are thirds of one weight, and a single block's are the first of linear1.
    """
    weights, expected = {}, {}
    for block in range(blocks):
        for name, place, start in (
            ("attn.to_q", "img_attn.qkv", 0),
            ("attn.to_k", "img_attn.qkv", 1),
            ("attn.to_v", "img_attn.qkv", 2),
            ("attn.to_out.0", "img_attn.proj", 0),
            ("attn.add_k_proj", "txt_attn.qkv", 1),
        ):
            expected[f"transformer.transformer_blocks.{block}.{name}"] = (
                f"diffusion_model.double_blocks.{block}.{place}.weight",
                start * width,
            )
        for index, name in enumerate(("to_q", "to_k", "to_v")):
            expected[f"transformer.single_transformer_blocks.{block}.attn.{name}"] = (
                f"diffusion_model.single_blocks.{block}.linear1.weight",
                index * width,
            )
    for name in expected:
        weights[f"{name}.lora_B.weight"] = torch.randn(width, 4) * 0.1
        weights[f"{name}.lora_A.weight"] = torch.randn(4, width)
        if alpha is not None:
            weights[f"{name}.alpha"] = torch.tensor(alpha)
    return weights, expected


def network(module):
    """Weights of a network, random, at a size that keeps a signal between zero and one busy."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    return {key: value.clone() for key, value in module.state_dict().items()}


def write(path, weights):
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return path
