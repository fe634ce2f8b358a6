"""Measure ours against the plain PyTorch floor, pairwise in one process, and write ``bench.json``.

Every ratio is the median over pairs of (ours / floor), each pair measured back to back in alternating order, with a 95 % bootstrap interval of the median. One
thread. Nothing here asserts a time: the numbers are read, not enforced.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hooks import Capture, Moments, resolve
from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy
from workbench.experiments.jobs import cores
from workbench.files import write_json
from workbench.progress import bar
from workbench.sharpness.curvature import extremes
from workbench.sharpness.slices import loss_slice, mean_loss, random_direction
from workbench.subspaces.collapse import find_collapse, only_tokens
from workbench.subspaces.subspace import principal_subspace
from workbench.unlearning.objectives import Objective, Pair, npo, retain_cross_entropy
from workbench.unlearning.smoothing import plain, sam


def _model() -> PreTrainedModel:
    shape = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(shape).eval()


def _batch(rows: int, length: int, seed: int) -> Batch:
    ids = torch.randint(3, 2048, (rows, length), generator=torch.Generator().manual_seed(seed))
    ones, none = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    target = ones.bool().clone()
    target[:, 0] = False
    return Batch(ids, ones, none, none, target, tuple(map(str, range(rows))))


def _ratio(ours: Callable[[], object], floor: Callable[[], object], pairs: int) -> np.ndarray:
    ours(), floor()  # warm up

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    found = []
    for number in range(pairs):
        if number % 2:
            mine, other = seconds(ours), seconds(floor)
        else:
            other, mine = seconds(floor), seconds(ours)
        found.append(mine / other)
    return np.array(found)


def _cases() -> dict[str, tuple[Callable[[], object], Callable[[], object], int]]:
    model, batch = _model(), _batch(8, 128, 0)
    other = _batch(8, 128, 1)
    residual = resolve(model, "blocks.*.hook_resid_post")
    paths = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(6) for name in ("gate", "up", "down")]
    linears = resolve(model, [f"{path}:{side}" for path in paths for side in ("in", "grad_out")])

    @torch.no_grad()
    def forward() -> None:
        model(**batch.inputs, use_cache=False)

    @torch.no_grad()
    def captured_forward() -> None:
        with Capture(model, residual, lambda site, rows: None) as capture:
            capture.at(batch.content_mask)
            model(**batch.inputs, use_cache=False)

    def step() -> None:
        model.zero_grad()
        cross_entropy(model, batch).backward()

    def captured_step() -> None:
        model.zero_grad()
        with Capture(model, linears, lambda site, rows: None) as capture:
            capture.at(batch.content_mask)
            cross_entropy(model, batch).backward()

    rows = torch.randn(8192, 2048)

    def covariance_pca() -> None:
        torch.linalg.eigh(torch.cov(rows.T))

    def streaming_pca() -> None:
        moments = Moments()
        for chunk in rows.split(1024):
            moments.update(chunk)
        principal_subspace(moments, 64)

    objective, reference = Objective(npo(0.1), retain_cross_entropy), copy.deepcopy(model)
    pair = Pair(batch, other)

    def plain_step() -> None:
        model.zero_grad()
        plain(model, objective, pair, reference)

    def sam_step() -> None:
        model.zero_grad()
        sam(0.01)(model, objective, pair, reference)

    collapse = find_collapse(model, paths, lambda b: cross_entropy(model, b), [batch], activation_components=24, gradient_components=36)
    parameters = dict(model.named_parameters())

    def collapsed_step() -> None:
        model.zero_grad()
        with only_tokens(model, paths, batch.content_mask):
            cross_entropy(model, batch).backward()
        for name, change in collapse.items():
            gradient = parameters[name].grad
            assert gradient is not None
            gradient.copy_(change(gradient))

    direction = random_direction(model, 0)

    return {
        "capture-residual-forward": (captured_forward, forward, 21),
        "capture-mlp-forward-backward": (captured_step, step, 15),
        "pca-2048": (streaming_pca, covariance_pca, 5),
        "cir-step": (collapsed_step, step, 15),
        "sam-step": (sam_step, plain_step, 9),
        "slice-point": (lambda: loss_slice(model, direction, [0.01], {"loss": [batch]}), lambda: mean_loss(model, [batch]), 21),
        "top-eigenvalue": (lambda: extremes(model, [batch], tolerance=0.05), step, 3),
    }


def main() -> None:
    """Measure every case and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--only", nargs="*", help="names of cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.processor() or platform.machine()}, {cores()} cores, one thread, torch {torch.__version__}"
    cases = {name: case for name, case in _cases().items() if not options.only or name in options.only}
    report, results = bar("benchmarks"), []
    rng = np.random.default_rng(0)
    for done, (name, (ours, floor, pairs)) in enumerate(cases.items(), 1):
        ratios = _ratio(ours, floor, pairs)
        medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        ratio = round(float(np.median(ratios)), 3)
        results.append(
            {"name": name, "ratio_to_floor": ratio, "peers": {}, "n": pairs, "low": round(float(low), 3), "high": round(float(high), 3), "machine": machine}
        )
        report(done, len(cases))
    write_json(options.out, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
