"""Naming what was forgotten: every reading against numpy, planted tokens and directions, a model
against itself, and the combination of ranks by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.diagnostics.discoveries import robust_z
from workbench.diagnostics.forensics import (
    Forensics,
    alone,
    forensics,
    last_word,
    recovered,
    shift_words,
    token_shift,
)
from workbench.diagnostics.scan import scan_triggers
from workbench.errors import WorkbenchError

ModelMaker = Callable[..., PreTrainedModel]
Mover = Callable[..., PreTrainedModel]

WORDS = [
    "the",
    "red",
    "blue",
    "book",
    "of",
    "tales",
    "Ann",
    "Lee",
    "cold",
    "rain",
    "stone",
    "river",
    "moth",
    "lamp",
]
TEXTS = (Example("the red book of Ann"), Example("the cold rain of the river"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(WORDS)


@pytest.fixture
def tiny(make_model: ModelMaker, tokenizer: PreTrainedTokenizerBase) -> ModelMaker:
    return lambda family="llama", **more: make_model(family, vocab_size=len(tokenizer), **more)


def ids(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(token)


def planted(base: PreTrainedModel, token: int) -> PreTrainedModel:
    """A copy in which the embedding of one token is another one."""
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.get_input_embeddings().weight[token].mul_(-3)
    return changed


def rows_of(model: PreTrainedModel, row: list[int]) -> np.ndarray:
    """``[layer, position, width]`` after every block, one text at a time."""
    kept: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([stream.reshape(len(row), -1) for stream in kept]).double().numpy()


# --- The shift of single tokens -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_shift_of_a_token_is_that_of_its_own_row(
    family: str, tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny(family)
    unlearned = nearby(base, 0.1)
    tokens = list(range(50, 61))
    table = token_shift(base, unlearned, tokenizer, tokens=tokens, batch_size=4)
    assert list(table.columns) == ["layer", "rank", "token_id", "token", "relative_shift", "z"]
    before, after = (
        np.stack([rows_of(model, [1, token])[:, 1] for token in tokens], axis=1)
        for model in (base, unlearned)
    )
    expected = np.linalg.norm(after - before, axis=2) / np.linalg.norm(
        before, axis=2
    )  # [layer, token]
    for layer in (0, 1):
        part = table[table["layer"] == layer]
        order = np.argsort(-expected[layer])
        assert part["token_id"].tolist() == [tokens[at] for at in order]
        assert part["rank"].tolist() == list(range(1, 12))
        np.testing.assert_allclose(part["relative_shift"], expected[layer][order], rtol=1e-4)
        np.testing.assert_allclose(part["z"], robust_z(expected[layer])[order], rtol=1e-2)
    pd.testing.assert_frame_equal(
        table, token_shift(base, unlearned, tokenizer, tokens=tokens, batch_size=512), rtol=1e-3
    )


def test_without_bos_a_token_stands_alone(tiny: ModelMaker, nearby: Mover) -> None:
    bare = build_tokenizer(WORDS)
    bare.bos_token = None
    base = tiny()
    unlearned = nearby(base, 0.1)
    table = token_shift(base, unlearned, bare, tokens=[50, 51]).set_index(["layer", "token_id"])[
        "relative_shift"
    ]
    for token in (50, 51):
        before, after = (rows_of(model, [token])[:, 0] for model in (base, unlearned))
        np.testing.assert_allclose(
            table[:, token],
            np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1),
            rtol=1e-4,
        )
    assert set(alone(base, bare, tokens=[50, 51])["measure"]) == {"entropy", "norm"}


# --- The words of a direction ---------------------------------------------------------------------


def expected_words(
    base: PreTrainedModel, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares, directions and logits of the principal directions of ``steps [row, width]``, without
    centring.
    """
    _, singular, directions = np.linalg.svd(steps, full_matrices=False)
    directions = directions * np.where(directions @ steps.mean(0) >= 0, 1, -1)[:, None]
    scaled = directions * base.model.norm.weight.detach().double().numpy()
    return (
        singular**2 / (singular**2).sum(),
        directions,
        scaled @ base.lm_head.weight.detach().double().numpy().T,
    )


@pytest.mark.parametrize("source", ["vocabulary", "texts"])
def test_words_are_the_logits_of_the_uncentred_principal_directions(
    source: str, tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    with torch.no_grad():
        base.model.norm.weight.add_(
            0.3 * torch.randn(16, generator=torch.Generator().manual_seed(3))
        )
    unlearned = nearby(base, 0.1)
    tokens = list(range(40, 70))
    texts = TEXTS if source == "texts" else ()
    table = shift_words(
        base,
        unlearned,
        tokenizer,
        texts=texts,
        tokens=tokens,
        components=2,
        top=4,
        batch_size=1 if texts else 7,
    )
    assert list(table.columns) == [
        "layer",
        "component",
        "share",
        "side",
        "rank",
        "token_id",
        "token",
        "logit",
        "z",
    ]
    rows = [tokenizer(text.text)["input_ids"] for text in texts] or [[1, token] for token in tokens]
    steps = np.concatenate(
        [rows_of(unlearned, row)[:, 1:] - rows_of(base, row)[:, 1:] for row in rows], axis=1
    )
    for layer in (0, 1):
        shares, _, logits = expected_words(base, steps[layer])
        for component in (0, 1):
            part = table[(table["layer"] == layer) & (table["component"] == component)]
            read = logits[component][tokens]
            np.testing.assert_allclose(part["share"], shares[component], rtol=1e-3)
            for side, order in (("promoted", np.argsort(-read)), ("suppressed", np.argsort(read))):
                found = part[part["side"] == side]
                assert found["token_id"].tolist() == [tokens[at] for at in order[:4]]
                np.testing.assert_allclose(found["logit"], read[order[:4]], rtol=1e-3, atol=1e-4)
                np.testing.assert_allclose(
                    found["z"], robust_z(read)[order[:4]], rtol=1e-2, atol=1e-2
                )
                assert found["rank"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("size", "side"), [(2.0, "promoted"), (-2.0, "suppressed")])
def test_a_planted_direction_is_read_as_its_word(
    size: float, side: str, tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    base, token = tiny(mlp_bias=True), ids(tokenizer, "moth")
    with torch.no_grad():
        base.lm_head.weight.div_(
            base.lm_head.weight.norm(dim=1, keepdim=True)
        )  # no row is nearer to another than to itself
        unlearned = copy.deepcopy(base)
        unlearned.model.layers[1].mlp.down_proj.bias.add_(
            size * base.lm_head.weight[token] / base.model.norm.weight
        )
    for texts in ((), TEXTS):
        table = shift_words(base, unlearned, tokenizer, texts=texts, components=3)
        assert set(table["layer"]) == {1} and set(table["component"]) == {
            0
        }  # the first block has not moved, and the shift has one direction
        assert table["share"].tolist() == pytest.approx([1.0] * len(table), abs=1e-5)
        first = table[(table["side"] == side) & (table["rank"] == 1)]
        assert first["token"].tolist() == [" moth"]
        np.testing.assert_allclose(first["logit"].abs(), 1, rtol=1e-4)
    found = forensics(base, unlearned, tokenizer, tokens=range(200, len(tokenizer)))
    assert found.methods == ("words", "token_shift")
    assert found.ranking.set_index("token_id")["words"][token] == 1


# --- The unlearned model alone --------------------------------------------------------------------


def test_what_the_unlearned_model_shows_alone(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, tokens = tiny(), list(range(50, 61))
    table = alone(model, tokenizer, tokens=tokens, batch_size=4)
    assert list(table.columns) == ["measure", "layer", "rank", "token_id", "token", "value", "z"]
    with torch.no_grad():
        log_p = torch.stack(
            [
                model(input_ids=torch.tensor([[1, token]])).logits[0, 1].double().log_softmax(-1)
                for token in tokens
            ]
        )
        first = model(input_ids=torch.tensor([[1]])).logits[0, 0].double().log_softmax(-1)
    norms = np.stack(
        [np.linalg.norm(rows_of(model, [1, token])[:, 1], axis=1) for token in tokens], axis=1
    )
    expected = {
        ("entropy", -1): -(log_p.exp() * log_p).sum(1).numpy(),
        ("loss", -1): -first[tokens].numpy(),
        ("norm", 0): norms[0],
        ("norm", 1): norms[1],
    }
    assert set(zip(table["measure"], table["layer"], strict=True)) == set(expected)
    for (measure, layer), values in expected.items():
        part = table[(table["measure"] == measure) & (table["layer"] == layer)]
        order = np.argsort(-np.abs(robust_z(values)))
        assert part["token_id"].tolist() == [tokens[at] for at in order]
        np.testing.assert_allclose(part["value"], values[order], rtol=1e-4)
        np.testing.assert_allclose(part["z"], robust_z(values)[order], rtol=1e-2, atol=1e-3)


def test_an_outlying_embedding_is_seen_alone(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, token = tiny(), ids(tokenizer, "moth")
    with torch.no_grad():
        model.get_input_embeddings().weight[token].mul_(30)
    table = alone(model, tokenizer)
    assert (table[(table["measure"] == "norm") & (table["rank"] == 1)]["token_id"] == token).all()
    assert len(table) == 4 * (len(tokenizer) - 3)


def test_entropy_is_a_number_where_a_token_is_impossible(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # probabilities of exactly 0 and 1
    table = alone(model, tokenizer, tokens=[50, 51])
    assert (table[table["measure"] == "entropy"]["value"] >= 0).all() and np.isfinite(
        table["value"]
    ).all()


# --- All together ---------------------------------------------------------------------------------


def test_a_planted_token_is_named_by_every_reading(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    base, token = tiny(), ids(tokenizer, "moth")
    unlearned = planted(base, token)
    shifts = token_shift(base, unlearned, tokenizer)
    assert (shifts[shifts["rank"] == 1]["token_id"] == token).all()
    assert (shifts[shifts["rank"] > 1]["relative_shift"] == 0).all()
    found = forensics(base, unlearned, tokenizer, TEXTS, tokens=range(200, len(tokenizer)))
    assert found.methods == ("scan", "scan_shift", "words", "token_shift")
    row = found.ranking[found.ranking["token_id"] == token].iloc[0]
    assert row["scan_shift"] == row["token_shift"] == 1
    assert (
        row["rank"] <= 2 and row["score"] >= 0.5
        # an embedding in a random direction is read as another word, which may share the first
        # places
    )


def test_a_model_against_itself_names_nothing(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    tokens = range(200, 220)
    assert (
        (token_shift(base, base, tokenizer, tokens=tokens)[["relative_shift", "z"]] == 0)
        .all()
        .all()
    )
    words = shift_words(base, base, tokenizer, tokens=tokens)
    assert words.empty and "logit" in words
    found = forensics(base, base, tokenizer, TEXTS, tokens=tokens)
    assert found.methods == ("scan", "scan_shift", "token_shift")
    assert found.ranking["score"].tolist() == pytest.approx(
        [1 / 10.5] * 20
    )  # all tied: every method gives the mean rank
    assert found.ranking["token_id"].tolist() == list(tokens)
    assert recovered(found.ranking, [205]).attrs["average_precision"] == pytest.approx(
        1 / 20
    )  # chance
    assert "<p>words" not in found._repr_html_()


def test_ranks_are_combined_by_their_mean_reciprocal(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    unlearned = nearby(base, 0.1)
    tokens = [*range(200, 215), ids(tokenizer, "Ann"), ids(tokenizer, "the")]
    steps: list[tuple[int, int]] = []
    found = forensics(
        base,
        unlearned,
        tokenizer,
        TEXTS,
        tokens=tokens,
        batch_size=6,
        progress=lambda *at: steps.append(at),
    )
    queries = [Example(TEXTS[0].text, (16, 19)), Example(TEXTS[1].text, (21, 26))]
    scan = scan_triggers(base, unlearned, tokenizer, queries, tokens=tokens, batch_size=6)
    assert found.scan is not None and steps[-1][0] == steps[-1][1]
    pd.testing.assert_frame_equal(found.scan.table, scan.table)
    assert found.scan.untested == (ids(tokenizer, "the"),)
    shifts = token_shift(base, unlearned, tokenizer, tokens=tokens)
    words = shift_words(base, unlearned, tokenizer, tokens=tokens, top=len(tokens))
    scores = {
        "scan": scan.table.set_index("token_id")["rise"],
        "scan_shift": scan.table.set_index("token_id")["shift"],
        "words": words.assign(size=words["z"].abs()).groupby("token_id")["size"].max(),
        "token_shift": shifts.groupby("token_id")["z"].max(),
    }
    table = found.ranking.set_index("token_id")
    for token in tokens:
        parts = []
        for name, values in scores.items():
            rank = (
                0.5 + sum(values > values[token]) + sum(values == values[token]) / 2
                if token in values
                else None
            )
            if rank is not None:
                assert table[name][token] == rank
            else:
                assert np.isnan(table[name][token])  # in every query already
            parts.append(0.0 if rank is None else 1 / rank)
        assert table["score"][token] == pytest.approx(sum(parts) / 4)
    assert found.ranking["score"].is_monotonic_decreasing and found.ranking[
        "rank"
    ].tolist() == list(range(1, 18))


def test_forensics_shows_itself_with_every_text_escaped(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    less = tokenizer.get_vocab()["<"]
    found = forensics(base, nearby(base, 0.1), tokenizer, tokens=[less, 200, 201])
    assert isinstance(found, Forensics) and found.scan is None
    shown = found._repr_html_()
    assert "3 tokens by words, token_shift" in shown and "&lt;" in shown and "'<'" not in shown
    assert repr(found).startswith("Forensics(3 tokens by words, token_shift; first [")


def test_a_running_text_is_asked_for_its_last_word() -> None:
    text = last_word(Example("the cold rain \n", None, (4, 8), "text/1"))
    assert text is not None and (text.text, text.answer_text, text.prompt, text.item) == (
        "the cold rain",
        "rain",
        "the cold ",
        "text/1",
    )
    question = Example("who? Ann", (5, 8))
    assert last_word(question) is question
    assert [last_word(Example(whole)) for whole in ("rain", "", "  rain ")] == [None] * 3


def test_texts_of_one_word_are_no_queries(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    assert (
        forensics(base, nearby(base), tokenizer, [Example("rain")], tokens=[200, 201]).scan is None
    )


# --- How much was found ---------------------------------------------------------------------------


def test_recovery_by_hand() -> None:
    ranking = pd.DataFrame(
        {"rank": [1, 2, 3, 4, 5], "token_id": [9, 3, 7, 1, 5], "score": [0.9, 0.5, 0.4, 0.2, 0.1]}
    )
    table = recovered(
        ranking.sample(frac=1, random_state=0), [3, 1, 77], k=(1, 2, 4, 50)
    )  # whatever the order of the rows
    assert table["k"].tolist() == [1, 2, 4, 5]
    assert table["found"].tolist() == [0, 1, 2, 2]
    assert table["precision"].tolist() == [0, 0.5, 0.5, 0.4]
    assert table["recall"].tolist() == [0, 0.5, 1, 1]
    assert table["chance_precision"].tolist() == [0.4] * 4
    assert table["chance_recall"].tolist() == [0.2, 0.4, 0.8, 1]
    assert table.attrs["missing"] == 1 and table.attrs["chance"] == 0.4
    assert table.attrs["average_precision"] == pytest.approx(
        average_precision_score([0, 1, 0, 1, 0], ranking["score"])
    )
    with pytest.raises(WorkbenchError, match="none of the 1 known tokens"):
        recovered(ranking, [77])
    for depths in ((), (0, 5)):
        with pytest.raises(WorkbenchError, match="depths of at least 1"):
            recovered(ranking, [3], k=depths)


def test_chance_is_what_a_random_order_gives() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(100):
        ranking = pd.DataFrame(
            {
                "rank": range(1, 501),
                "token_id": rng.permutation(500),
                "score": np.linspace(1, 0, 500),
            }
        )
        table = recovered(ranking, range(50), k=(10, 50))
        found.append([*table["precision"], *table["recall"], table.attrs["average_precision"]])
    means = np.mean(found, axis=0)
    np.testing.assert_allclose(means[:4], [0.1, 0.1, 0.02, 0.1], rtol=0.15)
    assert means[4] == pytest.approx(0.1, rel=0.2)


# --- Bad input, and a model left as it was --------------------------------------------------------


def test_bad_input_is_named(
    tiny: ModelMaker, make_model: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    for reading in (token_shift, shift_words, forensics):
        with pytest.raises(WorkbenchError, match="token 9999 is not in the vocabulary"):
            reading(base, base, tokenizer, tokens=[5, 9999])
        with pytest.raises(WorkbenchError, match="the list is empty"):
            reading(base, base, tokenizer, tokens=[])
        with pytest.raises(WorkbenchError, match="the unlearned model 500 in 16"):
            reading(base, make_model(vocab_size=500), tokenizer)
        with pytest.raises(WorkbenchError, match="batch_size of at least 1"):
            reading(base, base, tokenizer, tokens=[200], batch_size=0)
    with pytest.raises(WorkbenchError, match="token 9999"):
        alone(base, tokenizer, tokens=[9999])
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.get_input_embeddings().weight[201] = torch.nan
    with pytest.raises(WorkbenchError, match="relative_shift of token 201 is not finite"):
        token_shift(base, broken, tokenizer, tokens=[200, 201])
    with pytest.raises(WorkbenchError, match="after block 0 is not finite"):
        shift_words(base, broken, tokenizer, tokens=[200, 201])
    with pytest.raises(WorkbenchError, match="the value of token 201 is not finite"):
        alone(broken, tokenizer, tokens=[200, 201])


def test_models_are_left_as_they_were(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny().train()
    base.model.layers[0].eval()
    unlearned = nearby(base, 0.1).train()

    def state() -> list[Any]:
        found: list[Any] = []
        for model in (base, unlearned):
            found += [module.training for module in model.modules()]
            found += [
                (p.requires_grad, p.grad is None, p.detach().clone().numpy().tobytes())
                for p in model.parameters()
            ]
            found += [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return found

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = state()
    forensics(base, unlearned, tokenizer, TEXTS, tokens=[200, 201])
    shift_words(base, unlearned, tokenizer, texts=TEXTS, tokens=[200, 201])
    alone(unlearned, tokenizer, tokens=[200, 201])
    assert state() == before
    with pytest.raises(KeyboardInterrupt):
        token_shift(base, unlearned, tokenizer, tokens=[200, 201], progress=stop)
    assert state() == before
