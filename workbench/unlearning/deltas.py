"""Weight changes as values: ``theta = theta0 + alpha * delta``, in float32, applied once.

bf16 in-place steps round away most of a small update; a float32 delta kept apart from the weights does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

Weights = Mapping[str, Tensor]


def _sharded(model: PreTrainedModel) -> None:
    """Put gathered weights back into shards: after a forward pass FSDP leaves those of the outermost module whole, and whole ones do not mix with shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of every parameter (tied ones once), in its own dtype."""
    _sharded(model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def delta_between(model: PreTrainedModel, start: Weights) -> dict[str, Tensor]:
    """float32 ``theta - theta0`` of every parameter that differs from ``start``."""
    _sharded(model)
    delta = {}
    for name, parameter in model.named_parameters():
        difference = parameter.detach().float() - start[name].float()
        # the same answer in every process, or the deltas of a sharded model would differ in their names
        if bool(_whole(difference.count_nonzero())):
            delta[name] = difference
    return delta


@torch.no_grad()
def apply_delta(model: PreTrainedModel, start: Weights, delta: Weights, alpha: float) -> None:
    """Set the model to ``start + alpha * delta``, computed in float32; parameters outside ``delta`` are copied from ``start`` bit by bit."""
    _sharded(model)
    for name, parameter in model.named_parameters():
        if name in delta and alpha != 0.0:
            parameter.copy_(start[name].float() + alpha * delta[name])
        else:
            parameter.copy_(start[name])


def norm_of(delta: Weights) -> float:
    """Euclidean length of a delta over all parameters, accumulated in float64 (a flat float32 norm is off by per cents at 1e8 entries).

    Sharded tensors (DTensor) count whole; every process of the group must call this.
    """
    return float(
        sum(float(_whole(tensor.double().square().sum())) for tensor in delta.values()) ** 0.5
    )


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
