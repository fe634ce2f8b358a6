"""The worst case in a ball: how far a loss falls (what an attacker can win back) or rises (SAM's
sharpness) within a radius of the weights.

At an unlearned model the forget loss is a hill, not a bowl: what matters for relearning is how far
it can *fall*, ``D_rho = L(theta) - min_{||e|| <= rho} L(theta + e)``. To first order it is ``rho
||g||``, to second ``rho ||g|| - rho^2/2 ghat' H ghat``. The sharpness of SAM (Foret et al. 2021,
arXiv 2010.01412) is the same with the opposite sign. Every value is found by a search and so is a
lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError, unknown
from workbench.progress import ProgressCallback, quiet
from workbench.sharpness.curvature import chosen_parameters
from workbench.sharpness.probe import LossSource, checked, probing, value_and_gradient, value_of
from workbench.sharpness.slices import Direction, scaled
from workbench.unlearning.deltas import norm_of
from workbench.unlearning.smoothing.rule import combine

WorstCaseKind = Literal["drop", "rise"]
WORST_CASE_COLUMNS = ("kind", "ball", "steps", "rho", "radius", "length", "loss", "base", "value")

# Where the gradient is exactly zero there is no first direction: the search starts at a random
# point this far (in radii) from the centre.
_OFF_CENTRE = 1e-2


def worst_case(
    model: PreTrainedModel,
    losses: Mapping[str, LossSource],
    attack: str,
    radii: Sequence[float],
    *,
    unit: float = 1.0,
    steps: Sequence[int] = (1, 10),
    kind: WorstCaseKind = "drop",
    adaptive: bool = False,
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> pd.DataFrame:
    """The largest drop (or rise) of one loss in balls around the weights, and what every other loss
    does at the same point.

    The search is projected gradient descent with a normalised gradient and steps that shrink in
    equal parts from ``rho`` to ``rho / k``; the best of its points counts. Its first step goes to
    ``-rho g / ||g||``, SAM's one-step solution. A gradient per step and a forward pass per loss.
    The best point of a smaller budget also counts for a larger one, and that of a smaller ball,
    which lies inside the larger ones, for those: a curve over ``rho`` does not fall.

    Args:
        model: in evaluation mode; left as it was found.
        losses: name to texts (mean token loss, nats per token) or to a function of the model.
        attack: the loss that is followed; the others are evaluated at the point that is best for it
            (held-out forget texts: does the recovery transfer?).
        radii: the grid of ``rho``, in units.
        unit: length of one unit, e.g. ``norm_of(theta_u - theta_o)``: with it ``rho = 1`` is as far
            as unlearning went.
        steps: budgets; each has its own rows.
        kind: ``drop`` (``L(theta) - L(theta + e)``, minimised loss) or ``rise`` (``L(theta + e) -
            L(theta)``, maximised loss).
        adaptive: the ball ``||e / |theta||| <= rho`` of ASAM (Kwon et al. 2021, arXiv 2102.11600,
            with their offset eta at 0): a relative length, the same for ``theta`` and a rescaling
            of it. Weights of zero stay. Such a ``rho`` is not comparable to a Euclidean one.
        parameters: patterns (fnmatch) of the names of trainable parameters that may move.
        seed: of the start where the gradient is exactly zero.
        progress: called after every ball.

    Returns:
        A row per budget, radius and loss: ``kind``, ``ball`` (``l2`` or ``adaptive``), ``steps``,
        ``rho`` (units), ``radius`` (``rho * unit``), ``length`` of the point that was found (in the
        ball's own norm), ``loss``, ``base`` (value at the centre), ``value`` (the drop or rise,
        nats per token for texts; negative where a loss that was not followed went the other way).

    Raises:
        WorkbenchError: bad input, or the attack loss or its gradient is not finite at the centre.
    """
    if attack not in losses:
        raise unknown("attack loss", attack, losses)
    if kind not in ("drop", "rise"):
        raise unknown("kind", kind, ("drop", "rise"))
    if not steps or min(steps) < 1:
        raise WorkbenchError(f"steps is {list(steps)}; give budgets of at least one step")
    grid, (length_of_unit,) = sorted(checked("radii", radii)), checked("unit", [unit])
    sign = -1 if kind == "drop" else 1
    rows, done = [], 0
    with probing(model, losses) as move:
        free = chosen_parameters(model, parameters)
        ball = _Ball(
            free,
            {name: value.detach().abs().clone() for name, value in free.items()}
            if adaptive
            else None,
        )
        base = {name: value_of(model, loss) for name, loss in losses.items()}
        start, first = value_and_gradient(model, losses[attack], free)
        if not all(bool(torch.isfinite(value).all()) for value in first.values()) or not abs(
            start
        ) < float("inf"):
            raise WorkbenchError(
                f"the loss {attack!r} or its gradient is not finite at the model itself, so there "
                "is nothing to follow"
            )
        search = _Search(model, losses[attack], ball, move, sign, start, ball.pull(first), seed)
        smaller: dict[int, _Found] = {}  # by budget: the best in the ball before
        for rho in grid:
            best: _Found = {}, start
            for budget in sorted(steps):
                search_result = search.best(rho * length_of_unit, budget)
                best = smaller[budget] = max(
                    best, smaller.get(budget, best), search_result, key=lambda one: sign * one[1]
                )
                point = best[0]
                move(ball.push(point), 1.0)
                for name, loss in losses.items():
                    change = sign * (value_of(model, loss) - base[name])
                    place = (
                        kind,
                        "adaptive" if adaptive else "l2",
                        budget,
                        rho,
                        rho * length_of_unit,
                        norm_of(point),
                    )
                    rows.append(
                        (*place, name, base[name], change * bool(point))
                    )  # exactly 0 at the centre; not a number stays so
                done += 1
                progress(done, len(grid) * len(steps))
    return pd.DataFrame(rows, columns=list(WORST_CASE_COLUMNS))


_Found = tuple[dict[str, Tensor], float]
"""A point of a ball and the followed loss there."""


@dataclass(frozen=True, slots=True)
class _Ball:
    """``||e|| <= rho``, or with a scale ``||e / scale|| <= rho``; points are kept as ``u = e /
    scale``, so that every ball is round.

    Attributes:
        parameters: what may move.
        scale: a positive length per weight, or none.
    """

    parameters: Mapping[str, Tensor]
    scale: Mapping[str, Tensor] | None

    def push(self, point: Direction) -> dict[str, Tensor]:
        """``u`` to ``e``."""
        return {
            name: value * self.scale[name] if self.scale else value for name, value in point.items()
        }

    def pull(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient with respect to ``e`` to that with respect to ``u``: the same factor."""
        return self.push(gradient)

    def random(self, seed: int) -> dict[str, Tensor]:
        """A Gaussian direction."""
        generator = torch.Generator().manual_seed(seed)
        draw = {
            name: torch.randn(self.parameters[name].shape, generator=generator)
            for name in sorted(self.parameters)
        }
        return {name: draw[name].to(parameter) for name, parameter in self.parameters.items()}


@dataclass(frozen=True, slots=True)
class _Search:
    """Projected gradient descent (``sign`` -1) or ascent (+1) of one loss from the centre of a
    ball.
    """

    model: PreTrainedModel
    loss: LossSource
    ball: _Ball
    move: Callable[[Direction, float], None]
    sign: int
    start: float
    first: dict[str, Tensor]
    seed: int

    def best(self, radius: float, steps: int) -> _Found:
        """The best point found within ``radius``; an empty point is the centre."""
        best: _Found = {}, self.start
        point, slope = best[0], self.first
        if radius and not norm_of(slope):
            point = scaled(self.ball.random(self.seed), _OFF_CENTRE * radius)
            _, slope = self._look(point)
        for step in range(steps if radius else 0):
            length = norm_of(slope)
            if not 0 < length < float("inf"):
                break
            point = combine(
                [(1.0, point), (self.sign * radius * (1 - step / steps) / length, slope)]
            )
            if norm_of(point) > radius:
                point = scaled(point, radius)
            if step + 1 < steps:
                value, slope = self._look(point)
            else:
                self.move(self.ball.push(point), 1.0)
                value = value_of(self.model, self.loss)
            if self.sign * value > self.sign * best[1] and abs(value) < float("inf"):
                best = point, value
        return best

    def _look(self, point: Direction) -> tuple[float, dict[str, Tensor]]:
        self.move(self.ball.push(point), 1.0)
        value, gradient = value_and_gradient(self.model, self.loss, self.ball.parameters)
        return value, self.ball.pull(gradient)
