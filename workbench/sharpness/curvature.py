"""Hessian-vector products and the two ends of the spectrum of a language-model loss.

The loss is the token mean over *all* batches: sums are accumulated and divided once, so that the Hessian does not depend on how the texts are
split. The forward runs under PyTorch's MATH attention, the only built-in kernel with a second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import token_nll


def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Summed negative log-likelihood of the target tokens, with a graph that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return token_nll(model, batch).sum()


class Curvature:
    """The Hessian of the mean token loss over ``batches``, as an operator on flat float64 vectors.

    With one batch the graph of the gradient is kept, and a product costs one backward pass (about two gradients); with several it is rebuilt batch by
    batch (about three).

    Args:
        model: evaluated as it is; dropout must be off.
        batches: the texts.

    Raises:
        WorkbenchError: the model is in training mode, no parameter is trainable, or the loss is not finite.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        if model.training:
            raise WorkbenchError("the Hessian of a model with dropout on is random; call model.eval() first")
        self.model, self.batches = model, list(batches)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]  # tied tensors come once
        if not self.parameters or not self.batches:
            raise WorkbenchError("the Hessian needs at least one trainable parameter and one batch")
        self.tokens = sum(int(batch.target_mask[:, 1:].sum()) for batch in self.batches)
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.products = 0
        self._kept = self._gradients(self.batches[0]) if len(self.batches) == 1 else None
        if not np.isfinite(self.gradient()).all():
            raise WorkbenchError("the gradient of the loss is not finite, so there is no Hessian here")

    def _gradients(self, batch: Batch) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_sum(self.model, batch), self.parameters, create_graph=True, materialize_grads=True)

    def flat(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """Parameter-shaped tensors as one float64 vector ``[parameters]``."""
        return torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors]).numpy()

    def unflat(self, vector: np.ndarray) -> list[Tensor]:
        """One vector ``[parameters]`` as tensors of the parameters' shapes, dtypes and devices."""
        flat = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64).reshape(-1))
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(parameter).to(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def gradient(self) -> np.ndarray:
        """``[parameters]`` gradient of the mean token loss."""
        if self._kept is not None:
            return self.flat(self._kept) / self.tokens
        total = np.zeros(self.size)
        for batch in self.batches:
            total += self.flat(torch.autograd.grad(loss_sum(self.model, batch), self.parameters, materialize_grads=True))
        return total / self.tokens

    def product(self, vector: np.ndarray) -> np.ndarray:
        """``[parameters]`` Hessian times ``vector``."""
        direction = self.unflat(vector)
        self.products += 1
        total = np.zeros(self.size)
        for batch in self.batches:
            gradients = self._kept if self._kept is not None else self._gradients(batch)
            products = torch.autograd.grad(gradients, self.parameters, grad_outputs=direction, retain_graph=self._kept is not None, materialize_grads=True)
            total += self.flat(products)
        return total / self.tokens

    def release(self) -> None:
        """Free the kept graph."""
        self._kept = None


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


def extremes(model: PreTrainedModel, batches: Sequence[Batch], *, seed: int = 0, tolerance: float = 1e-2, max_products: int = 400) -> Extremes:
    """Top and bottom Hessian eigenvalue of the mean token loss (implicitly restarted Lanczos of ARPACK, both ends at once).

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
    start = np.random.default_rng(seed).standard_normal(operator.size)
    linear = LinearOperator((operator.size, operator.size), matvec=operator.product, dtype=np.float64)
    try:
        values, vectors = eigsh(linear, k=2, which="BE", v0=start, tol=tolerance, ncv=min(10, operator.size), maxiter=max(1, max_products // 8))
    except ArpackError as error:
        raise WorkbenchError(f"the Hessian's extreme eigenvalues did not converge within {max_products} products; raise max_products or tolerance") from error
    order = np.argsort(values)
    residuals = [float(np.linalg.norm(operator.product(vectors[:, i]) - values[i] * vectors[:, i]) / abs(values[i])) for i in order]
    result = Extremes(
        float(values[order[1]]), float(values[order[0]]), residuals[1], residuals[0], float(np.linalg.norm(operator.gradient())), operator.products
    )
    operator.release()
    return result
