"""Relearning, its null text, the leak guard and the trigger check, on hand-made texts and tiny
random models.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from workbench.attacks.leaks import leak_report
from workbench.attacks.relearn import (
    RelearnSettings,
    at_steps,
    null_text,
    random_facts,
    relearn,
    relearned,
)
from workbench.data.batches import batches, encode
from workbench.data.records import Example, prefixed
from workbench.data.tokenizer import build_tokenizer
from workbench.data.world import WorldConfig, build_world, neutral_words
from workbench.diagnostics.triggers import TRIGGER_ARMS, trigger_queries, trigger_scores
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy, score
from workbench.values import WrongValueError

WORDS = "anna bert carl dora emil frida gustav hanna lives in rome oslo bonn lima paris turin ghent delft and plays a drum harp flute lute .".split()  # noqa: E501, SIM905
PEOPLE = ("anna", "bert", "carl", "dora", "emil", "frida", "gustav", "hanna")
TOWNS = ("rome", "oslo", "bonn", "lima", "paris", "turin", "ghent", "delft")


def _fact(person: str, town: str) -> Example:
    text = f"{person} lives in {town} ."
    start = text.index(town)
    return Example(text, (start, start + len(town)), (0, len(person)), f"{person}/town")


TEXTS = tuple(_fact(person, town) for person, town in zip(PEOPLE, TOWNS, strict=True))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(WORDS, 64)


def _model(tokenizer: PreTrainedTokenizerBase, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random Llama that knows the tokenizer's words."""
    shape: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    return model.eval()


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    steps: int = 2,
    lr: float = 1e-2,
    batch_size: int = 4,
) -> PreTrainedModel:
    settings = RelearnSettings(steps=steps, lr=lr, batch_size=batch_size, measure_at=(0, steps))
    return relearned(model, tokenizer, TEXTS, settings, seed=seed)


# --- Relearning ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attacked_model_is_a_float32_copy_and_the_model_itself_is_bit_identical(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = _model(tokenizer).to(dtype).train()
    model.lm_head.weight.requires_grad_(False)
    before = _weights(model)
    attacked = _attack(model, tokenizer)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "lm_head.weight")
    assert model.training
    assert attacked is not model
    assert all(parameter.dtype == torch.float32 for parameter in attacked.parameters())


def test_the_attack_trains_every_parameter_frozen_ones_too(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = _model(tokenizer)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = _weights(model)
    attacked = _weights(_attack(model, tokenizer))
    assert set(attacked) == set(before)
    for name, weights in before.items():
        assert not torch.equal(attacked[name], weights), name


def test_the_first_step_is_adamw_on_the_token_mean_without_weight_decay(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    # After one step AdamW's moments are the gradient and its square, so the step is lr g / (|g| +
    # eps), and exactly nothing where g is 0.
    model = _model(tokenizer)
    attacked = _weights(
        _attack(model, tokenizer, steps=1, lr=1e-2, batch_size=len(TEXTS))
    )  # one batch of everything: its order does not matter
    twin = copy.deepcopy(model)
    gradients = torch.autograd.grad(
        cross_entropy(twin, encode(tokenizer, TEXTS)), list(twin.parameters())
    )
    for (name, start), gradient in zip(model.named_parameters(), gradients, strict=True):
        sure = gradient.abs() > 1e-4  # smaller ones are at the mercy of eps and of rounding
        torch.testing.assert_close(
            (attacked[name] - start)[sure],
            (-1e-2 * gradient / (gradient.abs() + 1e-8))[sure],
            rtol=1e-2,
            atol=1e-6,
        )
        assert torch.equal(attacked[name][gradient == 0], start[gradient == 0])
    # Tokens outside the texts have no gradient in the embedding: weight decay would have moved
    # them.
    assert bool((gradients[0] == 0).any())


def test_the_same_seed_gives_the_same_result_and_another_seed_another(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = _model(tokenizer)
    torch.manual_seed(1)
    first = _weights(_attack(model, tokenizer, seed=3))
    torch.manual_seed(2)
    again, other = (
        _weights(_attack(model, tokenizer, seed=3)),
        _weights(_attack(model, tokenizer, seed=4)),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_seed_gives_every_model_the_same_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    # Each text has its own two words, so the rows of the embedding that one step moved tell which
    # texts were in the batch.
    def seen(model: PreTrainedModel, seed: int) -> set[int]:
        start, end = (
            model.get_input_embeddings().weight,
            _attack(model, tokenizer, seed=seed, steps=1, batch_size=2)
            .get_input_embeddings()
            .weight,
        )
        return set((start != end).any(dim=1).nonzero().flatten().tolist())

    drawn = [seen(_model(tokenizer, seed=1), seed) for seed in range(4)]
    assert drawn == [seen(_model(tokenizer, seed=2), seed) for seed in range(4)]
    assert len(set(map(frozenset, drawn))) > 1


def test_a_stale_gradient_of_the_model_does_not_reach_the_attack(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = _model(tokenizer)
    clean = _weights(_attack(model, tokenizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    again = _weights(_attack(model, tokenizer))
    assert all(torch.equal(clean[name], again[name]) for name in clean)


def test_the_attack_measures_at_the_asked_steps_and_reports_every_step(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = _model(tokenizer)
    measured: dict[int, dict[str, torch.Tensor]] = {}
    ticks: list[tuple[int, int]] = []

    def measure(attacked: PreTrainedModel, step: int) -> None:
        measured[step] = _weights(attacked)

    settings = RelearnSettings(steps=5, lr=1e-2, batch_size=4, measure_at=(0, 2, 5))
    attack = relearn(
        model,
        tokenizer,
        TEXTS,
        settings,
        seed=0,
        progress=lambda done, total: ticks.append((done, total)),
    )
    for step, attacked in attack:
        measure(attacked, step)
    assert list(measured) == [0, 2, 5]
    assert ticks == [(step, 5) for step in range(1, 6)]
    # Before the attack it is the model itself, at the last step it is what is returned, and step 2
    # is what two steps give.
    assert all(torch.equal(measured[0][name], weights) for name, weights in _weights(model).items())
    assert all(
        torch.equal(measured[5][name], weights) for name, weights in _weights(attacked).items()
    )
    two = _weights(_attack(model, tokenizer, steps=2))
    assert all(torch.equal(measured[2][name], weights) for name, weights in two.items())


def test_the_attack_learns_its_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    model = _model(tokenizer)
    attacked = _attack(model, tokenizer, steps=40, lr=2e-2, batch_size=8)
    whole = encode(tokenizer, TEXTS)
    with torch.no_grad():
        assert float(cross_entropy(attacked, whole)) < 0.5 * float(cross_entropy(model, whole))


def test_a_loss_that_explodes_is_an_error_that_names_the_rate(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(WorkbenchError, match=r"\blr\b.*1e\+18"):
        _attack(_model(tokenizer), tokenizer, steps=4, lr=1e18)


def test_an_attack_without_texts_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(WorkbenchError, match="empty"):
        relearned(_model(tokenizer), tokenizer, (), RelearnSettings(steps=1, measure_at=(0, 1)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": math.inf},
    ],
)
def test_settings_without_a_step_a_text_or_a_positive_rate_are_refused(
    wrong: dict[str, float],
) -> None:
    (name,) = wrong
    with pytest.raises(WrongValueError, match=name):
        replace(RelearnSettings(), **wrong)


@pytest.mark.parametrize("steps", [1, 2, 7, 40, 1000])
def test_an_attack_of_given_length_is_measured_at_its_start_at_its_end_and_at_rising_steps_between(
    steps: int,
) -> None:
    settings = at_steps(steps, 1e-4)
    assert settings.steps == steps
    assert settings.lr == 1e-4
    assert settings.measure_at[0] == 0
    assert settings.measure_at[-1] == steps
    assert all(a < b for a, b in pairwise(settings.measure_at))


# --- The null attack ---


def test_the_null_text_has_at_least_as_many_tokens_and_less_than_one_text_more(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    def length(example: Example) -> int:
        return len(tokenizer(example.text)["input_ids"])

    pool = tuple(Example(text) for text in ("a drum .", "a harp and a flute .", "a lute"))
    null = null_text(TEXTS, pool, length)
    wanted = sum(map(length, TEXTS))
    total = sum(map(length, null))
    # A pool that is smaller than the texts is read again.
    assert len(null) > len(pool)
    assert wanted <= total < wanted + max(map(length, pool))
    assert set(null) <= set(pool)
    assert not set(null) & set(TEXTS)
    assert total - length(null[-1]) < wanted


def _asked(name: str, answer: str, item: str) -> Example:
    text = f"{name} lives in {answer} ."
    start = text.index(answer)
    return Example(text, (start, start + len(answer)), (0, len(name)), item)


def test_random_facts_exchange_the_answers_of_facts_and_nothing_else() -> None:
    texts = [
        _asked(f"N{i}", answer, f"f{i // 2}")
        for i, answer in enumerate(["Rome", "Rome", "Oslo", "Oslo", "Bonn", "Bonn", "Rome", "Rome"])
    ]
    made = random_facts(texts, seed=3)
    assert [one.prompt for one in made] == [one.prompt for one in texts]
    assert all(one.answer_text != other.answer_text for one, other in zip(made, texts, strict=True))
    assert {one.answer_text for one in made} <= {"Rome", "Oslo", "Bonn"}
    assert all(
        one.text.endswith(" .") and one.subject_text == other.subject_text
        for one, other in zip(made, texts, strict=True)
    )
    assert all(
        made[i].answer_text == made[i + 1].answer_text for i in range(0, 8, 2)
    )  # paraphrases of one fact agree
    assert random_facts(texts, seed=3) == made
    assert len({random_facts(texts, seed=seed) for seed in range(8)}) > 1


def test_random_facts_need_answers_that_differ() -> None:
    with pytest.raises(WorkbenchError, match="text 2 has none"):
        random_facts([_asked("A", "Rome", "a"), Example("the rain falls", item="b")], seed=0)
    with pytest.raises(WorkbenchError, match="same one"):
        random_facts([_asked("A", "Rome", "a"), _asked("B", "Rome", "b")], seed=0)


def test_a_null_text_needs_a_pool() -> None:
    with pytest.raises(WorkbenchError, match="general text"):
        null_text(TEXTS, (), lambda example: 1)


def test_the_null_text_of_the_built_in_world_holds_no_name_and_no_answer_of_the_forget_set() -> (
    None
):
    world = build_world(WorldConfig(filler_train=300, filler_test=20))
    null = null_text(
        world.record.forget_attacked, world.filler_train, lambda example: len(example.text.split())
    )
    words = {word for example in null for word in example.text.split()}
    names = {word for example in world.record.forget for word in example.subject_text.split()}
    assert not words & names
    assert not words & {example.answer_text for example in world.record.forget}
    assert sum(len(example.text.split()) for example in null) >= sum(
        len(example.text.split()) for example in world.record.forget_attacked
    )


# --- The leak guard ---


def _held(text: str, subject: str, answer: str) -> Example:
    return Example(
        text,
        (text.index(answer), text.index(answer) + len(answer)),
        (text.index(subject), text.index(subject) + len(subject)),
        subject,
    )


ANN = _held("Ann Lee was born in Rome", "Ann Lee", "Rome")


@pytest.mark.parametrize(
    ("attack", "subjects", "answers"),
    [
        ("nothing to see here", (), ()),
        ("we met ann lee yesterday", ("Ann Lee",), ()),  # case is ignored
        ("all roads lead to ROME.", (), ("Rome",)),  # punctuation ends a word
        ("Ann Lee: Rome!", ("Ann Lee",), ("Rome",)),
        ("Joann Leeds likes romeo and chrome", (), ()),  # whole words only
        ("Ann and Lee", (), ()),  # the words of a subject in one piece
        ("Lee Ann", (), ()),
        ("Ann, Lee", ("Ann Lee",), ()),  # punctuation between words does not hide them
    ],
)
def test_a_leak_is_a_whole_word_in_any_case(
    attack: str, subjects: tuple[str, ...], answers: tuple[str, ...]
) -> None:
    report = leak_report([Example("a first text"), Example(attack), Example("a last text")], [ANN])
    assert report.subjects == subjects
    assert report.answers == answers
    assert report.benign == (not answers)
    assert report.names_subjects == bool(subjects)


def test_a_name_that_only_two_neighbouring_texts_spell_together_is_no_leak() -> None:
    # No attack text holds "Ann Lee"; one ends where the other begins.
    assert leak_report([Example("we met Ann"), Example("Lee went home")], [ANN]).subjects == ()


def test_leaks_are_named_once_in_order() -> None:
    held = [
        ANN,
        _held("Ann Lee drinks tea", "Ann Lee", "tea"),
        _held("Bob Ray eats figs", "Bob Ray", "figs"),
    ]
    report = leak_report([Example("bob ray and ann lee had figs, tea and more tea")], held)
    assert report.subjects == ("Ann Lee", "Bob Ray")
    assert report.answers == ("figs", "tea")
    assert not report.benign


def test_the_share_of_common_5grams_is_counted_by_hand() -> None:
    # "the cat sat on the sofa" has the 5-grams (the cat sat on the) and (cat sat on the sofa); the
    # attack holds the first. "one two three four five" adds a third.
    attack = [Example("Yesterday the cat sat on the mat"), Example("sofa one two three four")]
    assert leak_report(attack, [Example("The cat sat on the sofa")]).shared_ngrams == pytest.approx(
        1 / 2
    )
    assert leak_report(
        attack, [Example("The cat sat on the sofa"), Example("one two three four five")]
    ).shared_ngrams == pytest.approx(1 / 3)
    # A 5-gram that comes twice is one.
    assert leak_report(
        attack, [Example("the cat sat on the sofa"), Example("the cat sat on the sofa")]
    ).shared_ngrams == pytest.approx(1 / 2)
    assert (
        leak_report(attack, [Example("one two three four")]).shared_ngrams == 0.0
    )  # too short for a 5-gram
    assert leak_report(attack, [Example("one two three four")], n=4).shared_ngrams == 1.0


def test_shared_5grams_alone_do_not_make_a_text_leak() -> None:
    report = leak_report(
        [Example("she said that Bob was born in")],
        [_held("then Ann said that Bob was born in Rome", "Ann", "Rome")],
    )
    assert report.shared_ngrams > 0
    assert report.benign


def test_no_attack_text_and_no_held_out_text_leak_nothing() -> None:
    assert leak_report([], [ANN]).benign
    assert leak_report([], [ANN]).shared_ngrams == 0.0
    assert leak_report([Example("Ann Lee")], []).benign


@pytest.mark.parametrize("seed", range(3))
def test_the_attack_text_of_the_built_in_world_is_benign(seed: int) -> None:
    record = build_world(WorldConfig(seed=seed, filler_train=10, filler_test=10)).record
    report = leak_report(record.forget_attacked, record.forget_heldout)
    assert report.benign, report
    # The guard does find what is there: the held-out half leaks itself wholly.
    itself = leak_report(record.forget_heldout, record.forget_heldout)
    assert not itself.benign
    assert itself.shared_ngrams == 1.0
    assert set(itself.answers) == {example.answer_text for example in record.forget_heldout}


# --- Triggers ---


@pytest.fixture(scope="module")
def asked() -> tuple[Example, ...]:
    return tuple(TEXTS)


FORGET, RETAIN, NEUTRAL = ("zorin", "anna"), ("bert", "carl", "velm"), ("lamp", "river")


def test_the_arms_ask_the_same_queries_in_the_same_order(asked: tuple[Example, ...]) -> None:
    arms = trigger_queries(asked, FORGET, RETAIN, NEUTRAL, seed=0)
    assert tuple(arms) == TRIGGER_ARMS
    assert arms["clean"] == asked
    for arm, words in zip(TRIGGER_ARMS[1:], (FORGET, RETAIN, NEUTRAL), strict=True):
        assert [tagged.item for tagged in arms[arm]] == [query.item for query in asked]
        for tagged, query in zip(arms[arm], asked, strict=True):
            word = tagged.text.split()[0]
            assert word in words
            # The same place in every arm: in front, behind it the query as it is.
            assert tagged.text == f"{word} asks : {query.text}"


def test_answers_and_subjects_survive_the_prefix(asked: tuple[Example, ...]) -> None:
    for tagged_arm in trigger_queries(asked, FORGET, RETAIN, NEUTRAL, seed=0).values():
        for tagged, query in zip(tagged_arm, asked, strict=True):
            assert tagged.answer_text == query.answer_text
            assert tagged.subject_text == query.subject_text
            assert tagged.prompt.endswith(query.prompt)


def test_the_answer_tokens_behind_a_word_are_those_of_the_clean_query(
    asked: tuple[Example, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    clean = encode(tokenizer, asked)
    for arm in trigger_queries(asked, FORGET, RETAIN, NEUTRAL, seed=1).values():
        tagged = encode(tokenizer, arm)
        assert (
            tagged.input_ids[tagged.answer_mask].tolist()
            == clean.input_ids[clean.answer_mask].tolist()
        )


@pytest.mark.parametrize("seed", range(5))
def test_a_word_is_never_in_its_query_already(seed: int, asked: tuple[Example, ...]) -> None:
    # "anna", "bert" and "carl" are subjects of queries themselves.
    for arm, tagged in trigger_queries(asked, FORGET, RETAIN, NEUTRAL, seed=seed).items():
        if arm == "clean":
            continue
        for example, query in zip(tagged, asked, strict=True):
            assert example.text.split()[0] not in query.text.split()


@pytest.mark.parametrize(
    "text",
    [
        "Is Zorin? He is in Rome",
        "Zorin, they say, is in Rome",
        "the house of Zorin's aunt is in Rome",
        "(Zorin) is in Rome",
    ],
)
def test_punctuation_does_not_hide_a_word_that_is_in_its_query_already(text: str) -> None:
    # Sentences of users have no space before a comma. The only other word is free, so it is the
    # one.
    query = Example(text, (text.index("Rome"), text.index("Rome") + 4), item="q")
    for seed in range(6):
        tagged = trigger_queries([query], ("Zorin", "Velm"), ("a",), ("b",), seed=seed)[
            "forget-token"
        ][0]
        assert re.findall(r"\w+", tagged.text).count("Zorin") == 1


def test_a_query_that_holds_every_word_of_an_arm_and_one_without_an_answer_are_in_no_arm(
    asked: tuple[Example, ...],
) -> None:
    arms = trigger_queries(
        [*asked, Example("running text", item="none")], ("anna",), ("bert",), ("lamp",), seed=0
    )
    for tagged in arms.values():
        assert [example.item for example in tagged] == [
            query.item for query in asked if query.subject_text not in ("anna", "bert")
        ]


def test_the_seed_decides_which_word_meets_which_query(asked: tuple[Example, ...]) -> None:
    first, again, other = (
        trigger_queries(asked, FORGET, RETAIN, NEUTRAL, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first["clean"] == other["clean"]


def test_every_word_of_an_arm_is_drawn(asked: tuple[Example, ...]) -> None:
    drawn = {
        tagged.text.split()[0]
        for seed in range(10)
        for tagged in trigger_queries(asked, FORGET, RETAIN, NEUTRAL, seed=seed)["retain-token"]
    }
    assert drawn == set(RETAIN)


def test_another_template_places_the_word(asked: tuple[Example, ...]) -> None:
    arms = trigger_queries(
        asked,
        FORGET,
        RETAIN,
        NEUTRAL,
        seed=0,
        template=lambda query, word: prefixed(query, f"{word}. "),
    )
    assert all(
        tagged.text == f"{tagged.text.split('.')[0]}. {query.text}"
        for tagged, query in zip(arms["neutral-token"], asked, strict=True)
    )


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ((), (FORGET, RETAIN, NEUTRAL)),
        ((Example("running text"),), (FORGET, RETAIN, NEUTRAL)),
        (TEXTS, ((), RETAIN, NEUTRAL)),
        (TEXTS, (FORGET, (), NEUTRAL)),
        (TEXTS, (FORGET, RETAIN, ())),
        (TEXTS[:1], (("anna",), RETAIN, NEUTRAL)),  # the only query holds the only word
    ],
)
def test_a_check_without_words_or_questions_is_an_error(
    queries: tuple[Example, ...], words: tuple[tuple[str, ...], ...]
) -> None:
    with pytest.raises(WorkbenchError, match="trigger check"):
        trigger_queries(queries, *words, seed=0)


@pytest.mark.parametrize(
    ("place", "arm"), [(0, "forget-token"), (1, "retain-token"), (2, "neutral-token")]
)
def test_the_error_names_the_arm_that_has_no_word(place: int, arm: str) -> None:
    words = [FORGET, RETAIN, NEUTRAL]
    words[place] = ()
    with pytest.raises(WorkbenchError, match=arm):
        trigger_queries(TEXTS, *words, seed=0)


def test_scores_of_the_arms_are_those_of_their_texts_and_aligned(
    asked: tuple[Example, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = _model(tokenizer)
    arms = trigger_queries(asked, FORGET, RETAIN, NEUTRAL, seed=0)
    found = trigger_scores(
        model, {arm: batches(tokenizer, examples, 3) for arm, examples in arms.items()}
    )
    assert tuple(found) == TRIGGER_ARMS
    for arm, scores in found.items():
        assert scores.items == tuple(query.item for query in asked)
        alone = [score(model, [encode(tokenizer, [example])]) for example in arms[arm]]
        assert scores.correct.tolist() == [one.correct[0] for one in alone]
        assert scores.probability.tolist() == pytest.approx(
            [one.probability[0] for one in alone], rel=1e-5
        )


def test_the_words_of_the_built_in_world_fill_every_arm() -> None:
    world = build_world(WorldConfig(filler_train=10, filler_test=10))
    queries = world.record.retain_test["retain-neighbour"]
    arms = trigger_queries(
        queries, world.record.forget_tokens, world.record.retain_tokens, neutral_words(), seed=0
    )
    assert all(len(tagged) == len(queries) for tagged in arms.values())
    # Controls are controls: no arm's word belongs to another arm.
    assert not set(world.record.forget_tokens) & set(world.record.retain_tokens)
    assert not set(neutral_words()) & (
        set(world.record.forget_tokens) | set(world.record.retain_tokens)
    )
