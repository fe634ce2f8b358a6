"""Quantisation: codes by hand, its laws, which weights of which architecture are rounded along
which side, and what survives of a change.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from workbench.attacks.quantise import GROUP, absmax_codes, quantised, surviving_share
from workbench.data.batches import Batch
from workbench.errors import WorkbenchError

ModelMaker = Callable[..., PreTrainedModel]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def _same(one: PreTrainedModel, two: PreTrainedModel) -> set[str]:
    """Names of the parameters with the same bits."""
    theirs = dict(two.named_parameters(remove_duplicate=False))
    return {
        name
        for name, parameter in one.named_parameters(remove_duplicate=False)
        if torch.equal(parameter, theirs[name])
    }


# --- the code of one matrix -----------------------------------------------------------------------


def test_four_bits_by_hand() -> None:
    # Steps 7/7 = 1 and 3.5/7 = 0.5.
    found = absmax_codes(torch.tensor([[7.0, -2.6, 0.4, 1.2], [0.2, 0.3, -3.5, 1.3]]), 4)
    assert found.codes.tolist() == [[7, -3, 0, 1], [0, 1, -7, 3]]
    assert found.steps.tolist() == [[1.0], [0.5]]
    assert found.values.tolist() == [[7.0, -3.0, 0.0, 1.0], [0.0, 0.5, -3.5, 1.5]]


def test_eight_bits_by_hand() -> None:
    found = absmax_codes(torch.tensor([[-254.0, 3.2, 2.8, 100.9], [1.27, 0.004, -0.006, 0.0]]), 8)
    assert found.codes.tolist() == [[-127, 2, 1, 50], [127, 0, -1, 0]]
    torch.testing.assert_close(found.steps, torch.tensor([[2.0], [0.01]]))
    torch.testing.assert_close(
        found.values, torch.tensor([[-254.0, 4.0, 2.0, 100.0], [1.27, 0.0, -0.01, 0.0]])
    )


def test_groups_have_steps_of_their_own_and_the_last_may_be_short() -> None:
    found = absmax_codes(torch.tensor([[7.0, 3.4, 14.0, 3.4, 0.7]]), 4, group=2)
    assert found.codes.tolist() == [[7, 3, 7, 2, 7]]
    torch.testing.assert_close(found.steps, torch.tensor([[1.0, 2.0, 0.1]]))
    torch.testing.assert_close(found.values, torch.tensor([[7.0, 3.0, 14.0, 4.0, 0.7]]))
    assert found.codes.dtype == torch.int8


def test_zeros_stay_zero_and_huge_and_tiny_weights_do_not_overflow() -> None:
    weight = torch.tensor([[0.0, 0.0], [3e38, -1.5e38], [1e-38, 5e-39]])
    found = absmax_codes(weight, 8)
    assert found.codes.tolist()[0] == [0, 0] and found.values[0].tolist() == [0.0, 0.0]
    assert torch.isfinite(found.values).all() and found.codes[1:, 0].tolist() == [127, 127]


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 1, 3, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rows=st.integers(1, 4),
    width=st.integers(1, 130),
    seed=st.integers(0, 1000),
)
def test_laws_of_rounding(
    bits: int, group: int | None, dtype: torch.dtype, rows: int, width: int, seed: int
) -> None:
    weight = _random(rows, width, seed=seed, dtype=dtype)
    found = absmax_codes(weight, bits, group)
    last = 2 ** (bits - 1) - 1
    size = width if group is None else group
    assert found.values.shape == weight.shape and found.values.dtype == dtype
    assert found.steps.shape == (rows, -(-width // size))
    assert (
        int(found.codes.abs().max()) == last
    )  # the largest weight of a group sits on the last code
    steps = found.steps.double().repeat_interleave(size, 1)[:, :width]
    slack = 4 * torch.finfo(dtype).eps * weight.double().abs() + 1e-6 * steps
    assert (
        (found.codes.double() * steps - weight.double()).abs() <= steps / 2 + slack
    ).all()  # half a step
    assert ((found.values.double() - found.codes.double() * steps).abs() <= slack).all()
    again = absmax_codes(found.values, bits, group)
    assert torch.equal(again.codes, found.codes) and torch.equal(
        again.values, found.values
    )  # twice is once
    opposite = absmax_codes(-weight, bits, group)
    assert torch.equal(opposite.codes, -found.codes)  # symmetric
    double = absmax_codes(2 * weight, bits, group)
    assert torch.equal(double.codes, found.codes) and torch.equal(
        double.values, 2 * found.values
    )  # no unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_weight_keeps_every_bit(bits: int, dtype: torch.dtype) -> None:
    """Step times code would not: ``x / 7 * 7`` is another number than ``x`` in one case of
    eleven.
    """
    weight = _random(5000, 3, dtype=dtype)
    assert torch.equal(absmax_codes(weight, bits).values.abs().amax(1), weight.abs().amax(1))


def test_stacked_matrices_are_rounded_one_by_one() -> None:
    weight = _random(3, 4, 5)
    found = absmax_codes(weight, 4, 2)
    for index in range(3):
        alone = absmax_codes(weight[index], 4, 2)
        assert (
            torch.equal(found.codes[index], alone.codes)
            and torch.equal(found.steps[index], alone.steps)
            and torch.equal(found.values[index], alone.values)
        )


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "size"), [(8, None, None), (4, None, GROUP), (4, 8, 8), (8, 6, 6)]
)
def test_every_linear_map_of_a_llama_and_nothing_else(
    make_model: ModelMaker, bits: int, group: int | None, size: int | None
) -> None:
    llama = make_model(intermediate_size=GROUP + 24)  # wider than a group
    before = copy.deepcopy(llama.state_dict())
    found = quantised(llama, bits, group=group)
    after = dict(found.model.named_parameters())
    matrices = {name for name in before if "proj" in name}
    assert set(found.steps) == matrices and len(matrices) == 14
    for name, value in before.items():
        expected = absmax_codes(value, bits, size)
        assert torch.equal(after[name], expected.values if name in matrices else value), name
        assert name not in matrices or found.steps[name] == pytest.approx(
            float(expected.steps.mean())
        )
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert not found.model.training and all(p.requires_grad for p in found.model.parameters())
    assert {p.data_ptr() for p in llama.parameters()}.isdisjoint(
        {p.data_ptr() for p in found.model.parameters()}
    )


def test_quantising_twice_is_quantising_once(llama: PreTrainedModel) -> None:
    once = quantised(llama, 4).model
    assert len(_same(once, quantised(once, 4).model)) == len(list(llama.parameters()))


def test_bf16_stays_bf16(llama: PreTrainedModel) -> None:
    found = quantised(llama.to(torch.bfloat16), 8)
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(
        found.model.get_parameter(name), absmax_codes(llama.get_parameter(name), 8).values
    )


def test_eight_bits_change_a_model_less_than_four(llama: PreTrainedModel, batch: Batch) -> None:
    with torch.no_grad():
        plain, eight, four = (
            model(**batch.inputs).logits
            for model in (llama, quantised(llama, 8).model, quantised(llama, 4).model)
        )
    assert 0 < (eight - plain).norm() < (four - plain).norm() / 4


def test_an_untied_head_is_rounded_only_when_asked(llama: PreTrainedModel) -> None:
    found = quantised(llama, 8, head=True)
    assert "lm_head.weight" in found.steps
    assert torch.equal(found.model.lm_head.weight, absmax_codes(llama.lm_head.weight, 8).values)
    assert torch.equal(found.model.model.embed_tokens.weight, llama.model.embed_tokens.weight)


def test_a_tied_head_gets_a_parameter_of_its_own(
    make_model: ModelMaker, batch: Batch, tmp_path: Path
) -> None:
    model = make_model(tie_word_embeddings=True)
    plain = quantised(model, 8).model
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    found = quantised(model, 8, head=True)
    assert torch.equal(found.model.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(found.model.lm_head.weight, absmax_codes(model.lm_head.weight, 8).values)
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    )
    found.model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)(**batch.inputs).logits,
            found.model(**batch.inputs).logits,
        )


def test_gpt2_is_rounded_along_its_inputs_too() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32)
        ).eval()
    found = quantised(model, 8)
    assert len(found.steps) == 8
    for name in found.steps:
        stored = model.get_parameter(name)  # [in, out]
        assert torch.equal(found.model.get_parameter(name).T, absmax_codes(stored.T, 8).values), (
            name
        )
    assert _same(model, found.model) == {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    } - set(found.steps)
    assert found.model.transformer.h[0].attn.c_attn.weight.is_contiguous()


SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "head_dim": 4,
}


@pytest.mark.parametrize(("kind", "transposed"), [("Mixtral", False), ("GptOss", True)])
def test_fused_experts_are_rounded_expert_by_expert(kind: str, transposed: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**SHAPE)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    found = quantised(model, 8)
    experts = [name for name in found.steps if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 2 and len(found.steps) == 6
    for name in experts:
        ours, theirs = model.get_parameter(name), found.model.get_parameter(name)
        for expert in range(4):
            one, two = (
                (ours[expert].T, theirs[expert].T) if transposed else (ours[expert], theirs[expert])
            )
            assert torch.equal(two, absmax_codes(one, 8).values)
    assert any("router" in name or "gate.weight" in name for name in _same(model, found.model))


# --- what survives --------------------------------------------------------------------------------


def _one_matrix(model: PreTrainedModel, weight: Tensor) -> PreTrainedModel:
    """The model with zeros in every linear map but one, whose first row begins with ``weight``."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "proj" in name:
                parameter.zero_()
        changed.model.layers[0].mlp.up_proj.weight[0, : len(weight)] = weight
    return changed


def test_a_change_by_hand(llama: PreTrainedModel) -> None:
    # A step of 1. Codes (7, 2, 0, 1) and (7, 2, 1, 1): the second weight keeps its code, the third
    # does not, the last does not change.
    base, unlearned = (
        _one_matrix(llama, torch.tensor(row))
        for row in ([7.0, 2.0, 0.4, 1.0], [7.0, 2.3, 0.6, 1.0])
    )
    found = surviving_share(base, unlearned, 4)
    weights = sum(
        parameter.numel() for name, parameter in base.named_parameters() if "proj" in name
    )
    assert found.share == 1 / weights and found.changed == 2 / weights
    assert found.shares["model.layers.0.mlp.up_proj.weight"] == 1 / (24 * 16) and sum(
        found.shares.values()
    ) == 1 / (24 * 16)
    delta, kept = torch.tensor([0.0, 0.3, 0.2, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert found.carried == pytest.approx(float(delta @ kept / (delta @ delta)), rel=1e-5)
    assert found.cosine == pytest.approx(
        float(delta @ kept / (delta.norm() * kept.norm())), rel=1e-5
    )


def test_a_change_below_half_a_step_may_vanish(llama: PreTrainedModel) -> None:
    base, unlearned = (_one_matrix(llama, torch.tensor(row)) for row in ([7.0, 2.0], [7.0, 2.4]))
    found = surviving_share(base, unlearned, 4)
    assert (
        (found.share, found.carried) == (0.0, 0.0)
        and found.changed > 0
        and math.isnan(found.cosine)
    )
    assert len(_same(quantised(base, 4).model, quantised(unlearned, 4).model)) == len(
        list(llama.parameters())
    )


def test_a_model_and_itself(llama: PreTrainedModel) -> None:
    found = surviving_share(llama, llama, 8)
    assert (
        (found.share, found.changed) == (0.0, 0.0)
        and math.isnan(found.carried)
        and math.isnan(found.cosine)
    )
    assert set(found.shares) == set(quantised(llama, 8).steps)


@pytest.mark.parametrize(("bits", "head"), [(8, False), (4, False), (8, True)])
def test_shares_are_those_of_the_quantised_models(
    make_model: ModelMaker, nearby: Callable[..., PreTrainedModel], bits: int, head: bool
) -> None:
    base = make_model(tie_word_embeddings=True)
    unlearned = nearby(base, size=0.01)
    before = copy.deepcopy(base.state_dict())
    found = surviving_share(base, unlearned, bits, group=8, head=head)
    one, two = (quantised(model, bits, group=8, head=head) for model in (base, unlearned))
    assert set(found.shares) == set(one.steps) and ("lm_head.weight" in found.shares) is head
    along, square, differ, total = 0.0, 0.0, 0, 0
    for name, share in found.shares.items():
        before_after = [
            model.get_parameter(name.replace("lm_head", "model.embed_tokens")).detach()
            for model in (base, unlearned)
        ]
        ours, theirs = (absmax_codes(weight, bits, 8) for weight in before_after)
        assert share == pytest.approx(float((ours.codes != theirs.codes).float().mean()))
        delta = before_after[1].double() - before_after[0].double()
        kept = (
            two.model.get_parameter(name).detach().double()
            - one.model.get_parameter(name).detach().double()
        )
        along, square = along + float((delta * kept).sum()), square + float(delta.square().sum())
        differ, total = differ + int((ours.codes != theirs.codes).sum()), total + delta.numel()
    assert (
        found.carried == pytest.approx(along / square, rel=1e-6) and found.share == differ / total
    )
    assert base.lm_head.weight is base.model.embed_tokens.weight and all(
        torch.equal(value, before[name]) for name, value in base.state_dict().items()
    )


def test_a_small_change_is_carried_on_average_by_few_codes(make_model: ModelMaker) -> None:
    """Weights lie anywhere between two codes, so a change of a twentieth of a step moves one code
    in twenty by a whole step: the mean survives, under noise.
    """
    base = make_model(hidden_size=128, intermediate_size=256, head_dim=32)
    unlearned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in unlearned.named_parameters():
            if "proj" in name:
                largest = parameter.abs() == parameter.abs().amax(1, keepdim=True)
                step = parameter.abs().amax(1, keepdim=True) / 7
                parameter.add_(
                    torch.where(largest, 0.0, step / 20 * _random(*parameter.shape, seed=3).sign())
                )
    found = surviving_share(base, unlearned, 4, group=256)
    assert found.share == pytest.approx(1 / 20, rel=0.05)
    assert found.carried == pytest.approx(1, abs=0.05)
    assert found.cosine == pytest.approx(math.sqrt(1 / 20), rel=0.05)
    assert f"{found.share:.2%}" in found._repr_html_()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 2, 3, 16])
def test_only_four_and_eight_bits(llama: PreTrainedModel, bits: int) -> None:
    for attempt in (
        lambda: quantised(llama, bits),
        lambda: surviving_share(llama, llama, bits),
        lambda: absmax_codes(torch.ones(2, 2), bits),
    ):
        with pytest.raises(WorkbenchError, match=f"4 or 8 bits; got {bits}"):
            attempt()


def test_bad_input_is_named(make_model: ModelMaker, llama: PreTrainedModel) -> None:
    with pytest.raises(WorkbenchError, match="group of 0 weights"):
        quantised(llama, 4, group=0)
    with pytest.raises(WorkbenchError, match="unknown kind of quantisation 'nf4'"):
        quantised(llama, 4, kind="nf4")  # type: ignore[arg-type]
    with pytest.raises(WorkbenchError, match="same linear maps"):
        surviving_share(llama, make_model(intermediate_size=32))
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(
        WorkbenchError, match=r"model.layers.1.self_attn.q_proj.weight: a weight is NaN"
    ):
        quantised(broken)
    integer = copy.deepcopy(llama)
    integer.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.ones(24, 16, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        WorkbenchError, match=r"up_proj.weight holds torch.int8: this model is quantised already"
    ):
        quantised(integer)
