"""The shift behind a stray word against the noise that the trigger theory takes it for:
coordinates, spectrum, variance, and how often noise undoes it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_CONTROL = "retain-token"
_GREY, _BAND = "0.4", "0.82"


def trigger_theory(
    table: pd.DataFrame,
    *,
    arm: str = "forget-token",
    site: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """One row of panels per method: the shift's coordinates, the spectrum of its covariance,
    ``eta`` by steering coefficient (where varied), rejection rate.

    Dashed: what ``N(0, eta I)`` independent of the query gives, with its central 95 % where that
    was drawn. Bars are 95 % intervals over queries, or with
    several seeds the range over seeds around their mean. Grey: the same model behind a
    retain-token.

    Args:
        table: tidy results; stage ``triggers``, metrics ``theory_*``
            (``workbench.diagnostics.trigger_theory.add_theory``).
        arm: kind of the word in front.
        site: where the shift was measured; by default the first site that the table holds.
        figure: or part of one, to draw into; no ``ax``: one panel per method and measure.
    """
    rows = table[(table["stage"] == "triggers") & table["metric"].str.startswith("theory_")]
    sites = rows["site"].dropna().unique().tolist()
    rows = rows[rows["site"] == (site if site is not None or not sites else sites[0])]
    methods = methods_in(rows.loc[rows["arm"] == arm, "method"].dropna().tolist())
    if not methods:
        return nothing("no check of the trigger theory in this table", figure)
    kinds = [
        kind
        for kind in _PANELS
        if len(rows[(rows["arm"] == arm) & (rows["metric"] == f"theory_{kind}")])
    ]
    with look():
        figure, panels = subplots(
            figure,
            len(methods),
            len(kinds),
            (2.5 * len(kinds) + 0.4, 1.75 * len(methods) + 1.1),
            sharex="col",
            sharey="col",
        )
        for line, method in zip(panels, methods, strict=True):
            arm_rows, control_rows = (
                rows[(rows["method"] == method) & (rows["arm"] == name)] for name in (arm, _CONTROL)
            )
            for axes, kind in zip(line, kinds, strict=True):
                if len(arm_rows[arm_rows["metric"] == f"theory_{kind}"]):
                    _PANELS[kind][2](
                        axes,
                        arm_rows,
                        control_rows if arm != _CONTROL else control_rows.iloc[:0],
                        colour(method),
                    )
                else:
                    axes.text(
                        0.5,
                        0.5,
                        "not measured",
                        ha="center",
                        va="center",
                        transform=axes.transAxes,
                        color=_GREY,
                        fontsize=8,
                    )
            line[0].set_ylabel(title(method), color=colour(method), fontweight="bold")
        for axes, kind in zip(panels[0], kinds, strict=True):
            axes.set_title(_PANELS[kind][0])
        for axes, kind in zip(panels[-1], kinds, strict=True):
            axes.set_xlabel(_PANELS[kind][1])
        handles = [
            Line2D([], [], color="0.2", linewidth=1.6, label=f"behind a {arm}"),
            Line2D([], [], color=_GREY, linewidth=1.3, linestyle=":", label=f"behind a {_CONTROL}"),
            Line2D(
                [], [], color="black", linewidth=1, linestyle="--", label=r"under $N(0, \eta I)$"
            ),
            Patch(facecolor=_BAND, label="its 95 % at this sample size"),
        ]
        if arm == _CONTROL or not len(rows[rows["arm"] == _CONTROL]):
            del handles[1]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure.figure


def _curve(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Mean over seeds by step; ``low`` and ``high`` are the interval of a single seed, the range of
    several, and for what is expected the mean band.
    """
    groups = rows[rows["metric"] == f"theory_{kind}"].groupby("x")
    mean = groups[["value", "low", "high"]].mean()
    several = groups["value"].count() > 1
    if not kind.endswith("_expected"):
        mean["low"] = mean["low"].where(~several, groups["value"].min())
        mean["high"] = mean["high"].where(~several, groups["value"].max())
    return mean.astype(float)


def _scalar(rows: pd.DataFrame, kind: str) -> float:
    return float(rows.loc[rows["metric"] == f"theory_{kind}", "value"].mean())


def _note(axes: Axes, text: str, place: str = "right") -> None:
    x = 0.97 if place == "right" else 0.03
    axes.text(x, 0.96, text, ha=place, va="top", transform=axes.transAxes, fontsize=7)


def _bars(
    axes: Axes, arm_rows: pd.DataFrame, control_rows: pd.DataFrame, kind: str, shade: str
) -> None:
    """The method's curve with its intervals, and that of the control without, whose intervals are
    about as long and would lie on top.
    """
    control_curve, curve = _curve(control_rows, kind), _curve(arm_rows, kind)
    axes.plot(
        control_curve.index, control_curve["value"], ":", color=_GREY, linewidth=1.3, zorder=3
    )
    spread = [
        (curve["value"] - curve["low"]).clip(lower=0),
        (curve["high"] - curve["value"]).clip(lower=0),
    ]
    axes.errorbar(
        curve.index.to_numpy(),
        curve["value"],
        yerr=spread,
        color=shade,
        marker="o",
        markersize=3,
        linewidth=1.2,
        elinewidth=0.9,
        capsize=1.5,
    )
    axes.set_xscale("log")


def _histogram(axes: Axes, arm_rows: pd.DataFrame, control_rows: pd.DataFrame, shade: str) -> None:
    place = np.linspace(-6, 6, 121)
    for rows, ink, dash in ((arm_rows, shade, "-"), (control_rows, _GREY, ":")):
        curve = _curve(rows, "histogram")
        axes.plot(
            curve.index,
            curve["value"].where(curve["value"] > 0),
            dash,
            color=ink,
            linewidth=1.3,
            drawstyle="steps-mid",
        )
    axes.plot(
        place,
        np.exp(-(place**2) / 2) / np.sqrt(2 * np.pi),
        color="black",
        linewidth=1,
        linestyle="--",
    )
    axes.set_yscale("log")
    axes.set_ylim(1e-5, 1e3)
    axes.set_yticks([1e-4, 1e-2, 1])
    axes.set_xlim(-8, 8)
    shares = [
        f"{_scalar(arm_rows, kind):.1%}".replace("-0.0%", "0.0%")
        for kind in ("mean_share", "query_share")
    ]
    _note(
        axes,
        f"excess kurtosis {_scalar(arm_rows, 'kurtosis_mean'):.2g}\nsquared mean {shares[0]} of "
        "mean square"
        + ("" if shares[1] == "nan%" else f"\nbetween queries {shares[1]} of variance"),
    )


def _spectrum(axes: Axes, arm_rows: pd.DataFrame, control_rows: pd.DataFrame, shade: str) -> None:
    expected = _curve(arm_rows, "spectrum_expected")
    axes.fill_between(
        expected.index.to_numpy(), expected["low"], expected["high"], color=_BAND, linewidth=0
    )
    axes.plot(expected.index, expected["value"], color="black", linewidth=1, linestyle="--")
    for rows, ink, dash in ((arm_rows, shade, "-"), (control_rows, _GREY, ":")):
        curve = _curve(rows, "spectrum")
        axes.plot(curve.index, curve["value"], dash, color=ink, linewidth=1.3)
    axes.set_yscale("log")
    _note(
        axes,
        f"participation ratio {_scalar(arm_rows, 'participation_ratio'):.3g}\n(assumed "
        f"{_scalar(arm_rows, 'participation_ratio_expected'):.3g})",
    )


def _variance(axes: Axes, mine: pd.DataFrame, control: pd.DataFrame, shade: str) -> None:
    _bars(axes, mine, control, "eta_of_coefficient", shade)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    _note(axes, f"slope {_scalar(mine, 'eta_slope'):.2f}", "left")


def _rejection(axes: Axes, mine: pd.DataFrame, control: pd.DataFrame, shade: str) -> None:
    place = np.geomspace(0.05, 20, 81)
    axes.plot(place, np.arctan(place) / np.pi, color="black", linewidth=1, linestyle="--")
    _bars(axes, mine, control, "rejection", shade)
    axes.set_ylim(0, 0.65)


_PANELS: dict[str, tuple[str, str, Callable[[Axes, pd.DataFrame, pd.DataFrame, str], None]]] = {
    "histogram": ("coordinates of the shift\n(density)", r"coordinate / $\sqrt{\eta}$", _histogram),
    "spectrum": (
        "spectrum of its covariance\n(share of variance)",
        "number of the eigenvalue",
        _spectrum,
    ),
    "eta_of_coefficient": (
        "its variance $\\eta$ by\nsteering coefficient",
        "steering coefficient",
        _variance,
    ),
    "rejection": (
        "rejection of its loss\nchange under noise (rate)",
        r"noise / shift, $\sqrt{\nu / \eta}$",
        _rejection,
    ),
}
