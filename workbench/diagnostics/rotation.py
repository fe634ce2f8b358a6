"""How the residual stream moved between two models: did its principal directions turn, did its mean
drift along them, and is the shift one direction or many?

Everything compares rows of the same tokens (:func:`workbench.diagnostics.shift.streams`). A model
against itself gives the identity; :func:`with_anchors` puts that, the never-learned model and a
base with shuffled pairing beside every number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.subspaces.finders import StreamingPCA
from workbench.subspaces.subspace import Subspace, principal_angles
from workbench.tables import Table

if TYPE_CHECKING:
    from jaxtyping import Float

ROTATION_MEASURES = (
    "subspace_overlap",
    "smallest_cosine",
    "random_overlap",
    "pc1_cosine",
    "pc1_gap",
    "pc1_shift",
    "pc2_shift",
    "shift_rank",
    "random_rank",
    "leading_share",
    "random_share",
    "common_share",
    "norm",
    "norm_high",
)
"""Columns of :func:`rotation_by_layer`, and the metrics under which :func:`add_rotation` writes
them.
"""

_TRACY_WIDOM_MEAN = -1.2065336  # of the law of order 1


def angles_by_layer(
    reference: Mapping[int, Float[Tensor, "rows d_model"]],
    moved: Mapping[int, Float[Tensor, "rows d_model"]],
    rank: int = 8,
) -> pd.DataFrame:
    """Cosines of the principal angles between the top principal subspaces of two models' streams,
    block by block; all 1 for the same model.

    The subspaces do not know which row belongs to which, so shuffled pairing is no null for them:
    random subspaces have a mean squared cosine of ``rank / width``. Whether two sets of *texts*
    differ beyond chance is :func:`workbench.subspaces.compare.angle_null`.

    Args:
        reference: of the model before, by layer.
        moved: of the model after, same rows.
        rank: of both subspaces, at most; directions without variance are left out.

    Returns:
        ``layer``, ``angle`` (0 is the smallest), ``cosine``.

    Raises:
        WorkbenchError: see :func:`rotation_by_layer`.
    """
    rows = []
    for layer, reference_rows, moved_rows in _pairs(reference, moved, rank):
        cosines = principal_angles(
            *(
                _principal(stream, rank).basis
                for stream in _in_their_span(reference_rows, moved_rows)
            )
        )
        rows += [
            {"layer": layer, "angle": angle, "cosine": cosine}
            for angle, cosine in enumerate(cosines.tolist())
        ]
    return pd.DataFrame(rows, columns=["layer", "angle", "cosine"])


def rotation_by_layer(
    reference: Mapping[int, Float[Tensor, "rows d_model"]],
    moved: Mapping[int, Float[Tensor, "rows d_model"]],
    rank: int = 8,
) -> pd.DataFrame:
    r"""Rotation, drift and shape of the shift, block by block. ``h`` are the rows of the model
    before, ``h'`` of the model after, :math:`D = h' - h` ``[rows width]``.

    Turned directions:

    * ``subspace_overlap``: mean squared cosine of the principal angles of the top-``rank``
      subspaces (of the smaller rank, where variance runs out); 1 for the same model, and
      ``random_overlap`` = larger rank / width on average for random subspaces. ``smallest_cosine``
      is that of the largest angle.
    * ``pc1_cosine``: :math:`|\langle v_1, v_1' \rangle|` of the first principal directions; 1. The
      sign of a principal direction means nothing. ``pc1_gap`` is the base's relative eigengap
      :math:`(\lambda_1 - \lambda_2) / \lambda_1`: where it is small, PC1 is not a property of the
      stream and its cosine says nothing.

    Drift (PCA shift), in standard deviations of the base's own activations along that direction; 0:

    * ``pc1_shift`` :math:`= \langle \bar h' - \bar h, v_1 \rangle / \sqrt{\lambda_1}`,
      ``pc2_shift`` likewise. :math:`v_i` points to where the base's mean has a positive coordinate.

    After Xu et al. 2025 (arXiv 2505.16831), as their released code has it: PCA fitted on the base,
    both means projected on it, difference along PC1; similarity is the cosine of the two PC1.
    Departures: rows are content tokens, not text means that include padding; PC2 is a difference
    too; units are standard deviations; the cosine has no sign. The paper's own equations were not
    compared.

    Shape of the shift; NaN where nothing moved:

    * ``shift_rank``: participation ratio :math:`(\sum_i s_i)^2 / \sum_i s_i^2` of the eigenvalues
      of :math:`D^T D`: 1 for one direction, at most ``min(row, width)``. ``random_rank`` is that of
      an isotropic Gaussian shift of the same shape, :math:`(nd + 2) / (n + d + 1)` (ratio of the
      two expectations).
    * ``leading_share``: :math:`s_1 / \sum_i s_i`. ``random_share`` is that of an isotropic Gaussian
      shift: mean of the Tracy-Widom law, centred and scaled as in Johnstone 2001 (Annals of
      Statistics 29, 295-327), over ``n d``. Tokens of one text do not move independently, so a
      share slightly above it is no finding.
    * ``common_share``: :math:`n |\bar D|^2 / |D|^2`, the part of the shift that is one vector added
      to every token; 1/n for independent rows.

    Norms, of the model after: ``norm`` mean length of a token's vector, ``norm_high`` its 97.5 %
    quantile over tokens.

    Args:
        reference: of the model before, by layer; see :func:`workbench.diagnostics.shift.streams`.
        moved: same rows of the model after.
        rank: of the subspaces, at most.

    Returns:
        ``layer`` and :data:`ROTATION_MEASURES`.

    Raises:
        WorkbenchError: the streams differ in blocks or shape, have fewer than two rows, do not
            vary, or hold NaN or infinity; ``rank`` is not positive.
    """
    rows = []
    for layer, reference_rows, moved_rows in _pairs(reference, moved, rank):
        count, width = reference_rows.shape
        reference_rows, moved_rows = _in_their_span(reference_rows, moved_rows)
        before, after = (
            _principal(stream, max(rank, 2)) for stream in (reference_rows, moved_rows)
        )
        cosines = principal_angles(before.top(rank).basis, after.top(rank).basis)
        gap = 1 - float(before.eigenvalues[1] / before.eigenvalues[0]) if before.rank > 1 else 1.0
        drift = moved_rows.mean(0) - reference_rows.mean(0)
        along = [_drift(drift, reference_rows.mean(0), before, number) for number in (0, 1)]
        delta = moved_rows - reference_rows
        spectrum, size = _spectrum(delta), float(delta.square().sum())
        lengths = moved_rows.norm(dim=1)
        values = (
            float(cosines.square().mean()),
            float(cosines[-1]),
            max(before.top(rank).rank, after.top(rank).rank) / width,
            float((before.basis[:, 0].double() @ after.basis[:, 0].double()).abs()),
            gap,
            *along,
            float(spectrum.sum() ** 2 / spectrum.square().sum()) if size else np.nan,
            (count * width + 2) / (count + width + 1),
            float(spectrum[-1] / spectrum.sum()) if size else np.nan,
            random_share(count, width),
            count * float(delta.mean(0).square().sum()) / size if size else np.nan,
            float(lengths.mean()),
            float(lengths.quantile(0.975)),
        )
        rows.append({"layer": layer, **dict(zip(ROTATION_MEASURES, values, strict=True))})
    return pd.DataFrame(rows, columns=["layer", *ROTATION_MEASURES])


def _pairs(
    reference: Mapping[int, Tensor], moved: Mapping[int, Tensor], rank: int
) -> list[tuple[int, Tensor, Tensor]]:
    if rank < 1:
        raise WorkbenchError(f"rank is {rank}; a subspace to compare has at least one direction")
    shapes = [
        {layer: tuple(stream.shape) for layer, stream in streams.items()}
        for streams in (reference, moved)
    ]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise WorkbenchError(
            f"both models need streams of the same tokens after the same blocks; got {shapes[0]} "
            f"and {shapes[1]}"
        )
    for layer, stream in reference.items():
        if len(stream) < 2 or not bool(
            torch.isfinite(stream).all() and torch.isfinite(moved[layer]).all()
        ):
            raise WorkbenchError(
                f"the streams after block {layer} have {len(stream)} rows, or hold NaN or "
                "infinity; at least two finite rows are needed"
            )
    return [(layer, stream.double(), moved[layer].double()) for layer, stream in reference.items()]


def _in_their_span(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of rows in coordinates of the space they span, where that is smaller: lengths,
    angles and variances stay, and decompositions of wide streams get cheap.
    """
    if one.shape[1] <= 2 * len(one):
        return one, other
    span = torch.linalg.qr(torch.cat([one, other]).T).Q
    return one @ span, other @ span


def _principal(rows: Tensor, rank: int) -> Subspace:
    found = StreamingPCA(rank).fit(rows).subspace()
    if not found.rank:
        raise WorkbenchError(
            "the rows of a stream do not vary, so they have no principal direction; give different "
            "texts"
        )
    return found


def _drift(drift: Tensor, mean: Tensor, base: Subspace, number: int) -> float:
    if number >= base.rank:
        return float("nan")
    direction = base.basis[:, number].double()
    sign = -1.0 if float(mean @ direction) < 0 else 1.0
    return (
        sign * float(drift @ direction) / float(base.eigenvalues[number]) ** 0.5 + 0.0
    )  # no minus zero


def _spectrum(rows: Tensor) -> Tensor:
    """Eigenvalues of ``rows^T rows``, smallest first, from the smaller of the two Gram matrices."""
    gram = rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T
    return torch.linalg.eigvalsh(gram).clamp(min=0)


def random_share(count: int, width: int) -> float:
    """Share of the squared size of a Gaussian matrix ``[rows width]`` that lies along its leading
    direction, on average: see :func:`rotation_by_layer`.

    Johnstone's limit is for large matrices; the error is below 2 % from about ten rows and columns
    on. A single row or column has one direction: 1.
    """
    small, large = sorted((count, width))
    if small < 2:
        return 1.0
    sides = (large - 1) ** 0.5, small**0.5
    centre, scale = sum(sides) ** 2, sum(sides) * (1 / sides[0] + 1 / sides[1]) ** (1 / 3)
    return min(1.0, max(1 / small, (centre + _TRACY_WIDOM_MEAN * scale) / (count * width)))


def shuffled(
    streams: Mapping[int, Float[Tensor, "rows d_model"]], seed: int = 0
) -> dict[int, Float[Tensor, "rows d_model"]]:
    """The same rows in another order (one order for all blocks): what a paired measure gives where
    rows have nothing to do with each other.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = {
        count: torch.randperm(count, generator=generator)
        for count in sorted({len(stream) for stream in streams.values()})
    }
    return {layer: stream[orders[len(stream)]] for layer, stream in streams.items()}


def with_anchors(
    measure: Callable[
        [Mapping[int, Float[Tensor, "rows d_model"]], Mapping[int, Float[Tensor, "rows d_model"]]],
        pd.DataFrame,
    ],
    base: Mapping[int, Float[Tensor, "rows d_model"]],
    models: Mapping[str, Mapping[int, Float[Tensor, "rows d_model"]]],
    seed: int = 0,
) -> pd.DataFrame:
    """Any measure of two models' streams, for several models beside its anchors.

    >>> with_anchors(rotation_by_layer, base, {"never-learned": never, "npo": npo})      # doctest: +SKIP

    Args:
        measure: :func:`rotation_by_layer`, :func:`angles_by_layer`,
            :func:`workbench.diagnostics.shift.shift_by_layer` or alike.
        base: the reference of every comparison.
        models: name -> streams; a never-learned model belongs among them where there is one.
        seed: of the shuffling.

    Returns:
        The frames of ``measure`` one below another, with a column ``model``: ``base`` (the
        identity), ``base, shuffled`` (the null of unrelated rows), then the given ones.
    """  # noqa: E501
    arms = {"base": base, "base, shuffled": shuffled(base, seed), **models}
    return pd.concat(
        [measure(base, streams).assign(model=name) for name, streams in arms.items()],
        ignore_index=True,
    )


def add_rotation(table: Table, frame: pd.DataFrame, **columns: Any) -> None:
    """Write :func:`rotation_by_layer` into a table of results: stage ``representation``, one row
    per block and measure that has a value.

    Args:
        table: of the run.
        frame: what was measured.
        columns: further columns; ``split`` says which set of texts.
    """
    for row in frame.to_dict("records"):
        for measure in ROTATION_MEASURES:
            if np.isfinite(row[measure]):
                table.add(
                    measure,
                    row[measure],
                    **{
                        "stage": "representation",
                        "site": f"blocks.{row['layer']}.hook_resid_post",
                        **columns,
                    },
                )
