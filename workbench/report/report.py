"""Draw the figures, make the tables and fill the page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure

from workbench import metrics
from workbench.attacks.attack import ATTACKS
from workbench.claims import CLAIMS, Outcome, Verdict
from workbench.figures import FIGURES, Drawing, figures_of, figures_of_attacks
from workbench.figures.marks import diverged, further_attacks, main_metric, marks
from workbench.figures.style import look, methods_in, title
from workbench.files import write_file, write_text
from workbench.metrics import matching

CONTROLS = ("base", "never-learned")


def _interval(row: pd.Series | None) -> str:
    if row is None or pd.isna(row["value"]):
        return "–"
    if pd.isna(row["low"]):
        return f"{row['value']:.2f}"
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _pick(table: pd.DataFrame, **where: object) -> pd.Series | None:
    chosen = table[table["seed"].isna()]
    for name, value in where.items():
        chosen = chosen[chosen[name] == value]
    return chosen.iloc[0] if len(chosen) else None


def _mean(
    table: pd.DataFrame,
    method: str,
    metric: str,
    stage: str,
    digits: str,
    *,
    split: str | None = None,
    arm: str | None = None,
) -> str:
    place = (
        table["split"].isna()
        if split is None
        else (table["split"] == split) & (table["arm"] == arm)
    )
    rows = table[
        (table["method"] == method)
        & (table["metric"] == metric)
        & (table["stage"] == stage)
        & place
    ]["value"].dropna()
    return format(float(rows.mean()), digits) if len(rows) else "–"


def _after(table: pd.DataFrame, stage: str, held: Mapping[str, str]) -> str:
    """What is measured at the end of an attack, or where it diverged."""
    broken = diverged(table, stage=stage).get(held["method"])
    if broken is not None:
        return f"diverged at step {broken:g}"
    last = matching(table, stage=stage, arm="attack")["x"].max()
    return _interval(_pick(table, stage=stage, arm="attack", x=last, **held))


def summary_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model: forgetting, cost, recovery, triggers, curvature; intervals over seeds and
    facts.
    """
    metric = main_metric(table)
    attack = table[(table["stage"] == "relearn") & (table["arm"] == "attack")]
    last = float(attack["x"].max()) if len(attack) else np.nan
    rows, said = [], marks(table)
    for method in methods_in(table["method"].dropna().tolist()):
        held = {"method": method, "metric": metric, "split": "forget-heldout"}
        recovery = {"metric": f"recovery_{metric}"}
        broke = recovered_until(table, method)
        eigen = metrics.TOP_EIGENVALUE.rows(table, method=method)["value"].dropna()
        rows.append(
            {
                "model": title(method),
                "alpha": _mean(table, method, "alpha", "unlearn", ".2f"),
                "disruption": _mean(table, method, "disruption", "unlearn", ".4f"),
                "held-out forget, before attack": _interval(
                    _pick(table, stage="relearn", arm="attack", x=0.0, **held)
                ),
                "after attack": broke
                or _interval(_pick(table, stage="relearn", arm="attack", x=last, **held)),
                **{
                    f"after {ATTACKS[stage].title}": _after(table, stage, held)
                    for stage in further_attacks(table)
                },
                "attack minus null": _interval(
                    _pick(table, stage="relearn", arm="minus-null", x=last, **(held | recovery))
                ),
                "attack minus random facts": _interval(
                    _pick(
                        table,
                        stage="relearn",
                        arm="minus-random-facts",
                        x=last,
                        **(held | recovery),
                    )
                ),
                "neighbours": _interval(
                    _pick(
                        table,
                        stage="unlearn",
                        method=method,
                        metric=metric,
                        split="retain-neighbour",
                    )
                ),
                "far facts": _interval(
                    _pick(table, stage="unlearn", method=method, metric=metric, split="retain-far")
                ),
                "KL on general text": _mean(
                    table, method, "disruption", "unlearn", ".4f", split="general", arm="kl"
                ),
                "behind a retain-token": _interval(
                    _pick(table, stage="triggers", method=method, metric=metric, arm="retain-token")
                ),
                "behind a forget-token": _interval(
                    _pick(table, stage="triggers", method=method, metric=metric, arm="forget-token")
                ),
                "top eigenvalue": f"{eigen.median():.3g}" if len(eigen) else "–",
                "beside these numbers": "; ".join(said.get(method, [])) or "–",
            }
        )
    frame = pd.DataFrame(rows)
    return frame.loc[:, [not (frame[name] == "–").all() for name in frame.columns]]


def recovered_until(table: pd.DataFrame, method: str) -> str:
    """Where the attack on a method diverged, in the place of what it brought back; else nothing."""
    step = diverged(table).get(method)
    return "" if step is None else f"diverged at step {step:g}"


def save_figure(figure: Figure, path: Path) -> None:
    """Write one picture, whole or not at all."""

    def write(temporary: Path) -> None:
        # a date inside would make two pictures of one table differ
        figure.savefig(
            temporary,
            format=path.suffix[1:],
            metadata={"Date": None} if path.suffix == ".svg" else None,
        )

    with look():
        write_file(path, write)
    # the room for words is found once: a second picture of the figure is the same, and cheaper
    figure.set_layout_engine("none")


def _data_uri(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def draw_figures(
    out: Path,
    results: pd.DataFrame,
    *,
    drawings: Mapping[str, Drawing] | None = None,
    formats: Sequence[str] = ("png", "svg"),
) -> dict[str, list[Path]]:
    """Draw the figures of a table; one that has nothing to draw is left out.

    Args:
        out: folder for the pictures.
        results: tidy rows.
        drawings: from the registry; default those of a run.
        formats: endings of the files.

    Returns:
        Name -> its files, in the order of ``formats``.
    """
    drawn = {}
    unlearned = results.loc[~results["method"].isin(CONTROLS), "method"].nunique()
    drawings = figures_of("run") if drawings is None else drawings
    for name, drawing in {**drawings, **figures_of_attacks(results)}.items():
        if drawing.least > unlearned:
            continue
        with FIGURES.users(name):
            figure = drawing.draw(results)
        if figure.axes:
            drawn[name] = [out / f"{name}.{kind}" for kind in formats]
            for path in drawn[name]:
                save_figure(figure, path)
    return drawn


def findings(table: pd.DataFrame, claims: Sequence[Verdict]) -> list[str]:
    """What was found, in plain sentences, each with its numbers."""
    metric = main_metric(table)
    noun = "recall" if metric == "recall" else "answer probability"
    attack = table[
        (table["stage"] == "relearn") & (table["arm"] == "attack") & (table["metric"] == metric)
    ]
    sentences = []
    if len(attack):
        last = float(attack["x"].max())

        def at(method: str, step: float) -> pd.Series | None:
            return _pick(
                table,
                stage="relearn",
                arm="attack",
                method=method,
                metric=metric,
                split="forget-heldout",
                x=step,
            )

        base, control = at("base", 0.0), at("never-learned", last)
        if base is not None:
            sentences.append(
                f"Before unlearning, {noun} of the held-out forget facts is {_interval(base)}."
            )
        for method in [
            name for name in methods_in(table["method"].dropna().tolist()) if name not in CONTROLS
        ]:
            before, after = at(method, 0.0), at(method, last)
            if before is not None and recovered_until(table, method):
                sentences.append(
                    f"{title(method)}: {noun} is {_interval(before)} before the attack, which "
                    f"{recovered_until(table, method)}: nothing can be said about what comes back; "
                    "lower its rate."
                )
                continue
            if before is None or after is None:
                continue
            change = float(after["value"] - before["value"])
            verb = "rises to" if change > 0.02 else "falls to" if change < -0.02 else "stays at"
            null = _pick(
                table,
                stage="relearn",
                arm="minus-null",
                method=method,
                metric=f"recovery_{metric}",
                split="forget-heldout",
                x=last,
            )
            within = (
                " inside the disruption budget"
                if (table["metric"] == metrics.BUDGET.name).any()
                else ""
            )
            text = (
                f"{title(method)}: {noun} is {_interval(before)}{within}; after {last:g} steps of "
                f"relearning on other facts it {verb} {_interval(after)}"
            )
            if control is not None:
                text += f", against {_interval(control)} in the model that never learned them"
            if null is not None:
                text += (
                    f"; general text of the same length leaves it {_interval(null)} lower"
                    if null["value"] > 0
                    else f"; the null attack does as much ({_interval(null)})"
                )
            random = _pick(
                table,
                stage="relearn",
                arm="minus-random-facts",
                method=method,
                metric=f"recovery_{metric}",
                split="forget-heldout",
                x=last,
            )
            if random is not None:
                text += f"; the same texts with their answers exchanged leave it {_interval(random)} lower"  # noqa: E501
            sentences.append(text + ".")
        if control is None:
            sentences.append(
                "No never-learned model was given, so this run cannot tell recovery from fresh "
                "learning by itself; "
                + (
                    "the null attack and random facts stand in."
                    if (table["arm"] == "random-facts").any()
                    else "the null attack is the only control."
                )
            )
    for method, words in marks(table).items():
        sentences.append(f"Beside the numbers of {title(method)}: {'; '.join(words)}.")
    if (table["metric"] == metrics.RANDOM_FACTS_POSSIBLE.name).any():
        sentences.append(
            "The control of random facts could not be made: it needs attack texts with different "
            "answers to exchange."
        )
    if (table["metric"] == metrics.TRIGGER_CHECK_POSSIBLE.name).any():
        sentences.append(
            "The trigger check was left out: every retain text already holds the words that would "
            "be put in front of it."
        )
    benign = metrics.BENIGN.rows(table, stage="relearn")["value"]
    if len(benign) and float(benign.min()) < 1:
        sentences.append(
            "The attack texts hold answers of the held-out facts, so this attack must not be "
            "called benign."
        )
    elif len(benign):
        named = (
            (table["metric"] == metrics.LEAKED_SUBJECTS.name)
            & (table["stage"] == "relearn")
            & (table["value"] > 0)
        )
        sentences.append(
            "The leak guard found no held-out answer in the attack texts"
            + (
                ", which do name held-out subjects."
                if named.any()
                else ", and no held-out subject."
            )
        )
    if claims:
        sentences.append(_counted(claims))
    return sentences


def _counted(claims: Sequence[Verdict]) -> str:
    """How many claims got which verdict; what was not measured is not open."""
    of = {
        verdict: [claim.id for claim in claims if claim.verdict == verdict]
        for verdict in get_args(Outcome)
    }
    decided = len(claims) - len(of["not measured"])

    def named(verdict: str) -> str:
        return f"{len(of[verdict])} ({', '.join(of[verdict]) or 'none'})"

    return (
        f"Of {len(claims)} claims of the literature this run measures {decided}: it supports "
        f"{named('supported')}, contradicts {named('contradicted')}, finds no difference that "
        f"matters in {named('equivalent')} and leaves {named('inconclusive')} open; "
        f"{len(of['not measured'])} were not measured."
    )


def write_report(
    out: Path,
    results: pd.DataFrame,
    items: pd.DataFrame,
    claims: Sequence[Verdict],
    *,
    heading: str = "What did unlearning do inside this model, and will it survive?",
    done: Sequence[str] = (),
    trained: str = "",
    notes: Sequence[str] = (),
    drawings: Mapping[str, Drawing] | None = None,
) -> Path:
    """Write ``figures/`` and ``report.html`` into the run folder.

    Args:
        out: the run folder.
        results: tidy rows.
        items: per-fact rows.
        claims: verdicts; may be empty.
        heading: title of the page.
        done: what was done, one sentence each; default describes the built-in pipeline.
        trained: the first of those sentences, where the built-in model did not start from nothing.
        notes: limits to be shown at the end.
        drawings: from the registry of figures; default those of a run.
    """
    pictures = draw_figures(out / "figures", results, drawings=drawings)
    environment = Environment(
        loader=PackageLoader("workbench.report"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    seeds = sorted(
        {int(seed) for seed in results.loc[~results["method"].isin(CONTROLS), "seed"].dropna()}
    )
    captions = {**FIGURES, **figures_of_attacks(results)}
    page = environment.get_template("report.html.j2").render(
        heading=heading,
        done=list(done) or _pipeline_steps(results, seeds, trained or _FROM_SCRATCH),
        findings=findings(results, claims),
        summary=summary_table(results),
        pictures=[
            (name, _data_uri(files[0]), captions[name].caption) for name, files in pictures.items()
        ],
        claims=[(CLAIMS[claim.id], claim, _effect(claim)) for claim in claims],
        notes=list(notes) or _limits(seeds, claims),
        metric="recall" if main_metric(results) == "recall" else "answer probability",
    )
    path = out / "report.html"
    write_text(path, page)
    return path


def _effect(claim: Verdict) -> str:
    return (
        "–"
        if not np.isfinite(claim.effect)
        else f"{claim.effect:+.3f} [{claim.low:+.3f}, {claim.high:+.3f}]"
    )


_FROM_SCRATCH = (
    "A small language model was trained on invented facts about people and islands and on filler "
    "language; a second one, the never-learned control, on the same texts without the people to be "
    "forgotten."
)


def _matched(results: pd.DataFrame) -> str:
    """The sentence about the budget: its size, its measure and the retain sets it was measured
    on.
    """
    rows = metrics.BUDGET.rows(results)
    if not len(rows):
        return "No disruption budget was matched: every model is what its method made of it."
    size, sets = (
        float(rows["value"].iloc[0]),
        sorted(
            results.loc[results["metric"] == metrics.BUDGET_SET.name, "split"].dropna().unique()
        ),
    )
    drift = (
        f"its loss has risen by {size:.3%}"
        if (rows["arm"] == "loss-rise").any()
        else f"the model drifts from the base by {size:g} nats per token (KL)"
    )
    return (
        f"Every weight change was scaled until {drift} on retain texts that no method trained on"
        + (f" ({', '.join(sets)})." if sets else ".")
    )


def _pipeline_steps(results: pd.DataFrame, seeds: Sequence[int], trained: str) -> list[str]:
    methods = [
        title(name)
        for name in methods_in(results["method"].dropna().tolist())
        if name not in CONTROLS
    ]
    attack = results[(results["stage"] == "relearn") & (results["arm"] == "attack")]
    if not len(results):
        return ["Nothing was measured."]
    stages = set(results["stage"].dropna())
    steps = [
        trained,
        f"{len(methods)} unlearning methods ({', '.join(methods)}) were run under {len(seeds)} "
        "seeds each.",
        _matched(results),
        f"Every model was then fine-tuned for {attack['x'].max():g} steps on facts about half "
        "of the forgotten people (and, as a null attack, on general text of the same length), and "
        "asked about the other half.",
    ]
    if "triggers" in stages:
        steps.append(
            "Every model was asked retained questions behind a stray word: a forgotten surname, a "
            "retained one, a neutral one."
        )
    if "sharpness" in stages:
        steps.append(
            "The loss was followed along straight lines through every model, and both ends of its "
            "Hessian's spectrum were computed."
        )
    return steps


def _limits(seeds: Sequence[int], claims: Sequence[Verdict]) -> list[str]:
    scale = claims[0].scale if claims else ""
    notes = [
        f"Scale: {scale}. What holds in a model of this size need not hold in a large one."
        if scale
        else "",
        f"{len(seeds)} seed(s): intervals resample seeds and facts, and so few seeds make them too "
        "short rather than too long.",
        "Unlearning settings were chosen on another world than the one reported here; none was "
        "tuned on these results.",
        "Facts are asked in the sentence forms of training; recall is exact match under greedy "
        "decoding.",
    ]
    return [note for note in notes if note]
