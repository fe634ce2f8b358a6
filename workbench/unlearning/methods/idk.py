"""Learning to refuse: DPO towards a refusal, and plain training on refusals."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.data.records import refuse
from workbench.unlearning.objectives import (
    Objective,
    Retain,
    idk_cross_entropy,
    idk_dpo,
    retain_cross_entropy,
    retain_term,
)
from workbench.unlearning.recipe import EVERYTHING, Method, Rate, Recipe, Rows, Setting, Steps


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
    """DPO with "I do not know" preferred to the true answer, plus a retain term (cross-entropy or
    KL). Forget texts need answers.
    """
    return Recipe(
        Objective(idk_dpo(beta), retain_term(retain), 1.0, retain_weight),
        EVERYTHING,
        steps,
        batch_size,
        lr,
        alternative=refuse,
    )


def build_nll(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-5,
    steps: Steps = 100,
    batch_size: Rows = 32,
    retain_weight: float = 1.0,
) -> Recipe:
    """Cross-entropy of the refusal plus cross-entropy on the retain set."""
    return Recipe(
        Objective(idk_cross_entropy, retain_cross_entropy, 1.0, retain_weight),
        EVERYTHING,
        steps,
        batch_size,
        lr,
        alternative=refuse,
    )


_SMALL: dict[str, Setting] = {"lr": 3e-4, "steps": 60, "batch_size": 16, "retain_weight": 3.0}
METHOD = Method(
    "idk-dpo", "IdkDPO", "Maini et al. 2024 (arXiv 2401.06121)", build, _SMALL, colour="#637939"
)
METHOD_NLL = Method(
    "idk-nll", "IdkNLL", "Maini et al. 2024 (arXiv 2401.06121)", build_nll, _SMALL, colour="#B5CF6B"
)
