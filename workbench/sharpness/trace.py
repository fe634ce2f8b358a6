"""Traces by random probes: of the Hessian, of its diagonal blocks, and of the products of weights
and Hessian that make relative flatness.

The sum of all eigenvalues is an average: it is small at a saddle whose two ends are large, and says
nothing about either end (:mod:`workbench.sharpness.curvature`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.progress import ProgressCallback, quiet
from workbench.sharpness.curvature import Curvature
from workbench.sharpness.krylov import Product, Vector

if TYPE_CHECKING:
    from jaxtyping import Float64


def rademacher(seed: int, probe: int, size: int) -> Vector:
    """``[size]`` independent signs; a seed and a number of a probe mean the same signs whatever was
    drawn before, so that two models share their probes.
    """
    return np.random.default_rng([seed, probe]).integers(0, 2, size).astype(np.float64) * 2 - 1


def _mean(samples: Float64[np.ndarray, " probes"]) -> tuple[float, float]:
    """Mean and standard error of samples; one sample has no error."""
    error = float(samples.std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else float("nan")
    return float(samples.mean()), error


@dataclass(frozen=True, slots=True)
class Trace:
    """Hutchinson's estimate of a trace and its probes.

    Attributes:
        samples: ``z_b . (H z)_b``: every entry is an unbiased estimate of the trace of a diagonal
            block.
        squares: ``||H z||^2``: unbiased estimates of the squared Frobenius norm.
        blocks: block name -> its number of weights.
        seed: of the probes.
    """

    samples: Float64[np.ndarray, "probes blocks"]
    squares: Float64[np.ndarray, " probes"]
    blocks: Mapping[str, int]
    seed: int

    @property
    def n(self) -> int:
        """Probes, which are also the Hessian-vector products spent."""
        return len(self.samples)

    @property
    def value(self) -> float:
        """The trace: the sum of all eigenvalues, nats per token per squared unit of weight."""
        return _mean(self.samples.sum(1))[0]

    @property
    def se(self) -> float:
        """Standard error of :attr:`value`; NaN for one probe."""
        return _mean(self.samples.sum(1))[1]

    @property
    def frobenius_squared(self) -> tuple[float, float]:
        """The sum of the squared eigenvalues, and its standard error."""
        return _mean(self.squares)

    def by_block(self) -> pd.DataFrame:
        """One row per block: ``block``, ``weights``, ``trace``, ``se`` and ``mean_eigenvalue``; the
        traces add up to :attr:`value`.
        """
        rows = []
        for (name, weights), samples in zip(self.blocks.items(), self.samples.T, strict=True):
            trace, error = _mean(samples)
            rows.append(
                {
                    "block": name,
                    "weights": weights,
                    "trace": trace,
                    "se": error,
                    "mean_eigenvalue": trace / weights,
                }
            )
        return pd.DataFrame(rows, columns=["block", "weights", "trace", "se", "mean_eigenvalue"])

    def __repr__(self) -> str:
        return f"Trace({self.value:.4g} ± {self.se:.2g} standard error, {self.n} probes)"

    def _repr_html_(self) -> str:
        return self.by_block().to_html(escape=True, index=False)


def hutchinson(
    product: Product,
    blocks: Mapping[str, slice],
    *,
    seed: int = 0,
    relative_se: float = 0.05,
    min_probes: int = 10,
    max_products: int = 100,
    report: ProgressCallback = quiet,
) -> Trace:
    """Trace of a symmetric matrix from products with random signs (Hutchinson 1990): ``E z' H z =
    tr H``; one product per probe.

    The variance of a probe is ``2 (||H||_F^2 - sum_i H_ii^2)``: a diagonal matrix is exact with one
    probe. A block costs nothing more, because ``E z_b . (H z)_b = tr H_bb``; what the other blocks
    add to it has mean zero, and its spread is in the standard error.

    The probes stop at the first standard error below ``relative_se * |estimate|`` after at least
    ``min_probes``. Stopping at a statistic of the same probes favours runs whose estimate is far
    from zero and whose spread happens to be small. For Gaussian probes of relative spread 0.38 and
    a target of 0.05, two standard errors then cover the truth in 93.5 % instead of 95.4 % of the
    runs and the estimate is 0.6 % too large with ``min_probes`` 10 (89 % and 1.2 % with 3).
    ``relative_se=0`` has no such bias: it always takes ``max_products``.

    Args:
        product: the matrix.
        blocks: name -> part of the vector; together they must be the whole vector.
        seed: of the probes; the same seed gives two matrices of one size the same probes
            (:func:`paired_difference`).
        relative_se: the target.
        min_probes: at least 2.
        max_products: probes at most.
        report: called after every probe.

    Raises:
        WorkbenchError: limits that contradict one another, or a product that is not finite.
    """
    if max_products != 1 and not 2 <= min_probes <= max_products:
        raise WorkbenchError(
            f"min_probes is {min_probes} and max_products {max_products}; a standard error needs 2 "
            "<= min_probes <= max_products"
        )
    size = sum(part.stop - part.start for part in blocks.values())
    samples, squares = np.empty((max_products, len(blocks))), np.empty(max_products)
    for probe in range(max_products):
        signs = rademacher(seed, probe, size)
        image = _finite(product(signs))
        samples[probe] = [signs[part] @ image[part] for part in blocks.values()]
        squares[probe] = image @ image
        probes_taken = probe + 1
        mean, error = _mean(samples[:probes_taken].sum(1))
        enough = probes_taken >= min_probes and relative_se > 0 and error <= relative_se * abs(mean)
        report(max_products if enough else probes_taken, max_products)
        if enough:
            break
    return Trace(
        samples[:probes_taken],
        squares[:probes_taken],
        {name: part.stop - part.start for name, part in blocks.items()},
        seed,
    )


def _finite(image: Vector) -> Vector:
    if not np.isfinite(image).all():
        raise WorkbenchError(
            "a Hessian-vector product is not finite; are the weights in float32 and the loss "
            "finite?"
        )
    return image


def trace(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    relative_se: float = 0.05,
    min_probes: int = 10,
    max_products: int = 100,
    report: ProgressCallback = quiet,
) -> Trace:
    """Trace of the Hessian of the mean token loss, with the part of every parameter; see
    :func:`hutchinson`.

    Args:
        model: in evaluation mode.
        batches: the texts.
        parameters: see :class:`workbench.sharpness.curvature.Curvature`.
        seed: of the probes.
        relative_se: stop at this standard error, relative to the estimate.
        min_probes: not before this many probes.
        max_products: Hessian-vector products at most.
        report: called after every probe.
    """
    operator = Curvature(model, batches, parameters)
    try:
        return hutchinson(
            operator.product,
            operator.blocks,
            seed=seed,
            relative_se=relative_se,
            min_probes=min_probes,
            max_products=max_products,
            report=report,
        )
    finally:
        operator.release()


def paired_difference(one: Trace, other: Trace) -> tuple[float, float, int]:
    """``tr H_one - tr H_other`` over the probes that both took: value, standard error, number of
    pairs.

    Two models that differ little share most of the noise of a probe, so their difference is far
    better known than either trace.

    Raises:
        WorkbenchError: the probes are not the same.
    """
    if one.seed != other.seed or dict(one.blocks) != dict(other.blocks):
        raise WorkbenchError(
            "the traces do not share their probes; estimate both with the same seed and the same "
            "parameters"
        )
    n = min(one.n, other.n)
    value, error = _mean(one.samples[:n].sum(1) - other.samples[:n].sum(1))
    return value, error, n


def relative_flatness(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    probes: int = 20,
    report: ProgressCallback = quiet,
) -> pd.DataFrame:
    """Relative flatness of linear layers: ``kappa = sum_{s, s'} <w_s, w_s'> tr H_{s s'}`` over the
    rows (output units) of a layer (Petzka et al. 2021, arXiv 2001.00939, definition 3).

    That is ``tr[(W' (x) I) H (W (x) I)]``, estimated as ``E <W U, H[W U]>`` with a matrix ``U``
    ``[d_in d_in]`` of random signs: one product per probe for all layers at once. A change of a
    layer's output basis that the next layer undoes leaves its kappa alone; one of its input basis
    does not.

    Args:
        model: in evaluation mode.
        batches: the texts.
        parameters: patterns; of what they fit, the weights of ``nn.Linear`` modules count (a head
            that is tied to the embedding does not).
        seed: of the probes.
        probes: Hessian-vector products, at least 2.
        report: called after every probe.

    Returns:
        ``layer``, ``kappa`` (nats per token), ``se``, ``n``.

    Raises:
        WorkbenchError: no linear layer among the parameters, fewer than two probes, or a product
            that is not finite.
    """
    if probes < 2:
        raise WorkbenchError(f"probes is {probes}; a standard error needs at least 2")
    operator = Curvature(model, batches, parameters)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    linear = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)
    } - embeddings
    layers = {
        name: weight.detach().double().cpu().numpy()
        for name, weight in zip(operator.names, operator.parameters, strict=True)
        if id(weight) in linear
    }
    if not layers:
        raise WorkbenchError(
            f"none of the parameters {', '.join(operator.names[:5])} is the weight of a linear "
            "layer"
        )
    samples = []
    for probe in range(probes):
        direction = np.zeros(operator.size)
        for number, (name, weight) in enumerate(layers.items()):
            width = weight.shape[1]
            signs = (
                np.random.default_rng([seed, probe, number]).integers(0, 2, (width, width)) * 2.0
                - 1
            )
            direction[operator.blocks[name]] = (weight @ signs).ravel()
        image = _finite(operator.product(direction))
        samples.append(
            [
                float(direction[operator.blocks[name]] @ image[operator.blocks[name]])
                for name in layers
            ]
        )
        report(probe + 1, probes)
    operator.release()
    rows = [
        {"layer": name, **dict(zip(("kappa", "se"), _mean(column), strict=True)), "n": probes}
        for name, column in zip(layers, np.array(samples).T, strict=True)
    ]
    return pd.DataFrame(rows, columns=["layer", "kappa", "se", "n"])
