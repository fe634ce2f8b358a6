"""Sharpness-aware minimisation of the forget term, step by step against its formula."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.unlearning.objectives import LossTerm, Objective, Pair, npo, retain_cross_entropy
from workbench.unlearning.smoothing import plain, sam

BatchMaker = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]
Gradients = Callable[[PreTrainedModel, Tensor], dict[str, Tensor]]
Weights = dict[str, Tensor]


@pytest.fixture
def pair(make_batch: BatchMaker) -> Pair:
    """A forget batch and a retain batch."""
    return Pair(make_batch((7, 5), 1), make_batch((6, 8), 2))


OBJECTIVE = Objective(npo(0.1), retain_cross_entropy, 1.3, 0.7)


def _weights(model: PreTrainedModel) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _grads(model: PreTrainedModel) -> Weights:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _norm(values: Weights) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))


def _difference(first: Weights, second: Weights) -> Weights:
    assert first.keys() == second.keys()
    return {name: first[name].double() - second[name].double() for name in first}


def _watched(loss: LossTerm, seen: list[Weights]) -> LossTerm:
    """The same loss; the weights it is called at are kept."""

    def watching(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        seen.append(_weights(model))
        return loss(model, batch, reference)

    return watching


def _retain_gradient(model: PreTrainedModel, pair: Pair, gradients: Gradients) -> Weights:
    term = OBJECTIVE.retain_term(model, pair, model)
    assert term is not None
    return gradients(model, term)


@pytest.mark.parametrize("rho", [1e-3, 0.05, 2.0])
def test_the_perturbation_has_length_rho_along_the_forget_gradient(
    rho: float, llama: PreTrainedModel, pair: Pair, nearby: Mover, gradients: Gradients
) -> None:
    model = nearby(llama)
    direction = gradients(model, OBJECTIVE.forget_term(model, pair, llama))
    forget_at: list[Weights] = []
    retain_at: list[Weights] = []
    objective = Objective(
        _watched(OBJECTIVE.forget, forget_at), _watched(retain_cross_entropy, retain_at), 1.3, 0.7
    )
    start = _weights(model)
    sam(rho)(model, objective, pair, llama)
    assert len(forget_at) == 2 and len(retain_at) == 1
    # Only the second forget pass is perturbed.
    assert all(
        torch.equal(forget_at[0][name], start[name])
        and torch.equal(retain_at[0][name], start[name])
        for name in start
    )
    epsilon = _difference(forget_at[1], start)
    assert _norm(epsilon) == pytest.approx(rho, rel=1e-3)
    cosine = sum(float((epsilon[name] * direction[name].double()).sum()) for name in start) / (
        _norm(epsilon) * _norm(direction)
    )
    assert cosine == pytest.approx(1, abs=1e-4)  # uphill: it raises the forget term


@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_the_gradient_is_that_of_forget_at_the_perturbed_and_of_retain_at_the_present_weights(
    rho: float, llama: PreTrainedModel, pair: Pair, nearby: Mover, gradients: Gradients
) -> None:
    model = nearby(llama)
    forget = gradients(model, OBJECTIVE.forget_term(model, pair, llama))
    retain = _retain_gradient(model, pair, gradients)
    there = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in there.named_parameters():
            parameter.add_(forget[name], alpha=rho / _norm(forget))
    expected = {
        name: g + retain[name]
        for name, g in gradients(there, OBJECTIVE.forget_term(there, pair, llama)).items()
    }
    sam(rho)(model, OBJECTIVE, pair, llama)
    assert _norm(_difference(_grads(model), expected)) <= 1e-4 * _norm(expected)
    # The test would not notice a missing perturbation if it changed nothing.
    here = {name: forget[name] + retain[name] for name in forget}
    assert _norm(_difference(here, expected)) > 1e-3 * _norm(expected)


def test_weights_are_put_back_bit_by_bit(llama: PreTrainedModel, pair: Pair, nearby: Mover) -> None:
    model = nearby(llama)
    before = _weights(model)
    sam(1.7)(model, OBJECTIVE, pair, llama)
    assert all(torch.equal(value, before[name]) for name, value in _weights(model).items())


@pytest.mark.parametrize("backward", [False, True])
def test_weights_and_gradients_are_put_back_when_the_perturbed_pass_raises(
    backward: bool, llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model, calls = nearby(llama), list[int]()

    def explode(_gradient: Tensor) -> Tensor:
        # Deep in the backward pass, when the upper layers have received their gradients.
        raise ZeroDivisionError("planted")

    def failing(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        calls.append(1)
        if len(calls) < 2:
            return npo(0.1)(model, batch, reference)
        if not backward:
            raise ZeroDivisionError("planted")
        handle = model.get_submodule("model.layers.0").register_forward_hook(
            lambda _m, _a, output: output.register_hook(explode) and None
        )
        loss = npo(0.1)(model, batch, reference)
        handle.remove()
        return loss

    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.25) if number % 2 else None
    before, grads = _weights(model), _grads(model)
    with pytest.raises(ZeroDivisionError, match="planted"):
        sam(0.3)(model, Objective(failing, retain_cross_entropy), pair, llama)
    assert len(calls) == 2
    assert all(torch.equal(value, before[name]) for name, value in _weights(model).items())
    assert _grads(model).keys() == grads.keys()
    assert all(torch.equal(value, grads[name]) for name, value in _grads(model).items())


def test_a_vanishing_radius_gives_the_plain_step(
    llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    first, second = nearby(llama), nearby(llama)
    plain_log, sam_log = (
        plain(first, OBJECTIVE, pair, llama),
        sam(1e-6)(second, OBJECTIVE, pair, llama),
    )
    assert _norm(_difference(_grads(second), _grads(first))) <= 1e-4 * _norm(_grads(first))
    assert sam_log["forget"] == pytest.approx(plain_log["forget"], rel=1e-6)
    assert sam_log["retain"] == pytest.approx(plain_log["retain"], rel=1e-6)


def test_the_plain_step_is_the_gradient_of_the_whole_objective(
    llama: PreTrainedModel, pair: Pair, nearby: Mover, gradients: Gradients
) -> None:
    model = nearby(llama)
    expected = gradients(model, OBJECTIVE(model, pair, llama))
    log = plain(model, OBJECTIVE, pair, llama)
    assert _norm(_difference(_grads(model), expected)) <= 1e-5 * _norm(expected)
    assert log["forget"] + log["retain"] == pytest.approx(
        float(OBJECTIVE(model, pair, llama).detach()), rel=1e-6
    )


def test_frozen_parameters_are_neither_perturbed_nor_counted(
    llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    model, seen = nearby(llama), list[Weights]()
    frozen = {name for name, _ in model.named_parameters() if "layers.0" in name or "embed" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    start = _weights(model)
    sam(0.4)(model, Objective(_watched(npo(0.1), seen), retain_cross_entropy), pair, llama)
    epsilon = _difference(seen[1], start)
    assert all(not bool(epsilon[name].any()) for name in frozen)
    assert _norm(epsilon) == pytest.approx(0.4, rel=1e-3)
    assert _grads(model).keys() == start.keys() - frozen


@pytest.mark.parametrize("rule", [plain, sam(0.2)], ids=["plain", "sam"])
def test_a_step_adds_to_gradients_that_are_there(
    rule: Callable[..., dict[str, float]], llama: PreTrainedModel, pair: Pair, nearby: Mover
) -> None:
    fresh, filled = nearby(llama), nearby(llama)
    for parameter in filled.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    rule(fresh, OBJECTIVE, pair, llama)
    rule(filled, OBJECTIVE, pair, llama)
    expected = {name: value + 0.5 for name, value in _grads(fresh).items()}
    torch.testing.assert_close(_grads(filled), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rho", [1e-4, 1e-3])
def test_the_forget_term_rises_by_rho_times_the_gradient_length(
    rho: float, llama: PreTrainedModel, pair: Pair, gradients: Gradients
) -> None:
    def forget(
        model: PreTrainedModel, batch: Batch, reference: PreTrainedModel
    ) -> Tensor:  # in float64 to the end
        logits: Tensor = model(**batch.inputs).logits
        return logits.square().mean() / 10

    model, objective = llama.double(), Objective(forget)
    slope = _norm(gradients(model, forget(model, pair.forget, llama)))
    log = sam(rho)(model, objective, pair, llama)
    assert log["sam_rise"] == pytest.approx(rho * slope, rel=2e-2)
    assert log["retain"] == 0.0


def test_a_forget_term_without_gradient_is_not_perturbed(
    llama: PreTrainedModel, pair: Pair
) -> None:
    seen: list[Weights] = []

    def flat(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        logits: Tensor = model(**batch.inputs).logits
        return (logits * 0).sum()

    start = _weights(llama)
    log = sam(0.5)(llama, Objective(_watched(flat, seen), retain_cross_entropy), pair, llama)
    assert all(torch.equal(seen[1][name], start[name]) for name in start)
    assert log["sam_rise"] == 0.0


def test_rho_must_be_positive() -> None:
    for rho in (0.0, -0.01):
        with pytest.raises(ValueError, match="rho"):
            sam(rho)
