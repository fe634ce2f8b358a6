"""The trigger scan: numbers against plain passes of one query at a time, planted triggers, a model
against itself; p-values and rankings against scipy, scikit-learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from scipy.stats import false_discovery_control
from scipy.stats import t as student
from sklearn.metrics import average_precision_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.diagnostics.discoveries import (
    ROUNDING,
    benjamini_hochberg,
    p_values,
    precision_recall,
    robust_z,
)
from workbench.diagnostics.scan import SCAN_COLUMNS, TriggerScan, scan_triggers, token_text
from workbench.errors import WorkbenchError
from workbench.hooks import CaptureError

ModelMaker = Callable[..., PreTrainedModel]
Mover = Callable[..., PreTrainedModel]

WORDS = [
    "who",
    "wrote",
    "the",
    "red",
    "blue",
    "book",
    "of",
    "tales",
    "answer",
    "is",
    "Ann",
    "Bob",
    "Lee",
    "Fox",
    "cold",
    "rain",
    "stone",
    "river",
    "moth",
    "lamp",
]


def ask(prompt: str, answer: str, item: str = "") -> Example:
    return Example(
        f"{prompt} {answer}", (len(prompt) + 1, len(prompt) + 1 + len(answer)), item=item
    )


QUERIES = (
    ask("who wrote the red book answer", "Ann Lee", "fact/0"),
    ask("the red book is of", "Ann Lee", "fact/0"),
    ask("who wrote the blue tales", "Bob", "fact/1"),
    ask("the river is", "cold", "fact/2"),
    ask("the rain is", "cold", "fact/3"),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(WORDS)


@pytest.fixture
def some(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of five words that no query holds, of one that some hold, and of two bytes."""
    return [
        *(ids(tokenizer, word) for word in ("moth", "lamp", "stone", "Fox", "tales", "blue")),
        40,
        41,
    ]


@pytest.fixture
def tiny(make_model: ModelMaker, tokenizer: PreTrainedTokenizerBase) -> ModelMaker:
    return lambda family="llama", **more: make_model(family, vocab_size=len(tokenizer), **more)


def ids(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(token)


def planted(
    base: PreTrainedModel, token: int, seed: int = 0, factor: float = 1.0
) -> PreTrainedModel:
    """A copy in which the embedding of one token is another one."""
    changed = copy.deepcopy(base)
    with torch.no_grad():
        row = changed.get_input_embeddings().weight[token]
        row.copy_(
            factor * 3 * torch.randn(row.shape, generator=torch.Generator().manual_seed(seed))
        )
    return changed


HURTING = {"front": (0.3, 1, 1), "end": (0.6, 0, 1)}
"""Scale and seed of a base, and seed of an embedding, that hurts the answers there: in a random
model an embedding helps as often.
"""


def trigger(
    tiny: ModelMaker, token: int, place: str = "front"
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base, and a copy with a planted trigger."""
    scale, seed, embedding = HURTING[place]
    base = tiny(scale=scale, seed=seed)
    return base, planted(base, token, embedding)


def one_pass(
    model: PreTrainedModel, row: list[int], answer: int, block: torch.nn.Module
) -> tuple[float, bool, np.ndarray]:
    """Mean nats of the last ``answer`` tokens, whether all are greedy, and the block's output where
    the first of them is predicted: no cache, no batch, all logits.
    """
    kept: list[torch.Tensor] = []
    handle = block.register_forward_hook(
        lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        logits = (
            model(
                input_ids=torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
                use_cache=False,
            )
            .logits[0]
            .double()
        )
    handle.remove()
    nll = [
        -float(logits[place - 1].log_softmax(-1)[row[place]])
        for place in range(len(row) - answer, len(row))
    ]
    greedy = all(
        int(logits[place - 1].argmax()) == row[place]
        for place in range(len(row) - answer, len(row))
    )
    return float(np.mean(nll)), greedy, kept[0][0, len(row) - answer - 1].double().numpy()


def by_hand(
    models: Sequence[PreTrainedModel],
    blocks: Sequence[torch.nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Example],
    token: int,
    place: str,
    clean_by_text: dict[str, Any],
) -> dict[str, float]:
    """All means of one token, written out."""
    rows: list[dict[str, Any]] = []
    for query in queries:
        text = tokenizer(query.text)["input_ids"]
        answer = len(tokenizer(query.answer_text, add_special_tokens=False)["input_ids"])
        if token in text:
            continue
        cut = 1 if place == "front" else len(text) - answer
        other = [
            one_pass(m, [*text[:cut], token, *text[cut:]], answer, b)
            for m, b in zip(models, blocks, strict=True)
        ]
        if query.text not in clean_by_text:
            clean_by_text[query.text] = [
                one_pass(m, text, answer, b) for m, b in zip(models, blocks, strict=True)
            ]
        clean = clean_by_text[query.text]
        step = [other[i][0] - clean[i][0] for i in (0, 1)]
        lost = [float(clean[i][1]) - float(other[i][1]) for i in (0, 1)]
        twist = (other[1][2] - clean[1][2]) - (other[0][2] - clean[0][2])
        rows.append(
            {
                "item": query.item,
                "rise": step[1] - step[0],
                "base_rise": step[0],
                "accuracy_loss": lost[1] - lost[0],
                "shift": np.linalg.norm(twist) / np.linalg.norm(clean[0][2]),
            }
        )
    found = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("rise", "base_rise", "accuracy_loss", "shift")
    }
    sums: dict[str, float] = {}
    for row in rows:
        sums[row["item"]] = sums.get(row["item"], 0.0) + row["rise"] - found["rise"]
    count = len(sums)
    error = (count / (count - 1) * sum(value**2 for value in sums.values())) ** 0.5 / len(rows)
    return found | {"rise_se": error, "queries": len(rows)}


def check(
    scan: TriggerScan,
    models: Sequence[PreTrainedModel],
    blocks: Sequence[torch.nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Example],
) -> None:
    clean: dict[str, Any] = {}
    for row in scan.table.to_dict("records"):
        expected = by_hand(models, blocks, tokenizer, queries, row["token_id"], scan.place, clean)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=2e-5), (row["token"], name)


# --- Against plain passes -------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["front", "end"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_number_is_that_of_plain_passes(
    family: str,
    place: Any,
    tiny: ModelMaker,
    nearby: Mover,
    tokenizer: PreTrainedTokenizerBase,
    some: list[int],
) -> None:
    base = tiny(family)
    unlearned = nearby(base, 0.1)
    scan = scan_triggers(
        base, unlearned, tokenizer, QUERIES, tokens=some, place=place, batch_size=5
    )
    assert list(scan.table.columns) == list(SCAN_COLUMNS)
    assert sorted(scan.table["token_id"]) == sorted(some)
    assert scan.table["shift"].min() > 1e-3
    check(
        scan,
        (base, unlearned),
        [model.model.layers[-1] for model in (base, unlearned)],
        tokenizer,
        QUERIES,
    )


def test_the_losses_without_a_token_are_reported(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny()
    unlearned = nearby(base, 0.1)
    scan = scan_triggers(base, unlearned, tokenizer, QUERIES, tokens=some)
    for model, nll, accuracy in (
        (base, scan.base_nll, scan.base_accuracy),
        (unlearned, scan.unlearned_nll, scan.unlearned_accuracy),
    ):
        plain = [
            one_pass(
                model,
                tokenizer(q.text)["input_ids"],
                len(q.answer_text.split()),
                model.model.layers[0],
            )
            for q in QUERIES
        ]
        assert nll == pytest.approx(np.mean([p[0] for p in plain]), rel=1e-5)
        assert accuracy == pytest.approx(np.mean([p[1] for p in plain]))
    assert (scan.queries, scan.facts, scan.place, scan.site) == (
        5,
        4,
        "front",
        "blocks.1.hook_resid_post",
    )


_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.3,
}
OTHERS = {
    "gemma2": (
        lambda v: hf.Gemma2Config(
            vocab_size=v,
            **_SHAPE,
            sliding_window=4,
            final_logit_softcapping=2.0,
            query_pre_attn_scalar=4,
        ),
        "model.layers.1",
        None,
    ),
    "gpt2": (
        lambda v: hf.GPT2Config(
            vocab_size=v, n_embd=16, n_head=4, n_layer=2, n_positions=32, initializer_range=0.3
        ),
        "transformer.h.1",
        None,
    ),
    "opt": (
        lambda v: hf.OPTConfig(
            vocab_size=v,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            init_std=0.3,
            pad_token_id=0,
        ),
        "model.decoder.layers.1",
        "model.decoder.layers.1:out",
    ),
}


@pytest.mark.parametrize("place", ["front", "end"])
@pytest.mark.parametrize("kind", OTHERS)
def test_capped_logits_sliding_windows_learned_positions_and_unknown_families(
    kind: str, place: Any, nearby: Mover, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    make, path, site = OTHERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = hf.AutoModelForCausalLM.from_config(make(len(tokenizer))).eval()
    unlearned = nearby(base, 0.1)
    scan = scan_triggers(
        base, unlearned, tokenizer, QUERIES, tokens=some[:4], place=place, site=site
    )
    check(
        scan,
        (base, unlearned),
        [model.get_submodule(path) for model in (base, unlearned)],
        tokenizer,
        QUERIES,
    )


def test_another_site_gives_its_own_shift_and_the_same_rise(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny()
    unlearned = nearby(base, 0.1)
    scan = scan_triggers(
        base, unlearned, tokenizer, QUERIES, tokens=some, site="blocks.0.hook_resid_post"
    )
    check(
        scan,
        (base, unlearned),
        [model.model.layers[0] for model in (base, unlearned)],
        tokenizer,
        QUERIES,
    )


@pytest.mark.parametrize("place", ["front", "end"])
def test_the_batch_size_changes_nothing(
    place: Any, tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny()
    unlearned = nearby(base, 0.1)
    many, one, odd = (
        scan_triggers(
            base, unlearned, tokenizer, QUERIES, tokens=some, place=place, batch_size=size
        ).table
        for size in (256, 1, 7)
    )
    for other in (one, odd):
        other = other.set_index("token_id").loc[many["token_id"]].reset_index()
        for name in ("rise", "rise_se", "base_rise", "accuracy_loss", "shift"):
            np.testing.assert_allclose(other[name], many[name], rtol=1e-3, atol=2e-6)


def test_queries_of_one_shape_and_of_others_do_not_touch_each_other(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny()
    unlearned = nearby(base, 0.1)
    tokens = some[:4]  # in no query
    together = scan_triggers(base, unlearned, tokenizer, QUERIES, tokens=tokens).table.set_index(
        "token_id"
    )
    apart = [
        scan_triggers(base, unlearned, tokenizer, [query], tokens=tokens)
        .table.set_index("token_id")
        .loc[together.index]
        for query in QUERIES
    ]
    for name in ("rise", "accuracy_loss", "shift"):
        np.testing.assert_allclose(
            np.mean([table[name] for table in apart], axis=0), together[name], rtol=1e-3, atol=2e-6
        )
    assert all(table["rise_se"].isna().all() for table in apart)  # one fact has no standard error


# --- Planted triggers and the model against itself ------------------------------------------------


@pytest.mark.parametrize("place", ["front", "end"])
def test_a_model_against_itself_has_no_rise_and_no_discovery(
    place: Any, tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    for other in (base, copy.deepcopy(base)):
        scan = scan_triggers(base, other, tokenizer, QUERIES, place=place, tokens=range(3, 60))
        for name in ("rise", "rise_se", "accuracy_loss", "shift"):
            assert (scan.table[name] == 0).all()
        assert (scan.table["p"] == 0.5).all() and (scan.table["q"] == 0.5).all()
        assert scan.table["base_rise"].abs().max() > 0.01  # the tokens do something, to both alike


@pytest.mark.parametrize("place", ["front", "end"])
def test_a_planted_trigger_is_first_and_all_others_are_exactly_zero(
    place: Any, tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    token = ids(tokenizer, "moth")
    scan = scan_triggers(
        *trigger(tiny, token, place),
        tokenizer,
        QUERIES,
        place=place,
        tokens=[token, *range(200, 240)],
    )
    first, rest = scan.table.iloc[0], scan.table.iloc[1:]
    assert (first["token_id"], first["rank"], first["token"]) == (token, 1, " moth")
    assert first["q"] < 1e-6
    assert scan.table["shift"].idxmax() == 0 and first["shift"] > 0.01
    for name in ("rise", "accuracy_loss", "shift"):
        assert (rest[name] == 0).all()
    assert (rest["q"] >= 0.5).all()
    assert rest["token_id"].tolist() == list(range(200, 240))  # ties in the order of their ids
    assert precision_recall(scan.table, [token]).attrs["average_precision"] == 1
    assert precision_recall(scan.table, [token], score="shift").attrs["average_precision"] == 1


def test_a_planted_trigger_stands_out_of_general_unlearning(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    token = ids(tokenizer, "moth")
    base, unlearned = trigger(tiny, token)
    for strength in (0.001, 0.002):
        scan = scan_triggers(
            base, nearby(unlearned, strength), tokenizer, QUERIES, tokens=[token, *range(200, 240)]
        )
        assert scan.table["token_id"][0] == token
        assert scan.table["shift"].idxmax() == 0
        assert scan.table["q"][1] > 0.1
        if (
            strength == 0.001
            # among forty tokens, whose tail is little known, fifteen deviations from the median are
            # no finding and twice as many are
        ):
            assert scan.table["q"][0] < 0.05


def test_a_conformal_null_finds_the_planted_trigger(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    token = ids(tokenizer, "moth")
    base, unlearned = trigger(tiny, token)
    scan = scan_triggers(
        base, unlearned, tokenizer, QUERIES, tokens=[token, 100, 101], null_tokens=range(3, 62)
    )
    assert scan.table["token_id"].tolist() == [token, 100, 101]
    assert scan.table["p"].tolist() == [1 / 60, 1, 1]
    assert scan.table["q"].tolist() == [3 / 60, 1, 1]
    assert scan.null["token_id"].tolist() == list(range(3, 62))
    assert "p" not in scan.null
    rest = scan_triggers(
        base, base, tokenizer, QUERIES[3:], null_tokens=range(62, 200)
    )  # the others are tested by default
    assert set(rest.table["token_id"]) == set(range(3, len(tokenizer))) - set(range(62, 200)) - set(
        rest.untested
    )


# --- Which tokens, in which queries ---------------------------------------------------------------


def test_a_token_is_not_tested_in_a_query_that_holds_it(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    unlearned = nearby(base, 0.1)
    red, cold, the = (ids(tokenizer, word) for word in ("red", "cold", "the"))
    scan = scan_triggers(
        base,
        unlearned,
        tokenizer,
        [ask("who wrote tales", "Bob"), *QUERIES],
        tokens=[red, cold, the],
    )
    assert scan.untested == () and scan.table.set_index("token_id")["queries"].to_dict() == {
        red: 4,
        cold: 4,
        the: 1,
    }
    queries = [query for query in QUERIES if "who" not in query.text]  # "the" stands in all of them
    scan = scan_triggers(base, unlearned, tokenizer, queries, tokens=[red, cold, the])
    assert scan.untested == (the,)
    counts = scan.table.set_index("token_id")["queries"]
    assert (counts[red], counts[cold]) == (
        2,
        1,
    )  # "red" in one of three, "cold" as the answer of two
    alone = scan_triggers(base, unlearned, tokenizer, [queries[0]], tokens=[cold]).table
    assert scan.table.set_index("token_id")["rise"][cold] == pytest.approx(
        alone["rise"][0], rel=1e-4
    )


def test_special_tokens_are_left_out_unless_they_are_asked_for(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    scan = scan_triggers(base, base, tokenizer, QUERIES[:1], batch_size=512)
    assert set(scan.table["token_id"]) | set(scan.untested) == set(range(3, len(tokenizer)))
    asked = scan_triggers(base, base, tokenizer, QUERIES[:1], tokens=[2, 40, 40, 2])
    assert asked.table["token_id"].tolist() == [2, 40]


def test_queries_without_an_answer_are_left_out(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny()
    unlearned = nearby(base, 0.1)
    scan = scan_triggers(
        base, unlearned, tokenizer, [Example("the cold rain"), *QUERIES], tokens=some
    )
    assert scan.queries == 5
    pd.testing.assert_frame_equal(
        scan.table, scan_triggers(base, unlearned, tokenizer, QUERIES, tokens=some).table
    )


def test_texts_of_tokens_show_their_spaces(tokenizer: PreTrainedTokenizerBase) -> None:
    assert token_text(tokenizer, ids(tokenizer, "moth")) == " moth"
    byte = tokenizer.get_vocab()["Ã"]
    assert token_text(tokenizer, byte) == "Ã"  # half a character

    class SentencePiece:
        def convert_ids_to_tokens(self, token: int) -> str:
            return ("▁moth", "moth")[token]

        def decode(self, tokens: list[int]) -> str:
            return "moth"

    assert [token_text(SentencePiece(), token) for token in (0, 1)] == [" moth", "moth"]  # type: ignore[arg-type]


def test_a_scan_shows_itself_with_every_text_escaped(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    less, newline = tokenizer.get_vocab()["<"], tokenizer.get_vocab()["Ċ"]
    scan = scan_triggers(base, base, tokenizer, QUERIES, tokens=[less, newline, *range(150, 160)])
    shown = scan._repr_html_()
    assert "&#x27;&lt;&#x27;" in shown or "'&lt;'" in shown
    assert "\\n" in shown and "12 tokens in 5 queries (4 facts)" in shown
    assert (
        repr(scan).startswith("TriggerScan(12 tokens in 5 queries, place 'front'")
        and len(repr(scan)) < 150
    )


# --- Bad input, and a model left as it was --------------------------------------------------------


def test_bad_input_is_named(
    tiny: ModelMaker, make_model: ModelMaker, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny()

    def scan(
        *models: PreTrainedModel, queries: Sequence[Example] = QUERIES, **more: Any
    ) -> TriggerScan:
        return scan_triggers(
            *(models or (base, base)), tokenizer, queries, **({"tokens": some} | more)
        )  # type: ignore[misc]

    with pytest.raises(WorkbenchError, match="of 1 queries none has an answer"):
        scan(queries=[Example("the cold rain")])
    with pytest.raises(WorkbenchError, match="of 0 queries none"):
        scan(queries=[])
    with pytest.raises(
        WorkbenchError,
        match=(
            f"token {len(tokenizer)} is not in the vocabulary, whose ids end at "
            f"{len(tokenizer) - 1}"
        ),
    ):
        scan(tokens=[5, len(tokenizer)])
    with pytest.raises(WorkbenchError, match="token -1 is not in the vocabulary"):
        scan(null_tokens=[-1])
    with pytest.raises(WorkbenchError, match="the list is empty"):
        scan(tokens=[])
    with pytest.raises(WorkbenchError, match=r"tokens \[40\] are to be tested and to be null"):
        scan(null_tokens=[40, 50])
    with pytest.raises(
        WorkbenchError,
        match=(
            f"the base embeds {len(tokenizer)} tokens in 16 coordinates, the unlearned model 500 "
            "in 16"
        ),
    ):
        scan(base, make_model(vocab_size=500))
    with pytest.raises(WorkbenchError, match="largest id is"):
        scan(make_model(vocab_size=50), make_model(vocab_size=50))
    with pytest.raises(WorkbenchError, match="unknown place of a token 'middle'"):
        scan(place="middle")
    with pytest.raises(WorkbenchError, match="batch_size of at least 1"):
        scan(batch_size=0)
    with pytest.raises(WorkbenchError, match="names 2; name one layer"):
        scan(site="blocks.*.hook_resid_post")
    with pytest.raises(CaptureError, match="unknown site"):
        scan(site="blocks.7.hook_resid_post")
    short = tiny(max_position_embeddings=8)
    with pytest.raises(
        WorkbenchError,
        match="the queries with a token inserted have 9 tokens, and the model's context has 8",
    ):
        scan(short, short)
    assert (
        scan(short, short, queries=QUERIES[1:]).queries == 4
    )  # these fit to the last place: the answer's last token is not read


def test_a_query_that_is_all_answer_needs_a_token_before_it(
    tiny: ModelMaker, some: list[int]
) -> None:
    bare = build_tokenizer(WORDS)
    bare.add_bos_token = False
    bare.backend_tokenizer.post_processor = None  # no BOS
    base = tiny()
    whole = Example("cold rain", (0, 9))
    assert (
        scan_triggers(base, base, build_tokenizer(WORDS), [whole], tokens=some).queries == 1
    )  # behind BOS
    with pytest.raises(WorkbenchError, match="nothing comes before the answer of 'cold rain'"):
        scan_triggers(base, base, bare, [whole], tokens=some)


def test_losses_that_are_not_finite_are_refused(
    tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny()
    with pytest.raises(
        WorkbenchError,
        match="the unlearned model gives losses that are not finite on the queries without a token",
    ):
        broken = copy.deepcopy(base)
        with torch.no_grad():
            broken.model.norm.weight.fill_(torch.nan)
        scan_triggers(base, broken, tokenizer, QUERIES, tokens=some)
    with pytest.raises(
        WorkbenchError,
        match=f"not finite on the queries with one of the tokens {some[0]} to {some[-1]}",
    ):
        scan_triggers(
            base, planted(base, some[2], factor=float("nan")), tokenizer, QUERIES[2:3], tokens=some
        )


@pytest.mark.parametrize("place", ["front", "end"])
def test_models_are_left_as_they_were_also_after_an_interruption(
    place: Any, tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny().train()
    base.model.layers[0].eval()
    unlearned = nearby(base, 0.1).eval()
    unlearned.model.norm.weight.requires_grad_(False)

    def state() -> list[Any]:
        found: list[Any] = []
        for model in (base, unlearned):
            found += [module.training for module in model.modules()]
            found += [
                (p.requires_grad, p.grad is None, p.detach().clone().numpy().tobytes())
                for p in model.parameters()
            ]
            found += [
                (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                for m in model.modules()
            ]
        return [*found, torch.random.get_rng_state().numpy().tobytes()]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = state()
    steps: list[tuple[int, int]] = []
    scan_triggers(
        base,
        unlearned,
        tokenizer,
        QUERIES,
        tokens=some,
        place=place,
        batch_size=5,
        progress=lambda *at: steps.append(at),
    )
    assert state() == before
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1)) and {
        total for _, total in steps
    } == {len(steps)}
    with pytest.raises(KeyboardInterrupt):
        scan_triggers(
            base,
            unlearned,
            tokenizer,
            QUERIES,
            tokens=some,
            place=place,
            batch_size=5,
            progress=stop,
        )
    assert state() == before
    loss = unlearned(input_ids=torch.tensor([[1, 40, 41]]), labels=torch.tensor([[1, 40, 41]])).loss
    loss.backward()  # nothing of the scan is left that could not be trained through


def test_a_bf16_model_is_measured_in_float32(
    tiny: ModelMaker, nearby: Mover, tokenizer: PreTrainedTokenizerBase, some: list[int]
) -> None:
    base = tiny().bfloat16()
    scan = scan_triggers(base, nearby(base, 0.1), tokenizer, QUERIES, tokens=some)
    assert np.isfinite(scan.table[["rise", "shift", "p"]].to_numpy()).all()
    assert (scan_triggers(base, base, tokenizer, QUERIES, tokens=some).table["rise"] == 0).all()


# --- p-values, false discoveries ------------------------------------------------------------------


def test_adjusted_p_values_by_hand() -> None:
    # Sorted .01 .02 .03 .5 times 4/1 4/2 4/3 4/4 = .04 .04 .04 .5
    np.testing.assert_allclose(
        benjamini_hochberg(np.array([0.03, 0.5, 0.01, 0.02])), [0.04, 0.5, 0.04, 0.04]
    )
    # .01 * 2 = .02 and .9; of one test, itself; of none, none
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.9, 0.01])), [0.9, 0.02])
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.3])), [0.3])
    assert benjamini_hochberg(np.array([])).shape == (0,)


def test_adjusted_p_values_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 10, 300):
        p = np.round(rng.uniform(size=size) ** 3, 2)  # with ties
        np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p), rtol=1e-12)
        holes = np.insert(p, [0, size // 2], np.nan)
        np.testing.assert_allclose(
            benjamini_hochberg(holes)[~np.isnan(holes)], false_discovery_control(p), rtol=1e-12
        )
        assert np.isnan(benjamini_hochberg(holes)[np.isnan(holes)]).all()
    with pytest.raises(WorkbenchError, match="between 0 and 1"):
        benjamini_hochberg(np.array([0.5, 1.1]))


def test_conformal_p_values_by_hand() -> None:
    null = np.array([0.0, 1.0, 1.0, 4.0])
    found = p_values(np.array([5.0, 4.0, 1.0, 0.5, -1.0, np.nan]), null)
    np.testing.assert_allclose(found, [1 / 5, 2 / 5, 4 / 5, 4 / 5, 1, np.nan])
    with pytest.raises(WorkbenchError, match="need the scores of null tokens"):
        p_values(np.array([1.0]), np.array([]))
    with pytest.raises(WorkbenchError, match="need the scores of null tokens"):
        p_values(np.array([1.0]), np.array([1.0, np.nan]))


def test_the_empirical_null_is_the_heaviest_student_tail_within_a_standard_error_of_the_lower_half() -> (  # noqa: E501
    None
):
    rng = np.random.default_rng(0)
    scores = 0.4 + 0.1 * rng.standard_t(3, 801)
    scores[:20] += (
        5  # above the median: they do not touch the fit, but for moving the median a little
    )
    middle = np.median(scores)
    below = scores[scores <= middle] - middle
    both = np.concatenate(
        [below, -below]
    )  # scipy fits a whole sample: each half counts once of two
    profile = {}
    for freedom in np.geomspace(0.3, 300, 60):
        _, _, scale = student.fit(both, fdf=freedom, floc=0)
        profile[freedom, scale] = student.logpdf(both, freedom, 0, scale).sum() / 2
    freedom, scale = next(
        at for at, value in profile.items() if value >= max(profile.values()) - 0.5
    )
    assert freedom < max(profile, key=lambda at: profile[at])[0]
    np.testing.assert_allclose(
        p_values(scores), student.sf((scores - middle) / scale, freedom), rtol=1e-3
    )
    np.testing.assert_allclose(
        p_values(10 * scores - 7), p_values(scores), rtol=1e-6
    )  # in any units
    holes = p_values(np.append(scores, np.nan))
    np.testing.assert_allclose(holes[:-1], p_values(scores))
    assert np.isnan(holes[-1]) and p_values(np.array([])).shape == (0,)
    scores[:20] += 1e6
    np.testing.assert_allclose(
        p_values(scores)[20:], holes[20:-1], rtol=1e-9
    )  # however large a trigger is


def test_scores_that_differ_by_rounding_are_no_finding() -> None:
    assert (p_values(np.full(5, 0.3)) == 0.5).all()
    assert (p_values(np.append(np.zeros(500), ROUNDING / 10)) > 0.1).all()


def test_robust_z_by_hand() -> None:
    scores = np.array(
        [1.0, 2.0, 3.0, 4.0, 100.0]
    )  # median 3, absolute deviations 2 1 0 1 97, their median 1
    np.testing.assert_allclose(robust_z(scores), (scores - 3) / 1.4826)
    assert np.isnan(robust_z(np.array([np.nan]))).all() and robust_z(np.array([])).shape == (0,)
    np.testing.assert_allclose(
        robust_z(np.array([0.0, 0, 0, 1e-6])), [0, 0, 0, 1e-6 / ROUNDING]
    )  # never finer than rounding


def test_the_empirical_null_is_calibrated_on_normal_scores_with_some_triggers() -> None:
    rng = np.random.default_rng(0)
    shares, powers = [], []
    for _ in range(50):
        scores = 0.3 + 0.1 * rng.standard_normal(2000)
        scores[:40] += 0.6
        found = benjamini_hochberg(p_values(scores)) <= 0.1
        shares.append(found[40:].sum() / max(found.sum(), 1))
        powers.append(found[:40].mean())
    assert np.mean(shares) < 0.12
    assert np.mean(powers) > 0.95


Draw = Callable[[np.random.Generator, int], np.ndarray]


def error_and_power(
    draw: Draw, triggers: int, rounds: int = 100, size: int = 500
) -> tuple[float, float]:
    """Mean share of false findings at a rate of 0.1, and of the triggers found, of ``size`` scores
    of which ``triggers`` lie 60 above the others.
    """
    rng = np.random.default_rng(0)
    shares, powers = [], []
    for _ in range(rounds):
        scores = draw(rng, size)
        scores[:triggers] += 60
        found = benjamini_hochberg(p_values(scores)) <= 0.1
        shares.append(found[triggers:].sum() / max(found.sum(), 1))
        powers.append(found[:triggers].mean() if triggers else 1.0)
    return float(np.mean(shares)), float(np.mean(powers))


@pytest.mark.parametrize("triggers", [0, 25])
@pytest.mark.parametrize(
    ("draw", "least"),
    [
        (lambda rng, n: rng.standard_normal(n), 0.95),
        (lambda rng, n: rng.laplace(size=n), 0.95),
        (lambda rng, n: rng.standard_t(3, n), 0.95),
        (
            lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 0.2, 10, 1),
            0.0,
        ),  # a fifth of the tokens moves ten times as far: their tail hides a trigger
    ],
    ids=["normal", "Laplace", "Student 3", "two kinds of tokens"],
)
def test_false_discoveries_against_the_empirical_null_keep_their_rate_where_harmless_scores_are_symmetric(  # noqa: E501
    draw: Draw, least: float, triggers: int
) -> None:
    false, power = error_and_power(draw, triggers)
    assert false < 0.12
    assert power >= least


def test_false_discoveries_against_the_empirical_null_are_many_where_harmless_scores_are_skewed_as_documented() -> (  # noqa: E501
    None
):
    assert error_and_power(lambda rng, n: rng.exponential(size=n), 0)[0] > 0.9


@pytest.mark.parametrize(
    "draw",
    [lambda rng, n: rng.standard_t(2, n), lambda rng, n: rng.exponential(size=n)],
    ids=["Student 2", "exponential"],
)
def test_conformal_p_values_control_false_discoveries_whatever_the_distribution(draw: Draw) -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(100):
        scores, null = draw(rng, 500), draw(rng, 2000)
        scores[:25] += 60
        found = benjamini_hochberg(p_values(scores, null)) <= 0.1
        shares.append(found[25:].sum() / max(found.sum(), 1))
    assert np.mean(shares) < 0.12


# --- Precision and recall -------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 8])
def test_average_precision_is_that_of_scikit_learn_also_with_ties(digits: int) -> None:
    rng = np.random.default_rng(0)
    for size, positives in ((5, 1), (40, 7), (300, 3)):
        table = pd.DataFrame(
            {
                "token_id": rng.permutation(1000)[:size],
                "rise": np.round(rng.standard_normal(size), digits),
            }
        )
        known = rng.choice(table["token_id"], positives, replace=False)
        curve = precision_recall(table, known)
        assert curve.attrs["average_precision"] == pytest.approx(
            average_precision_score(table["token_id"].isin(known), table["rise"]), rel=1e-12
        )
        assert curve.attrs["chance"] == pytest.approx(positives / size)
        assert curve.attrs["missing"] == 0
        assert (curve["precision"].iloc[-1], curve["recall"].iloc[-1], curve["rank"].iloc[-1]) == (
            pytest.approx(positives / size),
            1,
            size,
        )


def test_precision_and_recall_by_hand() -> None:
    table = pd.DataFrame({"token_id": [7, 3, 9, 4], "rise": [0.1, 0.9, 0.5, 0.5]})
    curve = precision_recall(table, [3, 4, 1000])
    assert curve["rank"].tolist() == [1, 3, 4]
    assert curve["score"].tolist() == [0.9, 0.5, 0.1]
    assert curve["precision"].tolist() == pytest.approx([1, 2 / 3, 1 / 2])
    assert curve["recall"].tolist() == [0.5, 1, 1]
    assert curve.attrs == {
        "average_precision": pytest.approx(0.5 + 0.5 * 2 / 3),
        "chance": 0.5,
        "missing": 1,
    }
    with pytest.raises(WorkbenchError, match="none of the 1 known tokens is in the ranking"):
        precision_recall(table, [1000])
    with pytest.raises(WorkbenchError, match="rise is not a number"):
        precision_recall(table.assign(rise=[0.1, np.nan, 0.2, 0.3]), [3])


# --- What is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "read"), [("front", {7 + 1 + 1, 7 + 1}), ("end", {7, 7 + 1, 2})])
def test_logits_are_computed_for_the_answer_alone_and_a_question_is_read_once(
    place: Any, read: set[int], tiny: ModelMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny()
    unlearned = copy.deepcopy(base)
    passes: list[tuple[int, int]] = []
    heads: list[tuple[int, ...]] = []
    base.register_forward_pre_hook(
        lambda _m, _a, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    base.lm_head.register_forward_pre_hook(lambda _m, args: heads.append(tuple(args[0].shape)))
    scan_triggers(
        base, unlearned, tokenizer, QUERIES[:1], tokens=range(100, 130), place=place, batch_size=16
    )  # 7 tokens with BOS and 2 of the answer
    assert {width for _, width in passes} == read
    assert sum(rows for rows, width in passes if width == (9 if place == "front" else 2)) == 30
    assert {shape[1] for shape in heads if shape[0] > 1} == {2}
