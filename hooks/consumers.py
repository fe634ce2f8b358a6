"""What can be done with rows while a pass runs: collect them, or reduce them to running moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hooks.capture import Rows
from hooks.errors import unknown_site
from hooks.html import table
from hooks.sites import Site


@dataclass
class Moments:
    """Running count, mean and scatter matrix of the rows of one site; memory does not grow with the number of rows.

    Every chunk is centred on its own mean before the product (float32), and merged in float64 by the update of Chan, Golub and LeVeque (1983). Without
    centring, float32 loses the covariance where the mean is large against the spread, as in residual streams.

    Attributes:
        count: rows seen.
        mean: ``[width]`` float64.
        scatter: ``[width, width]`` float64, the sum of outer products of centred rows.
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Add ``rows`` ``[row, width]`` (any float dtype). No rows, no change."""
        if rows.shape[0] == 0:
            return
        rows = rows.detach().float()
        mean = rows.double().mean(0)
        centred = rows - mean.float()
        self.merge(Moments(rows.shape[0], mean, (centred.T @ centred).double()))

    def merge(self, other: Moments) -> None:
        """Add everything that ``other`` has seen, as if its rows had been seen here."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        total = self.count + other.count
        shift = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean += shift * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """``[width, width]`` float64 covariance (divided by the count).

        Raises:
            ValueError: no row was seen.
        """
        if self.count == 0:
            raise ValueError("no row was seen, so there is no covariance; does the position mask select anything?")
        return self.scatter / self.count


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
        return f"MomentsOf({', '.join(f'{name} {moments.count} rows' for name, moments in self.by_site.items()) or 'no rows'})"

    def _repr_html_(self) -> str:
        lines = (
            (name, moments.count, len(moments.mean), f"{moments.mean.norm():.4g}", f"{moments.scatter.trace() / moments.count:.4g}")
            for name, moments in self.by_site.items()
            if moments.count
        )
        return table("Running moments", ("site", "rows", "width", "norm of the mean", "total variance"), lines)


class Collect:
    """A consumer that keeps every row in memory: ``Collect()[site_name]`` is ``[row, width]``.

    Args:
        device: where the rows are kept. On a GPU, rows that stay there cost no transfer, but memory.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._parts: dict[str, list[Tensor]] = {}

    def __call__(self, site: Site, rows: Rows) -> None:
        """Keep the rows of one site."""
        self._parts.setdefault(site.name, []).append(rows.values.to(self.device))

    def __getitem__(self, name: str) -> Tensor:
        """All rows of the site called ``name``, ``[row, width]``, in the order of the passes.

        Raises:
            CaptureError: it delivered no rows.
        """
        if name not in self._parts:
            raise unknown_site(name, self._parts)
        return torch.cat(self._parts[name])

    def __repr__(self) -> str:
        return f"Collect({', '.join(f'{name} {list(self[name].shape)}' for name in self._parts) or 'no rows'})"

    def _repr_html_(self) -> str:
        return table(
            "Collected rows",
            ("site", "rows", "width", "dtype"),
            ((name, *self[name].shape, str(self[name].dtype).removeprefix("torch.")) for name in self._parts),
        )

    def names(self) -> Iterable[str]:
        """The sites that have delivered rows."""
        return self._parts.keys()
