"""Comparisons of subspaces and their nulls, CKA, the reading of directions, and the subspaces of
weights and differences: against the formulas, written out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from scipy.stats import ortho_group
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.hooks import Capture, Collect, Moments, without_first
from workbench.subspaces import compare
from workbench.subspaces.compare import (
    angle_null,
    debiased_cka,
    energy_by_tier,
    rank_sensitivity,
    read_direction,
    tier_edges,
)
from workbench.subspaces.finders import SketchPCA, StreamingPCA
from workbench.subspaces.subspace import Subspace
from workbench.subspaces.weights import contrast, difference_finder, singular_subspaces


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _subspace(
    width: int = 20,
    rank: int = 8,
    seed: int = 0,
    values: Tensor | None = None,
    total: float = 100.0,
) -> Subspace:
    """Random directions."""
    values = torch.arange(rank, 0, -1).float() if values is None else values
    return Subspace(
        torch.linalg.qr(_random(width, rank, seed=seed))[0],
        values,
        torch.zeros(width),
        50,
        total,
        "s",
        "t",
        "u",
    )


def _moments(rows: Tensor, chunk: int = 10_000) -> Moments:
    moments = Moments()
    for part in rows.split(chunk):
        moments.update(part)
    return moments


# --- overlap over ranks ---------------------------------------------------------------------------


def test_rank_sensitivity_is_the_overlap_of_the_first_directions() -> None:
    first, second = (
        _subspace(20, 9, 0, torch.tensor([9.0, 6, 5, 4, 3, 2, 1, 0.5, 0.5])),
        _subspace(20, 12, 1),
    )
    table = rank_sensitivity(first, second)
    assert table["rank"].tolist() == [1, 2, 4, 8]  # the smaller rank is 9
    for line in table.itertuples():
        cosines = np.linalg.svd(
            first.basis[:, : line.rank].double().numpy().T
            @ second.basis[:, : line.rank].double().numpy(),
            compute_uv=False,
        )
        assert line.overlap == pytest.approx(float((cosines**2).mean()), rel=1e-6)
        assert line.random == line.rank / 20
    assert table["gap_first"].tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 4, 0], abs=1e-6)
    assert table["gap_second"].tolist() == pytest.approx([1 / 12, 1 / 11, 1 / 9, 1 / 5], abs=1e-6)
    chosen = rank_sensitivity(first, second, ranks=[0, 3, 9, 10])
    assert (
        chosen["rank"].tolist() == [3, 9]
        and np.isnan(chosen["gap_first"][1])
        and chosen["gap_second"][1] == pytest.approx(1 / 4)
    )
    assert rank_sensitivity(first, first)["overlap"].tolist() == pytest.approx([1] * 4, abs=1e-6)
    empty = rank_sensitivity(first, first.top(0))
    assert len(empty) == 0 and list(empty.columns) == list(table.columns)


def test_random_subspaces_overlap_as_the_table_expects() -> None:
    tables = [
        rank_sensitivity(_subspace(15, 8, 2 * draw), _subspace(15, 8, 2 * draw + 1))
        for draw in range(300)
    ]
    found = np.array([table["overlap"] for table in tables])
    assert (np.abs(found.mean(0) - tables[0]["random"]) < 4 * found.std(0) / np.sqrt(300)).all()


# --- the permutation null -------------------------------------------------------------------------

SPREADS = torch.tensor([3.0, 2, 1, 1, 0.5, 0.5])


def _null(first: Tensor, second: Tensor, **more: Any) -> Any:
    return angle_null(first, second, 2, draws=39, seed=5, **more)


def test_the_table_of_angles_holds_the_angles_of_the_top_subspaces() -> None:
    first, second = _random(60, 6) * SPREADS, _random(50, 6, seed=1) * SPREADS.roll(1) + 3
    tops = [
        np.linalg.eigh(np.cov(rows.double().numpy(), rowvar=False))[1][:, -2:]
        for rows in (first, second)
    ]
    table = _null(first, second)
    np.testing.assert_allclose(
        table["cosine"], np.linalg.svd(tops[0].T @ tops[1], compute_uv=False), atol=1e-5
    )
    assert table["angle"].tolist() == [0, 1]
    assert (
        (table["null_low"] <= table["null_median"])
        & (table["null_median"] <= table["null_high"])
        & (table["null_high"] <= 1)
    ).all()
    shares = table["p"] * 40
    np.testing.assert_allclose(shares, shares.round(), atol=1e-9)
    assert ((shares >= 1) & (shares <= 40)).all()


def test_under_the_null_the_p_values_are_not_small_too_often() -> None:
    p = np.array(
        [
            _null(
                _random(40, 6, seed=2 * draw) * SPREADS, _random(30, 6, seed=2 * draw + 1) * SPREADS
            )["p"]
            for draw in range(60)
        ]
    )
    assert ((p < 0.1).mean(0) < 0.25).all() and ((p > 0.9).mean(0) < 0.25).all()
    assert (np.abs(p.mean(0) - 0.5) < 0.15).all()  # four standard errors of a uniform mean


def test_clearly_different_subspaces_have_the_smallest_p() -> None:
    # The strongest two directions of both sets together are stable, so that the null is far from
    # the orthogonal planes that are observed.
    first, second = (
        _random(80, 6) * torch.tensor([8.0, 4, 0.1, 0.1, 0.1, 0.1]),
        _random(80, 6, seed=1) * torch.tensor([0.1, 0.1, 5, 2.5, 0.1, 0.1]),
    )
    table = _null(first, second)
    assert (
        table["p"].tolist() == pytest.approx([1 / 40] * 2)
        and (table["cosine"] < table["null_low"]).all()
    )
    same = _null(first, first.clone())
    assert same["cosine"].tolist() == pytest.approx([1, 1], abs=1e-6) and (same["p"] > 0.9).all()


def test_rows_of_one_group_are_dealt_together() -> None:
    # Twelve texts of eight equal tokens: dealt row by row, every text lies on both sides, the null
    # is near 1, and most pairs of sets look different.
    groups, grouped, single = torch.arange(12).repeat_interleave(8), [], []
    for draw in range(60):
        first, second = (_random(12, 6, seed=2 * draw + side) * SPREADS for side in (0, 1))
        wide = (first.repeat_interleave(8, 0), second.repeat_interleave(8, 0))
        grouped.append(_null(*wide, first_groups=groups, second_groups=groups)["p"])
        single.append(_null(*wide)["p"])
    assert ((np.array(grouped) < 0.1).mean(0) < 0.25).all() and (
        (np.array(single) < 0.1).mean(0) > 0.7
    ).all()
    # Names of groups mean nothing, and the order of the rows means nothing: groups of one row each
    # are rows.
    other = _null(*wide, first_groups=groups * 7 + 100, second_groups=1000 - groups)
    assert (
        other["cosine"].tolist()
        == _null(*wide, first_groups=groups, second_groups=groups)["cosine"].tolist()
    )
    alone = _null(first, second, first_groups=torch.arange(12) + 3, second_groups=torch.arange(12))
    assert alone.equals(_null(first, second))


def test_every_draw_deals_whole_groups_and_as_many_to_each_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[set[float]] = []

    class Recorder(StreamingPCA):
        def partial_fit(
            self, X: Tensor, y: Any = None, sample_weight: Tensor | None = None
        ) -> Recorder:
            seen.append(set(X[:, 0].tolist()))
            return super().partial_fit(X, y, sample_weight)

    monkeypatch.setattr(compare, "StreamingPCA", Recorder)
    # Equal rows inside a group, so that a first coordinate on both sides is a group torn apart.
    sets = [
        (
            _random(count, 6, seed=count).repeat_interleave(size, 0),
            torch.arange(count).repeat_interleave(size),
        )
        for count, size in ((7, 3), (5, 9))
    ]
    _null(sets[0][0], sets[1][0], first_groups=sets[0][1], second_groups=sets[1][1])
    assert len(seen) == 2 * 40
    assert all(
        len(one) == 7 and len(two) == 5 and not one & two
        for one, two in zip(seen[::2], seen[1::2], strict=True)
    )
    assert len({frozenset(one) for one in seen[::2]}) > 20  # and the draws differ


def test_the_same_seed_gives_the_same_table() -> None:
    first, second = _random(30, 6) * SPREADS, _random(30, 6, seed=1) * SPREADS
    assert angle_null(first, second, 2, draws=20, seed=1).equals(
        angle_null(first, second, 2, draws=20, seed=1)
    )
    assert not angle_null(first, second, 2, draws=20, seed=1).equals(
        angle_null(first, second, 2, draws=20, seed=2)
    )


@pytest.mark.parametrize(
    ("first", "second", "rank"),
    [((9, 4), (9, 5), 2), ((2, 4), (9, 4), 2), ((9, 4), (2, 4), 2), ((9, 4), (9, 4), 0)],
)
def test_an_angle_needs_two_large_sets_of_one_width(
    first: tuple[int, int], second: tuple[int, int], rank: int
) -> None:
    with pytest.raises(WorkbenchError, match="more than rank"):
        angle_null(_random(*first), _random(*second), rank)


# --- energy by tier -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, []),
        (1, [(0, 1)]),
        (4, [(0, 4)]),
        (5, [(0, 4), (4, 5)]),
        (64, [(0, 4), (4, 16), (16, 64)]),
        (300, [(0, 4), (4, 16), (16, 64), (64, 256), (256, 300)]),
    ],
)
def test_tiers_grow_by_four(rank: int, expected: list[tuple[int, int]]) -> None:
    assert tier_edges(rank) == expected


@pytest.mark.parametrize(
    "tiers", [None, [(0, 1), (1, 8)], [(2, 5)], [(0, 4), (4, 16), (16, 64)], []]
)
def test_energies_are_shares_of_the_squared_norm(tiers: list[tuple[int, int]] | None) -> None:
    subspace, vectors = _subspace(30, 8), 1e3 * _random(5, 30, seed=3)
    table = energy_by_tier(vectors, subspace, tiers)
    tiers = [(0, 4), (4, 8)] if tiers is None else tiers
    columns = (vectors.double() @ subspace.basis.double()).square().sum(0).numpy() / float(
        vectors.double().square().sum()
    )
    inside = [
        [values[a:b].sum() for a, b in tiers]
        for values in (columns, np.ones(8) / 30, subspace.eigenvalues.numpy() / 100)
    ]
    for name, values in zip(("energy", "random", "variance"), inside, strict=True):
        assert table[name].tolist() == pytest.approx([*values, 1 - sum(values)], abs=1e-6), name
        assert table[name].sum() == pytest.approx(1)
    assert (
        list(zip(table["first"], table["last"], strict=True))[:-1] == tiers
        and table["last"].iloc[-1] == 30
    )


def test_random_vectors_have_the_random_energy() -> None:
    table = energy_by_tier(_random(20_000, 30), _subspace(30, 8))
    # The variance of a share of one vector is below 2 m / width^2 for m directions.
    assert (np.abs(table["energy"] - table["random"]) < 4 * np.sqrt(2 * 30 / 30**2 / 20_000)).all()


def test_vectors_of_zeros_have_no_energy_and_a_subspace_of_rank_zero_none_inside() -> None:
    assert energy_by_tier(torch.zeros(3, 20), _subspace())["energy"].tolist() == [0, 0, 0]
    rest = energy_by_tier(_random(3, 20), _subspace().top(0))
    assert rest[["first", "last", "energy", "random"]].values.tolist() == [[0, 20, 1, 1]]


def test_a_weight_change_is_read_on_both_of_its_sides() -> None:
    inputs, gradients = _subspace(20, 8, 1), _subspace(12, 6, 2)
    change = (
        2 * gradients.basis[:, [5]] @ inputs.basis[:, [1]].T
        + gradients.basis[:, [0]] @ inputs.basis[:, [6]].T
    )
    assert energy_by_tier(change, inputs)["energy"].tolist() == pytest.approx(
        [0.8, 0.2, 0], abs=1e-6
    )
    assert energy_by_tier(change.T, gradients)["energy"].tolist() == pytest.approx(
        [0.2, 0.8, 0], abs=1e-6
    )


# --- CKA ------------------------------------------------------------------------------------------


def _u_statistic(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased HSIC (Song et al. 2012) of linear kernels: three means over tuples of distinct
    indices.
    """
    one, two, n = first @ first.T, second @ second.T, len(first)
    pairs = np.mean([one[i, j] * two[i, j] for i, j in permutations(range(n), 2)])
    triples = np.mean([one[i, j] * two[i, q] for i, j, q in permutations(range(n), 3)])
    quadruples = np.mean([one[i, j] * two[q, r] for i, j, q, r in permutations(range(n), 4)])
    return float(pairs + quadruples - 2 * triples)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("n", [4, 6, 7])
def test_cka_is_the_ratio_of_u_statistics(offset: float, n: int) -> None:
    first, second = (
        _random(n, 3) + offset,
        _random(n, 5, seed=1) + torch.cat([_random(n, 3), torch.zeros(n, 2)], 1),
    )
    one, two = first.double().numpy(), second.double().numpy()
    expected = _u_statistic(one, two) / np.sqrt(_u_statistic(one, one) * _u_statistic(two, two))
    assert debiased_cka(first, second) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert debiased_cka(second, first) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_cka_does_not_mind_rotations_scales_and_shifts() -> None:
    first, second = _random(40, 9), _random(40, 7, seed=1) + _random(40, 9)[:, :7]
    turn = torch.from_numpy(ortho_group.rvs(7, random_state=0)).float()
    assert debiased_cka(first, 0.01 * second @ turn + 4) == pytest.approx(
        debiased_cka(first, second), abs=1e-5
    )
    assert debiased_cka(second, 30 * second @ turn) == pytest.approx(1, abs=1e-6)
    assert 0.3 < debiased_cka(first, second) < 0.95


def test_cka_of_unrelated_rows_is_zero_on_average_where_there_are_few() -> None:
    debiased, biased = [], []
    for draw in range(50):
        first, second = (
            _random(20, 300, seed=2 * draw).double(),
            _random(20, 300, seed=2 * draw + 1).double(),
        )
        debiased.append(debiased_cka(first, second))
        one, two = (rows - rows.mean(0) for rows in (first, second))
        biased.append(
            float((one.T @ two).norm() ** 2 / ((one.T @ one).norm() * (two.T @ two).norm()))
        )
    assert (
        abs(np.mean(debiased)) < max(4 * np.std(debiased) / np.sqrt(50), 0.01)
        and abs(np.mean(debiased)) < 0.05
    )
    assert np.mean(biased) > 0.9


def test_cka_of_rows_that_do_not_vary_is_not_a_number() -> None:
    # Also where the mean of equal rows is rounded, so that centring leaves the last bit.
    for seed in range(20):
        for n in (5, 7, 20):
            still, moving = _random(1, 9, seed=seed).expand(n, 9), _random(n, 6, seed=seed + 100)
            found = [
                debiased_cka(still, moving),
                debiased_cka(moving, still),
                debiased_cka(still, still),
            ]
            assert np.isnan(found).all(), (seed, n, found)


def test_cka_of_half_precision_rows_is_that_of_their_values() -> None:
    first, second = (
        (_random(30, 12) + 5).bfloat16(),
        (_random(30, 12) @ _random(12, 12, seed=2)).bfloat16(),
    )
    assert debiased_cka(first, second) == pytest.approx(
        debiased_cka(first.float(), second.float()), abs=1e-6
    )


@pytest.mark.parametrize("counts", [(6, 7), (3, 3), (0, 0)])
def test_cka_needs_rows_of_the_same_tokens(counts: tuple[int, int]) -> None:
    with pytest.raises(WorkbenchError, match=f"{counts[0]} and {counts[1]}"):
        debiased_cka(_random(counts[0], 4), _random(counts[1], 4))


# --- reading a direction --------------------------------------------------------------------------

_SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_WIDTHS: dict[str, Any] = {**_SHAPE, "hidden_size": 16, "intermediate_size": 24}
NORMED: dict[str, tuple[Any, str]] = {
    "llama": (hf.LlamaConfig(**_WIDTHS), "model.norm"),
    "gemma2": (hf.Gemma2Config(**_WIDTHS, num_key_value_heads=2, head_dim=4), "model.norm"),
    "gemma3_text": (
        hf.Gemma3TextConfig(**_WIDTHS, num_key_value_heads=2, head_dim=4),
        "model.norm",
    ),
    "olmo": (hf.OlmoConfig(**_WIDTHS), "model.norm"),
    "gpt2": (hf.GPT2Config(**_SHAPE, n_embd=16, n_positions=32), "transformer.ln_f"),
}


class _Numbers:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])


def _read(direction: Tensor, model: PreTrainedModel, top: int = 8) -> Any:
    return read_direction(direction, model, _Numbers(), top)  # type: ignore[arg-type]


def _normed_model(kind: str) -> tuple[PreTrainedModel, nn.Module]:
    """A tiny model whose final norm scales every coordinate by another factor."""
    config, path = NORMED[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
    norm = model.get_submodule(path)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(_random(50, 16))
        if getattr(norm, "weight", None) is not None:
            norm.weight.add_(0.5 * _random(16, seed=1))
    return model, norm


@pytest.mark.parametrize("kind", NORMED)
def test_a_direction_is_read_as_the_derivative_of_the_logits(kind: str) -> None:
    model, norm = _normed_model(kind)
    for seed in range(5):
        direction = _random(16, seed=10 + seed)
        # At a stream orthogonal to the direction and to the vector of ones, the length and the mean
        # do not change to first order: what is left is scale and unembedding.
        frame = torch.linalg.qr(torch.stack([torch.ones(16), direction, _random(16, seed=50)], 1))[
            0
        ]
        stream = 4 * frame[:, 2]  # root mean square 1
        _, slope = torch.func.jvp(
            lambda x: model.get_output_embeddings()(norm(x)),
            (stream,),
            (direction / direction.norm(),),
        )
        table = _read(direction, model, 6)
        expected = [*slope.topk(6).indices.tolist(), *(-slope).topk(6).indices.tolist()]
        np.testing.assert_allclose(table["logit"], slope[expected].detach().numpy(), rtol=1e-3)
        assert table["token"].tolist() == [str(index) for index in expected]
        assert table["side"].tolist() == ["promoted"] * 6 + ["suppressed"] * 6


def test_the_direction_of_a_token_promotes_that_token(llama: PreTrainedModel) -> None:
    unembedding, scale = llama.get_output_embeddings().weight, llama.model.norm.weight
    with torch.no_grad():
        unembedding.div_(
            unembedding.norm(dim=1, keepdim=True)
        )  # no row is nearer to another than to itself
        scale.copy_(_random(16).abs() + 0.2)
    for token in (3, 17, 49):
        direction = (unembedding[token] / scale).detach()
        table = _read(direction, llama, 5)
        assert table["token"][0] == str(token) and table["logit"][0] == pytest.approx(
            1 / float(direction.norm()), rel=1e-5
        )
        longer, turned = _read(100 * direction, llama, 5), _read(-direction, llama, 5)
        np.testing.assert_allclose(
            longer["logit"], table["logit"], rtol=1e-5
        )  # a direction has no length
        assert turned["token"][5] == str(token) and turned["side"][5] == "suppressed"
    assert len(_read(direction, llama, 1000)) == 100  # no more than there are tokens, on each side


def test_what_is_no_direction_of_a_known_model_is_refused(llama: PreTrainedModel) -> None:
    foreign = hf.OPTForCausalLM(
        hf.OPTConfig(**_SHAPE, hidden_size=16, ffn_dim=24, word_embed_proj_dim=16)
    )
    headless = hf.LlamaModel(hf.LlamaConfig(**_WIDTHS))
    for direction, model in (
        (_random(24), llama),
        (_random(2, 16), llama),
        (_random(16), foreign),
        (_random(16), headless),
    ):
        with pytest.raises(WorkbenchError, match="family"):
            _read(direction, model)


# --- subspaces of weights, differences and contrasts ----------------------------------------------


@pytest.mark.parametrize(
    ("shape", "inner", "rank"),
    [((12, 20), 12, 5), ((20, 12), 12, 30), ((15, 9), 3, 5), ((6, 1), 1, 3)],
)
def test_singular_subspaces_are_numpys(shape: tuple[int, int], inner: int, rank: int) -> None:
    matrix = _random(shape[0], inner) @ _random(inner, shape[1], seed=1)
    left, singular, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    found, kept = singular_subspaces(matrix, rank, site="s", source="u"), min(rank, inner)
    for side, vectors in ((found.gradient, left), (found.activation, right.T)):
        assert (side.width, side.rank, side.site, side.source) == (len(vectors), kept, "s", "u")
        np.testing.assert_allclose(
            side.basis.numpy() @ side.basis.numpy().T,
            vectors[:, :kept] @ vectors[:, :kept].T,
            atol=1e-5,
        )
        np.testing.assert_allclose(
            np.abs((side.basis.numpy() * vectors[:, :kept]).sum(0)), 1, atol=1e-5
        )
        np.testing.assert_allclose(side.eigenvalues.numpy(), singular[:kept] ** 2, rtol=1e-5)
        assert (
            side.total_variance == pytest.approx(float((matrix.double() ** 2).sum()))
            and not side.mean.any()
        )
    # Both sides have their signs together, so that the pairs rebuild the matrix.
    rebuilt = found.gradient.basis * found.gradient.eigenvalues.sqrt() @ found.activation.basis.T
    np.testing.assert_allclose(
        rebuilt.numpy(), (left[:, :kept] * singular[:kept]) @ right[:kept], atol=1e-4
    )


def test_a_gradient_of_zeros_has_no_directions_and_one_that_is_not_finite_is_refused() -> None:
    for side, width in zip(singular_subspaces(torch.zeros(4, 6), 3), (4, 6), strict=True):
        assert side.basis.shape == (width, 0) and side.total_variance == 0
    for bad in (float("nan"), float("inf")):
        with pytest.raises(WorkbenchError, match="here"):
            singular_subspaces(torch.tensor([[1.0, bad], [0, 1]]), 1, site="here")


@pytest.mark.parametrize(
    "make",
    [lambda: StreamingPCA(3), lambda: SketchPCA(3, oversample=20)],
    ids=["streaming", "sketch"],
)
def test_the_difference_of_two_models_is_taken_row_by_row(
    make: Callable[[], StreamingPCA],
    llama: PreTrainedModel,
    nearby: Callable[..., PreTrainedModel],
    make_batch: Callable[..., Batch],
) -> None:
    moved, batches, names = (
        nearby(llama),
        [make_batch((20, 11, 14), seed=seed) for seed in range(3)],
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
    )
    found = difference_finder(
        llama, moved, batches, "blocks.*.hook_resid_post", make, without_first
    )
    assert tuple(found) == names
    rows = [Collect(), Collect()]
    for model, kept in zip((llama, moved), rows, strict=True):
        with Capture(model, names, kept, at=without_first) as capture:
            for batch in batches:
                capture.forward(batch.inputs)
    for name in names:
        difference = (rows[1][name].double() - rows[0][name].double()).numpy()
        values, vectors = np.linalg.eigh(np.cov(difference, rowvar=False, bias=True))
        assert found[name].n_samples_seen_ == len(difference) == 3 * (19 + 10 + 13)
        np.testing.assert_allclose(
            found[name].explained_variance_.numpy(), values[::-1][:3], rtol=1e-4
        )
        np.testing.assert_allclose(
            np.abs((found[name].components_.numpy() * vectors[:, ::-1][:, :3].T).sum(1)),
            1,
            atol=1e-4,
        )
        np.testing.assert_allclose(found[name].mean_.numpy(), difference.mean(0), atol=1e-5)
    assert all(
        finder.subspace().rank == 0
        for finder in difference_finder(llama, llama, batches, names, make, without_first).values()
    )


def test_a_contrast_is_the_positive_part_of_the_difference_of_covariances() -> None:
    first, second = (
        _random(200, 7) * torch.arange(7, 0, -1) + 2,
        _random(150, 7, seed=1) * torch.arange(1, 8),
    )
    covariances = [
        np.cov(rows.double().numpy(), rowvar=False, bias=True) for rows in (first, second)
    ]
    values, vectors = np.linalg.eigh(covariances[0] - covariances[1])
    values, vectors = values[::-1], vectors[:, ::-1]
    positive = int((values > 0).sum())
    for rank in (2, 7):
        found, kept = (
            contrast(_moments(first), _moments(second), rank, site="s", tokens="t", source="u"),
            min(rank, positive),
        )
        assert (found.rank, found.count, found.site, found.tokens, found.source) == (
            kept,
            350,
            "s",
            "t",
            "u",
        )
        np.testing.assert_allclose(found.eigenvalues.numpy(), values[:kept], rtol=1e-5)
        np.testing.assert_allclose(
            np.abs((found.basis.numpy() * vectors[:, :kept]).sum(0)), 1, atol=1e-5
        )
        np.testing.assert_allclose(
            found.mean.numpy(),
            (first.double().mean(0) - second.double().mean(0)).numpy(),
            rtol=1e-5,
        )
        assert found.total_variance == pytest.approx(values[:positive].sum(), rel=1e-6)


@pytest.mark.parametrize("width", [8, 64])
def test_equal_sets_have_no_contrast_however_they_are_cut(width: int) -> None:
    # One direction carries nearly everything and is spread over all coordinates, as in residual
    # streams: the rounding is of its size, not of one coordinate's.
    rows = 10 * _random(500, 1) @ torch.ones(1, width) + 0.01 * _random(500, width, seed=3)
    assert contrast(_moments(rows), _moments(rows), 5).rank == 0
    assert contrast(_moments(rows), _moments(rows.flip(0), 37), 5).rank == 0


def test_a_contrast_needs_finite_rows_of_both_sets() -> None:
    good, bad = _moments(_random(9, 4)), _moments(torch.full((3, 4), float("nan")))
    for first, second in ((good, Moments()), (Moments(), good), (good, bad), (bad, good)):
        with pytest.raises(WorkbenchError):
            contrast(first, second, 2)


# --- subspaces as values --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [_random(40, 6) + 2, torch.zeros(40, 6)])
def test_found_subspaces_carry_their_names_through_files(rows: Tensor, tmp_path: Path) -> None:
    for finder in (StreamingPCA(3).fit(rows), SketchPCA(3).fit(rows)):
        plain = finder.subspace()
        assert (plain.site, plain.tokens, plain.source) == ("", "", "")
        named = plain.named(site="s", source="u")
        assert (
            (named.site, named.tokens, named.source) == ("s", "", "u")
            and torch.equal(named.basis, plain.basis)
            and plain.site == ""
        )
        again = named.named(tokens="t").named(site="r")  # an empty word leaves the old one
        assert named.named(tokens="t").site == "s" and (again.site, again.tokens, again.source) == (
            "r",
            "t",
            "u",
        )
        assert (
            finder.subspace(site="r").site == "r" and finder.subspace().site == ""
        )  # a name given once does not stick
        for subspace in (again, again.top(1)):
            subspace.save(tmp_path / "file")
            found = Subspace.load(tmp_path / "file")
            assert all(
                torch.equal(getattr(found, name), getattr(subspace, name))
                for name in ("basis", "eigenvalues", "mean")
            )
            assert (found.count, found.total_variance, found.site, found.tokens, found.source) == (
                40,
                subspace.total_variance,
                "r",
                "t",
                "u",
            )


def test_the_overlap_of_all_angles_has_a_null_of_its_own() -> None:
    first, second = _random(60, 12, seed=3), _random(60, 12, seed=4)
    found = angle_null(first, second, 3, draws=50, seed=0)
    shared = found.attrs["overlap"]
    assert shared.observed == pytest.approx(float((found["cosine"] ** 2).mean()))
    assert shared.low <= shared.median <= shared.high
    # rows of one distribution: the observed overlap lies among those of the permutations; rows of
    # two do not
    assert shared.p > 0.05
    turned = first @ torch.linalg.qr(_random(12, 12, seed=5)).Q * torch.logspace(0, -2, 12)
    apart = angle_null(turned, turned.flip(1), 3, draws=50, seed=0).attrs["overlap"]
    assert apart.observed < apart.low
    assert apart.p == pytest.approx(1 / 51)


def test_fewer_rows_than_coordinates_give_the_angles_of_the_whole_space() -> None:
    # The same rows, turned into a space of many more coordinates: every angle and every permutation
    # stays as it is.
    first, second = _random(30, 12, seed=6), _random(25, 12, seed=7)
    turn = torch.linalg.qr(_random(80, 12, seed=8).double()).Q.T
    narrow, wide = (
        angle_null(first.double() @ t, second.double() @ t, 3, draws=20, seed=1)
        for t in (torch.eye(12).double(), turn)
    )
    pd.testing.assert_frame_equal(narrow, wide, atol=1e-6)  # bases are float32
    assert wide.attrs["overlap"].observed == pytest.approx(
        narrow.attrs["overlap"].observed, abs=1e-6
    )
