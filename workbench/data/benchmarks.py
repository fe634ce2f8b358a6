r"""Public unlearning benchmarks in the workbench's own values: TOFU, MUSE, RWKU and WMDP, from the
files that those projects ship.

A *source* is a folder as the project lays it out (json, jsonl, parquet, csv or txt; a clone of a
hub data set with its parquet shards as well), or the id of a data set on the Hugging Face hub, for
which the package ``datasets`` must be installed. Questions read ``Question: ...\nAnswer: ...``, as
everywhere here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from workbench.data.keywords import KeywordSplit
from workbench.data.readers import continuation, telling_words, windows
from workbench.data.records import Example, ForgetRetain, group_of
from workbench.data.sources import KINDS, Row, Source, files_of, missing_set, parse, rows_of
from workbench.data.words import places_in, word_spans
from workbench.errors import WorkbenchError, unknown
from workbench.hooks.brief import brief

# --- Values ---


def _ask(question: str, answer: str, item: str, subject: str | None = None) -> Example:
    prompt = f"Question: {question}\nAnswer: "
    text = prompt + answer
    found = places_in(subject, word_spans(text), text) if subject else []
    return Example(text, (len(prompt), len(text)), found[0] if found else None, item)


@brief
@dataclass(frozen=True, slots=True)
class Perturbed:
    """A question with answers that differ from the right one, for truth ratios.

    Attributes:
        example: the question and its answer.
        paraphrase: the question, its answer in other words.
        rephrased: the question in other words, its answer.
        wrong: the question with wrong answers.
    """

    example: Example
    paraphrase: Example | None = None
    rephrased: Example | None = None
    wrong: tuple[Example, ...] = ()


@brief
@dataclass(frozen=True, slots=True)
class Choice:
    """A multiple-choice question: the question with every answer on offer.

    Attributes:
        options: the question with each answer, in the file's order.
        right: which of them is right.
        lettered: the question, the lettered list of answers, and the right letter as answer.
    """

    options: tuple[Example, ...]
    right: int
    lettered: Example

    @property
    def example(self) -> Example:
        """The question with its right answer."""
        return self.options[self.right]


@brief
@dataclass(frozen=True, slots=True)
class Tofu:
    """TOFU (Maini et al. 2024): questions about invented authors, twenty each.

    Items are called ``author/{number}/{question}``; the number counts the 200 authors of the full
    set, so one author has one name in every split.

    Attributes:
        split: name of the forget split.
        forget: questions about the authors to be forgotten.
        retain: questions about the other authors.
        perturbed: forget questions with paraphrased and wrong answers; empty where the files lack
            them, as are all sets below.
        retain_perturbed: the same of some retain questions.
        real_authors: questions about real authors, with wrong answers.
        world_facts: questions about the world, with wrong answers.
        refusals: ways to say that one does not know.
    """

    split: str
    forget: tuple[Example, ...]
    retain: tuple[Example, ...]
    perturbed: tuple[Perturbed, ...] = ()
    retain_perturbed: tuple[Perturbed, ...] = ()
    real_authors: tuple[Perturbed, ...] = ()
    world_facts: tuple[Perturbed, ...] = ()
    refusals: tuple[str, ...] = ()


@brief
@dataclass(frozen=True, slots=True)
class Muse:
    """MUSE (Shi et al. 2024): running text to be forgotten, with questions about it and verbatim
    continuations.

    Attributes:
        forget: texts to be forgotten.
        retain: texts to be kept, for training (``retain1``).
        retain_test: texts to be kept that no method trains on (``retain2``); empty where the files
            lack them, as are all sets below.
        holdout: texts of the same kind that the model never read.
        verbatim: a passage of the forget texts as prompt, its continuation as answer.
        forget_questions: questions about the forget texts.
        retain_questions: questions about the retain texts.
    """

    forget: tuple[Example, ...]
    retain: tuple[Example, ...]
    retain_test: tuple[Example, ...] = ()
    holdout: tuple[Example, ...] = ()
    verbatim: tuple[Example, ...] = ()
    forget_questions: tuple[Example, ...] = ()
    retain_questions: tuple[Example, ...] = ()


@brief
@dataclass(frozen=True, slots=True)
class Rwku:
    """RWKU (Jin et al. 2024): what a model knows about famous people, asked in three ways.

    Items are called ``subject/{name}/{set}/{number}``, with the kind of attack before the number
    for the adversarial probes of level 3.

    Attributes:
        subjects: the people to be forgotten.
        level1: sentences with a blank.
        level2: questions.
        level3: adversarial questions.
        neighbours: blanks and questions about related people and things, to be kept.
    """

    subjects: tuple[str, ...]
    level1: tuple[Example, ...] = ()
    level2: tuple[Example, ...] = ()
    level3: tuple[Example, ...] = ()
    neighbours: tuple[Example, ...] = ()

    @property
    def forget(self) -> tuple[Example, ...]:
        """All probes of the people to be forgotten."""
        return self.level1 + self.level2 + self.level3


@brief
@dataclass(frozen=True, slots=True)
class Wmdp:
    """WMDP (Li et al. 2024): multiple-choice questions on hazardous knowledge, and the corpora to
    unlearn it with.

    Attributes:
        domain: ``bio``, ``chem`` or ``cyber``.
        questions: the questions.
        forget: texts of the forget corpus; empty where the files lack it (chemistry has none), as
            is the next.
        retain: texts of the retain corpus.
    """

    domain: str
    questions: tuple[Choice, ...]
    forget: tuple[Example, ...] = ()
    retain: tuple[Example, ...] = ()


# --- TOFU ---

_PER_AUTHOR, _AUTHORS = 20, 200
_NAME = re.compile(
    r"[^\W\d_a-z][\w’'-]*(?: (?:(?:de|la|bin|ibn|al|van|von|der|del|da|dos|el|du|di|y) )*[^\W\d_a-z][\w’'-]*)+"  # noqa: E501
)


def _author_name(texts: Sequence[str]) -> str | None:
    """The name of the person whom ``texts`` are about: the longest run of two to six capitalised
    words among those that stand in nearly as many texts as any (80 %).

    ``None`` where no such run stands in half of the texts.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        names = set()
        for match in _NAME.finditer(text):
            parts = [re.sub(r"['’]s?$", "", part) for part in match[0].split(" ")]
            names |= {
                " ".join(parts[i:j])
                for i in range(len(parts))
                for j in range(i + 2, min(len(parts), i + 6) + 1)
                if not parts[i].islower() and not parts[j - 1].islower()
            }
        counts.update(names)
    most = max(counts.values(), default=0)
    if 2 * most < len(texts):
        return None
    return max(
        (name for name in counts if counts[name] >= 0.8 * most),
        key=lambda name: (len(name.split()), counts[name], name),
    )


def _authors(rows: Sequence[Row], first: int) -> dict[tuple[str, str], Example]:
    """Questions and answers by their texts, in file order; every twenty are one author's."""
    if len(rows) % _PER_AUTHOR:
        raise WorkbenchError(
            f"{rows[0].file} holds {len(rows)} questions; TOFU has {_PER_AUTHOR} of every author, "
            "one author after another, and that is no multiple"
        )
    pairs = [(row.text("question"), row.text("answer")) for row in rows]
    examples: dict[tuple[str, str], Example] = {}
    for start in range(0, len(pairs), _PER_AUTHOR):
        author_pairs = pairs[start : start + _PER_AUTHOR]
        name = _author_name([f"{question}\n{answer}" for question, answer in author_pairs])
        for number, pair in enumerate(author_pairs):
            if pair in examples:
                row = rows[start + number]
                raise WorkbenchError(
                    f"{row.file} {row.where} repeats an earlier question: {pair[0][:60]!r}"
                )
            examples[pair] = _ask(*pair, f"author/{first + start // _PER_AUTHOR}/{number}", name)
    return examples


def _perturbed(
    rows: Sequence[Row] | None, known: Mapping[tuple[str, str], Example] | None, item: str
) -> tuple[Perturbed, ...]:
    """Questions with wrong answers; those of a known set take their names from it."""
    questions = []
    for number, row in enumerate(rows or ()):
        question, answer = row.text("question"), row.text("answer")
        example = _ask(question, answer, f"{item}/{number}")
        if known is not None:
            if (question, answer) not in known:
                raise WorkbenchError(
                    f"{row.file} {row.where} asks what the split does not hold: {question[:60]!r}; "
                    "both files must be of one split"
                )
            example = known[question, answer]
        if "perturbed_answer" in row.fields:
            wrong = row.texts("perturbed_answer")
        else:
            wrong = tuple(
                option
                for option in (row.text(f"option{n}") for n in (1, 2, 3, 4))
                if option != answer
            )
        questions.append(
            Perturbed(
                example,
                _ask(question, row.text("paraphrased_answer"), example.item)
                if "paraphrased_answer" in row.fields
                else None,
                _ask(row.text("paraphrased_question"), answer, example.item)
                if "paraphrased_question" in row.fields
                else None,
                tuple(_ask(question, other, example.item) for other in wrong),
            )
        )
    return tuple(questions)


def read_tofu(source: str | Path, split: str = "forget05", *, retain: str | None = None) -> Tofu:
    """TOFU from its folder (``full.json``, ``forget05.json``, ...) or from the hub
    (``locuslab/TOFU``).

    Args:
        source: the folder, or a hub id; a file names its split as well.
        split: the forget split.
        retain: the retain split; default is the rest, e.g. ``retain95`` for ``forget05``.

    Raises:
        WorkbenchError: a file is missing, a line lacks a field or has another type there, the
            authors do not have twenty questions each, or the splits overlap.
    """
    if Path(source).is_file():
        source, split = Path(source).parent, Path(source).stem
    files = Source(source, "TOFU")
    size = re.fullmatch(r"forget(\d\d)", split)
    if retain is None:
        if size is None:
            raise WorkbenchError(
                f"{split!r} does not say which retain split is its rest; give a split such as "
                "forget05, or retain=..."
            )
        retain = f"retain{100 - int(size[1]):02d}"
    forget_rows = files.rows(split, f"{split}/train", hub=(split, "train"))
    retain_rows = files.rows(retain, f"{retain}/train", hub=(retain, "train"))
    retain_examples = _authors(retain_rows, 0)
    # The forget splits are the last authors of the full set, the retain splits the first.
    forgotten = _authors(
        forget_rows,
        max(_AUTHORS - len(forget_rows) // _PER_AUTHOR, len(retain_rows) // _PER_AUTHOR),
    )
    _no_overlap(
        [question for question, _ in forgotten.keys() & retain_examples.keys()], split, retain
    )

    def extra(name: str) -> list[Row] | None:
        return files.maybe(name, f"{name}/train", hub=(name, "train"))

    said = (
        files.maybe("idontknow", hub=("idontknow", "train")) if files.folder is not None else None
    )
    return Tofu(
        split=split,
        forget=tuple(forgotten.values()),
        retain=tuple(retain_examples.values()),
        perturbed=_perturbed(extra(f"{split}_perturbed"), forgotten, "author"),
        retain_perturbed=_perturbed(extra("retain_perturbed"), retain_examples, "author"),
        real_authors=_perturbed(
            extra("real_authors_perturbed") or extra("real_authors"), None, "real-author"
        ),
        world_facts=_perturbed(
            extra("world_facts_perturbed") or extra("world_facts"), None, "world-fact"
        ),
        refusals=tuple(
            line.strip()
            for row in said or ()
            for line in row.text("text").splitlines()
            if line.strip()
        ),
    )


def _no_overlap(shared: Iterable[str], one: str, other: str) -> None:
    shared = sorted(shared)
    if shared:
        raise WorkbenchError(
            f"{len(shared)} text(s) stand in both {one} and {other}, e.g. {shared[0][:60]!r}; a "
            "text is either to be forgotten or to be kept"
        )


# --- MUSE ---


def _documents(rows: Sequence[Row] | None, item: str) -> tuple[Example, ...]:
    return tuple(
        Example(row.text("text"), item=f"{item}/{number}") for number, row in enumerate(rows or ())
    )


def read_muse(source: str | Path) -> Muse:
    """MUSE from the folder of one corpus (``raw/forget.json`` or ``.txt``,
    ``knowmem/forget_qa.json``, ``verbmem/forget.json``) or from the hub (``muse-bench/MUSE-News``).

    Texts stay as they are, line ends included; :func:`to_record` cuts them into pieces.

    Raises:
        WorkbenchError: a file is missing, an entry lacks a field or has another type there, or a
            text stands in both the forget and a retain set.
    """
    files = Source(source, "MUSE")
    forget, retain = (
        files.rows(f"raw/{split}", hub=("raw", split)) for split in ("forget", "retain1")
    )

    def questions(split: str, *other: str) -> tuple[Example, ...]:
        rows = (
            files.maybe(*(f"knowmem/{name}" for name in (split, *other)), hub=("knowmem", split))
            or ()
        )
        return tuple(
            _ask(row.text("question"), row.text("answer"), f"{split}/{number}")
            for number, row in enumerate(rows)
        )

    verbatim = []
    for number, row in enumerate(files.maybe("verbmem/forget", hub=("verbmem", "forget")) or ()):
        prompt, following = row.text("prompt") + " ", row.text("gt")  # both were cut at a space
        verbatim.append(
            Example(
                prompt + following,
                (len(prompt), len(prompt) + len(following)),
                item=f"verbatim/{number}",
            )
        )
    muse = Muse(
        forget=_documents(forget, "forget"),
        retain=_documents(retain, "retain"),
        retain_test=_documents(files.maybe("raw/retain2", hub=("raw", "retain2")), "retain-test"),
        holdout=_documents(files.maybe("raw/holdout", hub=("raw", "holdout")), "holdout"),
        verbatim=tuple(verbatim),
        forget_questions=questions("forget_qa"),
        retain_questions=questions("retain_qa", "retain2_qa"),
    )
    texts = {example.text for example in muse.forget}
    for name, set_texts in (("raw/retain1", muse.retain), ("raw/retain2", muse.retain_test)):
        _no_overlap(texts & {example.text for example in set_texts}, "raw/forget", name)
    return muse


# --- RWKU ---

_SETS = (("forget", 1), ("forget", 2), ("forget", 3), ("neighbor", 1), ("neighbor", 2))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order of the folders ``1_...``, ``2_...``, ``10_...``."""
    return [
        (int(part), "") if part.isdigit() else (-1, part)
        for part in re.split(r"(\d+)", str(path))
        if part
    ]


def _probes(
    rows: Sequence[Row], kind: str, level: int, counts: Counter[str]
) -> list[tuple[str, Example]]:
    probes = []
    for row in rows:
        subject = row.text("subject")
        if "level" in row.fields and row.number("level") != level:
            raise WorkbenchError(
                f"{row.file} {row.where}: 'level' is {row.fields['level']} in a file of level "
                f"{level}"
            )
        place = [subject, f"{kind}{level}"] + (
            [row.text("type")] if level == 3 and "type" in row.fields else []
        )
        name = "/".join(["subject", *(part.replace("/", "-") for part in place)])
        probes.append(
            (
                subject,
                _ask(
                    row.text("query", "question"),
                    row.text("answer"),
                    f"{name}/{counts[name]}",
                    subject,
                ),
            )
        )
        counts[name] += 1
    return probes


def read_rwku(
    source: str | Path, subjects: Sequence[str] = (), levels: Sequence[int] = (1, 2, 3)
) -> Rwku:
    """RWKU from one folder with ``forget_level1.json`` and so on, from a folder of such folders
    (``Target/1_Stephen_King``, ...), or from the hub (``jinzhuoran/RWKU``).

    Args:
        source: the folder, or a hub id; a file such as ``forget_level2.json`` names its level as
            well.
        subjects: the people to be forgotten; default is everyone there.
        levels: which levels of probes to read; the first one given must be there.

    Raises:
        WorkbenchError: a file is missing, an entry lacks a field or has another type there, a
            subject is unknown, nothing is left, or a question is to be forgotten and kept.
    """
    if (one_level := re.fullmatch(r"forget_level([123])", Path(source).stem)) and Path(
        source
    ).is_file():
        source, levels = Path(source).parent, (int(one_level[1]),)
    files = Source(source, "RWKU")
    if not levels or set(levels) - {1, 2, 3}:
        raise WorkbenchError(
            f"RWKU has the levels 1, 2 and 3, not {', '.join(map(str, levels)) or 'none'}"
        )
    counts: Counter[str] = Counter()
    stems = [f"{kind}_level{level}" for kind, level in _SETS]
    folders = [files]
    if files.folder is not None and not any(
        files_of(files.folder, stem) or files_of(files.folder, f"{stem}/test") for stem in stems
    ):
        inside = sorted(
            {
                path.parent
                for stem in stems
                for path in files.folder.rglob(f"{stem}.*")
                if path.suffix in KINDS
            },
            key=_natural,
        )
        if not inside:
            raise missing_set(files.folder, stems[0], "RWKU")
        folders = [Source(folder, "RWKU") for folder in inside]
    probes_of: dict[tuple[str, int], list[tuple[str, Example]]] = {place: [] for place in _SETS}
    for source_folder in folders:
        for kind, level in _SETS:
            if kind == "forget" and level not in levels:
                continue
            stem = f"{kind}_level{level}"
            read_rows = (
                source_folder.rows
                if kind == "forget" and level == levels[0]
                else source_folder.maybe
            )
            probes_of[kind, level] += _probes(
                read_rows(stem, f"{stem}/test", hub=(stem, "test")) or (), kind, level, counts
            )
    forget_subjects = tuple(
        dict.fromkeys(
            subject
            for (kind, _), probes in probes_of.items()
            if kind == "forget"
            for subject, _ in probes
        )
    )
    for subject in subjects:
        if subject not in forget_subjects:
            raise unknown("RWKU subject", subject, forget_subjects)

    def of(kind: str, *numbers: int) -> tuple[Example, ...]:
        return tuple(
            example
            for number in numbers
            for subject, example in probes_of[kind, number]
            if not subjects or subject in subjects
        )

    rwku = Rwku(
        tuple(subjects) or forget_subjects,
        of("forget", 1),
        of("forget", 2),
        of("forget", 3),
        of("neighbor", 1, 2),
    )
    if not rwku.forget:
        raise WorkbenchError(
            f"no RWKU probe of level {', '.join(map(str, levels))} is about "
            f"{', '.join(rwku.subjects)}; choose other levels or subjects"
        )
    _no_overlap(
        {example.text for example in rwku.forget} & {example.text for example in rwku.neighbours},
        "the forget probes",
        "the neighbour probes",
    )
    return rwku


# --- WMDP ---


def _choice(row: Row, item: str) -> Choice:
    question, choices = row.text("question"), row.texts("choices")
    if len(choices) != 4:
        raise WorkbenchError(
            f"{row.file} {row.where}: 'choices' holds {len(choices)} answers; WMDP offers 4"
        )
    right = row.number("answer", below=4)
    listed = "".join(
        f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)
    )
    return Choice(
        tuple(_ask(question, choice, item) for choice in choices),
        right,
        _ask(question + listed, "ABCD"[right], item),
    )


def read_wmdp(
    source: str | Path,
    domain: Literal["bio", "chem", "cyber"] = "bio",
    *,
    corpora: str | Path | None = None,
) -> Wmdp:
    """WMDP from a folder (``bio_questions.json``, or a clone of ``cais/wmdp``) or from the hub
    (``cais/wmdp``).

    Args:
        source: the folder of the questions, their file, or a hub id.
        domain: which questions.
        corpora: folder of the corpora (``bio-forget-corpus.jsonl``, ``bio-retain-corpus.jsonl``),
            or a hub id (``cais/wmdp-corpora``); default is the folder of the questions, where they
            may be absent.

    Raises:
        WorkbenchError: a file is missing, an entry lacks a field or has another type there, a
            question has not four answers, or a text stands in both corpora.
    """
    if domain not in ("bio", "chem", "cyber"):
        raise unknown("WMDP domain", domain, ("bio", "chem", "cyber"))
    path = Path(source)
    files = Source(path.parent if path.is_file() else source, "WMDP")
    stems = (
        f"{domain}_questions",
        f"wmdp-mcqs/{domain}_questions",
        f"wmdp-{domain}",
        f"wmdp-{domain}/test",
    )
    questions = (
        rows_of(str(path), parse(path))
        if path.is_file()
        else files.rows(*stems, hub=(f"wmdp-{domain}", "test"))
    )
    texts = files if corpora is None else Source(corpora, "WMDP corpora")

    def corpus(kind: str, *spellings: str) -> tuple[Example, ...]:
        name = f"{domain}-{kind}-corpus"
        rows = (texts.maybe if corpora is None or kind == "retain" else texts.rows)(
            name, f"{name}/train", *spellings, hub=(name, "train")
        )
        return _documents(rows, kind)

    wmdp = Wmdp(
        domain,
        tuple(_choice(row, f"question/{number}") for number, row in enumerate(questions)),
        corpus("forget", f"{domain}_remove_dataset", f"{domain}_forget_dataset"),
        corpus("retain", f"{domain}_retain_dataset"),
    )
    _no_overlap(
        {example.text for example in wmdp.forget} & {example.text for example in wmdp.retain},
        f"{domain}-forget-corpus",
        f"{domain}-retain-corpus",
    )
    return wmdp


# --- Records ---


def _deal(
    examples: Sequence[Example], by: Literal["group", "item"]
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Two halves; authors, subjects and documents, or else single items, are dealt out in turn."""
    order: dict[str, int] = {}
    halves: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        key = group_of(example) if by == "group" else example.item
        halves[order.setdefault(key, len(order)) % 2].append(example)
    return tuple(halves[0]), tuple(halves[1])


def _sets(
    benchmark: Tofu | Muse | Rwku | Wmdp,
) -> tuple[str, tuple[Example, ...], dict[str, tuple[Example, ...]]]:
    """Name, forget set and retain sets. Sets that a benchmark keeps for tests stay out: half of
    every retain set of a record may be trained on.
    """
    match benchmark:
        case Tofu():
            retain_sets = {"retain-neighbour": benchmark.retain}
            for name, questions in (
                ("retain-far", benchmark.real_authors),
                ("world-facts", benchmark.world_facts),
            ):
                retain_sets[name] = tuple(question.example for question in questions)
            return f"TOFU {benchmark.split}", benchmark.forget, retain_sets
        case Muse():
            return "MUSE", benchmark.forget, {"retain": benchmark.retain}
        case Rwku():
            people = benchmark.subjects
            return (
                f"RWKU {people[0] if len(people) == 1 else f'{len(people)} subjects'}",
                benchmark.forget,
                {"retain-neighbour": benchmark.neighbours},
            )
        case Wmdp():
            texts = benchmark.forget or tuple(question.example for question in benchmark.questions)
            return f"WMDP {benchmark.domain}", texts, {"retain": benchmark.retain}


def to_record(
    benchmark: Tofu | Muse | Rwku | Wmdp,
    *,
    keyword: KeywordSplit | None = None,
    by: Literal["group", "item"] = "group",
    retain: Mapping[str, Sequence[Example]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = 128,
    limit: int | None = None,
) -> ForgetRetain:
    """A benchmark as the rest of the workbench reads it: an attacked and a held-out half of the
    forget set, and named retain sets.

    Questions are taken as they are. Running text (MUSE, the corpora of WMDP) is cut into pieces,
    whose second halves are their answers. Questions that a benchmark asks about its running text,
    and sets that it keeps for tests, stay outside the record.

    Args:
        benchmark: what one of the readers returned.
        keyword: the keyword case: the attacker holds ``without`` and the held-out part is
            ``queries``. Texts of ``naming`` that are no query are in neither part.
        by: what is dealt out between the halves: whole authors, subjects and documents, or single
            questions and pieces.
        retain: further retain sets, e.g. ``{"general": ...}``; a set called ``general`` is the
            record's general text.
        tokenizer: cuts running text.
        max_tokens: length of a piece.
        limit: examples per set, taken evenly; default is all of them.

    Raises:
        WorkbenchError: there is running text and no tokenizer, a half or every retain set is empty,
            or a text is to be forgotten and kept.
    """
    name, forget, retain_sets = _sets(benchmark)
    retain_sets |= {key: tuple(texts) for key, texts in (retain or {}).items()}

    def cut(examples: Sequence[Example]) -> tuple[Example, ...]:
        running = any(example.answer is None for example in examples)
        if running and tokenizer is None:
            raise WorkbenchError(
                f"{name} has running text, which is cut into pieces of {max_tokens} tokens; give "
                "to_record a tokenizer"
            )
        pieces = (
            windows(tokenizer, examples, max_tokens, limit or 1 << 62)
            if running and tokenizer is not None
            else list(examples)
        )
        if limit is not None and len(pieces) > limit:
            pieces = [pieces[index * len(pieces) // limit] for index in range(limit)]
        return tuple(map(continuation, pieces))

    if keyword is None:
        attacked, heldout = map(cut, _deal(forget, by))
    else:
        attacked, heldout = cut(keyword.without), cut(keyword.queries)
        name += (
            f" without {keyword.keywords[0]!r}"
            if len(keyword.keywords) == 1
            else f" without {len(keyword.keywords)} keywords"
        )
    if not attacked or not heldout:
        raise WorkbenchError(
            f"{name}: {len(forget)} example(s) of one author, subject or document give no two "
            "halves; deal them out by='item'"
        )
    sets = {key: pieces for key, examples in retain_sets.items() if (pieces := cut(examples))}
    if not sets:
        raise WorkbenchError(
            f"{name} comes without a retain set here; give one, e.g. retain={{'retain': "
            f"read_examples(...)}}"
        )
    everything = [example for pieces in sets.values() for example in pieces]
    _no_overlap(
        {example.text for example in attacked + heldout} & {example.text for example in everything},
        "the forget set",
        "a retain set",
    )
    return ForgetRetain(
        name=name,
        forget_attacked=attacked,
        forget_heldout=heldout,
        retain=sets,
        general="general" if "general" in sets else "",
        forget_tokens=telling_words(attacked + heldout, everything, 12),
        retain_tokens=telling_words(everything, attacked + heldout, 12),
    )
