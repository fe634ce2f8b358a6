"""What the ``generate`` that runs a pass was asked for: its end tokens, and whether rows stay
rows.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from workbench.hooks.errors import CaptureError

_CODE = inspect.unwrap(GenerationMixin.generate).__code__
_ROWS_STAY = ("greedy_search", "sample")


def end_tokens(rows: int, model_ends: Any) -> list[int]:
    """The end-of-sequence ids of the generation that runs this pass, those of ``model_ends``
    outside of one.

    Args:
        rows: of the batch.
        model_ends: the ids in ``model.generation_config``.

    Raises:
        CaptureError: the generation reorders rows (beam search), feeds guesses (assisted decoding),
            or ends rows by something else than a token.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _CODE:
        frame = frame.f_back  # type: ignore[assignment]
    ends = model_ends
    config = None if frame is None else frame.f_locals.get("generation_config")
    if isinstance(config, GenerationConfig):
        _refuse_reordering(config, frame.f_locals, rows)
        ends = config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends if ends is not None else ())


def _refuse_reordering(config: GenerationConfig, given: dict[str, Any], rows: int) -> None:
    mode = config.get_generation_mode(given.get("assistant_model"))
    if mode.value not in _ROWS_STAY:
        raise CaptureError(
            f"generate runs {mode.value.replace('_', ' ')}, which reorders the rows of its cache "
            "or feeds guesses that it takes back; run the finished sequences once instead"
        )
    own = config.stop_strings or given.get("stopping_criteria")
    if rows > 1 and own:
        raise CaptureError(
            "generate ends rows by stop_strings or stopping_criteria, after which it feeds padding "
            "that looks like text; run the finished sequences once instead, or one row at a time"
        )
