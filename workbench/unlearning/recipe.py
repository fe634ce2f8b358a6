"""A method as a value: the objective, what may change, how a gradient becomes a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from workbench.unlearning.objectives import Objective
from workbench.unlearning.smoothing import StepRule, plain


@dataclass(frozen=True, slots=True)
class CollapseSettings:
    """How the collapsed update finds its bases.

    Attributes:
        activation_components: directions of the inputs to leave alone, the mean direction among them.
        gradient_components: directions of the output gradients to leave alone, likewise.
        refresh: the bases are found again after this many steps.
    """

    activation_components: int
    gradient_components: int
    refresh: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the trainer needs.

    Attributes:
        objective: forget and retain terms.
        trainable: patterns of parameter names that may change.
        steps: optimiser steps.
        batch_size: sequences per forget batch, and per retain batch.
        optimiser: ``adamw`` on the whole objective (gradient clipped to norm 1, no weight decay), or ``normalised-sgd``: the forget gradient is scaled to global Frobenius length ``lr``, followed by a
            plain SGD step of rate ``retain_rate`` on the retain term.
        lr: learning rate, or step length.
        step: plain, or a smoothing rule (adamw only).
        collapse: collapse the forget gradient (normalised-sgd only); ``None`` leaves it whole.
        retain_rate: see ``optimiser``.
    """

    objective: Objective
    trainable: tuple[str, ...]
    steps: int
    batch_size: int
    lr: float
    optimiser: Literal["adamw", "normalised-sgd"] = "adamw"
    step: StepRule = plain
    collapse: CollapseSettings | None = None
    retain_rate: float = 0.0


Setting = float | str
"""The value of one setting of a method."""

MethodBuilder = Callable[..., Recipe]
"""``builder(model, seed, **settings) -> Recipe``; the keyword defaults are the published ones."""


@dataclass(frozen=True, slots=True)
class Method:
    """An entry of the registry.

    Attributes:
        name: identifier in commands, tables and file names.
        title: what figures and prose call it.
        source: paper.
        build: makes the recipe for a model.
        small: settings for models below 100 million parameters, where the published rates move nothing. Chosen on worlds that the published numbers do not use.
    """

    name: str
    title: str
    source: str
    build: MethodBuilder
    small: dict[str, Setting]


EVERYTHING = ("*",)


def middle_layer(model: PreTrainedModel) -> int:
    """The block whose output representation methods steer by default: 7 of 32 in the published runs; the same depth, at least 1, elsewhere."""
    return max(1, round(model.config.num_hidden_layers * 7 / 32))
