"""A checkpoint is opened whole or not at all: damage of weights, names, shapes, configuration."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import CONFIGS, build
from torch import Tensor
from typer.testing import CliRunner

from workbench.cli import app
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.models import OpenedModel, open_model, save_model, untie
from workbench.unlearning.deltas import apply_delta, delta_between, norm_of, snapshot

WORDS = [f"w{number}" for number in range(30)]
IDS = torch.tensor([[1, 5, 6, 7, 20]])
Weights = dict[str, Tensor]


def _folder(folder: Path, model: hf.PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    build_tokenizer(WORDS).save_pretrained(folder)
    return folder


def _rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def _configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _one_line(error: pytest.ExceptionInfo[WorkbenchError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    return _folder(tmp_path / "model", build("llama"))


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "gemma3"])
def test_every_family_comes_back_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    again = open_model(_folder(tmp_path / "model", model)).model
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_tied_head_may_be_absent_and_is_kept_where_it_differs(kind: str, tmp_path: Path) -> None:
    model = build(kind, tie_word_embeddings=True)
    folder = _folder(tmp_path / "model", model)
    assert torch.equal(open_model(folder).model(IDS).logits, model(IDS).logits)
    key = next(
        key for key in load_file(folder / "model.safetensors") if "emb" in key or "wte" in key
    )
    _rewrite(folder, lambda weights: weights | {"lm_head.weight": weights[key].clone()})
    assert torch.equal(open_model(folder).model(IDS).logits, model(IDS).logits)
    _rewrite(folder, lambda weights: weights | {"lm_head.weight": weights[key] + 1})
    own = open_model(folder).model
    head, embedding = own.get_output_embeddings(), own.get_input_embeddings()
    assert torch.equal(head.weight, embedding.weight + 1)  # both are kept, neither is dropped


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("_orig_mod.", "save model._orig_mod"),
        ("module.", "save model.module"),
        ("module._orig_mod.", "save model._orig_mod"),
        ("_fsdp_wrapped_module.", "gather the full state dict"),
        ("base_model.model.", "merge_and_unload"),
    ],
)
def test_the_prefix_of_a_wrapper_is_named_with_its_remedy(
    llama_folder: Path, prefix: str, remedy: str
) -> None:
    _rewrite(llama_folder, lambda weights: {prefix + key: value for key, value in weights.items()})
    with pytest.raises(WorkbenchError) as error:
        open_model(llama_folder)
    _one_line(error, "cannot open model", remedy, "keys (")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"},
            "1 key (lm_head.weight) are",
        ),
        (lambda w: {k: v for k, v in w.items() if "layers.1." not in k}, "9 keys"),
        (lambda w: {k: v for k, v in w.items() if "q_proj" not in k}, "2 keys"),
        (lambda w: w | {"model.layers.0.mlp.extra.weight": torch.ones(2)}, "nowhere in the model"),
        (lambda w: w | {"model.norm.weight": torch.full((16,), float("nan"))}, "NaN or infinity"),
        (lambda w: w | {"model.norm.weight": torch.full((16,), float("inf"))}, "NaN or infinity"),
        (lambda w: w | {"model.norm.weight": torch.ones(8)}, "[8] instead of [16]"),
        (
            lambda w: {k.removeprefix("model."): v for k, v in w.items() if "lm_head" not in k},
            "missing",
        ),
    ],
)
def test_every_weight_is_read_and_is_a_number(
    llama_folder: Path, change: Callable[[Weights], Weights], says: str
) -> None:
    _rewrite(llama_folder, change)
    with pytest.raises(WorkbenchError) as error:
        open_model(llama_folder)
    _one_line(error, "cannot open model", says)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 3},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 3},
        {"hidden_size": "16"},
        {"hidden_size": 32},
        {"intermediate_size": 0},
        {"vocab_size": 10},
        {"vocab_size": None},
        {"rms_norm_eps": "small"},
        {"model_type": "no-such-model"},
        {"hidden_act": "no-such-function"},
    ],
)
def test_a_configuration_that_disagrees_with_the_weights_is_one_line(
    llama_folder: Path, changes: dict[str, Any]
) -> None:
    _configure(llama_folder, **changes)
    with pytest.raises(WorkbenchError) as error:
        open_model(llama_folder)
    _one_line(error, "cannot open model")


@pytest.mark.parametrize("content", ["[]", "", "{", '{"model": 3}', "\udcff"])
@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
def test_a_damaged_json_file_is_one_line(llama_folder: Path, file: str, content: str) -> None:
    (llama_folder / file).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(WorkbenchError) as error:
        open_model(llama_folder)
    _one_line(error, str(llama_folder))


def test_a_lost_shard_is_one_line(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    build_tokenizer(WORDS).save_pretrained(tmp_path)
    assert torch.equal(open_model(tmp_path).model(IDS).logits, model(IDS).logits)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(WorkbenchError) as error:
        open_model(tmp_path)
    _one_line(error, "cannot open model")


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_is_an_error_and_none_is_the_same_model(seed: int, tmp_path: Path) -> None:
    """Deleted, renamed, reshaped and non-finite weights in any mixture."""
    rng = random.Random(seed)
    model = build("llama")
    folder = _folder(tmp_path / "model", model)
    kinds = [rng.choice(["delete", "rename", "reshape", "nan"]) for _ in range(rng.randrange(3))]

    def damage(weights: Weights) -> Weights:
        for kind in kinds:
            key = rng.choice(sorted(weights))
            value = weights.pop(key)
            if kind == "rename":
                weights[rng.choice(["x.", "module.", ""]) + key + "_old"] = value
            elif kind == "reshape":
                weights[key] = torch.cat([value, value])
            elif kind == "nan":
                value.view(-1)[rng.randrange(value.numel())] = float("nan")
                weights[key] = value
        return weights

    _rewrite(folder, damage)
    if not kinds:
        assert torch.equal(open_model(folder).model(IDS).logits, model(IDS).logits)
        return
    with pytest.raises(WorkbenchError) as error:
        open_model(folder)
    _one_line(error, "cannot open model")


def test_constants_of_older_versions_are_no_weights(tmp_path: Path) -> None:
    model = build("gpt2")
    folder = _folder(tmp_path / "model", model)
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    old |= {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    _rewrite(folder, lambda weights: weights | old)
    assert torch.equal(open_model(folder).model(IDS).logits, model(IDS).logits)


# --- adapters -----------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path, llama_folder: Path) -> tuple[Path, Tensor]:
    settings = LoraConfig(r=4, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(open_model(llama_folder).model, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.eval()
    folder = tmp_path / "adapter"
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return folder, wrapped(IDS).logits


def test_an_adapter_is_refused_with_the_remedy_and_merged_on_request(
    adapter: tuple[Path, Tensor], llama_folder: Path, tmp_path: Path
) -> None:
    folder, logits = adapter
    with pytest.raises(WorkbenchError) as error:
        open_model(folder)
    _one_line(error, "PEFT adapter of", str(llama_folder), "merge_adapter=True")
    opened = open_model(folder, merge_adapter=True)
    assert torch.allclose(opened.model(IDS).logits, logits, atol=1e-5)
    save_model(opened.model, opened.tokenizer, tmp_path / "merged")
    assert torch.equal(open_model(tmp_path / "merged").model(IDS).logits, opened.model(IDS).logits)
    with pytest.raises(WorkbenchError, match="no folder of a PEFT adapter"):
        open_model(llama_folder, merge_adapter=True)


@pytest.mark.parametrize(
    "damage", ["missing", "extra", "nan", "shape", "base", "both", "no weights"]
)
def test_a_damaged_adapter_is_one_line(
    adapter: tuple[Path, Tensor], llama_folder: Path, damage: str
) -> None:
    folder, path = adapter[0], adapter[0] / "adapter_model.safetensors"
    weights = load_file(path)
    key = sorted(weights)[0]
    if damage == "missing":
        del weights[key]
    elif damage == "extra":
        weights[key.replace("q_proj", "v_proj").replace("down_proj", "up_proj")] = weights[
            key
        ].clone()
    elif damage == "nan":
        weights[key] = weights[key] * float("nan")
    elif damage == "shape":
        weights[key] = torch.cat([weights[key], weights[key]])
    elif damage == "base":
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = None
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    elif damage == "both":
        (folder / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    save_file(weights, path, metadata={"format": "pt"})
    if damage == "no weights":
        path.unlink()
    with pytest.raises(WorkbenchError) as error:
        open_model(folder, merge_adapter=True)
    _one_line(error, str(folder))


# --- tied and untied heads ----------------------------------------------------------------------


def _pair() -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    tied, untied = build("llama", tie_word_embeddings=True), build("llama")
    untied.load_state_dict(tied.state_dict())
    with torch.no_grad():
        untied.lm_head.weight.add_(0.5)
        untied.model.norm.weight.add_(0.25)
    return tied, untied


def test_a_delta_is_over_the_union_of_tied_and_untied_heads() -> None:
    tied, untied = _pair()
    expected = 0.5 * untied.lm_head.weight.numel() ** 0.5
    there, back = delta_between(untied, snapshot(tied)), delta_between(tied, snapshot(untied))
    for delta, sign in ((there, 1), (back, -1)):
        assert set(delta) == {"lm_head.weight", "model.norm.weight"}
        assert torch.allclose(delta["lm_head.weight"], torch.tensor(0.5 * sign), atol=1e-6)
        assert norm_of(delta) == pytest.approx((expected**2 + 16 * 0.25**2) ** 0.5)


def test_a_tied_model_takes_such_a_delta_once_it_has_a_head_of_its_own() -> None:
    tied, untied = _pair()
    delta = delta_between(untied, snapshot(tied))
    with pytest.raises(WorkbenchError, match=r"ties to another weight.*untie"):
        apply_delta(tied, snapshot(tied), delta, 1.0)
    before = tied(IDS).logits
    assert untie(tied) and not untie(tied)
    assert torch.equal(tied(IDS).logits, before)
    apply_delta(tied, snapshot(tied), delta, 1.0)
    assert torch.allclose(tied(IDS).logits, untied(IDS).logits, atol=1e-5)


def test_models_of_other_parameters_have_no_difference() -> None:
    small, large = build("llama"), build("qwen3")
    with pytest.raises(WorkbenchError, match="two checkpoints of the same model"):
        delta_between(large, snapshot(small))


def test_a_head_of_its_own_is_saved_and_opened_again(tmp_path: Path) -> None:
    tied, untied = _pair()
    untie(tied)
    apply_delta(tied, snapshot(tied), delta_between(untied, snapshot(tied)), 1.0)
    again = open_model(_folder(tmp_path / "model", tied)).model
    assert torch.equal(again(IDS).logits, tied(IDS).logits)


# --- from the command line ----------------------------------------------------------------------


def test_an_investigation_of_a_wrapped_checkpoint_is_refused_before_anything_is_written(
    llama_folder: Path, tmp_path: Path
) -> None:
    wrapped = _folder(tmp_path / "wrapped", build("llama"))
    _rewrite(wrapped, lambda weights: {f"_orig_mod.{key}": value for key, value in weights.items()})
    texts = {}
    for name in ("forget", "retain"):
        texts[name] = tmp_path / f"{name}.txt"
        texts[name].write_text(
            "\n\n".join(f"w{number} w2 w3 w4 w5 w6 w7 w8 w9" for number in range(8))
        )
    out = tmp_path / "run"
    command = ["investigate", "--base", str(llama_folder), "--unlearned", str(wrapped)]
    command += [
        "--forget",
        str(texts["forget"]),
        "--retain",
        str(texts["retain"]),
        "--out",
        str(out),
    ]
    with pytest.raises(WorkbenchError) as error:
        CliRunner().invoke(app, command, catch_exceptions=False, standalone_mode=False)
    _one_line(error, "_orig_mod.", str(wrapped))
    assert not out.exists()


def test_an_opened_model_has_what_it_needs(llama_folder: Path) -> None:
    opened = open_model(llama_folder)
    assert isinstance(opened, OpenedModel) and not opened.model.training
