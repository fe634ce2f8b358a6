"""Where in the model are the forgotten answers, if anywhere? Lens, probes, rotation and patching
depth on the models of a finished run, each beside its anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from workbench import metrics
from workbench.data.records import Example, one_per_item
from workbench.diagnostics.depth import patching_depth
from workbench.diagnostics.lens import add_lens, logit_lens
from workbench.diagnostics.probes import add_probes, probe_by_layer, probe_transfer, prompt_streams
from workbench.diagnostics.rotation import add_rotation, rotation_by_layer, shuffled
from workbench.diagnostics.shift import streams
from workbench.experiments import QUESTIONS
from workbench.progress import ProgressCallback
from workbench.runner import Experiment, ModelJob, Plan, Source, plan_over_models
from workbench.runs.models import BASE, NEVER, model_of
from workbench.runs.settings import FinishedRunSettings
from workbench.runs.setup import Setup
from workbench.tables import Table

SPLIT = "forget-heldout"


def _kind(example: Example) -> str:
    return example.item.rpartition("/")[2]


def _lens(setup: Setup, model: PreTrainedModel, questions: Sequence[Example], table: Table) -> None:
    encoded, kinds = setup.encode(questions), [_kind(question) for question in questions]
    for arm, decoder in (("own decoder", None), ("base decoder", setup.base)):
        add_lens(table, logit_lens(model, encoded, decoder, kinds=kinds), arm=arm, split=SPLIT)


def _probes(
    setup: Setup,
    model: PreTrainedModel,
    name: str,
    table: Table,
    progress: ProgressCallback,
    seed: int,
) -> None:
    """Probes learn from all people, forgotten and kept, and are judged on held-out forgotten ones:
    few labels occur among these alone.
    """
    heldout = one_per_item(setup.record.forget_heldout)
    people = [
        *heldout,
        *one_per_item(setup.record.forget_attacked),
        *one_per_item(setup.record.retain.get("retain-neighbour", ())),
    ]
    labels, groups, kinds = (
        [read(example) for example in people]
        for read in (lambda e: e.answer_text, lambda e: e.subject_text, _kind)
    )
    shared = {
        label
        for label in labels
        if len(
            {group for fact_label, group in zip(labels, groups, strict=True) if fact_label == label}
        )
        > 1
    }
    if len(shared) < 2:
        # e.g. running text, whose continuations are all different: nothing for a classifier to
        # learn
        table.add(metrics.PROBES_POSSIBLE, 0.0, split=SPLIT)
        return
    scored = np.arange(len(people)) < len(heldout)
    encoded = setup.encode(people)
    own_streams = prompt_streams(model, encoded)
    add_probes(
        table,
        probe_by_layer(
            own_streams, labels, groups, kinds=kinds, scored=scored, seed=seed, progress=progress
        ),
        split=SPLIT,
    )
    if name != BASE:
        add_probes(
            table,
            probe_transfer(
                prompt_streams(setup.base, encoded),
                own_streams,
                labels,
                groups,
                scored=scored,
                seed=seed,
            ),
            split=SPLIT,
        )


def _rotation(
    setup: Setup,
    model: PreTrainedModel,
    questions: Sequence[Example],
    name: str,
    table: Table,
    seed: int,
) -> None:
    encoded = setup.encode(questions)
    before = streams(setup.base, encoded)
    add_rotation(table, rotation_by_layer(before, streams(model, encoded)), split=SPLIT)
    if name == BASE:
        add_rotation(
            table, rotation_by_layer(before, shuffled(before, seed)), split=SPLIT, arm="shuffled"
        )


def _depth(
    setup: Setup,
    model: PreTrainedModel,
    never: PreTrainedModel | None,
    questions: Sequence[Example],
    table: Table,
) -> None:
    for row in patching_depth(setup.base, model, setup.encode(questions), never).to_dict("records"):
        if row["direction"].startswith("never-learned"):
            continue  # trained apart from the base: neither can read the other's stream
        site = "embed" if row["layer"] < 0 else f"blocks.{row['layer']}.hook_resid_post"
        table.add(
            metrics.ERASED,
            row["erased"],
            low=row["low"],
            high=row["high"],
            n=row["n"],
            stage="representation",
            site=site,
            split=SPLIT,
            arm=row["direction"],
        )


def _ask(job: ModelJob) -> None:
    setup, name, seed = job.setup, job.name, job.seed
    config, folder = job.source.config, job.source.folder
    model, stage = job.model, job.context.stage
    never = model_of(config, folder, NEVER, seed) if NEVER in config.controls else None
    questions = one_per_item(setup.record.forget_heldout)
    stage("lens", lambda table: _lens(setup, model, questions, table))
    stage("rotation", lambda table: _rotation(setup, model, questions, name, table, seed))
    stage("probes", lambda table: _probes(setup, model, name, table, job.context.progress, seed))
    if not job.is_control:
        stage("depth", lambda table: _depth(setup, model, never, questions, table))


def prepare(settings: FinishedRunSettings, source: Source, out: Path) -> Plan:
    """Lens, probes with transfer, rotation and patching depth of every model, on held-out forgotten
    facts.
    """
    return plan_over_models("representation", source, _ask, seeded=False)


def representation_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model, last block, mean over seeds: what lens and probes still read of the
    answers, and how the stream has moved.
    """
    rows = results[results["stage"] == "representation"]
    last = max(
        (
            int(site.split(".")[1])
            for site in rows["site"].dropna().unique()
            if site.startswith("blocks.")
        ),
        default=0,
    )
    last_block = rows[rows["site"] == f"blocks.{last}.hook_resid_post"]

    def mean(method: str, metric: str, arm: str | None) -> str:
        cell = last_block[(last_block["method"] == method) & (last_block["metric"] == metric)]
        cell = cell[cell["arm"].isna()] if arm is None else cell[cell["arm"] == arm]
        return f"{cell['value'].mean():.2f}" if len(cell) else "–"

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


class RepresentationSettings(FinishedRunSettings):
    """Which models are read.

    Attributes:
        methods: of the run.
    """


REPRESENTATION = Experiment(
    "representation",
    QUESTIONS["representation"],
    RepresentationSettings,
    prepare,
    representation_table,
)
