"""Checks of single values, written once: every option, field and keyword that holds a number, a seed
or a label goes through these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from workbench.errors import WorkbenchError

MOST_STEPS = 10_000_000
MOST_ROWS = 1_000_000
LARGEST_RATE = 1e18
"""Beyond it the product of two weights after one step leaves float32, whatever the gradient."""
LARGEST = 1e12
LARGEST_SEED = 2**63 - 1


class WrongValueError(WorkbenchError, ValueError):
    """A value that cannot be meant; the message names the field, the value and what would be right."""


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    low: float = -LARGEST,
    high: float = LARGEST,
) -> float:
    """``value`` as a finite number in ``[low, high]``, and greater than ``above`` where that is given.

    >>> number("budget", 0.05, above=0)
    0.05

    Raises:
        WrongValueError: it is none.
    """
    given = isinstance(value, int | float) and not isinstance(value, bool)
    found = float(value) if given and abs(value) < 2.0**1000 else math.nan  # type: ignore
    if not low <= found <= high or (above is not None and not found > above):
        least = f"above {above:g}" if above is not None else f"of at least {low:g}"
        raise WrongValueError(
            f"{name} is {value!r}; give a finite number {least}, at most {high:g}"
        )
    return found


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
    ordered = all(one < other for one, other in pairwise(values))
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
    seen: dict[str, str] = {}
    for name in names:
        folded = name.casefold()
        if folded in reserved:
            raise WrongValueError(
                f"{what} {name!r} is a name with a meaning of its own; take another"
            )
        if folded in seen:
            raise WrongValueError(
                f"{what} {name!r} and {seen[folded]!r} would share one folder; rename one"
            )
        seen[folded] = name
