"""Quantisation as an attack: does rounding the weights bring back what unlearning took away? (Zhang
et al. 2024, arXiv 2410.16454)

Weight-only rounding to the nearest code, simulated: the weights are rounded and put back as
ordinary floating-point numbers, so that the copy runs wherever the model runs. The controls come
from the same function: the base and the never-learned model, quantised alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workbench.errors import WorkbenchError, unknown
from workbench.hooks.brief import brief

if TYPE_CHECKING:
    from jaxtyping import Float, Int8

QuantisationKind = Literal["absmax"]
"""How the step of a group of weights is chosen: ``absmax`` puts its largest weight on the last
code.
"""

GROUP = 64
"""Weights that share a step at 4 bits, where nothing else is said (the block of bitsandbytes; 128
is as common).
"""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Codes(NamedTuple):
    """A matrix, rounded.

    Attributes:
        codes: between -127 and 127 at 8 bits, -7 and 7 at 4.
        steps: distance of two neighbouring codes, in units of weight; float32 or better.
        values: code times step, in the dtype of the weights.
    """

    codes: Int8[Tensor, "... d_in"]
    steps: Float[Tensor, "... groups"]
    values: Float[Tensor, "... d_in"]


def absmax_codes(weight: Float[Tensor, "... d_in"], bits: int, group: int | None = None) -> Codes:
    r"""Round weights to symmetric integer codes, group by group along the last dimension.

    .. math:: c = \mathrm{round}(w / \Delta), \qquad Q(w) = \Delta\, c, \qquad \Delta = \max|w| / (2^{N-1} - 1)

    The quantisation function of arXiv 2410.16454, section 3, with the divisor of LLM.int8()
    (Dettmers et al. 2022, arXiv 2208.07339, section 2.1): the largest weight keeps its value, every
    other one moves by at most half a step, and rounding twice is rounding once. A group of zeros
    stays zero.

    Args:
        weight: of any floating-point dtype.
        bits: 8 or 4.
        group: inputs that share a step; the last group of a row may be shorter. ``None`` is a whole
            row.

    Raises:
        WorkbenchError: bits are neither 8 nor 4, the group is not positive, or a weight is not
            finite.
    """  # noqa: E501
    if bits not in (4, 8):
        raise WorkbenchError(f"weights can be rounded to 4 or 8 bits; got {bits}")
    width = weight.shape[-1]
    size = width if group is None else group
    if size < 1:
        raise WorkbenchError(
            f"a quantisation group of {size} weights is empty; give 64 or 128, or none for a whole "
            "row"
        )
    if not bool(torch.isfinite(weight).all()):
        raise WorkbenchError(
            "a weight is NaN or infinite, so its group has no step; repair the checkpoint before "
            "it is quantised"
        )
    last = 2 ** (bits - 1) - 1
    exact = F.pad(
        weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), (0, -width % size)
    ).unflatten(-1, (-1, size))
    largest = exact.abs().amax(-1, keepdim=True)
    codes = torch.where(
        largest > 0, exact / largest.where(largest > 0, torch.ones_like(largest)) * last, 0.0
    ).round()
    values = codes / last * largest  # in this order the largest weight comes back bit by bit

    def flat(tensor: Tensor) -> Tensor:
        return tensor.flatten(-2)[..., :width]

    return Codes(
        flat(codes).to(torch.int8), (largest / last).squeeze(-1), flat(values).to(weight.dtype)
    )


class _Matrix(NamedTuple):
    """A weight of a linear map: where it is, and whether its inputs are its second last
    dimension.
    """

    name: str
    module: nn.Module
    attribute: str
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """``[... d_out d_in]``, a view of the parameter."""
        weight: Tensor = getattr(self.module, self.attribute).detach()
        return weight.transpose(-1, -2) if self.transposed else weight


def _matrices(model: PreTrainedModel, head: bool) -> Iterator[_Matrix]:
    """Every linear map that is rounded, each parameter once: linear layers, GPT-2's transposed
    ones, and fused experts.
    """
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    seen_weights = {id(embedding.weight)}
    for path, module in model.named_modules():
        if module is output and not head:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            matrices = [_Matrix(f"{path}.weight", module, "weight", isinstance(module, Conv1D))]
        elif hasattr(
            module,
            "is_transposed",
            # transformers' mark of fused experts: parameters [expert, out, in], or [expert, in,
            # out]
        ):
            names = [
                name
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.ndim == 3
            ]
            matrices = [
                _Matrix(f"{path}.{name}", module, name, bool(module.is_transposed))
                for name in names
            ]
        else:
            continue
        for matrix in matrices:
            parameter = getattr(module, matrix.attribute)
            if parameter.dtype not in _FLOATS:
                raise WorkbenchError(
                    f"{matrix.name} holds {parameter.dtype}: this model is quantised already; open "
                    "its floating-point checkpoint"
                )
            if (
                id(parameter) not in seen_weights or module is output
            ):  # a tied head counts as a matrix of its own
                seen_weights.add(id(parameter))
                yield matrix


def _rounded(matrix: _Matrix, bits: int, group: int | None) -> Codes:
    try:
        return absmax_codes(matrix.weight, bits, GROUP if group is None and bits == 4 else group)
    except WorkbenchError as error:
        raise WorkbenchError(f"{matrix.name}: {error}") from error


def _check_kind(kind: str) -> None:
    if kind not in get_args(QuantisationKind):
        raise unknown("kind of quantisation", kind, get_args(QuantisationKind))


class Quantised(NamedTuple):
    """A quantised copy of a model.

    Attributes:
        model: the copy, in the dtype of the original.
        steps: for every rounded matrix the mean distance of two neighbouring codes over its groups,
            in units of weight. An update of a weight that is smaller than half of it mostly leaves
            the code where it was.
    """

    model: PreTrainedModel
    steps: dict[str, float]


@torch.no_grad()
def quantised(
    model: PreTrainedModel,
    bits: int = 8,
    *,
    group: int | None = None,
    kind: QuantisationKind = "absmax",
    head: bool = False,
) -> Quantised:
    """A copy of ``model`` whose linear maps went through :func:`absmax_codes` and back; the model
    itself is not changed.

    As in the deployments that this stands for, embeddings, norms, biases, routers and the output
    head keep their values.

    Args:
        model: what is quantised, in floating point.
        bits: 8 or 4.
        group: inputs that share a step. Default is a whole output row at 8 bits, and :data:`GROUP`
            inputs at 4.
        kind: see :data:`QuantisationKind`.
        head: round the output head as well. Where it is the input embedding, the copy gets a head
            of its own, and the embedding keeps its values.

    Raises:
        WorkbenchError: as in :func:`absmax_codes`; or the model is quantised already, or has no
            linear map.
    """
    _check_kind(kind)
    if bits not in (4, 8):
        raise WorkbenchError(f"weights can be rounded to 4 or 8 bits; got {bits}")
    result = copy.deepcopy(model)
    if head:
        _untie(result)
    steps = {}
    for matrix in _matrices(result, head):
        rounded = _rounded(matrix, bits, group)
        matrix.weight.copy_(rounded.values)
        steps[matrix.name] = float(rounded.steps.double().mean())
    if not steps:
        raise WorkbenchError(f"{type(model).__name__} has no linear map to quantise")
    return Quantised(result, steps)


def _untie(model: PreTrainedModel) -> None:
    """Give the output head a parameter of its own where it shares the input embedding's."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(
            output.weight.detach().clone(), requires_grad=output.weight.requires_grad
        )
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


@brief
@dataclass(frozen=True, slots=True)
class SurvivingChange:
    """What rounding leaves of a change of weights, over all rounded matrices.

    Attributes:
        share: share of the weights whose code differs between the two models. Zhang et al. explain
            recovery by its being small.
        carried: ``<Q(u) - Q(b), u - b> / ||u - b||^2``: how much of the change is there after
            rounding, along itself. 1 is all of it, 0 nothing; NaN where nothing changed.
        cosine: between the change before and after rounding. Near 0 with ``carried`` near 1, the
            change is whole on average but drowned in rounding noise; NaN where one of the two is
            zero.
        changed: share of the weights that differ before rounding.
        shares: matrix -> ``share`` of that matrix alone.
    """

    share: float
    carried: float
    cosine: float
    changed: float
    shares: dict[str, float] = field(repr=False)

    def _repr_html_(self) -> str:
        rows = {
            "weights whose code differs": f"{self.share:.2%}",
            "weights that differ before rounding": f"{self.changed:.2%}",
            "change carried through": f"{self.carried:.3f}",
            "cosine of the change before and after": f"{self.cosine:.3f}",
            "matrices": str(len(self.shares)),
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td "
            f"style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in rows.items()
        )
        return f"<table>{cells}</table>"


@torch.no_grad()
def surviving_share(
    base: PreTrainedModel,
    unlearned: PreTrainedModel,
    bits: int = 8,
    *,
    group: int | None = None,
    kind: QuantisationKind = "absmax",
    head: bool = False,
) -> SurvivingChange:
    """How much of the change from ``base`` to ``unlearned`` survives :func:`quantised` (arXiv
    2410.16454, section 5: recovery is two weights that share a code).

    A code can stay where it was while the group's step moves, and a few codes that jump by a whole
    step can carry a change that is far smaller than a step: therefore the result also says how much
    of the change is there after rounding. Neither model is changed.

    Args:
        base: the model before unlearning.
        unlearned: the same architecture after it.
        bits: as in :func:`quantised`, like the rest.
        group: likewise.
        kind: likewise.
        head: likewise.

    Raises:
        WorkbenchError: the two do not have the same matrices, or as in :func:`quantised`.
    """
    _check_kind(kind)
    if bits not in (4, 8):
        raise WorkbenchError(f"weights can be rounded to 4 or 8 bits; got {bits}")
    base_matrices, unlearned_matrices = (
        {matrix.name: matrix for matrix in _matrices(model, head)} for model in (base, unlearned)
    )
    if {name: matrix.weight.shape for name, matrix in base_matrices.items()} != {
        name: matrix.weight.shape for name, matrix in unlearned_matrices.items()
    }:
        raise WorkbenchError(
            "the two models do not have the same linear maps; give a base and its unlearned "
            "checkpoint"
        )
    if not base_matrices:
        raise WorkbenchError(f"{type(base).__name__} has no linear map to quantise")
    differ, changed, total = 0, 0, 0
    along, before, after = 0.0, 0.0, 0.0
    shares = {}
    for name, matrix in base_matrices.items():
        unlearned_matrix = unlearned_matrices[name]
        base_codes, unlearned_codes = (
            _rounded(matrix, bits, group),
            _rounded(unlearned_matrix, bits, group),
        )
        count = int((base_codes.codes != unlearned_codes.codes.to(base_codes.codes.device)).sum())
        delta = (
            unlearned_matrix.weight.to(matrix.weight.device).double() - matrix.weight.double()
        ).flatten()
        rounded_change = (
            unlearned_codes.values.to(base_codes.values.device).double()
            - base_codes.values.double()
        ).flatten()
        along += float(delta @ rounded_change)
        before += float(delta @ delta)
        after += float(rounded_change @ rounded_change)
        shares[name] = count / base_codes.codes.numel()
        differ, changed, total = (
            differ + count,
            changed + int(delta.count_nonzero()),
            total + base_codes.codes.numel(),
        )
    carried = along / before if before > 0 else math.nan
    cosine = along / math.sqrt(before * after) if before > 0 and after > 0 else math.nan
    return SurvivingChange(differ / total, carried, cosine, changed / total, shares)
