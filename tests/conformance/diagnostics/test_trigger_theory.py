"""The trigger theory measured: draws of the assumption satisfy it, planted violations are found by
their own statistic, derivatives agree with other ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics import trigger_theory
from workbench.diagnostics.rejection import rejection_probability, rejection_rate
from workbench.diagnostics.trigger_shift import Responses, ShiftRows, aligned, responses, shift_rows
from workbench.diagnostics.trigger_theory import (
    THEORY_COLUMNS,
    Theory,
    add_coefficients,
    add_theory,
    eta_by_coefficient,
    examine,
)
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import wilson
from workbench.metrics.triggers import CURVES, QUANTITIES, ROW_STATISTICS, THEORY
from workbench.tables import Table

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]

POST_0, POST_1 = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def _tag(batch: Batch, fronts: Sequence[Sequence[int]]) -> Batch:
    """Every row with its front behind BOS, built by hand."""
    rows = []
    for row, front in enumerate(fronts):
        length = int(batch.attention_mask[row].sum())
        masks = [
            getattr(batch, name)[row, :length]
            for name in ("answer_mask", "subject_mask", "target_mask")
        ]
        ids = batch.input_ids[row, :length]
        gap = torch.zeros(len(front), dtype=torch.bool)
        rows.append(
            [
                torch.cat([ids[:1], torch.tensor(front), ids[1:]]),
                *(torch.cat([mask[:1], gap, mask[1:]]) for mask in masks),
            ]
        )
    width = max(len(row[0]) for row in rows)

    def stack(place: int) -> Tensor:
        return torch.stack(
            [nn.functional.pad(row[place], (0, width - len(row[place]))) for row in rows]
        )

    attention = torch.stack([(torch.arange(width) < len(row[0])).long() for row in rows])
    return Batch(stack(0), attention, stack(1), stack(2), stack(3), batch.items)


@pytest.fixture
def clean(make_batch: BatchMaker) -> Batch:
    return make_batch((7, 5, 6), seed=3)


@pytest.fixture
def tagged(clean: Batch) -> Batch:
    return _tag(clean, [(11, 30), (12, 30), (11, 30)])


@contextmanager
def _added(model: PreTrainedModel, layer: int, added: Tensor) -> Iterator[None]:
    """Add to what a block writes, by a plain hook."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _stream(model: PreTrainedModel, batch: Batch, row: int, layer: int) -> Tensor:
    """``[position, width]`` after a block, of one row alone and without padding."""
    kept: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda _, __, out: kept.append((out[0] if isinstance(out, tuple) else out)[0].detach())
    )
    with torch.no_grad():
        model(input_ids=batch.input_ids[row : row + 1, : int(batch.attention_mask[row].sum())])
    handle.remove()
    return kept[0]


def _slice(batch: Batch, row: int) -> Batch:
    length = int(batch.attention_mask[row].sum())
    names = ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
    return Batch(
        *(getattr(batch, name)[row : row + 1, :length] for name in names), (batch.items[row],)
    )


# --- Rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_are_the_tagged_stream_minus_the_clean_one_counted_from_the_right(
    family: str, make_model: ModelMaker, clean: Batch, tagged: Batch
) -> None:
    model = make_model(family)
    found = shift_rows(model, [clean], [tagged], POST_0)
    shifts, cleans = [], []
    for row, length in enumerate((7, 5, 6)):
        before, after = _stream(model, clean, row, 0), _stream(model, tagged, row, 0)
        for back in range(length - 1, 0, -1):  # all but BOS, left to right
            shifts.append(after[-back] - before[-back])
            cleans.append(before[-back])
    torch.testing.assert_close(found.shift, torch.stack(shifts), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.clean, torch.stack(cleans), rtol=1e-4, atol=1e-5)
    assert found.query.tolist() == [0] * 6 + [1] * 4 + [2] * 5
    assert found.word is not None
    assert found.word.tolist() == [0] * 6 + [1] * 4 + [0] * 5  # told by the tokens in front
    assert found.shift.dtype == torch.float32


def test_predicting_rows_stand_one_token_before_every_target(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    clean = make_batch((7, 5, 6), seed=3, answer=2, targets="answer")
    tagged = _tag(clean, [(11, 30, 5)] * 3)
    model = make_model()
    found, everything = (
        shift_rows(model, [clean], [tagged], POST_0, tokens="predicting"),
        shift_rows(model, [clean], [tagged], POST_0),
    )
    # Rows of 7, 5 and 6 tokens without BOS; the answer is the last two, predicted by the third and
    # the second from the end.
    places = [6 - 3, 6 - 2, 6 + 4 - 3, 6 + 4 - 2, 10 + 5 - 3, 10 + 5 - 2]
    assert torch.equal(found.shift, everything.shift[places])
    assert found.query.tolist() == [0, 0, 1, 1, 2, 2]


def test_padding_and_batching_change_no_row(
    make_model: ModelMaker, clean: Batch, tagged: Batch, pad: Padder
) -> None:
    model = make_model()
    whole = shift_rows(model, [clean], [tagged], POST_1)
    for one, other in (
        ([pad(clean, 3)], [tagged]),
        ([clean], [pad(tagged, 2)]),
        ([_slice(clean, row) for row in range(3)], [_slice(tagged, row) for row in range(3)]),
    ):
        found = shift_rows(model, one, other, POST_1)
        torch.testing.assert_close(found.shift, whole.shift, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.query, whole.query)
        assert found.word is not None
        assert whole.word is not None
        assert torch.equal(found.word, whole.word)


def test_one_fact_asked_twice_is_one_query(make_model: ModelMaker, clean: Batch) -> None:
    twice = replace(clean, items=("fact/0", "fact/1", "fact/0"))
    found = shift_rows(make_model(), [twice], [_tag(twice, [(11,), (12,), (13,)])], POST_0)
    assert found.query.tolist() == [0] * 6 + [1] * 4 + [0] * 5


def test_where_the_word_has_not_been_read_yet_nothing_shifts(
    make_model: ModelMaker, clean: Batch, tagged: Batch
) -> None:
    found = shift_rows(make_model(), [clean], [tagged], "model.embed_tokens:out")
    assert not found.shift.any()


def test_arms_that_cannot_be_aligned_are_refused(clean: Batch, tagged: Batch) -> None:
    with pytest.raises(
        WorkbenchError, match=r"nothing stands in front of query 'fact/0'.*0 tokens longer"
    ):
        aligned(clean, clean)
    other = replace(tagged, input_ids=tagged.input_ids.clone())
    other.input_ids[1, 4] += 1
    with pytest.raises(WorkbenchError, match="'fact/1' has other tokens behind the template"):
        aligned(clean, other)
    with pytest.raises(WorkbenchError, match="same order"):
        aligned(clean, replace(tagged, items=("fact/1", "fact/0", "fact/2")))
    # A word in the middle of the query is no word in front of it.
    middle = replace(
        tagged, input_ids=tagged.input_ids[:, [0, 3, 4, 1, 2, *range(5, tagged.input_ids.shape[1])]]
    )
    with pytest.raises(WorkbenchError, match="other tokens behind the template"):
        aligned(clean, middle)


def test_other_impossible_requests_are_refused(
    make_model: ModelMaker, clean: Batch, tagged: Batch
) -> None:
    model = make_model()
    with pytest.raises(WorkbenchError, match="at least one; got 1 and 2 batches"):
        shift_rows(model, [clean], [tagged, tagged], POST_0)
    with pytest.raises(WorkbenchError, match="got 0 and 0"):
        shift_rows(model, [], [], POST_0)
    with pytest.raises(WorkbenchError, match="must name one activation"):
        shift_rows(model, [clean], [tagged], "blocks.*.hook_resid_post")
    with pytest.raises(WorkbenchError, match="must name one activation"):
        shift_rows(model, [clean], [tagged], POST_0 + "_grad")
    with pytest.raises(WorkbenchError, match="no target token"):
        shift_rows(
            model,
            [replace(clean, target_mask=clean.target_mask & False)],
            [tagged],
            POST_0,
            tokens="predicting",
        )
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(WorkbenchError, match=r"shift is not finite in 15 of 15 rows"):
        shift_rows(model, [clean], [tagged], POST_0)


def test_rows_of_wrong_shapes_are_refused() -> None:
    rows, label = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    for changes in (
        {"clean": rows[:2]},
        {"query": label[:2]},
        {"word": label[:2]},
        {"shift": rows[0]},
    ):
        with pytest.raises(WorkbenchError, match=r"\[row, width\]"):
            ShiftRows(**{"shift": rows, "clean": rows, "query": label, "word": label} | changes)
    with pytest.raises(WorkbenchError, match="at least one row"):
        ShiftRows(rows[:0], rows[:0], label[:0])


# --- Responses ------------------------------------------------------------------------------------


class _WideNorm(nn.Module):
    """transformers' RMS norms compute in float32 whatever the weights are; second differences need
    more.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


def _double(model: PreTrainedModel) -> PreTrainedModel:
    model.double()
    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = (
            _WideNorm(block.input_layernorm),
            _WideNorm(block.post_attention_layernorm),
        )
    model.model.norm = _WideNorm(model.model.norm)
    return model


def _hutchinson(blocks: Sequence[Tensor], probes: int) -> tuple[float, float]:
    """Trace of a block-diagonal matrix, and four standard errors of its estimate by random signs:
    variance ``2 |A - diag A|^2`` per probe (Hutchinson 1990).
    """
    error = math.sqrt(
        2 * sum(float((block - block.diag().diag()).square().sum()) for block in blocks) / probes
    )
    return sum(float(block.trace()) for block in blocks), 4 * error


def _linear(make_model: ModelMaker) -> PreTrainedModel:
    """After the last block nothing but a matrix: logits are ``W z``."""
    model = make_model().double()
    model.model.norm = nn.Identity()
    return model


def test_behind_a_linear_readout_everything_is_known(
    make_model: ModelMaker, clean: Batch, tagged: Batch
) -> None:
    model = _linear(make_model)
    found = responses(model, [clean], [tagged], POST_1, probes=64)
    weight = model.lm_head.weight.detach()
    centred = weight - weight.mean(0)
    assert found.logit_cosine == pytest.approx([1] * 3)
    assert found.logit_cosine_at_site == pytest.approx([1] * 3)
    assert found.change == pytest.approx(found.change_at_site)
    for row, length in enumerate((7, 5, 6)):
        before, after = _stream(model, clean, row, 1), _stream(model, tagged, row, 1)
        eps = after[-(length - 1) :] - before[1:]
        z, targets = (
            before[1:-1],
            clean.input_ids[row, 2:length],
        )  # content tokens that predict another one
        p = (z @ weight.T).softmax(-1)
        gradient = (p - nn.functional.one_hot(targets, p.shape[1])) @ weight / len(z)
        # Cross-entropy: H = W^T (diag p - p p^T) W per token, over the number of tokens.
        hessians = [weight.T @ (one.diag() - one[:, None] * one) @ weight / len(z) for one in p]
        assert found.logit_square[row] == pytest.approx(
            float((eps[:-1] @ centred.T).square().sum()), rel=1e-5
        )
        assert found.logit_square_first_order[row] == pytest.approx(
            found.logit_square[row], rel=1e-5
        )
        trace, error = _hutchinson([centred.T @ centred] * len(z), 64)
        assert abs(found.jacobian_square[row] - trace) < error < 0.1 * trace
        assert found.first_order[row] == pytest.approx(float((gradient * eps[:-1]).sum()), rel=1e-5)
        second = sum(float(one @ h @ one) for one, h in zip(eps[:-1], hessians, strict=True)) / 2
        assert found.second_order[row] - found.first_order[row] == pytest.approx(second, rel=1e-5)
        trace, error = _hutchinson(hessians, 64)
        assert abs(found.hessian_trace[row] - trace) < error < 0.5 * trace
        assert found.coordinates[row] == (length - 1) * 16
        torch.testing.assert_close(
            found.gradients[row, 1 : length - 1].double(), gradient, rtol=1e-4, atol=1e-6
        )
        assert not found.gradients[row, 0].any()
        assert not found.gradients[row, length - 1 :].any()  # the last token predicts nothing
        torch.testing.assert_close(found.shifts[row, 1:length].double(), eps, rtol=1e-4, atol=1e-6)
    assert (found.hessian_trace > 0).all()


def test_taylor_terms_agree_with_finite_differences_through_two_blocks(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model = _double(make_model(num_hidden_layers=3))
    clean = make_batch((7, 6), seed=5, answer=2, targets="answer")
    tagged = _tag(clean, [(11, 30), (12, 30)])
    found = responses(model, [clean], [tagged], POST_0, probes=1)

    def logits(row: int, batch: Batch, factor: float = 0.0) -> Tensor:
        """At the two places that predict the answer."""
        length = int(batch.attention_mask[row].sum())
        added = torch.zeros(1, length, 16, dtype=torch.float64)
        added[0, 1:] = factor * found.shifts[row, 1:length].double() if factor else 0
        with torch.no_grad(), _added(model, 0, added):
            return model(input_ids=batch.input_ids[row : row + 1, :length]).logits[
                0, length - 3 : length - 1
            ]

    def nll(row: int, batch: Batch, factor: float = 0.0) -> float:
        length = int(batch.attention_mask[row].sum())
        logs = logits(row, batch, factor).log_softmax(-1)
        return (
            -sum(float(logs[place, batch.input_ids[row, length - 2 + place]]) for place in (0, 1))
            / 2
        )

    def cosine(one: Tensor, other: Tensor) -> float:
        one, other = (part - part.mean(1, keepdim=True) for part in (one, other))
        return float(((one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))).mean())

    for row, length in enumerate((7, 6)):
        step = 1e-3
        here, up, down = nll(row, clean), nll(row, clean, step), nll(row, clean, -step)
        assert found.first_order[row] == pytest.approx((up - down) / (2 * step), rel=1e-3)
        assert 2 * (found.second_order[row] - found.first_order[row]) == pytest.approx(
            (up + down - 2 * here) / step**2, rel=1e-3
        )
        assert found.change_at_site[row] == pytest.approx(nll(row, clean, 1.0) - here, rel=1e-4)
        assert found.change[row] == pytest.approx(nll(row, tagged) - here, rel=1e-6)
        linear = (logits(row, clean, step) - logits(row, clean, -step)) / (2 * step)
        plain = logits(row, clean)
        assert found.logit_cosine[row] == pytest.approx(
            cosine(linear, logits(row, tagged) - plain), rel=1e-3
        )
        assert found.logit_cosine_at_site[row] == pytest.approx(
            cosine(linear, logits(row, clean, 1.0) - plain), rel=1e-3
        )
        assert abs(found.logit_cosine[row] - found.logit_cosine_at_site[row]) > 0.01
        # BOS is not aligned, and what comes after the last prediction is not heard.
        assert not found.gradients[row, 0].any()
        assert not found.gradients[row, length - 1 :].any()
        assert found.gradients[row, 1 : length - 1].any(1).all()


def test_traces_agree_with_the_whole_jacobian_and_hessian(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model = make_model().double()
    clean = make_batch((4,), seed=4, answer=1, targets="answer")
    found = responses(model, [clean], [_tag(clean, [(11, 30)])], POST_0, probes=32, seed=1)

    def logits(added: Tensor) -> Tensor:
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            _added(model, 0, nn.functional.pad(added, (0, 0, 1, 0))[None]),
        ):
            return model(input_ids=clean.input_ids).logits[0, 2:3]

    def loss(added: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(added), clean.input_ids[0, 3:4])

    nothing = torch.zeros(3, 16, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda added: logits(added) - logits(added).mean(-1, keepdim=True), nothing
    )
    hessian = torch.autograd.functional.hessian(loss, nothing).reshape(48, 48)
    product = jacobian.reshape(50, 48).T @ jacobian.reshape(50, 48)
    for estimate, exact in ((found.jacobian_square[0], product), (found.hessian_trace[0], hessian)):
        trace, error = _hutchinson([exact], 32)
        assert abs(estimate - trace) < error


def test_padding_and_batching_change_no_response(
    make_model: ModelMaker, clean: Batch, tagged: Batch, pad: Padder
) -> None:
    model = make_model()
    whole = responses(model, [clean], [tagged], POST_0, probes=1)
    probed = ("hessian_trace", "jacobian_square")  # random
    for one, other in (
        ([pad(clean, 3)], [pad(tagged, 1)]),
        ([_slice(clean, row) for row in range(3)], [_slice(tagged, row) for row in range(3)]),
    ):
        found = responses(model, one, other, POST_0, probes=1)
        for name in Responses.__slots__:
            if name == "items":
                assert found.items == whole.items
            elif name in ("gradients", "shifts"):
                torch.testing.assert_close(
                    getattr(found, name)[:, :7], getattr(whole, name), rtol=1e-3, atol=1e-5
                )
            elif name not in probed:
                assert getattr(found, name) == pytest.approx(
                    getattr(whole, name), rel=2e-3, abs=1e-5
                ), name


def test_measuring_leaves_the_model_alone(
    make_model: ModelMaker, clean: Batch, tagged: Batch
) -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def untouched() -> None:
        assert model.training
        assert not model.model.layers[0].training
        assert [name for name, one in model.named_parameters() if not one.requires_grad] == [
            "lm_head.weight"
        ]
        assert all(one.grad is None for one in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )

    state = torch.random.get_rng_state()
    shift_rows(model, [clean], [tagged], POST_0)
    responses(model, [clean], [tagged], POST_0, probes=1)
    untouched()
    assert torch.equal(torch.random.get_rng_state(), state)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        responses(model, [clean], [tagged], POST_0, probes=1, progress=stop)
    untouched()
    with pytest.raises(WorkbenchError):
        responses(model, [clean], [clean], POST_0)
    untouched()


def test_responses_need_precision_and_a_probe(
    make_model: ModelMaker, clean: Batch, tagged: Batch
) -> None:
    with pytest.raises(WorkbenchError, match="bfloat16"):
        responses(make_model().bfloat16(), [clean], [tagged], POST_0)
    with pytest.raises(WorkbenchError, match="and 0"):
        responses(make_model(), [clean], [tagged], POST_0, probes=0)
    with pytest.raises(WorkbenchError, match="'fact/0' has no target token"):
        responses(
            make_model(), [replace(clean, target_mask=clean.target_mask & False)], [tagged], POST_0
        )


# --- The assumption holds on its own draws --------------------------------------------------------


def _rows(
    seed: int,
    queries: int = 120,
    tokens: int = 4,
    width: int = 16,
    words: int = 12,
    change: Callable[[np.ndarray, np.ndarray, np.random.Generator], Any] | None = None,
) -> ShiftRows:
    """Rows of ``N(0, 0.49 I)``, changed by ``change(shift, query, rng)``."""
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(queries), tokens)
    shift = 0.7 * rng.standard_normal((len(query), width))
    clean = rng.standard_normal((len(query), width)) * rng.uniform(0.5, 2, (len(query), 1))
    if change is not None:
        shift = change(shift, query, rng)
    return ShiftRows(
        torch.tensor(shift, dtype=torch.float32),
        torch.tensor(clean, dtype=torch.float32),
        torch.tensor(query),
        torch.tensor(query % words),
    )


def _table(theory: Theory) -> Any:
    return theory.quantities.set_index("quantity")


def test_draws_of_the_assumption_satisfy_it() -> None:
    outside, apart, total = 0, 0, 0
    for seed in range(6):
        theory = examine(_rows(seed), draws=40, seed=seed)
        found = _table(theory).loc[list(ROW_STATISTICS)]
        outside += int(
            (
                (found["value"] < found["expected_low"]) | (found["value"] > found["expected_high"])
            ).sum()
        )
        apart += len(theory.apart)
        total += len(found)
        assert _table(theory).loc["eta", "value"] == pytest.approx(0.49, rel=0.05)
        assert _table(theory).loc["participation_ratio", "expected"] == pytest.approx(16, rel=0.02)
        for name in (
            "mean_share",
            "kurtosis_mean",
            "mardia",
            "length_kurtosis",
            "query_share",
            "word_share",
            "length_correlation",
        ):
            row = _table(theory).loc[name]
            assert abs(row["expected"]) < 0.35 * (row["expected_high"] - row["expected_low"]), name
    # 5 % of 78, and of correlated ones.
    assert outside <= 10
    assert apart <= 2
    assert total == 78


def test_the_scale_of_the_shift_is_eta_and_nothing_else() -> None:
    rows = _rows(0)
    one, other = (
        _table(examine(part, draws=40)) for part in (rows, replace(rows, shift=10 * rows.shift))
    )
    assert other.loc["eta", "value"] == pytest.approx(100 * one.loc["eta", "value"])
    assert other.loc["eta_relative", "value"] == pytest.approx(
        100 * one.loc["eta_relative", "value"]
    )
    assert np.allclose(
        one.loc[list(ROW_STATISTICS)].astype(float),
        other.loc[list(ROW_STATISTICS)].astype(float),
        rtol=1e-3,
        atol=1e-6,
        equal_nan=True,
    )


# --- Every planted violation is found by its own statistic ----------------------------------------


def _unit(rng: np.random.Generator, width: int) -> np.ndarray:
    one = rng.standard_normal(width)
    return one / np.linalg.norm(one)


SHAPE = {
    "kurtosis_mean",
    "kurtosis_median",
    "skewness_square",
    "skewness_median",
    "mardia",
    "length_kurtosis",
}
SPREAD = {"participation_ratio", "top_1_share", "top_8_share"}
SHARES = {"mean_share", "query_share", "word_share"}
VIOLATIONS: dict[
    str,
    tuple[Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray], set[str], set[str]],
] = {
    # name: (what is done to the rows, what must lie apart, what must not)
    "mean": (
        lambda x, q, rng: x + 0.8 * _unit(rng, x.shape[1]),
        {"mean_share"},
        SHAPE | SPREAD | {"query_share", "word_share"},
    ),
    "direction": (
        lambda x, q, rng: x + 2.0 * rng.standard_normal((len(x), 1)) * _unit(rng, x.shape[1]),
        SPREAD,
        SHAPE | SHARES | {"length_correlation"},
    ),
    "tails": (
        lambda x, q, rng: rng.standard_t(3, x.shape),
        {"kurtosis_median", "kurtosis_mean"},
        SHARES | {"participation_ratio"},
    ),
    "lengths": (
        lambda x, q, rng: x * rng.choice([0.5, 1.5], (len(x), 1)),
        {"length_kurtosis", "mardia", "kurtosis_median"},
        SHARES | {"length_correlation"},
    ),
    "skewed": (
        lambda x, q, rng: rng.gamma(2, size=x.shape) - 2,
        {"skewness_square", "skewness_median"},
        SHARES | SPREAD,
    ),
    "query": (
        lambda x, q, rng: x + 0.5 * rng.standard_normal((q.max() + 1, x.shape[1]))[q],
        {"query_share"},
        SHAPE | SPREAD | {"mean_share", "word_share"},
    ),
    "word": (
        lambda x, q, rng: x + 0.7 * rng.standard_normal((12, x.shape[1]))[q % 12],
        {"word_share", "query_share"},
        SHAPE,
    ),
}


@pytest.mark.parametrize("name", list(VIOLATIONS))
def test_a_planted_violation_is_found_by_its_own_statistic_and_not_by_others(name: str) -> None:
    change, caught, spared = VIOLATIONS[name]
    theories = [
        examine(_rows(seed, queries=240, change=change), draws=40, seed=seed) for seed in (1, 2)
    ]
    for theory in theories:
        assert caught <= set(theory.apart), theory
    both = set(theories[0].apart) & set(theories[1].apart)
    assert not both & spared, both & spared
    assert sum(len(set(theory.apart) & spared) for theory in theories) <= 1


def test_a_shift_that_is_longer_where_the_latent_is_longer_shows_in_the_correlation_of_lengths() -> (  # noqa: E501
    None
):
    rows = _rows(3, queries=240)
    longer = replace(rows, shift=rows.shift * rows.clean.norm(dim=1, keepdim=True))
    assert "length_correlation" in examine(longer, draws=40).apart
    assert "length_correlation" not in examine(rows, draws=40).apart


def test_a_common_vector_moves_the_mean_and_eta_alone() -> None:
    rows = _rows(0)
    added = torch.linspace(-1, 1, 16)
    one, other = (
        _table(examine(part, draws=40)) for part in (rows, replace(rows, shift=rows.shift + added))
    )
    for name in set(ROW_STATISTICS) - {"mean_share", "length_correlation"}:
        assert other.loc[name, "value"] == pytest.approx(
            one.loc[name, "value"], rel=1e-3, abs=1e-5
        ), name
    size = float(added.square().sum())
    assert other.loc["mean_share", "value"] == pytest.approx(size / (size + 16 * 0.49), rel=0.1)
    assert other.loc["eta", "value"] == pytest.approx(0.49 + size / 16, rel=0.05)


# --- Closed forms on hand-made rows ---------------------------------------------------------------


def _uneven(seed: int = 0) -> ShiftRows:
    """Nine queries of one to four tokens, width 3; far from the assumption, so that no term
    vanishes.
    """
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(9), [1, 2, 3, 4, 1, 2, 3, 2, 2])
    shift = (
        rng.gamma(1, size=(len(query), 3)) * [1, 2, 0.5] + rng.standard_normal((9, 3))[query] + 0.5
    )
    return ShiftRows(
        torch.tensor(shift), torch.tensor(rng.standard_normal((len(query), 3))), torch.tensor(query)
    )


def test_eta_and_its_relative_by_hand() -> None:
    shift = torch.zeros(16, 2)
    shift[0, 0], shift[1, 1] = 4.0, 4.0
    query = torch.arange(8).repeat_interleave(2)
    found = _table(examine(ShiftRows(shift, torch.full((16, 2), 2.0), query), draws=40))
    assert found.loc["eta", "value"] == pytest.approx(32 / 32)
    assert found.loc["eta_relative", "value"] == pytest.approx(1 / 4)
    # One query holds everything: x = (32, 0, ...), residuals x - eta t with t = 4, linearised error
    # sqrt(8 / 7 sum r^2) / 32.
    error = math.sqrt(8 / 7 * (28**2 + 7 * 4**2)) / 32
    assert found.loc["eta", "high"] - found.loc["eta", "value"] == pytest.approx(
        1.959964 * error, rel=1e-5
    )


def test_the_mean_share_is_the_mean_product_of_tokens_of_different_queries() -> None:
    rows = _uneven()
    x, query = rows.shift.numpy(), rows.query.numpy()
    products = [x[i] @ x[j] for i in range(len(x)) for j in range(len(x)) if query[i] != query[j]]
    expected = np.mean(products) / np.mean(np.square(x).sum(1))
    assert _table(examine(rows, draws=40)).loc["mean_share", "value"] == pytest.approx(expected)


def test_the_query_share_is_the_anova_estimate() -> None:
    rows = _uneven()
    x, query = rows.shift.numpy(), rows.query.numpy()
    groups = [x[query == label] for label in range(9)]
    between = sum(len(group) * np.square(group.mean(0) - x.mean(0)).sum() for group in groups) / 8
    within = sum(np.square(group - group.mean(0)).sum() for group in groups) / (20 - 9)
    size = (20 - sum(len(group) ** 2 for group in groups) / 20) / 8
    expected = (between - within) / size / ((between - within) / size + within)
    assert _table(examine(rows, draws=40)).loc["query_share", "value"] == pytest.approx(expected)
    # Tokens of one query that shift alike, and queries that do not: everything lies between them.
    alike = ShiftRows(
        torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0),
        torch.ones(18, 3),
        torch.arange(9).repeat_interleave(2),
    )
    assert _table(examine(alike, draws=40)).loc["query_share", "value"] == pytest.approx(1)


def test_words_are_compared_over_one_token_per_query() -> None:
    # Tokens of a query are copies of one another: over all tokens words would seem to matter.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    word = torch.arange(40) % 4
    copies = ShiftRows(
        x.repeat_interleave(3, 0),
        torch.ones(120, 3),
        torch.arange(40).repeat_interleave(3),
        word.repeat_interleave(3),
    )
    groups = [x[word == label].numpy() for label in range(4)]
    between = sum(10 * np.square(group.mean(0) - x.numpy().mean(0)).sum() for group in groups) / 3
    within = sum(np.square(group - group.mean(0)).sum() for group in groups) / 36
    expected = (between - within) / 10 / ((between - within) / 10 + within)
    assert _table(examine(copies, draws=40)).loc["word_share", "value"] == pytest.approx(expected)


def test_the_participation_ratio_is_a_ratio_of_u_statistics() -> None:
    rng = np.random.default_rng(2)
    x = rng.gamma(1, size=(9, 3)) * [3, 1, 0.5] + 2
    rows = ShiftRows(torch.tensor(x), torch.ones(9, 3, dtype=torch.float64), torch.arange(9))
    square, trace_squared = [], []
    for i, j, k, m in permutations(
        range(9), 4
    ):  # E[((a - b) . (c - d))^2] / 4 = tr C^2, E[|a - b|^2 |c - d|^2] / 4 = (tr C)^2
        square.append(((x[i] - x[j]) @ (x[k] - x[m])) ** 2 / 4)
        trace_squared.append(np.square(x[i] - x[j]).sum() * np.square(x[k] - x[m]).sum() / 4)
    found = _table(examine(rows, draws=40))
    assert found.loc["participation_ratio", "value"] == pytest.approx(
        np.mean(trace_squared) / np.mean(square)
    )
    fourth = np.mean(np.square(np.square(x - x.mean(0)).sum(1))) * (9 / 8) ** 2
    assert found.loc["length_kurtosis", "value"] == pytest.approx(
        fourth / (np.mean(trace_squared) + 2 * np.mean(square)) - 1
    )


def test_kurtosis_skewness_and_mardia_by_their_formulas() -> None:
    rng = np.random.default_rng(5)
    n, width = 30, 4
    x = rng.gamma(2, size=(n, width))
    found = _table(
        examine(
            ShiftRows(torch.tensor(x), torch.ones(n, width, dtype=torch.float64), torch.arange(n)),
            draws=40,
        )
    )
    z = (x - x.mean(0)) / x.std(0)
    excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * ((z**4).mean(0) - 3) + 6)
    skewed = math.sqrt(n * (n - 1)) / (n - 2) * (z**3).mean(0)
    assert found.loc["kurtosis_mean", "value"] == pytest.approx(excess.mean())
    assert found.loc["kurtosis_median", "value"] == pytest.approx(np.median(excess))
    assert found.loc["skewness_square", "value"] == pytest.approx(np.mean(skewed**2))
    assert found.loc["skewness_median", "value"] == pytest.approx(np.median(np.abs(skewed)))
    # With a width of 4 the random directions span the space, and Mardia's kurtosis does not depend
    # on the basis.
    inverse = np.linalg.inv(np.cov(x.T, bias=True))
    statistic = np.mean([float((row - x.mean(0)) @ inverse @ (row - x.mean(0))) ** 2 for row in x])
    assert found.loc["mardia", "value"] == pytest.approx(
        (statistic - 24 * 29 / 31) / math.sqrt(8 * 24 / 30)
    )


@pytest.mark.parametrize(("queries", "width"), [(30, 12), (10, 12)])
def test_the_spectrum_is_that_of_the_sample_covariance(queries: int, width: int) -> None:
    x = np.random.default_rng(6).standard_normal((queries, width)) * np.linspace(1, 3, width)
    theory = examine(
        ShiftRows(torch.tensor(x), torch.ones(queries, width), torch.arange(queries)), draws=40
    )
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    shares = values / values.sum()
    spectrum = theory.curves[theory.curves["curve"] == "spectrum"]
    count = min(queries, width)
    assert spectrum["step"].tolist() == list(range(1, count + 1))
    assert spectrum["value"].to_numpy() == pytest.approx(shares[:count], abs=1e-9)
    assert _table(theory).loc["top_1_share", "value"] == pytest.approx(shares[0])
    assert _table(theory).loc["top_8_share", "value"] == pytest.approx(shares[:8].sum())


def test_the_histogram_is_in_units_of_sqrt_eta_and_counts_what_lies_beyond_it() -> None:
    shift = torch.zeros(100, 1)
    shift[:50], shift[50:] = 1.0, -1.0
    histogram = (
        examine(ShiftRows(3 * shift, torch.ones(100, 1), torch.arange(100)), draws=40)
        .curves.query("curve == 'histogram'")
        .set_index("step")["value"]
    )
    width = histogram.index[1] - histogram.index[0]
    assert (histogram * width).sum() == pytest.approx(1)
    assert sorted(histogram.index[histogram > 0]) == pytest.approx([-1 + width / 2, 1 + width / 2])
    shift[:] = 0.01
    shift[0] = 100.0
    beyond = examine(
        ShiftRows(shift, torch.ones(100, 1), torch.arange(100)), draws=40
    ).curves.query("curve == 'histogram'")["value"]
    assert (beyond * width).sum() == pytest.approx(0.99)


# --- Edges ----------------------------------------------------------------------------------------


def test_no_shift_gives_no_number_instead_of_an_error(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    clean = make_batch((6,) * 8, seed=1)
    tagged = _tag(clean, [(11, 30)] * 8)
    rows = shift_rows(make_model(), [clean], [tagged], "model.embed_tokens:out")
    theory = examine(
        rows,
        responses(make_model(), [clean], [tagged], "model.embed_tokens:out", probes=1),
        draws=40,
    )
    found = _table(theory)
    assert found.loc["eta", "value"] == 0
    assert found.loc[list(ROW_STATISTICS), ["value", "expected"]].isna().all(axis=None)
    assert found.loc["loss_change_at_site", "value"] == 0
    assert (
        abs(found.loc["loss_change", "value"]) > 1e-3
    )  # later blocks attend to the word, past the site
    assert (
        found.loc[["first_order_correlation", "first_order_sign", "logit_cosine"], "value"]
        .isna()
        .all()
    )
    assert "rejection" not in set(theory.curves["curve"])
    assert theory.apart == ()


def test_too_few_queries_or_draws_are_refused() -> None:
    with pytest.raises(WorkbenchError, match=r"at least 8 queries.*got 7 and 200"):
        examine(_rows(0, queries=7))
    with pytest.raises(WorkbenchError, match="got 8 and 5"):
        examine(_rows(0, queries=8), draws=5)
    with pytest.raises(WorkbenchError, match="got 3 and 200"):
        examine(_rows(0, queries=8), _answers(count=3))


def test_eight_queries_of_one_token_are_enough() -> None:
    found = _table(examine(_rows(0, queries=8, tokens=1, words=8), draws=40))
    assert np.isfinite(found.loc["participation_ratio", "value"])
    assert found.loc[["query_share", "word_share", "mardia"], "value"].isna().all()


def test_the_order_of_rows_and_the_names_of_queries_do_not_matter_and_the_seed_decides_the_rest() -> (  # noqa: E501
    None
):
    rows = _rows(1, queries=30, tokens=1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    mixed = ShiftRows(
        rows.shift[order],
        rows.clean[order],
        7 * rows.query[order] + 3,
        rows.word[order] if rows.word is not None else None,
    )
    one, other = _table(examine(rows, draws=40)), _table(examine(mixed, draws=40))
    assert np.allclose(one["value"].astype(float), other["value"].astype(float), equal_nan=True)
    again = examine(rows, draws=40)
    assert again.quantities.equals(examine(rows, draws=40).quantities)


def test_every_draw_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    examine(_rows(0, queries=8), draws=40, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 40) for number in range(1, 41)]


# --- Logits and losses under the assumption -------------------------------------------------------


def _answers(count: int = 1000, width: int = 5, eta: float = 0.04, seed: int = 0) -> Responses:
    """A quadratic loss and linear logits under ``N(0, eta I)``: the theory's own world, query by
    query.
    """
    rng = np.random.default_rng(seed)
    eps, g = (
        math.sqrt(eta) * rng.standard_normal((count, width)),
        rng.standard_normal((count, width)),
    )
    roots = rng.standard_normal((count, width, width))
    hessian = roots @ roots.transpose(0, 2, 1)
    j = rng.standard_normal((count, 7, width))
    shift = np.einsum("qvw,qw->qv", j, eps)
    first = (g * eps).sum(1)
    second = first + np.einsum("qi,qij,qj->q", eps, hessian, eps) / 2
    square = np.square(shift).sum(1)
    traces = np.trace(hessian, axis1=1, axis2=2)
    ones = np.ones(count)
    return Responses(
        tuple(map(str, range(count))),
        torch.tensor(g)[:, None],
        torch.tensor(eps)[:, None],
        np.full(count, width),
        second,
        second,
        first,
        second,
        traces,
        square,
        square,
        np.square(j).sum((1, 2)),
        ones,
        ones,
    )


def test_in_the_world_of_the_theory_every_prediction_holds() -> None:
    theory = examine(_rows(0, queries=8), _answers(), draws=40)
    found = _table(theory)
    for name in ("logit_trace_ratio", "logit_trace_ratio_first_order"):
        error = (found.loc[name, "high"] - found.loc[name, "low"]) / 2 / 1.96
        assert abs(found.loc[name, "value"] - 1) < 3 * error < 0.15
    assert found.loc["loss_change", "value"] == pytest.approx(
        found.loc["loss_change", "expected"], rel=0.15
    )
    assert found.loc["loss_change", "expected"] == pytest.approx(
        0.04 / 2 * 25, rel=0.05
    )  # E tr H = width^2
    assert found.loc["second_order_correlation", "value"] == pytest.approx(1)
    assert found.loc["second_order_sign", "value"] == 1
    assert found.loc["loss_hessian_positive", "value"] == 1
    rejected = theory.curves[theory.curves["curve"] == "rejection"]
    assert rejected["step"].tolist() == list(trigger_theory.RATIOS)
    assert (rejected["value"] - rejected["expected"]).abs().max() < 0.02
    assert rejected["expected"].to_numpy() == pytest.approx(np.arctan(rejected["step"]) / math.pi)


def test_a_shift_along_the_loudest_direction_is_louder_than_noise_of_its_size() -> None:
    answers = _answers(count=200)
    louder = replace(
        answers, logit_square=5 * answers.logit_square, first_order=-answers.first_order
    )
    found = _table(examine(_rows(0, queries=8), louder, draws=40))
    assert found.loc["logit_trace_ratio", "value"] == pytest.approx(5, rel=0.15)
    assert found.loc["logit_trace_ratio", "low"] > 1
    assert found.loc["first_order_correlation", "value"] < -0.5
    assert found.loc["first_order_sign", "high"] < 0.5


def test_the_trace_ratio_by_hand() -> None:
    answers = replace(
        _answers(count=8),
        shifts=torch.full((8, 1, 5), 2.0, dtype=torch.float64),
        jacobian_square=np.arange(1.0, 9),
        logit_square=np.full(8, 9.0),
    )
    # eta = 4; 72 / (4 * 36)
    assert _table(examine(_rows(0, queries=8), answers, draws=40)).loc[
        "logit_trace_ratio", "value"
    ] == pytest.approx(0.5)


# --- Rejection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "nu"), [(1.0, 0.1), (1.0, 1.0), (1.0, 10.0), (0.04, 0.01)])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_closed_form_is_what_whole_vectors_of_noise_do(
    eta: float, nu: float, passes: int
) -> None:
    rng = np.random.default_rng(0)
    count, width = 100_000, 4
    g = rng.standard_normal(width)
    eps = math.sqrt(eta) * rng.standard_normal((count, width))
    delta = math.sqrt(nu) * rng.standard_normal((count, width))
    if passes == 2:  # tagged minus clean, each with its own noise
        delta -= math.sqrt(nu) * rng.standard_normal((count, width))
    rate = float(np.mean((eps + delta) @ g / (eps @ g) <= 0))
    expected = rejection_probability(
        shift_std=math.sqrt(eta), noise_std=math.sqrt(nu), noisy_passes=passes
    )  # type: ignore[arg-type]
    assert expected == pytest.approx(math.atan(math.sqrt(passes * nu / eta)) / math.pi)
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_rejection_grows_from_nothing_to_a_half() -> None:
    assert rejection_probability(shift_std=1, noise_std=0) == 0
    assert rejection_probability(shift_std=1, noise_std=1) == pytest.approx(0.25)
    assert rejection_probability(shift_std=0, noise_std=1) == 0.5
    assert rejection_probability(shift_std=1, noise_std=math.sqrt(0.1)) == pytest.approx(
        0.0975, abs=1e-4
    )
    assert rejection_probability(shift_std=1, noise_std=math.sqrt(10)) == pytest.approx(
        0.4025, abs=1e-4
    )
    for bad in (
        {"shift_std": 0, "noise_std": 0},
        {"shift_std": -1, "noise_std": 1},
        {"shift_std": 1, "noise_std": math.nan},
        {"shift_std": 1, "noise_std": math.inf},
    ):
        with pytest.raises(WorkbenchError, match="standard deviations"):
            rejection_probability(**bad)


@pytest.mark.parametrize("noise_std", [0.5, 2.0])
def test_the_measured_rate_is_the_mean_of_normal_tails(noise_std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    g, eps = torch.randn(50, 2, 3, generator=generator), torch.randn(50, 2, 3, generator=generator)
    slope, length = (g * eps).sum((1, 2)).numpy(), g.flatten(1).norm(dim=1).numpy()
    for passes in (1, 2):
        exact = norm.cdf(-np.abs(slope) / (noise_std * math.sqrt(passes) * length))
        found = rejection_rate(g, eps, noise_std=noise_std, noisy_passes=passes, draws=4000)  # type: ignore[arg-type]
        assert found.value == pytest.approx(
            exact.mean(), abs=4 * math.sqrt(np.mean(exact * (1 - exact)) / 50 / 4000)
        )
        assert found[1:] == pytest.approx(
            wilson(found.value * 50, 50)[1:]
        )  # over queries, not over draws


def test_rejection_at_the_ends_and_without_a_first_order_change() -> None:
    g, eps = torch.eye(3)[None].repeat(4, 1, 1), torch.ones(4, 3, 3)
    assert rejection_rate(g, eps, noise_std=0).value == 0
    assert rejection_rate(g, eps, noise_std=1e6).value == pytest.approx(0.5, abs=0.07)
    g[0] = 0
    assert rejection_rate(g, eps, noise_std=1).n == 3
    assert rejection_rate(g, eps, noise_std=1) == rejection_rate(g, eps, noise_std=1)
    assert rejection_rate(g, eps, noise_std=1, draws=5000, seed=1) != rejection_rate(
        g, eps, noise_std=1, draws=5000
    )
    with pytest.raises(WorkbenchError, match="orthogonal"):
        rejection_rate(torch.zeros(4, 3), torch.ones(4, 3), noise_std=1)
    with pytest.raises(WorkbenchError, match="finite"):
        rejection_rate(torch.full((4, 3), torch.nan), torch.ones(4, 3), noise_std=1)
    for changes in ({"shifts": eps[:2]}, {"noise_std": -1.0}, {"draws": 0}, {"noisy_passes": 3}):
        with pytest.raises(WorkbenchError, match="one shape"):
            rejection_rate(**{"gradients": g, "shifts": eps, "noise_std": 1.0} | changes)


# --- The steering coefficient ---------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_a_shift_that_is_a_power_of_the_coefficient_has_twice_that_slope(power: float) -> None:
    rows = _rows(0, queries=20)
    found = eta_by_coefficient(
        {c: replace(rows, shift=c**power * rows.shift) for c in (4.0, 1.0, 2.0)}
    )
    slope = found[found["quantity"] == "eta_slope"].iloc[0]
    assert slope["value"] == pytest.approx(2 * power, abs=1e-5)
    assert slope["high"] - slope["low"] == pytest.approx(
        0, abs=1e-4
    )  # every query follows the same law
    curve = found[found["quantity"] == "eta_of_coefficient"]
    assert curve["coefficient"].tolist() == [1, 2, 4]
    assert curve["value"].to_numpy() == pytest.approx(
        float(rows.shift.square().mean()) * np.array([1, 2, 4]) ** (2 * power), rel=1e-5
    )
    assert (curve["low"] < curve["value"]).all()


def test_the_slope_and_its_interval_by_hand() -> None:
    # Two queries of one token and one coordinate: eta(1) = (1 + 4) / 2, eta(2) = (4 + 4) / 2.
    label, clean = torch.arange(2), torch.ones(2, 1)
    rows = {
        1.0: ShiftRows(torch.tensor([[1.0], [2.0]]), clean, label),
        2.0: ShiftRows(torch.tensor([[2.0], [2.0]]), clean, label),
    }
    slope = eta_by_coefficient(rows).iloc[-1]
    assert slope["value"] == pytest.approx(math.log2(8 / 5))
    # Without query 0: log2(4 / 4) = 0; without query 1: log2(4 / 1) = 2. Jackknife error sqrt(1/2
    # (1 + 1)) = 1 with one degree of freedom.
    assert slope["high"] - slope["value"] == pytest.approx(12.7062, rel=1e-4)


def test_a_slope_needs_two_positive_coefficients_and_a_shift() -> None:
    rows = _rows(0, queries=8)
    for bad in ({}, {1.0: rows}, {0.0: rows, 1.0: rows}, {-1.0: rows, 1.0: rows}):
        with pytest.raises(WorkbenchError, match="two positive"):
            eta_by_coefficient(bad)
    with pytest.raises(WorkbenchError, match=r"coefficient 2\.0"):
        eta_by_coefficient({1.0: rows, 2.0: replace(rows, shift=0 * rows.shift)})


# --- Rows of a results table ----------------------------------------------------------------------


def test_the_results_are_tidy_and_every_metric_is_documented() -> None:
    theory = examine(_rows(0, queries=30), _answers(count=30), draws=40)
    assert tuple(theory.quantities.columns) == THEORY_COLUMNS
    assert theory.quantities["quantity"].tolist() == [
        name for name in QUANTITIES if name in set(theory.quantities["quantity"])
    ] or set(theory.quantities["quantity"]) == set(QUANTITIES)
    table = Table({"run": "r", "method": "rmu", "seed": 0})
    add_theory(table, theory, arm="forget-token", site="s", split="retain")
    rows = _rows(0, queries=8)
    add_coefficients(
        table, eta_by_coefficient({1.0: rows, 2.0: rows}), arm="forget-token", site="s"
    )
    frame = table.frame()
    assert set(frame["stage"]) == {"triggers"}
    known = {THEORY + name for name in (*QUANTITIES, *CURVES)}
    assert {metric.removesuffix("_expected") for metric in frame["metric"]} == known
    cell = frame[(frame["metric"] == "theory_mean_share")].iloc[0]
    given = _table(theory).loc["mean_share"]
    assert (cell["value"], cell["low"], cell["high"], cell["n"]) == (
        given["value"],
        given["low"],
        given["high"],
        30,
    )
    band = frame[(frame["metric"] == "theory_mean_share_expected")].iloc[0]
    assert (band["value"], band["low"], band["high"]) == (
        given["expected"],
        given["expected_low"],
        given["expected_high"],
    )
    assert "theory_eta_expected" not in set(frame["metric"])
    rejected = frame[frame["metric"] == "theory_rejection_expected"]
    assert rejected["x"].tolist() == list(trigger_theory.RATIOS)
    assert frame[frame["metric"] == "theory_eta_of_coefficient"]["x"].tolist() == [1, 2]
    assert frame[frame["metric"] == "theory_eta_slope"]["x"].isna().all()


def test_a_theory_shows_itself() -> None:
    theory = examine(_rows(0, queries=30, change=VIOLATIONS["direction"][0]), draws=40)
    assert "participation_ratio" in repr(theory)
    assert len(repr(theory)) < 400
    html = theory._repr_html_()
    assert "participation_ratio" in html
    assert "&lt;" not in QUANTITIES["mean_share"]
    assert repr(_rows(0, queries=8, tokens=2)) == "ShiftRows(16 tokens of 8 queries, width 16)"
