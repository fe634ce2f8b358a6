"""The figures of the worst-case drop and of loss planes, from synthetic tables: what is drawn, and
from which rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.figures.drop import drop
from workbench.figures.plane import plane
from workbench.tables import RESULT_COLUMNS, Table, join


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def _model(method: str, seed: int, height: float = 1.0) -> Table:
    table = Table(
        {
            "run": "r",
            "model": f"{method}-{seed}",
            "method": method,
            "seed": seed,
            "stage": "sharpness",
        }
    )
    for rho in (0.0, 0.5, 1.0):
        for split, factor in (
            ("forget-attacked", 4.0),
            ("forget-heldout", 2.0),
            ("retain-neighbour", -50.0),
            ("elsewhere", 9.0),
        ):
            table.add(
                "drop", factor * rho * height + seed * rho, arm="drop", split=split, radius=rho
            )
        table.add("drop", 3 * rho, arm="drop, adaptive", split="forget-attacked", radius=rho)
    for y in (-1.0, 0.0, 1.0):
        for x in (-0.5, 0.0, 0.5, 1.0):
            broken = x == 1.0 and y == 1.0
            table.add(
                "plane_loss",
                np.nan if broken else height * (3 - x - y) + seed,
                split="forget-heldout",
                along_attack=x,
                towards_base=y,
            )
    for step, along, towards, off in ((2, 0.25, 0.125, 0.0), (10, 0.5, 0.25, 0.125)):
        place = {"arm": "attack path", "attack_step": step}
        table.add("plane_along", along, **place)
        table.add("plane_towards", towards, **place)
        table.add("plane_off", off, **place)
    return table


def _table(*models: Table) -> pd.DataFrame:
    return join([model.frame() for model in models], RESULT_COLUMNS)


def _panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_title()]


def _words(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())  # type: ignore[attr-defined]


def test_a_bold_line_is_the_mean_over_seeds_and_thin_ones_are_the_seeds() -> None:
    figure = drop(_table(_model("npo", 0), _model("npo", 1), _model("rmu", 0)))
    first, second = _panels(figure)
    assert [axes.get_title() for axes in (first, second)] == ["NPO", "RMU"]
    bold = {
        line.get_label(): np.asarray(line.get_ydata(), dtype=float)
        for line in first.lines
        if line.get_linewidth() == 1.6
    }
    np.testing.assert_allclose(bold["forget answers that the attack follows"], [0, 2.25, 4.5])
    np.testing.assert_allclose(bold["held-out forget answers, same step"], [0, 1.25, 2.5])
    assert len(bold) == 3  # an unknown set is not drawn
    assert sum(line.get_linewidth() == 0.6 for line in first.lines) == 6
    dashes = {line.get_label(): line.get_linestyle() for line in first.lines}
    assert dashes["forget answers that the attack follows"] == "-"
    assert dashes["held-out forget answers, same step"] == "--"
    # A control that falls far does not flatten what the figure is about.
    assert first.get_ylim() == pytest.approx((-2.5, 5.25))
    assert first.get_ylim() == second.get_ylim()


def test_another_kind_of_ball_is_another_figure_with_its_own_axis() -> None:
    figure = drop(_table(_model("npo", 0)), "drop, adaptive")
    assert "relative to every weight" in _words(figure)
    (axes,) = _panels(figure)
    bold = next(line for line in axes.lines if line.get_linewidth() == 1.6)
    np.testing.assert_allclose(np.asarray(bold.get_ydata(), dtype=float), [0, 1.5, 3.0])
    assert "no worst-case rise" in _words(drop(_table(_model("npo", 0)), "rise"))


def test_all_planes_share_levels_and_show_points_with_their_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    surfaces: list[tuple[np.ndarray, np.ndarray, np.ma.MaskedArray, np.ndarray]] = []
    original = Axes.contourf

    def record(
        axes: Axes,
        x: np.ndarray,
        y: np.ndarray,
        heights: np.ma.MaskedArray,
        *,
        levels: np.ndarray,
        cmap: str,
    ) -> object:
        surfaces.append((x, y, heights, levels))
        return original(axes, x, y, heights, levels=levels, cmap=cmap)

    monkeypatch.setattr(Axes, "contourf", record)
    figure = plane(_table(_model("npo", 3), _model("npo", 0), _model("rmu", 0, height=4.0)))
    assert [axes.get_title() for axes in _panels(figure)] == ["NPO", "RMU"]
    (x, y, heights, levels), (_, _, higher, others) = surfaces
    np.testing.assert_array_equal(levels, others)
    # The lowest seed's surface alone (seed 3 is higher by 3), y from bottom to top, and the point
    # without a finite value as a hole.
    np.testing.assert_array_equal(x, [-0.5, 0, 0.5, 1])
    np.testing.assert_array_equal(y, [-1, 0, 1])
    expected = 3 - x[None, :] - y[:, None]
    assert heights.mask.tolist() == [[False] * 4, [False] * 4, [False, False, False, True]]
    np.testing.assert_allclose(heights.compressed(), expected.flatten()[:-1])
    np.testing.assert_allclose(higher.compressed(), 4 * expected.flatten()[:-1])
    # Heights of 1.5 to 4.5 and 6 to 18: the scale holds both.
    assert levels[0] <= 1.5
    assert levels[-1] >= 18
    assert "step 10 (0.12 off) | base" in _words(figure)
    assert "nats per token" in _words(figure)


def test_a_table_without_these_probes_says_so() -> None:
    table = _table(_model("npo", 0))
    empty = table[table["metric"] == "nothing"]
    assert "no worst-case drop" in _words(drop(empty))
    assert "no plane" in _words(plane(empty))
    assert "no plane of the loss of retain" in _words(plane(table, "retain"))
    nowhere = table.assign(value=np.nan)
    assert "no plane" in _words(plane(nowhere))
    assert "no worst-case drop" in _words(drop(nowhere))
