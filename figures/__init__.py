"""Figures: a tidy table in, a matplotlib Figure out. No model is ever loaded here, so any figure can be redrawn from a table alone."""

from __future__ import annotations

from collections.abc import Callable
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

FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "comparison": comparison,
    "ablation": ablation,
    "recovery": recovery,
    "smoothing": smoothing,
    "disruption": disruption,
    "energy": energy,
    "geometry": geometry,
    "shift": shift,
    "triggers": triggers,
    "slices": slices,
    "curvature": curvature,
    "spectra": spectra,
    "angles": angles,
}

TRIGGER_FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "triggers": partial(triggers, split="retain, bare word inside"),
    "dose": dose,
    "alignment": alignment,
    "causal_map": causal_map,
    "scan": scan,
    "volcano": volcano,
    "trigger_theory": trigger_theory,
    "noise": noise,
}
"""Those of ``workbench triggers``."""

REPRESENTATION_FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "lens": lens,
    "lens_map": lens_map,
    "probes": probes,
    "transfer": transfer,
}
"""Those of ``workbench representation``."""

SHARPNESS_FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "slices": slices,
    "drop": drop,
    "drop_fixed": partial(drop, kind="drop, fixed radius"),
    "resistance": resistance,
    "density": density,
    "modules": modules,
    "convergence": convergence,
    "attack_plane": partial(
        plane, axes_names=("along the attack (1: its end)", "towards the base (1: base)")
    ),
    "predictors": predictors,
}
"""Those of ``workbench sharpness``."""

__all__ = [
    "FIGURES",
    "REPRESENTATION_FIGURES",
    "SHARPNESS_FIGURES",
    "TRIGGER_FIGURES",
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
