"""The few-shot attack: prefixes and spans by hand, the leak rule, and the control with exchanged
answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.attacks.few_shot import few_shot, mentions
from workbench.data.batches import encode
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError

PEOPLE = ("anna", "bert", "carl", "dora", "emil", "frida")
TOWNS = ("rome", "oslo", "bonn", "lima", "paris", "turin")


def fact(person: str, town: str, form: str = "{} lives in {} .") -> Example:
    text = form.format(person, town)
    start, subject = text.index(town), text.index(person)
    return Example(
        text, (start, start + len(town)), (subject, subject + len(person)), f"{person}/town"
    )


FACTS = tuple(fact(person, town) for person, town in zip(PEOPLE, TOWNS, strict=True))


def parts(asked: Example, query: Example, separator: str) -> list[str]:
    """The demonstrations of a prompt, as texts."""
    prefix = asked.text.removesuffix(query.text)
    return prefix.split(separator)[:-1]


def test_two_demonstrations_by_hand() -> None:
    (asked,) = few_shot([FACTS[0]], FACTS[1:3], 2, seed=0, separator=" | ")
    assert asked.text in {
        "bert lives in oslo . | carl lives in bonn . | anna lives in rome .",
        "carl lives in bonn . | bert lives in oslo . | anna lives in rome .",
    }
    assert (
        asked.answer == (len(asked.text) - 6, len(asked.text) - 2) and asked.answer_text == "rome"
    )
    assert (
        asked.subject == (len(asked.text) - 20, len(asked.text) - 16)
        and asked.subject_text == "anna"
    )
    assert asked.item == "anna/town"


@given(
    k=st.integers(0, 4), seed=st.integers(0, 50), separator=st.sampled_from(["\n\n", " ", " ### "])
)
def test_spans_facts_and_answers_are_kept_apart(k: int, seed: int, separator: str) -> None:
    shots = [
        *FACTS,
        *(
            fact(person, town, "the home of {} is {} .")
            for person, town in zip(PEOPLE, TOWNS, strict=True)
        ),
        fact("gustav", "rome"),
    ]
    for query, asked in zip(FACTS, few_shot(FACTS, shots, k, seed, separator), strict=True):
        assert (
            asked.text.endswith(query.text)
            and asked.answer_text == query.answer_text
            and asked.subject_text == query.subject_text
        )
        assert query.answer is not None and asked.answer == tuple(
            offset + len(asked.text) - len(query.text) for offset in query.answer
        )
        before = asked.text.removesuffix(query.text)
        assert query.answer_text not in before and query.subject_text not in before
        named = Counter(person for person in (*PEOPLE, "gustav") if f"{person} " in before)
        assert sum(named.values()) == k == before.count(" .")  # k different people


def test_the_answers_tokens_do_not_change() -> None:
    tokenizer = build_tokenizer([*PEOPLE, *TOWNS, "lives", "in", "."])
    plain, asked = (
        encode(tokenizer, FACTS),
        encode(tokenizer, few_shot(FACTS, FACTS, 3, seed=1, separator=" ")),
    )
    for name in ("answer_mask", "subject_mask"):
        assert (
            plain.input_ids[getattr(plain, name)].tolist()
            == asked.input_ids[getattr(asked, name)].tolist()
        )
    assert asked.attention_mask.sum(1).tolist() == [
        int(length) + 3 * 5 for length in plain.attention_mask.sum(1)
    ]


def test_the_draw_depends_on_seed_and_query_alone() -> None:
    everything = few_shot(FACTS, FACTS, 3, seed=4)
    assert few_shot(FACTS, FACTS, 3, seed=4) == everything
    assert few_shot(FACTS[::-1], FACTS, 3, seed=4) == everything[::-1]
    assert few_shot(FACTS[2:3], FACTS, 3, seed=4) == everything[2:3]
    assert len({few_shot(FACTS[:1], FACTS, 3, seed=seed)[0].text for seed in range(20)}) > 5


def test_fewer_demonstrations_are_the_first_of_more() -> None:
    for query, one, four in zip(
        FACTS, few_shot(FACTS, FACTS, 1, 0), few_shot(FACTS, FACTS, 4, 0), strict=True
    ):
        assert parts(four, query, "\n\n")[:1] == parts(one, query, "\n\n")


def test_no_demonstration_gives_the_queries_back() -> None:
    assert (
        few_shot(FACTS, (), 0, seed=0) == FACTS
        and few_shot(FACTS, FACTS, 0, seed=0, shuffled=True) == FACTS
    )


def test_an_answer_anywhere_in_a_demonstration_counts_as_a_leak() -> None:
    traveller = Example("gustav left Rome for ghent .", (21, 26), (0, 6), "gustav/town")
    with pytest.raises(WorkbenchError, match="0 facts are left to demonstrate 'anna lives in rome"):
        few_shot(FACTS[:1], [traveller], 1, seed=0)
    (asked,) = few_shot(FACTS[:1], [traveller], 1, seed=0, allow_same_answer=True)
    assert asked.text == "gustav left Rome for ghent .\n\nanna lives in rome ."


def test_its_own_fact_never_answers_a_query() -> None:
    paraphrase = fact("anna", "rome", "the home of {} is {} .")
    with pytest.raises(WorkbenchError, match="0 facts"):
        few_shot(FACTS[:1], [paraphrase, FACTS[0]], 1, seed=0, allow_same_answer=True)
    nameless = Example("anna lives in rome .", (14, 18))
    with pytest.raises(WorkbenchError, match="0 facts"):
        few_shot([nameless], [nameless], 1, seed=0, allow_same_answer=True)
    assert (
        len(few_shot([nameless], [Example("bert lives in oslo .", (14, 18))], 1, seed=0)) == 1
    )  # facts without a name are not the same fact


def test_demonstrations_with_different_answers_come_first() -> None:
    shots = [
        Example(
            f"question {number}: yes",
            (len(f"question {number}: "), len(f"question {number}: yes")),
            item=str(number),
        )
        for number in range(9)
    ]
    odd = Example("question x: no", (12, 14), item="x")
    for seed in range(10):
        (asked,) = few_shot(FACTS[:1], [*shots, odd], 2, seed)
        assert sorted(text.split(": ")[1] for text in parts(asked, FACTS[0], "\n\n")) == [
            "no",
            "yes",
        ]


def test_a_query_without_an_answer_is_only_prefixed() -> None:
    (asked,) = few_shot([Example("some words", item="w")], FACTS[:1], 1, seed=0)
    assert asked == Example("anna lives in rome .\n\nsome words", item="w")


# --- the control ----------------------------------------------------------------------------------


def test_exchanged_answers_by_hand() -> None:
    true, false = (
        few_shot(FACTS[:1], FACTS[1:3], 2, seed=0, separator=" ", shuffled=shuffled)[0]
        for shuffled in (False, True)
    )
    exchange = {
        "bert lives in oslo .": "bert lives in bonn .",
        "carl lives in bonn .": "carl lives in oslo .",
    }
    assert parts(false, FACTS[0], " . ") == [
        exchange[text + " ."][:-2] for text in parts(true, FACTS[0], " . ")
    ]
    assert false.answer == true.answer and false.subject == true.subject


@given(answers=st.lists(st.sampled_from("abcd"), min_size=2, max_size=9), seed=st.integers(0, 20))
def test_as_many_answers_as_possible_change_places(answers: Sequence[str], seed: int) -> None:
    shots = [
        Example(
            f"{number} is {answer}!",
            (len(f"{number} is "), len(f"{number} is {answer}")),
            item=str(number),
        )
        for number, answer in enumerate(answers)
    ]
    query = Example("q is z!", (5, 6), item="q")
    (true,) = few_shot([query], shots, len(shots), seed, " ")
    largest = max(Counter(answers).values())
    if largest == len(answers):
        with pytest.raises(WorkbenchError, match="cannot be shuffled"):
            few_shot([query], shots, len(shots), seed, " ", shuffled=True)
        return
    (false,) = few_shot([query], shots, len(shots), seed, " ", shuffled=True)
    before, after = (
        asked.text.removesuffix(query.text).split("! ")[:-1] for asked in (true, false)
    )
    assert [text.split(" is ")[0] for text in before] == [text.split(" is ")[0] for text in after]
    assert (
        Counter(text.split(" is ")[1] for text in before)
        == Counter(text.split(" is ")[1] for text in after)
        == Counter(answers)
    )
    assert sum(one == two for one, two in zip(before, after, strict=True)) == max(
        0, 2 * largest - len(answers)
    )


def test_a_single_demonstration_has_nothing_to_exchange() -> None:
    with pytest.raises(WorkbenchError, match="cannot be shuffled"):
        few_shot(FACTS[:1], FACTS, 1, seed=0, shuffled=True)


# --- words and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("she drinks tea .", "tea", True),
        ("she drinks Tea.", " tea ", True),
        ("she eats steak", "tea", False),
        ("a teapot", "tea", False),
        ("New\nYork", "new york", True),
        ("he writes C++ code", "C++", True),
        ("42.5 %", "42.5", True),
        ("142.5", "42.5", False),
        ("我住在北京市", "北京", True),
        ("anything", "", False),
        ("anything", "  ", False),
    ],
)
def test_what_counts_as_a_mention(text: str, phrase: str, expected: bool) -> None:
    assert mentions(text, phrase) is expected


def test_bad_input_is_named() -> None:
    with pytest.raises(WorkbenchError, match="-1; give 0 or more"):
        few_shot(FACTS, FACTS, -1, seed=0)
    with pytest.raises(WorkbenchError, match="'some words' has none"):
        few_shot(FACTS, [Example("some words")], 1, seed=0)
    with pytest.raises(
        WorkbenchError, match=r"5 facts are left to demonstrate 'anna lives in rome \.', and 6"
    ):
        few_shot(FACTS, FACTS, 6, seed=0)
