"""Training that ends where the budget is reached, instead of being scaled back to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.unlearning.deltas import norm_of
from workbench.unlearning.methods import METHODS, known_settings, recipe, settings_for
from workbench.unlearning.objectives import Objective, negative_cross_entropy
from workbench.unlearning.recipe import EVERYTHING, Averaging, Recipe, stopped_at_budget
from workbench.unlearning.trainer import CHECK_EVERY, unlearn

FORGET = [Example("the cat sat on the mat"), Example("the dog sat on the cat")]
RETAIN = [Example("the mat sat on the dog")]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["the", "cat", "dog", "sat", "on", "mat"])


@pytest.fixture
def base(make_model: Callable[..., PreTrainedModel], tokenizer: Any) -> PreTrainedModel:
    return make_model(vocab_size=len(tokenizer), scale=0.1)


def _ascent(**changes: Any) -> Recipe:
    made = Recipe(Objective(negative_cross_entropy), EVERYTHING, 23, 2, 1e-2, "normalised-sgd")
    return replace(made, **changes)


def _moved(model: PreTrainedModel, base: PreTrainedModel) -> float:
    """Distance of the weights from the base's, which stands for a price here."""
    start = dict(base.named_parameters())
    return norm_of(
        {name: p.detach() - start[name].detach() for name, p in model.named_parameters()}
    )


@pytest.mark.parametrize("budget", [0.005, 0.062, 0.121, 9.0])
def test_it_ends_at_the_first_look_over_the_budget(
    base: PreTrainedModel, tokenizer: Any, budget: float
) -> None:
    looks: list[float] = []

    def over(model: PreTrainedModel) -> bool:
        looks.append(_moved(model, base))
        return looks[-1] > budget

    made = stopped_at_budget(_ascent())
    found = unlearn(base, tokenizer, made, FORGET, RETAIN, seed=0, over_budget=over)
    whole = unlearn(base, tokenizer, _ascent(), FORGET, RETAIN, seed=0)
    taken = len(found.log)
    assert taken == (CHECK_EVERY * len(looks) if looks[-1] > budget else made.steps)
    assert all(look <= budget for look in looks[:-1])
    assert found.log == whole.log[:taken]  # the same road, left earlier
    assert norm_of(found.delta) == pytest.approx(
        looks[-1] if looks[-1] > budget else norm_of(whole.delta)
    )


def test_steps_is_the_default_and_never_asks_for_the_price(
    base: PreTrainedModel, tokenizer: Any
) -> None:
    def never(model: PreTrainedModel) -> bool:
        raise AssertionError

    found = unlearn(base, tokenizer, _ascent(), FORGET, RETAIN, seed=0, over_budget=never)
    assert len(found.log) == 23


def test_a_budget_is_needed(base: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(WorkbenchError, match="stop=budget needs a disruption budget"):
        unlearn(base, tokenizer, stopped_at_budget(_ascent()), FORGET, RETAIN, seed=0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"optimiser": "one-gradient"}, "single gradient"),
        ({"average": Averaging(0.5, 1)}, "averages its weights"),
        ({"sign": -1.0}, "turns its change round"),
    ],
)
def test_weights_that_are_not_those_measured_cannot_be_stopped(
    changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        stopped_at_budget(_ascent(**changes))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_steps_offers_it_or_says_why_not(
    name: str, base: PreTrainedModel
) -> None:
    if "steps" not in known_settings(name):
        assert "stop" not in known_settings(name)
        with pytest.raises(WorkbenchError, match="stop"):
            settings_for(name, base, {"stop": "budget"})
        return
    layer: dict[str, Any] = {"layer": 1} if "layer" in known_settings(name) else {}
    made = recipe(name, base, 0, layer)
    assert made.stop == "steps"
    if made.sign != 1:
        with pytest.raises(WorkbenchError, match="cannot stop at the budget"):
            recipe(name, base, 0, layer | {"stop": "budget"})
    else:
        assert recipe(name, base, 0, layer | {"stop": "budget"}).stop == "budget"


def test_another_word_is_refused(base: PreTrainedModel) -> None:
    with pytest.raises(WorkbenchError, match="stop of npo"):
        settings_for("npo", base, {"stop": "never"})


def test_the_weights_come_back_finite(base: PreTrainedModel, tokenizer: Any) -> None:
    found = unlearn(
        base,
        tokenizer,
        stopped_at_budget(_ascent()),
        FORGET,
        RETAIN,
        seed=0,
        over_budget=lambda model: _moved(model, base) > 0.03,
    )
    assert all(bool(torch.isfinite(change).all()) for change in found.delta.values())
