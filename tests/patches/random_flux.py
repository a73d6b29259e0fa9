"""The mini Flux-Fill's structure and BFS's files for it, with random weights."""

import torch
from strata.networks import back_to_front as networks
from strata.networks import flux
from strata.patches import mini_family

SHAPE = mini_family.CONFIG["flux"]
WIDTH, HEADS, RANK = SHAPE["hidden_size"], SHAPE["num_heads"], 3
LAYOUTS = {
    "paper": ({"single": range(SHAPE["depth_single_blocks"])}, True),
    "released": ({"double": range(SHAPE["depth"]), "single": range(SHAPE["depth_single_blocks"])}, False),
    "released, fused": ({"double": range(SHAPE["depth"]), "single": range(1, 3)}, True),
}


def random_file(
    layout: str,
    own: bool = False,
    mixed: bool = True,
    width: int = WIDTH,
    rank: int = RANK,
    blocks: dict[str, range] | None = None,
) -> dict[str, torch.Tensor]:
    """As released. own: with what each branch learnt for itself. mixed: the last layers are not zero. blocks: of
    another Flux than the mini one, by kind.
    """
    draw = torch.Generator().manual_seed(3)
    mini, fused = LAYOUTS[layout]
    blocks = blocks or mini
    weights = {}
    for kind, numbers in blocks.items():
        for number in numbers:
            block = f"{networks.BLOCKS[kind]}.{number}"
            for layer in (*networks.PROJECTIONS, *([networks.OUT] if kind == "double" else [])):
                for source in networks.SOURCES:
                    for part, shape in (("A", (rank, width)), ("B", (width, rank))):
                        key = f"{block}.attn1n.{layer}.lora_{part}.{source}.weight"
                        weights[key] = 0.2 * torch.randn(shape, generator=draw)
            both = width * (1 + fused)
            weights[f"{block}.conv1n.weight"] = mixed * torch.randn(both, both, generator=draw) / both**0.5
    for branch in networks.CONTENT if own else ():
        for layer, rows, columns in (
            ("transformer_blocks.0.attn.to_k", WIDTH, WIDTH),
            ("transformer_blocks.1.attn.add_v_proj", WIDTH, WIDTH),
            ("transformer_blocks.1.ff.net.2", WIDTH, 4 * WIDTH),
            ("single_transformer_blocks.2.attn.to_v", WIDTH, WIDTH),
            ("single_transformer_blocks.2.proj_mlp", 4 * WIDTH, WIDTH),
            ("single_transformer_blocks.3.attn.to_q", WIDTH, WIDTH),
            ("single_transformer_blocks.4.proj_mlp", 4 * WIDTH, WIDTH),
            ("single_transformer_blocks.5.proj_out", WIDTH, 5 * WIDTH),
        ):
            weights[f"{layer}.lora_A.{branch}.weight"] = 0.2 * torch.randn(RANK, columns, generator=draw)
            weights[f"{layer}.lora_B.{branch}.weight"] = 0.2 * torch.randn(rows, RANK, generator=draw)
    return weights


def randomised_flux() -> torch.nn.Module:
    """diffusers' class, random everywhere, also where a fresh model starts at zero."""
    model = flux.build(SHAPE).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 or not weight.any():
                weight.normal_(std=0.06)
    return model
