"""Another relearning attack on the models of a finished run: the unlearned models are the same, the
attacker is stronger, weaker or slower.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
from pydantic import Field

from workbench import metrics
from workbench.errors import WorkbenchError
from workbench.experiments import QUESTIONS
from workbench.runner import Experiment, ModelJob, Plan, Source, plan_over_models
from workbench.runs.models import CONTROLS
from workbench.runs.settings import AttackOverrides, FinishedRunSettings
from workbench.runs.setup import Disruption
from workbench.runs.stages import add_disruption, attack, measure_sets, measured_sets
from workbench.tables import Table
from workbench.unlearning.deltas import apply_delta, delta_between, norm_of, snapshot


class RelearnAgainSettings(FinishedRunSettings, AttackOverrides):
    """The attack; what is left out is as in the run.

    Attributes:
        methods: of the run; base and never-learned control are attacked as well.
        distance: every change of weights is first scaled to this length, as a share of the length
            of the base's weights: resistance at equal distance, not at equal disruption (what it
            costs then is measured again, stage ``unlearn``). Default: the models as they are.
    """

    distance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Scale every change of weights to this share of the base's length first; "
        "default: as they are.",
    )


def _scaled(job: ModelJob, distance: float, table: Table) -> None:
    """Bring the change of weights to a length, and measure what it costs then."""
    setup, model = job.setup, job.model
    start = snapshot(setup.base)
    delta = delta_between(model, start)
    if not delta:
        raise WorkbenchError(
            f"{job.name} under seed {job.seed} has the weights of the base, so its change has "
            "no length to scale; leave it out with --methods"
        )
    alpha = distance * norm_of(start) / norm_of(delta)
    apply_delta(model, start, delta, alpha)
    for metric, value in (
        ("alpha", alpha),
        ("displacement", distance * norm_of(start)),
        ("relative_displacement", distance),
    ):
        table.add(metric, value, stage="unlearn")
    add_disruption(model, Disruption(setup), table)
    encoded = {
        name: setup.encode(examples) for name, examples in measured_sets(setup.record).items()
    }
    measure_sets(model, encoded, table, stage="unlearn")


def _ask(settings: RelearnAgainSettings, job: ModelJob) -> None:
    setup = job.setup

    def work(table: Table) -> None:
        if settings.distance is not None and not job.is_control:
            _scaled(job, settings.distance, table)
        attack(
            job.model,
            setup,
            settings.attack_from(job.source.config.attack),
            seed=job.seed,
            table=table,
            null_pool=setup.null_pool,
            matched=setup.world is None,
            progress=job.context.progress,
        )

    job.context.stage("relearn", work)


def prepare(settings: RelearnAgainSettings, source: Source, out: Path) -> Plan:
    """Attack the models of a run, base and never-learned control among them, with the attacker's
    texts and with the null text.
    """
    attack, distance = settings.attack_from(source.config.attack), settings.distance
    claims: tuple[str, ...] = ("cir-robust", "rounding-resists", "sam-resists", "smoothing-resists")
    # at one distance there is nothing to correlate
    claims += ("distance-resists",) if distance is None else ()
    far = "" if distance is None else f", distance {distance:g}"
    return plan_over_models(
        "relearn",
        source,
        partial(_ask, settings),
        claims=claims,
        note=f", attack at {attack.lr:g}{far}",
    )


def relearn_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model: recall of held-out facts before the attack, along it and at its end, and
    at the end of the null attack, with intervals.
    """
    rows = metrics.RECALL.rows(results, split="forget-heldout", seed=None)
    lines = []
    for method in sorted(rows["method"].unique(), key=lambda name: (name not in CONTROLS, name)):
        line = {"model": method}
        for arm in ("attack", "null"):
            curve = rows[(rows["method"] == method) & (rows["arm"] == arm)].sort_values("x")
            steps = list(curve["x"]) if arm == "attack" else list(curve["x"])[-1:]
            for step, value, low, high in zip(
                steps,
                *(curve[name].iloc[-len(steps) :] for name in ("value", "low", "high")),
                strict=True,
            ):
                name = (
                    "before"
                    if step == 0
                    else f"{step:.0f} steps"
                    if arm == "attack"
                    else f"{step:.0f} steps, null"
                )
                line[name] = f"{value:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(line)
    return pd.DataFrame(lines)


def _ends(table: pd.DataFrame) -> pd.DataFrame:
    """Before the attack and at its end; the figure and ``--json`` have the steps between."""
    return table[["model", "before", *table.columns[-2:]]]


RELEARN = Experiment(
    "relearn",
    QUESTIONS["relearn"],
    RelearnAgainSettings,
    prepare,
    relearn_table,
    shown=_ends,
)
