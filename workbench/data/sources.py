"""Entries of the files that benchmarks ship, or of their data sets on the hub, with errors that
name file, line and field.
"""

from __future__ import annotations

import ast
import codecs
import difflib
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet

from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief

KINDS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".raw")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@brief
@dataclass(frozen=True, slots=True)
class Row:
    """One entry of a file; its methods read a field or name file, line and field in the error."""

    file: str
    where: str
    fields: Mapping[str, object]

    def _wrong(self, problem: str) -> WorkbenchError:
        return WorkbenchError(f"{self.file} {self.where}: {problem}")

    def _named(self, names: Sequence[str]) -> tuple[str, object]:
        for name in names:
            if name in self.fields:
                return name, self.fields[name]
        wanted = " or ".join(map(repr, names))
        raise self._wrong(
            f"there is no field {wanted}; it has {', '.join(map(repr, self.fields)) or 'none'}"
        )

    def text(self, *names: str) -> str:
        """The first of these fields that is there, as non-empty text without spaces around it."""
        name, value = self._named(names)
        return self._text(name, value)

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._wrong(f"{name!r} must be text and is {_kind(value)}")
        if not value.strip():
            raise self._wrong(f"{name!r} is empty")
        return value.strip()

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of non-empty texts (in a csv file: written as a list)."""
        name, value = self._named(names)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError):
                raise self._wrong(f"{name!r} is no list: {value[:40]!r}") from None
        if not isinstance(value, list) or not value:
            raise self._wrong(f"{name!r} must be a list of texts and is {_kind(value)}")
        return tuple(self._text(name, entry) for entry in value)

    def number(self, name: str, below: int | None = None) -> int:
        """A whole number (in a csv file: its digits)."""
        _, value = self._named((name,))
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(f"{name!r} must be a whole number and is {_kind(value)}")
        if below is not None and not 0 <= value < below:
            raise self._wrong(f"{name!r} is {value} and must lie between 0 and {below - 1}")
        return value


def _kind(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, list) and not value:
        return "an empty list"
    return {
        "str": "text",
        "int": "a number",
        "float": "a number",
        "bool": "true or false",
        "list": "a list",
        "dict": "an object",
    }.get(type(value).__name__, type(value).__name__)


_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def _content(path: Path) -> str:
    """The text of a file, byte for byte; a UTF-8 byte order mark is no part of it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkbenchError(f"cannot read {path}: {error.strerror}") from error
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise WorkbenchError(f"{path} is {encoding}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkbenchError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error


def _loads(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where or f"line {error.lineno}"
        raise WorkbenchError(f"{path} {place} is no JSON: {error.msg}") from error
    except RecursionError as error:
        raise WorkbenchError(f"{path} {where or 'as a whole'} is nested too deeply") from error


def _json(path: Path) -> Iterator[tuple[str, object]]:
    content = _content(path)
    if content.lstrip().startswith("["):
        entries = _loads(content, path, "")
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))
        return
    for number, line in enumerate(
        content.split("\n"), 1
    ):  # not splitlines: a JSON text may hold other line separators
        if line.strip():
            yield f"line {number}", _loads(line, path, f"line {number}")


_BLANK_LINES = re.compile(r"(?:\r?\n[^\S\r\n]*)+\r?\n")


def documents(content: str) -> list[str]:
    """The documents of running text, separated by ``<|endoftext|>`` or else by blank lines; inside
    a document nothing is changed, and line ends around it are no part of it.
    """
    marked = "<|endoftext|>" in content
    parts = content.split("<|endoftext|>") if marked else _BLANK_LINES.split(content)
    return [part.strip("\r\n") for part in parts if part.strip()]


def parse(path: Path) -> Iterator[tuple[str, object]]:
    """The entries of one file, each with the words that say where it stands."""
    if path.suffix not in KINDS:
        raise WorkbenchError(
            f"{path} ends in {path.suffix or 'nothing'!r}; texts are read from {', '.join(KINDS)}"
        )
    if path.suffix in (".json", ".jsonl"):
        yield from _json(path)
    elif path.suffix in (".txt", ".raw"):
        texts = documents(_content(path))
        yield from ((f"document {number}", document) for number, document in enumerate(texts, 1))
    else:
        try:
            if path.suffix in (".csv", ".tsv"):
                read = io.StringIO(_content(path), newline="")
                mark = "," if path.suffix == ".csv" else "\t"
                frame = pd.read_csv(read, dtype=str, keep_default_na=False, sep=mark)
                entries: list[Any] = frame.to_dict("records")
            else:
                entries = pyarrow.parquet.read_table(path).to_pylist()
        except WorkbenchError:
            raise
        except Exception as error:  # every reader has its own
            raise WorkbenchError(
                f"cannot read {path}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        yield from ((f"row {number}", entry) for number, entry in enumerate(entries, 1))


def rows_of(file: str, entries: Iterable[tuple[str, object]]) -> list[Row]:
    """The entries of a file, each with its place; an entry that is no set of fields is an error."""
    rows = []
    for where, entry in entries:
        if isinstance(entry, str):
            entry = {"text": entry}
        if not isinstance(entry, dict):
            raise WorkbenchError(
                f"{file} {where} must be an object or a text and is {_kind(entry)}"
            )
        rows.append(Row(file, where, entry))
    if not rows:
        raise WorkbenchError(f"{file} holds no entry")
    return rows


class Source:
    """A folder of one benchmark, or its data set on the hub. A set has a path in the folder
    (several spellings are known) and a configuration and split on the hub.
    """

    def __init__(self, source: str | Path, benchmark: str) -> None:
        self.benchmark, self.name = benchmark, str(source)
        path = Path(source)
        self.folder = path if path.is_dir() else None
        self._datasets: Any = None
        self._known: dict[str, list[str]] = {}
        if self.folder is None:
            if path.is_file():
                raise WorkbenchError(f"{path} is a file; give the {benchmark} folder that holds it")
            if path.is_absolute() or not _HUB_ID.fullmatch(self.name):
                near = difflib.get_close_matches(
                    path.name,
                    [p.name for p in path.parent.iterdir() if p.is_dir()]
                    if path.parent.is_dir()
                    else [],
                    n=3,
                    cutoff=0.4,
                )
                hint = f"; {path.parent} has {' and '.join(near)}" if near else ""
                raise WorkbenchError(
                    f"there is no folder {path}{hint}; give the {benchmark} folder, or the id of "
                    "the data set on the hub (owner/name)"
                )
            try:
                self._datasets = importlib.import_module("datasets")
            except ImportError as error:
                raise WorkbenchError(
                    f"there is no folder {source}, and reading {source} from the hub needs the "
                    "package 'datasets' (pip install datasets); or download it and give its folder"
                ) from error

    def rows(self, *stems: str, hub: tuple[str, str]) -> list[Row]:
        """The entries of one set that must be there."""
        rows = self.maybe(*stems, hub=hub)
        if rows is None:
            if self.folder is None:
                raise WorkbenchError(
                    f"the hub data set {self.name} has no split {hub[1]!r} of {hub[0]!r}; it has "
                    f"{', '.join(self._configurations())}"
                )
            raise missing_set(self.folder, stems[0], self.benchmark)
        return rows

    def maybe(self, *stems: str, hub: tuple[str, str]) -> list[Row] | None:
        """The entries of one set, or ``None`` where the benchmark comes without it."""
        if self.folder is None:
            return self._from_hub(*hub)
        for stem in stems:
            files = files_of(self.folder, stem)
            if files:
                return [row for file in files for row in rows_of(str(file), parse(file))]
        return None

    def _configurations(self) -> list[str]:
        if "" not in self._known:
            self._known[""] = self._ask(lambda: self._datasets.get_dataset_config_names(self.name))
        return self._known[""]

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:  # network, permission, unknown id: all of them the user's to see
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WorkbenchError(
                f"there is no folder {self.name}, and the hub data set {self.name} cannot be read: "
                f"{reason}"
            ) from error

    def _from_hub(self, configuration: str, split: str) -> list[Row] | None:
        if configuration not in self._configurations():
            return None
        if configuration not in self._known:
            self._known[configuration] = self._ask(
                lambda: self._datasets.get_dataset_split_names(self.name, configuration)
            )
        if split not in self._known[configuration]:
            return None
        entries = self._ask(
            lambda: list(self._datasets.load_dataset(self.name, configuration, split=split))
        )
        return rows_of(
            f"{self.name} ({configuration}, {split})",
            ((f"row {number}", entry) for number, entry in enumerate(entries, 1)),
        )


def files_of(folder: Path, stem: str) -> list[Path]:
    """The file of a set, or its shards."""
    for kind in KINDS:
        if (folder / (stem + kind)).is_file():
            return [folder / (stem + kind)]
        shards = sorted(folder.glob(f"{stem}-*-of-*{kind}"))
        if shards:
            return shards
    return []


def _alike(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def missing_set(folder: Path, stem: str, benchmark: str) -> WorkbenchError:
    """The error for a set without a file: it names the files with the nearest names."""
    present_files = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in KINDS and path.is_file()
    )
    near = sorted(
        present_files,
        key=lambda name: (
            -_alike(stem, name),
            -difflib.SequenceMatcher(None, stem, name).ratio(),
            name,
        ),
    )[:3]
    hint = (
        f"the nearest there are {', '.join(near)}"
        if near
        else "it holds no json, jsonl, parquet, csv or txt file"
    )
    return WorkbenchError(
        f"the {benchmark} folder {folder} has no {stem} ({', '.join(KINDS)}); {hint}"
    )
