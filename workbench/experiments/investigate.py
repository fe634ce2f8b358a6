"""Bring your own checkpoints: unlearn a model on two text files, and investigate what unlearning
did from two folders alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from workbench import metrics, values
from workbench.attacks.relearn import at_steps
from workbench.data.readers import record_from_files
from workbench.errors import WorkbenchError
from workbench.files import sha256
from workbench.hooks.errors import CaptureError
from workbench.models import OpenedModel, open_model, parameter_count, save_model
from workbench.progress import bar
from workbench.runs import stages
from workbench.runs.checkpoints import FilesConfig, origin
from workbench.runs.config import RunConfig
from workbench.runs.pipeline import Run, run_pipeline
from workbench.runs.settings import AttackChoice, Columns, Count, Rate, Seeds, validated
from workbench.runs.setup import Disruption, Setup
from workbench.tables import Table
from workbench.unlearning.methods import SMALL_MODEL, recipe, settings_for
from workbench.unlearning.recipe import Setting


class InvestigateSettings(AttackChoice):
    """What decides the numbers of an investigation.

    Attributes:
        base: folder or hub id of the model before unlearning.
        unlearned: folder or hub id of the model after it.
        forget: file of texts that were to be forgotten.
        retain: file of texts that were to be kept.
        never_learned: a model trained without the forget set, if there is one.
        seeds: of the attack and of the trigger words.
        max_tokens: length of a piece of text.
        limit: pieces read per file.
        rank: directions kept of every subspace.
        slice_points: positions along every slice.
        slice_reach: half-width of the slices, as a share of the weights' norm.
        curvature_tolerance: of the Hessian's extreme eigenvalues.
        columns: of the two files, see :func:`workbench.data.readers.read_examples`.
        chat: likewise.
    """

    base: str = Field(description="Folder or hub id of the model before unlearning.")
    unlearned: str = Field(description="Folder or hub id of the model after it.")
    forget: str = Field(
        description="File of texts that were to be forgotten: .txt, .jsonl, .json, .csv or "
        ".parquet."
    )
    retain: str = Field(description="File of texts that were to be kept.")
    never_learned: str | None = Field(
        None, description="A model trained without the forget set, if there is one."
    )
    seeds: Seeds = Field((0, 1, 2), description="Seeds of the attack: how many, or which.")
    attack_steps: Count = Field(30, description="Steps of the relearning attack.")
    attack_lr: Rate | None = Field(
        None, description="Its AdamW rate; default 2e-4 below 100 million parameters, 1e-5 above."
    )
    max_tokens: int = Field(
        96, ge=8, le=values.MOST_ROWS, description="Texts are cut into pieces of so many tokens."
    )
    limit: int = Field(96, ge=2, le=values.MOST_ROWS, description="Pieces read per file.")
    rank: Count = Field(32, description="Directions kept of every subspace.")
    slice_points: int = Field(13, ge=3, le=10_001, description="Positions along every slice.")
    slice_reach: float = Field(
        0.05, gt=0, le=1e6, description="Half-width of slices, as a share of the weights' norm."
    )
    curvature_tolerance: float = Field(
        0.05, gt=0, lt=1, description="Of the Hessian's extreme eigenvalues."
    )
    columns: Columns | None = Field(
        None, description="question=NAME,answer=NAME: columns to read; or text=NAME."
    )
    chat: bool = Field(False, description="Render questions with the model's chat template.")


def attack_rate(parameters: int) -> float:
    """AdamW's rate for an attack on a model of so many parameters: 2e-4 below 100 million, where
    lower rates bring nothing back in 30 steps, 1e-5 above (as published attacks on billions).
    """
    return 2e-4 if parameters < SMALL_MODEL else 1e-5


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
        retain: texts to keep; half of them train the retain term, the other half measures the
            disruption.
        out: folder to write; must not exist or be empty.
        seed: of the method.
        budget: disruption budget (KL to the base on the measured half, nats per token); ``None``
            keeps the delta as trained.
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
    setup = Setup(opened.model, opened.tokenizer, record, max_tokens)
    table = Table({"run": "unlearn", "model": "unlearned", "method": method, "seed": seed})
    method_recipe = _with_names(opened, lambda: recipe(method, opened.model, seed, overrides))
    model = stages.unlearn_to_budget(
        setup,
        method_recipe,
        Disruption(setup),
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
        {name: setup.encode(examples) for name, examples in stages.measured_sets(record).items()},
        before,
        stage="unlearn",
    )
    losses = {
        "before": _losses(before.frame()),
        "after": _losses(rows[rows["stage"] == "unlearn"]),
    }
    note: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "settings": settings,
        "base": base,
        "base_weights": origin(base),
        "budget": budget,
        "alpha": value("alpha"),
        "disruption": value("disruption"),
        "budget_reached": budget is not None and bool(value("budget_reached")),
        "loss": losses,
        "forget": sha256(forget),
        "retain": sha256(retain),
    }
    save_model(model, opened.tokenizer, out, note)
    return note


def _losses(rows: pd.DataFrame) -> dict[str, float]:
    chosen = metrics.LOSS.rows(rows)
    return dict(zip(chosen["split"], chosen["value"].astype(float), strict=True))


def _with_names(opened: OpenedModel, build: Callable[[], Any]) -> Any:
    """Run ``build``, and turn a site that this architecture does not have into an input error."""
    try:
        return build()
    except CaptureError as error:
        raise WorkbenchError(f"{opened.name}: {error}") from error


def investigation(settings: InvestigateSettings) -> RunConfig:
    """The run that an investigation is: no method, one checkpoint that is opened.

    Raises:
        WorkbenchError: the base cannot be opened.
    """
    lr = settings.attack_lr
    if lr is None:
        lr = attack_rate(parameter_count(settings.base))
    files = FilesConfig(
        base=settings.base,
        forget=settings.forget,
        retain=settings.retain,
        never_learned=settings.never_learned,
        max_tokens=settings.max_tokens,
        limit=settings.limit,
        columns=settings.columns,
        chat=settings.chat,
    )
    fields: dict[str, Any] = {
        "scale": f"{Path(settings.unlearned).name} against {Path(settings.base).name}",
        "model": files,
        "methods": (),
        "checkpoints": {"unlearned": settings.unlearned},
        "seeds": settings.seeds,
        "budget": None,
        "attacks": settings.attack,
        "attack": settings.attack_from(at_steps(settings.attack_steps, lr)),
        "slice_points": settings.slice_points,
        "slice_reach": settings.slice_reach,
        "rank": settings.rank,
        "curvature_tolerance": settings.curvature_tolerance,
    }
    return validated(RunConfig, fields, "workbench investigate")


def investigate(
    out: Path | str,
    settings: InvestigateSettings | None = None,
    *,
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> Run:
    """The diagnostics of the demo on two checkpoints and two text files.

    Without a never-learned model the attack has its null arm and random facts; the report says so.

    Args:
        out: run folder.
        settings: what is investigated, and how.
        fresh: throw away an investigation that is already there.
        workers: processes, each with its own models; default is one per core.
        announce: called with one line before every part.
        fields: of the settings, by name; they win over ``settings``.

    Raises:
        WorkbenchError: a model, a file or the folder is wrong, or the checkpoints do not fit each
            other.
    """
    given_fields = {} if settings is None else settings.model_dump(exclude_unset=True)
    chosen_settings = validated(InvestigateSettings, given_fields | fields, "investigate")
    config = investigation(chosen_settings)
    return run_pipeline(config, Path(out), fresh=fresh, workers=workers, announce=announce)
