"""Lanczos's method: a large symmetric matrix, known by its products alone, as a small tridiagonal
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.linalg import eigh_tridiagonal

from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief

Vector = Float64[np.ndarray, " size"]
Product = Callable[[Vector], Vector]
"""A symmetric matrix, as a function of a flat vector."""


@brief
@dataclass(frozen=True, slots=True)
class Krylov:
    """A symmetric matrix ``H`` seen from one vector ``q``: ``Q' H Q`` is tridiagonal.

    Attributes:
        alphas: diagonal of the tridiagonal matrix.
        betas: its off-diagonal.
        moments: ``q' H q`` and ``||H q||^2`` from the first product itself.
        basis: ``Q'``.
        residual_norm: length of what the last product leaves outside the basis; the residual of a
            Ritz pair is ``residual_norm`` times the last entry of its vector (Parlett 1980, The
            Symmetric Eigenvalue Problem, section 13.2).
    """

    alphas: Float64[np.ndarray, " steps"]
    betas: Float64[np.ndarray, " steps-1"]
    moments: tuple[float, float]
    basis: Float64[np.ndarray, "steps size"]
    residual_norm: float

    @property
    def overlap(self) -> float:
        """Largest entry of ``|Q' Q - I|``."""
        return float(np.abs(self.basis @ self.basis.T - np.eye(len(self.basis))).max())

    def quadrature(self) -> tuple[Float64[np.ndarray, " steps"], Float64[np.ndarray, " steps"]]:
        """Ritz values, ascending, and Gauss weights (squared first components of the Ritz vectors),
        which sum to one (Golub and Welsch 1969).
        """
        values, vectors = eigh_tridiagonal(self.alphas, self.betas)
        return values, vectors[0] ** 2


Enough = Callable[[Float64[np.ndarray, " steps"], Float64[np.ndarray, " steps-1"], float], bool]
"""``enough(alphas, betas, residual_norm)``: whether the search may stop; see :class:`Krylov`."""


def lanczos(product: Product, start: Vector, steps: int, enough: Enough | None = None) -> Krylov:
    """Lanczos's tridiagonalisation in float64 with full reorthogonalisation, twice in every step.

    Without it, rounding brings converged eigenvalues back as copies ("ghosts"). The basis takes
    ``steps * size`` float64 numbers.

    Args:
        product: the matrix.
        start: not zero.
        steps: products; fewer where the vectors that ``start`` reaches are exhausted.
        enough: asked after every product; default is to take all steps.

    Raises:
        WorkbenchError: a product that is not finite, or nothing to start from.
    """
    size, norm = len(start), float(np.linalg.norm(start))
    if not norm > 0 or steps < 1:
        raise WorkbenchError(
            f"Lanczos needs a start that is not zero and at least one step, not norm {norm} and "
            f"{steps} steps"
        )
    basis = np.empty((min(steps, size), size))
    alphas: list[float] = []
    betas: list[float] = []
    basis[0] = start / norm
    moments, residual_norm = (0.0, 0.0), 0.0
    for step in range(len(basis)):
        image = np.array(product(basis[step]), dtype=np.float64)
        if not np.isfinite(image).all():
            raise WorkbenchError(
                "a Hessian-vector product is not finite; are the weights in float32 and the loss "
                "finite?"
            )
        alphas.append(float(basis[step] @ image))
        if step == 0:
            moments = (alphas[0], float(image @ image))
        for _ in range(2):
            image -= basis[: step + 1].T @ (basis[: step + 1] @ image)
        residual_norm = float(np.linalg.norm(image))
        exhausted = residual_norm <= 1e-12 * max(map(abs, alphas + betas))
        if (
            step + 1 == len(basis)
            or exhausted
            or (enough is not None and enough(np.array(alphas), np.array(betas), residual_norm))
        ):
            break
        betas.append(residual_norm)
        basis[step + 1] = image / residual_norm
    return Krylov(np.array(alphas), np.array(betas), moments, basis[: len(alphas)], residual_norm)
