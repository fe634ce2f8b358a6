"""Comparing subspaces, always beside what chance would give: principal angles with a permutation
null, overlap over ranks, energy by variance tier, CKA, token reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.errors import WorkbenchError
from workbench.hooks.sites import causal_lm, family
from workbench.subspaces.finders import StreamingPCA
from workbench.subspaces.subspace import Subspace, overlap, principal_angles

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def rank_sensitivity(
    first: Subspace, second: Subspace, ranks: Sequence[int] | None = None
) -> pd.DataFrame:
    """How the overlap of two subspaces depends on the rank, beside its expectation for random
    subspaces (``rank / width``).

    Args:
        first: any subspace.
        second: another in the same space.
        ranks: ranks of both; powers of two up to the smaller rank by default.

    Returns:
        One row per rank: ``rank``, ``overlap`` (mean squared cosine of the principal angles),
        ``random``, ``gap_first``, ``gap_second`` (relative eigengaps after that rank; NaN where the
        next eigenvalue is not known). A rank without a gap says little.
    """
    top = min(first.rank, second.rank)
    chosen_ranks = (
        [2**power for power in range(top.bit_length()) if 2**power <= top]
        if ranks is None
        else [rank for rank in ranks if 0 < rank <= top]
    )
    rows = []
    for rank in chosen_ranks:
        shared = overlap(first.basis[:, :rank], second.basis[:, :rank])
        rows.append(
            {
                "rank": rank,
                "overlap": shared,
                "random": rank / first.width,
                "gap_first": _gap(first, rank),
                "gap_second": _gap(second, rank),
            }
        )
    return pd.DataFrame(rows, columns=["rank", "overlap", "random", "gap_first", "gap_second"])


def _gap(subspace: Subspace, rank: int) -> float:
    values = subspace.eigenvalues
    return (
        float((values[rank - 1] - values[rank]) / values[rank - 1])
        if rank < len(values) and values[rank - 1] > 0
        else float("nan")
    )


class OverlapNull(NamedTuple):
    """The overlap of two subspaces (mean squared cosine of their principal angles) beside its
    permutation null.

    Attributes:
        observed: the overlap.
        low: 2.5 % quantile of the null.
        median: 50 %.
        high: 97.5 %.
        p: share of permutations whose overlap is at most the observed one, with the usual plus one.
    """

    observed: float
    low: float
    median: float
    high: float
    p: float


def angle_null(
    first: Float[Tensor, "rows width"],
    second: Float[Tensor, "other_rows width"],
    rank: int,
    *,
    first_groups: Int[Tensor, " rows"] | None = None,
    second_groups: Int[Tensor, " other_rows"] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosines of the principal angles between the top subspaces of two sets of rows, beside a
    permutation null.

    The null hypothesis is that the two sets come from one distribution: rows (or whole groups of
    rows, such as the tokens of one text, which are not exchangeable one by one) are dealt anew into
    two sets of the same sizes. Angles larger than those of the null mean that the sets differ; a
    pair of disjoint random halves of one set is the fair anchor, not 1.

    Args:
        first: one set of rows.
        second: the other.
        rank: of both subspaces.
        first_groups: whole number of the text that a row belongs to; every row its own by default.
        second_groups: the same for ``second``.
        draws: permutations.
        seed: of the permutations.

    Returns:
        One row per angle: ``angle`` (0 is the smallest), ``cosine``, ``null_low``, ``null_median``,
        ``null_high`` (2.5, 50 and 97.5 %), ``p`` (share of permutations whose cosine is at most the
        observed one, with the usual plus one). ``attrs["overlap"]`` is the :class:`OverlapNull` of
        all angles together.

    Raises:
        WorkbenchError: the widths differ, or a set has no more than ``rank`` rows.
    """
    if first.shape[1] != second.shape[1] or min(len(first), len(second)) <= rank or rank < 1:
        raise WorkbenchError(
            f"two sets of more than rank {rank} rows of one width are needed; got "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    if first.shape[1] > len(first) + len(second):
        # All principal directions lie in the span of the rows: coordinates in a basis of that span
        # leave every angle as it is, and make each permutation cheap.
        span = torch.linalg.qr(torch.cat([first, second]).double().T).Q
        first, second = first.double() @ span, second.double() @ span
    observed = _cosines(first, second, rank)
    first_texts = (
        torch.arange(len(first))
        if first_groups is None
        else first_groups.unique(return_inverse=True)[1]
    )
    two = (
        torch.arange(len(second))
        if second_groups is None
        else second_groups.unique(return_inverse=True)[1]
    )
    rows, groups = (
        torch.cat([first, second]),
        torch.cat([first_texts, two + int(first_texts.max()) + 1]),
    )
    count, share = int(groups.max()) + 1, int(first_texts.max()) + 1
    rng = np.random.default_rng(seed)
    null = np.ones((draws, len(observed)))
    for draw in range(draws):
        picked = torch.zeros(count, dtype=torch.bool)
        picked[torch.from_numpy(rng.permutation(count)[:share])] = True
        first_rows = picked[groups]
        cosines = _cosines(rows[first_rows], rows[~first_rows], rank)
        null[draw, : len(cosines)] = cosines[: len(observed)]
    low, median, high = np.quantile(null, [0.025, 0.5, 0.975], axis=0)
    p = (1 + (null <= observed + 1e-12).sum(0)) / (draws + 1)
    angles = pd.DataFrame(
        {
            "angle": range(len(observed)),
            "cosine": observed,
            "null_low": low,
            "null_median": median,
            "null_high": high,
            "p": p,
        }
    )
    shared, dealt = float(np.square(observed).mean()), np.square(null).mean(1)
    low, median, high = np.quantile(dealt, [0.025, 0.5, 0.975])
    angles.attrs["overlap"] = OverlapNull(
        shared,
        float(low),
        float(median),
        float(high),
        float((1 + (dealt <= shared + 1e-12).sum()) / (draws + 1)),
    )
    return angles


def _cosines(first: Tensor, second: Tensor, rank: int) -> np.ndarray:
    bases = [StreamingPCA(rank).fit(rows).subspace().basis for rows in (first, second)]
    return np.asarray(principal_angles(*bases).numpy())


def tier_edges(rank: int) -> list[tuple[int, int]]:
    """Tiers of components as the RepSelect study cuts them: 0-4, 4-16, 16-64, 64-256, ... up to
    ``rank``.
    """
    edges = [0]
    while edges[-1] < rank:
        edges.append(min(rank, 4 ** len(edges)))
    return list(pairwise(edges))


def energy_by_tier(
    vectors: Float[Tensor, "rows width"],
    subspace: Subspace,
    tiers: Sequence[tuple[int, int]] | None = None,
) -> pd.DataFrame:
    """Where the energy of vectors, or of a weight change, lies among principal directions.

    Args:
        vectors: rows, or a weight change ``[d_out d_in]`` against a subspace of its inputs
            (transpose it against one of its output gradients).
        subspace: directions ordered by variance.
        tiers: half-open ranges of components; :func:`tier_edges` by default.

    Returns:
        One row per tier and one for the rest of the space: ``first``, ``last`` (half-open; the rest
        ends at the width), ``energy`` (share of the squared norm), ``random`` (the share that a
        random vector would have), ``variance`` (share of the data's variance there). Energies add
        up to 1; all are 0 for zero vectors.
    """
    edges = tier_edges(subspace.rank) if tiers is None else list(tiers)
    wide = vectors.double()
    total = float(wide.square().sum())
    inside = (wide @ subspace.basis.double()).square().sum(0)
    rows = []
    for low, high in edges:
        energy = float(inside[low:high].sum()) / total if total else 0.0
        variance = (
            float(subspace.eigenvalues[low:high].double().sum()) / subspace.total_variance
            if subspace.total_variance
            else 0.0
        )
        rows.append(
            {
                "first": low,
                "last": high,
                "energy": energy,
                "random": max(0, min(high, subspace.rank) - low) / subspace.width,
                "variance": variance,
            }
        )
    covered = min(max((high for _, high in edges), default=0), subspace.width)
    remainder = {
        name: (1 - sum(row[name] for row in rows)) for name in ("energy", "random", "variance")
    }
    rows.append(
        {
            "first": covered,
            "last": subspace.width,
            **(
                {name: max(0.0, value) for name, value in remainder.items()}
                if total
                else {**remainder, "energy": 0.0}
            ),
        }
    )
    return pd.DataFrame(rows, columns=["first", "last", "energy", "random", "variance"])


def _hsic(first: Tensor, second: Tensor) -> float:
    """Unbiased HSIC of two linear kernels (Song et al. 2012, eq. 5), from ``n`` rows ``[rows
    width]``: with the diagonals taken out of ``K = X X'`` and ``L = Y Y'``,

        (tr(K L) + sum(K) sum(L) / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L 1) / (n (n - 3)).

    ``tr(X X' Y Y') = |X' Y|^2``, so no ``[rows rows]`` matrix is made: time and memory are linear
    in n.
    """
    n = len(first)
    self_products = [rows.square().sum(1) for rows in (first, second)]
    sums = [
        rows @ rows.sum(0) - square
        for rows, square in zip((first, second), self_products, strict=True)
    ]
    trace = float((first.T @ second).square().sum() - (self_products[0] * self_products[1]).sum())
    product_of_sums = float(sums[0].sum()) * float(sums[1].sum()) / ((n - 1) * (n - 2))
    return (trace + product_of_sums - 2 / (n - 2) * float(sums[0] @ sums[1])) / (n * (n - 3))


def debiased_cka(
    first: Float[Tensor, "rows width"], second: Float[Tensor, "rows other_width"]
) -> float:
    """Linear CKA with the unbiased HSIC (Nguyen, Raghu and Kornblith 2021, arXiv 2010.15327): 1 for
    equal representations up to rotation and scale, 0 on average for unrelated ones, also where
    there are fewer rows than coordinates (the usual estimate tends to 1 there).

    Args:
        first: rows of one model.
        second: rows of another on the same tokens, in the same order.

    Returns:
        A number that may be slightly negative; NaN where one of the two does not vary.

    Raises:
        WorkbenchError: the numbers of rows differ, or there are fewer than 4.
    """
    if len(first) != len(second) or len(first) < 4:
        raise WorkbenchError(
            f"CKA needs two sets of at least 4 rows on the same tokens; got {len(first)} and "
            f"{len(second)}"
        )
    # Any common shift leaves the estimate as it is; taking the first row off makes rows that never
    # change exactly zero.
    first_rows, second_rows = (rows.double() - rows[:1].double() for rows in (first, second))
    self_hsic = [_hsic(first_rows, first_rows), _hsic(second_rows, second_rows)]
    return (
        _hsic(first_rows, second_rows) / (self_hsic[0] * self_hsic[1]) ** 0.5
        if min(self_hsic) > 0
        else float("nan")
    )


@torch.no_grad()
def read_direction(
    direction: Float[Tensor, " d_model"],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    top: int = 8,
) -> pd.DataFrame:
    """A direction of the residual stream read through the unembedding (logit lens): the tokens it
    promotes and the tokens it suppresses.

    The final norm's weight scales the coordinates; its division by the length of the stream is left
    out, since a direction has none.

    Args:
        direction: in the residual stream.
        model: a causal LM of a known family.
        tokenizer: its tokenizer.
        top: tokens on each side.

    Returns:
        ``token``, ``logit`` (per unit length of the direction), ``side`` (``promoted`` or
        ``suppressed``).

    Raises:
        WorkbenchError: the direction does not live in the residual stream, or the family is
            unknown.
    """
    model_family, (_, inner) = family(model), causal_lm(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None  # type: ignore[operator]
    if model_family is None or head is None:
        raise WorkbenchError(
            f"{type(model).__name__} has no unembedding that is known here; a causal LM of a "
            "family in hooks.families is needed"
        )
    unembedding = head.weight
    if direction.shape != unembedding.shape[1:]:
        raise WorkbenchError(
            f"the residual stream of this family member has width {unembedding.shape[1]}; got a "
            f"direction of shape {list(direction.shape)}"
        )
    norm = inner.get_submodule(model_family.outside["ln_final.hook_in"].path)
    scale = getattr(norm, "weight", None)
    unit = (
        (direction / direction.norm().clamp(min=torch.finfo(torch.float32).tiny))
        .float()
        .to(unembedding.device)
    )
    if "LayerNorm" in type(norm).__name__:  # takes the mean over coordinates away; RMS norms do not
        unit = unit - unit.mean()
    if scale is not None:
        unit = unit * (
            scale.float() + ("Gemma" in type(norm).__name__)
        )  # Gemma's norms multiply by 1 + weight
    logits = unembedding.float() @ unit
    rows = []
    for side, sign in (("promoted", 1), ("suppressed", -1)):
        for index in (sign * logits).topk(min(top, len(logits))).indices.tolist():
            rows.append(
                {"token": tokenizer.decode([index]), "logit": float(logits[index]), "side": side}
            )
    return pd.DataFrame(rows)
