"""Does a scan of all tokens find the forgotten names? Precision against recall for every method,
beside chance.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_ARMS = {"scan": "by the rise of the answer's loss", "scan, shift": "by the shift of the stream"}


def scan(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Two panels: precision against recall of the known forget-tokens, tokens ranked by what they
    do to the answer's loss and to the stream. One step line per seed.

    Args:
        table: tidy results; stage ``triggers``, metrics ``precision`` (along the recall) and
            ``average_precision`` with the arm ``chance``.
        figure: or part of one, to draw into; no ``ax``: one panel per ranking.
    """
    rows = table[
        (table["stage"] == "triggers") & table["metric"].isin(["precision", "average_precision"])
    ]
    curves = rows[(rows["metric"] == metrics.PRECISION.name) & rows["seed"].notna()]
    methods = methods_in(curves["method"].dropna().tolist())
    arms = [arm for arm in _ARMS if (curves["arm"] == arm).any()]
    if not methods:
        return nothing("no scan for triggers in this table", figure)
    with look():
        figure, panels = subplots(
            figure,
            1,
            len(arms),
            (3.6 * len(arms) + 1.9, 3.1 + 0.09 * len(methods)),
            sharey=True,
        )
        chance = metrics.AVERAGE_PRECISION.rows(rows, arm="chance")["value"]
        for axes, arm in zip(panels[0], arms, strict=True):
            for method in methods:
                curve = curves[(curves["method"] == method) & (curves["arm"] == arm)]
                areas = rows[
                    (rows["metric"] == metrics.AVERAGE_PRECISION.name)
                    & (rows["method"] == method)
                    & (rows["arm"] == arm)
                    & rows["seed"].notna()
                ]["value"]
                for number, (_, line) in enumerate(curve.groupby("seed", sort=True)):
                    line = line.sort_values("x")
                    label = f"{title(method)} ({areas.mean():.2f})" if not number else None
                    axes.step(
                        line["x"],
                        line["value"],
                        where="pre",
                        color=colour(method),
                        linewidth=1.1,
                        alpha=0.8,
                        label=label,
                    )
            if len(chance):
                axes.axhline(
                    float(chance.mean()), color="0.5", linestyle=":", linewidth=1.1, label="chance"
                )
            axes.set_title(_ARMS[arm])
            axes.set_xlabel("recall of forgotten names")
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(-0.02, 1.05)
            axes.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.2),
                ncols=2,
                title="mean average precision",
                title_fontsize=8,
                fontsize=7,
            )
        panels[0][0].set_ylabel("precision")
    return figure.figure
