"""Why does smoothed unlearning resist relearning, if it does? The landscape around a finished run's
models before the attack, beside what the attack won back.

Eigenvalues, trace and density are those of canonical weights
(:mod:`workbench.sharpness.canonical`): no rewrite of a model changes them. Slices, drops, noise and
the attack's path are those of the weights as they are, in which the attacker moves; they do change
with a rewrite.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pandas as pd
from pydantic import Field, field_validator
from transformers import PreTrainedModel

from workbench import metrics, values
from workbench.attacks.ladder import novel_facts
from workbench.errors import WorkbenchError
from workbench.experiments import QUESTIONS
from workbench.experiments.predictors import correlate, point_rows, points_of
from workbench.runner import Experiment, ModelJob, Plan, Source, plan_over_models
from workbench.runs import landscape
from workbench.runs.models import BASE, CONTROLS
from workbench.runs.settings import Count, FinishedRunSettings, Numbers
from workbench.sharpness.canonical import FAMILIES, canonicalise
from workbench.tables import RESULT_COLUMNS, Table, join
from workbench.unlearning.deltas import norm_of, snapshot


class SharpnessSettings(FinishedRunSettings):
    """What is measured around every model.

    Attributes:
        methods: of the run.
        radii: of the worst case, in lengths of the displacement by unlearning.
        fixed: of the worst case, in shares of the length of the base's weights; for the adaptive
            ball relative to every weight.
        steps: gradient steps of the search in every ball.
        noise: expected length of Gaussian noise, in shares of the length of the base's weights.
        draws: of the noise.
        probes: random signs for the trace.
        density_probes: starting vectors of the spectral density; density, attack path and plane are
            taken for the first seed only.
        density_steps: Lanczos steps of each.
        points: along every line, and along either side of the plane.
        reach: half-width of the random and gradient slices, as a share of the weights' norm.
        tolerance: ARPACK's, for the ends of the spectrum.
    """

    radii: Numbers = Field(
        (0.01, 0.02, 0.05, 0.1, 0.25),
        description="Of the worst case, in lengths of the displacement by unlearning.",
    )
    fixed: Numbers = Field(
        (0.0003, 0.001, 0.003, 0.01),
        description="Of the worst case, in shares of the length of the base's weights.",
    )
    steps: Count = Field(5, description="Gradient steps of the search in every ball.")
    noise: Numbers = Field(
        (0.01, 0.03), description="Length of Gaussian noise, in shares of the base's weights."
    )
    draws: Count = Field(8, description="Draws of the noise.")
    probes: Count = Field(16, description="Random signs for the trace.")
    density_probes: Count = Field(2, description="Starting vectors of the spectral density.")
    density_steps: Count = Field(30, description="Lanczos steps of each.")
    points: int = Field(9, ge=3, le=10_001, description="Along every line and side of the plane.")
    reach: float = Field(
        0.05, gt=0, le=1e6, description="Half-width of slices, as a share of the weights' norm."
    )
    tolerance: float = Field(0.05, gt=0, lt=1, description="Relative, of the ends of the spectrum.")

    @field_validator("radii", "fixed", "noise")
    @classmethod
    def _rising(cls, sizes: tuple[float, ...]) -> tuple[float, ...]:
        for size in sizes:
            values.number("a radius", size, above=0, high=1e6)
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"they are {sizes}; give at least one, each larger than the last")
        return sizes


def _canonical(model: PreTrainedModel) -> PreTrainedModel:
    """The same function in canonical weights, where its family's freedoms are known: rewriting a
    model must not change its curvature.
    """
    return canonicalise(model) if model.config.model_type in FAMILIES else model


def _ask(settings: SharpnessSettings, job: ModelJob) -> None:
    setup, seed, first = job.setup, job.seed, job.first
    config, progress = job.source.config, job.context.progress
    parts = 9 if first else 6

    def work(table: Table) -> None:
        model = job.model
        people = len({example.subject_text for example in setup.record.forget_attacked})
        novel = () if setup.world is None else novel_facts(setup.world, people)
        losses = landscape.losses_of(setup, novel)
        texts = landscape.whole_batch(setup)
        size, displacement = (
            norm_of(snapshot(setup.base)),
            landscape.distance_between(model, setup.base),
        )
        done = 0

        def after() -> None:
            nonlocal done
            done += 1
            progress(done, parts)

        landscape.add_slices(
            model, setup, losses, table, points=settings.points, reach=settings.reach, seed=seed
        )
        after()
        landscape.add_worst_cases(
            model,
            losses,
            table,
            displacement=displacement,
            size=size,
            radii=settings.radii,
            fixed=settings.fixed,
            steps=settings.steps,
            seed=seed,
        )
        after()
        landscape.add_average(
            model, losses, table, size=size, relative=settings.noise, draws=settings.draws
        )
        after()
        if displacement:
            landscape.add_line(model, setup, losses, table, points=settings.points)
        after()
        plain = _canonical(model)
        landscape.add_ends(
            plain, texts, table, tolerance=settings.tolerance, seed=seed, arm="unlearned"
        )
        after()
        landscape.add_trace(plain, texts, table, probes=settings.probes, seed=seed, arm="unlearned")
        after()
        if not first:
            return
        landscape.add_density(
            plain,
            texts,
            table,
            probes=settings.density_probes,
            steps=settings.density_steps,
            seed=seed,
            arm="unlearned",
        )
        after()
        relearned = _canonical(
            landscape.add_attack_path(
                model,
                setup,
                losses,
                setup.record.forget_attacked,
                config.attack,
                table,
                seed=seed,
                points=settings.points,
            )
        )
        after()
        landscape.add_ends(
            relearned, texts, table, tolerance=settings.tolerance, seed=seed, arm="relearned"
        )
        landscape.add_trace(
            relearned, texts, table, probes=settings.probes, seed=seed, arm="relearned"
        )
        landscape.add_density(
            relearned,
            texts,
            table,
            probes=settings.density_probes,
            steps=settings.density_steps,
            seed=seed,
            arm="relearned",
        )
        after()

    job.context.stage("sharpness", work)


def prepare(settings: SharpnessSettings, source: Source, out: Path) -> Plan:
    """The landscape around every model, and every measure's correlation with what the run's attack
    won back.
    """

    def predictors(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
        run_results, attacked = source.tables
        everything = join([run_results[run_results["stage"] != "sharpness"], rows], RESULT_COLUMNS)
        measured = everything[everything["method"].isin(set(rows["method"]))]
        points = points_of(measured, attacked, source.folder.name)
        try:
            correlations = [correlate(points).results]
        except WorkbenchError as error:  # too few models
            print(f"no correlations: {error}", file=sys.stderr)
            correlations = []
        return (
            join([point_rows(points, key), *correlations], RESULT_COLUMNS)
            if len(points)
            else rows.iloc[:0]
        )

    return plan_over_models(
        "sharpness",
        source,
        partial(_ask, settings),
        seeded=False,
        summaries=(landscape.density_curves, predictors),
        claims=("sam-resists", "smoothing-resists", "flat-resists", "distance-resists"),
    )


def sharpness_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model, mean over seeds: how far the loss falls in a ball, both ends of the
    spectrum with the worst residual, trace, noise, where the way to the base is half done.
    """
    rows = results[results["seed"].notna() & ~results["arm"].isin(["relearned"])]

    def mean(method: str, metric: str, **where: object) -> float:
        cell = rows[(rows["method"] == method) & (rows["metric"] == metric)]
        for name, value in where.items():
            cell = cell[cell[name] == value]
        return float(cell["value"].mean()) if len(cell) else float("nan")

    drops = metrics.DROP.rows(rows)
    steps = {
        arm: float(drops.loc[drops["arm"] == arm, "x"].sort_values().unique()[-2:][0])
        for arm in ("drop", "drop, fixed radius")
        if (drops["arm"] == arm).any()
    }
    lines = []
    for method in sorted(
        rows["method"].dropna().unique(),
        key=lambda name: (name not in CONTROLS, name != BASE, name),
    ):
        line: dict[str, object] = {"model": method}
        for arm, unit in (
            ("drop", "of the displacement"),
            ("drop, fixed radius", "of the weights"),
        ):
            if arm in steps:
                at = {"arm": arm, "x": steps[arm]}
                line[f"drop within {steps[arm]:g} {unit}"] = mean(
                    method, "drop", split=landscape.ATTACKED, **at
                )
                line[f"the same, held-out, {steps[arm]:g} {unit}"] = mean(
                    method, "drop", split=landscape.HELD_OUT, **at
                )
        line |= {
            "top eigenvalue": mean(method, "top_eigenvalue"),
            "bottom eigenvalue": mean(method, "bottom_eigenvalue"),
            "trace": mean(method, "trace"),
            "gradient norm": mean(method, "gradient_norm"),
            "way to the base until half": mean(method, "half_at_to_base", split=landscape.HELD_OUT),
        }
        lines.append(
            {
                name: value if isinstance(value, str) else round(float(str(value)), 3)
                for name, value in line.items()
            }
        )
    return pd.DataFrame(lines)


SHARPNESS = Experiment(
    "sharpness",
    QUESTIONS["sharpness"],
    SharpnessSettings,
    prepare,
    sharpness_table,
)
