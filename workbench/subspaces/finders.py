"""Principal component finders that see rows once, in scikit-learn's conventions: ``fit``,
``partial_fit``, ``transform``, ``components_``, ``explained_variance_``.

Two of them, with the same attributes:

* :class:`StreamingPCA`: exact covariance and one eigendecomposition; memory ``O(d^2)``. For
  residual streams and anything up to some thousand coordinates.
* :class:`SketchPCA`: a linear sketch of the covariance; memory ``O(d k)``, for MLP hidden layers
  (14,336 and more). It reports how much of the covariance it misses.

Both take weights, merge (several processes give the basis that one would have given), never return
a direction without variance, and serve as consumers of a capture through :class:`EachSite`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.hooks import Moments, Rows, Site
from workbench.hooks.consumers import checked_rows
from workbench.hooks.html import table
from workbench.subspaces.subspace import Subspace, noise_floor, principal_subspace

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Real


class _Finder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What both finders share: the attributes of scikit-learn's PCA, read from a
    :class:`Subspace`.
    """

    n_components: int
    _found: Any

    def fit(
        self,
        X: Float[Tensor, "rows width"],
        y: Any = None,
        sample_weight: Real[Tensor, " rows"] | None = None,
    ) -> Self:
        """Forget everything seen before and see ``X``."""
        self.reset()
        return self.partial_fit(X, sample_weight=sample_weight)

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError

    def partial_fit(
        self,
        X: Float[Tensor, "rows width"],
        y: Any = None,
        sample_weight: Real[Tensor, " rows"] | None = None,
    ) -> Self:
        """See ``X`` as well."""
        raise NotImplementedError

    def subspace(self, **where: str) -> Subspace:
        """What was found, as a value; ``where`` may name ``site``, ``tokens`` and ``source``."""
        raise NotImplementedError

    def __sklearn_is_fitted__(self) -> bool:
        return bool(self.n_samples_seen_)  # type: ignore[attr-defined]

    def _described(self, width: int) -> str:
        """The finder in words; says how many components there are where they are fewer than asked.

        Before the rows are decomposed (the first question for components or variances) that is
        not known, and the words say only what was asked.
        """
        rank_found = "" if self._found is None else f"{self.subspace().rank} of "
        return (
            f"{type(self).__name__}({rank_found}{self.n_components} components, "
            f"{self.n_samples_seen_} rows of width {width})"  # type: ignore[attr-defined]
        )

    @property
    def components_(self) -> Float32[Tensor, "k width"]:
        """Orthonormal rows, largest variance first; ``k <= n_components``, directions without
        variance are left out.
        """
        return self.subspace().basis.T

    @property
    def explained_variance_(self) -> Float32[Tensor, " k"]:
        """The variances (divided by the total weight, not by ``n - 1``)."""
        return self.subspace().eigenvalues

    @property
    def explained_variance_ratio_(self) -> Float32[Tensor, " k"]:
        """Their shares of the total variance."""
        found = self.subspace()
        return (
            found.eigenvalues / found.total_variance if found.total_variance else found.eigenvalues
        )

    @property
    def mean_(self) -> Float32[Tensor, " width"]:
        """The mean row."""
        return self.subspace().mean

    def transform(self, X: Float[Tensor, "rows width"]) -> Float32[Tensor, "rows k"]:
        """The coordinates of the centred rows."""
        found = self.subspace()
        return (X.float() - found.mean.to(X.device)) @ found.basis.to(X.device)


class StreamingPCA(_Finder):
    """Exact principal components of a stream of rows: products of centred chunks, merged (Chan,
    Golub and LeVeque 1983), and one ``eigh``, all in float64.

    Args:
        n_components: how many directions, at most.

    Attributes:
        moments_: what was seen.
    """

    def __init__(self, n_components: int = 64) -> None:
        self.n_components = n_components
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.moments_ = Moments()
        self._found: Subspace | None = None

    def partial_fit(
        self,
        X: Float[Tensor, "rows width"],
        y: Any = None,
        sample_weight: Real[Tensor, " rows"] | None = None,
    ) -> Self:
        """See ``X`` as well, each row ``sample_weight`` times."""
        self.moments_.update(X, sample_weight)
        self._found = None
        return self

    def merge(self, other: StreamingPCA) -> Self:
        """Add everything that ``other`` has seen."""
        self.moments_.merge(other.moments_)
        self._found = None
        return self

    @property
    def n_samples_seen_(self) -> int:
        """Rows seen."""
        return self.moments_.count

    def subspace(self, **where: str) -> Subspace:
        """What was found, as a value; ``where`` may name ``site``, ``tokens`` and ``source``."""
        if self._found is None:
            if not self.moments_.count:
                raise NotFittedError(
                    "no row was seen; call fit or partial_fit, or look whether the position rule "
                    "selects anything"
                )
            self._found = principal_subspace(self.moments_, self.n_components)
        return self._found.named(**where)

    def __repr__(self) -> str:
        return self._described(len(self.moments_.mean))


class SketchPCA(_Finder):
    r"""Principal components of a stream of wide rows in ``O(d k)`` memory: a Nystroem sketch of the
    covariance.

    Kept are the mean and :math:`Y = C\,\Omega`, where :math:`C` is the centred scatter matrix and
    :math:`\Omega` a fixed Gaussian test matrix with ``n_components + oversample`` columns. ``Y`` is
    linear in ``C``, so it is updated chunk by chunk and merged exactly; the components are those of
    the stabilised approximation :math:`Y (\Omega^T Y)^{-1} Y^T` (Tropp, Yurtsever, Udell and Cevher
    2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data",
    algorithm 3).

    One pass finds the leading directions where the spectrum falls. Where it is flat, a second pass
    from :meth:`next_pass` (subspace iteration) helps; :attr:`residual_` and :attr:`gaps_` say
    whether it is needed. A top-k subspace without a gap after k is not a property of the data.

    Args:
        n_components: how many directions, at most.
        oversample: extra columns of the test matrix; as many as components is a good default.
        probes: columns held out to estimate the residual.
        seed: of the test matrix. Finders can be merged only if they share it.

    Attributes:
        n_samples_seen_: rows seen.
    """

    def __init__(
        self, n_components: int = 64, oversample: int | None = None, probes: int = 16, seed: int = 0
    ) -> None:
        self.n_components = n_components
        self.oversample = oversample
        self.probes = probes
        self.seed = seed
        self._range: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.n_samples_seen_ = 0
        self._weight = 0.0
        self._mean = self._test = self._sketch = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, dtype=torch.float64)  # diagonal of the centred scatter
        self._found: tuple[Subspace, Tensor, float] | None = None

    @property
    def _energy(self) -> float:
        """Trace of the centred scatter."""
        return float(self._squares.sum())

    @property
    def _columns(self) -> int:
        return self.n_components + (
            self.n_components if self.oversample is None else self.oversample
        )

    def _start(self, width: int, device: torch.device) -> None:
        if self._range is not None and len(self._range) != width:
            raise WorkbenchError(
                f"the sketch is of rows of width {len(self._range)}; these have width {width}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        columns = min(self._columns, width)
        test = torch.linalg.qr(torch.randn(width, columns, generator=generator))[0]
        probes = torch.randn(width, self.probes, generator=generator)
        if self._range is not None:
            test = torch.linalg.qr(torch.cat([self._range.cpu(), test], dim=1)[:, :columns])[0]
        self._test = torch.cat([test, probes], dim=1).to(device)
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._mean)
        self._sketch = torch.zeros(width, self._test.shape[1], dtype=torch.float64, device=device)

    def partial_fit(
        self,
        X: Float[Tensor, "rows width"],
        y: Any = None,
        sample_weight: Real[Tensor, " rows"] | None = None,
    ) -> Self:
        """See ``X`` as well, each row ``sample_weight`` times."""
        rows, weights = checked_rows(X, sample_weight)
        total = float(len(rows)) if weights is None else float(weights.sum())
        if total == 0:
            return self
        if not len(self._mean):
            self._start(rows.shape[1], rows.device)
        if rows.shape[1] != len(self._mean):
            raise WorkbenchError(
                f"the sketch is of rows of width {len(self._mean)}; these have width "
                f"{rows.shape[1]}"
            )
        mean = rows.mean(0) if weights is None else (weights[:, None] * rows).sum(0) / total
        centred = rows - mean
        weighted = centred if weights is None else centred * weights[:, None]
        sketch = weighted.T @ (centred @ self._test.double())
        count = len(rows) if weights is None else int((weights > 0).sum())
        self._add(count, total, mean, sketch, (weighted * centred).sum(0))
        return self

    def merge(self, other: SketchPCA) -> Self:
        """Add everything that ``other`` has seen.

        Raises:
            WorkbenchError: it has another test matrix, so the two sketches cannot be added.
        """
        if not other.n_samples_seen_:
            return self
        alike = self.get_params() == other.get_params() and (self._range is None) == (
            other._range is None
        )
        if alike and self._range is not None and other._range is not None:
            alike = self._range.shape == other._range.shape and torch.equal(
                self._range, other._range.to(self._range)
            )
        if alike and not len(self._mean):
            self._mean, self._squares = (torch.zeros_like(other._mean) for _ in range(2))
            self._sketch, self._test = torch.zeros_like(other._sketch), other._test
        if (
            not alike
            or self._test.shape != other._test.shape
            or not torch.equal(self._test, other._test.to(self._test))
        ):
            raise WorkbenchError(
                "sketches can be merged only with the same seed, width, components, oversampling "
                "and pass"
            )
        self._add(other.n_samples_seen_, other._weight, other._mean, other._sketch, other._squares)
        return self

    def _add(
        self, count: int, weight: float, mean: Tensor, sketch: Tensor, squares: Tensor
    ) -> None:
        total = self._weight + weight
        shift, factor = mean.to(self._mean) - self._mean, self._weight * weight / total
        self._sketch += sketch.to(self._sketch)
        self._sketch.addr_(shift, shift @ self._test.double(), alpha=factor)
        self._squares += squares.to(self._squares) + factor * shift.square()
        self._mean += shift * (weight / total)
        self.n_samples_seen_ += count
        self._weight = total
        self._found = None

    def _solve(self) -> tuple[Subspace, Tensor, float]:
        if self._found is not None:
            return self._found
        if not self.n_samples_seen_:
            raise NotFittedError(
                "no row was seen; call fit or partial_fit, or look whether the position rule "
                "selects anything"
            )
        if not bool(torch.isfinite(self._sketch).all()):
            raise WorkbenchError("the rows hold NaN or infinity; no subspace was fitted")
        columns = self._test.shape[1] - self.probes
        test, probes = self._test[:, :columns].double(), self._test[:, columns:].double()
        sketch, image = (
            self._sketch[:, :columns] / self._weight,
            self._sketch[:, columns:] / self._weight,
        )
        width = len(self._mean)
        size = float(sketch.norm())
        if size == 0:
            vectors, values = (
                torch.zeros(width, 0, dtype=torch.float64, device=sketch.device),
                sketch.new_zeros(0),
            )
        else:
            mean_square = self._mean.square() + self._squares / self._weight
            vectors, values = _nystroem(sketch, test, size, mean_square)
        leading = vectors[:, : self.n_components]
        variances = values[: self.n_components]
        missed = image - leading @ (variances[:, None] * (leading.T @ probes))
        residual = (
            (float(missed.norm() / image.norm()) if float(image.norm()) else 0.0)
            if self.probes
            else float("nan")
        )
        subspace = Subspace(
            leading.float().cpu().contiguous(),
            variances.float().cpu(),
            self._mean.float().cpu(),
            self.n_samples_seen_,
            self._energy / self._weight,
            "",
            "",
            "",
            self.n_components,
        )
        # What comes after the last eigenvalue that the sketch can see is zero if it saw fewer than
        # it could, and unknown otherwise.
        beyond = 0.0 if len(values) < columns else float("nan")
        following = torch.cat([values[1 : self.n_components + 1], values.new_tensor([beyond])])[
            : len(variances)
        ]
        gaps = (
            ((variances - following) / variances.clamp(min=torch.finfo(torch.float64).tiny))
            .float()
            .cpu()
        )
        self._found = subspace, gaps, residual
        return self._found

    def subspace(self, **where: str) -> Subspace:
        """What was found, as a value; ``where`` may name ``site``, ``tokens`` and ``source``."""
        return self._solve()[0].named(**where)

    @property
    def residual_(self) -> float:
        """Estimate of ``||C - C_k||_F / ||C||_F``: the relative size of what the components miss,
        from probe vectors that the fit did not use.
        """
        return self._solve()[2]

    @property
    def gaps_(self) -> Float32[Tensor, " k"]:
        """Relative eigengaps ``(v_i - v_{i+1}) / v_i``. Where the last one is small, another sample
        would choose another last direction.
        """
        return self._solve()[1]

    def next_pass(self) -> SketchPCA:
        """An empty sketch whose test matrix is the range found so far: fit it on the same rows for
        a more exact answer (subspace iteration).
        """
        if not self.n_samples_seen_:
            raise NotFittedError("a further pass needs a first one; call fit or partial_fit")
        columns = self._test.shape[1] - self.probes
        refined = SketchPCA(self.n_components, self.oversample, self.probes, self.seed)
        refined._range = torch.linalg.qr(self._sketch[:, :columns])[0].float()
        return refined

    @property
    def nbytes(self) -> int:
        """Bytes held: linear in the width."""
        return sum(
            tensor.nbytes
            for tensor in (self._mean, self._squares, self._test, self._sketch, self._range)
            if tensor is not None
        )

    def __repr__(self) -> str:
        return self._described(len(self._mean))

    def _repr_html_(self) -> str:
        if not self.n_samples_seen_:
            return table("Sketch, no rows yet", ("components",), [(self.n_components,)])
        components, gaps, residual = self._solve()
        line = (
            components.rank,
            components.width,
            components.count,
            f"{float(components.eigenvalues.sum()) / components.total_variance if components.total_variance else 0:.1%}",  # noqa: E501
            f"{residual:.3g}",
            f"{float(gaps[-1]) if len(gaps) else 0:.3g}",
        )
        return table(
            "Sketch",
            (
                "components",
                "width",
                "rows",
                "variance inside",
                "residual of the covariance",
                "gap after the last",
            ),
            [line],
        )


def _nystroem(
    sketch: Tensor, test: Tensor, size: float, mean_square: Tensor
) -> tuple[Tensor, Tensor]:
    """Eigenvectors ``[width k]`` and eigenvalues ``[k]`` of ``Y (W^T Y)^+ Y^T``, shifted for
    stability; directions without variance are left out.
    """
    shift = torch.finfo(torch.float64).eps * size
    shifted = sketch + shift * test
    core = test.T @ shifted
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    keep = values > 4 * len(values) * shift  # what float64 can tell from zero
    half = shifted @ (vectors[:, keep] / values[keep].sqrt())
    left, singular, _ = torch.linalg.svd(half, full_matrices=False)
    eigenvalues = (singular.square() - shift).clamp(min=0)
    keep = eigenvalues > noise_floor(left, mean_square, float(eigenvalues[0]))
    return left[:, keep], eigenvalues[keep]


class EachSite:
    """A consumer that keeps one finder for every site: ``EachSite(lambda:
    SketchPCA(64))["blocks.3.mlp.out.hook_in"]``.

    Args:
        make: makes an empty finder.
    """

    def __init__(self, make: Callable[[], StreamingPCA | SketchPCA]) -> None:
        self._make = make
        self.by_site: dict[str, StreamingPCA | SketchPCA] = {}

    def __call__(self, site: Site, rows: Rows) -> None:
        """See the rows of one site."""
        if site.name not in self.by_site:
            self.by_site[site.name] = self._make()
        self.by_site[site.name].partial_fit(rows.values)

    def __getitem__(self, name: str) -> StreamingPCA | SketchPCA:
        """The finder of the site called ``name``.

        Raises:
            WorkbenchError: it delivered no rows.
        """
        if name not in self.by_site:
            raise WorkbenchError(
                f"no rows of {name!r}; there are rows of "
                f"{', '.join(list(self.by_site)[:4]) or 'no site'}"
            )
        return self.by_site[name]

    def _repr_html_(self) -> str:
        return table(
            "Finders",
            ("site", "finder"),
            ((name, repr(finder)) for name, finder in self.by_site.items()),
        )
