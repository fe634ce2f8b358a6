"""A filter is the weights between one unit and the residual stream, in every family."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CONFIGS, build
from torch import nn
from transformers.pytorch_utils import Conv1D

from workbench.sharpness.slices import random_direction, stream_axes

KINDS = [kind for kind in CONFIGS if kind != "gemma3"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_filter_of_a_direction_has_the_norm_of_the_weights(kind: str) -> None:
    model = build(kind)
    axes, direction = stream_axes(model), random_direction(model, 0)
    assert set(direction) == {
        name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias")
    }
    for name, part in direction.items():
        weights = model.get_parameter(name).detach()
        ratio = part.norm(dim=axes[name]) / weights.norm(dim=axes[name])
        assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_axis_is_that_of_the_stream(kind: str) -> None:
    """By hand: the matrices of attention and MLP that return to the stream, and all others."""
    model = build(kind)
    width = model.config.get_text_config().hidden_size
    back = (
        "o_proj",
        "down_proj",
        "c_proj",
        "dense_4h_to_h",
        "fc2",
        "attention.dense",
        "self_attn.dense",
    )
    for name, axis in stream_axes(model).items():
        parameter = model.get_parameter(name)
        if "router" in name or ".mlp.gate.weight" in name or "wpe" in name:
            assert axis == 1
            continue
        # the entries of one filter are the coordinates of the stream
        assert parameter.shape[axis] == width, name
        if parameter.ndim == 2:
            layer = model.get_submodule(name.rpartition(".")[0])
            writes = name.removesuffix(".weight").endswith(back)
            assert isinstance(layer, nn.Linear | nn.Embedding | Conv1D)
            assert axis == (0 if writes != isinstance(layer, Conv1D) else 1), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "gpt_neox"])
def test_a_hidden_unit_that_is_scaled_keeps_its_filters(kind: str) -> None:
    """Twice the weights out of one hidden unit, and its filter of a direction is twice as long: no
    other filter of that matrix changes.
    """
    model = build(kind)
    name = {
        "llama": "model.layers.0.mlp.down_proj",
        "gpt2": "transformer.h.0.mlp.c_proj",
        "phi": "model.layers.0.mlp.fc2",
        "gpt_neox": "gpt_neox.layers.0.mlp.dense_4h_to_h",
    }[kind]
    layer = model.get_submodule(name)
    before = random_direction(model, 0)[f"{name}.weight"]
    with torch.no_grad():
        out_of_unit = layer.weight[3] if isinstance(layer, Conv1D) else layer.weight[:, 3]
        out_of_unit.mul_(2)
    after = random_direction(model, 0)[f"{name}.weight"]
    change = (after / before).T if isinstance(layer, Conv1D) else after / before
    expected = torch.ones_like(change)
    expected[:, 3] = 2
    assert torch.allclose(change, expected, atol=1e-4)
