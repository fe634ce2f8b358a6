"""The one exception that means: the input was wrong, and here is what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkbenchError(Exception):
    """Bad input or an impossible request. The message is one line that names the thing and the
    remedy; the command line exits with status 2.
    """


class NotMeasuredError(WorkbenchError):
    """What was asked for was not measured in this run; the message says what is missing."""


def unknown(kind: str, name: str, known: Iterable[str]) -> WorkbenchError:
    """The error for a name that does not exist; it lists the nearest names that do.

    Args:
        kind: what was asked for, e.g. ``"method"``.
        name: what the user wrote.
        known: every name that exists.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"
    return WorkbenchError(f"unknown {kind} {name!r}: {hint}")
