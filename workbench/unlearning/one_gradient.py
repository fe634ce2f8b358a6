"""One filtered gradient instead of many steps: the single-shot form of RepSelect (Sondej, Yang and
Mahdi 2026, arXiv 2606.17168).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import Batch, batches
from workbench.data.records import Example
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy, weight_of
from workbench.hooks.brief import brief
from workbench.progress import ProgressCallback
from workbench.subspaces.collapse import Collapse, removed_shares
from workbench.subspaces.collapsed_update import collapse_checked
from workbench.subspaces.weights import singular_subspaces
from workbench.unlearning.objectives import on_set, retain_cross_entropy
from workbench.unlearning.recipe import OneGradient, Recipe


@brief
@dataclass(frozen=True, slots=True)
class Unlearned:
    """What a run of a recipe gives.

    Attributes:
        delta: float32 weight change, parameter by parameter; parameters that did not change are not
            in it.
        log: one record per step: objective terms and whatever the step rule reports.
        trained: names of the parameters that were to be trained.
    """

    delta: dict[str, Tensor]
    log: tuple[dict[str, float], ...]
    trained: tuple[str, ...] = ()

    @property
    def unmoved(self) -> tuple[str, ...]:
        """Parameters that were to be trained and did not change."""
        return tuple(name for name in self.trained if name not in self.delta)


Parameters = Sequence[tuple[str, torch.nn.Parameter]]


def one_gradient(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    retain: Sequence[Example],
    parameters: Parameters,
    *,
    max_length: int | None,
    progress: ProgressCallback,
) -> Unlearned:
    """Accumulate the forget gradient over one epoch, collapse its leading singular directions on
    both sides, and take it as the change.

    1. A low-rank adversary ``W + B A`` learns the forget set further for one epoch of plain SGD, so
       that the gradient is taken where the knowledge is exposed.
    2. The gradient of the forget objective with respect to the weights is summed over the forget
       set, at the adversary's weights, in float32: every term of the objective (a token, or a
       sequence) counts once, whatever the batches. The adversary's steps before are an ordinary
       training, in batches and in order.
    3. Its singular directions (or those of the retain set's gradient) are collapsed on both sides.
    4. The change is minus the result, of global length ``recipe.lr``; how far to go along it is the
       budget's business.

    Args:
        model: a float32 copy of the base whose ``parameters`` require gradients; comes back
            with the weights it had.
        reference: the frozen base.
        recipe: with ``one`` set.
        tokenizer: of both.
        forget: texts to forget.
        retain: texts to keep; used where ``statistics`` is ``retain``.
        parameters: the matrices that may change, ``[d_out d_in]``, or ``[experts d_out d_in]``
            for a mixture of experts, whose matrices are collapsed one by one.
        max_length: texts are cut to this many tokens.
        progress: called after every pass over the texts.

    Raises:
        WorkbenchError: a chosen parameter is no matrix, the gradient is zero or not finite, or
            nothing is left of it.
    """
    settings = recipe.one
    assert settings is not None
    for name, parameter in parameters:
        if parameter.ndim not in (2, 3):
            raise WorkbenchError(
                f"{name} has shape {list(parameter.shape)}; singular directions need matrices, so "
                "choose weights of linear layers"
            )
    passes = 2 + (settings.statistics == "retain") + (settings.adversary_rank > 0)
    forget_batches = [
        batch.to(model.device)
        for batch in batches(
            tokenizer, forget, recipe.batch_size, max_length=max_length, targets="answer"
        )
    ]
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, passes)

    source: dict[str, Tensor] | None = None
    if settings.statistics == "retain":
        retain_batches = [
            batch.to(model.device)
            for batch in batches(tokenizer, retain, recipe.batch_size, max_length=max_length)
        ]
        set_term = on_set(retain_cross_entropy, model, reference, retain_batches)
        source, _ = _gradient(parameters, set_term, retain_batches)
        advance()
    start = {name: parameter.detach().clone() for name, parameter in parameters}
    try:
        if settings.adversary_rank:
            _adversary(model, parameters, forget_batches, settings)
            advance()
        set_term = on_set(recipe.objective.forget, model, reference, forget_batches)
        gradient, loss = _gradient(parameters, set_term, forget_batches)
    finally:
        with torch.no_grad():
            for name, parameter in parameters:
                parameter.copy_(start[name])
                parameter.grad = None
    advance()
    delta = {}
    for name, matrix in gradient.items():
        source_matrix = (source or gradient)[name]
        if matrix.ndim == 2:
            delta[name] = -_collapsed(matrix, source_matrix, settings, name)
        else:  # the matrices of many experts in one tensor
            parts = [
                _collapsed(own_slice, source_slice, settings, f"{name}[{number}]")
                for number, (own_slice, source_slice) in enumerate(
                    zip(matrix, source_matrix, strict=True)
                )
            ]
            delta[name] = -torch.stack(parts)
    length = math.sqrt(sum(float(change.double().square().sum()) for change in delta.values()))
    if not math.isfinite(length) or length == 0:
        raise WorkbenchError(
            f"the forget gradient has length {length}; is the objective defined on these texts?"
        )
    advance()
    return Unlearned(
        {name: change * (recipe.lr / length) for name, change in delta.items()},
        ({"forget": loss, "gradient_norm": length},),
    )


def _collapsed(matrix: Tensor, source: Tensor, settings: OneGradient, name: str) -> Tensor:
    """``matrix`` with the leading singular directions of ``source`` collapsed on both sides."""
    sides = singular_subspaces(source, settings.components, site=name)
    shares = removed_shares(sides.activation.eigenvalues, settings.kind)
    collapse = Collapse(sides.activation.basis, sides.gradient.basis, shares, shares)
    return collapse_checked(collapse.to(matrix.device), matrix, name)


def _gradient(
    parameters: Parameters, loss: Callable[[Batch], Tensor], texts: Sequence[Batch]
) -> tuple[dict[str, Tensor], float]:
    """float32 gradient of ``loss`` summed over the set, and its mean over the set's terms."""
    total: dict[str, Tensor] = {}
    value = terms = 0.0
    weight = weight_of(loss)
    for batch in texts:
        for _, parameter in parameters:
            parameter.grad = None
        part_of_sum = loss(batch) * weight(batch)
        part_of_sum.backward()
        value, terms = value + float(part_of_sum.detach()), terms + weight(batch)
        for name, parameter in parameters:
            part = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total[name] = total[name] + part.float() if name in total else part.float().clone()
    return total, value / terms


def _adversary(
    model: PreTrainedModel, parameters: Parameters, texts: Sequence[Batch], settings: OneGradient
) -> None:
    """Leave the model at ``W + B A`` after one epoch of SGD on the forget set's cross-entropy.

    ``A`` starts as Kaiming-uniform noise, ``B`` at zero, as in LoRA (Hu et al. 2021) with ``alpha =
    rank``. The factors' gradients follow from the weight's: ``dB = dW A'``, ``dA = B' dW``.
    """
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, parameter in parameters:
        *experts, outputs, inputs = parameter.shape
        bound = 1 / math.sqrt(inputs)
        noise = torch.rand(*experts, settings.adversary_rank, inputs, generator=generator)
        factors[name] = (
            parameter.detach().clone(),
            torch.zeros(*experts, outputs, settings.adversary_rank, device=parameter.device),
            ((noise * 2 - 1) * bound).to(parameter.device),
        )
    for batch in texts:
        for _, parameter in parameters:
            parameter.grad = None
        cross_entropy(model, batch).backward()
        with torch.no_grad():
            for name, parameter in parameters:
                if parameter.grad is None:
                    continue
                weight, b, a = factors[name]
                gradient = parameter.grad.float()
                b_step, a_step = gradient @ a.mT, b.mT @ gradient
                b.sub_(b_step, alpha=settings.adversary_rate)
                a.sub_(a_step, alpha=settings.adversary_rate)
                parameter.copy_(weight + b @ a)
