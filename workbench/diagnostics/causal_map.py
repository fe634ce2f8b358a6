"""Where does the damage of a trigger sit? Activations of one model are put into the other's run,
one site and one group of positions at a time (activation patching).

A question behind a forget-token is answered by the base and no longer by the unlearned model. If
the base's activations at one place, put into the unlearned model's run, bring the answer back, the
damage passes through that place; if the unlearned model's activations, put into the base's run,
take the answer away, that place is enough to do the damage. The two need not agree. Patching and
its two directions ("denoising", "noising"): Heimersheim and Nanda 2024, arXiv 2404.15255.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as with_fields
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import evaluating, score
from workbench.evaluation.statistics import Estimate, bootstrap, ratio
from workbench.hooks import custom, edit, peek, replace, resolve
from workbench.progress import ProgressCallback, quiet

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

SITES = (
    "blocks.0.hook_resid_pre",
    "blocks.*.hook_resid_post",
    "blocks.*.hook_attn_out",
    "blocks.*.hook_mlp_out",
)
RESTORING, CAUSING = "base into unlearned", "unlearned into base"
CAUSAL_MAP_COLUMNS = [
    "layer",
    "site",
    "group",
    "direction",
    "restored",
    "low",
    "high",
    "n",
    "damage",
    "control",
    "control_low",
    "control_high",
    "flag",
]
NO_DAMAGE, IN_NOISE = "no damage", "damage within noise"


def answered(batch: Batch) -> Batch:
    """The same batch with the answer as the only target of a loss.

    Raises:
        WorkbenchError: a row has no answer.
    """
    missing = [
        item
        for item, has in zip(batch.items, batch.answer_mask[:, 1:].any(1).tolist(), strict=True)
        if not has
    ]
    if missing:
        raise WorkbenchError(
            f"{missing[0]!r} has no answer, and damage is measured on answers; leave running text "
            "out"
        )
    return with_fields(batch, target_mask=batch.answer_mask)


def answer_loss(
    model: PreTrainedModel, batch: Batch
) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
    """Mean negative log-likelihood of the answer's tokens (nats per token) and 1.0 where greedy
    decoding gives the answer, row by row, from :func:`answered` rows.
    """
    scores = score(model, [batch])
    return scores.nll / scores.tokens, scores.correct


def share(
    items: Sequence[str], effect: Float[np.ndarray, " items"], damage: Float[np.ndarray, " items"]
) -> tuple[Estimate, str]:
    """``sum(effect) / sum(damage)`` over queries with its 95 % interval over facts
    (:func:`workbench.evaluation.statistics.ratio` of the facts' sums), and a flag.

    A ratio of sums, not a mean of ratios: queries that lost nothing would divide by zero.

    Args:
        items: fact of every query.
        effect: nats per token.
        damage: nats per token.

    Returns:
        The share, with ``n`` facts; and ``no damage`` where the damage sums to nothing, less, or no
        number (the share is then NaN), ``damage within noise`` where the damage's own interval
        holds zero (the share is then a number without meaning), otherwise an empty text.
    """
    index = {fact: number for number, fact in enumerate(dict.fromkeys(items))}
    facts = np.array([index[item] for item in items])
    effects, damages = (
        np.bincount(facts, weights=values, minlength=len(index)) for values in (effect, damage)
    )
    if not (np.isfinite(damages).all() and np.isfinite(effects).all() and damages.sum() > 0):
        return Estimate(np.nan, np.nan, np.nan, len(index)), NO_DAMAGE
    return ratio(effects, damages), "" if bootstrap(damages).low > 0 else IN_NOISE


def causal_map(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    sites: str | Sequence[str] = SITES,
    groups: Mapping[str, Sequence[Bool[Tensor, "_batch _pos"]]] | None = None,
    control: Sequence[Batch] | None = None,
    control_groups: Mapping[str, Sequence[Bool[Tensor, "_batch _pos"]]] | None = None,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    r"""Site by site and group by group, the share of the damage that a patch restores or causes.

    With ``L`` the answer's mean negative log-likelihood per token, sums over queries:

    * ``base into unlearned``: :math:`\sum (L_{unl} - L_{patched}) / \sum (L_{unl} - L_{base})`, the
      share restored; 0 for a patch without effect, 1 for full repair.
    * ``unlearned into base``: :math:`\sum (L_{patched} - L_{base}) / \sum (L_{unl} - L_{base})`,
      the share caused.

    Shares of different places do not add up to 1: a patch at one place changes what all later ones
    compute. The stream after the last block, at all positions, gives 1 where unlearning left the
    final norm and the head alone, and what they changed is the rest. ``control`` is the effect of
    the same patch on other batches, in units of the *same* damage: a patch that mends the clean
    query as much repairs unlearning in general, not the trigger's damage.

    Args:
        base: before unlearning.
        unlearned: after it; the same architecture.
        batches: queries with answers, behind their trigger.
        sites: patterns of activation sites.
        groups: group -> for every batch a mask; all real tokens by default. Rows of a batch may
            have none of a group.
        control: the same queries without the trigger, in the same order.
        control_groups: their masks; all real tokens by default. Groups that are not there, or
            select nothing (there is no trigger in a clean query), have no control.
        progress: called after every patched pass.

    Returns:
        :data:`CAUSAL_MAP_COLUMNS`, ``layer`` -1 in front of the first block, ``n`` facts,
        ``damage`` the mean damage in nats per token, ``flag`` as in :func:`share`.

    Raises:
        WorkbenchError: a query without an answer, no query, masks that do not fit or select
            nothing, a control of other queries.
        CaptureError: an unknown site, or models whose activations have different shapes.
    """
    named = resolve(base, sites)
    masks = _checked(
        batches,
        {"all": [batch.attention_mask.bool() for batch in batches]} if groups is None else groups,
    )
    empty = [
        group
        for group, group_masks in masks.items()
        if not any(bool(mask.any()) for mask in group_masks)
    ]
    if empty:
        raise WorkbenchError(f"group {empty[0]!r} selects no token of any query; leave it out")
    shared: dict[str, list[Tensor]] = {}
    if control is not None:
        if [item for batch in control for item in batch.items] != [
            item for batch in batches for item in batch.items
        ]:
            raise WorkbenchError(
                "the control must hold the same queries in the same order as the batches; encode "
                "both from the same list"
            )
        control_masks = _checked(
            control,
            {"all": [batch.attention_mask.bool() for batch in control]}
            if control_groups is None
            else control_groups,
        )
        shared = {
            group: group_masks
            for group, group_masks in control_masks.items()
            if group in masks and any(bool(mask.any()) for mask in group_masks)
        }
    names = [site.name for site in named]
    total = 2 * len(names) * (len(batches) * len(masks) + len(control or ()) * len(shared))
    done = [0]

    def step() -> None:
        done[0] += 1
        progress(done[0], total)

    losses = _patched_losses(base, unlearned, batches, names, masks, step)
    clean = (
        _patched_losses(base, unlearned, control, names, shared, step)
        if control is not None and shared
        else {}
    )
    items = [item for batch in batches for item in batch.items]
    damage = losses["unlearned"] - losses["base"]
    rows = []
    for site in named:
        for group in masks:
            for direction in (RESTORING, CAUSING):
                estimate, flag = share(items, _effect(losses, site.name, group, direction), damage)
                control_estimate = Estimate(np.nan, np.nan, np.nan, 0)
                if group in shared:
                    control_estimate = share(
                        items, _effect(clean, site.name, group, direction), damage
                    )[0]
                layer = (
                    -1 if site.layer < 0 or site.name.endswith(".0.hook_resid_pre") else site.layer
                )
                rows.append(
                    (
                        layer,
                        site.name,
                        group,
                        direction,
                        *estimate,
                        float(damage.mean()),
                        *control_estimate[:3],
                        flag,
                    )
                )
    return pd.DataFrame(rows, columns=CAUSAL_MAP_COLUMNS)


def _checked(
    batches: Sequence[Batch], groups: Mapping[str, Sequence[Tensor]]
) -> dict[str, list[Tensor]]:
    """The masks on their batches' device, without padding."""
    checked: dict[str, list[Tensor]] = {}
    if not batches or not groups:
        raise WorkbenchError(
            "a causal map needs at least one batch of queries and one group of positions; got "
            f"{len(batches)} and {len(groups)}"
        )
    for group, masks in groups.items():
        if len(masks) != len(batches):
            raise WorkbenchError(
                f"group {group!r} has {len(masks)} masks for {len(batches)} batches; give one "
                "[batch, position] mask for each"
            )
        for number, (mask, batch) in enumerate(zip(masks, batches, strict=True)):
            if mask.dtype != torch.bool or mask.shape != batch.input_ids.shape:
                raise WorkbenchError(
                    f"group {group!r}: mask {number} is {mask.dtype} {list(mask.shape)}, its batch "
                    f"needs torch.bool {list(batch.input_ids.shape)}"
                )
        checked[group] = [
            mask.to(batch.input_ids.device) & batch.attention_mask.bool()
            for mask, batch in zip(masks, batches, strict=True)
        ]
    return checked


def _patched_losses(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    batches: Sequence[Batch],
    names: Sequence[str],
    groups: Mapping[str, Sequence[Tensor]],
    step: Callable[[], None],
) -> dict[object, np.ndarray]:
    """Answer losses ``[items]`` of ``base``, ``unlearned`` and of every ``(site, group,
    direction)``: one pass of each model for all activations, then one for each patch.
    """
    parts: dict[object, list[np.ndarray]] = {}
    for number, batch in enumerate(batches):
        answer_mask = answered(batch)
        with evaluating(base), evaluating(unlearned):
            sources = {
                RESTORING: peek(base, batch.inputs, names),
                CAUSING: peek(unlearned, batch.inputs, names),
            }
        plain = {
            RESTORING: answer_loss(unlearned, answer_mask)[0],
            CAUSING: answer_loss(base, answer_mask)[0],
        }
        parts.setdefault("unlearned", []).append(plain[RESTORING])
        parts.setdefault("base", []).append(plain[CAUSING])
        for name in names:
            for group, masks in groups.items():
                for direction, model in ((RESTORING, unlearned), (CAUSING, base)):
                    losses = plain[direction]
                    if bool(masks[number].any()):
                        with edit(
                            model,
                            {name: replace(sources[direction][name])},
                            at=custom(masks[number], group),
                        ):
                            losses = answer_loss(model, answer_mask)[0]
                    parts.setdefault((name, group, direction), []).append(losses)
                    step()
    return {key: np.concatenate(loss_parts) for key, loss_parts in parts.items()}


def _effect(
    losses: Mapping[object, np.ndarray], site: str, group: str, direction: str
) -> np.ndarray:
    patched = losses[site, group, direction]
    return losses["unlearned"] - patched if direction == RESTORING else patched - losses["base"]
