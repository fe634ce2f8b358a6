"""Intervals and tests. Everything is 95 % and two-sided unless a function says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import norm, rankdata
from scipy.stats import t as student

if TYPE_CHECKING:
    from jaxtyping import Float, Real, Shaped

DRAWS = 2000


class Estimate(NamedTuple):
    """A value with its 95 % interval.

    Attributes:
        value: the point estimate.
        low: lower end.
        high: upper end.
        n: observations behind it.
    """

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval of a rate (Wilson 1927); right at 0 % and 100 %, where the normal
    interval has zero width.

    Raises:
        ValueError: ``n`` is not positive or ``successes`` lies outside ``[0, n]``.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"{successes} successes of {n} trials: need n >= 1 and 0 <= successes <= n"
        )
    z = float(norm.ppf(0.5 + confidence / 2))
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)))
    # At 0 and n the closed form is exactly 0 and 1; rounding must not push the interval off the
    # estimate.
    return Estimate(
        rate,
        0.0 if successes == 0 else max(0.0, centre - half),
        1.0 if successes == n else min(1.0, centre + half),
        n,
    )


def bootstrap(
    values: Real[np.ndarray, "*seeds items"],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    confidence: float = 0.95,
) -> Estimate:
    """Two-level percentile bootstrap of the mean of ``values``: seeds and items are both drawn with
    replacement.

    Items are shared by the seeds, so a draw of items applies to every seed. With one seed only
    items are resampled. With few seeds (three, say) the seed level is coarse and the interval is
    too short rather than too long; the report says how many seeds there are.

    Args:
        values: finite numbers.
        seed: of the resampling.
        draws: bootstrap samples.
        confidence: of the interval.

    Raises:
        ValueError: ``values`` is empty or not finite.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(
            f"bootstrap needs finite values and at least one; got shape {table.shape} with "
            f"{int((~np.isfinite(table)).sum())} non-finite"
        )
    rng = np.random.default_rng(seed)
    seeds, items = table.shape
    # Multinomial counts instead of index draws: the same distribution, one small matrix product.
    item_weights = rng.multinomial(items, np.full(items, 1 / items), size=draws) / items
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    means = np.einsum("ds,si,di->d", seed_weights, table, item_weights, optimize=True)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(table.mean()), float(low), float(high), table.size)


def rate(values: Real[np.ndarray, "*seeds items"], *, seed: int = 0) -> Estimate:
    """Interval of a recall: :func:`bootstrap` over seeds and facts; where every fact agrees (0 % or
    100 %) Wilson's interval over the facts.

    Args:
        values: shares in ``[0, 1]``, paraphrases already averaged.
        seed: of the resampling.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.size and (table == table.flat[0]).all() and table.flat[0] in (0.0, 1.0):
        return wilson(table.flat[0] * table.shape[1], table.shape[1])._replace(n=table.size)
    return bootstrap(table, seed=seed)


def random_effects(estimates: Sequence[Estimate]) -> Estimate:
    r"""The mean over independent runs of what each of them estimates, where the runs themselves
    scatter.

    .. math:: \hat\mu = \sum_i w_i y_i \big/ \sum_i w_i, \qquad w_i = 1 / (s_i^2 + \tau^2), \qquad
              \mathrm{se}^2 = \max(1, q) \big/ \sum_i w_i, \qquad
              q = \sum_i w_i (y_i - \hat\mu)^2 / (k - 1)

    with :math:`s_i` the standard error behind a 95 % interval and :math:`\tau^2` the variance
    between runs by moments (DerSimonian and Laird 1986, equation 8); the interval is Student's with
    :math:`k - 1` degrees of freedom (Hartung and Knapp 2001), never shorter for runs that happen to
    agree (Roever, Knapp and Friede 2015, equation 6). Two runs have 12.7 standard errors: few runs
    say little.

    Args:
        estimates: one for each run, at least one; one alone stays as it is.

    Raises:
        ValueError: there is none.

    Example:
        >>> found = random_effects([Estimate(0.2, 0.1, 0.3, 40), Estimate(0.4, 0.3, 0.5, 40)])
        >>> round(found.value, 2), found.n
        (0.3, 80)
    """
    if not estimates:
        raise ValueError("there is no estimate to combine")
    if len(estimates) == 1:
        return estimates[0]
    values = np.array([estimate.value for estimate in estimates])
    errors = np.array(
        [(estimate.high - estimate.low) / (2 * norm.ppf(0.975)) for estimate in estimates]
    )
    variances = np.maximum(errors**2, 1e-12)  # a rate of 0 % in every fact has no width
    fixed, count = 1 / variances, len(values)
    centre = float((fixed * values).sum() / fixed.sum())
    heterogeneity = float((fixed * (values - centre) ** 2).sum()) - (count - 1)
    scale = float(fixed.sum() - (fixed**2).sum() / fixed.sum())
    weights = 1 / (variances + max(0.0, heterogeneity / scale))
    mean = float((weights * values).sum() / weights.sum())
    spread = float((weights * (values - mean) ** 2).sum()) / (count - 1)
    half = float(student.ppf(0.975, count - 1)) * float(np.sqrt(max(1.0, spread) / weights.sum()))
    return Estimate(mean, mean - half, mean + half, sum(estimate.n for estimate in estimates))


def ratio(
    numerators: Real[np.ndarray, " items"],
    denominators: Real[np.ndarray, " items"],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """A ratio of sums over texts (nats per token, say), with the linearised standard error of a
    ratio estimator (Cochran 1977, section 2.11).

    ``r = sum(x) / sum(t)``; its standard error is ``sqrt(n / (n - 1) * sum((x - r t)^2)) /
    sum(t)``; a single text has no interval (NaN).

    Args:
        numerators: one a text.
        denominators: likewise; their sum must be positive.
        confidence: of the normal interval.

    Raises:
        ValueError: there is no text, the lengths differ or the denominators sum to nothing.
    """
    x, t = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if x.shape != t.shape or x.ndim != 1 or not x.size or not t.sum() > 0:
        raise ValueError(
            "a ratio needs two equally long series with positive denominators; got shapes "
            f"{x.shape} and {t.shape}, denominators summing to {t.sum()}"
        )
    value, n = float(x.sum() / t.sum()), len(x)
    error = (
        float(np.sqrt(n / (n - 1) * np.square(x - value * t).sum()) / t.sum()) if n > 1 else np.nan
    )
    half = float(norm.ppf(0.5 + confidence / 2)) * error
    return Estimate(value, value - half, value + half, n)


def by_fact(
    items: tuple[str, ...], values: Real[np.ndarray, "... items"]
) -> tuple[tuple[str, ...], Float[np.ndarray, "... facts"]]:
    """Mean of ``values`` over the paraphrases of each fact, so that whole facts are resampled.

    Args:
        items: the fact of every example.
        values: of the examples.

    Returns:
        The distinct facts in order of first appearance, and their means.
    """
    order = tuple(dict.fromkeys(items))
    index = {fact: position for position, fact in enumerate(order)}
    weights = np.zeros((len(items), len(order)))
    for row, fact in enumerate(items):
        weights[row, index[fact]] = 1
    weights /= weights.sum(0)
    missing = (
        np.isnan(values) @ weights > 0
    )  # a missing paraphrase makes its own fact missing, not all of them
    return order, np.where(missing, np.nan, np.nan_to_num(values) @ weights)


def spearman(
    x: Real[np.ndarray, " items"],
    y: Real[np.ndarray, " items"],
    *,
    groups: Shaped[np.ndarray, " items"] | None = None,
    given: Real[np.ndarray, "items ..."] | None = None,
    within: Shaped[np.ndarray, " items"] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """Spearman's rank correlation, or its partial form, with a percentile bootstrap interval.

    Args:
        x: one value a point.
        y: likewise.
        groups: whole groups (methods, say) are resampled, because points of one group are not
            independent. Default: each point alone.
        given: one column a covariate; the correlation of what is left of the ranks of ``x`` and
            ``y`` after a least-squares fit on the ranks of the covariates. For one covariate that
            is ``(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2))``.
        within: ranks are taken, and centred, within every level (seed, say), so that differences
            between levels count for nothing.
        seed: of the resampling.
        draws: bootstrap samples.

    Raises:
        ValueError: fewer than three points, different lengths, or a value that is not finite.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"a rank correlation needs two equally long series of at least 3 points; got {len(x)} "
            f"and {len(y)}"
        )
    covariates = (
        np.empty((len(x), 0))
        if given is None
        else np.asarray(given, dtype=float).reshape(len(x), -1)
    )
    levels = np.zeros(len(x)) if within is None else np.asarray(within)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(covariates).all()):
        raise ValueError(
            "a rank correlation needs finite values; leave the points without a value out"
        )

    series = np.vstack([x, y, covariates.T])

    def correlation(chosen: np.ndarray) -> float:
        level = levels[chosen]
        ranks = series[:, chosen]
        for level_value in np.unique(level) if within is not None else level[:1]:
            in_level = level == level_value
            level_ranks = rankdata(ranks[:, in_level], axis=1)
            ranks[:, in_level] = level_ranks - level_ranks.mean(1, keepdims=True)
        pair, others = ranks[:2], ranks[2:].T
        if others.shape[1]:
            residuals = pair - (others @ np.linalg.lstsq(others, pair.T, rcond=None)[0]).T
            # what a covariate explains to the last bit is nothing, not its rounding
            pair = residuals * ((residuals**2).sum(1) > 1e-18 * (pair**2).sum(1))[:, None]
        scale = float(np.sqrt((pair[0] ** 2).sum() * (pair[1] ** 2).sum()))
        return float((pair[0] * pair[1]).sum() / scale) if scale else 0.0

    members = (
        [np.flatnonzero(groups == group) for group in np.unique(groups)]
        if groups is not None
        else [np.array([i]) for i in range(len(x))]
    )
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(draws):
        samples.append(
            correlation(
                np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
            )
        )
    low, high = np.quantile(samples, [0.025, 0.975])
    return Estimate(correlation(np.arange(len(x))), float(low), float(high), len(x))


class Permutation(NamedTuple):
    """A paired permutation test.

    Attributes:
        p: two-sided p-value.
        effect: mean of ``a - b`` over the items.
        n: items.
        exact: whether every sign pattern was counted.
    """

    p: float
    effect: float
    n: int
    exact: bool


def paired_permutation(
    a: Real[np.ndarray, "*seeds items"],
    b: Real[np.ndarray, "*other_seeds items"],
    *,
    seed: int = 0,
    draws: int = 10_000,
) -> Permutation:
    """Sign-flip test of the paired differences of two arms, item by item (Fisher 1935, section 21).

    Seeds are averaged first, so an item counts once; the test speaks about other items, not about
    other seeds. Under its null the two values of an item could be exchanged. The statistic is the
    absolute mean difference. All ``2^n`` sign patterns are counted where there are at most
    ``draws`` of them; otherwise ``p = (1 + as extreme) / (1 + draws)`` over random ones, which is
    never zero (Phipson and Smyth 2010). The interval of the effect is ``bootstrap(a - b)``.

    Args:
        a: finite numbers.
        b: the same items in the same order; the number of seeds may differ.
        seed: of the random sign patterns.
        draws: most patterns to try.

    Raises:
        ValueError: there is no item, the numbers of items differ, a value is not finite or
            ``draws`` is not positive.
    """
    first, second = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (a, b))
    if (
        first.ndim != 2
        or second.ndim != 2
        or not first.size
        or not second.size
        or first.shape[1] != second.shape[1]
    ):
        raise ValueError(
            "a paired test needs the same items in both arms, at least one; got shapes "
            f"{first.shape} and {second.shape}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()) or draws < 1:
        raise ValueError(
            "a paired test needs finite values (leave items without one out of both arms) and at "
            f"least one draw; got {draws} draws"
        )
    differences = first.mean(0) - second.mean(0)
    n, observed = len(differences), abs(differences.sum())
    # Patterns that differ in rounding only are equally extreme.
    bar = observed - 1e-9 * np.abs(differences).sum()
    if n <= draws.bit_length() and 2**n <= draws:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return Permutation(float((np.abs(sums) >= bar).mean()), float(differences.mean()), n, True)
    rng, extreme = np.random.default_rng(seed), 0
    chunk = max(1, 4_000_000 // n)  # 32 MB of signs at a time
    for start in range(0, draws, chunk):
        signs = 2.0 * rng.integers(0, 2, size=(min(chunk, draws - start), n), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ differences) >= bar).sum())
    return Permutation((1 + extreme) / (1 + draws), float(differences.mean()), n, False)


def area_under(curve_x: Real[np.ndarray, " steps"], curve_y: Real[np.ndarray, " steps"]) -> float:
    """Area under a curve by the trapezoid rule, divided by the range of ``x``: the mean height, in
    the unit of ``y``.

    One curve has no interval; take the area of every item's curve and hand those to
    :func:`bootstrap` or :func:`paired_permutation`.

    Args:
        curve_x: strictly increasing (steps of an attack, say; they need not be equally far apart).
        curve_y: the heights there.

    Raises:
        ValueError: fewer than two points, different lengths, a value that is not finite, or ``x``
            does not increase.
    """
    x, y = np.asarray(curve_x, dtype=np.float64), np.asarray(curve_y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"an area needs two equally long series of at least 2 points; got shapes {x.shape} and "
            f"{y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all()):
        raise ValueError(
            "an area needs finite values and x in strictly increasing order; sort the points and "
            "merge those of equal x"
        )
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))
