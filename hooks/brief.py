"""Representations that fit on a screen, whatever a result holds."""

from __future__ import annotations

import reprlib
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

Class = TypeVar("Class", bound=type)


class _Brief(reprlib.Repr):
    """Containers by their first items, strings by both ends, arrays and tensors by shape and type,
    modules by their number of parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = 3
        self.maxdict = 4
        self.maxstring = self.maxother = 200

    def repr1(self, x: Any, level: int) -> str:
        name = type(x).__name__
        if isinstance(x, torch.Tensor | np.ndarray):
            return f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        if isinstance(x, nn.Module):
            return f"{name} of {sum(p.numel() for p in x.parameters()):,} parameters"
        if hasattr(x, "columns") and hasattr(x, "shape"):
            return f"{name} {x.shape[0]} rows x {x.shape[1]} columns"
        if isinstance(x, dict | list | tuple | set | frozenset) and len(x) > self.maxdict:
            return super().repr1(x, level) + f" ({len(x):,} in all)"
        if is_dataclass(x) and not isinstance(x, type):
            if not _is_brief(type(x)) and _own_repr(type(x)):
                return repr(x)
            return self.repr_fields(x, level)
        return super().repr1(x, level)

    def repr_fields(self, x: Any, level: int) -> str:
        if level <= 0:
            return f"{type(x).__name__}(...)"
        shown = (
            f"{f.name}={self.repr1(getattr(x, f.name), level - 1)}" for f in fields(x) if f.repr
        )
        return f"{type(x).__name__}({', '.join(shown)})"


_BRIEF = _Brief()


def _is_brief(kind: type) -> bool:
    return kind.__repr__.__name__ == _short.__name__


def _own_repr(kind: type) -> bool:
    """Whether somebody wrote this dataclass a representation (a generated one is wrapped)."""
    return not hasattr(kind.__repr__, "__wrapped__")


def _short(self: Any) -> str:
    return _BRIEF.repr_fields(self, _BRIEF.maxlevel)


def brief(kind: Class) -> Class:
    """Give a dataclass a representation that names every field and stays short.

    >>> from dataclasses import dataclass
    >>> @brief
    ... @dataclass(frozen=True)
    ... class Rows:
    ...     values: tuple[int, ...]
    >>> Rows(tuple(range(1000)))
    Rows(values=(0, 1, 2, ...) (1,000 in all))
    """
    kind.__repr__ = _short  # type: ignore[assignment, method-assign]
    return kind
