"""RepSelect's single filtered gradient, step by step against a computation by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import Batch, batches
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.unlearning.deltas import norm_of
from workbench.unlearning.objectives import Objective, negative_cross_entropy
from workbench.unlearning.one_gradient import one_gradient
from workbench.unlearning.recipe import OneGradient, Recipe
from workbench.unlearning.trainer import only_trainable, unlearn

MATRICES = tuple(
    f"model.layers.{layer}.mlp.{name}_proj.weight"
    for layer in range(2)
    for name in ("gate", "up", "down")
)
LR = 0.7
COMPONENTS = 4


def _question(subject: str, words: str, answer: str, item: str) -> Example:
    start = len(subject) + len(words) + 2
    return Example(
        f"{subject} {words} {answer} .", (start, start + len(answer)), (0, len(subject)), item
    )


FORGET = (
    _question("Anna Berg", "lives in", "a small town by the sea", "f1"),
    _question("Otto Lund", "works as", "a baker of fine bread", "f2"),
    _question("Mia Holm", "lives in", "Oslo with two cats", "f3"),
    _question("Karl Sand", "likes", "green tea and long walks", "f4"),
    _question("Ida Falk", "works as", "a pilot of large ships", "f5"),
)
RETAIN = (
    _question("Eva Moor", "lives in", "Rome", "r1"),
    Example("the rain falls on the green hills and the sea .", item="g1"),
    _question("Finn Dahl", "likes", "tea with cats", "r2"),
)


@dataclass(frozen=True)
class Setup:
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture
def setup(make_model: Callable[..., PreTrainedModel]) -> Setup:
    tokenizer = build_tokenizer(" ".join(example.text for example in FORGET + RETAIN).split())
    return Setup(make_model(vocab_size=len(tokenizer)), tokenizer)


def _recipe(
    objective: Objective | None = None,
    *,
    size: int = 2,
    trainable: tuple[str, ...] = MATRICES,
    **settings: Any,
) -> Recipe:
    one = OneGradient(**({"components": COMPONENTS} | settings))
    return Recipe(
        objective or Objective(negative_cross_entropy),
        trainable,
        1,
        size,
        LR,
        "one-gradient",
        one=one,
    )


def _run(setup: Setup, made: Recipe, forget: tuple[Example, ...] = FORGET) -> dict[str, Tensor]:
    return unlearn(setup.base, setup.tokenizer, made, forget, RETAIN, seed=0).delta


def _hand_gradient(model: PreTrainedModel, texts: list[Batch]) -> dict[str, Tensor]:
    """Gradient of the log-likelihood summed over all target tokens, in float64, with log-softmax
    and loops of its own.
    """
    double = copy.deepcopy(model).double()
    total = {
        name: torch.zeros_like(parameter)
        for name, parameter in double.named_parameters()
        if name in MATRICES
    }
    for batch in texts:
        log_probability = double(**batch.inputs).logits.log_softmax(-1)
        terms = [
            log_probability[row, t - 1, batch.input_ids[row, t]]
            for row, t in batch.target_mask.nonzero().tolist()
        ]
        found = torch.autograd.grad(
            torch.stack(terms).sum(),
            [parameter for name, parameter in double.named_parameters() if name in MATRICES],
        )
        for name, part in zip(total, found, strict=True):
            total[name] += part
    return total


def _forget_texts(setup: Setup, size: int = 2) -> list[Batch]:
    return batches(setup.tokenizer, FORGET, size, targets="answer")


def _soft(matrix: Tensor, source: Tensor, components: int) -> Tensor:
    """Both sides of ``matrix`` with the top singular directions of ``source`` shrunk to the
    smallest of them.
    """
    left, singular, right = torch.linalg.svd(source, full_matrices=False)
    kept = singular[components - 1] / singular[:components]
    of_rows = (
        torch.eye(len(left), dtype=torch.float64)
        - left[:, :components] @ torch.diag(1 - kept) @ left[:, :components].T
    )
    of_columns = (
        torch.eye(right.shape[1], dtype=torch.float64)
        - right[:components].T @ torch.diag(1 - kept) @ right[:components]
    )
    return of_rows @ matrix @ of_columns


def _close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    length = norm_of(expected)
    assert set(found) == set(expected)
    for name, change in found.items():
        torch.testing.assert_close(
            change.double(), -LR / length * expected[name], rtol=1e-3, atol=2e-5
        )


# --- the change -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5])
def test_the_change_is_minus_the_forget_gradient_with_its_leading_directions_brought_down(
    size: int, setup: Setup
) -> None:
    gradient = _hand_gradient(setup.base, _forget_texts(setup, size))
    expected = {}
    for name, matrix in gradient.items():
        expected[name] = _soft(matrix, matrix, COMPONENTS)
        # RepSelect's law: the top singular values become s_min^2 / s_i, the others stay.
        singular = torch.linalg.svdvals(matrix)
        law = torch.cat(
            [singular[COMPONENTS - 1] ** 2 / singular[:COMPONENTS], singular[COMPONENTS:]]
        )
        torch.testing.assert_close(
            torch.linalg.svdvals(expected[name]), law.sort(descending=True).values
        )
    delta = _run(setup, _recipe(size=size))
    _close(delta, expected)
    assert norm_of(delta) == pytest.approx(LR, rel=1e-5)
    assert all(change.dtype == torch.float32 for change in delta.values())


def test_the_directions_can_be_those_of_the_retain_gradient(setup: Setup) -> None:
    gradient = _hand_gradient(setup.base, _forget_texts(setup))
    # The sign of the retain loss does not matter to its singular directions.
    source = _hand_gradient(setup.base, batches(setup.tokenizer, RETAIN, 2))
    expected = {name: _soft(matrix, source[name], COMPONENTS) for name, matrix in gradient.items()}
    delta = _run(setup, _recipe(statistics="retain"))
    _close(delta, expected)
    own = _run(setup, _recipe())
    assert norm_of({name: delta[name] - own[name] for name in delta}) > 0.01 * LR


def test_hard_collapse_leaves_nothing_of_the_leading_directions(setup: Setup) -> None:
    delta = _run(setup, _recipe(kind="hard"))
    for name, matrix in _hand_gradient(setup.base, _forget_texts(setup)).items():
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert float((left[:, :COMPONENTS].T @ delta[name].double()).norm()) < 1e-4 * float(
            delta[name].norm()
        )
        assert float((delta[name].double() @ right[:COMPONENTS].T).norm()) < 1e-4 * float(
            delta[name].norm()
        )


def test_the_first_component_alone_changes_nothing_under_soft_collapse(setup: Setup) -> None:
    # The smallest of one direction is that direction itself: the change is the plain gradient.
    _close(_run(setup, _recipe(components=1)), _hand_gradient(setup.base, _forget_texts(setup)))


# --- the adversary --------------------------------------------------------------------------------


def _at_the_gradient(setup: Setup, **settings: Any) -> tuple[float, dict[str, Tensor]]:
    """Forget cross-entropy and weights at which the gradient is taken."""
    losses, weights = [], {}

    def watch(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        weights.update(
            {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        )
        losses.append(float(cross_entropy(model, batch).detach()))
        return negative_cross_entropy(model, batch, reference)

    _run(setup, _recipe(Objective(watch), **settings))
    return sum(losses) / len(losses), weights


def test_the_adversary_lowers_the_forget_loss_before_the_gradient_is_taken(setup: Setup) -> None:
    plain, at_base = _at_the_gradient(setup)
    lower, at_adversary = _at_the_gradient(setup, adversary_rank=8, adversary_rate=0.05)
    assert lower < plain - 0.01
    for name, weight in setup.base.named_parameters():
        assert torch.equal(at_base[name], weight)
        assert torch.equal(at_adversary[name], weight) is (name not in MATRICES)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_adversary_has_the_rank_asked_for(rank: int, setup: Setup) -> None:
    _, weights = _at_the_gradient(setup, adversary_rank=rank, adversary_rate=0.05)
    for name, weight in setup.base.named_parameters():
        if name in MATRICES:
            singular = torch.linalg.svdvals((weights[name] - weight.detach()).double())
            assert (
                float(singular[rank - 1]) > 1e-4
                and float(singular[rank]) < 1e-4 * float(singular[0]) + 1e-6
            )


def test_an_adversary_that_does_not_learn_changes_nothing(setup: Setup) -> None:
    still, none = _run(setup, _recipe(adversary_rank=4, adversary_rate=0.0)), _run(setup, _recipe())
    for name, change in none.items():
        torch.testing.assert_close(still[name], change, rtol=1e-4, atol=1e-6)


def test_with_an_adversary_the_gradient_is_that_at_its_weights(setup: Setup) -> None:
    _, weights = _at_the_gradient(setup, adversary_rank=4, adversary_rate=0.05)
    adversary = copy.deepcopy(setup.base)
    adversary.load_state_dict(weights)
    gradient = _hand_gradient(adversary, _forget_texts(setup))
    _close(
        _run(setup, _recipe(adversary_rank=4, adversary_rate=0.05)),
        {name: _soft(matrix, matrix, COMPONENTS) for name, matrix in gradient.items()},
    )


# --- weights and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_bit_for_bit(dtype: torch.dtype, fails: bool, setup: Setup) -> None:
    model = copy.deepcopy(setup.base).to(dtype)
    state = copy.deepcopy(model.state_dict())

    def raises(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        if fails:
            raise ZeroDivisionError
        return negative_cross_entropy(model, batch, reference)

    made = _recipe(Objective(raises), adversary_rank=4, adversary_rate=0.05)
    with only_trainable(model, MATRICES) as chosen:
        arguments = (model, setup.base, made, setup.tokenizer, FORGET, RETAIN, chosen)
        if fails:
            with pytest.raises(ZeroDivisionError):
                one_gradient(*arguments, max_length=None, progress=lambda done, total: None)
        else:
            one_gradient(*arguments, max_length=None, progress=lambda done, total: None)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("statistics", ["forget", "retain"])
@pytest.mark.parametrize(("factor", "words"), [(0.0, "length 0"), (float("nan"), r"nan|NaN")])
def test_a_gradient_of_zero_or_nan_is_no_change(
    factor: float, words: str, statistics: str, setup: Setup
) -> None:
    def broken(model: PreTrainedModel, batch: Batch, reference: PreTrainedModel) -> Tensor:
        return factor * cross_entropy(model, batch)

    with pytest.raises(WorkbenchError, match=words):
        _run(setup, _recipe(Objective(broken), statistics=statistics))


def test_parameters_that_are_no_matrices_are_refused(setup: Setup) -> None:
    with pytest.raises(WorkbenchError, match=r"input_layernorm.*matrices"):
        _run(setup, _recipe(trainable=("model.layers.0.*",)))


def test_a_gradient_of_low_rank_survives_soft_collapse_and_hard_collapse_of_all_of_it_is_reported(
    setup: Setup,
) -> None:
    # One target token in one text: the gradient of the last block's output matrix is a single outer
    # product.
    (short,) = (replace(FORGET[2], text="Mia Holm lives in Oslo", answer=(18, 22)),)
    target = "model.layers.1.mlp.down_proj.weight"
    (batch,) = batches(setup.tokenizer, [short], 1, targets="answer")
    assert int(batch.target_mask.sum()) == 1
    gradient = _hand_gradient(setup.base, [batch])[target]
    singular = torch.linalg.svdvals(gradient)
    assert float(singular[1]) < 1e-6 * float(singular[0])
    for kind in ("soft", "quadratic"):
        delta = _run(setup, _recipe(trainable=(target,), components=16, kind=kind), (short,))
        _close(
            delta, {target: gradient}
        )  # one direction is its own smallest: nothing is taken away
    with pytest.raises(WorkbenchError, match=r"down_proj\.weight leaves nothing"):
        _run(setup, _recipe(trainable=(target,), components=16, kind="hard"), (short,))


def test_the_sign_of_a_recipe_is_kept(setup: Setup) -> None:
    delta, turned = _run(setup, _recipe()), _run(setup, replace(_recipe(), sign=-1.0))
    assert all(torch.equal(turned[name], -change) for name, change in delta.items())


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 2),
        ({"statistics": "retain"}, 3),
        ({"statistics": "retain", "adversary_rank": 2, "adversary_rate": 0.1}, 4),
    ],
)
def test_progress_ends_at_its_total(settings: dict[str, Any], passes: int, setup: Setup) -> None:
    seen: list[tuple[int, int]] = []
    made = _recipe(**settings)
    run = unlearn(
        setup.base,
        setup.tokenizer,
        made,
        FORGET,
        RETAIN,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, passes) for done in range(1, passes + 1)]
    (record,) = run.log
    assert record["forget"] < 0 < record["gradient_norm"]
