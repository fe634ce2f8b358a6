"""The stages of a run: each takes models and texts, and fills a table. No stage knows where its
models came from.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench import metrics
from workbench.attacks.attack import ATTACKS, Attack, Steps
from workbench.attacks.leaks import LeakReport, leak_report
from workbench.attacks.relearn import (
    DivergedError,
    RelearnSettings,
    null_text,
    raise_if_diverged,
    random_facts,
)
from workbench.data.batches import Batch
from workbench.data.records import Example, ForgetRetain, alternate, one_per_item
from workbench.data.world import speaker_tag
from workbench.diagnostics.shift import SHIFT_MEASURES, recovered_shift, shift_by_layer, streams
from workbench.diagnostics.triggers import PromptTemplate, trigger_queries, trigger_scores
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy, score, target_tokens
from workbench.hooks import Capture, Collect, MomentsOf, gradients_only, layer_count, resolve
from workbench.progress import ProgressCallback, quiet
from workbench.runs import landscape
from workbench.runs.setup import DISRUPTION_MEASURES, Disruption, Setup
from workbench.subspaces.compare import angle_null, tier_edges
from workbench.subspaces.subspace import Subspace, energy_inside, overlap, principal_subspace
from workbench.tables import Table
from workbench.unlearning.budget import BudgetMatch, match_budget
from workbench.unlearning.deltas import apply_delta, delta_between, norm_of, snapshot
from workbench.unlearning.recipe import Recipe
from workbench.unlearning.trainer import unlearn


def measured_sets(record: ForgetRetain) -> dict[str, tuple[Example, ...]]:
    """The sets whose recall and loss every table shows, by name."""
    halves = {"forget-attacked": record.forget_attacked, "forget-heldout": record.forget_heldout}
    return {
        name: examples for name, examples in {**halves, **record.retain_test}.items() if examples
    }


def measure_sets(
    model: PreTrainedModel, encoded: Mapping[str, Sequence[Batch]], table: Table, **columns: object
) -> None:
    """Recall, answer probability and loss of ``model`` on every set."""
    for split, texts in encoded.items():
        table.add_scores(score(model, texts), split=split, **columns)


def find_subspaces(
    setup: Setup, rank: int, table: Table, *, seed: int
) -> dict[str, dict[str, Subspace]]:
    """Capture activations and output gradients of every MLP projection on forget and retain texts
    in one pass each; PCA; overlap with its null.

    The null splits the *retain* texts at random into two halves (an upper anchor: the same
    distribution), and draws random subspaces of the same rank (a lower anchor: nothing in common).

    Returns:
        ``{"forget" | "retain": {site name: subspace}}``.
    """
    sites = [
        site
        for pattern in (
            "blocks.*.hook_resid_post",
            "blocks.*.mlp.hook_in",
            "blocks.*.mlp.out.hook_in",
            "blocks.*.mlp.hook_out_grad",
        )
        for site in resolve(setup.base, pattern)
    ]
    halves = alternate(setup.record.retain_all)
    texts = {
        "forget": setup.record.forget,
        "retain": setup.record.retain_all,
        "retain-half-0": halves[0],
        "retain-half-1": halves[1],
    }
    subspaces: dict[str, dict[str, Subspace]] = {}
    for name, examples in texts.items():
        moments, encoded = MomentsOf(), setup.encode(examples)
        with gradients_only(setup.base), Capture(setup.base, sites, moments) as capture:
            for batch in encoded:
                capture.at(batch.content)
                (cross_entropy(setup.base, batch) * target_tokens(batch)).backward()
        subspaces[name] = {
            site.name: principal_subspace(
                moments[site.name],
                rank,
                site=site.name,
                tokens=encoded[0].content.name,
                source=f"base on {name} texts",
            )
            for site in sites
        }
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        for name in ("forget", "retain"):
            subspace = subspaces[name][site.name]
            for index, value in enumerate(subspace.eigenvalues.tolist()):
                table.add(
                    metrics.VARIANCE_SHARE,
                    value / subspace.total_variance if subspace.total_variance else 0.0,
                    stage="subspaces",
                    method="base",
                    site=site.name,
                    split=name,
                    component=index + 1,
                    n=subspace.count,
                )
            for low, high in tier_edges(subspace.rank):
                held = (
                    float(subspace.eigenvalues[low:high].sum()) / subspace.total_variance
                    if subspace.total_variance
                    else 0.0
                )
                table.add(
                    metrics.TIER_VARIANCE_SHARE,
                    held,
                    stage="subspaces",
                    method="base",
                    site=site.name,
                    split=name,
                    component=high,
                    n=subspace.count,
                )
        for k in sorted({1, 2, 4, 8, 16, rank}):
            pairs = [
                subspaces[name][site.name]
                for name in ("forget", "retain", "retain-half-0", "retain-half-1")
            ]
            if min(subspace.rank for subspace in pairs) < k:
                continue
            forget, retain, first, second = (subspace.basis[:, :k] for subspace in pairs)
            random_basis = torch.linalg.qr(torch.randn(forget.shape, generator=generator)).Q
            for arm, value in {
                "forget-retain": overlap(forget, retain),
                "retain-retain": overlap(first, second),
                "random": overlap(forget, random_basis),
            }.items():
                table.add(
                    metrics.SUBSPACE_OVERLAP,
                    value,
                    stage="subspaces",
                    method="base",
                    site=site.name,
                    arm=arm,
                    rank=k,
                )
    return {name: subspaces[name] for name in ("forget", "retain")}


WIDE = 1024
"""Width of a residual stream above which text sets are compared on a sample of their tokens."""


def _within(setup: Setup, examples: Sequence[Example]) -> Sequence[Example]:
    """All examples, or in a wide model as many of them, taken evenly, as hold about ``WIDE / 2``
    tokens.
    """
    if setup.base.config.get_text_config().hidden_size <= WIDE:
        return examples
    tokens = sum(len(setup.tokenizer(example.text)["input_ids"]) for example in examples)
    count = max(2, min(len(examples), len(examples) * WIDE // (2 * tokens)))
    return (
        [examples[number * len(examples) // count] for number in range(count)]
        if count < len(examples)
        else examples
    )


def compare_sets(
    setup: Setup, table: Table, *, rank: int = 8, draws: int = 60, seed: int = 0
) -> None:
    """Do the sets of texts use the same directions of the residual stream? Overlap of every pair's
    top subspaces, with a permutation null that deals whole texts.

    Measured after the first, the middle and the last block: each permutation is an
    eigendecomposition, and neighbouring blocks say much the same. In streams wider than
    :data:`WIDE`, whose eigendecompositions take minutes, texts of every set are taken evenly until
    they hold some ``WIDE / 2`` tokens; the null has the same sizes.
    """
    last = layer_count(setup.base) - 1
    sites = [
        resolve(setup.base, f"blocks.{layer}.hook_resid_post")[0]
        for layer in sorted({0, last // 2, last})
    ]
    rows: dict[str, dict[str, Tensor]] = {}
    texts: dict[str, Tensor] = {}
    for name, examples in {"forget": setup.record.forget, **setup.record.retain}.items():
        collected = Collect()
        with Capture(setup.base, sites, collected) as capture:
            encoded = setup.encode(_within(setup, one_per_item(examples)))
            for batch in encoded:
                capture.at(batch.content)
                capture.forward(batch.inputs)
        counts = torch.cat([batch.content_mask.sum(1) for batch in encoded]).cpu()
        rows[name] = {site.name: collected[site.name].float().cpu() for site in sites}
        texts[name] = torch.arange(len(counts)).repeat_interleave(counts)
    for site in sites:
        for first_set, second_set in combinations(rows, 2):
            if min(len(rows[first_set][site.name]), len(rows[second_set][site.name])) <= rank:
                continue
            angles = angle_null(
                rows[first_set][site.name],
                rows[second_set][site.name],
                rank,
                first_groups=texts[first_set],
                second_groups=texts[second_set],
                draws=draws,
                seed=seed,
            )
            columns: dict[str, Any] = {
                "stage": "subspaces",
                "method": "base",
                "site": site.name,
                "split": f"{first_set}|{second_set}",
                "rank": rank,
            }
            shared = angles.attrs["overlap"]
            table.add(metrics.SET_OVERLAP, shared.observed, arm="observed", n=draws, **columns)
            table.add(
                metrics.SET_OVERLAP,
                shared.median,
                low=shared.low,
                high=shared.high,
                arm="null",
                n=draws,
                **columns,
            )
            table.add(metrics.SET_OVERLAP_P, shared.p, arm="observed", n=draws, **columns)


def unlearn_to_budget(
    setup: Setup,
    recipe: Recipe,
    disruption: Disruption,
    *,
    budget: float | None,
    limit: float,
    seed: int,
    table: Table,
    common: Mapping[str, Subspace] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: ProgressCallback = quiet,
) -> PreTrainedModel:
    """Run a recipe, scale its delta to the disruption budget (by at most ``limit``; without a
    budget it stays as it was trained), and measure the result.

    Returns:
        The budget-matched model.
    """
    over = None if budget is None else lambda model: not disruption(model) <= budget
    result = unlearn(
        setup.base,
        setup.tokenizer,
        recipe,
        setup.record.forget,
        setup.record.retain_train,
        seed=seed,
        max_length=setup.max_length,
        dtype=dtype,
        over_budget=over,
        progress=progress,
    )
    table.add(metrics.STEPS, len(result.log), stage="unlearn", arm="taken")
    table.add(metrics.STEPS, recipe.steps, stage="unlearn", arm="allowed")
    table.add(metrics.PARAMETERS_TRAINED, len(result.trained), stage="unlearn", arm="declared")
    table.add(metrics.PARAMETERS_TRAINED, len(result.delta), stage="unlearn", arm="changed")
    for number, record in enumerate(result.log):
        table.add(
            metrics.OBJECTIVE_FORGET, record["forget"], stage="unlearn", training_step=number + 1
        )
    model = copy.deepcopy(setup.base)
    start = snapshot(model)
    facts = {
        name: setup.encode(one_per_item(examples))
        for name, examples in measured_sets(setup.record).items()
        if examples[0].answer is not None
    }

    def at(alpha: float) -> float:
        apply_delta(model, start, result.delta, alpha)
        cost = disruption(model)
        for split, texts in facts.items():
            table.add(
                metrics.RECALL, score(model, texts).recall, stage="budget", split=split, alpha=alpha
            )
        table.add(metrics.DISRUPTION, cost, stage="budget", arm=disruption.measure, alpha=alpha)
        return cost

    match = match_budget(
        at, float("inf") if budget is None else budget, limit=1.0 if budget is None else limit
    )
    apply_delta(model, start, result.delta, match.alpha)
    add_match(match, result.delta, start, table)
    if budget is not None:
        table.add(metrics.BUDGET, budget, stage="unlearn", arm=disruption.measure)
        table.add(metrics.BUDGET_REACHED, float(match.reached), stage="unlearn")
        for name in disruption.counted:
            table.add(metrics.BUDGET_SET, 1.0, stage="unlearn", split=name)
    add_disruption(model, disruption, table)
    add_shift(model, setup, table)
    measure_sets(
        model,
        {name: setup.encode(examples) for name, examples in measured_sets(setup.record).items()},
        table,
        stage="unlearn",
    )
    if common:
        add_energy(setup.base, result.delta, common, table)
    return model


def add_disruption(model: PreTrainedModel, disruption: Disruption, table: Table) -> None:
    """What a change costs: in the measure of the budget with its noise over texts, and set by set
    in both measures.
    """
    table.add_estimate(
        metrics.DISRUPTION, disruption.estimate(model), stage="unlearn", arm=disruption.measure
    )
    for measure in DISRUPTION_MEASURES:
        for name, cost in disruption.by_set(model, measure).items():
            table.add_estimate(metrics.DISRUPTION, cost, stage="unlearn", split=name, arm=measure)


def add_distance(
    model: PreTrainedModel, setup: Setup, common: Mapping[str, Subspace], table: Table
) -> None:
    """How far a model that was opened is from the base: what the difference costs, how far the
    stream and the weights moved, and in which directions.
    """
    start = snapshot(setup.base)
    delta = delta_between(model, start)
    add_disruption(model, Disruption(setup), table)
    add_shift(model, setup, table)
    table.add(metrics.DISPLACEMENT, norm_of(delta), stage="unlearn")
    table.add(metrics.RELATIVE_DISPLACEMENT, norm_of(delta) / norm_of(start), stage="unlearn")
    add_energy(setup.base, delta, common, table)


def add_match(
    match: BudgetMatch, delta: Mapping[str, Tensor], start: Mapping[str, Tensor], table: Table
) -> None:
    """The line search in rows: alpha, and how far the weights moved."""
    table.add(metrics.ALPHA, match.alpha, stage="unlearn")
    table.add(metrics.DISPLACEMENT, match.alpha * norm_of(delta), stage="unlearn")
    table.add(
        metrics.RELATIVE_DISPLACEMENT,
        match.alpha * norm_of(delta) / norm_of(start),
        stage="unlearn",
    )


def add_energy(
    base: PreTrainedModel, delta: Mapping[str, Tensor], common: Mapping[str, Subspace], table: Table
) -> None:
    """Share of every MLP delta's energy that acts on the top directions of the retain activations,
    against the share of a random delta (rank / width).
    """
    for site in resolve(base, ["blocks.*.mlp.hook_in", "blocks.*.mlp.out.hook_in"]):
        names = ("gate_proj", "up_proj") if site.name.endswith("mlp.hook_in") else ("down_proj",)
        changed = [
            delta[name]
            for name in delta
            if any(
                fnmatch.fnmatchcase(name, f"*layers.{site.layer}.mlp.{part}.weight")
                for part in names
            )
        ]
        subspace = common[site.name]
        if not changed or not subspace.rank:
            continue
        for k in (1, 2, 4, 8, 16, subspace.rank):
            if k <= subspace.rank:
                table.add(
                    metrics.ENERGY_IN_RETAIN_SUBSPACE,
                    energy_inside(torch.cat(changed).cpu(), subspace.basis[:, :k].cpu()),
                    stage="unlearn",
                    site=site.name,
                    rank=k,
                )
                table.add(
                    metrics.ENERGY_OF_RANDOM_DELTA,
                    k / subspace.width,
                    stage="unlearn",
                    site=site.name,
                    rank=k,
                )


def add_leaks(report: LeakReport, table: Table, **columns: Any) -> None:
    """What attack texts give away of the questions, and whether they may be called benign."""
    for metric, value in (
        ("leaked_subjects", len(report.subjects)),
        ("leaked_answers", len(report.answers)),
        ("leaked_passages", len(report.passages)),
        ("shared_5grams", report.shared_ngrams),
        ("syntactic_similarity", report.syntactic_similarity),
        ("benign", float(report.benign)),
    ):
        table.add(metric, value, **columns)


def add_shift(model: PreTrainedModel, setup: Setup, table: Table) -> None:
    """How far the residual stream has moved from the base's after every block, on held-out forget
    texts and on every retain set.
    """
    texts = {"forget-heldout": setup.record.forget_heldout, **setup.record.retain_test}
    for split, examples in texts.items():
        encoded = setup.encode(one_per_item(examples)) if examples else []
        if not encoded or sum(int(batch.content_mask.sum()) for batch in encoded) < 4:
            continue
        for row in shift_by_layer(streams(setup.base, encoded), streams(model, encoded)).to_dict(
            "records"
        ):
            for measure in SHIFT_MEASURES:
                table.add(
                    measure,
                    row[measure],
                    stage="unlearn",
                    site=f"blocks.{row['layer']}.hook_resid_post",
                    split=split,
                )


def add_geometry(
    base: Mapping[int, Tensor],
    start: Mapping[int, Tensor],
    attacked_streams: Mapping[int, Tensor],
    table: Table,
    *,
    step: int,
    **columns: Any,
) -> None:
    """What an attack has given back of the base's residual stream, block by block, and what it
    moved beside the way back.
    """
    for row in recovered_shift(base, start, attacked_streams).dropna().to_dict("records"):
        for metric in ("returned", "beside"):
            table.add(
                metric,
                row[metric],
                split="forget-heldout",
                site=f"blocks.{row['layer']}.hook_resid_post",
                attack_step=step,
                **columns,
            )


def measured_attack(
    steps: Steps,
    sets: Mapping[str, Sequence[Batch]],
    table: Table,
    **columns: Any,
) -> Steps:
    """Score every set whenever an attack stops for it; where it diverges is a row
    (``diverged_at``), and what was measured before stays.

    Yields:
        ``step, attacked``, once its scores are in the table.
    """
    try:
        for step, attacked in steps:
            for split, encoded in sets.items():
                scores = raise_if_diverged(score(attacked, encoded), step)
                table.add_scores(scores, split=split, attack_step=step, **columns)
            yield step, attacked
    except DivergedError as error:
        table.add(metrics.DIVERGED_AT, error.step, **columns)


def attack(
    model: PreTrainedModel,
    setup: Setup,
    settings: RelearnSettings,
    *,
    seed: int,
    table: Table,
    null_pool: Sequence[Example],
    by: Attack | None = None,
    matched: bool = False,
    progress: ProgressCallback = quiet,
) -> None:
    """Attack with the attacker's half of the forget set, and with a null text of the same length;
    measure the held-out half along the way.

    Args:
        model: is not changed.
        setup: base and texts.
        settings: of the run's relearning attack.
        seed: of the attack.
        table: gets the rows, with the attack's name as their stage.
        null_pool: texts of the null attack.
        by: what attacks; default relearning.
        matched: adds an arm ``random-facts``: the attacker's texts with exchanged answers, which
            are measured as well (split ``random-facts``). It stands in where there is no
            never-learned model to attack.
        progress: called after every step.
    """
    record, by = setup.record, by or ATTACKS["relearn"]
    stage: dict[str, Any] = {"stage": by.name}
    add_leaks(
        leak_report(record.forget_attacked, record.forget_heldout, public=record.retain_all),
        table,
        arm="attack",
        **stage,
    )
    null = null_text(
        record.forget_attacked,
        null_pool,
        lambda example: len(setup.tokenizer(example.text)["input_ids"]),
    )
    encoded = {"forget-heldout": setup.encode(record.forget_heldout)}
    watched = setup.encode(one_per_item(record.forget_heldout))
    before, start = streams(setup.base, watched), streams(model, watched)
    arms: dict[str, Sequence[Example]] = {"attack": record.forget_attacked, "null": null}
    if matched:
        try:
            arms["random-facts"] = random_facts(record.forget_attacked, seed=seed)
        except WorkbenchError:
            # texts without answers, or that all end alike: the other arms do not depend on this one
            table.add(metrics.RANDOM_FACTS_POSSIBLE, 0.0, **stage)
    for number, (arm, texts) in enumerate(arms.items()):
        own_sets = (
            {"random-facts": setup.encode(texts, answers=True)} if arm == "random-facts" else {}
        )

        def advance(done: int, total: int, number: int = number) -> None:
            progress(number * total + done, len(arms) * total)

        steps = by.run(model, setup.tokenizer, texts, settings, seed, setup.max_length, advance)
        place = {**stage, "arm": arm}
        for step, attacked in measured_attack(steps, {**encoded, **own_sets}, table, **place):
            add_geometry(before, start, streams(attacked, watched), table, step=step, **place)


def trigger_check(
    model: PreTrainedModel,
    setup: Setup,
    neutral: Sequence[str],
    *,
    seed: int,
    table: Table,
    template: PromptTemplate = speaker_tag,
) -> None:
    """Accuracy on retain questions with nothing, a forget-token, a retain-token or a neutral word
    in front.
    """
    queries = [
        query
        for name, examples in setup.record.retain_test.items()
        if name != setup.record.general
        for query in one_per_item(examples)
    ]
    arms = trigger_queries(
        queries,
        setup.record.forget_tokens,
        setup.record.retain_tokens,
        neutral,
        seed=seed,
        template=template,
    )
    for arm, result in trigger_scores(
        model, {arm: setup.encode(examples) for arm, examples in arms.items()}
    ).items():
        table.add_scores(result, stage="triggers", arm=arm, split="retain")


def sharpness(
    model: PreTrainedModel,
    setup: Setup,
    *,
    points: int,
    reach: float,
    tolerance: float,
    seed: int,
    table: Table,
) -> None:
    """One-dimensional slices through the model, and both ends of the Hessian's spectrum of the
    forget loss.
    """
    landscape.add_slices(
        model, setup, landscape.losses_of(setup), table, points=points, reach=reach, seed=seed
    )
    landscape.add_ends(model, landscape.whole_batch(setup), table, tolerance=tolerance, seed=seed)
