"""The registry of unlearning methods; one file each."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from workbench import values
from workbench.errors import WorkbenchError, unknown
from workbench.unlearning.methods import (
    cir,
    circuit_breakers,
    grad_ascent,
    grad_diff,
    idk,
    kl_min,
    mlp_breaking,
    npo,
    repselect,
    rmu,
    scrub,
    simnpo,
    task_vector,
    undial,
    whp,
)
from workbench.unlearning.objectives import RETAIN_TERMS
from workbench.unlearning.recipe import Method, Recipe, Setting, stopped_at_budget
from workbench.unlearning.wrappers import WRAPPERS, all_settings, wrapped

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        grad_ascent.METHOD,
        grad_diff.METHOD,
        kl_min.METHOD,
        npo.METHOD,
        wrapped(npo.METHOD, WRAPPERS["sam"]),
        simnpo.METHOD,
        idk.METHOD,
        idk.METHOD_NLL,
        rmu.METHOD,
        wrapped(rmu.METHOD, WRAPPERS["rna"]),
        rmu.METHOD_ADAPTIVE,
        rmu.METHOD_RSV,
        circuit_breakers.METHOD,
        scrub.METHOD,
        undial.METHOD,
        task_vector.METHOD,
        whp.METHOD,
        mlp_breaking.METHOD,
        cir.METHOD,
        cir.METHOD_UNCOLLAPSED,
        repselect.METHOD,
    )
}
SMALL_MODEL = 100_000_000
"""Below this many parameters a method starts from its ``small`` settings."""
WHOLE = {"steps": 1, "batch_size": 1, "refresh": 1, "activation_components": 0, "gradient_components": 0, "layer": -1, "first_layer": -1, "last_layer": -1,
    "noise_layer": -1, "every": 1, "samples": 1, "components": 1, "adversary_rank": 0, "horizon": 1, "turn": 1, "reinforce_steps": 1,
}  # fmt: skip
"""Settings that are whole numbers, with the smallest value allowed."""

WORDS = {
    "loss": ("mlp-breaking", "npo"), "kind": ("hard", "soft", "quadratic"), "statistics": ("forget", "retain"), "optimiser": ("adamw", "sgd"),
    "retain": tuple(RETAIN_TERMS), "stop": ("steps", "budget"),
}  # fmt: skip
"""Settings that are words, with the words allowed."""
STOP: dict[str, Setting] = {"stop": "steps"}
"""The setting that every method with steps has beside its own; see :class:`Recipe`."""


def method(name: str) -> Method:
    """The method called ``name``, or the method and wrappers that ``name`` is made of (``adaptive-rmu-rna``).

    Raises:
        WorkbenchError: there is none; the message lists the nearest names.
    """
    if name in METHODS:
        return METHODS[name]
    inner, _, last = name.rpartition("-")
    if last in WRAPPERS and is_method(inner):
        return wrapped(method(inner), WRAPPERS[last])
    raise unknown(
        "method", name, [*METHODS, *(f"{one}-{wrapper}" for one in METHODS for wrapper in WRAPPERS)]
    )


def is_method(name: str) -> bool:
    """Is there a method of this name, wrapped or not?"""
    inner, _, last = name.rpartition("-")
    return name in METHODS or (last in WRAPPERS and is_method(inner))


def innermost(name: str) -> str:
    """The method inside all wrappers: ``npo`` of ``npo-rna-sam``. A name of no method (the label of a variant) stands for itself."""
    if not is_method(name):
        return name
    found = method(name)
    while found.inner is not None:
        found = found.inner
    return found.name


def known_settings(name: str) -> dict[str, Setting]:
    """Every setting of a method with its published default (wrappers inherit those of the method they wrap)."""
    own = all_settings(method(name))
    return own | STOP if "steps" in own else own


def check_setting(name: str, key: str, value: Setting) -> None:
    """Raise unless ``value`` can be what ``key`` of the method ``name`` is set to, as far as that can be said without a model.

    Raises:
        WorkbenchError: the method has no such setting, or a word is none of those allowed.
    """
    known = known_settings(name)
    if key not in known:
        raise unknown(f"setting of {name}", key, known)
    if key in WORDS and isinstance(value, str) and value not in WORDS[key]:
        raise unknown(f"{key} of {name}", value, WORDS[key])


def settings_for(
    name: str, model: PreTrainedModel, overrides: Mapping[str, Setting] | None = None
) -> dict[str, Setting]:
    """The settings that :func:`recipe` will use: published, small where the model is small, then ``overrides``.

    Raises:
        WorkbenchError: an override names no setting of the method, or is no number.
    """
    settings = known_settings(name)
    if model.num_parameters() < SMALL_MODEL:
        settings = {**settings, **method(name).small, **method(name).fixed}
    for key, value in (overrides or {}).items():
        if key not in settings:
            raise unknown(f"setting of {name}", key, settings)
        if key in method(name).fixed and value != method(name).fixed[key]:
            raise WorkbenchError(
                f"setting {key} of {name} is fixed at {method(name).fixed[key]}: that is what makes it {name}; take the method it derives from instead"
            )
        expected = "a word" if isinstance(settings[key], str) else "a number"
        if isinstance(value, bool) or isinstance(value, str) != isinstance(settings[key], str):
            raise WorkbenchError(f"setting {key} of {name} is {value!r}; it must be {expected}")
        settings[key] = value
    for key, value in settings.items():
        if key in WORDS and value not in WORDS[key]:
            raise unknown(f"{key} of {name}", str(value), WORDS[key])
        if key in WHOLE:
            most = values.MOST_ROWS if key == "batch_size" else values.MOST_STEPS
            what = f"setting {key} of {name}"
            settings[key] = values.whole(what, value, low=WHOLE[key], high=most)
        elif not isinstance(value, str):
            most_of = values.LARGEST_RATE if key == "lr" else values.LARGEST
            values.number(f"setting {key} of {name}", value, low=0, high=most_of)
    return settings


def recipe(
    name: str, model: PreTrainedModel, seed: int, overrides: Mapping[str, Setting] | None = None
) -> Recipe:
    """Build the recipe of a method for ``model``."""
    settings = settings_for(name, model, overrides)
    stop = settings.pop("stop", "steps")
    try:
        made = method(name).build(model, seed, **settings)
        return stopped_at_budget(made) if stop == "budget" else made
    except ValueError as error:  # a number that the formula does not allow
        raise WorkbenchError(f"{name}: {error}") from error
