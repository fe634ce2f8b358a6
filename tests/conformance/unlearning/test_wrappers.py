"""Wrappers around methods: names that compose, settings that pass through, and what noise on the
reference does to terms that see it at once or through later blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.hooks import CaptureError, resolve
from workbench.unlearning.methods import (
    METHODS,
    find_method,
    is_method,
    known_settings,
    recipe,
    settings_for,
)
from workbench.unlearning.noise import gaussian, noisy_reference
from workbench.unlearning.objectives import retain_cross_entropy, retain_kl, token_kl
from workbench.unlearning.recipe import Averaging
from workbench.unlearning.representation import keep_representation
from workbench.unlearning.smoothing import plain
from workbench.unlearning.wrappers import WRAPPERS, settings_of

Mover = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inner", ["npo", "simnpo", "idk-dpo", "adaptive-rmu", "rsv", "kl-min"])
def test_a_wrapped_method_has_the_settings_of_both(
    inner: str, wrapper: str, llama: PreTrainedModel
) -> None:
    name = f"{inner}-{wrapper}"
    entry, own = find_method(name), settings_of(WRAPPERS[wrapper])
    assert own and is_method(name)
    assert set(known_settings(name)) == set(known_settings(inner)) | set(own)
    expected = {**known_settings(inner), **METHODS[inner].small, **own, **WRAPPERS[wrapper].small}
    if "retain" in expected:
        expected["retain"] = "kl" if wrapper == "rna" else "cross-entropy"
    assert settings_for(name, llama) == expected
    assert entry.title == f"{METHODS[inner].title}+{WRAPPERS[wrapper].title}"
    assert METHODS[inner].source in entry.source and WRAPPERS[wrapper].source in entry.source


def test_wrappers_stack(llama: PreTrainedModel) -> None:
    made = recipe("npo-rna-sam", llama, 0, {"noise": 0.5, "rho": 0.1})
    assert made.step is not plain
    assert (
        made.objective.retain is not retain_kl and made.objective.retain is not retain_cross_entropy
    )
    assert {"noise", "noise_layer", "rho", "beta"} <= set(known_settings("npo-rna-sam"))


@pytest.mark.parametrize("name", ["npo-rns", "rna", "-rna", "nop-rna", "npo-", "npo-rna-"])
def test_a_name_that_is_not_made_of_known_parts_is_refused(name: str) -> None:
    assert not is_method(name)
    with pytest.raises(WorkbenchError, match="method"):
        find_method(name)


@pytest.mark.parametrize("name", ["grad-diff-rna", "grad-ascent-rna", "whp-rna"])
def test_noise_needs_a_retain_term_that_reads_the_reference(
    name: str, llama: PreTrainedModel
) -> None:
    with pytest.raises(WorkbenchError, match="frozen reference"):
        recipe(name, llama, 0)


@pytest.mark.parametrize("name", ["cir-sam", "repselect-wa", "npo-sam-sam"])
def test_smoothing_needs_steps_of_its_own(name: str, llama: PreTrainedModel) -> None:
    with pytest.raises(WorkbenchError, match=r"adamw|already"):
        recipe(name, llama, 0)


def test_averaging_reaches_the_recipe(llama: PreTrainedModel) -> None:
    assert recipe("npo-wa", llama, 0, {"start": 0.5, "every": 2}).average == Averaging(0.5, 2)
    with pytest.raises(WorkbenchError, match="start"):
        recipe("npo-wa", llama, 0, {"start": 1.0})


def test_without_noise_the_wrapped_recipe_is_the_plain_one(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    made, bare = (
        recipe("npo-rna", llama, 0, {"noise": 0}),
        recipe("npo", llama, 0, {"retain": "kl"}),
    )
    assert made.objective.retain is bare.objective.retain is retain_kl


def test_noise_at_the_layer_that_is_read_is_added_to_what_is_read(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model = nearby(llama)
    (site,) = resolve(llama, "blocks.0.hook_resid_post")
    with torch.no_grad():
        states = [
            one(**batch.inputs, output_hidden_states=True)
            .hidden_states[1][batch.content_mask]
            .float()
            for one in (model, llama)
        ]
    expected = (states[0] - gaussian(0.4, 3)(states[1])).square().mean()
    found = noisy_reference(keep_representation(site), site, 0.4, 3)(model, batch, llama)
    torch.testing.assert_close(found.detach(), expected)


def _logits_with(model: PreTrainedModel, batch: Batch, delta: Tensor) -> Tensor:
    """Logits where ``delta`` ``[batch, position, width]`` is added after the first block, by
    PyTorch alone.
    """
    handle = model.model.layers[0].register_forward_hook(
        lambda _, __, out: (out[0] + delta, *out[1:]) if isinstance(out, tuple) else out + delta
    )
    try:
        with torch.no_grad():
            return model(**batch.inputs).logits.float()
    finally:
        handle.remove()


def test_noise_below_the_predictions_passes_through_the_blocks_above(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model = nearby(llama)
    (site,) = resolve(llama, "blocks.0.hook_resid_post")
    found = noisy_reference(retain_kl, site, 0.4, 3)(model, batch, llama)
    with torch.no_grad():
        stream = llama(**batch.inputs, output_hidden_states=True).hidden_states[1].float()
    content = batch.content_mask
    first = batch.attention_mask.bool() & ~content
    size = 0.4 * stream[content].norm(dim=-1).mean() / stream.shape[-1] ** 0.5
    delta = torch.zeros_like(stream)
    delta[content] = gaussian(0.4, 3)(stream[content]) - stream[content]
    delta[first] = size * torch.randn(
        stream[first].shape, generator=torch.Generator().manual_seed(3 + 1_000_003)
    )
    mask = batch.target_mask[:, 1:]
    with torch.no_grad():
        after = model(**batch.inputs).logits.float()[:, :-1][mask]
    expected = token_kl(_logits_with(llama, batch, delta)[:, :-1][mask], after).mean()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-6)
    assert float(found) != pytest.approx(float(retain_kl(model, batch, llama)))


def test_the_model_is_not_noised_and_no_hook_stays(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model = nearby(llama)
    (site,) = resolve(llama, "blocks.0.hook_resid_post")
    with torch.no_grad():
        before = [one(**batch.inputs).logits for one in (model, llama)]
    noisy_reference(retain_kl, site, 0.4, 3)(model, batch, llama).backward()
    with torch.no_grad():
        assert all(
            torch.equal(one(**batch.inputs).logits, old)
            for one, old in zip((model, llama), before, strict=True)
        )
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks
        for one in (model, llama)
        for module in one.modules()
    )


def test_noise_is_fresh_every_step_and_repeats_after_a_restart(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model = nearby(llama)
    (site,) = resolve(llama, "blocks.0.hook_resid_post")
    term = noisy_reference(retain_kl, site, 0.4, 3)
    first, second = float(term(model, batch, llama)), float(term(model, batch, llama))
    assert first != second
    term.restart()  # type: ignore[attr-defined]
    assert [float(term(model, batch, llama)) for _ in range(2)] == [first, second]


def test_padding_does_not_change_the_noise(
    llama: PreTrainedModel, batch: Batch, nearby: Mover, pad: Callable[..., Batch]
) -> None:
    model = nearby(llama)
    (site,) = resolve(llama, "blocks.0.hook_resid_post")
    one, other = (
        noisy_reference(retain_kl, site, 0.4, 3)(model, given, llama)
        for given in (batch, pad(batch))
    )
    torch.testing.assert_close(one, other)


def test_a_model_cannot_be_its_own_noisy_reference(llama: PreTrainedModel, batch: Batch) -> None:
    (site,) = resolve(llama, "blocks.0.hook_resid_post")
    with pytest.raises(ValueError, match="reference"):
        noisy_reference(retain_kl, site, 0.4, 3)(llama, batch, llama)


def test_a_term_that_never_runs_the_reference_cannot_carry_noise(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    (site,) = resolve(llama, "blocks.0.hook_resid_post")
    with pytest.raises(CaptureError, match="never ran"):
        noisy_reference(retain_cross_entropy, site, 0.4, 3)(nearby(llama), batch, llama)


def test_an_optimiser_of_a_whole_objective_is_adamw_or_sgd(llama: PreTrainedModel) -> None:
    assert recipe("rmu", llama, 0, {"optimiser": "sgd", "layer": 1}).optimiser == "sgd"
    with pytest.raises(WorkbenchError, match="'sgdd': did you mean sgd"):
        recipe("rmu", llama, 0, {"optimiser": "sgdd", "layer": 1})


def test_no_wrapper_hides_a_setting_of_a_method_or_of_another_wrapper() -> None:
    own = [
        name for wrapper in WRAPPERS.values() for name in settings_of(wrapper) if name != "rho"
    ]  # SAM's and adaptive SAM's: one smooths at a time
    assert len(own) == len(set(own))
    assert not set(own) & {
        name
        for entry in METHODS.values()
        if entry.inner is None
        for name in known_settings(entry.name)
    }
