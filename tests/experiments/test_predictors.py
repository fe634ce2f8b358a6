"""What was measured before the attack beside what it won back: points by hand, planted
correlations, pooled runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import spearman
from workbench.experiments.predictors import (
    LANDSCAPE,
    PREDICTORS,
    Predictors,
    correlate,
    points_of,
    predictor_table,
    predictors,
)
from workbench.runs.folder import CONFIG, ITEMS, VALUES
from workbench.runs.pipeline import Run
from workbench.tables import ITEM_COLUMNS, RESULT_COLUMNS, join, typed, write_parquet, write_tables

pytestmark = pytest.mark.slow

Tables = Callable[..., tuple[pd.DataFrame, pd.DataFrame]]
METHODS = ("grad-diff", "npo", "rmu", "cir")


def _points(recovery: Sequence[float], **measures: Sequence[float]) -> pd.DataFrame:
    """Models of four methods in turn; what is not given was not measured."""
    count = len(recovery)
    frame = pd.DataFrame(
        {
            "run": "r",
            "method": [METHODS[number % 4] for number in range(count)],
            "seed": [number // 4 for number in range(count)],
        }
    )
    for name in PREDICTORS:
        frame[name] = np.asarray(measures.get(name, [np.nan] * count), dtype=float)
    return frame.assign(
        recovery=np.asarray(recovery, dtype=float),
        recall_after=np.asarray(measures.get("recall_after", recovery), dtype=float),
    )


def _found(points: pd.DataFrame, outcome: str = "recovery") -> pd.DataFrame:
    rows = correlate(points).results
    return rows[(rows["split"] == outcome) & (rows["metric"] == "recovery_correlation")].set_index(
        "arm"
    )


# --- Points ---------------------------------------------------------------------------------------


def test_points_of_the_synthetic_run_are_those_of_a_hand(make_tables: Tables) -> None:
    points = points_of(*make_tables(), run="synthetic")
    assert points[["run", "method", "seed"]].to_numpy().tolist() == [
        ["synthetic", name, seed] for name in ("cir", "npo") for seed in (0, 1)
    ]
    assert list(points.columns) == [
        "run",
        "method",
        "seed",
        *PREDICTORS,
        "recall_after",
        "recovery",
    ]
    for row in points.itertuples():
        assert row.displacement == 2.0 + row.seed
        assert row.top_eigenvalue == 40.0 + 10 * row.seed
        assert (row.bottom_eigenvalue, row.gradient_norm) == (-3.0, 0.5)
        assert row.descent_drop == 0.0  # the loss rises on both sides
        assert row.energy_in_common == pytest.approx(
            (0.4 + 0.41 + 0.16 + 0.17) / 4
        )  # rank 8, two sides, two blocks
        assert row.disruption_general == 0.03  # not the budget's own rows, which have no split
        assert (row.recall_before, row.recall_after) == (
            (0.25, 0.75) if row.method == "npo" else (0.125, 0.125)
        )
        assert row.recovery == row.recall_after - row.recall_before
    # No shift was measured in this run.
    assert points[["shift_forget", "shift_retain", "shift_late", "cka_forget"]].isna().all().all()


def _with(results: pd.DataFrame, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return join([results, typed(pd.DataFrame(list(rows)), RESULT_COLUMNS)], RESULT_COLUMNS)


def test_shifts_are_means_over_blocks_and_the_late_one_is_the_last_block_s(
    make_tables: Tables,
) -> None:
    results, items = make_tables()
    shared = {"run": "r", "stage": "unlearn", "method": "npo", "seed": 1}
    rows = [
        {
            **shared,
            "site": f"blocks.{layer}.hook_resid_post",
            "split": split,
            "metric": metric,
            "value": value + 0.1 * layer,
        }
        for layer in (0, 1, 10)  # as numbers, not as words: 10 is the last
        for split, metric, value in (
            ("forget-heldout", "relative_shift", 0.2),
            ("retain-neighbour", "relative_shift", 0.4),
            ("retain-far", "relative_shift", 5.0),
            ("forget-heldout", "cka", 0.0),
            ("retain-neighbour", "cka", 7.0),
        )
    ]
    points = points_of(_with(results, rows), items).set_index(["method", "seed"])
    npo = points.loc[("npo", 1)]
    middle = 0.1 * 11 / 3
    assert npo["shift_forget"] == pytest.approx(0.2 + middle)
    assert npo["shift_retain"] == pytest.approx(0.4 + middle)
    assert npo["shift_late"] == pytest.approx(0.2 + 1.0)
    assert npo["cka_forget"] == pytest.approx(1 - middle)
    assert (
        points.drop(index=("npo", 1))[["shift_forget", "shift_late", "cka_forget"]]
        .isna()
        .all()
        .all()
    )


@pytest.mark.parametrize("positions", [5, 17, 23, 39])
def test_the_drop_along_the_attackers_gradient_starts_at_the_model_and_ends_at_the_lowest_point_ahead(  # noqa: E501
    positions: int, make_tables: Tables
) -> None:
    results, items = make_tables()
    results = results[~((results["metric"] == "slice_loss") & (results["arm"] == "descent"))]
    steps = np.linspace(
        -0.05, 0.05, positions
    )  # as the stage walks: the middle is the model, up to rounding
    shared = {
        "run": "r",
        "stage": "sharpness",
        "method": "npo",
        "seed": 0,
        "metric": "slice_loss",
        "arm": "descent",
    }
    losses = 3.0 - 40 * steps  # behind the model the loss is higher; it falls ahead
    losses[-1] = 4.0  # ... and rises at the very end
    rows = [
        {**shared, "split": "forget-heldout", "x": step, "value": loss}
        for step, loss in zip(steps, losses, strict=True)
    ]
    rows += [
        {**shared, "split": "forget-attacked", "x": step, "value": 9 * loss}
        for step, loss in zip(steps, losses, strict=True)
    ]
    rows += [
        {**shared, "arm": "random", "split": "forget-heldout", "x": step, "value": -loss}
        for step, loss in zip(steps, losses, strict=True)
    ]
    mixed = _with(results, rows).sample(frac=1, random_state=0)
    point = points_of(mixed, items).set_index(["method", "seed"]).loc[("npo", 0)]
    assert point["descent_drop"] == pytest.approx(40 * steps[-2])


def test_controls_and_models_without_an_attack_are_no_points(make_tables: Tables) -> None:
    results, items = make_tables(methods=("npo", "cir", "rmu"))
    assert set(points_of(results, items)["method"]) == {"npo", "cir", "rmu"}
    # A model with one measurement has no recovery; the null arm, other sets and other stages are
    # none.
    cut = items[~((items["method"] == "rmu") & (items["stage"] == "relearn") & (items["x"] > 0))]
    assert set(points_of(results, cut)["method"]) == {"npo", "cir"}
    nulls = items[~((items["method"] == "rmu") & (items["arm"] == "attack"))]
    assert set(points_of(results, nulls)["method"]) == {"npo", "cir"}
    assert len(points_of(results, items[items["stage"] != "relearn"])) == 0


def test_recovery_is_the_recall_at_the_end_minus_that_at_the_start_over_facts(
    make_tables: Tables,
) -> None:
    results, items = make_tables()
    mixed = items.sample(frac=1, random_state=5)
    pd.testing.assert_frame_equal(
        points_of(results.sample(frac=1, random_state=6), mixed), points_of(results, items)
    )
    for row in points_of(results, items).itertuples():
        mine = items[
            (items["stage"] == "relearn")
            & (items["arm"] == "attack")
            & (items["method"] == row.method)
            & (items["seed"] == row.seed)
        ]
        assert row.recall_before == mine[mine["x"] == 0]["correct"].mean()
        assert row.recall_after == mine[mine["x"] == 20]["correct"].mean()


@pytest.mark.slow
def test_points_of_a_finished_run_have_every_measure(quick_run: Run) -> None:
    results, items = quick_run.results, quick_run.items
    points = points_of(results, items, run="quick")
    assert points[["method", "seed"]].to_numpy().tolist() == [
        [name, seed] for name in ("cir", "npo") for seed in (0, 1)
    ]
    measured = [
        name
        for name in PREDICTORS
        if name not in ("top_eigenvalue", "bottom_eigenvalue", *LANDSCAPE)
    ]  # these may not converge, or take another command
    assert np.isfinite(points[measured].to_numpy(dtype=float)).all()
    assert (points["shift_forget"] > 0).all() and (points["displacement"] > 0).all()
    assert points["cka_forget"].between(0, 1.2).all()
    row = points[(points["method"] == "npo") & (points["seed"] == 1)].iloc[0]
    mine = results[(results["method"] == "npo") & (results["seed"] == 1)]
    shifts = mine[
        (mine["metric"] == "relative_shift") & (mine["split"] == "forget-heldout")
    ].set_index("site")["value"]
    assert sorted(shifts.index) == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    assert row["shift_forget"] == pytest.approx(shifts.mean())
    assert row["shift_late"] == shifts["blocks.2.hook_resid_post"]
    energy = mine[(mine["metric"] == "energy_in_retain_subspace") & (mine["x"] == 8)]["value"]
    assert len(energy) == 6 and row["energy_in_common"] == pytest.approx(energy.mean())
    general = mine[
        (mine["metric"] == "disruption") & (mine["split"] == "general") & (mine["arm"] == "kl")
    ]["value"]
    assert len(general) == 1 and row["disruption_general"] == general.iloc[0]
    slope = mine[
        (mine["metric"] == "slice_loss")
        & (mine["arm"] == "descent")
        & (mine["split"] == "forget-heldout")
    ].set_index("x")["value"]
    assert row["descent_drop"] == pytest.approx(slope[0.0] - slope[slope.index >= 0].min())
    recall = mine[
        (mine["stage"] == "relearn") & (mine["metric"] == "recall") & (mine["arm"] == "attack")
    ].set_index("x")["value"]
    assert (row["recall_before"], row["recall_after"]) == (
        pytest.approx(recall[0.0]),
        pytest.approx(recall[20.0]),
    )


# --- Correlations ---------------------------------------------------------------------------------


def test_a_planted_order_is_found_with_its_sign() -> None:
    recovery = np.array([0.0, 0.05, 0.1, 0.2, 0.25, 0.4, 0.5, 0.9])
    rows = _found(
        _points(
            recovery,
            displacement=np.exp(recovery),
            top_eigenvalue=-(recovery**3),
            recall_after=recovery[::-1],
        )
    )
    assert rows["value"].to_dict() == {
        "displacement": pytest.approx(1.0),
        "top_eigenvalue": pytest.approx(-1.0),
    }
    assert rows["low"].to_dict() == {
        "displacement": pytest.approx(1.0),
        "top_eigenvalue": pytest.approx(-1.0),
    }
    assert rows["high"].to_dict() == {
        "displacement": pytest.approx(1.0),
        "top_eigenvalue": pytest.approx(-1.0),
    }
    assert (rows["n"] == 8).all()
    after = _found(
        _points(
            recovery,
            displacement=np.exp(recovery),
            top_eigenvalue=-(recovery**3),
            recall_after=recovery[::-1],
        ),
        "recall_after",
    )
    assert after["value"].to_dict() == {
        "displacement": pytest.approx(-1.0),
        "top_eigenvalue": pytest.approx(1.0),
    }


def test_an_imperfect_order_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    recovery, measure = rng.random(12), rng.random(12)
    found = _found(_points(recovery, gradient_norm=measure)).loc["gradient_norm"]
    assert found["value"] == pytest.approx(spearmanr(measure, recovery).statistic)
    assert found["low"] <= found["value"] <= found["high"]


def test_whole_methods_are_resampled() -> None:
    # Two methods: within each the measure says the opposite of what it says between them. A draw of
    # one method twice (every second draw) sees only the inside.
    points = _points([0.3, 0.2, 0.1, 0.9, 0.8, 0.7], displacement=[1, 2, 3, 11, 12, 13]).assign(
        method=["npo"] * 3 + ["rmu"] * 3
    )
    found = _found(points).loc["displacement"]
    assert found["low"] == pytest.approx(-1.0)
    assert found["high"] == pytest.approx(found["value"])
    assert found["value"] == pytest.approx(
        spearmanr(points["displacement"], points["recovery"]).statistic
    )
    rng = np.random.default_rng(1)
    points = _points(rng.random(16), displacement=rng.random(16))
    by_method = spearman(
        points["displacement"].to_numpy(),
        points["recovery"].round(9).to_numpy(),
        groups=points["method"].to_numpy(),
    )
    alone = spearman(points["displacement"].to_numpy(), points["recovery"].round(9).to_numpy())
    found = _found(points).loc["displacement"]
    assert (found["value"], found["low"], found["high"]) == (
        by_method.value,
        by_method.low,
        by_method.high,
    )
    assert (alone.low, alone.high) != (by_method.low, by_method.high)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_models_are_an_error(count: int) -> None:
    points = _points(np.linspace(0, 1, count), displacement=np.arange(count))
    with pytest.raises(
        WorkbenchError, match=rf"at least 6 unlearned models; there are {count}\b"
    ) as caught:
        correlate(points)
    assert "\n" not in str(caught.value)
    assert len(_found(_points(np.linspace(0, 1, 6), displacement=np.arange(6)))) == 1


def test_measures_that_are_the_same_for_all_or_that_too_few_have_are_left_out() -> None:
    recovery = np.linspace(0, 1, 8)
    nan = np.nan
    points = _points(
        recovery,
        displacement=[2.0] * 8,
        top_eigenvalue=[nan] * 8,
        bottom_eigenvalue=[nan, nan, nan, 1, 2, 3, 4, 5],
        gradient_norm=[nan, nan, 1, 2, 3, 4, 5, 6],
        descent_drop=[np.inf, 1, 2, 3, 4, 5, 6, 7],
        shift_forget=[nan, nan, 3, 3, 3, 3, 3, 3],
    )
    rows = _found(points)
    assert rows.index.tolist() == ["gradient_norm", "descent_drop"]
    assert rows["n"].tolist() == [6, 7]
    assert rows["value"].tolist() == pytest.approx([1.0, 1.0])


def test_recall_before_is_not_held_against_the_recall_won_back_of_which_it_is_a_part() -> None:
    before = np.linspace(0.1, 0.5, 8)
    points = _points(0.9 - before, recall_before=before, recall_after=before**2)
    rows = correlate(points).results
    rows = rows[rows["metric"] == "recovery_correlation"]
    assert rows[["arm", "split", "value"]].to_numpy().tolist() == [
        ["recall_before", "recall_after", pytest.approx(1.0)]
    ]


def test_where_all_models_win_back_the_same_there_is_nothing_to_predict() -> None:
    points = _points([0.25] * 8, displacement=np.arange(8.0), recall_after=np.linspace(0, 1, 8))
    assert correlate(points).results["split"].unique().tolist() == ["recall_after"]


def test_recoveries_that_are_the_same_but_for_rounding_predict_nothing_either() -> None:
    # 0.4 - 0.0, 0.5 - 0.1 and 0.7 - 0.3 differ in their last bit and are the same.
    won = np.array([0.4 - 0.0, 0.5 - 0.1, 0.7 - 0.3] * 3)
    assert len(set(won)) > 1
    assert correlate(
        _points(won, displacement=np.arange(9.0), recall_after=np.linspace(0, 1, 9))
    ).results["split"].unique().tolist() == ["recall_after"]


def test_equal_recoveries_are_ties_however_they_round() -> None:
    won = np.array([0.4 - 0.0, 0.5 - 0.1, 0.7 - 0.3] * 2 + [0.9, 0.0])
    measure = np.arange(8.0)
    exact = spearmanr(measure, [0.4] * 6 + [0.9, 0.0]).statistic
    assert _found(_points(won, displacement=measure)).loc["displacement", "value"] == pytest.approx(
        exact
    )


def test_the_rows_are_a_tidy_table(make_tables: Tables) -> None:
    results, items = make_tables(methods=("npo", "cir", "rmu"))
    found = correlate(points_of(results, items))
    assert isinstance(found, Predictors)
    assert {name: str(kind) for name, kind in found.results.dtypes.items()} == RESULT_COLUMNS
    assert set(found.results["metric"]) == {
        "recovery_correlation",
        "recovery_within_seed",
        "recovery_partial",
    }
    assert set(found.results["arm"]) <= set(PREDICTORS)
    assert set(found.results["split"]) == {"recovery", "recall_after"}
    assert found.results["seed"].isna().all()
    assert found.results[["value", "low", "high"]].abs().max().max() <= 1
    # Displacement and curvature differ between the seeds, recall before between the methods; all
    # else is the same for all.
    assert set(found.results[found.results["split"] == "recovery"]["arm"]) == {
        "displacement",
        "top_eigenvalue",
    }
    assert "6 models" in repr(found)
    assert PREDICTORS["displacement"] in found._repr_html_()


@pytest.mark.full
def test_variants_of_few_methods_are_resampled_by_family_as_well() -> None:
    rng = np.random.default_rng(0)
    names = ["npo", "npo-sam", "npo-rna-wa", "rmu", "rmu-sam", "cir", "cir-uncollapsed"]
    count = 3 * len(names)
    measure, recall, won = (
        rng.standard_normal(count),
        rng.uniform(size=count),
        rng.standard_normal(count),
    )
    points = _points(
        won, displacement=measure, recall_before=recall, recall_after=rng.uniform(size=count)
    ).assign(method=names * 3)
    families = np.array(["npo", "npo", "npo", "rmu", "rmu", "cir", "cir-uncollapsed"] * 3)
    found = correlate(points).results
    rows = found[(found["arm"] == "displacement") & (found["split"] == "recovery")].set_index(
        "metric"
    )
    expected = {
        "recovery_correlation_families": spearman(measure, won, groups=families),
        "recovery_partial_families": spearman(measure, won, groups=families, given=recall[:, None]),
    }
    for metric, estimate in expected.items():
        assert rows.loc[metric, ["value", "low", "high"]].tolist() == pytest.approx(
            [estimate.value, estimate.low, estimate.high]
        )
    assert "the same, families resampled" in predictor_table(
        found
    ) and "held fixed, families resampled" in predictor_table(found)
    two = correlate(points[points["method"].isin(["npo", "npo-sam", "rmu"])]).results
    assert (
        not two["metric"].str.endswith("families").any()
    )  # of two families no interval can be made


# --- Several runs ---------------------------------------------------------------------------------


def _stored(tables: tuple[pd.DataFrame, pd.DataFrame], folder: Path) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text("budget: 0.05\n", encoding="utf-8")
    write_tables(tables[0], folder)
    write_parquet(typed(tables[1], ITEM_COLUMNS), folder / ITEMS)
    return folder


@pytest.mark.full
def test_runs_are_pooled(make_tables: Tables, tmp_path: Path) -> None:
    one, other = (
        _stored(make_tables(), tmp_path / "low"),
        _stored(make_tables(methods=("npo", "rmu")), tmp_path / "high"),
    )
    found = predictors([one, other])
    assert found.points["run"].tolist() == ["low"] * 4 + ["high"] * 4
    parts = [
        points_of(*make_tables(), run="low"),
        points_of(*make_tables(methods=("npo", "rmu")), run="high"),
    ]
    pd.testing.assert_frame_equal(found.points, pd.concat(parts, ignore_index=True))
    assert (found.results["n"] == 8).all()
    pd.testing.assert_frame_equal(
        found.results, correlate(pd.concat(parts, ignore_index=True)).results
    )
    # Each of them alone is too small; four models of a method in two runs are one method, and
    # resampled as one.
    with pytest.raises(WorkbenchError, match="there are 4"):
        predictors([one])


def test_a_folder_without_a_finished_run_is_an_error_that_names_it(
    make_tables: Tables, tmp_path: Path
) -> None:
    one = _stored(make_tables(), tmp_path / "low")
    with pytest.raises(WorkbenchError, match=r"nowhere.*holds no finished run"):
        predictors([one, tmp_path / "nowhere"])


@pytest.mark.full
def test_two_finished_runs_are_enough_for_a_correlation(quick_run: Run, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    for name in (CONFIG, *VALUES, ITEMS):
        shutil.copy(quick_run.folder / name, again / name)
    with pytest.raises(WorkbenchError, match="there are 4"):
        predictors([quick_run.folder])
    found = predictors([quick_run.folder, again])
    assert len(found.points) == 8
    assert set(found.points["run"]) == {quick_run.folder.name, "again"}
    assert found.results["n"].max() == 8
    # Every point twice: the same ranks.
    plain = found.results[found.results["metric"] == "recovery_correlation"]
    for row in plain.itertuples():
        points = points_of(quick_run.results, quick_run.items).dropna(subset=[row.arm])
        assert row.value == pytest.approx(
            spearmanr(points[row.arm], points[row.split].round(9)).statistic, abs=1e-9
        )


# --- The table ------------------------------------------------------------------------------------


def _row(arm: str, split: str, value: float, n: int = 8) -> dict[str, Any]:
    return {
        "stage": "predictors",
        "metric": "recovery_correlation",
        "arm": arm,
        "split": split,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "n": n,
    }


def test_the_table_has_the_strongest_correlation_with_recovery_first_whatever_its_sign() -> None:
    rows = [
        _row("displacement", "recovery", 0.2),
        _row("gradient_norm", "recovery", -0.9),
        _row("top_eigenvalue", "recovery", 0.5, n=7),
        _row("recall_before", "recall_after", 0.99),
        _row("displacement", "recall_after", 0.95),
        _row("gradient_norm", "recall_after", 0.1),
    ]
    for frame in (pd.DataFrame(rows), pd.DataFrame(rows[::-1])):
        table = predictor_table(typed(frame, RESULT_COLUMNS))
        # What has no correlation with recovery comes last.
        assert table["measured before the attack"].tolist() == [
            PREDICTORS[name]
            for name in ("gradient_norm", "top_eigenvalue", "displacement", "recall_before")
        ]
        assert table["with the recall won back"].tolist() == [
            "-0.90 [-1.00, -0.80]",
            "+0.50 [+0.40, +0.60]",
            "+0.20 [+0.10, +0.30]",
            "–",
        ]
        assert table["with the recall after the attack"].tolist() == [
            "+0.10 [+0.00, +0.20]",
            "–",
            "+0.95 [+0.85, +1.05]",
            "+0.99 [+0.89, +1.09]",
        ]
        assert table["models"].tolist() == [8, 7, 8, 8]


def test_a_table_of_nothing_is_empty() -> None:
    assert predictor_table(typed(pd.DataFrame(), RESULT_COLUMNS)).empty
