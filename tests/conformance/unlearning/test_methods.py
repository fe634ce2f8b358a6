"""Likelihood and representation objectives of the methods against loops over examples and tokens,
and their values at the reference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.hooks import Site, resolve
from workbench.unlearning.objectives import (
    LossTerm,
    generic_prediction,
    idk_cross_entropy,
    idk_dpo,
    retain_cross_entropy,
    simnpo,
    teacher_kl,
    undial,
    weighted,
)
from workbench.unlearning.representation import (
    adaptive_steer_to,
    break_circuits,
    control_vector,
    keep_distance,
    steer_by,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]
Gradients = Callable[[PreTrainedModel, Tensor], dict[str, Tensor]]

DIRECTION = control_vector(16, 3)


@dataclass(frozen=True)
class Point:
    """A model away from its reference, a teacher trained elsewhere, and a batch whose rows have
    answers and refusals of unequal length.
    """

    model: PreTrainedModel
    reference: PreTrainedModel
    teacher: PreTrainedModel
    batch: Batch


@pytest.fixture
def point(make_model: ModelMaker, make_batch: BatchMaker, nearby: Mover) -> Point:
    reference = make_model(num_hidden_layers=3)
    batch = replace(
        make_batch((9, 5, 6), 1, answer=3, targets="answer"),
        alternative=make_batch((8, 6, 4), 2, answer=2, targets="answer"),
    )
    # One row answers in a single token, so that means over sequences and over tokens differ.
    batch.target_mask[1, 2:4] = False
    return Point(nearby(reference), reference, nearby(reference, 0.1, 5), batch)


def _site(model: PreTrainedModel, block: int = 0) -> Site:
    (site,) = resolve(model, f"blocks.{block}.hook_resid_post")
    return site


def _two(model: PreTrainedModel) -> tuple[Site, ...]:
    return resolve(model, "blocks.{0..1}.hook_resid_post")


# --- the formulas by hand: float64, one example and one token at a time ---------------------------


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    found: Tensor = model(**batch.inputs).logits.double()
    return found


def _targets(batch: Batch) -> list[list[int]]:
    """Positions of the target tokens, row by row; the token at ``t`` is predicted at ``t - 1``."""
    return [
        [t for t in range(1, batch.input_ids.shape[1]) if batch.target_mask[row, t]]
        for row in range(batch.size)
    ]


def _log_softmax(values: Tensor) -> Tensor:
    return values - values.exp().sum().log()


def _nlls(model: PreTrainedModel, batch: Batch) -> list[list[float]]:
    logits = _logits(model, batch)
    return [
        [-float(_log_softmax(logits[row, t - 1])[batch.input_ids[row, t]]) for t in positions]
        for row, positions in enumerate(_targets(batch))
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def _simnpo(p: Point, beta: float, margin: float) -> float:
    return (
        -2
        / beta
        * _mean([_log_sigmoid(beta * (_mean(row) - margin)) for row in _nlls(p.model, p.batch)])
    )


def _idk_dpo(p: Point, beta: float) -> float:
    refusals = p.batch.alternative
    assert refusals is not None
    terms = []
    for row in range(p.batch.size):
        refusal = sum(_nlls(p.reference, refusals)[row]) - sum(_nlls(p.model, refusals)[row])
        answer = sum(_nlls(p.reference, p.batch)[row]) - sum(_nlls(p.model, p.batch)[row])
        terms.append(_log_sigmoid(beta * (refusal - answer)))
    return -2 / beta * _mean(terms)


def _idk_cross_entropy(p: Point) -> float:
    assert p.batch.alternative is not None
    return _mean([nll for row in _nlls(p.model, p.batch.alternative) for nll in row])


def _soft_target(p: Point, target: Callable[[int, int], Tensor]) -> float:
    """Cross-entropy of the model to ``target(row, t)``, mean over target tokens."""
    logits = _logits(p.model, p.batch)
    terms = []
    for row, positions in enumerate(_targets(p.batch)):
        for t in positions:
            terms.append(-float((target(row, t) * _log_softmax(logits[row, t - 1])).sum()))
    return _mean(terms)


def _undial(p: Point, beta: float) -> float:
    logits = _logits(p.reference, p.batch)

    def target(row: int, t: int) -> Tensor:
        lowered = logits[row, t - 1].clone()
        lowered[p.batch.input_ids[row, t]] -= beta
        return _log_softmax(lowered).exp()

    return _soft_target(p, target)


def _generic(p: Point, strength: float) -> float:
    before, after = _logits(p.reference, p.batch), _logits(p.teacher, p.batch)

    def target(row: int, t: int) -> Tensor:
        rise = [
            max(0.0, float(after[row, t - 1, v] - before[row, t - 1, v]))
            for v in range(before.shape[-1])
        ]
        return _log_softmax(
            before[row, t - 1] - strength * torch.tensor(rise, dtype=torch.float64)
        ).exp()

    return _soft_target(p, target)


def _teacher_kl(p: Point, temperature: float, sign: float) -> float:
    teacher, student = (
        _logits(p.reference, p.batch) / temperature,
        _logits(p.model, p.batch) / temperature,
    )
    terms = []
    for row, positions in enumerate(_targets(p.batch)):
        for t in positions:
            expected, now = _log_softmax(teacher[row, t - 1]), _log_softmax(student[row, t - 1])
            terms.append(float((expected.exp() * (expected - now)).sum()))
    return sign * temperature**2 * _mean(terms)


@torch.no_grad()
def _rows(
    model: PreTrainedModel, batch: Batch, block: int = 0, *, bos: bool = False
) -> list[Tensor]:
    """The block's output at every real token; BOS only where asked for. Blocks 0 and 1 of 3 are
    hidden states before any final norm.
    """
    hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[block + 1].double()
    return [
        hidden[row, t]
        for row in range(batch.size)
        for t in range(0 if bos else 1, int(batch.attention_mask[row].sum()))
    ]


def _square(rows: list[Tensor], targets: list[Tensor]) -> float:
    return _mean(
        [
            _mean([float(difference) ** 2 for difference in row - target])
            for row, target in zip(rows, targets, strict=True)
        ]
    )


def _adaptive(p: Point, scale: float) -> float:
    length = _mean([float(row.norm()) for row in _rows(p.reference, p.batch)])
    rows = _rows(p.model, p.batch)
    return _square(rows, [scale * length * DIRECTION.double()] * len(rows))


def _steer_by(p: Point, scale: float) -> float:
    return _square(
        _rows(p.model, p.batch),
        [row + scale * DIRECTION.double() for row in _rows(p.reference, p.batch)],
    )


def _break(p: Point) -> float:
    layers = []
    for block in (0, 1):
        pairs = zip(_rows(p.model, p.batch, block), _rows(p.reference, p.batch, block), strict=True)
        layers.append(_mean([max(0.0, float(h @ h0 / (h.norm() * h0.norm()))) for h, h0 in pairs]))
    return _mean(layers)


def _distance(p: Point) -> float:
    layers = []
    for block in (0, 1):
        pairs = zip(
            _rows(p.model, p.batch, block, bos=True),
            _rows(p.reference, p.batch, block, bos=True),
            strict=True,
        )
        layers.append(_mean([float((h - h0).norm()) for h, h0 in pairs]))
    return _mean(layers)


LIKELIHOODS: dict[str, tuple[Callable[[Point], LossTerm], Callable[[Point], float]]] = {
    "simnpo": (lambda p: simnpo(0.7, 0.0), lambda p: _simnpo(p, 0.7, 0.0)),
    "simnpo with a margin": (lambda p: simnpo(4.5, 4.0), lambda p: _simnpo(p, 4.5, 4.0)),
    "idk dpo": (lambda p: idk_dpo(0.1), lambda p: _idk_dpo(p, 0.1)),
    "idk dpo, sharp": (lambda p: idk_dpo(2.0), lambda p: _idk_dpo(p, 2.0)),
    "idk cross-entropy": (lambda p: idk_cross_entropy, _idk_cross_entropy),
    "undial": (lambda p: undial(3.0), lambda p: _undial(p, 3.0)),
    "teacher kl": (lambda p: teacher_kl(2.0), lambda p: _teacher_kl(p, 2.0, 1.0)),
    "teacher kl, driven away": (
        lambda p: teacher_kl(4.0, sign=-1.0),
        lambda p: _teacher_kl(p, 4.0, -1.0),
    ),
    "weighted": (
        lambda p: weighted((0.3, teacher_kl(2.0)), (-2.0, idk_cross_entropy)),
        lambda p: 0.3 * _teacher_kl(p, 2.0, 1.0) - 2.0 * _idk_cross_entropy(p),
    ),
    "generic prediction": (
        lambda p: generic_prediction(p.teacher, 5.0),
        lambda p: _generic(p, 5.0),
    ),
}
REPRESENTATIONS: dict[str, tuple[Callable[[Point], LossTerm], Callable[[Point], float]]] = {
    "adaptive steer to": (
        lambda p: adaptive_steer_to(_site(p.model), DIRECTION, 5.0),
        lambda p: _adaptive(p, 5.0),
    ),
    "steer by": (lambda p: steer_by(_site(p.model), 10 * DIRECTION), lambda p: _steer_by(p, 10)),
    "break circuits": (lambda p: break_circuits(_two(p.model)), _break),
    "keep distance": (lambda p: keep_distance(_two(p.model)), _distance),
}
TERMS = LIKELIHOODS | REPRESENTATIONS


def _size(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradient.values()))


@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_its_formula(name: str, point: Point) -> None:
    make, by_hand = TERMS[name]
    with torch.no_grad():
        assert float(make(point)(point.model, point.batch, point.reference)) == pytest.approx(
            by_hand(point), rel=2e-5
        )


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_of_every_term_is_its_derivative(
    name: str, point: Point, gradients: Gradients
) -> None:
    # Central differences along the gradient; the weights are float64, the losses float32, hence the
    # modest tolerance.
    model, loss, step = copy.deepcopy(point.model).double(), TERMS[name][0](point), 2e-3
    gradient = gradients(model, loss(model, point.batch, point.reference))
    length, values = _size(gradient), []
    assert math.isfinite(length) and length > 1e-3
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for key, parameter in moved.named_parameters():
                parameter.add_(gradient[key], alpha=sign * step / length)
            values.append(float(loss(moved, point.batch, point.reference)))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(length, rel=2e-2)


@pytest.mark.parametrize("name", TERMS)
def test_reference_and_teacher_receive_no_gradient_and_are_not_changed(
    name: str, point: Point
) -> None:
    frozen = (point.reference, point.teacher)
    before = [copy.deepcopy(model.state_dict()) for model in frozen]
    TERMS[name][0](point)(point.model, point.batch, point.reference).backward()
    assert any(
        parameter.grad is not None and bool(parameter.grad.any())
        for parameter in point.model.parameters()
    )
    for model, state in zip(frozen, before, strict=True):
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", TERMS)
def test_padding_enters_no_term(name: str, point: Point, pad: Padder, gradients: Gradients) -> None:
    loss = TERMS[name][0](point)
    assert point.batch.alternative is not None
    padded = replace(pad(point.batch, 3), alternative=pad(point.batch.alternative, 2))
    # The padding that was there holds other ids, too.
    padded.input_ids[padded.attention_mask == 0] = 11
    plain, other = (loss(point.model, batch, point.reference) for batch in (point.batch, padded))
    assert float(other.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    first, second = gradients(point.model, plain), gradients(point.model, other)
    assert _size({key: first[key] - second[key] for key in first}) <= 1e-4 * _size(first)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_predictions_at_prompt_and_padding_positions_enter_no_likelihood_term(
    name: str, point: Point
) -> None:
    # Among the logits at positions that predict no target token are those that the released code of
    # UNDIAL averages over.
    loss = TERMS[name][0](point)
    masks = [
        part.target_mask for part in (point.batch, point.batch.alternative) if part is not None
    ]

    def shake(_module: Any, _args: Any, logits: Tensor) -> Tensor:
        (mask,) = [mask for mask in masks if mask.shape == logits.shape[:2]]
        predicts = torch.nn.functional.pad(mask[:, 1:], (0, 1))
        noise = 10 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
        return logits + noise * ~predicts[..., None]

    with torch.no_grad():
        before = float(loss(point.model, point.batch, point.reference))
        handles = [
            model.get_submodule("lm_head").register_forward_hook(shake)
            for model in (point.model, point.reference, point.teacher)
        ]
        after = float(loss(point.model, point.batch, point.reference))
    for handle in handles:
        handle.remove()
    assert after == before


# --- values that are known without a computation --------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_at_the_reference_prefers_nothing_and_pulls_answer_down_and_refusal_up(
    beta: float, point: Point, gradients: Gradients
) -> None:
    model, refusals = copy.deepcopy(point.reference), point.batch.alternative
    assert refusals is not None
    loss = idk_dpo(beta)(model, point.batch, point.reference)
    assert float(loss.detach()) == pytest.approx(2 / beta * math.log(2), rel=1e-6)
    # d/dx of -2/beta log sigmoid(beta x) is -1 at 0, so the gradient is that of the summed
    # log-likelihoods' difference.
    tokens = refusals.target_mask.sum() / 3 * retain_cross_entropy(model, refusals, model)
    expected = gradients(
        model,
        tokens
        - point.batch.target_mask.sum() / 3 * retain_cross_entropy(model, point.batch, model),
    )
    found = gradients(model, loss)
    assert _size({key: found[key] - expected[key] for key in found}) <= 1e-4 * _size(expected)


def test_dpo_falls_as_the_refusal_becomes_likelier_than_the_answer(point: Point) -> None:
    # The same likelihood on both sides cancels; only their difference counts.
    with torch.no_grad():
        same = idk_dpo(0.5)(
            point.model, replace(point.batch, alternative=replace(point.batch)), point.reference
        )
    assert float(same) == pytest.approx(4 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_distance_to_the_teacher_is_zero_with_zero_gradient_at_the_teacher(
    temperature: float, point: Point, gradients: Gradients
) -> None:
    model = copy.deepcopy(point.reference)
    loss = teacher_kl(temperature)(model, point.batch, point.reference)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert _size(gradients(model, loss)) < 1e-4


def test_the_temperature_leaves_the_size_of_the_gradient_alone_once_it_is_high(
    point: Point, gradients: Gradients
) -> None:
    low, high = (
        _size(gradients(point.model, teacher_kl(t)(point.model, point.batch, point.reference)))
        for t in (100.0, 400.0)
    )
    assert high == pytest.approx(low, rel=0.05)


def test_undial_with_nothing_lowered_is_the_entropy_of_the_reference(point: Point) -> None:
    logits = _logits(point.reference, point.batch)
    entropies = []
    for row, positions in enumerate(_targets(point.batch)):
        for t in positions:
            logs = _log_softmax(logits[row, t - 1])
            entropies.append(-float((logs.exp() * logs).sum()))
    with torch.no_grad():
        assert float(undial(0.0)(point.reference, point.batch, point.reference)) == pytest.approx(
            _mean(entropies), rel=1e-5
        )


def test_undial_lowers_the_true_token_and_keeps_the_ratios_of_the_others(point: Point) -> None:
    # Descent on UNDIAL from the reference moves the logits along target - softmax(z): down for the
    # true token, up in proportion for the rest.
    logits: list[Tensor] = []
    model = copy.deepcopy(point.reference)
    handle = model.get_submodule("lm_head").register_forward_hook(
        lambda _m, _a, out: (out.retain_grad(), logits.append(out))[1]
    )
    undial(10.0)(model, point.batch, point.reference).backward()
    handle.remove()
    gradient, row, t = logits[0].grad, 0, _targets(point.batch)[0][0]
    assert gradient is not None
    true = int(point.batch.input_ids[row, t])
    assert float(gradient[row, t - 1, true]) > 0
    others = [v for v in range(50) if v != true]
    shares = -gradient[row, t - 1, others] / logits[0][row, t - 1].detach().softmax(-1)[others]
    assert float(shares.min()) > 0
    torch.testing.assert_close(shares, shares.mean().expand_as(shares), rtol=1e-3, atol=1e-6)


def test_generic_prediction_of_an_unmoved_teacher_or_of_no_strength_is_the_entropy_of_the_reference(
    point: Point,
) -> None:
    with torch.no_grad():
        entropy = float(undial(0.0)(point.reference, point.batch, point.reference))
        assert float(
            generic_prediction(point.reference, 5.0)(point.reference, point.batch, point.reference)
        ) == pytest.approx(entropy, rel=1e-5)
        assert float(
            generic_prediction(point.teacher, 0.0)(point.reference, point.batch, point.reference)
        ) == pytest.approx(entropy, rel=1e-5)


def test_simnpo_averages_tokens_within_a_sequence_and_then_sequences(point: Point) -> None:
    with torch.no_grad():
        found = float(simnpo(1e-4, 0.0)(point.model, point.batch, point.reference))
    # For small beta the loss is 2/beta log 2 minus the mean of the per-sequence means; the mean
    # over tokens is another number.
    rows = _nlls(point.model, point.batch)
    expected, tokens = (
        _mean([_mean(row) for row in rows]),
        _mean([nll for row in rows for nll in row]),
    )
    assert abs(expected - tokens) > 0.05
    assert 2 / 1e-4 * math.log(2) - found == pytest.approx(expected, abs=0.02)


def test_breaking_circuits_is_one_at_the_reference_and_nothing_for_turned_representations(
    point: Point, gradients: Gradients
) -> None:
    model = copy.deepcopy(point.reference)
    loss = break_circuits(_two(model))(model, point.batch, point.reference)
    assert float(loss.detach()) == pytest.approx(1, abs=1e-6)
    turned = copy.deepcopy(point.reference)
    for block in (0, 1):  # every output points the other way; block 1 is given what it always saw
        turned.get_submodule(f"model.layers.{block}").register_forward_hook(
            lambda _m, _a, out: -out
        )
    turned.get_submodule("model.layers.1").register_forward_pre_hook(
        lambda _m, args: (-args[0], *args[1:])
    )
    loss = break_circuits(_two(turned))(turned, point.batch, point.reference)
    assert float(loss.detach()) == 0.0
    assert _size(gradients(turned, loss)) == 0.0


def test_breaking_circuits_takes_the_cosine_of_every_token_not_of_means(point: Point) -> None:
    # The baseline in the released CIR code divides by mean lengths; long tokens then count more
    # than short ones.
    cosine, of_means = [], []
    for block in (0, 1):
        now, before = (
            _rows(point.model, point.batch, block),
            _rows(point.reference, point.batch, block),
        )
        # Lengths that differ from token to token, as they do in trained models.
        stretched = [h * (1 + 4 * (index % 2)) for index, h in enumerate(now)]
        cosine.append(
            _mean(
                [float(h @ h0 / (h.norm() * h0.norm())) for h, h0 in zip(now, before, strict=True)]
            )
        )
        product = _mean([float(h @ h0) for h, h0 in zip(stretched, before, strict=True)])
        of_means.append(
            product
            / (
                _mean([float(h.norm()) for h in stretched])
                * _mean([float(h.norm()) for h in before])
            )
        )
    assert abs(_mean(cosine) - _mean(of_means)) > 1e-3

    def stretch(_module: Any, _args: Any, out: Tensor) -> Tensor:
        factors, index = torch.ones(out.shape[:2]), 0
        for row in range(point.batch.size):
            for t in range(1, int(point.batch.attention_mask[row].sum())):
                factors[row, t], index = 1 + 4 * (index % 2), index + 1
        return out * factors[..., None]

    with torch.no_grad():
        handle = point.model.get_submodule("model.layers.0").register_forward_hook(stretch)
        found = float(
            break_circuits((_site(point.model),))(point.model, point.batch, point.reference)
        )
        handle.remove()
    assert found == pytest.approx(cosine[0], rel=1e-5)
    assert abs(found - of_means[0]) > 1e-3


def test_keeping_the_distance_costs_nothing_at_the_reference_and_its_gradient_is_finite(
    point: Point, gradients: Gradients
) -> None:
    model = copy.deepcopy(point.reference)
    loss = keep_distance(_two(model))(model, point.batch, point.reference)
    assert 0 <= float(loss.detach()) < 1e-5
    assert _size(gradients(model, loss)) == 0.0


@pytest.mark.parametrize("scale", [0.5, 10.0])
def test_a_random_steering_vector_starts_at_its_own_mean_square(scale: float, point: Point) -> None:
    with torch.no_grad():
        loss = steer_by(_site(point.reference), scale * DIRECTION)(
            point.reference, point.batch, point.reference
        )
    assert float(loss) == pytest.approx(scale**2 / 16, rel=1e-5)


def test_the_adaptive_length_is_that_of_the_reference_on_the_first_batch_only(
    point: Point, make_batch: BatchMaker
) -> None:
    loss, second = adaptive_steer_to(_site(point.model), DIRECTION, 5.0), make_batch((4, 9), 7)
    lengths = [
        _mean([float(row.norm()) for row in _rows(point.reference, batch)])
        for batch in (point.batch, second)
    ]
    assert abs(lengths[0] / lengths[1] - 1) > 1e-3
    with torch.no_grad():
        loss(point.model, point.batch, point.reference)
        found = float(loss(point.model, second, point.reference))
    rows = _rows(point.model, second)
    assert found == pytest.approx(
        _square(rows, [5 * lengths[0] * DIRECTION.double()] * len(rows)), rel=1e-5
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: simnpo(0.0, 0.0),
        lambda: idk_dpo(-1.0),
        lambda: undial(-0.1),
        lambda: teacher_kl(0.0),
    ],
)
def test_parameters_outside_their_range_are_refused(make: Callable[[], LossTerm]) -> None:
    with pytest.raises(ValueError, match=r"beta|temperature"):
        make()


def test_an_objective_that_needs_a_refusal_says_so(point: Point) -> None:
    batch = replace(point.batch, alternative=None)
    for loss in (idk_dpo(0.1), idk_cross_entropy):
        with pytest.raises(ValueError, match="refus"):
            loss(point.model, batch, point.reference)
