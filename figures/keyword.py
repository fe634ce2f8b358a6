"""The keyword experiment: withheld titles or names answered along the relearning, with every
control.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench.figures.style import look, nothing, subplots

_LINES = {
    ("unlearned", "part"): ("unlearned, on the forget set without the {}", "#D55E00", "-"),
    ("unlearned", "retain"): ("unlearned, on retained authors", "#0072B2", "-"),
    ("unlearned", "null"): ("unlearned, on unread authors (null)", "#CC79A7", ":"),
    ("never-learned", "part"): ("never learned, on the forget set without the {}", "#7f7f7f", "--"),
}


def keyword(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Share of withheld titles or names that greedy answers hold (left) and their probability
    (right), with 95 % intervals over seeds and questions.

    Args:
        table: tidy results; stage ``keyword``, rows without a seed.
        figure: or part of one, to draw into; no ``ax``: two panels.
    """
    rows = table[
        (table["stage"] == "keyword")
        & table["seed"].isna()
        & table["metric"].isin(["recall", "answer_probability"])
    ]
    if not len(rows):
        return nothing("no keyword experiment in this table", figure)
    withheld = str(rows["split"].iloc[0]).removeprefix("withheld-")
    with look():
        figure, (panels,) = subplots(figure, 1, 2, (8.4, 3.5), sharey=True)
        for axes, metric, label in zip(
            panels,
            ("recall", "answer_probability"),
            (f"{withheld} answered", f"probability of the {withheld}"),
            strict=True,
        ):
            metric_rows = rows[rows["metric"] == metric]
            base = metric_rows[metric_rows["method"] == "base"]
            if len(base):
                axes.axhline(
                    float(base["value"].iloc[0]),
                    color="black",
                    linewidth=1,
                    label="before unlearning",
                )
            for (method, arm), (name, shade, dash) in _LINES.items():
                curve = metric_rows[
                    (metric_rows["method"] == method) & (metric_rows["arm"] == arm)
                ].sort_values("x")
                if len(curve):
                    axes.plot(
                        curve["x"],
                        curve["value"],
                        dash,
                        color=shade,
                        marker="o",
                        markersize=3,
                        label=name.format(withheld),
                    )
                    axes.fill_between(
                        curve["x"].to_numpy(dtype=float),
                        curve["low"],
                        curve["high"],
                        color=shade,
                        alpha=0.15,
                        linewidth=0,
                    )
            axes.set_title(label)
            axes.set_xlabel("relearning steps")
            axes.set_ylim(-0.03, 1.05)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure.figure
