"""The grid from which the demo's settings come: six settings a method, the same for all, fixed
before any of them was run.

Three rates (the one for small models, a third and a tenth of it) times two endings (160 steps,
scaled back to the budget; at most 320 steps, stopped where the budget is reached). A setting is
chosen on another world than the one reported, by what the claims are about: recall of held-out
facts *after* the attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from workbench import metrics
from workbench.errors import WorkbenchError
from workbench.runs.config import Variant
from workbench.tables import fact_table
from workbench.unlearning.methods import find_method, known_settings
from workbench.unlearning.recipe import Setting

RATES = {"r1": 1.0, "r3": 1 / 3, "r10": 1 / 10}
"""Label -> factor on the method's rate for small models."""
ENDINGS: dict[str, dict[str, Setting]] = {
    "scaled": {"steps": 160, "stop": "steps"},
    "stopped": {"steps": 320, "stop": "budget"},
}
"""Label -> settings."""


def settings_grid(methods: Sequence[str]) -> dict[str, Variant]:
    """Six variants of every method, named ``<method>.<rate>.<ending>``.

    Raises:
        WorkbenchError: a method takes no steps (a single gradient has no rate to choose).
    """
    variants = {}
    for name in methods:
        if "steps" not in known_settings(name):
            raise WorkbenchError(f"{name} takes no steps, so there is no grid of its settings")
        rate = find_method(name).small.get("lr", known_settings(name)["lr"])
        for label, factor in RATES.items():
            for ending, settings in ENDINGS.items():
                # three digits, so that a configuration file shows what was meant
                lr = float(f"{float(rate) * factor:.3g}")
                variant = Variant(method=name, settings={"lr": lr, **settings})
                variants[f"{name}.{label}.{ending}"] = variant
    return variants


def preferred(
    variants: Mapping[str, Variant], results: pd.DataFrame, items: pd.DataFrame
) -> pd.DataFrame:
    """Every setting of a grid with what it gave, best of each method first.

    Returns:
        One row a setting: ``method``, ``label``, ``settings``, ``before`` and ``after`` (mean
        recall of held-out facts around the attack), ``reached`` (share of the seeds in which the
        budget was), ``chosen`` (the least recalled after the attack; of equals the first).
    """
    rows = []
    for number, (label, variant) in enumerate(variants.items()):
        attacked_items = items[(items["method"] == label) & (items["stage"] == "relearn")]
        attack = attacked_items[attacked_items["arm"] == "attack"]
        if not len(attack):
            continue
        after = fact_table(attack, x=attack["x"].max())
        reached = metrics.BUDGET_REACHED.rows(results, method=label)
        rows.append(
            {
                "method": variant.method,
                "label": label,
                "settings": ", ".join(f"{key}={value}" for key, value in variant.settings.items()),
                "before": float(fact_table(attack, x=0).to_numpy().mean()),
                "after": float(after.to_numpy().mean()),
                "reached": float(reached["value"].mean()),
                "number": number,
            }
        )
    table = pd.DataFrame(rows).sort_values(["method", "after", "number"], kind="stable")
    table["chosen"] = ~table["method"].duplicated()
    return table.drop(columns="number").reset_index(drop=True)
