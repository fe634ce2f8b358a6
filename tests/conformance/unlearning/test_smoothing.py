"""Step rules on tiny language models, against plain PyTorch and finite differences, and what all
rules promise. Closed forms: ``test_smoothing_analytic.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.hooks import resolve
from workbench.unlearning.noise import noisy_reference
from workbench.unlearning.objectives import (
    LossTerm,
    Objective,
    Pair,
    idk_dpo,
    negative_cross_entropy,
    npo,
    retain_cross_entropy,
    retain_kl,
    simnpo,
    teacher_kl,
    undial,
)
from workbench.unlearning.representation import (
    adaptive_steer_to,
    break_circuits,
    control_vector,
    keep_representation,
    mlp_breaking,
    steer_by,
    steer_to,
)
from workbench.unlearning.smoothing import (
    StepRule,
    asam,
    curvature_regularisation,
    gradient_penalty,
    plain,
    randomised_smoothing,
    sam,
)

BatchMaker = Callable[..., Batch]
ModelMaker = Callable[..., PreTrainedModel]
Mover = Callable[..., PreTrainedModel]
Weights = dict[str, Tensor]

RULES: dict[str, Callable[[], StepRule]] = {
    "sam": lambda: sam(0.2),
    "asam": lambda: asam(0.3),
    "rs": lambda: randomised_smoothing(0.03, 3, 5),
    "rs-antithetic": lambda: randomised_smoothing(0.03, 4, 5, antithetic=True),
    "gp": lambda: gradient_penalty(0.4),
    "gp-difference": lambda: gradient_penalty(0.4, exact=False),
    "cr": lambda: curvature_regularisation(0.6, 0.05),
}
PASSES = {"sam": 2, "asam": 2, "rs": 4, "rs-antithetic": 5, "gp": 1, "gp-difference": 3, "cr": 3}
every_rule = pytest.mark.parametrize("name", list(RULES))


@pytest.fixture
def pair(make_batch: BatchMaker) -> Pair:
    """A forget batch with refusals and a retain batch."""
    return Pair(
        replace(make_batch((7, 5, 8), 1), alternative=make_batch((6, 9, 5), 3)),
        make_batch((6, 8), 2),
    )


def _weights(model: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _grads(model: nn.Module) -> Weights:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _norm(values: Weights) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))


def _minus(first: Weights, second: Weights) -> Weights:
    assert first.keys() == second.keys()
    return {name: first[name].double() - second[name].double() for name in first}


def _same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
        for name in first
    )


def _run(
    rule: StepRule,
    model: PreTrainedModel,
    objective: Objective,
    pair: Pair,
    reference: PreTrainedModel,
) -> Weights:
    model.zero_grad()
    rule(model, objective, pair, reference)
    return _grads(model)


def _steering(model: PreTrainedModel) -> LossTerm:
    (site,) = resolve(model, "blocks.0.hook_resid_post")
    return steer_to(site, 3 * control_vector(16, 0))


def _npo_by_hand(
    model: PreTrainedModel, weights: Weights, batch: Batch, before: Tensor | None = None
) -> Tensor:
    logits = functional_call(model, weights, kwargs=batch.inputs).logits[:, :-1]
    logs = logits.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    total = (logs * batch.target_mask[:, 1:]).sum(1)
    return (
        total
        if before is None
        else (2 / 0.1 * torch.log(1 + torch.exp(0.1 * (total - before)))).mean()
    )


def _rmu_by_hand(model: PreTrainedModel, weights: Weights, batch: Batch) -> Tensor:
    states = functional_call(
        model, weights, kwargs={**batch.inputs, "output_hidden_states": True}
    ).hidden_states[1]
    rows = torch.cat(
        [states[row, 1 : int(batch.attention_mask[row].sum())] for row in range(batch.size)]
    )
    return (rows - 3 * control_vector(16, 0)).square().mean()


def _by_hand(
    kind: str, model: PreTrainedModel, batch: Batch, reference: PreTrainedModel
) -> tuple[Callable[[Weights], Tensor], Weights]:
    """Loss as a function of the weights, in float64 with eager attention, and the weights."""
    still, start = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    still.set_attn_implementation("eager")
    weights = {name: value.double().requires_grad_() for name, value in _weights(model).items()}
    if kind == "rmu":
        return lambda w: _rmu_by_hand(still, w, batch), weights
    before = _npo_by_hand(start, _weights(start), batch)
    return lambda w: _npo_by_hand(still, w, batch, before), weights


def _length(values: Any) -> Tensor:
    return sum(value.square().sum() for value in values).sqrt()


def _penalised(
    loss: Callable[[Weights], Tensor], weights: Weights, rule: str, graph: bool = True
) -> Tensor:
    """The penalised scalar in plain PyTorch; the whole graph, the direction of the curvature
    penalty in it.
    """
    value = loss(weights)
    gradient = torch.autograd.grad(
        value, list(weights.values()), create_graph=graph, materialize_grads=True
    )
    if rule == "gp":
        return value + 0.4 * _length(gradient)
    length = _length(gradient)
    there = {
        name: weight + 0.05 * g / length
        for (name, weight), g in zip(weights.items(), gradient, strict=True)
    }
    other = torch.autograd.grad(
        loss(there), list(there.values()), create_graph=graph, materialize_grads=True
    )
    return value + 0.6 * _length(b - a for a, b in zip(gradient, other, strict=True))


@pytest.mark.parametrize("kind", ["npo", "rmu"])
@pytest.mark.parametrize("name", ["gp", "gp-difference", "cr"])
def test_penalties_equal_plain_pytorch_written_out(
    name: str, kind: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model = nearby(llama)
    loss, weights = _by_hand(kind, model, pair.forget, llama)
    base = torch.autograd.grad(loss(weights), list(weights.values()), materialize_grads=True)
    total = torch.autograd.grad(
        _penalised(loss, weights, name.partition("-")[0]),
        list(weights.values()),
        materialize_grads=True,
    )
    expected = {
        key: value - g for key, value, g in zip(weights, total, base, strict=True)
    }  # what the penalty adds
    objective = Objective(npo(0.1) if kind == "npo" else _steering(model))
    without = _run(plain, model, objective, pair, llama)
    added = _minus(_run(RULES[name](), model, objective, pair, llama), without)
    tolerance = 3e-3 if name == "gp-difference" else 3e-4
    assert _norm(_minus(added, {key: expected[key] for key in added})) <= tolerance * _norm(
        expected
    )
    assert all(not expected[key].any() for key in expected.keys() - added.keys())
    # A detached penalty would add nothing.
    assert _norm(expected) > 0.1 * _norm(without)


@pytest.mark.parametrize("kind", ["npo", "rmu"])
@pytest.mark.parametrize("name", ["gp", "cr"])
def test_penalties_have_the_slope_of_their_scalar(
    name: str, kind: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    """Finite differences of the penalised scalar, from first derivatives alone, along the found
    gradient and along a random direction.
    """
    model = nearby(llama)
    loss, weights = _by_hand(kind, model, pair.forget, llama)
    found = _run(
        RULES[name](),
        model,
        Objective(npo(0.1) if kind == "npo" else _steering(model)),
        pair,
        llama,
    )
    draw = torch.Generator().manual_seed(0)
    random = {
        key: torch.randn(value.shape, generator=draw, dtype=torch.float64)
        for key, value in found.items()
    }
    for direction, size in ((found, 3e-4), (random, 3e-3)):
        unit = {key: value.double() / _norm(direction) for key, value in direction.items()}

        def at(far: float, unit: Weights = unit) -> float:
            there = {
                key: (
                    value.detach() + far * unit[key] if key in unit else value.detach()
                ).requires_grad_()
                for key, value in weights.items()
            }
            return float(_penalised(loss, there, name, graph=False).detach())

        # The models compute norms and softmax in float32 whatever their weights: the step balances
        # their rounding with the third derivative, which is large along the gradient.
        slope = (at(size) - at(-size)) / (2 * size)
        assert sum(float((found[key].double() * unit[key]).sum()) for key in unit) == pytest.approx(
            slope, rel=3e-3
        )


@pytest.mark.parametrize("name", ["sam", "asam", "rs", "rs-antithetic"])
def test_perturbed_steps_equal_plain_pytorch_written_out(
    name: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model = nearby(llama)
    loss, weights = _by_hand("npo", model, pair.forget, llama)
    gradient = dict(
        zip(weights, torch.autograd.grad(loss(weights), list(weights.values())), strict=True)
    )
    stream = torch.Generator().manual_seed(5)
    if name == "sam":
        steps = [{key: 0.2 * g / _norm(gradient) for key, g in gradient.items()}]
    elif name == "asam":
        scale = {key: value.detach().abs() + 0.01 for key, value in weights.items()}
        length = _norm({key: scale[key] * g for key, g in gradient.items()})
        steps = [{key: 0.3 * scale[key] ** 2 * g / length for key, g in gradient.items()}]
    else:
        steps = [
            {
                key: 0.03 * torch.randn(value.shape, generator=stream)
                for key, value in weights.items()
            }
            for _ in range(3 if name == "rs" else 2)
        ]
        if name == "rs-antithetic":
            steps = [
                {key: sign * value for key, value in step.items()}
                for step in steps
                for sign in (1, -1)
            ]
    expected = {key: torch.zeros_like(value) for key, value in weights.items()}
    rise = []
    for step in steps:
        there = {
            key: (value.detach() + step[key]).requires_grad_() for key, value in weights.items()
        }
        value = loss(there)
        rise.append(float(value.detach() - loss(weights).detach()))
        for key, g in zip(weights, torch.autograd.grad(value, list(there.values())), strict=True):
            expected[key] += g / len(steps)
    log = RULES[name]()(model, Objective(npo(0.1)), pair, llama)
    assert _norm(_minus(_grads(model), expected)) <= 1e-4 * _norm(expected)
    assert log["sam_rise" if "sam" in name else "rs_rise"] == pytest.approx(np.mean(rise), rel=1e-3)
    assert _norm(_minus(expected, gradient)) > 0.05 * _norm(gradient)


def _objectives(model: PreTrainedModel) -> dict[str, LossTerm]:
    (stream,) = resolve(model, "blocks.0.hook_resid_post")
    outputs = tuple(resolve(model, "blocks.*.mlp.hook_out"))
    return {
        "gradient-ascent": negative_cross_entropy,
        "npo": npo(0.1),
        "simnpo": simnpo(2.0, 0.5),
        "idk-dpo": idk_dpo(0.1),
        "undial": undial(3.0),
        "kl": retain_kl,
        "scrub": teacher_kl(2.0, -1.0),
        "rmu": steer_to(stream, 3 * control_vector(16, 0)),
        "adaptive-rmu": adaptive_steer_to(stream, control_vector(16, 1), 2.0),
        "rsv": steer_by(stream, 2 * control_vector(16, 2)),
        "mlp-breaking": mlp_breaking(outputs),
        "circuit-breakers": break_circuits(outputs),
    }


@pytest.mark.parametrize(
    "label",
    [
        "gradient-ascent",
        "npo",
        "simnpo",
        "idk-dpo",
        "undial",
        "kl",
        "scrub",
        "rmu",
        "adaptive-rmu",
        "rsv",
        "mlp-breaking",
        "circuit-breakers",
    ],
)
def test_rules_work_around_every_forget_term(
    label: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model = nearby(llama)
    objective = Objective(_objectives(model)[label], retain_cross_entropy)
    base = _run(plain, model, objective, pair, llama)
    for name, build in RULES.items():
        with_rule = _run(build(), model, objective, pair, llama)
        assert with_rule.keys() == base.keys()
        assert all(bool(value.isfinite().all()) for value in with_rule.values()), name
        assert _norm(_minus(with_rule, base)) > 1e-4 * _norm(base), name


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_second_derivatives_exist_in_every_family(
    family: str, make_model: ModelMaker, pair: Pair, nearby: Mover
) -> None:
    start = make_model(family)
    model, objective = nearby(start), Objective(npo(0.1))
    base = _run(plain, model, objective, pair, start)
    exact, near = (
        _minus(_run(gradient_penalty(0.4, exact=e), model, objective, pair, start), base)
        for e in (True, False)
    )
    assert _norm(_minus(exact, near)) <= 3e-3 * _norm(exact)


# --- what all rules promise -----------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_come_back_bit_by_bit_in_their_own_storage(
    name: str, dtype: torch.dtype, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model = nearby(llama).to(dtype)
    before, buffers = _weights(model), {key: value.clone() for key, value in model.named_buffers()}
    places = {key: parameter.data_ptr() for key, parameter in model.named_parameters()}
    RULES[name]()(model, Objective(npo(0.1), retain_cross_entropy), pair, llama.to(dtype))
    assert _same(_weights(model), before) and _same(dict(model.named_buffers()), buffers)
    assert {key: parameter.data_ptr() for key, parameter in model.named_parameters()} == places
    assert all(grad.dtype == dtype for grad in _grads(model).values()) and not model.training


def test_in_bfloat16_the_perturbation_still_has_length_rho(
    llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model, seen, rho = nearby(llama).bfloat16(), list[Weights](), 0.005
    start = _weights(model)

    def watching(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        seen.append(_weights(model))
        return npo(0.1)(model, batch, reference)

    sam(rho)(model, Objective(watching, retain_cross_entropy), pair, llama.bfloat16())
    epsilon = _minus(seen[1], start)
    assert _norm(epsilon) == pytest.approx(rho, rel=1e-3)
    # Rounded to bfloat16 it would be another one.
    rounded = _minus({key: value.bfloat16() for key, value in seen[1].items()}, start)
    assert abs(_norm(rounded) / rho - 1) > 0.1


@every_rule
def test_bfloat16_weights_are_smoothed_like_the_same_weights_in_float32(
    name: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    half = nearby(llama).bfloat16()
    whole, objective = copy.deepcopy(half).float(), Objective(npo(0.1))
    expected = _run(RULES[name](), whole, objective, pair, llama)
    found = _run(RULES[name](), half, objective, pair, llama)
    assert _same(found, {key: value.bfloat16() for key, value in expected.items()})


@every_rule
def test_autocast_does_not_round_the_perturbation_away(
    name: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model, objective = nearby(llama), Objective(npo(0.1))
    expected = _run(RULES[name](), model, objective, pair, llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(
            model, objective, pair, llama
        )  # leaves copies of the unperturbed weights in autocast's cache
        found = _run(RULES[name](), model, objective, pair, llama)
        assert torch.is_autocast_enabled("cpu")
    assert _same(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the retain term stays under it
        log, under = (
            RULES[name]()(model, replace(objective, retain=retain_cross_entropy), pair, llama),
            retain_cross_entropy(model, pair.retain, llama),
        )
    assert (
        log["retain"]
        == float(under.detach())
        != float(retain_cross_entropy(model, pair.retain, llama).detach())
    )


def test_half_precision_weights_below_float32_ones_that_rely_on_autocast_work(
    llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model = nearby(llama).bfloat16().requires_grad_(False)
    layer = model.get_submodule("model.layers.1.mlp.down_proj").float().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _run(sam(0.1), model, Objective(npo(0.1), retain_cross_entropy), pair, llama)
    assert list(found) == ["model.layers.1.mlp.down_proj.weight"]
    assert (
        layer.weight.dtype == torch.float32
        and model.get_parameter("lm_head.weight").dtype == torch.bfloat16
    )


@every_rule
def test_frozen_and_unused_parameters_are_told_by_name(
    name: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    """RMU reads the stream after the first block: half of the parameters are unused; some that are
    used are frozen.
    """
    model = nearby(llama)
    frozen = {
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    }
    used = {key for key in _weights(model) if key.startswith("model.layers.0.")} - frozen
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    found = _run(RULES[name](), model, Objective(_steering(model)), pair, llama)
    assert found.keys() == used
    # The same model with the frozen and the unused parameters taken out of reach otherwise.
    other = nearby(llama).requires_grad_(False)
    for key in used:
        other.get_parameter(key).requires_grad_(True)
    if not name.startswith(
        "rs"
    ):  # its stream runs over all parameters that may change, used or not
        assert _norm(
            _minus(found, _run(RULES[name](), other, Objective(_steering(model)), pair, llama))
        ) <= 1e-5 * _norm(found)
    start, seen = _weights(model), list[Weights]()

    def watching(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        seen.append(_weights(model))
        return _steering(model)(model, batch, reference)

    RULES[name]()(model, Objective(watching), pair, llama)
    assert len(seen) == PASSES[name]
    assert all(torch.equal(weights[key], start[key]) for weights in seen for key in frozen)


@every_rule
def test_tied_weights_move_once(
    name: str, make_model: ModelMaker, pair: Pair, nearby: Mover
) -> None:
    start = make_model(tie_word_embeddings=True)
    model, objective = nearby(start), Objective(npo(0.1))
    base, found = (
        _run(plain, model, objective, pair, start),
        _run(RULES[name](), model, objective, pair, start),
    )
    assert found.keys() == base.keys() and "lm_head.weight" not in found
    assert model.get_parameter("model.embed_tokens.weight") is model.get_submodule("lm_head").weight


@every_rule
def test_steps_are_accumulated(
    name: str, llama: PreTrainedModel, pair: Pair, make_batch: BatchMaker, nearby: Mover
) -> None:
    """Over the halves of a batch the sum is that of the halves' own steps: the stream of random
    numbers goes on, and penalties and perturbations are each half's own.
    """
    model, objective = nearby(llama), Objective(npo(0.1), retain_cross_entropy)
    halves = (pair, Pair(make_batch((5, 6), 8), make_batch((4, 7), 9)))
    rule, total = RULES[name](), _weights(model)
    total = {key: torch.zeros_like(value) for key, value in total.items()}
    for half in halves:
        for key, value in _run(rule, model, objective, half, llama).items():
            total[key] += value
    rule = RULES[name]()
    model.zero_grad()
    for half in halves:
        rule(model, objective, half, llama)
    assert _norm(_minus(_grads(model), total)) <= 1e-6 * _norm(total)


def test_the_penalty_of_two_halves_is_the_sum_of_theirs_and_not_that_of_the_whole(
    llama: PreTrainedModel, make_batch: BatchMaker, nearby: Mover
) -> None:
    model = nearby(llama)
    first, second = make_batch((7, 7), 1), make_batch((7, 7), 4)
    whole = Batch(
        *(
            torch.cat([getattr(first, k), getattr(second, k)])
            for k in ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
        ),
        ("a",) * 4,
    )
    objective = Objective(negative_cross_entropy, None, 0.5)
    log = {
        label: gradient_penalty(0.4)(model, objective, Pair(batch, batch), llama)
        for label, batch in (("a", first), ("b", second))
    }
    joint = gradient_penalty(0.4)(
        model, replace(objective, forget_weight=1.0), Pair(whole, whole), llama
    )
    assert joint["forget"] == pytest.approx(log["a"]["forget"] + log["b"]["forget"])
    assert joint["penalty"] < 0.95 * (
        log["a"]["penalty"] + log["b"]["penalty"]
    )  # triangle inequality


@every_rule
@pytest.mark.parametrize(
    ("error", "dtype"),
    [(ZeroDivisionError, torch.float32), (KeyboardInterrupt, torch.bfloat16)],
    ids=["float32", "bfloat16"],
)
def test_an_interrupted_step_leaves_weights_and_gradients_as_they_were(
    name: str,
    error: type[BaseException],
    dtype: torch.dtype,
    llama: PreTrainedModel,
    pair: Pair,
    nearby: Mover,
) -> None:
    """In every pass, forward or backward, and in the retain term."""
    model, reference = nearby(llama).to(dtype), llama.to(dtype)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.25) if number % 2 else None
    before, grads = _weights(model), _grads(model)

    def explode(_gradient: Tensor) -> Tensor:
        raise error("planted")

    def failing(
        model: PreTrainedModel,
        batch: Batch,
        reference: PreTrainedModel,
        *,
        term: LossTerm,
        calls: list[int],
        fatal: int,
        backward: bool,
    ) -> Tensor:
        calls.append(1)
        if len(calls) < fatal or (
            backward and not torch.is_grad_enabled()
        ):  # the next pass has a backward
            return term(model, batch, reference)
        if not backward:
            raise error("planted")
        handle = model.get_submodule("model.layers.0").register_forward_hook(
            lambda _m, _a, output: output.register_hook(explode) and None
        )
        loss = term(model, batch, reference)
        handle.remove()
        return loss

    for fatal, backward in [
        (number, backward) for number in range(1, PASSES[name] + 2) for backward in (False, True)
    ]:
        fail = partial(failing, calls=[], fatal=fatal, backward=backward)
        objective = Objective(
            partial(fail, term=npo(0.1)), partial(fail, term=retain_cross_entropy)
        )
        with pytest.raises(error, match="planted"):
            RULES[name]()(model, objective, pair, reference)
        assert _same(_weights(model), before) and _same(_grads(model), grads)


@every_rule
def test_rules_neither_read_nor_move_the_global_random_state(
    name: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model, found = nearby(llama), []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            found.append(_run(RULES[name](), model, Objective(npo(0.1)), pair, llama))
            assert torch.equal(torch.get_rng_state(), state)
    assert _same(*found)


def test_the_random_stream_goes_on_from_step_to_step_and_begins_again_at_a_restart(
    llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model, objective, rule = nearby(llama), Objective(npo(0.1)), randomised_smoothing(0.03, 2, 7)
    first, second = (_run(rule, model, objective, pair, llama) for _ in range(2))
    assert not _same(first, second)
    rule.restart()  # type: ignore[attr-defined]
    again = [_run(rule, model, objective, pair, llama) for _ in range(2)]
    assert _same(again[0], first) and _same(again[1], second)
    assert not _same(_run(randomised_smoothing(0.03, 2, 8), model, objective, pair, llama), first)


@every_rule
def test_noise_on_the_reference_is_drawn_once_per_step(
    name: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    """RMU with RNA: the retain gradient, and with it the stream of the noise, is that of plain
    steps.
    """
    model = nearby(llama)
    (site,) = resolve(model, "blocks.0.hook_resid_post")

    def objective() -> Objective:
        return Objective(
            _steering(model), noisy_reference(keep_representation(site), site, 0.5, 11), 1.0, 20.0
        )

    rule, bare, rna, clean = RULES[name](), RULES[name](), objective(), objective()
    for _ in range(2):
        with_rule, without_retain = (
            _run(rule, model, rna, pair, llama),
            _run(bare, model, Objective(rna.forget), pair, llama),
        )
        expected, forget = (
            _run(plain, model, clean, pair, llama),
            _run(plain, model, Objective(clean.forget), pair, llama),
        )
        difference = _minus(_minus(with_rule, without_retain), _minus(expected, forget))
        assert _norm(difference) <= 1e-5 * _norm(expected)


@every_rule
def test_the_log_says_what_the_step_did(
    name: str, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model, objective = nearby(llama), Objective(npo(0.1), retain_cross_entropy, 1.3, 0.7)
    base = plain(model, objective, pair, llama)
    log = RULES[name]()(model, objective, pair, llama)
    own = {
        "sam": {"sam_rise", "gradient_norm"},
        "asam": {"sam_rise", "gradient_norm"},
        "rs": {"rs_rise"},
    }.get(name.partition("-")[0], {"gradient_norm", "penalty"})
    assert log.keys() == {"forget", "retain"} | own
    assert all(isinstance(value, float) and math.isfinite(value) for value in log.values())
    assert log["forget"] == pytest.approx(base["forget"], rel=1e-6) and log[
        "retain"
    ] == pytest.approx(base["retain"], rel=1e-6)
    if "gradient_norm" in log:
        assert log["gradient_norm"] == pytest.approx(
            _norm(_run(plain, model, replace(objective, retain=None), pair, llama)), rel=1e-5
        )
