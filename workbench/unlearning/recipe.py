"""A method as a value: the objective, what may change, how a gradient becomes a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from transformers import PreTrainedModel

from workbench.data.records import Example
from workbench.errors import WorkbenchError
from workbench.hooks import resolve
from workbench.hooks.brief import brief
from workbench.subspaces.collapse import CollapseKind
from workbench.unlearning.objectives import Objective
from workbench.unlearning.smoothing import StepRule, plain
from workbench.values import LARGEST_RATE, MOST_ROWS, Number, Whole

StatisticsSet = Literal["forget", "retain"]


@dataclass(frozen=True, slots=True)
class CollapseSettings:
    """How the collapsed update finds its bases.

    Attributes:
        activation_components: directions of the inputs to leave alone, the mean direction among
            them.
        gradient_components: directions of the output gradients to leave alone, likewise.
        refresh: the bases are found again after this many steps.
        kind: hard, soft or quadratic (:func:`workbench.subspaces.collapse.removed_shares`).
        statistics: the set whose activations and gradients give the bases. On the retain set the
            gradients are those of its cross-entropy.
    """

    activation_components: int
    gradient_components: int
    refresh: int
    kind: CollapseKind = "hard"
    statistics: StatisticsSet = "forget"


@brief
@dataclass(frozen=True, slots=True)
class OneGradient:
    """A single filtered gradient instead of steps (RepSelect, arXiv 2606.17168, single-shot form).

    Attributes:
        components: singular directions of the statistics' gradient that are collapsed, on both
            sides.
        kind: see :class:`CollapseSettings`.
        statistics: ``forget``: the directions are those of the forget gradient itself; ``retain``:
            those of the retain set's gradient at the starting weights.
        adversary_rank: rank of the low-rank adversary that first learns the forget set further; 0
            leaves it out.
        adversary_rate: its SGD rate, over one epoch.
    """

    components: int
    kind: CollapseKind = "soft"
    statistics: StatisticsSet = "forget"
    adversary_rank: int = 0
    adversary_rate: float = 0.0


@brief
@dataclass(frozen=True, slots=True)
class Teacher:
    """A model trained before, for objectives that need one.

    Attributes:
        recipe: how the teacher is trained, from the same start.
        objective: the objective, given the teacher.
    """

    recipe: Recipe
    objective: Callable[[PreTrainedModel], Objective]


Optimiser = Literal["adamw", "sgd", "normalised-sgd", "one-gradient"]
Stop = Literal["steps", "budget"]


@dataclass(frozen=True, slots=True)
class Averaging:
    """Weight averaging over the end of a training (Izmailov et al. 2018, arXiv 1803.05407): the
    mean of the weights after every ``every``-th step from ``start`` on.

    Attributes:
        start: share of the steps after which averaging begins, below 1.
        every: steps between two snapshots.
    """

    start: float
    every: int


@brief
@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the trainer needs.

    Attributes:
        objective: forget and retain terms.
        trainable: patterns of parameter names that may change.
        steps: optimiser steps.
        batch_size: sequences per forget batch, and per retain batch.
        optimiser: ``adamw`` on the whole objective (gradient clipped to norm 1, no weight decay);
            ``sgd`` on it, without momentum and unclipped; ``normalised-sgd``: the forget gradient
            is scaled to global Frobenius length ``lr``, followed by a plain SGD step of rate
            ``retain_rate`` on the retain term; ``one-gradient``: see :class:`OneGradient`, ``lr``
            is the length of the whole change.
        lr: learning rate, or length.
        step: plain, or a smoothing rule (adamw and sgd).
        average: the trained weights are a mean over the last steps; default the last weights.
        collapse: collapse the forget gradient (normalised-sgd only); ``None`` leaves it whole.
        retain_rate: see ``optimiser``.
        schedule: factors of the forget and the retain term at a step, ``(step, steps) -> (forget,
            retain)``; constant by default.
        alternative: makes the other answer of a forget text, for objectives that compare two.
        sign: -1 turns what was learned around (task-vector negation).
        initial_noise: the trained weights start at a random relative distance of this size from the
            base, where the base itself is a stationary point of the objective.
        one: settings of ``one-gradient``.
        teacher: replaces ``objective`` by one that knows a teacher.
        stop: ``steps``: all of them are taken, and the change is scaled to the budget afterwards;
            ``budget``: training ends once the model costs more than the budget (as CIR's released
            code does), looked at every :data:`workbench.unlearning.trainer.CHECK_EVERY` steps.
    """

    objective: Objective
    trainable: tuple[str, ...]
    steps: int
    batch_size: int
    lr: float
    optimiser: Optimiser = "adamw"
    step: StepRule = plain
    average: Averaging | None = None
    collapse: CollapseSettings | None = None
    retain_rate: float = 0.0
    schedule: Callable[[int, int], tuple[float, float]] | None = None
    alternative: Callable[[Example], Example] | None = None
    sign: float = 1.0
    initial_noise: float = 0.0
    one: OneGradient | None = None
    teacher: Teacher | None = None
    stop: Stop = "steps"


Setting = int | float | str
"""The value of one setting of a method."""

Steps = Annotated[int, Whole(1)]
Rows = Annotated[int, Whole(1, MOST_ROWS)]
Count = Annotated[int, Whole(1)]
Layer = Annotated[int, Whole(-1)]
"""A block; -1 leaves the choice to the method."""
Rate = Annotated[float, Number(high=LARGEST_RATE)]
Descent = Literal["adamw", "sgd"]
"""Optimisers of a whole objective's gradient."""

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
        small: settings for models below 100 million parameters, where the published rates move
            nothing. Chosen on worlds that the published numbers do not use.
        wraps: the builder whose settings this method shares.
        fixed: settings of that builder that make this method what it is, and cannot be changed.
        inner: the method inside a wrapper (:mod:`workbench.unlearning.wrappers`), whose settings
            come first.
        changed: defaults that this method has in the place of the inner one's.
        colour: in every figure, ``#RRGGBB``; one that no other method has is chosen where none is
            given.
    """

    name: str
    title: str
    source: str
    build: MethodBuilder
    small: dict[str, Setting]
    wraps: MethodBuilder | None = None
    fixed: Mapping[str, Setting] = field(default_factory=dict)
    inner: Method | None = None
    changed: Mapping[str, Setting] = field(default_factory=dict)
    colour: str = ""


EVERYTHING = ("*",)


def mlp_weights(model: PreTrainedModel, first: int, last: int) -> tuple[str, ...]:
    """Names of the weights of all MLP matrices of blocks ``first`` to ``last``, in any family with
    TransformerLens names. In a mixture of experts these are the experts, ``[experts d_out d_in]``
    or ``[experts d_in d_out]`` in one tensor, and never the router.

    Raises:
        CaptureError: the family is unknown, or has no such matrices.
    """
    return _matrices(model, first, last, "*")


def down_projections(model: PreTrainedModel, first: int, last: int) -> tuple[str, ...]:
    """Names of the last matrix of the MLPs of blocks ``first`` to ``last``; see
    :func:`mlp_weights`.
    """
    return _matrices(model, first, last, "out")


def _matrices(model: PreTrainedModel, first: int, last: int, which: str) -> tuple[str, ...]:
    fused = fused_experts(model)
    if fused:
        block_paths = {f".{block}." for block in range(first, last + 1)}
        return tuple(
            name
            for name in fused
            if any(block in name for block in block_paths) and (which == "*" or "down_proj" in name)
        )
    sites = resolve(model, f"blocks.{{{first}..{last}}}.mlp.{which}.hook_out")
    return tuple(dict.fromkeys(f"{site.path}.weight" for site in sites))


def fused_experts(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the tensors that hold the matrices of many experts, ``[experts . .]``."""
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.ndim == 3
    )


def refuse_experts(model: PreTrainedModel, what: str) -> None:
    """Raise where the MLPs are experts fused into one tensor.

    Raises:
        WorkbenchError: they are; the message names the first.
    """
    fused = fused_experts(model)
    if fused:
        shape = list(model.get_parameter(fused[0]).shape)
        raise WorkbenchError(
            f"{what} needs the inputs and outputs of one matrix at a time, and {fused[0]} holds "
            f"those of {shape[0]} experts in one tensor {shape}; take a method without collapse, "
            "or repselect, which goes expert by expert"
        )


def stopped_at_budget(recipe: Recipe) -> Recipe:
    """The same recipe, ending where the budget is reached.

    Raises:
        ValueError: the weights during its training are not those that will be measured: a single
            gradient, an average, or a change that is turned round.
    """
    for there, what in (
        (recipe.optimiser == "one-gradient", "takes a single gradient"),
        (recipe.average is not None, "averages its weights at the end"),
        (recipe.sign != 1, "turns its change round at the end"),
    ):
        if there:
            raise ValueError(
                f"this method {what}, so it cannot stop at the budget; take stop=steps"
            )
    return replace(recipe, stop="budget")


def gradient_optimiser(name: str) -> Optimiser:
    """The optimiser of a whole objective's gradient called ``name``.

    Raises:
        ValueError: it is neither ``adamw`` nor ``sgd``.
    """
    if name not in ("adamw", "sgd"):
        raise ValueError(f"optimiser is {name!r}; it must be 'adamw' or 'sgd'")
    return name  # type: ignore[return-value]


def middle_layer(model: PreTrainedModel) -> int:
    """The block whose output representation methods steer by default: 7 of 32 in the published
    runs; the same depth, at least 1, elsewhere.
    """
    return max(1, round(model.config.num_hidden_layers * 7 / 32))
