"""Which layer comes back first: the way back of the residual stream during relearning, block by
block.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import grid, look, methods_in, nothing, title


def geometry(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """One panel per method: blocks (upwards) by attack steps; colour is the share of unlearning's
    shift that the attack has taken back, mean over seeds.

    Args:
        table: tidy results; stage ``relearn``, metric ``returned``, arm ``attack``.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    rows = metrics.RETURNED.rows(table, arm="attack")
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods:
        return nothing("no geometry of an attack in this table", figure)
    rows = rows.assign(layer=rows["site"].str.split(".").str[1].astype(int))
    with look():
        figure, panels = grid(figure, len(methods), columns=4, width=2.5, height=1.9)
        image = None
        for axes, method in zip(panels, methods, strict=True):
            wide = rows[rows["method"] == method].pivot_table(
                index="layer", columns="x", values="value", aggfunc="mean"
            )
            image = axes.imshow(
                wide.to_numpy(), origin="lower", aspect="auto", vmin=-1, vmax=1, cmap="RdBu_r"
            )
            for (i, j), value in np.ndenumerate(wide.to_numpy()):
                axes.text(
                    j,
                    i,
                    f"{value:.1f}".replace("-0.0", "0.0"),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="black" if abs(value) < 0.6 else "white",
                )
            axes.set_xticks(range(wide.shape[1]), [f"{step:g}" for step in wide.columns])
            axes.set_yticks(range(wide.shape[0]), [str(layer) for layer in wide.index])
            axes.set_title(title(method))
            axes.grid(visible=False)
        figure.supxlabel("attack steps", fontsize=9)
        figure.supylabel("block", fontsize=9)
        if image is not None:
            figure.colorbar(image, ax=panels, label="share of the shift taken back", shrink=0.7)
    return figure.figure
