"""Figures: a tidy table in, a matplotlib Figure out. No model is ever loaded here, so any figure
can be redrawn from a table alone.

A figure of one panel draws into an Axes that is given (``ax=``), one of several panels into a
Figure or SubFigure (``figure=``); either returns the Figure that this belongs to, leaves its size
and all else in it alone, and needs its ``layout="constrained"`` so that legends have room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from workbench.attacks.attack import ATTACKS
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
from workbench.figures.marks import further_attacks
from workbench.figures.modules import modules
from workbench.figures.names import names
from workbench.figures.noise import noise
from workbench.figures.plane import plane
from workbench.figures.predictors import predictors
from workbench.figures.probes import probes, transfer
from workbench.figures.prompted import few_shot, quantise
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
        draw: makes it from a tidy table; without axes where the table has nothing to draw. Those
            of the workbench take ``ax`` or ``figure`` to draw into.
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
            "What a forget-token costs in accuracy beyond a retain-token, and beyond the same in "
            "the base, by the way of putting it into a question; 95 % intervals over seeds and "
            "questions.",
            of=("triggers",),
        ),
        Drawing(
            "alignment",
            alignment,
            "Cosine of the residual stream with the direction that unlearning steers to, by block"
            " and by place of the token, for every kind of word; the grey band is the base on the"
            " same texts.",
            of=("triggers",),
        ),
        Drawing(
            "causal_map",
            causal_map,
            "The share of a forget-token's damage that the base's activations restore, by block "
            "and position, for the stream, attention and MLPs; 1 is all of it.",
            of=("triggers",),
        ),
        Drawing(
            "scan",
            scan,
            "Precision against recall of the known forget-tokens, every word of the vocabulary "
            "ranked by what it does to the answer's loss and to the stream. One line per seed.",
            of=("triggers",),
        ),
        Drawing(
            "volcano",
            volcano,
            "Every word of the vocabulary: rise of the answer's loss behind it, unlearned minus "
            "base, against how many standard errors over facts that is; forgotten names coloured,"
            " retained names black.",
            of=("triggers",),
        ),
        Drawing(
            "trigger_theory",
            trigger_theory,
            "What the theory of noise augmentation takes for granted and predicts, measured: the "
            "coordinates of a token's shift, the spectrum of its covariance, eta by steering "
            "coefficient, and the rejection rate.",
            of=("triggers",),
        ),
        Drawing(
            "noise",
            noise,
            "Forgetting and the effect of a forget-token against the size of the noise, one line "
            "per block of the frozen reference that carries it; 95 % intervals over seeds and "
            "facts.",
            of=("triggers",),
        ),
        Drawing(
            "lens",
            lens,
            "Probability of the right answer by block, read with the model's own decoder and with"
            " the base's, beside the base and the never-learned model.",
            of=("representation",),
        ),
        Drawing(
            "lens_map",
            lens_map,
            "What is read at every block with the model's own decoder and with the base's, one "
            "panel per model, the base and the never-learned control first.",
            of=("representation",),
        ),
        Drawing(
            "probes",
            probes,
            "Accuracy of a linear probe trained on every model's own stream, by block, on "
            "subjects that it has not seen; beside the control task, the most frequent label and "
            "the base.",
            of=("representation",),
        ),
        Drawing(
            "transfer",
            transfer,
            "Probes trained on one model's stream and read on another's, by block: the colour "
            "says whose stream trained the probe (black: the base), the dash whose stream it "
            "reads.",
            of=("representation",),
        ),
        Drawing(
            "drop",
            drop,
            "How far every loss falls (nats per token) inside a ball around the model, against "
            "the radius; bold is the mean over seeds, thin lines are seeds.",
            of=("sharpness",),
        ),
        Drawing(
            "drop_fixed",
            partial(drop, kind="drop, fixed radius"),
            "How far every loss falls (nats per token) inside balls of one fixed radius around "
            "every model, against the radius.",
            of=("sharpness",),
        ),
        Drawing(
            "resistance",
            resistance,
            "What the attack wins back against measures taken before it: small points are models "
            "(one per method and seed), large ones means over seeds with their range.",
            of=("sharpness",),
        ),
        Drawing(
            "density",
            density,
            "Density of the Hessian's eigenvalues of either sign (logarithmic), one line per "
            "seed, shaded over the probes; the base stands in every panel.",
            of=("sharpness",),
        ),
        Drawing(
            "modules",
            modules,
            "Mean eigenvalue of every module's own block of the Hessian (its trace over its "
            "number of weights), modules upwards as the stream goes, by method.",
            of=("sharpness",),
        ),
        Drawing(
            "convergence",
            convergence,
            "Running estimates of the Hessian's spectrum against Lanczos steps and Hutchinson "
            "probes, the lowest seed of every method.",
            of=("sharpness",),
        ),
        Drawing(
            "attack_plane",
            partial(
                plane, axes_names=("along the attack (1: its end)", "towards the base (1: base)")
            ),
            "Held-out forget loss (nats per token) in the plane of the attack and the way back to"
            " the base; the cross is the model itself, levels are the same in all panels.",
            of=("sharpness",),
        ),
        Drawing(
            "predictors",
            predictors,
            "Rank correlation of every measure taken before the attack with what the attack wins "
            "back; 95 % intervals resample methods.",
            of=("sharpness",),
        ),
        Drawing(
            "names",
            names,
            "Success by repetitions of the pair before and after relearning, with Wilson "
            "intervals, beside the published numbers (left), and along the relearning (right).",
            of=("names",),
        ),
        Drawing(
            "keyword",
            keyword,
            "Share of withheld titles or names that greedy answers hold (left) and their "
            "probability (right); 95 % intervals over seeds and questions.",
            of=("keyword",),
        ),
        Drawing(
            "verbatim",
            verbatim,
            "ROUGE-L F1 of greedy continuations, their longest verbatim run, and the geometric "
            "mean probability of the true tokens; 95 % intervals over seeds and passages.",
            of=("verbatim",),
        ),
        Drawing(
            "ladder",
            ladder,
            "Recall of the held-out questions before and after an attack with every kind of text "
            "(left), other attack configurations (middle), and recall while new facts are learned "
            "(right).",
            of=("ladder",),
        ),
        Drawing(
            "suffix",
            suffix,
            "Recall and accuracy without a suffix (hollow), behind random ones (grey) and behind "
            "the searched one (filled); 95 % intervals over seeds and facts.",
            of=("suffix",),
        ),
        Drawing(
            "few_shot",
            few_shot,
            "Recall of held-out forgotten facts behind solved questions about other forgotten "
            "facts (solid) and behind the same with shuffled answers (dotted); bands are 95 % "
            "intervals over seeds and facts.",
            of=("few-shot",),
        ),
        Drawing(
            "quantise",
            quantise,
            "Recall of held-out forgotten facts by the bits of the weights, the unlearned models "
            "beside the base and the never-learned one; bands are 95 % intervals over seeds and "
            "facts.",
            of=("quantise",),
        ),
    ]
)


def figures_of(experiment: str) -> dict[str, Drawing]:
    """The figures of an experiment's tables, users' own among them."""
    return {name: entry for name, entry in FIGURES.items() if experiment in entry.of}


def figures_of_attacks(table: pd.DataFrame) -> dict[str, Drawing]:
    """The figures of the attacks besides relearning that the models of a run were put under."""
    found = {}
    for stage in further_attacks(table):
        for name, draw, says in (
            ("recovery", recovery, "Recall of held-out forgotten facts along it"),
            ("comparison", comparison, "Recall of held-out forgotten facts before and after it"),
        ):
            caption = (
                f"Another attack, {ATTACKS[stage].title}. {says}, with 95 % intervals over seeds "
                f"and facts; read as the figure {name}."
            )
            found[f"{name}-{stage}"] = Drawing(
                f"{name}-{stage}", partial(draw, stage=stage), caption
            )
    return found


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
    "few_shot",
    "figure",
    "figures_of",
    "figures_of_attacks",
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
    "quantise",
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
