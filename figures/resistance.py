"""A measure taken before the attack against what the attack wins back: the models behind every rank
correlation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from workbench import metrics
from workbench.figures.predictors import NAMES
from workbench.figures.style import colour, grid, look, methods_in, nothing, title

_OUTCOMES = {"recovery": "recall won back by the attack", "recall_after": "recall after the attack"}
_MARKERS = {"plain": "o", "sam": "^", "asam": "v", "rs": "s", "gp": "D", "cr": "P", "wa": "X"}
_NUMBER = r"\d[\d.]*(?:e-?\d+)?"
_KEYS = ["run", "method", "seed"]
_DECADES = 2
_RADII = (9.0, 13.0, 18.0, 24.0, 31.0)
_ANGLES = np.deg2rad([45, 0, 90, -45, 135, 180, -90, -135, 22, 67, -22, 112])


def resistance(
    table: pd.DataFrame,
    measures: Sequence[str] | None = None,
    outcome: str = "recovery",
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """One panel per measure: small points are models (one per method and seed), large ones the
    means over seeds with the range of the seeds both ways.

    The colour is that of the method without its smoothing, the marker is the smoothing; the number
    beside a mean is the method's in the legend. Methods are the same in all panels; a model without
    the measure is left out of that panel. The title is Spearman's correlation with its interval, as
    the table has it. With several runs in one table the means are those of each run.

    Args:
        table: tidy results; metric ``predictor_value`` (``arm`` is the measure), metric ``outcome``
            (``arm`` is the outcome), both by method and seed, and metric ``recovery_correlation``
            (``arm`` is the measure, ``split`` the outcome).
        measures: which, in this order; default all, the strongest correlation first. The recall
            before the attack is then left out beside the recall won back, which is correlated with
            it by construction.
        outcome: ``recovery`` or ``recall_after``.
        figure: or part of one, to draw into; no ``ax``: one panel per measure.
    """
    points = _points(table, outcome)
    correlations = (
        metrics.RECOVERY_CORRELATION.rows(table, split=outcome)
        .dropna(subset=["value"])
        .set_index("arm")
    )
    measured = [
        name
        for name in [*NAMES, *sorted(set(points["arm"]) - set(NAMES))]
        if (points["arm"] == name).any()
    ]
    if measures is None:
        strength = correlations["value"].abs().groupby(level=0).max().to_dict()
        measured = [name for name in measured if (name, outcome) != ("recall_before", "recovery")]
        shown_measures = sorted(measured, key=lambda name: -strength.get(name, -1.0))
    else:
        shown_measures = [name for name in measures if name in measured]
    if not shown_measures:
        return nothing("no measures beside what an attack won back in this table", figure)
    points = points[points["arm"].isin(shown_measures)]
    numbers = {
        method: number
        for number, method in enumerate(_in_order(points["method"].unique().tolist()), start=1)
    }
    columns = min(len(shown_measures), 2 if len(shown_measures) == 4 else 3)
    with look():
        figure, panels = grid(figure, len(shown_measures), columns=columns, width=3.4, height=2.9)
        means: list[list[tuple[int, float, float]]] = [[] for _ in panels]
        for position, (axes, measure) in enumerate(zip(panels, shown_measures, strict=True)):
            measure_points = points[points["arm"] == measure]
            for method, number in numbers.items():
                for _, models in measure_points[measure_points["method"] == method].groupby(
                    "run", sort=True
                ):
                    means[position].append((number, *_draw(axes, models, method)))
            _scale(axes, measure_points["value"])
            axes.axhline(0, color="0.5", linewidth=0.7, zorder=1)
            axes.set_title(_correlation(correlations, measure))
            axes.set_xlabel(NAMES.get(measure, measure))
            if position % columns == 0:
                axes.set_ylabel(_OUTCOMES.get(outcome, outcome))
        handles = [
            Line2D([], [], linestyle="", marker=_MARKERS[kind], color=colour(family))
            for family, kind in map(family_and_smoothing, numbers)
        ]
        labels = [f"{number} {_label(method)}" for method, number in numbers.items()]
        lines = -(-len(labels) // (2 * columns))
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=-(-len(labels) // lines),
            handletextpad=0.1,
            columnspacing=1.2,
        )
        # only then is it known where a mean lies on the page
        figure.figure.draw_without_rendering()
        for axes, measure_means in zip(panels, means, strict=True):
            _number(axes, measure_means)
    return figure.figure


def family_and_smoothing(method: str) -> tuple[str, str]:
    """The method inside and what smooths it: ``("npo", "sam")`` for ``npo-sam``, ``("rmu",
    "plain")`` for ``rmu``; numbers behind the name are strengths of the smoothing.
    """
    inner, _, last = _without_strength(method).rpartition("-")
    return (inner, last) if inner and last in _MARKERS and last != "plain" else (method, "plain")


def _without_strength(method: str) -> str:
    return re.sub(rf"([-_]{_NUMBER})+$", "", method)


def _strengths(method: str) -> tuple[str, list[str]]:
    """A smoothed method's name without the numbers behind it, and these; of what is not smoothed
    the numbers belong to the name.
    """
    name = _without_strength(method) if family_and_smoothing(method)[1] != "plain" else method
    return name, re.findall(_NUMBER, method[len(name) :])


def _in_order(methods: list[str]) -> list[str]:
    """Strengths of one smoothing stand together, weakest first."""
    parts = {method: _strengths(method) for method in methods}
    order = methods_in([name for name, _ in parts.values()])
    return sorted(
        methods,
        key=lambda method: (
            order.index(parts[method][0]),
            [float(number) for number in parts[method][1]],
        ),
    )


def _label(method: str) -> str:
    """``NPO+SAM 0.02`` for ``npo-sam_0.02``."""
    name, numbers = _strengths(method)
    return " ".join([title(name), *numbers])


def _points(table: pd.DataFrame, outcome: str) -> pd.DataFrame:
    """``run``, ``method``, ``seed``, ``arm`` (the measure), ``value`` and ``won``; models that lack
    either number are left out.
    """
    rows = table[table["seed"].notna() & np.isfinite(table["value"].astype(float))]
    rows = rows.assign(run=rows["run"].fillna(""))
    measured = (
        metrics.PREDICTOR_VALUE.rows(rows).groupby([*_KEYS, "arm"], as_index=False)["value"].mean()
    )
    won = (
        metrics.OUTCOME.rows(rows, arm=outcome)
        .groupby(_KEYS)["value"]
        .mean()
        .rename("won")
        .reset_index()
    )
    return measured.merge(won, on=_KEYS)


def _draw(axes: Axes, models: pd.DataFrame, method: str) -> tuple[float, float]:
    """The points and their mean, which is returned."""
    family, smoothing = family_and_smoothing(method)
    shade, marker = colour(family), _MARKERS[smoothing]
    axes.scatter(
        models["value"],
        models["won"],
        s=9,
        color=shade,
        marker=marker,
        alpha=0.5,
        linewidth=0,
        zorder=2,
    )
    x, y = float(models["value"].mean()), float(models["won"].mean())
    # a mean of equal numbers can miss them by a rounding
    spread = [
        [[max(0.0, mean - models[name].min())], [max(0.0, models[name].max() - mean)]]
        for name, mean in (("value", x), ("won", y))
    ]
    axes.errorbar(
        x,
        y,
        xerr=spread[0],
        yerr=spread[1],
        fmt=marker,
        color=shade,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.5,
        linewidth=0.8,
    )
    return x, y


def _number(axes: Axes, means: list[tuple[int, float, float]]) -> None:
    """A number beside every mean, at the nearest place that neither another mean nor another number
    takes; with a thin line where that is further off.
    """
    scale = 72 / axes.figure.dpi
    centres = [axes.transData.transform((x, y)) * scale for _, x, y in means]
    left, bottom, right, top = (float(end) * scale for end in axes.bbox.extents)
    occupied = [
        (x, y, 3.0, 3.0) for x, y in centres
    ]  # middle and half of the width and height, in points
    for (number, x, y), centre in zip(means, centres, strict=True):
        width = 2.4 * len(str(number)) + 0.4
        places = [
            centre + radius * np.array([np.cos(angle), np.sin(angle)])
            for radius in _RADII
            for angle in _ANGLES
        ]
        inside = [
            place
            for place in places
            if left + width < place[0] < right - width and bottom + 4 < place[1] < top - 4
        ]
        free = [
            place
            for place in inside
            if all(
                abs(place[0] - a) > width + w or abs(place[1] - b) > 3.2 + h
                for a, b, w, h in occupied
            )
        ]
        best = (free or inside or places)[0]
        occupied.append((best[0], best[1], width, 3.2))
        far = float(np.hypot(*(best - centre))) > _RADII[0] + 0.1
        axes.annotate(
            str(number),
            (x, y),
            tuple(best - centre),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=7,
            zorder=5,
            arrowprops={
                "arrowstyle": "-",
                "linewidth": 0.5,
                "color": "0.35",
                "shrinkA": 3,
                "shrinkB": 0,
            }
            if far
            else None,
            path_effects=[withStroke(linewidth=1.4, foreground="white")],
        )


def _scale(axes: Axes, values: pd.Series) -> None:
    """A logarithmic axis for positive values over more than two decades; without it one sharp model
    hides how the others differ.
    """
    if values.min() > 0 and values.max() > 10**_DECADES * values.min():
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _correlation(correlations: pd.DataFrame, measure: str) -> str:
    found = correlations.loc[correlations.index == measure]
    if len(found) != 1:  # of two one would have to be chosen
        return "no rank correlation"
    value, low, high = (float(found[name].iloc[0]) for name in ("value", "low", "high"))
    return f"rank correlation {value:+.2f}" + (
        f" [{low:+.2f}, {high:+.2f}]" if np.isfinite(low) and np.isfinite(high) else ""
    )
