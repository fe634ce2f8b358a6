"""Recall of held-out forgotten facts along a number that is turned: demonstrations, bits."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench import metrics
from workbench.figures.style import colour, legend, look, methods_in, nothing, panel, title


def _curves(
    rows: pd.DataFrame, dashed: pd.DataFrame, label: str, ax: Axes | None
) -> tuple[Figure, Axes]:
    with look():
        figure, axes = panel(ax, (5.6, 3.6))
        for method in methods_in(rows["method"].dropna().tolist()):
            for table, dash in ((rows, "-"), (dashed, ":")):
                line = table[table["method"] == method].sort_values("x")
                steps = line["x"].to_numpy(dtype=float)
                shade, name = colour(method), title(method) if dash == "-" else None
                axes.plot(steps, line["value"], dash, color=shade, marker="o", ms=3, label=name)
                if dash == "-":
                    axes.fill_between(
                        steps, line["low"], line["high"], color=shade, alpha=0.12, linewidth=0
                    )
        axes.set_xlabel(label)
        axes.set_xticks(sorted(rows["x"].astype(float).unique()))
        axes.set_ylabel("recall, held-out forgotten facts")
        axes.set_ylim(-0.03, 1.05)
        legend(ax, axes, *axes.get_legend_handles_labels(), loc="outside right upper")
    return figure, axes


def _recall(table: pd.DataFrame, stage: str) -> pd.DataFrame:
    mine = (
        (table["stage"] == stage) & (table["metric"] == metrics.RECALL.name) & table["seed"].isna()
    )
    return table[mine & (table["split"] == "forget-heldout")]


def few_shot(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Recall by the number of demonstrations: solved ones (solid, with 95 % intervals over seeds
    and facts) and ones with shuffled answers (dotted).

    Args:
        table: tidy results; stage ``few-shot``.
        ax: to draw into; the legend stands below it.
    """
    rows = _recall(table, "few-shot")
    if not len(rows):
        return nothing("no few-shot prompting in this table", ax)
    solved = rows["arm"] == "solved"
    return _curves(rows[solved], rows[~solved], "demonstrations", ax)[0]


def quantise(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Recall by the bits of the weights, with 95 % intervals over seeds and facts.

    Args:
        table: tidy results; stage ``quantise``.
        ax: to draw into; the legend stands below it.
    """
    rows = _recall(table, "quantise")
    if not len(rows):
        return nothing("no rounded model in this table", ax)
    figure, axes = _curves(rows, rows.iloc[:0], "bits of a weight", ax)
    axes.set_xscale("log", base=2)
    axes.set_xticks(bits := sorted(rows["x"].astype(float).unique()), [f"{b:g}" for b in bits])
    axes.invert_xaxis()
    return figure
