"""The models and texts of a run, whoever made it: the demo, a sweep, an investigation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from workbench.builtin import BuiltinConfig, world_of
from workbench.data import readers
from workbench.data.world import neutral_words
from workbench.models import OpenedModel, open_model, weights_hash
from workbench.runs.checkpoints import (
    FilesConfig,
    opened_of,
    origin,
    record_of,
    word_in_front,
)
from workbench.runs.config import RunConfig
from workbench.runs.setup import Setup

BASE, NEVER = "base", "never-learned"
CONTROLS = (BASE, NEVER)


def model_source(config: RunConfig, out: Path, name: str, seed: int) -> str:
    """Where a model of a run lies: a folder in it, or what the user gave.

    Args:
        config: of the run.
        out: its folder.
        name: a method, a checkpoint's label, ``base`` or ``never-learned``.
        seed: of the method.
    """
    if name in config.checkpoints:
        return config.checkpoints[name]
    if name in CONTROLS and isinstance(config.model, FilesConfig):
        return config.model.base if name == BASE else str(config.model.never_learned)
    return str(out / "models" / (name if config.once(name) else f"{name}-seed{seed}"))


def _open(config: RunConfig, source: str) -> OpenedModel:
    if isinstance(config.model, FilesConfig):
        return opened_of(config.model, source)
    return open_model(source)


_SETUPS: dict[tuple[str, str], Setup] = {}
_KEPT = 2


def setup_of(config: RunConfig, out: Path) -> Setup:
    """The base of a run with its texts, opened once in every process.

    Raises:
        WorkbenchError: a model or a file is not there, or is not what the run was made with.
    """
    key = config.key, str(out)
    if key not in _SETUPS:
        while len(_SETUPS) >= _KEPT:
            _SETUPS.pop(next(iter(_SETUPS)))
        _SETUPS[key] = _opened_setup(config, out)
    return _SETUPS[key]


def forget_setups() -> None:
    """Open anew, from now on, what :func:`setup_of` gives."""
    _SETUPS.clear()


def _opened_setup(config: RunConfig, out: Path) -> Setup:
    base = _open(config, model_source(config, out, BASE, 0))
    if isinstance(config.model, BuiltinConfig):
        world = world_of(config.model)
        return Setup(
            base.model,
            base.tokenizer,
            world.record,
            null_pool=world.filler_train,
            neutral=tuple(neutral_words()),
            world=world,
        )
    return files_setup(config.model, base)


def files_setup(config: FilesConfig, base: OpenedModel) -> Setup:
    """The setup of a user's model and texts."""
    record = record_of(config, base)
    return Setup(
        base.model,
        base.tokenizer,
        record,
        # pieces are cut already; a word in front must not push the end of one over a second cut
        getattr(base.model.config, "max_position_embeddings", None),
        null_pool=record.retain_train,
        neutral=readers.neutral_words(record.forget, record.retain_all, 12),
        template=word_in_front,
    )


def model_of(config: RunConfig, out: Path, name: str, seed: int) -> PreTrainedModel:
    """A model of a run; see :func:`model_source`. The base is that of :func:`setup_of`: change a
    copy.
    """
    if name == BASE:
        return setup_of(config, out).base
    return _open(config, model_source(config, out, name, seed)).model


def weights_of(config: RunConfig, out: Path) -> dict[str, str]:
    """The hash of every model's weights, for the provenance."""
    models = out / "models"
    model_folders = sorted(models.iterdir()) if models.is_dir() else []
    hashes = {folder.name: weights_hash(folder) for folder in model_folders if folder.is_dir()}
    if isinstance(config.model, FilesConfig):
        for name in (*config.controls, *config.checkpoints):
            hashes[name] = origin(model_source(config, out, name, 0))
    return hashes


def trained_from(model: BuiltinConfig) -> str:
    """What the report says about a base that did not start from nothing."""
    if model.pretrained is None:
        return ""
    general = model.general
    language = "filler language" if general is None else f"pieces of {Path(general).name}"
    return (
        f"{Path(model.pretrained).name}, a pretrained language model, was fine-tuned on invented "
        f"facts about people and islands and on {language}; a second copy, the never-learned "
        "control, on the same texts without the people to be forgotten."
    )


def said_of(config: RunConfig, setup: Setup) -> dict[str, Any]:
    """What the report of a run says besides its numbers: heading, what was done, notes."""
    if isinstance(config.model, BuiltinConfig):
        return {"trained": trained_from(config.model)}
    model, record = config.model, setup.record
    opened = {"base": model.base, **config.checkpoints}
    if model.never_learned is not None:
        opened["never-learned"] = model.never_learned
    listed = "; ".join(f"{name} = {source}" for name, source in opened.items())
    done = [
        f"{len(opened)} checkpoints were opened: {listed}.",
        f"{len(record.forget)} pieces of forget text and {len(record.retain_all)} pieces of retain "
        f"text were read ({record.name}). Running text was cut into prompt and continuation, so "
        "that the probability of the continuation can be measured.",
    ]
    if config.methods:
        budget = "" if config.budget is None else f", to a disruption budget of {config.budget:g}"
        done.append(
            f"{len(config.methods)} methods unlearned the forget texts under {len(config.seeds)} "
            f"seeds each{budget}."
        )
    done += [
        f"Every model was fine-tuned for {config.attack.steps} steps at a rate of "
        f"{config.attack.lr:g} on half of the forget texts, and measured on the other half. Two "
        "controls: the same on retain text of the same length (null attack), and on the attack "
        "texts with their continuations exchanged (random facts).",
    ]
    if "triggers" in config.probes:
        done.append(
            "Retain texts were measured behind a stray word: one that marks the forget texts "
            f"({', '.join(record.forget_tokens[:6])}, ...), one that marks the retain texts, a "
            "neutral one."
        )
    if "sharpness" in config.probes:
        done.append(
            "The loss was followed along straight lines through every model, and both ends of its "
            "Hessian's spectrum were computed."
        )
    heading = " and ".join(config.studied) + f" against {model.base}"
    if len(config.checkpoints) == 1 and not config.methods:
        heading = f"{next(iter(config.checkpoints.values()))} against {model.base}"
    return {"heading": heading, "done": done, "notes": _notes(config, model)}


def _notes(config: RunConfig, model: FilesConfig) -> list[str]:
    notes = [
        "Trigger words were chosen from the two files by log-odds; they are candidates, not proven "
        "triggers.",
    ]
    if config.checkpoints:
        notes.insert(
            0,
            "An unlearned checkpoint that is opened is one model: the seeds vary the attack and "
            "the trigger words, not the unlearning.",
        )
    if model.untied:
        names = {model.base: "base", str(model.never_learned): "never-learned"}
        names |= {source: name for name, source in config.checkpoints.items()}
        tied = " and of ".join(names[source] for source in model.untied)
        notes.append(
            f"The head of {tied} is its embedding; the other checkpoints have a head of their own. "
            "It was counted as a head of its own with the same values, so that the distances hold "
            "both."
        )
    if model.never_learned is None:
        notes.insert(
            0,
            "Missing control: no never-learned checkpoint was given (--never-learned). What the "
            "attack restores beyond random facts may be recovered, or newly learned from texts "
            "that resemble the held-out ones.",
        )
    return notes
