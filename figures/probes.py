"""What a linear probe still reads from the residual stream, block by block, and whether a probe of
one model reads the other.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.lens import common_legend, draw, finish
from workbench.figures.style import colour, grid, look, methods_in, nothing, title


def _rows(table: pd.DataFrame, split: str) -> pd.DataFrame:
    chosen = (
        (table["stage"] == "representation")
        & (table["split"] == split)
        & (table["metric"] == metrics.PROBE_ACCURACY.name)
    )
    return table[chosen].dropna(subset=["value"])


def probes(
    table: pd.DataFrame, split: str = "forget-heldout", *, figure: Figure | SubFigure | None = None
) -> Figure:
    """One panel per method: accuracy of a probe trained on that model's own stream, on subjects it
    has not seen; beside the control task, the most frequent label and the base.

    Bands are ranges over seeds, or the 95 % interval over subjects of a single seed.

    Args:
        table: tidy results; stage ``representation``, metric ``probe_accuracy``, arms ``own``,
            ``control``, ``majority``, ``ceiling``.
        split: which set of texts.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    rows = _rows(table, split)
    own_rows = rows[rows["arm"] == "own"]
    methods = [
        name for name in methods_in(own_rows["method"].dropna().tolist()) if name != "base"
    ] or methods_in(own_rows["method"].dropna().tolist())
    if not methods:
        return nothing("no probe in this table", figure)
    legend_labels = [
        f"{title('base')}, own probe",
        "most frequent label",
        "ceiling (labels seen in training)",
    ]
    with look():
        figure, panels = grid(figure, len(methods), width=2.6, height=2.2)
        for axes, method in zip(panels, methods, strict=True):
            method_rows, shade = rows[rows["method"] == method], colour(method)
            ceiling = method_rows[method_rows["arm"] == "ceiling"]
            if (ceiling["value"] < 1).any():
                draw(
                    axes,
                    ceiling,
                    legend_labels[2],
                    band=False,
                    color="0.6",
                    linewidth=0.9,
                    linestyle=(0, (1, 1)),
                )
            draw(
                axes,
                method_rows[method_rows["arm"] == "majority"],
                legend_labels[1],
                band=False,
                color="0.6",
                linewidth=1.1,
                linestyle=(0, (5, 2)),
            )
            if method != "base":
                draw(
                    axes,
                    own_rows[own_rows["method"] == "base"],
                    legend_labels[0],
                    band=False,
                    color=colour("base"),
                    linewidth=1.1,
                )
            draw(
                axes,
                method_rows[method_rows["arm"] == "control"],
                "control task",
                band=False,
                color=shade,
                marker="x",
                markersize=4,
                linestyle=":",
            )
            draw(
                axes,
                own_rows[own_rows["method"] == method],
                "own probe",
                color=shade,
                marker="o",
                markersize=3.5,
            )
            axes.set_ylim(-0.03, 1.05)
            finish(axes, method)
        figure.supylabel("accuracy on unseen subjects", fontsize=9)
        common_legend(figure, panels, keep=legend_labels)
    return figure.figure


def transfer(
    table: pd.DataFrame, split: str = "forget-heldout", *, figure: Figure | SubFigure | None = None
) -> Figure:
    """One panel per method, two probes on two streams: the colour is that of the model whose stream
    trained the probe (black: the base), the dash says whose stream it reads.

    Erased: all fall but the base's own. Rotated: the method's own probe stays high and the two that
    cross fall.

    Args:
        table: tidy results; stage ``representation``, metric ``probe_accuracy``, arms ``own``,
            ``base->unlearned``, ``unlearned->base`` and ``majority``.
        split: which set of texts.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    rows = _rows(table, split)
    crossed = rows[rows["arm"].isin(["base->unlearned", "unlearned->base"])]
    methods = [name for name in methods_in(crossed["method"].dropna().tolist()) if name != "base"]
    if not methods:
        return nothing("no probe transfer in this table", figure)
    legend_labels = [
        "base's probe on the base",
        "base's probe on this model",
        "most frequent label",
    ]
    with look():
        figure, panels = grid(figure, len(methods), width=2.6, height=2.2)
        for axes, method in zip(panels, methods, strict=True):
            method_rows, shade, black = (
                rows[rows["method"] == method],
                colour(method),
                colour("base"),
            )
            draw(
                axes,
                method_rows[method_rows["arm"] == "majority"],
                legend_labels[2],
                band=False,
                color="0.6",
                linewidth=1.1,
                linestyle=(0, (5, 2)),
            )
            draw(
                axes,
                rows[(rows["method"] == "base") & (rows["arm"] == "own")],
                legend_labels[0],
                band=False,
                color=black,
                linewidth=1.2,
            )
            draw(
                axes,
                method_rows[method_rows["arm"] == "base->unlearned"],
                legend_labels[1],
                band=False,
                color=black,
                marker="v",
                markersize=3.5,
                linestyle="--",
            )
            draw(
                axes,
                method_rows[method_rows["arm"] == "own"],
                "own probe on this model",
                color=shade,
                marker="o",
                markersize=3.5,
            )
            draw(
                axes,
                method_rows[method_rows["arm"] == "unlearned->base"],
                "own probe on the base",
                band=False,
                color=shade,
                marker="^",
                markersize=3.5,
                linestyle="--",
            )
            axes.set_ylim(-0.03, 1.05)
            finish(axes, method)
        figure.supylabel("accuracy on unseen subjects", fontsize=9)
        common_legend(figure, panels, keep=legend_labels)
    return figure.figure
