"""Spectra: how fast variance falls over principal directions, and how much of it forget and retain
texts share.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from workbench import metrics
from workbench.figures.style import look, nothing, subplots

_KINDS = {
    "mlp.hook_in": "MLP inputs",
    "mlp.out.hook_in": "inputs of the down projections",
    "mlp.hook_out_grad": "output gradients of the MLPs",
}
_SPLITS = {"forget": "#882255", "retain": "#332288"}
_ARMS = {
    "retain-retain": ("two halves of the retain set", "#332288", "--"),
    "forget-retain": ("forget and retain", "#44AA99", "-"),
    "random": ("random subspaces", "0.5", ":"),
}


def spectra(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Top: share of variance per principal direction, one line per block; bands are tiers of
    components with their share of the retain texts' variance. Bottom: overlap of the top-k
    subspaces, mean and range over blocks.

    Args:
        table: tidy results; stage ``subspaces``.
        figure: or part of one, to draw into; no ``ax``: two panels per kind of activation.
    """
    rows = table[table["stage"] == "subspaces"]
    sites = rows["site"].fillna("")
    kinds = [kind for kind in _KINDS if sites.str.endswith("." + kind).any()]
    if not kinds:
        return nothing("no subspace in this table", figure)
    with look():
        figure, panels = subplots(
            figure,
            2,
            len(kinds),
            (3.3 * len(kinds), 5.0),
            sharey="row",
        )
        for j, kind in enumerate(kinds):
            kind_rows = rows[sites.str.endswith("." + kind)]
            for split, shade in _SPLITS.items():
                for number, (_, line) in enumerate(
                    metrics.VARIANCE_SHARE.rows(kind_rows, split=split)
                    .sort_values("x")
                    .groupby("site")
                ):
                    panels[0][j].plot(
                        line["x"],
                        line["value"],
                        color=shade,
                        alpha=0.75,
                        linewidth=1,
                        label=f"{split} texts" if number == 0 else None,
                    )
            tiers = (
                metrics.TIER_VARIANCE_SHARE.rows(kind_rows, split="retain")
                .groupby("x")["value"]
                .mean()
            )
            low = 0.0
            for number, (high, held) in enumerate(
                zip(tiers.index.to_numpy(dtype=float), tiers, strict=True)
            ):
                if number % 2 == 0:
                    panels[0][j].axvspan(low + 0.5, high + 0.5, color="0.5", alpha=0.1, linewidth=0)
                place = {
                    "transform": panels[0][j].get_xaxis_transform(),
                    "ha": "center",
                    "va": "bottom",
                    "fontsize": 7,
                    "color": "0.3",
                }
                panels[0][j].text((low + high + 1) / 2, 0.02, f"{held:.0%}", **place)
                low = high
            panels[0][j].set_yscale("log")
            panels[0][j].set_title(_KINDS[kind])
            panels[0][j].set_xlabel("principal direction")
            for arm, (label, shade, dash) in _ARMS.items():
                curve = (
                    metrics.SUBSPACE_OVERLAP.rows(kind_rows, arm=arm)
                    .groupby("x")["value"]
                    .agg(["mean", "min", "max"])
                )
                panels[1][j].plot(
                    curve.index,
                    curve["mean"],
                    dash,
                    color=shade,
                    label=label,
                    marker="o",
                    markersize=3,
                )
                panels[1][j].fill_between(
                    np.asarray(curve.index, dtype=float),
                    curve["min"],
                    curve["max"],
                    color=shade,
                    alpha=0.15,
                    linewidth=0,
                )
            panels[1][j].set_ylim(0, 1.02)
            panels[1][j].set_xscale("log", base=2)
            ranks = sorted(
                kind_rows.loc[kind_rows["metric"] == metrics.SUBSPACE_OVERLAP.name, "x"].unique()
            )
            panels[1][j].set_xticks(ranks, [f"{rank:g}" for rank in ranks])
            panels[0][j].xaxis.set_major_locator(MaxNLocator(integer=True))
            panels[1][j].set_xlabel("rank k of both subspaces")
        panels[0][0].set_ylabel("share of variance")
        panels[1][0].set_ylabel("overlap\n(mean squared cosine)")
        panels[0][0].legend(loc="upper right")
        handles, labels = panels[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, title="overlap of")
    return figure.figure
