"""A collapsed update behind any objective and any optimiser, also inside a Hugging Face
``Trainer``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.subspaces.collapse import Collapse, CollapseKind, check_kind, find_collapse

if TYPE_CHECKING:
    from jaxtyping import Float

_LEFT = 1e-5  # of the length of a gradient: less than that is the rounding of float32, no update


class CollapsedUpdate:
    """Leave the common directions of activations and output gradients out of every weight update of
    some modules.

    >>> collapse = CollapsedUpdate(model, "model.layers.*.mlp.*_proj")      # doctest: +SKIP
    >>> collapse.find(loss, forget_batches)                                 # doctest: +SKIP
    >>> collapse.attach(trainer.create_optimizer())                         # doctest: +SKIP

    The map acts on the finished weight gradients right before the optimiser's step, so it works
    with gradient accumulation and clipping, and with any loss. Parameters of other modules, and
    biases, are left to the optimiser as they are.

    Args:
        model: a model of linear layers (``nn.Linear``, or GPT-2's ``Conv1D``).
        modules: patterns of module paths.
        activation_components: directions of the inputs to leave alone, the mean direction among
            them; 0 leaves that side alone. CIR's default.
        gradient_components: directions of the output gradients, likewise.
        kind: hard, soft or quadratic, see :func:`workbench.subspaces.collapse.removed_shares`.
        length: give all collapsed gradients together this Euclidean length; with plain SGD at rate
            1 that is the length of the step. ``None`` leaves the length as it is.

    Raises:
        WorkbenchError: a pattern matches no linear layer, or ``kind`` is none of the three.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: str | Iterable[str],
        *,
        activation_components: int = 24,
        gradient_components: int = 36,
        kind: CollapseKind = "hard",
        length: float | None = None,
    ) -> None:
        check_kind(kind)
        self.model = model
        self.modules = linear_modules(model, modules)
        self.activation_components = activation_components
        self.gradient_components = gradient_components
        self.kind: CollapseKind = kind
        self.length = length
        self.maps: dict[str, Collapse] = {}

    def find(
        self, loss: Callable[[Batch], Float[Tensor, ""]], batches: Iterable[Batch]
    ) -> CollapsedUpdate:
        """Find the directions in one pass over ``batches`` at the current weights; ``loss`` gives
        the gradient side.

        Raises:
            WorkbenchError: there is no batch.
        """
        self.maps = find_collapse(
            self.model,
            self.modules,
            loss,
            batches,
            activation_components=self.activation_components,
            gradient_components=self.gradient_components,
            kind=self.kind,
        )
        return self

    @torch.no_grad()
    def apply(self) -> float:
        """Map the weight gradients that are there now, in place; done by :meth:`attach` before
        every step.

        Returns:
            The Euclidean length of the collapsed gradients before ``length`` is applied.

        Raises:
            WorkbenchError: :meth:`find` has not run, a weight is frozen or has no gradient, or the
                collapse leaves nothing of a gradient.
        """
        if not self.maps:
            raise WorkbenchError(
                "a collapsed update needs its directions first: call find(loss, batches)"
            )
        gradients = []
        for path in self.modules:
            layer = self.model.get_submodule(path)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            if weight.grad is None:
                raise WorkbenchError(self._no_gradient(path, weight))
            weight.grad.copy_(collapse_of(layer, self.maps[f"{path}.weight"], weight.grad, path))
            gradients.append(weight.grad)
        length = float(
            sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        )
        if self.length is not None and length > 0:
            for gradient in gradients:
                gradient.mul_(self.length / length)
        return length

    def _no_gradient(self, path: str, weight: Tensor) -> str:
        if weight.requires_grad:
            return f"{path}.weight has no gradient: run backward() before the collapse"
        near = [
            name
            for name in linear_modules(self.model, "*")
            if name.startswith(path.removesuffix("base_layer"))
            and self.model.get_submodule(name).weight.requires_grad
        ]
        hint = f"take what trains there: {', '.join(near[:2])}" if near else "unfreeze it"
        return f"{path}.weight is frozen, so a collapse of its gradient changes nothing; {hint}"

    def attach(
        self,
        optimiser: torch.optim.Optimizer,
        *,
        refresh: Callable[[], Any] | None = None,
        every: int = 1,
    ) -> RemovableHandle:
        """Collapse before every step of ``optimiser``.

        Args:
            optimiser: any optimiser over the model's parameters; a ``Trainer``'s own, from
                ``trainer.create_optimizer()``.
            refresh: called before steps 0, ``every``, 2 ``every``, ...: usually ``lambda:
                collapse.find(loss, batches)``, since the directions move as the model changes. The
                gradients of the step are kept while it runs.
            every: see ``refresh``.

        Returns:
            A handle; ``handle.remove()`` detaches.

        Raises:
            WorkbenchError: ``every`` is not positive.
        """
        if every < 1:
            raise WorkbenchError(
                f"every is {every}; the directions can be refreshed every 1 or more steps"
            )
        steps = 0

        def before_step(_optimiser: Any, _args: Any, _kwargs: Any) -> None:
            nonlocal steps
            if refresh is not None and steps % every == 0:
                gradients_before = [
                    (parameter, parameter.grad) for parameter in self.model.parameters()
                ]
                for parameter, _ in gradients_before:
                    parameter.grad = None  # so that nothing is added to the step's own gradients
                try:
                    refresh()
                finally:
                    for parameter, gradient in gradients_before:
                        parameter.grad = gradient
            steps += 1
            self.apply()

        return optimiser.register_step_pre_hook(before_step)


def collapse_checked(
    collapse: Collapse, gradient: Float[Tensor, "d_out d_in"], path: str
) -> Float[Tensor, "d_out d_in"]:
    """``collapse(gradient)``, never silently nothing.

    Raises:
        WorkbenchError: the directions hold the whole gradient, up to rounding.
    """
    collapsed = collapse(gradient)
    before, after = float(gradient.float().norm()), float(collapsed.float().norm())
    if before > 0 and after <= _LEFT * before:
        sides = (
            f"{collapse.activation.shape[1]} activation and {collapse.gradient.shape[1]} gradient "
            "directions"
        )
        raise WorkbenchError(
            f"the collapse of {path} leaves nothing of its gradient: {sides} hold all of it. Take "
            "fewer components, or more tokens per step"
        )
    return collapsed


def collapse_of(
    layer: nn.Module,
    collapse: Collapse,
    gradient: Float[Tensor, "d_out d_in"] | Float[Tensor, "d_in d_out"],
    path: str,
) -> Float[Tensor, "d_out d_in"] | Float[Tensor, "d_in d_out"]:
    """:func:`collapse_checked` for the weight gradient of ``layer`` as it lies there: GPT-2's
    ``Conv1D`` keeps its weight transposed.
    """
    if isinstance(layer, Conv1D):
        return collapse_checked(collapse, gradient.T, path).T
    return collapse_checked(collapse, gradient, path)


def linear_modules(model: PreTrainedModel, patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Paths of the linear layers (``nn.Linear`` or ``Conv1D``) that ``patterns`` name, in the order
    of the model.

    Raises:
        WorkbenchError: a pattern matches none.
    """
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    wanted_patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted_patterns:
        if not fnmatch.filter(linear, pattern):
            raise WorkbenchError(
                f"no linear layer matches {pattern!r}; the first of this model are "
                f"{', '.join(linear[:3])}"
            )
    return tuple(
        name
        for name in linear
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted_patterns)
    )
