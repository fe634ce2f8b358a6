"""Where the damage of a trigger sits: the share of it that a patch from the other model restores or
causes, by block, kind of activation and position.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from workbench import metrics
from workbench.figures.style import look, methods_in, nothing, subplots, title

_KINDS = {"hook_resid": "stream", "hook_attn_out": "attention", "hook_mlp_out": "MLP"}
_GROUPS = ("before", "trigger", "carrier", "after", "all")
_LABELS = {
    "base into unlearned": "share of the damage restored",
    "unlearned into base": "share of the damage caused",
}
_COLUMNS = 2
_MOST = 12  # blocks whose numbers can still be read


def causal_map(
    table: pd.DataFrame,
    direction: str = "base into unlearned",
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """One panel per method: blocks (upwards; "in" is the embedding) by positions, side by side for
    the stream, attention and MLPs. 0 is white, 1 is the full damage.

    Numbers are means over seeds; a number is faint where an interval holds 0. Below it, in
    brackets, the same patch on the clean query, where the table has it.

    Args:
        table: tidy results; stage ``triggers``, metric ``restored`` (and ``restored_control``),
            ``site`` the patched activation, ``split`` the positions, ``arm`` the direction.
        direction: ``base into unlearned`` or ``unlearned into base``.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    rows = table[
        (table["stage"] == "triggers")
        & table["metric"].isin(["restored", "restored_control"])
        & (table["arm"] == direction)
    ]
    rows = rows.assign(kind=rows["site"].map(_kind), layer=rows["site"].map(_layer))
    rows = rows[rows["kind"].notna()]
    methods = methods_in(
        rows.loc[rows["metric"] == metrics.RESTORED.name, "method"].dropna().tolist()
    )
    if not methods:
        return nothing("no causal map in this table", figure)
    splits = rows["split"].dropna().unique().tolist()
    groups = [group for group in _GROUPS if group in splits] + sorted(
        group for group in splits if group not in _GROUPS
    )
    kinds = [kind for kind in _KINDS.values() if (rows["kind"] == kind).any()]
    layers = sorted(rows["layer"].unique())
    columns = min(_COLUMNS, len(methods))
    height = 0.32 * min(len(layers), 20) + 1.0
    with look():
        size = (
            max(2.6, 0.46 * len(kinds) * len(groups) + 0.5) * columns + 1.1,
            height * -(-len(methods) // columns) + 0.9,
        )
        figure, panels = subplots(
            figure,
            -(-len(methods) // columns),
            columns,
            size,
            sharex=True,
            sharey=True,
        )
        image = None
        for number, (axes, method) in enumerate(zip(panels.flat, methods, strict=False)):
            method_rows = rows[rows["method"] == method]
            method_rows = (
                method_rows[method_rows["seed"].isna()]
                if method_rows["seed"].isna().any()
                else method_rows
            )
            image = _panel(axes, method_rows, layers, kinds, groups)
            axes.set_title(title(method), pad=16)
            if number + columns >= len(methods):
                axes.tick_params(labelbottom=True)
        for spare in list(panels.flat)[len(methods) :]:
            spare.remove()
        figure.supylabel("block", fontsize=9)
        if image is not None:
            bar = figure.colorbar(
                image,
                ax=panels.ravel().tolist()[: len(methods)],
                shrink=0.7 if len(methods) > columns else 1.0,
                ticks=[-1, 0, 1],
                extend="both",
            )
            bar.ax.set_yticklabels(["-1", "0: none", "1: all"])
            for value in (0, 1):
                bar.ax.axhline(value, color="black", linewidth=1.2)
            bar.set_label(_LABELS.get(direction, direction))
        if (rows["metric"] == metrics.RESTORED_CONTROL.name).any() and len(layers) <= _MOST:
            figure.supxlabel(
                "in brackets: the same patch on the clean query, in units of the same damage",
                fontsize=8,
            )
    return figure.figure


def _kind(site: object) -> str | None:
    return next((name for hook, name in _KINDS.items() if f".{hook}" in str(site)), None)


def _layer(site: object) -> int:
    """-1 for what enters the first block."""
    return (
        -1
        if str(site).endswith(".0.hook_resid_pre")
        else int(str(site).split(".")[1])
        if str(site).startswith("blocks.")
        else -1
    )


def _panel(
    axes: Axes, rows: pd.DataFrame, layers: list[int], kinds: list[str], groups: list[str]
) -> AxesImage:
    cells = pd.MultiIndex.from_product([kinds, groups])

    def matrix(metric: str, column: str, how: Literal["mean", "min", "max"]) -> np.ndarray:
        wide = rows[rows["metric"] == metric].pivot_table(
            index="layer", columns=["kind", "split"], values=column, aggfunc=how
        )
        return wide.reindex(index=layers, columns=cells).to_numpy(dtype=float)

    value, low, high = (
        matrix("restored", "value", "mean"),
        matrix("restored", "low", "min"),
        matrix("restored", "high", "max"),
    )
    control = matrix("restored_control", "value", "mean")
    image = axes.imshow(
        value, origin="lower", aspect="auto", cmap="RdBu_r", norm=Normalize(-1.25, 1.25)
    )
    axes.set_facecolor("0.93")
    if len(layers) <= _MOST:
        for i, j in zip(*np.nonzero(np.isfinite(value)), strict=True):
            number = float(value[i, j])
            shade, faint = (
                ("white" if abs(number) > 0.75 else "black"),
                bool(low[i, j] <= 0 <= high[i, j]),
            )
            both_finite = np.isfinite(control[i, j])
            axes.text(
                j,
                i + 0.17 * both_finite,
                _short(number),
                ha="center",
                va="center",
                fontsize=6.5,
                color=shade,
                alpha=0.45 if faint else 1.0,
            )
            if both_finite:
                axes.text(
                    j,
                    i - 0.24,
                    f"({_short(control[i, j])})",
                    ha="center",
                    va="center",
                    fontsize=5,
                    color=shade,
                    alpha=0.8,
                )
    for number, kind in enumerate(kinds):
        middle = (number + 0.5) / len(kinds)
        axes.annotate(
            kind,
            (middle, 1),
            (0, 3),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color="0.3",
        )
        if number:
            axes.axvline(number * len(groups) - 0.5, color="black", linewidth=1.0)
    if not np.isfinite(value).any():
        axes.text(
            0.5,
            0.5,
            "no damage to restore",
            transform=axes.transAxes,
            ha="center",
            va="center",
            fontsize=8,
            color="0.3",
        )
    axes.set_xticks(range(len(cells)), [group for _, group in cells], rotation=50, ha="right")
    step = -(-len(layers) // 16)
    axes.set_yticks(
        range(0, len(layers), step), ["in" if layer < 0 else str(layer) for layer in layers[::step]]
    )
    axes.grid(visible=False)
    return image


def _short(number: float) -> str:
    return f"{number:.2f}".replace("-0.00", "0.00")
