"""Run a recipe: from a starting model to a float32 delta."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import Batch, batches, encode, endless
from workbench.data.records import Example, Texts, examples_of
from workbench.errors import WorkbenchError
from workbench.progress import ProgressCallback, quiet
from workbench.subspaces.collapse import Collapse, find_collapse, only_tokens
from workbench.subspaces.collapsed_update import collapse_of
from workbench.unlearning.deltas import apply_delta, delta_between, snapshot
from workbench.unlearning.objectives import Pair, on_set, reference_nll, retain_cross_entropy
from workbench.unlearning.one_gradient import Unlearned, one_gradient
from workbench.unlearning.recipe import Recipe
from workbench.unlearning.smoothing import Averager

CHECK_EVERY = 5
"""Steps between two looks at the price of a model whose training stops at the budget."""


@contextmanager
def only_trainable(
    model: PreTrainedModel, patterns: Sequence[str]
) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    """Make exactly the parameters that match ``patterns`` trainable, for the duration of the block;
    yields them.

    Raises:
        WorkbenchError: a pattern matches no parameter.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for pattern in patterns:
        if not fnmatch.filter(flags, pattern):
            raise WorkbenchError(
                f"no parameter matches {pattern!r}; the first of this model are "
                f"{', '.join(list(flags)[:3])}"
            )
    trainable = []
    for name, parameter in model.named_parameters():
        matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(matches)
        if matches:
            trainable.append((name, parameter))
    try:
        yield trainable
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None


def unlearn(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    forget: Texts,
    retain: Texts,
    *,
    seed: int,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    over_budget: Callable[[PreTrainedModel], bool] | None = None,
    progress: ProgressCallback = quiet,
) -> Unlearned:
    """Run ``recipe`` on a copy of ``base``; ``base`` itself is the frozen reference and is not
    changed.

    Args:
        base: the starting model.
        tokenizer: its tokenizer.
        recipe: see :class:`Recipe`.
        forget: texts to forget.
        retain: texts to keep.
        seed: order of the texts.
        max_length: texts are cut to this many tokens.
        dtype: of the weights while they are trained. In bfloat16 most of a small step is rounded
            away, which is an effect of its own: float32 unless that is the question.
        over_budget: whether the model in training costs more than the budget; where the recipe
            stops there. The change that is returned is the first one over it.
        progress: called after every step.

    Raises:
        WorkbenchError: a set is empty, the recipe stops at a budget and none was given, or the
            objective is not finite (the message names the step).
    """
    forget, retain = examples_of(forget), examples_of(retain)
    for name, texts in (("forget", forget), ("retain", retain)):
        if not texts:
            raise WorkbenchError(f"the {name} set is empty; give at least one text")
    if getattr(base, "peft_config", None):
        raise WorkbenchError(
            "the model carries PEFT adapters: it is not clear whether they or the weights under "
            "them are to change; merge them first (model.merge_and_unload())"
        )
    if recipe.stop == "budget" and over_budget is None:
        raise WorkbenchError("stop=budget needs a disruption budget; give one, or take stop=steps")
    mode = base.training
    try:
        return _unlearn(
            base.eval(),
            tokenizer,
            recipe,
            forget,
            retain,
            seed,
            max_length,
            dtype,
            over_budget if recipe.stop == "budget" else None,
            progress,
        )
    finally:
        base.train(mode)


def _unlearn(
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    forget: Sequence[Example],
    retain: Sequence[Example],
    seed: int,
    max_length: int | None,
    dtype: torch.dtype,
    over_budget: Callable[[PreTrainedModel], bool] | None,
    progress: ProgressCallback,
) -> Unlearned:
    if recipe.teacher is not None:
        teacher = copy.deepcopy(reference).float()
        learned = unlearn(
            reference,
            tokenizer,
            recipe.teacher.recipe,
            forget,
            retain,
            seed=seed,
            max_length=max_length,
            progress=progress,
        )
        apply_delta(teacher, snapshot(reference), learned.delta, 1.0)
        recipe = replace(
            recipe,
            objective=recipe.teacher.objective(teacher.eval().requires_grad_(False)),
            teacher=None,
        )
    for term in (recipe.objective.forget, recipe.objective.retain, recipe.step):
        getattr(term, "restart", lambda: None)()  # what a term draws or measures once per training
    model = copy.deepcopy(reference).to(dtype)
    start = snapshot(model)
    # dropout would make the collapse statistics and the reference disagree with the step
    model.eval()
    with only_trainable(model, recipe.trainable) as trained:
        if recipe.optimiser == "one-gradient":
            result = one_gradient(
                model,
                reference,
                recipe,
                tokenizer,
                forget,
                retain,
                trained,
                max_length=max_length,
                progress=progress,
            )
            delta, log = result.delta, result.log
        else:
            if recipe.initial_noise:
                _add_initial_noise(trained, recipe.initial_noise, seed)
            log = _steps(
                model,
                reference,
                recipe,
                tokenizer,
                forget,
                retain,
                trained,
                seed,
                max_length,
                over_budget,
                progress,
            )
            delta = delta_between(model, start)
    if recipe.sign != 1:
        delta = {name: recipe.sign * change for name, change in delta.items()}
    return _check_changed(Unlearned(delta, log, tuple(name for name, _ in trained)), recipe)


def _check_changed(result: Unlearned, recipe: Recipe) -> Unlearned:
    """``result``, unless it changed other parameters than it was to train, or none.

    Raises:
        WorkbenchError: it did.
    """
    others = sorted(set(result.delta) - set(result.trained))
    if others:
        raise WorkbenchError(f"{others[0]} changed, and {', '.join(recipe.trainable)} was to train")
    if not result.delta and recipe.lr and recipe.steps:
        raise WorkbenchError(
            f"none of the {len(result.trained)} parameters that were to train changed (the first "
            f"is {result.trained[0]}): the objective does not depend on them, or lr "
            f"({recipe.lr:g}) is below their rounding"
        )
    return result


@torch.no_grad()
def _add_initial_noise(
    trained: Sequence[tuple[str, torch.nn.Parameter]], size: float, seed: int
) -> None:
    """Move every parameter by Gaussian noise of ``size`` times its own root mean square."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in trained:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.add_(
            (noise * size * parameter.float().square().mean().sqrt()).to(parameter.dtype)
        )


def _steps(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    retain: Sequence[Example],
    trained: Sequence[tuple[str, torch.nn.Parameter]],
    seed: int,
    max_length: int | None,
    over_budget: Callable[[PreTrainedModel], bool] | None,
    progress: ProgressCallback,
) -> tuple[dict[str, float], ...]:
    forget_stream, retain_stream = (
        endless(forget, recipe.batch_size, f"forget-{seed}"),
        endless(retain, recipe.batch_size, f"retain-{seed}"),
    )
    parameters = [parameter for _, parameter in trained]
    clip = 1.0 if recipe.optimiser == "adamw" else math.inf
    optimiser: torch.optim.Optimizer | None = None
    if recipe.optimiser == "adamw":
        optimiser = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    elif recipe.optimiser == "sgd":
        optimiser = torch.optim.SGD(parameters, lr=recipe.lr)
    average = (
        None
        if recipe.average is None
        else Averager(
            max(1, math.ceil(recipe.average.start * recipe.steps - 1e-9)), recipe.average.every
        )
    )
    collapse: dict[str, Collapse] = {}
    sets: list[Batch] = []
    needs_before = getattr(recipe.objective.forget, "needs_before", False)
    before: dict[Example, Tensor] = {}  # of every text that was drawn, for the epochs to come
    log: list[dict[str, float]] = []
    for number in range(recipe.steps):
        texts = next(forget_stream)
        batch = encode(tokenizer, texts, max_length=max_length, targets="answer")
        if needs_before:
            if not before.keys() >= set(texts):
                found = reference_nll(reference, batch.to(reference.device))
                before.update(zip(texts, found, strict=True))
            batch = replace(batch, before=torch.stack([before[text] for text in texts]))
        if recipe.alternative is not None:
            batch = replace(
                batch,
                alternative=encode(
                    tokenizer,
                    [recipe.alternative(text) for text in texts],
                    max_length=max_length,
                    targets="answer",
                ),
            )
        pair = Pair(
            batch.to(model.device),
            encode(tokenizer, next(retain_stream), max_length=max_length).to(model.device),
        )
        objective = recipe.objective
        if recipe.schedule is not None:
            forget_factor, retain_factor = recipe.schedule(number, recipe.steps)
            objective = replace(
                objective,
                forget_weight=objective.forget_weight * forget_factor,
                retain_weight=objective.retain_weight * retain_factor,
            )
        if optimiser is not None:
            record = recipe.step(model, objective, pair, reference)
        else:
            if recipe.collapse is not None and number % recipe.collapse.refresh == 0:
                sets = sets or _sets(reference, recipe, tokenizer, forget, retain, max_length)
                collapse = _statistics(model, reference, recipe, sets)
            record = _collapsed_step(
                model, reference, replace(recipe, objective=objective), pair, trained, collapse
            )
        if not all(math.isfinite(value) for value in record.values()):
            raise WorkbenchError(
                f"the unlearning objective is not finite at step {number + 1} of {recipe.steps} "
                f"({record}); lower lr (now {recipe.lr})"
            )
        if optimiser is not None:
            length = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
            if not math.isfinite(length):
                raise WorkbenchError(
                    f"the gradient of the unlearning objective is not finite at step {number + 1} "
                    f"of {recipe.steps}; lower lr (now {recipe.lr})"
                )
            optimiser.step()
            optimiser.zero_grad()
            if average is not None:
                average.update(model)
        log.append(record)
        progress(number + 1, recipe.steps)
        if over_budget is not None and (number + 1) % CHECK_EVERY == 0 and over_budget(model):
            progress(recipe.steps, recipe.steps)
            break
    if average is not None:
        average.load(model)
    return tuple(log)


def _modules(recipe_parameters: Sequence[tuple[str, Tensor]]) -> list[str]:
    """The modules whose output gradients are all that reaches these weights: the layer itself; for
    experts in one tensor, whose rows are sorted by expert, the block around them.
    """
    names = (name.partition(".experts.")[0] for name, _ in recipe_parameters)
    return list(dict.fromkeys(name.removesuffix(".weight") for name in names))


def _sets(
    reference: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    retain: Sequence[Example],
    max_length: int | None,
) -> list[Batch]:
    """The texts that the bases to collapse are found on."""
    assert recipe.collapse is not None
    on_forget = recipe.collapse.statistics == "forget"
    texts, targets = (forget, "answer") if on_forget else (retain, "text")
    sets = [
        batch.to(reference.device)
        for batch in batches(
            tokenizer,
            texts,
            recipe.batch_size,
            max_length=max_length,
            targets=targets,  # type: ignore[arg-type]
        )
    ]
    if on_forget and getattr(recipe.objective.forget, "needs_before", False):
        sets = [replace(batch, before=reference_nll(reference, batch)) for batch in sets]
    return sets


def _statistics(
    model: PreTrainedModel, reference: PreTrainedModel, recipe: Recipe, sets: Sequence[Batch]
) -> dict[str, Collapse]:
    """A pass over ``sets`` that finds the bases to collapse at the current weights."""
    settings = recipe.collapse
    assert settings is not None
    modules = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    term = recipe.objective.forget if settings.statistics == "forget" else retain_cross_entropy
    return find_collapse(
        model,
        modules,
        on_set(term, model, reference, sets),
        sets,
        activation_components=settings.activation_components,
        gradient_components=settings.gradient_components,
        kind=settings.kind,
    )


def _collapsed_step(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    recipe: Recipe,
    pair: Pair,
    trained: Sequence[tuple[str, torch.nn.Parameter]],
    collapse: dict[str, Collapse],
) -> dict[str, float]:
    """One forget step of global length ``recipe.lr`` along the (collapsed) gradient, then one plain
    SGD retain step.
    """
    with only_tokens(model, _modules(trained), pair.forget.content_mask):
        forget = recipe.objective.forget_term(model, pair, reference)
        forget.backward()
    with torch.no_grad():
        updates = []
        for name, parameter in trained:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            layer = model.get_submodule(name.rpartition(".")[0])
            updates.append(
                collapse_of(layer, collapse[name], gradient, name) if name in collapse else gradient
            )
        length = sum(float(update.double().square().sum()) for update in updates) ** 0.5
        if length > 0:  # zero once every output is broken: nothing is left to do
            for (_, parameter), update in zip(trained, updates, strict=True):
                parameter.sub_(update, alpha=recipe.lr / length)
        for _, parameter in trained:
            parameter.grad = None
    retain = recipe.objective.retain_term(model, pair, reference)
    if retain is not None and recipe.retain_rate:
        retain.backward()
        with torch.no_grad():
            for _, parameter in trained:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=recipe.retain_rate)
                    parameter.grad = None
    return {
        "forget": float(forget.detach()),
        "retain": float(retain.detach()) if retain is not None else 0.0,
        "gradient_norm": length,
    }
