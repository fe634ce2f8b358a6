"""Rotation, drift and shape of the shift: the identity for a model against itself, planted turns
and drifts by hand, nulls against simulation, and scikit-learn's PCA beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics.rotation import (
    ROTATION_MEASURES,
    add_rotation,
    angles_by_layer,
    random_share,
    rotation_by_layer,
    shuffled,
    with_anchors,
)
from workbench.diagnostics.shift import shift_by_layer, streams
from workbench.errors import WorkbenchError
from workbench.tables import Table

ModelMaker = Callable[..., PreTrainedModel]
Mover = Callable[..., PreTrainedModel]
Padder = Callable[..., Batch]

SHAPE = ("shift_rank", "leading_share", "common_share")


def _rows(seed: int = 0, rows: int = 200, width: int = 8, decay: float = 0.6) -> Tensor:
    """Rows whose coordinates have standard deviations 1, 0.6, 0.36, ..., about a mean that is not
    zero.
    """
    noise = torch.randn(
        rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return noise * decay ** torch.arange(width) + 0.7


def _measure(before: Tensor, after: Tensor, rank: int = 3) -> pd.Series:
    found = rotation_by_layer({0: before}, {0: after}, rank)
    assert list(found.columns) == ["layer", *ROTATION_MEASURES]
    return found.iloc[0]


# --- Identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_against_itself_gives_the_identity(
    family: str, make_model: ModelMaker, batch: Batch
) -> None:
    stream = streams(make_model(family), [batch])
    found = rotation_by_layer(
        stream, {layer: rows.clone() for layer, rows in stream.items()}, rank=4
    )
    assert found["layer"].tolist() == [0, 1]
    for measure in ("subspace_overlap", "smallest_cosine", "pc1_cosine"):
        assert found[measure].tolist() == pytest.approx([1, 1], abs=1e-6)
    for measure in ("pc1_shift", "pc2_shift"):
        assert found[measure].tolist() == [0, 0]
    assert found[list(SHAPE)].isna().all(axis=None)  # nothing moved, so the shift has no shape
    assert (angles_by_layer(stream, stream, rank=4)["cosine"] > 1 - 1e-6).all()


def test_every_measure_sees_another_model_and_padding_changes_nothing(
    make_model: ModelMaker, batch: Batch, nearby: Mover, pad: Padder
) -> None:
    base = make_model()
    moved = nearby(base, 0.1)
    found = rotation_by_layer(streams(base, [batch]), streams(moved, [batch]))
    assert (found["subspace_overlap"] < 1 - 1e-4).all()
    assert (found["pc1_cosine"] < 1 - 1e-6).all()
    assert (found["pc1_shift"].abs() > 1e-3).all()
    assert found[list(SHAPE)].notna().all(axis=None)
    padded = rotation_by_layer(streams(base, [pad(batch, 4)]), streams(moved, [pad(batch, 4)]))
    pd.testing.assert_frame_equal(padded, found, rtol=1e-3, atol=1e-4)


# --- Directions that turn -------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0, 20, 60, 90])
def test_a_turn_of_the_first_direction_is_its_angle(degrees: int) -> None:
    # Uncorrelated coordinates, so that the principal directions are the axes; axis 0 turns towards
    # axis 7, which lies outside the top three.
    before = torch.from_numpy(PCA(whiten=True).fit_transform(_rows().numpy())) * torch.tensor(
        [8.0, 4, 2, 1, 0.5, 0.2, 0.1, 0.05], dtype=torch.float64
    )
    turn = torch.eye(8, dtype=torch.float64)
    angle = math.radians(degrees)
    turn[0, 0] = turn[7, 7] = math.cos(angle)
    turn[0, 7], turn[7, 0] = math.sin(angle), -math.sin(angle)
    found = _measure(before, before @ turn)
    assert found["pc1_cosine"] == pytest.approx(math.cos(angle), abs=1e-4)
    assert found["smallest_cosine"] == pytest.approx(math.cos(angle), abs=1e-4)
    assert found["subspace_overlap"] == pytest.approx((2 + math.cos(angle) ** 2) / 3, abs=1e-4)
    assert found["random_overlap"] == pytest.approx(3 / 8)
    assert found["pc1_gap"] == pytest.approx(1 - 16 / 64, abs=1e-4)
    cosines = angles_by_layer({0: before}, {0: before @ turn}, rank=3)
    assert cosines["angle"].tolist() == [0, 1, 2]
    assert cosines["cosine"].tolist() == pytest.approx([1, 1, math.cos(angle)], abs=1e-4)


def test_angles_agree_with_scikit_learn_and_scipy() -> None:
    before, after = _rows(0), _rows(0) + 0.4 * _rows(1)
    bases = [PCA(3).fit(rows.numpy()).components_.T for rows in (before, after)]
    expected = np.sort(np.cos(subspace_angles(*bases)))[::-1]
    assert angles_by_layer({0: before}, {0: after}, rank=3)["cosine"].tolist() == pytest.approx(
        expected.tolist(), abs=1e-5
    )
    found = _measure(before, after)
    assert found["subspace_overlap"] == pytest.approx(np.square(expected).mean(), abs=1e-5)
    assert found["pc1_cosine"] == pytest.approx(abs(bases[0][:, 0] @ bases[1][:, 0]), abs=1e-5)


def test_streams_that_are_wider_than_long_agree_with_scikit_learn_too() -> None:
    before, after = (_rows(seed, rows=12, width=60, decay=0.9) for seed in (0, 1))
    after = before + 0.3 * after
    models = [PCA(3).fit(rows.numpy()) for rows in (before, after)]
    found = _measure(before, after)
    expected = np.cos(subspace_angles(*(model.components_.T for model in models)))
    assert found["subspace_overlap"] == pytest.approx(np.square(expected).mean(), abs=1e-5)
    assert found["random_overlap"] == pytest.approx(3 / 60)
    assert found["random_share"] == random_share(12, 60)
    first = models[0].components_[0] * (
        -1 if float(before.mean(0).numpy() @ models[0].components_[0]) < 0 else 1
    )
    deviation = np.sqrt(models[0].explained_variance_[0] * 11 / 12)
    assert found["pc1_shift"] == pytest.approx(
        float((after - before).mean(0).numpy() @ first) / deviation, abs=1e-5
    )
    assert found["norm"] == pytest.approx(float(after.norm(dim=1).mean()))
    # Without a change, nothing is moved by the change of coordinates.
    assert (_measure(before, before)[["pc1_shift", "pc2_shift"]] == 0).all()


def test_a_common_vector_and_a_scale_turn_nothing() -> None:
    before = _rows()
    found = _measure(before, 3 * before + torch.arange(8.0))
    assert found["pc1_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert found["subspace_overlap"] == pytest.approx(1.0, abs=1e-6)


def test_random_subspaces_overlap_as_their_rank_says() -> None:
    overlaps = []
    for seed in range(30):
        one, other = (
            torch.randn(
                40,
                32,
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(1000 * part + seed),
            )
            for part in (1, 2)
        )
        found = _measure(one, other, rank=8)
        assert found["random_overlap"] == pytest.approx(8 / 32)
        overlaps.append(found["subspace_overlap"])
    assert np.mean(overlaps) == pytest.approx(8 / 32, abs=0.02)


def test_subspaces_of_unequal_rank_are_compared_on_the_smaller() -> None:
    before = _rows()
    after = before.clone()
    after[:, 2:] = 0  # only two directions vary
    found = _measure(before, after, rank=4)
    assert found["random_overlap"] == pytest.approx(4 / 8)
    assert 0.9 < found["subspace_overlap"] <= 1
    assert len(angles_by_layer({0: before}, {0: after}, rank=4)) == 2


# --- Drift ----------------------------------------------------------------------------------------


def test_a_drift_along_the_principal_directions_is_counted_in_standard_deviations() -> None:
    before = _rows()
    model = PCA(2).fit(before.numpy())
    deviations = np.sqrt(model.explained_variance_ * (len(before) - 1) / len(before))
    signs = np.where(before.mean(0).numpy() @ model.components_.T < 0, -1, 1)
    step = torch.from_numpy(signs * deviations * np.array([2.0, -0.5]) @ model.components_)
    found = _measure(before, before + step)
    assert found["pc1_shift"] == pytest.approx(2.0, abs=1e-4)
    assert found["pc2_shift"] == pytest.approx(-0.5, abs=1e-4)
    assert found["common_share"] == pytest.approx(1.0)
    assert (found["shift_rank"], found["leading_share"]) == (pytest.approx(1.0), pytest.approx(1.0))


def test_the_sign_of_a_principal_direction_is_fixed_by_the_bases_mean() -> None:
    before = _rows()
    away = _measure(before, 1.5 * before)
    assert away["pc1_shift"] > 0  # farther along its own mean
    mirrored = _measure(-before, -1.5 * before)
    assert mirrored["pc1_shift"] == pytest.approx(away["pc1_shift"], rel=1e-5)


def test_a_drift_beside_the_principal_directions_is_none_of_theirs() -> None:
    before = torch.cat([_rows(width=3), torch.zeros(200, 1, dtype=torch.float64)], dim=1)
    found = _measure(before, before + torch.tensor([0.0, 0, 0, 9]))
    assert found["pc1_shift"] == pytest.approx(0.0, abs=1e-6)
    assert found["pc2_shift"] == pytest.approx(0.0, abs=1e-6)
    assert found["common_share"] == pytest.approx(1.0)


# --- Shape of the shift ---------------------------------------------------------------------------


def test_the_shape_of_a_shift_by_hand() -> None:
    # Lengths 3, 4 and 0 along three axes: eigenvalues 9 and 16.
    before = _rows(rows=3, width=4)
    delta = torch.tensor([[3.0, 0, 0, 0], [0, -4, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    found = _measure(before, before + delta, rank=1)
    assert found["shift_rank"] == pytest.approx(25**2 / (9**2 + 16**2))
    assert found["leading_share"] == pytest.approx(16 / 25)
    assert found["common_share"] == pytest.approx(
        3 * (1 + 16 / 9) / 25
    )  # the mean is (1, -4/3, 0, 0)


def test_a_shift_has_one_shape_whichever_side_is_longer() -> None:
    rows = _rows(3, rows=30, width=6)
    wide = torch.zeros(6, 30, dtype=torch.float64)
    tall = torch.zeros(30, 6, dtype=torch.float64)
    one, other = (
        _measure(_rows(rows=30, width=6) + tall, _rows(rows=30, width=6) + rows),
        _measure(
            _rows(rows=6, width=30, decay=0.9) + wide, _rows(rows=6, width=30, decay=0.9) + rows.T
        ),
    )
    assert one["shift_rank"] == pytest.approx(other["shift_rank"])
    assert one["leading_share"] == pytest.approx(other["leading_share"])
    assert one["random_share"] == other["random_share"]


@pytest.mark.parametrize(("count", "width"), [(40, 16), (16, 40), (120, 12), (12, 60)])
def test_the_nulls_are_what_isotropic_shifts_have(count: int, width: int) -> None:
    shares, ranks, common = [], [], []
    before = _rows(rows=count, width=width, decay=0.95)
    for seed in range(60):
        found = _measure(
            before,
            before
            + torch.randn(
                count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            ),
            rank=2,
        )
        shares.append(found["leading_share"])
        ranks.append(found["shift_rank"])
        common.append(found["common_share"])
    assert np.mean(shares) == pytest.approx(random_share(count, width), rel=0.03)
    assert found["random_share"] == random_share(count, width)
    assert np.mean(ranks) == pytest.approx(found["random_rank"], rel=0.02)
    assert np.mean(common) == pytest.approx(1 / count, rel=0.1)


@pytest.mark.parametrize(("count", "width"), [(3, 2), (2, 5), (4, 4)])
def test_the_null_rank_is_a_ratio_of_exact_expectations(count: int, width: int) -> None:
    rows = np.random.default_rng(0).standard_normal((100_000, count, width))
    grams = rows @ rows.transpose(0, 2, 1)
    traces = np.trace(grams, axis1=1, axis2=2)
    simulated = np.square(traces).mean() / np.square(grams).sum((1, 2)).mean()
    before = _rows(rows=count, width=width)
    assert _measure(before, before, rank=1)["random_rank"] == pytest.approx(simulated, rel=0.01)


def test_the_null_of_one_row_or_one_column_is_one_direction() -> None:
    assert random_share(1, 50) == random_share(50, 1) == 1.0
    assert 0.5 <= random_share(2, 2) <= 1
    assert random_share(7, 300) == random_share(300, 7)


def test_norms_are_those_of_the_model_after() -> None:
    before = _rows()
    after = torch.zeros(200, 8, dtype=torch.float64)
    after[:, 0] = torch.arange(200.0)
    found = _measure(before, after, rank=1)
    assert found["norm"] == pytest.approx(99.5)
    assert found["norm_high"] == pytest.approx(np.quantile(np.arange(200), 0.975))


# --- Anchors --------------------------------------------------------------------------------------


def test_anchors_stand_beside_every_model() -> None:
    base = {0: _rows(0), 1: _rows(1)}
    other = {layer: rows + 0.1 * _rows(7) for layer, rows in base.items()}
    found = with_anchors(rotation_by_layer, base, {"never-learned": other})
    assert found["model"].tolist() == ["base"] * 2 + ["base, shuffled"] * 2 + ["never-learned"] * 2
    by_model = found.groupby("model")
    assert by_model["subspace_overlap"].min()[["base", "base, shuffled"]].tolist() == pytest.approx(
        [1, 1]
    )  # subspaces do not know the pairing
    assert by_model["shift_rank"].count().tolist() == [0, 2, 2]
    # A measure of pairs does: cosines and CKA of unrelated rows.
    shift = (
        with_anchors(shift_by_layer, base, {"never-learned": other}).groupby("model")["cka"].mean()
    )
    assert shift["base"] == pytest.approx(1.0)
    assert abs(shift["base, shuffled"]) < 0.1
    assert 0.5 < shift["never-learned"] < 1


def test_shuffling_keeps_rows_and_takes_one_order_for_all_blocks() -> None:
    one = {0: _rows(0), 1: 2 * _rows(0)}
    dealt = shuffled(one, seed=4)
    assert torch.equal(2 * dealt[0], dealt[1])
    assert not torch.equal(dealt[0], one[0])
    assert torch.equal(dealt[0].sort(0).values, one[0].sort(0).values)
    assert torch.equal(shuffled(one, seed=4)[0], dealt[0])
    state = torch.random.get_rng_state()
    shuffled(one)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- The table and bad input ----------------------------------------------------------------------


def test_rows_of_the_table_leave_out_what_has_no_value() -> None:
    table = Table({"run": "r", "method": "npo", "seed": 0})
    before = _rows()
    add_rotation(
        table,
        rotation_by_layer({0: before, 2: before}, {0: before + _rows(1), 2: before}),
        split="forget-heldout",
    )
    frame = table.frame()
    assert set(frame["stage"]) == {"representation"}
    assert set(frame.loc[frame["site"] == "blocks.0.hook_resid_post", "metric"]) == set(
        ROTATION_MEASURES
    )
    assert set(frame.loc[frame["site"] == "blocks.2.hook_resid_post", "metric"]) == set(
        ROTATION_MEASURES
    ) - set(SHAPE)


def test_bad_input_says_what_would_be_right() -> None:
    before = _rows()
    with pytest.raises(WorkbenchError, match="same tokens after the same blocks"):
        rotation_by_layer({0: before}, {1: before})
    with pytest.raises(WorkbenchError, match="same tokens"):
        rotation_by_layer({0: before}, {0: before[1:]})
    with pytest.raises(WorkbenchError, match="same tokens"):
        rotation_by_layer({}, {})
    with pytest.raises(WorkbenchError, match="1 rows"):
        rotation_by_layer({0: before[:1]}, {0: before[:1]})
    with pytest.raises(WorkbenchError, match="do not vary"):
        rotation_by_layer({0: torch.ones(5, 4)}, {0: torch.ones(5, 4)})
    for call in (rotation_by_layer, angles_by_layer):
        with pytest.raises(WorkbenchError, match="rank is 0"):
            call({0: before}, {0: before}, rank=0)
    sick = before.clone()
    sick[0, 0] = math.inf
    with pytest.raises(WorkbenchError, match="block 0"):
        rotation_by_layer({0: before}, {0: sick})
