"""Step rules: how an objective becomes a gradient. The plain rule, and rules that look for a forget
term that is small in a whole neighbourhood of the weights.

After Fan et al. 2025 (arXiv 2502.05374). Every rule acts on the forget term alone, ``l_f`` below,
as the objective weights it; the retain term is taken at the present weights. Every rule works
around every objective. Weight averaging, the one smoother that is no step rule, is
:class:`Averager`.

========================================
==============================================================  ============================ rule
what it descends, beside the retain term                        passes over the forget batch
========================================
==============================================================  ============================
``plain``                                 ``l_f(theta)``
1 ``sam(rho)``                              ``l_f(theta + rho g / ||g||)``
2 ``asam(rho)``                             likewise, in a ball that is stretched by every weight's
size    2 ``randomised_smoothing(sigma, n, seed)``  ``E l_f(theta + sigma N(0, I))``
n, and a forward ``gradient_penalty(weight)``              ``l_f + weight ||g||``
1, and its second derivative ``curvature_regularisation(weight, mu)``  ``l_f + weight ||g(theta + mu
g / ||g||) - g(theta)||``         3, and 2 second derivatives
========================================
==============================================================  ============================
"""

from workbench.unlearning.smoothing.averaging import Averager
from workbench.unlearning.smoothing.curvature import curvature_regularisation
from workbench.unlearning.smoothing.penalty import gradient_penalty
from workbench.unlearning.smoothing.random_perturbation import randomised_smoothing
from workbench.unlearning.smoothing.rule import StepRule, plain
from workbench.unlearning.smoothing.sharpness_aware import asam, sam

__all__ = [
    "Averager",
    "StepRule",
    "asam",
    "curvature_regularisation",
    "gradient_penalty",
    "plain",
    "randomised_smoothing",
    "sam",
]
