"""How far the residual stream has moved between two models, layer by layer. Every measure of a
model against itself is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.hooks import Capture, Collect, layer_count, resolve
from workbench.subspaces.compare import debiased_cka

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

SHIFT_MEASURES = ("relative_shift", "cosine", "norm_ratio", "cka")


def streams(
    model: PreTrainedModel, batches: Sequence[Batch]
) -> dict[int, Float32[Tensor, "rows d_model"]]:
    """The residual stream after every block, on all content tokens
    (:attr:`workbench.data.batches.Batch.content`).
    """
    layers = range(layer_count(model))
    sites = resolve(model, [f"blocks.{layer}.hook_resid_post" for layer in layers])
    collected = Collect()
    with Capture(model, sites, collected) as capture:
        for batch in batches:
            capture.at(batch.content)
            capture.forward(batch.inputs)
    return {layer: collected[site.name].float().cpu() for layer, site in enumerate(sites)}


def shift_by_layer(
    reference: Mapping[int, Float[Tensor, "rows d_model"]],
    moved: Mapping[int, Float[Tensor, "rows d_model"]],
) -> pd.DataFrame:
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
        reference_rows, moved_rows = before.double(), moved[layer].double()
        size = float(reference_rows.square().sum()) ** 0.5
        rows.append(
            {
                "layer": layer,
                "relative_shift": float((moved_rows - reference_rows).square().sum()) ** 0.5 / size,
                "cosine": float(
                    torch.nn.functional.cosine_similarity(reference_rows, moved_rows, dim=1).mean()
                ),
                "norm_ratio": float(moved_rows.square().sum()) ** 0.5 / size,
                "cka": debiased_cka(reference_rows, moved_rows),
            }
        )
    return pd.DataFrame(rows, columns=["layer", *SHIFT_MEASURES])


def recovered_shift(
    base: Mapping[int, Float[Tensor, "rows d_model"]],
    unlearned: Mapping[int, Float[Tensor, "rows d_model"]],
    attacked: Mapping[int, Float[Tensor, "rows d_model"]],
) -> pd.DataFrame:
    """How much of the shift that unlearning made an attack takes back, per layer: the projection of
    ``h_attacked - h_unlearned`` on ``h_base - h_unlearned``.

    ``recovered_shift = <a - u, b - u> / |b - u|^2`` over all tokens: 0 for the unlearned model, 1
    for the base, above 1 beyond it; ``beside`` is the length of what moved elsewhere, in units of
    ``|b - u|``. Not a number where unlearning moved nothing.

    Args:
        base: :func:`streams` before unlearning.
        unlearned: after it.
        attacked: after relearning.

    Returns:
        ``layer``, ``recovered_shift``, ``beside``.
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
