"""The shift of the residual stream: the identity for a model against itself, closed forms on
hand-made streams, and rows that are transformers' own hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics.shift import SHIFT_MEASURES, recovered_shift, shift_by_layer, streams
from workbench.subspaces.compare import debiased_cka

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]

IDENTITY = {"relative_shift": 0.0, "cosine": 1.0, "norm_ratio": 1.0, "cka": 1.0}


def _rows(seed: int = 0, rows: int = 40, width: int = 6) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _rotation(width: int = 6, seed: int = 1) -> Tensor:
    return torch.linalg.qr(
        torch.randn(
            width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
    ).Q


def _shift(before: Tensor, after: Tensor) -> pd.Series:
    found = shift_by_layer({0: before}, {0: after})
    assert list(found.columns) == ["layer", *SHIFT_MEASURES]
    assert len(found) == 1
    return found.iloc[0]


def _hidden(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """What every block writes to the residual stream, on content tokens, from transformers alone.
    The last entry of ``hidden_states`` has gone through the final norm.
    """
    kept: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: kept.append((out[0] if isinstance(out, tuple) else out).detach())
        )
        for block in model.model.layers
    ]
    with torch.no_grad():
        states = model(**batch.inputs, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(states[1:-1], kept[:-1], strict=True))
    return [state[batch.content_mask].float() for state in kept]


# --- The streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_streams_are_the_hidden_states_after_every_block_on_content_tokens(
    family: str, make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, batch = make_model(family, num_hidden_layers=3), make_batch((7, 4, 6))
    found, expected = streams(model, [batch]), _hidden(model, batch)
    assert list(found) == [0, 1, 2]
    for layer, rows in found.items():
        assert tuple(rows.shape) == (6 + 3 + 5, 16)
        assert rows.dtype == torch.float32
        assert rows.device.type == "cpu"
        torch.testing.assert_close(rows, expected[layer], rtol=1e-5, atol=1e-6)


def test_padding_and_the_first_token_give_no_row(
    make_model: ModelMaker, make_batch: BatchMaker, pad: Padder
) -> None:
    model, batch = make_model(), make_batch((7, 2, 5))
    plain = streams(model, [batch])
    for columns in (1, 4):
        padded = streams(model, [pad(batch, columns)])
        for layer in plain:
            assert padded[layer].shape == plain[layer].shape
            torch.testing.assert_close(padded[layer], plain[layer], rtol=1e-5, atol=1e-6)
    # Other tokens behind the padding mask change nothing.
    other = replace(batch, input_ids=torch.where(batch.attention_mask.bool(), batch.input_ids, 9))
    torch.testing.assert_close(streams(model, [other])[1], plain[1], rtol=1e-5, atol=1e-6)


def test_rows_come_text_by_text_whatever_the_batching(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model = make_model()
    texts = [make_batch((length,), seed=length) for length in (5, 7, 3)]
    apart = streams(model, texts)
    for layer in apart:
        expected = torch.cat([_hidden(model, text)[layer] for text in texts])
        torch.testing.assert_close(apart[layer], expected, rtol=1e-5, atol=1e-6)


def test_measuring_leaves_the_model_alone(make_model: ModelMaker, batch: Batch) -> None:
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    streams(model, [batch])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_streams_of_a_bf16_model_are_float32(make_model: ModelMaker, batch: Batch) -> None:
    model = make_model().bfloat16()
    found = streams(model, [batch])
    assert {rows.dtype for rows in found.values()} == {torch.float32}
    for layer, rows in enumerate(_hidden(model, batch)):
        assert torch.equal(found[layer], rows)


# --- Shift ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_measure_of_a_model_against_itself_is_the_identity(
    family: str, make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model(family)
    found = shift_by_layer(streams(model, [batch]), streams(model, [batch]))
    assert found["layer"].tolist() == [0, 1]
    for measure in SHIFT_MEASURES:
        assert found[measure].tolist() == pytest.approx([IDENTITY[measure]] * 2, abs=1e-12)
    assert (found["relative_shift"] == 0).all()


def test_every_measure_sees_another_model(
    make_model: ModelMaker, batch: Batch, nearby: Mover
) -> None:
    model = make_model()
    before = streams(model, [batch])
    found = shift_by_layer(before, streams(nearby(model, 0.1), [batch]))
    assert (found["relative_shift"] > 1e-3).all()
    assert (found["cosine"] < 1 - 1e-4).all()
    assert (found["cka"] < 1 - 1e-4).all()
    # A larger move is a larger shift.
    farther = shift_by_layer(before, streams(nearby(model, 0.4), [batch]))
    assert (farther["relative_shift"] > found["relative_shift"]).all()
    assert (farther["cosine"] < found["cosine"]).all()


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, -2.0])
def test_scaling_has_a_closed_form(factor: float) -> None:
    before = _rows()
    found = _shift(before, factor * before)
    assert found["relative_shift"] == pytest.approx(abs(factor - 1), abs=1e-7)
    assert found["cosine"] == pytest.approx(math.copysign(1, factor))
    assert found["norm_ratio"] == pytest.approx(abs(factor))
    assert found["cka"] == pytest.approx(1.0)


def test_a_rotation_keeps_norms_and_cka_and_nothing_else() -> None:
    before, turn = _rows().double(), _rotation()
    found = _shift(before, before @ turn)
    assert found["norm_ratio"] == pytest.approx(1.0)
    assert found["cka"] == pytest.approx(1.0)
    # |hR - h|^2 = 2 |h|^2 - 2 <hR, h>, row by row and in all.
    along = (before @ turn * before).sum(1)
    assert found["cosine"] == pytest.approx(float((along / before.square().sum(1)).mean()))
    assert found["relative_shift"] == pytest.approx(
        math.sqrt(2 - 2 * float(along.sum() / before.square().sum()))
    )


def test_a_quarter_turn_in_a_plane() -> None:
    before = _rows(width=2).double()
    found = _shift(before, torch.stack([-before[:, 1], before[:, 0]], dim=1))
    assert found["cosine"] == pytest.approx(0.0, abs=1e-12)
    assert found["relative_shift"] == pytest.approx(math.sqrt(2))
    assert (found["norm_ratio"], found["cka"]) == (pytest.approx(1.0), pytest.approx(1.0))


def test_a_common_vector_added_to_all_rows() -> None:
    before, added = (
        _rows().double(),
        torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1.0], dtype=torch.float64),
    )
    found = _shift(before, before + added)
    size = float(before.square().sum())
    assert found["relative_shift"] == pytest.approx(
        math.sqrt(len(before) * float(added @ added) / size)
    )
    assert found["norm_ratio"] == pytest.approx(
        math.sqrt(float((before + added).square().sum()) / size)
    )
    assert found["cka"] == pytest.approx(
        1.0
    )  # a common shift is no change of the representation's shape
    cosines = [float(row @ (row + added) / row.norm() / (row + added).norm()) for row in before]
    assert found["cosine"] == pytest.approx(sum(cosines) / len(cosines))


def test_the_shift_is_a_ratio_of_sums_and_the_cosine_a_mean_over_tokens() -> None:
    # One token is ten times as long and does not move; the mean of the tokens' own ratios would be
    # 1/2.
    before = torch.tensor([[10.0, 0.0], [0.0, 1.0], [10.0, 0.0], [0.0, 1.0]])
    after = torch.tensor([[10.0, 0.0], [1.0, 1.0], [10.0, 0.0], [1.0, 1.0]])
    found = _shift(before, after)
    assert found["relative_shift"] == pytest.approx(math.sqrt(2 / 202))
    assert found["norm_ratio"] == pytest.approx(math.sqrt(204 / 202))
    assert found["cosine"] == pytest.approx((1 + 1 / math.sqrt(2)) / 2)


def test_cka_is_the_debiased_one_and_layers_keep_their_order_and_their_names() -> None:
    before, after = {5: _rows(0), 2: _rows(1)}, {2: _rows(3), 5: _rows(4)}
    found = shift_by_layer(before, after)
    assert found["layer"].tolist() == [5, 2]
    assert found["cka"].tolist() == [debiased_cka(before[layer], after[layer]) for layer in (5, 2)]
    assert (found["cka"].abs() < 0.4).all()  # nothing in common


def test_sums_are_accumulated_beyond_float32() -> None:
    # A long stream whose change is a millionth of it: squares of float32 numbers summed in float32
    # lose it.
    before = (_rows(rows=2000, width=16) + 30).float()
    after = (before.double() * (1 + 1e-6)).float()
    exact = math.sqrt(
        float((after.double() - before.double()).square().sum() / before.double().square().sum())
    )
    assert exact == pytest.approx(1e-6, rel=0.2)
    assert _shift(before, after)["relative_shift"] == pytest.approx(exact, rel=1e-9)


# --- What an attack takes back --------------------------------------------------------------------


def _returned(base: Tensor, unlearned: Tensor, attacked: Tensor) -> tuple[float, float]:
    found = recovered_shift({3: base}, {3: unlearned}, {3: attacked})
    assert list(found.columns) == ["layer", "returned", "beside"]
    assert found["layer"].tolist() == [3]
    return float(found["returned"].iloc[0]), float(found["beside"].iloc[0])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, 2.0, -1.0, -0.5])
def test_a_share_of_the_way_back_is_that_share_with_nothing_beside(share: float) -> None:
    base, unlearned = _rows(0).double(), _rows(1).double()
    along, beside = _returned(base, unlearned, unlearned + share * (base - unlearned))
    assert along == pytest.approx(share, abs=1e-12)
    assert beside == pytest.approx(0.0, abs=1e-12)


def test_the_unlearned_model_has_returned_nothing_and_the_base_everything() -> None:
    base, unlearned = _rows(0), _rows(1)
    assert _returned(base, unlearned, unlearned) == (0.0, 0.0)
    along, beside = _returned(base, unlearned, base)
    assert along == pytest.approx(1.0)
    assert beside == pytest.approx(0.0, abs=1e-7)


def test_what_moved_beside_the_way_back_is_in_units_of_the_way_by_hand() -> None:
    # The way back is (3, 4) in all; the attack moves 2 along it and 5 across it.
    base, unlearned = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 2)
    across = torch.tensor([[4.0, 0.0], [0.0, -3.0]])
    assert _returned(base, unlearned, across) == (pytest.approx(0.0), pytest.approx(1.0))
    along, beside = _returned(base, unlearned, 2 * base + across)
    assert (along, beside) == (pytest.approx(2.0), pytest.approx(1.0))
    along, beside = _returned(base, unlearned, -base + 0.5 * across)
    assert (along, beside) == (pytest.approx(-1.0), pytest.approx(0.5))
    # Another coordinate is beside the way, too.
    along, beside = _returned(base, unlearned, torch.tensor([[0.0, 10.0], [0.0, 0.0]]))
    assert (along, beside) == (pytest.approx(0.0), pytest.approx(2.0))


def test_the_projection_is_over_all_tokens_at_once() -> None:
    # Token one goes all the way, token two, whose way is twice as long, stays: 1 / (1 + 4), not the
    # mean of 1 and 0.
    base, unlearned = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 2)
    along, beside = _returned(base, unlearned, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert along == pytest.approx(1 / 5)
    assert beside == pytest.approx(math.hypot(1 - 1 / 5, 2 / 5) / math.sqrt(5))


def test_where_unlearning_moved_nothing_there_is_no_way_back() -> None:
    same = _rows(0)
    assert all(math.isnan(value) for value in _returned(same, same, _rows(1)))
    assert all(math.isnan(value) for value in _returned(same, same, same))
    # Only the layer that did not move is left without a number.
    found = recovered_shift(
        {0: same, 1: same}, {0: same, 1: 2 * same}, {0: same, 1: same}
    ).set_index("layer")
    assert found.loc[0].isna().all()
    assert found.loc[1, "returned"] == pytest.approx(1.0)


def test_a_tiny_shift_still_has_a_direction() -> None:
    base = _rows(0).double()
    unlearned = base + 1e-12 * _rows(1).double()
    along, beside = _returned(base, unlearned, unlearned + 0.5 * (base - unlearned))
    assert along == pytest.approx(0.5, abs=1e-3)
    assert beside == pytest.approx(0.0, abs=1e-3)


def test_of_three_models_the_base_itself_has_returned_and_the_unlearned_one_has_not(
    make_model: ModelMaker, batch: Batch, nearby: Mover
) -> None:
    base = make_model()
    before, unlearned = streams(base, [batch]), streams(nearby(base), [batch])
    assert recovered_shift(before, unlearned, before)["returned"].tolist() == pytest.approx(
        [1.0, 1.0]
    )
    assert recovered_shift(before, unlearned, unlearned)["returned"].tolist() == [0.0, 0.0]
    other = recovered_shift(before, unlearned, streams(nearby(base, seed=2), [batch]))
    assert other["beside"].gt(0.1).all()
