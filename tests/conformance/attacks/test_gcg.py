"""The suffix search: objective and gradient against a row-by-row evaluation, one step against a
search over every swap, and its constraints.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from workbench.attacks.gcg import (
    SuffixPrompt,
    SuffixResult,
    before_answer,
    gcg,
    in_front,
    random_suffix,
    suffix_batches,
    suffix_gradient,
    suffix_losses,
    suffix_prompts,
)
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import score

ModelMaker = Callable[..., PreTrainedModel]

WORDS = "anna bert carl lives in rome oslo new york a b c d e f g h i j k l m n o p q r . the house of is".split()  # noqa: E501, SIM905


def fact(text: str, answer: str) -> Example:
    start = text.index(answer)
    return Example(text, (start, start + len(answer)), (0, 4), f"{text[:4]}/town")


FACTS = (
    fact("anna lives in rome .", "rome"),
    fact("bert lives in the house of oslo .", "oslo"),
    fact("carl lives in new york .", "new york"),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(WORDS, 64)


@pytest.fixture
def model(make_model: ModelMaker, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A tiny Llama that knows the tokenizer's words."""
    return make_model(vocab_size=len(tokenizer))


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerBase) -> tuple[SuffixPrompt, ...]:
    return suffix_prompts(tokenizer, FACTS)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _embeddings_to_loss(
    model: PreTrainedModel, prompts: Sequence[SuffixPrompt], suffix: Tensor
) -> Tensor:
    """The objective for embeddings ``[length, width]`` of a suffix, prompt by prompt."""
    embedding = model.get_input_embeddings()
    losses = []
    for prompt in prompts:
        before, after, target = (
            embedding(torch.tensor([ids], dtype=torch.long))[0]
            for ids in (prompt.before, prompt.after, prompt.target)
        )
        logits = model(inputs_embeds=torch.cat([before, suffix, after, target])[None]).logits[
            0, -len(prompt.target) - 1 : -1
        ]
        losses.append(
            -logits.double().log_softmax(-1)[range(len(prompt.target)), list(prompt.target)].sum()
        )
    return torch.stack(losses).mean()


@torch.no_grad()
def _by_hand(
    model: PreTrainedModel, prompts: Sequence[SuffixPrompt], suffix: Sequence[int]
) -> float:
    return float(
        _embeddings_to_loss(
            model, prompts, model.get_input_embeddings()(torch.tensor([list(suffix)]))[0]
        )
    )


# --- questions ------------------------------------------------------------------------------------


def test_questions_are_cut_where_the_suffix_goes(tokenizer: PreTrainedTokenizerBase) -> None:
    behind, front = suffix_prompts(tokenizer, FACTS), suffix_prompts(tokenizer, FACTS, in_front)
    bos = (tokenizer.bos_token_id,)
    for example, one, two in zip(FACTS, behind, front, strict=True):
        question, answer = (
            ids_of(tokenizer, example.prompt.strip()),
            ids_of(tokenizer, example.answer_text),
        )
        assert one == SuffixPrompt((*bos, *question), (), tuple(answer), example.item)
        assert two == SuffixPrompt(bos, tuple(question), tuple(answer), example.item)
    (middle,) = suffix_prompts(tokenizer, FACTS[:1], lambda example: example.text.index(" in"))
    assert middle.before == (*bos, *ids_of(tokenizer, "anna lives")) and middle.after == tuple(
        ids_of(tokenizer, "in")
    )
    assert before_answer(FACTS[0]) == 14


def test_batches_with_a_suffix(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    suffix = ids_of(tokenizer, "a b c")
    found = suffix_batches(prompts, suffix, 2)
    assert [batch.size for batch in found] == [2, 1] and [
        item for batch in found for item in batch.items
    ] == [example.item for example in FACTS]
    for row, prompt in enumerate(prompts):
        batch, index = found[row // 2], row % 2
        real = batch.attention_mask[index].bool()
        assert batch.input_ids[index][real].tolist() == [
            *prompt.before,
            *suffix,
            *prompt.after,
            *prompt.target,
        ]
        assert (
            batch.input_ids[index][batch.answer_mask[index]].tolist()
            == list(prompt.target)
            == batch.input_ids[index][batch.target_mask[index]].tolist()
        )
    scores = score(model, found)
    for row, prompt in enumerate(prompts):
        assert scores.nll[row] == pytest.approx(_by_hand(model, [prompt], suffix), rel=1e-5)
    (plain,) = suffix_batches(prompts, (), 8)
    assert plain.input_ids[0][plain.attention_mask[0].bool()].tolist() == [
        *prompts[0].before,
        *prompts[0].target,
    ]


# --- objective and gradient -----------------------------------------------------------------------


def gpt2() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=300,
                n_embd=16,
                n_layer=2,
                n_head=4,
                n_positions=32,
                initializer_range=0.3,
            )
        ).eval()


def gemma3() -> PreTrainedModel:
    """A tiny Gemma 3, which scales its embeddings inside the embedding layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
        }
        config = Gemma3TextConfig(vocab_size=300, **shape, pad_token_id=0, initializer_range=0.3)
        return Gemma3ForCausalLM(config).eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"gpt2": gpt2, "gemma3": gemma3}


@pytest.mark.parametrize("place", [before_answer, in_front])
@pytest.mark.parametrize("rows", [1, 4, 256])
def test_the_objective_is_the_mean_over_the_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Callable[[Example], int],
    rows: int,
) -> None:
    asked = suffix_prompts(tokenizer, FACTS, place)
    suffixes = torch.randint(3, len(tokenizer), (5, 4), generator=torch.Generator().manual_seed(0))
    found = suffix_losses(model, asked, suffixes, rows=rows)
    assert found.tolist() == pytest.approx(
        [_by_hand(model, asked, suffix) for suffix in suffixes.tolist()], rel=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_gradient_is_that_of_the_relaxed_one_hot_rows(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    model = make_model(vocab_size=len(tokenizer)) if family == "llama" else FAMILIES[family]()
    asked, suffix = suffix_prompts(tokenizer, FACTS), ids_of(tokenizer, "a b the")
    loss, gradient = suffix_gradient(model, asked, suffix)
    size = model.get_input_embeddings().weight.shape[0]
    everything = model.get_input_embeddings()(torch.arange(size)[None])[0].detach()
    one_hot = F.one_hot(torch.tensor(suffix), size).float().requires_grad_(True)
    expected = _embeddings_to_loss(model, asked, one_hot @ everything)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, [one_hot])[0].float(), atol=1e-5, rtol=1e-4
    )


def test_the_gradient_is_a_finite_difference_and_predicts_every_single_swap(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """All tokens at all places, in float64 (GPT-2's norms keep it): a part of the way from one
    token to another changes the objective by that part of the gradients' difference.
    """
    model = gpt2().double()
    asked, suffix = suffix_prompts(tokenizer, FACTS[:2]), ids_of(tokenizer, "a b")
    _, gradient = suffix_gradient(model, asked, suffix)
    everything = model.get_input_embeddings().weight.detach()
    one_hot = F.one_hot(torch.tensor(suffix), len(everything)).double()
    assert gradient.dtype == torch.float64 and gradient.shape == one_hot.shape

    def relaxed(rows: Tensor) -> float:
        with torch.no_grad():
            return float(_embeddings_to_loss(model, asked, rows @ everything))

    part = 1e-5
    changes = torch.zeros_like(one_hot)
    for place in range(2):
        for token in range(len(everything)):
            swap = torch.zeros_like(one_hot)
            swap[place, token] += part
            swap[place, suffix[place]] -= part
            changes[place, token] = (relaxed(one_hot + swap) - relaxed(one_hot - swap)) / (2 * part)
    torch.testing.assert_close(
        changes, gradient - gradient.gather(1, torch.tensor(suffix)[:, None]), atol=1e-7, rtol=1e-6
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_the_gradient_does_not_depend_on_how_prompts_are_split(
    model: PreTrainedModel, prompts: Sequence[SuffixPrompt], rows: int
) -> None:
    whole, split = (
        suffix_gradient(model, prompts, (40, 41, 42), rows=limit) for limit in (256, rows)
    )
    assert whole[0] == pytest.approx(split[0], rel=1e-6)
    torch.testing.assert_close(whole[1], split[1], atol=1e-5, rtol=1e-4)


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [before_answer, in_front])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_step_over_all_swaps_finds_the_best(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Callable[[Example], int],
    seed: int,
) -> None:
    asked = suffix_prompts(tokenizer, FACTS, place)
    letters = [ids_of(tokenizer, letter)[0] for letter in "abcdefghijkl"]
    start = letters[:3]
    found = gcg(
        model,
        tokenizer,
        asked,
        length=3,
        steps=1,
        topk=len(tokenizer),
        candidates=10**6,
        seed=seed,
        start=start,
        allowed=letters,
    )
    swaps = [
        [*start[:index], token, *start[index + 1 :]]
        for index in range(3)
        for token in letters
        if token != start[index]
    ]
    values = [_by_hand(model, asked, swap) for swap in swaps]
    best = int(np.argmin(values))
    assert values[best] < _by_hand(model, asked, start)
    assert list(found.suffix_ids) == swaps[best] and found.loss == pytest.approx(
        values[best], rel=1e-5
    )
    assert found.losses == pytest.approx([_by_hand(model, asked, start), values[best]], rel=1e-5)
    assert (
        found.evaluations == 1 + 3 * 11
        and found.text.split() == tokenizer.decode(list(found.suffix_ids)).split()
    )


def test_a_step_takes_only_the_most_promising_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    letters = [ids_of(tokenizer, letter)[0] for letter in "abcdefghijkl"]
    start = letters[:3]
    _, gradient = suffix_gradient(model, prompts, start)
    found = gcg(
        model,
        tokenizer,
        prompts,
        length=3,
        steps=1,
        topk=2,
        candidates=10**6,
        start=start,
        allowed=letters,
    )
    tried = []
    for place in range(3):
        promising = sorted(letters, key=lambda token: float(gradient[place, token]))[:2]
        tried += [
            [*start[:place], token, *start[place + 1 :]]
            for token in promising
            if token != start[place]
        ]
    values = [_by_hand(model, prompts, swap) for swap in tried]
    assert found.losses[1] == pytest.approx(min(values), rel=1e-5) and found.evaluations == 1 + len(
        tried
    )


def test_the_best_suffix_is_kept_while_the_walk_goes_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    seen: list[tuple[int, int]] = []
    settings = {"length": 3, "steps": 12, "topk": 4, "candidates": 2, "seed": 3}
    found = gcg(model, tokenizer, prompts, **settings, progress=lambda *place: seen.append(place))  # type: ignore[arg-type]
    assert len(found.losses) == 13 and seen == [(step, 12) for step in range(1, 13)]
    assert found.loss == min(found.losses) and any(
        later > earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False)
    )
    assert found.loss == pytest.approx(_by_hand(model, prompts, found.suffix_ids), rel=1e-5)
    assert 12 < found.evaluations <= 12 * 3


def test_the_search_beats_random_suffixes_at_the_same_price(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = suffix_prompts(tokenizer, FACTS[:2], in_front)
    found = gcg(model, tokenizer, asked, length=4, steps=10, topk=32, candidates=32)
    control = random_suffix(model, tokenizer, asked, evaluations=found.evaluations, length=4)
    assert control.evaluations == found.evaluations and len(control.suffix_ids) == 4
    assert found.loss < control.loss <= control.losses[0]


def test_random_suffixes_are_the_best_of_their_draws(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    seen: list[tuple[int, int]] = []
    many = random_suffix(
        model,
        tokenizer,
        prompts,
        evaluations=10,
        length=3,
        rows=12,
        progress=lambda *place: seen.append(place),
    )
    assert (
        seen == [(4, 10), (8, 10), (10, 10)]
        and len(many.losses) == 3
        and list(many.losses) == sorted(many.losses, reverse=True)
    )
    assert (
        many.loss
        == many.losses[-1]
        == pytest.approx(_by_hand(model, prompts, many.suffix_ids), rel=1e-5)
    )
    other = random_suffix(model, tokenizer, prompts, evaluations=10, length=3, rows=1)
    assert other.suffix_ids == many.suffix_ids  # however they are batched
    first = gcg(model, tokenizer, prompts, length=3, steps=1)
    assert random_suffix(model, tokenizer, prompts, evaluations=1, length=3).loss == pytest.approx(
        first.losses[0], rel=1e-5
    )  # both begin at the same suffix


def test_the_same_seed_gives_the_same_suffix(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    state = torch.get_rng_state()
    one, two, other = (
        gcg(model, tokenizer, prompts, length=4, steps=3, topk=16, candidates=8, seed=seed)
        for seed in (1, 1, 2)
    )
    assert one == two and one.losses[0] != other.losses[0]
    assert torch.equal(state, torch.get_rng_state())


def test_the_model_stays_as_it_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.train()
    model.model.layers[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags, modes = (
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
    )
    found = gcg(model, tokenizer, prompts, length=3, steps=2, candidates=8)
    random_suffix(model, tokenizer, prompts, evaluations=3, length=3)
    suffix_gradient(model, prompts, found.suffix_ids)
    suffix_losses(model, prompts, torch.tensor([found.suffix_ids]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and [
        module.training for module in model.modules()
    ] == modes
    assert all(p.grad is None for p in model.parameters())


# --- constraints ----------------------------------------------------------------------------------


def _drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[SuffixPrompt],
    **settings: object,
) -> list[SuffixResult]:
    """Many one-evaluation random suffixes and a few searches."""
    draws = [
        random_suffix(model, tokenizer, prompts, evaluations=1, length=6, seed=seed, **settings)
        for seed in range(40)
    ]  # type: ignore[arg-type]
    return draws + [
        gcg(model, tokenizer, prompts, length=6, steps=4, candidates=16, seed=seed, **settings)
        for seed in range(3)
    ]  # type: ignore[arg-type]


def test_special_tokens_and_tokens_of_answers_are_never_used(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    banned = {
        *tokenizer.all_special_ids,
        *(
            token
            for word in ("rome", "oslo", "new york", "house", "k")
            for token in ids_of(tokenizer, word)
        ),
    }
    for found in _drawn(model, tokenizer, prompts, forbidden=("house", "k")):
        assert not banned & set(found.suffix_ids)


def test_an_answer_is_not_spelled_out_in_bytes_either(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = suffix_prompts(tokenizer, FACTS[:1])
    pieces = [
        ids_of(tokenizer, " zzz")[0],
        *(tokenizer.convert_tokens_to_ids(letter) for letter in "rome"),
    ]
    start = [
        tokenizer.convert_tokens_to_ids("Ġ"),
        *(tokenizer.convert_tokens_to_ids(letter) for letter in "rom"),
        tokenizer.convert_tokens_to_ids("r"),
    ]
    found = gcg(
        model,
        tokenizer,
        asked,
        length=5,
        steps=1,
        candidates=10**6,
        topk=300,
        start=start,
        allowed=pieces,
        retokenise=False,
    )
    assert "rome" not in found.text
    # 5 places with 5 other tokens of the pool each, less the one that ends in "rome"
    assert found.evaluations == 1 + sum(token != own for own in start for token in set(pieces)) - 1


def test_suffixes_are_what_their_text_is_tokenised_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    for found in _drawn(model, tokenizer, prompts):
        assert ids_of(tokenizer, found.text) == list(found.suffix_ids)
    loose = _drawn(model, tokenizer, prompts, retokenise=False)
    assert any(
        ids_of(tokenizer, found.text) != list(found.suffix_ids) for found in loose
    )  # the rule has something to do


def test_only_allowed_tokens_are_used(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    letters = {ids_of(tokenizer, letter)[0] for letter in "abcd"}
    for found in _drawn(
        model,
        tokenizer,
        prompts,
        allowed=[*letters, *ids_of(tokenizer, "rome"), tokenizer.bos_token_id, 10**6],
    ):
        assert set(found.suffix_ids) <= letters


def test_a_step_without_a_candidate_stays_where_it_is(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    (letter,) = ids_of(tokenizer, "a")
    found = gcg(model, tokenizer, prompts, length=2, steps=3, allowed=[letter])
    assert (
        found.suffix_ids == (letter, letter)
        and len(set(found.losses)) == 1
        and found.evaluations == 3
    )


# --- results and errors ---------------------------------------------------------------------------


def test_a_result_shows_its_text_escaped() -> None:
    found = SuffixResult((1, 2), "<script>alert(1)</script>", 1.5, (3.0, 1.5), 1234)
    assert (
        "<script>" not in found._repr_html_()
        and "&lt;script&gt;" in found._repr_html_()
        and "1,234" in found._repr_html_()
    )
    assert "3.000 to 1.500" in repr(found)


def test_bad_questions_are_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    with pytest.raises(WorkbenchError, match="at least one question; the set is empty"):
        suffix_prompts(tokenizer, [])
    with pytest.raises(WorkbenchError, match="'some words' has none"):
        suffix_prompts(tokenizer, [Example("some words")])
    with pytest.raises(WorkbenchError, match="character 16, outside its question of 14"):
        suffix_prompts(tokenizer, FACTS[:1], lambda example: 16)
    for attempt in (
        lambda: gcg(model, tokenizer, []),
        lambda: random_suffix(model, tokenizer, [], evaluations=1),
        lambda: suffix_losses(model, [], torch.tensor([[1]])),
        lambda: suffix_gradient(model, [], [1]),
        lambda: suffix_batches([], [1], 1),
    ):
        with pytest.raises(WorkbenchError, match="the set is empty"):
            attempt()
    with pytest.raises(WorkbenchError, match="needs an answer and a token before it"):
        gcg(model, tokenizer, [SuffixPrompt((1,), (), ())])
    with pytest.raises(WorkbenchError, match="have 84 tokens, and the model's context has 64"):
        gcg(model, tokenizer, [SuffixPrompt((1,), (), (40,) * 63)], length=20)


def test_bad_settings_are_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[SuffixPrompt]
) -> None:
    for name in ("length", "steps", "topk", "candidates", "rows"):
        with pytest.raises(WorkbenchError, match=f"needs {name} >= 1; got 0"):
            gcg(model, tokenizer, prompts, **{name: 0})
    with pytest.raises(WorkbenchError, match="needs evaluations >= 1"):
        random_suffix(model, tokenizer, prompts, evaluations=0)
    with pytest.raises(WorkbenchError, match="no token is left"):
        gcg(model, tokenizer, prompts, allowed=ids_of(tokenizer, "rome"))
    rome = ids_of(tokenizer, "rome")[0]
    with pytest.raises(WorkbenchError, match=rf"of which \[{rome}\] may not be used"):
        gcg(model, tokenizer, prompts, length=1, start=[rome])
    with pytest.raises(WorkbenchError, match="2 tokens"):
        gcg(model, tokenizer, prompts, length=3, start=ids_of(tokenizer, "a b"))
    spelled, loose = (tokenizer.convert_tokens_to_ids(list(text)) for text in ("Ġrome", "Ġa"))
    for start, retokenise in ((spelled, False), (loose, True)):
        with pytest.raises(WorkbenchError, match="mentions an answer or is not what its own text"):
            gcg(model, tokenizer, prompts, length=len(start), start=start, retokenise=retokenise)
    with pytest.raises(WorkbenchError, match="survives its own tokenisation"):
        gcg(model, tokenizer, prompts, length=2, allowed=[tokenizer.convert_tokens_to_ids("Ã")])
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(WorkbenchError, match="gradient of a suffix search is not finite"):
        gcg(broken, tokenizer, prompts, length=2, steps=1)
