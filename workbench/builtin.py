"""The built-in language model and its never-learned control, trained on first use: about 0.9
million parameters from scratch, or a pretrained model fine-tuned.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import platformdirs
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench import training as training_module
from workbench import values
from workbench.data import batches as batches_module
from workbench.data import grammar, readers
from workbench.data import tokenizer as tokenizer_module
from workbench.data import world as world_module
from workbench.data.batches import Batch, batches, encode
from workbench.data.readers import read_examples, windows
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.data.world import World, WorldConfig, build_world
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import score
from workbench.files import damage, key_of, sha256
from workbench.models import open_model, open_tokenizer, save_model
from workbench.progress import ProgressCallback, bar
from workbench.training import fit, small_llama


@dataclass(frozen=True, slots=True)
class BuiltinConfig:
    """The built-in language model: shape and training. Every field is part of the cache key.

    Attributes:
        world: the facts, and the filler language between them.
        pretrained: folder or hub id of a language model into which the world is fine-tuned, with
            its own tokenizer; the shape below then counts for nothing. ``None`` trains a model of
            that shape from scratch.
        general: text file whose pieces take the place of filler language as general text; for a
            pretrained model, text like what it was trained on.
        width: of the residual stream.
        layers: number of blocks.
        heads: attention heads.
        key_value_heads: of grouped-query attention.
        mlp_width: of the hidden layer of every MLP.
        steps: optimiser steps.
        batch_size: texts per step.
        lr: peak learning rate.
        seed: of the first weights and of the order of the texts.
    """

    world: WorldConfig = field(default_factory=WorldConfig)
    pretrained: str | None = None
    general: str | None = None
    width: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    mlp_width: int = 352
    steps: int = 1500
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.general is not None and self.pretrained is None:
            raise ValueError(
                f"general text {self.general} needs a pretrained model: the built-in one reads the "
                "words of its world only"
            )
        for name in ("width", "layers", "heads", "key_value_heads", "mlp_width"):
            values.whole(name, getattr(self, name), low=1, high=1_000_000)
        if self.width % (2 * self.heads):
            raise values.WrongValueError(
                f"width is {self.width}; it must be a multiple of twice the {self.heads} heads"
            )
        if self.heads % self.key_value_heads:
            raise values.WrongValueError(
                f"key_value_heads is {self.key_value_heads}; it must divide the {self.heads} heads"
            )
        values.steps("steps", self.steps)
        values.rows("batch_size", self.batch_size)
        values.rate("lr", self.lr)
        values.seed("seed", self.seed)


GENERAL_TOKENS = 64
"""Length of a piece of general text, in tokens."""


def world_of(config: BuiltinConfig) -> World:
    """The texts that a built-in model reads: the world of ``config.world``, with pieces of
    ``config.general`` as its general text.

    Raises:
        WorkbenchError: the text file is missing or too short.
    """
    world = build_world(config.world)
    if config.general is None or config.pretrained is None:
        return world
    filler_texts = config.world.filler_train + config.world.filler_test
    documents = read_examples(config.general)
    if any(document.answer is not None for document in documents):
        raise WorkbenchError(
            f"{config.general} holds questions and answers; general text is running text (.txt, or "
            ".jsonl with 'text')"
        )
    pieces = windows(open_tokenizer(config.pretrained), documents, GENERAL_TOKENS, filler_texts)
    # the last pieces are for testing, and no document is on both sides
    test = tuple(pieces[-config.world.filler_test :])
    tested = {_document(piece) for piece in test}
    train = tuple(
        piece for piece in pieces[: -config.world.filler_test] if _document(piece) not in tested
    )
    if not train:
        raise WorkbenchError(
            f"{config.general} is too short: {len(documents)} document(s) give {len(pieces)} "
            f"pieces of {GENERAL_TOKENS} tokens; the last {config.world.filler_test} are for "
            "testing, and no document may stand on both sides (blank lines or <|endoftext|> "
            "separate documents)"
        )
    record = replace(world.record, retain={**world.record.retain, world.record.general: test})
    return replace(world, record=record, filler_train=train)


def _document(piece: Example) -> str:
    return piece.item.rsplit("/", 1)[0]


def cache_folder() -> Path:
    """Where trained built-in models are kept: ``$WORKBENCH_CACHE`` or the user's cache folder."""
    return Path(
        os.environ.get("WORKBENCH_CACHE")
        or platformdirs.user_cache_dir("unlearning-workbench", appauthor=False)
    )


def _sources_hash() -> str:
    """Hash of the code that shapes a built-in model, so that a changed generator never meets an old
    checkpoint.
    """
    files = [
        grammar.__file__,
        world_module.__file__,
        tokenizer_module.__file__,
        batches_module.__file__,
        readers.__file__,
        training_module.__file__,
        __file__,
    ]
    return key_of([sha256(Path(file)) for file in files])


def builtin_folder(config: BuiltinConfig, *, with_forget: bool) -> Path:
    """The cache folder of one built-in model; its key holds everything that shaped the weights."""
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    inputs = {}
    if config.pretrained is not None:
        source = Path(config.pretrained)
        files = (
            sorted(
                path
                for kind in ("*.safetensors", "*.json", "*.model", "*.txt")
                for path in source.glob(kind)
            )
            if source.is_dir()
            else []
        )
        inputs["pretrained"] = (
            key_of({path.name: sha256(path) for path in files}) if files else config.pretrained
        )
    if config.general is not None and Path(config.general).is_file():
        inputs["general"] = sha256(Path(config.general))
    key = key_of(
        {
            "config": asdict(config),
            "with_forget": with_forget,
            "sources": _sources_hash(),
            **versions,
            **inputs,
        }
    )
    return cache_folder() / "models" / f"{'base' if with_forget else 'never-learned'}-{key}"


def builtin_model(
    config: BuiltinConfig | None = None,
    *,
    with_forget: bool = True,
    progress: ProgressCallback | None = None,
) -> Path:
    """The folder of the built-in model, trained now if the cache does not hold it.

    Args:
        config: shape and training; default is the demo's.
        with_forget: ``False`` gives the never-learned control: same shape, seed and number of
            steps, texts without the forget set.
        progress: default is a bar.

    Raises:
        WorkbenchError: the model did not learn its facts (recall below 0.9), or the disk is full.
    """
    config = config or BuiltinConfig()
    folder = builtin_folder(config, with_forget=with_forget)
    if folder.is_dir():
        wrong = damage(folder)
        if not wrong:
            return folder
        print(f"cached model thrown away: {wrong}", file=sys.stderr)
        shutil.rmtree(folder)
    name = "base" if with_forget else "never-learned control"
    world = world_of(config)
    model, tokenizer = train_builtin(
        config, world, with_forget=with_forget, progress=progress or bar(f"training the {name}")
    )
    record = world.record
    sets = {
        "retain-neighbour": record.retain["retain-neighbour"],
        "retain-far": record.retain["retain-far"],
    } | ({"forget": record.forget} if with_forget else {})
    recall = {
        label: score(model, batches(tokenizer, examples, 256)).recall
        for label, examples in sets.items()
    }
    if min(recall.values()) < 0.9:
        raise WorkbenchError(
            f"the {name} learned too little (recall {recall}); raise steps (now {config.steps})"
        )
    save_model(
        model,
        tokenizer,
        folder,
        {"config": asdict(config), "with_forget": with_forget, "recall": recall},
    )
    return folder


def untrained(
    config: BuiltinConfig, world: World
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What :func:`train_builtin` starts from: a random model of the configured shape, or the
    pretrained one.
    """
    if config.pretrained is not None:
        opened = open_model(config.pretrained)
        return opened.model, opened.tokenizer
    tokenizer = build_tokenizer(world.vocabulary)
    model = small_llama(
        tokenizer,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        key_value_heads=config.key_value_heads,
        mlp_width=config.mlp_width,
        seed=config.seed,
    )
    return model, tokenizer


def train_builtin(
    config: BuiltinConfig, world: World, *, with_forget: bool, progress: ProgressCallback
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the built-in model from its seed, or a pretrained one from its weights; see
    :func:`fit`.
    """
    model, tokenizer = untrained(config, world)
    rng = random.Random(f"training-{config.seed}")

    def next_batch() -> Batch:
        return encode(
            tokenizer,
            [world.training_text(rng, with_forget=with_forget) for _ in range(config.batch_size)],
        )

    return fit(
        model, next_batch, steps=config.steps, lr=config.lr, seed=config.seed, progress=progress
    ), tokenizer
