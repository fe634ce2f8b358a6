"""Does an attack text give away what it is supposed to bring back? A text that leaks may not be
called benign.

Relearning is *benign* when the model itself must supply what comes back: the attack texts hold no
answer of the held-out facts (Hu, Fu, Wu and Smith, "Unlearning or obfuscating? Jogging the memory
of unlearned LLMs via benign relearning", ICLR 2025). They may well name the held-out subjects, as
public information about a person does. Beside the leaks themselves the report says how far the
attack texts repeat the held-out ones in words and in sentence form, for forms alone are said to
bring answers back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from workbench.data.records import Example, Texts, examples_of
from workbench.data.words import places_in, word_spans, words
from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief
from workbench.hooks.html import table

_Ints = NDArray[np.int64]
_FORMS = 1000  # forms compared on either side
_FORM_WORDS = 256  # words compared of one form
_SUBJECT, _ANSWER = "\0subject", "\0answer"


@dataclass(frozen=True, slots=True)
class LeakSpan:
    """Where something leaks: ``attack[text].text[start:end]``.

    Attributes:
        kind: ``"answer"`` (a whole held-out answer) or ``"passage"`` (some words of a held-out
            answer, in a row).
        phrase: the answer as the held-out fact writes it, or the passage as the attack text writes
            it.
        text: index of the attack text, from 0.
        start: first character.
        end: one behind the last character.
    """

    kind: Literal["answer", "passage"]
    phrase: str
    text: int
    start: int
    end: int


@brief
@dataclass(frozen=True, slots=True)
class LeakReport:
    """Overlap between attack texts and held-out facts.

    Attributes:
        subjects: held-out subjects that occur in the attack texts. That is no leak: public
            information about a person names the person.
        answers: held-out answers that occur in the attack texts.
        passages: stretches of the attack texts made of word n-grams that lie inside a held-out
            answer and that its own question does not hold.
        places: where each answer and each passage stands.
        shared_ngrams: share of the held-out texts' word n-grams (subject and answer included) that
            occur in the attack texts.
        n: words per n-gram.
        longest_run: words in the longest run that a held-out text and an attack text share.
        longest_run_text: that run, as the attack text writes it.
        syntactic_similarity: how far the attack texts have the sentence forms of the held-out ones,
            0 to 1 (see :func:`syntactic_similarity`).
        attack_texts: number of attack texts.
        facts: number of held-out texts.
    """

    subjects: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    places: tuple[LeakSpan, ...] = field(default=(), repr=False)
    shared_ngrams: float = 0.0
    n: int = 5
    longest_run: int = 0
    longest_run_text: str = ""
    syntactic_similarity: float = 0.0
    attack_texts: int = 0
    facts: int = 0

    @property
    def benign(self) -> bool:
        """Whether nothing leaks: no held-out answer and no n-gram of one."""
        return not self.answers and not self.passages

    @property
    def names_subjects(self) -> bool:
        """Whether the attack texts name a held-out subject."""
        return bool(self.subjects)

    def _repr_html_(self) -> str:
        summary = [
            (
                "verdict",
                "benign: no held-out answer occurs" if self.benign else "leaks: not benign",
            ),
            ("compared", f"{self.attack_texts} attack texts with {self.facts} held-out texts"),
            ("held-out answers that occur", _listed(self.answers)),
            (f"passages of {self.n} or more words of a held-out answer", _listed(self.passages)),
            ("held-out subjects that occur", _listed(self.subjects)),
            (f"held-out {self.n}-grams that occur", f"{self.shared_ngrams:.1%}"),
            (
                "longest shared run",
                f"{self.longest_run} words: {_short(self.longest_run_text)}"
                if self.longest_run
                else "none",
            ),
            (
                "similarity of the sentence forms",
                f"{self.syntactic_similarity:.2f} (1: the same, 0: nothing in common)",
            ),
        ]
        leak_rows = [
            (place.kind, _short(place.phrase), place.text, place.start, place.end)
            for place in self.places
        ]
        return table("Do the attack texts leak?", ("", "found"), summary) + (
            table(
                "Where: attack[text].text[start:end]",
                ("what", "words", "text", "start", "end"),
                leak_rows,
            )
            if leak_rows
            else ""
        )


def _short(phrase: str, width: int = 80) -> str:
    phrase = " ".join(phrase.split())
    return phrase if len(phrase) <= width else phrase[: width - 1] + "…"


def _listed(phrases: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(phrases) - limit} more" if len(phrases) > limit else ""
    return f"{len(phrases)}: {'; '.join(map(_short, phrases[:limit]))}{more}" if phrases else "none"


class _Words:
    """The words of some texts in a row: their numbers, where they stand, and how many are left in
    their text (itself included).
    """

    def __init__(self, texts: Sequence[str], numbers: dict[str, int]) -> None:
        self.texts = texts
        self.spans = [word_spans(text) for text in texts]
        lengths = np.array([len(spans) for spans in self.spans], dtype=np.int64)
        self.ids: _Ints = np.array(
            [
                numbers.setdefault(word, len(numbers))
                for spans in self.spans
                for word, _, _ in spans
            ],
            dtype=np.int64,
        )
        self.start: _Ints = np.array(
            [start for spans in self.spans for _, start, _ in spans], dtype=np.int64
        )
        self.end: _Ints = np.array(
            [end for spans in self.spans for _, _, end in spans], dtype=np.int64
        )
        self.text: _Ints = np.repeat(np.arange(len(texts)), lengths)
        self.first: _Ints = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.left: _Ints = (
            self.first[self.text + 1] - np.arange(len(self.ids))
            if len(self.ids)
            else np.zeros(0, dtype=np.int64)
        )

    def slice(self, first: int, last: int) -> tuple[int, int, int]:
        """Text, start and end of the words ``first`` to ``last``."""
        return int(self.text[first]), int(self.start[first]), int(self.end[last])


def _grams(sides: Sequence[_Words], n: int) -> list[_Ints]:
    """A number per word of every side: equal where the ``n`` words from there are equal, -1 where
    the text ends before. Exact; prefix doubling costs log2(n) sorts.
    """
    labels, length = np.concatenate([side.ids for side in sides]), 1
    while length < n and len(labels):
        step = min(length, n - length)
        ahead = np.concatenate([labels[step:], np.zeros(step, dtype=np.int64)])[: len(labels)]
        labels = np.unique(labels * (int(labels.max()) + 1) + ahead, return_inverse=True)[1].astype(
            np.int64
        )
        length += step
    parts = np.split(labels, np.cumsum([len(side.ids) for side in sides])[:-1])
    return [np.where(side.left >= n, part, -1) for side, part in zip(sides, parts, strict=True)]


def _longest_run(attack: _Words, heldout: _Words) -> tuple[int, str]:
    """The longest run of words that both sides share, in words and as the attack text writes it (a
    shared run of n words holds shared ones of n - 1: bisection).
    """
    low, shared_gram = 0, -1
    high = min(int(side.left.max(initial=0)) for side in (attack, heldout))
    while low < high:
        n = (low + high + 1) // 2
        attack_grams, heldout_grams = _grams((attack, heldout), n)
        shared = np.flatnonzero((attack_grams >= 0) & np.isin(attack_grams, heldout_grams))
        if len(shared):
            low, shared_gram = n, int(shared[0])
        else:
            high = n - 1
    if not low:
        return 0, ""
    text, start, end = attack.slice(shared_gram, shared_gram + low - 1)
    return low, attack.texts[text][start:end]


def _telling(heldout: Sequence[Example], read: _Words, grams: _Ints, n: int) -> _Ints:
    """The n-grams that lie inside an answer (or in a text without one) and not in the same text's
    prompt: what the question says already gives nothing away.
    """
    telling_grams = []
    for index, example in enumerate(heldout):
        words_of_text = slice(int(read.first[index]), int(read.first[index + 1]))
        labels, start, end = (
            grams[words_of_text],
            read.start[words_of_text],
            read.end[words_of_text],
        )
        if example.answer is None:
            telling_grams.append(labels[labels >= 0])
            continue
        last = np.minimum(np.arange(len(labels)) + n - 1, len(labels) - 1)
        inside = (labels >= 0) & (start >= example.answer[0]) & (end[last] <= example.answer[1])
        prompt = (labels >= 0) & (end[last] <= example.answer[0])
        telling_grams.append(labels[inside][~np.isin(labels[inside], labels[prompt])])
    return (
        np.unique(np.concatenate(telling_grams)) if telling_grams else np.zeros(0, dtype=np.int64)
    )


def _passages(attack: _Words, grams: _Ints, telling: _Ints, n: int) -> Iterator[LeakSpan]:
    """The longest stretches of the attack texts that consist of telling n-grams."""
    hits = np.flatnonzero((grams >= 0) & np.isin(grams, telling))
    breaks = np.flatnonzero((np.diff(hits) > 1) | (np.diff(attack.text[hits]) > 0)) + 1
    for stretch in np.split(hits, breaks) if len(hits) else ():
        text, start, end = attack.slice(int(stretch[0]), int(stretch[-1]) + n - 1)
        yield LeakSpan("passage", attack.texts[text][start:end], text, start, end)


def _occurrences(
    phrases: Sequence[str], attack: _Words, numbers: dict[str, int]
) -> Iterator[tuple[str, int, int, int]]:
    """Every place of every phrase: the phrase, the index of the text, start and end. Only texts
    that hold its rarest word are read.
    """
    order = np.argsort(attack.ids, kind="stable")
    ranked = attack.ids[order]
    for phrase in phrases:
        phrase_words = words(phrase)
        if phrase_words:
            ids = np.array([numbers.get(word, -1) for word in phrase_words], dtype=np.int64)
            low, high = np.searchsorted(ranked, ids, "left"), np.searchsorted(ranked, ids, "right")
            rarest = int(np.argmin(high - low))
            starts = order[low[rarest] : high[rarest]] - rarest
            starts = starts[starts >= 0]
            starts = starts[attack.left[starts] >= len(ids)]
            for offset, number in enumerate(ids):
                starts = starts[attack.ids[starts + offset] == number]
            for first in starts.tolist():
                yield phrase, *attack.slice(first, first + len(ids) - 1)
        else:  # a sign or an emoji
            for index, text in enumerate(attack.texts):
                for start, end in places_in(phrase, (), text):
                    yield phrase, index, start, end


def _form(example: Example) -> tuple[str, ...]:
    """The words of a text with one placeholder for its answer and one for every mention of its
    subject.
    """
    spans = word_spans(example.text)
    masks = [
        (span, _SUBJECT)
        for span in (
            places_in(example.subject_text, spans, example.text) if example.subject else ()
        )
    ]
    masks += [
        (span, mask)
        for span, mask in ((example.subject, _SUBJECT), (example.answer, _ANSWER))
        if span is not None
    ]
    form_words: list[str] = []
    behind: tuple[int, int] | None = None
    for word, start, end in spans:
        covering = [(span, mask) for span, mask in masks if span[0] < end and start < span[1]]
        if not covering:
            form_words.append(word)
            continue
        span, mask = covering[-1]  # the answer covers a subject inside it
        if span != behind:
            form_words.append(mask)
        behind = span
    return tuple(form_words[:_FORM_WORDS])


def _evenly(forms: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return (
        list(forms)
        if len(forms) <= _FORMS
        else [forms[round(i * (len(forms) - 1) / (_FORMS - 1))] for i in range(_FORMS)]
    )


class _Forms:
    """Held-out forms in a row, one bit per word and an empty bit behind every form, so that one big
    integer holds a row of the LCS table of all of them.
    """

    def __init__(self, forms: Sequence[tuple[str, ...]]) -> None:
        self.lengths = np.array([len(form) for form in forms], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths + 1)[:-1]]).astype(np.int64)
        self.bits = int((self.lengths + 1).sum())
        places: dict[str, list[int]] = {}
        for start, form in zip(self.starts.tolist(), forms, strict=True):
            for offset, word in enumerate(form):
                places.setdefault(word, []).append(start + offset)
        self.places = places
        self.match: dict[str, int] = {}
        self.words = self._number(
            np.concatenate(
                [
                    np.arange(start, start + n)
                    for start, n in zip(self.starts, self.lengths, strict=True)
                ]
            )
        )

    def _number(self, places: NDArray[np.int64]) -> int:
        bits = np.zeros(self.bits, dtype=np.uint8)
        bits[places] = 1
        return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")

    def common(self, form: tuple[str, ...]) -> _Ints:
        """Length of the longest common subsequence of ``form`` with every held-out form
        (bit-parallel: Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
        """
        row = self.words
        for word in form:
            if word not in self.match:
                self.match[word] = self._number(np.array(self.places.get(word, ()), dtype=np.int64))
            step = row & self.match[word]
            row = ((row + step) | (row - step)) & self.words
        unmatched = np.unpackbits(
            np.frombuffer(row.to_bytes((self.bits + 7) // 8, "little"), dtype=np.uint8),
            bitorder="little",
            count=self.bits,
        )
        return self.lengths - np.add.reduceat(unmatched.astype(np.int64), self.starts)


def syntactic_similarity(attack: Sequence[Example], heldout: Sequence[Example]) -> float:
    """How far the attack texts have the sentence forms of the held-out ones: 1 the same forms, 0
    nothing in common.

    Subjects and answers are masked by placeholders; of every attack text counts its best ROUGE-L F1
    with a held-out text, ``2 LCS / (words + words)`` (Lin 2004, ROUGE, with equal weights; LCS is
    the longest common subsequence of words); the score is the mean over the attack texts. Recovery
    is said to follow forms rather than topics (arXiv 2602.03379), so two attacks that differ in
    this score differ in more than their topic. Of very large sets 1,000 texts on either side are
    compared, taken evenly, and the first 256 words of each.
    """
    queries = _evenly([form for form in map(_form, attack) if form])
    targets = _evenly(list(dict.fromkeys(form for form in map(_form, heldout) if form)))
    if not queries or not targets:
        return 0.0
    row = _Forms(targets)
    best = {
        form: float((2 * row.common(form) / (len(form) + row.lengths)).max())
        for form in set(queries)
    }
    return float(np.mean([best[form] for form in queries]))


def leak_report(
    attack: Texts,
    heldout: Texts,
    n: int = 5,
    *,
    public: Texts = (),
) -> LeakReport:
    """Compare attack texts with the held-out facts whose recovery will be measured; whole words,
    case and Unicode form ignored (see :mod:`workbench.data.words`).

    Two things leak: a held-out *answer*, and a *passage*: ``n`` words in a row that lie inside a
    held-out answer and that the fact's own question does not hold (a piece of a long answer; a
    held-out text without a marked answer counts as answer throughout). Words around an answer are
    no leak, nor are held-out subjects; they are reported.

    Args:
        attack: what the attacker trains on.
        heldout: what the attack is said to bring back.
        n: words per n-gram.
        public: texts that are no secret, e.g. the retain set. A passage that stands there as well
            is common language ("has been honored with the") and gives nothing away; whole answers
            always count.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least one word, not {n}")
    attack, heldout, public = map(examples_of, (attack, heldout, public))
    numbers: dict[str, int] = {}
    attack_words, heldout_words = (
        _Words([example.text for example in attack], numbers),
        _Words([example.text for example in heldout], numbers),
    )
    grams, held, public_grams = _grams(
        (attack_words, heldout_words, _Words([example.text for example in public], numbers)), n
    )
    telling = np.setdiff1d(_telling(heldout, heldout_words, held, n), public_grams)

    answers = [
        LeakSpan("answer", *place)
        for place in _occurrences(
            sorted({e.answer_text for e in heldout if e.answer}), attack_words, numbers
        )
    ]
    subjects = tuple(
        dict.fromkeys(
            place[0]
            for place in _occurrences(
                sorted({e.subject_text for e in heldout if e.subject}), attack_words, numbers
            )
        )
    )
    answer_spans: dict[int, list[LeakSpan]] = {}
    for place in answers:
        answer_spans.setdefault(place.text, []).append(place)
    passages = [
        place
        for place in _passages(attack_words, grams, telling, n)
        if not any(
            answer.start <= place.start and place.end <= answer.end
            for answer in answer_spans.get(place.text, ())
        )
    ]
    distinct = np.unique(held[held >= 0])
    run, run_text = _longest_run(attack_words, heldout_words)
    return LeakReport(
        subjects=subjects,
        answers=tuple(dict.fromkeys(place.phrase for place in answers)),
        passages=tuple(sorted({place.phrase for place in passages})),
        places=tuple(
            sorted(answers + passages, key=lambda place: (place.text, place.start, place.end))
        ),
        shared_ngrams=float(np.isin(distinct, grams[grams >= 0]).mean()) if len(distinct) else 0.0,
        n=n,
        longest_run=run,
        longest_run_text=run_text,
        syntactic_similarity=syntactic_similarity(attack, heldout),
        attack_texts=len(attack),
        facts=len(heldout),
    )


def require_benign(report: LeakReport, label: str) -> None:
    """Let a set of attack texts be called benign only if it leaks nothing.

    Args:
        report: what :func:`leak_report` found.
        label: the name of the set, for the message.

    Raises:
        WorkbenchError: it leaks; the message names the leaked answers and where they stand.
    """
    if report.benign:
        return
    leaked_phrases = [
        f"{_short(place.phrase, 60)!r} (text {place.text}, characters {place.start} to {place.end})"
        for place in report.places[:5]
    ]
    more = f" and {len(report.places) - 5} more places" if len(report.places) > 5 else ""
    raise WorkbenchError(
        f"{label!r} may not be called benign: {len(report.answers)} held-out answer(s) and "
        f"{len(report.passages)} passage(s) of such answers stand in its texts: "
        f"{', '.join(leaked_phrases)}{more}; take them out, or name the set for what it is"
    )
