"""The sign-flip test against enumeration by hand and scipy, and areas under curves."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import permutation_test

from workbench.evaluation.statistics import area_under, paired_permutation


def _by_hand(differences: np.ndarray) -> float:
    observed = abs(differences.mean())
    means = [
        abs(np.mean(np.array(signs) * differences))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return float(np.mean([mean >= observed - 1e-12 for mean in means]))


def test_all_differences_of_one_sign_give_the_smallest_p() -> None:
    found = paired_permutation(np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4))
    assert found == (2 / 16, 2.5, 4, True)  # all plus, and all minus


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_small_sets_are_enumerated_and_ties_count(differences: list[int]) -> None:
    # Tenths are not exact in binary: patterns that tie on paper must tie here.
    values = np.array(differences) / 10
    found = paired_permutation(values + 0.7, np.full(len(values), 0.7))
    assert found.exact and found.n == len(values)
    assert found.p == pytest.approx(_by_hand(np.array(differences, dtype=float)))
    assert found.effect == pytest.approx(values.mean())


def test_the_test_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 11), rng.normal(0, 1, 11)
    theirs = permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert paired_permutation(a, b).p == pytest.approx(theirs.pvalue)


def test_enumeration_goes_as_far_as_the_draws() -> None:
    a = np.arange(1.0, 6.0)
    exact, sampled = paired_permutation(a, 0 * a, draws=32), paired_permutation(a, 0 * a, draws=31)
    assert exact.exact and exact.p == 2 / 32
    assert not sampled.exact


def test_random_patterns_agree_with_enumeration() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.5, 1, 14), rng.normal(0, 1, 14)
    exact, sampled = paired_permutation(a, b, draws=2**14), paired_permutation(a, b, draws=16_000)
    assert exact.exact and not sampled.exact
    assert sampled.p == pytest.approx(exact.p, abs=4 * np.sqrt(exact.p * (1 - exact.p) / 16_000))
    assert sampled.effect == exact.effect


def test_random_patterns_never_give_zero_and_repeat_with_their_seed() -> None:
    a, b = np.full(60, 1.0), np.zeros(60)
    assert paired_permutation(a, b, draws=999).p == 1 / 1000
    values = np.random.default_rng(2).normal(0.1, 1, 60)
    assert paired_permutation(values, b, seed=1, draws=500) == paired_permutation(
        values, b, seed=1, draws=500
    )
    assert len({paired_permutation(values, b, seed=seed, draws=500).p for seed in range(5)}) > 1


def test_the_level_holds_under_the_null() -> None:
    rng = np.random.default_rng(3)
    p = [
        paired_permutation(rng.normal(size=10), rng.normal(size=10), draws=1024).p
        for _ in range(400)
    ]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) == pytest.approx(
            level, abs=4 * np.sqrt(level * (1 - level) / 400)
        )


def test_both_sides_are_tested_and_equal_arms_have_nothing_to_show() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=9), rng.normal(size=9)
    there, back = paired_permutation(a, b), paired_permutation(b, a)
    assert there.p == back.p and there.effect == -back.effect
    assert paired_permutation(a, a)[:2] == (1.0, 0.0)
    assert paired_permutation(np.ones(50), np.ones(50), draws=100).p == 1.0


def test_seeds_are_averaged_before_items_are_flipped() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.4, 1, (3, 10)), rng.normal(0, 1, (3, 10))
    assert paired_permutation(a, b) == paired_permutation(a.mean(0), b.mean(0))
    # Copies of a seed are no more evidence, and one arm may have a single seed.
    assert paired_permutation(np.repeat(a, 4, 0), b).p == paired_permutation(a, b).p
    assert paired_permutation(a, b[0]) == paired_permutation(a.mean(0), b[0])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([], []),
        ([[]], [[]]),
        ([1.0, 2.0], [1.0]),
        ([1.0, np.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, np.inf]),
        ([[[1.0]]], [[[2.0]]]),
    ],
)
def test_unpaired_values_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="paired test"):
        paired_permutation(np.array(a), np.array(b))


def test_no_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="draw"):
        paired_permutation(np.ones(3), np.zeros(3), draws=0)


def test_areas_of_known_curves() -> None:
    assert area_under(np.array([0.0, 10.0]), np.array([0.0, 1.0])) == pytest.approx(0.5)
    assert area_under(np.array([3.0, 4.0, 9.0]), np.array([0.25, 0.25, 0.25])) == pytest.approx(
        0.25
    )
    # 0 to 1 in the first of four steps, then 1: (0.5 + 3) / 4. The mean of the three heights would
    # be 2 / 3.
    assert area_under(np.array([0, 1, 4]), np.array([0, 1, 1])) == pytest.approx(3.5 / 4)
    x = np.linspace(2, 5, 2001)
    assert area_under(x, x**2) == pytest.approx((125 - 8) / 9, rel=1e-6)


@given(scale=st.floats(0.1, 100), shift=st.floats(-50, 50))
def test_the_unit_of_x_does_not_matter(scale: float, shift: float) -> None:
    x, y = np.array([0.0, 5.0, 10.0, 20.0]), np.array([0.1, 0.4, 0.35, 0.8])
    assert area_under(scale * x + shift, y) == pytest.approx(area_under(x, y))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1.0], [1.0]),
        ([0.0, 1.0], [1.0]),
        ([0.0, 0.0], [1.0, 2.0]),
        ([1.0, 0.0], [1.0, 2.0]),
        ([0.0, 1.0], [1.0, np.nan]),
        ([[0.0, 1.0]], [[1.0, 2.0]]),
    ],
)
def test_curves_without_an_area_are_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="an area needs"):
        area_under(np.array(x), np.array(y))
