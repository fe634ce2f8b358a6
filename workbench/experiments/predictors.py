"""Can recovery be predicted before the attack? Rank correlation of every measure taken before it
with what the attack wins back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workbench import metrics
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import spearman
from workbench.runs.folder import read_results
from workbench.tables import RESULT_COLUMNS, Table, typed
from workbench.unlearning.methods import innermost

CONTROLS = ("base", "never-learned")
PREDICTORS = {
    "displacement": "distance of the weights from the base",
    "top_eigenvalue": "top Hessian eigenvalue of the forget loss",
    "bottom_eigenvalue": "bottom Hessian eigenvalue of the forget loss",
    "gradient_norm": "gradient norm of the forget loss",
    "descent_drop": "drop of the forget loss along the attacker's gradient",
    "shift_forget": "shift of the stream on forget texts",
    "shift_retain": "shift of the stream on neighbours",
    "shift_late": "shift of the stream on forget texts, last block",
    "cka_forget": "1 - CKA with the base on forget texts",
    "energy_in_common": "energy of the change in common directions",
    "disruption_general": "KL to the base on general text",
    "trace": "trace of the Hessian of the forget loss",
    "worst_drop": "worst-case drop of the forget loss, one radius for all",
    "worst_drop_heldout": "drop of the held-out forget loss at that worst point",
    "drop_of_displacement": "worst-case drop within a tenth of the displacement",
    "adaptive_drop": "worst-case drop in an adaptive ball",
    "rise": "SAM's rise of the forget loss",
    "noise_change": "mean change of the forget loss under noise",
    "half_way": "share of the way to the base until the forget loss has halved",
    "recall_before": "recall of held-out facts before the attack",
}
"""What is measured before the attack, in words; ``LANDSCAPE`` takes ``workbench sharpness``."""
LANDSCAPE = (
    "trace",
    "worst_drop",
    "worst_drop_heldout",
    "drop_of_displacement",
    "adaptive_drop",
    "rise",
    "noise_change",
    "half_way",
)
MIN_POINTS = 6
GIVEN = ("recall_before", "displacement")
"""What partial correlations hold fixed: how much was forgotten, and how far the weights went."""


@dataclass(frozen=True, repr=False)
class Predictors:
    """How well every measure predicts recovery.

    Attributes:
        points: one row per run, method and seed: every measure, ``recovery`` (recall won back) and
            ``recall_after``.
        results: tidy rows, in which ``arm`` names the measure and ``split`` the outcome:
            ``recovery_correlation``; ``recovery_within_seed``, of ranks within seeds;
            ``recovery_partial``, with recall before the attack and displacement held fixed; of the
            first and the last also ``..._families``, whose interval resamples families, where there
            are three and more.
    """

    points: pd.DataFrame
    results: pd.DataFrame

    def __repr__(self) -> str:
        return f"Predictors({len(self.points)} models, {self.results['arm'].nunique()} measures)"

    def _repr_html_(self) -> str:
        return predictor_table(self.results).to_html(index=False, escape=True)


def _last(rows: pd.DataFrame, metric: str, **where: object) -> float:
    chosen = rows[rows["metric"] == metric]
    for name, value in where.items():
        chosen = chosen[chosen[name] == value]
    return float(chosen["value"].mean()) if len(chosen) else float("nan")


def _measures(rows: pd.DataFrame) -> dict[str, float]:
    """All measures of one model before the attack from its rows; what was not measured is NaN."""
    rows = rows[rows["arm"].fillna("") != "relearned"]
    stream = rows[rows["site"].fillna("").str.endswith("hook_resid_post")]
    blocks = stream["site"].str.split(".").str[1].astype(float)
    late = stream[blocks == blocks.max()]
    slices = rows[
        (rows["metric"] == metrics.SLICE_LOSS.name)
        & (rows["arm"] == "descent")
        & (rows["split"] == "forget-heldout")
        & (rows["x"] > -1e-9)
    ].sort_values("x")
    energy = metrics.ENERGY_IN_RETAIN_SUBSPACE.rows(rows, x=8)
    return {
        "displacement": _last(rows, "displacement"),
        "top_eigenvalue": _last(rows, "top_eigenvalue"),
        "bottom_eigenvalue": _last(rows, "bottom_eigenvalue"),
        "gradient_norm": _last(rows, "gradient_norm"),
        "descent_drop": float(slices["value"].iloc[0] - slices["value"].min())
        if len(slices)
        else float("nan"),
        "shift_forget": _last(stream, "relative_shift", split="forget-heldout"),
        "shift_retain": _last(stream, "relative_shift", split="retain-neighbour"),
        "shift_late": _last(late, "relative_shift", split="forget-heldout"),
        "cka_forget": 1 - _last(stream, "cka", split="forget-heldout"),
        "energy_in_common": float(energy["value"].mean()) if len(energy) else float("nan"),
        "disruption_general": _last(rows, "disruption", split="general", arm="kl", stage="unlearn"),
        "trace": _last(rows, "trace"),
        "worst_drop": _inside(rows, "drop, fixed radius", "forget-attacked"),
        "worst_drop_heldout": _inside(rows, "drop, fixed radius", "forget-heldout"),
        "drop_of_displacement": _inside(rows, "drop", "forget-attacked"),
        "adaptive_drop": _inside(rows, "adaptive drop", "forget-attacked"),
        "rise": _inside(rows, "rise", "forget-attacked"),
        "noise_change": _largest(
            metrics.NOISE_CHANGE.rows(rows, split="forget-heldout"),
            1,
        ),
        "half_way": _last(rows, "half_at_to_base", split="forget-heldout"),
    }


def _inside(rows: pd.DataFrame, arm: str, split: str) -> float:
    """The value at the second largest radius: the largest one reaches the floor of the loss in many
    models.
    """
    return _largest(
        metrics.DROP.rows(rows, arm=arm, split=split),
        2,
    )


def _largest(rows: pd.DataFrame, place: int) -> float:
    ordered = rows.sort_values("x")
    return float(ordered["value"].iloc[-place]) if len(ordered) >= place else float("nan")


def points_of(results: pd.DataFrame, items: pd.DataFrame, run: str = "") -> pd.DataFrame:
    """One row per unlearned model: the measures before the attack beside the recovery after it."""
    method_rows = results[results["seed"].notna() & ~results["method"].isin(CONTROLS)]
    attacks = items[
        (items["stage"] == "relearn")
        & (items["arm"] == "attack")
        & (items["split"] == "forget-heldout")
    ]
    rows = []
    for (method, seed), part in method_rows.groupby(["method", "seed"], sort=True):
        curve = (
            attacks[(attacks["method"] == method) & (attacks["seed"] == seed)]
            .groupby("x")["correct"]
            .mean()
        )
        if len(curve) < 2:
            continue
        before, after = float(curve.loc[curve.index.min()]), float(curve.loc[curve.index.max()])
        rows.append(
            {
                "run": run,
                "method": method,
                "seed": int(str(seed)),
                **_measures(part),
                "recall_before": before,
                "recall_after": after,
                "recovery": after - before,
            }
        )
    return pd.DataFrame(rows)


def correlate(points: pd.DataFrame) -> Predictors:
    """Spearman's rank correlation of every measure with the recall won back, and with the recall
    after the attack.

    Whole methods are resampled for the interval: seeds and strengths of one method are not
    independent. Nor are the wrapped variants of one method (``npo``, ``npo-sam``, ...), where there
    are many of few: with at least three such families, metrics that end in ``_families`` resample
    those, a wide interval and the honest one then. A measure that fewer than six models have, or
    that is the same for all, is left out.

    Raises:
        WorkbenchError: there are fewer than six models.
    """
    if len(points) < MIN_POINTS:
        raise WorkbenchError(
            f"a rank correlation needs at least {MIN_POINTS} unlearned models; there are "
            f"{len(points)}: more methods, seeds or runs are needed"
        )
    table = Table({"stage": "predictors"})
    for outcome in ("recovery", "recall_after"):
        for measure in PREDICTORS:
            have = points[np.isfinite(points[measure].astype(float))].round(
                {outcome: 9}
            )  # equal recoveries are ties, however they round
            if (
                len(have) < MIN_POINTS
                or have[measure].nunique() < 2
                or have[outcome].nunique() < 2
                or (measure, outcome) == ("recall_before", "recovery")
            ):
                # what was won back is the recall after minus the recall before: correlated with it
                # by construction
                continue
            x, y, groups = (have[name].to_numpy() for name in (measure, outcome, "method"))
            table.add_estimate(
                metrics.RECOVERY_CORRELATION,
                spearman(x, y, groups=groups),
                arm=measure,
                split=outcome,
            )
            if have["seed"].nunique() > 1:
                table.add_estimate(
                    metrics.RECOVERY_WITHIN_SEED,
                    spearman(x, y, groups=groups, within=have["seed"].to_numpy()),
                    arm=measure,
                    split=outcome,
                )
            families = np.array([innermost(name) for name in groups])
            wrapped = 3 <= len(set(families)) < len(set(groups))
            if wrapped:
                table.add_estimate(
                    metrics.RECOVERY_CORRELATION_FAMILIES,
                    spearman(x, y, groups=families),
                    arm=measure,
                    split=outcome,
                )
            held = [
                name
                for name in GIVEN
                if name != measure and np.isfinite(have[name].astype(float)).all()
            ]
            if held:
                partial = spearman(x, y, groups=groups, given=have[held].to_numpy(dtype=float))
                table.add_estimate(metrics.RECOVERY_PARTIAL, partial, arm=measure, split=outcome)
                if wrapped:
                    partial = spearman(
                        x, y, groups=families, given=have[held].to_numpy(dtype=float)
                    )
                    table.add_estimate(
                        metrics.RECOVERY_PARTIAL_FAMILIES, partial, arm=measure, split=outcome
                    )
    return Predictors(points, typed(table.frame(), RESULT_COLUMNS))


def point_rows(points: pd.DataFrame, key: str) -> pd.DataFrame:
    """The points as tidy rows: metrics ``predictor_value`` (``arm`` the measure) and ``outcome``
    (``arm`` ``recovery`` or ``recall_after``).
    """
    table = Table({"run": key, "stage": "predictors"})
    for row in points.to_dict("records"):
        place = {
            "method": row["method"],
            "model": f"{row['method']}-seed{row['seed']}",
            "seed": row["seed"],
        }
        for measure in PREDICTORS:
            if np.isfinite(row[measure]):
                table.add(metrics.PREDICTOR_VALUE, row[measure], arm=measure, **place)
        for outcome in ("recovery", "recall_after"):
            table.add(metrics.OUTCOME, row[outcome], arm=outcome, **place)
    return typed(table.frame(), RESULT_COLUMNS)


def predictors(runs: Sequence[Path]) -> Predictors:
    """The correlations over the models of one or several finished runs (several budgets are several
    strengths of the same methods).

    Raises:
        WorkbenchError: a folder holds no finished run, or there are too few models.
    """
    points = [points_of(*read_results(run), run=run.name) for run in runs]
    return correlate(pd.concat(points, ignore_index=True))


def predictor_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per measure, strongest correlation with the recall won back first."""
    plain = metrics.RECOVERY_CORRELATION.rows(results)
    wide = {
        outcome: plain[plain["split"] == outcome].set_index("arm")
        for outcome in ("recovery", "recall_after")
    }
    won = results[results["split"] == "recovery"]
    fixed = metrics.RECOVERY_PARTIAL.rows(won).set_index("arm")
    by_family = {
        name: won[won["metric"] == f"recovery_{name}_families"].set_index("arm")
        for name in ("correlation", "partial")
    }

    def cell(outcome: str, measure: str) -> str:
        return shown(wide[outcome], measure)

    def shown(rows: pd.DataFrame, measure: str) -> str:
        if measure not in rows.index:
            return "–"
        row = rows.loc[measure]
        return f"{row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"

    order = wide["recovery"]["value"].abs().sort_values(ascending=False).index.tolist() + [
        m for m in wide["recall_after"].index if m not in wide["recovery"].index
    ]
    return pd.DataFrame(
        [
            {
                "measured before the attack": PREDICTORS[measure],
                "with the recall won back": cell("recovery", measure),
                **(
                    {"the same, families resampled": shown(by_family["correlation"], measure)}
                    if len(by_family["correlation"])
                    else {}
                ),
                "the same, recall before and distance held fixed": shown(fixed, measure),
                **(
                    {"held fixed, families resampled": shown(by_family["partial"], measure)}
                    if len(by_family["partial"])
                    else {}
                ),
                "with the recall after the attack": cell("recall_after", measure),
                "models": int(wide["recall_after"].loc[measure, "n"])
                if measure in wide["recall_after"].index
                else int(wide["recovery"].loc[measure, "n"]),
            }
            for measure in order
        ]
    )
