"""The capture layer against autograd, transformers' own hidden states and float64 brute force."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy
from workbench.hooks import (
    Capture,
    CaptureError,
    Collect,
    Moments,
    MomentsOf,
    Rows,
    Site,
    all_sites,
    gradients_only,
    layer_count,
    resolve,
    tapped,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
EVERY_LINEAR_GRADIENT = "model.layers.*_proj:grad_out"
EVERY_LINEAR_INPUT = "model.layers.*_proj:in"


def _captured(
    model: PreTrainedModel, sites: list[str], batch: Batch, mask: Tensor, *, backward: bool
) -> Collect:
    rows = Collect()
    with Capture(model, sites, rows) as capture:
        capture.at(mask)
        loss = cross_entropy(model, batch)
        if backward:
            loss.backward()
    return rows


def _hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def _own_projections(model: PreTrainedModel) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]


# --- the numbers are right ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_captured_residual_stream_is_the_models_own_hidden_states(
    kind: str, make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model(kind)
    mask = batch.attention_mask.bool()
    rows = Collect()
    with (
        torch.no_grad(),
        Capture(
            model,
            [
                "hook_embed",
                "blocks.*.hook_resid_pre",
                "blocks.*.hook_resid_post",
                "ln_final.hook_out",
            ],
            rows,
        ) as capture,
    ):
        capture.at(mask)
        hidden = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    torch.testing.assert_close(rows["hook_embed"], hidden[0][mask], rtol=0, atol=0)
    torch.testing.assert_close(rows["blocks.0.hook_resid_pre"], hidden[0][mask], rtol=0, atol=0)
    torch.testing.assert_close(rows["blocks.0.hook_resid_post"], hidden[1][mask], rtol=0, atol=0)
    torch.testing.assert_close(rows["blocks.1.hook_resid_pre"], hidden[1][mask], rtol=0, atol=0)
    # transformers reports the last hidden state behind the final norm.
    normed = model.get_submodule("model.norm")(rows["blocks.1.hook_resid_post"])
    torch.testing.assert_close(normed, hidden[2][mask])
    torch.testing.assert_close(rows["ln_final.hook_out"], hidden[2][mask], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_residual_sites_obey_the_residual_sums(
    kind: str, make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model(kind)
    names = [
        f"blocks.*.{name}"
        for name in (
            "hook_resid_pre",
            "hook_resid_mid",
            "hook_resid_post",
            "hook_attn_out",
            "hook_mlp_out",
        )
    ]
    rows = _captured(model, names, batch, batch.attention_mask.bool(), backward=False)
    for layer in range(2):
        pre, mid, post = (
            rows[f"blocks.{layer}.hook_resid_{name}"] for name in ("pre", "mid", "post")
        )
        torch.testing.assert_close(mid, pre + rows[f"blocks.{layer}.hook_attn_out"])
        torch.testing.assert_close(post, mid + rows[f"blocks.{layer}.hook_mlp_out"])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_output_gradients_times_inputs_sum_to_every_weight_gradient(
    kind: str, make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model(kind)
    rows = _captured(
        model,
        [EVERY_LINEAR_INPUT, EVERY_LINEAR_GRADIENT],
        batch,
        torch.ones_like(batch.attention_mask).bool(),
        backward=True,
    )
    projections = _own_projections(model)
    assert len(projections) == 2 * 7
    for path in projections:
        weight = model.get_submodule(path).weight
        assert isinstance(weight.grad, Tensor)
        torch.testing.assert_close(
            rows[f"{path}:grad_out"].T @ rows[f"{path}:in"], weight.grad, rtol=1e-4, atol=1e-7
        )


def test_an_input_gradient_is_that_of_its_own_module_alone(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # q, k and v read one tensor. For a linear layer, the gradient at its own input is grad_out @ W,
    # whatever the others add.
    names = [
        f"model.layers.1.self_attn.{part}_proj:{side}"
        for part in "qkv"
        for side in ("grad_in", "grad_out")
    ]
    rows = _captured(
        llama, names, batch, torch.ones_like(batch.attention_mask).bool(), backward=True
    )
    for part in "qkv":
        path = f"model.layers.1.self_attn.{part}_proj"
        weight = llama.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        torch.testing.assert_close(
            rows[f"{path}:grad_in"], rows[f"{path}:grad_out"] @ weight.detach()
        )


@pytest.mark.parametrize(
    "site",
    [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_mlp_out",
    ],
)
def test_a_gradient_at_a_stream_is_what_autograd_gives_for_that_stream(
    site: str, llama: PreTrainedModel, batch: Batch
) -> None:
    mask = batch.attention_mask.bool()
    rows = _captured(llama, [f"{site}_grad"], batch, mask, backward=True)
    (target,) = resolve(llama, site)
    kept: list[Tensor] = []

    def probe(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        kept.append(torch.zeros_like(output, requires_grad=True))
        return output + kept[0]

    # hook_resid_pre of a block is the output of what came before it.
    path = {
        "blocks.0.hook_resid_pre": "model.embed_tokens",
        "blocks.1.hook_resid_pre": "model.layers.0",
    }.get(site, target.path)
    handle = llama.get_submodule(path).register_forward_hook(probe)
    loss = cross_entropy(llama, batch)
    handle.remove()
    (expected,) = torch.autograd.grad(loss, kept)
    torch.testing.assert_close(rows[f"{site}_grad"], expected[mask], rtol=1e-4, atol=1e-7)


def test_the_gradient_at_resid_mid_is_that_of_the_whole_stream(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # TransformerLens's hook_resid_mid is a point of the stream: what is added there (attn_out) has
    # the same gradient, through the MLP and past it.
    rows = _captured(
        llama,
        ["blocks.0.hook_resid_mid_grad", "blocks.0.hook_attn_out_grad"],
        batch,
        batch.content_mask,
        backward=True,
    )
    torch.testing.assert_close(
        rows["blocks.0.hook_resid_mid_grad"],
        rows["blocks.0.hook_attn_out_grad"],
        rtol=1e-4,
        atol=1e-7,
    )


def test_rows_come_with_their_example_and_position(llama: PreTrainedModel, batch: Batch) -> None:
    seen: list[Rows] = []
    with (
        torch.no_grad(),
        Capture(
            llama, "blocks.0.hook_resid_post", lambda _site, rows: seen.append(rows)
        ) as capture,
    ):
        capture.at(batch.answer_mask)
        hidden = llama(**batch.inputs, output_hidden_states=True).hidden_states[1]
    (rows,) = seen
    assert rows.where.tolist() == [[0, 5], [0, 6], [1, 3], [1, 4], [2, 4], [2, 5]]
    for value, (example, position) in zip(rows.values, rows.where.tolist(), strict=True):
        assert torch.equal(value, hidden[example, position])


def test_rows_are_copies_that_a_later_in_place_kernel_cannot_overwrite(
    llama: PreTrainedModel, batch: Batch
) -> None:
    mask = batch.attention_mask.bool()
    rows = Collect()
    path = "model.layers.0.mlp.gate_proj"
    with torch.no_grad():
        clean = tapped(llama, resolve(llama, f"{path}:out"), batch.inputs)[f"{path}:out"][mask]
        with Capture(llama, f"{path}:out", rows) as capture:
            handle = llama.get_submodule(path).register_forward_hook(
                lambda _m, _a, output: output.zero_()
            )
            capture.at(mask)
            llama(**batch.inputs)
            handle.remove()
    assert torch.equal(rows[f"{path}:out"], clean)


# --- the model is not touched ---------------------------------------------------------------------


def test_outputs_are_bit_identical_with_hooks_and_everything_is_after_them(
    llama: PreTrainedModel, batch: Batch
) -> None:
    def run() -> tuple[Tensor, list[Tensor]]:
        llama.zero_grad()
        output = llama(**batch.inputs).logits
        output.square().sum().backward()
        return output.detach().clone(), [
            p.grad.clone() for p in llama.parameters() if p.grad is not None
        ]

    logits, weights = run()
    before = _hook_count(llama)
    named = [
        site.name for site in all_sites(llama) if site.name != "embed.hook_in"
    ]  # token ids are no vectors
    with Capture(llama, [*named, *(f"{name}_grad" for name in named)], MomentsOf()) as capture:
        capture.at(batch.content_mask)
        hooked_logits, hooked_weights = run()
    after_logits, after_weights = run()
    assert _hook_count(llama) == before
    assert torch.equal(logits, hooked_logits) and torch.equal(logits, after_logits)
    assert (
        len(weights) == len(hooked_weights) == len(after_weights) == len(list(llama.parameters()))
    )
    assert all(torch.equal(a, b) for a, b in zip(weights, after_weights, strict=True))
    for plain, hooked in zip(weights, hooked_weights, strict=True):
        # Gradients of private inputs are summed in another order, so only the outputs can be asked
        # for every bit.
        torch.testing.assert_close(hooked, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


def test_hooks_are_removed_when_the_forward_raises(llama: PreTrainedModel, batch: Batch) -> None:
    def explode(_module: nn.Module, _args: object, _output: object) -> None:
        raise ZeroDivisionError("planted")

    before = _hook_count(llama)
    handle = llama.get_submodule("model.layers.1").register_forward_hook(explode)
    with (
        pytest.raises(ZeroDivisionError, match="planted"),
        Capture(llama, "blocks.*.hook_resid_post", Collect()) as capture,
    ):
        capture.at(batch.content_mask)
        llama(**batch.inputs)
    with pytest.raises(ZeroDivisionError, match="planted"):
        tapped(llama, resolve(llama, "blocks.1.hook_resid_post"), batch.inputs)
    handle.remove()
    assert _hook_count(llama) == before


def test_a_consumer_that_raises_leaves_no_hook_behind(llama: PreTrainedModel, batch: Batch) -> None:
    def consumer(_site: Site, _rows: Rows) -> None:
        raise ZeroDivisionError("planted")

    before = _hook_count(llama)
    with (
        pytest.raises(ZeroDivisionError, match="planted"),
        Capture(llama, "blocks.0.hook_resid_post", consumer) as capture,
    ):
        capture.at(batch.content_mask)
        llama(**batch.inputs)
    assert _hook_count(llama) == before


# --- padding --------------------------------------------------------------------------------------


def test_a_nan_planted_at_a_padded_position_reaches_no_consumer(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # Attention multiplies a masked NaN by zero, which is NaN; so only the sites before the first
    # attention can be asked for this.
    def plant(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return torch.where(batch.attention_mask[..., None].bool(), output, torch.nan)

    handle = llama.get_submodule("model.embed_tokens").register_forward_hook(plant)
    sites = [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.ln1.hook_out",
        *(f"blocks.0.attn.{part}.hook_out" for part in "qkv"),
    ]
    rows, moments = Collect(), MomentsOf()

    def both(site: Site, found: Rows) -> None:
        rows(site, found)
        moments(site, found)

    with torch.no_grad(), Capture(llama, sites, both) as capture:
        capture.at(batch.content_mask)
        llama(**batch.inputs)
    handle.remove()
    assert set(rows.names()) == set(sites)
    for site in sites:
        assert len(rows[site]) == moments[site].count == int(batch.content_mask.sum())
        assert bool(torch.isfinite(rows[site]).all())
        assert bool(torch.isfinite(moments[site].scatter).all())


def test_what_stands_in_the_padding_changes_no_row_of_any_site(
    llama: PreTrainedModel, batch: Batch
) -> None:
    def plant(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return torch.where(batch.attention_mask[..., None].bool(), output, 1e3)

    names = [site.name for site in all_sites(llama) if site.name != "embed.hook_in"]
    names += [f"{name}_grad" for name in names]
    clean = _captured(llama, names, batch, batch.content_mask, backward=True)
    handle = llama.get_submodule("model.embed_tokens").register_forward_hook(plant)
    planted = _captured(llama, names, batch, batch.content_mask, backward=True)
    handle.remove()
    assert set(clean.names()) == set(planted.names()) and len(list(clean.names())) > 60
    for name in clean.names():
        torch.testing.assert_close(planted[name], clean[name], rtol=1e-5, atol=1e-7)


# --- errors ---------------------------------------------------------------------------------------


def test_a_mask_of_the_wrong_shape_is_refused(llama: PreTrainedModel, batch: Batch) -> None:
    for mask in (batch.content_mask[:, :-1], batch.content_mask[:-1], batch.content_mask.T):
        with (
            pytest.raises(CaptureError, match="mask"),
            Capture(llama, "blocks.0.hook_resid_post", Collect()) as capture,
        ):
            capture.at(mask)
            llama(**batch.inputs)


def test_a_mask_that_is_not_boolean_or_not_flat_is_refused(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with Capture(llama, "blocks.0.hook_resid_post", Collect()) as capture:
        for mask in (
            batch.attention_mask,
            batch.attention_mask.float(),
            batch.content_mask[0],
            batch.content_mask[..., None],
        ):
            with pytest.raises(CaptureError, match="boolean"):
                capture.at(mask)
        capture.at(batch.content_mask)
        llama(**batch.inputs)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("blocks.0.hook_residpost", "blocks.0.hook_resid_post"),
        ("blocks.1.mlp.hook_outt", "blocks.1.mlp.hook_out"),
        ("model.layers.0.mlp.down_porj:in", "model.layers.0.mlp.down_proj:in"),
    ],
)
def test_an_unknown_site_is_answered_with_the_nearest_names(
    wrong: str, near: str, llama: PreTrainedModel
) -> None:
    with pytest.raises(CaptureError) as raised:
        resolve(llama, wrong)
    assert wrong in str(raised.value) and near in str(raised.value)


def test_a_layer_that_does_not_exist_is_unknown(llama: PreTrainedModel) -> None:
    assert layer_count(llama) == 2
    for wrong in (
        "blocks.2.hook_resid_post",
        "blocks.{1..0}.hook_resid_post",
        "model.layers.0.mlp:sideways",
    ):
        with pytest.raises(CaptureError):
            resolve(llama, wrong)
    with pytest.raises(CaptureError):
        resolve(llama, [])


def test_both_spellings_and_ranges_name_the_same_places(llama: PreTrainedModel) -> None:
    assert [(s.path, s.side, s.layer) for s in resolve(llama, "blocks.{0..1}.mlp.out.hook_in")] == [
        (f"model.layers.{layer}.mlp.down_proj", "in", layer) for layer in range(2)
    ]
    assert {
        (s.path, s.side, s.layer) for s in resolve(llama, "model.layers.*.mlp.down_proj:in")
    } == {(s.path, s.side, s.layer) for s in resolve(llama, "blocks.*.mlp.out.hook_in")}
    assert len(resolve(llama, ["blocks.*.hook_resid_post", "blocks.1.hook_resid_post"])) == 2


def test_an_architecture_without_names_can_be_tapped_by_path_only() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert [site.path for site in resolve(model, "0:in")] == ["0"]
    with pytest.raises(CaptureError, match="llama"):
        resolve(model, "blocks.0.hook_resid_post")


def test_a_pass_without_a_mask_is_an_error(llama: PreTrainedModel, batch: Batch) -> None:
    with (
        pytest.raises(CaptureError, match="at\\(mask\\)"),
        Capture(llama, "blocks.0.hook_resid_post", Collect()),
    ):
        llama(**batch.inputs)


def test_every_pass_needs_its_own_mask(llama: PreTrainedModel, batch: Batch) -> None:
    # "call capture.at(mask) before every forward pass: which tokens count has no default"; last
    # pass's mask is no answer for this one.
    with (
        pytest.raises(CaptureError, match="at\\(mask\\)"),
        Capture(llama, "blocks.0.hook_resid_post", Collect()) as capture,
    ):
        capture.at(batch.content_mask)
        llama(**batch.inputs)
        llama(**batch.inputs)


def test_a_site_that_never_fires_is_an_error(llama: PreTrainedModel, batch: Batch) -> None:
    llama.idle = nn.Linear(16, 16)
    for side in ("in", "out", "grad_in", "grad_out"):
        with (
            pytest.raises(CaptureError, match="never ran"),
            Capture(llama, f"idle:{side}", Collect()) as capture,
        ):
            capture.at(batch.content_mask)
            llama(**batch.inputs).logits.sum().backward()
    with pytest.raises(CaptureError, match="never ran"):
        tapped(llama, resolve(llama, "idle:out"), batch.inputs)


def test_a_capture_without_any_pass_is_an_error(llama: PreTrainedModel, batch: Batch) -> None:
    # "A site that did not fire is an error, never an empty result."
    with (
        pytest.raises(CaptureError),
        Capture(llama, "blocks.0.hook_resid_post", Collect()) as capture,
    ):
        capture.at(batch.content_mask)


def test_a_pass_of_an_inner_module_is_an_error_and_no_empty_result(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # Only the root's forward counts; rows that nobody counts must not end as silence.
    with (
        pytest.raises(CaptureError),
        Capture(llama, "blocks.0.hook_resid_post", Collect()) as capture,
    ):
        capture.at(batch.content_mask)
        llama.get_submodule("model")(**batch.inputs)


def test_a_site_above_an_early_stop_is_an_error_and_no_empty_result(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # tapped() leaves the forward early; a capture around it that waits for a deeper site gets
    # nothing and must say so.
    with (
        pytest.raises(CaptureError),
        Capture(llama, "blocks.1.hook_resid_post", Collect()) as capture,
    ):
        capture.at(batch.content_mask)
        tapped(llama, resolve(llama, "blocks.0.hook_resid_post"), batch.inputs)


def test_a_module_that_runs_twice_in_one_pass_is_an_error(
    llama: PreTrainedModel, batch: Batch
) -> None:
    layers = llama.get_submodule("model.layers")
    shared = nn.Linear(16, 16)
    layers.get_submodule("0").add_module("twice", shared)
    handle = layers.get_submodule("0").register_forward_hook(
        lambda _m, _a, output: shared(shared(output))
    )
    with (
        pytest.raises(CaptureError, match="2 times"),
        Capture(llama, "model.layers.0.twice:out", Collect()) as capture,
    ):
        capture.at(batch.content_mask)
        llama(**batch.inputs)
    handle.remove()


def test_a_gradient_that_never_comes_is_an_error(llama: PreTrainedModel, batch: Batch) -> None:
    with (
        pytest.raises(CaptureError, match="gradient"),
        Capture(llama, "blocks.0.hook_resid_post_grad", Collect()) as capture,
    ):
        capture.at(batch.content_mask)
        llama(**batch.inputs)
    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    with (
        pytest.raises(CaptureError, match="gradients_only"),
        Capture(llama, "blocks.0.hook_resid_post_grad", Collect()) as capture,
    ):
        capture.at(batch.content_mask)
        llama(**batch.inputs)


# --- gradient checkpointing -----------------------------------------------------------------------

CHECKPOINTED = [
    "hook_embed",
    "blocks.*.hook_resid_pre",
    "blocks.*.hook_resid_post",
    "blocks.*.mlp.out.hook_in",
    "ln_final.hook_out",
    "hook_embed_grad",
    "blocks.*.hook_resid_pre_grad",
    "blocks.*.hook_resid_post_grad",
    "blocks.*.attn.q.hook_out_grad",
    "blocks.*.mlp.out.hook_in_grad",
    "blocks.*.attn.v.hook_in",
    "blocks.*.mlp.hook_out",
    "blocks.*.mlp.hook_out_grad",
    "blocks.*.ln2.hook_in_grad",
]


def _checkpointed(model: PreTrainedModel, reentrant: bool) -> None:
    # Renamed within transformers 5; the old name warns.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    # transformers checkpoints in training mode only; these configurations have no dropout
    model.train()
    assert model.get_submodule("model.layers.0").gradient_checkpointing is True


def _agree(first: Collect, second: Collect) -> None:
    assert set(first.names()) == set(second.names())
    for name in first.names():
        assert first[name].shape == second[name].shape, (
            name
        )  # recomputed rows are not delivered twice
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_no_activation_and_no_gradient(
    reentrant: bool, frozen: bool, make_model: ModelMaker, batch: Batch
) -> None:
    def run(model: PreTrainedModel) -> Collect:
        if not frozen:
            return _captured(model, CHECKPOINTED, batch, batch.content_mask, backward=True)
        with gradients_only(model):
            return _captured(model, CHECKPOINTED, batch, batch.content_mask, backward=True)

    plain, checkpointed = make_model(), make_model()
    _checkpointed(checkpointed, reentrant)
    _agree(run(plain), run(checkpointed))
    for (name, first), (_, second) in zip(
        plain.named_parameters(), checkpointed.named_parameters(), strict=True
    ):
        assert (first.grad is None) == (second.grad is None) == frozen, name
        if first.grad is not None and second.grad is not None:
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_later_pass_with_another_mask_does_not_change_which_gradients_an_earlier_pass_delivers(
    reentrant: bool | None, make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, batch = make_model(), make_batch((6, 6))
    if reentrant is not None:
        _checkpointed(model, reentrant)
    seen: list[list[list[int]]] = []
    first, second = batch.content_mask, batch.answer_mask
    # An MLP lies inside the checkpointed block, so its hooks run again during backward.
    with Capture(
        model, "blocks.0.mlp.hook_out_grad", lambda _site, rows: seen.append(rows.where.tolist())
    ) as capture:
        capture.at(first)
        loss = cross_entropy(model, batch)
        capture.at(second)
        loss = loss + 2 * cross_entropy(model, batch)
        loss.backward()
    assert sorted(seen) == sorted([first.nonzero().tolist(), second.nonzero().tolist()])


def test_two_passes_before_one_backward_are_refused_under_reentrant_checkpointing(
    make_model: ModelMaker, batch: Batch
) -> None:
    # A recomputed row cannot be told from another pass's there; rows selected by the wrong mask
    # would be silently wrong.
    model = make_model()
    _checkpointed(model, reentrant=True)
    with (
        pytest.raises(CaptureError, match="2 forward passes"),
        Capture(model, "blocks.0.mlp.hook_out_grad", Collect()) as capture,
    ):
        capture.at(batch.content_mask)
        loss = cross_entropy(model, batch)
        capture.at(batch.answer_mask)
        loss = loss + cross_entropy(model, batch)
        loss.backward()


@pytest.mark.parametrize("stop", [False, True])
def test_a_tapped_tensor_has_the_same_gradient_under_checkpointing(
    stop: bool, make_model: ModelMaker, batch: Batch
) -> None:
    plain, checkpointed = make_model(), make_model()
    _checkpointed(checkpointed, reentrant=False)
    found = []
    for model in (plain, checkpointed):
        (site,) = resolve(model, "blocks.0.mlp.hook_out")
        tapped(model, [site], batch.inputs, stop=stop)[site.name].square().sum().backward()
        found.append([p.grad for p in model.get_submodule("model.layers.0").parameters()])
    for first, second in zip(*found, strict=True):
        assert first is not None and second is not None
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)


def test_a_tapped_tensor_is_live_or_an_error_under_reentrant_checkpointing(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # Reentrant checkpointing runs the block without a graph. A dead tensor would turn a loss term
    # off in silence.
    _checkpointed(llama, reentrant=True)
    (site,) = resolve(llama, "blocks.0.mlp.hook_out")
    try:
        tensor = tapped(llama, [site], batch.inputs)[site.name]
    except CaptureError:
        return
    assert tensor.requires_grad


# --- gradients_only and tapped --------------------------------------------------------------------


def test_gradients_only_gives_the_same_output_gradients_and_puts_the_flags_back(
    make_model: ModelMaker, batch: Batch
) -> None:
    sites = [EVERY_LINEAR_GRADIENT, "blocks.*.hook_resid_post_grad", "hook_embed_grad"]
    full = _captured(make_model(), sites, batch, batch.content_mask, backward=True)
    model = make_model()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad = False
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with gradients_only(model):
        light = _captured(model, sites, batch, batch.content_mask, backward=True)
        assert not any(p.requires_grad for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert _hook_count(model) == 0
    _agree(full, light)
    with pytest.raises(ZeroDivisionError), gradients_only(model):
        raise ZeroDivisionError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_tapped_returns_live_whole_tensors_and_runs_nothing_above(
    llama: PreTrainedModel, batch: Batch
) -> None:
    hidden = llama(**batch.inputs, output_hidden_states=True).hidden_states[1]
    before = _hook_count(llama)  # transformers keeps hooks of its own
    ran: list[str] = []
    handle = llama.get_submodule("model.layers.1").register_forward_hook(
        lambda *_: ran.append("layer 1")
    )
    sites = resolve(llama, ["blocks.0.hook_resid_post", "blocks.0.mlp.hook_in"])
    live = tapped(llama, sites, batch.inputs)
    assert not ran
    torch.testing.assert_close(live["blocks.0.hook_resid_post"], hidden, rtol=0, atol=0)
    assert live["blocks.0.hook_resid_post"].requires_grad
    tapped(llama, sites, batch.inputs, stop=False)
    assert ran == ["layer 1"]
    handle.remove()
    assert _hook_count(llama) == before


def test_tapped_refuses_gradient_sites(llama: PreTrainedModel, batch: Batch) -> None:
    with pytest.raises(CaptureError, match="gradient"):
        tapped(llama, resolve(llama, "blocks.0.hook_resid_post_grad"), batch.inputs)
    assert _hook_count(llama) == 0


# --- Moments --------------------------------------------------------------------------------------


def _rows_with_offset(
    seed: int, count: int, width: int, offset: float, scale: float = 1.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    mixing /= mixing.norm(dim=1, keepdim=True)  # every coordinate has spread 1
    directions = torch.randn(width, generator=generator, dtype=torch.float64).sign()
    return (
        (
            torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing.T
            + offset * directions
        )
        * scale
    ).float()


def _check_moments(moments: Moments, rows: Tensor, scale: float = 1.0) -> None:
    exact = rows.double()
    mean = exact.mean(0)
    covariance = (exact - mean).T @ (exact - mean) / len(exact)
    assert moments.count == len(rows)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    spread = covariance.diagonal().mean().sqrt()
    assert float((moments.mean - mean).abs().max()) <= 1e-9 * float(mean.abs().max() + spread)
    # Relative to the spread, not to the mean: that is what centring buys.
    assert float((moments.covariance - covariance).abs().max()) <= 1e-5 * scale**2


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
@given(
    seed=st.integers(0, 999),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_moments_equal_float64_brute_force_under_any_chunking_and_merging(
    offset: float, seed: int, cuts: list[int], order: Random
) -> None:
    rows = _rows_with_offset(seed, 300, 5, offset)
    edges = [0, *sorted(cuts), 300]
    chunks = [rows[a:b] for a, b in pairwise(edges)]  # some are empty
    streamed = Moments()
    for chunk in chunks:
        streamed.update(chunk)
    _check_moments(streamed, rows)
    parts = [Moments() for _ in chunks]
    for part, chunk in zip(parts, chunks, strict=True):
        part.update(chunk)
    order.shuffle(parts)
    merged = Moments()
    for part in parts:
        merged.merge(part)
    _check_moments(merged, rows)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
def test_moments_do_not_depend_on_the_scale_of_the_rows(scale: float) -> None:
    # Output gradients are many orders of magnitude smaller than activations.
    rows = _rows_with_offset(3, 300, 5, 3.0, scale)
    moments = Moments()
    for chunk in rows.split(70):
        moments.update(chunk)
    _check_moments(moments, rows, scale)


def test_merging_leaves_the_other_moments_alone() -> None:
    rows = _rows_with_offset(0, 60, 4, 1.0)
    first, second = Moments(), Moments()
    second.update(rows[:40])
    first.merge(second)
    first.update(rows[40:])
    _check_moments(second, rows[:40])
    _check_moments(first, rows)


def test_no_row_has_no_covariance() -> None:
    moments = Moments()
    moments.update(torch.zeros(0, 4))
    assert moments.count == 0
    with pytest.raises(ValueError, match="no row"):
        _ = moments.covariance


def test_moments_of_a_site_are_the_moments_of_its_collected_rows(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    rows, moments = Collect(), MomentsOf()

    def both(site: Site, found: Rows) -> None:
        rows(site, found)
        moments(site, found)

    with Capture(
        llama, ["blocks.1.hook_resid_post", "blocks.1.hook_resid_post_grad"], both
    ) as capture:
        for seed in range(4):
            part = make_batch((9, 4, 6), seed)
            capture.at(part.content_mask)
            cross_entropy(llama, part).backward()
    for name in ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post_grad"):
        assert len(rows[name]) == 4 * (8 + 3 + 5)
        _check_moments(moments[name], rows[name])
