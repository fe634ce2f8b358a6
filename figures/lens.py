"""Where along the depth of a model the right answer can be read, with its own decoder and with the
base's.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from workbench import metrics
from workbench.figures.style import colour, grid, look, methods_in, nothing, title

ANCHORS = ("base", "never-learned")
"""Models that stand beside every method."""
_LABELS = {
    "lens_probability": "probability of the right answer",
    "lens_rank": "rank of the right answer",
    "lens_entropy": "entropy, nats",
    "lens_kl": "KL to the model's output, nats",
}


def by_block(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every block, with a band: the range over seeds, or the row's own interval
    where there is one seed.

    Args:
        rows: tidy results of one curve, with sites ``blocks.N. ...``.

    Returns:
        ``value``, ``low``, ``high`` by block; empty values are left out.
    """
    rows = rows.dropna(subset=["value"])
    rows = rows.assign(block=rows["site"].str.split(".").str[1].astype(int))
    several = rows.groupby("block")["value"].transform("size") > 1
    ends = {name: rows[name].mask(several, rows["value"]).astype(float) for name in ("low", "high")}
    blocks = rows.assign(value=rows["value"].astype(float), **ends).groupby("block")
    return pd.DataFrame(
        {"value": blocks["value"].mean(), "low": blocks["low"].min(), "high": blocks["high"].max()}
    )


def draw(axes: Axes, rows: pd.DataFrame, label: str, *, band: bool = True, **style: object) -> None:
    """One curve over blocks; nothing where there are no rows."""
    curve = by_block(rows)
    if not len(curve):
        return
    (line,) = axes.plot(curve.index, curve["value"], label=label, **style)  # type: ignore[arg-type]
    if band:
        axes.fill_between(
            curve.index.to_numpy(dtype=float),
            curve["low"],
            curve["high"],
            color=line.get_color(),
            alpha=0.16,
            linewidth=0,
        )


def lens(
    table: pd.DataFrame,
    metric: str = "lens_probability",
    split: str = "forget-heldout",
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """One panel per method: the right answer by block under the model's own decoder and under the
    base's; the base and the never-learned model as anchors.

    Where the two decoders differ, unlearning changed the decoder; where both fall, it changed the
    stream. Bands are ranges over seeds, or the 95 % interval over facts of a single seed.

    Args:
        table: tidy results; stage ``representation``, metrics ``lens_*``, arms ``own decoder`` and
            ``base decoder``.
        metric: which metric.
        split: which set of texts.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    rows = table[(table["stage"] == "representation") & (table["split"] == split)]
    metric_rows = rows[rows["metric"] == metric].dropna(subset=["value"])
    present_methods = methods_in(metric_rows["method"].dropna().tolist())
    if not present_methods:
        return nothing("no logit lens in this table", figure)
    own_decoder, base_decoder = (
        metric_rows[metric_rows["arm"] == "own decoder"],
        metric_rows[metric_rows["arm"] == "base decoder"],
    )
    foils = metrics.LENS_FOIL.rows(rows, arm="own decoder")
    methods = [name for name in present_methods if name not in ANCHORS] or present_methods
    with look():
        figure, panels = grid(figure, len(methods), width=2.6, height=2.2)
        for axes, method in zip(panels, methods, strict=True):
            shade = colour(method)
            for name in ANCHORS:
                if name != method:
                    draw(
                        axes,
                        own_decoder[own_decoder["method"] == name],
                        f"{title(name)}, own decoder",
                        band=False,
                        color=colour(name),
                        linewidth=1.1,
                    )
            draw(
                axes,
                own_decoder[own_decoder["method"] == method],
                "own decoder",
                color=shade,
                marker="o",
                markersize=3.5,
            )
            draw(
                axes,
                base_decoder[base_decoder["method"] == method],
                "the base's decoder",
                band=False,
                color=shade,
                marker="s",
                markersize=4,
                markerfacecolor="white",
                linestyle="--",
            )
            if metric == "lens_probability":
                draw(
                    axes,
                    foils[foils["method"] == method],
                    "other answers of the same kind",
                    band=False,
                    color=shade,
                    linewidth=1.1,
                    linestyle=":",
                )
                axes.set_ylim(-0.03, 1.05)
            if metric == "lens_rank":
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(NullLocator())
            finish(axes, method)
        figure.supylabel(_LABELS.get(metric, metric), fontsize=9)
        common_legend(figure, panels, keep=[f"{title(name)}, own decoder" for name in ANCHORS])
    return figure.figure


def finish(axes: Axes, method: str) -> None:
    """Title and x axis of a panel."""
    axes.set_title(title(method), color=colour(method), fontweight="bold")
    axes.set_xlabel("after block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def common_legend(
    figure: Figure | SubFigure, panels: Sequence[Axes], *, keep: Sequence[str]
) -> None:
    """One legend for all panels, below them; lines that have another colour in every panel are grey
    in it, all but those labelled as in ``keep``.
    """
    entries = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    legend = figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(5, 2 * len(panels) - 1),
    )
    for line, label in zip(legend.get_lines(), entries, strict=True):
        if label not in keep:
            line.set_color("0.45")
