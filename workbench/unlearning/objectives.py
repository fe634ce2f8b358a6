"""Unlearning objectives on likelihoods. A loss term is ``(model, batch, reference) -> scalar``; an
objective joins a forget and a retain term.

``reference`` is the frozen starting model. Every term is masked inside, computed per example where
its formula is per example, and moves the gradient (tested).

The value of a term on a batch is a mean over the target tokens, or over what it is marked with
(:func:`workbench.evaluation.losses.mean_over`). Statistics that go over a whole set ask
:func:`on_set` for the term, so that neither order nor batch size enters them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError, unknown
from workbench.evaluation.losses import (
    cross_entropy,
    mean_over,
    next_token_logits,
    sequences,
    token_kl,
    token_nll,
    weight_of,
)
from workbench.hooks.brief import brief
from workbench.values import Word

LossTerm = Callable[[PreTrainedModel, Batch, PreTrainedModel], Float[Tensor, ""]]


def on_set(
    term: LossTerm, model: PreTrainedModel, reference: PreTrainedModel, batches: Sequence[Batch]
) -> Callable[[Batch], Float[Tensor, ""]]:
    """``term`` as a function of a batch of one whole set, marked with what it is a mean over.

    A term that measures something on its batch (the mean length of a representation) has an
    attribute ``on_set(reference, batches)`` that gives the same term with the measure of the whole
    set. The weighted sum over batches is then the same under any order, batch size and split.
    Noise that a term draws afresh at every call (:mod:`workbench.unlearning.noise`) is outside
    that promise.

    Args:
        term: of an objective.
        model: that the term runs, as it is at the time of every call.
        reference: the frozen starting model.
        batches: the whole set.
    """
    set_term: LossTerm = term.on_set(reference, batches) if hasattr(term, "on_set") else term

    @mean_over(weight_of(set_term))
    def loss(batch: Batch) -> Tensor:
        return set_term(model, batch, reference)

    return loss


@brief
@dataclass(frozen=True, slots=True)
class Pair:
    """What one unlearning step reads: a batch of the forget set and one of the retain set."""

    forget: Batch
    retain: Batch


@brief
@dataclass(frozen=True, slots=True)
class Objective:
    """``forget_weight * forget(model, pair.forget) + retain_weight * retain(model, pair.retain)``.

    The two terms stay apart, because a wrapper may act on one of them only (SAM perturbs the forget
    term).
    """

    forget: LossTerm
    retain: LossTerm | None = None
    forget_weight: float = 1.0
    retain_weight: float = 1.0

    def forget_term(
        self, model: PreTrainedModel, pair: Pair, reference: PreTrainedModel
    ) -> Float[Tensor, ""]:
        """The weighted forget term (scalar)."""
        return self.forget_weight * self.forget(model, pair.forget, reference)

    def retain_term(
        self, model: PreTrainedModel, pair: Pair, reference: PreTrainedModel
    ) -> Float[Tensor, ""] | None:
        """The weighted retain term (scalar), or ``None`` without one."""
        return (
            None
            if self.retain is None
            else self.retain_weight * self.retain(model, pair.retain, reference)
        )

    def __call__(
        self, model: PreTrainedModel, pair: Pair, reference: PreTrainedModel
    ) -> Float[Tensor, ""]:
        """The whole objective (scalar)."""
        retain = self.retain_term(model, pair, reference)
        forget = self.forget_term(model, pair, reference)
        return forget if retain is None else forget + retain


def retain_cross_entropy(
    model: PreTrainedModel, batch: Batch, reference: PreTrainedModel
) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy, nats per token: the retain term of gradient difference."""
    return cross_entropy(model, batch)


def negative_cross_entropy(
    model: PreTrainedModel, batch: Batch, reference: PreTrainedModel
) -> Float[Tensor, ""]:
    """Minus the mean next-token cross-entropy: gradient ascent."""
    return -cross_entropy(model, batch)


def retain_kl(
    model: PreTrainedModel, batch: Batch, reference: PreTrainedModel
) -> Float[Tensor, ""]:
    """Mean over target tokens of ``KL(reference || model)``, nats per token. Padding does not enter
    the mean.
    """
    with torch.no_grad():
        expected = next_token_logits(reference, batch)
    mask = batch.target_mask[:, 1:]
    return token_kl(expected[mask], next_token_logits(model, batch)[mask]).mean()


RETAIN_TERMS: dict[str, LossTerm] = {"cross-entropy": retain_cross_entropy, "kl": retain_kl}
"""Retain terms that a likelihood method can be given by name."""

Retain = Annotated[str, Word(tuple(RETAIN_TERMS))]


def retain_term(name: str) -> LossTerm:
    """The retain term called ``name``.

    Raises:
        WorkbenchError: there is none.
    """
    if name not in RETAIN_TERMS:
        raise unknown("retain term", name, RETAIN_TERMS)
    return RETAIN_TERMS[name]


def npo(beta: float) -> LossTerm:
    r"""Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    .. math:: -\frac{2}{\beta}\, E\Big[\log\sigma\big(-\beta \log\tfrac{\pi_\theta(x)}{\pi_{ref}(x)}\big)\Big]

    The log-ratio is the **sum** over the target tokens of one sequence, and the mean is over
    sequences; beta has no meaning without that statement. At the reference its gradient is that of
    gradient ascent on the summed likelihood. Where code takes the token mean of a batch inside the
    sigmoid (that of the smoothed-unlearning study does), the same beta is a weaker pull on long
    answers; divide it by the answers' mean length to compare.
    """  # noqa: E501
    if beta <= 0:
        raise ValueError(f"beta is {beta}; NPO needs beta > 0 (its limit at 0 is gradient ascent)")

    @mean_over(sequences)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        before = reference_nll(reference, batch) if batch.before is None else batch.before
        rise = token_nll(model, batch).sum(1) - before
        return -2.0 / beta * F.logsigmoid(beta * rise).mean()

    loss.needs_before = True  # type: ignore[attr-defined]
    return loss


@torch.no_grad()
def reference_nll(reference: PreTrainedModel, batch: Batch) -> Float32[Tensor, " batch"]:
    """Summed negative log-likelihood of the target tokens of every sequence under the frozen
    reference. It is the same at every step: a term with the attribute ``needs_before`` is given it
    as ``batch.before`` by the trainer, which asks once for every text.
    """
    return token_nll(reference, batch).sum(1)


def simnpo(beta: float, margin: float) -> LossTerm:
    r"""SimNPO (Fan et al. 2024, arXiv 2410.07163, eq. 8): NPO without a reference, on
    length-normalised likelihoods.

    .. math:: -\frac{2}{\beta}\, E\big[\log\sigma\big(\beta\,(\overline{NLL}(x) - \delta)\big)\big]

    The negative log-likelihood is the **mean** over the target tokens of a sequence. The margin
    stands inside the bracket, in nats per token, as open-unlearning implements it; the paper's own
    margin is ``beta`` times that.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; SimNPO needs beta > 0")

    @mean_over(sequences)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        return -2.0 / beta * F.logsigmoid(beta * (_mean_nll(model, batch) - margin)).mean()

    return loss


def _mean_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """``[batch]`` mean negative log-likelihood over each sequence's target tokens."""
    return token_nll(model, batch).sum(1) / batch.target_mask[:, 1:].sum(1).clamp(min=1)


def _refusal(batch: Batch) -> Batch:
    if batch.alternative is None:
        raise ValueError(
            "this objective compares the answer with a refusal, and the batch has none; give the "
            "recipe an alternative (see refuse)"
        )
    return batch.alternative


def idk_dpo(beta: float) -> LossTerm:
    r"""DPO with a refusal as the preferred answer (Maini et al. 2024, arXiv 2401.06121; Rafailov et
    al. 2023, eq. 7, times ``2 / beta`` as in open-unlearning).

    .. math:: -\frac{2}{\beta}\, E\Big[\log\sigma\Big(\beta\big[\log\tfrac{\pi_\theta(y_{idk})}{\pi_{ref}(y_{idk})} - \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}\big]\Big)\Big]

    Log-ratios are sums over the answer's tokens. The refusal of a question answers that very
    question.
    """  # noqa: E501
    if beta <= 0:
        raise ValueError(f"beta is {beta}; DPO needs beta > 0")

    def rise(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        return reference_nll(reference, batch) - token_nll(model, batch).sum(1)

    @mean_over(sequences)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        return (
            -2.0
            / beta
            * F.logsigmoid(
                beta * (rise(model, _refusal(batch), reference) - rise(model, batch, reference))
            ).mean()
        )

    return loss


@mean_over(lambda batch: weight_of(cross_entropy)(_refusal(batch)))
def idk_cross_entropy(
    model: PreTrainedModel, batch: Batch, reference: PreTrainedModel
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the refusal, nats per token (IdkNLL; Maini et al. 2024)."""
    return cross_entropy(model, _refusal(batch))


def undial(beta: float) -> LossTerm:
    r"""UNDIAL (Dong et al. 2024, arXiv 2402.10052, eq. 4): learn from the reference with the true
    token's logit lowered.

    .. math:: -\sum_v \mathrm{softmax}(z_{ref} - \beta\, e_y)_v\, \log\mathrm{softmax}(z_\theta)_v

    Mean over target tokens only. The released code also averages over masked positions, where it
    lowers the logit of an unrelated token.
    """
    if beta < 0:
        raise ValueError(f"beta is {beta}; UNDIAL lowers the true token's logit by beta >= 0")

    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        mask = batch.target_mask[:, 1:]
        with torch.no_grad():
            logits = next_token_logits(reference, batch)[mask]
            target = (
                logits - beta * F.one_hot(batch.input_ids[:, 1:][mask], logits.shape[-1])
            ).softmax(-1)
        return -(target * next_token_logits(model, batch)[mask].log_softmax(-1)).sum(-1).mean()

    return loss


def teacher_kl(temperature: float, sign: float = 1.0) -> LossTerm:
    r"""SCRUB's distance to the teacher (Kurmanji et al. 2023, arXiv 2302.09880, eq. 1): ``sign *
    T^2 KL(teacher || student)`` of softened predictions, mean over target tokens.

    The factor ``T^2`` keeps the gradient's size independent of the temperature (Hinton et al.
    2015).

    Args:
        temperature: ``T``, divides both logits.
        sign: -1 on the forget set (drive away), 1 on the retain set.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")

    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        mask = batch.target_mask[:, 1:]
        with torch.no_grad():
            expected = next_token_logits(reference, batch)[mask] / temperature
        return (
            sign
            * temperature**2
            * token_kl(expected, next_token_logits(model, batch)[mask] / temperature).mean()
        )

    return loss


def weighted(*terms: tuple[float, LossTerm]) -> LossTerm:
    """A sum of loss terms with weights.

    Terms that are means over different things have a value on a batch, but no sum over a set:
    its :func:`~workbench.evaluation.losses.weight_of` raises :class:`WorkbenchError`.
    """
    units = {weight_of(term) for _, term in terms}

    def unit(batch: Batch) -> float:
        if len(units) > 1:
            names = ", ".join(sorted(each.__name__ for each in units))
            raise WorkbenchError(
                f"a sum of losses that are means over {names} has no weight on a set of batches; "
                "use terms with one mean_over"
            )
        return next(iter(units))(batch)

    @mean_over(unit)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        return torch.stack([weight * term(model, batch, reference) for weight, term in terms]).sum()

    return loss


def generic_prediction(reinforced: PreTrainedModel, strength: float) -> LossTerm:
    r"""The generic labels of "Who's Harry Potter?" (Eldan and Russinovich 2023, arXiv 2310.02238,
    eq. 1), as soft targets.

    .. math:: v_{generic} = v_{ref} - \alpha\, \mathrm{ReLU}(v_{reinforced} - v_{ref})

    Tokens that a model trained further on the forget set makes more likely are what the set
    teaches. The paper takes the most probable token of ``v_generic`` as the label; here the model
    learns the whole softmax of it, and the paper's table of replaced names is not used. Mean over
    target tokens of the cross-entropy, in nats.

    Args:
        reinforced: the model trained further on the forget set.
        strength: ``alpha``.
    """

    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        mask = batch.target_mask[:, 1:]
        with torch.no_grad():
            before, after = (
                next_token_logits(reference, batch)[mask],
                next_token_logits(reinforced, batch)[mask],
            )
            target = (before - strength * F.relu(after - before)).softmax(-1)
        return -(target * next_token_logits(model, batch)[mask].log_softmax(-1)).sum(-1).mean()

    return loss
