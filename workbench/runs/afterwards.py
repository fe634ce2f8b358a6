"""Tables of finished runs, and of what was asked of their models afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from workbench.errors import WorkbenchError
from workbench.figures import Drawing, figures_of
from workbench.runs.config import RunConfig, read_config
from workbench.runs.folder import CONFIG, read_results
from workbench.tables import COLUMNS, ITEM_COLUMNS, join

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


def read_run(folder: Path) -> tuple[RunConfig, pd.DataFrame, pd.DataFrame]:
    """Configuration, results and items of a finished run.

    Raises:
        WorkbenchError: the folder holds none, or the folder of another experiment.
    """
    results, items = read_results(folder)
    made = experiment_of(folder)
    if made != RUN:
        raise WorkbenchError(
            f"{folder} holds the experiment {made}, and no run of methods or checkpoints; give the "
            "folder of a demo, a sweep or an investigation"
        )
    return read_config(folder / CONFIG), results, items


def join_afterwards(
    results: pd.DataFrame, items: pd.DataFrame, more: pd.DataFrame, single: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of a run with those of what was asked of its models afterwards, whose stages take
    the place of the same stages of the run.
    """
    again = set(more["stage"].dropna())
    return (
        join([results[~results["stage"].isin(again)], more], COLUMNS),
        join([items[~items["stage"].isin(again)], single], ITEM_COLUMNS),
    )


Tables = tuple[RunConfig, pd.DataFrame, pd.DataFrame]
"""Configuration, results and items."""


def read_several(folders: Sequence[Path]) -> list[Tables]:
    """The tables of several finished runs, each with what was asked of its models afterwards.

    Args:
        folders: runs, and folders of experiments on them, in any order.

    Raises:
        WorkbenchError: one of them is not finished, a run is there twice, or what was asked belongs
            to none of the runs.
    """
    runs = [folder for folder in folders if experiment_of(folder) == RUN]
    found: dict[str, list[Path]] = {}
    for run in runs:
        key = read_run(run)[0].key
        if key in found:
            raise WorkbenchError(f"{run} and {found[key][0]} are the same run; give one of them")
        found[key] = [run]
    for folder in folders:
        if folder not in runs:
            values = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
            if values.get("of") not in found:
                names = ", ".join(map(str, runs)) or "any run, and none was given"
                raise WorkbenchError(f"{folder} was not asked of the models of {names}")
            found[values["of"]].append(folder)
    return [read_runs(parts) for parts in found.values()]


def read_runs(folders: Sequence[Path]) -> tuple[RunConfig, pd.DataFrame, pd.DataFrame]:
    """The tables of a finished run together with those of what was asked of its models afterwards.

    Args:
        folders: the run, and folders of ``relearn``, ``triggers``, ``sharpness`` and the like on
            it, in any order. Stages of a later one take the place of the same stages of the run.

    Returns:
        The run's configuration, results and items.

    Raises:
        WorkbenchError: one of them is not finished, no run is among them, or they are not of one
            run.
    """
    own, parts = None, []
    for folder in folders:
        if experiment_of(folder) != RUN:
            values = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
            parts.append((folder, values.get("of"), read_results(folder)))
        elif own is not None:
            raise WorkbenchError(
                f"{folder} and {own[0]} are two runs; give one of them, and what was asked of its "
                "models"
            )
        else:
            own = folder, *read_run(folder)
    if own is None:
        raise WorkbenchError(
            f"{', '.join(map(str, folders))}: the run itself is not among them; give its folder as "
            "well"
        )
    run, config, results, items = own
    for folder, of, (more, single) in parts:
        if of != config.key:
            raise WorkbenchError(f"{folder} was not asked of the models of {run}")
        results, items = join_afterwards(results, items, more, single)
    return config, results, items
