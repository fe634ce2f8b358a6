"""Who's Harry Potter: learn what a model that had not been reinforced would say instead."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, generic_prediction, retain_cross_entropy
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Steps, Teacher


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-6,
    steps: Steps = 100,
    batch_size: Rows = 32,
    strength: float = 5.0,
    reinforce_lr: Rate = 3e-6,
    reinforce_steps: Steps = 150,
    retain_weight: float = 1.0,
) -> Recipe:
    """Reinforce a copy on the forget set, then train on ``softmax(v_base - alpha ReLU(v_reinforced
    - v_base))``; cross-entropy on the retain set.

    The paper also replaces names by a table written for the books; that half needs such a table and
    is left out. The retain term is ours: without one, a small model keeps nothing.
    """
    nothing = Objective(retain_cross_entropy)  # replaced once the teacher is there
    teacher_recipe = Recipe(
        Objective(retain_cross_entropy), EVERYTHING, reinforce_steps, batch_size, reinforce_lr
    )
    keep = retain_cross_entropy if retain_weight else None
    teacher = Teacher(
        teacher_recipe,
        lambda reinforced: Objective(
            generic_prediction(reinforced, strength), keep, 1.0, retain_weight
        ),
    )
    return Recipe(nothing, EVERYTHING, steps, batch_size, lr, teacher=teacher)


METHOD = Method(
    "whp",
    "WHP targets",
    "Eldan and Russinovich 2023 (arXiv 2310.02238)",
    build,
    {
        "lr": 3e-4,
        "steps": 60,
        "batch_size": 16,
        "reinforce_lr": 3e-4,
        "reinforce_steps": 60,
        "retain_weight": 3.0,
    },
    colour="#31A354",
)
