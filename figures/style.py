"""One look for every figure: fonts, sizes, and one colour for one method everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision can tell apart; controls are grey and black.
COLOURS = {
    "base": "#000000",
    "never-learned": "#7f7f7f",
    "grad-diff": "#E69F00",
    "npo": "#56B4E9",
    "npo-sam": "#0072B2",
    "rmu": "#D55E00",
    "rmu-rna": "#CC79A7",
    "cir": "#009E73",
    "cir-uncollapsed": "#B8A500",
    "unlearned": "#D55E00",
    # Methods beyond the demo's: no palette has so many colours that all eyes can tell apart, so figures of many methods carry names as well.
    "grad-ascent": "#8C564B",
    "kl-min": "#393B79",
    "simnpo": "#6B6ECF",
    "idk-dpo": "#637939",
    "idk-nll": "#B5CF6B",
    "adaptive-rmu": "#E7969C",
    "rsv": "#AD494A",
    "circuit-breakers": "#7B4173",
    "scrub": "#CE6DBD",
    "undial": "#3182BD",
    "task-vector": "#A55194",
    "whp": "#31A354",
    "mlp-breaking": "#74C476",
    "repselect": "#843C39",
}
TITLES = {
    "base": "base",
    "never-learned": "never learned",
    "grad-diff": "GradDiff",
    "npo": "NPO",
    "npo-sam": "NPO+SAM",
    "rmu": "RMU",
    "rmu-rna": "RMU+RNA",
    "cir": "CIR",
    "cir-uncollapsed": "CIR without collapse",
    "unlearned": "unlearned",
    "grad-ascent": "GradAscent",
    "kl-min": "KL-min",
    "simnpo": "SimNPO",
    "idk-dpo": "IdkDPO",
    "idk-nll": "IdkNLL",
    "adaptive-rmu": "Adaptive RMU",
    "rsv": "RSV",
    "circuit-breakers": "Circuit breakers",
    "scrub": "SCRUB",
    "undial": "UNDIAL",
    "task-vector": "Task vector",
    "whp": "WHP targets",
    "mlp-breaking": "MLP breaking",
    "repselect": "RepSelect",
}
_SPARE = ("#882255", "#44AA99", "#332288", "#AA4499")


WRAPPED = {
    "sam": "SAM",
    "asam": "ASAM",
    "rna": "RNA",
    "rs": "RS",
    "gp": "GP",
    "cr": "CR",
    "wa": "WA",
}
"""What the last part of a wrapped method's name is called."""


def colour(method: str) -> str:
    """The colour of a method; a wrapped method has a darker shade of its own method's, and one that the table does not know one of four spare colours, always the same."""
    inner, _, last = method.rpartition("-")
    if method not in COLOURS and last in WRAPPED and inner:
        red, green, blue = mpl.colors.to_rgb(colour(inner))
        return mpl.colors.to_hex((0.6 * red, 0.6 * green, 0.6 * blue))
    return COLOURS.get(method) or _SPARE[sum(map(ord, method)) % len(_SPARE)]


def title(method: str) -> str:
    """How figures and prose call a method."""
    inner, _, last = method.rpartition("-")
    if method not in TITLES and last in WRAPPED and inner:
        return f"{title(inner)}+{WRAPPED[last]}"
    return TITLES.get(method, method)


@contextmanager
def look() -> Iterator[None]:
    """The style, for the duration of a block; nothing global is changed.

    Figures made inside are taken out of pyplot's hands at the end: they stay usable, do not pile up in memory, and a notebook shows each of them once.
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


def methods_in(names: list[str]) -> list[str]:
    """``names`` in the order of the palette, wrapped methods behind their own, unknown ones last."""
    order = {name: position for position, name in enumerate(COLOURS)}

    def place(name: str) -> tuple[int, str]:
        inner = name
        while inner not in order and inner.rpartition("-")[2] in WRAPPED:
            inner = inner.rpartition("-")[0]
        return order.get(inner, len(order)), "" if name in order else name

    return sorted(dict.fromkeys(names), key=place)


def nothing(message: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    with look():
        figure = plt.figure(figsize=(5, 1.2), layout="constrained")
        figure.text(0.5, 0.5, message, ha="center", va="center")
    return figure
