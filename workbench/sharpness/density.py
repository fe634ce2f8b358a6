"""The spectral density of the Hessian by stochastic Lanczos quadrature: how many directions curve
how much, and which share of them curves downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.progress import ProgressCallback, quiet
from workbench.sharpness.curvature import Curvature
from workbench.sharpness.krylov import Product, lanczos
from workbench.sharpness.trace import rademacher

if TYPE_CHECKING:
    from jaxtyping import Float64, Int


@dataclass(frozen=True, slots=True)
class Density:
    """A spectral density as weighted nodes.

    Attributes:
        nodes: eigenvalue estimates of all probes, nats per token per squared unit of weight.
        weights: share of the spectrum; sums to one within a probe.
        probe: which probe a node comes from.
        size: number of weights, and so of eigenvalues.
        moment_error: largest relative difference between the first two moments of a quadrature and
            ``z' H z`` and ``||H z||^2`` of the same probe. Anything above 1e-6 says that the
            quadrature is not that of this matrix.
        overlap: largest loss of orthogonality of a Lanczos basis.
        products: Hessian-vector products spent.
    """

    nodes: Float64[np.ndarray, " nodes"]
    weights: Float64[np.ndarray, " nodes"]
    probe: Int[np.ndarray, " nodes"]
    size: int
    moment_error: float
    overlap: float
    products: int

    @property
    def top(self) -> float:
        """Largest node: never above the largest eigenvalue, and close to it where that stands
        apart.
        """
        return float(self.nodes.max())

    @property
    def bottom(self) -> float:
        """Smallest node: never below the smallest eigenvalue."""
        return float(self.nodes.min())

    @property
    def trace(self) -> float:
        """Hutchinson's estimate from the same probes."""
        return self.size * float(self._per_probe(self.weights * self.nodes).mean())

    def mass_below(self, value: float) -> float:
        """Share of the eigenvalues below ``value``; the same value for all models makes them
        comparable.
        """
        return float(self._per_probe(self.weights * (self.nodes < value)).mean())

    @property
    def negative_energy(self) -> float:
        """``sum |negative eigenvalues| / sum |eigenvalues|``: 0 in a bowl, 1 on a hill; NaN for a
        matrix of zeros.

        It hardly sees what lies near zero, which a quadrature of few steps cannot place: a block of
        1952 weights with 42 % of its eigenvalues below zero gave shares of 56, 51, 81 and 62 % with
        15, 25, 40 and 80 steps, and an energy of 3.5, 4.2, 1.9 and 2.3 % where the truth was 2.4 %.
        """
        energy = self.weights * np.abs(self.nodes)
        return float(energy[self.nodes < 0].sum() / energy.sum()) if energy.any() else float("nan")

    def _per_probe(self, values: Float64[np.ndarray, " nodes"]) -> Float64[np.ndarray, " probes"]:
        return np.bincount(self.probe, values).astype(np.float64)

    def smoothed(
        self, grid: Float64[np.ndarray, " points"], linear: float, width: float = 0.2
    ) -> Float64[np.ndarray, "probes points"]:
        """Density of every probe per unit of ``arcsinh(eigenvalue / linear)``, with Gaussians of
        standard deviation ``width`` in place of the nodes.

        In that coordinate a decade is 2.3 units on either side and the neighbourhood ``linear`` of
        zero is linear, so that a line of both signs is smooth to the same degree everywhere.

        Args:
            grid: eigenvalues, e.g. :func:`both_signs`.
            linear: where the scale turns from linear to logarithmic, in units of the eigenvalues.
            width: in units of the coordinate.
        """
        offset = np.arcsinh(grid / linear)[:, None] - np.arcsinh(self.nodes / linear)
        bumps = np.exp(-0.5 * (offset / width) ** 2) * (self.weights / (width * (2 * np.pi) ** 0.5))
        return np.stack(
            [bumps[:, self.probe == probe].sum(1) for probe in range(int(self.probe.max()) + 1)]
        )

    def __repr__(self) -> str:
        return (
            f"Density({self.bottom:.4g} to {self.top:.4g}, negative energy "
            f"{self.negative_energy:.2g}, {int(self.probe.max()) + 1} probes)"
        )


def both_signs(
    bottom: float, top: float, linear: float, points: int = 201, margin: float = 0.8
) -> Float64[np.ndarray, " points"]:
    """Grid from ``bottom`` to ``top``, even in ``arcsinh(eigenvalue / linear)`` and ``margin``
    wider on either side; one for all models that a figure compares.
    """
    low, high = (
        float(np.arcsinh(bottom / linear)) - margin,
        float(np.arcsinh(top / linear)) + margin,
    )
    return linear * np.sinh(np.linspace(low, high, points))


def quadrature(
    product: Product,
    size: int,
    *,
    seed: int = 0,
    probes: int = 4,
    steps: int = 40,
    report: ProgressCallback = quiet,
) -> Density:
    """Stochastic Lanczos quadrature of a symmetric matrix (Ubaru, Chen and Saad 2017; for networks
    Ghorbani et al. 2019, arXiv 1901.10159).

    Every probe (random signs, those of :func:`workbench.sharpness.trace.hutchinson`) has a Gauss
    quadrature whose moments up to order ``2 steps - 1`` are those of the matrix as that probe sees
    it. Converged ends of the spectrum come out as nodes; the bulk does not, and its shape depends
    on ``steps`` and the smoothing.

    Args:
        product: the matrix.
        size: of it.
        seed: of the probes.
        probes: starting vectors.
        steps: products per probe.
        report: called after every probe.

    Raises:
        WorkbenchError: no probe or no step, or a product that is not finite.
    """
    if probes < 1 or steps < 1:
        raise WorkbenchError(f"probes is {probes} and steps {steps}; both must be at least 1")
    nodes, weights, owner = [], [], []
    error = overlap = 0.0
    products = 0
    for probe in range(probes):
        krylov = lanczos(product, rademacher(seed, probe, size), steps)
        values, shares = krylov.quadrature()
        first, second = krylov.moments
        if second > 0:
            error = max(
                error,
                abs(float(shares @ values) - first) / second**0.5,
                abs(float(shares @ values**2) / second - 1) if len(values) > 1 else 0.0,
            )
        overlap = max(overlap, krylov.overlap)
        products += len(values)
        nodes.append(values)
        weights.append(shares)
        owner.append(np.full(len(values), probe))
        del krylov  # its basis is as large as the next one
        report(probe + 1, probes)
    return Density(
        np.concatenate(nodes),
        np.concatenate(weights),
        np.concatenate(owner),
        size,
        error,
        overlap,
        products,
    )


def density(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    probes: int = 4,
    steps: int = 40,
    report: ProgressCallback = quiet,
) -> Density:
    """Spectral density of the Hessian of the mean token loss; see :func:`quadrature`.

    Args:
        model: in evaluation mode.
        batches: the texts.
        parameters: see :class:`workbench.sharpness.curvature.Curvature`.
        seed: of the probes.
        probes: starting vectors.
        steps: Hessian-vector products per probe; ``steps`` float64 copies of the parameters are
            held in memory.
        report: called after every probe.
    """
    operator = Curvature(model, batches, parameters)
    try:
        return quadrature(
            operator.product, operator.size, seed=seed, probes=probes, steps=steps, report=report
        )
    finally:
        operator.release()
