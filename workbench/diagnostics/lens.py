"""Logit lens: what every block's residual stream would answer, if the model stopped there.

The stream after a block goes through the final norm and the unembedding (nostalgebraist 2020,
"interpreting GPT: the logit lens"). Read with two decoders, it tells a change of the stream from a
change of the decoder: the model's own, and one fixed decoder (the base's) for all models. Early
blocks need not write in the coordinates that the decoder reads (Belrose et al. 2023, arXiv
2303.08112): a low probability there is no proof that the answer is absent, a linear probe may still
find it (:mod:`.probes`).

The right answer stands beside its foils, the answers of other facts of the same kind: a model that
knows only what kind of answer is wanted gives both the same probability, and one that was taught to
avoid the right answer gives the foils more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError, unknown
from workbench.evaluation.losses import evaluating, token_kl
from workbench.evaluation.statistics import Estimate, bootstrap, by_fact, rate
from workbench.hooks import Capture, Collect, layer_count, resolve
from workbench.hooks.sites import causal_lm, family
from workbench.hooks.tokens import custom
from workbench.progress import ProgressCallback, quiet
from workbench.tables import Table

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Tokens = Literal["first", "all"]
"""Which answer tokens are read: the first, which the prompt alone predicts, or all of them, each
behind the true ones before it.
"""

METRICS = {
    "answer_probability": "lens_probability",
    "answer_log_probability": "lens_log_probability",
    "answer_rank": "lens_rank",
    "foil_probability": "lens_foil",
    "entropy": "lens_entropy",
    "kl_to_final": "lens_kl",
}
"""What is measured, and the metric under which :func:`add_lens` writes it."""

_ROWS = 256  # decoded at a time: a vocabulary of 128k in float64 is 1 MB a row


def predicting_answer(batch: Batch, tokens: Tokens = "first") -> Bool[Tensor, "batch pos"]:
    """True where the stream predicts the answer's first token (or any of its tokens): one position
    before it.

    Raises:
        WorkbenchError: an example has no answer, or ``tokens`` is neither ``first`` nor ``all``.
    """
    if tokens not in get_args(Tokens):
        raise unknown("choice of answer tokens", tokens, get_args(Tokens))
    answer = batch.answer_mask[:, 1:]
    for item, has_answer in zip(batch.items, answer.any(1).tolist(), strict=True):
        if not has_answer:
            raise WorkbenchError(
                f"the text of {item!r} has no answer token to predict; give questions with answers"
            )
    if tokens == "first":
        answer = answer & (answer.cumsum(1) == 1)
    return torch.nn.functional.pad(answer, (0, 1))


@torch.no_grad()
def decode(
    decoder: PreTrainedModel, rows: Float[Tensor, "rows d_model"]
) -> Float[Tensor, "rows d_vocab"]:
    """Logits of residual-stream vectors: the decoder's final norm, unembedding and, where the
    family has one, soft cap.

    It runs the decoder's own modules in their own dtype, so that the stream after the last block
    gives what the model puts out.

    Raises:
        WorkbenchError: the family is unknown, or the rows are not as wide as its residual stream.
    """
    model_family, (_, inner) = family(decoder), causal_lm(decoder)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None  # type: ignore[operator]
    if model_family is None or head is None:
        raise WorkbenchError(
            f"{type(decoder).__name__} has no final norm and unembedding that are known here; a "
            "causal LM of a family in hooks.families is needed"
        )
    if rows.shape[-1] != head.weight.shape[1]:
        raise WorkbenchError(
            f"the decoder reads a residual stream of width {head.weight.shape[1]}; the model's has "
            f"width {rows.shape[-1]}"
        )
    logits: Tensor = head(
        inner.get_submodule(model_family.outside["ln_final.hook_in"].path)(
            rows.to(head.weight.device, head.weight.dtype)
        )
    )
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[operator, union-attr]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def lens_by_example(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    decoder: PreTrainedModel | None = None,
    *,
    tokens: Tokens = "first",
    kinds: Sequence[str] | None = None,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    r"""The lens on every example, after every block. With :math:`p_l` the decoded distribution
    after block ``l``, :math:`p` the model's own output, ``y`` the right token:

    * ``answer_probability``, ``answer_log_probability`` (nats): of ``y`` under :math:`p_l`.
    * ``answer_rank``: ``1 + #{more probable tokens} + #{equally probable others} / 2``; 1 is the
      most probable.
    * ``foil_probability``: mean of :math:`p_l` over the foils: the distinct tokens that are right
      for other examples of the same kind, ``y`` left out. NaN where there is none.
    * ``entropy``: :math:`-\sum p_l \log p_l`, nats.
    * ``kl_to_final``: :math:`KL(p \| p_l)`, nats; 0 after the last block under the model's own
      decoder.

    With ``tokens="all"`` each is a mean over the tokens of the answer.

    Args:
        model: a causal LM of a known family.
        batches: questions with answers.
        decoder: whose final norm and unembedding read the stream; the model's own by default.
        tokens: see :data:`Tokens`.
        kinds: for every example what kind of fact it is (the relation asked for); default is one
            kind for all.
        progress: called after every batch.

    Returns:
        ``layer``, ``item`` and the six columns of :data:`METRICS`; one row per block and example,
        NaN where the logits are not finite.

    Raises:
        WorkbenchError: there is no batch, an example has no answer, the kinds are not as many as
            the examples, or the decoder does not fit the model.
    """
    if not batches:
        raise WorkbenchError(
            "the logit lens has no text to read: the set is empty; give at least one batch"
        )
    examples = sum(batch.size for batch in batches)
    kinds_of_example = [""] * examples if kinds is None else list(kinds)
    if len(kinds_of_example) != examples:
        raise WorkbenchError(
            f"kinds has {len(kinds_of_example)} entries for {examples} examples; give one for "
            "each, in their order"
        )
    masks = [predicting_answer(batch, tokens) for batch in batches]
    right = [
        batch.input_ids[:, 1:][mask[:, :-1]] for batch, mask in zip(batches, masks, strict=True)
    ]
    offsets = np.cumsum([0, *(batch.size for batch in batches)])
    owners = [
        mask.nonzero()[:, 0].cpu() + int(offset)
        for mask, offset in zip(masks, offsets[:-1], strict=True)
    ]
    answers = _right_tokens(right, owners, kinds_of_example)
    sites = [
        resolve(model, f"blocks.{layer}.hook_resid_post")[0] for layer in range(layer_count(model))
    ]
    sums = torch.zeros(len(sites), examples, len(METRICS), dtype=torch.float64)
    counts = torch.bincount(torch.cat(owners), minlength=examples)
    with evaluating(model):
        for number, (batch, mask, targets, owner) in enumerate(
            zip(batches, masks, right, owners, strict=True), 1
        ):
            device_batch, collected = batch.to(model.device), Collect(device=model.device)
            with Capture(model, sites, collected, at=custom(mask.to(model.device))):
                output = model(**device_batch.inputs, use_cache=False).logits
            final = output[mask.to(output.device)]
            asking = [kinds_of_example[example] for example in owner.tolist()]
            for layer, site in enumerate(sites):
                stream = collected[site.name]
                for start in range(0, len(targets), _ROWS):
                    part = slice(start, start + _ROWS)
                    logits = decode(model if decoder is None else decoder, stream[part]).to(
                        final.device
                    )
                    if logits.shape[1] != final.shape[1]:
                        raise WorkbenchError(
                            f"the decoder has {logits.shape[1]} tokens and the model "
                            f"{final.shape[1]}; both must share one vocabulary"
                        )
                    measured = _measures(
                        logits, final[part], targets[part].to(final.device), asking[part], answers
                    )
                    sums[layer].index_add_(0, owner[part], measured.cpu())
            progress(number, len(batches))
    items = [item for batch in batches for item in batch.items]
    values = (sums / counts[:, None]).flatten(0, 1).numpy()
    place = {"layer": np.repeat(np.arange(len(sites)), examples), "item": items * len(sites)}
    return pd.DataFrame({**place, **dict(zip(METRICS, values.T, strict=True))})


def _right_tokens(
    right: Sequence[Tensor], owners: Sequence[Tensor], kinds: Sequence[str]
) -> dict[str, Tensor]:
    """For every kind the distinct tokens that are right for some example of it."""
    found: dict[str, set[int]] = {}
    for token, example in zip(
        torch.cat(list(right)).tolist(), torch.cat(list(owners)).tolist(), strict=True
    ):
        found.setdefault(kinds[example], set()).add(token)
    return {kind: torch.tensor(sorted(tokens)) for kind, tokens in found.items()}


def _measures(
    logits: Tensor,
    final: Tensor,
    targets: Tensor,
    kinds: Sequence[str],
    answers: Mapping[str, Tensor],
) -> Tensor:
    """``[rows measures]`` float64, in the order of :data:`METRICS`; ``answers`` are the distinct
    right tokens of every kind.
    """
    wide = logits.double()
    log = wide.log_softmax(-1)
    target_logits = wide.gather(1, targets[:, None])
    likely = log.gather(1, targets[:, None])[:, 0]
    rank = (
        1
        + (wide > target_logits).sum(1).double()
        + ((wide == target_logits).sum(1).double() - 1) / 2
    )
    foils = torch.zeros_like(likely)
    for kind in dict.fromkeys(kinds):
        rows, tokens = (
            torch.tensor(
                [row for row, name in enumerate(kinds) if name == kind], device=log.device
            ),
            answers[kind].to(log.device),
        )
        probability = torch.where(tokens == targets[rows, None], 0.0, log[rows][:, tokens].exp())
        foils[rows] = probability.sum(1) / (len(tokens) - 1)  # 0 / 0 where there is no foil
    entropy = torch.special.entr(log.exp()).sum(-1)
    columns = torch.stack(
        [likely.exp(), likely, rank, foils, entropy, token_kl(final.double(), wide)], dim=1
    )
    return torch.where(wide.isfinite().all(1, keepdim=True), columns, torch.nan)


def logit_lens(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    decoder: PreTrainedModel | None = None,
    *,
    tokens: Tokens = "first",
    kinds: Sequence[str] | None = None,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """Means of :func:`lens_by_example` over facts (paraphrases averaged first), with 95 % bootstrap
    intervals that resample facts.

    Read it beside anchors: the base under the same decoder, a never-learned model, and
    ``foil_probability`` (what pairing questions with other answers would give).

    Args:
        model: see :func:`lens_by_example`, as for all arguments.
        batches: questions with answers.
        decoder: the model's own by default; give the base for the fixed one.
        tokens: first answer token, or all.
        kinds: kind of every example.
        progress: called after every batch.

    Returns:
        ``layer``, ``measure`` (see :data:`METRICS`), ``value``, ``low``, ``high``, ``n`` (facts). A
        measure that some fact does not have is NaN.

    Raises:
        WorkbenchError: see :func:`lens_by_example`.
    """
    by_example = lens_by_example(
        model, batches, decoder, tokens=tokens, kinds=kinds, progress=progress
    )
    rows = []
    for layer, block in by_example.groupby("layer", sort=True):
        for measure in METRICS:
            _, facts = by_fact(tuple(block["item"]), block[measure].to_numpy())
            rows.append({"layer": layer, "measure": measure, **_interval(measure, facts)._asdict()})
    return pd.DataFrame(rows, columns=["layer", "measure", "value", "low", "high", "n"])


def _interval(measure: str, facts: np.ndarray) -> Estimate:
    if not np.isfinite(facts).all():
        return Estimate(float("nan"), float("nan"), float("nan"), len(facts))
    return (
        rate(facts) if measure in ("answer_probability", "foil_probability") else bootstrap(facts)
    )


def add_lens(table: Table, frame: pd.DataFrame, **columns: Any) -> None:
    """Write :func:`logit_lens` into a table of results: stage ``representation``, one row per block
    and measure that has a value.

    Args:
        table: of the run.
        frame: what was measured.
        columns: further columns; ``arm`` says which decoder read (``own decoder`` or ``base
            decoder``), ``split`` which set of texts.
    """
    for row in frame.dropna(subset=["value"]).to_dict("records"):
        place = {
            "stage": "representation",
            "site": f"blocks.{row['layer']}.hook_resid_post",
            **columns,
        }
        table.add(
            METRICS[row["measure"]],
            row["value"],
            low=row["low"],
            high=row["high"],
            n=row["n"],
            **place,
        )
