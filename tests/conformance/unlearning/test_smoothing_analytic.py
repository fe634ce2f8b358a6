"""Step rules on a loss of six weights in float64, against closed forms and finite differences in
numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.unlearning.objectives import LossTerm, Objective, Pair
from workbench.unlearning.smoothing import (
    StepRule,
    asam,
    curvature_regularisation,
    gradient_penalty,
    plain,
    randomised_smoothing,
    sam,
)

Function = Callable[[np.ndarray], float]

RULES: dict[str, Callable[[], StepRule]] = {
    "sam": lambda: sam(0.2),
    "asam": lambda: asam(0.3),
    "rs": lambda: randomised_smoothing(0.03, 3, 5),
    "rs-antithetic": lambda: randomised_smoothing(0.03, 4, 5, antithetic=True),
    "gp": lambda: gradient_penalty(0.4),
    "gp-difference": lambda: gradient_penalty(0.4, exact=False),
    "cr": lambda: curvature_regularisation(0.6, 0.05),
}
every_rule = pytest.mark.parametrize("name", list(RULES))


class Analytic(nn.Module):
    """Six weights in two trainable parameters, between parameters that are frozen or unused; a
    third is used and frozen.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        make = lambda *shape: nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))  # noqa: E731
        self.unused, self.first, self.frozen, self.second = make(3), make(2), make(2), make(2, 2)
        self.frozen.requires_grad_(False)

    def vector(self) -> Tensor:
        return torch.cat([self.first, self.second.flatten()])


NOTHING = Pair(None, None)  # type: ignore[arg-type]  # the analytic loss reads no batch
DRAW = np.random.default_rng(3)
ROOT, LINEAR, TILT = DRAW.normal(size=(6, 6)), DRAW.normal(size=6), DRAW.normal(size=6)
MATRIX = ROOT + ROOT.T  # symmetric and indefinite


def quadratic(x: np.ndarray) -> float:
    return float(0.5 * x @ MATRIX @ x + LINEAR @ x)


def curved(x: np.ndarray) -> float:
    return quadratic(x) + float(0.1 * (x**4).sum() + np.exp(0.3 * TILT @ x))


def curved_gradient(x: np.ndarray) -> np.ndarray:
    return MATRIX @ x + LINEAR + 0.4 * x**3 + 0.3 * TILT * np.exp(0.3 * TILT @ x)


def curved_hessian(x: np.ndarray) -> np.ndarray:
    return MATRIX + np.diag(1.2 * x**2) + 0.09 * np.outer(TILT, TILT) * np.exp(0.3 * TILT @ x)


def _quadratic_term(model: Any, batch: Any, reference: Any) -> Tensor:
    x = model.vector()
    return (
        0.5 * x @ torch.from_numpy(MATRIX) @ x
        + torch.from_numpy(LINEAR) @ x
        + 0 * model.frozen.sum()
    )


def _curved_term(model: Any, batch: Any, reference: Any) -> Tensor:
    x = model.vector()
    return (
        _quadratic_term(model, batch, reference)
        + 0.1 * (x**4).sum()
        + torch.exp(0.3 * torch.from_numpy(TILT) @ x)
    )


def _linear_term(model: Any, batch: Any, reference: Any) -> Tensor:
    return torch.from_numpy(LINEAR) @ model.vector()


def _retain_term(model: Any, batch: Any, reference: Any) -> Tensor:
    return model.vector().cos().sum() + model.unused.sum()


def _point(model: Analytic) -> np.ndarray:
    return model.vector().detach().numpy().copy()


def _found(model: Analytic) -> np.ndarray:
    """The gradient that a step left on the six weights."""
    assert (
        model.first.grad is not None and model.second.grad is not None and model.frozen.grad is None
    )
    return torch.cat([model.first.grad, model.second.grad.flatten()]).numpy()


def _step(
    rule: StepRule, term: LossTerm, model: Any | None = None, retain: LossTerm | None = None
) -> tuple[np.ndarray, dict[str, float]]:
    model = Analytic() if model is None else model
    log = rule(model, Objective(term, retain), NOTHING, None)  # type: ignore[arg-type]
    return _found(model), log


def _slope(function: Function, x: np.ndarray, size: float = 1e-5) -> np.ndarray:
    """Central differences of a scalar function, weight by weight."""
    return np.array(
        [(function(x + size * e) - function(x - size * e)) / (2 * size) for e in np.eye(len(x))]
    )


def _draws(seed: int, samples: int) -> list[np.ndarray]:
    """The Gaussian numbers of the analytic model's weights, drawn in the order of the parameters
    that may change, the unused one among them.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(samples):
        parts = [torch.randn(shape, generator=generator) for shape in ((3,), (2,), (2, 2))]
        rows.append(torch.cat([part.flatten() for part in parts[1:]]).double().numpy())
    return rows


def _smoothed(name: str, x: np.ndarray) -> Function:
    """The scalar whose gradient at ``x`` the rule should leave, written out in numpy; perturbations
    that a rule holds fixed are fixed here.
    """
    g = curved_gradient(x)
    scale = np.abs(x) + 0.01

    def change(y: np.ndarray) -> float:
        there = y + 0.05 * curved_gradient(y) / np.linalg.norm(curved_gradient(y))
        return float(np.linalg.norm(curved_gradient(there) - curved_gradient(y)))

    return {
        "sam": lambda y: curved(y + 0.2 * g / np.linalg.norm(g)),
        "asam": lambda y: curved(y + 0.3 * scale**2 * g / np.linalg.norm(scale * g)),
        "rs": lambda y: float(np.mean([curved(y + 0.03 * d) for d in _draws(5, 3)])),
        "rs-antithetic": lambda y: float(
            np.mean([curved(y + s * 0.03 * d) for d in _draws(5, 2) for s in (1, -1)])
        ),
        "gp": lambda y: curved(y) + 0.4 * float(np.linalg.norm(curved_gradient(y))),
        "gp-difference": lambda y: curved(y) + 0.4 * float(np.linalg.norm(curved_gradient(y))),
        "cr": lambda y: curved(y) + 0.6 * change(y),
    }[name]


@every_rule
def test_the_gradient_is_the_finite_difference_of_the_smoothed_loss(name: str) -> None:
    x = _point(Analytic())
    expected = _slope(_smoothed(name, x), x)
    found, _ = _step(RULES[name](), _curved_term)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    # The test sees the smoothing: the loss as it is has another gradient.
    assert np.linalg.norm(expected - curved_gradient(x)) > 1e-4 * np.linalg.norm(expected)


@every_rule
def test_the_retain_term_is_added_at_the_present_weights(name: str) -> None:
    x, model = _point(Analytic()), Analytic()
    alone, _ = _step(RULES[name](), _curved_term)
    found, log = _step(RULES[name](), _curved_term, model, _retain_term)
    np.testing.assert_allclose(found - alone, -np.sin(x), atol=1e-12)
    assert torch.equal(model.unused.grad, torch.ones(3, dtype=torch.float64))  # type: ignore[arg-type]
    assert log["retain"] == pytest.approx(np.cos(x).sum() + float(model.unused.detach().sum()))


def test_the_gradient_penalty_is_the_gradient_and_a_hessian_product() -> None:
    x = _point(Analytic())
    g, hessian = curved_gradient(x), curved_hessian(x)
    for weight in (0.1, 3.0):
        found, log = _step(gradient_penalty(weight), _curved_term)
        np.testing.assert_allclose(found, g + weight * hessian @ g / np.linalg.norm(g), rtol=1e-12)
        assert log["gradient_norm"] == pytest.approx(np.linalg.norm(g)) and log[
            "penalty"
        ] == pytest.approx(weight * np.linalg.norm(g))


@pytest.mark.parametrize("mu", [1e-3, 0.5])
def test_on_a_quadratic_the_curvature_penalty_is_the_length_of_a_hessian_product(mu: float) -> None:
    x = _point(Analytic())
    g = MATRIX @ x + LINEAR
    v = g / np.linalg.norm(g)
    u = MATRIX @ v / np.linalg.norm(MATRIX @ v)
    found, log = _step(curvature_regularisation(0.7, mu), _quadratic_term)
    assert log["penalty"] == pytest.approx(0.7 * mu * np.linalg.norm(MATRIX @ v))
    # All of its gradient comes from the turning of v; with v held fixed there would be none.
    expected = 0.7 * mu / np.linalg.norm(g) * MATRIX @ (np.eye(6) - np.outer(v, v)) @ MATRIX @ u
    np.testing.assert_allclose(found - g, expected, atol=1e-9)


def test_the_curvature_penalty_is_a_hessian_product_to_first_order() -> None:
    x = _point(Analytic())
    g = curved_gradient(x)
    product = np.linalg.norm(curved_hessian(x) @ g / np.linalg.norm(g))
    errors = [
        abs(_step(curvature_regularisation(1.0, mu), _curved_term)[1]["penalty"] / mu - product)
        for mu in (1e-3, 1e-4)
    ]
    assert errors[0] < 1e-2 * product and errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


@pytest.mark.parametrize("name", ["rs", "rs-antithetic", "gp", "gp-difference", "cr"])
def test_a_linear_loss_is_smooth_already(name: str) -> None:
    found, log = _step(RULES[name](), _linear_term)
    np.testing.assert_allclose(found, LINEAR, rtol=1e-12)
    if name == "cr":
        assert log["penalty"] == pytest.approx(0, abs=1e-12)


def test_randomised_smoothing_is_unbiased_on_a_quadratic_with_an_error_that_falls_with_the_root_of_the_samples() -> (  # noqa: E501
    None
):
    x = _point(Analytic())
    base, sigma = MATRIX @ x + LINEAR, 0.5
    # The error is sigma * MATRIX @ mean(noise): its expected square is sigma^2 ||MATRIX||_F^2 /
    # samples.
    for samples in (4, 100):
        errors = [
            _step(randomised_smoothing(sigma, samples, seed), _quadratic_term)[0] - base
            for seed in range(60 if samples == 4 else 10)
        ]
        root = math.sqrt(np.mean([error @ error for error in errors]))
        assert root == pytest.approx(sigma * np.linalg.norm(MATRIX) / math.sqrt(samples), rel=0.25)


def test_antithetic_pairs_give_the_gradient_of_a_quadratic_exactly() -> None:
    found, log = _step(randomised_smoothing(0.5, 2, 0, antithetic=True), _quadratic_term)
    np.testing.assert_allclose(found, MATRIX @ _point(Analytic()) + LINEAR, rtol=1e-10)
    (noise,) = _draws(0, 1)
    assert log["rs_rise"] == pytest.approx(0.5 * 0.25 * noise @ MATRIX @ noise)


def test_the_adaptive_radius_is_relative_to_every_weight() -> None:
    model, seen = Analytic(), []

    def watching(model: Any, batch: Any, reference: Any) -> Tensor:
        seen.append(model.vector().detach().numpy().copy())
        return _curved_term(model, batch, reference)

    x = _point(model)
    _step(asam(0.3, eta=0.05), watching, model)
    assert np.linalg.norm((seen[1] - x) / (np.abs(x) + 0.05)) == pytest.approx(0.3)


def test_without_eta_the_adaptive_radius_is_blind_to_rescalings_that_leave_the_function_as_it_is() -> (  # noqa: E501
    None
):
    """``first * second[0]`` is the same when one is doubled and the other halved: so is the rise of
    ASAM, and not that of SAM.
    """

    def product(model: Any, batch: Any, reference: Any) -> Tensor:
        return (model.first * model.second[0]).square().sum() + (
            model.first * model.second[0]
        ).sum()

    def rise(rule: StepRule, factor: float) -> float:
        model = Analytic()
        with torch.no_grad():
            model.first.mul_(factor)
            model.second.div_(factor)
        return rule(model, Objective(product), NOTHING, None)["sam_rise"]  # type: ignore[arg-type]

    assert rise(asam(0.2, eta=0.0), 1.0) == pytest.approx(rise(asam(0.2, eta=0.0), 8.0), rel=1e-9)
    assert abs(rise(sam(0.2), 1.0) / rise(sam(0.2), 8.0) - 1) > 0.5


@every_rule
def test_where_the_gradient_vanishes_nothing_is_smoothed_and_nothing_is_divided_by_zero(
    name: str,
) -> None:
    def flat(model: Any, batch: Any, reference: Any) -> Tensor:
        return (0 * model.vector()).sum() + 2

    found, log = _step(RULES[name](), flat)
    assert not found.any()
    assert log["forget"] == 2 and all(math.isfinite(value) for value in log.values())


@pytest.mark.parametrize(
    "rule",
    [
        gradient_penalty(0.0),
        gradient_penalty(0.0, exact=False),
        curvature_regularisation(0.0, 0.1),
        randomised_smoothing(0.0, 2, 0),
    ],
)
def test_nothing_of_a_smoother_leaves_the_plain_step(rule: StepRule) -> None:
    expected, log = _step(plain, _curved_term, retain=_retain_term)
    found, smoothed = _step(rule, _curved_term, retain=_retain_term)
    np.testing.assert_array_equal(found, expected)
    assert smoothed["forget"] == log["forget"] and smoothed["retain"] == log["retain"]


@pytest.mark.parametrize(
    "rule",
    [
        lambda size: sam(size),
        lambda size: asam(size),
        lambda size: randomised_smoothing(size, 3, 0),
        lambda size: gradient_penalty(size),
        lambda size: curvature_regularisation(size, 0.1),
        lambda size: curvature_regularisation(0.3, size),
    ],
)
def test_the_difference_from_the_plain_step_shrinks_with_the_smoother(
    rule: Callable[[float], StepRule],
) -> None:
    expected, _ = _step(plain, _curved_term)
    far, near = (
        np.linalg.norm(_step(rule(size), _curved_term)[0] - expected) for size in (1e-3, 1e-5)
    )
    assert 0 < near == pytest.approx(far / 100, rel=0.2)


@pytest.mark.parametrize(
    "build",
    [
        *(
            partial(rule, value)
            for rule in (sam, asam, gradient_penalty)
            for value in (-0.1, math.nan, math.inf)
        ),
        partial(asam, 0.1, eta=-1.0),
        partial(curvature_regularisation, -1.0, 0.1),
        partial(curvature_regularisation, 1.0, 0.0),
        partial(randomised_smoothing, -1e-3, 3, 0),
        partial(randomised_smoothing, 1e-3, 0, 0),
        partial(randomised_smoothing, 1e-3, 3, 0, antithetic=True),
    ],
)
def test_sizes_that_the_formulas_do_not_allow_are_named(build: Callable[[], StepRule]) -> None:
    with pytest.raises(ValueError, match=r"^(rho|eta|weight|mu|sigma|samples) is"):
        build()


def test_a_term_that_reads_no_trainable_parameter_is_named() -> None:
    def still(model: Any, batch: Any, reference: Any) -> Tensor:
        return model.frozen.sum()

    for objective, word in (
        (Objective(still), "forget"),
        (Objective(_curved_term, still), "retain"),
    ):
        with pytest.raises(WorkbenchError, match=f"{word} term depends on no trainable parameter"):
            sam(0.1)(Analytic(), objective, NOTHING, None)  # type: ignore[arg-type]
