"""Names of the places in a model that can be tapped.

A site is one stream of vectors: the input or the output of one module, or the gradient of the loss with respect to either. It can be named
in two ways, which mean the same:

* in TransformerLens's vocabulary: ``blocks.3.hook_resid_post``, ``blocks.*.mlp.hook_out``, ``blocks.{2..5}.mlp.out.hook_in``;
  a gradient takes the suffix ``_grad``, as in TransformerLens's cache;
* by the model's own module path and a side: ``model.layers.3.mlp.down_proj:in`` (``:out``, ``:grad_in``, ``:grad_out``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from hooks.errors import CaptureError, unknown_site

Side = Literal["in", "out", "grad_in", "grad_out"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, slots=True)
class Site:
    """One place to tap.

    Attributes:
        name: TransformerLens spelling where there is one, otherwise ``path:side``.
        path: path of the module inside the model.
        side: input, output, or the gradient with respect to the input or output.
        layer: index of the block, or -1 outside the blocks.
        stream: the tensor is a point of the residual stream that other modules read as well: its gradient is that of the whole stream, as in TransformerLens, not
            that of the module at ``path`` alone.
    """

    name: str
    path: str
    side: Side
    layer: int = -1
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """Where TransformerLens's names live in one family of architectures.

    Attributes:
        blocks: path of the list of blocks.
        inside: TransformerLens name inside a block -> ``(path inside the block, side)``; an empty path is the block itself.
        outside: TransformerLens name outside the blocks -> ``(path, side)``.
    """

    blocks: str
    inside: dict[str, tuple[str, Side]]
    outside: dict[str, tuple[str, Side]]


def _both(name: str, path: str) -> dict[str, tuple[str, Side]]:
    return {f"{name}.hook_in": (path, "in"), f"{name}.hook_out": (path, "out")}


# Pre-norm decoders with q/k/v/o and gate/up/down projections. The names agree with TransformerLens's adapters.
_LLAMA = Family(
    blocks="model.layers",
    inside={
        "hook_in": ("", "in"),
        "hook_out": ("", "out"),
        "hook_resid_pre": ("", "in"),
        "hook_resid_mid": ("post_attention_layernorm", "in"),
        "hook_resid_post": ("", "out"),
        "hook_attn_out": ("self_attn", "out"),
        "hook_mlp_out": ("mlp", "out"),
        "attn.hook_z": ("self_attn.o_proj", "in"),
        "mlp.hook_pre": ("mlp.gate_proj", "out"),
        "mlp.hook_pre_linear": ("mlp.up_proj", "out"),
        "mlp.hook_post": ("mlp.down_proj", "in"),
        **_both("ln1", "input_layernorm"),
        **_both("attn", "self_attn"),
        **_both("attn.q", "self_attn.q_proj"),
        **_both("attn.k", "self_attn.k_proj"),
        **_both("attn.v", "self_attn.v_proj"),
        **_both("attn.o", "self_attn.o_proj"),
        **_both("ln2", "post_attention_layernorm"),
        **_both("mlp", "mlp"),
        **_both("mlp.gate", "mlp.gate_proj"),
        **_both("mlp.in", "mlp.up_proj"),
        **_both("mlp.out", "mlp.down_proj"),
    },
    outside={
        "hook_embed": ("model.embed_tokens", "out"),
        **_both("embed", "model.embed_tokens"),
        **_both("ln_final", "model.norm"),
        **_both("unembed", "lm_head"),
    },
)
FAMILIES: dict[str, Family] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


def family(model: nn.Module) -> Family | None:
    """The family of ``model``, or ``None`` where only module paths can be used."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def layer_count(model: nn.Module) -> int:
    """Number of blocks of ``model``.

    Raises:
        CaptureError: the architecture is not in the table.
    """
    known = family(model)
    if known is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise CaptureError(
            f"architecture {kind!r} has no TransformerLens names here (known: {', '.join(sorted(FAMILIES))}); name its modules by path, e.g. 'transformer.h.0.mlp:out'"
        )
    blocks = model.get_submodule(known.blocks)
    return sum(1 for _ in blocks.children())


def all_sites(model: nn.Module) -> list[Site]:
    """Every site that has a TransformerLens name, activations only, outside the blocks first, then block by block."""
    count = layer_count(model)
    known = family(model)
    assert known is not None
    sites = [Site(name, path, side) for name, (path, side) in known.outside.items()]
    for layer in range(count):
        for name, (path, side) in known.inside.items():
            full = f"{known.blocks}.{layer}" + (f".{path}" if path else "")
            sites.append(Site(f"blocks.{layer}.{name}", full, side, layer, stream=name.startswith("hook_resid")))
    modules = dict(model.named_modules())
    return [site for site in sites if site.path in modules]


def _expand_ranges(pattern: str) -> list[str]:
    """``blocks.{2..4}.x`` -> ``blocks.2.x``, ``blocks.3.x``, ``blocks.4.x``."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    low, high = int(found[1]), int(found[2])
    if low > high:
        raise CaptureError(f"empty layer range {found[0]} in {pattern!r}; write the lower layer first")
    return [expanded for layer in range(low, high + 1) for expanded in _expand_ranges(pattern[: found.start()] + str(layer) + pattern[found.end() :])]


def _layer_of(path: str, blocks: str | None) -> int:
    found = re.match(re.escape(blocks) + r"\.(\d+)(\.|$)", path) if blocks else None
    return int(found[1]) if found else -1


def resolve(model: nn.Module, patterns: str | Iterable[str]) -> tuple[Site, ...]:
    """The sites that ``patterns`` name, in the order of the patterns and then of the model, without repetition.

    Args:
        model: any module; TransformerLens names need an architecture of ``FAMILIES``.
        patterns: one pattern or several. ``*`` and ``?`` are wildcards, ``{2..5}`` is a range of layers.

    Raises:
        CaptureError: a pattern names nothing; the message lists the nearest names.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted:
        raise CaptureError("no site was named; give at least one, e.g. 'blocks.*.hook_resid_post'")
    known = family(model)
    modules = [name for name, _ in model.named_modules() if name]
    found: dict[tuple[str, Side, bool], Site] = {}
    for pattern in wanted:
        matched = False
        for part in _expand_ranges(pattern):
            if ":" in part:
                path, _, side = part.rpartition(":")
                if side not in SIDES:
                    raise CaptureError(f"unknown side {side!r} in {pattern!r}; choose one of {', '.join(SIDES)}")
                for name in fnmatch.filter(modules, path):
                    matched = True
                    found.setdefault((name, side, False), Site(f"{name}:{side}", name, side, _layer_of(name, known.blocks if known else None)))
                continue
            gradient = part.endswith("_grad")
            stem = part.removesuffix("_grad")
            for site in all_sites(model):
                if fnmatch.fnmatchcase(site.name, stem):
                    matched = True
                    target: Side = site.side
                    if gradient:
                        target = "grad_in" if site.side == "in" else "grad_out"
                    stream = site.stream and gradient
                    found.setdefault((site.path, target, stream), Site(site.name + ("_grad" if gradient else ""), site.path, target, site.layer, stream))
        if not matched:
            names = [f"{name}:{side}" for name in modules for side in ("in", "out")] if ":" in pattern else [site.name for site in all_sites(model)]
            raise unknown_site(pattern, names)
    return tuple(found.values())
