"""How often the two-level bootstrap's 95 % interval covers the truth, by number of seeds: ``python
tests/benchmarks/coverage.py``.

Two methods without a difference, 40 facts; a fact is recalled with probability ``sigmoid(fact +
seed)``, both normal, the seed's part drawn anew for each method. The truth is 0.
"""

from __future__ import annotations

import argparse

import numpy as np

from workbench.evaluation.statistics import bootstrap


def covered(seeds: int, spread: float, tables: int, facts: int = 40) -> float:
    """Share of simulated tables whose interval holds 0."""
    rng = np.random.default_rng([seeds, int(100 * spread)])
    held = 0
    for _ in range(tables):
        fact = rng.normal(0, 1.5, facts)
        methods = []
        for _ in range(2):
            logit = fact + rng.normal(0, spread, (seeds, 1))
            methods.append((rng.random((seeds, facts)) < 1 / (1 + np.exp(-logit))).astype(float))
        found = bootstrap(methods[0] - methods[1])
        held += found.low <= 0 <= found.high
    return held / tables


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=400)
    tables = parser.parse_args().tables
    print("spread between seeds (logit) |", *(f"{seeds} seeds |" for seeds in (2, 3, 5, 10)))
    for spread in (0.15, 0.5, 1.2):
        shares = [covered(seeds, spread, tables) for seeds in (2, 3, 5, 10)]
        print(f"{spread} |", *(f"{100 * share:.0f} % |" for share in shares))
