"""The verbatim experiment: how much of unlearned passages comes back along the relearning, with
every control.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from workbench.figures.style import look, nothing

_LINES = {
    ("unlearned", "part"): ("unlearned, on neighbouring passages", "#D55E00", "-"),
    ("unlearned", "public"): ("unlearned, on the public text", "#009E73", "-"),
    ("unlearned", "retain"): ("unlearned, on retained passages", "#0072B2", "-"),
    ("unlearned", "null"): ("unlearned, on unread passages (null)", "#CC79A7", ":"),
    ("never-learned", "part"): ("never learned, on neighbouring passages", "#7f7f7f", "--"),
    ("never-learned", "public"): ("never learned, on the public text", "#7f7f7f", ":"),
}
_PANELS = (
    ("rouge-l", "recall", "ROUGE-L F1 of the continuations"),
    ("verbatim-run", "recall", "longest verbatim run (share)"),
    ("rouge-l", "answer_probability", "probability of a true token"),
)


def verbatim(table: pd.DataFrame) -> Figure:
    """ROUGE-L F1 of greedy continuations, their longest verbatim run, and the geometric mean
    probability of the true tokens, with 95 % intervals over seeds and passages.

    Args:
        table: tidy results; stage ``verbatim``, rows without a seed.
    """
    rows = table[
        (table["stage"] == "verbatim")
        & table["seed"].isna()
        & table["metric"].isin(["recall", "answer_probability"])
    ]
    if not len(rows):
        return nothing("no verbatim experiment in this table")
    with look():
        figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.7), sharey=True, layout="constrained")
        for axes, (split, metric, label) in zip(panels, _PANELS, strict=True):
            metric_rows = rows[(rows["metric"] == metric) & (rows["split"] == split)]
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
                ].sort_values("step")
                if len(curve):
                    axes.plot(
                        curve["step"],
                        curve["value"],
                        dash,
                        color=shade,
                        marker="o",
                        markersize=3,
                        label=name,
                    )
                    axes.fill_between(
                        curve["step"].to_numpy(dtype=float),
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
    return figure
