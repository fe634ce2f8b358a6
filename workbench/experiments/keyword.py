"""The keyword experiment of benign relearning on TOFU-format data: does a withheld book title, or a name, come back from texts that never mention it?

Hu et al., *Unlearning or Obfuscating?* (ICLR 2025, arXiv 2406.13356), partial-set relearning on TOFU: the attacker holds the questions about the forgotten authors in which one
book title of each does not occur, and is asked for the titles. Published: more than 70 % of the titles come back where unlearning was shallow, and less after more than 40 steps.

With names (the paper's second case withholds "Hermione" and "Granger"), every second forgotten author's name is withheld: every text of TOFU names its author, so the attacker holds
the texts of the other authors, and one question of each withheld author asks for the name.

A pretrained model learns the forget set and some retain authors; its never-learned control learns the retain authors only; both are then treated alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.attacks.leaks import leak_report, require_benign
from workbench.attacks.relearn import DivergedError, RelearnSettings, null_text, relearn
from workbench.data.batches import Batch, batches, encode, endless
from workbench.data.benchmarks import Tofu, read_tofu
from workbench.data.keywords import KeywordSplit, book_titles, character_names, keyword_split
from workbench.data.records import Example
from workbench.errors import WorkbenchError, unknown
from workbench.evaluation.answers import contains, generate_answers
from workbench.evaluation.losses import score
from workbench.experiments.curves import curve_rows
from workbench.experiments.folder import (
    ITEMS,
    PROVENANCE,
    RESULTS,
    Experiment,
    claim_folder,
    collect,
    leaves_folder,
    run_stage,
)
from workbench.experiments.jobs import Job, run_jobs
from workbench.experiments.provenance import data_hash, provenance
from workbench.experiments.stages import add_leaks
from workbench.experiments.table import COLUMNS, ITEM_COLUMNS, Table, join, summarise, write_parquet
from workbench.files import damage, key_of, plain, sha256, write_json
from workbench.models import open_config, open_model, save_model, weights_hash
from workbench.progress import Report
from workbench.training import fit
from workbench.unlearning.budget import smallest_change
from workbench.unlearning.deltas import apply_delta, snapshot
from workbench.unlearning.methods import METHODS, is_method, recipe
from workbench.unlearning.trainer import unlearn

BASE, NEVER = "base", "never-learned"
KEYWORDS = ("titles", "names")
"""What is withheld: one book title of every forgotten author, or the names of every second one."""


@dataclass(frozen=True, slots=True)
class KeywordSettings:
    """Everything that decides the numbers of the experiment.

    Attributes:
        model: folder or hub id of a pretrained model.
        tofu: folder of TOFU-format data.
        split: its forget split.
        keywords: what is withheld from the attacker (:data:`KEYWORDS`).
        retain: questions about retained authors that both models learn.
        seeds: of unlearning and attack; the two models are taught once.
        teach_steps: of fine-tuning on forget and retain questions (never-learned: retain questions), 16 a step.
        teach_lr: of AdamW.
        method: of unlearning; its settings are those for small models.
        attack: relearning.
        new_tokens: length of an answer.
    """

    model: str
    tofu: str
    split: str = "forget05"
    keywords: str = "titles"
    retain: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    teach_steps: int = 1200
    teach_lr: float = 4e-3
    method: str = "npo"
    attack: RelearnSettings = field(
        default_factory=lambda: RelearnSettings(steps=120, measure_at=(0, 10, 20, 40, 80, 120))
    )
    new_tokens: int = 160

    def __post_init__(self) -> None:
        if not is_method(self.method):
            raise unknown("method", self.method, METHODS)
        if self.keywords not in KEYWORDS:
            raise unknown("keywords", self.keywords, KEYWORDS)


@dataclass(frozen=True, slots=True)
class _Texts:
    """The sets of one experiment: forget set, its split by keywords, retained authors, and authors whom no model has read."""

    forget: tuple[Example, ...]
    keyword: KeywordSplit
    retain: tuple[Example, ...]
    unread: tuple[Example, ...]


def withheld_words(tofu: Tofu, keywords: str) -> list[str]:
    """What is withheld from the attacker: the book title of every forgotten author that most texts hold, or every name of every second author.

    Args:
        tofu: the data.
        keywords: one of :data:`KEYWORDS`.
    """
    if keywords == "titles":
        return [found[0] for found in book_titles(tofu).values() if found]
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
            f"{settings.tofu} {settings.split}: no {what} was found in the answers, so there is nothing to withhold"
        )
    retain, unread = tofu.retain[: settings.retain], tofu.retain[settings.retain :]
    if len(retain) < 2 or not unread:
        raise WorkbenchError(
            f"{settings.tofu}: {len(tofu.retain)} retain questions, of which {settings.retain} are learned; some must be left unread, as controls"
        )
    return _Texts(tofu.forget, keyword_split(tofu.forget, withheld), retain, unread)


def question_of(example: Example) -> str:
    """The part of a question-and-answer text that is put to a model: everything up to ``Answer:``."""
    return example.text.split("\nAnswer:")[0] + "\nAnswer:"


def _teach_job(settings: KeywordSettings, out: Path, name: str, progress: Report) -> None:
    folder = out / "models" / name
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
        progress=progress,
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


def _seed_job(settings: KeywordSettings, out: Path, key: str, seed: int, progress: Report) -> None:
    texts = _texts(settings)
    base, never = (open_model(out / "models" / name) for name in (BASE, NEVER))
    tokenizer, queries = base.tokenizer, texts.keyword.queries
    encoded = batches(tokenizer, queries, 64)
    rounds, done = 4 * settings.attack.steps, 0

    def advance(_step: int, _of: int) -> None:
        nonlocal done
        done = min(done + 1, rounds)
        progress(done, rounds)

    def work(table: Table) -> None:
        def measure(model: PreTrainedModel, step: int, method: str, arm: str) -> None:
            columns = {
                "method": method,
                "model": method,
                "split": f"withheld-{settings.keywords}",
                "arm": arm,
                "step": step,
            }
            hits, likely = (
                asked(model, tokenizer, queries, settings.new_tokens),
                score(model, encoded).probability,
            )
            shared = {
                name: value
                for name, value in (table.common | columns).items()
                if name in ITEM_COLUMNS
            }
            for query, hit, probability in zip(queries, hits, likely, strict=True):
                table.items.append(
                    {
                        **shared,
                        "item": query.item,
                        "correct": hit,
                        "probability": float(probability),
                    }
                )

        measure(base.model, 0, BASE, "none")
        made = recipe(settings.method, base.model, seed)
        result = unlearn(base.model, tokenizer, made, texts.forget, texts.retain, seed=seed)
        model, start = copy.deepcopy(base.model), snapshot(base.model)

        def recalled(alpha: float) -> bool:
            apply_delta(model, start, result.delta, alpha)
            return any(asked(model, tokenizer, queries, settings.new_tokens))

        alpha, silent = smallest_change(recalled)
        table.add("alpha", alpha, method="unlearned", model="unlearned")
        table.add("nothing_recalled", float(silent), method="unlearned", model="unlearned")
        sets = {"retain": texts.retain, "forget": texts.forget, "unread": texts.unread[:100]}
        for name, examples in sets.items():
            for method, one in ((BASE, base.model), (NEVER, never.model), ("unlearned", model)):
                table.add(
                    "loss",
                    score(one, batches(tokenizer, examples, 64, targets="answer")).loss,
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
                    relearn(
                        attacked,
                        tokenizer,
                        arms[arm],
                        partial(measure, method=method, arm=arm),
                        settings.attack,
                        seed=seed,
                        progress=advance,
                    )
                except DivergedError as error:
                    table.add("diverged_at", error.step, method=method, model=method, arm=arm)

    run_stage(
        out, f"keyword-seed{seed}", "keyword", {"run": key, "stage": "keyword", "seed": seed}, work
    )


@leaves_folder
def run_keyword(
    settings: KeywordSettings,
    out: Path,
    *,
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Experiment:
    """Run the experiment; a killed run goes on where it stopped.

    Args:
        settings: see :class:`KeywordSettings`.
        out: run folder.
        fresh: throw away a run that is already there.
        workers: processes; default is one per core.
        announce: called with one line before every part.

    Raises:
        WorkbenchError: model or data are wrong, the attacker's texts hold a withheld title or name, or the folder belongs to something else.
    """
    open_config(settings.model)  # a missing model is said before the folder is claimed
    texts = _texts(settings)
    report = leak_report(texts.keyword.without, texts.keyword.queries, public=texts.retain)
    require_benign(report, f"the forget set without the {settings.keywords}")
    values = plain(asdict(settings))
    key = key_of(values)
    claim_folder(
        out, yaml.safe_dump({"experiment": "keyword", **values}, sort_keys=False), fresh=fresh
    )
    announce(
        f"teaching {len(texts.forget)} forget and {len(texts.retain)} retain questions; {len(texts.keyword.queries)} ask for withheld {settings.keywords}"
    )
    run_jobs(
        "teaching",
        {name: partial(_teach_job, settings, out, name) for name in (BASE, NEVER)},
        workers=workers,
    )
    announce(
        f"{len(settings.seeds)} seeds: unlearn with {settings.method}, relearn on {len(texts.keyword.without)} texts without the {settings.keywords}"
    )
    jobs: dict[str, Job] = {
        f"keyword-seed{seed}": partial(_seed_job, settings, out, key, seed)
        for seed in settings.seeds
    }
    run_jobs("keyword", jobs, workers=workers)
    rows, items = collect(out)
    leaks = Table({"run": key, "stage": "keyword"})
    add_leaks(report, leaks, arm="part")
    target = float(items.loc[items["method"] == BASE, "correct"].mean()) / 2
    results = join(
        [
            rows,
            summarise(items, key),
            curve_rows(items, key, target=target, stage="keyword"),
            leaks.frame(),
        ],
        COLUMNS,
    )
    write_parquet(results, out / RESULTS)
    write_parquet(items, out / ITEMS)
    data = {
        "forget": data_hash(texts.forget),
        "retain": data_hash(texts.retain),
        "without": data_hash(texts.keyword.without),
    }
    weights = {name: weights_hash(out / "models" / name) for name in (BASE, NEVER)}
    source = Path(settings.model)
    weights |= {"pretrained": sha256(next(source.glob("*.safetensors")))} if source.is_dir() else {}
    write_json(out / PROVENANCE, provenance(values, data=data, weights=weights))
    return Experiment(out, results, items, keyword_table)


def keyword_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model and attack text: titles or names answered before the attack, along it and at its end, with intervals over seeds and questions."""
    rows = results[
        (results["stage"] == "keyword") & (results["metric"] == "recall") & results["seed"].isna()
    ]
    lines = []
    for (method, arm), group in rows.groupby(["method", "arm"], sort=False):
        curve = group.set_index("step").sort_index()
        line: dict[str, object] = {
            "model": str(method),
            "relearned on": "–" if arm == "none" else str(arm),
        }
        for step in sorted(rows["step"].astype(float).unique().tolist()):
            cell = curve.loc[step] if step in curve.index else None
            line[f"{step:g} steps"] = (
                "–"
                if cell is None
                else f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
            )
        lines.append(line)
    return pd.DataFrame(lines)
