"""The mean of the weights along a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError


class Averager:
    r"""A running mean of the trainable weights (Fan et al. 2025, arXiv 2502.05374; stochastic
    weight averaging, Izmailov et al. 2018, arXiv 1803.05407).

    .. math:: \theta_{WA} \leftarrow (n\, \theta_{WA} + \theta_t) / (n + 1)

    in float64, on the device of the weights: 8 bytes for each trainable parameter. Averaged in
    bfloat16, as the released code does, most of what differs between snapshots is rounded away.

    Args:
        start: the optimiser step after which the first snapshot is taken, counted from 1; 100 (of
            125) in the paper.
        every: steps from one snapshot to the next; 5 in the paper.

    Attributes:
        steps: optimiser steps seen.
        snapshots: how many of them are in the mean.
    """

    def __init__(self, start: int, every: int) -> None:
        for name, value in (("start", start), ("every", every)):
            if value < 1:
                raise WorkbenchError(
                    f"{name} is {value}; weight averaging needs a whole number of at least 1"
                )
        self.start, self.every = start, every
        self.steps = self.snapshots = 0
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """To be called after every optimiser step; takes a snapshot if one is due."""
        self.steps += 1
        if self.steps < self.start or (self.steps - self.start) % self.every:
            return
        weights = {
            name: parameter.detach().double()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        if not weights:
            raise WorkbenchError("the model has no trainable parameter to average")
        if self._mean and self._mean.keys() != weights.keys():
            raise WorkbenchError(
                "the trainable parameters are not those of the snapshots before; average one "
                "training with one Averager"
            )
        self.snapshots += 1
        for name, value in weights.items():
            mean = self._mean.get(name)
            # The difference form of the formula: weights that stay where they are come out bit by
            # bit.
            self._mean[name] = (
                value.clone() if mean is None else mean.add_(value - mean, alpha=1 / self.snapshots)
            )

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Set the averaged parameters of ``model`` to the mean, rounded once to their own dtype;
        all others are left alone.

        Raises:
            WorkbenchError: no snapshot was taken.
        """
        if not self.snapshots:
            raise WorkbenchError(
                f"no weights were averaged in {self.steps} steps: averaging begins after step "
                f"{self.start}; start it earlier"
            )
        for name, value in self._mean.items():
            model.get_parameter(name).copy_(value)
