"""A penalty on the change of the forget term's gradient along itself."""

from __future__ import annotations

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
    inner,
    norm,
    on_forget_term,
    perturbed_weights,
)


def curvature_regularisation(weight: float, mu: float) -> StepRule:
    r"""The forget term with a penalty on its curvature along its gradient (Fan et al. 2025, arXiv
    2502.05374; Moosavi-Dezfooli et al. 2019, arXiv 1811.09716, on inputs).

    .. math:: \ell_f + \lambda \lVert d\rVert_2, \qquad d = \nabla\ell_f(\theta + \mu v) - \nabla\ell_f(\theta), \qquad v = \nabla\ell_f(\theta) / \lVert\nabla\ell_f(\theta)\rVert_2

    The penalty is ``lambda mu ||H v||`` to first order. The gradient is that of the whole
    expression, ``v`` differentiated too. With ``g``, ``H`` at ``theta``, ``H'`` at ``theta + mu
    v``, ``u = d / ||d||`` and ``w = H' u`` it is

    .. math:: g + \lambda \big( w + H \big[ \tfrac{\mu}{\lVert g\rVert} (w - v \langle v, w\rangle) - u \big] \big)

    Holding ``v`` fixed would drop the first term in the bracket, which is of the same order in
    ``mu`` as what is left, and on a quadratic loss is the whole gradient; and keeping it costs
    nothing, because both terms share a product with ``H``. Where ``g`` or ``d`` vanishes, so does
    the penalty's gradient. The released code takes the length of ``d`` as a plain number, so that
    nothing of the penalty arrives in its gradient.

    Second derivatives are exact, under PyTorch's MATH attention. The graph of ``g`` is built twice,
    so that only one graph is held at a time.

    The log has ``gradient_norm``, ``||g||``, and ``penalty``, ``lambda ||d||``.

    Args:
        weight: ``lambda``, in units of weight.
        mu: length of the step along the gradient over all trainable parameters, in units of weight;
            0.01 in the released code.
    """  # noqa: E501
    check_size("weight", weight, zero=True)
    check_size("mu", mu, zero=False)

    def smooth(term: Term, parameters: Parameters) -> tuple[Gradient, dict[str, float]]:
        with sdpa_kernel(SDPBackend.MATH):
            forget = term()
            gradient = gradient_of(forget, parameters)
            length = norm(gradient)
            log = {"forget": float(forget.detach()), "gradient_norm": length, "penalty": 0.0}
            if length == 0:
                return gradient, log
            v = combine([(1 / length, gradient)])
            with perturbed_weights(parameters, v.items(), mu):
                gradient_there = gradient_of(term(), parameters, graph=True)
                change = combine([(1.0, gradient_there), (-1.0, gradient)])
                size = norm(change)
                log["penalty"] = weight * size
                if size == 0:
                    return gradient, log
                u = combine([(1 / size, change)])
                w = hessian_product(gradient_there, u, parameters)
                del gradient_there  # frees its graph
            bracket = combine([(mu / length, w), (-mu / length * inner(v, w), v), (-1.0, u)])
            product = hessian_product(
                gradient_of(term(), parameters, graph=True), bracket, parameters
            )
        return combine([(1.0, gradient), (weight, w), (weight, product)]), log

    return on_forget_term(smooth)
