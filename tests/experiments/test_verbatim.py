"""Passages and names as the sets of benign relearning, the verbatim experiment from end to end on a
made-up book, and what its command says to wrong input.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from workbench import runner
from workbench.attacks.leaks import leak_report
from workbench.cli import main
from workbench.data.benchmarks import Tofu
from workbench.data.keywords import character_names, keyword_split
from workbench.data.passages import PassageSplit, cut, passage_split, running, runs_of
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.experiments.keyword import KeywordSettings, withheld_words
from workbench.experiments.verbatim import (
    VERBATIM_MEASURES,
    VerbatimSettings,
    continuations,
    longest_run,
    recalls_more,
    verbatim_table,
)
from workbench.figures.verbatim import verbatim as draw
from workbench.models import save_model
from workbench.runs.settings import validated
from workbench.tables import RESULT_COLUMNS, typed
from workbench.training import small_llama

VOCABULARY = tuple(
    f"{first}{second}"
    for first in ("ba", "de", "fi", "go", "lu", "mo")
    for second in ("nar", "pil", "sto", "tev", "rum", "wek", "zon", "hab")
)
WORDS, PASSAGES = 12, 18


def _book(passages: int = PASSAGES, seed: int = 0) -> str:
    """Words drawn at random: runs of five words that occur twice are as good as impossible."""
    rng = random.Random(seed)
    return " ".join(rng.choice(VOCABULARY) for _ in range(passages * WORDS))


# --- Passages ---


def test_passages_follow_one_another_and_their_second_half_is_the_answer() -> None:
    passages = cut(
        "One  two three\nfour five six seven eight, nine ten. Eleven twelve 13 14 15 16 17 18 19 "
        "20 21",
        10,
    )
    assert [passage.text for passage in passages] == [
        "One two three four five six seven eight, nine ten.",
        "Eleven twelve 13 14 15 16 17 18 19 20",
    ]
    assert (passages[0].prompt, passages[0].answer_text) == (
        "One two three four five ",
        "six seven eight, nine ten.",
    )
    assert [passage.item for passage in passages] == ["passage/0", "passage/1"]


def test_an_odd_passage_has_the_longer_half_behind() -> None:
    (passage,) = cut(" ".join(map(str, range(11))), 11)
    assert passage.prompt.split() == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("a b c", 10, "3 words, fewer than one passage of 10"),
        ("a " * 50, 9, "it needs at least 10"),
        ("", 10, "0 words"),
    ],
)
def test_a_text_that_gives_no_passage_is_an_error(text: str, length: int, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        cut(text, length)


def test_runs_are_counted_in_continuations_or_in_whole_passages() -> None:
    (passage,) = cut("a b c d e f G, h' I j k l", 12)
    assert runs_of([passage]) == {("g", "h", "i", "j", "k"), ("h", "i", "j", "k", "l")}
    assert len(runs_of([passage], whole=True)) == 8


def test_a_split_takes_one_third_for_every_part_and_asks_for_every_second_passage() -> None:
    passages = cut(_book(), WORDS)
    split = passage_split(passages, forget=5, retain=4, unread=6)
    assert split.queried == passages[0:5:2]
    assert split.attacker == passages[1:5:2]
    assert split.retain == passages[6:10]
    assert split.unread == passages[12:18]
    assert split.dropped == ()
    assert {passage.item for passage in split.forget} == {passage.item for passage in passages[:5]}
    for texts in (split.attacker, split.retain, split.unread):
        assert leak_report(
            texts, split.queried
        ).benign  # the guard's own code agrees with the rule of the split


def test_passages_that_repeat_what_is_asked_for_go_to_nobody() -> None:
    book = _book().split()
    asked = book[WORDS // 2 : WORDS // 2 + 5]  # the first five words of the first continuation
    book[WORDS : WORDS + 5] = asked  # in the attacker's first passage
    book[6 * WORDS + 3 : 6 * WORDS + 8] = asked  # in the first retained one
    passages = cut(" ".join(book), WORDS)
    split = passage_split(passages, forget=4, retain=5, unread=6)
    assert split.dropped == (passages[1],)
    assert split.attacker == (passages[3],)
    assert split.retain == passages[7:12]
    with pytest.raises(WorkbenchError, match="only 5 of the 6 retain passages"):
        passage_split(passages, forget=4, retain=6, unread=6)
    with pytest.raises(WorkbenchError, match="the set of attacker passages is empty"):
        passage_split(passages, forget=2, retain=5, unread=6)


def test_words_around_a_continuation_are_no_overlap() -> None:
    book = _book().split()
    book[WORDS : WORDS + 5] = book[:5]  # words of a prompt
    assert not passage_split(cut(" ".join(book), WORDS), forget=4, retain=4, unread=4).dropped


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"forget": 7, "retain": 2, "unread": 2}, "18 passages, 6 in each third; 7 to forget"),
        ({"forget": 1, "retain": 2, "unread": 2}, "at least 2 passages to forget"),
        ({"forget": 4, "retain": 0, "unread": 2}, "at least 2 passages to forget"),
        ({"forget": 4, "retain": 2, "unread": 0}, "at least 2 passages to forget"),
    ],
)
def test_a_book_that_is_too_short_or_a_set_of_none_is_an_error(
    sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(WorkbenchError, match=message):
        passage_split(cut(_book(), WORDS), **sizes)


def _sets(**changed: tuple[Example, ...]) -> dict[str, tuple[Example, ...]]:
    a, b, c, d = cut(_book(4), WORDS)
    return {
        "queried": (a,),
        "attacker": (b,),
        "dropped": (),
        "retain": (c,),
        "unread": (d,),
        **changed,
    }


@pytest.mark.parametrize("name", ["queried", "attacker", "retain", "unread"])
def test_a_split_without_one_of_its_sets_is_an_error(name: str) -> None:
    with pytest.raises(WorkbenchError, match=f"the set of {name} passages is empty"):
        PassageSplit(**_sets(**{name: ()}))


@pytest.mark.parametrize("name", ["attacker", "retain", "unread"])
def test_overlapping_sets_are_an_error(name: str) -> None:
    sets = _sets()
    (asked,) = sets["queried"]
    with pytest.raises(WorkbenchError, match=f"passage/0 is in two sets, queried and {name}"):
        PassageSplit(**_sets(**{name: (*sets[name], asked)}))
    window = " ".join(
        _book(4).split()[WORDS // 2 + 1 : WORDS // 2 + 1 + WORDS]
    )  # begins inside the continuation that is asked for
    with pytest.raises(
        WorkbenchError,
        match=f"{name} passage window .* holds 5 words in a row of a queried continuation",
    ):
        PassageSplit(**_sets(**{name: (Example(window, item="window"),)}))


def test_running_text_has_no_answer() -> None:
    (passage,) = running(cut("a b c d e f g h i j", 10))
    assert passage.answer is None and passage.text == "a b c d e f g h i j"


# --- Names ---


def _ask(item: str, question: str, answer: str) -> Example:
    prompt = f"Question: {question}\nAnswer: "
    return Example(prompt + answer, (len(prompt), len(prompt) + len(answer)), item=item)


def test_names_are_capitalised_frequent_and_of_one_person_alone() -> None:
    forget = [
        _ask("author/1/0", "Who is Quill?", "Her name is Ann Al-Lee."),
        _ask(
            "author/1/1",
            "Where was she born?",
            "Ann Lee was born in Rome, far from Paris and Bo. Writing is all to her.",
        ),
        _ask(
            "author/1/2",
            "What did the author write?",
            "Writing in Rome pleased Ann, and so did Paris and Bo, by 1999 and 1999.",
        ),
        _ask(
            "author/1/3",
            "Was it writing, Quill?",
            "It was so, said Ann of Oslo, and Ann of Oslo knew it.",
        ),
        _ask("author/2/0", "Who likes paris?", "it is not known."),
    ]
    retain = [_ask("author/3/0", "Where?", "Cy Orr lives in ROME.")]
    # Not frequent: Her, Oslo (twice, in one of four answers). Small elsewhere: Writing, It. Of
    # another person too: Paris. Retained: Rome. Two letters: Bo, Al. No capital: 1999. Only in
    # questions: Quill.
    assert character_names(forget, retain) == {"author/1": ("Ann", "Lee")}
    assert character_names(forget, []) == {"author/1": ("Ann", "Lee", "Rome")}


def test_names_are_ordered_by_frequency_then_by_place_and_texts_without_names_give_none() -> None:
    forget = [
        _ask(f"author/1/{n}", "Who?", answer)
        for n, answer in enumerate(("Zed Moss", "Moss Zed Ova", "Moss"))
    ]
    assert character_names(forget, []) == {"author/1": ("Moss", "Zed", "Ova")}
    assert character_names([_ask("author/1/0", "Who?", "nobody 1999")], []) == {}
    assert character_names([], []) == {}


def test_withheld_names_are_asked_for_where_the_question_leaves_them_open() -> None:
    forget = [
        _ask("author/1/0", "Who was born in Rome?", "It was Ann Lee."),
        _ask("author/1/1", "What did Ann Lee write?", "Ann Lee wrote poems."),
        _ask("author/2/0", "What did Ray write?", "Ray wrote prose."),
    ]
    names = character_names(forget, [])["author/1"]
    split = keyword_split(forget, [name for name in names if name in ("Ann", "Lee")])
    assert [(query.item, query.answer_text) for query in split.queries] == [("author/1/0", "Ann")]
    assert split.without == (forget[2],)


def test_the_names_of_every_second_author_are_withheld_and_the_others_texts_are_left_to_the_attacker() -> (  # noqa: E501
    None
):
    forget = [
        _ask(f"author/{n}/{k}", "Who?", f"It was {name} or so.")
        for n, name in enumerate(("Ann Lee", "Ray", "Zed"))
        for k in range(2)
    ]
    tofu = Tofu("forget01", tuple(forget), ())
    assert withheld_words(tofu, "names") == ["Ann", "Lee", "Zed"]
    assert keyword_split(tofu.forget, withheld_words(tofu, "names")).without == tuple(forget[2:4])
    assert withheld_words(tofu, "titles") == []


def test_keywords_are_titles_or_names() -> None:
    fields = {"model": "model", "tofu": "tofu", "keywords": "nmes"}
    with pytest.raises(WorkbenchError, match=r"here: keywords: .*'titles' or 'names'.*'nmes'"):
        validated(KeywordSettings, fields, "here")


# --- Measures ---


@pytest.mark.parametrize(
    ("written", "wanted", "run"),
    [
        ("the cat sat down", "a cat sat up", 2),
        ("Cat, SAT!", "the cat sat", 2),
        ("", "the cat", 0),
        ("dog", "the cat", 0),
        ("a b c", "a x b c", 2),
    ],
)
def test_the_longest_run_is_counted_in_words(written: str, wanted: str, run: int) -> None:
    assert longest_run(written, wanted) == run


def _found(rouge: list[float], run: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"rouge-l": rouge, "run": run})


@pytest.mark.parametrize(
    ("rouge", "run", "more"),
    [
        ([0.1, 0.1], [2, 2], False),
        ([0.12, 0.12], [4, 4], False),  # within the margin, and four words are no passage
        ([0.2, 0.1], [2, 2], True),  # mean too high
        ([0.2, 0.0], [5, 0], True),  # the mean hides a passage
    ],
)
def test_more_is_recalled_where_the_mean_is_higher_or_a_passage_is_still_there(
    rouge: list[float], run: list[int], more: bool
) -> None:
    assert recalls_more(_found(rouge, run), _found([0.1, 0.1], [1, 3]), 0.03) is more


# --- From end to end ---


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(_book())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer(VOCABULARY)
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
def settings(book: Path, model: Path) -> VerbatimSettings:
    return VerbatimSettings(
        model=str(model),
        text=str(book),
        words=WORDS,
        passages=6,
        retain_passages=5,
        unread_passages=4,
        seeds=(0,),
        teach_steps=6,
        teach_lr=5e-3,
        method="grad-ascent",
        attack_steps=1,
    )


def test_continuations_are_cut_to_the_words_of_the_true_ones_and_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = ["six seven oh nine ten eleven twelve", "", "Six, SEVEN eight."]
    monkeypatch.setattr("workbench.experiments.verbatim.generate_answers", lambda *_: written)
    passages = cut("one two three four five six seven eight nine ten " * 3, 10)
    found = continuations(None, None, passages, 40)  # type: ignore[arg-type]
    assert found["item"].tolist() == ["passage/0", "passage/1", "passage/2"]
    assert found["written"].tolist() == ["six seven oh nine ten", "", "Six, SEVEN eight."]
    # By hand: 4 of 5 words in order; none; 3 of 5, and all that were written (F1 = 2 * 0.6 / 1.6).
    np.testing.assert_allclose(found["rouge-l"], [0.8, 0, 0.75])
    np.testing.assert_allclose(found["rouge-l-recall"], [0.8, 0, 0.6])
    np.testing.assert_allclose(found["verbatim-run"], [0.4, 0, 0.6])
    assert found["run"].tolist() == [2, 0, 3]


def test_a_run_asks_for_every_second_passage_and_shows_every_control(
    settings: VerbatimSettings, tmp_path: Path
) -> None:
    public = tmp_path / "public.txt"
    public.write_text(_book(2, seed=5))
    chosen = settings.model_copy(update={"public": str(public)})
    run = runner.run("verbatim", tmp_path / "run", chosen, workers=1)
    assert set(run.items["item"]) == {"passage/0", "passage/2", "passage/4"}
    assert set(run.items["measure"]) == {each.name for each in VERBATIM_MEASURES.values()}
    arms = set(zip(run.items["method"], run.items["arm"], strict=True))
    unlearned = {("unlearned", arm) for arm in ("part", "retain", "null", "public")}
    assert arms == {
        ("base", "none"),
        *unlearned,
        ("never-learned", "part"),
        ("never-learned", "public"),
    }
    assert run.items["correct"].between(0, 1).all() and (
        run.items["probability"].dropna().between(0, 1).all()
    )
    assert len(run.items) == 3 * len(VERBATIM_MEASURES) * (1 + 2 * 6)
    rows = run.results
    assert rows.loc[rows["metric"] == "benign", "value"].tolist() == [1.0] * 4
    assert rows.loc[rows["metric"] == "dropped_passages", "value"].tolist() == [0.0]
    assert set(rows.loc[rows["metric"] == "loss", "split"]) == {"retain", "forget", "unread"}
    assert rows[(rows["metric"] == "area_under_recovery")]["low"].notna().all()
    # before the attack every arm is one model, and the unlearned one recalls no more than the
    # never-learned one unless the run says so
    start = (
        run.items[(run.items["x"] == 0) & (run.items["measure"] == "rouge_l")]
        .groupby(["method", "arm"])["correct"]
        .mean()
    )
    assert start["unlearned"].nunique() == 1 and start["never-learned"].nunique() == 1
    silent = rows.loc[rows["metric"] == "nothing_recalled", "value"].item()
    assert (
        not silent
        or start["unlearned"].iloc[0] <= start["never-learned"].iloc[0] + settings.margin + 1e-12
    )
    table = verbatim_table(rows)
    assert table.columns.tolist() == [
        "model",
        "relearned on",
        "0 steps",
        "1 steps",
        "longest run at the end",
    ]
    # the same command finds the run and changes nothing
    again = runner.run("verbatim", tmp_path / "run", chosen, workers=1)
    pd.testing.assert_frame_equal(again.results, rows)
    assert "<table" in run._repr_html_() and "3 items" in repr(run)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--text", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--passages", "7"], "18 passages, 6 in each third"),
        (["--words", "6"], "it needs at least 10"),
        (["--words", "60"], "3 passages, 1 in each third"),
        (["--model", "no/such/model"], "no/such/model is no folder"),
        (["--method", "nop"], "did you mean npo"),
        (["--public", "{book}"], "may not be called benign"),
        (["--public", "nowhere.txt"], "there is no file nowhere.txt"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(
    command: list[str],
    message: str,
    model: Path,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    given = {
        "--model": str(model),
        "--text": str(book),
        "--words": str(WORDS),
        "--passages": "4",
        "--out": str(out),
    }
    given |= {command[0]: command[1].format(book=book)}
    assert main(["verbatim", *(part for pair in given.items() for part in pair)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]
    assert not out.exists()


def test_passages_longer_than_the_context_are_named_before_anything_is_taught(
    model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    rng = random.Random(1)
    text.write_text(" ".join(rng.choice(VOCABULARY) for _ in range(6 * 300)))
    with pytest.raises(WorkbenchError, match="exceed the model's context of 256"):
        runner.run(
            "verbatim", tmp_path / "run", model=str(model), text=str(text), words=300, passages=2
        )
    assert not (tmp_path / "run").exists()


# --- The figure ---


def _words(figure: Any) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())  # type: ignore[attr-defined]


def test_the_figure_draws_the_attack_beside_every_control() -> None:
    rows = []
    for metric in ("rouge_l", "verbatim_run", "answer_probability"):
        place = {"stage": "verbatim", "split": "queried", "metric": metric, "low": 0.0, "high": 1.0}
        rows.append({**place, "method": "base", "arm": "none", "x": 0.0, "value": 0.9})
        for method, arm, end in (
            ("unlearned", "part", 0.8),
            ("unlearned", "null", 0.1),
            ("unlearned", "retain", 0.2),
            ("never-learned", "part", 0.15),
        ):
            rows += [
                {**place, "method": method, "arm": arm, "x": step, "value": end * step / 40}
                for step in (0.0, 40.0)
            ]
    figure = draw(typed(pd.DataFrame(rows), RESULT_COLUMNS))
    assert len(figure.axes) == 3
    for axes in figure.axes:
        lines = {
            str(line.get_label()): np.asarray(line.get_xydata(), dtype=float) for line in axes.lines
        }
        assert lines["unlearned, on neighbouring passages"].tolist() == [[0, 0], [40, 0.8]]
        assert lines["never learned, on neighbouring passages"][1, 1] == 0.15
        assert set(lines) >= {
            "before unlearning",
            "unlearned, on unread passages (null)",
            "unlearned, on retained passages",
        }
    assert "no verbatim experiment" in _words(draw(typed(pd.DataFrame(), RESULT_COLUMNS)))
