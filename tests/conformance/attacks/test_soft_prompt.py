"""Soft prompts: the forward against a concatenation by hand, the step against its formula, and a
model that stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from workbench.attacks.soft_prompt import (
    Prompted,
    frozen,
    random_prompt,
    score_with_prompt,
    soft_prompt,
)
from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy, nll_by_text, score

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]


def _prompt(tokens: int = 3, width: int = 16, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def gpt2() -> PreTrainedModel:
    """A tiny GPT-2, whose positions are embedded by index; its BOS is the token 1 of the hand-made
    batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        )
        return GPT2LMHeadModel(config).eval()


def _by_hand(model: PreTrainedModel, prompt: Tensor, batch: Batch, first: int = 1) -> Tensor:
    """``[batch, position - 1]`` log-probability of every next token of right-padded rows, one at a
    time without padding; zero elsewhere. ``first`` tokens stand before the prompt.
    """
    found = torch.zeros(batch.size, batch.input_ids.shape[1] - 1)
    for row in range(batch.size):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        embedded = model.get_input_embeddings()(ids)
        with torch.no_grad():
            logits = model(
                inputs_embeds=torch.cat([embedded[:first], prompt, embedded[first:]])[None]
            ).logits[0]
        for position in range(1, len(ids)):
            before = position - 1 if position < first else position + len(prompt) - 1
            found[row, position - 1] = logits[before].log_softmax(-1)[ids[position]]
    return found


def _left(batch: Batch) -> Batch:
    """The same rows, padded on the left with an ordinary token."""
    lengths = batch.attention_mask.sum(1).tolist()

    def turn(tensor: Tensor, fill: int) -> Tensor:
        return torch.stack(
            [
                F.pad(row[:length], (tensor.shape[1] - length, 0), value=fill)
                for row, length in zip(tensor, lengths, strict=True)
            ]
        )

    masks = {
        name: turn(getattr(batch, name).long(), 0).to(getattr(batch, name).dtype)
        for name in ("attention_mask", "answer_mask", "target_mask")
    }
    return replace(batch, input_ids=turn(batch.input_ids, 7), **masks)


# --- the forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_prompt_stands_behind_bos_and_predicts_the_text(
    make_model: ModelMaker, batch: Batch, family: str, tokens: int
) -> None:
    model = gpt2() if family == "gpt2" else make_model(family)
    prompt = _prompt(tokens)
    with torch.no_grad():
        logits = Prompted(model, prompt)(**batch.inputs).logits
    assert logits.shape == (*batch.input_ids.shape, 50)
    found = (
        logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
        * batch.attention_mask[:, 1:]
    )
    torch.testing.assert_close(found, _by_hand(model, prompt, batch), atol=1e-5, rtol=1e-5)


def test_without_bos_the_prompt_stands_in_front(make_model: ModelMaker, batch: Batch) -> None:
    for model in (make_model(bos_token_id=None), make_model(bos_token_id=9)):
        prompt = _prompt()
        with torch.no_grad():
            logits = Prompted(model, prompt)(**batch.inputs).logits
        found = (
            logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
            * batch.attention_mask[:, 1:]
        )
        torch.testing.assert_close(
            found, _by_hand(model, prompt, batch, first=0), atol=1e-5, rtol=1e-5
        )


def test_embeddings_of_tokens_are_those_tokens(llama: PreTrainedModel, batch: Batch) -> None:
    tokens = torch.tensor([11, 12, 13])
    found = score_with_prompt(llama, llama.get_input_embeddings()(tokens).detach(), [batch])

    def longer(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor[:, :1], torch.full((3, 3), value).to(tensor), tensor[:, 1:]], 1)

    ids = longer(batch.input_ids, 0)
    ids[:, 1:4] = tokens
    spelled = Batch(
        ids,
        longer(batch.attention_mask, 1),
        *(longer(mask, 0) for mask in (batch.answer_mask, batch.subject_mask, batch.target_mask)),
        batch.items,
    )
    expected = score(llama, [spelled])
    assert found.items == expected.items
    for name in ("correct", "probability", "nll", "tokens"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_either_side_changes_nothing(
    make_model: ModelMaker, batch: Batch, pad: Padder, family: str
) -> None:
    model = gpt2() if family == "gpt2" else make_model(family)
    prompt = _prompt()
    expected = score_with_prompt(model, prompt, [batch])
    for other in (pad(batch), _left(batch), _left(pad(batch))):
        found = score_with_prompt(model, prompt, [other])
        for name in ("correct", "probability", "nll", "tokens"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4)
    rows = [
        replace(
            batch,
            **{
                n: getattr(batch, n)[i : i + 1]
                for n in (
                    "input_ids",
                    "attention_mask",
                    "answer_mask",
                    "subject_mask",
                    "target_mask",
                )
            },
            items=(str(i),),
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(score_with_prompt(model, prompt, rows).nll, expected.nll, rtol=1e-4)


def test_scores_count_the_same_tokens_as_without_a_prompt(
    llama: PreTrainedModel, batch: Batch
) -> None:
    prompt = _prompt()
    plain, found = score(llama, [batch]), score_with_prompt(llama, prompt, [batch])
    assert plain.tokens.tolist() == found.tokens.tolist() and plain.items == found.items
    by_hand = _by_hand(llama, prompt, batch)
    np.testing.assert_allclose(found.nll, -by_hand.sum(1).numpy(), rtol=1e-5)
    answers = (by_hand * batch.answer_mask[:, 1:]).sum(1) / batch.answer_mask.sum(1)
    np.testing.assert_allclose(found.probability, answers.exp().numpy(), rtol=1e-5)


def test_other_measures_take_a_prompted_model(llama: PreTrainedModel, batch: Batch) -> None:
    prompt = _prompt()
    sums, counts = nll_by_text(Prompted(llama, prompt), [batch])
    np.testing.assert_allclose(sums, score_with_prompt(llama, prompt, [batch]).nll, rtol=1e-5)
    assert counts.sum() == batch.target_mask.sum()


def test_a_bf16_model_runs_a_float32_prompt(llama: PreTrainedModel, batch: Batch) -> None:
    found = soft_prompt(llama.to(torch.bfloat16), [batch], tokens=2, steps=2)
    assert (
        found.embeddings.dtype == torch.float32
        and np.isfinite(score_with_prompt(llama, found.embeddings, [batch]).nll).all()
    )


# --- training -------------------------------------------------------------------------------------


def test_the_first_step_follows_the_gradient(llama: PreTrainedModel, batch: Batch) -> None:
    """The loss is the answers' mean negative log-likelihood; one step of either rule moves by the
    rate against the sign of its gradient.
    """
    start = (
        llama.get_input_embeddings()
        .weight.detach()[torch.randint(50, (2,), generator=torch.Generator().manual_seed(5))]
        .clone()
        .requires_grad_(True)
    )
    answers = batch.answer_mask[:, 1:]

    def loss(prompt: Tensor) -> Tensor:
        rows = []
        for row in range(batch.size):
            ids = batch.input_ids[row][batch.attention_mask[row].bool()]
            embedded = llama.get_input_embeddings()(ids)
            logits = llama(
                inputs_embeds=torch.cat([embedded[:1], prompt, embedded[1:]])[None]
            ).logits[0]
            rows += [
                -logits[position + 1].log_softmax(-1)[ids[position]]
                for position in range(1, len(ids))
                if answers[row, position - 1]
            ]
        return torch.stack(rows).mean()

    expected = loss(start)
    (gradient,) = torch.autograd.grad(expected, [start])
    adam = soft_prompt(llama, [batch], tokens=2, steps=1, lr=0.01, seed=5)
    sign = soft_prompt(llama, [batch], tokens=2, steps=1, lr=0.01, seed=5, rule="sign")
    assert adam.losses == pytest.approx([expected.item()], rel=1e-5)
    torch.testing.assert_close(sign.embeddings, start.detach() - 0.01 * gradient.sign())
    torch.testing.assert_close(
        adam.embeddings, start.detach() - 0.01 * gradient / (gradient.abs() + 1e-8)
    )
    assert loss(adam.embeddings).item() < expected.item()


@pytest.mark.parametrize("rule", ["adam", "sign"])
def test_a_trained_prompt_beats_a_random_one(
    llama: PreTrainedModel, batch: Batch, rule: str
) -> None:
    seen: list[tuple[int, int]] = []
    found = soft_prompt(
        llama,
        [batch],
        tokens=4,
        steps=40,
        lr=0.05,
        rule=rule,
        progress=lambda *place: seen.append(place),
    )  # type: ignore[arg-type]
    assert (
        seen == [(step, 40) for step in range(1, 41)]
        and len(found.losses) == 40
        and found.losses[-1] < found.losses[0] / 2
    )
    control = random_prompt(found.embeddings, seed=0)
    assert (
        score_with_prompt(llama, found.embeddings, [batch]).probability.mean()
        > score_with_prompt(llama, control, [batch]).probability.mean()
    )
    assert "4" in found._repr_html_() and "40 steps" in repr(found)


def test_only_the_prompt_is_trained(llama: PreTrainedModel, batch: Batch) -> None:
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    llama.train()
    llama.model.layers[1].eval()
    before = copy.deepcopy(llama.state_dict())
    flags, modes = (
        [p.requires_grad for p in llama.parameters()],
        [module.training for module in llama.modules()],
    )
    found = soft_prompt(llama, [batch], steps=3)
    score_with_prompt(llama, found.embeddings, [batch])
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert [p.requires_grad for p in llama.parameters()] == flags and [
        module.training for module in llama.modules()
    ] == modes
    assert all(p.grad is None for p in llama.parameters())
    with pytest.raises(RuntimeError), frozen(llama):
        assert not any(p.requires_grad for p in llama.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in llama.parameters()] == flags and [
        module.training for module in llama.modules()
    ] == modes


def test_the_same_seed_gives_the_same_prompt(
    llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    texts = [make_batch(seed=seed) for seed in range(3)]
    one, two, other = (soft_prompt(llama, texts, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.embeddings, two.embeddings) and one.losses == two.losses
    assert not torch.equal(one.embeddings, other.embeddings)
    state = torch.get_rng_state()
    soft_prompt(llama, texts, steps=2)
    assert torch.equal(state, torch.get_rng_state())


def test_every_epoch_sees_every_batch_once(llama: PreTrainedModel, make_batch: BatchMaker) -> None:
    texts = [make_batch(seed=seed) for seed in range(4)]
    found = soft_prompt(llama, texts, steps=8, lr=1e-12, seed=3)
    start = Prompted(llama, found.embeddings)
    with torch.no_grad():
        losses = sorted(
            float(cross_entropy(start, replace(text, target_mask=text.answer_mask)))
            for text in texts
        )
    for epoch in (found.losses[:4], found.losses[4:]):
        assert sorted(epoch) == pytest.approx(losses, rel=1e-5)


def test_only_answers_are_trained_on(
    llama: PreTrainedModel, batch: Batch, make_batch: BatchMaker
) -> None:
    one, two = (
        soft_prompt(llama, [texts], steps=3) for texts in (batch, make_batch(targets="answer"))
    )
    assert torch.equal(one.embeddings, two.embeddings)


def test_a_random_prompt_has_the_norms_and_nothing_else() -> None:
    prompt = _prompt(5, 400)
    found = random_prompt(prompt, seed=1)
    torch.testing.assert_close(found.norm(dim=1), prompt.norm(dim=1))
    assert torch.equal(found, random_prompt(prompt, seed=1)) and not torch.equal(
        found, random_prompt(prompt, seed=2)
    )
    assert float(F.cosine_similarity(found, prompt).abs().max()) < 0.2


# --- errors ---------------------------------------------------------------------------------------


def test_bad_input_is_named(make_model: ModelMaker, llama: PreTrainedModel, batch: Batch) -> None:
    with pytest.raises(WorkbenchError, match="no text to train on"):
        soft_prompt(llama, [])
    with pytest.raises(WorkbenchError, match="no text to score"):
        score_with_prompt(llama, _prompt(), [])
    with pytest.raises(WorkbenchError, match="one of the texts has none"):
        soft_prompt(llama, [replace(batch, answer_mask=torch.zeros_like(batch.answer_mask))])
    for changes in ({"tokens": 0}, {"steps": 0}, {"lr": 0.0}, {"lr": float("inf")}):
        with pytest.raises(WorkbenchError, match="positive lr"):
            soft_prompt(llama, [batch], **changes)
    with pytest.raises(WorkbenchError, match="unknown step rule of a soft prompt 'sgd'"):
        soft_prompt(llama, [batch], rule="sgd")  # type: ignore[arg-type]
    with pytest.raises(
        WorkbenchError, match=r"shape \[tokens, 16\] with at least one token; got \[3, 8\]"
    ):
        score_with_prompt(llama, _prompt(3, 8), [batch])
    with pytest.raises(WorkbenchError, match="got \\[0, 16\\]"):
        score_with_prompt(llama, _prompt(0), [batch])
    with pytest.raises(WorkbenchError, match="have 11 tokens, and the model's context has 10"):
        soft_prompt(make_model(max_position_embeddings=10), [batch], tokens=4)
    with pytest.raises(WorkbenchError, match="have 33 tokens, and the model's context has 32"):
        score_with_prompt(gpt2(), _prompt(26), [batch])
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(
        WorkbenchError, match=r"loss is nan at step 1 of 5; lower its lr \(now 0.01\)"
    ):
        soft_prompt(broken, [batch], steps=5)
