"""Relearning: fine-tune an unlearned model on attack texts and watch whether other forgotten facts
come back (Hu et al., arXiv 2406.13356).
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench import values
from workbench.data.batches import encode, endless
from workbench.data.records import Example, Texts, examples_of
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import Scores, cross_entropy
from workbench.progress import ProgressCallback, quiet


class DivergedError(WorkbenchError):
    """The attack's loss is not finite. What was measured before is kept by whoever measured it.

    Attributes:
        step: the first step that could not be taken.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[type[DivergedError], tuple[str, int]]:
        return type(self), (str(self), self.step)  # worker processes hand their errors over pickled


@dataclass(frozen=True, slots=True)
class RelearnSettings:
    """The attacker's fine-tuning: by default every parameter, AdamW without weight decay, constant
    rate, float32 weights.

    Attributes:
        steps: optimiser steps.
        lr: learning rate.
        batch_size: sequences per step.
        measure_at: steps after which the attacked model is measured; 0 is before the attack.
        optimiser: ``adamw``, or ``sgd`` without momentum (which needs a far larger rate).
        lora_rank: rank of LoRA adapters on every linear module but the head, the only parameters
            then trained; 0 trains the model's own parameters.
        precision: of the attacked weights. In bfloat16 most of a small step is rounded away:
            resistance that is none.
        texts: the attacker has the first so many texts; 0 means all.
    """

    steps: int = 40
    lr: float = 5e-4
    batch_size: int = 16
    measure_at: tuple[int, ...] = (0, 2, 5, 10, 20, 40)
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lora_rank: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    texts: int = 0

    def __post_init__(self) -> None:
        values.steps("steps of an attack", self.steps)
        values.rows("batch_size of an attack", self.batch_size)
        values.rate("lr of an attack", self.lr)
        values.whole("lora_rank of an attack", self.lora_rank)
        values.whole("texts of an attack", self.texts)
        for name, allowed in (
            ("optimiser", ("adamw", "sgd")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} of an attack is {getattr(self, name)!r}; choose {' or '.join(allowed)}"
                )


def at_steps(steps: int, lr: float) -> RelearnSettings:
    """An attack of ``steps`` steps, measured before it, at a handful of steps that double, and at
    its end.
    """
    doubling = [step for step in (2, 5, 10, 20, 40, 80, 160, 320, 640) if step < steps]
    return RelearnSettings(steps=steps, lr=lr, measure_at=(0, *doubling, steps))


def relearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    settings: RelearnSettings | None = None,
    *,
    seed: int = 0,
    max_length: int | None = None,
    progress: ProgressCallback = quiet,
) -> Iterator[tuple[int, PreTrainedModel]]:
    """Attack a copy of ``model`` step by step; the model itself is not changed.

    Args:
        model: what is attacked.
        tokenizer: its tokenizer.
        texts: the attack texts.
        settings: see :class:`RelearnSettings`.
        seed: order of the texts and first weights of adapters; the same seed gives every model the
            same batches.
        max_length: texts are cut to this many tokens.
        progress: called after every step.

    Yields:
        ``step, attacked`` at ``settings.measure_at``. It is one model that goes on being trained:
        measure it before asking for the next. Under LoRA it carries its adapters.

    Raises:
        WorkbenchError: there is no text.
        DivergedError: the loss is not finite; what was yielded before is as it should be.

    Example:
        >>> for step, attacked in relearn(model, tokenizer, texts):  # doctest: +SKIP
        ...     print(step, score(attacked, queries).recall)
    """
    attack, texts = settings or RelearnSettings(), examples_of(texts)
    for step, attacked in _steps(model, tokenizer, texts, attack, seed, max_length, progress):
        if step in attack.measure_at:
            yield step, attacked


def relearned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    settings: RelearnSettings | None = None,
    *,
    seed: int = 0,
    max_length: int | None = None,
    progress: ProgressCallback = quiet,
) -> PreTrainedModel:
    """The model at the end of the attack; adapters are merged into its weights. See
    :func:`relearn`.
    """
    chosen, texts = settings or RelearnSettings(), examples_of(texts)
    for _, attacked in _steps(model, tokenizer, texts, chosen, seed, max_length, progress):
        model = attacked
    return model.merge_and_unload() if chosen.lora_rank else model  # type: ignore[operator,no-any-return]


def _steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Example],
    settings: RelearnSettings,
    seed: int,
    max_length: int | None,
    progress: ProgressCallback,
) -> Iterator[tuple[int, PreTrainedModel]]:
    """The attacked model before the first and after every step."""
    attacked, parameters = attackable(model, settings, seed=seed)
    optimiser = (
        torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
        if settings.optimiser == "adamw"
        else torch.optim.SGD(parameters, lr=settings.lr)
    )
    stream = endless(
        texts[: settings.texts] if settings.texts else texts, settings.batch_size, f"relearn-{seed}"
    )
    yield 0, attacked
    for step in range(1, settings.steps + 1):
        batch = encode(tokenizer, next(stream), max_length=max_length).to(attacked.device)
        loss = cross_entropy(attacked, batch, whole=False)
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the attack's loss is {loss.item()} at step {step} of {settings.steps}; lower its "
                f"lr (now {settings.lr})",
                step,
            )
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        progress(step, settings.steps)
        yield step, attacked


def raise_if_diverged(scores: Scores, step: int) -> Scores:
    """``scores`` of an attacked model, if they are numbers.

    Raises:
        DivergedError: a loss is not finite: the attack broke the model at ``step``, where its own
            loss was still a number.
    """
    if not np.isfinite(scores.nll).all():
        raise DivergedError(
            f"the attacked model's loss is not finite after step {step}; lower the attack's lr",
            step + 1,
        )
    return scores


def attackable(
    model: PreTrainedModel, settings: RelearnSettings, *, seed: int = 0
) -> tuple[PreTrainedModel, list[torch.nn.Parameter]]:
    """A copy of ``model`` in the attacker's precision, and exactly the parameters that the attack
    trains.

    Args:
        model: what is to be attacked; not changed.
        settings: full parameters or LoRA.
        seed: of the adapters' first weights.
    """
    attacked = copy.deepcopy(model).to(getattr(torch, settings.precision)).eval()
    if settings.lora_rank:
        from peft import LoraConfig, get_peft_model  # heavy, and seldom needed

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # peft asks transformers in a way that is going out of use
            torch.manual_seed(seed)
            lora_config = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=2 * settings.lora_rank,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            attacked = get_peft_model(attacked, lora_config).eval()  # type: ignore[assignment]
        return attacked, [
            parameter for parameter in attacked.parameters() if parameter.requires_grad
        ]
    for parameter in attacked.parameters():
        parameter.requires_grad_(True)
    return attacked, list(attacked.parameters())


def random_facts(texts: Texts, *, seed: int) -> tuple[Example, ...]:
    """The attack texts with one another's answers: matched in words, style and length, and true
    nowhere.

    What relearning on them wins back comes from practising such texts, not from the facts in them;
    how fast they are learned themselves tells a model that learns slowly from one that has
    forgotten. Facts, not texts, exchange their answers, so that paraphrases of one fact still
    agree.

    Args:
        texts: the real attack texts, with answers.
        seed: who gets whose answer.

    Raises:
        WorkbenchError: a text has no answer, or all have the same.
    """
    texts, answers = examples_of(texts), dict[str, str]()
    for number, text in enumerate(texts):
        if text.answer is None:
            raise WorkbenchError(
                f"random facts are made by exchanging answers, and attack text {number + 1} has "
                f"none: {text.text[:60]!r}"
            )
        answers.setdefault(text.item, text.answer_text)
    if len(set(answers.values())) < 2:
        raise WorkbenchError(
            f"random facts are made by exchanging answers, and all {len(texts)} attack texts have "
            "the same one"
        )
    order = sorted(answers)
    random.Random(f"random-facts-{seed}").shuffle(order)
    new_answers = {}
    for place, item in enumerate(order):
        new_answers[item] = next(
            answers[other]
            for other in order[place + 1 :] + order[:place]
            if answers[other] != answers[item]
        )
    new_examples = []
    for text in texts:
        assert text.answer is not None
        start, end = text.answer
        answer = new_answers[text.item]
        subject = text.subject if text.subject and text.subject[1] <= start else None
        new_examples.append(
            Example(
                text.text[:start] + answer + text.text[end:],
                (start, start + len(answer)),
                subject,
                f"random/{text.item}",
            )
        )
    return tuple(new_examples)


def null_text(texts: Texts, pool: Texts, length: Callable[[Example], int]) -> tuple[Example, ...]:
    """Texts from ``pool`` with as many tokens in all as ``texts``: the null attack, which holds
    nothing of the forget set.

    Args:
        texts: the real attack texts.
        pool: texts that have nothing to do with the forget set.
        length: tokens of a text.

    Raises:
        WorkbenchError: the pool is empty.
    """
    pool = [example for example in examples_of(pool) if length(example) > 0]
    if not pool:
        raise WorkbenchError("the null attack needs at least one general text")
    wanted_tokens = sum(map(length, examples_of(texts)))
    chosen_texts: list[Example] = []
    total, index = 0, 0
    while total < wanted_tokens:
        example = pool[index % len(pool)]
        chosen_texts.append(example)
        total += length(example)
        index += 1
    return tuple(chosen_texts)
