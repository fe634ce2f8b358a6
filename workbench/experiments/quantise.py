"""Rounding a run's models to few bits: does the deployment format bring forgotten answers back?

Zhang et al. 2024 (arXiv 2410.16454): an update that is small beside the steps of 4-bit weights is
rounded away, and the forgotten knowledge is back. The base and the never-learned model are rounded
alike, since rounding costs every model something.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
from pydantic import Field, field_validator

from workbench import metrics
from workbench.attacks.quantise import quantised, surviving_share
from workbench.evaluation.statistics import bootstrap
from workbench.experiments import QUESTIONS
from workbench.runner import Experiment, ModelJob, Plan, Source, plan_over_models
from workbench.runs.settings import FinishedRunSettings, Integers
from workbench.runs.stages import measure_sets, measured_sets
from workbench.tables import Table, by_columns, fact_table

HELD_OUT = "forget-heldout"


class QuantiseSettings(FinishedRunSettings):
    """How the weights are rounded.

    Attributes:
        methods: of the run.
        bits: of the codes.
        head: round the output head as well.
    """

    bits: Integers = Field((8, 4), description="Of the codes: 8, 4, or both.")
    head: bool = Field(False, description="Round the output head as well.")

    @field_validator("bits")
    @classmethod
    def _possible(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if not bits or set(bits) - {4, 8} or len(set(bits)) != len(bits):
            raise ValueError(f"they are {bits}; give 8, 4, or both")
        return bits


def _measure(settings: QuantiseSettings, job: ModelJob, table: Table) -> None:
    setup, model = job.setup, job.model
    sets = {name: setup.encode(texts) for name, texts in measured_sets(setup.record).items()}
    measure_sets(model, sets, table, arm="none", bits=32)
    for bits in settings.bits:
        rounded = quantised(model, bits, head=settings.head).model
        measure_sets(rounded, sets, table, arm="rounded", bits=bits)
        if not job.is_control:
            surviving = surviving_share(setup.base, model, bits)
            for metric in ("share", "carried", "cosine"):
                table.add(
                    f"quantised_{metric}", getattr(surviving, metric), arm="rounded", bits=bits
                )


def _stage(settings: QuantiseSettings, job: ModelJob) -> None:
    job.context.stage("quantise", partial(_measure, settings, job))


def _effects(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
    """What rounding brings back: recall of held-out forgotten facts with it minus without it,
    paired by seed and fact.
    """
    table = Table({"run": key, "stage": "quantise", "split": HELD_OUT})
    held = items[items["split"] == HELD_OUT]
    for (method, step), rounded in held[held["arm"] == "rounded"].groupby(["method", "x"]):
        plain = fact_table(held, method=method, arm="none")
        change = bootstrap((fact_table(rounded) - plain).to_numpy())
        table.add_estimate(
            metrics.QUANTISE_EFFECT, change, method=method, model=method, arm="rounded", bits=step
        )
    return table.frame()


def prepare(settings: QuantiseSettings, source: Source, out: Path) -> Plan:
    """Every model as it is and rounded."""
    return plan_over_models(
        "quantise", source, partial(_stage, settings), seeded=False, summaries=(_effects,)
    )


def quantise_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model: recall of held-out forgotten facts by bits, and what rounding brings
    back.
    """
    rows = results[(results["stage"] == "quantise") & (results["split"] == HELD_OUT)]
    rows = rows[rows["seed"].isna()]
    recall = by_columns(metrics.RECALL.rows(rows), "x", "{:g} bits")
    effects = metrics.QUANTISE_EFFECT.rows(rows)
    return recall.merge(
        by_columns(effects, "x", "change by {:g} bits", sign=True), on="model", how="left"
    )


QUANTISE = Experiment(
    "quantise",
    QUESTIONS["quantise"],
    QuantiseSettings,
    prepare,
    quantise_table,
)
