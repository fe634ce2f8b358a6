"""Put every method on the same disruption: a line search over alpha in ``theta0 + alpha *
delta``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from workbench import values
from workbench.hooks.brief import brief

LARGEST_ALPHA = 1000.0
"""A change scaled further than this is another change."""


@brief
@dataclass(frozen=True, slots=True)
class BudgetMatch:
    """The result of a line search.

    Attributes:
        alpha: the chosen scale.
        disruption: what it costs there (never above the budget).
        reached: whether the budget was reached, within the tolerance; ``False`` means the method
            stays below it even at the largest alpha allowed.
        tried: every ``(alpha, disruption)`` evaluated, in increasing alpha.
    """

    alpha: float
    disruption: float
    reached: bool
    tried: tuple[tuple[float, float], ...]


def match_budget(
    disruption: Callable[[float], float],
    budget: float,
    *,
    limit: float = 1.0,
    grid: int = 8,
    tolerance: float = 0.02,
) -> BudgetMatch:
    """The largest alpha below the *first* crossing of ``budget``.

    Disruption need not grow monotonically with alpha, so a grid finds the first interval in which
    it crosses the budget, and bisection narrows that interval until the disruption lies within
    ``tolerance`` (relative) below the budget.

    Where several processes share one model (sharded weights), all of them call this, and all go by
    the disruption that the first one measured: a last bit that differs between them must not send
    them different ways.

    Args:
        disruption: alpha to disruption; 0 at alpha 0.
        budget: the largest disruption allowed.
        limit: the largest alpha tried. 1 is the trained delta itself; more extrapolates.
        grid: points of the first pass.
        tolerance: see above.

    Raises:
        WrongValueError: ``budget`` or ``limit`` is not positive, not finite (an infinite budget
            stands for none) or absurd.
    """
    if budget != math.inf:
        values.number("the disruption budget", budget, above=0, low=0)
    values.number("the limit of alpha", limit, above=0, low=0, high=LARGEST_ALPHA)

    def measured(alpha: float) -> float:
        return _of_first_process(disruption(alpha))

    tried: dict[float, float] = {0.0: 0.0}
    low, high = 0.0, 0.0
    for step in range(1, grid + 1):
        alpha = limit * step / grid
        tried[alpha] = measured(alpha)
        # A NaN is no pass: the comparison is written so that it counts as above the budget.
        if not tried[alpha] <= budget:
            high = alpha
            break
        low = alpha
    if high:
        for _ in range(30):
            if tried[low] >= budget * (1 - tolerance):
                break
            middle = (low + high) / 2
            tried[middle] = measured(middle)
            if tried[middle] <= budget:
                low = middle
            else:
                high = middle
    # a price that is not a number is no crossing: nothing says that the budget lies before it
    crossed = bool(high) and math.isfinite(tried[high])
    reached = crossed or tried[low] >= budget * (1 - tolerance)
    return BudgetMatch(low, tried[low], reached, tuple(sorted(tried.items())))


def _of_first_process(value: float) -> float:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if "nccl" in dist.get_backend()
        else torch.device("cpu")
    )
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return float(shared)


QUARTERS = tuple(quarter / 4 for quarter in range(1, 17))
"""Scales of an unlearning change from a quarter of it to four times it."""


def smallest_change(
    recalled: Callable[[float], bool], alphas: Sequence[float] = QUARTERS
) -> tuple[float, bool]:
    """The smallest scale at which nothing is recalled any more: models that are compared by what
    comes back all start from nothing, and none is changed further.

    Args:
        recalled: sets the model to a scale and says whether anything is still recalled there. It is
            left at the scale that is returned.
        alphas: scales to try, smallest first; at least one.

    Returns:
        The scale, and whether nothing is recalled there; the last scale and ``False`` where
        something always is.
    """
    for alpha in alphas:
        if not recalled(alpha):
            return alpha, True
    return alpha, False
