"""One look for every figure: fonts, sizes, and one colour for one method everywhere."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.unlearning.methods import METHODS
from workbench.unlearning.wrappers import WRAPPERS, Wrapper

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


def grid(
    count: int, *, columns: int = 4, width: float = 2.5, height: float = 2.1, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A grid of small panels: the figure and its first ``count`` axes; the others are removed."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows + 0.6),
        squeeze=False,
        sharey=share_y,
        layout="constrained",
    )
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.remove()
    return figure, flat[:count]


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


def nothing(message: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    with look():
        figure = plt.figure(figsize=(5, 1.2), layout="constrained")
        figure.text(0.5, 0.5, message, ha="center", va="center")
    return figure
