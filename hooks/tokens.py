"""Which positions count. A rule is a value with a name; it reads the tokens of a forward pass and
answers with a boolean ``[batch pos]``.

>>> (without_first & ~last_token).name
'without_first & ~last_token'

Padding is never selected, whatever a rule says: every rule is intersected with the real tokens.
Rules see whole sequences, also where the key-value cache hands the model one new token at a time,
and treat several sequences packed into one row (marked by ``position_ids`` that start again) as
separate sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.hooks.brief import brief
from workbench.hooks.errors import CaptureError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


@brief
@dataclass(frozen=True, eq=False)
class Tokens:
    """What one forward pass reads, together with what the cache already holds.

    Attributes:
        real: true on real tokens, over the whole sequence so far.
        new: how many of the last columns this pass computes (all of them, without a cache).
        ids: token ids, or ``None`` where the pass was given embeddings.
        positions: position ids as given, or ``None``.
        prompt: number of columns that the first of a chain of cached passes read; the columns from
            there on were generated.
        ended: true on rows that have produced an end-of-sequence token.
    """

    real: Bool[Tensor, "batch pos"]
    new: int
    ids: Int[Tensor, "batch pos"] | None = None
    positions: Int[Tensor, "batch pos"] | None = None
    prompt: int = 0
    ended: Bool[Tensor, " batch"] | None = None

    @property
    def starts(self) -> Bool[Tensor, "batch pos"]:
        """True on the first real token of every sequence; a row holds several if it is packed."""
        first = self.real & (self.real.cumsum(1) == 1)
        if self.positions is None:
            return first
        jump = torch.ones_like(self.real)
        jump[:, 1:] = self.positions[:, 1:] != self.positions[:, :-1] + 1
        return first | (jump & self.real & (self.positions == 0))

    @property
    def ends(self) -> Bool[Tensor, "batch pos"]:
        """True on the last real token of every sequence."""
        column = torch.arange(self.real.shape[1], device=self.real.device).expand_as(self.real)
        sequence = self.starts.cumsum(1)
        last = column.new_full((len(column), column.shape[1] + 1), -1).scatter_reduce(
            1, sequence, torch.where(self.real, column, -1), "amax"
        )
        return self.real & (last.gather(1, sequence) == column)


@brief
@dataclass(frozen=True, eq=False)
class Positions:
    """A position rule: a name and a function from :class:`Tokens` to a mask. Combine rules with
    ``&``, ``|`` and ``~``.

    Attributes:
        name: what tables and errors call it; for a combination, the expression.
        choose: the function.
        mask: where the rule is an explicit mask, that mask: it can be used on a module that is
            given no tokens.
    """

    name: str
    choose: Callable[[Tokens], Bool[Tensor, "batch pos"]]
    mask: Bool[Tensor, "batch pos"] | None = None

    def __call__(self, tokens: Tokens) -> Bool[Tensor, "batch pos"]:
        """The chosen positions, never padding.

        Raises:
            CaptureError: the rule speaks of another number of examples or positions than the pass
                has.
        """
        mask = self.choose(tokens)
        if mask.shape != tokens.real.shape:
            raise CaptureError(
                f"the position rule {self.name!r} selects from {list(mask.shape)}, but the pass "
                f"has [batch, position] = {list(tokens.real.shape)}"
            )
        return mask.to(tokens.real.device) & tokens.real

    def __and__(self, other: Positions) -> Positions:
        return Positions(f"{self.name} & {other.name}", lambda tokens: self(tokens) & other(tokens))

    def __or__(self, other: Positions) -> Positions:
        return Positions(
            f"({self.name} | {other.name})", lambda tokens: self(tokens) | other(tokens)
        )

    def __invert__(self) -> Positions:
        name = f"({self.name})" if " & " in self.name else self.name
        return Positions(f"~{name}", lambda tokens: ~self(tokens))


real_tokens = Positions("real_tokens", lambda tokens: tokens.real)
"""Every real token."""
without_first = Positions("without_first", lambda tokens: ~tokens.starts)
"""All real tokens but the first of each sequence: an attention sink of outlying norm, whether or
not it is BOS.
"""
last_token = Positions("last_token", lambda tokens: tokens.ends)
"""The last real token of each sequence. Under the cache of ``generate``, the newest one."""
generated = Positions("generated", lambda tokens: _from_column(tokens, tokens.prompt))
"""The tokens that ``generate`` produced and fed back (its very last token is never fed back, so it
has no activations).
"""


def _from_column(tokens: Tokens, column: int) -> Tensor:
    return (torch.arange(tokens.real.shape[1], device=tokens.real.device) >= column).expand_as(
        tokens.real
    )


def without_bos(bos_token_id: int) -> Positions:
    """All real tokens but the BOS tokens at the beginning of each sequence, however many there are.

    A sequence that does not begin with BOS loses nothing (compare :data:`without_first`), and BOS
    tokens further inside stay.
    """

    def choose(tokens: Tokens) -> Tensor:
        if tokens.ids is None:
            raise CaptureError(
                "without_bos needs input_ids, but the pass was given embeddings; use without_first"
            )
        not_bos = (tokens.real & (tokens.ids != bos_token_id)).int()
        before = (
            not_bos.cumsum(1) - not_bos
        )  # of the whole row; a packed row holds several sequences
        of_start = torch.where(tokens.starts, before, 0).cummax(1).values
        return (before > of_start) | not_bos.bool()

    return Positions(f"without_bos({bos_token_id})", choose)


def custom(mask: Bool[Tensor, "batch pos"], name: str = "custom") -> Positions:
    """The positions where ``mask`` is true. With a cache, the mask may be that of the prompt or
    that of the new tokens; no other is selected.

    Raises:
        CaptureError: the mask is not boolean or not two-dimensional.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise CaptureError(
            f"a position mask must be a boolean [batch, position] tensor; got {mask.dtype} with "
            f"shape {list(mask.shape)}"
        )
    return Positions(name, lambda tokens: _placed(mask, tokens, ("prompt", "new")), mask)


def pass_mask(mask: Bool[Tensor, "batch pos"]) -> Positions:
    """The mask of the pass that is about to run: with a cache, that of its new tokens. Errors as
    for :func:`custom`.
    """
    return Positions(
        "mask", lambda tokens: _placed(mask, tokens, ("new", "prompt")), custom(mask).mask
    )


def _placed(mask: Tensor, tokens: Tokens, parts: tuple[str, str]) -> Tensor:
    """``mask`` over the whole sequence. It may cover all of it, or one of its ``parts``
    (``prompt``, ``new``); the first that is as wide as the mask is meant.
    """
    mask, length = mask.to(tokens.real.device), tokens.real.shape[1]
    part = next((part for part in parts if getattr(tokens, part) == mask.shape[1]), None)
    if mask.shape[1] == length or part is None:
        return mask
    padding = mask.new_zeros(mask.shape[0], length - mask.shape[1])
    return torch.cat([mask, padding] if part == "prompt" else [padding, mask], dim=1)


def answer_tokens(labels: Int[Tensor, "batch pos"], ignore: int = -100) -> Positions:
    """The tokens of the answer: where the training ``labels`` are not ``ignore``."""
    return custom(labels != ignore, "answer_tokens")


def predicting(rule: Positions) -> Positions:
    """The positions that *predict* the tokens of ``rule``: one to the left, inside the same
    sequence.

    A causal LM's loss at a token sends its gradient into the position before it; the gradient at
    the last token of a text is exactly zero.

    Raises:
        CaptureError: in a pass, where such a position lies in the key-value cache.
    """

    def choose(tokens: Tokens) -> Tensor:
        predicted = rule(tokens) & ~tokens.starts
        first = tokens.real.shape[1] - tokens.new
        if first and bool(predicted[:, first].any()):
            raise CaptureError(
                f"predicting({rule.name}) needs a position that an earlier pass computed and left "
                "in the cache; run the finished sequence once without a cache instead"
            )
        shifted = torch.zeros_like(tokens.real)
        shifted[:, :-1] = predicted[:, 1:]
        return shifted

    return Positions(f"predicting({rule.name})", choose)


def find_span(text: str, part: str) -> tuple[int, int]:
    """Character offsets ``(start, stop)`` of ``part`` in ``text``.

    Raises:
        CaptureError: ``part`` is empty, absent, or there more than once (give the offsets yourself
            then).
    """
    starts = [
        index for index in range(len(text)) if part and text.startswith(part, index)
    ]  # overlapping ones too, which str.count leaves out
    count = len(starts)
    if count != 1:
        raise CaptureError(
            f"{part!r} occurs {count} times in {text!r}; a span needs exactly one occurrence, or "
            "explicit character offsets"
        )
    return starts[0], starts[0] + len(part)


def character_span(
    spans: Sequence[tuple[int, int]], offsets: Int[Tensor, "batch pos 2"], name: str = "subject"
) -> Positions:
    """The tokens that overlap one character span per example: a subject, a name, a forget-token.

    Args:
        spans: half-open character offsets in each text, one per example (see :func:`find_span`).
        offsets: from a fast tokenizer's ``return_offsets_mapping=True``; special tokens and padding
            have empty offsets and are never chosen.
        name: what the rule is called in tables.

    Raises:
        CaptureError: the number of spans differs from the number of examples, or a span covers no
            token (truncated away, or offsets of another text).
    """
    if offsets.ndim != 3 or offsets.shape[2] != 2 or len(spans) != offsets.shape[0]:
        raise CaptureError(
            f"{len(spans)} spans need offsets of shape [{len(spans)}, position, 2]; got "
            f"{list(offsets.shape)}"
        )
    for example, (start, stop) in enumerate(spans):
        if start >= stop:
            raise CaptureError(
                f"{name}: the span {(start, stop)} of example {example} is empty; give half-open "
                "character offsets with start < stop"
            )
    bounds = torch.tensor(spans, device=offsets.device)
    mask = (
        (offsets[..., 0] < bounds[:, 1:])
        & (offsets[..., 1] > bounds[:, :1])
        & (offsets[..., 1] > offsets[..., 0])
    )
    for example, hit in enumerate(mask.any(1).tolist()):
        if not hit:
            raise CaptureError(
                f"{name}: the span {tuple(spans[example])} of example {example} covers no token; "
                "was the text truncated, or are the offsets of another text?"
            )
    return custom(mask, name)
