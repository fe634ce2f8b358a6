"""Unlearning objectives. A loss term is ``(model, batch, reference) -> scalar``; an objective joins a forget and a retain term.

``reference`` is the frozen starting model. Every term is masked inside, computed per example where its formula is per example, and moves the
gradient (tested).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hooks import Site, tapped
from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy, next_token_logits, token_kl, token_nll

Loss = Callable[[PreTrainedModel, Batch, PreTrainedModel], Tensor]


@dataclass(frozen=True, slots=True)
class Pair:
    """What one unlearning step reads: a batch of the forget set and one of the retain set."""

    forget: Batch
    retain: Batch


@dataclass(frozen=True, slots=True)
class Objective:
    """``forget_weight * forget(model, pair.forget) + retain_weight * retain(model, pair.retain)``.

    The two terms stay apart, because a wrapper may act on one of them only (SAM perturbs the forget term).
    """

    forget: Loss
    retain: Loss | None = None
    forget_weight: float = 1.0
    retain_weight: float = 1.0

    def forget_term(self, model: PreTrainedModel, pair: Pair, reference: PreTrainedModel) -> Tensor:
        """The weighted forget term (scalar)."""
        return self.forget_weight * self.forget(model, pair.forget, reference)

    def retain_term(self, model: PreTrainedModel, pair: Pair, reference: PreTrainedModel) -> Tensor | None:
        """The weighted retain term (scalar), or ``None`` without one."""
        return None if self.retain is None else self.retain_weight * self.retain(model, pair.retain, reference)

    def __call__(self, model: PreTrainedModel, pair: Pair, reference: PreTrainedModel) -> Tensor:
        """The whole objective (scalar)."""
        retain = self.retain_term(model, pair, reference)
        forget = self.forget_term(model, pair, reference)
        return forget if retain is None else forget + retain


def retain_cross_entropy(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
    """Mean next-token cross-entropy, nats per token: the retain term of gradient difference."""
    return cross_entropy(model, batch)


def negative_cross_entropy(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
    """Minus the mean next-token cross-entropy: gradient ascent."""
    return -cross_entropy(model, batch)


def retain_kl(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
    """Mean over target tokens of ``KL(reference || model)``, nats per token. Padding does not enter the mean."""
    with torch.no_grad():
        expected = next_token_logits(reference, batch)
    mask = batch.target_mask[:, 1:]
    return token_kl(expected[mask], next_token_logits(model, batch)[mask]).mean()


def npo(beta: float) -> Loss:
    r"""Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    .. math:: -\frac{2}{\beta}\, E\Big[\log\sigma\big(-\beta \log\tfrac{\pi_\theta(x)}{\pi_{ref}(x)}\big)\Big]

    The log-ratio is the **sum** over the target tokens of one sequence, and the mean is over sequences; beta has no meaning without that statement. At the reference
    its gradient is that of gradient ascent on the summed likelihood.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; NPO needs beta > 0 (its limit at 0 is gradient ascent)")

    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            before = token_nll(reference, batch).sum(1)
        rise = token_nll(model, batch).sum(1) - before
        return -2.0 / beta * F.logsigmoid(beta * rise).mean()

    return loss


def control_vector(width: int, seed: int) -> Tensor:
    """An isotropic unit vector ``[width]`` (a normalised Gaussian draw).

    The released RMU code draws from U[0, 1), which puts any two control vectors at a cosine of 0.75; isotropic vectors of different seeds are
    nearly orthogonal.
    """
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vector / vector.norm()).float()


def _content(tensor: Tensor, batch: Batch) -> Tensor:
    return tensor[batch.content_mask].float()


def steer_to(site: Site, target: Tensor) -> Loss:
    """RMU's forget term: ``mean over tokens and coordinates of (h - target)^2`` (Li et al. 2024, arXiv 2403.03218, eq. 1).

    Args:
        site: where the representation ``h`` is read.
        target: ``[width]`` the scaled control vector ``c u``.
    """

    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        hidden = _content(tapped(model, [site], batch.inputs)[site.name], batch)
        return F.mse_loss(hidden, target.to(hidden.device).expand_as(hidden))

    return loss


def keep_representation(site: Site, noise: Callable[[Tensor], Tensor] | None = None) -> Loss:
    """RMU's retain term: ``mean of (h - h_reference)^2`` over tokens and coordinates.

    Args:
        site: where the representation is read.
        noise: applied to the frozen reference's representation ``[token, width]`` before the comparison (RNA); default none.
    """

    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            expected = _content(tapped(reference, [site], batch.inputs)[site.name], batch)
        if noise is not None:
            expected = noise(expected)
        return F.mse_loss(_content(tapped(model, [site], batch.inputs)[site.name], batch), expected)

    return loss


def mlp_breaking(sites: tuple[Site, ...], floor: float = 0.0) -> Loss:
    r"""MLP breaking (Sondej and Yang 2025, arXiv 2509.11816): push every MLP output away from what it was.

    .. math:: \frac1L \sum_l \mathrm{mean}_t \max\big(f,\ \langle o_t, o^0_t\rangle / n_l^2\big), \qquad n_l = \mathrm{mean}_t \lVert o^0_t\rVert

    The gradient vanishes for a token once its output no longer points along the original one.

    Args:
        sites: outputs of the MLPs whose contribution is broken.
        floor: ``f`` in the formula.
    """

    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            clean = tapped(reference, sites, batch.inputs)
        now = tapped(model, sites, batch.inputs)
        terms = []
        for site in sites:
            before, after = _content(clean[site.name], batch), _content(now[site.name], batch)
            scale = before.norm(dim=-1).mean().square().clamp(min=torch.finfo(torch.float32).tiny)
            terms.append(((before * after).sum(-1) / scale).clamp(min=floor).mean())
        return torch.stack(terms).mean()

    return loss


def keep_hidden(site: Site) -> Loss:
    """The retain term of CIR: ``mean_t ||h_t - h0_t|| / mean_t ||h0_t||`` over all real tokens, the released code's ``cb_retain`` with p = 1."""

    def loss(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        mask = batch.attention_mask.bool()
        with torch.no_grad():
            before = tapped(reference, [site], batch.inputs)[site.name][mask].float()
        difference = tapped(model, [site], batch.inputs)[site.name][mask].float() - before
        # The norm has no derivative at zero, where the first step starts; a tiny constant under the root gives zero there.
        return (difference.square().sum(-1) + 1e-12).sqrt().mean() / before.norm(dim=-1).mean()

    return loss
