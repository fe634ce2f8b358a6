"""The attack ladder: how much comes back from which texts, and by which attack configuration."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_NAMES = {
    "gibberish": "gibberish",
    "general": "general text",
    "syntax": "same syntax,\nnew people",
    "topic": "names them,\nsays nothing",
    "public": "public facts\nabout them",
    "part": "disjoint part",
    "whole": "whole set\n(leaks)",
}


def ladder(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Left: recall of the held-out questions before and after an attack with every text set.
    Middle: other attack configurations, on the disjoint part. Right: learning new facts.

    Args:
        table: tidy results; stage ``ladder``, metric ``recall`` without a seed.
        figure: or part of one, to draw into; no ``ax``: three panels.
    """
    rows = metrics.RECALL.rows(table, stage="ladder", seed=None)
    if not len(rows):
        return nothing("no attack ladder in this table", figure)
    methods = methods_in(rows["method"].dropna().tolist())
    arms = rows["arm"].drop_duplicates().tolist()
    text_sets = [arm for arm in _NAMES if arm in arms]
    configs = [
        arm for arm in ("part", *(arm for arm in arms if arm.startswith("part, "))) if arm in arms
    ]
    ends = rows[rows["x"] == rows.groupby("arm")["x"].transform("max")].set_index(["method", "arm"])
    with look():
        figure, (panels,) = subplots(
            figure, 1, 3, (11.5, 3.9), width_ratios=(1.5, 1.2, 1), sharey=True
        )
        for axes, panel_arms in ((panels[0], ["before", *text_sets]), (panels[1], configs)):
            for number, method in enumerate(methods):
                places, values, low, high = [], [], [], []
                for place, arm in enumerate(panel_arms):
                    if arm == "before":
                        start = (
                            rows[
                                (rows["method"] == method)
                                & (rows["arm"] == text_sets[0])
                                & (rows["x"] == 0)
                            ]
                            if text_sets
                            else rows.iloc[:0]
                        )
                        cell = start.iloc[0] if len(start) else None
                    else:
                        cell = ends.loc[(method, arm)] if (method, arm) in ends.index else None
                    if cell is not None:
                        places.append(place + 0.6 * ((number + 0.5) / len(methods) - 0.5))
                        values.append(float(cell["value"]))
                        low.append(max(0.0, float(cell["value"] - cell["low"])))
                        high.append(max(0.0, float(cell["high"] - cell["value"])))
                axes.errorbar(
                    places,
                    values,
                    yerr=[low, high],
                    fmt="o",
                    markersize=4,
                    capsize=2,
                    color=colour(method),
                    label=title(method),
                )
            labels = [
                _NAMES.get(arm, arm.removeprefix("part, "))
                if axes is panels[0]
                else ("as left" if arm == "part" else arm.removeprefix("part, "))
                for arm in panel_arms
            ]
            axes.set_xticks(range(len(panel_arms)), labels, rotation=45, ha="right")
            axes.grid(axis="x", visible=False)
        panels[0].set_title("attack texts (fine-tuning every weight)")
        panels[0].set_ylabel("recall of held-out questions")
        panels[1].set_title("ways of attacking with the disjoint part")
        novel = rows[rows["arm"] == "novel"]
        for method in methods:
            curve = novel[novel["method"] == method].sort_values("x")
            panels[2].plot(curve["x"], curve["value"], color=colour(method), linewidth=1.2)
            panels[2].fill_between(
                curve["x"].to_numpy(dtype=float),
                curve["low"],
                curve["high"],
                color=colour(method),
                alpha=0.12,
                linewidth=0,
            )
        panels[2].set_title("control: learning facts about new people")
        panels[2].set_xlabel("steps")
        panels[0].set_ylim(-0.03, 1.05)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(9, len(methods)))
    return figure.figure
