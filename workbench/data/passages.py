"""The verbatim case of benign relearning: a book cut into passages, and the sets of passages that
are asked for, attacked with, kept and never read.

Hu et al., *Unlearning or Obfuscating?* (ICLR 2025, arXiv 2406.13356), verbatim memorisation: a
model memorises an excerpt and unlearns it, and is asked to continue 15 chunks of 80 words of it
after their first half. No set here holds five words in a row of a continuation that is asked for:
what comes back must come from the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from workbench.data.records import Example
from workbench.data.words import words
from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief

RUN = 5
"""As many words in a row of a continuation give it away (as in
:func:`workbench.attacks.leaks.leak_report`).
"""


@brief
@dataclass(frozen=True, slots=True)
class PassageSplit:
    """The sets of one verbatim experiment. Every passage is an example whose second half is its
    answer.

    Attributes:
        queried: passages to be forgotten whose continuations are asked for.
        attacker: other passages to be forgotten, neighbours of the queried ones: the attacker's
            texts.
        dropped: passages to be forgotten that are neither asked for nor given to the attacker,
            because they hold words of a queried continuation.
        retain: passages of another part of the book that every model learns.
        unread: passages of a third part that no model has read.

    Raises:
        WorkbenchError: a set other than ``dropped`` is empty, a passage is in two sets, or a
            passage of ``attacker``, ``retain`` or ``unread`` holds :data:`RUN` words in a row of a
            queried continuation.
    """

    queried: tuple[Example, ...]
    attacker: tuple[Example, ...]
    dropped: tuple[Example, ...]
    retain: tuple[Example, ...]
    unread: tuple[Example, ...]

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        queried_runs = runs_of(self.queried)
        for name in ("queried", "attacker", "dropped", "retain", "unread"):
            passages: tuple[Example, ...] = getattr(self, name)
            if not passages and name != "dropped":
                raise WorkbenchError(
                    f"the set of {name} passages is empty; give a longer text, or one that repeats "
                    "itself less"
                )
            for passage in passages:
                if owner.setdefault(passage.item, name) != name:
                    raise WorkbenchError(
                        f"{passage.item} is in two sets, {owner[passage.item]} and {name}; a "
                        "passage belongs to one set"
                    )
                if (
                    name not in ("queried", "dropped")
                    and runs_of([passage], whole=True) & queried_runs
                ):
                    excerpt = passage.text[:60]
                    raise WorkbenchError(
                        f"{name} passage {passage.item} ({excerpt!r}) holds {RUN} words in a row "
                        "of a queried continuation; the sets must not overlap"
                    )

    @property
    def forget(self) -> tuple[Example, ...]:
        """Everything that is to be forgotten."""
        return self.queried + self.attacker + self.dropped


def runs_of(passages: Iterable[Example], *, whole: bool = False) -> set[tuple[str, ...]]:
    """Every :data:`RUN` words in a row of the continuations of ``passages``, or of the whole
    passages; case and Unicode form ignored.
    """
    runs: set[tuple[str, ...]] = set()
    for passage in passages:
        spoken = words(passage.text if whole else passage.answer_text)
        runs |= {spoken[start : start + RUN] for start in range(len(spoken) - RUN + 1)}
    return runs


def cut(text: str, length: int, *, item: str = "passage") -> tuple[Example, ...]:
    """A text in passages of ``length`` words, one after another; the second half of each is its
    answer. White space becomes single spaces; a shorter rest is dropped.

    Args:
        text: running text.
        length: words of a passage, as white space parts them; the first ``length // 2`` are the
            prompt.
        item: passages are called ``{item}/0``, ``{item}/1``, ...

    Raises:
        WorkbenchError: a continuation would be shorter than :data:`RUN` words, or the text than one
            passage.
    """
    if length < 2 * RUN:
        raise WorkbenchError(
            f"a passage has {length} words; it needs at least {2 * RUN}, because {RUN} words in a "
            "row count as verbatim"
        )
    spoken = text.split()
    if len(spoken) < length:
        raise WorkbenchError(
            f"the text has {len(spoken)} words, fewer than one passage of {length}; give a longer "
            "one"
        )
    passages = []
    for number in range(len(spoken) // length):
        part = spoken[number * length : (number + 1) * length]
        prompt, passage = " ".join(part[: length // 2]) + " ", " ".join(part)
        passages.append(Example(passage, (len(prompt), len(passage)), item=f"{item}/{number}"))
    return tuple(passages)


def passage_split(
    passages: Sequence[Example], *, forget: int, retain: int, unread: int
) -> PassageSplit:
    """The sets of an experiment, from the passages of a book in their order.

    The first ``forget`` passages are to be forgotten; every second of them is queried, the others
    are the attacker's (so that he holds what stands just before and just behind of what is asked
    for). ``retain`` passages are taken from the second third of the book and ``unread`` from the
    last. A passage that holds :data:`RUN` words in a row of a queried continuation is passed over;
    one among the attacker's is ``dropped``.

    Raises:
        WorkbenchError: the book is too short or repeats itself too much, or fewer than two passages
            are to be forgotten, or none kept or left unread.
    """
    if forget < 2 or retain < 1 or unread < 1:
        raise WorkbenchError(
            f"a split needs at least 2 passages to forget, 1 to retain and 1 unread; got {forget}, "
            f"{retain} and {unread}"
        )
    third = len(passages) // 3
    if third < max(forget, retain, unread):
        raise WorkbenchError(
            f"the text gives {len(passages)} passages, {third} in each third; {forget} to forget, "
            f"{retain} to retain and {unread} unread are taken from one third each: give a longer "
            "text, shorter passages or fewer of them"
        )
    queried = tuple(passages[0:forget:2])
    queried_runs = runs_of(queried)

    def clean(passage: Example) -> bool:
        return not runs_of([passage], whole=True) & queried_runs

    others = passages[1:forget:2]
    sets = {}
    for name, count, part in (
        ("retain", retain, passages[third : 2 * third]),
        ("unread", unread, passages[2 * third :]),
    ):
        sets[name] = tuple(islice(filter(clean, part), count))
        if len(sets[name]) < count:
            raise WorkbenchError(
                f"only {len(sets[name])} of the {count} {name} passages hold no {RUN} words in a "
                "row of a queried continuation; give a text that repeats itself less"
            )
    return PassageSplit(
        queried,
        tuple(filter(clean, others)),
        tuple(passage for passage in others if not clean(passage)),
        sets["retain"],
        sets["unread"],
    )


def running(passages: Iterable[Example]) -> tuple[Example, ...]:
    """The same passages as running text without an answer, so that every word counts."""
    return tuple(replace(passage, answer=None) for passage in passages)
