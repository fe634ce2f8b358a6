"""No result fills a screen when its name is typed, whatever it holds."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, fields, is_dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import workbench
from workbench import figures, hooks
from workbench.data.batches import batches
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.data.world import WorldConfig, build_world
from workbench.hooks.brief import brief

A_SCREEN = 4_000  # characters: 40 lines of 100


def _dataclasses() -> list[type]:
    found: set[type] = set()
    for package in (hooks, workbench, figures):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("__main__"):
                continue
            names = vars(importlib.import_module(module.name)).values()
            found |= {
                kind
                for kind in names
                if isinstance(kind, type)
                and is_dataclass(kind)
                and kind.__module__ == module.name
                and not kind.__name__.startswith("_")
            }
    return sorted(found, key=lambda kind: kind.__qualname__)


UNBOUNDED = ("Tensor", "ndarray", "DataFrame", "[Example", "PreTrained", ", Example", "list[")


@pytest.mark.parametrize("kind", _dataclasses(), ids=lambda kind: kind.__name__)
def test_what_holds_arrays_or_texts_has_a_representation_of_its_own(kind: type) -> None:
    held = [f.name for f in fields(kind) if any(name in str(f.type) for name in UNBOUNDED)]
    generated = hasattr(kind.__repr__, "__wrapped__")
    assert not (held and generated), f"{kind.__qualname__} prints all of {held}"


def test_a_world_of_twenty_thousand_texts_fits_on_a_screen() -> None:
    world = build_world(WorldConfig(islands=40))
    for shown in (world, world.record):
        assert len(repr(shown)) < A_SCREEN
        assert repr(shown).startswith(type(shown).__name__)
    assert f"({len(world.filler_train):,} in all)" in repr(world)
    (first, *_) = batches(build_tokenizer(world.vocabulary), world.record.forget_attacked, 64)
    assert len(repr(first)) < A_SCREEN
    assert str(tuple(first.input_ids.shape)) in repr(first)


def test_anything_held_is_named_and_cut() -> None:
    @brief
    @dataclass(frozen=True)
    class Result:
        texts: tuple[Example, ...]
        weights: dict[str, torch.Tensor]
        table: pd.DataFrame
        model: nn.Module
        note: str
        rows: np.ndarray

    result = Result(
        tuple(Example("q" * 10**6) for _ in range(1000)),
        {f"layer {i}": torch.zeros(100, 100) for i in range(1000)},
        pd.DataFrame(np.zeros((10_000, 30))),
        nn.Linear(100, 100),
        "n" * 10**6,
        np.zeros((10_000, 5)),
    )
    shown = repr(result)
    assert len(shown) < A_SCREEN
    for field in fields(result):
        assert f"{field.name}=" in shown
    assert "10000 rows x 30 columns" in shown
    assert "Linear of 10,100 parameters" in shown
    assert "ndarray (10000, 5) float64" in shown
    assert "Tensor (100, 100) float32" in shown
    assert "(1,000 in all)" in shown


def test_a_result_within_a_result_keeps_the_words_it_has() -> None:
    @dataclass(frozen=True)
    class Inner:
        value: float

        def __repr__(self) -> str:
            return "in words"

    @brief
    @dataclass(frozen=True)
    class Outer:
        inner: Inner
        empty: None = None

    assert repr(Outer(Inner(1.0))).endswith("Outer(inner=in words, empty=None)")
