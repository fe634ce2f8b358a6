"""Gradient ascent on the forget set alone: the oldest baseline, and one that keeps nothing."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, negative_cross_entropy
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Steps


def build(
    model: PreTrainedModel, seed: int, *, lr: Rate = 1e-5, steps: Steps = 100, batch_size: Rows = 32
) -> Recipe:
    """``-CE(forget)``, mean over answer tokens; no retain term. Defaults of open-unlearning."""
    return Recipe(Objective(negative_cross_entropy), EVERYTHING, steps, batch_size, lr)


METHOD = Method(
    "grad-ascent",
    "GradAscent",
    "Jang et al. 2023 (arXiv 2210.01504)",
    build,
    {"lr": 3e-4, "steps": 40, "batch_size": 16},
    colour="#8C564B",
)
