"""Sharpness beside its peers, on one model and one batch: the top Hessian eigenvalue to 1e-3
(PyHessian, hessian-eigenthings) and a plane of losses (loss-landscapes).

``python tests/benchmarks/sharpness.py``; the peers, which bring torchvision along otherwise: ``pip
install --no-deps PyHessian hessian-eigenthings loss-landscapes``. One thread, a Llama of a million
parameters that was trained for 60 steps on 16 texts of 64 tokens. Memory is the peak of the
process, in a process of its own per work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capture import Case
from smoothing import _batch, _model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy
from workbench.sharpness.curvature import Curvature, outer_eigenvalue
from workbench.sharpness.planes import loss_plane
from workbench.sharpness.slices import loss_slice, mean_loss, random_direction

TOLERANCE = 1e-3
POINTS = 7


def trained() -> tuple[Any, Batch]:
    """The model and its texts; random weights have no eigenvalue that stands apart."""
    model, batch = _model(torch.float32), _batch(16, 64, 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(model, batch).backward()
        optimiser.step()
    model.zero_grad()
    return model, batch


class _Logits(nn.Module):
    """What PyHessian and loss-landscapes call: ids in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def _pyhessian(model: Any, batch: Batch) -> float:
    from pyhessian import hessian

    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        found = hessian(
            _Logits(model),
            nn.CrossEntropyLoss(),
            data=(batch.input_ids, batch.input_ids[:, 1:].flatten()),
            cuda=False,
        )
        value = float(found.eigenvalues(maxIter=400, tol=TOLERANCE)[0][0])
    model.zero_grad()
    return value


def _eigenthings(model: Any, batch: Batch, steps: int) -> tuple[float, float]:
    from hessian_eigenthings import HessianOperator, hf_lm_loss, lanczos

    data = [{"input_ids": batch.input_ids, "labels": batch.input_ids}]
    with sdpa_kernel(SDPBackend.MATH):
        found = lanczos(
            HessianOperator(model, data, hf_lm_loss()),
            k=1,
            max_iter=steps,
            tol=TOLERANCE,
            which="LA",
            seed=0,
        )
    return float(found.eigenvalues[0]), float(found.residuals[0])


def _landscape(model: Any, batch: Batch) -> None:
    from loss_landscapes import random_plane
    from loss_landscapes.metrics import Loss

    targets = batch.input_ids[:, 1:].flatten()
    with torch.no_grad():
        random_plane(
            _Logits(model),
            Loss(nn.CrossEntropyLoss(), batch.input_ids, targets),
            distance=20,
            steps=POINTS,
            normalization="filter",
            deepcopy_model=True,
        )


def _step(model: Any, batch: Batch) -> None:
    cross_entropy(model, batch).backward()
    model.zero_grad()


def _enough_steps(model: Any, batch: Batch) -> int:
    """The fewest Lanczos steps, in fives, whose residual is below the tolerance: the peer's own
    default of two is no answer.
    """
    for steps in range(5, 200, 5):
        value, residual = _eigenthings(model, batch, steps)
        if residual <= TOLERANCE * abs(value):
            return steps
    return 200


def cases(rounds: int = 7) -> tuple[dict[str, Case], dict[str, float]]:
    """Works to be timed, and what the contestants for the eigenvalue find."""
    model, batch = trained()
    steps = _enough_steps(model, batch)
    end = outer_eigenvalue(model, [batch], tolerance=TOLERANCE)
    found = {
        "ours": end.value,
        "ours, residual": end.residual,
        "ours, products": float(end.products),
        "PyHessian": _pyhessian(model, batch),
        "hessian-eigenthings": _eigenthings(model, batch, steps)[0],
        "hessian-eigenthings, steps": float(steps),
    }
    operator, parts = Curvature(model, [batch]), _in_parts(batch)
    vector = np.random.default_rng(0).standard_normal(operator.size)
    first, second = random_direction(model, 0), random_direction(model, 1)
    places = np.linspace(-0.05, 0.05, POINTS).tolist()
    texts = {"loss": [batch]}
    return {
        "top-eigenvalue": Case(
            lambda: outer_eigenvalue(model, [batch], tolerance=TOLERANCE),
            lambda: _step(model, batch),
            rounds,
            {
                "PyHessian": lambda: _pyhessian(model, batch),
                "hessian-eigenthings": lambda: _eigenthings(model, batch, steps),
            },
        ),
        "top-eigenvalue, 1 row a batch": Case(
            lambda: outer_eigenvalue(model, parts, tolerance=TOLERANCE),
            lambda: outer_eigenvalue(model, [batch], tolerance=TOLERANCE),
            rounds,
        ),
        "hessian-vector-product": Case(
            lambda: operator.product(vector), lambda: _step(model, batch), 3 * rounds
        ),
        "slice-point": Case(
            lambda: loss_slice(model, first, places, texts),
            lambda: [mean_loss(model, [batch]) for _ in places],
            3 * rounds,
        ),
        "plane": Case(
            lambda: loss_plane(model, first, second, places, places, texts),
            lambda: [mean_loss(model, [batch]) for _ in range(POINTS**2)],
            rounds,
            {"loss-landscapes": lambda: _landscape(model, batch)},
        ),
    }, found


def _in_parts(batch: Batch, rows: int = 1) -> list[Batch]:
    masks = (
        batch.input_ids,
        batch.attention_mask,
        batch.answer_mask,
        batch.subject_mask,
        batch.target_mask,
    )
    return [
        Batch(*(part[at : at + rows] for part in masks), batch.items[at : at + rows])
        for at in range(0, batch.size, rows)
    ]


WORKS = ("step", "eigenvalue", "eigenvalue, 1 row a batch", "slice", "plane")


def _memory(field: str) -> float:
    """Of this process (``getrusage`` would give the peak of the one that started it), MiB."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    ]
    return int(line.split()[1]) / 1024


def peak(work: str) -> None:
    """Do one thing on untrained weights and 16 texts of 256 tokens, and print how far the process's
    memory rose above what the model takes, MiB.
    """
    model, batch = _model(torch.float32), _batch(16, 256, 0)
    model(
        input_ids=batch.input_ids[:1, :8]
    )  # what the first pass of a process sets up is nobody's memory
    before = _memory("VmRSS")
    if work == "step":
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        cross_entropy(model, batch).backward()
        optimiser.step()
    elif work.startswith("eigenvalue"):
        outer_eigenvalue(
            model, [batch] if work == "eigenvalue" else _in_parts(batch), tolerance=0.1
        )
    else:
        places = np.linspace(-0.05, 0.05, POINTS).tolist()
        if work == "slice":
            loss_slice(model, random_direction(model, 0), places, {"loss": [batch]})
        else:
            loss_plane(
                model,
                random_direction(model, 0),
                random_direction(model, 1),
                places,
                places,
                {"loss": [batch]},
            )
    print(json.dumps({"rise": round(_memory("VmHWM") - before, 1)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=WORKS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        peak(arguments.peak)
        sys.exit()
    from run import _median, _times

    works, values = cases(arguments.rounds)
    print(json.dumps(values, indent=1))
    for name, case in works.items():
        times = _times(case, "cpu")
        floor, *peers = [_median(times["ours"] / times[other]) for other in ("floor", *case.peers)]
        print(
            f"{name:24s}{floor[0]:7.2f} of the floor [{floor[1]:.2f}, {floor[2]:.2f}]; "
            + "; ".join(
                f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] of {other}"
                for other, ratio in zip(case.peers, peers, strict=True)
            )
        )
    for work in WORKS:
        told = subprocess.run(
            [sys.executable, __file__, "--peak", work], capture_output=True, text=True, check=True
        )
        print(work, told.stdout.strip().splitlines()[-1])
