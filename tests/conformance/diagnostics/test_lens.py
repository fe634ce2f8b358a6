"""The logit lens: the last block under the model's own decoder is the model's own output, every
block against plain PyTorch, and closed forms for hand-made decoders.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from workbench.data.batches import Batch
from workbench.diagnostics.lens import (
    METRICS,
    add_lens,
    decode,
    lens_by_example,
    logit_lens,
    predicting_answer,
)
from workbench.errors import WorkbenchError
from workbench.tables import Table

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]
Mover = Callable[..., PreTrainedModel]

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
VOCABULARY = 50


def _by_hand(
    model: PreTrainedModel, batch: Batch, decoder: PreTrainedModel
) -> list[list[dict[str, float]]]:
    """``[layer][example]``: the measures of the first answer token from block outputs,
    ``decoder.model.norm`` and ``decoder.lm_head``, in float64 numpy.
    """
    kept: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in model.model.layers
    ]
    with torch.no_grad():
        output = model(**batch.inputs).logits
        layers = [decoder.lm_head(decoder.model.norm(stream)) for stream in kept]
    for hook in hooks:
        hook.remove()
    found: list[list[dict[str, float]]] = []
    for logits in layers:
        found.append([])
        for row in range(batch.size):
            place = int(batch.answer_mask[row].nonzero()[0])
            token = int(batch.input_ids[row, place])
            likely, final = (_softmax(values[row, place - 1]) for values in (logits, output))
            found[-1].append(
                {
                    "answer_probability": likely[token],
                    "answer_log_probability": math.log(likely[token]),
                    "answer_rank": 1 + (likely > likely[token]).sum(),
                    "entropy": -(likely * np.log(likely)).sum(),
                    "kl_to_final": (final * np.log(final / likely)).sum(),
                }
            )
    return found


def _softmax(logits: Tensor) -> np.ndarray:
    values = logits.double().numpy()
    values = np.exp(values - values.max())
    return values / values.sum()


def _value(found, layer: int, measure: str) -> float:  # type: ignore[no-untyped-def]
    (row,) = found[(found["layer"] == layer) & (found["measure"] == measure)].to_dict("records")
    return float(row["value"])


# --- Which position -------------------------------------------------------------------------------


def test_the_lens_reads_one_position_before_the_answer(make_batch: BatchMaker) -> None:
    batch = make_batch((7, 5), answer=3)
    assert predicting_answer(batch).nonzero().tolist() == [[0, 3], [1, 1]]
    assert predicting_answer(batch, "all").nonzero().tolist() == [
        [0, 3],
        [0, 4],
        [0, 5],
        [1, 1],
        [1, 2],
        [1, 3],
    ]


def test_an_example_without_an_answer_and_an_unknown_choice_are_errors(
    make_batch: BatchMaker, make_model: ModelMaker
) -> None:
    batch = make_batch()
    without = replace(
        batch, answer_mask=batch.answer_mask & (torch.arange(batch.size) != 1)[:, None]
    )
    with pytest.raises(WorkbenchError, match="'fact/1' has no answer"):
        logit_lens(make_model(), [without])
    # An answer that is the very first token is predicted by nothing.
    first = torch.zeros_like(batch.answer_mask)
    first[:, 0] = True
    with pytest.raises(WorkbenchError, match="no answer"):
        predicting_answer(replace(batch, answer_mask=first))
    with pytest.raises(WorkbenchError, match="last"):
        logit_lens(make_model(), [batch], tokens="last")  # type: ignore[arg-type]


# --- Identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_under_its_own_decoder_is_the_models_own_output(
    family: str, make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, batch = make_model(family, num_hidden_layers=3), make_batch()
    found = lens_by_example(model, [batch])
    last = found[found["layer"] == 2]
    with torch.no_grad():
        output = model(**batch.inputs).logits
    for row, example in enumerate(last.to_dict("records")):
        place = int(batch.answer_mask[row].nonzero()[0])
        assert example["item"] == f"fact/{row}"
        assert example["answer_probability"] == pytest.approx(
            _softmax(output[row, place - 1])[int(batch.input_ids[row, place])], rel=1e-6
        )
        assert example["kl_to_final"] == pytest.approx(0.0, abs=1e-10)
    # Earlier blocks are something else, so that the identity says something.
    assert (found.loc[found["layer"] < 2, "kl_to_final"] > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_agrees_with_plain_pytorch_for_both_decoders(
    family: str, make_model: ModelMaker, make_batch: BatchMaker, nearby: Mover
) -> None:
    base, batch = make_model(family, num_hidden_layers=3), make_batch()
    model = nearby(base)
    for decoder in (None, base):
        found = lens_by_example(model, [batch], decoder)
        expected = _by_hand(model, batch, model if decoder is None else decoder)
        for row in found.to_dict("records"):
            wanted = expected[row["layer"]][int(row["item"].split("/")[1])]
            for measure, value in wanted.items():
                assert row[measure] == pytest.approx(value, rel=1e-4, abs=1e-6), measure


def test_a_tied_and_capped_decoder_and_one_with_a_layer_norm_give_the_models_output(
    make_batch: BatchMaker,
) -> None:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 4,
        "pad_token_id": 0,
    }
    gpt = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [
            Gemma2ForCausalLM(
                Gemma2Config(
                    **shape,
                    num_key_value_heads=2,
                    final_logit_softcapping=0.5,
                    initializer_range=0.3,
                )
            ),
            GPT2LMHeadModel(GPT2Config(**gpt, initializer_range=0.3)),
            GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    **{
                        name: shape[name]
                        for name in shape
                        if name not in ("head_dim", "pad_token_id")
                    },
                    initializer_range=0.3,
                )
            ),
        ]
    for model in models:
        found = lens_by_example(model.eval(), [make_batch()])
        assert found.loc[found["layer"] == 1, "kl_to_final"].abs().max() < 1e-10
        assert found.loc[found["layer"] == 0, "kl_to_final"].min() > 1e-3


def test_a_bf16_model_keeps_the_identity_up_to_its_own_rounding(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, batch = make_model().bfloat16(), make_batch()
    found = lens_by_example(model, [batch])
    assert found["answer_probability"].dtype == np.float64
    assert found.loc[found["layer"] == 1, "kl_to_final"].abs().max() < 1e-4
    assert found.loc[found["layer"] == 0, "kl_to_final"].min() > 1e-2


# --- Own and fixed decoder ------------------------------------------------------------------------


def test_a_change_of_the_decoder_alone_is_invisible_to_the_bases_decoder(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    base, batch = make_model(), make_batch()
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.lm_head.weight.neg_()
        changed.model.norm.weight.mul_(2)
    of_base, fixed, own = (
        lens_by_example(base, [batch]),
        lens_by_example(changed, [batch], base),
        lens_by_example(changed, [batch]),
    )
    for measure in ("answer_probability", "answer_rank", "entropy"):
        assert fixed[measure].tolist() == of_base[measure].tolist()
        assert own[measure].tolist() != of_base[measure].tolist()
    # The distance to the final output is to the model's own, whoever decodes.
    assert own.loc[own["layer"] == 1, "kl_to_final"].abs().max() < 1e-10
    assert fixed.loc[fixed["layer"] == 1, "kl_to_final"].min() > 1e-3


def test_a_change_of_the_stream_shows_under_both_decoders(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    base, batch = make_model(), make_batch()
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(-3)
    of_base, fixed, own = (
        lens_by_example(base, [batch]),
        lens_by_example(changed, [batch], base),
        lens_by_example(changed, [batch]),
    )
    assert (
        own["answer_probability"].tolist() == fixed["answer_probability"].tolist()
    )  # the decoder is the same
    before, after = (
        found.set_index(["layer", "item"])["answer_probability"] for found in (of_base, own)
    )
    assert after[0].tolist() == before[0].tolist()  # the first block was not touched
    assert (after[1] != before[1]).all()


def test_naming_the_model_as_its_decoder_changes_nothing(
    make_model: ModelMaker, batch: Batch
) -> None:
    model = make_model()
    assert lens_by_example(model, [batch], model).equals(lens_by_example(model, [batch]))


# --- Closed forms ---------------------------------------------------------------------------------


def test_a_decoder_that_knows_nothing_gives_chance_everywhere(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with torch.no_grad():
        llama.lm_head.weight.zero_()
    found = lens_by_example(llama, [batch])
    assert found["answer_probability"].to_numpy() == pytest.approx(1 / VOCABULARY)
    assert found["answer_log_probability"].to_numpy() == pytest.approx(-math.log(VOCABULARY))
    assert found["answer_rank"].to_numpy() == pytest.approx(
        (VOCABULARY + 1) / 2
    )  # ties share their mean rank
    assert found["foil_probability"].to_numpy() == pytest.approx(1 / VOCABULARY)
    assert found["entropy"].to_numpy() == pytest.approx(math.log(VOCABULARY))
    assert found["kl_to_final"].to_numpy() == pytest.approx(0.0, abs=1e-12)


def _sure_of(model: PreTrainedModel, token: int, margin: float) -> PreTrainedModel:
    """A model whose logits are ``margin`` for one token and 0 for all others, whatever it reads."""
    head = torch.nn.Linear(16, VOCABULARY)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[token] = margin
    model.set_output_embeddings(head)
    return model


def test_a_decoder_that_is_sure_of_one_token_by_hand(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    batch = make_batch((4, 4), answer=1)
    ids = batch.input_ids.clone()
    ids[:, 3] = torch.tensor([5, 8])
    margin = math.log(VOCABULARY - 1)  # the one token has probability 1/2, each other 1/98
    model = _sure_of(llama, 5, margin)
    found = lens_by_example(model, [replace(batch, input_ids=ids)])
    for row in found.to_dict("records"):
        knows = row["item"] == "fact/0"
        assert row["answer_probability"] == pytest.approx(1 / 2 if knows else 1 / 98)
        assert row["foil_probability"] == pytest.approx(1 / 98 if knows else 1 / 2)
        assert row["answer_rank"] == pytest.approx(1.0 if knows else 1 + 1 + 48 / 2)
        assert row["entropy"] == pytest.approx(math.log(2) / 2 + math.log(98) / 2)


def test_foils_are_the_other_distinct_answers_of_the_same_kind(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    batch = make_batch((4, 4, 4, 4, 4), answer=1)
    ids = batch.input_ids.clone()
    ids[:, 3] = torch.tensor([5, 8, 8, 9, 5])
    model = _sure_of(llama, 8, math.log(VOCABULARY - 1))
    kinds = ["drink", "drink", "drink", "pet", "drink"]
    found = lens_by_example(model, [replace(batch, input_ids=ids)], kinds=kinds)
    first = found[found["layer"] == 0]["foil_probability"].tolist()
    # Drinks are 5 and 8; the answer of another fact that is the same word is no foil; a kind with
    # one answer has none.
    assert first[0] == pytest.approx(1 / 2)
    assert first[1] == first[2] == pytest.approx(1 / 98)
    assert math.isnan(first[3])
    assert first[4] == pytest.approx(1 / 2)
    # Without kinds all answers are foils of one another.
    mixed = lens_by_example(model, [replace(batch, input_ids=ids)])["foil_probability"].tolist()
    assert mixed[0] == pytest.approx((1 / 2 + 1 / 98) / 2)
    assert mixed[3] == pytest.approx((1 / 98 + 1 / 2) / 2)
    summary = logit_lens(model, [replace(batch, input_ids=ids)], kinds=kinds)
    assert math.isnan(_value(summary, 0, "foil_probability"))
    assert _value(summary, 0, "answer_rank") > 1


def test_all_answer_tokens_are_averaged_over_the_answer(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, batch = make_model(), make_batch((7, 6), answer=3)
    found = lens_by_example(model, [batch], tokens="all")
    with torch.no_grad():
        output = model(**batch.inputs).logits
    for row in found[found["layer"] == 1].to_dict("records"):
        example = int(row["item"].split("/")[1])
        places = batch.answer_mask[example].nonzero()[:, 0].tolist()
        likely = [
            _softmax(output[example, place - 1])[int(batch.input_ids[example, place])]
            for place in places
        ]
        assert len(places) == 3
        assert row["answer_probability"] == pytest.approx(np.mean(likely), rel=1e-5)
        assert row["answer_log_probability"] == pytest.approx(np.mean(np.log(likely)), rel=1e-5)


# --- Intervals ------------------------------------------------------------------------------------


def test_paraphrases_of_a_fact_count_once_and_intervals_hold_the_value(
    make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model = make_model()
    batch = replace(make_batch((7, 5, 6, 7)), items=("a", "a", "a", "b"))
    rows, found = lens_by_example(model, [batch]), logit_lens(model, [batch])
    assert found["measure"].tolist() == [*METRICS, *METRICS]
    assert (found["n"] == 2).all()
    assert (found["low"] <= found["value"] + 1e-12).all()
    assert (found["value"] <= found["high"] + 1e-12).all()
    for measure in METRICS:
        first = rows[rows["layer"] == 0][measure].to_numpy()
        assert _value(found, 0, measure) == pytest.approx((first[:3].mean() + first[3]) / 2)


def test_weights_that_are_not_numbers_give_empty_values_and_no_error(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    found = logit_lens(llama, [batch])
    first, last = (found[found["layer"] == layer].set_index("measure") for layer in (0, 1))
    assert last[["value", "low", "high"]].isna().all(axis=None)
    assert first.loc[["answer_probability", "answer_rank", "entropy"], "value"].notna().all()
    assert math.isnan(first.loc["kl_to_final", "value"])  # there is no output to compare with
    table = Table({"run": "r"})
    add_lens(table, found, arm="own decoder", split="forget")
    assert {row["site"] for row in table.rows} == {"blocks.0.hook_resid_post"}


def test_rows_of_the_table_name_the_block_the_decoder_and_the_metric(
    make_model: ModelMaker, batch: Batch
) -> None:
    table = Table({"run": "r", "method": "npo", "seed": 1})
    found = logit_lens(make_model(), [batch])
    add_lens(table, found, arm="base decoder", split="forget-heldout")
    frame = table.frame()
    assert set(frame["stage"]) == {"representation"}
    assert set(frame["arm"]) == {"base decoder"}
    assert set(frame["metric"]) == set(METRICS.values())
    cell = frame[(frame["site"] == "blocks.1.hook_resid_post") & (frame["metric"] == "lens_rank")]
    assert cell["value"].tolist() == [_value(found, 1, "answer_rank")]
    assert cell["n"].tolist() == [3]


# --- Batching, padding, and the model afterwards --------------------------------------------------


@pytest.mark.parametrize("tokens", ["first", "all"])
def test_padding_and_batching_change_nothing(
    tokens: str, make_model: ModelMaker, make_batch: BatchMaker, pad: Padder
) -> None:
    model, batch = make_model(), make_batch((7, 5, 6))
    plain = lens_by_example(model, [batch], tokens=tokens)  # type: ignore[arg-type]
    rows = [
        replace(
            batch,
            **{
                name: getattr(batch, name)[row : row + 1]
                for name in (
                    "input_ids",
                    "attention_mask",
                    "answer_mask",
                    "subject_mask",
                    "target_mask",
                )
            },
            items=batch.items[row : row + 1],
        )
        for row in range(3)
    ]
    for other in ([pad(batch, 4)], rows, [rows[0], pad(rows[1], 2), rows[2]]):
        found = lens_by_example(model, other, tokens=tokens)  # type: ignore[arg-type]
        assert found[["layer", "item"]].equals(plain[["layer", "item"]])
        for measure in METRICS:
            assert found[measure].to_numpy() == pytest.approx(
                plain[measure].to_numpy(), rel=1e-4, abs=1e-6
            )


def test_the_model_and_the_decoder_are_left_as_they_were_found_also_after_an_error(
    make_model: ModelMaker, batch: Batch
) -> None:
    model, decoder = make_model().train(), make_model(seed=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logit_lens(model, [batch], decoder)
    narrow = make_model(hidden_size=8, head_dim=2)
    with pytest.raises(WorkbenchError, match="width 8"):
        logit_lens(model, [batch], narrow)
    assert model.training and decoder.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for one in (model, decoder)
        for module in one.modules()
    )


def test_progress_counts_batches(make_model: ModelMaker, make_batch: BatchMaker) -> None:
    seen: list[tuple[int, int]] = []
    logit_lens(
        make_model(),
        [make_batch(), make_batch()],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


def test_what_cannot_be_read_says_why(make_model: ModelMaker, batch: Batch) -> None:
    model = make_model()
    with pytest.raises(WorkbenchError, match="at least one batch"):
        logit_lens(model, [])
    with pytest.raises(WorkbenchError, match="2 entries for 3 examples"):
        logit_lens(model, [batch], kinds=["a", "b"])
    with pytest.raises(WorkbenchError, match="share one vocabulary"):
        logit_lens(model, [batch], make_model(vocab_size=60))
    with pytest.raises(WorkbenchError, match="Linear"):
        decode(torch.nn.Linear(16, 16), torch.zeros(1, 16))  # type: ignore[arg-type]
