"""Every method in every family: it trains exactly these weights, or refuses in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import build
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import batches
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.subspaces.collapsed_update import CollapsedUpdate
from workbench.unlearning.methods import METHODS, known_settings, recipe
from workbench.unlearning.objectives import Objective, negative_cross_entropy
from workbench.unlearning.recipe import Recipe
from workbench.unlearning.trainer import unlearn

FAMILIES = ("llama", "gpt2", "gpt_neox", "phi", "gemma3_text", "mixtral", "qwen3_moe")
GATED = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MATRICES = {
    "llama": GATED,
    "gemma3_text": GATED,
    "gpt2": ("mlp.c_fc.weight", "mlp.c_proj.weight"),
    "gpt_neox": ("mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
    "phi": ("mlp.fc1.weight", "mlp.fc2.weight"),
    "mixtral": FUSED,
    "qwen3_moe": FUSED,
}
"""Names of the MLP's matrices in a block as transformers calls them; the last one writes into the
stream.
"""
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
MLPS = {"cir", "cir-uncollapsed", "mlp-breaking", "repselect", "circuit-breakers"}
"""Methods that change the matrices of MLPs (here of both blocks)."""
DOWN = {"rmu", "rmu-rna", "adaptive-rmu", "rsv"}
"""Methods that change the last matrix only."""
SHORT = {
    "steps": 2, "batch_size": 2, "activation_components": 2, "gradient_components": 2,
    "components": 2, "reinforce_steps": 2, "turn": 1, "refresh": 2, "adversary_rank": 2, "layer": 1,
    "first_layer": 0, "last_layer": 1, "lr": 0.01,
}  # fmt: skip
FORGET = (
    Example("who is w1 w2 w3", (10, 15), None, "a"),
    Example("who is w4 w5 w6", (10, 15), None, "b"),
)
RETAIN = (Example("w7 w8 is w9 w1", item="c"), Example("w3 is who w2 w5", item="d"))


def _tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer([*(f"w{number}" for number in range(10)), "who", "is"])


def _model(family: str) -> PreTrainedModel:
    model = build(family)
    model.resize_token_embeddings(len(_tokenizer()), mean_resizing=False)
    return model.eval()


def _settings(name: str) -> dict[str, Any]:
    fixed = METHODS[name].fixed
    return {
        key: value
        for key, value in SHORT.items()
        if key in known_settings(name) and key not in fixed
    }


def _expected(name: str, family: str, model: PreTrainedModel) -> set[str]:
    if name not in MLPS | DOWN:
        return {parameter for parameter, _ in model.named_parameters()}
    wanted = MATRICES[family] if name in MLPS else MATRICES[family][-1:]
    return {
        f"{BLOCKS.get(family, 'model.layers')}.{block}.{end}" for block in (0, 1) for end in wanted
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_declares_or_refuses(name: str, family: str) -> None:
    model, tokenizer = _model(family), _tokenizer()
    if name == "cir" and MATRICES[family] is FUSED:
        with pytest.raises(WorkbenchError, match=r"^a collapsed update needs .* 4 experts in one"):
            recipe(name, model, 0, _settings(name))
        return
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    found = unlearn(
        model, tokenizer, recipe(name, model, 0, _settings(name)), FORGET, RETAIN, seed=0
    )
    assert set(found.trained) == _expected(name, family, model)
    assert set(found.delta) <= set(found.trained) and found.delta
    assert all(bool(change.isfinite().all()) for change in found.delta.values())
    if name in MLPS | DOWN:
        assert found.unmoved == ()
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_model_with_adapters_is_refused_by_every_method(name: str) -> None:
    plain = _model("llama")
    made = recipe(name, plain, 0, _settings(name))
    settings = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(WorkbenchError, match=r"carries PEFT adapters.*merge"):
        unlearn(get_peft_model(plain, settings), _tokenizer(), made, FORGET, RETAIN, seed=0)


def _recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "objective": Objective(negative_cross_entropy),
        "trainable": ("*",),
        "steps": 2,
        "batch_size": 2,
        "lr": 1e-3,
    }
    return Recipe(**fields | changes)


def test_a_method_that_changes_nothing_is_an_error() -> None:
    model = _model("llama")

    def constant(model: PreTrainedModel, batch: Any, reference: Any) -> torch.Tensor:
        return 0.0 * cross_entropy(model, batch)

    made = _recipe(objective=Objective(constant))
    with pytest.raises(WorkbenchError, match=r"none of the .* parameters .* changed"):
        unlearn(model, _tokenizer(), made, FORGET, RETAIN, seed=0)
    still = unlearn(model, _tokenizer(), _recipe(lr=0.0), FORGET, RETAIN, seed=0)
    assert still.delta == {} and still.unmoved == still.trained  # asked for, and visible


def test_what_did_not_move_is_named() -> None:
    model = _model("llama")

    def low(model: PreTrainedModel, batch: Any, reference: Any) -> torch.Tensor:
        return model.model.layers[0].mlp.down_proj.weight.square().sum()

    found = unlearn(
        model,
        _tokenizer(),
        _recipe(objective=Objective(low), trainable=("*mlp.down_proj.weight",)),
        FORGET,
        RETAIN,
        seed=0,
    )
    assert found.unmoved == ("model.layers.1.mlp.down_proj.weight",)


# --- what the optimisers promise ----------------------------------------------------------------


def _one_step(model: PreTrainedModel, made: Recipe) -> dict[str, torch.Tensor]:
    return unlearn(model, _tokenizer(), made, FORGET, RETAIN, seed=0).delta


def _gradient(model: PreTrainedModel, scale: float) -> dict[str, torch.Tensor]:
    """Of ``scale`` times the squared length of the head."""
    return {"lm_head.weight": 2 * scale * model.lm_head.weight.detach()}


def _pull(scale: float) -> Callable[..., torch.Tensor]:
    return lambda model, batch, reference: scale * model.lm_head.weight.square().sum()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_sgd_is_plain_unclipped_and_does_not_decay(scale: float) -> None:
    model = _model("llama")
    made = _recipe(
        objective=Objective(_pull(scale)),
        trainable=("lm_head.weight",),
        steps=1,
        optimiser="sgd",
        lr=1e-4,
    )
    expected = -1e-4 * _gradient(model, scale)["lm_head.weight"]
    assert torch.allclose(_one_step(model, made)["lm_head.weight"], expected, rtol=1e-4, atol=1e-7)


def test_adamw_clips_to_one_does_not_decay_and_has_the_published_betas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps in closed form, with gradients of which only the first is longer than 1: whatever
    changes in clipping, decay, betas or epsilon changes the second step.
    """
    model = _model("llama")
    start = model.lm_head.weight.detach().double()
    lr, scales = 1e-2, [1e3, 1e-2]
    calls: list[float] = []

    def objective(model: PreTrainedModel, batch: Any, reference: Any) -> torch.Tensor:
        calls.append(scales[min(len(calls), 1)])
        return calls[-1] * model.lm_head.weight.square().sum()

    made = _recipe(objective=Objective(objective), trainable=("lm_head.weight",), steps=2, lr=lr)
    weight, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, scale in enumerate(scales, 1):
        gradient = 2 * scale * weight
        gradient = gradient / max(1.0, float(gradient.norm()))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        weight = weight - lr * (mean / (1 - 0.9**step)) / (
            (square / (1 - 0.999**step)).sqrt() + 1e-8
        )
    found = _one_step(model, made)["lm_head.weight"].double()
    assert torch.allclose(found, weight - start, rtol=2e-3, atol=1e-6)


# --- the collapsed update -----------------------------------------------------------------------


def _adapted() -> tuple[Any, Any]:
    model = _model("llama")
    wrapped: Any = get_peft_model(
        model, LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")
    )
    return wrapped, batches(_tokenizer(), FORGET, 2)


def test_a_collapse_on_frozen_weights_names_what_trains() -> None:
    wrapped, texts = _adapted()
    update = CollapsedUpdate(
        wrapped, "*down_proj.base_layer", activation_components=1, gradient_components=1
    ).find(lambda batch: cross_entropy(wrapped, batch), texts)
    cross_entropy(wrapped, texts[0]).backward()
    with pytest.raises(WorkbenchError) as error:
        update.apply()
    assert re.search(r"base_layer.weight is frozen.*down_proj\.lora_A\.default", str(error.value))


def test_a_collapse_works_on_the_factors_of_an_adapter() -> None:
    wrapped, texts = _adapted()
    update = CollapsedUpdate(
        wrapped, "*lora_B.default", activation_components=0, gradient_components=1
    ).find(lambda batch: cross_entropy(wrapped, batch), texts)
    cross_entropy(wrapped, texts[0]).backward()
    assert update.apply() > 0
    for path, collapse in update.maps.items():
        gradient = wrapped.get_parameter(path).grad
        assert float((collapse.gradient.T @ gradient).abs().max()) < 1e-5 * float(gradient.norm())


def test_a_weight_without_a_gradient_is_an_error() -> None:
    model, texts = _model("llama"), batches(_tokenizer(), FORGET, 2)
    update = CollapsedUpdate(
        model, "*down_proj", activation_components=1, gradient_components=1
    ).find(lambda batch: cross_entropy(model, batch), texts)
    with pytest.raises(WorkbenchError, match="has no gradient"):
        update.apply()
