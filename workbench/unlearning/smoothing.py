"""Step rules: how an objective becomes a gradient. The plain rule, and sharpness-aware minimisation of the forget term."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, Pair

StepRule = Callable[[PreTrainedModel, Objective, Pair, PreTrainedModel], dict[str, float]]
"""``(model, objective, pair, reference)``: leaves the gradient in ``parameter.grad`` and returns what to log."""


def plain(model: PreTrainedModel, objective: Objective, pair: Pair, reference: PreTrainedModel) -> dict[str, float]:
    """The gradient of the whole objective at the current weights."""
    forget = objective.forget_term(model, pair, reference)
    forget.backward()
    retain = objective.retain_term(model, pair, reference)
    if retain is not None:
        retain.backward()
    return {"forget": float(forget.detach()), "retain": float(retain.detach()) if retain is not None else 0.0}


def _trainable(model: PreTrainedModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sam(rho: float) -> StepRule:
    r"""Sharpness-aware minimisation of the forget term (Fan et al. 2025, arXiv 2502.05374; Foret et al. 2021).

    .. math:: g = \nabla\ell_f(\theta + \epsilon^*) + \nabla\ell_r(\theta), \qquad \epsilon^* = \rho\, \nabla\ell_f(\theta) / \lVert\nabla\ell_f(\theta)\rVert_2

    Only the forget term is perturbed; the retain term is taken at the unperturbed weights. The weights are put back by copy, bit by bit, not by subtraction.

    Args:
        rho: radius of the perturbation over all trainable parameters, in units of weight (Euclidean norm).
    """
    if rho <= 0:
        raise ValueError(f"rho is {rho}; SAM needs rho > 0 (at 0 it is the plain step)")

    def step(model: PreTrainedModel, objective: Objective, pair: Pair, reference: PreTrainedModel) -> dict[str, float]:
        parameters = _trainable(model)
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
        forget = objective.forget_term(model, pair, reference)
        gradients = torch.autograd.grad(forget, parameters, allow_unused=True)
        length = sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                if length > 0:
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            parameter.add_(gradient, alpha=rho / length)
            perturbed = objective.forget_term(model, pair, reference)
            perturbed.backward()
        except BaseException:
            for parameter, old in zip(parameters, before, strict=True):
                parameter.grad = old
            raise
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
        retain = objective.retain_term(model, pair, reference)
        if retain is not None:
            retain.backward()
        return {
            "forget": float(forget.detach()),
            "retain": float(retain.detach()) if retain is not None else 0.0,
            "sam_rise": float(perturbed.detach()) - float(forget.detach()),
        }

    return step
