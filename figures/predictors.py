"""Which measure, taken before the attack, goes with what the attack wins back: a forest of rank
correlations.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench import metrics
from workbench.figures.style import legend, look, nothing, panel

NAMES = {
    "displacement": "distance of the weights from the base",
    "top_eigenvalue": "top Hessian eigenvalue",
    "bottom_eigenvalue": "bottom Hessian eigenvalue",
    "gradient_norm": "gradient norm",
    "trace": "trace of the Hessian",
    "worst_drop": "worst-case drop, one radius",
    "worst_drop_heldout": "worst-case drop, held-out facts",
    "drop_of_displacement": "worst-case drop, share of displacement",
    "adaptive_drop": "worst-case drop, adaptive ball",
    "rise": "SAM's rise",
    "noise_change": "mean change under noise",
    "half_way": "way to the base until half",
    "descent_drop": "drop along the attacker's gradient",
    "shift_forget": "shift of the stream, forget texts",
    "shift_retain": "shift of the stream, neighbours",
    "shift_late": "shift of the stream, last block",
    "cka_forget": "1 - CKA with the base",
    "energy_in_common": "energy in common directions",
    "disruption_general": "KL on general text",
    "recall_before": "recall before the attack",
}
_OUTCOMES = (
    ("recovery", "with the recall won back", "#D55E00", "o"),
    ("recall_after", "with the recall after the attack", "#0072B2", "s"),
)


def predictors(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Rank correlation of every measure with recovery, with the 95 % interval of resampled methods;
    strongest on top.

    Args:
        table: tidy results; metric ``recovery_correlation``: ``arm`` is the measure, ``split`` the
            outcome.
        ax: to draw into; the legend stands below it.
    """
    rows = metrics.RECOVERY_CORRELATION.rows(table)
    if not len(rows):
        return nothing("no correlation with recovery in this table", ax)
    strength = rows.assign(size=rows["value"].abs()).groupby("arm")["size"].max().sort_values()
    with look():
        figure, axes = panel(ax, (6.4, 1.2 + 0.34 * len(strength)))
        axes.axvline(0, color="0.4", linewidth=0.8)
        for offset, (outcome, label, shade, marker) in enumerate(_OUTCOMES):
            outcome_rows = rows[rows["split"] == outcome].set_index("arm")
            names = [name for name in strength.index if name in outcome_rows.index]
            if not names:
                continue
            values = outcome_rows.loc[names]
            places = np.array([strength.index.get_loc(name) for name in names], dtype=float) + (
                0.14 if offset == 0 else -0.14
            )
            spread = [
                (values["value"] - values["low"]).clip(lower=0),
                (values["high"] - values["value"]).clip(lower=0),
            ]
            axes.errorbar(
                values["value"],
                places,
                xerr=spread,
                fmt=marker,
                markersize=4,
                capsize=2,
                color=shade,
                label=label,
            )
        axes.set_yticks(range(len(strength)), [NAMES.get(name, name) for name in strength.index])
        axes.set_xlim(-1.05, 1.05)
        axes.set_xlabel("Spearman's rank correlation")
        axes.grid(axis="y", visible=False)
        handles, labels = axes.get_legend_handles_labels()
        legend(ax, axes, handles, labels, loc="outside lower center", ncols=2)
    return figure
