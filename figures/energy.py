"""Where the energy of a weight change lies: on the directions that retain texts use most, or beside
them.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_SIDES = {
    "mlp.hook_in": "gate and up projections (MLP inputs)",
    "mlp.out.hook_in": "down projections (their inputs)",
}


def energy(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Share of every change's energy inside the top-k directions of the retain activations, mean
    over blocks and range over seeds; dashed: a random change.

    Args:
        table: tidy results; stage ``unlearn``, metrics ``energy_in_retain_subspace`` and
            ``energy_of_random_delta``.
        figure: or part of one, to draw into; no ``ax``: one panel per kind of input.
    """
    rows = table[table["metric"].isin(["energy_in_retain_subspace", "energy_of_random_delta"])]
    sites = rows["site"].fillna("")
    sides = [side for side in _SIDES if sites.str.endswith("." + side).any()]
    methods = methods_in(rows["method"].dropna().tolist())
    if not sides or not methods:
        return nothing("no energy of a weight change in this table", figure)
    with look():
        figure, panels = subplots(
            figure,
            1,
            len(sides),
            (3.9 * len(sides) + 1.2, 3.4),
            sharey=True,
        )
        for axes, side in zip(panels[0], sides, strict=True):
            side_rows = rows[sites.str.endswith("." + side)]
            ranks = sorted(side_rows["x"].unique())
            for method in methods:
                energies = metrics.ENERGY_IN_RETAIN_SUBSPACE.rows(side_rows, method=method)
                by_seed = energies.groupby(["seed", "x"], dropna=False)["value"].mean().groupby("x")
                centre, low, high = by_seed.mean(), by_seed.min(), by_seed.max()
                axes.plot(
                    centre.index,
                    centre,
                    color=colour(method),
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                    label=title(method),
                )
                axes.fill_between(
                    centre.index.to_numpy(dtype=float),
                    low,
                    high,
                    color=colour(method),
                    alpha=0.15,
                    linewidth=0,
                )
            chance = metrics.ENERGY_OF_RANDOM_DELTA.rows(side_rows).groupby("x")["value"].mean()
            axes.plot(
                chance.index,
                chance,
                color="0.4",
                linestyle="--",
                linewidth=1.2,
                label="random change",
            )
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [f"{rank:g}" for rank in ranks])
            axes.set_xlabel("top-k principal directions of retain activations")
            axes.set_title(_SIDES[side])
            axes.set_ylim(bottom=0)
        panels[0][0].set_ylabel("share of the change's energy inside")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", ncols=1 + (len(methods) > 14))
    return figure.figure
