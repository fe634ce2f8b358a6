"""A subspace as a value: where it was found, from what, and its orthonormal basis."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.files import write_file
from workbench.hooks import Moments

if TYPE_CHECKING:
    from jaxtyping import Float, Float64


@dataclass(frozen=True, slots=True, repr=False)
class Subspace:
    """Principal directions of the rows of one site.

    Attributes:
        basis: float32, orthonormal columns, largest variance first.
        eigenvalues: float32, variance along each column.
        mean: float32, the mean row.
        count: rows behind it.
        total_variance: trace of the covariance; ``eigenvalues.sum() / total_variance`` is the share
            explained.
        site: name of the site (it says whether these are activations or gradients).
        tokens: the token rule that selected the rows.
        source: what was run, in words.
        asked: directions asked for; fewer are found where the rows have no more. ``None`` where
            nobody asked for a number.
    """

    basis: Float[Tensor, "width rank"]
    eigenvalues: Float[Tensor, " rank"]
    mean: Float[Tensor, " width"]
    count: int
    total_variance: float
    site: str
    tokens: str
    source: str
    asked: int | None = None

    @property
    def width(self) -> int:
        """Dimension of the space it lies in."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]

    def top(self, rank: int) -> Subspace:
        """The first ``rank`` directions."""
        return Subspace(
            self.basis[:, :rank],
            self.eigenvalues[:rank],
            self.mean,
            self.count,
            self.total_variance,
            self.site,
            self.tokens,
            self.source,
            rank,
        )

    def named(self, *, site: str = "", tokens: str = "", source: str = "") -> Subspace:
        """The same subspace with a new note of where it comes from; an empty word leaves the old
        one.
        """
        return replace(
            self, site=site or self.site, tokens=tokens or self.tokens, source=source or self.source
        )

    def project(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Orthogonal projection of ``rows`` onto the subspace (through the origin, not through the
        mean).
        """
        return (rows @ self.basis) @ self.basis.T

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {
            "basis": self.basis.contiguous(),
            "eigenvalues": self.eigenvalues.contiguous(),
            "mean": self.mean.contiguous(),
        }
        note = {
            "count": str(self.count),
            "total_variance": repr(self.total_variance),
            "site": self.site,
            "tokens": self.tokens,
            "source": self.source,
        } | ({} if self.asked is None else {"asked": str(self.asked)})
        note["sha256"] = _digest(note, tensors)
        write_file(path, lambda temporary: save_file(tensors, temporary, metadata=note))

    @classmethod
    def load(cls, path: Path) -> Subspace:
        """Read what :meth:`save` wrote.

        Raises:
            WorkbenchError: the file is missing, is no subspace, or is not as it was written.
        """
        try:
            with safe_open(path, framework="pt") as stored:
                note = stored.metadata() or {}
                tensors = {
                    name: stored.get_tensor(name) for name in ("basis", "eigenvalues", "mean")
                }
            if note.pop("sha256") != _digest(note, tensors):
                raise ValueError("its hash differs")
            return cls(
                **tensors,
                count=int(note["count"]),
                total_variance=float(note["total_variance"]),
                site=note["site"],
                tokens=note["tokens"],
                source=note["source"],
                asked=int(note["asked"]) if "asked" in note else None,
            )
        except Exception as error:
            raise WorkbenchError(
                f"{path} holds no subspace ({error}); it must be a file written by Subspace.save"
            ) from error

    @property
    def _directions(self) -> str:
        fewer = self.asked is not None and self.rank < self.asked
        return f"{self.rank} of {self.width}" + (f" ({self.asked} asked)" if fewer else "")

    def __repr__(self) -> str:
        return (
            f"Subspace({self.site or 'no site'}: {self._directions} directions, {self.count} rows)"
        )

    def _repr_html_(self) -> str:
        share = float(self.eigenvalues.sum()) / self.total_variance if self.total_variance else 0.0
        rows = {
            "site": self.site,
            "directions": self._directions,
            "variance inside": f"{share:.1%}",
            "rows": f"{self.count:,}",
            "tokens": self.tokens,
            "source": self.source,
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(k)}</th><td "
            f"style='text-align:left'>{html.escape(str(v))}</td></tr>"
            for k, v in rows.items()
        )
        return f"<table>{cells}</table>"


def _digest(note: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in a subspace's file."""
    digest = hashlib.sha256(repr(sorted(note.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def principal_subspace(
    moments: Moments, rank: int, *, site: str = "", tokens: str = "", source: str = ""
) -> Subspace:
    """The top principal directions of ``moments``: exact eigendecomposition of the covariance in
    float64.

    Directions without variance are left out, so that rank-deficient data gives fewer columns than
    asked for and never a column of noise.

    Args:
        moments: at least one row.
        rank: how many directions, at most.
        site: recorded.
        tokens: recorded.
        source: recorded.

    Raises:
        WorkbenchError: there are no rows, or they are not finite.
    """
    if moments.count == 0:
        raise WorkbenchError(
            f"no row was seen at {site or 'this site'}; does the position mask select anything?"
        )
    covariance = moments.covariance
    if not bool(torch.isfinite(covariance).all()):
        raise WorkbenchError(
            f"the rows of {site or 'this site'} hold NaN or infinity; no subspace was fitted"
        )
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    size = moments.mean.square() + covariance.diagonal()
    keep = (values > noise_floor(vectors, size, float(values[0]))).nonzero()[:rank, 0]
    return Subspace(
        vectors[:, keep].float().cpu().contiguous(),
        values[keep].float().cpu(),
        moments.mean.float().cpu(),
        moments.count,
        float(values.sum()),
        site,
        tokens,
        source,
        rank,
    )


_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Relative error of a coordinate of a float32 row: what a product or two before it have rounded."""


def noise_floor(
    vectors: Float[Tensor, "width k"], mean_square: Float[Tensor, " width"], largest: float
) -> Float64[Tensor, " k"]:
    """The variance that rounding alone can make along each direction.

    Every coordinate of a float32 row carries a rounding error in proportion to its own size, so a
    direction that hardly touches a massive coordinate does not suffer from it:
    ``(8 eps32)^2 sum_i v_i^2 E[x_i^2]``, and the rounding of a float64 eigendecomposition,
    ``eps64 * width * largest``, on top.

    Args:
        vectors: orthonormal columns.
        mean_square: mean square of each coordinate, its mean included.
        largest: the largest eigenvalue of the decomposition that gave ``vectors``.

    Returns:
        One variance for every column.
    """
    own_energy = vectors.double().square().T @ mean_square.to(vectors.device).double()
    return _ROUNDING**2 * own_energy + torch.finfo(torch.float64).eps * len(mean_square) * largest


def principal_angles(
    first: Float[Tensor, "width k"], second: Float[Tensor, "width other_k"]
) -> Float64[Tensor, " angles"]:
    """Cosines of the principal angles between two subspaces, largest first (Bjorck and Golub 1973).

    Args:
        first: orthonormal columns.
        second: orthonormal columns.

    Returns:
        As many as the smaller rank, in ``[0, 1]``.
    """
    return torch.linalg.svdvals(first.double().T @ second.double()).clamp(0, 1)


def overlap(first: Float[Tensor, "width k"], second: Float[Tensor, "width other_k"]) -> float:
    """Mean squared cosine of the principal angles: 1 for the same subspace, ``m / width`` on
    average for a random one of rank ``m >= k``.
    """
    cosines = principal_angles(first, second)
    return float(cosines.square().mean()) if len(cosines) else 0.0


def energy_inside(delta: Float[Tensor, "d_out d_in"], basis: Float[Tensor, "d_in k"]) -> float:
    """Share of the squared Frobenius norm of a weight delta that acts on the input directions
    ``basis``; 0 for a zero delta.
    """
    total = float(delta.double().square().sum())
    return float((delta.double() @ basis.double()).square().sum()) / total if total else 0.0
