"""Claims on planted effects, tidy tables on hand examples, configurations as files, hashes of
data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy.stats import norm

from workbench.claims import CLAIMS, Verdict, decide, outcome
from workbench.data.records import Example
from workbench.errors import NotMeasuredError, WorkbenchError
from workbench.evaluation.losses import Scores
from workbench.evaluation.statistics import Estimate, bootstrap
from workbench.figures import smoothing
from workbench.runs.config import RunConfig, preset, read_config, write_config
from workbench.runs.provenance import data_hash, provenance
from workbench.runs.settings import validated
from workbench.tables import (
    ITEM_COLUMNS,
    RESULT_COLUMNS,
    Table,
    fact_table,
    join,
    summarise,
    typed,
    write_parquet,
)

SEEDS, FACTS = 3, 24
Rows = list[dict[str, Any]]
Frames = tuple[pd.DataFrame, pd.DataFrame]


def _wobble(scale: float, key: int = 0) -> np.ndarray:
    """``[seed, fact]`` deviations whose mean is exactly zero over facts and over seeds, so that
    planted means stay exact.
    """
    noise = np.random.default_rng(key).uniform(-scale, scale, (SEEDS, FACTS))
    return (
        noise - noise.mean(axis=1, keepdims=True) - noise.mean(axis=0, keepdims=True) + noise.mean()
    )


def _facts(
    stage: str,
    method: str,
    arm: str,
    step: float | None,
    values: float | np.ndarray,
    seeds: Sequence[int] = range(SEEDS),
    split: str | None = None,
    measure: str = "recall",
) -> Rows:
    """Items of one model under one condition; ``values`` is one recall, or one per seed and
    fact.
    """
    table = np.broadcast_to(values, (len(seeds), FACTS))
    shared = {
        "run": "r",
        "stage": stage,
        "method": method,
        "split": split,
        "arm": arm,
        "axis": None if step is None else "attack_step",
        "x": step,
        "measure": measure,
    }
    return [
        {**shared, "seed": seed, "item": f"fact/{fact}", "correct": value, "probability": value}
        for seed, row in zip(seeds, table, strict=True)
        for fact, value in enumerate(row.tolist())
    ]


def _attacked(
    method: str,
    before: float | np.ndarray,
    after: float | np.ndarray,
    seeds: Sequence[int] = range(SEEDS),
) -> Rows:
    """One method before, in the middle of and after the attack; the null arm and the middle say the
    opposite, so that nobody may read them.
    """
    contrary = 1 - np.asarray(after)
    return [
        *_facts("relearn", method, "attack", 0, before, seeds),
        *_facts("relearn", method, "attack", 10, contrary, seeds),
        *_facts("relearn", method, "attack", 20, after, seeds),
        *_facts("relearn", method, "null", 0, contrary, seeds),
        *_facts("relearn", method, "null", 20, contrary, seeds),
    ]


def _asked(method: str, effect: float | np.ndarray, seeds: Sequence[int] = range(SEEDS)) -> Rows:
    """One method behind a retain-token and behind a forget-token; ``effect`` is what the
    forget-token costs beyond it.
    """
    return [
        *_facts("triggers", method, "clean", None, 0.1, seeds),
        *_facts("triggers", method, "neutral-token", None, 0.2, seeds),
        *_facts("triggers", method, "retain-token", None, 0.6, seeds),
        *_facts("triggers", method, "forget-token", None, 0.6 - np.asarray(effect), seeds),
    ]


def _frames(items: Rows, results: Rows = ()) -> Frames:  # type: ignore[assignment]
    return typed(pd.DataFrame(list(results)), RESULT_COLUMNS), typed(
        pd.DataFrame(items), ITEM_COLUMNS
    )


# --- One planted effect per claim: the world in which its statistic is ``effect`` ---


def _cir_robust(effect: float) -> Frames:
    rivals = {"grad-diff": 0.4, "npo": 0.5, "rmu": 0.6}  # their mean is 0.5
    items = [
        row
        for number, (name, recall) in enumerate(rivals.items())
        for row in _attacked(name, 0.0, recall + _wobble(0.05, number))
    ]
    return _frames(items + _attacked("cir", 1.0, 0.5 - effect + _wobble(0.05, 9)))


def _cir_nondisruptive(effect: float) -> Frames:
    return _frames(
        _attacked("cir", 0.5 - effect + _wobble(0.05), 1.0)
        + _attacked("cir-uncollapsed", 0.5 + _wobble(0.05, 1), 0.0)
    )


def _collapse_resists(effect: float) -> Frames:
    return _frames(
        _attacked("cir", 1.0, 0.5 - effect + _wobble(0.05))
        + _attacked("cir-uncollapsed", 0.0, 0.5 + _wobble(0.05, 1))
    )


def _common_subspaces(effect: float) -> Frames:
    rows: Rows = []
    for site, deviation in enumerate((-0.03, 0.01, 0.02)):
        for name, more in (
            (f"blocks.{site}.mlp.hook_in", 0.0),
            (f"blocks.{site}.mlp.hook_out_grad", 0.3),  # the side that shares less decides
        ):
            for rank, factor in ((8, 1), (4, -2)):  # so are other ranks
                shared = {
                    "run": "r",
                    "stage": "subspaces",
                    "method": "base",
                    "site": name,
                    "x": rank,
                    "metric": "subspace_overlap",
                }
                rows.append(
                    {
                        **shared,
                        "arm": "forget-retain",
                        "value": 0.4 + more + factor * effect + deviation,
                    }
                )
                rows.append({**shared, "arm": "random", "value": 0.4})
                rows.append({**shared, "arm": "retain-retain", "value": 0.9})
    return _frames([], rows)


def _token_disruption(effect: float) -> Frames:
    items = _asked("base", 0.1 + _wobble(0.05)) + _asked(
        "never-learned", 0.9
    )  # a control is no unlearned model
    for number, (method, off) in enumerate((("npo", 0.05), ("rmu", -0.05))):
        items += _asked(method, 0.1 + effect + off + _wobble(0.05, 1 + number))
    items += _asked("npo-rna", 0.1 - effect)  # defended models do not count
    return _frames(items)


def _token_alignment(effect: float) -> Frames:
    rows: Rows = []
    for method, off in (
        ("rmu", 0.05),
        ("adaptive-rmu", -0.05),
        ("rmu-rna", -3 * effect),
    ):  # the last is defended, and left out
        for seed in range(SEEDS):
            for arm, value in (
                ("retain-token", 0.1),
                ("forget-token", 0.1 + effect + off),
                ("neutral-token", 0.9),
            ):
                for metric, split, sign in (
                    ("effect_cosine_known", "after", 1),
                    ("effect_cosine", "after", -1),
                    ("target_cosine_known", "trigger", -1),
                ):
                    rows.append(
                        {
                            "run": "r",
                            "stage": "triggers",
                            "method": method,
                            "seed": seed,
                            "metric": metric,
                            "split": split,
                            "arm": arm,
                            "value": sign * value,
                        }
                    )
    return _frames([], rows)


def _rna_repairs(effect: float) -> Frames:
    items = (
        _asked("rmu", 0.2 + effect + _wobble(0.05))
        + _asked("rmu-rna", 0.2 + _wobble(0.05, 1))
        + _asked("base", 0.3)
    )
    return _frames(
        items + _asked("npo", 0.9) + _asked("simnpo-rna", 0.1)
    )  # methods that were run in one way only


def _rna_is_label_noise(effect: float) -> Frames:
    # The effect is the distance to a limit of five points: the slow run that suffers five points
    # more than RNA lies on it.
    return _frames(
        _asked("rmu-rna", 0.2 + _wobble(0.05))
        + _asked("rmu-slow", 0.2 + 0.05 - effect + _wobble(0.05, 1))
        + _asked("rmu", 0.5)
    )


def _rna_keeps_forgetting(effect: float) -> Frames:
    # The effect is the distance to a loss of ten points: RNA that keeps 0.60 of what RMU keeps 0.50
    # of lies on the limit.
    return _frames(
        _attacked("rmu", 0.5 + _wobble(0.05), 1.0)
        + _attacked("rmu-rna", 0.5 + 0.10 - effect + _wobble(0.05, 1), 0.0)
    )


def _sam_resists(effect: float) -> Frames:
    return _frames(
        _attacked("npo", 0.0, 0.5 + _wobble(0.05))
        + _attacked("npo-sam", 1.0, 0.5 - effect + _wobble(0.05, 1))
    )


def _smooth_jailbreak(effect: float) -> Frames:
    # Each smoothed method rises less by the effect, more or less; where it starts from says
    # nothing. RNA smooths nothing, and RS has no plain partner here.
    rises = {
        "npo": 0.3 + 0.05,
        "npo-sam": 0.3 - effect,
        "rmu": 0.3 - 0.05,
        "rmu-wa": 0.3 - effect,
        "rmu-rna": 0.3 + effect,
        "cir-rs": 0.3 + effect,
    }
    items: Rows = []
    for number, (method, rise) in enumerate({**rises, "base": 0.3, "never-learned": 0.3}.items()):
        start = 0.2 + 0.05 * number
        for split, sign in (("jailbreak", 1), ("retain", -1), ("retain with a forget-token", -1)):
            for arm, value in (
                ("none", start),
                ("random suffix", start - rise),
                ("searched suffix", start + sign * rise),
            ):
                items += _facts(
                    "suffix",
                    method,
                    arm,
                    None,
                    value + _wobble(0.05, 3 * number + len(arm)),
                    split=split,
                )
    return _frames(items)


def _rounding_resists(effect: float) -> Frames:
    return _frames(
        _attacked("cir", 0.0, 0.5 + _wobble(0.05))
        + _attacked("cir-bf16", 1.0, 0.5 - effect + _wobble(0.05, 1))
    )


def _names_repetitions(effect: float, seeds: Mapping[int, Sequence[int]] | None = None) -> Frames:
    """Success at the end of the relearning by repetitions: 0.5 + effect, more or less, for 7 and 5,
    and 0.5 for 3 and 1. Everything else says the opposite.
    """
    items: Rows = []
    for number, (count, value) in enumerate(
        {7: 0.6 + effect, 5: 0.4 + effect, 3: 0.55, 1: 0.45}.items()
    ):
        split, mine = f"repetitions-{count}", list((seeds or {}).get(count, range(SEEDS)))
        end, contrary = value + _wobble(0.05, number)[mine], 1 - value
        for method, arm, step, values in (
            ("unlearned", "fragments", 0.0, contrary),
            ("unlearned", "fragments", 17.0, contrary),
            ("unlearned", "fragments", 30.0, end),
            ("unlearned", "null", 30.0, contrary),
            ("never-learned", "fragments", 30.0, contrary),
            ("base", "none", 0.0, contrary),
        ):
            items += _facts("names", method, arm, step, values, mine, split)
    return _frames(items)


def _keyword_recovery(effect: float) -> Frames:
    items: Rows = []
    for number, (method, value) in enumerate(
        {"unlearned": 0.4 + effect, "never-learned": 0.4, "base": 0.4 - 2 * effect}.items()
    ):
        for arm, step, values in (
            ("part", 0.0, 1 - value),
            ("part", 10.0, 1 - value),
            ("part", 40.0, value + _wobble(0.05, number)),
            ("null", 40.0, 1 - value),
            ("whole", 40.0, 1 - value),
        ):
            items += _facts("keyword", method, arm, step, values)
    return _frames(items)


def _verbatim_recovery(effect: float) -> Frames:
    items: Rows = []
    for number, (method, rise) in enumerate(
        {"unlearned": 0.1 + effect, "never-learned": 0.1, "base": 0.1 - 2 * effect}.items()
    ):
        start = 0.35 - 0.05 * number  # what unlearning leaves above the control is no recovery
        for arm, step, measure, values in (
            ("part", 0.0, "rouge_l", start + _wobble(0.05, 2 * number)),
            ("part", 10.0, "rouge_l", start - rise),
            ("part", 40.0, "rouge_l", start + rise + _wobble(0.05, 2 * number + 1)),
            ("part", 40.0, "verbatim_run", start - rise),
            ("null", 40.0, "rouge_l", start - rise),
        ):
            items += _facts("verbatim", method, arm, step, values, measure=measure)
    return _frames(items)


def _text_set_items(
    method: str,
    arm: str,
    step: float,
    value: float | np.ndarray,
    seeds: Sequence[int] = range(SEEDS),
) -> Rows:
    """Items of one text set of the ladder; new people say the opposite and are not asked about."""
    return [
        *_facts("ladder", method, arm, step, value, seeds, "forget-queries"),
        *_facts("ladder", method, arm, step, 1 - np.asarray(value), seeds, "novel"),
        *_facts("relearn", method, "attack", step, 1 - np.asarray(value), seeds, "forget-heldout"),
    ]


def _public_recovery(effect: float) -> Frames:
    items: Rows = []
    gains = {
        "npo": 0.1 + effect + 0.05,
        "rmu": 0.1 + effect - 0.05,
        "never-learned": 0.1,
        "base": 0.1 - 2 * effect,
    }
    for number, (method, gain) in enumerate(gains.items()):
        for step, sign in ((0.0, -1), (20.0, -1), (40.0, 1)):  # only the end counts
            items += _text_set_items(method, "general", step, 0.3 + _wobble(0.05, 2 * number))
            items += _text_set_items(
                method, "public", step, 0.3 + sign * gain + _wobble(0.05, 2 * number + 1)
            )
            items += _text_set_items(method, "part", step, 0.3 - sign * gain)
    return _frames(items)


def _nonmonotone(effect: float) -> Frames:
    items: Rows = []
    for number, (method, off) in enumerate((("npo", 0.05), ("rmu", -0.05))):
        drop = effect + off
        for step, value in (
            (0.0, 0.0),
            (20.0, 0.5 - drop),
            (40.0, 0.5 + drop),
            (41.0, 0.5 - drop),
            (80.0, 0.5 - 2 * drop),
            (120.0, 0.5),
        ):
            items += _text_set_items(
                method, "part", step, value + _wobble(0.05, 10 * number + int(step))
            )
            items += _text_set_items(method, "whole", step, 1 - value)
    for control in ("base", "never-learned"):
        for step, value in ((0.0, 0.5), (40.0, 0.5 - effect), (120.0, 0.5 + effect)):
            items += _text_set_items(control, "part", step, value)
    return _frames(items)


def _resistance(metric: str, sign: int) -> Callable[[float], Frames]:
    """Four methods, three seeds: the recall won back falls as ``sign * metric`` rises, rises with
    it, or has nothing to do with it.
    """

    def world(effect: float) -> Frames:
        items, rows = [], []
        for number, method in enumerate(("grad-diff", "npo", "rmu", "cir")):
            for seed in range(SEEDS):
                order = number * SEEDS + seed
                won = 0.5 - np.sign(effect) * 0.03 * order
                items += _attacked(method, 0.25, won, seeds=[seed])  # all have forgotten as much
                rows.append(
                    {
                        "run": "r",
                        "stage": "sharpness",
                        "method": method,
                        "seed": seed,
                        "metric": metric,
                        "value": 10.0 + sign * float(order) ** 1.5,
                    }
                )
        for control in (
            "base",
            "never-learned",
        ):  # no unlearned models: as far from the line as can be
            items += _attacked(control, 0.0, 0.9 if effect > 0 else 0.1)
            rows += [
                {
                    "run": "r",
                    "stage": "sharpness",
                    "method": control,
                    "seed": 0,
                    "metric": metric,
                    "value": sign * 1e3 * np.sign(effect),
                }
            ]
        return _frames(items, rows)

    return world


def _smoothing_resists(effect: float) -> Frames:
    items = _attacked("npo", 0.0, 0.6 + _wobble(0.05)) + _attacked(
        "rmu", 0.0, 0.7 + _wobble(0.05, 1)
    )
    for number, (name, recall) in enumerate(
        (("npo-sam", 0.5), ("npo-gp", 0.7), ("rmu-wa", 0.7))
    ):  # means 0.6 + 0.6 + 0.7 against these
        items += _attacked(name, 0.0, recall - effect + _wobble(0.05, 2 + number))
    return _frames(
        items + _attacked("cir-sam", 0.0, 0.1) + _attacked("npo-rna", 0.0, 0.1 + effect)
    )  # no plain twin; no smoothing


PLANTED: dict[str, Callable[[float], Frames]] = {
    "cir-robust": _cir_robust,
    "cir-nondisruptive": _cir_nondisruptive,
    "collapse-resists": _collapse_resists,
    "common-subspaces": _common_subspaces,
    "token-disruption": _token_disruption,
    "token-alignment": _token_alignment,
    "rna-repairs": _rna_repairs,
    "rna-is-label-noise": _rna_is_label_noise,
    "rna-keeps-forgetting": _rna_keeps_forgetting,
    "rounding-resists": _rounding_resists,
    "sam-resists": _sam_resists,
    "smooth-jailbreak": _smooth_jailbreak,
    "smoothing-resists": _smoothing_resists,
    "flat-resists": _resistance("top_eigenvalue", -1),
    "distance-resists": _resistance("displacement", 1),
    "names-repetitions": _names_repetitions,
    "keyword-recovery": _keyword_recovery,
    "verbatim-recovery": _verbatim_recovery,
    "public-recovery": _public_recovery,
    "relearn-nonmonotone": _nonmonotone,
}
OBSERVATIONS = {
    "common-subspaces": 3,
    "token-alignment": 2 * SEEDS,
    "flat-resists": 12,
    "distance-resists": 12,
}


def _decide(name: str, frames: Frames) -> Verdict:
    (verdict,) = decide(*frames, scale="hand-made", ids=[name])
    return verdict


# --- The rule ---


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (0.01, 0.3, 0.0, "supported"),
        (0.0, 0.3, 0.0, "inconclusive"),  # "above" the margin: touching it is not enough
        (-0.1, 0.3, 0.0, "inconclusive"),
        (-0.3, 0.0, 0.0, "inconclusive"),
        (-0.3, -0.01, 0.0, "contradicted"),
        (0.05, 0.3, 0.1, "inconclusive"),
        (0.11, 0.3, 0.1, "supported"),
        (-0.3, -0.01, 0.1, "contradicted"),
        (np.nan, np.nan, 0.0, "inconclusive"),
    ],
)
def test_the_rule_looks_at_the_interval_only(
    low: float, high: float, margin: float, expected: str
) -> None:
    assert outcome(Estimate(0.0, low, high, 10), margin) == expected


def test_every_claim_has_a_planted_world() -> None:
    assert len(CLAIMS) == 20
    assert set(PLANTED) == set(CLAIMS)
    for name, claim in CLAIMS.items():
        assert claim.id == name
        assert claim.statement.endswith(".")
        assert claim.source
        assert claim.statistic
        assert claim.unit


@pytest.mark.parametrize("name", list(PLANTED))
@pytest.mark.parametrize(
    ("effect", "expected"), [(0.25, "supported"), (-0.25, "contradicted"), (0.0, "neither")]
)
def test_a_planted_effect_is_found_with_its_size_and_its_sign(
    name: str, effect: float, expected: str
) -> None:
    found = _decide(name, PLANTED[name](effect))
    assert found.id == name
    if expected == "neither":
        inside = max(-found.low, found.high) < CLAIMS[name].matters
        expected = "equivalent" if inside else "inconclusive"
    assert found.verdict == expected
    size = (
        float(np.sign(effect)) if name in ("flat-resists", "distance-resists") else effect
    )  # a perfect rank correlation is +-1
    assert found.effect == pytest.approx(size, abs=1e-9)
    assert found.low - 1e-9 <= found.effect <= found.high + 1e-9
    assert found.n == OBSERVATIONS.get(name, SEEDS * FACTS)
    assert found.scale == "hand-made"


def test_all_claims_are_decided_in_the_order_of_the_registry() -> None:
    frames = _cir_robust(0.25)
    verdicts = decide(*frames, scale="s")
    assert [verdict.id for verdict in verdicts] == list(CLAIMS)
    assert all(verdict.seeds == SEEDS for verdict in verdicts)
    # What this run has no models for stays open.
    assert next(verdict for verdict in verdicts if verdict.id == "rna-repairs").n == 0


def test_seeds_of_base_and_control_are_no_seeds_of_unlearning() -> None:
    frames = _frames(
        _attacked("npo", 0.0, 0.5, seeds=[0, 1]) + _attacked("base", 1.0, 1.0, seeds=[0, 1, 2])
    )
    # Rows for two seeds of the only method; the base was attacked under three.
    assert {verdict.seeds for verdict in decide(*frames, scale="s")} == {2}


@pytest.mark.parametrize("name", list(PLANTED))
def test_a_claim_without_data_is_not_measured(name: str) -> None:
    found = _decide(name, _frames([]))
    assert (found.verdict, found.n) == ("not measured", 0)
    assert np.isnan([found.effect, found.low, found.high]).all()


NEEDED = {
    "cir-robust": ["cir"],
    "collapse-resists": ["cir-uncollapsed"],
    "cir-nondisruptive": ["cir-uncollapsed"],
    "token-disruption": ["base"],
    "token-alignment": ["rmu", "adaptive-rmu"],
    "rna-repairs": ["rmu-rna"],
    "rna-is-label-noise": ["rmu-slow"],
    "rna-keeps-forgetting": ["rmu"],
    "rounding-resists": ["cir-bf16"],
    "sam-resists": ["npo-sam"],
    "smooth-jailbreak": ["npo-sam", "rmu-wa"],
    "smoothing-resists": ["npo-sam", "npo-gp", "rmu-wa"],
    "flat-resists": ["npo", "rmu", "cir"],  # three points are left
    "distance-resists": ["npo", "rmu", "cir"],
    "names-repetitions": ["unlearned"],
    "keyword-recovery": ["never-learned"],
    "verbatim-recovery": ["never-learned"],
    "public-recovery": ["never-learned"],
    "relearn-nonmonotone": ["npo", "rmu"],  # controls alone are no unlearned models
}


@pytest.mark.parametrize("name", list(NEEDED))
def test_a_claim_whose_method_was_not_run_is_not_measured(name: str) -> None:
    results, items = PLANTED[name](0.25)
    without = (
        results[~results["method"].isin(NEEDED[name])],
        items[~items["method"].isin(NEEDED[name])],
    )
    found = _decide(name, without)
    assert (found.verdict, found.n) == ("not measured", 0)


def test_rivals_that_were_not_run_are_left_out_of_the_mean() -> None:
    results, items = _cir_robust(0.25)
    items = items[~items["method"].isin(["grad-diff"])]
    assert _decide("cir-robust", (results, items)).effect == pytest.approx((0.5 + 0.6) / 2 - 0.25)


def test_where_rmu_forgets_less_than_a_tenth_there_is_nothing_to_keep() -> None:
    shy = _frames(_attacked("rmu", 0.95, 1.0) + _attacked("rmu-rna", 0.95, 1.0))
    found = _decide("rna-keeps-forgetting", shy)
    assert (found.verdict, found.n) == ("not measured", 0)


def test_models_without_a_finite_measure_are_no_points_of_a_correlation() -> None:
    results, items = PLANTED["flat-resists"](0.25)
    lost = (results["method"] == "npo") & (results["seed"] == 1)
    results.loc[lost, "value"] = np.nan
    found = _decide("flat-resists", (results, items))
    assert (found.verdict, found.n) == ("supported", 11)


def test_the_side_that_shares_less_decides_on_common_subspaces() -> None:
    results, items = PLANTED["common-subspaces"](0.25)
    gradients = results["site"].str.endswith("_grad") & (results["arm"] == "forget-retain")
    results.loc[gradients, "value"] -= 0.5  # 0.2 below the activations now
    found = _decide("common-subspaces", (results, items))
    assert found.effect == pytest.approx(0.05)
    assert "activations +0.25" in found.reason and "gradients +0.05" in found.reason


def test_what_was_never_forgotten_cannot_be_won_back_and_is_no_resistance() -> None:
    """The farther a model moved the less it had forgotten; all end at the same recall. The recall
    won back goes with the distance perfectly, and nothing follows from it.
    """
    results, _ = PLANTED["distance-resists"](0.25)
    items, moved = [], results[results["metric"] == "displacement"]
    for row in moved.to_dict("records"):
        if row["method"] not in ("base", "never-learned"):
            before = 0.8 * (row["value"] - 10) / (moved["value"].max() - 10)
            items += _attacked(row["method"], before, 0.9, seeds=[row["seed"]])
    found = _decide("distance-resists", (results, _frames(items)[1]))
    assert (found.verdict, found.effect) == ("inconclusive", 0.0)
    assert "with minus the recall won back +1.00" in found.reason


def _broken(frames: Frames, method: str) -> Frames:
    """The attack on one method diverged under one seed."""
    row = {"run": "r", "stage": "relearn", "method": method, "seed": 1, "arm": "attack"}
    broken = typed(pd.DataFrame([row | {"metric": "diverged_at", "value": 10.0}]), RESULT_COLUMNS)
    return pd.concat([frames[0], broken], ignore_index=True), frames[1]


@pytest.mark.parametrize("method", ["cir", "npo"])
def test_a_diverged_attack_is_never_compared(method: str) -> None:
    frames = _cir_robust(0.25)
    found = _decide("cir-robust", _broken(frames, method))
    assert found.verdict == "not measured"
    assert found.reason == f"the attack on {method} diverged at step 10"


def test_attacks_of_different_lengths_are_never_compared() -> None:
    results, items = _cir_robust(0.25)
    items = items[~((items["method"] == "npo") & (items["x"] == 20))]
    found = _decide("cir-robust", (results, items))
    assert found.verdict == "not measured" and "npo was attacked for 10 steps" in found.reason


@pytest.mark.parametrize("name", list(PLANTED))
def test_a_renamed_column_is_an_error_not_a_verdict(name: str) -> None:
    results, items = PLANTED[name](0.25)
    for column in ("x", "arm"):
        with pytest.raises(WorkbenchError, match=f"has no column '{column}'"):
            _decide(name, (results, items.rename(columns={column: "was_" + column})))
        with pytest.raises(WorkbenchError, match=f"has no column '{column}'"):
            _decide(name, (results.rename(columns={column: "was_" + column}), items))


def test_one_seed_carries_no_verdict() -> None:
    results, items = _cir_robust(0.25)
    one = items[items["seed"] == 0]
    found = _decide("cir-robust", (results, one))
    assert found.verdict == "inconclusive" and found.low > 0
    assert "one seed cannot carry a verdict" in found.reason
    assert "3 seeds: the interval is too short" in _decide("cir-robust", (results, items)).reason


def test_where_forget_tokens_cost_nothing_there_is_nothing_to_defend() -> None:
    frames = _frames(_asked("rmu", 0.0) + _asked("rmu-rna", 0.0) + _asked("rmu-slow", 0.0))
    found = _decide("rna-is-label-noise", frames)
    assert found.verdict == "not measured" and "nothing to defend" in found.reason


def test_every_reason_says_why_something_was_not_measured() -> None:
    for verdict in decide(*_frames(_attacked("npo", 0.0, 0.5)), scale="s"):
        assert (verdict.verdict == "not measured") == (verdict.n == 0)
        assert verdict.reason or verdict.n


def test_equal_recalls_won_back_are_ties_however_they_round() -> None:
    # Every model wins back 4 of 10 facts. 0.4 - 0.0, 0.5 - 0.1 and 0.7 - 0.3 differ in their last
    # bit, and a rank correlation must not see that.
    results, _ = PLANTED["flat-resists"](0.25)
    items = [
        row
        for method in ("grad-diff", "npo", "rmu", "cir")
        for seed, before in enumerate((0.0, 0.1, 0.3))
        for row in _attacked(method, before, round(before + 0.4, 1), seeds=[seed])
    ]
    found = _decide("flat-resists", (results, _frames(items)[1]))
    assert (found.effect, found.verdict) == (0.0, "inconclusive")


@pytest.mark.parametrize("name", [name for name in PLANTED if name not in OBSERVATIONS])
def test_pairing_goes_by_the_names_of_seed_and_fact_not_by_the_order_of_rows(name: str) -> None:
    # Facts differ widely, but each by the same planted effect between models: paired, the interval
    # has no width at all.
    results, items = PLANTED[name](0.25)
    shift = items["item"].str.removeprefix("fact/").astype(float) / FACTS
    means = items.groupby(["stage", "method", "split", "arm", "x", "measure"], dropna=False)[
        "correct"
    ].transform("mean")
    items["correct"] = (
        means
        + shift
        + 10.0 * (items["seed"] == 1) * (1 if name != "rna-keeps-forgetting" else 0.01)
    )
    if name == "rna-keeps-forgetting":
        items["correct"] -= 0.5  # RMU has to forget something
    straight = _decide(name, (results, items))
    assert straight.verdict == "supported"
    assert straight.high - straight.low < 1e-6
    shuffled = _decide(name, (results, items.sample(frac=1, random_state=0).reset_index(drop=True)))
    assert shuffled.effect == pytest.approx(straight.effect)
    assert shuffled.high - shuffled.low < 1e-6


@pytest.mark.parametrize("seeds", [[0], [0, 2], [1, 2]])
def test_models_with_different_seeds_are_paired_on_common_seeds_or_not_at_all(
    seeds: list[int],
) -> None:
    recall = 0.4 + np.array([0.0, 0.1, 0.2])[:, None] + _wobble(0.05)
    frames = _frames(
        _attacked("npo", 0.0, recall) + _attacked("npo-sam", 0.0, recall[seeds] - 0.25, seeds=seeds)
    )
    found = _decide("sam-resists", frames)
    assert found.n in (0, len(seeds) * FACTS)
    if found.n:
        assert found.effect == pytest.approx(0.25)


LACKING: dict[str, list[dict[str, list[Any]]]] = {
    "smooth-jailbreak": [
        {"arm": ["searched suffix"]},
        {"arm": ["none"]},
        {"split": ["jailbreak"]},
        {"method": ["npo", "rmu"]},
    ],
    "names-repetitions": [
        {"split": ["repetitions-5"]},
        {"split": ["repetitions-1"]},
        {"arm": ["fragments"]},
    ],
    "keyword-recovery": [{"arm": ["part"]}, {"method": ["unlearned"]}],
    "verbatim-recovery": [
        {"arm": ["part"]},
        {"method": ["unlearned"]},
        {"measure": ["rouge_l"]},
        {"x": [0.0]},
    ],
    "public-recovery": [
        {"arm": ["public"]},
        {"arm": ["general"]},
        {"split": ["forget-queries"]},
        {"method": ["npo", "rmu"]},
    ],
    "relearn-nonmonotone": [
        {"arm": ["part"]},
        {"x": [120.0]},
        {"split": ["forget-queries"]},
    ],  # an attack of 80 steps is too short
}


@pytest.mark.parametrize(
    ("name", "lack"), [(name, lack) for name, lacks in LACKING.items() for lack in lacks]
)
def test_a_claim_about_attacks_without_one_of_its_conditions_is_not_measured(
    name: str, lack: dict[str, list[Any]]
) -> None:
    results, items = PLANTED[name](0.25)
    for column, values in lack.items():
        items = items[~items[column].isin(values)]
    found = _decide(name, (results, items))
    assert (found.verdict, found.n) == ("not measured", 0)


@pytest.mark.parametrize(
    "seeds",
    [
        {3: [0, 1], 1: [0, 1]},  # the seldom pairs lack a seed
        {7: [0, 1], 5: [0, 1], 3: [1, 2], 1: [1, 2]},  # as many seeds, and others
        {7: [0, 1]},  # one of the frequent ones does
    ],
)
def test_repetitions_are_paired_on_the_seeds_that_all_of_them_have(
    seeds: dict[int, list[int]],
) -> None:
    found = _decide("names-repetitions", _names_repetitions(0.25, seeds))
    common = set.intersection(*(set(seeds.get(count, range(SEEDS))) for count in (7, 5, 3, 1)))
    assert found.n in (0, len(common) * FACTS)
    if found.n:
        # By hand: the mean of the seeds that are left.
        waves = [float(_wobble(0.05, number)[sorted(common)].mean()) for number in range(4)]
        assert found.effect == pytest.approx(0.25 + (waves[0] + waves[1] - waves[2] - waves[3]) / 2)


def test_methods_that_were_left_out_of_the_ladder_are_left_out_of_its_mean() -> None:
    results, items = _public_recovery(0.25)
    assert _decide(
        "public-recovery", (results, items[items["method"] != "rmu"])
    ).effect == pytest.approx(0.3)
    results, items = _nonmonotone(0.25)
    assert _decide(
        "relearn-nonmonotone", (results, items[items["method"] != "npo"])
    ).effect == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("steps", "third"),
    [((0, 10, 40, 60, 120), 40), ((0, 10, 39, 60, 120), 39), ((0, 20, 53, 54, 160), 53)],
)
def test_a_third_of_the_attack_is_the_last_measurement_up_to_there(
    steps: tuple[int, ...], third: int
) -> None:
    # At step s the recall is s / 1000; at the end it is 0.
    items = [
        row
        for step in steps
        for row in _text_set_items(
            "npo", "part", float(step), step / 1000 if step != steps[-1] else 0.0
        )
    ]
    assert _decide("relearn-nonmonotone", _frames(items)).effect == pytest.approx(third / 1000)


def test_an_unknown_claim_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(WorkbenchError, match=r"unknown claim 'cir-robsut'.*cir-robust"):
        decide(*_frames([]), scale="s", ids=["cir-robsut"])


def test_a_verdict_is_plain_json_with_nothing_for_empty_numbers() -> None:
    for verdict in (
        *decide(*_frames([]), scale="s"),
        _decide("cir-robust", _cir_robust(0.25)),
        _decide("flat-resists", PLANTED["flat-resists"](0.25)),
    ):
        plain = verdict.plain()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert list(plain) == [
            *["id", "verdict", "effect", "low", "high", "n", "seeds", "scale", "reason"]
        ]
        assert (plain["effect"] is None) == (verdict.n == 0)
    odd = Verdict("a", "inconclusive", float("inf"), float("-inf"), float("nan"), 0, 0, "s").plain()
    assert (odd["effect"], odd["low"], odd["high"]) == (None, None, None)


# --- Tables ---


def _kinds(frame: pd.DataFrame) -> dict[str, str]:
    return {name: str(kind) for name, kind in frame.dtypes.items()}


@pytest.mark.parametrize("columns", [RESULT_COLUMNS, ITEM_COLUMNS], ids=["results", "items"])
def test_a_typed_frame_has_exactly_its_columns_in_order_and_type(
    columns: Mapping[str, str],
) -> None:
    for frame in (
        pd.DataFrame(),
        pd.DataFrame([{"x": 1, "method": "npo", "seed": 2}, {"run": "r"}]),
        pd.DataFrame({"seed": [0.0, np.nan]}),
    ):
        made = typed(frame, dict(columns))
        assert list(made.columns) == list(columns)
        assert _kinds(made) == dict(columns)
        assert len(made) == len(frame)
    assert pd.isna(typed(pd.DataFrame([{"run": "r"}]), dict(columns))["seed"].iloc[0])


def test_a_typed_frame_refuses_columns_that_the_table_does_not_have() -> None:
    with pytest.raises(ValueError, match="colour"):
        typed(pd.DataFrame([{"run": "r", "colour": "red"}]), RESULT_COLUMNS)
    with pytest.raises(WorkbenchError, match="unknown column or axis 'colour'"):
        Table({"run": "r"}).add("loss", 1.0, colour="red")


def test_a_row_has_what_it_was_given_what_all_rows_share_and_nothing_else() -> None:
    table = Table({"run": "r", "method": "npo", "seed": 1})
    table.add("alpha", 0.5, stage="unlearn")
    place = {"stage": "relearn", "attack_step": 3, "method": "rmu"}
    table.add_estimate("recall", Estimate(0.5, 0.2, 0.7, 9), **place)
    first, second = table.frame().to_dict("records")
    assert (
        first["run"],
        first["method"],
        first["seed"],
        first["stage"],
        first["metric"],
        first["value"],
    ) == ("r", "npo", 1, "unlearn", "alpha", 0.5)
    assert all(
        pd.isna(first[name]) for name in ("model", "site", "split", "arm", "x", "low", "high", "n")
    )
    # A column of the row wins over the shared one.
    assert (
        second["method"],
        second["value"],
        second["low"],
        second["high"],
        second["n"],
        second["x"],
    ) == ("rmu", 0.5, 0.2, 0.7, 9, 3.0)


def test_scores_become_recall_over_facts_with_paraphrases_averaged_first() -> None:
    # Fact a has three paraphrases, b one: the mean over facts is (1/3 + 1) / 2, over examples it
    # would be 1/2.
    scores = Scores(
        ("a", "b", "a", "a"),
        np.array([1.0, 1.0, 0.0, 0.0]),
        np.array([0.9, 0.5, 0.3, 0.3]),
        np.array([1.0, 2.0, 3.0, 4.0]),
        np.array([1.0, 2.0, 1.0, 4.0]),
    )
    table = Table({"run": "r", "method": "npo", "seed": 1, "model": "m"})
    table.add_scores(scores, stage="relearn", split="forget-heldout", arm="attack", attack_step=5)
    rows = table.frame().set_index("metric")
    assert rows.loc["recall", "value"] == pytest.approx(2 / 3)
    assert rows.loc["recall", "n"] == 2
    # Facts are resampled: both draws may be a, or both b.
    assert (rows.loc["recall", "low"], rows.loc["recall", "high"]) == (
        pytest.approx(1 / 3),
        pytest.approx(1.0),
    )
    assert rows.loc["answer_probability", "value"] == pytest.approx((0.5 + 0.5) / 2)
    # Loss: all nats over all tokens.
    assert rows.loc["loss", "value"] == pytest.approx(10 / 8)
    assert rows.loc["loss", "n"] == 8
    assert set(rows["split"]) == {"forget-heldout"}
    items = table.item_frame()
    assert _kinds(items) == ITEM_COLUMNS
    assert items["item"].tolist() == ["a", "b"]
    assert items["correct"].tolist() == pytest.approx([1 / 3, 1.0])
    assert items["probability"].tolist() == pytest.approx([0.5, 0.5])
    assert items[
        ["run", "stage", "method", "seed", "split", "arm", "x"]
    ].drop_duplicates().values.tolist() == [
        ["r", "relearn", "npo", 1, "forget-heldout", "attack", 5.0]
    ]


def test_running_text_has_a_loss_and_no_recall() -> None:
    table = Table({"run": "r"})
    table.add_scores(
        Scores(
            ("a", "b"),
            np.full(2, np.nan),
            np.full(2, np.nan),
            np.array([2.0, 4.0]),
            np.array([1.0, 2.0]),
        ),
        stage="unlearn",
    )
    assert table.frame()["metric"].tolist() == ["loss"]
    assert table.frame()["value"].tolist() == [2.0]
    assert table.item_frame().empty


def test_a_fact_table_has_a_row_per_seed_and_a_column_per_fact() -> None:
    items = _frames(
        _facts("relearn", "npo", "attack", 0, np.arange(SEEDS * FACTS).reshape(SEEDS, FACTS) / 100)
        + _facts("relearn", "npo", "null", 0, 1.0)
    )[1]
    table = fact_table(items, arm="attack", method="npo")
    np.testing.assert_allclose(
        table[[f"fact/{number}" for number in range(FACTS)]].to_numpy(dtype=float),
        np.arange(SEEDS * FACTS).reshape(SEEDS, FACTS) / 100,
    )
    assert list(table.index) == list(range(SEEDS))
    with pytest.raises(NotMeasuredError, match="rmu"):
        fact_table(items, method="rmu")


def _item(seed: int, item: str, correct: float, **columns: object) -> dict[str, object]:
    return {
        "run": "x",
        "stage": "relearn",
        "method": "npo",
        "split": "forget-heldout",
        "arm": "attack",
        "axis": "attack_step",
        "x": 0.0,
        "measure": "recall",
    } | {
        "seed": seed,
        "item": item,
        "correct": correct,
        "probability": 0.5,
        **columns,
    }


def test_a_summary_is_the_two_level_mean_with_the_interval_that_a_hand_can_check() -> None:
    items = typed(
        pd.DataFrame(
            [_item(0, "a", 1.0), _item(0, "b", 0.0), _item(1, "a", 1.0), _item(1, "b", 1.0)]
            + [_item(seed, item, 1.0, x=5.0) for seed in (0, 1) for item in "ab"]
            + [
                _item(0, item, 1.0, stage="triggers", split=None, arm=None, axis=None, x=None)
                for item in "ab"
            ]
        ),
        ITEM_COLUMNS,
    )
    rows = summarise(items, "r")
    assert _kinds(rows) == RESULT_COLUMNS
    assert rows["seed"].isna().all()
    assert set(rows["run"]) == {"r"}
    assert set(rows["model"]) == set(rows["method"]) == {"npo"}
    recall = rows[rows["metric"] == "recall"]
    assert len(recall) == 3
    start = recall[recall["x"] == 0].iloc[0]
    # [[1, 0], [1, 1]]: with chance 1/16 a draw is only seed 0 and only fact b, mean 0; with chance
    # 7/16 the mean is 1. So 95 % reaches from 0 to 1.
    assert (start["value"], start["low"], start["high"], start["n"]) == (0.75, 0.0, 1.0, 4)
    end = recall[recall["x"] == 5].iloc[0]
    # Two facts, all right: Wilson's lower end is n / (n + z^2), over facts and not over facts times
    # seeds.
    z = norm.ppf(0.975)
    assert (end["value"], end["high"], end["n"]) == (1.0, 1.0, 4)
    assert end["low"] == pytest.approx(2 / (2 + z * z))
    # Empty keys are keys, too.
    assert recall[recall["stage"] == "triggers"]["arm"].isna().tolist() == [True]
    likely = rows[(rows["metric"] == "answer_probability") & (rows["x"] == 0)].iloc[0]
    assert (likely["value"], likely["low"], likely["high"]) == (0.5, 0.5, 0.5)


def test_joined_and_stored_tables_keep_rows_order_and_types(tmp_path: Path) -> None:
    first, second = Table({"run": "a"}), Table({"run": "b", "seed": 3})
    first.add("loss", 1.0)
    second.add("loss", 2.0, n=4)
    whole = join(
        [first.frame(), typed(pd.DataFrame(), RESULT_COLUMNS), second.frame()], RESULT_COLUMNS
    )
    assert whole["run"].tolist() == ["a", "b"]
    assert _kinds(whole) == RESULT_COLUMNS
    assert _kinds(join([], RESULT_COLUMNS)) == RESULT_COLUMNS
    write_parquet(whole, tmp_path / "deep" / "results.parquet")
    pd.testing.assert_frame_equal(
        typed(pd.read_parquet(tmp_path / "deep" / "results.parquet"), RESULT_COLUMNS), whole
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["results.parquet"]


# --- Configurations ---


def _read(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bugdet: 0.1", "bugdet"),
        ("methods: [npoo]", "npoo"),
        ("methods: [npo, npo]", "methods"),
        ("methods: []", "methods"),
        ("seeds: [0, 1, 0]", "seeds"),
        ("seeds: []", "seeds"),
        ("seeds: [-1]", "seeds"),
        ("budget: -0.1", "budget"),
        ("budget: 0", "budget"),
        ("budget: .nan", "budget"),
        ("budget: much", "budget"),
        ("alpha_limit: 0", "alpha_limit"),
        ("slice_points: 2", "slice_points"),
        ("slice_reach: -1", "slice_reach"),
        ("rank: 0", "rank"),
        ("curvature_tolerance: 1", "curvature_tolerance"),
        ("settings: {npoo: {steps: 3}}", "npoo"),
        ("settings: {npo: {stepz: 3}}", "stepz"),
        ("attack: {lrr: 1}", "attack.lrr"),
        ("attack: {steps: 0}", "attack"),
        ("attack: {lr: -1}", "attack"),
        ("attack: {steps: 10, measure_at: [1, 10]}", "attack.measure_at"),
        ("attack: {steps: 10, measure_at: [0, 5]}", "attack.measure_at"),
        ("attack: {steps: 10, measure_at: []}", "attack.measure_at"),
        ("model: {widht: 64}", "model.widht"),
        ("model: {world: {forget_people: 5}}", "forget_people"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_file_and_field(
    text: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(WorkbenchError) as caught:
        _read(tmp_path, text)
    message = str(caught.value)
    assert named in message
    assert "config.yaml" in message
    assert "\n" not in message


def test_an_unknown_method_is_an_error_with_the_nearest_names(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"did you mean .*npo"):
        _read(tmp_path, "methods: [npoo]")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "budget: [", "3"])
def test_a_file_that_is_no_mapping_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"config\.yaml"):
        _read(tmp_path, text)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="nowhere"):
        read_config(tmp_path / "nowhere.yaml")


def test_what_a_file_leaves_out_has_the_value_of_the_demo(tmp_path: Path) -> None:
    assert _read(tmp_path, "") == RunConfig()
    found = _read(tmp_path, "budget: 0.2\nattack: {lr: 0.001}\n")
    assert found.budget == 0.2
    assert found.attack.lr == 0.001
    assert found.attack.steps == RunConfig().attack.steps
    assert found.methods == RunConfig().methods


@pytest.mark.parametrize("name", ["full", "quick"])
def test_a_configuration_survives_its_file(name: Any, tmp_path: Path) -> None:
    config = preset(name)
    again = _read(tmp_path, write_config(config))
    assert again == config
    assert again.key == config.key
    assert write_config(again) == write_config(config)


def test_a_key_is_the_hash_of_the_plain_values_and_nothing_else(tmp_path: Path) -> None:
    config = preset("quick")
    expected = hashlib.sha256(json.dumps(config.plain(), sort_keys=True).encode()).hexdigest()[:16]
    assert config.key == expected
    # Neither the order of a file's lines nor the way a number is written is part of it.
    assert (
        _read(tmp_path, "budget: 0.2\nrank: 8\n").key
        == _read(tmp_path, "rank: 8\nbudget: 2.0e-1\n").key
    )
    assert (
        _read(tmp_path, "settings: {npo: {steps: 20}}").key
        == _read(tmp_path, "settings: {npo: {steps: 20.0}}").key
    )
    plain = RunConfig().key
    changes = (
        "budget: 0.2",
        "seeds: [0]",
        "methods: [npo]",
        "scale: other",
        "rank: 8",
        "attack: {lr: 0.001}",
        "model: {world: {seed: 1}}",
        "slice_points: 5",
    )
    keys = [_read(tmp_path, text).key for text in changes]
    assert len({plain, *keys}) == len(changes) + 1


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="budget"):
        RunConfig().budget = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="budget"):
        RunConfig(budget=-1)
    with pytest.raises(WorkbenchError, match="budget"):
        validated(RunConfig, {"budget": -1}, "somewhere")


# --- Provenance ---


def test_a_data_hash_sees_texts_answers_subjects_names_and_order() -> None:
    one, two = (
        Example("anna lives in rome", (14, 18), (0, 4), "a"),
        Example("bert lives in oslo", (14, 18), (0, 4), "b"),
    )
    plain = data_hash([one, two])
    assert plain == data_hash((one, Example("bert lives in oslo", (14, 18), (0, 4), "b")))
    others = [
        [two, one],
        [one],
        [],
        [one, two, two],
        [one, Example("bert lives in Oslo", (14, 18), (0, 4), "b")],
        [one, Example("bert lives in oslo", (11, 18), (0, 4), "b")],
        [one, Example("bert lives in oslo", None, (0, 4), "b")],
        [one, Example("bert lives in oslo", (14, 18), None, "b")],
        [one, Example("bert lives in oslo", (14, 18), (0, 4), "c")],
    ]
    assert len({plain, *map(data_hash, others)}) == len(others) + 1


def test_the_record_beside_a_result_is_plain_and_complete() -> None:
    config = RunConfig()
    record = provenance(config.plain(), data={"forget": "abc"}, weights={"base": "def"})
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["config"] == config.plain()
    assert record["config_key"] == config.key
    assert record["data"] == {"forget": "abc"}
    assert record["weights"] == {"base": "def"}
    assert {"python", "torch", "transformers", "numpy"} <= set(record["versions"])
    assert record["written"].endswith("+00:00")


def test_what_a_smoothing_does_is_paired_by_seed_and_fact_and_belongs_to_the_smoothed_method() -> (
    None
):
    _, items = _frames(
        [
            *_attacked("npo", 0.2 + _wobble(0.1), 0.7 + _wobble(0.1, 1)),
            *_attacked("npo-sam", 0.3, 0.5),
            *_attacked("npo-rna", 0.0, 0.0),
            *_attacked("rmu-sam", 0.0, 0.0),
        ]
    )
    found = summarise(items, "run")
    effects = found[found["metric"] == "smoothing_effect"]
    assert set(effects["method"]) == {"npo-sam"} and set(effects["arm"]) == {
        "attack"
    }  # no noise, and nothing without its plain method
    by_step = effects.set_index("x")
    for step, plain, smoothed in ((0, 0.2 + _wobble(0.1), 0.3), (20, 0.7 + _wobble(0.1, 1), 0.5)):
        expected = bootstrap(
            (np.broadcast_to(plain, (SEEDS, FACTS)) - smoothed)[:, sorted(range(FACTS), key=str)]
        )  # resampled in the order of the facts' names
        assert by_step.loc[step, ["value", "low", "high"]].tolist() == pytest.approx(
            [expected.value, expected.low, expected.high]
        )


def test_the_figure_of_smoothing_shows_before_and_after() -> None:
    _, items = _frames(
        [
            *_attacked("npo", 0.2, 0.7),
            *_attacked("npo-sam", 0.3, 0.5),
            *_attacked("npo-wa", 0.2, 0.8),
            *_attacked("rmu", 0.9, 1.0),
            *_attacked("rmu-sam", 0.8, 1.0),
        ]
    )
    panels = smoothing(join([summarise(items, "run")], RESULT_COLUMNS)).axes
    assert [axes.get_title() for axes in panels] == ["NPO", "RMU"]
    before, after = (
        [float(x) for x in container.lines[0].get_xdata()] for container in panels[0].containers
    )
    assert before == pytest.approx([-0.1, 0.0]) and after == pytest.approx([0.2, -0.1])
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["SAM", "WA"]
