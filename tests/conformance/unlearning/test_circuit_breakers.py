"""Representation rerouting against transformers' own hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from workbench.unlearning.methods import recipe

DEPTH = 8  # rerouted: behind hidden states 2.5 and 5 of 8, so blocks 1 and 4


def _hidden(model: PreTrainedModel, batch: Any) -> list[Tensor]:
    """What the embedding and every block write: ``hidden_states``, with the last one taken before
    the final norm.
    """
    last: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    states = model(**batch.inputs, output_hidden_states=True).hidden_states
    handle.remove()
    return [*states[:-1], last[0]]


@pytest.fixture
def pair(make_model: Callable[..., PreTrainedModel]) -> tuple[PreTrainedModel, PreTrainedModel]:
    reference, model = (make_model(num_hidden_layers=DEPTH) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, reference


def test_it_keeps_every_hidden_state(pair: Any, make_batch: Callable[..., Any]) -> None:
    model, reference = pair
    batch = make_batch()
    objective = recipe("circuit-breakers", model, 0).objective
    assert objective.retain is not None
    mask = batch.attention_mask.bool()
    distances = [
        (mine[mask] - theirs[mask]).norm(dim=-1).mean()
        for mine, theirs in zip(_hidden(model, batch), _hidden(reference, batch), strict=True)
    ]
    assert len(distances) == DEPTH + 1
    expected = torch.stack(distances).mean()
    assert torch.allclose(objective.retain(model, batch, reference), expected, rtol=1e-4)


def test_it_reroutes_what_blocks_1_and_4_write(pair: Any, make_batch: Callable[..., Any]) -> None:
    model, reference = pair
    batch = make_batch()
    mine, theirs = _hidden(model, batch), _hidden(reference, batch)
    mask = batch.content_mask
    cosines = [
        F.cosine_similarity(mine[state][mask], theirs[state][mask], dim=-1).relu().mean()
        for state in (2, 5)
    ]
    found = recipe("circuit-breakers", model, 0).objective.forget(model, batch, reference)
    assert torch.allclose(found, torch.stack(cosines).mean(), rtol=1e-4)
