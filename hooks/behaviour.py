"""What a model does with padding on the left and with packed rows, found by asking it: a tiny pass
of a copy that shares its weights and has none of its hooks. Names of architectures decide nothing.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = (
    weakref.WeakKeyDictionary()
)


def _bare(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """The same modules over the same parameters, without hooks and in evaluation mode."""
    if id(module) not in twins:
        twin = copy.copy(module)
        twins[id(module)] = twin
        twin.__dict__ = dict(module.__dict__)
        for name in _HOOKS:
            if name in twin.__dict__:
                twin.__dict__[name] = OrderedDict()
        twin.__dict__["training"] = False
        twin.__dict__["_modules"] = {
            name: None if part is None else _bare(part, twins)
            for name, part in module._modules.items()
        }
    return twins[id(module)]


@torch.no_grad()
def _logits(model: nn.Module, **inputs: Any) -> Tensor:
    output = model(**inputs)
    found: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found.float()


def _near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    # a wrong position or a token too many moves outputs by per cents and more
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max().clamp(min=1e-6))


def _ids(model: nn.Module, count: int) -> tuple[Tensor, torch.dtype]:
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.arange(count, device=weight.device)[None] * 7 + 5
    return ids % weight.shape[0], weight.dtype


def padding_may_be_left(model: nn.Module) -> bool:
    """Whether ``model`` (a causal LM) gives tokens behind padding what it gives them without, where
    no position ids are passed: rotary positions do, learned ones that count from the left edge do
    not.
    """

    def ask() -> bool:
        bare = _bare(model, {})
        ids, dtype = _ids(model, 5)
        mask = torch.tensor([[0, 0, 1, 1, 1]], device=ids.device)
        padded = _logits(bare, input_ids=ids, attention_mask=mask)[:, 2:]
        alone = _logits(bare, input_ids=ids[:, 2:], attention_mask=mask[:, 2:])
        return _near(padded, alone, dtype)

    return _once(model, ("left padding",), ask)


def packed_rows_are_apart(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether ``model`` keeps sequences that are packed into one row apart, in a pass of the kind
    of ``inputs``: with that number of rows, with a mask or without, with a cache or without.
    """
    rows = len(inputs["position_ids"])
    extra = {name: inputs[name] for name in ("use_cache",) if isinstance(inputs.get(name), bool)}
    masked = inputs.get("attention_mask") is not None

    def ask() -> bool:
        bare = _bare(model, {})
        ids, dtype = _ids(model, 6)
        ids = ids.expand(rows, -1)
        positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=ids.device).expand(rows, -1)
        mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
        packed = _logits(bare, input_ids=ids, position_ids=positions, **mask, **extra)[:, 3:]
        alone = _logits(bare, input_ids=ids[:, 3:], position_ids=positions[:, 3:])
        return _near(packed, alone, dtype)

    return _once(model, ("packed", rows > 1, masked, *extra.items()), ask)


def _once(model: nn.Module, question: tuple[Any, ...], ask: Any) -> bool:
    answers = _KNOWN.setdefault(model, {})
    if question not in answers:
        answers[question] = bool(ask())
    return answers[question]
