"""The causal map: patches made again by plain PyTorch hooks, identities, a planted trigger that
only its own position can restore, and a ratio of sums by hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics.causal_map import (
    CAUSAL_MAP_COLUMNS,
    CAUSING,
    IN_NOISE,
    NO_DAMAGE,
    RESTORING,
    answer_loss,
    answered,
    causal_map,
    share,
)
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import ratio
from workbench.hooks import CaptureError

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]

TRIGGER = 40
STREAM = ("blocks.0.hook_resid_pre", "blocks.*.hook_resid_post")


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


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    names = ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
    return replace(
        batch,
        **{name: getattr(batch, name)[start:stop] for name in names},
        items=batch.items[start:stop],
    )


def _nll(model: PreTrainedModel, batch: Batch) -> np.ndarray:
    """Mean negative log-likelihood of the answer's tokens, row by row, in float64."""
    with torch.no_grad():
        logits = model(**batch.inputs).logits[:, :-1].double()
    losses = F.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    mask = batch.answer_mask[:, 1:]
    return ((losses * mask).sum(1) / mask.sum(1)).numpy()


def _module(model: PreTrainedModel, site: str) -> torch.nn.Module:
    layer = model.model.layers[int(site.split(".")[1])]
    return {"hook_resid_post": layer, "hook_attn_out": layer.self_attn, "hook_mlp_out": layer.mlp}[
        site.split(".")[2]
    ]


def _patched(
    reader: PreTrainedModel, source: PreTrainedModel, batch: Batch, site: str, mask: Tensor
) -> np.ndarray:
    """The reader's loss with the source's tensor at ``site`` where ``mask`` is true, by plain
    hooks.
    """
    kept: list[Tensor] = []

    def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    handle = _module(source, site).register_forward_hook(
        lambda _m, _a, out: kept.append(first(out).clone())
    )
    with torch.no_grad():
        source(**batch.inputs)
    handle.remove()

    def put(
        _module: object, _args: object, out: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        mixed = torch.where(mask[..., None], kept[0], first(out))
        return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

    handle = _module(reader, site).register_forward_hook(put)
    found = _nll(reader, batch)
    handle.remove()
    return found


@pytest.fixture
def pair(
    make_model: ModelMaker, make_batch: BatchMaker, nearby: Mover
) -> tuple[PreTrainedModel, PreTrainedModel, Batch]:
    """A base, a damaged copy, and questions that the base answers."""
    base = make_model()
    return base, nearby(base, 0.1), _answered_by(base, make_batch((7, 5, 6, 7)))


def _groups(batch: Batch) -> dict[str, list[Tensor]]:
    place = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    real = batch.attention_mask.bool()
    return {"early": [real & (place < 3)], "late": [real & (place >= 3)], "all": [real]}


# --- Identities -----------------------------------------------------------------------------------


def test_the_last_stream_at_all_positions_restores_and_causes_everything(
    pair: tuple[PreTrainedModel, PreTrainedModel, Batch], make_model: ModelMaker
) -> None:
    # Norm and head are the same in both models here; the stream after the last block then decides
    # alone.
    base, unlearned, batch = pair
    unlearned = copy.deepcopy(unlearned)
    unlearned.model.norm, unlearned.lm_head = base.model.norm, base.lm_head
    found = causal_map(base, unlearned, [batch], sites="blocks.1.hook_resid_post")
    assert list(found.columns) == CAUSAL_MAP_COLUMNS
    assert found["direction"].tolist() == [RESTORING, CAUSING]
    assert found["restored"].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert found["low"].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert found["flag"].tolist() == ["", ""]
    assert found["n"].tolist() == [4, 4]
    assert found["damage"].iloc[0] == pytest.approx(
        float((_nll(unlearned, batch) - _nll(base, batch)).mean()), rel=1e-5
    )


def test_embeddings_that_did_not_change_restore_nothing(
    pair: tuple[PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, unlearned, batch = pair
    unlearned = copy.deepcopy(unlearned)
    unlearned.model.embed_tokens = base.model.embed_tokens
    found = causal_map(base, unlearned, [batch], sites="blocks.0.hook_resid_pre")
    assert found["layer"].tolist() == [-1, -1]
    assert found["restored"].tolist() == [0.0, 0.0]


def test_a_model_against_itself_has_no_damage_and_no_number(
    pair: tuple[PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, _, batch = pair
    for other in (base, copy.deepcopy(base)):
        found = causal_map(base, other, [batch])
        assert found[["restored", "low", "high"]].isna().all().all()
        assert (found["damage"] == 0).all()
        assert (found["flag"] == NO_DAMAGE).all()
    assert len(found) == 2 * (1 + 3 * 2)


def test_only_the_position_of_a_planted_trigger_restores_its_damage(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    base = make_model()
    clean = make_batch((7, 5, 6))
    ids = clean.input_ids.clone()
    ids[:, 1] = TRIGGER
    batch = _answered_by(base, replace(clean, input_ids=ids))
    unlearned = copy.deepcopy(base)
    with torch.no_grad():
        unlearned.model.embed_tokens.weight[TRIGGER] += 2.0
    trigger = batch.input_ids == TRIGGER
    groups = {"trigger": [trigger], "elsewhere": [batch.attention_mask.bool() & ~trigger]}
    found = causal_map(base, unlearned, [batch], sites=STREAM, groups=groups).set_index(
        ["site", "group", "direction"]
    )["restored"]
    for direction in (RESTORING, CAUSING):
        assert found["blocks.0.hook_resid_pre", "trigger", direction] == pytest.approx(
            1.0, abs=1e-6
        )
        assert found["blocks.0.hook_resid_pre", "elsewhere", direction] == pytest.approx(
            0.0, abs=1e-6
        )
        # After the last block only the positions that predict the answer count, and the trigger is
        # none of them.
        assert found["blocks.1.hook_resid_post", "trigger", direction] == pytest.approx(
            0.0, abs=1e-6
        )
        assert found["blocks.1.hook_resid_post", "elsewhere", direction] == pytest.approx(
            1.0, abs=1e-6
        )


def test_the_control_is_the_same_patch_on_the_clean_query_in_units_of_the_same_damage(
    make_model: ModelMaker, make_batch: BatchMaker, nearby: Mover
) -> None:
    base = make_model()
    unlearned = nearby(base, 0.1)
    batch, clean = (
        _answered_by(base, make_batch((7, 5, 6))),
        _answered_by(base, make_batch((6, 4, 5), seed=5)),
    )
    groups, other = _groups(batch), _groups(clean)
    site = "blocks.0.hook_mlp_out"
    other["early"] = [torch.zeros_like(clean.answer_mask)]  # as a trigger in a clean query
    found = causal_map(
        base, unlearned, [batch], sites=site, groups=groups, control=[clean], control_groups=other
    ).set_index(["group", "direction"])
    damage = _nll(unlearned, batch) - _nll(base, batch)
    expected = {
        RESTORING: _nll(unlearned, clean)
        - _patched(unlearned, base, clean, site, other["late"][0]),
        CAUSING: _patched(base, unlearned, clean, site, other["late"][0]) - _nll(base, clean),
    }
    for direction, effect in expected.items():
        value, low, high, _ = ratio(effect, damage)
        row = found.loc[("late", direction)]
        assert row["control"] == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert (row["control_low"], row["control_high"]) == (
            pytest.approx(low, rel=1e-3, abs=1e-4),
            pytest.approx(high, rel=1e-3, abs=1e-4),
        )
    assert found.loc["early"][["control", "control_low", "control_high"]].isna().all().all()
    # By default every token of the clean query is the control of the group of all.
    alone = causal_map(base, unlearned, [batch], sites=site, control=[clean]).set_index(
        ["group", "direction"]
    )
    assert alone.loc[("all", RESTORING), "control"] == pytest.approx(
        found.loc[("all", RESTORING), "control"]
    )


# --- Against plain PyTorch ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_share_is_that_of_a_patch_by_plain_hooks(
    family: str, make_model: ModelMaker, make_batch: BatchMaker, nearby: Mover
) -> None:
    base = make_model(family)
    unlearned, batch = nearby(base, 0.1), _answered_by(base, make_batch((7, 5, 6, 7)))
    groups = _groups(batch)
    found = causal_map(
        base,
        unlearned,
        [batch],
        sites=("blocks.*.hook_resid_post", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out"),
        groups=groups,
    )
    assert len(found) == 6 * 3 * 2
    before, after = _nll(base, batch), _nll(unlearned, batch)
    damage = after - before
    assert damage.sum() > 0
    for row in found.itertuples():
        mask = groups[row.group][0]
        if row.direction == RESTORING:
            effect = after - _patched(unlearned, base, batch, row.site, mask)
        else:
            effect = _patched(base, unlearned, batch, row.site, mask) - before
        assert row.layer == int(row.site.split(".")[1])
        value, low, high, n = ratio(effect, damage)
        assert row.restored == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert (row.low, row.high, row.n) == (
            pytest.approx(low, rel=1e-3, abs=1e-4),
            pytest.approx(high, rel=1e-3, abs=1e-4),
            n,
        )


def test_the_answer_loss_is_a_mean_over_the_answers_tokens_alone(
    pair: tuple[PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, unlearned, batch = pair
    for model in (base, unlearned):
        np.testing.assert_allclose(
            answer_loss(model, answered(batch))[0], _nll(model, batch), rtol=1e-5
        )
    assert answer_loss(base, answered(batch))[1].tolist() == [1.0] * 4


def test_batching_padding_and_the_order_of_groups_change_no_number(
    pair: tuple[PreTrainedModel, PreTrainedModel, Batch], pad: Padder
) -> None:
    base, unlearned, batch = pair
    few = ("blocks.0.hook_attn_out", "blocks.0.hook_resid_post")
    whole = causal_map(base, unlearned, [batch], sites=few, groups=_groups(batch))
    parts = [_rows(batch, 0, 1), _rows(batch, 1, 4)]
    split = {group: [masks[0][:1], masks[0][1:]] for group, masks in _groups(batch).items()}
    pd.testing.assert_frame_equal(
        causal_map(base, unlearned, parts, sites=few, groups=split), whole, rtol=1e-4, atol=1e-5
    )
    wide = {
        group: [F.pad(mask, (0, 3), value=True) for mask in masks]
        for group, masks in _groups(batch).items()
    }  # a mask that reaches into padding selects none of it
    pd.testing.assert_frame_equal(
        causal_map(base, unlearned, [pad(batch, 3)], sites=few, groups=wide),
        whole,
        rtol=1e-4,
        atol=1e-5,
    )
    turned = causal_map(
        base, unlearned, [batch], sites=few, groups=dict(reversed(_groups(batch).items()))
    )
    keys = ["site", "group", "direction"]
    pd.testing.assert_frame_equal(
        turned.sort_values(keys, ignore_index=True), whole.sort_values(keys, ignore_index=True)
    )


def test_a_batch_without_a_group_is_left_as_it_is(
    pair: tuple[PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, unlearned, batch = pair
    parts = [_rows(batch, 0, 2), _rows(batch, 2, 4)]
    real = [part.attention_mask.bool() for part in parts]
    found = causal_map(
        base,
        unlearned,
        parts,
        sites="blocks.0.hook_mlp_out",
        groups={"first": [real[0], torch.zeros_like(real[1])]},
    )
    damage = _nll(unlearned, batch) - _nll(base, batch)
    effect = np.zeros(4)
    effect[:2] = _nll(unlearned, parts[0]) - _patched(
        unlearned, base, parts[0], "blocks.0.hook_mlp_out", real[0]
    )
    assert found["restored"].iloc[0] == pytest.approx(
        effect.sum() / damage.sum(), rel=1e-4, abs=1e-6
    )


# --- The share ------------------------------------------------------------------------------------


def test_the_share_is_a_ratio_of_sums_and_not_a_mean_of_ratios() -> None:
    found, flag = share(("a", "b", "c"), np.array([1.0, 3.0, 0.0]), np.array([2.0, 5.0, 1.0]))
    assert found.value == 0.5  # the mean of ratios would be (.5 + .6 + 0) / 3
    # Residuals 0, .5, -.5 around half the damage; sqrt(3 / 2 * .5) / 8.
    assert found.high - found.value == pytest.approx(1.959964 * math.sqrt(0.75) / 8, rel=1e-6)
    assert (found.n, flag) == (3, "")


def test_paraphrases_are_added_up_before_facts_are_resampled() -> None:
    items, effect, damage = ("a", "b", "a"), np.array([1.0, 3.0, 2.0]), np.array([2.0, 5.0, 2.0])
    found, _ = share(items, effect, damage)
    by_fact, _ = share(("a", "b"), np.array([3.0, 3.0]), np.array([4.0, 5.0]))
    assert found == by_fact
    assert (found.value, found.n) == (6 / 9, 2)


def test_one_fact_has_a_share_and_no_interval() -> None:
    found, flag = share(("a",), np.array([1.0]), np.array([4.0]))
    assert (found.value, found.n, flag) == (0.25, 1, "")
    assert math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize(
    "damage",
    [
        [0.0, 0.0, 0.0],
        [-1.0, -1.0, -1.0],
        [1.0, -2.0, 0.5],
        [1.0, float("nan"), 1.0],
        [1.0, float("inf"), 1.0],
    ],
)
def test_damage_that_is_none_gives_nan_with_a_flag(damage: Sequence[float]) -> None:
    found, flag = share(("a", "b", "c"), np.ones(3), np.array(damage))
    assert all(math.isnan(value) for value in found[:3])
    assert (found.n, flag) == (3, NO_DAMAGE)


def test_damage_that_could_be_noise_is_flagged() -> None:
    found, flag = share(("a", "b", "c", "d"), np.ones(4), np.array([3.0, -2.0, 2.0, -2.5]))
    assert found.value == pytest.approx(8.0)
    assert flag == IN_NOISE


# --- What cannot be asked -------------------------------------------------------------------------


def test_wrong_input_is_refused_by_name(
    pair: tuple[PreTrainedModel, PreTrainedModel, Batch], make_model: ModelMaker
) -> None:
    base, unlearned, batch = pair
    real = batch.attention_mask.bool()
    silent = replace(batch, answer_mask=torch.zeros_like(real))
    with pytest.raises(WorkbenchError, match=r"fact/0.*no answer"):
        causal_map(base, unlearned, [silent])
    with pytest.raises(WorkbenchError, match="at least one batch"):
        causal_map(base, unlearned, [])
    with pytest.raises(WorkbenchError, match="'trigger' has 2 masks for 1 batches"):
        causal_map(base, unlearned, [batch], groups={"trigger": [real, real]})
    with pytest.raises(WorkbenchError, match=r"'trigger': mask 0 is torch.bool \[4, 6\]"):
        causal_map(base, unlearned, [batch], groups={"trigger": [real[:, :-1]]})
    with pytest.raises(WorkbenchError, match=r"'trigger': mask 0 is torch.int64"):
        causal_map(base, unlearned, [batch], groups={"trigger": [batch.attention_mask]})
    with pytest.raises(WorkbenchError, match="'trigger' selects no token"):
        causal_map(base, unlearned, [batch], groups={"trigger": [~real]})
    with pytest.raises(WorkbenchError, match="same queries"):
        causal_map(base, unlearned, [batch], control=[_rows(batch, 0, 3)])
    with pytest.raises(CaptureError, match=r"unknown site 'blocks\.0\.hook_mlp_uot'"):
        causal_map(base, unlearned, [batch], sites="blocks.0.hook_mlp_uot")
    with pytest.raises(CaptureError, match=r"failed.*shape"):
        causal_map(base, make_model(hidden_size=24), [batch], sites="blocks.0.hook_mlp_out")


def test_progress_counts_patched_passes_and_an_interruption_leaves_both_models_as_they_were(
    pair: tuple[PreTrainedModel, PreTrainedModel, Batch],
) -> None:
    base, unlearned, batch = pair
    base.train(), unlearned.train()
    before = [
        {name: value.clone() for name, value in model.state_dict().items()}
        for model in (base, unlearned)
    ]
    seen: list[tuple[int, int]] = []
    causal_map(
        base,
        unlearned,
        [batch],
        sites=STREAM,
        groups=_groups(batch),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(number, 2 * 3 * 3) for number in range(1, 19)]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        causal_map(base, unlearned, [batch], progress=interrupt)
    for model, state in zip((base, unlearned), before, strict=True):
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
