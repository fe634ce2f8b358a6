"""Finders of principal components against float64 numpy, scipy and scikit-learn, and the sketch
against the matrix that it sketches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.hooks import Capture, Collect, without_first
from workbench.subspaces.finders import EachSite, SketchPCA, StreamingPCA

Finder = StreamingPCA | SketchPCA
Maker = Callable[..., Finder]
both = pytest.mark.parametrize("make", [StreamingPCA, SketchPCA])
ratios = pytest.mark.parametrize("ratio", [0.0, 10.0, 1000.0])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights(count: int, seed: int = 0) -> Tensor:
    return (
        torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    )


def _rows(
    count: int = 300, width: int = 12, ratio: float = 0.0, seed: int = 0, gap: int = 5
) -> Tensor:
    """Float32 rows: a falling spectrum turned out of the axes, three times as large before ``gap``
    as after it, ``ratio`` spreads away from the origin.
    """
    spreads = torch.linspace(1, 0.5, width) * torch.where(torch.arange(width) < gap, 1.0, 1 / 3)
    turn = torch.linalg.qr(_random(width, width, seed=seed + 1))[0]
    return (_random(count, width, seed=seed) * spreads) @ turn.T + ratio * _random(
        width, seed=seed + 2
    ).sign()


def _covariance(rows: Tensor, weights: Tensor | None = None) -> np.ndarray:
    return np.cov(
        rows.double().numpy(),
        rowvar=False,
        ddof=0,
        aweights=None if weights is None else weights.numpy(),
    )


def _compressed(finder: Finder) -> np.ndarray:
    """The covariance that the components stand for; unlike single components it has no signs and
    does not mind close eigenvalues.
    """
    basis = finder.components_.double().numpy()
    return np.asarray(basis.T @ np.diag(finder.explained_variance_.double().numpy()) @ basis)


def _assert_same(first: Finder, second: Finder, tolerance: float = 1e-6) -> None:
    assert first.components_.shape == second.components_.shape
    np.testing.assert_allclose(
        first.explained_variance_.numpy(), second.explained_variance_.numpy(), rtol=tolerance
    )
    np.testing.assert_allclose(
        _compressed(first),
        _compressed(second),
        rtol=0,
        atol=tolerance * float(first.explained_variance_[0]),
    )
    np.testing.assert_allclose(
        first.mean_.numpy(), second.mean_.numpy(), rtol=tolerance, atol=tolerance
    )
    assert first.subspace().total_variance == pytest.approx(
        second.subspace().total_variance, rel=tolerance
    )


def _assert_exact(finder: Finder, rows: Tensor, weights: Tensor | None = None) -> None:
    """Eigenvalues, eigenvectors, mean and total variance are those of the same rows in float64."""
    covariance = _covariance(rows, weights)
    values = scipy.linalg.eigh(covariance, eigvals_only=True)[::-1]
    basis, found = finder.components_.double().numpy(), finder.explained_variance_.double().numpy()
    # 1e-6 of each; of those below a tenth of the largest, 1e-7 of the largest: float32 products
    # cannot tell more.
    assert (
        np.abs(found - values[: len(found)])
        <= np.maximum(1e-6 * values, 1e-7 * values[0])[: len(found)]
    ).all()
    # What makes a vector an eigenvector; single vectors cannot be compared where two eigenvalues
    # are close.
    np.testing.assert_allclose(covariance @ basis.T, basis.T * found, rtol=0, atol=1e-6 * values[0])
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-6)
    np.testing.assert_allclose(
        finder.mean_.numpy(),
        np.average(rows.double().numpy(), axis=0, weights=weights),
        rtol=1e-6,
        atol=1e-7,
    )
    assert finder.subspace().total_variance == pytest.approx(np.trace(covariance), rel=1e-6)


chunkings = given(
    cuts=st.lists(st.integers(0, 60), max_size=6),
    seed=st.integers(0, 1000),
    ratio=st.sampled_from([0.0, 10.0, 1000.0]),
    weighted=st.booleans(),
)


def _in_parts(
    make: Callable[[], Finder], rows: Tensor, weights: Tensor | None, cuts: list[int], seed: int
) -> Finder:
    """One finder for each part, merged in an order and a grouping drawn by ``seed``. Parts may be
    empty: a position rule may select nothing in a batch.
    """
    edges = pairwise([0, *sorted(cuts), len(rows)])
    finders, rng = (
        [
            make().partial_fit(rows[a:b], sample_weight=None if weights is None else weights[a:b])
            for a, b in edges
        ],
        Random(seed),
    )
    while len(finders) > 1:
        rng.shuffle(finders)
        finders.append(finders.pop().merge(finders.pop()))  # type: ignore[arg-type]
    return finders[0]


@ratios
@pytest.mark.parametrize("chunk", [300, 64, 7, 2])
def test_streamed_components_are_those_of_float64(ratio: float, chunk: int) -> None:
    rows = _rows(ratio=ratio)
    finder = StreamingPCA(9)
    for part in rows.split(chunk):
        finder.partial_fit(part)
    assert finder.components_.shape == (9, 12) and finder.n_samples_seen_ == 300
    _assert_exact(finder, rows)


@chunkings
def test_any_chunking_and_any_order_of_merging_give_the_float64_answer(
    cuts: list[int], seed: int, ratio: float, weighted: bool
) -> None:
    rows, weights = _rows(60, 8, ratio, seed), _weights(60, seed) if weighted else None
    _assert_exact(_in_parts(lambda: StreamingPCA(8), rows, weights, cuts, seed), rows, weights)


@chunkings
def test_any_chunking_and_any_order_of_merging_give_one_sketch(
    cuts: list[int], seed: int, ratio: float, weighted: bool
) -> None:
    rows, weights = _rows(60, 20, ratio, seed), _weights(60, seed) if weighted else None
    whole = SketchPCA(5, probes=8).fit(rows, sample_weight=weights)
    parts = _in_parts(lambda: SketchPCA(5, probes=8), rows, weights, cuts, seed)
    assert parts.n_samples_seen_ == 60
    _assert_same(parts, whole)
    assert parts.residual_ == pytest.approx(whole.residual_, abs=1e-6)
    np.testing.assert_allclose(parts.gaps_.numpy(), whole.gaps_.numpy(), atol=1e-5)


def test_scikit_learn_finds_the_same_components() -> None:
    rows = _rows(200, 10, 2.0)
    peer, finder = PCA(4).fit(rows.double().numpy()), StreamingPCA(4).fit(rows)
    signs = np.sign((finder.components_.numpy() * peer.components_).sum(1))
    np.testing.assert_allclose(
        finder.components_.numpy() * signs[:, None], peer.components_, atol=1e-5
    )
    np.testing.assert_allclose(
        finder.explained_variance_.numpy() * 200 / 199, peer.explained_variance_, rtol=1e-6
    )
    np.testing.assert_allclose(
        finder.explained_variance_ratio_.numpy(), peer.explained_variance_ratio_, rtol=1e-6
    )
    np.testing.assert_allclose(
        finder.transform(rows).numpy() * signs, peer.transform(rows.double().numpy()), atol=1e-5
    )


@both
@ratios
def test_whole_weights_are_repeated_rows(make: Maker, ratio: float) -> None:
    rows = _rows(80, 14, ratio)
    times = torch.randint(0, 4, (80,), generator=torch.Generator().manual_seed(1))
    _assert_same(
        make(5).fit(rows, sample_weight=times), make(5).fit(rows.repeat_interleave(times, 0))
    )


@ratios
def test_real_weights_give_the_weighted_covariance(ratio: float) -> None:
    rows, weights = _rows(90, 8, ratio), _weights(90)
    finder = StreamingPCA(8).fit(rows, sample_weight=weights)
    _assert_exact(finder, rows, weights)
    assert finder.moments_.weight == pytest.approx(float(weights.sum()))
    # Only ratios of weights mean anything: the covariance is divided by the total weight.
    _assert_exact(StreamingPCA(8).fit(rows, sample_weight=1e-3 * weights), rows, weights)


@both
def test_rows_of_weight_zero_are_masked_rows(make: Maker) -> None:
    rows, mask = _rows(80, 14), torch.arange(80) % 3 > 0
    mask[40:60] = False  # two chunks without any weight
    finder = make(5)
    for part, kept in zip(rows.split(10), mask.split(10), strict=True):
        finder.partial_fit(part, sample_weight=kept.float())
    _assert_same(finder, make(5).fit(rows[mask]))


@both
def test_the_count_of_rows_does_not_depend_on_the_chunking(make: Maker) -> None:
    rows, weights = _rows(4, 6), torch.tensor([1.0, 0, 2, 0])
    single = make(2)
    for row in range(4):
        single.partial_fit(rows[row : row + 1], sample_weight=weights[row : row + 1])
    assert single.n_samples_seen_ == make(2).fit(rows, sample_weight=weights).n_samples_seen_


@both
@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([1.0, -1, 1]),
        torch.tensor([1.0, float("nan"), 1]),
        torch.tensor([float("inf"), 1, 1]),
        torch.ones(2),
    ],
)
def test_bad_weights_are_refused(make: Maker, weights: Tensor) -> None:
    with pytest.raises(ValueError, match="weights"):
        make(2).partial_fit(_random(3, 4), sample_weight=weights)


POOR = {
    "fewer rows than coordinates": (_random(6, 30), 5),
    "fewer rows than coordinates, far from the origin": (_random(6, 30) + 1000, 5),
    "twin columns": (_random(50, 6).repeat(1, 4), 6),
    "three directions, far from the origin": (
        _random(50, 3) @ _random(3, 24, seed=1) + 1000 * _random(24, seed=2).sign(),
        3,
    ),
    "rows that never change": (_random(1, 10, seed=3).expand(40, 10), 0),
    "a single row": (_random(1, 10), 0),
    "zeros": (torch.zeros(30, 8), 0),
}


@both
@pytest.mark.parametrize("chunk", [1000, 7, 1])
@pytest.mark.parametrize("name", POOR)
def test_there_are_no_more_components_than_the_rank(make: Maker, chunk: int, name: str) -> None:
    rows, rank = POOR[name]
    finder = make(10)
    for part in rows.split(chunk):
        finder.partial_fit(part)
    found, total = finder.subspace(), float(np.trace(_covariance(rows))) if len(rows) > 1 else 0.0
    assert found.rank == rank
    for tensor in (
        found.basis,
        found.eigenvalues,
        finder.explained_variance_ratio_,
        found.mean,
        finder.transform(rows),
    ):
        assert bool(torch.isfinite(tensor).all())
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(rank), rtol=0, atol=1e-5)
    assert float(found.eigenvalues.sum()) == pytest.approx(
        total, rel=1e-4
    ) and found.total_variance == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_sketch_never_takes_rounding_for_a_direction(offset: float) -> None:
    # Beyond the rank, the sketch holds only rounding; a solution that divides by it makes a
    # direction with a variance a thousand times the rounding.
    ranks = [
        SketchPCA(10)
        .fit(_random(200, 5, seed=seed) @ _random(5, 40, seed=seed + 1) + offset)
        .subspace()
        .rank
        for seed in range(60)
    ]
    assert ranks == [5] * 60


@both
def test_weighted_rows_that_never_change_give_no_component(make: Maker) -> None:
    # The weighted mean of equal rows differs in its last bit from chunk to chunk; that is no
    # variance.
    for seed in range(20):
        rows, weights = _random(1, 10, seed=seed).expand(20, 10), _weights(20, seed)
        finder = (
            make(4)
            .partial_fit(rows, sample_weight=weights)
            .partial_fit(rows[:7], sample_weight=0.3 * weights[:7])
        )
        assert finder.subspace().rank == 0, seed


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_give_an_error_and_no_subspace(make: Maker, bad: float) -> None:
    rows = _rows(30, 6)
    broken = rows + torch.zeros(30, 6).index_put(
        (torch.tensor(3), torch.tensor(2)), torch.tensor(bad)
    )
    spoilt = make(2).fit(broken)
    for finder in (spoilt, make(2).fit(rows).partial_fit(broken), make(2).fit(rows).merge(spoilt)):  # type: ignore[arg-type]
        for read in (
            finder.subspace,
            lambda f=finder: f.components_,
            lambda f=finder: f.transform(rows),
        ):
            with pytest.raises(WorkbenchError, match="NaN or infinity"):
                read()
    _assert_same(spoilt.fit(rows), make(2).fit(rows))  # nothing of it is left


# --- scikit-learn's conventions -------------------------------------------------------------------


@both
def test_fit_forgets_and_partial_fit_remembers(make: Maker) -> None:
    rows, other = _rows(80, 14), _rows(50, 14, seed=5)
    finder = make(5).fit(other)
    finder.components_  # noqa: B018 - what was computed from the earlier rows must not be served again
    _assert_same(finder.fit(rows), make(5).fit(rows))
    finder.components_  # noqa: B018
    assert finder.partial_fit(other) is finder and finder.n_samples_seen_ == 130
    _assert_same(finder, make(5).fit(torch.cat([rows, other])))
    assert (
        finder.fit(torch.zeros(3, 9)).subspace().width == 9
    )  # another width is no obstacle after forgetting


@both
def test_parameters_can_be_read_set_and_cloned(make: Maker) -> None:
    given_: dict[str, Any] = (
        {"n_components": 3}
        if make is StreamingPCA
        else {"n_components": 3, "oversample": 5, "probes": 7, "seed": 2}
    )
    finder = make(**given_)
    assert finder.get_params() == given_
    copy = clone(finder.fit(rows := _rows(80, 14)))
    assert copy.get_params() == given_
    with pytest.raises(NotFittedError):
        copy.components_  # noqa: B018
    assert (
        copy.set_params(n_components=2) is copy
        and copy.fit(rows).components_.shape == (2, 14)
        and finder.components_.shape == (3, 14)
    )


@both
@ratios
def test_transform_is_the_centred_projection(make: Maker, ratio: float) -> None:
    rows = _rows(100, 14, ratio)
    finder = make(5).fit(rows)
    scores = finder.transform(rows)
    expected = (rows.double() - rows.double().mean(0)) @ finder.components_.double().T
    # The rounding of a float32 mean, seen along one unit vector of 14 coordinates.
    np.testing.assert_allclose(scores.numpy(), expected.numpy(), atol=1e-5 + 14**0.5 * 6e-8 * ratio)
    torch.testing.assert_close(make(5).fit_transform(rows), scores)
    np.testing.assert_allclose(
        scores.double().var(0, correction=0).numpy(),
        finder.explained_variance_.numpy(),
        rtol=1e-5 if make is StreamingPCA else 0.3,
    )


@both
def test_nothing_is_found_before_a_row_was_seen(make: Maker) -> None:
    unweighted = make(2).partial_fit(_random(3, 5), sample_weight=torch.zeros(3))
    for finder in (
        make(2),
        make(2).partial_fit(torch.zeros(0, 5)),
        make(2).merge(make(2)),
        unweighted,
    ):
        for read in (
            finder.subspace,
            lambda f=finder: f.components_,
            lambda f=finder: f.mean_,
            lambda f=finder: f.transform(torch.zeros(1, 5)),
        ):
            with pytest.raises(NotFittedError, match="no row"):
                read()


@both
def test_scikit_learn_can_tell_whether_it_is_fitted(make: Maker) -> None:
    check_is_fitted(make(2).fit(_random(9, 4)))
    with pytest.raises(NotFittedError):
        check_is_fitted(make(2))


@both
def test_rows_of_another_width_are_refused(make: Maker) -> None:
    finder = make(2).fit(_random(9, 4))
    with pytest.raises((ValueError, WorkbenchError), match="width"):
        finder.partial_fit(_random(9, 5))
    _assert_same(finder, make(2).fit(_random(9, 4)))  # and nothing of them was kept


# --- the sketch -----------------------------------------------------------------------------------


@ratios
@pytest.mark.parametrize("weighted", [False, True])
def test_the_state_of_a_sketch_is_the_scatter_times_the_test_matrix(
    ratio: float, weighted: bool
) -> None:
    rows, weights = _rows(120, 30, ratio), _weights(120) if weighted else None
    finder = _in_parts(lambda: SketchPCA(6, oversample=4, probes=3), rows, weights, [20, 21, 90], 0)
    test = finder._test.double().numpy()
    assert test.shape == (30, 13)
    scatter = _covariance(rows, weights) * (120 if weights is None else float(weights.sum()))
    expected = scatter @ test
    assert np.linalg.norm(finder._sketch.numpy() - expected) < 1e-6 * np.linalg.norm(expected)
    assert finder._energy == pytest.approx(np.trace(scatter), rel=1e-6)


@ratios
@pytest.mark.parametrize(("rank", "components"), [(6, 6), (4, 6), (1, 6), (6, 30)])
def test_a_sketch_is_exact_where_the_rank_is_no_larger_than_its_components(
    ratio: float, rank: int, components: int
) -> None:
    rows = (_random(150, rank) * torch.linspace(2, 1, rank)) @ torch.linalg.qr(
        _random(40, rank, seed=1)
    )[0].T + ratio * _random(40, seed=2).sign()
    finder, values = SketchPCA(components).fit(rows), np.linalg.eigvalsh(_covariance(rows))[::-1]
    np.testing.assert_allclose(finder.explained_variance_[:rank].numpy(), values[:rank], rtol=1e-4)
    np.testing.assert_allclose(_compressed(finder), _covariance(rows), atol=1e-4 * values[0])
    assert finder.residual_ < 1e-4
    assert float(finder.explained_variance_ratio_.sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"n_components": 4}, {"oversample": 2}, {"probes": 5}]
)
def test_sketches_of_different_test_matrices_are_not_merged(change: dict[str, int]) -> None:
    rows, settings = _rows(40, 14), {"n_components": 3, "oversample": 3, "probes": 4, "seed": 0}
    fitted = SketchPCA(**settings).fit(rows)
    other, empty = SketchPCA(**settings | change).fit(rows), SketchPCA(**settings | change)
    # The test matrix of an empty one is fixed by its parameters; that of a fitted one no longer
    # changes with them.
    for finder in (
        other,
        fitted.next_pass().fit(rows),
        empty,
        clone(other).fit(rows).set_params(**settings),
    ):
        with pytest.raises(WorkbenchError, match="merged"):
            finder.merge(fitted)


@pytest.mark.parametrize("components", [3, 12])
def test_the_residual_is_that_of_the_covariance(components: int) -> None:
    rows, probes = _random(400, 60) * torch.arange(1, 61) ** -0.4, 3000
    finder = SketchPCA(components, probes=probes).fit(rows)
    missed = (covariance := _covariance(rows)) - _compressed(finder)
    truth = np.linalg.norm(missed) / np.linalg.norm(covariance)
    # The squared norm from Gaussian probes has the relative variance 2 ||M^T M||_F^2 / (||M||_F^4
    # probes); four standard errors of both norms, halved by the root.
    spread = sum(
        np.sqrt(2 / probes) * np.linalg.norm(m.T @ m) / np.linalg.norm(m) ** 2
        for m in (missed, covariance)
    )
    assert finder.residual_ == pytest.approx(truth, rel=2 * spread)
    # The estimate uses no part of the fit: on average over seeds it is right with few probes as
    # well.
    few = [SketchPCA(components, probes=8, seed=seed).fit(rows).residual_ for seed in range(40)]
    assert np.mean(few) == pytest.approx(truth, rel=0.1)


def test_gaps_are_relative_to_the_next_eigenvalue_and_unknown_ones_not_large() -> None:
    rows = _random(500, 3, seed=1) @ torch.linalg.qr(_random(20, 3))[0].T
    values = np.linalg.eigvalsh(_covariance(rows))[::-1]
    expected = (values[:3] - [*values[1:3], 0]) / values[:3]
    np.testing.assert_allclose(SketchPCA(2).fit(rows).gaps_.numpy(), expected[:2], atol=1e-4)
    np.testing.assert_allclose(
        SketchPCA(3).fit(rows).gaps_.numpy(), expected, atol=1e-4
    )  # after the last direction there is nothing
    # Without oversampling the eigenvalue after the last one was not computed; this spectrum is flat
    # there, so a gap of 1 would be wrong.
    last = float(SketchPCA(4, oversample=0).fit(_random(2000, 20)).gaps_[-1])
    assert np.isnan(last) or last < 0.5


def test_every_further_pass_is_more_exact() -> None:
    rows = _random(1200, 400) * torch.arange(1, 401) ** -0.5  # the spectrum falls slowly
    values, vectors = np.linalg.eigh(_covariance(rows))
    finder, cosines, errors = SketchPCA(20).fit(rows), [], []
    for _ in range(3):
        cosines.append(
            np.linalg.svd(
                finder.components_.double().numpy() @ vectors[:, ::-1][:, :20], compute_uv=False
            ).min()
        )
        errors.append(np.abs(finder.explained_variance_.numpy() / values[::-1][:20] - 1))
        finder = finder.next_pass()
        for part in rows.split(500):
            finder.partial_fit(part)
    assert (
        cosines[0] < cosines[1] < cosines[2]
        and (errors[0] > errors[1]).all()
        and errors[1].max() > errors[2].max()
    )


def test_a_further_pass_begins_empty_and_keeps_its_range_when_fitted_anew() -> None:
    rows = _rows(80, 30)
    first = SketchPCA(3).fit(rows)
    state, refined = first._sketch.clone(), first.next_pass()
    assert refined.n_samples_seen_ == 0 and refined.get_params() == first.get_params()
    _assert_same(refined.fit(rows), first.next_pass().fit(rows[:10]).fit(rows))
    assert torch.equal(first._sketch, state)
    with pytest.raises(WorkbenchError, match="width 30"):
        refined.fit(_random(5, 31))


def test_a_further_pass_before_any_row_is_a_first_pass_or_a_clear_error() -> None:
    try:
        refined = SketchPCA(3).next_pass()
    except NotFittedError:
        return
    _assert_same(refined.fit(_rows(40, 14)), SketchPCA(3).fit(_rows(40, 14)))


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_memory_is_linear_in_the_width() -> None:
    width, rows = 14_336, _random(200, 14_336)
    with _Largest() as largest:
        finder = SketchPCA(64)
        for part in rows.split(100):
            finder.partial_fit(part)
        assert finder.components_.shape == (64, width) and 0 < finder.residual_ < 1
        refined = finder.next_pass().partial_fit(rows[:70])
        refined.merge(finder.next_pass().partial_fit(rows[70:140])).components_  # noqa: B018
    assert (
        largest.numel <= 2 * width * 144
    )  # twice the sketch: 64 components, as many again, 16 probes
    assert finder.nbytes < 40e6
    assert (
        len({SketchPCA(8).fit(_random(9, wide)).nbytes / wide for wide in (100, 1000, 3000)}) == 1
    )


def test_every_byte_of_a_further_pass_is_counted() -> None:
    rows = _rows(40, 50)
    for finder in (SketchPCA(5).fit(rows), SketchPCA(5).fit(rows).next_pass().fit(rows)):
        assert finder.nbytes == sum(
            value.nbytes for value in vars(finder).values() if isinstance(value, Tensor)
        )


@both
def test_bfloat16_rows_and_autocast_change_nothing(make: Maker) -> None:
    rows = _rows(90, 14, 3.0).bfloat16()
    expected = make(5).fit(rows.float()).subspace()
    finder = make(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        finder.partial_fit(rows)
    for found in (make(5).fit(rows).subspace(), finder.subspace()):
        assert all(
            torch.equal(getattr(found, name), getattr(expected, name))
            for name in ("basis", "eigenvalues", "mean")
        )
        assert found.total_variance == expected.total_variance


@both
def test_a_finder_at_each_site_has_seen_the_rows_of_that_site(
    make: Maker, llama: PreTrainedModel, make_batch: Callable[..., Batch]
) -> None:
    names = ["blocks.0.hook_resid_post", "blocks.1.mlp.out.hook_in"]
    found, rows = EachSite(lambda: make(3)), Collect()
    with Capture(llama, names, found, rows, at=without_first) as capture:
        for seed in range(3):
            capture.forward(make_batch((30, 11, 25), seed=seed).inputs)
    for name, width in zip(names, (16, 24), strict=True):
        assert rows[name].shape == (3 * (29 + 10 + 24), width) and found[
            name
        ].n_samples_seen_ == len(rows[name])
        _assert_same(found[name], make(3).fit(rows[name]), 1e-5)
    assert found[names[0]].subspace(site=names[0], tokens=without_first.name).site == names[0]
    with pytest.raises(WorkbenchError, match=r"blocks\.0\.hook_resid_post"):
        found["blocks.7.hook_resid_post"]
