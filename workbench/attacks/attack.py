"""The registry of attacks: what turns an unlearned model and the attacker's texts into an attacked
model, step by step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench import values
from workbench.attacks.relearn import RelearnSettings, relearn
from workbench.data.records import Example
from workbench.hooks.brief import brief
from workbench.progress import ProgressCallback
from workbench.registry import Registry

Steps = Iterator[tuple[int, PreTrainedModel]]
"""``step, attacked`` whenever the attack is to be measured, from step 0 (the model as it is) on."""

Run = Callable[
    [
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Sequence[Example],
        RelearnSettings,
        int,
        int | None,
        ProgressCallback,
    ],
    Steps,
]
"""``run(model, tokenizer, texts, settings, seed, max_length, progress)``."""

Own = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Sequence[Example], int], Steps]
"""``attack(model, tokenizer, texts, seed)``: what a user writes."""


@brief
@dataclass(frozen=True, slots=True)
class Attack:
    """An entry of the registry.

    Attributes:
        name: after ``--attack``; of the stage of its rows.
        title: in prose and in figures.
        run: see :data:`Run`; it changes a copy of the model.
        source: paper.
    """

    name: str
    title: str
    run: Run
    source: str = ""


def _relearn(times: float = 1.0, **changes: object) -> Run:
    """Relearning with changed settings, at so many times the rate of the run's attack."""

    def run(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Example],
        settings: RelearnSettings,
        seed: int,
        max_length: int | None,
        progress: ProgressCallback,
    ) -> Steps:
        chosen = replace(settings, lr=times * settings.lr, **changes)  # type: ignore[arg-type]
        return relearn(
            model, tokenizer, texts, chosen, seed=seed, max_length=max_length, progress=progress
        )

    return run


# the rates teach a never-learned model of another world its texts about as well as AdamW's does
ATTACKS: Registry[Attack] = Registry("attack", __name__, "workbench.attacks")
ATTACKS.own(
    [
        Attack("relearn", "relearning", _relearn(), "Hu et al. 2025 (arXiv 2406.13356)"),
        Attack(
            "relearn-lora",
            "relearning with LoRA",
            _relearn(20, lora_rank=8),
            "Hu et al. 2022 (arXiv 2106.09685)",
        ),
        Attack("relearn-sgd", "relearning with SGD", _relearn(200, optimiser="sgd")),
    ]
)


def attack(name: str, *, title: str = "", source: str = "") -> Callable[[Own], Own]:
    """Decorate a generator ``attack(model, tokenizer, texts, seed)`` that yields ``step, attacked``
    from step 0 on: a run with ``--attack NAME`` puts every model under it, with the attacker's
    texts and with the null text of the same length, measures the held-out forgotten facts whenever
    it yields, and keeps the rows under the name as their stage.

    Args:
        name: of the attack.
        title: in prose; default the name.
        source: paper.

    Raises:
        WorkbenchError: the workbench has an attack or a stage of this name.
    """

    def register(own: Own) -> Own:
        @functools.wraps(own)  # its source is the user's, for the configuration
        def run(
            model: PreTrainedModel,
            tokenizer: PreTrainedTokenizerBase,
            texts: Sequence[Example],
            settings: RelearnSettings,
            seed: int,
            max_length: int | None,
            progress: ProgressCallback,
        ) -> Steps:
            return own(model, tokenizer, texts, seed)

        values.labels("attack", [name], taken=("unlearn", "budget", "subspaces"))
        ATTACKS.add(Attack(name, title or name, run, source))
        return own

    return register
