"""Losses along paths between checkpoints: straight lines with their barriers, and the path that an
attack really took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.progress import ProgressCallback, quiet
from workbench.sharpness.probe import LossSource, checked, probing, value_of
from workbench.sharpness.slices import Direction
from workbench.unlearning.deltas import norm_of
from workbench.unlearning.smoothing.rule import combine

BARRIER = ("loss", "start", "end", "barrier", "barrier_at", "midpoint", "area", "half_at")


def line_losses(
    model: PreTrainedModel,
    towards: Direction,
    positions: Sequence[float],
    losses: Mapping[str, LossSource],
    *,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """Every loss along the straight line ``theta + a * towards``.

    Args:
        model: the start, ``a = 0``; in evaluation mode; left as it was found.
        towards: the other end minus the start, so that ``a = 1`` is the other end; in units of the
            displacement.
        positions: values of ``a``, in any order.
        losses: name to texts (mean token loss, nats per token) or to a function of the model.
        progress: called after every position.

    Returns:
        A row per position and loss: ``position``, ``loss``, ``value``.
    """
    places = checked("positions", positions, negative=True)
    rows = []
    with probing(model, losses) as move:
        for done, place in enumerate(places, start=1):
            move(towards, place)
            rows += [(place, name, value_of(model, loss)) for name, loss in losses.items()]
            progress(done, len(places))
    return pd.DataFrame(rows, columns=["position", "loss", "value"])


def barriers(line: pd.DataFrame) -> pd.DataFrame:
    """How far the losses on a line rise above the chord between its two ends (Entezari et al. 2022,
    arXiv 2110.06296, section 2).

    The excess is ``L(a) - (1 - a) L(0) - a L(1)`` on ``0 <= a <= 1``.

    Args:
        line: of :func:`line_losses`, with positions 0 and 1.

    Returns:
        A row per loss: ``start`` and ``end`` (losses there), ``barrier`` (largest excess, at least
        0, which it is for a convex loss) and where it is (``barrier_at``), ``midpoint`` (excess at
        0.5; between positions by linear interpolation), ``area`` (integral of the excess,
        trapezoids), ``half_at`` (the first ``a`` at which the loss is at most half of its start;
        between positions by linear interpolation; not a number where it never is). Not a number
        where the loss is not finite on the line.

    Raises:
        WorkbenchError: 0 or 1 is not among the positions.
    """
    rows = []
    for name, group in line.groupby("loss", sort=False):
        inside = group[group["position"].between(0, 1)].sort_values("position")
        places, values = (
            inside[column].to_numpy(dtype=np.float64) for column in ("position", "value")
        )
        if not len(places) or places[0] != 0 or places[-1] != 1:
            raise WorkbenchError(
                "a barrier needs both ends of the line; let positions 0 and 1 be among the "
                "positions"
            )
        if not np.isfinite(values).all():
            rows.append((name, values[0], values[-1], *[float("nan")] * 5))
            continue
        excess = values - (1 - places) * values[0] - places * values[-1]
        highest = int(excess.argmax())
        rows.append(
            (
                name,
                values[0],
                values[-1],
                float(excess[highest]),
                float(places[highest]),
                float(np.interp(0.5, places, excess)),
                float(np.trapezoid(excess, places)),
                _first_below(places, values, values[0] / 2),
            )
        )
    return pd.DataFrame(rows, columns=list(BARRIER))


def _first_below(places: np.ndarray, values: np.ndarray, level: float) -> float:
    below = np.flatnonzero(values <= level)
    if not len(below):
        return float("nan")
    after = int(below[0])
    if not after:
        return float(places[0])
    before = after - 1
    return float(
        places[before]
        + (values[before] - level)
        / (values[before] - values[after])
        * (places[after] - places[before])
    )


def path_losses(
    model: PreTrainedModel,
    deltas: Sequence[Direction],
    losses: Mapping[str, LossSource],
    *,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """Every loss at the checkpoints of a path, e.g. of a relearning attack.

    Args:
        model: where the path begins; in evaluation mode; left as it was found.
        deltas: weights minus the model's, a direction per checkpoint, in the order of the path. The
            start itself is row 0 and need not be among them.
        losses: name to texts (mean token loss, nats per token) or to a function of the model.
        progress: called after every checkpoint.

    Returns:
        A row per checkpoint and loss: ``checkpoint`` (0 is the start), ``distance`` (straight, from
        the start), ``travelled`` (length of the path so far, checkpoint by checkpoint), ``loss``,
        ``value``.
    """
    rows = []
    travelled = 0.0
    previous: Direction = {}
    with probing(model, losses) as move:
        for checkpoint, delta in enumerate([{}, *deltas]):
            travelled += norm_of(combine([(1.0, dict(delta)), (-1.0, dict(previous))]))
            previous = delta
            move(delta, 1.0)
            rows += [
                (checkpoint, norm_of(delta), travelled, name, value_of(model, loss))
                for name, loss in losses.items()
            ]
            progress(checkpoint + 1, len(deltas) + 1)
    return pd.DataFrame(rows, columns=["checkpoint", "distance", "travelled", "loss", "value"])
