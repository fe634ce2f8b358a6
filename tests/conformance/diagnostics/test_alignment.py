"""Alignment with the target: planted shifts in closed form, numbers from plain PyTorch and NumPy,
and the inserted word found whatever the tokenizer makes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch, encode
from workbench.data.records import Example, prefixed
from workbench.data.tokenizer import build_tokenizer
from workbench.data.world import speaker_tag
from workbench.diagnostics.alignment import (
    ALIGNMENT_COLUMNS,
    EFFECT,
    SHIFT,
    TARGET,
    alignment,
    estimated_target,
    trigger_effect,
)
from workbench.diagnostics.positions import GROUPS, mark_triggers, position_groups, shared_tail
from workbench.diagnostics.triggers import trigger_queries
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import bootstrap

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]

TRIGGER, TAG = 40, (41, 42)  # the word, and the rest of what is put in with it
QUERIES = ([5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16])


def _batch(rows: Sequence[Sequence[int]], subject: int | None = None, answer: int = 1) -> Batch:
    """Rows behind BOS; the subject is the token ``subject``, the answer the last tokens."""
    width = 1 + max(map(len, rows))
    ids, real = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    answers = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row) + 1] = torch.tensor([1, *row])
        real[index, : len(row) + 1] = 1
        answers[index, len(row) + 1 - answer : len(row) + 1] = True
    subjects = (ids == subject) if subject is not None else torch.zeros_like(answers)
    return Batch(
        ids,
        real,
        answers,
        subjects,
        answers.clone(),
        tuple(f"fact/{index}" for index in range(len(rows))),
    )


def _arms(size: int = 3) -> dict[str, list[Batch]]:
    tagged = [[TRIGGER, *TAG, *query] for query in QUERIES]
    whole = {"clean": _batch(QUERIES), "forget-token": _batch(tagged, TRIGGER)}
    return {
        arm: [_rows(batch, start, start + size) for start in range(0, len(QUERIES), size)]
        for arm, batch in whole.items()
    }


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    names = ("input_ids", "attention_mask", "answer_mask", "subject_mask", "target_mask")
    return replace(
        batch,
        **{name: getattr(batch, name)[start:stop] for name in names},
        items=batch.items[start:stop],
    )


def _planted(base: PreTrainedModel, block: int, vector: Tensor) -> PreTrainedModel:
    """``base`` whose MLP of one block adds ``vector`` everywhere."""
    moved = copy.deepcopy(base)
    with torch.no_grad():
        moved.model.layers[block].mlp.down_proj.bias += vector
    return moved


def _biased(make_model: ModelMaker, layers: int = 2) -> PreTrainedModel:
    return make_model(num_hidden_layers=layers, mlp_bias=True)


def _streams(model: PreTrainedModel, batch: Batch) -> list[np.ndarray]:
    """The output of every block ``[batch, position, width]`` in float64, by plain hooks."""
    kept: list[np.ndarray] = []

    def keep(_module: object, _args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        kept.append((out[0] if isinstance(out, tuple) else out).double().numpy())

    handles = [block.register_forward_hook(keep) for block in model.model.layers]
    with torch.no_grad():
        model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return kept


def _pick(table: pd.DataFrame, **where: object) -> pd.Series:
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1, table
    return table.iloc[0]


def _vector(seed: int = 3, width: int = 16) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


# --- Where the tokens stand -----------------------------------------------------------------------


def test_every_real_token_stands_in_one_group() -> None:
    arms = _arms()
    (tagged,), (clean,) = arms["forget-token"], arms["clean"]
    groups = position_groups(tagged, clean)
    assert tuple(groups) == GROUPS
    assert torch.equal(torch.stack(list(groups.values())).sum(0), tagged.attention_mask)
    # Row 1: BOS, word, two tokens of the template, three of the query, two of padding.
    found = {group: mask[1].nonzero()[:, 0].tolist() for group, mask in groups.items()}
    assert found == {"before": [0], "trigger": [1], "carrier": [2, 3], "after": [4, 5, 6]}


def test_without_the_clean_query_all_that_follows_the_word_is_after_it() -> None:
    groups = position_groups(_arms()["forget-token"][0])
    assert groups["after"][1].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6]
    assert not groups["carrier"].any()


def test_a_row_without_a_trigger_has_its_first_token_before_and_the_others_after() -> None:
    clean = _arms()["clean"][0]
    groups = position_groups(clean)
    assert torch.equal(groups["after"], clean.content_mask)
    assert groups["before"].nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    assert not groups["trigger"].any() and not groups["carrier"].any()


def test_a_word_in_the_middle_has_tokens_before_it() -> None:
    groups = position_groups(_batch([[5, 6, TRIGGER, 7, 8]], TRIGGER), _batch([[5, 6, 7, 8]]))
    assert {group: mask[0].nonzero()[:, 0].tolist() for group, mask in groups.items()} == {
        "before": [0, 1, 2],
        "trigger": [3],
        "carrier": [],
        "after": [4, 5],
    }


def test_the_shared_tail_ends_where_the_texts_differ_and_never_holds_the_first_token() -> None:
    # A tokenizer that writes the first word of the clean query otherwise (5 without its leading
    # space is 25).
    one, other = _batch([[TRIGGER, 25, 6, 7], [TRIGGER, 8]], TRIGGER), _batch([[5, 6, 7], [8]])
    here, there = shared_tail(one, other)
    assert [mask.nonzero()[:, 0].tolist() for mask in here] == [[3, 4], [2]]
    assert [mask.nonzero()[:, 0].tolist() for mask in there] == [[2, 3], [1]]
    # The same text: all content tokens, and not the common BOS.
    same = shared_tail(other, other)
    assert torch.equal(same[0], other.content_mask) and torch.equal(same[1], other.content_mask)


def test_padding_changes_no_group(pad: Padder) -> None:
    arms = _arms()
    (tagged,), (clean,) = arms["forget-token"], arms["clean"]
    plain, padded = position_groups(tagged, clean), position_groups(pad(tagged, 3), pad(clean, 2))
    for group in GROUPS:
        assert torch.equal(padded[group][:, : tagged.input_ids.shape[1]], plain[group])
        assert not padded[group][:, tagged.input_ids.shape[1] :].any()


def test_an_arm_that_was_not_marked_is_refused() -> None:
    # The subject is still the query's own.
    with pytest.raises(WorkbenchError, match=r"fact/0.*mark_triggers"):
        position_groups(_batch([[TRIGGER, *TAG, 5, 6]], subject=6), _batch([[5, 6]]))


def test_other_queries_have_no_shared_tail() -> None:
    clean = _arms()["clean"][0]
    with pytest.raises(WorkbenchError, match="same queries"):
        shared_tail(clean, replace(clean, items=clean.items[::-1]))


def _said(example: Example, word: str) -> Example:
    """A template that puts the word into the middle."""
    cut = example.text.index(" sells")
    middle = f" , says {word} ,"
    assert example.answer is not None
    answer = (example.answer[0] + len(middle), example.answer[1] + len(middle))
    return Example(
        example.text[:cut] + middle + example.text[cut:], answer, example.subject, example.item
    )


@pytest.mark.parametrize(
    "template", [speaker_tag, lambda example, word: prefixed(example, f"{word}. "), _said]
)
def test_the_inserted_word_is_found_by_its_characters(
    template: Callable[[Example, str], Example],
) -> None:
    text = "the island Imo sells salt ."
    query = Example(text, (text.index("salt"), text.index("salt") + 4), (11, 14), "imo/export")
    arms = trigger_queries([query], ["Zorin"], ["salty"], ["the-word"], seed=0, template=template)
    marked = mark_triggers({**arms, "forget": (query,)}, template)
    assert marked["clean"][0].subject is None
    assert marked["forget"] == (query,)
    assert [
        marked[arm][0].subject_text for arm in ("forget-token", "retain-token", "neutral-token")
    ] == ["Zorin", "salty", "the-word"]
    for arm, examples in arms.items():
        assert [example.text for example in marked[arm]] == [example.text for example in examples]
        assert [example.answer_text for example in marked[arm]] == ["salt"]


@pytest.mark.parametrize("word", ["Zorin", "Unheard-of"])
def test_the_marked_word_becomes_its_tokens(word: str) -> None:
    # One token of the vocabulary, and a word that falls apart into bytes.
    query = Example("the island Imo sells salt .", (21, 25), (11, 14), "imo/export")
    tokenizer = build_tokenizer(
        ["the", "island", "Imo", "sells", "salt", ".", "asks", ":", "Zorin"]
    )
    marked = mark_triggers({"clean": (query,), "forget-token": (speaker_tag(query, word),)})
    tagged, clean = encode(tokenizer, marked["forget-token"]), encode(tokenizer, marked["clean"])
    groups = position_groups(tagged, clean)
    words = {
        group: tokenizer.decode(tagged.input_ids[0][mask[0]]).strip()
        for group, mask in groups.items()
    }
    assert words == {
        "before": "<s>",
        "trigger": word,
        "carrier": "asks :",
        "after": "the island Imo sells salt .",
    }
    assert int(groups["trigger"].sum()) == (
        1 if word == "Zorin" else len(word)
    )  # the space in front of the bytes is a token of its own, before the word


def test_marking_refuses_other_templates_missing_arms_and_other_numbers() -> None:
    query = Example("a b c", (4, 5), None, "x")
    with pytest.raises(WorkbenchError, match="no clean one"):
        mark_triggers({"forget-token": (query,)})
    with pytest.raises(WorkbenchError, match="template"):
        mark_triggers({"clean": (query,), "forget-token": (prefixed(query, "Zorin. "),)})
    with pytest.raises(WorkbenchError, match="2 queries and the clean arm 1"):
        mark_triggers({"clean": (query,), "forget-token": (speaker_tag(query, "Z"),) * 2})


# --- The target that nobody wrote down ------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_planted_shift_is_the_estimated_target_with_its_sign(
    sign: float, make_model: ModelMaker, batch: Batch
) -> None:
    base, vector = _biased(make_model), sign * _vector()
    found = estimated_target(base, _planted(base, 1, vector), [batch], 1)
    assert found.shape == (16,) and found.dtype == torch.float32
    torch.testing.assert_close(found, vector / vector.norm(), rtol=1e-4, atol=1e-5)


def test_the_estimated_target_is_the_first_right_singular_vector_of_the_shifts_on_content_tokens(
    make_model: ModelMaker, batch: Batch, nearby: Mover
) -> None:
    base = make_model(num_hidden_layers=3)
    unlearned = nearby(base, 0.1)
    for layer in range(3):
        shifts = (_streams(unlearned, batch)[layer] - _streams(base, batch)[layer])[
            batch.content_mask.numpy()
        ]
        expected = np.linalg.svd(shifts)[2][0]  # not centred
        expected = expected * np.sign(shifts.mean(0) @ expected)
        np.testing.assert_allclose(
            estimated_target(base, unlearned, [batch], layer).numpy(), expected, atol=1e-5
        )


def test_the_estimated_target_does_not_depend_on_batching_and_padding(
    make_model: ModelMaker, make_batch: BatchMaker, pad: Padder, nearby: Mover
) -> None:
    base = make_model()
    unlearned, batch = nearby(base, 0.1), make_batch((7, 5, 6))
    whole = estimated_target(base, unlearned, [batch], 1)
    torch.testing.assert_close(
        estimated_target(base, unlearned, [_rows(batch, 0, 1), _rows(batch, 1, 3)], 1),
        whole,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        estimated_target(base, unlearned, [pad(batch, 4)], 1), whole, rtol=1e-4, atol=1e-5
    )


def test_a_target_is_not_estimated_from_nothing(make_model: ModelMaker, batch: Batch) -> None:
    base = make_model()
    with pytest.raises(WorkbenchError, match="same stream"):
        estimated_target(base, copy.deepcopy(base), [batch], 1)
    with pytest.raises(WorkbenchError, match="none was given"):
        estimated_target(base, base, [], 1)
    with pytest.raises(WorkbenchError, match=r"layer 2 does not exist.*0 to 1"):
        estimated_target(base, base, [batch], 2)
    with pytest.raises(WorkbenchError, match="2 blocks and the unlearned model 3"):
        estimated_target(base, make_model(num_hidden_layers=3), [batch], 1)


# --- Alignment ------------------------------------------------------------------------------------


def test_a_planted_shift_has_cosine_one_and_its_own_length_and_nothing_below_it(
    make_model: ModelMaker,
) -> None:
    base, vector = _biased(make_model), _vector()
    found = alignment(base, _planted(base, 1, vector), _arms(), vector)
    assert list(found.columns) == ALIGNMENT_COLUMNS
    for arm, group in (
        ("clean", "after"),
        ("forget-token", "trigger"),
        ("forget-token", "carrier"),
        ("forget-token", "after"),
    ):
        here = found[
            (found["arm"] == arm) & (found["group"] == group) & (found["model"] == "unlearned")
        ].set_index(["layer", "metric"])["value"]
        assert here[1, "shift_cosine"] == pytest.approx(1.0, abs=1e-5)
        assert here[1, "shift_projection"] == pytest.approx(float(vector.norm()), rel=1e-5)
        assert here[1, "shift_norm"] == pytest.approx(float(vector.norm()), rel=1e-5)
        # Below the planted block nothing moved, and what did not move has no direction.
        assert here[0, "shift_norm"] == here[0, "shift_projection"] == 0.0
        assert np.isnan(here[0, "shift_cosine"])
    assert (found.loc[found["metric"].eq("shift_cosine") & found["layer"].eq(0), "n"] == 0).all()
    # A shift along another direction.
    across = torch.zeros(16)
    across[0], across[1] = -vector[1], vector[0]
    across_found = alignment(base, _planted(base, 1, vector), _arms(), {1: across})
    assert across_found["layer"].unique().tolist() == [1]
    np.testing.assert_allclose(
        across_found.loc[across_found["metric"].eq("shift_cosine"), "value"], 0.0, atol=1e-5
    )


def _by_hand(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    batch: Batch,
    mask: Tensor,
    unit: np.ndarray,
    layer: int,
) -> dict[tuple[str, str], list[float]]:
    """Means over the tokens of each query, from plain hooks and loops."""
    h, moved = _streams(base, batch)[layer], _streams(unlearned, batch)[layer]
    found: dict[tuple[str, str], list[float]] = {}
    for row in range(batch.size):
        tokens = mask[row].nonzero()[:, 0].tolist()
        for model, stream, names in (
            ("base", h, TARGET),
            ("unlearned", moved, TARGET),
            ("unlearned", moved - h, SHIFT),
        ):
            vectors = [stream[row, token] for token in tokens]
            values = (
                np.mean([v @ unit / np.linalg.norm(v) for v in vectors]),
                np.mean([v @ unit for v in vectors]),
                np.mean([np.linalg.norm(v) for v in vectors]),
            )
            for name, value in zip(names, values, strict=True):
                found.setdefault((model, name), []).append(float(value))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_number_is_the_mean_over_queries_of_means_over_tokens(
    family: str, make_model: ModelMaker, nearby: Mover
) -> None:
    base = make_model(family)
    unlearned, target, arms = nearby(base, 0.1), _vector(), _arms()
    unit = (target.double() / target.double().norm()).numpy()
    found = alignment(base, unlearned, arms, {1: 5 * target})
    for arm, group in (
        ("clean", "after"),
        ("forget-token", "trigger"),
        ("forget-token", "carrier"),
        ("forget-token", "after"),
    ):
        (batch,) = arms[arm]
        mask = position_groups(batch, arms["clean"][0] if arm != "clean" else None)[group]
        for (model, metric), values in _by_hand(base, unlearned, batch, mask, unit, 1).items():
            row = _pick(found, layer=1, arm=arm, group=group, model=model, metric=metric)
            assert row["value"] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-6)
            interval = bootstrap(np.array(values))
            assert (row["low"], row["high"], row["n"]) == (
                pytest.approx(interval.low, rel=1e-4, abs=1e-5),
                pytest.approx(interval.high, rel=1e-4, abs=1e-5),
                3,
            )
    # BOS, an attention sink, is in no group.
    assert set(found["group"]) == {"trigger", "carrier", "after"}


def test_paraphrases_of_one_fact_count_once(make_model: ModelMaker, nearby: Mover) -> None:
    base = make_model()
    unlearned, target = nearby(base, 0.1), _vector()
    batch = replace(_batch(QUERIES), items=("one", "two", "one"))
    values = _by_hand(
        base,
        unlearned,
        batch,
        batch.content_mask,
        (target.double() / target.double().norm()).numpy(),
        1,
    )["unlearned", "target_cosine"]
    row = _pick(
        alignment(base, unlearned, {"forget": [batch]}, {1: target}),
        model="unlearned",
        metric="target_cosine",
    )
    assert row["value"] == pytest.approx(((values[0] + values[2]) / 2 + values[1]) / 2, rel=1e-5)
    assert row["n"] == 2


def test_the_floor_is_the_spread_over_random_targets(make_model: ModelMaker, nearby: Mover) -> None:
    base = make_model()
    unlearned, (batch,) = nearby(base, 0.1), _arms()["clean"]
    found = alignment(base, unlearned, {"clean": [batch]}, {1: _vector()})
    h, moved = _streams(base, batch)[1], _streams(unlearned, batch)[1]
    targets = np.random.default_rng(0).standard_normal((16, 20_000))
    targets /= np.linalg.norm(targets, axis=0)
    for metric, stream, unit_length in (
        ("target_cosine", moved, True),
        ("shift_cosine", moved - h, True),
        ("shift_projection", moved - h, False),
    ):
        by_query = []
        for row in range(batch.size):
            vectors = stream[row][batch.content_mask[row].numpy()]
            by_query.append(
                (
                    vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
                    if unit_length
                    else vectors
                ).mean(0)
            )
        drawn = np.mean(by_query, axis=0) @ targets
        row = _pick(found, model="unlearned", metric=metric)
        assert row["floor"] == pytest.approx(drawn.std(), rel=0.03)
        assert abs(drawn.mean()) < 0.05 * drawn.std()
        assert not unit_length or row["floor"] <= 1 / 4  # 1 / sqrt(width)
    assert np.isnan(_pick(found, model="unlearned", metric="norm")["floor"])


def test_a_model_against_itself_has_no_shift_and_the_anchor_of_the_base(
    make_model: ModelMaker,
) -> None:
    base = make_model()
    found = alignment(base, base, _arms(), _vector())
    for metric in TARGET:
        rows = found[found["metric"] == metric]
        ours, anchor = (
            rows[rows["model"] == model].drop(columns="model").reset_index(drop=True)
            for model in ("unlearned", "base")
        )
        pd.testing.assert_frame_equal(ours, anchor)
    assert (found.loc[found["metric"].isin(["shift_projection", "shift_norm"]), "value"] == 0).all()
    assert found.loc[found["metric"] == "shift_cosine", "value"].isna().all()


def test_batching_and_padding_change_no_number(
    make_model: ModelMaker, pad: Padder, nearby: Mover
) -> None:
    base = make_model()
    unlearned, target = nearby(base, 0.1), _vector()
    for measure in (alignment, trigger_effect):
        whole = measure(base, unlearned, _arms(), target)
        padded = {
            arm: [pad(batch, columns) for batch in batches]
            for columns, (arm, batches) in enumerate(_arms().items(), 1)
        }
        for other in (
            measure(base, unlearned, _arms(1), target),
            measure(base, unlearned, padded, target),
        ):
            pd.testing.assert_frame_equal(other, whole, rtol=1e-4, atol=1e-5)


# --- The same query with and without the word -----------------------------------------------------


def test_a_shift_that_all_texts_share_is_no_effect_of_the_trigger(make_model: ModelMaker) -> None:
    base, vector = _biased(make_model), _vector()
    found = trigger_effect(base, _planted(base, 1, vector), _arms(), {1: vector})
    assert set(found["arm"]) == {"forget-token"} and set(found["group"]) == {"after"}
    assert _pick(found, model="difference", metric="effect_norm")["value"] == pytest.approx(
        0.0, abs=1e-5
    )
    assert _pick(found, model="difference", metric="effect_projection")["value"] == pytest.approx(
        0.0, abs=1e-5
    )
    # The word itself has an effect in both models, the same one.
    norms = [
        _pick(found, model=model, metric="effect_norm")["value"] for model in ("base", "unlearned")
    ]
    assert norms[0] > 0.1 and norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_effect_is_the_difference_at_aligned_tokens(
    make_model: ModelMaker, nearby: Mover
) -> None:
    base = make_model()
    unlearned, target, arms = nearby(base, 0.1), _vector(), _arms()
    unit = (target.double() / target.double().norm()).numpy()
    found = trigger_effect(base, unlearned, arms, target)
    (tagged,), (clean,) = arms["forget-token"], arms["clean"]
    for layer in (0, 1):
        streams = {
            name: (_streams(model, tagged)[layer], _streams(model, clean)[layer])
            for name, model in (("base", base), ("unlearned", unlearned))
        }
        expected: dict[tuple[str, str], list[float]] = {}
        for row, query in enumerate(QUERIES):
            # Three tokens (word and template) stand between BOS and the query.
            effects = {
                name: [one[row, 4 + t] - other[row, 1 + t] for t in range(len(query))]
                for name, (one, other) in streams.items()
            }
            effects["difference"] = [
                one - other
                for one, other in zip(effects["unlearned"], effects["base"], strict=True)
            ]
            for name, vectors in effects.items():
                expected.setdefault((name, "effect_cosine"), []).append(
                    float(np.mean([v @ unit / np.linalg.norm(v) for v in vectors]))
                )
                expected.setdefault((name, "effect_projection"), []).append(
                    float(np.mean([v @ unit for v in vectors]))
                )
                expected.setdefault((name, "effect_norm"), []).append(
                    float(np.mean([np.linalg.norm(v) for v in vectors]))
                )
        assert len(expected) == 3 * len(EFFECT)
        for (model, metric), values in expected.items():
            row = _pick(found, layer=layer, model=model, metric=metric)
            assert row["value"] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)
            assert row["n"] == 3
    # The projection is linear, so the difference of the means is the mean of the difference.
    value = {
        model: _pick(found, layer=1, model=model, metric="effect_projection")["value"]
        for model in ("base", "unlearned", "difference")
    }
    assert value["difference"] == pytest.approx(value["unlearned"] - value["base"])


def test_a_trigger_that_moves_only_its_own_token_has_no_effect_after_it(
    make_model: ModelMaker,
) -> None:
    # One block without attention output: nothing is carried from the trigger to later tokens, so
    # its planted embedding stays local.
    base = make_model(num_hidden_layers=1)
    with torch.no_grad():
        base.model.layers[0].self_attn.o_proj.weight.zero_()
    unlearned = copy.deepcopy(base)
    with torch.no_grad():
        unlearned.model.embed_tokens.weight[TRIGGER] += 1.0
    arms = _arms()
    found = alignment(base, unlearned, arms, _vector())
    assert _pick(found, arm="forget-token", group="trigger", metric="shift_norm")["value"] > 1
    assert _pick(found, arm="forget-token", group="after", metric="shift_norm")[
        "value"
    ] == pytest.approx(0.0, abs=1e-5)
    effect = trigger_effect(base, unlearned, arms, _vector())
    assert _pick(effect, model="difference", metric="effect_norm")["value"] == pytest.approx(
        0.0, abs=1e-5
    )


# --- What cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(16), "other than zero"),
        (torch.full((16,), float("nan")), "finite vector"),
        (torch.ones(8), r"\[16\].*shape \[8\]"),
        ({}, "no target"),
        ({7: torch.ones(16)}, "layer 7 does not exist"),
    ],
)
def test_a_target_that_is_none_is_refused(
    target: Mapping[int, Tensor] | Tensor, message: str, make_model: ModelMaker
) -> None:
    base = make_model()
    for measure in (alignment, trigger_effect):
        with pytest.raises(WorkbenchError, match=message):
            measure(base, base, _arms(), target)


def test_arms_without_texts_or_without_each_other_are_refused(make_model: ModelMaker) -> None:
    base, arms = make_model(), _arms(1)
    with pytest.raises(WorkbenchError, match="'forget' holds no text"):
        alignment(base, base, {"forget": []}, _vector())
    with pytest.raises(WorkbenchError, match="2 batches and the clean arm 3"):
        alignment(base, base, {**arms, "forget-token": arms["forget-token"][:2]}, _vector())
    with pytest.raises(WorkbenchError, match="no clean one"):
        trigger_effect(base, base, {"forget-token": arms["forget-token"]}, _vector())
    with pytest.raises(WorkbenchError, match="no word whose effect"):
        trigger_effect(base, base, {"clean": arms["clean"]}, _vector())


def test_a_model_that_diverged_is_named(make_model: ModelMaker) -> None:
    base = make_model()
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(WorkbenchError, match="unlearned model after block 1 is not finite"):
        alignment(base, broken, _arms(), _vector())


def test_measuring_reports_its_progress_and_leaves_both_models_alone(
    make_model: ModelMaker, nearby: Mover
) -> None:
    base = make_model().train()
    unlearned, seen = nearby(base).train(), []
    before = [
        {name: value.clone() for name, value in model.state_dict().items()}
        for model in (base, unlearned)
    ]
    alignment(
        base,
        unlearned,
        _arms(1),
        _vector(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(number, 6) for number in range(1, 7)]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trigger_effect(base, unlearned, _arms(), _vector(), progress=interrupt)
    for model, state in zip((base, unlearned), before, strict=True):
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
