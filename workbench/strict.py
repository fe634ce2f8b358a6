"""What must be true of weights before anything is measured on them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.utils import logging as hub_logging
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError

ADAPTER = "adapter_config.json"

_PREFIXES = {
    "_orig_mod.": "was saved from a compiled model; save model._orig_mod instead",
    "module.": "was saved from a DataParallel or DistributedDataParallel wrapper; save "
    "model.module instead",
    "_fsdp_wrapped_module.": "was saved from an FSDP wrapper; gather the full state dict and save it "  # noqa: E501
    "under the names of the plain model",
    "base_model.model.": "was saved from a PEFT wrapper; save model.merge_and_unload() instead",
}
"""What wrappers put before the names of weights, and what to do about it."""

_NO_WEIGHTS = re.compile(r"\.(masked_bias|rotary_emb\.inv_freq|(attn|attention)\.bias)$")
"""Constants that older versions of transformers stored with GPT-2, GPT-NeoX and Llama."""


def check_loaded(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raise unless every weight of ``model`` was read from the checkpoint, and the reverse.

    Args:
        name: what the user called the model.
        model: as it was loaded.
        report: transformers' loading report.

    Raises:
        WorkbenchError: a weight is missing, unexpected, of another shape than the configuration
            says, or not finite. A tied weight may be absent; where it is stored and differs,
            transformers keeps both.
    """
    missing = set(report["missing_keys"])
    weights = dict(model.named_parameters(remove_duplicate=False))
    unexpected = {
        key
        for key in report["unexpected_keys"]
        if not (_NO_WEIGHTS.search(key) and key not in weights)
    }
    for prefix, remedy in _PREFIXES.items():
        if missing and any(f".{prefix}" in f".{key}" for key in unexpected):
            raise WorkbenchError(
                f"cannot open model {name}: {_some(unexpected)} begin with {prefix!r}: it "
                f"{remedy}, or take the prefix off its keys"
            )
    if report["mismatched_keys"]:
        key, stored, wanted = sorted(report["mismatched_keys"], key=lambda row: str(row[0]))[0]
        raise WorkbenchError(
            f"cannot open model {name}: {len(report['mismatched_keys'])} weights have other shapes "
            f"than config.json asks for, e.g. {key}: {list(stored)} instead of {list(wanted)}; "
            "take the config.json that belongs to these weights"
        )
    if missing:
        raise WorkbenchError(
            f"cannot open model {name}: {_some(missing)} are missing from its weights and would be "
            "random; copy or save the whole model again, with the config.json that belongs to it"
        )
    if unexpected:
        raise WorkbenchError(
            f"cannot open model {name}: {_some(unexpected)} are in its weights and nowhere in the "
            "model that config.json describes; take the config.json that belongs to these weights"
        )
    if report.get("error_msgs"):
        raise WorkbenchError(f"cannot open model {name}: {str(report['error_msgs'][0])[:200]}")
    check_finite(name, model)


def _some(keys: Iterable[str]) -> str:
    """``3 keys (a, b, c)``: how many, and the first few."""
    found = sorted(keys)
    more = ", ..." if len(found) > 3 else ""
    return f"{len(found)} key{'s' * (len(found) > 1)} ({', '.join(found[:3])}{more})"


def check_finite(name: str, model: nn.Module) -> None:
    """Raise where a parameter holds NaN or infinity.

    Raises:
        WorkbenchError: one does; the message counts them and names the first few.
    """
    broken = [key for key, value in model.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise WorkbenchError(
            f"cannot open model {name}: {_some(broken)} hold NaN or infinity; copy the checkpoint "
            "again, or take one from before its training diverged"
        )


def adapter_base(folder: Path) -> str:
    """The model that a PEFT adapter was trained on.

    Raises:
        WorkbenchError: the adapter's configuration is damaged, or names none.
    """
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkbenchError(
            f"{folder / ADAPTER} names no base_model_name_or_path ({type(error).__name__}); name "
            "the model that the adapter was trained on there"
        ) from error
    if not isinstance(base, str) or not base:
        raise WorkbenchError(
            f"base_model_name_or_path in {folder / ADAPTER} is {base!r}; name the model that the "
            "adapter was trained on there"
        )
    return base


def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """``base`` with the PEFT adapter in ``folder`` added to its weights (PEFT's own merge).

    Raises:
        WorkbenchError: the adapter's weights are not safetensors, do not fit, or are not finite.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise WorkbenchError(f"{folder} holds no {weights.name} (pickled weights are never loaded)")
    from peft import PeftModel  # seconds to import, and few folders are adapters

    try:
        wrapped = PeftModel.from_pretrained(base, str(folder))
        with safe_open(weights, framework="pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        adapter_shapes = _adapter_shapes(wrapped)
    except Exception as error:  # PEFT has no exception of its own
        first = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise WorkbenchError(f"cannot merge adapter {folder}: {first[:200]}") from error
    different = sorted(set(stored.items()) ^ set(adapter_shapes.items()))
    if different:
        raise WorkbenchError(
            f"cannot merge adapter {folder}: {_some(key for key, _ in different)} do not fit what "
            f"{ADAPTER} makes of the base"
        )
    check_finite(str(folder), wrapped)
    model: PreTrainedModel = wrapped.merge_and_unload()
    model.requires_grad_(True)
    return model.eval()


def _adapter_shapes(wrapped: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that PEFT would save for this adapter."""
    from peft import get_peft_model_state_dict

    return {key: tuple(value.shape) for key, value in get_peft_model_state_dict(wrapped).items()}


class QuietTransformers:
    """Silence transformers' own progress bars and warnings while a model is opened or saved: our
    own bars tell the story.
    """

    def __enter__(self) -> None:
        self._level = transformers.logging.get_verbosity()
        self._bars = transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity_error()
        self._hub_level = hub_logging.get_verbosity()
        hub_logging.set_verbosity(logging.CRITICAL)  # its retries would bury our one line
        transformers.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers.logging.set_verbosity(self._level)
        hub_logging.set_verbosity(self._hub_level)
        if self._bars:
            transformers.logging.enable_progress_bar()
