"""How the results of this package show themselves in a notebook: one small table, every text
escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(
    title: str, header: Sequence[str], lines: Iterable[Sequence[object]], limit: int = 40
) -> str:
    """An HTML table with a caption; long ones are cut, and say so."""
    rows = [list(map(str, line)) for line in lines]
    body = "".join(
        "<tr>"
        + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows[:limit]
    )
    more = (
        f"<tr><td colspan='{len(header)}'>… and {len(rows) - limit} more</td></tr>"
        if len(rows) > limit
        else ""
    )
    head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in header)
    return (
        "<table><caption "
        f"style='text-align:left'>{escape(title)}</caption><tr>{head}</tr>{body}{more}</table>"
    )
