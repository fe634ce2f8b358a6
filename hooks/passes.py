"""Whole passes: the live tensors of some sites, a look at them, and a pass for gradients alone."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.hooks.capture import Stop, check_sites
from workbench.hooks.errors import CaptureError
from workbench.hooks.inputs import Reader
from workbench.hooks.sites import Site, causal_lm, every_name
from workbench.hooks.tensors import first_input, unwrap

if TYPE_CHECKING:
    from jaxtyping import Float


def tapped(
    model: nn.Module, sites: Iterable[Site], inputs: Mapping[str, Any], *, stop: bool = True
) -> dict[str, Float[Tensor, "... _width"]]:
    """One forward pass; the *live* tensors of ``sites`` (with their graph), whole and unmasked.

    This is for loss terms that act on activations. Statistics use :class:`hooks.Capture`.

    Args:
        model: any module.
        sites: activation sites (``in`` or ``out``).
        inputs: keyword arguments of the forward pass.
        stop: leave the forward as soon as every site has fired; blocks above cost nothing.

    Returns:
        By site name, each of the shape that its module computes: ``[batch pos width]``; a router's
        is ``[rows width]``.

    Raises:
        CaptureError: a site did not fire, or is a gradient.
    """
    wanted_sites = tuple(sites)
    activations: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for site in wanted_sites:
        if site.is_gradient:
            raise CaptureError(
                f"{site.name} is a gradient; a forward pass has activations only, use Capture"
            )
    check_sites(model, wanted_sites)
    Reader(model).check(inputs)

    owner = threading.get_ident()

    def keep(site: Site, tensor: Tensor) -> None:
        if threading.get_ident() != owner:
            return
        activations[site.name] = site.part(tensor)
        if stop and len(activations) == len(wanted_sites):
            raise Stop

    for site in wanted_sites:
        module = model.get_submodule(site.path)
        if site.is_input:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, site=site: keep(site, first_input(args, kwargs)),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(
                module.register_forward_hook(
                    lambda _m, _a, output, site=site: keep(site, unwrap(output))
                )
            )
    # nobody reads the key-value cache, and filling it is a tenth of a short pass
    extra = {"use_cache": False} if hasattr(causal_lm(model)[1], "config") else {}
    try:
        model(**{**extra, **inputs})
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    frozen = [name for name, tensor in activations.items() if not tensor.requires_grad]
    if (
        frozen
        and torch.is_grad_enabled()
        and checkpointed(model)
        and any(p.requires_grad for p in model.parameters())
    ):
        raise CaptureError(
            f"{frozen[0]} carries no graph: reentrant gradient checkpointing hides it; use "
            f"gradient_checkpointing_kwargs={{'use_reentrant': False}}"
        )
    missing = [site.name for site in wanted_sites if site.name not in activations]
    if missing:
        raise CaptureError(
            f"{', '.join(missing)} never ran in the forward pass; was the module replaced by a "
            "fused kernel?"
        )
    return activations


def checkpointed(model: nn.Module) -> bool:
    """Whether gradient checkpointing is switched on somewhere in ``model``."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@torch.no_grad()
def peek(
    model: nn.Module, inputs: Mapping[str, Any], sites: str | Iterable[str]
) -> dict[str, Float[Tensor, "... _width"]]:
    """A look at some activations: one forward pass without a graph, whole tensors, padding
    included.

    For notebooks, for :func:`hooks.patch`, and for TransformerLens's ``ActivationCache``
    (:func:`hooks.as_cache`). Statistics use :class:`hooks.Capture`, which leaves padding out.

    Args:
        model: any module.
        inputs: keyword arguments of the forward pass.
        sites: patterns of activation sites.

    Returns:
        By site name, shaped as in :func:`tapped`, copies on the model's device, under every name
        that the patterns match.
    """
    names = every_name(model, sites)
    once = {site.place: site for site in reversed(names)}
    activations = tapped(model, once.values(), inputs)
    copies = {place: activations[site.name].clone() for place, site in once.items()}
    return {site.name: copies[site.place] for site in names}


@contextmanager
def gradients_only(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter and root the graph at the embedding output, so that a pass yields
    output gradients and no weight gradients.

    Measured at about 0.7 of a training step (``make bench``, ``gradients-only``). The
    ``requires_grad`` flags are put back as they were found.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    embedding = causal_lm(model)[1].get_input_embeddings()  # type: ignore[operator]

    def root(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    handle = embedding.register_forward_hook(root)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
