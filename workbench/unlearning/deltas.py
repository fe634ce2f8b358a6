"""Weight changes as values: ``theta = theta0 + alpha * delta``, in float32, applied once.

bf16 in-place steps round away most of a small update; a float32 delta kept apart from the weights
does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError

Weights = Mapping[str, Tensor]


def _sharded(model: PreTrainedModel) -> None:
    """Put gathered weights back into shards: after a forward pass FSDP leaves those of the
    outermost module whole, and whole ones do not mix with shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Snapshot(dict[str, Tensor]):
    """Weights by name, tied ones once.

    Attributes:
        tied: every further name of a tied weight, with the name under which its value is kept.
    """

    def __init__(self, weights: Weights, tied: Mapping[str, str]) -> None:
        super().__init__(weights)
        self.tied = dict(tied)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Every further name of a tied parameter -> its first name (``lm_head`` -> the embedding)."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first[id(parameter)] != name
    }


def snapshot(model: PreTrainedModel) -> Snapshot:
    """A copy of every parameter (tied ones once), in its own dtype."""
    _sharded(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Snapshot(weights, tied_names(model))


def delta_between(model: PreTrainedModel, start: Weights) -> dict[str, Tensor]:
    """float32 ``theta - theta0`` of every parameter that differs from ``start``.

    Where one of the two ties its head to its embedding and the other does not, the delta has both:
    the union of their parameters, each minus what stands for it in the other.

    Raises:
        WorkbenchError: the two have other parameters, or parameters of other shapes.
    """
    _sharded(model)
    parameters_now = dict(model.named_parameters())
    tied_now, tied_at_start = tied_names(model), start.tied if isinstance(start, Snapshot) else {}
    delta = {}
    for name in [*parameters_now, *(name for name in start if name not in parameters_now)]:
        value_now, value_at_start = (
            parameters_now.get(tied_now.get(name, name)),
            start.get(tied_at_start.get(name, name)),
        )
        if value_now is None or value_at_start is None:
            holder, other = ("start", "model") if value_now is None else ("model", "start")
            raise WorkbenchError(
                f"{name} is a parameter of the {holder} and not of the {other}; a difference needs "
                "two checkpoints of the same model"
            )
        if value_now.shape != value_at_start.shape:
            raise WorkbenchError(
                f"{name} has shape {list(value_now.shape)} in the model and "
                f"{list(value_at_start.shape)} in the start; a difference needs two "
                "checkpoints of the same model"
            )
        difference = value_now.detach().float() - value_at_start.float()
        # the same answer in every process, or the deltas of a sharded model would differ in their
        # names
        if bool(_whole(difference.count_nonzero())):
            delta[name] = difference
    return delta


@torch.no_grad()
def apply_delta(model: PreTrainedModel, start: Weights, delta: Weights, alpha: float) -> None:
    """Set the model to ``start + alpha * delta``, computed in float32; parameters outside ``delta``
    are copied from ``start`` bit by bit.

    Raises:
        WorkbenchError: ``delta`` or ``start`` does not fit the parameters of the model.
    """
    _sharded(model)
    names = {name for name, _ in model.named_parameters()}
    tied = sorted(name for name in delta if name in tied_names(model))
    if tied:
        raise WorkbenchError(
            f"the delta changes {tied[0]}, which this model ties to another weight; give the model "
            "a head of its own first (workbench.models.untie)"
        )
    strange = sorted(set(delta) - names) + sorted(names ^ set(start))
    if strange:
        raise WorkbenchError(
            f"{len(strange)} names do not fit the model's parameters, e.g. {strange[0]}; delta and "
            "start must come from the same model"
        )
    for name, parameter in model.named_parameters():
        if name in delta and alpha != 0.0:
            parameter.copy_(start[name].float() + alpha * delta[name])
        else:
            parameter.copy_(start[name])


def norm_of(delta: Weights) -> float:
    """Euclidean length of a delta over all parameters, accumulated in float64 (a flat float32 norm
    is off by per cents at 1e8 entries).

    Sharded tensors (DTensor) count whole; every process of the group must call this.
    """
    return float(
        sum(float(_whole(tensor.double().square().sum())) for tensor in delta.values()) ** 0.5
    )


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
