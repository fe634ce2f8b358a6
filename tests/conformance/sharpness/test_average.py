"""The average case against the moments of a quadratic in Gaussian variables, and rescalings that
leave the function of a model as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.sharpness.average import (
    AVERAGE_COLUMNS,
    MEANS,
    mean_changes,
    noise_changes,
    paired_difference,
)
from workbench.sharpness.probe import LossSource
from workbench.sharpness.slices import mean_loss

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Parts = Callable[[PreTrainedModel], tuple[Tensor]]

NAME = "model.norm.weight"  # the sixteen numbers that the analytic losses are functions of
SPECTRUM = np.array(
    [-10.0, -4.0, -1.0, -0.5, 0.0, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0]
)


def _matrix() -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))
    return np.asarray(rotation @ np.diag(SPECTRUM) @ rotation.T)


def _quadratic(model: PreTrainedModel, matrix: np.ndarray, slope: np.ndarray) -> Parts:
    """``1 + slope' e + e' matrix e / 2`` of the displacement ``e`` from the present weights."""
    start = model.get_parameter(NAME).detach().double().clone()
    a, b = torch.from_numpy(matrix), torch.from_numpy(slope)

    def loss(moved: PreTrainedModel) -> tuple[Tensor]:
        e = moved.get_parameter(NAME).double() - start
        return (1 + b @ e + 0.5 * e @ a @ e,)

    return loss


def _odd_weights(model: PreTrainedModel) -> np.ndarray:
    """Weights of very different sizes and both signs."""
    with torch.no_grad():
        model.get_parameter(NAME).copy_(torch.linspace(-2, 3, 16))
    return np.asarray(model.get_parameter(NAME).detach().double().numpy())


@pytest.mark.parametrize("adaptive", [False, True])
def test_mean_and_variance_on_a_quadratic_are_those_of_a_quadratic_form_in_gaussian_variables(
    adaptive: bool, llama: PreTrainedModel
) -> None:
    weights = _odd_weights(llama)
    matrix, slope, sigma, draws = _matrix(), np.random.default_rng(1).standard_normal(16), 0.3, 2000
    changes = noise_changes(
        llama,
        {"forget": _quadratic(llama, matrix, slope)},
        [sigma],
        draws=draws,
        adaptive=adaptive,
        parameters=[NAME],
    )
    scale = np.abs(weights) if adaptive else np.ones(16)
    a, b = matrix * np.outer(scale, scale), slope * scale
    # E (b'e + e'Ae/2) = s^2/2 tr A; Var = s^2 |b|^2 + s^4/2 |A|_F^2
    mean, variance = sigma**2 / 2 * np.trace(a), sigma**2 * b @ b + sigma**4 / 2 * (a**2).sum()
    (row,) = mean_changes(changes).itertuples(index=False)
    assert row.mean == pytest.approx(mean, abs=4 * (variance / draws) ** 0.5)
    assert row.se == pytest.approx((variance / draws) ** 0.5, rel=0.15)
    assert row.draws == draws
    assert row.base == pytest.approx(1.0)
    # Draws are independent: means of tens scatter as they should.
    tens = changes["change"].to_numpy().reshape(-1, 10).mean(1)
    assert tens.var(ddof=1) == pytest.approx(variance / 10, rel=0.35)


def test_a_linear_loss_has_no_mean_change_and_a_mean_absolute_one(llama: PreTrainedModel) -> None:
    slope = np.random.default_rng(1).standard_normal(16)
    changes = noise_changes(
        llama,
        {"forget": _quadratic(llama, np.zeros((16, 16)), slope)},
        [0.5],
        draws=1000,
        parameters=[NAME],
    )
    (row,) = mean_changes(changes).itertuples(index=False)
    length = 0.5 * float(np.linalg.norm(slope))
    assert row.mean == pytest.approx(0.0, abs=4 * length / 1000**0.5)
    # E |N(0, l^2)| = l sqrt(2 / pi), and its variance l^2 (1 - 2 / pi)
    assert row.mean_absolute == pytest.approx(
        length * (2 / np.pi) ** 0.5, abs=4 * length * ((1 - 2 / np.pi) / 1000) ** 0.5
    )
    assert row.se_absolute == pytest.approx(length * ((1 - 2 / np.pi) / 1000) ** 0.5, rel=0.15)


def test_relative_is_the_expected_length_over_that_of_the_weights_that_move(
    llama: PreTrainedModel,
) -> None:
    weights = _odd_weights(llama)
    losses = {"forget": _quadratic(llama, _matrix(), np.zeros(16))}
    found = noise_changes(llama, losses, [0.1], draws=1, parameters=[NAME])
    assert found["relative"].to_numpy() == pytest.approx([0.1 * 4 / np.linalg.norm(weights)])
    whole = torch.cat([parameter.detach().double().flatten() for parameter in llama.parameters()])
    assert noise_changes(llama, losses, [0.1], draws=1)["relative"].to_numpy() == pytest.approx(
        [0.1 * len(whole) ** 0.5 / float(whole.norm())]
    )
    # E sum (s theta_i xi_i)^2 = s^2 ||theta||^2
    assert noise_changes(llama, losses, [0.1], draws=1, adaptive=True)["relative"].tolist() == [0.1]


def test_all_losses_and_all_sigmas_see_the_same_draws(llama: PreTrainedModel) -> None:
    slope, flat = np.random.default_rng(1).standard_normal(16), np.zeros((16, 16))
    losses = {"one": _quadratic(llama, flat, slope), "three": _quadratic(llama, flat, 3 * slope)}
    found = noise_changes(llama, losses, [0.1, 0.2], draws=5)
    assert list(found.columns) == list(AVERAGE_COLUMNS)
    wide = found.pivot_table(index="draw", columns=["sigma", "loss"], values="change")
    assert wide.shape == (5, 4)
    np.testing.assert_allclose(wide[0.1, "three"], 3 * wide[0.1, "one"], rtol=1e-4)
    np.testing.assert_allclose(wide[0.2, "one"], 2 * wide[0.1, "one"], rtol=1e-4)
    assert wide[0.1, "one"].nunique() == 5


def test_a_seed_decides_the_draws_and_global_randomness_does_not(
    llama: PreTrainedModel, batch: Batch
) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = noise_changes(llama, {"forget": [batch]}, [0.01], draws=3, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    pd.testing.assert_frame_equal(
        noise_changes(llama, {"forget": [batch]}, [0.01], draws=3, seed=4), first
    )
    other = noise_changes(llama, {"forget": [batch]}, [0.01], draws=3, seed=5)
    assert not set(other["change"]) & set(
        first["change"]
    )  # nor is seed 5, draw 0 the same as seed 4, draw 1
    longer = noise_changes(llama, {"forget": [batch]}, [0.01], draws=5, seed=4)
    pd.testing.assert_frame_equal(longer.head(3), first)


def test_no_noise_changes_nothing(llama: PreTrainedModel, batch: Batch) -> None:
    found = noise_changes(llama, {"forget": [batch]}, [0.0], draws=2)
    assert found["change"].tolist() == [0.0, 0.0]
    assert found["relative"].tolist() == [0.0, 0.0]
    assert set(found["base"]) == {mean_loss(llama, [batch])}


def test_adaptive_noise_does_not_see_a_rescaling_inside_the_mlp_and_plain_noise_does(
    make_model: ModelMaker, batch: Batch
) -> None:
    plain, rescaled = make_model(), make_model()
    factors = torch.exp2(torch.tensor([3.0, -2.0, 1.0, 0.0] * 6))  # powers of two: exact
    with torch.no_grad():
        for layer in rescaled.model.layers:
            layer.mlp.up_proj.weight *= factors[:, None]
            layer.mlp.down_proj.weight /= factors
    values = {
        adaptive: [
            noise_changes(model, {"forget": [batch]}, [0.2], draws=4, adaptive=adaptive)["change"]
            for model in (plain, rescaled)
        ]
        for adaptive in (True, False)
    }
    np.testing.assert_allclose(values[True][1], values[True][0], atol=1e-5)
    assert np.abs(values[False][1] - values[False][0]).max() > 0.05


def test_weights_of_zero_get_no_adaptive_noise_and_only_the_named_parameters_get_any(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with torch.no_grad():
        llama.get_parameter(NAME)[3] = 0
    before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
    seen: list[dict[str, Tensor]] = []

    def watch(model: PreTrainedModel) -> tuple[Tensor]:
        seen.append(
            {
                name: parameter.detach() - before[name]
                for name, parameter in model.named_parameters()
            }
        )
        return (cross_entropy(model, batch),)

    noise_changes(
        llama, {"forget": watch}, [0.1], draws=1, adaptive=True, parameters=["*norm.weight"]
    )
    moved = {name for name, change in seen[-1].items() if change.any()}
    assert moved == {name for name in before if name.endswith("norm.weight")}
    assert seen[-1][NAME][3] == 0
    assert (seen[-1][NAME] != 0).sum() == 15


def test_means_and_errors_by_hand() -> None:
    changes = pd.DataFrame(
        [
            ("gaussian", 0.1, 0.2, draw, "forget", 3.0, value)
            for draw, value in enumerate([1.0, -2.0, 4.0])
        ],
        columns=list(AVERAGE_COLUMNS),
    )
    found = mean_changes(changes)
    assert list(found.columns) == list(MEANS)
    (row,) = found.itertuples(index=False)
    assert (row.mean, row.mean_absolute, row.draws) == pytest.approx((1.0, 7 / 3, 3))
    # squares around the means: 0 + 9 + 9 and 16/9 + 1/9 + 25/9; over n - 1 = 2, over n = 3
    assert row.se == pytest.approx((18 / 2 / 3) ** 0.5)
    assert row.se_absolute == pytest.approx((42 / 9 / 2 / 3) ** 0.5)
    assert np.isnan(mean_changes(changes.head(1))["se"]).all()


def test_paired_differences_are_taken_draw_by_draw() -> None:
    first, second = (
        pd.DataFrame(
            [
                ("gaussian", 0.1, 0.2, draw, "forget", 3.0, value)
                for draw, value in enumerate(values)
            ],
            columns=list(AVERAGE_COLUMNS),
        )
        for values in ([1.0, 11.0, 21.0], [0.0, 9.0, 18.0])
    )
    (row,) = paired_difference(first, second.sample(frac=1, random_state=0)).itertuples(index=False)
    assert row.mean == pytest.approx(2.0)
    assert row.se == pytest.approx(
        (1 / 3) ** 0.5
    )  # differences 1, 2, 3, although the values scatter by 10
    assert row.draws == 3
    with pytest.raises(WorkbenchError, match="same draws"):
        paired_difference(first, second.head(2))
    with pytest.raises(WorkbenchError, match="same draws"):
        paired_difference(first, second.assign(sigma=0.2))


def test_a_model_against_itself_has_a_paired_difference_of_exactly_zero(
    llama: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    losses: dict[str, LossSource] = {"forget": [batch], "retain": [make_batch((5, 4), seed=7)]}
    one, two = (noise_changes(llama, losses, [0.01, 0.1], draws=3) for _ in range(2))
    found = paired_difference(one, two)
    assert len(found) == 4
    assert (found[["mean", "se"]] == 0).all().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_comes_back_bit_by_bit_and_small_noise_is_not_rounded_away(
    dtype: torch.dtype, make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model().to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = noise_changes(model, {"forget": [batch]}, [1e-4], draws=3)
    assert all(
        torch.equal(p, before[name]) and p.dtype == dtype and p.grad is None
        for name, p in model.named_parameters()
    )
    expected = noise_changes(make_model().to(dtype).float(), {"forget": [batch]}, [1e-4], draws=3)
    np.testing.assert_allclose(found["change"], expected["change"], atol=2e-6)
    assert np.abs(found["change"]).min() > 1e-5


def test_the_weights_come_back_when_a_loss_fails(llama: PreTrainedModel, batch: Batch) -> None:
    before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}

    def breaks(model: PreTrainedModel) -> tuple[Tensor]:
        if not torch.equal(model.get_parameter(NAME), before[NAME]):
            raise KeyboardInterrupt
        return (cross_entropy(model, batch),)

    with pytest.raises(KeyboardInterrupt):
        noise_changes(llama, {"forget": breaks}, [0.1])
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_wrong_arguments_are_named(llama: PreTrainedModel, batch: Batch) -> None:
    for changes, message in (
        ({"sigmas": [-1.0]}, "sigmas"),
        ({"sigmas": []}, "sigmas"),
        ({"draws": 0}, "draws"),
        ({"parameters": ["*.mpl.*"]}, "mpl"),
    ):
        arguments: dict[str, object] = {"sigmas": [0.1], **changes}
        with pytest.raises(WorkbenchError, match=message):
            noise_changes(llama, {"forget": [batch]}, **arguments)  # type: ignore[arg-type]
    with pytest.raises(WorkbenchError, match="no loss"):
        noise_changes(llama, {}, [0.1])
    with pytest.raises(WorkbenchError, match="trainable"):
        noise_changes(llama.requires_grad_(requires_grad=False), {"forget": [batch]}, [0.1])
    with pytest.raises(WorkbenchError, match="eval"):
        noise_changes(llama.train(), {"forget": [batch]}, [0.1])
