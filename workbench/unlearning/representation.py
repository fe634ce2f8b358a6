"""Unlearning objectives on representations: steer, break or keep what flows through a model. Loss
terms as in ``objectives``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import content_tokens, mean_over, real_tokens
from workbench.hooks import Site, tapped
from workbench.unlearning.objectives import LossTerm

if TYPE_CHECKING:
    from jaxtyping import Float, Float32


def control_vector(width: int, seed: int) -> Float32[Tensor, " width"]:
    """An isotropic unit vector (a normalised Gaussian draw).

    The released RMU code draws from U[0, 1), which puts any two control vectors at a cosine of
    0.75; isotropic vectors of different seeds are nearly orthogonal.
    """
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vector / vector.norm()).float()


def _content(tensor: Tensor, batch: Batch) -> Tensor:
    return tensor[batch.content_mask].float()


@torch.no_grad()
def _mean_length(site: Site, reference: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
    """Mean norm of the content rows of ``batches`` at ``site`` of ``reference``."""
    norms = [
        _content(tapped(reference, [site], batch.inputs)[site.name], batch).norm(dim=-1)
        for batch in batches
    ]
    return torch.cat(norms).double().mean().float()


def steer_to(site: Site, target: Float[Tensor, " width"]) -> LossTerm:
    """RMU's forget term: ``mean over tokens and coordinates of (h - target)^2`` (Li et al. 2024,
    arXiv 2403.03218, eq. 1).

    The mean is over the content tokens of the batch: neither padding nor the leading BOS.
    open-unlearning takes it over the label tokens of each sequence, then over sequences; the two
    agree where answers are of one length (elsewhere the gradients had a cosine of 0.76 on the
    built-in world).

    Args:
        site: where the representation ``h`` is read.
        target: the scaled control vector ``c u``.
    """

    @mean_over(content_tokens)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        hidden = _content(tapped(model, [site], batch.inputs)[site.name], batch)
        return F.mse_loss(hidden, target.to(hidden.device).expand_as(hidden))

    return loss


def keep_representation(site: Site) -> LossTerm:
    """RMU's retain term: ``mean of (h - h_reference)^2`` over tokens and coordinates of the
    representation at ``site``.

    Over content tokens: the representation of the leading BOS, which holds no text, is free to
    move.
    """

    @mean_over(content_tokens)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            expected = _content(tapped(reference, [site], batch.inputs)[site.name], batch)
        return F.mse_loss(_content(tapped(model, [site], batch.inputs)[site.name], batch), expected)

    return loss


def mlp_breaking(
    sites: tuple[Site, ...], floor: float = 0.0, lengths: dict[str, Float[Tensor, ""]] | None = None
) -> LossTerm:
    r"""MLP breaking (Sondej and Yang 2025, arXiv 2509.11816): push every MLP output away from what
    it was.

    .. math:: \frac1L \sum_l \mathrm{mean}_t \max\big(f,\ \langle o_t, o^0_t\rangle / n_l^2\big), \qquad n_l = \mathrm{mean}_t \lVert o^0_t\rVert

    The gradient vanishes for a token once its output no longer points along the original one.
    ``n_l`` is the mean of the batch, as in the released code, unless ``lengths`` gives it; its
    ``on_set`` takes the mean over the whole set.

    Args:
        sites: outputs of the MLPs whose contribution is broken.
        floor: ``f`` in the formula.
        lengths: site name to ``n_l``.
    """  # noqa: E501

    @mean_over(content_tokens)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            clean = tapped(reference, sites, batch.inputs)
        activations = tapped(model, sites, batch.inputs)
        terms = []
        for site in sites:
            before, after = (
                _content(clean[site.name], batch),
                _content(activations[site.name], batch),
            )
            length = before.norm(dim=-1).mean() if lengths is None else lengths[site.name]
            scale = length.square().clamp(min=torch.finfo(torch.float32).tiny)
            terms.append(((before * after).sum(-1) / scale).clamp(min=floor).mean())
        return torch.stack(terms).mean()

    def on_set(reference: PreTrainedModel, batches: Sequence[Batch]) -> LossTerm:
        return mlp_breaking(
            sites, floor, {site.name: _mean_length(site, reference, batches) for site in sites}
        )

    loss.on_set = on_set  # type: ignore[attr-defined]

    return loss


def keep_hidden(site: Site) -> LossTerm:
    """The retain term of CIR: ``mean_t ||h_t - h0_t|| / mean_t ||h0_t||`` over all real tokens, the
    released code's ``cb_retain`` with p = 1.

    The denominator is that of the batch, so the term is no mean over independent tokens.
    """

    @mean_over(real_tokens)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        mask = batch.attention_mask.bool()
        with torch.no_grad():
            before = tapped(reference, [site], batch.inputs)[site.name][mask].float()
        difference = tapped(model, [site], batch.inputs)[site.name][mask].float() - before
        # The norm has no derivative at zero, where the first step starts; a tiny constant under the
        # root gives zero there.
        return (difference.square().sum(-1) + 1e-12).sqrt().mean() / before.norm(dim=-1).mean()

    return loss


def adaptive_steer_to(site: Site, direction: Float[Tensor, " width"], scale: float) -> LossTerm:
    r"""Adaptive RMU's forget term (Dang et al. 2025, arXiv 2408.06223): steer to ``scale * mean
    ||h|| * u``.

    The mean length is that of the frozen reference on the first batch that the loss sees, once per
    training, as in the released code; its ``on_set`` takes the mean over the whole set.

    Args:
        site: where the representation is read.
        direction: unit vector ``u``.
        scale: multiple of the representation's own length.
    """
    length: list[Tensor] = []

    @mean_over(content_tokens)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        if not length:
            length.append(_mean_length(site, reference, [batch]))
        return steer_to(site, scale * length[0] * direction.to(length[0].device))(
            model, batch, reference
        )

    def on_set(reference: PreTrainedModel, batches: Sequence[Batch]) -> LossTerm:
        return steer_to(site, scale * _mean_length(site, reference, batches) * direction)

    loss.restart = length.clear  # type: ignore[attr-defined]
    loss.on_set = on_set  # type: ignore[attr-defined]
    return loss


def steer_by(site: Site, shift: Float[Tensor, " width"]) -> LossTerm:
    """Random steering vectors (RSV; Huu-Tien et al., arXiv 2501.19202): ``mean of (h - (h_reference
    + shift))^2`` over tokens and coordinates.

    Args:
        site: where the representation is read.
        shift: the scaled random vector ``c s``, fixed over training.
    """

    @mean_over(content_tokens)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            expected = _content(tapped(reference, [site], batch.inputs)[site.name], batch)
        hidden = _content(tapped(model, [site], batch.inputs)[site.name], batch)
        return F.mse_loss(hidden, expected + shift.to(hidden.device))

    return loss


def break_circuits(sites: tuple[Site, ...]) -> LossTerm:
    r"""Representation rerouting (Zou et al. 2024, "circuit breakers", arXiv 2406.04313, algorithm
    1): ``mean over layers and tokens of ReLU(cos(h_t, h0_t))``.

    The cosine is that of every token with itself. The baseline in the released CIR code multiplies
    means over tokens instead, which is no cosine.
    """

    @mean_over(content_tokens)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            clean = tapped(reference, sites, batch.inputs)
        activations = tapped(model, sites, batch.inputs)
        terms = [
            F.cosine_similarity(
                _content(activations[site.name], batch), _content(clean[site.name], batch), dim=-1
            )
            .relu()
            .mean()
            for site in sites
        ]
        return torch.stack(terms).mean()

    return loss


def keep_distance(sites: tuple[Site, ...]) -> LossTerm:
    """The retain term of representation rerouting: ``mean over layers and real tokens of ||h_t -
    h0_t||``.
    """

    @mean_over(real_tokens)
    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        mask = batch.attention_mask.bool()
        with torch.no_grad():
            clean = tapped(reference, sites, batch.inputs)
        activations = tapped(model, sites, batch.inputs)
        terms = [
            (
                (activations[site.name][mask].float() - clean[site.name][mask].float())
                .square()
                .sum(-1)
                + 1e-12
            )
            .sqrt()
            .mean()
            for site in sites
        ]
        return torch.stack(terms).mean()

    return loss
