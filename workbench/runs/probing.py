"""The registry of what a run asks of every model besides forgetting, disruption and relearning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from workbench import metrics, values
from workbench.diagnostics.triggers import NothingToAsk
from workbench.hooks.brief import brief
from workbench.registry import Registry
from workbench.runs import stages
from workbench.runs.setup import Setup
from workbench.tables import Table

if TYPE_CHECKING:
    from workbench.runs.config import RunConfig

Ask = Callable[[PreTrainedModel, Setup, Table, int], None]
"""``ask(model, setup, table, seed)``: measures something and adds rows to ``table``."""


@brief
@dataclass(frozen=True, slots=True)
class Probe:
    """An entry of the registry.

    Attributes:
        name: of the stage, and after ``--probe``.
        title: in prose.
        ask: ``ask(model, setup, table, seed, config)``.
        seeded: what it finds in the base and in the never-learned model depends on the seed.
    """

    name: str
    title: str
    ask: Callable[[PreTrainedModel, Setup, Table, int, RunConfig], None]
    seeded: bool = True


def _triggers(
    model: PreTrainedModel, setup: Setup, table: Table, seed: int, config: RunConfig
) -> None:
    try:
        stages.trigger_check(
            model, setup, setup.neutral, seed=seed, table=table, template=setup.template
        )
    except NothingToAsk:  # a user's texts that all share the same words
        table.add(metrics.TRIGGER_CHECK_POSSIBLE, 0.0)


def _sharpness(
    model: PreTrainedModel, setup: Setup, table: Table, seed: int, config: RunConfig
) -> None:
    stages.sharpness(
        model,
        setup,
        points=config.slice_points,
        reach=config.slice_reach,
        tolerance=config.curvature_tolerance,
        seed=seed,
        table=table,
    )


PROBES: Registry[Probe] = Registry("probe", __name__, "workbench.probes")
PROBES.own(
    [
        Probe("triggers", "trigger check", _triggers),
        Probe("sharpness", "sharpness", _sharpness, seeded=False),
    ]
)


def probe(name: str, *, title: str = "", seeded: bool = True) -> Callable[[Ask], Ask]:
    """Decorate a function ``ask(model, setup, table, seed)`` that measures something and adds it
    with ``table.add(metric, value)``: a run with ``--probe NAME`` asks it of every model, resumes
    behind it and keeps its rows in the run's tables, with the name as their stage.

    Args:
        name: of the probe.
        title: in prose; default the name.
        seeded: what it finds in the base and in the never-learned model depends on the seed.

    Raises:
        WorkbenchError: the workbench has a probe or a stage of this name.
    """

    def register(ask: Ask) -> Ask:
        @functools.wraps(ask)  # its source is the user's, for the configuration
        def asked(
            model: PreTrainedModel, setup: Setup, table: Table, seed: int, config: RunConfig
        ) -> None:
            ask(model, setup, table, seed)

        values.labels("probe", [name], taken=("unlearn", "budget", "relearn", "subspaces"))
        PROBES.add(Probe(name, title or name, asked, seeded))
        return ask

    return register
