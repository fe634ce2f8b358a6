"""What must be said beside every number of a model: an attack that diverged, a budget that was not
reached, a change that is no change.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from workbench import metrics
from workbench.attacks.attack import ATTACKS

HARDLY = 1e-6
"""Relative displacement below which a change is rounding."""
RELEARN = "relearn"
"""The attack of every run."""
SHRUNK = 0.1
"""Scale below which little is left of the change that a method made."""


def _of(table: pd.DataFrame, metric: str, stage: str) -> Mapping[str, pd.DataFrame]:
    rows = table[(table["metric"] == metric) & (table["stage"] == stage) & table["split"].isna()]
    return {str(name): group for name, group in rows.groupby("method")}


def _seeds(rows: pd.DataFrame, wrong: pd.Series) -> str:
    """``in 1 of 3 seeds``, or nothing where it is all of them."""
    return "" if bool(wrong.all()) else f" in {int(wrong.sum())} of {len(rows)} seeds"


def diverged(table: pd.DataFrame, arm: str = "attack", stage: str = "relearn") -> dict[str, float]:
    """Method -> the first step at which its attack was not finite any more."""
    rows = metrics.DIVERGED_AT.rows(table, stage=stage, arm=arm)
    return {
        str(name): float(value) for name, value in rows.groupby("method")["value"].min().items()
    }


def marks(table: pd.DataFrame) -> dict[str, list[str]]:
    """Method -> what must be said beside its numbers; methods without a mark are left out.

    Args:
        table: tidy results.
    """
    notes_of: dict[str, list[str]] = {}

    def say(method: str, words: str) -> None:
        notes_of.setdefault(method, []).append(words)

    for method, rows in _of(table, "relative_displacement", "unlearn").items():
        still = rows["value"] == 0
        hardly = (rows["value"] < HARDLY) & ~still
        if still.any():
            say(method, "did not move" + _seeds(rows, still))
        if hardly.any():
            say(method, f"hardly moved (by {rows['value'].min():.0e} of its weights)")
    for method, rows in _of(table, "budget_reached", "unlearn").items():
        short = rows["value"] < 1
        if short.any():
            say(method, "budget not reached" + _seeds(rows, short))
    for method, rows in _of(table, "alpha", "unlearn").items():
        small = rows["value"] < SHRUNK
        if small.any():
            words = f"only {rows['value'].min():.2g} of its change fits the budget"
            say(method, words + _seeds(rows, small))
    for method, rows in _of(table, "disruption", "unlearn").items():
        if not np.isfinite(rows["value"].astype(float)).all():
            say(method, "disruption is not finite")
    changed = metrics.PARAMETERS_TRAINED.rows(table, stage="unlearn")
    for name, rows in changed.groupby("method"):
        counts = rows.groupby("arm")["value"].max()
        if len(counts) == 2 and counts["changed"] < counts["declared"]:
            words = f"{counts['changed']:g} of {counts['declared']:g} parameters to train changed"
            say(str(name), words)
    leaks = table[(table["stage"] == "relearn") & (table["arm"] == "attack")]
    for name, rows in leaks.groupby("method"):
        counts = rows.groupby("metric")["value"].max()
        if counts.get("benign", 1.0) < 1:
            answers, passages = (
                counts.get(f"leaked_{kind}", 0) for kind in ("answers", "passages")
            )
            say(
                str(name),
                f"not benign: the attack texts hold {answers:g} held-out answers and {passages:g} "
                "passages of them",
            )
    for arm, what in (("attack", "attack"), ("null", "null attack"), ("random-facts", "control")):
        for method, step in diverged(table, arm).items():
            say(method, f"{what} diverged at step {step:g}")
    for stage in further_attacks(table):
        for method, step in diverged(table, stage=stage).items():
            say(method, f"{ATTACKS[stage].title} diverged at step {step:g}")
    return notes_of


def further_attacks(table: pd.DataFrame) -> list[str]:
    """The attacks besides relearning that the models of a run were put under: names of stages."""
    rows = metrics.matching(table, axis="attack_step", arm="attack", split="forget-heldout")
    return [name for name in rows["stage"].dropna().unique() if name in ATTACKS and name != RELEARN]


def main_metric(table: pd.DataFrame) -> str:
    """``recall`` where the base recalls anything; otherwise (long answers of running text)
    ``answer_probability``.
    """
    recall = metrics.RECALL.rows(table, method="base")["value"]
    known = not len(table) or (len(recall) and float(recall.max()) >= 0.2)
    return "recall" if known else "answer_probability"
