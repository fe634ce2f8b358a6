"""What all step rules share: the plain rule, weights that move and come back, gradients by
parameter name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.unlearning.objectives import Objective, Pair

StepRule = Callable[[PreTrainedModel, Objective, Pair, PreTrainedModel], dict[str, float]]
"""``(model, objective, pair, reference)``: adds the gradient to ``parameter.grad`` and returns what
to log.

A rule that draws random numbers has an attribute ``restart``, a function that begins their stream
again: call it before a new training.
"""

Gradient = dict[str, Tensor]
"""Parameter name to gradient; parameters that a term does not depend on are absent."""

Parameters = Mapping[str, Parameter]
Term = Callable[[], Float[Tensor, ""]]
"""The forget term (scalar) at the weights that the model has when it is called."""

Smoother = Callable[[Term, Parameters], tuple[Gradient, dict[str, float]]]
"""``(term, trainable parameters)`` to the gradient that takes the place of the forget term's, and
what to log: ``forget`` (its value at the present weights) and more.
"""


def plain(
    model: PreTrainedModel, objective: Objective, pair: Pair, reference: PreTrainedModel
) -> dict[str, float]:
    """The gradient of the whole objective at the current weights."""
    forget = objective.forget_term(model, pair, reference)
    forget.backward()
    retain = objective.retain_term(model, pair, reference)
    if retain is not None:
        retain.backward()
    return {
        "forget": float(forget.detach()),
        "retain": float(retain.detach()) if retain is not None else 0.0,
    }


def on_forget_term(smooth: Smoother) -> StepRule:
    """The step rule that treats the forget term with ``smooth`` and the retain term plainly, at the
    present weights and in the model's own precision.

    The two gradients are added to ``parameter.grad`` at the end, so that a step that raises, or is
    interrupted in a pass, leaves weights and gradients as they were. Accumulated over parts of a
    batch, the sum is that of the parts' steps: every part has its own perturbation and its own
    penalty.
    """

    def step(
        model: PreTrainedModel, objective: Objective, pair: Pair, reference: PreTrainedModel
    ) -> dict[str, float]:
        with in_float32(model):
            gradient, log = smooth(
                lambda: objective.forget_term(model, pair, reference), _trainable(model)
            )
        retain = objective.retain_term(model, pair, reference)
        terms = [(1.0, gradient)]
        if retain is not None:
            terms.append((1.0, gradient_of(retain, _trainable(model), "retain")))
        with torch.no_grad():
            for name, value in combine(terms).items():
                parameter = model.get_parameter(name)
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter).copy_(value)
                else:
                    parameter.grad.add_(value)
        return {
            "forget": log["forget"],
            "retain": float(retain.detach()) if retain is not None else 0.0,
            **log,
        }

    return step


def _trainable(model: PreTrainedModel) -> dict[str, Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Run the model in float32 for the duration of the block, whatever its weights are kept in;
    float32 and float64 weights are not touched.

    A perturbation is orders of magnitude smaller than the weights. In bfloat16 it would be rounded
    away: from the weights themselves, or under autocast from the copies of them that enter the
    products (autocast moreover keeps the copies it made of the unperturbed weights). So
    half-precision weights are replaced by float32 copies, autocast is off, and the original tensors
    are put back at the end. TF32 products round likewise; PyTorch leaves them off unless they are
    asked for.
    """
    device = next(model.parameters()).device.type
    half = [
        tensor
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    # Half-precision weights that stay as they are (below a float32 adapter) need no copy, unless
    # they rely on autocast to meet the others.
    convert = torch.is_autocast_enabled(device) or any(tensor.requires_grad for tensor in half)
    originals = [(tensor, tensor.data) for tensor in half] if convert else []
    try:
        for tensor, values in originals:
            tensor.data = values.float()
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for tensor, values in originals:
            tensor.data = values


@contextmanager
def perturbed_weights(
    parameters: Parameters, direction: Iterable[tuple[str, Tensor]], scale: float
) -> Iterator[None]:
    """Add ``scale * direction`` to the parameters for the duration of the block; they are put back
    by copy, bit by bit, not by subtraction.

    Args:
        parameters: what may move.
        direction: name and direction of each parameter that does.
        scale: factor.
    """
    originals: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, values in direction:
                originals[name] = parameters[name].detach().clone()
                parameters[name].add_(values, alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for name, values in originals.items():
                parameters[name].copy_(values)


def gradient_of(
    loss: Float[Tensor, ""], parameters: Parameters, term: str = "forget", *, graph: bool = False
) -> Gradient:
    """The gradient of ``loss``, by name; ``graph`` keeps what a second derivative needs.

    Raises:
        WorkbenchError: the loss depends on no trainable parameter.
    """
    if not loss.requires_grad:
        raise WorkbenchError(
            f"the {term} term depends on no trainable parameter; make parameters trainable that "
            "lie below what it reads"
        )
    return _named(
        parameters,
        torch.autograd.grad(loss, list(parameters.values()), create_graph=graph, allow_unused=True),
    )


def hessian_product(gradient: Gradient, direction: Gradient, parameters: Parameters) -> Gradient:
    """``H direction`` for the Hessian of the term that ``gradient`` (with its graph) is the
    gradient of; empty where the term is linear.
    """
    names = [name for name, value in gradient.items() if value.requires_grad and name in direction]
    if not names:
        return {}
    products = torch.autograd.grad(
        [gradient[name] for name in names],
        list(parameters.values()),
        [direction[name] for name in names],
        allow_unused=True,
    )
    return _named(parameters, products)


def _named(parameters: Parameters, values: Iterable[Tensor | None]) -> Gradient:
    return {
        name: value for name, value in zip(parameters, values, strict=True) if value is not None
    }


@torch.no_grad()
def combine(terms: Iterable[tuple[float, Gradient]]) -> Gradient:
    """``sum of weight * gradient``, in tensors of its own."""
    total: Gradient = {}
    for weight, gradient in terms:
        for name, value in gradient.items():
            total[name] = total[name].add_(value, alpha=weight) if name in total else weight * value
    return total


def inner(first: Gradient, second: Gradient) -> float:
    """Inner product over all parameters, summed in float64."""
    return sum(
        float((value.detach().double() * second[name].detach().double()).sum())
        for name, value in first.items()
        if name in second
    )


def norm(gradient: Gradient) -> float:
    """Euclidean length over all parameters, summed in float64."""
    return inner(gradient, gradient) ** 0.5


def check_size(name: str, value: float, *, zero: bool) -> None:
    """Raise unless ``value`` is a finite number above 0, or 0 where ``zero`` allows it.

    Raises:
        ValueError: it is not.
    """
    if not (0 < value < float("inf") or (zero and value == 0)):
        raise ValueError(
            f"{name} is {value}; it must be a finite number {'of at least' if zero else 'above'} 0"
        )
