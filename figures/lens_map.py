"""At which block the right answer emerges, and for which decoder: the logit lens of every model as
a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator

from workbench import metrics
from workbench.figures.style import colour, grid, look, methods_in, nothing, title

_DECODERS = {"own decoder": "own", "base decoder": "base's"}
_METRICS = {"lens_probability": "right answer", "lens_foil": "others", "lens_rank": "its rank"}
_BARS = {"Blues": "probability of the right answer", "Oranges_r": "rank of the right answer"}
_MOST = 16  # blocks whose numbers can still be read


def lens_map(
    table: pd.DataFrame,
    metrics: Sequence[str] = tuple(_METRICS),
    split: str = "forget-heldout",
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """One panel per model, the base and the never-learned control first: blocks (upwards) by what
    is read there with the model's own decoder and with the base's.

    Blue is a probability, of the right answer and of others of its kind; orange is the rank of the
    right answer; dark is where it has emerged. A right answer no more probable than the others is
    none that the model knows; one that only one decoder reads tells a change of the decoder from a
    change of the stream. Means over seeds; grey was not measured.

    Args:
        table: tidy results; stage ``representation``, metrics ``lens_probability``, ``lens_foil``
            and ``lens_rank``, ``site`` = ``blocks.N.hook_resid_post``, arms ``own decoder`` and
            ``base decoder``.
        metrics: which of these metrics.
        split: which set of texts.
        figure: or part of one, to draw into; no ``ax``: one panel per model.
    """
    rows = table[
        (table["stage"] == "representation")
        & (table["split"] == split)
        & table["metric"].isin([name for name in metrics if name in _METRICS])
    ]
    rows = rows[rows["arm"].isin(list(_DECODERS)) & np.isfinite(rows["value"].astype(float))]
    rows = rows[rows["site"].fillna("").str.fullmatch(r"blocks\.\d+\.hook_resid_post")]
    methods = methods_in(rows["method"].dropna().tolist())
    if not methods:
        return nothing("no logit lens to map in this table", figure)
    rows = rows.assign(layer=rows["site"].str.split(".").str[1].astype(int))
    layers = sorted(rows["layer"].unique())
    columns = [
        (metric, arm)
        for metric in _METRICS
        for arm in _DECODERS
        if ((rows["metric"] == metric) & (rows["arm"] == arm)).any()
    ]
    scales = _scales(rows)
    with look():
        across = 4 if len(methods) > 6 else 2 if len(methods) in (2, 4) else min(3, len(methods))
        figure, panels = grid(
            figure,
            len(methods),
            columns=across,
            width=max(1.8, 0.42 * len(columns) + (0.4 if across > 1 else 0.9)),
            height=0.24 * min(len(layers), 20) + 1.1,
            more=1.6,  # for the bars
        )
        drawn: dict[str, AxesImage] = {}
        for axes, method in zip(panels, methods, strict=True):
            means = rows[rows["method"] == method].pivot_table(
                index="layer", columns=["metric", "arm"], values="value", aggfunc="mean"
            )
            _panel(
                axes,
                means.reindex(
                    index=layers,
                    columns=pd.MultiIndex.from_tuples(columns, names=["metric", "arm"]),
                ),
                scales,
                drawn,
            )
            axes.set_title(title(method), color=colour(method), fontweight="bold", pad=16)
        figure.supylabel("block", fontsize=9)
        for axes in panels[-across:]:
            axes.set_xlabel("decoder", fontsize=8)
        for shades, image in drawn.items():
            label = _BARS[shades] + (
                ",\nand of others of its kind"
                if shades == "Blues" and "lens_foil" in dict(columns)
                else ""
            )
            ticks = LogLocator(subs=(1, 2, 5)) if shades == "Oranges_r" else None
            bar = figure.colorbar(
                image,
                ax=panels,
                location="bottom",
                label=label,
                ticks=ticks,
                format="{x:g}",
                shrink=0.7,
                aspect=18 * across,
                pad=0.02,
            )
            bar.ax.minorticks_off()
            if shades == "Oranges_r":
                # what is good for the answer is on the right, as on the other bar
                bar.ax.invert_xaxis()
    return figure.figure


def _scales(rows: pd.DataFrame) -> dict[str, tuple[str, Normalize]]:
    """Colours and their scale by metric, the same in all panels."""
    ranks = rows.loc[rows["metric"] == metrics.LENS_RANK.name, "value"]
    worst = max(10.0, float(ranks.max())) if len(ranks) else 10.0
    probability = Normalize(0, 1)
    return {
        "lens_probability": ("Blues", probability),
        "lens_foil": ("Blues", probability),
        "lens_rank": ("Oranges_r", LogNorm(1, worst)),
    }


def _panel(
    axes: Axes,
    means: pd.DataFrame,
    scales: dict[str, tuple[str, Normalize]],
    drawn: dict[str, AxesImage],
) -> None:
    metrics = means.columns.get_level_values("metric").tolist()
    for metric in dict.fromkeys(metrics):
        places = [number for number, name in enumerate(metrics) if name == metric]
        shades, norm = scales[metric]
        values = means.iloc[:, places].to_numpy(dtype=float)
        extent = (places[0] - 0.5, places[-1] + 0.5, -0.5, len(means) - 0.5)
        image = axes.imshow(
            values, origin="lower", aspect="auto", cmap=shades, norm=norm, extent=extent
        )
        drawn.setdefault(shades, image)
        if len(means) <= _MOST:
            _write(axes, values, places, image, metric)
        middle = (places[0] + places[-1] + 1) / 2 / len(metrics)
        place = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "ha": "center",
            "va": "bottom",
        }
        axes.annotate(_METRICS[metric], (middle, 1), (0, 3), fontsize=7, color="0.3", **place)  # type: ignore[arg-type]
        if places[0]:
            axes.axvline(places[0] - 0.5, color="black", linewidth=1.0)
    axes.set_facecolor("0.85")
    axes.set_xlim(-0.5, len(metrics) - 0.5)
    axes.set_xticks(
        range(len(metrics)),
        [_DECODERS[arm] for arm in means.columns.get_level_values("arm")],
        fontsize=7,
    )
    step = -(-len(means) // 16)
    axes.set_yticks(range(0, len(means), step), [str(layer) for layer in means.index[::step]])
    axes.grid(visible=False)


def _write(
    axes: Axes, values: np.ndarray, places: list[int], image: AxesImage, metric: str
) -> None:
    painted = image.to_rgba(values)
    dark = painted[..., :3] @ np.array([0.299, 0.587, 0.114]) < 0.5
    for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = float(values[i, j])
        text = (
            f"{value:.2f}"
            if metric != "lens_rank"
            else f"{value:.0f}"
            if value >= 9.95
            else f"{value:.1f}"
        )
        axes.text(
            places[j],
            i,
            text,
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if dark[i, j] else "black",
        )
