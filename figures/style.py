"""One look for every figure: fonts, sizes, and one colour for one method everywhere."""

from __future__ import annotations

import colorsys
import hashlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.transforms import ScaledTranslation

from workbench.unlearning.methods import METHODS
from workbench.unlearning.wrappers import WRAPPERS, Wrapper

Shared = Literal["none", "all", "row", "col"]
"""Panels that have an axis in common."""
CONTROL_STYLES = {
    "base": ("base", "#000000"),
    "never-learned": ("never learned", "#7f7f7f"),
    "unlearned": ("unlearned", "#D55E00"),
}
"""Models that no method of the registry made: title and colour. Methods have theirs in their
entries, the demo's from Okabe and Ito's palette, which people with any colour vision can tell
apart.
"""


def _wrapped(method: str) -> tuple[str, Wrapper] | None:
    """The name inside and the last wrapper of a name that is not in the registry itself."""
    inner, _, last = method.rpartition("-")
    return (inner, WRAPPERS[last]) if inner and last in WRAPPERS else None


def colour(method: str) -> str:
    """The colour of a method: that of its entry; a darker shade of its own method's where it is
    wrapped; and for any other label one that follows from the label, so that no two share theirs.
    """
    if method in CONTROL_STYLES:
        return CONTROL_STYLES[method][1]
    if method in METHODS and METHODS[method].colour:
        return METHODS[method].colour
    if method not in METHODS and (inside := _wrapped(method)):
        red, green, blue = mpl.colors.to_rgb(colour(inside[0]))
        return mpl.colors.to_hex((0.6 * red, 0.6 * green, 0.6 * blue))
    drawn = hashlib.sha256(method.encode()).digest()
    hue, saturation, value = (int.from_bytes(drawn[2 * i : 2 * i + 2]) / 65536 for i in range(3))
    return mpl.colors.to_hex(colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * saturation, 0.45 + 0.4 * value))


def title(method: str) -> str:
    """How figures and prose call a method; a label of no method stands for itself."""
    if method in CONTROL_STYLES:
        return CONTROL_STYLES[method][0]
    if method in METHODS:
        return METHODS[method].title
    inside = _wrapped(method)
    return f"{title(inside[0])}+{inside[1].title}" if inside else method


@contextmanager
def look() -> Iterator[None]:
    """The style, for the duration of a block; nothing global is changed.

    Figures made inside are taken out of pyplot's hands at the end: they stay usable, do not pile up
    in memory, and a notebook shows each of them once.
    """
    before = set(plt.get_fignums())
    with mpl.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.labelsize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "figure.dpi": 72,
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "svg.hashsalt": "workbench",
        }
    ):
        try:
            yield
        finally:
            for number in set(plt.get_fignums()) - before:
                plt.close(number)


def panel(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The figure of ``ax`` and ``ax`` in the style of ``look``, or a new figure of this size and
    its one Axes.
    """
    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")
    of = mpl.rcParams
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, alpha=of["grid.alpha"], linewidth=of["grid.linewidth"])
    ax.tick_params(labelsize=of["font.size"])
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_fontsize(of["axes.labelsize"])
    return ax.figure.figure, ax


def subplots(
    figure: Figure | SubFigure | None,
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    sharex: bool | Shared = False,
    sharey: bool | Shared = False,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Figure | SubFigure, np.ndarray]:
    """Panels ``[row, column]`` in ``figure``, or in a new one of this size, and what they are in:
    legends, colour bars and labels of them all belong there.
    """
    if figure is None:
        figure = plt.figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        rows, columns, squeeze=False, sharex=sharex, sharey=sharey, width_ratios=width_ratios
    )
    return figure, panels


def grid(
    figure: Figure | SubFigure | None,
    count: int,
    *,
    columns: int = 4,
    width: float = 2.5,
    height: float = 2.1,
    more: float = 0.6,
    share_y: bool = True,
) -> tuple[Figure | SubFigure, list[Axes]]:
    """A grid of small panels in ``figure``, or in a new one: what they are in, and the first
    ``count`` axes; the others are removed.

    Args:
        figure: to draw into.
        count: of panels.
        columns: most panels side by side.
        width: of a panel, in inches.
        height: of a panel, in inches.
        more: height for what stands below the panels, in inches.
        share_y: one vertical axis for all.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (width * columns, height * rows + more)
    figure, axes = subplots(figure, rows, columns, size, sharey=share_y)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.remove()
    return figure, flat[:count]


def legend(
    ax: Axes | None,
    axes: Axes,
    handles: Sequence[Artist],
    labels: Sequence[str],
    *,
    loc: Literal["outside lower center", "outside right upper"],
    **style: Any,
) -> None:
    """The legend of a figure of one panel: at ``loc``; of an Axes that was given below that Axes,
    in at most four columns and no wider than it, if that can be.

    Args:
        ax: what was given.
        axes: the panel.
        handles: of the legend.
        labels: of the legend.
        loc: in a figure of its own.
        style: what else ``Figure.legend`` takes.
    """
    if ax is None:
        axes.figure.legend(handles, labels, loc=loc, **style)
        return
    words = axes.xaxis.get_tightbbox()
    down = (axes.bbox.y0 - words.y0) / axes.figure.dpi if words else 0.0
    below = axes.transAxes + ScaledTranslation(0, -down, axes.figure.dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    for columns in range(4, 0, -1):
        drawn = axes.legend(handles, labels, **(style | place | {"ncols": columns}))
        if drawn.get_window_extent().width <= axes.bbox.width:
            break


def methods_in(names: Iterable[str]) -> list[str]:
    """``names`` in the order of the registry behind the controls, wrapped methods behind their own,
    labels of no method last.
    """
    order = {name: position for position, name in enumerate([*CONTROL_STYLES, *METHODS])}

    def place(name: str) -> tuple[int, str]:
        inner = name
        while inner not in order and (inside := _wrapped(inner)):
            inner = inside[0]
        return order.get(inner, len(order)), "" if name in order else name

    return sorted(dict.fromkeys(names), key=place)


def nothing(message: str, where: Axes | Figure | SubFigure | None = None) -> Figure:
    """A figure that says why there is nothing to draw, or the one that ``where`` belongs to, with
    the message there.
    """
    middle: dict[str, Any] = {"ha": "center", "va": "center"}
    with look():
        if isinstance(where, Axes):
            where.set_axis_off()
            lines = textwrap.fill(message, 36)
            where.text(0.5, 0.5, lines, transform=where.transAxes, **middle)
            return where.figure.figure
        if where is None:
            where = plt.figure(figsize=(5, 1.2), layout="constrained")
        where.text(0.5, 0.5, message, **middle)
    return where.figure
