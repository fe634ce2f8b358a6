"""Losses and recall, token by token: sums and counts first, means last, so that batching and
padding cannot change a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.hooks.brief import brief

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Float64, Int, Real


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back."""
    was_training = model.training
    # setting a mode visits every module twice, which short passes would notice
    changes = any(module.training for module in model.modules())
    if changes:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if changes:
            model.train(was_training)


def next_token_logits(
    model: PreTrainedModel, batch: Batch, *, columns: int | None = None
) -> Float32[Tensor, "batch next_pos d_vocab"]:
    """The logits; entry ``t`` predicts token ``t + 1``.

    Args:
        model: a causal language model.
        batch: the texts.
        columns: run the pass over the first so many positions alone, and give the logits of all of
            them; default is the whole text without the logits of its last position.
    """
    if columns is None:
        return model(**batch.inputs, use_cache=False).logits[:, :-1].float()
    inputs = {name: tensor[:, :columns] for name, tensor in batch.inputs.items()}
    return model(**inputs, use_cache=False).logits.float()


def token_nll(
    model: PreTrainedModel, batch: Batch, *, whole: bool = True
) -> Float32[Tensor, "batch next_pos"]:
    """Negative log-likelihood of every next token, in nats; zero where ``batch.target_mask`` is
    false.

    Args:
        model: a causal language model.
        batch: the texts.
        whole: every position passes through the model, as who captures or edits activations in the
            pass expects. ``False`` ends the pass before the last target: a question whose answer is
            one word is then a third shorter, and the values are the same up to rounding.
    """
    mask = batch.target_mask[:, 1:]
    width = mask.shape[1]
    columns = width if whole else max([1, *(mask.any(0).nonzero()[:, 0] + 1).tolist()])
    logits = next_token_logits(model, batch, columns=None if whole else columns)
    targets = batch.input_ids[:, 1 : columns + 1]
    nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    nll = torch.where(mask[:, :columns], nll, 0.0)
    return nll if whole else F.pad(nll, (0, width - columns))


def cross_entropy(
    model: PreTrainedModel, batch: Batch, *, whole: bool = True
) -> Float32[Tensor, ""]:
    """Mean negative log-likelihood over the target tokens of the whole batch, in nats per token
    (scalar); ``whole`` as for :func:`token_nll`.
    """
    return token_nll(model, batch, whole=whole).sum() / batch.target_mask[:, 1:].sum()


Weight = Callable[[Batch], float]
"""How many equal parts the loss of one batch is a mean over: that number times the loss is a sum.

Only sums over batches are the same for every order, batch size and split of the texts, so whatever
is added up over batches (gradients, statistics of their rows) is multiplied by it first.
"""

_Marked = TypeVar("_Marked", bound=Callable[..., Any])


def target_tokens(batch: Batch) -> float:
    """Tokens that a loss predicts: the unit of :func:`cross_entropy` and of every unmarked loss."""
    return float(batch.target_mask[:, 1:].sum())


def content_tokens(batch: Batch) -> float:
    """Real tokens without the leading ones: the unit of losses on representations."""
    return float(batch.content_mask.sum())


def real_tokens(batch: Batch) -> float:
    """All tokens but padding."""
    return float(batch.attention_mask.sum())


def sequences(batch: Batch) -> float:
    """Rows: the unit of preference losses, whose formula is per sequence."""
    return float(batch.size)


def summed(batch: Batch) -> float:
    """1: the weight of a loss that is a sum already."""
    return 1.0


def mean_over(weight: Weight) -> Callable[[_Marked], _Marked]:
    """Decorator: say what a loss is a mean over, where that is not the target tokens."""

    def mark(loss: _Marked) -> _Marked:
        loss.mean_over = weight  # type: ignore[attr-defined]
        return loss

    return mark


def weight_of(loss: Callable[..., Any]) -> Weight:
    """What ``loss`` was marked with by :func:`mean_over`; :func:`target_tokens`, if it was not."""
    found: Weight = getattr(loss, "mean_over", target_tokens)
    return found


def token_kl(
    reference_logits: Float[Tensor, "*shape d_vocab"], logits: Float[Tensor, "*shape d_vocab"]
) -> Float[Tensor, " *shape"]:
    """``KL(reference || model)`` per position, in nats."""
    reference = reference_logits.log_softmax(-1)
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)


@brief
@dataclass(frozen=True, slots=True)
class Scores:
    """Per-example results of one model on one set, in the order of the examples.

    Attributes:
        items: names of the facts.
        correct: 1.0 where greedy decoding gives the whole answer, else 0.0; NaN without an answer.
        probability: geometric mean of the answer's token probabilities; NaN without an answer.
        nll: summed negative log-likelihood of the target tokens, nats.
        tokens: number of target tokens.
    """

    items: tuple[str, ...]
    correct: Float[np.ndarray, " items"]
    probability: Float[np.ndarray, " items"]
    nll: Float[np.ndarray, " items"]
    tokens: Real[np.ndarray, " items"]

    @property
    def loss(self) -> float:
        """Nats per token over the whole set."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def recall(self) -> float:
        """Share of examples whose answer greedy decoding gives."""
        return float(self.correct.mean())


def score(model: PreTrainedModel, batches: Sequence[Batch]) -> Scores:
    """Recall, answer probability and loss of every example.

    Recall is exact match under greedy decoding: the answer's tokens are each the most probable next
    token given the true ones before them, which is the same event as greedy generation producing
    them.
    """
    items: list[str] = []
    parts: dict[str, list[Tensor]] = {"correct": [], "probability": [], "nll": [], "tokens": []}
    with evaluating(model):
        for batch in batches:
            logits = next_token_logits(model, batch)
            targets = batch.input_ids[:, 1:]
            nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double()
            answer, counted = batch.answer_mask[:, 1:], batch.target_mask[:, 1:]
            length = answer.sum(1)
            missing = torch.where(length > 0, 0.0, torch.nan).double()
            right = ((logits.argmax(-1) == targets) | ~answer).all(1).double()
            parts["correct"].append(right + missing)
            parts["probability"].append(
                torch.exp(-(nll * answer).sum(1) / length.clamp(min=1)) + missing
            )
            parts["nll"].append((nll * counted).sum(1))
            parts["tokens"].append(counted.sum(1).double())
            items += batch.items
    return Scores(
        tuple(items), **{name: torch.cat(values).cpu().numpy() for name, values in parts.items()}
    )


def nll_by_text(
    model: PreTrainedModel, batches: Sequence[Batch]
) -> tuple[Float64[np.ndarray, " items"], Int[np.ndarray, " items"]]:
    """Summed negative log-likelihood of every text's target tokens, nats, and their number."""
    sums, counts = [], []
    with evaluating(model):
        for batch in batches:
            sums.append(token_nll(model, batch).double().sum(1))
            counts.append(batch.target_mask[:, 1:].sum(1))
    return torch.cat(sums).cpu().numpy(), torch.cat(counts).cpu().numpy()


def kl_by_text(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    reference_logits: Sequence[Float[Tensor, "_batch _next_pos d_vocab"]],
) -> tuple[Float64[np.ndarray, " items"], Int[np.ndarray, " items"]]:
    """Summed ``KL(reference || model)`` over every text's target tokens, nats, and their number.

    Args:
        model: the changed model.
        batches: the texts.
        reference_logits: for every batch, the reference's :func:`next_token_logits`.
    """
    sums, counts = [], []
    with evaluating(model):
        for batch, reference in zip(batches, reference_logits, strict=True):
            mask = batch.target_mask[:, 1:]
            by_token = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
            by_token[mask] = token_kl(
                reference[mask], next_token_logits(model, batch)[mask]
            ).double()
            sums.append(by_token.sum(1))
            counts.append(mask.sum(1))
    return torch.cat(sums).cpu().numpy(), torch.cat(counts).cpu().numpy()


def mean_kl(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    reference_logits: Sequence[Float[Tensor, "_batch _next_pos d_vocab"]],
) -> float:
    """Mean ``KL(reference || model)`` over the target tokens of ``batches``, in nats per token; see
    :func:`kl_by_text`.
    """
    sums, counts = kl_by_text(model, batches, reference_logits)
    return float(sums.sum() / counts.sum())
