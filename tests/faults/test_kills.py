"""Runs that are killed at any moment, and started again: the same tables, nobody left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest

from workbench.attacks.relearn import RelearnSettings
from workbench.errors import WorkbenchError
from workbench.runs.config import RunConfig, preset, read_config, write_config
from workbench.runs.folder import claim_folder, leaves_folder, read_results
from workbench.runs.jobs import PROGRESS
from workbench.runs.pipeline import run_pipeline


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    chosen = preset("quick").model_copy(
        update={
            "methods": ("npo",),
            "seeds": (0, 1),
            "probes": (),
            "settings": {"npo": {"steps": 3}},
            "attack": RelearnSettings(steps=2, measure_at=(0, 2)),
            "rank": 4,
        }
    )
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(write_config(chosen), encoding="utf-8")
    return read_config(path), path  # as the command reads it


@pytest.fixture(scope="module")
def whole(
    config: tuple[RunConfig, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pd.DataFrame, pd.DataFrame]:
    run = run_pipeline(config[0], tmp_path_factory.mktemp("whole") / "run", workers=1)
    return run.results, run.items


def _start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "workbench.cli", "demo", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--out", str(out), "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _of_session(session: int) -> list[int]:
    """Living processes of the session that a run was started in."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, *rest = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            if int(rest[2]) == session and state != "Z":
                found.append(int(entry.name))
    return found


def _kill_and_resume(
    config: tuple[RunConfig, Path],
    whole: tuple[pd.DataFrame, pd.DataFrame],
    tmp_path: Path,
    seeds: range,
) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        out = tmp_path / f"run{seed}"
        process = _start(config[1], out)
        time.sleep(rng.uniform(4, 25))
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        if process.poll() is None:
            process.send_signal(number)
            status = process.wait(timeout=30)
            assert status in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM, 0)
        deadline = time.monotonic() + 5
        while _of_session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _of_session(process.pid) == [], f"seed {seed}: orphans after {number.name}"
        run = run_pipeline(config[0], out, workers=1)
        for mine, expected in zip((run.results, run.items), whole, strict=True):
            pd.testing.assert_frame_equal(mine, expected)
        for mine, expected in zip(read_results(out), whole, strict=True):
            pd.testing.assert_frame_equal(mine, expected)
        temporary = Path(tempfile.gettempdir())
        assert not list(temporary.glob(f"{PROGRESS}{process.pid}.*")), f"seed {seed}"
        assert not list(out.rglob(f".*.{process.pid}.*")), f"seed {seed}"


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


@pytest.mark.slow
def test_a_killed_run_leaves_nobody_and_goes_on(
    config: tuple[RunConfig, Path], whole: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path
) -> None:
    _kill_and_resume(config, whole, tmp_path, range(1))


@pytest.mark.full
def test_twenty_kills(
    config: tuple[RunConfig, Path], whole: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path
) -> None:
    _kill_and_resume(config, whole, tmp_path, range(1, 21))


@pytest.mark.slow
def test_two_processes_do_not_share_a_folder(
    config: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    text = write_config(config[0])
    hold = (
        "import sys, time; from pathlib import Path\n"
        "from workbench.runs.folder import claim_folder\n"
        "claim_folder(Path(sys.argv[1]), Path(sys.argv[2]).read_text(), fresh=False)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run"), str(config[1])], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(WorkbenchError, match="another process is at work"):
            claim_folder(tmp_path / "run", text, fresh=False)
    finally:
        other.kill()
        other.wait()
    leaves_folder(claim_folder)(tmp_path / "run", text, fresh=False)  # the system let go


def test_this_process_is_alive() -> None:
    from workbench.files import alive

    assert alive(os.getpid()) and not alive(2**22 + 12345)
