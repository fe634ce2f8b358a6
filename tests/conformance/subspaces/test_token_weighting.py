"""Statistics over tokens are those of the set of texts: no order, batch size or split of it enters
them, and leading BOS tokens are never among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from workbench.data.batches import Batch, batches, encode
from workbench.data.records import Example, ForgetRetain
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import (
    cross_entropy,
    mean_kl,
    next_token_logits,
    score,
    sequences,
    summed,
    token_nll,
    weight_of,
)
from workbench.hooks import (
    Capture,
    Collect,
    Moments,
    MomentsOf,
    gradients_only,
    resolve,
    without_bos,
)
from workbench.hooks.inputs import read_tokens
from workbench.runs.setup import Setup
from workbench.runs.stages import find_subspaces
from workbench.subspaces.collapse import Collapse, find_collapse
from workbench.subspaces.collapsed_update import CollapsedUpdate
from workbench.subspaces.finders import SketchPCA, StreamingPCA
from workbench.subspaces.subspace import overlap
from workbench.subspaces.weights import difference_finder
from workbench.tables import Table
from workbench.unlearning.objectives import (
    LossTerm,
    Objective,
    negative_cross_entropy,
    npo,
    on_set,
    retain_cross_entropy,
    retain_kl,
    simnpo,
    teacher_kl,
    undial,
    weighted,
)
from workbench.unlearning.one_gradient import one_gradient
from workbench.unlearning.recipe import OneGradient, Recipe
from workbench.unlearning.representation import (
    adaptive_steer_to,
    break_circuits,
    control_vector,
    keep_distance,
    keep_representation,
    mlp_breaking,
    steer_by,
    steer_to,
)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "Paris",
    "Rome",
    "Lima",
    "Oslo",
    "who",
    "is",
    "where",
    "yes",
    "no",
]
TOKENIZER = build_tokenizer(WORDS)
PATHS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
ROOTS = Path(__file__).resolve().parents[3:5]
TOKENIZERS = next(
    (found for root in ROOTS if (found := root / "shared" / "data" / "tokenizers").is_dir()),
    ROOTS[0],
)
BOS = "<s>"


def _texts(count: int = 11, seed: int = 0) -> list[Example]:
    """Texts of 2 to 14 words, two thirds of them with an answer: the last word or two."""
    rng, found = Random(seed), []
    for index in range(count):
        words = rng.choices(WORDS, k=rng.randint(2, 14))
        text, tail = " ".join(words), len(" ".join(words[-1 - index % 2 :]))
        answer = (len(text) - tail, len(text)) if index % 3 and len(words) > 2 else None
        found.append(Example(text, answer, item=str(index)))
    return found


TEXTS = _texts()
SHUFFLED = Random(1).sample(TEXTS, len(TEXTS))
ORDERS = [
    pytest.param(SHUFFLED, len(TEXTS), id="shuffled"),
    *(
        pytest.param(order, size, id=f"{name}-{size}")
        for name, order in (("same", TEXTS), ("other", SHUFFLED))
        for size in (1, 2, 5)
    ),
]


def _encoded(texts: list[Example], size: int) -> list[Batch]:
    return batches(TOKENIZER, texts, size, targets="answer")


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(vocab_size=len(TOKENIZER))


def _terms(model: PreTrainedModel) -> dict[str, LossTerm]:
    outs = resolve(model, "blocks.*.mlp.hook_out")
    (site,) = resolve(model, "blocks.1.hook_resid_post")
    vector = control_vector(model.config.hidden_size, 0)
    return {
        "negative cross-entropy": negative_cross_entropy,
        "cross-entropy": retain_cross_entropy,
        "npo": npo(0.5),
        "simnpo": simnpo(2.0, 0.1),
        "undial": undial(3.0),
        "kl": retain_kl,
        "teacher": teacher_kl(2.0, -1.0),
        "weighted": weighted((1.0, retain_cross_entropy), (0.3, retain_kl)),
        "mlp breaking": mlp_breaking(outs),
        "rmu": steer_to(site, 5 * vector),
        "adaptive rmu": adaptive_steer_to(site, vector, 2.0),
        "rsv": steer_by(site, 5 * vector),
        "rmu retain": keep_representation(site),
        "circuits": break_circuits(outs),
        "circuits retain": keep_distance(outs),
    }


NAMES = [
    "negative cross-entropy",
    "cross-entropy",
    "npo",
    "simnpo",
    "undial",
    "kl",
    "teacher",
    "weighted",
    "mlp breaking",
    "rmu",
    "adaptive rmu",
    "rsv",
    "rmu retain",
    "circuits",
    "circuits retain",
]


def _moments(
    model: PreTrainedModel, term: LossTerm, reference: PreTrainedModel, sets: list[Batch]
) -> dict[str, Tensor]:
    """Second moment of every site's rows, of the sum of the loss."""
    loss, found = on_set(term, model, reference, sets), MomentsOf()
    sites = resolve(model, [f"{path}:{side}" for path in PATHS for side in ("in", "grad_out")])
    with gradients_only(model), Capture(model, sites, found, at=sets[0].content):
        for batch in sets:
            (loss(batch) * weight_of(loss)(batch)).backward()
    return {
        name: part.covariance + torch.outer(part.mean, part.mean)
        for name, part in found.by_site.items()
    }


def _same_collapse(found: dict[str, Collapse], expected: dict[str, Collapse]) -> None:
    for name, whole in expected.items():
        for side in ("activation", "gradient"):
            one, other = getattr(found[name], side), getattr(whole, side)
            assert one.shape == other.shape
            assert not one.shape[1] or overlap(one, other) > 1 - 1e-5
            torch.testing.assert_close(
                getattr(found[name], f"{side}_removed"),
                getattr(whole, f"{side}_removed"),
                rtol=1e-3,
                atol=1e-3,
            )


# --- the sum of a loss over a set -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_second_moments_and_value_of_a_loss_are_those_of_the_set(
    name: str, model: PreTrainedModel, nearby: Callable[..., PreTrainedModel]
) -> None:
    moved = nearby(model)
    assert set(_terms(model)) == set(NAMES)

    def value(sets: list[Batch]) -> float:
        loss = on_set(_terms(model)[name], moved, model, sets)
        with torch.no_grad():
            return sum(float(loss(batch)) * weight_of(loss)(batch) for batch in sets)

    whole = _encoded(TEXTS, len(TEXTS))
    expected, total = _moments(moved, _terms(model)[name], model, whole), value(whole)
    for order, size in ((SHUFFLED, 1), (TEXTS, 5)):
        sets = _encoded(order, size)
        assert value(sets) == pytest.approx(total, rel=1e-4)
        for site, second in _moments(moved, _terms(model)[name], model, sets).items():
            assert float((second - expected[site]).norm()) <= 1e-4 * float(expected[site].norm())


@pytest.mark.parametrize(("order", "size"), ORDERS)
@pytest.mark.parametrize("name", ["npo", "mlp breaking", "negative cross-entropy", "cross-entropy"])
def test_a_collapse_is_that_of_the_set(
    name: str,
    order: list[Example],
    size: int,
    model: PreTrainedModel,
    nearby: Callable[..., PreTrainedModel],
) -> None:
    moved, term = nearby(model), _terms(model)[name]

    def find(sets: list[Batch]) -> dict[str, Collapse]:
        loss = on_set(term, moved, model, sets)
        return find_collapse(
            moved, PATHS, loss, sets, activation_components=4, gradient_components=4, kind="soft"
        )

    _same_collapse(find(_encoded(order, size)), find(_encoded(TEXTS, len(TEXTS))))


def test_a_mean_loss_is_right_by_default_and_others_say_what_they_are(
    model: PreTrainedModel,
) -> None:
    sets, update = _encoded(SHUFFLED, 4), CollapsedUpdate(model, "model.layers.*.mlp.*_proj")
    update.activation_components = update.gradient_components = 4

    def rows(batch: Batch) -> Tensor:  # the same sum, as a mean over rows
        return token_nll(model, batch).sum() / batch.size

    def find(
        loss: Callable[[Batch], Tensor], **weight: Callable[[Batch], float]
    ) -> dict[str, Collapse]:
        sizes = {"activation_components": 4, "gradient_components": 4}
        return find_collapse(model, update.modules, loss, sets, **sizes, **weight)  # type: ignore[arg-type]

    expected = update.find(lambda batch: cross_entropy(model, batch), sets).maps
    _same_collapse(find(lambda batch: token_nll(model, batch).sum(), weight=summed), expected)
    _same_collapse(find(rows, weight=sequences), expected)
    with pytest.raises(AssertionError):
        _same_collapse(find(rows), expected)


def test_a_sum_of_means_over_different_things_has_no_weight(model: PreTrainedModel) -> None:
    term = weighted((1.0, npo(0.1)), (1.0, retain_cross_entropy))
    with pytest.raises(WorkbenchError, match="sequences, target_tokens"):
        weight_of(term)(_encoded(TEXTS, 3)[0])


@pytest.mark.parametrize("statistics", ["forget", "retain"])
def test_one_gradient_is_that_of_the_set(statistics: str, model: PreTrainedModel) -> None:
    def delta(order: list[Example], size: int) -> Tensor:
        settings = OneGradient(3, "soft", statistics, 0, 0.0)  # type: ignore[arg-type]
        recipe = Recipe(
            Objective(npo(0.5)), ("*",), 1, size, 1.0, optimiser="one-gradient", one=settings
        )
        chosen = [(name, part) for name, part in model.named_parameters() if "mlp" in name]
        found = one_gradient(
            model,
            model,
            recipe,
            TOKENIZER,
            order,
            order[::-1],
            chosen,
            max_length=None,
            progress=lambda *_: None,
        )
        return torch.cat([found.delta[name].flatten() for name, _ in chosen])

    whole = delta(TEXTS, len(TEXTS))
    for order, size in ((SHUFFLED, len(TEXTS)), (TEXTS, 1), (SHUFFLED, 5)):
        torch.testing.assert_close(delta(order, size), whole, rtol=1e-3, atol=1e-5)


# --- means and rows -------------------------------------------------------------------------------


def test_mean_losses_are_those_of_the_set(
    model: PreTrainedModel, nearby: Callable[..., PreTrainedModel]
) -> None:
    moved = nearby(model)

    def measured(order: list[Example], size: int) -> list[float]:
        sets = _encoded(order, size)
        with torch.no_grad():
            logits = [next_token_logits(model, batch) for batch in sets]
        return [score(model, sets).loss, mean_kl(moved, sets, logits)]

    whole = measured(TEXTS, len(TEXTS))
    for size in (1, 2, 5):
        np.testing.assert_allclose(measured(SHUFFLED, size), whole, rtol=1e-5)


@pytest.mark.parametrize(("order", "size"), ORDERS)
def test_differences_of_two_models_are_those_of_the_set(
    order: list[Example],
    size: int,
    model: PreTrainedModel,
    nearby: Callable[..., PreTrainedModel],
) -> None:
    moved, name = nearby(model), "blocks.1.hook_resid_post"

    def find(sets: list[Batch]) -> Tensor:
        rule = sets[0].content
        return difference_finder(model, moved, sets, name, lambda: StreamingPCA(4), rule)[
            name
        ].components_.T

    assert overlap(find(_encoded(order, size)), find(_encoded(TEXTS, len(TEXTS)))) > 1 - 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [StreamingPCA, SketchPCA])
def test_finders_that_saw_any_split_in_any_order_agree(
    make: type[StreamingPCA] | type[SketchPCA], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, 20, generator=generator) * torch.linspace(5, 0.1, 20) + 30
    whole, merged, rng = make(6).fit(rows), make(6), Random(seed)
    left = rows[torch.randperm(200, generator=generator)]
    while len(left):
        size = rng.choice([1, 2, 5, 60])
        merged.merge(make(6).partial_fit(left[:size]))  # type: ignore[arg-type]
        left = left[size:]
    # A sketch is linear in the covariance: with one test matrix it too is the same up to rounding.
    assert overlap(merged.components_.T, whole.components_.T) > 1 - 1e-5
    torch.testing.assert_close(
        merged.explained_variance_, whole.explained_variance_, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(merged.mean_, whole.mean_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("order", "size"), ORDERS)
def test_moments_of_activations_are_those_of_the_set(
    order: list[Example], size: int, model: PreTrainedModel
) -> None:
    def moments(sets: list[Batch]) -> Moments:
        found = MomentsOf()
        with Capture(model, "blocks.1.hook_resid_post", found, at=sets[0].content) as capture:
            for batch in sets:
                capture.forward(batch.inputs)
        return found["blocks.1.hook_resid_post"]

    found, whole = moments(_encoded(order, size)), moments(_encoded(TEXTS, len(TEXTS)))
    assert found.count == whole.count == sum(int(b.content_mask.sum()) for b in _encoded(TEXTS, 2))
    torch.testing.assert_close(found.covariance, whole.covariance, rtol=1e-4, atol=1e-5)


# --- leading BOS ----------------------------------------------------------------------------------


def test_every_leading_bos_is_left_out_of_content_and_of_the_rule_alike() -> None:
    ids = torch.tensor([[1, 1, 1, 5, 1, 6, 0], [1, 5, 6, 7, 8, 9, 9], [5, 6, 1, 7, 0, 0, 0]])
    real, none = (ids != 0).long(), torch.zeros_like(ids, dtype=torch.bool)
    batch = Batch(ids, real, none, none, none, ("a", "b", "c"), bos_token_id=1)
    expected = [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]
    assert batch.content_mask.int().tolist() == expected
    rule = without_bos(1)(read_tokens(batch.inputs, None))  # type: ignore[arg-type]
    assert rule.int().tolist() == [*expected[:2], [1, 1, 1, 1, 0, 0, 0]]
    assert batch.to("cpu").content_mask.equal(batch.content_mask)
    assert replace(batch, bos_token_id=None).content_mask.int().tolist()[0] == [0, 1, 1, 1, 1, 1, 0]


def test_every_sequence_of_a_packed_row_loses_its_leading_bos() -> None:
    ids = torch.tensor([[1, 1, 5, 1, 1, 1, 6, 1, 7, 8, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1]])
    tokens = read_tokens({"input_ids": ids, "position_ids": positions}, None)
    assert tokens is not None
    assert without_bos(1)(tokens).int().tolist() == [[0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1]]


@pytest.mark.parametrize("front", [BOS, BOS + BOS])
def test_a_text_that_begins_with_bos_is_encoded_as_without_it(front: str) -> None:
    plain, marked = [], []
    for example in TEXTS:
        shift = len(front)
        spans = [
            None if s is None else (s[0] + shift, s[1] + shift) for s in (example.answer, (0, 3))
        ]
        marked.append(Example(front + example.text, *spans, item=example.item))
        plain.append(Example(example.text, example.answer, (0, 3), example.item))
    for targets in ("text", "answer"):
        one, other = (encode(TOKENIZER, part, targets=targets) for part in (plain, marked))  # type: ignore[arg-type]
        for name in ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    cut = [encode(TOKENIZER, part[:1], max_length=3).input_ids for part in (plain, marked)]
    assert torch.equal(*cut)


@pytest.mark.parametrize("text", [BOS, BOS + BOS])
def test_a_text_of_bos_alone_is_refused(text: str) -> None:
    with pytest.raises(WorkbenchError, match="too short"):
        encode(TOKENIZER, [Example(text)])


def test_leading_bos_is_no_target_where_the_tokenizer_adds_none() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, bos_token=BOS)
    bare.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    batch = encode(bare, [Example(f"{BOS}{BOS} cat sat"), Example("cat sat on")])
    assert int(batch.input_ids[0, 1]) == bare.bos_token_id
    assert torch.equal(batch.target_mask, batch.content_mask)
    assert not batch.content_mask[0, :2].any() and batch.content_mask[1, 1]


@pytest.mark.parametrize("name", ["gpt2", "pythia"])
def test_a_tokenizer_that_adds_no_bos_encodes_as_before(name: str) -> None:
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"no tokenizer {name} in {TOKENIZERS}")
    folder = TOKENIZERS / name
    backend = (
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        if name == "pythia"
        else ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>")
    texts = ["<|endoftext|>The cat sat", "The cat sat on the mat"]
    batch = encode(tokenizer, [Example(text) for text in texts])
    for row, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        assert batch.input_ids[row, : len(ids)].tolist() == ids
        assert batch.content_mask[row].nonzero()[:, 0].tolist() == list(range(1, len(ids)))


def test_a_capture_by_the_rule_of_a_batch_delivers_its_content(model: PreTrainedModel) -> None:
    batch, rows = _encoded(TEXTS, 11)[0], Collect()
    ids = batch.input_ids.clone()
    ids[:3, 1] = TOKENIZER.bos_token_id
    batch = replace(batch, input_ids=ids)
    with Capture(model, "blocks.0.hook_resid_post", rows, at=batch.content) as capture:
        capture.forward(batch.inputs)
    assert len(rows["blocks.0.hook_resid_post"]) == int(batch.content_mask.sum())


# --- the stage ------------------------------------------------------------------------------------


class _InBatches(Setup):
    """The texts in batches of two, whatever is asked."""

    def encode(self, examples: Sequence[Example], **asked: Any) -> list[Batch]:
        return batches(self.tokenizer, examples, 2)


def test_the_subspaces_of_a_run_are_those_of_its_sets(model: PreTrainedModel) -> None:
    found = []
    for kind, order in ((Setup, TEXTS), (_InBatches, SHUFFLED)):
        record = ForgetRetain("r", tuple(order[:6]), tuple(order[6:]), {"far": tuple(order)})
        found.append(find_subspaces(kind(model, TOKENIZER, record), 4, Table({}), seed=0))
    for name in ("forget", "retain"):
        for site, subspace in found[0][name].items():
            other = found[1][name][site]
            assert overlap(subspace.basis, other.basis) > 1 - 1e-5
            torch.testing.assert_close(subspace.eigenvalues, other.eigenvalues, rtol=1e-4, atol=0)
            assert subspace.tokens == "without_first & without_bos(1)"
