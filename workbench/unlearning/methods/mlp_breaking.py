"""MLP breaking with nothing collapsed: CIR's published loss as a method of its own."""

from __future__ import annotations

from transformers import PreTrainedModel

from workbench.unlearning.methods import cir
from workbench.unlearning.recipe import Method, Recipe, Setting


def build(model: PreTrainedModel, seed: int, **settings: Setting) -> Recipe:
    """The MLP-breaking loss, steps of fixed global length, a retain step on the hidden state after
    each; no collapse.
    """
    return cir.build(model, seed, **settings)  # type: ignore[arg-type]


_FIXED: dict[str, Setting] = {
    "loss": "mlp-breaking",
    "activation_components": 0,
    "gradient_components": 0,
}
METHOD = Method(
    "mlp-breaking",
    "MLP breaking",
    cir.SOURCE,
    build,
    {**cir.SMALL, **_FIXED},
    wraps=cir.build,
    fixed=_FIXED,
    colour="#74C476",
)
