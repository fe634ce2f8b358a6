"""SimNPO: negative preference optimisation without a reference model."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, Retain, retain_term, simnpo
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Steps


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-5,
    steps: Steps = 100,
    batch_size: Rows = 32,
    beta: float = 4.5,
    margin: float = 0.0,
    forget_weight: float = 0.125,
    retain_weight: float = 1.0,
    retain: Retain = "cross-entropy",
) -> Recipe:
    """SimNPO on the length-normalised likelihood plus a retain term (cross-entropy or KL); defaults
    of open-unlearning.
    """
    return Recipe(
        Objective(simnpo(beta, margin), retain_term(retain), forget_weight, retain_weight),
        EVERYTHING,
        steps,
        batch_size,
        lr,
    )


METHOD = Method(
    "simnpo",
    "SimNPO",
    "Fan et al. 2024 (arXiv 2410.07163)",
    build,
    {"lr": 3e-4, "steps": 60, "batch_size": 16, "forget_weight": 3.0, "retain_weight": 3.0},
    colour="#6B6ECF",
)
