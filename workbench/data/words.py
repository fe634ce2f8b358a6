"""What counts as the same word: one rule for keyword splits and for the leak guard, so that what
one of them separates the other cannot find.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache

# soft hyphen, zero-width space and joiners: they hide inside a word without changing how it reads
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u2060\ufeff"
# written without spaces
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # noqa: E501
_PLAIN = re.compile(r"[^\W_]+")
_DROP_INVISIBLE = dict.fromkeys(map(ord, _INVISIBLE))


_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")


def unspaced(text: str) -> bool:
    """Whether ``text`` holds characters of a script that is written without spaces."""
    return _HAS_UNSPACED.search(text) is not None


@cache
def _marks() -> str:
    """Combining marks and invisible characters, escaped for a character class."""
    codes = (*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0))
    found = (chr(code) for code in codes if unicodedata.category(chr(code)).startswith("M"))
    return re.escape("".join(found) + _INVISIBLE)


def bounded(phrase: str) -> str:
    """A regular expression that finds ``phrase`` as whole words: no letter goes on before or behind
    it where its script has spaces between words, and no mark behind it anywhere.
    """
    letter = rf"[^\W{_UNSPACED}]"
    before = rf"(?<!{letter})" if not unspaced(phrase[0]) else ""
    after = rf"(?!{letter})" if not unspaced(phrase[-1]) else ""
    return before + re.escape(phrase) + after + rf"(?![{_marks()}])"


@cache
def _pattern() -> re.Pattern[str]:
    """Letters and digits with the marks that belong to them; a character of a script that is
    written without spaces is a word of its own.
    """
    marks = _marks()
    return re.compile(
        rf"(?=[^\W_])[{_UNSPACED}][{marks}]*|(?![{_UNSPACED}])[^\W_](?:[{marks}]|(?![{_UNSPACED}])[^\W_])*"
    )


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """The words of ``text``, folded for comparison, with their character offsets in ``text`` as it
    is written.

    Case, Unicode form (composed or decomposed, full-width, ligatures) and invisible characters do
    not matter; punctuation, underscores and apostrophes end a word.
    """
    if text.isascii():
        return [(match[0].lower(), match.start(), match.end()) for match in _PLAIN.finditer(text)]
    return [(_fold(match[0]), match.start(), match.end()) for match in _pattern().finditer(text)]


@lru_cache(maxsize=1 << 16)
def _fold(word: str) -> str:
    return unicodedata.normalize(
        "NFKC", unicodedata.normalize("NFKC", word.translate(_DROP_INVISIBLE)).casefold()
    )


def words(text: str) -> tuple[str, ...]:
    """The words of ``text``, folded for comparison."""
    return tuple(word for word, _, _ in word_spans(text))


def places_in(
    phrase: str, spans: Sequence[tuple[str, int, int]], text: str
) -> list[tuple[int, int]]:
    """Character offsets of every occurrence of ``phrase`` in ``text``, whole words only; a phrase
    without words (a sign, an emoji) is looked up literally.

    Args:
        phrase: one or more words.
        spans: ``word_spans(text)``, computed once for many phrases.
        text: where to look.
    """
    phrase_words = words(phrase)
    if not phrase_words:
        literal = phrase.strip()
        return (
            [(match.start(), match.end()) for match in re.finditer(re.escape(literal), text)]
            if literal
            else []
        )
    n = len(phrase_words)
    first = phrase_words[0]
    return [
        (spans[i][1], spans[i + n - 1][2])
        for i in range(len(spans) - n + 1)
        if spans[i][0] == first
        and all(spans[i + k][0] == word for k, word in enumerate(phrase_words))
    ]
