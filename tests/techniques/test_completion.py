"""What is missing of layers behind nearer ones, against loops, another convex hull and known shapes."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from strata.techniques import completion
from strata.techniques.compositing import flatten, left_clear
from strata.techniques.layers import Layer, LayerStack

SIDE = 64


def disk(x, y, radius, soft=1.0, side=SIDE):
    across = torch.arange(side) + 0.5
    distance = ((across[None] - x) ** 2 + (across[:, None] - y) ** 2).sqrt()
    return ((radius - distance) / soft + 0.5).clamp(0, 1)


@pytest.mark.parametrize("seed", range(6))
def test_the_hull_is_that_of_another_algorithm(seed):
    from scipy.spatial import ConvexHull

    rng = np.random.default_rng(seed)
    points = rng.integers(8, 120, (4 + 3 * seed, 2))
    alpha = torch.zeros(128, 128)
    alpha[points[:, 1], points[:, 0]] = 1
    # Pixels are squares, so their corners span the hull; Pillow draws at eight times the size.
    corners = (points[:, None] + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[None]).reshape(-1, 2)
    outline = corners[ConvexHull(corners).vertices]
    large = Image.new("L", (1024, 1024))
    ImageDraw.Draw(large).polygon([tuple(int(v) for v in 8 * corner) for corner in outline], fill=255)
    expected = torch.from_numpy(np.asarray(large.resize((128, 128), Image.Resampling.BOX), np.float32) / 255)
    found = completion.convex_hull(alpha)
    assert (found[alpha > 0] == 1).all()
    # on the edge itself the distance to it stands for the share of the pixel
    assert (found - expected).abs().max() < 0.3 and (found - expected).abs().mean() < 0.005


def test_an_empty_layer_has_no_hull():
    assert not completion.convex_hull(torch.full((5, 6), 0.5)).any()


def test_a_disk_goes_on_behind_what_hides_it_and_nowhere_else():
    whole, nearer = disk(30, 32, 18), torch.zeros(SIDE, SIDE)
    nearer[:, 36:42] = 1
    seen = whole * (1 - nearer)
    added = completion.missing_behind(seen, nearer, backmost=False)
    assert not added[nearer == 0].any()
    expected = whole * nearer
    assert ((added > 0.5) & (expected > 0.5)).sum() > 0.97 * ((added > 0.5) | (expected > 0.5)).sum()
    assert added.max() == 1


def test_where_a_nearer_layer_is_half_transparent_an_object_only_goes_on_if_both_make_a_whole():
    whole = disk(32, 32, 20)
    band = (3 - (torch.arange(SIDE) - 32.0).abs() / 2).clamp(0, 1).expand(SIDE, SIDE)  # soft on either side
    together = completion.missing_behind(whole * (1 - band), band, backmost=False)
    inside = disk(32, 32, 17) == 1
    assert (together[inside & (band > 0.01)] == 1).all()
    apart = completion.missing_behind(whole * (band == 0), band, backmost=False)
    assert not apart[band < 0.97].any() and (apart[inside & (band == 1)] == 1).all()


def test_the_backmost_layer_becomes_opaque_under_anything_that_covers_it():
    alpha = torch.tensor([[1.0, 0.6, 0.0, 0.0, 0.2]])
    cover = torch.tensor([[0.9, 0.5, 0.4, 0.0, 0.001]])
    assert completion.missing_behind(alpha, cover, backmost=True).tolist() == [[0, 1, 1, 0, 0]]


def test_a_layer_that_lacks_nothing_gets_nothing():
    alpha = disk(32, 32, 20)
    assert not completion.missing_behind(alpha, torch.zeros_like(alpha), backmost=False).any()
    assert not completion.missing_behind(torch.ones_like(alpha), alpha, backmost=True).any()


def test_a_region_grows_by_whole_pixels():
    region = torch.zeros(9, 9)
    region[4, 4] = 0.2
    expected = torch.zeros(9, 9)
    expected[2:7, 2:7] = 1
    assert torch.equal(completion.grown(region, 2), expected)
    assert torch.equal(completion.grown(region, 0), (region > 0).float())


def test_drift_of_colour_goes_and_shadows_beside_the_region_do_not_count():
    rng = torch.Generator().manual_seed(2)
    image = 0.3 + 0.4 * torch.rand(20, 24, 3, generator=rng)
    region = torch.zeros(20, 24)
    region[5:15, 6:18] = 1
    drawn = image + torch.tensor([0.05, -0.02, 0.01])
    shadowed = image.clone()
    shadowed[15:18] *= 0.5
    found = completion.matched(drawn, shadowed, region)
    assert torch.allclose(found, image, atol=1e-6)
    assert torch.equal(completion.matched(drawn, image, torch.ones(20, 24)), drawn)


def test_what_is_drawn_lies_under_what_the_layer_has():
    rng = torch.Generator().manual_seed(3)
    pixels, drawn = torch.rand(8, 9, 4, generator=rng), torch.rand(8, 9, 3, generator=rng)
    pixels[:2, :, 3] = 1
    added = torch.rand(8, 9, generator=rng) * (torch.rand(8, 9, generator=rng) > 0.4)
    found = completion.filled_in(pixels, drawn, added)
    for y in range(8):
        for x in range(9):
            alpha, wanted = pixels[y, x, 3].item(), added[y, x].item()
            if wanted <= alpha:
                assert torch.equal(found[y, x], pixels[y, x])
                continue
            below = (wanted - alpha) / (1 - alpha)  # the alpha that lies under it gives the sum
            colour = (alpha * pixels[y, x, :3] + (1 - alpha) * below * drawn[y, x]) / wanted
            assert torch.allclose(found[y, x, :3], colour, atol=1e-5) and found[y, x, 3] == added[y, x]


def test_colours_go_on_smoothly():
    across = torch.linspace(0.2, 0.8, 40)
    image = across[None, :, None].expand(30, 40, 3).clone()
    region = torch.zeros(30, 40)
    region[10:20, 15:25] = 1
    broken = torch.where(region[..., None] > 0, 5.0, image)
    found = completion.continued(broken, region)
    assert torch.equal(found[region == 0], image[region == 0])
    assert (found - image).abs().max() < 0.12


def test_a_completed_stack_looks_as_before():
    whole, nearer = disk(30, 32, 18), disk(44, 32, 14)
    back = torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(4))
    hole = (nearer < 0.999).float()
    pixels = [
        torch.cat([back, hole[..., None]], -1),
        torch.cat([back.flip(0), (whole * hole)[..., None]], -1),
        torch.cat([back.flip(1), nearer[..., None]], -1),
    ]
    stack = LayerStack((SIDE, SIDE), tuple(Layer(one) for one in pixels))
    cover = 1 - left_clear(torch.stack([one[..., 3] for one in pixels]))[1:]
    filled = []
    for number, one in enumerate(pixels):
        added = completion.missing_behind(one[..., 3], cover[number], number == 0)
        filled.append(completion.filled_in(one, back.flip(0, 1), added))
    assert torch.equal(filled[2], pixels[2]) and not torch.equal(filled[1], pixels[1])
    after = LayerStack((SIDE, SIDE), tuple(Layer(one) for one in filled))
    before = flatten(stack)
    covered, free = nearer == 1, nearer == 0
    assert torch.equal(flatten(after)[0][free], before[0][free])
    assert torch.allclose(flatten(after)[0][covered], before[0][covered], atol=1e-6)
    assert (flatten(after.with_layers(after.layers[:1]))[1][cover[0] > 0] == 1).all()
