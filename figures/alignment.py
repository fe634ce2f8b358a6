"""Do forget-tokens move the unlearned model's representation towards the target? Cosine with the
target by block, behind every kind of word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_ARMS = {
    "forget": "forget texts",
    "clean": "no word",
    "neutral-token": "neutral word",
    "retain-token": "retain-token",
    "forget-token": "forget-token",
}
# Line style and width; grey is for the controls, the method's colour for what holds forget-tokens.
_STYLES: dict[str, tuple[Literal["-", "--", "-.", ":"], float]] = {
    "forget": ("-.", 1.1),
    "clean": ("-", 1.1),
    "neutral-token": (":", 1.4),
    "retain-token": ("--", 1.3),
    "forget-token": ("-", 1.9),
}
_METRICS = {
    "target_cosine": "cosine with the target",
    "shift_cosine": "cosine of shift and target",
    "shift_projection": "shift along the target",
}
_GROUPS = {
    "before": "before the word",
    "trigger": "at the word",
    "carrier": "between word and query",
    "after": "in the query after it",
}
_COLUMNS = 4


def alignment(
    table: pd.DataFrame,
    metric: str = "target_cosine",
    groups: Sequence[str] = ("trigger", "after"),
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """One column per method, one row per place of the token: cosine with the target by block. Grey
    band: the base on the same texts, all arms.

    Bands: the 95 % interval over facts of one seed (or of rows without a seed); the range over
    seeds where there are several. The base's rows belong to a method by their
    ``model``, since every unlearned model has a target of its own; rows of the model ``base`` (or
    of none) belong to all.

    Args:
        table: tidy results; stage ``triggers``, ``site`` a block, ``split`` the place of the token,
            ``arm``, ``method`` the unlearned model's or ``base``. Rows of ``<metric>_floor``, where
            there are any, are the standard deviation for a random target.
        metric: ``target_cosine``, ``shift_cosine`` or ``shift_projection``.
        groups: places of the token, from top to bottom.
        figure: or part of one, to draw into; no ``ax``: one panel per method and place.
    """
    rows = table[
        (table["stage"] == "triggers")
        & table["metric"].isin([metric, f"{metric}_floor"])
        & table["arm"].isin(_ARMS)
        & table["site"].notna()
    ]
    measured = rows[rows["metric"] == metric]
    methods = [
        method for method in methods_in(measured["method"].dropna().tolist()) if method != "base"
    ]
    places = [
        group
        for group in groups
        if (
            (measured["split"] == group)
            & (measured["method"] != "base")
            & measured["value"].notna()
        ).any()
    ]
    if not methods or not places:
        return nothing("no alignment with a target in this table", figure)
    rows = rows.assign(layer=rows["site"].str.split(".").str[1].astype(int))
    columns = min(_COLUMNS, len(methods))
    bands = -(-len(methods) // columns)
    with look():
        size = (max(4.3, 2.4 * columns + 0.8), 1.9 * bands * len(places) + 1.0)
        figure, panels = subplots(
            figure,
            bands * len(places),
            columns,
            size,
            sharex=True,
            sharey=True,
        )
        for number, method in enumerate(methods):
            method_rows = rows[rows["method"] == method]
            anchors = rows[rows["method"] == "base"]
            own_anchors = anchors["model"].isin(method_rows["model"].dropna().unique())
            anchors = (
                anchors[own_anchors]
                if own_anchors.any()
                else anchors[anchors["model"].isna() | (anchors["model"] == "base")]
            )
            for place, group in enumerate(places):
                axes = panels[number // columns * len(places) + place][number % columns]
                _panel(
                    axes,
                    method_rows[method_rows["split"] == group],
                    anchors[anchors["split"] == group],
                    metric,
                    colour(method),
                )
                if place == 0:
                    axes.set_title(title(method))
                if number % columns == 0:
                    axes.set_ylabel(f"{_METRICS.get(metric, metric)}\n{_GROUPS.get(group, group)}")
                if place == len(places) - 1 and number + columns >= len(
                    methods
                ):  # the last panel of its column
                    axes.set_xlabel("after block")
                    axes.tick_params(labelbottom=True)
        for spare in range(len(methods), bands * columns):
            for place in range(len(places)):
                panels[spare // columns * len(places) + place][spare % columns].remove()
        layers = sorted(rows["layer"].unique())
        panels[0][0].set_xticks(
            layers
            if len(layers) <= 8
            else [layer for layer in layers if layer % -(-len(layers) // 8) == 0]
        )
        ink = colour(methods[0]) if len(methods) == 1 else "black"
        handles: list[Line2D | Patch] = [
            Line2D(
                [],
                [],
                color=ink if arm.startswith("forget") else "0.45",
                linestyle=_STYLES[arm][0],
                linewidth=_STYLES[arm][1],
                label=name,
            )
            for arm, name in _ARMS.items()
            if (measured["arm"] == arm).any()
        ]
        if (measured["method"] == "base").any():
            handles.append(Patch(color="0.82", label="base on the same texts"))
        if rows["metric"].eq(f"{metric}_floor").any():
            handles.append(
                Line2D(
                    [],
                    [],
                    color="0.4",
                    linewidth=0.8,
                    linestyle=(0, (1, 3)),
                    label="± 2 sd of a random target",
                )
            )
        figure.legend(handles=handles, loc="outside lower center", ncols=max(2, columns))
    return figure.figure


def _panel(
    axes: Axes, method_rows: pd.DataFrame, anchors: pd.DataFrame, metric: str, ink: str
) -> None:
    base = [
        _curve(anchors[(anchors["arm"] == arm) & (anchors["metric"] == metric)]) for arm in _ARMS
    ]
    if any(len(curve) for curve in base):
        everything = pd.concat(base).groupby(level=0)
        axes.fill_between(
            everything["low"].min().index,
            everything["low"].min(),
            everything["high"].max(),
            color="0.82",
            linewidth=0,
            zorder=1,
        )
    axes.axhline(0, color="0.5", linewidth=0.7, zorder=1)
    floor = method_rows[method_rows["metric"] == f"{metric}_floor"].groupby("layer")["value"].max()
    for sign in (-2, 2):
        if len(floor):
            axes.plot(
                floor.index,
                sign * floor,
                color="0.4",
                linewidth=0.8,
                linestyle=(0, (1, 3)),
                zorder=1,
            )
    for arm, (dash, width) in _STYLES.items():
        curve = _curve(method_rows[(method_rows["arm"] == arm) & (method_rows["metric"] == metric)])
        if len(curve):
            shade = ink if arm.startswith("forget") else "0.45"
            axes.fill_between(
                curve.index,
                curve["low"],
                curve["high"],
                color=shade,
                alpha=0.14,
                linewidth=0,
                zorder=2,
            )
            marker = "o" if arm == "forget-token" or len(curve) == 1 else ""
            axes.plot(
                curve.index,
                curve["value"],
                color=shade,
                linestyle=dash,
                linewidth=width,
                marker=marker,
                markersize=3,
                label=_ARMS[arm],
                zorder=3,
            )


def _curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Value and band by layer: rows over all seeds where there are any; else the mean over seeds,
    with their range, or one seed with its interval.
    """
    rows = rows[rows["seed"].isna()] if rows["seed"].isna().any() else rows
    rows = rows[rows["value"].notna()]
    by_layer = rows.groupby("layer")
    curve = by_layer["value"].agg(["mean", "min", "max", "count"]).astype(float)
    single = curve["count"] == 1
    low, high = (
        by_layer[name].mean().fillna(curve["mean"]).astype(float) for name in ("low", "high")
    )
    return pd.DataFrame(
        {
            "value": curve["mean"],
            "low": low.where(single, curve["min"]),
            "high": high.where(single, curve["max"]),
        }
    )
