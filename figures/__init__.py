"""Figures: a tidy table in, a matplotlib Figure out. No model is ever loaded here, so any figure can be redrawn from a table alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from figures.alignment import alignment
from figures.angles import angles
from figures.causal_map import causal_map
from figures.comparison import ablation, comparison
from figures.convergence import convergence
from figures.curvature import curvature
from figures.density import density
from figures.disruption import disruption
from figures.dose import dose
from figures.drop import drop
from figures.energy import energy
from figures.geometry import geometry
from figures.keyword import keyword
from figures.ladder import ladder
from figures.lens import lens
from figures.lens_map import lens_map
from figures.modules import modules
from figures.names import names
from figures.noise import noise
from figures.plane import plane
from figures.predictors import predictors
from figures.probes import probes, transfer
from figures.recovery import recovery
from figures.resistance import resistance
from figures.scan import scan
from figures.shift import shift
from figures.slices import slices
from figures.smoothing import smoothing
from figures.spectra import spectra
from figures.suffix import suffix
from figures.trigger_theory import trigger_theory
from figures.triggers import triggers
from figures.verbatim import verbatim
from figures.volcano import volcano

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
