"""Which of many scores are findings: p-values against a null, false discovery rates, and how well a
ranking finds what is known to be there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import t as student

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from jaxtyping import Float

ROUNDING = 1e-6
"""Scores nearer to each other than this (nats, or relative length) are alike: float32 does not tell
them apart.
"""
_FREEDOM = np.geomspace(0.3, 300, 60)
"""Degrees of freedom that are tried: heavier than a Cauchy tail (1) up to what cannot be told from
a normal one.
"""


def p_values(
    scores: Float[np.ndarray, " items"], null: Float[np.ndarray, " other_items"] | None = None
) -> Float[np.ndarray, " items"]:
    """One-sided p-values of scores of which most are null: how often is a harmless token's score as
    large?

    With ``null``: conformal, ``(1 + #{null >= score}) / (1 + n)``. Exact where the null tokens and
    a harmless tested token are exchangeable (the same kind of token: frequency, leading space),
    whatever the distribution. Never below ``1 / (1 + n)``, so that a finding among ``m`` tokens at
    level ``a`` needs about ``n >= m / (k a)`` null tokens, with ``k`` tokens found together. They
    share one null sample; :func:`benjamini_hochberg` still holds (Bates et al. 2023, Annals of
    Statistics 51, section 2).

    Without: an empirical null (Efron 2004, JASA 99, section 2), here a Student distribution around
    the median of all scores, with the scale and the degrees of
    freedom of the scores below it: the heaviest tail within one standard error of the most likely
    one. Triggers lie above the median, so they do not widen their own null; and two models that
    differ have a heavy tail (most tokens do little, some do much, in both directions), which a
    normal distribution would take for findings. Right where harmless scores fall about as far above
    the median as below it. Where they do not (skewed without any unlearning), nothing found is a
    finding, and null tokens are the better choice; so they are where few tokens are tested. The
    scale is not taken to be below :data:`ROUNDING`, so that a model against itself has no finding.

    Args:
        scores: of the tokens; larger is worse.
        null: scores of the null tokens.

    Returns:
        One for every score; NaN where that is.

    Raises:
        WorkbenchError: ``null`` holds no number.
    """
    values = np.asarray(scores, dtype=np.float64)
    missing = np.isnan(values)
    if null is not None:
        calm = np.sort(np.asarray(null, dtype=np.float64))
        if not len(calm) or np.isnan(calm).any():
            raise WorkbenchError(
                "conformal p-values need the scores of null tokens, and there is none, or one is "
                "not a number; give tokens that are not in every query"
            )
        tail = (1 + len(calm) - np.searchsorted(calm, values, side="left")) / (1 + len(calm))
    else:
        tail = _empirical_tail(values)
    return np.where(missing, np.nan, tail)


def _empirical_tail(values: np.ndarray) -> np.ndarray:
    """Upper tail of the Student distribution around the median that the lower half of ``values``
    allows: of all degrees of freedom, each with its most likely scale, the fewest whose
    log-likelihood is within half a unit (one standard error: Wilks 1938) of the best. At the best
    itself, half of all fits have too light a tail.
    """
    present = values[~np.isnan(values)]
    if not len(present):
        return np.full_like(values, np.nan)
    middle = float(np.median(present))
    below = np.maximum(middle - present[present <= middle], ROUNDING)

    def most_likely(freedom: float) -> float:
        """The scale at which the derivative of the likelihood vanishes: it falls from ``freedom``
        to -1 as the scale grows.
        """

        def slope(at: float) -> float:
            return float(((freedom + 1) / (1 + freedom * np.exp(2 * at) / below**2)).mean() - 1)

        return float(np.exp(brentq(slope, np.log(below.min()) - 5, np.log(below.max()) + 5)))

    scales = [most_likely(freedom) for freedom in _FREEDOM]
    likelihood = np.array(
        [
            student.logpdf(below / scale, freedom).sum() - len(below) * np.log(scale)
            for freedom, scale in zip(_FREEDOM, scales, strict=True)
        ]
    )
    first = int(np.argmax(likelihood >= likelihood.max() - 0.5))
    return np.asarray(student.sf((values - middle) / scales[first], _FREEDOM[first]))


def robust_z(scores: Float[np.ndarray, " items"]) -> Float[np.ndarray, " items"]:
    """Distance from the median in units of 1.4826 median absolute deviations (at least
    :data:`ROUNDING`), numbers that are missing left out.
    """
    values = np.asarray(scores, dtype=np.float64)
    present = values[~np.isnan(values)]
    if not len(present):
        return np.full_like(values, np.nan)
    middle = float(np.median(present))
    return (values - middle) / max(1.4826 * float(np.median(np.abs(present - middle))), ROUNDING)


def benjamini_hochberg(p: Float[np.ndarray, " items"]) -> Float[np.ndarray, " items"]:
    """Adjusted p-values of Benjamini and Hochberg 1995: ``q_(i) = min over j >= i of m p_(j) / j``,
    for sorted ``p_(1) <= ... <= p_(m)``.

    Calling a finding whatever has ``q <= a`` keeps the expected share of false findings at most
    ``a`` where the p-values are independent or positively dependent (Benjamini and Yekutieli 2001).
    Rises of tokens in the same queries usually are the latter; it is not guaranteed.

    Args:
        p: in ``[0, 1]``; NaN is no test and stays NaN.

    Raises:
        WorkbenchError: a value lies outside ``[0, 1]``.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    index = np.flatnonzero(~np.isnan(values))
    if ((values[index] < 0) | (values[index] > 1)).any():
        raise WorkbenchError("p-values lie between 0 and 1; one of these does not")
    order = index[np.argsort(values[index], kind="stable")]
    raw = values[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted[order] = np.minimum.accumulate(raw[::-1])[::-1].clip(max=1)
    return adjusted


def precision_recall(
    ranking: pd.DataFrame, known: Collection[int], score: str = "rise"
) -> pd.DataFrame:
    """How well a score finds tokens that are known to be triggers, at every threshold.

    Args:
        ranking: ``token_id`` and ``score``; :attr:`TriggerScan.table`, or any other.
        known: ids of the true triggers. Those that the ranking does not hold (never tested) are
            left out and counted in ``attrs["missing"]``.
        score: the column, larger is more suspect.

    Returns:
        One row per distinct score, falling: ``rank`` (tokens at or above it), ``score``,
        ``precision``, ``recall``. ``attrs["average_precision"]`` is ``sum (R_n - R_(n-1)) P_n``,
        without interpolation and with tied tokens taken together, and ``attrs["chance"]`` the
        prevalence, to which it comes down for a random order.

    Raises:
        WorkbenchError: none of the known tokens is in the ranking, or a score is not a number.
    """
    values, hit = (
        ranking[score].to_numpy(dtype=np.float64),
        ranking["token_id"].isin(list(known)).to_numpy(),
    )
    if not hit.any() or np.isnan(values).any():
        raise WorkbenchError(
            f"none of the {len(known)} known tokens is in the ranking, so nothing can be found"
            if not hit.any()
            else f"a {score} is not a number"
        )
    order = np.argsort(-values, kind="stable")
    last = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    right, above = np.cumsum(hit[order])[last], last + 1
    curve = pd.DataFrame(
        {
            "rank": above,
            "score": values[order][last],
            "precision": right / above,
            "recall": right / hit.sum(),
        }
    )
    curve.attrs["average_precision"] = float(
        (np.diff(curve["recall"], prepend=0.0) * curve["precision"]).sum()
    )
    curve.attrs["chance"] = float(hit.mean())
    curve.attrs["missing"] = len(set(known)) - int(hit.sum())
    return curve
