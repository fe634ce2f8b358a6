"""The names experiment: success by repetitions before and after relearning, beside the published
row.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench import metrics
from workbench.figures.style import look, nothing, subplots

_PUBLISHED = {7: 1.00, 5: 0.97, 3: 0.23, 1: 0.00}
_SERIES = (
    ("base", "none", False, "base", "#000000", "s"),
    ("unlearned", "fragments", False, "unlearned", "#0072B2", "o"),
    ("unlearned", "fragments", True, "relearned on fragments", "#D55E00", "D"),
    ("unlearned", "null", True, "relearned on other names", "#CC79A7", "v"),
    ("never-learned", "fragments", True, "never learned, on fragments", "#7f7f7f", "^"),
)


def names(table: pd.DataFrame, *, figure: Figure | SubFigure | None = None) -> Figure:
    """Left: success by repetitions, with Wilson intervals, beside the published numbers. Right:
    success along the relearning.

    Args:
        table: tidy results; stage ``names``, metric ``asr`` without a seed.
        figure: or part of one, to draw into; no ``ax``: two panels.
    """
    rows = metrics.ASR.rows(table, stage="names", seed=None)
    if not len(rows):
        return nothing("no names experiment in this table", figure)
    rows = rows.assign(repetitions=rows["split"].str.rsplit("-", n=1).str[1].astype(int))
    counts = sorted(rows["repetitions"].unique(), reverse=True)
    last = float(rows["x"].max())
    with look():
        figure, ((left_axes, right_axes),) = subplots(figure, 1, 2, (8.4, 3.4), sharey=True)
        for offset, (method, arm, after, label, shade, marker) in enumerate(_SERIES):
            arm_rows = rows[
                (rows["method"] == method)
                & (rows["arm"] == arm)
                & (rows["x"] == (last if after else 0))
            ].set_index("repetitions")
            places = [place for place, count in enumerate(counts) if count in arm_rows.index]
            if not places:
                continue
            values = arm_rows.loc[[counts[place] for place in places]]
            spread = [
                (values["value"] - values["low"]).clip(lower=0),
                (values["high"] - values["value"]).clip(lower=0),
            ]
            left_axes.errorbar(
                [place + 0.13 * (offset - 2) for place in places],
                values["value"],
                yerr=spread,
                fmt=marker,
                markersize=5,
                color=shade,
                capsize=2,
                label=label,
            )
        left_axes.scatter(
            range(len(counts)),
            [_PUBLISHED[count] for count in counts],
            marker="_",
            s=500,
            color="#009E73",
            linewidths=2,
            label="published, relearned",
            zorder=1,
        )
        left_axes.set_xticks(range(len(counts)), [f"{count}" for count in counts])
        left_axes.set_xlabel("repetitions of the pair")
        left_axes.set_ylabel("success: the pair is written")
        left_axes.set_ylim(-0.03, 1.05)
        left_axes.grid(axis="x", visible=False)
        shades = ("#440154", "#31688e", "#35b779", "#d9b500")
        for shade, count in zip(shades, counts, strict=False):
            curve = rows[
                (rows["method"] == "unlearned")
                & (rows["arm"] == "fragments")
                & (rows["repetitions"] == count)
            ].sort_values("x")
            right_axes.plot(
                curve["x"],
                curve["value"],
                color=shade,
                marker="o",
                markersize=3,
                label=f"{count} repetition{'s' if count > 1 else ''}",
            )
            right_axes.fill_between(
                curve["x"].to_numpy(dtype=float),
                curve["low"],
                curve["high"],
                color=shade,
                alpha=0.15,
                linewidth=0,
            )
            control = rows[
                (rows["method"] == "never-learned")
                & (rows["arm"] == "fragments")
                & (rows["repetitions"] == count)
            ].sort_values("x")
            right_axes.plot(
                control["x"], control["value"], color=shade, linestyle="--", linewidth=1
            )
        right_axes.plot([], [], color="0.4", linestyle="--", linewidth=1, label="never learned")
        right_axes.set_xlabel("relearning steps on fragments")
        right_axes.legend(loc="upper left")
        handles, labels = left_axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure.figure
