"""Lanczos and stochastic Lanczos quadrature against matrices with known spectra, dense Hessians and
a softmax head; and the picture of a density.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.figures.density import density as figure
from workbench.sharpness.curvature import Curvature
from workbench.sharpness.density import both_signs, density, quadrature
from workbench.sharpness.krylov import lanczos
from workbench.sharpness.trace import hutchinson, rademacher
from workbench.tables import Table

K, NORM = "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"


def symmetric(values: Sequence[float], seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (basis * np.array(values)) @ basis.T


# --- Lanczos ---


def test_lanczos_to_the_end_gives_every_eigenvalue_and_its_weight() -> None:
    values = np.array([-10.0, -1.0, 0.0, 0.5, 2.0, 5.0])
    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))
    start = np.random.default_rng(2).standard_normal(6)
    nodes, weights = lanczos(lambda v: basis @ (values * (basis.T @ v)), start, 50).quadrature()
    np.testing.assert_allclose(nodes, values, atol=1e-10)
    # The spectral measure of a vector: its squared coordinates in the eigenvectors.
    np.testing.assert_allclose(weights, (basis.T @ start) ** 2 / (start @ start), atol=1e-10)


def test_converged_eigenvalues_do_not_come_back_as_ghosts() -> None:
    # Three far outliers converge within a few steps; without reorthogonalisation, copies of them
    # would be there by step 40.
    values = np.concatenate([np.linspace(-1, 1, 297), [-50.0, 70.0, 100.0]])
    matrix = symmetric(values.tolist())
    krylov = lanczos(lambda v: matrix @ v, rademacher(0, 0, 300), 100)
    nodes, weights = krylov.quadrature()
    assert len(nodes) == 100
    np.testing.assert_allclose(nodes[np.abs(nodes) > 2], [-50, 70, 100], rtol=1e-10)
    assert np.diff(nodes).min() > 1e-4
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    assert krylov.overlap < 1e-12


def test_a_gauss_quadrature_has_the_moments_of_the_matrix_up_to_twice_the_steps() -> None:
    matrix = symmetric(np.linspace(-2, 1.5, 60).tolist())
    start = rademacher(3, 0, 60)
    steps = 6
    nodes, weights = lanczos(lambda v: matrix @ v, start, steps).quadrature()
    power = start / np.linalg.norm(start)
    for order in range(2 * steps):
        assert float(weights @ nodes**order) == pytest.approx(
            float(start @ power) / 60**0.5, abs=1e-10
        )
        power = matrix @ power
    # The next moment is the first that a quadrature of that many nodes cannot have.
    assert float(weights @ nodes ** (2 * steps)) != pytest.approx(
        float(start @ power) / 60**0.5, abs=1e-6
    )


def test_lanczos_stops_where_the_reachable_vectors_are_exhausted() -> None:
    product = 3.0
    krylov = lanczos(lambda v: product * v, np.ones(5), 4)  # every vector is an eigenvector
    assert (krylov.alphas.tolist(), krylov.betas.tolist()) == ([pytest.approx(3.0)], [])
    zeros = quadrature(lambda v: 0 * v, 5, probes=2, steps=3)
    assert (zeros.top, zeros.bottom, zeros.products) == (0.0, 0.0, 2)
    assert np.isnan(zeros.negative_energy)


def test_wrong_starts_steps_and_products_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="start"):
        lanczos(lambda v: v, np.zeros(3), 2)
    with pytest.raises(WorkbenchError, match="steps"):
        lanczos(lambda v: v, np.ones(3), 0)
    with pytest.raises(WorkbenchError, match="finite"):
        lanczos(lambda v: v + np.inf, np.ones(3), 2)
    with pytest.raises(WorkbenchError, match="probes"):
        quadrature(lambda v: v, 3, probes=0)


# --- Stochastic Lanczos quadrature ---


def test_a_known_spectrum_gives_its_ends_mass_energy_and_trace() -> None:
    values = np.concatenate([np.linspace(-10, -0.5, 50), np.linspace(0.5, 5, 150)])
    matrix = symmetric(values.tolist())
    found = quadrature(lambda v: matrix @ v, 200, probes=20, steps=30)
    assert found.products == 600
    assert found.top == pytest.approx(5, rel=1e-2)
    assert found.bottom == pytest.approx(-10, rel=1e-2)
    assert found.top <= 5 + 1e-9
    assert found.bottom >= -10 - 1e-9
    # Weights of a random vector: Dirichlet, so a mass of 0.25 has a spread of sqrt(2 * 0.25 * 0.75
    # / 200) = 0.043 per probe at most, 0.01 over 20.
    assert found.mass_below(-1.0) == pytest.approx(0.25, abs=0.03)
    assert found.negative_energy == pytest.approx(
        -values[values < 0].sum() / np.abs(values).sum(), abs=0.03
    )
    assert found.moment_error < 1e-10
    # The same probes as Hutchinson's, and so the same estimate.
    assert found.trace == pytest.approx(
        hutchinson(
            lambda v: matrix @ v, {"a": slice(0, 200)}, relative_se=0, max_products=20
        ).value,
        rel=1e-9,
    )
    np.testing.assert_allclose(np.bincount(found.probe, found.weights), 1, rtol=1e-10)
    assert "20 probes" in repr(found)


def test_a_matrix_and_its_negative_mirror_one_another() -> None:
    matrix = symmetric(np.linspace(-3, 8, 50).tolist())
    one, other = (
        quadrature(lambda v, s=sign: s * (matrix @ v), 50, probes=2, steps=10) for sign in (1, -1)
    )  # type: ignore[misc]
    assert (one.top, one.bottom) == (pytest.approx(-other.bottom), pytest.approx(-other.top))
    assert one.negative_energy == pytest.approx(1 - other.negative_energy)


def test_the_smoothed_density_integrates_to_one_and_stands_where_the_eigenvalues_are() -> None:
    diagonal = np.array([-8.0] * 30 + [0.0] * 50 + [2.0] * 20)
    found = quadrature(lambda v: diagonal * v, 100, probes=2, steps=8)
    linear = 0.01
    grid = both_signs(found.bottom, found.top, linear, points=2001, margin=1.5)
    curves = found.smoothed(grid, linear, width=0.1)
    assert curves.shape == (2, 2001)
    coordinate = np.arcsinh(grid / linear)
    np.testing.assert_allclose(np.diff(coordinate), np.diff(coordinate)[0], rtol=1e-6)
    np.testing.assert_allclose(np.trapezoid(curves, coordinate, axis=1), 1, rtol=1e-6)
    # A diagonal matrix has the same measure for all sign vectors: shares 0.3, 0.5, 0.2, and
    # Gaussians of height share / (width sqrt(2 pi)).
    for value, share in ((-8.0, 0.3), (0.0, 0.5), (2.0, 0.2)):
        np.testing.assert_allclose(
            found.smoothed(np.array([value]), linear, width=0.1),
            share / (0.1 * (2 * np.pi) ** 0.5),
            rtol=1e-6,
        )
    for value, share in ((-8.1, 0.0), (-7.9, 0.3), (0.1, 0.8), (2.1, 1.0)):
        assert found.mass_below(value) == pytest.approx(share, abs=1e-9)
    assert found.negative_energy == pytest.approx(240 / 280)


# --- Models ---


def test_the_density_of_a_model_has_the_ends_and_moments_of_its_dense_hessian(
    llama: PreTrainedModel, batch: Batch
) -> None:
    operator = Curvature(llama, [batch], (K, NORM))
    dense = np.stack([operator.product(row) for row in np.eye(operator.size)])
    values = np.linalg.eigvalsh((dense + dense.T) / 2)
    found = density(llama, [batch], parameters=(K, NORM), probes=2, steps=40)
    assert (found.size, found.products) == (144, 80)
    assert found.top == pytest.approx(values[-1], rel=1e-3)
    assert found.bottom == pytest.approx(values[0], rel=1e-2)
    assert found.bottom < 0
    assert found.moment_error < 1e-6
    assert found.overlap < 1e-10
    for probe in range(2):
        signs = rademacher(0, probe, 144)
        mine = found.probe == probe
        for order, moment in (
            (1, signs @ dense @ signs),
            (2, np.sum((dense @ signs) ** 2)),
            (3, (dense @ signs) @ dense @ (dense @ signs)),
        ):
            assert 144 * float(found.weights[mine] @ found.nodes[mine] ** order) == pytest.approx(
                float(moment), rel=1e-3
            )


def test_softmax_regression_curves_nowhere_downwards(llama: PreTrainedModel, batch: Batch) -> None:
    # The loss is convex in the head: what is below zero there is rounding, and must not be counted.
    found = density(llama, [batch], parameters=("lm_head.weight",), probes=2, steps=30)
    assert found.top > 0
    assert found.bottom > -1e-5 * found.top
    assert found.negative_energy < 1e-5


# --- The figure ---


def _table(
    shift: Callable[[str, int], float], arms: Sequence[str] = ("unlearned",)
) -> pd.DataFrame:
    """Densities of three methods and two seeds, as the stage writes them."""
    table = Table({"run": "r", "stage": "sharpness", "split": "forget-heldout"})
    rng = np.random.default_rng(0)
    bulk = rng.standard_normal(200) * 0.01
    grid = both_signs(-30, 60, 0.05, points=121)
    for method, arm in [
        ("base", "base"),
        *((method, arm) for arm in arms for method in ("npo", "npo-sam")),
    ]:
        for seed in (1, 2):
            diagonal = np.concatenate([bulk, [-1.0, -shift(method, seed), 3.0, 40.0]])
            found = quadrature(lambda v, d=diagonal: d * v, 204, seed=seed, probes=2, steps=25)  # type: ignore[misc]
            columns = {"method": method, "seed": seed, "arm": arm}
            for point, curve in zip(grid, found.smoothed(grid, 0.05).T, strict=True):
                table.add(
                    "density",
                    curve.mean(),
                    low=curve.min(),
                    high=curve.max(),
                    eigenvalue=float(point),
                    **columns,
                )
            table.add("trace", found.trace, **columns)
            table.add("trace_se", 2.0, **columns)
            table.add("top_eigenvalue", found.top, method=method, seed=seed)
            table.add("bottom_eigenvalue", found.bottom, method=method, seed=seed)
    return table.frame()


def test_the_figure_has_a_panel_per_arm_with_the_base_in_each_and_a_line_per_seed() -> None:
    table = _table(
        lambda method, seed: {"base": 2.0, "npo": 20.0, "npo-sam": 8.0}[method] + seed,
        arms=("as trained", "canonical"),
    )
    own = table[(table["arm"] == "as trained") & (table["method"] == "npo")].assign(
        method="base", arm="canonical"
    )  # a base of the panel's own takes the place of the other
    drawn = figure(pd.concat([table, own], ignore_index=True))
    assert [axes.get_title() for axes in drawn.axes] == ["as trained", "canonical"]
    for axes in drawn.axes:
        assert len([line for line in axes.lines if len(line.get_xdata()) == 121]) == 6  # type: ignore[arg-type]
        assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert [label.split(",")[0] for label in labels] == ["base", "NPO", "NPO+SAM"]
        assert all("trace" in label for label in labels)
    ends = drawn.axes[0].collections
    assert any(len(collection.get_paths()) == 4 for collection in ends)  # two ends of two seeds


def test_a_table_without_density_says_so() -> None:
    assert (
        "no spectral density"
        in figure(_table(lambda method, seed: 1.0).query("metric == 'trace'")).texts[0].get_text()
    )
