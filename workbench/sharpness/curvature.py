"""Hessian-vector products and the two ends of the spectrum of a language-model loss.

The loss is the token mean over *all* batches: sums are accumulated and divided once, so that the
Hessian does not depend on how the texts are split. The forward runs under PyTorch's MATH attention,
the only built-in kernel with a second derivative.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError, unknown
from workbench.evaluation.losses import token_nll
from workbench.hooks.brief import brief
from workbench.sharpness.krylov import lanczos

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

_BASIS = 16
"""Vectors of the weights' size, in float64, that the search for one end may hold."""


def loss_sum(model: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """Summed negative log-likelihood of the target tokens, with a graph that can be differentiated
    twice.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return token_nll(model, batch, whole=False).sum()


def chosen_parameters(
    model: PreTrainedModel, patterns: Sequence[str] = ("*",)
) -> dict[str, Tensor]:
    """The trainable parameters whose names fit any of ``patterns`` (fnmatch), in the model's order.

    A tied tensor comes once, under its first name, and is found under each of its names.

    Raises:
        WorkbenchError: a pattern that fits no trainable parameter.
    """
    everything = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    ]
    for pattern in patterns if everything else ():
        if not fnmatch.filter([name for name, _ in everything], pattern):
            raise unknown("trainable parameter", pattern, [name for name, _ in everything])
    wanted = {
        id(parameter)
        for name, parameter in everything
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    return {
        name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted
    }


class Curvature:
    """The Hessian of the mean token loss over ``batches``, as an operator on flat float64 vectors.

    With one batch the graph of the gradient is kept, and a product costs one backward pass (about
    two gradients); with several it is rebuilt batch by batch (about three).

    Args:
        model: evaluated as it is; dropout must be off.
        batches: the texts.
        parameters: fnmatch patterns of parameter names; the operator is the diagonal block of the
            Hessian that belongs to these parameters (a tied tensor comes once).

    Attributes:
        names: the parameters, in the order of the flat vector.
        blocks: parameter name -> its part of the flat vector.
        size: length of the flat vector.
        products: Hessian-vector products taken so far.

    Raises:
        WorkbenchError: the model is in training mode, no parameter is trainable, a pattern fits no
            parameter, or the loss is not finite.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Batch], parameters: Sequence[str] = ("*",)
    ) -> None:
        if model.training:
            raise WorkbenchError(
                "the Hessian of a model with dropout on is random; call model.eval() first"
            )
        self.model, self.batches = model, list(batches)
        named_parameters = chosen_parameters(model, parameters)
        self.names, self.parameters = list(named_parameters), list(named_parameters.values())
        if not self.parameters or not self.batches:
            raise WorkbenchError("the Hessian needs at least one trainable parameter and one batch")
        self.tokens = sum(int(batch.target_mask[:, 1:].sum()) for batch in self.batches)
        ends = np.cumsum([0, *(parameter.numel() for parameter in self.parameters)]).tolist()
        self.size: int = ends[-1]
        self.blocks = {
            name: slice(start, end)
            for name, start, end in zip(self.names, ends, ends[1:], strict=False)
        }
        self.products = 0
        self._gradient_graph = self._gradients(self.batches[0]) if len(self.batches) == 1 else None
        if not np.isfinite(self.gradient()).all():
            raise WorkbenchError(
                "the gradient of the loss is not finite, so there is no Hessian here"
            )

    def _gradients(self, batch: Batch) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            loss_sum(self.model, batch), self.parameters, create_graph=True, materialize_grads=True
        )

    def flat(self, tensors: Sequence[Tensor]) -> Float64[np.ndarray, " size"]:
        """Parameter-shaped tensors as one float64 vector."""
        return torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors]).numpy()

    def unflat(self, vector: Float[np.ndarray, " size"]) -> list[Tensor]:
        """One vector as tensors of the parameters' shapes, dtypes and devices."""
        flat = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64).reshape(-1))
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [
            part.view_as(parameter).to(parameter)
            for part, parameter in zip(parts, self.parameters, strict=True)
        ]

    def gradient(self) -> Float64[np.ndarray, " size"]:
        """The gradient of the mean token loss."""
        if self._gradient_graph is not None:
            return self.flat(self._gradient_graph) / self.tokens
        total = np.zeros(self.size)
        for batch in self.batches:
            total += self.flat(
                torch.autograd.grad(
                    loss_sum(self.model, batch), self.parameters, materialize_grads=True
                )
            )
        return total / self.tokens

    def product(self, vector: Float[np.ndarray, " size"]) -> Float64[np.ndarray, " size"]:
        """The Hessian times ``vector``."""
        direction = self.unflat(vector)
        self.products += 1
        total = np.zeros(self.size)
        for batch in self.batches:
            gradients = (
                self._gradient_graph if self._gradient_graph is not None else self._gradients(batch)
            )
            products = torch.autograd.grad(
                gradients,
                self.parameters,
                grad_outputs=direction,
                retain_graph=self._gradient_graph is not None,
                materialize_grads=True,
            )
            total += self.flat(products)
        return total / self.tokens

    def release(self) -> None:
        """Free the kept graph."""
        self._gradient_graph = None


@dataclass(frozen=True, slots=True)
class Extremes:
    """The two ends of a Hessian's spectrum.

    Attributes:
        top: largest eigenvalue, nats per token per squared unit of weight.
        bottom: smallest (most negative) eigenvalue.
        top_residual: ``||H v - top v|| / |top|``; how well the pair solves the eigenproblem.
        bottom_residual: likewise.
        gradient_norm: Euclidean norm of the gradient.
        products: Hessian-vector products spent.
    """

    top: float
    bottom: float
    top_residual: float
    bottom_residual: float
    gradient_norm: float
    products: int


def extremes(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    tolerance: float = 1e-2,
    max_products: int = 400,
) -> Extremes:
    """Top and bottom Hessian eigenvalue of the mean token loss (implicitly restarted Lanczos of
    ARPACK, both ends at once).

    Args:
        model: in evaluation mode.
        batches: the texts.
        seed: of the starting vector.
        tolerance: ARPACK's, relative to the eigenvalue.
        max_products: the search stops with an error after about this many products.

    Raises:
        WorkbenchError: not converged within ``max_products``.
    """
    operator = Curvature(model, batches)
    ends = _both_ends(operator, 1, seed, tolerance, max_products)
    result = Extremes(
        float(ends.top[0]),
        float(ends.bottom[0]),
        float(ends.top_residuals[0]),
        float(ends.bottom_residuals[0]),
        float(np.linalg.norm(operator.gradient())),
        ends.products,
    )
    operator.release()
    return result


@dataclass(frozen=True, slots=True)
class OuterEigenvalue:
    """One end of a Hessian's spectrum.

    Attributes:
        value: the eigenvalue, nats per token per squared unit of weight.
        residual: ``||H v - value v|| / |value|``.
        products: Hessian-vector products spent.
    """

    value: float
    residual: float
    products: int


def outer_eigenvalue(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    end: Literal["top", "bottom"] = "top",
    *,
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    tolerance: float = 1e-3,
    max_products: int = 400,
) -> OuterEigenvalue:
    """The largest or the smallest Hessian eigenvalue alone: where one end stands apart and the
    other lies in the bulk, a tenth of the products that both ends take.

    Args:
        model: in evaluation mode.
        batches: the texts.
        end: ``top`` or ``bottom``.
        parameters: see :class:`Curvature`.
        seed: of the starting vector.
        tolerance: largest residual, relative to the eigenvalue. Some eigenvalue of the Hessian is
            at least that near; where the end stands apart, the error is of the order of the
            residual's square.
        max_products: the search stops with an error after about this many products.

    Raises:
        WorkbenchError: not converged within ``max_products``, or no such end.
    """
    if end not in ("top", "bottom"):
        raise unknown("end", end, ("top", "bottom"))
    operator = Curvature(model, batches, parameters)
    index = -1 if end == "top" else 0

    def outermost(
        alphas: np.ndarray, betas: np.ndarray, residual_norm: float
    ) -> tuple[float, np.ndarray, float]:
        values, vectors = eigh_tridiagonal(alphas, betas)
        return (
            float(values[index]),
            vectors[:, index],
            residual_norm * abs(float(vectors[-1, index])),
        )

    def solved(alphas: np.ndarray, betas: np.ndarray, residual_norm: float) -> bool:
        value, _, residual = outermost(alphas, betas, residual_norm)
        return residual <= tolerance * abs(value)

    try:
        start = np.random.default_rng(seed).standard_normal(operator.size)
        krylov = lanczos(operator.product, start, min(_BASIS, max_products), solved)
        value, vector, residual = outermost(krylov.alphas, krylov.betas, krylov.residual_norm)
        if (
            residual > tolerance * abs(value)
            # the end does not stand apart: go on from here with restarts, in the memory of as many
            # vectors
        ):
            start = vector @ krylov.basis
            del krylov
            remaining = max_products - operator.products
            if remaining <= 0:
                raise _unconverged(max_products)
            values, vectors = _solve(
                operator,
                1,
                "LA" if end == "top" else "SA",
                start,
                tolerance,
                remaining,
                min(_BASIS, operator.size),
            )
            value, residual = float(values[0]), float(_residuals(operator, values, vectors)[0])
            return OuterEigenvalue(value, residual, operator.products)
    finally:
        operator.release()
    return OuterEigenvalue(
        value, residual / abs(value) if value else float("nan"), operator.products
    )


@brief
@dataclass(frozen=True, slots=True)
class SpectrumEnds:
    """Several eigenvalues from either end of a spectrum, the outermost first.

    Attributes:
        top: largest eigenvalues, descending; nats per token per squared unit of weight.
        bottom: smallest (most negative), ascending.
        top_residuals: ``||H v - value v|| / |value|``. A large one says that the pair does not
            solve the eigenproblem, or that the eigenvalue is zero.
        bottom_residuals: likewise.
        products: Hessian-vector products spent.
    """

    top: Float64[np.ndarray, " k"]
    bottom: Float64[np.ndarray, " k"]
    top_residuals: Float64[np.ndarray, " k"]
    bottom_residuals: Float64[np.ndarray, " k"]
    products: int


def spectrum_ends(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    k: int,
    *,
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    tolerance: float = 1e-2,
    max_products: int = 1000,
) -> SpectrumEnds:
    """The ``k`` largest and the ``k`` smallest Hessian eigenvalues of the mean token loss
    (implicitly restarted Lanczos of ARPACK, both ends at once).

    "Largest in magnitude" would mix the two ends: at an unlearned point the forget loss has large
    eigenvalues of either sign.

    Args:
        model: in evaluation mode.
        batches: the texts.
        k: eigenvalues from each end.
        parameters: see :class:`Curvature`.
        seed: of the starting vector.
        tolerance: ARPACK's, relative to the eigenvalue.
        max_products: the search stops with an error after about this many products.

    Raises:
        WorkbenchError: ``k`` is not from 1 to half the number of weights, or not converged within
            ``max_products``.
    """
    operator = Curvature(model, batches, parameters)
    ends = _both_ends(operator, k, seed, tolerance, max_products)
    operator.release()
    return ends


def _both_ends(
    operator: Curvature, k: int, seed: int, tolerance: float, max_products: int
) -> SpectrumEnds:
    if not 1 <= k <= (operator.size - 1) // 2:
        raise WorkbenchError(
            f"k is {k}; {operator.size} weights have 1 to {(operator.size - 1) // 2} eigenvalues "
            "from each end"
        )
    start = np.random.default_rng(seed).standard_normal(operator.size)
    values, vectors = _solve(
        operator,
        2 * k,
        "BE",
        start,
        tolerance,
        max_products,
        min(max(10, 4 * k + 2), operator.size),
    )
    residuals = _residuals(operator, values, vectors)
    return SpectrumEnds(
        values[: -k - 1 : -1],
        values[:k],
        residuals[: -k - 1 : -1],
        residuals[:k],
        operator.products,
    )


def _solve(
    operator: Curvature,
    wanted: int,
    which: str,
    start: np.ndarray,
    tolerance: float,
    max_products: int,
    basis: int,
) -> tuple[np.ndarray, np.ndarray]:
    """``wanted`` eigenvalues, ascending, and their vectors."""
    linear = LinearOperator(
        (operator.size, operator.size), matvec=operator.product, dtype=np.float64
    )
    rounds = max(
        1, max_products // (basis - wanted)
    )  # a restart keeps the wanted vectors and renews the others
    try:
        values, vectors = eigsh(
            linear, k=wanted, which=which, v0=start, tol=tolerance, ncv=basis, maxiter=rounds
        )
    except ArpackError as error:
        raise _unconverged(max_products) from error
    order = np.argsort(values)
    return values[order], vectors[:, order]


def _unconverged(max_products: int) -> WorkbenchError:
    return WorkbenchError(
        f"the Hessian's extreme eigenvalues did not converge within {max_products} products; raise "
        "max_products or tolerance"
    )


def _residuals(operator: Curvature, values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.array(
            [
                np.linalg.norm(operator.product(vectors[:, i]) - values[i] * vectors[:, i])
                / abs(values[i])
                for i in range(len(values))
            ]
        )
