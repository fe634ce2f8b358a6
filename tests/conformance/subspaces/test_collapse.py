"""Collapsed updates against collapsing every token by hand, and the statistics behind them against
numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.errors import WorkbenchError
from workbench.evaluation.losses import cross_entropy
from workbench.hooks import Moments
from workbench.subspaces.collapse import (
    Collapse,
    collapse_basis,
    collapse_rows,
    find_collapse,
    only_tokens,
)
from workbench.subspaces.collapsed_update import linear_modules
from workbench.subspaces.subspace import Subspace, principal_subspace

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]

MODULES = tuple(
    f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up", "down")
)
EVERY_LINEAR = tuple(
    f"model.layers.{layer}.{name}_proj"
    for layer in range(2)
    for name in (
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    )
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _orthonormal(width: int, rank: int, seed: int = 0) -> Tensor:
    frame: Tensor = torch.linalg.qr(_random(width, max(rank, 1), seed=seed).double())[0][
        :, :rank
    ].float()
    return frame


def _subspace_of(rows: Tensor, rank: int) -> Subspace:
    moments = Moments()
    moments.update(rows)
    return principal_subspace(moments, rank)


def _hand_basis(rows: np.ndarray, components: int) -> np.ndarray:
    """Projector onto the mean direction and the top ``components - 1`` principal directions, in
    float64.
    """
    mean = rows.mean(0)
    _, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean))
    columns = np.column_stack([mean, vectors[:, ::-1][:, : components - 1]])
    basis, _ = np.linalg.qr(columns)
    projector: np.ndarray = basis @ basis.T
    return projector


def _projector(basis: Tensor) -> np.ndarray:
    return (basis.double() @ basis.double().T).numpy()


@contextmanager
def _recorded(model: PreTrainedModel, paths: tuple[str, ...]) -> Iterator[dict[str, list[Tensor]]]:
    """Every module's input and output gradient, ``[batch, position, width]``, by hooks of this
    file's own.
    """
    found: dict[str, list[Tensor]] = {
        f"{path}{side}": [] for path in paths for side in (":in", ":grad")
    }
    handles = []
    for path in paths:

        def hook(
            _module: nn.Module, args: tuple[Tensor, ...], output: Tensor, path: str = path
        ) -> None:
            found[f"{path}:in"].append(args[0].detach().clone())
            output.register_hook(
                lambda gradient: found[f"{path}:grad"].append(gradient.detach().clone())
            )

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# --- the map --------------------------------------------------------------------------------------


def test_collapsing_the_gradient_is_collapsing_every_token_first() -> None:
    activations, gradients = _random(40, 12, seed=1), _random(40, 9, seed=2)
    collapse = Collapse(_orthonormal(12, 4, 3), _orthonormal(9, 3, 4))
    expected = torch.zeros(9, 12)
    for a, g in zip(activations, gradients, strict=True):
        expected += torch.outer(
            collapse_rows(g[None], collapse.gradient)[0],
            collapse_rows(a[None], collapse.activation)[0],
        )
    torch.testing.assert_close(collapse(gradients.T @ activations), expected, rtol=1e-4, atol=1e-4)


def test_collapse_is_the_two_sided_projector_of_the_formula() -> None:
    collapse, gradient = (
        Collapse(_orthonormal(12, 4, 3), _orthonormal(9, 3, 4)),
        _random(9, 12, seed=5),
    )
    left, right = (
        np.eye(9) - _projector(collapse.gradient),
        np.eye(12) - _projector(collapse.activation),
    )
    np.testing.assert_allclose(
        collapse(gradient).numpy(), left @ gradient.double().numpy() @ right, atol=1e-5
    )


def test_collapse_is_idempotent_and_leaves_nothing_of_its_directions() -> None:
    collapse = Collapse(_orthonormal(12, 4, 3), _orthonormal(9, 3, 4))
    once = collapse(_random(9, 12, seed=5))
    torch.testing.assert_close(collapse(once), once, rtol=0, atol=1e-5)
    assert float((once @ collapse.activation).abs().max()) < 1e-5
    assert float((collapse.gradient.T @ once).abs().max()) < 1e-5


def test_the_projector_behind_it_is_symmetric() -> None:
    basis = _orthonormal(12, 4, 3)
    matrix = collapse_rows(torch.eye(12), basis)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-6)
    assert float(matrix.trace()) == pytest.approx(12 - 4, abs=1e-5)


def test_collapse_keeps_shape_and_dtype() -> None:
    collapse = Collapse(_orthonormal(12, 4, 3), _orthonormal(9, 3, 4))
    gradient = _random(9, 12)
    found = collapse(gradient.bfloat16())
    assert found.dtype == torch.bfloat16 and found.shape == (9, 12)
    # Computed in float32 and rounded once.
    assert torch.equal(found, collapse(gradient.bfloat16().float()).bfloat16())


# --- the basis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [1, 2, 5, 8])
@pytest.mark.parametrize("offset", [0.0, 0.3, 10.0, 1000.0])
def test_the_basis_is_the_mean_direction_and_the_top_principal_directions(
    components: int, offset: float
) -> None:
    rows = _random(200, 8, seed=1) * torch.tensor(
        [8.0, 6, 4.5, 3, 2, 1.4, 1, 0.7]
    ) + offset * _random(8, seed=2)
    basis = collapse_basis(_subspace_of(rows, components), components)
    assert basis.shape == (8, components) and basis.dtype == torch.float32
    torch.testing.assert_close(basis.T @ basis, torch.eye(components), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        _projector(basis), _hand_basis(rows.double().numpy(), components), atol=2e-4
    )


def test_the_basis_is_orthonormal_when_the_mean_lies_among_the_directions() -> None:
    directions = _orthonormal(10, 3, 1)
    # Three-dimensional data whose mean is one of its own directions: mean and directions together
    # span three dimensions, not four.
    rows = _random(100, 3, seed=2) * torch.tensor([3.0, 2.0, 1.0])
    rows = (rows - rows.mean(0) + torch.tensor([0.0, 5.0, 0.0])) @ directions.T
    basis = collapse_basis(_subspace_of(rows, 8), 8)
    assert basis.shape == (10, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), rtol=0, atol=1e-5)
    np.testing.assert_allclose(_projector(basis), _projector(directions), atol=1e-4)


@pytest.mark.parametrize("components", [-1, 0])
def test_zero_components_collapse_nothing(components: int) -> None:
    basis = collapse_basis(_subspace_of(_random(20, 6) + 3, max(components, 0)), components)
    assert basis.shape == (6, 0)
    gradient = _random(4, 6)
    assert torch.equal(Collapse(basis, torch.zeros(4, 0))(gradient), gradient)


def test_data_of_zeros_collapses_nothing() -> None:
    basis = collapse_basis(_subspace_of(torch.zeros(20, 6), 4), 4)
    assert basis.shape == (6, 0)
    gradient = _random(4, 6)
    assert torch.equal(Collapse(basis, torch.zeros(4, 0))(gradient), gradient)


def test_rank_deficient_data_collapses_only_what_it_spans() -> None:
    directions = _orthonormal(10, 2, 1)
    rows = (_random(50, 2, seed=2) + 1) @ directions.T
    basis = collapse_basis(_subspace_of(rows, 6), 6)
    assert bool(torch.isfinite(basis).all()) and basis.shape[1] == 2
    outside = _random(4, 10, seed=3)
    outside = outside - outside @ directions @ directions.T
    torch.testing.assert_close(
        Collapse(basis, torch.zeros(4, 0))(outside), outside, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [50, 7, 3])
def test_rows_that_never_change_collapse_their_own_direction_and_no_other(chunk: int) -> None:
    # One direction carries everything. A column of rounding noise beside it would annihilate a
    # direction that the data never used.
    row = _random(10, seed=4)
    moments = Moments()
    for part in row.expand(50, 10).split(chunk):
        moments.update(part)
    basis = collapse_basis(principal_subspace(moments, 4), 4)
    assert basis.shape == (10, 1)
    np.testing.assert_allclose(_projector(basis), _projector(row[:, None] / row.norm()), atol=1e-5)


def test_fewer_rows_than_components_give_fewer_columns() -> None:
    rows = _random(3, 10, seed=5)
    basis = collapse_basis(_subspace_of(rows, 8), 8)
    assert basis.shape == (10, 3)
    # All three rows lie inside: nothing of them survives.
    assert float(collapse_rows(rows, basis).abs().max()) < 1e-5


# --- in a model -----------------------------------------------------------------------------------


def test_linear_modules_names_linear_layers_only(llama: PreTrainedModel) -> None:
    assert sorted(linear_modules(llama, ["model.layers.*"])) == sorted(EVERY_LINEAR)
    assert linear_modules(llama, "model.layers.1.mlp.down_proj") == (
        "model.layers.1.mlp.down_proj",
    )
    with pytest.raises(WorkbenchError, match="q_proj"):
        linear_modules(llama, ["model.layers.7.*"])


@pytest.mark.parametrize(("activation", "gradient"), [(3, 4), (1, 1), (0, 2), (2, 0)])
def test_find_collapse_finds_the_directions_of_all_content_tokens(
    activation: int, gradient: int, llama: PreTrainedModel, make_batch: BatchMaker
) -> None:
    sets = [make_batch((9, 4, 7), 1), make_batch((5, 8), 2), make_batch((11,), 3)]

    def loss(batch: Batch) -> Tensor:
        return cross_entropy(llama, batch)

    found = find_collapse(
        llama, MODULES, loss, sets, activation_components=activation, gradient_components=gradient
    )
    assert list(found) == [f"{path}.weight" for path in MODULES]
    with _recorded(llama, MODULES) as recorded:
        for batch in sets:  # the sum over all target tokens, whatever the batches
            (loss(batch) * batch.target_mask.sum()).backward()
    for path in MODULES:
        collapse = found[f"{path}.weight"]
        for side, basis, components in (
            (":in", collapse.activation, activation),
            (":grad", collapse.gradient, gradient),
        ):
            rows = (
                torch.cat(
                    [
                        part[batch.content_mask]
                        for part, batch in zip(recorded[path + side], sets, strict=True)
                    ]
                )
                .double()
                .numpy()
            )
            assert len(rows) == 8 + 3 + 6 + 4 + 7 + 10
            assert basis.shape == (rows.shape[1], components)
            if components:
                np.testing.assert_allclose(
                    _projector(basis), _hand_basis(rows, components), atol=1e-3
                )


def test_find_collapse_leaves_the_model_as_it_was(llama: PreTrainedModel, batch: Batch) -> None:
    llama.get_submodule("model.norm").weight.requires_grad = False
    flags = {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    find_collapse(
        llama,
        MODULES,
        lambda part: cross_entropy(llama, part),
        [batch],
        activation_components=2,
        gradient_components=2,
    )
    assert {name: parameter.requires_grad for name, parameter in llama.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in llama.modules()
    )


def test_zero_components_reproduce_autograd(llama: PreTrainedModel, batch: Batch) -> None:
    found = find_collapse(
        llama,
        MODULES,
        lambda part: cross_entropy(llama, part),
        [batch],
        activation_components=0,
        gradient_components=0,
    )
    cross_entropy(llama, batch).backward()
    parameters = dict(llama.named_parameters())
    for name, collapse in found.items():
        gradient = parameters[name].grad
        assert gradient is not None and torch.equal(collapse(gradient), gradient)


def test_a_collapsed_step_moves_no_output_along_the_directions_left_alone(
    llama: PreTrainedModel, batch: Batch
) -> None:
    found = find_collapse(
        llama,
        MODULES,
        lambda part: cross_entropy(llama, part),
        [batch],
        activation_components=3,
        gradient_components=3,
    )
    with _recorded(llama, MODULES) as recorded:
        cross_entropy(llama, batch).backward()
    parameters = dict(llama.named_parameters())
    for path in MODULES:
        collapse, gradient = found[f"{path}.weight"], parameters[f"{path}.weight"].grad
        assert gradient is not None
        update, mean = collapse(gradient), recorded[f"{path}:in"][0][batch.content_mask].mean(0)
        assert float(update.norm()) > 1e-6
        # The mean activation is one of the directions, so the layer's answer to it stays.
        assert float((update @ mean).norm()) <= 1e-4 * float(update.norm() * mean.norm())


@pytest.mark.parametrize("path", [EVERY_LINEAR[0], EVERY_LINEAR[4], EVERY_LINEAR[13]])
def test_only_the_selected_tokens_enter_a_weight_gradient(
    path: str, llama: PreTrainedModel, batch: Batch
) -> None:
    mask = batch.attention_mask.bool() & (
        torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    )
    with _recorded(llama, (path,)) as recorded:
        cross_entropy(llama, batch).backward()
    expected = recorded[f"{path}:grad"][0][mask].T @ recorded[f"{path}:in"][0][mask]
    llama.zero_grad()
    with only_tokens(llama, [path], mask):
        cross_entropy(llama, batch).backward()
    gradient = dict(llama.named_parameters())[f"{path}.weight"].grad
    assert gradient is not None and float(expected.norm()) > 1e-6
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_leaving_bos_and_padding_out_of_every_layer_changes_no_other_tokens_gradient(
    family: str, make_model: ModelMaker, make_batch: BatchMaker
) -> None:
    model, batch = make_model(family), make_batch((9, 4, 7))
    mask = batch.content_mask
    with _recorded(model, EVERY_LINEAR) as whole:
        cross_entropy(model, batch).backward()
    model.zero_grad()
    with _recorded(model, EVERY_LINEAR) as masked, only_tokens(model, EVERY_LINEAR, mask):
        cross_entropy(model, batch).backward()
    parameters = dict(model.named_parameters())
    bos = 0.0
    for path in EVERY_LINEAR:
        before, after = whole[f"{path}:grad"][0], masked[f"{path}:grad"][0]
        torch.testing.assert_close(after[mask], before[mask], rtol=1e-4, atol=1e-8)
        expected = before[mask].T @ whole[f"{path}:in"][0][mask]
        gradient = parameters[f"{path}.weight"].grad
        assert gradient is not None
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
        bos += float(before[:, 0].abs().sum())
    assert bos > 1e-3  # BOS had gradients to leave out


def test_only_tokens_removes_its_hooks_when_the_loss_raises(
    llama: PreTrainedModel, batch: Batch
) -> None:
    with pytest.raises(ZeroDivisionError), only_tokens(llama, MODULES, batch.content_mask):
        raise ZeroDivisionError
    assert all(not module._forward_hooks for module in llama.modules())
