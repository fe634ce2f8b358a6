"""Sharpness-aware minimisation of the forget term, in a round ball or in one that is stretched by
the size of every weight.
"""

from __future__ import annotations

from torch import Tensor

from workbench.unlearning.smoothing.rule import (
    Gradient,
    Parameters,
    StepRule,
    Term,
    check_size,
    gradient_of,
    inner,
    norm,
    on_forget_term,
    perturbed_weights,
)


def sam(rho: float) -> StepRule:
    r"""Sharpness-aware minimisation of the forget term (Fan et al. 2025, arXiv 2502.05374; Foret et
    al. 2021, arXiv 2010.01412).

    .. math:: g = \nabla\ell_f(\theta + \epsilon^*) + \nabla\ell_r(\theta), \qquad \epsilon^* = \rho\, \nabla\ell_f(\theta) / \lVert\nabla\ell_f(\theta)\rVert_2

    Only the forget term is perturbed; the retain term is taken at the unperturbed weights.
    ``epsilon*`` is held fixed in the gradient, as in both papers. A step that is accumulated over
    parts of a batch perturbs every part along its own gradient.

    The log has ``sam_rise``, ``l_f(theta + epsilon*) - l_f(theta)``, and ``gradient_norm``,
    ``||g||`` of the forget term: the rise is ``rho`` times it to first order.

    Args:
        rho: radius of the perturbation over all trainable parameters, in units of weight (Euclidean
            norm).
    """  # noqa: E501
    check_size("rho", rho, zero=False)

    def smooth(term: Term, parameters: Parameters) -> tuple[Gradient, dict[str, float]]:
        forget = term()
        gradient = gradient_of(forget, parameters)
        length = norm(gradient)
        return _climb(term, parameters, forget, gradient, rho, length, length)

    return on_forget_term(smooth)


def asam(rho: float, *, eta: float = 0.01) -> StepRule:
    r"""Adaptive SAM of the forget term (Kwon et al. 2021, arXiv 2102.11600): the radius is relative
    to every weight's own size.

    .. math:: \epsilon^* = \rho\, T^2 \nabla\ell_f(\theta) / \lVert T \nabla\ell_f(\theta)\rVert_2, \qquad T = \mathrm{diag}(|\theta| + \eta)

    so that ``||T^-1 epsilon*|| = rho``. With ``eta = 0`` it is blind to rescalings that leave the
    model's function as it is. ``T`` is held fixed in the gradient. The paper's code leaves
    parameters that are not called a weight unscaled; here all trainable parameters are scaled. The
    log is that of :func:`sam`.

    Args:
        rho: radius of the perturbation over all trainable parameters, without a unit.
        eta: added to every ``|theta|``, in units of weight, so that weights at zero can move; 0.01
            in the paper's code.
    """  # noqa: E501
    check_size("rho", rho, zero=False)
    check_size("eta", eta, zero=True)

    def smooth(term: Term, parameters: Parameters) -> tuple[Gradient, dict[str, float]]:
        forget = term()
        gradient = gradient_of(forget, parameters)
        uphill = {
            name: value * (parameters[name].detach().abs() + eta).square()
            for name, value in gradient.items()
        }
        return _climb(
            term, parameters, forget, uphill, rho, inner(gradient, uphill) ** 0.5, norm(gradient)
        )  # <g, T^2 g> = ||T g||^2

    return on_forget_term(smooth)


def _climb(
    term: Term,
    parameters: Parameters,
    forget: Tensor,
    uphill: Gradient,
    rho: float,
    length: float,
    gradient_norm: float,
) -> tuple[Gradient, dict[str, float]]:
    """The gradient at ``theta + rho uphill / length``, or at ``theta`` where the length is zero."""
    with perturbed_weights(parameters, uphill.items(), rho / length if length > 0 else 0.0):
        perturbed = term()
        gradient = gradient_of(perturbed, parameters)
    before, after = float(forget.detach()), float(perturbed.detach())
    return gradient, {"forget": before, "sam_rise": after - before, "gradient_norm": gradient_norm}
