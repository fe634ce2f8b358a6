"""Two-dimensional slices of a loss through every model, on one scale."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from workbench import metrics
from workbench.figures.style import grid, look, methods_in, nothing, title

_SPLITS = {
    "forget-attacked": "loss of attacked forget answers",
    "forget-heldout": "loss of held-out forget answers",
    "retain-neighbour": "loss of neighbour answers",
    "retain": "loss of retain answers",
    "novel": "loss of novel facts",
}


_PATH = (metrics.PLANE_ALONG, metrics.PLANE_TOWARDS, metrics.PLANE_OFF)


def _draw_path(
    axes: Axes, along: np.ndarray, towards: np.ndarray, off: np.ndarray, *, last: float
) -> None:
    """The path of the attack from the model at the origin on, its end and the base by name."""
    if len(along) > 1:
        axes.plot([0.0, *along], [0.0, *towards], color="white", linewidth=1.2)
        reach = float(np.nanmax([1e-12, *off]))
        sizes = 6 + 24 * np.nan_to_num(off) / reach
        axes.scatter(
            along, towards, s=sizes, color="white", edgecolors="black", linewidths=0.6, zorder=3
        )
    end = f"step {last:g}" + (f" ({off[-1]:.2g} off)" if off[-1] >= 1e-6 else "")
    for name, x, y, shift in ((end, along[-1], towards[-1], -11), ("base", 0.0, 1.0, 4)):
        axes.plot(
            x, y, "o", markersize=4, color="white", markeredgecolor="black", markeredgewidth=0.8
        )
        left = x > sum(axes.get_xlim()) / 2
        label = axes.annotate(
            name,
            (x, y),
            xytext=(-4 if left else 4, shift),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=7,
            bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.8},
        )
        label.set_in_layout(False)


def plane(
    table: pd.DataFrame,
    split: str = "forget-heldout",
    axes_names: tuple[str, str] = ("first direction", "second direction"),
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """One panel per method with contours of one loss (nats per token); the same levels and colours
    in all panels, a cross at the model itself.

    Points without a finite loss are left white. Of several seeds the lowest is drawn: a mean over
    seeds of surfaces in different planes is a picture of nothing.

    Args:
        table: tidy results; stage ``sharpness``, metric ``plane_loss`` (``split`` the loss), and
            the path of the attack: metrics ``plane_along``, ``plane_towards`` and ``plane_off``. It
            is joined by a line, its points larger the farther they are off the plane (what is far
            off does not have the loss that is drawn under it), and its end is named.
        split: which loss.
        axes_names: labels of the two axes.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    rows = table[(table["stage"] == "sharpness") & table["seed"].notna()]
    surfaces = metrics.PLANE_LOSS.rows(rows, split=split)
    methods = methods_in(surfaces["method"].dropna().tolist())
    finite = surfaces["value"][np.isfinite(surfaces["value"].astype(float))]
    if not methods or not len(finite):
        return nothing(f"no plane of the loss of {split} in this table", figure)
    levels = MaxNLocator(12).tick_values(float(finite.min()), float(finite.max()))
    with look():
        figure, panels = grid(
            figure,
            len(methods),
            columns=4,
            width=2.7 if len(methods) > 1 else 5.0,
            height=2.5 if len(methods) > 1 else 3.2,
        )
        drawn = None
        for number, (axes, method) in enumerate(zip(panels, methods, strict=True)):
            surface = surfaces[surfaces["method"] == method]
            seed = surface["seed"].min()
            surface = surface[surface["seed"] == seed]
            wide = surface.pivot_table(
                index="y", columns="x", values="value", aggfunc="first", dropna=False
            ).sort_index()
            heights = np.ma.masked_invalid(wide.to_numpy(dtype=float))
            axes.grid(False)
            if not heights.mask.all():
                drawn = axes.contourf(
                    wide.columns.to_numpy(dtype=float),
                    wide.index.to_numpy(dtype=float),
                    heights,
                    levels=levels,
                    cmap="viridis",
                )
                axes.contour(drawn, colors="white", linewidths=0.4, alpha=0.6)
            axes.plot(0, 0, "+", color="white", markersize=9, markeredgewidth=2.6)
            axes.plot(0, 0, "+", color="black", markersize=8, markeredgewidth=1.2)
            path = metrics.matching(rows, method=method, seed=seed).pivot_table(
                index="x", columns="metric", values="value"
            )
            path = path.reindex(columns=[each.name for each in _PATH]).dropna(how="all")
            if len(path):
                _draw_path(axes, *path.to_numpy(dtype=float).T, last=path.index[-1])
            axes.set_title(title(method))
            axes.set_xlabel(axes_names[0])
            if number % 4 == 0:
                axes.set_ylabel(axes_names[1])
        if drawn is not None:
            scale = plt.cm.ScalarMappable(norm=drawn.norm, cmap=drawn.cmap)
            figure.colorbar(
                scale,
                ax=panels,
                label=f"{_SPLITS.get(split, split)}\n(nats per token)",
                shrink=0.9,
                fraction=0.05,
                aspect=25,
            )
    return figure.figure
