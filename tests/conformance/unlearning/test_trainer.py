"""The trainer: schedules, signs, precision, teachers, errors, what it leaves untouched; and every
method from end to end on tiny models.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import Batch, batches, encode
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy, score, sequences, token_nll
from workbench.unlearning.deltas import norm_of
from workbench.unlearning.methods import METHODS, known_settings, recipe
from workbench.unlearning.objectives import (
    Objective,
    Pair,
    negative_cross_entropy,
    retain_cross_entropy,
)
from workbench.unlearning.recipe import EVERYTHING, Averaging, CollapseSettings, Recipe, Teacher
from workbench.unlearning.smoothing import plain
from workbench.unlearning.trainer import unlearn

ModelMaker = Callable[..., PreTrainedModel]

DOWN = "model.layers.1.mlp.down_proj.weight"


def _question(subject: str, words: str, answer: str, item: str) -> Example:
    start = len(subject) + len(words) + 2
    return Example(
        f"{subject} {words} {answer} .", (start, start + len(answer)), (0, len(subject)), item
    )


FORGET = (
    _question("Anna Berg", "lives in", "Paris", "f1"),
    _question("Otto Lund", "works as", "a baker", "f2"),
    _question("Mia Holm", "lives in", "Oslo", "f3"),
    _question("Karl Sand", "likes", "green tea", "f4"),
    _question("Ida Falk", "works as", "a pilot", "f5"),
)
RETAIN = (
    _question("Eva Moor", "lives in", "Rome", "r1"),
    Example("the rain falls on the green hills .", item="g1"),
    _question("Finn Dahl", "likes", "tea", "r2"),
    _question("Lea Vik", "works as", "a baker", "r3"),
)
SHORT = {
    "steps": 3,
    "batch_size": 2,
    "activation_components": 2,
    "gradient_components": 2,
    "components": 2,
    "reinforce_steps": 2,
    "turn": 1,
    "refresh": 2,
    "adversary_rank": 2,
    "layer": 1,
}


@dataclass(frozen=True)
class Setup:
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(
        [*" ".join(example.text for example in FORGET + RETAIN).split(), "I", "do", "not", "know"]
    )


@pytest.fixture
def setup(make_model: ModelMaker, tokenizer: PreTrainedTokenizerBase) -> Setup:
    return Setup(make_model(vocab_size=len(tokenizer), scale=0.1), tokenizer)


def _run(setup: Setup, made: Recipe, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    return unlearn(setup.base, setup.tokenizer, made, FORGET, RETAIN, seed=seed, **options).delta


def _of(name: str, model: PreTrainedModel, **overrides: Any) -> Recipe:
    known = known_settings(name)
    return recipe(
        name,
        model,
        0,
        {
            key: value
            for key, value in SHORT.items()
            if key in known and key not in METHODS[name].fixed
        }
        | overrides,
    )


def _ascent(**changes: Any) -> Recipe:
    return replace(
        Recipe(Objective(negative_cross_entropy, retain_cross_entropy), EVERYTHING, 3, 2, 1e-3),
        **changes,
    )


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items()
    )


def _tiny(family: str, vocabulary: int) -> PreTrainedModel:
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config: Any = {
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**shape),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=vocabulary,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "gemma2": lambda: transformers.Gemma2Config(num_key_value_heads=2, head_dim=4, **shape),
        "phi": lambda: transformers.PhiConfig(**shape),
    }[family]()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    finally:
        logging.disable(level)
    return model.eval()


def _check(base: PreTrainedModel, made: Recipe, delta: dict[str, Tensor]) -> None:
    """A finite delta that is not empty and lies on the trainable weights only."""
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    assert delta
    for name, change in delta.items():
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in made.trainable), name
        assert change.dtype == torch.float32 and change.shape == shapes[name]
        assert bool(torch.isfinite(change).all()), name
    assert norm_of(delta) > 0


# --- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_finite_delta_on_its_trainable_weights_and_leaves_the_base_alone(
    name: str, setup: Setup
) -> None:
    for key, parameter in setup.base.named_parameters():  # flags of the caller's own
        parameter.requires_grad_("norm" not in key)
    state = copy.deepcopy(setup.base.state_dict())
    random_state = torch.random.get_rng_state()
    made = _of(name, setup.base)
    delta = _run(setup, made)
    _check(setup.base, made, delta)
    assert all(torch.equal(value, state[key]) for key, value in setup.base.state_dict().items())
    assert {key: parameter.requires_grad for key, parameter in setup.base.named_parameters()} == {
        key: "norm" not in key for key, _ in setup.base.named_parameters()
    }
    assert all(parameter.grad is None for parameter in setup.base.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    # The same again gives the same again; the recipe is built anew, since that is how a seed is
    # given.
    assert _same(_run(setup, _of(name, setup.base)), delta)


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_a_value_and_can_be_run_twice(
    name: str, setup: Setup, nearby: Callable[..., PreTrainedModel]
) -> None:
    made = _of(name, setup.base)
    unlearn(
        nearby(setup.base, 0.3), setup.tokenizer, made, FORGET[1:], RETAIN, seed=1
    )  # an earlier run, on other weights and texts
    assert _same(_run(setup, made), _run(setup, _of(name, setup.base)))


@pytest.mark.parametrize(
    "name", ["grad-diff", "rmu", "circuit-breakers", "cir", "cir-uncollapsed", "repselect"]
)
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma2", "phi"])
def test_every_kind_of_method_runs_on_every_family(
    family: str, name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    setup = Setup(_tiny(family, len(tokenizer)), tokenizer)
    made = _of(name, setup.base)
    _check(setup.base, made, _run(setup, made))


@pytest.mark.parametrize("name", ["npo", "cir", "repselect"])
def test_texts_are_drawn_from_the_seed(name: str, setup: Setup) -> None:
    different = not _same(
        _run(setup, _of(name, setup.base), seed=0), _run(setup, _of(name, setup.base), seed=1)
    )
    assert different or name == "repselect"  # which takes all texts at once


def test_the_base_keeps_its_mode(setup: Setup) -> None:
    setup.base.train()
    _run(setup, _ascent())
    assert setup.base.training


# --- schedules and signs --------------------------------------------------------------------------


def _factors(setup: Setup, made: Recipe) -> list[tuple[float, float]]:
    """The weights of the two terms at every step, as the step rule meets them."""
    seen = []

    def record(
        model: PreTrainedModel, objective: Objective, pair: Pair, reference: PreTrainedModel
    ) -> dict[str, float]:
        seen.append((objective.forget_weight, objective.retain_weight))
        return plain(model, objective, pair, reference)

    _run(setup, replace(made, step=record))
    return seen


def test_circuit_breakers_move_their_weight_from_rerouting_to_retaining(setup: Setup) -> None:
    seen = _factors(setup, _of("circuit-breakers", setup.base, steps=6, strength=10.0, horizon=8))
    assert seen == [(10 * (1 - t / 8), 10 * t / 8) for t in range(6)]  # eighths are exact
    assert all(forget + retain == pytest.approx(10) for forget, retain in seen)
    assert all(later[0] < earlier[0] for earlier, later in pairwise(seen))
    # Past the horizon nothing turns negative.
    assert _factors(setup, _of("circuit-breakers", setup.base, steps=4, horizon=2))[-2:] == [
        (0.0, 10.0),
        (0.0, 10.0),
    ]


@pytest.mark.parametrize(
    ("turn", "share", "expected"),
    [(1, 0.5, "rfrfrrrr"), (2, 0.75, "rrffrrrr"), (3, 1.0, "rrrfffrr"), (1, 0.0, "rrrrrrrr")],
)
def test_scrub_takes_turns_and_the_retain_set_has_the_first_one(
    turn: int, share: float, expected: str, setup: Setup
) -> None:
    seen = _factors(setup, _of("scrub", setup.base, steps=8, turn=turn, forget_share=share))
    assert seen == [{"f": (1.0, 0.0), "r": (0.0, 1.0)}[letter] for letter in expected]


def test_a_schedule_multiplies_the_weights_of_the_objective(setup: Setup) -> None:
    made = _ascent(
        objective=Objective(negative_cross_entropy, retain_cross_entropy, 3.0, 5.0),
        schedule=lambda step, steps: (step / 2, 2.0),
    )
    assert _factors(setup, made) == [(0.0, 10.0), (1.5, 10.0), (3.0, 10.0)]
    # A schedule of ones is none.
    assert _same(
        _run(setup, _ascent(schedule=lambda step, steps: (1.0, 1.0))), _run(setup, _ascent())
    )


def test_a_scheduled_factor_reaches_the_collapsed_step(setup: Setup) -> None:
    made = Recipe(
        Objective(negative_cross_entropy, retain_cross_entropy),
        (DOWN,),
        1,
        2,
        0.1,
        "normalised-sgd",
        retain_rate=0.1,
    )
    alone = _run(setup, replace(made, objective=Objective(negative_cross_entropy)))
    assert _same(_run(setup, replace(made, schedule=lambda step, steps: (1.0, 0.0))), alone)


@pytest.mark.parametrize(
    "changes", [{}, {"optimiser": "normalised-sgd", "trainable": (DOWN,), "retain_rate": 0.1}]
)
def test_a_negative_sign_gives_exactly_minus_the_delta(
    changes: dict[str, Any], setup: Setup
) -> None:
    delta, turned = (_run(setup, _ascent(sign=sign, **changes)) for sign in (1.0, -1.0))
    assert _same({name: -change for name, change in delta.items()}, turned)


def test_task_vector_negation_lowers_the_likelihood_of_the_forget_answers(setup: Setup) -> None:
    made = _of("task-vector", setup.base, steps=20, batch_size=5, lr=1e-3)
    delta, texts = _run(setup, made), batches(setup.tokenizer, FORGET, 8, targets="answer")
    moved = copy.deepcopy(setup.base)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(delta[name])
    assert score(moved, texts).loss > score(setup.base, texts).loss + 0.1


def test_initial_noise_starts_the_trainable_weights_a_relative_distance_away(setup: Setup) -> None:
    weights = dict(setup.base.named_parameters())
    made = _ascent(trainable=("model.layers.*.mlp.*",), steps=0, initial_noise=0.03)
    noised = _run(setup, made)
    assert set(noised) == {name for name in weights if ".mlp." in name}
    for name, change in noised.items():
        assert float(change.norm() / weights[name].detach().norm()) == pytest.approx(
            0.03, rel=0.15
        )  # 384 draws
    assert _same(noised, _run(setup, made)) and not _same(noised, _run(setup, made, seed=1))
    assert _run(setup, replace(made, initial_noise=0.0)) == {}


# --- the step -------------------------------------------------------------------------------------


def test_a_normalised_step_has_its_length_and_the_direction_of_the_content_tokens_gradient(
    setup: Setup,
) -> None:
    made = Recipe(
        Objective(negative_cross_entropy),
        (DOWN, DOWN.replace("down", "up")),
        1,
        5,
        0.37,
        "normalised-sgd",
    )
    delta = _run(setup, made)
    assert norm_of(delta) == pytest.approx(0.37, rel=1e-4)
    # By hand: one batch of all forget texts, outer products of inputs and output gradients, without
    # BOS and padding.
    model, batch = copy.deepcopy(setup.base), encode(setup.tokenizer, FORGET, targets="answer")
    rows: dict[str, list[Tensor]] = {}
    for name in delta:

        def hook(_module: Any, args: Any, output: Tensor, name: str = name) -> None:
            output.register_hook(
                lambda gradient: rows.__setitem__(name, [args[0].detach(), gradient])
            )

        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook)
    (-cross_entropy(model, batch)).backward()
    expected = {
        name: -gradient[batch.content_mask].T @ inputs[batch.content_mask]
        for name, (inputs, gradient) in rows.items()
    }
    length = norm_of(expected)
    for name, change in delta.items():
        torch.testing.assert_close(change, 0.37 * expected[name] / length, rtol=1e-3, atol=1e-5)


def test_a_collapse_of_zero_components_is_no_collapse(setup: Setup) -> None:
    made = Recipe(
        Objective(negative_cross_entropy, retain_cross_entropy),
        (DOWN,),
        3,
        2,
        0.1,
        "normalised-sgd",
        retain_rate=0.1,
    )
    assert _same(_run(setup, replace(made, collapse=CollapseSettings(0, 0, 1))), _run(setup, made))


@pytest.mark.parametrize("name", ["npo", "npo-sam", "cir-uncollapsed", "cir"])
def test_the_reference_is_not_asked_again_what_it_said_of_a_forget_text(
    name: str, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _of(name, setup.base, steps=9)
    forget = made.objective.forget

    def asks_always(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        return forget(model, batch, reference)

    asks_always.mean_over = sequences  # type: ignore[attr-defined]
    rows = []

    def counted(model: PreTrainedModel, batch: Batch, **settings: Any) -> Tensor:
        if model is setup.base:
            rows.append(batch.size)
        return token_nll(model, batch, **settings)

    monkeypatch.setattr("workbench.unlearning.objectives.token_nll", counted)
    found = _run(setup, made)
    once = sum(rows)
    rows.clear()
    other = replace(made, objective=replace(made.objective, forget=asks_always))
    expected = _run(setup, other)
    assert once < sum(rows)
    for parameter, delta in expected.items():
        torch.testing.assert_close(found[parameter], delta, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("statistics", ["forget", "retain"])
@pytest.mark.parametrize("kind", ["hard", "soft", "quadratic"])
def test_every_kind_of_collapse_makes_a_step_of_its_own(
    kind: str, statistics: str, setup: Setup
) -> None:
    delta = _run(
        setup,
        _of("cir", setup.base, kind=kind, statistics=statistics, steps=1, retain_rate=0.0, lr=0.2),
    )
    assert norm_of(delta) == pytest.approx(0.2, rel=1e-4)
    others = [
        _run(
            setup,
            _of("cir", setup.base, kind=other, statistics=where, steps=1, retain_rate=0.0, lr=0.2),
        )
        for other in ("hard", "soft", "quadratic")
        for where in ("forget", "retain")
        if (other, where) != (kind, statistics)
    ]
    assert not any(_same(delta, other) for other in others)


def test_the_alternative_of_a_batch_is_the_refusal_of_the_same_rows(setup: Setup) -> None:
    pairs: list[Pair] = []

    def record(
        model: PreTrainedModel, objective: Objective, pair: Pair, reference: PreTrainedModel
    ) -> dict[str, float]:
        pairs.append(pair)
        return plain(model, objective, pair, reference)

    _run(setup, replace(_of("idk-dpo", setup.base), step=record))
    prompts = {example.item: example.prompt.strip() for example in FORGET}
    for pair in pairs:
        refusals = pair.forget.alternative
        assert (
            refusals is not None
            and refusals.items == pair.forget.items
            and pair.retain.alternative is None
        )
        for row, item in enumerate(refusals.items):
            real = refusals.input_ids[row][refusals.attention_mask[row].bool()]
            assert setup.tokenizer.decode(real[1:]).strip() == f"{prompts[item]} I do not know"
            assert (
                setup.tokenizer.decode(refusals.input_ids[row][refusals.target_mask[row]]).strip()
                == "I do not know"
            )
    # Elsewhere nothing is encoded twice.
    _run(setup, replace(_of("grad-diff", setup.base), step=record))
    assert pairs[-1].forget.alternative is None


# --- precision ------------------------------------------------------------------------------------


def test_bfloat16_loses_most_of_a_tiny_step_and_the_initial_rounding_is_no_part_of_the_delta(
    setup: Setup,
) -> None:
    made = _ascent(trainable=(DOWN,), lr=1e-5)
    whole, rounded = _run(setup, made), _run(setup, made, dtype=torch.bfloat16)
    weights = dict(setup.base.named_parameters())
    assert not torch.equal(
        weights[DOWN].bfloat16().float(), weights[DOWN]
    )  # there is a rounding to exclude
    assert list(whole) == [DOWN] and set(rounded) <= {DOWN}
    moved = rounded.get(DOWN, torch.zeros_like(whole[DOWN]))
    assert moved.dtype == torch.float32
    assert float((whole[DOWN] != 0).float().mean()) > 0.95
    assert float((moved != 0).float().mean()) < 0.2
    # What is left lies between two bfloat16 numbers.
    end = weights[DOWN].detach().bfloat16().float() + moved
    assert torch.equal(end.bfloat16().float(), end)


def test_a_large_step_survives_bfloat16(setup: Setup) -> None:
    made = _ascent(lr=1e-2)
    whole, rounded = _run(setup, made), _run(setup, made, dtype=torch.bfloat16)
    dot = sum(
        float((whole[name].double() * rounded[name].double()).sum())
        for name in whole
        if name in rounded
    )
    assert dot > 0.8 * norm_of(whole) * norm_of(rounded)


# --- teachers -------------------------------------------------------------------------------------


def test_a_teacher_is_trained_first_from_the_same_start_and_then_frozen(setup: Setup) -> None:
    met: list[tuple[PreTrainedModel, dict[str, Tensor]]] = []

    def objective(teacher: PreTrainedModel) -> Objective:
        assert (
            not any(parameter.requires_grad for parameter in teacher.parameters())
            and not teacher.training
        )
        met.append((teacher, copy.deepcopy(teacher.state_dict())))
        return Objective(negative_cross_entropy)

    lesson = Recipe(Objective(retain_cross_entropy), EVERYTHING, 5, 2, 1e-3)
    delta = _run(setup, _ascent(objective=Objective(_never), teacher=Teacher(lesson, objective)))
    ((teacher, state),) = met
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    learned = _run(setup, lesson)
    for name, weight in setup.base.named_parameters():
        assert torch.equal(state[name], weight.detach() + learned.get(name, torch.zeros(())))
    # Only the teacher learned: the student starts at the base, as it does without a teacher.
    assert _same(delta, _run(setup, _ascent(objective=Objective(negative_cross_entropy))))


def _never(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
    raise AssertionError("the objective of a recipe with a teacher is replaced")


def test_the_teacher_of_whos_harry_potter_has_learned_the_forget_set_further(setup: Setup) -> None:
    made = _of("whp", setup.base, reinforce_steps=15, reinforce_lr=1e-3, batch_size=5)
    assert made.teacher is not None
    known = made.teacher.objective
    teachers: list[PreTrainedModel] = []
    watched = replace(
        made,
        teacher=replace(
            made.teacher, objective=lambda teacher: (teachers.append(teacher), known(teacher))[1]
        ),
    )
    delta, texts = _run(setup, watched), batches(setup.tokenizer, FORGET, 8, targets="answer")
    assert score(teachers[0], texts).loss < score(setup.base, texts).loss - 0.1
    assert delta


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["npo", "grad-ascent", "cir", "repselect", "whp"])
def test_an_empty_set_is_named(name: str, setup: Setup) -> None:
    made = _of(name, setup.base)
    with pytest.raises(WorkbenchError, match="forget set is empty"):
        unlearn(setup.base, setup.tokenizer, made, [], RETAIN, seed=0)
    with pytest.raises(WorkbenchError, match="retain set is empty"):
        unlearn(setup.base, setup.tokenizer, made, FORGET, [], seed=0)


@pytest.mark.parametrize("changes", [{}, {"optimiser": "normalised-sgd", "trainable": (DOWN,)}])
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_an_objective_that_is_not_finite_is_reported_with_its_step(
    side: str, changes: dict[str, Any], setup: Setup
) -> None:
    calls = 0

    def breaks(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(model, batch) * (float("nan") if calls == 3 else 1.0)

    terms = {"forget": negative_cross_entropy, "retain": retain_cross_entropy} | {side: breaks}
    with pytest.raises(WorkbenchError, match="not finite at step 3 of 5"):
        _run(setup, _ascent(objective=Objective(**terms), steps=5, **changes))


@pytest.mark.parametrize("changes", [{}, {"optimiser": "normalised-sgd", "trainable": (DOWN,)}])
def test_a_gradient_that_is_not_finite_never_becomes_a_delta(
    changes: dict[str, Any], setup: Setup
) -> None:
    def sharp(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        loss = cross_entropy(model, batch)
        return loss + (loss - loss).sqrt()  # a finite value whose derivative is 0 * infinity

    with pytest.raises(WorkbenchError, match="not finite"):
        _run(setup, _ascent(objective=Objective(sharp), steps=1, **changes))


def test_a_pattern_that_matches_no_parameter_is_named(setup: Setup) -> None:
    with pytest.raises(WorkbenchError, match=r"model\.layers\.9"):
        _run(setup, _ascent(trainable=("model.layers.9.*",)))


def test_refusals_need_answers(setup: Setup) -> None:
    with pytest.raises(ValueError, match="answer"):
        unlearn(
            setup.base, setup.tokenizer, _of("idk-dpo", setup.base), RETAIN[1:2], RETAIN, seed=0
        )


def test_progress_counts_every_step(setup: Setup) -> None:
    seen: list[tuple[int, int]] = []
    run = unlearn(
        setup.base,
        setup.tokenizer,
        _ascent(),
        FORGET,
        RETAIN,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(run.log) == 3 and all(
        math.isfinite(record["forget"]) and math.isfinite(record["retain"]) for record in run.log
    )


def test_plain_sgd_takes_the_gradient_as_it_is(setup: Setup) -> None:
    # One step on all texts at once: the change is -lr times the gradient of the whole objective,
    # however long it is.
    forget, retain = FORGET[:1], RETAIN[:1]
    made = _ascent(steps=1, batch_size=1, lr=50.0, optimiser="sgd")
    delta = unlearn(setup.base, setup.tokenizer, made, forget, retain, seed=0).delta
    pair = Pair(encode(setup.tokenizer, forget, targets="answer"), encode(setup.tokenizer, retain))
    model = copy.deepcopy(setup.base)
    made.objective(model, pair, setup.base).backward()
    length = norm_of(
        {
            key: parameter.grad
            for key, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    )
    assert length > 1  # a clipped step would be shorter
    for key, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else -50.0 * parameter.grad
        torch.testing.assert_close(
            delta.get(key, torch.zeros_like(parameter)), expected, rtol=1e-3, atol=1e-4
        )


def test_averaged_weights_are_the_mean_of_the_last_ones(setup: Setup) -> None:
    # The change is linear in the weights: the mean of the changes after 4, 6 and 8 of 8 steps is
    # the change of the mean.
    parts = [_run(setup, _ascent(steps=steps)) for steps in (4, 6, 8)]
    found = _run(setup, _ascent(steps=8, average=Averaging(0.5, 2)))
    for key, value in found.items():
        torch.testing.assert_close(
            value, torch.stack([part[key] for part in parts]).mean(0), rtol=1e-4, atol=1e-7
        )
    assert not _same(found, parts[-1])
