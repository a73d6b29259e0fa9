"""How much memory layers on a transformer take beside a plain batch, at the published width and 1024 pixels: counted on
the meta device, where nothing is computed.
"""

import math
from functools import partial

import comfy.ops
import pytest
import torch
from comfy.ldm.flux.model import Flux
from strata.patches import fusion, joint_attention, shared_layers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

WIDE = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 3,
    "depth_single_blocks": 3,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside take at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return found


def kernel(func, q, k, v, heads, *args, **kwargs):
    """What an attention kernel allocates: its result."""
    return torch.empty(q.shape[0], q.shape[2], heads * q.shape[3], dtype=q.dtype, device=q.device)


def peak(network, rows, act=None, phase="conditional"):
    options = {
        "cond_or_uncond": [0],
        "uuids": [0],
        "sigmas": torch.ones(1),
        joint_attention.OVERRIDE: kernel,
        joint_attention.KEY: joint_attention.Run({}),
    }
    x = torch.empty(rows, 16, 128, 128, dtype=torch.bfloat16, device="meta")
    context = torch.empty(rows, 256, 4096, dtype=torch.bfloat16, device="meta")
    y = torch.empty(rows, 768, dtype=torch.bfloat16, device="meta")
    times = torch.empty(rows, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), Peak() as counted:
        if act is None:
            network(x, times, context, y, transformer_options=options)
        else:
            with joint_attention.hooked(network, x, context, options, partial(act, options)) as hooked:
                network(x, times, context, y, transformer_options=hooked)
    return counted.most


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        return Flux("flux", dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init, **WIDE)


@pytest.mark.parametrize("layers", [3, 5])
def test_layers_take_at_most_what_is_asked_for(network, layers):
    """joint_attention.MEMORY of a plain batch, with maps, mixing and sharing."""
    run = shared_layers.Run([[1, 2], *([3 + n] for n in range(layers - 2))], 256)
    maps = list(joint_attention.family_of(network).maps(network))

    def act(options, *args):
        call.shares = call.shares[-len(maps) :]
        return shared_layers._attend_joint(call, options, *args)

    call = shared_layers.Call(run, 1.0, 1.0, maps, 0)
    ratio = peak(network, layers, act) / peak(network, layers)
    assert run.maps.shape == (1, layers - 2, 64, 64)
    assert 1 < ratio < joint_attention.MEMORY


def test_blending_takes_at_most_what_is_asked_for(network):
    run = fusion.Run([1, 2, 3])
    run.structure = torch.empty(1, 64 * 64, device="meta"), (64, 64)
    call = fusion.Call(fusion.Settings(), run, "conditional", 5)

    def act(options, *args):
        return fusion._attend_joint(call, options, *args)

    ratio = peak(network, 3, act) / peak(network, 3)
    assert len(run.masks) == 6 and math.isfinite(ratio)
    assert 1 < ratio < joint_attention.MEMORY
