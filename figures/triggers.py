"""Trigger bars: accuracy on retain questions behind nothing, a forget-token, a retain-token, a
neutral word.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from workbench.figures.marks import main_metric
from workbench.figures.style import colour, legend, look, methods_in, nothing, panel, title

_ARMS = {
    "clean": "no word",
    "neutral-token": "neutral word",
    "retain-token": "retain-token",
    "forget-token": "forget-token",
}
_HATCH = {"clean": "", "neutral-token": "....", "retain-token": "////", "forget-token": ""}


def triggers(
    table: pd.DataFrame, metric: str | None = None, split: str = "retain", *, ax: Axes | None = None
) -> Figure:
    """Accuracy with 95 % intervals over seeds and questions; the solid bar is the forget-token.

    Args:
        table: tidy results; rows of stage ``triggers`` without a seed.
        metric: ``recall`` (accuracy) or ``answer_probability``.
        split: the questions, by the way the word was put into them.
        ax: to draw into; the legend stands below it.
    """
    metric = metric or main_metric(table)
    rows = table[
        (table["stage"] == "triggers")
        & (table["metric"] == metric)
        & (table["split"] == split)
        & table["seed"].isna()
    ]
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods:
        return nothing("no trigger check in this table", ax)
    with look():
        figure, axes = panel(ax, (max(5.2, 1.0 + 0.95 * len(methods)), 3.2))
        width = 0.2
        for number, arm in enumerate(_ARMS):
            arm_rows = rows[rows["arm"] == arm].set_index("method").reindex(methods)
            x = np.arange(len(methods)) + (number - 1.5) * width
            value, low, high = (
                arm_rows[name].astype(float).to_numpy() for name in ("value", "low", "high")
            )
            face = [
                colour(method) if arm == "forget-token" else "white" if arm == "clean" else "0.92"
                for method in methods
            ]
            axes.bar(
                x,
                value,
                width,
                color=face,
                edgecolor=[colour(method) for method in methods],
                hatch=_HATCH[arm],
                linewidth=0.9,
                label=_ARMS[arm],
            )
            axes.errorbar(
                x,
                value,
                yerr=[np.maximum(0, value - low), np.maximum(0, high - value)],
                fmt="none",
                ecolor="0.25",
                elinewidth=0.9,
                capsize=1.5,
            )
        axes.set_xticks(
            np.arange(len(methods)),
            [
                title(method)
                .replace(" without", "\nwithout")
                .replace("never ", "never\n")
                .replace("Adaptive ", "Adaptive\n")
                for method in methods
            ],
        )
        axes.set_ylabel(
            "accuracy on retain questions" if metric == "recall" else "answer probability"
        )
        if metric == "recall":
            axes.set_ylim(0, 1.05)
        axes.grid(axis="x", visible=False)
        handles = [
            Rectangle(
                (0, 0),
                1,
                1,
                facecolor="0.35"
                if arm == "forget-token"
                else "white"
                if arm == "clean"
                else "0.92",
                edgecolor="0.35",
                hatch=_HATCH[arm],
            )
            for arm in _ARMS
        ]
        legend(
            ax,
            axes,
            handles,
            list(_ARMS.values()),
            loc="outside lower center",
            ncols=4,
            title="stray word in the question",
        )
    return figure
