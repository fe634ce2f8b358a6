"""What each smoothing does to each method: recall of the plain method minus that of the smoothed
one, before the attack and after it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from workbench import metrics
from workbench.figures.resistance import family_and_smoothing
from workbench.figures.style import colour, grid, look, methods_in, nothing, title


def smoothing(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """One panel per plain method, one row per smoothing: hollow before the attack (negative: it had
    forgotten less), filled at the attack's end (positive: it resists better).

    Intervals are 95 % over seeds and facts, paired. Both at zero is no effect at this disruption.

    Args:
        table: tidy results; metric ``smoothing_effect`` by smoothed method and step.
        figure: or part of one, to draw into; no ``ax``: one panel per plain method.
    """
    rows = table[
        (table["metric"] == metrics.SMOOTHING_EFFECT.name)
        & table["seed"].isna()
        & (table["split"].fillna("forget-heldout") == "forget-heldout")
    ]
    if not len(rows):
        return nothing("no method with and without smoothing in this table", figure)
    names = [family_and_smoothing(method) for method in rows["method"]]
    rows = rows.assign(
        plain=[plain for plain, _ in names], wrapper=[wrapper.upper() for _, wrapper in names]
    )
    plain = methods_in(rows["plain"].tolist())
    wrappers = list(dict.fromkeys(rows["wrapper"]))
    reach = 1.08 * max(float(rows[["low", "high"]].abs().max().max()), 0.02)
    with look():
        figure, panels = grid(
            figure,
            len(plain),
            columns=5,
            width=max(2.3, 4.0 / len(plain)),
            height=0.9 + 0.3 * len(wrappers),
        )
        for axes, method in zip(panels, plain, strict=True):
            method_rows = rows[rows["plain"] == method]
            for offset, step, face in (
                (0.15, method_rows["x"].min(), "white"),
                (-0.15, method_rows["x"].max(), colour(method)),
            ):
                part = method_rows[method_rows["x"] == step].set_index("wrapper").reindex(wrappers)
                value, low, high = (
                    part[name].to_numpy(dtype=float) for name in ("value", "low", "high")
                )
                axes.errorbar(
                    value,
                    np.arange(len(wrappers))[::-1] + offset,
                    xerr=np.maximum([value - low, high - value], 0),
                    fmt="o",
                    markersize=4.5,
                    color=colour(method),
                    markerfacecolor=face,
                    capsize=2,
                    linewidth=1,
                )
            axes.set_xlim(-reach, reach)
            axes.axvline(0, color="0.6", linewidth=0.8)
            axes.set_title(title(method), color=colour(method), fontweight="bold")
            axes.set_yticks(np.arange(len(wrappers))[::-1], wrappers)
            axes.set_ylim(-0.5, len(wrappers) - 0.5)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("recall: plain minus smoothed")
        handles = [
            Line2D(
                [], [], color="0.25", marker="o", linewidth=1, markersize=4.5, markerfacecolor=face
            )
            for face in ("white", "0.25")
        ]
        figure.legend(
            handles, ["before the attack", "after it"], loc="outside lower center", ncols=2
        )
    return figure.figure
