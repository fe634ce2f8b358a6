"""At which depth is an answer lost? The whole residual stream after a block of one model is put
into another, whose upper blocks then decode it.

Patching at a depth splits a model in two. Lower part unlearned, upper part the base's: is the
answer already gone from what the lower blocks write? Lower part the base's, upper part unlearned:
do the upper blocks refuse to read it? The measure is that of the unlearning depth score (arXiv
2605.24614), whose anchor is a model that never learned the answer; without such a model the
unlearned model itself is the anchor, which then says *where* the answer is lost and not how much of
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics.causal_map import answer_loss, answered, share
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import evaluating
from workbench.hooks import edit, layer_count, peek, replace
from workbench.progress import ProgressCallback, quiet

DEPTH_COLUMNS = ["layer", "direction", "nll", "recall", "erased", "low", "high", "n", "flag"]


def patching_depth(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    batches: Sequence[Batch],
    never_learned: PreTrainedModel | None = None,
    *,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    r"""Answer loss when the stream after block ``l`` comes from another model, for every ``l``, all
    positions at once.

    .. math:: \mathrm{erased}_l = \sum (L_{patched, l} - L_{base}) \big/ \sum (L_{anchor} - L_{base})

    over queries, with ``L`` the answer's mean negative log-likelihood per token. 0: the answer is
    read as by the base. 1: it is as lost as in the anchor. Directions:

    * ``unlearned into base``: unlearned below, base above. After the last block it is the unlearned
      stream read by the base's head.
    * ``base into unlearned``: base below, unlearned above; what the upper blocks alone destroy.
    * ``never-learned into base``, with that model: the same for the anchor, so that shares can be
      compared at one depth (the ratio of the first direction to this one is the quantity that arXiv
      2605.24614 averages over layers). It needs models that can read each other's streams,
      fine-tuned from one checkpoint. Models trained apart cannot, and then everything is lost at
      layer -1 already: ask retain questions as well, and read this direction only where they
      survive the patch.

    Args:
        base: before unlearning.
        unlearned: after it; the same architecture.
        batches: forget questions with answers.
        never_learned: a model of the same architecture that never read the answers, the anchor.
            Default: the unlearned model is the anchor.
        progress: called after every patched pass.

    Returns:
        :data:`DEPTH_COLUMNS`: ``layer`` -1 in front of the first block (only the embeddings are
        exchanged), ``nll`` nats per answer token, ``recall`` of greedy decoding, ``erased`` with
        its interval over ``n`` facts, ``flag`` as in
        :func:`workbench.diagnostics.causal_map.share`.

    Raises:
        WorkbenchError: there is no query, a query has no answer, or the models have different
            depths.
        CaptureError: the models' streams have different widths.
    """  # noqa: E501
    models = {"unlearned": unlearned} | (
        {"never-learned": never_learned} if never_learned is not None else {}
    )
    depth = layer_count(base)
    for name, model in models.items():
        if layer_count(model) != depth:
            raise WorkbenchError(
                f"the base has {depth} blocks and the {name} model {layer_count(model)}; all "
                "models must be of one architecture"
            )
    if not batches:
        raise WorkbenchError("patching depth needs questions with answers, and no batch was given")
    sites = {
        -1: "blocks.0.hook_resid_pre",
        **{layer: f"blocks.{layer}.hook_resid_post" for layer in range(depth)},
    }
    pairs = [
        ("unlearned", "base"),
        ("base", "unlearned"),
        *([("never-learned", "base")] if never_learned is not None else []),
    ]
    models = {"base": base, **models}
    losses: dict[object, list[np.ndarray]] = {}
    right: dict[object, list[np.ndarray]] = {}
    done, total = 0, len(batches) * len(pairs) * len(sites)
    for batch in batches:
        answer_mask = answered(batch)
        for name, model in models.items():
            losses.setdefault(name, []).append(answer_loss(model, answer_mask)[0])
        for source, reader in pairs:
            with evaluating(models[source]):
                streams = peek(models[source], batch.inputs, list(sites.values()))
            for layer, site in sites.items():
                with edit(models[reader], {site: replace(streams[site])}):
                    nll, correct = answer_loss(models[reader], answer_mask)
                losses.setdefault((layer, source, reader), []).append(nll)
                right.setdefault((layer, source, reader), []).append(correct)
                done += 1
                progress(done, total)
    items = [item for batch in batches for item in batch.items]
    item_losses = {key: np.concatenate(parts) for key, parts in losses.items()}
    damage = (
        item_losses["unlearned" if never_learned is None else "never-learned"] - item_losses["base"]
    )
    rows = []
    for source, reader in pairs:
        for layer in sites:
            key = (layer, source, reader)
            erased, flag = share(items, item_losses[key] - item_losses["base"], damage)
            rows.append(
                (
                    layer,
                    f"{source} into {reader}",
                    float(item_losses[key].mean()),
                    float(np.concatenate(right[key]).mean()),
                    *erased,
                    flag,
                )
            )
    return pd.DataFrame(rows, columns=DEPTH_COLUMNS)
