"""Figures of curvature, the lens map, the shift of the stream, resistance and noise, from synthetic
rows: what is drawn equals what the table says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import SymLogNorm, to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workbench.experiments.predictors import PREDICTORS
from workbench.figures import (
    FIGURES,
    convergence,
    lens_map,
    modules,
    noise,
    resistance,
    shift,
)
from workbench.figures.convergence import stroke
from workbench.figures.resistance import family_and_smoothing
from workbench.figures.style import colour, title
from workbench.tables import RESULT_COLUMNS, Table, join, typed
from workbench.unlearning.methods import METHODS

INSIDE = "retain, bare word inside"
MANY = tuple(METHODS)


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def _model(method: str, seed: int, stage: str = "sharpness") -> Table:
    return Table(
        {
            "run": "r",
            "model": f"{method}-seed{seed}",
            "method": method,
            "seed": seed,
            "stage": stage,
        }
    )


def _resistance(
    methods: tuple[str, ...] = ("npo", "npo-sam", "rmu"), seeds: tuple[int, ...] = (0, 1)
) -> pd.DataFrame:
    """Displacement 1, 2, ... and an eigenvalue that grows tenfold from method to method; the
    ``n``-th method wins back 0.1 n, and 0.1 more with seed 1.
    """
    tables = []
    for number, method in enumerate(methods):
        for seed in seeds:
            table = _model(method, seed, "predictors")
            for arm, value in (
                ("displacement", 1 + number + seed),
                ("top_eigenvalue", 10.0**number * (1 + seed)),
                ("recall_before", 0.3),
            ):
                table.add("predictor_value", value, arm=arm)
            table.add("outcome", 0.1 * (number + seed), arm="recovery")
            table.add("outcome", 0.5, arm="recall_after")
            tables.append(table)
    found = Table({"stage": "predictors"})
    found.add(
        "recovery_correlation", 0.25, low=-0.5, high=0.75, arm="displacement", split="recovery"
    )
    found.add(
        "recovery_correlation", -0.75, low=-1, high=-0.25, arm="top_eigenvalue", split="recovery"
    )
    found.add("recovery_correlation", 0.125, arm="displacement", split="recall_after")
    return join([table.frame() for table in (*tables, found)], RESULT_COLUMNS)


def _modules(
    methods: tuple[str, ...] = ("base", "npo"), seeds: tuple[int, ...] = (0, 1), blocks: int = 2
) -> pd.DataFrame:
    """Seeds differ by 2e-6; the base has 3e-6 (seed 0) times the place of the module, attention in
    block 1 is negative, the head of NPO is once above and once below 0.
    """
    sites = [
        "unembed",
        *(
            f"blocks.{block}.{part}"
            for block in reversed(range(blocks))
            for part in ("mlp", "attn", "norm")
        ),
        "norm",
        "embed",
    ]
    tables = []
    for number, method in enumerate(methods):
        for seed in seeds:
            table = _model(method, seed)
            for site in sites:
                value = (
                    (3e-6 + 2e-6 * seed)
                    * 10 ** (number % 4)
                    * (-1 if site == "blocks.1.attn" else 1)
                )
                if (method, site) == ("npo", "unembed"):
                    value = 2e-6 if seed else -1e-6
                table.add(
                    "module_eigenvalue",
                    value,
                    site=site,
                    split="forget-heldout",
                    arm="unlearned",
                    n=10,
                )
                table.add(
                    "module_eigenvalue",
                    7.0,
                    site=site,
                    split="forget-heldout",
                    arm="relearned",
                    n=10,
                )
                table.add(
                    "module_eigenvalue", 8.0, site=site, split="retain", arm="unlearned", n=10
                )
            tables.append(table)
    return join([table.frame() for table in tables], RESULT_COLUMNS)


def _convergence(
    methods: tuple[str, ...] = ("base", "npo"), seeds: tuple[int, ...] = (3, 1)
) -> pd.DataFrame:
    tables = []
    for number, method in enumerate(methods):
        for seed in seeds:
            table, level = _model(method, seed), (number + 1) * 10 + seed
            for step in range(2, 9):
                table.add(
                    "ritz", level - 8 / step, split="forget-heldout", arm="top", lanczos_step=step
                )
                table.add(
                    "ritz",
                    -level / 4 + 1 / step,
                    split="forget-heldout",
                    arm="bottom",
                    lanczos_step=step,
                )
            for step in range(2, 17):
                value = level + 20.0 / step
                for arm, more in (("unlearned", 0.0), ("relearned", 500.0)):
                    table.add(
                        "running_trace",
                        value + more,
                        low=value - 4,
                        high=value + 4,
                        split="forget-heldout",
                        arm=arm,
                        probes=step,
                    )
            tables.append(table)
    return join([table.frame() for table in tables], RESULT_COLUMNS)


def _lens(
    methods: tuple[str, ...] = ("base", "never-learned", "npo"),
    seeds: tuple[int, ...] = (0, 1),
    blocks: tuple[int, ...] = (0, 2, 10),
) -> pd.DataFrame:
    """The right answer's probability is block / 20 (+0.1 with seed 1), the base's decoder sees
    half; others have 0.05; the rank is 100 less nine times the block.
    """
    tables = []
    for method in methods:
        for seed in seeds:
            table = _model(method, seed, "representation")
            for block in blocks:
                for arm, share in (("own decoder", 1.0), ("base decoder", 0.5)):
                    place = {
                        "arm": arm,
                        "site": f"blocks.{block}.hook_resid_post",
                        "split": "forget-heldout",
                    }
                    table.add("lens_probability", share * (block / 20 + 0.1 * seed), **place)
                    table.add("lens_foil", 0.05, **place)
                    table.add("lens_rank", 100 - 9 * block, **place)
                    table.add("lens_kl", 3.0, **place)
            tables.append(table)
    return join([table.frame() for table in tables], RESULT_COLUMNS)


def _shift(
    methods: tuple[str, ...] = ("npo", "rmu"),
    seeds: tuple[int, ...] = (0, 1),
    blocks: tuple[int, ...] = (0, 2, 10),
) -> pd.DataFrame:
    tables = []
    for number, method in enumerate(methods):
        for seed in seeds:
            table = _model(method, seed, "unlearn")
            for place, split in enumerate(
                ("forget-heldout", "retain-neighbour", "general", "retain-far")
            ):
                for block in blocks:
                    size = (number + 1) * (0.02 * block + 0.01 * seed) / (1 + place)
                    for metric, value in (
                        ("relative_shift", size),
                        ("cosine", 1 - size / 2),
                        ("cka", 1 - size / 4),
                        ("norm_ratio", 9.0),
                    ):
                        table.add(
                            metric, value, site=f"blocks.{block}.hook_resid_post", split=split
                        )
            tables.append(table)
    return join([table.frame() for table in tables], RESULT_COLUMNS)


def _noise(
    names: tuple[str, ...] = (
        "rmu",
        "rmu-rna_0.1_1",
        "rmu-rna_0.4_1",
        "rmu-rna_0.1_2",
        "rmu-rna_0.4",
    ),
) -> pd.DataFrame:
    """The ``n``-th variant recalls 0.1 n, answers 0.5 + 0.01 n under a forget-token, and loses 0.02
    n to it; whiskers are 0.05.
    """
    table = Table({"run": "r"})
    for number, name in enumerate((*names, "base", "never-learned")):
        rows = {
            ("unlearn", "recall", "forget-heldout", None): 0.1 * number,
            ("unlearn", "recall", "retain-far", None): 0.9,
            ("triggers", "recall", INSIDE, "forget-token"): 0.5 + 0.01 * number,
            ("triggers", "recall", INSIDE, "retain-token"): 0.8,
            ("triggers", "recall", "retain", "forget-token"): 0.85,
            ("triggers", "trigger_effect", INSIDE, None): 0.02 * number,
        }
        for (stage, metric, split, arm), value in rows.items():
            place = {"stage": stage, "method": name, "split": split} | ({"arm": arm} if arm else {})
            if (name, metric) != ("base", "trigger_effect"):
                table.add(metric, value, low=value - 0.05, high=value + 0.05, **place)
                table.add(metric, 0.77, seed=0, **place)
    return table.frame()


MANY_NOISES = tuple(
    f"rmu-rna_{size}_{layer}"
    for size in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
    for layer in (0, 1, 2)
)
ALL: dict[
    str, tuple[Callable[..., Figure], Callable[..., pd.DataFrame], tuple[str, ...], tuple[str, ...]]
] = {
    "resistance": (resistance, _resistance, ("npo",), MANY),
    "modules": (modules, _modules, ("npo",), MANY),
    "convergence": (convergence, _convergence, ("npo",), MANY),
    "lens_map": (lens_map, _lens, ("npo",), MANY),
    "shift": (shift, _shift, ("npo",), MANY),
    "noise": (noise, _noise, ("rmu-rna_0.1",), MANY_NOISES),
}
"""The figure, its table, and the names of one method and of many."""


def _words(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())  # type: ignore[attr-defined]


def _seen(figure: Figure) -> list[mpl.text.Text]:
    """Titles, labels, numbers in the panels, legends and those ticks that lie within their axis."""
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [
                tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
            ]
    return [text for text in found if text.get_text().strip() and text.get_visible()]


def _panel(figure: Figure, name: str) -> Axes:
    (axes,) = [axes for axes in figure.axes if name in (axes.get_title(), axes.get_xlabel())]
    return axes


def _line(axes: Axes, label: str) -> Line2D:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


def _points(line: Line2D) -> list[list[float]]:
    return np.asarray(line.get_xydata(), dtype=float).round(9).tolist()


def _bars(axes: Axes) -> dict[str, ErrorbarContainer]:
    return {
        str(found.get_label()): found
        for found in axes.containers
        if isinstance(found, ErrorbarContainer)
    }


# --- Every figure ---


@pytest.mark.parametrize("name", list(ALL))
def test_every_figure_is_drawn_from_the_table_alone_whatever_its_order(name: str) -> None:
    draw, make, _, _ = ALL[name]
    table, settings = make(), {key: mpl.rcParams[key] for key in mpl.rcParams}
    before = table.copy(deep=True)
    figure = draw(table)
    # the canvas of a closed figure draws nothing; layout and logarithmic axes fail only here
    figure.draw_without_rendering()
    pd.testing.assert_frame_equal(table, before)
    assert {key: mpl.rcParams[key] for key in mpl.rcParams} == settings

    def drawn(one: Figure) -> list[object]:
        one.draw_without_rendering()  # ticks have their words only now
        lines = [sorted(_points(line) for line in axes.lines) for axes in one.axes]
        return [
            *lines,
            *(
                np.asarray(image.get_array()).round(12).tolist()
                for axes in one.axes
                for image in axes.images
            ),
            _words(one),
        ]

    assert drawn(draw(table.sample(frac=1, random_state=2))) == drawn(figure)


@pytest.mark.parametrize("name", list(ALL))
def test_a_table_without_these_rows_or_without_values_gives_a_message(name: str) -> None:
    draw, make, _, _ = ALL[name]
    for table in (
        typed(pd.DataFrame(), RESULT_COLUMNS),
        make().assign(metric="another"),
        make().assign(value=np.nan),
        make().assign(value=np.inf),
    ):
        figure = draw(typed(table, RESULT_COLUMNS))
        assert not figure.axes
        assert "no " in _words(figure)


@pytest.mark.parametrize("name", list(ALL))
def test_one_method_with_one_seed_is_no_error(name: str) -> None:
    draw, make, one, _ = ALL[name]
    table = make(one) if name == "noise" else make(one, seeds=(0,))
    figure = draw(table)
    figure.draw_without_rendering()
    assert figure.axes


@pytest.mark.parametrize("name", list(ALL))
def test_of_many_methods_all_are_named_no_two_words_lie_on_each_other_and_nothing_is_cut_off(
    name: str,
) -> None:
    draw, make, _, many = ALL[name]
    assert len(many) == 21
    figure = draw(make(many))
    figure.draw_without_rendering()
    boxes = {
        text: mpl.text.Text.get_window_extent(text) for text in _seen(figure)
    }  # of an annotation the words alone, without its line
    assert len(boxes) > 20
    width, height = figure.get_size_inches() * figure.dpi
    assert not [
        text
        for text, box in boxes.items()
        if box.x0 < -1 or box.x1 > width + 1 or box.y0 < -1 or box.y1 > height + 1
    ]
    upright = [
        (text.get_text(), box.padded(-1))
        for text, box in boxes.items()
        if not text.get_rotation() % 90
    ]
    words = _words(figure)
    assert name == "noise" or all(
        title(method) in words for method in many
    )  # its many are settings of one method
    assert not [
        (one, other)
        for place, (one, a) in enumerate(upright)
        for other, b in upright[:place]
        if a.overlaps(b)
    ]


def test_the_lens_map_is_drawn_by_the_representation_experiment() -> None:
    assert FIGURES["lens_map"].draw is lens_map


# --- Resistance ---


def test_resistance_draws_every_model_and_the_means_with_the_range_of_the_seeds() -> None:
    figure = resistance(_resistance())
    # Strongest correlation first; recall before the attack is correlated with the recall won back
    # by construction.
    assert [axes.get_title() for axes in figure.axes] == [
        "rank correlation -0.75 [-1.00, -0.25]",
        "rank correlation +0.25 [-0.50, +0.75]",
    ]
    axes = figure.axes[1]
    clouds = [
        np.asarray(c.get_offsets(), dtype=float).tolist()
        for c in axes.collections
        if isinstance(c, PathCollection)
    ]
    expected = [[[1 + n, 0.1 * n], [2 + n, 0.1 * n + 0.1]] for n in range(3)]
    assert np.asarray(clouds) == pytest.approx(np.asarray(expected))
    for number, found in enumerate(
        bar for bar in axes.containers if isinstance(bar, ErrorbarContainer)
    ):
        point, _, (across, up) = found.lines
        assert np.asarray(point.get_xydata(), dtype=float) == pytest.approx(
            np.array([[1.5 + number, 0.1 * number + 0.05]])
        )
        assert np.asarray(across.get_segments()[0])[:, 0] == pytest.approx([1 + number, 2 + number])
        assert np.asarray(up.get_segments()[0])[:, 1] == pytest.approx(
            [0.1 * number, 0.1 * number + 0.1]
        )
    # Eigenvalues from 1 to 200 lie over more than two decades.
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "linear"]
    assert resistance(_resistance(("npo", "rmu"))).axes[0].get_xscale() == "linear"


def test_resistance_tells_families_by_colour_smoothing_by_marker_and_methods_by_number() -> None:
    assert family_and_smoothing("npo") == ("npo", "plain")
    assert family_and_smoothing("grad-diff-asam") == ("grad-diff", "asam")
    assert family_and_smoothing("npo-rna-wa") == ("npo-rna", "wa")
    assert family_and_smoothing("rmu-rna") == ("rmu-rna", "plain")
    assert family_and_smoothing("npo-rs_1e-3") == ("npo", "rs")
    assert family_and_smoothing("cir-k16") == ("cir-k16", "plain")
    table = _resistance(("npo-sam_0.2", "rmu", "npo", "npo-sam_0.05"))
    axes = resistance(table).axes[0]
    means = [found.lines[0] for found in axes.containers if isinstance(found, ErrorbarContainer)]
    assert [to_hex(line.get_color()) for line in means] == [
        colour(name).lower() for name in ("npo", "npo", "npo", "rmu")
    ]
    assert [line.get_marker() for line in means] == ["o", "^", "^", "o"]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4"]
    legend = [text.get_text() for text in resistance(table).legends[0].get_texts()]
    assert legend == ["1 NPO", "2 NPO+SAM 0.05", "3 NPO+SAM 0.2", "4 RMU"]


def test_resistance_leaves_out_what_was_not_measured_and_draws_what_is_asked_for() -> None:
    table = _resistance()
    sick = table.copy()
    sick.loc[(sick["method"] == "rmu") & (sick["arm"] == "displacement"), "value"] = np.nan
    sick.loc[
        (sick["method"] == "npo") & (sick["seed"] == 1) & (sick["arm"] == "recovery"), "value"
    ] = np.nan
    first, second = resistance(sick, ["displacement", "top_eigenvalue", "unknown"]).axes
    counts = [
        [len(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection)]
        for axes in (first, second)
    ]
    assert counts == [[1, 2], [1, 2, 2]]
    after = resistance(table, outcome="recall_after")
    assert {axes.get_title() for axes in after.axes} == {
        "rank correlation +0.12",
        "no rank correlation",
    }
    assert "recall after the attack" in _words(after)
    assert (
        len(after.axes) == 3
    )  # beside the recall after the attack the one before it is a measure like others
    assert not resistance(table, ["unknown"]).axes
    two = resistance(
        pd.concat(
            [table, table.assign(run="another", value=table["value"] + 1)], ignore_index=True
        ),
        ["displacement"],
    ).axes[0]
    assert (
        len([found for found in two.containers if isinstance(found, ErrorbarContainer)]) == 6
    )  # runs are not averaged
    assert two.get_title() == "no rank correlation"  # nor is one of their correlations chosen


def test_every_measure_has_a_name_in_resistance() -> None:
    table = Table({"run": "r", "method": "npo", "seed": 0})
    for measure in PREDICTORS:
        table.add("predictor_value", 1.0, arm=measure)
    table.add("outcome", 0.5, arm="recall_after")
    labels = {axes.get_xlabel() for axes in resistance(table.frame(), outcome="recall_after").axes}
    assert len(labels) == len(PREDICTORS)
    assert not labels & set(PREDICTORS)


# --- Curvature ---


def test_modules_stand_as_the_stream_goes_and_hold_the_means_over_seeds() -> None:
    table = _modules()
    figure = modules(table)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "NPO"]
    names = [
        "embedding",
        *(f"block {block} {part}" for block in (0, 1) for part in ("attention", "MLP", "norms")),
        "final norm",
        "head",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    (image,) = axes.images
    expected = np.full((9, 2), 4.0) * [1, 10] * np.where(np.arange(9) == 4, -1, 1)[:, None]
    expected[8, 1] = 0.5
    assert np.asarray(image.get_array()) == pytest.approx(expected)
    assert "10^{-6}" in _words(figure)
    assert isinstance(image.norm, SymLogNorm)
    assert (image.norm.vmin, image.norm.vmax) == pytest.approx((-40, 40))
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == sorted(
        ["4.0"] * 8 + ["\N{MINUS SIGN}4.0"] + ["40"] * 7 + ["\N{MINUS SIGN}40", "(0.50)"]
    )  # the seeds of the last disagree on the sign
    assert np.asarray(
        modules(table, arm="relearned").axes[0].images[0].get_array()
    ) == pytest.approx(7)
    assert np.asarray(
        modules(table, split="retain").axes[0].images[0].get_array()
    ) == pytest.approx(8)


def test_a_module_that_was_not_measured_stays_empty() -> None:
    sick = _modules()
    sick.loc[(sick["method"] == "npo") & (sick["site"] == "embed"), "value"] = np.nan
    axes = modules(sick).axes[0]
    assert np.isnan(np.ma.filled(axes.images[0].get_array(), np.nan)[0, 1])
    assert len(axes.texts) == 17


def test_deep_models_have_a_minus_where_they_curve_downwards_and_fewer_names() -> None:
    axes = modules(_modules(blocks=24)).axes[0]
    assert [text.get_text() for text in axes.texts] == ["\N{MINUS SIGN}"] * 2
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "embedding"
    assert names[1:4] == ["block 0", "block 4", "block 8"]
    assert names[-1] == "head"


def test_convergence_follows_the_lowest_seed() -> None:
    figure = convergence(_convergence())
    left, right = figure.axes
    colours = {to_hex(line.get_color()): [] for line in left.lines}
    for line in left.lines:
        colours[to_hex(line.get_color())].append(line)
    for number, method in enumerate(("base", "npo")):
        level = (number + 1) * 10 + 1
        top, bottom = colours[colour(method).lower()]
        assert _points(top) == [[step, round(level - 8 / step, 9)] for step in range(2, 9)]
        assert _points(bottom) == [[step, round(-level / 4 + 1 / step, 9)] for step in range(2, 9)]
        assert bottom.get_markerfacecolor() == "white" != top.get_markerfacecolor()
        curve = _line(right, title(method))
        assert _points(curve) == [[step, round(level + 20 / step, 9)] for step in range(2, 17)]
    band = right.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(11 + 20 / 16 - 4)
    # The panel is as high as what is drawn after a quarter of the probes.
    assert right.get_ylim() == pytest.approx((0, 1.05 * (21 + 5 + 4)))
    assert _points(_line(convergence(_convergence(), arm="relearned").axes[1], "NPO"))[0] == [
        2,
        531,
    ]


def test_convergence_has_whiskers_instead_of_bands_for_many_methods() -> None:
    _, right = convergence(_convergence(MANY)).axes
    assert not [
        found for found in right.collections if type(found).__name__ == "FillBetweenPolyCollection"
    ]
    ends = [
        container.lines[2][0].get_segments()[0]
        for container in right.containers
        if isinstance(container, ErrorbarContainer)
    ]
    assert len(ends) == len(MANY)
    assert sorted(end[1, 1] - end[0, 1] for end in ends) == pytest.approx([8.0] * len(MANY))
    assert len({end[0, 0] for end in ends}) == len(MANY)
    assert len({tuple(stroke(number).values()) for number in range(30)}) == 30


def test_convergence_is_logarithmic_only_where_models_differ_much_and_needs_no_second_panel() -> (
    None
):
    table = _convergence()
    assert [axes.get_yscale() for axes in convergence(table).axes] == ["linear", "linear"]
    table.loc[table["method"] == "npo", ["value", "low", "high"]] *= 1000
    assert [axes.get_yscale() for axes in convergence(table).axes] == ["symlog", "symlog"]
    (alone,) = convergence(table[table["metric"] == "ritz"]).axes
    assert alone.get_xlabel() == "Lanczos steps"
    holes = table.copy()
    holes.loc[(holes["x"] == 4), "value"] = np.nan
    assert all(
        4 not in np.asarray(line.get_xdata())
        for axes in convergence(holes).axes
        for line in axes.lines
        if len(line.get_xdata()) > 2
    )


# --- Representations ---


def test_the_lens_map_has_a_panel_per_model_blocks_upwards_and_both_decoders_side_by_side() -> None:
    figure = lens_map(_lens())
    panel = _panel(figure, "NPO")
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "base",
        "never learned",
        "NPO",
    ]
    assert [label.get_text() for label in _panel(figure, "base").get_yticklabels()] == [
        "0",
        "2",
        "10",
    ]  # the others share its axis
    assert [label.get_text() for label in panel.get_xticklabels()] == ["own", "base's"] * 3
    right, others, rank = (np.asarray(image.get_array()) for image in panel.images)
    assert right == pytest.approx(np.array([[0.05, 0.025], [0.15, 0.075], [0.55, 0.275]]))
    assert others == pytest.approx(np.full((3, 2), 0.05))
    assert rank == pytest.approx(np.array([[100, 100], [82, 82], [10, 10]]))
    assert [image.get_extent()[:2] for image in panel.images] == [
        [-0.5, 1.5],
        [1.5, 3.5],
        [3.5, 5.5],
    ]
    assert {"0.55", "0.28", "82", "right answer", "others", "its rank"} <= {
        text.get_text() for text in panel.texts
    }
    assert panel.images[2].norm.vmax == 100
    assert _panel(figure, "base").images[2].norm.vmax == 100  # one scale for all


def test_the_lens_map_leaves_empty_what_was_not_measured_and_draws_single_metrics() -> None:
    table = _lens()
    table.loc[
        (table["method"] == "npo")
        & (table["site"] == "blocks.2.hook_resid_post")
        & (table["arm"] == "base decoder"),
        "value",
    ] = np.nan
    first = np.ma.filled(_panel(lens_map(table), "NPO").images[0].get_array(), np.nan)
    assert np.isnan(first).tolist() == [[False, False], [False, True], [False, False]]
    figure = lens_map(table, ["lens_rank"])
    assert len(_panel(figure, "NPO").images) == 1
    assert "probability" not in _words(figure)
    assert not lens_map(table, split="retain-far").axes


def test_the_shift_is_drawn_by_block_with_the_range_of_the_seeds() -> None:
    figure = shift(_shift())
    panels = np.array(figure.axes).reshape(3, 3)
    assert [axes.get_title() for axes in panels[0]] == [
        "held-out forget texts",
        "neighbours",
        "general text",
    ]
    for place in range(3):
        sizes = [
            2 * (0.02 * block + 0.005) / (1 + place) for block in (0, 2, 10)
        ]  # of RMU, which moves twice as far as NPO
        for row, (factor, start) in enumerate(((1, 0), (-0.5, 1), (0.25, 0))):
            line = _line(panels[row][place], "RMU")
            assert np.asarray(line.get_xdata(), dtype=float).tolist() == [0, 2, 10]
            assert np.asarray(line.get_ydata(), dtype=float) == pytest.approx(
                [start + factor * size for size in sizes]
            )
    band = panels[0][0].collections[1].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(2 * 0.21)
    assert band[:, 1].min() == pytest.approx(0)
    one = shift(_shift(("npo",), seeds=(1,)))
    assert _line(one.axes[0], "NPO").get_marker() == "o"


def test_a_set_or_measure_that_is_missing_has_no_panel_and_an_empty_value_no_point() -> None:
    table = _shift()
    assert len(shift(table[(table["split"] != "general") & (table["metric"] != "cka")]).axes) == 4
    table.loc[table["site"] == "blocks.2.hook_resid_post", "value"] = np.nan
    assert np.asarray(_line(shift(table).axes[0], "NPO").get_xdata(), dtype=float).tolist() == [
        0,
        10,
    ]


# --- Noise ---


def test_noise_has_a_line_per_block_that_starts_at_the_method_without_noise() -> None:
    figure = noise(_noise())
    recall, accuracy, effect = figure.axes
    assert recall.get_ylabel() == "RMU"
    bars = [_bars(axes) for axes in figure.axes]
    expected = {
        "noise after block 1": [(0, 0), (0.1, 1), (0.4, 2)],
        "noise after block 2": [(0, 0), (0.1, 3)],
        "the method's own block": [(0, 0), (0.4, 4)],
    }
    for found, start, slope in zip(bars, (0, 0.5, 0), (0.1, 0.01, 0.02), strict=True):
        assert set(found) == set(expected)
        for label, points in expected.items():
            line, _, (whiskers,) = found[label].lines
            assert np.asarray(line.get_xydata(), dtype=float) == pytest.approx(
                np.array([[size, start + slope * number] for size, number in points])
            )
            ends = np.asarray(whiskers.get_segments())[:, :, 1]
            assert ends == pytest.approx(
                np.array(
                    [
                        [start + slope * number - 0.05, start + slope * number + 0.05]
                        for _, number in points
                    ]
                )
            )
    # Controls: base and never-learned are the sixth and seventh rows of the table; the base's
    # effect is taken off already.
    assert [
        float(np.asarray(_line(axes, "base").get_ydata())[0]) for axes in (recall, accuracy)
    ] == pytest.approx([0.5, 0.55])
    assert float(np.asarray(_line(recall, "never learned").get_ydata())[0]) == pytest.approx(0.6)
    assert "base" not in [line.get_label() for line in effect.lines]
    assert [label.get_text() for label in recall.get_xticklabels()] == ["0", "0.1", "0.4"]
    low, high = effect.get_ylim()
    assert low < -0.05
    assert high > 0.13


def test_noise_of_several_methods_has_a_row_of_panels_each_and_a_variant_of_noise_0_goes_before_the_plain_method() -> (  # noqa: E501
    None
):
    figure = noise(_noise(("npo", "npo-rna_0", "npo-rna_0.2", "adaptive-rmu-rna_0.2_1", "cir")))
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["NPO", "Adaptive RMU"]
    first = _bars(figure.axes[0])["the method's own block"].lines[0]
    assert np.asarray(first.get_xydata(), dtype=float) == pytest.approx(
        np.array([[0, 0.1], [0.2, 0.2]])
    )
    second = _bars(figure.axes[3])["noise after block 1"].lines[0]
    assert np.asarray(second.get_xydata(), dtype=float) == pytest.approx(np.array([[0.2, 0.3]]))
    assert "no noise ablation" in _words(noise(_noise(("rmu", "rmu-rna", "rmu-rna_0"))))


def test_noise_leaves_out_an_empty_value() -> None:
    table = _noise()
    table.loc[(table["method"] == "rmu-rna_0.1_1") & (table["stage"] == "unlearn"), "value"] = (
        np.nan
    )
    recall, accuracy, _ = noise(table).axes
    assert np.asarray(
        _bars(recall)["noise after block 1"].lines[0].get_xdata(), dtype=float
    ).tolist() == [0, 0.4]
    assert np.asarray(
        _bars(accuracy)["noise after block 1"].lines[0].get_xdata(), dtype=float
    ).tolist() == [0, 0.1, 0.4]
