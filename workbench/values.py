"""Checks of single values, written once: every option, field and keyword that holds a number, a
seed or a label goes through these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, get_args, get_origin

from workbench.errors import WorkbenchError, unknown

MOST_STEPS = 10_000_000
MOST_ROWS = 1_000_000
LARGEST_RATE = 1e18
"""Beyond it the product of two weights after one step leaves float32, whatever the gradient."""
LARGEST = 1e12
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Whole:
    """What an annotated setting may be: a whole number in ``[low, high]``."""

    low: int = 0
    high: int = MOST_STEPS


@dataclass(frozen=True)
class Number:
    """What an annotated setting may be: a finite number in ``[low, high]``."""

    low: float = 0.0
    high: float = LARGEST


@dataclass(frozen=True)
class Word:
    """What an annotated setting may be: one of some words."""

    words: tuple[str, ...]


class WrongValueError(WorkbenchError, ValueError):
    """A value that cannot be meant; the message names the field, the value and what would be
    right.
    """


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    low: float = -LARGEST,
    high: float = LARGEST,
) -> float:
    """``value`` as a finite number in ``[low, high]``, and greater than ``above`` where that is
    given.

    >>> number("budget", 0.05, above=0)
    0.05

    Raises:
        WrongValueError: it is none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    converted = float(value) if is_number and abs(value) < 2.0**1000 else math.nan  # type: ignore
    if not low <= converted <= high or (above is not None and not converted > above):
        least = f"above {above:g}" if above is not None else f"of at least {low:g}"
        raise WrongValueError(
            f"{name} is {value!r}; give a finite number {least}, at most {high:g}"
        )
    return converted


def allowed(kind: object) -> Whole | Number | Word | None:
    """What the type of a setting allows: as its annotation says; else a whole number from 0 for
    ``int``, a number from 0 for ``float``, the words of a ``Literal``; anything for the rest.

    >>> allowed(int)
    Whole(low=0, high=10000000)
    """
    for note in getattr(kind, "__metadata__", ()):
        if isinstance(note, Whole | Number | Word):
            return note
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return Word(get_args(kind))
    return Whole() if kind is int else Number() if kind is float else None


def setting(key: str, owner: str, kind: object, value: object) -> float | str:
    """``value`` as the setting ``key`` of ``owner``, of the annotated type ``kind``.

    Raises:
        WrongValueError: it is not what the type allows.
    """
    name, may = f"setting {key} of {owner}", allowed(kind)
    wordy = isinstance(may, Word) or may is None
    if isinstance(value, bool) or isinstance(value, str) != wordy:
        raise WrongValueError(
            f"{name} is {value!r}; it must be {'a word' if wordy else 'a number'}"
        )
    if isinstance(may, Whole):
        return whole(name, value, low=may.low, high=may.high)
    if isinstance(may, Number):
        number(name, value, low=may.low, high=may.high)
    elif isinstance(may, Word) and value not in may.words:
        raise WrongValueError(str(unknown(f"{key} of {owner}", str(value), may.words)))
    return value  # type: ignore[return-value]


def rate(name: str, value: object) -> float:
    """``value`` as a learning rate: above 0, at most :data:`LARGEST_RATE`."""
    return number(name, value, above=0, low=0, high=LARGEST_RATE)


def share(name: str, value: object) -> float:
    """``value`` as a share in ``[0, 1]``."""
    return number(name, value, low=0, high=1)


def whole(name: str, value: object, *, low: int = 0, high: int = MOST_STEPS) -> int:
    """``value`` as a whole number in ``[low, high]`` (``4.0`` is one).

    >>> whole("steps", 40, low=1)
    40

    Raises:
        WrongValueError: it is none.
    """
    number(name, value)
    if not float(value).is_integer() or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise WrongValueError(
            f"{name} is {value!r}; it must be a whole number of at least {low} and at most {high}"
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def steps(name: str, value: object, *, low: int = 1) -> int:
    """``value`` as a number of steps."""
    return whole(name, value, low=low, high=MOST_STEPS)


def rows(name: str, value: object) -> int:
    """``value`` as a number of rows in a batch."""
    return whole(name, value, low=1, high=MOST_ROWS)


def seed(name: str, value: object) -> int:
    """``value`` as a seed: what every random generator here takes.

    Raises:
        WrongValueError: it is no whole number, negative, or 2^63 and more.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_SEED:
        raise WrongValueError(f"{name} is {value!r}; give a whole number from 0 to 2^63 - 1")
    return value


def increasing(name: str, values: Sequence[int], *, start: int, end: int) -> None:
    """Raise unless ``values`` rise strictly from ``start`` to ``end``.

    Raises:
        WrongValueError: they do not.
    """
    ordered = all(lower < upper for lower, upper in pairwise(values))
    if not values or values[0] != start or values[-1] != end or not ordered:
        raise WrongValueError(
            f"{name} is {tuple(values)}; it must rise strictly, start at {start} and end at {end}"
        )


def labels(what: str, names: Iterable[str], *, taken: Iterable[str] = ()) -> None:
    """Raise where two labels, or a label and a name that is taken, would be one folder.

    Raises:
        WrongValueError: they differ in nothing, or in upper and lower case only.
    """
    reserved = {name.casefold() for name in taken}
    name_of_folded: dict[str, str] = {}
    for name in names:
        folded = name.casefold()
        if folded in reserved:
            raise WrongValueError(
                f"{what} {name!r} is a name with a meaning of its own; take another"
            )
        if folded in name_of_folded:
            raise WrongValueError(
                f"{what} {name!r} and {name_of_folded[folded]!r} would share one folder; rename one"
            )
        name_of_folded[folded] = name
