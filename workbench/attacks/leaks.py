"""Does an attack text give away what it is supposed to bring back? A text that leaks may not be called benign."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.data.records import Example

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Overlap between attack texts and held-out facts.

    Attributes:
        subjects: held-out subjects that occur in the attack texts.
        answers: held-out answers that occur in the attack texts.
        shared_ngrams: share of the held-out texts' word 5-grams (subject and answer included) that occur in the attack texts.
        benign: whether nothing leaks: no subject and no answer.
    """

    subjects: tuple[str, ...]
    answers: tuple[str, ...]
    shared_ngrams: float
    benign: bool


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    tokens = _words(text)
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def leak_report(attack: Sequence[Example], heldout: Sequence[Example], n: int = 5) -> LeakReport:
    """Compare attack texts with the held-out facts whose recovery will be measured; whole words, case ignored."""
    attack_texts = [f" {' '.join(_words(example.text))} " for example in attack]

    def occurs(phrase: str) -> bool:
        tokens = _words(phrase)
        return bool(tokens) and any(f" {' '.join(tokens)} " in text for text in attack_texts)

    subjects = tuple(sorted({e.subject_text for e in heldout if e.subject and occurs(e.subject_text)}))
    answers = tuple(sorted({e.answer_text for e in heldout if e.answer and occurs(e.answer_text)}))
    theirs = set().union(*(_ngrams(example.text, n) for example in attack)) if attack else set()
    ours = set().union(*(_ngrams(example.text, n) for example in heldout)) if heldout else set()
    return LeakReport(subjects, answers, len(ours & theirs) / len(ours) if ours else 0.0, not subjects and not answers)
