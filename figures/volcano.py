"""The scan of all tokens at a glance: what every token does to an unlearned model that it does not do to its base, and how sure that is."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures.style import colour, grid, look, methods_in, nothing, title

_NAMED = 4


def volcano(table: pd.DataFrame, seed: int | None = None) -> Figure:
    """One panel per method: rise of the answer's loss behind a token, unlearned minus base, against its p-value; the truly forgotten names in the method's colour.

    Args:
        table: tidy results; stage ``triggers``, metrics ``token_rise`` and ``token_p``, ``split`` the token, ``arm`` ``forget-token`` or ``other``.
        seed: of the model; default the first.
    """
    rows = table[(table["stage"] == "triggers") & table["metric"].isin(["token_rise", "token_p"]) & table["seed"].notna()]
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods:
        return nothing("no scan for triggers in this table")
    rows = rows[rows["seed"] == (rows["seed"].min() if seed is None else seed)]
    with look():
        figure, panels = grid(len(methods), width=2.7, height=2.3, share_y=False)
        for axes, method in zip(panels, methods, strict=True):
            wide = rows[rows["method"] == method].pivot_table(index=["split", "arm"], columns="metric", values="value").reset_index()
            sure = -np.log10(np.maximum(wide["token_p"].to_numpy(dtype=float), 1e-16))
            rise, name = wide["token_rise"].to_numpy(dtype=float), (wide["arm"] == "forget-token").to_numpy()
            axes.scatter(rise[~name], sure[~name], s=6, color="0.7", linewidths=0, label="other tokens")
            axes.scatter(rise[name], sure[name], s=14, color=colour(method), linewidths=0, label="forgotten names")
            for place in np.argsort(-rise)[:_NAMED]:
                axes.annotate(
                    str(wide["split"].iloc[place]).strip(), (rise[place], sure[place]), xytext=(-2, 2), textcoords="offset points", fontsize=6, ha="right"
                )
            axes.axvline(0, color="0.6", linewidth=0.8)
            axes.set_title(title(method), color=colour(method), fontweight="bold")
            axes.set_xlabel("rise (nats per answer token)")
            axes.margins(x=0.12, y=0.1)
        panels[0].set_ylabel("-log10 p")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
