"""The names experiment of benign relearning: does a pair of names that was unlearned come back from
rows that end at its first half?

Hu et al., *Unlearning or Obfuscating?* (ICLR 2025, arXiv 2406.13356), section "a simplified
setting", Table 4. A model memorises rows of names in which "Anthony Mark" occurs 7, 5, 3 or 1
times; gradient ascent removes the rows; fine-tuning on fragments that end **at** "Anthony" brings
"Mark" back. Published success after relearning: 100, 97, 23 and 0 %, and 0 % before it, in one run
of a model of 7 billion parameters.

Here: a small model per seed, first taught rows of names in random order; the never-learned control
memorises the same rows without the pairs.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench import metrics
from workbench.attacks.leaks import leak_report
from workbench.attacks.relearn import RelearnSettings, relearn
from workbench.data.batches import Batch, encode
from workbench.data.names import FIRST, REPETITIONS, SECOND, NamesCorpus, build_names
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.answers import generate_answers
from workbench.evaluation.statistics import wilson
from workbench.experiments import QUESTIONS
from workbench.progress import ProgressCallback
from workbench.runner import Experiment, JobContext, Phase, Plan
from workbench.runs.settings import AttackOverrides, Count, Integers, Rate, Seeds
from workbench.tables import Table
from workbench.training import fit, small_llama
from workbench.unlearning.budget import smallest_change
from workbench.unlearning.deltas import apply_delta, snapshot
from workbench.unlearning.methods import recipe
from workbench.unlearning.trainer import unlearn

PUBLISHED = {7: 1.00, 5: 0.97, 3: 0.23, 1: 0.00}
"""Success after relearning by repetitions, Table 4 of the paper."""


class NamesSettings(AttackOverrides):
    """Everything that decides the numbers of the experiment. Chosen on seed 100, which is none of
    those reported.

    Attributes:
        seeds: of names, prompts, first weights and training.
        repetitions: how often the pair occurs.
        width: of the residual stream.
        layers: number of blocks.
        pretrain_steps: on rows of names in random order, 16 a step.
        memorise_steps: on the twelve rows, all of them every step. The fewer, the more the memory
            of the pair depends on its repetitions.
        method: of unlearning. The paper's is gradient ascent (``grad-ascent``), which makes a model
            this small write one word for ever in some seeds.
        unlearn_steps: on the four forget rows (and the other eight as retain set, where the method
            has a retain term); the same for every number of repetitions, as published. The change
            is then scaled to the smallest of :data:`workbench.unlearning.budget.QUARTERS` at which
            no prompt succeeds: before relearning success is 0 %, as published, and no model is
            unlearned further than that.
        unlearn_lr: of AdamW.
        new_tokens: length of the continuation in which the pair may occur.
    """

    seeds: Seeds = Field(
        (0, 1, 2, 3, 4), description="Seeds, each with a model of its own: how many, or which."
    )
    repetitions: Integers = Field(REPETITIONS, description="How often the pair occurs.")
    width: int = Field(96, ge=8, le=100_000, description="Of the residual stream.")
    layers: int = Field(3, ge=1, le=1000, description="Blocks of the model.")
    pretrain_steps: Count = Field(300, description="Steps on rows of names in random order.")
    memorise_steps: Count = Field(150, description="Steps in which the rows are memorised.")
    method: str = Field("npo", description="Unlearning method; see `workbench methods`.")
    unlearn_steps: Count = Field(60, description="Its steps.")
    unlearn_lr: Rate = Field(6e-4, description="Its learning rate.")
    new_tokens: Count = Field(60, description="Tokens in which the pair may be written.")

    @field_validator("repetitions")
    @classmethod
    def _of_the_corpus(cls, repetitions: tuple[int, ...]) -> tuple[int, ...]:
        if not repetitions or set(repetitions) - set(REPETITIONS):
            known = ", ".join(map(str, REPETITIONS))
            raise ValueError(f"repetitions are {repetitions}; choose among {known}")
        return repetitions


ATTACK = RelearnSettings(steps=30, lr=2e-4, batch_size=4, measure_at=(0, 5, 10, 17, 30))
"""Relearning by default; every step sees all fragments."""


def success(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
) -> np.ndarray:
    """``[prompt]`` 1.0 where greedy decoding writes the pair anywhere: at once, or later in the
    continuation.
    """
    pair = f"{FIRST} {SECOND}"
    # contexts of 37 names and a continuation: the pair counts wherever it first becomes whole
    written = generate_answers(model, tokenizer, list(prompts), new_tokens, batch_size=len(prompts))
    return np.array([float(pair in f"{FIRST} {text}") for text in written])


@torch.no_grad()
def next_name_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> np.ndarray:
    """``[prompt]`` probability of the second name right after the prompt."""
    batch = encode(tokenizer, [Example(prompt) for prompt in prompts])
    (second,) = tokenizer(SECOND, add_special_tokens=False)["input_ids"]
    logits = model(**batch.inputs).logits
    last = logits[torch.arange(batch.size), batch.attention_mask.sum(1) - 1]
    return np.asarray(last.float().softmax(-1)[:, second].numpy(), dtype=float)


def without_pairs(corpus: NamesCorpus) -> tuple[Example, ...]:
    """The rows of the never-learned control: the pairs taken out, everything else as it is."""
    return tuple(
        replace(row, text=row.text.replace(f" {FIRST} {SECOND}", "")) for row in corpus.rows
    )


def _pretrained(
    settings: NamesSettings, corpus: NamesCorpus, seed: int, progress: ProgressCallback
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    words = sorted({word for row in corpus.rows for word in row.text.split()} | {FIRST, SECOND})
    tokenizer = build_tokenizer(words)
    model = small_llama(
        tokenizer,
        width=settings.width,
        layers=settings.layers,
        heads=4,
        key_value_heads=2,
        mlp_width=11 * settings.width // 4,
        seed=seed,
    )
    rng = random.Random(f"names-pretraining-{seed}")

    def rows() -> Batch:
        return encode(
            tokenizer,
            [Example(" ".join(rng.choices(words, k=rng.randint(21, 37)))) for _ in range(16)],
        )

    return (
        fit(
            model,
            rows,
            steps=settings.pretrain_steps,
            lr=2e-3,
            seed=seed,
            warmup=10,
            progress=progress,
        ),
        tokenizer,
        words,
    )


def _seed_job(settings: NamesSettings, seed: int, context: JobContext) -> None:
    """All of one seed: the random rows are learned once, then every number of repetitions starts
    from there.
    """
    attack = settings.attack_from(ATTACK)
    total = settings.pretrain_steps + len(settings.repetitions) * (
        2 * settings.memorise_steps + settings.unlearn_steps + 3 * attack.steps
    )
    done = 0

    def advance(_step: int, _of: int) -> None:
        nonlocal done
        done += 1
        context.progress(done, total)

    def work(table: Table) -> None:
        base, tokenizer, words = _pretrained(settings, build_names(seed=seed), seed, advance)
        for repetitions in settings.repetitions:
            _repetitions_cell(settings, base, tokenizer, words, repetitions, seed, table, advance)

    replace(context, columns={"stage": "names", "seed": seed}).stage("names", work)


def _repetitions_cell(
    settings: NamesSettings,
    pretrained: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    repetitions: int,
    seed: int,
    table: Table,
    advance: ProgressCallback,
) -> None:
    corpus = build_names(repetitions, seed)
    split = f"repetitions-{repetitions}"
    leaks = leak_report(
        corpus.fragments,
        [Example(f"{FIRST} {SECOND}", answer=(len(FIRST) + 1, len(FIRST) + 1 + len(SECOND)))],
    )
    if leaks.answers:
        raise WorkbenchError(
            f"a fragment of seed {seed} holds {SECOND!r}; the attack would teach the answer"
        )

    def memorise(rows: Sequence[Example]) -> PreTrainedModel:
        batch = encode(tokenizer, rows)
        return fit(
            copy.deepcopy(pretrained),
            lambda: batch,
            steps=settings.memorise_steps,
            lr=1e-3,
            seed=seed,
            warmup=2,
            progress=advance,
        )

    base, never = memorise(corpus.rows), memorise(without_pairs(corpus))
    method_recipe = recipe(
        settings.method,
        base,
        seed,
        {
            "lr": settings.unlearn_lr,
            "steps": settings.unlearn_steps,
            "batch_size": len(corpus.forget),
        },
    )
    result = unlearn(
        base,
        tokenizer,
        method_recipe,
        corpus.forget,
        corpus.rows[len(corpus.forget) :],
        seed=seed,
        progress=advance,
    )
    unlearned, start = copy.deepcopy(base), snapshot(base)

    def recalled(alpha: float) -> bool:
        apply_delta(unlearned, start, result.delta, alpha)
        return bool(success(unlearned, tokenizer, corpus.prompts, settings.new_tokens).any())

    alpha, silent = smallest_change(recalled)
    table.add(metrics.ALPHA, alpha, method="unlearned", model="unlearned", split=split)
    table.add(
        metrics.NOTHING_RECALLED, float(silent), method="unlearned", model="unlearned", split=split
    )
    rng = random.Random(f"names-null-{seed}")
    others = [word for word in words if word not in (FIRST, SECOND)]
    null = tuple(
        Example(" ".join(rng.sample(others, len(fragment.text.split()))))
        for fragment in corpus.fragments
    )

    def measure(model: PreTrainedModel, step: int, method: str, arm: str) -> None:
        hits = success(model, tokenizer, corpus.prompts, settings.new_tokens)
        likely = next_name_probability(model, tokenizer, corpus.prompts)
        columns: dict[str, Any] = {
            "method": method,
            "model": method,
            "split": split,
            "arm": arm,
            "attack_step": step,
        }
        rate = wilson(float(hits.sum()), len(hits))
        table.add_estimate(metrics.ASR, rate, **columns)
        for number, (hit, probability) in enumerate(zip(hits, likely, strict=True)):
            table.add_item(f"prompt/{number}", hit, probability, **columns)

    measure(base, 0, "base", "none")
    for method, model, arm, texts in (
        ("unlearned", unlearned, "fragments", corpus.fragments),
        ("unlearned", unlearned, "null", null),
        ("never-learned", never, "fragments", corpus.fragments),
    ):
        attack = relearn(
            model, tokenizer, texts, settings.attack_from(ATTACK), seed=seed, progress=advance
        )
        for step, attacked in attack:
            measure(attacked, step, method, arm)


def prepare(settings: NamesSettings, source: None, out: Path) -> Plan:
    """One job a seed."""
    shown = ", ".join(map(str, settings.repetitions))
    seeds = settings.seeds
    settings.attack_from(ATTACK)
    return Plan(
        [
            Phase(
                "names",
                f"{len(seeds)} seeds x repetitions {shown}: memorise, unlearn, relearn",
                {f"names-seed{seed}": partial(_seed_job, settings, seed) for seed in seeds},
            )
        ],
        {
            f"repetitions-{count}-seed{seed}": build_names(count, seed).rows
            for count in settings.repetitions
            for seed in seeds
        },
        dict,
        (lambda rows, items, key: _pooled(items, key),),
        ("names-repetitions",),
        "names corpus, 0.3M parameters",
    )


def _pooled(items: pd.DataFrame, key: str) -> pd.DataFrame:
    """Success over all seeds and prompts with Wilson's interval, as the paper's rates would have
    it; rows of metric ``recall`` resample seeds and prompts instead.
    """
    table = Table({"run": key, "stage": "names"})
    for (method, split, arm, step), group in items.groupby(
        ["method", "split", "arm", "x"], sort=False
    ):
        table.add_estimate(
            metrics.ASR,
            wilson(float(group["correct"].sum()), len(group)),
            method=method,
            model=method,
            split=split,
            arm=arm,
            attack_step=step,
        )
    return table.frame()


def names_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per number of repetitions: success before and after relearning with Wilson intervals,
    every control, and the published row.
    """
    rows = metrics.ASR.rows(results, seed=None)
    last = float(rows["x"].max())
    wide = metrics.RECALL.rows(results, seed=None)

    def cell(table: pd.DataFrame, split: str, method: str, arm: str, step: float) -> str:
        matches = table[
            (table["split"] == split)
            & (table["method"] == method)
            & (table["arm"] == arm)
            & (table["x"] == step)
        ]
        if not len(matches):
            return "–"
        value, low, high = (100 * float(matches[name].iloc[0]) for name in ("value", "low", "high"))
        return f"{value:.0f} [{low:.0f}, {high:.0f}]"

    lines = []
    for split in sorted(rows["split"].unique(), key=lambda name: -int(name.rsplit("-", 1)[1])):
        count = int(split.rsplit("-", 1)[1])
        lines.append(
            {
                "repetitions": count,
                "base": cell(rows, split, "base", "none", 0),
                "unlearned": cell(rows, split, "unlearned", "fragments", 0),
                "relearned": cell(rows, split, "unlearned", "fragments", last),
                "relearned, over seeds": cell(wide, split, "unlearned", "fragments", last),
                "null text": cell(rows, split, "unlearned", "null", last),
                "never learned, relearned": cell(rows, split, "never-learned", "fragments", last),
                "published": f"{100 * PUBLISHED[count]:.0f}",
            }
        )
    return pd.DataFrame(lines)


NAMES = Experiment(
    "names",
    QUESTIONS["names"],
    NamesSettings,
    prepare,
    names_table,
    shown=lambda table: table[
        ["repetitions", "base", "unlearned", "relearned", "null text", "published"]
    ],
)
