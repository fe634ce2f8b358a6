"""Every experiment of the workbench's own, in the registry."""

from __future__ import annotations

from workbench.experiments.few_shot import FEW_SHOT
from workbench.experiments.keyword import KEYWORD
from workbench.experiments.ladder import LADDER
from workbench.experiments.names import NAMES
from workbench.experiments.quantise import QUANTISE
from workbench.experiments.relearn import RELEARN
from workbench.experiments.representation import REPRESENTATION
from workbench.experiments.sharpness import SHARPNESS
from workbench.experiments.suffix import SUFFIX
from workbench.experiments.triggers import TRIGGERS
from workbench.experiments.verbatim import VERBATIM
from workbench.runner import EXPERIMENTS

EXPERIMENTS.own(
    [
        NAMES,
        KEYWORD,
        VERBATIM,
        LADDER,
        RELEARN,
        SUFFIX,
        FEW_SHOT,
        QUANTISE,
        TRIGGERS,
        REPRESENTATION,
        SHARPNESS,
    ]
)
