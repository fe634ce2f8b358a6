"""The running mean of the weights against float64 means in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.unlearning.smoothing import Averager

Weights = dict[str, Tensor]


def _weights(model: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
        for name in first
    )


def test_the_average_is_the_mean_of_the_snapshots(llama: PreTrainedModel) -> None:
    averager, draw, kept = Averager(3, 2), torch.Generator().manual_seed(0), []
    for step in range(1, 28):
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=1e-3)
        before = _weights(llama)
        averager.update(llama)
        assert _same(_weights(llama), before)
        if step >= 3 and step % 2:
            kept.append({key: value.double().numpy() for key, value in before.items()})
    assert averager.snapshots == len(kept) == 13
    averager.load(llama)
    for key, value in _weights(llama).items():
        expected = np.stack([snapshot[key] for snapshot in kept]).mean(0)
        # The nearest float32 number, or either of two that are equally near.
        assert (
            np.abs(value.double().numpy() - expected)
            <= 0.5000001 * np.spacing(np.abs(value.numpy()))
        ).all()


def test_the_published_schedule_averages_six_snapshots() -> None:
    averager, model = Averager(100, 5), nn.Linear(2, 1)
    for step in range(1, 126):
        with torch.no_grad():
            model.weight.fill_(step)
        averager.update(model)
    averager.load(model)
    assert averager.snapshots == 6
    assert model.weight.tolist() == [[112.5, 112.5]]  # the mean of 100, 105, ..., 125


def test_weights_that_stay_are_averaged_bit_by_bit_and_frozen_ones_are_left_alone(
    llama: PreTrainedModel,
) -> None:
    model, averager = llama.bfloat16(), Averager(1, 1)
    model.get_parameter("lm_head.weight").requires_grad_(False)
    before = _weights(model)
    for _ in range(7):
        averager.update(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    moved = _weights(model)
    averager.load(model)
    after = _weights(model)
    assert _same({**after, "lm_head.weight": before["lm_head.weight"]}, before)
    assert torch.equal(after["lm_head.weight"], moved["lm_head.weight"])


def test_a_snapshot_is_a_copy(llama: PreTrainedModel) -> None:
    model, averager = llama.double(), Averager(1, 10)
    before = _weights(model)
    averager.update(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    averager.load(model)
    assert _same(_weights(model), before)


def test_averages_of_nothing_are_named(llama: PreTrainedModel) -> None:
    averager = Averager(5, 1)
    for _ in range(4):
        averager.update(llama)
    with pytest.raises(WorkbenchError, match="no weights were averaged in 4 steps"):
        averager.load(llama)
    for start, every, word in ((0, 1, "start"), (1, 0, "every")):
        with pytest.raises(WorkbenchError, match=word):
            Averager(start, every)
    with pytest.raises(WorkbenchError, match="no trainable parameter"):
        Averager(1, 1).update(copy.deepcopy(llama).requires_grad_(False))
    averager.update(llama)
    with pytest.raises(WorkbenchError, match="trainable parameters are not those"):
        llama.get_parameter("lm_head.weight").requires_grad_(False)
        averager.update(llama)
