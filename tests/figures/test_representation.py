"""Figures of the residual stream from synthetic rows: which curve is drawn where, in which colour
and dash, and that half a table is no error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workbench.figures.lens import by_block, lens
from workbench.figures.probes import probes, transfer
from workbench.figures.style import colour
from workbench.tables import RESULT_COLUMNS, Table, join, typed

ALL: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "lens": lens,
    "probes": probes,
    "transfer": transfer,
}
BLOCKS = 4
LEVEL = {"base": 0.2, "never-learned": 0.02, "npo": 0.1, "rmu": 0.15}


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def _results(
    methods: tuple[str, ...] = ("base", "never-learned", "npo", "rmu"),
    seeds: tuple[int, ...] = (0, 1),
) -> pd.DataFrame:
    """Rows whose values say who they are: the level of the method times the block plus one; the
    base's decoder and crossed probes see half; seeds differ by 0.02.
    """
    frames = []
    for method in methods:
        for seed in seeds:
            table = Table(
                {
                    "run": "r",
                    "model": method,
                    "method": method,
                    "seed": seed,
                    "stage": "representation",
                    "split": "forget-heldout",
                }
            )
            for block in range(BLOCKS):
                value, site = (
                    LEVEL[method] * (block + 1) + 0.02 * seed,
                    f"blocks.{block}.hook_resid_post",
                )
                for arm, share in (("own decoder", 1.0), ("base decoder", 0.5)):
                    table.add(
                        "lens_probability",
                        share * value,
                        low=share * value - 0.05,
                        high=share * value + 0.05,
                        n=9,
                        site=site,
                        arm=arm,
                    )
                    table.add("lens_rank", 1 / value, site=site, arm=arm)
                    table.add("lens_foil", 0.01, site=site, arm=arm)
                for arm, level in (
                    ("own", value),
                    ("control", 0.05),
                    ("majority", 0.06),
                    ("ceiling", 0.9),
                ):
                    table.add(
                        "probe_accuracy",
                        level,
                        low=level - 0.05,
                        high=level + 0.05,
                        n=8,
                        site=site,
                        arm=arm,
                    )
                table.add("probe_selectivity", value - 0.05, site=site, arm="own")
                if method != "base":
                    for arm, share in (("base->unlearned", 0.25), ("unlearned->base", 0.5)):
                        table.add("probe_accuracy", share * value, site=site, arm=arm)
            frames.append(table.frame())
    return join(frames, RESULT_COLUMNS)


def _panel(figure: Figure, name: str) -> Axes:
    (axes,) = [axes for axes in figure.axes if axes.get_title() == name]
    return axes


def _line(axes: Axes, label: str) -> Line2D:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


def _words(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())  # type: ignore[attr-defined]


# --- Every figure ---


@pytest.mark.parametrize("name", list(ALL))
def test_every_figure_is_drawn_from_the_table_alone_and_leaves_it_as_it_was(name: str) -> None:
    table = _results(("base", "rmu"))
    before = table.copy(deep=True)
    figure = ALL[name](table)
    figure.canvas.draw()  # constrained layout and logarithmic axes fail only here
    assert any(axes.lines for axes in figure.axes)
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize("name", list(ALL))
def test_an_empty_table_and_another_split_give_a_message(name: str) -> None:
    for table in (
        typed(pd.DataFrame(), RESULT_COLUMNS),
        _results().assign(split="retain-far"),
        _results().assign(stage="unlearn"),
    ):
        figure = ALL[name](typed(table, RESULT_COLUMNS))
        assert not figure.axes
        assert "no " in _words(figure)


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("methods", [("rmu",), ("base",), ("base", "never-learned")])
def test_a_table_without_some_model_is_no_error(name: str, methods: tuple[str, ...]) -> None:
    assert isinstance(ALL[name](_results(methods, seeds=(0,))), Figure)


@pytest.mark.parametrize("name", list(ALL))
def test_empty_values_and_the_order_of_rows_mean_nothing(name: str) -> None:
    table = _results(("base", "npo"))
    sick = table.copy()
    sick.loc[
        (sick["method"] == "npo") & (sick["site"] == "blocks.3.hook_resid_post"),
        ["value", "low", "high"],
    ] = np.nan
    assert isinstance(ALL[name](sick), Figure)

    def curves(frame: pd.DataFrame) -> list[list[list[float]]]:
        return [
            sorted(
                np.asarray(line.get_xydata(), dtype=float).round(9).ravel().tolist()
                for line in axes.lines
            )
            for axes in ALL[name](frame).axes
        ]

    assert curves(table.sample(frac=1, random_state=1)) == curves(table)


@pytest.mark.parametrize("name", list(ALL))
def test_drawing_changes_nothing_global(name: str) -> None:
    plt.figure()
    before = {key: mpl.rcParams[key] for key in mpl.rcParams}
    ALL[name](_results())
    assert {key: mpl.rcParams[key] for key in mpl.rcParams} == before
    assert len(plt.get_fignums()) == 1


# --- Curves over blocks ---


def test_a_curve_is_the_mean_over_seeds_with_the_range_of_the_seeds_and_one_seed_has_its_own_interval() -> (  # noqa: E501
    None
):
    table = _results(("npo",))
    rows = table[(table["metric"] == "lens_probability") & (table["arm"] == "own decoder")]
    several = by_block(rows)
    assert several["value"].tolist() == pytest.approx([0.11, 0.21, 0.31, 0.41])
    assert several["low"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert several["high"].tolist() == pytest.approx([0.12, 0.22, 0.32, 0.42])
    one = by_block(rows[rows["seed"] == 0])
    assert one["low"].tolist() == pytest.approx([0.05, 0.15, 0.25, 0.35])
    assert one["high"].tolist() == pytest.approx([0.15, 0.25, 0.35, 0.45])
    # Blocks come in the order of their numbers, not of their names.
    many = pd.concat(
        [rows.assign(site=f"blocks.{block}.hook_resid_post").iloc[:1] for block in (10, 2, 0)]
    )
    assert by_block(many).index.tolist() == [0, 2, 10]


def test_the_lens_has_a_panel_per_method_with_both_decoders_and_both_anchors() -> None:
    figure = lens(_results())
    assert [axes.get_title() for axes in figure.axes] == ["NPO", "RMU"]
    panel = _panel(figure, "RMU")
    own, base = _line(panel, "own decoder"), _line(panel, "the base's decoder")
    assert np.asarray(own.get_ydata(), dtype=float) == pytest.approx([0.16, 0.31, 0.46, 0.61])
    assert np.asarray(base.get_ydata(), dtype=float) == pytest.approx([0.08, 0.155, 0.23, 0.305])
    assert to_hex(own.get_color()) == to_hex(base.get_color()) == colour("rmu").lower()
    assert own.get_linestyle() != base.get_linestyle()
    for method, name in (
        ("base", "base, own decoder"),
        ("never-learned", "never learned, own decoder"),
    ):
        anchor = _line(panel, name)
        assert to_hex(anchor.get_color()) == colour(method).lower()
        assert np.asarray(anchor.get_ydata(), dtype=float)[-1] == pytest.approx(
            4 * LEVEL[method] + 0.01
        )
    assert np.asarray(
        _line(panel, "other answers of the same kind").get_ydata(), dtype=float
    ) == pytest.approx([0.01] * 4)
    assert "rank" in _words(lens(_results(), "lens_rank"))


def test_probes_show_the_control_the_most_frequent_label_and_the_base_in_every_panel() -> None:
    figure = probes(_results())
    assert [axes.get_title() for axes in figure.axes] == ["never learned", "NPO", "RMU"]
    panel = _panel(figure, "NPO")
    expected = {
        "own probe": 0.41,
        "control task": 0.05,
        "most frequent label": 0.06,
        "base, own probe": 0.81,
        "ceiling (labels seen in training)": 0.9,
    }
    for label, last in expected.items():
        assert np.asarray(_line(panel, label).get_ydata(), dtype=float)[-1] == pytest.approx(
            last
        ), label


def test_transfer_tells_by_colour_who_trained_and_by_dash_who_is_read() -> None:
    panel = _panel(transfer(_results()), "RMU")
    lines = {
        label: _line(panel, label)
        for label in (
            "base's probe on the base",
            "base's probe on this model",
            "own probe on this model",
            "own probe on the base",
        )
    }
    assert [to_hex(line.get_color()) for line in lines.values()] == [colour("base")] * 2 + [
        colour("rmu").lower()
    ] * 2
    assert [line.get_linestyle() for line in lines.values()] == ["-", "--", "-", "--"]
    last = [float(np.asarray(line.get_ydata(), dtype=float)[-1]) for line in lines.values()]
    assert last == pytest.approx([0.81, 0.25 * 0.61, 0.61, 0.5 * 0.61])
