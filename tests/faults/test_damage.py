"""Damage to the artefacts of a run: what is opened again is as it was written, or is made again, or
is one line that names the file. Seeded; the long form runs with ``-m full``.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from workbench import files
from workbench.attacks.relearn import RelearnSettings
from workbench.builtin import builtin_folder, builtin_model
from workbench.errors import WorkbenchError
from workbench.runs import models, pipeline
from workbench.runs.config import RunConfig, preset
from workbench.runs.folder import read_results
from workbench.runs.pipeline import run_pipeline

Tables = tuple[pd.DataFrame, pd.DataFrame]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return preset("quick").model_copy(
        update={
            "methods": ("npo",),
            "seeds": (0,),
            "probes": (),
            "settings": {"npo": {"steps": 3}},
            "attack": RelearnSettings(steps=2, measure_at=(0, 2)),
            "rank": 4,
        }
    )


@pytest.fixture(scope="module")
def quiet_report() -> Iterator[None]:
    """Figures and page are drawn from the tables in seconds, and are not what is damaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_report", lambda *args, **kwargs: None)
        patch.setattr(pipeline.stages, "compare_sets", lambda *args, **kwargs: None)
        yield


@pytest.fixture(scope="module")
def whole(
    config: RunConfig, quiet_report: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tables]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = run_pipeline(config, folder, workers=1)
    return folder, (run.results, run.items)


@pytest.fixture(autouse=True)
def _fresh_openings() -> None:
    models.forget_setups()


def _artefacts(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "claims.json", "provenance.json")
    )


def _damage(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "cut", "delete", "empty"])
    if kind == "delete" or not content:
        path.unlink()
        return "delete"
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    else:
        content.clear()
    path.write_bytes(content)
    return kind


def _is_one_line(error: WorkbenchError, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def _same(found: Tables, expected: Tables) -> None:
    for one, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one, other)


def _resumed(config: RunConfig, folder: Path, expected: Tables, what: str) -> None:
    """The run again: the same tables, or one line."""
    models.forget_setups()
    try:
        run = run_pipeline(config, folder, workers=1)
    except WorkbenchError as error:
        # whose run it is cannot be made again; everything else is
        _is_one_line(error, str(folder), "config.yaml" if "config.yaml" not in what else "")
        return
    _same((run.results, run.items), expected)
    _same(read_results(folder), expected)


def _hurt_and_resume(
    config: RunConfig, whole: tuple[Path, Tables], tmp_path: Path, seeds: range
) -> None:
    source, expected = whole
    folder = tmp_path / "run"
    for seed in seeds:
        rng = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        path = rng.choice(_artefacts(folder))
        what = f"seed {seed}: {_damage(path, rng)} of {path.relative_to(folder)}"
        # whoever only reads sees the undamaged table, or one line
        try:
            _same(read_results(folder), expected)
        except WorkbenchError as error:
            _is_one_line(error)
        _resumed(config, folder, expected, what)


@pytest.mark.slow
def test_damaged_artefacts_are_made_again_or_named(
    config: RunConfig, whole: tuple[Path, Tables], tmp_path: Path
) -> None:
    _hurt_and_resume(config, whole, tmp_path, range(8))


@pytest.mark.full
def test_two_hundred_damages(config: RunConfig, whole: tuple[Path, Tables], tmp_path: Path) -> None:
    _hurt_and_resume(config, whole, tmp_path, range(8, 168))


def _failing(call: Callable[..., Any], code: int, at: int) -> Callable[..., Any]:
    """``call``, whose use number ``at`` fails like a full or read-only disk."""
    count = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return wrapper


def _refuse_writes(config: RunConfig, tmp_path: Path, expected: Tables, seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        folder = tmp_path / f"run{seed}"
        code = rng.choice([errno.ENOSPC, errno.EROFS, errno.EDQUOT])
        models.forget_setups()
        with pytest.MonkeyPatch.context() as patch:
            name = rng.choice(["replace", "close"])
            patch.setattr(files.os, name, _failing(getattr(os, name), code, rng.randrange(1, 12)))
            try:
                run_pipeline(config, folder, workers=1)
            except WorkbenchError as error:
                _is_one_line(error)
        left = [path for path in folder.rglob(".*.*") if str(os.getpid()) in path.name]
        assert left == [], f"seed {seed}"
        _resumed(config, folder, expected, f"seed {seed}: {errno.errorcode[code]} in {name}")


@pytest.mark.slow
def test_a_disk_that_refuses_is_one_line_and_the_run_goes_on_later(
    config: RunConfig, whole: tuple[Path, Tables], tmp_path: Path
) -> None:
    _refuse_writes(config, tmp_path, whole[1], range(2))


@pytest.mark.full
def test_forty_refusals(config: RunConfig, whole: tuple[Path, Tables], tmp_path: Path) -> None:
    _refuse_writes(config, tmp_path, whole[1], range(2, 42))


@pytest.mark.slow
def test_a_damaged_cached_model_is_made_again(
    config: RunConfig,
    whole: tuple[Path, Tables],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cached = builtin_folder(config.model, with_forget=False)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    copy = builtin_folder(config.model, with_forget=False)
    shutil.copytree(cached, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    def train(*args: Any, **kwargs: Any) -> None:
        raise LookupError("training begins")

    monkeypatch.setattr("workbench.builtin.train_builtin", train)
    with pytest.raises(LookupError, match="training begins"):
        builtin_model(config.model, with_forget=False, progress=lambda done, total: None)
    assert not copy.exists()
    assert "cached model thrown away" in capsys.readouterr().err


def test_fresh_works_on_a_folder_whose_cleaning_was_cut_short(
    config: RunConfig,
    whole: tuple[Path, Tables],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from workbench.runs.config import write_config
    from workbench.runs.folder import claim_folder

    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    calls = 0

    def cut(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("workbench.runs.folder.shutil.rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            claim_folder(folder, write_config(config), fresh=True)
    claim_folder(folder, write_config(config), fresh=True)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml"]
