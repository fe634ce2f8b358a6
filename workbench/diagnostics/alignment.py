"""Does a forget-token in a harmless question move the unlearned model towards the representation
that unlearning aimed at?

Huu-Tien et al. (arXiv 2501.19202) read unlearning as a backdoor: forget-tokens are triggers, the
target representation is the target label. If so, the stream of an unlearned model behind a
forget-token points along the target more than behind any other word, and more than the base's
stream on the same text does. Two ways to ask: :func:`alignment` compares texts with different words
in front; :func:`trigger_effect` compares the same query with and without the word, token by token.

The floor is a random direction. All means of cosines and projections here are linear in the target
``u``, ``value = <m, u>``; for ``u`` drawn uniformly from the sphere the value has mean 0 and
standard deviation ``|m| / sqrt(width)``, at most ``1 / sqrt(width)`` for a cosine. Tokens share the
direction, so more tokens do not lower it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics.positions import position_groups, shared_tail
from workbench.diagnostics.triggers import TRIGGER_ARMS
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import evaluating
from workbench.evaluation.statistics import bootstrap, by_fact
from workbench.hooks import layer_count, peek
from workbench.progress import ProgressCallback, quiet

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

ALIGNMENT_COLUMNS = [
    "layer",
    "arm",
    "group",
    "model",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "floor",
]
TARGET = ("target_cosine", "target_projection", "norm")
SHIFT = ("shift_cosine", "shift_projection", "shift_norm")
EFFECT = ("effect_cosine", "effect_projection", "effect_norm")


def _both(
    base: PreTrainedModel, unlearned: PreTrainedModel, batch: Batch, layers: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``(layer, h, h')``: the residual stream ``[batch pos width]`` of both models after every
    block, float64 on the CPU.
    """
    names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    with evaluating(base), evaluating(unlearned):
        streams = {
            "base": peek(base, batch.inputs, names),
            "unlearned": peek(unlearned, batch.inputs, names),
        }
    for layer, name in zip(layers, names, strict=True):
        before, after = (streams[model][name].cpu().double() for model in ("base", "unlearned"))
        if before.shape != after.shape:
            raise WorkbenchError(
                f"the streams of the two models are {before.shape[-1]} and {after.shape[-1]} wide; "
                "both must be of one architecture"
            )
        for model, stream in (("base", before), ("unlearned", after)):
            if not bool(torch.isfinite(stream[batch.attention_mask.bool().cpu()]).all()):
                raise WorkbenchError(
                    f"the stream of the {model} model after block {layer} is not finite on "
                    f"{batch.items[0]!r} and its batch; the model has diverged"
                )
        yield layer, before, after


def _known_layer(base: PreTrainedModel, unlearned: PreTrainedModel, layer: int) -> int:
    depth = layer_count(base)
    if layer_count(unlearned) != depth:
        raise WorkbenchError(
            f"the base has {depth} blocks and the unlearned model {layer_count(unlearned)}; both "
            "must be of one architecture"
        )
    if not 0 <= layer < depth:
        raise WorkbenchError(
            f"layer {layer} does not exist; this model has blocks 0 to {depth - 1}"
        )
    return layer


def estimated_target(
    base: PreTrainedModel, unlearned: PreTrainedModel, batches: Sequence[Batch], layer: int
) -> Float32[Tensor, " d_model"]:
    """The direction of unlearning where nobody wrote it down: the leading direction of ``h' - h``
    after block ``layer``, on the content tokens of forget texts.

    Leading means: the first right singular vector of the shifts, not centred, so that a shift that
    all tokens share counts; its sign is that of the mean shift. It is a fact about forget texts
    alone. How much of the shift it holds is what :func:`alignment` gives for those texts as
    ``shift_cosine``; a low value means that unlearning had no one direction there. Methods that
    move all text alike align the clean arm as well.

    Args:
        base: before unlearning.
        unlearned: after it.
        batches: forget texts.
        layer: index of the block.

    Returns:
        A unit vector.

    Raises:
        WorkbenchError: there is no text or no such layer, the models have different shapes or are
            not finite, or nothing moved.
    """
    _known_layer(base, unlearned, layer)
    second: Tensor | float = 0.0
    mean: Tensor | float = 0.0
    for batch in batches:
        for _, before, after in _both(base, unlearned, batch, [layer]):
            shift = (after - before)[batch.content_mask.cpu()]
            second, mean = second + shift.T @ shift, mean + shift.sum(0)
    if not isinstance(second, Tensor) or not isinstance(mean, Tensor):
        raise WorkbenchError("a target is estimated from forget texts, and none was given")
    if not float(second.trace()) > 0:
        raise WorkbenchError(
            f"the two models have the same stream after block {layer}, so unlearning has no "
            "direction there; choose a later layer"
        )
    direction = torch.linalg.eigh(second).eigenvectors[:, -1]
    return (direction * (-1 if float(mean @ direction) < 0 else 1)).float()


def _targets(
    base: PreTrainedModel, unlearned: PreTrainedModel, target: Mapping[int, Tensor] | Tensor
) -> dict[int, Tensor]:
    """The unit target of every layer that is measured, float64."""
    targets = (
        dict.fromkeys(range(layer_count(base)), target)
        if isinstance(target, Tensor)
        else dict(target)
    )
    if not targets:
        raise WorkbenchError(
            "no target was given; give one vector, or one for each layer that is to be measured"
        )
    width = base.get_input_embeddings().weight.shape[1]
    units = {}
    for layer, vector in sorted(targets.items()):
        vector = vector.detach().cpu().double()
        if (
            vector.shape != (width,)
            or not bool(torch.isfinite(vector).all())
            or not float(vector.norm()) > 0
        ):
            raise WorkbenchError(
                f"the target of layer {layer} must be a finite vector [{width}] other than zero; "
                f"got shape {list(vector.shape)}, norm {float(vector.norm()):.3g}"
            )
        units[_known_layer(base, unlearned, layer)] = vector / vector.norm()
    return units


class _Queries:
    """Means over the tokens of every query, query after query, for one cell of the table."""

    def __init__(self) -> None:
        self.items: dict[str, list[str]] = {}
        self.values: dict[str, list[np.ndarray]] = {}

    def add(self, metric: str, items: Sequence[str], rows: Tensor, values: Tensor) -> None:
        """``values`` ``[rows ...]`` of the queries ``rows`` ``[rows]`` of one batch; a query
        without a token adds nothing.
        """
        for row in rows.unique().tolist():
            self.items.setdefault(metric, []).append(items[row])
            self.values.setdefault(metric, []).append(values[rows == row].mean(0).numpy())

    def add_vectors(
        self, metrics: Sequence[str], items: Sequence[str], rows: Tensor, vectors: Tensor
    ) -> None:
        """Directions (a vector of length zero has none and is left out), the vectors ``[token,
        width]`` themselves, and their lengths, under these three names.
        """
        cosine, projection, norm = metrics
        lengths = vectors.norm(dim=1)
        some = lengths > 0
        self.add(cosine, items, rows[some], vectors[some] / lengths[some, None])
        self.add(projection, items, rows, vectors)
        self.add(norm, items, rows, lengths)

    def row(self, metric: str, unit: Tensor, seed: int) -> dict[str, float]:
        """Value, interval over facts, number of facts and floor of one metric; nothing but NaN
        where no query has a value.
        """
        if metric not in self.values:
            return {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0, "floor": np.nan}
        _, facts = by_fact(tuple(self.items[metric]), np.stack(self.values[metric], axis=-1))
        values, floor = (
            (facts, np.nan)
            if facts.ndim == 1
            else (unit.numpy() @ facts, float(np.linalg.norm(facts.mean(1))) / len(unit) ** 0.5)
        )
        return {**bootstrap(values, seed=seed)._asdict(), "floor": floor}


_Cells = dict[tuple[int, str, str, str], _Queries]  # by layer, arm, group and model


def alignment(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    arms: Mapping[str, Sequence[Batch]],
    target: Mapping[int, Float[Tensor, " d_model"]] | Float[Tensor, " d_model"],
    *,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """How far the residual streams of both models point along the target, by layer, arm and place
    of the token; the first token of a text (an attention sink) is left out.

    * ``target_cosine``, ``target_projection``, ``norm``: mean ``cos(h', u)``, ``<h', u>`` and
      ``|h'|`` of the unlearned model and, as the anchor on the same texts, of the base.
    * ``shift_cosine``, ``shift_projection``, ``shift_norm``: mean ``cos(h' - h, u)``, ``<h' - h,
      u>`` and ``|h' - h|``. A token that did not move has no shift cosine.

    Means are over the tokens of a query, then over the queries of a fact, then over facts;
    intervals are over facts.

    Args:
        base: before unlearning.
        unlearned: after it.
        arms: encoded arms of :func:`workbench.diagnostics.positions.mark_triggers`, all in one
            order and batch size; other names (``forget``) are texts that stand for themselves.
        target: one vector for all layers, or one for each layer to measure. RMU's is its control
            vector; see also :func:`estimated_target`.
        seed: of the intervals.
        progress: called after every batch.

    Returns:
        :data:`ALIGNMENT_COLUMNS`; ``group`` as in
        :func:`workbench.diagnostics.positions.position_groups` (groups without tokens are left
        out), ``floor`` the standard deviation of the value for a random target.

    Raises:
        WorkbenchError: there is no text, a target or layer does not fit, arms do not match, or a
            stream is not finite.
    """

    def collect(arm: str, number: int, batch: Batch, layers: Sequence[int], cells: _Cells) -> None:
        clean = arms["clean"][number] if arm in TRIGGER_ARMS[1:] and "clean" in arms else None
        content = batch.content_mask
        places = {
            group: (mask & content).cpu() for group, mask in position_groups(batch, clean).items()
        }
        for layer, before, after in _both(base, unlearned, batch, layers):
            for group, mask in places.items():
                rows, h, moved = mask.nonzero()[:, 0], before[mask], after[mask]
                if len(rows):
                    cells.setdefault((layer, arm, group, "base"), _Queries()).add_vectors(
                        TARGET, batch.items, rows, h
                    )
                    cell = cells.setdefault((layer, arm, group, "unlearned"), _Queries())
                    cell.add_vectors(TARGET, batch.items, rows, moved)
                    cell.add_vectors(SHIFT, batch.items, rows, moved - h)

    metrics = {"base": TARGET, "unlearned": TARGET + SHIFT}
    return _tabulate(
        _targets(base, unlearned, target), arms, list(arms), collect, metrics, seed, progress
    )


def trigger_effect(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    arms: Mapping[str, Sequence[Batch]],
    target: Mapping[int, Float[Tensor, " d_model"]] | Float[Tensor, " d_model"],
    *,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """What the word in front does to the *same* query: ``e = h(with the word) - h(without)`` on the
    query's own tokens, aligned at the end of the text.

    ``model`` is ``base`` (``e``: any word changes what follows), ``unlearned`` (``e'``) or
    ``difference`` (``e' - e``: what unlearning added). A shift that unlearning gave to all texts
    alike cancels here, which it does not in :func:`alignment`. Metrics: ``effect_cosine``,
    ``effect_projection`` (on the unit target) and ``effect_norm``.

    Args:
        base: before unlearning.
        unlearned: after it.
        arms: encoded arms of :func:`workbench.diagnostics.positions.mark_triggers`, ``clean`` among
            them; arms of other names are left out.
        target: as for :func:`alignment`.
        seed: of the intervals.
        progress: called after every batch.

    Returns:
        :data:`ALIGNMENT_COLUMNS`; ``group`` is ``after``.

    Raises:
        WorkbenchError: as for :func:`alignment`; or there is no clean arm, or nothing to compare
            with it.
    """
    if "clean" not in arms:
        raise WorkbenchError(
            f"the arms {', '.join(arms) or '(none)'} have no clean one, which the others are "
            "compared with"
        )

    def collect(arm: str, number: int, batch: Batch, layers: Sequence[int], cells: _Cells) -> None:
        clean = arms["clean"][number]
        tagged_tail, clean_tail = (mask.cpu() for mask in shared_tail(batch, clean))
        rows = tagged_tail.nonzero()[:, 0]
        for (layer, *tagged), (_, *plain) in zip(
            _both(base, unlearned, batch, layers),
            _both(base, unlearned, clean, layers),
            strict=True,
        ):
            effects = [
                with_word[tagged_tail] - without[clean_tail]
                for with_word, without in zip(tagged, plain, strict=True)
            ]
            for model, effect in (
                ("base", effects[0]),
                ("unlearned", effects[1]),
                ("difference", effects[1] - effects[0]),
            ):
                cells.setdefault((layer, arm, "after", model), _Queries()).add_vectors(
                    EFFECT, batch.items, rows, effect
                )

    measured = [arm for arm in arms if arm in TRIGGER_ARMS[1:]]
    if not measured:
        raise WorkbenchError(
            f"the arms {', '.join(arms)} hold none of {', '.join(TRIGGER_ARMS[1:])}, so there is "
            "no word whose effect could be measured"
        )
    metrics = dict.fromkeys(("base", "unlearned", "difference"), EFFECT)
    return _tabulate(
        _targets(base, unlearned, target), arms, measured, collect, metrics, seed, progress
    )


def _tabulate(
    units: Mapping[int, Tensor],
    arms: Mapping[str, Sequence[Batch]],
    measured: Sequence[str],
    collect: Callable[[str, int, Batch, Sequence[int], _Cells], None],
    metrics: Mapping[str, Sequence[str]],
    seed: int,
    progress: ProgressCallback,
) -> pd.DataFrame:
    for arm in measured:
        if not arms[arm]:
            raise WorkbenchError(f"arm {arm!r} holds no text")
        if arm in TRIGGER_ARMS[1:] and "clean" in arms and len(arms[arm]) != len(arms["clean"]):
            raise WorkbenchError(
                f"arm {arm!r} has {len(arms[arm])} batches and the clean arm {len(arms['clean'])}; "
                "encode both in the same order and batch size"
            )
    cells: _Cells = {}
    done, total = 0, sum(len(arms[arm]) for arm in measured)
    for arm in measured:
        for number, batch in enumerate(arms[arm]):
            collect(arm, number, batch, list(units), cells)
            done += 1
            progress(done, total)
    keys = ["layer", "arm", "group", "model"]
    rows = [
        {
            **dict(zip(keys, key, strict=True)),
            "metric": metric,
            **cell.row(metric, units[key[0]], seed),
        }
        for key, cell in sorted(cells.items(), key=lambda entry: entry[0][0])
        for metric in metrics[key[3]]
    ]
    return pd.DataFrame(rows, columns=ALIGNMENT_COLUMNS)
