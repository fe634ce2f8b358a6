"""The public face: its names load where they are asked for."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import workbench as wb

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


def test_a_file_hooks_or_a_folder_figures_beside_a_script_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text("raise RuntimeError('the user\\'s own')")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "__init__.py").write_text("")
    code = "import workbench.hooks, workbench.figures; print(workbench.hooks.Capture.__name__)"
    for place in (tmp_path, ROOT, ROOT / "workbench"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place
        )
        assert done.stdout.strip() == "Capture"
