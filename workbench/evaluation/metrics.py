"""What a model knows of an answer that it is shown: ranks, extraction strength, perplexity. Several
answers are weighed in :mod:`.options`; what a model writes is :mod:`.answers`.

Everything is computed under teacher forcing from batched forward passes. Values are per example, so
that whole facts can be resampled: ``bootstrap(by_fact(items, values)[1])`` gives the interval of a
mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import evaluating, nll_by_text
from workbench.evaluation.statistics import Estimate, ratio
from workbench.hooks.brief import brief

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int


def answer_logits(
    model: PreTrainedModel, batch: Batch
) -> tuple[Bool[Tensor, "batch next_pos"], Float32[Tensor, "rows d_vocab"], Int[Tensor, " rows"]]:
    """True where an answer token is predicted, and for those the logits and the true tokens."""
    answer = batch.answer_mask[:, 1:]
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    return answer, logits[answer].float(), batch.input_ids[:, 1:][answer]


def _not_empty(batches: Sequence[Batch], what: str) -> None:
    if not batches:
        raise WorkbenchError(f"{what} of no text: the set is empty; give at least one batch")


@brief
@dataclass(frozen=True, slots=True)
class Ranks:
    """Where the answer's tokens stand among all tokens, 1 being the most probable.

    Attributes:
        items: names of the facts.
        worst: the largest rank of the answer's tokens: greedy decoding gives the answer where it is
            1. NaN without an answer.
        mean: the mean rank. NaN without an answer.
    """

    items: tuple[str, ...]
    worst: Float[np.ndarray, " items"]
    mean: Float[np.ndarray, " items"]


def answer_ranks(model: PreTrainedModel, batches: Sequence[Batch]) -> Ranks:
    """Rank of every answer token given the true tokens before it, reduced to the worst and the mean
    of each example.

    ``rank = 1 + #{more probable tokens} + #{equally probable other tokens} / 2``: ties share their
    mean rank, so that a model that has collapsed to one constant has the rank of chance,
    ``(vocabulary + 1) / 2``, and not the first. Logits that are not numbers give NaN.

    Args:
        model: a causal language model.
        batches: the examples.

    Raises:
        WorkbenchError: there is no batch.
    """
    _not_empty(batches, "ranks")
    items: list[str] = []
    worst, mean = [], []
    with evaluating(model):
        for batch in batches:
            answer, logits, targets = answer_logits(model, batch.to(model.device))
            target_logits = logits.gather(1, targets[:, None])
            rank = (
                1
                + (logits > target_logits).sum(1).double()
                + ((logits == target_logits).sum(1).double() - 1) / 2
            )
            table = torch.zeros(answer.shape, dtype=torch.float64, device=rank.device)
            table[answer] = torch.where(logits.isnan().any(1), torch.nan, rank)
            mean.append(table.sum(1) / answer.sum(1))  # 0 / 0 without an answer
            worst.append(table.amax(1) + 0 * mean[-1])
            items += batch.items
    return Ranks(tuple(items), torch.cat(worst).cpu().numpy(), torch.cat(mean).cpu().numpy())


def extraction_strength(
    model: PreTrainedModel, batches: Sequence[Batch]
) -> tuple[tuple[str, ...], Float64[np.ndarray, " items"]]:
    """How little of the answer must be given away before greedy decoding completes it.

    ``1 - min{k : tokens k, k + 1, ... of the answer are each the most probable next token} /
    length`` with ``k`` from 0 to ``length``: 1 where the prompt alone brings out the whole answer,
    0 where even the last token is wrong. Extraction of training data by Carlini et al. 2021 (arXiv
    2012.07805), as a measure of unlearning in Wang et al. 2025 (arXiv 2406.09179). Teacher forcing
    and greedy decoding agree on this event. open-unlearning's code stops at ``k = length - 1`` and
    so gives ``1 / length`` where nothing is right; here that is 0.

    Args:
        model: a causal language model.
        batches: the examples.

    Returns:
        Names of the facts, and strengths in ``[0, 1]``, NaN without an answer or where logits are
        not numbers.

    Raises:
        WorkbenchError: there is no batch.
    """
    _not_empty(batches, "extraction strength")
    items: list[str] = []
    strengths = []
    with evaluating(model):
        for batch in batches:
            answer, logits, targets = answer_logits(model, batch.to(model.device))
            given_away = torch.zeros(answer.shape, dtype=torch.float64, device=logits.device)
            # A wrong token in the n-th place means that n tokens have to be given.
            place = answer.cumsum(1)[answer].double()
            given_away[answer] = torch.where(
                logits.isnan().any(1), torch.nan, place * (logits.argmax(1) != targets)
            )
            strengths.append(1 - given_away.amax(1) / answer.sum(1))
            items += batch.items
    return tuple(items), torch.cat(strengths).cpu().numpy()


def perplexity(model: PreTrainedModel, batches: Sequence[Batch]) -> Estimate:
    """``exp`` of the nats per target token over the whole set (long texts weigh more), with its 95
    % interval over texts (:func:`.statistics.ratio`, exponentiated).

    Args:
        model: a causal language model.
        batches: the texts; ``target_mask`` says which tokens count.

    Raises:
        WorkbenchError: there is no batch, or no token to predict.
    """
    _not_empty(batches, "perplexity")
    with evaluating(model):
        nll, tokens = nll_by_text(model, [batch.to(model.device) for batch in batches])
    if not tokens.sum():
        raise WorkbenchError(
            "perplexity of no token: the batches have no target token; encode texts of at least "
            "two tokens"
        )
    mean_nll = ratio(nll, tokens)
    with np.errstate(over="ignore"):
        return Estimate(
            float(np.exp(mean_nll.value)),
            float(np.exp(mean_nll.low)),
            float(np.exp(mean_nll.high)),
            mean_nll.n,
        )
