"""CIR: the collapsed update (Sondej and Yang 2025, arXiv 2509.11816), and the same update without
collapse as its control.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from workbench.errors import unknown
from workbench.hooks import resolve
from workbench.subspaces.collapse import CollapseKind
from workbench.unlearning.objectives import Objective, npo
from workbench.unlearning.recipe import (
    CollapseSettings,
    Count,
    Layer,
    Method,
    Rate,
    Recipe,
    Rows,
    Setting,
    StatisticsSet,
    Steps,
    mlp_weights,
    refuse_experts,
)
from workbench.unlearning.representation import keep_hidden, mlp_breaking


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 0.2,
    steps: Steps = 160,
    batch_size: Rows = 32,
    activation_components: int = 24,
    gradient_components: int = 36,
    refresh: Count = 11,
    retain_rate: float = 3e-4,
    first_layer: Layer = -1,
    last_layer: Layer = -1,
    loss: Literal["mlp-breaking", "npo"] = "mlp-breaking",
    kind: CollapseKind = "hard",
    statistics: StatisticsSet = "forget",
) -> Recipe:
    """A forget gradient collapsed on both sides, in steps of fixed global length; a retain step on
    the hidden state after each.

    Args:
        model: decides the depth.
        seed: unused; the method draws nothing.
        lr: global Frobenius length of every forget step.
        steps: forget steps.
        batch_size: sequences.
        activation_components: directions of the inputs left alone, mean included; 0 collapses
            nothing.
        gradient_components: directions of the output gradients left alone, likewise.
        refresh: steps between two statistics passes (one epoch in the paper).
        retain_rate: plain SGD rate on the retain term.
        first_layer: first broken MLP; -1 takes 6/32 of the depth.
        last_layer: last broken MLP; -1 takes 11/32 of the depth, at least one block.
        loss: ``mlp-breaking`` (the paper) or ``npo``, the saturating likelihood objective of its
            successor RepSelect (beta 0.1, sum per sequence).
        kind: ``hard`` (the paper), ``soft`` or ``quadratic`` collapse.
        statistics: ``forget`` (the paper) or ``retain``: the set whose common directions are left
            alone.

    Raises:
        WorkbenchError: ``loss``, ``kind`` or ``statistics`` is none of these.
    """
    for what, value, allowed in (
        ("kind", kind, ("hard", "soft", "quadratic")),
        ("statistics", statistics, ("forget", "retain")),
    ):
        if value not in allowed:
            raise unknown(f"{what} of cir", value, allowed)
    depth = model.config.num_hidden_layers
    first = round(depth * 6 / 32) if first_layer < 0 else first_layer
    last = (
        min(depth - 1, max(first, round(depth * 11 / 32)))
        if last_layer < 0
        else min(last_layer, depth - 1)
    )
    broken = resolve(model, f"blocks.{{{first}..{last}}}.mlp.hook_out")
    (kept_site,) = resolve(
        model,
        f"blocks.{min(last + 1, depth - 1)}.hook_resid_pre"
        if last + 1 < depth
        else f"blocks.{last}.hook_resid_post",
    )
    sizes = activation_components, gradient_components
    collapse = CollapseSettings(*sizes, refresh, kind, statistics) if any(sizes) else None
    if collapse is not None:
        refuse_experts(model, "a collapsed update")
    trainable = mlp_weights(model, 0, min(last, depth - 1))
    losses = {"mlp-breaking": mlp_breaking(broken), "npo": npo(0.1)}
    if loss not in losses:
        raise unknown("loss of cir", loss, losses)
    return Recipe(
        Objective(losses[loss], keep_hidden(kept_site)),
        trainable,
        steps,
        batch_size,
        lr,
        "normalised-sgd",
        collapse=collapse,
        retain_rate=retain_rate,
    )


def build_uncollapsed(model: PreTrainedModel, seed: int, **settings: Setting) -> Recipe:
    """The same objective, modules, step length and retain step, with nothing collapsed."""
    return build(model, seed, **settings)  # type: ignore[arg-type]


SOURCE = "Sondej and Yang 2025 (arXiv 2509.11816)"
# MLP breaking does not separate forgotten people from their neighbours in models this narrow
# (docs/results/demo.md); the likelihood objective does.
SMALL: dict[str, Setting] = {
    "loss": "npo",
    "lr": 0.3,
    "steps": 80,
    "batch_size": 16,
    "activation_components": 16,
    "gradient_components": 16,
    "refresh": 20,
    "retain_rate": 0.1,
    "first_layer": 0,
    "last_layer": 99,
}
_NOTHING: dict[str, Setting] = {"activation_components": 0, "gradient_components": 0}
METHOD = Method("cir", "CIR", SOURCE, build, SMALL, colour="#009E73")
METHOD_UNCOLLAPSED = Method(
    "cir-uncollapsed",
    "CIR without collapse",
    SOURCE,
    build_uncollapsed,
    SMALL,
    wraps=build,
    fixed=_NOTHING,
    colour="#B8A500",
)
