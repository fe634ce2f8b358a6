"""Loss slices: how the forget and retain losses change along one direction from every model."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_ARMS = {
    "descent": ("along the attacker's descent direction", "step / length of the weights"),
    "random": ("along a filter-normalised random direction", "step / length of the weights"),
    "to-base": ("from the unlearned model towards the base", "0 = unlearned, 1 = base"),
}
_SPLITS = {
    "forget-heldout": "loss of held-out forget answers",
    "retain-neighbour": "loss of neighbour answers",
    "retain": "loss of retain answers",
}


def slices(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Answer loss in nats per token; bold line: mean over seeds, band: range over seeds.

    Args:
        table: tidy results; metric ``slice_loss``.
        figure: or part of one, to draw into; no ``ax``: one panel per loss and direction.
    """
    rows = table[(table["metric"] == metrics.SLICE_LOSS.name) & table["seed"].notna()]
    arms = [arm for arm in _ARMS if (rows["arm"] == arm).any()]
    splits = [split for split in _SPLITS if (rows["split"] == split).any()]
    if not arms or not splits:
        return nothing("no loss slice in this table", figure)
    with look():
        figure, panels = subplots(
            figure,
            len(splits),
            len(arms),
            (3.4 * len(arms), 2.5 * len(splits) + 0.7),
            sharey="row",
        )
        for i, split in enumerate(splits):
            for j, arm in enumerate(arms):
                axes = panels[i][j]
                for method in methods_in(rows["method"].dropna().tolist()):
                    curve = rows[
                        (rows["method"] == method) & (rows["arm"] == arm) & (rows["split"] == split)
                    ]
                    if not len(curve):
                        continue
                    band = curve.groupby("x")["value"].agg(["mean", "min", "max"])
                    dash = "--" if method == "never-learned" else "-"
                    axes.plot(
                        band.index,
                        band["mean"],
                        color=colour(method),
                        linestyle=dash,
                        label=title(method),
                        linewidth=1.3,
                    )
                    axes.fill_between(
                        band.index.astype(float),
                        band["min"],
                        band["max"],
                        color=colour(method),
                        alpha=0.15,
                        linewidth=0,
                    )
                axes.axvline(0, color="0.5", linewidth=0.7)
                if i == 0:
                    axes.set_title(_ARMS[arm][0])
                if i == len(splits) - 1:
                    axes.set_xlabel(_ARMS[arm][1])
                if j == 0:
                    axes.set_ylabel(_SPLITS[split] + "\n(nats per token)")
                axes.set_yscale("symlog", linthresh=0.1)
                axes.set_ylim(bottom=0)
        handles = {
            label: handle
            for row in panels
            for axes in row
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5)
    return figure.figure
