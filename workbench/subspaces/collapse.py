"""Collapsed updates: remove the directions that activations and output gradients share from a weight gradient.

A linear layer's weight gradient is ``dW = sum_t g_t a_t'`` over tokens. Collapsing every activation ``a_t`` and every output gradient ``g_t`` first is the
same as one two-sided map of the finished gradient,

    dW  <-  (I - Qg Qg') dW (I - Qa Qa'),

so it works behind any objective and any optimiser and needs no stored activations for the step (Sondej and Yang 2025, arXiv 2509.11816, in an
orthonormal form: the released code projects out the mean and the components one after another, which is no projector).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hooks import Capture, MomentsOf, gradients_only, resolve, without_first
from workbench.data.batches import Batch
from workbench.subspaces.subspace import Subspace, principal_subspace


def collapse_basis(subspace: Subspace, components: int) -> Tensor:
    """One orthonormal basis of the mean direction and the top ``components - 1`` principal directions.

    Args:
        subspace: of activations or of output gradients.
        components: number of directions, the mean direction among them; 0 collapses nothing.

    Returns:
        ``[width, k]`` float32 with ``k <= components``: directions without variance, and a mean inside the others, add no column.
    """
    width = subspace.width
    if components <= 0:
        return torch.zeros(width, 0)
    columns = [subspace.mean.double()[:, None], subspace.basis[:, : components - 1].double()]
    stacked = torch.cat([column / column.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny) for column in columns], dim=1)
    left, singular, _ = torch.linalg.svd(stacked, full_matrices=False)
    return left[:, singular > 1e-6].float().contiguous()


def collapse_rows(rows: Tensor, basis: Tensor) -> Tensor:
    """``rows - rows Q Q'``: remove the directions ``basis`` ``[width, k]`` from every row ``[row, width]``."""
    return rows - (rows @ basis) @ basis.T


@dataclass(frozen=True, slots=True)
class Collapse:
    """The two bases of one weight.

    Attributes:
        activation: ``[in, k]`` orthonormal, directions of the layer's inputs to leave alone.
        gradient: ``[out, m]`` orthonormal, directions of its output gradients to leave alone.
    """

    activation: Tensor
    gradient: Tensor

    def __call__(self, weight_gradient: Tensor) -> Tensor:
        """The collapsed gradient, same shape ``[out, in]`` and dtype, computed in float32."""
        half = collapse_rows(weight_gradient.float(), self.activation)
        return collapse_rows(half.T, self.gradient).T.to(weight_gradient.dtype)


UpdateMap = Mapping[str, Collapse]
"""Parameter name -> collapse."""


def linear_weights(model: PreTrainedModel, patterns: Iterable[str]) -> tuple[str, ...]:
    """Names of the linear layers that ``patterns`` name (module paths with wildcards)."""
    return tuple(site.path for site in resolve(model, [f"{pattern}:in" for pattern in patterns]) if isinstance(model.get_submodule(site.path), torch.nn.Linear))


def find_collapse(
    model: PreTrainedModel,
    modules: Iterable[str],
    loss: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    activation_components: int,
    gradient_components: int,
) -> dict[str, Collapse]:
    """One pass over ``batches`` that finds the bases of every module in ``modules``.

    Args:
        model: the model that ``loss`` runs.
        modules: paths of linear layers.
        loss: batch to scalar; its gradients at the outputs are the gradient side.
        batches: statistics use the content tokens (no padding, no BOS).
        activation_components: directions per activation side, mean included.
        gradient_components: directions per gradient side, mean included.
    """
    paths = tuple(modules)
    inputs = resolve(model, [f"{path}:in" for path in paths])
    outputs = resolve(model, [f"{path}:grad_out" for path in paths])
    moments = MomentsOf()
    with gradients_only(model), Capture(model, (*inputs, *outputs), moments, at=without_first):
        for batch in batches:
            loss(batch).backward()
    found = {}
    for path in paths:
        activation = principal_subspace(moments[f"{path}:in"], activation_components, site=f"{path}:in")
        gradient = principal_subspace(moments[f"{path}:grad_out"], gradient_components, site=f"{path}:grad_out")
        found[f"{path}.weight"] = Collapse(collapse_basis(activation, activation_components), collapse_basis(gradient, gradient_components))
    return found


@contextmanager
def only_tokens(model: PreTrainedModel, modules: Iterable[str], mask: Tensor) -> Iterator[None]:
    """Zero the output gradient of ``modules`` at the positions where ``mask`` ``[batch, position]`` is false, so that only the others enter ``dW``.

    BOS attends to nothing but itself, so excluding it changes no other token's gradient.
    """

    def hook(_module: torch.nn.Module, _args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * mask[..., None].to(gradient.dtype))

    handles = [model.get_submodule(path).register_forward_hook(hook) for path in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
