"""Activations and output gradients of many sites in one pass, as a context manager over an untouched model.

Plain PyTorch hooks; nothing is kept unless a consumer keeps it. Rules that make the numbers right:

* Rows are gathered inside the forward hook (indexing copies), so a later in-place kernel cannot overwrite them.
* A gradient is read by a hook on the *tensor*, never by a module backward hook: it survives in-place operations and fires exactly once. The
  gradient with respect to an input is that of *this* module alone, also where several modules read the same tensor.
* Activations count only while the root model's forward runs. Under gradient checkpointing the modules inside a block run a second time during
  backward; that second run is not counted.
* A site that did not fire is an error, never an empty result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hooks.errors import CaptureError
from hooks.sites import Site, resolve


class Rows(NamedTuple):
    """What a consumer receives: the selected vectors of one site in one pass.

    Attributes:
        values: ``[row, width]`` detached activations or gradients, in the model's dtype.
        where: ``[row, 2]`` (example, position) of every row.
    """

    values: Tensor
    where: Tensor


Consumer = Callable[[Site, Rows], None]


def unwrap(value: Any) -> Tensor:
    """The tensor inside a module's output: the output itself, or the first tensor of a tuple.

    Raises:
        CaptureError: there is no tensor inside.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        for part in value:
            if isinstance(part, Tensor):
                return part
    raise CaptureError(f"a module returned {type(value).__name__}, which holds no tensor at its first level; tap one of its submodules instead")


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a module was called with, positionally or as ``hidden_states=``.

    Raises:
        CaptureError: the module was called with neither.
    """
    if args and isinstance(args[0], Tensor):
        return args[0]
    for name in ("hidden_states", "input", "x"):
        if isinstance(kwargs.get(name), Tensor):
            return kwargs[name]
    raise CaptureError(f"a module was called without a tensor (keywords: {', '.join(kwargs) or 'none'}); tap its output, or a submodule")


def _replace_input(args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args and isinstance(args[0], Tensor):
        return (tensor, *args[1:]), kwargs
    name = next(name for name in ("hidden_states", "input", "x") if isinstance(kwargs.get(name), Tensor))
    return args, {**kwargs, name: tensor}


class Capture:
    """Feed the rows of ``sites`` to ``consumer`` while the caller runs passes of ``model``.

    >>> with Capture(model, "blocks.*.hook_resid_post", moments) as capture:      # doctest: +SKIP
    ...     for batch in batches:
    ...         capture.at(batch.content_mask)
    ...         model(**batch.inputs)

    Gradient sites (``..._grad``, ``:grad_out``) deliver their rows during the caller's own ``backward``.

    Args:
        model: the root model whose forward is called inside the ``with``.
        sites: patterns (see :func:`hooks.sites.resolve`) or resolved sites.
        consumer: called as ``consumer(site, rows)`` as soon as the rows of a site are known.
    """

    def __init__(self, model: nn.Module, sites: str | Iterable[str] | Iterable[Site], consumer: Consumer) -> None:
        given = [sites] if isinstance(sites, str) else list(sites)
        named = [site for site in given if isinstance(site, str)]
        self.model = model
        self.sites: tuple[Site, ...] = tuple(site for site in given if isinstance(site, Site)) + (resolve(model, named) if named else ())
        self.consumer = consumer
        self._handles: list[RemovableHandle] = []
        self._mask: Tensor | None = None  # for the next pass
        self._pass_mask: Tensor | None = None  # of the pass that runs, or ran last
        self._inside = False
        self._deferred = False  # gradients come in a recomputation
        self._pending = 0  # forward passes since the last gradient
        self._fired: Counter[Site] = Counter()
        self._delivered: Counter[Site] = Counter()

    def at(self, mask: Tensor) -> None:
        """Select the positions of the next pass.

        Args:
            mask: ``[batch, position]`` boolean; true rows reach the consumer.
        """
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise CaptureError(f"the position mask must be a boolean [batch, position] tensor; got {mask.dtype} with shape {list(mask.shape)}")
        self._mask = mask

    def __enter__(self) -> Capture:
        if getattr(self.model, "_compiled_call_impl", None) is not None or type(self.model).__name__ == "OptimizedModule":
            raise CaptureError("the model is compiled: hooks added after compilation never fire. Capture the original module, then compile")
        self._handles.append(self.model.register_forward_pre_hook(self._open))
        self._handles.append(self.model.register_forward_hook(self._close, always_call=True))
        for site in self.sites:
            module = self.model.get_submodule(site.path)
            if site.side in ("in", "grad_in"):
                self._handles.append(module.register_forward_pre_hook(self._input_hook(site), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(site)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if error is not None:
            return  # the caller's own error matters more than ours
        silent = [site.name for site in self.sites if not self._delivered[site]]
        gradients = [name for name in silent if any(site.name == name and site.side.startswith("grad") for site in self.sites)]
        if gradients:
            raise CaptureError(
                f"no gradient reached {len(gradients)} of {len(self.sites)} sites ({', '.join(gradients[:3])}): no backward ran, the loss does not depend on them, or "
                "the parameters are frozen (use hooks.gradients_only)"
            )
        if silent:
            raise CaptureError(
                f"{len(silent)} of {len(self.sites)} sites never ran inside a forward pass of the model that was given ({', '.join(silent[:3])}); call that model itself, "
                "not one of its parts, and let the pass go as far as the site"
            )

    def _open(self, module: nn.Module, args: Any) -> None:
        if self._mask is None:
            raise CaptureError("call capture.at(mask) before every forward pass: which tokens count has no default")
        self._inside = True
        self._pass_mask, self._mask = self._mask, None
        self._pending += 1
        self._fired.clear()

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = False
        if output is None:  # the forward raised; its own error matters more than ours
            return
        for site in self.sites:
            if self._fired[site] != 1:
                seen = "never ran" if not self._fired[site] else f"ran {self._fired[site]} times"
                raise CaptureError(f"{site.name} {seen} in one forward pass; was {site.path} replaced by a fused kernel, skipped, or shared between layers?")

    def _rows(self, site: Site, tensor: Tensor, mask: Tensor) -> Rows:
        if tensor.ndim != 3 or tensor.shape[:2] != mask.shape:
            raise CaptureError(
                f"{site.name} produced a tensor of shape {list(tensor.shape)} but the mask selects from {list(mask.shape)}; "
                "give one mask per pass, and capture a finished sequence instead of generate()"
            )
        mask = mask.to(tensor.device)
        return Rows(tensor.detach()[mask], mask.nonzero())

    def _take(self, site: Site, tensor: Tensor) -> None:
        mask = self._pass_mask
        if mask is None:
            return  # outside every pass of the root model: a call of one of its parts does not count
        if self._inside:
            self._fired[site] += 1
            if not site.side.startswith("grad"):
                self._delivered[site] += 1
                self.consumer(site, self._rows(site, tensor, mask))
        if site.side.startswith("grad"):
            if not torch.is_grad_enabled() and self._inside:
                self._deferred = True
                return  # reentrant checkpointing's first pass; the recomputation carries the gradient
            if not self._inside and not self._deferred:
                return  # the recomputation of non-reentrant checkpointing; the first pass carries the gradient
            if not self._inside and self._pending > 1:
                raise CaptureError(
                    f"{site.name}: {self._pending} forward passes ran before one backward under gradient checkpointing, so a recomputed row cannot be told from "
                    "another pass's; run backward after every forward, or switch checkpointing off"
                )
            if not tensor.requires_grad:
                raise CaptureError(f"{site.name}: the tensor carries no gradient, since nothing before it is trainable; use hooks.gradients_only(model)")

            def receive(gradient: Tensor) -> None:
                self._delivered[site] += 1
                self._pending = 0
                self.consumer(site, self._rows(site, gradient, mask))

            tensor.register_hook(receive)

    def _input_hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensor = first_input(args, kwargs)
            if site.side == "in":
                self._take(site, tensor)
                return None
            if site.stream:
                self._take(site, tensor)
                return None
            private = tensor.view_as(tensor)  # so that readers of the same tensor do not add their gradients
            self._take(site, private)
            return _replace_input(args, kwargs, private)

        return hook

    def _output_hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._take(site, unwrap(output))

        return hook


class _Stop(Exception):  # noqa: N818
    """Raised by :func:`tapped` once the deepest site has fired."""


def tapped(model: nn.Module, sites: Iterable[Site], inputs: dict[str, Tensor], *, stop: bool = True) -> dict[str, Tensor]:
    """One forward pass; the *live* tensors of ``sites`` (with their graph), whole and unmasked.

    This is for loss terms that act on activations. Statistics use :class:`Capture`.

    Args:
        model: any module.
        sites: activation sites (``in`` or ``out``).
        inputs: keyword arguments of the forward pass.
        stop: leave the forward as soon as every site has fired; blocks above cost nothing.

    Returns:
        ``{site name: [batch, position, width]}``.

    Raises:
        CaptureError: a site did not fire.
    """
    wanted = tuple(sites)
    found: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def keep(site: Site, tensor: Tensor) -> None:
        found[site.name] = tensor
        if stop and len(found) == len(wanted):
            raise _Stop

    for site in wanted:
        module = model.get_submodule(site.path)
        if site.side == "in":
            handles.append(module.register_forward_pre_hook(lambda _m, args, kwargs, site=site: keep(site, first_input(args, kwargs)), with_kwargs=True))
        elif site.side == "out":
            handles.append(module.register_forward_hook(lambda _m, _a, output, site=site: keep(site, unwrap(output))))
        else:
            raise CaptureError(f"{site.name} is a gradient; tapped() returns activations, use Capture")
    try:
        model(**inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    frozen = [name for name, tensor in found.items() if not tensor.requires_grad]
    if frozen and torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False) and any(p.requires_grad for p in model.parameters()):
        raise CaptureError(
            f"{frozen[0]} carries no graph: reentrant gradient checkpointing hides it; use gradient_checkpointing_kwargs={{'use_reentrant': False}}"
        )
    missing = [site.name for site in wanted if site.name not in found]
    if missing:
        raise CaptureError(f"{', '.join(missing)} never ran in the forward pass; was the module replaced by a fused kernel?")
    return found


@contextmanager
def gradients_only(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter and root the graph at the embedding output, so that a pass yields output gradients and no weight gradients.

    Measured at about 0.7 of a training step. The ``requires_grad`` flags are put back as they were found.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    embedding = model.get_input_embeddings()  # type: ignore[operator]

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
