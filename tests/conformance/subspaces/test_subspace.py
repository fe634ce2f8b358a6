"""Principal subspaces against numpy in float64, and the measures that compare them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.hooks import Moments
from workbench.subspaces.subspace import (
    Subspace,
    energy_inside,
    overlap,
    principal_angles,
    principal_subspace,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _orthonormal(width: int, rank: int, seed: int = 0) -> Tensor:
    frame: Tensor = torch.linalg.qr(_random(width, rank, seed=seed).double())[0].float()
    return frame


def _moments(rows: Tensor, chunk: int = 1000) -> Moments:
    moments = Moments()
    for part in rows.split(chunk):
        moments.update(part)
    return moments


SPREADS = torch.tensor([9.0, 6, 4, 2.5, 1.5, 1, 0.6, 0.3])


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_principal_subspace_is_numpys(offset: float, rank: int) -> None:
    rows = (_random(300, 8, seed=1) * SPREADS) @ _orthonormal(8, 8, 2).T + offset * _random(
        8, seed=3
    )
    exact = rows.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(exact, rowvar=False, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    found = principal_subspace(_moments(rows, 70), rank, site="s", tokens="t", source="u")
    assert (found.width, found.rank, found.count) == (8, rank, 300)
    assert (found.site, found.tokens, found.source) == ("s", "t", "u")
    assert found.basis.dtype == found.eigenvalues.dtype == found.mean.dtype == torch.float32
    np.testing.assert_allclose(found.eigenvalues.numpy(), values[:rank], rtol=1e-3)
    assert found.total_variance == pytest.approx(values.sum(), rel=1e-4)
    np.testing.assert_allclose(found.mean.numpy(), exact.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose((found.basis.T @ found.basis).numpy(), np.eye(rank), atol=1e-5)
    # Directions are compared as lines: the sign of an eigenvector means nothing.
    np.testing.assert_allclose(
        np.abs((found.basis.double().numpy() * vectors[:, :rank]).sum(0)), 1, atol=1e-5
    )
    projector = vectors[:, :rank] @ vectors[:, :rank].T
    np.testing.assert_allclose(found.project(torch.eye(8)).numpy(), projector, atol=2e-4)


def test_top_keeps_the_first_directions() -> None:
    rows = _random(100, 8) * SPREADS
    wide, narrow = principal_subspace(_moments(rows), 6), principal_subspace(_moments(rows), 2)
    top = wide.top(2)
    assert torch.equal(top.basis, narrow.basis) and torch.equal(top.eigenvalues, narrow.eigenvalues)
    assert top.total_variance == wide.total_variance and top.count == 100


@pytest.mark.parametrize("chunk", [60, 13])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_rank_deficient_rows_give_fewer_columns(chunk: int, offset: float) -> None:
    rows = _random(60, 3, seed=1) @ _orthonormal(10, 3, 2).T + offset * _random(10, seed=3)
    found = principal_subspace(_moments(rows, chunk), 7)
    assert found.rank == 3
    assert bool(torch.isfinite(found.basis).all())
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(3), rtol=0, atol=1e-5)
    assert float(found.eigenvalues.sum()) == pytest.approx(found.total_variance, rel=1e-4)


def test_rows_of_zeros_give_no_column_and_no_nan() -> None:
    found = principal_subspace(_moments(torch.zeros(20, 5)), 3)
    assert found.rank == 0 and found.basis.shape == (5, 0)
    assert found.total_variance == 0 and torch.equal(found.mean, torch.zeros(5))
    assert torch.equal(found.project(_random(4, 5)), torch.zeros(4, 5))


@pytest.mark.parametrize("chunk", [50, 7, 3])
def test_rows_that_never_change_give_no_column(chunk: int) -> None:
    # "never a column of noise": what varies here is the last bit of the mean of each chunk.
    found = principal_subspace(_moments(_random(10, seed=4).expand(50, 10), chunk), 4)
    assert found.rank == 0


def test_one_row_gives_no_column() -> None:
    found = principal_subspace(_moments(_random(1, 5)), 3)
    assert found.rank == 0 and found.count == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(bad: float) -> None:
    rows = _random(20, 5)
    rows[3, 2] = bad
    with pytest.raises(WorkbenchError, match="here"):
        principal_subspace(_moments(rows), 2, site="here")


def test_no_rows_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="here"):
        principal_subspace(Moments(), 2, site="here")


# --- comparisons ----------------------------------------------------------------------------------


def test_principal_angles_of_a_subspace_with_itself_are_zero() -> None:
    basis = _orthonormal(9, 4)
    turned = basis @ _orthonormal(4, 4, 1)  # another basis of the same subspace
    cosines = principal_angles(basis, turned)
    assert cosines.dtype == torch.float64
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(cosines.max()) <= 1
    assert overlap(basis, turned) == pytest.approx(1, abs=1e-6)


def test_principal_angles_of_orthogonal_subspaces_are_right() -> None:
    basis = _orthonormal(9, 7)
    assert principal_angles(basis[:, :3], basis[:, 3:]).tolist() == pytest.approx(
        [0, 0, 0], abs=1e-6
    )
    assert overlap(basis[:, :3], basis[:, 3:]) == pytest.approx(0, abs=1e-9)


def test_known_angles_come_out_with_the_smallest_angle_first() -> None:
    frame = _orthonormal(10, 6, 5).double()
    angles = torch.tensor([1.2, 0.3, 0.8], dtype=torch.float64)
    first = frame[:, :3]
    second = frame[:, :3] * angles.cos() + frame[:, 3:] * angles.sin()
    found = principal_angles(first.float(), second.float())
    torch.testing.assert_close(
        found, torch.tensor([0.3, 0.8, 1.2], dtype=torch.float64).cos(), rtol=0, atol=1e-6
    )
    assert overlap(first, second) == pytest.approx(float(angles.cos().square().mean()), abs=1e-6)


def test_a_subspace_inside_another_overlaps_wholly() -> None:
    basis = _orthonormal(9, 5)
    assert principal_angles(basis, basis[:, 1:3]).shape == (2,)
    assert overlap(basis, basis[:, 1:3]) == pytest.approx(1, abs=1e-6)
    assert overlap(basis[:, 1:3], basis) == pytest.approx(1, abs=1e-6)


def test_random_subspaces_overlap_by_rank_over_width_on_average() -> None:
    values = [
        overlap(_orthonormal(12, 2, seed), _orthonormal(12, 5, 1000 + seed)) for seed in range(300)
    ]
    assert np.mean(values) == pytest.approx(5 / 12, abs=4 * np.std(values) / np.sqrt(300))


def test_an_empty_subspace_overlaps_with_nothing() -> None:
    assert overlap(torch.zeros(9, 0), _orthonormal(9, 2)) == 0


def test_energy_inside_is_the_share_of_the_squared_norm() -> None:
    basis = _orthonormal(6, 6)
    delta = _random(4, 6, seed=1)
    columns = (delta.double() @ basis.double()).square().sum(0)
    for rank in (0, 1, 4):
        assert energy_inside(delta, basis[:, :rank]) == pytest.approx(
            float(columns[:rank].sum() / columns.sum()), rel=1e-5
        )
    assert energy_inside(delta, basis) == pytest.approx(1, rel=1e-6)
    inside = _random(4, 2, seed=2) @ basis[:, :2].T
    assert energy_inside(inside, basis[:, :2]) == pytest.approx(1, rel=1e-6)
    assert energy_inside(inside, basis[:, 2:]) == pytest.approx(0, abs=1e-10)
    assert energy_inside(torch.zeros(4, 6), basis) == 0


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 0])
def test_a_saved_subspace_comes_back_whole(rank: int, tmp_path: Path) -> None:
    rows = _random(40, 6) + 2 if rank else torch.zeros(40, 6)
    subspace = principal_subspace(
        _moments(rows),
        3,
        site="blocks.0.hook_resid_post",
        tokens="content",
        source='demo · üñí, "quoted"\n',
    )
    path = tmp_path / "new" / "s.safetensors"
    subspace.save(path)
    found = Subspace.load(path)
    for name in ("basis", "eigenvalues", "mean"):
        assert torch.equal(getattr(found, name), getattr(subspace, name))
        assert getattr(found, name).dtype == torch.float32
    for name in ("count", "total_variance", "site", "tokens", "source"):
        assert getattr(found, name) == getattr(subspace, name)
    assert [file.name for file in path.parent.iterdir()] == [
        "s.safetensors"
    ]  # no temporary file is left


def test_loading_what_is_no_subspace_is_one_clear_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    garbage, empty, other, whole = (
        tmp_path / name for name in ("garbage", "empty", "other", "whole")
    )
    garbage.write_bytes(b"\x00garbage" * 40)
    empty.write_bytes(b"")
    save_file({"basis": torch.zeros(3, 1)}, other)
    principal_subspace(_moments(_random(20, 6)), 2).save(whole)
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[:-20])
    for path in (garbage, empty, other, cut, tmp_path / "missing", tmp_path):
        with pytest.raises(WorkbenchError, match=path.name):
            Subspace.load(path)


# --- properties -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 30),
    width=st.integers(1, 12),
    inner=st.integers(1, 12),
    rank=st.integers(0, 14),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_projection_is_an_orthogonal_projector(
    seed: int, count: int, width: int, inner: int, rank: int, offset: float, scale: float
) -> None:
    rows = (
        _random(count, inner, seed=seed) @ _random(inner, width, seed=seed + 1)
        + offset * _random(width, seed=seed + 2)
    ) * scale
    found = principal_subspace(_moments(rows, 11), rank)
    assert found.rank <= min(rank, width)
    assert bool(torch.isfinite(found.basis).all() and torch.isfinite(found.eigenvalues).all())
    torch.testing.assert_close(
        found.basis.T @ found.basis, torch.eye(found.rank), rtol=0, atol=1e-5
    )
    probe = _random(5, width, seed=seed + 3)
    once = found.project(probe)
    torch.testing.assert_close(found.project(once), once, rtol=0, atol=1e-4)
    matrix = found.project(torch.eye(width))
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-5)
    # Pythagoras: what is projected and what is left are orthogonal.
    assert float((once * (probe - once)).sum().abs()) < 1e-3
    values = found.eigenvalues
    assert bool((values[:-1] >= values[1:]).all()) and bool((values > 0).all())
    assert float(values.double().sum()) <= found.total_variance * (1 + 1e-5)


@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 10),
    k=st.integers(0, 10),
    m=st.integers(0, 10),
)
def test_cosines_are_symmetric_and_lie_between_zero_and_one(
    seed: int, width: int, k: int, m: int
) -> None:
    first, second = (
        _orthonormal(width, width, seed + shift)[:, : min(rank, width)]
        for shift, rank in ((0, k), (1, m))
    )
    forward, backward = principal_angles(first, second), principal_angles(second, first)
    assert forward.shape == (min(first.shape[1], second.shape[1]),)
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-9)
    assert bool(((forward >= 0) & (forward <= 1)).all()) and bool(
        (forward[:-1] >= forward[1:]).all()
    )
    assert 0 <= overlap(first, second) <= 1
