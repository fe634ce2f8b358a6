"""Where TransformerLens's site names live in each family of architectures. A table of data;
``hooks.sites`` reads it.

The names agree with TransformerLens's adapters (``tests/conformance/hooks/test_families.py``
compares names and values). What this table leaves out on purpose, and :func:`hooks.as_bridge` has:

* ``attn.hook_pattern`` and ``hook_attn_scores`` are per pair of positions and exist only under
  eager attention; rotated queries and keys and the insides of norms (``hook_rot_q``,
  ``hook_scale``, ``hook_normalized``) pass through no module of their own.
* ``q_norm`` and ``k_norm`` are per head and laid out differently from family to family: use
  ``attn.hook_q``, ``attn.hook_k``.
* Where q, k and v (or gate and up) are one fused matrix, ``attn.hook_q`` is a slice of its output.
  The *input* has one name, that of the whole (``attn.hook_in``, ``mlp.hook_in``), because its
  gradient cannot be told apart.
* The experts of a mixture-of-experts layer are one module with three-dimensional parameters: no row
  of a single expert passes through a module. The layer's input and output and the router are there,
  the insides of an expert are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Side = Literal["in", "out", "grad_in", "grad_out"]
SIDES: tuple[Side, ...] = get_args(Side)
ColumnRanges = tuple[tuple[int, int], ...]  # half-open intervals of the last dimension


class HookPoint(NamedTuple):
    """A module (path inside its block, empty for the block itself), a side of it, and which part of
    a fused output.
    """

    path: str
    side: Side
    part: str = ""


HookPoints = dict[str, HookPoint]


@dataclass(frozen=True, slots=True)
class Family:
    """Where TransformerLens's names live in one family.

    Attributes:
        blocks: path of the list of blocks.
        inside: TransformerLens name inside a block -> place.
        outside: TransformerLens name outside the blocks -> place.
        parts: from the model's configuration, the columns of each part of a fused output.
        experts: path inside a block of the fused experts, or empty.
    """

    blocks: str
    inside: HookPoints
    outside: HookPoints
    parts: Callable[[Any], dict[str, ColumnRanges]] = lambda config: {}
    experts: str = ""


def _both(name: str, path: str) -> HookPoints:
    return {f"{name}.hook_in": HookPoint(path, "in"), f"{name}.hook_out": HookPoint(path, "out")}


_STREAM: HookPoints = {
    "hook_in": HookPoint("", "in"),
    "hook_out": HookPoint("", "out"),
    "hook_resid_pre": HookPoint("", "in"),
    "hook_resid_post": HookPoint("", "out"),
}


def _attention(
    path: str,
    out: str,
    *,
    qkv: tuple[str, str, str] | None = None,
    fused: str = "",
    returned: str = "",
) -> HookPoints:
    """Names of an attention layer; ``returned`` is the module whose output enters the residual
    stream, where that is not the layer itself.
    """
    names = {
        **_both("attn", path),
        **_both("attn.o", f"{path}.{out}"),
        "attn.hook_z": HookPoint(f"{path}.{out}", "in"),
        "hook_attn_out": HookPoint(returned or path, "out"),
    }
    for number, letter in enumerate("qkv"):
        if qkv is not None:
            names |= _both(f"attn.{letter}", f"{path}.{qkv[number]}")
            names[f"attn.hook_{letter}"] = HookPoint(f"{path}.{qkv[number]}", "out")
        else:
            names[f"attn.{letter}.hook_out"] = names[f"attn.hook_{letter}"] = HookPoint(
                f"{path}.{fused}", "out", letter
            )
    return names


def _gated(path: str = "mlp", *, fused: str = "", returned: str = "") -> HookPoints:
    """Names of a gated MLP (SwiGLU, GeGLU): TransformerLens's ``pre`` is the gate, ``pre_linear``
    the up projection.
    """
    names = {
        **_both("mlp", path),
        **_both("mlp.out", f"{path}.down_proj"),
        "mlp.hook_post": HookPoint(f"{path}.down_proj", "in"),
        "hook_mlp_out": HookPoint(returned or path, "out"),
    }
    if fused:
        gate, up = (
            HookPoint(f"{path}.{fused}", "out", "gate"),
            HookPoint(f"{path}.{fused}", "out", "up"),
        )
        return {
            **names,
            "mlp.gate.hook_out": gate,
            "mlp.hook_pre": gate,
            "mlp.in.hook_out": up,
            "mlp.hook_pre_linear": up,
        }
    return {
        **names,
        **_both("mlp.gate", f"{path}.gate_proj"),
        **_both("mlp.in", f"{path}.up_proj"),
        "mlp.hook_pre": HookPoint(f"{path}.gate_proj", "out"),
        "mlp.hook_pre_linear": HookPoint(f"{path}.up_proj", "out"),
    }


def _plain(path: str, up: str, down: str) -> HookPoints:
    """Names of an MLP without a gate."""
    return {
        **_both("mlp", path),
        **_both("mlp.in", f"{path}.{up}"),
        **_both("mlp.out", f"{path}.{down}"),
        "mlp.hook_pre": HookPoint(f"{path}.{up}", "out"),
        "mlp.hook_post": HookPoint(f"{path}.{down}", "in"),
        "hook_mlp_out": HookPoint(path, "out"),
    }


def _experts(router: str) -> HookPoints:
    """Names of a mixture-of-experts layer: its input, its output and the router (its output is the
    router's logits).
    """
    return {
        **_both("mlp", "mlp"),
        **_both(f"mlp.{router}", f"mlp.{router}"),
        "hook_mlp_out": HookPoint("mlp", "out"),
    }


def _outside(embedding: str, norm: str, head: str = "lm_head") -> HookPoints:
    return {
        "hook_embed": HookPoint(embedding, "out"),
        "embed.hook_out": HookPoint(embedding, "out"),
        **_both("ln_final", norm),
        **_both("unembed", head),
        "hook_unembed": HookPoint(head, "out"),
    }


_QKV = ("q_proj", "k_proj", "v_proj")
_PRE_NORM: HookPoints = {
    **_STREAM,
    **_both("ln1", "input_layernorm"),
    **_both("ln2", "post_attention_layernorm"),
    "hook_resid_mid": HookPoint("post_attention_layernorm", "in"),
}
_LLAMA = Family(
    "model.layers",
    {**_PRE_NORM, **_attention("self_attn", "o_proj", qkv=_QKV), **_gated()},
    _outside("model.embed_tokens", "model.norm"),
)

# Norms before and after each sublayer: what enters the residual stream is the output of the second
# norm.
_SANDWICH: HookPoints = {
    **_STREAM,
    **_both("ln1", "input_layernorm"),
    **_both("ln1_post", "post_attention_layernorm"),
    **_both("ln2", "pre_feedforward_layernorm"),
    **_both("ln2_post", "post_feedforward_layernorm"),
    "hook_resid_mid": HookPoint("pre_feedforward_layernorm", "in"),
    **_attention("self_attn", "o_proj", qkv=_QKV, returned="post_attention_layernorm"),
    **_gated(returned="post_feedforward_layernorm"),
}
_GEMMA2 = Family("model.layers", _SANDWICH, _outside("model.embed_tokens", "model.norm"))
_GEMMA3_VISION = Family(
    "model.language_model.layers",
    _SANDWICH,
    _outside("model.language_model.embed_tokens", "model.language_model.norm"),
)

# Norms after each sublayer only: the sublayers read the residual stream itself.
_OLMO2 = Family(
    "model.layers",
    {
        **_STREAM,
        **_both("ln1_post", "post_attention_layernorm"),
        **_both("ln2_post", "post_feedforward_layernorm"),
        "hook_resid_mid": HookPoint("mlp", "in"),
        **_attention("self_attn", "o_proj", qkv=_QKV, returned="post_attention_layernorm"),
        **_gated(returned="post_feedforward_layernorm"),
    },
    _outside("model.embed_tokens", "model.norm"),
)


def _neox_parts(config: Any) -> dict[str, ColumnRanges]:
    """Head by head, each head's q, k and v lie next to each other."""
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return {
        letter: tuple(
            ((3 * head + number) * size, (3 * head + number + 1) * size) for head in range(heads)
        )
        for number, letter in enumerate("qkv")
    }


def _gpt2_parts(config: Any) -> dict[str, ColumnRanges]:
    return {
        letter: ((number * config.n_embd, (number + 1) * config.n_embd),)
        for number, letter in enumerate("qkv")
    }


def _phi3_parts(config: Any) -> dict[str, ColumnRanges]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv, inner = (
        config.num_attention_heads * size,
        config.num_key_value_heads * size,
        config.intermediate_size,
    )
    return {
        "q": ((0, q),),
        "k": ((q, q + kv),),
        "v": ((q + kv, q + 2 * kv),),
        "gate": ((0, inner),),
        "up": ((inner, 2 * inner),),
    }


# Attention and MLP read the same stream in parallel, so there is no point between them (Pythia's
# setting; GPT-NeoX can also be sequential, see `families`).
_NEOX = Family(
    "gpt_neox.layers",
    {
        **_STREAM,
        **_both("ln1", "input_layernorm"),
        **_both("ln2", "post_attention_layernorm"),
        **_attention("attention", "dense", fused="query_key_value"),
        **_plain("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    },
    _outside("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
    parts=_neox_parts,
)
_NEOX_SEQUENTIAL = Family(
    _NEOX.blocks,
    {**_NEOX.inside, "hook_resid_mid": HookPoint("post_attention_layernorm", "in")},
    _NEOX.outside,
    parts=_neox_parts,
)
_GPT2 = Family(
    "transformer.h",
    {
        **_STREAM,
        **_both("ln1", "ln_1"),
        **_both("ln2", "ln_2"),
        "hook_resid_mid": HookPoint("ln_2", "in"),
        **_attention("attn", "c_proj", fused="c_attn"),
        **_plain("mlp", "c_fc", "c_proj"),
    },
    {
        **_outside("transformer.wte", "transformer.ln_f"),
        "hook_pos_embed": HookPoint("transformer.wpe", "out"),
        "pos_embed.hook_out": HookPoint("transformer.wpe", "out"),
    },
    parts=_gpt2_parts,
)
_PHI = Family(
    "model.layers",
    {
        **_STREAM,
        **_both("ln1", "input_layernorm"),
        **_attention("self_attn", "dense", qkv=_QKV),
        **_plain("mlp", "fc1", "fc2"),
    },
    _outside("model.embed_tokens", "model.final_layernorm"),
)
_PHI3 = Family(
    "model.layers",
    {
        **_PRE_NORM,
        **_attention("self_attn", "o_proj", fused="qkv_proj"),
        **_gated(fused="gate_up_proj"),
    },
    _outside("model.embed_tokens", "model.norm"),
    parts=_phi3_parts,
)
_MOE = Family(
    "model.layers",
    {**_PRE_NORM, **_attention("self_attn", "o_proj", qkv=_QKV), **_experts("gate")},
    _outside("model.embed_tokens", "model.norm"),
    experts="mlp.experts",
)
_GPT_OSS = Family(
    _MOE.blocks,
    {**_PRE_NORM, **_attention("self_attn", "o_proj", qkv=_QKV), **_experts("router")},
    _MOE.outside,
    experts="mlp.experts",
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gemma3": _GEMMA3_VISION,
    "gpt_neox": _NEOX,
    "gpt2": _GPT2,
    "olmo": _LLAMA,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "phi": _PHI,
    "phi3": _PHI3,
    "mixtral": _MOE,
    "qwen3_moe": _MOE,
    "olmoe": _MOE,
    "gpt_oss": _GPT_OSS,
}


def family_of(config: Any) -> Family | None:
    """The family of a model's configuration, or ``None`` where only module paths can be used."""
    kind = getattr(config, "model_type", "")
    if kind == "gpt_neox" and not config.use_parallel_residual:
        return _NEOX_SEQUENTIAL
    return FAMILIES.get(kind)
