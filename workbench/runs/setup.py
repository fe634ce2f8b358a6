"""What the stages of an experiment share: the base with its tokenised texts, and what a change of
its weights costs on retain texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import Batch, batches
from workbench.data.records import Example, ForgetRetain, one_per_item
from workbench.data.world import World, speaker_tag
from workbench.diagnostics.triggers import PromptTemplate
from workbench.errors import WorkbenchError, unknown
from workbench.evaluation.losses import kl_by_text, next_token_logits, nll_by_text
from workbench.evaluation.statistics import Estimate, ratio
from workbench.hooks.brief import brief

ROWS = 128
"""Sequences per evaluation batch."""

DisruptionMeasure = Literal["kl", "loss-rise"]
"""Of disruption: mean ``KL(base || model)`` in nats per token, or the rise of the loss as a share
of the base's.
"""
DISRUPTION_MEASURES: tuple[DisruptionMeasure, ...] = get_args(DisruptionMeasure)


@brief
@dataclass(frozen=True)
class Setup:
    """Everything the stages share: the base, its tokenizer, the record, and texts tokenised once.

    Attributes:
        base: the model before unlearning; never changed.
        tokenizer: its tokenizer.
        record: forget and retain sets.
        max_length: texts are cut to this many tokens.
        null_pool: texts for the null attack.
        neutral: words of neither set, for the trigger check.
        template: puts a word into a question.
        world: the built-in world, where the texts are its own.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    record: ForgetRetain
    max_length: int | None = None
    null_pool: tuple[Example, ...] = ()
    neutral: tuple[str, ...] = ()
    template: PromptTemplate = speaker_tag
    world: World | None = None

    def encode(
        self, examples: Sequence[Example], *, answers: bool = False, rows: int = ROWS
    ) -> list[Batch]:
        """Batches on the base's device; ``answers`` restricts the loss to answers."""
        encoded = batches(
            self.tokenizer,
            examples,
            rows,
            max_length=self.max_length,
            targets="answer" if answers else "text",
        )
        return [batch.to(self.base.device) for batch in encoded]


class Disruption:
    """What a change of weights costs on the sets of retain texts that no method trains on:
    neighbouring facts, far facts, general text.

    Every set counts the same. The rise of the loss can be negative, where a change happens to help;
    the KL divergence cannot.

    Args:
        setup: the base and its texts.
        measure: ``kl`` or ``loss-rise``.
        counted: the retain sets that count; default all.

    Raises:
        WorkbenchError: a set does not exist, or none holds a text.
    """

    def __init__(
        self, setup: Setup, measure: DisruptionMeasure = "kl", counted: Sequence[str] = ()
    ) -> None:
        tests = setup.record.retain_test
        for name in counted:
            if name not in tests:
                raise unknown("retain set", name, tests)
        self.measure: DisruptionMeasure = measure
        self.counted = tuple(dict.fromkeys(counted)) or tuple(tests)
        self.sets = {
            name: setup.encode(one_per_item(examples))
            for name, examples in tests.items()
            if examples
        }
        if not set(self.counted) & set(self.sets):
            raise WorkbenchError(
                "there is no retain text to measure disruption on; give at least two retain texts"
            )
        with torch.no_grad():
            self.reference = {
                name: [next_token_logits(setup.base, batch) for batch in encoded]
                for name, encoded in self.sets.items()
            }
        self.base_nll = {
            name: nll_by_text(setup.base, encoded)[0] for name, encoded in self.sets.items()
        }

    def by_set(
        self, model: PreTrainedModel, measure: DisruptionMeasure | None = None
    ) -> dict[str, Estimate]:
        """The cost on every retain set, with its 95 % interval over texts (a ratio of sums; normal
        approximation).
        """
        return {name: self._on(name, model, measure or self.measure) for name in self.sets}

    def _on(self, name: str, model: PreTrainedModel, measure: DisruptionMeasure) -> Estimate:
        if measure == "kl":
            return ratio(*kl_by_text(model, self.sets[name], self.reference[name]))
        base = self.base_nll[name]
        return ratio(nll_by_text(model, self.sets[name])[0] - base, base)

    def estimate(self, model: PreTrainedModel) -> Estimate:
        """The mean over the sets, with the interval that the texts' scatter leaves it."""
        chosen = [self._on(name, model, self.measure) for name in self.counted if name in self.sets]
        value = float(np.mean([one.value for one in chosen]))
        half = (
            float(np.sqrt(np.sum([(one.high - one.low) ** 2 for one in chosen]))) / 2 / len(chosen)
        )
        return Estimate(value, value - half, value + half, sum(one.n for one in chosen))

    def __call__(self, model: PreTrainedModel) -> float:
        """The mean over the sets."""
        return self.estimate(model).value
