"""Few-shot prompting of a run's models: do solved questions about other forgotten facts in front of
a question bring its answer back?

Lynch et al. 2024 (arXiv 2402.16835) ask unlearned models in context. The control has the same
demonstrations with their answers shuffled (Min et al. 2022, arXiv 2202.12837): what the format
alone does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
from pydantic import Field, field_validator

from workbench import metrics
from workbench.attacks.few_shot import few_shot
from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import score
from workbench.evaluation.statistics import bootstrap
from workbench.experiments import QUESTIONS
from workbench.runner import Experiment, ModelJob, Plan, Source, plan_over_models
from workbench.runs.settings import FinishedRunSettings, Integers
from workbench.runs.setup import Setup
from workbench.tables import Table, by_columns, fact_table

SOLVED, SHUFFLED = "solved", "answers shuffled"


class FewShotSettings(FinishedRunSettings):
    """How the models are asked.

    Attributes:
        methods: of the run.
        shots: numbers of demonstrations; 0 is the plain question.
        same_answer: let demonstrations hold the answer of the question that they stand before.
    """

    shots: Integers = Field((0, 1, 2, 4), description="Numbers of demonstrations, rising from 0.")
    same_answer: bool = Field(
        False, description="Let demonstrations hold the answer of the question (it may be copied)."
    )

    @field_validator("shots")
    @classmethod
    def _rising(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if len(shots) < 2 or shots[0] != 0 or list(shots) != sorted(set(shots)):
            raise ValueError(f"they are {shots}; give rising numbers that start at 0, e.g. 0,2,4")
        return shots


def _score(settings: FewShotSettings, job: ModelJob, table: Table) -> None:
    setup = job.setup
    for arm in (SOLVED, SHUFFLED):
        for shots in settings.shots:
            prompts = _prompts(settings, setup, shots, job.seed, arm == SHUFFLED)
            table.add_scores(
                score(job.model, prompts), split="forget-heldout", arm=arm, shots=shots
            )


def _prompts(
    settings: FewShotSettings, setup: Setup, shots: int, seed: int, shuffled: bool
) -> list[Batch]:
    # the texts of the built-in world are sentences that follow one another
    separator = " " if setup.world is not None else "\n\n"
    record = setup.record
    prompts = few_shot(
        record.forget_heldout,
        record.forget_attacked,
        shots,
        seed,
        separator,
        allow_same_answer=settings.same_answer,
        # nothing to shuffle among fewer than two answers
        shuffled=shuffled and shots > 1,
    )
    longest = max(len(setup.tokenizer(prompt.text)["input_ids"]) for prompt in prompts)
    limit = getattr(setup.base.config.get_text_config(), "max_position_embeddings", longest)
    if longest > limit:
        raise WorkbenchError(
            f"{shots} demonstrations make prompts of {longest} tokens, and the model reads "
            f"{limit}; give fewer --shots"
        )
    return setup.encode(prompts)


def _effects(rows: pd.DataFrame, items: pd.DataFrame, key: str) -> pd.DataFrame:
    """What demonstrations bring back beyond the plain question, and beyond shuffled ones: paired by
    seed and fact.
    """
    table = Table({"run": key, "stage": "few-shot", "split": "forget-heldout"})
    for method, method_items in items.groupby("method", sort=False):
        most = method_items["x"].max()
        solved = fact_table(method_items, arm=SOLVED, x=most)
        for arm, control in (
            ("minus-plain", fact_table(method_items, arm=SOLVED, x=0)),
            ("minus-shuffled", fact_table(method_items, arm=SHUFFLED, x=most)),
        ):
            effect = bootstrap((solved - control).to_numpy())
            table.add_estimate(
                metrics.FEW_SHOT_EFFECT, effect, method=method, model=method, arm=arm, shots=most
            )
    return table.frame()


def prepare(settings: FewShotSettings, source: Source, out: Path) -> Plan:
    """Every model with every number of demonstrations.

    Raises:
        WorkbenchError: the facts of the run make no such demonstrations, or the prompts are too
            long.
    """
    for shuffled in (False, True):
        _prompts(settings, source.setup, settings.shots[-1], source.config.seeds[0], shuffled)
    return plan_over_models(
        "few-shot", source, partial(_score_stage, settings), summaries=(_effects,)
    )


def _score_stage(settings: FewShotSettings, job: ModelJob) -> None:
    job.context.stage("few-shot", partial(_score, settings, job))


def few_shot_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model: recall behind every number of demonstrations, and what they bring back."""
    rows = results[(results["stage"] == "few-shot") & results["seed"].isna()]
    recall = metrics.RECALL.rows(rows, arm=SOLVED)
    effects = metrics.FEW_SHOT_EFFECT.rows(rows)
    return by_columns(recall, "x", "{:g} shots").merge(
        by_columns(effects, "arm", "{}", sign=True), on="model", how="left"
    )


FEW_SHOT = Experiment(
    "few-shot",
    QUESTIONS["few-shot"],
    FewShotSettings,
    prepare,
    few_shot_table,
)
