"""Disruption against forgetting: the path of every method as its delta is scaled up, and where the budget stops it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures.style import colour, look, methods_in, nothing, title


def disruption(table: pd.DataFrame) -> Figure:
    """Recall of held-out forget facts against disruption (KL to the base on retain texts) along ``theta0 + alpha * delta``.

    Thin lines are seeds; the marker is the chosen model, with the 95 % interval of its recall over seeds and facts and the range of its
    disruption over seeds.

    Args:
        table: tidy results; stages ``budget`` and ``unlearn``.
    """
    walks = table[(table["stage"] == "budget") & table["seed"].notna()]
    methods = methods_in(walks["method"].dropna().tolist())
    if not methods:
        return nothing("no line search in this table")
    chosen = table[table["stage"] == "unlearn"]
    with look():
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        floor = 1e-4
        for method in methods:
            for _, walk in walks[walks["method"] == method].groupby("seed"):
                cost = walk[walk["metric"] == "disruption"].set_index("step")["value"]
                kept = walk[(walk["metric"] == "recall") & (walk["split"] == "forget-heldout")].set_index("step")["value"]
                path = pd.DataFrame({"cost": cost, "kept": kept}).dropna().sort_index()
                axes.plot(path["cost"].clip(lower=floor), path["kept"], color=colour(method), alpha=0.45, linewidth=0.9)
            mine = chosen[chosen["method"] == method]
            cost = mine[(mine["metric"] == "disruption") & mine["split"].isna()]["value"]
            kept = mine[(mine["metric"] == "recall") & (mine["split"] == "forget-heldout") & mine["seed"].isna()]
            if len(kept) and len(cost):
                value, low, high = (float(kept[name].iloc[0]) for name in ("value", "low", "high"))
                x = max(float(cost.mean()), floor)
                axes.errorbar(
                    x, value, yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    xerr=[[max(0.0, x - max(float(cost.min()), floor))], [max(0.0, float(cost.max()) - x)]],
                    fmt="o", markersize=6, color=colour(method), label=title(method), capsize=2.5, zorder=3,
                )  # fmt: skip
        budget = chosen.loc[chosen["metric"] == "budget", "value"]
        if len(budget):
            axes.axvline(float(budget.iloc[0]), color="0.3", linestyle="--", linewidth=1)
            axes.text(float(budget.iloc[0]) * 1.05, 1.03, f"budget {float(budget.iloc[0]):g}", fontsize=8, color="0.3", va="top")
        axes.set_xscale("log")
        axes.set_xlim(left=floor, right=max(float(np.nanmax(walks.loc[walks["metric"] == "disruption", "value"])), 2 * floor) * 1.3)
        axes.set_ylim(-0.03, 1.06)
        axes.set_xlabel("disruption: KL(base || model) on retain texts, nats per token")
        axes.set_ylabel("recall of held-out forget facts")
        axes.legend(loc="lower left")
    return figure
