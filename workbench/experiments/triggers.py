"""Forget-tokens as backdoor triggers, on the models of a finished run: what they break, where, how
one finds them, and what the theory says of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from workbench import metrics
from workbench.claims import INSIDE
from workbench.data.batches import Batch
from workbench.data.records import Example, ForgetRetain, one_per_item
from workbench.data.world import neutral_words, speaker_tag
from workbench.diagnostics.alignment import alignment, estimated_target, trigger_effect
from workbench.diagnostics.causal_map import RESTORING, causal_map
from workbench.diagnostics.discoveries import benjamini_hochberg, p_values, precision_recall
from workbench.diagnostics.forensics import Forensics, forensics, recovered
from workbench.diagnostics.positions import mark_triggers, position_groups
from workbench.diagnostics.trigger_shift import responses, shift_rows
from workbench.diagnostics.trigger_theory import add_theory, examine
from workbench.diagnostics.triggers import (
    PromptTemplate,
    repeated,
    trigger_queries,
    trigger_scores,
    word_in_front,
    word_inside,
)
from workbench.evaluation.statistics import bootstrap
from workbench.experiments import QUESTIONS
from workbench.hooks import layer_count
from workbench.progress import ProgressCallback, quiet
from workbench.runner import Experiment, ModelJob, Plan, Source, plan_over_models
from workbench.runs.config import RunConfig
from workbench.runs.models import BASE
from workbench.runs.settings import FinishedRunSettings
from workbench.runs.setup import Setup
from workbench.tables import Table, along
from workbench.unlearning.methods import innermost, settings_for
from workbench.unlearning.recipe import middle_layer
from workbench.unlearning.representation import control_vector

TEMPLATES: dict[str, PromptTemplate] = {
    "retain": speaker_tag,
    "retain, bare word in front": word_in_front,
    INSIDE: word_inside,
    "retain, 2 words inside": repeated(word_inside, 2),
    "retain, 4 words inside": repeated(word_inside, 4),
}
"""How a word gets into a question, by the name that tables give the questions."""
PATCHED = INSIDE
"""The template whose damage is traced: the one that the world's own speaker tag does not prepare a
model for.
"""
SCANNED = 64
"""Questions into which the scan puts every token."""
LEVELS = (0.05, 0.1, 0.2)
"""False discovery rates at which findings of the scan are counted."""


def retain_questions(record: ForgetRetain) -> list[Example]:
    """One paraphrase of every retained fact that no method has trained on."""
    return [
        query
        for name, examples in record.retain_test.items()
        if name != record.general
        for query in one_per_item(examples)
    ]


def arms_of(
    record: ForgetRetain, template: PromptTemplate, seed: int, neutral: Sequence[str] = ()
) -> dict[str, tuple[Example, ...]]:
    """The four arms of the check on retain questions; see
    :func:`workbench.diagnostics.triggers.trigger_queries`.

    Args:
        record: forget and retain set.
        template: puts a word into a question.
        seed: decides which word meets which question.
        neutral: words of neither set; default those of the built-in world.
    """
    return trigger_queries(
        retain_questions(record),
        record.forget_tokens,
        record.retain_tokens,
        neutral or neutral_words(),
        seed=seed,
        template=template,
    )


def _templates(setup: Setup) -> dict[str, PromptTemplate]:
    """:data:`TEMPLATES`; a user's texts have no speaker tags."""
    return TEMPLATES | {"retain": setup.template}


def _ask(model: PreTrainedModel, setup: Setup, seed: int, table: Table) -> None:
    for split, template in _templates(setup).items():
        arms = arms_of(setup.record, template, seed, setup.neutral)
        for arm, result in trigger_scores(
            model, {arm: setup.encode(examples) for arm, examples in arms.items()}
        ).items():
            table.add_scores(result, stage="triggers", arm=arm, split=split)


def _marked(
    setup: Setup, template: PromptTemplate, seed: int, *, answers: bool = False
) -> dict[str, list[Batch]]:
    return {
        arm: setup.encode(examples, answers=answers)
        for arm, examples in mark_triggers(
            arms_of(setup.record, template, seed, setup.neutral), template
        ).items()
    }


def steered(
    config: RunConfig, name: str, base: PreTrainedModel, seed: int
) -> tuple[int, Tensor | None]:
    """The block whose stream a method steers, and the direction that it steers to where its recipe
    draws one (RMU, Adaptive RMU, RSV, wrapped or not).
    """
    variant = config.variant(name)
    settings = settings_for(variant.method, base, variant.settings)
    layer = int(settings.get("layer", -1))
    direction = (
        control_vector(base.config.hidden_size, seed)
        if innermost(variant.method) in ("rmu", "adaptive-rmu", "rsv")
        else None
    )
    return (layer if layer >= 0 else middle_layer(base)), direction


def _align(
    base: PreTrainedModel,
    model: PreTrainedModel,
    setup: Setup,
    layer: int,
    direction: Tensor | None,
    seed: int,
    table: Table,
) -> None:
    """Along the known target where there is one, along the estimated one for every method: metric
    names end in ``_known`` for the former.
    """
    forget = setup.encode(one_per_item(setup.record.forget))
    last = layer_count(base) - 1
    measured = sorted({0, layer, last // 2, last})
    estimated = {number: estimated_target(base, model, forget, number) for number in measured}
    arms: Mapping[str, Sequence[Batch]] = {
        **_marked(setup, TEMPLATES[PATCHED], seed),
        "forget": forget,
    }
    targets: dict[str, dict[int, Tensor]] = {"": estimated}
    if direction is not None:
        targets["_known"] = {layer: direction}
        table.add(
            metrics.ESTIMATED_TARGET_COSINE,
            float(abs(estimated[layer] @ direction)),
            stage="triggers",
            site=f"blocks.{layer}.hook_resid_post",
        )
    for suffix, target in targets.items():
        frames = [
            alignment(base, model, arms, target, seed=seed),
            trigger_effect(base, model, arms, target, seed=seed),
        ]
        for row in pd.concat(frames, ignore_index=True).to_dict("records"):
            effect = row["metric"].startswith("effect_")
            if (row["metric"].endswith("norm") and suffix) or (
                effect and row["model"] != "difference"
            ):
                # of the same query with and without the word, what unlearning added is what counts
                continue
            owner = (
                {} if row["model"] != BASE else {"method": BASE}
            )  # the anchor of this model, which its column "model" still names
            table.add(
                row["metric"] + suffix,
                row["value"],
                low=row["low"],
                high=row["high"],
                n=row["n"],
                stage="triggers",
                arm=row["arm"],
                split=row["group"],
                site=f"blocks.{row['layer']}.hook_resid_post",
                **owner,
            )


def _trace(
    base: PreTrainedModel,
    model: PreTrainedModel,
    setup: Setup,
    seed: int,
    table: Table,
    progress: ProgressCallback,
) -> None:
    arms = _marked(setup, TEMPLATES[PATCHED], seed)
    for arm in ("forget-token", "retain-token"):
        groups_of_batch = [
            position_groups(batch, clean)
            for batch, clean in zip(arms[arm], arms["clean"], strict=True)
        ]
        groups = {
            name: [masks[name] for masks in groups_of_batch]
            for name in groups_of_batch[0]
            if any(bool(masks[name].any()) for masks in groups_of_batch)
        }
        groups["all"] = [batch.attention_mask.bool() for batch in arms[arm]]
        for row in causal_map(
            base, model, arms[arm], groups=groups, control=arms["clean"], progress=progress
        ).to_dict("records"):
            columns = {
                "stage": "triggers",
                "site": row["site"],
                "split": row["group"],
                "arm": row["direction"] if arm == "forget-token" else f"{row['direction']}, {arm}",
            }
            table.add(
                metrics.RESTORED,
                row["restored"],
                low=row["low"],
                high=row["high"],
                n=row["n"],
                **columns,
            )
            if np.isfinite(row["control"]):
                table.add(
                    metrics.RESTORED_CONTROL,
                    row["control"],
                    low=row["control_low"],
                    high=row["control_high"],
                    n=row["n"],
                    **columns,
                )
            if (
                row["site"].endswith(".0.hook_resid_pre")
                and row["group"] == "all"
                and row["direction"] == RESTORING
            ):
                table.add(metrics.DAMAGE, row["damage"], n=row["n"], stage="triggers", arm=arm)


def _theory(model: PreTrainedModel, setup: Setup, layer: int, seed: int, table: Table) -> None:
    site = f"blocks.{layer}.hook_resid_post"
    arms = _marked(setup, _templates(setup)["retain"], seed, answers=True)
    for arm in ("forget-token", "retain-token"):
        rows = shift_rows(model, arms["clean"], arms[arm], site, tokens="predicting")
        add_theory(
            table,
            examine(rows, responses(model, arms["clean"], arms[arm], site, seed=seed), seed=seed),
            arm=arm,
            site=site,
        )


def _search(
    base: PreTrainedModel,
    model: PreTrainedModel,
    setup: Setup,
    table: Table,
    progress: ProgressCallback,
) -> None:
    """The scan and the forensics, held against the names that were truly forgotten; nothing where
    the tokenizer cuts them into pieces.
    """
    forget_ids, retain_ids = (
        {
            ids[0]
            for word in words
            if len(ids := setup.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
        }
        for words in (setup.record.forget_tokens, setup.record.retain_tokens)
    )
    if len(forget_ids) < len(setup.record.forget_tokens):
        table.add(
            metrics.NAMES_THAT_ARE_TOKENS,
            len(forget_ids),
            n=len(setup.record.forget_tokens),
            stage="triggers",
        )
        return
    queries = retain_questions(setup.record)[
        :: max(1, len(retain_questions(setup.record)) // SCANNED)
    ][:SCANNED]
    texts = (
        *setup.record.forget,
        *setup.record.retain_all,
        # the words of the world: byte tokens that no text holds would narrow the scan's empirical
        # null
    )
    words = sorted(
        {
            token
            for text in texts
            for token in setup.tokenizer(text.text, add_special_tokens=False)["input_ids"]
        }
    )
    findings = forensics(base, model, setup.tokenizer, queries, tokens=words, progress=progress)
    assert findings.scan is not None
    scan = findings.scan.table
    for metric, column in (("rise", "scan"), ("shift", "scan, shift")):
        curve = precision_recall(scan, forget_ids, metric)
        table.add(
            metrics.AVERAGE_PRECISION,
            curve.attrs["average_precision"],
            n=len(scan),
            stage="triggers",
            arm=column,
        )
        table.add(
            metrics.AVERAGE_PRECISION,
            curve.attrs["chance"],
            n=len(scan),
            stage="triggers",
            arm="chance",
        )
        for row in (
            curve.sort_values("precision")
            .drop_duplicates("recall", keep="last")
            .sort_values("recall")
            .to_dict("records")
        ):
            table.add(
                metrics.PRECISION,
                row["precision"],
                stage="triggers",
                arm=column,
                recall_level=round(float(row["recall"]), 6),
            )
    for row in scan.to_dict("records"):
        arm = (
            "forget-token"
            if row["token_id"] in forget_ids
            else "retain-token"
            if row["token_id"] in retain_ids
            else "other"
        )
        for metric in ("rise", "rise_se", "shift", "q"):
            table.add(
                f"token_{metric}",
                row[metric],
                n=row["queries"],
                stage="triggers",
                arm=arm,
                token=row["token"],
                token_id=row["token_id"],
            )
    rises = [
        scan.loc[scan["token_id"].isin(list(ids)), "rise"].to_numpy()
        for ids in (forget_ids, retain_ids)
    ]
    among_names = (
        benjamini_hochberg(p_values(*rises)) if len(rises[1]) else None
    )  # retained names are the null
    for level in LEVELS:
        found_ids = scan.loc[scan["q"] <= level, "token_id"]
        table.add(
            metrics.DISCOVERIES,
            len(found_ids),
            n=len(scan),
            stage="triggers",
            arm="scan",
            fdr=level,
        )
        for metric, ids in (("true_discoveries", forget_ids), ("retained_discoveries", retain_ids)):
            table.add(
                metric,
                int(found_ids.isin(list(ids)).sum()),
                n=len(ids),
                stage="triggers",
                arm="scan",
                fdr=level,
            )
        if among_names is not None:
            table.add(
                metrics.DISCOVERIES,
                int((among_names <= level).sum()),
                n=len(among_names),
                stage="triggers",
                arm="names",
                fdr=level,
            )
    _add_topic(findings, forget_ids, table)


def _add_topic(found: Forensics, known: set[int], table: Table) -> None:
    """How many forgotten names are among the first words of each ranking."""
    for method in (*found.methods, "score"):
        ranking = found.ranking.assign(
            score=-found.ranking[method] if method != "score" else found.ranking["score"]
        ).dropna(subset=["score"])
        ranking = ranking.sort_values(
            ["score", "token_id"], ascending=[False, True], ignore_index=True
        )
        ranking["rank"] = np.arange(1, len(ranking) + 1)
        for row in recovered(ranking, known, k=(10, 20)).to_dict("records"):
            table.add(
                metrics.TOPIC_RECALL,
                row["recall"],
                n=len(known),
                stage="triggers",
                arm=method,
                first=row["k"],
            )
            if method == "score":
                table.add(
                    metrics.TOPIC_RECALL,
                    row["chance_recall"],
                    n=len(known),
                    stage="triggers",
                    arm="chance",
                    first=row["k"],
                )


class TriggerSettings(FinishedRunSettings):
    """What is asked of every model.

    Attributes:
        methods: of the run.
        asking_only: leave out why they fail (alignment, causal map, theory) and the scan, which
            take nine tenths of the time.
    """

    asking_only: bool = Field(
        False,
        description="Ask the questions, and leave out alignment, causal map, theory and scan (nine "
        "tenths of the time).",
    )


def _questions(settings: TriggerSettings, job: ModelJob) -> None:
    setup, config, seed = job.setup, job.source.config, job.seed
    base, model, stage = setup.base, job.model, job.context.stage
    is_method = job.name in config.methods
    layer, direction = (
        steered(config, job.name, base, seed) if is_method else (middle_layer(base), None)
    )
    progress = job.context.progress
    stage("asked", lambda table: _ask(model, setup, seed, table))
    if settings.asking_only:
        return
    stage("theory", lambda table: _theory(model, setup, layer, seed, table))
    # the never-learned model is the control: unlearning left no trace in it
    if job.name != BASE and (job.first or not config.once(job.name)):
        stage("search", lambda table: _search(base, model, setup, table, progress))
    if job.is_control:
        return
    stage("alignment", lambda table: _align(base, model, setup, layer, direction, seed, table))
    stage("causal map", lambda table: _trace(base, model, setup, seed, table, quiet))


def prepare(settings: TriggerSettings, source: Source, out: Path) -> Plan:
    """Ask the models of a run retain questions with stray words, and find out why they fail.

    Raises:
        WorkbenchError: the run's texts give no question, or no word.
    """
    setup = source.setup
    for template in _templates(setup).values():
        arms_of(setup.record, template, source.config.seeds[0], setup.neutral)
    return plan_over_models(
        "triggers",
        source,
        partial(_questions, settings),
        summaries=(_over_seeds, _effects),
        claims=(
            "token-disruption",
            "token-alignment",
            "rna-repairs",
            "rna-keeps-forgetting",
            "rna-is-label-noise",
        ),
    )


POOLED = (
    "average_precision",
    "precision",
    "discoveries",
    "true_discoveries",
    "retained_discoveries",
    "topic_recall",
    "restored",
    "restored_control",
    "estimated_target_cosine",
    "target_cosine",
    "shift_cosine",
    "effect_cosine",
    "effect_projection",
    "target_cosine_known",
    "shift_cosine_known",
    "effect_cosine_known",
    "effect_projection_known",
)
"""Metrics without facts behind them; over the seeds they are shown as mean with the range of the
seeds.
"""


def _over_seeds(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
    """Mean over seeds of what has no facts to resample, with the smallest and the largest seed as
    ``low`` and ``high``.
    """
    table = Table({"run": key, "stage": "triggers"})
    pooled_rows = rows[rows["metric"].isin(POOLED) | rows["metric"].str.startswith("theory_")]
    columns = ["metric", "model", "method", "site", "split", "arm", "axis", "x"]
    for values, group in pooled_rows.groupby(columns, dropna=False, sort=False):
        named = {
            name: value
            for name, value in zip(columns, values, strict=True)
            if value is not pd.NA and value == value
        }  # an empty number is not equal to itself
        finite = group["value"].dropna()
        if len(finite):
            low, high = (
                (finite.min(), finite.max()) if len(finite) > 1 else (np.nan, np.nan)
            )  # one seed has no range
            place = along(named.pop("axis", None), named.pop("x", None))
            metric = str(named.pop("metric"))
            table.add(metric, finite.mean(), low=low, high=high, n=len(finite), **place, **named)
    return table.frame()


def _effects(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
    """Accuracy and answer probability behind a retain-token minus behind a forget-token, minus the
    same of the base: paired by seed and fact, one row per template and model.
    """
    table = Table({"run": key, "stage": "triggers"})
    for (method, split), group in items[
        (items["stage"] == "triggers") & (items["method"] != BASE)
    ].groupby(["method", "split"], sort=False):
        base = items[(items["method"] == BASE) & (items["split"] == split)]
        for metric, column in (
            (metrics.TRIGGER_EFFECT, "correct"),
            (metrics.TRIGGER_EFFECT_PROBABILITY, "probability"),
        ):
            wide = {}
            for owner, part in (("own", group), ("base", base)):
                for arm in ("retain-token", "forget-token"):
                    wide[owner, arm] = part[part["arm"] == arm].pivot_table(
                        index="seed", columns="item", values=column
                    )
            effect = (wide["own", "retain-token"] - wide["own", "forget-token"]) - (
                wide["base", "retain-token"] - wide["base", "forget-token"]
            )
            if effect.size and effect.notna().all().all():
                table.add_estimate(
                    metric, bootstrap(effect.to_numpy()), method=method, model=method, split=split
                )
    return table.frame()


def trigger_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model and way of putting a word into a question: accuracy with each kind of word,
    and the effect of a forget-token beyond a retain-token's and the base's.
    """
    rows = results[results["seed"].isna() & (results["stage"] == "triggers")]
    lines = []
    recall = metrics.RECALL.rows(rows)
    effects = {
        (str(row["method"]), str(row["split"])): row
        for _, row in metrics.TRIGGER_EFFECT.rows(rows).iterrows()
    }

    def cell(row: pd.Series) -> str:
        return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    for (split, method), group in recall.groupby(["split", "method"], sort=False):
        line = {"word": split, "model": method} | {
            str(row["arm"]): cell(row) for _, row in group.iterrows()
        }
        effect = effects.get((str(method), str(split)))
        line["effect of a forget-token"] = (
            "–"
            if effect is None
            else f"{effect['value']:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}]"
        )
        lines.append(line)
    return pd.DataFrame(lines)


TRIGGERS = Experiment(
    "triggers",
    QUESTIONS["triggers"],
    TriggerSettings,
    prepare,
    trigger_table,
    by="word",
)
