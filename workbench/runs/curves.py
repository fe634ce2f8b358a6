"""Recovery curves in single numbers: how much comes back over a whole attack, and how soon."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench import metrics
from workbench.evaluation.statistics import area_under, rate
from workbench.tables import Table


def steps_to_recover(steps: np.ndarray, values: np.ndarray, target: float) -> float:
    """The first measured step at which a curve reaches ``target``; infinite where it never does.

    Between two measurements nothing is interpolated: the number says "at the latest here".

    Args:
        steps: ``[point]`` increasing.
        values: ``[point]``.
        target: usually half of what the base recalls.

    Raises:
        ValueError: the series differ in length or are empty.
    """
    steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if steps.shape != values.shape or not steps.size:
        raise ValueError(
            f"a curve needs as many values as steps, and at least one; got {len(values)} and "
            f"{len(steps)}"
        )
    reached = np.flatnonzero(values >= target)
    return float(steps[reached[0]]) if len(reached) else float("inf")


def curve_rows(items: pd.DataFrame, run: str, *, target: float, stage: str) -> pd.DataFrame:
    """Area under the recall curve and steps to reach ``target``, per model and arm.

    ``area_under_recovery`` is the mean recall over the attack's steps (trapezoid, divided by their
    range) with the two-level bootstrap over seeds and facts. ``steps_to_recover`` is one row per
    seed (its recall over facts) and, without a seed, the median; infinite values stand for "not
    within the attack".

    Args:
        items: items table.
        run: key of the run.
        target: recall to be reached.
        stage: the stage whose attacks are meant.
    """
    table = Table({"run": run, "stage": stage})
    attacks = items[items["stage"] == stage]
    for (method, split, arm), group in attacks.groupby(["method", "split", "arm"], sort=False):
        columns: dict[str, Any] = {"method": method, "model": method, "split": split, "arm": arm}
        cube = group.pivot_table(
            index=["seed", "item"], columns="x", values="correct", aggfunc="mean"
        )
        if cube.shape[1] < 2 or cube.isna().any().any():
            continue
        steps = cube.columns.to_numpy(dtype=float)
        areas = pd.Series(
            [area_under(steps, row) for row in cube.to_numpy(dtype=float)], index=cube.index
        ).unstack("item")
        if areas.notna().all().all():
            table.add_estimate(metrics.AREA_UNDER_RECOVERY, rate(areas.to_numpy()), **columns)
        soonest = []
        for seed, curve in cube.groupby(level="seed"):
            soonest.append(steps_to_recover(steps, curve.mean().to_numpy(dtype=float), target))
            table.add(metrics.STEPS_TO_RECOVER, soonest[-1], seed=seed, **columns)
        table.add(metrics.STEPS_TO_RECOVER, float(np.median(soonest)), n=len(soonest), **columns)
    return table.frame()
