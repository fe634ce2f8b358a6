"""Where in a model the loss is curved, and which way: the mean Hessian eigenvalue of every
module.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from workbench import metrics
from workbench.figures.style import look, methods_in, nothing, panel, title

_PARTS = {"attn": "attention", "mlp": "MLP", "norm": "norms"}
_OUTSIDE = {"embed": "embedding", "norm": "final norm", "unembed": "head"}
_MOST = 40  # modules whose numbers can still be read: twelve blocks and what lies outside
_SMALLEST = 1e-3  # share of the largest value below which the scale is linear


def modules(
    table: pd.DataFrame,
    split: str = "forget-heldout",
    arm: str = "unlearned",
    *,
    ax: Axes | None = None,
) -> Figure:
    """Modules (upwards, as the stream goes) by methods; the mean eigenvalue is the trace of the
    module's own block of the Hessian over its number of weights.

    One symmetric scale for all: red is curved upwards, blue downwards; near 0 it is linear. Numbers
    are means over seeds, in brackets where the range of the seeds (or of their intervals, where the
    table has them) holds 0. What was not measured is grey. In very deep models only the negative
    modules are marked, with a minus.

    Args:
        table: tidy results; stage ``sharpness``, metric ``module_eigenvalue``, ``site`` the module
            (``embed``, ``blocks.2.attn``, ``blocks.2.mlp``, ``blocks.2.norm``, ``norm``,
            ``unembed``), ``split`` the texts of the loss, ``arm`` which model; one row per method
            and seed.
        split: the texts whose loss it is.
        arm: ``unlearned`` (before the attack; also rows without an arm) or ``relearned``.
        ax: to draw into; the colour bar takes room from it.
    """
    rows = table[
        (table["stage"] == "sharpness")
        & (table["metric"] == metrics.MODULE_EIGENVALUE.name)
        & (table["split"] == split)
        & table["seed"].notna()
    ]
    rows = rows[
        np.isfinite(rows["value"].astype(float))
        & rows["site"].notna()
        & (rows["arm"].fillna("unlearned") == arm)
    ]
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods:
        return nothing("no curvature of modules in this table", ax)
    sites = sorted(rows["site"].unique(), key=_place)
    rows = rows.assign(
        low=rows["low"].fillna(rows["value"]), high=rows["high"].fillna(rows["value"])
    )
    groups = rows.groupby(["site", "method"])
    means, low, high = (
        summaries.unstack().reindex(index=sites, columns=methods).to_numpy(dtype=float)
        for summaries in (groups["value"].mean(), groups["low"].min(), groups["high"].max())
    )
    largest = float(np.nanmax(np.abs(means))) or 1.0
    power = 3 * int(np.floor(np.log10(largest) / 3))
    means, largest = means / 10.0**power, largest / 10.0**power
    with look():
        height = 1.6 + (0.25 if len(sites) <= _MOST else 0.12) * len(sites)
        figure, axes = panel(ax, (2.9 + 0.44 * len(methods), height))
        linear = max(
            _SMALLEST * largest,
            min(
                float(np.min(np.abs(means[np.nonzero(np.nan_to_num(means))]), initial=largest)),
                0.1 * largest,
            ),
        )
        axes.set_facecolor("0.85")
        image = axes.imshow(
            means,
            origin="lower",
            aspect="auto",
            cmap="RdBu_r",
            norm=SymLogNorm(linear, vmin=-largest, vmax=largest, base=10),
        )
        _write(
            axes,
            means,
            unsure=(low <= 0) & (high >= 0),
            shades=np.abs(np.asarray(image.norm(means), dtype=float) - 0.5),
        )
        axes.set_xticks(
            range(len(methods)),
            [title(method) for method in methods],
            rotation=50,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set_yticks(*_ticks(sites), fontsize=8)
        axes.grid(visible=False)
        unit = "nats per token\nper squared unit of weight"
        bar = figure.colorbar(
            image,
            ax=axes,
            label="mean Hessian eigenvalue,\n" + (f"$10^{{{power}}}$ {unit}" if power else unit),
        )
        decades = 10.0 ** np.arange(
            np.ceil(np.log10(2 * linear)), np.floor(np.log10(largest)) + 1
        )  # clear of 0
        bar.set_ticks([*-decades[::-1], 0.0, *decades])
        bar.minorticks_off()
        bar.ax.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
        )
    return figure


def _place(site: str) -> tuple[float, float, str]:
    """Sorts modules as the stream goes through them; what is unknown comes behind the blocks."""
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", site):
        return float(found[1]), float([*_PARTS, found[2]].index(found[2])), site
    return {"embed": -1.0, "norm": 2e9, "unembed": 3e9}.get(site, 1e9), 0.0, site


def _name(site: str) -> str:
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", site):
        return f"block {found[1]} {_PARTS.get(found[2], found[2])}"
    return _OUTSIDE.get(site, site)


def _ticks(sites: list[str]) -> tuple[list[int], list[str]]:
    """Every module by name; of many, both ends and some blocks."""
    if len(sites) <= _MOST:
        return list(range(len(sites))), [_name(site) for site in sites]
    block = [site.split(".")[1] if site.startswith("blocks.") else site for site in sites]
    first = [number for number, name in enumerate(block) if block.index(name) == number]
    labelled = [
        number for number in first if not block[number].isdigit() or int(block[number]) % 4 == 0
    ]
    return labelled, [
        f"block {block[number]}" if block[number].isdigit() else _name(sites[number])
        for number in labelled
    ]


def _write(axes: Axes, means: np.ndarray, *, unsure: np.ndarray, shades: np.ndarray) -> None:
    many = len(means) > _MOST
    for i, j in zip(*np.nonzero(np.isfinite(means)), strict=True):
        value = float(means[i, j])
        if many and value >= 0:
            continue
        ink = "white" if shades[i, j] > 0.33 else "black"
        text = "\N{MINUS SIGN}" if many else f"({_short(value)})" if unsure[i, j] else _short(value)
        axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=ink)


def _short(value: float) -> str:
    size = abs(value)
    text = (
        f"{value:.0f}"
        if size >= 10
        else f"{value:.1f}"
        if size >= 1
        else f"{value:.2f}"
        if size >= 0.095
        else f"{value:.1g}"
    )
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else "0"
