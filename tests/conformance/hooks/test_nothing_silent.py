"""A pass that cannot be followed is an error that says why: never a wrong row, never an empty
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy
from workbench.hooks import (
    Capture,
    CaptureError,
    Collect,
    MomentsOf,
    Rows,
    edit,
    peek,
    real_tokens,
    resolve,
    steer,
    tapped,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]


def _gradients(model: PreTrainedModel, sites: str | Sequence[str], batch: Batch) -> Collect:
    rows = Collect()
    with Capture(model, sites, rows, at=real_tokens):
        cross_entropy(model, batch).backward()
    return rows


def _hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


# --- nothing silent -------------------------------------------------------------------------------


def _share_the_mlp(model: nn.Module) -> None:
    model.get_submodule("model.layers.1").mlp = model.get_submodule(
        "model.layers.0.mlp"
    )  # block 1's MLP is block 0's


def _skip_the_block(model: nn.Module) -> None:
    model.get_submodule("model.layers.1").forward = lambda hidden_states, **_kwargs: hidden_states  # type: ignore[method-assign]


def _fuse_the_mlp(model: nn.Module) -> None:
    mlp = model.get_submodule("model.layers.1.mlp")

    def fused(x: Tensor) -> Tensor:
        return F.linear(
            F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight),
            mlp.down_proj.weight,
        )  # type: ignore[union-attr]

    mlp.forward = fused  # type: ignore[method-assign]


DISTURBED = {
    "shared": (_share_the_mlp, "blocks.1.mlp.hook_out", "model.layers.1.mlp"),
    "skipped": (_skip_the_block, "blocks.1.mlp.hook_out", "model.layers.1.mlp"),
    "fused": (_fuse_the_mlp, "blocks.1.mlp.out.hook_in", "model.layers.1.mlp.down_proj"),
}


def _capture_pass(model: PreTrainedModel, site: str, batch: Batch) -> None:
    with Capture(model, site, Collect(), at=real_tokens):
        model(**batch.inputs)


def _capture_forward(model: PreTrainedModel, site: str, batch: Batch) -> None:
    with Capture(model, site, Collect(), at=real_tokens) as capture:
        capture.forward(batch.inputs)


def _capture_backward(model: PreTrainedModel, site: str, batch: Batch) -> None:
    _gradients(model, f"{site}_grad", batch)


def _edit(model: PreTrainedModel, site: str, batch: Batch) -> None:
    with edit(model, {site: steer(torch.ones(1))}):
        model(**batch.inputs)


@pytest.mark.parametrize("way", [_capture_pass, _capture_forward, _capture_backward])
@pytest.mark.parametrize("disturbance", list(DISTURBED))
def test_a_module_that_is_shared_skipped_or_fused_away_is_an_error_with_site_and_path(
    disturbance: str, way: Callable[..., None], llama: PreTrainedModel, batch: Batch
) -> None:
    disturb, site, path = DISTURBED[disturbance]
    way(llama, site, batch)  # undisturbed, it works
    disturb(llama)
    with pytest.raises(CaptureError) as raised:
        way(llama, site, batch)
    assert site in str(raised.value) and path in str(raised.value)


@pytest.mark.parametrize("disturbance", ["skipped", "fused"])
def test_tapped_peek_and_edit_refuse_a_module_that_never_runs(
    disturbance: str, llama: PreTrainedModel, batch: Batch
) -> None:
    disturb, site, _ = DISTURBED[disturbance]
    disturb(llama)
    for way in (
        lambda: tapped(llama, resolve(llama, site), batch.inputs),
        lambda: peek(llama, batch.inputs, site),
        lambda: _edit(llama, site, batch),
    ):
        with pytest.raises(CaptureError, match=site):
            way()


@pytest.mark.parametrize("way", ["tapped", "peek"])
def test_a_look_at_a_shared_module_gives_the_named_blocks_tensor_or_an_error(
    way: str, llama: PreTrainedModel, batch: Batch
) -> None:
    # Both blocks run one MLP; what is called blocks.1 must not be what block 0 computed.
    _share_the_mlp(llama)
    outputs: list[Tensor] = []
    llama.get_submodule("model.layers.0.mlp").register_forward_hook(
        lambda _m, _a, output: outputs.append(output)
    )
    llama(**batch.inputs)
    site = "blocks.1.mlp.hook_out"
    try:
        found = (
            tapped(llama, resolve(llama, site), batch.inputs)
            if way == "tapped"
            else peek(llama, batch.inputs, site)
        )
    except CaptureError:
        return
    torch.testing.assert_close(found[site], outputs[1])


def test_a_block_that_is_skipped_in_a_later_pass_only_is_an_error(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with (
        pytest.raises(CaptureError, match=r"blocks\.1\.mlp\.hook_out never ran"),
        Capture(llama, "blocks.1.mlp.hook_out", Collect(), at=real_tokens),
    ):
        llama(**batch.inputs)
        _skip_the_block(llama)
        llama(**batch.inputs)


@pytest.mark.parametrize("cut", ["forward", "tapped"])
def test_a_pass_cut_short_by_someone_else_is_an_error_where_deeper_sites_were_awaited(
    cut: str, llama: PreTrainedModel, batch: Batch
) -> None:
    # After one whole pass: the shallow site has seen two passes, the deep one only the first.
    site = "blocks.0.hook_resid_post"
    with Capture(llama, site, Collect(), at=real_tokens) as short:
        with (
            pytest.raises(CaptureError, match=r"blocks\.1\.hook_resid_post"),
            Capture(llama, ["hook_embed", "blocks.1.hook_resid_post"], Collect(), at=real_tokens),
        ):
            llama(**batch.inputs)
            if cut == "forward":
                short.forward(batch.inputs)
            else:
                tapped(llama, resolve(llama, site), batch.inputs)


def test_passes_without_a_backward_are_counted_in_the_error(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with (
        pytest.raises(CaptureError, match="1 of 3 passes"),
        Capture(llama, "blocks.0.hook_resid_post_grad", Collect(), at=real_tokens),
    ):
        cross_entropy(llama, batch).backward()
        llama(**batch.inputs)
        cross_entropy(llama, batch).backward()


def test_a_second_backward_through_one_pass_is_an_error(
    llama: PreTrainedModel, batch: Batch
) -> None:
    # A gradient counts once per pass; two parts of one gradient as two sets of rows would be wrong
    # moments.
    with (
        pytest.raises(CaptureError),
        Capture(llama, "blocks.0.hook_resid_post_grad", Collect(), at=real_tokens),
    ):
        loss = cross_entropy(llama, batch)
        loss.backward(retain_graph=True)
        loss.backward()


def test_a_second_backward_through_one_pass_does_not_hide_that_another_had_none(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with (
        pytest.raises(CaptureError),
        Capture(llama, "blocks.0.hook_resid_post_grad", Collect(), at=real_tokens),
    ):
        loss = cross_entropy(llama, batch)
        loss.backward(retain_graph=True)
        loss.backward()
        llama(**batch.inputs)


def test_a_backward_after_the_capture_is_an_error_and_delivers_nothing(
    llama: PreTrainedModel, batch: Batch
) -> None:
    given: list[Rows] = []
    with (
        pytest.raises(CaptureError, match="1 of 1 passes"),
        Capture(
            llama,
            "blocks.0.hook_resid_post_grad",
            lambda _site, rows: given.append(rows),
            at=real_tokens,
        ),
    ):
        loss = cross_entropy(llama, batch)
    loss.backward()
    assert not given
    assert all(
        p.grad is not None for p in llama.parameters()
    )  # the caller's own backward is not disturbed


def test_a_site_below_everything_trainable_is_an_error_that_names_the_remedy(
    llama: PreTrainedModel, batch: Batch
) -> None:
    for name, parameter in llama.named_parameters():
        parameter.requires_grad_("layers.1.mlp.down_proj" in name)
    assert (
        len(_gradients(llama, "blocks.1.mlp.hook_out_grad", batch)["blocks.1.mlp.hook_out_grad"])
        == 18
    )
    for below in ("blocks.0.mlp.hook_out_grad", "blocks.1.mlp.out.hook_in_grad"):
        with pytest.raises(CaptureError, match="gradients_only"):
            _gradients(llama, [below, "blocks.1.mlp.hook_out_grad"], batch)


def test_a_site_above_the_place_where_the_loss_is_taken_is_an_error(
    llama: PreTrainedModel, batch: Batch
) -> None:
    sites = ["blocks.0.hook_resid_post_grad", "blocks.1.mlp.hook_out_grad"]
    with (
        pytest.raises(CaptureError, match=r"blocks\.1\.mlp\.hook_out_grad") as raised,
        Capture(llama, sites, Collect(), at=real_tokens),
    ):
        llama(**batch.inputs, output_hidden_states=True).hidden_states[1].square().mean().backward()
    assert "does not depend" in str(raised.value) and "blocks.0" not in str(raised.value)


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def _compile_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def _compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _compile_block(model: nn.Module) -> nn.Module:
    model.get_submodule("model.layers.0").compile(backend="eager")
    return model


def _compile_inner(model: nn.Module) -> nn.Module:
    model.get_submodule("model").compile(backend="eager")
    return model


def _swap_block(model: nn.Module) -> nn.Module:
    layers = model.get_submodule("model.layers")
    layers[0] = torch.compile(layers[0], backend="eager")  # type: ignore[operator,index]
    return model


@pytest.mark.parametrize("warm", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize(
    "compiling", [_compile_whole, _compile_in_place, _compile_inner, _compile_block, _swap_block]
)
def test_a_site_inside_a_compiled_module_is_refused_in_words(
    compiling: Callable[[nn.Module], nn.Module], warm: bool, llama: PreTrainedModel, batch: Batch
) -> None:
    site, path = "blocks.0.mlp.hook_out", "model.layers.0.mlp:out"
    resolved = resolve(llama, site)
    model = compiling(llama)
    if warm:  # hooks that come after the first call are the ones skipped in silence
        model(**batch.inputs)

    def capture(what: object) -> None:
        with Capture(model, what, Collect(), at=real_tokens):  # type: ignore[arg-type]
            cross_entropy(model, batch).backward()

    def edited(what: str) -> None:
        with edit(model, {what: steer(torch.ones(16))}):
            model(**batch.inputs)

    ways: dict[str, Callable[[], object]] = {
        "capture": lambda: capture(site),
        "capture by path": lambda: capture(path),
        "capture of a gradient": lambda: capture(f"{site}_grad"),
        "capture of resolved sites": lambda: capture(resolved),
        "tapped": lambda: tapped(model, resolved, batch.inputs),
        "peek": lambda: peek(model, batch.inputs, site),
        "edit": lambda: edited(site),
        "edit by path": lambda: edited(path),
    }
    unclear = {}
    for way, run in ways.items():
        with pytest.raises(CaptureError) as raised:
            run()
        if "compiled" not in str(raised.value) or "original" not in str(raised.value):
            unclear[way] = str(raised.value)
    assert not unclear


def _rows_or_error(
    model: nn.Module, called: nn.Module, site: str, batches: Sequence[Batch]
) -> Tensor | str:
    """The rows of ``site`` of ``model`` while ``called`` is called, or what the refusal says."""
    rows = Collect()
    try:
        with Capture(model, site, rows, at=real_tokens):
            for part in batches:
                cross_entropy(called, part).backward()  # type: ignore[arg-type]
    except CaptureError as error:
        return str(error)
    return rows[site]


EDGES = [
    "blocks.0.hook_resid_post",
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_post_grad",
    "blocks.0.hook_in_grad",
]


@pytest.mark.parametrize("warm", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("site", EDGES)
def test_a_site_at_the_edge_of_a_compiled_block_delivers_its_rows_or_an_error(
    site: str, warm: bool, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    batches = [make_batch((7, 5), seed) for seed in range(2)]
    expected = torch.cat([_gradients(llama, site, part)[site] for part in batches])
    logits = llama(**batches[0].inputs).logits
    _compile_block(llama)
    if warm:
        llama(**batches[0].inputs)
    for _ in range(2):  # code compiled inside the first capture must not be taken for the second's
        found = _rows_or_error(llama, llama, site, batches)
        if isinstance(found, str):
            assert site in found
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(llama(**batches[0].inputs).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize(
    "site",
    [
        "blocks.0.hook_resid_post",
        pytest.param("blocks.0.mlp.hook_out", marks=pytest.mark.full),
        pytest.param("unembed.hook_out", marks=pytest.mark.full),
        "blocks.0.mlp.hook_out_grad",
    ],
)
def test_a_call_of_the_compiled_version_of_a_captured_model_gives_right_rows_or_an_error(
    site: str, warm: bool, llama: PreTrainedModel, batch: Batch
) -> None:
    expected = _gradients(llama, site, batch)[site]
    compiled = _compile_whole(llama)
    if warm:
        compiled(**batch.inputs)
    found = _rows_or_error(llama, compiled, site, [batch])
    if isinstance(found, str):
        assert site in found
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --- bad input ------------------------------------------------------------------------------------


def test_a_capture_without_a_consumer_an_existing_site_or_a_boolean_mask_is_refused(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with pytest.raises(CaptureError, match="no consumer"):
        Capture(llama, "blocks.0.hook_resid_post")
    with pytest.raises(CaptureError, match=r"blocks\.0\.hook_resid_post"):
        Capture(llama, "blocks.0.hook_resid_pots", Collect())
    with pytest.raises(CaptureError, match="at least one"):
        Capture(llama, [], Collect())
    with pytest.raises(CaptureError, match="boolean"):
        Capture(llama, "blocks.0.hook_resid_post", Collect()).at(batch.attention_mask)
    assert _hook_count(llama) == 0


def test_a_site_of_a_deeper_model_is_refused_and_leaves_no_hook_behind(
    make_model: ModelMaker, batch: Batch
) -> None:
    deep, shallow = make_model(num_hidden_layers=3), make_model()
    sites = resolve(deep, ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"])
    shallow(**batch.inputs)
    before = _hook_count(shallow)
    with (
        pytest.raises(CaptureError, match=r"blocks\.2\.hook_resid_post"),
        Capture(shallow, sites, Collect(), at=real_tokens) as capture,
    ):
        capture.forward(batch.inputs)
    assert _hook_count(shallow) == before


def test_a_missing_result_is_answered_with_the_names_that_are_there(
    llama: PreTrainedModel, batch: Batch
) -> None:
    consumers: Mapping[str, Any] = {"rows": Collect(), "moments": MomentsOf()}
    with Capture(
        llama,
        ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_out"],
        *consumers.values(),
        at=real_tokens,
    ) as capture:
        capture.forward(batch.inputs)
    for consumer in consumers.values():
        with pytest.raises(
            CaptureError, match=r"'blocks\.0\.hook_resid_mid'.*blocks\.0\.hook_resid_post"
        ):
            consumer["blocks.0.hook_resid_mid"]
        with pytest.raises(CaptureError, match=r"blocks\.1\.mlp\.hook_out"):
            consumer["missing"]
