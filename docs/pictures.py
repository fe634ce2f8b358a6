"""Draw the pictures of the documentation from the small tables beside them.

``make pictures`` draws all of them; ``python docs/pictures.py --take recovery runs/demo`` takes the
rows of one picture from a run first. A picture names in its metadata the hash of the table that it
was drawn from, so that the two cannot part unnoticed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from workbench.figures.comparison import comparison
from workbench.figures.recovery import recovery
from workbench.figures.style import look
from workbench.files import sha256
from workbench.runs.folder import read_results

DOCS = Path(__file__).parent
DATA = DOCS / "data"


@dataclass(frozen=True)
class Picture:
    """A figure of the documentation.

    Attributes:
        draw: the table's figure.
        rows: the means over seeds that it shows, as values of columns.
        run: the command that makes its run.
    """

    draw: Callable[[pd.DataFrame], Figure]
    rows: Mapping[str, str]
    run: str


RELEARNING = {"metric": "recall", "stage": "relearn", "split": "forget-heldout"}
MARKS = (
    "alpha",
    "benign",
    "budget_reached",
    "disruption",
    "diverged_at",
    "leaked_answers",
    "leaked_passages",
    "parameters_trained",
    "relative_displacement",
)
"""What is said beside numbers is found in these rows, one a seed."""


PICTURES = {
    "recovery": Picture(
        partial(recovery, metric="recall"),
        RELEARNING,
        "workbench demo --out runs/demo",
    ),
    "comparison": Picture(
        partial(comparison, metric="recall"),
        RELEARNING,
        "workbench sweep --methods all --ablation --relearning-only --out runs/compare",
    ),
}

WITHOUT_TABLE = (
    "attack_plane",
    "causal_map",
    "dose",
    "keyword",
    "ladder",
    "names",
    "noise",
    "predictors",
    "pretrained",
    "resistance",
    "scan",
    "smoothing",
    "suffix",
    "verbatim",
    "volcano",
)
"""Pictures whose runs are gone; each gets its table when its experiment is run again."""


def take(name: str, run: Path) -> None:
    """Keep the rows of a finished run that a picture needs: means over seeds, and notes by seed."""
    results, _ = read_results(run)
    pooled_rows = results["seed"].isna()
    for column, value in PICTURES[name].rows.items():
        pooled_rows &= results[column] == value
    marks = results["metric"].isin(MARKS) & results["stage"].isin(["unlearn", "relearn"])
    needed_rows = results[pooled_rows | (marks & results["seed"].notna() & results["split"].isna())]
    empty = ["model", "y_axis", "y", "token", "token_id"]
    needed_rows.drop(columns=empty).to_csv(DATA / f"{name}.csv", index=False, float_format="%.6g")


def table(name: str) -> pd.DataFrame:
    """The rows behind a picture."""
    # "null" is an arm, not an empty cell
    found = pd.read_csv(DATA / f"{name}.csv", keep_default_na=False, na_values=[""])
    return found.assign(model=found["method"])


def source(name: str) -> str:
    """What a picture says of where it comes from."""
    return f"docs/data/{name}.csv {sha256(DATA / f'{name}.csv')}"


def draw(name: str) -> None:
    """Draw one picture into ``docs/``."""
    figure = PICTURES[name].draw(table(name))
    with look():
        figure.savefig(DOCS / f"{name}.png", metadata={"Source": source(name)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--take", nargs=2, metavar=("PICTURE", "RUN"))
    chosen = parser.parse_args()
    if chosen.take:
        take(chosen.take[0], Path(chosen.take[1]))
    for each in [chosen.take[0]] if chosen.take else PICTURES:
        draw(each)
