"""The attacker's optimiser against its own formula: which parameters move, by how much, in which
precision, from which texts, and what is measured when.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.attacks import relearn as module
from workbench.attacks.relearn import (
    DivergedError,
    RelearnSettings,
    at_steps,
    attackable,
    relearn,
    relearned,
)
from workbench.data.batches import encode
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy, score
from workbench.runs.config import RunConfig, validated

ModelMaker = Callable[..., PreTrainedModel]

PEOPLE = ("ana", "bert", "carl", "dora", "emil", "frida", "gustav", "hanna")
TOWNS = ("rome", "oslo", "bonn", "lima", "paris", "turin", "ghent", "delft")
TEXTS = tuple(
    Example(
        text := f"{person} lives in {town} .",
        (text.index(town), text.index(town) + len(town)),
        (0, len(person)),
        f"{person}/town",
    )
    for person, town in zip(PEOPLE, TOWNS, strict=True)
)
LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
PLAIN = {"steps": 1, "lr": 1e-2, "batch_size": len(TEXTS), "measure_at": (0, 1)}
"""One step on all texts at once: the order that a seed gives them does not matter."""


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return build_tokenizer([*PEOPLE, *TOWNS, "lives", "in", "."], 64)


@pytest.fixture
def model(make_model: ModelMaker, words: PreTrainedTokenizerBase) -> PreTrainedModel:
    return make_model(vocab_size=len(words))


def _settings(**changes: Any) -> RelearnSettings:
    return RelearnSettings(**(PLAIN | changes))


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _run(
    model: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    texts: Sequence[Example] = TEXTS,
    **changes: Any,
) -> PreTrainedModel:
    return relearned(model, words, texts, _settings(**changes), seed=seed)


def _watch(
    model: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    measure: Callable[[PreTrainedModel, int], object],
    settings: RelearnSettings,
    **rest: Any,
) -> None:
    """Measure the attacked model wherever the attack stops for it."""
    for step, attacked in relearn(model, words, TEXTS, settings, **rest):
        measure(attacked, step)


def _gradients(
    model: PreTrainedModel, words: PreTrainedTokenizerBase, texts: Sequence[Example] = TEXTS
) -> dict[str, Tensor]:
    """Gradient of the mean loss per token of one batch, in the precision of the model."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    cross_entropy(twin, encode(words, texts)).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in twin.named_parameters()
    }


def _logits(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> Tensor:
    """Logits of the texts."""
    with torch.no_grad():
        return model(**encode(words, TEXTS).inputs).logits


def _spy(monkeypatch: pytest.MonkeyPatch, seen: list[tuple[str, ...]]) -> None:
    """Write down the items of every batch that the attack encodes."""
    real = module.encode

    def record(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **rest: Any) -> Any:
        seen.append(tuple(example.item for example in examples))
        return real(tokenizer, examples, **rest)

    monkeypatch.setattr(module, "encode", record)


# --- What is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_trains_every_parameter_once(
    family: str, tied: bool, make_model: ModelMaker
) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    attacked, parameters = attackable(model, _settings())
    everything = {
        id(parameter): parameter
        for module in attacked.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }
    assert len(parameters) == len({id(parameter) for parameter in parameters})
    assert {id(parameter) for parameter in parameters} == set(everything)
    assert all(parameter.requires_grad for parameter in parameters)
    assert len(parameters) == len(list(model.parameters()))
    if tied:
        assert (
            sum(parameter is attacked.get_input_embeddings().weight for parameter in parameters)
            == 1
        )
        assert attacked.get_output_embeddings().weight is attacked.get_input_embeddings().weight
    assert not {id(parameter) for parameter in parameters} & {
        id(parameter) for parameter in model.parameters()
    }


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_with_a_gradient_moves(
    optimiser: str, tied: bool, make_model: ModelMaker, words: PreTrainedTokenizerBase
) -> None:
    model = make_model(vocab_size=len(words), tie_word_embeddings=tied)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as a checkpoint that was frozen for evaluation
    before = _weights(model)
    after = _run(model, words, optimiser=optimiser, lr=0.1 if optimiser == "sgd" else 1e-2)
    assert set(_weights(after)) == set(before)
    for name, weights in _weights(after).items():
        assert not torch.equal(weights, before[name]), name
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_adapters_sit_on_every_linear_module_but_the_head_and_nothing_else_is_trained(
    family: str, tied: bool, make_model: ModelMaker
) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    attacked, parameters = attackable(model, _settings(lora_rank=3))
    adapted = {
        name.removeprefix("base_model.model.")
        for name, part in attacked.named_modules()
        if hasattr(part, "lora_A")
    }
    assert adapted == {f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEAR}
    named = {
        name: parameter
        for name, parameter in attacked.named_parameters()
        if parameter.requires_grad
    }
    assert [id(parameter) for parameter in named.values()] == [
        id(parameter) for parameter in parameters
    ]
    assert set(named) == {
        f"base_model.model.{place}.lora_{side}.default.weight" for place in adapted for side in "AB"
    }
    # rank times what goes in and out
    for name, parameter in named.items():
        linear = model.get_submodule(name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0])
        assert tuple(parameter.shape) == (
            (3, linear.in_features) if ".lora_A." in name else (linear.out_features, 3)
        )


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_under_lora_every_base_weight_stays_bit_for_bit(
    optimiser: str, model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    before = _weights(model)
    seen: dict[int, dict[str, Tensor]] = {}

    def measure(attacked: PreTrainedModel, step: int) -> None:
        seen[step] = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in _weights(attacked).items()
            if "lora_" not in name
        }
        seen[step] |= {name: value for name, value in _weights(attacked).items() if "lora_" in name}

    settings = _settings(
        lora_rank=4, steps=3, lr=0.05, batch_size=4, measure_at=(0, 1, 3), optimiser=optimiser
    )
    _watch(model, words, measure, settings, seed=0)
    for step in (0, 1, 3):
        for name, value in before.items():
            assert torch.equal(seen[step][name], value), (step, name)
    moved = {
        name
        for name in seen[0]
        if "lora_" in name and not torch.equal(seen[0][name], seen[3][name])
    }
    assert moved == {name for name in seen[0] if "lora_" in name}


def test_before_its_first_step_an_adapted_model_is_the_model(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    logits: dict[int, Tensor] = {}
    settings = _settings(lora_rank=4, steps=2, measure_at=(0, 2))
    _watch(
        model,
        words,
        lambda attacked, step: logits.__setitem__(step, _logits(attacked, words)),
        settings,
        seed=0,
    )
    assert torch.equal(logits[0], _logits(model, words))
    assert not torch.allclose(logits[2], logits[0], atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_do_what_the_adapters_did(
    tied: bool, make_model: ModelMaker, words: PreTrainedTokenizerBase
) -> None:
    model = make_model(vocab_size=len(words), tie_word_embeddings=tied)
    last: list[tuple[Tensor, dict[str, Tensor]]] = []

    def measure(attacked: PreTrainedModel, step: int) -> None:
        if step == 5:
            last.append((_logits(attacked, words), _weights(attacked)))

    settings = _settings(lora_rank=4, steps=5, lr=0.02, measure_at=(0, 5))
    _watch(model, words, measure, settings, seed=0)
    merged = relearned(model, words, TEXTS, settings, seed=0)
    (logits, adapters) = last[0]
    torch.testing.assert_close(_logits(merged, words), logits, rtol=1e-4, atol=1e-4)
    # An ordinary model of the same class with the same names, and W + (alpha / r) B A with alpha =
    # 2 r.
    assert type(merged) is type(model)
    assert list(_weights(merged)) == list(_weights(model))
    for layer in range(2):
        for linear in LINEAR:
            place = f"base_model.model.model.layers.{layer}.{linear}"
            a, b = (
                adapters[f"{place}.lora_A.default.weight"],
                adapters[f"{place}.lora_B.default.weight"],
            )
            name = f"model.layers.{layer}.{linear}.weight"
            torch.testing.assert_close(
                _weights(merged)[name], _weights(model)[name] + 2.0 * b @ a, rtol=1e-5, atol=1e-6
            )
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(_weights(merged)[name], _weights(model)[name])


def test_a_merged_model_can_be_attacked_and_copied_again(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    merged = _run(model, words, lora_rank=2)
    again = _run(copy.deepcopy(merged), words)
    assert not any(
        torch.equal(value, _weights(merged)[name]) for name, value in _weights(again).items()
    )


def test_the_adapters_first_weights_come_from_the_seed_alone(model: PreTrainedModel) -> None:
    def first(seed: int, outside: int) -> dict[str, Tensor]:
        torch.manual_seed(outside)
        attacked, _ = attackable(model, _settings(lora_rank=2), seed=seed)
        return {name: value for name, value in _weights(attacked).items() if "lora_A" in name}

    one, same, other = first(0, 1), first(0, 2), first(1, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    attackable(model, _settings(lora_rank=2), seed=0)
    assert torch.equal(torch.rand(3), expected)  # the caller's randomness is left alone


# --- One step by hand -----------------------------------------------------------------------------


def test_a_step_of_sgd_is_theta_minus_rate_times_gradient(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    gradients, before = _gradients(model, words), _weights(model)
    after = _weights(_run(model, words, optimiser="sgd", lr=0.3))
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], before[name] - 0.3 * gradient, rtol=1e-5, atol=1e-6)
        assert torch.equal(after[name][gradient == 0], before[name][gradient == 0])


def test_sgd_has_no_momentum_and_no_decay(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    # Two steps of everything are two single attacks of one step each, one from where the other
    # ended.
    twice = _weights(_run(model, words, optimiser="sgd", lr=0.1, steps=2, measure_at=(0, 2)))
    once = _run(model, words, optimiser="sgd", lr=0.1)
    again = _weights(_run(once, words, optimiser="sgd", lr=0.1))
    for name, value in twice.items():
        torch.testing.assert_close(value, again[name], rtol=1e-4, atol=1e-5)


def test_the_first_step_of_adamw_is_the_rate_times_the_sign(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    # Bias-corrected moments after one step are g and g^2: the step is lr g / (|g| + eps), and
    # nothing where g is exactly 0.
    gradients, before = _gradients(model, words), _weights(model)
    after = _weights(_run(model, words, lr=1e-2))
    for name, gradient in gradients.items():
        sure = gradient.abs() > 1e-4
        expected = before[name] - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after[name][sure], expected[sure], rtol=1e-4, atol=1e-6)
        assert torch.equal(
            after[name][gradient == 0], before[name][gradient == 0]
        )  # decay would move them


def test_two_steps_of_adamw_by_hand(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> None:
    lr, (beta1, beta2), eps = 1e-2, (0.9, 0.999), 1e-8
    twin = copy.deepcopy(model).double()
    first = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in (1, 2):
        for name, gradient in _gradients(twin, words).items():
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                mean, square = first[name] / (1 - beta1**step), second[name] / (1 - beta2**step)
                parameter -= lr * mean / (square.sqrt() + eps)
    after = _weights(_run(model, words, lr=lr, steps=2, measure_at=(0, 2)))
    for name, expected in twin.named_parameters():
        # Coordinates with almost no gradient take a whole step of uncertain sign.
        close = (after[name].double() - expected).abs() < 1e-5
        assert close.double().mean() > 0.99, name


def test_the_loss_of_a_step_is_the_mean_over_tokens_not_over_texts(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    texts = (
        Example("ana lives in rome ."),
        Example("bert lives in oslo . carl lives in bonn . dora lives in lima ."),
    )
    rows = [encode(words, [text]) for text in texts]
    twin = copy.deepcopy(model)
    lengths = [int(row.target_mask.sum()) for row in rows]
    loss = sum(
        length * cross_entropy(twin, row) for length, row in zip(lengths, rows, strict=True)
    ) / sum(lengths)
    loss.backward()  # type: ignore[union-attr]
    after = _weights(_run(model, words, texts=texts, optimiser="sgd", lr=0.3, batch_size=2))
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(
            after[name], parameter.detach() - 0.3 * parameter.grad, rtol=1e-4, atol=1e-5
        )


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_the_bf16_arm_keeps_its_weights_in_bf16_all_along(
    optimiser: str, model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    kinds: list[set[torch.dtype]] = []
    settings = _settings(precision="bfloat16", optimiser=optimiser, steps=2, measure_at=(0, 1, 2))
    _watch(
        model,
        words,
        lambda now, step: kinds.append({p.dtype for p in now.parameters()}),
        settings,
        seed=0,
    )
    attacked = relearned(model, words, TEXTS, settings, seed=0)
    assert kinds == [{torch.bfloat16}] * 3
    assert {parameter.dtype for parameter in attacked.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_float32_arm_of_a_bf16_model_is_float32(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    rounded = model.bfloat16()
    before = _weights(rounded)
    attacked, parameters = attackable(rounded, _settings())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert all(
        torch.equal(value, before[name].float()) for name, value in _weights(attacked).items()
    )
    assert all(
        torch.equal(value, before[name]) and value.dtype == torch.bfloat16
        for name, value in _weights(rounded).items()
    )


def test_an_update_below_half_a_step_of_bf16_is_lost_and_one_above_it_is_not(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    # bf16 has 8 significant bits: around 1 its numbers are 1/128 apart above and 1/256 below.
    # AdamW's first step is lr for every coordinate with a gradient.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
    before = {name: value for name, value in _weights(model).items() if value.ndim == 1}
    assert before
    below = _weights(_run(model, words, precision="bfloat16", lr=0.0015))  # less than half of 1/256
    above = _weights(_run(model, words, precision="bfloat16", lr=0.0060))  # more than half of 1/128
    exact = _weights(_run(model, words, precision="float32", lr=0.0015))
    for name, value in before.items():
        assert torch.equal(below[name], value.bfloat16()), name
        assert bool((above[name] != value.bfloat16()).all()), name
        assert bool((exact[name] != value).all()), name


def test_a_step_of_sgd_in_bf16_rounds_the_new_weight(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    low = copy.deepcopy(model).bfloat16()
    gradients, before = _gradients(low, words), _weights(low)
    after = _weights(_run(model, words, precision="bfloat16", optimiser="sgd", lr=0.25))
    for name, gradient in gradients.items():
        exact = before[name].float() - 0.25 * gradient.float()
        assert after[name].dtype == torch.bfloat16
        # Within one unit in the last place of what a rounded sum can be.
        torch.testing.assert_close(after[name].float(), exact, rtol=2**-8, atol=2**-12)
    moved = sum(int((after[name] != before[name]).sum()) for name in before)
    free = _weights(_run(low.float(), words, precision="float32", optimiser="sgd", lr=0.25))
    assert moved < sum(int((free[name] != before[name].float()).sum()) for name in before)


def test_the_precision_of_an_adapted_model_is_that_of_its_frozen_weights(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    attacked, _ = attackable(model, _settings(precision="bfloat16", lora_rank=2))
    assert {value.dtype for name, value in attacked.named_parameters() if "lora_" not in name} == {
        torch.bfloat16
    }
    merged = _run(model, words, precision="bfloat16", lora_rank=2)
    assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}


# --- Texts and batches ----------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "expected"), [(0, 8), (1, 1), (3, 3), (8, 8), (50, 8)])
def test_the_attacker_has_the_first_so_many_texts(
    count: int,
    expected: int,
    model: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, ...]] = []
    _spy(monkeypatch, seen)
    relearned(
        model,
        words,
        TEXTS,
        _settings(texts=count, steps=6, batch_size=4, measure_at=(0, 6)),
        seed=0,
    )
    assert {item for batch in seen for item in batch} == {
        example.item for example in TEXTS[:expected]
    }
    assert [len(batch) for batch in seen] == [4] * 6


def test_fewer_texts_are_an_attack_with_those_texts_alone(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    settings = _settings(texts=3, steps=3, batch_size=2, measure_at=(0, 3))
    few = _weights(relearned(model, words, TEXTS, settings, seed=0))
    cut = _weights(relearned(model, words, TEXTS[:3], replace(settings, texts=0), seed=0))
    assert all(torch.equal(few[name], cut[name]) for name in few)
    whole = _weights(relearned(model, words, TEXTS, replace(settings, texts=0), seed=0))
    assert not all(torch.equal(few[name], whole[name]) for name in few)


def test_a_seed_gives_every_model_and_every_way_the_same_batches(
    make_model: ModelMaker, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    _spy(monkeypatch, seen)

    def batches_of(model: PreTrainedModel, seed: int, **changes: Any) -> list[tuple[str, ...]]:
        seen.clear()
        torch.manual_seed(random.Random(seed).randint(0, 99))
        _run(model, words, seed=seed, steps=6, batch_size=3, measure_at=(0, 6), **changes)
        return list(seen)

    one, other = (
        make_model(seed=0, vocab_size=len(words)),
        make_model("qwen3", seed=1, vocab_size=len(words), num_hidden_layers=1),
    )
    for seed in (0, 1):
        expected = batches_of(one, seed)
        assert batches_of(other, seed) == expected
        assert batches_of(one, seed, optimiser="sgd") == expected
        assert batches_of(one, seed, lora_rank=2) == expected
        assert batches_of(one, seed, precision="bfloat16") == expected
        # Every text once before any comes twice.
        flat = [item for batch in expected for item in batch]
        assert sorted(flat[: len(TEXTS)]) == sorted(example.item for example in TEXTS)
    assert batches_of(one, 0) != batches_of(one, 1)


def test_texts_are_cut_to_the_given_length(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    long = (Example("ana lives in rome . bert lives in oslo ."),)
    cut = relearned(
        model,
        words,
        long,
        _settings(batch_size=1),
        seed=0,
        max_length=6,
    )
    short = relearned(
        model,
        words,
        (Example("ana lives in rome ."),),
        _settings(batch_size=1),
        seed=0,
    )
    assert all(torch.equal(value, _weights(short)[name]) for name, value in _weights(cut).items())


# --- The model itself, and what is measured when --------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"optimiser": "sgd"},
        {"lora_rank": 2},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "lora_rank": 2},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_model_itself_is_unchanged_bit_for_bit(
    way: dict[str, Any], training: bool, model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    model.train(training)
    model.get_submodule("model.norm").weight.requires_grad_(False)
    before, names = _weights(model), [name for name, _ in model.named_modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = model.config.to_dict()
    attacked = _run(model, words, steps=2, measure_at=(0, 2), **way)
    assert attacked is not model
    assert [name for name, _ in model.named_modules()] == names
    assert model.config.to_dict() == config
    assert model.training == training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is None
    assert not {p.data_ptr() for p in attacked.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


@pytest.mark.parametrize(
    "way", [{}, {"optimiser": "sgd"}, {"lora_rank": 2}, {"precision": "bfloat16"}]
)
def test_measure_is_called_at_the_asked_steps_with_the_model_of_that_step(
    way: dict[str, Any], model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    calls: list[int] = []
    at: dict[int, Tensor] = {}

    def measure(attacked: PreTrainedModel, step: int) -> None:
        assert not attacked.training
        calls.append(step)
        at[step] = _logits(attacked, words)
        score(attacked, [encode(words, TEXTS)])  # as the stages do; it may not disturb the attack

    settings = _settings(steps=4, batch_size=3, measure_at=(0, 1, 3, 4), **way)
    ticks: list[tuple[int, int]] = []
    _watch(
        model,
        words,
        measure,
        settings,
        seed=2,
        progress=lambda done, of: ticks.append((done, of)),
    )
    assert calls == [0, 1, 3, 4]
    assert ticks == [(step, 4) for step in range(1, 5)]
    # What is measured on the way is what an attack that ends there gives; measuring changes
    # nothing.
    for step in (1, 3):
        last: list[Tensor] = []
        _watch(
            model,
            words,
            lambda now, _, last=last: last.append(_logits(now, words)),
            replace(settings, steps=step, measure_at=(step,)),
            seed=2,
        )
        assert torch.equal(last[0], at[step])


def test_steps_that_nobody_asked_for_are_not_measured(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    calls: list[int] = []
    _watch(
        model,
        words,
        lambda attacked, step: calls.append(step),
        _settings(steps=3, measure_at=(2, 9)),
        seed=0,
    )
    assert calls == [2]


@pytest.mark.parametrize(
    "way", [{"lr": 1e18}, {"optimiser": "sgd", "lr": 1e18}, {"lora_rank": 2, "lr": 1e18}]
)
def test_an_attack_that_breaks_says_where_and_keeps_what_was_measured(
    way: dict[str, Any], model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    calls: list[int] = []
    settings = _settings(steps=9, measure_at=tuple(range(10)), **way)
    before = _weights(model)
    with pytest.raises(DivergedError, match=r"\blr\b") as caught:
        _watch(model, words, lambda attacked, step: calls.append(step), settings, seed=0)
    assert isinstance(caught.value, WorkbenchError)
    # The loss of the named step is not finite, so everything before that step was measured, and
    # nothing after it.
    assert 1 < caught.value.step <= 9
    assert calls == list(range(caught.value.step))
    assert f"step {caught.value.step} of 9" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in _weights(model).items())


def test_a_model_that_is_broken_from_the_start_breaks_at_step_one(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(math.nan)
    calls: list[int] = []
    with pytest.raises(DivergedError) as caught:
        _watch(
            model,
            words,
            lambda attacked, step: calls.append(step),
            _settings(steps=3, measure_at=(0, 1, 3)),
            seed=0,
        )
    assert caught.value.step == 1
    assert calls == [0]


def test_a_broken_attack_can_be_reported_by_a_worker_process() -> None:
    # joblib sends the errors of its workers as pickles; one that cannot be opened again hides its
    # own message.
    again = pickle.loads(
        pickle.dumps(DivergedError("the attack's loss is nan at step 3 of 9; lower its lr", 3))
    )
    assert isinstance(again, DivergedError)
    assert again.step == 3
    assert "step 3 of 9" in str(again)


def test_no_text_is_an_error(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(WorkbenchError, match="empty") as caught:
        _run(model, words, texts=())
    assert not isinstance(caught.value, DivergedError)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": -1e-3}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"texts": -1}, "texts"),
        ({"optimiser": "adam"}, "optimiser.*'adam'.*adamw.*sgd"),
        ({"optimiser": "SGD"}, "optimiser"),
        ({"precision": "float16"}, "precision.*'float16'.*float32.*bfloat16"),
        ({"precision": "bf16"}, "precision"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        RelearnSettings(**wrong)
    assert "\n" not in str(caught.value)
    # The same in a configuration file: one line that names the field's group.
    with pytest.raises(WorkbenchError, match="attack"):
        validated(RunConfig, {"attack": wrong}, "config.yaml")


def test_the_default_attack_is_every_parameter_in_float32_by_adamw() -> None:
    settings = RelearnSettings()
    assert (settings.optimiser, settings.lora_rank, settings.precision, settings.texts) == (
        "adamw",
        0,
        "float32",
        0,
    )
    assert settings.measure_at[0] == 0 and settings.measure_at[-1] == settings.steps
    with pytest.raises(AttributeError):
        settings.lr = 1.0  # type: ignore[misc]
    assert {field.name for field in fields(RelearnSettings)} == {
        "steps",
        "lr",
        "batch_size",
        "measure_at",
        "optimiser",
        "lora_rank",
        "precision",
        "texts",
    }
    found = validated(
        RunConfig,
        {
            "attack": {
                "optimiser": "sgd",
                "lora_rank": 4,
                "precision": "bfloat16",
                "texts": 3,
                "steps": 40,
            }
        },
        "config.yaml",
    ).attack
    assert found == RelearnSettings(optimiser="sgd", lora_rank=4, precision="bfloat16", texts=3)
    assert np.all(np.diff(at_steps(120, 1e-3).measure_at) > 0)
