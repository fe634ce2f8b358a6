"""Packed rows, left padding and threads: right, or refused by what the model does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_families import CONFIGS, build
from torch import Tensor

from workbench.hooks import Capture, CaptureError, Collect, edit, peek, real_tokens, steer

A, B = [1, 5, 6, 7, 8], [1, 9, 10, 11]


def _rows(model: Any, site: str, **inputs: Any) -> Tensor:
    kept = Collect()
    with Capture(model, site, kept, at=real_tokens) as capture:
        capture.forward(inputs)
    return kept[site]


def _packed(rows: int = 1) -> dict[str, Tensor]:
    positions = torch.tensor([[*range(len(A)), *range(len(B))]])
    return {
        "input_ids": torch.tensor([A + B]).expand(rows, -1),
        "position_ids": positions.expand(rows, -1),
    }


SITE = "blocks.1.hook_resid_post"
KINDS = [kind for kind in CONFIGS if kind != "gemma3"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows_are_those_of_sequences_alone_or_refused(
    kind: str, masked: bool, rows: int
) -> None:
    model, inputs = build(kind), _packed(rows)
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = torch.cat(
        [peek(model, {"input_ids": torch.tensor([ids])}, SITE)[SITE][0] for ids in (A, B)]
    )
    try:
        found = _rows(model, SITE, **inputs)
    except CaptureError as error:
        found = None
        said = str(error)
    if found is None:
        assert "packed into one row" in said
    else:
        assert torch.allclose(found, expected.repeat(rows, 1), rtol=1e-3, atol=1e-4)


def test_what_the_model_keeps_apart_is_not_refused() -> None:
    found = _rows(build("llama"), SITE, **_packed())
    assert len(found) == len(A + B)


LEARNED: dict[str, Callable[[], Any]] = {
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        max_position_embeddings=64,
        intermediate_size=24,
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=24,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=4),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64
    ),
    "gptj": lambda: hf.GPTJConfig(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
    ),
    **{kind: CONFIGS[kind] for kind in KINDS},
}
_BLOCK = {
    "opt": "model.decoder.layers.1:out",
    "gpt_neo": "transformer.h.1:out",
    "bloom": "transformer.h.1:out",
}


@pytest.mark.parametrize("kind", LEARNED)
def test_left_padding_gives_the_rows_without_it_or_is_refused(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (
            build(kind)
            if kind in CONFIGS
            else hf.AutoModelForCausalLM.from_config(LEARNED[kind]()).eval()
        )
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    site = _BLOCK.get(kind, SITE if kind in CONFIGS else "transformer.h.1:out")
    ids, mask = torch.tensor([[0, 0, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    alone = _rows(model, site, input_ids=ids[:, 2:], attention_mask=mask[:, 2:])
    try:
        found, said = _rows(model, site, input_ids=ids, attention_mask=mask), ""
    except CaptureError as error:
        found, said = None, str(error)
    if found is None:
        assert "padded on the left" in said
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = _rows(model, site, input_ids=ids, attention_mask=mask, position_ids=positions)
    assert torch.allclose(found, alone, rtol=1e-3, atol=1e-4)


def test_the_question_leaves_hooks_and_mode_alone() -> None:
    model = build("gpt2").train()
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(CaptureError, match="padded on the left"):
        _rows(
            model,
            SITE,
            input_ids=torch.tensor([[0, 5, 6]]),
            attention_mask=torch.tensor([[0, 1, 1]]),
        )
    handle.remove()
    assert calls == [] and model.training
    assert not any(module._forward_hooks for module in model.modules())


# --- threads ------------------------------------------------------------------------------------


def _in_threads(work: Callable[[int], None], count: int = 3) -> None:
    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_every_thread_captures_its_own_passes() -> None:
    model = build("llama")
    texts = [torch.full((1, 20), 5 + number) for number in range(3)]
    right = [peek(model, {"input_ids": text}, SITE)[SITE][0] for text in texts]

    def work(number: int) -> None:
        for _ in range(40):
            rows = _rows(model, SITE, input_ids=texts[number])
            assert rows.shape == right[number].shape
            assert torch.allclose(rows, right[number], atol=1e-5)

    _in_threads(work)


def test_every_thread_edits_its_own_passes() -> None:
    model = build("llama")
    inputs = {"input_ids": torch.tensor([A])}
    shifts = [steer(torch.full((16,), float(number))) for number in range(3)]
    last = "blocks.1.hook_resid_post"
    right = []
    for shift in shifts:
        with edit(model, {"blocks.0.hook_resid_post": shift}):
            right.append(peek(model, inputs, last)[last])

    def work(number: int) -> None:
        for _ in range(40):
            with edit(model, {"blocks.0.hook_resid_post": shifts[number]}):
                assert torch.allclose(peek(model, inputs, last)[last], right[number], atol=1e-5)

    _in_threads(work)


def test_a_pass_of_another_thread_alone_is_no_pass() -> None:
    model = build("llama")
    with pytest.raises(CaptureError, match="never ran"):
        with Capture(model, SITE, Collect(), at=real_tokens):
            _in_threads(lambda _: model(torch.tensor([A])) and None, 1)


# --- generate -----------------------------------------------------------------------------------


def _generated(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The sequences, and ``[row, 2]`` where rows were delivered."""
    seen: list[Tensor] = []
    inputs = {"input_ids": torch.tensor([A, [*B, 12]]), "attention_mask": torch.ones(2, 5).long()}
    with Capture(model, SITE, lambda _, rows: seen.append(rows.where), at=real_tokens):
        sequences = model.generate(**inputs, max_new_tokens=8, pad_token_id=0, **options)
    return sequences, torch.cat(seen)


@pytest.mark.parametrize("way", ["keyword", "list", "config"])
def test_the_end_tokens_given_to_generate_end_a_row(way: str) -> None:
    model = build("llama")
    free, _ = _generated(model, do_sample=False, eos_token_id=None)
    first, second = free[:, 5:].tolist()
    end = next(token for token in first[1:5] if token not in second)  # ends the first row early
    stop = first.index(end)
    options: dict[str, Any] = {
        "keyword": {"eos_token_id": end},
        "list": {"eos_token_id": [end, 49]},
        "config": {"generation_config": hf.GenerationConfig(eos_token_id=end, pad_token_id=0)},
    }[way]
    _, where = _generated(model, do_sample=False, **options)
    positions = where[where[:, 0] == 0, 1]
    assert int(positions.max()) == 5 + stop  # the end token itself is fed back, and nothing after


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"stopping_criteria": hf.StoppingCriteriaList([lambda ids, scores: ids[:, -1] == 3])},
    ],
)
def test_a_generation_whose_rows_do_not_stay_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CaptureError, match="run the finished sequences once instead"):
        _generated(build("llama"), **options)
