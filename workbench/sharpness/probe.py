"""What the probes around a model share: losses by name, their values and gradients, and weights
that come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import token_nll
from workbench.sharpness.slices import Direction, mean_loss, movable_weights
from workbench.unlearning.smoothing.rule import in_float32

Parts = Callable[[PreTrainedModel], Iterable[Float[Tensor, ""]]]
"""The parts (scalars) of a loss whose value is their sum. They are differentiated one after the
other, so that one graph is alive at a time.
"""

LossSource = Sequence[Batch] | Parts
"""Texts (their mean token loss, nats per token) or any other differentiable function of the
weights.
"""


def value_of(model: PreTrainedModel, loss: LossSource) -> float:
    """The loss at the weights that the model has now."""
    if not callable(loss):
        return mean_loss(model, loss)
    with torch.no_grad():
        return float(sum(float(part.double()) for part in loss(model)))


def value_and_gradient(
    model: PreTrainedModel, loss: LossSource, parameters: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradient at the weights that the model has now, by name; zeros where the
    loss does not depend on a parameter.

    Raises:
        WorkbenchError: the loss depends on no trainable parameter.
    """
    tokens = 1 if callable(loss) else sum(int(batch.target_mask[:, 1:].sum()) for batch in loss)
    parts = (
        loss(model)
        if callable(loss)
        else (token_nll(model, batch, whole=False).sum() for batch in loss)
    )
    value, total = (
        0.0,
        {name: torch.zeros_like(parameter) for name, parameter in parameters.items()},
    )
    for part in parts:
        if not part.requires_grad:
            raise WorkbenchError(
                "the attack loss depends on no trainable parameter, so there is no direction to "
                "follow"
            )
        value += float(part.detach().double()) / tokens
        for name, gradient in zip(
            parameters,
            torch.autograd.grad(part, list(parameters.values()), materialize_grads=True),
            strict=True,
        ):
            total[name] += gradient / tokens
    return value, total


@contextmanager
def probing(
    model: PreTrainedModel, losses: Mapping[str, LossSource]
) -> Iterator[Callable[[Direction, float], None]]:
    """:func:`workbench.sharpness.slices.movable_weights` for a model in evaluation mode, in
    float32: in bfloat16 a small perturbation would be rounded away.

    Raises:
        WorkbenchError: the model is in training mode, or there is no loss, or a loss without a
            target token.
    """
    if model.training:
        raise WorkbenchError("a model in training mode has a random loss; call model.eval() first")
    if not losses:
        raise WorkbenchError("no loss was given; name at least one, e.g. {'forget': batches}")
    for name, loss in losses.items():
        if not callable(loss) and not any(bool(batch.target_mask[:, 1:].any()) for batch in loss):
            raise WorkbenchError(f"loss {name!r} has no target token; give it texts that have some")
    with in_float32(model), movable_weights(model) as move:
        yield move


def checked(name: str, values: Sequence[float], *, negative: bool = False) -> list[float]:
    """``values`` as floats.

    Raises:
        WorkbenchError: there is none, or one is not finite, or (unless ``negative``) below 0.
    """
    numbers = [float(value) for value in values]
    bad = [
        value for value in numbers if not (abs(value) < float("inf") and (negative or value >= 0))
    ]
    if bad or not numbers:
        raise WorkbenchError(
            f"{name} is {bad[0] if bad else 'empty'}; give finite "
            f"numbers{'' if negative else ' of at least 0'}"
        )
    return numbers
