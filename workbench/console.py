"""What all commands share: where they speak, how they show results, options that mean the same
everywhere.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from workbench.errors import WorkbenchError

out_console = Console(markup=False)
"""Paths, labels and texts are never markup."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Throw away the run that is already in the folder.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default one per core.")]

Columns = Annotated[
    str,
    typer.Option(
        metavar="question=NAME,answer=NAME",
        help="Columns to read, where the files name them otherwise; or text=NAME.",
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Render questions and answers with the model's chat template."),
]


def named_columns(given: str) -> dict[str, str] | None:
    """``question=NAME,answer=NAME`` as a mapping; nothing given is ``None``.

    Raises:
        WorkbenchError: it reads otherwise.
    """
    if not given:
        return None
    columns = dict(part.partition("=")[::2] for part in given.split(","))
    if not all(columns.values()) or "" in columns:
        raise WorkbenchError(
            f"--columns {given!r} must read question=NAME,answer=NAME or text=NAME"
        )
    return columns


def say(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr, flush=True)


def emit(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Print the result: as one JSON object, or for people."""
    if as_json:
        print(json.dumps(value, default=str))
    else:
        show()


def clock() -> Callable[[str], None]:
    """Announcements with the seconds since now."""
    start = time.monotonic()
    return lambda message: say(f"[{time.monotonic() - start:5.0f} s] {message}")


def print_frame(frame: Any) -> None:
    """A table for people: as wide as the terminal, or as it needs to be where nobody's terminal is
    in the way (a pipe, a log).
    """
    table = RichTable(*map(escape, map(str, frame.columns)), box=None)
    for row in frame.itertuples(index=False):
        table.add_row(*map(escape, map(str, row)))
    wide = Console(width=10_000)
    console = (
        out_console
        if out_console.is_terminal
        else Console(width=max(1, wide.measure(table).maximum))
    )
    console.print(table)
