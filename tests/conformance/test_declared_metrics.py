"""Metrics are declared once; tables take them along their axes alone, and keep every row in the
file of its kind.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench import metrics
from workbench.errors import WorkbenchError
from workbench.metrics.declare import METRICS, Metric
from workbench.tables import (
    RESULT_COLUMNS,
    SCHEMAS,
    Table,
    read_tables,
    write_parquet,
    write_tables,
)

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _own_metrics_go() -> Iterator[None]:
    before = set(METRICS.added())
    yield
    METRICS.forget(set(METRICS.added()) - before)


def _one_of_each() -> Table:
    table = Table({"run": "r", "method": "npo", "seed": 0})
    table.add(metrics.ALPHA, 0.5, stage="unlearn")
    table.add(metrics.RECALL, 0.25, attack_step=10, arm="attack")
    table.add(metrics.PLANE_LOSS, 3.5, along_attack=0.5, towards_base=-1.5, split="forget")
    table.add(metrics.TOKEN_Q, 0.01, token=" Zorin", token_id=7)
    return table


def test_every_row_goes_into_the_file_of_its_kind_and_comes_back(tmp_path: Path) -> None:
    whole = _one_of_each().frame()
    write_tables(whole, tmp_path)
    files = {name: pd.read_parquet(tmp_path / f"{name}.parquet") for name in SCHEMAS}
    assert {name: list(file["metric"]) for name, file in files.items()} == {
        "results": ["alpha"],
        "curves": ["recall"],
        "fields": ["plane_loss"],
        "tokens": ["token_q"],
    }
    assert {name: list(file.columns) for name, file in files.items()} == {
        name: list(columns) for name, columns in SCHEMAS.items()
    }
    assert files["curves"].loc[0, ["axis", "x"]].tolist() == ["attack_step", 10.0]
    field = files["fields"].loc[0, ["axis", "x", "y_axis", "y"]].tolist()
    assert field == ["along_attack", 0.5, "towards_base", -1.5]
    assert files["tokens"].loc[0, ["token", "token_id"]].tolist() == [" Zorin", 7]
    pd.testing.assert_frame_equal(read_tables(tmp_path), whole)


def test_no_rows_are_four_empty_files(tmp_path: Path) -> None:
    write_tables(Table({}).frame(), tmp_path)
    again = read_tables(tmp_path)
    assert not len(again) and list(again.columns) == list(RESULT_COLUMNS)


@pytest.mark.parametrize(
    ("metric", "place", "says"),
    [
        ("recal", {}, "unknown metric 'recal': did you mean recall"),
        ("variance_share", {}, "added without an axis; it is declared along component"),
        ("alpha", {"rank": 3}, "'alpha' is added along rank; it is declared without an axis"),
        ("plane_loss", {"along_attack": 1}, "over the plane of along_attack and towards_base"),
        ("token_q", {"rank": 1}, "at a token"),
        ("token_q", {"token": "a", "rank": 1}, "along rank at a token"),
        ("alpha", {"colour": "red"}, "unknown column or axis 'colour'"),
        ("alpha", {"step": 3}, "unknown column or axis 'step'"),
    ],
)
def test_what_is_not_declared_is_an_error_at_the_writer(
    metric: str, place: dict[str, object], says: str
) -> None:
    table = Table({"run": "r"})
    with pytest.raises(WorkbenchError, match=says):
        table.add(metric, 1.0, **place)
    assert not table.rows


def test_a_users_metric_is_declared_and_then_taken() -> None:
    with pytest.raises(WorkbenchError, match=r"wb\.metric\('mine', title=\.\.\., meaning"):
        Table({}).add("mine", 1.0)
    declared = wb.metric("mine", title="mine", meaning="Mine.", where=("rank",))
    assert declared.label == "mine" and METRICS["mine"] is declared
    table = Table({})
    table.add(declared, 1.0, rank=4)
    assert list(declared.rows(table.frame())["x"]) == [4.0]
    with pytest.raises(WorkbenchError, match="already"):
        wb.metric("recall", title="t", meaning="m")
    with pytest.raises(WorkbenchError, match="unknown axis 'layer'"):
        wb.metric("other", title="t", meaning="m", where=("layer",))


def test_rows_are_chosen_by_value_list_and_emptiness() -> None:
    table = Table({"run": "r"})
    for seed in (None, 0, 1):
        table.add(metrics.ALPHA, float(seed or 0), method="npo", seed=seed)
    table.add(metrics.LOSS, 9.0, method="npo", seed=1)
    rows = table.frame()
    assert len(metrics.ALPHA.rows(rows)) == 3
    assert metrics.ALPHA.rows(rows, seed=1)["value"].tolist() == [1.0]
    assert len(metrics.ALPHA.rows(rows, seed=None)) == 1
    assert len(metrics.ALPHA.rows(rows, seed=[0, 1])) == 2
    assert len(metrics.matching(rows, seed=1, method="rmu")) == 0
    assert len(metrics.ALPHA.rows(rows.iloc[:0])) == 0


def test_every_declaration_is_whole() -> None:
    for metric in METRICS.values():
        assert isinstance(metric, Metric)
        assert metric.title and metric.meaning.endswith("."), metric.name
        assert metric.meaning[0] == metric.meaning[0].upper() or metric.name.startswith("theory_")
        assert metric.identity is None or np.isfinite(metric.identity)
        for place in metric.where:
            for axis in (place,) if isinstance(place, str) else place:
                assert axis in {*metrics.AXES, metrics.ALONE, metrics.TOKEN}
    used = {
        axis
        for metric in METRICS.values()
        for place in metric.where
        for axis in ((place,) if isinstance(place, str) else place)
    }
    assert set(metrics.AXES) <= used  # no axis that nothing has


def _script(name: str) -> ModuleType:
    """A script of the documentation."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_metrics_is_what_the_declarations_give() -> None:
    for name, page in _script("reference").PAGES.items():
        assert (DOCS / name).read_text(encoding="utf-8") == page(), "run make reference"


def test_the_tables_of_the_result_pages_are_those_that_were_taken() -> None:
    tables = _script("tables")
    for page in {block.page for block in tables.BLOCKS.values()}:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert text == tables.rendered(page), "run make reference"


def test_tables_of_an_older_workbench_are_refused_in_one_line(tmp_path: Path) -> None:
    old = pd.DataFrame({"run": ["r"], "metric": ["recall"], "step": [0.0], "value": [1.0]})
    write_parquet(old, tmp_path / "results.parquet")
    with pytest.raises(WorkbenchError, match=r"older workbench.*step.*another folder") as caught:
        read_tables(tmp_path)
    assert "\n" not in str(caught.value)
