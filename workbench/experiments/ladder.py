"""The attack ladder on a finished run: every attack text set and every attack configuration,
on the run's own models, each beside its controls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import BeforeValidator, Field, field_validator

from workbench import metrics
from workbench.attacks.ladder import Ladder, build_ladder, ladder_of_files
from workbench.attacks.leaks import leak_report
from workbench.attacks.relearn import RelearnSettings, relearn
from workbench.data.batches import Batch
from workbench.data.records import Example
from workbench.evaluation.statistics import bootstrap
from workbench.experiments import QUESTIONS
from workbench.runner import Experiment, ModelJob, Plan, Source, plan_over_models
from workbench.runs.curves import curve_rows
from workbench.runs.models import BASE
from workbench.runs.settings import AttackOverrides, FinishedRunSettings
from workbench.runs.setup import Setup
from workbench.runs.stages import add_leaks, measured_attack
from workbench.tables import Table


def _parsed(value: object) -> object:
    """``lora:lora_rank=8,lr=0.01;sgd:optimiser=sgd`` as the mapping that it stands for."""
    if not isinstance(value, str):
        return value
    configs = {}
    for part in filter(None, value.split(";")):
        name, colon, changes = part.partition(":")
        pairs = dict(change.partition("=")[::2] for change in changes.split(",") if change)
        if not colon or not name or not pairs or not all(pairs.values()):
            raise ValueError(
                f"{part!r} must read NAME:FIELD=VALUE,..., e.g. sgd:optimiser=sgd,lr=0.1"
            )
        configs[name] = {key: _number(text) for key, text in pairs.items()}
    return configs


def _number(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


AttackChanges = dict[str, str | int | float]


class LadderSettings(FinishedRunSettings, AttackOverrides):
    """What is attacked, and how.

    Attributes:
        methods: of the run; base and never-learned control are always attacked as well.
        ways: other attack configurations for a disjoint part of the forget set, as changes of the
            attack: adapters, another optimiser, rounding, fewer texts. Rates were chosen on another
            world so that each of them teaches a never-learned model its own texts about as well as
            the first one does.
    """

    ways: Annotated[dict[str, AttackChanges], BeforeValidator(_parsed)] = Field(
        {
            "lora": {"lora_rank": 8, "lr": 1e-2},
            "sgd": {"optimiser": "sgd", "lr": 0.1},
            "bf16": {"precision": "bfloat16"},
            "texts-8": {"texts": 8},
            "texts-32": {"texts": 32},
        },
        description="Other attacks: NAME:FIELD=VALUE,...;NAME:..., fields of the attack.",
    )

    @field_validator("ways")
    @classmethod
    def _attacks(cls, ways: dict[str, AttackChanges]) -> dict[str, AttackChanges]:
        for name, changes in ways.items():
            try:
                replace(RelearnSettings(), **changes)  # type: ignore[arg-type]
            except TypeError as error:
                fields = ", ".join(field.name for field in dataclasses.fields(RelearnSettings))
                raise ValueError(f"{name}: {changes} are no changes of {fields}") from error
        return ways


def _ladder(setup: Setup, seed: int) -> Ladder:
    """The attack texts: of the built-in world with their controls, or what a user's files offer."""

    def length(example: Example) -> int:
        return len(setup.tokenizer(example.text)["input_ids"])

    if setup.world is None:
        return ladder_of_files(setup.record, length, seed)
    return build_ladder(setup.world, length, seed)


def _ask(settings: LadderSettings, job: ModelJob) -> None:
    setup, attack = job.setup, settings.attack_from(job.source.config.attack)
    ladder = _ladder(setup, job.seed)
    queries = {"forget-queries": setup.encode(ladder.queries)}
    rounds = len(ladder.text_sets) + len(settings.ways) + bool(ladder.novel)
    done = 0

    def advance(_step: int, _of: int) -> None:
        nonlocal done
        done += 1
        job.context.progress(min(done, rounds * attack.steps), rounds * attack.steps)

    def work(table: Table) -> None:
        def once(
            texts: Sequence[Example],
            sets: Mapping[str, Sequence[Batch]],
            arm: str,
            attack_config: RelearnSettings = attack,
        ) -> None:
            steps = relearn(
                job.model,
                setup.tokenizer,
                texts,
                attack_config,
                seed=job.seed,
                max_length=setup.max_length,
                progress=advance,
            )
            for _ in measured_attack(steps, sets, table, arm=arm):
                pass

        for text_set, texts in ladder.text_sets.items():
            once(texts, queries, text_set)
        for config, changes in settings.ways.items():
            changed = replace(attack, **changes)  # type: ignore[arg-type]
            once(ladder.text_sets["part"], queries, f"part, {config}", changed)
        if ladder.novel:
            once(ladder.novel, {"novel": setup.encode(ladder.novel)}, "novel")

    job.context.stage("ladder", work)


def _leaks(ladder: Ladder, key: str) -> pd.DataFrame:
    """What every text set gives away of the questions; one that leaks is not benign, and the table
    says so.
    """
    table = Table({"run": key, "stage": "ladder"})
    for text_set, texts in ladder.text_sets.items():
        add_leaks(leak_report(texts, ladder.queries), table, arm=text_set)
    return table.frame()


def _effects(items: pd.DataFrame, key: str) -> pd.DataFrame:
    """Attacked minus control, paired by seed and fact: every model against the never-learned one
    under the same attack (metric ``effect_recall``).
    """
    table = Table({"run": key, "stage": "ladder"})
    control = items[items["method"] == "never-learned"]
    for (method, split, arm, step), group in items[items["method"] != "never-learned"].groupby(
        ["method", "split", "arm", "x"], sort=False
    ):
        same = control[
            (control["split"] == split) & (control["arm"] == arm) & (control["x"] == step)
        ]
        pairs = group.merge(same, on=["seed", "item"], suffixes=("", "_control"))
        if len(pairs):
            pairs["difference"] = pairs["correct"] - pairs["correct_control"]
            wide = pairs.pivot_table(index="seed", columns="item", values="difference")
            table.add_estimate(
                metrics.EFFECT_RECALL,
                bootstrap(wide.to_numpy()),
                method=method,
                model=method,
                split=split,
                arm=arm,
                attack_step=step,
            )
    return table.frame()


def prepare(settings: LadderSettings, source: Source, out: Path) -> Plan:
    """Every model under every attack."""
    settings.attack_from(source.config.attack)
    ladder = _ladder(source.setup, source.config.seeds[0])

    def curves(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
        first = (items["method"] == BASE) & (items["arm"] == next(iter(ladder.text_sets)))
        target = float(items.loc[first & (items["x"] == 0), "correct"].mean()) / 2
        return curve_rows(items, key, target=target, stage="ladder")

    return plan_over_models(
        "ladder",
        source,
        partial(_ask, settings),
        texts={**ladder.text_sets, "novel": ladder.novel},
        summaries=(
            lambda rows, items, key: _effects(items, key),
            curves,
            lambda rows, items, key: _leaks(ladder, key),
        ),
        claims=("public-recovery", "relearn-nonmonotone"),
    )


def ladder_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model: recall of the held-out questions after every attack, with intervals;
    leaking text sets carry a mark.
    """
    rows = results[results["seed"].isna()]
    leaking = set(rows.loc[(rows["metric"] == metrics.BENIGN.name) & (rows["value"] < 1), "arm"])
    recall = metrics.RECALL.rows(rows)
    last = recall.groupby("arm")["x"].transform("max")
    lines = []
    for method in recall["method"].drop_duplicates():
        last_recall = recall[(recall["method"] == method) & (recall["x"] == last)].set_index("arm")
        line = {"model": method}
        for arm in recall["arm"].drop_duplicates():
            name = f"{arm} (leaks)" if arm in leaking else str(arm)
            line[name] = (
                f"{last_recall.at[arm, 'value']:.2f} [{last_recall.at[arm, 'low']:.2f}, "
                f"{last_recall.at[arm, 'high']:.2f}]"
                if arm in last_recall.index
                else "–"
            )
        lines.append(line)
    return pd.DataFrame(lines)


LADDER = Experiment(
    "ladder",
    QUESTIONS["ladder"],
    LadderSettings,
    prepare,
    ladder_table,
    by="model",
)
