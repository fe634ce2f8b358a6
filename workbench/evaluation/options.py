"""Several answers to one question, weighed by their probability: multiple choice, and TOFU's truth
ratio with the forget quality made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import encode
from workbench.data.records import Example
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import evaluating
from workbench.evaluation.metrics import answer_logits
from workbench.hooks.brief import brief

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def _answer_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_length: int | None,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood (nats) of every answer after its prompt, and its number of
    tokens: ``[pair]`` twice. Texts of like length share a batch.
    """
    if batch_size < 1:
        raise WorkbenchError(
            f"a batch of {batch_size} texts cannot be scored; give a batch size of at least 1"
        )
    examples = [
        Example(prompt + answer, (len(prompt), len(prompt) + len(answer)))
        for prompt, answer in pairs
    ]
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].text))
    nll, tokens = np.empty(len(examples)), np.empty(len(examples))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = encode(tokenizer, [examples[row] for row in rows], max_length=max_length).to(
                model.device
            )
            if bool(batch.answer_mask[:, 0].any()):
                row = rows[int(batch.answer_mask[:, 0].nonzero()[0])]
                raise WorkbenchError(
                    f"nothing comes before the first token of {examples[row].text[:60]!r}, so it "
                    "has no probability; give a longer question"
                )
            answer, logits, targets = answer_logits(model, batch)
            table = torch.zeros(answer.shape, dtype=torch.float64, device=logits.device)
            table[answer] = F.cross_entropy(logits, targets, reduction="none").double()
            nll[rows], tokens[rows] = table.sum(1).cpu().numpy(), answer.sum(1).cpu().numpy()
    return nll, tokens


def _check_question(question: str, answers: Sequence[str]) -> None:
    if (
        isinstance(answers, str)
        or not question.strip()
        or not all(answer.strip() for answer in answers)
    ):
        raise WorkbenchError(
            f"the question {question[:60]!r} needs a text and a list of texts to score behind it; "
            "one of them is blank or no list"
        )


@brief
@dataclass(frozen=True, slots=True)
class Choice:
    """A question with options.

    Attributes:
        question: the prompt, verbatim; an option is put directly behind it, so one of the two
            brings the space between them.
        options: at least two different continuations.
        correct: index of the right option.
        item: name of the fact.
    """

    question: str
    options: tuple[str, ...]
    correct: int
    item: str = ""

    def __post_init__(self) -> None:
        _check_question(self.question, self.options)
        if len(set(self.options)) < max(2, len(self.options)):
            raise WorkbenchError(
                f"the question {self.question[:60]!r} needs at least two options, all different; "
                f"it has {list(self.options)}"
            )
        if not 0 <= self.correct < len(self.options):
            raise WorkbenchError(
                f"option {self.correct} of the question {self.question[:60]!r} does not exist; "
                f"count from 0 to {len(self.options) - 1}"
            )


@brief
@dataclass(frozen=True, slots=True)
class ChosenOptions:
    """What a model chose, in the order of the questions.

    Attributes:
        items: names of the facts.
        correct: 1.0 where the right option scores strictly above all others, else 0.0; NaN where a
            score is not a number.
        chosen: index of the best option (the first of equals); -1 where a score is not a number.
        margin: score of the right option minus the best other one, nats (nats per token under
            ``normalise="mean"``).
        scores: question by question the options' log-probabilities, nats (or nats per token).
    """

    items: tuple[str, ...]
    correct: Float[np.ndarray, " items"]
    chosen: Int[np.ndarray, " items"]
    margin: Float[np.ndarray, " items"]
    scores: tuple[Float[np.ndarray, " _options"], ...]

    @property
    def accuracy(self) -> float:
        """Share of questions answered right; its interval is ``rate(by_fact(items,
        correct)[1])``.
        """
        return float(self.correct.mean())


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Choice],
    max_length: int | None = None,
    *,
    normalise: Literal["sum", "mean"] = "sum",
    batch_size: int = 32,
) -> ChosenOptions:
    """Score every option by its log-probability behind the question and take the best.

    Args:
        model: a causal language model.
        tokenizer: fast.
        questions: at least one; numbers of options may differ.
        max_length: longest text in tokens; default is no limit. Nothing is cut: a longer text is an
            error.
        normalise: ``"sum"`` of the option's token log-probabilities, or their ``"mean"``, which
            does not favour short options (``acc`` and ``acc_norm`` of lm-evaluation-harness, which
            divides by characters instead).
        batch_size: options per forward pass.

    Raises:
        WorkbenchError: there is no question, ``normalise`` is unknown, or a text is longer than
            ``max_length``.
    """
    if not questions:
        raise WorkbenchError(
            "there is no question to choose in: the set is empty; give at least one Choice"
        )
    if normalise not in ("sum", "mean"):
        raise WorkbenchError(f"unknown normalisation {normalise!r}: choose 'sum' or 'mean'")
    nll, tokens = _answer_nll(
        model,
        tokenizer,
        [(q.question, option) for q in questions for option in q.options],
        max_length,
        batch_size,
    )
    flat = -nll if normalise == "sum" else -nll / tokens
    scores = np.split(flat, np.cumsum([len(q.options) for q in questions])[:-1])
    correct, chosen, margin = (
        np.full(len(scores), np.nan),
        np.full(len(scores), -1),
        np.full(len(scores), np.nan),
    )
    for row, (question, option_scores) in enumerate(zip(questions, scores, strict=True)):
        if not np.isnan(option_scores).any():
            margin[row] = (
                option_scores[question.correct] - np.delete(option_scores, question.correct).max()
            )
            chosen[row], correct[row] = option_scores.argmax(), margin[row] > 0
    return ChosenOptions(tuple(q.item for q in questions), correct, chosen, margin, tuple(scores))


@brief
@dataclass(frozen=True, slots=True)
class TruthQuestion:
    """A question with a true answer and false ones in the same words (TOFU's paraphrased and
    perturbed answers).

    Attributes:
        question: the prompt, verbatim; an answer is put directly behind it.
        paraphrased: the true answer in words that were not trained on (TOFU takes the answer itself
            for real authors and world facts).
        perturbed: false answers of the same form, at least one.
        item: name of the fact.
    """

    question: str
    paraphrased: str
    perturbed: tuple[str, ...]
    item: str = ""

    def __post_init__(self) -> None:
        _check_question(self.question, self.perturbed)
        if not self.perturbed or not self.paraphrased.strip():
            raise WorkbenchError(
                f"the question {self.question[:60]!r} needs a paraphrased answer and at least one "
                "perturbed one"
            )


@brief
@dataclass(frozen=True, slots=True)
class TruthRatios:
    """Truth ratios, in the order of the questions.

    Attributes:
        items: names of the facts.
        ratio: below 1 where the truth is more probable than the false answers; compare two models
            by :func:`forget_quality`.
    """

    items: tuple[str, ...]
    ratio: Float[np.ndarray, " items"]

    @property
    def forget(self) -> Float[np.ndarray, " items"]:
        """``min(R, 1 / R)``: 1 where true and false are equally likely, as a model should have it
        that never learned; for the forget set.
        """
        with np.errstate(divide="ignore"):
            return np.minimum(self.ratio, 1 / self.ratio)

    @property
    def utility(self) -> Float[np.ndarray, " items"]:
        """``max(0, 1 - R)``: near 1 where the truth is far more likely; for sets that are to be
        kept.
        """
        return np.maximum(0, 1 - self.ratio)


def truth_ratio(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[TruthQuestion],
    max_length: int | None = None,
    *,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
    batch_size: int = 32,
) -> TruthRatios:
    """TOFU's truth ratio ``R = mean over perturbed a^ of P(a^|q)^(1/|a^|) / P(a~|q)^(1/|a~|)``
    (Maini et al. 2024, arXiv 2401.06121, equation 1), ``a~`` the paraphrase.

    The paper's mean over the perturbed answers is arithmetic, of probabilities, and so is ours; the
    code released with it (and open-unlearning) averages log-probabilities, which is the geometric
    mean and never larger: ``mean="geometric"``. Lengths count the answer's tokens alone, without an
    end-of-sequence token (both codes count it).

    Args:
        model: a causal language model.
        tokenizer: fast.
        questions: at least one.
        max_length: longest text in tokens; default is no limit. Nothing is cut: a longer text is an
            error.
        mean: over the perturbed answers.
        batch_size: answers per forward pass.

    Raises:
        WorkbenchError: there is no question, ``mean`` is unknown, or a text is longer than
            ``max_length``.
    """
    if not questions:
        raise WorkbenchError(
            "there is no question to take a truth ratio of: the set is empty; give at least one "
            "TruthQuestion"
        )
    if mean not in ("arithmetic", "geometric"):
        raise WorkbenchError(f"unknown mean {mean!r}: choose 'arithmetic' or 'geometric'")
    nll, tokens = _answer_nll(
        model,
        tokenizer,
        [(q.question, answer) for q in questions for answer in (q.paraphrased, *q.perturbed)],
        max_length,
        batch_size,
    )
    logs = np.split(-nll / tokens, np.cumsum([1 + len(q.perturbed) for q in questions])[:-1])
    # In logarithms: a diverged model's probabilities would underflow to 0 / 0.
    false = np.array(
        [
            np.logaddexp.reduce(answer_logs[1:]) - np.log(len(answer_logs) - 1)
            if mean == "arithmetic"
            else answer_logs[1:].mean()
            for answer_logs in logs
        ]
    )
    with np.errstate(over="ignore"):
        return TruthRatios(
            tuple(q.item for q in questions),
            np.exp(false - np.array([answer_logs[0] for answer_logs in logs])),
        )


def forget_quality(
    ratios_unlearned: Float[np.ndarray, " items"],
    ratios_retained: Float[np.ndarray, " other_items"],
) -> float:
    """TOFU's forget quality: p-value of the two-sample Kolmogorov-Smirnov test between the truth
    ratios of the forget set (Maini et al. 2024, arXiv 2401.06121, section 2.2).

    Near 1, the test cannot tell the unlearned model from one that was trained without the forget
    set; a small number of questions has the same effect. Being a p-value it has no interval. The
    raw ratios are compared (the order of values is all that matters, so ``1 / R`` gives the same).

    Args:
        ratios_unlearned: of the unlearned model.
        ratios_retained: of the model that never learned.

    Raises:
        WorkbenchError: one of the two is empty, not one-dimensional or holds NaN.
    """
    sets = [np.asarray(values, dtype=np.float64) for values in (ratios_unlearned, ratios_retained)]
    for name, values in zip(("unlearned", "retained"), sets, strict=True):
        if values.ndim != 1 or not values.size or np.isnan(values).any():
            raise WorkbenchError(
                f"forget quality needs a series of truth ratios; those of the {name} model have "
                f"shape {values.shape} and {int(np.isnan(values).sum())} NaN"
            )
    return float(ks_2samp(*sets).pvalue)
