"""The relearning attack once more on the models of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from workbench.cli import main
from workbench.errors import WorkbenchError
from workbench.experiments.relearn import relearn_table
from workbench.runner import run
from workbench.runs.pipeline import Run


def _curve(items: pd.DataFrame, method: str, arm: str) -> pd.DataFrame:
    mine = items[
        (items["stage"] == "relearn") & (items["method"] == method) & (items["arm"] == arm)
    ]
    return mine.sort_values(["x", "split", "item"])[
        ["x", "split", "item", "correct", "probability"]
    ].reset_index(drop=True)


def test_the_same_attack_gives_the_runs_own_numbers(quick_run: Run, tmp_path: Path) -> None:
    # From the saved weights, in a process of its own: nothing but weights, texts, seed and settings
    # decides.
    found = run("relearn", tmp_path / "again", of=quick_run.folder, methods=["npo"], workers=1)
    for method in ("npo", "base", "never-learned"):
        for arm in ("attack", "null"):
            pd.testing.assert_frame_equal(
                _curve(found.items, method, arm),
                _curve(quick_run.items, method, arm),
                rtol=1e-5,
                atol=1e-6,
            )


def test_another_rate_by_command(
    quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "slow"
    command = [
        "relearn",
        "--run",
        str(quick_run.folder),
        "--methods",
        "npo",
        "--attack-lr",
        "1e-9",
        "--attack-steps",
        "4",
        "--workers",
        "1",
        "--out",
        str(out),
        "--json",
    ]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in told["table"]] == ["base", "never-learned", "npo"]
    assert list(told["table"][0]) == ["model", "before", "2 steps", "4 steps", "4 steps, null"]
    assert all(
        row["before"] == row["4 steps"] == row["4 steps, null"] for row in told["table"]
    )  # a rate of nothing moves nothing
    assert (out / "figures" / "comparison.png").is_file()
    assert "attack_lr: 1.0e-09" in (out / "config.yaml").read_text()


def test_at_equal_distance(quick_run: Run, tmp_path: Path) -> None:
    found = run(
        "relearn",
        tmp_path / "near",
        of=quick_run.folder,
        attack_steps=2,
        attack_lr=1e-9,
        distance=0.01,
        methods=["npo", "cir"],
        workers=1,
    )
    rows = found.results[found.results["metric"] == "relative_displacement"]
    assert sorted(rows["method"].unique()) == ["cir", "npo"]  # the controls stay where they are

    def first(results: pd.DataFrame, method: str, metric: str, **where: object) -> float:
        mine = results[
            (results["metric"] == metric)
            & (results["method"] == method)
            & (results["stage"] == "unlearn")
        ]
        for name, value in where.items():
            mine = mine[mine[name] == value]
        return float(mine["value"].iloc[0])

    for method in ("npo", "cir"):
        alpha = first(found.results, method, "alpha")
        assert alpha * first(quick_run.results, method, "relative_displacement") == pytest.approx(
            0.01, rel=1e-3
        )
        cost = first(found.results, method, "disruption", arm="kl")
        budget = first(quick_run.results, method, "disruption", arm="kl")
        assert (
            (0 < cost < budget) if alpha < 1 else cost > budget
        )  # nearer costs less, farther more
    with pytest.raises(WorkbenchError, match=r"relearn: distance: .*less than 1 .*2\.0"):
        run("relearn", tmp_path / "far", of=quick_run.folder, distance=2.0)
    assert not (tmp_path / "far").exists()


def test_bad_input(quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["relearn", "--run", str(quick_run.folder), "--attack-lr", "-1"]
    assert main([*wrong, "--out", str(tmp_path / "x")]) == 2
    assert "--attack-lr: Input should be greater than 0 (given: '-1')" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(WorkbenchError, match="nop"):
        run("relearn", tmp_path / "x", of=quick_run.folder, methods=["nop"])
    assert not (tmp_path / "x").exists()


def test_table_of_nothing_has_no_rows(quick_run: Run) -> None:
    assert not len(relearn_table(quick_run.results.iloc[:0]))
