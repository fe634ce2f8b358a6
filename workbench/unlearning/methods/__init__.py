"""The registry of unlearning methods; one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from workbench import values
from workbench.errors import WorkbenchError, unknown
from workbench.registry import Registry
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
from workbench.unlearning.recipe import (
    Method,
    MethodBuilder,
    Recipe,
    Setting,
    Stop,
    stopped_at_budget,
)
from workbench.unlearning.wrappers import WRAPPERS, all_kinds, all_settings, wrapped

METHODS: Registry[Method] = Registry("method", __name__, "workbench.methods")
METHODS.own(
    [
        grad_ascent.METHOD,
        grad_diff.METHOD,
        kl_min.METHOD,
        npo.METHOD,
        replace(wrapped(npo.METHOD, WRAPPERS["sam"]), colour="#0072B2"),
        simnpo.METHOD,
        idk.METHOD,
        idk.METHOD_NLL,
        rmu.METHOD,
        replace(wrapped(rmu.METHOD, WRAPPERS["rna"]), colour="#CC79A7"),
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
    ]
)
SMALL_MODEL = 100_000_000
"""Below this many parameters a method starts from its ``small`` settings."""
STOP: dict[str, Setting] = {"stop": "steps"}
"""The setting that every method with steps has beside its own; see :class:`Recipe`."""


def method(
    name: str,
    *,
    title: str = "",
    source: str = "",
    small: Mapping[str, Setting] | None = None,
    colour: str = "",
) -> Callable[[MethodBuilder], MethodBuilder]:
    """Decorate a function that makes a recipe: from then on it is a method like the workbench's
    own, in sweeps, tables, figures, claims and the report.

    Args:
        name: in commands, tables and file names.
        title: in figures and prose; default the name.
        source: the paper.
        small: settings for models below 100 million parameters.
        colour: in every figure, ``#RRGGBB``.

    The function is called as ``build(model, seed, **settings)``; its keyword arguments with their
    defaults are the method's settings, checked by their annotations (see
    :func:`workbench.values.allowed`).

    Raises:
        WorkbenchError: the workbench has a method of this name.

    >>> from workbench.unlearning.objectives import Objective, negative_cross_entropy
    >>> from workbench.unlearning.recipe import EVERYTHING, Steps
    >>> @method("short-ascent")
    ... def short_ascent(model, seed, *, lr: float = 1e-5, steps: Steps = 5):
    ...     return Recipe(Objective(negative_cross_entropy), EVERYTHING, steps, 16, lr)
    >>> known_settings("short-ascent")
    {'lr': 1e-05, 'steps': 5, 'stop': 'steps'}
    """

    def register(build: MethodBuilder) -> MethodBuilder:
        values.labels("method", [name], taken=("base", "never-learned", "unlearned"))
        METHODS.add(Method(name, title or name, source, build, dict(small or {}), colour=colour))
        return build

    return register


def find_method(name: str) -> Method:
    """The method called ``name``, or the method and wrappers that ``name`` is made of
    (``adaptive-rmu-rna``).

    Raises:
        WorkbenchError: there is none; the message lists the nearest names.
    """
    if name in METHODS:
        return METHODS[name]
    inner, _, last = name.rpartition("-")
    if last in WRAPPERS and is_method(inner):
        return wrapped(find_method(inner), WRAPPERS[last])
    raise unknown(
        "method",
        name,
        [*METHODS, *(f"{registered}-{wrapper}" for registered in METHODS for wrapper in WRAPPERS)],
    )


def is_method(name: str) -> bool:
    """Is there a method of this name, wrapped or not?"""
    inner, _, last = name.rpartition("-")
    return name in METHODS or (last in WRAPPERS and is_method(inner))


def innermost(name: str) -> str:
    """The method inside all wrappers: ``npo`` of ``npo-rna-sam``. A name of no method (the label of
    a variant) stands for itself.
    """
    if not is_method(name):
        return name
    entry = find_method(name)
    while entry.inner is not None:
        entry = entry.inner
    return entry.name


def known_settings(name: str) -> dict[str, Setting]:
    """Every setting of a method with its published default (wrappers inherit those of the method
    they wrap).
    """
    own = all_settings(find_method(name))
    return own | STOP if "steps" in own else own


def _kinds(name: str) -> dict[str, object]:
    """The annotated type of every setting."""
    return all_kinds(find_method(name)) | {"stop": Stop}


def check_setting(name: str, key: str, value: Setting) -> Setting:
    """``value`` as the setting ``key`` of the method ``name``, as far as that can be said without a
    model.

    Raises:
        WorkbenchError: the method has no such setting, or it cannot have this value.
    """
    settings_known = known_settings(name)
    if key not in settings_known:
        raise unknown(f"setting of {name}", key, settings_known)
    return values.setting(key, name, _kinds(name).get(key), value)


def settings_for(
    name: str, model: PreTrainedModel, overrides: Mapping[str, Setting] | None = None
) -> dict[str, Setting]:
    """The settings that :func:`recipe` will use: published, small where the model is small, then
    ``overrides``.

    Raises:
        WorkbenchError: an override names no setting of the method, or is no number.
    """
    settings = known_settings(name)
    if model.num_parameters() < SMALL_MODEL:
        settings = {**settings, **find_method(name).small, **find_method(name).fixed}
    for key, value in (overrides or {}).items():
        if key not in settings:
            raise unknown(f"setting of {name}", key, settings)
        if key in find_method(name).fixed and value != find_method(name).fixed[key]:
            raise WorkbenchError(
                f"setting {key} of {name} is fixed at {find_method(name).fixed[key]}: that is what "
                f"makes it {name}; take the method it derives from instead"
            )
        settings[key] = value
    kinds = _kinds(name)
    return {
        key: values.setting(key, name, kinds.get(key), value) for key, value in settings.items()
    }


def recipe(
    name: str, model: PreTrainedModel, seed: int, overrides: Mapping[str, Setting] | None = None
) -> Recipe:
    """Build the recipe of a method for ``model``."""
    settings = settings_for(name, model, overrides)
    stop = settings.pop("stop", "steps")
    try:
        with METHODS.users(innermost(name)):
            built = find_method(name).build(model, seed, **settings)
        return stopped_at_budget(built) if stop == "budget" else built
    except ValueError as error:  # a number that the formula does not allow
        raise WorkbenchError(f"{name}: {error}") from error
