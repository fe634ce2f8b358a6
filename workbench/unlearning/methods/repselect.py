"""RepSelect, single-shot: one forget gradient with its leading singular directions collapsed."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.errors import unknown
from workbench.subspaces.collapse import CollapseKind
from workbench.unlearning.objectives import Objective, negative_cross_entropy
from workbench.unlearning.recipe import (
    Count,
    Method,
    OneGradient,
    Rate,
    Recipe,
    Rows,
    StatisticsSet,
    mlp_weights,
)


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1.0,
    batch_size: Rows = 32,
    components: Count = 512,
    kind: CollapseKind = "soft",
    statistics: StatisticsSet = "forget",
    adversary_rank: int = 8,
    adversary_rate: float = 0.05,
) -> Recipe:
    """Minus the accumulated gradient of ``-CE(forget)`` after collapse on both sides, on all MLP
    matrices.

    Args:
        model: decides the modules.
        seed: unused; the method draws nothing.
        lr: global Frobenius length of the change. The published rate multiplies an unnormalised
            gradient; which length is right is decided by the budget.
        batch_size: sequences.
        components: singular directions per side.
        kind: ``hard``, ``soft`` or ``quadratic``.
        statistics: ``forget`` (the default of the paper) or ``retain`` (better on its RWKU,
            sycophancy and abuse sets).
        adversary_rank: rank of the adversary that learns the forget set first; 0 leaves it out.
        adversary_rate: its SGD rate.

    Raises:
        WorkbenchError: ``kind`` or ``statistics`` is none of these.
    """
    for what, value, allowed in (
        ("kind", kind, ("hard", "soft", "quadratic")),
        ("statistics", statistics, ("forget", "retain")),
    ):
        if value not in allowed:
            raise unknown(f"{what} of repselect", value, allowed)
    one_gradient = OneGradient(components, kind, statistics, adversary_rank, adversary_rate)
    trainable = mlp_weights(model, 0, model.config.num_hidden_layers - 1)
    return Recipe(
        Objective(negative_cross_entropy),
        trainable,
        1,
        batch_size,
        lr,
        "one-gradient",
        one=one_gradient,
    )


METHOD = Method(
    "repselect",
    "RepSelect",
    "Sondej, Yang and Mahdi 2026 (arXiv 2606.17168)",
    build,
    {"lr": 10.0, "batch_size": 16, "components": 16, "adversary_rate": 0.05},
    colour="#843C39",
)
