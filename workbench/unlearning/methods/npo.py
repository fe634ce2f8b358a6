"""Negative preference optimisation, plain and with sharpness-aware minimisation of the forget term."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective, npo, retain_cross_entropy
from workbench.unlearning.recipe import EVERYTHING, Method, Recipe, Setting
from workbench.unlearning.smoothing import plain, sam


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: float = 1e-5,
    steps: int = 100,
    batch_size: int = 32,
    beta: float = 0.1,
    retain_weight: float = 1.0,
    rho: float = 0.0,
) -> Recipe:
    """NPO on the sequence-summed log-ratio plus cross-entropy on the retain set; ``rho > 0`` adds SAM on the forget term."""
    objective = Objective(npo(beta), retain_cross_entropy, 1.0, retain_weight)
    return Recipe(objective, EVERYTHING, steps, batch_size, lr, step=sam(rho) if rho else plain)


def build_sam(model: PreTrainedModel, seed: int, *, rho: float = 0.01, **settings: Setting) -> Recipe:
    """NPO with SAM (Fan et al. 2025, arXiv 2502.05374)."""
    return build(model, seed, rho=rho, **settings)  # type: ignore[arg-type]


_SMALL: dict[str, Setting] = {"lr": 3e-4, "steps": 60, "batch_size": 16, "retain_weight": 3.0}
METHOD = Method("npo", "NPO", "Zhang et al. 2024 (arXiv 2404.05868)", build, _SMALL)
METHOD_SAM = Method("npo-sam", "NPO+SAM", "Fan et al. 2025 (arXiv 2502.05374)", build_sam, {**_SMALL, "rho": 0.02}, wraps=build)
