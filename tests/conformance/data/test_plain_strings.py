"""A plain string stands wherever a text is meant, and is running text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from workbench.attacks.leaks import leak_report
from workbench.attacks.relearn import RelearnSettings, null_text, relearned
from workbench.data.batches import batches, encode
from workbench.data.records import Example, Texts, examples_of
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.unlearning.methods import recipe
from workbench.unlearning.trainer import unlearn

TEXTS = ["the red house stands here", "a cat sat on the mat", "we saw the sea today"]
EXAMPLES = [Example(text, item=f"text/{number}") for number, text in enumerate(TEXTS)]


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_every_string_is_a_fact_of_its_own() -> None:
    assert examples_of(TEXTS) == tuple(EXAMPLES)
    assert examples_of(EXAMPLES) == tuple(EXAMPLES)


@pytest.mark.parametrize(
    ("texts", "says"), [("one text", "one string where texts"), ([3], "3 is int")]
)
def test_what_is_no_text_is_refused(texts: Texts, says: str) -> None:
    with pytest.raises(WorkbenchError, match=says):
        examples_of(texts)


def test_strings_are_encoded_attacked_and_unlearned_as_examples(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    words = sorted({word for text in TEXTS for word in text.split()})
    tokenizer = build_tokenizer(words, 64)
    model = make_model(vocab_size=len(tokenizer))
    for one, other in zip(
        batches(tokenizer, TEXTS, 2), batches(tokenizer, EXAMPLES, 2), strict=True
    ):
        assert torch.equal(one.input_ids, other.input_ids) and one.items == other.items
    assert encode(tokenizer, TEXTS).items == ("text/0", "text/1", "text/2")
    attack = RelearnSettings(steps=2, batch_size=2, measure_at=(0, 2))
    attacked = [relearned(model, tokenizer, texts, attack) for texts in (TEXTS, EXAMPLES)]
    assert _same(*attacked) and not _same(attacked[0], model)
    made = recipe("grad-diff", model, 0, {"steps": 2, "batch_size": 2})
    deltas = [
        unlearn(model, tokenizer, made, texts, TEXTS, seed=0).delta for texts in (TEXTS, EXAMPLES)
    ]
    assert deltas[0] and all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])


def test_strings_leak_and_make_null_texts_as_examples() -> None:
    for heldout in (TEXTS, EXAMPLES):
        assert not leak_report(TEXTS, heldout).benign  # type: ignore[arg-type]
    chosen = null_text(TEXTS[:1], TEXTS[1:], lambda example: len(example.text.split()))
    assert [example.text for example in chosen] == TEXTS[1:2]
