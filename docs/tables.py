"""Write the tables of the result pages from small files that were taken from runs.

``make reference`` writes all of them; ``python docs/tables.py --take demo runs/demo`` takes what a
page shows from a run first. A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench.claims import CLAIMS
from workbench.figures.style import title
from workbench.metrics import RECALL
from workbench.report import summary_table
from workbench.runs.folder import CLAIMS_FILE, read_results

DOCS = Path(__file__).parent
DATA = DOCS / "data"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of a page."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def demo_claims() -> str:
    """Verdicts of the demo that were measured, the supported ones first."""
    verdicts = json.loads((DATA / "demo-claims.json").read_text(encoding="utf-8"))
    order = ("supported", "contradicted", "inconclusive", "equivalent")
    rows = []
    for verdict in sorted(
        (each for each in verdicts if each["verdict"] in order),
        key=lambda each: order.index(each["verdict"]),
    ):
        claim = CLAIMS[verdict["id"]]
        effect = _interval(verdict["effect"], verdict["low"], verdict["high"], "+")
        rows.append((f"`{claim.id}`: {claim.statement}", verdict["verdict"], effect, claim.unit))
    return markdown(("claim", "verdict", "effect [95 %]", "unit"), rows)


def demo_models() -> str:
    """The summary of the demo's models."""
    table = pd.read_csv(DATA / "demo-models.csv", keep_default_na=False)
    return markdown(list(table.columns), table.itertuples(index=False))


def comparison_recall() -> str:
    """Recall before and after the attack, the least recalled after it first."""
    # "null" is an arm, not an empty cell
    rows = pd.read_csv(DATA / "comparison.csv", keep_default_na=False, na_values=[""])
    curves = RECALL.rows(rows, stage="relearn", split="forget-heldout", arm="attack", seed=None)
    ends = {
        str(method): (curve.iloc[0], curve.iloc[-1])
        for method, curve in curves.sort_values("x").groupby("method")
    }
    lines = [
        (title(method), *(_interval(end["value"], end["low"], end["high"]) for end in both))
        for method, both in sorted(ends.items(), key=lambda item: item[1][1]["value"])
    ]
    return markdown(("model", "held-out recall before", "after the attack"), lines)


@dataclass(frozen=True)
class Block:
    """A table of a page.

    Attributes:
        page: below ``docs/``.
        write: makes it.
    """

    page: str
    write: Callable[[], str]


BLOCKS = {
    "demo-claims": Block("results/demo.md", demo_claims),
    "demo-models": Block("results/demo.md", demo_models),
    "comparison-recall": Block("results/comparison.md", comparison_recall),
}


def take_demo(run: Path) -> None:
    """Keep what the page of the demo shows."""
    claims = (run / CLAIMS_FILE).read_text(encoding="utf-8")
    (DATA / "demo-claims.json").write_text(claims.rstrip() + "\n", encoding="utf-8")
    summary_table(read_results(run)[0]).to_csv(DATA / "demo-models.csv", index=False)


TAKE = {"demo": take_demo}


def rendered(page: str) -> str:
    """A page with its tables as they are written today."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, block in BLOCKS.items():
        if block.page == page:
            start, end = f"<!-- table {name} -->\n", "<!-- end -->"
            pattern = re.escape(start) + ".*?" + re.escape(end)
            made = f"{start}\n{block.write()}\n\n{end}"
            text, count = re.subn(pattern, lambda _, made=made: made, text, flags=re.S)
            if count != 1:
                raise ValueError(f"{page} has {count} places for the table {name}; it needs one")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--take", nargs=2, metavar=("PAGE", "RUN"))
    given = parser.parse_args()
    if given.take:
        TAKE[given.take[0]](Path(given.take[1]))
    for each in sorted({block.page for block in BLOCKS.values()}):
        (DOCS / each).write_text(rendered(each), encoding="utf-8")
        print(DOCS / each)
