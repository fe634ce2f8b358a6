"""A penalty on the length of the forget term's gradient."""

from __future__ import annotations

from contextlib import nullcontext

from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.unlearning.smoothing.rule import (
    Gradient,
    Parameters,
    StepRule,
    Term,
    check_size,
    combine,
    gradient_of,
    hessian_product,
    norm,
    on_forget_term,
    perturbed_weights,
)

STEP, SHORTEST = 5e-6, 1e-4
"""Half the length of the difference that stands for a second derivative: over the length of the
weights that the term depends on, and at least. Rounding takes over below, the third derivative
above.
"""


def gradient_penalty(weight: float, *, exact: bool = True) -> StepRule:
    r"""The forget term with a penalty on the length of its gradient (Fan et al. 2025, arXiv
    2502.05374; Zhao et al. 2022, arXiv 2202.03599).

    .. math:: \ell_f + \lambda \lVert\nabla\ell_f\rVert_2, \qquad \text{whose gradient is}\quad g + \lambda\, H g / \lVert g\rVert_2

    where the gradient vanishes, so does the penalty's. To first order in ``rho`` it is what SAM
    descends, with ``lambda = rho``. The released code takes the length as a plain number, so that
    nothing of the penalty arrives in its gradient.

    The log has ``gradient_norm``, ``||g||``, and ``penalty``, ``lambda ||g||``.

    Args:
        weight: ``lambda``, in units of weight.
        exact: differentiate twice, under PyTorch's MATH attention (its only kernel with a second
            derivative). Otherwise ``H v`` is the central difference of two gradients along ``v = g
            / ||g||`` (see :data:`STEP`): two more passes, but the memory of a plain step, and any
            attention kernel. In float32 it was within 1e-3 of the exact one on Llamas of 5 thousand
            to a million parameters.
    """  # noqa: E501
    check_size("weight", weight, zero=True)

    def smooth(term: Term, parameters: Parameters) -> tuple[Gradient, dict[str, float]]:
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            forget = term()
            gradient = gradient_of(forget, parameters, graph=exact)
            length = norm(gradient)
            terms = [(1.0, gradient)]
            if length > 0:
                direction = combine([(1 / length, gradient)])
                if exact:
                    terms.append((weight, hessian_product(gradient, direction, parameters)))
                else:
                    terms += _central_difference(term, parameters, direction, weight)
        return combine(terms), {
            "forget": float(forget.detach()),
            "gradient_norm": length,
            "penalty": weight * length,
        }

    return on_forget_term(smooth)


def _central_difference(
    term: Term, parameters: Parameters, direction: Gradient, weight: float
) -> list[tuple[float, Gradient]]:
    """``weight (g(theta + h v) - g(theta - h v)) / 2 h`` as two weighted gradients."""
    half = max(STEP * norm({name: parameters[name] for name in direction}), SHORTEST)
    terms = []
    for sign in (1.0, -1.0):
        with perturbed_weights(parameters, direction.items(), sign * half):
            terms.append((sign * weight / (2 * half), gradient_of(term(), parameters)))
    return terms
