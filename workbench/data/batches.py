"""From texts to tensors. Which tokens count is decided here, once, and travels with the batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.data.records import Example, Texts, examples_of
from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief
from workbench.hooks.tokens import Positions, Tokens, without_bos, without_first

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@brief
@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded token tensors of some examples.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 on real tokens, 0 on padding.
        answer_mask: true on the tokens of the answer (on none, where an example has no answer).
        subject_mask: true on the tokens of the subject.
        target_mask: true on the tokens that a loss predicts: the content tokens, or the answer (see
            :func:`encode`).
        items: the facts' names, one per row.
        alternative: the same questions with another answer (a refusal), row by row; for objectives
            that compare the two.
        bos_token_id: the tokenizer's BOS, or ``None`` where it has none.
        before: ``[batch]`` summed negative log-likelihood of every row's targets under the frozen
            reference, where whoever made the batch knows it; a loss that needs it then saves a
            pass.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    answer_mask: Bool[Tensor, "batch pos"]
    subject_mask: Bool[Tensor, "batch pos"]
    target_mask: Bool[Tensor, "batch pos"]
    items: tuple[str, ...]
    alternative: Batch | None = None
    bos_token_id: int | None = None
    before: Float[Tensor, " batch"] | None = None

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.input_ids.shape[0]

    @property
    def inputs(self) -> dict[str, Int[Tensor, "batch pos"]]:
        """The keyword arguments of the model's forward pass."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def content(self) -> Positions:
        """Which tokens statistics see: all real ones but the first and any further leading BOS.

        The first token of a sequence is an attention sink of outlying norm, whether or not it is
        BOS, and so is every BOS that repeats it.
        """
        if self.bos_token_id is None:
            return without_first
        return without_first & without_bos(self.bos_token_id)

    @property
    def content_mask(self) -> Bool[Tensor, "batch pos"]:
        """True on the tokens of :attr:`content`."""
        real = self.attention_mask.bool()
        return self.content(Tokens(real, real.shape[1], self.input_ids))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        names = ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(
            self,
            **moved,
            alternative=None if self.alternative is None else self.alternative.to(device),
            before=None if self.before is None else self.before.to(device),
        )


Targets = Literal["text", "answer"]
"""Which tokens a loss predicts: the whole text, or only the answer where an example has one
(running text has none and counts whole).
"""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Texts,
    *,
    max_length: int | None = None,
    targets: Targets = "text",
) -> Batch:
    """Tokenise ``examples`` into one right-padded batch.

    Right padding is exact for every causal family and needs no position ids; the tokenizer's own
    padding side is not used. A text that begins with the BOS string is not given a second BOS by a
    tokenizer that adds one.

    Args:
        tokenizer: a fast tokenizer (offsets are needed to find the answer).
        examples: at least one; a plain string is running text.
        max_length: texts are cut to this many tokens; default is no cut.
        targets: which tokens a loss predicts.

    Raises:
        WorkbenchError: there is no example, the tokenizer is slow, a text has nothing to predict
            (fewer than two tokens, or BOS alone), or an answer lies behind the cut.
    """
    examples = examples_of(examples)
    if not examples:
        raise WorkbenchError("there is no text to encode: the set is empty")
    if not tokenizer.is_fast:
        raise WorkbenchError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; load its "
            "fast version (tokenizer.json)"
        )
    texts = [_without_bos_string(tokenizer, example.text) for example in examples]
    encoded = tokenizer(
        texts,
        return_offsets_mapping=True,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
    )
    rows = encoded["input_ids"]
    bos = tokenizer.bos_token_id
    for row, example in zip(rows, examples, strict=True):
        if len(row) < 2 or all(token == bos for token in row):
            raise WorkbenchError(
                f"text too short: {example.text!r} has {len(row)} token(s) and a next-token loss "
                "needs at least 2, BOS aside; remove or lengthen it"
            )
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    # Spans count characters of the text as given.
    cuts = [len(example.text) - len(text) for example, text in zip(examples, texts, strict=True)]
    all_offsets = [
        [(start + cut, end + cut) for start, end in offsets]
        for offsets, cut in zip(encoded["offset_mapping"], cuts, strict=True)
    ]

    # lists become tensors whole: token by token, that takes most of the time of a small batch
    def padded(lists: Sequence[list[int]], filler: int = 0) -> Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in lists])

    def within(span: tuple[int, int] | None, offsets: Sequence[tuple[int, int]]) -> list[int]:
        if span is None:
            return []
        return [int(start < span[1] and end > span[0] and end > start) for start, end in offsets]

    answers, subjects = (
        [within(span, offsets) for span, offsets in zip(spans, all_offsets, strict=True)]
        for spans in zip(*((example.answer, example.subject) for example in examples), strict=True)
    )
    for example, row, offsets in zip(examples, answers, all_offsets, strict=True):
        if example.answer is not None:
            reached = max(end for _, end in offsets)
            if not any(row[1:]) or reached < len(example.text[: example.answer[1]].rstrip()):
                raise WorkbenchError(
                    f"the answer of {example.text[:80]!r} lies behind the cut at {max_length} "
                    "tokens; raise the maximum length"
                )
    answer_mask = padded(answers).bool()
    batch = Batch(
        padded(rows, pad),
        padded([[1] * len(row) for row in rows]),
        answer_mask,
        padded(subjects).bool(),
        torch.zeros_like(answer_mask),
        tuple(example.item for example in examples),
        bos_token_id=bos,
    )
    target_mask = batch.content_mask
    if targets == "answer":
        whole = torch.tensor([example.answer is None for example in examples])
        target_mask = torch.where(whole[:, None], target_mask, answer_mask)
    return replace(batch, target_mask=target_mask)


def _without_bos_string(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` without the BOS strings in front, if ``tokenizer`` adds a BOS of its own."""
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or not bos or not text.startswith(bos):
        return text
    if tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return text
    while text.startswith(bos):
        text = text.removeprefix(bos)
    return text


def batches(
    tokenizer: PreTrainedTokenizerBase,
    examples: Texts,
    size: int,
    *,
    max_length: int | None = None,
    targets: Targets = "text",
) -> list[Batch]:
    """``examples`` in their order, in batches of at most ``size`` rows."""
    examples = examples_of(examples)
    return [
        encode(tokenizer, examples[start : start + size], max_length=max_length, targets=targets)
        for start in range(0, len(examples), size)
    ]


def endless(items: Sequence[Example], size: int, seed: int | str) -> Iterator[list[Example]]:
    """Shuffled lists of ``size`` examples without end: every epoch visits each example once, in a
    fresh order.

    Raises:
        WorkbenchError: ``items`` is empty.
    """
    if not items:
        raise WorkbenchError("there is no text to draw from: the set is empty")
    rng = random.Random(str(seed))
    queue: list[Example] = []
    while True:
        while len(queue) < size:
            epoch = list(items)
            rng.shuffle(epoch)
            queue += epoch
        yield queue[:size]
        del queue[:size]
