"""Relearning: fine-tune an unlearned model on attack texts and watch whether other forgotten facts come back (Hu et al., arXiv 2406.13356)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import encode, endless
from workbench.data.records import Example
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.progress import Report, quiet


@dataclass(frozen=True, slots=True)
class RelearnSettings:
    """The attacker's fine-tuning: every parameter, AdamW without weight decay, constant rate, float32 weights.

    Attributes:
        steps: optimiser steps.
        lr: learning rate.
        batch_size: sequences per step.
        measure_at: steps after which the attacked model is measured; 0 is before the attack.
    """

    steps: int = 40
    lr: float = 5e-4
    batch_size: int = 16
    measure_at: tuple[int, ...] = (0, 2, 5, 10, 20, 40)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"an attack needs steps >= 1, batch_size >= 1 and a positive lr; got {self.steps}, {self.batch_size}, {self.lr}")


def at_steps(steps: int, lr: float) -> RelearnSettings:
    """An attack of ``steps`` steps, measured before it, at a handful of steps that double, and at its end."""
    doubling = [step for step in (2, 5, 10, 20, 40, 80, 160, 320, 640) if step < steps]
    return RelearnSettings(steps=steps, lr=lr, measure_at=(0, *doubling, steps))


def relearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Example],
    measure: Callable[[PreTrainedModel, int], None],
    settings: RelearnSettings,
    *,
    seed: int,
    max_length: int | None = None,
    progress: Report = quiet,
) -> PreTrainedModel:
    """Attack a float32 copy of ``model``; the model itself is not changed.

    Args:
        model: what is attacked.
        tokenizer: its tokenizer.
        texts: the attack texts.
        measure: called as ``measure(attacked model, step)`` at ``settings.measure_at``.
        settings: see :class:`RelearnSettings`.
        seed: order of the texts; the same seed gives every model the same batches.
        max_length: texts are cut to this many tokens.
        progress: called after every step.

    Returns:
        The attacked model.

    Raises:
        WorkbenchError: there is no text, or the loss is not finite.
    """
    attacked = copy.deepcopy(model).float().eval()
    for parameter in attacked.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(attacked.parameters(), lr=settings.lr, weight_decay=0.0)
    stream = endless(texts, settings.batch_size, f"relearn-{seed}")
    if 0 in settings.measure_at:
        measure(attacked, 0)
    for step in range(1, settings.steps + 1):
        loss = cross_entropy(attacked, encode(tokenizer, next(stream), max_length=max_length).to(attacked.device))
        if not math.isfinite(loss.item()):
            raise WorkbenchError(f"the attack's loss is {loss.item()} at step {step} of {settings.steps}; lower its lr (now {settings.lr})")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step in settings.measure_at:
            measure(attacked, step)
        progress(step, settings.steps)
    return attacked


def null_text(texts: Sequence[Example], pool: Sequence[Example], length: Callable[[Example], int]) -> tuple[Example, ...]:
    """Texts from ``pool`` with as many tokens in all as ``texts``: the null attack, which holds nothing of the forget set.

    Args:
        texts: the real attack texts.
        pool: texts that have nothing to do with the forget set.
        length: tokens of a text.

    Raises:
        WorkbenchError: the pool is empty.
    """
    pool = [example for example in pool if length(example) > 0]
    if not pool:
        raise WorkbenchError("the null attack needs at least one general text")
    wanted = sum(map(length, texts))
    chosen: list[Example] = []
    total, index = 0, 0
    while total < wanted:
        example = pool[index % len(pool)]
        chosen.append(example)
        total += length(example)
        index += 1
    return tuple(chosen)
