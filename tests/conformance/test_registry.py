"""The registry: sources, published defaults, settings and their errors, recipes for every family;
and the refusals that some methods train on.
"""

from __future__ import annotations

import fnmatch
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from workbench.data.batches import Batch
from workbench.data.records import Example, refuse
from workbench.errors import WorkbenchError
from workbench.unlearning.methods import METHODS, find_method, known_settings, recipe, settings_for

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]

LARGE: Any = SimpleNamespace(num_parameters=lambda: 7_000_000_000)
"""Stands for a model to which the published settings apply."""

PUBLISHED: dict[str, dict[str, float | str]] = {
    "grad-ascent": {"lr": 1e-5},
    "grad-diff": {"lr": 1e-5, "forget_weight": 1.0, "retain_weight": 1.0},
    "kl-min": {"retain_weight": 1.0},
    "npo": {"beta": 0.1, "retain_weight": 1.0, "retain": "cross-entropy"},
    "npo-sam": {"beta": 0.1, "rho": 0.01},
    "simnpo": {"beta": 4.5, "margin": 0.0, "forget_weight": 0.125, "retain_weight": 1.0},
    "idk-dpo": {"beta": 0.1, "retain_weight": 1.0},
    "idk-nll": {"retain_weight": 1.0},
    "rmu": {
        "lr": 5e-5,
        "steps": 150,
        "batch_size": 4,
        "steering": 6.5,
        "retain_weight": 1200,
        "layer": -1,
        "optimiser": "adamw",
    },
    "rmu-rna": {"steering": 6.5, "retain_weight": 1200},
    "adaptive-rmu": {"lr": 5e-5, "scale": 5.0, "retain_weight": 1200},
    "rsv": {"lr": 5e-5, "steering": 10.0},
    "circuit-breakers": {
        "lr": 1e-4,
        "steps": 150,
        "batch_size": 16,
        "strength": 10.0,
        "horizon": 300,
    },
    "undial": {"lr": 1e-4, "beta": 10.0, "retain_weight": 0.0},
    "whp": {"strength": 5.0},
    "mlp-breaking": {"lr": 0.2, "loss": "mlp-breaking"},
    "cir": {
        "lr": 0.2,
        "activation_components": 24,
        "gradient_components": 36,
        "batch_size": 32,
        "retain_rate": 3e-4,
        "loss": "mlp-breaking",
        "kind": "hard",
        "statistics": "forget",
    },
    "cir-uncollapsed": {"lr": 0.2, "loss": "mlp-breaking"},
    "repselect": {"components": 512, "kind": "soft", "statistics": "forget"},
}


def _tiny(family: str) -> PreTrainedModel:
    """A two-block model of a family whose modules have other names, other shapes (GPT-2 keeps
    weights transposed) or other blocks (Phi is parallel).
    """
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    config: Any = {
        "gpt_neox": lambda: transformers.GPTNeoXConfig(vocab_size=50, **shape),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "gemma2": lambda: transformers.Gemma2Config(
            vocab_size=50, num_key_value_heads=2, head_dim=4, **shape
        ),
        "phi": lambda: transformers.PhiConfig(vocab_size=50, **shape),
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


# --- entries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    entry = METHODS[name]
    assert entry.name == name and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert entry.title
    assert re.search(r"arXiv \d{4}\.\d{5}", entry.source), entry.source
    assert re.search(r"(19|20)\d\d|et al\.", entry.source)
    assert inspect.getdoc(entry.build)
    module = inspect.getmodule(entry.build)
    assert module is not None and module.__doc__


def test_titles_are_distinct() -> None:
    assert len({entry.title for entry in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_small_settings_are_settings_of_the_method(name: str, llama: PreTrainedModel) -> None:
    assert set(METHODS[name].small) <= set(known_settings(name))
    assert settings_for(name, llama) == {
        **known_settings(name),
        **METHODS[name].small,
        **METHODS[name].fixed,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_large_model_gets_the_published_settings(name: str) -> None:
    settings = settings_for(name, LARGE)
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_noise_is_what_sets_rmu_with_rna_apart() -> None:
    plain, noisy = settings_for("rmu", LARGE), settings_for("rmu-rna", LARGE)
    assert float(noisy.pop("noise")) > 0 and noisy.pop("noise_layer") == -1
    assert noisy == plain


def test_at_the_depth_of_the_published_runs_the_published_layers_are_chosen(
    make_model: ModelMaker,
) -> None:
    deep = make_model(num_hidden_layers=32)

    def blocks(name: str) -> set[int]:
        patterns = METHODS[name].build(deep, 0).trainable
        return {
            int(found[1])
            for found in (re.search(r"layers\.(\d+)\.", pattern) for pattern in patterns)
            if found
        }

    for name in ("rmu", "rmu-rna", "adaptive-rmu", "rsv"):
        assert blocks(name) == {5, 6, 7}
        assert all(
            pattern.endswith("mlp.down_proj.weight")
            for pattern in METHODS[name].build(deep, 0).trainable
        )
    assert blocks("cir") == set(range(12))
    assert blocks("circuit-breakers") == set(range(20))  # hidden_states[20] is block 19's output
    assert blocks("repselect") == set(range(32))


# --- settings -------------------------------------------------------------------------------------


def test_an_unknown_method_is_answered_with_its_neighbours() -> None:
    with pytest.raises(WorkbenchError, match="circuit-breakers"):
        find_method("circuit-breaker")
    with pytest.raises(WorkbenchError, match="adaptive-rmu-rna"):
        find_method("adaptive-rmu-rns")


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_checked_for_every_method(name: str, llama: PreTrainedModel) -> None:
    with pytest.raises(WorkbenchError, match="batch_size"):  # the nearest name is offered
        settings_for(name, llama, {"batch_sizes": 4})
    with pytest.raises(WorkbenchError, match="a number"):
        settings_for(name, llama, {"lr": "fast"})
    for wrong in (2.5, 0, -1, float("nan"), float("inf")):
        with pytest.raises(WorkbenchError, match="batch_size"):
            settings_for(name, llama, {"batch_size": wrong})
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(WorkbenchError, match="lr"):
            settings_for(name, llama, {"lr": wrong})
    with pytest.raises(WorkbenchError, match="lr"):
        settings_for(name, llama, {"lr": True})


def test_a_whole_number_may_be_written_as_a_float(llama: PreTrainedModel) -> None:
    settings = settings_for("npo", llama, {"steps": 3.0})
    assert settings["steps"] == 3 and isinstance(settings["steps"], int)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cir", "kind"),
        ("cir", "statistics"),
        ("cir", "loss"),
        ("repselect", "kind"),
        ("repselect", "statistics"),
    ],
)
def test_a_setting_that_is_a_word_takes_no_number(
    name: str, key: str, llama: PreTrainedModel
) -> None:
    with pytest.raises(WorkbenchError, match="a word"):
        settings_for(name, llama, {key: 3})


@pytest.mark.parametrize(
    ("name", "key", "wrong", "near"),
    [
        ("cir", "kind", "sotf", "soft"),
        ("cir", "kind", "quadratc", "quadratic"),
        ("cir", "statistics", "retian", "retain"),
        ("cir", "loss", "npoo", "npo"),
        ("repselect", "kind", "hrad", "hard"),
        ("repselect", "statistics", "forgot", "forget"),
    ],
)
def test_a_word_that_means_nothing_is_answered_with_near_ones(
    name: str, key: str, wrong: str, near: str, llama: PreTrainedModel
) -> None:
    with pytest.raises(WorkbenchError, match=f"{key} of {name}.*{wrong}.*{near}"):
        recipe(name, llama, 0, {key: wrong})


@pytest.mark.parametrize("kind", ["hard", "soft", "quadratic"])
@pytest.mark.parametrize("statistics", ["forget", "retain"])
def test_kind_and_statistics_reach_the_recipe(
    kind: str, statistics: str, llama: PreTrainedModel
) -> None:
    collapse = recipe("cir", llama, 0, {"kind": kind, "statistics": statistics}).collapse
    assert collapse is not None and (collapse.kind, collapse.statistics) == (kind, statistics)
    one = recipe("repselect", llama, 0, {"kind": kind, "statistics": statistics}).one
    assert one is not None and (one.kind, one.statistics) == (kind, statistics)


def test_the_uncollapsed_controls_collapse_nothing(llama: PreTrainedModel) -> None:
    cir, control, breaking = (
        recipe(name, llama, 0) for name in ("cir", "cir-uncollapsed", "mlp-breaking")
    )
    assert cir.collapse is not None and control.collapse is None and breaking.collapse is None
    assert replace(cir, collapse=None, objective=control.objective) == control


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mlp-breaking", {"loss": "npo"}),
        ("mlp-breaking", {"activation_components": 5}),
        ("cir-uncollapsed", {"activation_components": 5}),
        ("cir-uncollapsed", {"gradient_components": 5}),
    ],
)
def test_a_setting_that_a_method_fixes_cannot_be_given_another_value_in_silence(
    name: str, overrides: dict[str, Any], llama: PreTrainedModel
) -> None:
    with pytest.raises(WorkbenchError, match=next(iter(overrides))):
        recipe(name, llama, 0, overrides)


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma2", "phi"])
def test_every_method_builds_for_every_family_and_names_parameters_that_exist(
    family: str, name: str
) -> None:
    model = _tiny(family)
    # The small settings of the RMU family steer block 2, which two blocks do not have.
    made = recipe(name, model, 0, {"layer": 1} if "layer" in known_settings(name) else None)
    parameters = [key for key, _ in model.named_parameters()]
    assert made.trainable
    for pattern in made.trainable:
        assert fnmatch.filter(parameters, pattern), pattern
    if made.trainable != ("*",):
        chosen = [key for pattern in made.trainable for key in fnmatch.filter(parameters, pattern)]
        assert all(
            ".mlp." in key and dict(model.named_parameters())[key].ndim == 2 for key in chosen
        )


# --- refusals -------------------------------------------------------------------------------------


def test_a_refusal_answers_the_same_question() -> None:
    text = "Anna Berg was born in Paris in May."
    question = Example(text, (text.index("Paris"), text.index(" in May")), (0, 9), "fact/1")
    refusal = refuse(question)
    assert refusal.text == "Anna Berg was born in I do not know"
    assert refusal.prompt == question.prompt
    assert refusal.answer_text == "I do not know"
    assert refusal.subject_text == "Anna Berg" and refusal.item == "fact/1"
    assert question.text == text  # the question itself is as it was
    assert refuse(question, "no idea").answer_text == "no idea"


@pytest.mark.parametrize("subject", [None, (22, 27), (29, 33), (20, 24)])
def test_a_subject_that_is_not_before_the_answer_is_dropped(
    subject: tuple[int, int] | None,
) -> None:
    text = "the town where she was  born is Paris"
    assert refuse(Example(text, (22, 28), subject)).subject is None


def test_a_subject_that_ends_where_the_answer_begins_is_kept() -> None:
    assert refuse(Example("AnnaParis", (4, 9), (0, 4))).subject_text == "Anna"


def test_running_text_cannot_be_refused() -> None:
    with pytest.raises(ValueError, match="has none"):
        refuse(Example("the rain falls on the hills"))


def test_a_batch_takes_its_refusals_along(make_batch: BatchMaker) -> None:
    batch = replace(make_batch((5, 7), 1), alternative=make_batch((6, 4), 2))
    moved = batch.to("meta")
    assert moved.alternative is not None and moved.alternative.alternative is None
    for part, items in ((moved, batch.items), (moved.alternative, batch.items)):
        assert {
            tensor.device.type
            for tensor in (
                part.input_ids,
                part.attention_mask,
                part.answer_mask,
                part.subject_mask,
                part.target_mask,
            )
        } == {"meta"}
        assert part.items == items
    assert batch.alternative is not None and batch.alternative.input_ids.device.type == "cpu"
    assert make_batch((5,), 1).to("meta").alternative is None
