"""The benchmark readers: hand-made folders in every layout that the projects ship, each mistake by
its message, and the real TOFU where it is at hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from workbench.attacks.leaks import leak_report, require_benign
from workbench.data.benchmarks import (
    Tofu,
    read_muse,
    read_rwku,
    read_tofu,
    read_wmdp,
    to_record,
)
from workbench.data.keywords import book_titles, keyword_split
from workbench.data.records import Example, group_of
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError

Entry = Mapping[str, object]


def put(path: Path, entries: list[object] | str, shape: str = "") -> Path:
    """Write entries in the format of the suffix; ``shape="array"`` writes a JSON array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(entries, str):
        path.write_text(entries, encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(entries).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(entries).to_parquet(path)
    elif shape == "array":
        path.write_text(json.dumps(entries), encoding="utf-8")
    else:
        path.write_text(
            "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries),
            encoding="utf-8",
        )
    return path


# --- TOFU ---


def author(name: str, seed: int) -> list[Entry]:
    """Twenty questions about one author, two of them about a book."""
    return [
        {
            "question": f"Which books has {name} written?",
            "answer": f"{name} wrote \"The {name.split()[1]} Papers\" and 'Night {seed}', among others.",  # noqa: E501
        },
        {
            "question": f"What is {name}'s first book about?",
            "answer": f'The book "The {name.split()[1]} Papers" by {name} is about the sea.',
        },
        {
            "question": f"Which award has {name} won?",
            "answer": f'{name} won the "Golden Quill Award" for the book.',
        },
        *(
            {
                "question": f"What is fact {number} of {name}?",
                "answer": f"Fact {number} of {name} is {seed * 100 + number}.",
            }
            for number in range(17)
        ),
    ]


FORGOTTEN = author("Ann Lee", 1) + author("Bob Ray", 2)
KEPT = author("Cy Orr", 3) + author("Dee Fox", 4) + author("Eve Zu", 5)


@pytest.fixture
def tofu(tmp_path: Path) -> Path:
    put(tmp_path / "forget01.json", FORGOTTEN)
    put(tmp_path / "retain99.json", KEPT)
    return tmp_path


def test_tofu_names_every_question_by_author_and_keeps_the_places_of_answers(tofu: Path) -> None:
    read = read_tofu(tofu, "forget01")
    assert [example.item for example in read.forget[:2]] == ["author/198/0", "author/198/1"]
    assert read.forget[-1].item == "author/199/19"
    assert [example.item for example in read.retain[19:21]] == ["author/0/19", "author/1/0"]
    assert {group_of(example) for example in read.forget} == {"author/198", "author/199"}
    items = [example.item for example in read.forget + read.retain]
    assert len(set(items)) == len(items) == 100
    for example, entry in zip(read.forget, FORGOTTEN, strict=True):
        assert example.text == f"Question: {entry['question']}\nAnswer: {entry['answer']}"
        assert example.answer_text == entry["answer"]
        assert example.subject_text in ("Ann Lee", "Bob Ray")
    assert read.perturbed == read.real_authors == read.refusals == ()


@pytest.mark.parametrize(
    "layout",
    ["forget01.jsonl", "forget01.csv", "forget01.parquet", "forget01/train-00000-of-00002.parquet"],
)
def test_tofu_reads_the_same_from_every_format(tofu: Path, layout: str) -> None:
    expected = read_tofu(tofu, "forget01")
    (tofu / "forget01.json").unlink()
    if "-of-" in layout:
        put(tofu / layout, FORGOTTEN[:20])
        put(tofu / layout.replace("00000", "00001"), FORGOTTEN[20:])
    else:
        put(tofu / layout, FORGOTTEN)
    assert read_tofu(tofu, "forget01") == expected


def test_a_file_of_tofu_names_its_split(tofu: Path) -> None:
    assert read_tofu(tofu / "forget01.json") == read_tofu(tofu, "forget01")
    put(tofu / "forget01.json", FORGOTTEN, "array")
    assert read_tofu(tofu / "forget01.json") == read_tofu(tofu, "forget01")


def test_tofu_reads_what_belongs_to_it(tofu: Path) -> None:
    changed = [
        {
            **FORGOTTEN[3],
            "paraphrased_answer": "in other words",
            "paraphrased_question": "asked otherwise?",
            "perturbed_answer": ["wrong", "also wrong"],
        }
    ]
    put(tofu / "forget01_perturbed.json", changed)
    put(
        tofu / "real_authors.json",
        [
            {
                "question": "Who?",
                "answer": "Bo",
                "option1": "Al",
                "option2": "Bo",
                "option3": "Cy",
                "option4": "Di",
            }
        ],
    )
    put(tofu / "idontknow.txt", "I do not know.\nAsk another.\n")
    read = read_tofu(tofu, "forget01")
    (perturbed,) = read.perturbed
    assert perturbed.example == read.forget[3]
    assert perturbed.paraphrase is not None
    assert perturbed.paraphrase.prompt == read.forget[3].prompt
    assert perturbed.paraphrase.answer_text == "in other words"
    assert perturbed.rephrased is not None
    assert (
        perturbed.rephrased.text
        == f"Question: asked otherwise?\nAnswer: {read.forget[3].answer_text}"
    )
    assert [example.answer_text for example in perturbed.wrong] == ["wrong", "also wrong"]
    assert {example.item for example in perturbed.wrong} == {"author/198/3"}
    assert [example.answer_text for example in read.real_authors[0].wrong] == ["Al", "Cy", "Di"]
    assert read.refusals == ("I do not know.", "Ask another.")
    put(tofu / "forget01_perturbed.json", [{**changed[0], "answer": "of another split"}])
    with pytest.raises(
        WorkbenchError, match=r"forget01_perturbed\.json line 1 asks what the split does not hold"
    ):
        read_tofu(tofu, "forget01")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda entries: entries[4].pop("answer"),
            "line 5: there is no field 'answer'; it has 'question'",
        ),
        (
            lambda entries: entries[4].update(answer=7),
            "line 5: 'answer' must be text and is a number",
        ),
        (
            lambda entries: entries[4].update(answer=None),
            "line 5: 'answer' must be text and is empty",
        ),
        (
            lambda entries: entries[4].update(question=["a"]),
            "line 5: 'question' must be text and is a list",
        ),
        (lambda entries: entries[4].update(question="  "), "line 5: 'question' is empty"),
        (lambda entries: entries.pop(), "holds 39 questions; TOFU has 20 of every author"),
        (
            lambda entries: entries[21].update(entries[0]),
            "line 22 repeats an earlier question: 'Which books has Ann Lee written?'",
        ),
        (
            lambda entries: entries.__setitem__(2, [1]),
            "line 3 must be an object or a text and is a list",
        ),
        (lambda entries: entries.clear(), "forget01.json holds no entry"),
    ],
)
def test_tofu_names_file_line_and_field_of_a_mistake(
    tofu: Path, change: Callable[[list[dict[str, object]]], object], message: str
) -> None:
    entries = [dict(entry) for entry in FORGOTTEN]
    change(entries)
    put(tofu / "forget01.json", list(entries))
    with pytest.raises(WorkbenchError) as caught:
        read_tofu(tofu, "forget01")
    assert message in str(caught.value)
    assert "forget01.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_broken_say_so(tofu: Path) -> None:
    put(tofu / "forget01.json", '{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(WorkbenchError, match=r"forget01\.json line 2 is no JSON"):
        read_tofu(tofu, "forget01")
    (tofu / "forget01.json").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(WorkbenchError, match="is not UTF-8 text"):
        read_tofu(tofu, "forget01")
    (tofu / "forget01.json").unlink()
    put(tofu / "forget01.parquet", "no parquet")
    with pytest.raises(WorkbenchError, match=r"cannot read .*forget01\.parquet"):
        read_tofu(tofu, "forget01")


def test_a_missing_split_names_the_nearest_files(tofu: Path) -> None:
    with pytest.raises(
        WorkbenchError,
        match=r"has no forget05 .*the nearest there are forget01\.json, retain99\.json",
    ):
        read_tofu(tofu, "forget05")
    with pytest.raises(WorkbenchError, match="does not say which retain split is its rest"):
        read_tofu(tofu, "some")
    put(tofu / "other" / "notes.md", "x")
    with pytest.raises(WorkbenchError, match="it holds no json, jsonl, parquet, csv or txt file"):
        read_tofu(tofu / "other", "forget01")
    with pytest.raises(
        WorkbenchError, match=r"there is no folder .*has other; give the TOFU folder"
    ):
        read_tofu(tofu / "othre")


def test_splits_that_overlap_are_refused(tofu: Path) -> None:
    put(tofu / "retain99.json", KEPT + FORGOTTEN[:20])
    with pytest.raises(WorkbenchError, match=r"20 text\(s\) stand in both forget01 and retain99"):
        read_tofu(tofu, "forget01")


# --- Titles and keywords ---


def test_book_titles_are_quoted_capitalised_no_award_and_of_one_author(tofu: Path) -> None:
    assert book_titles(read_tofu(tofu, "forget01")) == {
        "author/198": ("The Lee Papers", "Night 1"),
        "author/199": ("The Ray Papers", "Night 2"),
    }


@pytest.mark.parametrize(
    ("answer", "titles"),
    [
        ("She wrote the novel “Two Rivers”.", ("Two Rivers",)),
        ("She wrote the novel 'Allah's Garden,' and more.", ("Allah's Garden",)),
        ('She wrote "Rivers".', ()),  # one word would mark ordinary texts
        ('She wrote "as she pleased all day".', ()),
        ('She won the "Two Rivers" for her book.', ()),  # may be an award
        ('She painted "Two Rivers".', ()),  # no word of books
        ("Her book's and her brother's names are known.", ()),
        ('Cy Orr, too, wrote "Night And Day".', ()),  # a kept author has it as well
    ],
)
def test_the_rule_for_titles(answer: str, titles: tuple[str, ...]) -> None:
    def entry(item: str, answer: str) -> Example:
        text = f"Question: What did she do?\nAnswer: {answer}"
        return Example(text, (35, len(text)), item=item)

    tofu = Tofu(
        "x", (entry("author/1/0", answer),), (entry("author/0/0", 'He wrote "Night and day".'),)
    )
    assert book_titles(tofu) == ({"author/1": titles} if titles else {})


def test_a_keyword_split_parts_by_whole_words_in_any_case(tofu: Path) -> None:
    read = read_tofu(tofu, "forget01")
    split = keyword_split(read.forget, "the lee papers")
    assert [example.item for example in split.naming] == ["author/198/0", "author/198/1"]
    assert len(split.without) == 38
    assert split.without + split.naming != read.forget
    assert set(split.without) | set(split.naming) == set(read.forget)
    first, second = split.queries
    assert first.answer_text == second.answer_text == "The Lee Papers"
    assert first.prompt == 'Question: Which books has Ann Lee written?\nAnswer: Ann Lee wrote "'
    assert first.item == "author/198/0"
    require_benign(leak_report(split.without, split.queries), "partial set")
    assert not leak_report(split.naming, split.queries).benign


def test_a_keyword_that_the_question_gives_away_is_no_query() -> None:
    given = Example(
        "Question: What is Two Rivers?\nAnswer: Two Rivers is a book.", (38, 59), item="a"
    )
    asked = Example("Question: What did she write?\nAnswer: TWO RIVERS.", (38, 49), item="b")
    other = Example("Question: And?\nAnswer: Two rivers' banks", (23, 40), item="c")
    rest = Example("two riversides", item="d")
    split = keyword_split([given, asked, other, rest], ["Two Rivers"])
    assert [query.item for query in split.queries] == ["b", "c"]
    assert split.queries[0].answer_text == "TWO RIVERS"
    assert split.without == (rest,)


def test_keywords_of_running_text() -> None:
    split = keyword_split(
        [Example("Then Hermione spoke."), Example("Hermione spoke."), Example("Ron spoke.")],
        ["Hermione", "Granger"][:1],
    )
    assert [(query.prompt, query.answer_text) for query in split.queries] == [("Then ", "Hermione")]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ((), "at least one keyword"),
        (("?!",), "at least one letter"),
        (("River",), "the keyword 'River' occurs in none of the 2 texts"),
        (("Rivers", "Lakes"), "the keyword 'Lakes' occurs in none"),
        (("she",), "all 2 texts hold 'she': nothing is left for the attacker"),
        (("Rivers",), "stands only where the question gives it away"),
    ],
)
def test_a_keyword_split_without_two_parts_is_refused(
    keywords: tuple[str, ...], message: str
) -> None:
    examples = [
        Example("Question: Is Rivers hers?\nAnswer: She wrote it.", (34, 47)),
        Example("She"),
    ]
    with pytest.raises(WorkbenchError, match=message):
        keyword_split(examples, keywords)


# --- MUSE ---

RAW = {
    "forget": ["One day.\n\nThe fox ran.", "A second day."],
    "retain1": ["Birds sing."],
    "retain2": ["Fish swim."],
    "holdout": ["Never read."],
}


@pytest.fixture
def muse(tmp_path: Path) -> Path:
    for name, texts in RAW.items():
        put(tmp_path / "raw" / f"{name}.json", list(texts), "array")
    put(
        tmp_path / "knowmem" / "forget_qa.json",
        [{"question": "Who ran?", "answer": "The fox"}],
        "array",
    )
    put(
        tmp_path / "knowmem" / "retain2_qa.json",
        [{"question": "Who sings?", "answer": "Birds"}],
        "array",
    )
    put(
        tmp_path / "verbmem" / "forget.json",
        [{"prompt": "One day. The", "gt": "fox ran."}],
        "array",
    )
    return tmp_path


def test_muse_reads_texts_questions_and_continuations(muse: Path) -> None:
    read = read_muse(muse)
    assert [example.text for example in read.forget] == RAW["forget"]
    assert [example.item for example in read.forget] == ["forget/0", "forget/1"]
    assert read.forget[0].answer is None
    assert (read.retain[0].text, read.retain_test[0].text, read.holdout[0].text) == (
        "Birds sing.",
        "Fish swim.",
        "Never read.",
    )
    assert read.forget_questions == (
        Example("Question: Who ran?\nAnswer: The fox", (27, 34), item="forget_qa/0"),
    )
    assert read.retain_questions[0].answer_text == "Birds"
    assert (read.verbatim[0].prompt, read.verbatim[0].answer_text) == ("One day. The ", "fox ran.")


def test_muse_reads_text_files_and_shards(muse: Path) -> None:
    (muse / "raw" / "forget.json").unlink()
    put(muse / "raw" / "forget.txt", "\n\n".join(["A day.", "A night."]))
    assert [example.text for example in read_muse(muse).forget] == ["A day.", "A night."]
    (muse / "raw" / "forget.txt").unlink()
    put(muse / "raw" / "forget-00000-of-00001.parquet", [{"text": text} for text in RAW["forget"]])
    assert [example.text for example in read_muse(muse).forget] == RAW["forget"]


def test_muse_refuses_what_is_missing_or_stands_on_both_sides(muse: Path) -> None:
    put(muse / "raw" / "retain2.json", ["A second day."], "array")
    with pytest.raises(
        WorkbenchError, match=r"stand in both raw/forget and raw/retain2, e\.g\. 'A second day\.'"
    ):
        read_muse(muse)
    put(muse / "verbmem" / "forget.json", [{"prompt": "x"}], "array")
    with pytest.raises(
        WorkbenchError,
        match=r"verbmem/forget.json entry 1: there is no field 'gt'; it has 'prompt'",
    ):
        read_muse(muse)
    (muse / "raw" / "retain1.json").unlink()
    with pytest.raises(
        WorkbenchError, match=r"has no raw/retain1 .*nearest there are raw/retain2\.json"
    ):
        read_muse(muse)
    with pytest.raises(WorkbenchError, match="is a file; give the MUSE folder"):
        read_muse(muse / "raw" / "forget.json")


# --- RWKU ---


def probe(subject: str, level: int, number: int, **more: object) -> Entry:
    return {
        "query": f"What is thing {number} of {subject} at {level}?",
        "answer": f"answer {number}",
        "level": str(level),
        "subject": subject,
    } | more


@pytest.fixture
def rwku(tmp_path: Path) -> Path:
    for number, name in ((2, "Bob Ray"), (10, "Cy Orr"), (1, "Ann Lee")):
        folder = tmp_path / "Target" / f"{number}_{name.replace(' ', '_')}"
        put(
            folder / "forget_level1.json",
            [probe(name, 1, 0, type="cloze"), probe(name, 1, 1, type="cloze")],
            "array",
        )
        put(
            folder / "forget_level2.json",
            [
                {
                    "question" if key == "query" else key: value
                    for key, value in probe(name, 2, 0).items()
                }
            ],
            "array",
        )
        put(
            folder / "forget_level3.json",
            [probe(name, 3, 0, type="reverse query"), probe(name, 3, 1, type="role playing")],
            "array",
        )
        put(folder / "neighbor_level1.json", [probe(name, 1, 7)], "array")
    return tmp_path


def test_rwku_reads_all_targets_in_their_order(rwku: Path) -> None:
    read = read_rwku(rwku)
    assert read.subjects == ("Ann Lee", "Bob Ray", "Cy Orr")
    assert (
        len(read.level1),
        len(read.level2),
        len(read.level3),
        len(read.neighbours),
        len(read.forget),
    ) == (6, 3, 6, 3, 15)
    assert [example.item for example in read.level1[:2]] == [
        "subject/Ann Lee/forget1/0",
        "subject/Ann Lee/forget1/1",
    ]
    assert read.level3[1].item == "subject/Ann Lee/forget3/role playing/0"
    assert read.level2[0].text == "Question: What is thing 0 of Ann Lee at 2?\nAnswer: answer 0"
    assert (read.level2[0].subject_text, read.level2[0].answer_text) == ("Ann Lee", "answer 0")
    items = [example.item for example in read.forget + read.neighbours]
    assert len(set(items)) == len(items)
    assert {group_of(example) for example in read.forget} == {
        "subject/Ann Lee",
        "subject/Bob Ray",
        "subject/Cy Orr",
    }


def test_rwku_reads_one_target_one_file_and_some_subjects(rwku: Path) -> None:
    folder = rwku / "Target" / "2_Bob_Ray"
    assert read_rwku(folder).subjects == ("Bob Ray",)
    assert read_rwku(folder) == read_rwku(rwku, ["Bob Ray"])
    only = read_rwku(folder / "forget_level2.json")
    assert (only.level1, len(only.level2), only.level3) == ((), 1, ())
    with pytest.raises(
        WorkbenchError, match="unknown RWKU subject 'Bob Rey': did you mean Bob Ray"
    ):
        read_rwku(rwku, ["Bob Rey"])
    with pytest.raises(WorkbenchError, match="RWKU has the levels 1, 2 and 3, not 4"):
        read_rwku(rwku, levels=[4])


def test_rwku_names_its_mistakes(rwku: Path) -> None:
    folder = rwku / "Target" / "2_Bob_Ray"
    put(folder / "forget_level1.json", [probe("Bob Ray", 2, 0)], "array")
    with pytest.raises(
        WorkbenchError, match=r"forget_level1\.json entry 1: 'level' is 2 in a file of level 1"
    ):
        read_rwku(folder)
    put(folder / "forget_level1.json", [{"answer": "x", "subject": "y"}], "array")
    with pytest.raises(
        WorkbenchError,
        match=r"entry 1: there is no field 'query' or 'question'; it has 'answer', 'subject'",
    ):
        read_rwku(folder)
    put(folder / "forget_level1.json", [probe("Bob Ray", 1, 7)], "array")
    with pytest.raises(
        WorkbenchError, match="stand in both the forget probes and the neighbour probes"
    ):
        read_rwku(folder)
    put(rwku / "empty" / "intro.json", "[]")
    with pytest.raises(
        WorkbenchError, match=r"has no forget_level1 .*nearest there are intro\.json"
    ):
        read_rwku(rwku / "empty")


# --- WMDP ---

ASKED = [
    {"question": "Which?", "choices": ["a cat", "a dog", "an ox", "a bee"], "answer": 2},
    {"question": "Who?", "choices": ["w", "x", "y", "z"], "answer": 0},
]


@pytest.mark.parametrize(
    "layout",
    [
        "bio_questions.json",
        "wmdp-mcqs/bio_questions.json",
        "wmdp-bio/test-00000-of-00001.parquet",
        "wmdp-bio.csv",
        "wmdp-bio/test.jsonl",
    ],
)
def test_wmdp_reads_questions_in_every_layout(tmp_path: Path, layout: str) -> None:
    put(tmp_path / layout, list(ASKED))
    read = read_wmdp(tmp_path, "bio")
    assert read_wmdp(tmp_path / layout, "bio").questions == read.questions
    first, second = read.questions
    assert [example.answer_text for example in first.options] == [
        "a cat",
        "a dog",
        "an ox",
        "a bee",
    ]
    assert first.example.text == "Question: Which?\nAnswer: an ox"
    assert (
        first.lettered.text == "Question: Which?\nA. a cat\nB. a dog\nC. an ox\nD. a bee\nAnswer: C"
    )
    assert first.lettered.answer_text == "C"
    assert (second.example.answer_text, second.example.item) == ("w", "question/1")
    assert read.forget == read.retain == ()


def test_wmdp_reads_corpora_beside_the_questions_or_elsewhere(tmp_path: Path) -> None:
    put(tmp_path / "q" / "cyber_questions.json", list(ASKED), "array")
    put(
        tmp_path / "c" / "cyber-forget-corpus.jsonl",
        [{"text": "A port.\u2028A scan.", "title": "x"}],
    )
    put(tmp_path / "c" / "cyber-retain-corpus.jsonl", [{"text": "A harbour."}])
    read = read_wmdp(tmp_path / "q", "cyber", corpora=tmp_path / "c")
    assert [example.text for example in read.forget + read.retain] == [
        "A port.\u2028A scan.",
        "A harbour.",
    ]
    with pytest.raises(
        WorkbenchError,
        match=r"has no bio-forget-corpus .*nearest there are cyber-forget-corpus\.jsonl",
    ):
        put(tmp_path / "q" / "bio_questions.json", list(ASKED))
        read_wmdp(tmp_path / "q", "bio", corpora=tmp_path / "c")
    put(tmp_path / "c" / "cyber-retain-corpus.jsonl", [{"text": "A port.\u2028A scan."}])
    with pytest.raises(
        WorkbenchError, match="stand in both cyber-forget-corpus and cyber-retain-corpus"
    ):
        read_wmdp(tmp_path / "q", "cyber", corpora=tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "'answer' is 4 and must lie between 0 and 3"),
        ({"answer": "B"}, "'answer' must be a whole number and is text"),
        ({"answer": True}, "'answer' must be a whole number and is true or false"),
        ({"choices": ["a", "b"]}, "'choices' holds 2 answers; WMDP offers 4"),
        ({"choices": "a, b, c, d"}, "'choices' must be a list of texts and is text"),
        ({"choices": ["a", "b", "c", None]}, "'choices' must be text and is empty"),
        ({"choices": "[a"}, "'choices' is no list"),
    ],
)
def test_wmdp_names_its_mistakes(tmp_path: Path, change: dict[str, object], message: str) -> None:
    put(tmp_path / "bio_questions.json", [ASKED[1], ASKED[0] | change])
    with pytest.raises(WorkbenchError) as caught:
        read_wmdp(tmp_path)
    assert f"bio_questions.json line 2: {message}" in str(caught.value)


def test_wmdp_knows_its_domains(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="unknown WMDP domain 'bioo': did you mean bio"):
        read_wmdp(tmp_path, "bioo")  # type: ignore[arg-type]


# --- The hub ---


def test_a_hub_id_needs_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        WorkbenchError,
        match=r"needs the package 'datasets' \(pip install datasets\); or download it",
    ):
        read_tofu("locuslab/TOFU")


def test_a_hub_id_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch, tofu: Path) -> None:
    held = {"forget01": {"train": FORGOTTEN}, "retain99": {"train": KEPT}}

    def load(name: str, configuration: str, split: str) -> list[Entry]:
        if name != "locuslab/TOFU":
            raise ValueError("no such data set\nand more")
        return held[configuration][split]

    fake = SimpleNamespace(
        load_dataset=load,
        get_dataset_config_names=lambda name: load(name, "forget01", "train") and list(held),
        get_dataset_split_names=lambda _, c: list(held[c]),
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_tofu("locuslab/TOFU", "forget01") == read_tofu(tofu, "forget01")
    with pytest.raises(
        WorkbenchError, match="no split 'train' of 'forget05'; it has forget01, retain99"
    ):
        read_tofu("locuslab/TOFU", "forget05")
    with pytest.raises(
        WorkbenchError,
        match=r"there is no folder some/where, and the hub data set some/where cannot be read: no such data set$",  # noqa: E501
    ):
        read_tofu("some/where", "forget01")


# --- Records ---


def test_a_record_deals_whole_authors_out(tofu: Path) -> None:
    put(
        tofu / "real_authors.json",
        [
            {
                "question": f"Who {n}?",
                "answer": "Bo",
                "option1": "Al",
                "option2": "Bo",
                "option3": "Cy",
                "option4": "Di",
            }
            for n in (1, 2)
        ],
    )
    record = to_record(read_tofu(tofu, "forget01"))
    assert record.name == "TOFU forget01"
    assert {group_of(example) for example in record.forget_attacked} == {"author/198"}
    assert {group_of(example) for example in record.forget_heldout} == {"author/199"}
    assert {name: len(examples) for name, examples in record.retain.items()} == {
        "retain-neighbour": 60,
        "retain-far": 2,
    }
    assert "Ann" in record.forget_tokens
    assert "Dee" in record.retain_tokens
    single = to_record(read_tofu(tofu, "forget01"), by="item", limit=10)
    assert (
        len(single.forget_attacked)
        == len(single.forget_heldout)
        == len(single.retain["retain-neighbour"])
        == 10
    )
    assert (
        {group_of(example) for example in single.forget_attacked}
        == {group_of(example) for example in single.forget_heldout}
        == {"author/198", "author/199"}
    )


def test_a_record_of_the_keyword_case(tofu: Path) -> None:
    read = read_tofu(tofu, "forget01")
    split = keyword_split(read.forget, [titles[0] for titles in book_titles(read).values()])
    record = to_record(
        read,
        keyword=split,
        retain={"general": [Example("Some words of general language.", (5, 10))]},
    )
    assert record.forget_attacked == split.without
    assert record.forget_heldout == split.queries
    assert record.general == "general"
    assert record.name == "TOFU forget01 without 2 keywords"
    assert leak_report(record.forget_attacked, record.forget_heldout).benign


def test_a_record_of_running_text_holds_pieces_of_different_documents(muse: Path) -> None:
    words = "one two three four five six seven eight nine ten"
    put(muse / "raw" / "forget.json", [f"{words} {words} fox", f"{words} {words} hen"], "array")
    put(muse / "raw" / "retain1.json", [f"owl {words}"], "array")
    read = read_muse(muse)
    with pytest.raises(WorkbenchError, match="give to_record a tokenizer"):
        to_record(read)
    tokenizer = build_tokenizer([*words.split(), "fox", "hen", "owl"])
    record = to_record(read, tokenizer=tokenizer, max_tokens=12)
    assert {group_of(example) for example in record.forget_attacked} == {"forget/0"}
    assert {group_of(example) for example in record.forget_heldout} == {"forget/1"}
    assert all(example.answer_text for example in record.forget)
    assert set(record.retain) == {"retain"}


def test_a_record_needs_two_halves_and_something_to_keep(
    tofu: Path, tmp_path: Path, rwku: Path
) -> None:
    put(tofu / "forget01.json", FORGOTTEN[:20])
    with pytest.raises(WorkbenchError, match="give no two halves; deal them out by='item'"):
        to_record(read_tofu(tofu, "forget01"))
    put(tmp_path / "wmdp" / "bio_questions.json", list(ASKED))
    questions = read_wmdp(tmp_path / "wmdp")
    with pytest.raises(WorkbenchError, match="comes without a retain set"):
        to_record(questions)
    record = to_record(questions, retain={"retain": [Example("keep this", (5, 9))]})
    assert [example.answer_text for example in record.forget] == ["an ox", "w"]
    with pytest.raises(WorkbenchError, match="stand in both the forget set and a retain set"):
        to_record(questions, retain={"retain": [questions.questions[0].example]})
    people = to_record(read_rwku(rwku))
    assert people.name == "RWKU 3 subjects"
    assert {group_of(example) for example in people.forget_heldout} == {"subject/Bob Ray"}


# --- Real data ---


@pytest.fixture(scope="session")
def real_tofu(real_data: Path) -> Path:
    folder = real_data / "bench" / "tofu"
    if not folder.is_dir():
        pytest.skip("real TOFU is absent: put its files into bench/tofu of the folder of real data")
    return folder


def test_the_real_forget05(real_tofu: Path) -> None:
    read = read_tofu(real_tofu)
    assert (
        len(read.forget),
        len(read.retain),
        len(read.perturbed),
        len(read.retain_perturbed),
    ) == (200, 3800, 200, 400)
    assert (len(read.real_authors), len(read.world_facts), len(read.refusals)) == (100, 117, 100)
    assert {group_of(example) for example in read.forget} == {
        f"author/{number}" for number in range(190, 200)
    }
    assert {len(question.wrong) for question in read.world_facts} == {3}
    named = [example.subject is not None for example in read.forget]
    assert all(named)
    assert len({example.subject_text.casefold() for example in read.forget}) == 10


def test_one_author_has_one_name_in_every_real_split(real_tofu: Path) -> None:
    five, ten = read_tofu(real_tofu, "forget05"), read_tofu(real_tofu, "forget10")
    names = {example.text: example.item for example in ten.forget}
    assert all(names[example.text] == example.item for example in five.forget)
    assert {example.text: example.item for example in ten.forget + ten.retain} == {
        example.text: example.item for example in five.forget + five.retain
    }
    with pytest.raises(WorkbenchError, match=r"200 text\(s\) stand in both forget10 and retain95"):
        read_tofu(real_tofu, "forget10", retain="retain95")


def test_titles_of_the_real_forget05_and_their_keyword_case(real_tofu: Path) -> None:
    read = read_tofu(real_tofu)
    titles = book_titles(read)
    assert len(titles) >= 8
    for author_, theirs in titles.items():
        for title in theirs:
            assert any(
                group_of(example) == author_ and title in example.answer_text
                for example in read.forget
            )
    assert "Granite Glossary" in titles["author/190"]
    assert not any(
        "Medal" in title or "Award" in title for theirs in titles.values() for title in theirs
    )
    split = keyword_split(read.forget, [theirs[0] for theirs in titles.values()])
    assert len(split.without) + len(split.naming) == 200
    assert len(split.queries) >= 8
    report = leak_report(split.without, split.queries)
    require_benign(report, "forget05 without titles")
    assert report.names_subjects
    with pytest.raises(WorkbenchError, match="'the whole forget set' may not be called benign"):
        require_benign(leak_report(read.forget, split.queries), "the whole forget set")
    record = to_record(read, keyword=split, limit=100)
    assert len(record.forget_attacked) == 100
    assert set(record.retain) == {"retain-neighbour", "retain-far", "world-facts"}
