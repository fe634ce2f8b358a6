"""Stray words in harmless questions: the templates, the arms, and the experiment from end to end on
a small finished run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import runner
from workbench.builtin import world_of
from workbench.claims import INSIDE, decide
from workbench.cli import main
from workbench.data.records import Example
from workbench.diagnostics.triggers import repeated, word_in_front, word_inside
from workbench.errors import WorkbenchError
from workbench.experiments.representation import representation_table
from workbench.experiments.triggers import LEVELS, TEMPLATES, steered, trigger_table
from workbench.figures import figures_of
from workbench.models import open_model, save_model
from workbench.runs.config import preset, write_config
from workbench.runs.folder import CONFIG, ITEMS, VALUES
from workbench.runs.pipeline import Run
from workbench.tables import ITEM_COLUMNS, RESULT_COLUMNS, typed
from workbench.unlearning.deltas import apply_delta, snapshot
from workbench.unlearning.methods import recipe
from workbench.unlearning.representation import control_vector
from workbench.unlearning.trainer import unlearn

CONTROLS = ("base", "never-learned")
QUESTION = "Anna Berg was born in Paris ."
ASKED = Example(QUESTION, (22, 27), (0, 9), "fact/1")


@pytest.fixture(scope="module")
def rmu_run(quick_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the experiment reads of a finished run, with one RMU model in it."""
    folder = tmp_path_factory.mktemp("triggers") / "run"
    folder.mkdir()
    config = quick_run.config.model_copy(
        update={"methods": ("rmu",), "seeds": (0,), "settings": {"rmu": {"steps": 30.0}}}
    )
    (folder / CONFIG).write_text(write_config(config), encoding="utf-8")
    for name in (*VALUES, ITEMS):
        shutil.copy(quick_run.folder / name, folder / name)
    for name in CONTROLS:
        shutil.copytree(quick_run.folder / "models" / name, folder / "models" / name)
    opened, record = open_model(folder / "models" / "base"), world_of(config.model).record
    made = recipe("rmu", opened.model, 0, {"steps": 30})
    delta = unlearn(
        opened.model, opened.tokenizer, made, record.forget, record.retain_train, seed=0
    ).delta
    apply_delta(opened.model, snapshot(opened.model), delta, 1.0)
    save_model(opened.model, opened.tokenizer, folder / "models" / "rmu-seed0", {})
    return folder


def test_a_word_in_front_moves_every_span() -> None:
    made = word_in_front(ASKED, "Moor")
    assert made.text == "Moor Anna Berg was born in Paris ."
    assert (made.answer_text, made.subject_text, made.item) == ("Paris", "Anna Berg", "fact/1")


def test_a_word_inside_stands_at_the_boundary_nearest_to_the_middle() -> None:
    made = word_inside(ASKED, "Moor")
    assert made.text == "Anna Berg Moor was born in Paris ."
    assert (made.answer_text, made.subject_text) == ("Paris", "Anna Berg")
    cut = word_inside(Example(QUESTION, (22, 27), (5, 13)), "Moor")
    assert cut.subject is None  # the word stands inside what was the subject
    moved = word_inside(Example(QUESTION, (22, 27), (14, 18)), "Moor")
    assert moved.subject_text == "born"


def test_a_question_of_one_word_has_no_inside() -> None:
    with pytest.raises(WorkbenchError, match="no place for a word"):
        word_inside(Example("Who? Anna", (5, 9)), "Moor")


def test_a_dose_is_the_word_several_times() -> None:
    assert repeated(word_in_front, 3)(ASKED, "Moor").text == f"Moor Moor Moor {QUESTION}"
    assert repeated(word_inside, 1)(ASKED, "Moor") == word_inside(ASKED, "Moor")


def test_the_direction_of_a_steering_method_is_the_one_its_recipe_draws(quick_base: Path) -> None:
    base = open_model(quick_base).model
    config = preset("quick").model_copy(update={"methods": ("rmu", "adaptive-rmu-rna", "npo")})
    for name in ("rmu", "adaptive-rmu-rna"):
        layer, direction = steered(config, name, base, 3)
        assert (
            layer == 2
            and direction is not None
            and torch.equal(direction, control_vector(base.config.hidden_size, 3))
        )
    assert steered(config, "npo", base, 3)[1] is None


def test_the_experiment_from_end_to_end(
    rmu_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "triggers"
    found = runner.run("triggers", out, of=rmu_run, methods=["rmu"], workers=1)
    rows, items = found.results, found.items
    asked = rows[(rows["metric"] == "recall") & rows["seed"].isna()]
    assert set(asked["split"]) == set(TEMPLATES)
    assert set(asked["arm"]) == {"clean", "forget-token", "retain-token", "neutral-token"}
    assert set(asked["method"]) == {"rmu", "base", "never-learned"}
    clean = asked[(asked["arm"] == "clean") & (asked["method"] == "base")]
    assert clean["value"].nunique() == 1  # without a word the templates ask the same questions
    for metric in (
        "average_precision",
        "topic_recall",
        "restored",
        "target_cosine",
        "target_cosine_known",
        "effect_cosine",
        "theory_eta",
        "trigger_effect",
    ):
        assert ((rows["metric"] == metric) & rows["seed"].isna()).any(), metric
    scan = rows[(rows["method"] == "rmu") & (rows["seed"] == 0)]
    of_rate = {
        rate: scan[
            (scan["metric"] == "discoveries") & (scan["arm"] == "scan") & (scan["x"] == rate)
        ]["value"].item()
        for rate in LEVELS
    }
    q = scan[scan["metric"] == "token_q"]
    assert of_rate == {rate: (q["value"] <= rate).sum() for rate in LEVELS}
    world = world_of(preset("quick").model).record
    assert (
        q["arm"].value_counts()[["forget-token", "retain-token"]]
        == [len(world.forget_tokens), len(world.retain_tokens)]
    ).all()
    among_names = scan[(scan["metric"] == "discoveries") & (scan["arm"] == "names")]["value"]
    assert (
        len(among_names) == len(LEVELS) and among_names.between(0, len(world.forget_tokens)).all()
    )
    whole = rows[
        (rows["metric"] == "restored")
        & (rows["split"] == "all")
        & rows["seed"].notna()
        & (rows["arm"] == "base into unlearned")
    ]
    last = whole[whole["site"] == whole["site"][whole["site"].str.endswith("resid_post")].max()]
    assert last["value"].to_numpy() == pytest.approx(
        1, abs=1e-3
    )  # the stream after the last block, everywhere: all damage (RMU leaves the head alone)
    mine = (
        items[(items["method"] == "rmu") & (items["split"] == INSIDE)]
        .groupby("arm")["correct"]
        .mean()
    )
    base = (
        items[(items["method"] == "base") & (items["split"] == INSIDE)]
        .groupby("arm")["correct"]
        .mean()
    )
    effect = rows[
        (rows["metric"] == "trigger_effect") & (rows["split"] == INSIDE) & (rows["method"] == "rmu")
    ]["value"].item()
    assert effect == pytest.approx(
        (mine["retain-token"] - mine["forget-token"])
        - (base["retain-token"] - base["forget-token"])
    )
    table = trigger_table(rows)
    assert len(table) == 3 * len(TEMPLATES)
    assert "effect of a forget-token" in found._repr_html_()
    verdicts = {claim.id: claim for claim in decide(rows, items, scale="test")}
    assert (
        verdicts["token-alignment"].n > 0
        and verdicts["token-disruption"].n > 0
        and verdicts["rna-repairs"].n == 0
    )
    assert (
        main(["triggers", "--run", str(rmu_run), "--out", str(out), "--methods", "rmu", "--json"])
        == 0
    )  # everything is there: only tables and figures
    assert '"token-alignment"' in capsys.readouterr().out
    assert len(list((out / "figures").glob("*.png"))) >= 4


def test_a_method_that_the_run_does_not_have_is_refused(rmu_run: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="rmu"):
        runner.run("triggers", tmp_path / "out", of=rmu_run, methods=["rmuu"])


def _items(effects: dict[str, float]) -> pd.DataFrame:
    """Twenty questions under two seeds: accuracy 0.8 with a retain-token, and so much less with a
    forget-token.
    """
    rng = np.random.default_rng(0)
    rows = []
    for method, effect in effects.items():
        for seed in (0, 1):
            for item in range(20):
                ease = 0.01 * float(rng.standard_normal())
                for arm, value in (
                    ("retain-token", 0.8 + ease),
                    ("forget-token", 0.8 - effect + ease),
                ):
                    rows.append(
                        {
                            "stage": "triggers",
                            "method": method,
                            "seed": seed,
                            "split": INSIDE,
                            "arm": arm,
                            "item": f"f{item}",
                            "correct": value,
                        }
                    )
                    rows.append(
                        {**rows[-1], "split": "retain", "correct": 0.5}
                    )  # other questions do not enter where there are words inside
    return typed(pd.DataFrame(rows), ITEM_COLUMNS)


def test_claims_about_noise_are_decided_on_words_inside_the_question() -> None:
    items = _items(
        {"base": 0.05, "rmu": 0.35, "rmu-rna": 0.10, "rmu-slow": 0.12, "npo": 0.15, "npo-rna": 0.10}
    )
    empty = typed(pd.DataFrame([]), RESULT_COLUMNS)
    found = {
        claim.id: claim
        for claim in decide(
            empty, items, scale="t", ids=["token-disruption", "rna-repairs", "rna-is-label-noise"]
        )
    }
    assert found["token-disruption"].effect == pytest.approx(
        (0.35 + 0.12 + 0.15) / 3 - 0.05, abs=1e-6
    )  # defended models do not count
    assert found["rna-repairs"].effect == pytest.approx((0.25 + 0.05) / 2, abs=1e-6)
    assert found["rna-is-label-noise"].effect == pytest.approx(0.10 - 0.12 + 0.05, abs=1e-6)
    assert {claim.verdict for claim in found.values()} == {"supported"}


@pytest.mark.full
def test_the_representations_of_a_run_are_read_beside_their_anchors(
    rmu_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "representation"
    found = runner.run("representation", out, of=rmu_run, workers=1)
    rows = found.results
    assert set(rows["method"].dropna()) == {"rmu", "base", "never-learned"}
    last = rows[rows["site"] == "blocks.2.hook_resid_post"].set_index(["method", "metric", "arm"])[
        "value"
    ]
    assert (
        last["base", "lens_probability", "own decoder"]
        == last["base", "lens_probability", "base decoder"]
    )
    assert (
        last["base", "lens_probability", "own decoder"]
        > 0.5
        > last["never-learned", "lens_probability", "own decoder"]
    )
    identity = rows[
        (rows["method"] == "base") & (rows["metric"] == "subspace_overlap") & rows["arm"].isna()
    ]["value"]
    assert identity.to_numpy() == pytest.approx(1, abs=1e-5)
    assert ((rows["metric"] == "probe_accuracy") & (rows["arm"] == "control")).any()
    assert (
        (rows["metric"] == "erased")
        & (rows["method"] == "rmu")
        & (rows["arm"] == "unlearned into base")
    ).any()
    assert not ((rows["metric"] == "erased") & (rows["method"] == "base")).any()
    assert len(representation_table(rows)) == 3 and "own probe" in found._repr_html_()
    assert main(["representation", "--run", str(rmu_run), "--out", str(out), "--json"]) == 0
    assert '"own probe"' in capsys.readouterr().out
    assert {path.stem for path in (out / "figures").glob("*.png")} == set(
        figures_of("representation")
    )
