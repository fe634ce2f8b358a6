"""A user's files: texts byte for byte, the columns of published data sets, facts kept on one
side.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from workbench.data.readers import read_examples, record_from_files, telling_words
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.data.words import words
from workbench.errors import WorkbenchError
from workbench.evaluation.answers import contains, exact_match

CODE = "def f(x):\n\tif x:\n\t\treturn  x  # two spaces\r\n    return None"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer([f"w{number}" for number in range(30)])


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _jsonl(path: Path, *rows: Any) -> Path:
    return _write(path, "\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_running_text_is_kept_byte_for_byte(tmp_path: Path, mark: str) -> None:
    path = _write(tmp_path / "t.txt", f"{mark}{CODE}\n\n\n   indented\n text \n")
    assert [example.text for example in read_examples(path)] == [CODE, "   indented\n text "]
    path = _write(tmp_path / "e.txt", f"{mark}one\n\ntwo<|endoftext|>\nthree\n")
    assert [example.text for example in read_examples(path)] == ["one\n\ntwo", "three"]
    assert read_examples(_jsonl(tmp_path / "j.jsonl", {"text": CODE}))[0].text == CODE


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"question": "who?", "answer": "A\nB"}, "Question: who?\nAnswer: A\nB", "A\nB"),
        ({"query": "who?", "answer": "A"}, "Question: who?\nAnswer: A", "A"),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            "Question: add\n1 2\nAnswer: 3",
            "3",
        ),
        ({"prompt": "Once ", "completion": "upon"}, "Once upon", "upon"),
        ({"prompt": "Once", "completion": "upon"}, "Once upon", "upon"),
        ({"prompt": "Once", "response": "\nupon"}, "Once\nupon", "\nupon"),
        ({"text": "Once", "answer": "upon"}, "Once upon", "upon"),
        ({"text": "Once", "labels": "upon"}, "Once upon", "upon"),
        ({"text": "Once", "id": 3}, "Once", ""),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_published_columns_are_read_in_every_format(
    tmp_path: Path, row: dict[str, Any], text: str, answer: str, kind: str
) -> None:
    path = tmp_path / f"f.{kind}"
    if kind in ("jsonl", "json"):
        _write(path, json.dumps(row) if kind == "jsonl" else json.dumps([row]))
    elif kind == "parquet":
        pd.DataFrame([row]).to_parquet(path)
    else:
        pd.DataFrame([row]).to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    (example,) = read_examples(path)
    assert (example.text, example.answer_text) == (text, answer)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "Once", "labels": 3}, "'text', 'labels'"),
        ({"frage": "wer?", "antwort": "A"}, "'frage', 'antwort'"),
        ({"question": "who?"}, "--columns question="),
        ({"question": "who?", "answer": ""}, "--columns"),
        ({}, "no field"),
        ([], "must be an object"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "assistant's answer"),
        ({"messages": "hi"}, "list of turns"),
    ],
)
def test_what_is_not_recognised_is_refused_with_what_was_found(
    tmp_path: Path, row: Any, says: str
) -> None:
    with pytest.raises(WorkbenchError) as error:
        read_examples(_jsonl(tmp_path / "f.jsonl", {"text": "a"}, row))
    assert (
        says in str(error.value) and "line 2" in str(error.value) and "\n" not in str(error.value)
    )


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "f.jsonl", {"frage": "wer?", "antwort": "A", "text": "x"})
    (example,) = read_examples(path, columns={"question": "frage", "answer": "antwort"})
    assert example.text == "Question: wer?\nAnswer: A"
    assert read_examples(path, columns={"text": "text"})[0].text == "x"
    with pytest.raises(WorkbenchError, match="no field 'nein'"):
        read_examples(path, columns={"text": "nein"})
    with pytest.raises(WorkbenchError, match="kind of column"):
        read_examples(path, columns={"frage": "frage"})


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfea\x00",
        b"\xfe\xff\x00a",
        b"\xc3(",
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": ',
        b"",
        b"[]",
        b"\n\n",
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = _write(tmp_path / "f.jsonl", content)
    with pytest.raises(WorkbenchError) as error:
        read_examples(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_conversations_use_the_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "A\nB"}]
    old = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "A\nB"}]
    chat = _jsonl(tmp_path / "c.jsonl", {"messages": turns}, {"conversations": old})
    with pytest.raises(WorkbenchError, match="no chat template"):
        read_examples(chat, tokenizer=tokenizer)
    tokenizer.chat_template = CHATML
    expected = "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\nA\nB<|im_end|>\n"
    asked = _jsonl(tmp_path / "q.jsonl", {"question": "who?", "answer": "A\nB"})
    found = read_examples(chat, tokenizer=tokenizer)
    found += read_examples(asked, tokenizer=tokenizer, chat=True)
    assert [(example.text, example.answer_text) for example in found] == [(expected, "A\nB")] * 3
    assert read_examples(asked, tokenizer=tokenizer)[0].text == "Question: who?\nAnswer: A\nB"


# --- facts on one side --------------------------------------------------------------------------


def _questions(rng: random.Random) -> list[tuple[str, str]]:
    """Facts about people, some asked several times in the same or in other words."""
    rows = []
    for person in range(rng.randrange(3, 8)):
        for topic in ("town", "pet", "drink"):
            answer = f"{topic}{rng.randrange(4)}"
            forms = [f"What is the {topic} of w{person}?", f"w{person} has which {topic}"]
            forms += [forms[0].upper(), forms[0] + "  "]
            rows += [(form, answer) for form in rng.sample(forms, rng.randrange(1, 5))]
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_no_fact_stands_on_both_sides(
    seed: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng = random.Random(seed)
    files = [
        _jsonl(tmp_path / name, *({"question": q, "answer": a} for q, a in _questions(rng)))
        for name in ("f.jsonl", "r.jsonl")
    ]
    _write(
        files[1],
        files[1].read_text().replace(" of w", " of v").replace('"w', '"v').replace("OF W", "OF V"),
    )
    record = record_from_files(*files, tokenizer, as_questions=True)

    def keys(examples: Any) -> tuple[set[Any], set[Any]]:
        asked = {words(example.prompt) for example in examples}
        people = {
            (word, words(example.answer_text))
            for example in examples
            for word in words(example.prompt)
            if word[0] in "wv" and word[1:].isdigit()
        }
        return asked, people

    sides = [(record.forget_attacked, record.forget_heldout)]
    sides.append((record.retain_train, record.retain_test["retain"]))
    for one, other in sides:
        assert one and other
        for mine, theirs in zip(keys(one), keys(other), strict=True):
            assert not mine & theirs


def test_a_file_of_one_fact_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"question": "who is w1", "answer": "w2"}
    forget = _jsonl(tmp_path / "f.jsonl", row, row, row)
    retain = _jsonl(tmp_path / "r.jsonl", {"question": "w3", "answer": "w4"}, {"text": "w5 w6"})
    with pytest.raises(WorkbenchError, match="one fact only"):
        record_from_files(forget, retain, tokenizer)


# --- scripts ------------------------------------------------------------------------------------

FOUND = [
    ("他出生在北京市", "北京"),
    ("彼女は東京で生まれた", "東京"),
    ("เขาเกิดที่กรุงเทพมหานคร", "กรุงเทพ"),
    ("ລາວເກີດຢູ່ວຽງຈັນ", "ວຽງຈັນ"),
    ("Он родился в Москве.", "москве"),
    ("وُلد في القاهرة؟", "القاهرة"),
    ("उसका जन्म दिल्ली में हुआ", "दिल्ली"),
    ("Γεννήθηκε στην Αθήνα·", "αθήνα"),
    ("그는 서울 에서 태어났다", "서울"),
    ("born in Paris.", "paris"),
]
NOT_FOUND = [
    ("Parisian", "paris"),
    ("कि", "क"),
    ("Московский", "Москов"),
    ("5.2", "5"),
    ("1,500", "1"),
    ("กา", "ก่"),
    ("élan", "lan"),
]


@pytest.mark.parametrize(("text", "keyword"), FOUND)
def test_a_keyword_is_found_in_every_script(text: str, keyword: str) -> None:
    assert contains(text, keyword)


@pytest.mark.parametrize(("text", "keyword"), NOT_FOUND)
def test_a_part_of_a_word_is_not_the_word(text: str, keyword: str) -> None:
    assert not contains(text, keyword)


@pytest.mark.parametrize("sign", list("。！？؟।·…」』»\"')."))
def test_punctuation_at_the_end_is_that_of_every_script(sign: str) -> None:
    assert exact_match(f"東京{sign}", "東京") and exact_match(f"«Paris{sign}", "paris")


def test_words_that_tell_two_sets_apart_are_found_without_spaces() -> None:
    ours = [Example(f"他住在北京的{c}区") for c in "东西南北"]
    theirs = [Example(f"她喜欢喝{c}茶") for c in "红绿白黑"]
    assert "北京" in telling_words(ours, theirs, 8)
