"""The one tensor of vectors among what a module was given or returns, and how to put another in its
place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from workbench.hooks.errors import CaptureError

if TYPE_CHECKING:
    from jaxtyping import Shaped

_INPUT_NAMES = (
    "hidden_states",
    "input",
    "x",
)  # the keyword under which decoder layers, linear layers and others take their vectors


def unwrap(value: Any) -> Shaped[Tensor, " *shape"]:
    """The tensor inside a module's output: the output itself, or the first tensor of a tuple.

    Raises:
        CaptureError: there is no tensor inside.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        for part in value:
            if isinstance(part, Tensor):
                return part
    raise CaptureError(
        f"a module returned {type(value).__name__}, which holds no tensor at its first level; tap "
        "one of its submodules instead"
    )


def replace_output(value: Any, tensor: Shaped[Tensor, " *shape"]) -> Any:
    """The module's output with ``tensor`` in the place of the one that :func:`unwrap` finds."""
    if isinstance(value, Tensor):
        return tensor
    parts = list(value)
    parts[next(index for index, part in enumerate(parts) if isinstance(part, Tensor))] = tensor
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shaped[Tensor, " *shape"]:
    """The hidden state that a module was called with, positionally or as ``hidden_states=``.

    Raises:
        CaptureError: the module was called with neither.
    """
    if args and isinstance(args[0], Tensor):
        return args[0]
    for name in _INPUT_NAMES:
        if isinstance(kwargs.get(name), Tensor):
            return kwargs[name]
    raise CaptureError(
        f"a module was called without a tensor (keywords: {', '.join(kwargs) or 'none'}); tap its "
        "output, or a submodule"
    )


def replace_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Shaped[Tensor, " *shape"]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with ``tensor`` in the place of the one that :func:`first_input`
    finds.
    """
    if args and isinstance(args[0], Tensor):
        return (tensor, *args[1:]), kwargs
    name = next(name for name in _INPUT_NAMES if isinstance(kwargs.get(name), Tensor))
    return args, {**kwargs, name: tensor}


def private_view(
    tensor: Shaped[Tensor, " *shape"], source: Shaped[Tensor, " *shape"], *, copy: bool = False
) -> Shaped[Tensor, " *shape"]:
    """A tensor that one module alone reads, with the values of ``tensor``; :func:`stream_of` finds
    the ``source`` that the others read.

    Args:
        tensor: the values.
        source: what the module would have read.
        copy: a real copy: a view costs nothing, but loses its gradient hook when the module
            overwrites it.
    """
    private = tensor.clone() if copy else tensor.view_as(tensor)
    private._stream = stream_of(source)  # type: ignore[attr-defined]
    return private


def stream_of(tensor: Shaped[Tensor, " *shape"]) -> Shaped[Tensor, " *shape"]:
    """The tensor that all readers share, where ``tensor`` is a private view of one of them."""
    return getattr(tensor, "_stream", tensor)
