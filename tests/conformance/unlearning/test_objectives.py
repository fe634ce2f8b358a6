"""Every loss term against its formula, at the reference and away from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.hooks import Site, resolve
from workbench.unlearning.objectives import (
    LossTerm,
    Objective,
    Pair,
    negative_cross_entropy,
    npo,
    retain_cross_entropy,
    retain_kl,
)
from workbench.unlearning.representation import (
    control_vector,
    keep_hidden,
    keep_representation,
    mlp_breaking,
    steer_to,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]
Gradients = Callable[[PreTrainedModel, Tensor], dict[str, Tensor]]


def _sequence_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """``[example]`` summed NLL of the target tokens, by hand."""
    log_probability = model(**batch.inputs).logits.log_softmax(-1)
    rows = []
    for row in range(batch.size):
        terms = [
            -log_probability[row, t - 1, batch.input_ids[row, t]]
            for t in range(1, batch.input_ids.shape[1])
            if batch.target_mask[row, t]
        ]
        rows.append(torch.stack(terms).sum())
    return torch.stack(rows)


def _close(first: dict[str, Tensor], second: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Two gradients agree relative to their common length."""
    length = math.sqrt(sum(float(value.double().square().sum()) for value in second.values()))
    difference = math.sqrt(
        sum(float((first[name] - second[name]).double().square().sum()) for name in second)
    )
    assert length > 0
    assert difference <= rtol * length


def _length(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradient.values()))


def _site(model: PreTrainedModel, name: str = "blocks.0.hook_resid_post") -> Site:
    (site,) = resolve(model, name)
    return site


def _hidden(model: PreTrainedModel, batch: Batch, index: int = 1) -> Tensor:
    hidden: Tensor = model(**batch.inputs, output_hidden_states=True).hidden_states[index]
    return hidden


def _mlp_outputs(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        layer.get_submodule("mlp").register_forward_hook(lambda _m, _a, out: found.append(out))
        for layer in model.get_submodule("model.layers").children()
    ]
    model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return found


# --- cross-entropy terms --------------------------------------------------------------------------


def test_gradient_ascent_is_minus_gradient_descent(llama: PreTrainedModel, batch: Batch) -> None:
    down, up = (
        retain_cross_entropy(llama, batch, llama),
        negative_cross_entropy(llama, batch, llama),
    )
    assert float(down.detach()) == pytest.approx(
        float(_sequence_nll(llama, batch).sum().detach()) / int(batch.target_mask.sum()), rel=1e-5
    )
    assert float(up.detach()) == -float(down.detach())


def test_an_objective_is_the_weighted_sum_of_its_terms(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    pair = Pair(make_batch((5, 6), 1), make_batch((7, 4), 2))
    objective = Objective(negative_cross_entropy, retain_cross_entropy, 0.3, 2.5)
    retain = objective.retain_term(llama, pair, llama)
    assert retain is not None
    with torch.no_grad():
        expected = -0.3 * retain_cross_entropy(
            llama, pair.forget, llama
        ) + 2.5 * retain_cross_entropy(llama, pair.retain, llama)
        assert float(objective(llama, pair, llama)) == pytest.approx(float(expected), rel=1e-6)
        assert float(objective.forget_term(llama, pair, llama) + retain) == pytest.approx(
            float(expected), rel=1e-6
        )
    alone = Objective(negative_cross_entropy)
    assert alone.retain_term(llama, pair, llama) is None
    assert float(alone(llama, pair, llama).detach()) == float(
        alone.forget_term(llama, pair, llama).detach()
    )


# --- NPO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("targets", ["text", "answer"])
def test_npo_at_the_reference_has_the_gradient_of_ascent_on_the_summed_likelihood(
    beta: float, targets: str, llama: PreTrainedModel, make_batch: BatchMaker, gradients: Gradients
) -> None:
    batch = make_batch((9, 4, 6), targets=targets)
    loss = npo(beta)(llama, batch, copy.deepcopy(llama))
    assert float(loss.detach()) == pytest.approx(2 / beta * math.log(2), rel=1e-5)
    _close(gradients(llama, loss), gradients(llama, -_sequence_nll(llama, batch).mean()))


def test_npo_approaches_gradient_ascent_as_beta_goes_to_zero(
    llama: PreTrainedModel, make_batch: BatchMaker, nearby: Mover, gradients: Gradients
) -> None:
    batch = make_batch((9, 4, 6))
    model = nearby(llama)
    ascent = gradients(model, -_sequence_nll(model, batch).mean())
    _close(gradients(model, npo(1e-5)(model, batch, llama)), ascent, rtol=1e-3)
    with pytest.raises(AssertionError):  # away from the reference a finite beta is another gradient
        _close(gradients(model, npo(1.0)(model, batch, llama)), ascent, rtol=1e-2)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_is_two_over_beta_times_the_mean_log_of_one_plus_the_ratio_to_the_beta(
    beta: float, llama: PreTrainedModel, make_batch: BatchMaker, nearby: Mover
) -> None:
    batch = make_batch((9, 4, 6))
    model = nearby(llama)
    with torch.no_grad():
        ratio = (_sequence_nll(llama, batch).double() - _sequence_nll(model, batch).double()).exp()
        assert float((ratio - 1).abs().max()) > 0.1
        found = npo(beta)(model, batch, llama)
    assert float(found) == pytest.approx(
        float((2 / beta) * (1 + ratio**beta).log().mean()), rel=1e-4
    )


def test_a_constant_on_all_logits_changes_no_likelihood_objective(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model = nearby(llama)
    terms = [npo(0.3), retain_kl, retain_cross_entropy, negative_cross_entropy]
    with torch.no_grad():
        before = [float(term(model, batch, llama)) for term in terms]
        handle = model.get_submodule("lm_head").register_forward_hook(
            lambda _m, _a, logits: logits + 3.0
        )
        after = [float(term(model, batch, llama)) for term in terms]
        handle.remove()
    assert after == pytest.approx(before, rel=1e-4)


def test_beta_must_be_positive() -> None:
    for beta in (0.0, -0.1):
        with pytest.raises(ValueError, match="beta"):
            npo(beta)


# --- RMU ------------------------------------------------------------------------------------------


def test_steering_is_the_mean_square_distance_to_the_target_over_content_tokens(
    llama: PreTrainedModel, batch: Batch
) -> None:
    target = 6.5 * control_vector(16, 0)
    with torch.no_grad():
        hidden = _hidden(llama, batch).double()
        rows = [
            hidden[row, t]
            for row in range(3)
            for t in range(1, int(batch.attention_mask[row].sum()))
        ]  # no BOS, no padding
        expected = sum(float((row - target.double()).square().sum()) for row in rows) / (
            len(rows) * 16
        )
        assert float(steer_to(_site(llama), target)(llama, batch, llama)) == pytest.approx(
            expected, rel=1e-5
        )


def test_steering_moves_nothing_above_its_site(
    llama: PreTrainedModel, batch: Batch, gradients: Gradients
) -> None:
    found = gradients(llama, steer_to(_site(llama), control_vector(16, 0))(llama, batch, llama))
    for name, gradient in found.items():
        below = name.startswith(("model.embed_tokens", "model.layers.0."))
        assert bool(gradient.any()) is below, name


def test_control_vectors_are_isotropic_unit_vectors() -> None:
    vectors = torch.stack([control_vector(4096, seed) for seed in range(12)]).double()
    cosines = vectors @ vectors.T
    torch.testing.assert_close(
        cosines.diagonal(), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert float((cosines - cosines.diag().diag()).abs().max()) < 0.1
    # U[0, 1) draws have a mean of sqrt(3)/2 of their length; isotropic ones have none.
    assert float(vectors.mean(1).abs().max()) * math.sqrt(4096) < 4
    assert torch.equal(control_vector(64, 3), control_vector(64, 3))
    assert control_vector(64, 3).dtype == torch.float32


def test_a_control_vector_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    control_vector(64, 3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_keeping_a_representation_costs_nothing_at_the_reference(
    llama: PreTrainedModel, batch: Batch, gradients: Gradients
) -> None:
    loss = keep_representation(_site(llama))(llama, batch, copy.deepcopy(llama))
    assert float(loss.detach()) == 0.0
    assert _length(gradients(llama, loss)) == 0.0


def test_keeping_a_representation_is_the_mean_square_difference(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model, mask = nearby(llama), batch.content_mask
    with torch.no_grad():
        expected = (
            (_hidden(model, batch)[mask].double() - _hidden(llama, batch)[mask].double())
            .square()
            .mean()
        )
        assert float(keep_representation(_site(llama))(model, batch, llama)) == pytest.approx(
            float(expected), rel=1e-5
        )


# --- MLP breaking and its retain term -------------------------------------------------------------


def test_mlp_breaking_at_the_reference_is_the_spread_of_the_output_lengths(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with torch.no_grad():
        lengths = [
            output[batch.content_mask].double().norm(dim=-1)
            for output in _mlp_outputs(llama, batch)
        ]
        expected = (
            sum(float(length.square().mean() / length.mean().square()) for length in lengths) / 2
        )
        loss = mlp_breaking(resolve(llama, "blocks.*.mlp.hook_out"))(
            llama, batch, copy.deepcopy(llama)
        )
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert expected > 1


@pytest.mark.parametrize("floor", [0.0, 0.4, 1.1])
def test_mlp_breaking_is_the_mean_over_layers_of_the_clipped_overlap(
    floor: float, llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model = nearby(llama, 0.2)
    clipped = 0
    with torch.no_grad():
        terms = []
        for before, after in zip(
            _mlp_outputs(llama, batch), _mlp_outputs(model, batch), strict=True
        ):
            o0, o = before[batch.content_mask].double(), after[batch.content_mask].double()
            overlap = (o * o0).sum(-1) / o0.norm(dim=-1).mean() ** 2
            clipped += int((overlap < floor).sum())
            terms.append(float(overlap.clamp(min=floor).mean()))
        loss = mlp_breaking(resolve(llama, "blocks.*.mlp.hook_out"), floor)(model, batch, llama)
    assert float(loss) == pytest.approx(sum(terms) / 2, rel=1e-4)
    assert clipped > 0 or floor == 0.0  # the clipping is exercised


def test_mlp_breaking_has_no_gradient_once_every_output_is_below_the_floor(
    llama: PreTrainedModel, batch: Batch, gradients: Gradients
) -> None:
    site = resolve(llama, "blocks.0.mlp.hook_out")
    turned = copy.deepcopy(llama)
    with torch.no_grad():
        down = turned.get_submodule("model.layers.0.mlp.down_proj").weight
        assert isinstance(down, nn.Parameter)
        down.mul_(-1)
    loss = mlp_breaking(site, 0.0)(turned, batch, llama)
    assert float(loss.detach()) == 0.0
    assert _length(gradients(turned, loss)) == 0.0
    # The same outputs lie above a floor that is low enough.
    assert _length(gradients(turned, mlp_breaking(site, -1e3)(turned, batch, llama))) > 1e-3


def test_keeping_the_hidden_state_costs_nothing_at_the_reference_and_its_gradient_is_finite(
    llama: PreTrainedModel, batch: Batch, gradients: Gradients
) -> None:
    loss = keep_hidden(_site(llama))(llama, batch, copy.deepcopy(llama))
    # The root has no derivative at zero, so the code may keep a tiny constant under it.
    assert 0 <= float(loss.detach()) < 1e-5
    found = gradients(llama, loss)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())
    assert _length(found) == 0.0


def test_keeping_the_hidden_state_is_relative_to_its_mean_length_over_all_real_tokens(
    llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model, mask = nearby(llama), batch.attention_mask.bool()  # BOS included
    with torch.no_grad():
        before, after = _hidden(llama, batch)[mask].double(), _hidden(model, batch)[mask].double()
        expected = (after - before).norm(dim=-1).mean() / before.norm(dim=-1).mean()
        assert float(keep_hidden(_site(llama))(model, batch, llama)) == pytest.approx(
            float(expected), rel=1e-5
        )


def test_retain_kl_is_zero_with_zero_gradient_at_the_reference(
    llama: PreTrainedModel, batch: Batch, gradients: Gradients
) -> None:
    loss = retain_kl(llama, batch, copy.deepcopy(llama))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-7)
    assert _length(gradients(llama, loss)) < 1e-5


def test_retain_kl_is_the_mean_over_target_tokens(
    llama: PreTrainedModel, make_batch: BatchMaker, nearby: Mover
) -> None:
    model, batch = nearby(llama), make_batch((9, 4, 6), targets="answer")
    with torch.no_grad():
        p, q = (
            other(**batch.inputs).logits.double().softmax(-1)[:, :-1] for other in (llama, model)
        )
        expected = (p * (p / q).log()).sum(-1)[batch.target_mask[:, 1:]].mean()
        assert float(retain_kl(model, batch, llama)) == pytest.approx(float(expected), rel=1e-4)


# --- what holds for every term --------------------------------------------------------------------


def _terms(model: PreTrainedModel) -> dict[str, LossTerm]:
    return {
        "retain cross-entropy": retain_cross_entropy,
        "negative cross-entropy": negative_cross_entropy,
        "retain kl": retain_kl,
        "npo": npo(0.1),
        "steer to": steer_to(_site(model), 5 * control_vector(16, 0)),
        "keep representation": keep_representation(_site(model)),
        "mlp breaking": mlp_breaking(resolve(model, "blocks.*.mlp.hook_out")),
        "keep hidden": keep_hidden(_site(model)),
    }


TERMS = [
    "retain cross-entropy",
    "negative cross-entropy",
    "retain kl",
    "npo",
    "steer to",
    "keep representation",
    "mlp breaking",
    "keep hidden",
]


def test_the_list_of_terms_is_complete(llama: PreTrainedModel) -> None:
    assert list(_terms(llama)) == TERMS


@pytest.mark.parametrize("name", TERMS)
def test_padding_enters_no_objective(
    name: str,
    llama: PreTrainedModel,
    batch: Batch,
    pad: Padder,
    nearby: Mover,
    gradients: Gradients,
) -> None:
    model, term = nearby(llama), _terms(llama)[name]
    plain, padded = term(model, batch, llama), term(model, pad(batch, 4), llama)
    assert float(padded.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    _close(gradients(model, padded), gradients(model, plain))


@pytest.mark.parametrize("name", TERMS)
def test_every_objective_moves_the_gradient_away_from_its_trivial_points(
    name: str, llama: PreTrainedModel, batch: Batch, nearby: Mover, gradients: Gradients
) -> None:
    model = nearby(llama)
    found = gradients(model, _terms(llama)[name](model, batch, llama))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())
    assert _length(found) > 1e-3


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_of_every_objective_is_its_derivative(
    name: str, llama: PreTrainedModel, batch: Batch, nearby: Mover, gradients: Gradients
) -> None:
    # Central differences in float64 along the gradient itself; losses are taken in float32, hence
    # the modest tolerance.
    model, term, step = nearby(llama.double()), _terms(llama)[name], 2e-3
    gradient = gradients(model, term(model, batch, llama))
    length = _length(gradient)
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter_name, parameter in moved.named_parameters():
                parameter.add_(gradient[parameter_name], alpha=sign * step / length)
            values.append(float(term(moved, batch, llama)))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(length, rel=2e-2)


@pytest.mark.parametrize("name", TERMS)
def test_the_reference_receives_no_gradient_and_is_not_changed(
    name: str, llama: PreTrainedModel, batch: Batch, nearby: Mover
) -> None:
    model = nearby(llama)
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    _terms(llama)[name](model, batch, llama).backward()
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert all(torch.equal(value, before[key]) for key, value in llama.state_dict().items())
