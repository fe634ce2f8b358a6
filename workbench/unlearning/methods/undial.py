"""UNDIAL: self-distillation with the true token's logit lowered."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, retain_cross_entropy, undial
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Steps


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-4,
    steps: Steps = 100,
    batch_size: Rows = 32,
    beta: float = 10.0,
    retain_weight: float = 0.0,
) -> Recipe:
    """Cross-entropy to ``softmax(z_base - beta onehot(y))`` on answer tokens; the defaults of
    open-unlearning have no retain term.
    """
    return Recipe(
        Objective(
            undial(beta), retain_cross_entropy if retain_weight else None, 1.0, retain_weight
        ),
        EVERYTHING,
        steps,
        batch_size,
        lr,
    )


METHOD = Method(
    "undial",
    "UNDIAL",
    "Dong et al. 2024 (arXiv 2402.10052)",
    build,
    {"lr": 3e-4, "steps": 60, "batch_size": 16, "retain_weight": 3.0},
    colour="#3182BD",
)
