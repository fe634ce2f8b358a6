"""Every method at the same disruption: what is recalled before and after the relearning attack."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench import metrics
from workbench.figures.marks import diverged, main_metric
from workbench.figures.style import colour, legend, look, nothing, panel, title

_BEFORE, _AFTER = "#0072B2", "#D55E00"


def _ends(table: pd.DataFrame, metric: str, stage: str) -> pd.DataFrame:
    """One row per method: value, low, high before the attack and after it."""
    rows = table[
        (table["stage"] == stage)
        & (table["arm"] == "attack")
        & (table["metric"] == metric)
        & (table["split"] == "forget-heldout")
        & table["seed"].isna()
    ]
    if not len(rows):
        return pd.DataFrame()
    ends = []
    for method, method_rows in rows.groupby("method"):
        ordered = method_rows.sort_values("x")
        first, last = ordered.iloc[0], ordered.iloc[-1]
        ends.append(
            {"method": method}
            | {
                f"{name}_{side}": row[name]
                for side, row in (("before", first), ("after", last))
                for name in ("value", "low", "high")
            }
        )
    return pd.DataFrame(ends).set_index("method").astype(float)


def _short_of_budget(table: pd.DataFrame) -> set[str]:
    """Methods that some seed left below the disruption budget, however far their change was scaled:
    not at the same price as the others.
    """
    rows = table[(table["metric"] == metrics.BUDGET_REACHED.name) & table["seed"].notna()]
    return set(rows.loc[rows["value"] < 1, "method"])


def comparison(
    table: pd.DataFrame,
    metric: str | None = None,
    *,
    stage: str = "relearn",
    ax: Axes | None = None,
) -> Figure:
    """A forest of methods, the least recalled after the attack on top; base and never-learned
    control as lines. A star marks methods that did not reach the budget, a dagger those whose
    attack diverged.

    Args:
        table: tidy results; rows without a seed are drawn.
        metric: ``recall`` or ``answer_probability``.
        stage: the attack.
        ax: to draw into; the legend stands below it.
    """
    metric = metric or main_metric(table)
    ends = _ends(table, metric, stage)
    methods = (
        ends.drop(index=["base", "never-learned"], errors="ignore").sort_values(
            "value_after", ascending=False
        )
        if len(ends)
        else ends
    )
    if not len(methods):
        return nothing("no relearning attack in this table", ax)
    short, broken = _short_of_budget(table), diverged(table)
    with look():
        figure, axes = panel(ax, (5.6, 1.2 + 0.24 * len(methods)))
        for place, (method, row) in enumerate(methods.iterrows()):
            axes.plot(
                [row["value_before"], row["value_after"]],
                [place, place],
                color="0.75",
                linewidth=1.2,
                zorder=1,
            )
            for side, shade, marker in (("before", _BEFORE, "o"), ("after", _AFTER, "D")):
                value = row[f"value_{side}"]
                spread = np.array(
                    [
                        [max(0.0, value - row[f"low_{side}"])],
                        [max(0.0, row[f"high_{side}"] - value)],
                    ]
                )
                axes.errorbar(
                    value,
                    place,
                    xerr=spread,
                    color=shade,
                    marker=marker,
                    markersize=4,
                    capsize=2,
                    linewidth=1,
                    label=f"{side} the attack" if place == 0 else None,
                )
            axes.text(
                -0.03,
                place,
                title(str(method)) + " *" * (method in short) + " †" * (method in broken),
                ha="right",
                va="center",
                fontsize=8,
                transform=axes.get_yaxis_transform(),
            )
        if "never-learned" in ends.index:
            level = float(ends["value_after"].to_dict()["never-learned"])
            axes.axvline(
                level,
                color=colour("never-learned"),
                linestyle="--",
                linewidth=1,
                label="never learned, after the attack",
            )
        if "base" in ends.index:
            level = float(ends["value_before"].to_dict()["base"])
            axes.axvline(level, color="black", linestyle=":", linewidth=1, label="base")
        axes.set_yticks([])
        axes.set_ylim(-0.7, len(methods) - 0.3)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(
            "recall of held-out forget facts"
            if metric == "recall"
            else "answer probability, held-out forget texts"
        )
        handles, labels = axes.get_legend_handles_labels()
        note = "* stays below the disruption budget" if short & set(methods.index) else None
        legend(ax, axes, handles, labels, loc="outside lower center", ncols=2, title=note)
    return figure


def ablation(table: pd.DataFrame, metric: str | None = None, *, ax: Axes | None = None) -> Figure:
    """The collapsed update by the number of components it leaves alone (variants
    ``cir-k<number>``), before and after the attack, with 95 % intervals.

    Args:
        table: tidy results of a run with the ablation.
        metric: ``recall`` or ``answer_probability``.
        ax: to draw into.
    """
    metric = metric or main_metric(table)
    ends = _ends(table, metric, "relearn")
    name_of_rank = {
        int(match[1]): str(name)
        for name in (ends.index if len(ends) else [])
        if (match := re.fullmatch(r"cir-k(\d+)", str(name)))
    }
    if len(name_of_rank) < 2:
        return nothing("no component ablation in this table (workbench sweep --ablation)", ax)
    with look():
        figure, axes = panel(ax, (4.4, 3.0))
        counts = sorted(name_of_rank)
        places = range(len(counts))
        for side, shade, marker in (("before", _BEFORE, "o"), ("after", _AFTER, "D")):
            rows = ends.loc[[name_of_rank[count] for count in counts]]
            axes.plot(
                places,
                rows[f"value_{side}"],
                color=shade,
                marker=marker,
                markersize=4,
                label=f"{side} the attack",
            )
            axes.fill_between(
                places,
                rows[f"low_{side}"],
                rows[f"high_{side}"],
                color=shade,
                alpha=0.15,
                linewidth=0,
            )
        short = _short_of_budget(table)
        axes.set_xticks(
            list(places), [str(count) + "*" * (name_of_rank[count] in short) for count in counts]
        )
        between = " " if ax is None else "\n"
        axes.set_xlabel(f"components left alone on each side{between}(mean direction included)")
        axes.set_ylabel(
            "recall of held-out forget facts" if metric == "recall" else "answer probability"
        )
        axes.set_ylim(-0.03, 1.05)
        axes.legend(
            title="* below the disruption budget" if short & set(name_of_rank.values()) else None
        )
    return figure
