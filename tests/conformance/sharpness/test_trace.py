"""Traces by random probes, restricted operators and both ends of the spectrum, against explicit
matrices, dense Hessians and the closed form of a softmax head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.sharpness.curvature import Curvature, extremes, outer_eigenvalue, spectrum_ends
from workbench.sharpness.trace import (
    hutchinson,
    paired_difference,
    rademacher,
    relative_flatness,
    trace,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]

K, V, NORM = (
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.norm.weight",
)
CHOSEN = (K, V, NORM)


def dense_hessian(model: PreTrainedModel, batch: Batch, names: Sequence[str]) -> np.ndarray:
    """Dense Hessian of the mean token loss over named parameters, in float64 with attention written
    out, by log-softmax: the reference.
    """
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    everything = dict(twin.named_parameters())
    chosen = [everything[name] for name in names]

    logits = functional_call(
        twin, dict(zip(names, chosen, strict=True)), kwargs={**batch.inputs, "use_cache": False}
    ).logits.double()
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    loss = -(log_p * batch.target_mask[:, 1:]).sum() / batch.target_mask[:, 1:].sum()
    gradient = torch.cat(
        [part.reshape(-1) for part in torch.autograd.grad(loss, chosen, create_graph=True)]
    )
    rows = torch.autograd.grad(
        gradient, chosen, torch.eye(len(gradient), dtype=gradient.dtype), is_grads_batched=True
    )
    return torch.cat([row.reshape(len(gradient), -1) for row in rows], dim=1).numpy()


def head_features(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """``[token, width]`` hidden states and ``[token, vocabulary]`` probabilities at every target
    token, float64.
    """
    with torch.no_grad():
        hidden = (
            model.model(**batch.inputs).last_hidden_state[:, :-1][batch.target_mask[:, 1:]].double()
        )
    return hidden, (hidden @ model.lm_head.weight.detach().double().T).softmax(-1)


def symmetric(values: Sequence[float], seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (basis * np.array(values)) @ basis.T


def whole(matrix: np.ndarray) -> dict[str, slice]:
    return {"all": slice(0, len(matrix))}


# --- Hutchinson on explicit matrices ---


def test_a_diagonal_matrix_is_exact_with_one_probe() -> None:
    diagonal = np.array([-10.0, 5.0, 0.0, 3.25, 1e-3, 7.0])
    found = hutchinson(lambda v: diagonal * v, {"a": slice(0, 2), "b": slice(2, 6)}, max_products=1)
    assert found.n == 1
    assert found.value == pytest.approx(diagonal.sum(), rel=1e-14)
    assert np.isnan(found.se)
    assert found.frobenius_squared[0] == pytest.approx((diagonal**2).sum(), rel=1e-14)
    assert found.by_block()["trace"].tolist() == pytest.approx([-5.0, 10.251])
    # With two probes the spread is exactly zero, and so the search stops at once.
    again = hutchinson(lambda v: diagonal * v, {"a": slice(0, 6)}, min_probes=2, max_products=50)
    assert (again.n, again.se) == (2, 0.0)


def test_the_spread_of_a_probe_is_hutchinsons_formula() -> None:
    matrix = symmetric([-10, 5, 3, -1, 0.5, 0, 0, 2], seed=3)
    n = 3000
    found = hutchinson(lambda v: matrix @ v, whole(matrix), relative_se=0, max_products=n)
    assert found.n == n  # a target of 0 never stops early
    off = 2 * ((matrix**2).sum() - (np.diag(matrix) ** 2).sum())
    assert (
        found.se * n**0.5 == pytest.approx(off**0.5, rel=0.06)
        # relative error of a standard deviation from 3000 samples: about 1/sqrt(2n) = 1.1 %, times
        # a kurtosis factor
    )
    assert abs(found.value - np.trace(matrix)) < 4 * found.se
    squared, error = found.frobenius_squared
    assert abs(squared - (matrix**2).sum()) < 4 * error
    assert (matrix**2).sum() == pytest.approx(100 + 25 + 9 + 1 + 0.25 + 4)


def test_block_traces_are_those_of_the_diagonal_blocks_and_add_up() -> None:
    matrix = symmetric(np.linspace(-4, 9, 12).tolist(), seed=1)
    blocks = {"a": slice(0, 5), "b": slice(5, 6), "c": slice(6, 12)}
    found = hutchinson(lambda v: matrix @ v, blocks, relative_se=0, max_products=3000)
    table = found.by_block().set_index("block")
    for name, part in blocks.items():
        expected = np.trace(matrix[part, part])
        assert abs(table.loc[name, "trace"] - expected) < 4 * table.loc[name, "se"]
        assert table.loc[name, "weights"] == part.stop - part.start
    assert table["trace"].sum() == pytest.approx(found.value)


def test_least_squares_has_the_trace_of_its_gram_matrix() -> None:
    # L = mean over rows and outputs of (X W' - Y)^2, so H = 2 / (rows * outputs) * I (x) X'X.
    features = np.random.default_rng(0).standard_normal((20, 4))
    outputs, gram = 3, features.T @ features

    def product(v: np.ndarray) -> np.ndarray:
        return (2 / (20 * outputs) * v.reshape(outputs, 4) @ gram).ravel()

    found = hutchinson(product, {"w": slice(0, 12)}, relative_se=0, max_products=2000)
    assert abs(found.value - 2 / 20 * np.trace(gram)) < 4 * found.se


def test_the_search_stops_at_the_target_and_not_before_the_minimum() -> None:
    matrix = symmetric(np.linspace(1, 3, 40).tolist())
    easy = hutchinson(lambda v: matrix @ v, whole(matrix), relative_se=0.5, min_probes=7)
    assert easy.n == 7
    hard = hutchinson(
        lambda v: matrix @ v, whole(matrix), relative_se=0.005, min_probes=2, max_products=400
    )
    assert 7 < hard.n < 400
    assert hard.se <= 0.005 * abs(hard.value)
    # The probe before was not yet good enough.
    shorter = hard.samples[:-1].sum(1)
    assert shorter.std(ddof=1) / len(shorter) ** 0.5 > 0.005 * abs(shorter.mean())


def test_a_seed_decides_the_probes_and_their_number_does_not() -> None:
    matrix = symmetric([3, 1, -2, 5])
    few, many = (
        hutchinson(
            lambda v: matrix @ v, whole(matrix), seed=4, relative_se=0, min_probes=2, max_products=n
        )
        for n in (3, 9)
    )
    np.testing.assert_array_equal(few.samples, many.samples[:3])
    assert not np.array_equal(
        few.samples,
        hutchinson(
            lambda v: matrix @ v, whole(matrix), seed=5, relative_se=0, min_probes=2, max_products=3
        ).samples,
    )
    signs = rademacher(0, 0, 10_000)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.04


def test_paired_probes_know_a_small_difference_far_better_than_either_trace() -> None:
    matrix = symmetric(np.linspace(-4, 9, 30).tolist())
    shifted = matrix + 0.01 * np.eye(30)
    one, other = (
        hutchinson(lambda v, m=m: m @ v, whole(matrix), relative_se=0, max_products=n)
        for m, n in ((shifted, 20), (matrix, 15))
    )  # type: ignore[misc]
    value, error, n = paired_difference(one, other)
    assert (value, n) == (pytest.approx(0.3), 15)
    assert error < 1e-10 < other.se
    with pytest.raises(WorkbenchError, match="seed"):
        paired_difference(one, hutchinson(lambda v: matrix @ v, whole(matrix), seed=1))


def test_wrong_limits_and_products_that_are_not_finite_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="min_probes"):
        hutchinson(lambda v: v, {"a": slice(0, 3)}, min_probes=1)
    with pytest.raises(WorkbenchError, match="max_products"):
        hutchinson(lambda v: v, {"a": slice(0, 3)}, min_probes=10, max_products=5)
    with pytest.raises(WorkbenchError, match="finite"):
        hutchinson(lambda v: v * np.nan, {"a": slice(0, 3)})


# --- The operator restricted to parameters ---


def test_a_restricted_operator_is_the_dense_diagonal_block(
    llama: PreTrainedModel, batch: Batch
) -> None:
    operator = Curvature(llama, [batch], ("*layers.0*.k_proj*", "*1.self_attn.v_proj.weight", NORM))
    assert operator.names == list(CHOSEN)
    hessian = dense_hessian(llama, batch, CHOSEN)
    assert operator.size == len(hessian) == 272
    assert operator.blocks == {K: slice(0, 128), V: slice(128, 256), NORM: slice(256, 272)}
    vector = np.random.default_rng(0).standard_normal(272)
    expected = hessian @ vector
    assert np.linalg.norm(operator.product(vector) - expected) < 1e-4 * np.linalg.norm(expected)
    # Symmetric: u'Hv = v'Hu.
    other = np.random.default_rng(1).standard_normal(272)
    assert other @ operator.product(vector) == pytest.approx(
        vector @ operator.product(other), rel=1e-4
    )


def test_a_tied_tensor_comes_once_under_either_of_its_names(
    make_model: ModelMaker, batch: Batch
) -> None:
    tied = make_model(tie_word_embeddings=True)
    for pattern in ("lm_head.weight", "model.embed_tokens.weight"):
        assert Curvature(tied, [batch], (pattern,)).names == ["model.embed_tokens.weight"]
    assert Curvature(tied, [batch], ("*embed*", "*head*")).size == 50 * 16


def test_a_pattern_that_fits_nothing_is_an_error_with_near_names(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with pytest.raises(WorkbenchError, match=r"model\.norm\.weight"):
        Curvature(llama, [batch], ("*", "model.norn.weight"))
    llama.model.norm.weight.requires_grad_(False)
    with pytest.raises(WorkbenchError, match="trainable"):
        Curvature(llama, [batch], (NORM,))


# --- Both ends ---


def test_spectrum_ends_are_those_of_the_dense_hessian(llama: PreTrainedModel, batch: Batch) -> None:
    values = np.linalg.eigvalsh(dense_hessian(llama, batch, CHOSEN))
    found = spectrum_ends(llama, [batch], 3, parameters=CHOSEN, tolerance=1e-6)
    np.testing.assert_allclose(found.top, values[::-1][:3], rtol=1e-3)
    np.testing.assert_allclose(found.bottom, values[:3], rtol=1e-3)
    assert found.bottom[0] < 0 < found.top[2]
    for residuals in (found.top_residuals, found.bottom_residuals):
        assert residuals.shape == (3,)
        assert (residuals < 1e-2).all()
    assert found.products >= 14 + 6


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_one_outer_eigenvalue_alone_is_that_of_the_dense_hessian(
    llama: PreTrainedModel, batch: Batch, end: Literal["top", "bottom"]
) -> None:
    values = np.linalg.eigvalsh(dense_hessian(llama, batch, CHOSEN))
    found = outer_eigenvalue(llama, [batch], end, parameters=CHOSEN, tolerance=1e-6)
    assert found.value == pytest.approx(values[-1] if end == "top" else values[0], rel=1e-4)
    assert found.residual <= 1e-6
    loose = outer_eigenvalue(llama, [batch], end, parameters=CHOSEN, tolerance=0.05)
    assert (
        min(abs(values - loose.value))
        <= loose.residual * abs(loose.value) * (1 + 1e-4)
        <= 0.05 * abs(loose.value)
    )  # an eigenvalue is that near
    assert loose.products < found.products
    with pytest.raises(WorkbenchError, match="did not converge"):
        outer_eigenvalue(llama, [batch], end, tolerance=1e-12, max_products=10)
    with pytest.raises(WorkbenchError, match="topp"):
        outer_eigenvalue(llama, [batch], "topp")  # type: ignore[arg-type]


def test_an_outer_eigenvalue_that_does_not_stand_apart_is_found_with_restarts(
    llama: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.linalg.eigvalsh(dense_hessian(llama, batch, CHOSEN))
    monkeypatch.setattr("workbench.sharpness.curvature._BASIS", 4)
    found = outer_eigenvalue(llama, [batch], "bottom", parameters=CHOSEN, tolerance=1e-6)
    assert found.value == pytest.approx(values[0], rel=1e-4)
    assert found.products > 4 + 1


def test_one_from_each_end_is_what_extremes_gives(llama: PreTrainedModel, batch: Batch) -> None:
    one, both = (
        extremes(llama, [batch], tolerance=1e-2),
        spectrum_ends(llama, [batch], 1, tolerance=1e-2),
    )
    assert (one.top, one.bottom, one.products) == (both.top[0], both.bottom[0], both.products)
    assert (one.top_residual, one.bottom_residual) == (
        both.top_residuals[0],
        both.bottom_residuals[0],
    )


def test_more_eigenvalues_than_there_are_weights_are_refused(
    llama: PreTrainedModel, batch: Batch
) -> None:
    for k in (0, 8):
        with pytest.raises(WorkbenchError, match="7 eigenvalues"):
            spectrum_ends(llama, [batch], k, parameters=(NORM,))


# --- Models ---


def test_the_head_is_softmax_regression_with_a_closed_trace(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # H = mean (diag p - p p') (x) h h', so tr H = mean (1 - |p|^2) |h|^2.
    hidden, p = head_features(llama, batch)
    expected = float(((1 - p.square().sum(1)) * hidden.square().sum(1)).mean())
    found = trace(llama, [batch], parameters=("lm_head.weight",), relative_se=0, max_products=150)
    assert abs(found.value - expected) < 3.5 * found.se
    assert found.se < 0.05 * expected
    centred = torch.einsum("tv,vw->tvw", p, torch.eye(50, dtype=p.dtype)) - torch.einsum(
        "tv,tw->tvw", p, p
    )
    gram = hidden @ hidden.T
    squared = float((torch.einsum("avw,bvw->ab", centred, centred) * gram.square()).mean())
    assert abs(found.frobenius_squared[0] - squared) < 3.5 * found.frobenius_squared[1]
    # A change of all logits by the same number costs nothing: H (1 (x) u) = 0.
    operator = Curvature(llama, [batch], ("lm_head.weight",))
    flat = np.tile(np.random.default_rng(0).standard_normal(16), 50)
    assert np.linalg.norm(operator.product(flat)) < 1e-5 * expected


def test_a_split_into_batches_changes_no_trace(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    together = make_batch((9, 9, 9), seed=2)
    parts = [
        Batch(
            *(
                getattr(together, name)[rows]
                for name in (
                    "input_ids",
                    "attention_mask",
                    "answer_mask",
                    "subject_mask",
                    "target_mask",
                )
            ),
            together.items[rows],
        )
        for rows in (slice(0, 1), slice(1, 3))
    ]
    one, many = (
        trace(llama, texts, parameters=CHOSEN, relative_se=0, min_probes=2, max_products=4)
        for texts in ([together], parts)
    )
    np.testing.assert_allclose(one.samples, many.samples, rtol=1e-4, atol=1e-5)


def test_the_trace_of_a_model_is_that_of_its_dense_hessian_block_by_block(
    llama: PreTrainedModel, batch: Batch
) -> None:
    hessian = dense_hessian(llama, batch, CHOSEN)
    found = trace(llama, [batch], parameters=CHOSEN, relative_se=0, max_products=100)
    for probe in (0, 99):  # every sample, not only their mean
        signs = rademacher(0, probe, 272)
        assert found.samples[probe].sum() == pytest.approx(
            float(signs @ hessian @ signs), rel=1e-3, abs=1e-3
        )
    for (_, row), part in zip(
        found.by_block().iterrows(), (slice(0, 128), slice(128, 256), slice(256, 272)), strict=True
    ):
        assert abs(row["trace"] - np.trace(hessian[part, part])) < 4 * row["se"]
    assert "k_proj" in found._repr_html_()
    assert "100 probes" in repr(found)


# --- Relative flatness ---


def test_relative_flatness_is_the_sum_over_pairs_of_rows_of_the_dense_hessian(
    llama: PreTrainedModel, batch: Batch
) -> None:
    names = (K, V)
    hessian = dense_hessian(llama, batch, names)
    found = relative_flatness(llama, [batch], parameters=names, probes=150)
    assert found["layer"].tolist() == list(names)
    for number, name in enumerate(names):
        weight = dict(llama.named_parameters())[name].detach().double().numpy()
        rows, columns = weight.shape
        block = hessian[
            number * 128 : number * 128 + 128, number * 128 : number * 128 + 128
        ].reshape(rows, columns, rows, columns)
        expected = sum(
            float(weight[s] @ weight[t]) * np.trace(block[s, :, t, :])
            for s in range(rows)
            for t in range(rows)
        )
        row = found.iloc[number]
        assert abs(row["kappa"] - expected) < 4 * row["se"]
        assert row["se"] < 0.5 * abs(expected)
        assert row["n"] == 150


def test_relative_flatness_needs_a_linear_layer_of_its_own(
    make_model: ModelMaker, llama: PreTrainedModel, batch: Batch
) -> None:
    with pytest.raises(WorkbenchError, match="linear"):
        relative_flatness(llama, [batch], parameters=(NORM,))
    with pytest.raises(WorkbenchError, match="linear"):
        relative_flatness(
            make_model(tie_word_embeddings=True), [batch], parameters=("lm_head.weight",)
        )
    with pytest.raises(WorkbenchError, match="probes"):
        relative_flatness(llama, [batch], parameters=(K,), probes=1)
