"""Another relearning attack on the models of a finished run: the unlearned models are the same, the attacker is stronger, weaker or slower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd

from workbench.attacks.relearn import RelearnSettings
from workbench.errors import WorkbenchError
from workbench.experiments.afterwards import CONTROLS, ask_models, bench_of
from workbench.experiments.bench import Disruption
from workbench.experiments.config import RunConfig
from workbench.experiments.folder import Experiment, run_stage
from workbench.experiments.stages import add_disruption, attack, measure_sets, measured_sets
from workbench.experiments.table import Table
from workbench.models import open_model
from workbench.progress import Report
from workbench.unlearning.deltas import apply_delta, delta_between, norm_of, snapshot

CLAIMED = ("cir-robust", "rounding-resists", "sam-resists", "smoothing-resists", "distance-resists")
"""Claims about what relearning wins back."""


def _job(
    settings: RelearnSettings,
    distance: float | None,
    run: Path,
    out: Path,
    key: str,
    config: RunConfig,
    method: str,
    seed: int,
    progress: Report,
) -> None:
    bench, world = bench_of(run, config)

    def work(table: Table) -> None:
        model = open_model(
            run / "models" / (method if method in CONTROLS else f"{method}-seed{seed}")
        ).model
        if distance is not None and method not in CONTROLS:
            start = snapshot(bench.base)
            delta = delta_between(model, start)
            if not delta:
                raise WorkbenchError(
                    f"{method} under seed {seed} has the weights of the base, so its change has no length to scale; leave it out with --methods"
                )
            alpha = distance * norm_of(start) / norm_of(delta)
            apply_delta(model, start, delta, alpha)
            for metric, value in (
                ("alpha", alpha),
                ("displacement", distance * norm_of(start)),
                ("relative_displacement", distance),
            ):
                table.add(metric, value, stage="unlearn")
            add_disruption(model, Disruption(bench), table)
            measure_sets(
                model,
                {
                    name: bench.encode(examples)
                    for name, examples in measured_sets(bench.record).items()
                },
                table,
                stage="unlearn",
            )
        attack(
            model,
            bench,
            settings,
            seed=seed,
            table=table,
            null_pool=world.filler_train,
            progress=progress,
        )

    run_stage(
        out,
        f"{method}-seed{seed}",
        "relearn",
        {"run": key, "stage": "relearn", "model": method, "method": method, "seed": seed},
        work,
    )


def run_reattack(
    run: Path,
    out: Path,
    settings: RelearnSettings,
    *,
    distance: float | None = None,
    methods: Sequence[str] = (),
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Experiment:
    """Attack the models of a finished run, the base and the never-learned control among them, with the attacker's texts and with the null text.

    Args:
        run: a finished run on the built-in world.
        out: folder of the attack.
        settings: the attack.
        distance: every change of weights is first scaled to this length, as a share of the length of the base's weights: resistance at equal distance, not at equal disruption
            (what it costs then is measured again, stage ``unlearn``). Default: the models as they are.
        methods: of the run; default all.
        fresh: throw away an attack that is already there.
        workers: processes; default is one per core.
        announce: called with one line.

    Raises:
        WorkbenchError: the run is not finished, or has no such method.
    """
    if distance is not None and not 0 < distance < 1:
        raise WorkbenchError(
            f"the distance is {distance}; it is a share of the length of the base's weights, above 0 and below 1, e.g. 0.05"
        )
    values = {"attack": asdict(settings), "distance": distance}
    results, items = ask_models(
        "relearn",
        run,
        out,
        partial(_job, settings, distance),
        (),
        methods=methods,
        fresh=fresh,
        workers=workers,
        announce=announce,
        settings=values,
    )
    return Experiment(out, results, items, reattack_table)


def reattack_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model: recall of held-out facts before the attack, along it and at its end, and at the end of the null attack, with intervals."""
    rows = results[
        (results["metric"] == "recall")
        & (results["split"] == "forget-heldout")
        & results["seed"].isna()
    ]
    lines = []
    for method in sorted(rows["method"].unique(), key=lambda name: (name not in CONTROLS, name)):
        line = {"model": method}
        for arm in ("attack", "null"):
            mine = rows[(rows["method"] == method) & (rows["arm"] == arm)].sort_values("step")
            steps = list(mine["step"]) if arm == "attack" else list(mine["step"])[-1:]
            for step, value, low, high in zip(
                steps,
                *(mine[name].iloc[-len(steps) :] for name in ("value", "low", "high")),
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
