"""SCRUB: turns of driving the student away from the teacher on the forget set and back to it on the
retain set.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, retain_cross_entropy, teacher_kl, weighted
from workbench.unlearning.recipe import EVERYTHING, Count, Method, Rate, Recipe, Rows, Steps


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-5,
    steps: Steps = 100,
    batch_size: Rows = 32,
    temperature: float = 2.0,
    cross_entropy_weight: float = 1.0,
    teacher_weight: float = 0.5,
    turn: Count = 4,
    forget_share: float = 0.5,
) -> Recipe:
    """Turns of ``-KL_T(teacher || student)`` on the forget set and of ``g CE + a KL_T`` on the
    retain set; the last turns are retain only.

    The paper alternates epochs on images; ports to language models differ. Here a turn is a number
    of steps, and the retain set has the first turn: at the teacher itself the gradient of the
    forget turn is zero.

    Args:
        model: unused.
        seed: unused; the method draws nothing.
        lr: AdamW's rate.
        steps: optimiser steps.
        batch_size: sequences.
        temperature: ``T``.
        cross_entropy_weight: ``g``.
        teacher_weight: ``a``.
        turn: steps before the other set has its turn.
        forget_share: forget turns happen in the first share of the steps only (``msteps`` of the
            paper).
    """
    retain = weighted(
        (cross_entropy_weight, retain_cross_entropy), (teacher_weight, teacher_kl(temperature))
    )

    def schedule(step: int, total: int) -> tuple[float, float]:
        forgets = step < forget_share * total and (step // turn) % 2 == 1
        return (1.0, 0.0) if forgets else (0.0, 1.0)

    return Recipe(
        Objective(teacher_kl(temperature, sign=-1.0), retain),
        EVERYTHING,
        steps,
        batch_size,
        lr,
        schedule=schedule,
    )


METHOD = Method(
    "scrub",
    "SCRUB",
    "Kurmanji et al. 2023 (arXiv 2302.09880)",
    build,
    {"lr": 1e-3, "steps": 80, "batch_size": 16, "turn": 2, "forget_share": 0.7},
    colour="#CE6DBD",
)
