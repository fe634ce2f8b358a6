"""Measure ours against the plain PyTorch floor and against peers, in turn in one process, and write
``bench.json``.

Every ratio is the median over rounds of (ours / other), all contestants measured back to back in
each round, in an order that is reversed every other round; with a 95 % bootstrap interval of the
median. One thread on a CPU. Nothing here asserts a time: the numbers are read, not enforced.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capture import SIZES, Case, Work, capture_cases
from methods import method_cases
from smoothing import smoothing_cases
from trigger_scan import scan_cases

from workbench.files import write_json
from workbench.progress import bar
from workbench.runs.jobs import cores


def _seconds(work: Work, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _times(case: Case, device: str) -> dict[str, np.ndarray]:
    """Seconds of every contestant in every round."""
    contestants = {"floor": case.floor, "ours": case.ours, **case.peers}
    for work in contestants.values():
        _seconds(work, device)  # warm up
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(case.rounds):
        order = list(contestants) if number % 2 else list(reversed(contestants))
        for name in order:
            found[name].append(_seconds(contestants[name], device))
    return {name: np.array(values) for name, values in found.items()}


def _median(ratios: np.ndarray) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draws = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return round(float(np.median(ratios)), 3), round(float(low), 3), round(float(high), 3)


def _entry(name: str, case: Case, device: str, machine: str) -> dict[str, Any]:
    times = _times(case, device)
    ratio, low, high = _median(times["ours"] / times["floor"])
    return {
        "name": name,
        "ratio_to_floor": ratio,
        "peers": {peer: _median(times["ours"] / times[peer])[0] for peer in case.peers},
        "peers_to_floor": {peer: _median(times[peer] / times["floor"])[0] for peer in case.peers},
        "n": case.rounds,
        "low": low,
        "high": high,
        "floor_seconds": round(float(np.median(times["floor"])), 4),
        "machine": machine,
    }


def main() -> None:
    """Measure every case and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; on a GPU only the capture cases run"
    )
    parser.add_argument(
        "--size", default="16M", choices=list(SIZES), help="of the model of the capture cases"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = (
        torch.cuda.get_device_name()
        if options.device != "cpu"
        else f"{platform.processor() or platform.machine()}, {cores()} cores, one thread"
    )
    machine = f"{where}, torch {torch.__version__}, {options.size} {options.dtype}"
    cases = capture_cases(options.size, options.device, getattr(torch, options.dtype))
    if options.device == "cpu":
        cases |= method_cases() | scan_cases() | smoothing_cases()
    cases = {name: case for name, case in cases.items() if not options.only or name in options.only}
    report, results = bar("benchmarks"), []
    for done, (name, case) in enumerate(cases.items(), 1):
        results.append(_entry(name, case, options.device, machine))
        write_json(
            options.out, results
        )  # after every case, so that an interrupted run keeps what it measured
        report(done, len(cases))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
