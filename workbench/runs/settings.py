"""What the settings of all experiments share: one class whose fields are the options of the
command, the fields of a YAML file and the keywords in Python, and one way to say what is wrong with
a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from workbench import values
from workbench.attacks.relearn import RelearnSettings, at_steps
from workbench.errors import WorkbenchError, unknown
from workbench.unlearning.methods import METHODS, is_method

Model = TypeVar("Model", bound=BaseModel)


def _listed(value: object) -> object:
    """``a,b`` as the list that it stands for."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _counted(value: object) -> object:
    """A number of seeds as the seeds 0, 1, ...; ``3,`` or a list names them."""
    if isinstance(value, str) and "," not in value and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return tuple(range(values.whole("the number of seeds", value, low=1, high=100_000)))
    return _listed(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Words, separated by commas on a command line."""
Integers = Annotated[tuple[int, ...], BeforeValidator(_listed)]
"""Whole numbers, separated by commas on a command line."""
Numbers = Annotated[tuple[float, ...], BeforeValidator(_listed)]
"""Numbers, separated by commas on a command line."""
Count = Annotated[int, Field(ge=1, le=values.MOST_STEPS)]
"""A number of steps, texts, draws: at least one."""
Rate = Annotated[float, Field(gt=0, le=values.LARGEST_RATE)]
"""A learning rate."""


def _pairs(value: object) -> object:
    """``question=NAME,answer=NAME`` as the mapping that it stands for."""
    if not isinstance(value, str):
        return value
    found = dict(part.partition("=")[::2] for part in value.split(","))
    if not all(found.values()) or "" in found:
        raise ValueError("it must read question=NAME,answer=NAME or text=NAME")
    return found


Columns = Annotated[dict[str, str], BeforeValidator(_pairs)]
"""Columns of a file by what they hold: ``question=NAME,answer=NAME`` on a command line."""
Seeds = Annotated[tuple[int, ...], BeforeValidator(_counted)]
"""How many seeds (3 means 0, 1 and 2), or which, separated by commas."""


class Settings(BaseModel):
    """Settings of an experiment: frozen, without unknown fields, without infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("seeds", check_fields=False)
    @classmethod
    def _distinct_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError("give at least one seed, each once, none negative")
        for seed in seeds:
            values.seed("a seed", seed)
        return seeds

    @field_validator("method", check_fields=False)
    @classmethod
    def _known_method(cls, method: str) -> str:
        if not is_method(method):
            raise ValueError(str(unknown("method", method, METHODS)))
        return method


class FinishedRunSettings(Settings):
    """Settings of an experiment on the models of a finished run.

    Attributes:
        methods: of the run; default all of them.
    """

    methods: Names = Field((), description="Methods of that run, separated by commas; default all.")


class AttackOverrides(Settings):
    """Settings of an experiment that relearns; what is left out is as in the attack that it starts
    from.

    Attributes:
        attack_steps: optimiser steps.
        attack_lr: learning rate.
        attack_batch_size: sequences a step.
        attack_measure_at: steps after which the attacked model is measured, from 0 to the last.
        attack_optimiser: ``adamw`` or ``sgd``.
        attack_lora_rank: rank of adapters; 0 trains the model's own parameters.
        attack_precision: of the attacked weights.
        attack_texts: the attacker has the first so many texts; 0 means all.
    """

    attack_steps: Count | None = Field(None, description="Steps of every relearning attack.")
    attack_lr: Rate | None = Field(None, description="Its learning rate.")
    attack_batch_size: Count | None = Field(None, description="Its texts a step.")
    attack_measure_at: Integers | None = Field(
        None,
        description="Steps after which it is measured, from 0 to the last; default doubles.",
    )
    attack_optimiser: Literal["adamw", "sgd"] | None = Field(None, description="adamw or sgd.")
    attack_lora_rank: int | None = Field(
        None, ge=0, le=values.MOST_STEPS, description="Rank of its adapters; 0: all parameters."
    )
    attack_precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="Of the attacked weights: float32 or bfloat16."
    )
    attack_texts: int | None = Field(
        None, ge=0, le=values.MOST_STEPS, description="It has the first so many texts; 0: all."
    )

    @model_validator(mode="after")
    def _measured_within(self) -> Self:
        at = self.attack_measure_at
        if at is not None:
            end = self.attack_steps or (at[-1] if at else 0)
            values.increasing("attack_measure_at", at, start=0, end=end)
        return self

    def attack_from(self, start: RelearnSettings) -> RelearnSettings:
        """The attack ``start`` with what these settings change of it.

        Raises:
            WorkbenchError: the steps at which it is measured do not end with it.
        """
        given_fields = self.model_dump(exclude_none=True)
        changes = {
            name.removeprefix("attack_"): value
            for name, value in given_fields.items()
            if name.startswith("attack_")
        }
        if changes.get("steps", start.steps) != start.steps:
            changes = {"measure_at": at_steps(changes["steps"], start.lr).measure_at} | changes
        attack = replace(start, **changes)
        values.increasing("attack_measure_at", attack.measure_at, start=0, end=attack.steps)
        return attack


class AttackChoice(AttackOverrides):
    """Settings of a run: the relearning attack, and which others there are.

    Attributes:
        attack: names from the registry.
    """

    attack: list[str] = Field(
        [],
        description="Put every model under this attack besides relearning (relearn-lora, "
        "relearn-sgd, one of your own); repeatable.",
    )


def validated(
    model: type[Model], fields: Mapping[str, Any], origin: str, *, options: bool = False
) -> Model:
    """Settings from plain fields.

    Args:
        model: their class.
        fields: by name.
        origin: where they come from: a file, or a command.
        options: name them as options of a command.

    Raises:
        WorkbenchError: a field is unknown, missing or wrong; the message names it and its value.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # a rule over all fields names what is wrong by itself
            raise WorkbenchError(f"{origin}: {message}") from error
        given_value = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        # without the tag of a union
        field_path = [str(part) for part in first["loc"] if part not in ("builtin", "files")]
        name = "--" + field_path[0].replace("_", "-") if options else ".".join(field_path)
        raise WorkbenchError(f"{origin}: {name}: {message}{given_value}") from error


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        WorkbenchError: the file is missing, or holds no mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WorkbenchError(f"there is no configuration file {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise WorkbenchError(f"{path} is no readable YAML file: {reason}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        type_name = type(loaded).__name__
        raise WorkbenchError(f"{path} must hold 'field: value' lines; it holds {type_name}")
    return loaded


__all__ = [
    "AttackOverrides",
    "Columns",
    "Count",
    "FinishedRunSettings",
    "Integers",
    "Names",
    "Numbers",
    "Rate",
    "Seeds",
    "Settings",
    "read_fields",
    "validated",
]
