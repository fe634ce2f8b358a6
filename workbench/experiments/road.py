"""The whole road on the built-in world: train, capture, unlearn, match, attack, trigger, probe, tabulate, draw, report."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from workbench.builtin import BuiltinConfig, builtin_folder, builtin_model, untrained, world_of
from workbench.data.world import World
from workbench.errors import WorkbenchError
from workbench.experiments import stages
from workbench.experiments.bench import Bench, Disruption
from workbench.experiments.claims import Verdict, decide
from workbench.experiments.config import RunConfig, write_config
from workbench.experiments.folder import (
    ITEMS,
    PROVENANCE,
    RESULTS,
    claim_folder,
    collect,
    finish_stage,
    leaves_folder,
    run_stage,
    stage_done,
    stage_path,
)
from workbench.experiments.jobs import Job, run_jobs
from workbench.experiments.probing import PROBES, Probe
from workbench.experiments.provenance import data_hash, provenance
from workbench.experiments.table import COLUMNS, Table, join, summarise, write_parquet
from workbench.files import MANIFEST, damage, write_folder, write_json
from workbench.hooks import CaptureError
from workbench.models import Opened, open_model, save_model, weights_hash
from workbench.progress import Report
from workbench.report import write_report
from workbench.subspaces.subspace import Subspace
from workbench.unlearning.methods import recipe, settings_for

BASE, NEVER = "base", "never-learned"


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run.

    Attributes:
        folder: its run folder.
        config: what was run.
        results: tidy rows.
        items: per-fact rows.
        claims: verdicts on the claims that this run can decide.
    """

    folder: Path
    config: RunConfig
    results: pd.DataFrame
    items: pd.DataFrame
    claims: tuple[Verdict, ...]

    def __repr__(self) -> str:
        return f"Run({self.folder}: {len(self.config.methods)} methods, {len(self.config.seeds)} seeds, {len(self.results):,} rows)"

    def _repr_html_(self) -> str:
        from workbench.report import summary_table

        return summary_table(self.results).to_html(index=False, escape=True)


@lru_cache(maxsize=2)
def _opened(folder: str) -> Opened:
    return open_model(folder)


def _bench(config: RunConfig, out: Path) -> tuple[Bench, World]:
    world = world_of(config.model)
    base = _opened(str(out / "models" / BASE))
    return Bench(base.model, base.tokenizer, world.record), world


def _train_job(config: RunConfig, out: Path, name: str, progress: Report) -> None:
    folder = builtin_model(config.model, with_forget=name == BASE, progress=progress)
    target = out / "models" / name
    if not target.is_dir() or damage(target):

        def copy(temporary: Path) -> None:
            shutil.copytree(
                folder, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST)
            )

        write_folder(target, copy)


def _readable(folder: Path) -> bool:
    """Whether every subspace that was found is there and as it was written."""
    listed = folder / "list.json"
    try:
        names = json.loads(listed.read_text(encoding="utf-8"))
        for name in names:
            Subspace.load(folder / name)
    except (OSError, ValueError, WorkbenchError) as error:
        print(f"{error}; this part is run again", file=sys.stderr)
        return False
    return len(names) > 0


def _subspace_job(config: RunConfig, out: Path, progress: Report) -> None:
    if stage_done(out, "subspaces", "subspaces") and _readable(out / "subspaces"):
        return
    bench, _ = _bench(config, out)
    table = Table({"run": config.key, "model": BASE})
    for name, found in stages.find_subspaces(bench, config.rank, table, seed=0).items():
        for site, subspace in found.items():
            subspace.save(out / "subspaces" / name / f"{site}.safetensors")
    stages.compare_sets(bench, table)
    folder = out / "subspaces"
    names = [str(path.relative_to(folder)) for path in sorted(folder.glob("*/*.safetensors"))]
    write_json(folder / "list.json", names)
    finish_stage(out, "subspaces", "subspaces", table)


def _model_job(config: RunConfig, out: Path, method: str, seed: int, progress: Report) -> None:
    """All stages of one model: a method's under one seed, or the base or the control under the attack of that seed."""
    bench, world = _bench(config, out)
    unlearned = method not in (BASE, NEVER)
    name = f"{method}-seed{seed}" if unlearned else method
    job = f"{method}-seed{seed}"
    common: dict[str, object] = {"run": config.key, "model": name, "method": method, "seed": seed}
    folder = out / "models" / name

    def start(table: Table) -> None:
        if not unlearned:
            stages.measure_sets(
                _opened(str(folder)).model,
                {k: bench.encode(v) for k, v in stages.measured_sets(bench.record).items()},
                table,
                stage="unlearn",
            )
            return
        variant = config.variant(method)
        made = recipe(variant.method, bench.base, seed, variant.settings)
        retain = {
            path.stem: Subspace.load(path)
            for path in (out / "subspaces" / "retain").glob("*.safetensors")
        }
        model = stages.unlearn_to_budget(
            bench, made, Disruption(bench, config.budget_measure, config.budget_rings), budget=config.budget, limit=config.alpha_limit, seed=seed, table=table, common=retain,
            dtype=getattr(torch, variant.dtype), progress=progress,
        )  # fmt: skip
        settings = settings_for(variant.method, bench.base, variant.settings)
        note = {
            "method": method,
            "recipe": variant.method,
            "dtype": variant.dtype,
            "seed": seed,
            "settings": settings,
            "budget": config.budget,
            "base": BASE,
        }
        save_model(model, bench.tokenizer, folder, note)

    if unlearned and stage_path(out, job, "unlearn").is_dir() and (wrong := damage(folder)):
        print(f"{wrong}; this part is run again", file=sys.stderr)
        # on another machine the weights may come out differently: nothing measured on them stays
        shutil.rmtree(out / "stages" / job, ignore_errors=True)
    run_stage(out, job, "unlearn", common, start)
    model = _opened(str(folder)).model if not unlearned else open_model(folder).model

    def relearn(table: Table) -> None:
        stages.attack(
            model,
            bench,
            config.attack,
            seed=seed,
            table=table,
            null_pool=world.filler_train,
            progress=progress,
        )

    run_stage(out, job, "relearn", common, relearn)
    for name in config.probes:
        probe = PROBES[name]
        # base and control are one model each: what does not depend on the seed is asked once
        if unlearned or probe.seeded or seed == config.seeds[0]:
            run_stage(
                out,
                job,
                name,
                common | {"stage": name},
                partial(_ask, probe, model, bench, seed, config),
            )


def _ask(
    probe: Probe,
    model: PreTrainedModel,
    bench: Bench,
    seed: int,
    config: RunConfig,
    table: Table,
) -> None:
    with PROBES.users(probe.name):
        probe.ask(model, bench, table, seed, config)


def _check_methods(config: RunConfig, world: World) -> None:
    """Build every recipe once, on the model that the base will start from.

    Raises:
        WorkbenchError: a wrapper does not fit its method, or a setting this model (a layer that it does not have).
    """
    model = untrained(config.model, world)[0]
    for name in config.methods:
        variant = config.variant(name)
        try:
            recipe(variant.method, model, config.seeds[0], variant.settings)
        except CaptureError as error:
            raise WorkbenchError(f"{name}: {error}") from error


@leaves_folder
def run_road(
    config: RunConfig,
    out: Path,
    *,
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Run:
    """Run everything that is not finished yet, and write the run folder.

    A killed run continues at its last finished stage when it is started again with the same configuration and folder.

    Args:
        config: what to run.
        out: the run folder.
        fresh: throw away a run that is already there.
        workers: processes; default is one per core.
        announce: called with one line before every part.

    Raises:
        WorkbenchError: the folder belongs to something else, the disk is full, or a part failed (the message names it).
    """
    config = config.with_plugins()
    _check_methods(
        config, world_of(config.model)
    )  # what is wrong or missing is said before the folder is claimed
    claim_folder(out, write_config(config), fresh=fresh)
    kept = {name: out / "models" / name for name in (BASE, NEVER)}
    missing = [name for name, folder in kept.items() if not folder.is_dir() or damage(folder)]
    cached = all(
        (builtin_folder(config.model, with_forget=name == BASE) / "config.json").is_file()
        for name in missing
    )
    announce(
        "base and never-learned control: "
        + ("from the cache" if cached else "training (only the first time)")
    )
    run_jobs(
        "training",
        {name: partial(_train_job, config, out, name) for name in missing},
        workers=workers,
    )

    announce("subspaces of the base")
    run_jobs("subspaces", {"subspaces": partial(_subspace_job, config, out)}, workers=1)

    announce(
        f"{len(config.methods)} methods x {len(config.seeds)} seeds: unlearn, match the budget, attack, trigger, probe"
    )
    jobs: dict[str, Job] = {
        f"{method}-seed{seed}": partial(_model_job, config, out, method, seed)
        for seed in config.seeds
        for method in (*config.methods, BASE, NEVER)
    }
    run_jobs("models", jobs, workers=workers)
    announce("tables, figures and report")
    return _conclude(config, out)


def trained_from(model: BuiltinConfig) -> str:
    """What the report says about a base that did not start from nothing."""
    if model.pretrained is None:
        return ""
    language = (
        "filler language" if model.general is None else f"pieces of {Path(model.general).name}"
    )
    return (
        f"{Path(model.pretrained).name}, a pretrained language model, was fine-tuned on invented facts about people and islands and on {language}; a second copy, the "
        "never-learned control, on the same texts without the people to be forgotten."
    )


def _conclude(config: RunConfig, out: Path) -> Run:
    rows, items = collect(out)
    results = join([rows, summarise(items, config.key)], COLUMNS)
    write_parquet(results, out / RESULTS)
    write_parquet(items, out / ITEMS)
    record = world_of(config.model).record
    texts = {
        "forget-attacked": record.forget_attacked,
        "forget-heldout": record.forget_heldout,
        **record.retain,
    }
    weights = {
        folder.name: weights_hash(folder)
        for folder in sorted((out / "models").iterdir())
        if folder.is_dir()
    }
    write_json(
        out / PROVENANCE,
        provenance(
            config.plain(),
            data={name: data_hash(examples) for name, examples in texts.items()},
            weights=weights,
        ),
    )
    claims = decide(results, items, scale=config.scale)
    write_json(out / "claims.json", [claim.plain() for claim in claims])
    write_report(out, results, items, claims, trained=trained_from(config.model))
    return Run(out, config, results, items, claims)
