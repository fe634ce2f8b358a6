"""Why does smoothed unlearning resist relearning, if it does? The landscape around a finished run's models before the attack, beside what the attack won back.

Eigenvalues, trace and density are those of canonical weights (:mod:`workbench.sharpness.canonical`): no rewrite of a model changes them. Slices, drops, noise and the attack's path
are those of the weights as they are, in which the attacker moves; they do change with a rewrite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

from workbench.attacks.ladder import novel_facts
from workbench.errors import WorkbenchError
from workbench.experiments import landscape
from workbench.experiments.afterwards import BASE, CONTROLS, ask_models, bench_of
from workbench.experiments.config import RunConfig
from workbench.experiments.folder import read_results, run_stage
from workbench.experiments.predictors import Predictors, correlate, point_rows, points_of
from workbench.experiments.table import COLUMNS, Table, join
from workbench.models import open_model
from workbench.progress import Report
from workbench.sharpness.canonical import FAMILIES, canonicalise
from workbench.unlearning.deltas import norm_of, snapshot

CLAIMED = ("sam-resists", "smoothing-resists", "flat-resists", "distance-resists")


@dataclass(frozen=True, slots=True)
class SharpnessSettings:
    """What is measured around every model.

    Attributes:
        radii: of the worst case, in lengths of the displacement by unlearning.
        fixed: of the worst case, in shares of the length of the base's weights; for the adaptive ball relative to every weight.
        steps: gradient steps of the search in every ball.
        noise: expected length of Gaussian noise, in shares of the length of the base's weights.
        draws: of the noise.
        probes: random signs for the trace.
        density_probes: starting vectors of the spectral density; density, attack path and plane are taken for the first seed only.
        density_steps: Lanczos steps of each.
        points: along every line, and along either side of the plane.
        reach: half-width of the random and gradient slices, as a share of the weights' norm.
        tolerance: ARPACK's, for the ends of the spectrum.
    """

    radii: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.25)
    fixed: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)
    steps: int = 5
    noise: tuple[float, ...] = (0.01, 0.03)
    draws: int = 8
    probes: int = 16
    density_probes: int = 2
    density_steps: int = 30
    points: int = 9
    reach: float = 0.05
    tolerance: float = 0.05


@dataclass(frozen=True, repr=False)
class SharpnessRun:
    """The landscapes of a run's models.

    Attributes:
        folder: their folder.
        results: tidy rows.
        items: the run's own, per fact: what the attack won back.
        predictors: rank correlations of every measure with recovery; none where the run has too few models.
    """

    folder: Path
    results: pd.DataFrame
    items: pd.DataFrame
    predictors: Predictors | None

    def __repr__(self) -> str:
        return f"SharpnessRun({self.folder}: {len(self.results):,} rows)"

    def _repr_html_(self) -> str:
        return sharpness_table(self.results).to_html(index=False, escape=True)


def _canonical(model: PreTrainedModel) -> PreTrainedModel:
    """The same function in canonical weights, where its family's freedoms are known: rewriting a model must not change its curvature."""
    return canonicalise(model) if model.config.model_type in FAMILIES else model


def _job(
    settings: SharpnessSettings,
    run: Path,
    out: Path,
    key: str,
    config: RunConfig,
    method: str,
    seed: int,
    progress: Report,
) -> None:
    first = seed == config.seeds[0]
    if (
        method in CONTROLS and not first
    ):  # one model each: what surrounds it does not depend on the seed of an attack
        return
    bench, world = bench_of(run, config)
    parts = 9 if first else 6

    def work(table: Table) -> None:
        model = open_model(
            run / "models" / (method if method in CONTROLS else f"{method}-seed{seed}")
        ).model
        losses = landscape.losses_of(
            bench,
            novel_facts(
                world, len({example.subject_text for example in bench.record.forget_attacked})
            ),
        )
        texts = landscape.whole_batch(bench)
        size, displacement = (
            norm_of(snapshot(bench.base)),
            landscape.distance_between(model, bench.base),
        )
        done = 0

        def after() -> None:
            nonlocal done
            done += 1
            progress(done, parts)

        landscape.add_slices(
            model, bench, losses, table, points=settings.points, reach=settings.reach, seed=seed
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
            landscape.add_line(model, bench, losses, table, points=settings.points)
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
                bench,
                losses,
                bench.record.forget_attacked,
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

    run_stage(
        out,
        f"{method}-seed{seed}",
        "sharpness",
        {"run": key, "stage": "sharpness", "model": method, "method": method, "seed": seed},
        work,
    )


def run_sharpness(
    run: Path,
    out: Path,
    settings: SharpnessSettings | None = None,
    *,
    methods: Sequence[str] = (),
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> SharpnessRun:
    """Measure the landscape around the models of a finished run, and correlate every measure with what the run's attack won back.

    Args:
        run: a finished run on the built-in world.
        out: folder of the measurements.
        settings: default :class:`SharpnessSettings`.
        methods: of the run; default all.
        fresh: throw away measurements that are already there.
        workers: processes; default is one per core.
        announce: called with one line.

    Raises:
        WorkbenchError: the run is not finished, or has no such method.
    """
    chosen = settings or SharpnessSettings()
    results, _ = ask_models(
        "sharpness", run, out, partial(_job, chosen), (landscape.density_curves,), methods=methods, fresh=fresh, workers=workers, announce=announce,
        settings=asdict(chosen),
    )  # fmt: skip
    own_results, items = read_results(run)
    everything = join([own_results[own_results["stage"] != "sharpness"], results], COLUMNS)
    points = points_of(
        everything[everything["method"].isin(set(results["method"]))], items, run.name
    )
    try:
        found = correlate(points)
    except WorkbenchError as error:
        announce(f"no correlations: {error}")
        found = None
    parts = [results, point_rows(points, run.name), *([found.results] if found else [])]
    return SharpnessRun(out, join(parts, COLUMNS), items, found)


def sharpness_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model, mean over seeds: how far the loss falls in a ball, both ends of the spectrum with the worst residual, trace, noise, where the way to the base is half done."""
    rows = results[results["seed"].notna() & ~results["arm"].isin(["relearned"])]

    def mean(method: str, metric: str, **where: object) -> float:
        mine = rows[(rows["method"] == method) & (rows["metric"] == metric)]
        for name, value in where.items():
            mine = mine[mine[name] == value]
        return float(mine["value"].mean()) if len(mine) else float("nan")

    drops = rows[rows["metric"] == "drop"]
    steps = {
        arm: float(drops.loc[drops["arm"] == arm, "step"].sort_values().unique()[-2:][0])
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
                at = {"arm": arm, "step": steps[arm]}
                line[f"drop within {steps[arm]:g} {unit}"] = mean(
                    method, "drop", split=landscape.FOLLOWED, **at
                )
                line[f"the same, held-out, {steps[arm]:g} {unit}"] = mean(
                    method, "drop", split=landscape.WATCHED, **at
                )
        line |= {
            "top eigenvalue": mean(method, "top_eigenvalue"),
            "bottom eigenvalue": mean(method, "bottom_eigenvalue"),
            "trace": mean(method, "trace"),
            "gradient norm": mean(method, "gradient_norm"),
            "way to the base until half": mean(method, "half_at_to_base", split=landscape.WATCHED),
        }
        lines.append(
            {
                name: value if isinstance(value, str) else round(float(str(value)), 3)
                for name, value in line.items()
            }
        )
    return pd.DataFrame(lines)
