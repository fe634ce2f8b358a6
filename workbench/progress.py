"""Progress of long steps: a bar in a terminal or notebook, nothing, or a file that another process
turns into a bar.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

ProgressCallback = Callable[[int, int], None]
"""``report(done, total)``, called after every unit of work; ``done == total`` ends it."""


def quiet(done: int, total: int) -> None:
    """Show nothing."""


def bar(label: str) -> ProgressCallback:
    """A progress bar on standard error (a widget in notebooks), opened at the first report and
    closed at the last.
    """
    state: list[Any] = []

    def report(done: int, total: int) -> None:
        if not state:
            state.append(tqdm(total=total, desc=label, dynamic_ncols=True, leave=True))
        state[0].update(done - state[0].n)
        if done >= total:
            state[0].close()

    return report


def to_file(path: Path) -> ProgressCallback:
    """Write ``done total`` into a small file; for work in another process (see ``runs.jobs``)."""

    def report(done: int, total: int) -> None:
        try:
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(f"{done} {total}")
            os.replace(temporary, path)
        except OSError:
            pass  # a progress display must never stop the work

    return report
