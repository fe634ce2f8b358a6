"""Linear probes: can a label still be read from the residual stream, and by the same readout as
before?

A probe is logistic regression on standardised coordinates of one block's stream, trained on some
subjects and judged on others. What it finds is *linearly decodable there*; that the model uses it
is another question. Every accuracy stands beside a control task (the same labels dealt anew among
the subjects; Hewitt and Liang 2019, arXiv 1909.03368, whose selectivity is accuracy minus control
accuracy), the most frequent label, and the ceiling that the split allows.

Transfer tells erased from rotated. Where a probe trained on the unlearned stream reads the label
but the base's probe no longer does, the label was moved to other coordinates (a rotation, a shift
or another scale: the base's standardisation is part of its probe), not erased.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics.lens import predicting_answer
from workbench.errors import WorkbenchError, unknown
from workbench.evaluation.losses import evaluating
from workbench.evaluation.statistics import bootstrap, by_fact, rate
from workbench.hooks import Capture, Collect, layer_count, resolve
from workbench.hooks.tokens import custom
from workbench.progress import ProgressCallback, quiet
from workbench.tables import Table

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Shaped

At = Literal["prompt", "subject"]
"""Where a probe reads: the last token of the prompt, which predicts the answer, or the last token
of the subject.
"""

CONTROL_DRAWS = 3
"""Control tasks per probe; their accuracy is a mean over them."""

PROBE_COLUMNS = ["layer", "measure", "arm", "value", "low", "high", "n", "converged"]
_STEPS = 1000  # of L-BFGS


def prompt_streams(
    model: PreTrainedModel, batches: Sequence[Batch], at: At = "prompt"
) -> dict[int, Float32[Tensor, "items d_model"]]:
    """The residual stream after every block, one row per example, in the order of the batches.

    Args:
        model: a causal LM of a known family.
        batches: at least one.
        at: see :data:`At`.

    Raises:
        WorkbenchError: there is no batch, an example has no answer (or no subject), or ``at`` is
            unknown.
    """
    if at not in get_args(At):
        raise unknown("position of a probe", at, get_args(At))
    if not batches:
        raise WorkbenchError(
            "a probe has no text to read: the set is empty; give at least one batch"
        )
    sites = [
        resolve(model, f"blocks.{layer}.hook_resid_post")[0] for layer in range(layer_count(model))
    ]
    collected = Collect()
    with evaluating(model), Capture(model, sites, collected) as capture:
        for batch in batches:
            mask = predicting_answer(batch) if at == "prompt" else _last_of_subject(batch)
            capture.at(custom(mask.to(model.device)))
            capture.forward(batch.to(model.device).inputs)
    return {layer: collected[site.name].float() for layer, site in enumerate(sites)}


def _last_of_subject(batch: Batch) -> Tensor:
    subject = batch.subject_mask
    for item, has_subject in zip(batch.items, subject.any(1).tolist(), strict=True):
        if not has_subject:
            raise WorkbenchError(
                f"the text of {item!r} names no subject; give examples with a subject, or probe "
                "the end of the prompt"
            )
    return subject & (subject.cumsum(1) == subject.sum(1, keepdim=True))


def probe_by_layer(
    streams: Mapping[int, Float[Tensor, "items d_model"]],
    labels: Sequence[str] | Shaped[np.ndarray, " items"],
    groups: Sequence[str] | Shaped[np.ndarray, " items"],
    *,
    kinds: Sequence[str] | Shaped[np.ndarray, " items"] | None = None,
    scored: Bool[np.ndarray, " items"] | None = None,
    folds: int = 5,
    c: float = 1.0,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """Accuracy of a linear probe after every block, on subjects that it was not trained on.

    Subjects are dealt into folds, those of one label in turn; every row is judged once, by the
    probe trained on the other folds. Arms:

    * ``own``: the probe.
    * ``control``: the same probe when labels have been permuted among the subjects, within their
      kind; mean over :data:`CONTROL_DRAWS` permutations. Hewitt and Liang's control shares word
      types between training and test, and so measures memorising. Here no subject is on both sides:
      the control shows what the frequencies of labels, and the kind of question, give away.
    * ``majority``: always answering the most frequent label of the kind, counted over all rows (it
      knows the frequencies, which makes it hard to beat).
    * ``ceiling``: share of rows whose label occurs in the training folds at all; a label that one
      subject alone has can never be right.

    ``selectivity`` (arm ``own``) is own minus control, paired by subject.

    Accuracy is the mean over subjects of the share of their rows that is right; intervals resample
    subjects (Wilson's where all or none are right). They take the probes as given: a probe from
    other training subjects would differ too.

    Args:
        streams: by layer, e.g. :func:`prompt_streams`.
        labels: of every row, e.g. ``[example.answer_text for example in examples]``.
        groups: the subject of every row; no subject is in training and in test.
        kinds: kind of every row (the relation asked for), where labels of several kinds are read at
            once; default is one kind.
        scored: the rows that count in the accuracies. All rows train, so that few forgotten
            subjects can be read by probes that have seen retained ones.
        folds: at most; no more than there are subjects.
        c: inverse strength of the L2 penalty (scikit-learn's default), the same for every block,
            model and arm. It is not tuned: tuning on the rows that are judged would leak them.
        seed: of the folds and of the control tasks.
        progress: called after every block.

    Returns:
        One row per block, measure (``accuracy``, ``selectivity``) and arm: :data:`PROBE_COLUMNS`.
        ``n`` counts subjects; ``converged`` is the share of fits that met the solver's tolerance.

    Raises:
        WorkbenchError: lengths differ, there are fewer than two labels or subjects, no row is
            scored, a stream holds NaN or infinity, or a setting is out of range.
    """
    rows = _checked(streams, labels, groups, kinds, scored, folds, c)
    tasks = [(rows.labels, _deal(rows.labels, rows.groups, rows.folds, seed))]
    for draw in range(CONTROL_DRAWS):
        permuted = _control(
            rows.labels, rows.groups, rows.kinds, np.random.default_rng([seed, draw])
        )
        tasks.append((permuted, _deal(permuted, rows.groups, rows.folds, seed)))
    fixed = {"majority": _majority(rows.labels, rows.kinds), "ceiling": _seen(*tasks[0])}
    table_rows: list[dict[str, Any]] = []
    for done, (layer, stream) in enumerate(streams.items(), 1):
        values = _values(stream, layer)
        read = [_held_out(values, [values], *task, c) for task in tasks]
        own_accuracy, control = read[0][0][0], np.mean([right[0] for right, _ in read[1:]], axis=0)
        for arm, right in {"own": own_accuracy, "control": control, **fixed}.items():
            met = {
                "own": read[0][1],
                "control": float(np.mean([share for _, share in read[1:]])),
            }.get(arm, float("nan"))
            table_rows.append(
                {
                    "layer": layer,
                    "measure": "accuracy",
                    "arm": arm,
                    **rate(rows.by_subject(right))._asdict(),
                    "converged": met,
                }
            )
        table_rows.append(
            {
                "layer": layer,
                "measure": "selectivity",
                "arm": "own",
                **bootstrap(rows.by_subject(own_accuracy - control))._asdict(),
                "converged": read[0][1],
            }
        )
        progress(done, len(streams))
    return pd.DataFrame(table_rows, columns=PROBE_COLUMNS)


def probe_transfer(
    base_streams: Mapping[int, Float[Tensor, "items d_model"]],
    unlearned_streams: Mapping[int, Float[Tensor, "items d_model"]],
    labels: Sequence[str] | Shaped[np.ndarray, " items"],
    groups: Sequence[str] | Shaped[np.ndarray, " items"],
    *,
    scored: Bool[np.ndarray, " items"] | None = None,
    folds: int = 5,
    c: float = 1.0,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """Probes trained on one model's stream and read on either, after every block; always on
    subjects that the probe was not trained on.

    The arms are ``base->base``, ``base->unlearned``, ``unlearned->base`` and
    ``unlearned->unlearned`` (trained on -> read on). A model against itself gives four equal arms.
    Erased: ``unlearned->unlearned`` falls to the control of :func:`probe_by_layer`. Rotated: it
    stays, and ``base->unlearned`` falls.

    Args:
        base_streams: of the base, by layer.
        unlearned_streams: of the other model, same rows.
        labels: see :func:`probe_by_layer`, as for the arguments below.
        groups: the subject of every row.
        scored: rows that count.
        folds: at most.
        c: inverse strength of the L2 penalty.
        seed: of the folds.
        progress: called after every block.

    Returns:
        :data:`PROBE_COLUMNS`, measure ``accuracy``.

    Raises:
        WorkbenchError: see :func:`probe_by_layer`; or the two models' streams differ in blocks or
            shape.
    """
    shapes = [
        {layer: tuple(stream.shape) for layer, stream in streams.items()}
        for streams in (base_streams, unlearned_streams)
    ]
    if shapes[0] != shapes[1]:
        raise WorkbenchError(
            f"transfer needs the streams of the same rows after the same blocks; got {shapes[0]} "
            f"and {shapes[1]}"
        )
    rows = _checked(base_streams, labels, groups, None, scored, folds, c)
    dealt = _deal(rows.labels, rows.groups, rows.folds, seed)
    table_rows = []
    for done, layer in enumerate(base_streams, 1):
        values = {
            "base": _values(base_streams[layer], layer),
            "unlearned": _values(unlearned_streams[layer], layer),
        }
        for trained in values:
            rights, met = _held_out(values[trained], list(values.values()), rows.labels, dealt, c)
            for read, right in zip(values, rights, strict=True):
                estimate = rate(rows.by_subject(right))
                table_rows.append(
                    {
                        "layer": layer,
                        "measure": "accuracy",
                        "arm": f"{trained}->{read}",
                        **estimate._asdict(),
                        "converged": met,
                    }
                )
        progress(done, len(base_streams))
    return pd.DataFrame(table_rows, columns=PROBE_COLUMNS)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the probes of all blocks share: ``[rows]`` arrays, and the number of folds."""

    labels: np.ndarray
    groups: np.ndarray
    kinds: np.ndarray
    scored: np.ndarray
    folds: int

    def by_subject(self, right: np.ndarray) -> np.ndarray:
        """``[subject]`` means over the scored rows of every subject."""
        return by_fact(tuple(self.groups[self.scored].tolist()), right[self.scored])[1]


def _checked(
    streams: Mapping[int, Tensor],
    labels: Any,
    groups: Any,
    kinds: Any,
    scored: Any,
    folds: int,
    c: float,
) -> _Rows:
    labels, groups = np.asarray(labels), np.asarray(groups)
    kinds = np.zeros(len(labels), dtype=int) if kinds is None else np.asarray(kinds)
    scored = np.ones(len(labels), dtype=bool) if scored is None else np.asarray(scored)
    sizes = {
        "labels": len(labels),
        "groups": len(groups),
        "kinds": len(kinds),
        "scored": len(scored),
    }
    sizes |= {f"stream of block {layer}": len(stream) for layer, stream in streams.items()}
    if not streams or len(set(sizes.values())) > 1:
        raise WorkbenchError(
            "a probe needs one label and one subject for every row of at least one stream; got "
            f"{sizes}"
        )
    subjects, classes = len(set(groups.tolist())), len(set(labels.tolist()))
    if subjects < 2 or classes < 2:
        raise WorkbenchError(
            f"a probe needs at least two subjects and two labels; got {subjects} subject(s) and "
            f"{classes} label(s)"
        )
    if scored.dtype != bool or not scored.any():
        raise WorkbenchError(
            "scored must be a boolean for every row, true on at least one; it says which rows "
            "count in the accuracy"
        )
    if folds < 2 or not (np.isfinite(c) and c > 0):
        raise WorkbenchError(f"a probe needs folds >= 2 and a positive c; got {folds} and {c}")
    return _Rows(labels, groups, kinds, scored, min(folds, subjects))


def _values(stream: Tensor, layer: int) -> np.ndarray:
    if not bool(torch.isfinite(stream).all()):
        raise WorkbenchError(
            f"the stream after block {layer} holds NaN or infinity; no probe was trained on it"
        )
    return np.asarray(stream.double().cpu().numpy())


def _deal(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """``[rows]`` fold of every row: subjects in a random order, sorted by their first label, dealt
    in turn, so that the subjects of one label lie in different folds.
    """
    first = dict(zip(groups[::-1].tolist(), labels[::-1].tolist(), strict=True))
    subjects = sorted(first)
    np.random.default_rng(seed).shuffle(subjects)
    fold = {
        subject: number % folds
        for number, subject in enumerate(sorted(subjects, key=lambda subject: first[subject]))
    }
    return np.array([fold[group] for group in groups.tolist()])


def _control(
    labels: np.ndarray, groups: np.ndarray, kinds: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """``[rows]`` labels of a control task: what one subject's rows of one kind and label are called
    is permuted among subjects, within the kind.
    """
    facts = list(zip(kinds.tolist(), groups.tolist(), labels.tolist(), strict=True))
    called: dict[tuple[Any, ...], Any] = {}
    for kind in dict.fromkeys(kinds.tolist()):
        facts_of_kind = [fact for fact in dict.fromkeys(facts) if fact[0] == kind]
        for fact, new_place in zip(
            facts_of_kind, rng.permutation(len(facts_of_kind)).tolist(), strict=True
        ):
            called[fact] = facts_of_kind[new_place][2]
    return np.array([called[fact] for fact in facts])


def _majority(labels: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """``[rows]`` 1.0 where the label is the most frequent of its kind (the first in order, of
    several).
    """
    right = np.zeros(len(labels))
    for kind in np.unique(kinds):
        names, counts = np.unique(labels[kinds == kind], return_counts=True)
        right[(kinds == kind) & (labels == names[counts.argmax()])] = 1.0
    return right


def _seen(labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """``[rows]`` 1.0 where the training folds hold the label."""
    return np.array(
        [
            float((labels[fold != mine] == label).any())
            for label, mine in zip(labels, fold, strict=True)
        ]
    )


def _held_out(
    train: np.ndarray, read: Sequence[np.ndarray], labels: np.ndarray, fold: np.ndarray, c: float
) -> tuple[list[np.ndarray], float]:
    """For every stream of ``read``, ``[rows]`` 1.0 where the probe trained on the other folds of
    ``train`` is right; and the share of fits that converged.
    """
    rights = [np.zeros(len(labels)) for _ in read]
    met = []
    for number in np.unique(fold):
        learn = fold != number
        if len(np.unique(labels[learn])) == 1:  # nothing to fit: that one label is all it knows
            for right in rights:
                right[~learn] = labels[~learn] == labels[learn][0]
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=_STEPS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported instead, as a share
            warnings.filterwarnings(
                "ignore", message="The number of unique classes", category=UserWarning
            )  # many answers are given by few people
            probe.fit(train[learn], labels[learn])
        met.append(bool((probe[-1].n_iter_ < _STEPS).all()))
        for right, values in zip(rights, read, strict=True):
            right[~learn] = probe.predict(values[~learn]) == labels[~learn]
    return rights, float(np.mean(met)) if met else float("nan")


def add_probes(table: Table, frame: pd.DataFrame, **columns: Any) -> None:
    """Write :func:`probe_by_layer` or :func:`probe_transfer` into a table of results: stage
    ``representation``, metrics ``probe_accuracy`` and ``probe_selectivity``.

    Of a transfer, the two arms that cross models are written; ``base->base`` and
    ``unlearned->unlearned`` are the arm ``own`` of the base's and of the model's own rows.

    Args:
        table: of the run.
        frame: what was measured.
        columns: further columns; ``split`` says which set of texts.
    """
    for row in frame.to_dict("records"):
        if row["arm"] in ("base->base", "unlearned->unlearned"):
            continue
        place = {
            "stage": "representation",
            "site": f"blocks.{row['layer']}.hook_resid_post",
            "arm": row["arm"],
            **columns,
        }
        table.add(
            f"probe_{row['measure']}",
            row["value"],
            low=row["low"],
            high=row["high"],
            n=row["n"],
            **place,
        )
