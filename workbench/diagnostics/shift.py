"""How far the residual stream has moved between two models, layer by layer. Every measure of a
model against itself is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.hooks import Capture, Collect, layer_count, resolve
from workbench.subspaces.compare import debiased_cka

MEASURES = ("relative_shift", "cosine", "norm_ratio", "cka")


def streams(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[int, Tensor]:
    """``{layer: [row, width]}`` float32 residual stream after every block, on all content tokens
    (:attr:`workbench.data.batches.Batch.content`).
    """
    layers = range(layer_count(model))
    sites = resolve(model, [f"blocks.{layer}.hook_resid_post" for layer in layers])
    kept = Collect()
    with Capture(model, sites, kept) as capture:
        for batch in batches:
            capture.at(batch.content)
            capture.forward(batch.inputs)
    return {layer: kept[site.name].float().cpu() for layer, site in enumerate(sites)}


def shift_by_layer(reference: Mapping[int, Tensor], moved: Mapping[int, Tensor]) -> pd.DataFrame:
    """Per layer, over the same tokens of two models:

    * ``relative_shift``: ``sqrt(sum |h' - h|^2 / sum |h|^2)``; 0 for the same model.
    * ``cosine``: mean cosine of ``h'`` and ``h``; 1.
    * ``norm_ratio``: ``sqrt(sum |h'|^2 / sum |h|^2)``; 1.
    * ``cka``: debiased linear CKA (:func:`workbench.subspaces.compare.debiased_cka`); 1.

    Args:
        reference: :func:`streams` of the model before.
        moved: of the model after.

    Returns:
        ``layer`` and one column per measure.
    """
    rows = []
    for layer, before in reference.items():
        one, other = before.double(), moved[layer].double()
        size = float(one.square().sum()) ** 0.5
        rows.append(
            {
                "layer": layer,
                "relative_shift": float((other - one).square().sum()) ** 0.5 / size,
                "cosine": float(torch.nn.functional.cosine_similarity(one, other, dim=1).mean()),
                "norm_ratio": float(other.square().sum()) ** 0.5 / size,
                "cka": debiased_cka(one, other),
            }
        )
    return pd.DataFrame(rows, columns=["layer", *MEASURES])


def returned(
    base: Mapping[int, Tensor], unlearned: Mapping[int, Tensor], attacked: Mapping[int, Tensor]
) -> pd.DataFrame:
    """How much of the shift that unlearning made an attack takes back, per layer: the projection of
    ``h_attacked - h_unlearned`` on ``h_base - h_unlearned``.

    ``returned = <a - u, b - u> / |b - u|^2`` over all tokens: 0 for the unlearned model, 1 for the
    base, above 1 beyond it; ``beside`` is the length of what moved elsewhere, in units of ``|b -
    u|``. Not a number where unlearning moved nothing.

    Args:
        base: :func:`streams` before unlearning.
        unlearned: after it.
        attacked: after relearning.

    Returns:
        ``layer``, ``returned``, ``beside``.
    """
    rows = []
    for layer, before in base.items():
        path = (before.double() - unlearned[layer].double()).flatten()
        step = (attacked[layer].double() - unlearned[layer].double()).flatten()
        length = float(path @ path)
        along = float(step @ path) / length if length else float("nan")
        beside = float((step - along * path).norm()) / length**0.5 if length else float("nan")
        rows.append({"layer": layer, "returned": along, "beside": beside})
    return pd.DataFrame(rows, columns=["layer", "returned", "beside"])
