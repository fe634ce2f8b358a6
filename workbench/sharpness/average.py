"""The average case: how a loss changes under random noise on the weights.

For Gaussian noise of standard deviation ``s`` per weight, ``E L(theta + e) - L(theta) = s^2/2 tr H
+ O(s^4)``, and over draws the change has the variance ``s^2 ||g||^2 + s^4/2 ||H||_F^2``. Random
directions see almost nothing of the few sharp ones: this is no measure of what an attack can reach
(:mod:`workbench.sharpness.drop` is).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.progress import ProgressCallback, quiet
from workbench.sharpness.curvature import chosen_parameters
from workbench.sharpness.probe import LossSource, checked, probing, value_of
from workbench.unlearning.deltas import norm_of

AVERAGE_COLUMNS = ("noise", "sigma", "relative", "draw", "loss", "base", "change")
MEANS = (
    "noise",
    "sigma",
    "relative",
    "loss",
    "base",
    "draws",
    "mean",
    "se",
    "mean_absolute",
    "se_absolute",
)


def noise_changes(
    model: PreTrainedModel,
    losses: Mapping[str, LossSource],
    sigmas: Sequence[float],
    *,
    draws: int = 16,
    adaptive: bool = False,
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """The change of every loss under every draw of noise.

    A seed and the number of a draw decide the noise: all losses, all ``sigma`` and all models with
    the same parameters see the same draws, so differences between them can be taken draw by draw,
    without most of the noise of the draws.

    Args:
        model: in evaluation mode; left as it was found.
        losses: name to texts (mean token loss, nats per token) or to a function of the model.
        sigmas: standard deviations, per weight (``e_i = sigma xi_i``) or adaptive (``e_i = sigma
            |theta_i| xi_i``).
        draws: how many perturbations.
        adaptive: noise in proportion to every weight, which no rescaling of weights changes.
        parameters: patterns (fnmatch) of the names of trainable parameters that get noise.
        seed: of the draws.
        progress: called after every draw.

    Returns:
        A row per draw, ``sigma`` and loss: ``noise`` (``gaussian`` or ``adaptive``), ``sigma``,
        ``relative`` (root of the expected squared length over the length of the weights that get
        noise: ``sigma sqrt(P) / ||theta||``, or ``sigma`` for adaptive noise), ``draw``, ``loss``,
        ``base``, ``change``.

    Raises:
        WorkbenchError: bad input.
    """
    if draws < 1:
        raise WorkbenchError(f"draws is {draws}; give at least 1 (2 for a standard error)")
    levels = checked("sigmas", sigmas)
    rows = []
    with probing(model, losses) as move:
        weights = {
            name: parameter.detach().clone()
            for name, parameter in chosen_parameters(model, parameters).items()
        }
        if not weights:
            raise WorkbenchError(
                "no parameter of the model is trainable, so none gets noise; unfreeze some"
            )
        length, count = norm_of(weights), sum(value.numel() for value in weights.values())
        share = 1.0 if adaptive else (count**0.5 / length if length else float("inf"))
        base = {name: value_of(model, loss) for name, loss in losses.items()}
        for draw in range(draws):
            noise = _noise(weights, seed, draw)
            if adaptive:
                noise = {name: value * weights[name].abs() for name, value in noise.items()}
            for sigma in levels:
                move(noise, sigma)
                for name, loss in losses.items():
                    change = (value_of(model, loss) - base[name]) * bool(sigma)
                    rows.append(
                        (
                            "adaptive" if adaptive else "gaussian",
                            sigma,
                            sigma * share if sigma else 0.0,
                            draw,
                            name,
                            base[name],
                            change,
                        )
                    )
            progress(draw + 1, draws)
    return pd.DataFrame(rows, columns=list(AVERAGE_COLUMNS))


def _noise(weights: Mapping[str, Tensor], seed: int, draw: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
    )
    # sorted, and drawn on the CPU: the same noise whatever the order of the modules and the device
    noise = {
        name: torch.randn(weights[name].shape, generator=generator) for name in sorted(weights)
    }
    return {name: noise[name].to(value) for name, value in weights.items()}


def mean_changes(changes: pd.DataFrame) -> pd.DataFrame:
    """Means over draws with their standard errors.

    Args:
        changes: of :func:`noise_changes`.

    Returns:
        A row per ``noise``, ``sigma`` and loss: ``mean`` change with ``se``, and the mean of its
        absolute value (``mean_absolute``, ``se_absolute``), which does not cancel where a loss
        falls as often as it rises; ``draws`` is their number. With one draw the errors are not a
        number.
    """
    keys = ["noise", "sigma", "relative", "loss", "base"]
    rows = []
    for values, group in changes.groupby(keys, sort=False):
        change = group["change"].to_numpy(dtype=np.float64)
        rows.append((*values, len(change), *_mean(change), *_mean(np.abs(change))))
    return pd.DataFrame(rows, columns=list(MEANS))


def paired_difference(changes: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Mean change minus that of another model under the same draws, with the standard error of the
    paired differences.

    Args:
        changes: of :func:`noise_changes`.
        reference: the same for the other model, with the same seed, ``sigma`` and losses.

    Returns:
        ``noise``, ``sigma``, ``loss``, ``draws``, ``mean``, ``se``.

    Raises:
        WorkbenchError: the two tables do not hold the same draws.
    """
    keys = ["noise", "sigma", "draw", "loss"]
    pairs = changes.merge(reference, on=keys, suffixes=("", "_reference"))
    if not len(changes) == len(reference) == len(pairs):
        raise WorkbenchError(
            "the two tables do not hold the same draws, losses and sigmas; measure both models "
            "with the same arguments"
        )
    pairs["difference"] = pairs["change"] - pairs["change_reference"]
    groups = pairs.groupby(["noise", "sigma", "loss"], sort=False)["difference"]
    rows = [
        (*values, len(group), *_mean(group.to_numpy(dtype=np.float64))) for values, group in groups
    ]
    return pd.DataFrame(rows, columns=["noise", "sigma", "loss", "draws", "mean", "se"])


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(
        values
    ) > 1 else float("nan")
