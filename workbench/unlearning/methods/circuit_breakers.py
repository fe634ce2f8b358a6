"""Circuit breakers: representation rerouting."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.hooks import resolve
from workbench.unlearning.objectives import Objective
from workbench.unlearning.recipe import (
    Count,
    Layer,
    Method,
    Rate,
    Recipe,
    Rows,
    Steps,
    mlp_weights,
)
from workbench.unlearning.representation import break_circuits, keep_distance


def build(
    model: PreTrainedModel,
    seed: int,
    *,
    lr: Rate = 1e-4,
    steps: Steps = 150,
    batch_size: Rows = 16,
    strength: float = 10.0,
    horizon: Count = 300,
    first_layer: Layer = -1,
    last_layer: Layer = -1,
    initial_noise: float = 1e-3,
) -> Recipe:
    """``c_s ReLU(cos(h, h0))`` on the forget set and ``c_r ||h - h0||`` on the retain set, with
    ``c_s = a (1 - t / T)`` and ``c_r = a t / T``.

    The retain term keeps all hidden states, those of the embedding and of every block, as the
    reference does; its last one is read behind the final norm, ours before it, where the gain of
    that norm does not weigh the coordinates.

    The reference trains LoRA adapters (rank 16); here the MLP matrices up to the last broken block
    change, so that every method is a weight change of the same kind.

    Args:
        model: decides the depth.
        seed: unused; the method draws nothing.
        lr: AdamW's rate.
        steps: optimiser steps.
        batch_size: sequences.
        strength: ``a``.
        horizon: ``T``, twice the number of steps in the reference, so the forget weight never
            reaches zero.
        first_layer: first of two blocks whose output is rerouted; -1 takes the
            block behind hidden state 10 of 32.
        last_layer: the second; -1 takes that behind hidden state 20 of 32.
        initial_noise: relative size of a random start. At the base itself every cosine is 1, where
            its gradient is zero; the reference is moved away from there by the dropout of its
            adapters.
    """
    depth = model.config.num_hidden_layers
    # hidden_states[10] and [20] of the reference are what blocks 9 and 19 write
    first = _block(depth, 10) if first_layer < 0 else min(first_layer, depth - 1)
    last = max(first, _block(depth, 20)) if last_layer < 0 else min(last_layer, depth - 1)
    rerouted = resolve(
        model, [f"blocks.{layer}.hook_resid_post" for layer in dict.fromkeys((first, last))]
    )
    retained = resolve(model, ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"])
    objective = Objective(break_circuits(rerouted), keep_distance(retained), strength, strength)
    return Recipe(
        objective,
        mlp_weights(model, 0, last),
        steps,
        batch_size,
        lr,
        initial_noise=initial_noise,
        schedule=lambda step, _: (max(0.0, 1 - step / horizon), min(1.0, step / horizon)),
    )


def _block(depth: int, layer: int) -> int:
    """The block behind ``hidden_states[layer]`` of 32, at the same share of ``depth``."""
    return max(0, round(depth * layer / 32) - 1)


METHOD = Method(
    "circuit-breakers",
    "Circuit breakers",
    "Zou et al. 2024 (arXiv 2406.04313)",
    build,
    {"lr": 3e-3, "steps": 80, "batch_size": 16, "horizon": 1000, "initial_noise": 0.03},
    colour="#7B4173",
)
