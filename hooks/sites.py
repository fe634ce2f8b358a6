"""Names of the places in a model that can be tapped.

A site is one stream of vectors: the input or the output of one module, or the gradient of the loss
with respect to either. It can be named in two ways, which mean the same:

* in TransformerLens's vocabulary: ``blocks.3.hook_resid_post``, ``blocks.*.mlp.hook_out``,
  ``blocks.{2..5}.mlp.out.hook_in``; a gradient takes the suffix ``_grad``, as in TransformerLens's
  cache;
* by the model's own module path and a side: ``model.layers.3.mlp.down_proj:in`` (``:out``,
  ``:grad_in``, ``:grad_out``).

Wrappers that hold a Hugging Face model somewhere inside (PEFT, ``DistributedDataParallel``) keep
both spellings: the wrapper's prefix may be left out.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, cat, nn

from workbench.hooks.errors import CaptureError, compiled_module, unknown_site
from workbench.hooks.families import FAMILIES, SIDES, ColumnRanges, Family, Side, family_of

if TYPE_CHECKING:
    from jaxtyping import Shaped


@dataclass(frozen=True, slots=True)
class Site:
    """One place to tap.

    Attributes:
        name: TransformerLens spelling where there is one, otherwise ``path:side``.
        path: path of the module inside the model.
        side: input, output, or the gradient with respect to the input or output.
        layer: index of the block, or -1 outside the blocks.
        stream: the tensor is a point of the residual stream that other modules read as well: its
            gradient is that of the whole stream, not that of the module at ``path`` alone
            (TransformerLens's bridge gives the latter at ``hook_resid_mid``, where it stands for
            the input of ``ln2``).
        columns: where the site is one part of a fused output (GPT-2's q, k and v), the half-open
            column intervals of that part; empty for the whole.
    """

    name: str
    path: str
    side: Side
    layer: int = -1
    stream: bool = False
    columns: ColumnRanges = ()

    @property
    def place(self) -> tuple[str, Side, bool, ColumnRanges]:
        """What is tapped, whatever it is called."""
        return self.path, self.side, self.stream, self.columns

    @property
    def of_block(self) -> bool:
        """Whether the module is a whole block."""
        return self.layer >= 0 and self.path.endswith(f".{self.layer}")

    @property
    def is_gradient(self) -> bool:
        """Whether the rows are gradients, which come with the backward pass."""
        return self.side.startswith("grad")

    @property
    def is_input(self) -> bool:
        """Whether the tensor is the module's input."""
        return self.side in ("in", "grad_in")

    def part(self, tensor: Shaped[Tensor, "... _width"]) -> Shaped[Tensor, "... _width"]:
        """The columns of this site in the module's tensor: a view where they are contiguous."""
        if not self.columns:
            return tensor
        pieces = [tensor[..., start:stop] for start, stop in self.columns]
        return pieces[0] if len(pieces) == 1 else cat(pieces, dim=-1)


def causal_lm(model: nn.Module) -> tuple[str, nn.Module]:
    """The model of a known family inside ``model`` and its path with a trailing dot (``""`` where
    it is ``model`` itself).

    A wrapper (PEFT, ``DistributedDataParallel``) may answer for the configuration of what it wraps,
    so the blocks must be there too.
    """
    for path, module in model.named_modules():
        model_family = family_of(getattr(module, "config", None))
        if model_family is not None and _has(module, model_family.blocks):
            return (f"{path}." if path else ""), module
    return "", model


def _has(module: nn.Module, path: str) -> bool:
    # Not get_submodule: a wrapper may answer for the attributes of what it wraps, but its hooks
    # would be looked up under another path. Nor named_modules: a loss asks in every step.
    for step in path.split("."):
        child = dict(module.named_children()).get(step)
        if child is None:
            return False
        module = child
    return True


def family(model: nn.Module) -> Family | None:
    """The family of ``model``, or ``None`` where only module paths can be used."""
    _, inner = causal_lm(model)
    known = family_of(getattr(inner, "config", None))
    return known if known is not None and _has(inner, known.blocks) else None


def _family_or_raise(model: nn.Module) -> Family:
    known = family(model)
    if known is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise CaptureError(
            f"architecture {kind!r} has no TransformerLens names here (known: "
            f"{', '.join(sorted(FAMILIES))}); name its modules by path, e.g. "
            "'transformer.h.0.mlp:out'"
        )
    return known


def layer_count(model: nn.Module) -> int:
    """Number of blocks of ``model``.

    Raises:
        CaptureError: the architecture is not in the table.
    """
    known = _family_or_raise(model)
    return sum(1 for _ in causal_lm(model)[1].get_submodule(known.blocks).children())


def all_sites(model: nn.Module) -> list[Site]:
    """Every site that has a TransformerLens name, activations only, outside the blocks first, then
    block by block.

    Raises:
        CaptureError: the architecture is not in the table, or a part of the model is compiled.
    """
    refuse_compiled_parts(model)
    model_family, count = _family_or_raise(model), layer_count(model)
    prefix, inner = causal_lm(model)
    parts = model_family.parts(inner.config)  # type: ignore[arg-type]
    sites = [
        Site(name, prefix + place.path, place.side) for name, place in model_family.outside.items()
    ]
    for layer in range(count):
        for name, place in model_family.inside.items():
            path = f"{prefix}{model_family.blocks}.{layer}" + (
                f".{place.path}" if place.path else ""
            )
            sites.append(
                Site(
                    f"blocks.{layer}.{name}",
                    path,
                    place.side,
                    layer,
                    name.startswith("hook_resid"),
                    parts.get(place.part, ()),
                )
            )
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return [site for site in sites if site.path in modules]


def refuse_compiled_parts(model: nn.Module) -> None:
    """Raise if ``torch.compile`` has put a wrapper anywhere into ``model``: it hides the modules
    behind it from their paths.

    Raises:
        CaptureError: there is one.
    """
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise compiled_module(path, "its sites")


def _expand_ranges(pattern: str) -> list[str]:
    """``blocks.{2..4}.x`` -> ``blocks.2.x``, ``blocks.3.x``, ``blocks.4.x``."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    low, high = int(match[1]), int(match[2])
    if low > high:
        raise CaptureError(
            f"empty layer range {match[0]} in {pattern!r}; write the lower layer first"
        )
    return [
        expanded
        for layer in range(low, high + 1)
        for expanded in _expand_ranges(
            pattern[: match.start()] + str(layer) + pattern[match.end() :]
        )
    ]


def _by_path(model: nn.Module, pattern: str, known: Family | None, prefix: str) -> list[Site]:
    path, _, side = pattern.rpartition(":")
    if side not in SIDES:
        raise CaptureError(
            f"unknown side {side!r} in {pattern!r}; choose one of {', '.join(SIDES)}"
        )
    if known is not None and known.experts and f".{known.experts}." in f"{path}.":
        inside = path.split(f"{known.experts}.", 1)
        if len(inside) == 2 and inside[1]:
            raise CaptureError(
                f"{pattern!r} lies inside the experts of a mixture-of-experts layer. They are one "
                "module with three-dimensional parameters, so no row of a single expert "
                "passes through a module. What can be tapped: the layer (blocks.3.mlp.hook_in, "
                "blocks.3.mlp.hook_out) and the router "
                f"({', '.join(name for name in known.inside if name.startswith('mlp.') and name.count('.') == 2)})"  # noqa: E501
            )
    modules = [name for name, _ in model.named_modules() if name]
    blocks = re.escape(prefix + known.blocks) if known else "(?!)"
    sites = []
    for name in fnmatch.filter(modules, path) or fnmatch.filter(modules, prefix + path):
        layer = re.match(blocks + r"\.(\d+)(\.|$)", name)
        sites.append(Site(f"{name}:{side}", name, side, int(layer[1]) if layer else -1))
    return sites


def _by_name(named: list[Site], pattern: str) -> list[Site]:
    stem, gradient = pattern.removesuffix("_grad"), pattern.endswith("_grad")
    sites = []
    for site in named:
        if fnmatch.fnmatchcase(site.name, stem):
            side: Side = ("grad_in" if site.is_input else "grad_out") if gradient else site.side
            sites.append(
                Site(
                    site.name + "_grad" * gradient,
                    site.path,
                    side,
                    site.layer,
                    site.stream and (gradient or site.name.endswith("hook_resid_mid")),
                    site.columns,
                )
            )
    return sites


def every_name(model: nn.Module, patterns: str | Iterable[str]) -> list[Site]:
    """Like :func:`resolve`, but a place that the patterns give two names (``hook_out`` and
    ``hook_resid_post``) comes twice.
    """
    wanted_patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted_patterns:
        raise CaptureError("no site was named; give at least one, e.g. 'blocks.*.hook_resid_post'")
    model_family, (prefix, _) = family(model), causal_lm(model)
    named: list[Site] = []
    matched_sites: list[Site] = []
    for pattern in wanted_patterns:
        before = len(matched_sites)
        for part in _expand_ranges(pattern):
            if ":" in part:
                matched_sites += _by_path(model, part, model_family, prefix)
            else:
                named = named or all_sites(model)
                matched_sites += _by_name(named, part)
        if len(matched_sites) == before:
            refuse_compiled_parts(model)
            paths = [
                f"{name}:{side}"
                for name, _ in model.named_modules()
                if name
                for side in ("in", "out")
            ]
            raise unknown_site(pattern, paths if ":" in pattern else [site.name for site in named])
    return matched_sites


def resolve(model: nn.Module, patterns: str | Iterable[str]) -> tuple[Site, ...]:
    """The sites that ``patterns`` name, in the order of the patterns and then of the model, each
    place once under the first name that fits.

    Args:
        model: any module; TransformerLens names need an architecture of
            :data:`hooks.families.FAMILIES`.
        patterns: one pattern or several. ``*`` and ``?`` are wildcards, ``{2..5}`` is a range of
            layers.

    Raises:
        CaptureError: a pattern names nothing; the message lists the nearest names.
    """
    places: dict[tuple[str, Side, bool, ColumnRanges], Site] = {}
    for site in every_name(model, patterns):
        places.setdefault(site.place, site)
    return tuple(places.values())
