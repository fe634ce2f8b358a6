"""Lines, attack paths and planes between checkpoints against parabolas, wells of known height,
plane geometry and random walks.
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
from workbench.sharpness.paths import BARRIER, barriers, line_losses, path_losses
from workbench.sharpness.planes import (
    coordinates,
    loss_plane,
    orthonormal,
    trajectory_plane,
    walk_shares,
)
from workbench.sharpness.probe import LossSource
from workbench.sharpness.slices import mean_loss, random_direction
from workbench.unlearning.deltas import delta_between, norm_of, snapshot

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Parts = Callable[[PreTrainedModel], tuple[Tensor]]

NAME = "model.norm.weight"  # the sixteen numbers that the analytic losses are functions of


def _along(values: dict[int, float]) -> dict[str, Tensor]:
    """A direction in the sixteen numbers."""
    direction = torch.zeros(16)
    for index, value in values.items():
        direction[index] = value
    return {NAME: direction}


def _of(model: PreTrainedModel, function: Callable[[Tensor], Tensor]) -> Parts:
    """A function of the displacement of the sixteen numbers from the present ones, in float64."""
    start = model.get_parameter(NAME).detach().double().clone()
    return lambda moved: (function(moved.get_parameter(NAME).double() - start),)


def _line(values: dict[float, float], name: str = "forget") -> pd.DataFrame:
    return pd.DataFrame(
        [(place, name, value) for place, value in values.items()],
        columns=["position", "loss", "value"],
    )


def _only_row(table: pd.DataFrame) -> dict[str, float]:
    assert len(table) == 1
    return {
        str(name): value if name == "loss" else float(value)
        for name, value in table.iloc[0].to_dict().items()
    }


# --- Lines and barriers ---


def test_a_line_ends_at_the_other_checkpoint(
    make_model: ModelMaker, batch: Batch, make_batch: BatchMaker
) -> None:
    start, end = make_model(seed=0), make_model(seed=1)
    towards = delta_between(end, snapshot(start))
    losses: dict[str, LossSource] = {"forget": [batch], "retain": [make_batch((4, 6), seed=8)]}
    found = line_losses(start, towards, [1.0, 0.0, 0.5], losses).set_index(["position", "loss"])[
        "value"
    ]
    for name, texts in losses.items():
        assert not callable(texts)
        assert found[0.0, name] == mean_loss(start, texts)
        assert found[1.0, name] == pytest.approx(mean_loss(end, texts), abs=1e-5)
    middle = make_model()
    with torch.no_grad():
        for parameter, a, b in zip(
            middle.parameters(), start.parameters(), end.parameters(), strict=True
        ):
            parameter.copy_((a + b) / 2)
    assert found[0.5, "forget"] == pytest.approx(mean_loss(middle, [batch]), abs=1e-5)


def test_two_wells_have_a_barrier_of_known_height(llama: PreTrainedModel) -> None:
    # (x^2 - 1)^2 from the well at -1 to that at 1, x = 2 a - 1: height 1 in the middle, area (1/2)
    # * 16/15.
    wells = _of(llama, lambda e: ((e[0] - 1) ** 2 - 1) ** 2)
    line = line_losses(llama, _along({0: 2.0}), np.linspace(0, 1, 201).tolist(), {"forget": wells})
    row = _only_row(barriers(line))
    assert tuple(row) == BARRIER
    assert (row["start"], row["end"]) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert (row["barrier"], row["barrier_at"], row["midpoint"]) == pytest.approx(
        (1.0, 0.5, 1.0), abs=1e-6
    )
    assert row["area"] == pytest.approx(8 / 15, abs=1e-3)


def test_wells_of_different_depth_are_measured_from_the_chord(llama: PreTrainedModel) -> None:
    # 4 a (1 - a) above the chord from 3 to 1
    tilted = _of(llama, lambda e: 3 - 2 * e[0] + 4 * e[0] * (1 - e[0]))
    row = _only_row(
        barriers(
            line_losses(
                llama, _along({0: 1.0}), np.linspace(-0.5, 1.5, 81).tolist(), {"forget": tilted}
            )
        )
    )
    assert (
        row["start"],
        row["end"],
        row["barrier"],
        row["barrier_at"],
        row["midpoint"],
    ) == pytest.approx((3, 1, 1, 0.5, 1), abs=1e-5)
    assert row["area"] == pytest.approx(2 / 3, abs=1e-3)
    # 3 + 2a - 4a^2 = 3/2 at a = (1 + sqrt 7) / 4
    assert row["half_at"] == pytest.approx((1 + 7**0.5) / 4, abs=1e-3)


def test_a_convex_loss_has_no_barrier_and_sags_below_the_chord(llama: PreTrainedModel) -> None:
    bowl = _of(llama, lambda e: ((e - 0.3) ** 2).sum())
    towards = _along({0: 1.0, 1: -2.0, 7: 0.5})
    row = _only_row(
        barriers(line_losses(llama, towards, np.linspace(0, 1, 11).tolist(), {"forget": bowl}))
    )
    assert row["barrier"] == pytest.approx(0.0, abs=1e-12)
    # e' I e has the excess -a (1 - a) ||d||^2: a quarter in the middle, a sixth as area
    assert row["midpoint"] == pytest.approx(-5.25 / 4, rel=1e-6)
    assert row["area"] == pytest.approx(-5.25 / 6, rel=0.02)


def test_a_model_against_itself_has_no_barrier(llama: PreTrainedModel, batch: Batch) -> None:
    line = line_losses(
        llama, delta_between(llama, snapshot(llama)), [0.0, 0.3, 0.5, 1.0], {"forget": [batch]}
    )
    assert set(line["value"]) == {mean_loss(llama, [batch])}
    row = _only_row(barriers(line))
    assert (row["barrier"], row["midpoint"], row["area"]) == pytest.approx((0, 0, 0), abs=1e-14)
    assert np.isnan(row["half_at"])


def test_halving_is_the_first_crossing_and_interpolated() -> None:
    assert _only_row(barriers(_line({1.0: 9.0, 0.0: 8.0, 0.5: 2.0, 0.75: 8.0, 0.25: 6.0})))[
        "half_at"
    ] == pytest.approx(0.375)
    assert _only_row(barriers(_line({0.0: 8.0, 1.0: 4.0})))["half_at"] == pytest.approx(1.0)
    assert np.isnan(_only_row(barriers(_line({0.0: 8.0, 1.0: 4.1})))["half_at"])
    assert _only_row(barriers(_line({0.0: 0.0, 1.0: 4.0})))["half_at"] == 0.0


def test_a_line_without_both_ends_or_without_finite_values_has_no_barrier() -> None:
    for values in ({0.1: 1.0, 1.0: 2.0}, {0.0: 1.0, 0.9: 2.0}, {2.0: 1.0}):
        with pytest.raises(WorkbenchError, match="0 and 1"):
            barriers(_line(values))
    both = pd.concat(
        [
            _line({0.0: 1.0, 0.5: np.nan, 1.0: 2.0}, "broken"),
            _line({0.0: 1.0, 0.5: 4.0, 1.0: 2.0}, "whole"),
        ]
    )
    found = barriers(both).set_index("loss")["barrier"]
    assert np.isnan(float(found["broken"]))
    assert found["whole"] == 2.5


# --- The path of an attack ---


def test_a_path_is_measured_straight_and_along_its_length(llama: PreTrainedModel) -> None:
    first = _of(llama, lambda e: 10 - e[0])
    found = path_losses(llama, [_along({0: 3.0}), _along({0: 3.0, 1: 4.0}), {}], {"forget": first})
    assert found["checkpoint"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(found["distance"], [0, 3, 5, 0])
    np.testing.assert_allclose(found["travelled"], [0, 3, 7, 12])
    np.testing.assert_allclose(found["value"], [10, 7, 7, 10], rtol=1e-6)


def test_a_path_of_checkpoints_has_the_losses_of_the_checkpoints(
    make_model: ModelMaker, batch: Batch
) -> None:
    models = [make_model(seed=seed) for seed in range(3)]
    deltas = [delta_between(model, snapshot(models[0])) for model in models[1:]]
    found = path_losses(models[0], deltas, {"forget": [batch]})
    np.testing.assert_allclose(
        found["value"], [mean_loss(model, [batch]) for model in models], atol=1e-5
    )
    assert found["value"].iloc[0] == mean_loss(models[0], [batch])


# --- Planes ---


def test_a_linear_loss_gives_a_plane_and_no_line_of_the_grid_is_displaced(
    llama: PreTrainedModel,
) -> None:
    linear = _of(llama, lambda e: 5 + 2 * e[0] - 3 * e[1])
    xs, ys = [-1.0, -0.25, 0.0, 0.5], [-2.0, 0.0, 1.0]
    found = loss_plane(
        llama, _along({0: 1.0}), _along({0: 1.0, 1: 1.0}), xs, ys, {"forget": linear}
    )
    assert list(zip(found["x"], found["y"], strict=True)) == [(x, y) for y in ys for x in xs]
    np.testing.assert_allclose(found["value"], 5 + 2 * found["x"] - found["y"], atol=1e-5)


def test_a_quadratic_loss_gives_the_closed_form_everywhere_on_the_grid(
    llama: PreTrainedModel,
) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((16, 16))
    a = torch.from_numpy(matrix + matrix.T)
    first, second = ({NAME: torch.from_numpy(rng.standard_normal(16)).float()} for _ in range(2))
    found = loss_plane(
        llama,
        first,
        second,
        np.linspace(-1, 1, 5).tolist(),
        np.linspace(-2, 2, 3).tolist(),
        {"forget": _of(llama, lambda e: e @ a @ e / 2)},
    )
    u, v = (direction[NAME].double() for direction in (first, second))
    x, y = found["x"].to_numpy(), found["y"].to_numpy()
    expected = x**2 / 2 * float(u @ a @ u) + y**2 / 2 * float(v @ a @ v) + x * y * float(u @ a @ v)
    np.testing.assert_allclose(found["value"], expected, atol=1e-4)


def test_the_centre_of_a_plane_is_the_loss_of_the_model_itself_bit_by_bit(
    llama: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    losses: dict[str, LossSource] = {"forget": [batch], "retain": [make_batch((4, 6), seed=8)]}
    before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
    found = loss_plane(
        llama,
        random_direction(llama, 0),
        random_direction(llama, 1),
        [-0.5, 0.0, 0.5],
        [0.3, 0.0],
        losses,
    )
    assert len(found) == 12
    centre = found[(found["x"] == 0) & (found["y"] == 0)].set_index("loss")["value"]
    for name, texts in losses.items():
        assert not callable(texts)
        assert centre[name] == mean_loss(llama, texts)
    assert found["value"].nunique() == 12
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_values_that_are_not_finite_stay_so(llama: PreTrainedModel) -> None:
    found = loss_plane(
        llama,
        _along({0: 1.0}),
        _along({1: 1.0}),
        [0.0, 1.0],
        [0.0],
        {"forget": _of(llama, lambda e: (0.5 - e[0]).log())},
    )
    assert np.isnan(found["value"]).tolist() == [False, True]


def test_the_weights_come_back_when_a_grid_a_line_or_a_path_is_interrupted(
    llama: PreTrainedModel, batch: Batch
) -> None:
    before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}

    def breaks(model: PreTrainedModel) -> tuple[Tensor]:
        if not torch.equal(model.get_parameter(NAME), before[NAME]):
            raise KeyboardInterrupt
        return (cross_entropy(model, batch),)

    direction = _along({0: 1.0})
    for walk in (
        lambda: loss_plane(
            llama, direction, _along({1: 1.0}), [0.0, 1.0], [0.0], {"forget": breaks}
        ),
        lambda: line_losses(llama, direction, [0.0, 1.0], {"forget": breaks}),
        lambda: path_losses(llama, [direction], {"forget": breaks}),
    ):
        with pytest.raises(KeyboardInterrupt):
            walk()
        assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_gram_schmidt_gives_unit_axes_of_the_same_plane() -> None:
    first, second = (
        {"a": torch.tensor([3.0, 4.0])},
        {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1])},
    )
    x, y = orthonormal(first, second)
    torch.testing.assert_close(x["a"], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(y["b"], torch.tensor([1.0]))
    torch.testing.assert_close(y["a"], torch.zeros(2), atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1000, generator=generator)
    near = base + 1e-3 * torch.randn(
        1000, generator=generator
    )  # almost one line: rounding must not leave the axes at a slant
    x, y = orthonormal({"a": base}, {"a": near})
    assert abs(float(x["a"].double() @ y["a"].double())) < 1e-6
    assert (norm_of(x), norm_of(y)) == pytest.approx((1, 1))


def test_three_checkpoints_lie_in_their_plane_and_a_fourth_beside_it() -> None:
    # A at the origin, B at 5 on the x-axis, C at (3, 2), and D above (1, 1) at the height 0.5.
    b, c = _along({0: 5.0}), _along({0: 3.0, 4: 2.0})
    x, y = orthonormal(b, c)
    found = coordinates(
        {"A": {}, "B": b, "C": c, "D": _along({0: 1.0, 4: 1.0, 9: 0.5})}, x, y
    ).set_index("point")
    np.testing.assert_allclose(found["x"], [0, 5, 3, 1], atol=1e-6)
    np.testing.assert_allclose(found["y"], [0, 0, 2, 1], atol=1e-6)
    np.testing.assert_allclose(found["residual"], [0, 0, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(found["distance"], [0, 5, 13**0.5, 1.5])


def test_coordinates_in_slanted_axes_of_any_length_are_those_of_the_grid(
    llama: PreTrainedModel,
) -> None:
    # Slanted axes: what loss_plane reaches at (x, y) must be read back as (x, y).
    first, second = _along({0: 2.0}), _along({0: 1.0, 1: 3.0})
    point = {NAME: 0.25 * first[NAME] - 2 * second[NAME] + _along({5: 0.125})[NAME]}
    row = coordinates({"point": point}, first, second).iloc[0]
    assert (row["x"], row["y"], row["residual"]) == pytest.approx((0.25, -2.0, 0.125))
    target = point[NAME].double()
    target[5] = 0
    reached = loss_plane(
        llama,
        first,
        second,
        [row["x"]],
        [row["y"]],
        {"miss": _of(llama, lambda e: ((e - target) ** 2).sum())},
    )
    assert float(reached["value"].iloc[0]) == pytest.approx(0.0, abs=1e-10)


def test_directions_on_one_line_span_no_plane() -> None:
    one = _along({0: 1.0, 1: 2.0})
    for other in (one, {NAME: -3 * one[NAME]}, _along({}), {}):
        with pytest.raises(WorkbenchError, match="plane"):
            orthonormal(one, other)
        with pytest.raises(WorkbenchError, match="plane"):
            coordinates({}, one, other)
    with pytest.raises(WorkbenchError, match="line"):
        trajectory_plane([one, {NAME: 2 * one[NAME]}, {NAME: 5 * one[NAME]}])
    with pytest.raises(WorkbenchError, match="two checkpoints"):
        trajectory_plane([one])


# --- Trajectories and their null ---


def test_a_walk_has_most_of_its_variance_in_two_components() -> None:
    for count in (2, 7, 300):
        points = count + 1
        k = np.arange(1, count + 1)
        np.testing.assert_allclose(
            walk_shares([0.7] * count),
            6 / ((points**2 - 1) * (2 * np.sin(np.pi * k / (2 * points))) ** 2),
            rtol=1e-6,
        )
    limit = walk_shares([1.0] * 300)
    # 6 / pi^2 and 1.25 * 6 / pi^2: the .61 and .76 of many steps
    assert limit[0] == pytest.approx(6 / np.pi**2, abs=1e-4)
    assert limit[:2].sum() == pytest.approx(0.76, abs=2e-3)


def test_the_null_is_what_a_random_walk_with_these_steps_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(2.0, 0.2, 30)  # a decaying learning rate
    steps = torch.randn(30, 20_000, generator=generator) / 20_000**0.5 * lengths[:, None]
    found = trajectory_plane([{"w": point} for point in steps.cumsum(0)])
    np.testing.assert_allclose(found.shares["share"], found.shares["null"], atol=0.01)
    assert found.shares["component"].tolist() == list(range(1, 31))
    assert (
        abs(found.shares["null"][0] - walk_shares([1.0] * 30)[0]) > 0.01
    )  # unequal steps have another null
    # The same by the singular values of the centred points, the start among them.
    points = np.concatenate([np.zeros((1, 20_000)), steps.cumsum(0).double().numpy()])
    values = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(found.shares["share"], values[:-1] / values.sum(), atol=1e-6)


def test_a_flat_trajectory_lies_in_its_plane() -> None:
    angles = np.linspace(0, 2 * np.pi, 9)[1:]
    deltas = [_along({2: 3 * (np.cos(angle) - 1), 6: float(np.sin(angle))}) for angle in angles]
    found = trajectory_plane(deltas)
    assert found.shares["share"][:2].sum() == pytest.approx(1.0)
    # The long axis of the ellipse first.
    assert abs(float(found.first[NAME][2])) == pytest.approx(1.0, abs=1e-2)
    assert abs(float(found.second[NAME][6])) == pytest.approx(1.0, abs=1e-2)
    placed = coordinates(
        {str(i): delta for i, delta in enumerate(deltas)}, found.first, found.second
    )
    np.testing.assert_allclose(placed["residual"], 0, atol=1e-5)
    np.testing.assert_allclose(np.hypot(placed["x"], placed["y"]), placed["distance"], atol=1e-5)
    assert "random walk" in repr(found)
    assert "<table" in found._repr_html_()


# --- Wrong input ---


def test_wrong_arguments_are_named(llama: PreTrainedModel, batch: Batch) -> None:
    one, two = _along({0: 1.0}), _along({1: 1.0})
    with pytest.raises(WorkbenchError, match="positions"):
        line_losses(llama, one, [], {"forget": [batch]})
    with pytest.raises(WorkbenchError, match="positions_second"):
        loss_plane(llama, one, two, [0.0], [float("nan")], {"forget": [batch]})
    with pytest.raises(WorkbenchError, match="no loss"):
        path_losses(llama, [one], {})
    llama.train()
    with pytest.raises(WorkbenchError, match="eval"):
        loss_plane(llama, one, two, [0.0], [0.0], {"forget": [batch]})
