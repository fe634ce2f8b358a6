"""Gradient difference: ascend on the forget set, descend on the retain set (Liu et al. 2022; the
GradDiff of TOFU, arXiv 2401.06121).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, negative_cross_entropy, retain_cross_entropy
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Steps


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-5,
    steps: Steps = 100,
    batch_size: Rows = 32,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
) -> Recipe:
    """``-CE(forget) + CE(retain)``, both token means; published defaults of open-unlearning."""
    objective = Objective(
        negative_cross_entropy, retain_cross_entropy, forget_weight, retain_weight
    )
    return Recipe(objective, EVERYTHING, steps, batch_size, lr)


METHOD = Method(
    "grad-diff",
    "GradDiff",
    "Liu et al. 2022; Maini et al. 2024 (arXiv 2401.06121)",
    build,
    {"lr": 3e-4, "steps": 60, "batch_size": 16, "retain_weight": 3.0},
    colour="#E69F00",
)
