"""LayerFusion from the model to the layers, through the pack's nodes, on the whole structure of SD1.5, SD2 and SDXL at
reduced width.
"""

import comfy.sd
import pytest
import torch
from strata.networks.transparency import TransparentDecoder
from strata.nodes.fusion import BLENDED_TEXT, NOISE, STRUCTURE, AttentionBlend, LayerFusionSampler
from strata.nodes.transparency import DecodeTransparency
from strata.patches import transparency
from strata.techniques.compositing import flatten
from strata.techniques.layers import read_layers

from . import fusion_reference, random_family, random_transparency
from .sampling_helpers import conditioning, layered
from .small_models import file_for

HEIGHT, WIDTH = 64, 128


@pytest.mark.parametrize(("kind", "tokens"), [("SD1.5", (8, 16)), ("SD2", (8, 16)), ("SDXL", (4, 8))])
def test_from_the_model_to_the_layers(kind, tokens):
    """tokens: rows and columns of the structure prior's layer."""
    model = fusion_reference.patcher(kind)
    vae = comfy.sd.VAE(sd=random_family.autoencoder())
    decoder = transparency.recognise("decoder", random_transparency.network(TransparentDecoder((8, 8, 16, 16), 1)))
    sampling = {
        "negative": conditioning(model, 2, rows=1),
        "latent_image": {"samples": torch.zeros(2, 4, HEIGHT // 8, WIDTH // 8)},
        "seed": 1,
        "steps": 2,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "noise": next(iter(NOISE)),
    }

    def sampled(adapter):
        blend = AttentionBlend.execute(
            model, 1.0, 10.0, 0.0, 1.0, "all", STRUCTURE[0], BLENDED_TEXT[0], adapter
        ).result[0]
        return LayerFusionSampler.execute(blend, layered(model), **sampling).result

    with torch.inference_mode():
        front, back, both, priors = sampled(file_for(kind, model))[:4]
        background = vae.decode(back["samples"])
        rgba, mask, documents, composite = DecodeTransparency.execute(
            front, "8", 0, decoder, vae=vae, background=background
        ).result
        plain = sampled(None)[0]
    over = rgba[..., 3:] * rgba[..., :3] + (1 - rgba[..., 3:]) * background
    assert torch.allclose(composite, over, rtol=0, atol=1e-4)
    assert priors.shape == (2 * 2, 4 * tokens[0], 4 * 4 * tokens[1], 3) and priors.std() > 0.1
    assert all(
        one["samples"].shape == (2, 4, HEIGHT // 8, WIDTH // 8) and one["samples"].isfinite().all()
        for one in (front, back, both)
    )
    assert (
        min(
            (one["samples"] - other["samples"]).abs().mean()
            for one, other in ((front, back), (back, both), (front, both))
        )
        > 0.01
    )
    assert ((front["samples"] - plain["samples"]).abs().mean() > 0.01) == (kind != "SD2")
    assert rgba.shape == (2, HEIGHT, WIDTH, 4) and torch.equal(mask, 1 - rgba[..., 3])
    for picture, behind, document in zip(rgba, background, documents, strict=True):
        stack = read_layers(document)
        assert [layer.name for layer in stack.layers] == ["background", "foreground"]
        expected = picture[..., 3:] * picture[..., :3] + (1 - picture[..., 3:]) * behind
        assert (flatten(stack)[0] - expected).abs().max() < 1e-5
