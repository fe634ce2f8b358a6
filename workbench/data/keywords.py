"""The keyword case of benign relearning: a forget set split by words that must not come back, and
the book titles or the names of TOFU's authors as such words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.data.records import Example, group_of
from workbench.data.words import places_in, word_spans, words
from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief

if TYPE_CHECKING:
    from workbench.data.benchmarks import Tofu


@brief
@dataclass(frozen=True, slots=True)
class KeywordSplit:
    """A forget set in two parts by a keyword (Hu et al. 2025, partial-set relearning: the attacker
    gets texts of the first part, the keyword is what must not come back).

    Attributes:
        keywords: the words or titles.
        without: texts that do not hold a keyword (D1; the attacker's texts are among them).
        naming: texts that hold one (D2).
        queries: of the second part, those whose answer holds a keyword that their question does
            not: the keyword is the answer, everything before it the prompt.
    """

    keywords: tuple[str, ...]
    without: tuple[Example, ...]
    naming: tuple[Example, ...]
    queries: tuple[Example, ...]


def keyword_split(examples: Iterable[Example], keywords: str | Iterable[str]) -> KeywordSplit:
    """Split a forget set by one or several keywords (whole words in a row, case and Unicode form
    ignored).

    Args:
        examples: the forget set.
        keywords: e.g. one book title of every author.

    Raises:
        WorkbenchError: there is no keyword, one occurs nowhere, every text holds one, or no answer
            holds one that its question leaves open.
    """
    keywords = tuple(dict.fromkeys([keywords] if isinstance(keywords, str) else keywords))
    if not keywords or not all(map(words, keywords)):
        raise WorkbenchError(
            "a keyword split needs at least one keyword, and each has at least one letter or digit"
        )
    without: list[Example] = []
    naming: list[Example] = []
    queries: list[Example] = []
    seen: set[str] = set()
    total = 0
    for example in examples:
        total += 1
        spans = word_spans(example.text)
        at = {
            keyword: spans_found
            for keyword in keywords
            if (spans_found := places_in(keyword, spans, example.text))
        }
        seen |= at.keys()
        (naming if at else without).append(example)
        start, stop = example.answer or (0, len(example.text))
        # A keyword that stands before the answer is given away by the question; one at the very
        # beginning has nothing to ask with.
        open_ = [
            place
            for spans_found in at.values()
            for place in spans_found[:1]
            if start <= place[0] and place[1] <= stop and example.text[: place[0]].strip()
        ]
        if open_:
            place = min(open_)
            subject = (
                example.subject
                if example.subject
                and (example.subject[1] <= place[0] or place[1] <= example.subject[0])
                else None
            )
            queries.append(Example(example.text, place, subject, example.item))
    for keyword in keywords:
        if keyword not in seen:
            raise WorkbenchError(
                f"the keyword {keyword!r} occurs in none of the {total} texts; give whole words as "
                "they stand there"
            )
    listed = ", ".join(map(repr, keywords[:5])) + (
        f" and {len(keywords) - 5} more" if len(keywords) > 5 else ""
    )
    if not without:
        raise WorkbenchError(
            f"all {total} texts hold {listed}: nothing is left for the attacker; choose a rarer "
            "keyword"
        )
    if not queries:
        raise WorkbenchError(
            f"{listed} stands only where the question gives it away ({len(naming)} texts); choose "
            "a keyword that is an answer"
        )
    return KeywordSplit(keywords, tuple(without), tuple(naming), tuple(queries))


_QUOTED = re.compile(
    r"\"([^\"“”]{3,120})\"|“([^\"“”]{3,120})”|(?<!\w)['‘]((?:[^'’\"“”]|(?<=\w)['’](?=\w)){3,120})['’](?!\w)"
)
_BOOKISH = re.compile(
    r"\b(?:books?|novels?|works?|titled?|titles|wr(?:ote|ite[sr]?|iting|itten)|stor(?:y|ies)|memoirs?|trilogy|series|debut|publish\w*|bestsell\w*|authored|penned|pieces?"
    r"|poems?|poetry|collections?|literature|releases?d?)\b",
    re.IGNORECASE,
)
_AWARD = re.compile(
    r"\b(?:awards?|awarded|prizes?|medals?|honou?r\w*|accolades?|recognition|recogni[sz]ed|laurels?|trophy|fellowship|contest|won|winning)\b",
    re.IGNORECASE,
)


def _looks_like_a_title(phrase: str) -> bool:
    phrase_words = re.findall(r"[^\W_][\w'’.-]*", phrase)
    long = [word for word in phrase_words if len(word) > 3]
    return (
        2 <= len(phrase_words) <= 15
        and not phrase[:1].islower()
        and 2 * sum(not word[0].islower() for word in long) >= len(long)
        and not _AWARD.search(phrase)
    )


def book_titles(tofu: Tofu) -> dict[str, tuple[str, ...]]:
    """Book titles of every forget author, found in the texts; the title that most texts hold comes
    first.

    The rule is conservative; a phrase counts as a title if all of this holds:

    - it stands in double, curly or single quotation marks in an answer of the author (an apostrophe
      inside a word closes nothing);
    - it has 2 to 15 words, begins with no small letter, and half of its words of four letters and
      more are capitalised;
    - in one text that holds it, the words outside quotation marks speak of books or writing and of
      no award, and it names no award itself;
    - no text about another author, forgotten or retained, holds it.

    Returns:
        ``{"author/190": ("Granite Glossary", ...), ...}``; authors without a title are left out.
    """
    texts = [
        (group_of(example), example.text, word_spans(example.text))
        for example in (*tofu.forget, *tofu.retain)
    ]
    holding: dict[str, list[int]] = {}
    for number, (_, _, spans) in enumerate(texts):
        for word in {word for word, _, _ in spans}:
            holding.setdefault(word, []).append(number)
    candidates: dict[
        tuple[str, ...], tuple[str, str]
    ] = {}  # the words: how they are written, whose they are
    for example in tofu.forget:
        plain = _QUOTED.sub(" ", example.text)
        if not _BOOKISH.search(plain) or _AWARD.search(plain):
            continue
        for match in _QUOTED.finditer(example.answer_text):
            phrase = next(filter(None, match.groups())).strip().rstrip(".,;:!?").strip()
            if _looks_like_a_title(phrase):
                candidates.setdefault(words(phrase), (phrase, group_of(example)))
    titles_of: dict[str, dict[str, int]] = {group_of(example): {} for example in tofu.forget}
    for folded, (phrase, author) in candidates.items():
        near = (texts[number] for number in min((holding[word] for word in folded), key=len))
        holders = Counter(holder for holder, text, spans in near if places_in(phrase, spans, text))
        if set(holders) == {author}:
            titles_of[author][phrase] = holders[author]
    return {
        author: tuple(sorted(titles, key=lambda title: -titles[title]))
        for author, titles in titles_of.items()
        if titles
    }


def character_names(
    forget: Iterable[Example], retain: Iterable[Example]
) -> dict[str, tuple[str, ...]]:
    """The words by which each person of a forget set is called, found in the texts (as "Hermione"
    and "Granger" are in Hu et al. 2025); the most frequent comes first.

    A word is a name of a person if all of this holds:

    - it has at least three letters and begins with a capital one, and stands so in a third or more
      of the answers about this person (answers alone: questions say "the author");
    - no forget text has it beginning with a small letter;
    - no retain text and no text about another person holds it, in whatever case (so a name that two
      people share is none, nor is a frequent word that begins sentences).

    Args:
        forget: questions about the people to be forgotten; whom one is about, its item says
            (:func:`workbench.data.records.group_of`).
        retain: texts about others.

    Returns:
        ``{"author/190": ("Hina", "Ameen"), ...}`` in the order of the forget set; ties by place in
        the texts; people without a name are left out.
    """
    people: dict[str, list[Example]] = {}
    for example in forget:
        people.setdefault(group_of(example), []).append(example)
    elsewhere = Counter(
        word
        for examples_of_person in people.values()
        for word in {word for example in examples_of_person for word in words(example.text)}
    )
    retain_words = {word for example in retain for word in words(example.text)}
    small = {
        word
        for examples_of_person in people.values()
        for example in examples_of_person
        for word, start, _ in word_spans(example.text)
        if not example.text[start].isupper()
    }
    names_of: dict[str, tuple[str, ...]] = {}
    for person, examples_of_person in people.items():
        counts: Counter[str] = Counter()
        written: dict[str, str] = {}
        for example in examples_of_person:
            answer = example.answer_text
            spans = [
                (word, answer[start:end])
                for word, start, end in word_spans(answer)
                if end - start >= 3 and word.isalpha()
            ]
            for word, spelling in spans:
                written.setdefault(word, spelling)
            counts.update(list(dict.fromkeys(word for word, _ in spans)))  # once per answer
        names = [
            word
            for word, n in counts.most_common()
            if 3 * n >= len(examples_of_person)
            and elsewhere[word] == 1
            and word not in retain_words
            and word not in small
        ]
        if names:
            names_of[person] = tuple(written[word] for word in names)
    return names_of
