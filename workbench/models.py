"""Open and save causal language models as ordinary Hugging Face folders."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from workbench.errors import WorkbenchError
from workbench.files import MANIFEST, damage, known_hash, write_folder, write_json
from workbench.hooks.brief import brief
from workbench.strict import ADAPTER, QuietTransformers, adapter_base, check_loaded, merged


@brief
@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model with its tokenizer.

    Attributes:
        model: in evaluation mode.
        tokenizer: fast.
        name: what the user called it (a folder or a hub id).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def open_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
) -> OpenedModel:
    """Open a Hugging Face folder or hub id, strictly. Only safetensors are read.

    Args:
        source: a folder, or the id of a model on the hub.
        dtype: of the weights in memory.
        trust_remote_code: run code that comes with the model; off unless the user asks.
        merge_adapter: ``source`` is a folder of a PEFT adapter: open the base that its
            configuration names, and add the adapter to its weights.

    Raises:
        WorkbenchError: nothing is there, the folder holds no model, the weights are not
            safetensors, do not fit the configuration, are missing in part, belong to nothing or
            are not finite; an adapter without ``merge_adapter``.
    """
    name, folder = str(source), Path(source)
    if (folder / ADAPTER).is_file():
        return _open_adapter(folder, dtype, trust_remote_code, merge_adapter)
    if merge_adapter:
        raise WorkbenchError(f"{name} is no folder of a PEFT adapter: it holds no {ADAPTER}")
    _check_source(source)
    if (folder / MANIFEST).is_file() and (wrong := damage(folder)):
        raise WorkbenchError(
            f"{wrong}; if that was you, delete {folder / MANIFEST}; else make or copy the model "
            "again"
        )
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise WorkbenchError(
            f"{name} holds no safetensors weights (pickled weights are never loaded); save the "
            "model again with safe_serialization=True"
        )
    try:
        with QuietTransformers():
            AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, with both shapes
            )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # every reader of a damaged file has exceptions of its own
        raise _cannot_open(source, error) from error
    check_loaded(name, model, report)
    model.eval()
    return OpenedModel(model, tokenizer, name)


def _refuse_adapter(folder: Path, *, unless_alone: bool = False) -> None:
    """Say what to do with the folder of an adapter where a model is meant; with ``unless_alone``
    only where a model lies beside it.
    """
    if (folder / "config.json").is_file():
        raise WorkbenchError(
            f"{folder} holds a model (config.json) and a PEFT adapter ({ADAPTER}): which of the "
            "two is meant? Move one of them to a folder of its own"
        )
    if not unless_alone:
        raise WorkbenchError(
            f"{folder} holds a PEFT adapter of {adapter_base(folder)} and no model; merge it "
            f"(open_model({str(folder)!r}, merge_adapter=True), save_model), and give that folder"
        )


def _open_adapter(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool, merge_adapter: bool
) -> OpenedModel:
    _refuse_adapter(folder, unless_alone=merge_adapter)
    base = adapter_base(folder)
    nearby = folder / base
    opened = open_model(
        nearby if nearby.is_dir() else base, dtype=dtype, trust_remote_code=trust_remote_code
    )
    with QuietTransformers():
        return OpenedModel(merged(opened.model, folder), opened.tokenizer, str(folder))


def parameter_count(source: str | Path) -> int:
    """How many parameters a model has, from its configuration alone: no weight is read.

    Raises:
        WorkbenchError: nothing is there, or it is no causal language model.
    """
    try:
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(open_config(source)).num_parameters())
    except (ValueError, TypeError, AttributeError) as error:
        raise _cannot_open(source, error) from error


def untie(model: PreTrainedModel) -> bool:
    """Give a model whose head is its embedding a head of its own with the same values.

    Returns:
        Whether there was something to do.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    return True


def open_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a Hugging Face folder or hub id, and none of its weights.

    Raises:
        WorkbenchError: nothing is there, or the folder holds no tokenizer.
    """
    _check_source(source)
    try:
        with QuietTransformers():
            return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # every reader of a damaged file has exceptions of its own
        raise _cannot_open(source, error) from error


def open_config(source: str | Path) -> PretrainedConfig:
    """Read the configuration of a Hugging Face folder or hub id, and none of its weights.

    Raises:
        WorkbenchError: nothing is there, or the folder holds no configuration.
    """
    _check_source(source)
    try:
        with QuietTransformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(str(source))
    except Exception as error:  # every reader of a damaged file has exceptions of its own
        raise _cannot_open(source, error) from error
    return config


def _check_source(source: str | Path) -> None:
    name, folder = str(source), Path(source)
    if folder.is_dir():
        if (folder / ADAPTER).is_file():
            _refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise WorkbenchError(
                f"{name} holds no model: config.json is missing; give a folder written by "
                "save_pretrained"
            )
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WorkbenchError(
            f"{name} is no folder; give the folder of a Hugging Face model or a hub id such as "
            "'owner/name'"
        )


def _cannot_open(source: str | Path, error: Exception) -> WorkbenchError:
    # the first line of some errors only announces the second
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:2]) or type(error).__name__
    if Path(source).is_dir():
        return WorkbenchError(
            f"cannot open model {source}: the folder is damaged or incomplete ({first[:240]}); "
            "save or copy it again"
        )
    return WorkbenchError(
        f"cannot open model {source}: it is no local folder, and the hub has no such model or "
        "cannot be reached; check the name"
    )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    note: dict[str, object] | None = None,
) -> None:
    """Write model and tokenizer as a Hugging Face folder, whole or not at all; ``note`` goes into
    ``workbench.json`` beside them.
    """

    def write(temporary: Path) -> None:
        with QuietTransformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        if note is not None:
            write_json(temporary / "workbench.json", note)

    write_folder(folder, write)


def weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors files of a model folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(known_hash(path).encode())
    return digest.hexdigest()


def check_same_tokenizer(base: OpenedModel, other: OpenedModel) -> None:
    """Two checkpoints can be compared token by token only if their tokenizers agree.

    Raises:
        WorkbenchError: they differ; the message names both and the first difference.
    """
    base_vocabulary, other_vocabulary = base.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if base_vocabulary != other_vocabulary:
        different = next(
            (
                token
                for token in sorted(set(base_vocabulary) | set(other_vocabulary))
                if base_vocabulary.get(token) != other_vocabulary.get(token)
            ),
            "",
        )
        raise WorkbenchError(
            f"{other.name} does not use the tokenizer of {base.name} ("
            f"{len(other_vocabulary)} tokens against {len(base_vocabulary)}; first difference: "
            f"{different!r}); give two checkpoints of the same model"
        )
    probe = "The quick brown fox, 12.5 %."
    if base.tokenizer(probe)["input_ids"] != other.tokenizer(probe)["input_ids"]:
        raise WorkbenchError(
            f"{other.name} has the vocabulary of {base.name} but splits text differently; copy the "
            "base's tokenizer files beside the checkpoint"
        )
    sizes = [opened.model.get_input_embeddings().weight.shape[0] for opened in (base, other)]
    if sizes[0] != sizes[1]:
        raise WorkbenchError(
            f"{other.name} embeds {sizes[1]} tokens, {base.name} {sizes[0]}; give two checkpoints "
            "of the same model"
        )
