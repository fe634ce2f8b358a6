"""Shapes in signatures: every public tensor or array has one, in the words of CONTRIBUTING.md, and
it is the shape of what goes in and comes out.
"""

from __future__ import annotations

import ast
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype  # comes with transformer-lens
from beartype.door import is_bearable
from jaxtyping import TypeCheckError, jaxtyped
from transformers import PreTrainedModel

from workbench.attacks.gcg import SuffixPrompt, suffix_gradient, suffix_losses
from workbench.attacks.quantise import absmax_codes
from workbench.attacks.soft_prompt import Prompted, random_prompt
from workbench.data.batches import Batch
from workbench.diagnostics.discoveries import p_values
from workbench.diagnostics.lens import decode, predicting_answer
from workbench.diagnostics.positions import position_groups, shared_tail
from workbench.diagnostics.probes import prompt_streams
from workbench.diagnostics.rejection import rejection_rate
from workbench.diagnostics.shift import shift_by_layer, streams
from workbench.evaluation.losses import (
    cross_entropy,
    kl_by_text,
    next_token_logits,
    score,
    token_kl,
    token_nll,
)
from workbench.evaluation.metrics import answer_logits, extraction_strength
from workbench.evaluation.statistics import bootstrap, by_fact, paired_permutation, spearman
from workbench.hooks import Moments, peek
from workbench.hooks.consumers import checked_rows
from workbench.sharpness.curvature import Curvature, loss_sum
from workbench.sharpness.krylov import lanczos
from workbench.sharpness.planes import walk_shares
from workbench.sharpness.trace import hutchinson
from workbench.subspaces.collapse import Collapse, collapse_basis, collapse_rows
from workbench.subspaces.compare import angle_null, debiased_cka
from workbench.subspaces.finders import StreamingPCA
from workbench.subspaces.subspace import noise_floor, principal_angles
from workbench.unlearning.noise import noise_std
from workbench.unlearning.objectives import retain_kl
from workbench.unlearning.representation import control_vector

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "hooks",
    "workbench/subspaces",
    "workbench/unlearning",
    "workbench/attacks",
    "workbench/diagnostics",
    "workbench/sharpness",
    "workbench/evaluation",
    "workbench/data",
)
ARRAYS = {"Tensor", "ndarray", "NDArray"}
STATE_DICT = "parameter name -> tensor: every parameter has a shape of its own"
PARAMETERS = "a list of parameters: every one has a shape of its own"
BARE = {
    ("workbench/unlearning/deltas.py", "Weights"): STATE_DICT,
    ("workbench/unlearning/deltas.py", "delta_between"): STATE_DICT,
    ("workbench/unlearning/one_gradient.py", "Unlearned.delta"): STATE_DICT,
    ("workbench/unlearning/smoothing/rule.py", "Gradient"): STATE_DICT,
    ("workbench/unlearning/smoothing/rule.py", "perturbed_weights"): STATE_DICT,
    ("workbench/sharpness/curvature.py", "chosen_parameters"): STATE_DICT,
    ("workbench/sharpness/curvature.py", "Curvature.flat"): PARAMETERS,
    ("workbench/sharpness/curvature.py", "Curvature.unflat"): PARAMETERS,
    ("workbench/sharpness/planes.py", "orthonormal"): STATE_DICT,
    ("workbench/sharpness/planes.py", "TrajectoryPlane.first"): STATE_DICT,
    ("workbench/sharpness/planes.py", "TrajectoryPlane.second"): STATE_DICT,
    ("workbench/sharpness/probe.py", "value_and_gradient"): STATE_DICT,
    ("workbench/sharpness/slices.py", "Direction"): STATE_DICT,
    ("workbench/sharpness/slices.py", "scaled"): STATE_DICT,
    ("workbench/sharpness/slices.py", "random_direction"): STATE_DICT,
    ("workbench/sharpness/slices.py", "descent_direction"): STATE_DICT,
}
"""Public signatures with a tensor that has no shape, and why."""


def _public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def _annotations(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, ast.expr]]:
    """Every annotation of a public signature, field or type alias, under its qualified name."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _public(node.name):
            given = node.args
            for one in [
                *given.posonlyargs,
                *given.args,
                *given.kwonlyargs,
                *(more for more in (given.vararg, given.kwarg) if more),
            ]:
                if one.annotation is not None:
                    yield inside + node.name, one.annotation
            if node.returns is not None:
                yield inside + node.name, node.returns
        elif isinstance(node, ast.ClassDef) and _public(node.name):
            yield from _annotations(node.body, f"{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if _public(node.target.id):
                yield inside + node.target.id, node.annotation
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not inside:
            alias = isinstance(node.value, ast.Subscript | ast.BinOp)
            if alias and _public(node.targets[0].id):
                yield node.targets[0].id, node.value


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _shapes(node: ast.AST) -> Iterator[str]:
    """The shapes in an annotation."""
    for part in ast.walk(node):
        if (
            isinstance(part, ast.Subscript)
            and hasattr(jaxtyping, _name(part.value))
            and isinstance(part.slice, ast.Tuple)
            and _name(part.slice.elts[0]) in ARRAYS
        ):
            shape = part.slice.elts[1]
            assert isinstance(shape, ast.Constant)
            yield shape.value


def _arrays(node: ast.AST) -> int:
    return sum(_name(part) in ARRAYS for part in ast.walk(node))


FOUND = [
    (path.relative_to(ROOT).as_posix(), name, annotation)
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    for name, annotation in _annotations(ast.parse(path.read_text()).body)
    if _arrays(annotation)
]


def test_public_tensors_and_arrays_have_shapes() -> None:
    bare = {
        (path, name)
        for path, name, annotation in FOUND
        if _arrays(annotation) > len(list(_shapes(annotation)))
    }
    assert bare - set(BARE) == set()
    assert set(BARE) - bare == set(), "these have shapes now: take them off the list"


def test_axes_have_the_names_of_the_vocabulary() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Shapes")[1]
    known = {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    used = {
        re.sub(r"^other_", "", axis.strip("*_").removesuffix("-1"))
        for _, _, annotation in FOUND
        for shape in _shapes(annotation)
        for axis in shape.split()
        if axis != "..." and not axis.isdigit()
    }
    assert used - {"shape"} - known == set()


CHECKER = beartype(conf=BeartypeConf(is_pep484_tower=True))


def hints(thing: Any) -> dict[str, Any]:
    """The types of a signature or of fields, with jaxtyping's names, which modules import for
    type checkers alone.
    """
    plain = inspect.unwrap(thing)
    names = vars(jaxtyping) | (
        vars(inspect.getmodule(plain)) if isinstance(plain, type) else plain.__globals__
    )
    found = typing.get_type_hints(plain, names, include_extras=True)
    # beartype knows Self in a class that it decorates, nowhere else
    return {name: Any if kind is typing.Self else kind for name, kind in found.items()}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, refusing arguments and results of other shapes or types than it says."""
    plain = inspect.unwrap(function)
    copy = types.FunctionType(
        plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    copy.__annotations__ = hints(function)
    return jaxtyped(copy, typechecker=CHECKER)


def fits(value: Any) -> bool:
    """Whether the fields of a dataclass or named tuple have the shapes that they say, together."""
    kinds = hints(type(value))
    names = value._fields if isinstance(value, tuple) else [field.name for field in fields(value)]
    with jaxtyped("context"):
        return all(is_bearable(getattr(value, name), kinds[name]) for name in names)


def rows(count: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_the_check_sees_a_wrong_shape_and_a_wrong_dtype(batch: Batch) -> None:
    with pytest.raises(TypeCheckError):
        checked(token_kl)(rows(3, 5), rows(3, 6))
    with pytest.raises(TypeCheckError):
        checked(noise_std)(rows().long(), 0.1)
    assert not fits(replace(batch, target_mask=batch.target_mask[:, 1:]))
    assert not fits(replace(batch, target_mask=batch.target_mask.long()))


def test_losses_and_scores(llama: PreTrainedModel, batch: Batch) -> None:
    assert fits(batch)
    logits = checked(next_token_logits)(llama, batch)
    checked(token_nll)(llama, batch)
    checked(token_kl)(logits, logits)
    checked(cross_entropy)(llama, batch)
    checked(loss_sum)(llama, batch)
    checked(retain_kl)(llama, batch, llama)
    checked(kl_by_text)(llama, [batch], [logits.detach()])
    checked(answer_logits)(llama, batch)
    checked(extraction_strength)(llama, [batch])
    assert fits(score(llama, [batch]))


def test_streams(llama: PreTrainedModel, batch: Batch) -> None:
    by_layer = checked(streams)(llama, [batch])
    checked(shift_by_layer)(by_layer, by_layer)
    checked(prompt_streams)(llama, [batch])
    checked(predicting_answer)(batch)
    checked(decode)(llama, by_layer[1])
    checked(peek)(llama, batch.inputs, "blocks.*.hook_resid_post")
    checked(shared_tail)(batch, batch)
    checked(position_groups)(batch)


def test_subspaces() -> None:
    finder = StreamingPCA(3)
    checked(StreamingPCA.partial_fit)(finder, rows(), sample_weight=torch.ones(40))
    found = finder.subspace()
    assert fits(found)
    assert fits(finder.moments_)
    assert fits(Moments())
    checked(checked_rows)(rows(), None)
    basis = checked(collapse_basis)(found, 3)
    checked(collapse_rows)(rows(), basis, torch.ones(basis.shape[1]))
    side = torch.linalg.qr(rows(5, 2))[0]
    collapse = Collapse(basis, side, torch.ones(basis.shape[1]), torch.ones(2))
    assert fits(collapse)
    checked(Collapse.__call__)(collapse, rows(5, 6))
    checked(principal_angles)(basis, found.basis[:, :2])
    checked(noise_floor)(found.basis, rows().square().mean(0), 1.0)
    checked(angle_null)(rows(), rows(30, seed=1), 2, draws=3)
    checked(debiased_cka)(rows(), rows(40, 5))


def test_attacks(llama: PreTrainedModel, batch: Batch) -> None:
    prompts = [SuffixPrompt((1, 5), (6,), (7, 8), "fact")]
    checked(suffix_losses)(llama, prompts, torch.tensor([[3, 4], [4, 9], [5, 5]]))
    checked(suffix_gradient)(llama, prompts, [3, 4])
    assert fits(absmax_codes(rows(), 4, 4))
    prompt = checked(random_prompt)(rows(3, 16), 0)
    checked(Prompted.forward)(Prompted(llama, prompt), batch.input_ids, batch.attention_mask)


def test_curvature(llama: PreTrainedModel, batch: Batch) -> None:
    curvature = Curvature(llama, [batch], ["*down_proj*"])
    vector = checked(Curvature.gradient)(curvature)
    checked(Curvature.product)(curvature, vector)
    assert fits(checked(lanczos)(curvature.product, vector, 4))
    assert fits(hutchinson(curvature.product, {"all": slice(0, curvature.size)}, max_products=12))
    checked(walk_shares)([1.0, 2.0, 1.0])


def test_statistics_and_vectors() -> None:
    values = np.random.default_rng(0).random((2, 6))
    checked(bootstrap)(values, draws=9)
    checked(bootstrap)(values[0], draws=9)
    checked(by_fact)(("a", "a", "b", "b", "c", "c"), values)
    checked(paired_permutation)(values, values[0], draws=9)
    checked(spearman)(values[0], values[1], given=values.T, draws=9)
    checked(p_values)(values[0], values[1][:4])
    checked(rejection_rate)(rows(), rows(seed=1), noise_std=0.1, draws=2)
    checked(control_vector)(6, 0)
    checked(noise_std)(rows(), 0.1)
