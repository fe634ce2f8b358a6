"""Random noise augmentation (RNA): noise on the frozen reference's retain representation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gaussian(ratio: float, seed: int) -> Callable[[Tensor], Tensor]:
    r"""Add isotropic Gaussian noise to rows (Huu-Tien et al., *Improving LLM Unlearning Robustness via Random Perturbations*).

    ``h -> h + nu * N(0, I)``, fresh at every call, every token and every coordinate. ``nu`` is a **standard deviation**, given here by the dimensionless
    ratio ``r = nu * sqrt(width) / mean ||h||`` of the noise's length to the representation's, so that one number fits models of any width.

    Args:
        ratio: ``r``. 0 gives the rows back unchanged.
        seed: of the noise's own random stream.
    """
    if ratio < 0:
        raise ValueError(f"the noise ratio is {ratio}; it must not be negative")
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: Tensor) -> Tensor:
        if ratio == 0:
            return rows
        nu = ratio * rows.norm(dim=-1).mean() / rows.shape[-1] ** 0.5
        return rows + nu * torch.randn(rows.shape, generator=generator, dtype=torch.float32).to(rows.device)

    noise.restart = lambda: generator.manual_seed(seed)  # type: ignore[attr-defined]
    return noise
