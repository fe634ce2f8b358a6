"""Where in the model are the forgotten answers, if anywhere? Lens, probes, rotation and patching depth on the models of a finished run, each beside its anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from workbench.data.records import Example, one_per_item
from workbench.diagnostics.depth import patching_depth
from workbench.diagnostics.lens import add_lens, logit_lens
from workbench.diagnostics.probes import add_probes, probe_by_layer, probe_transfer, prompt_streams
from workbench.diagnostics.rotation import add_rotation, rotation_by_layer, shuffled
from workbench.diagnostics.shift import streams
from workbench.experiments.afterwards import BASE, NEVER, ask_models, bench_of
from workbench.experiments.bench import Bench
from workbench.experiments.config import RunConfig
from workbench.experiments.folder import Experiment, run_stage
from workbench.experiments.table import Table
from workbench.models import open_model
from workbench.progress import Report

SPLIT = "forget-heldout"


def _kind(example: Example) -> str:
    return example.item.rpartition("/")[2]


def _lens(bench: Bench, model: PreTrainedModel, questions: Sequence[Example], table: Table) -> None:
    encoded, kinds = bench.encode(questions), [_kind(question) for question in questions]
    for arm, decoder in (("own decoder", None), ("base decoder", bench.base)):
        add_lens(table, logit_lens(model, encoded, decoder, kinds=kinds), arm=arm, split=SPLIT)


def _probes(
    bench: Bench, model: PreTrainedModel, name: str, table: Table, progress: Report, seed: int
) -> None:
    """Probes learn from all people, forgotten and kept, and are judged on held-out forgotten ones: few labels occur among these alone."""
    heldout = one_per_item(bench.record.forget_heldout)
    people = [
        *heldout,
        *one_per_item(bench.record.forget_attacked),
        *one_per_item(bench.record.retain.get("retain-neighbour", ())),
    ]
    labels, groups, kinds = (
        [read(example) for example in people]
        for read in (lambda e: e.answer_text, lambda e: e.subject_text, _kind)
    )
    scored = np.arange(len(people)) < len(heldout)
    encoded = bench.encode(people)
    own = prompt_streams(model, encoded)
    add_probes(
        table,
        probe_by_layer(
            own, labels, groups, kinds=kinds, scored=scored, seed=seed, progress=progress
        ),
        split=SPLIT,
    )
    if name != BASE:
        add_probes(
            table,
            probe_transfer(
                prompt_streams(bench.base, encoded), own, labels, groups, scored=scored, seed=seed
            ),
            split=SPLIT,
        )


def _moved(
    bench: Bench,
    model: PreTrainedModel,
    questions: Sequence[Example],
    name: str,
    table: Table,
    seed: int,
) -> None:
    encoded = bench.encode(questions)
    before = streams(bench.base, encoded)
    add_rotation(table, rotation_by_layer(before, streams(model, encoded)), split=SPLIT)
    if name == BASE:
        add_rotation(
            table, rotation_by_layer(before, shuffled(before, seed)), split=SPLIT, arm="shuffled"
        )


def _depth(
    bench: Bench,
    model: PreTrainedModel,
    never: PreTrainedModel | None,
    questions: Sequence[Example],
    table: Table,
) -> None:
    for row in patching_depth(bench.base, model, bench.encode(questions), never).to_dict("records"):
        if row["direction"].startswith("never-learned"):
            continue  # trained apart from the base: neither can read the other's stream
        site = "embed" if row["layer"] < 0 else f"blocks.{row['layer']}.hook_resid_post"
        table.add(
            "erased",
            row["erased"],
            low=row["low"],
            high=row["high"],
            n=row["n"],
            stage="representation",
            site=site,
            split=SPLIT,
            arm=row["direction"],
        )


def _model_job(
    run: Path, out: Path, key: str, config: RunConfig, name: str, seed: int, progress: Report
) -> None:
    if name in (BASE, NEVER) and seed != config.seeds[0]:
        return  # one model each
    bench, _ = bench_of(run, config)
    model = (
        bench.base
        if name == BASE
        else open_model(run / "models" / (name if name == NEVER else f"{name}-seed{seed}")).model
    )
    never = open_model(run / "models" / NEVER).model if (run / "models" / NEVER).is_dir() else None
    questions = one_per_item(bench.record.forget_heldout)
    stage = partial(run_stage, out, f"{name}-seed{seed}")
    common: dict[str, object] = {
        "run": key,
        "stage": "representation",
        "model": name,
        "method": name,
        "seed": seed,
    }
    stage("lens", common, lambda table: _lens(bench, model, questions, table))
    stage("rotation", common, lambda table: _moved(bench, model, questions, name, table, seed))
    stage("probes", common, lambda table: _probes(bench, model, name, table, progress, seed))
    if name not in (BASE, NEVER):
        stage("depth", common, lambda table: _depth(bench, model, never, questions, table))


def run_representation(
    run: Path,
    out: Path,
    *,
    methods: Sequence[str] = (),
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Experiment:
    """Lens, probes with transfer, rotation and patching depth of the models of a finished run, on held-out forgotten facts.

    Args:
        run: a finished run folder on the built-in world.
        out: folder of the diagnostics.
        methods: of the run; default all of them.
        fresh: throw away what is already there.
        workers: processes; default is one per core.
        announce: called with one line before every part.

    Raises:
        WorkbenchError: the run is not finished, or has no such method.
    """
    found = ask_models(
        "representation",
        run,
        out,
        _model_job,
        (),
        methods=methods,
        fresh=fresh,
        workers=workers,
        announce=announce,
    )
    return Experiment(out, *found, representation_table)


def representation_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model, last block, mean over seeds: what lens and probes still read of the answers, and how the stream has moved."""
    rows = results[results["stage"] == "representation"]
    last = max(
        (
            int(site.split(".")[1])
            for site in rows["site"].dropna().unique()
            if site.startswith("blocks.")
        ),
        default=0,
    )
    here = rows[rows["site"] == f"blocks.{last}.hook_resid_post"]

    def mean(method: str, metric: str, arm: str | None) -> str:
        mine = here[(here["method"] == method) & (here["metric"] == metric)]
        mine = mine[mine["arm"].isna()] if arm is None else mine[mine["arm"] == arm]
        return f"{mine['value'].mean():.2f}" if len(mine) else "–"

    columns: dict[str, tuple[str, str | None]] = {
        "lens, own decoder": ("lens_probability", "own decoder"),
        "lens, base's decoder": ("lens_probability", "base decoder"),
        "own probe": ("probe_accuracy", "own"),
        "control": ("probe_accuracy", "control"),
        "base's probe": ("probe_accuracy", "base->unlearned"),
        "erased (stream into base)": ("erased", "unlearned into base"),
    }
    methods = rows["method"].dropna().drop_duplicates()
    return pd.DataFrame(
        [
            {"model": method, **{name: mean(method, *which) for name, which in columns.items()}}
            for method in methods
        ]
    )
