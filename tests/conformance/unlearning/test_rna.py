"""Random noise augmentation: the size of the noise, its random stream and what it does to the
expected gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.hooks import resolve
from workbench.unlearning.noise import gaussian, noisy_reference
from workbench.unlearning.representation import keep_representation

Mover = Callable[..., PreTrainedModel]
Gradients = Callable[[PreTrainedModel, Tensor], dict[str, Tensor]]


def _rows(count: int = 1500, width: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Lengths differ from row to row, so that "the mean length" cannot be mistaken for each row's
    # own.
    scales = torch.rand(count, 1, generator=generator) * 3 + 0.1
    return torch.randn(count, width, generator=generator) * scales


@pytest.mark.parametrize("ratio", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("width", [64, 256])
def test_the_noise_is_as_long_as_the_ratio_says(ratio: float, width: int) -> None:
    rows = _rows(width=width)
    noise = (gaussian(ratio, 0)(rows) - rows).double()
    mean_length = float(rows.double().norm(dim=-1).mean())
    assert float(noise.norm(dim=-1).mean()) / mean_length == pytest.approx(ratio, rel=0.02)
    # nu is a standard deviation: a variance of nu would give sqrt(nu) here.
    nu = ratio * mean_length / math.sqrt(width)
    assert float(noise.std()) == pytest.approx(nu, rel=0.02)
    assert abs(float(noise.mean())) < 4 * nu / math.sqrt(noise.numel())


def test_the_noise_is_isotropic_and_the_same_for_long_and_short_rows() -> None:
    rows = _rows(4000, 8)
    noise = (gaussian(0.5, 1)(rows) - rows).double()
    nu = 0.5 * float(rows.norm(dim=-1).mean()) / math.sqrt(8)
    covariance = noise.T @ noise / len(noise)
    assert float((covariance / nu**2 - torch.eye(8)).abs().max()) < 0.12  # 5 standard errors
    order = rows.norm(dim=-1).argsort()
    short, long = noise[order[:2000]].std(), noise[order[2000:]].std()
    assert float(short / long) == pytest.approx(1, abs=0.04)


def test_the_noise_is_fresh_at_every_call_and_repeats_with_its_seed() -> None:
    rows = _rows(10, 16)
    first, second, other = gaussian(0.5, 7), gaussian(0.5, 7), gaussian(0.5, 8)
    a, b = first(rows), first(rows)
    assert not torch.equal(a, b)
    assert torch.equal(a, second(rows)) and torch.equal(b, second(rows))
    assert not torch.equal(a, other(rows))


def test_ratio_zero_is_the_identity() -> None:
    rows = _rows(10, 16)
    assert torch.equal(gaussian(0.0, 0)(rows), rows)


def test_a_negative_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio"):
        gaussian(-0.1, 0)


def test_the_global_random_stream_is_neither_used_nor_moved() -> None:
    rows = _rows(10, 16)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = gaussian(0.5, 3)(rows)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(gaussian(0.5, 3)(rows), first)


def test_rows_given_to_the_noise_are_not_overwritten() -> None:
    rows = _rows(10, 16)
    before = rows.clone()
    gaussian(0.5, 3)(rows)
    assert torch.equal(rows, before)


def test_noise_on_the_reference_does_not_move_the_expected_gradient(
    llama: PreTrainedModel, batch: Batch, nearby: Mover, gradients: Gradients
) -> None:
    model = nearby(llama)
    (site,) = resolve(llama, "blocks.0.hook_resid_post")

    def flat(gradient: dict[str, Tensor]) -> Tensor:
        return torch.cat(
            [value.reshape(-1).double() for name, value in gradient.items() if "layers.0" in name]
        )

    expected = flat(gradients(model, keep_representation(site)(model, batch, llama)))
    noisy = noisy_reference(keep_representation(site), site, 0.3, 11)
    draws = torch.stack([flat(gradients(model, noisy(model, batch, llama))) for _ in range(150)])
    # Along fixed directions the mean over draws is the gradient without noise, within its standard
    # error.
    generator = torch.Generator().manual_seed(0)
    directions = [
        expected,
        *torch.randn(6, len(expected), generator=generator, dtype=torch.float64),
    ]
    for direction in directions:
        along = draws @ (direction / direction.norm())
        error = float(along.std()) / math.sqrt(len(along))
        assert error > 0
        assert (
            abs(float(along.mean()) - float(expected @ direction / direction.norm())) < 3.5 * error
        )
    # The expected value, by contrast, grows by nu squared.
    with torch.no_grad():
        hidden = llama(**batch.inputs, output_hidden_states=True).hidden_states[1][
            batch.content_mask
        ]
        nu = 0.3 * float(hidden.norm(dim=-1).mean()) / 4
        rise = [
            float(noisy(model, batch, llama) - keep_representation(site)(model, batch, llama))
            for _ in range(150)
        ]
    values = torch.tensor(rise, dtype=torch.float64)
    assert abs(float(values.mean()) - nu**2) < 3.5 * float(values.std()) / math.sqrt(150)
