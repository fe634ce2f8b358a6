"""One-dimensional slices of a loss through a model: ``L(theta + a d)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workbench.data.batches import Batch
from workbench.evaluation.losses import token_nll
from workbench.hooks import CaptureError, resolve
from workbench.unlearning.deltas import norm_of, snapshot

Direction = Mapping[str, Tensor]
"""Parameter name -> float32 direction."""

_WRITES = ("o_proj", "down_proj", "out_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")
"""Names of layers that write into the residual stream, for families that the hooks do not know."""


@contextmanager
def movable_weights(model: PreTrainedModel) -> Iterator[Callable[[Direction, float], None]]:
    """Yields ``move(direction, a)``, which sets the weights to ``theta + a * direction``; the
    weights are copied back bit by bit at the end, whatever happens.
    """
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
    """The direction with Euclidean norm ``length`` over all parameters; a zero direction stays
    zero.
    """
    norm = norm_of(direction)
    return (
        {name: value * (length / norm) for name, value in direction.items()}
        if norm
        else dict(direction)
    )


def stream_axes(model: PreTrainedModel) -> dict[str, int]:
    """The axis of every matrix along which one filter lies.

    A filter is the set of weights between one unit and the residual stream (Li et al. 2018 speak of
    the weights that make one unit's output): for a matrix that reads from the stream those *into*
    an output unit, for one that writes into it those *out of* a hidden unit. What a matrix does is
    asked of the hooks' table of families, and how it lies of its module: ``nn.Linear`` keeps
    ``[d_out d_in]``, GPT-2's ``Conv1D`` ``[d_in d_out]``, embeddings ``[d_vocab d_model]``; of
    experts in one tensor ``[experts . .]`` it is the axis of the stream's width.

    Returns:
        Parameter name -> axis; vectors are left out.
    """
    writes = _writing_layers(model)
    width = model.config.get_text_config().hidden_size
    axes = {}
    for path, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{part}".lstrip(".")
            if part.endswith("bias"):  # those of many experts lie in one [expert, out]
                continue
            if parameter.ndim == 3:
                # [expert, out, in] reads along its last axis and writes along the one before
                down = "down" in part
                transposed = getattr(
                    module, "is_transposed", parameter.shape[1 + (not down)] != width
                )
                axes[name] = 1 + (down == bool(transposed))
            elif parameter.ndim == 2:
                row = int(path not in writes)
                axes[name] = 1 - row if isinstance(module, Conv1D) else row
    return axes


def _writing_layers(model: PreTrainedModel) -> set[str]:
    try:
        found = {site.path for site in resolve(model, "blocks.*.attn.hook_z")}
    except CaptureError:  # a family without a table
        return {path for path, _ in model.named_modules() if path.rpartition(".")[2] in _WRITES}
    if not any(".experts." in name for name, _ in model.named_parameters()):
        found |= {site.path for site in resolve(model, "blocks.*.mlp.out.hook_in")}
    return found


def random_direction(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """A filter-normalised Gaussian direction (Li et al. 2018, arXiv 1712.09913, section 4).

    Every filter of the direction has the norm of the same filter of the weights; what a filter is
    says :func:`stream_axes`. One-dimensional tensors (norm gains, biases) get no perturbation.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = stream_axes(model)
    direction = {}
    # sorted: a seed means the same direction whatever the order of the modules
    for name, parameter in sorted(model.named_parameters()):
        if name not in axes:
            continue
        draw = torch.randn(parameter.shape, generator=generator)
        dim = axes[name]
        weights = parameter.detach().float().cpu()
        direction[name] = (
            draw * weights.norm(dim=dim, keepdim=True) / draw.norm(dim=dim, keepdim=True)
        ).to(parameter.device)
    return direction


def descent_direction(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Minus the gradient of the summed token loss over ``batches``: where a relearning attack's
    first step goes.
    """
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
            token_nll(model, batch, whole=False).sum(), parameters, materialize_grads=True
        )
        for accumulated, gradient in zip(total, gradients, strict=True):
            accumulated -= gradient.float()
    return dict(zip(names, total, strict=True))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean token loss over ``batches``, nats per token."""
    total = sum(float(token_nll(model, batch, whole=False).double().sum()) for batch in batches)
    return total / sum(int(batch.target_mask[:, 1:].sum()) for batch in batches)


def loss_slice(
    model: PreTrainedModel,
    direction: Direction,
    positions: Sequence[float],
    losses: Mapping[str, Sequence[Batch]],
) -> dict[str, list[float]]:
    """Every loss at every position along one direction, in one walk; the model is left as it was
    found.

    Args:
        model: the centre, at position 0.
        direction: what one unit of position means.
        positions: in any order.
        losses: name to texts.

    Returns:
        Loss name to values, nats per token, in the order of ``positions``.
    """
    values: dict[str, list[float]] = {name: [] for name in losses}
    with movable_weights(model) as move:
        for position in positions:
            move(direction, position)
            for name, batches in losses.items():
                values[name].append(mean_loss(model, batches))
    return values
