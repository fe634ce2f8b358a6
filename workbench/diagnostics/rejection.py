"""How often noise turns the effect of a shift round: random noise augmentation against a trigger,
in theory and on measured gradients and shifts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import Estimate, wilson

if TYPE_CHECKING:
    from jaxtyping import Float


def rejection_probability(
    *, shift_std: float, noise_std: float, noisy_passes: Literal[1, 2] = 1
) -> float:
    r"""Probability that Gaussian noise turns the first-order loss change of a Gaussian shift round
    (or to zero), under the paper's assumption.

    .. math:: P\left[\frac{g \cdot (\varepsilon + \delta)}{g \cdot \varepsilon} \le 0\right] = \frac1\pi \arctan\sqrt{\nu / \eta},
        \qquad \varepsilon \sim N(0, \eta I),\ \delta \sim N(0, \nu I)\ \text{independent}

    ``g . delta / g . eps`` is ``sqrt(nu / eta)`` times a Cauchy variable, and must be at most -1.
    It grows with the noise and never exceeds 1/2. This is our derivation; the constants of the
    paper's own guarantee were not verified, and random noise augmentation trains with noise in a
    frozen teacher, it does not run the deployed model with noise.

    Theory writes ``nu`` for a variance and code for a standard deviation; here both arguments are
    standard deviations.

    Args:
        shift_std: ``sqrt(eta)``, per coordinate.
        noise_std: ``sqrt(nu)``, per coordinate.
        noisy_passes: 2 where the clean and the tagged pass are both noisy, each with its own draw:
            the noise's variance doubles.

    Raises:
        WorkbenchError: an argument is negative or not finite, or both are zero.
    """  # noqa: E501
    if not (
        0 <= shift_std < math.inf and 0 <= noise_std < math.inf and shift_std + noise_std > 0
    ) or noisy_passes not in (1, 2):
        raise WorkbenchError(
            "shift_std and noise_std are standard deviations, not both zero, noisy_passes is 1 or "
            f"2; got {shift_std}, {noise_std} and {noisy_passes}"
        )
    return math.atan2(noise_std * noisy_passes**0.5, shift_std) / math.pi


def rejection_rate(
    gradients: Float[Tensor, "items ..."],
    shifts: Float[Tensor, "items ..."],
    *,
    noise_std: float,
    noisy_passes: Literal[1, 2] = 1,
    draws: int = 200,
    seed: int = 0,
) -> Estimate:
    """How often Gaussian noise turns the first-order loss change of *measured* shifts round (or to
    zero), by Monte Carlo; see :func:`rejection_probability`.

    ``g . delta`` of isotropic noise is normal with standard deviation ``noise_std |g|`` and is
    drawn as that. Queries without a first-order change (``g . eps = 0``) have nothing to reject and
    are left out. The interval is Wilson's over queries, not over draws; a mean of rates varies less
    than that of events, so it is rather too wide.

    Args:
        gradients: the loss's gradient at the site.
        shifts: of the same shape.
        noise_std: **standard deviation** of the noise per coordinate (``sqrt(nu)`` of the theory).
        noisy_passes: as there.
        draws: noises per query.
        seed: of the noise.

    Raises:
        WorkbenchError: the shapes differ, a number is not finite, ``noise_std`` is negative, or no
            query has a first-order change.
    """
    if (
        gradients.shape != shifts.shape
        or not 0 <= noise_std < math.inf
        or draws < 1
        or noisy_passes not in (1, 2)
    ):
        raise WorkbenchError(
            "gradients and shifts have one shape, noise_std is a standard deviation, draws "
            f"positive, noisy_passes 1 or 2; got {list(gradients.shape)}, {list(shifts.shape)}, "
            f"{noise_std}, {draws} and {noisy_passes}"
        )
    slope, flat = (
        (gradients.double() * shifts.double()).flatten(1).sum(1).cpu(),
        gradients.double().flatten(1).cpu(),
    )
    if not bool(torch.isfinite(slope).all()) or not bool((slope != 0).any()):
        raise WorkbenchError(
            "a rejection rate needs finite gradients and shifts that are not all orthogonal; got "
            f"{len(slope)} queries"
        )
    slope, length = slope[slope != 0], flat.norm(dim=1)[slope != 0]
    noise = torch.randn(
        draws, len(slope), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ) * (noise_std * noisy_passes**0.5 * length)
    rejected = (slope * (slope + noise) <= 0).double().mean()
    return wilson(float(rejected) * len(slope), len(slope))
