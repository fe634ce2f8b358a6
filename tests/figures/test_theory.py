"""The figure of the trigger theory, from a synthetic table: what is drawn, for which methods, and
from which rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from workbench.figures.style import colour
from workbench.figures.trigger_theory import trigger_theory
from workbench.tables import RESULT_COLUMNS, Table, join


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def _model(
    method: str, seed: int, *, coefficients: bool = False, site: str = "blocks.1.hook_resid_post"
) -> Table:
    table = Table(
        {
            "run": "r",
            "model": f"{method}-{seed}",
            "method": method,
            "seed": seed,
            "stage": "triggers",
            "split": "retain",
        }
    )
    for arm, factor in (("forget-token", 1.0), ("retain-token", 0.5), ("clean", 9.0)):
        place: dict[str, Any] = {"arm": arm, "site": site}
        table.add("recall", 0.5, arm=arm)  # another check of the same stage
        for metric, value in (
            ("kurtosis_mean", 1.5),
            ("mean_share", -0.0001),
            ("query_share", 0.25),
            ("participation_ratio", 7.0),
            ("eta_slope", 1.75),
        ):
            table.add(f"theory_{metric}", value + seed * (metric == "participation_ratio"), **place)
        table.add("theory_participation_ratio_expected", 16.0, **place)
        for step in (-1.0, 0.0, 1.0):
            table.add(
                "theory_histogram",
                0.0 if step == 1 else factor * (0.2 + 0.1 * seed),
                coordinate=step,
                **place,
            )
        for step in (1.0, 2.0, 3.0):
            table.add(
                "theory_spectrum", factor * (0.5 + 0.1 * seed) / step, component=step, **place
            )
            table.add("theory_spectrum_expected", 0.3, low=0.2, high=0.4, component=step, **place)
        for step in (0.1, 1.0, 10.0):
            table.add(
                "theory_rejection", 0.1 + 0.2 * seed, low=0.05, high=0.15, noise=step, **place
            )
        for step in (1.0, 4.0) if coefficients else ():
            table.add(
                "theory_eta_of_coefficient",
                factor * step**2,
                low=factor * step**2 / 2,
                high=factor * step**2 * 2,
                coefficient=step,
                **place,
            )
    return table


def _table(*models: Table) -> pd.DataFrame:
    return join([model.frame() for model in models], RESULT_COLUMNS)


def _words(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())  # type: ignore[attr-defined]


def _line(axes: Axes, shade: str, style: str = "-") -> np.ndarray:
    (line,) = [
        one
        for one in axes.lines
        if to_hex(one.get_color()) == to_hex(shade)
        and one.get_linestyle() == style
        and len(one.get_xdata()) > 1
    ]
    return np.asarray(line.get_xydata(), dtype=float)


def test_every_method_has_a_row_and_every_measured_kind_a_column() -> None:
    table = _table(_model("rmu", 0, coefficients=True), _model("base", 0))
    before = table.copy(deep=True)
    figure = trigger_theory(table)
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["base", "RMU"]
    assert len(figure.axes) == 8
    assert (
        _words(figure).count("not measured") == 1
    )  # the coefficient was varied for one method alone
    assert "clean" not in _words(figure)
    assert table.equals(before)
    assert plt.get_fignums() == []


def test_without_a_coefficient_there_is_no_column_for_it() -> None:
    figure = trigger_theory(_table(_model("rmu", 0)))
    assert len(figure.axes) == 3
    assert "steering coefficient" not in _words(figure)


def test_curves_are_those_of_the_arm_with_the_control_dotted_beside_them() -> None:
    histogram, spectrum, variance, rejection = trigger_theory(
        _table(_model("rmu", 0, coefficients=True))
    ).axes
    shade = colour("rmu")
    curve = _line(histogram, shade)
    assert curve[:, 0].tolist() == [-1, 0, 1]
    assert curve[:2, 1] == pytest.approx([0.2, 0.2])
    assert np.isnan(curve[2, 1])  # nothing has no logarithm
    assert _line(histogram, "0.4", ":")[0, 1] == pytest.approx(0.1)
    assert _line(spectrum, shade)[:, 1] == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert _line(spectrum, "0.4", ":")[:, 1] == pytest.approx([0.25, 0.125, 0.25 / 3])
    assert _line(spectrum, "black", "--")[:, 1] == pytest.approx([0.3] * 3)
    (band,) = spectrum.collections
    assert (
        band.get_paths()[0].vertices[:, 1].min(),
        band.get_paths()[0].vertices[:, 1].max(),
    ) == pytest.approx((0.2, 0.4))
    assert _line(variance, shade)[:, 1] == pytest.approx([1, 16])
    (bars,) = [one for one in variance.containers if hasattr(one, "has_yerr")]
    assert sorted(path.vertices[:, 1].tolist() for path in bars[2][0].get_paths()) == [
        pytest.approx([0.5, 2]),
        pytest.approx([8, 32]),
    ]
    closed = _line(rejection, "black", "--")
    assert closed[:, 1] == pytest.approx(np.arctan(closed[:, 0]) / np.pi)


def test_several_seeds_are_a_mean_with_their_range() -> None:
    figure = trigger_theory(_table(_model("rmu", 0), _model("rmu", 1)))
    assert _line(figure.axes[1], colour("rmu"))[:, 1] == pytest.approx([0.55, 0.275, 0.55 / 3])
    rejection = figure.axes[2]
    assert _line(rejection, colour("rmu"))[:, 1] == pytest.approx([0.2] * 3)
    (bars,) = [one for one in rejection.containers if hasattr(one, "has_yerr")]
    assert bars[2][0].get_paths()[0].vertices[:, 1] == pytest.approx(
        [0.1, 0.3]
    )  # the seeds, not the queries


def test_the_numbers_are_written_beside_the_curves() -> None:
    words = _words(
        trigger_theory(
            _table(_model("rmu", 0, coefficients=True), _model("rmu", 1, coefficients=True))
        )
    )
    for part in (
        "excess kurtosis 1.5",
        "squared mean 0.0% of mean square",
        "between queries 25.0%",
        "participation ratio 7.5",
        "(assumed 16)",
        "slope 1.75",
    ):
        assert part in words
    assert "-0.0%" not in words


def test_site_and_arm_can_be_chosen() -> None:
    table = _table(_model("rmu", 0), _model("npo", 0, site="blocks.3.hook_resid_post"))
    assert [axes.get_ylabel() for axes in trigger_theory(table).axes[::3]] == ["RMU"]
    assert [
        axes.get_ylabel()
        for axes in trigger_theory(table, site="blocks.3.hook_resid_post").axes[::3]
    ] == ["NPO"]
    control = trigger_theory(table, arm="retain-token")
    assert _line(control.axes[0], colour("rmu"))[0, 1] == pytest.approx(0.1)
    assert _words(control).count("behind a retain-token") == 1


def test_a_table_without_the_check_says_so() -> None:
    for table in (_table(), _table(_model("rmu", 0))[lambda frame: frame["metric"] == "recall"]):
        assert "no check of the trigger theory" in _words(trigger_theory(table))
    assert "no check of the trigger theory" in _words(
        trigger_theory(_table(_model("rmu", 0)), arm="neutral-token")
    )
