"""Position rules against hand-written masks, and against what padding and packing must not change;
spans of a real tokenizer; edits at chosen positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from workbench.hooks import (
    Capture,
    CaptureError,
    Collect,
    Positions,
    ablate_to_mean,
    answer_tokens,
    character_span,
    custom,
    edit,
    find_span,
    generated,
    last_token,
    peek,
    predicting,
    real_tokens,
    steer,
    without_bos,
    without_first,
)
from workbench.hooks.inputs import read_tokens

ModelMaker = Callable[..., PreTrainedModel]
Inputs = dict[str, Tensor]
BOS = 1


def chosen(rule: Positions, inputs: Inputs) -> Tensor:
    """What ``rule`` chooses in one pass with these arguments."""
    tokens = read_tokens(inputs, None)
    assert tokens is not None
    return rule(tokens)


def picture(text: str) -> Tensor:
    """``"x.x xx."``: rows apart by spaces, x is chosen."""
    return torch.tensor([[letter == "x" for letter in row] for row in text.split()])


def padded(sequences: Sequence[Sequence[int]], side: str, extra: int = 0, token: int = 7) -> Inputs:
    """A padded batch; the padding is an ordinary token, so that only the mask tells."""
    width = max(map(len, sequences)) + extra
    ids, mask = (
        torch.full((len(sequences), width), token),
        torch.zeros(len(sequences), width, dtype=torch.long),
    )
    for row, sequence in enumerate(sequences):
        start = 0 if side == "right" else width - len(sequence)
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def tiny(kind: str, make_model: ModelMaker) -> PreTrainedModel:
    shape = {
        "vocab_size": 50,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, **shape)
            ).eval()
        if kind == "gpt_neox":
            sizes = {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
            }
            return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **shape)).eval()
    return make_model(kind)


# --- what each rule chooses -----------------------------------------------------------------------

ONE, OTHER = (
    [1, 7, 8, 9, 6, 5],
    [7, 1, 9, 5],
)  # the second does not begin with BOS, and holds one further on
LAYOUTS: dict[str, Inputs] = {
    "right": padded([ONE, OTHER], "right"),
    "left": padded([ONE, OTHER], "left"),
    "no mask": {
        "input_ids": torch.tensor([ONE, [*OTHER, 0, 0]])
    },  # without a mask every token is real
    # 3 + 3 tokens; 4 + 1 tokens and one of padding, whose position id 0 begins no sequence
    "packed": {
        "input_ids": torch.tensor([[1, 7, 8, 1, 9, 5], [7, 1, 9, 1, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]]),
    },
}
MASK = picture("x.xx.x xx..xx")
LABELS = torch.where(MASK, 5, -100)
# Every token of a row covers three characters, so these spans touch the tokens 1 to 3 and 3 to 4.
OFFSETS = torch.stack([torch.arange(0, 18, 3), torch.arange(3, 21, 3)], dim=1).expand(2, 6, 2)
NOTHING = ["...... ......"] * 4
EXPECTED: list[tuple[Positions, list[str]]] = [
    (real_tokens, ["xxxxxx xxxx..", "xxxxxx ..xxxx", "xxxxxx xxxxxx", "xxxxxx xxxxx."]),
    (without_first, [".xxxxx .xxx..", ".xxxxx ...xxx", ".xxxxx .xxxxx", ".xx.xx .xxx.."]),
    (without_bos(BOS), [".xxxxx xxxx..", ".xxxxx ..xxxx", ".xxxxx xxxxxx", ".xx.xx xxxx.."]),
    (last_token, [".....x ...x..", ".....x .....x", ".....x .....x", "..x..x ...xx."]),
    (generated, NOTHING),  # a single pass generates nothing
    (custom(MASK), ["x.xx.x xx....", "x.xx.x ....xx", "x.xx.x xx..xx", "x.xx.x xx..x."]),
    (answer_tokens(LABELS), ["x.xx.x xx....", "x.xx.x ....xx", "x.xx.x xx..xx", "x.xx.x xx..x."]),
    (
        answer_tokens(LABELS.clamp(min=0), ignore=0),
        ["x.xx.x xx....", "x.xx.x ....xx", "x.xx.x xx..xx", "x.xx.x xx..x."],
    ),
    (
        character_span([(5, 10), (9, 15)], OFFSETS),
        [".xxx.. ...x..", ".xxx.. ...xx.", ".xxx.. ...xx.", ".xxx.. ...xx."],
    ),
    (
        predicting(custom(MASK)),
        [".xx.x. x.....", ".xx.x. ...xx.", ".xx.x. x..xx.", ".x..x. x....."],
    ),
    (predicting(real_tokens), ["xxxxx. xxx...", "xxxxx. ..xxx.", "xxxxx. xxxxx.", "xx.xx. xxx..."]),
    (
        without_first & ~last_token,
        [".xxxx. .xx...", ".xxxx. ...xx.", ".xxxx. .xxxx.", ".x..x. .xx..."],
    ),
    (
        last_token | ~without_first,
        ["x....x x..x..", "x....x ..x..x", "x....x x....x", "x.xx.x x..xx."],
    ),
    (~custom(MASK), [".x..x. ..xx..", ".x..x. ..xx..", ".x..x. ..xx..", ".x..x. ..xx.."]),
    (~~last_token, [".....x ...x..", ".....x .....x", ".....x .....x", "..x..x ...xx."]),
    (~real_tokens, NOTHING),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rule", "pictures"), EXPECTED, ids=[rule.name for rule, _ in EXPECTED])
def test_a_rule_chooses_the_positions_of_its_definition(
    rule: Positions, pictures: list[str], layout: str
) -> None:
    found = chosen(rule, LAYOUTS[layout])
    assert found.dtype == torch.bool
    assert torch.equal(found, picture(pictures[list(LAYOUTS).index(layout)])), found.int()


def test_a_hole_in_the_mask_does_not_make_two_sequences() -> None:
    # A token that is masked out in the middle is padding; what stands on both sides is one
    # sequence, with one first and one last token.
    inputs = {
        "input_ids": torch.tensor([[1, 7, 8, 9, 6]]),
        "attention_mask": torch.tensor([[1, 1, 0, 1, 1]]),
    }
    assert torch.equal(chosen(without_first, inputs), picture(".x.xx"))
    assert torch.equal(chosen(last_token, inputs), picture("....x"))


def test_position_ids_of_padding_and_of_one_shared_row_are_understood() -> None:
    # transformers numbers left padding 0 or 1; position_ids of one row hold for every row.
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for fill in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        inputs = {
            "input_ids": torch.ones(2, 5, dtype=torch.long),
            "attention_mask": mask,
            "position_ids": positions,
        }
        assert torch.equal(chosen(without_first, inputs), picture("...xx .xxxx"))
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }
    assert torch.equal(chosen(without_first, inputs), picture(".x.xx .x.xx"))
    inputs["position_ids"] = torch.tensor([[0, 1, 5, 6, 3]])  # jumps, but nothing starts again
    assert torch.equal(chosen(without_first, inputs), picture(".xxxx .xxxx"))


def test_names_say_how_a_rule_was_made() -> None:
    assert (without_first & ~last_token).name == "without_first & ~last_token"
    assert (real_tokens | generated).name == "(real_tokens | generated)"
    assert ((real_tokens | generated) & last_token).name == "(real_tokens | generated) & last_token"
    assert without_bos(3).name == "without_bos(3)"
    assert answer_tokens(LABELS).name == "answer_tokens"
    assert custom(MASK).name == "custom" and custom(MASK, "names").name == "names"
    assert character_span([(5, 10), (9, 15)], OFFSETS).name == "subject"
    assert predicting(answer_tokens(LABELS)).name == "predicting(answer_tokens)"


def test_the_name_of_a_combined_rule_read_as_python_is_that_rule() -> None:
    # Names stand in tables; two different rules must not have one name.
    known = {"without_first": without_first, "last_token": last_token, "predicting": predicting}

    def combined(rules: list[Positions]) -> list[Positions]:
        pairs = list(product(rules, rules))
        return [
            *(~a for a in rules),
            *(predicting(a) for a in rules),
            *(a & b for a, b in pairs),
            *(a | b for a, b in pairs),
        ]

    simple = [without_first, last_token]
    wrong = []
    for rule in combined(simple + combined(simple)):
        read = eval(rule.name, known)
        if any(
            not torch.equal(chosen(read, inputs), chosen(rule, inputs))
            for inputs in LAYOUTS.values()
        ):
            wrong.append(rule.name)
    assert not wrong, f"{len(wrong)} names mean another rule, e.g. {wrong[:3]}"


SEQUENCES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=4)
# Rules that know the batch are made from its labels; the others ignore them.
MAKERS: list[Callable[[Tensor], Positions]] = [
    lambda _: real_tokens,
    lambda _: without_first,
    lambda _: without_bos(BOS),
    lambda _: last_token,
    lambda _: generated,
    answer_tokens,
    lambda labels: custom(labels > 2),
    lambda labels: predicting(answer_tokens(labels)),
    lambda labels: ~last_token & predicting(~custom(labels > 2)),
    lambda _: without_first & ~last_token,
    lambda _: without_bos(BOS) | last_token,
    lambda _: ~(without_first | last_token),
]


def _labels(ids: Tensor) -> Tensor:
    return torch.where(ids % 2 == 0, ids, -100)


@given(
    sequences=SEQUENCES,
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 3),
    maker=st.sampled_from(MAKERS),
    pad=st.integers(1, 4),
)
def test_padding_changes_nothing_that_a_rule_chooses(
    sequences: list[list[int]],
    side: str,
    extra: int,
    maker: Callable[[Tensor], Positions],
    pad: int,
) -> None:
    batch = padded(
        sequences, side, extra, pad
    )  # the padding is BOS or carries a label now and then
    found = chosen(maker(_labels(batch["input_ids"])), batch)
    assert not (found & ~batch["attention_mask"].bool()).any()
    for row, sequence in enumerate(sequences):
        ids = torch.tensor([sequence])
        alone = chosen(maker(_labels(ids)), {"input_ids": ids})
        assert torch.equal(found[row][batch["attention_mask"][row].bool()], alone[0])


@given(
    sequences=SEQUENCES, extra=st.integers(0, 3), left=st.booleans(), maker=st.sampled_from(MAKERS)
)
def test_packing_changes_nothing_that_a_rule_chooses(
    sequences: list[list[int]], extra: int, left: bool, maker: Callable[[Tensor], Positions]
) -> None:
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    inputs = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None],
    }
    if extra:
        sides = (extra, 0) if left else (0, extra)
        inputs = {name: F.pad(tensor, sides) for name, tensor in inputs.items()} | {
            "attention_mask": F.pad(torch.ones_like(ids), sides)
        }
    found = chosen(maker(_labels(inputs["input_ids"])), inputs)
    found = found[inputs["attention_mask"].bool()] if extra else found[0]
    alone = [torch.tensor([sequence]) for sequence in sequences]
    assert torch.equal(
        found, torch.cat([chosen(maker(_labels(one)), {"input_ids": one})[0] for one in alone])
    )


def test_the_rows_of_a_packed_row_are_those_of_its_sequences(llama: PreTrainedModel) -> None:
    sequences = [[1, 7, 8], [1, 9], [1, 5, 6, 4]]
    site, rule = "blocks.1.hook_resid_post", without_first
    packed = {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]]),
    }
    together, apart = Collect(), Collect()
    with Capture(llama, site, together, at=rule) as capture:
        capture.forward(packed)
    with Capture(llama, site, apart, at=rule) as capture:
        for sequence in sequences:
            capture.forward({"input_ids": torch.tensor([sequence])})
    torch.testing.assert_close(together[site], apart[site], rtol=1e-5, atol=1e-5)


# --- spans of a tokenizer -------------------------------------------------------------------------

TEXTS = [
    "Paris is the capital of France.",
    "In Warsaw, Marie Curie was born.",
    "Emily Brontë knew Zoë",
]
SUBJECTS = ["France", "Marie Curie", "Brontë"]


def _tokenizer(kind: str, side: str = "right") -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    if (
        kind == "bytes"
    ):  # few merges, so that subjects have several tokens, some of them with a leading space
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            ByteLevel(),
        )
        trainer = trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        core = Tokenizer(models.WordLevel(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    core.train_from_iterator(TEXTS * 3, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side=side,
    )


def _encoded(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], **options: object
) -> tuple[Inputs, Tensor]:
    encoded = tokenizer(
        texts, padding=True, return_tensors="pt", return_offsets_mapping=True, **options
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}, encoded[
        "offset_mapping"
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_the_tokens_of_a_span_decode_to_the_subject(kind: str, side: str) -> None:
    tokenizer = _tokenizer(kind, side)
    inputs, offsets = _encoded(tokenizer, TEXTS)
    spans = [find_span(text, subject) for text, subject in zip(TEXTS, SUBJECTS, strict=True)]
    found = chosen(character_span(spans, offsets), inputs)
    for row, subject in enumerate(SUBJECTS):
        assert tokenizer.decode(inputs["input_ids"][row][found[row]]).strip() == subject
    assert int(found[1].sum()) >= 2  # two words, several tokens
    # A whole text is all of its tokens, and never a special one.
    whole = chosen(character_span([(0, len(text)) for text in TEXTS], offsets), inputs)
    assert torch.equal(whole, inputs["input_ids"] > 3)


def test_a_span_inside_a_token_takes_the_whole_token_and_no_neighbour() -> None:
    tokenizer = _tokenizer("words")
    inputs, offsets = _encoded(tokenizer, ["Paris is the capital"])
    for span in (
        (1, 2),
        (0, 5),
        (4, 5),
        (0, 6),
    ):  # "a", "Paris", "s", "Paris " whose space belongs to no token
        assert (
            tokenizer.decode(inputs["input_ids"][chosen(character_span([span], offsets), inputs)])
            == "Paris"
        ), span
    assert int(chosen(character_span([(4, 7)], offsets), inputs).sum()) == 2
    offsets = torch.tensor(
        [[[0, 0], [0, 4], [4, 4], [4, 9], [9, 9]]]
    )  # a token without characters in the middle of the span
    assert torch.equal(
        chosen(character_span([(0, 9)], offsets), {"input_ids": torch.ones(1, 5).long()}),
        picture(".x.x."),
    )


def test_a_part_that_is_absent_or_there_twice_is_named() -> None:
    assert find_span("to be or not", "be") == (3, 5)
    for part, text in (("Berlin", TEXTS[0]), ("be", "to be or not to be"), ("", "text")):
        with pytest.raises(CaptureError) as raised:
            find_span(text, part)
        assert repr(part) in str(raised.value) and text in str(raised.value)


def test_a_part_that_overlaps_itself_is_there_twice() -> None:
    with pytest.raises(CaptureError):
        find_span("banana", "ana")


def test_a_span_that_was_truncated_away_names_its_example() -> None:
    tokenizer = _tokenizer("words")
    spans = [
        find_span(TEXTS[0], "Paris"),
        find_span(TEXTS[1], "born"),
        find_span(TEXTS[2], "Emily"),
    ]
    _, offsets = _encoded(tokenizer, TEXTS, truncation=True, max_length=5)
    with pytest.raises(CaptureError, match=r"scientist.*example 1\b"):
        character_span(spans, offsets, "scientist")


@pytest.mark.parametrize("span", [(2, 2), (4, 2)])
def test_a_span_of_no_characters_covers_no_token(span: tuple[int, int]) -> None:
    _, offsets = _encoded(_tokenizer("words"), ["Paris is the capital"])
    with pytest.raises(CaptureError, match="example 0"):
        character_span([span], offsets)


def test_every_example_needs_its_span() -> None:
    _, offsets = _encoded(_tokenizer("words"), TEXTS)
    for spans in ([(0, 5)], [(0, 5)] * 4):
        with pytest.raises(CaptureError, match=f"{len(spans)} spans"):
            character_span(spans, offsets)
    with pytest.raises(CaptureError, match="3 spans"):
        character_span([(0, 5)] * 3, offsets[0])


# --- errors ---------------------------------------------------------------------------------------

SITE = "blocks.0.hook_resid_post"


def _error(model: nn.Module, inputs: Inputs, at: Positions | None, site: str = SITE) -> str:
    with pytest.raises(CaptureError) as raised, Capture(model, site, Collect(), at=at) as capture:
        capture.forward(inputs)
    return str(raised.value)


def test_which_tokens_count_has_no_default(llama: PreTrainedModel) -> None:
    assert "at=hooks.real_tokens" in _error(llama, LAYOUTS["right"], None)


@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (3, 6), (1, 6), (6, 2)])
def test_a_rule_for_another_batch_names_both_shapes(
    shape: tuple[int, int], llama: PreTrainedModel
) -> None:
    rows, columns = shape
    rule, labels = (
        custom(torch.ones(shape, dtype=torch.bool), "odd"),
        torch.ones(shape, dtype=torch.long),
    )
    span = character_span([(0, 1)] * rows, torch.tensor([0, 1]).expand(rows, columns, 2))
    for wrong in (
        rule,
        answer_tokens(labels),
        span,
        ~rule,
        real_tokens & rule,
        rule | real_tokens,
        predicting(rule),
    ):
        message = _error(llama, LAYOUTS["right"], wrong)
        assert str([rows, columns]) in message and "[2, 6]" in message, wrong.name
    assert "'odd'" in _error(llama, LAYOUTS["right"], rule)
    with (
        pytest.raises(CaptureError, match="odd"),
        edit(llama, {SITE: steer(torch.ones(16))}, at=rule),
    ):
        llama(**LAYOUTS["right"])


def test_rules_read_passes_of_embeddings_unless_they_need_the_ids(llama: PreTrainedModel) -> None:
    inputs = {
        "inputs_embeds": torch.zeros(2, 6, 16),
        "attention_mask": LAYOUTS["left"]["attention_mask"],
    }
    for rule, pictures in EXPECTED:
        if not rule.name.startswith("without_bos"):
            assert torch.equal(chosen(rule, inputs), picture(pictures[1])), rule.name
    assert "input_ids" in _error(llama, inputs, without_bos(BOS))


def test_a_custom_mask_is_boolean_and_two_dimensional() -> None:
    for mask in (MASK.long(), MASK.float(), MASK[0], MASK[None]):
        with pytest.raises(CaptureError, match="boolean"):
            custom(mask)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (3, 6), (3, 9)])
def test_an_attention_mask_of_a_wrong_shape_is_named(
    shape: tuple[int, int], llama: PreTrainedModel
) -> None:
    inputs = LAYOUTS["right"] | {"attention_mask": torch.ones(shape, dtype=torch.long)}
    message = _error(llama, inputs, real_tokens)
    assert "attention_mask" in message and str(list(shape)) in message


def _four_dimensional(inputs: Inputs) -> Tensor:
    length = inputs["input_ids"].shape[1]
    seen = torch.ones(length, length).tril().bool() & inputs["attention_mask"][:, None, None].bool()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["tensor", "by layer type"])
def test_a_four_dimensional_attention_mask_does_not_tell_what_padding_is(
    kind: str, make_model: ModelMaker
) -> None:
    # Where layers differ (sliding windows), transformers takes one such mask for every type of
    # layer.
    model, mask = make_model("qwen2"), _four_dimensional(LAYOUTS["right"])
    inputs = LAYOUTS["right"] | {
        "attention_mask": mask if kind == "tensor" else {"full_attention": mask}
    }
    rows = Collect()
    with Capture(model, SITE, rows) as capture:
        capture.at(LAYOUTS["right"]["attention_mask"].bool())
        capture.forward(inputs)
    assert len(rows[SITE]) == 10
    for rule in (real_tokens, last_token, ~without_first):
        assert "mask" in _error(model, inputs, rule)


def test_a_rule_on_a_module_that_is_no_language_model_asks_for_a_mask() -> None:
    model, vectors, rows = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 6, 3), Collect()
    with Capture(model, "0:out", rows) as capture:
        capture.at(MASK)
        model(vectors)
    torch.testing.assert_close(rows["0:out"], model(vectors)[MASK].detach())
    for rule in (real_tokens, last_token, without_first & ~last_token):
        with pytest.raises(CaptureError, match="mask"), Capture(model, "0:out", Collect(), at=rule):
            model(vectors)
        with (
            pytest.raises(CaptureError, match="mask"),
            edit(model, {"0:out": steer(torch.ones(4))}, at=rule),
        ):
            model(vectors)


def test_a_custom_mask_works_on_a_module_that_takes_its_vectors_by_name() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.inner(hidden_states)

    model, vectors, rows = Head(), torch.randn(2, 6, 3), Collect()
    plain = model(hidden_states=vectors).detach()
    with (
        pytest.raises(CaptureError, match="Give a mask"),
        Capture(model, "inner:out", Collect(), at=real_tokens),
    ):
        model(hidden_states=vectors)
    with Capture(model, "inner:out", rows, at=custom(MASK)):
        model(hidden_states=vectors)
    torch.testing.assert_close(rows["inner:out"], plain[MASK])
    with edit(model, {"inner:out": steer(torch.ones(4))}, at=custom(MASK)):
        assert torch.equal(model(hidden_states=vectors)[~MASK], plain[~MASK])


# --- edits at chosen positions --------------------------------------------------------------------

EDITED = {
    "llama": [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_mid",
        "blocks.1.hook_resid_post",
        "blocks.0.mlp.out.hook_in",
    ],
    "gpt_neox": ["blocks.0.hook_resid_post", "blocks.1.attn.hook_k", "blocks.1.mlp.hook_out"],
    "gpt2": ["blocks.0.attn.hook_v", "blocks.1.hook_resid_mid"],
}
EDIT_CASES = [(kind, site) for kind, sites in EDITED.items() for site in sites]


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize(("kind", "site"), EDIT_CASES)
def test_an_edit_changes_the_chosen_positions_and_no_bit_of_the_others(
    kind: str, site: str, layout: str, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # which positions are changed is the question here, not what they attend to
    monkeypatch.setattr("workbench.hooks.inputs.packed_rows_are_apart", lambda *_: True)
    model, inputs = tiny(kind, make_model), dict(LAYOUTS[layout])
    inputs.setdefault("position_ids", (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
    before = peek(model, inputs, site)[site]
    mean = torch.linspace(1, 2, before.shape[-1])
    for rule in (
        last_token,
        without_first & ~last_token,
        custom(torch.ones(2, 6, dtype=torch.bool)),
        predicting(custom(MASK)),
        real_tokens,
    ):
        with edit(model, {site: ablate_to_mean(mean)}, at=rule):
            after = peek(model, inputs, site)[site]
        mask = chosen(rule, inputs)
        assert torch.equal(after[~mask], before[~mask])
        assert torch.equal(after[mask], mean.expand_as(after[mask]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_edit_of_a_padded_batch_does_what_it_does_to_each_sequence_alone(
    side: str, llama: PreTrainedModel
) -> None:
    change = {"blocks.0.hook_resid_post": steer(torch.linspace(-3, 3, 16))}
    inputs = padded([ONE, OTHER, [1, 3]], side)
    with torch.no_grad(), edit(llama, change, at=last_token | ~without_first):
        logits = llama(**inputs).logits[inputs["attention_mask"].bool()]
        alone = [
            llama(input_ids=torch.tensor([sequence])).logits[0] for sequence in (ONE, OTHER, [1, 3])
        ]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
