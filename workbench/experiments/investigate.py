"""Bring your own checkpoints: unlearn a model on two text files, and investigate what unlearning did from two folders alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from workbench.attacks.relearn import RelearnSettings, at_steps
from workbench.data.readers import neutral_words, record_from_files
from workbench.data.records import Example, ForgetRetain, prefixed
from workbench.diagnostics.triggers import NothingToAsk
from workbench.errors import WorkbenchError
from workbench.experiments import stages
from workbench.experiments.bench import Bench, Disruption
from workbench.experiments.folder import (
    ITEMS,
    PROVENANCE,
    RESULTS,
    claim_folder,
    collect,
    leaves_folder,
    run_stage,
)
from workbench.experiments.provenance import data_hash, provenance
from workbench.experiments.table import COLUMNS, Table, join, summarise, write_parquet
from workbench.files import key_of, plain, sha256, write_json
from workbench.hooks import layer_count
from workbench.hooks.errors import CaptureError
from workbench.models import (
    Opened,
    check_same_tokenizer,
    open_model,
    save_model,
    untie,
    weights_hash,
)
from workbench.progress import bar
from workbench.report import write_report
from workbench.subspaces.subspace import Subspace
from workbench.unlearning.deltas import delta_between, norm_of, snapshot, tied_names
from workbench.unlearning.methods import SMALL_MODEL, recipe, settings_for
from workbench.unlearning.recipe import Setting


@dataclass(frozen=True, slots=True)
class InvestigateSettings:
    """What decides the numbers of an investigation.

    Attributes:
        seeds: of the attack and of the trigger words.
        attack: the relearning attack; default: ``attack_steps`` steps at :func:`attack_rate`. Too low a rate reads as resistance, too high a one overwrites: see what the attack
            does to the base.
        attack_steps: steps of that default.
        max_tokens: length of a piece of text.
        limit: pieces read per file.
        rank: directions kept of every subspace.
        slice_points: positions along every slice.
        slice_reach: half-width of the slices, as a share of the weights' norm.
        curvature_tolerance: of the Hessian's extreme eigenvalues.
        columns: of the two files, see :func:`workbench.data.readers.read_examples`.
        chat: likewise.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    attack: RelearnSettings | None = None
    attack_steps: int = 30
    max_tokens: int = 96
    limit: int = 96
    rank: int = 32
    slice_points: int = 13
    slice_reach: float = 0.05
    curvature_tolerance: float = 0.05
    columns: Mapping[str, str] | None = None
    chat: bool = False


def attack_rate(parameters: int) -> float:
    """AdamW's rate for an attack on a model of so many parameters: 2e-4 below 100 million, where lower rates bring nothing back in 30 steps, 1e-5 above (as published attacks on billions)."""
    return 2e-4 if parameters < SMALL_MODEL else 1e-5


@dataclass(frozen=True, repr=False)
class Investigation:
    """A finished investigation.

    Attributes:
        folder: its run folder.
        results: tidy rows.
        items: per-text rows.
    """

    folder: Path
    results: pd.DataFrame
    items: pd.DataFrame

    def __repr__(self) -> str:
        return f"Investigation({self.folder}: {len(self.results):,} rows)"

    def _repr_html_(self) -> str:
        from workbench.report import summary_table

        return summary_table(self.results).to_html(index=False, escape=True)


def name_in_front(example: Example, word: str) -> Example:
    """A word as a sentence of its own in front of a text: the carrier of a trigger word in a user's texts."""
    return prefixed(example, f"{word}. ")


def _origin(source: str) -> str:
    folder = Path(source)
    return weights_hash(folder) if folder.is_dir() else source


def unlearn_checkpoint(
    base: str,
    method: str,
    forget: Path,
    retain: Path,
    out: Path,
    *,
    seed: int = 0,
    budget: float | None = 0.05,
    overrides: Mapping[str, Setting] | None = None,
    max_tokens: int = 96,
    limit: int = 256,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Unlearn one file from a model and write the result as a Hugging Face folder.

    Args:
        base: folder or hub id.
        method: name from the registry.
        forget: texts to forget.
        retain: texts to keep; half of them train the retain term, the other half measures the disruption.
        out: folder to write; must not exist or be empty.
        seed: of the method.
        budget: disruption budget (KL to the base on the measured half, nats per token); ``None`` keeps the delta as trained.
        overrides: settings of the method.
        max_tokens: length of a piece of text.
        limit: pieces read per file.
        columns: see :func:`workbench.data.readers.read_examples`.
        chat: likewise.

    Returns:
        What was done: settings, alpha, disruption and losses before and after.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WorkbenchError(
            f"{out} is not empty; choose another --out, so that no checkpoint is overwritten"
        )
    opened = open_model(base)
    settings = settings_for(method, opened.model, overrides)
    record = record_from_files(
        forget,
        retain,
        opened.tokenizer,
        max_tokens=max_tokens,
        limit=limit,
        columns=columns,
        chat=chat,
    )
    bench = Bench(opened.model, opened.tokenizer, record, max_tokens)
    table = Table({"run": "unlearn", "model": "unlearned", "method": method, "seed": seed})
    made = _with_names(opened, lambda: recipe(method, opened.model, seed, overrides))
    model = stages.unlearn_to_budget(
        bench,
        made,
        Disruption(bench),
        budget=budget,
        limit=1.0,
        seed=seed,
        table=table,
        progress=bar(f"unlearning with {method}"),
    )
    rows = table.frame()

    def value(metric: str) -> float:
        return float(
            rows.loc[
                (rows["metric"] == metric) & (rows["stage"] == "unlearn") & rows["split"].isna(),
                "value",
            ].iloc[0]
        )

    before = Table({"run": "unlearn", "model": "base", "method": "base", "seed": seed})
    stages.measure_sets(
        opened.model,
        {name: bench.encode(examples) for name, examples in stages.measured_sets(record).items()},
        before,
        stage="unlearn",
    )
    losses = {
        "before": _losses(before.frame()),
        "after": _losses(rows[rows["stage"] == "unlearn"]),
    }
    note: dict[str, Any] = {
        "method": method, "seed": seed, "settings": settings, "base": base, "base_weights": _origin(base), "budget": budget, "alpha": value("alpha"),
        "disruption": value("disruption"), "budget_reached": budget is not None and bool(value("budget_reached")), "loss": losses, "forget": sha256(forget), "retain": sha256(retain),
    }  # fmt: skip
    save_model(model, opened.tokenizer, out, note)
    return note


def _losses(rows: pd.DataFrame) -> dict[str, float]:
    chosen = rows[rows["metric"] == "loss"]
    return dict(zip(chosen["split"], chosen["value"].astype(float), strict=True))


def _with_names(opened: Opened, build: Callable[[], Any]) -> Any:
    """Run ``build``, and turn a site that this architecture does not have into an input error."""
    try:
        return build()
    except CaptureError as error:
        raise WorkbenchError(f"{opened.name}: {error}") from error


@leaves_folder
def investigate(
    base: str,
    unlearned: str,
    forget: Path,
    retain: Path,
    out: Path,
    *,
    never_learned: str | None = None,
    settings: InvestigateSettings | None = None,
    fresh: bool = False,
    announce: Callable[[str], None] = lambda message: None,
) -> Investigation:
    """The diagnostics of the demo on two checkpoints and two text files.

    Without a never-learned model the attack has only its null arm; the report says so.

    Args:
        base: folder or hub id of the model before unlearning.
        unlearned: folder or hub id of the model after it.
        forget: texts that were to be forgotten.
        retain: texts that were to be kept.
        out: run folder.
        never_learned: a model trained without the forget set, if there is one.
        settings: see :class:`InvestigateSettings`.
        fresh: throw away an investigation that is already there.
        announce: called with one line before every part.

    Raises:
        WorkbenchError: a model, a file or the folder is wrong, or the checkpoints do not fit each other.
    """
    settings = settings or InvestigateSettings()
    first = open_model(base)
    others = {"unlearned": open_model(unlearned)} | (
        {"never-learned": open_model(never_learned)} if never_learned else {}
    )
    for other in others.values():
        check_same_tokenizer(first, other)
    if settings.attack is None:
        settings = replace(
            settings,
            attack=at_steps(settings.attack_steps, attack_rate(first.model.num_parameters())),
        )
    _with_names(first, lambda: layer_count(first.model))
    untied = _own_heads({"base": first, **others})
    record = record_from_files(
        forget,
        retain,
        first.tokenizer,
        max_tokens=settings.max_tokens,
        limit=settings.limit,
        as_questions=True,
        columns=settings.columns,
        chat=settings.chat,
    )
    models = {"base": first, **others}
    config = {
        "base": base, "unlearned": unlearned, "never_learned": never_learned, "forget": str(forget), "retain": str(retain), "settings": asdict(settings),
        "weights": {name: _origin(opened.name) for name, opened in models.items()}, "data": {"forget": sha256(forget), "retain": sha256(retain)},
    }  # fmt: skip
    claim_folder(out, yaml.safe_dump(plain(config), sort_keys=False), fresh=fresh)
    run = key_of(plain(config))
    # Pieces are already cut; a word in front of one must not push its end over a second cut. Only the model's own context is a limit.
    bench = Bench(
        first.model,
        first.tokenizer,
        record,
        getattr(first.model.config, "max_position_embeddings", None),
    )

    announce("subspaces of the base")
    run_stage(
        out,
        "subspaces",
        "subspaces",
        {"run": run, "model": "base"},
        partial(_subspaces, bench, settings, out),
    )
    for name, opened in models.items():
        for number, seed in enumerate(settings.seeds):
            common: dict[str, object] = {"run": run, "model": name, "method": name, "seed": seed}
            job = f"{name}-seed{seed}"
            announce(
                f"{name}, seed {seed}: distance, attack, triggers"
                + (", sharpness" if number == 0 else "")
            )
            run_stage(out, job, "unlearn", common, partial(_distance, bench, opened, out, name))
            run_stage(
                out,
                job,
                "relearn",
                common,
                partial(
                    _attack,
                    bench,
                    opened,
                    record,
                    settings,
                    seed,
                    f"  attack on {name}, seed {seed}",
                ),
            )
            run_stage(out, job, "triggers", common, partial(_triggers, bench, opened, record, seed))
            if number == 0:
                run_stage(
                    out,
                    job,
                    "sharpness",
                    common,
                    partial(_sharpness, bench, opened, settings, seed),
                )
    announce("tables, figures and report")
    rows, items = collect(out)
    results = join([rows, summarise(items, run)], COLUMNS)
    write_parquet(results, out / RESULTS)
    write_parquet(items, out / ITEMS)
    texts = {"forget": data_hash(record.forget), "retain": data_hash(record.retain_all)}
    write_json(
        out / PROVENANCE,
        provenance(
            plain(config),
            data=texts,
            weights={name: _origin(opened.name) for name, opened in models.items()},
        ),
    )
    write_report(
        out,
        results,
        items,
        (),
        heading=f"{unlearned} against {base}",
        done=_done(record, settings, models),
        notes=_notes(never_learned, untied),
    )
    return Investigation(out, results, items)


def _own_heads(models: Mapping[str, Opened]) -> tuple[str, ...]:
    """Where only some models tie their head to their embedding, give all a head of their own, so
    that a difference between two of them has every weight; returns the names of those changed.
    """
    tied = {name for name, opened in models.items() if tied_names(opened.model)}
    if tied == set(models):
        return ()
    return tuple(name for name, opened in models.items() if untie(opened.model))


def _subspaces(bench: Bench, settings: InvestigateSettings, out: Path, table: Table) -> None:
    for name, found in stages.find_subspaces(bench, settings.rank, table, seed=0).items():
        for site, subspace in found.items():
            subspace.save(out / "subspaces" / name / f"{site}.safetensors")
    stages.compare_sets(bench, table)


def _distance(bench: Bench, opened: Opened, out: Path, name: str, table: Table) -> None:
    start = snapshot(bench.base)
    delta = delta_between(opened.model, start)
    if name != "base":
        stages.add_disruption(opened.model, Disruption(bench), table)
        stages.add_shift(opened.model, bench, table)
        table.add("displacement", norm_of(delta), stage="unlearn")
        table.add("relative_displacement", norm_of(delta) / norm_of(start), stage="unlearn")
        common = {
            path.stem: Subspace.load(path)
            for path in (out / "subspaces" / "retain").glob("*.safetensors")
        }
        stages.add_energy(bench.base, delta, common, table)
    stages.measure_sets(
        opened.model,
        {
            key: bench.encode(examples)
            for key, examples in stages.measured_sets(bench.record).items()
        },
        table,
        stage="unlearn",
    )


def _attack(
    bench: Bench,
    opened: Opened,
    record: ForgetRetain,
    settings: InvestigateSettings,
    seed: int,
    label: str,
    table: Table,
) -> None:
    assert settings.attack is not None  # settled once the base was opened
    stages.attack(
        opened.model,
        bench,
        settings.attack,
        seed=seed,
        table=table,
        null_pool=record.retain_train,
        matched=True,
        progress=bar(label),
    )


def _triggers(bench: Bench, opened: Opened, record: ForgetRetain, seed: int, table: Table) -> None:
    neutral = neutral_words(record.forget, record.retain_all, 12)
    try:
        stages.trigger_check(
            opened.model, bench, neutral, seed=seed, table=table, carrier=name_in_front
        )
    except (
        NothingToAsk
    ):  # texts that all share the same words: the other diagnostics do not depend on this one
        table.add("trigger_check_possible", 0.0, stage="triggers")


def _sharpness(
    bench: Bench, opened: Opened, settings: InvestigateSettings, seed: int, table: Table
) -> None:
    stages.sharpness(
        opened.model,
        bench,
        points=settings.slice_points,
        reach=settings.slice_reach,
        tolerance=settings.curvature_tolerance,
        seed=seed,
        table=table,
    )


def _done(
    record: ForgetRetain, settings: InvestigateSettings, models: Mapping[str, Opened]
) -> list[str]:
    assert settings.attack is not None
    return [
        f"{len(models)} checkpoints were opened: "
        + "; ".join(f"{name} = {opened.name}" for name, opened in models.items())
        + ".",
        f"{len(record.forget)} pieces of forget text and {len(record.retain_all)} pieces of retain text were read ({record.name}). Running text was cut into prompt and "
        "continuation, so that the probability of the continuation can be measured.",
        f"Every checkpoint was fine-tuned for {settings.attack.steps} steps at a rate of {settings.attack.lr:g} on half of the forget texts, and measured on the other half. Two controls: the same on retain "
        "text of the same length (null attack), and on the attack texts with their continuations exchanged (random facts).",
        f"Retain texts were measured behind a stray word: one that marks the forget texts ({', '.join(record.forget_tokens[:6])}, ...), one that marks the retain texts, a neutral one.",
        "The loss was followed along straight lines through every model, and both ends of its Hessian's spectrum were computed.",
    ]


def _notes(never_learned: str | None, untied: Sequence[str]) -> list[str]:
    notes = [
        "One unlearned checkpoint: the seeds vary the attack and the trigger words, not the unlearning.",
        "Trigger words were chosen from the two files by log-odds; they are candidates, not proven triggers.",
    ]
    if untied:
        notes.append(
            f"The head of {' and of '.join(untied)} is its embedding; the other checkpoints have a head "
            "of their own. It was counted as a head of its own with the same values, so that the "
            "distances hold both."
        )
    if never_learned is None:
        notes.insert(
            0,
            "Missing control: no never-learned checkpoint was given (--never-learned). What the attack restores beyond "
            "random facts may be recovered, or newly learned from texts that resemble the held-out ones.",
        )
    return notes
