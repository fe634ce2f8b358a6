"""The worst case in a ball against linear losses, trust regions of known spectra, and rescalings
that leave the function of a model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.sharpness.drop import WORST_CASE_COLUMNS, worst_case
from workbench.sharpness.probe import LossSource
from workbench.sharpness.slices import mean_loss

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Parts = Callable[[PreTrainedModel], tuple[Tensor]]

NAME = "model.norm.weight"  # the sixteen numbers that the analytic losses are functions of
SPECTRUM = np.array(
    [-10.0, -4.0, -1.0, -0.5, 0.0, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0]
)


def _matrix(spectrum: np.ndarray = SPECTRUM, seed: int = 0) -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((16, 16)))
    return np.asarray(rotation @ np.diag(spectrum) @ rotation.T)


def _vector(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(16)


def _quadratic(
    model: PreTrainedModel, matrix: np.ndarray, slope: np.ndarray, centre: Tensor | None = None
) -> Parts:
    """``1 + slope' e + e' matrix e / 2`` of the displacement ``e`` from ``centre`` (the present
    weights).
    """
    start = (model.get_parameter(NAME) if centre is None else centre).detach().double().clone()
    a, b = torch.from_numpy(matrix), torch.from_numpy(slope)

    def loss(moved: PreTrainedModel) -> tuple[Tensor]:
        e = moved.get_parameter(NAME).double() - start
        return (1 + b @ e + 0.5 * e @ a @ e,)

    return loss


def _trust_region(matrix: np.ndarray, slope: np.ndarray, radius: float) -> float:
    """``-min slope' e + e' matrix e / 2`` over the ball, by the secular equation in the eigenbasis
    (no hard case: slopes are random).
    """
    values, vectors = np.linalg.eigh(matrix)
    b = vectors.T @ slope

    def excess(mu: float) -> float:
        return float(np.linalg.norm(b / (values + mu)) - radius)

    mu = 0.0
    if values[0] <= 0 or excess(0.0) > 0:
        low = max(0.0, -values[0])
        mu = float(brentq(excess, low + 1e-9, low + 1e6, xtol=1e-13))
    e = -b / (values + mu)
    return -float(b @ e + 0.5 * e @ (values * e))


def _value(table: pd.DataFrame, **where: object) -> float:
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    assert len(table) == 1
    return float(table["value"].iloc[0])


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- Closed forms in the round ball ---


@pytest.mark.parametrize("kind", ["drop", "rise"])
def test_a_linear_loss_changes_by_the_radius_times_the_length_of_its_gradient(
    kind: str, llama: PreTrainedModel
) -> None:
    slope = _vector()
    losses = {"forget": _quadratic(llama, np.zeros((16, 16)), slope)}
    found = worst_case(llama, losses, "forget", [0.1, 1.0, 7.0], steps=(1, 2, 9), kind=kind)  # type: ignore[arg-type]
    assert list(found.columns) == list(WORST_CASE_COLUMNS)
    assert len(found) == 9
    np.testing.assert_allclose(
        found["value"], found["rho"] * float(np.linalg.norm(slope)), rtol=1e-6
    )
    np.testing.assert_allclose(found["length"], found["radius"], rtol=1e-6)
    assert set(found["kind"]) == {kind}
    np.testing.assert_allclose(found["base"], 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_many_steps_reach_the_trust_region_solution_of_a_saddle(
    seed: int, llama: PreTrainedModel
) -> None:
    matrix, slope = _matrix(seed=seed), _vector(seed)
    losses = {"forget": _quadratic(llama, matrix, slope)}
    radii = [0.03, 0.3, 1.0, 3.0]
    down = worst_case(llama, losses, "forget", radii, steps=[60])
    up = worst_case(llama, losses, "forget", radii, steps=[60], kind="rise")
    for rho in radii:
        # Every search is a lower bound; 60 steps close it to a thousandth.
        for table, sign in ((down, 1), (up, -1)):
            exact = _trust_region(sign * matrix, sign * slope, rho)
            assert exact * (1 - 1e-3) <= _value(table, rho=rho) <= exact * (1 + 1e-5)


@pytest.mark.parametrize(("kind", "eigenvalue"), [("rise", 5.0), ("drop", 10.0)])
def test_where_the_gradient_is_zero_the_end_of_the_spectrum_decides(
    kind: str, eigenvalue: float, llama: PreTrainedModel
) -> None:
    losses = {"forget": _quadratic(llama, _matrix(), np.zeros(16))}
    found = worst_case(llama, losses, "forget", [0.5, 2.0], steps=[80], kind=kind)  # type: ignore[arg-type]
    np.testing.assert_allclose(found["value"], eigenvalue * found["rho"] ** 2 / 2, rtol=2e-3)


def test_at_the_bottom_of_a_bowl_there_is_nothing_to_win(llama: PreTrainedModel) -> None:
    found = worst_case(
        llama,
        {"forget": _quadratic(llama, _matrix(np.abs(SPECTRUM) + 0.1), np.zeros(16))},
        "forget",
        [0.5],
        steps=[20],
    )
    assert found["value"].tolist() == [0.0]
    assert found["length"].tolist() == [0.0]


def test_a_minimum_inside_the_ball_is_found_and_not_overshot(llama: PreTrainedModel) -> None:
    matrix, slope = _matrix(np.linspace(1, 3, 16)), _vector()
    found = worst_case(
        llama, {"forget": _quadratic(llama, matrix, slope)}, "forget", [50.0], steps=[60]
    )
    best = np.linalg.solve(matrix, slope)
    np.testing.assert_allclose(found["value"], [slope @ best / 2], rtol=1e-3)
    np.testing.assert_allclose(found["length"], [np.linalg.norm(best)], rtol=0.05)


def test_one_step_is_the_step_of_sam(llama: PreTrainedModel) -> None:
    matrix, slope = _matrix(), _vector(2)
    ascent = slope / np.linalg.norm(slope)
    found = worst_case(
        llama,
        {"forget": _quadratic(llama, matrix, slope)},
        "forget",
        [0.2, 0.5],
        steps=[1],
        kind="rise",
    )
    for rho in (0.2, 0.5):
        expected = rho * np.linalg.norm(slope) + rho**2 / 2 * ascent @ matrix @ ascent
        assert expected > 0
        assert _value(found, rho=rho) == pytest.approx(expected, rel=1e-5)
    # A step that overshoots wins nothing: the centre is in the ball too.
    steep = worst_case(
        llama, {"forget": _quadratic(llama, 100 * np.eye(16), slope)}, "forget", [1.0], steps=[1]
    )
    assert steep["value"].tolist() == [0.0]


def test_a_ball_without_a_radius_gives_exactly_zero_for_every_loss(
    llama: PreTrainedModel, batch: Batch
) -> None:
    losses: dict[str, LossSource] = {
        "forget": [batch],
        "other": _quadratic(llama, _matrix(), _vector()),
    }
    found = worst_case(llama, losses, "forget", [0.0], steps=(1, 5))
    assert found["value"].tolist() == [0.0] * 4
    assert found["length"].tolist() == [0.0] * 4
    assert set(found[found["loss"] == "forget"]["base"]) == {mean_loss(llama, [batch])}


def test_the_other_losses_are_read_at_the_point_that_is_best_for_the_attack(
    llama: PreTrainedModel,
) -> None:
    attack, heldout = _vector(1), _vector(2)
    flat = np.zeros((16, 16))
    losses = {
        "heldout": _quadratic(llama, flat, heldout),
        "forget": _quadratic(llama, flat, attack),
        "against": _quadratic(llama, flat, -attack),
    }
    found = worst_case(llama, losses, "forget", [0.5, 2.0], steps=[3])
    for rho in (0.5, 2.0):
        assert _value(found, rho=rho, loss="heldout") == pytest.approx(
            rho * attack @ heldout / np.linalg.norm(attack), rel=1e-5
        )
        assert _value(found, rho=rho, loss="against") == pytest.approx(
            -rho * np.linalg.norm(attack), rel=1e-5
        )


def test_the_unit_turns_shares_of_a_displacement_into_lengths(llama: PreTrainedModel) -> None:
    losses = {"forget": _quadratic(llama, np.zeros((16, 16)), _vector())}
    found = worst_case(llama, losses, "forget", [0.5, 1.0], unit=3.0, steps=[1])
    assert found["radius"].tolist() == [1.5, 3.0]
    assert found["rho"].tolist() == [0.5, 1.0]
    np.testing.assert_allclose(
        found["value"], found["radius"] * float(np.linalg.norm(_vector())), rtol=1e-6
    )


def test_two_models_with_one_loss_and_one_hessian_are_ranked_by_what_an_attack_can_win(
    make_model: ModelMaker,
) -> None:
    # One bowl 1 + x' diag(1, 4, 0, ..) x / 2, two places at the same height: (2, 0) with the slope
    # 2 and (0, 1) with the slope 4. Any eigenvalue ties.
    spectrum = np.zeros(16)
    spectrum[:2] = 1.0, 4.0
    bowl = make_model().get_parameter(NAME).detach().clone()
    drops, bases = [], []
    for place in ((2.0, 0.0), (0.0, 1.0)):
        model = make_model()
        with torch.no_grad():
            model.get_parameter(NAME)[:2] += torch.tensor(place)
        found = worst_case(
            model,
            {"forget": _quadratic(model, np.diag(spectrum), np.zeros(16), bowl)},
            "forget",
            [0.5],
            steps=[40],
        )
        drops.append(float(found["value"].iloc[0]))
        bases.append(float(found["base"].iloc[0]))
    assert bases == pytest.approx([3.0, 3.0])
    # 2 - 1.5^2 / 2 and 2 - 4 * 0.5^2 / 2
    assert drops == pytest.approx([0.875, 1.5], rel=1e-4)


# --- The elementwise adaptive ball ---


def test_the_adaptive_ball_of_a_linear_loss_is_an_ellipsoid_of_the_weights(
    llama: PreTrainedModel,
) -> None:
    slope = _vector(3)
    with torch.no_grad():
        llama.get_parameter(NAME).copy_(torch.from_numpy(_vector(4)))
        llama.get_parameter(NAME)[5] = 0
    weights = llama.get_parameter(NAME).detach().double().numpy()
    seen: list[np.ndarray] = []
    linear = _quadratic(llama, np.zeros((16, 16)), slope)

    def watched(model: PreTrainedModel) -> tuple[Tensor]:
        seen.append(model.get_parameter(NAME).detach().double().numpy().copy())
        return linear(model)

    found = worst_case(llama, {"forget": watched}, "forget", [0.3], steps=[1], adaptive=True)
    # The largest value of slope' e under ||e / |theta||| <= rho, and where it is (Kwon et al.
    # 2021).
    assert _value(found) == pytest.approx(0.3 * np.linalg.norm(weights * slope), rel=1e-5)
    np.testing.assert_allclose(
        seen[-1] - weights, -0.3 * weights**2 * slope / np.linalg.norm(weights * slope), atol=1e-6
    )
    assert seen[-1][5] == 0
    assert set(found["ball"]) == {"adaptive"}


def test_the_adaptive_ball_does_not_see_the_scale_of_the_weights(make_model: ModelMaker) -> None:
    results = {}
    for factor in (1.0, 8.0):
        model = make_model()
        with torch.no_grad():
            model.get_parameter(NAME).copy_(factor * torch.from_numpy(_vector(4)))
        # L(theta / factor)
        losses = {"forget": _quadratic(model, _matrix() / factor**2, _vector(5) / factor)}
        for adaptive in (True, False):
            found = worst_case(
                model, losses, "forget", [0.1, 0.5], steps=(1, 10), adaptive=adaptive
            )
            results[factor, adaptive] = found["value"].to_numpy()
    np.testing.assert_allclose(results[8.0, True], results[1.0, True], rtol=1e-4)
    assert not np.allclose(results[8.0, False], results[1.0, False], rtol=0.1)


def test_the_adaptive_ball_does_not_see_a_rescaling_inside_the_mlp_and_the_round_ball_does(
    make_model: ModelMaker, batch: Batch
) -> None:
    plain, rescaled = make_model(), make_model()
    factors = torch.exp2(torch.tensor([3.0, -2.0, 1.0, 0.0] * 6))  # powers of two: exact
    with torch.no_grad():
        for layer in rescaled.model.layers:
            layer.mlp.up_proj.weight *= factors[:, None]
            layer.mlp.down_proj.weight /= factors
    assert mean_loss(plain, [batch]) == mean_loss(rescaled, [batch])
    values = {
        adaptive: [
            worst_case(
                model, {"forget": [batch]}, "forget", [0.1, 0.5], steps=(1, 4), adaptive=adaptive
            )["value"]
            for model in (plain, rescaled)
        ]
        for adaptive in (True, False)
    }
    np.testing.assert_allclose(values[True][1], values[True][0], rtol=1e-4)
    assert not np.allclose(values[False][1], values[False][0], rtol=0.02)


# --- A language model ---


def test_a_small_ball_on_a_language_model_gives_the_radius_times_the_gradient(
    llama: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    other = make_batch((9, 3), seed=5)
    tokens = [int(one.target_mask[:, 1:].sum()) for one in (batch, other)]
    assert tokens[0] != tokens[1]  # else a mean of means would be right
    total = sum(
        count * cross_entropy(llama, one) for count, one in zip(tokens, (batch, other), strict=True)
    ) / sum(tokens)
    assert isinstance(total, Tensor)
    gradient = torch.autograd.grad(total, list(llama.parameters()))
    length = sum(float(part.double().square().sum()) for part in gradient) ** 0.5
    found = worst_case(
        llama, {"forget": [batch, other], "half": [other]}, "forget", [1e-3], steps=[1]
    )
    assert _value(found, loss="forget") == pytest.approx(1e-3 * length, rel=0.02)
    # And every number is that of the point itself: walk there by hand.
    with torch.no_grad():
        for parameter, part in zip(llama.parameters(), gradient, strict=True):
            parameter -= 1e-3 * part / length
    base = float(found[found["loss"] == "half"]["base"].iloc[0])
    assert _value(found, loss="half") == pytest.approx(base - mean_loss(llama, [other]), abs=2e-6)


def test_more_steps_and_larger_balls_never_win_less(llama: PreTrainedModel, batch: Batch) -> None:
    radii = [0.0, 0.05, 0.2, 1.0, 5.0, 30.0]
    found = worst_case(llama, {"forget": [batch]}, "forget", radii, steps=(1, 3, 8))
    values = found.pivot_table(index="rho", columns="steps", values="value").to_numpy()
    assert (np.diff(values, axis=0) >= 0).all()
    assert (np.diff(values[:-1], axis=1) >= -1e-6).all()
    assert (found["length"] <= found["radius"] * (1 + 1e-5)).all()
    assert values[2, 2] > values[2, 0] > 0


def test_more_padding_and_another_split_change_nothing(
    llama: PreTrainedModel, batch: Batch, pad: Padder
) -> None:
    names = ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
    rows = [
        replace(
            batch,
            **{name: getattr(batch, name)[i : i + 1] for name in names},
            items=batch.items[i : i + 1],
        )
        for i in range(batch.size)
    ]
    found = [
        worst_case(llama, {"forget": texts}, "forget", [0.1], steps=[4])["value"]
        for texts in ([batch], [pad(batch, columns=4)], rows)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4)


def test_only_the_named_parameters_move(llama: PreTrainedModel, batch: Batch) -> None:
    before = _state(llama)
    moved: set[str] = set()

    def watch(model: PreTrainedModel) -> tuple[Tensor]:
        moved.update(
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter, before[name])
        )
        return (cross_entropy(model, batch),)

    restricted = worst_case(
        llama, {"forget": watch}, "forget", [0.3], steps=[3], parameters=["*.mlp.*", NAME]
    )
    assert moved == {name for name in before if ".mlp." in name or name == NAME}
    everything = worst_case(llama, {"forget": [batch]}, "forget", [0.3], steps=[1])
    gradient = dict(
        zip(
            before,
            torch.autograd.grad(cross_entropy(llama, batch), list(llama.parameters())),
            strict=True,
        )
    )
    share = sum(float(gradient[name].square().sum()) for name in moved) ** 0.5
    one = worst_case(
        llama, {"forget": [batch]}, "forget", [1e-3], steps=[1], parameters=["*.mlp.*", NAME]
    )
    assert _value(one) == pytest.approx(1e-3 * share, rel=0.02)
    assert _value(restricted) > 0
    assert _value(one) < _value(everything)


def test_frozen_parameters_stay(llama: PreTrainedModel, batch: Batch) -> None:
    llama.requires_grad_(requires_grad=False)
    llama.get_parameter(NAME).requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(llama, batch), llama.get_parameter(NAME))[0]
    assert _value(
        worst_case(llama, {"forget": [batch]}, "forget", [1e-3], steps=[1])
    ) == pytest.approx(1e-3 * float(gradient.norm()), rel=0.02)


# --- The model is left as it was found ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_comes_back_bit_by_bit_and_small_balls_are_not_rounded_away(
    dtype: torch.dtype, make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model().to(dtype)
    before = _state(model)
    state = torch.get_rng_state()
    found = worst_case(model, {"forget": [batch]}, "forget", [1e-3, 1.0], steps=(1, 3))
    assert all(
        torch.equal(p, before[name]) and p.dtype == dtype and p.grad is None and p.requires_grad
        for name, p in model.named_parameters()
    )
    assert torch.equal(torch.get_rng_state(), state)
    # In bfloat16 a perturbation of length 1e-3 over four thousand weights would vanish.
    twin = make_model().to(dtype).float()
    expected = worst_case(twin, {"forget": [batch]}, "forget", [1e-3, 1.0], steps=(1, 3))
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-3)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_weights_come_back_when_the_search_is_interrupted(
    failure: type[BaseException], llama: PreTrainedModel, batch: Batch
) -> None:
    before = _state(llama)
    calls: list[int] = []

    def breaks(model: PreTrainedModel) -> tuple[Tensor]:
        calls.append(1)
        if len(calls) == 4:
            assert not torch.equal(model.get_parameter(NAME), before[NAME])
            raise failure("stop")
        return (cross_entropy(model, batch),)

    with pytest.raises(failure, match="stop"):
        worst_case(llama, {"forget": breaks}, "forget", [0.5], steps=[5])
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_progress_counts_the_balls(llama: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    losses = {"forget": _quadratic(llama, _matrix(), _vector())}
    worst_case(
        llama,
        losses,
        "forget",
        [0.1, 0.2, 0.3],
        steps=(1, 2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 6) for i in range(1, 7)]


# --- Wrong input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": "forgt"}, "forget"),
        ({"radii": []}, "radii"),
        ({"radii": [-0.1]}, "radii"),
        ({"radii": [float("nan")]}, "radii"),
        ({"unit": float("inf")}, "unit"),
        ({"steps": []}, "steps"),
        ({"steps": (0,)}, "steps"),
        ({"kind": "fall"}, "drop"),
        ({"parameters": ["*.mpl.*"]}, "mpl"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, object], message: str, llama: PreTrainedModel, batch: Batch
) -> None:
    arguments: dict[str, object] = {"attack": "forget", "radii": [0.1], **changes}
    with pytest.raises(WorkbenchError, match=message):
        worst_case(llama, {"forget": [batch]}, **arguments)  # type: ignore[arg-type]


def test_a_model_in_training_mode_an_empty_loss_and_a_broken_one_are_refused(
    llama: PreTrainedModel, batch: Batch
) -> None:
    def run(losses: dict[str, Sequence[Batch]]) -> None:
        worst_case(llama, losses, "forget", [0.1])

    with pytest.raises(WorkbenchError, match="no target token"):
        run({"forget": [replace(batch, target_mask=torch.zeros_like(batch.target_mask))]})
    with pytest.raises(WorkbenchError, match="no target token"):
        run({"forget": [batch], "retain": []})
    llama.train()
    with pytest.raises(WorkbenchError, match="eval"):
        run({"forget": [batch]})
    llama.eval()
    with torch.no_grad():
        llama.get_parameter(NAME)[0] = torch.nan
    with pytest.raises(WorkbenchError, match="not finite"):
        run({"forget": [batch]})
    llama.requires_grad_(requires_grad=False)
    with pytest.raises(WorkbenchError, match="trainable"):
        run({"forget": [batch]})
