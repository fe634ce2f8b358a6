"""Figures: a tidy table in, a matplotlib Figure out. No model is ever loaded here, so any figure can be redrawn from a table alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd
from matplotlib.figure import Figure
from workbench.figures.alignment import alignment
from workbench.figures.angles import angles
from workbench.figures.causal_map import causal_map
from workbench.figures.comparison import ablation, comparison
from workbench.figures.convergence import convergence
from workbench.figures.curvature import curvature
from workbench.figures.density import density
from workbench.figures.disruption import disruption
from workbench.figures.dose import dose
from workbench.figures.drop import drop
from workbench.figures.energy import energy
from workbench.figures.geometry import geometry
from workbench.figures.keyword import keyword
from workbench.figures.ladder import ladder
from workbench.figures.lens import lens
from workbench.figures.lens_map import lens_map
from workbench.figures.modules import modules
from workbench.figures.names import names
from workbench.figures.noise import noise
from workbench.figures.plane import plane
from workbench.figures.predictors import predictors
from workbench.figures.probes import probes, transfer
from workbench.figures.recovery import recovery
from workbench.figures.resistance import resistance
from workbench.figures.scan import scan
from workbench.figures.shift import shift
from workbench.figures.slices import slices
from workbench.figures.smoothing import smoothing
from workbench.figures.spectra import spectra
from workbench.figures.suffix import suffix
from workbench.figures.trigger_theory import trigger_theory
from workbench.figures.triggers import triggers
from workbench.figures.verbatim import verbatim
from workbench.figures.volcano import volcano

from workbench.registry import Registry


@dataclass(frozen=True)
class Drawing:
    """An entry of the registry of figures.

    Attributes:
        name: of the picture's file.
        draw: makes it from a tidy table; without axes where the table has nothing to draw.
        caption: below it in the report.
        of: experiments whose tables it shows; ``run`` is the demo, a sweep and an investigation.
        least: unlearned methods without which it says nothing.
    """

    name: str
    draw: Callable[..., Figure]
    caption: str
    of: tuple[str, ...] = ("run",)
    least: int = 0


FIGURES: Registry[Drawing] = Registry("figure", __name__, "workbench.figures")
FIGURES.own(
    [
        Drawing(
            "comparison",
            comparison,
            "All models at one disruption budget: recall of held-out forgotten facts before "
            "the relearning attack and after it, with 95 % intervals over seeds and facts. A"
            " star marks a model that stays below the budget however far its change is "
            "scaled: it is not at the same price. A dagger marks one whose attack diverged: "
            "its last point is from before that.",
            of=("run", "relearn"),
        ),
        Drawing(
            "ablation",
            ablation,
            "The collapsed update by the number of directions it leaves alone, at one "
            "disruption budget.",
        ),
        Drawing(
            "recovery",
            recovery,
            "Recall of held-out forgotten facts while every model is fine-tuned on facts "
            "about the other half of the forgotten people. Bands are 95 % intervals over "
            "seeds and facts. The dashed grey line is a model that never read the forget "
            "set, under the same attack; dotted is a null attack with general text of the "
            "same length.",
        ),
        Drawing(
            "smoothing",
            smoothing,
            "Recall of the plain method minus that of the smoothed one, paired by seed and "
            "fact: hollow before the attack (left of zero: the smoothed one had forgotten "
            "less), filled after it (right of zero: it resists better).",
        ),
        Drawing(
            "disruption",
            disruption,
            "Every method's weight change, scaled from nothing upwards: what it costs on "
            "retain texts (right is worse) against what is still remembered of the forget "
            "set (down is better). The dot is the model that all other figures use: the last"
            " one inside the budget.",
        ),
        Drawing(
            "triggers",
            triggers,
            "Accuracy on retained questions with a word in front. If only the solid bar "
            "falls, the forget-token acts as a trigger.",
        ),
        Drawing(
            "slices",
            slices,
            "Loss along straight lines through every model. Along the attacker's direction "
            "the forget loss of an unlearned model falls: it sits on a hill, not in a bowl. "
            "Bands are ranges over seeds.",
            of=("run", "sharpness"),
        ),
        Drawing(
            "curvature",
            curvature,
            "Does a measure taken before the attack tell how much the attack wins back? One "
            "point per method and seed.",
            least=2,
        ),
        Drawing(
            "spectra",
            spectra,
            "Principal directions of the base's activations and output gradients on forget "
            "and retain texts, and how much of them is shared.",
        ),
        Drawing(
            "angles",
            angles,
            "Which sets of texts use the same directions of the base's residual stream. "
            "Above the diagonal the overlap of two sets' top subspaces, below it what comes "
            "out when the texts of both are dealt anew (median); a star marks an overlap "
            "below 95 % of those.",
        ),
        Drawing(
            "geometry",
            geometry,
            "Which layer comes back first: the share of unlearning's shift of the residual "
            "stream that the attack has taken back after so many steps (0: as unlearned, 1: "
            "as the base along that way, negative: further away), on held-out forget texts.",
        ),
        Drawing(
            "shift",
            shift,
            "How far unlearning has moved the residual stream from the base's after every "
            "block: on held-out forget texts, on neighbours that should stay as they were, "
            "and on general text. Bands are ranges over seeds.",
        ),
        Drawing(
            "energy",
            energy,
            "How much of every method's weight change acts on the directions that retain "
            "texts use most, against a random change. An update that leaves common "
            "directions alone lies below the dashed line.",
        ),
        Drawing(
            "triggers_inside",
            partial(triggers, split="retain, bare word inside"),
            "Accuracy on retained questions with a word inside. If only the solid bar falls,"
            " the forget-token acts as a trigger.",
            of=("triggers",),
        ),
        Drawing(
            "dose",
            dose,
            "How much accuracy a forget-token costs beyond a retain-token, by the way and "
            "the number of times it is put into a question.",
            of=("triggers",),
        ),
        Drawing(
            "alignment",
            alignment,
            "How far a forget-token in a question turns the residual stream of the model "
            "towards where forget texts are, beside the base and the never-learned model.",
            of=("triggers",),
        ),
        Drawing(
            "causal_map",
            causal_map,
            "Where the damage of a forget-token sits: the share of it that the base's "
            "activations restore, by block, part and position.",
            of=("triggers",),
        ),
        Drawing(
            "scan",
            scan,
            "Precision and recall with which a scan over the vocabulary finds the forgotten names.",
            of=("triggers",),
        ),
        Drawing(
            "volcano",
            volcano,
            "Every word of the vocabulary: how much it raises the loss of the unlearned "
            "model against its standard errors; forgotten and retained names are marked.",
            of=("triggers",),
        ),
        Drawing(
            "trigger_theory",
            trigger_theory,
            "The noise theory of random noise augmentation, measured: bound, change of the "
            "loss and probability of rejection.",
            of=("triggers",),
        ),
        Drawing(
            "noise",
            noise,
            "Forgetting and the effect of a forget-token against the noise of the augmentation.",
            of=("triggers",),
        ),
        Drawing(
            "lens",
            lens,
            "When the forgotten answer becomes readable: probability of the answer by block,"
            " read by the model's own decoder and by the base's.",
            of=("representation",),
        ),
        Drawing("lens_map", lens_map, "The same by block and position.", of=("representation",)),
        Drawing(
            "probes",
            probes,
            "How well a linear probe on the residual stream tells forgotten people apart, by"
            " block.",
            of=("representation",),
        ),
        Drawing(
            "transfer",
            transfer,
            "Probes of the base read on the unlearned model: what is still written where it was.",
            of=("representation",),
        ),
        Drawing(
            "drop",
            drop,
            "How far the forget loss falls inside a ball around every model, for the "
            "attack's facts, for held-out ones and for facts that nobody learned.",
            of=("sharpness",),
        ),
        Drawing(
            "drop_fixed",
            partial(drop, kind="drop, fixed radius"),
            "The same in balls of one radius.",
            of=("sharpness",),
        ),
        Drawing(
            "resistance",
            resistance,
            "Recall won back against measures taken before the attack, one point a model.",
            of=("sharpness",),
        ),
        Drawing(
            "density",
            density,
            "Density of the Hessian's eigenvalues around every model, both signs.",
            of=("sharpness",),
        ),
        Drawing("modules", modules, "Share of the Hessian's trace by module.", of=("sharpness",)),
        Drawing(
            "convergence",
            convergence,
            "How far the Krylov estimates have converged.",
            of=("sharpness",),
        ),
        Drawing(
            "attack_plane",
            partial(
                plane, axes_names=("along the attack (1: its end)", "towards the base (1: base)")
            ),
            "Held-out forget loss in the plane of the attack and the way back to the base.",
            of=("sharpness",),
        ),
        Drawing(
            "predictors",
            predictors,
            "Rank correlation of every measure taken before the attack with what the attack "
            "wins back.",
            of=("sharpness",),
        ),
        Drawing(
            "names",
            names,
            "Success of the prompts by repetitions of the pair, before and after relearning, with controls.",
            of=("names",),
        ),
        Drawing(
            "keyword",
            keyword,
            "Withheld keywords in the answers along the relearning, with controls.",
            of=("keyword",),
        ),
        Drawing(
            "verbatim",
            verbatim,
            "Verbatim recovery of unlearned passages along the relearning, with controls.",
            of=("verbatim",),
        ),
        Drawing(
            "ladder",
            ladder,
            "Recall of held-out facts by attack text and way of attacking.",
            of=("ladder",),
        ),
        Drawing(
            "suffix",
            suffix,
            "Recall and accuracy behind searched and random suffixes.",
            of=("suffix",),
        ),
    ]
)


def figures_of(experiment: str) -> dict[str, Drawing]:
    """The figures of an experiment's tables, users' own among them."""
    return {name: entry for name, entry in FIGURES.items() if experiment in entry.of}


def figure(
    name: str, *, caption: str, of: tuple[str, ...] = ("run",)
) -> Callable[[Callable[[pd.DataFrame], Figure]], Callable[[pd.DataFrame], Figure]]:
    """Decorate a function from a tidy table to a figure: it is drawn after every run and stands in
    the report. It must take any table, and give a figure without axes where there is nothing to
    draw.

    Raises:
        WorkbenchError: the workbench has a figure of this name.
    """

    def register(draw: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
        FIGURES.add(Drawing(name, draw, caption, of))
        return draw

    return register


__all__ = [
    "FIGURES",
    "Drawing",
    "ablation",
    "alignment",
    "angles",
    "causal_map",
    "comparison",
    "convergence",
    "curvature",
    "density",
    "disruption",
    "dose",
    "drop",
    "energy",
    "figure",
    "figures_of",
    "geometry",
    "keyword",
    "ladder",
    "lens",
    "lens_map",
    "modules",
    "names",
    "noise",
    "plane",
    "predictors",
    "probes",
    "recovery",
    "resistance",
    "scan",
    "shift",
    "slices",
    "smoothing",
    "spectra",
    "suffix",
    "transfer",
    "trigger_theory",
    "triggers",
    "verbatim",
    "volcano",
]
