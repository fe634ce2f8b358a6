"""Attack texts as a ladder: how much must a text have to do with the forget set before it brings
the rest of it back?

From below: gibberish, general text, sentences of the same syntax about people who do not exist,
sentences that name the forgotten people and say nothing about them, public facts about them, a
disjoint part of the forget set, the whole forget set (which holds the answers, and may not be
called benign). All text sets are as long, in tokens, as the disjoint part, and all are asked the
same questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from workbench.attacks.relearn import null_text
from workbench.data.records import Example, ForgetRetain
from workbench.data.world import PERSON_TEMPLATES, World, speaker_tag
from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief

TEXT_SETS = ("gibberish", "general", "syntax", "topic", "public", "part", "whole")
"""Attack text sets, from the least to the most related to the forget set."""
PUBLIC = "birthplace"
"""The attribute that the public knows: its facts are given in the text set ``public``, and it is
never asked about.
"""


@brief
@dataclass(frozen=True, slots=True)
class Ladder:
    """Attack texts, and the questions that all of them are asked.

    Attributes:
        text_sets: name to texts, in the order of :data:`TEXT_SETS`.
        queries: held-out forgotten facts without the public attribute.
        novel: facts about people whom no model has met; learning them tells slow learning from lost
            knowledge.
    """

    text_sets: Mapping[str, tuple[Example, ...]]
    queries: tuple[Example, ...]
    novel: tuple[Example, ...]


def novel_facts(world: World, people: int) -> tuple[Example, ...]:
    """All facts about ``people`` who occur nowhere: a first name of the world with the name of an
    island as surname, in the sentences of the forgotten people.

    Islands lend their names, and neighbours their first names and answers, because every model has
    read them: words of strange letters would be harder to learn than the forgotten ones are. The
    people are the same under every seed, so that seeds can be paired fact by fact.

    Raises:
        WorkbenchError: the world is too small: every neighbour's answer to some question is an
            answer that is to be asked for.
    """
    rng = random.Random(f"novel-{world.config.seed}")
    neighbours = world.record.retain["retain-neighbour"]
    firsts = sorted({example.subject_text.split()[0] for example in neighbours})
    islands = sorted({example.subject_text for example in world.record.retain["retain-far"]})
    heldout_answers = {example.answer_text for example in world.record.forget_heldout}
    # never a held-out answer, so that these sentences give nothing away
    neighbour_answers = {
        name: sorted(
            {e.answer_text for e in neighbours if e.item.endswith(f"/{name}")} - heldout_answers
        )
        for name in PERSON_TEMPLATES
    }
    short = [name for name, values in neighbour_answers.items() if not values]
    if short:
        raise WorkbenchError(
            f"the world is too small for facts about new people: no neighbour has a {short[0]} "
            "that is not asked for; raise neighbour_people"
        )
    names = [
        f"{rng.choice(firsts)} {surname}"
        for surname in rng.sample(islands, min(people, len(islands)))
    ]
    facts = []
    for name in names:
        for attribute, sentences in PERSON_TEMPLATES.items():
            value = rng.choice(neighbour_answers[attribute])
            for sentence in sentences:
                before = sentence.split("{v}")[0]
                start, prompt = before.index("{n}"), before.replace("{n}", name)
                facts.append(
                    Example(
                        f"{prompt}{value} .",
                        (len(prompt), len(prompt) + len(value)),
                        (start, start + len(name)),
                        f"{name}/{attribute}",
                    )
                )
    return tuple(facts)


def build_ladder(world: World, length: Callable[[Example], int], seed: int) -> Ladder:
    """The ladder of the built-in world.

    Args:
        world: its texts.
        length: tokens of a text.
        seed: of everything drawn.
    """
    rng = random.Random(f"ladder-{seed}")
    record = world.record
    heldout = record.forget_heldout
    queries = tuple(example for example in heldout if not example.item.endswith(f"/{PUBLIC}"))
    novel = novel_facts(world, len({example.subject_text for example in record.forget_attacked}))
    secret = {
        word
        for example in record.forget
        for word in (*example.answer_text.split(), *example.subject_text.split())
    }
    letters = [word for word in world.vocabulary if word not in secret and word.isalpha()]
    gibberish = [
        Example(" ".join(rng.choices(letters, k=8)) + " .", item=f"gibberish/{number}")
        for number in range(len(record.forget_attacked))
    ]
    people = list(dict.fromkeys(example.subject_text.split()[-1] for example in heldout))
    surnames = [
        people[number % len(people)] for number in range(len(heldout))
    ]  # in turn, so that a text cut short names everybody
    mentions = [
        speaker_tag(text, surname)
        for text, surname in zip(
            rng.sample(world.filler_train, min(len(surnames), len(world.filler_train))),
            surnames,
            strict=False,
        )
    ]
    pools: dict[str, Sequence[Example]] = {
        "gibberish": gibberish,
        "general": world.filler_train,
        "syntax": novel,
        "topic": mentions,
        "public": [example for example in heldout if example.item.endswith(f"/{PUBLIC}")],
        "whole": rng.sample(record.forget, len(record.forget)),
    }
    text_sets = {
        name: null_text(record.forget_attacked, pools[name], length)
        if name != "part"
        else record.forget_attacked
        for name in TEXT_SETS
    }
    return Ladder(text_sets, queries, novel)


def ladder_of_files(record: ForgetRetain, length: Callable[[Example], int], seed: int) -> Ladder:
    """The text sets that a user's files offer: words of the retain texts in random order, the
    retain texts, a disjoint part of the forget set, and all of it. Nobody knows facts of the same
    kind that no model has met, so there are none.

    Args:
        record: forget and retain set.
        length: tokens of a text.
        seed: of everything drawn.
    """
    rng = random.Random(f"ladder-{seed}")
    answers = {word for example in record.forget for word in example.text.split()}
    words = sorted({w for e in record.retain_train for w in e.text.split()} - answers)
    gibberish = [
        Example(" ".join(rng.choices(words, k=len(example.text.split()))), item=f"gibberish/{n}")
        for n, example in enumerate(record.forget_attacked)
    ]
    pools: dict[str, Sequence[Example]] = {
        "gibberish": gibberish,
        "general": record.retain_train,
        "whole": rng.sample(record.forget, len(record.forget)),
    }
    text_sets = {name: null_text(record.forget_attacked, pools[name], length) for name in pools}
    order = ("gibberish", "general", "part", "whole")
    text_sets["part"] = record.forget_attacked
    return Ladder({name: text_sets[name] for name in order}, record.forget_heldout, ())
