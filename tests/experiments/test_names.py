"""The names experiment: the control's rows, what counts as success, the next name's probability, a
tiny run, and the table beside the published row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from workbench import runner
from workbench.attacks.relearn import DivergedError
from workbench.claims import decide
from workbench.data.names import FIRST, REPETITIONS, SECOND, NamesCorpus, build_names
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import wilson
from workbench.experiments import names as module
from workbench.experiments.names import (
    PUBLISHED,
    NamesSettings,
    names_table,
    next_name_probability,
    success,
    without_pairs,
)
from workbench.runner import Result
from workbench.runs.folder import CONFIG, ITEMS, PROVENANCE, VALUES
from workbench.tables import ITEM_COLUMNS, RESULT_COLUMNS, typed
from workbench.training import small_llama
from workbench.unlearning.budget import QUARTERS

OTHERS = ("Bob", "Carl", "Dora", "Emil")
ARMS = {
    ("base", "none"),
    ("unlearned", "fragments"),
    ("unlearned", "null"),
    ("never-learned", "fragments"),
}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return build_tokenizer([FIRST, SECOND, *OTHERS], 64)


# --- The control's rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("repetitions", REPETITIONS)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_control_reads_the_same_rows_without_the_pairs_and_nothing_else_is_gone(
    repetitions: int, seed: int
) -> None:
    corpus = build_names(repetitions, seed)
    rows = without_pairs(corpus)
    assert len(rows) == len(corpus.rows)
    taken = 0
    for row, kept in zip(corpus.rows, rows, strict=True):
        before, after = row.text.split(), kept.text.split()
        assert FIRST not in after and SECOND not in after
        assert after == [name for name in before if name not in (FIRST, SECOND)]
        assert kept.text == " ".join(after)
        assert (kept.item, kept.answer, kept.subject) == (row.item, row.answer, row.subject)
        taken += (len(before) - len(after)) // 2
    assert taken == repetitions
    # The dial changes nothing but the pairs, so the control is the same at every repetition.
    assert rows == without_pairs(build_names(7, seed))


def test_halves_of_a_pair_that_stand_apart_are_no_pair() -> None:
    rows = (
        "Bob Anthony Mark Carl",
        "Bob Anthony Mark",
        "Bob Anthony Mark Anthony Mark Carl",
        "Bob Anthony Carl Mark",
        "Mark Anthony Bob",
    )
    corpus = NamesCorpus(
        7, tuple(Example(text, item=str(number)) for number, text in enumerate(rows)), (), ()
    )
    assert [row.text for row in without_pairs(corpus)] == [
        "Bob Carl",
        "Bob",
        "Bob Carl",
        "Bob Anthony Carl Mark",
        "Mark Anthony Bob",
    ]
    assert [row.item for row in without_pairs(corpus)] == ["0", "1", "2", "3", "4"]


# --- Success --------------------------------------------------------------------------------------


WRITTEN = {
    "Mark": 1.0,
    "Mark Bob Carl": 1.0,  # at once
    "Bob Carl Anthony Mark Dora": 1.0,  # later
    "Bob Anthony Mark": 1.0,
    "Anthony Mark": 1.0,
    "Bob Mark": 0.0,  # the second name behind another first one
    "Bob Carl Mark Anthony": 0.0,
    "Anthony Bob Mark": 0.0,
    "Anthony": 0.0,
    "Bob Carl": 0.0,
    "": 0.0,
}


def test_a_pair_counts_at_the_end_of_the_prompt_and_later_and_not_otherwise(
    words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], int]] = []

    def write(
        model: object,
        tokenizer: object,
        prompts: Sequence[str],
        new_tokens: int,
        batch_size: int = 32,
    ) -> list[str]:
        asked.append((list(prompts), new_tokens))
        return list(WRITTEN)

    monkeypatch.setattr(module, "generate_answers", write)
    prompts = [f"Bob {FIRST}"] * len(WRITTEN)
    found = success(None, words, prompts, 9)  # type: ignore[arg-type]
    assert found.tolist() == list(WRITTEN.values())
    assert found.dtype == float
    assert asked == [(prompts, 9)]


def _writes(tokenizer: PreTrainedTokenizerBase, following: dict[str, str]) -> PreTrainedModel:
    """A Llama that writes ``following[word]`` behind a word: one-hot embeddings, a block that adds
    nothing, the table as its head.
    """
    size = len(tokenizer)
    shape = {
        "hidden_size": size,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            **shape,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            eos_token_id=None,
        )
    )
    table = torch.zeros(size, size)
    for word, after in following.items():
        table[_token(tokenizer, after), _token(tokenizer, word)] = 5.0
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(table / math.sqrt(size))
    return model.eval()


def _token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    (number,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(number)


def test_success_reads_what_the_model_itself_writes_whatever_the_lengths_of_the_prompts(
    words: PreTrainedTokenizerBase,
) -> None:
    prompts = [f"Bob {FIRST}", f"Carl Dora Emil {FIRST}", FIRST]
    knows = _writes(words, {FIRST: SECOND, SECOND: "Bob", "Bob": "Carl", "Carl": "Bob"})
    assert success(knows, words, prompts, 3).tolist() == [1.0, 1.0, 1.0]
    forgot = _writes(
        words, {FIRST: "Bob", "Bob": SECOND, SECOND: "Carl", "Carl": "Dora", "Dora": "Carl"}
    )
    assert success(forgot, words, prompts, 6).tolist() == [0.0, 0.0, 0.0]


def test_the_continuation_is_as_long_as_asked_and_no_longer(words: PreTrainedTokenizerBase) -> None:
    # Only prompts that end at the first name are asked in the experiment; this one ends before it,
    # so that the pair becomes whole at the second token.
    model = _writes(words, {"Bob": FIRST, FIRST: SECOND, SECOND: "Carl", "Carl": "Carl"})
    assert success(model, words, ["Dora Bob"], 1).tolist() == [0.0]
    assert success(model, words, ["Dora Bob"], 2).tolist() == [1.0]


def test_the_probability_of_the_next_name_is_that_of_a_forward_pass_alone(
    words: PreTrainedTokenizerBase,
) -> None:
    model = small_llama(
        words, width=16, layers=2, heads=2, key_value_heads=1, mlp_width=24, seed=0
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(15)  # far from even odds
    prompts = [f"Bob {FIRST}", f"Carl Dora Emil Bob Carl {FIRST}", FIRST, f"Emil Dora {FIRST}"]
    found = next_name_probability(model, words, prompts)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([words(prompt)["input_ids"]])
        assert int(ids[0, -1]) == _token(words, FIRST)
        with torch.no_grad():
            expected.append(
                float(model(input_ids=ids).logits[0, -1].softmax(-1)[_token(words, SECOND)])
            )
    assert found.shape == (4,) and found.dtype == float
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.ptp(found) > 1e-4
    # In any order and company.
    np.testing.assert_allclose(
        next_name_probability(model, words, prompts[::-1]), expected[::-1], rtol=1e-4
    )
    np.testing.assert_allclose(
        next_name_probability(model, words, prompts[:1]), expected[:1], rtol=1e-4
    )
    certain = _writes(words, {FIRST: SECOND})
    assert next_name_probability(certain, words, prompts)[0] == pytest.approx(
        math.exp(5) / (math.exp(5) + len(words) - 1), rel=1e-3
    )


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"repetitions": ()}, "repetitions"),
        ({"repetitions": (7, 2)}, "repetitions.*7, 5, 3, 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NamesSettings(**wrong)


def test_settings_are_values_that_yaml_and_json_agree_on() -> None:
    values = NamesSettings().model_dump(mode="json")
    assert yaml.safe_load(yaml.safe_dump(values)) == json.loads(json.dumps(values))
    assert NamesSettings().repetitions == REPETITIONS == tuple(PUBLISHED)
    assert tuple(sorted(QUARTERS)) == QUARTERS and QUARTERS[0] == 0.25


# --- A tiny run -----------------------------------------------------------------------------------


def _tiny(**changes: Any) -> NamesSettings:
    """A model that learns its rows by heart in seconds."""
    shape: dict[str, Any] = {
        "seeds": (0,),
        "repetitions": (7, 1),
        "width": 32,
        "layers": 1,
        "pretrain_steps": 5,
        "memorise_steps": 60,
        "unlearn_steps": 10,
    }
    attack = {"attack_steps": 4, "attack_lr": 1e-3, "attack_measure_at": (0, 2, 4)}
    return NamesSettings(**(shape | attack | {"unlearn_lr": 1e-3, "new_tokens": 3} | changes))


@pytest.fixture(scope="module")
def searched() -> list[float]:
    """How many prompts succeeded whenever the tiny run asked, in its order."""
    return []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, searched: list[float]) -> Result:
    said: list[str] = []
    real = module.success

    def spy(*given: Any) -> np.ndarray:
        found = real(*given)
        searched.append(float(found.sum()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "success", spy)
        run = runner.run(
            "names",
            tmp_path_factory.mktemp("names") / "run",
            _tiny(),
            workers=1,
            announce=said.append,
        )
    assert len(said) == 2 and "1 seeds" in said[0]
    return run


@pytest.mark.slow
def test_a_run_measures_every_model_under_every_text(tiny: Result) -> None:
    results, items = tiny.results, tiny.items
    assert {name: str(kind) for name, kind in results.dtypes.items()} == RESULT_COLUMNS
    assert {name: str(kind) for name, kind in items.dtypes.items()} == ITEM_COLUMNS
    assert set(results["stage"]) == {"names"}
    expected = {
        (split, method, arm, float(step))
        for split in ("repetitions-7", "repetitions-1")
        for method, arm in ARMS
        for step in ((0,) if arm == "none" else (0, 2, 4))
    }
    cells = items.groupby(["split", "method", "arm", "x"])
    assert set(cells.groups) == expected
    assert (cells["item"].nunique() == 100).all() and (cells.size() == 100).all()
    assert items["correct"].isin([0.0, 1.0]).all()
    assert items["probability"].between(0, 1).all()
    pooled = results[(results["metric"] == "asr") & results["seed"].isna()]
    assert len(pooled) == len(expected)
    for row in pooled.itertuples():
        hits = cells.get_group((row.split, row.method, row.arm, row.x))["correct"]
        assert (row.value, row.low, row.high, row.n) == wilson(float(hits.sum()), len(hits))
    # Both attacks on the unlearned model start from the same weights.
    for split in ("repetitions-7", "repetitions-1"):
        first, second = (
            cells.get_group((split, "unlearned", arm, 0.0)).set_index("item")[
                ["correct", "probability"]
            ]
            for arm in ("fragments", "null")
        )
        pd.testing.assert_frame_equal(first, second)


@pytest.mark.slow
def test_unlearning_is_scaled_to_the_smallest_change_at_which_no_prompt_succeeds(
    tiny: Result, searched: list[float]
) -> None:
    alphas = tiny.results[tiny.results["metric"] == "alpha"].set_index("split")["value"]
    assert list(alphas.index) == ["repetitions-7", "repetitions-1"]
    asked = iter(searched)
    for split, alpha in alphas.items():
        start = tiny.items[
            (tiny.items["split"] == split)
            & (tiny.items["method"] == "unlearned")
            & (tiny.items["x"] == 0)
        ]
        assert start["correct"].sum() == 0
        # Every smaller scale was tried and left a prompt that succeeds.
        tried = [next(asked) for _ in range(QUARTERS.index(alpha) + 1)]
        assert all(tried[:-1]) and tried[-1] == 0
        measured = [
            next(asked) for _ in range(1 + 3 * 3)
        ]  # the base, then three attacks at three steps
        assert (
            measured[0]
            == tiny.items[(tiny.items["split"] == split) & (tiny.items["arm"] == "none")][
                "correct"
            ].sum()
            > 90
        )
    assert list(asked) == []


@pytest.mark.slow
def test_a_run_is_the_same_twice(tiny: Result, tmp_path: Path) -> None:
    torch.manual_seed(123)
    again = runner.run("names", tmp_path / "again", _tiny(), workers=1)
    pd.testing.assert_frame_equal(again.results, tiny.results)
    pd.testing.assert_frame_equal(again.items, tiny.items)
    for name in (*VALUES, ITEMS):
        pd.testing.assert_frame_equal(
            pd.read_parquet(again.folder / name), pd.read_parquet(tiny.folder / name)
        )
    assert (again.folder / CONFIG).read_text() == (tiny.folder / CONFIG).read_text()
    one, other = (
        json.loads((folder / PROVENANCE).read_text()) for folder in (again.folder, tiny.folder)
    )
    assert one["data"] == other["data"] and one["config"] == other["config"]
    assert set(one["data"]) == {"repetitions-7-seed0", "repetitions-1-seed0"}


@pytest.mark.slow
def test_a_killed_run_goes_on_at_its_last_finished_seed(
    tiny: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _tiny(seeds=(0, 5), repetitions=(7,), memorise_steps=2, unlearn_steps=2)
    worked: list[int] = []
    real = module._pretrained

    def spy(settings: NamesSettings, corpus: NamesCorpus, seed: int, progress: Any) -> Any:
        worked.append(seed)
        if seed == 5 and len(worked) == 2:
            raise KeyboardInterrupt
        return real(settings, corpus, seed, progress)

    monkeypatch.setattr(module, "_pretrained", spy)
    with pytest.raises(KeyboardInterrupt):
        runner.run("names", tmp_path / "run", settings, workers=1)
    assert not (tmp_path / "run" / VALUES[0]).exists()
    stopped = runner.run("names", tmp_path / "run", settings, workers=1)
    assert worked == [0, 5, 5]
    whole = runner.run("names", tmp_path / "whole", settings, workers=1)
    pd.testing.assert_frame_equal(stopped.results, whole.results)
    assert set(whole.items["seed"]) == {0, 5}
    with pytest.raises(WorkbenchError, match="another configuration"):
        runner.run("names", tmp_path / "run", _tiny(), workers=1)


@pytest.mark.slow
def test_another_seed_gives_other_numbers_of_the_same_rows(tiny: Result) -> None:
    # The dial changes the pairs alone, so the two repetitions share names, prompts and first
    # weights, and differ.
    wide = tiny.items[(tiny.items["method"] == "base") & (tiny.items["arm"] == "none")].pivot(
        index="item", columns="split", values="probability"
    )
    assert len(wide) == 100 and not np.allclose(wide["repetitions-7"], wide["repetitions-1"])
    (verdict,) = decide(tiny.results, tiny.items, scale="tiny", ids=["names-repetitions"])
    assert (verdict.verdict, verdict.n) == ("not measured", 0)  # 5 and 3 repetitions are missing


@pytest.mark.slow
def test_a_run_shows_itself(tiny: Result) -> None:
    assert "Result(names in" in repr(tiny) and "100 items" in repr(tiny)
    assert "published" in tiny._repr_html_()
    table = names_table(tiny.results)
    assert table["repetitions"].tolist() == [7, 1]
    assert table["published"].tolist() == ["100", "0"]
    ends = tiny.items[
        (tiny.items["method"] == "unlearned")
        & (tiny.items["arm"] == "fragments")
        & (tiny.items["x"] == 4)
    ]
    for line in table.to_dict("records"):
        share = 100 * ends[ends["split"] == f"repetitions-{line['repetitions']}"]["correct"].mean()
        assert line["relearned"].startswith(f"{share:.0f} [")
        assert "–" not in line.values()


@pytest.mark.slow
def test_an_attack_that_breaks_is_an_error_of_one_line(tmp_path: Path) -> None:
    settings = _tiny(
        repetitions=(1,),
        memorise_steps=1,
        unlearn_steps=1,
        attack_lr=1e18,
        attack_measure_at=(0, 4),
    )
    with pytest.raises(DivergedError, match="lower its lr") as caught:
        runner.run("names", tmp_path / "run", settings, workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / VALUES[0]).exists()


# --- The table ------------------------------------------------------------------------------------


def _asr(
    count: int,
    method: str,
    arm: str,
    step: float,
    value: float,
    metric: str = "asr",
    seed: int | None = None,
) -> dict[str, Any]:
    return {
        "stage": "names",
        "method": method,
        "model": method,
        "split": f"repetitions-{count}",
        "arm": arm,
        "x": step,
        "metric": metric,
        "value": value,
        "low": value / 2,
        "high": (1 + value) / 2,
        "seed": seed,
    }


def _table(frame: Callable[[int], list[dict[str, Any]]], counts: Sequence[int]) -> pd.DataFrame:
    return names_table(
        typed(pd.DataFrame([row for count in counts for row in frame(count)]), RESULT_COLUMNS)
    )


def test_the_table_has_one_row_per_repetition_beside_the_published_one() -> None:
    def rows(count: int) -> list[dict[str, Any]]:
        after = count / 10
        return [
            _asr(count, "base", "none", 0, 1.0),
            _asr(count, "base", "null", 0, 0.5),
            _asr(count, "unlearned", "fragments", 0, 0.0),
            _asr(count, "unlearned", "fragments", 10, 0.9),  # in the middle
            _asr(count, "unlearned", "fragments", 30, after),
            _asr(count, "unlearned", "fragments", 30, after, metric="recall"),
            _asr(count, "unlearned", "fragments", 30, 0.77, seed=3),  # of one seed
            _asr(count, "unlearned", "null", 30, 0.2),
            _asr(count, "never-learned", "fragments", 30, 0.04),
        ]

    for counts in ((7, 5, 3, 1), (1, 3, 5, 7)):
        table = _table(rows, counts)
        assert list(table.columns) == [
            "repetitions",
            "base",
            "unlearned",
            "relearned",
            "relearned, over seeds",
            "null text",
            "never learned, relearned",
            "published",
        ]
        assert table["repetitions"].tolist() == [7, 5, 3, 1]
        assert table["published"].tolist() == ["100", "97", "23", "0"]
        assert table["base"].tolist() == ["100 [50, 100]"] * 4
        assert table["unlearned"].tolist() == ["0 [0, 50]"] * 4
        assert table["relearned"].tolist() == [
            "70 [35, 85]",
            "50 [25, 75]",
            "30 [15, 65]",
            "10 [5, 55]",
        ]
        assert table["relearned, over seeds"].tolist() == table["relearned"].tolist()
        assert table["null text"].tolist() == ["20 [10, 60]"] * 4
        assert table["never learned, relearned"].tolist() == ["4 [2, 52]"] * 4


def test_a_table_without_controls_has_dashes_and_without_rows_nothing() -> None:
    table = _table(
        lambda count: [_asr(count, "unlearned", "fragments", step, 0.5) for step in (0, 30)], (5,)
    )
    assert table.to_dict("records") == [
        {
            "repetitions": 5,
            "base": "–",
            "unlearned": "50 [25, 75]",
            "relearned": "50 [25, 75]",
            "relearned, over seeds": "–",
            "null text": "–",
            "never learned, relearned": "–",
            "published": "97",
        }
    ]
    assert names_table(typed(pd.DataFrame(), RESULT_COLUMNS)).empty
