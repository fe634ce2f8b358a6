"""How far the forget loss falls within a radius of every model: the worst-case relearn drop."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import colour, grid, look, methods_in, nothing, title

_LINES = {
    "forget-attacked": ("forget answers that the attack follows", None, "-"),
    "forget-heldout": ("held-out forget answers, same step", None, "--"),
    "novel": ("novel facts, same step", "0.35", ":"),
    "retain-neighbour": ("neighbour answers, same step", "0.55", "-."),
    "retain": ("retain answers, same step", "0.7", "-"),
}


def drop(
    table: pd.DataFrame, kind: str = "drop", *, figure: Figure | SubFigure | None = None
) -> Figure:
    """One panel per method: drop of every loss (nats per token) against the radius; bold line: mean
    over seeds, thin lines: seeds.

    All losses are read at the one point of the ball that is best for the attacked loss. Below zero
    a loss has risen; a loss that rises by more than half of the largest drop leaves the panel at
    the bottom.

    Args:
        table: tidy results; stage ``sharpness``, metric ``drop``; ``arm`` is the kind of ball and
            search, ``split`` the loss, along the radius.
        kind: the ``arm`` to draw; in a kind with the word ``adaptive`` the radius is relative to
            every weight, with ``fixed`` a share of the length of the base's weights, in the others
            in units of the displacement by unlearning.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    rows = table[
        (table["stage"] == "sharpness")
        & (table["metric"] == metrics.DROP.name)
        & (table["arm"] == kind)
        & table["seed"].notna()
    ]
    rows = rows[rows["split"].isin(list(_LINES)) & rows["value"].notna()]
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods:
        return nothing(f"no worst-case {kind} in this table", figure)
    with look():
        figure, panels = grid(
            figure, len(methods), columns=4, width=2.5 if len(methods) > 2 else 3.6, height=2.3
        )
        top, bottom = float(rows["value"].max()), float(rows["value"].min())
        for number, (axes, method) in enumerate(zip(panels, methods, strict=True)):
            for split, (label, shade, dash) in _LINES.items():
                curve = rows[(rows["method"] == method) & (rows["split"] == split)]
                if not len(curve):
                    continue
                paint = shade or (
                    "black" if method == "never-learned" else colour(method)
                )  # its own grey is that of the controls here
                for _, line in curve.groupby("seed", sort=True):
                    line = line.sort_values("x")
                    axes.plot(line["x"], line["value"], dash, color=paint, linewidth=0.6, alpha=0.4)
                mean = curve.groupby("x")["value"].mean()
                axes.plot(mean.index, mean, dash, color=paint, linewidth=1.6, label=label)
            axes.axhline(0, color="0.5", linewidth=0.7)
            if top > 0:
                axes.set_ylim(
                    max(1.05 * bottom, -0.5 * top) if bottom < 0 else -0.02 * top, 1.05 * top
                )
            axes.set_title(title(method))
            axes.set_xlabel(_radius(kind))
            if number % 4 == 0:
                axes.set_ylabel(f"{kind.split(',')[0]} of the loss\n(nats per token)")
        handles = {
            label: handle
            for axes in panels
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(3, len(methods)),
        )
        for handle, name in zip(legend.legend_handles, handles, strict=True):
            if handle is not None and name in {
                _LINES["forget-attacked"][0],
                _LINES["forget-heldout"][0],
            }:
                handle.set_color("black")  # type: ignore[attr-defined]  # in the panels these two have the method's colour
    return figure.figure


def _radius(kind: str) -> str:
    if "adaptive" in kind:
        return "radius, relative to every weight"
    return "radius / length of the weights" if "fixed" in kind else "radius / length of unlearning"
