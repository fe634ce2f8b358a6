"""How far unlearning has moved the residual stream from the base's, block by block, on what was to
be forgotten and on what was not.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, NullLocator

from workbench import metrics
from workbench.figures.convergence import stroke
from workbench.figures.lens import by_block
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_MEASURES = {
    "relative_shift": "length of the shift\n(share of the stream's)",
    "cosine": "cosine with the base",
    "cka": "1 - CKA with the base\n(debiased)",
}
_SPLITS = {
    "forget-heldout": "held-out forget texts",
    "retain-neighbour": "neighbours",
    "retain": "retain texts",
    "general": "general text",
}


def shift(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Measures from top to bottom, sets of texts from left to right; one line per method, mean over
    seeds with the range of the seeds.

    A method that changes only what it should has lines high up on the left and near the base's
    value (a shift of 0, a cosine of 1, a distance of 0) on the right.

    Args:
        table: tidy results; stage ``unlearn``, metrics ``relative_shift``, ``cosine`` and ``cka``,
            ``site`` = ``blocks.N.hook_resid_post``, splits ``forget-heldout``,
            ``retain-neighbour``, ``retain`` and ``general``.
        figure: or part of one, to draw into; no ``ax``: one panel per measure and set of texts.
    """
    rows = table[
        (table["stage"] == "unlearn")
        & table["metric"].isin(list(_MEASURES))
        & table["split"].isin(list(_SPLITS))
        & table["seed"].notna()
    ]
    rows = rows[
        np.isfinite(rows["value"].astype(float))
        & rows["site"].fillna("").str.fullmatch(r"blocks\.\d+\.hook_resid_post")
    ]
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods:
        return nothing("no shift of the residual stream in this table", figure)
    rows = rows.assign(
        value=rows["value"].mask(rows["metric"] == metrics.CKA.name, 1 - rows["value"]),
        low=np.nan,
        high=np.nan,
    )
    measures = [name for name in _MEASURES if (rows["metric"] == name).any()]
    splits = [name for name in _SPLITS if (rows["split"] == name).any()]
    with look():
        size = (3.1 * len(splits) + 0.6, 2.1 * len(measures) + 0.6 + 0.18 * -(-len(methods) // 5))
        figure, panels = subplots(
            figure,
            len(measures),
            len(splits),
            size,
            sharex=True,
            sharey="row",
        )
        for i, measure in enumerate(measures):
            for j, split in enumerate(splits):
                axes, panel_rows = (
                    panels[i][j],
                    rows[(rows["metric"] == measure) & (rows["split"] == split)],
                )
                for number, method in enumerate(methods):
                    curve = by_block(panel_rows[panel_rows["method"] == method])
                    if not len(curve):
                        continue
                    shade = colour(method)
                    axes.plot(
                        curve.index,
                        curve["value"],
                        color=shade,
                        linewidth=1.1,
                        markersize=3.5,
                        label=title(method),
                        **stroke(number),
                    )  # type: ignore[arg-type]
                    axes.fill_between(
                        curve.index.to_numpy(dtype=float),
                        curve["low"],
                        curve["high"],
                        color=shade,
                        alpha=0.13,
                        linewidth=0,
                    )
                axes.axhline(1 if measure == "cosine" else 0, color="0.5", linewidth=0.7)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                if (
                    measure == "cka"
                    # two decades lie between a steered method and the others; debiased, it can fall
                    # below 0
                ):
                    axes.set_yscale("symlog", linthresh=0.01, linscale=0.5)
                    axes.set_yticks(
                        [0, 0.01, 0.03, 0.1, 0.3, 1], ["0", "0.01", "0.03", "0.1", "0.3", "1"]
                    )
                    axes.yaxis.set_minor_locator(NullLocator())
                if i == 0:
                    axes.set_title(_SPLITS[split])
                if i == len(measures) - 1:
                    axes.set_xlabel("after block")
                if j == 0:
                    axes.set_ylabel(_MEASURES[measure])
        if "cka" in measures:
            drawn = [
                values
                for axes in panels[measures.index("cka")]
                for line in axes.lines
                for values in np.asarray(line.get_ydata(), dtype=float)
            ]
            panels[measures.index("cka")][0].set_ylim(
                min(-0.002, 1.2 * min(drawn)), 1.4 * max(0.02, *drawn)
            )
        handles = {
            label: handle
            for row in panels
            for axes in row
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        order = [title(method) for method in methods if title(method) in handles]
        figure.legend(
            [handles[name] for name in order],
            order,
            loc="outside lower center",
            ncols=min(5, 2 * len(splits)),
            handlelength=3,
        )
    return figure.figure
