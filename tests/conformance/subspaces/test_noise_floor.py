"""What rounding makes is no direction, and what stands above its own rounding is one, whatever else
the rows hold.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from workbench.hooks import Moments
from workbench.subspaces.collapse import Collapse, collapse_side
from workbench.subspaces.finders import SketchPCA, StreamingPCA
from workbench.subspaces.subspace import Subspace, overlap
from workbench.subspaces.weights import contrast

FINDERS = [StreamingPCA, SketchPCA]
Make = type[StreamingPCA] | type[SketchPCA]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _frame(width: int, rank: int, seed: int = 0) -> Tensor:
    frame: Tensor = torch.linalg.qr(_random(width, rank, seed=seed).double())[0]
    return frame


@pytest.mark.parametrize("make", FINDERS)
@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("factor", [1.0, 2e3, 1e5])
def test_a_massive_coordinate_hides_no_other_direction(
    factor: float, mean: float, make: Make
) -> None:
    rows = _random(4000, 64, seed=1) * 0.5 + mean
    rows[:, 7] *= factor
    finder = make(16)
    for part in rows.split(701):
        finder.partial_fit(part)
    assert finder.subspace().rank == 16
    if factor > 1:
        assert float(finder.components_[0, 7].abs()) > 1 - 1e-4


def test_directions_beside_a_massive_coordinate_are_those_of_float64() -> None:
    rows = _random(4000, 64, seed=1) * torch.linspace(2, 0.5, 64)
    rows[:, 7] *= 2000
    exact = torch.linalg.eigh(torch.cov(rows.double().T, correction=0))[1].flip(1)[:, :16]
    found = StreamingPCA(16).fit(rows).subspace()
    assert overlap(found.basis, exact) > 1 - 1e-5


@pytest.mark.parametrize("make", FINDERS)
@pytest.mark.parametrize("factor", [1.0, 2000.0])
@pytest.mark.parametrize("offset", [0.0, 5.0, 1000.0])
@pytest.mark.parametrize("rank", [0, 3])
def test_rows_of_low_rank_give_no_column_of_noise(
    rank: int, offset: float, factor: float, make: Make
) -> None:
    spans = _frame(20, max(rank, 1), 2)[:, :rank].float()
    rows = _random(300, rank, seed=1) @ spans.T + offset * _random(20, seed=3)
    rows = rows.contiguous()
    rows[:, 4] *= factor
    finder = make(12)
    for part in rows.split(77):
        finder.partial_fit(part)
    assert finder.subspace().rank == rank


def test_a_contrast_sees_beside_a_massive_coordinate_and_invents_nothing() -> None:
    first, second = Moments(), Moments()
    rows = _frame(5000, 12).float() * 5000**0.5  # uncorrelated, so that only variances differ
    rows[:, 0] *= 2000
    other = rows.clone()
    other[:, 5] *= 0.5
    first.update(rows)
    second.update(other)
    found = contrast(first, second, 4)
    assert float(found.basis[5].abs().max()) > 0.99
    assert contrast(first, first, 4).rank == 0


def test_fewer_directions_than_asked_are_stated(tmp_path: Path) -> None:
    rows = _random(50, 3) @ _random(3, 9, seed=1)
    for make in FINDERS:
        finder = make(5).fit(rows)
        assert "(5 components" in repr(finder)
        found = finder.subspace(site="here")
        assert "3 of 5 components" in repr(finder)
        assert "3 of 9 (5 asked)" in repr(found) and "asked" not in repr(found.top(3))
        found.save(tmp_path / "found.safetensors")
        assert repr(Subspace.load(tmp_path / "found.safetensors")) == repr(found)
    basis, _ = collapse_side(StreamingPCA(5).fit(rows), 5)
    words = repr(Collapse(basis, torch.eye(9)[:, :4], asked=(5, 4)))
    assert words == "Collapse(3 of 5 activation and 4 gradient directions)"
