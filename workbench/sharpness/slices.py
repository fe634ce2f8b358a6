"""One-dimensional slices of a loss through a model: ``L(theta + a d)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import token_nll
from workbench.unlearning.deltas import norm_of, snapshot

Direction = Mapping[str, Tensor]
"""Parameter name -> float32 direction."""

_COLUMN_UNITS = (
    "o_proj.weight",
    "down_proj.weight",
    "out_proj.weight",
    "c_proj.weight",
    "dense_4h_to_h.weight",
)


@contextmanager
def moved(model: PreTrainedModel) -> Iterator[Callable[[Direction, float], None]]:
    """Yields ``move(direction, a)``, which sets the weights to ``theta + a * direction``; the weights are copied back bit by bit at the end, whatever happens."""
    start = snapshot(model)
    parameters = dict(model.named_parameters())
    touched: set[str] = set()

    @torch.no_grad()
    def move(direction: Direction, a: float) -> None:
        for name in touched - direction.keys():
            parameters[name].copy_(start[name])
        for name, value in direction.items():
            parameters[name].copy_(start[name].float() + a * value)
        touched.clear()
        touched.update(direction)

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, value in start.items():
                parameters[name].copy_(value)


def scaled(direction: Direction, length: float) -> dict[str, Tensor]:
    """The direction with Euclidean norm ``length`` over all parameters; a zero direction stays zero."""
    norm = norm_of(direction)
    return (
        {name: value * (length / norm) for name, value in direction.items()}
        if norm
        else dict(direction)
    )


def random_direction(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """A filter-normalised Gaussian direction (Li et al. 2018, arXiv 1712.09913, section 4).

    Every filter of the direction has the norm of the same filter of the weights. A filter is the set of weights of one unit: a row (the weights into an
    output unit) except for projections back into the residual stream, where it is a column (the weights out of a hidden unit). One-dimensional tensors (norm
    gains, biases) get no perturbation.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, parameter in sorted(
        model.named_parameters()
    ):  # sorted: a seed means the same direction whatever the order of the modules
        if parameter.ndim < 2:
            continue
        draw = torch.randn(parameter.shape, generator=generator)
        dim = 0 if name.endswith(_COLUMN_UNITS) else 1
        weights = parameter.detach().float().cpu()
        direction[name] = (
            draw * weights.norm(dim=dim, keepdim=True) / draw.norm(dim=dim, keepdim=True)
        ).to(parameter.device)
    return direction


def descent_direction(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Minus the gradient of the summed token loss over ``batches``: where a relearning attack's first step goes."""
    names, parameters = zip(
        *[
            (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ],
        strict=True,
    )
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for batch in batches:
        gradients = torch.autograd.grad(
            token_nll(model, batch).sum(), parameters, materialize_grads=True
        )
        for accumulated, gradient in zip(total, gradients, strict=True):
            accumulated -= gradient.float()
    return dict(zip(names, total, strict=True))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean token loss over ``batches``, nats per token."""
    total = sum(float(token_nll(model, batch).double().sum()) for batch in batches)
    return total / sum(int(batch.target_mask[:, 1:].sum()) for batch in batches)


def loss_slice(
    model: PreTrainedModel,
    direction: Direction,
    positions: Sequence[float],
    losses: Mapping[str, Sequence[Batch]],
) -> dict[str, list[float]]:
    """Every loss at every position along one direction, in one walk; the model is left as it was found.

    Args:
        model: the centre, at position 0.
        direction: what one unit of position means.
        positions: in any order.
        losses: name to texts.

    Returns:
        Loss name to values, nats per token, in the order of ``positions``.
    """
    values: dict[str, list[float]] = {name: [] for name in losses}
    with moved(model) as move:
        for position in positions:
            move(direction, position)
            for name, batches in losses.items():
                values[name].append(mean_loss(model, batches))
    return values
