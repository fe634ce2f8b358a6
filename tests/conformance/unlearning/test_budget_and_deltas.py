"""The line search on functions whose answer is known, and weight deltas that restore what they came
from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from workbench.unlearning.budget import BudgetMatch, match_budget, smallest_change
from workbench.unlearning.deltas import apply_delta, delta_between, norm_of, snapshot

Mover = Callable[..., PreTrainedModel]
ModelMaker = Callable[..., PreTrainedModel]


def _holds(match: BudgetMatch, disruption: Callable[[float], float], budget: float) -> None:
    """What every match promises: never above the budget, honest about what was tried."""
    assert match.disruption <= budget
    assert dict(match.tried)[match.alpha] == match.disruption
    alphas = [alpha for alpha, _ in match.tried]
    assert alphas == sorted(set(alphas))
    for alpha, value in match.tried:
        true = disruption(alpha)
        assert value == true or (math.isnan(value) and math.isnan(true))


@pytest.mark.parametrize("budget", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("limit", [1.0, 4.0])
def test_a_linear_disruption_is_matched_at_the_budget(budget: float, limit: float) -> None:
    match = match_budget(lambda alpha: alpha, budget, limit=limit)
    assert match.reached
    _holds(match, lambda alpha: alpha, budget)
    assert budget * 0.98 <= match.alpha <= budget


@pytest.mark.parametrize("scale", [0.3, 1.0, 50.0, 1e6])
def test_a_quadratic_disruption_is_matched_at_the_root(scale: float) -> None:
    budget = 0.1

    def disruption(alpha: float) -> float:
        return scale * alpha**2

    match = match_budget(disruption, budget)
    assert match.reached
    _holds(match, disruption, budget)
    root = math.sqrt(budget / scale)
    assert root * math.sqrt(0.98) <= match.alpha <= root * (1 + 1e-12)


@given(
    power=st.floats(0.3, 4),
    scale=st.floats(0.5, 1e3),
    share=st.floats(0.01, 0.99),
    tolerance=st.sampled_from([0.1, 0.02, 0.001]),
)
def test_any_growing_disruption_is_matched_within_the_tolerance(
    power: float, scale: float, share: float, tolerance: float
) -> None:
    budget = share * scale

    def disruption(alpha: float) -> float:
        return scale * math.pow(alpha, power)

    match = match_budget(disruption, budget, tolerance=tolerance)
    assert match.reached
    _holds(match, disruption, budget)
    assert match.disruption >= budget * (1 - tolerance)


@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_a_budget_that_is_never_reached_gives_the_largest_alpha(limit: float) -> None:
    match = match_budget(lambda alpha: 0.1 * alpha, 0.5, limit=limit)
    assert not match.reached
    assert match.alpha == limit and match.disruption == pytest.approx(0.1 * limit)
    _holds(match, lambda alpha: 0.1 * alpha, 0.5)


def test_a_budget_met_exactly_at_the_limit_counts_as_reached() -> None:
    # False would mean that the method "stays below it even at the largest alpha allowed".
    match = match_budget(lambda alpha: alpha, 1.0)
    assert match.alpha == 1.0 and match.disruption == 1.0
    assert match.reached


def test_the_first_crossing_counts_when_disruption_falls_again() -> None:
    def disruption(
        alpha: float,
    ) -> float:  # up through the budget at 0.2, back below it at 0.6, up again at 0.9
        return 1 + (alpha - 0.2) * (alpha - 0.6) * (alpha - 0.9) * 8 if alpha else 0.0

    match = match_budget(disruption, 1.0)
    assert match.reached
    _holds(match, disruption, 1.0)
    assert match.alpha <= 0.2
    assert match.disruption >= 0.98


def test_a_disruption_that_dips_below_zero_is_followed_to_its_crossing() -> None:
    def disruption(alpha: float) -> float:
        return alpha * (alpha - 0.5) * 4

    match = match_budget(disruption, 0.4)
    assert match.reached
    _holds(match, disruption, 0.4)
    root = 0.25 + math.sqrt(0.0625 + 0.1)
    assert match.disruption >= 0.4 * 0.98 and match.alpha <= root


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_count_as_above_the_budget(bad: float) -> None:
    def disruption(alpha: float) -> float:
        return alpha if alpha <= 0.33 else bad

    match = match_budget(disruption, 0.5)
    assert not match.reached  # nothing says that the budget lies where no price is a number
    _holds(match, disruption, 0.5)
    assert match.alpha == pytest.approx(0.33, abs=1e-3)
    hopeless = match_budget(lambda alpha: bad if alpha else 0.0, 0.5)
    assert not hopeless.reached and 0 <= hopeless.alpha < 1e-6 and hopeless.disruption == 0


def test_a_jump_is_approached_from_below() -> None:
    def disruption(alpha: float) -> float:
        return 0.0 if alpha < 0.4 else 5.0

    match = match_budget(disruption, 1.0)
    assert match.reached and match.disruption == 0.0
    assert 0.4 - 1e-3 < match.alpha < 0.4


@pytest.mark.parametrize(("budget", "limit"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, -2.0)])
def test_a_budget_and_a_limit_must_be_positive(budget: float, limit: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        match_budget(lambda alpha: alpha, budget, limit=limit)


# --- deltas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_zero_restores_every_bit(
    dtype: torch.dtype, llama: PreTrainedModel, nearby: Mover
) -> None:
    model = llama.to(dtype)
    start = snapshot(model)
    trained = nearby(model)
    delta = delta_between(trained, start)
    for alpha in (1.0, 0.37, -2.0):
        apply_delta(model, start, delta, alpha)
        assert any(not torch.equal(value, start[name]) for name, value in model.named_parameters())
        apply_delta(model, start, delta, 0.0)
        assert all(torch.equal(value, start[name]) for name, value in model.named_parameters())


def test_alpha_zero_restores_the_sign_of_zero_and_ignores_a_broken_delta(
    llama: PreTrainedModel,
) -> None:
    name = "model.norm.weight"
    with torch.no_grad():
        llama.get_submodule("model.norm").weight.mul_(-0.0)
    start = snapshot(llama)
    for value in (1.0, float("inf"), float("nan")):
        apply_delta(llama, start, {name: torch.full_like(start[name], value)}, 0.0)
        # Compared as integers: -0.0 equals 0.0 and NaN equals nothing.
        assert torch.equal(
            dict(llama.named_parameters())[name].detach().view(torch.int32),
            start[name].view(torch.int32),
        )


def test_alpha_one_gives_the_trained_weights(llama: PreTrainedModel, nearby: Mover) -> None:
    start, trained = snapshot(llama), nearby(llama)
    delta = delta_between(trained, start)
    apply_delta(llama, start, delta, 1.0)
    goal = dict(trained.named_parameters())
    for name, value in llama.named_parameters():
        # theta0 + (theta - theta0) rounds twice in float32.
        torch.testing.assert_close(value, goal[name], rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("alpha", [-0.5, 0.25, 2.0])
def test_weights_are_start_plus_alpha_times_delta(
    alpha: float, llama: PreTrainedModel, nearby: Mover
) -> None:
    start, trained = snapshot(llama), nearby(llama)
    delta = delta_between(trained, start)
    apply_delta(llama, start, delta, alpha)
    for name, value in llama.named_parameters():
        exact = start[name].double() + alpha * delta[name].double()
        torch.testing.assert_close(value.double(), exact, rtol=2e-7, atol=2e-7)


def test_deltas_do_not_accumulate(llama: PreTrainedModel, nearby: Mover) -> None:
    start, trained = snapshot(llama), nearby(llama)
    delta = delta_between(trained, start)
    apply_delta(llama, start, delta, 0.7)
    once = snapshot(llama)
    for alpha in (0.1, -3.0, 0.7):
        apply_delta(llama, start, delta, alpha)
    assert all(torch.equal(value, once[name]) for name, value in llama.named_parameters())


def test_a_delta_holds_only_what_changed_and_the_rest_is_copied(llama: PreTrainedModel) -> None:
    start = snapshot(llama)
    trained = copy.deepcopy(llama)
    with torch.no_grad():
        trained.get_submodule("model.norm").weight.add_(0.5)
    delta = delta_between(trained, start)
    assert list(delta) == ["model.norm.weight"]
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(1.0)  # whatever stood there before
    apply_delta(llama, start, delta, 1.0)
    goal = dict(trained.named_parameters())
    assert all(torch.equal(value, goal[name]) for name, value in llama.named_parameters())
    assert delta_between(copy.deepcopy(trained), snapshot(trained)) == {}


def test_a_snapshot_is_a_copy(llama: PreTrainedModel) -> None:
    start = snapshot(llama)
    before = start["model.norm.weight"].clone()
    with torch.no_grad():
        llama.get_submodule("model.norm").weight.add_(1.0)
    assert torch.equal(start["model.norm.weight"], before)
    assert not any(value.requires_grad for value in start.values())


def test_tied_parameters_come_once(make_model: ModelMaker, nearby: Mover) -> None:
    model = make_model(tie_word_embeddings=True)
    start = snapshot(model)
    assert "lm_head.weight" not in start and "model.embed_tokens.weight" in start
    delta = delta_between(nearby(model), start)
    apply_delta(model, start, delta, 1.0)
    assert model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight


def test_the_delta_of_a_bf16_model_is_float32(llama: PreTrainedModel) -> None:
    start = snapshot(llama.bfloat16())
    assert all(value.dtype == torch.bfloat16 for value in start.values())
    # As the trainer does it: a float32 copy moves by less than bf16 can hold.
    trained = copy.deepcopy(llama).float()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1e-5)
    delta = delta_between(trained, start)
    assert set(delta) == set(start) and all(
        value.dtype == torch.float32 for value in delta.values()
    )
    count = sum(value.numel() for value in delta.values())
    assert norm_of(delta) == pytest.approx(1e-5 * math.sqrt(count), rel=2e-2)
    # Scaled up, the small update arrives: the sum is rounded to bf16 once, at the end.
    apply_delta(llama, start, delta, 3000.0)
    for name, value in llama.named_parameters():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, (start[name].float() + 3000.0 * delta[name]).bfloat16())


def test_the_delta_between_two_bf16_models_is_float32_and_exact(
    llama: PreTrainedModel, nearby: Mover
) -> None:
    model = llama.bfloat16()
    start, trained = snapshot(model), nearby(model)
    delta = delta_between(trained, start)
    for name, value in trained.named_parameters():
        assert delta[name].dtype == torch.float32
        assert torch.equal(delta[name], value.detach().float() - start[name].float())


def test_the_length_of_a_delta_is_accumulated_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = {
        "a": torch.randn(800, 1000, generator=generator) * 1e-3,
        "b": torch.randn(200_000, generator=generator) + 3.0,
        "c": torch.zeros(5),
    }
    exact = math.sqrt(sum(float((value.double() ** 2).sum()) for value in delta.values()))
    assert sum(value.numel() for value in delta.values()) > 10**6
    assert norm_of(delta) == pytest.approx(exact, rel=1e-12)
    assert norm_of({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}) == 5.0
    assert norm_of({}) == 0.0
    # Squares that float32 cannot hold.
    assert norm_of({"tiny": torch.full((100,), 1e-30), "large": torch.zeros(1)}) == pytest.approx(
        1e-29, rel=1e-6
    )
    assert norm_of({"huge": torch.full((100,), 1e30)}) == pytest.approx(1e31, rel=1e-6)


@pytest.mark.parametrize(
    ("last_recalled", "expected"), [(0.0, (0.25, True)), (1.0, (1.25, True)), (9.0, (4.0, False))]
)
def test_the_smallest_change_that_leaves_nothing_recalled_is_found_or_said_to_be_missing(
    last_recalled: float, expected: tuple[float, bool]
) -> None:
    tried: list[float] = []

    def recalled(alpha: float) -> bool:
        tried.append(alpha)
        return alpha <= last_recalled

    assert smallest_change(recalled) == expected
    assert tried == [
        quarter / 4 for quarter in range(1, round(4 * expected[0]) + 1)
    ]  # and the model is left there
