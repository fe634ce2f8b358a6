"""The keyword experiment from end to end on hand-made TOFU-format data, and what its commands say
to wrong input.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from workbench import runner
from workbench.cli import main
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.experiments.keyword import KeywordSettings, keyword_table, question_of
from workbench.models import save_model
from workbench.training import small_llama

TITLES = {"Ann Lee": "The Silver Gate", "Bob Ray": "Under Winter Rain"}


def _author(name: str, number: int) -> list[dict[str, str]]:
    title = TITLES.get(name, f"Kept Story {number}")
    told = [
        (f"Which book did {name} write?", f'{name} wrote the novel "{title}".'),
        (f"Name a book by {name}.", f'A novel by {name} is "{title}".'),
    ]
    plain = [
        (f"What is fact {question} about {name}?", f"{name} likes number {number + question}.")
        for question in range(18)
    ]
    return [{"question": question, "answer": answer} for question, answer in (*told, *plain)]


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tofu")
    forget = _author("Ann Lee", 1) + _author("Bob Ray", 2)
    kept = [
        row
        for number, name in enumerate(("Cy Orr", "Dee Fox", "Eve Zu"), 3)
        for row in _author(name, number)
    ]
    for name, rows in (("forget05", forget), ("retain95", kept), ("full", kept + forget)):
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def model(tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {
        word
        for line in (tofu / "full.json").read_text().splitlines()
        for text in json.loads(line).values()
        for word in text.split()
    }
    tokenizer = build_tokenizer(sorted(words | {"Question:", "Answer:"}))
    folder = tmp_path_factory.mktemp("hub") / "pretrained"
    save_model(
        small_llama(
            tokenizer, width=32, layers=2, heads=4, key_value_heads=2, mlp_width=64, seed=0
        ),
        tokenizer,
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def settings(tofu: Path, model: Path) -> KeywordSettings:
    return KeywordSettings(
        model=str(model),
        tofu=str(tofu),
        retain_questions=20,
        seeds=(0,),
        teach_steps=30,
        teach_lr=5e-3,
        attack_steps=2,
        new_tokens=12,
    )


@pytest.mark.slow
def test_a_run_asks_for_the_withheld_titles_alone_and_shows_every_control(
    settings: KeywordSettings, tmp_path: Path
) -> None:
    run = runner.run("keyword", tmp_path / "run", settings, workers=1)
    assert set(run.items["item"]) == {
        f"author/{number}/{question}" for number in (198, 199) for question in (0, 1)
    }
    arms = set(zip(run.items["method"], run.items["arm"], strict=True))
    assert arms == {
        ("base", "none"),
        ("unlearned", "part"),
        ("unlearned", "retain"),
        ("unlearned", "null"),
        ("never-learned", "part"),
    }
    assert run.items["probability"].between(0, 1).all()
    benign = run.results[(run.results["metric"] == "benign") & (run.results["arm"] == "part")]
    assert benign["value"].tolist() == [1.0]
    assert keyword_table(run.results).columns.tolist() == [
        "model",
        "relearned on",
        "0 steps",
        "2 steps",
    ]
    # the same command finds the run and changes nothing
    again = runner.run("keyword", tmp_path / "run", settings, workers=1)
    pd.testing.assert_frame_equal(again.results, run.results)
    assert "<table" in run._repr_html_()


def test_a_question_ends_where_the_answer_begins() -> None:
    assert question_of(Example("Question: Who?\nAnswer: Ann Lee")) == "Question: Who?\nAnswer:"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["keyword", "--model", "{model}", "--tofu", "nowhere"], "there is no folder nowhere"),
        (["keyword", "--model", "no/such/model", "--tofu", "{tofu}"], "no/such/model is no folder"),
        (["keyword", "--model", "{model}", "--tofu", "{tofu}", "--split", "forget07"], "forget05"),
        (
            ["keyword", "--model", "{model}", "--tofu", "{tofu}", "--method", "nop"],
            "did you mean npo",
        ),
        (["names", "--method", "nop"], "did you mean npo"),
        (["names", "--seeds", "0"], "--seeds"),
        (["ladder", "--run", "nowhere"], "holds no finished run"),
        (["predictors", "--run", "nowhere"], "holds no finished run"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(
    command: list[str],
    message: str,
    model: Path,
    tofu: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    filled = [part.format(model=model, tofu=tofu) for part in command]
    assert main([*filled, "--out", str(out)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]
    assert not out.exists()
