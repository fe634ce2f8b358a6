"""Randomised smoothing: the forget term's mean over random perturbations of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.unlearning.smoothing.rule import (
    Gradient,
    Parameters,
    StepRule,
    Term,
    check_size,
    combine,
    gradient_of,
    on_forget_term,
    perturbed_weights,
)


def randomised_smoothing(
    sigma: float, samples: int, seed: int, *, antithetic: bool = False
) -> StepRule:
    r"""Randomised smoothing of the forget term (Fan et al. 2025, arXiv 2502.05374; Duchi et al.
    2012, arXiv 1103.4296).

    .. math:: g = \frac1n \sum_{i=1}^n \nabla\ell_f(\theta + \delta_i) + \nabla\ell_r(\theta), \qquad \delta_i \sim N(0, \sigma^2 I)

    an unbiased estimate of the gradient of the mean loss over the perturbations. ``sigma`` is the
    standard deviation of **every coordinate**: over ``P`` trainable parameters the perturbation is
    ``sigma sqrt(P)`` long, which grows with the model (8.5 at the published ``sigma`` of 1e-4 and 7
    billion parameters; SAM's is 0.01 there). The noise of the estimate is of order ``sigma ||H||_F
    / sqrt(n)``, the smoothing itself of order ``sigma^2``: antithetic pairs remove the former.

    The log has ``rs_rise``, ``mean l_f(theta + delta_i) - l_f(theta)``, for which the term is once
    more evaluated at ``theta`` (forward only).

    Args:
        sigma: standard deviation of the perturbation of every trainable parameter, in units of
            weight.
        samples: perturbations per step; 3 in the paper.
        seed: of the rule's own random stream, which goes on from step to step. The numbers depend
            on the kind of device.
        antithetic: draw half as many perturbations and take each with both signs. Each is still
            ``N(0, sigma^2 I)``, so the estimate stays unbiased; what is odd in ``delta`` cancels.
    """  # noqa: E501
    check_size("sigma", sigma, zero=True)
    if samples < 1 or (antithetic and samples % 2):
        raise ValueError(
            f"samples is {samples}; it must be at least 1, and even with antithetic pairs"
        )
    signs = (1.0, -1.0) if antithetic else (1.0,)
    stream: list[torch.Generator] = []

    def draw(parameters: Parameters) -> dict[str, Tensor]:
        if not stream:
            device = next(iter(parameters.values())).device
            stream.append(torch.Generator(device).manual_seed(seed))
        (generator,) = stream
        numbers = {}
        for name, parameter in parameters.items():
            number = torch.randn(
                parameter.shape, generator=generator, device=generator.device, dtype=torch.float32
            )
            numbers[name] = number.to(parameter)
        return numbers

    def smooth(term: Term, parameters: Parameters) -> tuple[Gradient, dict[str, float]]:
        with torch.no_grad():
            forget = float(term())
        total: Gradient = {}
        values = []
        for _ in range(samples // len(signs)):
            noise = draw(parameters)
            for sign in signs:
                with perturbed_weights(parameters, noise.items(), sign * sigma):
                    perturbed = term()
                    total = combine(
                        [(1.0, total), (1 / samples, gradient_of(perturbed, parameters))]
                    )
                values.append(float(perturbed.detach()))
        return total, {"forget": forget, "rs_rise": sum(values) / samples - forget}

    step = on_forget_term(smooth)
    step.restart = stream.clear  # type: ignore[attr-defined]
    return step
