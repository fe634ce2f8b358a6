"""Commands about what is inside and around a run's models: ``workbench triggers``, ``representation``, ``sharpness``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.console import Fresh, Json, Workers, clock, emit, out_console, print_frame


def triggers(
    run: Annotated[
        Path, typer.Option(help="A finished run on the built-in world, e.g. runs/demo.")
    ] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder for the experiment.")] = Path("runs/triggers"),
    methods: Annotated[
        str, typer.Option(help="Methods of that run, separated by commas; default all.")
    ] = "",
    asking_only: Annotated[
        bool,
        typer.Option(
            "--asking-only",
            help="Ask the questions, and leave out alignment, causal map, theory and scan (nine tenths of the time).",
        ),
    ] = False,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Put stray words into harmless questions: what does a forget-token break, where in the model, and does it give the forgotten topic away?"""
    from workbench.experiments.claims import decide
    from workbench.experiments.config import read_config
    from workbench.experiments.folder import CONFIG, read_results
    from workbench.experiments.table import COLUMNS, ITEM_COLUMNS, join
    from workbench.experiments.triggers import CLAIMED, run_triggers, trigger_table
    from workbench.figures import FIGURES, figures_of
    from workbench.report.report import save_figure

    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    found = run_triggers(
        run,
        out,
        methods=chosen,
        asking_only=asking_only,
        fresh=fresh,
        workers=workers,
        announce=clock(),
    )
    table = trigger_table(found.results)
    own_results, own_items = read_results(run)
    everything = join(
        [own_results[own_results["stage"] != "triggers"], found.results], COLUMNS
    )  # the ablation of the noise shows forgetting beside the effect
    pictures = {name: out / "figures" / f"{name}.png" for name in figures_of("triggers")}
    for name, path in pictures.items():
        save_figure(FIGURES[name].draw(everything), path)
    verdicts = decide(
        join([own_results, found.results], COLUMNS),
        join([own_items, found.items], ITEM_COLUMNS),
        scale=read_config(run / CONFIG).scale,
        ids=CLAIMED,
    )

    def show() -> None:
        for split, part in table.groupby("word", sort=False):
            out_console.print(f"[bold]{split}[/bold]")
            print_frame(part.drop(columns="word"))
        for verdict in verdicts:
            out_console.print(
                f"{verdict.id}: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]"
            )
        out_console.print(f"figures: {out / 'figures'}")

    emit(
        {
            "folder": str(out),
            "table": table.to_dict(orient="records"),
            "claims": [verdict.plain() for verdict in verdicts],
        },
        as_json,
        show,
    )


def representation(
    run: Annotated[
        Path, typer.Option(help="A finished run on the built-in world, e.g. runs/demo.")
    ] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder for the diagnostics.")] = Path(
        "runs/representation"
    ),
    methods: Annotated[
        str, typer.Option(help="Methods of that run, separated by commas; default all.")
    ] = "",
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Where in the model are the forgotten answers, if anywhere? Logit lens, probes and their transfer, rotation, patching depth."""
    from workbench.experiments.representation import representation_table, run_representation
    from workbench.figures import figures_of
    from workbench.report.report import save_figure

    found = run_representation(
        run,
        out,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        fresh=fresh,
        workers=workers,
        announce=clock(),
    )
    for name, entry in figures_of("representation").items():
        save_figure(entry.draw(found.results), out / "figures" / f"{name}.png")
    table = representation_table(found.results)

    def show() -> None:
        print_frame(table)
        out_console.print(
            f"last block, held-out forgotten facts, mean over seeds; figures: {out / 'figures'}"
        )

    emit({"folder": str(out), "table": table.to_dict(orient="records")}, as_json, show)


def sharpness(
    run: Annotated[
        Path, typer.Option(help="A finished run on the built-in world, e.g. runs/demo.")
    ] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder for the measurements.")] = Path(
        "runs/sharpness"
    ),
    methods: Annotated[
        str, typer.Option(help="Methods of that run, separated by commas; default all.")
    ] = "",
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """The loss around every model before the attack, beside what the attack won back: worst case, average, spectrum, trace, slices, the attack's own path."""
    from workbench.experiments.claims import decide
    from workbench.experiments.config import read_config
    from workbench.experiments.folder import CONFIG, read_results
    from workbench.experiments.predictors import predictor_table
    from workbench.experiments.sharpness import CLAIMED, run_sharpness, sharpness_table
    from workbench.experiments.table import COLUMNS, join
    from workbench.figures import figures_of
    from workbench.report.report import save_figure

    found = run_sharpness(
        run,
        out,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        fresh=fresh,
        workers=workers,
        announce=clock(),
    )
    for name, entry in figures_of("sharpness").items():
        save_figure(entry.draw(found.results), out / "figures" / f"{name}.png")
    table = sharpness_table(found.results)
    correlations = (
        predictor_table(found.predictors.results) if found.predictors is not None else None
    )
    own_results, own_items = read_results(run)
    everything = join([own_results[own_results["stage"] != "sharpness"], found.results], COLUMNS)
    verdicts = [
        verdict
        for verdict in decide(
            everything, own_items, scale=read_config(run / CONFIG).scale, ids=CLAIMED
        )
        if verdict.n
    ]

    def show() -> None:
        print_frame(table)
        if correlations is not None:
            print_frame(correlations)
        for verdict in verdicts:
            out_console.print(
                f"{verdict.id}: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]"
            )
        out_console.print(f"figures: {out / 'figures'}")

    told = {
        "folder": str(out),
        "table": table.to_dict(orient="records"),
        "claims": [verdict.plain() for verdict in verdicts],
    }
    emit(
        told
        | {"correlations": [] if correlations is None else correlations.to_dict(orient="records")},
        as_json,
        show,
    )
