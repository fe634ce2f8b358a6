"""Intervals and correlations against tables, scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from workbench.evaluation.statistics import bootstrap, by_fact, spearman, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, n: int, low: float, high: float
) -> None:
    # The last two rows are the worked examples of Newcombe (1998), method 3.
    found = wilson(successes, n)
    assert found.low == pytest.approx(low, abs=6e-5) and found.high == pytest.approx(high, abs=6e-5)
    assert found.value == successes / n and found.n == n


@given(
    n=st.integers(1, 500),
    share=st.floats(0, 1),
    confidence=st.sampled_from([0.5, 0.9, 0.95, 0.999]),
)
def test_wilson_ends_solve_the_score_equation(n: int, share: float, confidence: float) -> None:
    from scipy.stats import norm

    successes = round(share * n)
    found, z = wilson(successes, n, confidence), float(norm.ppf(0.5 + confidence / 2))
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):  # |p - end| = z sqrt(end (1 - end) / n)
        assert abs(found.value - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-6)
    # The interval of the failures is the mirror image.
    mirror = wilson(n - successes, n, confidence)
    assert (mirror.low, mirror.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5), (1, -3), (float("nan"), 5)])
def test_wilson_refuses_impossible_counts(successes: float, n: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson(successes, n)


# --- bootstrap ------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_normal_mean_has_the_analytic_width() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(values, draws=8000)
    error = values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean(), abs=1e-12) and found.n == 400
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    narrow = bootstrap(values, draws=8000, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * error, rel=0.06)


@pytest.mark.parametrize(
    ("seed_spread", "item_spread"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.3, 1.0)]
)
def test_both_levels_of_the_bootstrap_add_their_variance(
    seed_spread: float, item_spread: float
) -> None:
    rng = np.random.default_rng(1)
    seeds, items = rng.normal(0, seed_spread, 30), rng.normal(0, item_spread, 50)
    table = seeds[:, None] + items[None, :]
    found = bootstrap(table, draws=8000)
    # A draw of items applies to every seed, so without interaction the two variances simply add.
    error = math.sqrt(seeds.var() / 30 + items.var() / 50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert found.value == pytest.approx(table.mean()) and found.n == 1500


def test_one_seed_is_the_same_as_a_plain_list_and_constants_have_no_width() -> None:
    values = np.random.default_rng(2).normal(size=20)
    assert bootstrap(values) == bootstrap(values[None])
    assert bootstrap(np.full((3, 7), 0.25)) == pytest.approx((0.25, 0.25, 0.25, 21))
    assert bootstrap(np.array([4.0]))[:3] == pytest.approx((4, 4, 4))


def test_the_bootstrap_repeats_with_its_seed_and_leaves_numpys_global_stream_alone() -> None:
    values = np.random.default_rng(2).normal(size=20)
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert np.random.random() == expected


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [1.0, float("inf")], [[], []]])
def test_the_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap(np.array(values))


# --- by fact --------------------------------------------------------------------------------------


def test_paraphrases_are_averaged_fact_by_fact_in_order_of_appearance() -> None:
    facts, means = by_fact(("b", "a", "b", "c", "b"), np.array([1.0, 5.0, 2.0, 7.0, 6.0]))
    assert facts == ("b", "a", "c")
    np.testing.assert_allclose(means, [3.0, 5.0, 7.0])


def test_by_fact_keeps_leading_axes() -> None:
    values = np.arange(12.0).reshape(2, 6)
    facts, means = by_fact(("x", "x", "y", "y", "y", "z"), values)
    assert facts == ("x", "y", "z")
    np.testing.assert_allclose(means, [[0.5, 3, 5], [6.5, 9, 11]])


def test_a_fact_without_a_value_does_not_spoil_the_others() -> None:
    # Scores are NaN where an example has no answer; the mean of another fact's paraphrases does not
    # contain them.
    _, means = by_fact(("a", "b", "b"), np.array([np.nan, 1.0, 3.0]))
    np.testing.assert_array_equal(means, [np.nan, 2.0])


# --- rank correlation -----------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_scipys(ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=15), rng.normal(size=15)
    if ties:
        x, y = np.round(x), np.round(y)
    found = spearman(x, y, draws=50)
    assert found.value == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)
    assert -1 <= found.low <= found.high <= 1 and found.n == 15


def test_spearman_sees_order_only() -> None:
    x = np.linspace(0.1, 3, 12)
    assert spearman(x, np.exp(x), draws=20)[:3] == pytest.approx((1, 1, 1))
    assert spearman(x, -(x**3), draws=20)[:3] == pytest.approx((-1, -1, -1))


def test_a_constant_series_has_no_correlation() -> None:
    x = np.arange(6.0)
    for first, second in ((x, np.ones(6)), (np.ones(6), x), (np.ones(6), np.ones(6))):
        assert spearman(first, second, draws=20)[:3] == (0, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_partial_spearman_of_one_covariate_is_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=40)
    x, y = np.exp(z) + rng.normal(size=40), z**3 - rng.normal(size=40)
    xy, xz, yz = (float(spearmanr(a, b).statistic) for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5
    assert spearman(x, y, given=z[:, None], draws=20).value == pytest.approx(expected, abs=1e-12)
    assert spearman(x, y, given=np.column_stack([z, 2 * z]), draws=20).value == pytest.approx(
        expected, abs=1e-9
    )  # the same covariate twice adds nothing
    assert spearman(x, z, given=z[:, None], draws=20)[:3] == (0, 0, 0)  # nothing is left


def test_within_levels_a_difference_between_levels_counts_for_nothing() -> None:
    rng = np.random.default_rng(0)
    level = np.repeat([0, 1, 2], 20)
    x, noise = rng.normal(size=60), rng.normal(size=60)
    y = -x + 0.5 * noise
    within = spearman(x, y, within=level, draws=20).value
    assert spearman(
        x + 100 * level, y + 100 * level, within=level, draws=20
    ).value == pytest.approx(within, abs=1e-12)
    assert (
        spearman(x + 100 * level, y + 100 * level, draws=20).value > 0.5
    )  # pooled, the levels are all there is
    each = [float(spearmanr(x[level == one], y[level == one]).statistic) for one in range(3)]
    assert within == pytest.approx(
        np.mean(each), abs=1e-12
    )  # equally large levels have equally many ranks


def test_the_interval_of_spearman_is_the_large_sample_one() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=400)
    y = 0.6 * x + 0.8 * rng.normal(size=400)
    found = spearman(x, y, draws=600)
    # Bonett and Wright (2000): the standard error of atanh(r) is sqrt((1 + r^2 / 2) / (n - 3)).
    r = found.value
    error = math.sqrt((1 + r * r / 2) / 397)
    assert found.low == pytest.approx(math.tanh(math.atanh(r) - 1.96 * error), abs=0.025)
    assert found.high == pytest.approx(math.tanh(math.atanh(r) + 1.96 * error), abs=0.025)


def test_whole_groups_are_resampled_so_that_copies_add_no_certainty() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=12), rng.normal(size=12)
    groups = np.repeat(np.arange(12), 20)
    alone, copied = (
        spearman(x, y, draws=1500),
        spearman(np.repeat(x, 20), np.repeat(y, 20), groups=groups, draws=1500),
    )
    assert copied.value == pytest.approx(alone.value, abs=1e-9)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.1)
    careless = spearman(np.repeat(x, 20), np.repeat(y, 20), draws=300)
    assert careless.high - careless.low < 0.5 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([], [])]
)
def test_spearman_refuses_short_or_unequal_series(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="3 points"):
        spearman(np.array(x), np.array(y))


@pytest.mark.parametrize("where", [0, 1])
def test_spearman_refuses_nan(where: int) -> None:
    # A NaN has no rank, so there is no correlation; a silent NaN would end in a table.
    series = [np.arange(5.0), np.arange(5.0)]
    series[where][2] = np.nan
    with pytest.raises(ValueError):
        spearman(*series, draws=20)
