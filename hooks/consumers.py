"""What can be done with rows while a pass runs: collect them, or reduce them to running moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.hooks.brief import brief
from workbench.hooks.capture import Rows
from workbench.hooks.errors import unknown_site
from workbench.hooks.html import table
from workbench.hooks.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Real


@brief
@dataclass
class Moments:
    """Running weight, mean and scatter matrix of the rows of one site; memory does not grow with
    the number of rows.

    Every chunk is centred on its own mean before the product, and merged by the update of Chan,
    Golub and LeVeque (1983), all in float64: next to one coordinate a thousand times larger than
    the others, float32 products lose what the others do. Merging is exact, so several processes
    that each see a part of the rows give what one would have given.

    Attributes:
        count: rows seen, those of weight zero left out.
        weight: their total weight; the count, where no weights were given.
        mean: of the rows seen.
        scatter: the weighted sum of outer products of centred rows.
    """

    count: int = 0
    weight: float = 0.0
    mean: Float64[Tensor, " width"] = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.float64)
    )
    scatter: Float64[Tensor, "width width"] = field(
        default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64)
    )

    def update(
        self, rows: Float[Tensor, "rows width"], weights: Real[Tensor, " rows"] | None = None
    ) -> None:
        """Add ``rows`` (any float dtype), each counted ``weights`` times (once by default). No
        rows, no change.

        Raises:
            ValueError: a weight is negative or not finite, or there are not as many as rows.
        """
        rows, weights = checked_rows(rows, weights)
        if rows.shape[0] == 0:
            return
        total = float(rows.shape[0]) if weights is None else float(weights.sum())
        if total == 0:
            return
        mean = rows.mean(0) if weights is None else (weights[:, None] * rows).sum(0) / total
        centred = rows - mean
        weighted = centred if weights is None else centred * weights[:, None]
        product = weighted.T @ centred
        count = rows.shape[0] if weights is None else int((weights > 0).sum())
        self.merge(Moments(count, total, mean, product))

    def merge(self, other: Moments) -> None:
        """Add everything that ``other`` has seen, as if its rows had been seen here.

        Raises:
            ValueError: it has seen rows of another width.
        """
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.weight, self.mean, self.scatter = (
                other.count,
                other.weight,
                other.mean.clone(),
                other.scatter.clone(),
            )
            return
        if len(other.mean) != len(self.mean):
            raise ValueError(
                f"rows of width {len(other.mean)} cannot be merged into moments of width "
                f"{len(self.mean)}"
            )
        total = self.weight + other.weight
        shift = other.mean.to(self.mean) - self.mean
        self.scatter += other.scatter.to(self.scatter)
        self.scatter.addr_(shift, shift, alpha=self.weight * other.weight / total)
        self.mean += shift * (other.weight / total)
        self.count += other.count
        self.weight = total

    @property
    def covariance(self) -> Float64[Tensor, "width width"]:
        """The covariance (divided by the total weight).

        Raises:
            ValueError: no row was seen.
        """
        if self.count == 0:
            raise ValueError(
                "no row was seen, so there is no covariance; does the position mask select "
                "anything?"
            )
        return self.scatter / self.weight


def checked_rows(
    rows: Float[Tensor, "rows width"], weights: Real[Tensor, " rows"] | None
) -> tuple[Float64[Tensor, "rows width"], Float64[Tensor, " rows"] | None]:
    """Rows and weights in float64 on the same device.

    Raises:
        ValueError: see :meth:`Moments.update`.
    """
    if rows.ndim != 2:
        raise ValueError(f"rows must be [row, width]; got shape {list(rows.shape)}")
    if weights is None:
        return rows.detach().double(), None
    weights = weights.detach().double().to(rows.device)
    if weights.shape != rows.shape[:1]:
        raise ValueError(
            f"{rows.shape[0]} rows need as many weights; got shape {list(weights.shape)}"
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("weights must be finite and not negative")
    return rows.detach().double(), weights


class MomentsOf:
    """A consumer that keeps :class:`Moments` for every site: ``MomentsOf()[site_name]``."""

    def __init__(self) -> None:
        self.by_site: dict[str, Moments] = {}

    def __call__(self, site: Site, rows: Rows) -> None:
        """Add the rows of one site."""
        self.by_site.setdefault(site.name, Moments()).update(rows.values)

    def __getitem__(self, name: str) -> Moments:
        """The moments of the site called ``name``.

        Raises:
            CaptureError: it delivered no rows.
        """
        if name not in self.by_site:
            raise unknown_site(name, self.by_site)
        return self.by_site[name]

    def __repr__(self) -> str:
        return f"MomentsOf({', '.join(f'{name} {moments.count} rows' for name, moments in self.by_site.items()) or 'no rows'})"  # noqa: E501

    def _repr_html_(self) -> str:
        lines = (
            (
                name,
                moments.count,
                len(moments.mean),
                f"{moments.mean.norm():.4g}",
                f"{moments.scatter.trace() / moments.count:.4g}",
            )
            for name, moments in self.by_site.items()
            if moments.count
        )
        return table(
            "Running moments",
            ("site", "rows", "width", "norm of the mean", "total variance"),
            lines,
        )


class Collect:
    """A consumer that keeps every row in memory: ``Collect()[site_name]`` is ``[rows width]``.

    Args:
        device: where the rows are kept. On a GPU, rows that stay there cost no transfer, but
            memory.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._parts: dict[str, list[Tensor]] = {}

    def __call__(self, site: Site, rows: Rows) -> None:
        """Keep the rows of one site."""
        self._parts.setdefault(site.name, []).append(rows.values.to(self.device))

    def __getitem__(self, name: str) -> Float[Tensor, "rows width"]:
        """All rows of the site called ``name``, in the order of the passes.

        Raises:
            CaptureError: it delivered no rows.
        """
        if name not in self._parts:
            raise unknown_site(name, self._parts)
        return torch.cat(self._parts[name])

    def __repr__(self) -> str:
        return f"Collect({', '.join(f'{name} {list(self[name].shape)}' for name in self._parts) or 'no rows'})"  # noqa: E501

    def _repr_html_(self) -> str:
        return table(
            "Collected rows",
            ("site", "rows", "width", "dtype"),
            (
                (name, *self[name].shape, str(self[name].dtype).removeprefix("torch."))
                for name in self._parts
            ),
        )

    def names(self) -> Iterable[str]:
        """The sites that have delivered rows."""
        return self._parts.keys()
