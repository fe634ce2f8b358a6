"""The tokens of a forward pass, read from its arguments: what is padding, what the cache holds,
which positions a rule chooses.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.hooks.behaviour import packed_rows_are_apart, padding_may_be_left
from workbench.hooks.errors import CaptureError
from workbench.hooks.generation import end_tokens
from workbench.hooks.sites import causal_lm
from workbench.hooks.tokens import Positions, Tokens

if TYPE_CHECKING:
    from jaxtyping import Bool


def read_tokens(
    inputs: Mapping[str, Any], earlier: Tokens | None, ends: Sequence[int] = ()
) -> Tokens | None:
    """The tokens of a forward pass, from its keyword arguments.

    Args:
        inputs: ``input_ids`` or ``inputs_embeds``, and where given ``attention_mask``
            (two-dimensional), ``position_ids``, ``past_key_values``.
        earlier: what the previous pass returned here, to go on from where the cache is.
        ends: end-of-sequence ids. ``generate`` feeds finished rows with padding and marks it as
            real; what follows an end token in the steps of one generation is taken out.

    Returns:
        The tokens, or ``None`` where the arguments do not tell (a module that is no language model,
        a four-dimensional mask).

    Raises:
        CaptureError: the cache holds tokens that no pass here has seen.
    """
    ids, embeds, mask, positions = (
        inputs.get(name)
        for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    )
    ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None
    inputs_seen = ids if ids is not None else embeds
    if (
        not isinstance(inputs_seen, Tensor)
        or inputs_seen.ndim < 2
        or (mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2))
    ):
        return None
    batch, new = inputs_seen.shape[:2]
    cache = inputs.get("past_key_values")
    held = (
        int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
    )
    if mask is not None and (mask.shape[0] != batch or mask.shape[1] < held + new):
        raise CaptureError(
            f"attention_mask has shape {list(mask.shape)}, but the pass reads {new} new tokens "
            f"after {held} cached ones, in {batch} rows"
        )
    if mask is not None and mask.shape[1] > held + new and not held:
        raise CaptureError(
            f"attention_mask has shape {list(mask.shape)}, but the pass reads tokens of shape "
            f"{[batch, new]}"
        )
    real = (
        mask.bool()[:, : held + new]
        if mask is not None
        else torch.ones(batch, held + new, dtype=torch.bool, device=inputs_seen.device)
    )
    positions = (
        positions.expand(batch, -1)
        if isinstance(positions, Tensor) and positions.ndim == 2
        else None
    )
    nobody = torch.zeros(batch, dtype=torch.bool, device=inputs_seen.device)
    if not held:
        return Tokens(real, new, ids, positions, new, nobody)
    if earlier is None or earlier.real.shape != (batch, held):
        have = "none" if earlier is None else str(list(earlier.real.shape))
        raise CaptureError(
            f"the key-value cache holds {held} tokens of {batch} rows, but the passes seen here "
            f"were of {have}; begin the capture before the first pass, or run the whole "
            "sequence once without a cache"
        )
    real = real.clone()
    real[:, :held] &= earlier.real
    ended = nobody
    if (
        new == 1 and ids is not None
    ):  # a step of generation; a longer pass is a new turn, and begins afresh
        ended = earlier.ended if earlier.ended is not None else nobody
        real[:, held:] &= ~ended[:, None]
        if ends:
            ended = ended | torch.isin(ids[:, 0], torch.tensor(ends, device=ids.device))
    ids = (
        torch.cat([earlier.ids, ids], dim=1)
        if ids is not None and earlier.ids is not None
        else None
    )
    positions = (
        torch.cat([earlier.positions, positions], dim=1)
        if positions is not None and earlier.positions is not None
        else None
    )
    return Tokens(real, new, ids, positions, earlier.prompt, ended)


class Reader:
    """Follows the passes of one model and says which positions a rule chooses in each; keeps what a
    key-value cache has seen.
    """

    def __init__(self, model: nn.Module) -> None:
        _, inner = causal_lm(model)
        self._names = list(
            inspect.signature(inner.forward).parameters
        )  # for arguments given by position
        self._model = inner
        self._ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self._tokens: Tokens | None = None

    def choose(
        self, rule: Positions, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Bool[Tensor, "batch pos"], int]:
        """The positions of ``rule`` among those that this pass computes.

        Args:
            rule: the position rule.
            args: positional arguments of the root model's forward.
            kwargs: its keyword arguments.

        Returns:
            True at the chosen ones of the new positions, and the position in the sequence at which
            the first column stands.

        Raises:
            CaptureError: the rule does not fit the pass, or the pass is padded in a way that makes
                its activations wrong.
        """
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids = inputs.get("input_ids")
        ends = end_tokens(len(ids) if isinstance(ids, Tensor) else 1, self._ends)
        self._tokens = tokens = read_tokens(inputs, self._tokens, ends)
        if tokens is None:
            if rule.mask is None:
                raise CaptureError(
                    f"the position rule {rule.name!r} needs input_ids (or inputs_embeds) and a "
                    "two-dimensional attention_mask; the pass was given "
                    f"{', '.join(kwargs) or f'{len(args)} positional arguments'}. Give a mask "
                    "instead"
                )
            return rule.mask, 0
        offset = tokens.real.shape[1] - tokens.new
        self._refuse_wrong(tokens, inputs)
        return rule(tokens)[:, offset:], offset

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Raise where the padding or the packing of a pass makes its activations wrong.

        Raises:
            CaptureError: left padding without position ids in a model that counts positions from
                the left edge; packed rows in a pass that lets a sequence read the one before it.
        """
        if not inputs.get("past_key_values"):
            tokens = read_tokens(inputs, None)
            if tokens is not None:
                self._refuse_wrong(tokens, inputs)

    def _refuse_wrong(self, tokens: Tokens, inputs: Mapping[str, Any]) -> None:
        if tokens.ids is None or tokens.new != tokens.real.shape[1]:
            return
        if tokens.positions is None:
            if not bool(tokens.real[:, 0].all()) and not padding_may_be_left(self._model):
                raise CaptureError(
                    "the rows are padded on the left, and this architecture counts positions from "
                    "the left edge: without position_ids every activation is wrong. Pad on the "
                    "right, or pass position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)"
                )
        elif bool((tokens.starts.sum(1) > 1).any()) and not packed_rows_are_apart(
            self._model, inputs
        ):
            raise CaptureError(
                "several sequences are packed into one row (position_ids start again), and in a "
                "pass like this one the model lets each read those before it: pass no "
                "attention_mask and use_cache=False where the model tells sequences apart by their "
                "positions, give a four-dimensional mask, or run the sequences as rows of their own"
            )
