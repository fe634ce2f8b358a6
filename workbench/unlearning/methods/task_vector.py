"""Task-vector negation: learn the forget set further, then go the other way."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, retain_cross_entropy
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Steps


def build(
    model: PreTrainedModel, seed: int, *, lr: Rate = 1e-5, steps: Steps = 100, batch_size: Rows = 32
) -> Recipe:
    """``theta0 - alpha (theta_reinforced - theta0)``; ``theta_reinforced`` is trained on the forget
    set's answers. alpha is the budget's business.
    """
    return Recipe(Objective(retain_cross_entropy), EVERYTHING, steps, batch_size, lr, sign=-1.0)


METHOD = Method(
    "task-vector",
    "Task vector",
    "Ilharco et al. 2023 (arXiv 2212.04089)",
    build,
    {"lr": 1e-3, "steps": 120, "batch_size": 16},
    colour="#A55194",
)
