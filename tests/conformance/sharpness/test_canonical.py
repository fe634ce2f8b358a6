"""Function-identical rewrites of Llama-like models, made by hand: they change curvature, and
canonical weights undo them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.sharpness.canonical import FAMILIES, canonicalise, invariances
from workbench.sharpness.curvature import Curvature, spectrum_ends
from workbench.sharpness.trace import relative_flatness, trace

ModelMaker = Callable[..., PreTrainedModel]

SIZE, GROUP, KV = 4, 2, 2  # of a head, query heads per key-value head, key-value heads
MATRICES = ("*layers.0.self_attn.?_proj.weight", "*layers.0.mlp.*_proj.weight")


def draws(seed: int, *shape: int) -> Tensor:
    """Log-normal factors."""
    return (0.7 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).exp()


def rescale_units(model: PreTrainedModel) -> None:
    for number, layer in enumerate(model.model.layers):
        factor = draws(10 + number, 24)
        layer.mlp.up_proj.weight.mul_(factor[:, None])
        layer.mlp.down_proj.weight.div_(factor)
        if layer.mlp.up_proj.bias is not None:
            layer.mlp.up_proj.bias.mul_(factor)


def change_value_basis(model: PreTrainedModel) -> None:
    for number, layer in enumerate(model.model.layers):
        value, out = layer.self_attn.v_proj, layer.self_attn.o_proj
        for head in range(KV):
            basis = torch.eye(SIZE) + 0.4 * torch.randn(
                SIZE, SIZE, generator=torch.Generator().manual_seed(20 + 5 * number + head)
            )
            rows = slice(head * SIZE, (head + 1) * SIZE)
            value.weight[rows] = basis @ value.weight[rows]
            if value.bias is not None:
                value.bias[rows] = basis @ value.bias[rows]
            for query in range(head * GROUP, (head + 1) * GROUP):
                columns = slice(query * SIZE, (query + 1) * SIZE)
                out.weight[:, columns] = out.weight[:, columns] @ torch.linalg.inv(basis)


def move_gains(model: PreTrainedModel) -> None:
    for number, layer in enumerate(model.model.layers):
        for offset, norm, readers in (
            (
                0,
                layer.input_layernorm,
                (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            ),
            (1, layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            factor = draws(30 + 2 * number + offset, 16) * torch.where(
                torch.arange(16) % 3 == 0, -1.0, 1.0
            )  # gains may be negative
            norm.weight.mul_(factor)
            for reader in readers:
                reader.weight.div_(factor)


def rescale_frequencies(model: PreTrainedModel) -> None:
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if (
            model.config.model_type == "qwen3"
        ):  # the norms of queries and keys undo any scale before them; their gains can trade it
            factor = draws(40 + number, SIZE // 2).repeat(2)
            attention.q_norm.weight.mul_(factor)
            attention.k_norm.weight.div_(factor)
            continue
        factor = draws(40 + number, KV, SIZE // 2).repeat(
            1, 2
        )  # entry i of a head rotates with entry i + size / 2
        keys, queries = factor.reshape(-1), factor.repeat_interleave(GROUP, dim=0).reshape(-1)
        for linear, scale in ((attention.q_proj, queries), (attention.k_proj, 1 / keys)):
            linear.weight.mul_(scale[:, None])
            if linear.bias is not None:
                linear.bias.mul_(scale)


def move_final_gain(model: PreTrainedModel) -> None:
    factor = draws(50, 16)
    model.model.norm.weight.mul_(factor)
    model.lm_head.weight.div_(factor)


REWRITES = (rescale_units, change_value_basis, move_gains, rescale_frequencies, move_final_gain)


def rewritten(
    model: PreTrainedModel, *rewrites: Callable[[PreTrainedModel], None]
) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for rewrite in rewrites:
            rewrite(twin)
    return twin


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch.inputs).logits[batch.attention_mask.bool()]


def with_everything_random(model: PreTrainedModel) -> PreTrainedModel:
    """Gains and biases are constants in a fresh model; here they are not."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def apart(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """Largest relative distance between tensors of the same name."""
    pairs = [
        (p.detach(), q.detach()) for p, q in zip(one.parameters(), other.parameters(), strict=True)
    ]
    return max(float((p - q).norm() / p.norm().clamp(min=1e-3)) for p, q in pairs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_weights_compute_the_same_function_and_undo_every_rewrite(
    family: str, tied: bool, make_model: ModelMaker, batch: Batch
) -> None:
    model = with_everything_random(make_model(family, tie_word_embeddings=tied))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rewrites = REWRITES[:-1] if tied else REWRITES
    other = rewritten(model, *rewrites)
    torch.testing.assert_close(
        logits(other, batch), logits(model, batch), rtol=1e-3, atol=1e-4
    )  # the rewrites are what they claim to be
    assert apart(model, other) > 0.3
    one, two = canonicalise(model), canonicalise(other)
    torch.testing.assert_close(logits(one, batch), logits(model, batch), rtol=1e-3, atol=1e-4)
    assert apart(one, two) < 1e-3
    assert apart(one, canonicalise(one)) < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (one.lm_head.weight is one.model.embed_tokens.weight) == tied
    # The gauge itself.
    gains = [p for name, p in one.named_parameters() if name.endswith("layernorm.weight")]
    assert len(gains) == 4
    assert all(bool((gain == 1).all()) for gain in gains)
    assert bool((one.model.norm.weight == 1).all()) != tied
    for layer in one.model.layers:
        torch.testing.assert_close(
            layer.mlp.up_proj.weight.norm(dim=1), layer.mlp.down_proj.weight.norm(dim=0)
        )
        value = layer.self_attn.v_proj.weight.detach()
        if layer.self_attn.v_proj.bias is not None:
            value = torch.cat([value, layer.self_attn.v_proj.bias.detach()[:, None]], dim=1)
        for head in range(KV):
            gram_v = (
                value[head * SIZE : (head + 1) * SIZE] @ value[head * SIZE : (head + 1) * SIZE].T
            )
            out = layer.self_attn.o_proj.weight.detach()[
                :, head * GROUP * SIZE : (head + 1) * GROUP * SIZE
            ]
            gram_o = sum(
                out[:, q * SIZE : (q + 1) * SIZE].T @ out[:, q * SIZE : (q + 1) * SIZE]
                for q in range(GROUP)
            )
            torch.testing.assert_close(gram_v, gram_o, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(
                gram_v, torch.diag(torch.diagonal(gram_v)), rtol=0, atol=1e-4
            )


def test_biases_of_every_projection_are_handled(make_model: ModelMaker, batch: Batch) -> None:
    model = with_everything_random(make_model(attention_bias=True, mlp_bias=True))
    one, two = canonicalise(model), canonicalise(rewritten(model, *REWRITES))
    torch.testing.assert_close(logits(one, batch), logits(model, batch), rtol=1e-3, atol=1e-4)
    assert apart(one, two) < 1e-3
    assert not any(
        bool(layer.self_attn.v_proj.bias.any()) for layer in one.model.layers
    )  # attention weights sum to one, so it is a bias of o


@pytest.mark.parametrize("rewrite", REWRITES[:4], ids=lambda rewrite: rewrite.__name__)
def test_a_rewrite_changes_curvature_as_it_is_and_leaves_canonical_curvature_alone(
    rewrite: Callable[[PreTrainedModel], None], make_model: ModelMaker, batch: Batch
) -> None:
    model = with_everything_random(make_model())
    pair = (model, rewritten(model, rewrite))

    def measured(one: PreTrainedModel) -> tuple[float, float, float, float]:
        found = trace(
            one, [batch], parameters=MATRICES, relative_se=0, min_probes=2, max_products=4
        )
        gradient = Curvature(one, [batch], MATRICES).gradient()
        return (
            found.value,
            found.frobenius_squared[0],
            float(np.linalg.norm(gradient)),
            float(one.model.layers[0].mlp.up_proj.weight.detach().norm()),
        )

    raw, canonical = (
        [measured(one) for one in models] for models in (pair, [canonicalise(one) for one in pair])
    )
    np.testing.assert_allclose(canonical[0], canonical[1], rtol=5e-3)
    assert not np.allclose(raw[0][1:3], raw[1][1:3], rtol=0.02)


def test_both_ends_of_the_canonical_spectrum_do_not_see_a_rewrite(
    make_model: ModelMaker, batch: Batch
) -> None:
    model = with_everything_random(make_model())
    other = rewritten(model, *REWRITES)
    chosen = ("*layers.1.self_attn.?_proj.weight",)
    one, two = (
        spectrum_ends(canonicalise(each), [batch], 2, parameters=chosen, tolerance=1e-4)
        for each in (model, other)
    )
    np.testing.assert_allclose(one.top, two.top, rtol=1e-2)
    np.testing.assert_allclose(one.bottom, two.bottom, rtol=1e-2)
    raw = spectrum_ends(other, [batch], 2, parameters=chosen, tolerance=1e-4)
    assert abs(raw.top[0] / one.top[0] - 1) > 0.1


def test_relative_flatness_sees_another_input_basis_and_no_other_output_basis(
    make_model: ModelMaker, batch: Batch
) -> None:
    # As invariances() says: rows of v are output units, columns of o are input units. Here from the
    # definition, with the dense block of either layer.
    model = with_everything_random(make_model())
    other = rewritten(model, change_value_basis)
    v, o = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight"

    def kappa(each: PreTrainedModel, name: str) -> float:
        operator = Curvature(each, [batch], (name,))
        weight = dict(each.named_parameters())[name].detach().double().numpy()
        block = np.stack([operator.product(row) for row in np.eye(operator.size)]).reshape(
            *weight.shape, *weight.shape
        )
        return float(np.einsum("ac,bc,aibi->", weight, weight, block))

    assert kappa(model, v) == pytest.approx(kappa(other, v), rel=1e-3)
    assert kappa(model, o) != pytest.approx(kappa(other, o), rel=0.05)
    # The estimate does not either, probe by probe: (G W) U = G (W U).
    one, two = (
        relative_flatness(each, [batch], parameters=(v,), probes=3) for each in (model, other)
    )
    np.testing.assert_allclose(one[["kappa", "se"]], two[["kappa", "se"]], rtol=1e-3)


def test_a_vector_added_to_every_row_of_the_head_leaves_the_hessian_as_it_is(
    make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    vector = np.random.default_rng(0).standard_normal(model.num_parameters())
    one, two = (Curvature(each, [batch]).product(vector) for each in (model, other))
    assert np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(one)


def test_dead_units_and_zero_gains_stay_finite(make_model: ModelMaker, batch: Batch) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
        model.model.layers[0].mlp.down_proj.weight[:, 4] = 0
        model.model.layers[0].self_attn.v_proj.weight[:SIZE] = 0
        model.model.layers[1].input_layernorm.weight[2] = 0
    found = canonicalise(model)
    torch.testing.assert_close(logits(found, batch), logits(model, batch), rtol=1e-3, atol=1e-4)
    assert all(bool(torch.isfinite(p).all()) for p in found.parameters())


def test_a_half_precision_model_becomes_float32_and_keeps_its_mode_and_flags(
    make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model().to(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    found = canonicalise(model.train())
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert model.training
    assert found.training
    assert [p.requires_grad for p in found.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    torch.testing.assert_close(
        logits(found.eval(), batch), logits(model.float().eval(), batch), rtol=1e-3, atol=1e-4
    )


def test_other_architectures_are_refused_with_a_reason(make_model: ModelMaker) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16))
    with pytest.raises(WorkbenchError, match="gpt2"):
        canonicalise(gpt2)
    with pytest.raises(WorkbenchError, match="hidden_act"):
        canonicalise(make_model(hidden_act="relu"))
    odd = make_model()
    odd.model.layers[0].mlp.up_proj = torch.nn.Sequential(odd.model.layers[0].mlp.up_proj)
    with pytest.raises(WorkbenchError, match="Sequential"):
        canonicalise(odd)
    sick = make_model()
    with torch.no_grad():
        sick.lm_head.weight[3] = torch.nan
    with pytest.raises(WorkbenchError, match="logits"):
        canonicalise(sick)


def test_what_is_not_invariant_is_written_down() -> None:
    table = invariances()
    assert table.columns.tolist() == [
        "rewrite",
        "canonicalise",
        "curvature",
        "relative_flatness",
        "elementwise",
    ]
    assert len(table) == 11
    assert table["canonicalise"].str.startswith("left").sum() == 4
