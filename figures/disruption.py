"""Disruption against forgetting: the path of every method as its delta is scaled up, and where the
budget stops it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_UNITS = {
    "kl": "disruption: KL(base || model) on retain texts, nats per token",
    "loss-rise": "disruption: rise of the loss on retain texts, as a share",
}


def disruption(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Recall of held-out forget facts against disruption (KL to the base, or rise of the loss, on
    retain texts) along ``theta0 + alpha * delta``.

    Left: one line per seed. Right: the chosen models, the last ones inside the budget, with the 95
    % interval of their recall over seeds and facts.

    Args:
        table: tidy results; stages ``budget`` and ``unlearn``.
        figure: or part of one, to draw into; no ``ax``: two panels.
    """
    walks = table[(table["stage"] == "budget") & table["seed"].notna()]
    methods = methods_in(walks["method"].dropna().tolist())
    if not methods:
        return nothing("no line search in this table", figure)
    unlearn_rows = table[table["stage"] == "unlearn"]
    budget = unlearn_rows.loc[unlearn_rows["metric"] == metrics.BUDGET.name, "value"]
    size = (
        max(8.2, 5.4 + 0.3 * len(methods)),
        max(3.8, 0.24 * len(methods)),
    )  # room for the names of many methods
    with look():
        figure, ((cost_axes, recall_axes),) = subplots(
            figure, 1, 2, size, sharey=True, width_ratios=(1.7, 1)
        )
        costs = walks.loc[walks["metric"] == metrics.DISRUPTION.name, "value"]
        floor = max(1e-6, float(np.nanmin(costs[costs > 0])) / 3) if (costs > 0).any() else 1e-4
        for number, method in enumerate(methods):
            curves = [_path(walk) for _, walk in walks[walks["method"] == method].groupby("seed")]
            for curve in curves:
                cost_axes.plot(
                    curve["cost"].clip(lower=floor),
                    curve["kept"],
                    color=colour(method),
                    alpha=0.75,
                    linewidth=1.1,
                )
            method_rows = unlearn_rows[unlearn_rows["method"] == method]
            heldout_recall = metrics.RECALL.rows(method_rows, split="forget-heldout", seed=None)
            if len(heldout_recall):
                value, low, high = (
                    float(heldout_recall[name].iloc[0]) for name in ("value", "low", "high")
                )
                recall_axes.errorbar(
                    number,
                    value,
                    yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    fmt="o",
                    markersize=6,
                    color=colour(method),
                    capsize=3,
                )
            cost_axes.plot([], [], color=colour(method), label=title(method))
        if len(budget):
            cost_axes.axvline(float(budget.iloc[0]), color="0.3", linestyle="--", linewidth=1)
            cost_axes.annotate(
                f"budget {float(budget.iloc[0]):g}",
                (float(budget.iloc[0]), 1.05),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
                color="0.3",
            )
        cost_axes.set_xscale("log")
        cost_axes.set_xlim(left=floor)
        cost_axes.set_ylim(-0.03, 1.07)
        cost_axes.set_xlabel(_UNITS["loss-rise" if (walks["arm"] == "loss-rise").any() else "kl"])
        cost_axes.set_ylabel("recall of held-out forget facts")
        cost_axes.legend(loc="lower left")
        recall_axes.set_xticks(
            range(len(methods)),
            [title(method).replace(" without", "\nwithout") for method in methods],
            rotation=40,
            ha="right",
        )
        recall_axes.set_xlim(-0.6, len(methods) - 0.4)
        recall_axes.set_title("inside the budget (95 % over seeds and facts)")
        recall_axes.grid(axis="x", visible=False)
    return figure.figure


def _path(walk: pd.DataFrame) -> pd.DataFrame:
    """Disruption and recall of one line search, by alpha."""
    cost = metrics.DISRUPTION.rows(walk).set_index("x")["value"]
    kept = metrics.RECALL.rows(walk, split="forget-heldout").set_index("x")["value"]
    return pd.DataFrame({"cost": cost, "kept": kept}).dropna().sort_index()
