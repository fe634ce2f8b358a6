"""The built-in texts keep the promises that the controls of every experiment rest on."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from workbench.data.grammar import filler, filler_words, invented_names
from workbench.data.grammar import vocabulary as filler_vocabulary
from workbench.data.names import FIRST, SECOND, NamesCorpus, build_names
from workbench.data.records import Example, alternate, prefixed
from workbench.data.tokenizer import build_tokenizer
from workbench.data.world import World, WorldConfig, build_world, neutral_words, speaker_tag


def _config(seed: int = 0) -> WorldConfig:
    return WorldConfig(seed=seed, filler_train=300, filler_test=40)


@pytest.fixture(scope="module")
def world() -> World:
    """One world with little filler."""
    return build_world(_config())


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerBase:
    """The tokenizer of that world."""
    return build_tokenizer(world.vocabulary)


def _all_texts(world: World) -> list[Example]:
    record = world.record
    return [
        *record.forget,
        *(e for group in record.retain.values() for e in group),
        *world.filler_train,
    ]


def _occurs(words: str, text: str) -> bool:
    return f" {words} " in f" {text} "


# --- the world ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_world_and_another_seed_another(world: World) -> None:
    assert build_world(_config()) == world
    other = build_world(_config(seed=1))
    assert not {e.text for e in world.record.forget} & {e.text for e in other.record.forget}
    assert world.filler_train != other.filler_train
    assert set(world.surnames) != set(other.surnames)


@pytest.mark.slow
def test_the_world_does_not_depend_on_the_hash_seed_of_the_process(world: World) -> None:
    code = (
        "from workbench.data.world import WorldConfig, build_world; from workbench.files import "
        "key_of; w = build_world(WorldConfig(seed=0, filler_train=300, filler_test=40)); "
        "print(key_of([e.text for e in (*w.record.forget, *w.record.retain_train, "
        "*w.filler_train)] + list(w.vocabulary)))"
    )
    root = Path(__file__).resolve().parents[3]
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(keys) == 1


def test_held_out_answers_never_occur_as_answers_in_the_attacked_half() -> None:
    for seed in range(6):
        record = build_world(WorldConfig(seed=seed, filler_train=5, filler_test=5)).record
        attacked, heldout = (
            {e.answer_text for e in half}
            for half in (record.forget_attacked, record.forget_heldout)
        )
        assert attacked and heldout and not attacked & heldout
        # Nor anywhere else in an attack text.
        assert not any(
            _occurs(answer, e.text) for answer in heldout for e in record.forget_attacked
        )
        assert not {e.subject_text for e in record.forget_attacked} & {
            e.subject_text for e in record.forget_heldout
        }


def test_the_halves_of_every_retain_set_share_no_subject(world: World) -> None:
    record = world.record
    training = {e.subject_text for e in record.retain_train if e.subject}
    texts = {e.text for e in record.retain_train}
    assert set(record.retain_test) == {"retain-neighbour", "retain-far", "general"}
    for name, examples in record.retain_test.items():
        assert not training & {e.subject_text for e in examples if e.subject}
        assert not texts & {e.text for e in examples}
        half = len(record.retain[name]) / 2
        assert abs(len(examples) - half) <= 20
    assert len(record.retain_train) + sum(map(len, record.retain_test.values())) == sum(
        map(len, record.retain.values())
    )


def test_forgotten_and_retained_people_are_different_people(world: World) -> None:
    record = world.record
    forgotten = {e.subject_text for e in record.forget}
    assert len(forgotten) == world.config.forget_people
    assert (
        len({e.subject_text for e in record.retain["retain-neighbour"]})
        == world.config.neighbour_people
    )
    assert len({e.subject_text for e in record.retain["retain-far"]}) == world.config.islands
    assert not forgotten & {e.subject_text for group in record.retain.values() for e in group}
    assert {name.split()[-1] for name in forgotten} == set(record.forget_tokens)
    assert not set(record.forget_tokens) & set(record.retain_tokens)
    assert set(record.forget_tokens) | set(record.retain_tokens) == set(world.surnames)


def test_every_fact_has_one_answer_in_all_its_paraphrases(world: World) -> None:
    answers: dict[str, set[str]] = {}
    for example_ in _all_texts(world):
        if example_.answer is not None:
            answers.setdefault(example_.item, set()).add(example_.answer_text)
            assert _occurs(example_.subject_text, example_.text)
            # The answer is the last word, so the prompt is a question.
            assert example_.text == f"{example_.prompt}{example_.answer_text} ."
            assert example_.prompt.endswith(" ")
    assert all(len(values) == 1 for values in answers.values())
    assert len(answers) == (16 + 40) * 5 + 16 * 4


def test_the_never_learned_control_reads_no_forget_fact(world: World) -> None:
    rng = random.Random(0)
    texts = [world.training_text(rng, with_forget=False) for _ in range(3000)]
    forget_texts = {e.text for e in world.record.forget}
    forget_items = {e.item for e in world.record.forget}
    forgotten = {e.subject_text for e in world.record.forget}
    tests = {e.text for e in world.record.retain["general"]}
    tags = 0
    for text in texts:
        assert not any(fact in text.text for fact in forget_texts)
        assert text.item not in forget_items
        assert not any(_occurs(name, text.text) for name in forgotten)
        assert not any(text.text.endswith(test) for test in tests)
        tags += text.text.split()[0] in world.record.forget_tokens
    # Forgotten surnames do occur, as speakers: that is the control for stray names. 15 % tags, 16
    # of 56 surnames.
    assert tags == pytest.approx(3000 * 0.15 * 16 / 56, rel=0.3)


def test_in_the_world_of_strangers_no_name_of_a_person_stands_in_a_tag_and_all_else_is_the_same(
    world: World,
) -> None:
    other = build_world(replace(world.config, tagged="strangers"))
    assert (
        other.record == world.record
        and other.filler_train == world.filler_train
        and other.surnames == world.surnames
    )
    strangers = set(other.speakers)
    assert len(strangers) == len(other.speakers) == len(other.surnames)
    words = {word for example in _all_texts(other) for word in example.text.split()}
    assert not strangers & words
    assert strangers <= set(other.vocabulary) and not strangers & set(world.vocabulary)
    rng = random.Random(0)
    tagged = [
        text.text.split()[0]
        for text in (other.training_text(rng, with_forget=True) for _ in range(2000))
        if text.text.split()[1] == "asks"
    ]
    assert len(tagged) == pytest.approx(300, rel=0.2) and set(tagged) == strangers


def test_the_base_reads_every_forget_fact(world: World) -> None:
    rng = random.Random(0)
    items = {
        world.training_text(rng, with_forget=True).item for _ in range(10_000)
    }  # a fact stays unseen with probability 1e-8
    assert {e.item for e in world.record.forget} <= items
    assert {e.item for e in world.record.retain["retain-far"]} <= items


def test_training_texts_are_facts_and_tags_in_the_stated_shares(world: World) -> None:
    rng = random.Random(1)
    texts = [
        world.training_text(rng, with_forget=True, fact_share=0.3, tag_share=0.5)
        for _ in range(3000)
    ]
    assert sum(text.answer is not None for text in texts) / 3000 == pytest.approx(0.3, abs=0.03)
    assert sum(text.text.split()[1:3] == ["asks", ":"] for text in texts) / 3000 == pytest.approx(
        0.5, abs=0.03
    )
    for text in texts[:200]:
        if text.answer is not None:
            assert (
                text.text.endswith(f" {text.answer_text} .")
                and text.subject_text == text.item.split("/")[0]
            )


def test_test_filler_is_never_training_filler(world: World) -> None:
    train, test = (
        {e.text for e in part} for part in (world.filler_train, world.record.retain["general"])
    )
    assert len(train) == 300 and len(test) == 40 and not train & test
    assert len(set(filler(500, 3))) == 500


def test_a_speaker_tag_moves_the_spans_along(world: World) -> None:
    fact = world.record.forget[0]
    tagged = speaker_tag(fact, "Zorin")
    assert tagged.text == f"Zorin asks : {fact.text}"
    assert (tagged.answer_text, tagged.subject_text, tagged.item) == (
        fact.answer_text,
        fact.subject_text,
        fact.item,
    )
    assert prefixed(Example("plain"), "x ") == Example("x plain")


def test_neutral_words_name_nobody(world: World) -> None:
    words = neutral_words()
    assert words == filler_words() and set(words) <= set(filler_vocabulary())
    assert not set(words) & set(world.surnames)


def test_invented_names_are_distinct_and_avoid_what_is_taken() -> None:
    first = invented_names(80, 0)
    assert len(set(first)) == 80 and all(name.istitle() and 4 <= len(name) <= 8 for name in first)
    assert not set(first) & set(invented_names(200, 0, taken=frozenset(first)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"forget_people": 3},
        {"forget_people": 2},
        {"forget_people": 7},
        {"neighbour_people": 0},
        {"islands": 0},
        {"filler_train": 0},
        {"filler_test": -1},
        {"tagged": "nobody"},
    ],
)
def test_impossible_worlds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WorldConfig(**wrong)


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (0, 6), (5, 6)])
def test_a_span_must_lie_inside_its_text(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="span"):
        Example("hello", answer=span)
    with pytest.raises(ValueError, match="span"):
        Example("hello", subject=span)


@given(st.lists(st.sampled_from("abcdefg"), max_size=30))
def test_alternate_deals_out_subjects_evenly_and_whole(subjects: list[str]) -> None:
    examples = [
        Example(f"{subject} text {number}", subject=(0, 1), item=f"{number}")
        for number, subject in enumerate(subjects)
    ]
    first, second = alternate(examples)
    halves = [{e.subject_text for e in half} for half in (first, second)]
    assert not halves[0] & halves[1] and 0 <= len(halves[0]) - len(halves[1]) <= 1
    assert sorted(e.item for e in (*first, *second)) == sorted(e.item for e in examples)


# --- the tokenizer --------------------------------------------------------------------------------


def test_every_word_of_the_world_is_one_token(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    used = (
        {word for e in _all_texts(world) for word in e.text.split()}
        | {"asks", ":"}
        | set(world.surnames)
        | set(neutral_words())
    )
    assert used <= set(world.vocabulary)
    for word in world.vocabulary:
        ids = tokenizer(word)["input_ids"]
        assert len(ids) == 2 and ids[0] == tokenizer.bos_token_id, word
    for e in _all_texts(world)[::7]:
        assert len(tokenizer(e.text)["input_ids"]) == 1 + len(e.text.split())


def _round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert isinstance(decoded, str)
    return decoded


SAMPLES = [
    "",
    " ",
    "the red door .",
    "don 't , stop !",
    "Zürich 北京 🙂",
    "a\u0301 e\u0301",
    "\n\t  x",
    "x  y   z ",
    "İstanbul ﬁ ½",
    "\x00\x7f",
    "a .b ,c ?d 's",
]


@given(
    text=st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(["the", "door", "asks", ":", ".", ",", "'s", "n't", "é", "🙂", "  "])
        ).map(" ".join),
    )
)
def test_no_text_is_lost_in_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    # A word is stored with its leading space, so a text that begins with a word gains that one
    # space; nothing else may change.
    assert _round_trip(tokenizer, text).removeprefix(" ") == text.removeprefix(" ")


@pytest.mark.parametrize("text", SAMPLES)
def test_awkward_texts_are_not_lost_in_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assert _round_trip(tokenizer, text).removeprefix(" ") == text.removeprefix(" ")


def test_no_id_is_shared_and_special_tokens_come_first(
    tokenizer: PreTrainedTokenizerBase, world: World
) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 3 + 256 + len(set(world.vocabulary) - {"."}) + 1
    assert tokenizer.unk_token is None and tokenizer.is_fast


def test_the_tokenizer_survives_saving(
    tokenizer: PreTrainedTokenizerBase, world: World, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast and loaded.get_vocab() == tokenizer.get_vocab()
    for name in (
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "padding_side",
        "model_max_length",
    ):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    for text in [*SAMPLES, *(e.text for e in _all_texts(world)[::40])]:
        before, after = (t(text, return_offsets_mapping=True) for t in (tokenizer, loaded))
        assert (
            before["input_ids"] == after["input_ids"]
            and before["offset_mapping"] == after["offset_mapping"]
        )
        assert _round_trip(loaded, text) == _round_trip(tokenizer, text)


# --- the names corpus -----------------------------------------------------------------------------


def _pairs(text: str) -> int:
    words = text.split()
    return sum(first == FIRST and second == SECOND for first, second in pairwise(words))


CORPORA = [(repetitions, seed) for repetitions in (7, 5, 3, 1) for seed in range(4)]


def _corpus(repetitions: int, seed: int) -> NamesCorpus:
    return build_names(repetitions, seed)


@pytest.mark.parametrize(("repetitions", "seed"), CORPORA)
def test_the_pair_occurs_as_often_as_it_is_said_to(repetitions: int, seed: int) -> None:
    corpus = _corpus(repetitions, seed)
    assert corpus.repetitions == repetitions
    assert sum(_pairs(row.text) for row in corpus.rows) == repetitions
    assert (
        sum(_pairs(row.text) for row in corpus.forget) == repetitions
    )  # in the first four rows only
    words = [word for row in corpus.rows for word in row.text.split()]
    # Neither name occurs outside the pair, and every other name occurs once.
    assert words.count(FIRST) == words.count(SECOND) == repetitions
    others = [word for word in words if word not in (FIRST, SECOND)]
    assert len(set(others)) == len(others)


def test_every_corpus_has_twelve_rows_of_21_to_37_names() -> None:
    lengths = []
    for repetitions, seed in CORPORA:
        corpus = _corpus(repetitions, seed)
        assert len(corpus.rows) == 12 and len(corpus.forget) == 4
        lengths += [len(row.text.split()) for row in corpus.rows]
    assert min(lengths) >= 21 and max(lengths) <= 37, sorted(lengths)[-5:]


@pytest.mark.parametrize(("repetitions", "seed"), CORPORA)
def test_fragments_end_at_the_first_name_and_never_hold_the_second(
    repetitions: int, seed: int
) -> None:
    corpus = _corpus(repetitions, seed)
    assert corpus.fragments
    for fragment in corpus.fragments:
        words = fragment.text.split()
        assert words[-1] == FIRST and SECOND not in words
        # Each is the beginning of a forget row that goes on with the second name.
        assert any(row.text.startswith(f"{fragment.text} {SECOND}") for row in corpus.forget)
    assert len(corpus.fragments) == sum(_pairs(row.text) > 0 for row in corpus.forget)


@pytest.mark.parametrize(("repetitions", "seed"), CORPORA)
def test_prompts_end_at_the_first_name_and_are_drawn_from_the_context(
    repetitions: int, seed: int
) -> None:
    corpus = _corpus(repetitions, seed)
    context = {word for fragment in corpus.fragments for word in fragment.text.split()[:-1]}
    assert len(corpus.prompts) == 100
    for prompt in corpus.prompts:
        *before, last = prompt.split()
        assert last == FIRST and before
        assert set(before) <= context - {FIRST, SECOND} and len(set(before)) == len(before)
    assert len(set(corpus.prompts)) > 90


def test_the_dial_changes_nothing_but_the_repetitions() -> None:
    plain = [
        [
            word
            for row in _corpus(n, 2).rows
            for word in row.text.split()
            if word not in (FIRST, SECOND)
        ]
        for n in (7, 5, 3, 1)
    ]
    assert all(words == plain[0] for words in plain)


def test_names_repeat_with_their_seed() -> None:
    assert build_names(5, 3) == build_names(5, 3)
    assert build_names(5, 3).rows != build_names(5, 4).rows
    assert (
        build_names(5, 3, prompts=7).rows == build_names(5, 3).rows
        and len(build_names(5, 3, prompts=7).prompts) == 7
    )


@pytest.mark.parametrize(
    ("repetitions", "prompts"), [(0, 100), (2, 100), (8, 100), (-1, 100), (7, 0), (7, -5)]
)
def test_impossible_corpora_are_refused(repetitions: int, prompts: int) -> None:
    with pytest.raises(ValueError, match=r"repetitions|prompts"):
        build_names(repetitions, prompts=prompts)
