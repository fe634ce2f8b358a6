"""What a text is to the workbench: a string, the span of its answer, and who it is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief


@brief
@dataclass(frozen=True, slots=True)
class Example:
    """One text.

    Attributes:
        text: the whole text, without special tokens.
        answer: ``(start, end)`` character offsets of the answer inside ``text``, or ``None`` for
            running text.
        subject: ``(start, end)`` character offsets of the subject inside ``text``, or ``None``.
        item: name of the fact. Paraphrases of one fact share it; statistics resample whole facts.
    """

    text: str
    answer: tuple[int, int] | None = None
    subject: tuple[int, int] | None = None
    item: str = ""

    def __post_init__(self) -> None:
        for name, span in (("answer", self.answer), ("subject", self.subject)):
            if span is not None and not 0 <= span[0] < span[1] <= len(self.text):
                raise ValueError(
                    f"{name} span {span} does not lie inside a text of {len(self.text)} "
                    f"characters: {self.text!r}"
                )

    @property
    def prompt(self) -> str:
        """The text before the answer (the whole text where there is no answer)."""
        return self.text if self.answer is None else self.text[: self.answer[0]]

    @property
    def answer_text(self) -> str:
        """The answer itself, or an empty string."""
        return "" if self.answer is None else self.text[self.answer[0] : self.answer[1]]

    @property
    def subject_text(self) -> str:
        """The subject itself, or an empty string."""
        return "" if self.subject is None else self.text[self.subject[0] : self.subject[1]]


Texts = Sequence[Example] | Sequence[str]
"""Examples, or plain strings, which stand for running text."""


def examples_of(texts: Texts) -> tuple[Example, ...]:
    """Texts as examples: a plain string is running text and a fact of its own.

    Raises:
        WorkbenchError: it is one string and no sequence of texts, or holds something else.

    Example:
        >>> examples_of(["One text.", "Another."])[1].item
        'text/1'
    """
    if isinstance(texts, str):
        raise WorkbenchError(f"one string where texts are meant: {texts[:60]!r}; give [text, ...]")
    examples = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            examples.append(Example(text, item=f"text/{number}"))
        elif isinstance(text, Example):
            examples.append(text)
        else:
            raise WorkbenchError(
                f"a text must be a string or an Example; {text!r:.60} is {type(text).__name__}"
            )
    return tuple(examples)


def group_of(example: Example) -> str:
    """Whom an item belongs to: the first two parts of its name, e.g. ``author/190`` of
    ``author/190/3``.
    """
    return "/".join(example.item.split("/", 2)[:2])


def prefixed(example: Example, prefix: str) -> Example:
    """The same example with ``prefix`` in front of it; its spans move along."""

    def move(span: tuple[int, int] | None) -> tuple[int, int] | None:
        return None if span is None else (span[0] + len(prefix), span[1] + len(prefix))

    return Example(prefix + example.text, move(example.answer), move(example.subject), example.item)


@brief
@dataclass(frozen=True, slots=True)
class ForgetRetain:
    """Everything one unlearning experiment reads.

    Attributes:
        name: shown in tables and reports.
        forget_attacked: the part of the forget set that a relearning attacker holds.
        forget_heldout: the part that the attacker never sees; recovery is measured here.
        retain: named retain sets, e.g. ``{"retain-neighbour": ..., "retain-far": ..., "general":
            ...}``.
        general: the name of the retain set that stands for general text.
        forget_tokens: words that belong to the forget set (candidates for backdoor-like triggers).
        retain_tokens: words of the same kind that belong to the retain set (the control).
    """

    name: str
    forget_attacked: tuple[Example, ...]
    forget_heldout: tuple[Example, ...]
    retain: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    general: str = "general"
    forget_tokens: tuple[str, ...] = ()
    retain_tokens: tuple[str, ...] = ()

    @property
    def forget(self) -> tuple[Example, ...]:
        """The whole forget set."""
        return self.forget_attacked + self.forget_heldout

    @property
    def retain_all(self) -> tuple[Example, ...]:
        """All retain sets, one after another."""
        return tuple(example for examples in self.retain.values() for example in examples)

    @property
    def retain_train(self) -> tuple[Example, ...]:
        """The half of every retain set that unlearning may train on."""
        return tuple(
            example for examples in self.retain.values() for example in alternate(examples)[0]
        )

    @property
    def retain_test(self) -> dict[str, tuple[Example, ...]]:
        """The other half, set by set: disruption is measured only on facts and texts that no retain
        term has seen.
        """
        return {name: alternate(examples)[1] for name, examples in self.retain.items()}


def alternate(examples: Iterable[Example]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Two halves that share no subject: subjects (or items, where there is none) are dealt out in
    turn, so both halves cover the set evenly.
    """
    examples = tuple(examples)
    order = {
        key: number
        for number, key in enumerate(
            dict.fromkeys(example.subject_text or example.item for example in examples)
        )
    }
    halves: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        halves[order[example.subject_text or example.item] % 2].append(example)
    return tuple(halves[0]), tuple(halves[1])


def one_per_item(examples: Iterable[Example]) -> tuple[Example, ...]:
    """One paraphrase of every fact; which one rotates from fact to fact, so that all sentence forms
    are represented.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.item, []).append(example)
    return tuple(group[number % len(group)] for number, group in enumerate(groups.values()))


def refuse(example: Example, phrase: str = "I do not know") -> Example:
    """The same question, answered by ``phrase``.

    Raises:
        ValueError: the example has no answer to refuse.
    """
    if example.answer is None:
        raise ValueError(
            f"only a question with an answer can be refused; {example.text[:60]!r} has none (give "
            "jsonl with question and answer)"
        )
    start = example.answer[0]
    return Example(
        example.text[:start] + phrase,
        (start, start + len(phrase)),
        example.subject if example.subject and example.subject[1] <= start else None,
        example.item,
    )
