"""Are rows draws of ``N(0, eta I)``, independent of the group they stand in? Statistics without a
scale, their jackknife over groups, and what true draws give.

Every function works on float64 arrays ``[rows width]``; which row belongs to which group is a
:class:`Design`, the same for the measured rows and for every draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import rankdata
from scipy.stats import t as student

from workbench.hooks.brief import brief
from workbench.metrics.triggers import ROW_STATISTICS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int

_SHOWN = 32  # eigenvalues
_SCALES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    **dict.fromkeys(
        ("skewness_square", "skewness_median", "participation_ratio"), (np.log, np.exp)
    ),
    **dict.fromkeys(("top_1_share", "top_8_share"), (logit, expit)),
    "length_correlation": (np.arctanh, np.tanh),
}
_BLOCKS = 20


@brief
@dataclass(frozen=True, slots=True)
class Design:
    """What is the same for the measured rows and for every draw.

    Attributes:
        query: number of the query, from 0.
        chosen: true on one row of every query: rows of one query are dependent, and shape wants
            independent ones.
        word: number of the word, or ``None``.
        length: length of the clean latent.
        directions: 8 or fewer random orthonormal columns.
    """

    query: Int[np.ndarray, " rows"]
    chosen: Bool[np.ndarray, " rows"]
    word: Int[np.ndarray, " rows"] | None
    length: Float64[np.ndarray, " rows"]
    directions: Float64[np.ndarray, "width k"]

    def part(self, keep: Bool[np.ndarray, " rows"]) -> Design:
        """That of the rows for which ``keep`` is true."""
        return Design(
            self.query[keep],
            self.chosen[keep],
            None if self.word is None else self.word[keep],
            self.length[keep],
            self.directions,
        )


def design(
    query: Int[np.ndarray, " rows"],
    word: Int[np.ndarray, " rows"] | None,
    clean: Float64[np.ndarray, "rows width"],
    rng: np.random.Generator,
) -> Design:
    """The design of the rows ``clean`` of queries numbered from 0, with one random row of every
    query chosen.
    """
    shuffled = rng.permutation(len(query))
    one_per_query = np.zeros(len(query), dtype=bool)
    one_per_query[shuffled[np.unique(query[shuffled], return_index=True)[1]]] = True
    width = clean.shape[1]
    return Design(
        query,
        one_per_query,
        word,
        np.linalg.norm(clean, axis=1),
        np.linalg.qr(rng.standard_normal((width, min(8, width)))).Q,
    )


def measure(
    shift: Float64[np.ndarray, "rows width"], design: Design
) -> tuple[Float64[np.ndarray, " statistics"], Float64[np.ndarray, " k"]]:
    """The statistics of :data:`ROW_STATISTICS` in their order, and the spectrum."""
    one_row_per_query = shift[design.chosen]
    n, width = one_row_per_query.shape
    centred = one_row_per_query - one_row_per_query.mean(0)
    values = np.linalg.eigvalsh(centred.T @ centred if width <= n else centred @ centred.T)[
        ::-1
    ] / (n - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = (
            values.clip(min=0) / values.sum() if values.sum() > 0 else np.full(len(values), np.nan)
        )
        scaled = (
            centred[:, one_row_per_query.std(0) > 0]
            / one_row_per_query.std(0)[one_row_per_query.std(0) > 0]
        )
        # Without bias for normal samples (Joanes and Gill 1998, G1 and G2).
        skewness = (n * (n - 1)) ** 0.5 / (n - 2) * (scaled**3).mean(0)
        excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * ((scaled**4).mean(0) - 3) + 6)
        statistics = {
            "mean_share": _mean_share(shift, design.query),
            "kurtosis_mean": excess.mean() if excess.size else np.nan,
            "kurtosis_median": np.median(excess) if excess.size else np.nan,
            "skewness_square": np.square(skewness).mean() if skewness.size else np.nan,
            "skewness_median": np.median(np.abs(skewness)) if skewness.size else np.nan,
            "mardia": _mardia(one_row_per_query @ design.directions),
            **_of_covariance(centred, values),
            "top_1_share": shares[0],
            "top_8_share": shares[:8].sum() if min(n - 1, width) > 8 else np.nan,
            "query_share": _intraclass(shift, design.query),
            "word_share": np.nan
            if design.word is None
            else _intraclass(one_row_per_query, design.word[design.chosen]),
            "length_correlation": rank_correlation(
                np.linalg.norm(one_row_per_query, axis=1), design.length[design.chosen]
            ),
        }
    return np.array([statistics[name] for name in ROW_STATISTICS], dtype=np.float64), shares[
        :_SHOWN
    ]


def bands(draws: Float64[np.ndarray, "draws ..."]) -> Float64[np.ndarray, "3 ..."]:
    """Median and the ends between which one more draw falls with a probability of 95 %, however few
    draws there are.
    """
    return np.quantile(draws, [0.5, 0.025, 0.975], axis=0, method="weibull")


def _sums(rows: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the rows of every label, and their numbers."""
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(label[order]) != 0])
    return np.add.reduceat(rows[order], starts, axis=0), np.diff(np.r_[starts, len(label)])


def _mean_share(rows: np.ndarray, label: np.ndarray) -> Any:
    sums, counts = _sums(rows, label)
    between = (
        np.square(sums.sum(0)).sum() - np.square(sums).sum()
    )  # sum of eps_i . eps_j over pairs of different queries: a U-statistic of |E eps|^2
    return (
        between
        / (counts.sum() ** 2 - np.square(counts).sum())
        / (np.square(rows).sum() / len(rows))
    )


def _intraclass(rows: np.ndarray, label: np.ndarray) -> Any:
    """ANOVA estimate of the intraclass correlation (Donner 1986, section 2), sums of squares summed
    over coordinates.
    """
    sums, counts = _sums(rows, label)
    k, n = len(counts), len(rows)
    if k < 2 or k == n:
        return np.nan
    means = sums / counts[:, None]
    between = (counts * np.square(means - rows.mean(0)).sum(1)).sum() / (k - 1)
    within = (np.square(rows).sum() - (counts * np.square(means).sum(1)).sum()) / (n - k)
    share = (between - within) / ((n - np.square(counts).sum() / n) / (k - 1))
    return share / (share + within)


def _mardia(rows: np.ndarray) -> Any:
    """Mardia 1970, equations 3.12 and 3.13: kurtosis minus its mean under normality, ``k (k + 2) (n
    - 1) / (n + 1)``, over ``sqrt(8 k (k + 2) / n)``.
    """
    n, k = rows.shape
    centred = rows - rows.mean(0)
    spread = centred.T @ centred / n
    if n <= k + 1 or not np.linalg.cond(spread) < 1e12:
        return np.nan
    distances = (centred * np.linalg.solve(spread, centred.T).T).sum(1)
    return (np.square(distances).mean() - k * (k + 2) * (n - 1) / (n + 1)) / (
        8 * k * (k + 2) / n
    ) ** 0.5


def _of_covariance(centred: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """From the unbiased estimates of ``tr C^2`` and ``(tr C)^2`` of Himeno and Yamada 2014 (J.
    Multivariate Analysis 130), right for any distribution.
    """
    n = len(centred)
    trace, square = values.sum(), np.square(values).sum()
    fourth = np.square(np.square(centred).sum(1)).sum() / (n - 1)
    scale = (n - 1) / (n * (n - 2) * (n - 3))
    of_square = scale * ((n - 1) * (n - 2) * square + trace**2 - n * fourth)
    squared = scale * (2 * square + (n * n - 3 * n + 1) * trace**2 - n * fourth)
    # Deviations from a mean of n rows are shorter than those from the true mean by sqrt((n - 1) /
    # n).
    return {
        "participation_ratio": squared / of_square,
        "length_kurtosis": fourth * n / (n - 1) / (squared + 2 * of_square) - 1,
    }


def rank_correlation(one: Float64[np.ndarray, " rows"], other: Float64[np.ndarray, " rows"]) -> Any:
    """Spearman's correlation; not a number where one of the two does not vary."""
    first, second = (rankdata(values) - (len(values) + 1) / 2 for values in (one, other))
    with np.errstate(invalid="ignore"):
        return (first * second).sum() / (np.square(first).sum() * np.square(second).sum()) ** 0.5


def interval(
    value: Any, parts: Float64[np.ndarray, " blocks"], scale: str = ""
) -> tuple[float, float]:
    """:func:`jackknifed` on the scale where the statistic is more nearly normal, unless a value
    lies at its end.
    """
    to, back = _SCALES.get(scale, (np.asarray, np.asarray))
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = to(np.r_[value, parts])
    if not np.isfinite(moved).all():
        to, back, moved = np.asarray, np.asarray, np.r_[value, parts]
    low, high = back(np.array(jackknifed(moved[0], moved[1:])))
    return float(low), float(high)


def leaving_out(
    query: Int[np.ndarray, " rows"], rng: np.random.Generator
) -> list[Bool[np.ndarray, " rows"]]:
    """Masks that each leave out a random block of whole queries: 20 of them, or one per query where
    there are fewer.
    """
    count = int(query.max()) + 1
    block = (rng.permutation(count) % min(_BLOCKS, count))[query]
    return [block != number for number in range(min(_BLOCKS, count))]


def jackknifed(value: Any, parts: Float64[np.ndarray, "blocks ..."]) -> tuple[Any, Any]:
    """95 % interval from values that each leave one block of queries out."""
    count = len(parts)
    error = ((count - 1) / count * np.square(parts - parts.mean(0)).sum(0)) ** 0.5
    half = student.ppf(0.975, count - 1) * error
    return value - half, value + half
