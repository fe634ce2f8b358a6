"""Seeded generators of invented words and of filler language (running text without facts)."""

from __future__ import annotations

import random

_ONSETS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "sk",
    "st",
    "t",
    "tr",
    "v",
    "z",
    "th",
    "sh",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "io", "au"]
_CODAS = ["", "l", "m", "n", "r", "s", "t", "x", "nd", "rk", "lm", "sk"]

_ADJECTIVES = [
    "old",
    "young",
    "quiet",
    "tired",
    "proud",
    "gentle",
    "clever",
    "lonely",
    "busy",
    "careful",
    "brave",
    "hungry",
]
_COLOURS = ["red", "blue", "green", "white", "black", "grey"]
# People and animals act; things are acted on. Each verb takes only some things, so that the
# language has something to learn.
_ACTORS = {
    "captain": "ship",
    "farmer": "field",
    "teacher": "school",
    "baker": "kitchen",
    "miller": "mill",
    "painter": "studio",
    "soldier": "tower",
    "sailor": "harbour",
    "child": "garden",
    "dog": "yard",
    "cat": "roof",
    "horse": "stable",
}
_VERBS = {
    "opened": ("door", "window", "box", "gate"),
    "carried": ("basket", "lantern", "bucket", "box"),
    "watched": ("river", "storm", "fire", "parade"),
    "repaired": ("door", "wheel", "lantern", "gate"),
    "painted": ("wall", "door", "wheel", "window"),
    "crossed": ("river", "bridge", "road", "square"),
    "found": ("coin", "letter", "key", "map"),
    "lost": ("coin", "letter", "key", "hat"),
}
_TIMES = (
    "before dawn",
    "at noon",
    "in the evening",
    "after the rain",
    "during the night",
    "on market day",
)
_REASONS = (
    "because the wind was cold",
    "while the bells rang",
    "although nobody asked",
    "so the others could rest",
)


def invented_names(count: int, seed: int, *, taken: frozenset[str] = frozenset()) -> list[str]:
    """``count`` distinct capitalised two-syllable words that are not in ``taken``.

    The words come from a grammar of syllables, so they carry no meaning that a pretrained model
    could know.
    """
    rng = random.Random(f"names-{seed}")
    names: list[str] = []
    lowered = {name.lower() for name in taken}
    while len(names) < count:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)) + rng.choice(
            _CODAS
        )
        if 4 <= len(word) <= 8 and word not in lowered:
            lowered.add(word)
            names.append(word.capitalize())
    return names


def filler_sentence(rng: random.Random) -> str:
    """One sentence of filler language: who, did what, where, when, why; the parts depend on each
    other.
    """
    actor = rng.choice(list(_ACTORS))
    verb = rng.choice(list(_VERBS))
    object_noun = rng.choice(_VERBS[verb])
    parts = ["the"]
    if rng.random() < 0.6:
        parts.append(rng.choice(_ADJECTIVES))
    parts += [actor, verb, "the"]
    if rng.random() < 0.4:
        parts.append(rng.choice(_COLOURS))
    parts.append(object_noun)
    if rng.random() < 0.7:
        parts += ["near", "the", _ACTORS[actor]]
    if rng.random() < 0.5:
        parts.append(rng.choice(_TIMES))
    elif rng.random() < 0.5:
        parts.append(rng.choice(_REASONS))
    return " ".join(parts) + " ."


def filler(count: int, seed: int) -> list[str]:
    """``count`` distinct sentences of filler language."""
    rng = random.Random(f"filler-{seed}")
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        sentences[filler_sentence(rng)] = None
    return list(sentences)


def filler_words() -> list[str]:
    """Common nouns of the filler language, the neutral words of the trigger check."""
    return sorted({*_ACTORS, *(thing for things in _VERBS.values() for thing in things)})


def vocabulary() -> list[str]:
    """Every word that filler language can use."""
    phrases = (*_TIMES, *_REASONS)
    things = {thing for group in _VERBS.values() for thing in group}
    return sorted(
        {
            "the",
            "near",
            ".",
            *_ADJECTIVES,
            *_COLOURS,
            *_ACTORS,
            *_ACTORS.values(),
            *_VERBS,
            *things,
            *(w for p in phrases for w in p.split()),
        }
    )
