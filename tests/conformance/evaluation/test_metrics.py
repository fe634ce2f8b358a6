"""Metrics of answers on a model whose every probability is written down, and on random transformers
where padding and batching could matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from workbench.data.batches import Batch, batches, encode
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.answers import Rouge, contains, exact_match, generate_answers, rouge_l
from workbench.evaluation.losses import score
from workbench.evaluation.metrics import answer_ranks, extraction_strength, perplexity
from workbench.evaluation.options import (
    Choice,
    TruthQuestion,
    TruthRatios,
    forget_quality,
    multiple_choice,
    truth_ratio,
)

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]

WORDS = ("Ana", "Belo", "lives", "in", "Oslo", "Rome", "Lima", "near", "the", "river", ".")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return build_tokenizer(WORDS)


def bigram(table: Tensor) -> PreTrainedModel:
    """A Llama whose next-token logits are ``table[token]``: one-hot embeddings, a block that adds
    nothing, and the table as its head.
    """
    size = len(table)
    shape = {
        "hidden_size": size,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            **shape,
            max_position_embeddings=64,
            rms_norm_eps=0.0,
            tie_word_embeddings=False,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(
            table.T / math.sqrt(size)
        )  # the norm makes a one-hot vector sqrt(size) long
    return model.eval()


def transitions(
    tokenizer: PreTrainedTokenizerBase, probabilities: dict[str, dict[str, float]]
) -> PreTrainedModel:
    """The bigram model with these probabilities of the next word; what is left of 1 is spread
    evenly over all other tokens.
    """
    size = len(tokenizer)
    table = torch.zeros(size, size, dtype=torch.float64)
    for word, following in probabilities.items():
        row = torch.full(
            (size,), (1 - sum(following.values())) / (size - len(following)), dtype=torch.float64
        )
        for name, probability in following.items():
            row[token(tokenizer, name)] = probability
        table[token(tokenizer, word)] = row.log()
    return bigram(table.float())


def token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    found = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert len(found) == 1
    return found[0]


def example(text: str, answer: str, item: str = "") -> Example:
    start = text.index(answer)
    return Example(text, (start, start + len(answer)), item=item)


def one(*ids: int, answer: int) -> Batch:
    """A row of these tokens, the last ``answer`` of which are the answer."""
    tokens = torch.tensor([ids])
    mask = torch.arange(len(ids))[None] >= len(ids) - answer
    return Batch(
        tokens,
        torch.ones_like(tokens),
        mask,
        torch.zeros_like(mask),
        torch.arange(len(ids))[None] >= 1,
        ("fact",),
    )


def ramp(size: int = 6) -> PreTrainedModel:
    """A model for which token ``t`` is the ``t + 1``-th most probable after any token."""
    return bigram(-torch.arange(float(size)).expand(size, size))


# --- ranks ----------------------------------------------------------------------------------------


def test_the_bigram_model_is_what_it_is_said_to_be() -> None:
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 1, 8, 8, 0]])
    with torch.no_grad():
        torch.testing.assert_close(bigram(table)(ids).logits[0], table[ids[0]])


def test_ranks_count_the_more_probable_tokens() -> None:
    found = answer_ranks(
        ramp(), [one(1, 5, 0, 2, answer=3), one(1, 5, 0, 2, answer=1), one(1, 0, 0, answer=2)]
    )
    np.testing.assert_array_equal(found.worst, [6, 3, 1])
    np.testing.assert_allclose(found.mean, [(6 + 1 + 3) / 3, 3, 1])
    assert found.items == ("fact",) * 3


def test_equal_tokens_share_their_rank_so_that_a_constant_model_is_at_chance() -> None:
    found = answer_ranks(bigram(torch.zeros(6, 6)), [one(1, 5, 0, answer=2)])
    assert (found.worst, found.mean) == (3.5, 3.5)
    # Logits 4 4 4 1 0 0: three share 1, 2 and 3; two share 5 and 6.
    table = torch.tensor([4.0, 4.0, 4.0, 1.0, 0.0, 0.0]).expand(6, 6)
    np.testing.assert_array_equal(
        answer_ranks(bigram(table), [one(1, token, answer=1) for token in range(6)]).worst,
        [2, 2, 2, 4, 5.5, 5.5],
    )


def test_the_worst_rank_is_one_exactly_where_the_answer_is_recalled(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, sets = (
        make_model(vocab_size=50),
        [make_batch((7, 9, 5, 6), seed, answer=1) for seed in range(30)],
    )
    found = answer_ranks(model, sets)
    np.testing.assert_array_equal(found.worst == 1, score(model, sets).correct == 1)
    assert 0 < (found.worst == 1).sum() < 120


def test_without_an_answer_or_with_broken_weights_there_is_no_value(
    words: PreTrainedTokenizerBase, make_model: ModelMaker
) -> None:
    model, text = (
        make_model(vocab_size=len(words)),
        [example("Ana lives in Oslo", "Oslo", "a"), Example("Ana lives in Oslo", item="b")],
    )
    found, (items, strength) = (
        answer_ranks(model, batches(words, text, 2)),
        extraction_strength(model, batches(words, text, 2)),
    )
    for values in (found.worst, found.mean, strength):
        assert np.isnan(values).tolist() == [False, True]
    assert found.items == items == ("a", "b")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    found, (_, strength) = (
        answer_ranks(model, batches(words, text[:1], 1)),
        extraction_strength(model, batches(words, text[:1], 1)),
    )
    assert np.isnan([found.worst, found.mean, strength]).all()
    chosen = multiple_choice(model, words, [Choice("Ana lives in ", ("Oslo", "Rome"), 0)])
    assert (
        np.isnan(chosen.correct).all() and np.isnan(chosen.margin).all() and chosen.chosen == [-1]
    )


def _rows(batch: Batch) -> list[Batch]:
    rows = []
    for row in range(batch.size):
        length = int(batch.attention_mask[row].sum())
        masks = (batch.attention_mask, batch.answer_mask, batch.subject_mask, batch.target_mask)
        rows.append(
            Batch(
                batch.input_ids[row : row + 1, :length],
                *(mask[row : row + 1, :length] for mask in masks),
                (batch.items[row],),
            )
        )
    return rows


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_neither_padding_nor_batching_changes_a_value(
    family: str, make_model: ModelMaker, make_batch: BatchMaker, pad: Padder
) -> None:
    model, batch = make_model(family), make_batch((9, 4, 6, 7), answer=3)
    ranks, (items, strength), whole = (
        answer_ranks(model, [batch]),
        extraction_strength(model, [batch]),
        perplexity(model, [batch]),
    )
    for sets in (_rows(batch), [pad(batch, 5)]):
        again = answer_ranks(model, sets)
        np.testing.assert_array_equal(again.worst, ranks.worst)
        np.testing.assert_array_equal(again.mean, ranks.mean)
        assert extraction_strength(model, sets)[0] == items == again.items == batch.items
        np.testing.assert_array_equal(extraction_strength(model, sets)[1], strength)
        assert perplexity(model, sets) == pytest.approx(whole, rel=1e-5)


# --- extraction strength --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "strength"),
    [
        ((2, 3, 4, 5), 1.0),  # the prompt alone brings it out
        ((4, 5, 0, 1), 0.75),  # the first token has to be given
        ((2, 4, 5, 0), 0.5),
        ((3, 3, 3, 4), 0.25),
        ((2, 3, 4, 0), 0.0),  # only the last is wrong: no suffix is right
        ((0, 0, 0, 0), 0.0),
        ((2,), 1.0),
        ((0,), 0.0),
    ],
)
def test_extraction_strength_is_the_share_of_the_right_suffix(
    answer: tuple[int, ...], strength: float
) -> None:
    cycle = bigram(10 * torch.eye(6).roll(1, dims=1))  # token t is followed by t + 1, 5 by 0
    assert extraction_strength(cycle, [one(1, *answer, answer=len(answer))])[1] == pytest.approx(
        strength
    )


def test_extraction_strength_is_what_greedy_generation_completes(make_model: ModelMaker) -> None:
    model, rng, length = make_model(), np.random.default_rng(0), 4
    seen = set()
    for _ in range(15):
        prompt = [1, *rng.integers(3, 50, 4).tolist()]
        known = [*prompt, *rng.integers(3, 50, rng.integers(0, length + 1)).tolist()]
        rest = length + len(prompt) - len(known)
        ids = (
            model.generate(torch.tensor([known]), max_new_tokens=rest, do_sample=False)[0].tolist()
            if rest
            else known
        )
        k = next(
            k for k in range(length + 1) if k == length or _continues(model, ids, len(prompt) + k)
        )
        seen.add(k)
        assert extraction_strength(model, [one(*ids, answer=length)])[1] == pytest.approx(
            1 - k / length
        )
    assert len(seen) > 2


def _continues(model: PreTrainedModel, ids: Sequence[int], given: int) -> bool:
    found = model.generate(
        torch.tensor([ids[:given]]), max_new_tokens=len(ids) - given, do_sample=False
    )
    return found[0].tolist() == list(ids)


# --- perplexity -----------------------------------------------------------------------------------


def test_perplexity_is_per_token_over_the_whole_set() -> None:
    table = torch.tensor([0.5, 0.25, 0.25]).log().expand(3, 3)
    sets = [one(0, 1, 1, 1, answer=1), one(0, 0, answer=1)]
    found = perplexity(bigram(table), sets)
    assert found.value == pytest.approx(2 ** ((3 * 2 + 1) / 4), rel=1e-5) and found.n == 2
    assert found.low < found.value < found.high
    assert perplexity(bigram(torch.zeros(7, 7)), sets).value == pytest.approx(7, rel=1e-5)


def test_perplexity_counts_the_targets_alone(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, batch = make_model(), make_batch(targets="answer")
    assert perplexity(model, [batch]).value == pytest.approx(
        math.exp(score(model, [batch]).loss), rel=1e-6
    )


@pytest.mark.parametrize("metric", [answer_ranks, extraction_strength, perplexity])
def test_an_empty_set_is_refused(metric: Callable[..., object], llama: PreTrainedModel) -> None:
    with pytest.raises(WorkbenchError, match="empty"):
        metric(llama, [])


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(
    training: bool, words: PreTrainedTokenizerBase, make_model: ModelMaker
) -> None:
    model = make_model(vocab_size=len(words), attention_dropout=0.5).train(training)
    sets, settings = (
        batches(words, [example("Ana lives in Oslo", "Oslo")], 1),
        model.generation_config,
    )
    values = []
    for _ in range(2):  # dropout would tell them apart
        choice = multiple_choice(model, words, [Choice("Ana lives in ", ("Oslo", "Rome"), 0)])
        truth = truth_ratio(model, words, [TruthQuestion("Ana lives in ", "Oslo", ("Rome",))])
        generate_answers(model, words, ["Ana lives"], 3)
        values.append(
            (
                answer_ranks(model, sets).mean,
                perplexity(model, sets).value,
                extraction_strength(model, sets)[1],
                choice.margin,
                truth.ratio,
            )
        )
    assert values[0] == values[1]
    assert model.training is training and model.generation_config is settings
    assert all(parameter.grad is None for parameter in model.parameters())


# --- multiple choice ------------------------------------------------------------------------------

TOWNS = {
    "in": {"Oslo": 0.5, "Rome": 0.3, "Lima": 0.1},
    "Oslo": {"near": 0.4, ".": 0.4},
    "near": {"the": 0.5},
    "the": {"river": 0.8},
}


def test_an_option_scores_its_log_probability_behind_the_question(
    words: PreTrainedTokenizerBase,
) -> None:
    model = transitions(words, TOWNS)
    options = ("Rome", "Oslo near the river", "Lima")
    found = multiple_choice(
        model,
        words,
        [
            Choice("Ana lives in ", options, 0, "Ana/town"),
            Choice("Ana lives in ", options, 2, "wrong"),
        ],
    )
    expected = np.log([0.3, 0.5 * 0.4 * 0.5 * 0.8, 0.1])
    for scores in found.scores:
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.correct, [1, 0])
    np.testing.assert_array_equal(found.chosen, [0, 0])
    np.testing.assert_allclose(found.margin, [math.log(0.3 / 0.1), math.log(0.1 / 0.3)], rtol=1e-4)
    assert found.items == ("Ana/town", "wrong") and found.accuracy == 0.5


def test_the_mean_over_tokens_does_not_punish_long_options(words: PreTrainedTokenizerBase) -> None:
    model, question = (
        transitions(words, TOWNS),
        Choice("Ana lives in ", ("Rome", "Oslo near the river"), 1),
    )
    by_sum, by_mean = (
        multiple_choice(model, words, [question], normalise=way) for way in ("sum", "mean")
    )
    assert by_sum.chosen == [0] and by_mean.chosen == [1]
    np.testing.assert_allclose(by_mean.scores[0], [math.log(0.3), math.log(0.08) / 4], rtol=1e-5)
    assert by_mean.margin[0] == pytest.approx(math.log(0.08) / 4 - math.log(0.3), rel=1e-4)


def test_a_tie_is_not_right(words: PreTrainedTokenizerBase) -> None:
    model = bigram(torch.zeros(len(words), len(words)))
    found = multiple_choice(
        model, words, [Choice("Ana lives in ", ("Oslo", "Rome"), correct) for correct in (0, 1)]
    )
    np.testing.assert_array_equal(found.correct, [0, 0])
    np.testing.assert_array_equal(found.margin, [0, 0])


QUESTIONS = [
    Choice("Ana lives in ", ("Oslo", "Rome near the river .", "Lima"), 0, "a"),
    Choice(
        "near the river , far from everything , Belo lives in ",
        ("Rome", "Zürich near the river"),
        1,
        "b",
    ),
    Choice("the ", ("river", "Ana", "Oslo", "unheard of"), 3, "c"),
]


@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_choices_do_not_depend_on_batching_or_on_their_neighbours(
    normalise: str, words: PreTrainedTokenizerBase, make_model: ModelMaker
) -> None:
    model = make_model(vocab_size=len(words))
    together = multiple_choice(model, words, QUESTIONS, normalise=normalise)
    for found in (
        multiple_choice(model, words, QUESTIONS, 64, normalise=normalise, batch_size=1),
        multiple_choice(model, words, QUESTIONS, normalise=normalise, batch_size=4),
    ):
        np.testing.assert_allclose(found.margin, together.margin, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found.chosen, together.chosen)
        assert [len(scores) for scores in found.scores] == [3, 2, 4] and found.items == (
            "a",
            "b",
            "c",
        )
    backwards = multiple_choice(model, words, QUESTIONS[::-1], normalise=normalise)
    np.testing.assert_allclose(backwards.margin[::-1], together.margin, rtol=1e-4, atol=1e-4)


def test_the_score_of_an_option_is_that_of_an_example(
    words: PreTrainedTokenizerBase, make_model: ModelMaker
) -> None:
    model, question = make_model(vocab_size=len(words)), QUESTIONS[1]
    examples = [
        Example(
            question.question + option, (len(question.question), len(question.question + option))
        )
        for option in question.options
    ]
    nll = score(model, batches(words, examples, 2, targets="answer")).nll
    np.testing.assert_allclose(multiple_choice(model, words, [question]).scores[0], -nll, rtol=1e-5)


def test_wrong_questions_are_refused(
    words: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    for options, correct in (
        (("Oslo",), 0),
        (("Oslo", "Oslo"), 0),
        ((), 0),
        (("Oslo", " "), 0),
        (("Oslo", "Rome"), 2),
        (("Oslo", "Rome"), -1),
        ("Oslo", 0),
    ):
        with pytest.raises(WorkbenchError, match="question"):
            Choice("Ana lives in ", options, correct)
    with pytest.raises(WorkbenchError, match="question"):
        Choice(" ", ("Oslo", "Rome"), 0)
    good = Choice("Ana lives in ", ("Oslo", "Rome"), 0)
    for questions, options, match in (
        ([], {}, "empty"),
        ([good], {"normalise": "length"}, "normalisation"),
        ([good], {"batch_size": 0}, "batch"),
    ):
        with pytest.raises(WorkbenchError, match=match):
            multiple_choice(llama, words, questions, **options)
    with pytest.raises(WorkbenchError, match="cut at 4 tokens"):
        multiple_choice(llama, words, [good], 4)


def test_an_answer_that_begins_the_text_has_no_probability(make_model: ModelMaker) -> None:
    bare = build_tokenizer(WORDS)
    bare.backend_tokenizer.post_processor = None  # no BOS, as with GPT-2
    with pytest.raises(WorkbenchError, match="nothing comes before"):
        multiple_choice(
            make_model(vocab_size=len(bare)),
            bare,
            [Choice("O", ("slo near the river", "xx near the river"), 0)],
        )


# --- truth ratio ----------------------------------------------------------------------------------


def test_the_truth_ratio_is_equation_one(words: PreTrainedTokenizerBase) -> None:
    model = transitions(words, TOWNS)
    questions = [
        TruthQuestion("Ana lives in ", "Oslo near the river", ("Rome", "Lima"), "a"),
        TruthQuestion("Ana lives in ", "Lima", ("Oslo near",), "b"),
    ]
    truth = [(0.5 * 0.4 * 0.5 * 0.8) ** (1 / 4), 0.1]
    found = truth_ratio(model, words, questions)
    np.testing.assert_allclose(
        found.ratio, [(0.3 + 0.1) / 2 / truth[0], math.sqrt(0.5 * 0.4) / truth[1]], rtol=1e-4
    )
    assert found.items == ("a", "b")
    geometric = truth_ratio(model, words, questions, mean="geometric")
    np.testing.assert_allclose(
        geometric.ratio,
        [math.sqrt(0.3 * 0.1) / truth[0], math.sqrt(0.5 * 0.4) / truth[1]],
        rtol=1e-4,
    )
    for size in (1, 2, 5):
        np.testing.assert_allclose(
            truth_ratio(model, words, questions, 32, batch_size=size).ratio, found.ratio, rtol=1e-5
        )


def test_the_clipped_forms() -> None:
    found = TruthRatios(("a",) * 5, np.array([0.25, 1.0, 4.0, 0.0, np.inf]))
    np.testing.assert_allclose(found.forget, [0.25, 1, 0.25, 0, 0])
    np.testing.assert_allclose(found.utility, [0.75, 0, 0, 1, 0])


@pytest.mark.filterwarnings("error")
def test_a_diverged_model_gives_no_nonsense(words: PreTrainedTokenizerBase) -> None:
    # Both probabilities underflow in float64; their ratio, exp(-1000), and its inverse do so
    # rightly.
    table = torch.zeros(len(words), len(words))
    table[:, token(words, "Oslo")], table[:, token(words, "Rome")] = -2000, -3000
    found = truth_ratio(
        bigram(table),
        words,
        [
            TruthQuestion("Ana lives in ", "Oslo", ("Rome",)),
            TruthQuestion("Ana lives in ", "Rome", ("Oslo",)),
        ],
    )
    np.testing.assert_array_equal(found.ratio, [0, np.inf])
    np.testing.assert_array_equal(found.forget, [0, 0])
    np.testing.assert_array_equal(found.utility, [1, 0])


def test_wrong_truth_questions_are_refused(
    words: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    for question, paraphrased, perturbed in (
        ("q ", "Oslo", ()),
        ("q ", " ", ("Rome",)),
        ("q ", "Oslo", ("",)),
        ("", "Oslo", ("Rome",)),
        ("q ", "Oslo", "Rome"),
    ):
        with pytest.raises(WorkbenchError, match="question"):
            TruthQuestion(question, paraphrased, perturbed)
    with pytest.raises(WorkbenchError, match="empty"):
        truth_ratio(llama, words, [])
    with pytest.raises(WorkbenchError, match="mean 'harmonic'"):
        truth_ratio(llama, words, [TruthQuestion("q ", "Oslo", ("Rome",))], mean="harmonic")


def test_forget_quality_is_the_kolmogorov_smirnov_p() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0, 1, 40), rng.lognormal(0.7, 1, 50)
    assert forget_quality(a, b) == pytest.approx(float(ks_2samp(a, b).pvalue))
    assert (
        forget_quality(a, b)
        == pytest.approx(forget_quality(1 / a, 1 / b))
        == pytest.approx(forget_quality(b, a))
    )
    assert forget_quality(a, a) == 1
    # Two and two that do not overlap: 2 of the 6 orders are as extreme.
    assert forget_quality(np.array([0.1, 0.2]), np.array([3.0, np.inf])) == pytest.approx(1 / 3)
    for bad in (np.array([]), np.array([1.0, np.nan]), np.ones((2, 2))):
        with pytest.raises(WorkbenchError, match="forget quality"):
            forget_quality(bad, b)
        with pytest.raises(WorkbenchError, match="forget quality"):
            forget_quality(a, bad)


# --- generation -----------------------------------------------------------------------------------


def _gpt2(size: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _neox(size: int) -> PreTrainedModel:
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=size, **shape, initializer_range=0.3, bos_token_id=1, eos_token_id=2
        )
    )


PROMPTS = [
    "Ana lives in",
    "the river near the river near Oslo , where Belo lives",
    "Rome",
    "Belo lives near the",
    "Zürich",
    "the",
    "in Lima near the river Ana",
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_write_what_single_prompts_do(
    family: str, side: str, words: PreTrainedTokenizerBase, make_model: ModelMaker
) -> None:
    torch.manual_seed(0)
    extra = {"gpt2": _gpt2, "neox": _neox}
    model = (
        extra[family](len(words)).eval()
        if family in extra
        else make_model(family, vocab_size=len(words))
    )
    words.padding_side = side
    try:
        together = generate_answers(model, words, PROMPTS, 8)
        assert together == [generate_answers(model, words, [prompt], 8)[0] for prompt in PROMPTS]
        assert together == generate_answers(model, words, PROMPTS, 8, batch_size=3)
        assert words.padding_side == side
    finally:
        words.padding_side = "right"
    assert len(set(together)) > 3  # the prompt matters
    for prompt, text in zip(PROMPTS, together, strict=True):
        ids = words(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        assert text == words.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()


CHAIN = {
    "<s>": {"Ana": 0.9},
    "Ana": {"lives": 0.9},
    "lives": {"in": 0.9},
    "in": {"Oslo": 0.6},
    "Oslo": {"</s>": 0.9},
    "Rome": {"near": 0.9},
    "near": {"the": 0.9},
    "the": {"river": 0.9},
    "river": {"Rome": 0.9},
    "</s>": {"Lima": 0.9},
}


def test_the_continuation_alone_is_given_and_ends_at_the_end_token(
    words: PreTrainedTokenizerBase,
) -> None:
    model = transitions(words, CHAIN)
    found = generate_answers(
        model, words, ["Ana", "Rome", "Ana lives in", "near the river Rome"], 6
    )
    assert found == [
        "lives in Oslo",
        "near the river Rome near the",
        "Oslo",
        "near the river Rome near the",
    ]
    assert generate_answers(model, words, ["Ana"], 2) == ["lives in"]
    # A prompt as records have it, with the space before the answer.
    assert generate_answers(model, words, [example("Ana lives in Oslo", "Oslo").prompt], 6) == [
        "Oslo"
    ]


def test_any_end_token_of_the_model_ends_and_without_a_pad_token_nothing_is_added(
    words: PreTrainedTokenizerBase,
) -> None:
    model, plain = transitions(words, CHAIN), build_tokenizer(WORDS)
    plain.pad_token = None
    model.generation_config.eos_token_id = [token(words, "river"), token(words, "Lima")]
    assert generate_answers(model, plain, ["Rome", "Ana", "in", "near"], 7) == [
        "near the",
        "lives in Oslo",
        "Oslo",
        "the",
    ]


def test_what_the_checkpoint_says_about_sampling_is_left_out(
    words: PreTrainedTokenizerBase, make_model: ModelMaker
) -> None:
    model = make_model(vocab_size=len(words))
    expected = generate_answers(model, words, PROMPTS, 8)
    for name, value in {
        "do_sample": True,
        "temperature": 5.0,
        "repetition_penalty": 3.0,
        "num_beams": 3,
        "suppress_tokens": list(range(200)),
        "min_length": 30,
    }.items():
        setattr(model.generation_config, name, value)
    settings = model.generation_config
    assert generate_answers(model, words, PROMPTS, 8) == expected
    assert model.generation_config is settings and settings.repetition_penalty == 3.0


def test_a_recalled_answer_is_generated_and_an_unrecalled_one_is_not(
    words: PreTrainedTokenizerBase,
) -> None:
    model = transitions(words, CHAIN)
    facts = [
        example("Ana lives in Oslo", "Oslo"),
        example("Ana lives in Rome", "Rome"),
        example("Rome near the river", "the river"),
    ]
    written = generate_answers(model, words, [fact.prompt for fact in facts], 2)
    found = [exact_match(text, fact.answer_text) for text, fact in zip(written, facts, strict=True)]
    assert (
        found == (score(model, [encode(words, facts)]).correct == 1).tolist() == [True, False, True]
    )


def test_wrong_prompts_are_refused(words: PreTrainedTokenizerBase, llama: PreTrainedModel) -> None:
    bare = build_tokenizer(WORDS)
    bare.backend_tokenizer.post_processor = None
    for tokenizer, prompts, tokens, size, match in (
        (words, [], 4, 8, "empty"),
        (words, ["Ana"], 0, 8, "at least 1"),
        (words, ["Ana"], 4, 0, "at least 1"),
        (bare, ["Ana", "  "], 4, 8, "no token"),
        (words, ["Ana", "the river " * 20], 30, 8, "context of 64"),
    ):
        with pytest.raises(WorkbenchError, match=match):
            generate_answers(llama, tokenizer, prompts, tokens, size)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "answer", "same"),
    [
        ("Oslo", "Oslo", True),
        (" oslo.\n", "Oslo", True),
        ('"New  York"', "new york", True),
        ("Oslo, Norway", "Oslo", False),
        ("", "Oslo", False),
        ("...", "Oslo", False),
        ("1.5", "15", False),
        ("-5", "5", False),
        ("C++", "C", False),
        ("STRASSE", "Straße", True),
        ("Zu\u0308rich", "Zürich", True),
        ("?", "?", True),
        ("!", "?", False),
    ],
)
def test_exact_match(generated: str, answer: str, same: bool) -> None:
    assert exact_match(generated, answer) is same


@pytest.mark.parametrize(
    ("generated", "keyword", "there"),
    [
        ("She is Anthony Mark.", "anthony mark", True),
        ("ANTHONY\n  Mark's", "Anthony Mark", True),
        ("Anthony Markus", "Anthony Mark", False),
        ("xMark", "Mark", False),
        ("Mark-Anthony", "Mark", True),
        ("I like C++ best", "c++", True),
        ("a.b", "a.b", True),
        ("axb", "a.b", False),
        ("5.2 and 1,500", "5", False),
        ("5.2 and 1,500", "500", False),
        ("5.2 and 1,500", "5.2", True),
        ("It was 5. Then 6, 7.", "5", True),
        ("It was 5. Then 6, 7.", "7", True),
        ("in Zu\u0308rich", "ZÜRICH", True),
        ("", "x", False),
    ],
)
def test_keywords_are_whole_words(generated: str, keyword: str, there: bool) -> None:
    assert contains(generated, keyword) is there


def test_blank_answers_and_keywords_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="blank"):
        exact_match("Oslo", " ")
    with pytest.raises(WorkbenchError, match="blank"):
        contains("Oslo", "\t")


@pytest.mark.parametrize(
    ("candidate", "reference", "common", "words_in_both"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 6, (6, 6)),
        # Lin (2004), section 3.1: two candidates with the same bigrams that the order tells apart.
        ("police kill the gunman", "police killed the gunman", 3, (4, 4)),
        ("the gunman kill police", "police killed the gunman", 2, (4, 4)),
        ("police the gunman", "police killed the gunman", 3, (3, 4)),
        ("a b c d e", "e d c b a", 1, (5, 5)),
        ("Police, the GUNMAN!", "police killed the gunman", 3, (3, 4)),
    ],
)
def test_rouge_l_by_hand(
    candidate: str, reference: str, common: int, words_in_both: tuple[int, int]
) -> None:
    precision, recall = common / words_in_both[0], common / words_in_both[1]
    assert rouge_l(candidate, reference, stem=False) == pytest.approx(
        Rouge(precision, recall, 2 * precision * recall / (precision + recall))
    )


def test_stemming_joins_the_forms_of_a_word() -> None:
    assert rouge_l("police kill the gunman", "police killed the gunman") == (1, 1, 1)
    assert rouge_l(
        "police kill the gunman", "police killed the gunman", stem=False
    ).f1 == pytest.approx(0.75)


def test_rouge_without_words() -> None:
    assert rouge_l("", "police") == rouge_l("...", "police") == (0, 0, 0)
    for reference in ("", "...", "東京"):
        with pytest.raises(WorkbenchError, match="reference"):
            rouge_l("police", reference)
