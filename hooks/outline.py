"""The sites of an architecture with the width of their vectors, found without loading a weight."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from workbench.hooks.errors import CaptureError
from workbench.hooks.families import HookPoint
from workbench.hooks.sites import Site, all_sites, family
from workbench.hooks.tensors import first_input, unwrap


def outline(config: Any) -> list[tuple[Site, int]]:
    """Every site of the architecture that ``config`` describes, with its width.

    A model without storage (PyTorch's ``meta`` device) is run once on two tokens, so the widths are
    those of real tensors, not of a formula per family.

    Args:
        config: a Hugging Face configuration of a causal LM.

    Returns:
        ``(site, width)`` in the order of :func:`hooks.all_sites`; by module path where the family
        has no TransformerLens names here.

    Raises:
        CaptureError: the architecture cannot be run without weights.
    """
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    except (ValueError, TypeError, AttributeError) as error:
        raise CaptureError(
            f"{getattr(config, 'model_type', config)} is no causal LM that transformers can build: "
            f"{str(error).splitlines()[0][:200]}"
        ) from error
    model_family = family(model)
    if model_family is not None and model_family.experts:
        for path, module in model.named_modules():
            if path.endswith(f".{model_family.experts}"):
                # which rows go to which expert depends on values, and there are none; what comes
                # back has the shape of what went in
                module.forward = _same
    sites = (
        all_sites(model)
        if model_family is not None
        else [
            Site(f"{path}:{place.side}", path, place.side)
            for path, module in model.named_modules()
            if path
            for place in (HookPoint(path, "in"), HookPoint(path, "out"))
        ]
    )
    widths = _widths(model, sites)
    return [(site, widths[site.name]) for site in sites if site.name in widths]


def _same(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _widths(model: nn.Module, sites: list[Site]) -> dict[str, int]:
    widths: dict[str, int] = {}

    def note(site: Site, tensor: torch.Tensor) -> None:
        if tensor.is_floating_point() and tensor.ndim in (2, 3):
            widths[site.name] = site.part(tensor).shape[-1]

    def listen_in(_module: nn.Module, args: Any, kwargs: Any, site: Site) -> None:
        with contextlib.suppress(CaptureError):
            note(site, first_input(args, kwargs))

    def listen_out(_module: nn.Module, _args: Any, output: Any, site: Site) -> None:
        with contextlib.suppress(CaptureError):
            note(site, unwrap(output))

    for site in sites:
        module = model.get_submodule(site.path)
        if site.is_input:
            module.register_forward_pre_hook(
                lambda m, args, kwargs, site=site: listen_in(m, args, kwargs, site),
                with_kwargs=True,
            )
        else:
            module.register_forward_hook(
                lambda m, args, output, site=site: listen_out(m, args, output, site)
            )
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            # A four-dimensional mask is taken as it is; any other would be looked at, and there are
            # no values to see.
            model(
                input_ids=ids,
                attention_mask=torch.zeros(1, 1, 2, 2, device="meta"),
                use_cache=False,
            )
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise CaptureError(
            f"the widths of {kind!r} cannot be found without its weights: "
            f"{str(error).splitlines()[0][:200]}"
        ) from error
    return widths
