"""Adversarial suffixes: a greedy coordinate gradient search (GCG; Zou et al. 2023, arXiv
2307.15043, algorithm 1) for tokens that make a model answer, or stop it answering.

One suffix is searched for all attack questions together and judged on others. The controls: the
same search on the never-learned model, and :func:`random_suffix` with as many evaluations. Tokens
of the answers are never used, and neither is a suffix whose text mentions one: a suffix may unlock
an answer, not state it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.attacks.few_shot import mentions
from workbench.attacks.soft_prompt import check_context, frozen
from workbench.data.batches import Batch
from workbench.data.records import Example
from workbench.errors import WorkbenchError
from workbench.hooks.brief import brief
from workbench.hooks.html import table
from workbench.progress import ProgressCallback, quiet

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SuffixPosition = Callable[[Example], int]
"""Where the suffix goes: a character offset in the example's text, not behind its answer."""


def before_answer(example: Example) -> int:
    """Between question and answer."""
    return len(example.prompt)


def in_front(example: Example) -> int:
    """In front of the question (behind BOS): for questions that the answer completes to a
    sentence.
    """
    return 0


@brief
@dataclass(frozen=True, slots=True)
class SuffixPrompt:
    """A question as token ids, with the place of the suffix.

    Attributes:
        before: what stands before the suffix, with BOS where the tokenizer adds it; may be empty.
        after: what stands between suffix and answer; may be empty.
        target: the answer; at least one token.
        item: name of the fact.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]
    item: str = ""


def suffix_prompts(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    place: SuffixPosition = before_answer,
) -> tuple[SuffixPrompt, ...]:
    """Cut questions at the place of the suffix. What follows the answer is dropped.

    Args:
        tokenizer: a fast one.
        examples: questions with answers.
        place: see :data:`SuffixPosition`.

    Raises:
        WorkbenchError: there is no example, one has no answer, the place lies behind the answer's
            start, or the tokenizer is slow.
    """
    if not examples:
        raise WorkbenchError("a suffix search needs at least one question; the set is empty")
    if not tokenizer.is_fast:
        raise WorkbenchError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; load its "
            "fast version (tokenizer.json)"
        )
    prompts = []
    for example in examples:
        if example.answer is None:
            raise WorkbenchError(
                f"a suffix search needs answers to aim at; {example.text[:60]!r} has none (give "
                "jsonl with question and answer)"
            )
        offset = place(example)
        if not 0 <= offset <= example.answer[0]:
            raise WorkbenchError(
                f"the suffix of {example.text[:60]!r} would stand at character {offset}, outside "
                f"its question of {example.answer[0]}"
            )
        encoded = tokenizer(example.text, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        target = [
            index
            for index, (start, end) in enumerate(spans)
            if start < example.answer[1] and end > example.answer[0] and end > start
        ]
        if not target:
            raise WorkbenchError(
                f"the tokenizer has no token for the answer of {example.text[:60]!r}"
            )
        cut = min(
            next(
                (index for index, (start, end) in enumerate(spans) if end > offset and end > start),
                len(ids),
            ),
            target[0],
        )
        prompts.append(
            SuffixPrompt(
                tuple(ids[:cut]),
                tuple(ids[cut : target[0]]),
                tuple(ids[target[0] : target[-1] + 1]),
                example.item,
            )
        )
    return tuple(prompts)


@dataclass(frozen=True, slots=True)
class SuffixResult:
    """The best suffix of a search.

    Attributes:
        suffix_ids: its token ids.
        text: the same, decoded.
        loss: mean over the prompts of the answer's negative log-likelihood, nats.
        losses: of the suffix at which the search stood: at the start and after every step
            (``random_suffix``: the best so far, after every pass).
        evaluations: how many suffixes were run through the model, over all prompts each; gradient
            passes count as one.
    """

    suffix_ids: tuple[int, ...]
    text: str
    loss: float
    losses: tuple[float, ...]
    evaluations: int

    def __repr__(self) -> str:
        return (
            f"SuffixResult({self.text!r}, loss {self.losses[0]:.3f} to {self.loss:.3f}, "
            f"{self.evaluations} evaluations)"
        )

    def _repr_html_(self) -> str:
        lines = [
            ("suffix", self.text),
            ("tokens", " ".join(map(str, self.suffix_ids))),
            ("loss, nats per answer", f"{self.losses[0]:.3f} → {self.loss:.3f}"),
            ("evaluations", f"{self.evaluations:,}"),
        ]
        return table("adversarial suffix", ("", ""), lines)


def suffix_batches(
    prompts: Sequence[SuffixPrompt], suffix_ids: Sequence[int], size: int
) -> list[Batch]:
    """The questions with a suffix in its place, in batches of at most ``size`` rows, for
    :func:`~workbench.evaluation.losses.score`; an empty suffix is the plain question.

    Args:
        prompts: attacked or held-out questions.
        suffix_ids: token ids of the suffix.
        size: rows of a batch.

    Raises:
        WorkbenchError: there is no question.
    """
    if not prompts:
        raise WorkbenchError("there is no question to put a suffix into; the set is empty")
    batches = []
    for begin in range(0, len(prompts), size):
        rows = _Rows(prompts[begin : begin + size], len(suffix_ids))
        ids = rows.filled(torch.tensor([list(suffix_ids)], dtype=torch.long))
        nothing = torch.zeros_like(rows.target)
        batches.append(
            Batch(
                ids,
                rows.mask,
                rows.target,
                nothing,
                rows.target.clone(),
                tuple(prompt.item for prompt in rows.prompts),
            )
        )
    return batches


class _Rows:
    """Right-padded rows of prompts, with room for a suffix of a given length in each."""

    def __init__(self, prompts: Sequence[SuffixPrompt], length: int) -> None:
        self.prompts = tuple(prompts)
        for prompt in self.prompts:
            if not prompt.target or not len(prompt.before) + length + len(prompt.after):
                raise WorkbenchError(
                    f"the prompt of {prompt.item or 'a question'} needs an answer and a token "
                    f"before it; got {prompt}"
                )
        rows = [
            [*prompt.before, *[0] * length, *prompt.after, *prompt.target]
            for prompt in self.prompts
        ]
        self.width = max(map(len, rows))
        self.ids = torch.tensor([row + [0] * (self.width - len(row)) for row in rows])
        self.mask = torch.tensor([[1] * len(row) + [0] * (self.width - len(row)) for row in rows])
        self.target = torch.tensor(
            [
                [False] * (len(row) - len(p.target))
                + [True] * len(p.target)
                + [False] * (self.width - len(row))
                for row, p in zip(rows, self.prompts, strict=True)
            ]
        )
        self.slots = torch.tensor([len(prompt.before) for prompt in self.prompts])[
            :, None
        ] + torch.arange(length)  # [prompt, suffix]

    def filled(self, suffixes: Tensor) -> Tensor:
        """``[rows pos]``: every one of ``suffixes`` ``[batch pos]`` in every prompt, suffix by
        suffix.
        """
        many, few = len(suffixes), len(self.prompts)
        ids = self.ids.repeat(many, 1)
        return ids.scatter(1, self.slots.repeat(many, 1), suffixes.repeat_interleave(few, 0))

    def nll(self, logits: Tensor, ids: Tensor) -> Tensor:
        """``[rows]`` summed negative log-likelihood of the answers; the rows are whole rounds of
        the prompts.
        """
        rounds = len(ids) // len(self.prompts)
        where = self.target[:, 1:].repeat(rounds, 1).to(logits.device)
        losses = F.cross_entropy(_exact(logits[:, :-1][where]), ids[:, 1:][where], reduction="none")
        return losses.new_zeros(len(ids)).index_add(0, where.nonzero()[:, 0], losses)


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def _losses(model: PreTrainedModel, rows: _Rows, suffixes: Tensor, limit: int) -> Tensor:
    """``[batch]`` mean over the prompts of the answer's NLL, on the CPU; at most ``limit`` rows
    in one pass (at least one suffix).
    """
    few = len(rows.prompts)
    losses = []
    for part in suffixes.split(max(1, limit // few)):
        ids = rows.filled(part).to(model.device)
        mask = rows.mask.repeat(len(part), 1).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        losses.append(rows.nll(logits, ids).view(len(part), few).mean(1).cpu())
    return torch.cat(losses).nan_to_num(nan=torch.inf)


def suffix_losses(
    model: PreTrainedModel,
    prompts: Sequence[SuffixPrompt],
    suffixes: Int[Tensor, "batch pos"],
    *,
    rows: int = 256,
) -> Float[Tensor, " batch"]:
    """The objective of the search for some suffixes: ``mean over prompts of -log p(answer |
    question with suffix)`` (arXiv 2307.15043, equation 3), in nats.

    Args:
        model: evaluated in evaluation mode; not changed.
        prompts: the questions.
        suffixes: token ids.
        rows: rows of one forward pass, at most (at least one suffix, in all prompts).

    Returns:
        In float32 or better, on the CPU; infinity where the model gives NaN.

    Raises:
        WorkbenchError: there is no prompt, or it does not fit the model's context.
    """
    prompt_rows = _rows(model, prompts, suffixes.shape[1])
    with frozen(model):
        return _losses(model, prompt_rows, suffixes.cpu(), rows)


def _rows(model: PreTrainedModel, prompts: Sequence[SuffixPrompt], length: int) -> _Rows:
    if not prompts:
        raise WorkbenchError("a suffix search needs at least one question; the set is empty")
    rows = _Rows(prompts, length)
    check_context(model, rows.width, "questions with suffix and answer")
    return rows


def suffix_gradient(
    model: PreTrainedModel,
    prompts: Sequence[SuffixPrompt],
    suffix_ids: Sequence[int],
    *,
    rows: int = 256,
) -> tuple[float, Float[Tensor, "pos d_vocab"]]:
    """The objective at one suffix, and its gradient with respect to the one-hot rows of the
    suffix's tokens (arXiv 2307.15043, section 2.2).

    The tokens' embeddings are a matrix product of one-hot rows and the embedding of the whole
    vocabulary, so that the gradient is that of the embeddings times the vocabulary's; scaled
    embeddings (Gemma) are meant as the model scales them.

    Args:
        model: not changed; ``requires_grad`` flags are put back.
        prompts: the questions.
        suffix_ids: the suffix.
        rows: rows of one pass, at most.

    Returns:
        The objective in nats, and its gradient in float32 or better on the model's device.

    Raises:
        WorkbenchError: as in :func:`suffix_losses`, or the gradient is not finite.
    """
    prompt_rows = _rows(model, prompts, len(suffix_ids))
    with frozen(model):
        return _gradient(model, prompt_rows, torch.tensor(list(suffix_ids)), rows)


def _gradient(
    model: PreTrainedModel, rows: _Rows, suffix: Tensor, limit: int
) -> tuple[float, Tensor]:
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embeddings = embedding(torch.arange(embedding.weight.shape[0], device=model.device)[None])[
            0
        ]
        leaf = _exact(embedding(suffix.to(model.device)[None])[0])
    leaf.requires_grad_(True)
    total, gradient = 0.0, torch.zeros_like(leaf)
    few = len(rows.prompts)
    for begin in range(0, few, limit):
        part = _Rows(rows.prompts[begin : begin + limit], len(suffix))
        ids = part.filled(suffix[None]).to(model.device)
        with torch.enable_grad():
            inner = embedding(ids).detach()
            slots = part.slots[..., None].expand(-1, -1, inner.shape[-1]).to(model.device)
            inner = inner.scatter(1, slots, leaf.to(inner).expand(len(ids), -1, -1))
            logits = model(
                inputs_embeds=inner, attention_mask=part.mask.to(model.device), use_cache=False
            ).logits
            loss = part.nll(logits, ids).sum() / few
            gradient += torch.autograd.grad(loss, [leaf])[0]
        total += float(loss.detach())
    if not bool(torch.isfinite(gradient).all()):
        raise WorkbenchError(
            "the gradient of a suffix search is not finite; run the model in float32 or bfloat16"
        )
    return total, gradient @ _exact(embeddings).T


class _Vocabulary:
    """What a suffix may be made of.

    Attributes:
        ids: ``[allowed]`` token ids, ascending.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[SuffixPrompt],
        allowed: Iterable[int] | None,
        forbidden: Sequence[str],
        retokenise: bool,
    ) -> None:
        self.tokenizer, self.retokenise = tokenizer, retokenise
        answers = [*(tokenizer.decode(prompt.target) for prompt in prompts), *forbidden]
        self.phrases = sorted({" ".join(answer.split()).lower() for answer in answers} - {""})
        special = {
            *tokenizer.all_special_ids,
            *(index for index, token in tokenizer.added_tokens_decoder.items() if token.special),
        }
        banned = {index for prompt in prompts for index in prompt.target} | special
        for phrase in {answer.strip() for answer in answers} - {""}:
            for written in (phrase, f" {phrase}"):
                banned.update(tokenizer(written, add_special_tokens=False)["input_ids"])
        all_ids = range(min(len(tokenizer), model.get_input_embeddings().weight.shape[0]))
        allowed_ids = all_ids if allowed is None else sorted(set(allowed) & set(all_ids))
        self.ids = torch.tensor(
            [index for index in allowed_ids if index not in banned], dtype=torch.long
        )
        if not len(self.ids):
            raise WorkbenchError(
                "no token is left for a suffix: special tokens and those of the answers are never "
                "used; allow more"
            )

    def admitted(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """For each suffix whether it mentions no answer and, where asked for, is what its own text
        is tokenised to.
        """
        if not suffixes:
            return []
        texts = [self.decode(suffix) for suffix in suffixes]
        encoded = (
            self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            if self.retokenise
            else suffixes
        )
        return [
            list(again) == list(suffix) and not self._tells(text)
            for suffix, text, again in zip(suffixes, texts, encoded, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _tells(self, text: str) -> bool:
        plain = " ".join(text.split()).lower()
        return any(phrase in plain and mentions(text, phrase) for phrase in self.phrases)

    def draw(self, length: int, names: Sequence[str], tries: int = 200) -> list[list[int]]:
        """Random suffixes that are admitted, one per name, token by token; a name always gives the
        same suffix.

        Raises:
            WorkbenchError: none was found.
        """
        pool: list[int] = self.ids.tolist()
        streams = [random.Random(name) for name in names]
        suffixes: list[list[int]] = [[] for _ in names]
        for place in range(length):
            open_ = list(range(len(names)))
            for _ in range(tries):
                longer = [[*suffixes[index], streams[index].choice(pool)] for index in open_]
                for index, suffix, good in zip(open_, longer, self.admitted(longer), strict=True):
                    if good:
                        suffixes[index] = suffix
                open_ = [index for index in open_ if len(suffixes[index]) == place]
                if not open_:
                    break
            else:
                raise WorkbenchError(
                    f"no suffix of {length} allowed tokens survives its own tokenisation; allow "
                    "other tokens, a shorter suffix, or set retokenise to false"
                )
        return suffixes


def _check(length: int, **counts: int) -> None:
    for name, count in {"length": length, **counts}.items():
        if count < 1:
            raise WorkbenchError(f"a suffix search needs {name} >= 1; got {count}")


def gcg(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[SuffixPrompt],
    *,
    length: int = 20,
    steps: int = 100,
    topk: int = 256,
    candidates: int = 512,
    seed: int = 0,
    start: Sequence[int] | None = None,
    allowed: Iterable[int] | None = None,
    forbidden: Sequence[str] = (),
    retokenise: bool = True,
    maximise: bool = False,
    rows: int = 256,
    progress: ProgressCallback = quiet,
) -> SuffixResult:
    r"""Search one suffix for all prompts by greedy coordinate gradient (arXiv 2307.15043, algorithm
    1); the model is not changed.

    Every step takes, at each place of the suffix, the ``topk`` allowed tokens with the most
    negative gradient; draws ``candidates`` single swaps among them; and moves on to the candidate
    with the lowest objective, even where it is worse than the suffix at hand. The result is the
    best suffix that was met.

    Swaps are drawn without replacement, and a swap for the token that is there already is none: two
    draws of algorithm 1 that only repeat work. With several prompts the objective is the mean over
    all of them from the first step on (algorithm 2 adds them one by one, with gradients of unit
    length).

    Args:
        model: what is attacked.
        tokenizer: its tokenizer.
        prompts: attacked questions; see :func:`suffix_prompts`.
        length: tokens of the suffix.
        steps: of the search.
        topk: tokens to choose from at each place; 256 in the paper.
        candidates: swaps evaluated in a step; 512 in the paper.
        seed: of the start and of the draws.
        start: the first suffix, of ``length`` tokens; default is drawn at random.
        allowed: ids that may be used; default is every token of the tokenizer. Special tokens and
            tokens of the answers never are.
        forbidden: further answers that the suffix must not hold (those of held-out questions).
        retokenise: use only suffixes whose text is tokenised to the same ids, so that they can be
            typed.
        maximise: search for the suffix with the *highest* loss instead (an untargeted attack on
            questions that the model answers); read best and lowest accordingly.
        rows: rows of one forward pass, at most.
        progress: called after every step.

    Raises:
        WorkbenchError: there is no prompt, a prompt does not fit the model's context, a setting is
            out of range, the start holds a token that is not allowed, or no token is left.
    """
    _check(length, steps=steps, topk=topk, candidates=candidates, rows=rows)
    prompt_rows = _rows(model, prompts, length)
    vocabulary = _Vocabulary(model, tokenizer, prompts, allowed, forbidden, retokenise)
    if start is None:
        current = torch.tensor(vocabulary.draw(length, [f"suffix-{seed}-0"])[0])
    else:
        current = torch.tensor(list(start), dtype=torch.long)
        wrong = sorted(set(current.tolist()) - set(vocabulary.ids.tolist()))
        if len(current) != length or wrong:
            raise WorkbenchError(
                f"the first suffix has {len(current)} tokens (length is {length}), of which "
                f"{wrong[:5]} may not be used; give another start"
            )
        if not vocabulary.admitted([current.tolist()])[0]:
            raise WorkbenchError(
                "the first suffix mentions an answer or is not what its own text is tokenised to; "
                "give another start, or set retokenise to false"
            )
    generator = torch.Generator().manual_seed(seed)
    sign = -1 if maximise else 1
    losses: list[float] = []
    evaluations = 0
    best, lowest = current, float("inf")
    with frozen(model):
        for step in range(1, steps + 1):
            loss, gradient = _gradient(model, prompt_rows, current, rows)
            evaluations += 1
            if not losses:
                losses.append(loss)
                lowest = sign * loss
            swaps = _swaps(current, sign * gradient.cpu(), vocabulary, topk, candidates, generator)
            if len(swaps):
                values = _losses(model, prompt_rows, swaps, rows)
                evaluations += len(swaps)
                objective = _objective(values, sign)
                best_row = int(objective.argmin())
                current, loss = swaps[best_row], float(values[best_row])
                if float(objective[best_row]) < lowest:
                    best, lowest = current, float(objective[best_row])
            losses.append(loss)
            progress(step, steps)
    return SuffixResult(
        tuple(best.tolist()),
        vocabulary.decode(best.tolist()),
        sign * lowest,
        tuple(losses),
        evaluations,
    )


def _objective(losses: Tensor, sign: int) -> Tensor:
    """What the search minimises: the losses, or (``sign`` -1) their negatives. Infinity stands for
    NaN, and is the worst either way.
    """
    return (sign * losses).masked_fill(losses.isinf(), torch.inf)


def _swaps(
    current: Tensor,
    gradient: Tensor,
    vocabulary: _Vocabulary,
    topk: int,
    candidates: int,
    generator: torch.Generator,
) -> Tensor:
    """``[candidates pos]`` admitted single-token swaps of ``current`` (possibly none):
    ``candidates`` draws among the ``topk`` of each place.
    """
    promising = (-gradient[:, vocabulary.ids]).topk(min(topk, len(vocabulary.ids)), dim=1).indices
    tokens = vocabulary.ids[promising]  # [length, k]
    places, columns = (tokens != current[:, None]).nonzero(as_tuple=True)
    order = torch.randperm(len(places), generator=generator)[:candidates]
    swaps = current.repeat(len(order), 1)
    swaps[torch.arange(len(order)), places[order]] = tokens[places[order], columns[order]]
    return swaps[torch.tensor(vocabulary.admitted(swaps.tolist()), dtype=torch.bool)]


def random_suffix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[SuffixPrompt],
    *,
    evaluations: int,
    length: int = 20,
    seed: int = 0,
    allowed: Iterable[int] | None = None,
    forbidden: Sequence[str] = (),
    retokenise: bool = True,
    maximise: bool = False,
    rows: int = 256,
    progress: ProgressCallback = quiet,
) -> SuffixResult:
    """The control of :func:`gcg`: the best of ``evaluations`` random suffixes of the same length,
    under the same rules.

    Args:
        model: as in :func:`gcg`, like the rest.
        tokenizer: likewise.
        prompts: likewise.
        evaluations: suffixes that are tried: :attr:`SuffixResult.evaluations` of the search that
            this is the control of.
        length: tokens of the suffix.
        seed: of the draws; the first suffix is that of :func:`gcg` with the same seed.
        allowed: as in :func:`gcg`.
        forbidden: likewise.
        retokenise: likewise.
        maximise: likewise.
        rows: likewise.
        progress: called with the number of suffixes tried.

    Raises:
        WorkbenchError: as in :func:`gcg`.
    """
    _check(length, evaluations=evaluations, rows=rows)
    prompt_rows = _rows(model, prompts, length)
    vocabulary = _Vocabulary(model, tokenizer, prompts, allowed, forbidden, retokenise)
    losses: list[float] = []
    best: list[int] = []
    sign = -1 if maximise else 1
    lowest = float("inf")
    size = max(1, rows // len(prompt_rows.prompts))
    with frozen(model):
        for done in range(0, evaluations, size):
            tried = vocabulary.draw(
                length,
                [
                    f"suffix-{seed}-{number}"
                    for number in range(done, min(done + size, evaluations))
                ],
            )
            values = _losses(model, prompt_rows, torch.tensor(tried), rows)
            objective = _objective(values, sign)
            best_row = int(objective.argmin())
            if float(objective[best_row]) < lowest:
                best, lowest = tried[best_row], float(objective[best_row])
            losses.append(sign * lowest)
            progress(done + len(tried), evaluations)
    return SuffixResult(
        tuple(best), vocabulary.decode(best), sign * lowest, tuple(losses), evaluations
    )
