"""What did this model forget? Naming the topic from the checkpoints alone, without the forget set.

Three readings of two checkpoints, each a ranking of tokens: the trigger scan (:mod:`.scan`), the
words that the directions of the shift stand for, and the tokens whose own representation moved
most. :func:`forensics` puts their ranks together; :func:`recovered` says how many of the truly
forgotten words stand at the top, beside chance. :func:`alone` is what the unlearned checkpoint
gives away by itself, which is little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.attacks.soft_prompt import frozen
from workbench.data.batches import batches
from workbench.data.records import Example, Texts, examples_of
from workbench.diagnostics.discoveries import precision_recall, robust_z
from workbench.diagnostics.scan import (
    TokenPlace,
    TriggerScan,
    scan_triggers,
    shown,
    token_text,
    vocabulary,
)
from workbench.diagnostics.shift import streams
from workbench.errors import WorkbenchError
from workbench.hooks import Capture, Collect, Moments, Site, last_token, layer_count, resolve
from workbench.progress import ProgressCallback, quiet
from workbench.subspaces.compare import read_direction


@dataclass(frozen=True, slots=True, eq=False)
class Forensics:
    """What :func:`forensics` found.

    Attributes:
        ranking: ``rank``, ``token_id``, ``token``, ``score`` (mean over the methods of 1 / rank),
            and the rank of the token in each method.
        methods: names of those columns.
        words: the top of every reading, as :func:`shift_words` gives it.
        shifts: what :func:`token_shift` gave.
        scan: the trigger scan, or ``None`` where there was no query.
    """

    ranking: pd.DataFrame
    methods: tuple[str, ...]
    words: pd.DataFrame
    shifts: pd.DataFrame
    scan: TriggerScan | None

    def __repr__(self) -> str:
        return (
            f"Forensics({len(self.ranking)} tokens by {', '.join(self.methods)}; first "
            f"{self.ranking['token'].head(5).tolist()})"
        )

    def _repr_html_(self) -> str:
        read = (
            f"<p>words of the shift</p>{shown(self.words[self.words['rank'] <= 5])}"
            if len(self.words)
            else ""
        )
        return f"<p>{escape(f'{len(self.ranking):,} tokens by ' + ', '.join(self.methods))}</p>{shown(self.ranking.head(20))}{read}"  # noqa: E501


def forensics(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts = (),
    *,
    tokens: Sequence[int] | None = None,
    place: TokenPlace = "front",
    batch_size: int = 256,
    progress: ProgressCallback = quiet,
) -> Forensics:
    """Rank all tokens by how much they seem to belong to what was forgotten.

    Methods, each a ranking of the same tokens:

    * ``scan`` and ``scan_shift``: rise and shift of
      :func:`~workbench.diagnostics.scan.scan_triggers` in ``texts``; left out without texts;
    * ``words``: largest robust z-score, over layers and both signs, of a token's logit in the
      direction of the shift (:func:`shift_words`, on the vocabulary);
    * ``token_shift``: largest robust z-score over layers of the token's own shift
      (:func:`token_shift`).

    They are combined by their mean reciprocal rank: one method that puts a token first is worth
    more than several that put it tenth, because each sees another kind of unlearning. Tied tokens
    share their mean rank; a token that a method cannot rank gets nothing from it. The score is a
    heuristic without a null: :func:`recovered` calibrates it where the truth is known.

    Args:
        base: before unlearning.
        unlearned: after it.
        tokenizer: of both.
        texts: neutral queries for the scan. Questions are asked for their answers, running texts
            for their last word.
        tokens: candidates; default is the vocabulary without special tokens.
        place: of the token in the scan.
        batch_size: rows of a pass.
        progress: of the longest part, the scan (without texts, of the tokens' own shift).

    Raises:
        WorkbenchError: see :func:`~workbench.diagnostics.scan.scan_triggers` and
            :func:`token_shift`.
        CaptureError: the architecture is not known.
    """
    candidates = vocabulary(base, unlearned, tokenizer, tokens)
    queries = [query for text in examples_of(texts) if (query := last_word(text)) is not None]
    scan = None
    scores: dict[str, pd.Series] = {}
    if queries:
        scan = scan_triggers(
            base,
            unlearned,
            tokenizer,
            queries,
            tokens=candidates,
            place=place,
            batch_size=batch_size,
            progress=progress,
        )
        by_token = scan.table.set_index("token_id")
        scores |= {"scan": by_token["rise"], "scan_shift": by_token["shift"]}
    readings = list(_readings(base, unlearned, tokenizer, (), candidates, 1, batch_size))
    if readings:
        scores["words"] = pd.Series(
            np.abs([robust_z(reading.logits) for reading in readings]).max(0), index=candidates
        )
    shifts = token_shift(
        base,
        unlearned,
        tokenizer,
        tokens=candidates,
        batch_size=batch_size,
        progress=quiet if queries else progress,
    )
    scores["token_shift"] = shifts.groupby("token_id")["z"].max()
    ranks = pd.DataFrame(
        {name: values.rank(ascending=False, method="average") for name, values in scores.items()},
        index=pd.Index(candidates, name="token_id"),
    )
    ranking = (
        ranks.assign(score=(1 / ranks).fillna(0).mean(axis=1))
        .reset_index()
        .sort_values(["score", "token_id"], ascending=[False, True], ignore_index=True)
    )
    ranking["rank"] = np.arange(1, len(ranking) + 1)
    ranking["token"] = [token_text(tokenizer, token) for token in ranking["token_id"]]
    words = _table(readings, candidates, tokenizer, 20)
    return Forensics(
        ranking[["rank", "token_id", "token", "score", *scores]], tuple(scores), words, shifts, scan
    )


def recovered(
    ranking: pd.DataFrame,
    known: Collection[int],
    k: Sequence[int] = (10, 20, 50),
    score: str = "score",
) -> pd.DataFrame:
    """How much of what was forgotten stands at the top of a ranking.

    Args:
        ranking: ``rank``, ``token_id`` and ``score``, e.g. :attr:`Forensics.ranking`.
        known: ids of the tokens of the forgotten topic. Those that were no candidates are left out
            and counted in ``attrs["missing"]``.
        k: depths; one beyond the ranking is cut to it.
        score: the column that made the ranking.

    Returns:
        One row per depth: ``k``, ``found``, ``precision``, ``recall``, and what a random order
        gives on average: ``chance_precision`` (the prevalence), ``chance_recall`` (``k`` of all
        tokens). ``attrs["average_precision"]`` and ``attrs["chance"]`` are those of
        :func:`~workbench.diagnostics.discoveries.precision_recall`.

    Raises:
        WorkbenchError: none of the known tokens is in the ranking, or a depth is not positive.
    """
    if not k or min(k) < 1:
        raise WorkbenchError(f"precision at k needs depths of at least 1; got {tuple(k)}")
    curve = precision_recall(ranking, known, score)
    hit = ranking.sort_values("rank")["token_id"].isin(list(known)).to_numpy()
    depths = np.minimum(np.asarray(k), len(hit))
    hits = np.cumsum(hit)[depths - 1]
    table = pd.DataFrame(
        {"k": depths, "found": hits, "precision": hits / depths, "recall": hits / hit.sum()}
    )
    table["chance_precision"], table["chance_recall"] = hit.mean(), depths / len(hit)
    table.attrs |= curve.attrs
    return table


def last_word(text: Example) -> Example | None:
    """``text`` as a question: as it is where it has an answer, otherwise asked for its last word;
    ``None`` where it has fewer than two words.
    """
    if text.answer is not None:
        return text
    stripped = text.text.rstrip()
    start = len(stripped) - len(stripped.split()[-1]) if stripped else 0
    return (
        Example(stripped, (start, len(stripped)), None, text.item)
        if stripped[:start].strip()
        else None
    )


def token_shift(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: Sequence[int] | None = None,
    batch_size: int = 512,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """How far every token's own representation has moved: ``|h' - h| / |h|`` of the residual stream
    at the token behind BOS, after every block.

    Tokens that training hardly ever saw (bytes, rare fragments) move most under any change of the
    weights; give the ``tokens`` of a corpus to leave them out. Where the tokenizer has no BOS the
    token stands alone; the first position is an attention sink there, and small differences drown
    in its length.

    Args:
        base: before unlearning.
        unlearned: after it.
        tokenizer: of both.
        tokens: default is the vocabulary without special tokens.
        batch_size: tokens of a pass.
        progress: called after every batch.

    Returns:
        ``layer``, ``rank`` (in its layer, from 1), ``token_id``, ``token``, ``relative_shift``,
        ``z`` (robust z-score among the tokens of the layer), in the order of layers and ranks.

    Raises:
        WorkbenchError: a token does not exist, there is none, the models differ in vocabulary, or a
            stream is not finite.
        CaptureError: the architecture is not known.
    """
    ids = vocabulary(base, unlearned, tokenizer, tokens)
    parts: dict[int, list[Tensor]] = {}
    for number, moved in enumerate(_stream_shifts(base, unlearned, tokenizer, ids, batch_size), 1):
        for layer, (before, step) in moved.items():
            parts.setdefault(layer, []).append(
                step.norm(dim=1) / before.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            )
        progress(number, -(-len(ids) // batch_size))
    values = {layer: torch.cat(part).numpy() for layer, part in parts.items()}
    return _ranked(
        [({"layer": layer}, "relative_shift", value) for layer, value in values.items()],
        ids,
        tokenizer,
    )


def shift_words(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Texts = (),
    tokens: Sequence[int] | None = None,
    components: int = 1,
    top: int = 20,
    batch_size: int = 256,
) -> pd.DataFrame:
    """The words that the shift of the residual stream stands for, layer by layer.

    The directions are the leading eigenvectors of the uncentred second moment of ``h' - h``
    (uncentred: a shift that all rows share is a finding, not a nuisance), turned so that the mean
    shift has a positive component. They are read through the base's final norm and unembedding
    (:func:`~workbench.subspaces.compare.read_direction`): ``promoted`` is what unlearning has
    added, ``suppressed`` what it has taken away. A direction towards random vectors, as RMU steers,
    reads as noise.

    Args:
        base: before unlearning.
        unlearned: after it.
        tokenizer: of both.
        texts: where the shift is taken, on all tokens but the first; without texts, on ``[BOS,
            token]`` for every token.
        tokens: which tokens are read (and, without texts, run); default is the vocabulary without
            special tokens.
        components: directions of a layer.
        top: tokens on each side of a direction.
        batch_size: rows of a pass.

    Returns:
        ``layer``, ``component`` (0 is the leading one), ``share`` (of the summed squared shift
        along it), ``side``, ``rank``, ``token_id``, ``token``, ``logit`` (per unit length), ``z``
        (robust z-score of the logit among the tokens). A layer that has not moved has no row.

    Raises:
        WorkbenchError: see :func:`token_shift`.
        CaptureError: the architecture is not known.
    """
    ids = vocabulary(base, unlearned, tokenizer, tokens)
    return _table(
        list(_readings(base, unlearned, tokenizer, texts, ids, components, batch_size)),
        ids,
        tokenizer,
        top,
    )


def alone(
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: Sequence[int] | None = None,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Tokens at which the unlearned model, seen without its base, is out of line with the rest of
    the vocabulary.

    Weak evidence. Every model has outliers of its own (rare tokens, numbers, fragments of
    characters), and without the base nothing tells them from what unlearning did; methods that keep
    the statistics of their activations leave nothing to see. Try it on a base that has unlearned
    nothing before believing it.

    Args:
        unlearned: the checkpoint.
        tokenizer: its tokenizer.
        tokens: default is the vocabulary without special tokens.
        batch_size: tokens of a pass.

    Returns:
        ``measure`` (``norm`` of the residual stream at the token behind BOS after a block;
        ``entropy`` of the next token after it; ``loss`` of the token itself after BOS, both in
        nats; no ``loss`` without BOS), ``layer`` (-1 where there is none), ``rank`` (by absolute
        z-score, within measure and layer), ``token_id``, ``token``, ``value``, ``z`` (robust).

    Raises:
        WorkbenchError: a token does not exist, there is none, or a value is not finite.
        CaptureError: the architecture is not known.
    """
    ids = vocabulary(unlearned, unlearned, tokenizer, tokens)
    sites = _sites(unlearned)
    parts: dict[tuple[str, int], list[Tensor]] = {}
    with frozen(unlearned), torch.no_grad():
        for pairs in _pairs(tokenizer, ids, batch_size):
            collected = Collect()
            with Capture(unlearned, sites, collected, at=last_token):
                logits = (
                    unlearned(input_ids=pairs.to(unlearned.device), use_cache=False)
                    .logits[:, -1]
                    .float()
                )
            log_p = logits.log_softmax(-1)
            parts.setdefault(("entropy", -1), []).append(
                -(log_p.exp() * log_p).nan_to_num(0.0, neginf=0.0).sum(-1).cpu()
            )
            for layer, site in enumerate(sites):
                parts.setdefault(("norm", layer), []).append(
                    collected[site.name].float().norm(dim=1)
                )
        values = {place: torch.cat(part).numpy() for place, part in parts.items()}
        if tokenizer.bos_token_id is not None:
            first = (
                unlearned(
                    input_ids=torch.tensor([[tokenizer.bos_token_id]], device=unlearned.device),
                    use_cache=False,
                )
                .logits[0, -1]
                .float()
            )
            values["loss", -1] = (
                -first.log_softmax(-1)[torch.tensor(ids, device=first.device)].cpu().numpy()
            )
    measures = [
        ({"measure": measure, "layer": layer}, "value", value)
        for (measure, layer), value in sorted(values.items())
    ]
    return _ranked(measures, ids, tokenizer, absolute=True)


def _sites(model: PreTrainedModel) -> list[Site]:
    return [
        resolve(model, f"blocks.{layer}.hook_resid_post")[0] for layer in range(layer_count(model))
    ]


def _pairs(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], size: int
) -> Iterator[Tensor]:
    """``[rows 2]`` BOS and a token (``[rows 1]``, where there is no BOS), in batches."""
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if size < 1:
        raise WorkbenchError(f"a batch of {size} rows cannot be run; give batch_size of at least 1")
    yield from torch.tensor([[*front, token] for token in tokens], dtype=torch.long).split(size)


def _stream_shifts(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    size: int,
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Batch by batch, ``{layer: (h, h' - h)}`` ``[rows d_model]`` at the tokens behind BOS."""
    for pairs in _pairs(tokenizer, tokens, size):
        streams = []
        for model in (base, unlearned):
            collected, sites = Collect(), _sites(model)
            with frozen(model), Capture(model, sites, collected, at=last_token) as capture:
                capture.forward({"input_ids": pairs.to(model.device)})
            streams.append([collected[site.name].float() for site in sites])
        yield {
            layer: (before, after - before)
            for layer, (before, after) in enumerate(zip(*streams, strict=True))
        }


@dataclass(frozen=True, slots=True)
class _Reading:
    """One direction read: the ``logits`` ``[token]`` of the candidates."""

    layer: int
    component: int
    share: float
    logits: np.ndarray


class _Ids:
    """Stands in for a tokenizer where the reading of a direction is wanted as token ids, which tell
    apart what decodes to the same text.
    """

    def decode(self, ids: list[int]) -> Any:
        return ids[0]


def _readings(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    tokens: Sequence[int],
    components: int,
    size: int,
) -> Iterator[_Reading]:
    moments: dict[int, Moments] = {}
    if texts:
        for batch in batches(tokenizer, texts, size):
            with frozen(base), frozen(unlearned):
                before, after = (
                    streams(model, [batch.to(model.device)]) for model in (base, unlearned)
                )
            for layer, rows in before.items():
                moments.setdefault(layer, Moments()).update(after[layer] - rows)
    else:
        for moved in _stream_shifts(base, unlearned, tokenizer, tokens, size):
            for layer, (_, step) in moved.items():
                moments.setdefault(layer, Moments()).update(step)
    everything = base.get_input_embeddings().weight.shape[0]
    for layer, moment in moments.items():
        second = moment.covariance + torch.outer(moment.mean, moment.mean)
        if not bool(torch.isfinite(second).all()):
            raise WorkbenchError(
                f"the shift of the residual stream after block {layer} is not finite; is one of "
                "the two checkpoints damaged?"
            )
        values, vectors = torch.linalg.eigh(second)
        leading_values = values[-components:].flip(0)
        for component, value in enumerate(
            leading_values[
                leading_values > leading_values[0] * 1e-6
            ].tolist()  # a difference carries the streams' rounding
        ):
            direction = vectors[:, -1 - component]
            towards = direction if float(direction @ moment.mean) >= 0 else -direction
            read = read_direction(towards.float(), base, _Ids(), top=everything)  # type: ignore[arg-type]
            logits = read[read["side"] == "promoted"].set_index("token")["logit"]
            yield _Reading(
                layer,
                component,
                value / float(values.clamp(min=0).sum()),
                logits[list(tokens)].to_numpy(),
            )


def _table(
    readings: Sequence[_Reading],
    tokens: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    top: int,
) -> pd.DataFrame:
    """The ends of every reading, as :func:`shift_words` returns them."""
    ids, parts = np.asarray(tokens), []
    for reading in readings:
        order, z = np.argsort(-reading.logits, kind="stable"), robust_z(reading.logits)
        for side, chosen_tokens in (("promoted", order[:top]), ("suppressed", order[::-1][:top])):
            place = {
                "layer": reading.layer,
                "component": reading.component,
                "share": reading.share,
                "side": side,
                "rank": np.arange(1, len(chosen_tokens) + 1),
            }
            texts = [token_text(tokenizer, token) for token in ids[chosen_tokens].tolist()]
            parts.append(
                pd.DataFrame(
                    place
                    | {
                        "token_id": ids[chosen_tokens],
                        "token": texts,
                        "logit": reading.logits[chosen_tokens],
                        "z": z[chosen_tokens],
                    }
                )
            )
    columns = ["layer", "component", "share", "side", "rank", "token_id", "token", "logit", "z"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _ranked(
    measures: Sequence[tuple[dict[str, Any], str, np.ndarray]],
    tokens: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    absolute: bool = False,
) -> pd.DataFrame:
    """Tables of ``(place, name of the value, values [token])``, each ordered by the robust z-score
    (or its size) and numbered, one below the other.
    """
    texts, ids, parts = [token_text(tokenizer, token) for token in tokens], np.asarray(tokens), []
    for place, name, values in measures:
        if not np.isfinite(values).all():
            raise WorkbenchError(
                f"the {name} of token {ids[~np.isfinite(values)][0]} is not finite ({place}); is a "
                "checkpoint damaged?"
            )
        z = robust_z(values)
        order = np.argsort(-(np.abs(z) if absolute else z), kind="stable")
        part = {
            "rank": np.arange(1, len(order) + 1),
            "token_id": ids[order],
            "token": [texts[at] for at in order],
            name: values[order],
            "z": z[order],
        }
        parts.append(pd.DataFrame(place | part))
    return pd.concat(parts, ignore_index=True)
