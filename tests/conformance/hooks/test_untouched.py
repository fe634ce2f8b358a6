"""What a capture leaves alone, what it costs, whose gradient it reads, and how captures and
consumers live together.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext

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
    Site,
    gradients_only,
    last_token,
    real_tokens,
    resolve,
    without_first,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]


def _gradients(
    model: PreTrainedModel,
    sites: str | Sequence[str],
    batch: Batch,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Collect:
    rows = Collect()
    with Capture(model, sites, rows, at=real_tokens):
        (
            cross_entropy(model, batch) if loss is None else loss(model(**batch.inputs).logits)
        ).backward()
    return rows


def _hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def _stream(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(**batch.inputs, output_hidden_states=True).hidden_states


class Witness:
    """A consumer that writes down everything it is told; ``fail`` makes it raise at its first
    rows.
    """

    def __init__(self, fail: bool = False) -> None:
        self.fail, self.begun, self.ended = fail, [], []  # type: ignore[var-annotated]
        self.given: list[tuple[str, Rows]] = []

    def begin(self, sites: tuple[Site, ...]) -> None:
        self.begun.append(sites)

    def end(self, finished: bool) -> None:
        self.ended.append(finished)

    def __call__(self, site: Site, rows: Rows) -> None:
        if self.fail:
            raise ZeroDivisionError("planted")
        self.given.append((site.name, rows))


# --- Capture.forward ------------------------------------------------------------------------------


def test_forward_builds_no_graph(llama: PreTrainedModel, batch: Batch) -> None:
    saved: list[torch.Size] = []
    outputs: list[Tensor] = []
    witness = Witness()
    llama.get_submodule("lm_head").register_forward_hook(
        lambda _m, _a, output: outputs.append(output)
    )

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        Capture(llama, ["hook_embed", "unembed.hook_out"], witness, at=real_tokens) as capture,
    ):
        capture.forward(batch.inputs)
        assert not saved
        assert [output.grad_fn for output in outputs] == [None] and not outputs[0].requires_grad
        llama(**batch.inputs)
    assert (
        saved and outputs[1].grad_fn is not None
    )  # the same pass outside forward() does build one
    assert len(witness.given) == 4
    assert all(
        rows.values.grad_fn is None and not rows.values.requires_grad for _, rows in witness.given
    )


@pytest.mark.parametrize(
    "sites",
    [
        ["blocks.0.ln1.hook_in", "blocks.0.hook_resid_post"],
        ["blocks.0.hook_resid_post", "blocks.0.ln1.hook_in"],
    ],
)
def test_forward_runs_nothing_above_the_deepest_site(
    sites: list[str], llama: PreTrainedModel, batch: Batch
) -> None:
    ran: list[str] = []
    for path, module in llama.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, path=path: ran.append(path))
    rows = Collect()
    with Capture(llama, sites, rows, at=real_tokens) as capture:
        capture.forward(batch.inputs)
    assert "model.layers.0.mlp.down_proj" in ran
    assert not [
        path for path in ran if path.startswith(("model.layers.1", "model.norm", "lm_head"))
    ]
    assert all(
        torch.equal(rows[site], _stream(llama, batch)[level][batch.attention_mask.bool()])
        for level, site in enumerate(sorted(sites, reverse=True))
    )


def test_forward_keeps_no_key_value_cache(
    llama: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("a cache was made")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.DynamicCache", refuse)
    with pytest.raises(ZeroDivisionError):
        llama(**batch.inputs)
    with Capture(llama, "unembed.hook_out", Collect(), at=real_tokens) as capture:
        capture.forward(batch.inputs)


def test_forward_can_be_repeated_and_leaves_the_models_own_passes_whole(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    batches = [make_batch((7, 5), 0), make_batch((3, 9, 4), 1), make_batch((6,), 2)]
    witness = Witness()
    with Capture(llama, "blocks.0.hook_resid_post", witness) as capture:
        for part in batches:
            capture.at(part.answer_mask)
            capture.forward(part.inputs)
        capture.at(real_tokens)
        assert llama(
            **batches[0].inputs
        ).logits.requires_grad  # the early stop is forward()'s alone
    assert [rows.number for _, rows in witness.given] == [0, 1, 2, 3]
    for (_, rows), part in zip(witness.given, batches, strict=False):
        assert torch.equal(rows.values, _stream(llama, part)[1][part.answer_mask])
        assert rows.where.tolist() == part.answer_mask.nonzero().tolist()


def test_forward_refuses_gradient_sites(llama: PreTrainedModel, batch: Batch) -> None:
    with pytest.raises(CaptureError, match=r"blocks\.1\.hook_resid_post_grad is a gradient"):
        with Capture(
            llama,
            ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post_grad"],
            Collect(),
            at=real_tokens,
        ) as capture:
            capture.forward(batch.inputs)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("how", ["forward", "a pass", "backward"])
@pytest.mark.parametrize("fail", [False, True])
def test_a_capture_leaves_the_state_of_model_and_torch_as_it_found_it(
    grad_mode: bool, how: str, fail: bool, llama: PreTrainedModel, batch: Batch
) -> None:
    llama.get_submodule("model.layers.0").train()
    llama.get_submodule("model.layers.1.mlp.up_proj").requires_grad_(False)
    llama.get_submodule("lm_head").weight.grad = torch.ones(50, 16)

    def state() -> tuple[object, ...]:
        flags = {name: (p.requires_grad, id(p), p._version) for name, p in llama.named_parameters()}
        grads = {
            name: None if p.grad is None else (id(p.grad), float(p.grad.sum()))
            for name, p in llama.named_parameters()
        }
        modes = {name: module.training for name, module in llama.named_modules()}
        return (
            flags,
            grads,
            modes,
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            _hook_count(llama),
        )

    def run() -> None:
        with Capture(
            llama,
            "blocks.1.hook_mlp_out" + "_grad" * (how == "backward"),
            Witness(fail),
            at=real_tokens,
        ) as capture:
            if how == "forward":
                capture.forward(batch.inputs)
            elif how == "a pass":
                llama(**batch.inputs)
            else:
                with torch.enable_grad():
                    # The gradient of the embedding alone, so that the caller's own backward leaves
                    # no .grad behind.
                    torch.autograd.grad(
                        llama(**batch.inputs).logits.sum(), [llama.get_input_embeddings().weight]
                    )

    with torch.set_grad_enabled(grad_mode):
        llama(**batch.inputs)  # transformers sets things up in the first pass
        before = state()
        if fail:
            with pytest.raises(ZeroDivisionError, match="planted"):
                run()
        else:
            run()
        assert state() == before


# --- memory ---------------------------------------------------------------------------------------


class _Saved:
    """One tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("how", ["forward", "gradients", "gradients_only"])
def test_thirty_batches_hold_no_more_memory_than_three(
    how: str, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    graph: weakref.WeakSet[_Saved] = weakref.WeakSet()
    saved = 0

    def pack(tensor: Tensor) -> _Saved:
        nonlocal saved
        saved += 1
        kept = _Saved(tensor)
        graph.add(kept)
        return kept

    def held() -> tuple[int, int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        return (
            len(tensors),
            sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            len(graph),
        )

    sites = ["blocks.*.hook_resid_post", "blocks.*.mlp.out.hook_in", "blocks.*.mlp.gate.hook_in"]
    sites += [] if how == "forward" else [f"{site}_grad" for site in sites]
    moments = MomentsOf()

    def passes(capture: Capture, count: int) -> None:
        for seed in range(count):
            part = make_batch((9, 4, 6), seed)
            if how == "forward":
                capture.forward(part.inputs)
            else:
                cross_entropy(llama, part).backward()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        if how == "gradients_only":
            with gradients_only(llama), Capture(llama, sites, moments, at=real_tokens) as capture:
                passes(capture, 3)
                early = held()
                passes(capture, 27)
                late = held()
        else:
            with Capture(llama, sites, moments, at=real_tokens) as capture:
                passes(capture, 3)
                early = held()
                passes(capture, 27)
                late = held()
    assert late == early
    assert early[2] == 0 and (saved > 0) == (how != "forward")
    assert moments["blocks.0.hook_resid_post"].count == 30 * 19


# --- whose gradient it is -------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "sites", [["0:out", "1:in", "1:out"], ["0:grad_out"], ["1:grad_in"], ["1:grad_out"]]
)
def test_an_in_place_kernel_changes_neither_rows_nor_gradients_of_what_it_overwrites(
    sites: list[str], bias: bool
) -> None:
    # With a bias, PyTorch's linear layer returns a view of a two-dimensional product; without, the
    # product itself.
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.ReLU(inplace=True), nn.Linear(7, 3))
    x, mask = torch.randn(2, 4, 5, generator=generator), torch.rand(2, 4, generator=generator) < 0.6
    before = model[0](x)
    after = F.relu(before)
    first, second = torch.autograd.grad(model[2](after).pow(3).sum(), [before, after])
    expected = {
        "0:out": before,
        "1:in": before,
        "1:out": after,
        "0:grad_out": first,
        "1:grad_in": first,
        "1:grad_out": second,
    }
    rows = Collect()
    # A hook on a view is lost when the view is overwritten. That must be said, not passed over.
    lost = (
        pytest.raises(CaptureError, match="in-place")
        if bias and sites == ["0:grad_out"]
        else nullcontext()
    )
    with lost, Capture(model, sites, rows) as capture:
        capture.at(mask)
        model(x).pow(3).sum().backward()
    if bias and sites == ["0:grad_out"]:
        return
    assert bool((before[mask] < 0).any())
    for site in sites:
        torch.testing.assert_close(
            rows[site], expected[site][mask].detach(), msg=lambda text, site=site: f"{site}: {text}"
        )


def test_the_gradients_of_two_readers_sum_to_the_gradient_of_what_they_read(
    llama: PreTrainedModel, batch: Batch
) -> None:
    gate, up, read = (
        "blocks.0.mlp.gate.hook_in_grad",
        "blocks.0.mlp.in.hook_in_grad",
        "blocks.0.ln2.hook_out_grad",
    )
    together = _gradients(llama, [gate, up, read], batch)
    for site in (gate, up, read):
        torch.testing.assert_close(
            together[site], _gradients(llama, site, batch)[site]
        )  # who else is captured does not matter
    assert float((together[gate] - together[read]).abs().max()) > 1e-3 * float(
        together[read].abs().max()
    )
    torch.testing.assert_close(together[gate] + together[up], together[read])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [("ln2.hook_in_grad", "hook_resid_mid_grad"), ("hook_in_grad", "hook_resid_pre_grad")],
)
def test_a_module_and_the_stream_it_reads_keep_their_own_gradients_in_either_order(
    nested: bool, first: str, second: str, llama: PreTrainedModel, batch: Batch
) -> None:
    first, second = f"blocks.1.{first}", f"blocks.1.{second}"
    alone = {site: _gradients(llama, site, batch)[site] for site in (first, second)}
    for outer, inner in ((first, second), (second, first)):
        if nested:
            rows = Collect()
            with Capture(llama, outer, rows, at=real_tokens):
                rows(*_only(llama, inner, batch))
        else:
            rows = _gradients(llama, [outer, inner], batch)
        for site in (first, second):
            torch.testing.assert_close(
                rows[site],
                alone[site],
                msg=lambda text, site=site, outer=outer: f"{site}, {outer} first: {text}",
            )


def _only(model: PreTrainedModel, site: str, batch: Batch) -> tuple[Site, Rows]:
    found: list[tuple[Site, Rows]] = []
    with Capture(model, site, lambda *given: found.append(given), at=real_tokens):
        cross_entropy(model, batch).backward()
    return found[0]


def test_a_batch_twice_halves_each_gradient_of_a_mean_loss_and_leaves_that_of_a_sum(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    def loss(batch: Batch, reduction: str) -> Callable[[Tensor], Tensor]:
        return lambda logits: F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction=reduction
        )

    once = make_batch((6, 6))
    twice = Batch(
        *(
            torch.cat([part, part])
            for part in (
                once.input_ids,
                once.attention_mask,
                once.answer_mask,
                once.subject_mask,
                once.target_mask,
            )
        ),
        once.items * 2,
    )
    sites = ["blocks.0.mlp.hook_out_grad", "blocks.1.attn.q.hook_in_grad", "hook_embed_grad"]
    for reduction, factor in (("mean", 0.5), ("sum", 1.0)):
        single, double = (
            _gradients(llama, sites, part, loss(part, reduction)) for part in (once, twice)
        )
        for site in sites:
            assert float(single[site].abs().max()) > 0
            torch.testing.assert_close(
                double[site],
                factor * single[site].repeat(2, 1),
                rtol=1e-4,
                atol=1e-6 * float(single[site].abs().max()),
            )


# --- several captures, several consumers ----------------------------------------------------------


def test_nested_captures_each_follow_their_own_sites_rules_and_consumers(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    outer_sites = ["blocks.0.hook_resid_post", "blocks.1.attn.q.hook_in_grad"]
    inner_sites = [
        "blocks.1.hook_resid_post",
        "blocks.1.attn.q.hook_in",
        "blocks.1.attn.q.hook_in_grad",
        "blocks.0.hook_resid_post_grad",
    ]
    batches = [make_batch((7, 5, 6), seed) for seed in range(2)]

    def run(sites: Sequence[str], masks: Sequence[Tensor]) -> Collect:
        rows = Collect()
        with Capture(llama, sites, rows) as capture:
            for part, mask in zip(batches, masks, strict=True):
                capture.at(mask)
                cross_entropy(llama, part).backward()
        return rows

    answers, contents = (
        [part.answer_mask for part in batches],
        [part.content_mask for part in batches],
    )
    outer_rows, inner_rows = Collect(), Collect()
    with (
        Capture(llama, outer_sites, outer_rows) as outer,
        Capture(llama, inner_sites, inner_rows, at=without_first) as inner,
    ):
        for part in batches:
            outer.at(part.answer_mask)
            cross_entropy(llama, part).backward()
    for found, alone in (
        (outer_rows, run(outer_sites, answers)),
        (inner_rows, run(inner_sites, contents)),
    ):
        assert set(found.names()) == set(alone.names())
        for name in alone.names():
            torch.testing.assert_close(found[name], alone[name])
    with (
        pytest.raises(CaptureError, match="at\\(mask\\)"),
        Capture(llama, outer_sites[0], Collect()) as outer,
        Capture(llama, inner_sites[0], Collect()) as inner,
    ):
        inner.at(real_tokens)  # speaks for the inner capture alone
        llama(**batches[0].inputs)


def test_an_inner_capture_that_ends_leaves_the_outer_one_in_place(
    llama: PreTrainedModel, batch: Batch
) -> None:
    outer, inner = Collect(), Collect()
    with Capture(llama, "blocks.0.hook_resid_post", outer, at=real_tokens):
        with Capture(llama, "blocks.0.hook_resid_post", inner, at=last_token):
            llama(**batch.inputs)
        llama(**batch.inputs)
    assert (len(outer["blocks.0.hook_resid_post"]), len(inner["blocks.0.hook_resid_post"])) == (
        36,
        3,
    )


def test_every_consumer_receives_every_row_between_one_begin_and_one_end(
    llama: PreTrainedModel, batch: Batch
) -> None:
    witnesses, moments = [Witness(), Witness()], MomentsOf()  # moments have no begin and no end
    sites = ["blocks.*.hook_resid_post", "blocks.0.hook_resid_post_grad"]
    with Capture(llama, sites, witnesses[0], moments, witnesses[1], at=real_tokens):
        assert [witness.begun for witness in witnesses] == [[resolve(llama, sites)]] * 2
        for _ in range(2):
            cross_entropy(llama, batch).backward()
        assert not any(witness.ended for witness in witnesses)
    for witness in witnesses:
        assert witness.begun == [resolve(llama, sites)] and witness.ended == [True]
        assert sorted((name, rows.number) for name, rows in witness.given) == sorted(
            (site.name, number) for site in resolve(llama, sites) for number in range(2)
        )
    assert [name for name, _ in witnesses[0].given] == [name for name, _ in witnesses[1].given]
    assert all(
        torch.equal(a.values, b.values)
        for (_, a), (_, b) in zip(*(witness.given for witness in witnesses), strict=True)
    )
    assert all(moments[site.name].count == 36 for site in resolve(llama, sites))


def test_consumers_are_told_when_a_capture_did_not_finish(
    llama: PreTrainedModel, batch: Batch
) -> None:
    def caller_raises() -> None:
        llama(**batch.inputs)
        raise ZeroDivisionError

    def nothing_runs() -> None:
        pass

    for body, error in ((caller_raises, ZeroDivisionError), (nothing_runs, CaptureError)):
        witnesses = [Witness(), Witness()]
        with pytest.raises(error), Capture(llama, "hook_embed", *witnesses, at=real_tokens):
            body()
        assert [(len(witness.begun), witness.ended) for witness in witnesses] == [(1, [False])] * 2
    witnesses = [Witness(), Witness(fail=True)]
    with (
        pytest.raises(ZeroDivisionError, match="planted"),
        Capture(llama, "hook_embed", *witnesses, at=real_tokens) as capture,
    ):
        capture.forward(batch.inputs)
    assert [(len(witness.begun), witness.ended) for witness in witnesses] == [(1, [False])] * 2


def test_one_capture_after_another_sees_what_a_single_one_sees(
    llama: PreTrainedModel, batch: Batch
) -> None:
    first, second = (_gradients(llama, "blocks.0.hook_resid_post_grad", batch) for _ in range(2))
    assert torch.equal(
        first["blocks.0.hook_resid_post_grad"], second["blocks.0.hook_resid_post_grad"]
    )
