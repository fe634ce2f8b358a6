"""Shared fixtures: a private cache, the quick built-in models, and the optional folder of real data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from workbench.builtin import builtin_model
from workbench.experiments.config import RunConfig, preset
from workbench.experiments.road import Run, run_road

_DATA = (os.environ.get("WORKBENCH_TEST_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small models: one thread each is fastest and the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick_config() -> RunConfig:
    """The quick road, cut down to two methods."""
    return preset("quick").model_copy(update={"methods": ("npo", "cir"), "seeds": (0, 1)})


@pytest.fixture(scope="session")
def quick_base(quick_config: RunConfig) -> Path:
    """Folder of the quick built-in model (trained at the first use on this machine)."""
    return builtin_model(quick_config.model)


@pytest.fixture(scope="session")
def quick_run(quick_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished quick run."""
    return run_road(quick_config, tmp_path_factory.mktemp("runs") / "quick")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts and small pretrained models, where there is one."""
    for place in _DATA:
        if place and Path(place, "models").is_dir():
            return Path(place)
    pytest.skip("real data is absent: set WORKBENCH_TEST_DATA to a folder with models/ and text/")
