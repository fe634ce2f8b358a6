"""Do two sets of texts use the same directions? Overlap of their principal subspaces, beside what
dealing the texts anew would give.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench.figures.style import look, nothing, subplots

_TITLES = {
    "forget": "forget",
    "retain-neighbour": "neighbours",
    "retain-far": "far facts",
    "general": "general",
}


def angles(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """One matrix per block. Above the diagonal: mean squared cosine of the principal angles between
    two sets' top subspaces; below: the median of its permutation null.

    A star marks a pair whose overlap lies below 95 % of the null's: the two sets use different
    directions, by more than chance.

    Args:
        table: tidy results; stage ``subspaces``, metrics ``set_overlap`` (arm ``observed`` and
            ``null``) and ``set_overlap_p``; ``split`` is ``one|other``.
        figure: or part of one, to draw into; no ``ax``: one panel per block.
    """
    rows = table[
        (table["stage"] == "subspaces") & table["metric"].isin(["set_overlap", "set_overlap_p"])
    ]
    if not len(rows):
        return nothing("no comparison of text sets in this table", figure)
    pairs = [tuple(pair.split("|")) for pair in rows["split"].dropna().unique()]
    sets = list(dict.fromkeys(name for pair in pairs for name in pair))
    blocks = sorted(rows["site"].unique(), key=lambda site: int(site.split(".")[1]))
    with look():
        figure, panels = subplots(
            figure,
            1,
            len(blocks),
            (2.9 * len(blocks) + 0.6, 3.3),
            sharey=True,
        )
        for axes, block in zip(panels[0], blocks, strict=True):
            block_rows = rows[rows["site"] == block]
            matrix, marks = np.full((len(sets), len(sets)), np.nan), set()
            for first, second in pairs:
                cell = block_rows[block_rows["split"] == f"{first}|{second}"].set_index(
                    ["metric", "arm"]
                )["value"]
                i, j = sorted((sets.index(first), sets.index(second)))
                matrix[i, j], matrix[j, i] = (
                    cell["set_overlap", "observed"],
                    cell["set_overlap", "null"],
                )
                if cell["set_overlap_p", "observed"] <= 0.05:
                    marks.add((i, j))
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
            for i, j in zip(*np.nonzero(np.isfinite(matrix)), strict=True):
                shade = "black" if matrix[i, j] > 0.6 else "white"
                axes.text(
                    j,
                    i,
                    f"{matrix[i, j]:.2f}" + ("*" if (i, j) in marks else ""),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=shade,
                )
            names = [_TITLES.get(name, name) for name in sets]
            axes.set_xticks(range(len(sets)), names, rotation=40, ha="right")
            axes.set_yticks(range(len(sets)), names)
            axes.set_title(f"after block {block.split('.')[1]}")
            axes.grid(visible=False)
        rank = float(rows["x"].max())
        figure.colorbar(
            image, ax=panels[0].tolist(), label=f"overlap of top-{rank:g} subspaces", shrink=0.8
        )
        figure.supxlabel(
            "above the diagonal: observed (* below 95 % of its null);  below: median of the null",
            fontsize=8,
        )
    return figure.figure
