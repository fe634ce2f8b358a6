"""KL minimisation: ascend on the forget set, stay close to the base's predictions on the retain
set.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, negative_cross_entropy, retain_kl
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Steps


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-5,
    steps: Steps = 100,
    batch_size: Rows = 32,
    retain_weight: float = 1.0,
) -> Recipe:
    """``-CE(forget) + KL(base || model)(retain)``; the KL is a mean over real tokens (the released
    code also divides by padding).
    """
    return Recipe(
        Objective(negative_cross_entropy, retain_kl, 1.0, retain_weight),
        EVERYTHING,
        steps,
        batch_size,
        lr,
    )


METHOD = Method(
    "kl-min",
    "KL-min",
    "Maini et al. 2024 (arXiv 2401.06121)",
    build,
    {"lr": 3e-4, "steps": 60, "batch_size": 16, "retain_weight": 10.0},
    colour="#393B79",
)
