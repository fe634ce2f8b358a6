"""The tokens of a forward pass, read from its arguments: what is padding, what the cache holds, which positions a rule chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hooks.errors import CaptureError
from hooks.sites import family
from hooks.tokens import Positions, Tokens


def read_tokens(inputs: Mapping[str, Any], earlier: Tokens | None, eos: Sequence[int] = ()) -> Tokens | None:
    """The tokens of a forward pass, from its keyword arguments.

    Args:
        inputs: ``input_ids`` or ``inputs_embeds``, and where given ``attention_mask`` (two-dimensional), ``position_ids``, ``past_key_values``.
        earlier: what the previous pass returned here, to go on from where the cache is.
        eos: end-of-sequence ids. ``generate`` feeds finished rows with padding and marks it as real; what follows an end token after the prompt is taken out.

    Returns:
        The tokens, or ``None`` where the arguments do not tell (a module that is no language model, a four-dimensional mask).

    Raises:
        CaptureError: the cache holds tokens that no pass here has seen.
    """
    ids, embeds, mask, positions = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"))
    seen = ids if isinstance(ids, Tensor) else embeds
    if not isinstance(seen, Tensor) or seen.ndim < 2 or (isinstance(mask, Tensor) and mask.ndim != 2):
        return None
    batch, new = seen.shape[:2]
    cache = inputs.get("past_key_values")
    held = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
    real = mask.bool()[:, : held + new] if isinstance(mask, Tensor) else torch.ones(batch, held + new, dtype=torch.bool, device=seen.device)
    if real.shape != (batch, held + new):
        raise CaptureError(f"attention_mask has shape {list(real.shape)}, but the pass reads {new} new tokens after {held} cached ones, in {batch} rows")
    ids = ids if isinstance(ids, Tensor) else None
    if isinstance(positions, Tensor) and positions.ndim == 2:
        positions = positions.expand(batch, -1)
    else:
        positions = None
    if not held:
        return Tokens(real, new, ids, positions, prompt=new)
    if earlier is None or earlier.real.shape != (batch, held):
        have = "none" if earlier is None else str(list(earlier.real.shape))
        raise CaptureError(
            f"the key-value cache holds {held} tokens of {batch} rows, but the passes seen here were of {have}; begin the capture before the first pass, or run the whole "
            "sequence once without a cache"
        )
    real = real.clone()
    real[:, :held] &= earlier.real
    if ids is not None and earlier.ids is not None:
        past = earlier.ids
        ids = torch.cat([past, ids], dim=1)
        if eos:
            ended = torch.isin(past[:, earlier.prompt :], torch.tensor(eos, device=past.device)).any(1)
            real[:, held:] &= ~ended[:, None]
    else:
        ids = None
    positions = torch.cat([earlier.positions, positions], dim=1) if positions is not None and earlier.positions is not None else None
    return Tokens(real, new, ids, positions, earlier.prompt)


class Reader:
    """Follows the passes of one model and says which positions a rule chooses in each; keeps what a key-value cache has seen."""

    def __init__(self, model: nn.Module) -> None:
        known = family(model)
        self._learned_positions = known is not None and known.learned_positions
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self._ends = [ends] if isinstance(ends, int) else list(ends or ())
        self._tokens: Tokens | None = None

    def choose(self, rule: Positions, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The positions of ``rule`` among those that this pass computes.

        Args:
            rule: the position rule.
            args: positional arguments of the root model's forward.
            kwargs: its keyword arguments.

        Returns:
            A boolean ``[batch, new position]``, and the position in the sequence at which its first column stands.

        Raises:
            CaptureError: the rule does not fit the pass, or the pass is padded in a way that makes its activations wrong.
        """
        inputs = {"input_ids": args[0], **kwargs} if args and isinstance(args[0], Tensor) else kwargs
        self._tokens = tokens = read_tokens(inputs, self._tokens, self._ends)
        if tokens is None:
            if rule.name != "mask":
                raise CaptureError(
                    f"the position rule {rule.name!r} needs input_ids (or inputs_embeds) and a two-dimensional attention_mask; the pass was given "
                    f"{', '.join(kwargs) or f'{len(args)} positional arguments'}. Give a mask instead"
                )
            return rule.choose(Tokens(torch.zeros(0, 0, dtype=torch.bool), 0)), 0
        offset = tokens.real.shape[1] - tokens.new
        if self._learned_positions and tokens.positions is None and not offset and not bool(tokens.real[:, 0].all()):
            raise CaptureError(
                "the rows are padded on the left, and this architecture counts positions from the left edge: without position_ids every activation is wrong. Pad on the right, "
                "or pass position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)"
            )
        return rule(tokens)[:, offset:], offset
