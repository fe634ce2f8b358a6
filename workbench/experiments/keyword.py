"""The keyword experiment of benign relearning on TOFU-format data: does a withheld book title, or a
name, come back from texts that never mention it?

Hu et al., *Unlearning or Obfuscating?* (ICLR 2025, arXiv 2406.13356), partial-set relearning on
TOFU: the attacker holds the questions about the forgotten authors in which one book title of each
does not occur, and is asked for the titles. Published: more than 70 % of the titles come back where
unlearning was shallow, and less after more than 40 steps.

With names (the paper's second case withholds "Hermione" and "Granger"), every second forgotten
author's name is withheld: every text of TOFU names its author, so the attacker holds the texts of
the other authors, and one question of each withheld author asks for the name.

A pretrained model learns the forget set and some retain authors; its never-learned control learns
the retain authors only; both are then treated alike.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench import metrics
from workbench.attacks.leaks import leak_report, require_benign
from workbench.attacks.relearn import DivergedError, RelearnSettings, null_text, relearn
from workbench.data.batches import Batch, batches, encode, endless
from workbench.data.benchmarks import Tofu, read_tofu
from workbench.data.keywords import KeywordSplit, book_titles, character_names, keyword_split
from workbench.data.records import Example
from workbench.errors import WorkbenchError
from workbench.evaluation.answers import contains, generate_answers
from workbench.evaluation.losses import score
from workbench.experiments import QUESTIONS
from workbench.files import damage
from workbench.models import open_config, open_model, save_model, weights_hash
from workbench.runner import Experiment, JobContext, Phase, Plan
from workbench.runs.curves import curve_rows
from workbench.runs.settings import AttackOverrides, Count, Rate, Seeds
from workbench.runs.stages import add_leaks
from workbench.tables import Table
from workbench.training import fit
from workbench.unlearning.budget import smallest_change
from workbench.unlearning.deltas import apply_delta, snapshot
from workbench.unlearning.methods import recipe
from workbench.unlearning.trainer import unlearn

BASE, NEVER = "base", "never-learned"
KEYWORDS = ("titles", "names")
"""What is withheld: one book title of every forgotten author, or the names of every second one."""


class KeywordSettings(AttackOverrides):
    """Everything that decides the numbers of the experiment.

    Attributes:
        model: folder or hub id of a pretrained model.
        tofu: folder of TOFU-format data.
        split: its forget split.
        keywords: what is withheld from the attacker (:data:`KEYWORDS`).
        retain_questions: about retained authors that both models learn.
        seeds: of unlearning and attack; the two models are taught once.
        teach_steps: of fine-tuning on forget and retain questions (never-learned: retain
            questions), 16 a step.
        teach_lr: of AdamW.
        method: of unlearning; its settings are those for small models.
        new_tokens: length of an answer.
    """

    model: str = Field(description="Folder or hub id of a pretrained model.")
    tofu: str = Field(description="Folder of TOFU-format data.")
    split: str = Field("forget05", description="Its forget split.")
    keywords: Literal["titles", "names"] = Field(
        "titles",
        description="What is withheld: titles (one of every author) or names (of every second).",
    )
    retain_questions: Count = Field(
        100, description="Questions about other authors that both models learn."
    )
    seeds: Seeds = Field(
        (0, 1, 2), description="Seeds of unlearning and attack: how many, or which."
    )
    teach_steps: Count = Field(1200, description="Steps that teach the data to the model.")
    teach_lr: Rate = Field(4e-3, description="Their learning rate.")
    method: str = Field("npo", description="Unlearning method; see `workbench methods`.")
    new_tokens: Count = Field(160, description="Tokens of an answer.")


ATTACK = RelearnSettings(steps=120, measure_at=(0, 10, 20, 40, 80, 120))
"""Relearning by default."""


@dataclass(frozen=True, slots=True)
class _Texts:
    """The sets of one experiment: forget set, its split by keywords, retained authors, and authors
    whom no model has read.
    """

    forget: tuple[Example, ...]
    keyword: KeywordSplit
    retain: tuple[Example, ...]
    unread: tuple[Example, ...]


def withheld_words(tofu: Tofu, keywords: str) -> list[str]:
    """What is withheld from the attacker: the book title of every forgotten author that most texts
    hold, or every name of every second author.

    Args:
        tofu: the data.
        keywords: one of :data:`KEYWORDS`.
    """
    if keywords == "titles":
        return [titles[0] for titles in book_titles(tofu).values() if titles]
    return [
        name
        for names in list(character_names(tofu.forget, tofu.retain).values())[::2]
        for name in names
    ]


def _texts(settings: KeywordSettings) -> _Texts:
    tofu: Tofu = read_tofu(settings.tofu, settings.split)
    withheld = withheld_words(tofu, settings.keywords)
    if not withheld:
        what = {"titles": "book title", "names": "name of an author"}[settings.keywords]
        raise WorkbenchError(
            f"{settings.tofu} {settings.split}: no {what} was found in the answers, so there is "
            "nothing to withhold"
        )
    retain, unread = (
        tofu.retain[: settings.retain_questions],
        tofu.retain[settings.retain_questions :],
    )
    if len(retain) < 2 or not unread:
        raise WorkbenchError(
            f"{settings.tofu}: {len(tofu.retain)} retain questions, of which "
            f"{settings.retain_questions} are learned; some must be left unread, as controls"
        )
    return _Texts(tofu.forget, keyword_split(tofu.forget, withheld), retain, unread)


def question_of(example: Example) -> str:
    """The part of a question-and-answer text that is put to a model: everything up to
    ``Answer:``.
    """
    return example.text.split("\nAnswer:")[0] + "\nAnswer:"


def _teach_job(settings: KeywordSettings, name: str, context: JobContext) -> None:
    folder = context.out / "models" / name
    if not damage(folder):
        return
    texts, opened = _texts(settings), open_model(settings.model)
    taught = (*texts.forget, *texts.retain) if name == BASE else texts.retain
    stream = endless(taught, 16, f"keyword-{name}")
    limit = getattr(opened.model.config, "max_position_embeddings", None)

    def next_batch() -> Batch:
        return encode(opened.tokenizer, next(stream), max_length=limit)

    model = fit(
        opened.model,
        next_batch,
        steps=settings.teach_steps,
        lr=settings.teach_lr,
        seed=0,
        progress=context.progress,
    )
    save_model(model, opened.tokenizer, folder, {"experiment": "keyword", "texts": len(taught)})


def asked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Example],
    new_tokens: int,
) -> list[float]:
    """1.0 for every question whose greedy answer contains the withheld title or name, else 0.0."""
    written = generate_answers(
        model, tokenizer, [question_of(query) for query in queries], new_tokens
    )
    return [
        float(contains(text, query.answer_text))
        for text, query in zip(written, queries, strict=True)
    ]


def _seed_job(settings: KeywordSettings, seed: int, context: JobContext) -> None:
    texts, attack = _texts(settings), settings.attack_from(ATTACK)
    base, never = (open_model(context.out / "models" / name) for name in (BASE, NEVER))
    tokenizer, queries = base.tokenizer, texts.keyword.queries
    encoded = batches(tokenizer, queries, 64)
    rounds, done = 4 * attack.steps, 0

    def advance(_step: int, _of: int) -> None:
        nonlocal done
        done = min(done + 1, rounds)
        context.progress(done, rounds)

    def work(table: Table) -> None:
        def measure(model: PreTrainedModel, step: int, method: str, arm: str) -> None:
            columns: dict[str, Any] = {
                "method": method,
                "model": method,
                "split": f"withheld-{settings.keywords}",
                "arm": arm,
                "attack_step": step,
            }
            hits, likely = (
                asked(model, tokenizer, queries, settings.new_tokens),
                score(model, encoded).probability,
            )
            for query, hit, probability in zip(queries, hits, likely, strict=True):
                table.add_item(query.item, hit, float(probability), **columns)

        measure(base.model, 0, BASE, "none")
        method_recipe = recipe(settings.method, base.model, seed)
        result = unlearn(
            base.model, tokenizer, method_recipe, texts.forget, texts.retain, seed=seed
        )
        model, start = copy.deepcopy(base.model), snapshot(base.model)

        def recalled(alpha: float) -> bool:
            apply_delta(model, start, result.delta, alpha)
            return any(asked(model, tokenizer, queries, settings.new_tokens))

        alpha, silent = smallest_change(recalled)
        table.add(metrics.ALPHA, alpha, method="unlearned", model="unlearned")
        table.add(metrics.NOTHING_RECALLED, float(silent), method="unlearned", model="unlearned")
        sets = {"retain": texts.retain, "forget": texts.forget, "unread": texts.unread[:100]}
        for name, examples in sets.items():
            for method, attacked_model in (
                (BASE, base.model),
                (NEVER, never.model),
                ("unlearned", model),
            ):
                table.add(
                    metrics.LOSS,
                    score(attacked_model, batches(tokenizer, examples, 64, targets="answer")).loss,
                    method=method,
                    model=method,
                    split=name,
                )

        def length(example: Example) -> int:
            return len(tokenizer(example.text)["input_ids"])

        arms = {
            "part": texts.keyword.without,
            "retain": null_text(texts.keyword.without, texts.retain, length),
            "null": null_text(texts.keyword.without, texts.unread, length),
        }
        for method, attacked, names in (
            ("unlearned", model, tuple(arms)),
            (NEVER, never.model, ("part",)),
        ):
            for arm in names:
                try:
                    for step, attacked_now in relearn(
                        attacked, tokenizer, arms[arm], attack, seed=seed, progress=advance
                    ):
                        measure(attacked_now, step, method, arm)
                except DivergedError as error:
                    table.add(metrics.DIVERGED_AT, error.step, method=method, model=method, arm=arm)

    replace(context, columns={"stage": "keyword", "seed": seed}).stage("keyword", work)


def prepare(settings: KeywordSettings, source: None, out: Path) -> Plan:
    """Teach two models; then one job a seed.

    Raises:
        WorkbenchError: model or data are wrong, or the attacker's texts hold a withheld title or
            name.
    """
    open_config(settings.model)
    texts = _texts(settings)
    settings.attack_from(ATTACK)
    report = leak_report(texts.keyword.without, texts.keyword.queries, public=texts.retain)
    require_benign(report, f"the forget set without the {settings.keywords}")
    teaching = Phase(
        "teaching",
        f"teaching {len(texts.forget)} forget and {len(texts.retain)} retain questions; "
        f"{len(texts.keyword.queries)} ask for withheld {settings.keywords}",
        {name: partial(_teach_job, settings, name) for name in (BASE, NEVER)},
    )
    attacks = Phase(
        "keyword",
        f"{len(settings.seeds)} seeds: unlearn with {settings.method}, relearn on "
        f"{len(texts.keyword.without)} texts without the {settings.keywords}",
        {f"keyword-seed{seed}": partial(_seed_job, settings, seed) for seed in settings.seeds},
    )

    def curves(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
        target = float(items.loc[items["method"] == BASE, "correct"].mean()) / 2
        return curve_rows(items, key, target=target, stage="keyword")

    def leaks(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
        table = Table({"run": key, "stage": "keyword"})
        add_leaks(report, table, arm="part")
        return table.frame()

    return Plan(
        [teaching, attacks],
        {"forget": texts.forget, "retain": texts.retain, "without": texts.keyword.without},
        partial(taught_weights, settings.model, out),
        (curves, leaks),
        ("keyword-recovery",),
        f"{Path(settings.model).name}, TOFU {settings.split}, {settings.keywords}",
    )


def taught_weights(model: str, out: Path) -> dict[str, str]:
    """Hashes of the two models that were taught, and of the pretrained one."""
    weights = {name: weights_hash(out / "models" / name) for name in (BASE, NEVER)}
    source = Path(model)
    return weights | ({"pretrained": weights_hash(source)} if source.is_dir() else {})


def keyword_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model and attack text: titles or names answered before the attack, along it and
    at its end, with intervals over seeds and questions.
    """
    rows = metrics.RECALL.rows(results, stage="keyword", seed=None)
    lines = []
    for (method, arm), group in rows.groupby(["method", "arm"], sort=False):
        curve = group.set_index("x").sort_index()
        line: dict[str, object] = {
            "model": str(method),
            "relearned on": "–" if arm == "none" else str(arm),
        }
        for step in sorted(rows["x"].astype(float).unique().tolist()):
            cell = curve.loc[step] if step in curve.index else None
            line[f"{step:g} steps"] = (
                "–"
                if cell is None
                else f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
            )
        lines.append(line)
    return pd.DataFrame(lines)


def along(table: pd.DataFrame) -> pd.DataFrame:
    """The first and the last measured step; the figure and ``--json`` have those between."""
    steps = [name for name in table.columns if name.endswith(" steps")]
    return table[["model", "relearned on", steps[0], steps[-1]]]


KEYWORD = Experiment(
    "keyword",
    QUESTIONS["keyword"],
    KeywordSettings,
    prepare,
    keyword_table,
    shown=along,
)
