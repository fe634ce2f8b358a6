"""Have the curvature's numbers settled? Ritz values by Lanczos step, and the running estimate of
the trace by probe.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullLocator

from workbench import metrics
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_MARKS = "os^Dv<>PX*"
_DASHES = ("-", "--", "-.")
_MARKED = 8  # marks along a line
_FEW = 6  # bands that can still be told apart where they overlap


def stroke(number: int) -> dict[str, str]:
    """Marker and dash of the ``number``-th line: 30 differ, so that no line is known by its colour
    alone.
    """
    return {
        "marker": _MARKS[number % len(_MARKS)],
        "linestyle": _DASHES[number // len(_MARKS) % len(_DASHES)],
    }


def convergence(
    table: pd.DataFrame,
    split: str = "forget-heldout",
    arm: str = "unlearned",
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Two panels, one colour and marker per method, the lowest seed of each: every seed has other
    probes, and their mean would look settled before any of them is.

    Left the largest (filled marks) and the smallest (hollow marks) Ritz value after so many Lanczos
    steps; right the mean over so many Hutchinson probes, with a band of 1.96 standard errors where
    there are few methods, and whiskers at the last probe where there are many. The right panel is
    as high as what is drawn after a quarter of the probes: the first few say little, and would set
    the scale.

    Args:
        table: tidy results; metric ``ritz``, arms ``top`` and ``bottom``, along the Lanczos
            steps; metric ``running_trace``, along the probes, ``low`` and ``high`` the band, arm
            as below or none.
        split: the texts whose loss it is; rows without a split are drawn as well.
        arm: whose trace: ``unlearned`` (before the attack) or ``relearned``.
        figure: or part of one, to draw into; no ``ax``: one panel per estimate.
    """
    rows = table[
        table["seed"].notna()
        & np.isfinite(table["value"].astype(float))
        & np.isfinite(table["x"].astype(float))
    ]
    rows = rows[
        rows["metric"].isin(["ritz", "running_trace"])
        & (rows["split"].isna() | (rows["split"] == split))
    ]
    rows = rows[
        rows["arm"]
        .isin(["top", "bottom"])
        .where(rows["metric"] == metrics.RITZ.name, rows["arm"].fillna(arm) == arm)
    ]
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods:
        return nothing("no convergence of the curvature in this table", figure)
    rows = rows.assign(first=rows.groupby(["metric", "method"])["seed"].transform("min"))
    rows = rows[rows["seed"] == rows["first"]].sort_values("x")
    ritz, traces = metrics.RITZ.rows(rows), metrics.RUNNING_TRACE.rows(rows)
    parts = [(name, part) for name, part in (("ritz", ritz), ("trace", traces)) if len(part)]
    with look():
        legend_rows = -(-len(methods) // 5)
        figure, panels = subplots(
            figure,
            1,
            len(parts),
            (max(5.0, 4.6 * len(parts)), 3.3 + 0.2 * legend_rows),
        )
        for axes, (name, part) in zip(panels[0], parts, strict=True):
            for number, method in enumerate(methods):
                method_rows = part[part["method"] == method]
                if name == "ritz":
                    _ritz(axes, method_rows, method, number)
                else:
                    _trace(axes, method_rows, method, number, len(methods))
            linear = _scale(axes, part)
            if name == "trace":
                _zoom(axes, part, len(methods))
            if linear:
                _decades(axes, linear)
            axes.axhline(0, color="0.5", linewidth=0.7)
        for axes, (name, _) in zip(panels[0], parts, strict=True):
            axes.set_title(
                "ends of the spectrum (filled: largest, hollow: smallest)"
                if name == "ritz"
                else "trace, mean of the probes so far ± 1.96 standard errors"
            )
            axes.set_xlabel("Lanczos steps" if name == "ritz" else "Hutchinson probes")
        panels[0][0].set_ylabel("nats per token per squared unit of weight")
        handles = {
            label: handle
            for axes in panels[0]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        order = [title(method) for method in methods if title(method) in handles]
        figure.legend(
            [handles[name] for name in order],
            order,
            loc="outside lower center",
            ncols=5 if len(parts) > 1 else 3,
            handlelength=3,
        )
    return figure.figure


def _style(method: str, number: int, points: int) -> dict[str, object]:
    return {
        **stroke(number),
        "color": colour(method),
        "linewidth": 1.1,
        "markersize": 3.5,
        "markevery": max(1, points // _MARKED),
    }


def _ritz(axes: Axes, rows: pd.DataFrame, method: str, number: int) -> None:
    for arm in ("top", "bottom"):
        line = rows[rows["arm"] == arm]
        if len(line):
            face = {} if arm == "top" else {"markerfacecolor": "white"}
            label = title(method) if arm == "top" or not (rows["arm"] == "top").any() else None
            axes.plot(
                line["x"],
                line["value"],
                label=label,
                **_style(method, number, len(line)),  # type: ignore[arg-type]
                **face,  # type: ignore[arg-type]
            )


def _trace(axes: Axes, rows: pd.DataFrame, method: str, number: int, methods: int) -> None:
    if not len(rows):
        return
    axes.plot(rows["x"], rows["value"], label=title(method), **_style(method, number, len(rows)))  # type: ignore[arg-type]
    low, high = rows["low"].to_numpy(dtype=float), rows["high"].to_numpy(dtype=float)
    if methods <= _FEW:
        axes.fill_between(
            rows["x"].to_numpy(dtype=float),
            low,
            high,
            color=colour(method),
            alpha=0.15,
            linewidth=0,
        )
    elif np.isfinite(low[-1]) and np.isfinite(high[-1]):
        end, value = float(rows["x"].iloc[-1]), float(rows["value"].iloc[-1])
        place = end * (1 + 0.008 * (number + 1))  # beside one another
        axes.errorbar(
            place,
            value,
            yerr=[[max(0.0, value - low[-1])], [max(0.0, high[-1] - value)]],
            fmt="none",
            ecolor=colour(method),
            elinewidth=1.2,
            capsize=1.5,
        )


def _scale(axes: Axes, rows: pd.DataFrame) -> float:
    """Logarithmic on either side of zero where the methods' last values at one end differ by more
    than a decade: a collapsed model is hundreds of times as curved as the base.

    Returns where it becomes linear; 0 for an axis that is linear throughout.
    """
    last = rows.groupby(["arm", "method"], dropna=False)["value"].last().abs()
    last = last[last > 0]
    if not any(part.max() > 10 * part.min() for _, part in last.groupby(level=0, dropna=False)):
        return 0.0
    linear = max(float(last.min()) / 2, 1e-4 * float(last.max()))
    axes.set_yscale("symlog", linthresh=linear, linscale=0.5)
    return linear


def _zoom(axes: Axes, rows: pd.DataFrame, methods: int) -> None:
    last = float(rows["x"].max())
    settled = rows[rows["x"] >= last / 4]
    ends = settled[["value", "low", "high"]].to_numpy(dtype=float)
    low, high = min(0.0, float(np.nanmin(ends))), max(0.0, float(np.nanmax(ends)))
    room = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - room * (low < 0), high + room * (high > 0))
    if methods > _FEW:  # beyond the last probe stand only the whiskers
        axes.set_xticks([place for place in axes.get_xticks() if 0 <= place <= last])


def _decades(axes: Axes, linear: float) -> None:
    """Ticks at 0 and at the decades that are clear of it."""
    low, high = axes.get_ylim()
    decades = 10.0 ** np.arange(
        np.ceil(np.log10(2 * linear)), np.floor(np.log10(max(abs(low), abs(high)))) + 1
    )
    axes.set_yticks([place for place in (*-decades[::-1], 0.0, *decades) if low <= place <= high])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(low, high)
