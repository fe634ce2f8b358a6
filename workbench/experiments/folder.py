"""The run folder: what is in it, what of it is finished, and whose it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench.errors import WorkbenchError
from workbench.experiments.table import COLUMNS, ITEM_COLUMNS, Table, join
from workbench.files import full_disk_is_an_error, write_folder, write_text

CONFIG, PROVENANCE, RESULTS, ITEMS, REPORT = (
    "config.yaml",
    "provenance.json",
    "results.parquet",
    "items.parquet",
    "report.html",
)
_OWN = (
    CONFIG,
    PROVENANCE,
    RESULTS,
    ITEMS,
    REPORT,
    "claims.json",
    "models",
    "figures",
    "stages",
    "subspaces",
)


@dataclass(frozen=True, repr=False)
class Experiment:
    """A finished experiment; a notebook shows its table.

    Attributes:
        folder: its folder.
        results: tidy rows.
        items: rows of single facts, prompts or passages.
        table: from ``results`` to what people read.
    """

    folder: Path
    results: pd.DataFrame
    items: pd.DataFrame
    table: Callable[[pd.DataFrame], pd.DataFrame]

    def __repr__(self) -> str:
        return f"Experiment({self.folder}: {len(self.results):,} rows, {self.items['item'].nunique()} items)"

    def _repr_html_(self) -> str:
        return str(self.table(self.results).to_html(index=False, escape=True))


def claim_folder(out: Path, config_text: str, *, fresh: bool) -> None:
    """Make ``out`` the folder of a run with this configuration, or go on with the run of the same configuration that is there.

    Raises:
        WorkbenchError: the folder holds something else: files of no run, or a run of another configuration.
    """
    if out.exists() and not out.is_dir():
        raise WorkbenchError(f"{out} is a file; give a folder for --out")
    marker = out / CONFIG
    if fresh and marker.is_file():
        for name in _OWN:
            path = out / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != config_text:
            raise WorkbenchError(
                f"{out} holds a run with another configuration; choose another --out, or add --fresh to throw that run away"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise WorkbenchError(
            f"{out} is not empty and holds no run of the workbench; choose another --out"
        )
    with full_disk_is_an_error(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(marker, config_text)


def stage_path(out: Path, job: str, stage: str) -> Path:
    """Where the rows of one finished stage of one job are kept."""
    return out / "stages" / job / stage


def finish_stage(out: Path, job: str, stage: str, table: Table) -> None:
    """Store the rows of a finished stage, whole or not at all; from then on it is not run again."""

    def write(folder: Path) -> None:
        table.frame().to_parquet(folder / "rows.parquet", index=False)
        table.item_frame().to_parquet(folder / "items.parquet", index=False)

    write_folder(stage_path(out, job, stage), write)


def run_stage(
    out: Path, job: str, stage: str, common: dict[str, object], work: Callable[[Table], None]
) -> None:
    """Run ``work`` and store its table, unless the stage is already finished."""
    if stage_path(out, job, stage).is_dir():
        return
    table = Table(dict(common))
    work(table)
    finish_stage(out, job, stage, table)


def collect(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows and items of all finished stages, in a fixed order."""
    folders = sorted(
        path
        for path in (out / "stages").glob("*/*")
        if path.is_dir() and not path.name.startswith(".")
    )
    rows = join((pd.read_parquet(folder / "rows.parquet") for folder in folders), COLUMNS)
    items = join((pd.read_parquet(folder / "items.parquet") for folder in folders), ITEM_COLUMNS)
    return rows, items


def read_results(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``results.parquet`` and ``items.parquet`` of a finished run.

    Raises:
        WorkbenchError: the folder holds no finished run.
    """
    for name in (CONFIG, RESULTS, ITEMS):
        if not (out / name).is_file():
            raise WorkbenchError(
                f"{out} holds no finished run: {name} is missing; run `workbench demo --out {out}` first"
            )
    return pd.read_parquet(out / RESULTS), pd.read_parquet(out / ITEMS)
