"""The configuration of a run: one validated value, one YAML file."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from workbench import registry, values
from workbench.attacks.attack import ATTACKS
from workbench.attacks.relearn import RelearnSettings
from workbench.builtin import BuiltinConfig
from workbench.data.world import WorldConfig
from workbench.errors import WorkbenchError, unknown
from workbench.files import key_of
from workbench.runs.checkpoints import FilesConfig
from workbench.runs.probing import PROBES
from workbench.runs.settings import Seeds, Settings, read_fields, validated
from workbench.runs.setup import DisruptionMeasure
from workbench.unlearning.methods import METHODS, check_setting, innermost, is_method
from workbench.unlearning.recipe import Setting

CONTROLS = ("base", "never-learned")
DEMO_METHODS = ("grad-diff", "npo", "npo-sam", "rmu", "rmu-rna", "cir", "cir-uncollapsed")

DEMO_SETTINGS: dict[str, dict[str, Setting]] = {
    "grad-diff": {"lr": 1e-4, "steps": 320, "stop": "budget"},
    "npo": {"lr": 3e-4, "steps": 160},
    "npo-sam": {"lr": 3e-5, "steps": 320, "stop": "budget"},
    "rmu": {"lr": 3e-3, "steps": 320, "stop": "budget"},
    "rmu-rna": {"lr": 3e-3, "steps": 320, "stop": "budget"},
    "cir": {"lr": 0.1, "steps": 320, "stop": "budget"},
    "cir-uncollapsed": {"lr": 0.03, "steps": 320, "stop": "budget"},
}
"""Of six settings a method (:mod:`workbench.experiments.grid`) the ones that a relearning attack on
another world brings least back from: ``workbench sweep --grid --world 100 --seeds 2
--relearning-only``.
"""


def _one_spelling(value: object) -> object:
    """``20.0`` and ``20`` are one setting, and have one key; ``true`` is none."""
    if isinstance(value, bool):
        raise ValueError("a setting is a number or a word")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("give a finite number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


Value = Annotated[Setting, BeforeValidator(_one_spelling)]


def _kind(model: object) -> str:
    """Which of the two a ``model`` field describes: files have a base."""
    given = isinstance(model, FilesConfig) or (isinstance(model, dict) and "base" in model)
    return "files" if given else "builtin"


Subject = Annotated[
    Annotated[BuiltinConfig, Tag("builtin")] | Annotated[FilesConfig, Tag("files")],
    Discriminator(_kind),
]
RETAIN_SETS = ("retain-neighbour", "retain-far", "general")
"""Retain sets of the built-in world."""


class Variant(BaseModel):
    """A method under another name, with settings of its own: one row of an ablation.

    Attributes:
        method: name from the registry.
        settings: overrides of its settings.
        dtype: of the weights while they are trained; bfloat16 rounds most of a small step away.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str
    settings: dict[str, Value] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"


class RunConfig(Settings):
    """Everything that decides the numbers of a run.

    Attributes:
        scale: shown beside every verdict, so that nobody takes a quick run for a full one.
        model: the built-in model and its world, or a user's model and texts (``base``, ``forget``,
            ``retain``).
        methods: names from the registry, or of variants.
        checkpoints: label -> folder or hub id of unlearned models that are opened instead of made;
            with a user's model.
        variants: methods under other names.
        attacks: further attacks that every model is put under, besides relearning.
        probes: what is measured on every model besides forgetting, disruption and relearning.
        settings: per method, overrides of its settings.
        seeds: seeds of unlearning and attack; base and control model are trained once.
        budget: disruption budget, in the unit of ``budget_measure``; none: every model is what its
            method made of it.
        budget_measure: ``kl``: mean KL to the base, nats per token; ``loss-rise``: rise of the loss
            as a share of the base's (CIR's papers: 0.001 on general text).
        budget_sets: the retain sets it is measured on (their test halves, every set counts the
            same); default all.
        alpha_limit: the line search may scale a delta up to this factor.
        attack: the relearning attack.
        slice_points: positions along every one-dimensional slice.
        slice_reach: half-width of the random and gradient slices, as a share of the weights' norm.
        rank: directions kept of every subspace.
        curvature_tolerance: ARPACK's relative tolerance for the Hessian's extreme eigenvalues.
        plugins: files (or cells of a notebook) with entries of the user's own, and the hash of
            each; reading the configuration loads them.
    """

    # first: the names in the other fields may be those of a plug-in
    plugins: tuple[registry.Plugin, ...] = ()
    scale: str = "built-in world, 0.9M parameters"
    model: Subject = Field(default_factory=BuiltinConfig)
    methods: tuple[str, ...] = DEMO_METHODS
    checkpoints: dict[str, str] = Field(default_factory=dict)
    variants: dict[str, Variant] = Field(default_factory=dict)
    attacks: tuple[str, ...] = ()
    probes: tuple[str, ...] = ("triggers", "sharpness")
    settings: dict[str, dict[str, Value]] = Field(default_factory=dict)
    seeds: Seeds = (0, 1, 2)
    budget: float | None = Field(default=0.05, gt=0)
    budget_measure: DisruptionMeasure = "kl"
    budget_sets: tuple[str, ...] = ()
    alpha_limit: float = Field(default=2.0, gt=0, le=1000)
    attack: RelearnSettings = Field(default_factory=RelearnSettings)
    slice_points: int = Field(default=17, ge=3)
    slice_reach: float = Field(default=0.05, gt=0)
    rank: int = Field(default=32, ge=1)
    curvature_tolerance: float = Field(default=0.05, gt=0, lt=1)

    @field_validator("plugins")
    @classmethod
    def _loaded(cls, plugins: tuple[registry.Plugin, ...]) -> tuple[registry.Plugin, ...]:
        for plugin in plugins:
            try:
                registry.expect(plugin)
            except WorkbenchError as error:
                raise ValueError(str(error)) from error
        return plugins

    @field_validator("methods")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("name the methods, each once")
        return names

    @field_validator("attacks")
    @classmethod
    def _known_attacks(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in ATTACKS:
                raise ValueError(str(unknown("attack", name, ATTACKS)))
        if len({*names, "relearn"}) != len(names) + 1:
            raise ValueError("name every attack once, and not relearn, which every run has")
        return names

    @field_validator("probes")
    @classmethod
    def _known_probes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in PROBES:
                raise ValueError(str(unknown("probe", name, PROBES)))
        if len(set(names)) != len(names):
            raise ValueError("name every probe once")
        return names

    @model_validator(mode="after")
    def _stages_of_their_own(self) -> RunConfig:
        for name in set(self.attacks) & set(self.probes):
            raise ValueError(f"{name!r} is an attack and a probe; give one of them another name")
        return self

    @model_validator(mode="after")
    def _something_to_study(self) -> RunConfig:
        files = isinstance(self.model, FilesConfig)
        if not self.methods and not self.checkpoints:
            raise ValueError("methods are (); name at least one, each once")
        if self.checkpoints and not files:
            raise ValueError("checkpoints need a model of your own: base, forget and retain")
        taken = (*CONTROLS, *METHODS, *self.variants)
        values.labels("checkpoint", self.checkpoints, taken=taken)
        known = ("retain",) if files else RETAIN_SETS
        for name in self.budget_sets:
            if name not in known:
                raise ValueError(
                    f"budget_sets: there is no retain set {name!r}; choose among {', '.join(known)}"
                )
        return self

    @model_validator(mode="after")
    def _settings_of_known_methods(self) -> RunConfig:
        for name in self.methods:
            if not is_method(name) and name not in self.variants:
                raise ValueError(str(unknown("method", name, {**METHODS, **self.variants})))
        values.labels("variant", self.variants, taken=(*CONTROLS, *METHODS))
        for label in self.variants:
            if is_method(label) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
                raise ValueError(
                    f"variant {label!r} needs a name of its own, of letters, digits, dots and "
                    "dashes (it becomes a folder)"
                )
        named = [(variant.method, variant.settings) for variant in self.variants.values()]
        for name, overrides in [*self.settings.items(), *named]:
            if not is_method(name):
                raise ValueError(str(unknown("method", name, METHODS)))
            for key, value in overrides.items():
                try:
                    check_setting(name, key, value)
                except WorkbenchError as error:
                    raise ValueError(str(error)) from error
        at, steps = self.attack.measure_at, self.attack.steps
        values.increasing("attack.measure_at", at, start=0, end=steps)
        return self

    def variant(self, name: str) -> Variant:
        """What ``name`` in :attr:`methods` stands for, with all overrides of this run."""
        if name in self.variants:
            chosen = self.variants[name]
            return chosen.model_copy(
                update={"settings": self.settings.get(chosen.method, {}) | chosen.settings}
            )
        return Variant(method=name, settings=self.settings.get(name, {}))

    def plain(self) -> dict[str, Any]:
        """The configuration as plain values, ready for YAML or JSON."""
        dumped = self.model_dump(mode="json") | {"model": asdict(self.model)}
        empty = [name for name in ("plugins", "checkpoints", "attacks") if not dumped[name]]
        return {name: value for name, value in dumped.items() if name not in empty}

    def with_plugins(self) -> RunConfig:
        """The same configuration with the sources of what users added: the plug-ins that were
        loaded, and the functions defined elsewhere whose methods it runs.
        """
        methods, attacks, probes = METHODS.added(), ATTACKS.added(), PROBES.added()
        used = {innermost(self.variant(name).method) for name in self.methods}
        entries = [
            *(methods[name] for name in sorted(used & set(methods))),
            *(attacks[name] for name in self.attacks if name in attacks),
            *(probes[name] for name in self.probes if name in probes),
        ]
        sources = [registry.source_of(entry) for entry in entries]
        return self.model_copy(
            update={"plugins": tuple(dict.fromkeys([*registry.plugins(), *sources]))}
        )

    @property
    def studied(self) -> tuple[str, ...]:
        """The unlearned models by name: those that methods make, and those that are opened."""
        return (*self.methods, *self.checkpoints)

    @property
    def controls(self) -> tuple[str, ...]:
        """The models that nothing was unlearned from: the base, and the never-learned one if there
        is one.
        """
        known = not isinstance(self.model, FilesConfig) or self.model.never_learned is not None
        return CONTROLS if known else CONTROLS[:1]

    def once(self, name: str) -> bool:
        """Whether ``name`` is one model for all seeds."""
        return name not in self.methods

    @property
    def key(self) -> str:
        """A short key of everything in it."""
        return key_of(self.plain())


def preset(name: Literal["full", "quick"]) -> RunConfig:
    """``full`` is the demo; ``quick`` is the same pipeline on a smaller world with fewer steps, for
    tests, the notebook and a first look.
    """
    if name == "full":
        return RunConfig(settings=DEMO_SETTINGS)
    world = WorldConfig(
        forget_people=8, neighbour_people=12, islands=6, filler_train=1500, filler_test=80
    )
    return RunConfig(
        scale="quick: small built-in world, 0.4M parameters",
        model=BuiltinConfig(
            world=world, width=96, layers=3, mlp_width=256, steps=700, batch_size=24
        ),
        seeds=(0, 1),
        attack=RelearnSettings(steps=20, measure_at=(0, 2, 5, 10, 20)),
        settings={name: {"steps": 60 if name.startswith("rmu") else 30} for name in DEMO_METHODS},
        slice_points=9,
        rank=16,
        curvature_tolerance=0.1,
    )


def read_config(path: Path) -> RunConfig:
    """Read and validate a YAML file; what it leaves out has the demo's value, settings of methods
    that of the registry.

    Raises:
        WorkbenchError: the file is missing, is no YAML mapping, or a field is wrong; the message
            names the field and its value.
    """
    return validated(RunConfig, read_fields(path), str(path))


def write_config(config: RunConfig) -> str:
    """The configuration as YAML text."""
    return yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)
