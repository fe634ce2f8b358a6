"""Recovery under relearning: one panel per method, each beside the null attack and the
never-learned control.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from workbench.attacks.attack import ATTACKS
from workbench.figures.marks import diverged, main_metric
from workbench.figures.style import colour, grid, look, methods_in, nothing, title


def _line(
    axes: Axes, rows: pd.DataFrame, label: str, *, band: bool = True, **style: object
) -> None:
    rows = rows.sort_values("x")
    (line,) = axes.plot(rows["x"], rows["value"], label=label, **style)  # type: ignore[arg-type]
    if not band:
        return
    axes.fill_between(
        rows["x"].astype(float),
        rows["low"].astype(float),
        rows["high"].astype(float),
        color=line.get_color(),
        alpha=0.18,
        linewidth=0,
    )


def recovery(
    table: pd.DataFrame,
    metric: str | None = None,
    *,
    stage: str = "relearn",
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Recall (or ``answer_probability``) of held-out forget facts against attack steps, with 95 %
    intervals over seeds and facts.

    Args:
        table: tidy results; rows without a seed are drawn.
        metric: which metric.
        stage: the attack.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    metric = metric or main_metric(table)
    rows = table[
        (table["stage"] == stage)
        & (table["metric"] == metric)
        & (table["split"] == "forget-heldout")
        & table["seed"].isna()
    ]
    methods = [
        name
        for name in methods_in(rows["method"].dropna().tolist())
        if name not in ("base", "never-learned")
    ]
    if not methods:
        return nothing("no relearning attack in this table", figure)
    with look():
        figure, panels = grid(figure, len(methods))
        broken = diverged(table, stage=stage)
        control = rows[(rows["method"] == "never-learned") & (rows["arm"] == "attack")]
        base = rows[(rows["method"] == "base") & (rows["arm"] == "attack")]
        for axes, method in zip(panels, methods, strict=True):
            method_rows = rows[rows["method"] == method]
            _line(
                axes,
                method_rows[method_rows["arm"] == "attack"],
                f"{ATTACKS[stage].title} attack" if stage in ATTACKS else stage,
                color=colour(method),
                marker="o",
                markersize=3,
            )
            if (method_rows["arm"] == "null").any():
                _line(
                    axes,
                    method_rows[method_rows["arm"] == "null"],
                    "null attack (general text)",
                    color=colour(method),
                    linestyle=":",
                    alpha=0.9,
                )
            if (method_rows["arm"] == "random-facts").any():
                _line(
                    axes,
                    method_rows[method_rows["arm"] == "random-facts"],
                    "random facts (exchanged answers)",
                    color=colour(method),
                    linestyle="-.",
                    alpha=0.9,
                )
            if len(base):
                _line(
                    axes,
                    base,
                    "base, same attack",
                    band=False,
                    color=colour("base"),
                    linewidth=0.9,
                    linestyle=(0, (1, 2)),
                )
            if len(control):
                _line(
                    axes,
                    control,
                    "never learned, same attack",
                    color=colour("never-learned"),
                    linestyle="--",
                )
            if method in broken:
                axes.text(
                    0.5,
                    0.5,
                    f"the attack diverged\nat step {broken[method]:g}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    transform=axes.transAxes,
                )
            axes.set_title(title(method), color=colour(method), fontweight="bold")
            axes.set_ylim(-0.03, 1.05)
            axes.set_xlabel("attack steps")
        unit = (
            "recall of held-out forget facts"
            if metric == "recall"
            else "answer probability, held-out"
        )
        panels[0].set_ylabel(unit)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure.figure
