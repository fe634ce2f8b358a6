"""What a model writes: greedy answers in batches, and how they compare with the right ones word by
word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.words import bounded
from workbench.errors import WorkbenchError


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Greedy continuations: the text after each prompt, without special tokens and surrounding
    white space.

    Prompts are padded on the left here, whatever the tokenizer's own side; penalties and sampling
    that a checkpoint's ``generation_config`` asks for are left out. A row stops at any end token of
    the model or the tokenizer. Spaces at the end of a prompt are dropped first: tokenizers put the
    space in front of the next word, so a word that follows a lone space is one that the model has
    hardly seen.

    Args:
        model: a causal language model.
        tokenizer: of the model; what it puts in front of a text (BOS) is put in front of a prompt.
        prompts: at least one.
        max_new_tokens: longest continuation in tokens.
        batch_size: prompts per pass.

    Returns:
        One continuation per prompt, in their order.

    Raises:
        WorkbenchError: there is no prompt, one has no token, a number is not positive, or prompt
            and continuation exceed the model's context.
    """
    if not prompts:
        raise WorkbenchError("there is no prompt to continue: the set is empty; give at least one")
    if max_new_tokens < 1 or batch_size < 1:
        raise WorkbenchError(
            f"cannot write {max_new_tokens} tokens for {batch_size} prompts at a time; both must "
            "be at least 1"
        )
    ends = _end_tokens(model, tokenizer)
    rows = [_prompt_tokens(tokenizer, prompt, ends) for prompt in prompts]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(rows)), key=lambda index: len(rows[index]))
    if limit is not None and len(rows[longest]) + max_new_tokens > limit:
        raise WorkbenchError(
            f"the prompt {prompts[longest][:60]!r} has {len(rows[longest])} tokens, which with "
            f"{max_new_tokens} new ones exceeds the model's context of {limit}; shorten the prompt "
            "or the answer"
        )
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    was_training, own_settings = model.training, model.generation_config
    model.eval()
    model.generation_config = (
        GenerationConfig()
    )  # what we leave open would be filled in from the checkpoint's own
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            width = max(len(rows[index]) for index in part)
            input_ids = torch.tensor(
                [[pad] * (width - len(rows[index])) + rows[index] for index in part],
                device=model.device,
            )
            mask = torch.tensor(
                [[0] * (width - len(rows[index])) + [1] * len(rows[index]) for index in part],
                device=model.device,
            )
            written: Any = model.generate(
                input_ids, attention_mask=mask, generation_config=settings
            )
            for index, tokens in zip(part, written[:, width:].tolist(), strict=True):
                end = next(
                    (place for place, token in enumerate(tokens) if token in ends), len(tokens)
                )
                answers[index] = tokenizer.decode(
                    tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
                ).strip()
    finally:
        model.generation_config = own_settings
        model.train(was_training)
    return answers


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    found: list[int] = []
    for source in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found += [] if source is None else source if isinstance(source, list) else [source]
    return list(dict.fromkeys(found))


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, ends: Sequence[int]
) -> list[int]:
    tokens: list[int] = list(tokenizer(prompt.rstrip(" "), verbose=False)["input_ids"])
    if len(tokens) > 1 and tokens[-1] in ends:
        del tokens[-1]  # some tokenizers close every text
    if not tokens:
        raise WorkbenchError(f"the prompt {prompt!r} has no token to continue from; give it a word")
    return tokens


def _plain(text: str) -> str:
    """Compatibility forms of Unicode unified, case folded, white space single."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


_OPENING = ("Ps", "Pi", "Pe", "Pf")
_QUOTES = "\"'*_"


def _bare(text: str) -> str:
    """``text`` without quotation marks and brackets around it and punctuation at its end, in any
    script (Unicode's categories).
    """
    start, end = 0, len(text)

    def around(sign: str) -> bool:
        return sign.isspace() or sign in _QUOTES or unicodedata.category(sign) in _OPENING

    while start < end and around(text[start]):
        start += 1
    while end > start and (around(text[end - 1]) or unicodedata.category(text[end - 1]) == "Po"):
        end -= 1
    return text[start:end]


def exact_match(generated: str, answer: str) -> bool:
    """Whether ``generated`` is ``answer``, up to case, white space, quotation marks and brackets
    around it and punctuation at its end.

    Raises:
        WorkbenchError: the answer is blank.
    """
    if not answer.strip():
        raise WorkbenchError("there is no answer to match: it is blank; leave such examples out")
    plain_generated, plain_answer = _plain(generated), _plain(answer)
    return plain_generated == plain_answer or (_bare(plain_generated) == _bare(plain_answer) != "")


def contains(generated: str, keyword: str) -> bool:
    """Whether ``keyword`` occurs in ``generated`` as whole words (of scripts without spaces between
    words: anywhere), whatever the case and the white space; ``5`` is not found in ``5.2`` or
    ``1,500``.

    Raises:
        WorkbenchError: the keyword is blank.
    """
    return _pattern(keyword).search(_plain(generated)) is not None


@lru_cache(maxsize=4096)
def _pattern(keyword: str) -> re.Pattern[str]:
    wanted = _plain(keyword)
    if not wanted:
        raise WorkbenchError("there is no keyword to look for: it is blank; leave it out")
    before = r"(?<!\d[.,])" if wanted[0].isdigit() else ""
    after = r"(?![.,]\d)" if wanted[-1].isdigit() else ""
    return re.compile(before + bounded(wanted) + after)


class Rouge(NamedTuple):
    """Overlap of a candidate with a reference, each in ``[0, 1]``.

    Attributes:
        precision: common subsequence over the candidate's words.
        recall: common subsequence over the reference's words.
        f1: their harmonic mean.
    """

    precision: float
    recall: float
    f1: float


def rouge_l(candidate: str, reference: str, *, stem: bool = True) -> Rouge:
    """ROUGE-L: the longest common subsequence of words (Lin 2004, section 3.1, with beta = 1), by
    Google's ``rouge-score``.

    Words are runs of ``a-z0-9`` after lower-casing: ``rouge-score`` drops every other letter, so it
    is a measure for English.

    Args:
        candidate: what the model wrote; without a word all three are 0.
        reference: what it should have written.
        stem: strip English suffixes first (Porter), as TOFU and open-unlearning do.

    Raises:
        WorkbenchError: the reference has no word of ``a-z0-9``.
    """
    if not re.search("[a-z0-9]", reference.lower()):
        raise WorkbenchError(
            "ROUGE reads the letters a-z and digits alone and finds none in the reference "
            f"{reference[:60]!r}; use exact_match or contains"
        )
    rouge = _scorer(stem).score(reference, candidate)["rougeL"]
    return Rouge(float(rouge.precision), float(rouge.recall), float(rouge.fmeasure))


@lru_cache(maxsize=2)
def _scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes seconds

    return RougeScorer(["rougeL"], use_stemmer=stem)
