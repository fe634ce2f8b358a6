"""The pipeline of a run: open or train, capture, unlearn, match, attack, probe, tabulate, draw,
report.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from workbench.attacks.attack import ATTACKS, Attack
from workbench.builtin import BuiltinConfig, builtin_folder, builtin_model, untrained, world_of
from workbench.claims import Verdict, decide
from workbench.errors import WorkbenchError
from workbench.files import MANIFEST, damage, write_folder, write_json
from workbench.hooks import CaptureError, layer_count
from workbench.models import save_model
from workbench.progress import ProgressCallback
from workbench.report import summary_table, write_report
from workbench.runs import stages
from workbench.runs.checkpoints import FilesConfig, record_of, resolved, sealed
from workbench.runs.config import RunConfig, write_config
from workbench.runs.folder import (
    CLAIMS_FILE,
    ITEMS,
    PROVENANCE,
    claim_folder,
    collect,
    finish_stage,
    leaves_folder,
    run_stage,
    seconds_of,
    stage_done,
    stage_path,
)
from workbench.runs.jobs import Job, run_jobs
from workbench.runs.models import (
    BASE,
    CONTROLS,
    model_of,
    model_source,
    said_of,
    setup_of,
    weights_of,
)
from workbench.runs.probing import PROBES, Probe
from workbench.runs.provenance import data_hash, provenance
from workbench.runs.setup import Disruption, Setup
from workbench.subspaces.subspace import Subspace
from workbench.tables import RESULT_COLUMNS, Table, join, summarise, write_parquet, write_tables
from workbench.unlearning.methods import recipe, settings_for


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
        return (
            f"Run({self.folder}: {len(self.config.methods)} methods, {len(self.config.seeds)} "
            f"seeds, {len(self.results):,} rows)"
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row per model: forgetting, cost, recovery, triggers, curvature."""
        return summary_table(self.results)

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False, escape=True))


def _train_job(model: BuiltinConfig, out: Path, name: str, progress: ProgressCallback) -> None:
    folder = builtin_model(model, with_forget=name == BASE, progress=progress)
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


def _subspace_job(config: RunConfig, out: Path, progress: ProgressCallback) -> None:
    if stage_done(out, "subspaces", "subspaces") and _readable(out / "subspaces"):
        return
    setup = setup_of(config, out)
    table, start = Table({"run": config.key, "model": BASE}), time.monotonic()
    for name, subspaces in stages.find_subspaces(setup, config.rank, table, seed=0).items():
        for site, subspace in subspaces.items():
            subspace.save(out / "subspaces" / name / f"{site}.safetensors")
    stages.compare_sets(setup, table)
    folder = out / "subspaces"
    names = [str(path.relative_to(folder)) for path in sorted(folder.glob("*/*.safetensors"))]
    write_json(folder / "list.json", names)
    finish_stage(out, "subspaces", "subspaces", table, time.monotonic() - start)


def _built_recipe(
    config: RunConfig, out: Path, method: str, seed: int, progress: ProgressCallback, table: Table
) -> None:
    """Unlearn with a method under one seed, and save the model."""
    setup, variant = setup_of(config, out), config.variant(method)
    method_recipe = recipe(variant.method, setup.base, seed, variant.settings)
    model = stages.unlearn_to_budget(
        setup,
        method_recipe,
        Disruption(setup, config.budget_measure, config.budget_sets),
        budget=config.budget,
        limit=config.alpha_limit,
        seed=seed,
        table=table,
        common=_retain_subspaces(out),
        dtype=getattr(torch, variant.dtype),
        progress=progress,
    )
    note = {
        "method": method,
        "recipe": variant.method,
        "dtype": variant.dtype,
        "seed": seed,
        "settings": settings_for(variant.method, setup.base, variant.settings),
        "budget": config.budget,
        "base": BASE,
    }
    save_model(model, setup.tokenizer, Path(model_source(config, out, method, seed)), note)


def _retain_subspaces(out: Path) -> dict[str, Subspace]:
    files = (out / "subspaces" / "retain").glob("*.safetensors")
    return {path.stem: Subspace.load(path) for path in files}


def _opened(config: RunConfig, out: Path, name: str, seed: int, table: Table) -> None:
    """What there is to say of a model that is opened: the base, a control, an unlearned
    checkpoint.
    """
    setup = setup_of(config, out)
    model = model_of(config, out, name, seed)
    if name != BASE and isinstance(config.model, FilesConfig):
        stages.add_distance(model, setup, _retain_subspaces(out), table)
    stages.measure_sets(
        model,
        {k: setup.encode(v) for k, v in stages.measured_sets(setup.record).items()},
        table,
        stage="unlearn",
    )


def _model_job(
    config: RunConfig, out: Path, method: str, seed: int, progress: ProgressCallback
) -> None:
    """All stages of one model: a method's under one seed, or one that is opened under the attack of
    that seed.
    """
    setup = setup_of(config, out)
    job, is_method = f"{method}-seed{seed}", method in config.methods
    common: dict[str, object] = {
        "run": config.key,
        "model": method if config.once(method) else job,
        "method": method,
        "seed": seed,
    }
    if is_method:
        folder = Path(model_source(config, out, method, seed))
        if stage_path(out, job, "unlearn").is_dir() and (wrong := damage(folder)):
            print(f"{wrong}; this part is run again", file=sys.stderr)
            # on another machine the weights may come out differently: nothing measured on them
            # stays
            shutil.rmtree(out / "stages" / job, ignore_errors=True)
        work = partial(_built_recipe, config, out, method, seed, progress)
    else:
        work = partial(_opened, config, out, method, seed)
    run_stage(out, job, "unlearn", common, work)
    model = model_of(config, out, method, seed)

    for name in ("relearn", *config.attacks):
        attacked = partial(_attacked, ATTACKS[name], model, setup, seed, config, progress)
        run_stage(out, job, name, common, attacked)
    for name in config.probes:
        probe = PROBES[name]
        # what does not depend on the seed is asked once of what is one model for all seeds
        if is_method or probe.seeded or seed == config.seeds[0]:
            run_stage(
                out,
                job,
                name,
                common | {"stage": name},
                partial(_ask, probe, model, setup, seed, config),
            )


def _attacked(
    by: Attack,
    model: PreTrainedModel,
    setup: Setup,
    seed: int,
    config: RunConfig,
    progress: ProgressCallback,
    table: Table,
) -> None:
    with ATTACKS.users(by.name):
        stages.attack(
            model,
            setup,
            config.attack,
            by=by,
            seed=seed,
            table=table,
            null_pool=setup.null_pool,
            matched=setup.world is None,
            progress=progress,
        )


def _ask(
    probe: Probe,
    model: PreTrainedModel,
    setup: Setup,
    seed: int,
    config: RunConfig,
    table: Table,
) -> None:
    with PROBES.users(probe.name):
        probe.ask(model, setup, table, seed, config)


def _checked(config: RunConfig) -> RunConfig:
    """The configuration with everything that decides the numbers, once all that can be wrong with
    its models, texts and methods has been looked at: before the folder is claimed.

    Raises:
        WorkbenchError: a wrapper does not fit its method, a setting this model (a layer that it
            does not have), a checkpoint the base; a file is missing.
    """
    config = config.with_plugins()
    if isinstance(config.model, FilesConfig):
        sealed_config, base = sealed(config.model, config.checkpoints)
        checkpoints = {name: resolved(source) for name, source in config.checkpoints.items()}
        config = config.model_copy(update={"model": sealed_config, "checkpoints": checkpoints})
        record_of(sealed_config, base)
        model = base.model
    else:
        model = untrained(config.model, world_of(config.model))[0]
    try:
        layer_count(model)
        for name in config.methods:
            variant = config.variant(name)
            recipe(variant.method, model, config.seeds[0], variant.settings)
    except CaptureError as error:
        model_source = config.model.base if isinstance(config.model, FilesConfig) else name
        raise WorkbenchError(f"{model_source}: {error}") from error
    return config


@leaves_folder
def run_pipeline(
    config: RunConfig,
    out: Path,
    *,
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Run:
    """Run everything that is not finished yet, and write the run folder.

    A killed run continues at its last finished stage when it is started again with the same
    configuration and folder.

    Args:
        config: what to run.
        out: the run folder.
        fresh: throw away a run that is already there.
        workers: processes; default is one per core.
        announce: called with one line before every part.

    Raises:
        WorkbenchError: the folder belongs to something else, the disk is full, or a part failed
            (the message names it).
    """
    config = _checked(config)
    claim_folder(out, write_config(config), fresh=fresh)
    if isinstance(config.model, BuiltinConfig):
        _train(config, config.model, out, workers, announce)
    announce("subspaces of the base")
    run_jobs("subspaces", {"subspaces": partial(_subspace_job, config, out)}, workers=1)

    announce(
        f"{len(config.studied)} models x {len(config.seeds)} seeds: "
        + ("unlearn, match the budget, " if config.methods else "")
        + ", ".join(("attack", *config.attacks, *config.probes))
    )
    jobs: dict[str, Job] = {
        f"{method}-seed{seed}": partial(_model_job, config, out, method, seed)
        for seed in config.seeds
        for method in (*config.studied, *config.controls)
    }
    run_jobs("models", jobs, workers=workers)
    announce("tables, figures and report")
    return _conclude(config, out)


def _train(
    config: RunConfig,
    model: BuiltinConfig,
    out: Path,
    workers: int | None,
    announce: Callable[[str], None],
) -> None:
    """Train the base and the never-learned control of the built-in world, or copy them from the
    cache.
    """
    model_folders = {name: out / "models" / name for name in CONTROLS}
    missing = [
        name for name, folder in model_folders.items() if not folder.is_dir() or damage(folder)
    ]
    cached = all(
        (builtin_folder(model, with_forget=name == BASE) / "config.json").is_file()
        for name in missing
    )
    announce(
        "base and never-learned control: "
        + ("from the cache" if cached else "training (only the first time)")
    )
    run_jobs(
        "training",
        {name: partial(_train_job, model, out, name) for name in missing},
        workers=workers,
    )


def _conclude(config: RunConfig, out: Path) -> Run:
    rows, items = collect(out)
    results = write_tables(join([rows, summarise(items, config.key)], RESULT_COLUMNS), out)
    write_parquet(items, out / ITEMS)
    setup = setup_of(config, out)
    texts = {
        "forget-attacked": setup.record.forget_attacked,
        "forget-heldout": setup.record.forget_heldout,
        **setup.record.retain,
    }
    record = provenance(
        config.plain(),
        data={name: data_hash(examples) for name, examples in texts.items()},
        weights=weights_of(config, out),
    )
    # kept, so that the report can be written again without the texts
    said = said_of(config, setup)
    write_json(out / PROVENANCE, record | {"report": said, "seconds": seconds_of(out)})
    claims = decide(results, items, scale=config.scale)
    write_json(out / CLAIMS_FILE, [claim.plain() for claim in claims])
    write_report(out, results, items, claims, **said)
    return Run(out, config, results, items, claims)
