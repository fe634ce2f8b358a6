"""Adversarial suffixes: what is answered without one, behind random ones, and behind the one that
was searched.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from workbench.figures.style import colour, look, methods_in, nothing, subplots, title

_ARMS = {
    "none": "no suffix",
    "random suffix": "random suffixes",
    "searched suffix": "searched suffix",
}
_MARKS = {"none": "o", "random suffix": "s", "searched suffix": "D"}
_SPLITS = {
    "jailbreak": "jailbreak:\nheld-out forgotten facts",
    "retain": "under attack:\nretain questions",
    "retain with a forget-token": "under attack: retain questions\nwith a forget-token inside",
}


def suffix(
    table: pd.DataFrame, metric: str = "recall", *, figure: Figure | SubFigure | None = None
) -> Figure:
    """A forest of models, one panel per kind of question: hollow without a suffix, grey behind
    random ones, filled behind the searched one; 95 % intervals over seeds and facts.

    Args:
        table: tidy results; rows of stage ``suffix`` without a seed.
        metric: ``recall`` or ``answer_probability``.
        figure: or part of one, to draw into; no ``ax``: one panel per kind of question.
    """
    rows = table[(table["stage"] == "suffix") & (table["metric"] == metric) & table["seed"].isna()]
    methods = methods_in(rows["method"].dropna().tolist())
    splits = [split for split in _SPLITS if (rows["split"] == split).any()]
    if not methods or not splits:
        return nothing("no suffix experiment in this table", figure)
    with look():
        numbers = {
            (row["split"], row["arm"], row["method"]): tuple(
                float(row[name]) for name in ("value", "low", "high")
            )
            for row in rows.to_dict("records")
        }
        height = 1.5 + 0.42 * len(methods)
        figure, panels = subplots(
            figure,
            1,
            len(splits),
            (1.3 + 2.7 * len(splits), height),
            sharey=True,
        )
        for axes, split in zip(panels[0], splits, strict=True):
            for number, arm in enumerate(_ARMS):
                for place, method in enumerate(reversed(methods)):
                    if (split, arm, method) not in numbers:
                        continue
                    value, low, high = numbers[split, arm, method]
                    shade = "0.7" if arm == "random suffix" else colour(method)
                    axes.errorbar(
                        value,
                        place + 0.24 * (1 - number),
                        xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                        color=shade,
                        marker=_MARKS[arm],
                        markersize=4.5,
                        markerfacecolor="white" if arm == "none" else shade,
                        capsize=2,
                        linewidth=1,
                    )
            axes.set_title(_SPLITS[split])
            axes.set_xlim(-0.02, 1.04)
            axes.set_xlabel(
                "answer probability"
                if metric == "answer_probability"
                else "recall"
                if split == "jailbreak"
                else "accuracy"
            )
            axes.grid(axis="y", visible=False)
            for border in range(1, len(methods)):
                axes.axhline(border - 0.5, color="0.9", linewidth=0.6, zorder=0)
        panels[0][0].set_yticks(
            range(len(methods)), [title(method) for method in reversed(methods)]
        )
        panels[0][0].set_ylim(-0.6, len(methods) - 0.4)
        handles = [
            Line2D(
                [],
                [],
                color="0.7" if arm == "random suffix" else "0.25",
                marker=_MARKS[arm],
                markersize=4.5,
                linewidth=1,
                markerfacecolor="white"
                if arm == "none"
                else "0.7"
                if arm == "random suffix"
                else "0.25",
            )
            for arm in _ARMS
        ]
        figure.legend(
            handles,
            list(_ARMS.values()),
            loc="outside lower center",
            ncols=3,
            title="in front of the question",
        )
    return figure.figure
