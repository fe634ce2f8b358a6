"""Activations and gradients of many sites in one pass, as a context manager over an untouched
model.

Plain PyTorch hooks; nothing is kept unless a consumer keeps it. Rules that make the numbers right:

* Rows are gathered inside the forward hook (gathering copies, so a later in-place kernel cannot
  overwrite them, and nothing else is cloned).
* A gradient is read by a hook on the *tensor*, never by a module backward hook: it fires exactly
  once and survives in-place operations (unless the tensor is a view; then the missing gradient is
  an error). The gradient with respect to an input is that of *this* module alone, also where
  several modules read the same tensor.
* Activations count only while the root model's forward runs. Under gradient checkpointing the
  modules inside a block run a second time during backward; that second run is not counted.
* Padding reaches no consumer, whatever mask or rule is given.
* A site that did not fire, fired twice in a pass, or got no gradient is an error, never an empty
  result.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.hooks.errors import CaptureError, compiled_module
from workbench.hooks.inputs import Reader
from workbench.hooks.sites import Site, causal_lm, refuse_compiled_parts, resolve
from workbench.hooks.tensors import first_input, private_view, replace_input, stream_of, unwrap
from workbench.hooks.threads import Owner
from workbench.hooks.tokens import Positions, pass_mask

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Rows(NamedTuple):
    """What a consumer receives: the selected vectors of one site in one pass.

    Attributes:
        values: detached activations or gradients, in the dtype the model computed them in: cast to
            float32 before any statistic.
        where: example, and position in the sequence, of every row.
        number: index of the pass inside the capture.
    """

    values: Float[Tensor, "rows width"]
    where: Int[Tensor, "rows 2"]
    number: int = 0


Consumer = Callable[[Site, Rows], None]
"""Any callable ``(site, rows)``. Where it also has ``begin(sites)`` and ``end(finished)``, those
are called at the edges of the capture; ``drop(number)``, if it is there, when a pass that has
delivered rows was refused or cut short.
"""


class Stop(Exception):  # noqa: N818 - not an error: it leaves a forward pass that has nothing more to show
    """Raised inside a forward pass once the deepest tapped site has fired."""


@dataclass(slots=True)
class _Selection:
    """The chosen positions of one pass, kept until its gradients have arrived."""

    number: int
    shape: tuple[int, int]
    index: Tensor  # [row] into the flattened (batch, position)
    where: Tensor
    per_device: dict[torch.device, Tensor] = field(default_factory=dict)
    delivered: set[Site] = field(default_factory=set)

    def on(self, device: torch.device) -> Tensor:
        if device not in self.per_device:
            self.per_device[device] = self.index.to(device)
        return self.per_device[device]


def check_sites(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise where a hook would never fire, fire for another place as well, or has no module to sit
    on.

    Raises:
        CaptureError: a site of another model; a module that is compiled, or that lies inside one
            (hooks that come after its first call are skipped in silence); a module that stands at
            two paths of the model.
    """
    paths: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    for site in sites:
        if site.path not in modules:
            refuse_compiled_parts(model)
            raise CaptureError(
                f"{site.name} lies at {site.path}, and this model has no such module; were the "
                "sites resolved on another model?"
            )
        same = paths[id(modules[site.path])]
        if len(same) > 1:
            raise CaptureError(
                f"{site.name} cannot be told apart: one module stands at "
                f"{' and at '.join(same[:3])}, so its hook fires for each of them"
            )
        steps = site.path.split(".")
        for depth in range(len(steps)):
            holder = ".".join(steps[:depth])
            if (
                getattr(modules[holder], "_compiled_call_impl", None) is not None
                or type(modules[holder]).__name__ == "OptimizedModule"
            ):
                raise compiled_module(holder, site.name)


class Capture:
    """Feed the rows of ``sites`` to the consumers while the caller runs passes of ``model``.

    >>> with Capture(model, "blocks.*.hook_resid_post", MomentsOf(), at=without_first) as capture:      # doctest: +SKIP
    ...     for batch in batches:
    ...         capture.forward(batch.inputs)          # no graph, no cache, stops after the last site

    Instead of :meth:`forward`, the caller may run any pass of the model, as part of any loss;
    gradient sites (``..._grad``, ``:grad_out``) deliver their rows during the caller's own
    ``backward``, and carry that loss's normalisation. Inside ``generate``, each step delivers its
    new positions, up to the end tokens that this ``generate`` was given. Where rows do not stay
    rows (beam search, assisted decoding) the pass is refused: run the finished sequences once
    instead. Parameters, ``requires_grad`` flags and train/eval mode are left alone.

    A capture sees the passes of the thread that entered it, and no others: two threads may capture
    one model at a time, each its own passes. Gradients of one model are not kept apart by PyTorch.

    Args:
        model: the root model whose forward is called inside the ``with``. A PEFT or
            ``DistributedDataParallel`` wrapper will do.
        sites: patterns (see :func:`hooks.sites.resolve`) or resolved sites.
        consumers: called as ``consumer(site, rows)`` as soon as the rows of a site are known.
        at: position rule of every pass; or call :meth:`at` before each pass.

    Raises:
        CaptureError: an unknown site, a compiled model; on leaving, a site that never fired or got
            no gradient.
    """  # noqa: E501

    def __init__(
        self,
        model: nn.Module,
        sites: str | Iterable[str] | Iterable[Site],
        *consumers: Consumer,
        at: Positions | None = None,
    ) -> None:
        if not consumers:
            raise CaptureError(
                "no consumer was given; e.g. Collect() keeps the rows in memory, MomentsOf() their "
                "mean and covariance"
            )
        requested = [sites] if isinstance(sites, str) else list(sites)
        named = [site for site in requested if isinstance(site, str)]
        self.model = model
        self.sites: tuple[Site, ...] = tuple(
            site for site in requested if isinstance(site, Site)
        ) + (resolve(model, named) if named or not requested else ())
        self.consumers = consumers
        self._reader = Reader(model)
        self._always = at
        self._next: Positions | None = None
        self._handles: list[RemovableHandle] = []
        self._selection: _Selection | None = None  # of the pass that runs, or ran last
        self._inside = False
        self._stop = False
        self._deferred = False  # gradients come in a recomputation
        self._pending = 0  # forward passes since the last gradient
        self._passes = 0
        self._cut = 0  # passes that ended before every site had fired
        self._missed: list[Site] = []
        self._fired: Counter[Site] = Counter()
        self._delivered: Counter[Site] = Counter()

    def at(self, positions: Bool[Tensor, "batch pos"] | Positions) -> None:
        """Select the positions of the next pass.

        Args:
            positions: a rule, or a mask; true rows reach the consumers, unless they are padding.

        Raises:
            CaptureError: a mask that is not boolean or not two-dimensional.
        """
        self._next = positions if isinstance(positions, Positions) else pass_mask(positions)

    def forward(self, inputs: Mapping[str, Any]) -> None:
        """One forward pass for the activations alone: no graph is built, no cache kept, and
        everything above the deepest site is skipped.

        Args:
            inputs: keyword arguments of the model's forward.

        Raises:
            CaptureError: one of the sites is a gradient, which needs a backward pass.
        """
        gradients = [site.name for site in self.sites if site.is_gradient]
        if gradients:
            raise CaptureError(
                f"{gradients[0]} is a gradient: run model(...) and backward() yourself inside the "
                "capture; forward() is for activations"
            )
        extra = {"use_cache": False} if hasattr(causal_lm(self.model)[1], "config") else {}
        self._stop = True
        try:
            with torch.no_grad():
                self.model(**{**extra, **inputs})
        except Stop:
            pass
        finally:
            self._stop = False

    def __enter__(self) -> Capture:
        self._owner = Owner()
        check_sites(self.model, self.sites)
        for consumer in self.consumers:
            if hasattr(consumer, "begin"):
                consumer.begin(self.sites)
        # Nothing below can fail: every module was looked up by check_sites.
        self._handles.append(self.model.register_forward_pre_hook(self._open, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._close, always_call=True))
        for site in self.sites:
            module = self.model.get_submodule(site.path)
            if site.is_input:
                self._handles.append(
                    module.register_forward_pre_hook(self._input_hook(site), with_kwargs=True)
                )
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(site)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        problem = (
            None if error is not None else self._problem()
        )  # the caller's own error matters more than ours
        with ExitStack() as stack:  # every consumer is told, also when the one before raises
            for consumer in reversed(self.consumers):
                if hasattr(consumer, "end"):
                    stack.callback(consumer.end, error is None and problem is None)
        if problem is not None:
            raise problem

    def _problem(self) -> CaptureError | None:
        if not self._passes and any(getattr(consumer, "passes", 0) for consumer in self.consumers):
            return None  # a store that was complete already
        if self._cut and not all(hasattr(consumer, "drop") for consumer in self.consumers):
            return CaptureError(
                f"{', '.join(site.name for site in self._missed[:3])} never ran in {self._cut} of "
                f"{self._cut + self._passes} passes, which were cut short after other sites had "
                "delivered their rows (an error that was caught, or another capture's forward() "
                "inside this one); run those batches again in a new capture"
            )
        silent = [site for site in self.sites if self._delivered[site] < max(self._passes, 1)]
        gradients = [site.name for site in silent if site.is_gradient]
        if gradients and self._passes:
            count = max(self._passes - self._delivered[site] for site in silent if site.is_gradient)
            return CaptureError(
                f"no gradient reached {len(gradients)} of {len(self.sites)} sites "
                f"({', '.join(gradients[:3])}) in {count} of {self._passes} passes: no backward "
                "ran, the loss does not depend on them, the parameters are frozen (use "
                "hooks.gradients_only), or an in-place kernel overwrote a view there (tap the "
                "next module's output)"
            )
        if silent:
            return CaptureError(
                f"{len(silent)} of {len(self.sites)} sites never ran inside a forward pass of the "
                f"model that was given ({', '.join(site.name for site in silent[:3])}); call "
                "that model itself, not one of its parts nor a compiled version of it"
            )
        return None

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._owner.works():
            return
        rule, self._next = self._next or self._always, None
        if rule is None:
            raise CaptureError(
                "which tokens count has no default: call capture.at(mask) before every forward "
                "pass, or give Capture a rule, e.g. at=hooks.real_tokens"
            )
        mask, offset = self._reader.choose(rule, args, kwargs)
        positions = mask.nonzero()
        index = positions[:, 0] * mask.shape[1] + positions[:, 1]
        if offset:
            positions = positions + torch.tensor([0, offset], device=positions.device)
        self._selection = _Selection(self._passes, (mask.shape[0], mask.shape[1]), index, positions)
        self._inside = True
        self._pending += 1
        self._fired.clear()

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._inside or not self._owner.works():
            return
        self._inside = False
        if output is None and len(self._fired) < len(
            self.sites
        ):  # the forward raised; its own error matters more than ours, unless the caller goes on
            if self._fired:
                self._cut += 1
                self._missed = [site for site in self.sites if site not in self._fired]
                self._drop()
            return
        self._passes += 1
        for site in self.sites:
            if site not in self._fired:
                self._drop()
                raise CaptureError(
                    f"{site.name} never ran in one forward pass; was {site.path} replaced by a "
                    "fused kernel, or skipped?"
                )

    def _drop(self) -> None:
        for consumer in self.consumers:
            if hasattr(consumer, "drop") and self._selection is not None:
                consumer.drop(self._selection.number)

    def _rows(self, site: Site, tensor: Tensor, selection: _Selection) -> Rows:
        tensor, (batch, length) = site.part(tensor.detach()), selection.shape
        index = selection.on(tensor.device)
        if tensor.ndim == 3 and tensor.shape[:2] == (batch, length):
            flat = tensor.reshape(batch * length, -1)
        elif tensor.ndim == 2 and tensor.shape[0] == batch * length:
            flat = tensor  # routers of mixture-of-experts layers flatten the batch
        elif tensor.ndim == 3 and tensor.shape[:2] == (1, length) and not site.is_gradient:
            flat, index = (
                tensor[0],
                index % length,
            )  # position embeddings are the same for every example
        else:
            raise CaptureError(
                f"{site.name} produced a tensor of shape {list(tensor.shape)} but the mask selects "
                f"from {[batch, length]} (batch, position); only [batch, position, width] can be "
                "captured, and a mask belongs to one pass"
            )
        return Rows(flat.index_select(0, index), selection.where, selection.number)

    def _give(self, site: Site, tensor: Tensor, selection: _Selection) -> None:
        if site in selection.delivered:
            raise CaptureError(
                f"{site.name}: a second gradient arrived for pass {selection.number}, so backward "
                "ran twice through it; add the losses up and run it once"
            )
        selection.delivered.add(site)
        self._delivered[site] += 1
        rows = self._rows(site, tensor, selection)
        for consumer in self.consumers:
            consumer(site, rows)

    def _take(self, site: Site, tensor: Tensor) -> None:
        selection = self._selection
        if selection is None or not self._owner.works():
            # another thread's pass, or outside every pass of the root model: a call of one of its
            # parts does not count
            return
        if self._inside:
            self._fired[site] += 1
            if self._fired[site] > 1:
                self._drop()
                raise CaptureError(
                    f"{site.name} ran {self._fired[site]} times in one forward pass; is "
                    f"{site.path} shared between layers?"
                )
            if not site.is_gradient:
                self._give(site, tensor, selection)
                if self._stop and len(self._fired) == len(self.sites):
                    raise Stop
        if site.is_gradient:
            self._await_gradient(site, tensor, selection)

    def _await_gradient(self, site: Site, tensor: Tensor, selection: _Selection) -> None:
        if not torch.is_grad_enabled() and self._inside:
            self._deferred = True
            return  # reentrant checkpointing's first pass; the recomputation carries the gradient
        if not self._inside and not self._deferred:
            # the recomputation of non-reentrant checkpointing; the first pass carries the gradient
            return
        if not self._inside and self._pending > 1:
            raise CaptureError(
                f"{site.name}: {self._pending} forward passes ran before one backward under "
                "gradient checkpointing, so a recomputed row cannot be told from another pass's; "
                "run backward after every forward, or switch checkpointing off"
            )
        if not tensor.requires_grad:
            raise CaptureError(
                f"{site.name}: the tensor carries no gradient, since nothing before it is "
                "trainable; use hooks.gradients_only(model)"
            )
        capture = weakref.ref(self)  # a graph that outlives the capture must not keep it

        def receive(gradient: Tensor) -> None:
            live_capture = capture()
            if live_capture is not None and live_capture._handles:
                live_capture._pending = 0
                live_capture._give(site, gradient, selection)

        tensor.register_hook(receive)

    def _input_hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensor = first_input(args, kwargs)
            if site.side == "in" or site.stream:
                self._take(site, stream_of(tensor) if site.stream else tensor)
                return None
            # So that readers of the same tensor do not add their gradients.
            private = private_view(tensor, tensor, copy=getattr(module, "inplace", False))
            self._take(site, private)
            return replace_input(args, kwargs, private)

        return hook

    def _output_hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._take(site, unwrap(output))

        return hook
