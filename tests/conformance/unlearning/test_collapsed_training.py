"""The collapsed update behind plain optimisers and inside a Hugging Face Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.subspaces.collapse import CollapseKind
from workbench.subspaces.collapsed_update import CollapsedUpdate
from workbench.unlearning.deltas import delta_between, norm_of, snapshot

BatchMaker = Callable[..., Batch]

PATTERN = "model.layers.*.mlp.*_proj"
COLLAPSED = tuple(
    f"model.layers.{layer}.mlp.{name}_proj.weight"
    for layer in range(2)
    for name in ("gate", "up", "down")
)
ROWS = (10, 10, 10, 10)


@pytest.fixture
def texts(make_batch: BatchMaker) -> list[Batch]:
    """Two batches of four rows of equal length, so that means over micro-batches are means over the
    whole.
    """
    return [make_batch(ROWS, 1), make_batch(ROWS, 2)]


def _update(model: PreTrainedModel, texts: list[Batch], **options: Any) -> CollapsedUpdate:
    settings: dict[str, Any] = {"activation_components": 3, "gradient_components": 4} | options
    return CollapsedUpdate(model, PATTERN, **settings).find(
        lambda batch: cross_entropy(model, batch), texts
    )


def _step(model: PreTrainedModel, optimiser: torch.optim.Optimizer, batch: Batch) -> None:
    optimiser.zero_grad()
    cross_entropy(model, batch).backward()
    optimiser.step()


def _orthogonal(update: CollapsedUpdate, delta: dict[str, Tensor]) -> None:
    """No change along the directions left alone, on either side."""
    for name in COLLAPSED:
        change, collapse = delta[name], update.maps[name]
        assert float(change.norm()) > 1e-6
        assert float((change @ collapse.activation).norm()) < 1e-4 * float(change.norm()), name
        assert float((collapse.gradient.T @ change).norm()) < 1e-4 * float(change.norm()), name


def _trainer(
    model: PreTrainedModel,
    texts: list[Batch],
    folder: Path,
    optimiser: torch.optim.Optimizer | None,
    **options: Any,
) -> Trainer:
    examples = [
        {"input_ids": row, "attention_mask": mask, "labels": row}
        for batch in texts
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
    } | options
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    return Trainer(
        model=model, args=arguments, train_dataset=examples, optimizers=(optimiser, None)
    )


# --- inside a Trainer -----------------------------------------------------------------------------


def test_inside_a_trainer_no_weight_changes_along_the_directions_left_alone(
    llama: PreTrainedModel, texts: list[Batch], tmp_path: Path
) -> None:
    update, start = _update(llama, texts), snapshot(llama)
    optimiser = torch.optim.SGD(llama.parameters(), lr=0.1)
    update.attach(optimiser)
    _trainer(llama, texts, tmp_path, optimiser).train()
    delta = delta_between(llama, start)
    _orthogonal(update, delta)
    assert len(delta) == len(start)  # every other weight is trained as well


def test_inside_a_trainer_the_other_weights_step_as_they_would_without_the_map(
    llama: PreTrainedModel, texts: list[Batch], tmp_path: Path
) -> None:
    plain, start = copy.deepcopy(llama), snapshot(llama)
    for model in (llama, plain):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        if model is llama:
            _update(model, texts).attach(optimiser)
        _trainer(model, texts, tmp_path, optimiser, max_steps=1).train()
    with_map, without = delta_between(llama, start), delta_between(plain, start)
    for name in start:
        assert torch.equal(with_map[name], without[name]) is (name not in COLLAPSED), name


def test_the_trainers_own_optimiser_can_be_collapsed(
    llama: PreTrainedModel, texts: list[Batch], tmp_path: Path
) -> None:
    # The way the class documents: AdamW behind the Trainer's scheduler, its clipping, and whatever
    # it wraps the optimiser in.
    update, start = _update(llama, texts, kind="soft"), snapshot(llama)
    applied = _counted(update)
    trainer = _trainer(llama, texts, tmp_path, None, learning_rate=1e-3)
    update.attach(trainer.create_optimizer())
    trainer.train()
    delta = delta_between(llama, start)
    assert len(applied) == 4
    assert set(COLLAPSED) <= set(delta) and all(
        bool(torch.isfinite(change).all()) for change in delta.values()
    )


def _counted(update: CollapsedUpdate) -> list[float]:
    """Every length that ``update.apply`` returns, from now on."""
    lengths: list[float] = []
    apply = update.apply

    def record() -> float:
        lengths.append(apply())
        return lengths[-1]

    update.apply = record  # type: ignore[method-assign]
    return lengths


def test_micro_batches_are_collapsed_once_and_together(
    llama: PreTrainedModel, texts: list[Batch], tmp_path: Path
) -> None:
    whole, start = copy.deepcopy(llama), snapshot(llama)
    deltas = []
    for model, options in (
        (llama, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        (whole, {}),
    ):
        update, optimiser = _update(model, texts), torch.optim.SGD(model.parameters(), lr=0.1)
        lengths = _counted(update)
        update.attach(optimiser)
        _trainer(model, texts, tmp_path, optimiser, max_steps=3, **options).train()
        assert len(lengths) == 3
        deltas.append(delta_between(model, start))
        _orthogonal(update, deltas[-1])
    for name, change in deltas[1].items():
        torch.testing.assert_close(deltas[0][name], change, rtol=1e-3, atol=1e-6)


# --- in a loop of one's own -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "soft", "quadratic"])
def test_a_step_of_plain_descent_has_the_length_asked_for(
    kind: CollapseKind, llama: PreTrainedModel, texts: list[Batch]
) -> None:
    update, start = _update(llama, texts, kind=kind, length=0.37), snapshot(llama)
    optimiser = torch.optim.SGD(
        [parameter for name, parameter in llama.named_parameters() if name in COLLAPSED], lr=1.0
    )
    update.attach(optimiser)
    _step(llama, optimiser, texts[0])
    assert norm_of(delta_between(llama, start)) == pytest.approx(0.37, rel=1e-4)


def test_the_length_is_that_of_the_collapsed_weights_together_and_no_other_weight_is_scaled(
    llama: PreTrainedModel, texts: list[Batch]
) -> None:
    plain, start = copy.deepcopy(llama), snapshot(llama)
    for model in (llama, plain):
        optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
        if model is llama:
            _update(model, texts, length=0.01).attach(optimiser)
        _step(model, optimiser, texts[0])
    delta, without = delta_between(llama, start), delta_between(plain, start)
    assert norm_of({name: delta[name] for name in COLLAPSED}) == pytest.approx(0.01, rel=1e-3)
    assert all(torch.equal(delta[name], without[name]) for name in start if name not in COLLAPSED)


def test_apply_returns_the_length_before_scaling(
    llama: PreTrainedModel, texts: list[Batch]
) -> None:
    lengths = []
    for length in (None, 5.0):
        update = _update(llama, texts, length=length)
        llama.zero_grad()
        cross_entropy(llama, texts[0]).backward()
        lengths.append(update.apply())
        found = norm_of(
            {
                name: parameter.grad
                for name, parameter in llama.named_parameters()
                if name in COLLAPSED and parameter.grad is not None
            }
        )
        assert found == pytest.approx(length or lengths[0], rel=1e-5)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-6)
    assert lengths[0] > 0


@pytest.mark.parametrize("kind", ["hard", "soft", "quadratic"])
def test_adaptive_optimisers_work_on_the_collapsed_gradient(
    kind: CollapseKind, llama: PreTrainedModel, texts: list[Batch]
) -> None:
    update, start = _update(llama, texts, kind=kind), snapshot(llama)
    optimiser = torch.optim.AdamW(llama.parameters(), lr=1e-3, weight_decay=0.0)
    update.attach(optimiser)
    _step(llama, optimiser, texts[0])
    moments = [
        optimiser.state[parameter]["exp_avg"]
        for name, parameter in llama.named_parameters()
        if name in COLLAPSED
    ]
    for name, moment in zip(COLLAPSED, moments, strict=True):
        if kind == "hard":  # the first moment is a tenth of the gradient that the optimiser saw
            assert float((moment @ update.maps[name].activation).norm()) < 1e-4 * float(
                moment.norm()
            )
    _step(llama, optimiser, texts[1])
    delta = delta_between(llama, start)
    assert len(delta) == len(start) and all(
        bool(torch.isfinite(change).all()) for change in delta.values()
    )


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (10, [0])]
)
def test_directions_are_refreshed_before_every_nth_step(
    every: int, expected: list[int], llama: PreTrainedModel, texts: list[Batch]
) -> None:
    update = CollapsedUpdate(llama, PATTERN, activation_components=3, gradient_components=4)
    optimiser = torch.optim.SGD(llama.parameters(), lr=0.1)
    calls: list[int] = []
    number = 0

    def refresh() -> None:
        calls.append(number)
        update.find(lambda batch: cross_entropy(llama, batch), texts)

    update.attach(optimiser, refresh=refresh, every=every)
    for number in range(7):
        before = snapshot(llama)
        _step(llama, optimiser, texts[number % 2])
        _orthogonal(update, delta_between(llama, before))
    assert calls == expected


def test_a_refresh_leaves_the_gradients_of_the_step_as_they_are(
    llama: PreTrainedModel, texts: list[Batch]
) -> None:
    quiet, start = copy.deepcopy(llama), snapshot(llama)
    for model in (llama, quiet):
        update, optimiser = _update(model, texts), torch.optim.SGD(model.parameters(), lr=0.1)

        def careless(model: PreTrainedModel = model, update: CollapsedUpdate = update) -> None:
            update.find(lambda batch: cross_entropy(model, batch), texts)
            model.zero_grad()  # and whatever else a user's function does to gradients
            cross_entropy(model, texts[1]).backward()

        update.attach(optimiser, refresh=careless if model is llama else None)
        _step(model, optimiser, texts[0])
    first, second = delta_between(llama, start), delta_between(quiet, start)
    assert first.keys() == second.keys() and all(
        torch.equal(change, second[name]) for name, change in first.items()
    )


def test_gradients_added_in_place_during_a_refresh_do_not_reach_the_step(
    llama: PreTrainedModel, texts: list[Batch]
) -> None:
    # backward() adds to an existing .grad in place: keeping a reference to the tensor alone would
    # keep the sum.
    quiet, start = copy.deepcopy(llama), snapshot(llama)
    for model in (llama, quiet):
        update, optimiser = _update(model, texts), torch.optim.SGD(model.parameters(), lr=0.1)

        def adds(model: PreTrainedModel = model) -> None:
            cross_entropy(model, texts[1]).backward()

        update.attach(optimiser, refresh=adds if model is llama else None)
        _step(model, optimiser, texts[0])
    first, second = delta_between(llama, start), delta_between(quiet, start)
    assert all(torch.equal(change, second[name]) for name, change in first.items())


def test_a_removed_handle_detaches(llama: PreTrainedModel, texts: list[Batch]) -> None:
    plain, start = copy.deepcopy(llama), snapshot(llama)
    update = _update(llama, texts)
    lengths = _counted(update)
    deltas = []
    for model in (llama, plain):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        if model is llama:
            update.attach(optimiser).remove()
        _step(model, optimiser, texts[0])
        deltas.append(delta_between(model, start))
    assert not lengths
    assert all(torch.equal(change, deltas[1][name]) for name, change in deltas[0].items())


def test_a_frozen_module_is_named(llama: PreTrainedModel, texts: list[Batch]) -> None:
    update = _update(llama, texts)
    frozen = llama.get_submodule("model.layers.0.mlp.gate_proj")
    frozen.requires_grad_(False)
    cross_entropy(llama, texts[0]).backward()
    with pytest.raises(WorkbenchError, match=r"layers\.0\.mlp\.gate_proj\.weight is frozen"):
        update.apply()


# --- errors ---------------------------------------------------------------------------------------


def test_a_collapse_without_directions_is_refused(
    llama: PreTrainedModel, texts: list[Batch]
) -> None:
    update = CollapsedUpdate(llama, PATTERN)
    with pytest.raises(WorkbenchError, match="find"):
        update.apply()
    optimiser = torch.optim.SGD(llama.parameters(), lr=0.1)
    update.attach(optimiser)
    before = snapshot(llama)
    with pytest.raises(WorkbenchError, match="find"):
        _step(llama, optimiser, texts[0])
    assert not delta_between(llama, before)
    with pytest.raises(WorkbenchError, match="no batch"):
        update.find(lambda batch: cross_entropy(llama, batch), [])


def test_an_update_that_is_annihilated_is_reported_with_its_module(
    llama: PreTrainedModel, texts: list[Batch]
) -> None:
    update = _update(
        llama, texts, activation_components=16, gradient_components=0
    )  # all directions of a 16-dimensional input
    cross_entropy(llama, texts[0]).backward()
    with pytest.raises(WorkbenchError, match=r"model\.layers\.0\.mlp\.gate_proj leaves nothing"):
        update.apply()
    # Soft collapse brings directions down without ending them.
    soft = _update(llama, texts, activation_components=16, gradient_components=0, kind="soft")
    llama.zero_grad()
    cross_entropy(llama, texts[0]).backward()
    assert soft.apply() > 0


def test_an_unknown_pattern_is_answered_with_names(llama: PreTrainedModel) -> None:
    for patterns in ("model.layers.*.mlp.c_fc", [PATTERN, "model.embed_tokens"]):
        with pytest.raises(WorkbenchError, match=r"no linear layer matches .*q_proj"):
            CollapsedUpdate(llama, patterns)


def test_an_unknown_kind_is_answered_with_the_known_ones(
    llama: PreTrainedModel, texts: list[Batch]
) -> None:
    with pytest.raises(WorkbenchError, match="soft"):
        _update(llama, texts, kind="sotf")


def test_a_refresh_interval_must_be_positive(llama: PreTrainedModel) -> None:
    update = CollapsedUpdate(llama, PATTERN)
    with pytest.raises(WorkbenchError, match="every is 0"):
        update.attach(torch.optim.SGD(llama.parameters(), lr=0.1), every=0)
