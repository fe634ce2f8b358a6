"""Two-dimensional slices of a loss, the planes they are taken in, and what is left of a path when
it is drawn in a plane.

A plane holds three points, or the two main directions of a trajectory; every further point lies off
it, and its distance from the plane says how much of the picture is true for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.progress import ProgressCallback, quiet
from workbench.sharpness.probe import LossSource, checked, probing, value_of
from workbench.sharpness.slices import Direction, scaled
from workbench.unlearning.deltas import norm_of
from workbench.unlearning.smoothing.rule import combine, inner

if TYPE_CHECKING:
    from jaxtyping import Float64

# Two directions closer to one line than this (sine of their angle) span no plane in float32.
_FLAT = 1e-5


def loss_plane(
    model: PreTrainedModel,
    first: Direction,
    second: Direction,
    positions_first: Sequence[float],
    positions_second: Sequence[float],
    losses: Mapping[str, LossSource],
    *,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """Every loss on the grid ``theta + x * first + y * second``.

    Args:
        model: the point (0, 0); in evaluation mode; left as it was found.
        first: what one unit of ``x`` means.
        second: what one unit of ``y`` means.
        positions_first: values of ``x``.
        positions_second: values of ``y``.
        losses: name to texts (mean token loss, nats per token) or to a function of the model.
        progress: called after every point.

    Returns:
        A row per point and loss: ``x``, ``y``, ``loss``, ``value``. Values that are not finite stay
        so.
    """
    columns = checked("positions_first", positions_first, negative=True)
    lines = checked("positions_second", positions_second, negative=True)
    rows = []
    with probing(model, losses) as move:
        for y in lines:
            for x in columns:
                # every point is computed from the centre, never from its neighbour: nothing drifts
                # and no line of the grid is displaced
                move(combine([(x, dict(first)), (y, dict(second))]) if x or y else {}, 1.0)
                rows += [(x, y, name, value_of(model, loss)) for name, loss in losses.items()]
                progress(len(rows) // len(losses), len(columns) * len(lines))
    return pd.DataFrame(rows, columns=["x", "y", "loss", "value"])


def orthonormal(first: Direction, second: Direction) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two unit directions at right angles that span the same plane, the first along ``first``
    (Gram-Schmidt).

    The plane through three checkpoints A, B and C is that of ``B - A`` and ``C - A``, with A at (0,
    0) and B on the x-axis.

    Raises:
        WorkbenchError: the two lie on one line, or one of them is zero.
    """
    if not norm_of(first) or not norm_of(second):
        raise WorkbenchError(
            "a direction is zero and spans no plane; take two different checkpoints"
        )
    x, y = scaled(first, 1.0), scaled(second, 1.0)
    for _ in range(2):  # the second round removes what rounding left of the first
        y = combine([(1.0, y), (-inner(x, y), x)])
        if norm_of(y) < _FLAT:
            raise WorkbenchError(
                "the two directions lie on one line and span no plane; take a third checkpoint "
                "that is off the line"
            )
        y = scaled(y, 1.0)
    return x, y


def coordinates(
    points: Mapping[str, Direction], first: Direction, second: Direction
) -> pd.DataFrame:
    """Where points (weights minus those of the plane's origin) lie in a plane: their nearest points
    of it, by least squares.

    Args:
        points: name to difference from the origin.
        first: the x-axis, of any length.
        second: the y-axis, of any length and angle.

    Returns:
        A row per point: ``point``, ``x``, ``y`` (in units of the axes), ``distance`` from the
        origin, ``residual`` (distance from the plane).

    Raises:
        WorkbenchError: the axes span no plane.
    """
    gram = np.array([[inner(dict(a), dict(b)) for b in (first, second)] for a in (first, second)])
    if not np.linalg.det(gram) > _FLAT**2 * gram[0, 0] * gram[1, 1]:
        raise WorkbenchError("the two axes lie on one line and span no plane")
    rows = []
    for name, point in points.items():
        x, y = (
            float(value)
            for value in np.linalg.solve(
                gram, [inner(dict(point), dict(axis)) for axis in (first, second)]
            )
        )
        # the residual itself is formed: a difference of squares would lose a small one
        residual = norm_of(combine([(1.0, dict(point)), (-x, dict(first)), (-y, dict(second))]))
        rows.append((name, x, y, norm_of(point), residual))
    return pd.DataFrame(rows, columns=["point", "x", "y", "distance", "residual"])


@dataclass(frozen=True, slots=True)
class TrajectoryPlane:
    """The plane of a trajectory's first two principal components, through its first point.

    Attributes:
        first: unit direction of PC 1.
        second: unit direction of PC 2.
        shares: a row per component: ``component`` (from 1), ``share`` of the variance, ``null``
            (the share that a Gaussian random walk with steps of the same lengths has).
    """

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    shares: pd.DataFrame

    def __repr__(self) -> str:
        two, null = (float(self.shares[column][:2].sum()) for column in ("share", "null"))
        return (
            f"TrajectoryPlane(PC 1+2 hold {two:.0%} of the variance, of a random walk's {null:.0%})"
        )

    def _repr_html_(self) -> str:
        return str(self.shares.to_html(index=False, escape=True))


def trajectory_plane(deltas: Sequence[Direction]) -> TrajectoryPlane:
    """Principal components of a trajectory (Li et al. 2018, arXiv 1712.09913, section 7), with the
    null that their shares must be read against.

    In a space of many dimensions even a random walk has most of its variance in two components (61
    % and 76 % in the limit of many steps), so a high share alone says nothing about the path
    (Antognini and Sohl-Dickstein 2018, arXiv 1806.08805).

    Args:
        deltas: weights minus those of the start, a direction per checkpoint, without the start
            itself (it counts as the first point).

    Raises:
        WorkbenchError: fewer than two checkpoints, or all points lie on one line.
    """
    if len(deltas) < 2:
        raise WorkbenchError(
            f"a plane needs at least two checkpoints beside the start; there are {len(deltas)}"
        )
    points = [{}, *(dict(delta) for delta in deltas)]
    gram = np.array([[inner(a, b) if a and b else 0.0 for b in points] for a in points])
    steps = [
        norm_of(combine([(1.0, after), (-1.0, before)]))
        for before, after in itertools.pairwise(points)
    ]
    values, vectors = _components(gram)
    if not values[1] > _FLAT**2 * values[0]:
        raise WorkbenchError(
            "the checkpoints lie on one line, which has no plane; take line_losses along it"
        )
    axes = [
        combine(
            [
                (float(weight), point)
                for weight, point in zip(vectors[:, k] - vectors[:, k].mean(), points, strict=True)
            ]
        )
        for k in (0, 1)
    ]
    first, second = orthonormal(*axes)
    shares = {
        "component": range(1, len(deltas) + 1),
        "share": values[:-1] / values.sum(),
        "null": walk_shares(steps),
    }
    return TrajectoryPlane(first, second, pd.DataFrame(shares))


def walk_shares(steps: Sequence[float]) -> Float64[np.ndarray, " steps"]:
    """Shares of the variance of the principal components of a Gaussian random walk, in the limit of
    many dimensions.

    There steps are at right angles, and ``<theta_i, theta_j>`` is the sum of the squared lengths of
    the first ``min(i, j)`` steps. For ``T - 1`` steps of one length the shares are ``6 / ((T^2 - 1)
    (2 sin(pi k / 2T))^2)``, which tends to ``6 / (pi k)^2`` (Antognini and Sohl-Dickstein 2018).

    Args:
        steps: length of every step.

    Returns:
        The shares, largest first.
    """
    reached = np.concatenate([[0.0], np.cumsum(np.square(np.asarray(steps, dtype=np.float64)))])
    values, _ = _components(np.minimum.outer(reached, reached))
    return np.asarray(values[:-1] / values.sum())


def _components(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (largest first, none negative) and eigenvectors of the Gram matrix of centred
    points; one eigenvalue is always zero.
    """
    centre = np.eye(len(gram)) - 1 / len(gram)
    values, vectors = np.linalg.eigh(centre @ gram @ centre)
    return values[::-1].clip(min=0), vectors[:, ::-1]
