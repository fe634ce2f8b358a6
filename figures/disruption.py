"""Disruption against forgetting: the path of every method as its delta is scaled up, and where the
budget stops it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

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
    chosen = table[table["stage"] == "unlearn"]
    budget = chosen.loc[chosen["metric"] == "budget", "value"]
    size = (
        max(8.2, 5.4 + 0.3 * len(methods)),
        max(3.8, 0.24 * len(methods)),
    )  # room for the names of many methods
    with look():
        figure, ((left, right),) = subplots(figure, 1, 2, size, sharey=True, width_ratios=(1.7, 1))
        costs = walks.loc[walks["metric"] == "disruption", "value"]
        floor = max(1e-6, float(np.nanmin(costs[costs > 0])) / 3) if (costs > 0).any() else 1e-4
        for number, method in enumerate(methods):
            curves = [_path(walk) for _, walk in walks[walks["method"] == method].groupby("seed")]
            for curve in curves:
                left.plot(
                    curve["cost"].clip(lower=floor),
                    curve["kept"],
                    color=colour(method),
                    alpha=0.75,
                    linewidth=1.1,
                )
            mine = chosen[chosen["method"] == method]
            kept = mine[
                (mine["metric"] == "recall")
                & (mine["split"] == "forget-heldout")
                & mine["seed"].isna()
            ]
            if len(kept):
                value, low, high = (float(kept[name].iloc[0]) for name in ("value", "low", "high"))
                right.errorbar(
                    number,
                    value,
                    yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    fmt="o",
                    markersize=6,
                    color=colour(method),
                    capsize=3,
                )
            left.plot([], [], color=colour(method), label=title(method))
        if len(budget):
            left.axvline(float(budget.iloc[0]), color="0.3", linestyle="--", linewidth=1)
            left.annotate(
                f"budget {float(budget.iloc[0]):g}",
                (float(budget.iloc[0]), 1.05),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
                color="0.3",
            )
        left.set_xscale("log")
        left.set_xlim(left=floor)
        left.set_ylim(-0.03, 1.07)
        left.set_xlabel(_UNITS["loss-rise" if (walks["arm"] == "loss-rise").any() else "kl"])
        left.set_ylabel("recall of held-out forget facts")
        left.legend(loc="lower left")
        right.set_xticks(
            range(len(methods)),
            [title(method).replace(" without", "\nwithout") for method in methods],
            rotation=40,
            ha="right",
        )
        right.set_xlim(-0.6, len(methods) - 0.4)
        right.set_title("inside the budget (95 % over seeds and facts)")
        right.grid(axis="x", visible=False)
    return figure.figure


def _path(walk: pd.DataFrame) -> pd.DataFrame:
    """Disruption and recall of one line search, by alpha."""
    cost = walk[walk["metric"] == "disruption"].set_index("x")["value"]
    kept = walk[(walk["metric"] == "recall") & (walk["split"] == "forget-heldout")].set_index("x")[
        "value"
    ]
    return pd.DataFrame({"cost": cost, "kept": kept}).dropna().sort_index()
