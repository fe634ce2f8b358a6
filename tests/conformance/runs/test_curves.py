"""Recovery curves in single numbers, against areas and steps worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from workbench.evaluation.statistics import bootstrap
from workbench.runs.curves import curve_rows, steps_to_recover
from workbench.tables import ITEM_COLUMNS, RESULT_COLUMNS, typed

Curve = Mapping[float, Sequence[float]]
"""Attack step to one recall per fact."""


def _items(
    curve: Curve,
    *,
    seed: int = 0,
    method: str = "npo",
    arm: str | None = "part",
    split: str | None = "forget-queries",
    stage: str = "ladder",
) -> Any:
    return [
        {
            "run": "r",
            "stage": stage,
            "method": method,
            "seed": seed,
            "split": split,
            "arm": arm,
            "x": step,
            "item": f"fact/{fact}",
            "correct": value,
            "probability": 0.9,
        }
        for step, values in curve.items()
        for fact, value in enumerate(values)
    ]


def _frame(*parts: Any) -> pd.DataFrame:
    return typed(pd.DataFrame([row for part in parts for row in part]), ITEM_COLUMNS)


def _rows(items: pd.DataFrame, target: float = 0.5, stage: str = "ladder") -> pd.DataFrame:
    found = curve_rows(items, "key", target=target, stage=stage)
    assert {name: str(kind) for name, kind in found.dtypes.items()} == RESULT_COLUMNS
    assert list(found.columns) == list(RESULT_COLUMNS)
    assert (found["run"] == "key").all() and (found["stage"] == stage).all()
    assert found["model"].tolist() == found["method"].tolist()
    return found


def _area(rows: pd.DataFrame, **where: str) -> pd.Series:
    chosen = rows[rows["metric"] == "area_under_recovery"]
    for name, value in where.items():
        chosen = chosen[chosen[name] == value]
    assert len(chosen) == 1
    return chosen.iloc[0]


def _soonest(rows: pd.DataFrame) -> dict[int | None, float]:
    chosen = rows[rows["metric"] == "steps_to_recover"]
    return {
        None if pd.isna(seed) else int(seed): float(value)
        for seed, value in zip(chosen["seed"], chosen["value"], strict=True)
    }


# --- One curve ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ((0.1, 0.2, 0.6, 0.9), 0.5, 5.0),  # between 2 and 5 it passed; nothing is interpolated
        ((0.1, 0.2, 0.6, 0.9), 0.2, 2.0),  # reaching is enough
        ((0.1, 0.2, 0.6, 0.9), 0.0, 0.0),
        ((0.1, 0.2, 0.6, 0.9), 0.91, math.inf),
        ((0.1, 0.7, 0.2, 0.9), 0.5, 2.0),  # the first time, even if it falls again
        ((0.8, 0.2, 0.2, 0.2), 0.5, 0.0),
        ((0.0, 0.0, 0.0, 0.0), 0.5, math.inf),
    ],
)
def test_the_first_measured_step_at_or_above_the_target(
    values: Sequence[float], target: float, expected: float
) -> None:
    found = steps_to_recover(np.array([0, 2, 5, 20]), np.array(values), target)
    assert found == expected
    assert isinstance(found, float)


def test_a_point_that_is_no_number_reaches_nothing() -> None:
    assert steps_to_recover(np.array([0, 1, 2]), np.array([math.nan, math.nan, 0.7]), 0.5) == 2.0
    assert steps_to_recover(np.array([0, 1]), np.array([math.nan, math.nan]), 0.0) == math.inf


def test_a_single_point_is_a_curve_and_none_is_not() -> None:
    assert steps_to_recover(np.array([3]), np.array([0.5]), 0.5) == 3.0
    for steps, values in (([], []), ([0, 1], [0.5]), ([0], [0.1, 0.2])):
        with pytest.raises(ValueError, match="as many values as steps"):
            steps_to_recover(np.array(steps), np.array(values), 0.5)


# --- A table of attacks ---------------------------------------------------------------------------


def test_the_area_is_the_mean_recall_over_the_attack_by_hand() -> None:
    # Recall 0, 1/2, 1 at steps 0, 2, 10: (0 + 1/2) / 2 * 2 + (1/2 + 1) / 2 * 8 = 6.5 of 10.
    rows = _rows(_frame(_items({0: (0, 0), 2: (1, 0), 10: (1, 1)})))
    area = _area(rows)
    assert area["value"] == pytest.approx(0.65)
    # Fact 0: (1 + 8) / 10; fact 1: 4 / 10. Two facts resampled: from one of them twice to the other
    # twice.
    assert (area["low"], area["high"]) == (pytest.approx(0.4), pytest.approx(0.9))
    assert area["n"] == 2
    assert (area["method"], area["split"], area["arm"]) == ("npo", "forget-queries", "part")
    assert pd.isna(area["seed"]) and pd.isna(area["x"])


def test_the_area_resamples_seeds_and_facts() -> None:
    first, second = {0: (0, 0, 1), 4: (1, 0, 1)}, {0: (0, 1, 0), 4: (0, 1, 1)}
    area = _area(_rows(_frame(_items(first, seed=0), _items(second, seed=3))))
    by_hand = bootstrap(np.array([[0.5, 0, 1], [0, 1, 0.5]]))
    assert (area["value"], area["low"], area["high"], area["n"]) == (
        pytest.approx(0.5),
        by_hand.low,
        by_hand.high,
        6,
    )


def test_an_area_of_nothing_at_all_has_wilsons_interval() -> None:
    area = _area(_rows(_frame(_items({0: (0,) * 8, 5: (0,) * 8}))))
    z2 = norm.ppf(0.975) ** 2
    assert (area["value"], area["low"]) == (0.0, 0.0)
    assert area["high"] == pytest.approx(z2 / (8 + z2))


def test_paraphrases_of_one_fact_count_as_one() -> None:
    items = _frame(
        _items({0: (0, 0), 4: (1, 0)}), _items({0: (0,), 4: (0,)})
    )  # a second row of fact 0
    assert _area(_rows(items))["value"] == pytest.approx((0.25 + 0) / 2)


def test_steps_to_recover_are_one_row_per_seed_and_their_median() -> None:
    late, soon, middle = (
        {0: (0, 0), 2: (0, 0), 6: (1, 0)},
        {0: (1, 0), 2: (1, 1), 6: (1, 1)},
        {0: (0, 0), 2: (0, 1), 6: (0, 0)},
    )
    rows = _rows(_frame(_items(late, seed=0), _items(soon, seed=1), _items(middle, seed=7)))
    assert _soonest(rows) == {0: 6.0, 1: 0.0, 7: 2.0, None: 2.0}
    median = rows[(rows["metric"] == "steps_to_recover") & rows["seed"].isna()].iloc[0]
    assert median["n"] == 3
    assert (median["method"], median["split"], median["arm"]) == ("npo", "forget-queries", "part")


def test_what_never_comes_back_is_infinite() -> None:
    never, soon = {0: (0, 0), 5: (0, 0)}, {0: (0, 0), 5: (1, 1)}
    assert _soonest(_rows(_frame(_items(never)))) == {0: math.inf, None: math.inf}
    # Two of three seeds never: so does the middle one. One of three does not matter.
    assert (
        _soonest(_rows(_frame(_items(never), _items(never, seed=1), _items(soon, seed=2))))[None]
        == math.inf
    )
    assert (
        _soonest(_rows(_frame(_items(never), _items(soon, seed=1), _items(soon, seed=2))))[None]
        == 5.0
    )
    # Half of the seeds never: the middle between a step and never is never.
    assert _soonest(_rows(_frame(_items(never), _items(soon, seed=1))))[None] == math.inf


def test_the_target_is_the_mean_over_facts_and_reaching_it_is_enough() -> None:
    items = _frame(_items({0: (0, 0, 0, 0), 1: (1, 0, 0, 0), 3: (1, 1, 0, 0), 9: (1, 1, 1, 1)}))
    assert _soonest(_rows(items, target=0.5))[0] == 3.0
    assert _soonest(_rows(items, target=0.25))[0] == 1.0
    assert _soonest(_rows(items, target=0.51))[0] == 9.0


def test_every_model_and_arm_has_its_own_curve_and_other_stages_none() -> None:
    rising, flat = {0: (0, 0), 4: (1, 1)}, {0: (0, 0), 4: (0, 0)}
    items = _frame(
        _items(rising, method="npo", arm="part"),
        _items(flat, method="npo", arm="general"),
        _items(flat, method="cir", arm="part"),
        _items(rising, method="npo", arm="novel", split="novel"),
        _items({0: (1, 1), 4: (1, 1)}, method="npo", arm="part", stage="relearn"),
    )
    rows = _rows(items)
    found = {
        (row.method, row.split, row.arm): row.value
        for row in rows[rows["metric"] == "area_under_recovery"].itertuples()
    }
    assert found == {
        ("npo", "forget-queries", "part"): 0.5,
        ("npo", "forget-queries", "general"): 0.0,
        ("cir", "forget-queries", "part"): 0.0,
        ("npo", "novel", "novel"): 0.5,
    }
    assert _area(_rows(items, stage="relearn"))["value"] == 1.0


def test_the_order_of_rows_means_nothing() -> None:
    items = _frame(
        _items({0: (0, 0, 1), 2: (1, 0, 0), 10: (1, 1, 1)}, seed=0),
        _items({0: (0, 1, 0), 2: (0, 0, 1), 10: (1, 0, 1)}, seed=1),
    )
    mixed = items.sample(frac=1, random_state=3).reset_index(drop=True)
    pd.testing.assert_frame_equal(_rows(mixed), _rows(items))


def test_an_attack_with_missing_cells_is_left_out_and_the_others_stay() -> None:
    whole = _items({0: (0, 0), 4: (1, 1)}, method="npo")
    broken = _items({0: (0, 0), 4: (1, 1)}, method="cir", seed=0) + _items(
        {0: (0, 0)}, method="cir", seed=1
    )  # seed 1 broke before step 4
    holed = _items({0: (0, 0), 4: (1,)}, method="rmu")
    alone = _items({0: (0, 0)}, method="grad-diff")  # one point is no curve
    rows = _rows(_frame(whole, broken, holed, alone))
    assert set(rows["method"]) == {"npo"}
    assert len(rows) == 3


def test_seeds_with_facts_of_their_own_have_a_curve_each() -> None:
    # The new people of the ladder differ from seed to seed, so no fact is shared; every seed's own
    # curve is whole.
    named = [
        row | {"item": f"{seed}/{row['item']}"}
        for seed, curve in ((0, {0: (0, 0), 4: (1, 1)}), (1, {0: (0, 0), 4: (1, 0)}))
        for row in _items(curve, seed=seed, arm="novel", split="novel")
    ]
    rows = _rows(_frame(named))
    assert _soonest(rows) == {0: 4.0, 1: 4.0, None: 4.0}


def test_no_attack_gives_no_row() -> None:
    for items in (_frame(), _frame(_items({0: (0,), 4: (1,)}, stage="relearn"))):
        assert _rows(items).empty
