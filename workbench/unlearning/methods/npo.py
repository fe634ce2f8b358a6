"""Negative preference optimisation."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, Retain, npo, retain_term
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Steps


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-5,
    steps: Steps = 100,
    batch_size: Rows = 32,
    beta: float = 0.1,
    retain_weight: float = 1.0,
    retain: Retain = "cross-entropy",
) -> Recipe:
    """NPO on the sequence-summed log-ratio plus a retain term: cross-entropy, or the KL divergence
    from the reference.
    """
    return Recipe(
        Objective(npo(beta), retain_term(retain), 1.0, retain_weight),
        EVERYTHING,
        steps,
        batch_size,
        lr,
    )


METHOD = Method(
    "npo",
    "NPO",
    "Zhang et al. 2024 (arXiv 2404.05868)",
    build,
    {"lr": 3e-4, "steps": 60, "batch_size": 16, "retain_weight": 3.0},
    colour="#56B4E9",
)
