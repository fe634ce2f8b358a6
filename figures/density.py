"""Which directions around a model curve upwards, which downwards, and how many: the spectral
density of the Hessian of the forget loss.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_FLOOR = 1e-6  # densities below this are the far tails of the smoothing


def density(
    table: pd.DataFrame, split: str = "forget-heldout", *, figure: Figure | SubFigure | None = None
) -> Figure:
    """Log density over eigenvalues of either sign, one panel per arm, one colour per method, the
    base in every panel; one line per seed, shaded over the probes.

    Ticks along the bottom are the two ends of each spectrum (``top_eigenvalue``,
    ``bottom_eigenvalue``). The legend gives the trace with its standard error and the share of
    clearly negative eigenvalues, means over seeds. A base whose arm is no panel's (``base``) is
    drawn in every panel that has no base of its own.

    Args:
        table: tidy results; stage ``sharpness``, metric ``density`` along the eigenvalue,
            ``trace`` and ``trace_se``.
        split: the texts whose loss it is.
        figure: or part of one, to draw into; no ``ax``: one panel per arm.
    """
    rows = table[(table["stage"] == "sharpness") & (table["split"] == split)]
    curves = rows[(rows["metric"] == metrics.DENSITY.name) & rows["value"].notna()]
    if not len(curves):
        return nothing("no spectral density in this table", figure)
    arms = list(dict.fromkeys(curves.loc[curves["method"] != "base", "arm"].fillna(""))) or [""]
    largest = float(curves["x"].abs().max())
    lines = curves["method"].nunique()
    with look():  # the legends below grow with the methods, the panels stay
        figure, panels = subplots(
            figure,
            1,
            len(arms),
            (max(5.2, 4.4 * len(arms)), 3.4 + 0.2 * lines),
            sharex=True,
            sharey=True,
        )
        for axes, arm in zip(panels[0], arms, strict=True):
            _panel(axes, _of(rows, arm, arms), _of(curves, arm, arms))
            axes.set_title(arm)
            linear = 1e-3 * largest
            axes.set_xscale("symlog", linthresh=linear, linscale=0.6)
            decades = 10.0 ** np.arange(
                np.ceil(np.log10(2 * linear)), np.floor(np.log10(largest)) + 1
            )
            axes.set_xticks(np.concatenate([-decades[::-1], [0], decades]))
            axes.set_xlabel("Hessian eigenvalue, nats per token per squared unit of weight")
            axes.set_yscale("log")
            axes.set_ylim(bottom=_FLOOR)
            axes.axvline(0, color="0.4", linewidth=0.8)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
        panels[0][0].set_ylabel("share of eigenvalues per unit of arcsinh")
    return figure.figure


def _of(rows: pd.DataFrame, arm: str, panels: list[str]) -> pd.DataFrame:
    """The rows of one panel's arm, those of no arm, and, where the base has none of them, the
    base's of an arm without a panel.
    """
    arms, base = rows["arm"].fillna(""), rows["method"] == "base"
    mine = arms.isin([arm, ""])
    return rows[mine | (base & ~arms.isin(panels) & (not (base & (arms == arm)).any()))]


def _panel(axes: Axes, rows: pd.DataFrame, curves: pd.DataFrame) -> None:
    methods = methods_in(curves["method"].tolist())
    for number, method in enumerate(methods):
        method_rows = rows[rows["method"] == method]
        for position, (_, curve) in enumerate(
            curves[curves["method"] == method].groupby(["seed", "arm"], dropna=False)
        ):
            line = curve.sort_values("x").astype({"low": float, "high": float})
            axes.plot(
                line["x"],
                line["value"].clip(lower=_FLOOR / 10),
                color=colour(method),
                linewidth=1.3,
                label="" if position else _label(method, method_rows),
            )
            axes.fill_between(
                line["x"].to_numpy(float),
                line["low"].clip(lower=_FLOOR / 10),
                line["high"].clip(lower=_FLOOR / 10),
                color=colour(method),
                alpha=0.15,
                linewidth=0,
            )
        ends = method_rows.loc[
            method_rows["metric"].isin(["top_eigenvalue", "bottom_eigenvalue"]), "value"
        ].dropna()
        height = 0.045
        axes.vlines(
            ends.to_numpy(float),
            number * height,
            (number + 0.9) * height,
            transform=axes.get_xaxis_transform(),
            color=colour(method),
            linewidth=1.8,
            zorder=4,
        )


def _label(method: str, rows: pd.DataFrame) -> str:
    means = rows.groupby("metric")["value"].mean()
    trace, error = (float(means.get(name, np.nan)) for name in ("trace", "trace_se"))
    parts = [title(method)]
    if np.isfinite(trace):
        decimals = max(0, 1 - int(np.floor(np.log10(error)))) if error > 0 else 3
        parts.append(
            f"trace {trace:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error > 0 else "")
        )
    return ", ".join(parts)
