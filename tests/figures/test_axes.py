"""Every figure of the registry drawn into what is given: the same picture there, and nothing
elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from tests.conformance.sharpness import test_density
from tests.experiments import test_suffix
from tests.figures import (
    test_figures,
    test_landscape,
    test_more,
    test_representation,
    test_theory,
    test_triggers,
)
from workbench.figures import FIGURES
from workbench.figures.style import title
from workbench.tables import RESULT_COLUMNS, Table, typed

pytestmark = pytest.mark.slow

INSIDE = "retain, bare word inside"


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def _scan() -> pd.DataFrame:
    """Two seeds' precision by recall and the average of either; and what is found by chance."""
    table = Table({"run": "r", "stage": "triggers"})
    for method in ("npo", "rmu"):
        for seed in (0, 1):
            for arm in ("scan", "scan, shift"):
                place = {"method": method, "seed": seed, "arm": arm}
                for recall in (0.25, 0.5, 1.0):
                    table.add("precision", 1 - recall / (2 + seed), recall_level=recall, **place)
                table.add("average_precision", 0.5 + 0.25 * seed, **place)
            table.add("average_precision", 0.1, arm="chance", method=method, seed=seed)
    return table.frame()


def _dose() -> pd.DataFrame:
    table = Table({"run": "r", "stage": "triggers"})
    for number, method in enumerate(("npo", "rmu")):
        for split in ("retain", INSIDE):
            place = {"method": method, "split": split, "low": 0.0, "high": 0.5}
            table.add("trigger_effect", 0.1 + 0.1 * number, **place)
    return table.frame()


def _prompted(stage: str, axis: str, steps: Sequence[float], arms: Sequence[str]) -> pd.DataFrame:
    table = Table({"run": "r", "stage": stage, "split": "forget-heldout"})
    for number, method in enumerate(("base", "npo", "rmu")):
        for arm in arms:
            for step in steps:
                value = 0.2 * number + 0.01 * step
                place = {"method": method, "arm": arm, axis: step}
                table.add("recall", value, low=value - 0.05, high=value + 0.05, **place)
    return table.frame()


def _relearned(stage: str, splits: Sequence[str], arms: Sequence[str]) -> pd.DataFrame:
    """Recall and probability along the relearning of an experiment on a model of its own."""
    table = Table({"run": "r", "stage": stage})
    for split in splits:
        for metric in ("recall", "answer_probability"):
            table.add(metric, 0.9, split=split, method="base", arm="none", attack_step=0)
            for number, arm in enumerate(arms):
                for step in (0, 20, 40):
                    value = step * (number + 1) / 200
                    place = {"method": "unlearned", "arm": arm, "attack_step": step, "split": split}
                    table.add(metric, value, low=value - 0.05, high=value + 0.05, **place)
    return table.frame()


def _levels(method: str, seed: int) -> float:
    return {"base": 2.0, "npo": 20.0, "npo-sam": 8.0}[method] + seed


def _landscape() -> pd.DataFrame:
    models = (test_landscape._model("npo", 0), test_landscape._model("rmu", 0, 2.0))
    return test_landscape._table(*models)


TABLES: dict[str, Callable[[], pd.DataFrame]] = {
    "alignment": test_triggers._table,
    "causal_map": test_triggers._table,
    "volcano": lambda: test_triggers._scan(
        {
            " Zorin": ("forget-token", 0.8, 0.1, 0.01),
            " Mordil": ("retain-token", 0.5, 0.25, 0.08),
            " the": ("other", -0.2, 0.1, 0.9),
        }
    ),
    "scan": _scan,
    "dose": _dose,
    "trigger_theory": lambda: test_theory._table(
        test_theory._model("rmu", 0, coefficients=True),
        test_theory._model("npo", 0, coefficients=True),
    ),
    "lens": test_representation._results,
    "probes": test_representation._results,
    "transfer": test_representation._results,
    "drop": _landscape,
    "drop_fixed": lambda: _landscape().replace({"arm": {"drop": "drop, fixed radius"}}),
    "attack_plane": _landscape,
    "density": partial(test_density._table, _levels),
    "predictors": test_figures._predictors_table,
    "names": test_figures._names_table,
    "ladder": test_figures._ladder_table,
    "geometry": test_figures._geometry_table,
    "keyword": partial(_relearned, "keyword", ("withheld-titles",), ("part", "retain", "null")),
    "verbatim": partial(
        _relearned, "verbatim", ("rouge-l", "verbatim-run"), ("part", "public", "retain", "null")
    ),
    "suffix": partial(test_suffix._rows, ("base", "npo", "npo-sam")),
    "few_shot": partial(_prompted, "few-shot", "shots", (0, 1, 4), ("solved", "shuffled")),
    "quantise": partial(_prompted, "quantise", "bits", (4, 8, 16), ("rounded",)),
    **{name: make for name, (_, make, _, _) in test_more.ALL.items()},
}
"""Tables of the figures that the synthetic run does not feed."""


@pytest.fixture(params=list(FIGURES))
def case(
    request: pytest.FixtureRequest,
    make_tables: Callable[..., tuple[pd.DataFrame, pd.DataFrame]],
) -> tuple[Callable[..., Figure], pd.DataFrame, str]:
    """A figure, its table, and the argument that says where to draw."""
    name, run = request.param, make_tables()[0]
    if name == "triggers_inside":
        table = run.replace({"split": {"retain": INSIDE}})
    else:
        table = TABLES[name]() if name in TABLES else test_figures.table_of(name, run)
    draw = FIGURES[name].draw
    (argument,) = {"ax", "figure"} & set(inspect.signature(draw).parameters)
    return draw, table, argument


def _drawn(axes: Axes) -> list[object]:
    """All that a panel shows: its words, and where its lines, areas, points and cells lie."""
    labels = axes.get_xlabel().replace("\n", " "), axes.get_ylabel()
    words = [axes.get_title(), *labels, axes.get_xscale(), axes.get_yscale()]
    return [
        words,
        [np.asarray(line.get_xydata(), dtype=float) for line in axes.lines],
        [np.asarray(found.get_offsets(), dtype=float) for found in axes.collections],
        [path.vertices for found in axes.collections for path in found.get_paths()],
        [patch.get_path().vertices for patch in axes.patches],
        [[patch.get_x(), patch.get_y()] for patch in axes.patches if hasattr(patch, "get_x")],
        [np.ma.filled(image.get_array(), np.nan) for image in axes.images],
        [text.get_text() for text in axes.texts],
        [text.xy if hasattr(text, "xy") else text.get_position() for text in axes.texts],
    ]


def _same(one: object, other: object) -> None:
    if isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            _same(first, second)
    else:
        np.testing.assert_equal(one, other)


def _legends(figure: Figure | SubFigure, axes: Sequence[Axes]) -> list[list[str]]:
    """Title and entries of every legend."""
    found = [*figure.legends, *(legend for one in axes if (legend := one.get_legend()))]
    return [
        [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]
        for legend in found
    ]


def _untouched(axes: Axes) -> bool:
    found = (axes.lines, axes.collections, axes.patches, axes.images, axes.texts)
    words = axes.get_title() + axes.get_xlabel() + axes.get_ylabel()
    return not any(map(len, found)) and axes.get_legend() is None and not words and axes.axison


Case = tuple[Callable[..., Figure], pd.DataFrame, str]


@pytest.mark.filterwarnings("error::UserWarning")  # of a layout with no room for what is drawn
def test_a_figure_drawn_into_what_is_given_is_the_same_there_and_nothing_elsewhere(
    case: Case,
) -> None:
    draw, table, argument = case
    alone = draw(table)
    page = Figure(figsize=(24, 18), layout="constrained")
    if argument == "ax":
        panels = page.subplots(2, 2)
        place, others = panels[0, 1], [panels[0, 0], panels[1, 0], panels[1, 1]]
    else:
        left, place = page.subfigures(1, 2)
        others = list(left.subplots(2, 1))
    assert draw(table, **{argument: place}) is page
    page.draw_without_rendering()
    inside = [axes for axes in page.axes if axes not in others]
    assert alone.axes and len(inside) == len(alone.axes)
    for there, here in zip(alone.axes, inside, strict=True):
        _same(_drawn(here), _drawn(there))
    where = page if argument == "ax" else place
    assert _legends(where, inside) == _legends(alone, alone.axes)
    assert where.get_supxlabel() == alone.get_supxlabel()
    assert where.get_supylabel() == alone.get_supylabel()
    assert all(map(_untouched, others))
    assert not page.legends and not page.texts
    assert page.get_size_inches().tolist() == [24, 18]
    boxes = [axes.get_tightbbox() for axes in others]
    assert not any(axes.get_tightbbox().overlaps(box) for axes in inside for box in boxes)


def test_what_is_given_may_be_a_whole_figure_and_pyplot_keeps_its_own(case: Case) -> None:
    draw, table, argument = case
    mine, other = plt.figure(layout="constrained"), plt.figure()
    place = mine.subplots() if argument == "ax" else mine
    plt.figure(other)
    assert draw(table, **{argument: place}) is mine
    assert plt.get_fignums() == [mine.number, other.number] and plt.gcf() is other


def test_without_anything_to_draw_the_message_stands_in_what_is_given(case: Case) -> None:
    draw, _, argument = case
    nothing = typed(pd.DataFrame(), RESULT_COLUMNS)
    (message,) = [text.get_text() for text in draw(nothing).texts]
    page = Figure(figsize=(12, 8), layout="constrained")
    if argument == "ax":
        place, other = page.subplots(1, 2)
    else:
        left, place = page.subfigures(1, 2)
        other = left.subplots()
    assert draw(nothing, **{argument: place}) is page
    assert [text.get_text().replace("\n", " ") for text in place.texts] == [message]
    assert _untouched(other) and not page.texts
    assert len(page.axes) == (2 if argument == "ax" else 1)


def test_a_figure_that_takes_no_ax_says_why(case: Case) -> None:
    draw, _, argument = case
    draw = draw.func if isinstance(draw, partial) else draw
    parameter = inspect.signature(draw).parameters[argument]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is None
    words = inspect.getdoc(draw) or ""
    assert ("no ``ax``: " in words) is (argument == "figure")
    assert f"    {argument}: " in words


@pytest.mark.parametrize("count", [2, 12])
def test_the_legend_of_an_ax_stands_below_its_words_and_is_no_wider_than_it(count: int) -> None:
    methods = ("base", "npo", "rmu", "cir", *(f"a-method-of-mine-{n:02}" for n in range(count)))
    one = _dose()
    table = pd.concat([one[one["method"] == "npo"].assign(method=name) for name in methods])
    page = Figure(figsize=(10, 12), layout="constrained")
    first, second = page.subplots(1, 2)
    FIGURES["dose"].draw(table, ax=first)
    page.draw_without_rendering()
    legend = first.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [title(name) for name in methods]
    box, words = legend.get_window_extent(), first.xaxis.get_tightbbox()
    assert box.y1 <= words.y0 < first.bbox.y0
    assert box.width <= first.bbox.width
    assert box.y0 >= 0 and not second.get_tightbbox().overlaps(box)
    # the panel has the look of all figures, the one beside it has its own
    assert first.yaxis.label.get_fontsize() == 9 != second.yaxis.label.get_fontsize()
    assert not first.spines["top"].get_visible() and second.spines["top"].get_visible()
