"""How much more does a forget-token cost an unlearned model than another name does, by the way and
the number of times it is put into a question?
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.figures.style import colour, legend, look, methods_in, nothing, panel, title

_NAMES = {
    "retain": "speaker tag\nin front",
    "retain, bare word in front": "bare word\nin front",
    "retain, bare word inside": "bare word\ninside",
    "retain, 2 words inside": "2 copies\ninside",
    "retain, 4 words inside": "4 copies\ninside",
}


def dose(table: pd.DataFrame, metric: str = "trigger_effect", *, ax: Axes | None = None) -> Figure:
    """Effect of a forget-token beyond a retain-token's, beyond the base's, with 95 % intervals over
    seeds and questions; one column of points per way of putting it in.

    Args:
        table: tidy results of ``workbench triggers``; stage ``triggers``, ``split`` the way.
        metric: ``trigger_effect`` (accuracy) or ``trigger_effect_probability``.
        ax: to draw into; the legend stands below it.
    """
    rows = table[
        (table["stage"] == "triggers") & (table["metric"] == metric) & table["seed"].isna()
    ]
    methods = methods_in(rows["method"].dropna().tolist())
    splits = [split for split in _NAMES if (rows["split"] == split).any()]
    if not methods or not splits:
        return nothing("no effect of a forget-token in this table", ax)
    with look():
        figure, axes = panel(ax, (max(5.0, 1.5 * len(splits) + 0.2 * len(methods)), 3.2))
        axes.axhline(0, color="0.4", linewidth=0.9)
        spread = 0.7 / len(methods)
        for number, method in enumerate(methods):
            method_rows = rows[rows["method"] == method].set_index("split").reindex(splits)
            x = np.arange(len(splits)) + (number - (len(methods) - 1) / 2) * spread
            value, low, high = (
                method_rows[name].astype(float).to_numpy() for name in ("value", "low", "high")
            )
            bars = [np.maximum(0, value - low), np.maximum(0, high - value)]
            axes.errorbar(
                x,
                value,
                yerr=bars,
                fmt="o",
                markersize=4,
                color=colour(method),
                capsize=2,
                linewidth=1.1,
                label=title(method),
            )
        axes.set_xticks(np.arange(len(splits)), [_NAMES[split] for split in splits])
        axes.set_ylabel("accuracy lost to a forget-token\n(beyond another name, beyond the base)")
        axes.grid(axis="x", visible=False)
        legend(ax, axes, *axes.get_legend_handles_labels(), loc="outside right upper")
    return figure
