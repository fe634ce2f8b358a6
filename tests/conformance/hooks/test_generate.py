"""Padding and the key-value cache: no consumer sees a padded position, and ``generate`` delivers
the rows of one clean pass over what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from workbench.hooks import (
    Capture,
    CaptureError,
    Collect,
    MomentsOf,
    Positions,
    Rows,
    Site,
    answer_tokens,
    custom,
    edit,
    generated,
    last_token,
    predicting,
    real_tokens,
    steer,
    without_bos,
    without_first,
)

ModelMaker = Callable[..., PreTrainedModel]
Inputs = dict[str, Tensor]
BOS = 1
KINDS = ("llama", "gpt_neox", "gpt2")


def padded(sequences: Sequence[Sequence[int]], side: str) -> Inputs:
    """A padded batch with position ids (GPT-2 needs them on the left); the padding is an ordinary
    token, so that only the mask tells.
    """
    width = max(map(len, sequences))
    sides = [
        (0, width - len(sequence)) if side == "right" else (width - len(sequence), 0)
        for sequence in sequences
    ]
    ids = torch.stack(
        [
            F.pad(torch.tensor(sequence), sizes, value=7)
            for sequence, sizes in zip(sequences, sides, strict=True)
        ]
    )
    mask = torch.stack(
        [
            F.pad(torch.ones(len(sequence), dtype=torch.long), sizes)
            for sequence, sizes in zip(sequences, sides, strict=True)
        ]
    )
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


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


# --- padding never reaches a consumer -------------------------------------------------------------

BATCH = [[1, 7, 8, 9, 6, 5, 12], [1, 20, 9, 5], [1, 3]]
BEFORE_ATTENTION = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.0.ln1.hook_out",
    *(f"blocks.0.attn.{part}.hook_out" for part in "qkv"),
]


def _real(
    sequences: Sequence[Sequence[int]], side: str, first: int = 0, last: int = 0
) -> list[list[int]]:
    """(example, position) of the real tokens, less ``first`` at the beginning and ``last`` at the
    end of every sequence.
    """
    width = max(map(len, sequences))
    begins = [0 if side == "right" else width - len(sequence) for sequence in sequences]
    return [
        [row, begin + column]
        for row, begin in enumerate(begins)
        for column in range(first, len(sequences[row]) - last)
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["real_tokens", "not the last", "custom", "mask"])
def test_a_nan_in_the_padding_reaches_no_consumer_under_any_rule(
    rule: str, kind: str, side: str, make_model: ModelMaker
) -> None:
    # Attention multiplies a masked NaN by zero, which is NaN; so only the sites before the first
    # attention can be asked for this.
    model, inputs = tiny(kind, make_model), padded(BATCH, side)
    real = inputs["attention_mask"].bool()
    sites = (
        BEFORE_ATTENTION
        if kind == "llama"
        else [*BEFORE_ATTENTION[:3], *(f"blocks.0.attn.hook_{part}" for part in "qkv")]
    )
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _m, _a, output: torch.where(real[..., None], output, torch.nan)
    )
    everything = torch.ones_like(real)
    rules = {
        "real_tokens": real_tokens,
        "not the last": ~last_token,
        "custom": custom(everything),
        "mask": None,
    }
    rows, moments, where = Collect(), MomentsOf(), []
    with Capture(
        model,
        sites,
        rows,
        moments,
        lambda _site, found: where.append(found.where.tolist()),
        at=rules[rule],
    ) as capture:
        if rule == "mask":
            capture.at(everything)
        capture.forward(inputs)
    handle.remove()
    expected = _real(BATCH, side, last=int(rule == "not the last"))
    assert where == [expected] * len(sites)
    for site in sites:
        assert len(rows[site]) == moments[site].count == len(expected)
        assert bool(torch.isfinite(rows[site]).all())
        assert bool(
            torch.isfinite(moments[site].mean).all() and torch.isfinite(moments[site].scatter).all()
        )


def test_padding_is_left_out_where_the_attention_mask_is_a_positional_argument(
    llama: PreTrainedModel,
) -> None:
    inputs, rows = padded(BATCH, "right"), Collect()
    with torch.no_grad(), Capture(llama, "hook_embed", rows, at=real_tokens):
        llama(inputs["input_ids"], inputs["attention_mask"])
    assert len(rows["hook_embed"]) == int(inputs["attention_mask"].sum())


def _summed_loss(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """A sum over predicted tokens, which splits over examples, unlike a mean."""
    scores = model(**inputs).logits[:, :-1]
    both = (inputs["attention_mask"][:, 1:] * inputs["attention_mask"][:, :-1]).bool()
    return F.cross_entropy(scores[both], inputs["input_ids"][:, 1:][both], reduction="sum")


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradient_rows_come_from_real_positions_only_and_are_those_of_each_sequence_alone(
    side: str, llama: PreTrainedModel
) -> None:
    sites = [
        "hook_embed_grad",
        "blocks.0.hook_resid_post_grad",
        "blocks.1.mlp.hook_out_grad",
        "blocks.0.attn.v.hook_in_grad",
    ]
    rows, moments, alone, where = Collect(), MomentsOf(), Collect(), []
    with Capture(
        llama,
        sites,
        rows,
        moments,
        lambda _site, found: where.append(found.where.tolist()),
        at=real_tokens,
    ):
        _summed_loss(llama, padded(BATCH, side)).backward()
    with Capture(llama, sites, alone, at=real_tokens):
        for sequence in BATCH:
            _summed_loss(llama, padded([sequence], side)).backward()
    assert where == [_real(BATCH, side)] * len(sites)
    for site in sites:
        assert moments[site].count == len(rows[site])
        torch.testing.assert_close(rows[site], alone[site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_nan_gradient_in_the_padding_reaches_no_consumer(
    side: str, llama: PreTrainedModel
) -> None:
    inputs = padded(BATCH, side)
    real = inputs["attention_mask"].bool()

    def plant(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: torch.where(real[..., None], gradient, torch.nan))

    handle = llama.get_input_embeddings().register_forward_hook(plant)
    rows, moments = Collect(), MomentsOf()
    for rule in (real_tokens, custom(torch.ones_like(real))):
        with Capture(
            llama, ["hook_embed_grad", "blocks.0.hook_resid_pre_grad"], rows, moments, at=rule
        ):
            _summed_loss(llama, inputs).backward()
    handle.remove()
    for site in ("hook_embed_grad", "blocks.0.hook_resid_pre_grad"):
        assert len(rows[site]) == moments[site].count == 2 * int(real.sum())
        assert bool(
            torch.isfinite(rows[site]).all() and torch.isfinite(moments[site].scatter).all()
        )


@pytest.mark.parametrize("layout", ["right", "left", "no mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_an_answers_loss_stands_exactly_at_the_positions_that_predict_it(
    kind: str, layout: str, make_model: ModelMaker
) -> None:
    model, site = tiny(kind, make_model), "blocks.1.hook_resid_post_grad"
    inputs = padded([[1, 7, 8, 9, 6, 5], [1, 4, 9, 5]], "left" if layout == "left" else "right")
    answers = {"left": [[0, 3], [0, 5], [1, 3], [1, 5]]}.get(
        layout, [[0, 3], [0, 5], [1, 1], [1, 3]]
    )
    if layout == "no mask":
        inputs = {"input_ids": inputs["input_ids"]}
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, column in answers:
        labels[row, column] = inputs["input_ids"][row, column]
    found: dict[str, Rows] = {}
    for name, rule in (("all", real_tokens), ("predicting", predicting(answer_tokens(labels)))):
        with Capture(
            model, site, lambda _site, rows, name=name: found.update({name: rows}), at=rule
        ):
            model(**inputs, labels=labels).loss.backward()
    predictors = [[row, column - 1] for row, column in answers]
    assert found["predicting"].where.tolist() == predictors
    assert len(found["all"].values) == (12 if layout == "no mask" else 10)
    for gradient, place in zip(found["all"].values, found["all"].where.tolist(), strict=True):
        assert bool(gradient.any()) == (place in predictors), place  # exactly zero everywhere else
    assert [0, 5] in found["all"].where.tolist() and [
        0,
        5,
    ] not in predictors  # nothing follows a text's last token


# --- generate -------------------------------------------------------------------------------------

PROMPTS = [[1, 7, 8], [1, 9, 5, 6, 11], [1, 12]]
WIDTH, NEW = 5, 6
PADS = [WIDTH - len(prompt) for prompt in PROMPTS]
SITES = {
    "llama": [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_resid_post",
        "blocks.1.mlp.out.hook_in",
    ],
    "gpt_neox": [
        "hook_embed",
        "blocks.0.hook_resid_post",
        "blocks.1.attn.hook_k",
        "blocks.1.hook_resid_post",
    ],
    "gpt2": [
        "hook_embed",
        "hook_pos_embed",
        "blocks.0.attn.hook_q",
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_resid_post",
    ],
}
PROMPT_MASK = torch.tensor([[False, True, False, True, True]]).expand(
    3, WIDTH
)  # true on padding, too
Places = dict[tuple[int, int], Tensor]


class Placed:
    """A consumer that files every row under its example and position, and wants none twice."""

    def __init__(self) -> None:
        self.by_site: dict[str, Places] = {}

    def __call__(self, site: Site, rows: Rows) -> None:
        mine = self.by_site.setdefault(site.name, {})
        for value, (example, position) in zip(rows.values, rows.where.tolist(), strict=True):
            assert (example, position) not in mine
            mine[example, position] = value


def written(model: PreTrainedModel, **options: object) -> Tensor:
    """What the model writes greedily after the left-padded prompts."""
    inputs = {
        name: tensor for name, tensor in padded(PROMPTS, "left").items() if name != "position_ids"
    }  # generate makes its own
    return model.generate(**{**inputs, "max_new_tokens": NEW, "do_sample": False, **options})


def clean(
    model: PreTrainedModel, sites: Sequence[str], finished: Tensor, pads: Sequence[int]
) -> dict[str, Places]:
    """Every row of one pass over each finished sequence, without its padding, a batch or a
    cache.
    """
    rows: dict[str, Places] = {site: {} for site in sites}
    for example, (sequence, pad) in enumerate(zip(finished, pads, strict=True)):
        found = Placed()
        with Capture(model, sites, found) as capture:
            capture.at(torch.ones(1, len(sequence) - pad, dtype=torch.bool))
            capture.forward({"input_ids": sequence[None, pad:]})
        for site in sites:
            rows[site] |= {
                (example, position + pad): value
                for (_, position), value in found.by_site[site].items()
            }
    return rows


def agree(
    found: dict[str, Places], expected: dict[str, Places], places: set[tuple[int, int]]
) -> None:
    assert set(found) == set(expected)
    for site, rows in found.items():
        assert set(rows) == places, site
        for place in places:
            torch.testing.assert_close(rows[place], expected[site][place], rtol=1e-5, atol=1e-5)


# The last token that is written is never fed back: positions end at WIDTH + NEW - 2.
FED = {(row, column) for row in range(3) for column in range(PADS[row], WIDTH + NEW - 1)}
FIRST = {(row, PADS[row]) for row in range(3)}
FROM_PROMPT = {(row, column) for row in range(3) for column in (1, 3, 4) if column >= PADS[row]}
GENERATED = {(row, column) for row in range(3) for column in range(WIDTH, WIDTH + NEW - 1)}
RULES: list[tuple[Positions, set[tuple[int, int]]]] = [
    (real_tokens, FED),
    (without_first, FED - FIRST),
    (without_bos(BOS), FED - FIRST),
    (
        last_token,
        {(row, column) for row in range(3) for column in range(WIDTH - 1, WIDTH + NEW - 1)},
    ),
    (generated, GENERATED),
    (~generated, FED - GENERATED),
    (custom(PROMPT_MASK, "prompt"), FROM_PROMPT),
    (custom(PROMPT_MASK, "prompt") | generated, FROM_PROMPT | GENERATED),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rule", "places"), RULES, ids=[rule.name for rule, _ in RULES])
def test_generate_delivers_the_rows_of_one_clean_pass_over_the_finished_sequence(
    rule: Positions, places: set[tuple[int, int]], kind: str, make_model: ModelMaker
) -> None:
    model, found = tiny(kind, make_model), Placed()
    with Capture(model, SITES[kind], found, at=rule):
        finished = written(model)
    assert finished.shape == (3, WIDTH + NEW)
    agree(found.by_site, clean(model, SITES[kind], finished, PADS), places)


def test_every_generate_of_a_capture_starts_its_sequences_anew(llama: PreTrainedModel) -> None:
    seen: list[Rows] = []
    with Capture(llama, "hook_embed", lambda _site, rows: seen.append(rows), at=generated):
        written(llama)
        llama.generate(
            torch.tensor([[1, 7, 8, 9]]),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
        )
    where = [rows.where.tolist() for rows in seen]
    assert [rows.number for rows in seen] == list(range(NEW + 3))
    assert where[0] == where[NEW] == []  # the prompts
    assert where[1:NEW] == [[[row, WIDTH + step] for row in range(3)] for step in range(NEW - 1)]
    assert where[NEW + 1 :] == [[[0, 4]], [[0, 5]]]


def _early_end(finished: Tensor) -> int:
    """A token that ends some of the finished sequences at least two tokens early, and not all of
    them.
    """
    new = finished[:, WIDTH:]
    for token in sorted(set(new.flatten().tolist())):
        ends = [row.index(token) if token in row else NEW for row in new.tolist()]
        if min(ends) < NEW - 2 and max(ends) >= NEW - 1:
            return token
    raise AssertionError("the random model writes no such token; take another seed")


def _until_end(finished: Tensor, end: int) -> set[tuple[int, int]]:
    """What is fed of every row: all but the last column, and nothing behind the first end token
    that was written.
    """
    lengths = [row.index(end) + 1 if end in row else NEW for row in finished[:, WIDTH:].tolist()]
    return {(row, column) for row, column in FED if column < WIDTH + lengths[row]}


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_padding_of_rows_that_finish_early_reaches_no_consumer(
    kind: str, listed: bool, make_model: ModelMaker
) -> None:
    model = tiny(kind, make_model)
    end = _early_end(written(model))
    model.generation_config.eos_token_id = [49, end] if listed else end
    lasts = set()
    for rule in (
        real_tokens,
        without_first,
        last_token,
        generated,
        custom(PROMPT_MASK) | generated,
    ):
        found = Placed()
        with Capture(model, SITES[kind], found, at=rule):
            finished = written(model)
        places = _until_end(finished, end)
        lasts = {max(column for row, column in places if row == one) for one in range(3)}
        allowed = next(
            (chosen for known, chosen in RULES if known is rule), FROM_PROMPT | GENERATED
        )
        agree(found.by_site, clean(model, SITES[kind], finished, PADS), places & allowed)
    assert min(lasts) < max(lasts) == WIDTH + NEW - 2  # the rows did end at different places
    # The end token itself is fed and counts.
    ended = [
        (row, column) for row, column in places if column >= WIDTH and finished[row, column] == end
    ]
    assert ended and set(ended) <= set(found.by_site["hook_embed"])


def test_an_end_token_inside_the_prompt_ends_nothing(llama: PreTrainedModel) -> None:
    # Chats hold an end token after every turn, and some models pad with it.
    llama.generation_config.eos_token_id = 9
    prompt, found = [1, 9, 5, 9], Placed()
    with Capture(llama, "blocks.1.hook_resid_post", found, at=real_tokens):
        finished = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            max_new_tokens=4,
            do_sample=False,
        )
    assert 9 not in finished[0, 4:] and finished.shape[1] == 8
    agree(
        found.by_site,
        clean(llama, ["blocks.1.hook_resid_post"], finished, [0]),
        {(0, column) for column in range(7)},
    )


def test_rows_that_finish_early_are_known_where_the_prompt_came_as_embeddings(
    llama: PreTrainedModel,
) -> None:
    inputs = padded(PROMPTS, "left")
    embeddings = llama.get_input_embeddings()(inputs["input_ids"]).detach()
    options = {"input_ids": None, "inputs_embeds": embeddings}
    end = _early_end(
        torch.cat([inputs["input_ids"], written(llama, **options)], dim=1)
    )  # only what is new comes back
    llama.generation_config.eos_token_id = end
    found = Placed()
    with Capture(llama, "blocks.1.hook_resid_post", found, at=real_tokens):
        finished = torch.cat([inputs["input_ids"], written(llama, **options)], dim=1)
    agree(
        found.by_site,
        clean(llama, ["blocks.1.hook_resid_post"], finished, PADS),
        _until_end(finished, end),
    )


def test_a_prompt_of_one_token_has_its_mask_too(llama: PreTrainedModel) -> None:
    found, inputs = (
        Placed(),
        {
            "attention_mask": torch.ones(2, 1, dtype=torch.long),
            "max_new_tokens": 4,
            "do_sample": False,
        },
    )
    with Capture(llama, "hook_embed", found, at=custom(torch.tensor([[True], [False]]))):
        llama.generate(torch.tensor([[1], [5]]), **inputs)
    assert set(found.by_site["hook_embed"]) == {(0, 0)}


def test_an_edit_of_what_is_generated_leaves_the_prompt_alone(llama: PreTrainedModel) -> None:
    site, vector = "blocks.1.hook_resid_post", torch.linspace(-5, 5, 16)
    plain, edited = Placed(), Placed()
    with Capture(llama, site, plain, at=real_tokens):
        before = written(llama)
    with (
        edit(llama, {site: steer(vector)}, at=generated),
        Capture(llama, site, edited, at=real_tokens),
    ):
        after = written(llama)
    assert torch.equal(before[:, : WIDTH + 1], after[:, : WIDTH + 1]) and not torch.equal(
        before, after
    )
    for place in FED - GENERATED:
        assert torch.equal(edited.by_site[site][place], plain.by_site[site][place])
    rows = clean(llama, [site], after, PADS)[site]
    for place in GENERATED:
        torch.testing.assert_close(
            edited.by_site[site][place], rows[place] + vector, rtol=1e-5, atol=1e-5
        )


# --- the cache by hand ----------------------------------------------------------------------------

LONG = [[1, 7, 8, 9, 6, 5], [1, 20, 9, 5], [1, 3, 4, 4, 5]]


def _steps(
    model: PreTrainedModel,
    inputs: Inputs,
    cuts: Sequence[int],
    masks: Tensor | None = None,
    capture: Capture | None = None,
) -> None:
    """The batch in several passes that share a cache; ``masks`` are given to the capture pass by
    pass.
    """
    cache = DynamicCache(config=model.config)
    for start, stop in zip((0, *cuts), (*cuts, 6), strict=True):
        if capture is not None and masks is not None:
            capture.at(masks[:, start:stop])
        new = {name: inputs[name][:, start:stop] for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            model(**new, attention_mask=inputs["attention_mask"][:, :stop], past_key_values=cache)


@pytest.mark.parametrize("cuts", [(4,), (3,), (1, 2), (2, 4, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_that_share_a_cache_give_the_rows_of_one_pass(
    kind: str, cuts: tuple[int, ...], make_model: ModelMaker
) -> None:
    model, inputs = tiny(kind, make_model), padded(LONG, "left")
    rule = without_first if kind == "llama" else real_tokens
    stepped, whole = Placed(), Placed()
    with Capture(model, SITES[kind], stepped, at=rule):
        _steps(model, inputs, cuts)
    with Capture(model, SITES[kind], whole, at=rule) as capture:
        capture.forward(inputs)
    assert len(whole.by_site[SITES[kind][0]]) == 15 - 3 * (rule is without_first)
    agree(stepped.by_site, whole.by_site, set(whole.by_site[SITES[kind][0]]))


@pytest.mark.parametrize("cuts", [(4,), (3,), (1, 2), (2, 4, 5)])
def test_a_mask_given_before_each_pass_selects_from_that_pass(
    cuts: tuple[int, ...], llama: PreTrainedModel
) -> None:
    # Also where a later pass happens to be as long as the first.
    inputs, sites = padded(LONG, "left"), ["blocks.1.hook_resid_post"]
    masks = torch.tensor([[True, True, True, False, True, True]]).expand(3, 6)
    stepped, whole = Placed(), Placed()
    with Capture(llama, sites, stepped) as capture:
        _steps(llama, inputs, cuts, masks, capture)
    with Capture(llama, sites, whole) as capture:
        capture.at(masks)
        capture.forward(inputs)
    agree(
        stepped.by_site,
        whole.by_site,
        {
            (row, column)
            for row, column in (masks & inputs["attention_mask"].bool()).nonzero().tolist()
        },
    )


def test_a_rule_names_the_newest_token_and_what_came_after_the_first_pass(
    llama: PreTrainedModel,
) -> None:
    expected = {
        last_token: {(row, column) for row in range(3) for column in (3, 5)},
        generated: {(row, column) for row in range(3) for column in (4, 5)},
    }
    for rule, places in expected.items():
        found = Placed()
        with Capture(llama, "hook_embed", found, at=rule):
            _steps(llama, padded(LONG, "left"), (4,))
        assert set(found.by_site["hook_embed"]) == places


@pytest.mark.parametrize(
    "rule",
    [real_tokens, generated, custom(torch.ones(3, 2, dtype=torch.bool))],
    ids=lambda rule: rule.name,
)
def test_a_capture_that_begins_when_the_cache_holds_tokens_is_an_error(
    rule: Positions, llama: PreTrainedModel
) -> None:
    inputs, cache = padded(LONG, "left"), DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(**{name: tensor[:, :4] for name, tensor in inputs.items()}, past_key_values=cache)
    rest = {
        "input_ids": inputs["input_ids"][:, 4:],
        "attention_mask": inputs["attention_mask"],
        "past_key_values": cache,
    }
    with (
        pytest.raises(CaptureError, match="holds 4 tokens"),
        Capture(llama, "hook_embed", Collect(), at=rule),
    ):
        llama(**rest)
    with (
        pytest.raises(CaptureError, match="holds 4 tokens"),
        edit(llama, {"hook_embed": steer(torch.ones(16))}, at=rule),
    ):
        llama(**rest)


def test_a_cache_of_other_rows_than_those_seen_last_is_an_error(llama: PreTrainedModel) -> None:
    inputs, cache = padded(LONG, "left"), DynamicCache(config=llama.config)
    with (
        pytest.raises(CaptureError, match="holds 6 tokens"),
        torch.no_grad(),
        Capture(llama, "hook_embed", Collect(), at=real_tokens),
    ):
        llama(**inputs, past_key_values=cache)
        llama(input_ids=torch.tensor([[1, 2, 3]]))
        llama(
            input_ids=torch.tensor([[4], [5], [6]]),
            attention_mask=torch.ones(3, 7, dtype=torch.long),
            past_key_values=cache,
        )


def test_a_cache_of_fixed_size_is_an_error_under_a_rule(llama: PreTrainedModel) -> None:
    # Its masks are four-dimensional in transformers, and do not tell what padding is.
    with (
        pytest.raises(CaptureError, match="mask"),
        Capture(llama, "hook_embed", Collect(), at=real_tokens),
    ):
        written(llama, cache_implementation="static")


def test_learned_positions_with_left_padding_need_position_ids(make_model: ModelMaker) -> None:
    model, left = tiny("gpt2", make_model), padded(LONG, "left")
    bare = {name: left[name] for name in ("input_ids", "attention_mask")}
    with (
        pytest.raises(CaptureError, match="position_ids"),
        Capture(model, "hook_embed", Collect(), at=real_tokens) as capture,
    ):
        capture.forward(bare)
    rows, alone = Collect(), Collect()
    with Capture(model, "blocks.1.hook_resid_post", rows, at=real_tokens) as capture:
        capture.forward(left)
    with Capture(model, "blocks.1.hook_resid_post", alone, at=real_tokens) as capture:
        for sequence in LONG:
            capture.forward({"input_ids": torch.tensor([sequence])})
    torch.testing.assert_close(
        rows["blocks.1.hook_resid_post"], alone["blocks.1.hook_resid_post"], rtol=1e-5, atol=1e-5
    )
