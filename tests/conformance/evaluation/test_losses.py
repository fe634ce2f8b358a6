"""Losses, scores and divergences against float64 log-softmax by hand and against greedy
generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import Batch, batches, encode
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import (
    cross_entropy,
    mean_kl,
    next_token_logits,
    score,
    token_kl,
    token_nll,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]


def _by_hand(model: PreTrainedModel, batch: Batch) -> np.ndarray:
    """``[batch, position - 1]`` NLL of every next token, float64, one row at a time and without its
    padding; zero elsewhere.
    """
    table = np.zeros((batch.size, batch.input_ids.shape[1] - 1))
    for row in range(batch.size):
        length = int(batch.attention_mask[row].sum())
        with torch.no_grad():
            logits = (
                model(input_ids=batch.input_ids[row : row + 1, :length]).logits[0].double().numpy()
            )
        for position in range(length - 1):
            scores = logits[position]
            log_normaliser = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            table[row, position] = log_normaliser - scores[int(batch.input_ids[row, position + 1])]
    return table


@pytest.mark.parametrize("targets", ["text", "answer"])
def test_token_nll_is_minus_log_softmax_on_the_targets_and_zero_elsewhere(
    targets: str, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    batch = make_batch(targets=targets)
    expected = _by_hand(llama, batch) * batch.target_mask[:, 1:].numpy()
    found = token_nll(llama, batch)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert bool((found[~batch.target_mask[:, 1:]] == 0).all())


@pytest.mark.parametrize("targets", ["text", "answer"])
def test_cross_entropy_is_the_mean_over_target_tokens_of_the_whole_batch(
    targets: str, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    batch = make_batch((9, 4, 6), targets=targets)
    mask = batch.target_mask[:, 1:].numpy()
    expected = (_by_hand(llama, batch) * mask).sum() / mask.sum()
    assert float(cross_entropy(llama, batch).detach()) == pytest.approx(expected, rel=1e-5)
    # Long rows weigh more: the mean of the rows' means would be another number.
    if targets == "text":
        assert abs(expected - np.mean((_by_hand(llama, batch) * mask).sum(1) / mask.sum(1))) > 1e-3


@pytest.mark.parametrize(("targets", "passed"), [("text", 8), ("answer", 4)])
def test_a_pass_that_ends_before_the_last_target_gives_the_same_losses(
    targets: str, passed: int, llama: PreTrainedModel, make_batch: BatchMaker, pad: Padder
) -> None:
    # the last target of 9 tokens is predicted from the 8 before it, the answers of 5 from 4
    batch = pad(make_batch((9, 4, 6) if targets == "text" else (5, 4), targets=targets), 3)
    lengths = []
    hook = llama.model.embed_tokens.register_forward_hook(
        lambda _m, args, _o: lengths.append(args[0].shape[1])
    )
    found, whole = token_nll(llama, batch, whole=False), token_nll(llama, batch)
    hook.remove()
    assert lengths == [passed, batch.input_ids.shape[1]]
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    assert bool((found[~batch.target_mask[:, 1:]] == 0).all())
    parameters = list(llama.parameters())
    for one, other in zip(
        torch.autograd.grad(cross_entropy(llama, batch, whole=False), parameters),
        torch.autograd.grad(cross_entropy(llama, batch), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    nothing = replace(batch, target_mask=torch.zeros_like(batch.target_mask))
    assert not token_nll(llama, nothing, whole=False).any()


def test_next_token_logits_predict_the_following_token(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with torch.no_grad():
        full = llama(**batch.inputs).logits
        shifted = next_token_logits(llama, batch)
    assert shifted.shape == (3, 6, 50) and shifted.dtype == torch.float32
    assert torch.equal(shifted, full[:, :-1])


def _take(batch: Batch, row: int) -> Batch:
    length = int(batch.attention_mask[row].sum())

    def part(tensor: Tensor) -> Tensor:
        return tensor[row : row + 1, :length]

    attention, answer, subject, target = (
        part(mask)
        for mask in (batch.attention_mask, batch.answer_mask, batch.subject_mask, batch.target_mask)
    )
    return Batch(part(batch.input_ids), attention, answer, subject, target, (batch.items[row],))


def test_scores_do_not_depend_on_batching(llama: PreTrainedModel, make_batch: BatchMaker) -> None:
    batch = make_batch((9, 4, 6, 7))
    together, apart = score(llama, [batch]), score(llama, [_take(batch, row) for row in range(4)])
    assert together.items == apart.items == batch.items
    np.testing.assert_array_equal(together.correct, apart.correct)
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    np.testing.assert_allclose(together.nll, apart.nll, rtol=1e-5)
    np.testing.assert_allclose(together.probability, apart.probability, rtol=1e-5)
    assert together.loss == pytest.approx(apart.loss, rel=1e-6)


def test_right_padding_changes_no_score(llama: PreTrainedModel, batch: Batch, pad: Padder) -> None:
    plain, padded = score(llama, [batch]), score(llama, [pad(batch, 5)])
    np.testing.assert_array_equal(plain.correct, padded.correct)
    np.testing.assert_array_equal(plain.tokens, padded.tokens)
    np.testing.assert_allclose(plain.nll, padded.nll, rtol=1e-5)
    np.testing.assert_allclose(plain.probability, padded.probability, rtol=1e-5)
    assert float(cross_entropy(llama, pad(batch, 5)).detach()) == pytest.approx(
        float(cross_entropy(llama, batch).detach()), rel=1e-6
    )


def test_scores_follow_their_formulas(llama: PreTrainedModel, make_batch: BatchMaker) -> None:
    batch = make_batch((9, 4, 6), answer=3)
    nll = _by_hand(llama, batch)
    answer, target = batch.answer_mask[:, 1:].numpy(), batch.target_mask[:, 1:].numpy()
    scores = score(llama, [batch])
    np.testing.assert_allclose(scores.nll, (nll * target).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(scores.tokens, [8, 3, 5])
    # The geometric mean of the answer's token probabilities.
    np.testing.assert_allclose(
        scores.probability,
        [np.prod(np.exp(-row[mask])) ** (1 / 3) for row, mask in zip(nll, answer, strict=True)],
        rtol=1e-4,
    )
    assert scores.loss == pytest.approx((nll * target).sum() / target.sum(), rel=1e-5)
    assert scores.recall == scores.correct.mean()


def test_loss_counts_the_answer_alone_when_the_batch_says_so(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    whole, answers = make_batch(targets="text"), make_batch(targets="answer")
    first, second = score(llama, [whole]), score(llama, [answers])
    np.testing.assert_array_equal(second.tokens, [2, 2, 2])
    np.testing.assert_allclose(
        second.nll,
        (_by_hand(llama, answers) * answers.answer_mask[:, 1:].numpy()).sum(1),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(first.correct, second.correct)
    np.testing.assert_array_equal(first.probability, second.probability)


def test_scoring_leaves_the_mode_of_the_model_and_its_gradients_alone(
    llama: PreTrainedModel, batch: Batch
) -> None:
    for training in (True, False):
        llama.train(training)
        score(llama, [batch])
        assert llama.training is training
    assert all(parameter.grad is None for parameter in llama.parameters())


def _generated(model: PreTrainedModel, prompt: Tensor, tokens: int) -> Tensor:
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
    )
    found = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), generation_config=settings
    )
    assert isinstance(found, Tensor)
    return found[0, len(prompt) :]


def _question(prompt: Sequence[int], answer: Sequence[int], name: str) -> Batch:
    ids = torch.tensor([[*prompt, *answer]])
    mask = torch.arange(ids.shape[1])[None] >= len(prompt)
    target = torch.arange(ids.shape[1])[None] >= 1
    return Batch(ids, torch.ones_like(ids), mask, torch.zeros_like(mask), target, (name,))


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_what_greedy_generation_does(seed: int, make_model: ModelMaker) -> None:
    model = make_model(seed=seed)
    rng = np.random.default_rng(seed)
    questions, expected = [], []
    for number in range(8):
        prompt = [1, *rng.integers(3, 50, rng.integers(2, 7)).tolist()]
        greedy = _generated(model, torch.tensor(prompt), 3).tolist()
        answers = [
            greedy,
            [*greedy[:2], (greedy[2] + 1) % 50],
            [(greedy[0] + 1) % 50, *greedy[1:]],
            rng.integers(3, 50, 3).tolist(),
        ]
        for answer in answers:
            questions.append(_question(prompt, answer, str(number)))
            expected.append(float(answer == greedy))
    scores = score(model, questions)
    np.testing.assert_array_equal(scores.correct, expected)
    assert scores.recall == pytest.approx(0.25)


def test_divergence_of_a_model_from_itself_is_zero(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    sets = [make_batch((7, 5), 0), make_batch((4, 9, 6), 1)]
    with torch.no_grad():
        reference = [next_token_logits(llama, batch) for batch in sets]
    assert mean_kl(llama, sets, reference) == 0.0


def test_token_kl_is_the_sum_over_the_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, logits = (torch.randn(4, 3, 11, generator=generator) * 3 for _ in range(2))
    p, q = (torch.softmax(tensor.double(), -1).numpy() for tensor in (reference, logits))
    np.testing.assert_allclose(
        token_kl(reference, logits).numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-5, atol=1e-6
    )
    assert bool((token_kl(reference, logits) >= 0).all())
    # The reference comes first: the divergence is not symmetric.
    assert float((token_kl(reference, logits) - token_kl(logits, reference)).abs().max()) > 0.1
    # A constant on all logits is no change of the distribution.
    torch.testing.assert_close(
        token_kl(reference, logits + 5.0), token_kl(reference, logits), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("targets", ["text", "answer"])
def test_mean_kl_is_per_target_token_whatever_the_batches(
    targets: str,
    llama: PreTrainedModel,
    make_batch: BatchMaker,
    nearby: Callable[..., PreTrainedModel],
) -> None:
    sets = [make_batch((7, 5), 0, targets=targets), make_batch((4, 9, 6), 1, targets=targets)]
    other = nearby(llama)
    total, count = 0.0, 0
    with torch.no_grad():
        reference = [next_token_logits(llama, batch) for batch in sets]
        for batch, before in zip(sets, reference, strict=True):
            p, q = (
                torch.softmax(x.double(), -1) for x in (before, next_token_logits(other, batch))
            )
            divergence = (p * (p / q).log()).sum(-1)
            total += float(divergence[batch.target_mask[:, 1:]].sum())
            count += int(batch.target_mask[:, 1:].sum())
    assert mean_kl(other, sets, reference) == pytest.approx(total / count, rel=1e-4)


# --- which tokens are targets ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return build_tokenizer(
        ["Ana", "Belo", "lives", "in", "Oslo", "near", "the", "river", "a", "cat", "."]
    )


FACT = Example("Ana Belo lives in Oslo .", answer=(18, 22), subject=(0, 8), item="Ana/town")
TEXT = Example("the cat lives near the river .", item="text")


def _words_at(
    tokenizer: PreTrainedTokenizerBase, batch: Batch, row: int, mask: Tensor
) -> list[str]:
    return [tokenizer.decode([token]).strip() for token in batch.input_ids[row][mask[row]].tolist()]


def test_masks_point_at_the_words_they_name(words: PreTrainedTokenizerBase) -> None:
    batch = encode(words, [FACT, TEXT])
    assert _words_at(words, batch, 0, batch.answer_mask) == ["Oslo"]
    assert _words_at(words, batch, 0, batch.subject_mask) == ["Ana", "Belo"]
    assert _words_at(words, batch, 0, batch.content_mask) == FACT.text.split()
    assert _words_at(words, batch, 0, batch.target_mask) == FACT.text.split()
    assert not bool(batch.answer_mask[1].any()) and not bool(batch.subject_mask[1].any())
    assert batch.attention_mask.sum(1).tolist() == [7, 8]
    assert bool((batch.input_ids[:, 0] == words.bos_token_id).all())
    assert bool((batch.input_ids[batch.attention_mask == 0] == words.pad_token_id).all())


def test_with_answer_targets_running_text_still_counts_whole(
    words: PreTrainedTokenizerBase,
) -> None:
    batch = encode(words, [FACT, TEXT], targets="answer")
    assert _words_at(words, batch, 0, batch.target_mask) == ["Oslo"]
    assert _words_at(words, batch, 1, batch.target_mask) == TEXT.text.split()


def test_a_word_of_bytes_is_an_answer_of_many_tokens(words: PreTrainedTokenizerBase) -> None:
    example = Example("Ana lives in Zürich .", answer=(13, 19), item="x")
    batch = encode(words, [example], targets="answer")
    # The space before the word is a token too, but it lies outside the answer's span.
    assert int(batch.answer_mask.sum()) == len("Zürich".encode())
    assert words.decode(batch.input_ids[0][batch.answer_mask[0]]) == "Zürich"
    assert torch.equal(batch.target_mask, batch.answer_mask)


def test_the_tokenizers_own_padding_side_is_not_used(words: PreTrainedTokenizerBase) -> None:
    expected = encode(words, [FACT, TEXT])
    words.padding_side = "left"
    try:
        found = encode(words, [FACT, TEXT])
    finally:
        words.padding_side = "right"
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(
        found.answer_mask, expected.answer_mask
    )


def test_batches_keep_the_order_and_the_last_one_is_short(words: PreTrainedTokenizerBase) -> None:
    examples = [Example(f"the cat {'near ' * number}.", item=str(number)) for number in range(7)]
    parts = batches(words, examples, 3)
    assert [part.size for part in parts] == [3, 3, 1]
    assert [item for part in parts for item in part.items] == [str(number) for number in range(7)]


def test_an_example_without_an_answer_has_no_recall(
    make_model: ModelMaker, words: PreTrainedTokenizerBase
) -> None:
    scores = score(make_model(vocab_size=len(words)), batches(words, [FACT, TEXT], 2))
    assert np.isnan(scores.correct).tolist() == [False, True]
    assert np.isnan(scores.probability).tolist() == [False, True]
    assert np.isfinite(scores.nll).all() and scores.tokens.tolist() == [6, 7]


def test_bad_texts_are_refused(words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(WorkbenchError, match="empty"):
        encode(words, [])
    with pytest.raises(WorkbenchError, match="too short"):
        encode(words, [FACT, Example("")])
    with pytest.raises(WorkbenchError, match="cut"):
        encode(words, [FACT], max_length=4)
    assert encode(words, [FACT], max_length=6).input_ids.shape == (1, 6)


def test_an_answer_that_the_cut_splits_is_refused(words: PreTrainedTokenizerBase) -> None:
    # "1.0 where greedy decoding gives the whole answer": half an answer can only be recalled by
    # half.
    example = Example("Ana lives in Zürich .", answer=(13, 19), item="x")
    with pytest.raises(WorkbenchError, match="cut"):
        encode(words, [example], max_length=8)
