"""Wrong values in every option and every field of a file: one line, nothing accepted that cannot be
meant.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from workbench import commands
from workbench.cli import COMMANDS_FROM_SETTINGS, main
from workbench.commands import _bare
from workbench.experiments import investigate
from workbench.experiments.investigate import InvestigateSettings
from workbench.experiments.sweep import SweepSettings
from workbench.runner import EXPERIMENTS
from workbench.runs import pipeline
from workbench.runs.config import RunConfig
from workbench.runs.settings import Settings

WRONG: tuple[Any, ...] = (
    "nan", "inf", "-inf", "-1", "0", "1e400", "1.5", "-0.0", "true", "", " ", "9" * 30, "abc",
    "[red]x[/red]", "None", "1,1", "3,2", "0,1e9", "-1e-30", "1e18", "../x", "a b", "🙂", "=",
    "x=", "=1", "npo.lr=nan", "npo.lr=-1", "npo.steps=1.5", "npo.nothing=1", ";:", "lora:", "a=b=c",
)  # fmt: skip
TYPED: tuple[Any, ...] = (
    math.nan, math.inf, -1, 0, 1.5, True, None, [], {}, [None], {"a": None}, "x", [1, 1], [-1],
    2**80, -1e308, 1e308, {"lr": -1}, ["npo", "npo"], "npo", {"npo": 3}, {"npo": {"lr": "x"}},
)  # fmt: skip
NEEDED = {
    "names": {}, "keyword": {"model": "nowhere", "tofu": "nowhere"},
    "verbatim": {"model": "nowhere", "text": "nowhere"}, "sweep": {},
    "investigate": {"base": "nowhere", "unlearned": "nowhere", "forget": "f", "retain": "r"},
}  # fmt: skip


class _AcceptedError(Exception):
    """The settings went through; what they are is in the arguments."""


def _settings_of(name: str) -> type[Settings]:
    known: dict[str, type[Settings]] = {"sweep": SweepSettings, "investigate": InvestigateSettings}
    return known[name] if name in known else EXPERIMENTS[name].settings


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was accepted; nothing runs."""
    taken: list[Any] = []

    def stop(settings: Any) -> None:
        taken.append(settings)
        raise _AcceptedError

    monkeypatch.setattr(commands, "run", lambda entry, out, chosen, **rest: stop(chosen))
    monkeypatch.setattr(investigate, "investigate", lambda out, chosen, **rest: stop(chosen))
    monkeypatch.setattr(pipeline, "run_pipeline", lambda config, out, **rest: stop(config))
    return taken


def _numbers(value: object) -> list[float]:
    """All numbers inside a value."""
    if isinstance(value, dict):
        return [n for each in value.values() for n in _numbers(each)]
    if isinstance(value, list | tuple):
        return [n for each in value for n in _numbers(each)]
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return [float(value)] if plain else []  # type: ignore[arg-type]


def _sensible(settings: Any) -> None:
    """Nothing that was accepted is infinite, negative or absurd."""
    for name, value in settings.model_dump(mode="json").items():
        for number in _numbers(value):
            assert math.isfinite(number) and abs(number) <= 2**63, (name, value)
            if name not in ("settings", "variants"):
                assert number >= 0, (name, value)


def _try(
    command: list[str], taken: list[Any], out: Path, capsys: pytest.CaptureFixture[str]
) -> bool:
    """Run a command; returns whether it was accepted."""
    before = len(taken)
    try:
        status = main([*command, "--out", str(out)])
    except _AcceptedError:
        _sensible(taken[-1])
        return True
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert (status, len(lines)) == (2, 1) and lines[0].startswith("error: "), (command, said.err)
    assert len(taken) == before and not out.exists(), command
    return False


def _options(count: int, seed: int) -> list[tuple[str, str, str]]:
    everything = [
        (name, field, wrong)
        for name in COMMANDS_FROM_SETTINGS
        for field, info in _settings_of(name).model_fields.items()
        if _bare(info.annotation) is not bool
        for wrong in WRONG
    ]
    return random.Random(seed).sample(everything, min(count, len(everything)))


def _check_options(
    count: int, taken: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted = 0
    for name, field, wrong in _options(count, seed=0):
        given = {**NEEDED.get(name, {}), field: wrong}
        pairs = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        accepted += _try([name, *pairs], taken, tmp_path / "out", capsys)
    # a text is what was asked for in few fields only
    assert accepted < count / 2


def _check_fields(
    count: int, taken: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(1)
    for _ in range(count):
        name = draw.choice(["demo", *COMMANDS_FROM_SETTINGS])
        model: Any = RunConfig if name == "demo" else _settings_of(name)
        field, wrong = draw.choice(list(model.model_fields)), draw.choice(TYPED)
        file = tmp_path / "fields.yaml"
        file.write_text(yaml.safe_dump({**NEEDED.get(name, {}), field: wrong}))
        _try([name, "--config", str(file)], taken, tmp_path / "out", capsys)


def test_wrong_options_and_fields_are_one_line(
    stopped: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _check_options(120, stopped, tmp_path, capsys)
    _check_fields(80, stopped, tmp_path, capsys)


@pytest.mark.full
def test_eight_hundred_wrong_options_and_fields_are_one_line(
    stopped: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _check_options(500, stopped, tmp_path, capsys)
    _check_fields(300, stopped, tmp_path, capsys)
