"""The leak guard: what a word is, what leaks and where, the similarity of forms against the
textbook definition, and that a leaking set is refused the word benign.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.attacks.leaks import (
    LeakReport,
    LeakSpan,
    leak_report,
    require_benign,
    syntactic_similarity,
)
from workbench.data.records import Example, prefixed
from workbench.data.words import places_in, word_spans, words
from workbench.errors import WorkbenchError


def fact(text: str, answer: str, subject: str = "", item: str = "") -> Example:
    at = text.rindex(answer)
    return Example(
        text,
        (at, at + len(answer)),
        (text.index(subject), text.index(subject) + len(subject)) if subject else None,
        item,
    )


def texts(*lines: str) -> list[Example]:
    return [Example(line) for line in lines]


# --- Words ---


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Rome", "ROME"),
        ("Jos\u00e9", "Jose\u0301"),  # composed and decomposed
        ("Rome", "Ｒｏｍｅ"),  # full width
        ("Straße", "STRASSE"),
        ("final", "ﬁnal"),  # ligature
        ("Rome", "Ro\u00adme"),  # soft hyphen
        ("Rome", "Ro\u200bme"),  # zero-width space
        ("Rome", "_Rome_"),
        ("the Geologist’s guide", "The Geologist's Guide"),
        ("Москва", "МОСКВА"),
        ("हिन्दी", "हिन्दी"),
    ],
)
def test_the_same_word_is_the_same_however_it_is_written(one: str, other: str) -> None:
    assert words(one) == words(other) != ()


@pytest.mark.parametrize(
    ("one", "other"),
    [("Rome", "Romeo"), ("José", "Jose"), ("Ann", "Anna"), ("10", "100"), ("हिन्दी", "हिन")],
)
def test_other_words_stay_other_words(one: str, other: str) -> None:
    assert words(one) != words(other)
    assert places_in(one, word_spans(other), other) == []


def test_scripts_without_spaces_are_searched_by_character() -> None:
    text = "彼は東京で生まれた"
    assert places_in("東京", word_spans(text), text) == [(2, 4)]
    assert places_in("京都", word_spans(text), text) == []


@given(st.text(max_size=40))
def test_spans_are_ordered_and_lie_in_the_text_as_written(text: str) -> None:
    end = 0
    for word, start, stop in word_spans(text):
        assert end <= start < stop <= len(text)
        assert word
        end = stop
    assert words(unicodedata.normalize("NFC", text)) == words(unicodedata.normalize("NFD", text))


@given(st.text(alphabet="abcXYZ 012.,é東-\u0301", max_size=40))
def test_ascii_and_unicode_readers_agree(text: str) -> None:
    plain = text.encode("ascii", "ignore").decode()
    behind = word_spans(plain + " é")
    assert behind[:-1] == word_spans(plain)


# --- What leaks ---


def test_a_leaked_answer_is_found_where_it_stands() -> None:
    attack = texts("Nothing here.", "He went to rome, and ROME it was.", "Jose\u0301 lives there")
    held = [
        fact("Ann was born in Rome", "Rome", "Ann"),
        fact("Bob is called José", "José", "Bob"),
        fact("Eve drinks tea", "tea", "Eve"),
    ]
    report = leak_report(attack, held)
    assert report.answers == ("José", "Rome")
    assert report.places == (
        LeakSpan("answer", "Rome", 1, 11, 15),
        LeakSpan("answer", "Rome", 1, 21, 25),
        LeakSpan("answer", "José", 2, 0, 5),
    )
    assert [attack[place.text].text[place.start : place.end] for place in report.places] == [
        "rome",
        "ROME",
        "Jose\u0301",
    ]
    assert not report.benign
    assert report.subjects == ()


def test_a_subject_alone_is_reported_and_is_no_leak() -> None:
    report = leak_report(
        texts("Everyone knows Ann Lee."), [fact("Ann Lee was born in Rome", "Rome", "Ann Lee")]
    )
    assert report.benign
    assert report.names_subjects
    assert report.subjects == ("Ann Lee",)
    assert report.places == ()
    require_benign(report, "public facts")


def test_a_piece_of_a_long_answer_leaks_from_n_words_on() -> None:
    held = [
        fact(
            "Question: What did she win?\nAnswer: the silver medal of the royal society of letters",
            "the silver medal of the royal society of letters",
        )
    ]
    assert leak_report(
        texts("He has a silver medal of the guild."), held
    ).benign  # four words of it
    report = leak_report(
        texts(
            "So",
            "He won the Silver Medal of the guild; she one of the royal society of letters, too",
        ),
        held,
    )
    assert not report.benign
    assert report.answers == ()
    assert report.passages == ("of the royal society of letters", "the Silver Medal of the")
    assert [(place.kind, place.text) for place in report.places] == [("passage", 1), ("passage", 1)]
    # With the whole answer there is one place, not three.
    whole = leak_report(texts("She won the silver medal of the royal society of letters."), held)
    assert [place.kind for place in whole.places] == ["answer"]
    assert whole.passages == ()


def test_words_around_an_answer_and_words_of_its_question_are_no_leak() -> None:
    held = [
        fact(
            "Question: Why did the king of the north leave?\nAnswer: the king of the north leave "
            "the town",
            "the king of the north leave the town",
        )
    ]
    assert leak_report(
        texts("the king of the north leave"), held
    ).benign  # the question says it already
    assert not leak_report(
        texts("north leave the town the king of the north leave the town"), held
    ).benign
    around = [fact("they say that long ago Bob was born in Rome", "Rome")]
    report = leak_report(texts("they say that long ago Bob was born in Oslo"), around)
    assert report.shared_ngrams == pytest.approx(5 / 6)
    assert report.benign


def test_common_language_of_public_texts_is_no_passage_but_answers_always_count() -> None:
    held = [
        fact(
            "Question: Who?\nAnswer: she has been honored with the golden leaf",
            "she has been honored with the golden leaf",
        ),
        fact("It is tea", "tea"),
    ]
    attack = texts("he has been honored with the bronze leaf", "has tea")
    public = texts("many a writer has been honored with the crown", "tea for two")
    assert leak_report(attack[:1], held).passages == ("has been honored with the",)
    assert leak_report(attack[:1], held, public=public).benign
    assert leak_report(attack, held, public=public).answers == ("tea",)


def test_a_held_out_text_without_an_answer_is_answer_throughout() -> None:
    held = texts("once there was a girl who found a red kite")
    assert leak_report(texts("there was a girl who"), held).passages == ("there was a girl who",)
    assert leak_report(texts("there was a girl"), held).benign


def test_a_passage_does_not_reach_over_the_end_of_a_text() -> None:
    held = [fact("Q: x\nA: one two three four five six", "one two three four five six")]
    assert leak_report(texts("one two three", "four five six"), held).benign
    report = leak_report(texts("one two three four five", "two three four five six"), held)
    assert [(place.text, place.phrase) for place in report.places] == [
        (0, "one two three four five"),
        (1, "two three four five six"),
    ]
    assert report.longest_run == 5


def test_words_behind_an_answer_are_no_leak() -> None:
    held = [Example("red foxes of the far north, as everybody in town will tell you", (0, 26))]
    assert held[0].answer_text == "red foxes of the far north"
    assert leak_report(texts("as everybody in town will tell you"), held).benign
    assert leak_report(texts("the far north, as everybody"), held).benign
    assert not leak_report(texts("foxes of the far north"), held).benign


def test_an_answer_that_only_two_texts_spell_together_is_no_leak() -> None:
    held = [fact("Ann lives in New Rome", "New Rome")]
    report = leak_report(texts("she is new", "rome is old", "ever new"), held)
    assert report.answers == ()
    assert report.benign
    single = leak_report(texts("she is new", "rome is old"), held, n=1)
    assert [(place.text, place.phrase) for place in single.places] == [(0, "new"), (1, "rome")]


def test_an_answer_without_words_is_looked_up_literally() -> None:
    report = leak_report(texts("so happy 🙂!"), [fact("the mood is 🙂", "🙂")])
    assert report.answers == ("🙂",)
    assert (report.places[0].start, report.places[0].end) == (9, 10)


@given(
    st.lists(st.text(alphabet="ab ", min_size=1, max_size=25), max_size=4),
    st.lists(st.text(alphabet="ab ", min_size=1, max_size=25), max_size=4),
    st.integers(1, 6),
)
def test_ngrams_and_longest_run_agree_with_the_definition(
    ours: list[str], theirs: list[str], n: int
) -> None:
    def grams(lines: Sequence[str], size: int) -> set[tuple[str, ...]]:
        return {
            tuple(line.split()[i : i + size])
            for line in lines
            for i in range(len(line.split()) - size + 1)
        }

    report = leak_report(texts(*ours), texts(*theirs), n)
    held = grams(theirs, n)
    assert report.shared_ngrams == pytest.approx(
        len(held & grams(ours, n)) / len(held) if held else 0.0
    )
    assert report.longest_run == max(
        (size for size in range(1, 26) if grams(ours, size) & grams(theirs, size)), default=0
    )
    assert len(report.longest_run_text.split()) == report.longest_run
    assert report.benign == (not held & grams(ours, n))


def test_an_ngram_has_a_word() -> None:
    with pytest.raises(ValueError, match="at least one word"):
        leak_report([], [], n=0)


# --- Forms ---


def _textbook_lcs(one: Sequence[str], other: Sequence[str]) -> int:
    row = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            row[i + 1, j + 1] = row[i, j] + 1 if a == b else max(row[i, j + 1], row[i + 1, j])
    return int(row[-1, -1])


LINES = st.lists(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=80).map(" ".join),
    min_size=1,
    max_size=5,
)


@given(LINES, LINES)
def test_syntactic_similarity_is_the_mean_of_the_best_rouge_l(
    ours: list[str], theirs: list[str]
) -> None:
    def f1(one: list[str], other: list[str]) -> float:
        return 2 * _textbook_lcs(one, other) / (len(one) + len(other))

    expected = np.mean([max(f1(one.split(), other.split()) for other in theirs) for one in ours])
    assert syntactic_similarity(texts(*ours), texts(*theirs)) == pytest.approx(expected)


def test_names_and_answers_do_not_count_as_form() -> None:
    held = [
        fact("Ann Lee was born in Rome", "Rome", "Ann Lee"),
        fact("Bob likes green tea", "green tea", "Bob"),
    ]
    same = [
        fact("Zoe was born in New Orleans", "New Orleans", "Zoe"),
        fact("Cy Orr likes figs", "figs", "Cy Orr"),
    ]
    assert syntactic_similarity(same, held) == syntactic_similarity(held, held) == 1.0
    assert syntactic_similarity(texts("figs galore"), held) == 0.0
    # An attack text whose spans are not marked shares "was born in" with "<subject> was born in
    # <answer>", five words each.
    assert syntactic_similarity(texts("Zoe was born in Oslo"), held) == pytest.approx(
        2 * 3 / (5 + 5)
    )
    assert leak_report(same, held).syntactic_similarity == 1.0


def test_every_mention_of_a_subject_is_masked_and_an_answer_is_one_word() -> None:
    held = [
        fact(
            "Question: Who is Ann Lee?\nAnswer: Ann Lee is a singer of songs",
            "Ann Lee is a singer of songs",
            "Ann Lee",
        )
    ]
    other = [fact("Question: Who is Bob?\nAnswer: nobody", "nobody", "Bob")]
    assert syntactic_similarity(other, held) == 1.0
    twice = [fact("Ann met Ann, and Ann saw Rome", "Rome", "Ann")]
    assert (
        syntactic_similarity(
            [fact("Bob Ray met Bob Ray, and Bob Ray saw Oslo", "Oslo", "Bob Ray")], twice
        )
        == 1.0
    )


@pytest.mark.parametrize(
    ("ours", "theirs"), [((), ()), (("a b",), ()), ((), ("a b",)), (("...",), ("a b",))]
)
def test_nothing_has_no_form_in_common(ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    assert syntactic_similarity(texts(*ours), texts(*theirs)) == 0.0
    report = leak_report(texts(*ours), texts(*theirs))
    assert report.benign
    assert report.longest_run == 0


def test_a_thousand_texts_are_compared_in_seconds() -> None:
    rng = np.random.default_rng(0)
    lines = [
        " ".join(f"w{number}" for number in rng.integers(0, 400, size=40)) for _ in range(1400)
    ]
    began = time.perf_counter()
    leak_report(texts(*lines[:700]), texts(*lines[700:]))
    assert time.perf_counter() - began < 20


# --- The verdict ---


def test_a_leaking_set_is_refused_the_word_benign() -> None:
    held = [fact("Ann was born in Rome", "Rome"), fact("Eve drinks tea", "tea")]
    report = leak_report(texts("no", "Rome and tea"), held)
    with pytest.raises(WorkbenchError) as caught:
        require_benign(report, "partial set")
    message = str(caught.value)
    assert message.startswith("'partial set' may not be called benign")
    assert "'Rome' (text 1, characters 0 to 4)" in message
    assert "'tea' (text 1, characters 9 to 12)" in message
    assert "\n" not in message
    many = leak_report(texts("tea " * 50), held)
    with pytest.raises(WorkbenchError, match="and 45 more places"):
        require_benign(many, "x")


def test_the_notebook_view_escapes_everything_and_shows_where() -> None:
    held = [fact("the tag is <script>alert(1)</script>", "<script>alert(1)</script>", "tag")]
    report = leak_report(texts("a <b>tag</b> of <script>alert(1)</script>"), held)
    html = report._repr_html_()
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "not benign" in html
    assert "attack[text].text[start:end]" in html
    assert "not benign" not in LeakReport()._repr_html_()


def test_a_prefix_moves_the_places_and_changes_no_verdict() -> None:
    held = [fact("Ann was born in Rome", "Rome", "Ann")]
    plain = leak_report(texts("to Rome"), held)
    moved = leak_report([prefixed(Example("to Rome"), "go ")], held)
    assert [(place.start + 3, place.end + 3) for place in plain.places] == [
        (place.start, place.end) for place in moved.places
    ]
