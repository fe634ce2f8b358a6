"""The scan of all tokens at a glance: what every token does to an unlearned model that it does not
do to its base, and how sure that is.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from workbench.figures.style import colour, grid, look, methods_in, nothing, title

LEVEL = 0.1
"""False discovery rate from which on a token counts as a finding."""
_NAMED = 4


def volcano(
    table: pd.DataFrame, seed: int | None = None, *, figure: Figure | SubFigure | None = None
) -> Figure:
    """One panel per method: rise of the answer's loss behind a token, unlearned minus base, against
    how many standard errors over facts that is; truly forgotten names in the method's colour,
    retained names in black. Right of the dashed line are the findings, where there are any.

    Args:
        table: tidy results; stage ``triggers``, metrics ``token_rise``, ``token_rise_se`` and
            ``token_q``, ``arm`` ``forget-token``, ``retain-token`` or
            ``other``.
        seed: of the model; default the first.
        figure: or part of one, to draw into; no ``ax``: one panel per method.
    """
    needed_metrics = ["token_rise", "token_rise_se", "token_q"]
    rows = table[
        (table["stage"] == "triggers")
        & table["metric"].isin(needed_metrics)
        & table["seed"].notna()
    ]
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods or set(rows["metric"]) != set(needed_metrics):
        return nothing("no scan for triggers in this table", figure)
    rows = rows[rows["seed"] == (rows["seed"].min() if seed is None else seed)]
    with look():
        figure, panels = grid(figure, len(methods), width=2.7, height=2.4, share_y=False)
        for axes, method in zip(panels, methods, strict=True):
            wide = (
                rows[rows["method"] == method]
                .pivot_table(index=["token", "token_id", "arm"], columns="metric", values="value")
                .reset_index()
            )
            wide = wide.sort_values("token_rise", ascending=False, ignore_index=True)
            rise = wide["token_rise"].to_numpy(dtype=float)
            with np.errstate(invalid="ignore", divide="ignore"):  # a token that does nothing
                sure = np.abs(rise) / wide["token_rise_se"].to_numpy(dtype=float)
            kinds = (
                ("other", "0.7", 6, "other tokens"),
                ("retain-token", "black", 8, "retained names"),
                ("forget-token", colour(method), 14, "forgotten names"),
            )
            for arm, shade, size, label in kinds:
                in_arm = (wide["arm"] == arm).to_numpy()
                axes.scatter(
                    rise[in_arm], sure[in_arm], s=size, color=shade, linewidths=0, label=label
                )
            findings = rise[(wide["token_q"] <= LEVEL).to_numpy()]
            if len(findings):
                axes.axvline(float(findings.min()), color="0.4", linewidth=0.8, linestyle="--")
            axes.axvline(0, color="0.6", linewidth=0.8)
            axes.text(
                0.02,
                0.98,
                "first\n" + "\n".join(str(word).strip() for word in wide["token"].head(_NAMED)),
                transform=axes.transAxes,
                fontsize=6,
                va="top",
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
            )
            axes.set_title(
                f"{title(method)}: {len(findings)} findings",
                color=colour(method),
                fontweight="bold",
            )
            axes.set_xlabel("rise (nats per answer token)")
        panels[0].set_ylabel("|rise| in standard errors")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure.figure
