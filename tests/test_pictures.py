"""The committed pictures are those of the committed tables."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
assert SPEC is not None and SPEC.loader is not None
pictures = importlib.util.module_from_spec(SPEC)
sys.modules["pictures"] = pictures
SPEC.loader.exec_module(pictures)


def test_every_picture_has_its_table_or_is_listed() -> None:
    drawn = {path.stem for path in (ROOT / "docs").glob("*.png")}
    assert drawn == {*pictures.PICTURES, *pictures.WITHOUT_TABLE}
    assert not set(pictures.PICTURES) & set(pictures.WITHOUT_TABLE)
    taken = {path.stem for path in pictures.DATA.glob("*.csv")}
    assert taken - {"demo-models"} == set(pictures.PICTURES)  # the other is a table of a page


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_that_of_its_table(name: str) -> None:
    with Image.open(ROOT / "docs" / f"{name}.png") as picture:
        assert picture.info["Source"] == pictures.source(name)
        assert picture.mode in ("RGB", "RGBA")  # a palette loses the methods' colours
    assert pictures.PICTURES[name].draw(pictures.table(name)).axes


def test_the_null_attack_is_in_the_table_of_recovery() -> None:
    found = pictures.table("recovery")
    assert set(found.loc[found["metric"] == "recall", "arm"]) == {"attack", "null"}
