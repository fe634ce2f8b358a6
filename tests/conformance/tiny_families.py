"""A tiny random model of every family of architectures in the hooks' table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

_TOKENS: dict[str, Any] = {
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NEOX: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_SHAPE: dict[str, Any] = {**_NEOX, "num_key_value_heads": 2}
_HEADS: dict[str, Any] = {
    **_SHAPE,
    "head_dim": 8,
}  # the heads together are wider than the stream, as in the larger models
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_VISION: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}
_IMAGES: dict[str, Any] = {
    "mm_tokens_per_image": 4,
    "image_token_index": 49,
    "boi_token_index": 47,
    "eoi_token_index": 48,
}

CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: hf.LlamaConfig(**_SHAPE, **more),
    "mistral": lambda **more: hf.MistralConfig(**_SHAPE, **more),
    "qwen2": lambda **more: hf.Qwen2Config(**_SHAPE, **more),
    "qwen3": lambda **more: hf.Qwen3Config(**_HEADS, **more),
    "gemma": lambda **more: hf.GemmaConfig(**_HEADS, **more),
    "gemma2": lambda **more: hf.Gemma2Config(**_HEADS, **more),
    "gemma3_text": lambda **more: hf.Gemma3TextConfig(**_HEADS, **more),
    "gemma3": lambda **more: hf.Gemma3Config(
        text_config=_HEADS, vision_config=_VISION, **_IMAGES, **more
    ),
    "gpt_neox": lambda **more: hf.GPTNeoXConfig(**_NEOX, **more),
    "gpt_neox sequential": lambda **more: hf.GPTNeoXConfig(
        **_NEOX, use_parallel_residual=False, **more
    ),
    "gpt2": lambda **more: hf.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, n_positions=64, **_TOKENS, **more
    ),
    "olmo": lambda **more: hf.OlmoConfig(**_SHAPE, **more),
    "olmo2": lambda **more: hf.Olmo2Config(**_SHAPE, **more),
    "olmo3": lambda **more: hf.Olmo3Config(**_SHAPE, **more),
    "phi": lambda **more: hf.PhiConfig(**_SHAPE, **more),
    "phi3": lambda **more: hf.Phi3Config(**_SHAPE, **more),
    "mixtral": lambda **more: hf.MixtralConfig(**_SHAPE, num_local_experts=4, **more),
    "qwen3_moe": lambda **more: hf.Qwen3MoeConfig(
        **_HEADS, **_EXPERTS, moe_intermediate_size=8, **more
    ),
    "olmoe": lambda **more: hf.OlmoeConfig(**_SHAPE, **_EXPERTS, **more),
    "gpt_oss": lambda **more: hf.GptOssConfig(
        **_HEADS, num_local_experts=4, num_experts_per_tok=2, **more
    ),
}


def build(kind: str, **changes: Any) -> hf.PreTrainedModel:
    """A random model in evaluation mode; norms are not at 1 and biases not at 0, where mistakes
    could hide.
    """
    config = CONFIGS[kind](**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (
            hf.Gemma3ForConditionalGeneration(config)
            if kind == "gemma3"
            else hf.AutoModelForCausalLM.from_config(config)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(
                    0.3 * torch.randn(parameter.shape)
                    + float(parameter.ndim == 1 and name.endswith("weight"))
                )
    return model.eval()
