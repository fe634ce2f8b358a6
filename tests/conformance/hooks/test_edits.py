"""Edits of a forward pass against closed forms, blocks run by hand, autograd and finite
differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedModel,
)

from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy
from workbench.hooks import (
    Capture,
    CaptureError,
    Collect,
    ablate_to_mean,
    add_noise,
    edit,
    keep_only,
    last_token,
    patch,
    peek,
    project_out,
    real_tokens,
    replace,
    steer,
)

Change = Callable[[Tensor], Tensor]
Changes = Mapping[str, Change | Iterable[Change]]

WIDTH, POST = 16, "blocks.0.hook_resid_post"
PLACES = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)
CONFIGS = {
    "llama": LlamaConfig,
    "gemma2": Gemma2Config,
    "olmo2": Olmo2Config,
    "gpt2": GPT2Config,
    "gpt_neox": GPTNeoXConfig,
}
# The list of blocks and the final norm; in a block: attention, its output projection, then the
# norms before and after attention, before and after the MLP.
_INNER = ("model.layers", "model.norm", "self_attn", "o_proj")
LAYOUT = {  # the families with a point between attention and MLP
    "llama": (*_INNER, "input_layernorm", "", "post_attention_layernorm", ""),
    "gemma2": (
        *_INNER,
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": (*_INNER, "", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "gpt2": ("transformer.h", "transformer.ln_f", "attn", "c_proj", "ln_1", "", "ln_2", ""),
}


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


V, M, PATCH, Q = (
    _random(WIDTH, seed=1),
    _random(WIDTH, seed=2),
    _random(2, 6, WIDTH, seed=3),
    torch.linalg.qr(_random(WIDTH, 3, seed=4)).Q,
)


def _family(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A tiny model whose weights are large enough that nothing in it is nearly linear, and whose
    norms are not all ones.
    """
    shape: dict[str, Any] = {
        "vocab_size": 50,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    if kind == "gpt2":
        shape |= {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        }
    else:
        shape |= {
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
        shape |= {} if kind == "gpt_neox" else {"num_key_value_heads": 2, "head_dim": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[kind](**shape))
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def _ids(seed: int = 0) -> dict[str, Any]:
    """Two rows without padding."""
    return {
        "input_ids": torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(seed)),
        "use_cache": False,
    }


def _hooks(model: nn.Module) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def _seen(
    model: nn.Module,
    changes: Changes,
    sites: str | list[str],
    inputs: Mapping[str, Any] | None = None,
    passes: int = 1,
) -> tuple[Collect, Collect]:
    """The rows of ``sites`` as a capture before the edit and as a capture after it see them, in the
    same passes.
    """
    before, after = Collect(), Collect()
    with (
        torch.no_grad(),
        Capture(model, sites, before, at=real_tokens),
        edit(model, changes),
        Capture(model, sites, after, at=real_tokens),
    ):
        for _ in range(passes):
            model(**(inputs or _ids()))
    return before, after


def _makers(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Change, Change]]:
    """Every maker but the noise with operands of ``dtype``, and its definition in float64."""
    q = torch.linalg.qr(Q.double()).Q.to(dtype)
    v, m, put, span = V.to(dtype), M.to(dtype), PATCH.to(dtype), q.double() @ q.double().T
    return {
        "steer": (steer(v), lambda x: x + V.double()),
        "steer scaled": (steer(v, -2.5), lambda x: x - 2.5 * V.double()),
        "ablate_to_mean": (ablate_to_mean(m), lambda x: 0 * x + M.double()),
        "ablate_to_mean of Moments": (ablate_to_mean(M.double()), lambda x: 0 * x + M.double()),
        "project_out": (project_out(q), lambda x: x - x @ span),
        "project_out about a mean": (project_out(q, m), lambda x: x - (x - M.double()) @ span),
        "keep_only": (keep_only(q), lambda x: x @ span),
        "keep_only about a mean": (keep_only(q, m), lambda x: M.double() + (x - M.double()) @ span),
        "replace": (replace(put), lambda x: PATCH.double()),
    }


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", _makers())
def test_every_maker_does_at_a_site_what_its_closed_form_says(
    name: str, dtype: torch.dtype, accuracy: float
) -> None:
    change, definition = _makers(dtype)[name]
    before, after = _seen(_family().to(dtype), {POST: change}, POST)
    clean = before[POST].reshape(2, 6, WIDTH)
    assert clean.dtype == after[POST].dtype == dtype and float(clean.abs().mean()) > 0.1
    assert_close(
        after[POST].double(),
        definition(clean.double()).reshape(12, WIDTH),
        rtol=accuracy,
        atol=accuracy,
    )


@pytest.mark.parametrize("name", [*_makers(), "add_noise"])
def test_in_a_bfloat16_model_the_result_is_computed_in_float32_and_rounded_once(name: str) -> None:
    change, definition = (_makers() | {"add_noise": (add_noise(0.7, 5), lambda x: x)})[name]
    before, after = _seen(_family().bfloat16(), {POST: change}, POST)
    exact = definition(before[POST].double().reshape(2, 6, WIDTH)).reshape(12, WIDTH)
    if name == "add_noise":  # the noise of this seed, site and pass, as a float32 model shows it
        clean, noisy = _seen(_family(), {POST: change}, POST)
        exact = exact + (noisy[POST] - clean[POST]).double()
    assert after[POST].dtype == torch.bfloat16
    # bfloat16 has eight significant bits: one rounding moves a number by at most 2^-8 of itself.
    # Rounding a summand first moves small sums further.
    assert float(((after[POST].double() - exact).abs() - 2.0**-8 * exact.abs()).max()) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mean", [None, M])
def test_nothing_is_left_of_a_subspace_projected_out_and_twice_is_once(
    mean: Tensor | None, autocast: bool
) -> None:
    # The stream stays float32 under autocast; a product in bfloat16 would leave a hundredth of the
    # subspace there.
    model, point = _family(), torch.zeros(WIDTH) if mean is None else mean
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before, once = _seen(model, {POST: project_out(Q, mean)}, POST)
        _, twice = _seen(model, {POST: [project_out(Q, mean)] * 2}, POST)
        _, kept = _seen(model, {POST: keep_only(Q, mean)}, POST)
    assert before[POST].dtype == once[POST].dtype == torch.float32
    assert float(((before[POST] - point) @ Q).abs().max()) > 0.5
    assert float(((once[POST] - point) @ Q).abs().max()) < 1e-5
    assert_close(twice[POST], once[POST], rtol=1e-5, atol=1e-6)
    assert_close(
        kept[POST] + once[POST] - point, before[POST], rtol=1e-5, atol=1e-6
    )  # the two parts make up the whole


def test_noise_is_gaussian_independent_and_of_the_given_size() -> None:
    noise = add_noise(0.5, seed=3)(torch.zeros(64, 128, 32)).flatten(0, 1).double() / 0.5
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / count**0.5
    assert abs(float(noise.std()) - 1) < 5 / (2 * count) ** 0.5
    for bound, share in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        assert (
            abs(float((noise.abs() < bound).double().mean()) - share)
            < 5 * (share * (1 - share) / count) ** 0.5
        )
    assert (
        float((torch.corrcoef(noise.T) - torch.eye(32)).abs().max()) < 6 / len(noise) ** 0.5
    )  # between coordinates
    assert (
        abs(float((noise[1:] * noise[:-1]).mean())) < 5 / count**0.5
    )  # between neighbouring positions


def test_noise_depends_on_the_seed_the_site_and_the_pass_alone() -> None:
    model, sites = _family(), ["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"]

    def noise(seed: int, ids: int = 0) -> list[Tensor]:
        before, after = _seen(
            model, {"blocks.0.hook_*_out": add_noise(1.0, seed)}, sites, _ids(ids), passes=2
        )
        return [part for site in sites for part in (after[site] - before[site]).chunk(2)]

    first, again, elsewhere = noise(0), noise(0), noise(0, ids=9)
    for one, two, three in zip(first, again, elsewhere, strict=True):
        assert torch.equal(one, two)
        assert_close(one, three, rtol=0, atol=1e-5)  # other activations, the same noise
    every = torch.stack(
        [part.flatten() for part in (*first, *noise(1))]
    )  # two seeds, two sites, two passes
    assert float((torch.corrcoef(every) - torch.eye(8)).abs().max()) < 5 / every.shape[1] ** 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        Q * 1.01,
        torch.ones(WIDTH, 2),
        torch.zeros(WIDTH, 2),
        Q.T,
        V,
        Q[None],
        torch.full((WIDTH, 2), torch.nan),
    ],
)
def test_a_basis_must_be_orthonormal_and_noise_not_negative(wrong: Tensor) -> None:
    for maker in (project_out, keep_only):
        with pytest.raises(CaptureError, match="orthonormal"):
            maker(wrong)
    with pytest.raises(CaptureError, match=r"-0\.5"):
        add_noise(-0.5)


def test_only_the_chosen_positions_change_and_padding_never_does(batch: Batch) -> None:
    model, real = _family(), batch.attention_mask.bool()
    clean = peek(model, batch.inputs, POST)[POST]
    ends = torch.zeros_like(real)
    ends[range(3), real.sum(1) - 1] = True
    for rule, mask in ((last_token, ends), (real_tokens, real), (~last_token, real & ~ends)):
        with edit(model, {POST: [steer(V), steer(M)]}, at=rule):
            edited = peek(model, batch.inputs, POST)[POST]
        assert torch.equal(edited, torch.where(mask[..., None], clean + V + M, clean))


class _Before(nn.Module):
    """A module whose input is changed first."""

    def __init__(self, change: Change, inner: nn.Module) -> None:
        super().__init__()
        self.change, self.inner = change, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.change(x))


def _by_hand(kind: str, model: PreTrainedModel, changes: Mapping[str, Change]) -> Tensor:
    """The logits with block 0 changed, block by block in plain code without any hook; only the
    masks and the rotary angles come from an ordinary pass.
    """
    blocks, final, attention, out, *norms = LAYOUT[kind]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    modules = [
        model.get_submodule(f"{blocks}.0"),
        *(block.get_submodule(attention) for block in model.get_submodule(blocks).children()),
    ]
    handles = [
        module.register_forward_pre_hook(
            lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for module in modules
    ]
    with torch.no_grad():
        model(**_ids())
    for handle in handles:
        handle.remove()
    x: Tensor = calls[0][0][0]
    for number, block in enumerate(model.get_submodule(blocks).children()):
        change = {
            place: changes.get(place, nn.Identity()) if number == 0 else nn.Identity()
            for place in PLACES
        }
        before_attention, after_attention, before_mlp, after_mlp = (
            block.get_submodule(name) if name else nn.Identity() for name in norms
        )
        module, (args, kwargs) = modules[number + 1], calls[number + 1]
        projection = module.get_submodule(out)
        setattr(module, out, _Before(change["attn.hook_z"], projection))
        x = change["hook_resid_pre"](x)
        attended = (
            module(before_attention(x), *args[1:], **kwargs)
            if args
            else module(**{**kwargs, "hidden_states": before_attention(x)})
        )
        setattr(module, out, projection)
        x = change["hook_resid_mid"](x + change["hook_attn_out"](after_attention(attended[0])))
        x = change["hook_resid_post"](
            x + change["hook_mlp_out"](after_mlp(block.get_submodule("mlp")(before_mlp(x))))
        )
    logits = model.get_output_embeddings()(model.get_submodule(final)(x))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _near(got: Tensor, right: Tensor) -> None:
    assert float(right.abs().max()) > 0
    assert_close(got, right, rtol=1e-4, atol=1e-6 * float(right.abs().max()))


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", LAYOUT)
def test_an_edit_has_the_effect_of_running_the_rest_of_the_model_from_the_edited_tensor(
    kind: str, place: str, bent: bool
) -> None:
    model, vector, weight = (
        _family(kind),
        V.clone().requires_grad_(),
        (1 + 0.3 * M).requires_grad_(),
    )

    def change(x: Tensor) -> Tensor:
        # Of a function that is not linear, autograd keeps the input for the backward pass, so
        # nothing may overwrite it.
        return weight * x + 0.1 * x * x + vector if bent else 0.5 * x + vector

    clean, expected = model(**_ids()).logits, _by_hand(kind, model, {place: change})
    assert_close(_by_hand(kind, model, {}), clean)  # the hand knows the model
    assert not torch.allclose(expected, clean, atol=0.05)
    with edit(model, {f"blocks.0.{place}": change}):
        with torch.no_grad():
            assert_close(model(**_ids()).logits, expected.detach())
        logits = model(**_ids()).logits
    assert_close(logits, expected)
    wanted = [
        vector,
        *([weight] if bent else []),
        *(parameter for name, parameter in model.named_parameters() if ".1." in name),
    ]
    for got, right in zip(
        torch.autograd.grad(logits.square().mean(), wanted),
        torch.autograd.grad(expected.square().mean(), wanted),
        strict=True,
    ):
        _near(got, right)


@pytest.mark.parametrize("reader", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", LAYOUT)
def test_an_edit_at_resid_mid_changes_the_stream_itself(
    kind: str, gradients: bool, reader: bool
) -> None:
    # Another name stands at the same module's input: what that module reads. Whatever is done
    # there, the stream carries what was put at hook_resid_mid; and tensors that the caller put in
    # are not written to.
    model, names, rows, values = _family(kind), ["blocks.0.hook_mlp_out", POST], Collect(), -PATCH
    changes = (
        {f"blocks.0.{'mlp' if kind == 'olmo2' else 'ln2'}.hook_in": replace(values)}
        if reader
        else {}
    )
    with (
        torch.set_grad_enabled(gradients),
        edit(model, {**changes, "blocks.0.hook_resid_mid": replace(PATCH)}),
        Capture(model, names, rows, at=real_tokens),
    ):
        model(**_ids())
    assert_close((rows[POST] - rows[names[0]]).reshape(2, 6, WIDTH), PATCH, rtol=1e-5, atol=1e-5)
    assert torch.equal(values, -PATCH)


@pytest.mark.parametrize("kind", LAYOUT)
def test_the_gradient_of_a_steering_vector_at_resid_mid_equals_finite_differences(
    kind: str,
) -> None:
    model, vector = _family(kind).double(), V.double().requires_grad_()

    def loss(at: Tensor) -> Tensor:
        with edit(model, {"blocks.0.hook_resid_mid": steer(at)}):
            return model(**_ids(), labels=_ids()["input_ids"]).loss

    (gradient,) = torch.autograd.grad(loss(vector), vector)
    # the norms of these models compute in float32, hence a wide step and a stencil of fourth order
    step = 1e-2
    with torch.no_grad():
        for direction in (
            _random(WIDTH, seed=8).double(),
            _random(WIDTH, seed=9).double(),
            torch.eye(WIDTH, dtype=torch.float64)[5],
        ):
            value = [float(loss(vector + move * step * direction)) for move in (-2, -1, 1, 2)]
            slope = (value[0] - 8 * value[1] + 8 * value[2] - value[3]) / (12 * step)
            assert slope == pytest.approx(float(gradient @ direction), rel=1e-3, abs=1e-4)


def test_patching_a_stream_of_another_model_or_input_gives_the_logits_of_that_model_or_input() -> (
    None
):
    base, other = _family(), _family(seed=1)
    for path in ("model.norm", "lm_head"):
        other.get_submodule(path).load_state_dict(base.get_submodule(path).state_dict())
    clean = base(**_ids()).logits
    embedded = base(
        inputs_embeds=other.get_input_embeddings()(_ids()["input_ids"]), use_cache=False
    ).logits
    for source, ids, site, wanted in [
        (
            other,
            0,
            "blocks.1.hook_resid_post",
            other(**_ids()).logits,
        ),  # everything after that site is shared
        (other, 0, "blocks.*.hook_resid_post", other(**_ids()).logits),
        (other, 0, "hook_embed", embedded),
        (base, 1, "blocks.1.hook_resid_post", base(**_ids(1)).logits),
    ]:
        assert not torch.allclose(wanted, clean, atol=0.1)
        with edit(base, patch(source, _ids(ids), site)):
            assert torch.equal(base(**_ids()).logits, wanted), site
        assert torch.equal(base(**_ids()).logits, clean)
    assert _hooks(base) == _hooks(other) == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_patch_of_a_model_into_itself_and_noise_of_size_zero_change_no_bit(kind: str) -> None:
    model = _family(kind)
    clean: Tensor = model(**_ids()).logits
    patches = [
        patch(model, _ids(), sites)
        for sites in (
            "blocks.*.hook_resid_*",
            "blocks.*.attn.hook_?",
            ["hook_embed", "blocks.*", "ln_final.hook_out"],
        )
    ]
    for changes in (*patches, {"blocks.*.hook_resid_*": add_noise(0.0)}):
        with edit(model, changes):
            assert torch.equal(model(**_ids()).logits, clean)
            with torch.no_grad():
                assert torch.equal(model(**_ids()).logits, clean)


@pytest.mark.parametrize("letter", "qkv")
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn:out"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value:out"),
    ],
)
def test_editing_one_part_of_a_fused_projection_leaves_the_others(
    kind: str, path: str, letter: str
) -> None:
    model, number, names = (
        _family(kind),
        "qkv".index(letter),
        [f"blocks.0.attn.hook_{part}" for part in "qkv"],
    )
    before, after = _seen(model, {names[number]: replace(PATCH)}, [path, *names])
    expected = before[path].clone()
    if kind == "gpt2":  # q of all heads, k of all heads, v of all heads
        expected[:, WIDTH * number : WIDTH * (number + 1)] = PATCH.reshape(12, WIDTH)
    else:  # head by head: q, k, v
        expected.view(12, 4, 3, 4)[:, :, number] = PATCH.reshape(12, 4, 4)
    assert torch.equal(after[path], expected)
    assert all(
        torch.equal(
            after[name], PATCH.reshape(12, WIDTH) if name == names[number] else before[name]
        )
        for name in names
    )


def test_several_functions_at_one_site_run_in_their_order() -> None:
    for changes in (
        {POST: [steer(V), project_out(Q), lambda x: 2 * x]},
        {"blocks.0.hook_out": steer(V), POST: iter([project_out(Q), lambda x: 2 * x])},
    ):
        before, after = _seen(_family(), changes, POST)
        assert_close(
            after[POST],
            2 * ((before[POST] + V) - (before[POST] + V) @ Q @ Q.T),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("place", PLACES)
def test_edits_and_captures_see_the_tensor_in_the_order_of_their_with_blocks(place: str) -> None:
    model, site, (first, second, third) = (
        _family(),
        f"blocks.0.{place}",
        (Collect(), Collect(), Collect()),
    )
    clean = peek(model, _ids(), site)[site].reshape(12, WIDTH)
    with (
        torch.no_grad(),
        Capture(model, site, first, at=real_tokens),
        edit(model, {site: steer(V)}),
        Capture(model, site, second, at=real_tokens),
    ):
        with edit(model, {site: lambda x: 3 * x}), Capture(model, site, third, at=real_tokens):
            model(**_ids())
    for rows, right in zip(
        (first, second, third), (clean, clean + V, 3 * (clean + V)), strict=True
    ):
        assert torch.equal(rows[site], right)


@pytest.mark.parametrize("place", PLACES)
def test_captures_around_an_edit_get_the_gradients_before_and_after_it(place: str) -> None:
    model, site, change, (before, after) = (
        _family(),
        f"blocks.0.{place}",
        project_out(Q, M),
        (Collect(), Collect()),
    )
    probes = [torch.zeros(2, 6, WIDTH, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(
        _by_hand("llama", model, {place: lambda x: change(x + probes[0]) + probes[1]})
        .square()
        .mean(),
        probes,
    )
    with (
        Capture(model, f"{site}_grad", before, at=real_tokens),
        edit(model, {site: change}),
        Capture(model, f"{site}_grad", after, at=real_tokens),
    ):
        model(**_ids()).logits.square().mean().backward()
    for rows, right in zip((before, after), expected, strict=True):
        _near(rows[f"{site}_grad"], right.reshape(12, WIDTH))


def _weight_gradients(
    reentrant: bool | None, run: Callable[[PreTrainedModel], None]
) -> dict[str, Tensor]:
    model = _family().train()  # transformers checkpoints in training mode only
    if reentrant is not None:
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )  # renamed within transformers 5
        enable({"use_reentrant": reentrant})
    run(model)
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("backward", ["after every pass", "after two passes", "after the edit"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "places",
    [("attn.hook_z", "hook_resid_mid", "mlp.hook_post"), ("hook_resid_pre", "hook_resid_post")],
)
def test_under_gradient_checkpointing_noise_gives_the_same_weight_gradients(
    places: tuple[str, ...], reentrant: bool, backward: str, make_batch: Callable[..., Batch]
) -> None:
    # A block is recomputed in the backward pass: with the noise and the positions of its own pass,
    # never silently with those of another or with none. Where the recomputation comes too late to
    # know them, an error will do. Whether hooks at the edge of a block run again differs between
    # versions of transformers.
    batches, at = (
        (make_batch((7, 5, 6)), make_batch((4, 7, 5), 1)),
        None if backward == "after the edit" else ~last_token,
    )

    def run(model: PreTrainedModel) -> None:
        with edit(model, {f"blocks.*.{place}": add_noise(0.5, seed=4) for place in places}, at=at):
            loss = cross_entropy(model, batches[0])
            if backward == "after every pass":
                loss.backward()
            if backward != "after the edit":
                loss = cross_entropy(model, batches[1]) + (
                    loss if backward == "after two passes" else 0
                )
                loss.backward()
        if backward == "after the edit":
            loss.backward()

    plain = _weight_gradients(None, run)
    assert plain.keys() == dict(_family().named_parameters()).keys()
    try:
        found = _weight_gradients(reentrant, run)
    except RuntimeError:  # the edit's own, or that of the checkpoint, which compares what was saved
        assert backward != "after every pass"
        return
    for name, right in plain.items():
        _near(found[name], right)


def _raise(error: Exception) -> Change:
    def change(_tensor: Tensor) -> Tensor:
        raise error

    return change


@pytest.mark.parametrize("kind", CONFIGS)
def test_everything_is_gone_on_exit_whatever_raised(kind: str) -> None:
    model, bend = _family(kind), steer(V)
    every = {"hook_embed": bend} | {
        f"blocks.*.{place}": bend
        for place in PLACES
        if kind != "gpt_neox" or place != "hook_resid_mid"
    }
    clean = model(**_ids()).logits
    with edit(model, every):
        assert not torch.allclose(model(**_ids()).logits, clean)
    for wrong in (
        {},
        {POST: _raise(ZeroDivisionError())},
        {POST: _raise(RuntimeError())},
        {"blocks.0.nonsense": bend},
    ):
        with pytest.raises((ZeroDivisionError, CaptureError)), edit(model, {**every, **wrong}):
            model(**_ids())
            raise ZeroDivisionError
    assert _hooks(model) == 0
    assert torch.equal(model(**_ids()).logits, clean)


_FAILURES: list[tuple[Change, str]] = [
    (lambda x: x[:, :-1], r"\[2, 5, 16\]"),
    (lambda x: x[..., :3], r"\[2, 6, 3\]"),
    (lambda x: x.double(), "float64"),
    (lambda x: x.to("meta"), "meta"),
    (lambda x: None, "NoneType"),
    (_raise(RuntimeError("planted trouble")), "planted trouble"),
    (steer(torch.ones(17)), "17"),
    (ablate_to_mean(torch.ones(17)), "17"),
    (project_out(torch.eye(17)), "17"),
    (keep_only(torch.eye(17)), "17"),
    (replace(torch.zeros(2, 5, WIDTH)), r"\[2, 5, 16\]"),
]


@pytest.mark.parametrize(("change", "said"), _FAILURES)
@pytest.mark.parametrize(
    "site", ["blocks.1.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_q"]
)
def test_a_function_that_fails_or_returns_something_else_is_an_error_that_names_the_site(
    site: str, change: Change, said: str
) -> None:
    model = _family("gpt2")
    with pytest.raises(CaptureError, match=said) as caught, edit(model, {site: change}):
        model(**_ids())
    assert site in str(caught.value)
    assert _hooks(model) == 0


def test_a_site_that_cannot_be_edited_is_an_error_and_no_silent_nothing(batch: Batch) -> None:
    model = _family()
    with (
        pytest.raises(CaptureError, match=rf"{POST}.*\[3, 7, 16\].*\[2, 6, 16\]"),
        edit(model, patch(_family(seed=1), batch.inputs, POST)),
    ):
        model(**_ids())
    model.idle = nn.Linear(WIDTH, WIDTH)
    for site, said in [
        (
            "blocks.0.hook_resid_pots",
            r"'blocks.0.hook_resid_pots'.*blocks\.0\.hook_resid_post",
        ),  # the nearest name
        (f"{POST}_grad", f"{POST}_grad is a gradient"),
        ("model.layers.0:grad_out", "model.layers.0:grad_out is a gradient"),
        ("idle:out", "idle:out never ran"),
    ]:
        with (
            pytest.raises(CaptureError, match=said),
            edit(model, {"blocks.1.hook_resid_post": steer(V), site: steer(V)}),
        ):
            model(**_ids())
    with pytest.raises(CaptureError, match=f"{POST}.*never ran"), edit(model, {POST: steer(V)}):
        pass
    with pytest.raises(CaptureError, match="no edit"), edit(model, {}):
        pass
    assert _hooks(model) == 0
