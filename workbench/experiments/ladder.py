"""The attack ladder on a finished run: every rung of attack texts and every way of attacking, on the run's own models, each beside its controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from transformers import PreTrainedModel

from workbench.attacks.ladder import RUNGS, Ladder, build_ladder
from workbench.attacks.leaks import leak_report
from workbench.attacks.relearn import DivergedError, RelearnSettings, finite, relearn
from workbench.data.batches import Batch
from workbench.data.records import Example
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import score
from workbench.evaluation.statistics import bootstrap
from workbench.experiments.afterwards import CONTROLS, bench_of, finished
from workbench.experiments.bench import Bench
from workbench.experiments.config import RunConfig
from workbench.experiments.curves import curve_rows
from workbench.experiments.folder import (
    ITEMS,
    PROVENANCE,
    RESULTS,
    Experiment,
    claim_folder,
    collect,
    leaves_folder,
    run_stage,
)
from workbench.experiments.jobs import Job, run_jobs
from workbench.experiments.provenance import data_hash, provenance
from workbench.experiments.stages import add_leaks
from workbench.experiments.table import COLUMNS, Table, join, summarise, write_parquet
from workbench.files import key_of, plain, write_json
from workbench.models import open_model, weights_hash
from workbench.progress import Report


@dataclass(frozen=True, slots=True)
class LadderSettings:
    """What is attacked, and how.

    Attributes:
        methods: of the run; base and never-learned control are always attacked as well.
        seeds: of the run's models and of the attacks.
        attack: the attack of every rung.
        ways: other ways of attacking with a disjoint part of the forget set, as changes of ``attack``: adapters, another optimiser, rounding, fewer texts. Rates were
            chosen on another world so that each way teaches a never-learned model its own texts about as well as the first one does.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    attack: RelearnSettings = field(default_factory=RelearnSettings)
    ways: Mapping[str, Mapping[str, object]] = field(
        default_factory=lambda: {
            "lora": {"lora_rank": 8, "lr": 1e-2},
            "sgd": {"optimiser": "sgd", "lr": 0.1},
            "bf16": {"precision": "bfloat16"},
            "texts-8": {"texts": 8},
            "texts-32": {"texts": 32},
        }
    )


def _attack_once(
    model: PreTrainedModel,
    bench: Bench,
    texts: Sequence[Example],
    sets: Mapping[str, Sequence[Batch]],
    settings: RelearnSettings,
    table: Table,
    seed: int,
    advance: Report,
    **columns: Any,
) -> None:
    def measure(attacked: PreTrainedModel, step: int) -> None:
        for split, encoded in sets.items():
            table.add_scores(
                finite(score(attacked, encoded), step), split=split, step=step, **columns
            )

    try:
        relearn(
            model,
            bench.tokenizer,
            texts,
            measure,
            settings,
            seed=seed,
            max_length=bench.max_length,
            progress=advance,
        )
    except (
        DivergedError
    ) as error:  # what was measured before stays; where the attack broke is a result
        table.add("diverged_at", error.step, **columns)


def _model_job(
    settings: LadderSettings,
    run: Path,
    out: Path,
    key: str,
    config: RunConfig,
    method: str,
    seed: int,
    progress: Report,
) -> None:
    bench, world = bench_of(run, config)
    ladder = build_ladder(
        world, lambda example: len(bench.tokenizer(example.text)["input_ids"]), seed
    )
    queries = {"forget-queries": bench.encode(ladder.queries)}
    rounds = len(RUNGS) + len(settings.ways) + 1
    done = 0

    def advance(_step: int, _of: int) -> None:
        nonlocal done
        done += 1
        progress(done, rounds * settings.attack.steps)

    def work(table: Table) -> None:
        model = open_model(
            run / "models" / (method if method in CONTROLS else f"{method}-seed{seed}")
        ).model
        attack = partial(_attack_once, model, bench, table=table, seed=seed, advance=advance)
        for rung, texts in ladder.rungs.items():
            attack(texts, queries, settings.attack, arm=rung)
        for way, changes in settings.ways.items():
            attack(
                ladder.rungs["part"],
                queries,
                replace(settings.attack, **changes),  # type: ignore[arg-type]
                arm=f"part, {way}",
            )
        attack(ladder.novel, {"novel": bench.encode(ladder.novel)}, settings.attack, arm="novel")

    run_stage(
        out,
        f"{method}-seed{seed}",
        "ladder",
        {"run": key, "stage": "ladder", "model": method, "method": method, "seed": seed},
        work,
    )


def _leaks(ladder: Ladder, key: str) -> pd.DataFrame:
    """What every rung gives away of the questions; a rung that leaks is not benign, and the table says so."""
    table = Table({"run": key, "stage": "ladder"})
    for rung, texts in ladder.rungs.items():
        add_leaks(leak_report(texts, ladder.queries), table, arm=rung)
    return table.frame()


def _effects(items: pd.DataFrame, key: str) -> pd.DataFrame:
    """Attacked minus control, paired by seed and fact: every model against the never-learned one under the same attack (metric ``effect_recall``)."""
    table = Table({"run": key, "stage": "ladder"})
    control = items[items["method"] == "never-learned"]
    for (method, split, arm, step), group in items[items["method"] != "never-learned"].groupby(
        ["method", "split", "arm", "step"], sort=False
    ):
        same = control[
            (control["split"] == split) & (control["arm"] == arm) & (control["step"] == step)
        ]
        pairs = group.merge(same, on=["seed", "item"], suffixes=("", "_control"))
        if len(pairs):
            pairs["difference"] = pairs["correct"] - pairs["correct_control"]
            wide = pairs.pivot_table(index="seed", columns="item", values="difference")
            table.add_estimate(
                "effect_recall",
                bootstrap(wide.to_numpy()),
                method=method,
                model=method,
                split=split,
                arm=arm,
                step=step,
            )
    return table.frame()


@leaves_folder
def run_ladder(
    run: Path,
    out: Path,
    *,
    methods: Sequence[str] = (),
    attack: RelearnSettings | None = None,
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Experiment:
    """Attack the models of a finished run with every rung and in every way.

    Args:
        run: a finished run folder on the built-in world.
        out: folder of the ladder.
        methods: of the run; default all of them.
        attack: default is the run's own.
        fresh: throw away a ladder that is already there.
        workers: processes; default is one per core.
        announce: called with one line before every part.

    Raises:
        WorkbenchError: the run is not finished, or has no such method.
    """
    config, chosen = finished(run, methods)
    settings = LadderSettings(chosen, config.seeds, attack or config.attack)
    values = yaml.safe_load(
        yaml.safe_dump({"experiment": "ladder", "of": config.key} | plain(asdict(settings)))
    )
    key = key_of(values)
    names = (*settings.methods, *CONTROLS)
    missing = [name for name in CONTROLS if not (run / "models" / name).is_dir()]
    if missing:
        raise WorkbenchError(
            f"{run} holds no model {' and '.join(missing)}; the ladder reads every attack against these controls"
        )
    claim_folder(out, yaml.safe_dump(values, sort_keys=False), fresh=fresh)
    announce(
        f"{len(names)} models x {len(settings.seeds)} seeds x {len(RUNGS) + len(settings.ways) + 1} attacks"
    )
    jobs: dict[str, Job] = {
        f"{name}-seed{seed}": partial(_model_job, settings, run, out, key, config, name, seed)
        for seed in settings.seeds
        for name in names
    }
    run_jobs("ladder", jobs, workers=workers)
    rows, items = collect(out)
    bench, world = bench_of(run, config)
    ladder = build_ladder(
        world, lambda example: len(bench.tokenizer(example.text)["input_ids"]), settings.seeds[0]
    )
    start = items[(items["method"] == "base") & (items["arm"] == RUNGS[0]) & (items["step"] == 0)]
    curves = curve_rows(items, key, target=float(start["correct"].mean()) / 2, stage="ladder")
    results = join(
        [rows, summarise(items, key), _effects(items, key), curves, _leaks(ladder, key)], COLUMNS
    )
    write_parquet(results, out / RESULTS)
    write_parquet(items, out / ITEMS)
    texts = {rung: data_hash(examples) for rung, examples in ladder.rungs.items()} | {
        "novel": data_hash(ladder.novel)
    }
    weights = {
        folder.name: weights_hash(folder)
        for folder in sorted((run / "models").iterdir())
        if folder.is_dir()
    }
    write_json(out / PROVENANCE, provenance(values, data=texts, weights=weights))
    return Experiment(out, results, items, ladder_table)


def ladder_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model: recall of the held-out questions after every attack, with intervals; leaking rungs carry a mark."""
    rows = results[results["seed"].isna()]
    leaking = set(rows.loc[(rows["metric"] == "benign") & (rows["value"] < 1), "arm"])
    recall = rows[rows["metric"] == "recall"]
    last = recall.groupby("arm")["step"].transform("max")
    lines = []
    for method in recall["method"].drop_duplicates():
        mine = recall[(recall["method"] == method) & (recall["step"] == last)].set_index("arm")
        line = {"model": method}
        for arm in recall["arm"].drop_duplicates():
            name = f"{arm} (leaks)" if arm in leaking else str(arm)
            line[name] = (
                f"{mine.at[arm, 'value']:.2f} [{mine.at[arm, 'low']:.2f}, {mine.at[arm, 'high']:.2f}]"
                if arm in mine.index
                else "–"
            )
        lines.append(line)
    return pd.DataFrame(lines)
