"""Two-dimensional slices of a loss through every model, on one scale."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workbench.figures.style import grid, look, methods_in, nothing, title

_SPLITS = {
    "forget-attacked": "loss of attacked forget answers",
    "forget-heldout": "loss of held-out forget answers",
    "retain-neighbour": "loss of neighbour answers",
    "retain": "loss of retain answers",
    "novel": "loss of novel facts",
}


def plane(
    table: pd.DataFrame,
    split: str = "forget-heldout",
    axes_names: tuple[str, str] = ("first direction", "second direction"),
) -> Figure:
    """One panel per method with contours of one loss (nats per token); the same levels and colours
    in all panels, a cross at the model itself.

    Points without a finite loss are left white. Of several seeds the lowest is drawn: a mean over
    seeds of surfaces in different planes is a picture of nothing.

    Args:
        table: tidy results; stage ``sharpness``, metric ``plane_loss``: ``step`` is the first
            coordinate, ``arm`` the second as a decimal number, ``split`` the loss. Optional points
            in the plane: metric ``plane_point``, ``arm`` the name of the point, ``step`` its first
            coordinate, ``value`` its second, ``high`` its distance from the plane in the units of
            the axes (printed beside the name: what is far off the plane does not have the loss that
            is drawn under it). Points named ``step N`` are a path from the model: joined by a line,
            larger the farther they are off the plane, the last one named.
        split: which loss.
        axes_names: labels of the two axes.
    """
    rows = table[
        (table["stage"] == "sharpness")
        & table["metric"].isin(["plane_loss", "plane_point"])
        & table["seed"].notna()
    ]
    surfaces = rows[(rows["metric"] == "plane_loss") & (rows["split"] == split)]
    methods = methods_in(surfaces["method"].dropna().tolist())
    finite = surfaces["value"][np.isfinite(surfaces["value"].astype(float))]
    if not methods or not len(finite):
        return nothing(f"no plane of the loss of {split} in this table")
    levels = MaxNLocator(12).tick_values(float(finite.min()), float(finite.max()))
    with look():
        figure, panels = grid(
            len(methods),
            columns=4,
            width=2.7 if len(methods) > 1 else 5.0,
            height=2.5 if len(methods) > 1 else 3.2,
        )
        drawn = None
        for number, (axes, method) in enumerate(zip(panels, methods, strict=True)):
            surface = surfaces[surfaces["method"] == method]
            seed = surface["seed"].min()
            surface = surface[surface["seed"] == seed].assign(
                y=lambda chosen: chosen["arm"].astype(float)
            )
            wide = surface.pivot_table(
                index="y", columns="step", values="value", aggfunc="first", dropna=False
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
            points = rows[
                (rows["metric"] == "plane_point")
                & (rows["method"] == method)
                & (rows["seed"] == seed)
            ]
            path = points[points["arm"].str.startswith("step ")]
            path = path.iloc[
                np.argsort(path["arm"].str.removeprefix("step ").astype(float).to_numpy())
            ]
            if (
                len(path) > 1
                # a path is drawn whole, the farther off the plane the fainter the ground it stands
                # on, and named at its end
            ):
                axes.plot(
                    [0.0, *path["step"].astype(float)],
                    [0.0, *path["value"].astype(float)],
                    color="white",
                    linewidth=1.2,
                )
                reach = float(np.nanmax([1e-12, *path["high"].astype(float)]))
                sizes = 6 + 24 * path["high"].astype(float).fillna(0) / reach
                axes.scatter(
                    path["step"].astype(float),
                    path["value"].astype(float),
                    s=sizes,
                    color="white",
                    edgecolors="black",
                    linewidths=0.6,
                    zorder=3,
                )
                points = pd.concat([points[~points["arm"].str.startswith("step ")], path.iloc[-1:]])
            for name, x, y, off in points[["arm", "step", "value", "high"]].itertuples(index=False):
                axes.plot(
                    float(x),
                    float(y),
                    "o",
                    markersize=4,
                    color="white",
                    markeredgecolor="black",
                    markeredgewidth=0.8,
                )
                note = str(name) if np.isnan(off) or off < 1e-6 else f"{name} ({off:.2g} off)"
                box = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.8}
                label_left = float(x) > sum(axes.get_xlim()) / 2
                shift, side = (-4, "right") if label_left else (4, "left")
                label = axes.annotate(
                    note,
                    (float(x), float(y)),
                    xytext=(shift, -11 if str(name).startswith("step ") else 4),
                    textcoords="offset points",
                    ha=side,
                    fontsize=7,
                    bbox=box,
                )
                label.set_in_layout(False)
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
    return figure
