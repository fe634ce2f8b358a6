"""Tiny random models and hand-made batches, shared by the conformance tests. Nothing is downloaded
and nothing is trained.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from workbench.data.batches import Batch

# Shared cores make single examples slow now and then; derandomised runs are the same on every
# machine.
settings.register_profile(
    "conformance", deadline=None, derandomize=True, max_examples=30, database=None
)
settings.load_profile("conformance")

VOCABULARY = 50
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Padder = Callable[..., Batch]


def build_model(
    family: str = "llama", seed: int = 0, *, scale: float = 0.3, **changes: object
) -> PreTrainedModel:
    """A random model in evaluation mode; ``scale`` is large enough that attention and MLPs are far
    from linear.
    """
    config_class, model_class = FAMILIES[family]
    shape: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "initializer_range": scale,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config_class(**(shape | changes)))
    return model.eval()


def build_batch(
    lengths: Sequence[int] = (7, 5, 6), seed: int = 0, *, answer: int = 2, targets: str = "text"
) -> Batch:
    """Right-padded random rows that begin with BOS; the last ``answer`` tokens of every row are its
    answer, the token before them its subject.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    masks = [torch.zeros(len(lengths), width, dtype=torch.bool) for _ in range(4)]
    real, answers, subjects, target = masks
    for row, length in enumerate(lengths):
        input_ids[row, 0] = 1
        input_ids[row, 1:length] = torch.randint(3, VOCABULARY, (length - 1,), generator=generator)
        real[row, :length] = True
        answers[row, length - answer : length] = True
        subjects[row, length - answer - 1] = True
        target[row, 1:length] = True
    if targets == "answer":
        target = answers.clone()
    return Batch(
        input_ids,
        real.long(),
        answers,
        subjects,
        target,
        tuple(f"fact/{row}" for row in range(len(lengths))),
    )


def add_padding(batch: Batch, columns: int = 3, token: int = 7) -> Batch:
    """The same batch with more padded columns; they hold an ordinary token, so that a formula that
    reads them changes its value.
    """
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, columns), value=token),
        attention_mask=F.pad(batch.attention_mask, (0, columns)),
        answer_mask=F.pad(batch.answer_mask, (0, columns)),
        subject_mask=F.pad(batch.subject_mask, (0, columns)),
        target_mask=F.pad(batch.target_mask, (0, columns)),
    )


@pytest.fixture
def make_model() -> ModelMaker:
    """``make_model(family="llama", seed=0, **config)``: a tiny random model."""
    return build_model


@pytest.fixture
def make_batch() -> BatchMaker:
    """``make_batch(lengths, seed, answer=2, targets="text")``: a hand-made batch."""
    return build_batch


@pytest.fixture
def pad() -> Padder:
    """``pad(batch, columns=3)``: the batch with more padding."""
    return add_padding


@pytest.fixture
def llama() -> PreTrainedModel:
    """A fresh tiny Llama."""
    return build_model()


@pytest.fixture
def batch() -> Batch:
    """Three rows of 7, 5 and 6 tokens."""
    return build_batch()


@pytest.fixture
def nearby() -> Callable[..., PreTrainedModel]:
    """``nearby(model, size=0.05, seed=1)``: a copy of ``model`` with noise on every weight, a point
    away from the reference.
    """
    import copy

    def move(model: PreTrainedModel, size: float = 0.05, seed: int = 1) -> PreTrainedModel:
        moved = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(
                    size
                    * torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(
                        parameter.dtype
                    )
                )
        return moved

    return move


@pytest.fixture
def gradients() -> Callable[[PreTrainedModel, Tensor], dict[str, Tensor]]:
    """``gradients(model, loss)``: parameter name to gradient, zeros where the loss does not depend
    on the parameter; ``.grad`` is not touched.
    """

    def differentiate(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(
            *[(name, p) for name, p in model.named_parameters() if p.requires_grad], strict=True
        )
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return dict(zip(names, found, strict=True))

    return differentiate
