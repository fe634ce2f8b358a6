"""Teach a small language model texts: what the built-in model, the names experiment and the keyword
experiment share.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.progress import ProgressCallback, quiet


def small_llama(
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    mlp_width: int,
    seed: int,
) -> PreTrainedModel:
    """A Llama with random weights for ``tokenizer``; context of 256 tokens, untied head."""
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape)


def fit(
    model: PreTrainedModel,
    next_batch: Callable[[], Batch],
    *,
    steps: int,
    lr: float,
    seed: int,
    warmup: int = 50,
    progress: ProgressCallback = quiet,
) -> PreTrainedModel:
    """Train every parameter in place: AdamW (decay 0.01 on matrices), linear warm-up, then a cosine
    to 2 % of the peak rate, gradients clipped to 1.

    Args:
        model: changed in place, and left in evaluation mode.
        next_batch: gives the batch of the next step.
        steps: optimiser steps.
        lr: peak learning rate.
        seed: of dropout, where the model has any.
        warmup: steps of the linear warm-up.
        progress: called after every step.

    Raises:
        WorkbenchError: the loss is not finite.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
    )
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            rate = (
                lr
                * min(1.0, (step + 1) / warmup)
                * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = cross_entropy(model, next_batch())
            if not math.isfinite(loss.item()):
                raise WorkbenchError(
                    f"training loss is {loss.item()} at step {step + 1}; lower lr (now {lr})"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            progress(step + 1, steps)
    return model.eval()
