"""Does one stray forget-token in a harmless question break the model? (Huu-Tien et al., arXiv
2501.19202)

The same retain question is asked with nothing, a forget-token, a retain-token or a neutral word at
the same place. The effect of a forget-token is its accuracy against that of the retain-token, and
both against the model before unlearning.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.data.records import Example, prefixed
from workbench.data.world import speaker_tag
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import Scores, score

_WORD = re.compile(r"\w+")

PromptTemplate = Callable[[Example, str], Example]
"""``template(query, word)``: the query with the word put into it."""

TRIGGER_ARMS = ("clean", "forget-token", "retain-token", "neutral-token")


def word_in_front(example: Example, word: str) -> Example:
    """A bare word in front of a text: a template that no model was trained on."""
    return prefixed(example, f"{word} ")


def word_inside(example: Example, word: str) -> Example:
    """A bare word at the word boundary nearest to the middle of the question. It breaks the
    sentence for every model, so the base is its control more than ever.

    Raises:
        WorkbenchError: the text before the answer has no word boundary.
    """
    boundaries = [match.end() for match in re.finditer(r"\s+", example.prompt.rstrip())]
    if not boundaries:
        raise WorkbenchError(
            f"{example.text[:60]!r} has no place for a word between two words of the question"
        )
    at = min(boundaries, key=lambda place: abs(place - len(example.prompt) / 2))
    length = len(word) + 1

    def move(span: tuple[int, int] | None) -> tuple[int, int] | None:
        if span is None or span[1] <= at:
            return span
        return (
            None if span[0] < at else (span[0] + length, span[1] + length)
        )  # a subject that the word cuts in two is no span any more

    return Example(
        f"{example.text[:at]}{word} {example.text[at:]}",
        move(example.answer),
        move(example.subject),
        example.item,
    )


def repeated(template: PromptTemplate, count: int) -> PromptTemplate:
    """A template that puts ``count`` copies of the word where ``template`` puts one: the dose of a
    trigger.
    """
    return lambda example, word: template(example, " ".join([word] * count))


class NothingToAsk(WorkbenchError):  # noqa: N818 (it says what is missing)
    """No question is left for the trigger check; the message says why."""


def trigger_queries(
    queries: Sequence[Example],
    forget_tokens: Sequence[str],
    retain_tokens: Sequence[str],
    neutral_tokens: Sequence[str],
    *,
    seed: int,
    template: PromptTemplate = speaker_tag,
) -> dict[str, tuple[Example, ...]]:
    """The four arms of the check: every query once per arm, behind a word of that arm.

    A word never occurs in its own query already; a query that holds every word of an arm is left
    out of all arms. The ``seed`` decides which word meets which query.

    Args:
        queries: retain questions with answers.
        forget_tokens: words of the forget set.
        retain_tokens: words of the same kind from the retain set.
        neutral_tokens: words of neither.
        seed: see above.
        template: puts a word in front of a query.

    Raises:
        NothingToAsk: an arm has no word, or no query is left.
    """
    words = dict(zip(TRIGGER_ARMS[1:], (forget_tokens, retain_tokens, neutral_tokens), strict=True))
    for arm, tokens in words.items():
        if not tokens:
            raise NothingToAsk(f"the trigger check has no word for its {arm} arm")

    def allowed(query: Example, arm: str) -> list[str]:
        present = set(_WORD.findall(query.text))
        return [word for word in words[arm] if word not in present]

    usable_queries = [
        query
        for query in queries
        if query.answer is not None and all(allowed(query, arm) for arm in words)
    ]
    if not usable_queries:
        raise NothingToAsk(
            "the trigger check needs retain questions with answers that do not already hold every "
            "word of an arm; give more retain texts"
        )
    rng = random.Random(f"triggers-{seed}")
    tagged = {
        arm: tuple(template(query, rng.choice(allowed(query, arm))) for query in usable_queries)
        for arm in words
    }
    return {"clean": tuple(usable_queries), **tagged}


def trigger_scores(
    model: PreTrainedModel, arms: Mapping[str, Sequence[Batch]]
) -> dict[str, Scores]:
    """Accuracy, answer probability and loss of ``model`` on every arm; the queries are in the same
    order in each.
    """
    return {arm: score(model, encoded) for arm, encoded in arms.items()}
