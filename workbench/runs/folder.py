"""The run folder: what is in it, what of it is finished, and whose it is."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import pandas as pd

from workbench.errors import WorkbenchError
from workbench.files import damage, full_disk_is_an_error, sweep, write_folder, write_text
from workbench.tables import (
    ITEM_COLUMNS,
    RESULT_COLUMNS,
    SCHEMAS,
    Table,
    join,
    read_table,
    read_tables,
    write_parquet,
    write_tables,
)

CONFIG, PROVENANCE, RESULTS, ITEMS, REPORT, CLAIMS_FILE = (
    "config.yaml",
    "provenance.json",
    "results.parquet",
    "items.parquet",
    "report.html",
    "claims.json",
)
LOCK = ".lock"
SECONDS = "seconds"
VALUES = tuple(f"{name}.parquet" for name in SCHEMAS)
_OWN = (
    PROVENANCE,
    *VALUES,
    ITEMS,
    REPORT,
    CLAIMS_FILE,
    "models",
    "figures",
    "stages",
    "subspaces",
)


def claim_folder(out: Path, config_text: str, *, fresh: bool) -> None:
    """Make ``out`` the folder of a run with this configuration, or go on with the run of the same
    configuration that is there.

    Raises:
        WorkbenchError: the folder holds something else (files of no run, a run of another
            configuration), or another process is at work in it.
    """
    if out.exists() and not out.is_dir():
        raise WorkbenchError(f"{out} is a file; give a folder for --out")
    marker = out / CONFIG
    if out.is_dir():
        sweep(out, f".{CONFIG}.")
    if not marker.is_file() and out.is_dir() and set(os.listdir(out)) - {LOCK}:
        raise WorkbenchError(
            f"{out} is not empty and holds no run of the workbench; choose another --out"
        )
    with full_disk_is_an_error(out):
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
    if marker.is_file() and fresh:
        # the marker goes last: a cleaning that is interrupted leaves a folder that is still ours
        for name in (*_OWN, CONFIG):
            path = out / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )
    if marker.is_file():
        if marker.read_bytes() != config_text.encode():
            raise WorkbenchError(
                f"{out} holds a run with another configuration; choose another --out, or add "
                "--fresh to throw that run away"
            )
        return
    write_text(marker, config_text)


_LOCKED: dict[Path, int] = {}
"""Folders that this process works in -> descriptor of their lock."""


def _lock(out: Path) -> None:
    """Keep other processes out of ``out``; the system lets go when this one ends, however it
    ends.
    """
    place = out.resolve()
    if place in _LOCKED:
        return
    descriptor = os.open(place / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise WorkbenchError(
            f"another process is at work in {out}; wait for it, or choose another --out"
        ) from error
    _LOCKED[place] = descriptor


_Made = TypeVar("_Made")
_Given = ParamSpec("_Given")


def leaves_folder(work: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """A function that claims run folders, and lets other processes in when it is through."""

    @functools.wraps(work)
    def wrapper(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        before = set(_LOCKED)
        try:
            return work(*args, **kwargs)
        finally:
            for place in set(_LOCKED) - before:
                os.close(_LOCKED.pop(place))

    return wrapper


def stage_path(out: Path, job: str, stage: str) -> Path:
    """Where the rows of one finished stage of one job are kept."""
    return out / "stages" / job / stage


def finish_stage(out: Path, job: str, stage: str, table: Table, seconds: float = 0.0) -> None:
    """Store the rows of a finished stage, whole or not at all; from then on it is not run again."""

    def write(folder: Path) -> None:
        (folder / SECONDS).write_text(f"{seconds:.3f}")
        write_tables(table.frame(), folder)
        write_parquet(table.item_frame(), folder / ITEMS)

    write_folder(stage_path(out, job, stage), write)


def stage_done(out: Path, job: str, stage: str) -> bool:
    """Whether a stage is finished and as it was written; a damaged one is thrown away, which is
    said on standard error.
    """
    folder = stage_path(out, job, stage)
    if not folder.is_dir():
        return False
    wrong = damage(folder)
    if not wrong and not (folder / RESULTS).is_file():
        wrong = f"{folder} was written by an older workbench"
    if wrong:
        print(f"{wrong}; this part is run again", file=sys.stderr)
        shutil.rmtree(folder)
    return not wrong


def run_stage(
    out: Path, job: str, stage: str, common: dict[str, object], work: Callable[[Table], None]
) -> None:
    """Run ``work`` and store its table, unless the stage is already finished."""
    if stage_done(out, job, stage):
        return
    table, start = Table(dict(common)), time.monotonic()
    work(table)
    finish_stage(out, job, stage, table, time.monotonic() - start)


def seconds_of(out: Path) -> dict[str, float]:
    """Stage -> seconds of one core that it took, over all jobs."""
    spent: dict[str, float] = {}
    for file in sorted((out / "stages").glob(f"*/*/{SECONDS}")):
        stage = file.parent.name
        spent[stage] = round(spent.get(stage, 0.0) + float(file.read_text()), 3)
    return spent


def collect(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows and items of all finished stages, in a fixed order."""
    folders = sorted(
        path
        for path in (out / "stages").glob("*/*")
        if path.is_dir() and not path.name.startswith(".")
    )
    rows = join(map(read_tables, folders), RESULT_COLUMNS)
    items = join((read_table(folder / ITEMS, ITEM_COLUMNS) for folder in folders), ITEM_COLUMNS)
    return rows, items


def require_finished(out: Path) -> None:
    """Raise unless a folder holds a finished run.

    Raises:
        WorkbenchError: the folder holds none; the message names what is missing.
    """
    for name in (CONFIG, RESULTS, ITEMS):
        if not (out / name).is_file():
            raise WorkbenchError(
                f"{out} holds no finished run: {name} is missing; run `workbench demo --out {out}` "
                "first"
            )


def read_results(out: Path | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All measured values and all items of a finished run.

    Raises:
        WorkbenchError: the folder holds no finished run, or one of an older workbench.

    Example:
        >>> results, items = read_results("runs/demo")  # doctest: +SKIP
    """
    out = Path(out)
    require_finished(out)
    return read_tables(out), read_table(out / ITEMS, ITEM_COLUMNS)
