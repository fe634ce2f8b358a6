"""Change what flows through a model, as a context manager: steer, add noise, project out or keep a
subspace, ablate to a mean, patch from another run or model.

>>> with edit(base, patch(unlearned, inputs, "blocks.5.hook_resid_post")):      # doctest: +SKIP
...     logits = base(**inputs).logits                                          # the base model, with the unlearned model's stream after block 5

Edits are ordinary differentiable functions of a site's tensor, so gradients pass through them.
Several functions at one site run in the order given; nested edits and captures see the tensor in
the order in which their ``with`` blocks were entered (a capture inside an edit sees what the edit
left). Everything is removed on exit.
"""  # noqa: E501

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.hooks.capture import check_sites
from workbench.hooks.errors import CaptureError
from workbench.hooks.inputs import Reader
from workbench.hooks.passes import checkpointed, peek
from workbench.hooks.sites import Site, resolve
from workbench.hooks.tensors import (
    first_input,
    private_view,
    replace_input,
    replace_output,
    stream_of,
    unwrap,
)
from workbench.hooks.threads import Owner
from workbench.hooks.tokens import Positions

Change = Callable[[Float[Tensor, "batch pos width"]], Float[Tensor, "batch pos width"]]
"""A function of a site's tensor that returns one of the same shape, dtype and device."""


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better: results are rounded to the model's dtype once, at the end."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def steer(vector: Float[Tensor, " width"], scale: float = 1.0) -> Change:
    """Add ``scale * vector`` at every position."""
    return lambda tensor: (_wide(tensor) + scale * _wide(vector).to(tensor.device)).to(tensor.dtype)


def ablate_to_mean(mean: Float[Tensor, " width"]) -> Change:
    """Put ``mean`` (for example :attr:`hooks.Moments.mean`) in the place of every vector."""
    return lambda tensor: mean.to(tensor).expand_as(tensor)


def _orthonormal(basis: Tensor) -> Tensor:
    basis = _wide(basis)
    error = (
        float((basis.T @ basis - torch.eye(basis.shape[1], device=basis.device)).abs().max())
        if basis.ndim == 2 and basis.shape[1]
        else 0.0
    )
    if basis.ndim != 2 or not error <= 1e-3:
        raise CaptureError(
            "a basis must be [width, rank] with orthonormal columns; got shape "
            f"{list(basis.shape)}, largest deviation of Q^T Q from the identity {error:.2g}"
        )
    return basis


def project_out(
    basis: Float[Tensor, "width rank"], mean: Float[Tensor, " width"] | None = None
) -> Change:
    """``x - Q Q^T (x - mean)``: remove a subspace.

    Args:
        basis: orthonormal columns.
        mean: the point the subspace passes through (the origin by default).

    Raises:
        CaptureError: the columns are not orthonormal.
    """
    basis = _orthonormal(basis)

    def change(tensor: Tensor) -> Tensor:
        wide = _wide(tensor)
        q = basis.to(wide)
        centred = wide if mean is None else wide - mean.to(wide)
        with torch.autocast(
            tensor.device.type, enabled=False
        ):  # a product in bf16 would leave a hundredth of the subspace there
            return (wide - (centred @ q) @ q.T).to(tensor.dtype)

    return change


def keep_only(
    basis: Float[Tensor, "width rank"], mean: Float[Tensor, " width"] | None = None
) -> Change:
    """``mean + Q Q^T (x - mean)``: keep a subspace and remove everything else. Arguments and errors
    as for :func:`project_out`.
    """
    basis = _orthonormal(basis)

    def change(tensor: Tensor) -> Tensor:
        wide = _wide(tensor)
        q = basis.to(wide)
        point = wide.new_zeros(()) if mean is None else mean.to(wide)
        with torch.autocast(
            tensor.device.type, enabled=False
        ):  # a product in bf16 would leave a hundredth of the subspace there
            return (point + ((wide - point) @ q) @ q.T).to(tensor.dtype)

    return change


@dataclass(frozen=True, slots=True)
class _Noise:
    """Gaussian noise that depends on the seed, the site and the pass alone, so that a recomputed
    block (gradient checkpointing) sees the same noise.
    """

    std: float
    seed: int

    def __call__(self, tensor: Tensor, site: str = "", number: int = 0) -> Tensor:
        generator = torch.Generator(tensor.device).manual_seed(
            zlib.crc32(f"{self.seed}/{site}/{number}".encode())
        )
        noise = torch.randn(
            tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32
        )
        return (_wide(tensor) + self.std * noise).to(tensor.dtype)


def add_noise(std: float, seed: int = 0) -> Change:
    """Add independent Gaussian noise of standard deviation ``std`` to every coordinate; the same
    seed gives the same noise, and every pass its own.

    Raises:
        CaptureError: ``std`` is negative.
    """
    if not 0 <= std < float("inf"):
        raise CaptureError(f"std must be finite and not negative; got {std}")
    return _Noise(std, seed)


def replace(values: Float[Tensor, "batch pos width"]) -> Change:
    """Put ``values`` in the place of the site's tensor, for example from :func:`hooks.peek`."""

    def change(tensor: Tensor) -> Tensor:
        if values.shape != tensor.shape:
            raise CaptureError(
                f"the patch has shape {list(values.shape)}, but the tensor there has "
                f"{list(tensor.shape)}"
            )
        return values.to(tensor)

    return change


def patch(
    source: nn.Module, inputs: Mapping[str, Any], sites: str | Iterable[str]
) -> dict[str, Change]:
    """Edits that put the activations of ``source`` on ``inputs`` into another model: the argument
    of :func:`edit`.

    Args:
        source: the model to take the activations from (the same model with other inputs is an
            ordinary activation patch).
        inputs: keyword arguments of its forward.
        sites: patterns of activation sites; both models must have them, with the same width.
    """
    return {name: replace(values) for name, values in peek(source, inputs, sites).items()}


@contextmanager
def edit(
    model: nn.Module, changes: Mapping[str, Change | Iterable[Change]], at: Positions | None = None
) -> Iterator[None]:
    """Apply ``changes`` to the activations of ``model`` while the ``with`` block lasts.

    An edit at ``hook_resid_mid`` changes the residual stream itself, so the skip connection carries
    it on (in TransformerLens 4 only the MLP would see it).

    Passes of the thread that entered the block are edited, and no others.

    Args:
        model: the root model whose forward is called inside the ``with``.
        changes: pattern of activation sites -> a function ``[batch pos width] -> the same``, or
            several in their order.
        at: change only the positions of this rule; all of them by default. Padding is never changed
            under a rule.

    Raises:
        CaptureError: a site that does not exist, is a gradient, lies in a compiled module, never
            ran, or whose function failed or returned another shape, dtype or device.
    """
    planned: list[tuple[Site, tuple[Change, ...]]] = []
    for pattern, change in changes.items():
        functions = tuple(change) if isinstance(change, Iterable) else (change,)
        planned += [(site, functions) for site in resolve(model, pattern)]
    if not planned:
        raise CaptureError(
            "no edit was given; e.g. edit(model, {'blocks.3.hook_resid_post': steer(vector)})"
        )
    for site, _ in planned:
        if site.is_gradient:
            raise CaptureError(
                f"{site.name} is a gradient; edits change activations, and gradients follow"
            )
    check_sites(model, [site for site, _ in planned])
    state = _State(Reader(model), at, [site for site, _ in planned])
    handles: list[RemovableHandle] = [
        model.register_forward_pre_hook(state.open, with_kwargs=True),
        model.register_forward_hook(state.close, always_call=True),
    ]
    try:
        for site, functions in planned:
            module = model.get_submodule(site.path)
            if site.is_input:
                handles.append(
                    module.register_forward_pre_hook(
                        _input_hook(site, functions, state), with_kwargs=True
                    )
                )
            else:
                handles.append(module.register_forward_hook(_output_hook(site, functions, state)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if state.awaiting and not state.recomputed:
        raise CaptureError(
            "under gradient checkpointing the blocks run again during backward, and outside the "
            "edit they would run unedited: call backward inside the with block, or run the "
            "forward under torch.no_grad()"
        )
    silent = [site.name for site, _ in planned if site.name not in state.seen]
    if silent:
        raise CaptureError(
            f"{', '.join(silent)} never ran while the edit was in place, so nothing was changed "
            "there; call the model inside the with block"
        )


class _State:
    """What the hooks of one ``edit`` share: the number of the pass, its chosen positions, the sites
    that ran, and the passes whose blocks backward will run again.
    """

    def __init__(self, reader: Reader, at: Positions | None, sites: list[Site]) -> None:
        self.reader, self.at = reader, at
        self.within = any(
            site.layer >= 0 and not site.of_block for site in sites
        )  # inside a block, not at its edge
        self.owner = Owner()
        self.number, self.inside = -1, False
        self.awaiting, self.recomputed = 0, False
        self.mask: Tensor | None = None
        self.seen: set[str] = set()

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.owner.works():
            return
        self.number += 1
        self.inside = True
        if self.recomputed:
            self.awaiting, self.recomputed = 0, False
        self.awaiting += (
            self.within and module.training and torch.is_grad_enabled() and checkpointed(module)
        )
        self.mask = None if self.at is None else self.reader.choose(self.at, args, kwargs)[0]

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.owner.works():
            self.inside = False

    def note(self, site: Site) -> None:
        self.seen.add(site.name)
        if self.inside:
            return
        if self.awaiting > 1:
            raise CaptureError(
                f"{site.name}: {self.awaiting} edited passes ran before one backward under "
                "gradient checkpointing, so a recomputed block cannot tell which pass it "
                "belongs to; run backward after every forward, or switch checkpointing off"
            )
        self.recomputed = True


def _apply(site: Site, functions: tuple[Change, ...], tensor: Tensor, state: _State) -> Tensor:
    state.note(site)
    before = part = site.part(tensor)
    for place, function in enumerate(functions):
        try:
            after = (
                function(part, f"{site.name}/{place}", state.number)
                if isinstance(function, _Noise)
                else function(part)
            )
        except (RuntimeError, ValueError, IndexError) as error:
            raise CaptureError(
                f"the edit at {site.name} failed on a tensor of shape {list(part.shape)}, "
                f"{part.dtype}, {part.device}: {error}"
            ) from error
        if not isinstance(after, Tensor) or (after.shape, after.dtype, after.device) != (
            part.shape,
            part.dtype,
            part.device,
        ):
            returned = (
                f"shape {list(after.shape)}, {after.dtype}, {after.device}"
                if isinstance(after, Tensor)
                else type(after).__name__
            )
            raise CaptureError(
                f"the edit at {site.name} must return shape {list(part.shape)}, {part.dtype}, "
                f"{part.device}; it returned {returned}"
            )
        part = after
    if state.mask is not None:
        if before.shape[:2] != state.mask.shape:
            raise CaptureError(
                f"the edit at {site.name} is limited to {state.at.name if state.at else ''}, but "
                f"the tensor there has shape {list(before.shape)}"
            )
        part = torch.where(state.mask.to(before.device)[..., None], part, before)
    if not site.columns:
        return part
    edited, start = tensor.clone(), 0
    for low, high in site.columns:
        edited[..., low:high] = part[..., start : start + high - low]
        start += high - low
    return edited


def _input_hook(site: Site, functions: tuple[Change, ...], state: _State) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not state.owner.works():
            return None
        tensor = first_input(args, kwargs)
        if site.of_block:  # what enters a block is the stream from there on
            return replace_input(args, kwargs, _apply(site, functions, tensor, state))
        if not site.stream:
            return replace_input(
                args, kwargs, private_view(_apply(site, functions, tensor, state), tensor)
            )
        # In place, since the skip connection holds the same tensor; from a copy, since the
        # functions may have kept what they read for the backward pass.
        stream = stream_of(tensor)
        stream.copy_(_apply(site, functions, stream.clone(), state))
        return None

    return hook


def _output_hook(site: Site, functions: tuple[Change, ...], state: _State) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not state.owner.works():
            return None
        return replace_output(output, _apply(site, functions, unwrap(output), state))

    return hook
