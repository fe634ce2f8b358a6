"""The loss around one model in rows of a table: slices, ends of the Hessian's spectrum, worst and
average cases, trace, density, and the way an attack takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor
from transformers import PreTrainedModel

from workbench import metrics
from workbench.attacks.relearn import RelearnSettings, relearn
from workbench.data.batches import Batch
from workbench.data.records import Example, one_per_item
from workbench.errors import WorkbenchError
from workbench.runs.setup import Setup
from workbench.sharpness.average import mean_changes, noise_changes
from workbench.sharpness.curvature import Curvature, extremes
from workbench.sharpness.density import Density, both_signs, quadrature
from workbench.sharpness.drop import worst_case
from workbench.sharpness.krylov import lanczos
from workbench.sharpness.paths import barriers, line_losses, path_losses
from workbench.sharpness.planes import coordinates, loss_plane, trajectory_plane
from workbench.sharpness.slices import (
    Direction,
    descent_direction,
    loss_slice,
    random_direction,
    scaled,
)
from workbench.sharpness.trace import rademacher, trace
from workbench.tables import Table
from workbench.unlearning.deltas import norm_of, snapshot

ATTACKED, HELD_OUT, NOVEL = "forget-attacked", "forget-heldout", "novel"
"""The loss that an attacker follows, the one that shows whether others come back, and the control
that nobody has read.
"""

ATTACK_PATH = "attack path"
"""Arm of the rows along the relearning attack."""

LossBatches = Mapping[str, Sequence[Batch]]


def losses_of(setup: Setup, novel: Sequence[Example] = ()) -> dict[str, list[Batch]]:
    """Answer losses by name: both halves of the forget set, the retain sets that have answers,
    novel facts.
    """
    record = setup.record
    sets = {
        ATTACKED: record.forget_attacked,
        HELD_OUT: record.forget_heldout,
        **record.retain_test,
        NOVEL: novel,
    }
    return {
        name: setup.encode(one_per_item(texts), answers=True)
        for name, texts in sets.items()
        if texts and name != record.general
    }


def towards(model: PreTrainedModel, other: PreTrainedModel) -> dict[str, Tensor]:
    """``theta_other - theta`` in float32."""
    return {
        name: there.detach().float() - here.detach().float()
        for (name, here), there in zip(model.named_parameters(), other.parameters(), strict=True)
    }


def add_slices(
    model: PreTrainedModel,
    setup: Setup,
    losses: LossBatches,
    table: Table,
    *,
    points: int,
    reach: float,
    seed: int,
) -> None:
    """One-dimensional slices through the model.

    Directions: ``descent`` (minus the gradient of the attacker's loss), ``random``
    (filter-normalised), both in shares of the weights' norm, and ``to-base`` (0 is
    this model, 1 is the base).
    """
    size = norm_of(snapshot(model))
    walks: dict[str, tuple[Direction, np.ndarray]] = {
        "descent": (
            scaled(descent_direction(model, losses[ATTACKED]), size),
            np.linspace(-reach, reach, points),
        ),
        "random": (scaled(random_direction(model, seed), size), np.linspace(-reach, reach, points)),
    }
    to_base = towards(model, setup.base)
    if norm_of(to_base) > 0:
        walks["to-base"] = (to_base, np.linspace(-0.5, 1.5, points))
    for arm, (direction, positions) in walks.items():
        for split, values in loss_slice(model, direction, positions.tolist(), losses).items():
            for position, value in zip(positions.tolist(), values, strict=True):
                table.add(
                    metrics.SLICE_LOSS,
                    value,
                    stage="sharpness",
                    split=split,
                    arm=arm,
                    position=position,
                )
    table.add(metrics.WEIGHT_NORM, size, stage="sharpness")


def whole_batch(setup: Setup) -> list[Batch]:
    """The held-out forget answers in one batch: a Hessian-vector product then costs two gradients
    instead of three.
    """
    return setup.encode(
        one_per_item(setup.record.forget_heldout),
        answers=True,
        rows=len(setup.record.forget_heldout),
    )


def add_ends(
    model: PreTrainedModel,
    texts: Sequence[Batch],
    table: Table,
    *,
    tolerance: float,
    seed: int,
    **columns: object,
) -> None:
    """Both ends of the spectrum of the Hessian of the held-out forget loss with their residuals,
    and the gradient norm.
    """
    place: dict[str, Any] = {"stage": "sharpness", "split": HELD_OUT, **columns}
    try:
        ends = extremes(model, texts, seed=seed, tolerance=tolerance)
    except WorkbenchError:
        for metric in (
            "top_eigenvalue",
            "bottom_eigenvalue",
        ):  # an empty value with its reason beside it is a result; a made-up one is not
            table.add(metric, np.nan, n=0, **place)
        return
    tokens = sum(int(batch.target_mask[:, 1:].sum()) for batch in texts)
    for metric, value in (
        ("top_eigenvalue", ends.top),
        ("bottom_eigenvalue", ends.bottom),
        ("gradient_norm", ends.gradient_norm),
    ):
        table.add(metric, value, n=tokens, **place)
    table.add(metrics.TOP_RESIDUAL, ends.top_residual, **place)
    table.add(metrics.BOTTOM_RESIDUAL, ends.bottom_residual, **place)


def add_worst_cases(
    model: PreTrainedModel,
    losses: LossBatches,
    table: Table,
    *,
    displacement: float,
    size: float,
    radii: Sequence[float],
    fixed: Sequence[float],
    steps: int,
    seed: int,
) -> None:
    """Worst-case drops in balls of the displacement by unlearning (``drop``, and ``drop, one
    step``) and of one size for all models (``drop, fixed radius``, ``adaptive drop``), and SAM's
    rise (``rise``); what every other loss does at the same point.

    Args:
        model: in evaluation mode.
        losses: of :func:`losses_of`.
        table: gets rows of metric ``drop``.
        displacement: length of ``theta_u - theta_0``; at 0 the first two are left out.
        size: length that ``fixed`` is a share of: the base's weights.
        radii: in displacements.
        fixed: in shares of ``size``; for the adaptive ball relative to every weight.
        steps: of the search.
        seed: where a gradient is exactly zero.
    """

    def add(arm: str, worst_cases: pd.DataFrame) -> None:
        for row in worst_cases.to_dict("records"):
            table.add(
                metrics.DROP,
                float(row["value"]),
                stage="sharpness",
                arm=arm,
                split=str(row["loss"]),
                radius=float(row["rho"]),
            )

    if displacement > 0:
        worst_cases = worst_case(
            model, losses, ATTACKED, radii, unit=displacement, steps=(1, steps), seed=seed
        )
        add("drop", worst_cases[worst_cases["steps"] == steps])
        add("drop, one step", worst_cases[worst_cases["steps"] == 1])
    add(
        "drop, fixed radius",
        worst_case(model, losses, ATTACKED, fixed, unit=size, steps=(steps,), seed=seed),
    )
    add(
        "adaptive drop",
        worst_case(
            model, losses, ATTACKED, fixed, unit=size, steps=(steps,), adaptive=True, seed=seed
        ),
    )
    add(
        "rise",
        worst_case(model, losses, ATTACKED, fixed, unit=size, steps=(1,), kind="rise", seed=seed),
    )


def add_average(
    model: PreTrainedModel,
    losses: LossBatches,
    table: Table,
    *,
    size: float,
    relative: Sequence[float],
    draws: int,
) -> None:
    """The mean change of every loss under Gaussian noise whose length is a share of ``size``; the
    draws are the same for all models.
    """
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    unit = size / count**0.5
    for row in mean_changes(
        noise_changes(model, losses, [share * unit for share in relative], draws=draws)
    ).to_dict("records"):
        mean, half = float(row["mean"]), 1.96 * float(row["se"])
        table.add(
            metrics.NOISE_CHANGE,
            mean,
            low=mean - half,
            high=mean + half,
            n=int(row["draws"]),
            stage="sharpness",
            split=str(row["loss"]),
            noise=float(row["sigma"]) / unit,
        )


def add_line(
    model: PreTrainedModel, setup: Setup, losses: LossBatches, table: Table, *, points: int
) -> None:
    """Barriers on the straight line to the base, and where the loss has come down to half."""
    line = line_losses(
        model, towards(model, setup.base), np.linspace(0, 1, points).tolist(), losses
    )
    for row in barriers(line).to_dict("records"):
        for metric in ("barrier", "midpoint", "half_at"):
            table.add(f"{metric}_to_base", row[metric], stage="sharpness", split=row["loss"])


_LAYER = re.compile(r"(?:layers|h|blocks)\.(\d+)\.(.*)")


def module_of(parameter: str) -> str:
    """``blocks.N.attn``, ``blocks.N.mlp``, ``blocks.N.norm``, ``embed``, ``unembed`` or ``norm``:
    the part of a model that a parameter belongs to.
    """
    match = _LAYER.search(parameter)
    if match:
        part = match.group(2).lower()
        return f"blocks.{match.group(1)}." + (
            "norm"
            if "norm" in part or part.startswith("ln")
            else "attn"
            if "attn" in part or "attention" in part
            else "mlp"
        )
    if "norm" in parameter or "ln_f" in parameter:
        return "norm"
    return "unembed" if "lm_head" in parameter or "embed_out" in parameter else "embed"


def add_trace(
    model: PreTrainedModel,
    texts: Sequence[Batch],
    table: Table,
    *,
    probes: int,
    seed: int,
    arm: str,
) -> None:
    """Hutchinson's trace with its standard error and its running mean over probes, and the mean
    eigenvalue of every module.
    """
    hessian_trace = trace(
        model, texts, seed=seed, relative_se=0, min_probes=min(probes, 10), max_products=probes
    )
    place: dict[str, Any] = {"stage": "sharpness", "split": HELD_OUT, "arm": arm}
    table.add(
        metrics.TRACE,
        hessian_trace.value,
        low=hessian_trace.value - 1.96 * hessian_trace.se,
        high=hessian_trace.value + 1.96 * hessian_trace.se,
        n=hessian_trace.n,
        **place,
    )
    table.add(metrics.TRACE_SE, hessian_trace.se, **place)
    sums = hessian_trace.samples.sum(1)
    for count in range(2, hessian_trace.n + 1):
        mean, half = float(sums[:count].mean()), 1.96 * float(sums[:count].std(ddof=1)) / count**0.5
        table.add(
            metrics.RUNNING_TRACE, mean, low=mean - half, high=mean + half, probes=count, **place
        )
    blocks = hessian_trace.by_block()
    for name, rows in blocks.groupby(blocks["block"].map(module_of), sort=False):
        table.add(
            metrics.MODULE_EIGENVALUE,
            float(rows["trace"].sum() / rows["weights"].sum()),
            site=str(name),
            n=int(rows["weights"].sum()),
            **place,
        )


def add_density(
    model: PreTrainedModel,
    texts: Sequence[Batch],
    table: Table,
    *,
    probes: int,
    steps: int,
    seed: int,
    arm: str,
) -> None:
    """The nodes of the spectral density (metric ``density_node``, over eigenvalue and random
    vector), and Ritz values along Lanczos's steps.

    All models of a run are drawn on one grid, so the curves are made when all are known:
    :func:`density_curves`.
    """
    operator = Curvature(model, texts)
    try:
        spectral_density = quadrature(
            operator.product, operator.size, seed=seed, probes=probes, steps=steps
        )
        krylov = lanczos(operator.product, rademacher(seed, 0, operator.size), steps)
    finally:
        operator.release()
    place: dict[str, Any] = {"stage": "sharpness", "split": HELD_OUT, "arm": arm}
    for node, weight, probe in zip(
        spectral_density.nodes.tolist(),
        spectral_density.weights.tolist(),
        spectral_density.probe.tolist(),
        strict=True,
    ):
        table.add(metrics.DENSITY_NODE, weight, eigenvalue=node, probe=probe, **place)
    for metric in ("moment_error", "negative_energy"):
        table.add(metric, getattr(spectral_density, metric), n=spectral_density.products, **place)
    for step_counts in range(2, len(krylov.alphas) + 1):
        values = eigh_tridiagonal(
            krylov.alphas[:step_counts], krylov.betas[: step_counts - 1], eigvals_only=True
        )
        if arm == "unlearned":
            table.add(
                metrics.RITZ,
                float(values[-1]),
                stage="sharpness",
                split=HELD_OUT,
                arm="top",
                lanczos_step=step_counts,
            )
            table.add(
                metrics.RITZ,
                float(values[0]),
                stage="sharpness",
                split=HELD_OUT,
                arm="bottom",
                lanczos_step=step_counts,
            )


def density_curves(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
    """Spectral densities of all models on one grid (metric ``density``, range over probes as
    ``low`` and ``high``).
    """
    table = Table({"run": key})
    nodes = metrics.DENSITY_NODE.rows(rows)
    if not len(nodes):
        return table.frame()
    bottom, top = float(nodes["x"].min()), float(nodes["x"].max())
    linear = 1e-3 * max(abs(bottom), abs(top))
    points = both_signs(bottom, top, linear)
    columns = ["stage", "model", "method", "seed", "split", "arm"]

    def columns_of(values: Any) -> dict[str, Any]:
        return dict(zip(columns, values, strict=True))

    for values, group_nodes in nodes.groupby(columns, sort=False, dropna=False):
        spectral_density = Density(
            group_nodes["x"].to_numpy(float),
            group_nodes["value"].to_numpy(float),
            group_nodes["y"].to_numpy(np.int64),
            1,
            0.0,
            0.0,
            0,
        )
        lines = spectral_density.smoothed(points, linear)
        for point, value, low, high in zip(
            points, lines.mean(0), lines.min(0), lines.max(0), strict=True
        ):
            table.add(
                metrics.DENSITY,
                value,
                low=low,
                high=high,
                eigenvalue=float(point),
                **columns_of(values),
            )
    return table.frame()


def add_attack_path(
    model: PreTrainedModel,
    setup: Setup,
    losses: LossBatches,
    texts: Sequence[Example],
    settings: RelearnSettings,
    table: Table,
    *,
    seed: int,
    points: int,
) -> PreTrainedModel:
    """The path that the relearning attack takes: losses along it, the shares of its principal
    components beside a random walk's, and the plane of relearned model and base.

    In the plane the unlearned model is at (0, 0), the relearned one at (1, 0) and the base at (0,
    1).

    Returns:
        The relearned model.
    """
    start, deltas, steps = snapshot(model), [], []

    often = sorted(
        {
            step
            for step in (1, 2, 3, 5, 7, 10, 14, 20, 30, *settings.measure_at)
            if 0 < step <= settings.steps
        }
        | {settings.steps}
    )
    attack_settings = replace(settings, measure_at=tuple(often))
    attack = relearn(
        model, setup.tokenizer, texts, attack_settings, seed=seed, max_length=setup.max_length
    )
    for step, attacked in attack:
        deltas.append(
            {
                name: parameter.detach().float() - start[name].float()
                for name, parameter in attacked.named_parameters()
            }
        )
        steps.append(step)
    relearned = attacked
    for row in path_losses(model, deltas, losses).to_dict("records"):
        step = [0, *steps][int(row["checkpoint"])]
        at: dict[str, Any] = {"stage": "sharpness", "arm": ATTACK_PATH, "attack_step": step}
        table.add(metrics.PATH_LOSS, float(row["value"]), split=str(row["loss"]), **at)
        if row["loss"] == HELD_OUT:
            table.add(metrics.PATH_DISTANCE, float(row["distance"]), **at)
            table.add(metrics.PATH_TRAVELLED, float(row["travelled"]), **at)
    if len(deltas) > 1:
        for share in trajectory_plane(deltas).shares.head(4).to_dict("records"):
            for arm, name in ((ATTACK_PATH, "share"), ("random walk", "null")):
                number = float(share["component"])
                table.add(
                    metrics.TRAJECTORY_SHARE,
                    float(share[name]),
                    stage="sharpness",
                    arm=arm,
                    component=number,
                )
    to_base = towards(model, setup.base)
    if not norm_of(to_base) or not norm_of(deltas[-1]):
        return relearned
    shown_losses = {name: losses[name] for name in (HELD_OUT, "retain-neighbour") if name in losses}
    places = np.linspace(-0.5, 1.5, points).tolist()
    grid = loss_plane(model, deltas[-1], to_base, places, places, shown_losses)
    for point in grid.to_dict("records"):
        table.add(
            metrics.PLANE_LOSS,
            float(point["value"]),
            stage="sharpness",
            split=str(point["loss"]),
            along_attack=float(point["x"]),
            towards_base=float(point["y"]),
        )
    unit = norm_of(deltas[-1])
    step_deltas = {str(step): delta for step, delta in zip(steps, deltas, strict=True)}
    for place in coordinates(step_deltas, deltas[-1], to_base).to_dict("records"):
        at = {"stage": "sharpness", "arm": ATTACK_PATH, "attack_step": int(place["point"])}
        table.add(metrics.PLANE_ALONG, float(place["x"]), **at)
        table.add(metrics.PLANE_TOWARDS, float(place["y"]), **at)
        table.add(metrics.PLANE_OFF, float(place["residual"]) / unit, **at)
    return relearned


@torch.no_grad()
def distance_between(model: PreTrainedModel, base: PreTrainedModel) -> float:
    """``||theta - theta_0||``."""
    return norm_of(towards(model, base))
