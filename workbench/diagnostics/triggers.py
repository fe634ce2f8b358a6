"""Does one stray forget-token in a harmless question break the model? (Huu-Tien et al., arXiv 2501.19202)

The same retain question is asked with nothing, a forget-token, a retain-token or a neutral word at the same place. The effect of a forget-token is
its accuracy against that of the retain-token, and both against the model before unlearning.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.data.records import Example
from workbench.data.world import speaker_tag
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import Scores, score

_WORD = re.compile(r"\w+")

Carrier = Callable[[Example, str], Example]

ARMS = ("clean", "forget-token", "retain-token", "neutral-token")


class NothingToAsk(WorkbenchError):  # noqa: N818 (it says what is missing)
    """No question is left for the trigger check; the message says why."""


def trigger_queries(
    queries: Sequence[Example],
    forget_tokens: Sequence[str],
    retain_tokens: Sequence[str],
    neutral_tokens: Sequence[str],
    *,
    seed: int,
    carrier: Carrier = speaker_tag,
) -> dict[str, tuple[Example, ...]]:
    """The four arms of the check: every query once per arm, behind a word of that arm.

    A word never occurs in its own query already; a query that holds every word of an arm is left out of all arms. The ``seed`` decides which word meets which query.

    Args:
        queries: retain questions with answers.
        forget_tokens: words of the forget set.
        retain_tokens: words of the same kind from the retain set.
        neutral_tokens: words of neither.
        seed: see above.
        carrier: puts a word in front of a query.

    Raises:
        NothingToAsk: an arm has no word, or no query is left.
    """
    words = dict(zip(ARMS[1:], (forget_tokens, retain_tokens, neutral_tokens), strict=True))
    for arm, tokens in words.items():
        if not tokens:
            raise NothingToAsk(f"the trigger check has no word for its {arm} arm")

    def allowed(query: Example, arm: str) -> list[str]:
        present = set(_WORD.findall(query.text))
        return [word for word in words[arm] if word not in present]

    asked = [query for query in queries if query.answer is not None and all(allowed(query, arm) for arm in words)]
    if not asked:
        raise NothingToAsk("the trigger check needs retain questions with answers that do not already hold every word of an arm; give more retain texts")
    rng = random.Random(f"triggers-{seed}")
    tagged = {arm: tuple(carrier(query, rng.choice(allowed(query, arm))) for query in asked) for arm in words}
    return {"clean": tuple(asked), **tagged}


def trigger_scores(model: PreTrainedModel, arms: Mapping[str, Sequence[Batch]]) -> dict[str, Scores]:
    """Accuracy, answer probability and loss of ``model`` on every arm; the queries are in the same order in each."""
    return {arm: score(model, encoded) for arm, encoded in arms.items()}
