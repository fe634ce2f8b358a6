"""One way to run every experiment: settings, key, folder, jobs, resuming, tables, figures, claims,
provenance. An experiment says what is asked, of what, and how the answers are summed up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
import yaml
from transformers import PreTrainedModel

from workbench.builtin import BuiltinConfig
from workbench.claims import Verdict, decide
from workbench.data.records import Example
from workbench.errors import WorkbenchError, unknown
from workbench.figures import figures_of
from workbench.files import key_of, plain, write_json
from workbench.hooks.brief import brief
from workbench.progress import ProgressCallback, quiet
from workbench.registry import Registry, source_of
from workbench.report.report import draw_figures
from workbench.runs.config import RunConfig
from workbench.runs.finished import config_of, join_experiment
from workbench.runs.folder import (
    CLAIMS_FILE,
    ITEMS,
    PROVENANCE,
    claim_folder,
    collect,
    leaves_folder,
    read_results,
    run_stage,
    seconds_of,
)
from workbench.runs.jobs import Job, run_jobs
from workbench.runs.models import CONTROLS, model_of, model_source, setup_of, weights_of
from workbench.runs.provenance import data_hash, provenance
from workbench.runs.settings import FinishedRunSettings, Settings, validated
from workbench.runs.setup import Setup
from workbench.tables import RESULT_COLUMNS, Table, join, summarise, write_parquet, write_tables
from workbench.values import labels

SettingsType = TypeVar("SettingsType", bound=Settings)
Summary = Callable[[pd.DataFrame, pd.DataFrame, str], pd.DataFrame]
"""``(rows, items, key) -> rows``: what is known only when all jobs are through."""


@brief
@dataclass(frozen=True)
class JobContext:
    """Where one job works.

    Attributes:
        out: folder of the experiment.
        key: of the experiment.
        job: name of the job.
        columns: values that all of its rows share.
        progress: of the job.
    """

    out: Path
    key: str
    job: str
    columns: Mapping[str, object]
    progress: ProgressCallback = quiet

    def stage(self, name: str, work: Callable[[Table], None]) -> None:
        """Run ``work`` and keep its rows, unless that was done before."""
        run_stage(self.out, self.job, name, {"run": self.key, **self.columns}, work)


@brief
@dataclass(frozen=True)
class Phase:
    """Jobs that may run side by side.

    Attributes:
        label: on the progress bar.
        announcement: one line before it starts.
        jobs: name -> what is done, given a :class:`JobContext`; must be picklable.
    """

    label: str
    announcement: str
    jobs: Mapping[str, Callable[[JobContext], None]]


@brief
@dataclass(frozen=True)
class Plan:
    """What an experiment with given settings does, once everything that can be wrong was looked at.

    Attributes:
        phases: one after another.
        texts: name -> texts, whose hashes go into the provenance.
        weights: finds name -> hash of all models, when all is through.
        summaries: rows over all jobs, besides recall and answer probability over the seeds.
        claims: ids of the claims that it decides.
        scale: shown beside every verdict.
    """

    phases: Sequence[Phase]
    texts: Mapping[str, Sequence[Example]]
    weights: Callable[[], Mapping[str, str]]
    summaries: Sequence[Summary] = ()
    claims: Sequence[str] = ()
    scale: str = ""


@brief
@dataclass(frozen=True)
class Source:
    """A finished run, as experiments on its models see it.

    Attributes:
        folder: of the run.
        config: its configuration.
        methods: of its unlearned models, those that are asked.
    """

    folder: Path
    config: RunConfig
    methods: tuple[str, ...]

    @property
    def setup(self) -> Setup:
        """Its base and its texts."""
        return setup_of(self.config, self.folder)

    @cached_property
    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Its results and items."""
        return read_results(self.folder)


@brief
@dataclass(frozen=True)
class ModelJob:
    """One model of a run under one seed, in the job that asks it.

    Attributes:
        source: the run.
        name: a method, a checkpoint's label, ``base`` or ``never-learned``.
        seed: of unlearning and of whatever is drawn.
        context: where the rows go.
    """

    source: Source
    name: str
    seed: int
    context: JobContext

    @property
    def setup(self) -> Setup:
        """The base and the texts of the run."""
        return self.source.setup

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model; the base is the one that all jobs share: change a copy."""
        return model_of(self.source.config, self.source.folder, self.name, self.seed)

    @property
    def is_control(self) -> bool:
        """Whether it is the base or the never-learned model."""
        return self.name in CONTROLS

    @property
    def first(self) -> bool:
        """Whether the seed is the first of the run."""
        return self.seed == self.source.config.seeds[0]


def phase_over_models(
    experiment: str,
    source: Source,
    ask: Callable[[ModelJob], None],
    *,
    seeded: bool = True,
) -> Phase:
    """A job for every model of a run under every seed.

    Args:
        experiment: its name: the stage of its rows, and the label of the bar.
        source: the run.
        ask: measures one model; must be picklable.
        seeded: what is found in the base, in the never-learned model and in a checkpoint that was
            opened depends on the seed; else these are asked once.
    """
    config = source.config
    names = (*source.methods, *config.controls)
    jobs: dict[str, Callable[[JobContext], None]] = {
        f"{name}-seed{seed}": partial(_run_model_job, ask, source, name, seed, experiment)
        for seed in config.seeds
        for name in names
        if seeded or seed == config.seeds[0] or not config.once(name)
    }
    line = f"{experiment}: {len(names)} models x {len(config.seeds)} seeds"
    return Phase(experiment, line, jobs)


def _run_model_job(
    ask: Callable[[ModelJob], None],
    source: Source,
    name: str,
    seed: int,
    experiment: str,
    context: JobContext,
) -> None:
    columns = {"stage": experiment, "model": name, "method": name, "seed": seed}
    model_context = JobContext(context.out, context.key, context.job, columns, context.progress)
    ask(ModelJob(source, name, seed, model_context))


def plan_over_models(
    experiment: str,
    source: Source,
    ask: Callable[[ModelJob], None],
    *,
    seeded: bool = True,
    texts: Mapping[str, Sequence[Example]] | None = None,
    summaries: Sequence[Summary] = (),
    claims: Sequence[str] = (),
    note: str = "",
) -> Plan:
    """The plan of an experiment that asks every model of a run the same; see
    :func:`phase_over_models`.

    Args:
        experiment: its name.
        source: the run.
        ask: measures one model.
        seeded: see :func:`phase_over_models`.
        texts: see :class:`Plan`; default forget and retain set of the run.
        summaries: likewise.
        claims: likewise.
        note: added to the scale of the run.
    """
    record = source.setup.record
    return Plan(
        [phase_over_models(experiment, source, ask, seeded=seeded)],
        texts or {"forget": record.forget, **record.retain_test},
        partial(weights_of, source.config, source.folder),
        summaries,
        claims,
        source.config.scale + note,
    )


@brief
@dataclass(frozen=True)
class Experiment(Generic[SettingsType]):
    """An entry of the registry of experiments.

    Attributes:
        name: of the command, of the stage of its rows and of its default folder.
        question: in one line.
        settings: their class; its fields are the options of the command, the fields of a YAML file
            and the keywords of :func:`run`.
        prepare: ``(settings, source, out) -> plan``; says everything that is wrong before anything
            is written. ``source`` is ``None`` where the experiment needs no run.
        table: from ``results`` to what people read.
        shown: columns of that table that fit a terminal; ``None`` for all.
        by: column of that table by whose values it is printed in parts.
    """

    name: str
    question: str
    settings: type[SettingsType]
    prepare: Callable[[SettingsType, Any, Path], Plan]
    table: Callable[[pd.DataFrame], pd.DataFrame]
    shown: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    by: str | None = None

    @property
    def needs_run(self) -> bool:
        """Whether it asks the models of a finished run."""
        return issubclass(self.settings, FinishedRunSettings)


COMMANDS = (
    "demo",
    "sweep",
    "unlearn",
    "investigate",
    "claims",
    "figures",
    "report",
    "predictors",
    "methods",
    "metrics",
    "sites",
    "run",
)
"""Names that an experiment cannot have: other commands, and what a folder without an experiment is.
"""
EXPERIMENTS: Registry[Experiment[Any]] = Registry(
    "experiment", "workbench.experiments.all", "workbench.experiments"
)


def experiment(entry: Experiment[SettingsType]) -> Experiment[SettingsType]:
    """Add an experiment of a user's own: it becomes a command.

    Raises:
        WorkbenchError: the workbench has an experiment or a command of this name.
    """
    labels("experiment", [entry.name], taken=COMMANDS)
    EXPERIMENTS.add(entry)
    return entry


@dataclass(frozen=True, repr=False)
class Result:
    """A finished experiment; a notebook shows its table.

    Attributes:
        experiment: what was run.
        folder: its folder.
        settings: with which it was run.
        results: tidy rows.
        items: rows of single facts, prompts or passages.
        claims: verdicts.
        figures: name -> files.
    """

    experiment: Experiment[Any]
    folder: Path
    settings: Settings
    results: pd.DataFrame
    items: pd.DataFrame
    claims: tuple[Verdict, ...] = ()
    figures: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    @cached_property
    def table(self) -> pd.DataFrame:
        """What people read."""
        return self.experiment.table(self.results)

    def __repr__(self) -> str:
        items = self.items["item"].nunique()
        return (
            f"Result({self.experiment.name} in {self.folder}: {len(self.results):,} rows, {items} "
            "items)"
        )

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False, escape=True))

    def plain(self) -> dict[str, Any]:
        """As plain values: folder, table, claims, figures."""
        return {
            "folder": str(self.folder),
            "table": self.table.to_dict(orient="records"),
            "claims": [verdict.plain() for verdict in self.claims],
            "figures": {name: [str(p) for p in files] for name, files in self.figures.items()},
        }


@leaves_folder
def run(
    experiment: Experiment[SettingsType] | str,
    out: Path | str,
    settings: SettingsType | None = None,
    *,
    of: Path | str | None = None,
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> Result:
    """Run an experiment; one that was killed goes on at its last finished stage.

    Args:
        experiment: an entry of :data:`EXPERIMENTS`, or its name.
        out: its folder.
        settings: default those of the experiment.
        of: the finished run whose models are asked, where the experiment needs one.
        fresh: throw away what is already in the folder.
        workers: processes; default is one per core.
        announce: called with one line before every part.
        fields: of the settings, by name; they win over ``settings``.

    Raises:
        WorkbenchError: settings, run or folder are wrong, the disk is full, or a part failed.

    Example:
        >>> run("ladder", "runs/ladder", of="runs/demo", attack_steps=10)  # doctest: +SKIP
    """
    entry: Experiment[Any] = EXPERIMENTS[experiment] if isinstance(experiment, str) else experiment
    given_fields = {} if settings is None else settings.model_dump(exclude_unset=True)
    settings_chosen = validated(entry.settings, given_fields | fields, entry.name)
    folder = Path(out)
    source = _source(entry, settings_chosen, of)
    plan = entry.prepare(settings_chosen, source, folder)
    values: dict[str, Any] = {"experiment": entry.name}
    if entry.name in EXPERIMENTS.added():
        values |= {"plugin": asdict(source_of(entry))}
    if source is not None:
        values |= {"of": source.config.key, "seeds": list(source.config.seeds)}
    values |= plain(settings_chosen.model_dump(mode="json"))
    if source is not None:
        values |= {"methods": list(source.methods)}
    key = key_of(values)
    claim_folder(folder, yaml.safe_dump(values, sort_keys=False), fresh=fresh)
    for phase in plan.phases:
        announce(phase.announcement)
        jobs: dict[str, Job] = {
            name: partial(_work, work, folder, key, name) for name, work in phase.jobs.items()
        }
        run_jobs(phase.label, jobs, workers=workers)
    announce("tables and figures")
    return _conclude(entry, settings_chosen, plan, source, folder, key, values)


def _source(entry: Experiment[Any], settings: Settings, of: Path | str | None) -> Source | None:
    if not isinstance(settings, FinishedRunSettings):
        if of is not None:
            raise WorkbenchError(f"{entry.name} asks no run; leave {of} out")
        return None
    if of is None:
        raise WorkbenchError(f"{entry.name} asks the models of a finished run; give its folder")
    run = Path(of)
    config = config_of(run)
    for name in settings.methods:
        if name not in config.studied:
            raise unknown(f"method in {run}", name, config.studied)
    source = Source(run, config, settings.methods or config.studied)
    if isinstance(config.model, BuiltinConfig):
        for seed in config.seeds:
            for name in (*source.methods, *config.controls):
                place = Path(model_source(config, run, name, seed))
                if not place.is_dir():
                    raise WorkbenchError(
                        f"{run} holds no model {place.name}; run the same command again that made "
                        "it, or give another run"
                    )
    return source


def _work(
    work: Callable[[JobContext], None], out: Path, key: str, name: str, progress: ProgressCallback
) -> None:
    work(JobContext(out, key, name, {}, progress))


def _conclude(
    entry: Experiment[Any],
    settings: Settings,
    plan: Plan,
    source: Source | None,
    out: Path,
    key: str,
    values: Mapping[str, Any],
) -> Result:
    rows, items = collect(out)
    more = [summary(rows, items, key) for summary in plan.summaries]
    results = join([rows, summarise(items, key), *more], RESULT_COLUMNS)
    results = write_tables(results, out)
    write_parquet(items, out / ITEMS)
    texts = {name: data_hash(examples) for name, examples in plan.texts.items()}
    record = provenance(values, data=texts, weights=plan.weights())
    write_json(out / PROVENANCE, record | {"seconds": seconds_of(out)})
    tables = results, items
    if source is not None:
        tables = join_experiment(*source.tables, results, items)
    claims = decide(*tables, scale=plan.scale, ids=plan.claims) if plan.claims else ()
    write_json(out / CLAIMS_FILE, [claim.plain() for claim in claims])
    figures = draw_figures(out / "figures", tables[0], drawings=figures_of(entry.name))
    return Result(entry, out, settings, results, items, claims, figures)
