"""Few-shot attack: solved questions about other facts in front of a query, without any change of a
weight (in-context learning, Brown et al. 2020, arXiv 2005.14165, section 2).

Lynch et al. 2024 (arXiv 2402.16835) and later suites ask unlearned models this way: a model that
only lost the habit of answering regains it from the demonstrations. The control is the same prompt
with the demonstrations' answers shuffled (Min et al. 2022, arXiv 2202.12837): same tokens, same
format, no true mapping.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

from workbench.data.records import Example, prefixed
from workbench.errors import WorkbenchError


def mentions(text: str, phrase: str) -> bool:
    """Whether ``phrase`` stands in ``text``: case and kind of white space are ignored, and a phrase
    inside a longer ASCII word or number does not count.

    A phrase without any visible character is in no text.
    """
    words = phrase.split()
    if not words:
        return False
    pattern = r"(?<![a-zA-Z0-9])" + r"\s+".join(map(re.escape, words)) + r"(?![a-zA-Z0-9])"
    return re.search(pattern, text, re.IGNORECASE) is not None


def few_shot(
    examples: Sequence[Example],
    shots: Sequence[Example],
    k: int,
    seed: int,
    separator: str = "\n\n",
    *,
    allow_same_answer: bool = False,
    shuffled: bool = False,
) -> tuple[Example, ...]:
    """The queries, each behind ``k`` solved demonstrations; the spans of answer and subject move
    along.

    A query's demonstrations are of ``k`` different facts, none of them its own (the same ``item``,
    or the same text), and no demonstration mentions its answer. Demonstrations with different
    answers come first. The draw depends on the seed and on the query's text alone: on no other
    query, and on ``k`` only in that fewer demonstrations are the first of more.

    Args:
        examples: the queries, with or without answers.
        shots: what demonstrations are drawn from; every one has an answer. In an attack these are
            the facts that the attacker holds.
        k: demonstrations per query; 0 gives the queries back.
        seed: of the draw.
        separator: between two demonstrations, and between the last one and the query.
        allow_same_answer: let demonstrations mention the query's answer. A gain may then be
            copying.
        shuffled: the control arm. The same demonstrations in the same order, but their answers
            change places, so that as many as possible are wrong.

    Returns:
        As many examples as were given, in their order.

    Raises:
        WorkbenchError: ``k`` is negative, a demonstration has no answer, a query is left with fewer
            than ``k`` demonstrations, or their answers cannot be shuffled because all are the same.
    """
    if k < 0:
        raise WorkbenchError(f"the number of demonstrations is {k}; give 0 or more")
    for shot in shots:
        if shot.answer is None:
            raise WorkbenchError(
                f"a demonstration needs an answer; {shot.text[:60]!r} has none (give jsonl with "
                "question and answer)"
            )
    return tuple(
        prefixed(
            query, _prefix(_drawn(query, shots, k, seed, allow_same_answer), separator, shuffled)
        )
        for query in examples
    )


def _drawn(
    query: Example, shots: Sequence[Example], k: int, seed: int, allow_same_answer: bool
) -> list[Example]:
    """The query's demonstrations."""

    def allowed(shot: Example) -> bool:
        is_query = (shot.item == query.item and shot.item != "") or shot.text == query.text
        return not is_query and (allow_same_answer or not mentions(shot.text, query.answer_text))

    pool = [shot for shot in shots if allowed(shot)]
    random.Random(f"few-shot-{seed}-{query.text}").shuffle(pool)
    facts = list({shot.item or shot.text: shot for shot in reversed(pool)}.values())[
        ::-1
    ]  # the first paraphrase of each fact
    if len(facts) < k:
        raise WorkbenchError(
            f"{len(facts)} facts are left to demonstrate {query.text[:60]!r}, and {k} were asked "
            "for: its own fact and what mentions its answer do not count. Give more "
            "demonstrations, ask for fewer, or allow the same answer"
        )
    drawn_items: Counter[str] = Counter()
    turns = []
    for shot in facts:
        turns.append(drawn_items[shot.answer_text])
        drawn_items[shot.answer_text] += 1
    return [facts[index] for index in sorted(range(len(facts)), key=turns.__getitem__)][:k]


def _prefix(demonstrations: Sequence[Example], separator: str, shuffled: bool) -> str:
    answers = [shot.answer_text for shot in demonstrations]
    if shuffled and answers:
        answers = _exchanged(answers)
    return "".join(
        _answered(shot, answer) + separator
        for shot, answer in zip(demonstrations, answers, strict=True)
    )


def _answered(shot: Example, answer: str) -> str:
    assert shot.answer is not None
    return shot.text[: shot.answer[0]] + answer + shot.text[shot.answer[1] :]


def _exchanged(answers: Sequence[str]) -> list[str]:
    """A permutation of the answers that leaves as few as possible where they were: sorted, and
    turned by the size of the largest group of equal ones.
    """
    largest = max(Counter(answers).values())
    if largest == len(answers):
        raise WorkbenchError(
            f"the answers of {len(answers)} demonstration(s) cannot be shuffled: all are "
            f"{answers[0]!r}; ask for more demonstrations"
        )
    order = sorted(range(len(answers)), key=answers.__getitem__)
    exchanged = list(answers)
    for place, index in enumerate(order):
        exchanged[index] = answers[order[(place + largest) % len(order)]]
    return exchanged
