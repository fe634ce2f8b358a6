"""Subspaces of things that are not rows of one capture: weight gradients, differences between two
models, contrasts between two token sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.hooks import Capture, Collect, Moments, Positions, resolve
from workbench.subspaces.finders import SketchPCA, StreamingPCA
from workbench.subspaces.subspace import Subspace, noise_floor

if TYPE_CHECKING:
    from jaxtyping import Float


class TwoSided(NamedTuple):
    """The two sides of a matrix.

    Attributes:
        gradient: left singular directions ``[d_out k]``, on the side of the output gradients.
        activation: right singular directions ``[d_in k]``, on the side of the inputs.
    """

    gradient: Subspace
    activation: Subspace


def singular_subspaces(
    matrix: Float[Tensor, "d_out d_in"], rank: int, *, site: str = "", source: str = ""
) -> TwoSided:
    """The top singular directions of a weight gradient, both sides (RepSelect, arXiv 2606.17168):
    exact SVD in float64.

    The released code divides by the smallest kept singular value, so that a matrix of lower rank
    than asked for is annihilated and a zero matrix becomes NaN; here directions below 1e-6 of the
    largest singular value are left out, and a zero matrix has none.

    Args:
        matrix: the weight gradient.
        rank: how many directions, at most.
        site: recorded.
        source: recorded.

    Returns:
        Subspaces whose eigenvalues are squared singular values, and whose mean is zero.

    Raises:
        WorkbenchError: the matrix is not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise WorkbenchError(
            f"the gradient of {site or 'this weight'} holds NaN or infinity; no subspace was fitted"
        )
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    keep = (
        min(rank, int((singular > singular[0] * 1e-6).sum()))
        if len(singular) and float(singular[0]) > 0
        else 0
    )
    values = singular[:keep].square().float().cpu()
    total = float(singular.square().sum())

    def side(vectors: Tensor) -> Subspace:
        return Subspace(
            vectors[:, :keep].float().cpu().contiguous(),
            values,
            torch.zeros(len(vectors)),
            len(singular),
            total,
            site,
            "",
            source,
            rank,
        )

    return TwoSided(side(left), side(right.T))


def difference_finder(
    first: PreTrainedModel,
    second: PreTrainedModel,
    batches: Iterable[Batch],
    sites: str | Iterable[str],
    make: Callable[[], StreamingPCA | SketchPCA],
    at: Positions,
) -> dict[str, StreamingPCA | SketchPCA]:
    """Principal components of ``second - first`` at the same tokens: what changed between two
    models.

    Args:
        first: for example the base.
        second: for example the unlearned model; the same tokenizer and widths.
        batches: texts.
        sites: patterns of activation sites.
        make: makes an empty finder.
        at: position rule.

    Returns:
        Site name -> finder of the differences. Its ``mean_`` is the mean shift.
    """
    chosen_sites = resolve(first, sites)
    finders = {site.name: make() for site in chosen_sites}
    for batch in batches:
        rows = []
        for model in (first, second):
            rows.append(Collect(model.device))
            with Capture(model, [site.name for site in chosen_sites], rows[-1], at=at) as capture:
                capture.forward(batch.inputs)
        for name, finder in finders.items():
            finder.partial_fit(rows[1][name].float() - rows[0][name].float())
    return finders


def contrast(
    first: Moments,
    second: Moments,
    rank: int,
    *,
    site: str = "",
    tokens: str = "",
    source: str = "",
) -> Subspace:
    """Directions along which the rows of one token set vary more than those of another: top
    eigenvectors of ``C_first - C_second`` (contrastive PCA with weight 1, Abid et al. 2018).

    Returns:
        Only directions with a positive difference; ``eigenvalues`` are the differences, ``mean`` is
        the difference of the means, ``total_variance`` the sum of all positive differences.

    Raises:
        WorkbenchError: one of the two saw no rows.
    """
    if not first.count or not second.count:
        raise WorkbenchError(
            f"a contrast needs rows of both token sets; got {first.count} and {second.count}"
        )
    if len(first.mean) != len(second.mean):
        raise WorkbenchError(
            f"a contrast needs rows of one width; got {len(first.mean)} and {len(second.mean)}"
        )
    one, two = first.covariance, second.covariance.to(first.covariance)
    if not bool(torch.isfinite(one).all() and torch.isfinite(two).all()):
        raise WorkbenchError(
            f"the rows of {site or 'this site'} hold NaN or infinity; no contrast was fitted"
        )
    values, vectors = torch.linalg.eigh(one - two)
    values, vectors = values.flip(0), vectors.flip(1)
    largest = float(torch.linalg.eigvalsh(one)[-1] + torch.linalg.eigvalsh(two)[-1])
    size = one.diagonal() + two.diagonal() + first.mean.square() + second.mean.square().to(one)
    positive = values.clamp(min=0)
    # Rows of spread s with a rounding of r have a variance that is off by up to 2 s r + r^2.
    rounding = noise_floor(vectors, size, largest)
    spread = (vectors * ((one + two) @ vectors)).sum(0).clamp(min=0)
    keep = (values > 2 * (spread * rounding).sqrt() + rounding).nonzero()[:rank, 0]
    mean = (first.mean - second.mean.to(first.mean)).float().cpu()
    return Subspace(
        vectors[:, keep].float().cpu().contiguous(),
        positive[keep].float().cpu(),
        mean,
        first.count + second.count,
        float(positive.sum()),
        site,
        tokens,
        source,
        rank,
    )
