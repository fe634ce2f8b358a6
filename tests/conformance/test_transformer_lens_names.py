"""Our site names are TransformerLens's: every component of its adapters resolves to the same module here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hooks import resolve

_SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
_FAMILIES = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}


def _components(prefix: str, component: Any, path: str) -> Iterator[tuple[str, str]]:
    """``(TransformerLens name, module path)`` of a component and everything below it; a block stands for block 0."""
    if prefix == "blocks":
        prefix, path = "blocks.0", f"{path}.0"
    yield prefix, path
    for name, below in (getattr(component, "submodules", None) or {}).items():
        if below.name is not None:
            yield from _components(f"{prefix}.{name}", below, f"{path}.{below.name}")


@pytest.mark.parametrize("architecture", _FAMILIES)
def test_every_component_of_the_adapter_is_the_same_module_here(architecture: str) -> None:
    pytest.importorskip("transformer_lens", reason="the dev extra is not installed")
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    model = AutoModelForCausalLM.from_config(_FAMILIES[architecture](**_SHAPE))
    config = build_bridge_config_from_hf(model.config, architecture, "tiny", torch.float32)
    mapping = ArchitectureAdapterFactory.select_architecture_adapter(config).component_mapping
    modules = dict(model.named_modules())
    checked = set()
    for name, component in mapping.items():
        for theirs, path in _components(name, component, component.name):
            # Rotary embeddings return (cos, sin) and the embedding reads token ids, no stream of vectors; q and k norms of Qwen 3 have no name of ours yet.
            if theirs in ("rotary_emb", "embed") or path not in modules or theirs.endswith((".q_norm", ".k_norm", ".rotary_emb")):
                continue
            for port in ("in", "out"):
                (site,) = resolve(model, f"{theirs}.hook_{port}")
                assert (site.path, site.side) == (path, port)
                checked.add(theirs)
    assert {
        "blocks.0",
        "blocks.0.attn.q",
        "blocks.0.attn.o",
        "blocks.0.mlp.gate",
        "blocks.0.mlp.in",
        "blocks.0.mlp.out",
        "ln_final",
        "unembed",
    } <= checked
