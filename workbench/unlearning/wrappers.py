"""What can be put around any method: smoothing of the forget term, noise on the reference,
averaging of the weights.

A wrapped method is named ``<method>-<wrapper>``: ``npo-sam``, ``adaptive-rmu-rna``,
``grad-diff-wa``; wrappers may be stacked (``npo-rna-sam``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import get_type_hints

from transformers import PreTrainedModel

from workbench.hooks import resolve
from workbench.unlearning.noise import noisy_reference
from workbench.unlearning.objectives import retain_cross_entropy
from workbench.unlearning.recipe import (
    Averaging,
    Count,
    Layer,
    Method,
    Recipe,
    Setting,
    middle_layer,
)
from workbench.unlearning.smoothing import (
    StepRule,
    asam,
    curvature_regularisation,
    gradient_penalty,
    plain,
    randomised_smoothing,
    sam,
)

Apply = Callable[..., Recipe]
"""``apply(recipe, model, seed, inner, **settings)``; ``inner`` are the settings of the method
inside.
"""


@dataclass(frozen=True, slots=True)
class Wrapper:
    """An entry of the registry of wrappers.

    Attributes:
        name: the last part of a method's name.
        title: likewise in figures and prose.
        source: paper.
        apply: makes the wrapped recipe; its keyword defaults are the published settings.
        small: settings for small models; see :class:`Method`.
        needs: settings that the method inside gets, where it has them.
    """

    name: str
    title: str
    source: str
    apply: Apply
    small: dict[str, Setting] = field(default_factory=dict)
    needs: Mapping[str, Setting] = field(default_factory=dict)


def _smoothed(recipe: Recipe, name: str, rule: StepRule) -> Recipe:
    if recipe.optimiser not in ("adamw", "sgd"):
        raise ValueError(
            f"{name} smooths the steps of adamw or sgd; this method's optimiser is "
            f"{recipe.optimiser}"
        )
    if recipe.step is not plain:
        raise ValueError(f"{name} cannot be put around a method that is smoothed already")
    return replace(recipe, step=rule)


def _sam(
    recipe: Recipe,
    model: PreTrainedModel,
    seed: int,
    inner: Mapping[str, Setting],
    *,
    rho: float = 0.01,
) -> Recipe:
    """Sharpness-aware minimisation of the forget term; see
    :func:`workbench.unlearning.smoothing.sam`.
    """
    return _smoothed(recipe, "SAM", sam(rho))


def _asam(
    recipe: Recipe,
    model: PreTrainedModel,
    seed: int,
    inner: Mapping[str, Setting],
    *,
    rho: float = 0.5,
) -> Recipe:
    """Adaptive SAM of the forget term; ``rho`` is relative to the weights' own sizes. See
    :func:`workbench.unlearning.smoothing.asam`.
    """
    return _smoothed(recipe, "ASAM", asam(rho))


def _randomised(
    recipe: Recipe,
    model: PreTrainedModel,
    seed: int,
    inner: Mapping[str, Setting],
    *,
    sigma: float = 1e-4,
    samples: Count = 3,
) -> Recipe:
    """Randomised smoothing of the forget term; see
    :func:`workbench.unlearning.smoothing.randomised_smoothing`. Its noise draws from ``seed + 2``.
    """
    return _smoothed(recipe, "randomised smoothing", randomised_smoothing(sigma, samples, seed + 2))


def _penalised(
    recipe: Recipe,
    model: PreTrainedModel,
    seed: int,
    inner: Mapping[str, Setting],
    *,
    penalty: float = 0.01,
) -> Recipe:
    """A penalty on the length of the forget gradient; see
    :func:`workbench.unlearning.smoothing.gradient_penalty`. The published runs' penalty had no
    gradient.
    """
    return _smoothed(recipe, "the gradient penalty", gradient_penalty(penalty))


def _regularised(
    recipe: Recipe,
    model: PreTrainedModel,
    seed: int,
    inner: Mapping[str, Setting],
    *,
    curvature: float = 10.0,
    mu: float = 0.01,
) -> Recipe:
    """A penalty on the forget loss's curvature along its gradient; see
    :func:`workbench.unlearning.smoothing.curvature_regularisation`. The published runs' had no
    gradient.
    """
    return _smoothed(recipe, "curvature regularisation", curvature_regularisation(curvature, mu))


def _average(
    recipe: Recipe,
    model: PreTrainedModel,
    seed: int,
    inner: Mapping[str, Setting],
    *,
    start: float = 0.8,
    every: Count = 5,
) -> Recipe:
    """Weight averaging; published: every 5 steps from step 100 of 125 on. See
    :class:`Averaging`.
    """
    if not 0 <= start < 1:
        raise ValueError(
            f"start is {start}; it is the share of the steps after which averaging begins, at "
            "least 0 and below 1"
        )
    if recipe.optimiser not in ("adamw", "sgd"):
        raise ValueError(
            "weight averaging needs the steps of adamw or sgd; this method's optimiser is "
            f"{recipe.optimiser}"
        )
    return replace(recipe, average=Averaging(start, every))


def _noise(
    recipe: Recipe,
    model: PreTrainedModel,
    seed: int,
    inner: Mapping[str, Setting],
    *,
    noise: float = 0.2,
    noise_layer: Layer = -1,
) -> Recipe:
    """Random noise augmentation; see :func:`workbench.unlearning.noise.noisy_reference`.

    Args:
        recipe: of the method inside.
        model: decides the depth.
        seed: of the training; the noise draws from ``seed + 1``.
        inner: settings of the method inside; its ``layer``, where it has one, is the default of
            ``noise_layer``.
        noise: ``nu sqrt(d) / mean ||h||``, where ``nu`` is the standard deviation of the noise; 0
            leaves the method as it is.
        noise_layer: block whose output in the frozen reference carries the noise; -1 takes the
            layer that the method steers, or 7/32 of the depth.
    """
    if noise == 0:
        return recipe
    if (
        recipe.objective.retain is None
        or recipe.objective.retain is retain_cross_entropy
        or recipe.teacher is not None
    ):
        raise ValueError(
            "RNA needs a retain term that compares with the frozen reference (a representation or "
            "a KL divergence); this method has none"
        )
    block = noise_layer if noise_layer >= 0 else int(inner.get("layer", -1))
    (site,) = resolve(
        model, f"blocks.{middle_layer(model) if block < 0 else block}.hook_resid_post"
    )
    return replace(
        recipe,
        objective=replace(
            recipe.objective, retain=noisy_reference(recipe.objective.retain, site, noise, seed + 1)
        ),
    )


_SMOOTH = "Fan et al. 2025 (arXiv 2502.05374)"
WRAPPERS: dict[str, Wrapper] = {
    wrapper.name: wrapper
    for wrapper in (
        Wrapper("sam", "SAM", _SMOOTH, _sam, {"rho": 0.02}),
        Wrapper("asam", "ASAM", "Kwon et al. 2021 (arXiv 2102.11600)", _asam, {"rho": 0.03}),
        Wrapper("rs", "RS", _SMOOTH, _randomised, {"sigma": 3e-4}),
        Wrapper("gp", "GP", _SMOOTH, _penalised),
        Wrapper("cr", "CR", _SMOOTH, _regularised, {"curvature": 0.03}),
        Wrapper("wa", "WA", _SMOOTH, _average),
        Wrapper("rna", "RNA", "Huu-Tien et al. (arXiv 2501.19202)", _noise, needs={"retain": "kl"}),
    )
}
"""Every wrapper by name. The small settings of the smoothings were chosen around NPO on world seed
100, one seed: the least recalled after the attack of two to five values each.
"""


def wrapped(inner: Method, wrapper: Wrapper) -> Method:
    """The method ``<inner>-<wrapper>``."""
    wrapper_settings = settings_of(wrapper)

    def build(model: PreTrainedModel, seed: int, **settings: Setting) -> Recipe:
        given_wrapper_settings = {
            key: settings.pop(key) for key in list(settings) if key in wrapper_settings
        }
        return wrapper.apply(
            inner.build(model, seed, **settings), model, seed, settings, **given_wrapper_settings
        )

    build.__doc__ = f"{inner.title} with {wrapper.title}. {wrapper.apply.__doc__}"
    build.__module__ = wrapper.apply.__module__
    inner_settings = all_settings(inner)
    changed = {key: value for key, value in wrapper.needs.items() if key in inner_settings}
    return Method(
        f"{inner.name}-{wrapper.name}",
        f"{inner.title}+{wrapper.title}",
        f"{inner.source}; {wrapper.source}",
        build,
        {**inner.small, **wrapper.small},
        wraps=wrapper.apply,
        fixed=inner.fixed,
        inner=inner,
        changed={**changed, **wrapper_settings},
    )


def settings_of(wrapper: Wrapper) -> dict[str, Setting]:
    """The wrapper's own settings with their published defaults."""
    return _defaults(wrapper.apply)


def all_settings(method: Method) -> dict[str, Setting]:
    """Every setting of a method with its published default: those of what it wraps, and its own."""
    found: dict[str, Setting] = {} if method.inner is None else all_settings(method.inner)
    for builder in (method.wraps, method.build):
        if builder is not None:
            found |= _defaults(builder)
    return {**found, **method.changed, **method.fixed}


def all_kinds(method: Method) -> dict[str, object]:
    """The annotated types of :func:`all_settings`."""
    found: dict[str, object] = {} if method.inner is None else all_kinds(method.inner)
    for builder in (method.wraps, method.build):
        if builder is not None:
            found |= get_type_hints(builder, include_extras=True)
    return found


def _defaults(function: Callable[..., object]) -> dict[str, Setting]:
    return {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.default is not inspect.Parameter.empty
    }
