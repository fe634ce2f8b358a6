"""The trigger scan: which single tokens break the unlearned model in harmless questions, where they
do not break its base?

Every token of a vocabulary is put into the same retain questions, and each model is compared with
itself on the questions as they are. What the token does to the unlearned model less what it does to
the base (a difference of differences: any token can hurt any model) is the token's rise. A
forget-token that acts like a backdoor trigger (Huu-Tien et al., arXiv 2501.19202) has a large one.
No forget set is needed; the null distribution comes from the tokens themselves, or from tokens that
are known to be harmless.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.attacks.gcg import before_answer, in_front, suffix_prompts
from workbench.attacks.soft_prompt import check_context, frozen
from workbench.data.records import Example, Texts, examples_of
from workbench.diagnostics.discoveries import benjamini_hochberg, p_values
from workbench.errors import WorkbenchError, unknown
from workbench.hooks import edit, layer_count, resolve
from workbench.hooks.sites import causal_lm, family
from workbench.progress import ProgressCallback, quiet

TokenPlace = Literal["front", "end"]
"""``front``: behind BOS, before the question. ``end``: between question and answer."""

SCAN_COLUMNS = (
    "rank",
    "token_id",
    "token",
    "rise",
    "rise_se",
    "base_rise",
    "accuracy_loss",
    "shift",
    "queries",
    "p",
    "q",
)


@dataclass(frozen=True, slots=True, eq=False)
class TriggerScan:
    """What :func:`scan_triggers` found.

    Attributes:
        table: one row per tested token, largest rise first, ties in the order of their ids:

            * ``rank`` (from 1), ``token_id``, ``token`` (its text);
            * ``rise``: nats per answer token, mean over the queries; ``rise_se``: its standard
              error over facts; ``base_rise``: what the token does to the base;
            * ``accuracy_loss``: loss of exact matches, as a share of the queries, unlearned less
              base;
            * ``shift``: relative length of the change of the residual stream that only the
              unlearned model shows;
            * ``queries`` that the token was tested in; ``p`` and ``q`` of the rise.
        null: the same columns, without ``rank``, ``p`` and ``q``, for the tokens that served as
            null; empty where the null is empirical.
        untested: ids of tokens that occur in every query already.
        queries: number of queries.
        facts: number of different facts among them.
        place: where the tokens stood.
        site: where the shift was read.
        base_nll: mean over the queries of the base's negative log-likelihood per answer token
            without any token inserted, nats.
        unlearned_nll: the same of the unlearned model.
        base_accuracy: share of the queries that the base answers exactly, without any token
            inserted.
        unlearned_accuracy: the same of the unlearned model. Where it is small there is little
            accuracy to lose.
    """

    table: pd.DataFrame
    null: pd.DataFrame
    untested: tuple[int, ...]
    queries: int
    facts: int
    place: TokenPlace
    site: str
    base_nll: float
    unlearned_nll: float
    base_accuracy: float
    unlearned_accuracy: float

    def __repr__(self) -> str:
        top = "".join(
            f", first {row.token!r} with {row.rise:+.3f} nats"
            for row in self.table.head(1).itertuples()
        )
        return (
            f"TriggerScan({len(self.table)} tokens in {self.queries} queries, place "
            f"{self.place!r}{top})"
        )

    def _repr_html_(self) -> str:
        null = f"{len(self.null)} null tokens" if len(self.null) else "an empirical null"
        caption = (
            f"{len(self.table):,} tokens in {self.queries} queries ({self.facts} facts), place "
            f"{self.place}, shift at {self.site}, p against {null}; without a token: base "
            f"{self.base_nll:.3f} nats, {self.base_accuracy:.0%} exact; unlearned "
            f"{self.unlearned_nll:.3f} nats, {self.unlearned_accuracy:.0%} exact"
        )
        return f"<p>{escape(caption)}</p>{shown(self.table.head(20))}"


def shown(table: pd.DataFrame) -> str:
    """``table`` as HTML: tokens quoted, so that spaces and control characters can be seen, and
    every text escaped.
    """
    quoted = table.assign(token=[repr(text) for text in table["token"]])
    return str(quoted.to_html(escape=True, index=False, float_format=lambda value: f"{value:.4g}"))


def scan_triggers(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Texts,
    *,
    tokens: Sequence[int] | None = None,
    null_tokens: Sequence[int] | None = None,
    place: TokenPlace = "front",
    site: str | None = None,
    batch_size: int = 256,
    progress: ProgressCallback = quiet,
) -> TriggerScan:
    r"""Put every token into every query and measure what it does to the unlearned model that it
    does not do to its base.

    .. math:: \mathrm{rise}(t) = \operatorname{mean}_q\ [\ell'_q(t) - \ell'_q] - [\ell_q(t) - \ell_q], \qquad
              \mathrm{shift}(t) = \operatorname{mean}_q\ \|[h'_q(t) - h'_q] - [h_q(t) - h_q]\| / \|h_q\|

    with :math:`\ell_q` the mean negative log-likelihood of the answer's tokens, :math:`h_q` the
    residual stream at the token that predicts the answer's first token, primes for the unlearned
    model, and :math:`(t)` for the query with the token in it. Both are exactly zero for a model
    against itself. ``accuracy_loss`` is the same difference of differences of exact matches (each
    answer token the most probable one under teacher forcing, the same event as greedy decoding
    giving the answer), with the sign turned.

    *Tokens* are ids, not words: a word with a space before it and one without are two tokens.
    ``front`` is what a stray word before a question does and leaves the question itself as it was;
    only there does the whole question see the token. ``end`` tests whether the token disturbs the
    step from question to answer; it is several times cheaper, since the question's key-value cache
    serves all tokens. A token behind the question breaks the sentence for both models; that is what
    the base is for. The shift is read at the token that predicts the answer in both places; at
    ``end`` this is the inserted token, beside the question's last token without it.

    *A token that a query holds already*, in its question or its answer, is not tested in that
    query: it has acted there without being inserted, so that the difference would measure a second
    copy, and a token of the answer gives the answer away.

    *p* is one-sided, of the rise alone (:func:`~workbench.diagnostics.discoveries.p_values`), and
    *q* its adjusted value over all tested tokens
    (:func:`~workbench.diagnostics.discoveries.benjamini_hochberg`); their assumptions are written
    there. Tokens share their queries, so their rises are dependent. A finding is a token that
    breaks the unlearned model more than most tokens do: that may be every name, not only a
    forgotten one; give null tokens of the same kind (retained names) to ask for more. The standard
    error speaks about other facts (queries of one fact are added up before they are squared) and
    takes the models as given.

    Args:
        base: the model before unlearning.
        unlearned: after it. Where the two come with tokenizers of their own, compare those with
            :func:`workbench.models.check_same_tokenizer` first.
        tokenizer: of both; fast.
        queries: harmless questions, e.g. of the retain set; those without an answer are left out.
        tokens: ids to test; by default all of the tokenizer's but the special ones and
            ``null_tokens``.
        null_tokens: ids of harmless tokens, for conformal p-values; default is an empirical null.
        place: where the token stands.
        site: one activation site of the residual stream. Default is the stream after the last
            block: whatever reaches the answer has to pass there, while a change that a later block
            makes is not seen in the middle.
        batch_size: rows (one token in one query each) of a forward pass. Rows of a batch have the
            same length; there is no padding.
        progress: called after every batch.

    Raises:
        WorkbenchError: no query has an answer, a query has nothing before its answer or is too long
            for the context, a token does not exist, there is no token, the two models do not embed
            the same vocabulary, the place or the batch size is impossible, ``site`` names several
            sites, or a loss is not finite.
        CaptureError: ``site`` does not exist, or the architecture has no names for the default
            (give a module path then).
    """  # noqa: E501
    if place not in get_args(TokenPlace):
        raise unknown("place of a token", place, get_args(TokenPlace))
    if batch_size < 1:
        raise WorkbenchError(
            f"a batch of {batch_size} rows cannot be run; give batch_size of at least 1"
        )
    tested = vocabulary(base, unlearned, tokenizer, tokens)
    null = [] if null_tokens is None else vocabulary(base, unlearned, tokenizer, null_tokens)
    if tokens is None:
        tested = sorted(set(tested) - set(null))
    if set(tested) & set(null):
        raise WorkbenchError(
            f"tokens {sorted(set(tested) & set(null))[:5]} are to be tested and to be null; a "
            "token can be one of the two"
        )
    answered_queries = [query for query in examples_of(queries) if query.answer is not None]
    if not answered_queries:
        raise WorkbenchError(
            f"a trigger scan needs harmless questions with answers; of {len(queries)} queries none "
            "has an answer"
        )
    site_name = site or f"blocks.{layer_count(base) - 1}.hook_resid_post"
    groups, held = _groups(tokenizer, answered_queries, place)
    for model in (base, unlearned):
        if len(resolve(model, site_name)) != 1:
            raise WorkbenchError(
                f"the shift is read at one site, and {site_name!r} names "
                f"{len(resolve(model, site_name))}; name one layer"
            )
        check_context(
            model, max(group.length for group in groups), "the queries with a token inserted"
        )
    measured = _measure(
        {"base": base, "unlearned": unlearned},
        tested + null,
        groups,
        site_name,
        batch_size,
        place == "end",
        progress,
    )
    apart = np.stack([~np.isin(tested + null, list(ids)) for ids in held], axis=1)
    facts = [query.item or f"query/{number}" for number, query in enumerate(answered_queries)]
    every = _summary(measured, apart, facts, tested + null, tokenizer)
    usable = every["queries"] > 0
    table = every[usable & ~every["token_id"].isin(null)].sort_values(
        ["rise", "token_id"], ascending=[False, True], ignore_index=True
    )
    calm = every[usable & every["token_id"].isin(null)].reset_index(drop=True)
    table["p"] = p_values(table["rise"].to_numpy(), calm["rise"].to_numpy() if null else None)
    table["q"] = benjamini_hochberg(table["p"].to_numpy())
    table["rank"] = np.arange(1, len(table) + 1)
    untested = tuple(every.loc[~usable, "token_id"].tolist())
    clean = {
        name: float(measured[name].mean())
        for name in ("base_nll", "unlearned_nll", "base_accuracy", "unlearned_accuracy")
    }
    return TriggerScan(
        table[list(SCAN_COLUMNS)],
        calm,
        untested,
        len(answered_queries),
        len(set(facts)),
        place,
        site_name,
        **clean,
    )


def vocabulary(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[int] | None = None,
) -> list[int]:
    """The ids in ``chosen``, each once; by default of all tokens that are no special ones (BOS,
    EOS, padding, chat marks).

    Raises:
        WorkbenchError: an id does not exist, there is none, or the two models do not embed the same
            number of tokens in the same width, or fewer than the tokenizer has.
    """
    ids = set(tokenizer.get_vocab().values())
    shapes = [tuple(model.get_input_embeddings().weight.shape) for model in (base, unlearned)]
    if shapes[0] != shapes[1] or max(ids) >= shapes[0][0]:
        raise WorkbenchError(
            f"the base embeds {shapes[0][0]} tokens in {shapes[0][1]} coordinates, the unlearned "
            f"model {shapes[1][0]} in {shapes[1][1]}, and the tokenizer's largest id is "
            f"{max(ids)}; give two checkpoints of the same model with their tokenizer"
        )
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    candidates = sorted(ids - special) if chosen is None else list(dict.fromkeys(map(int, chosen)))
    wrong = [token for token in candidates if token not in ids]
    if wrong or not candidates:
        raise WorkbenchError(
            f"token {wrong[0]} is not in the vocabulary, whose ids end at {max(ids)}"
            if wrong
            else "there is no token to look at: the list is empty"
        )
    return candidates


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token as it continues a sentence: with the space in front of it that many
    decoders swallow. A part of a character is shown as the tokenizer spells it.
    """
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if "\ufffd" in text:
        return piece
    return f" {text}" if piece[:1] in ("▁", "Ġ") and not text.startswith(" ") else text


@dataclass(frozen=True, slots=True)
class _Group:
    """Queries of one shape: ``before`` stands before the token, ``after`` behind it, and then the
    answer ``target``: all ``[items pos]``.
    """

    index: list[int]
    before: Tensor
    after: Tensor
    target: Tensor

    @property
    def length(self) -> int:
        """Tokens that a pass reads; the answer's last one predicts nothing that counts."""
        return self.before.shape[1] + self.after.shape[1] + self.target.shape[1]


def _groups(
    tokenizer: PreTrainedTokenizerBase, queries: Sequence[Example], place: TokenPlace
) -> tuple[list[_Group], list[set[int]]]:
    """The queries by shape, and for each query the tokens that it holds."""
    prompts = suffix_prompts(tokenizer, queries, in_front if place == "front" else before_answer)
    by_shape: dict[tuple[int, int, int], list[int]] = {}
    for number, prompt in enumerate(prompts):
        if not prompt.before and not prompt.after:
            raise WorkbenchError(
                f"nothing comes before the answer of {queries[number].text[:60]!r}, so that it has "
                "no probability; give a question"
            )
        by_shape.setdefault((len(prompt.before), len(prompt.after), len(prompt.target)), []).append(
            number
        )

    def stacked(index: list[int], part: str) -> Tensor:
        return torch.tensor(
            [getattr(prompts[number], part) for number in index], dtype=torch.long
        ).reshape(len(index), -1)

    groups = [
        _Group(index, stacked(index, "before"), stacked(index, "after"), stacked(index, "target"))
        for index in by_shape.values()
    ]
    return groups, [{*prompt.before, *prompt.after, *prompt.target} for prompt in prompts]


_Run = Callable[..., tuple[Tensor, Tensor, Tensor]]


@contextmanager
def _answering(model: PreTrainedModel, site: str) -> Iterator[_Run]:
    """``run(ids, target, cache=None)`` for rows that end before their answer's last token: the mean
    negative log-likelihood of the answer ``[rows]`` float64, whether it is exact ``[rows]``, and
    the rows of ``site`` at the token that predicts its first token ``[rows width]`` float32.

    The output layer runs only where the answer is predicted, by transformers' own
    ``logits_to_keep``, so that what a family does to its logits (scales, caps) stays in place; of a
    model without it, the same logits are read among all.
    """
    slim = _slim(model)
    # The kept positions are a strided view, for which PyTorch would multiply row by row (bmm):
    # about half the speed of the whole scan.
    changes: dict[str, Callable[[Tensor], Tensor]] = (
        {"unembed.hook_in": Tensor.contiguous} if slim else {}
    )
    stream_seen: list[Tensor] = []

    def look(
        stream: Tensor,
        # an edit that changes nothing: unlike a capture, it takes a pass over a cache that other
        # rows have filled
    ) -> Tensor:
        stream_seen[:] = [stream]
        return stream

    def run(ids: Tensor, target: Tensor, cache: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        count, target = target.shape[1], target.to(model.device)
        inputs: dict[str, Any] = {"logits_to_keep": count} if slim else {}
        if cache is not None:
            inputs["past_key_values"] = cache
        logits = (
            model(input_ids=ids.to(model.device), use_cache=cache is not None, **inputs)
            .logits[:, -count:]
            .float()
        )
        nll = logits.logsumexp(-1) - logits.gather(-1, target[..., None])[..., 0]
        return (
            nll.double().mean(1),
            (logits.argmax(-1) == target).all(1),
            stream_seen[0][:, -count].float(),
        )

    with frozen(model), torch.no_grad(), edit(model, {**changes, site: look}):
        yield run


def _slim(model: PreTrainedModel) -> bool:
    return (
        family(model) is not None
        and "logits_to_keep" in inspect.signature(causal_lm(model)[1].forward).parameters
    )


def _prefix(model: PreTrainedModel, ids: Tensor) -> Any:
    """The key-value cache of ``ids`` ``[items pos]``, or ``None`` where the architecture is not
    known to keep its whole past in one.
    """
    if not ids.shape[1] or family(model) is None:
        return None
    return model(
        input_ids=ids.to(model.device),
        use_cache=True,
        **({"logits_to_keep": 1} if _slim(model) else {}),
    ).past_key_values


def _spread(cache: Any, rows: Tensor) -> Any:
    """A cache that begins as the entries ``rows`` of ``cache``, which is left as it is."""
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    fresh.batch_select_indices(rows)  # puts new tensors into the copied layers
    return fresh


def _measure(
    models: Mapping[str, PreTrainedModel],
    tokens: Sequence[int],
    groups: Sequence[_Group],
    site: str,
    size: int,
    reuse: bool,
    progress: ProgressCallback,
) -> dict[str, np.ndarray]:
    """``rise``, ``base_rise``, ``accuracy_loss`` and ``shift`` ``[tokens items]`` float32; of both
    models ``.._nll`` and ``.._accuracy`` without a token, ``[items]``.
    """
    count = sum(len(group.index) for group in groups)
    measured: dict[str, np.ndarray] = {
        name: np.zeros((len(tokens), count), dtype=np.float32)
        for name in ("rise", "base_rise", "accuracy_loss", "shift")
    }
    measured |= {
        f"{model}_{name}": np.zeros(count) for model in models for name in ("nll", "accuracy")
    }
    ids, done = torch.tensor(tokens, dtype=torch.long), 0
    total = sum(-(-len(group.index) * len(tokens) // size) for group in groups)
    with ExitStack() as stack:
        runs = {
            name: stack.enter_context(_answering(model, site)) for name, model in models.items()
        }
        for group in groups:
            index, behind = np.array(group.index), torch.cat([group.after, group.target[:, :-1]], 1)
            caches = {
                name: _prefix(model, group.before) if reuse else None
                for name, model in models.items()
            }
            plain: dict[str, list[Tensor]] = {}
            for name, run in runs.items():
                rows = zip(
                    torch.cat([group.before, behind], 1).split(size),
                    group.target.split(size),
                    strict=True,
                )
                plain[name] = [
                    torch.cat(parts) for parts in zip(*(run(*row) for row in rows), strict=True)
                ]
                measured[f"{name}_nll"][index], measured[f"{name}_accuracy"][index] = (
                    plain[name][0].cpu().numpy(),
                    plain[name][1].cpu().numpy(),
                )
                _check_finite(plain[name][0], name, "the queries without a token")
            length = plain["base"][2].norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).cpu()
            for flat in torch.arange(len(index) * len(tokens)).split(size):
                query, token = (
                    flat // len(tokens),
                    flat % len(tokens),
                )  # all tokens of a query in turn
                nll, right, moved = {}, {}, {}
                for name, run in runs.items():
                    parts = [ids[token][:, None], behind[query]]
                    cache = (
                        None
                        if caches[name] is None
                        else _spread(caches[name], query.to(models[name].device))
                    )
                    with_token = run(
                        torch.cat(parts if cache is not None else [group.before[query], *parts], 1),
                        group.target[query],
                        cache,
                    )
                    _check_finite(
                        with_token[0],
                        name,
                        f"the queries with one of the tokens {tokens[int(token[0])]} to "
                        f"{tokens[int(token[-1])]}",
                    )
                    model_queries = query.to(models[name].device)
                    nll[name] = (with_token[0] - plain[name][0][model_queries]).cpu()
                    right[name] = (
                        with_token[1].float() - plain[name][1][model_queries].float()
                    ).cpu()
                    moved[name] = (with_token[2] - plain[name][2][model_queries]).cpu()
                cells = token.numpy(), index[query.numpy()]
                measured["rise"][cells] = (nll["unlearned"] - nll["base"]).numpy()
                measured["base_rise"][cells] = nll["base"].numpy()
                measured["accuracy_loss"][cells] = (right["base"] - right["unlearned"]).numpy()
                measured["shift"][cells] = (
                    (moved["unlearned"] - moved["base"]).norm(dim=1) / length[query]
                ).numpy()
                done += 1
                progress(done, total)
    return measured


def _check_finite(nll: Tensor, model: str, where: str) -> None:
    if not bool(torch.isfinite(nll).all()):
        raise WorkbenchError(
            f"the {model} model gives losses that are not finite on {where}; a scan needs finite "
            "logits (is the checkpoint damaged, or its dtype too narrow?)"
        )


def _summary(
    measured: Mapping[str, np.ndarray],
    apart: np.ndarray,
    facts: Sequence[str],
    tokens: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> pd.DataFrame:
    """Means over the queries that do not hold the token (``apart`` ``[tokens items]``), and the
    standard error of the rise over facts: the linearised one of a mean over clusters, ``sqrt(G / (G
    - 1) sum_g (sum_(q in g) (d_q - mean))^2) / n``.
    """
    counts = apart.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = {
            name: np.where(apart, measured[name], 0).sum(1, dtype=np.float64) / counts
            for name in ("rise", "base_rise", "accuracy_loss", "shift")
        }
        names = list(dict.fromkeys(facts))
        member = np.eye(len(names))[[names.index(fact) for fact in facts]]  # [query, fact]
        remaining = np.where(apart, measured["rise"] - means["rise"][:, None], 0) @ member
        clusters = (apart @ member > 0).sum(1)
        error = np.sqrt(clusters / (clusters - 1) * np.square(remaining).sum(1)) / counts
    error[clusters < 2] = np.nan
    texts = [token_text(tokenizer, token) for token in tokens]
    return pd.DataFrame(
        {"token_id": list(tokens), "token": texts, "rise": means["rise"], "rise_se": error}
        | {k: means[k] for k in ("base_rise", "accuracy_loss", "shift")}
        | {"queries": counts}
    )
