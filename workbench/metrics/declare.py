"""What a metric is: its declaration, the axes that it may be measured along, and the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import WorkbenchError, unknown
from workbench.hooks.brief import brief
from workbench.registry import Registry

AXES = {
    "alpha": "scale of the change of weights",
    "attack_step": "step of the attack",
    "bits": "bits of a weight",
    "coefficient": "steering coefficient",
    "component": "number of the component, from 1",
    "coordinate": "coordinate in units of its standard deviation",
    "eigenvalue": "eigenvalue",
    "fdr": "false discovery rate that is allowed",
    "first": "first so many words of a ranking",
    "lanczos_step": "step of the Lanczos iteration",
    "along_attack": "along the attack (1: the relearned model)",
    "noise": "length of the noise, relative",
    "position": "place on the line, 0: the model itself",
    "probe": "number of the random vector",
    "probes": "random vectors so far",
    "radius": "radius of the ball, relative",
    "rank": "dimensions of the subspace",
    "recall_level": "share of the true ones that were found",
    "search_step": "step of the search",
    "shots": "demonstrations in front of the question",
    "towards_base": "towards the base (1: the base)",
    "training_step": "step of the training",
}
"""Every axis with its label. A metric along one is written with the axis as keyword:
``table.add(RECALL, 0.5, attack_step=10)``.
"""

ALONE, TOKEN = "", "token"
"""The two places of a metric that has no axis: by itself, or at a token of the vocabulary."""

Where = str | tuple[str, str]
"""Where a metric may stand: :data:`ALONE`, :data:`TOKEN`, an axis, or a pair of axes."""


@brief
@dataclass(frozen=True, slots=True)
class Metric:
    """The declaration of a metric, and of the rows that hold it.

    Attributes:
        name: in column ``metric``.
        title: in prose and on axes.
        meaning: what is measured, in one sentence.
        unit: ``share``, ``nats per token``, ...; empty for a pure number.
        more: what a larger value says; empty where it says nothing by itself.
        identity: its value for a model beside itself, where it compares two models.
        where: where it may stand: alone, along one of these axes, in the plane of a pair of
            them, or at a token.
    """

    name: str
    title: str
    meaning: str
    unit: str = ""
    more: str = ""
    identity: float | None = None
    where: tuple[Where, ...] = (ALONE,)

    @property
    def label(self) -> str:
        """Title and unit, for an axis of a figure."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def rows(self, table: pd.DataFrame, **where: Any) -> pd.DataFrame:
        """The rows of a table that hold this metric.

        Args:
            table: tidy results.
            where: columns and what they must hold: a value, a list or set of them, or ``None`` for
                an empty cell.

        Example:
            >>> import pandas as pd
            >>> table = pd.DataFrame({"metric": ["recall", "loss"], "seed": [0, 0]})
            >>> Metric("loss", "loss", "Mean cross-entropy.").rows(table, seed=0)["metric"].tolist()
            ['loss']
        """
        return matching(table, metric=self.name, **where)

    def check(self, axes: Sequence[str], *, token: bool) -> None:
        """Raise unless a row of this metric may have these axes.

        Raises:
            WorkbenchError: it may not; the message names the axes that it has.
        """
        place: Where = TOKEN if token else ALONE
        if axes and not token:
            place = axes[0] if len(axes) == 1 else (axes[0], axes[1])
        if place not in self.where or (token and axes) or len(axes) > 2:
            given = f"along {' and '.join(axes)}" if axes else "without an axis"
            raise WorkbenchError(
                f"the metric {self.name!r} is added {given + (' at a token' if token else '')}; "
                f"it is declared {' or '.join(map(_told, self.where))}"
            )


def declared(names: Mapping[str, Any]) -> tuple[Metric, ...]:
    """All metrics among the names of a module, single or in tuples, in their order."""
    found: list[Metric] = []
    for value in names.values():
        for entry in value if isinstance(value, tuple) else (value,):
            found.extend([entry] if isinstance(entry, Metric) else [])
    return tuple(found)


def _told(place: Where) -> str:
    if isinstance(place, tuple):
        return f"over the plane of {place[0]} and {place[1]}"
    return {ALONE: "without an axis", TOKEN: "at a token"}.get(place, f"along {place}")


def matching(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows of a table whose columns hold what is asked: a value, one of a list or set, or
    nothing (``None``).
    """
    mask = np.ones(len(table), dtype=bool)
    for column, value in where.items():
        cells = table[column]
        if value is None:
            mask &= cells.isna().to_numpy()
        elif isinstance(value, (list, tuple, set, frozenset)):
            mask &= cells.isin(list(value)).to_numpy()
        else:
            mask &= (cells == value).fillna(False).to_numpy(dtype=bool)
    return table[mask]


METRICS: Registry[Metric] = Registry("metric", "workbench.metrics", "workbench.metrics")


def metric_of(name: str | Metric) -> Metric:
    """A declared metric by its name.

    Raises:
        WorkbenchError: there is none.
    """
    if isinstance(name, Metric):
        name = name.name
    if name not in METRICS:
        error = unknown("metric", name, METRICS)
        raise WorkbenchError(
            f"{error}; declare one of your own with "
            f"wb.metric({name!r}, title=..., meaning=...) before adding it to a table"
        )
    return METRICS[name]


def metric(
    name: str,
    *,
    title: str,
    meaning: str,
    unit: str = "",
    more: str = "",
    identity: float | None = None,
    where: Sequence[Where] = (ALONE,),
) -> Metric:
    """Declare a metric of your own, so that tables take it: see :class:`Metric`.

    Raises:
        WorkbenchError: the workbench has a metric of this name, or there is no such axis.

    Example:
        >>> metric("weight_sum", title="sum of weights", meaning="Sum of all weights.").label
        'sum of weights'
    """
    for place in where:
        for axis in (place,) if isinstance(place, str) else place:
            if axis not in AXES and axis not in (ALONE, TOKEN):
                raise unknown("axis", axis, AXES)
    declared = Metric(name, title, meaning, unit, more, identity, tuple(where))
    METRICS.add(declared)
    return declared
