"""Muon (Jordan et al. 2024) for weight matrices and convolution kernels up to 160 wide, Adam for everything else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NOT_MATRICES = (nn.Embedding,)
SIDES = range(32, 161)  # short sides that are worth it: the cost grows with the cube


class Muon(torch.optim.Optimizer):
    """One optimizer, so that one checkpoint holds it. torch.optim.Muon takes no kernels and no vectors.

    Matrices move along the orthogonalised momentum, scaled to the root mean square of Adam's steps, so that both share
    one learning rate.
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.99)):
        excluded = {
            id(p) for module in model.modules() if isinstance(module, NOT_MATRICES) for p in module.parameters()
        }
        matrices = [
            p
            for p in model.parameters()
            if p.requires_grad and p.ndim > 1 and min(p.flatten(1).shape) in SIDES and id(p) not in excluded
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        groups = [{"params": matrices, "matrices": True}, {"params": rest, "matrices": False}]
        super().__init__(
            [group for group in groups if group["params"]], {"lr": lr, "momentum": momentum, "betas": betas}
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["matrices"]:
                self._matrices(learning, group)
            else:
                for parameter in learning:
                    _adam(parameter, self.state[parameter], group)

    def _matrices(self, parameters: list[Tensor], group: dict) -> None:
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(momentum, group["momentum"]).flatten(1))
        for parameter, update in zip(parameters, orthogonalised(updates), strict=True):
            parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def _adam(parameter: Tensor, state: dict, group: dict) -> None:
    if not state:
        state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
    state["step"] += 1
    first, second = group["betas"]
    state["mean"].lerp_(parameter.grad, 1 - first)
    state["square"].lerp_(parameter.grad.square(), 1 - second)
    mean = state["mean"] / (1 - first ** state["step"])
    square = state["square"] / (1 - second ** state["step"])
    parameter.add_(mean / (square.sqrt() + 1e-8), alpha=-group["lr"])


def orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    """Of each matrix about the U V^T of its singular value decomposition, by five quintic Newton-Schulz steps.

    Each step multiplies by a polynomial of x x^T, so all of them are gathered in a square matrix of the short side, for
    all matrices of one short side together.
    """
    wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    wide = [matrix / (matrix.norm() + 1e-7) for matrix in wide]
    results = [None] * len(wide)
    for side in {matrix.shape[0] for matrix in wide}:
        places = [i for i, matrix in enumerate(wide) if matrix.shape[0] == side]
        for i, total in zip(places, _polynomial(torch.stack([wide[i] @ wide[i].T for i in places])), strict=True):
            results[i] = total @ wide[i]
    return [
        result if result.shape == matrix.shape else result.T for result, matrix in zip(results, matrices, strict=True)
    ]


def _polynomial(gram: Tensor) -> Tensor:
    """[N,n,n] from the Gram matrices [N,n,n]: what the five steps multiply the matrices by."""
    total = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype).expand_as(gram)
    for _ in range(5):
        factor = -4.7750 * gram + 2.0315 * gram @ gram
        factor.diagonal(dim1=-2, dim2=-1).add_(3.4445)
        total, gram = factor @ total, factor @ gram @ factor
    return total
