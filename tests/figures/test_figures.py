"""Every figure from a synthetic table: what is drawn, in which colour, and that nothing else is
touched.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from workbench.experiments.predictors import PREDICTORS
from workbench.figures import figures_of, geometry, ladder, names, predictors
from workbench.figures.keyword import keyword as figures_keyword
from workbench.figures.style import colour, methods_in, title
from workbench.tables import RESULT_COLUMNS, typed
from workbench.unlearning.methods import METHODS

Tables = Callable[..., tuple[pd.DataFrame, pd.DataFrame]]
BY_METHOD = ("recovery", "disruption", "triggers", "slices", "curvature")
UNLEARNED_ONLY = ("recovery", "disruption", "curvature")


FIGURES = {name: entry.draw for name, entry in figures_of("run").items()}


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def results(make_tables: Tables) -> pd.DataFrame:
    return make_tables()[0]


def _colours(figure: Figure) -> set[str]:
    """Every colour of a line, an area, a point, a bar or a word in the panels."""
    found: set[str] = set()
    for axes in figure.axes:
        found |= {to_hex(line.get_color()) for line in axes.lines}
        for collection in axes.collections:
            found |= {
                to_hex(shade)
                for shade in (*collection.get_facecolor(), *collection.get_edgecolor())
            }
        for patch in axes.patches:
            found |= {to_hex(patch.get_facecolor()), to_hex(patch.get_edgecolor())}
    return found


def _words(figure: Figure) -> str:
    """All text of a figure."""
    return " | ".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())  # type: ignore[attr-defined]


def _curve(axes: Axes, label: str) -> np.ndarray:
    """``[point, 2]`` of the one line with this label."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(line.get_xydata(), dtype=float)


# --- Every figure ---


def table_of(name: str, results: pd.DataFrame) -> pd.DataFrame:
    """The synthetic run, with the rows that this figure wants and the run has not."""
    if (
        name == "ablation"
    ):  # the demo has no ablation, so two of its methods stand in for two counts of components
        first, second = [
            name
            for name in results["method"].dropna().unique()
            if name not in ("base", "never-learned")
        ][:2]
        return results.replace({"method": {first: "cir-k0", second: "cir-k16"}})
    if name == "shift":  # nor does the synthetic run say how far the stream has moved
        moved = results[results["metric"] == "returned"].assign(
            metric="relative_shift", stage="unlearn"
        )
        return pd.concat([results, moved], ignore_index=True)
    if name == "smoothing":  # nor has it a smoothed method
        attacks = results[
            (results["metric"] == "recall")
            & (results["stage"] == "relearn")
            & (results["arm"] == "attack")
            & (results["method"] == "npo")
            & results["seed"].isna()
        ]
        return pd.concat(
            [results, attacks.assign(metric="smoothing_effect", method="npo-sam")],
            ignore_index=True,
        )
    return results


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_is_drawn_from_the_table_alone(name: str, results: pd.DataFrame) -> None:
    before = results.copy(deep=True)
    table = table_of(name, results)
    figure = FIGURES[name](table)
    assert isinstance(figure, Figure)
    assert any(axes.lines or axes.patches or axes.collections for axes in figure.axes)
    figure.canvas.draw()  # constrained layout and logarithmic axes fail only here
    pd.testing.assert_frame_equal(results, before)


@pytest.mark.parametrize("name", list(FIGURES))
def test_an_empty_table_gives_a_figure_with_a_message(name: str) -> None:
    figure = FIGURES[name](typed(pd.DataFrame(), RESULT_COLUMNS))
    assert isinstance(figure, Figure)
    assert not figure.axes
    assert "no " in _words(figure)
    figure.canvas.draw()


@pytest.mark.parametrize(
    "stage", ["subspaces", "budget", "unlearn", "relearn", "triggers", "sharpness"]
)
@pytest.mark.parametrize("name", list(FIGURES))
def test_a_table_with_one_stage_or_without_it_is_no_error(
    name: str, stage: str, results: pd.DataFrame
) -> None:
    # A run that was stopped has some stages and not others.
    for part in (results[results["stage"] == stage], results[results["stage"] != stage]):
        assert isinstance(FIGURES[name](part), Figure)


@pytest.mark.parametrize("name", list(FIGURES))
def test_a_table_with_one_seed_one_method_and_no_control_is_no_error(
    name: str, make_tables: Tables
) -> None:
    table = make_tables(methods=("rmu",), controls=(), seeds=(0,))[0]
    FIGURES[name](table).canvas.draw()


@pytest.mark.parametrize("name", list(FIGURES))
def test_empty_values_are_no_error(name: str, results: pd.DataFrame) -> None:
    # An eigenvalue that did not converge is an empty value with its reason beside it.
    sick = results.copy()
    sick.loc[sick["metric"].isin(["top_eigenvalue", "bottom_eigenvalue"]), "value"] = np.nan
    FIGURES[name](sick).canvas.draw()


@pytest.mark.parametrize("name", list(FIGURES))
def test_the_order_of_rows_means_nothing(name: str, results: pd.DataFrame) -> None:
    def curves(table: pd.DataFrame) -> list[list[tuple[float, ...]]]:
        found = []
        for axes in FIGURES[name](table).axes:
            lines = [
                tuple(np.asarray(line.get_xydata(), dtype=float).round(9).ravel().tolist())
                for line in axes.lines
            ]
            points = [
                tuple(sorted(map(tuple, np.ma.filled(c.get_offsets(), np.nan).round(9).tolist())))
                for c in axes.collections
                if _is_scatter(c)
            ]
            found.append([*sorted(lines), *sorted(points)])  # type: ignore[list-item]
        return found

    assert curves(results.sample(frac=1, random_state=1)) == curves(results)


def _is_scatter(collection: Collection) -> bool:
    return type(collection).__name__ == "PathCollection"


@pytest.mark.parametrize("name", list(FIGURES))
def test_drawing_changes_nothing_global(name: str, results: pd.DataFrame) -> None:
    plt.figure()  # settles the backend, which is chosen at the first figure of a process
    before = {key: mpl.rcParams[key] for key in mpl.rcParams}
    FIGURES[name](results)
    FIGURES[name](typed(pd.DataFrame(), RESULT_COLUMNS))
    assert {key: mpl.rcParams[key] for key in mpl.rcParams} == before


@pytest.mark.slow
def test_figures_load_no_model() -> None:
    code = (
        "import sys, pandas as pd\n"
        "from workbench import figures\n"
        "table = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in %r.items()})\n"
        "for entry in figures.FIGURES.values(): entry.draw(table)\n"
        "print([name for name in ('workbench.models', 'workbench.builtin') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code % RESULT_COLUMNS],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"MPLBACKEND": "Agg", "HOME": "/tmp"},
    )
    assert done.stdout.strip() == "[]"


def test_the_comparison_orders_methods_by_what_the_attack_brings_back_and_marks_those_below_the_budget(  # noqa: E501
    results: pd.DataFrame,
) -> None:
    rows = results[
        (results["stage"] == "relearn")
        & (results["arm"] == "attack")
        & (results["metric"] == "recall")
        & results["seed"].isna()
    ]
    rows = rows[rows["split"] == "forget-heldout"]
    after = (
        rows.sort_values("x")
        .groupby("method")["value"]
        .last()
        .drop(["base", "never-learned"], errors="ignore")
    )
    short = pd.DataFrame(
        [
            {
                "run": "r",
                "stage": "unlearn",
                "method": "npo",
                "seed": 0,
                "metric": "budget_reached",
                "value": 0.0,
            }
        ]
    )
    figure = FIGURES["comparison"](
        typed(pd.concat([results, short], ignore_index=True), RESULT_COLUMNS)
    )
    names = {text.get_text(): float(text.get_position()[1]) for text in figure.axes[0].texts}
    assert set(names) == {title(str(method)) + " *" * (method == "npo") for method in after.index}
    places = [
        names[title(str(method)) + " *" * (method == "npo")]
        for method in after.sort_values(ascending=False).index
    ]
    heights = after.sort_values(ascending=False).to_numpy()
    assert all(
        low <= high
        for (low, high), (one, two) in zip(pairwise(places), pairwise(heights), strict=True)
        if one > two
    )


# --- One colour for one method ---


def test_every_method_has_a_colour_of_its_own_and_a_title() -> None:
    # "unlearned" is a user's own model and never stands beside the methods of the demo.
    names = [*METHODS, "base", "never-learned"]
    assert len({colour(name) for name in names}) == len(names)
    assert len({title(name) for name in names}) == len(names)
    assert all(title(name) != name for name in METHODS)


def test_no_two_labels_share_a_colour() -> None:
    labels = [*METHODS, *(f"variant-{number}" for number in range(500))]
    assert len({colour(label) for label in labels}) == len(labels)


@pytest.mark.parametrize("name", BY_METHOD)
def test_a_method_has_its_colour_in_every_figure_and_only_where_it_is(
    name: str, make_tables: Tables
) -> None:
    other = make_tables()[0]
    one = other[other["method"] != "cir"]
    assert colour("npo").lower() in _colours(FIGURES[name](one))
    assert colour("cir").lower() not in _colours(FIGURES[name](one))
    assert {colour("npo").lower(), colour("cir").lower()} <= _colours(FIGURES[name](other))


@pytest.mark.parametrize("name", BY_METHOD)
def test_every_method_is_named_in_every_figure(name: str, results: pd.DataFrame) -> None:
    words = _words(FIGURES[name](results))
    assert title("npo") in words
    assert title("cir") in words
    if name not in UNLEARNED_ONLY:
        assert "base" in words
        assert "never" in words


@pytest.mark.parametrize("name", BY_METHOD)
def test_a_method_that_the_palette_does_not_know_is_drawn_in_its_spare_colour(
    name: str, make_tables: Tables
) -> None:
    figure = FIGURES[name](make_tables(methods=("mine", "npo"))[0])
    assert colour("mine") == colour("mine")
    assert colour("mine") not in {colour(name) for name in METHODS}
    assert colour("mine").lower() in _colours(figure)
    assert "mine" in _words(figure)


def test_methods_come_in_the_order_of_the_palette_each_once_unknown_ones_last() -> None:
    assert methods_in(["zeta", "cir", "npo", "alpha", "base", "npo"]) == [
        "base",
        "npo",
        "cir",
        "alpha",
        "zeta",
    ]
    assert methods_in([]) == []


# --- What is drawn ---


def test_recovery_draws_the_rows_over_all_seeds_beside_both_controls(results: pd.DataFrame) -> None:
    figure = FIGURES["recovery"](results)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert set(panels) == {"NPO", "CIR"}
    npo = panels["NPO"]
    np.testing.assert_allclose(_curve(npo, "relearning attack"), [[0, 0.25], [5, 0.5], [20, 0.75]])
    np.testing.assert_allclose(
        _curve(npo, "null attack (general text)"), [[0, 0.25], [5, 0.25], [20, 0.25]]
    )
    np.testing.assert_allclose(
        _curve(npo, "never learned, same attack"), [[0, 0.125], [5, 0.25], [20, 0.375]]
    )
    np.testing.assert_allclose(_curve(npo, "base, same attack"), [[0, 1], [5, 1], [20, 1]])
    # The band is the interval of the table.
    rows = results[
        (results["stage"] == "relearn")
        & (results["metric"] == "recall")
        & (results["arm"] == "attack")
        & (results["method"] == "npo")
        & results["seed"].isna()
    ]
    attack = rows[rows["arm"] == "attack"].sort_values("x")
    corners = npo.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(attack["low"].min())
    assert corners[:, 1].max() == pytest.approx(attack["high"].max())


def test_recovery_of_answer_probability_draws_that_metric(results: pd.DataFrame) -> None:
    figure = FIGURES["recovery"](results, metric="answer_probability")  # type: ignore[call-arg]
    panel = next(axes for axes in figure.axes if axes.get_title() == "NPO")
    np.testing.assert_allclose(
        _curve(panel, "relearning attack")[:, 1], 0.1 + 0.8 * np.array([0.25, 0.5, 0.75])
    )
    assert "probability" in figure.axes[0].get_ylabel()


def test_recovery_reads_only_rows_without_a_seed(results: pd.DataFrame) -> None:
    assert not FIGURES["recovery"](results[results["seed"].notna()]).axes


def test_disruption_draws_one_walk_per_seed_by_rising_alpha_and_the_budget(
    results: pd.DataFrame,
) -> None:
    left, right = FIGURES["disruption"](results).axes
    walks = [
        np.asarray(line.get_xydata(), dtype=float)
        for line in left.lines
        if to_hex(line.get_color()) == colour("npo").lower() and len(line.get_xydata())
    ]
    assert len(walks) == 2
    for seed, walk in enumerate(walks):
        # alpha 0, 1/2, 1: the first has no disruption and stands at the left edge, for a
        # logarithmic axis has no zero.
        np.testing.assert_allclose(walk[1:, 0], [0.02 + 0.0005 * seed, 0.08 + 0.001 * seed])
        assert 0 < walk[0, 0] < 0.02
        np.testing.assert_allclose(walk[:, 1], [1.0, 1 - 0.5 * 0.75, 0.25])
    assert any(
        np.allclose(line.get_xdata(), 0.05) for line in left.lines if line.get_linestyle() == "--"
    )
    assert left.get_xscale() == "log"
    bars = [container for container in right.containers if isinstance(container, ErrorbarContainer)]
    assert [float(container.lines[0].get_ydata()[0]) for container in bars] == [0.25, 0.125]


def test_triggers_draws_one_bar_per_model_and_arm(results: pd.DataFrame) -> None:
    (axes,) = FIGURES["triggers"](results).axes
    models = ["base", "never-learned", "npo", "cir"]
    assert [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()] == [
        title(name) for name in models
    ]
    heights: dict[int, list[float]] = {}
    for patch in axes.patches:
        heights.setdefault(round(patch.get_x() + patch.get_width() / 2), []).append(
            float(patch.get_height())
        )
    assert list(heights) == [0, 1, 2, 3]
    assert {number: sorted(found) for number, found in heights.items()} == {
        0: [0.75, 0.875, 1.0, 1.0],
        1: [0.125, 0.75, 0.875, 1.0],
        2: [0.25, 0.75, 0.875, 1.0],
        3: [0.125, 0.75, 0.875, 1.0],
    }
    solid = {
        to_hex(patch.get_facecolor())
        for patch in axes.patches
        if to_hex(patch.get_facecolor()) == to_hex(patch.get_edgecolor())
    }
    assert solid == {colour(name).lower() for name in models}


def test_slices_draw_the_mean_and_the_range_over_seeds(results: pd.DataFrame) -> None:
    figure = FIGURES["slices"](results)
    assert len(figure.axes) == 2 * 3  # held-out and neighbours, by descent, random and to-base
    axes = figure.axes[0]
    positions = np.linspace(-0.05, 0.05, 5)
    np.testing.assert_allclose(
        _curve(axes, "NPO"), np.stack([positions, 1.5 + positions**2], axis=1)
    )
    shade = to_hex(colour("npo"))
    (band,) = [c for c in axes.collections if to_hex(c.get_facecolor()[0]) == shade]
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(1.0)
    assert heights.max() == pytest.approx(2.0 + 0.05**2)


def test_curvature_has_one_point_per_method_and_seed(results: pd.DataFrame) -> None:
    figure = FIGURES["curvature"](results)
    panels = {axes.get_xlabel(): axes for axes in figure.axes}
    assert len(panels) == 3
    expected = {
        "top Hessian eigenvalue": (40.0, 50.0),
        "bottom Hessian eigenvalue": (-3.0, -3.0),
        "displacement of the weights": (2.0, 3.0),
    }
    for label, values in expected.items():
        points = {
            to_hex(c.get_facecolor()[0]): np.asarray(c.get_offsets())
            for c in panels[label].collections
            if _is_scatter(c)
        }
        # NPO wins back half of all facts, CIR nothing; base and control are no unlearned models.
        assert set(points) == {colour("npo").lower(), colour("cir").lower()}
        np.testing.assert_allclose(
            points[colour("npo").lower()], [[value, 0.5] for value in values]
        )
        np.testing.assert_allclose(
            points[colour("cir").lower()], [[value, 0.0] for value in values]
        )


def test_spectra_draw_variance_shares_and_overlaps_with_their_nulls(results: pd.DataFrame) -> None:
    figure = FIGURES["spectra"](results)
    above, below = figure.axes[:3], figure.axes[3:]
    assert len(below) == 3
    for axes in above:
        assert len(axes.lines) == 2 * 2  # forget and retain, two blocks
        np.testing.assert_allclose(
            _curve(axes, "forget texts"), [[rank, 0.4 * 0.6 ** (rank - 1)] for rank in range(1, 9)]
        )
    for axes in below:
        # Means over blocks 0 and 1, which lie 0.01 apart.
        np.testing.assert_allclose(
            _curve(axes, "forget and retain"), [[rank, 0.605] for rank in (1, 2, 4, 8)]
        )
        np.testing.assert_allclose(
            _curve(axes, "random subspaces"), [[rank, 0.105] for rank in (1, 2, 4, 8)]
        )
        np.testing.assert_allclose(
            _curve(axes, "two halves of the retain set"), [[rank, 0.955] for rank in (1, 2, 4, 8)]
        )


# --- Subspaces ---


def test_angles_show_the_observed_overlap_above_the_diagonal_and_its_null_below(
    results: pd.DataFrame,
) -> None:
    figure = FIGURES["angles"](results)
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_xticklabels()] == [
        "forget",
        "neighbours",
        "general",
    ]
    matrix = np.asarray(first.images[0].get_array())
    assert np.isnan(np.diag(matrix)).all()
    assert matrix[0].tolist()[1:] == [0.8, 0.3]
    assert matrix[1, 2] == 0.25
    assert matrix[np.tril_indices(3, -1)].tolist() == [0.9] * 3
    # a star where, and only where, the overlap lies below 95 % of its null
    assert sorted(text.get_text() for text in first.texts) == sorted(
        ["0.80", "0.30*", "0.25*", "0.90", "0.90", "0.90"]
    )


def test_energy_averages_blocks_and_seeds_and_shows_a_random_change(results: pd.DataFrame) -> None:
    left, right = FIGURES["energy"](results).axes
    for axes, share in ((left, 0.05), (right, 0.02)):
        curve = _curve(axes, title("npo"))
        assert curve[:, 0].tolist() == [1, 2, 4, 8]
        assert curve[:, 1] == pytest.approx([rank * share + 0.005 for rank in (1, 2, 4, 8)])
        assert _curve(axes, "random change")[:, 1] == pytest.approx(
            [rank / 64 for rank in (1, 2, 4, 8)]
        )


def test_spectra_name_the_variance_of_every_tier(results: pd.DataFrame) -> None:
    panel = FIGURES["spectra"](results).axes[0]
    tier = [sum(0.5**rank for rank in ranks) for ranks in (range(1, 5), range(5, 9))]
    assert [text.get_text() for text in panel.texts] == [f"{share:.0%}" for share in tier]


# --- Figures of the attacks, which stand outside the report ---


def _tidy(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows over all seeds, with an interval of 0.1 to either side unless they say otherwise."""
    return typed(
        pd.DataFrame(
            [{"low": row["value"] - 0.1, "high": row["value"] + 0.1} | row for row in rows]
        ),
        RESULT_COLUMNS,
    )


def _bars(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, values and ``[point, 2]`` ends of the whiskers of the error bars with this label."""
    (container,) = [
        found
        for found in axes.containers
        if isinstance(found, ErrorbarContainer) and found.get_label() == label
    ]
    points, _, (whiskers,) = container.lines
    x, y = (np.asarray(values, dtype=float) for values in points.get_data())
    segments = np.array(whiskers.get_segments())
    along = (
        1
        if np.ptp(segments[:, :, 0]) == 0 or np.allclose(segments[:, 0, 0], segments[:, 1, 0])
        else 0
    )
    return x, y, np.sort(segments[:, :, along], axis=1)


def _ticks(axes: Axes, which: str = "x") -> list[str]:
    labels = axes.get_xticklabels() if which == "x" else axes.get_yticklabels()
    return [label.get_text() for label in labels]


def _names_table() -> pd.DataFrame:
    rows = []
    for count, end in ((7, 0.9), (5, 0.8), (3, 0.3), (1, 0.1)):
        shared = {"stage": "names", "split": f"repetitions-{count}", "metric": "asr"}
        rows += [
            {
                **shared,
                "method": "base",
                "arm": "none",
                "x": 0,
                "value": 1.0,
                "low": 0.9,
                "high": 1.0,
            },
            {**shared, "method": "base", "arm": "null", "x": 30, "value": 0.99},
            {
                **shared,
                "method": "unlearned",
                "arm": "fragments",
                "x": 0,
                "value": 0.0,
                "low": 0.0,
                "high": 0.05,
            },
            {**shared, "method": "unlearned", "arm": "fragments", "x": 10, "value": end / 2},
            {**shared, "method": "unlearned", "arm": "fragments", "x": 30, "value": end},
            {
                **shared,
                "method": "unlearned",
                "arm": "fragments",
                "x": 30,
                "value": 0.55,
                "seed": 0,
            },  # of one seed
            {
                **shared,
                "method": "unlearned",
                "arm": "fragments",
                "x": 30,
                "value": 0.56,
                "metric": "recall",
            },
            {**shared, "method": "unlearned", "arm": "null", "x": 0, "value": 0.57},
            {**shared, "method": "unlearned", "arm": "null", "x": 30, "value": end / 10},
            {**shared, "method": "never-learned", "arm": "fragments", "x": 0, "value": 0.02},
            {**shared, "method": "never-learned", "arm": "fragments", "x": 30, "value": 0.04},
        ]
    return _tidy(rows)


def _ladder_table() -> pd.DataFrame:
    rows = []
    text_sets = {
        "gibberish": 0.0,
        "general": 0.1,
        "syntax": 0.2,
        "topic": 0.25,
        "public": 0.3,
        "part": 0.5,
        "whole": 0.9,
    }
    configs = {"part, lora": 0.45, "part, sgd": 0.4}
    for method, more in (("npo", 0.05), ("cir", 0.0), ("base", 0.08), ("never-learned", -0.05)):
        shared = {
            "stage": "ladder",
            "method": method,
            "metric": "recall",
            "split": "forget-queries",
        }
        for arm, value in (text_sets | configs).items():
            for step, share in ((0, 0.0), (10, 0.4), (40, 1.0)):
                rows.append({**shared, "arm": arm, "x": step, "value": 0.1 + more + share * value})
                rows.append({**shared, "arm": arm, "x": step, "value": 0.77, "seed": 1})
                rows.append(
                    {**shared, "arm": arm, "x": step, "value": 0.78, "metric": "effect_recall"}
                )
        for step in (0, 10, 40):
            rows.append(
                {
                    **shared,
                    "split": "novel",
                    "arm": "novel",
                    "x": step,
                    "value": 0.2 + more + step / 100,
                }
            )
    rows.append({"stage": "ladder", "arm": "whole", "metric": "benign", "value": 0.0})
    return _tidy(rows)


def _predictors_table() -> pd.DataFrame:
    rows = [
        ("displacement", "recovery", 0.2),
        ("displacement", "recall_after", -0.3),
        ("top_eigenvalue", "recovery", -0.9),
        ("top_eigenvalue", "recall_after", 0.1),
        ("recall_before", "recall_after", 0.6),
        ("my_measure", "recovery", 0.05),
    ]
    return _tidy(
        [
            {
                "stage": "predictors",
                "metric": "recovery_correlation",
                "arm": arm,
                "split": split,
                "value": value,
            }
            for arm, split, value in rows
        ]
    )


def _geometry_table() -> pd.DataFrame:
    rows = []
    for method, sign in (("cir", -1), ("npo", 1)):
        for seed in (0, 1):
            for layer in (0, 2, 10):  # as numbers, not as words
                for step in (0, 5, 20):
                    shared = {
                        "stage": "relearn",
                        "method": method,
                        "seed": seed,
                        "site": f"blocks.{layer}.hook_resid_post",
                        "x": step,
                    }
                    rows.append(
                        {
                            **shared,
                            "metric": "returned",
                            "arm": "attack",
                            "value": sign * (layer / 20 + step / 50) + 0.1 * seed,
                        }
                    )
                    rows.append({**shared, "metric": "returned", "arm": "null", "value": 7.0})
                    rows.append({**shared, "metric": "beside", "arm": "attack", "value": 8.0})
    return _tidy(rows)


ATTACKS = {
    "names": (names, _names_table, "no names experiment"),
    "ladder": (ladder, _ladder_table, "no attack ladder"),
    "predictors": (predictors, _predictors_table, "no correlation with recovery"),
    "geometry": (geometry, _geometry_table, "no geometry of an attack"),
}


def test_figures_of_one_experiment_of_its_own_are_not_part_of_the_report() -> None:
    assert "geometry" in FIGURES
    assert not {"names", "ladder", "predictors"} & set(FIGURES)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_figure_of_an_attack_is_drawn_from_its_rows_alone(
    name: str, results: pd.DataFrame
) -> None:
    draw, table_of, message = ATTACKS[name]
    table = table_of()
    before, settings = table.copy(deep=True), {key: mpl.rcParams[key] for key in mpl.rcParams}
    figure = draw(table)
    figure.canvas.draw()
    pd.testing.assert_frame_equal(table, before)

    def drawn(figure: Figure) -> list[list[str]]:
        lines = [
            [
                str(np.asarray(line.get_xydata(), dtype=float).round(9).tolist())
                for line in axes.lines
            ]
            for axes in figure.axes
        ]
        words = [
            [text.get_text() for text in axes.texts]
            + [str(image.get_array()) for image in axes.images]
            for axes in figure.axes
        ]
        return [*map(sorted, lines), *words]

    # The order of rows and what other stages have to say mean nothing.
    assert drawn(draw(table.sample(frac=1, random_state=2))) == drawn(figure)
    other = results[results["stage"] != "relearn"]
    assert drawn(draw(pd.concat([table, other], ignore_index=True))) == drawn(figure)
    for nothing in (typed(pd.DataFrame(), RESULT_COLUMNS), other):
        empty = draw(nothing)
        assert not empty.axes
        assert message in _words(empty)
        empty.canvas.draw()
    assert {key: mpl.rcParams[key] for key in mpl.rcParams} == settings


def test_names_draw_success_by_repetitions_beside_the_published_row() -> None:
    figure = names(_names_table())
    left, right = figure.axes
    assert _ticks(left) == ["7", "5", "3", "1"]
    assert left.get_xlabel() == "repetitions of the pair"
    expected = {
        "base": [1.0, 1.0, 1.0, 1.0],
        "unlearned": [0.0, 0.0, 0.0, 0.0],
        "relearned on fragments": [0.9, 0.8, 0.3, 0.1],
        "relearned on other names": [0.09, 0.08, 0.03, 0.01],
        "never learned, on fragments": [0.04, 0.04, 0.04, 0.04],
    }
    for label, values in expected.items():
        places, found, _ = _bars(left, label)
        assert found.tolist() == pytest.approx(values)
        assert places.round().tolist() == [0, 1, 2, 3]
    assert {found.get_label() for found in left.containers} == set(expected)
    # The whiskers are the interval of the table.
    np.testing.assert_allclose(
        _bars(left, "relearned on fragments")[2], [[0.8, 1.0], [0.7, 0.9], [0.2, 0.4], [0.0, 0.2]]
    )
    np.testing.assert_allclose(_bars(left, "base")[2], [[0.9, 1.0]] * 4)
    (published,) = [
        np.asarray(found.get_offsets())
        for found in left.collections
        if found.get_label() == "published, relearned"
    ]
    np.testing.assert_allclose(published, [[0, 1.0], [1, 0.97], [2, 0.23], [3, 0.0]])
    # Right: along the relearning, with the never-learned model dashed in the same shade.
    for count, end in ((7, 0.9), (5, 0.8), (3, 0.3), (1, 0.1)):
        np.testing.assert_allclose(
            _curve(right, f"{count} repetition{'s' if count > 1 else ''}"),
            [[0, 0.0], [10, end / 2], [30, end]],
        )
    dashed = [
        np.asarray(line.get_xydata(), dtype=float)
        for line in right.lines
        if line.get_linestyle() == "--" and len(line.get_xydata())
    ]
    assert len(dashed) == 4
    assert all(np.allclose(line, [[0, 0.02], [30, 0.04]]) for line in dashed)
    shades = {
        line.get_label(): to_hex(line.get_color())
        for line in right.lines
        if str(line.get_label()).endswith(("repetitions", "repetition"))
    }
    assert len(set(shades.values())) == 4
    assert all(
        word in _words(figure)
        for word in ("published, relearned", "never learned", "relearning steps")
    )


def test_names_of_some_repetitions_without_controls_are_drawn_at_their_own_published_number() -> (
    None
):
    table = _names_table()
    table = table[
        table["split"].isin(["repetitions-5", "repetitions-1"]) & (table["method"] == "unlearned")
    ]
    left, right = names(table).axes
    assert _ticks(left) == ["5", "1"]
    assert {found.get_label() for found in left.containers} == {
        "unlearned",
        "relearned on fragments",
        "relearned on other names",
    }
    (published,) = [
        np.asarray(found.get_offsets())
        for found in left.collections
        if found.get_label() == "published, relearned"
    ]
    np.testing.assert_allclose(published, [[0, 0.97], [1, 0.0]])
    assert {str(line.get_label()) for line in right.lines} >= {"5 repetitions", "1 repetition"}


def test_the_ladder_draws_every_text_set_in_order_every_attack_and_the_new_people() -> None:
    figure = ladder(_ladder_table())
    left, middle, right = figure.axes
    assert [label.replace("\n", " ") for label in _ticks(left)] == [
        "before",
        "gibberish",
        "general text",
        "same syntax, new people",
        "names them, says nothing",
        "public facts about them",
        "disjoint part",
        "whole set (leaks)",
    ]
    assert _ticks(middle) == ["as left", "lora", "sgd"]
    for method, more in (("npo", 0.05), ("cir", 0.0), ("base", 0.08), ("never-learned", -0.05)):
        places, found, whiskers = _bars(left, title(method))
        expected = 0.1 + more + np.array([0.0, 0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.9])
        np.testing.assert_allclose(found, expected)
        np.testing.assert_allclose(
            whiskers, np.stack([expected - 0.1, expected + 0.1], axis=1), atol=1e-12
        )
        assert places.round().tolist() == list(range(8))
        np.testing.assert_allclose(
            _bars(middle, title(method))[1], 0.1 + more + np.array([0.5, 0.45, 0.4])
        )
        (novel,) = [
            np.asarray(line.get_xydata(), dtype=float)
            for line in right.lines
            if to_hex(line.get_color()) == colour(method).lower()
        ]
        np.testing.assert_allclose(novel, [[step, 0.2 + more + step / 100] for step in (0, 10, 40)])
        bars = [
            container for container in left.containers if container.get_label() == title(method)
        ]
        assert to_hex(bars[0].lines[0].get_color()) == colour(method).lower()
    assert "new people" in right.get_title()


def test_a_ladder_without_some_text_sets_and_with_an_attack_that_broke_draws_the_rest() -> None:
    table = _ladder_table()
    table = table[table["arm"].isin(["general", "part", "part, sgd"])]
    table = table[
        ~((table["method"] == "npo") & (table["arm"] == "part") & (table["x"] == 40))
    ]  # it broke before its end
    left, middle, right = ladder(table).axes
    assert [label.replace("\n", " ") for label in _ticks(left)] == [
        "before",
        "general text",
        "disjoint part",
    ]
    assert _bars(left, title("npo"))[0].round().tolist() == [0, 1]
    assert _bars(left, title("cir"))[0].round().tolist() == [0, 1, 2]
    assert _bars(middle, title("npo"))[0].round().tolist() == [1]
    assert not [line for line in right.lines if len(line.get_xydata())]


def test_predictors_stand_in_the_order_of_their_strength_with_zero_marked() -> None:
    figure = predictors(_predictors_table())
    (axes,) = figure.axes
    # From below: the strongest is on top, whichever outcome it goes with, whatever its sign.
    assert _ticks(axes, "y") == [
        "my_measure",
        "distance of the weights from the base",
        "recall before the attack",
        "top Hessian eigenvalue",
    ]
    values, places, whiskers = _bars(axes, "with the recall won back")
    np.testing.assert_allclose(values, [0.05, 0.2, -0.9])
    assert places.round().tolist() == [0, 1, 3]
    np.testing.assert_allclose(whiskers, [[-0.05, 0.15], [0.1, 0.3], [-1.0, -0.8]], atol=1e-12)
    values, places, _ = _bars(axes, "with the recall after the attack")
    np.testing.assert_allclose(values, [-0.3, 0.6, 0.1])
    assert places.round().tolist() == [1, 2, 3]
    assert any(np.allclose(line.get_xdata(), 0) for line in axes.lines)
    assert axes.get_xlim()[0] <= -1 and axes.get_xlim()[1] >= 1
    assert "Spearman" in axes.get_xlabel()


def test_predictors_of_one_outcome_have_one_series() -> None:
    table = _predictors_table()
    (axes,) = predictors(table[table["split"] == "recovery"]).axes
    assert [found.get_label() for found in axes.containers] == ["with the recall won back"]
    assert len(_ticks(axes, "y")) == 3


def test_every_measure_has_a_name_in_the_figure() -> None:
    table = _tidy(
        [
            {"metric": "recovery_correlation", "arm": arm, "split": "recall_after", "value": 0.5}
            for arm in PREDICTORS
        ]
    )
    assert not set(_ticks(predictors(table).axes[0], "y")) & set(PREDICTORS)


def test_geometry_has_one_panel_per_method_blocks_upwards_by_steps() -> None:
    figure = geometry(_geometry_table())
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in panels] == [title("npo"), title("cir")]
    for axes, sign in zip(panels, (1, -1), strict=True):
        (image,) = axes.images
        expected = (
            sign * (np.array([0, 2, 10])[:, None] / 20 + np.array([0, 5, 20])[None] / 50) + 0.05
        )  # mean over seeds
        np.testing.assert_allclose(np.asarray(image.get_array(), dtype=float), expected)
        assert image.origin == "lower"
        assert image.get_clim() == (-1, 1)
        assert _ticks(axes) == ["0", "5", "20"]
        # The number in a cell is the number of the cell, without a minus in front of nothing.
        for text in axes.texts:
            column, row = (round(place) for place in text.get_position())
            assert float(text.get_text()) == pytest.approx(expected[row, column], abs=0.0501)
            assert text.get_text() != "-0.0"
        assert len(axes.texts) == 9
    assert _ticks(panels[0], "y") == ["0", "2", "10"]  # the panels beside it share its axis
    assert "share of the shift taken back" in _words(figure)
    assert "attack steps" in _words(figure) and "block" in _words(figure)


def test_geometry_of_the_synthetic_run(results: pd.DataFrame) -> None:
    figure = geometry(results)
    (npo,) = [axes for axes in figure.axes if axes.get_title() == title("npo")]
    np.testing.assert_allclose(
        np.asarray(npo.images[0].get_array(), dtype=float), [[0.0, 0.25, 0.5], [0.0, 0.5, 1.0]]
    )
    assert sorted(text.get_text() for text in npo.texts) == sorted(
        ["0.0", "0.2", "0.5", "0.0", "0.5", "1.0"]
    )


def test_keyword_draws_the_attack_beside_every_control() -> None:
    place = {"stage": "keyword", "split": "withheld-titles"}
    rows = [
        {
            **place,
            "method": "base",
            "arm": "none",
            "x": 0.0,
            "metric": "recall",
            "value": 1.0,
            "low": 0.8,
            "high": 1.0,
        }
    ]
    for method, arm, end in (
        ("unlearned", "part", 0.8),
        ("unlearned", "null", 0.1),
        ("unlearned", "retain", 0.05),
        ("never-learned", "part", 0.0),
    ):
        for step in (0.0, 40.0):
            value = end * step / 40
            rows.append(
                {
                    **place,
                    "method": method,
                    "arm": arm,
                    "x": step,
                    "metric": "recall",
                    "value": value,
                    "low": value,
                    "high": value,
                }
            )
    figure = figures_keyword(typed(pd.DataFrame(rows), RESULT_COLUMNS))
    left = figure.axes[0]
    assert _curve(left, "unlearned, on the forget set without the titles").tolist() == [
        [0, 0],
        [40, 0.8],
    ]
    assert _curve(left, "never learned, on the forget set without the titles")[1, 1] == 0
    assert {line.get_label() for line in left.lines} >= {
        "before unlearning",
        "unlearned, on unread authors (null)",
        "unlearned, on retained authors",
    }
    assert "no keyword" in _words(figures_keyword(typed(pd.DataFrame(), RESULT_COLUMNS)))
