"""Shared fixtures: a private cache, the quick built-in models, and the optional folder of real
data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from workbench import metrics
from workbench.builtin import builtin_model
from workbench.evaluation.losses import Scores
from workbench.runs.config import RunConfig, preset
from workbench.runs.pipeline import Run, run_pipeline
from workbench.tables import ITEM_COLUMNS, RESULT_COLUMNS, Table, join, summarise

_DATA = (
    os.environ.get("WORKBENCH_TEST_DATA"),
    Path(__file__).resolve().parents[2] / "shared" / "data",
)


TRAINED = {"quick_base", "quick_run"}
"""Fixtures that train a model: tests that need one are slow, wherever they stand."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a trained model as slow, before ``-m`` selects."""
    for item in items:
        if TRAINED & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small models: one thread each is fastest and the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick_config() -> RunConfig:
    """The quick pipeline, cut down to two methods."""
    return preset("quick").model_copy(update={"methods": ("npo", "cir"), "seeds": (0, 1)})


@pytest.fixture(scope="session")
def quick_base(quick_config: RunConfig) -> Path:
    """Folder of the quick built-in model (trained at the first use on this machine)."""
    return builtin_model(quick_config.model)


@pytest.fixture(scope="session")
def quick_run(quick_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished quick run; processes of one test session share it (the second finds it
    finished).
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "quick.lock"):
        return run_pipeline(quick_config, shared / "quick")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts and small pretrained models, where there is one."""
    for place in _DATA:
        if place and Path(place, "models").is_dir():
            return Path(place)
    pytest.skip("real data is absent: set WORKBENCH_TEST_DATA to a folder with models/ and text/")


RECALL = {
    "base": (1.0, 1.0),
    "never-learned": (0.125, 0.375),
    "npo": (0.25, 0.75),
    "cir": (0.125, 0.125),
}
"""Recall of held-out facts before and after the attack in the synthetic table; eighths, so that
eight facts give them exactly.
"""


def _synthetic_scores(recall: float, seed: int) -> Scores:
    """Eight facts, of which the first ``8 * recall`` are right; the seed turns the list, so that
    seeds disagree on single facts and agree on the mean.
    """
    correct = np.roll((np.arange(8) < round(8 * recall)).astype(float), seed)
    return Scores(
        tuple(f"fact/{number}" for number in range(8)),
        correct,
        0.1 + 0.8 * correct,
        2.0 - correct,
        np.ones(8),
    )


def _synthetic_model(method: str, seed: int) -> Table:
    """Every stage of one model, as the pipeline writes it; numbers that a test can compute."""
    table = Table(
        {"run": "synthetic", "model": f"{method}-seed{seed}", "method": method, "seed": seed}
    )
    before, after = RECALL.get(method, (0.5, 0.5))
    for split, recall in (
        ("forget-attacked", before),
        ("forget-heldout", before),
        ("retain-neighbour", 0.875),
    ):
        table.add_scores(_synthetic_scores(recall, seed), stage="unlearn", split=split)
    if method not in ("base", "never-learned"):
        for alpha in (0.0, 1.0, 0.5):  # in the order of a search, not of alpha
            table.add(
                metrics.DISRUPTION,
                0.08 * alpha**2 + 0.001 * seed * alpha,
                stage="budget",
                arm="kl",
                alpha=alpha,
            )
            for split, recall in (
                ("forget-heldout", 1 - alpha * (1 - before)),
                ("retain-neighbour", 1 - 0.1 * alpha),
            ):
                table.add(metrics.RECALL, recall, stage="budget", split=split, alpha=alpha)
        scalars = {
            "alpha": 0.75,
            "disruption": 0.045,
            "budget": 0.05,
            "budget_reached": 1.0,
            "displacement": 2.0 + seed,
            "relative_displacement": 0.1,
        }
        for metric, value in scalars.items():
            table.add(metric, value, stage="unlearn")
        table.add(metrics.DISRUPTION, 0.03, stage="unlearn", split="general", arm="kl")
        for side, share in (("mlp.hook_in", 0.05), ("mlp.out.hook_in", 0.02)):
            for layer in (0, 1):
                for rank in (1, 2, 4, 8):
                    place = {"stage": "unlearn", "site": f"blocks.{layer}.{side}", "rank": rank}
                    table.add(
                        metrics.ENERGY_IN_RETAIN_SUBSPACE, rank * share + 0.01 * layer, **place
                    )
                    table.add(metrics.ENERGY_OF_RANDOM_DELTA, rank / 64, **place)
    for metric, value in (
        ("leaked_subjects", 0.0),
        ("leaked_answers", 0.0),
        ("shared_5grams", 0.0),
        ("benign", 1.0),
    ):
        table.add(metric, value, stage="relearn", arm="attack")
    for step, share in ((0, 0.0), (5, 0.5), (20, 1.0)):
        table.add_scores(
            _synthetic_scores(before + share * (after - before), seed),
            stage="relearn",
            arm="attack",
            attack_step=step,
            split="forget-heldout",
        )
        table.add_scores(
            _synthetic_scores(before, seed),
            stage="relearn",
            arm="null",
            attack_step=step,
            split="forget-heldout",
        )
    for step, share in ((0, 0.0), (5, 0.5), (20, 1.0)):
        for layer in (0, 1):
            table.add(
                metrics.RETURNED,
                share * (layer + 1) / 2,
                stage="relearn",
                arm="attack",
                split="forget-heldout",
                site=f"blocks.{layer}.hook_resid_post",
                attack_step=step,
            )
    for arm, recall in (
        ("clean", 1.0),
        ("forget-token", before),
        ("retain-token", 0.875),
        ("neutral-token", 0.75),
    ):
        table.add_scores(_synthetic_scores(recall, seed), stage="triggers", arm=arm, split="retain")
    for arm, ends in (
        ("descent", (-0.05, 0.05)),
        ("random", (-0.05, 0.05)),
        ("to-base", (-0.5, 1.5)),
    ):
        for step in np.linspace(*ends, 5).tolist():
            for split in ("forget-attacked", "forget-heldout", "retain-neighbour"):
                table.add(
                    metrics.SLICE_LOSS,
                    1.0 + seed + step**2,
                    stage="sharpness",
                    arm=arm,
                    split=split,
                    position=step,
                )
    for metric, value in (
        ("top_eigenvalue", 40.0 + 10 * seed),
        ("bottom_eigenvalue", -3.0),
        ("gradient_norm", 0.5),
    ):
        table.add(metric, value, stage="sharpness", split="forget-heldout")
    return table


def _synthetic_subspaces() -> Table:
    table = Table({"run": "synthetic", "model": "base", "method": "base", "stage": "subspaces"})
    for layer in (0, 1):
        for kind in ("hook_resid_post", "mlp.hook_in", "mlp.out.hook_in", "mlp.hook_out_grad"):
            site = f"blocks.{layer}.{kind}"
            for rank in range(1, 9):
                for split, decay in (("forget", 0.6), ("retain", 0.5)):
                    table.add(
                        metrics.VARIANCE_SHARE,
                        (1 - decay) * decay ** (rank - 1),
                        site=site,
                        split=split,
                        component=rank,
                        n=100,
                    )
            for split, decay in (("forget", 0.6), ("retain", 0.5)):
                for low, high in ((0, 4), (4, 8)):
                    table.add(
                        metrics.TIER_VARIANCE_SHARE,
                        decay**low - decay**high,
                        site=site,
                        split=split,
                        component=high,
                        n=100,
                    )
            for rank in (1, 2, 4, 8):
                for arm, value in (
                    ("forget-retain", 0.6),
                    ("retain-retain", 0.95),
                    ("random", 0.1),
                ):
                    table.add(
                        metrics.SUBSPACE_OVERLAP,
                        value + 0.01 * layer,
                        site=site,
                        arm=arm,
                        rank=rank,
                    )
        for pair, observed, p in (
            ("forget|retain-neighbour", 0.8, 0.5),
            ("forget|general", 0.3, 0.02),
            ("retain-neighbour|general", 0.25, 0.02),
        ):
            place = {"site": f"blocks.{layer}.hook_resid_post", "split": pair, "rank": 8}
            for metric, arm, value in (
                ("set_overlap", "observed", observed),
                ("set_overlap", "null", 0.9),
                ("set_overlap_p", "observed", p),
            ):
                table.add(metric, value, arm=arm, **place)
    return table


@pytest.fixture(scope="session")
def make_tables() -> Callable[..., tuple[pd.DataFrame, pd.DataFrame]]:
    """``make_tables(methods, controls, seeds)``: results and items of a run that never was, all
    stages, with the rows over all seeds. Made once; copy before you change.
    """

    @lru_cache
    def make(
        methods: tuple[str, ...] = ("npo", "cir"),
        controls: tuple[str, ...] = ("base", "never-learned"),
        seeds: tuple[int, ...] = (0, 1),
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        models = [
            _synthetic_model(method, seed) for seed in seeds for method in (*methods, *controls)
        ]
        items = join([model.item_frame() for model in models], ITEM_COLUMNS)
        return join(
            [
                _synthetic_subspaces().frame(),
                *(model.frame() for model in models),
                summarise(items, "synthetic"),
            ],
            RESULT_COLUMNS,
        ), items

    return make
