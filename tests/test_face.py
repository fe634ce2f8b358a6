"""The public face: its names load where they are asked for."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.data.grammar import filler

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", wb.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(wb, name) is not None
    assert name in dir(wb)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="opn_model"):
        _ = wb.opn_model


def test_importing_it_loads_no_torch() -> None:
    code = "import workbench, sys; print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_version_stands_in_one_way() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == wb.__version__


def test_a_wheel_holds_every_folder_of_the_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "workbench").rglob("__init__.py")}
    named = {".".join(folder.parts) for folder in folders} | {
        "workbench.hooks",
        "workbench.figures",
    }
    assert packages == named


def test_a_file_hooks_or_a_folder_figures_beside_a_script_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text("raise RuntimeError('the user\\'s own')")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "__init__.py").write_text("")
    names = "workbench.hooks", "workbench.figures"
    code = f"from importlib.util import find_spec; print(*(find_spec(n).origin for n in {names}))"
    for place in (tmp_path, ROOT, ROOT / "workbench"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place
        )
        assert done.stdout.split() == [
            str(ROOT / folder / "__init__.py") for folder in ("hooks", "figures")
        ]


@pytest.fixture(scope="module")
def pair(quick_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints and two files."""
    folder = tmp_path_factory.mktemp("pair")
    rng = torch.Generator().manual_seed(0)
    opened = wb.open_model(quick_base)
    for parameter in opened.model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=rng)
    wb.save_model(opened.model, opened.tokenizer, folder / "unlearned")
    texts = {"forget": list(filler(16, seed=1)), "retain": list(filler(24, seed=2))}
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    files = [str(folder / f"{name}.txt") for name in texts]
    return [str(quick_base), str(folder / "unlearned"), *files]


@pytest.mark.slow
def test_two_checkpoints_are_looked_at_from_all_sides_in_a_line_each(
    pair: list[str], tmp_path: Path
) -> None:
    study = wb.study(*pair)
    found = study.subspaces(16)
    assert {name: each.basis.shape[1] for name, each in found.items()} == {
        "base": 16,
        "unlearned": 16,
    }
    angles = study.angles(16, draws=20)
    assert len(angles) == 16 and {"cosine", "null_low", "null_high"} <= set(angles)
    curve = study.relearn(steps=2)
    assert curve.draw().axes and set(curve.table["arm"]) == {"attack", "null", "random-facts"}
    assert "<table" in curve._repr_html_()
    scan = study.scan(queries=2)
    assert "<table" in scan._repr_html_()
    assert study.slices(points=3).draw().axes
    assert {"unlearned into base", "base into unlearned"} == set(study.patch()["direction"])
    names = ("base", "unlearned", "forget", "retain")
    given = dict(zip(names, pair, strict=True))
    run = wb.investigate(tmp_path / "run", **given, seeds=1, attack_steps=1, slice_points=3)
    assert run.table["model"].tolist() == ["base", "unlearned"]
