"""LayerFusion written out block by block in float64 with whole attention matrices, and small models of every family's
structure.
"""

import copy
from types import MethodType

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import numpy as np
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from strata.patches import mini_family

from . import random_family

# By this ComfyUI knows SD2 models of it.
V_PREDICTION = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])}
SHARED = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "dtype": torch.float32,
}
UNETS = {
    "mini": (mini_family.StrataMini, {**mini_family.UNET, "num_head_channels": -1}),
    "SD1.5": (
        comfy.supported_models.SD15,
        {
            "model_channels": 32,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "context_dim": 48,
            "num_heads": 8,
        },
    ),
    "SD2": (
        comfy.supported_models.SD20,
        {
            "model_channels": 64,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "context_dim": 48,
            "num_head_channels": 64,
            "num_heads": -1,
            "use_linear_in_transformer": True,
        },
    ),
    "SDXL": (
        comfy.supported_models.SDXL,
        {
            "model_channels": 32,
            "channel_mult": [1, 2, 4],
            "num_res_blocks": [2, 2, 2],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "context_dim": 48,
            "num_head_channels": 16,
            "num_heads": -1,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
    ),
}


def patcher(kind: str, **changes):
    """A small random model of that family's structure in a ModelPatcher, as a loader node returns it."""
    family, shape = UNETS[kind]
    config = family({**SHARED, **shape, **changes})
    config.unet_config["dtype"] = torch.float32
    config.manual_cast_dtype = None
    torch.manual_seed(7)
    model = config.get_model(V_PREDICTION, "", "cpu")
    model.diffusion_model.load_state_dict(random_family.randomised(model.diffusion_model))
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))


def minmax(values):
    return (values - values.amin(1, keepdim=True)) / (values.amax(1, keepdim=True) - values.amin(1, keepdim=True))


def level_between(soft):
    """[B,1]: for each row halfway between the means of the two parts, cut by a value, that vary least within
    themselves.
    """
    found = []
    for row in soft.numpy():
        parts = [(row[row <= cut], row[row > cut]) for cut in np.sort(row)[:-1]]
        low, high = min(parts, key=lambda pair: sum(part.var() * len(part) for part in pair))
        found.append([(low.mean() + high.mean()) / 2])
    return torch.tensor(np.array(found))


def attention(module, x, context):
    """(output after the projection and, where there is one, `after`; probabilities [B,H,M,T])."""
    heads = module.heads
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (module.to_q(x), module.to_k(context), module.to_v(context)))
    probabilities = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1]), -1)
    out = module.to_out(torch.einsum("bhij,bjhd->bihd", probabilities, v).flatten(-2))
    return out + module.after(x + out) if hasattr(module, "after") else out, probabilities


class Reference:
    """unet: the model; foreground: the same with the foreground's weights. Both are copied; call prior, then
    conditional, then other.

    structure_at: number from the end of the block that shows the structure.
    """

    def __init__(
        self, unet, foreground, ends, boundary=10.0, own_prompt=False, structure_at=1, wide=False, priors="both"
    ):
        self.unet, self.foreground = copy.deepcopy(unet).double(), copy.deepcopy(foreground).double()
        self.ends, self.boundary, self.own_prompt, self.wide, self.masks = ends, boundary, own_prompt, wide, {}
        self.priors = priors
        pairs = [
            [m for m in model.modules() if isinstance(m, BasicTransformerBlock)]
            for model in (self.unet, self.foreground)
        ]
        for number, (block, twin) in enumerate(zip(*pairs, strict=True)):
            block.number, block.twins = number, [twin]  # in a list, so that it is no submodule
            twin.shows_structure = number == len(pairs[0]) - structure_at
            block.forward = MethodType(
                lambda block, x, context=None, transformer_options=None: self.blend(block, x, context), block
            )
            twin.forward = MethodType(
                lambda twin, x, context=None, transformer_options=None: self.plain(twin, x, context), twin
            )
        for unet_copy in (self.unet, self.foreground):  # the host keeps timestep embeddings in the dtype of the weights
            unet_copy.dtype = torch.float64

    def prior(self, x, *args, **kwargs):
        self.foreground(x[::3], *args, **kwargs)

    def plain(self, block, x, context):
        normed = block.norm1(x)
        out, probabilities = attention(block.attn1, normed, normed)
        if block.shows_structure:
            m = probabilities.mean(1)
            self.structure = 1 - minmax(1 / m.square().sum(-1)), m.shape[1]
        x = x + out
        x = x + attention(block.attn2, block.norm2(x), context)[0]
        return x + block.ff(block.norm3(x))

    def masks_of(self, block, key, foreground, context):
        if self.conditional:
            twin = block.twins[0]
            content = attention(twin.attn2, twin.norm2(foreground), context[::3])[1][..., self.ends].sum(-1).mean(1)
            prior, count = self.structure
            # Square pictures here: the prior is averaged over each token's area.
            side, small = int(np.sqrt(count)), int(np.sqrt(foreground.shape[1]))
            factor = side // small
            prior = prior.view(-1, small, factor, small, factor).mean((2, 4)).flatten(1)
            soft = minmax({"both": prior * content, "structure alone": prior, "content alone": content}[self.priors])
            hard, wide = (
                1 / (1 + torch.exp(-self.boundary * (soft - middle))) for middle in (0.5, level_between(soft))
            )
            self.masks[key] = soft, hard, wide
        return (mask[..., None] for mask in self.masks[key])

    def blend(self, block, x, context):
        twin = block.twins[0]
        for name, norm in (("attn1", block.norm1), ("attn2", block.norm2)):
            soft, hard, wide = self.masks_of(block, (name, block.number), x[::3], context)
            fg, bg, bl = (norm(x)[i::3] for i in range(3))
            if name == "attn1":
                joint = torch.cat([bg, bl], 1)
                keys = fg, joint, joint
            else:
                keys = context[0::3], context[1::3], context[2::3] if self.own_prompt else context[1::3]
            modules = getattr(twin, name), getattr(block, name), getattr(block, name)
            a_fg, a_bg, a_bl = (
                attention(module, h, key)[0] for module, h, key in zip(modules, (fg, bg, bl), keys, strict=True)
            )
            mixed, entered = (a_fg * mask + a_bl * (1 - mask) for mask in (soft, wide if self.wide else soft))
            a_fg, a_bl = mixed * hard + a_fg * (1 - hard), entered
            x = x + torch.stack([a_fg, a_bg, a_bl], 1).flatten(0, 1)
        return x + block.ff(block.norm3(x))

    def __call__(self, x, *args, conditional=True, **kwargs):
        self.conditional = conditional
        return self.unet(x, *args, **kwargs)
