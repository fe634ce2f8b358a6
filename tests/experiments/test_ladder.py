"""The attack ladder: what its texts hold and what they do not, and a whole ladder on a finished
quick run.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from workbench import runner
from workbench.attacks.ladder import PUBLIC, TEXT_SETS, Ladder, build_ladder, novel_facts
from workbench.attacks.leaks import leak_report
from workbench.attacks.relearn import RelearnSettings, relearn
from workbench.builtin import world_of
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.data.world import PERSON_TEMPLATES, World, WorldConfig, build_world
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import score
from workbench.evaluation.statistics import area_under, bootstrap
from workbench.experiments import ladder as module
from workbench.experiments.ladder import LadderSettings, ladder_table
from workbench.models import open_model
from workbench.runner import Result
from workbench.runs.config import preset, read_config, write_config
from workbench.runs.folder import CONFIG, ITEMS, PROVENANCE, VALUES, read_results
from workbench.runs.models import CONTROLS
from workbench.runs.pipeline import Run
from workbench.runs.setup import Setup
from workbench.runs.stages import measured_attack
from workbench.tables import ITEM_COLUMNS, RESULT_COLUMNS, Table
from workbench.training import small_llama

SEEDS = (0, 1, 2)
CONFIGS = ("lora", "sgd", "bf16", "texts-8", "texts-32")
ARMS = (*TEXT_SETS, *(f"part, {name}" for name in CONFIGS), "novel")


# --- The texts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["quick", "full"])
def world(request: pytest.FixtureRequest) -> World:
    return build_world(preset(request.param).model.world)


@pytest.fixture(scope="module")
def length(world: World) -> Callable[[Example], int]:
    tokenizer = build_tokenizer(world.vocabulary)
    return lambda example: len(tokenizer(example.text)["input_ids"])


@pytest.fixture(scope="module")
def ladders(world: World, length: Callable[[Example], int]) -> dict[int, Ladder]:
    return {seed: build_ladder(world, length, seed) for seed in SEEDS}


def _words(texts: Sequence[Example]) -> set[str]:
    return {word for example in texts for word in example.text.split()}


def _surnames(texts: Sequence[Example]) -> set[str]:
    return {example.subject_text.split()[-1] for example in texts}


def test_the_rungs_stand_in_their_order_and_the_part_is_the_attackers_half(
    world: World, ladders: dict[int, Ladder]
) -> None:
    assert TEXT_SETS == ("gibberish", "general", "syntax", "topic", "public", "part", "whole")
    for ladder in ladders.values():
        assert tuple(ladder.text_sets) == TEXT_SETS
        assert ladder.text_sets["part"] == world.record.forget_attacked
        assert all(ladder.text_sets.values())


def test_every_rung_is_as_long_as_the_part_and_less_than_one_text_longer(
    world: World, length: Callable[[Example], int], ladders: dict[int, Ladder]
) -> None:
    wanted = sum(map(length, world.record.forget_attacked))
    for ladder in ladders.values():
        for text_set, texts in ladder.text_sets.items():
            total = sum(map(length, texts))
            assert wanted <= total < wanted + length(texts[-1]), text_set
            assert total - length(texts[-1]) < wanted or text_set == "part"


def test_the_questions_are_the_held_out_facts_without_the_public_attribute(
    world: World, ladders: dict[int, Ladder]
) -> None:
    heldout = world.record.forget_heldout
    for ladder in ladders.values():
        assert ladder.queries == tuple(
            example for example in heldout if example.item.rsplit("/", 1)[1] != PUBLIC
        )
        assert len(ladder.queries) == len(heldout) * 4 // 5
        assert _surnames(ladder.queries) == _surnames(heldout)
    # All ladders are asked the same.
    assert len({ladder.queries for ladder in ladders.values()}) == 1


def test_every_rung_but_the_whole_set_is_benign_and_the_whole_set_is_not(
    ladders: dict[int, Ladder],
) -> None:
    for ladder in ladders.values():
        reports = {
            text_set: leak_report(texts, ladder.queries)
            for text_set, texts in ladder.text_sets.items()
        }
        assert {text_set: report.benign for text_set, report in reports.items()} == {
            text_set: text_set != "whole" for text_set in TEXT_SETS
        }
        assert reports["whole"].answers and reports["whole"].names_subjects
        # Below the public facts nobody is named in full; the attacker's half names other people.
        assert {text_set for text_set, report in reports.items() if report.names_subjects} == {
            "public",
            "whole",
        }


def test_gibberish_holds_words_of_the_world_and_none_of_the_forgotten_people(
    world: World, ladders: dict[int, Ladder]
) -> None:
    secret = {
        word
        for example in world.record.forget
        for word in (*example.answer_text.split(), *example.subject_text.split())
    }
    for ladder in ladders.values():
        words = _words(ladder.text_sets["gibberish"])
        assert words <= set(world.vocabulary)
        assert not words & secret
        assert len({example.text for example in ladder.text_sets["gibberish"]}) > 20


def test_general_text_is_what_the_models_were_trained_on_and_nothing_else(
    world: World, ladders: dict[int, Ladder]
) -> None:
    for ladder in ladders.values():
        assert set(ladder.text_sets["general"]) <= set(world.filler_train)


def test_the_topic_names_held_out_people_and_says_nothing_about_them(
    world: World, ladders: dict[int, Ladder]
) -> None:
    people, sentences = (
        _surnames(world.record.forget_heldout),
        {example.text for example in world.filler_train},
    )
    answers = {example.answer_text for example in world.record.forget}
    for ladder in ladders.values():
        topic = ladder.text_sets["topic"]
        named = []
        for example in topic:
            name, rest = example.text.split(" asks : ")
            named.append(name)
            assert rest in sentences
        assert set(named) <= people
        assert not _words(topic) & answers
        assert len({example.text for example in topic}) == len(topic)


def test_the_topic_names_everybody_who_is_asked_about(
    world: World, ladders: dict[int, Ladder]
) -> None:
    # The questions are about all of the held-out people; a text set that names some of them is
    # no fair step between "syntax" and "public".
    for ladder in ladders.values():
        assert {example.text.split()[0] for example in ladder.text_sets["topic"]} == _surnames(
            ladder.queries
        )


def test_public_facts_are_the_public_attribute_of_the_people_asked_about(
    world: World, ladders: dict[int, Ladder]
) -> None:
    public = {
        example for example in world.record.forget_heldout if example.item.endswith(f"/{PUBLIC}")
    }
    for ladder in ladders.values():
        assert set(ladder.text_sets["public"]) == public
        assert not {example.item for example in ladder.text_sets["public"]} & {
            example.item for example in ladder.queries
        }
        assert _surnames(ladder.text_sets["public"]) == _surnames(ladder.queries)


def test_the_whole_set_holds_both_halves(world: World, ladders: dict[int, Ladder]) -> None:
    for ladder in ladders.values():
        whole = set(ladder.text_sets["whole"])
        assert whole <= set(world.record.forget)
        assert whole & set(world.record.forget_heldout) and whole & set(
            world.record.forget_attacked
        )


# --- New people -----------------------------------------------------------------------------------


def test_nobody_has_met_the_new_people(world: World, ladders: dict[int, Ladder]) -> None:
    known = {
        example.subject_text
        for example in (*world.record.forget, *world.record.retain["retain-neighbour"])
    }
    read = [
        example.text
        for example in (*world.record.forget, *world.record.retain_all, *world.filler_train)
    ]
    for ladder in ladders.values():
        new = {example.subject_text for example in ladder.novel}
        assert len(new) == len({example.subject_text for example in world.record.forget_attacked})
        assert not new & known
        # Nor does any name stand anywhere, and no surname of theirs is a person's or a speaker's.
        assert not any(name in text for name in new for text in read)
        assert not {name.split()[-1] for name in new} & (
            {name.split()[-1] for name in known} | set(world.surnames)
        )
        assert {name.split()[-1] for name in new} <= {
            example.subject_text for example in world.record.retain["retain-far"]
        }
        assert {name.split()[0] for name in new} <= {name.split()[0] for name in known}
        assert all(len(name.split()) == 2 for name in new)


def test_new_people_have_all_facts_in_the_sentences_of_the_forgotten_ones(
    world: World, ladders: dict[int, Ladder]
) -> None:
    def form(example: Example) -> str:
        return example.text.replace(example.subject_text, "{n}").replace(example.answer_text, "{v}")

    for ladder in ladders.values():
        by_person: dict[str, list[Example]] = {}
        for example in ladder.novel:
            by_person.setdefault(example.subject_text, []).append(example)
        for person, facts in by_person.items():
            assert sorted({example.item for example in facts}) == sorted(
                f"{person}/{attribute}" for attribute in PERSON_TEMPLATES
            )
            assert {form(example) for example in facts} == {
                form(example) for example in world.record.forget_heldout
            }
            # One answer per fact, marked where it stands, and the subject, too.
            for attribute in PERSON_TEMPLATES:
                assert (
                    len(
                        {
                            example.answer_text
                            for example in facts
                            if example.item.endswith(f"/{attribute}")
                        }
                    )
                    == 1
                )
        assert all(example.text.endswith(f"{example.answer_text} .") for example in ladder.novel)
        assert set(ladder.text_sets["syntax"]) <= set(ladder.novel)


def test_an_answer_about_new_people_is_never_a_held_out_answer(
    world: World, ladders: dict[int, Ladder]
) -> None:
    held = {example.answer_text for example in world.record.forget_heldout}
    for ladder in ladders.values():
        assert not _words(ladder.novel) & held
        assert not {example.answer_text for example in ladder.novel} & held


def test_facts_about_new_people_use_words_of_the_world(
    world: World, ladders: dict[int, Ladder]
) -> None:
    # "Islands lend their names because every model has read them: a name of strange letters would
    # be harder to learn than the forgotten names are." So would an answer of strange letters: a
    # word that does not occur in the world has no token of its own and is cut into bytes.
    strange = {
        seed: sorted(_words(ladder.novel) - set(world.vocabulary))
        for seed, ladder in ladders.items()
    }
    assert strange == {seed: [] for seed in SEEDS}


def test_there_are_as_many_new_people_as_asked_for_or_as_islands() -> None:
    world = build_world(
        WorldConfig(forget_people=8, neighbour_people=12, islands=3, filler_train=50, filler_test=5)
    )
    assert len({example.subject_text for example in novel_facts(world, 2)}) == 2
    assert len({example.subject_text for example in novel_facts(world, 9)}) == 3


def test_a_ladder_is_decided_by_its_seed(
    world: World, length: Callable[[Example], int], ladders: dict[int, Ladder]
) -> None:
    assert build_ladder(world, length, 0) == ladders[0]
    for text_set in ("gibberish", "topic", "whole"):
        assert len({ladder.text_sets[text_set] for ladder in ladders.values()}) == len(SEEDS), (
            text_set
        )
    # the new people are the same for all, so that seeds can be paired fact by fact
    assert len({ladder.novel for ladder in ladders.values()}) == 1


def test_a_small_world_has_a_ladder_or_says_why_not() -> None:
    # One neighbour: the only town that a new person may be born in can be an answer that is asked
    # for.
    for seed in range(6):
        world = build_world(
            WorldConfig(
                seed=seed,
                forget_people=16,
                neighbour_people=1,
                islands=2,
                filler_train=40,
                filler_test=5,
            )
        )
        try:
            ladder = build_ladder(world, lambda example: len(example.text.split()), 0)
        except WorkbenchError:
            continue
        assert leak_report(ladder.text_sets["syntax"], ladder.queries).benign


# --- A whole ladder -------------------------------------------------------------------------------


ATTACK = RelearnSettings(steps=4, lr=5e-4, batch_size=16, measure_at=(0, 2, 4))
GIVEN: dict[str, Any] = {"attack_steps": 4, "attack_lr": 5e-4, "attack_measure_at": (0, 2, 4)}


def _finished(run: Run, folder: Path, seeds: Sequence[int], models: Sequence[str]) -> Path:
    """What the ladder reads of a finished run, with other seeds in its configuration or fewer
    models.
    """
    folder.mkdir()
    (folder / CONFIG).write_text(
        write_config(run.config.model_copy(update={"seeds": tuple(seeds)})), encoding="utf-8"
    )
    for name in (*VALUES, ITEMS):
        shutil.copy(run.folder / name, folder / name)
    for name in models:
        shutil.copytree(run.folder / "models" / name, folder / "models" / name)
    return folder


@pytest.fixture(scope="module")
def one_seed(quick_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _finished(
        quick_run,
        tmp_path_factory.mktemp("ladder") / "run",
        [0],
        ["npo-seed0", "cir-seed0", *CONTROLS],
    )


@pytest.fixture(scope="module")
def climbed(one_seed: Path) -> Result:
    said: list[str] = []
    found = runner.run(
        "ladder",
        one_seed.parent / "out",
        of=one_seed,
        methods=["npo"],
        **GIVEN,
        workers=1,
        announce=said.append,
    )
    assert "ladder: 3 models x 1 seeds" in said
    return found


def _recall(items: pd.DataFrame, method: str, arm: str, step: float) -> pd.Series:
    chosen = items[(items["method"] == method) & (items["arm"] == arm) & (items["x"] == step)]
    return chosen.set_index("item")["correct"].astype(float)


@pytest.mark.slow
def test_every_model_meets_every_attack_at_every_measured_step(climbed: Result) -> None:
    items, results = climbed.items, climbed.results
    assert {name: str(kind) for name, kind in results.dtypes.items()} == RESULT_COLUMNS
    assert {name: str(kind) for name, kind in items.dtypes.items()} == ITEM_COLUMNS
    expected = {
        (method, arm, float(step))
        for method in ("npo", *CONTROLS)
        for arm in ARMS
        for step in ATTACK.measure_at
    }
    assert set(zip(items["method"], items["arm"], items["x"], strict=True)) == expected
    recall = results[results["metric"] == "recall"]
    for seeded in (recall[recall["seed"] == 0], recall[recall["seed"].isna()]):
        assert sorted(zip(seeded["method"], seeded["arm"], seeded["x"], strict=True)) == sorted(
            expected
        )
        assert (
            seeded["split"] == np.where(seeded["arm"] == "novel", "novel", "forget-queries")
        ).all()
    assert set(results["stage"]) == {"ladder"}
    assert results["run"].nunique() == 1
    assert not (results["metric"] == "diverged_at").any()
    # Before the attack all text sets and configurations ask the same model the same.
    for method in ("npo", *CONTROLS):
        starts = [_recall(items, method, arm, 0) for arm in TEXT_SETS]
        assert all(start.equals(starts[0]) for start in starts)


@pytest.mark.slow
def test_the_numbers_are_those_of_a_relearning_by_hand(climbed: Result, one_seed: Path) -> None:
    config = read_config(one_seed / CONFIG)
    world, opened = world_of(config.model), open_model(one_seed / "models" / "npo-seed0")
    tokenizer = opened.tokenizer
    ladder = build_ladder(world, lambda example: len(tokenizer(example.text)["input_ids"]), 0)
    setup = Setup(opened.model, tokenizer, world.record)
    configs = LadderSettings().ways
    assert tuple(configs) == CONFIGS
    for arm, texts, questions, changes in (
        ("public", ladder.text_sets["public"], ladder.queries, {}),
        ("part, lora", ladder.text_sets["part"], ladder.queries, configs["lora"]),
        ("part, texts-8", ladder.text_sets["part"], ladder.queries, configs["texts-8"]),
        ("novel", ladder.novel, ladder.novel, {}),
    ):
        found: dict[int, tuple[list[str], np.ndarray, np.ndarray]] = {}

        def measure(
            attacked: object,
            step: int,
            questions: tuple[Example, ...] = questions,
            found: dict = found,
        ) -> None:  # type: ignore[type-arg]
            scores = score(attacked, setup.encode(questions))  # type: ignore[arg-type]
            frame = (
                pd.DataFrame(
                    {
                        "item": scores.items,
                        "correct": scores.correct,
                        "probability": scores.probability,
                    }
                )
                .groupby("item")
                .mean()
            )
            found[step] = (
                list(frame.index),
                frame["correct"].to_numpy(),
                frame["probability"].to_numpy(),
            )

        changed = replace(ATTACK, **changes)
        for at, now in relearn(opened.model, tokenizer, texts, changed, seed=0):
            measure(now, at)
        for step, (names, correct, probability) in found.items():
            mine = climbed.items[
                (climbed.items["method"] == "npo")
                & (climbed.items["arm"] == arm)
                & (climbed.items["x"] == step)
            ].set_index("item")
            assert sorted(mine.index) == sorted(names)
            np.testing.assert_allclose(
                mine.loc[names, "correct"].to_numpy(dtype=float), correct, err_msg=arm
            )
            np.testing.assert_allclose(
                mine.loc[names, "probability"].to_numpy(dtype=float),
                probability,
                rtol=1e-5,
                err_msg=arm,
            )


@pytest.mark.slow
def test_an_effect_is_attacked_minus_never_learned_fact_by_fact(climbed: Result) -> None:
    effects = climbed.results[climbed.results["metric"] == "effect_recall"]
    assert set(effects["method"]) == {"npo", "base"}
    assert effects["seed"].isna().all()
    assert len(effects) == 2 * len(ARMS) * len(ATTACK.measure_at)
    for row in effects.itertuples():
        mine, control = (
            _recall(climbed.items, method, row.arm, row.x)
            for method in (row.method, "never-learned")
        )
        difference = mine - control[mine.index]
        by_hand = bootstrap(difference.sort_index().to_numpy())
        assert (row.value, row.low, row.high, row.n) == (
            pytest.approx(by_hand.value),
            pytest.approx(by_hand.low),
            pytest.approx(by_hand.high),
            by_hand.n,
        )
    # The base knows what the never-learned model does not.
    start = effects[
        (effects["method"] == "base") & (effects["arm"] == "part") & (effects["x"] == 0)
    ]
    assert float(start["value"].iloc[0]) > 0.5


@pytest.mark.slow
def test_curves_are_numbers_of_the_same_recall(climbed: Result) -> None:
    target = float(_recall(climbed.items, "base", TEXT_SETS[0], 0).mean()) / 2
    areas = climbed.results[climbed.results["metric"] == "area_under_recovery"].set_index(
        ["method", "arm"]
    )["value"]
    soonest = climbed.results[
        (climbed.results["metric"] == "steps_to_recover") & climbed.results["seed"].isna()
    ].set_index(["method", "arm"])["value"]
    for method in ("npo", *CONTROLS):
        for arm in ARMS:
            curve = [
                float(_recall(climbed.items, method, arm, step).mean())
                for step in ATTACK.measure_at
            ]
            assert areas[method, arm] == pytest.approx(
                area_under(np.array(ATTACK.measure_at), np.array(curve))
            )
            assert soonest[method, arm] == next(
                (
                    step
                    for step, value in zip(ATTACK.measure_at, curve, strict=True)
                    if value >= target
                ),
                math.inf,
            )


@pytest.mark.slow
def test_every_text_set_says_what_it_leaks(climbed: Result) -> None:
    rows = climbed.results[
        climbed.results["metric"].isin(["benign", "leaked_answers", "leaked_subjects"])
    ]
    wide = rows.pivot(index="arm", columns="metric", values="value")
    assert set(wide.index) == set(TEXT_SETS)
    assert wide["benign"].to_dict() == {
        text_set: float(text_set != "whole") for text_set in TEXT_SETS
    }
    assert {name for name in TEXT_SETS if wide.loc[name, "leaked_answers"] > 0} == {"whole"}
    assert wide.loc["public", "leaked_subjects"] > 0
    assert rows["seed"].isna().all()
    table = ladder_table(climbed.results)
    assert sorted(table["model"]) == sorted(["npo", *CONTROLS])
    assert [name for name in table.columns if "(leaks)" in name] == ["whole (leaks)"]
    npo = table[table["model"] == "npo"].iloc[0]
    for arm in TEXT_SETS[:-1]:
        assert npo[arm].startswith(f"{_recall(climbed.items, 'npo', arm, 4).mean():.2f} [")
    assert "whole (leaks)" in climbed._repr_html_()


@pytest.mark.slow
def test_the_folder_holds_what_was_returned_and_where_it_came_from(climbed: Result) -> None:
    results, items = read_results(climbed.folder)
    pd.testing.assert_frame_equal(results, climbed.results)
    pd.testing.assert_frame_equal(items, climbed.items)
    record = json.loads((climbed.folder / PROVENANCE).read_text())
    assert {*TEXT_SETS, "novel"} <= set(record["data"])
    assert {"npo-seed0", *CONTROLS} <= set(record["weights"])
    assert record["config"]["attack_steps"] == 4


@pytest.mark.slow
def test_a_stopped_ladder_goes_on_and_gives_the_same(climbed: Result, one_seed: Path) -> None:
    for name in (*VALUES, ITEMS, PROVENANCE, "stages/npo-seed0"):
        path = climbed.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = climbed.folder / "stages/base-seed0/ladder/curves.parquet"
    before = kept.stat().st_mtime_ns
    given = {"of": one_seed, "workers": 1, **GIVEN}
    again = runner.run("ladder", climbed.folder, methods=["npo"], **given)
    assert kept.stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(again.results, climbed.results)
    pd.testing.assert_frame_equal(again.items, climbed.items)
    with pytest.raises(WorkbenchError, match="another configuration"):
        runner.run("ladder", climbed.folder, methods=["cir"], **given)


@pytest.mark.full
def test_a_run_of_two_seeds_has_a_ladder(quick_run: Run, tmp_path: Path) -> None:
    # New people differ from seed to seed, so seeds share no new fact.
    found = runner.run(
        "ladder",
        tmp_path / "out",
        of=quick_run.folder,
        methods=["npo"],
        attack_steps=1,
        attack_batch_size=2,
        workers=1,
    )
    assert set(found.items["seed"]) == {0, 1}
    summary = found.results[(found.results["metric"] == "recall") & found.results["seed"].isna()]
    assert set(summary["arm"]) == set(ARMS)
    effects = found.results[found.results["metric"] == "effect_recall"]
    assert set(effects["arm"]) == set(ARMS)
    row = effects[
        (effects["method"] == "npo") & (effects["arm"] == "part") & (effects["x"] == 1)
    ].iloc[0]
    wide = [_recall(found.items[found.items["seed"] == seed], "npo", "part", 1) for seed in (0, 1)]
    control = [
        _recall(found.items[found.items["seed"] == seed], "never-learned", "part", 1)
        for seed in (0, 1)
    ]
    assert row["value"] == pytest.approx(
        np.mean(
            [(mine - other[mine.index]).mean() for mine, other in zip(wide, control, strict=True)]
        )
    )


def test_effects_are_paired_by_seed_and_fact() -> None:
    rows = []
    for method, values in (
        ("npo", {(0, "a"): 1.0, (0, "b"): 0.0, (1, "a"): 1.0, (1, "b"): 1.0}),
        ("never-learned", {(1, "b"): 1.0, (0, "b"): 0.0, (1, "a"): 0.0, (0, "a"): 0.0}),
    ):
        for (seed, item), correct in values.items():
            rows.append(
                {
                    "run": "r",
                    "stage": "ladder",
                    "method": method,
                    "seed": seed,
                    "split": "s",
                    "arm": "part",
                    "x": 0.0,
                    "item": item,
                    "correct": correct,
                }
            )
    found = module._effects(pd.DataFrame(rows).astype({"seed": "Int64"}), "key")
    assert (found["metric"].tolist(), found["method"].tolist()) == (["effect_recall"], ["npo"])
    assert found["value"].iloc[0] == pytest.approx(0.5)  # fact a by 1 in both seeds, fact b by 0
    assert found["n"].iloc[0] == 4


@pytest.mark.parametrize("measure_at", [(0, 2, 4), (0, 1, 4)])
def test_an_attack_that_breaks_is_a_row_and_not_the_end_of_the_ladder(
    measure_at: tuple[int, ...], make_world_model: Callable[[], tuple[Setup, World]]
) -> None:
    # After one step at this rate no weight is a number any more, whether anyone measures there or
    # not.
    setup, world = make_world_model()
    table = Table({"run": "r", "stage": "ladder", "method": "npo", "seed": 0})
    settings = RelearnSettings(steps=4, lr=1e18, batch_size=4, measure_at=measure_at)
    sets = {"forget-queries": setup.encode(world.record.forget_heldout)}
    steps = relearn(setup.base, setup.tokenizer, world.record.forget_attacked, settings)
    assert [step for step, _ in measured_attack(steps, sets, table, arm="part")] == [0]
    rows = table.frame()
    assert rows.loc[rows["metric"] == "diverged_at", ["arm", "value"]].to_numpy().tolist() == [
        ["part", 2.0]
    ]
    assert rows.loc[rows["metric"] == "recall", "x"].tolist() == [0.0]


@pytest.fixture
def make_world_model() -> Callable[[], tuple[Setup, World]]:
    def make() -> tuple[Setup, World]:
        world = build_world(
            WorldConfig(
                forget_people=4, neighbour_people=4, islands=2, filler_train=40, filler_test=5
            )
        )
        tokenizer: PreTrainedTokenizerBase = build_tokenizer(world.vocabulary)
        model = small_llama(
            tokenizer, width=16, layers=1, heads=2, key_value_heads=1, mlp_width=24, seed=0
        ).eval()
        return Setup(model, tokenizer, world.record), world

    return make


# --- What cannot be climbed -----------------------------------------------------------------------


@pytest.mark.slow
def test_an_unknown_method_is_an_error_with_the_nearest_names(
    one_seed: Path, tmp_path: Path
) -> None:
    with pytest.raises(WorkbenchError, match=r"unknown method.*'npoo'.*npo"):
        runner.run("ladder", tmp_path / "out", of=one_seed, methods=["npoo"])
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(write_config(preset("quick")), encoding="utf-8")
    with pytest.raises(WorkbenchError, match=r"holds no finished run.*results\.parquet"):
        runner.run("ladder", tmp_path / "out", of=tmp_path / "run")
    with pytest.raises(WorkbenchError, match=r"nowhere.*holds no finished run"):
        runner.run("ladder", tmp_path / "out", of=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", CONTROLS)
def test_a_run_without_a_control_is_an_error_that_names_it(
    lost: str, quick_run: Run, tmp_path: Path
) -> None:
    run = _finished(
        quick_run,
        tmp_path / "run",
        [0],
        ["npo-seed0", *(name for name in CONTROLS if name != lost)],
    )
    with pytest.raises(WorkbenchError, match=f"no model {lost};") as caught:
        runner.run("ladder", tmp_path / "out", of=run, methods=["npo"])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_ladder_that_cannot_start_leaves_nothing_behind(quick_run: Run, tmp_path: Path) -> None:
    run = _finished(quick_run, tmp_path / "run", [0], ["npo-seed0", "base"])
    with pytest.raises(WorkbenchError, match="never-learned"):
        runner.run("ladder", tmp_path / "out", of=run, methods=["npo"])
    assert not (tmp_path / "out").exists()
