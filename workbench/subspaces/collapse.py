"""Collapsed updates: remove the directions that activations and output gradients share from a
weight gradient.

A linear layer's weight gradient is ``dW = sum_t g_t a_t'`` over tokens. Collapsing every activation
``a_t`` and every output gradient ``g_t`` first is the same as one two-sided map of the finished
gradient,

    dW  <-  (I - Qg Qg') dW (I - Qa Qa'),

so it works behind any objective and any optimiser and needs no stored activations for the step
(Sondej and Yang 2025, arXiv 2509.11816, in an orthonormal form: the released code projects out the
mean and the components one after another, which is no projector).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError, unknown
from workbench.evaluation.losses import Weight, weight_of
from workbench.hooks import Capture, Rows, Site, gradients_only, resolve
from workbench.hooks.tensors import unwrap
from workbench.subspaces.finders import SketchPCA, StreamingPCA
from workbench.subspaces.subspace import Subspace

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32


def collapse_basis(subspace: Subspace, components: int) -> Float32[Tensor, "width k"]:
    """One orthonormal basis of the mean direction and the top ``components - 1`` principal
    directions.

    Args:
        subspace: of activations or of output gradients.
        components: number of directions, the mean direction among them; 0 collapses nothing.

    Returns:
        A float32 basis with ``k <= components``: directions without variance, and a mean inside the
        others, add no column.
    """
    width = subspace.width
    if components <= 0:
        return torch.zeros(width, 0)
    columns = [subspace.mean.double()[:, None], subspace.basis[:, : components - 1].double()]
    stacked = torch.cat(
        [
            column / column.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
            for column in columns
        ],
        dim=1,
    )
    left, singular, _ = torch.linalg.svd(stacked, full_matrices=False)
    return left[:, singular > 1e-6].float().contiguous()


def collapse_rows(
    rows: Float[Tensor, "rows width"],
    basis: Float[Tensor, "width k"],
    removed: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, "rows width"]:
    """``x - Q D Q' x`` for every row: shrink the directions ``basis`` by the shares ``removed``
    (all of it, without shares).
    """
    inside = rows @ basis
    return rows - (inside if removed is None else inside * removed) @ basis.T


CollapseKind = Literal["hard", "soft", "quadratic"]
_POWERS: dict[CollapseKind, float] = {"hard": math.inf, "soft": 1.0, "quadratic": 2.0}


def check_kind(kind: str) -> None:
    """Raise unless ``kind`` is a member of the family.

    Raises:
        WorkbenchError: it is not; the message lists the members.
    """
    if kind not in _POWERS:
        raise unknown("kind of collapse", kind, _POWERS)


def removed_shares(second_moments: Float[Tensor, " k"], kind: CollapseKind) -> Float[Tensor, " k"]:
    r"""How much of every direction a collapse removes: ``1 - (s_min / s_i)^p``, with ``s_i`` the
    root mean square of the data along it and ``s_min`` the smallest of them.

    One family (RepSelect, arXiv 2606.17168): hard (``p`` infinite) removes the directions, soft
    (``p = 1``) brings them all down to the smallest, quadratic is ``p = 2``. The released code
    divides by the smallest *kept* singular value whatever it is, so data of lower rank than asked
    for is annihilated; here a direction below 1e-3 of the largest does not count as the smallest.

    Args:
        second_moments: mean squares ``s_i^2``.
        kind: the member of the family.
    """
    if kind == "hard" or not len(second_moments):
        return torch.ones_like(second_moments)
    size = second_moments.clamp(min=0).sqrt()
    smallest = (
        size[size >= size.max() * 1e-3].min() if float(size.max()) > 0 else size.new_tensor(0.0)
    )
    return (
        1 - (smallest / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1) ** _POWERS[kind]
    )


@dataclass(frozen=True, slots=True, repr=False)
class Collapse:
    """The two sides of the map of one weight.

    Attributes:
        activation: orthonormal, directions of the layer's inputs to leave alone.
        gradient: orthonormal, directions of its output gradients to leave alone.
        activation_removed: share of each direction that is removed; all of it by default.
        gradient_removed: likewise.
        asked: directions asked for on the two sides, the mean among them; fewer are there where the
            rows had no more.
    """

    activation: Float[Tensor, "d_in k"]
    gradient: Float[Tensor, "d_out other_k"]
    activation_removed: Float[Tensor, " k"] | None = None
    gradient_removed: Float[Tensor, " other_k"] | None = None
    asked: tuple[int, int] | None = None

    def __repr__(self) -> str:
        sides = ("activation", self.activation), ("gradient", self.gradient)
        asked = self.asked or tuple(basis.shape[1] for _, basis in sides)
        words = (
            f"{f'{basis.shape[1]} of ' if basis.shape[1] < number else ''}{number} {name}"
            for (name, basis), number in zip(sides, asked, strict=True)
        )
        return f"Collapse({' and '.join(words)} directions)"

    def __call__(self, weight_gradient: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """The collapsed gradient, of the same dtype, computed in float32."""
        half = collapse_rows(weight_gradient.float(), self.activation, self.activation_removed)
        return collapse_rows(half.T, self.gradient, self.gradient_removed).T.to(
            weight_gradient.dtype
        )

    def to(self, device: torch.device | str) -> Collapse:
        """The same map on ``device``."""
        return replace(
            self,
            **{
                name: part.to(device)
                for name in ("activation", "gradient", "activation_removed", "gradient_removed")
                if (part := getattr(self, name)) is not None
            },
        )


def collapse_side(
    finder: StreamingPCA | SketchPCA, components: int, kind: CollapseKind = "hard"
) -> tuple[Float32[Tensor, "width k"], Float32[Tensor, " k"]]:
    """One side of a collapse from what a finder has seen.

    The mean direction and the top components are joined into one orthonormal basis, which is then
    turned so that the second moment of the data is diagonal in it: hard collapse does not depend on
    that, soft and quadratic collapse need a size for every direction, and the mean direction has
    none of its own.

    Args:
        finder: of activations or of output gradients.
        components: number of directions, the mean direction among them.
        kind: see :func:`removed_shares`.

    Returns:
        The basis and the shares.
    """
    subspace = finder.subspace()
    basis = collapse_basis(subspace, components).double()
    if isinstance(finder, StreamingPCA):
        inside = basis.T @ finder.moments_.covariance.cpu() @ basis
    else:
        along = basis.T @ subspace.basis.double()
        inside = along @ (subspace.eigenvalues.double()[:, None] * along.T)
    mean = basis.T @ subspace.mean.double()
    moments, rotation = torch.linalg.eigh(inside + torch.outer(mean, mean))
    return (basis @ rotation).float().contiguous(), removed_shares(moments.flip(0), kind).flip(
        0
    ).float()


UpdateMap = Mapping[str, Collapse]
"""Parameter name -> collapse."""


EXACT_WIDTH = 4096
"""Wider sites are sketched: their covariance would take more than 128 MiB in float64."""


class _Sides:
    """A consumer with one finder per site: exact where the covariance fits, a sketch where the rows
    are wide.
    """

    def __init__(self, components: Mapping[str, int]) -> None:
        self.components = components
        self.finders: dict[str, StreamingPCA | SketchPCA] = {}

    def __call__(self, site: Site, rows: Rows) -> None:
        if site.name not in self.finders:
            wide = rows.values.shape[1] > EXACT_WIDTH
            self.finders[site.name] = (SketchPCA if wide else StreamingPCA)(
                max(1, self.components[site.name])
            )
        self.finders[site.name].partial_fit(rows.values)


def find_collapse(
    model: PreTrainedModel,
    modules: Iterable[str],
    loss: Callable[[Batch], Float[Tensor, ""]],
    batches: Iterable[Batch],
    *,
    activation_components: int,
    gradient_components: int,
    kind: CollapseKind = "hard",
    weight: Weight | None = None,
) -> dict[str, Collapse]:
    """One pass over ``batches`` that finds the bases of every module in ``modules``.

    The rows are those of every content token of every batch, each counted once; tokens without
    gradient (behind the last target, say) are rows of zeros and count as well, on both sides. The
    gradient row of a token is that of the *sum* of the loss over the whole set,
    ``weight(batch) * loss(batch)``, so order, batch size and split of the texts change nothing.
    That holds for a loss whose batch value is a mean of independent terms, or a sum; one that
    normalises by a statistic of its batch must be given that statistic of the whole set (see
    :func:`workbench.unlearning.objectives.on_set`).

    Args:
        model: the model that ``loss`` runs.
        modules: paths of linear layers.
        loss: batch to scalar; its gradients at the outputs are the gradient side. A mean over the
            target tokens, unless it is marked (:func:`workbench.evaluation.losses.mean_over`) or
            ``weight`` says otherwise.
        batches: statistics use the content tokens (no padding, no BOS). From the forget set or from
            the retain set: which one is better depends on the data.
        activation_components: directions per activation side, mean included; 0 leaves that side
            alone.
        gradient_components: directions per gradient side, mean included; 0 leaves that side alone.
        kind: hard, soft or quadratic (:func:`removed_shares`).
        weight: how many equal terms ``loss`` is a mean over in a batch, for example
            :func:`~workbench.evaluation.losses.sequences`, or
            :func:`~workbench.evaluation.losses.summed` for a sum. Default: what ``loss`` is marked
            with.

    Raises:
        WorkbenchError: ``batches`` is empty.
    """
    check_kind(kind)
    paths = tuple(modules)
    counts = {f"{path}:in": activation_components for path in paths if activation_components > 0}
    counts |= {f"{path}:grad_out": gradient_components for path in paths if gradient_components > 0}
    leaders = {
        path: _leader(path, paths) for path in paths
    }  # gate and up read one tensor: its covariance is computed once
    sides = _Sides(counts)
    texts = list(batches)
    if not texts:
        raise WorkbenchError(
            "the collapse was given no batch to find its directions in; is the set empty?"
        )
    if counts:
        sites = resolve(
            model,
            [
                name
                for name in counts
                if not name.endswith(":in")
                or leaders[name.removesuffix(":in")] == name.removesuffix(":in")
            ],
        )
        terms = weight_of(loss) if weight is None else weight
        with gradients_only(model), Capture(model, sites, sides, at=texts[0].content):
            for batch in texts:
                (loss(batch) * terms(batch)).backward()
    collapses = {}
    for path in paths:
        layer = model.get_submodule(path)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        outputs, inputs = (
            weight.shape if isinstance(layer, torch.nn.Linear) else weight.T.shape
        )  # GPT-2's Conv1D keeps its weight transposed
        side = {}
        for name, width in ((f"{leaders[path]}:in", inputs), (f"{path}:grad_out", outputs)):
            side[name] = (
                collapse_side(sides.finders[name], counts[name], kind)
                if name in sides.finders
                else (torch.zeros(width, 0), torch.zeros(0))
            )
        (activation, activation_removed), (gradient, gradient_removed) = side.values()
        collapses[f"{path}.weight"] = Collapse(
            activation,
            gradient,
            activation_removed,
            gradient_removed,
            (max(0, activation_components), max(0, gradient_components)),
        ).to(weight.device)
    return collapses


def _leader(path: str, paths: tuple[str, ...]) -> str:
    """The first of ``paths`` that reads the same input as ``path``."""
    parent, _, name = path.rpartition(".")
    for group in (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")):
        if name in group:
            return next(f"{parent}.{other}" for other in group if f"{parent}.{other}" in paths)
    return path


@contextmanager
def only_tokens(
    model: PreTrainedModel, modules: Iterable[str], mask: Bool[Tensor, "batch pos"]
) -> Iterator[None]:
    """Zero the output gradient of ``modules`` at the positions where ``mask`` is false, so that
    only the others enter ``dW``.

    BOS attends to nothing but itself, so excluding it changes no other token's gradient.
    """

    def hook(_module: torch.nn.Module, _args: object, result: object) -> None:
        output = unwrap(result)
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * mask[..., None].to(gradient.dtype))

    handles = [model.get_submodule(path).register_forward_hook(hook) for path in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
