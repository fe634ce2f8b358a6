"""Read a user's texts: running text, or rows with the columns that published data sets use."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from workbench.data.records import Example, ForgetRetain, alternate
from workbench.data.sources import Row, parse, rows_of
from workbench.data.words import unspaced, words
from workbench.errors import WorkbenchError, unknown

_WORD = re.compile(r"[^\W\d_][\w'’-]*")


PAIRS = (
    ("question", "answer"),
    ("query", "answer"),
    ("query", "response"),
    ("instruction", "output"),
)
"""Columns of questions and answers in published data sets; read as ``Question: ...\\nAnswer: ...``.
"""
CONTINUED = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("text", "answer"),
    ("text", "labels"),
)
"""Columns of a text and what follows it; read as the two in a row."""
CHATS = ("messages", "conversations")
"""Columns of a conversation."""
_ROLES = {"human": "user", "gpt": "assistant"}  # of the data sets that call them "from" and "value"


def read_examples(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat: bool = False,
) -> list[Example]:
    r"""The texts of one file, byte for byte.

    ``.txt``: documents are separated by ``<|endoftext|>``, or else by blank lines. ``.jsonl``,
    ``.json`` (lines or an array), ``.csv``, ``.tsv`` and ``.parquet``: one text a row, in the
    columns that published data sets use (:data:`PAIRS`, :data:`CONTINUED`, :data:`CHATS`,
    ``text``).

    Args:
        path: the file.
        columns: which columns to read where the names are others: ``{"question": ..., "answer":
            ...}`` or ``{"text": ...}``.
        tokenizer: renders conversations with its chat template.
        chat: render questions and answers as conversations too.

    Raises:
        WorkbenchError: the file is missing, unreadable, empty, of another kind, or a row lacks the
            columns (the message names the row and the columns that it has); a conversation without
            a chat template.
    """
    path = Path(path)
    if not path.is_file():
        raise WorkbenchError(f"there is no file {path}; give a .txt, .jsonl, .csv or .parquet file")
    for key in columns or {}:
        if key not in ("question", "answer", "text"):
            raise unknown("kind of column", key, ("question", "answer", "text"))
    entries = list(parse(path))
    if not entries:
        raise WorkbenchError(f"{path} holds no text; give at least one document")
    rows = rows_of(str(path), entries)
    examples = [_example(row, number, columns, tokenizer, chat) for number, row in enumerate(rows)]
    for row, example in zip(rows, examples, strict=True):
        if not example.text.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in example.text):
            raise WorkbenchError(f"{path} {row.where} holds half a character (a lone surrogate)")
    return same_facts(examples)


def _example(
    row: Row,
    number: int,
    columns: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    chat: bool,
) -> Example:
    if columns is not None:
        fields = {key: row.text(name) for key, name in columns.items()}
        row = Row(row.file, row.where, fields)
    has = {name for name, value in row.fields.items() if isinstance(value, str) and value.strip()}
    for name in CHATS:
        if name in row.fields:
            return _conversation(row, name, number, tokenizer)
    for question, answer in PAIRS:
        if {question, answer} <= has:
            asked, said = row.text(question), row.text(answer)
            if question == "instruction" and "input" in has:
                asked += "\n" + row.text("input")
            if chat:
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
                return _rendered(row, turns, number, tokenizer)
            prompt = f"Question: {asked}\nAnswer: "
            span = (len(prompt), len(prompt) + len(said))
            return Example(prompt + said, span, item=f"question/{number}")
    for first, second in CONTINUED:
        if {first, second} <= has:
            start, end = str(row.fields[first]), str(row.fields[second])
            if not start[-1].isspace() and not end[0].isspace():
                start += " "
            return Example(start + end, (len(start), len(start + end)), item=f"question/{number}")
    others = set(row.fields) - {"text", "id", "source", "meta", "metadata"}
    if "text" in has and not others & {"answer", "labels", "label", "completion", "response"}:
        return Example(str(row.fields["text"]), item=f"text/{number}")
    field_names = ", ".join(map(repr, row.fields)) or "no field"
    raise WorkbenchError(
        f"{row.file} {row.where} needs a non-empty 'text', or 'question' and 'answer', as strings; "
        f"it has {field_names}: name the columns, e.g. --columns question=...,answer=... or "
        "--columns text=..."
    )


def _conversation(
    row: Row, name: str, number: int, tokenizer: PreTrainedTokenizerBase | None
) -> Example:
    turns = []
    messages = row.fields[name]
    for turn in messages if isinstance(messages, list) else [None]:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise WorkbenchError(
                f"{row.file} {row.where}: {name!r} must be a list of turns with 'role' and "
                "'content'"
            )
        turns.append({"role": _ROLES.get(role, role), "content": content})
    if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise WorkbenchError(
            f"{row.file} {row.where}: the last turn of {name!r} must be the assistant's answer"
        )
    return _rendered(row, turns, number, tokenizer)


def _rendered(
    row: Row,
    turns: list[dict[str, str]],
    number: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Example:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise WorkbenchError(
            f"{row.file} {row.where} is a conversation, and the tokenizer has no chat template; "
            "give a model with one, or columns of plain text (--columns question=...,answer=...)"
        )
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template may raise whatever it likes
        raise WorkbenchError(
            f"{row.file} {row.where} does not fit the chat template: {str(error).splitlines()[0]}"
        ) from error
    answer = turns[-1]["content"].strip()
    start = text.rfind(answer)
    if start < 0:
        raise WorkbenchError(f"{row.file} {row.where}: the chat template changes the answer")
    return Example(text, (start, start + len(answer)), item=f"question/{number}")


def same_facts(examples: Sequence[Example]) -> list[Example]:
    """The same texts, those of one fact under one item, so that halves and intervals go by facts.

    Two texts are one fact where their words are the same (questions without their answers); or
    where their answers are the same and their questions share a word that at most half of all
    questions hold: the same thing asked of the same subject in other words.
    """
    prompt_words = [words(example.prompt) for example in examples]
    answers = [words(example.answer_text) for example in examples]
    spread = Counter(word for question in set(prompt_words) for word in set(question))
    most = len(set(prompt_words)) / 2
    leader: dict[object, int] = {}
    parent = list(range(len(examples)))

    def find(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for number, (question, answer) in enumerate(zip(prompt_words, answers, strict=True)):
        keys: list[object] = [("asked", question)] if question else []
        keys += [("answer", answer, w) for w in set(question) if answer and spread[w] <= most]
        for key in keys:
            parent[find(number)] = find(leader.setdefault(key, number))
    first = [find(number) for number in range(len(examples))]
    return [
        replace(example, item=examples[one].item)
        for example, one in zip(examples, first, strict=True)
    ]


def windows(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_tokens: int, limit: int
) -> list[Example]:
    """Running text in pieces of at most ``max_tokens`` tokens, questions as they are; at most
    ``limit`` pieces, taken evenly over the file.

    Pieces shorter than 8 tokens are dropped, unless nothing else is left.
    """
    pieces: list[Example] = []
    short: list[Example] = []
    for example in examples:
        if example.answer is not None:
            pieces.append(example)
            continue
        offsets = tokenizer(
            example.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        for start in range(0, len(offsets), max_tokens - 2):
            part = offsets[start : start + max_tokens - 2]
            # the first piece begins where the text does: offsets leave leading white space out
            text = example.text[part[0][0] if start else 0 : part[-1][1]]
            if text.strip():
                (pieces if len(part) >= 8 else short).append(
                    Example(text, item=f"{example.item}/{start}")
                )
    pieces = pieces or short
    if len(pieces) <= limit:
        return pieces
    return (
        [pieces[round(i * (len(pieces) - 1) / (limit - 1))] for i in range(limit)]
        if limit > 1
        else pieces[:1]
    )


def continuation(example: Example) -> Example:
    """Running text as a question: its second half (from a word boundary) is the answer, so that its
    probability can be measured. Questions stay as they are.
    """
    if example.answer is not None:
        return example
    middle = example.text.find(" ", len(example.text) // 2)
    start = middle + 1 if 0 <= middle < len(example.text) - 1 else max(1, len(example.text) // 2)
    return Example(
        example.text,
        (min(start, len(example.text) - 1), len(example.text)),
        example.subject,
        example.item,
    )


def _candidates(text: str) -> Iterator[str]:
    """Words as they are written; of scripts without spaces every pair of neighbouring
    characters.
    """
    for run in _WORD.findall(text):
        if unspaced(run):
            yield from (run[start : start + 2] for start in range(len(run) - 1))
        else:
            yield run


def _odds(texts: Sequence[Example], others: Sequence[Example]) -> dict[str, float]:
    """Log-odds of every word's document frequency in ``texts`` against ``others`` (add one half);
    words of one or two letters and words seen once are left out.
    """
    ours = Counter(word for example in texts for word in set(_candidates(example.text)))
    other_counts = Counter(word for example in others for word in set(_candidates(example.text)))
    repeated = [
        word for word, n in ours.items() if n >= 2 and (len(word) >= 3 or unspaced(word))
    ] or list(ours)
    return {
        word: math.log(
            ((ours[word] + 0.5) / (len(texts) + 1))
            / ((other_counts[word] + 0.5) / (len(others) + 1))
        )
        for word in repeated
    }


def telling_words(
    texts: Sequence[Example], others: Sequence[Example], count: int
) -> tuple[str, ...]:
    """The words that tell ``texts`` from ``others`` best, best first."""
    odds = _odds(texts, others)
    return tuple(sorted(odds, key=lambda word: (-odds[word], word))[:count])


def neutral_words(
    texts: Sequence[Example], others: Sequence[Example], count: int
) -> tuple[str, ...]:
    """The words that stand in both sets about equally often, most even first."""
    odds = _odds(texts, others)
    return tuple(sorted(odds, key=lambda word: (abs(odds[word]), word))[:count])


def record_from_files(
    forget: Path,
    retain: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 128,
    limit: int = 256,
    as_questions: bool = False,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
) -> ForgetRetain:
    """The record of two files.

    Args:
        forget: texts to forget; alternate facts form the attacker's half and the held-out half.
        retain: texts to keep.
        tokenizer: splits long texts.
        max_tokens: length of a piece.
        limit: pieces per file.
        columns: see :func:`read_examples`.
        chat: see :func:`read_examples`.
        as_questions: turn running text into prompt and continuation (see :func:`continuation`).

    Raises:
        WorkbenchError: a file is wrong (see :func:`read_examples`), or there are fewer than two
            pieces in one.
    """
    sets = {}
    for name, path in (("forget", forget), ("retain", retain)):
        examples = windows(
            tokenizer,
            read_examples(path, columns=columns, tokenizer=tokenizer, chat=chat),
            max_tokens,
            limit,
        )
        if len(examples) < 2:
            raise WorkbenchError(
                f"{path} is too short: {len(examples)} piece(s) of text, and the {name} set needs "
                "at least 2 (one half is held out)"
            )
        examples = same_facts(examples)
        if len({example.item for example in examples}) < 2:
            raise WorkbenchError(
                f"{path} holds one fact only ({len(examples)} texts say the same); the {name} set "
                "needs at least 2, since no fact may stand in both halves"
            )
        sets[name] = [continuation(example) for example in examples] if as_questions else examples
    shared = {example.text for example in sets["forget"]} & {
        example.text for example in sets["retain"]
    }
    if shared:
        raise WorkbenchError(
            f"{len(shared)} text(s) stand in both {forget} and {retain}, e.g. "
            f"{min(shared)[:60]!r}; a text is either to be forgotten or to be kept"
        )
    attacked, heldout = alternate(sets["forget"])
    return ForgetRetain(
        name=f"{forget.name} against {retain.name}",
        forget_attacked=attacked,
        forget_heldout=heldout,
        retain={"retain": tuple(sets["retain"])},
        general="",
        forget_tokens=telling_words(sets["forget"], sets["retain"], 12),
        retain_tokens=telling_words(sets["retain"], sets["forget"], 12),
    )
