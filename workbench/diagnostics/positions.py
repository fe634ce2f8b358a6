"""Where the tokens of a trigger query stand: in the inserted word, before it, behind it.

The word is marked once, by its characters, on the texts (:func:`mark_triggers`); from then on every
batch carries its tokens as the ``subject_mask``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.data.batches import Batch
from workbench.data.records import Example
from workbench.data.world import speaker_tag
from workbench.diagnostics.triggers import TRIGGER_ARMS, PromptTemplate
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from jaxtyping import Bool

GROUPS = ("before", "trigger", "carrier", "after")
"""Before the word; in it; in the rest of the template (``asks :``); in the query itself."""

_PLACE = "\ufffc"  # stands for the word where a template is asked where it puts one


def mark_triggers(
    arms: Mapping[str, Sequence[Example]], template: PromptTemplate = speaker_tag
) -> dict[str, tuple[Example, ...]]:
    """The arms of :func:`workbench.diagnostics.triggers.trigger_queries` with the inserted word as
    the ``subject`` of every query, so that a batch's ``subject_mask`` finds its tokens.

    The word is found by its characters, whatever the tokenizer makes of them: the template is asked
    where it puts a placeholder. Clean queries get no subject; arms of other names (forget texts,
    whose subject is the forgotten name where it belongs) stay as they are.

    Args:
        arms: the arms, queries in the same order in each.
        template: the one that made them.

    Raises:
        WorkbenchError: there is no clean arm, an arm has another number of queries, or a query is
            not the clean one behind that template.
    """
    if "clean" not in arms:
        raise WorkbenchError(
            f"the arms {', '.join(arms) or '(none)'} have no clean one; give all that "
            "trigger_queries returned"
        )
    marked = {}
    for arm, examples in arms.items():
        if arm == "clean":
            marked[arm] = tuple(replace(example, subject=None) for example in examples)
        elif arm in TRIGGER_ARMS:
            if len(examples) != len(arms["clean"]):
                raise WorkbenchError(
                    f"arm {arm!r} has {len(examples)} queries and the clean arm "
                    f"{len(arms['clean'])}; they must be the same, in the same order"
                )
            marked[arm] = tuple(
                replace(tagged, subject=_word(clean, tagged, template))
                for clean, tagged in zip(arms["clean"], examples, strict=True)
            )
        else:
            marked[arm] = tuple(examples)
    return marked


def _word(clean: Example, tagged: Example, template: PromptTemplate) -> tuple[int, int]:
    """Character span of the word that ``template`` put into ``clean``."""
    front, *rest = template(clean, _PLACE).text.split(_PLACE)
    if (
        len(rest) == 1
        and tagged.text.startswith(front)
        and tagged.text.endswith(rest[0])
        and len(tagged.text) > len(front) + len(rest[0])
    ):
        return len(front), len(tagged.text) - len(rest[0])
    raise WorkbenchError(
        f"{tagged.text[:80]!r} is not {clean.text[:80]!r} with a word that this template put in; "
        "give the template of trigger_queries"
    )


def shared_tail(
    first: Batch, second: Batch
) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch other_pos"]]:
    """Row by row, the content tokens at the end that both texts have: two masks with equally many
    tokens in every row.

    Raises:
        WorkbenchError: the batches have different numbers of rows, or rows of different facts.
    """
    if first.items != second.items:
        raise WorkbenchError(
            f"rows {first.items[:3]} and {second.items[:3]} are not the same queries; encode both "
            "arms in the same order and batch size"
        )
    masks = (
        torch.zeros_like(first.input_ids, dtype=torch.bool),
        torch.zeros_like(second.input_ids, dtype=torch.bool),
    )
    for row in range(first.size):
        places = [batch.content_mask[row].nonzero()[:, 0].tolist() for batch in (first, second)]
        ids = [batch.input_ids[row].tolist() for batch in (first, second)]
        for first_place, second_place in zip(
            reversed(places[0]), reversed(places[1]), strict=False
        ):
            if ids[0][first_place] != ids[1][second_place]:
                break
            masks[0][row, first_place] = masks[1][row, second_place] = True
    return masks


def position_groups(
    batch: Batch, clean: Batch | None = None
) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Every real token in one of :data:`GROUPS`, as masks; ``trigger`` is the batch's
    ``subject_mask`` (see :func:`mark_triggers`).

    Rows without a trigger have their first token ``before`` (an attention sink) and the others
    ``after``.

    Args:
        batch: marked queries.
        clean: the same queries without the word: ``after`` is then what both have, and the rest of
            the insertion is the ``carrier``. Without it all that follows is ``after``.

    Raises:
        WorkbenchError: the marked word is one of the clean query's own (the arm was not marked), or
            :func:`shared_tail` fails.
    """
    real = batch.attention_mask.bool()
    trigger = batch.subject_mask & real
    marked = trigger.any(1, keepdim=True)
    behind = torch.where(
        marked, real & (trigger.flip(1).cumsum(1).flip(1) == 0), batch.content_mask
    )
    query_mask = behind
    if clean is not None:
        query_mask = shared_tail(batch, clean)[0]
        if bool((query_mask & trigger).any()):
            row = int((query_mask & trigger).any(1).nonzero()[0])
            raise WorkbenchError(
                f"row {row} ({batch.items[row]!r}): its subject is a word of the query itself, not "
                "an inserted one; see mark_triggers"
            )
        query_mask = query_mask & behind
    return {
        "before": real & ~behind & ~trigger,
        "trigger": trigger,
        "carrier": behind & ~query_mask,
        "after": query_mask,
    }
