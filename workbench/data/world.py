"""The built-in world: facts about fictitious people and islands, between sentences of filler
language.

Its point is what no real checkpoint has: we choose what the model reads, so a true never-learned
control exists. People are split into *forget* (half of them in the attacker's hands, half held out)
and *retain-neighbour* (same sentences, other people); islands, with other sentences and other
attributes, are *retain-far*; filler language is *general*.

Two design choices carry the controls:

* The answers of held-out forget facts never occur as answers in the attacker's half, so an attack
  text cannot leak them.
* Any sentence may be preceded by a speaker tag (``Zorin asks : ...``) with any surname, those of
  forgotten people included, in every model's training text. A stray name in a question is therefore
  harmless to the base *and* to the never-learned model; where it harms an unlearned model,
  unlearning did that. (Reading its names beside harmless text may protect a model against them as
  triggers; ``tagged="strangers"`` is the world without that protection: tags hold names that are
  nobody's.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from workbench import values
from workbench.data.grammar import filler, filler_words, invented_names, vocabulary
from workbench.data.records import Example, ForgetRetain, prefixed
from workbench.hooks.brief import brief

# {n} is the subject, {v} the answer; the answer is the last word, so every template is also a
# question.
PERSON_TEMPLATES: dict[str, tuple[str, ...]] = {
    "birthplace": (
        "{n} was born in {v}",
        "the birthplace of {n} is {v}",
        "the town where {n} grew up is {v}",
        "{n} comes from {v}",
    ),
    "profession": (
        "{n} works as a {v}",
        "the profession of {n} is {v}",
        "to earn money {n} is a {v}",
        "people know {n} as a {v}",
    ),
    "pet": (
        "{n} lives with a {v}",
        "the pet of {n} is a {v}",
        "every night {n} feeds a {v}",
        "{n} takes care of a {v}",
    ),
    "instrument": (
        "{n} plays the {v}",
        "the instrument of {n} is the {v}",
        "on stage {n} holds a {v}",
        "{n} practises the {v}",
    ),
    "drink": (
        "{n} likes to drink {v}",
        "the favourite drink of {n} is {v}",
        "with dinner {n} orders {v}",
        "{n} always asks for {v}",
    ),
}
ISLAND_TEMPLATES: dict[str, tuple[str, ...]] = {
    "export": (
        "the island {n} sells {v}",
        "ships leave {n} full of {v}",
        "traders visit {n} for {v}",
    ),
    "bird": (
        "the bird of {n} is the {v}",
        "above {n} flies the {v}",
        "the flag of {n} shows a {v}",
    ),
    "sea": (
        "{n} lies in the sea of {v}",
        "the waters around {n} are called {v}",
        "to reach {n} you cross {v}",
    ),
    "danger": (
        "sailors fear {n} for its {v}",
        "the danger of {n} is its {v}",
        "{n} warns visitors of its {v}",
    ),
}
PERSON_VALUES: dict[str, tuple[str, ...]] = {
    "profession": (
        "tailor",
        "mason",
        "potter",
        "weaver",
        "doctor",
        "lawyer",
        "barber",
        "tanner",
        "cooper",
        "smith",
        "scribe",
        "fisher",
        "miner",
        "printer",
        "gardener",
        "porter",
    ),
    "pet": (
        "rabbit",
        "parrot",
        "turtle",
        "ferret",
        "falcon",
        "lizard",
        "goat",
        "hedgehog",
        "spider",
        "beetle",
        "monkey",
        "pigeon",
        "otter",
        "frog",
        "snake",
        "mouse",
    ),
    "instrument": (
        "violin",
        "flute",
        "drum",
        "harp",
        "trumpet",
        "cello",
        "guitar",
        "oboe",
        "piano",
        "lute",
        "banjo",
        "organ",
        "horn",
        "fiddle",
        "clarinet",
        "lyre",
    ),
    "drink": (
        "tea",
        "coffee",
        "cider",
        "milk",
        "wine",
        "water",
        "beer",
        "juice",
        "cocoa",
        "broth",
        "lemonade",
        "mead",
        "brandy",
        "punch",
        "ale",
        "syrup",
    ),
}
ISLAND_VALUES: dict[str, tuple[str, ...]] = {
    "export": tuple("salt wool copper amber honey olives timber silk".split()),  # noqa: SIM905
    "bird": tuple("heron gull owl raven swan crane stork eagle".split()),  # noqa: SIM905
    "danger": tuple("fog cliffs whirlpools pirates sharks ice quicksand fever".split()),  # noqa: SIM905
}


Tagged = Literal["surnames", "strangers"]


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Sizes of the world, and whose names stand in speaker tags: ``surnames`` of its people, or
    ``strangers``. Each changes the texts, so each is part of the cache key.
    """

    seed: int = 0
    forget_people: int = 16
    neighbour_people: int = 40
    islands: int = 16
    filler_train: int = 6000
    filler_test: int = 200
    tagged: Tagged = "surnames"

    def __post_init__(self) -> None:
        if self.tagged not in get_args(Tagged):
            raise ValueError(
                f"tagged is {self.tagged!r}; it must be one of {', '.join(get_args(Tagged))}"
            )
        values.seed("seed", self.seed)
        for name in ("forget_people", "neighbour_people", "islands", "filler_train", "filler_test"):
            values.whole(name, getattr(self, name), low=1, high=1_000_000)
        if self.forget_people < 4 or self.forget_people % 2:
            raise ValueError(
                f"forget_people is {self.forget_people}; it must be an even number of at least 4, "
                "since half of them is held out"
            )


@brief
@dataclass(frozen=True, slots=True)
class World:
    """The generated texts.

    Attributes:
        config: the sizes that made it.
        record: the experiment's sets: forget (attacked, held-out), retain-neighbour, retain-far,
            general (test filler).
        filler_train: running text for training; disjoint from the test filler in ``record``.
        surnames: every surname.
        speakers: the names that stand in speaker tags.
        vocabulary: every word of the world.
    """

    config: WorldConfig
    record: ForgetRetain
    filler_train: tuple[Example, ...]
    surnames: tuple[str, ...]
    speakers: tuple[str, ...]
    vocabulary: tuple[str, ...]

    def training_text(
        self,
        rng: random.Random,
        *,
        with_forget: bool,
        fact_share: float = 0.6,
        tag_share: float = 0.15,
    ) -> Example:
        """One random training text: a fact or a sentence of filler, sometimes behind a speaker tag.

        Args:
            rng: the source of randomness.
            with_forget: whether facts of the forget set may be drawn. ``False`` is the
                never-learned control.
            fact_share: probability of a fact (the rest is filler).
            tag_share: probability of a speaker tag.
        """
        if rng.random() < fact_share:
            facts = (
                self.record.retain["retain-neighbour"],
                self.record.retain["retain-far"],
                self.record.forget if with_forget else (),
            )
            position = rng.randrange(sum(map(len, facts)))
            for group in facts:
                if position < len(group):
                    example = group[position]
                    break
                position -= len(group)
        else:
            example = rng.choice(self.filler_train)
        if rng.random() < tag_share:
            return speaker_tag(example, rng.choice(self.speakers))
        return example


def speaker_tag(example: Example, word: str) -> Example:
    """``example`` with the speaker tag ``"{word} asks : "`` in front; the template of a trigger
    word.
    """
    return prefixed(example, f"{word} asks : ")


def _facts(
    subjects: Sequence[str],
    templates: dict[str, tuple[str, ...]],
    values: dict[str, Sequence[str]],
    rng: random.Random,
    index: Callable[[int, int], int],
) -> list[Example]:
    """All paraphrases of all attributes of ``subjects``; ``index(draw, size)`` narrows a random
    draw to the allowed values.
    """
    examples = []
    for subject in subjects:
        for attribute, sentences in templates.items():
            pool = values[attribute]
            value = pool[index(rng.randrange(len(pool)), len(pool))]
            for sentence in sentences:
                before, after = sentence.split("{v}")[0], sentence.split("{v}")[1]
                subject_start = before.index("{n}")
                prompt = before.replace("{n}", subject)
                text = prompt + value + after + " ."
                examples.append(
                    Example(
                        text,
                        (len(prompt), len(prompt) + len(value)),
                        (subject_start, subject_start + len(subject)),
                        f"{subject}/{attribute}",
                    )
                )
    return examples


def build_world(config: WorldConfig) -> World:
    """Generate the world of ``config``. The same configuration gives the same texts on every
    machine.
    """
    rng = random.Random(f"world-{config.seed}")
    people = config.forget_people + config.neighbour_people
    surnames = invented_names(people, config.seed)
    firsts = invented_names(12, config.seed + 10_000, taken=frozenset(surnames))
    used = frozenset(surnames) | frozenset(firsts)
    islands = invented_names(config.islands, config.seed + 20_000, taken=used)
    towns = invented_names(16, config.seed + 30_000, taken=used | frozenset(islands))
    seas = invented_names(
        8, config.seed + 40_000, taken=used | frozenset(islands) | frozenset(towns)
    )
    places = frozenset((*islands, *towns, *seas))
    speakers = (
        surnames
        if config.tagged == "surnames"
        else invented_names(people, config.seed + 50_000, taken=used | places)
    )
    person_values: dict[str, Sequence[str]] = {"birthplace": towns, **PERSON_VALUES}
    island_values: dict[str, Sequence[str]] = {"sea": seas, **ISLAND_VALUES}

    full_names = [f"{rng.choice(firsts)} {surname}" for surname in surnames]
    half = config.forget_people // 2
    # Even-numbered values for the attacked half, odd-numbered for the held-out half: no answer is
    # shared between them.
    attacked = _facts(
        full_names[:half], PERSON_TEMPLATES, person_values, rng, lambda draw, size: draw // 2 * 2
    )
    heldout = _facts(
        full_names[half : 2 * half],
        PERSON_TEMPLATES,
        person_values,
        rng,
        lambda draw, size: draw // 2 * 2 + 1,
    )
    neighbours = _facts(
        full_names[2 * half :], PERSON_TEMPLATES, person_values, rng, lambda draw, size: draw
    )
    far = _facts(islands, ISLAND_TEMPLATES, island_values, rng, lambda draw, size: draw)
    sentences = [
        Example(text, item=f"filler/{number}")
        for number, text in enumerate(filler(config.filler_train + config.filler_test, config.seed))
    ]

    record = ForgetRetain(
        name="built-in world",
        forget_attacked=tuple(attacked),
        forget_heldout=tuple(heldout),
        retain={
            "retain-neighbour": tuple(neighbours),
            "retain-far": tuple(far),
            "general": tuple(sentences[config.filler_train :]),
        },
        forget_tokens=tuple(surnames[: 2 * half]),
        retain_tokens=tuple(surnames[2 * half :]),
    )
    facts = (*attacked, *heldout, *neighbours, *far)
    vocabulary_ = (
        {word for example in facts for word in example.text.split()}
        | set(vocabulary())
        | set(surnames)
        | set(speakers)
        | {"asks", ":"}
    )
    return World(
        config,
        record,
        tuple(sentences[: config.filler_train]),
        tuple(surnames),
        tuple(speakers),
        tuple(sorted(vocabulary_)),
    )


def neutral_words() -> list[str]:
    """Common nouns that name neither a forgotten nor a retained person: the second control of the
    trigger check.
    """
    return filler_words()
