"""Compare the tables of two run folders value by value: ``python tests/compare_tables.py OLD
NEW``.

Rows are matched by every column but the key of the run and the numbers. Prints how many rows match,
which stand in one table only, and the largest difference of each metric that differs; the exit
status is 1 where anything does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.runs.folder import read_results

RENAMED = {"budget_ring": "budget_set"}
"""Metrics by the name they had, and the one they have."""
NUMBERS = ("value", "low", "high", "n", "correct", "probability")


def _as_today(old: pd.DataFrame) -> pd.DataFrame:
    """A table with a column ``step`` as it is written today: numbers that stood in labels (the
    second coordinate of a plane, the number of a random vector), and tokens.
    """
    new = old.rename(columns={"step": "x"})
    if "metric" not in new:
        return new
    new = new.assign(y=np.nan, token=pd.Series(pd.NA, index=new.index, dtype="string"))
    plane, node = new["metric"] == "plane_loss", new["metric"] == "density_node"
    new.loc[plane, "y"] = new.loc[plane, "arm"].astype(float)
    new.loc[plane, "arm"] = pd.NA
    new.loc[node, "y"] = new.loc[node, "n"].astype(float)
    new.loc[node, "n"] = pd.NA
    scanned, suffix = new["metric"].str.startswith("token_"), new["metric"] == "suffix_token"
    new.loc[scanned, "token"], new.loc[scanned, "split"] = new.loc[scanned, "split"], pd.NA
    new.loc[suffix, "token"], new.loc[suffix, "site"] = new.loc[suffix, "site"], pd.NA
    new.loc[suffix, "value"], new.loc[suffix, "x"] = new.loc[suffix, "x"], np.nan
    points = new[(new["metric"] == "plane_point") & new["arm"].str.startswith("step ")]
    columns = {"plane_along": "x", "plane_towards": "value", "plane_off": "high"}
    path = [
        points.assign(
            metric=metric,
            value=points[column],
            x=points["arm"].str.removeprefix("step ").astype(float),
            arm="attack path",
            high=np.nan,
        )
        for metric, column in columns.items()
    ]
    return pd.concat([new[new["metric"] != "plane_point"], *path], ignore_index=True)


def _tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Values and items of a run folder, whenever it was written."""
    if (folder / "curves.parquet").is_file():
        results, items = read_results(folder)
        return results.drop(columns=["axis", "y_axis", "token_id"]), items.drop(
            columns=["axis", "measure"]
        )
    names = ("results.parquet", "items.parquet")
    results, items = (_as_today(pd.read_parquet(folder / name)) for name in names)
    return results, items


def _keyed(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its labels as index; rows of the same labels are numbered."""
    if "metric" in frame:
        frame = frame.assign(metric=frame["metric"].replace(RENAMED))
    labels = sorted(set(frame.columns) - {*NUMBERS, "run"})
    keyed = frame[labels].astype("string").fillna("")
    keyed["number"] = keyed.groupby(labels).cumcount()
    numbers = frame[[name for name in NUMBERS if name in frame.columns]].astype("float64")
    return numbers.set_axis(pd.MultiIndex.from_frame(keyed))


def compare(old: pd.DataFrame, new: pd.DataFrame) -> tuple[int, pd.DataFrame, pd.DataFrame]:
    """Matching rows, rows of one table only, and the largest differences.

    Returns:
        How many rows match exactly (empty numbers are equal); ``metric``, ``old`` and ``new``
        counts of rows that stand in one table only; ``metric``, ``rows``, ``difference`` (the
        largest, over all numbers of a row) of those that differ.
    """
    before, after = _keyed(old), _keyed(new)
    both = before.index.intersection(after.index)
    one, other = before.loc[both].to_numpy(), after.loc[both].to_numpy()
    equal = (one == other) | (np.isnan(one) & np.isnan(other))
    gaps = np.where(equal, 0.0, np.abs(one - other))
    gaps[np.isnan(gaps)] = np.inf
    apart = pd.Series(gaps.max(axis=1), index=both)
    name = "metric" if "metric" in before.index.names else "split"
    differ = apart[apart > 0].groupby(level=name).agg(["size", "max"]).reset_index()
    differ.columns = pd.Index(["metric", "rows", "difference"])
    lone = {
        label: keyed.index.difference(both).get_level_values(name).value_counts()
        for label, keyed in (("old", before), ("new", after))
    }
    single = pd.DataFrame(lone).fillna(0).astype(int).rename_axis("metric").reset_index()
    return int((apart == 0).sum()), single, differ


def main() -> int:
    """Compare values and items of two folders."""
    parser = argparse.ArgumentParser(description="Compare two run folders.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    different = False
    for table, old, new in zip(
        ("values", "items"), _tables(given.old), _tables(given.new), strict=True
    ):
        equal, single, differ = compare(old, new)
        print(f"{table}: {len(old):,} and {len(new):,} rows, {equal:,} equal in every number")
        for what, frame in (("in one table only", single), ("different", differ)):
            if len(frame):
                different = True
                print(f"  {what}:\n{frame.to_string(index=False)}")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
