r"""The assumptions of "Improving LLM Unlearning Robustness via Random Perturbations" (Huu-Tien et
al., arXiv 2501.19202), measured.

The paper's argument: a forget-token in a retain query shifts the unlearned model's latent by noise,
``z(tagged) = z(clean) + eps`` with ``eps ~ N(0, eta I)`` independent of the query; so logits
receive ``N(0, eta J J^T)``, the loss rises by ``(eta / 2) tr H`` on average, and Gaussian noise of
variance ``nu`` against it (random noise augmentation) undoes the sign of the loss change with a
probability that depends on ``nu / eta`` alone. Each link is held here against what a model really
does: the true shift is a deterministic function of query and word, so nothing makes it so. The
assumption is quoted from abstract and reviews, its covariance ``eta I`` and the paper's constants
were not verified; closed forms are derived here.

Names in a results table (stage ``triggers``; ``arm`` is the word's kind, as in
:data:`workbench.diagnostics.triggers.TRIGGER_ARMS`): :data:`THEORY` and a name of
:data:`QUANTITIES`; with ``_expected`` behind it, what the assumption gives for a sample of the same
size, with its central 95 % as ``low`` and ``high``. Curves, with the place along them as ``step``:
those of :data:`CURVES`. Run the base model and the retain-token and neutral-token arms beside the
unlearned model's forget-token: any word in front shifts what comes behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.diagnostics.gaussian_rows import (
    bands,
    design,
    interval,
    jackknifed,
    leaving_out,
    measure,
    rank_correlation,
)
from workbench.diagnostics.rejection import rejection_probability, rejection_rate
from workbench.diagnostics.trigger_shift import Responses, ShiftRows
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import Estimate, bootstrap, ratio, wilson
from workbench.metrics import ALONE
from workbench.metrics.triggers import CURVES, QUANTITIES, ROW_STATISTICS, THEORY
from workbench.progress import ProgressCallback, quiet

if TYPE_CHECKING:  # a table is only handed in here; diagnostics stand below experiments
    from workbench.tables import Table

THEORY_COLUMNS = (
    "quantity",
    "value",
    "low",
    "high",
    "expected",
    "expected_low",
    "expected_high",
    "n",
)
RATIOS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BINS = np.linspace(-8, 8, 65)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Theory:
    """The assumption beside what was measured.

    Attributes:
        quantities: columns :data:`THEORY_COLUMNS`, one row per name of :data:`QUANTITIES`; ``low``
            and ``high`` are the estimate's 95 % interval over queries, ``expected_low`` and
            ``expected_high`` the central 95 % of the same statistic under the assumption (of the
            loss change: the interval of ``eta / 2 * tr H``), ``n`` the number of queries.
        curves: ``curve`` (a name of :data:`CURVES`), ``step``, ``value``, ``low``, ``high``,
            ``expected``, ``expected_low``, ``expected_high``, ``n``.
    """

    quantities: pd.DataFrame
    curves: pd.DataFrame

    @property
    def apart(self) -> tuple[str, ...]:
        """The quantities whose interval does not meet what the assumption gives.

        A value outside the expected 95 % says that the rows do not come from the assumption as a
        whole (all its parts make the band: a mean share scatters more where few directions carry
        the shift). An interval apart from it says that this very property fails.
        """
        quantities = self.quantities
        return tuple(
            quantities["quantity"][
                (quantities["low"] > quantities["expected_high"])
                | (quantities["high"] < quantities["expected_low"])
            ]
        )

    def __repr__(self) -> str:
        apart = self.apart
        return (
            f"Theory({len(apart)} of {len(self.quantities['expected_low'].dropna())} quantities "
            f"lie apart from the assumption: {', '.join(apart) or 'none'})"
        )

    def _repr_html_(self) -> str:
        shown = self.quantities.assign(meaning=self.quantities["quantity"].map(QUANTITIES))
        return str(
            shown.to_html(
                escape=True, index=False, float_format=lambda value: f"{value:.3g}", na_rep=""
            )
        )


def examine(
    rows: ShiftRows,
    answers: Responses | None = None,
    *,
    draws: int = 200,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> Theory:
    """Every statistic of the shift, beside the same statistic of rows drawn from ``N(0, I)`` with
    the same tokens, queries, words and width.

    Tokens of one query are dependent. Statistics of shape (kurtosis, skewness, Mardia, covariance,
    correlation, words) are therefore taken over one token per query, chosen by the ``seed``; the
    mean leaves out pairs within a query; intervals leave out blocks of whole queries. Queries that
    share a word stay in the sample as if they were independent: where ``word_share`` is large, the
    intervals of the others are too short. Every statistic in :data:`ROW_STATISTICS` is free of
    scale, so the draws need no ``eta``.

    Args:
        rows: of one model and one kind of word.
        answers: :func:`workbench.diagnostics.trigger_shift.responses` of the same, for logits, loss
            and rejection. Their ``eta`` is one number for all aligned tokens, as the assumption
            says, also where ``rows`` are fewer; every row of their batches counts as a query.
        draws: samples of the assumption. The work is about this many times that of the statistics
            themselves, an eigendecomposition of ``min(queries, width)`` included.
        seed: of the chosen tokens, the random directions, the draws and the noise.
        progress: called after every draw.

    Raises:
        WorkbenchError: there are fewer than 8 queries, or fewer than 40 draws (a 95 % band takes
            39).
    """
    label = np.unique(rows.query.cpu().numpy(), return_inverse=True)[1]
    queries = int(label.max()) + 1
    fewest = queries if answers is None else min(queries, len(answers.items))
    if fewest < 8 or draws < 40:
        raise WorkbenchError(
            "the statistics of the shift need at least 8 queries, and their null 40 draws; got "
            f"{fewest} and {draws}"
        )
    rng = np.random.default_rng(seed)
    shift, clean = rows.shift.cpu().double().numpy(), rows.clean.cpu().double().numpy()
    fixed = design(label, None if rows.word is None else rows.word.cpu().numpy(), clean, rng)
    measured, spectrum = measure(shift, fixed)
    parts = np.array(
        [measure(shift[keep], fixed.part(keep))[0] for keep in leaving_out(label, rng)]
    )
    ends = [interval(measured[i], parts[:, i], name) for i, name in enumerate(ROW_STATISTICS)]
    null, spectra = np.empty((draws, len(ROW_STATISTICS))), np.empty((draws, len(spectrum)))
    for draw in range(draws):
        null[draw], spectra[draw] = measure(rng.standard_normal(shift.shape), fixed)
        progress(draw + 1, draws)
    null[:, np.isnan(measured)] = np.nan  # what cannot be measured has no null either
    expected = bands(null)
    sizes = [np.bincount(label, weights=np.square(table).sum(1)) for table in (shift, clean)]
    eta = ratio(sizes[0], np.bincount(label) * float(shift.shape[1]))
    lines = [
        _line("eta", eta),
        _line("eta_relative", ratio(*sizes) if sizes[1].any() else _empty(queries)),
    ]
    lines += [
        (name, measured[i], *ends[i], *expected[:, i], queries)
        for i, name in enumerate(ROW_STATISTICS)
    ]

    pooled = shift[fixed.chosen].ravel() / eta.value**0.5 if eta.value else np.full(1, np.nan)
    density = np.histogram(pooled, _BINS)[0] / pooled.size / np.diff(_BINS)
    curves = [
        ("histogram", place, value, *[np.nan] * 5, queries)
        for place, value in zip((_BINS[1:] + _BINS[:-1]) / 2, density, strict=True)
    ]
    band = bands(spectra).T
    curves += [
        ("spectrum", i + 1.0, share, np.nan, np.nan, *band[i], queries)
        for i, share in enumerate(spectrum)
    ]
    if answers is not None:
        lines += _of_responses(answers, seed)
        variance = float(answers.shifts.double().square().sum() / answers.coordinates.sum())
        for step in RATIOS if answers.first_order.any() else ():
            rate = rejection_rate(
                answers.gradients, answers.shifts, noise_std=step * variance**0.5, seed=seed
            )
            curves.append(
                (
                    "rejection",
                    step,
                    *rate[:3],
                    rejection_probability(shift_std=1, noise_std=step),
                    np.nan,
                    np.nan,
                    rate.n,
                )
            )
    return Theory(
        pd.DataFrame(lines, columns=THEORY_COLUMNS),
        pd.DataFrame(curves, columns=("curve", "step", *THEORY_COLUMNS[1:])),
    )


def _line(
    name: str, found: Estimate, expected: Estimate | None = None
) -> tuple[str, float, float, float, float, float, float, int]:
    given = (np.nan, np.nan, np.nan) if expected is None else expected[:3]
    return name, *found[:3], *given, found.n


def _empty(n: int) -> Estimate:
    return Estimate(np.nan, np.nan, np.nan, n)


def _of_responses(
    answers: Responses, seed: int
) -> list[tuple[str, float, float, float, float, float, float, int]]:
    count = len(answers.items)
    energy = answers.shifts.double().square().sum((1, 2)).numpy()

    def mean(values: np.ndarray) -> Estimate:
        return (
            bootstrap(values, seed=seed)._replace(n=count)
            if np.isfinite(values).all()
            else _empty(count)
        )

    def against_noise(squares: np.ndarray) -> Estimate:
        columns = np.stack([squares, answers.jacobian_square, energy, answers.coordinates])

        def value(sums: np.ndarray) -> Any:
            return sums[0] / (sums[1] * sums[2] / sums[3])

        with np.errstate(invalid="ignore", divide="ignore"):
            totals = columns.sum(1)
            low, high = jackknifed(value(totals), value(totals[:, None] - columns))
            return Estimate(float(value(totals)), float(low), float(high), count)

    ideal_slope = Estimate(1.0, np.nan, np.nan, count)
    eta = energy.sum() / answers.coordinates.sum()
    trace = mean(answers.hessian_trace)
    rise = Estimate(eta / 2 * trace.value, eta / 2 * trace.low, eta / 2 * trace.high, count)
    lines = [
        _line("logit_trace_ratio", against_noise(answers.logit_square), ideal_slope),
        _line(
            "logit_trace_ratio_first_order",
            against_noise(answers.logit_square_first_order),
            ideal_slope,
        ),
        _line("logit_cosine", mean(answers.logit_cosine), ideal_slope),
        _line("logit_cosine_at_site", mean(answers.logit_cosine_at_site), ideal_slope),
        _line("loss_change", mean(answers.change), rise),
        _line("loss_change_at_site", mean(answers.change_at_site), rise),
        _line("loss_hessian_trace", trace),
        _line(
            "loss_hessian_positive",
            wilson(int((answers.hessian_trace > 0).sum()), count),
            ideal_slope,
        ),
    ]
    jackknife_groups = leaving_out(np.arange(count), np.random.default_rng(seed))
    for order, predicted in (
        ("first_order", answers.first_order),
        ("second_order", answers.second_order),
    ):
        for place, change in (("", answers.change), ("_at_site", answers.change_at_site)):
            correlation = rank_correlation(predicted, change)
            ends = interval(
                correlation,
                np.array(
                    [rank_correlation(predicted[keep], change[keep]) for keep in jackknife_groups]
                ),
                "length_correlation",
            )
            lines.append(
                _line(
                    f"{order}_correlation{place}",
                    Estimate(float(correlation), *ends, count),
                    ideal_slope,
                )
            )
            lines.append(
                _line(
                    f"{order}_sign{place}",
                    wilson(int((predicted * change > 0).sum()), count)
                    if predicted.any()
                    else _empty(count),
                    ideal_slope,
                )
            )
    return lines


def eta_by_coefficient(rows: Mapping[float, ShiftRows]) -> pd.DataFrame:
    """How the shift's variance grows with the steering coefficient, and its power law.

    Args:
        rows: steering coefficient -> rows of the model trained with it, for the same queries,
            numbered alike (as :func:`workbench.diagnostics.trigger_shift.shift_rows` does).

    Returns:
        ``quantity`` (``eta_of_coefficient``, and ``eta_slope`` once), ``coefficient``, ``value``,
        ``low``, ``high``, ``n``. The slope is that of least squares of log eta on log coefficient:
        2 where the shift is proportional to the coefficient. Intervals are over queries, which all
        models share; how another training run would differ is not in them.

    Raises:
        WorkbenchError: there are fewer than two coefficients, one is not positive, or a model does
            not shift at all.
    """
    coefficients = sorted(rows)
    if len(coefficients) < 2 or not all(0 < c < math.inf for c in coefficients):
        raise WorkbenchError(
            f"a power law needs at least two positive steering coefficients; got {coefficients}"
        )
    label = np.unique(
        np.concatenate([rows[c].query.cpu().numpy() for c in coefficients]), return_inverse=True
    )[1]
    labels = np.split(label, np.cumsum([len(rows[c].query) for c in coefficients])[:-1])
    queries = int(label.max()) + 1
    energy = np.array(
        [
            np.bincount(mine, np.square(rows[c].shift.cpu().double().numpy()).sum(1), queries)
            for c, mine in zip(coefficients, labels, strict=True)
        ]
    )
    numbers = np.array(
        [
            np.bincount(mine, minlength=queries) * float(rows[c].shift.shape[1])
            for c, mine in zip(coefficients, labels, strict=True)
        ]
    )
    if not energy.any(1).all():
        raise WorkbenchError(
            "the word shifts nothing in the model of coefficient "
            f"{coefficients[int(energy.any(1).argmin())]}, so eta has no logarithm"
        )
    place = np.log(coefficients) - np.log(coefficients).mean()

    def slope(eta: np.ndarray) -> np.ndarray:
        return place @ np.log(eta) / (place @ place)

    value = float(slope(energy.sum(1) / numbers.sum(1)))
    lines = [
        ("eta_of_coefficient", c, *ratio(energy_at_c[many > 0], many[many > 0]))
        for c, energy_at_c, many in zip(coefficients, energy, numbers, strict=True)
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = slope(
            (energy.sum(1, keepdims=True) - energy) / (numbers.sum(1, keepdims=True) - numbers)
        )
    low, high = jackknifed(value, parts) if queries > 1 else (np.nan, np.nan)
    lines.append(("eta_slope", np.nan, value, float(low), float(high), queries))
    return pd.DataFrame(lines, columns=["quantity", "coefficient", "value", "low", "high", "n"])


def add_theory(table: Table, theory: Theory, **columns: Any) -> None:
    """Scalars and curves as rows of a results table; names in the head of this module.

    Args:
        table: rows are added to it.
        theory: from :func:`examine`.
        columns: of the table, at least ``arm`` and ``site``; ``stage`` is ``triggers`` by default.
    """
    columns = {"stage": "triggers", **columns}
    for frame, name in ((theory.quantities, "quantity"), (theory.curves, "curve")):
        for row in frame.to_dict("records"):
            axis = ALONE if name == "quantity" else CURVES[row[name]][0]
            place = {} if axis == ALONE else {axis: row["step"]}
            table.add(
                THEORY + row[name],
                row["value"],
                low=row["low"],
                high=row["high"],
                n=row["n"],
                **place,
                **columns,
            )
            if not math.isnan(row["expected"]):
                table.add(
                    f"{THEORY}{row[name]}_expected",
                    row["expected"],
                    low=row["expected_low"],
                    high=row["expected_high"],
                    n=row["n"],
                    **place,
                    **columns,
                )


def add_coefficients(table: Table, table_of_eta: pd.DataFrame, **columns: Any) -> None:
    """The rows of :func:`eta_by_coefficient` in a results table."""
    columns = {"stage": "triggers", **columns}
    for row in table_of_eta.to_dict("records"):
        place = {} if math.isnan(row["coefficient"]) else {"coefficient": row["coefficient"]}
        table.add(
            THEORY + row["quantity"],
            row["value"],
            low=row["low"],
            high=row["high"],
            n=row["n"],
            **place,
            **columns,
        )
