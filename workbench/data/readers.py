"""Read a user's texts: ``.txt``, or ``.jsonl`` / ``.json`` with ``text`` or ``question`` and ``answer`` fields."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from workbench.data.records import Example, ForgetRetain
from workbench.errors import WorkbenchError

_WORD = re.compile(r"[^\W\d_][\w'’-]*")


def read_examples(path: str | Path) -> list[Example]:
    """The texts of one file.

    ``.txt``: documents are separated by ``<|endoftext|>``, or else by blank lines. ``.jsonl``: one JSON object per line (a JSON array is read as well), with ``text``, or with
    ``question`` and ``answer``; the answer's place in the text is kept.

    Raises:
        WorkbenchError: the file is missing, unreadable, empty, of another kind, or a line lacks the fields (the message names the line).
    """
    path = Path(path)
    if not path.is_file():
        raise WorkbenchError(f"there is no file {path}; give a .txt or .jsonl file")
    if path.suffix not in (".txt", ".jsonl", ".json", ".raw"):
        raise WorkbenchError(
            f"{path} ends in {path.suffix or 'nothing'!r}; give a .txt file, or a .jsonl file with 'text' or 'question' and 'answer' fields"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WorkbenchError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    except OSError as error:
        raise WorkbenchError(f"cannot read {path}: {error.strerror}") from error
    examples = (
        _from_json(path, content) if path.suffix in (".jsonl", ".json") else _from_text(content)
    )
    if not examples:
        raise WorkbenchError(f"{path} holds no text; give at least one document")
    return examples


def _from_text(content: str) -> list[Example]:
    separator = r"<\|endoftext\|>" if "<|endoftext|>" in content else r"\n\s*\n"
    documents = [" ".join(part.split()) for part in re.split(separator, content)]
    return [
        Example(document, item=f"text/{number}")
        for number, document in enumerate(filter(None, documents))
    ]


def _from_json(path: Path, content: str) -> list[Example]:
    if content.lstrip().startswith("["):
        try:
            loaded = json.loads(content)
        except json.JSONDecodeError as error:
            raise WorkbenchError(f"{path} line {error.lineno} is no JSON: {error.msg}") from error
        records = [(f"entry {number}", record) for number, record in enumerate(loaded, 1)]
    else:
        records = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    records.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise WorkbenchError(f"{path} line {number} is no JSON: {error.msg}") from error
    return [_example(path, where, record, number) for number, (where, record) in enumerate(records)]


def _example(path: Path, where: str, record: object, number: int) -> Example:
    if isinstance(record, dict):
        question, answer, text = (record.get(name) for name in ("question", "answer", "text"))
        if (
            isinstance(question, str)
            and isinstance(answer, str)
            and question.strip()
            and answer.strip()
        ):
            prompt, answer = f"Question: {question.strip()}\nAnswer: ", answer.strip()
            return Example(
                prompt + answer, (len(prompt), len(prompt) + len(answer)), item=f"question/{number}"
            )
        if isinstance(text, str) and text.strip():
            return Example(" ".join(text.split()), item=f"text/{number}")
        seen = ", ".join(map(repr, record)) or "no field"
    else:
        seen = type(record).__name__
    raise WorkbenchError(
        f"{path} {where} needs a non-empty 'text', or 'question' and 'answer', as strings; it has {seen}"
    )


def windows(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_tokens: int, limit: int
) -> list[Example]:
    """Running text in pieces of at most ``max_tokens`` tokens, questions as they are; at most ``limit`` pieces, taken evenly over the file.

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
            text = example.text[part[0][0] : part[-1][1]].strip()
            if text:
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
    """Running text as a question: its second half (from a word boundary) is the answer, so that its probability can be measured. Questions stay as they are."""
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


def _odds(texts: Sequence[Example], others: Sequence[Example]) -> dict[str, float]:
    """Log-odds of every word's document frequency in ``texts`` against ``others`` (add one half); words of one or two letters and words seen once are left out."""
    ours = Counter(word for example in texts for word in set(_WORD.findall(example.text)))
    theirs = Counter(word for example in others for word in set(_WORD.findall(example.text)))
    repeated = [word for word, n in ours.items() if n >= 2 and len(word) >= 3] or list(ours)
    return {
        word: math.log(
            ((ours[word] + 0.5) / (len(texts) + 1)) / ((theirs[word] + 0.5) / (len(others) + 1))
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
) -> ForgetRetain:
    """The record of two files.

    Args:
        forget: texts to forget; alternate ones form the attacker's half and the held-out half.
        retain: texts to keep.
        tokenizer: splits long texts.
        max_tokens: length of a piece.
        limit: pieces per file.
        as_questions: turn running text into prompt and continuation (see :func:`continuation`).

    Raises:
        WorkbenchError: a file is wrong (see :func:`read_examples`), or there are fewer than two pieces in one.
    """
    sets = {}
    for name, path in (("forget", forget), ("retain", retain)):
        found = windows(tokenizer, read_examples(path), max_tokens, limit)
        if len(found) < 2:
            raise WorkbenchError(
                f"{path} is too short: {len(found)} piece(s) of text, and the {name} set needs at least 2 (one half is held out)"
            )
        sets[name] = [continuation(example) for example in found] if as_questions else found
    shared = {example.text for example in sets["forget"]} & {
        example.text for example in sets["retain"]
    }
    if shared:
        raise WorkbenchError(
            f"{len(shared)} text(s) stand in both {forget} and {retain}, e.g. {min(shared)[:60]!r}; a text is either to be forgotten or to be kept"
        )
    return ForgetRetain(
        name=f"{forget.name} against {retain.name}",
        forget_attacked=tuple(sets["forget"][0::2]),
        forget_heldout=tuple(sets["forget"][1::2]),
        retain={"retain": tuple(sets["retain"])},
        general="",
        forget_tokens=telling_words(sets["forget"], sets["retain"], 12),
        retain_tokens=telling_words(sets["retain"], sets["forget"], 12),
    )
