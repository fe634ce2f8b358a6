"""Write the pages that are lists of what is declared in code: ``python docs/reference.py``."""

from __future__ import annotations

from pathlib import Path

from workbench.metrics import ALONE, AXES, GROUPS, Metric
from workbench.metrics.declare import TOKEN, Where

DOCS = Path(__file__).parent

HEAD = """# Metrics

Every metric that a table may hold is declared once, in `workbench/metrics/`; adding an undeclared
one, or one along another axis, is an error. `workbench metrics` prints the list below, which
`make reference` writes from the declarations. *More* is what a larger value says, *itself* the
value for a model beside itself.

Single values are in `results.parquet`; values along an axis in `curves.parquet` (columns `axis` and
`x`), over a plane in `fields.parquet` (`y_axis` and `y` as well), at tokens in `tokens.parquet`
(`token` and `token_id`). Your own metric: [extending](extending.md)."""


def _place(place: Where) -> str:
    if isinstance(place, tuple):
        return " × ".join(f"`{axis}`" for axis in place)
    return {ALONE: "alone", TOKEN: "token"}.get(place, f"`{place}`")


def _row(metric: Metric) -> str:
    cells = (
        f"`{metric.name}`",
        metric.meaning,
        metric.unit or "–",
        metric.more or "–",
        "–" if metric.identity is None else f"{metric.identity:g}",
        ", ".join(map(_place, metric.where)),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def metrics_page() -> str:
    """The page of all metrics and axes."""
    lines = [HEAD]
    for title, group in GROUPS.items():
        lines += ["", f"## {title}", ""]
        lines += [
            "| metric | meaning | unit | more | itself | along |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(metric) for metric in group.DECLARED]
    lines += ["", "## Axes", "", "| axis | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in AXES.items()]
    return "\n".join(lines) + "\n"


PAGES = {"metrics.md": metrics_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(DOCS / name)
