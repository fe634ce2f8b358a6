"""What a change of weights costs: a ratio with its standard error, sums text by text, and
disruption ring by ring, all against direct sums.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import Batch
from workbench.data.records import Example, ForgetRetain
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import (
    cross_entropy,
    kl_by_text,
    mean_kl,
    next_token_logits,
    nll_by_text,
)
from workbench.evaluation.statistics import ratio
from workbench.runs.setup import DISRUPTION_MEASURES, Disruption, DisruptionMeasure, Setup

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]

Z = float(norm.ppf(0.975))

# --- the ratio estimator --------------------------------------------------------------------------


def test_a_ratio_by_hand() -> None:
    # r = 9 / 6; residuals -1/2, -1, 3/2 with squares 7/2; s = sqrt(3/2 * 7/2) / 6.
    found = ratio(np.array([1.0, 2.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    error = math.sqrt(21) / 12
    assert found.value == 1.5 and found.n == 3
    assert (found.low, found.high) == pytest.approx((1.5 - Z * error, 1.5 + Z * error), rel=1e-12)


def test_counts_may_be_whole_numbers_and_sums_may_be_negative() -> None:
    # r = -1 / 4; residuals -1/2, 1/2.
    found = ratio(np.array([-1, 0]), np.array([2, 2]))
    error = math.sqrt(2 * 0.5) / 4
    assert (found.value, found.low, found.high) == pytest.approx(
        (-0.25, -0.25 - Z * error, -0.25 + Z * error), rel=1e-12
    )


def test_equal_denominators_give_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 50)
    found = ratio(7.0 * values, np.full(50, 7.0))
    error = values.std(ddof=1) / math.sqrt(50)
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - Z * error, values.mean() + Z * error), rel=1e-12
    )


def test_texts_that_all_have_the_same_ratio_leave_no_doubt() -> None:
    found = ratio(np.array([2.0, 4.0, 10.0]), np.array([1.0, 2.0, 5.0]))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


@given(
    factor=st.floats(0.01, 100),
    confidence=st.sampled_from([0.5, 0.9, 0.99]),
    seed=st.integers(0, 100),
)
def test_a_ratio_scales_and_widens_as_a_normal_interval(
    factor: float, confidence: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tokens, sums = rng.integers(1, 40, 12), rng.normal(1.0, 5.0, 12)
    plain, scaled = ratio(sums, tokens), ratio(factor * sums, tokens, confidence=confidence)
    assert scaled.value == pytest.approx(factor * plain.value, rel=1e-9)
    wider = float(norm.ppf(0.5 + confidence / 2)) / Z
    assert scaled.high - scaled.low == pytest.approx(
        factor * wider * (plain.high - plain.low), rel=1e-9
    )
    assert scaled.high + scaled.low == pytest.approx(2 * scaled.value, rel=1e-9, abs=1e-9)
    order = rng.permutation(12)
    assert tuple(ratio(sums[order], tokens[order])) == pytest.approx(tuple(plain), rel=1e-9)


def _long_and_short(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts whose nats grow with their tokens, with noise that does so too."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 60, n)
    return 0.4 * tokens + rng.normal(0, 0.1, n) * tokens + rng.normal(0, 1, n), tokens


def test_the_standard_error_agrees_with_the_jackknife_and_the_bootstrap() -> None:
    sums, tokens = _long_and_short(0, 2000)
    found = ratio(sums, tokens)
    error = (found.high - found.low) / (2 * Z)
    without = (sums.sum() - sums) / (tokens.sum() - tokens)
    jackknife = math.sqrt((len(sums) - 1) / len(sums) * ((without - without.mean()) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.01)
    draws = np.random.default_rng(1).integers(0, len(sums), (1000, len(sums)))
    again = sums[draws].sum(1) / tokens[draws].sum(1)
    assert error == pytest.approx(again.std(), rel=0.1)
    # A mean of the texts' own means would be another number.
    assert found.value == sums.sum() / tokens.sum() != (sums / tokens).mean()


def test_the_interval_covers_the_truth_in_95_of_100_samples() -> None:
    covered = [
        found.low <= 0.4 <= found.high
        for found in (ratio(*_long_and_short(seed, 200)) for seed in range(1, 1001))
    ]
    assert 0.93 <= np.mean(covered) <= 0.97  # the standard error of the share is 0.007


def test_a_single_text_has_a_value_and_no_interval() -> None:
    found = ratio(np.array([3.0]), np.array([4.0]))
    assert found.value == 0.75 and found.n == 1
    assert math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize(
    ("numerators", "denominators"),
    [
        ([], []),
        ([1.0, 2.0], [1.0]),
        ([[1.0, 2.0]], [[1.0, 2.0]]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([1.0, 2.0], [1.0, -2.0]),
        ([1.0], [float("nan")]),
    ],
)
def test_a_ratio_of_nothing_is_refused(numerators: list[float], denominators: list[float]) -> None:
    with pytest.raises(ValueError, match="ratio"):
        ratio(np.array(numerators), np.array(denominators))


def test_a_broken_text_makes_the_ratio_nan_and_not_quietly_smaller() -> None:
    assert math.isnan(ratio(np.array([1.0, float("nan")]), np.array([1.0, 1.0])).value)


# --- sums text by text ----------------------------------------------------------------------------


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """``[position - 1, vocabulary]`` float64 log-probabilities of the next token; ``ids`` is one
    text without padding.
    """
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)


def _row(batch: Batch, row: int) -> tuple[Tensor, Tensor]:
    """The ids of one text without its padding, and which of its tokens but the first are
    targets.
    """
    length = int(batch.attention_mask[row].sum())
    return batch.input_ids[row, :length], batch.target_mask[row, 1:length]


def _nll_by_hand(model: PreTrainedModel, ids: Tensor, counted: Tensor | None = None) -> float:
    by_token = -_log_probabilities(model, ids).gather(1, ids[1:, None])[:, 0]
    return float(by_token.sum() if counted is None else by_token[counted].sum())


def _kl_by_hand(
    reference: PreTrainedModel, model: PreTrainedModel, ids: Tensor, counted: Tensor | None = None
) -> float:
    p, q = _log_probabilities(reference, ids), _log_probabilities(model, ids)
    by_token = (p.exp() * (p - q)).sum(-1)
    return float(by_token.sum() if counted is None else by_token[counted].sum())


def _logits(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    with torch.no_grad():
        return [next_token_logits(model, batch) for batch in batches]


def _rows(batch: Batch, rows: Sequence[int], pad: Padder) -> Batch:
    """Some rows of a batch, cut to their longest text and padded by two columns of ordinary
    tokens.
    """
    chosen = list(rows)
    width = int(batch.attention_mask[chosen].sum(1).max())
    masks = {
        name: getattr(batch, name)[chosen, :width]
        for name in ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
    }
    return pad(replace(batch, **masks, items=tuple(batch.items[row] for row in chosen)), columns=2)


@pytest.mark.parametrize("targets", ["text", "answer"])
def test_sums_by_text_are_float64_sums_over_the_targets_of_each_text(
    targets: str, llama: PreTrainedModel, nearby: Mover, make_batch: BatchMaker, pad: Padder
) -> None:
    parts = [
        pad(make_batch((9, 4, 7), seed=1, targets=targets)),
        make_batch((5, 12), seed=2, targets=targets),
    ]
    model = nearby(llama)
    rows = [_row(batch, row) for batch in parts for row in range(batch.size)]
    nats, tokens = nll_by_text(model, parts)
    assert nats.dtype == np.float64 and nats.shape == tokens.shape == (5,)
    assert tokens.tolist() == ([8, 3, 6, 4, 11] if targets == "text" else [2] * 5)
    np.testing.assert_allclose(nats, [_nll_by_hand(model, *row) for row in rows], rtol=2e-6)
    divergence, same = kl_by_text(model, parts, _logits(llama, parts))
    assert divergence.dtype == np.float64 and same.tolist() == tokens.tolist()
    np.testing.assert_allclose(
        divergence, [_kl_by_hand(llama, model, *row) for row in rows], rtol=2e-5, atol=2e-6
    )
    assert (divergence > 1e-3).all()  # or the comparison above would say little
    assert mean_kl(model, parts, _logits(llama, parts)) == pytest.approx(
        divergence.sum() / tokens.sum(), rel=1e-12
    )


def test_scattered_targets_are_counted_alone_and_a_text_without_any_counts_nothing(
    llama: PreTrainedModel, nearby: Mover, batch: Batch
) -> None:
    mask = torch.zeros_like(batch.target_mask)
    mask[0, [2, 5]], mask[2, 1] = True, True
    scattered, model = replace(batch, target_mask=mask), nearby(llama)
    rows = [_row(scattered, row) for row in range(3)]
    for (sums, tokens), expected in (
        (nll_by_text(model, [scattered]), [_nll_by_hand(model, *row) for row in rows]),
        (
            kl_by_text(model, [scattered], _logits(llama, [scattered])),
            [_kl_by_hand(llama, model, *row) for row in rows],
        ),
    ):
        assert tokens.tolist() == [2, 0, 1]
        np.testing.assert_allclose(sums, expected, rtol=2e-5, atol=2e-6)
        assert sums[1] == 0.0


def test_the_divergence_runs_from_the_reference_to_the_model(
    llama: PreTrainedModel, nearby: Mover, batch: Batch
) -> None:
    model = nearby(llama, size=0.2)
    there, _ = kl_by_text(model, [batch], _logits(llama, [batch]))
    back, _ = kl_by_text(llama, [batch], _logits(model, [batch]))
    np.testing.assert_allclose(
        there, [_kl_by_hand(llama, model, _row(batch, row)[0]) for row in range(3)], rtol=2e-5
    )
    assert (np.abs(there - back) > 1e-3).any()


def test_a_broken_token_outside_the_targets_breaks_nothing(
    llama: PreTrainedModel, nearby: Mover, batch: Batch, pad: Padder
) -> None:
    padded, model = pad(batch), nearby(llama)
    reference = _logits(llama, [batch])
    broken = [torch.nn.functional.pad(reference[0], (0, 0, 0, 3), value=float("nan"))]
    np.testing.assert_allclose(
        kl_by_text(model, [padded], broken)[0],
        kl_by_text(model, [batch], reference)[0],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "split", [[[0], [1], [2], [3], [4], [5]], [[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3, 4], [5]]]
)
def test_sums_by_text_do_not_depend_on_the_company_of_a_text(
    split: list[list[int]],
    llama: PreTrainedModel,
    nearby: Mover,
    make_batch: BatchMaker,
    pad: Padder,
) -> None:
    whole = make_batch((9, 4, 7, 12, 5, 6), seed=3)
    parts, model = [_rows(whole, rows, pad) for rows in split], nearby(llama)
    for together, apart in (
        (nll_by_text(model, [whole]), nll_by_text(model, parts)),
        (
            kl_by_text(model, [whole], _logits(llama, [whole])),
            kl_by_text(model, parts, _logits(llama, parts)),
        ),
    ):
        np.testing.assert_array_equal(together[1], apart[1])
        np.testing.assert_allclose(together[0], apart[0], rtol=1e-5, atol=2e-6)


def test_the_divergence_of_a_model_from_itself_is_exactly_zero(
    llama: PreTrainedModel, batch: Batch
) -> None:
    sums, tokens = kl_by_text(llama, [batch], _logits(llama, [batch]))
    assert sums.tolist() == [0.0, 0.0, 0.0] and tokens.tolist() == [6, 4, 5]


def test_every_batch_needs_its_reference(llama: PreTrainedModel, batch: Batch) -> None:
    with pytest.raises(ValueError):
        kl_by_text(llama, [batch, batch], _logits(llama, [batch]))


# --- disruption, ring by ring ---------------------------------------------------------------------

WORDS = "anna bert carl dora emil frida lives in rome oslo bonn lima paris turin comes from the old harbour sells salt wool amber and silver fish .".split()  # noqa: E501, SIM905
TOWNS = {
    "anna": "rome",
    "bert": "oslo",
    "carl": "bonn",
    "dora": "lima",
    "emil": "paris",
    "frida": "turin",
}


def _facts() -> tuple[Example, ...]:
    """Two sentences about the town of each person."""
    found = []
    for person, town in TOWNS.items():
        for text in (f"{person} lives in {town} .", f"{person} comes from the old town {town} ."):
            start = text.index(town)
            found.append(
                Example(text, (start, start + len(town)), (0, len(person)), f"{person}/town")
            )
    return tuple(found)


def _running(count: int, seed: int) -> tuple[Example, ...]:
    rng = np.random.default_rng(seed)
    return tuple(
        Example(" ".join(rng.choice(WORDS, rng.integers(3, 15))), item=f"text/{number}")
        for number in range(count)
    )


RINGS = {"retain-neighbour": _facts(), "retain-far": _running(9, 0), "general": _running(270, 1)}
TESTED: dict[str, tuple[str, ...]] = {
    # every other person; which of the sentences turns from person to person
    "retain-neighbour": (
        "bert lives in oslo .",
        "dora comes from the old town lima .",
        "frida lives in turin .",
    ),
    "retain-far": tuple(example.text for example in RINGS["retain-far"][1::2]),
    "general": tuple(
        example.text for example in RINGS["general"][1::2]
    ),  # 135 texts: more than one evaluation batch
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(WORDS, 64)


@pytest.fixture
def setup(tokenizer: PreTrainedTokenizerBase, make_model: ModelMaker) -> Setup:
    """A random model with three rings of retain texts, unequal in size and in the length of their
    texts.
    """
    forget = (Example("the old fish ."),)
    return Setup(
        make_model(vocab_size=len(tokenizer)),
        tokenizer,
        ForgetRetain("rings", forget, forget, RINGS),
    )


@pytest.fixture
def changed(setup: Setup, nearby: Mover) -> PreTrainedModel:
    """A model away from the base, further than rounding."""
    return nearby(setup.base, size=0.1)


def _by_hand(
    setup: Setup, model: PreTrainedModel, ring: str, measure: DisruptionMeasure
) -> tuple[np.ndarray, np.ndarray]:
    """Cost and what it is divided by, of every test text of a ring: each text alone, in float64."""
    ids = [torch.tensor(setup.tokenizer(text)["input_ids"]) for text in TESTED[ring]]
    if measure == "kl":
        return np.array([_kl_by_hand(setup.base, model, text) for text in ids]), np.array(
            [len(text) - 1 for text in ids]
        )
    before, after = (
        np.array([_nll_by_hand(one, text) for text in ids]) for one in (setup.base, model)
    )
    return after - before, before


def _expected(
    setup: Setup, model: PreTrainedModel, ring: str, measure: DisruptionMeasure
) -> tuple[float, float]:
    """Value and standard error of one ring."""
    cost, size = _by_hand(setup, model, ring, measure)
    value, n = cost.sum() / size.sum(), len(cost)
    return float(value), float(
        np.sqrt(n / (n - 1) * ((cost - value * size) ** 2).sum()) / size.sum()
    )


@pytest.mark.parametrize("measure", DISRUPTION_MEASURES)
def test_disruption_by_ring_is_that_of_the_tested_half_by_a_direct_sum(
    measure: DisruptionMeasure, setup: Setup, changed: PreTrainedModel
) -> None:
    found = Disruption(setup, measure).by_set(changed)
    assert list(found) == list(RINGS)
    for ring, one in found.items():
        value, error = _expected(setup, changed, ring, measure)
        assert one.value == pytest.approx(value, rel=1e-4) and abs(value) > 1e-3
        assert (one.high - one.low) / 2 == pytest.approx(Z * error, rel=1e-3)
        assert one.high + one.low == pytest.approx(2 * one.value, rel=1e-9)
        assert one.n == len(TESTED[ring])


def test_the_rise_of_the_loss_is_a_share_of_the_bases_loss(
    setup: Setup, changed: PreTrainedModel
) -> None:
    found = Disruption(setup, "loss-rise").by_set(changed)
    for ring, texts in TESTED.items():
        ids = [torch.tensor(setup.tokenizer(text)["input_ids"]) for text in texts]
        tokens = sum(len(text) - 1 for text in ids)
        before, after = (
            sum(_nll_by_hand(model, text) for text in ids) / tokens
            for model in (setup.base, changed)
        )
        assert found[ring].value == pytest.approx((after - before) / before, rel=1e-4)


def test_a_change_that_helps_lowers_the_loss_and_not_the_divergence(setup: Setup) -> None:
    model = copy.deepcopy(setup.base)
    batch = setup.encode([Example(text) for texts in TESTED.values() for text in texts], rows=200)[
        0
    ]
    for _ in range(3):
        cross_entropy(model, batch).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    assert Disruption(setup, "loss-rise")(model) < 0 < Disruption(setup, "kl")(model)


@pytest.mark.parametrize("measure", DISRUPTION_MEASURES)
def test_the_base_itself_costs_nothing(measure: DisruptionMeasure, setup: Setup) -> None:
    disruption = Disruption(setup, measure)
    assert disruption(setup.base) == 0.0
    for one in (
        *disruption.by_set(setup.base).values(),
        disruption.estimate(copy.deepcopy(setup.base)),
    ):
        assert (one.value, one.low, one.high) == (0.0, 0.0, 0.0)


def test_the_base_of_record_is_the_base_at_the_start(
    setup: Setup, changed: PreTrainedModel
) -> None:
    disruption = Disruption(setup)
    before = disruption(changed)
    setup.base.load_state_dict(changed.state_dict())
    assert disruption(changed) == before > 0


@pytest.mark.parametrize("measure", DISRUPTION_MEASURES)
@pytest.mark.parametrize("rings", [(), ("general",), ("retain-far", "retain-neighbour")])
def test_every_chosen_ring_counts_the_same_whatever_its_size(
    measure: DisruptionMeasure, rings: tuple[str, ...], setup: Setup, changed: PreTrainedModel
) -> None:
    disruption = Disruption(setup, measure, rings)
    chosen = rings or tuple(RINGS)
    assert disruption.counted == chosen
    parts = [_expected(setup, changed, ring, measure) for ring in chosen]
    value = sum(value for value, _ in parts) / len(parts)
    error = math.sqrt(sum(error**2 for _, error in parts)) / len(
        parts
    )  # of a mean of independent numbers
    found = disruption.estimate(changed)
    assert found.value == pytest.approx(value, rel=1e-4) and disruption(changed) == found.value
    assert (found.value - found.low, found.high - found.value) == pytest.approx(
        (Z * error, Z * error), rel=1e-3
    )
    assert found.n == sum(len(TESTED[ring]) for ring in chosen)
    assert list(disruption.by_set(changed)) == list(
        RINGS
    )  # what does not count is reported all the same


def test_either_measure_can_be_asked_of_either_disruption(
    setup: Setup, changed: PreTrainedModel
) -> None:
    both = {measure: Disruption(setup, measure) for measure in DISRUPTION_MEASURES}
    for asked in DISRUPTION_MEASURES:
        for disruption in both.values():
            assert disruption.by_set(changed, asked) == both[asked].by_set(changed)


@pytest.mark.parametrize("measure", DISRUPTION_MEASURES)
def test_disruption_is_the_same_number_every_time(
    measure: DisruptionMeasure, setup: Setup, changed: PreTrainedModel
) -> None:
    weights = {name: value.clone() for name, value in changed.state_dict().items()}
    disruption = Disruption(setup, measure)
    torch.manual_seed(1)
    first, rings = disruption.estimate(changed), disruption.by_set(changed)
    torch.manual_seed(2)
    assert disruption.estimate(changed) == first and disruption.by_set(changed) == rings
    assert Disruption(setup, measure).estimate(changed) == first
    assert all(torch.equal(value, weights[name]) for name, value in changed.state_dict().items())
    assert all(
        parameter.grad is None for parameter in (*changed.parameters(), *setup.base.parameters())
    )


def test_an_unknown_ring_names_the_nearest(setup: Setup) -> None:
    with pytest.raises(
        WorkbenchError, match="unknown retain set 'retain-fra': did you mean retain-far"
    ):
        Disruption(setup, "kl", ("general", "retain-fra"))
    with pytest.raises(
        WorkbenchError,
        match="unknown retain set 'x': choose one of general, retain-far, retain-neighbour",
    ):
        Disruption(setup, "kl", ("x",))


def test_a_ring_named_twice_counts_once(setup: Setup, changed: PreTrainedModel) -> None:
    # "Every ring counts the same", and a ring is not independent of itself.
    once = Disruption(setup, "kl", ("general", "retain-far")).estimate(changed)
    alone = Disruption(setup, "kl", ("general",)).estimate(changed)
    try:
        twice = Disruption(setup, "kl", ("general", "retain-far", "general"))
        same = Disruption(setup, "kl", ("general", "general"))
    except (WorkbenchError, ValueError):
        return  # to refuse it is as good
    assert tuple(twice.estimate(changed)) == pytest.approx(tuple(once))
    assert tuple(same.estimate(changed)) == pytest.approx(tuple(alone))


def test_a_ring_without_a_test_text_is_left_out_and_nothing_at_all_is_an_error(
    setup: Setup, changed: PreTrainedModel
) -> None:
    lonely = {
        "retain-far": RINGS["retain-far"],
        "general": RINGS["general"][:1],
    }  # one text: its only half may be trained on
    partly = replace(setup, record=replace(setup.record, retain=lonely))
    found = Disruption(partly)
    assert list(found.by_set(changed)) == ["retain-far"]
    assert tuple(found.estimate(changed)) == pytest.approx(
        tuple(Disruption(setup, "kl", ("retain-far",)).estimate(changed))
    )
    for rings, retain in (
        ((), {"general": RINGS["general"][:1]}),
        ((), {}),
        (("general",), lonely),
    ):
        with pytest.raises(WorkbenchError, match="no retain text"):
            Disruption(replace(setup, record=replace(setup.record, retain=retain)), "kl", rings)


@pytest.mark.parametrize("measure", DISRUPTION_MEASURES)
def test_a_ruined_model_costs_nan_and_not_nothing(measure: DisruptionMeasure, setup: Setup) -> None:
    ruined = copy.deepcopy(setup.base)
    with torch.no_grad():
        ruined.get_submodule("model.norm").weight[0] = float("nan")
    assert math.isnan(Disruption(setup, measure)(ruined))
