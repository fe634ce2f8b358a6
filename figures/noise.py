"""What noise on the reference buys: forgetting, accuracy under a forget-token, and the
forget-token's effect, by the size of the noise and the block that carries it.
"""

from __future__ import annotations

import re

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.transforms import ScaledTranslation

from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_NAME = re.compile(r"(?P<method>.+)-rna_(?P<noise>\d[\d.]*(?:e-?\d+)?)(?:_(?P<layer>\d+))?")
_INSIDE = "retain, bare word inside"
_EFFECT = "accuracy lost to a forget-token\n(beyond another name, beyond the base)"
_PANELS = {
    "recall of held-out\nforget facts": {
        "stage": "unlearn",
        "metric": "recall",
        "split": "forget-heldout",
    },
    "accuracy on retain questions,\na forget-token inside": {
        "stage": "triggers",
        "metric": "recall",
        "split": _INSIDE,
        "arm": "forget-token",
    },
    _EFFECT: {"stage": "triggers", "metric": "trigger_effect", "split": _INSIDE},
}
_MARKS = "os^Dv<>P"
_OWN = -1  # stands for a block that the name leaves to the method
_ROOM = 7.0  # points over which the lines are set apart


def noise(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Three panels, one row of them per method inside; lines are the blocks of the frozen reference
    whose output carries the noise, with 95 % intervals over seeds and facts.

    The noise is the ratio of its length to the representation's, on a logarithmic axis with 0 at
    the left. Noise 0 is the same model whatever the block: the variant of noise 0, and where there
    is none the method itself without noise. Dotted is the base, dashed the never-learned control.
    Points of one noise stand side by side.

    Args:
        table: tidy results of a run and of ``workbench triggers`` on it, one under the other; rows
            without a seed. Methods are named ``<method>-rna_<noise>_<layer>``, or
            ``<method>-rna_<noise>`` where the layer is the method's own. Metric ``recall`` of stage
            ``unlearn`` (split ``forget-heldout``) and of stage ``triggers`` (split ``retain, bare
            word inside``, arm ``forget-token``), metric ``trigger_effect`` of stage ``triggers``
            with the same split.
        figure: or part of one, to draw into; no ``ax``: three panels per method.
    """
    rows = table[table["seed"].isna() & np.isfinite(table["value"].astype(float))]
    variants = _variants(rows["method"].dropna().unique().tolist())
    parts = {
        label: rows[np.logical_and.reduce([rows[name] == value for name, value in split.items()])]
        for label, split in _PANELS.items()
    }
    measured = {name for part in parts.values() for name in part["method"]}
    variants = variants[variants["name"].isin(measured)]
    methods = [
        name
        for name in methods_in(variants["method"].tolist())
        if (variants.loc[variants["method"] == name, "noise"] > 0).any()
    ]
    if not methods:
        return nothing(
            "no noise ablation in this table: it has no method called <method>-rna_<noise>_<layer>",
            figure,
        )
    variants = variants[variants["method"].isin(methods)]
    sizes = sorted(variants["noise"].unique())
    layers = sorted(variants.loc[variants["noise"] > 0, "layer"].unique())
    with look():
        figure, panels = subplots(
            figure,
            len(methods),
            3,
            (9.6, 2.4 * len(methods) + 0.9),
            sharex=True,
            sharey="col",
        )
        for i, method in enumerate(methods):
            method_variants = variants[variants["method"] == method]
            for j, (label, part) in enumerate(parts.items()):
                axes = panels[i][j]
                _controls(axes, part, effect=label == _EFFECT)
                for number, layer in enumerate(layers):
                    line = (
                        method_variants[
                            (method_variants["layer"] == layer) | (method_variants["noise"] == 0)
                        ]
                        .merge(part, left_on="name", right_on="method")
                        .sort_values("noise")
                    )
                    if (line["noise"] > 0).any():
                        _line(axes, line, layer, number, layers)
                axes.set_ylim(
                    _limits(part[part["method"].isin(variants["name"])])
                    if label == _EFFECT
                    else (-0.03, 1.05)
                )
                if i == 0:
                    axes.set_title(label)
                if j == 0:
                    axes.set_ylabel(title(method), color=colour(method), fontweight="bold")
                if i == len(methods) - 1:
                    axes.set_xlabel("length of the noise / length of the stream")
                _noise_axis(axes, sizes)
        handles = {
            label: handle
            for row in panels
            for axes in row
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=5,
            handlelength=2.6,
        )
    return figure.figure


def _variants(names: list[str]) -> pd.DataFrame:
    """``name``, ``method``, ``noise`` and ``layer`` of every variant; a method without noise stands
    for noise 0 where no variant of it does.
    """
    variants = [
        (name, match["method"], float(match["noise"]), int(match["layer"] or _OWN))
        for name in names
        if (match := _NAME.fullmatch(name))
    ]
    without = {method for _, method, _, _ in variants} - {
        method for _, method, size, _ in variants if size == 0
    }
    variants += [(name, name, 0.0, _OWN) for name in names if name in without]
    return pd.DataFrame(variants, columns=["name", "method", "noise", "layer"])


def _controls(axes: Axes, part: pd.DataFrame, *, effect: bool) -> None:
    if effect:
        axes.axhline(0, color="0.5", linewidth=0.8)  # the base's own effect is taken off already
        return
    for method, dash in (("base", ":"), ("never-learned", "--")):
        level = part.loc[part["method"] == method, "value"]
        if len(level):
            axes.axhline(
                float(level.mean()),
                color=colour(method),
                linestyle=dash,
                linewidth=1.1,
                label=title(method),
            )


def _limits(part: pd.DataFrame) -> tuple[float, float]:
    """Room for all whiskers and for 0; points that are drawn aside do not count when matplotlib
    looks for limits by itself.
    """
    ends = part[["value", "low", "high"]].to_numpy(dtype=float)
    ends = ends[np.isfinite(ends)]
    low, high = float(np.min(ends, initial=0.0)), float(np.max(ends, initial=0.0))
    room = 0.06 * (high - low) or 0.1
    return low - room, high + room


def _line(axes: Axes, line: pd.DataFrame, layer: int, number: int, layers: list[int]) -> None:
    several = [name for name in layers if name != _OWN]
    shade = (
        "black"
        if layer == _OWN
        else mpl.colormaps["viridis"](0.15 + 0.7 * several.index(layer) / max(1, len(several) - 1))
    )
    label = "the method's own block" if layer == _OWN else f"noise after block {layer}"
    aside = (number - (len(layers) - 1) / 2) * _ROOM / max(1, len(layers) - 1)
    moved = axes.transData + ScaledTranslation(
        aside / 72, 0, axes.figure.dpi_scale_trans
    )  # the data stay where they are
    value, low, high = (line[name].astype(float).to_numpy() for name in ("value", "low", "high"))
    whiskers = [np.maximum(0, value - low), np.maximum(0, high - value)]
    style = {
        "marker": _MARKS[number % len(_MARKS)],
        "markersize": 4.5,
        "linewidth": 1.2,
        "elinewidth": 0.9,
        "capsize": 2,
    }
    axes.errorbar(
        line["noise"].astype(float),
        value,
        yerr=whiskers,
        color=shade,
        label=label,
        transform=moved,
        **style,  # type: ignore[arg-type]
    )


def _noise_axis(axes: Axes, sizes: list[float]) -> None:
    """A logarithm has no zero: below the smallest noise the axis is linear, and 0 is its left
    end.
    """
    smallest = min(size for size in sizes if size > 0)
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlim(-0.3 * smallest if 0 in sizes else 0.7 * smallest, 1.5 * max(sizes))
