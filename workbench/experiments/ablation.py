"""The ablation of the collapsed update: what each of its parts is worth at the same disruption."""

from __future__ import annotations

from workbench.runs.config import Variant


def collapse_ablation(width: int) -> dict[str, Variant]:
    """Variants of CIR: number of components, side, statistics, kind, precision of the steps.

    Args:
        width: of the residual stream; three quarters of it is the most components tried (all of
            them would leave nothing of the update).
    """
    counts = [count for count in (0, 1, 4, 16, 64) if count < width * 3 // 4] + [width * 3 // 4]
    variants = {
        f"cir-k{count}": Variant(
            method="cir", settings={"activation_components": count, "gradient_components": count}
        )
        for count in counts
    }
    variants |= {
        "cir-activation-side": Variant(method="cir", settings={"gradient_components": 0}),
        "cir-gradient-side": Variant(method="cir", settings={"activation_components": 0}),
        "cir-retain-statistics": Variant(method="cir", settings={"statistics": "retain"}),
        "cir-soft": Variant(method="cir", settings={"kind": "soft"}),
        "cir-quadratic": Variant(method="cir", settings={"kind": "quadratic"}),
        "cir-bf16": Variant(method="cir", dtype="bfloat16"),
        "cir-k0-bf16": Variant(
            method="cir",
            settings={"activation_components": 0, "gradient_components": 0},
            dtype="bfloat16",
        ),
    }
    return variants
