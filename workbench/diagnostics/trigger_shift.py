"""What a stray word in front of a query does at one site: the shift of every later token, and how
logits and loss answer to it.

The rows of :func:`shift_rows` and the numbers of :func:`responses` are what
:mod:`workbench.diagnostics.trigger_theory` holds against the assumptions of Huu-Tien et al. (arXiv
2501.19202). The clean query is the end of the tagged one (template, then query), so the two are
aligned token by token from the right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from workbench.attacks.soft_prompt import frozen
from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import next_token_logits
from workbench.hooks import edit, peek, resolve
from workbench.progress import ProgressCallback, quiet

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Real


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ShiftRows:
    """The shift that a word in front causes, token by token.

    Attributes:
        shift: ``z(tagged) - z(clean)``.
        clean: ``z(clean)``.
        query: whole number of the query that the token stands in; tokens of one query are not
            independent.
        word: whole number of the word in front, or ``None`` where it is not known.

    Raises:
        WorkbenchError: the shapes do not fit, there is no row, or a number is not finite.
    """

    shift: Float[Tensor, "rows width"]
    clean: Float[Tensor, "rows width"]
    query: Int[Tensor, " rows"]
    word: Int[Tensor, " rows"] | None = None

    def __post_init__(self) -> None:
        count = len(self.shift)
        labels = [self.query] if self.word is None else [self.query, self.word]
        if (
            self.shift.ndim != 2
            or not self.shift.numel()
            or self.clean.shape != self.shift.shape
            or any(label.shape != (count,) for label in labels)
        ):
            raise WorkbenchError(
                "shift and clean are [row, width] with at least one row, query and word [row]; "
                f"got {list(self.shift.shape)}, {list(self.clean.shape)} and "
                f"{', '.join(str(list(label.shape)) for label in labels)}"
            )
        for name in ("shift", "clean"):
            broken = int((~torch.isfinite(getattr(self, name))).any(1).sum())
            if broken:
                raise WorkbenchError(
                    f"{name} is not finite in {broken} of {count} rows; did the model diverge?"
                )

    def __repr__(self) -> str:
        return (
            f"ShiftRows({len(self.shift)} tokens of {len(self.query.unique())} queries, width "
            f"{self.shift.shape[1]})"
        )


def aligned(
    clean: Batch, tagged: Batch
) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch other_pos"]]:
    """Where the tokens of the clean queries stand in either batch: two masks with the same number
    of tokens in every row.

    The first token of a clean query (BOS, or where there is none a first word whose token depends
    on what stands before it) is left out.

    Args:
        clean: the queries.
        tagged: the same queries in the same order, each behind a template.

    Raises:
        WorkbenchError: the rows are different queries, nothing was put in front of one, or its
            tokens are others than without the template.
    """
    if clean.items != tagged.items:
        raise WorkbenchError(
            "clean and tagged batches hold the same queries in the same order; got "
            f"{len(clean.items)} rows ({', '.join(clean.items[:3])}, ...) and "
            f"{len(tagged.items)} ({', '.join(tagged.items[:3])}, ...); encode both arms with one "
            "batch size"
        )
    inside, real = clean.content_mask, tagged.attention_mask.bool()
    suffix = real & (real.flip(1).cumsum(1).flip(1) <= inside.sum(1, keepdim=True))
    added = real.sum(1) - clean.attention_mask.sum(1)
    if bool((added < 1).any()):
        row = int((added < 1).nonzero()[0])
        raise WorkbenchError(
            f"nothing stands in front of query {clean.items[row]!r}: the tagged row is "
            f"{int(added[row])} tokens longer than the clean one"
        )
    differs = clean.input_ids[inside] != tagged.input_ids[suffix]
    if bool(differs.any()):
        row = int(inside.nonzero()[differs][0, 0])
        ids = [
            batch.input_ids[row][mask[row]].tolist()
            for batch, mask in ((clean, inside), (tagged, suffix))
        ]
        raise WorkbenchError(
            f"query {clean.items[row]!r} has other tokens behind the template than alone "
            f"({ids[0][:8]}... against {ids[1][:8]}...); use a template that "
            "ends where a token ends"
        )
    return inside, suffix


def shift_rows(
    model: PreTrainedModel,
    clean: Sequence[Batch],
    tagged: Sequence[Batch],
    site: str,
    *,
    tokens: Literal["all", "predicting"] = "all",
) -> ShiftRows:
    """The shift at ``site`` of the tokens of the queries, caused by the word in front.

    Queries are told apart by their fact (``Batch.items``), words by the tokens that stand in front
    of the query. The same queries in the same order get the same numbers for every model and arm.

    Args:
        model: whichever; it is run in evaluation mode.
        clean: the queries.
        tagged: the same queries behind a template, in batches of the same sizes.
        site: one activation site, ``[batch pos width]``, for example ``blocks.3.hook_resid_post``.
        tokens: ``all`` aligned ones, or those from which a target token is ``predicting`` (where
            the theory's latent stands). All tokens together mix places near to the word and far
            from it, and a mixture of scales has heavy tails of its own.

    Raises:
        WorkbenchError: the arms cannot be aligned (see :func:`aligned`), a query has no target
            token to predict, or an activation is not finite.
        hooks.CaptureError: there is no such site.
    """
    name = _one_site(model, site)
    shifts, cleans, queries, words = [], [], [], []
    query_numbers: dict[str, int] = {}
    word_numbers: dict[tuple[int, ...], int] = {}
    with frozen(model):
        for clean_batch, tagged_batch in _pairs(clean, tagged):
            inside, suffix = aligned(clean_batch, tagged_batch)
            front = tagged_batch.attention_mask.bool() & ~suffix
            if tokens == "predicting":
                inside, suffix = _predicting(clean_batch, inside, suffix)
            before = peek(model, clean_batch.inputs, name)[name][inside].float().cpu()
            shifts.append(
                peek(model, tagged_batch.inputs, name)[name][suffix].float().cpu() - before
            )
            cleans.append(before)
            counts = inside.sum(1).cpu()
            numbers = [
                query_numbers.setdefault(item, len(query_numbers)) for item in clean_batch.items
            ]
            queries.append(torch.tensor(numbers).repeat_interleave(counts))
            fronts = [
                tuple(ids[mask].tolist())
                for ids, mask in zip(tagged_batch.input_ids, front, strict=True)
            ]
            words.append(
                torch.tensor(
                    [word_numbers.setdefault(ids, len(word_numbers)) for ids in fronts]
                ).repeat_interleave(counts)
            )
    return ShiftRows(torch.cat(shifts), torch.cat(cleans), torch.cat(queries), torch.cat(words))


def _predicting(clean: Batch, inside: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
    """Of the aligned tokens, those whose next token is a target of the loss."""
    counted = F.pad(clean.target_mask[:, 1:], (0, 1)) & inside  # position t predicts token t + 1
    if not bool(counted.any(1).all()):
        row = int((~counted.any(1)).nonzero()[0])
        raise WorkbenchError(
            f"query {clean.items[row]!r} has no target token behind an aligned one, so it has no "
            "loss; mark its answer or lengthen it"
        )
    behind = torch.zeros_like(suffix)
    behind[suffix] = counted[inside]
    return counted, behind


def _one_site(model: PreTrainedModel, site: str) -> str:
    found = resolve(model, site)
    if len(found) != 1 or found[0].is_gradient:
        raise WorkbenchError(
            f"site {site!r} must name one activation; it names "
            f"{', '.join(one.name for one in found[:4])}"
        )
    return found[0].name


def _pairs(clean: Sequence[Batch], tagged: Sequence[Batch]) -> list[tuple[Batch, Batch]]:
    if not clean or len(clean) != len(tagged):
        raise WorkbenchError(
            "clean and tagged hold the same queries in batches of the same sizes, at least one; "
            f"got {len(clean)} and {len(tagged)} batches"
        )
    return list(zip(clean, tagged, strict=True))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Responses:
    r"""How logits and loss of every query answer to its shift, truly and by Taylor's formula around
    the clean query.

    ``z`` is the site's tensor on the aligned tokens of one query, ``eps`` its shift, ``f`` the rest
    of the model. The loss is the mean over the query's target tokens, in nats per token; logits are
    taken where those tokens are predicted, minus their mean over the vocabulary, which changes no
    probability. *At the site* means ``f(z + eps)``, the clean query with nothing in front and the
    shift put in: what the theory speaks of. In the tagged query later blocks also attend to the
    word itself, past the site.

    Attributes:
        items: the fact of every query.
        gradients: ``g``, the loss's gradient at ``z``; zero outside the aligned tokens.
        shifts: ``eps``, likewise.
        coordinates: aligned tokens times width.
        change: loss of the tagged query minus that of the clean one.
        change_at_site: ``loss(z + eps) - loss(z)``.
        first_order: ``g . eps``.
        second_order: ``g . eps + eps^T H eps / 2``.
        hessian_trace: Hutchinson's estimate of ``tr H``, the loss's Hessian at ``z``.
        logit_square: squared length of the true logit shift, summed over target tokens.
        logit_square_first_order: that of ``J eps``.
        jacobian_square: Hutchinson's estimate of ``tr J J^T``, summed over target tokens.
        logit_cosine: cosine of ``J eps`` and the true logit shift, mean over target tokens.
        logit_cosine_at_site: cosine of ``J eps`` and ``f(z + eps) - f(z)``.
    """

    items: tuple[str, ...]
    gradients: Float[Tensor, "items pos width"]
    shifts: Float[Tensor, "items pos width"]
    coordinates: Real[np.ndarray, " items"]
    change: Float[np.ndarray, " items"]
    change_at_site: Float[np.ndarray, " items"]
    first_order: Float[np.ndarray, " items"]
    second_order: Float[np.ndarray, " items"]
    hessian_trace: Float[np.ndarray, " items"]
    logit_square: Float[np.ndarray, " items"]
    logit_square_first_order: Float[np.ndarray, " items"]
    jacobian_square: Float[np.ndarray, " items"]
    logit_cosine: Float[np.ndarray, " items"]
    logit_cosine_at_site: Float[np.ndarray, " items"]

    def __repr__(self) -> str:
        return (
            f"Responses({len(self.items)} queries, mean loss change {self.change.mean():.3g} nats "
            "per token)"
        )


def responses(
    model: PreTrainedModel,
    clean: Sequence[Batch],
    tagged: Sequence[Batch],
    site: str,
    *,
    probes: int = 8,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> Responses:
    """Logit shift, loss change and their Taylor predictions for every query.

    Jacobian-vector products are forward-mode, Hessian-vector products two backward passes;
    attention runs in PyTorch's MATH kernel, the only one with both. Cost per batch: about ``2 *
    probes + 8`` passes. Weights, gradients, modes and flags are left as found.

    Args:
        model: in float32 or better.
        clean: the queries; a query's target tokens are those of ``Batch.target_mask`` whose
            predecessor is aligned (``encode(..., targets="answer")`` for answers alone).
        tagged: the same queries behind a template, in batches of the same sizes.
        site: one activation site.
        probes: random sign vectors for both traces (Hutchinson 1990).
        seed: of the probes.
        progress: called after every batch.

    Raises:
        WorkbenchError: the arms cannot be aligned, a query has no target token, the model is in
            half precision, or ``probes`` is not positive.
    """
    name, pairs = _one_site(model, site), _pairs(clean, tagged)
    if model.dtype not in (torch.float32, torch.float64) or probes < 1:
        raise WorkbenchError(
            "second derivatives need a model in float32 or better and at least one probe; got "
            f"{model.dtype} and {probes}; open it with dtype=torch.float32"
        )
    generator = torch.Generator().manual_seed(seed)
    parts: list[dict[str, Tensor]] = []
    with frozen(model), sdpa_kernel(SDPBackend.MATH):
        for number, (clean_batch, tagged_batch) in enumerate(pairs):
            parts.append(_respond(model, clean_batch, tagged_batch, name, probes, generator))
            progress(number + 1, len(pairs))
    longest = max(part["gradients"].shape[1] for part in parts)
    wide: dict[str, Any] = {
        key: torch.cat(
            [F.pad(part[key], (0, 0, 0, longest - part[key].shape[1])) for part in parts]
        )
        for key in ("gradients", "shifts")
    }
    flat: dict[str, Any] = {
        key: torch.cat([part[key] for part in parts]).double().cpu().numpy()
        for key in parts[0]
        if key not in wide
    }
    return Responses(
        tuple(item for clean_batch in clean for item in clean_batch.items), **wide, **flat
    )


def _respond(
    model: PreTrainedModel,
    clean: Batch,
    tagged: Batch,
    site: str,
    probes: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    inside, suffix = aligned(clean, tagged)
    predicting, behind = (mask[:, :-1] for mask in _predicting(clean, inside, suffix))
    query = predicting.nonzero()[:, 0]
    share = 1 / predicting.sum(1)
    targets = clean.input_ids[:, 1:][predicting]

    def total(values: Tensor) -> Tensor:
        return torch.zeros(clean.size, dtype=torch.float64, device=values.device).index_add_(
            0, query, values.double()
        )

    def loss(logits: Tensor) -> Tensor:
        return total(F.cross_entropy(logits, targets, reduction="none")) * share

    def onward(added: Tensor) -> Tensor:
        with edit(model, {site: lambda tensor: tensor + added}):
            return _centred(next_token_logits(model, clean)[predicting])

    before = peek(model, clean.inputs, site)[site]
    shift = torch.zeros_like(before)
    shift[inside] = peek(model, tagged.inputs, site)[site][suffix] - before[inside]
    nothing, mask = torch.zeros_like(before), inside[..., None].to(before)

    with torch.no_grad():
        truth = _centred(next_token_logits(model, tagged)[behind])
        unshifted, moved = onward(nothing), onward(shift)
        linear = _pushed(onward, nothing, shift)
        jacobian = torch.zeros(clean.size, dtype=torch.float64, device=before.device)
        for _ in range(probes):
            jacobian += (
                total(
                    _pushed(onward, nothing, _signs(mask, before, generator))
                    .double()
                    .square()
                    .sum(1)
                )
                / probes
            )

    added = nothing.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(onward(added)).sum(), added, create_graph=True)[0] * mask

    def curved(
        vector: Tensor,
    ) -> Tensor:  # v^T H v of every query; the queries of a batch do not see one another
        product = torch.autograd.grad((gradient * vector).sum(), added, retain_graph=True)[0]
        return (product.double() * vector.double()).sum((1, 2))

    trace = torch.stack([curved(_signs(mask, before, generator)) for _ in range(probes)]).mean(0)
    first = (gradient.detach().double() * shift.double()).sum((1, 2))
    return {
        "gradients": gradient.detach().float().cpu(),
        "shifts": shift.float().cpu(),
        "coordinates": inside.sum(1) * before.shape[-1],
        "change": loss(truth) - loss(unshifted),
        "change_at_site": loss(moved) - loss(unshifted),
        "first_order": first,
        "second_order": first + curved(shift) / 2,
        "hessian_trace": trace,
        "logit_square": total((truth - unshifted).double().square().sum(1)),
        "logit_square_first_order": total(linear.double().square().sum(1)),
        "jacobian_square": jacobian,
        "logit_cosine": total(_cosine(linear, truth - unshifted)) * share,
        "logit_cosine_at_site": total(_cosine(linear, moved - unshifted)) * share,
    }


def _pushed(function: Callable[[Tensor], Tensor], at: Tensor, vector: Tensor) -> Tensor:
    """``J v`` at ``at``, forward mode."""
    product: Tensor = torch.func.jvp(function, (at,), (vector,))[1]
    return product


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _signs(mask: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like) * mask


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.double(), other.double()
    return (one * other).sum(1) / (
        one.norm(dim=1) * other.norm(dim=1)
    )  # not a number where one of the two is zero, instead of a made-up 0
