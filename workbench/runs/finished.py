"""Tables of finished runs, and of what was asked of their models afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from workbench.errors import WorkbenchError
from workbench.figures import Drawing, figures_of
from workbench.runs.config import RunConfig, read_config
from workbench.runs.folder import CONFIG, read_results, require_finished
from workbench.tables import ITEM_COLUMNS, RESULT_COLUMNS, join

RUN = "run"


def drawings_of(folders: Sequence[Path]) -> dict[str, Drawing]:
    """The figures of what was asked in ``folders``, from the registry."""
    found = (figures_of(experiment_of(folder)) for folder in folders)
    return {name: entry for entries in found for name, entry in entries.items()}


def _written_config(folder: Path) -> dict[str, Any]:
    """The configuration of a finished folder, as it was written.

    Raises:
        WorkbenchError: the folder holds nothing finished.
    """
    require_finished(folder)
    return dict(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))


def experiment_of(folder: Path) -> str:
    """Which command made a folder: :data:`RUN` is the demo, a sweep, or an investigation.

    Raises:
        WorkbenchError: the folder holds no finished run.
    """
    return str(_written_config(folder).get("experiment", RUN))


def config_of(folder: Path) -> RunConfig:
    """The configuration of a finished run.

    Raises:
        WorkbenchError: the folder holds none, or the folder of another experiment.
    """
    experiment = experiment_of(folder)
    if experiment != RUN:
        raise WorkbenchError(
            f"{folder} holds the experiment {experiment}, and no run of methods or checkpoints; "
            "give the folder of a demo, a sweep or an investigation"
        )
    return read_config(folder / CONFIG)


def join_experiment(
    results: pd.DataFrame, items: pd.DataFrame, more: pd.DataFrame, single: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of a run with those of what was asked of its models afterwards, whose stages take
    the place of the same stages of the run.
    """
    again = set(more["stage"].dropna())
    return (
        join([results[~results["stage"].isin(again)], more], RESULT_COLUMNS),
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
    folders_of_run: dict[str, list[Path]] = {}
    for run in runs:
        key = config_of(run).key
        if key in folders_of_run:
            raise WorkbenchError(
                f"{run} and {folders_of_run[key][0]} are the same run; give one of them"
            )
        folders_of_run[key] = [run]
    for folder in folders:
        if folder not in runs:
            of = _written_config(folder).get("of")
            if of not in folders_of_run:
                names = ", ".join(map(str, runs)) or "any run, and none was given"
                raise WorkbenchError(f"{folder} was not asked of the models of {names}")
            folders_of_run[of].append(folder)
    return [read_runs(parts) for parts in folders_of_run.values()]


def read_runs(folders: Sequence[Path]) -> Tables:
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
    run_folder, parts = None, []
    for folder in folders:
        if experiment_of(folder) != RUN:
            parts.append(folder)
        elif run_folder is not None:
            raise WorkbenchError(
                f"{folder} and {run_folder} are two runs; give one of them, and what was asked of "
                "its models"
            )
        else:
            run_folder = folder
    if run_folder is None:
        raise WorkbenchError(
            f"{', '.join(map(str, folders))}: the run itself is not among them; give its folder as "
            "well"
        )
    config, (results, items) = config_of(run_folder), read_results(run_folder)
    for folder in parts:
        if _written_config(folder).get("of") != config.key:
            raise WorkbenchError(f"{folder} was not asked of the models of {run_folder}")
        results, items = join_experiment(results, items, *read_results(folder))
    return config, results, items
