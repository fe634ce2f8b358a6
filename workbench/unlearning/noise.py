"""Random noise augmentation (RNA): noise on the frozen reference while the retain term is
computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import mean_over, weight_of
from workbench.hooks import Site, edit
from workbench.unlearning.objectives import LossTerm

if TYPE_CHECKING:
    from jaxtyping import Float


def noise_std(rows: Float[Tensor, "... width"], ratio: float) -> Float[Tensor, ""]:
    """The standard deviation ``nu = ratio * mean ||h|| / sqrt(width)`` that makes noise ``ratio``
    times as long as the rows are on average.
    """
    return ratio * rows.norm(dim=-1).mean() / rows.shape[-1] ** 0.5


def gaussian(ratio: float, seed: int) -> Callable[..., Float[Tensor, "... width"]]:
    r"""Add isotropic Gaussian noise to rows (Huu-Tien et al., *Improving LLM Unlearning Robustness
    via Random Perturbations*).

    ``h -> h + nu * N(0, I)``, fresh at every call, every token and every coordinate. ``nu`` is a
    **standard deviation**, given here by the dimensionless ratio ``r = nu * sqrt(width) / mean
    ||h||`` of the noise's length to the representation's, so that one number fits models of any
    width.

    Args:
        ratio: ``r``. 0 gives the rows back unchanged.
        seed: of the noise's own random stream.

    Returns:
        ``noise(rows, size=None)``; ``size`` is ``nu`` itself, measured on the rows where it is not
        given.
    """
    if ratio < 0:
        raise ValueError(f"the noise ratio is {ratio}; it must not be negative")
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: Tensor, size: Tensor | None = None) -> Tensor:
        if ratio == 0:
            return rows
        nu = noise_std(rows, ratio) if size is None else size
        return rows + nu * torch.randn(rows.shape, generator=generator, dtype=torch.float32).to(
            rows.device
        )

    noise.restart = lambda: generator.manual_seed(seed)  # type: ignore[attr-defined]
    return noise


def noisy_reference(term: LossTerm, site: Site, ratio: float, seed: int) -> LossTerm:
    """RNA around any loss term that compares a model with the frozen reference: the reference's
    stream at ``site`` carries noise, and everything above it sees it.

    For a term that reads the representation at ``site`` itself (RMU, Adaptive RMU, RSV) this is
    ``||h - (h_ref + delta)||^2``; for one that reads the reference's predictions (KL) the noise
    passes through the blocks above. The model is never noised, and nothing changes at inference.
    All real tokens carry noise of one standard deviation, measured on the content tokens: the first
    token's norm is an outlier, and would set it alone.

    Args:
        term: a retain term. One that never runs the reference cannot carry noise:
            :class:`hooks.CaptureError` at the first step.
        site: an activation of the residual stream.
        ratio: length of the noise over that of the representation; see :func:`gaussian`.
        seed: of the noise's own random stream.

    Raises:
        ValueError: at a step whose model is its own reference: both would be noised.
    """
    text, first = gaussian(ratio, seed), gaussian(ratio, seed + 1_000_003)

    @mean_over(weight_of(term))
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        if model is reference:
            raise ValueError(
                "noise on the reference needs a reference of its own; the model was given as its "
                "own reference"
            )
        content, real = batch.content_mask, batch.attention_mask.bool()
        leading = real & ~content

        def noised(stream: Tensor) -> Tensor:
            rows = stream[content].float()
            after = stream.clone()
            after[content] = text(rows).to(stream.dtype)
            # A stream of random numbers of its own: how many rows begin with such a token does not
            # change the noise of the others.
            after[leading] = first(stream[leading].float(), noise_std(rows, ratio)).to(stream.dtype)
            return after

        with edit(reference, {site.name: noised}):
            return term(model, batch, reference)

    def restart() -> None:
        for part in (term, text, first):
            getattr(part, "restart", lambda: None)()

    loss.restart = restart  # type: ignore[attr-defined]
    return loss
