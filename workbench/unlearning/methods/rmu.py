"""Representation misdirection: RMU, Adaptive RMU and random steering vectors (RSV)."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.hooks import resolve
from workbench.unlearning.objectives import Objective
from workbench.unlearning.recipe import (
    Descent,
    Layer,
    Method,
    Rate,
    Recipe,
    Rows,
    Setting,
    Steps,
    down_projections,
    gradient_optimiser,
    middle_layer,
)
from workbench.unlearning.representation import (
    adaptive_steer_to,
    control_vector,
    keep_representation,
    steer_by,
    steer_to,
)


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 5e-5,
    steps: Steps = 150,
    batch_size: Rows = 4,
    steering: float = 6.5,
    retain_weight: float = 1200.0,
    layer: Layer = -1,
    optimiser: Descent = "adamw",
) -> Recipe:
    """Steer forget representations of one block to ``steering * u``, keep retain representations
    (Li et al. 2024, arXiv 2403.03218).

    Only the MLP down projections of that block and the two below change. ``u`` is an isotropic unit
    vector drawn from ``seed``.

    Args:
        model: decides width and depth.
        seed: of the control vector.
        lr: AdamW's rate.
        steps: optimiser steps.
        batch_size: sequences.
        steering: ``c``, in units of the representation's length. The published 6.5 is for 7B
            models.
        retain_weight: ``alpha``.
        layer: block whose output is steered; -1 takes 7/32 of the depth.
        optimiser: ``adamw`` or ``sgd``; without Adam's second moment, noise on a squared-error
            target leaves the expected step as it is.
    """
    block = middle_layer(model) if layer < 0 else layer
    (site,) = resolve(model, f"blocks.{block}.hook_resid_post")
    width = model.config.hidden_size
    objective = Objective(
        steer_to(site, steering * control_vector(width, seed)),
        keep_representation(site),
        1.0,
        retain_weight,
    )
    return Recipe(
        objective,
        down_projections(model, max(0, block - 2), block),
        steps,
        batch_size,
        lr,
        optimiser=gradient_optimiser(optimiser),
    )


def build_adaptive(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 5e-5,
    steps: Steps = 500,
    batch_size: Rows = 4,
    scale: float = 5.0,
    retain_weight: float = 1200.0,
    layer: Layer = -1,
    optimiser: Descent = "adamw",
) -> Recipe:
    """Adaptive RMU (Dang et al. 2025): the target's length is ``scale`` times the mean length of
    the forget representations, so it fits any layer and model.
    """
    block = middle_layer(model) if layer < 0 else layer
    (site,) = resolve(model, f"blocks.{block}.hook_resid_post")
    steer = adaptive_steer_to(site, control_vector(model.config.hidden_size, seed), scale)
    objective = Objective(steer, keep_representation(site), 1.0, retain_weight)
    return Recipe(
        objective,
        down_projections(model, max(0, block - 2), block),
        steps,
        batch_size,
        lr,
        optimiser=gradient_optimiser(optimiser),
    )


def build_rsv(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 5e-5,
    steps: Steps = 500,
    batch_size: Rows = 4,
    steering: float = 10.0,
    retain_weight: float = 5000.0,
    layer: Layer = -1,
    optimiser: Descent = "adamw",
) -> Recipe:
    """Random steering vectors: ``h`` is moved to ``h_base + c s`` with one isotropic unit vector
    ``s``, not to a common point.
    """
    block = middle_layer(model) if layer < 0 else layer
    (site,) = resolve(model, f"blocks.{block}.hook_resid_post")
    steer = steer_by(site, steering * control_vector(model.config.hidden_size, seed))
    objective = Objective(steer, keep_representation(site), 1.0, retain_weight)
    return Recipe(
        objective,
        down_projections(model, max(0, block - 2), block),
        steps,
        batch_size,
        lr,
        optimiser=gradient_optimiser(optimiser),
    )


_SMALL: dict[str, Setting] = {
    "lr": 3e-3,
    "steps": 80,
    "batch_size": 16,
    "steering": 300.0,
    "retain_weight": 10.0,
    "layer": 2,
}
METHOD = Method("rmu", "RMU", "Li et al. 2024 (arXiv 2403.03218)", build, _SMALL, colour="#D55E00")
METHOD_ADAPTIVE = Method(
    "adaptive-rmu",
    "Adaptive RMU",
    "Dang et al. 2025 (arXiv 2408.06223)",
    build_adaptive,
    {"lr": 3e-3, "steps": 80, "batch_size": 16, "scale": 5.0, "retain_weight": 10.0, "layer": 2},
    colour="#E7969C",
)
METHOD_RSV = Method(
    "rsv",
    "RSV",
    "Huu-Tien et al. (arXiv 2501.19202)",
    build_rsv,
    {
        "lr": 1e-2,
        "steps": 80,
        "batch_size": 16,
        "steering": 300.0,
        "retain_weight": 3.0,
        "layer": 2,
    },
    colour="#AD494A",
)
