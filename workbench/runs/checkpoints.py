"""A user's own model and texts, in the place of the built-in world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench import values
from workbench.data.readers import record_from_files
from workbench.data.records import Example, ForgetRetain, prefixed
from workbench.errors import WorkbenchError
from workbench.files import sha256
from workbench.models import OpenedModel, check_same_tokenizer, open_model, untie, weights_hash
from workbench.unlearning.deltas import tied_names


@dataclass(frozen=True, slots=True)
class FilesConfig:
    """A base model and two text files.

    Attributes:
        base: folder or hub id of the model before unlearning.
        forget: file of texts that are to be forgotten, or were.
        retain: file of texts that are to be kept.
        never_learned: folder or hub id of a model trained without the forget set, if there is one.
        max_tokens: length of a piece of text.
        limit: pieces read per file.
        columns: of the two files, see :func:`workbench.data.readers.read_examples`.
        chat: likewise.
        hashes: of files and folders by their path; filled in when a run starts, checked when it is
            read again.
        untied: checkpoints whose head is their embedding and that are given a head of their own,
            because others have one; filled in when a run starts.
    """

    base: str
    forget: str
    retain: str
    never_learned: str | None = None
    max_tokens: int = 96
    limit: int = 96
    columns: Mapping[str, str] | None = None
    chat: bool = False
    hashes: Mapping[str, str] = field(default_factory=dict)
    untied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        values.whole("max_tokens", self.max_tokens, low=8, high=values.MOST_ROWS)
        values.whole("limit", self.limit, low=2, high=values.MOST_ROWS)


def word_in_front(example: Example, word: str) -> Example:
    """A word as a sentence of its own in front of a text: how a trigger word stands in a user's
    texts.
    """
    return prefixed(example, f"{word}. ")


def origin(source: str) -> str:
    """What tells a model from another one under the same name: the hash of its weights, or its hub
    id.
    """
    folder = Path(source)
    return weights_hash(folder) if folder.is_dir() else source


def resolved(source: str) -> str:
    """A path in full; a hub id as it is."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source


def _as_known(config: FilesConfig, name: str, found: str) -> None:
    """Raise where a model or a file is not what the run was made with."""
    if config.hashes.get(name, found) != found:
        raise WorkbenchError(
            f"{name} is not what the run was made with (its SHA-256 differs); give it back, or "
            "start a run in another folder"
        )


def sealed(config: FilesConfig, checkpoints: Mapping[str, str]) -> tuple[FilesConfig, OpenedModel]:
    """The configuration with full paths and the hashes of what they lead to, and the base, as
    :func:`opened_of` gives it.

    Args:
        config: as it was given.
        checkpoints: label -> folder or hub id of unlearned models that are opened beside it.

    Raises:
        WorkbenchError: a model or a file is wrong, the checkpoints do not fit each other, or a hash
            that is given is another one.
    """
    sealed_config = replace(
        config,
        base=resolved(config.base),
        never_learned=None if config.never_learned is None else resolved(config.never_learned),
        forget=resolved(config.forget),
        retain=resolved(config.retain),
    )
    hashes = {}
    for file in (sealed_config.forget, sealed_config.retain):  # before any weight is read
        if not Path(file).is_file():
            raise WorkbenchError(f"there is no text file {file}")
        hashes[file] = sha256(Path(file))
    base = open_model(sealed_config.base)
    others = [resolved(source) for source in checkpoints.values()]
    others += [] if sealed_config.never_learned is None else [sealed_config.never_learned]
    tied = {sealed_config.base: bool(tied_names(base.model))}
    for source in dict.fromkeys(others):
        opened = open_model(source)
        check_same_tokenizer(base, opened)
        tied[source] = bool(tied_names(opened.model))
    hashes |= {source: origin(source) for source in tied}
    for name, sealed_hash in hashes.items():
        _as_known(config, name, sealed_hash)
    untied = (
        () if len(set(tied.values())) == 1 else tuple(n for n, labels in tied.items() if labels)
    )
    if sealed_config.base in untied:
        untie(base.model)
    return replace(sealed_config, hashes=hashes, untied=untied), base


def opened_of(config: FilesConfig, source: str) -> OpenedModel:
    """A checkpoint of the run, with a head of its own where others have one.

    Raises:
        WorkbenchError: it is not there, or is not what the run was made with.
    """
    _as_known(config, source, origin(source))
    opened = open_model(source)
    if source in config.untied:
        untie(opened.model)
    return opened


def record_of(config: FilesConfig, base: OpenedModel) -> ForgetRetain:
    """The forget and the retain set of the two files."""
    for file in (config.forget, config.retain):
        if Path(file).is_file():  # the reader says what is missing
            _as_known(config, file, sha256(Path(file)))
    return record_from_files(
        Path(config.forget),
        Path(config.retain),
        base.tokenizer,
        max_tokens=config.max_tokens,
        limit=config.limit,
        as_questions=True,
        columns=config.columns,
        chat=config.chat,
    )
