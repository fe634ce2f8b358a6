"""Every family of architectures in the table: the named sites hold what their names say, and the
model does not notice.

The expectations come from the model's own equations (hidden states, residual sums, ``weight.grad =
sum of grad_out times input``) and from TransformerLens, never from the table under test. Tiny
random models with large weights, so that no part is near linear; nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_families import CONFIGS, build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.hooks import (
    Capture,
    CaptureError,
    Collect,
    Rows,
    Site,
    all_sites,
    as_bridge,
    as_cache,
    peek,
    real_tokens,
    resolve,
)
from workbench.hooks.families import FAMILIES

PARALLEL = ("gpt_neox", "phi")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
every_family = pytest.mark.parametrize("kind", CONFIGS)

# Paths of the list of blocks and of the final norm as the classes of transformers call them, where
# they differ from Llama's.
_BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gpt_neox sequential": "gpt_neox.layers",
    "gemma3": "model.language_model.layers",
}
_FINAL_NORM = {
    "gpt2": "transformer.ln_f",
    "phi": "model.final_layernorm",
    "gemma3": "model.language_model.norm",
}
_FINAL_NORM |= dict.fromkeys(("gpt_neox", "gpt_neox sequential"), "gpt_neox.final_layer_norm")
# Which modules read the residual stream at the start and in the middle of a block; most families
# put a norm before each sublayer.
_READERS = {
    "olmo2": (("attn",), ("mlp",)),
    "olmo3": (("attn",), ("mlp",)),
    "gpt_neox": (("ln1", "ln2"), ()),
    "phi": (("ln1",), ()),
}


def inputs(lengths: Iterable[int] = (7, 5, 6), *, side: str = "right") -> dict[str, Tensor]:
    """A padded batch; the padding holds an ordinary token, so that whatever reads it changes its
    value.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 47, (length,), generator=generator) for length in lengths]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=11, padding_side=side
        ),
        "attention_mask": nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True, padding_side=side
        ),
    }


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def rows_of(model: nn.Module, sites: str | list[str], batch: dict[str, Tensor]) -> Collect:
    """The rows of the real tokens in one training step of transformers' own loss; leaves the
    gradients on the parameters.
    """
    rows = Collect()
    model.zero_grad()
    with Capture(model, sites, rows, at=real_tokens):
        model(**labelled(batch)).loss.backward()
    return rows


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal shapes, and no entry further away than ``tolerance`` times the largest entry."""
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance


def linears(kind: str, model: nn.Module) -> dict[str, nn.Module]:
    """Every matrix inside the blocks that is a module of its own."""
    inside = f"{_BLOCKS.get(kind, 'model.layers')}."
    return {
        path: module
        for path, module in model.named_modules()
        if path.startswith(inside) and isinstance(module, nn.Linear | Conv1D)
    }


def router_of(kind: str) -> str:
    return "router" if kind == "gpt_oss" else "gate"


def hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def test_every_family_of_the_table_is_tested_here() -> None:
    assert {config().model_type for config in CONFIGS.values()} == set(FAMILIES)


# --- against the model's own equations ------------------------------------------------------------


@every_family
def test_the_residual_stream_is_the_models_own_hidden_states(kind: str) -> None:
    model, batch, rows = build(kind), inputs(), Collect()
    names = [
        "hook_embed",
        "blocks.*.hook_resid_pre",
        "blocks.*.hook_resid_post",
        "ln_final.hook_out",
    ]
    with torch.no_grad(), Capture(model, names, rows, at=real_tokens):
        hidden = model(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    assert len(hidden) == 3
    embedded = rows["hook_embed"]
    if kind == "gpt2":  # the only family here that adds a vector per position
        embedded = (
            embedded
            + peek(model, batch, "hook_pos_embed")["hook_pos_embed"].expand(len(mask), -1, -1)[mask]
        )
    assert torch.equal(embedded, hidden[0][mask])
    assert torch.equal(rows["blocks.0.hook_resid_pre"], hidden[0][mask])
    assert torch.equal(rows["blocks.0.hook_resid_post"], hidden[1][mask])
    assert torch.equal(rows["blocks.1.hook_resid_pre"], hidden[1][mask])
    # transformers reports the last hidden state behind the final norm.
    last = peek(model, batch, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
    assert torch.equal(rows["blocks.1.hook_resid_post"], last[mask])
    assert torch.equal(model.get_submodule(_FINAL_NORM.get(kind, "model.norm"))(last), hidden[2])
    assert torch.equal(rows["ln_final.hook_out"], hidden[2][mask])


@every_family
def test_sublayers_add_up_along_the_residual_stream(kind: str) -> None:
    values = peek(build(kind), inputs(), "blocks.*.hook_*")
    for layer in range(2):
        pre, mid, post, attn, mlp = (
            values.get(f"blocks.{layer}.hook_{name}")
            for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
        )
        if kind in PARALLEL:
            torch.testing.assert_close(post, pre + attn + mlp)
        else:
            assert torch.equal(mid, pre + attn)
            assert torch.equal(post, mid + mlp)


@pytest.mark.parametrize("kind", PARALLEL)
def test_a_parallel_family_has_no_point_between_its_sublayers_and_says_so(kind: str) -> None:
    with pytest.raises(
        CaptureError,
        match=r"unknown site 'blocks\.0\.hook_resid_mid'; nearest: .*blocks\.0\.hook_resid_p(re|ost)",  # noqa: E501
    ):
        resolve(build(kind), "blocks.0.hook_resid_mid")


@every_family
def test_inputs_times_output_gradients_sum_to_every_weight_gradient(kind: str) -> None:
    model = build(kind)
    paths = linears(kind, model)
    rows = rows_of(
        model,
        [f"{path}:{side}" for path in paths for side in ("in", "grad_in", "grad_out")],
        inputs(),
    )
    for path, module in paths.items():
        into, grad_in, grad_out = (rows[f"{path}:{side}"] for side in ("in", "grad_in", "grad_out"))
        product, weight = grad_out.T @ into, module.weight.detach()
        if isinstance(module, Conv1D):  # stores the transposed matrix
            product, weight = product.T, weight.T
        assert_near(product, module.weight.grad)
        # The gradient at an input is that of its own module alone, whatever else reads the same
        # tensor.
        assert_near(grad_in, grad_out @ weight)
        if module.bias is not None:
            assert_near(grad_out.sum(0), module.bias.grad)
    inside = _BLOCKS.get(kind, "model.layers") + "."
    matrices = {
        name
        for name, parameter in model.named_parameters()
        if name.startswith(inside) and parameter.ndim > 1
    }
    left = {
        name
        for name in matrices - {f"{path}.weight" for path in paths}
        if ".mlp.experts." not in name
    }
    assert left == (
        {f"{inside}{layer}.mlp.{router_of(kind)}.weight" for layer in range(2)}
        if kind in MIXTURES
        else set()
    ), "a matrix was not checked"


@every_family
@pytest.mark.parametrize("order", [1, -1], ids=["stream before readers", "readers before stream"])
def test_the_gradient_of_the_stream_is_that_of_its_skip_and_of_its_readers_together(
    kind: str, order: int
) -> None:
    # The chain rule for resid_post = resid_mid + mlp(ln2(resid_mid)), and for the other layouts, in
    # whichever order the sites are asked for.
    starts, middles = _READERS.get(kind, (("ln1",), ("ln2",)))
    names = [
        f"blocks.*.hook_resid_{part}_grad"
        for part in ("pre", "mid", "post")
        if part != "mid" or middles
    ]
    names += [f"blocks.*.{reader}.hook_in_grad" for reader in starts + middles]
    rows = rows_of(build(kind), names[::order], inputs())
    for layer in range(2):
        stream = rows[f"blocks.{layer}.hook_resid_post_grad"]
        if middles:
            stream = stream + sum(
                rows[f"blocks.{layer}.{reader}.hook_in_grad"] for reader in middles
            )
            assert_near(rows[f"blocks.{layer}.hook_resid_mid_grad"], stream)
        stream = stream + sum(rows[f"blocks.{layer}.{reader}.hook_in_grad"] for reader in starts)
        assert_near(rows[f"blocks.{layer}.hook_resid_pre_grad"], stream)


@every_family
def test_outputs_are_bit_identical_while_every_site_is_tapped_and_afterwards(kind: str) -> None:
    model, batch = build(kind), inputs()
    names = [site.name for site in all_sites(model)]
    names += [
        f"{name}_grad" for name in names if "pos_embed" not in name
    ]  # computed once for the whole batch, so no gradient per example
    reference, before = model(**batch).logits, hook_count(model)
    with Capture(model, names, Collect(), at=real_tokens):
        assert hook_count(model) > before
        output = model(**labelled(batch))
        output.loss.backward()
    assert torch.equal(output.logits, reference)
    assert hook_count(model) == before
    assert torch.equal(model(**batch).logits, reference)


@every_family
def test_a_forward_that_raises_comes_out_as_it_is_and_leaves_no_trace(kind: str) -> None:
    model, batch = build(kind), inputs()
    reference, before = model(**batch).logits, hook_count(model)

    def interrupt(*_: object) -> None:
        raise KeyError("planted")

    planted = model.get_submodule(
        f"{_BLOCKS.get(kind, 'model.layers')}.1.mlp"
    ).register_forward_pre_hook(interrupt)
    names = [f"{site.name}{end}" for site in all_sites(model) for end in ("", "_grad")]
    with pytest.raises(KeyError, match="planted"), Capture(model, names, Collect(), at=real_tokens):
        model(**batch)
    planted.remove()
    assert hook_count(model) == before
    assert torch.equal(model(**batch).logits, reference)


_QKV = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
# What the forward passes of transformers do to the last dimension of each fused output, to be done
# to the numbers of its columns.
_Split = tuple[tuple[str, ...], Callable[[Tensor], Iterable[Tensor]]]
_FUSED: dict[str, dict[str, _Split]] = {
    "gpt2": {"c_attn": (_QKV, lambda columns: columns.split(16))},
    "gpt_neox": {"query_key_value": (_QKV, lambda columns: columns.view(4, 12).chunk(3, -1))},
    "gpt_neox sequential": {
        "query_key_value": (_QKV, lambda columns: columns.view(4, 12).chunk(3, -1))
    },
    "phi3": {
        "qkv_proj": (
            _QKV,
            lambda columns: columns.split([16, 8, 8]),
        ),  # four heads of 4 columns read two heads of keys and values
        "gate_up_proj": (("mlp.hook_pre", "mlp.hook_pre_linear"), lambda columns: columns.chunk(2)),
    },
}


@pytest.mark.parametrize(
    ("kind", "matrix"), [(kind, matrix) for kind, matrices in _FUSED.items() for matrix in matrices]
)
def test_the_parts_of_a_fused_output_share_out_its_columns_and_their_gradients(
    kind: str, matrix: str
) -> None:
    model, batch = build(kind), inputs()
    mask, (names, split) = batch["attention_mask"].bool(), _FUSED[kind][matrix]
    for layer, (path, module) in enumerate(
        (path, module) for path, module in linears(kind, model).items() if path.endswith(matrix)
    ):
        width = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        parts = {
            f"blocks.{layer}.{name}": columns.flatten()
            for name, columns in zip(names, split(torch.arange(width)), strict=True)
        }
        named = [
            column
            for name in parts
            for start, stop in resolve(model, name)[0].columns
            for column in range(start, stop)
        ]
        assert sorted(named) == list(range(width))
        values = peek(model, batch, [f"{path}:out", *parts])
        rows = rows_of(
            model,
            [f"{path}:out", f"{path}:grad_out", *parts, *(f"{name}_grad" for name in parts)],
            batch,
        )
        for name, columns in parts.items():
            assert torch.equal(values[name], values[f"{path}:out"][..., columns])
            assert torch.equal(rows[name], values[name][mask])
            assert torch.equal(rows[f"{name}_grad"], rows[f"{path}:grad_out"][:, columns])


# --- against TransformerLens ----------------------------------------------------------------------


@lru_cache
def bridged(kind: str) -> tuple[hf.PreTrainedModel, Any]:
    """A model under eager attention (the bridge's) and its bridge; shared, so tests must leave both
    as they are.
    """
    pytest.importorskip("transformer_lens", reason="the dev extra is not installed")
    model = build(kind)
    model.set_attn_implementation("eager")
    return model, as_bridge(model)


@every_family
def test_every_site_has_the_value_that_transformer_lens_has_under_that_name(kind: str) -> None:
    model, bridge = bridged(kind)
    batch = inputs((7, 7))
    names = [site.name for site in all_sites(model)]
    _, theirs = bridge.run_with_cache(batch["input_ids"])
    ours = as_cache(peek(model, batch, names), bridge)
    assert set(ours.keys()) == set(names)
    for name in names:
        assert_near(ours[name], theirs[name])


@every_family
def test_gradients_of_the_stream_and_of_sublayer_outputs_are_those_of_transformer_lens(
    kind: str,
) -> None:
    model, bridge = bridged(kind)
    batch = inputs((7, 7))
    names = [
        f"blocks.{layer}.hook_{part}"
        for layer in range(2)
        for part in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    ]
    loss, theirs = bridge.run_with_cache(
        batch["input_ids"], return_type="loss", incl_bwd=True, names_filter=names
    )
    bridge.zero_grad()
    # Only equal losses have equal gradients: both are means over the predicted tokens.
    assert_near(loss.detach(), model(**labelled(batch)).loss.detach())
    ours = rows_of(model, [f"{name}_grad" for name in names], batch)
    for name in names:
        assert_near(ours[f"{name}_grad"], theirs[f"{name}_grad"].flatten(0, 1))


@every_family
def test_a_bridge_leaves_the_original_untouched(kind: str) -> None:
    pytest.importorskip("transformer_lens", reason="the dev extra is not installed")
    model, batch = build(kind), inputs()
    config, weights = (
        copy.deepcopy(model.config),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    parts = [(name, type(module)) for name, module in model.named_modules()]
    reference = model(**batch).logits
    assert config._attn_implementation == "sdpa" or kind in (
        "gemma2",
        "gpt_oss",
    )  # capped scores and attention sinks have no other kernel than eager
    bridge = as_bridge(model)
    bridge(batch["input_ids"], return_type="loss").backward()
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(1.0)  # a shared parameter would move along
    assert model.config.to_dict() == config.to_dict()
    assert (model.config._attn_implementation, model.config.architectures) == (
        config._attn_implementation,
        config.architectures,
    )
    assert [(name, type(module)) for name, module in model.named_modules()] == parts
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hook_count(model) == 0
    assert torch.equal(model(**batch).logits, reference)


def _components(prefix: str, component: Any, path: str) -> Iterator[tuple[str, str]]:
    """``(TransformerLens name, module path)`` of a component and everything below it; a block
    stands for block 0.
    """
    if prefix == "blocks":
        prefix, path = "blocks.0", f"{path}.0"
    yield prefix, path
    for name, below in (getattr(component, "submodules", None) or {}).items():
        if below.name is not None:
            yield from _components(f"{prefix}.{name}", below, f"{path}.{below.name}")


# No stream of vectors: rotary embeddings return (cos, sin), embeddings read indices, q and k norms
# are per head, and of an image there are no tokens here. TransformerLens fires no hook on the fused
# "attn.qkv" as a whole, and has "dense_" components for a mixture whose first layers have no
# experts.
_NOT_NAMED = ("rotary_emb", "blocks.0.mlp.dense_", ".q_norm", ".k_norm", ".attn.qkv", "vision_")


@every_family
def test_every_component_of_the_adapter_is_the_same_module_here(kind: str) -> None:
    pytest.importorskip("transformer_lens", reason="the dev extra is not installed")
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    model = build(kind)
    config = build_bridge_config_from_hf(model.config, type(model).__name__, "tiny", torch.float32)
    mapping = ArchitectureAdapterFactory.select_architecture_adapter(config).component_mapping
    modules, checked = dict(model.named_modules()), set()
    for top, component in mapping.items():
        for theirs, path in _components(top, component, component.name):
            for port in ("in", "out"):
                name = f"{theirs}.hook_{port}"
                cut = (
                    path not in modules
                )  # TransformerLens cuts q, k, v, gate and up out of a fused matrix
                if any(part in name for part in _NOT_NAMED) or name in (
                    "embed.hook_in",
                    "pos_embed.hook_in",
                ):
                    continue
                if (
                    cut and port == "in"
                ):  # the input of a fused matrix has one name, that of the whole
                    with pytest.raises(CaptureError, match="unknown site"):
                        resolve(model, name)
                    continue
                (site,) = resolve(model, name)
                assert (site.side, bool(site.columns)) == (port, cut)
                assert (
                    (site.path.rpartition(".")[2] in _FUSED[kind]) if cut else (site.path == path)
                )
                checked.add(theirs)
    parts = (
        "attn",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.o",
        "mlp",
        f"mlp.{router_of(kind)}" if kind in MIXTURES else "mlp.out",
    )
    assert {
        "embed",
        "blocks.0",
        "ln_final",
        "unembed",
        *(f"blocks.0.{part}" for part in parts),
    } <= checked


# --- mixtures of experts, and padding -------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXTURES)
def test_rows_of_a_router_and_of_its_layer_are_those_of_the_chosen_positions(kind: str) -> None:
    # The router sees [batch * position, width], so its rows can only be right if positions are
    # counted as the batch is flattened.
    model, batch, router = build(kind), inputs(), f"blocks.1.mlp.{router_of(kind)}"
    names = [
        f"{router}.hook_in",
        f"{router}.hook_out",
        "blocks.1.mlp.hook_in",
        "blocks.1.mlp.hook_out",
    ]
    chosen = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(3)) < 0.5
    seen: list[tuple[Site, Rows]] = []
    with Capture(model, names, lambda site, rows: seen.append((site, rows))) as capture:
        capture.at(chosen)
        capture.forward(batch)
    expected = (chosen & batch["attention_mask"].bool()).nonzero()  # padding is never chosen
    values = peek(model, batch, "blocks.1.*")
    into, out = (
        values["blocks.1.mlp.hook_in"],
        values["blocks.1.hook_resid_post"] - values["blocks.1.hook_resid_mid"],
    )
    module = model.get_submodule(f"model.layers.1.mlp.{router_of(kind)}")
    logits = F.linear(into, module.weight, getattr(module, "bias", None)).detach()
    by_name = {site.name: rows for site, rows in seen}
    for name, whole in zip(names, (into, logits, into, out), strict=True):
        assert torch.equal(by_name[name].where, expected)
        assert_near(by_name[name].values, whole[expected[:, 0], expected[:, 1]])


@pytest.mark.parametrize("kind", MIXTURES)
def test_gradients_of_a_router_sum_to_its_weight_gradient_and_split_the_layers(kind: str) -> None:
    model, router = build(kind), f"blocks.0.mlp.{router_of(kind)}"
    experts = "model.layers.0.mlp.experts:grad_in"
    rows = rows_of(
        model,
        [
            f"{router}.hook_in",
            f"{router}.hook_in_grad",
            f"{router}.hook_out_grad",
            "blocks.0.mlp.hook_in_grad",
            experts,
        ],
        inputs(),
    )
    weight = model.get_submodule(f"model.layers.0.mlp.{router_of(kind)}").weight
    assert_near(rows[f"{router}.hook_out_grad"].T @ rows[f"{router}.hook_in"], weight.grad)
    assert_near(rows[f"{router}.hook_in_grad"], rows[f"{router}.hook_out_grad"] @ weight.detach())
    # The router and the experts read the same vectors; the gradient at the layer's input is the sum
    # of theirs.
    assert_near(rows["blocks.0.mlp.hook_in_grad"], rows[f"{router}.hook_in_grad"] + rows[experts])


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.0.mlp.experts.gate_up_proj:in",
        "model.layers.*.mlp.experts.1.down_proj:grad_out",
    ],
)
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_inside_of_an_expert_is_refused_with_what_can_be_tapped_instead(
    kind: str, path: str
) -> None:
    with pytest.raises(
        CaptureError,
        match=rf"experts.*mlp\.hook_in.*mlp\.hook_out.*mlp\.{router_of(kind)}\.hook_out",
    ):
        resolve(build(kind), path)


def test_a_dense_layer_inside_a_mixture_works_like_any_other() -> None:
    model, batch = build("qwen3_moe", mlp_only_layers=[0]), inputs()
    assert {site.layer for site in resolve(model, "blocks.*.mlp.gate.hook_out")} == {
        1
    }  # only the second layer has a router
    values = peek(model, batch, [site.name for site in all_sites(model)])
    for layer in range(2):
        assert torch.equal(
            values[f"blocks.{layer}.hook_resid_post"],
            values[f"blocks.{layer}.hook_resid_mid"] + values[f"blocks.{layer}.mlp.hook_out"],
        )
    down = "model.layers.0.mlp.down_proj"
    rows = rows_of(model, [f"{down}:in", f"{down}:grad_out", "blocks.0.hook_mlp_out_grad"], batch)
    assert_near(
        rows[f"{down}:grad_out"].T @ rows[f"{down}:in"], model.get_submodule(down).weight.grad
    )
    assert torch.equal(rows["blocks.0.hook_mlp_out_grad"], rows[f"{down}:grad_out"])


def test_positions_counted_from_the_left_edge_refuse_padding_on_the_left() -> None:
    with pytest.raises(CaptureError, match=r"padded on the left.*position_ids"):
        with Capture(
            build("gpt2"), "blocks.*.hook_resid_post", Collect(), at=real_tokens
        ) as capture:
            capture.forward(inputs(side="left"))


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_those_of_its_texts_run_one_by_one(kind: str, side: str) -> None:
    model, batch, rows = build(kind), inputs(side=side), Collect()
    mask = batch["attention_mask"].bool()
    if (
        kind == "gpt2"
    ):  # the other families rotate by differences of positions, which padding does not change
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    names = ["blocks.*.attn.hook_z", "blocks.*.hook_resid_post", "ln_final.hook_out"]
    with Capture(model, names, rows, at=real_tokens) as capture:
        capture.forward(batch)
    alone = [
        peek(model, {"input_ids": ids[real][None]}, names)
        for ids, real in zip(batch["input_ids"], mask, strict=True)
    ]
    for name in alone[0]:
        assert_near(rows[name], torch.cat([single[name][0] for single in alone]))
