"""Fitted layers against float64 loops over pixels, least squares with constraints, and cases whose answer is known."""

import figures
import figures_fit
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from strata.techniques import compositing, fitting
from strata.techniques.harmonization import visible_shares
from strata.techniques.layers import Layer, LayerStack


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(shape).astype(np.float32))


def disc(size, centre, radius):
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return (radius - torch.hypot(y - centre[0], x - centre[1]) + 0.5).clamp(0, 1)


def smooth(size, seed):
    """[H,W,3] that changes slowly."""
    small = draw(1, 3, 4, 4, seed=seed)
    return torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")[0].movedim(0, -1)


def scene(size=96):
    """A stack of a background and two objects that cover each other, and its image."""
    alphas = [torch.ones(size, size), disc(size, (44, 40), 22), disc(size, (56, 60), 18)]
    pictures = [torch.cat([smooth(size, seed), one[..., None]], -1) for seed, one in enumerate(alphas)]
    stack = LayerStack((size, size), tuple(Layer(one, f"L{n}") for n, one in enumerate(pictures)))
    return stack, compositing.flatten(stack)[0]


def reduced(stack, by, noise=0.0, seed=0):
    """As a decomposer gives it: smaller, with noise in the alpha."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in stack.layers:
        rgba = layer.image.movedim(-1, 0)[None]
        colours = torch.nn.functional.avg_pool2d(rgba[:, :3] * rgba[:, 3:], by)
        alpha = torch.nn.functional.avg_pool2d(rgba[:, 3:], by)
        colours = colours / alpha.clamp(min=1e-3)
        alpha = (alpha + noise * torch.randn(alpha.shape, generator=generator)).clamp(0, 1)
        layers.append(Layer(torch.cat([colours, alpha], 1)[0].movedim(0, -1).contiguous(), layer.name))
    side = stack.canvas[0] // by
    return LayerStack((side, side), tuple(layers))


def soft_iou(one, other):
    return (torch.minimum(one, other).sum() / torch.maximum(one, other).sum()).item()


def error(stack, image):
    return (compositing.flatten(stack)[0] - image).abs().max().item()


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_exact_colours_add_up_within_their_range(layers):
    image, alphas, colours = draw(3, 400), draw(layers, 400, seed=1), draw(layers, 3, 400, seed=2) * 1.4 - 0.2
    alphas[0], alphas[1:, :40], alphas[1:, 40:80] = 1, 0, 1
    found = fitting.exact_colours(image, alphas, colours).double()
    assert found.min() >= 0 and found.max() <= 1
    _, weights = visible_shares(alphas.double())
    assert ((weights[:, None] * found).sum(0) - image).abs().max() < 1e-6
    unseen = (weights == 0)[:, None].expand_as(found)
    assert torch.equal(found[unseen], colours.clamp(0, 1).double()[unseen])


def test_the_change_of_all_layers_is_the_smallest():
    """Against least squares where nothing is clamped, and never worse than 1.5 times a solver's where something is."""
    alphas = torch.cat([torch.ones(1, 30), 0.1 + 0.8 * draw(3, 30)])
    colours = 0.4 + 0.2 * draw(4, 3, 30, seed=1)
    _, weights = visible_shares(alphas.double())
    image = (weights[:, None] * colours).sum(0).float() + 0.05 * (draw(3, 30, seed=2) - 0.5)
    found = fitting.exact_colours(image, alphas, colours)
    for channel, at in np.ndindex(3, 30):
        row, own = weights[:, at].numpy(), colours[:, channel, at].double().numpy()
        change = np.linalg.lstsq(row[None], np.array([image[channel, at].item() - row @ own]), rcond=None)[0]
        assert np.allclose(found[:, channel, at].numpy(), own + change, rtol=0, atol=2e-6)
    colours, image = draw(4, 3, 30, seed=3), draw(3, 30, seed=4)
    found = fitting.exact_colours(image, alphas, colours)
    for at in range(10):
        row, own, target = weights[:, at].numpy(), colours[:, 0, at].double().numpy(), image[0, at].item()
        rule = {"type": "eq", "fun": lambda c, row=row, target=target: row @ c - target}
        best = minimize(lambda c, own=own: ((c - own) ** 2).sum(), own, bounds=[(0, 1)] * 4, constraints=[rule])
        assert ((found[:, 0, at].double().numpy() - own) ** 2).sum() <= 1.5 * best.fun + 1e-6


def test_the_noise_is_found_and_an_even_alpha_has_none():
    flat = torch.full((200, 200), 0.5)
    noisy = flat + 0.05 * torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    assert fitting.noise_of(noisy) == pytest.approx(0.05, rel=0.05)
    noisy[:, 100:] += 0.4  # an edge
    assert fitting.noise_of(noisy) == pytest.approx(0.05, rel=0.1)
    assert fitting.noise_of(disc(200, (100, 100), 60)) == 0 and fitting.noise_of(flat[:2]) == 0


def test_an_alpha_without_noise_stays_and_one_with_noise_is_cleaned():
    alpha = disc(80, (40, 40), 25)
    clean = fitting.clean_alpha(alpha)
    assert (clean - alpha).abs().max() <= 2 * fitting.TRACE
    for seed in range(3):
        noise = 0.05 * torch.randn(80, 80, generator=torch.Generator().manual_seed(seed))
        found = fitting.clean_alpha((alpha + noise).clamp(0, 1))
        assert soft_iou(found, alpha) > 0.96 > 0.945 > soft_iou((alpha + noise).clamp(0, 1), alpha)
        assert (found[alpha == 0] == 0).float().mean() > 0.9 and (found[alpha == 1] == 1).float().mean() > 0.9


def test_less_than_half_a_step_of_eight_bits_is_nothing():
    for value, expected in ((0.99 / 510, 0), (1.999 / 510, 1.998 / 510), (1 - 0.99 / 510, 1)):
        found = fitting.clean_alpha(torch.full((8, 8), value, dtype=torch.float64))
        assert torch.allclose(found, torch.full_like(found, expected), rtol=0, atol=1e-9), value


def test_alphas_follow_the_image_where_colours_differ_and_stay_where_not():
    """One pixel: by the posterior mean of a Gaussian prior, written out."""
    colours = torch.tensor([[[0.1], [0.2], [0.3]], [[0.9], [0.6], [0.3]]])
    image, alphas = torch.tensor([[0.7], [0.5], [0.3]]), torch.tensor([[1.0], [0.5]])
    low, high = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]])
    found = fitting.alphas_by_image(image, alphas, colours, low, high)
    slope = (colours[1] - colours[0])[:, 0].double().numpy()
    prior, noise = fitting.ALPHA_ERROR**2, 3 * fitting.COLOUR_ERROR**2
    missing = image[:, 0].numpy() - (0.5 * colours[0, :, 0] + 0.5 * colours[1, :, 0]).numpy()
    assert found[1].item() == pytest.approx(0.5 + prior * (slope @ missing) / (prior * slope @ slope + noise), abs=1e-6)
    same = fitting.alphas_by_image(image, alphas, colours[:1].expand(2, -1, -1), low, high)
    assert torch.equal(same, alphas)
    assert torch.equal(fitting.alphas_by_image(image, alphas, colours, alphas, alphas), alphas)


def test_steep_edges_become_steeper_and_slow_ones_stay():
    alpha, ones, zeros = torch.linspace(0, 1, 11), torch.ones(11), torch.zeros(11)
    edge = fitting.sharpened(alpha, zeros, ones, torch.tensor(3.0))
    assert torch.allclose(edge, (0.5 + 3 * (alpha - 0.5)).clamp(0, 1))
    assert torch.allclose(fitting.sharpened(alpha, alpha - 0.1, alpha + 0.1, torch.tensor(3.0)), alpha)


def test_fitting_gives_the_image_and_better_layers_at_its_size():
    stack, image = scene()
    for by, noise in ((2, 0.0), (4, 0.05), (8, 0.05)):
        small = reduced(stack, by, noise)
        large = fitting.resized(small, stack.canvas)
        bicubic = [fitting.rastered(layer, stack.canvas) for layer in large.layers]
        fitted = fitting.fit_stack(small, image)
        assert fitted.stack.canvas == stack.canvas and not fitted.rest
        assert error(fitted.stack, image) < 1 / 255 and fitted.after.max() < 1 / 255 < fitted.before.max()
        for true, found, plain in zip(stack.layers, fitted.stack.layers, bicubic, strict=True):
            assert tuple(found.image.shape) == (96, 96, 4) and found.name == true.name
            pair = [soft_iou(one.image[..., 3], true.image[..., 3]) for one in (found, plain)]
            assert pair[0] >= pair[1]
            weight = true.image[..., 3:]
            errors = [((one.image - true.image)[..., :3].abs() * weight).sum() for one in (found, plain)]
            assert errors[0] < 0.6 * errors[1]


def test_layers_that_are_right_already_stay():
    stack, image = scene()
    found = fitting.fit_stack(stack, image).stack
    for one, other in zip(found.layers, stack.layers, strict=True):
        seen = other.image[..., 3:] > 2 * fitting.TRACE
        assert ((one.image - other.image).abs() * seen).max() < 0.02


def test_strips_do_not_show(monkeypatch):
    stack, image = scene()
    small = reduced(stack, 4, 0.05)
    whole = fitting.fit_stack(small, image)
    monkeypatch.setattr(fitting, "_STRIP_PIXELS", 96 * 7)
    striped = fitting.fit_stack(small, image)
    for one, other in zip(whole.stack.layers, striped.stack.layers, strict=True):
        assert torch.equal(one.image, other.image)
    assert torch.equal(whole.before, striped.before) and torch.equal(whole.after, striped.after)


def test_fields_of_layers_are_kept_or_drawn_in():
    """Places, sizes, turns, flips, masks, opacity; hidden layers go along."""
    stack, image = scene()
    back, first, second = reduced(stack, 2).layers
    extra = {"strata": {"parent": ["Group"]}}
    layers = (
        back,
        Layer(first.image[5:40, 3:44], "cut", torch.zeros(35, 41), x=3, y=5, opacity=0.9, extra=extra),
        Layer(second.image, "turned", x=2, y=-3, w=40, h=52, rotation=0.3, flip_h=True),
        Layer(first.image, "off", visible=False, x=4, w=10, h=6),
        Layer(first.image, "outside", x=500),
    )
    fitted = fitting.fit_stack(LayerStack((48, 48), layers), image).stack
    assert error(fitted, image) < 1 / 255
    _, cut, turned, off, outside = fitted.layers
    assert (cut.x, cut.y, cut.w, cut.opacity, cut.mask, cut.extra) == (6, 10, 0, 1.0, None, extra)
    assert tuple(cut.image.shape) == (70, 82, 4) and turned.rotation == 0 and not turned.flip_h
    assert (off.x, off.w, off.h, off.visible) == (8, 20, 12, False) and torch.equal(off.image, first.image)
    assert outside.x == 1000


def test_what_no_layer_covers_becomes_a_layer_behind_all():
    stack, image = scene()
    fitted = fitting.fit_stack(stack.with_layers(stack.layers[1:]), image)
    assert fitted.rest and [layer.name for layer in fitted.stack.layers] == ["Rest", "L1", "L2"]
    assert error(fitted.stack, image) < 1 / 255
    blank = LayerStack((4, 4), (Layer(torch.zeros(4, 4, 4), "blank"),))
    fitted = fitting.fit_stack(blank, image)
    assert fitted.rest and torch.equal(fitted.stack.layers[0].image[..., :3], image)
    assert error(fitted.stack, image) < 1e-6
    full = LayerStack((4, 4), (Layer(torch.zeros(4, 4, 4)),) * 50)
    with pytest.raises(ValueError, match="layers: there are 50 layers and no background"):
        fitting.fit_stack(full, image)


def test_keep_leaves_alphas_as_enlarged():
    stack, image = scene()
    small = reduced(stack, 4, 0.05)
    plain = [fitting.rastered(layer, (96, 96)) for layer in fitting.resized(small, (96, 96)).layers]
    kept = fitting.fit_stack(small, image, refine=False).stack
    for one, other in zip(kept.layers[1:], plain[1:], strict=True):
        assert torch.equal(one.image[..., 3], other.image[..., 3])
    assert error(kept, image) < 1 / 255


def test_blend_modes_are_refused_by_name():
    layers = (Layer(draw(4, 4, 3)), Layer(draw(4, 4, 4), "Shade", blend_mode="multiply"))
    with pytest.raises(ValueError, match="layers: layer 'Shade' has the blend mode 'multiply'"):
        fitting.fit_stack(LayerStack((4, 4), layers), draw(8, 8, 3))
    hidden = LayerStack((4, 4), (layers[0], Layer(layers[1].image, blend_mode="multiply", visible=False)))
    assert error(fitting.fit_stack(hidden, draw(8, 8, 3)).stack, draw(8, 8, 3)) < 1 / 255


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (5, 3), (64, 33)])
def test_any_size_and_shape(size):
    image = draw(*size, 3)
    stack = LayerStack((7, 9), (Layer(draw(9, 7, 3)), Layer(draw(9, 7, 4, seed=1)), Layer(draw(2, 1, 4), x=6, y=3)))
    fitted = fitting.fit_stack(stack, image)
    assert fitted.stack.canvas == (size[1], size[0]) and error(fitted.stack, image) < 1 / 255


@pytest.mark.slow
def test_the_figures_of_simulated_decomposers_hold():
    """A sample of them is too small for how often faults are found."""
    measured = figures_fit.measure(figures.sample(figures_fit))
    for column in measured.values():
        for figure in [name for name in column if name.endswith(("precision", "recall"))]:
            del column[figure]
    figures.check("fit", measured)
