"""The nodes of Strata/Compose in a running ComfyUI, on checkpoints with random weights."""

import io

import numpy as np
import pytest
import run
import torch
from mini_models import CHECKPOINT, Family
from PIL import Image

from .server_helpers import SIDE, latents, node

STEPS = 3


def graph(method="ddim", checkpoint="sd", **guidance):
    invert = {
        "model": ["load", 0],
        "vae": ["load", 2],
        "method": method,
        "steps": STEPS,
        "scheduler": "ddim_uniform",
        "cfg": 7.5,
        "inner_steps": 1,
        "seed": 0,
        "disk_cache": "on",
        "negative": ["negative", 0],
    }
    guidance = {
        "cfg": 3.0,
        "level_weights": "0.2, 8.5",
        "foreground": 1.0,
        "iterations": 2,
        "step_size": 0.001,
        "start_percent": 0.0,
        "end_percent": 0.76,
        "norm": "l2",
        "start": "given latent",
        "source_features": "recompute",
        "checkpointing": False,
        **guidance,
    }
    scene = {"width": SIDE, "height": SIDE}
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=f"random_{checkpoint}.safetensors"),
        "front": node("Strata_RenderScene", kind="meadow", objects="dog", count=1, seed=3, **scene),
        "back": node("Strata_RenderScene", kind="snow", objects="", count=0, seed=5, **scene),
        "positive": node("CLIPTextEncode", text="a dog in snow", clip=["load", 1]),
        "negative": node("CLIPTextEncode", text="", clip=["load", 1]),
        "invert_front": node("Strata_InvertImage", image=["front", 0], positive=["positive", 0], **invert),
        "invert_back": node("Strata_InvertImage", image=["back", 0], positive=["negative", 0], **invert),
        "plane_back": node("Strata_GuidancePlane", inversion=["invert_back", 0], mask_index=-1, weight=1.0),
        "plane_front": node(
            "Strata_GuidancePlane",
            inversion=["invert_front", 0],
            mask=["front", 4],
            mask_index=-1,
            weight=1.0,
            behind=["plane_back", 0],
        ),
        "guide": node(
            "Strata_FeatureGuidance",
            model=["load", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            planes=["plane_front", 0],
            **guidance,
        ),
        "noise": node("RandomNoise", noise_seed=1),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guide", 0],
            sampler=["euler", 0],
            sigmas=["invert_back", 1],
            latent_image=["empty", 0],
        ),
        "empty": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
    }


def test_off_is_bit_equal_to_a_stock_guider_and_on_is_not(server):  # noqa: F811
    (on,) = latents(server, graph(), ("sample", 0))
    (off,) = latents(server, graph(foreground=0.0), ("sample", 0))
    stock = graph()
    stock["guide"] = node("CFGGuider", model=["load", 0], positive=["positive", 0], negative=["negative", 0], cfg=3.0)
    (plain,) = latents(server, stock, ("sample", 0))
    assert (off == plain).all() and (on - off).abs().mean() > 1e-3 and on.isfinite().all()
    (started,) = latents(
        server,
        graph(start="background inversion", checkpointing=True, source_features="cache", norm="l1"),
        ("sample", 0),
    )
    assert (started - on).abs().mean() > 1e-3 and started.isfinite().all()


@pytest.mark.parametrize("method", ["ddim", "null-text", "noise only"])
def test_the_node_shows_before_and_after_with_the_quality_and_keeps_the_result_on_disk(server, method):  # noqa: F811
    prompt = graph(method)
    prompt = {name: prompt[name] for name in ("load", "front", "positive", "negative", "invert_front")}
    prompt["invert_front"]["inputs"]["steps"] = STEPS + 1  # no other test has made this one
    prompt["show"] = node("PreviewImage", images=["invert_front", 3])
    prompt["text"] = node("PreviewAny", source=["invert_front", 4])
    folder = server.server.base / "user" / "strata_inversions"
    before = set(folder.glob("*")) if folder.exists() else set()
    outputs = server.run(prompt)["outputs"]
    sheet = Image.open(io.BytesIO(server.download(outputs["invert_front"]["images"][0])))
    assert sheet.height == SIDE + 18 and sheet.width >= 2 * SIDE
    scene = np.asarray(sheet)[18:, :SIDE].astype(float)
    assert scene.std() > 20
    report = outputs["text"]["text"][0]
    assert report.startswith(method) and ("dB" in report) == (method != "noise only")
    made = set(folder.glob("*")) - before if folder.exists() else set()
    assert len(made) == (method != "noise only")
    times = [path.stat().st_size for path in made]
    prompt["invert_front"]["inputs"]["seed"] = (
        1  # ComfyUI runs the node again; a deterministic inversion comes from the disk
    )
    outputs = server.run(prompt)["outputs"]
    assert outputs["text"]["text"][0] == report
    assert (set(folder.glob("*")) - before if folder.exists() else set()) == made and [
        path.stat().st_size for path in made
    ] == times


def test_an_object_is_inserted_into_its_box_and_the_rest_stays(server):  # noqa: F811
    prompt = graph(checkpoint="inpaint")
    prompt["guide"] = node(
        "Strata_InsertAtDepth",
        model=["load", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["load", 2],
        image=["front", 0],
        inversion=["invert_front", 0],
        depth=["front", 3],
        threshold=0.33,
        x=16,
        y=16,
        width=32,
        height=32,
        near_is="black",
        missing_depth="auto",
        cfg=3.0,
        level_weights="0.2, 8.5",
        foreground=1.0,
        iterations=2,
        step_size=0.001,
        norm="l2",
        feather=0.0,
    )
    prompt["sample"]["inputs"]["latent_image"] = ["guide", 1]
    prompt["sum"] = node("MaskComposite", destination=["guide", 2], source=["guide", 3], x=0, y=0, operation="add")
    for name, link in (("sum", ["sum", 0]), ("visible", ["guide", 2])):
        prompt[f"{name}_image"] = node("MaskToImage", mask=link)
        prompt[f"show_{name}"] = node("PreviewImage", images=[f"{name}_image", 0])
    after, before = latents(server, prompt, ("sample", 0), ("invert_front", 2))
    box = np.zeros((SIDE // 8, SIDE // 8), bool)
    box[2:6, 2:6] = True
    moved = (after - before).abs().numpy()
    assert moved[..., box].mean() > 0.05 and moved[..., ~box].max() < 1e-4
    outputs = server.run(prompt)["outputs"]
    region, visible = (
        np.asarray(Image.open(io.BytesIO(server.download(outputs[f"show_{name}"]["images"][0])))) > 127
        for name in ("sum", "visible")
    )
    assert region[..., 0].sum() == 32 * 32 and region[16:48, 16:48].all() and 0 < visible[..., 0].sum() < 32 * 32


def test_what_is_wrong_is_said_in_words(server):  # noqa: F811
    prompt = graph()
    prompt["euler"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    prompt["show"] = node("SaveLatent", samples=["sample", 0], filename_prefix="compose")
    with pytest.raises(run.RunError, match="choose one of euler, ddim"):
        server.run(prompt)
    prompt = graph()
    prompt["plane_front"]["inputs"]["mask_index"] = 7
    prompt["show"] = node("SaveLatent", samples=["sample", 0], filename_prefix="compose")
    with pytest.raises(run.RunError, match="mask_index: there are 2 masks and no number 7"):
        server.run(prompt)


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")
def test_sides_that_no_latent_divides_are_cut_alike():
    """ComfyUI's VAE cuts the rim all round: picture, report, planes' masks and the noise mask follow it."""
    from strata.nodes.compositing import GuidancePlane, InsertAtDepth, InvertImage
    from strata.nodes.inputs import centred

    with torch.inference_mode():
        mini = Family()
        image = torch.from_numpy(mini.scene("beach", ("apple",), 1)[0].composite)[None]
        image = torch.nn.functional.interpolate(image.movedim(-1, 1), (134, 132), mode="bilinear").movedim(1, -1)
        found, _, latent, after, report = InvertImage.execute(
            mini.model, mini.vae, image, mini.negative, "ddim", 3, "ddim_uniform", 1.0, 1, 0, "off"
        ).args
        assert after.shape[1:3] == (128, 128) and torch.equal(centred(image, 128, 128), image[:, 3:131, 2:130])
        decibels = -10 * float((after - image[:, 3:131, 2:130]).square().mean().log10())
        assert f"image {decibels:.1f} dB" in report
        mask = torch.zeros(1, 134, 132)
        mask[:, 3:67, 2:66] = 1
        plane = GuidancePlane.execute(found, -1, 1.0, mask).args[0].planes[0]
        assert plane.mask.shape == (128, 128) and plane.mask[:64, :64].all() and plane.mask.sum() == 64 * 64
        near = torch.zeros(1, 134, 132, 3)
        near[:, 3:67] = 1  # white = near
        guider, made, visible, nearer = InsertAtDepth.execute(
            mini.model,
            mini.negative,
            mini.negative,
            mini.vae,
            image,
            found,
            near,
            0.5,
            2,
            3,
            128,
            128,
            "white",
            "auto",
            cfg=1.0,
            level_weights="1",
            foreground=1.0,
            iterations=1,
            step_size=0.1,
            norm="l2",
        ).args
        assert (
            made["noise_mask"].shape[1:] == (128, 128) and made["noise_mask"].all() and visible.shape[1:] == (134, 132)
        )
        # Soft box, sharp occluder.
        assert (
            visible[0, 130, 60] < 0.2
            and visible[0, 100, 60] > 0.99
            and visible[0, :67].max() == 0
            and visible[0, 67, 60] > 0.99
        )
        assert (
            torch.equal(guider.planes.planes[0].mask, nearer[0, 3:131, 2:130])
            and guider.planes.planes[0].mask.sum() == 64 * 128
        )


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")
def test_what_no_encoder_takes_and_what_null_text_cannot_hold_are_one_sentence():
    from strata.nodes.compositing import InvertImage

    with torch.inference_mode():
        mini = Family()

        def invert(image, negative=None, method="ddim"):
            return InvertImage.execute(
                mini.model, mini.vae, image, mini.negative, method, 2, "ddim_uniform", 3.0, 1, 0, "off", negative
            )

        with pytest.raises(
            ValueError, match="^image: it is 40×7 and the VAE takes images of at least 8×8 pixels; scale it up.$"
        ):
            invert(torch.rand(1, 7, 40, 3))
        for key, value in (("start_percent", 0.5), ("area", (8, 8, 0, 0)), ("mask", torch.ones(1, 8, 8))):
            limited = [[mini.negative[0][0], {**mini.negative[0][1], key: value}]]
            with pytest.raises(
                ValueError, match=f"^negative: it carries {key}, and null-text takes one plain conditioning"
            ):
                invert(torch.rand(1, 16, 16, 3), limited, "null-text")
