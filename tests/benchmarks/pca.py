"""Rows per second of the exact finder beside scikit-learn's IncrementalPCA, and how far both are
from a float64 reference.

``python tests/benchmarks/pca.py --rows 200000 --width 2048``: several minutes, most of them
scikit-learn's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.decomposition import IncrementalPCA
from torch import Tensor

from workbench.subspaces.finders import StreamingPCA


def chunks(rows: int, width: int, size: int) -> Iterator[Tensor]:
    """Rows with a decaying spectrum and a mean, float32, drawn anew each time from one seed;
    drawing is not timed.
    """
    scales = torch.logspace(0, -2, width)
    for start in range(0, rows, size):
        generator = torch.Generator().manual_seed(start)
        yield torch.randn(min(size, rows - start), width, generator=generator) * scales + 1


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = 5 * arguments.width  # IncrementalPCA's own default
    ours, theirs = StreamingPCA(arguments.components), IncrementalPCA(arguments.components)
    second, gram, total = (
        np.zeros(2),
        torch.zeros(arguments.width, arguments.width, dtype=torch.float64),
        torch.zeros(arguments.width, dtype=torch.float64),
    )
    for chunk in chunks(arguments.rows, arguments.width, size):
        for number, fit in enumerate(
            (lambda c: ours.partial_fit(c), lambda c: theirs.partial_fit(c.numpy()))
        ):
            start = time.perf_counter()
            fit(chunk)
            second[number] += time.perf_counter() - start
        gram += chunk.double().T @ chunk.double()
        total += chunk.double().sum(0)
    start = time.perf_counter()
    values = ours.subspace().eigenvalues
    second[0] += time.perf_counter() - start
    exact = (gram - torch.outer(total, total) / arguments.rows) / (arguments.rows - 1)
    reference = torch.linalg.eigvalsh(exact).flip(0)[: arguments.components]

    def error(found: Tensor) -> float:
        return float(
            ((found.double() / found.double().sum()) / (reference / reference.sum()) - 1)
            .abs()
            .max()
        )

    print(
        json.dumps(
            {
                "rows": arguments.rows,
                "width": arguments.width,
                "components": arguments.components,
                "threads": arguments.threads,
                "seconds": {"ours": round(second[0], 1), "scikit-learn": round(second[1], 1)},
                "ratio": round(second[1] / second[0], 1),
                "largest relative error of an eigenvalue's share": {
                    "ours": error(values),
                    "scikit-learn": error(torch.from_numpy(theirs.explained_variance_)),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
