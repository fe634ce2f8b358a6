"""TransformerLens at the edge: a bridge around a copy of a model, and our activations in its cache.
Imported lazily; the import takes some seconds.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from workbench.hooks.errors import CaptureError

if TYPE_CHECKING:
    from jaxtyping import Float

# Sites whose last dimension TransformerLens splits into [head, size]; queries and outputs have
# n_heads, keys and values n_key_value_heads.
_PER_HEAD = {
    f"attn.{name}": heads
    for name, heads in (
        ("hook_q", "q"),
        ("hook_k", "kv"),
        ("hook_v", "kv"),
        ("hook_z", "q"),
        ("o.hook_in", "q"),
    )
} | {f"attn.{letter}.hook_out": heads for letter, heads in (("q", "q"), ("k", "kv"), ("v", "kv"))}


def as_bridge(model: nn.Module, tokenizer: Any = None) -> Any:
    """A TransformerLens ``TransformerBridge`` around a *copy* of ``model``, with eager attention so
    that patterns and scores can be read.

    Never around the model itself: the bridge rewrites the module tree of what it wraps (parameters
    change their names, ``save_pretrained`` fails, and where q, k and v are fused, an optimiser made
    earlier trains weights that nothing reads). The copy costs the model's memory once more, and
    does not follow later training.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: for the bridge's text functions (``to_tokens``, ``generate``); optional.

    Raises:
        CaptureError: TransformerLens is not installed, or does not know the architecture.
    """
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import (
            build_bridge_from_module,
        )  # the public door always asks for a tokenizer
    except ImportError as error:
        raise CaptureError(
            f"as_bridge needs transformer-lens 4 (pip install 'transformer-lens>=4'): {error}"
        ) from error
    twin = copy.deepcopy(model)
    config: Any = twin.config
    config.architectures = [
        type(model).__name__
    ]  # a model made from a configuration names none, and the bridge looks it up there
    if hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        return build_bridge_from_module(
            twin, type(model).__name__, hf_config=config, tokenizer=_reloaded(tokenizer)
        )
    except (KeyError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CaptureError(
            f"TransformerLens cannot wrap {type(model).__name__}: {reason}"
        ) from error


def _reloaded(tokenizer: Any) -> Any:
    """The tokenizer as if loaded from a folder: the bridge asks where it came from, which one made
    in memory cannot say.
    """
    if tokenizer is None or "name_or_path" in getattr(tokenizer, "init_kwargs", {}):
        return tokenizer
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return type(tokenizer).from_pretrained(folder)


def as_cache(values: Mapping[str, Float[Tensor, "... _width"]], bridge: Any) -> Any:
    """Our activations as a TransformerLens ``ActivationCache``, with its shapes: queries, keys,
    values and ``z`` are split by head.

    >>> cache = as_cache(peek(unlearned, inputs, "blocks.*.hook_*"), as_bridge(unlearned))      # doctest: +SKIP
    >>> cache["resid_post", 3].shape                                                            # doctest: +SKIP

    Args:
        values: name in TransformerLens's spelling -> ``[batch pos width]`` (:func:`hooks.peek`), or
            ``[rows width]`` collected rows of one text.
        bridge: the bridge whose weights the cache's methods use (:func:`as_bridge`).

    Raises:
        CaptureError: a name that is a module path, or a mixture of both shapes.
    """  # noqa: E501
    from transformer_lens import ActivationCache

    paths = [name for name in values if ":" in name]
    if paths:
        raise CaptureError(
            f"{paths[0]!r} is a module path; an ActivationCache has TransformerLens's names. "
            "workbench sites MODEL lists both"
        )
    dimensions = {
        tensor.ndim
        for name, tensor in values.items()
        if ".mlp.gate." not in name and ".mlp.router." not in name
    }  # routers flatten the batch
    if len(dimensions) > 1:
        raise CaptureError(
            "the values mix [batch, position, width] and [row, width]; make one cache of each"
        )
    config = bridge.cfg
    counts = {
        "q": config.n_heads,
        "kv": getattr(config, "n_key_value_heads", None) or config.n_heads,
    }
    batch = max((tensor.shape[0] for tensor in values.values() if tensor.ndim == 3), default=1)
    shaped = {}
    for name, tensor in values.items():
        if tensor.ndim == 3 and tensor.shape[0] == 1:
            tensor = tensor.expand(
                batch, -1, -1
            )  # position embeddings are computed once for the batch
        stem = name.removesuffix("_grad").split(".", 2)[-1]
        heads = counts.get(_PER_HEAD.get(stem, ""))
        shaped[name] = tensor if heads is None else tensor.unflatten(-1, (heads, -1))
    return ActivationCache(shaped, bridge, has_batch_dim=dimensions != {2})
