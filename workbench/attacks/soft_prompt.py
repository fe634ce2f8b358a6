"""Soft prompts: a few continuous embeddings in front of a text, trained to bring forgotten answers
back while every weight stays as it is.

Prompt tuning is Lester et al. 2021 (arXiv 2104.08691, section 2); as an attack on unlearned models,
Schwinn et al. 2024 (arXiv 2402.09063, universal attack). It is trained on the facts that the
attacker holds and judged on others. A handful of embeddings can teach a model answers that it never
knew (Chen et al. 2025, arXiv 2502.15836): without the same attack on the never-learned model, and a
:func:`random_prompt` of the same length, recovery means nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError, unknown
from workbench.evaluation.losses import Scores, cross_entropy, score
from workbench.progress import ProgressCallback, quiet

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int

Rule = Literal["adam", "sign"]
"""``adam``: Adam at a constant rate. ``sign``: every coordinate moves by the rate against the sign
of its gradient, as in the released code of arXiv 2402.09063.
"""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient for any parameter; modes and ``requires_grad`` flags are put
    back one by one, whatever happens inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_context(model: PreTrainedModel, length: int, what: str) -> None:
    """Refuse inputs that are longer than the model's context.

    Args:
        model: whose configuration is asked.
        length: tokens of the longest input.
        what: the input, for the message.

    Raises:
        WorkbenchError: ``length`` is above ``max_position_embeddings``; a configuration without it
            allows everything.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise WorkbenchError(
            f"{what} have {length} tokens, and the model's context has {limit}; shorten them or "
            "the prompt"
        )


class Prompted(nn.Module):
    """A model with a soft prompt in front of every text: the same arguments, and logits of the same
    shape, so that every loss and score of the workbench takes it.

    The prompt stands behind the row's first token where that is the model's BOS (an attention sink
    that stays first), else in front of it. Entry ``t`` of the logits predicts token ``t + 1`` of
    the text as always; the prompt itself is never predicted.

    Args:
        model: used as it is; its weights stay its own.
        prompt: embeddings, as the model's input embedding gives them.

    Raises:
        WorkbenchError: the prompt is empty or not as wide as the model's embeddings.
    """

    def __init__(self, model: PreTrainedModel, prompt: Float[Tensor, "pos d_model"]) -> None:
        super().__init__()
        self.model = model
        self.prompt = prompt
        self.training = model.training
        width = model.get_input_embeddings().weight.shape[1]
        if prompt.ndim != 2 or prompt.shape[1] != width or not len(prompt):
            raise WorkbenchError(
                f"a soft prompt for this model has shape [tokens, {width}] with at least one "
                f"token; got {list(prompt.shape)}"
            )

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        use_cache: bool = False,
    ) -> CausalLMOutput:
        """Logits ``[batch pos d_vocab]`` of the text behind the prompt.

        Args:
            input_ids: token ids, padded on either side.
            attention_mask: 1 on real tokens, 0 on padding.
            use_cache: must be false.
        """
        if use_cache:
            raise WorkbenchError("a prompted model runs whole texts, without a cache")
        rows, length = input_ids.shape
        added = len(self.prompt)
        check_context(
            self.model, int(attention_mask.sum(1).max()) + added, "texts behind a soft prompt"
        )
        start = attention_mask.argmax(1)  # the first real token
        bos = self.model.config.get_text_config().bos_token_id
        if bos is not None:
            start = start + (input_ids.gather(1, start[:, None])[:, 0] == bos)
        embeddings = self.model.get_input_embeddings()(input_ids)
        prompt = self.prompt.to(embeddings).expand(rows, -1, -1)
        # column j of the longer row is text token j before the prompt, the prompt, then text token
        # j - added
        column = torch.arange(length + added, device=input_ids.device).expand(rows, -1)
        behind, within = column >= start[:, None] + added, column >= start[:, None]
        source = torch.where(
            behind, column - added, torch.where(within, length + column - start[:, None], column)
        )
        longer = torch.cat([embeddings, prompt], 1).gather(
            1, source[..., None].expand(-1, -1, embeddings.shape[-1])
        )
        mask = torch.cat([attention_mask, attention_mask.new_ones(rows, added)], 1).gather(
            1, source
        )
        inputs = {"inputs_embeds": longer, "attention_mask": mask}
        if not bool(mask[:, 0].all()):  # padding on the left: positions count real tokens
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(**inputs, use_cache=False).logits
        # entry t predicts token t + 1, which stands behind the prompt from the insertion point on
        place = torch.arange(length, device=logits.device).expand(rows, -1)
        place = place + added * (place + 1 >= start[:, None].to(logits.device))
        return CausalLMOutput(
            logits=logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
        )


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """A trained soft prompt.

    Attributes:
        embeddings: after the last step.
        losses: before every step the loss of its batch, nats per answer token.
        seed: of the start and of the order of the batches.
    """

    embeddings: Float32[Tensor, "pos d_model"]
    losses: tuple[float, ...]
    seed: int

    def __repr__(self) -> str:
        return (
            f"SoftPrompt({len(self.embeddings)} tokens, {len(self.losses)} steps, loss "
            f"{self.losses[0]:.3f} to {self.losses[-1]:.3f})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "tokens": str(len(self.embeddings)),
            "steps": str(len(self.losses)),
            "loss, nats per answer token": f"{self.losses[0]:.3f} → {self.losses[-1]:.3f}",
            "mean norm of an embedding": f"{float(self.embeddings.norm(dim=1).mean()):.3f}",
            "seed": str(self.seed),
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td "
            f"style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in rows.items()
        )
        return f"<table>{cells}</table>"


def soft_prompt(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    tokens: int = 5,
    steps: int = 100,
    lr: float = 1e-2,
    seed: int = 0,
    rule: Rule = "adam",
    progress: ProgressCallback = quiet,
) -> SoftPrompt:
    r"""Train one soft prompt for all attack texts; the model is not changed.

    .. math:: \min_P\ -\tfrac1{|A|} \sum_{t\in A} \log p_\theta(x_t \mid [\mathrm{BOS}; P; x_{<t}]), \qquad A = \text{answer tokens}

    Equation of Lester et al. 2021, section 2, with the answers of the attack set as labels. The
    prompt starts at the embeddings of tokens drawn from the vocabulary (their section 3.2) and is
    kept in float32.

    Args:
        model: what is attacked.
        batches: attack texts; every row has an answer.
        tokens: length of the prompt.
        steps: optimiser steps, one batch each; every epoch takes the batches in a fresh order.
        lr: learning rate, in units of embedding.
        seed: of the start and of the order.
        rule: see :data:`Rule`.
        progress: called after every step.

    Raises:
        WorkbenchError: there is no text, a text has no answer, the texts and the prompt do not fit
            the model's context, a setting is out of range, or the loss is not finite.
    """  # noqa: E501
    if rule not in get_args(Rule):
        raise unknown("step rule of a soft prompt", rule, get_args(Rule))
    if tokens < 1 or steps < 1 or not (math.isfinite(lr) and lr > 0):
        raise WorkbenchError(
            f"a soft prompt needs tokens >= 1, steps >= 1 and a positive lr; got {tokens}, "
            f"{steps}, {lr}"
        )
    if not batches:
        raise WorkbenchError("a soft prompt has no text to train on: the set is empty")
    for batch in batches:
        if not bool(batch.answer_mask[:, 1:].any(1).all()):
            raise WorkbenchError(
                "a soft prompt is trained on answers, and one of the texts has none; give "
                "questions with answers"
            )
    check_context(
        model,
        max(int(batch.attention_mask.sum(1).max()) for batch in batches) + tokens,
        "texts behind a soft prompt",
    )
    with torch.no_grad():
        vocabulary = model.get_input_embeddings().weight.shape[0]
        drawn = torch.randint(
            vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed)
        )
        prompt = model.get_input_embeddings()(drawn.to(model.device))[0].float().clone()
    prompt.requires_grad_(True)
    optimiser = torch.optim.Adam([prompt], lr=lr)
    order = _order(len(batches), seed)
    losses = []
    with frozen(model):
        for step in range(1, steps + 1):
            batch = batches[next(order)].to(model.device)
            with torch.enable_grad():
                loss = cross_entropy(
                    Prompted(model, prompt), replace(batch, target_mask=batch.answer_mask)
                )
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise WorkbenchError(
                        f"the soft prompt's loss is {losses[-1]} at step {step} of {steps}; lower "
                        f"its lr (now {lr})"
                    )
                (prompt.grad,) = torch.autograd.grad(loss, [prompt])
            if rule == "adam":
                optimiser.step()
            else:
                with torch.no_grad():
                    prompt.sub_(lr * prompt.grad.sign())
            progress(step, steps)
    return SoftPrompt(prompt.detach(), tuple(losses), seed)


def _order(number: int, seed: int) -> Iterator[int]:
    rng = random.Random(f"soft-prompt-{seed}")
    while True:
        yield from rng.sample(range(number), number)


def random_prompt(
    prompt: Float[Tensor, "pos d_model"], seed: int
) -> Float32[Tensor, "pos d_model"]:
    """The control: embeddings in random directions, each as long as its counterpart (isotropic
    Gaussian draws, rescaled).

    Args:
        prompt: a trained prompt.
        seed: of the draw.

    Returns:
        The embeddings, on the same device.
    """
    drawn = torch.randn(
        prompt.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (
        (
            drawn
            / drawn.norm(dim=1, keepdim=True)
            * prompt.detach().double().cpu().norm(dim=1, keepdim=True)
        )
        .float()
        .to(prompt.device)
    )


def score_with_prompt(
    model: PreTrainedModel, prompt: Float[Tensor, "pos d_model"], batches: Sequence[Batch]
) -> Scores:
    """:func:`~workbench.evaluation.losses.score` of the model with ``prompt`` in front of every
    text; the model is not changed.

    Args:
        model: the model that the prompt was trained on (or a control).
        prompt: embeddings, e.g. :attr:`SoftPrompt.embeddings`.
        batches: held-out texts. Counted are the same tokens as without a prompt.

    Raises:
        WorkbenchError: there is no text, the prompt does not fit the model, or the texts do not fit
            its context behind the prompt.
    """
    if not batches:
        raise WorkbenchError("there is no text to score behind a soft prompt: the set is empty")
    with frozen(model):
        return score(Prompted(model, prompt), batches)
