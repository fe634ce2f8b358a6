"""Patching depth: both ends are the models themselves, every depth in between is rebuilt by running
the blocks one by one, and the anchor decides what counts as erased.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics.causal_map import NO_DAMAGE
from workbench.diagnostics.depth import DEPTH_COLUMNS, patching_depth
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import ratio

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]

DOWN, UP, NEVER = "unlearned into base", "base into unlearned", "never-learned into base"


def _answered_by(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch with the answers that ``model`` would give, so that any change of the model is
    damage.
    """
    ids = batch.input_ids.clone()
    for column in range(1, ids.shape[1]):
        with torch.no_grad():
            best = (
                model(input_ids=ids, attention_mask=batch.attention_mask)
                .logits[:, column - 1]
                .argmax(-1)
            )
        ids[:, column] = torch.where(batch.answer_mask[:, column], best, ids[:, column])
    return replace(batch, input_ids=ids)


def _read(logits: Tensor, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    logits, targets, mask = (
        logits[:, :-1].double(),
        batch.input_ids[:, 1:],
        batch.answer_mask[:, 1:],
    )
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    right = ((logits.argmax(-1) == targets) | ~mask).all(1)
    return ((losses * mask).sum(1) / mask.sum(1)).numpy(), right.double().numpy()


def _chimera(lower: PreTrainedModel, upper: PreTrainedModel, layer: int) -> PreTrainedModel:
    """One model: embeddings and blocks up to ``layer`` of ``lower``, the rest of ``upper``. What a
    patch at that depth computes.
    """
    made = copy.deepcopy(upper)
    made.model.embed_tokens = lower.model.embed_tokens
    for index in range(layer + 1):
        made.model.layers[index] = lower.model.layers[index]
    return made


def _run(model: PreTrainedModel, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        return _read(model(**batch.inputs).logits, batch)


@pytest.fixture
def trio(
    make_model: ModelMaker, make_batch: BatchMaker, nearby: Mover
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch]:
    """A base of three blocks, an unlearned and a never-learned model, and questions that the base
    answers.
    """
    base = make_model(num_hidden_layers=3)
    return (
        base,
        nearby(base, 0.1),
        make_model(num_hidden_layers=3, seed=9),
        _answered_by(base, make_batch((7, 5, 6, 7))),
    )


def test_every_depth_is_the_model_of_these_lower_and_those_upper_blocks(
    trio: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, unlearned, never, batch = trio
    found = patching_depth(base, unlearned, [batch], never)
    assert list(found.columns) == DEPTH_COLUMNS
    assert found["layer"].tolist() == [-1, 0, 1, 2] * 3
    assert found["direction"].tolist() == [DOWN] * 4 + [UP] * 4 + [NEVER] * 4
    models = {"base": base, "unlearned": unlearned, "never-learned": never}
    before, damage = _run(base, batch)[0], _run(never, batch)[0] - _run(base, batch)[0]
    for row in found.itertuples():
        source, reader = row.direction.split(" into ")
        nll, right = _run(_chimera(models[source], models[reader], row.layer), batch)
        assert row.nll == pytest.approx(nll.mean(), rel=1e-5)
        assert row.recall == right.mean()
        value, low, high, n = ratio(nll - before, damage)
        assert row.erased == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert (row.low, row.high, row.n) == (
            pytest.approx(low, rel=1e-3, abs=1e-5),
            pytest.approx(high, rel=1e-3, abs=1e-5),
            n,
        )


def test_without_an_anchor_the_unlearned_model_is_as_lost_as_itself(
    trio: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, unlearned, _, batch = trio
    # The same embeddings, norm and head: the first and the last depth are then one of the models,
    # whole.
    unlearned = copy.deepcopy(unlearned)
    unlearned.model.embed_tokens, unlearned.model.norm, unlearned.lm_head = (
        base.model.embed_tokens,
        base.model.norm,
        base.lm_head,
    )
    found = patching_depth(base, unlearned, [batch]).set_index(["direction", "layer"])
    assert set(found.index.get_level_values(0)) == {DOWN, UP}
    assert found.loc[(DOWN, -1), "erased"] == pytest.approx(0.0, abs=1e-6)
    assert found.loc[(DOWN, 2), "erased"] == pytest.approx(1.0, abs=1e-6)
    assert found.loc[(UP, -1), "erased"] == pytest.approx(1.0, abs=1e-6)
    assert found.loc[(UP, 2), "erased"] == pytest.approx(0.0, abs=1e-6)
    assert found.loc[(DOWN, -1), "recall"] == 1.0
    assert (found["flag"] == "").all()


def test_an_edit_of_one_block_is_lost_from_that_block_on(
    trio: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, _, _, batch = trio
    unlearned = copy.deepcopy(base)
    with torch.no_grad():
        unlearned.model.layers[1].mlp.down_proj.weight.mul_(-1)
    found = patching_depth(base, unlearned, [batch]).set_index(["direction", "layer"])["erased"]
    assert found[DOWN].tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=1e-6)
    assert found[UP].tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-6)


def test_the_never_learned_model_as_unlearned_is_its_own_anchor(
    trio: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, _, never, batch = trio
    found = patching_depth(base, never, [batch], never).set_index(["direction", "layer"])
    columns = ["nll", "recall", "erased", "low", "high"]
    pd.testing.assert_frame_equal(found.loc[DOWN][columns], found.loc[NEVER][columns])


def test_a_model_against_itself_has_nothing_to_erase(
    trio: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, _, never, batch = trio
    found = patching_depth(base, base, [batch])
    assert found["erased"].isna().all() and (found["flag"] == NO_DAMAGE).all()
    assert (found["recall"] == 1.0).all()
    # With an anchor nothing is erased, and that is a number.
    anchored = patching_depth(base, base, [batch], never)
    assert anchored.loc[anchored["direction"].isin([DOWN, UP]), "erased"].abs().max() < 1e-6


def test_batching_and_padding_change_no_number(
    trio: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch], pad: Padder
) -> None:
    base, unlearned, never, batch = trio
    whole = patching_depth(base, unlearned, [batch], never)
    names = ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
    parts = [
        replace(
            batch, **{name: getattr(batch, name)[rows] for name in names}, items=batch.items[rows]
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]
    pd.testing.assert_frame_equal(
        patching_depth(base, unlearned, parts, never), whole, rtol=1e-4, atol=1e-5
    )
    pd.testing.assert_frame_equal(
        patching_depth(base, unlearned, [pad(batch, 4)], never), whole, rtol=1e-4, atol=1e-5
    )


def test_wrong_input_is_refused(
    trio: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch], make_model: ModelMaker
) -> None:
    base, unlearned, _, batch = trio
    with pytest.raises(WorkbenchError, match="no batch"):
        patching_depth(base, unlearned, [])
    with pytest.raises(WorkbenchError, match="no answer"):
        patching_depth(
            base, unlearned, [replace(batch, answer_mask=torch.zeros_like(batch.answer_mask))]
        )
    with pytest.raises(WorkbenchError, match="3 blocks and the unlearned model 2"):
        patching_depth(base, make_model(), [batch])
    with pytest.raises(WorkbenchError, match="3 blocks and the never-learned model 2"):
        patching_depth(base, unlearned, [batch], make_model())


def test_an_interruption_leaves_all_models_as_they_were(
    trio: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    *models, batch = trio
    base, unlearned, never = models
    for model in models:
        model.train()
    seen: list[tuple[int, int]] = []
    patching_depth(
        base, unlearned, [batch], never, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(number, 12) for number in range(1, 13)]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patching_depth(base, unlearned, [batch], never, progress=interrupt)
    for model in models:
        assert model.training
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
