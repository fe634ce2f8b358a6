"""Run independent jobs in worker processes, one thread each, with a progress bar per running job.

One thread per job, whatever the machine: the same configuration then gives the same table on 2
cores and on 64.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from workbench import progress, registry
from workbench.files import sweep
from workbench.progress import ProgressCallback, to_file
from workbench.watch import watch

PROGRESS = "workbench-progress-"

Job = Callable[[ProgressCallback], None]
"""A picklable function of a progress report."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Restrict torch to one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _run(
    name: str, job: Job, progress_file: Path, main: int, entries: Mapping[str, Mapping[str, object]]
) -> str:
    # pandas, joblib and transformers are imported once per worker; warnings of a worker would only
    # be repeated on the screen
    if main != os.getpid():
        registry.take(entries)
    with one_thread():
        job(to_file(progress_file))
    return name


class _Display(threading.Thread):
    """Draws the progress files of running jobs in a terminal; elsewhere (a log, a notebook) counts
    finished jobs.
    """

    def __init__(self, label: str, names: list[str], folder: Path) -> None:
        super().__init__(daemon=True)
        self.label, self.names, self.folder, self.done = label, names, folder, set[str]()
        self.stop_request = threading.Event()
        console = Console(stderr=True, force_jupyter=False)
        notebook = "ipykernel" in sys.modules
        self.live = console.is_terminal and not notebook
        self.bar = progress.bar(label) if notebook else None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.total = self.progress.add_task(label, total=len(names))
        self.bars: dict[str, TaskID] = {}

    def run(self) -> None:
        if not self.live:
            return
        with self.progress:
            while not self.stop_request.wait(0.3):
                self._draw()
            self._draw()

    def _draw(self) -> None:
        self.progress.update(self.total, completed=len(self.done))
        for name in self.names:
            if name in self.done:
                if name in self.bars:
                    self.progress.remove_task(self.bars.pop(name))
                continue
            try:
                done, total = map(int, (self.folder / name).read_text().split())
            except (OSError, ValueError):
                continue
            if name not in self.bars:
                self.bars[name] = self.progress.add_task(f"  {name}", total=total)
            self.progress.update(self.bars[name], completed=done, total=total)

    def finished(self, name: str) -> None:
        """Count a finished job."""
        self.done.add(name)
        if self.bar is not None:
            self.bar(len(self.done), len(self.names))
        elif not self.live:  # a log file gets one line per finished job
            print(
                f"{self.label}: {len(self.done)}/{len(self.names)} {name}",
                file=sys.stderr,
                flush=True,
            )


def run_jobs(label: str, jobs: Mapping[str, Job], *, workers: int | None = None) -> None:
    """Run every job; the first error ends all and is raised.

    Args:
        label: shown above the bars.
        jobs: name to job. Names must be usable as file names.
        workers: processes; default is one per core. With one, everything runs in this process.
    """
    if not jobs:
        return
    count = min(workers or cores(), len(jobs))
    sweep(Path(tempfile.gettempdir()), PROGRESS)
    folder = Path(tempfile.mkdtemp(prefix=f"{PROGRESS}{os.getpid()}."))
    display = _Display(label, list(jobs), folder)
    display.start()
    try:
        main, entries = os.getpid(), registry.added()
        tasks = (
            delayed(_run)(name, job, folder / name, main, entries) for name, job in jobs.items()
        )
        watched = {"initializer": watch, "initargs": (main,)} if count > 1 else {}
        for name in Parallel(
            n_jobs=count,
            return_as="generator_unordered",
            batch_size=1,
            pre_dispatch=count,
            **watched,
        )(tasks):
            display.finished(name)
    except BaseException:
        if count > 1:  # workers that go on would write into a folder that nobody watches any more
            get_reusable_executor().shutdown(wait=False, kill_workers=True)
        raise
    finally:
        display.stop_request.set()
        display.join(timeout=5)
        shutil.rmtree(folder, ignore_errors=True)
