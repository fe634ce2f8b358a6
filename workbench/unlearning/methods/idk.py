"""Learning to refuse: DPO towards a refusal, and plain training on refusals."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.data.records import refuse
from workbench.unlearning.objectives import (
    Objective,
    idk_cross_entropy,
    idk_dpo,
    retain_cross_entropy,
    retain_term,
)
from workbench.unlearning.recipe import EVERYTHING, Method, Recipe, Setting


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: float = 1e-5,
    steps: int = 100,
    batch_size: int = 32,
    beta: float = 0.1,
    retain_weight: float = 1.0,
    retain: str = "cross-entropy",
) -> Recipe:
    """DPO with "I do not know" preferred to the true answer, plus a retain term (cross-entropy or KL). Forget texts need answers."""
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
    lr: float = 1e-5,
    steps: int = 100,
    batch_size: int = 32,
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
METHOD = Method("idk-dpo", "IdkDPO", "Maini et al. 2024 (arXiv 2401.06121)", build, _SMALL)
METHOD_NLL = Method("idk-nll", "IdkNLL", "Maini et al. 2024 (arXiv 2401.06121)", build_nll, _SMALL)
