"""Both ends of the Hessian's spectrum of the forget loss, beside how far every model moved and what
the attack won back.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_MEASURES = {
    "top_eigenvalue": ("top Hessian eigenvalue", "symlog"),
    "bottom_eigenvalue": ("bottom Hessian eigenvalue", "symlog"),
    "displacement": ("displacement of the weights", "linear"),
}


def curvature(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """One point per method and seed: a measure taken before the attack against the recall that the
    attack wins back.

    Args:
        table: tidy results; stages ``sharpness``, ``unlearn`` and ``relearn``.
        figure: or part of one, to draw into; no ``ax``: one panel per measure.
    """
    attacked = table[
        (table["stage"] == "relearn")
        & (table["arm"] == "attack")
        & (table["metric"] == metrics.RECALL.name)
        & (table["split"] == "forget-heldout")
        & table["seed"].notna()
    ]
    rows = []
    for (method, seed), group in attacked.groupby(["method", "seed"]):
        ordered = group.sort_values("x")
        won = float(ordered["value"].iloc[-1] - ordered["value"].iloc[0])
        before = table[
            (table["method"] == method) & (table["seed"] == seed) & table["metric"].isin(_MEASURES)
        ]
        if method not in ("base", "never-learned"):
            rows.append(
                {
                    "method": method,
                    "won": won,
                    **before.drop_duplicates("metric").set_index("metric")["value"].to_dict(),
                }
            )
    points = pd.DataFrame(rows)
    measures = [name for name in _MEASURES if name in points and points[name].notna().any()]
    if not measures:
        return nothing("no curvature in this table", figure)
    with look():
        figure, panels = subplots(
            figure,
            1,
            len(measures),
            (3.1 * len(measures), 3.3),
            sharey=True,
        )
        for axes, measure in zip(panels[0], measures, strict=True):
            for method in methods_in(points["method"].tolist()):
                method_points = points[points["method"] == method]
                axes.scatter(
                    method_points[measure],
                    method_points["won"],
                    color=colour(method),
                    label=title(method),
                    s=26,
                    zorder=3,
                )
            axes.set_xlabel(_MEASURES[measure][0])
            axes.set_xscale(_MEASURES[measure][1])
        panels[0][0].set_ylabel("recall won back by the attack")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure.figure
