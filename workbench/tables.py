"""Tidy results: one row per measured value, and one row per measured item behind the values that
have items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from workbench.errors import NotMeasuredError, WorkbenchError
from workbench.evaluation.losses import Scores
from workbench.evaluation.statistics import Estimate, bootstrap, by_fact, rate
from workbench.files import write_file
from workbench.hooks.brief import brief

RESULT_COLUMNS = {
    "run": "string",
    "stage": "string",
    "model": "string",
    "method": "string",
    "seed": "Int64",
    "site": "string",
    "split": "string",
    "arm": "string",
    "step": "float64",
    "metric": "string",
    "value": "float64",
    "low": "float64",
    "high": "float64",
    "n": "Int64",
}
"""Columns of ``results.parquet``. ``step`` is the position along an axis (attack step, alpha, slice
coordinate, rank); an empty ``seed`` means: over all seeds.
"""

ITEM_COLUMNS = {
    "run": "string",
    "stage": "string",
    "method": "string",
    "seed": "Int64",
    "split": "string",
    "arm": "string",
    "step": "float64",
    "item": "string",
    "correct": "float64",
    "probability": "float64",
}
"""Columns of ``items.parquet``: one fact (mean over its paraphrases) of one model under one
condition.
"""


@brief
@dataclass
class Table:
    """Collects rows of one run.

    Attributes:
        common: values that every row shares.
        rows: results.
        items: per-fact results.
    """

    common: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        metric: str,
        value: float,
        *,
        low: float = np.nan,
        high: float = np.nan,
        n: int | None = None,
        **columns: Any,
    ) -> None:
        """One row; ``columns`` are columns of the table."""
        self.rows.append(
            {
                **self.common,
                "metric": metric,
                "value": float(value),
                "low": float(low),
                "high": float(high),
                "n": n,
                **columns,
            }
        )

    def add_estimate(self, metric: str, estimate: Estimate, **columns: Any) -> None:
        """One row with its interval."""
        self.add(
            metric, estimate.value, low=estimate.low, high=estimate.high, n=estimate.n, **columns
        )

    def add_item(self, item: str, correct: float, probability: float, **columns: Any) -> None:
        """What became of one fact, prompt or passage under one condition; ``columns`` are columns
        of the items.
        """
        shared = {name: v for name, v in {**self.common, **columns}.items() if name in ITEM_COLUMNS}
        self.items.append({**shared, "item": item, "correct": correct, "probability": probability})

    def add_scores(self, scores: Scores, **columns: Any) -> None:
        """Recall and answer probability (where there are answers) with intervals over facts, and
        the loss; the facts go into the items.
        """
        if np.isfinite(scores.correct).all():
            facts, correct = by_fact(scores.items, scores.correct)
            _, probability = by_fact(scores.items, scores.probability)
            self.add_estimate("recall", rate(correct), **columns)
            self.add_estimate("answer_probability", rate(probability), **columns)
            for fact, right, likely in zip(facts, correct, probability, strict=True):
                self.add_item(fact, right, likely, **columns)
        self.add("loss", scores.loss, n=int(scores.tokens.sum()), **columns)

    def frame(self) -> pd.DataFrame:
        """The results with every column, in its type."""
        return typed(pd.DataFrame(self.rows), RESULT_COLUMNS)

    def item_frame(self) -> pd.DataFrame:
        """The items with every column, in its type."""
        return typed(pd.DataFrame(self.items), ITEM_COLUMNS)


def cell(row: Mapping[Hashable, Any] | pd.Series, *, sign: bool = False) -> str:
    """A value with its interval, for people: ``0.42 [0.31, 0.53]``."""
    plus = "+" if sign else ""
    return f"{row['value']:{plus}.2f} [{row['low']:{plus}.2f}, {row['high']:{plus}.2f}]"


def by_columns(rows: pd.DataFrame, name: str, heading: str, *, sign: bool = False) -> pd.DataFrame:
    """One row per model, one column for every value of column ``name``, in the order of the table.

    Args:
        rows: results, one row per model and value.
        name: a column.
        heading: of a column, with ``{}`` for the value.
        sign: show one before every number.
    """
    lines: dict[str, dict[str, str]] = {}
    for row in rows.to_dict("records"):
        line = lines.setdefault(str(row["method"]), {"model": str(row["method"])})
        line[heading.format(row[name])] = cell(row, sign=sign)
    return pd.DataFrame(list(lines.values()), columns=None if lines else ["model"]).fillna("–")


def typed(frame: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """``frame`` with exactly ``columns``, in their order and types; what is missing is empty."""
    extra = set(frame.columns) - set(columns)
    if extra:
        raise ValueError(f"unknown columns {sorted(extra)}; the table has {', '.join(columns)}")
    return frame.reindex(columns=list(columns)).astype(columns)


_CHECK = b"sha256"


def _digest(frame: pd.DataFrame) -> bytes:
    """A hash of names and values that reading a table back does not change."""
    values = pd.util.hash_pandas_object(frame, index=False).to_numpy()
    return (
        hashlib.sha256(repr(list(frame.columns)).encode() + values.tobytes()).hexdigest().encode()
    )


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all, with a hash of its content in its metadata."""
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    check = {_CHECK: _digest(table.to_pandas())}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **check})
    write_file(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))


def read_table(path: Path) -> pd.DataFrame:
    """What :func:`write_parquet` wrote.

    Raises:
        WorkbenchError: the file is missing, damaged, or has no hash.
    """
    if not path.is_file():
        raise WorkbenchError(f"{path} is missing; run the command of this folder again")
    try:
        table = pyarrow.parquet.read_table(path)
        frame: pd.DataFrame = table.to_pandas()
        digest, stored_digest = _digest(frame), (table.schema.metadata or {}).get(_CHECK)
    except Exception as error:  # a damaged file raises whatever its reader stumbles on
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise WorkbenchError(
            f"{path} is damaged ({reason}); run the command of this folder again"
        ) from error
    if digest != stored_digest:
        raise WorkbenchError(
            f"{path} is not as it was written (its hash differs); run the command of this folder "
            "again"
        )
    return frame


def join(frames: Iterable[pd.DataFrame], columns: dict[str, str]) -> pd.DataFrame:
    """Rows of several tables under one another."""
    kept = [frame for frame in frames if len(frame)]
    return typed(pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(), columns)


SMOOTHINGS = ("sam", "asam", "rs", "gp", "cr", "wa")
"""Wrappers that smooth; see :mod:`workbench.unlearning.wrappers`."""


def fact_table(items: pd.DataFrame, column: str = "correct", **where: Any) -> pd.DataFrame:
    """``[seed x fact]`` values of one model under one condition, with seeds and facts as labels.

    Args:
        items: an items table.
        column: ``correct`` or ``probability``.
        where: column values that select the rows.

    Raises:
        NotMeasuredError: no row fits.
    """
    selected = items
    for name, value in where.items():
        selected = selected[selected[name] == value]
    if not len(selected):
        raise NotMeasuredError(
            "not measured: " + ", ".join(f"{name} {value}" for name, value in where.items())
        )
    return selected.pivot_table(
        index="seed", columns="item", values=column, aggfunc="mean", sort=True
    )


def summarise(items: pd.DataFrame, run: str) -> pd.DataFrame:
    """Recall and answer probability over all seeds, with a two-level bootstrap over seeds and
    facts; ``seed`` is empty in these rows.

    Recovery is attacked minus control, paired by seed and fact: metric ``recovery_<column>`` with
    arm ``minus-null`` (the same model under the null attack), ``minus-random-facts`` (the same
    model relearning facts that are true nowhere) and ``minus-never-learned`` (the never-learned
    model under the same attack), at every step. What a smoothing does is the plain method minus the
    smoothed one under the same attack, paired likewise: metric ``smoothing_effect``, owned by the
    smoothed method.
    """
    table = Table({"run": run})
    keys = ["stage", "method", "split", "arm", "step"]
    for values, group in items.groupby(keys, dropna=False, sort=False):
        columns = dict(zip(keys, values, strict=True))
        for metric, column in (("recall", "correct"), ("answer_probability", "probability")):
            wide = group.pivot_table(
                index="seed", columns="item", values=column, aggfunc="mean", sort=False
            )
            if wide.notna().all().all():
                table.add_estimate(
                    metric, rate(wide.to_numpy()), **columns, model=columns["method"]
                )
    attacks = items[items["stage"] == "relearn"] if len(items) else items
    _add_recovery(attacks, table)
    _add_smoothing(attacks[attacks["arm"] == "attack"], table)
    return table.frame()


def smoothing_pairs(methods: Collection[str]) -> list[tuple[str, str]]:
    """``(plain, smoothed)`` of all methods that are there both ways."""
    return [
        (name, f"{name}-{wrapper}")
        for name in sorted(methods)
        for wrapper in SMOOTHINGS
        if f"{name}-{wrapper}" in methods
    ]


def _add_smoothing(attacks: pd.DataFrame, table: Table) -> None:
    for plain, smoothed in smoothing_pairs(set(attacks["method"].dropna())):
        pairs = attacks[attacks["method"] == plain].merge(
            attacks[attacks["method"] == smoothed],
            on=["split", "step", "seed", "item"],
            suffixes=("", "_smoothed"),
        )
        for (split, step), group in pairs.assign(
            difference=pairs["correct"] - pairs["correct_smoothed"]
        ).groupby(["split", "step"], sort=False, dropna=False):
            wide = group.pivot_table(index="seed", columns="item", values="difference")
            if wide.notna().all().all():
                columns: dict[str, Any] = {"split": split, "step": step}
                table.add_estimate(
                    "smoothing_effect",
                    bootstrap(wide.to_numpy()),
                    stage="relearn",
                    model=smoothed,
                    method=smoothed,
                    arm="attack",
                    **columns,
                )


def _add_recovery(attacks: pd.DataFrame, table: Table) -> None:
    for (method, split, step), group in attacks[attacks["arm"] == "attack"].groupby(
        ["method", "split", "step"], sort=False
    ):
        same = attacks[(attacks["split"] == split) & (attacks["step"] == step)]
        controls = {
            "minus-null": same[(same["arm"] == "null") & (same["method"] == method)],
            "minus-random-facts": same[
                (same["arm"] == "random-facts") & (same["method"] == method)
            ],
            "minus-never-learned": same[
                (same["arm"] == "attack") & (same["method"] == "never-learned")
            ],
        }
        for arm, control in controls.items():
            for metric, column in (
                ("recovery_recall", "correct"),
                ("recovery_answer_probability", "probability"),
            ):
                pairs = group.merge(control, on=["seed", "item"], suffixes=("", "_control"))
                if not len(pairs) or (method == "never-learned" and arm == "minus-never-learned"):
                    continue
                pairs["difference"] = pairs[column] - pairs[f"{column}_control"]
                wide = pairs.pivot_table(index="seed", columns="item", values="difference")
                if wide.notna().all().all():
                    table.add_estimate(
                        metric,
                        bootstrap(wide.to_numpy()),
                        stage="relearn",
                        model=method,
                        method=method,
                        split=split,
                        arm=arm,
                        step=step,
                    )
