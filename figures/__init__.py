"""Figures: a tidy table in, a matplotlib Figure out. No model is ever loaded here, so any figure can be redrawn from a table alone."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure

from figures.comparison import ablation, comparison
from figures.curvature import curvature
from figures.disruption import disruption
from figures.recovery import recovery
from figures.slices import slices
from figures.spectra import spectra
from figures.triggers import triggers

FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "comparison": comparison,
    "ablation": ablation,
    "recovery": recovery,
    "disruption": disruption,
    "triggers": triggers,
    "slices": slices,
    "curvature": curvature,
    "spectra": spectra,
}

__all__ = ["FIGURES", "ablation", "comparison", "curvature", "disruption", "recovery", "slices", "spectra", "triggers"]
