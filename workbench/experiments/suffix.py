"""Adversarial suffixes on the models of a finished run: do they bring forgotten answers back, and
do they break kept ones?

Two questions, one search (:func:`workbench.attacks.gcg.gcg`):

* *jailbreak* (Fan et al. 2025, arXiv 2502.05374, input-level attacks): one universal suffix is
  searched with the attacker's half of the forgotten facts and judged on the held-out ones.
  Controls: the never-learned model and the base under the same attack, and random suffixes.
* *accuracy under attack* (Huu-Tien et al., arXiv 2501.19202): one suffix is searched that raises
  the loss on one half of the retain questions, and judged on the other half; the same again for
  questions with a forget-token inside (``workbench triggers``). Controls: the base under the same
  attack, and random suffixes.

The answers of the built-in world complete their questions to sentences, so that any words between
the two leave nothing to complete. Every "suffix" therefore stands in front of its question, as the
universal prefix of Fan et al.'s attack does. No suffix holds a word of any answer.

In the tables ``arm`` is one of :data:`SUFFIX_ARMS` and ``split`` one of :data:`SPLITS`. Along the
search, ``search_loss`` is the loss in nats per answer; the rows of ``suffix_token`` are the tokens
of the suffix that was found, ``value`` their place in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from pydantic import Field
from transformers import PreTrainedModel

from workbench import metrics
from workbench.attacks.gcg import gcg, in_front, random_suffix, suffix_batches, suffix_prompts
from workbench.claims import INSIDE
from workbench.data.records import Example, alternate, one_per_item
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import score
from workbench.evaluation.statistics import bootstrap
from workbench.experiments import QUESTIONS
from workbench.experiments.triggers import TEMPLATES, arms_of
from workbench.progress import ProgressCallback
from workbench.runner import Experiment, ModelJob, Plan, Source, plan_over_models
from workbench.runs.models import BASE, NEVER
from workbench.runs.settings import Count, FinishedRunSettings
from workbench.runs.setup import ROWS, Setup
from workbench.tables import Table, fact_table

NONE, RANDOM, SEARCHED = "none", "random suffix", "searched suffix"
SUFFIX_ARMS = (NONE, RANDOM, SEARCHED)
JAILBREAK, RETAIN, WITH_TOKEN = "jailbreak", "retain", "retain with a forget-token"
SPLITS = (JAILBREAK, RETAIN, WITH_TOKEN)


class SuffixSettings(FinishedRunSettings):
    """The budget of a search; every split of every model gets the same.

    A search runs ``questions * (candidates + 1)`` rows through the model per step: with the
    defaults, 34,000 rows of about 15 tokens, some 20 seconds of one core for a model of 0.9 million
    parameters, a minute for the three splits. Zou et al. (arXiv 2307.15043) search 20 tokens for
    500 steps of 512 candidates: what this budget does not find, a larger one may.

    Attributes:
        methods: of the run; base and never-learned control are attacked as well.
        length: tokens of a suffix.
        steps: of the search.
        candidates: swaps tried in a step.
        topk: tokens to choose from at each place.
        questions: with which the suffix is searched, at most; one paraphrase of each fact.
        random: random suffixes over which that arm is averaged, fact by fact.
    """

    length: Count = Field(8, description="Tokens of a suffix.")
    steps: Count = Field(50, description="Steps of every search.")
    candidates: Count = Field(16, description="Swaps tried in a step.")
    topk: Count = Field(64, description="Tokens to choose from at each place.")
    questions: Count = Field(40, description="With which a suffix is searched, at most.")
    random: Count = Field(8, description="Random suffixes beside the searched one.")


def questions_of(
    setup: Setup, seed: int
) -> dict[str, tuple[tuple[Example, ...], tuple[Example, ...]]]:
    """For every split the questions with which a suffix is searched (one paraphrase per fact) and
    those on which it is judged; the two share no subject.

    Args:
        setup: of a run on the built-in world.
        seed: decides which forget-token meets which retain question.
    """
    record = setup.record
    arms = arms_of(record, TEMPLATES[INSIDE], seed, setup.neutral)
    clean, perturbed = arms["clean"], arms["forget-token"]
    searched = {
        example.item for example in alternate(clean)[0]
    }  # by the questions without the word, which may cut a subject in two

    def halves(examples: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        return tuple(e for e in examples if e.item in searched), tuple(
            e for e in examples if e.item not in searched
        )

    return {
        JAILBREAK: (one_per_item(record.forget_attacked), record.forget_heldout),
        RETAIN: halves(clean),
        WITH_TOKEN: halves(perturbed),
    }


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most ``count`` examples, evenly spread."""
    kept = min(count, len(examples))
    return [examples[number * len(examples) // kept] for number in range(kept)]


def _attack(
    model: PreTrainedModel,
    setup: Setup,
    split: str,
    settings: SuffixSettings,
    seed: int,
    table: Table,
    progress: ProgressCallback,
) -> None:
    search_questions, test_questions = questions_of(setup, seed)[split]
    tokenizer, record = setup.tokenizer, setup.record
    prompts = suffix_prompts(tokenizer, _spread(search_questions, settings.questions), in_front)
    judged = suffix_prompts(tokenizer, test_questions, in_front)
    answers = sorted(
        {example.answer_text for example in (*record.forget, *record.retain_all)} - {""}
    )
    result = gcg(
        model,
        tokenizer,
        prompts,
        length=settings.length,
        steps=settings.steps,
        topk=settings.topk,
        candidates=settings.candidates,
        seed=seed,
        forbidden=answers,
        maximise=split != JAILBREAK,
        progress=progress,
    )
    drawn = [
        random_suffix(
            model,
            tokenizer,
            prompts,
            evaluations=1,
            length=settings.length,
            seed=seed * settings.random + number,
            forbidden=answers,
        ).suffix_ids
        for number in range(settings.random)
    ]
    for arm, suffixes in ((NONE, [()]), (RANDOM, drawn), (SEARCHED, [result.suffix_ids])):
        encoded = [
            batch.to(model.device)
            for suffix in suffixes
            for batch in suffix_batches(judged, suffix, ROWS)
        ]
        table.add_scores(score(model, encoded), arm=arm, split=split)
    for step, loss in enumerate(result.losses):
        table.add(
            metrics.SEARCH_LOSS, loss, n=len(prompts), arm=SEARCHED, split=split, search_step=step
        )
    for place, token in enumerate(result.suffix_ids):
        table.add(
            metrics.SUFFIX_TOKEN,
            place,
            arm=SEARCHED,
            split=split,
            token=tokenizer.decode([token]).strip(),
            token_id=token,
        )
    words = result.text.split()
    table.add(
        metrics.FORGET_TOKENS,
        sum(word in record.forget_tokens for word in words),
        n=len(words),
        arm=SEARCHED,
        split=split,
    )


def _ask(settings: SuffixSettings, job: ModelJob) -> None:
    for number, split in enumerate(SPLITS):

        def advance(step: int, of: int, done: int = number) -> None:
            job.context.progress(done * of + step, len(SPLITS) * of)

        def work(table: Table, split: str = split, advance: ProgressCallback = advance) -> None:
            _attack(job.model, job.setup, split, settings, job.seed, table, advance)

        job.context.stage(split, work)


def prepare(settings: SuffixSettings, source: Source, out: Path) -> Plan:
    """Three searches for every model.

    Raises:
        WorkbenchError: the run's texts give no question to search with or to judge on.
    """
    for split, halves in questions_of(source.setup, source.config.seeds[0]).items():
        if not all(halves):
            raise WorkbenchError(
                f"{source.folder}: a suffix for {split!r} needs questions to be searched with and "
                "others to be judged on; there are too few retain texts with answers"
            )
    return plan_over_models(
        "suffix",
        source,
        partial(_ask, settings),
        summaries=(_effects,),
        claims=("smooth-jailbreak",),
    )


def control_of(split: str) -> str:
    """The model beside which a split is read: what never knew an answer cannot give it back, and
    what nobody unlearned cannot have been broken by unlearning.
    """
    return NEVER if split == JAILBREAK else BASE


def _effects(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
    """What a suffix changes, paired by seed and fact: with it minus without it (metrics
    ``suffix_effect`` and ``suffix_effect_probability``).

    ``arm`` is the suffix, or ``minus-<control>``: the change by the searched suffix minus that of
    the control (see :func:`control_of`) under its own attack.
    """
    table = Table({"run": key, "stage": "suffix"})
    for metric, column in (
        ("suffix_effect", "correct"),
        ("suffix_effect_probability", "probability"),
    ):
        changes = {}
        for (method, split), group in items.groupby(["method", "split"], sort=False):
            for arm in (RANDOM, SEARCHED):
                changes[str(method), str(split), arm] = fact_table(
                    group, column, arm=arm
                ) - fact_table(group, column, arm=NONE)
        for (method, split, arm), change in changes.items():
            effects = {arm: change}
            control = control_of(split)
            if arm == SEARCHED and method != control and (control, split, arm) in changes:
                effects[f"minus-{control}"] = change - changes[control, split, arm]
            for name, values in effects.items():
                if values.size and values.notna().all().all():
                    table.add_estimate(
                        metric,
                        bootstrap(values.to_numpy()),
                        method=method,
                        model=method,
                        split=split,
                        arm=name,
                    )
    return table.frame()


def suffix_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per kind of question and model: recall with each kind of suffix, what the searched
    one changes, and how far that goes beyond the control's change.
    """
    rows = results[results["seed"].isna() & (results["stage"] == "suffix")]
    cells = {
        (row["split"], row["method"], row["metric"], row["arm"]): row
        for row in rows[rows["metric"].isin(["recall", "suffix_effect"])].to_dict("records")
    }

    def cell(split: str, method: str, metric: str, arm: str) -> str:
        row = cells.get((split, method, metric, arm))
        if row is None:
            return "–"
        sign = "" if metric == "recall" else "+"
        return f"{row['value']:{sign}.2f} [{row['low']:{sign}.2f}, {row['high']:{sign}.2f}]"

    lines = []
    for split in SPLITS:
        for method in rows.loc[rows["split"] == split, "method"].dropna().drop_duplicates():
            line = {"questions": split, "model": method} | {
                arm: cell(split, method, "recall", arm) for arm in SUFFIX_ARMS
            }
            line["change"] = cell(split, method, "suffix_effect", SEARCHED)
            line["beyond the control"] = cell(
                split, method, "suffix_effect", f"minus-{control_of(split)}"
            )
            lines.append(line)
    return pd.DataFrame(lines)


SUFFIX = Experiment(
    "suffix",
    QUESTIONS["suffix"],
    SuffixSettings,
    prepare,
    suffix_table,
    # for the width; --json has it
    shown=lambda table: table.drop(columns="beyond the control"),
    by="questions",
)
