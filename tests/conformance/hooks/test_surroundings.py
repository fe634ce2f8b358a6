"""The capture layer inside what is put around a model: half precision, checkpointing, frozen
parameters, LoRA, DistributedDataParallel.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy
from workbench.hooks import (
    Capture,
    CaptureError,
    Collect,
    MomentsOf,
    all_sites,
    edit,
    gradients_only,
    layer_count,
    real_tokens,
    resolve,
    steer,
    without_first,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]


def _gpt2(**changes: object) -> PreTrainedModel:
    shape = {
        "vocab_size": 50,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return GPT2LMHeadModel(
        GPT2Config(**shape, initializer_range=0.3, bos_token_id=1, eos_token_id=None, **changes)
    )


def _gpt_neox(**changes: object) -> PreTrainedModel:
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**shape, initializer_range=0.3, bos_token_id=1, eos_token_id=None, **changes)
    )


@pytest.fixture
def make(make_model: ModelMaker) -> ModelMaker:
    """``make(kind, **config)``: a tiny model of any of the families here."""

    def build(kind: str, **changes: object) -> PreTrainedModel:
        if kind not in ("gpt2", "gpt_neox"):
            return make_model(kind, **changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return (_gpt2 if kind == "gpt2" else _gpt_neox)(**changes).eval()

    return build


def _backward(model: nn.Module, batch: Batch) -> None:
    cross_entropy(model, batch).backward()  # type: ignore[arg-type]


def _look(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        model(**batch.inputs)


def _captured(
    model: nn.Module,
    sites: list[str],
    batch: Batch,
    run: Callable[[nn.Module, Batch], None] = _backward,
) -> Collect:
    rows = Collect()
    with Capture(model, sites, rows, at=real_tokens):
        run(model, batch)
    return rows


def _by_plain_hooks(
    model: nn.Module,
    sites: list[str],
    batch: Batch,
    run: Callable[[nn.Module, Batch], None] = _backward,
) -> dict[str, Tensor]:
    """What PyTorch's own hooks see in the same run, without this package's."""
    seen: dict[str, Tensor] = {}
    handles, mask = [], batch.attention_mask.bool()
    for site in resolve(model, sites):

        def before(
            _module: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            name: str = site.name,
        ) -> None:
            seen[name] = args[0] if args else kwargs["hidden_states"]

        def after(
            _module: nn.Module,
            _args: object,
            output: Tensor | tuple[Tensor, ...],
            name: str = site.name,
            gradient: bool = site.is_gradient,
        ) -> None:
            seen[name] = output if isinstance(output, Tensor) else output[0]
            if gradient:
                seen[name].retain_grad()

        module = model.get_submodule(site.path)
        assert (
            site.side != "grad_in"
        )  # autograd has no such thing for a tensor with several readers
        handles.append(
            module.register_forward_pre_hook(before, with_kwargs=True)
            if site.is_input
            else module.register_forward_hook(after)
        )
    run(model, batch)
    for handle in handles:
        handle.remove()
    return {
        name: (tensor.grad if name.endswith(("_grad", ":grad_out")) else tensor.detach())[mask]
        for name, tensor in seen.items()
    }  # type: ignore[index]


# --- bfloat16 -------------------------------------------------------------------------------------

MIXED = [
    "hook_embed",
    "blocks.*.hook_resid_post",
    "blocks.*.mlp.out.hook_in",
    "blocks.*.mlp.hook_out",
    "blocks.*.attn.q.hook_out",
    "blocks.*.ln1.hook_out",
]


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_arrive_in_the_dtype_the_model_computed_them_in(
    autocast: bool, make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model() if autocast else make_model().to(torch.bfloat16)

    def run(model: nn.Module, batch: Batch) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(**batch.inputs).logits
        logits.float().square().mean().backward()

    sites = [*MIXED, *(f"{site}_grad" for site in MIXED if not site.endswith("hook_in"))]
    rows, expected = _captured(model, sites, batch, run), _by_plain_hooks(model, sites, batch, run)
    assert set(rows.names()) == set(expected)
    for name, value in expected.items():
        assert rows[name].dtype == value.dtype and torch.equal(rows[name], value), name
    dtypes = {name: rows[name].dtype for name in rows.names()}
    assert set(dtypes.values()) == (
        {torch.float32, torch.bfloat16} if autocast else {torch.bfloat16}
    )
    assert dtypes["blocks.1.mlp.hook_out"] == dtypes["blocks.1.mlp.hook_out_grad"] == torch.bfloat16


def test_moments_of_bfloat16_rows_with_a_massive_dimension_are_those_of_float64(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model = make_model().to(torch.bfloat16)
    massive, site = 3, "blocks.0.hook_resid_post"
    model.get_input_embeddings().weight.data[:, massive] += 250.0
    rows, moments = Collect(), MomentsOf()
    with Capture(model, site, rows, moments, at=without_first) as capture:
        for seed in range(40):
            capture.forward(make_batch((40, 33, 25), seed).inputs)
    assert (
        rows[site].dtype == torch.bfloat16
        and moments[site].mean.dtype == moments[site].scatter.dtype == torch.float64
    )
    exact = rows[site].double()
    mean = exact.mean(0)
    covariance = (exact - mean).T @ (exact - mean) / len(exact)
    spread = covariance.diagonal().sqrt()
    assert float(mean[massive].abs() / spread[massive]) > 100

    def error(found: Tensor) -> float:
        return float(((found - covariance).abs() / torch.outer(spread, spread)).max())

    assert moments[site].count == len(exact) == 40 * 95
    assert float(((moments[site].mean - mean).abs() / spread).max()) < 1e-6
    assert error(moments[site].covariance) < 1e-6
    total, second = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16, 16, dtype=torch.bfloat16)
    for chunk in rows[site].split(95):
        total, second = total + chunk.sum(0), second + chunk.T @ chunk
    assert (
        error(
            second.double() / len(exact)
            - torch.outer(total.double(), total.double()) / len(exact) ** 2
        )
        > 1
    )  # more than the whole spread


# --- gradient checkpointing -----------------------------------------------------------------------


def _checkpoint(model: PreTrainedModel, reentrant: bool) -> None:
    # Renamed within transformers 5; the old name warns.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    # transformers checkpoints in training mode only; these configurations have no dropout
    model.train()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_checkpointed_blocks_of_a_frozen_model_deliver_every_site_once_per_pass(
    kind: str, reentrant: bool, make: ModelMaker, make_batch: BatchMaker
) -> None:
    model, plain = make(kind), make(kind)
    _checkpoint(model, reentrant)
    sites = [
        "blocks.*.mlp.out.hook_in",
        "blocks.*.mlp.hook_out",
        "blocks.*.mlp.hook_out_grad",
        "blocks.*.ln2.hook_out_grad",
        "blocks.*.mlp.in.hook_in_grad",
    ]
    ran = Counter[str]()
    model.get_submodule(resolve(model, "blocks.0.mlp.hook_out")[0].path).register_forward_pre_hook(
        lambda *_: ran.update(["mlp"])
    )
    seen, rows, expected = Counter[tuple[str, int]](), Collect(), Collect()
    with (
        gradients_only(model),
        Capture(
            model,
            sites,
            rows,
            lambda site, given: seen.update([(site.name, given.number)]),
            at=real_tokens,
        ),
    ):
        for seed in range(3):
            _backward(model, make_batch((7, 5), seed))
    with Capture(plain, sites, expected, at=real_tokens):
        for seed in range(3):
            _backward(plain, make_batch((7, 5), seed))
    assert ran["mlp"] == 6  # the block did run again during every backward
    assert seen == Counter(
        (site.name, number) for site in resolve(model, sites) for number in range(3)
    )
    for name in expected.names():
        torch.testing.assert_close(rows[name], expected[name], rtol=1e-5, atol=1e-8)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_forward_of_a_checkpointed_model_in_training_mode_gives_the_same_rows(
    reentrant: bool, llama: PreTrainedModel, batch: Batch
) -> None:
    sites = ["blocks.0.mlp.out.hook_in", "blocks.1.mlp.hook_out"]
    expected, rows = _by_plain_hooks(llama, sites, batch), Collect()
    _checkpoint(llama, reentrant)
    with Capture(llama, sites, rows, at=real_tokens) as capture:
        capture.forward(batch.inputs)
    assert all(torch.equal(rows[site], expected[site]) for site in sites)


# --- frozen parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_a_pass_for_gradients_alone_gives_every_bit_of_the_output_gradients_and_no_weight_gradient(
    kind: str, tied: bool, make: ModelMaker, batch: Batch
) -> None:
    model = make(kind, tie_word_embeddings=tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    sites = [
        "hook_embed",
        "blocks.*.hook_resid_post",
        "blocks.*.hook_attn_out",
        "blocks.*.mlp.in.hook_out",
        "blocks.*.mlp.hook_out",
        "ln_final.hook_out",
        "unembed.hook_out",
    ]
    with gradients_only(model):
        light = _captured(model, [f"{site}_grad" for site in sites], batch)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    full = _captured(model, [f"{site}_grad" for site in sites], batch)
    assert all(p.grad is not None for p in model.parameters())
    assert set(light.names()) == set(full.names()) and len(list(full.names())) == 11
    for name in full.names():
        assert float(full[name].abs().max()) > 0
        assert torch.equal(light[name], full[name]), name


def test_a_pass_for_gradients_alone_leaves_gradients_that_were_there(
    llama: PreTrainedModel, batch: Batch
) -> None:
    _backward(llama, batch)
    before = {
        name: (p.grad, p.grad.clone()) for name, p in llama.named_parameters() if p.grad is not None
    }
    with gradients_only(llama):
        _captured(llama, ["blocks.0.mlp.hook_out_grad"], batch)
    for name, p in llama.named_parameters():
        assert p.grad is before[name][0] and torch.equal(p.grad, before[name][1])


# --- LoRA -----------------------------------------------------------------------------------------

LORA_RANK, LORA_ALPHA = 2, 8


def _lora(base: PreTrainedModel, *targets: str, seed: int = 5) -> nn.Module:
    """``base`` with adapters whose B is not zero, so that they change what the model computes."""
    peft = pytest.importorskip("peft")
    shape = {
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "fan_in_fan_out": "c_attn" in targets,
    }  # GPT-2 stores its weights transposed
    config = peft.LoraConfig(**shape, target_modules=list(targets), task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


LORA_SITES = [
    "hook_embed",
    "blocks.*.hook_resid_post",
    "blocks.*.attn.q.hook_in",
    "blocks.*.attn.q.hook_out",
    "blocks.*.mlp.out.hook_in",
    "blocks.*.mlp.out.hook_out",
]


def test_names_of_an_adapted_model_resolve_to_the_adapted_modules(
    llama: PreTrainedModel, batch: Batch
) -> None:
    sites = [
        *LORA_SITES,
        "blocks.*.mlp.hook_out_grad",
        "blocks.*.attn.q.hook_out_grad",
        "blocks.0.hook_resid_post_grad",
    ]
    base = {site.name: site.path for site in all_sites(llama)}
    model = _lora(llama, "q_proj", "down_proj")
    assert layer_count(model) == 2
    assert {site.name: site.path for site in all_sites(model)} == {
        name: f"base_model.model.{path}" for name, path in base.items()
    }
    (q,) = resolve(model, "blocks.1.attn.q.hook_out")
    assert q.layer == 1 and hasattr(model.get_submodule(q.path), "lora_A")
    rows, expected = _captured(model, sites, batch), _by_plain_hooks(model, sites, batch)
    assert set(rows.names()) == set(expected)
    for name, value in expected.items():
        assert torch.equal(rows[name], value), name


def test_paths_of_an_adapted_model_may_leave_the_wrappers_prefix_out(
    llama: PreTrainedModel, batch: Batch
) -> None:
    model = _lora(llama, "q_proj", "down_proj")
    for path in (
        "model.layers.*.mlp.down_proj:in",
        "model.layers.{0..1}.self_attn.q_proj:grad_out",
        "model.layers.1.self_attn.q_proj.lora_A.default:out",
        "lm_head:out",
    ):
        assert resolve(model, path) == resolve(model, f"base_model.model.{path}") != ()
    assert [
        (site.path, site.layer)
        for site in resolve(model, "model.layers.1.mlp.down_proj.base_layer:out")
    ] == [("base_model.model.model.layers.1.mlp.down_proj.base_layer", 1)]
    rows = _captured(model, ["model.layers.1.mlp.down_proj:out", "blocks.1.attn.q.hook_out"], batch)
    assert torch.equal(
        rows["base_model.model.model.layers.1.mlp.down_proj:out"],
        _by_plain_hooks(model, ["blocks.1.mlp.out.hook_out"], batch)["blocks.1.mlp.out.hook_out"],
    )


@pytest.mark.parametrize(
    ("kind", "target"), [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("qwen3", "q_proj")]
)
def test_every_family_keeps_its_names_under_an_adapter(
    kind: str, target: str, make: ModelMaker, batch: Batch
) -> None:
    base = make(kind)
    sites = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_q", "blocks.*.mlp.hook_out"]
    model = _lora(copy.deepcopy(base), target)
    assert [site.name for site in all_sites(model)] == [site.name for site in all_sites(base)]
    assert [site.name for site in resolve(model, sites)] == [
        site.name for site in resolve(base, sites)
    ]
    assert layer_count(model) == 2
    with model.disable_adapter():
        rows = _captured(model, sites, batch, _look)
    expected = _captured(base, sites, batch, _look)
    assert all(torch.equal(rows[name], expected[name]) for name in expected.names())


def test_inputs_and_output_gradients_of_an_adapted_layer_give_the_adapters_weight_gradients(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    # y = W x + s B A x, so dL/dB = s g^T (A x) and dL/dA = s (B^T g)^T x, summed over the rows of a
    # batch without padding.
    batch, model, scaling = (
        make_batch((6, 6)),
        _lora(llama, "q_proj", "down_proj"),
        LORA_ALPHA / LORA_RANK,
    )
    names = [f"blocks.{layer}.{name}" for layer in range(2) for name in ("attn.q", "mlp.out")]
    rows = _captured(
        model, [f"{name}.{side}" for name in names for side in ("hook_in", "hook_out_grad")], batch
    )
    for name in names:
        x, g = rows[f"{name}.hook_in"], rows[f"{name}.hook_out_grad"]
        layer = model.get_submodule(resolve(model, f"{name}.hook_out")[0].path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index,union-attr]
        torch.testing.assert_close(scaling * g.T @ (x @ a.detach().T), b.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scaling * (g @ b.detach()).T @ x, a.grad, rtol=1e-4, atol=1e-6)


def test_an_adapted_model_yields_gradients_alone_and_gets_its_flags_back(
    llama: PreTrainedModel, batch: Batch
) -> None:
    model, sites = (
        _lora(llama, "q_proj", "down_proj"),
        ["blocks.*.mlp.hook_out_grad", "hook_embed_grad"],
    )
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with gradients_only(model):
        light = _captured(model, sites, batch)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()} and {
        *flags.values()
    } == {True, False}
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(CaptureError, match="gradients_only"):
        _captured(model, sites, batch)  # the embedding lies below every adapter
    full = _captured(model, sites[:1], batch)
    assert all(torch.equal(light[name], full[name]) for name in full.names())


def test_edits_reach_an_adapted_model_and_a_disabled_adapter_gives_the_base_models_rows(
    llama: PreTrainedModel, batch: Batch
) -> None:
    base, vector, site = (
        copy.deepcopy(llama),
        torch.randn(16, generator=torch.Generator().manual_seed(0)),
        "blocks.0.mlp.out.hook_out",
    )
    model = _lora(llama, "q_proj", "down_proj")
    plain = model(**batch.inputs).logits
    handle = model.get_submodule(
        "base_model.model.model.layers.0.mlp.down_proj"
    ).register_forward_hook(lambda _m, _a, output: output + 2 * vector)
    expected = model(**batch.inputs).logits
    handle.remove()
    with edit(model, {site: steer(vector, 2.0)}):
        edited = model(**batch.inputs).logits
    assert torch.equal(edited, expected) and not torch.allclose(edited, plain)
    wanted = ["blocks.*.hook_resid_post", "blocks.*.attn.q.hook_out", "blocks.*.mlp.out.hook_out"]
    adapted, original = (
        _captured(model, wanted, batch, _look),
        _captured(base, wanted, batch, _look),
    )
    with model.disable_adapter():
        disabled = _captured(model, wanted, batch, _look)
    for name in original.names():
        assert torch.equal(disabled[name], original[name])
        assert not torch.allclose(adapted[name], original[name])


# --- DistributedDataParallel ----------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("gloo is not built in")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_names_resolve_and_rows_are_right_under_distributed_data_parallel(
    kind: str, make: ModelMaker, batch: Batch
) -> None:
    bare = make(kind)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(bare))
    sites = [
        "blocks.*.hook_resid_post",
        "blocks.*.attn.hook_q",
        "blocks.*.mlp.hook_out",
        "blocks.*.mlp.hook_out_grad",
        "blocks.0.hook_resid_post_grad",
    ]
    path = resolve(bare, "blocks.1.mlp.hook_out")[0].path
    assert (
        layer_count(model) == 2
        and resolve(model, f"{path}:in") == resolve(model, f"module.{path}:in") != ()
    )
    assert {site.name: site.path for site in all_sites(model)} == {
        site.name: f"module.{site.path}" for site in all_sites(bare)
    }
    rows, expected = _captured(model, sites, batch), _captured(bare, sites, batch)
    for name in expected.names():
        assert torch.equal(rows[name], expected[name]), name
    again = Collect()
    with Capture(model, "blocks.0.hook_resid_post", again, at=real_tokens) as capture:
        capture.forward(batch.inputs)
        capture.forward(batch.inputs)
    assert torch.equal(
        again["blocks.0.hook_resid_post"], expected["blocks.0.hook_resid_post"].repeat(2, 1)
    )
    # The bare model inside the wrapper may be captured while the wrapper is called, since the
    # wrapper calls it.
    inside = Collect()
    with Capture(model.module, "blocks.1.mlp.hook_out_grad", inside, at=real_tokens):
        _backward(model, batch)
    assert torch.equal(inside["blocks.1.mlp.hook_out_grad"], expected["blocks.1.mlp.hook_out_grad"])
