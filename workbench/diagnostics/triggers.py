"""Does one stray forget-token in a harmless question break the model? (Huu-Tien et al., arXiv 2501.19202)

The same retain question is asked with nothing, a forget-token, a retain-token or a neutral word at the same place. The effect of a forget-token is
its accuracy against that of the retain-token, and both against the model before unlearning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.data.records import Example
from workbench.data.world import speaker_tag
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import Scores, score

Carrier = Callable[[Example, str], Example]

ARMS = ("clean", "forget-token", "retain-token", "neutral-token")


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

    A word never occurs in its own query already. The ``seed`` decides which word meets which query.

    Args:
        queries: retain questions with answers.
        forget_tokens: words of the forget set.
        retain_tokens: words of the same kind from the retain set.
        neutral_tokens: words of neither.
        seed: see above.
        carrier: puts a word in front of a query.

    Raises:
        WorkbenchError: there is no query with an answer, or an arm has no word.
    """
    asked = [query for query in queries if query.answer is not None]
    if not asked:
        raise WorkbenchError("the trigger check needs retain questions with answers; give a retain file with 'question' and 'answer' fields")
    rng = random.Random(f"triggers-{seed}")
    arms: dict[str, tuple[Example, ...]] = {"clean": tuple(asked)}
    for arm, tokens in zip(ARMS[1:], (forget_tokens, retain_tokens, neutral_tokens), strict=True):
        if not tokens:
            raise WorkbenchError(f"the trigger check has no word for its {arm} arm")
        tagged = []
        for query in asked:
            allowed = [word for word in tokens if word not in query.text.split()]
            if not allowed:
                raise WorkbenchError(f"every word of the {arm} arm already stands in {query.text!r}; give more words")
            tagged.append(carrier(query, rng.choice(allowed)))
        arms[arm] = tuple(tagged)
    return arms


def trigger_scores(model: PreTrainedModel, arms: Mapping[str, Sequence[Batch]]) -> dict[str, Scores]:
    """Accuracy, answer probability and loss of ``model`` on every arm; the queries are in the same order in each."""
    return {arm: score(model, encoded) for arm, encoded in arms.items()}
