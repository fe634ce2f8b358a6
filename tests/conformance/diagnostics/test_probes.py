"""Linear probes: planted structure is found, random labels are not, no subject is on both sides,
and a rotated stream keeps its own probe and loses the other's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.diagnostics import probes
from workbench.diagnostics.probes import (
    PROBE_COLUMNS,
    add_probes,
    probe_by_layer,
    probe_transfer,
    prompt_streams,
)
from workbench.errors import WorkbenchError
from workbench.tables import Table

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]

SUBJECTS, PER_SUBJECT, WIDTH = 24, 3, 10


def _planted(
    classes: int = 2, strength: float = 8.0, seed: int = 0, subjects: int = SUBJECTS
) -> tuple[Tensor, list[str], list[str]]:
    """Rows in which the label of a subject stands on its own axis, under unit noise; three rows a
    subject.
    """
    noise = torch.randn(
        subjects * PER_SUBJECT, WIDTH, generator=torch.Generator().manual_seed(seed)
    )
    number = torch.arange(subjects).repeat_interleave(PER_SUBJECT)
    noise[torch.arange(len(noise)), number % classes] += strength
    return (
        noise,
        [f"label {i % classes}" for i in number.tolist()],
        [f"subject {i}" for i in number.tolist()],
    )


def _arm(
    found: pd.DataFrame, arm: str, layer: int = 0, measure: str = "accuracy"
) -> dict[str, float]:
    (row,) = found[
        (found["layer"] == layer) & (found["arm"] == arm) & (found["measure"] == measure)
    ].to_dict("records")
    return row  # type: ignore[no-any-return]


# --- What is found, and what is not ---------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_planted_linear_structure_is_read_without_error_and_chance_is_beside_it(
    classes: int,
) -> None:
    stream, labels, groups = _planted(classes, strength=25)
    found = probe_by_layer({0: stream}, labels, groups)
    assert list(found.columns) == PROBE_COLUMNS
    own, control, majority = (_arm(found, arm) for arm in ("own", "control", "majority"))
    assert own["value"] == 1.0
    assert own["high"] == 1.0
    assert 0.8 < own["low"] < 1  # Wilson's interval of 24 subjects, not of 72 rows
    assert own["n"] == SUBJECTS
    assert majority["value"] == pytest.approx(1 / classes)
    assert abs(control["value"] - 1 / classes) < 0.25
    assert _arm(found, "ceiling")["value"] == 1.0
    selectivity = _arm(found, "own", measure="selectivity")
    assert selectivity["value"] == pytest.approx(own["value"] - control["value"])
    assert selectivity["low"] <= selectivity["value"] <= selectivity["high"]


def test_random_labels_are_at_chance_although_there_are_more_coordinates_than_rows() -> None:
    # 60 rows in 200 dimensions: any labels can be fitted, none can be read.
    generator = torch.Generator().manual_seed(1)
    stream = torch.randn(60, 200, generator=generator)
    labels = np.array(["a", "b"])[torch.randint(2, (60,), generator=generator).numpy()]
    fitted = LogisticRegression().fit(stream.numpy(), labels).score(stream.numpy(), labels)
    assert fitted == 1.0
    found = probe_by_layer({0: stream}, labels, [f"s{i}" for i in range(60)])
    assert abs(_arm(found, "own")["value"] - 0.5) < 0.2
    selectivity = _arm(found, "own", measure="selectivity")
    assert selectivity["low"] < 0 < selectivity["high"]


def test_what_identifies_a_subject_is_no_label() -> None:
    # Every subject has its own axis and its own random label: with subjects on both sides a probe
    # reads all of them, with none it reads nothing.
    groups = np.repeat(np.arange(20), 4)
    stream = (
        torch.eye(20)[torch.from_numpy(groups)] * 10
        + torch.randn(80, 20, generator=torch.Generator().manual_seed(0)) * 0.1
    )
    labels = np.array(["a", "b"])[np.random.default_rng(3).integers(0, 2, 20)][groups]
    leaking = (
        LogisticRegression()
        .fit(stream[::2].numpy(), labels[::2])
        .score(stream[1::2].numpy(), labels[1::2])
    )
    assert leaking == 1.0
    found = probe_by_layer({0: stream}, labels, [f"s{g}" for g in groups])
    assert _arm(found, "own")["value"] <= 0.65


def test_folds_share_no_subject_and_spread_every_label() -> None:
    _, labels, groups = _planted(4)
    fold = probes._deal(np.asarray(labels), np.asarray(groups), 5, seed=0)
    by_subject = pd.DataFrame({"fold": fold, "group": groups, "label": labels}).groupby("group")
    assert (by_subject["fold"].nunique() == 1).all()
    spread = (
        pd.DataFrame({"fold": by_subject["fold"].first(), "label": by_subject["label"].first()})
        .groupby("label")["fold"]
        .nunique()
    )
    assert (spread == 5).all()  # six subjects of a label lie in all five folds
    assert by_subject["fold"].first().value_counts().max() <= 5
    assert (probes._deal(np.asarray(labels), np.asarray(groups), 5, seed=1) != fold).any()


def test_the_accuracy_is_that_of_a_probe_written_out_by_hand() -> None:
    stream, labels, groups = _planted(3, strength=1.5)
    stream = (
        stream * torch.logspace(-2, 2, WIDTH)
        # the label's coordinates are the smallest: only standardised are they seen through the
        # penalty
    )
    label, group = np.asarray(labels), np.asarray(groups)
    fold = probes._deal(label, group, 4, seed=7)
    right = np.zeros(len(label))
    for number in range(4):
        learn = fold != number
        values = stream.double().numpy()
        mean, deviation = values[learn].mean(0), values[learn].std(0)
        probe = LogisticRegression(C=0.5, max_iter=1000).fit(
            (values[learn] - mean) / deviation, label[learn]
        )
        right[~learn] = probe.predict((values[~learn] - mean) / deviation) == label[~learn]
    expected = np.mean([right[group == subject].mean() for subject in np.unique(group)])
    assert 0.3 < expected < 1
    found = probe_by_layer({3: stream}, labels, groups, folds=4, c=0.5, seed=7)
    assert _arm(found, "own", layer=3)["value"] == pytest.approx(expected)


def test_subjects_weigh_the_same_however_many_rows_they_have() -> None:
    # Twenty subjects of one row each are told right; one of three rows lies on the wrong side,
    # outnumbered there.
    labels = ["a"] * 10 + ["b"] * 10 + ["a"] * 3
    groups = [f"s{i}" for i in range(20)] + ["large"] * 3
    stream = torch.cat([torch.full((10, 1), -5.0), torch.full((13, 1), 5.0)])
    own = _arm(probe_by_layer({0: stream}, labels, groups), "own")
    assert own["n"] == 21
    assert own["value"] == pytest.approx(20 / 21)  # by rows it would be 20 / 23


# --- Controls -------------------------------------------------------------------------------------


def test_control_labels_move_between_subjects_whole_and_stay_within_their_kind() -> None:
    # Two kinds of question; two paraphrases of every fact.
    kinds = np.array(["drink", "drink", "pet", "pet"] * 12)
    groups = np.repeat([f"s{i}" for i in range(12)], 4)
    labels = np.array([f"{kind} {(i // 4) % 3}" for i, kind in enumerate(kinds)])
    dealt = probes._control(labels, groups, kinds, np.random.default_rng(0))
    frame = pd.DataFrame({"kind": kinds, "group": groups, "label": labels, "control": dealt})
    assert (frame.groupby(["group", "kind"])["control"].nunique() == 1).all()  # paraphrases agree
    assert (frame["control"].str.split().str[0] == frame["kind"]).all()
    for kind in ("drink", "pet"):
        mine = frame[frame["kind"] == kind]
        assert sorted(mine["control"]) == sorted(mine["label"])  # the same frequencies
    assert (frame["control"] != frame["label"]).any()


def test_what_the_question_alone_gives_away_is_in_the_control_where_kinds_are_told() -> None:
    # The stream holds the kind of the question and nothing of the answer: two kinds of two answers.
    generator = torch.Generator().manual_seed(0)
    kinds = np.array(["drink", "pet"] * 40)
    groups = np.repeat([f"s{i}" for i in range(40)], 2)
    answer = torch.randint(2, (80,), generator=generator).numpy()
    labels = np.array([f"{kind} {a}" for kind, a in zip(kinds, answer, strict=True)])
    stream = torch.randn(80, 4, generator=generator) * 0.1
    stream[:, 0] += torch.from_numpy(np.where(kinds == "pet", 5.0, -5.0))
    told, untold = (
        probe_by_layer({0: stream}, labels, groups, kinds=given) for given in (kinds, None)
    )
    assert (
        _arm(told, "own")["value"] == _arm(untold, "own")["value"] == pytest.approx(0.5, abs=0.15)
    )
    # Chance of the kind, one half, is all there is: the control sees it, and the majority of the
    # kind too.
    assert _arm(told, "control")["value"] == pytest.approx(0.5, abs=0.15)
    assert abs(_arm(told, "own", measure="selectivity")["value"]) < 0.15
    assert _arm(told, "majority")["value"] > 0.5 - 1e-9
    # Untold, the kind looks like knowledge.
    assert _arm(untold, "control")["value"] < 0.36
    assert _arm(untold, "majority")["value"] < 0.36


def test_a_label_that_one_subject_alone_has_is_above_the_ceiling() -> None:
    stream, labels, groups = _planted(2, strength=25)
    labels = ["unique"] * PER_SUBJECT + labels[PER_SUBJECT:]
    stream[:PER_SUBJECT, 0] -= 25
    stream[:PER_SUBJECT, 5] += 25
    found = probe_by_layer({0: stream}, labels, groups)
    assert _arm(found, "ceiling")["value"] == pytest.approx(1 - 1 / SUBJECTS)
    assert _arm(found, "own")["value"] == pytest.approx(1 - 1 / SUBJECTS)


def test_only_scored_rows_count_and_all_rows_train() -> None:
    stream, labels, groups = _planted(2, strength=25)
    # The first two subjects alone are counted: two subjects alone could not teach a probe both
    # labels.
    scored = np.array([group in ("subject 0", "subject 1") for group in groups])
    found = probe_by_layer({0: stream}, labels, groups, scored=scored)
    assert _arm(found, "own")["value"] == 1.0
    assert _arm(found, "own")["n"] == 2
    alone = probe_by_layer(
        {0: stream[scored]}, np.asarray(labels)[scored], np.asarray(groups)[scored]
    )
    assert _arm(alone, "own")["value"] == 0.0
    assert _arm(alone, "ceiling")["value"] == 0.0


def test_the_seed_alone_decides_and_nothing_global_is_touched() -> None:
    stream, labels, groups = _planted(3, strength=1.0)
    np.random.seed(5)
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    first, again, other = (
        probe_by_layer({0: stream}, labels, groups, seed=seed) for seed in (0, 0, 1)
    )
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]
    assert first.equals(again)
    assert not first.equals(other)


def test_a_fit_that_does_not_converge_is_reported_and_not_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, labels, groups = _planted(3, strength=1.0)
    assert _arm(probe_by_layer({0: stream}, labels, groups), "own")["converged"] == 1.0
    monkeypatch.setattr(probes, "_STEPS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = probe_by_layer({0: stream}, labels, groups)
    assert _arm(found, "own")["converged"] == 0.0
    assert _arm(found, "control")["converged"] == 0.0
    assert math.isnan(_arm(found, "majority")["converged"])


def test_units_and_offsets_of_a_stream_are_no_matter() -> None:
    # Standardised on the training rows: a stream a million times as long gives the same probe.
    stream, labels, groups = _planted(3, strength=2.0)
    plain, large = (
        probe_by_layer({0: stream}, labels, groups),
        probe_by_layer({0: stream * 1e6 + 1e7}, labels, groups),
    )
    assert _arm(plain, "own")["value"] == pytest.approx(_arm(large, "own")["value"], abs=0.03)


# --- Transfer -------------------------------------------------------------------------------------

ARMS = ("base->base", "base->unlearned", "unlearned->base", "unlearned->unlearned")


def test_a_model_against_itself_gives_four_equal_arms_which_are_the_own_probe() -> None:
    stream, labels, groups = _planted(3, strength=1.5)
    found = probe_transfer({0: stream}, {0: stream.clone()}, labels, groups, seed=3)
    values = [_arm(found, arm)["value"] for arm in ARMS]
    assert len(set(values)) == 1
    assert values[0] == _arm(probe_by_layer({0: stream}, labels, groups, seed=3), "own")["value"]


def test_a_rotated_stream_keeps_its_own_probe_and_transfer_falls_to_chance() -> None:
    stream, labels, groups = _planted(2, strength=25)
    turned = stream.roll(
        2, dims=1
    )  # the label's axes become axes 2 and 3; axes 0 and 1 now hold noise
    found = probe_transfer({0: stream}, {0: turned}, labels, groups)
    base, there, back, own = (_arm(found, arm)["value"] for arm in ARMS)
    assert base == own == 1.0
    assert abs(there - 0.5) <= 0.25
    assert abs(back - 0.5) <= 0.25


def test_an_erased_label_is_read_by_no_probe_of_that_stream() -> None:
    stream, labels, groups = _planted(2, strength=25)
    erased = stream.clone()
    erased[:, :2] = torch.randn(len(stream), 2, generator=torch.Generator().manual_seed(9))
    found = probe_transfer({0: stream}, {0: erased}, labels, groups)
    base, there, back, own = (_arm(found, arm)["value"] for arm in ARMS)
    assert base == 1.0
    assert max(abs(value - 0.5) for value in (there, back, own)) <= 0.25


def test_a_mirrored_label_is_read_inside_out_by_the_other_probe() -> None:
    stream, labels, groups = _planted(2, strength=25)
    mirrored = stream[:, [1, 0, *range(2, WIDTH)]]
    found = probe_transfer({0: stream}, {0: mirrored}, labels, groups)
    assert [_arm(found, arm)["value"] for arm in ARMS] == [1.0, 0.0, 0.0, 1.0]


def test_transfer_never_reads_a_subject_that_trained_its_probe() -> None:
    # Each subject has one axis in both models, and a random label: only a probe that has seen the
    # subject could know.
    axes = torch.eye(20).repeat_interleave(2, dim=0) * 10
    labels = np.repeat(np.array(["a", "b"])[np.random.default_rng(3).integers(0, 2, 20)], 2)
    found = probe_transfer(
        {0: axes}, {0: axes * 2}, labels, np.repeat([f"s{i}" for i in range(20)], 2)
    )
    assert max(_arm(found, arm)["value"] for arm in ARMS) <= 0.65


# --- The table and bad input ----------------------------------------------------------------------


def test_rows_of_the_table_hold_the_arms_of_the_figure() -> None:
    stream, labels, groups = _planted(2)
    table = Table({"run": "r", "method": "rmu", "seed": 0})
    seen: list[tuple[int, int]] = []
    own = probe_by_layer(
        {0: stream, 1: stream},
        labels,
        groups,
        progress=lambda done, total: seen.append((done, total)),
    )
    add_probes(table, own, split="forget-heldout")
    add_probes(
        table,
        probe_transfer({0: stream, 1: stream}, {0: stream, 1: stream}, labels, groups),
        split="forget-heldout",
    )
    frame = table.frame()
    assert seen == [(1, 2), (2, 2)]
    assert set(frame["stage"]) == {"representation"}
    accuracy = frame[frame["metric"] == "probe_accuracy"]
    assert set(accuracy["arm"]) == {
        "own",
        "control",
        "majority",
        "ceiling",
        "base->unlearned",
        "unlearned->base",
    }
    assert not accuracy.duplicated(["site", "arm"]).any()
    assert set(frame["site"]) == {"blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}
    assert len(frame[frame["metric"] == "probe_selectivity"]) == 2


def test_bad_input_says_what_would_be_right() -> None:
    stream, labels, groups = _planted(2)
    streams = {0: stream}
    with pytest.raises(WorkbenchError, match="one label and one subject for every row"):
        probe_by_layer(streams, labels[1:], groups)
    with pytest.raises(WorkbenchError, match="one label and one subject for every row"):
        probe_by_layer(streams, labels, groups[1:])
    with pytest.raises(WorkbenchError, match="at least one stream"):
        probe_by_layer({}, labels, groups)
    with pytest.raises(WorkbenchError, match="1 subject"):
        probe_by_layer(streams, labels, ["same"] * len(labels))
    with pytest.raises(WorkbenchError, match="1 label"):
        probe_by_layer(streams, ["same"] * len(labels), groups)
    with pytest.raises(WorkbenchError, match="true on at least one"):
        probe_by_layer(streams, labels, groups, scored=np.zeros(len(labels), dtype=bool))
    with pytest.raises(WorkbenchError, match="boolean"):
        probe_by_layer(streams, labels, groups, scored=np.ones(len(labels)))
    for change in ({"folds": 1}, {"c": 0.0}, {"c": math.inf}):
        with pytest.raises(WorkbenchError, match="folds >= 2 and a positive c"):
            probe_by_layer(streams, labels, groups, **change)  # type: ignore[arg-type]
    sick = stream.clone()
    sick[3, 2] = math.nan
    with pytest.raises(WorkbenchError, match="after block 4 holds NaN"):
        probe_by_layer({4: sick}, labels, groups)
    with pytest.raises(WorkbenchError, match="same blocks"):
        probe_transfer(streams, {1: stream}, labels, groups)
    with pytest.raises(WorkbenchError, match="same rows"):
        probe_transfer(streams, {0: stream[1:]}, labels, groups)


# --- Reading the streams --------------------------------------------------------------------------


def _states(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    kept: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: kept.append((out[0] if isinstance(out, tuple) else out).detach())
        )
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_streams_of_a_probe_are_one_row_per_example_at_the_end_of_prompt_or_subject(
    family: str, make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, batch = make_model(family), make_batch((7, 5, 6), answer=2)
    two = batch.subject_mask.clone()
    two[0, 1:3] = True  # a subject of two pieces: the last token of all
    two[0, 4] = False
    batch = replace(batch, subject_mask=two)
    states = _states(model, batch)
    ends, subjects = [4, 2, 3], [2, 2, 3]
    for at, places in (("prompt", ends), ("subject", subjects)):
        found = prompt_streams(model, [batch], at)  # type: ignore[arg-type]
        for layer, state in enumerate(states):
            expected = torch.stack([state[row, place] for row, place in enumerate(places)])
            torch.testing.assert_close(found[layer], expected, rtol=1e-5, atol=1e-6)


def test_streams_of_a_probe_do_not_depend_on_padding_or_batching(
    make_model: ModelMaker, make_batch: BatchMaker, pad: Padder
) -> None:
    model = make_model()
    texts = [make_batch((length,), seed=length) for length in (7, 5, 6)]
    together = prompt_streams(model, texts)
    padded = prompt_streams(model, [pad(text, 3) for text in texts])
    for layer, rows in together.items():
        assert tuple(rows.shape) == (3, 16)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(padded[layer], rows, rtol=1e-5, atol=1e-6)


def test_reading_streams_leaves_the_model_alone_and_bad_input_is_named(
    make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model().train()
    prompt_streams(model, [batch])
    with pytest.raises(WorkbenchError, match="at least one batch"):
        prompt_streams(model, [])
    with pytest.raises(WorkbenchError, match="middle"):
        prompt_streams(model, [batch], "middle")  # type: ignore[arg-type]
    with pytest.raises(WorkbenchError, match="'fact/0' names no subject"):
        prompt_streams(
            model, [replace(batch, subject_mask=torch.zeros_like(batch.subject_mask))], "subject"
        )
    with pytest.raises(WorkbenchError, match="no answer"):
        prompt_streams(model, [replace(batch, answer_mask=torch.zeros_like(batch.answer_mask))])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
