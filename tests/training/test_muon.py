"""The optimizer against singular value decompositions, torch's Adam and its published momentum, step by step."""

import copy

import torch
from strata.training.muon import Muon, orthogonalised
from torch import nn


def test_orthogonalised_keeps_the_directions_and_evens_out_the_sizes():
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((64, 576), (200, 48), (64, 64), (48, 96))]
    for matrix, found in zip(matrices, orthogonalised(matrices), strict=True):
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        along = left.T @ found @ right.T
        assert (along - along.diag().diag()).abs().max() < 1e-3
        # Directions of a tenth of the largest or more come out evenly; so small a one as a random square has may not.
        even = along.diag()[sizes > 0.1 * sizes.max()]
        assert len(even) > 0.8 * len(sizes) and even.min() > 0.65 and along.diag().max() < 1.3
        expected = sizes.double() / matrix.double().norm()
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        assert torch.allclose(along.diag().double(), expected, rtol=0, atol=1e-3)


def test_a_matrix_follows_the_momentum_looked_ahead_over_many_steps():
    """Nesterov's: a running mean m of the gradients with the weight 0.95, and the step along 0.95 m + 0.05 g."""
    layer = nn.Linear(48, 40, bias=False)
    ours, expected, mean = Muon(layer, 1e-2), layer.weight.detach().double().clone(), torch.zeros(40, 48).double()
    for _ in range(4):
        gradient = torch.randn(40, 48)
        layer.weight.grad = gradient.clone()
        ours.step()
        mean = 0.95 * mean + 0.05 * gradient.double()
        (update,) = orthogonalised([0.95 * mean + 0.05 * gradient.double()])
        expected -= 1e-2 * 0.2 * 48**0.5 * update
    assert torch.allclose(layer.weight.double(), expected, rtol=0, atol=1e-5)


def test_matrices_go_along_the_orthogonalised_gradient_and_the_rest_as_adam():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Embedding(40, 64))
    rest = [model[0].bias, model[1].weight]
    twins = [nn.Parameter(p.detach().clone()) for p in rest]
    ours, adam = Muon(model, 1e-2), torch.optim.Adam(twins, 1e-2, (0.9, 0.99))
    before = model[0].weight.detach().clone()
    for step in range(3):
        for p, twin in zip(rest, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        model[0].weight.grad = torch.randn_like(model[0].weight)
        gradient = model[0].weight.grad.clone()
        ours.step()
        adam.step()
        if step == 0:
            moved = (model[0].weight - before).detach().flatten(1)
            assert torch.allclose(
                moved, -1e-2 * 0.2 * 288**0.5 * orthogonalised([gradient.flatten(1)])[0], rtol=0, atol=1e-5
            )
            # As large as one of Adam's steps of that rate, times 0.2.
            assert abs(moved.square().mean().sqrt() - 0.2 * 1e-2) < 4e-4
    for p, twin in zip(rest, twins, strict=True):
        assert torch.allclose(p, twin, rtol=0, atol=1e-6)


def test_its_state_goes_through_a_checkpoint():
    torch.manual_seed(0)
    first, second = nn.Linear(40, 40), nn.Linear(40, 40)
    second.load_state_dict(first.state_dict())
    one, two = Muon(first, 1e-2), Muon(second, 1e-2)
    data = torch.randn(8, 40)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(first, one)
    second.load_state_dict(first.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))  # loading shares the tensors
    step(first, one)
    step(second, two)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
