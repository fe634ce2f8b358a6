"""The search for a suffix that does harm, the questions of the suffix experiment, the experiment
from end to end on a finished run, and its figure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from workbench import runner
from workbench.attacks import gcg as search
from workbench.attacks.gcg import (
    SuffixPrompt,
    gcg,
    in_front,
    random_suffix,
    suffix_losses,
    suffix_prompts,
)
from workbench.builtin import world_of
from workbench.claims import decide
from workbench.cli import main
from workbench.data.records import Example, one_per_item
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import score
from workbench.experiments.suffix import (
    JAILBREAK,
    NONE,
    RANDOM,
    RETAIN,
    SEARCHED,
    SPLITS,
    SUFFIX_ARMS,
    WITH_TOKEN,
    SuffixSettings,
    questions_of,
    suffix_table,
)
from workbench.figures.suffix import suffix as draw
from workbench.models import OpenedModel, open_model
from workbench.runner import Result
from workbench.runs.models import BASE, NEVER, setup_of
from workbench.runs.pipeline import Run
from workbench.runs.setup import Setup
from workbench.tables import RESULT_COLUMNS, fact_table, typed

SMALL = SuffixSettings(length=2, steps=3, candidates=4)


@pytest.fixture(scope="module")
def opened(quick_base: Path) -> OpenedModel:
    return open_model(quick_base)


@pytest.fixture(scope="module")
def prompts(opened: OpenedModel, quick_run: Run) -> tuple[SuffixPrompt, ...]:
    return suffix_prompts(
        opened.tokenizer, world_of(quick_run.config.model).record.forget_attacked[:4], in_front
    )


@pytest.fixture(scope="module")
def setup(quick_run: Run) -> Setup:
    return setup_of(quick_run.config, quick_run.folder)


@pytest.fixture(scope="module")
def found(quick_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("suffix") / "run"
    return runner.run("suffix", out, SMALL, of=quick_run.folder, methods=["npo"], workers=1)


# --- the search for the highest loss ---


def test_one_step_over_all_swaps_finds_the_worst(
    opened: OpenedModel, prompts: Sequence[SuffixPrompt]
) -> None:
    words = "the of is : asks every near from".split()  # noqa: SIM905
    allowed = [
        ids[0]
        for word in words
        if len(ids := opened.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    ]
    start = allowed[:2]
    swaps = [
        [*start[:place], token, *start[place + 1 :]]
        for place in (0, 1)
        for token in allowed
        if token != start[place]
    ]
    values = suffix_losses(opened.model, prompts, torch.tensor(swaps))
    result = gcg(
        opened.model,
        opened.tokenizer,
        prompts,
        length=2,
        steps=1,
        topk=100,
        candidates=1000,
        start=start,
        allowed=allowed,
        maximise=True,
    )
    assert result.losses[1] == pytest.approx(float(values.max()), rel=1e-5)
    again = float(suffix_losses(opened.model, prompts, torch.tensor([result.suffix_ids]))[0])
    assert result.loss == max(result.losses) == pytest.approx(again, rel=1e-5)


def test_with_few_tokens_to_choose_from_the_gradient_is_followed_upwards(
    opened: OpenedModel, prompts: Sequence[SuffixPrompt]
) -> None:
    start = [opened.tokenizer("the", add_special_tokens=False)["input_ids"][0]]
    up, down = (
        gcg(
            opened.model,
            opened.tokenizer,
            prompts,
            length=1,
            steps=1,
            topk=8,
            candidates=8,
            start=start,
            maximise=maximise,
        )
        for maximise in (True, False)
    )
    assert up.losses[0] == pytest.approx(down.losses[0])
    assert up.losses[1] > down.losses[1]


def test_the_highest_loss_is_kept_while_the_walk_goes_on(
    opened: OpenedModel, prompts: Sequence[SuffixPrompt]
) -> None:
    result = gcg(
        opened.model,
        opened.tokenizer,
        prompts,
        length=2,
        steps=8,
        topk=4,
        candidates=1,
        maximise=True,
    )
    assert result.loss == max(result.losses)
    drawn = random_suffix(
        opened.model, opened.tokenizer, prompts, evaluations=12, length=2, rows=16, maximise=True
    )
    assert list(drawn.losses) == sorted(drawn.losses) and drawn.loss == drawn.losses[-1]
    lowest = random_suffix(
        opened.model, opened.tokenizer, prompts, evaluations=12, length=2, rows=16
    )
    assert lowest.loss < drawn.loss


def test_a_loss_that_is_not_a_number_is_the_worst_either_way(
    opened: OpenedModel, prompts: Sequence[SuffixPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(_model: object, _rows: object, suffixes: Tensor, _limit: int) -> Tensor:
        return torch.tensor([torch.inf, 1.0, 2.0])[
            : len(suffixes)
        ]  # the search reads NaN as infinity

    monkeypatch.setattr(search, "_losses", losses)
    for maximise, best in ((True, 2.0), (False, 1.0)):
        assert (
            random_suffix(
                opened.model,
                opened.tokenizer,
                prompts,
                evaluations=3,
                length=1,
                rows=12,
                maximise=maximise,
            ).loss
            == best
        )


# --- the questions ---


def test_a_suffix_is_judged_on_people_and_islands_that_the_search_has_not_seen(
    setup: Setup,
) -> None:
    record, questions = setup.record, questions_of(setup, 0)
    assert tuple(questions) == SPLITS
    assert questions[JAILBREAK] == (one_per_item(record.forget_attacked), record.forget_heldout)
    for split in SPLITS:
        searched, judged = questions[split]
        assert searched and judged
        assert not {e.item for e in searched} & {e.item for e in judged}
    subjects = [{e.subject_text for e in half} for half in questions[RETAIN]]
    assert not subjects[0] & subjects[1]
    for clean, perturbed in zip(questions[RETAIN], questions[WITH_TOKEN], strict=True):
        assert [e.item for e in clean] == [e.item for e in perturbed]
        for plain, other in zip(clean, perturbed, strict=True):
            (word,) = set(other.text.split()) - set(plain.text.split())
            assert word in record.forget_tokens and other.answer_text == plain.answer_text
    trained = {e.item for e in record.retain_train}
    assert not trained & {e.item for half in questions[RETAIN] for e in half}


# --- the experiment ---


def test_the_tables_hold_every_model_arm_and_kind_of_question(found: Result) -> None:
    rows = found.results
    asked = rows[(rows["metric"] == "recall") & rows["seed"].isna()]
    assert set(map(tuple, asked[["method", "split", "arm"]].to_numpy())) == {
        (m, s, a) for m in ("npo", BASE, NEVER) for s in SPLITS for a in SUFFIX_ARMS
    }
    assert asked["low"].notna().all() and set(rows["stage"]) == {"suffix"}
    assert set(found.items["seed"]) == {0, 1}
    assert len(suffix_table(rows)) == 3 * len(SPLITS)
    assert "beyond the control" in found._repr_html_() and "Result(suffix in" in repr(found)


def test_without_a_suffix_the_plain_questions_are_asked(
    found: Result, setup: Setup, quick_run: Run
) -> None:
    model = open_model(quick_run.folder / "models" / "npo-seed1").model
    mine = found.items[
        (found.items["method"] == "npo") & (found.items["seed"] == 1) & (found.items["arm"] == NONE)
    ]
    for split, (_, judged) in questions_of(setup, 1).items():
        plain = score(model, setup.encode(judged))
        here = mine[mine["split"] == split]
        assert here["correct"].mean() == pytest.approx(plain.recall)
        assert here["probability"].mean() == pytest.approx(plain.probability.mean(), rel=1e-4)
    own = quick_run.items
    own = own[
        (own["method"] == "npo")
        & (own["stage"] == "unlearn")
        & (own["split"] == "forget-heldout")
        & (own["seed"] == 1)
    ]
    assert mine.loc[mine["split"] == JAILBREAK, "correct"].mean() == pytest.approx(
        own["correct"].mean()
    )


def test_the_suffix_that_is_stored_is_the_best_of_the_search_and_says_no_answer(
    found: Result, setup: Setup, quick_run: Run
) -> None:
    model = open_model(quick_run.folder / "models" / "npo-seed0").model
    rows = found.results[(found.results["method"] == "npo") & (found.results["seed"] == 0)]
    answers = {
        word
        for e in (*setup.record.forget, *setup.record.retain_all)
        for word in e.answer_text.split()
    }
    for split, (mine, _) in questions_of(setup, 0).items():
        here = rows[rows["split"] == split]
        tokens = here[here["metric"] == "suffix_token"].sort_values("value")
        assert len(tokens) == SMALL.length and not set(tokens["token"]) & answers
        ids = tokens["token_id"].astype(int).tolist()
        assert setup.tokenizer.decode(ids).split() == tokens["token"].tolist()
        asked = suffix_prompts(setup.tokenizer, mine, in_front)  # fewer facts than a search may use
        assert len(asked) <= SMALL.questions
        losses = here[here["metric"] == "search_loss"].sort_values("x")["value"]
        assert len(losses) == SMALL.steps + 1
        best = losses.min() if split == JAILBREAK else losses.max()
        assert float(suffix_losses(model, asked, torch.tensor([ids]))[0]) == pytest.approx(
            best, rel=1e-4
        )
        named = here[here["metric"] == "forget_tokens"]["value"].item()
        assert named == sum(word in setup.record.forget_tokens for word in tokens["token"])


def test_what_a_suffix_changes_is_paired_by_seed_and_fact(found: Result) -> None:
    effects = found.results[found.results["metric"] == "suffix_effect"].set_index(
        ["method", "split", "arm"]
    )["value"]

    def change(method: str, split: str, arm: str) -> pd.DataFrame:
        mine = found.items[(found.items["method"] == method) & (found.items["split"] == split)]
        return fact_table(mine, arm=arm) - fact_table(mine, arm=NONE)

    for split, control in ((JAILBREAK, NEVER), (RETAIN, BASE), (WITH_TOKEN, BASE)):
        for arm in (RANDOM, SEARCHED):
            assert effects["npo", split, arm] == pytest.approx(
                change("npo", split, arm).to_numpy().mean()
            )
        beyond = change("npo", split, SEARCHED) - change(control, split, SEARCHED)
        assert effects["npo", split, f"minus-{control}"] == pytest.approx(beyond.to_numpy().mean())
        assert (control, split, f"minus-{control}") not in effects.index


def test_the_same_settings_go_on_from_the_same_folder_and_others_are_refused(
    found: Result, quick_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "suffix",
        "--run",
        str(quick_run.folder),
        "--out",
        str(found.folder),
        "--methods",
        "npo",
        "--workers",
        "1",
        "--length",
        "2",
    ]
    assert main([*given, "--steps", "3", "--candidates", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [claim["id"] for claim in said["claims"]] == ["smooth-jailbreak"] and said["claims"][0][
        "n"
    ] == 0  # no smoothed method in this run
    assert len(said["table"]) == 3 * len(SPLITS) and Path(said["figures"]["suffix"][0]).is_file()
    assert main([*given, "--steps", "3", "--candidates", "4"]) == 0
    assert "smooth-jailbreak: not measured, " in capsys.readouterr().out
    assert main([*given, "--steps", "4"]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_wrong_input_is_named(quick_run: Run, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="unknown method"):
        runner.run("suffix", tmp_path / "out", of=quick_run.folder, methods=["npoo"])
    with pytest.raises(WorkbenchError, match="holds no finished run"):
        runner.run("suffix", tmp_path / "out", of=tmp_path / "nowhere")
    for name in ("length", "steps", "candidates", "topk", "questions", "random"):
        with pytest.raises(WorkbenchError, match=f"suffix: {name}: .*equal to 1.*given: 0"):
            runner.run("suffix", tmp_path / "out", of=quick_run.folder, **{name: 0})
    assert not (tmp_path / "out").exists()


def test_a_pair_of_plain_and_smoothed_method_decides_the_claim(found: Result) -> None:
    # The never-learned model's answers stand in for a smoothed method's: the effect is the
    # difference of the rises.
    items = found.items[found.items["method"].isin(["npo", NEVER])].assign(
        method=lambda frame: frame["method"].replace({NEVER: "npo-sam"})
    )
    (verdict,) = decide(found.results, items, scale="test", ids=["smooth-jailbreak"])
    rises = found.results[
        (found.results["metric"] == "suffix_effect")
        & (found.results["split"] == JAILBREAK)
        & (found.results["arm"] == f"minus-{NEVER}")
    ]
    assert verdict.effect == pytest.approx(rises.set_index("method")["value"]["npo"])


# --- the figure ---


def _rows(methods: Sequence[str]) -> pd.DataFrame:
    rows = []
    for number, method in enumerate(methods):
        for split in SPLITS:
            for arm, value in zip(SUFFIX_ARMS, (0.5, 0.4, 0.7), strict=True):
                middle = value + 0.05 * number
                shared = {
                    "stage": "suffix",
                    "method": method,
                    "split": split,
                    "arm": arm,
                    "low": middle - 0.1,
                    "high": middle + 0.2,
                }
                rows.append({**shared, "metric": "recall", "value": middle})
                rows.append(
                    {**shared, "metric": "recall", "value": 0.0, "seed": 0}
                )  # single seeds are not drawn
                rows.append(
                    {
                        **shared,
                        "metric": "answer_probability",
                        "value": middle - 0.3,
                        "low": 0.0,
                        "high": 1.0,
                    }
                )
    return typed(pd.DataFrame(rows), RESULT_COLUMNS)


def test_the_figure_draws_every_interval_of_the_table_in_the_row_of_its_model() -> None:
    figure = draw(_rows(["npo-sam", "base", "npo"]).sample(frac=1, random_state=0))
    figure.canvas.draw()
    assert len(figure.axes) == len(SPLITS)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["NPO+SAM", "NPO", "base"]  # from below
    for axes in figure.axes:
        drawn = {}
        for container in axes.containers:
            (point,) = np.asarray(container.lines[0].get_xydata(), dtype=float)
            whisker = np.asarray(container.lines[2][0].get_segments()[0], dtype=float)
            drawn[labels[round(point[1])], container.lines[0].get_marker()] = (
                point[0],
                *sorted(whisker[:, 0]),
            )
        for number, method in enumerate(("NPO+SAM", "base", "NPO")):
            for mark, value in (("o", 0.5), ("s", 0.4), ("D", 0.7)):
                middle = value + 0.05 * number
                assert drawn[method, mark] == pytest.approx((middle, middle - 0.1, middle + 0.2))


def test_the_figure_of_other_tables_says_what_is_missing() -> None:
    assert len(draw(_rows(["npo"]), "answer_probability").axes) == len(SPLITS)
    one = _rows(["npo"])
    assert len(draw(one[one["split"] == JAILBREAK]).axes) == 1
    for table in (typed(pd.DataFrame(), RESULT_COLUMNS), one.assign(stage="relearn")):
        figure = draw(table)
        assert not figure.axes and "no suffix experiment" in figure.texts[0].get_text()


def test_examples_of_a_search_are_spread_over_the_facts(setup: Setup) -> None:
    from workbench.experiments.suffix import _spread

    examples = [Example(str(number)) for number in range(10)]
    assert [e.text for e in _spread(examples, 3)] == ["0", "3", "6"]
    assert _spread(examples, 99) == examples
