"""Claims over several independent runs: the random-effects mean, from its formulas alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t

from workbench.claims import CLAIMS, decide, decide_over, outcome
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import Estimate, random_effects

Z = float(norm.ppf(0.975))


def _estimate(value: float, error: float, n: int = 40) -> Estimate:
    return Estimate(value, value - Z * error, value + Z * error, n)


def test_one_run_stays_as_it_is() -> None:
    alone = Estimate(0.3, 0.1, 0.6, 40)
    assert random_effects([alone]) == alone
    with pytest.raises(ValueError, match="no estimate"):
        random_effects([])


def test_runs_that_agree_get_the_common_mean_and_a_t_interval() -> None:
    found = random_effects([_estimate(0.2, 0.1)] * 4)
    # tau is nothing, q is below one and counts as one: se = 0.1 / 2
    half = t.ppf(0.975, 3) * 0.05
    assert found.value == pytest.approx(0.2) and found.n == 160
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))


def test_runs_that_scatter_widen_the_interval() -> None:
    values, error = np.array([0.0, 0.4, 0.8]), 0.1
    found = random_effects([_estimate(value, error) for value in values])
    # equal errors: the plain mean; tau^2 = sample variance - s^2, so that q = 1 exactly
    assert found.value == pytest.approx(values.mean())
    half = t.ppf(0.975, 2) * np.sqrt(values.var(ddof=1) / 3)
    assert found.high - found.value == pytest.approx(half)


def test_unequal_errors_by_the_formula() -> None:
    y, s = np.array([0.1, 0.5, 0.3]), np.array([0.05, 0.1, 0.2])
    found = random_effects([_estimate(value, error) for value, error in zip(y, s, strict=True)])
    w = 1 / s**2
    q = (w * (y - (w * y).sum() / w.sum()) ** 2).sum()
    tau = max(0.0, (q - 2) / (w.sum() - (w**2).sum() / w.sum()))
    v = 1 / (s**2 + tau)
    mean = (v * y).sum() / v.sum()
    spread = max(1.0, (v * (y - mean) ** 2).sum() / 2)
    half = t.ppf(0.975, 2) * np.sqrt(spread / v.sum())
    assert tuple(found)[:3] == pytest.approx((mean, mean - half, mean + half))


def test_the_order_of_the_runs_changes_nothing() -> None:
    runs = [_estimate(0.1, 0.1), _estimate(0.7, 0.02), _estimate(-0.2, 0.3)]
    assert random_effects(runs) == pytest.approx(random_effects(runs[::-1]))


def test_a_run_without_width_is_no_division_by_zero() -> None:
    found = random_effects([Estimate(0.0, 0.0, 0.0, 40), Estimate(0.0, 0.0, 0.0, 40)])
    assert found.value == 0 and np.isfinite(found.low)


@pytest.mark.parametrize(("between", "runs"), [(0.0, 3), (0.2, 3), (0.2, 8)])
def test_intervals_cover_the_mean_of_the_runs(between: float, runs: int) -> None:
    rng, held, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        centres = 0.3 + between * rng.standard_normal(runs)
        seen = [_estimate(c + 0.1 * rng.standard_normal(), 0.1) for c in centres]
        found = random_effects(seen)
        held += found.low <= 0.3 <= found.high
    # 95 % within three standard errors of the simulation; the guard against agreement may cover
    # more
    assert held / draws > 0.95 - 3 * np.sqrt(0.95 * 0.05 / draws)


@pytest.mark.parametrize(
    ("low", "high", "matters", "verdict"),
    [
        (0.01, 0.04, 0.05, "supported"),
        (-0.04, -0.01, 0.05, "contradicted"),
        (-0.02, 0.04, 0.05, "equivalent"),
        (-0.02, 0.05, 0.05, "inconclusive"),
        (-0.06, 0.01, 0.05, "inconclusive"),
        (-0.02, 0.04, 0.0, "inconclusive"),
        (0.0, 0.0, 0.05, "equivalent"),
    ],
)
def test_the_rule(low: float, high: float, matters: float, verdict: str) -> None:
    assert outcome(Estimate((low + high) / 2, low, high, 40), 0.0, matters) == verdict


def test_no_size_is_fixed_for_correlations_and_non_inferiority() -> None:
    off = {claim.id for claim in CLAIMS.values() if claim.matters == 0}
    assert off == {"flat-resists", "distance-resists", "rna-keeps-forgetting", "rna-is-label-noise"}


def test_claims_over_two_runs_are_those_of_their_effects(
    make_tables: Callable[..., tuple[pd.DataFrame, pd.DataFrame]],
) -> None:
    results, items = make_tables()
    alone = decide_over([(results, items, "one world")])
    assert repr(alone) == repr(decide(results, items, scale="one world"))
    both = decide_over([(results, items, "one world"), (results, items, "another")])
    for single, together in zip(alone, both, strict=True):
        assert single.id == together.id
        if single.verdict == "not measured":
            assert together.verdict == "not measured"
            continue
        effects = [Estimate(single.effect, single.low, single.high, single.n)] * 2
        assert tuple(random_effects(effects))[:3] == pytest.approx(
            (together.effect, together.low, together.high)
        )
        assert together.seeds == 2 * single.seeds and "2 of 2 runs" in together.reason
        assert together.scale == "one world; another"
    with pytest.raises(WorkbenchError, match="no run"):
        decide_over([])


def test_a_run_that_lacks_what_a_claim_needs_does_not_enter(
    make_tables: Callable[..., tuple[pd.DataFrame, pd.DataFrame]],
) -> None:
    results, items = make_tables()
    without = results, items[items["method"] != "cir"], "no CIR"
    runs = [(results, items, "whole"), without]
    (found,) = decide_over(runs, ids=["collapse-resists"])
    (whole,) = decide(results, items, scale="whole", ids=["collapse-resists"])
    if whole.verdict != "not measured":
        assert (found.effect, found.scale) == (whole.effect, "whole")
        assert replace(found, reason="").n == whole.n and "1 of 2 runs" in found.reason
