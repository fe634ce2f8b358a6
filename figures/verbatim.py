"""The verbatim experiment: how much of unlearned passages comes back along the relearning, with
every control.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import look, nothing, subplots

_LINES = {
    ("unlearned", "part"): ("unlearned, on neighbouring passages", "#D55E00", "-"),
    ("unlearned", "public"): ("unlearned, on the public text", "#009E73", "-"),
    ("unlearned", "retain"): ("unlearned, on retained passages", "#0072B2", "-"),
    ("unlearned", "null"): ("unlearned, on unread passages (null)", "#CC79A7", ":"),
    ("never-learned", "part"): ("never learned, on neighbouring passages", "#7f7f7f", "--"),
    ("never-learned", "public"): ("never learned, on the public text", "#7f7f7f", ":"),
}
_PANELS = (
    (metrics.ROUGE_L, "ROUGE-L F1 of the continuations"),
    (metrics.VERBATIM_RUN, "longest verbatim run (share)"),
    (metrics.ANSWER_PROBABILITY, "probability of a true token"),
)


def verbatim(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """ROUGE-L F1 of greedy continuations, their longest verbatim run, and the geometric mean
    probability of the true tokens, with 95 % intervals over seeds and passages.

    Args:
        table: tidy results; stage ``verbatim``, rows without a seed.
        figure: or part of one, to draw into; no ``ax``: three panels.
    """
    rows = metrics.matching(
        table, stage="verbatim", seed=None, metric=[metric.name for metric, _ in _PANELS]
    )
    if not len(rows):
        return nothing("no verbatim experiment in this table", figure)
    with look():
        figure, (panels,) = subplots(figure, 1, 3, (10.5, 3.7), sharey=True)
        for axes, (metric, label) in zip(panels, _PANELS, strict=True):
            metric_rows = metric.rows(rows)
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
                        label=name,
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
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure.figure
