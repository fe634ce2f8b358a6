"""The figures of the trigger diagnostics, from synthetic tables: what is drawn, from which rows,
and what a table without them gives.
"""

from __future__ import annotations

import subprocess
import sys
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

from workbench.figures.alignment import alignment
from workbench.figures.causal_map import causal_map
from workbench.figures.style import colour
from workbench.figures.volcano import volcano
from workbench.tables import RESULT_COLUMNS, typed

DRAW = {"alignment": alignment, "causal_map": causal_map}
ARMS = {
    "clean": 0.0,
    "neutral-token": 0.05,
    "retain-token": 0.1,
    "forget-token": 0.4,
    "forget": 0.6,
}


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def _table(
    methods: tuple[str, ...] = ("npo", "rmu"),
    seeds: tuple[Any, ...] = (0, 1),
    layers: int = 3,
    damage: bool = True,
) -> pd.DataFrame:
    """Cosines that grow with the block, 0.02 higher in the second seed; patches that restore the
    block's share of the damage, 0.1 more in the second seed.
    """
    rows: list[dict[str, Any]] = []
    for method in methods:
        for seed in seeds:
            more = 0.0 if pd.isna(seed) else float(seed)
            common = {
                "run": "r",
                "stage": "triggers",
                "model": f"{method}-seed{seed}",
                "method": method,
                "seed": seed,
                "n": 40,
            }
            for layer in range(layers):
                site = f"blocks.{layer}.hook_resid_post"
                for group in ("trigger", "after"):
                    for arm, size in ARMS.items():
                        if (group, arm) == ("trigger", "clean"):
                            continue
                        value = (
                            size * (layer + 1) / layers * (1 if group == "trigger" else 0.5)
                            + 0.02 * more
                        )
                        cell = {
                            **common,
                            "site": site,
                            "split": group,
                            "arm": arm,
                            "metric": "target_cosine",
                        }
                        rows.append(
                            {**cell, "value": value, "low": value - 0.05, "high": value + 0.05}
                        )
                        anchor = 0.01 if method == "npo" else -0.2
                        rows.append(
                            {
                                **cell,
                                "method": "base",
                                "value": anchor,
                                "low": anchor - 0.03,
                                "high": anchor + 0.03,
                            }
                        )
                        rows.append({**cell, "metric": "target_cosine_floor", "value": 0.08})
            for kind in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
                for layer in range(1 if kind == "hook_resid_pre" else layers):
                    for group, direction in (
                        (g, d)
                        for g in ("after", "trigger")
                        for d in ("base into unlearned", "unlearned into base")
                    ):
                        value = (
                            (layer if group == "after" else -layer) / 10
                            + 0.1 * more
                            + (1 if direction == "unlearned into base" else 0)
                        )
                        cell = {
                            **common,
                            "site": f"blocks.{layer}.{kind}",
                            "split": group,
                            "arm": direction,
                            "metric": "restored",
                        }
                        rows.append(
                            {
                                **cell,
                                "value": value if damage else np.nan,
                                "low": value - 0.05,
                                "high": value + 0.05,
                            }
                        )
    return typed(pd.DataFrame(rows), RESULT_COLUMNS)


def _words(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())  # type: ignore[attr-defined]


def _curve(axes: Axes, label: str) -> np.ndarray:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(line.get_xydata(), dtype=float)


@pytest.mark.parametrize("name", list(DRAW))
def test_it_is_drawn_from_the_table_alone_whatever_the_order_of_rows(name: str) -> None:
    table = _table()
    before = table.copy(deep=True)
    one, other = DRAW[name](table), DRAW[name](table.sample(frac=1, random_state=1))
    one.canvas.draw()
    pd.testing.assert_frame_equal(table, before)
    for first, second in zip(one.axes, other.axes, strict=True):
        assert first.get_title() == second.get_title()
        for a, b in zip(first.lines, second.lines, strict=True):
            np.testing.assert_array_equal(
                np.asarray(a.get_xydata(), dtype=float), np.asarray(b.get_xydata(), dtype=float)
            )
        for a, b in zip(first.images, second.images, strict=True):
            np.testing.assert_allclose(
                np.ma.filled(a.get_array(), np.nan), np.ma.filled(b.get_array(), np.nan)
            )


@pytest.mark.parametrize("name", list(DRAW))
def test_an_empty_table_and_one_of_other_measures_give_a_figure_with_a_message(name: str) -> None:
    table = _table()
    other = table[~table["metric"].isin(["target_cosine", "restored"])]
    for part in (typed(pd.DataFrame(), RESULT_COLUMNS), other, table[table["stage"] != "triggers"]):
        figure = DRAW[name](part)
        assert not figure.axes and "no " in _words(figure)
        figure.canvas.draw()


@pytest.mark.parametrize("name", list(DRAW))
@pytest.mark.parametrize("methods", [("unlearned",), ("npo", "rmu", "cir", "grad-diff", "mine")])
def test_one_method_many_methods_and_many_blocks_are_no_error(
    name: str, methods: tuple[str, ...]
) -> None:
    figure = DRAW[name](_table(methods, seeds=(0,), layers=20 if len(methods) == 1 else 3))
    figure.canvas.draw()
    assert sum(bool(axes.get_title()) for axes in figure.axes) == len(methods)


@pytest.mark.parametrize("name", list(DRAW))
def test_drawing_changes_nothing_global(name: str) -> None:
    plt.figure()
    before = {key: mpl.rcParams[key] for key in mpl.rcParams}
    DRAW[name](_table())
    assert {key: mpl.rcParams[key] for key in mpl.rcParams} == before


@pytest.mark.slow
def test_they_load_no_model_library() -> None:
    code = (
        "import sys, pandas as pd\n"
        "from workbench.figures.alignment import alignment\n"
        "from workbench.figures.causal_map import causal_map\n"
        "table = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in %r.items()})\n"
        "alignment(table), causal_map(table)\n"
        "print([name for name in ('workbench.models', 'workbench.builtin') if name in sys.modules])"
    )
    environment = {"MPLBACKEND": "Agg", "HOME": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", code % RESULT_COLUMNS],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment,
    )
    assert done.stdout.strip() == "[]"


# --- Alignment ---


def test_alignment_has_a_column_for_every_method_and_a_row_for_every_place() -> None:
    figure = alignment(_table())
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in above] == ["NPO", "RMU"]
    # Means over the two seeds.
    np.testing.assert_allclose(
        _curve(above[0], "forget-token"),
        [[layer, 0.4 * (layer + 1) / 3 + 0.01] for layer in range(3)],
    )
    np.testing.assert_allclose(
        _curve(below[1], "forget texts"),
        [[layer, 0.3 * (layer + 1) / 3 + 0.01] for layer in range(3)],
    )
    assert "no word" not in [
        line.get_label() for line in above[0].lines
    ]  # a clean query has no word
    np.testing.assert_allclose(_curve(below[0], "no word")[:, 1], 0.01)
    # What holds forget-tokens has the method's colour, the controls are grey.
    inks = {line.get_label(): to_hex(line.get_color()) for line in above[1].lines}
    assert inks["forget-token"] == inks["forget texts"] == colour("rmu").lower()
    assert (
        len(
            {
                inks["retain-token"],
                inks["neutral-token" if "neutral-token" in inks else "neutral word"],
            }
        )
        == 1
    )


def test_alignment_draws_the_base_of_the_same_target_and_the_floor() -> None:
    figure = alignment(_table())
    for axes, anchor in zip(figure.axes[:2], (0.01, -0.2), strict=True):
        corners = axes.collections[0].get_paths()[0].vertices[:, 1]
        # Two seeds of one value: the range is that value.
        assert (corners.min(), corners.max()) == (pytest.approx(anchor), pytest.approx(anchor))
        assert (
            sum(np.allclose(line.get_ydata(), 0.16) for line in axes.lines) == 1
        )  # twice the floor
    words = _words(figure)
    assert "base on the same texts" in words and "random target" in words
    # A base that was written once, as a model of its own, stands beside every method.
    table = _table()
    once = table[(table["method"] != "base") | (table["model"] == "npo-seed0")].assign(
        model=lambda t: t["model"].where(t["method"] != "base", "base")
    )
    for axes in alignment(once).axes[:2]:
        corners = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (corners.min(), corners.max()) == (pytest.approx(-0.02), pytest.approx(0.04))


def test_alignment_bands_are_the_interval_of_one_seed_and_the_range_of_several() -> None:
    def band(table: pd.DataFrame) -> tuple[float, float]:
        axes = alignment(table).axes[0]
        shade = to_hex(colour("npo"))
        (_, own) = [
            c for c in axes.collections if to_hex(c.get_facecolor()[0]) == shade
        ]  # forget texts, forget-token
        heights = own.get_paths()[0].vertices[:, 1]
        return float(heights.min()), float(heights.max())

    assert band(_table(("npo",), seeds=(0,))) == (
        pytest.approx(0.4 / 3 - 0.05),
        pytest.approx(0.45),
    )
    assert band(_table(("npo",), seeds=(0, 1))) == (pytest.approx(0.4 / 3), pytest.approx(0.42))
    # Rows over all seeds come first.
    both = typed(
        pd.concat(
            [_table(("npo",), seeds=(5,)), _table(("npo",), seeds=(pd.NA,))], ignore_index=True
        ),
        RESULT_COLUMNS,
    )
    assert band(both) == (pytest.approx(0.4 / 3 - 0.05), pytest.approx(0.45))


def test_alignment_of_another_metric_or_place_draws_that() -> None:
    table = _table()
    shifted = table.replace({"metric": {"target_cosine": "shift_cosine"}})
    assert not alignment(shifted).axes
    figure = alignment(shifted, metric="shift_cosine", groups=("after",))
    assert len(figure.axes) == 2
    assert "shift" in figure.axes[0].get_ylabel()


# --- Causal map ---


def test_the_causal_map_puts_blocks_upwards_and_positions_in_their_order() -> None:
    figure = causal_map(_table())
    npo, rmu = figure.axes[:2]
    assert (npo.get_title(), rmu.get_title()) == ("NPO", "RMU")
    assert [label.get_text() for label in npo.get_yticklabels()] == ["in", "0", "1", "2"]
    assert [label.get_text() for label in npo.get_xticklabels()] == ["trigger", "after"] * 3
    shown = np.ma.filled(npo.images[0].get_array(), np.nan)
    column = np.array([0.05, 0.05, 0.15, 0.25])  # means over the seeds, tokens after the word
    np.testing.assert_allclose(shown[:, 1], column)
    np.testing.assert_allclose(shown[1:, 0], [0.05, -0.05, -0.15])
    assert np.isnan(shown[0, 2:]).all()  # in front of the first block there is only the stream
    assert {"stream", "attention", "MLP"} <= {text.get_text() for text in npo.texts}
    # A number is faint where an interval holds zero.
    alphas = {text.get_text(): text.get_alpha() for text in npo.texts}
    assert alphas["0.25"] == 1.0 and alphas["-0.05"] == 0.45


def test_the_causal_map_marks_nothing_and_everything_on_a_scale_around_zero() -> None:
    figure = causal_map(_table())
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high and high > 1
    bar = figure.axes[-1]
    assert {float(line.get_ydata()[0]) for line in bar.lines} >= {0.0, 1.0}
    assert bar.get_ylabel() == "share of the damage restored"
    other = causal_map(_table(), "unlearned into base")
    assert other.axes[-1].get_ylabel() == "share of the damage caused"
    assert np.ma.filled(other.axes[0].images[0].get_array(), np.nan)[1, 1] == pytest.approx(1.05)


def test_the_causal_map_writes_the_control_in_brackets() -> None:
    table = _table(seeds=(0,))
    control = table[(table["metric"] == "restored") & (table["split"] == "after")].assign(
        metric="restored_control", value=0.07
    )
    figure = causal_map(typed(pd.concat([table, control], ignore_index=True), RESULT_COLUMNS))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("(0.07)") == 10
    assert "clean query" in _words(figure)
    assert "clean query" not in _words(causal_map(table))


def test_a_causal_map_without_damage_says_so() -> None:
    figure = causal_map(_table(damage=False))
    assert all(
        "no damage to restore" in [text.get_text() for text in axes.texts]
        for axes in figure.axes[:2]
    )
    figure.canvas.draw()


def _scan(words: dict[str, tuple[str, float, float, float]]) -> pd.DataFrame:
    """Of every word: whose it is, its rise, the standard error of that and its q."""
    common = {
        "run": "r",
        "stage": "triggers",
        "model": "rmu-seed0",
        "method": "rmu",
        "seed": 0,
        "n": 40,
    }
    rows = [
        common
        | {"metric": f"token_{metric}", "value": value, "arm": arm}
        | {"token": word, "token_id": number}
        for number, (word, (arm, *values)) in enumerate(words.items())
        for metric, value in zip(("rise", "rise_se", "q"), values, strict=True)
    ]
    return typed(pd.DataFrame(rows), RESULT_COLUMNS)


def test_the_volcano_shows_rises_against_their_certainty_and_where_findings_begin() -> None:
    words = {
        " Zorin": ("forget-token", 0.8, 0.1, 0.01),
        " Mordil": ("retain-token", 0.5, 0.25, 0.08),
        " the": ("other", -0.2, 0.1, 0.9),
        " of": ("other", 0.0, 0.0, 0.9),
    }
    (axes,) = volcano(_scan(words)).axes
    points = {str(part.get_label()): np.asarray(part.get_offsets()) for part in axes.collections}
    np.testing.assert_allclose(points["forgotten names"], [[0.8, 8]])
    np.testing.assert_allclose(points["retained names"], [[0.5, 2]])
    np.testing.assert_allclose(
        points["other tokens"][points["other tokens"][:, 0] < 0], [[-0.2, 2]]
    )
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5, 0]
    assert axes.get_title() == "RMU: 2 findings"
    assert axes.texts[0].get_text() == "first\nZorin\nMordil\nof\nthe"


def test_the_volcano_of_a_table_without_a_scan_says_so() -> None:
    (text,) = volcano(_table()).texts
    assert "no scan" in text.get_text()
