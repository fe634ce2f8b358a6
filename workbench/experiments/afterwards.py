"""What experiments on the models of a finished run have in common: which models, one job each, one folder of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from workbench.builtin import world_of
from workbench.data.world import World
from workbench.errors import WorkbenchError, unknown
from workbench.experiments.bench import Bench
from workbench.experiments.config import RunConfig, read_config
from workbench.experiments.folder import (
    CONFIG,
    ITEMS,
    PROVENANCE,
    RESULTS,
    claim_folder,
    collect,
    leaves_folder,
    read_results,
)
from workbench.experiments.jobs import Job, run_jobs
from workbench.experiments.provenance import data_hash, provenance
from workbench.experiments.table import COLUMNS, ITEM_COLUMNS, join, summarise, write_parquet
from workbench.figures import Drawing, figures_of
from workbench.files import key_of, plain, write_json
from workbench.models import open_model, weights_hash
from workbench.progress import Report

BASE, NEVER = "base", "never-learned"
CONTROLS = (BASE, NEVER)


RUN = "run"


def drawings_of(folders: Sequence[Path]) -> dict[str, Drawing]:
    """The figures of what was asked in ``folders``, from the registry."""
    found = (figures_of(experiment_of(folder)) for folder in folders)
    return {name: entry for entries in found for name, entry in entries.items()}


def experiment_of(folder: Path) -> str:
    """Which command made a folder: :data:`RUN` is the demo, a sweep, or an investigation.

    Raises:
        WorkbenchError: the folder holds no finished run.
    """
    read_results(folder)
    values = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    return str(values.get("experiment", RUN))


def read_runs(folders: Sequence[Path]) -> tuple[RunConfig, pd.DataFrame, pd.DataFrame]:
    """The tables of a finished run together with those of what was asked of its models afterwards.

    Args:
        folders: the run, and folders of ``relearn``, ``triggers``, ``sharpness`` and the like on it,
            in any order. Stages of a later one take the place of the same stages of the run.

    Returns:
        The run's configuration, results and items.

    Raises:
        WorkbenchError: one of them is not finished, no run is among them, or they are not of one run.
    """
    config, parts = None, []
    for folder in folders:
        tables = read_results(folder)
        values = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if "experiment" in values:
            parts.append((folder, values.get("of"), tables))
            continue
        if config is not None:
            raise WorkbenchError(
                f"{folder} and {config[0]} are two runs; give one of them, and what was asked of its models"
            )
        config = (folder, read_config(folder / CONFIG), tables)
    if config is None:
        raise WorkbenchError(
            f"{', '.join(map(str, folders))}: the run itself is not among them; give its folder as well"
        )
    run, found, (results, items) = config
    for folder, of, (more, single) in parts:
        if of != found.key:
            raise WorkbenchError(f"{folder} was not asked of the models of {run}")
        again = set(more["stage"].dropna())
        results = join([results[~results["stage"].isin(again)], more], COLUMNS)
        items = join([items[~items["stage"].isin(again)], single], ITEM_COLUMNS)
    return found, results, items


ModelJob = Callable[[Path, Path, str, RunConfig, str, int, Report], None]
"""``job(run, out, key, config, model, seed, progress)``: all stages of one model."""


def bench_of(run: Path, config: RunConfig) -> tuple[Bench, World]:
    """The base of a finished run with the texts of its world."""
    world = world_of(config.model)
    base = open_model(run / "models" / BASE)
    return Bench(base.model, base.tokenizer, world.record), world


def finished(run: Path, methods: Sequence[str]) -> tuple[RunConfig, tuple[str, ...]]:
    """The configuration of a finished run and the chosen ones of its methods (default all).

    Raises:
        WorkbenchError: the run is not finished, or has no such method.
    """
    read_results(run)
    config = read_config(run / CONFIG)
    for name in methods:
        if name not in config.methods:
            raise unknown(f"method in {run}", name, config.methods)
    return config, tuple(methods) or config.methods


@leaves_folder
def ask_models(
    experiment: str,
    run: Path,
    out: Path,
    job: ModelJob,
    summaries: Sequence[Callable[[pd.DataFrame, pd.DataFrame, str], pd.DataFrame]],
    *,
    methods: Sequence[str],
    fresh: bool,
    workers: int | None,
    announce: Callable[[str], None],
    settings: Mapping[str, Any] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run ``job`` on every chosen model and control of a finished run, and write the results.

    Args:
        experiment: its name, in the configuration and on the progress bar.
        run: a finished run on the built-in world.
        out: folder of the experiment.
        job: see :data:`ModelJob`; must be picklable.
        summaries: ``(rows, items, key) -> rows`` over all seeds, besides recall and answer probability.
        methods: of the run; default all.
        fresh: throw away an experiment that is already there.
        workers: processes; default is one per core.
        announce: called with one line.
        settings: whatever else decides the numbers.

    Returns:
        Results and items.
    """
    config, chosen = finished(run, methods)
    values = plain(
        {
            "experiment": experiment,
            "of": config.key,
            "methods": chosen,
            "seeds": config.seeds,
            **(settings or {}),
        }
    )
    key = key_of(values)
    claim_folder(out, yaml.safe_dump(values, sort_keys=False), fresh=fresh)
    names = [*chosen, *(name for name in CONTROLS if (run / "models" / name).is_dir())]
    announce(f"{experiment}: {len(names)} models x {len(config.seeds)} seeds")
    jobs: dict[str, Job] = {
        f"{name}-seed{seed}": partial(job, run, out, key, config, name, seed)
        for seed in config.seeds
        for name in names
    }
    run_jobs(experiment, jobs, workers=workers)
    rows, items = collect(out)
    results = join(
        [rows, summarise(items, key), *(summary(rows, items, key) for summary in summaries)],
        COLUMNS,
    )
    write_parquet(results, out / RESULTS)
    write_parquet(items, out / ITEMS)
    record = bench_of(run, config)[0].record
    weights = {
        folder.name: weights_hash(folder)
        for folder in sorted((run / "models").iterdir())
        if folder.is_dir()
    }
    texts = {
        "forget": data_hash(record.forget),
        **{name: data_hash(examples) for name, examples in record.retain_test.items()},
    }
    write_json(out / PROVENANCE, provenance(values, data=texts, weights=weights))
    return results, items
