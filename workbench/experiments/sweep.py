"""``workbench sweep``: methods, variants, seeds and a budget, on the built-in world or on a user's
own model and texts, as the configuration of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from workbench import values
from workbench.errors import WorkbenchError
from workbench.experiments.ablation import collapse_ablation
from workbench.experiments.grid import settings_grid
from workbench.experiments.investigate import attack_rate
from workbench.models import open_config, parameter_count
from workbench.runs.config import RunConfig, preset
from workbench.runs.pipeline import Run, run_pipeline
from workbench.runs.settings import AttackChoice, Columns, Count, Names, Seeds, validated
from workbench.runs.setup import DisruptionMeasure
from workbench.unlearning.methods import METHODS

BUILTIN_ONLY = ("pretrained", "general", "training_steps", "world", "tagged", "quick", "ablation")
OWN_ONLY = ("forget", "retain", "never_learned", "checkpoint", "columns", "chat")
LOSS_RISE = 0.001
"""The budget of CIR's papers: a share of the base's loss on general text."""


class SweepSettings(AttackChoice):
    """What is put at one price.

    Attributes:
        methods: separated by commas, or ``all``, with the settings of the registry; default those
            of the demo, on the built-in world with its settings.
        variant: ``LABEL=METHOD:NAME=VALUE,...``: a method under another name; ``dtype=bfloat16``
            for its steps.
        ablation: add the ablation of the collapsed update.
        grid: six settings of every method in the place of the methods.
        base: a model of the user's own, in the place of the built-in world.
        forget: file of texts that it is to forget.
        retain: file of texts that it is to keep.
        never_learned: a model trained without the forget set, if there is one.
        checkpoint: ``LABEL=MODEL``: an unlearned model that is opened and compared.
        columns: of the two files.
        chat: render questions with the model's chat template.
        world: seed of the built-in world.
        tagged: whose names stand in its speaker tags: ``surnames`` or ``strangers``.
        pretrained: a language model into which the built-in world is fine-tuned.
        general: text file that stands for general text; with ``pretrained``.
        training_steps: that teach the world to the base and the never-learned control.
        quick: on the quick world.
        attack: further attacks.
        probe: what is asked of every model besides relearning.
        relearning_only: ask nothing else.
        seeds: of unlearning and attack.
        budget: of disruption, in the unit of ``budget_measure``.
        budget_measure: ``kl`` or ``loss-rise``.
        budget_sets: retain sets that count; default all.
        as_trained: match no budget.
        set: ``METHOD.NAME=VALUE``: change a setting of a method.
    """

    methods: Names = Field(
        (),
        description="Methods, separated by commas, or 'all', with the settings of the registry; "
        "default those of the demo (on the built-in world with its settings).",
    )
    variant: list[str] = Field(
        [],
        description="LABEL=METHOD:NAME=VALUE,...: a method under another name; dtype=bfloat16 for "
        "its steps; repeatable.",
    )
    ablation: bool = Field(
        False,
        description="Add the ablation of the collapsed update: components, side, statistics, kind, "
        "precision.",
    )
    grid: bool = Field(
        False,
        description="Six settings of every method (three rates, scaled back to the budget or "
        "stopped at it) in the place of the methods, and which one the attack prefers.",
    )
    base: str | None = Field(
        None,
        description="Folder or hub id of a model of your own, in the place of the built-in world; "
        "with --forget and --retain.",
    )
    forget: str | None = Field(None, description="File of texts that it is to forget.")
    retain: str | None = Field(None, description="File of texts that it is to keep.")
    never_learned: str | None = Field(
        None, description="A model trained without the forget set, if there is one; with --base."
    )
    checkpoint: list[str] = Field(
        [],
        description="LABEL=MODEL: an unlearned model that is opened and compared; with --base; "
        "repeatable.",
    )
    columns: Columns | None = Field(
        None, description="question=NAME,answer=NAME: columns to read; or text=NAME; with --base."
    )
    chat: bool = Field(
        False, description="Render questions with the model's chat template; with --base."
    )
    world: int | None = Field(
        None, ge=0, le=values.LARGEST_SEED, description="Seed of the built-in world."
    )
    tagged: str | None = Field(
        None,
        description="Whose names stand in the built-in world's speaker tags: surnames (default), "
        "or strangers.",
    )
    pretrained: str | None = Field(
        None,
        description="Folder or hub id of a language model into which the built-in world is "
        "fine-tuned; default is one from scratch.",
    )
    general: str | None = Field(
        None, description="Text file that stands for general text; with --pretrained."
    )
    training_steps: Count | None = Field(
        None, description="Steps that teach the world to the base and the never-learned control."
    )
    quick: bool = Field(False, description="On the quick world, which is smaller.")
    probe: list[str] = Field(
        [],
        description="Ask this of every model besides relearning; repeatable; default triggers and "
        "sharpness.",
    )
    relearning_only: bool = Field(False, description="Leave the trigger and sharpness probes out.")
    seeds: Seeds = Field(
        (0, 1, 2), description="Seeds of unlearning and attack: how many, or which."
    )
    budget: float | None = Field(
        None,
        gt=0,
        le=values.LARGEST,
        description="Disruption budget, in the unit of --budget-measure; default 0.05 nats a token.",  # noqa: E501
    )
    budget_measure: DisruptionMeasure = Field(
        "kl",
        description="kl: mean KL to the base, nats per token; loss-rise: share of the base's loss.",
    )
    budget_sets: Names = Field(
        (),
        description="Retain sets that count, separated by commas: retain-neighbour, retain-far, "
        "general (with --base: retain); default all.",
    )
    as_trained: bool = Field(
        False, description="Match no budget: every model is what its method made of it."
    )
    set: list[str] = Field(
        [], description="METHOD.NAME=VALUE: change a setting of a method; repeatable."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SweepSettings:
        wrong: tuple[str, ...] = OWN_ONLY
        why = "needs base, a model of your own"
        if self.base is not None:
            wrong, why = (BUILTIN_ONLY, "is of the built-in world; leave it or base out")
            if self.forget is None or self.retain is None:
                raise ValueError("base needs forget and retain, the two files of texts")
        for name in wrong:
            if getattr(self, name) not in (None, False, []):
                raise ValueError(f"{name} {why}")
        if self.probe and self.relearning_only:
            raise ValueError("give probe or relearning_only, not both")
        if self.as_trained and self.budget is not None:
            raise ValueError("as_trained matches no budget; give it or budget")
        return self


def sweep_config(chosen: SweepSettings) -> RunConfig:
    """The run that a sweep is.

    Raises:
        WorkbenchError: a method, a variant, a setting or a file is wrong.
    """
    start = preset("quick" if chosen.quick else "full")
    own_model = chosen.base is not None
    changes: dict[str, Any] = {
        "seeds": chosen.seeds,
        "settings": {} if own_model else {name: dict(v) for name, v in start.settings.items()},
        "budget_measure": chosen.budget_measure,
        "budget_sets": chosen.budget_sets,
        "attack": _attack(chosen, start),
    }
    methods: list[str] = list(start.methods)
    if chosen.methods:
        methods = list(METHODS) if chosen.methods == ("all",) else list(chosen.methods)
        # the demo's settings were chosen for its methods: beside methods whose settings were not,
        # they would have an advantage
        quick_settings = changes["settings"] if chosen.quick else {}
        changes["settings"] = {n: v for n, v in quick_settings.items() if n in methods}
    if own_model:
        changes["model"], changes["checkpoints"] = _files(chosen), _checkpoints(chosen.checkpoint)
        changes["scale"] = f"{Path(str(chosen.base)).name}, texts of the user's own"
        if changes["checkpoints"] and not chosen.methods:
            methods = []
    else:
        changes["model"] = _world(chosen, start)
    if chosen.pretrained is not None:
        size = "small " if chosen.quick else ""
        model_name = Path(chosen.pretrained).name
        changes["scale"] = f"{model_name}, {size}built-in world fine-tuned in"
    if chosen.as_trained:
        changes["budget"] = None
    elif chosen.budget is not None or chosen.budget_measure == "loss-rise":
        changes["budget"] = LOSS_RISE if chosen.budget is None else chosen.budget
    variants = _variants(chosen, start)
    if variants:
        changes["variants"] = variants
        methods += list(variants)
    if chosen.grid:
        tried = settings_grid(methods)
        changes["variants"] = {name: variant.model_dump() for name, variant in tried.items()}
        methods = list(tried)
    changes["methods"] = methods
    changes["attacks"] = chosen.attack
    if chosen.probe or chosen.relearning_only:
        changes["probes"] = chosen.probe
    for name, value in settings_given(chosen.set, "set").items():
        method, dot, setting = name.partition(".")
        if not dot:
            raise WorkbenchError(
                f"--set {name}={value} must read METHOD.NAME=VALUE, e.g. --set npo.lr=1e-4"
            )
        changes["settings"].setdefault(method, {})[setting] = value
    return validated(RunConfig, start.plain() | changes, "workbench sweep")


def sweep(
    out: Path | str,
    settings: SweepSettings | None = None,
    *,
    fresh: bool = False,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> Run:
    """Put methods at one price, attack and probe them.

    Args:
        out: run folder.
        settings: what is swept.
        fresh: throw away a run that is already there.
        workers: processes; default is one per core.
        announce: called with one line before every part.
        fields: of the settings, by name; they win over ``settings``.

    Raises:
        WorkbenchError: a setting, a model, a file or the folder is wrong, or a part failed.
    """
    given_fields = {} if settings is None else settings.model_dump(exclude_unset=True)
    config = sweep_config(validated(SweepSettings, given_fields | fields, "sweep"))
    return run_pipeline(config, Path(out), fresh=fresh, workers=workers, announce=announce)


def settings_given(pairs: list[str], option: str) -> dict[str, float | str]:
    """``NAME=VALUE`` texts as settings.

    Raises:
        WorkbenchError: one of them reads otherwise.
    """
    parsed: dict[str, float | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise WorkbenchError(f"--{option} {pair!r} must read NAME=VALUE, e.g. --set lr=1e-4")
        try:
            parsed[name] = float(value)
        except ValueError:
            parsed[name] = value
    return parsed


def _attack(chosen: SweepSettings, start: RunConfig) -> dict[str, Any]:
    """The relearning attack; on a user's model its rate depends on the size by default."""
    attack = start.attack
    if chosen.base is not None and chosen.attack_lr is None:
        attack = replace(attack, lr=attack_rate(parameter_count(chosen.base)))
    return asdict(chosen.attack_from(attack))


def _world(chosen: SweepSettings, start: RunConfig) -> dict[str, Any]:
    """The ``model`` field on the built-in world."""
    model = dict(start.plain()["model"])
    if chosen.pretrained is not None:
        folder = Path(chosen.pretrained)
        model["pretrained"] = str(folder.resolve()) if folder.is_dir() else chosen.pretrained
    if chosen.general is not None:
        model["general"] = str(Path(chosen.general).resolve())
    if chosen.training_steps is not None:
        model["steps"] = chosen.training_steps
    changes = {"seed": chosen.world, "tagged": chosen.tagged}
    model["world"] |= {name: value for name, value in changes.items() if value is not None}
    return model


def _files(chosen: SweepSettings) -> dict[str, Any]:
    """The ``model`` field on a user's model and texts."""
    names = ("base", "forget", "retain", "never_learned", "columns", "chat")
    return {name: getattr(chosen, name) for name in names}


def _checkpoints(given: list[str]) -> dict[str, str]:
    checkpoints: dict[str, str] = {}
    for text in given:
        label, equals, source = text.partition("=")
        if not equals or not label or not source:
            raise WorkbenchError(
                f"--checkpoint {text!r} must read LABEL=MODEL, e.g. mine=runs/model"
            )
        if label in checkpoints:
            raise WorkbenchError(
                f"--checkpoint {label} was given twice; every label names one model"
            )
        checkpoints[label] = source
    return checkpoints


def _variants(chosen: SweepSettings, start: RunConfig) -> dict[str, dict[str, Any]]:
    """Methods under other names, the ablation's among them."""
    named: dict[str, dict[str, Any]] = {}
    if chosen.ablation:
        width = start.plain()["model"]["width"]
        if chosen.pretrained is not None:
            width = int(open_config(chosen.pretrained).hidden_size)
        named = {name: each.model_dump() for name, each in collapse_ablation(width).items()}
    for text in chosen.variant:
        label, equals, overrides_text = text.partition("=")
        if label in named:
            raise WorkbenchError(
                f"--variant {label} was given twice; every label names one variant"
            )
        method, _, overrides = overrides_text.partition(":")
        if not equals or not label or not method:
            raise WorkbenchError(
                f"--variant {text!r} must read LABEL=METHOD:NAME=VALUE,..., e.g. "
                "soft-cir=cir:kind=soft"
            )
        variant_settings: dict[str, Any] = settings_given(
            overrides.split(",") if overrides else [], "variant"
        )
        named[label] = {"method": method, "settings": variant_settings}
        if "dtype" in variant_settings:
            named[label]["dtype"] = variant_settings.pop("dtype")
    return named
