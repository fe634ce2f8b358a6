"""The family of collapses (hard, soft, quadratic) against its laws, one token at a time, and the
maps that a pass over a model finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy
from workbench.subspaces.collapse import (
    Collapse,
    CollapseKind,
    collapse_basis,
    collapse_rows,
    collapse_side,
    find_collapse,
    only_tokens,
    removed_shares,
)
from workbench.subspaces.collapsed_update import CollapsedUpdate
from workbench.subspaces.finders import SketchPCA, StreamingPCA
from workbench.subspaces.weights import singular_subspaces

BatchMaker = Callable[..., Batch]

KINDS: tuple[CollapseKind, ...] = get_args(CollapseKind)
MLP = tuple(
    f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up", "down")
)
PATTERN = "model.layers.*.mlp.*_proj"


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _kept(sizes: Tensor, kind: CollapseKind, floor: float = 1e-3) -> Tensor:
    """What remains of each direction, by the formula: ``(s_min / s_i)^p``, at most everything."""
    if kind == "hard":
        return torch.zeros_like(sizes)
    smallest = min(float(size) for size in sizes if size >= floor * sizes.max())
    return torch.tensor(
        [
            min(1.0, smallest / max(float(size), 1e-30)) ** {"soft": 1, "quadratic": 2}[kind]
            for size in sizes
        ]
    )


def _dense(collapse: Collapse) -> tuple[np.ndarray, np.ndarray]:
    """The two maps ``I - Q D Q'`` as float64 matrices: of output gradients and of inputs."""
    maps = []
    for basis, removed in (
        (collapse.gradient, collapse.gradient_removed),
        (collapse.activation, collapse.activation_removed),
    ):
        q = basis.double().numpy()
        shares = np.ones(q.shape[1]) if removed is None else removed.double().numpy()
        maps.append(np.eye(len(q)) - q @ np.diag(shares) @ q.T)
    return maps[0], maps[1]


class _Rows:
    """Inputs and output gradients of modules, token by token, by hooks of this file's own."""

    def __init__(self, model: PreTrainedModel, paths: tuple[str, ...]) -> None:
        self.inputs: dict[str, list[Tensor]] = {path: [] for path in paths}
        self.gradients: dict[str, list[Tensor]] = {path: [] for path in paths}
        self.handles = [
            model.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths
        ]

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[path].append(args[0].detach())
            output.register_hook(lambda gradient: self.gradients[path].append(gradient.detach()))

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


# --- shares ---------------------------------------------------------------------------------------


def test_shares_follow_the_formula() -> None:
    sizes = torch.tensor([5.0, 2.0, 4.0, 1.0, 2.5])
    for kind, expected in (
        ("hard", [1, 1, 1, 1, 1]),
        ("soft", [1 - 1 / 5, 1 - 1 / 2, 1 - 1 / 4, 0, 1 - 1 / 2.5]),
        ("quadratic", [1 - 1 / 25, 1 - 1 / 4, 1 - 1 / 16, 0, 1 - 1 / 6.25]),
    ):
        torch.testing.assert_close(
            removed_shares(sizes.square(), kind), torch.tensor(expected, dtype=torch.float32)
        )


@pytest.mark.parametrize("kind", ["soft", "quadratic"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_shares_know_no_unit_and_a_direction_below_the_floor_is_not_the_smallest(
    kind: CollapseKind, scale: float
) -> None:
    sizes = torch.tensor([1.0, 0.5, 0.25, 1e-5, 0.0]).double()
    found = removed_shares((scale * sizes).square(), kind)
    torch.testing.assert_close(found, 1 - _kept(sizes, kind).double(), rtol=1e-5, atol=1e-7)
    assert (
        float(found[2]) == float(found[3]) == float(found[4]) == 0
    )  # the smallest that counts, and those below it, are left as they are
    # Just above the floor a direction does count.
    assert float(removed_shares(torch.tensor([1.0, 2e-3]).square(), kind)[0]) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_nothing_and_of_zeros_are_defined(kind: CollapseKind) -> None:
    assert removed_shares(torch.zeros(0), kind).shape == (0,)
    zeros = removed_shares(torch.zeros(3), kind)
    assert zeros.shape == (3,) and bool(((zeros >= 0) & (zeros <= 1)).all())
    # Rounding can leave a second moment slightly negative.
    assert bool(torch.isfinite(removed_shares(torch.tensor([1.0, -1e-12]), kind)).all())


# --- the map --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shrinking_every_token_first_is_the_two_sided_map_of_the_gradient(
    kind: CollapseKind,
) -> None:
    activations, gradients = (
        _random(40, 12, seed=1) + 2 * _random(12, seed=6),
        _random(40, 9, seed=2),
    )
    sides = []
    for rows, components in ((activations, 4), (gradients, 3)):
        finder = StreamingPCA(components)
        finder.partial_fit(rows)
        sides.append(collapse_side(finder, components, kind))
    (activation, activation_removed), (gradient, gradient_removed) = sides
    collapse = Collapse(activation, gradient, activation_removed, gradient_removed)
    of_gradients, of_inputs = _dense(collapse)
    expected = np.zeros((9, 12))
    for a, g in zip(activations.double().numpy(), gradients.double().numpy(), strict=True):
        expected += np.outer(of_gradients @ g, of_inputs @ a)
    np.testing.assert_allclose(collapse(gradients.T @ activations).numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(
        collapse_rows(activations, activation, activation_removed).numpy(),
        activations.double().numpy() @ of_inputs,
        atol=1e-5,
    )


@pytest.mark.parametrize("components", [1, 3, 5])
@pytest.mark.parametrize(
    ("kind", "two_sided", "law"),
    [
        ("soft", False, lambda s, low: low),
        ("soft", True, lambda s, low: low**2 / s),
        ("quadratic", False, lambda s, low: low**2 / s),
        ("quadratic", True, lambda s, low: low**4 / s**3),
        ("hard", False, lambda s, low: 0 * s),
        ("hard", True, lambda s, low: 0 * s),
    ],
)
def test_the_spectrum_of_a_matrix_collapsed_by_its_own_directions(
    kind: CollapseKind, two_sided: bool, law: Callable[..., Tensor], components: int
) -> None:
    left, right = (torch.linalg.qr(_random(n, 7, seed=n).double())[0] for n in (9, 12))
    spectrum = torch.tensor([20.0, 9.0, 5.0, 2.0, 1.0, 0.5, 0.1]).double()
    matrix = (left * spectrum) @ right.T
    own = singular_subspaces(matrix.float(), components)
    shares = removed_shares(own.activation.eigenvalues, kind)
    none = torch.zeros(9, 0)
    collapsed = Collapse(
        own.activation.basis,
        own.gradient.basis if two_sided else none,
        shares,
        shares if two_sided else torch.zeros(0),
    )(matrix.float())
    # Singular vectors stay, singular values follow the law; those beyond the components stay, too.
    expected = spectrum.clone()
    expected[:components] = law(spectrum[:components], spectrum[components - 1])
    torch.testing.assert_close(collapsed.double(), (left * expected) @ right.T, rtol=0, atol=2e-5)


def test_hard_collapse_is_idempotent_and_soft_collapse_is_not() -> None:
    matrix = _random(9, 12, seed=5)
    own = singular_subspaces(matrix, 4)
    for kind in KINDS:
        shares = removed_shares(own.activation.eigenvalues, kind)
        collapse = Collapse(own.activation.basis, own.gradient.basis, shares, shares)
        once = collapse(matrix)
        assert torch.allclose(collapse(once), once, atol=1e-5) is (kind == "hard")


@pytest.mark.parametrize("kind", KINDS)
def test_one_side_alone_leaves_the_other_alone(kind: CollapseKind) -> None:
    matrix = _random(9, 12, seed=5)
    own = singular_subspaces(matrix, 4)
    shares = removed_shares(own.activation.eigenvalues, kind)
    only_inputs = Collapse(own.activation.basis, torch.zeros(9, 0), shares, torch.zeros(0))(matrix)
    only_outputs = Collapse(torch.zeros(12, 0), own.gradient.basis, torch.zeros(0), shares)(matrix)
    torch.testing.assert_close(
        only_inputs, only_outputs, rtol=0, atol=1e-5
    )  # by its own directions, either side does the same
    other = _random(9, 12, seed=6)
    of_gradients, of_inputs = _dense(
        Collapse(own.activation.basis, own.gradient.basis, shares, shares)
    )
    one = Collapse(own.activation.basis, torch.zeros(9, 0), shares, torch.zeros(0))(other)
    np.testing.assert_allclose(one.numpy(), other.double().numpy() @ of_inputs, atol=1e-5)
    two = Collapse(torch.zeros(12, 0), own.gradient.basis, torch.zeros(0), shares)(other)
    np.testing.assert_allclose(two.numpy(), of_gradients @ other.double().numpy(), atol=1e-5)


# --- one side from data ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize("offset", [0.0, 0.5, 20.0])
def test_a_side_spans_mean_and_top_components_and_diagonalises_the_second_moment(
    offset: float, components: int, kind: CollapseKind
) -> None:
    rows = _random(300, 8, seed=1) * torch.tensor(
        [8.0, 6, 4.5, 3, 2, 1.4, 1, 0.7]
    ) + offset * _random(8, seed=2)
    finder = StreamingPCA(components)
    for part in rows.split(70):
        finder.partial_fit(part)
    basis, removed = collapse_side(finder, components, kind)
    assert (
        basis.dtype == removed.dtype == torch.float32
        and basis.shape == (8, components)
        and removed.shape == (components,)
    )
    torch.testing.assert_close(basis.T @ basis, torch.eye(components), rtol=0, atol=1e-5)
    # The same span as mean and principal directions, which test_collapse.py holds against numpy.
    plain = collapse_basis(finder.subspace(), components)
    torch.testing.assert_close(basis @ basis.T, plain @ plain.T, rtol=0, atol=1e-4)
    inside = rows.double() @ basis.double()
    moments = inside.T @ inside / len(rows)
    sizes = moments.diagonal().sqrt()
    assert float((moments - moments.diagonal().diag()).abs().max()) < 1e-4 * float(moments.max())
    torch.testing.assert_close(
        removed.double(), 1 - _kept(sizes, kind).double(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sketch_and_exact_finder_agree_on_data_of_low_rank(kind: CollapseKind) -> None:
    rows = (
        _random(400, 4, seed=1) * torch.tensor([6.0, 4.0, 2.5, 1.5])
        + torch.tensor([1.0, 2.0, 0.5, 0.0])
    ) @ _random(4, 40, seed=2)
    sides = []
    for finder in (StreamingPCA(6), SketchPCA(6)):
        for part in rows.split(90):
            finder.partial_fit(part)
        basis, removed = collapse_side(finder, 6, kind)
        assert basis.shape == (40, 4)
        sides.append(collapse_rows(torch.eye(40), basis, removed))
    torch.testing.assert_close(sides[0], sides[1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_zeros_gives_a_side_without_directions(kind: CollapseKind) -> None:
    finder = StreamingPCA(3)
    finder.partial_fit(torch.zeros(20, 6))
    basis, removed = collapse_side(finder, 3, kind)
    assert basis.shape == (6, 0) and removed.shape == (0,)


# --- in a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_finds_the_shares_of_the_content_tokens(
    kind: CollapseKind, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    sets = [make_batch((12, 9, 11), 1), make_batch((10, 12), 2)]
    found = find_collapse(
        llama,
        MLP,
        lambda part: cross_entropy(llama, part),
        sets,
        activation_components=3,
        gradient_components=4,
        kind=kind,
    )
    rows = _Rows(llama, MLP)
    for batch in sets:  # the sum over all target tokens, whatever the batches
        (cross_entropy(llama, batch) * batch.target_mask.sum()).backward()
    rows.remove()
    for path in MLP:
        collapse = found[f"{path}.weight"]
        sides = (
            (rows.inputs, collapse.activation, collapse.activation_removed, 3),
            (rows.gradients, collapse.gradient, collapse.gradient_removed, 4),
        )
        for parts, basis, removed, components in sides:
            assert removed is not None and basis.shape[1] == components
            tokens = torch.cat(
                [part[batch.content_mask] for part, batch in zip(parts[path], sets, strict=True)]
            ).double()
            sizes = (tokens @ basis.double()).square().mean(0).sqrt()
            torch.testing.assert_close(
                removed.double(), 1 - _kept(sizes, kind).double(), rtol=1e-3, atol=1e-3
            )


def test_gate_and_up_share_one_input_basis_and_have_gradient_bases_of_their_own(
    llama: PreTrainedModel, batch: Batch
) -> None:
    paths = (*MLP, *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"))
    found = find_collapse(
        llama,
        paths,
        lambda part: cross_entropy(llama, part),
        [batch],
        activation_components=3,
        gradient_components=3,
        kind="soft",
    )

    def side(path: str) -> Collapse:
        return found[f"{path}.weight"]

    for first, second in (
        (MLP[0], MLP[1]),
        (MLP[3], MLP[4]),
        (paths[6], paths[7]),
        (paths[6], paths[8]),
    ):
        assert torch.equal(side(first).activation, side(second).activation)
        assert side(first).gradient.shape != side(second).gradient.shape or not torch.allclose(
            side(first).gradient, side(second).gradient, atol=1e-3
        )
    assert not torch.allclose(
        side(MLP[0]).activation, side(MLP[3]).activation, atol=1e-3
    )  # another block reads another input


@pytest.mark.parametrize("kind", KINDS)
def test_zero_components_reproduce_autograd_on_the_selected_tokens(
    kind: CollapseKind, llama: PreTrainedModel, batch: Batch
) -> None:
    update = CollapsedUpdate(
        llama, PATTERN, activation_components=0, gradient_components=0, kind=kind
    )
    update.find(lambda part: cross_entropy(llama, part), [batch])
    with only_tokens(llama, MLP, batch.content_mask):
        cross_entropy(llama, batch).backward()
    before = {
        name: parameter.grad.clone()
        for name, parameter in llama.named_parameters()
        if parameter.grad is not None
    }
    update.apply()
    assert all(
        torch.equal(parameter.grad, before[name])
        for name, parameter in llama.named_parameters()
        if parameter.grad is not None
    )


def _gpt2() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=1,
        )
        return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_update_is_the_gradient_of_tokens_that_were_each_collapsed(
    family: str, kind: CollapseKind, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    # GPT-2's Conv1D keeps its weight transposed; its attention output is square, so a side mix-up
    # there would raise nothing.
    model, batch = (
        (llama, make_batch((12, 9, 11)))
        if family == "llama"
        else (_gpt2(), make_batch((12, 9, 11)))
    )
    patterns = (
        PATTERN if family == "llama" else ["transformer.h.*.mlp.c_*", "transformer.h.*.attn.c_proj"]
    )
    update = CollapsedUpdate(
        model, patterns, activation_components=3, gradient_components=4, kind=kind
    )
    assert update.find(lambda part: cross_entropy(model, part), [batch]) is update
    rows = _Rows(model, update.modules)
    cross_entropy(model, batch).backward()
    rows.remove()
    update.apply()
    assert len(update.modules) == 6
    for path in update.modules:
        of_gradients, of_inputs = _dense(update.maps[f"{path}.weight"])
        inputs, gradients = (
            parts[path][0].double().numpy() for parts in (rows.inputs, rows.gradients)
        )
        expected = np.zeros((gradients.shape[-1], inputs.shape[-1]))
        for row, t in np.ndindex(*inputs.shape[:2]):
            expected += np.outer(of_gradients @ gradients[row, t], of_inputs @ inputs[row, t])
        found = model.get_submodule(path).weight.grad
        assert isinstance(found, Tensor)
        np.testing.assert_allclose(
            (found if family == "llama" else found.T).numpy(),
            expected,
            atol=1e-4 * float(np.abs(expected).max()) + 1e-7,
        )
