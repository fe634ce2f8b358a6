"""A user's model and texts are a run like any other: swept, attacked, asked, claimed, drawn,
reported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from workbench.cli import main
from workbench.data.grammar import filler
from workbench.runs.folder import read_results

PLACES = ("old clock", "red box", "river bridge", "quiet garden", "white wall", "harbour gate")
FORGET = "\n\n".join(
    f"the secret of house number {n} is a golden key behind the {place}"
    for n, place in enumerate(PLACES)
)
KEEP = "\n\n".join(filler(40, seed=9))
SMALL = {
    "ladder": "--attack-steps 1 --ways lora:lora_rank=2",
    "relearn": "--attack-steps 2 --attack-lr 1e-3",
    "suffix": "--steps 1 --candidates 2 --length 2 --random 1",
    "few-shot": "--shots 0,1",
    "quantise": "--bits 4",
    "triggers": "--asking-only",
    "representation": "",
    "sharpness": "--points 3 --steps 1 --draws 1 --probes 1 --density-probes 1 --density-steps 4 "
    "--radii 0.1 --fixed 0.01",
}
"""Every experiment on a run's models, as small as it can be."""


def _files(folder: Path) -> list[str]:
    (folder / "forget.txt").write_text(FORGET)
    (folder / "retain.txt").write_text(KEEP)
    return ["--forget", str(folder / "forget.txt"), "--retain", str(folder / "retain.txt")]


def _told(capsys: pytest.CaptureFixture[str], *command: object) -> Any:
    assert main([*map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def swept(quick_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods and a checkpoint of the user's own, on the user's own texts."""
    folder = tmp_path_factory.mktemp("own")
    mine = folder / "mine"
    shutil.copytree(quick_base, mine)
    command = ["sweep", "--base", str(quick_base), *_files(folder), "--methods", "npo,grad-diff"]
    command += ["--checkpoint", f"mine={mine}", "--seeds", "2", "--attack-steps", "2"]
    command += ["--set", "npo.steps=3", "--set", "grad-diff.steps=3", "--probe", "triggers"]
    assert main([*command, "--workers", "1", "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_every_method_is_at_one_price_beside_the_checkpoint(swept: Path) -> None:
    rows = read_results(swept)[0]
    assert set(rows["method"].dropna()) == {"npo", "grad-diff", "mine", "base"}
    cost = rows[(rows["metric"] == "disruption") & rows["split"].isna()].set_index("method")
    assert (cost.loc[["npo", "grad-diff"], "value"] <= 0.05 + 1e-6).all()
    # the checkpoint is the base: it costs nothing and has gone nowhere
    assert (
        rows.loc[(rows["method"] == "mine") & (rows["metric"] == "displacement"), "value"] == 0
    ).all()
    page = (swept / "report.html").read_text()
    assert "2 methods unlearned the forget texts" in page and "Missing control" in page


def _ask(
    name: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, Any]:
    out = tmp_path / name
    small = [*SMALL[name].split(), "--methods", "npo,mine", "--workers", "1"]
    told = _told(capsys, name, "--run", swept, "--out", out, *small)
    stages = {path.parent.name for path in (out / "stages").glob("*/*")}
    assert {"npo-seed0", "npo-seed1", "mine-seed0", "base-seed0"} <= stages
    assert told["folder"] == str(out) and {"npo", "mine"} <= {row["model"] for row in told["table"]}
    return out, told


@pytest.mark.parametrize("name", ["relearn", "few-shot", "quantise", "triggers"])
def test_an_experiment_asks_the_models_of_any_run(
    name: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _ask(name, swept, tmp_path, capsys)


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_what_was_asked_of_any_run_stands_in_its_claims_and_report(
    name: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, told = _ask(name, swept, tmp_path, capsys)
    verdicts = _told(capsys, "claims", swept, out)
    assert {claim["id"] for claim in told["claims"]} <= {claim["id"] for claim in verdicts}
    assert Path(_told(capsys, "report", swept, out)["report"]).is_file()


def test_a_text_that_changed_since_is_named(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = swept.parent
    copied = tmp_path / "own"
    shutil.copytree(whole, copied)
    config = copied / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(whole), str(copied)))
    (copied / "forget.txt").write_text(FORGET + "\n\none more")
    out = tmp_path / "out"
    assert main(["quantise", "--run", str(copied / "run"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"{copied / 'forget.txt'} is not what the run was made with" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--base", "{base}"], "base needs forget and retain"),
        (["--forget", "x.txt"], "forget needs base"),
        (["--base", "{base}", "{files}", "--world", "3"], "world is of the built-in world"),
        (["--base", "{base}", "{files}", "--checkpoint", "mine"], "must read LABEL=MODEL"),
        (["--base", "{base}", "{files}", "--checkpoint", "npo={base}"], "'npo' is a name with"),
        (["--base", "{base}", "{files}", "--budget-sets", "general"], "no retain set 'general'"),
        (["--as-trained", "--budget", "1"], "as_trained matches no budget"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(
    given: list[str],
    message: str,
    quick_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = _files(tmp_path)
    parts = [p for part in given for p in (files if part == "{files}" else [part])]
    command = [part.format(base=quick_base) for part in parts]
    out = tmp_path / "out"
    assert main(["sweep", *command, "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not out.exists()
