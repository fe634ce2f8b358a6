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

from workbench.errors import NotMeasuredError, WorkbenchError, unknown
from workbench.evaluation.losses import Scores
from workbench.evaluation.statistics import Estimate, bootstrap, by_fact, rate
from workbench.files import write_file
from workbench.hooks.brief import brief
from workbench.metrics import (
    ANSWER_PROBABILITY,
    AXES,
    LOSS,
    RECALL,
    RECOVERY_ANSWER_PROBABILITY,
    RECOVERY_RECALL,
    SMOOTHING_EFFECT,
    Metric,
    matching,
    metric_of,
)

LABELS = {
    "run": "string",
    "stage": "string",
    "model": "string",
    "method": "string",
    "seed": "Int64",
    "site": "string",
    "split": "string",
    "arm": "string",
}
"""Columns that say what was measured: an empty ``seed`` means over all seeds."""

_ALONG = {"axis": "string", "x": "float64"}
_OVER = {"y_axis": "string", "y": "float64"}
_AT = {"token": "string", "token_id": "Int64"}
_MEASURED = {
    "metric": "string",
    "value": "float64",
    "low": "float64",
    "high": "float64",
    "n": "Int64",
}

SCHEMAS: dict[str, dict[str, str]] = {
    "results": {**LABELS, **_MEASURED},
    "curves": {**LABELS, **_ALONG, **_MEASURED},
    "fields": {**LABELS, **_ALONG, **_OVER, **_MEASURED},
    "tokens": {**LABELS, **_AT, **_MEASURED},
}
"""Every Parquet file of measured values with its columns: single values, curves along a named axis,
values over a plane, values of single tokens.
"""

RESULT_COLUMNS = {**LABELS, **_ALONG, **_OVER, **_AT, **_MEASURED}
"""Columns of all values together, in memory; what a row has no use for is empty."""

ITEM_COLUMNS = {
    "run": "string",
    "stage": "string",
    "method": "string",
    "seed": "Int64",
    "split": "string",
    "arm": "string",
    "axis": "string",
    "x": "float64",
    "item": "string",
    "measure": "string",
    "correct": "float64",
    "probability": "float64",
}
"""Columns of ``items.parquet``: one fact (mean over its paraphrases) of one model under one
condition. ``measure`` is the metric that ``correct`` holds, whose mean over items is its value.
"""


def schema_of(frame: pd.DataFrame) -> pd.Series:
    """For every row of a table the schema that it belongs to, a name of :data:`SCHEMAS`."""
    schema = pd.Series("results", index=frame.index)
    schema[frame["axis"].notna()] = "curves"
    schema[frame["y_axis"].notna()] = "fields"
    schema[frame["token"].notna()] = "tokens"
    return schema


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
        metric: Metric | str,
        value: float,
        *,
        low: float = np.nan,
        high: float = np.nan,
        n: int | None = None,
        **place: Any,
    ) -> None:
        """One row.

        Args:
            metric: a declared metric, or its name.
            value: what was measured; NaN where it could not be.
            low: lower end of its interval.
            high: upper end.
            n: units behind it.
            place: columns of :data:`LABELS`; the axis of the metric by its name
                (``attack_step=10``), or two of them; ``token`` and ``token_id`` for a metric of
                single tokens.

        Raises:
            WorkbenchError: the metric is not declared, or not with this axis; or ``place`` has a
                name that is neither a column nor an axis.

        Example:
            >>> from workbench.metrics import RECALL
            >>> table = Table({"run": "r"})
            >>> table.add(RECALL, 0.5, attack_step=10, split="forget-heldout")
            >>> table.frame()[["axis", "x", "value"]].values.tolist()
            [['attack_step', 10.0, 0.5]]
        """
        declared = metric_of(metric)
        labels, axes = _placed(place)
        declared.check(
            [axes[name] for name in ("axis", "y_axis") if name in axes], token="token" in place
        )
        self.rows.append(
            {
                **self.common,
                "metric": declared.name,
                "value": float(value),
                "low": float(low),
                "high": float(high),
                "n": n,
                **labels,
                **axes,
            }
        )

    def add_estimate(self, metric: Metric | str, estimate: Estimate, **columns: Any) -> None:
        """One row with its interval."""
        self.add(
            metric, estimate.value, low=estimate.low, high=estimate.high, n=estimate.n, **columns
        )

    def add_item(
        self,
        item: str,
        correct: float,
        probability: float,
        *,
        measure: Metric = RECALL,
        **place: Any,
    ) -> None:
        """What became of one fact, prompt or passage under one condition; ``place`` as for
        :meth:`add`, and ``measure`` what ``correct`` is of it.
        """
        labels, axes = _placed({**self.common, **place})
        shared = {name: value for name, value in {**labels, **axes}.items() if name in ITEM_COLUMNS}
        self.items.append(
            {
                **shared,
                "item": item,
                "measure": measure.name,
                "correct": correct,
                "probability": probability,
            }
        )

    def add_scores(self, scores: Scores, **columns: Any) -> None:
        """Recall and answer probability (where there are answers) with intervals over facts, and
        the loss; the facts go into the items.
        """
        if np.isfinite(scores.correct).all():
            facts, correct = by_fact(scores.items, scores.correct)
            _, probability = by_fact(scores.items, scores.probability)
            self.add_estimate(RECALL, rate(correct), **columns)
            self.add_estimate(ANSWER_PROBABILITY, rate(probability), **columns)
            for fact, right, likely in zip(facts, correct, probability, strict=True):
                self.add_item(fact, right, likely, **columns)
        self.add(LOSS, scores.loss, n=int(scores.tokens.sum()), **columns)

    def frame(self) -> pd.DataFrame:
        """The results with every column, in its type."""
        return typed(pd.DataFrame(self.rows), RESULT_COLUMNS)

    def item_frame(self) -> pd.DataFrame:
        """The items with every column, in its type."""
        return typed(pd.DataFrame(self.items), ITEM_COLUMNS)


def _placed(place: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Labels, and the columns that an axis or two, or a token, fill."""
    axes = [name for name in place if name in AXES]
    filled = {name: place[name] for name in _AT if name in place}
    for name, (axis, at) in zip(axes, (("axis", "x"), ("y_axis", "y")), strict=False):
        filled |= {axis: name, at: float(place[name])}
    labels = {name: value for name, value in place.items() if name not in (*AXES, *_AT)}
    strange = set(labels) - set(LABELS)
    if strange:
        raise unknown("column or axis", min(strange), [*LABELS, *AXES, *_AT])
    return labels, filled


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


def read_table(path: Path, columns: Collection[str] | None = None) -> pd.DataFrame:
    """What :func:`write_parquet` wrote.

    Args:
        path: the file.
        columns: that it must have.

    Raises:
        WorkbenchError: the file is missing, damaged, has no hash, or was written by an older
            workbench.
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
    if columns is not None and list(frame.columns) != list(columns):
        raise WorkbenchError(
            f"{path} was written by an older workbench (its columns are "
            f"{', '.join(frame.columns)}); run the command again into another folder"
        )
    return frame


def write_tables(frame: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """One Parquet file for every schema (:data:`SCHEMAS`); see :func:`write_parquet`.

    Returns:
        The rows in the order in which :func:`read_tables` gives them back.
    """
    schema = schema_of(frame)
    for name, columns in SCHEMAS.items():
        rows = frame.loc[schema == name, list(columns)].reset_index(drop=True)
        write_parquet(typed(rows, columns), folder / f"{name}.parquet")
    return join((frame[schema == name] for name in SCHEMAS), RESULT_COLUMNS)


def read_tables(folder: Path) -> pd.DataFrame:
    """All values that :func:`write_tables` wrote, under one another.

    Raises:
        WorkbenchError: a file is missing, damaged, or was written by an older workbench.
    """
    parts = [read_table(folder / f"{name}.parquet", columns) for name, columns in SCHEMAS.items()]
    return join(parts, RESULT_COLUMNS)


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
    selected = matching(items, **where)
    if not len(selected):
        raise NotMeasuredError(
            "not measured: " + ", ".join(f"{name} {value}" for name, value in where.items())
        )
    return selected.pivot_table(
        index="seed", columns="item", values=column, aggfunc="mean", sort=True
    )


def along(axis: Any, x: Any) -> dict[str, Any]:
    """The keyword by which :meth:`Table.add` takes the place on an axis that two cells hold; none
    where they are empty.
    """
    return {} if pd.isna(axis) else {str(axis): float(x)}


def summarise(items: pd.DataFrame, run: str) -> pd.DataFrame:
    """What the items measure, and the answer probability, over all seeds, with a two-level
    bootstrap over seeds and facts; ``seed`` is empty in these rows.

    Recovery is attacked minus control, paired by seed and fact: metric ``recovery_recall`` (and
    ``recovery_answer_probability``) with arm ``minus-null`` (the same model under the null attack),
    ``minus-random-facts`` (the same model relearning facts that are true nowhere) and
    ``minus-never-learned`` (the never-learned model under the same attack), at every step. What a
    smoothing does is the plain method minus the smoothed one under the same attack, paired
    likewise: metric ``smoothing_effect``, owned by the smoothed method.
    """
    table = Table({"run": run})
    keys = ["stage", "method", "split", "arm", "axis", "x", "measure"]
    for values, group in items.groupby(keys, dropna=False, sort=False):
        labels = dict(zip(keys, values, strict=True))
        measure = metric_of(str(labels.pop("measure")))
        columns: dict[str, Any] = {**along(labels.pop("axis"), labels.pop("x")), **labels}
        measured = [(measure, "correct")]
        if measure is RECALL:
            measured.append((ANSWER_PROBABILITY, "probability"))
        for metric, column in measured:
            wide = group.pivot_table(
                index="seed", columns="item", values=column, aggfunc="mean", sort=False
            )
            if wide.notna().all().all():
                table.add_estimate(
                    metric, rate(wide.to_numpy()), **columns, model=columns["method"]
                )
    attacks = matching(items, axis="attack_step", arm=["attack", "null", "random-facts"])
    for stage, stage_items in attacks.groupby("stage", sort=False):
        _add_recovery(stage_items, table, str(stage))
        _add_smoothing(matching(stage_items, arm="attack"), table, str(stage))
    return table.frame()


def smoothing_pairs(methods: Collection[str]) -> list[tuple[str, str]]:
    """``(plain, smoothed)`` of all methods that are there both ways."""
    return [
        (name, f"{name}-{wrapper}")
        for name in sorted(methods)
        for wrapper in SMOOTHINGS
        if f"{name}-{wrapper}" in methods
    ]


def _add_smoothing(attacks: pd.DataFrame, table: Table, stage: str) -> None:
    for plain, smoothed in smoothing_pairs(set(attacks["method"].dropna())):
        both = matching(attacks, method=plain).merge(
            matching(attacks, method=smoothed),
            on=["split", "x", "seed", "item"],
            suffixes=("", "_smoothed"),
        )
        both["difference"] = both["correct"] - both["correct_smoothed"]
        for (split, step), group in both.groupby(["split", "x"], sort=False, dropna=False):
            place = {"stage": stage, "split": split, "attack_step": step, "arm": "attack"}
            _add_difference(table, SMOOTHING_EFFECT, group, smoothed, place)


def _add_recovery(attacks: pd.DataFrame, table: Table, stage: str) -> None:
    for (method, split, step), group in matching(attacks, arm="attack").groupby(
        ["method", "split", "x"], sort=False
    ):
        same = matching(attacks, split=split, x=step)
        controls = {
            "minus-null": matching(same, arm="null", method=method),
            "minus-random-facts": matching(same, arm="random-facts", method=method),
            "minus-never-learned": matching(same, arm="attack", method="never-learned"),
        }
        for arm, control in controls.items():
            for metric, column in (
                (RECOVERY_RECALL, "correct"),
                (RECOVERY_ANSWER_PROBABILITY, "probability"),
            ):
                pairs = group.merge(control, on=["seed", "item"], suffixes=("", "_control"))
                if not len(pairs) or (method == "never-learned" and arm == "minus-never-learned"):
                    continue
                pairs["difference"] = pairs[column] - pairs[f"{column}_control"]
                place = {"stage": stage, "split": split, "attack_step": step, "arm": arm}
                _add_difference(table, metric, pairs, str(method), place)


def _add_difference(
    table: Table, metric: Metric, pairs: pd.DataFrame, method: str, place: Mapping[str, Any]
) -> None:
    """The mean of a column ``difference`` with its interval, where every seed has every fact."""
    wide = pairs.pivot_table(index="seed", columns="item", values="difference")
    if wide.notna().all().all():
        effect = bootstrap(wide.to_numpy())
        table.add_estimate(metric, effect, model=method, method=method, **place)
