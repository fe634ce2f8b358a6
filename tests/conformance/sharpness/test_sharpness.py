"""Curvature and slices against dense Hessians, finite differences and closed forms of a softmax
head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.sharpness.curvature import Curvature, extremes
from workbench.sharpness.slices import (
    Direction,
    descent_direction,
    loss_slice,
    mean_loss,
    movable_weights,
    random_direction,
    scaled,
)
from workbench.unlearning.deltas import norm_of

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]

# Attention, a norm inside and the last norm: nonlinear in every way, and only 288 numbers.
SUBSET = (
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.norm.weight",
)


def _only(model: PreTrainedModel, names: Sequence[str]) -> PreTrainedModel:
    """``model`` with everything frozen but ``names``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def _nll_sum(model: PreTrainedModel, weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """Summed NLL of the target tokens in float64, row by row without padding, by log-softmax: the
    reference.
    """
    total = torch.zeros((), dtype=torch.float64)
    for row in range(batch.size):
        length = int(batch.attention_mask[row].sum())
        logits = functional_call(
            model,
            weights,
            kwargs={"input_ids": batch.input_ids[row : row + 1, :length], "use_cache": False},
        ).logits[0]
        log_p = logits.double().log_softmax(-1)
        for position in range(1, length):
            if bool(batch.target_mask[row, position]):
                total = total - log_p[position - 1, int(batch.input_ids[row, position])]
    return total


def _eager(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy with attention written out: nothing of the code under test is used for the
    reference.
    """
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    return twin


def _dense(model: PreTrainedModel, batch: Batch) -> np.ndarray:
    """Dense Hessian of the mean token loss over the trainable parameters, in the order of
    ``model.parameters()``.
    """
    twin = _eager(model)
    names, parameters = zip(
        *[(name, p) for name, p in twin.named_parameters() if p.requires_grad], strict=True
    )
    loss = _nll_sum(twin, dict(zip(names, parameters, strict=True)), batch) / int(
        batch.target_mask[:, 1:].sum()
    )
    gradient = torch.cat(
        [part.reshape(-1) for part in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    rows = torch.autograd.grad(
        gradient, parameters, torch.eye(len(gradient), dtype=torch.float64), is_grads_batched=True
    )
    return torch.cat([row.reshape(len(gradient), -1) for row in rows], dim=1).numpy()


def _apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative distance of two vectors."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, as a batch."""
    chosen = list(rows)
    names = ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
    return replace(
        batch,
        **{name: getattr(batch, name)[chosen] for name in names},
        items=tuple(batch.items[row] for row in chosen),
    )


def _vector(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


@pytest.fixture
def small(make_model: ModelMaker) -> PreTrainedModel:
    """A tiny Llama of which only the subset may change."""
    return _only(make_model(), SUBSET)


# --- Hessian-vector products ---


def test_the_product_is_the_dense_hessian_times_the_vector(
    small: PreTrainedModel, batch: Batch
) -> None:
    hessian = _dense(small, batch)
    operator = Curvature(small, [batch])
    assert operator.size == len(hessian) == 288
    # An indefinite matrix: a Gauss-Newton or Fisher product, which is never negative, would be
    # another thing.
    assert np.linalg.eigvalsh(hessian)[0] < -1e-3
    for seed in range(3):
        vector = _vector(operator.size, seed)
        assert _apart(operator.product(vector), hessian @ vector) < 1e-4
    # Unit vectors give columns, so the order of the flat vector is that of the parameters.
    for column in (0, 130, 270, 287):
        unit = np.zeros(operator.size)
        unit[column] = 1
        np.testing.assert_allclose(
            operator.product(unit), hessian[:, column], atol=1e-4 * np.abs(hessian).max()
        )


def test_the_product_is_the_change_of_the_gradient_along_the_vector_in_every_parameter(
    llama: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    texts = [batch, make_batch((4, 8), seed=3)]
    operator = Curvature(llama, texts)
    assert operator.size == llama.num_parameters()
    vector = _vector(operator.size) / operator.size**0.5
    step = 1e-3
    found = operator.product(vector)
    start = [parameter.detach().clone() for parameter in llama.parameters()]
    gradients = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, origin, part in zip(
                llama.parameters(), start, operator.unflat(vector), strict=True
            ):
                parameter.copy_(origin + sign * step * part)
        gradients.append(Curvature(llama, texts).gradient())
    difference = (gradients[0] - gradients[1]) / (2 * step)
    # float32 gradients divided by 2e-3: two digits and a half are left.
    assert _apart(found, difference) < 5e-3


def test_the_gradient_is_that_of_the_mean_token_loss(
    small: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    other = make_batch((9, 3), seed=5)
    twin = _eager(small)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    # Thirteen-odd tokens in one batch and ten in the other: the mean over tokens is not the mean
    # over batches.
    loss = sum(_nll_sum(twin, parameters, one) for one in (batch, other)) / sum(
        int(one.target_mask.sum()) for one in (batch, other)
    )
    expected = torch.cat(
        [part.reshape(-1) for part in torch.autograd.grad(loss, list(parameters.values()))]
    ).numpy()
    assert _apart(Curvature(small, [batch, other]).gradient(), expected) < 1e-5


def test_the_product_is_symmetric(llama: PreTrainedModel, batch: Batch) -> None:
    operator = Curvature(llama, [batch])
    u, v = _vector(operator.size, 1), _vector(operator.size, 2)
    left, right = float(u @ operator.product(v)), float(v @ operator.product(u))
    assert left == pytest.approx(right, rel=1e-4)


def test_the_product_is_linear(llama: PreTrainedModel, batch: Batch) -> None:
    operator = Curvature(llama, [batch])
    u, v = _vector(operator.size, 1), _vector(operator.size, 2)
    together = 2.5 * operator.product(u) - 0.75 * operator.product(v)
    assert _apart(operator.product(2.5 * u - 0.75 * v), together) < 1e-5
    assert not operator.product(np.zeros(operator.size)).any()


@pytest.mark.parametrize("seed", range(4))
def test_any_split_into_micro_batches_gives_the_same_product_and_gradient(
    seed: int, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    rng = np.random.default_rng(seed)
    whole = make_batch((9, 4, 6, 7, 3, 8), seed=seed)
    # Random targets: rows, and so micro-batches, with very different numbers of target tokens, one
    # row with none at all.
    keep = torch.from_numpy(rng.random(tuple(whole.target_mask.shape)) < 0.5) & whole.target_mask
    keep[int(rng.integers(6))] = False
    whole = replace(whole, target_mask=keep)
    cuts = sorted(rng.choice(np.arange(1, 6), size=int(rng.integers(1, 5)), replace=False))
    parts = [_rows(whole, part) for part in np.split(rng.permutation(6), cuts)]
    one, many = Curvature(llama, [whole]), Curvature(llama, parts)
    vector = _vector(one.size, seed)
    assert _apart(many.gradient(), one.gradient()) < 1e-5
    assert _apart(many.product(vector), one.product(vector)) < 1e-5
    assert many.tokens == one.tokens == int(keep.sum())


def test_more_padding_changes_neither_product_nor_gradient(
    llama: PreTrainedModel, batch: Batch, pad: Padder
) -> None:
    plain, padded = Curvature(llama, [batch]), Curvature(llama, [pad(batch, columns=4)])
    vector = _vector(plain.size)
    assert _apart(padded.gradient(), plain.gradient()) < 1e-5
    assert _apart(padded.product(vector), plain.product(vector)) < 1e-5


def test_tied_embeddings_are_one_block_that_sums_the_blocks_of_the_untied_twin(
    make_model: ModelMaker, batch: Batch
) -> None:
    tied, untied = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    weights = tied.state_dict()
    untied.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    one, two = Curvature(tied, [batch]), Curvature(untied, [batch])
    head = untied.lm_head.weight.numel()
    assert one.size == two.size - head
    names = [name for name, _ in untied.named_parameters()]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "lm_head.weight"
    # theta_untied = P theta_tied repeats the embedding, so H_tied = P' H_untied P.
    vector = _vector(one.size)
    spread = two.product(np.concatenate([vector, vector[:head]]))
    folded = spread[:-head].copy()
    folded[:head] += spread[-head:]
    assert _apart(one.product(vector), folded) < 1e-5


def test_frozen_parameters_are_no_part_of_the_operator(
    make_model: ModelMaker, batch: Batch
) -> None:
    full, part = Curvature(make_model(), [batch]), Curvature(_only(make_model(), SUBSET), [batch])
    inside = np.concatenate(
        [np.full(p.numel(), name in SUBSET) for name, p in make_model().named_parameters()]
    )
    assert part.size == int(inside.sum())
    vector = _vector(part.size)
    padded = np.zeros(full.size)
    padded[inside] = vector
    assert _apart(part.product(vector), full.product(padded)[inside]) < 1e-5
    assert _apart(part.gradient(), full.gradient()[inside]) < 1e-5


def test_flat_and_unflat_are_inverse(small: PreTrainedModel, batch: Batch) -> None:
    operator = Curvature(small, [batch])
    vector = _vector(operator.size).astype(np.float32).astype(np.float64)
    parts = operator.unflat(vector)
    assert [part.shape for part in parts] == [
        p.shape for p in small.parameters() if p.requires_grad
    ]
    np.testing.assert_array_equal(operator.flat(parts), vector)


def test_products_leave_weights_and_grad_fields_alone(llama: PreTrainedModel, batch: Batch) -> None:
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    operator = Curvature(llama, [batch, batch])
    operator.product(_vector(operator.size))
    operator.gradient()
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in llama.named_parameters()
    )


# --- Wrong input ---


def test_a_model_in_training_mode_is_refused(llama: PreTrainedModel, batch: Batch) -> None:
    with pytest.raises(WorkbenchError, match="eval"):
        Curvature(llama.train(), [batch])
    with pytest.raises(WorkbenchError, match="eval"):
        extremes(llama, [batch])


def test_a_model_with_nothing_to_train_and_a_set_without_texts_are_refused(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with pytest.raises(WorkbenchError):
        Curvature(llama, [])
    with pytest.raises(WorkbenchError):
        Curvature(_only(llama, ()), [batch])


@pytest.mark.parametrize("sick", [0, 1])
def test_a_loss_that_is_not_finite_is_refused_in_whichever_batch_it_is(
    sick: int, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    # Token 2 is in no generated text (they start at 3), so its broken embedding spoils only the
    # batch that we put it into.
    with torch.no_grad():
        llama.get_input_embeddings().weight[2] = torch.nan
    texts = [make_batch((6, 5), seed=1), make_batch((6, 5), seed=2)]
    texts[sick].input_ids[0, 1] = 2
    with pytest.raises(WorkbenchError, match="finite"):
        extremes(llama, texts, max_products=16)


# --- Extreme eigenvalues ---


def test_extremes_are_both_ends_of_the_dense_spectrum_with_small_residuals(
    small: PreTrainedModel, batch: Batch
) -> None:
    hessian = _dense(small, batch)
    values = np.linalg.eigvalsh(hessian)
    found = extremes(small, [_rows(batch, [0]), _rows(batch, [1, 2])], tolerance=1e-6)
    assert found.top == pytest.approx(values[-1], rel=1e-4)
    assert found.bottom == pytest.approx(values[0], rel=1e-3)
    assert found.bottom < 0 < found.top
    assert 0 <= found.top_residual < 1e-3
    assert 0 <= found.bottom_residual < 1e-2
    assert found.gradient_norm == pytest.approx(
        float(np.linalg.norm(Curvature(small, [batch]).gradient())), rel=1e-4
    )
    assert 10 <= found.products <= 450


def test_extremes_do_not_depend_on_the_starting_vector(
    small: PreTrainedModel, batch: Batch
) -> None:
    first, second = (extremes(small, [batch], seed=seed, tolerance=1e-5) for seed in (1, 2))
    assert first.top == pytest.approx(second.top, rel=1e-3)
    assert first.bottom == pytest.approx(second.bottom, rel=1e-3)
    assert extremes(small, [batch], seed=1, tolerance=1e-5) == first


def test_a_search_that_does_not_converge_is_an_error_that_names_the_remedy(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with pytest.raises(WorkbenchError, match="max_products"):
        extremes(llama, [batch], tolerance=1e-12, max_products=8)


# --- Directions ---


def test_every_filter_of_a_random_direction_has_the_norm_of_the_same_filter_of_the_weights(
    llama: PreTrainedModel,
) -> None:
    direction = random_direction(llama, seed=0)
    for name, parameter in llama.named_parameters():
        if parameter.ndim < 2:
            assert name not in direction  # norm gains get no perturbation
            continue
        value, weights = direction[name], parameter.detach()
        assert value.shape == weights.shape
        assert value.dtype == torch.float32
        # nn.Linear stores [out, in]: a row feeds an output unit; a column of a projection into the
        # residual stream leaves a hidden unit.
        back = name.endswith(("o_proj.weight", "down_proj.weight"))
        filters = (value.T, weights.T) if back else (value, weights)
        other = (value, weights) if back else (value.T, weights.T)
        torch.testing.assert_close(filters[0].norm(dim=1), filters[1].norm(dim=1))
        assert not torch.allclose(other[0].norm(dim=1), other[1].norm(dim=1), rtol=1e-3)
        # A draw, not the weights again.
        assert abs(float(torch.cosine_similarity(value.flatten(), weights.flatten(), dim=0))) < 0.3
    assert set(direction) == {name for name, p in llama.named_parameters() if p.ndim > 1}


def test_a_seed_decides_a_random_direction_and_global_randomness_does_not(
    llama: PreTrainedModel,
) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random_direction(llama, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = random_direction(llama, seed=3), random_direction(llama, seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_filter_of_zeros_stays_zero(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.model.layers[0].mlp.gate_proj.weight[2] = 0
    value = random_direction(llama, seed=0)["model.layers.0.mlp.gate_proj.weight"]
    assert not value[2].any()
    assert bool(torch.isfinite(value).all())


def test_descent_is_minus_the_gradient_of_the_summed_loss(
    small: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    texts = [batch, make_batch((9, 3), seed=5)]
    twin = _eager(small)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    total = sum(_nll_sum(twin, parameters, one) for one in texts)
    expected = dict(
        zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True)
    )
    found = descent_direction(small, texts)
    assert set(found) == set(SUBSET)
    for name, value in found.items():
        assert _apart(value.double().numpy(), -expected[name].numpy()) < 1e-5
    assert all(parameter.grad is None for parameter in small.parameters())


def test_scaled_has_the_asked_length_and_the_same_direction() -> None:
    direction = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[0.0, 4.0]])}
    assert norm_of(direction) == 5.0
    found = scaled(direction, 2.5)
    torch.testing.assert_close(found["a"], torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(found["b"], torch.tensor([[0.0, 2.0]]))
    assert norm_of(scaled(direction, 7.0)) == pytest.approx(7.0)
    zero = scaled({"a": torch.zeros(3)}, 2.0)
    assert not zero["a"].any()


# --- Moving the weights ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_bit_by_bit(dtype: torch.dtype, make_model: ModelMaker) -> None:
    model = make_model().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    direction = random_direction(model, seed=0)
    with movable_weights(model) as move:
        for position in (1e-7, -1e4, 0.3):
            move(direction, position)
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert all(
        torch.equal(p, before[name]) and p.dtype == dtype for name, p in model.named_parameters()
    )


def _raise_inside(model: PreTrainedModel, direction: Direction) -> None:
    with movable_weights(model) as move:
        move(direction, 0.7)
        raise RuntimeError("interrupted")


def test_the_weights_come_back_after_an_exception(llama: PreTrainedModel) -> None:
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    with pytest.raises(RuntimeError, match="interrupted"):
        _raise_inside(llama, random_direction(llama, seed=0))
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_the_weights_come_back_after_a_slice_that_fails(
    llama: PreTrainedModel, batch: Batch
) -> None:
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    broken = replace(batch, input_ids=batch.input_ids + 1000)  # no such tokens
    with pytest.raises((IndexError, RuntimeError)):
        loss_slice(llama, random_direction(llama, seed=0), [0.5], {"forget": [broken]})
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_every_move_starts_from_the_centre(llama: PreTrainedModel) -> None:
    start = {name: p.detach().clone() for name, p in llama.named_parameters()}
    direction = random_direction(llama, seed=0)
    with movable_weights(llama) as move:
        move(direction, 3.0)
        move(direction, -0.25)
        for name, parameter in llama.named_parameters():
            expected = start[name] - 0.25 * direction[name] if name in direction else start[name]
            torch.testing.assert_close(parameter.detach(), expected)


def test_a_move_along_another_direction_forgets_the_first(llama: PreTrainedModel) -> None:
    # "sets the weights to theta + a * direction": what the second direction does not name stands at
    # theta.
    start = {name: p.detach().clone() for name, p in llama.named_parameters()}
    everything = random_direction(llama, seed=0)
    head = {"lm_head.weight": everything["lm_head.weight"]}
    with movable_weights(llama) as move:
        move(everything, 1.0)
        move(head, 1.0)
        torch.testing.assert_close(
            llama.lm_head.weight.detach(), start["lm_head.weight"] + head["lm_head.weight"]
        )
        assert torch.equal(llama.model.embed_tokens.weight, start["model.embed_tokens.weight"])


# --- Slices ---


def test_mean_loss_is_the_mean_over_the_tokens_of_all_batches(
    llama: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    texts = [batch, make_batch((9, 3), seed=5, targets="answer")]
    total = sum(float(_nll_sum(_eager(llama), {}, one).detach()) for one in texts)
    assert mean_loss(llama, texts) == pytest.approx(
        total / sum(int(one.target_mask.sum()) for one in texts), rel=1e-6
    )


def test_a_target_at_the_first_token_counts_in_no_mean(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    # A tokenizer without BOS and an answer that begins the text: encode marks token 0, which no
    # model predicts. cross_entropy leaves it out.
    batch = make_batch((6, 6), targets="answer")
    mask = batch.target_mask.clone()
    mask[:, 0] = True
    marked = replace(batch, target_mask=mask)
    expected = float(cross_entropy(llama, batch).detach())
    assert float(cross_entropy(llama, marked).detach()) == pytest.approx(expected, rel=1e-6)
    assert mean_loss(llama, [marked]) == pytest.approx(expected, rel=1e-6)
    assert (
        _apart(Curvature(llama, [marked]).gradient(), Curvature(llama, [batch]).gradient()) < 1e-6
    )


def test_position_zero_of_a_slice_is_the_mean_loss_exactly(
    llama: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    losses = {"forget": [batch], "retain": [make_batch((4, 8), seed=3), make_batch((5,), seed=4)]}
    values = loss_slice(llama, random_direction(llama, seed=0), [-0.1, 0.0, 0.1], losses)
    for name, texts in losses.items():
        assert values[name][1] == mean_loss(llama, texts)
        assert values[name][0] != values[name][1] != values[name][2]


def test_values_come_in_the_order_of_the_positions(llama: PreTrainedModel, batch: Batch) -> None:
    direction = random_direction(llama, seed=0)
    forward = loss_slice(llama, direction, [-0.2, 0.0, 0.3], {"forget": [batch]})["forget"]
    shuffled = loss_slice(llama, direction, [0.3, -0.2, 0.0], {"forget": [batch]})["forget"]
    assert shuffled == [forward[2], forward[0], forward[1]]


def test_the_second_difference_of_a_slice_is_the_curvature_along_the_direction(
    llama: PreTrainedModel, batch: Batch
) -> None:
    for seed in range(2):
        operator = Curvature(llama, [batch])
        direction = scaled(random_direction(llama, seed), 1.0)
        flat = np.concatenate(
            [
                direction[name].double().numpy().reshape(-1)
                if name in direction
                else np.zeros(p.numel())
                for name, p in llama.named_parameters()
            ]
        )
        curvature = float(flat @ operator.product(flat))
        step = 0.02
        below, here, above = loss_slice(llama, direction, [-step, 0.0, step], {"loss": [batch]})[
            "loss"
        ]
        slope = float(flat @ operator.gradient())
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=1e-3)
        assert (above - 2 * here + below) / step**2 == pytest.approx(curvature, rel=5e-2, abs=2e-2)


def test_the_slope_along_unit_descent_is_minus_the_length_of_the_gradient(
    llama: PreTrainedModel, batch: Batch
) -> None:
    direction = scaled(descent_direction(llama, [batch]), 1.0)
    step = 1e-2
    below, above = loss_slice(llama, direction, [-step, step], {"loss": [batch]})["loss"]
    assert (above - below) / (2 * step) == pytest.approx(
        -float(np.linalg.norm(Curvature(llama, [batch]).gradient())), rel=1e-2
    )


def test_a_slice_in_the_head_is_the_log_partition_of_linear_logits(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # Logits are linear in the head: z(a) = h W' + a h D', so L(a) = mean(logsumexp z(a) -
    # z(a)[target]) needs no model at all.
    head = llama.lm_head.weight.detach()
    direction = {
        "lm_head.weight": torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    }
    with torch.no_grad():
        hidden = llama.model(**batch.inputs).last_hidden_state[:, :-1].double()
    mask = batch.target_mask[:, 1:]
    targets = batch.input_ids[:, 1:][mask]
    base, slope = (
        hidden[mask] @ head.double().T,
        hidden[mask] @ direction["lm_head.weight"].double().T,
    )
    positions = [-1.0, -0.3, 0.0, 0.3, 1.0, 2.0]
    expected = []
    for a in positions:
        logits = base + a * slope
        expected.append(
            float((logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]).mean())
        )
    found = loss_slice(llama, direction, positions, {"loss": [batch]})["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A log partition is convex in a.
    assert (found[1] - found[0]) / 0.7 < (found[3] - found[1]) / 0.6 < (found[5] - found[4]) / 1.0


def test_the_same_change_of_every_row_of_the_head_changes_no_loss(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # Softmax does not see a shift of all logits.
    shift = {
        "lm_head.weight": torch.ones(50, 1)
        @ torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    }
    values = loss_slice(llama, shift, [-1.0, 0.0, 1.0], {"loss": [batch]})["loss"]
    np.testing.assert_allclose(values, values[1], rtol=1e-5)


def test_a_slice_towards_the_base_ends_at_the_loss_of_the_base(
    make_model: ModelMaker, batch: Batch
) -> None:
    here, base = make_model(seed=1), make_model(seed=2)
    towards = {
        name: q.detach() - p.detach()
        for (name, p), q in zip(here.named_parameters(), base.parameters(), strict=True)
    }
    values = loss_slice(here, towards, [0.0, 1.0], {"loss": [batch]})["loss"]
    assert values[0] == mean_loss(here, [batch])
    assert values[1] == pytest.approx(mean_loss(base, [batch]), rel=1e-5)
    assert values[0] != pytest.approx(values[1], rel=1e-2)
