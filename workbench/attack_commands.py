"""Commands about attacks: ``workbench names``, ``keyword``, ``verbatim``, ``ladder``, ``predictors``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.console import Fresh, Json, Workers, clock, emit, out_console, print_frame


def names(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/names"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, each with a model of its own.")] = 5,
    method: Annotated[str, typer.Option(help="Unlearning method; see `workbench methods`.")] = "npo",
    memorise_steps: Annotated[int, typer.Option(min=1, help="Steps in which the rows are memorised.")] = 150,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """The names experiment: does an unlearned pair of names come back, the more often it was repeated?"""
    from figures.names import names as draw
    from workbench.experiments.claims import decide
    from workbench.experiments.names import NamesSettings, names_table, run_names
    from workbench.report.report import save_figure

    settings = NamesSettings(seeds=tuple(range(seeds)), method=method, memorise_steps=memorise_steps)
    run = run_names(out, settings, fresh=fresh, workers=workers, announce=clock())
    figure = out / "figures" / "names.png"
    save_figure(draw(run.results), figure)
    table = names_table(run.results)
    (verdict,) = decide(run.results, run.items, scale="names corpus, 0.3M parameters", ids=["names-repetitions"])

    def show() -> None:
        print_frame(table[["repetitions", "base", "unlearned", "relearned", "null text", "published"]])  # --json has every control
        out_console.print(f"names-repetitions: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]; {figure}")

    emit({"folder": str(out), "figure": str(figure), "table": table.to_dict(orient="records"), "claims": [verdict.plain()]}, as_json, show)


def ladder(
    run: Annotated[Path, typer.Option(help="A finished run on the built-in world, e.g. runs/demo.")] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder for the ladder.")] = Path("runs/ladder"),
    methods: Annotated[str, typer.Option(help="Methods of that run, separated by commas; default all.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every attack; default those of the run.")] = None,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Attack a run's models with texts from gibberish to the forget set itself, and with adapters, SGD, bf16 weights and fewer texts."""
    from dataclasses import replace

    from figures.ladder import ladder as draw
    from workbench.attacks.relearn import at_steps
    from workbench.experiments.config import read_config
    from workbench.experiments.folder import CONFIG, read_results
    from workbench.experiments.ladder import ladder_table, run_ladder
    from workbench.report.report import save_figure

    read_results(run)
    own = read_config(run / CONFIG).attack
    attack = own if steps is None else replace(at_steps(steps, own.lr), batch_size=own.batch_size)
    found = run_ladder(
        run, out, methods=[name.strip() for name in methods.split(",") if name.strip()], attack=attack, fresh=fresh, workers=workers, announce=clock()
    )
    figure = out / "figures" / "ladder.png"
    save_figure(draw(found.results), figure)
    table = ladder_table(found.results)

    def show() -> None:
        for line in table.to_dict(orient="records"):
            out_console.print(f"[bold]{line.pop('model')}[/bold]")
            for arm, value in line.items():
                out_console.print(f"  {arm:<20} {value}", highlight=False, markup=False)
        out_console.print(f"figure: {figure}")

    emit({"folder": str(out), "figure": str(figure), "table": table.to_dict(orient="records")}, as_json, show)


def predictors(
    run: Annotated[list[Path] | None, typer.Option(help="A finished run; repeatable. Default runs/demo.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figure and the table; default the first run's.")] = None,
    as_json: Json = False,
) -> None:
    """Which measure, taken before the attack, tells what the attack will win back? Rank correlations with intervals."""
    from figures.predictors import predictors as draw
    from workbench.experiments.predictors import predictor_table
    from workbench.experiments.predictors import predictors as correlate
    from workbench.experiments.table import write_parquet
    from workbench.report.report import save_figure

    runs = run or [Path("runs/demo")]
    found = correlate(runs)
    folder = out or runs[0]
    figure = folder / "figures" / "predictors.png"
    save_figure(draw(found.results), figure)
    write_parquet(found.results, folder / "predictors.parquet")
    write_parquet(found.points, folder / "predictor_points.parquet")
    table = predictor_table(found.results)

    def show() -> None:
        print_frame(table)
        out_console.print(f"{len(found.points)} models of {len(runs)} run(s); {figure}")

    emit({"figure": str(figure), "models": len(found.points), "table": table.to_dict(orient="records")}, as_json, show)


def keyword(
    model: Annotated[str, typer.Option(help="Folder or hub id of a pretrained model.")],
    tofu: Annotated[Path, typer.Option(help="Folder of TOFU-format data.")],
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/keyword"),
    split: Annotated[str, typer.Option(help="Forget split.")] = "forget05",
    keywords: Annotated[str, typer.Option(help="What is withheld: titles (one book of every author) or names (those of every second author).")] = "titles",
    method: Annotated[str, typer.Option(help="Unlearning method; see `workbench methods`.")] = "npo",
    teach_steps: Annotated[int, typer.Option(min=1, help="Steps that teach the data to the model.")] = 1200,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of unlearning and attack.")] = 3,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """The keyword experiment on TOFU-format data: do withheld book titles, or names, come back from texts that never mention them?"""
    from figures.keyword import keyword as draw
    from workbench.experiments.claims import decide
    from workbench.experiments.keyword import KeywordSettings, keyword_table, run_keyword
    from workbench.report.report import save_figure

    settings = KeywordSettings(model, str(tofu), split, keywords, seeds=tuple(range(seeds)), method=method, teach_steps=teach_steps)
    run = run_keyword(settings, out, fresh=fresh, workers=workers, announce=clock())
    figure = out / "figures" / "keyword.png"
    save_figure(draw(run.results), figure)
    table = keyword_table(run.results)
    (verdict,) = decide(run.results, run.items, scale=f"{Path(model).name}, TOFU {split}, {keywords}", ids=["keyword-recovery"])

    def show() -> None:
        steps = [name for name in table.columns if name.endswith(" steps")]
        print_frame(table[["model", "relearned on", steps[0], steps[-1]]])  # the figure and --json have the steps between
        out_console.print(f"keyword-recovery: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]; {figure}")

    emit({"folder": str(out), "figure": str(figure), "table": table.to_dict(orient="records"), "claims": [verdict.plain()]}, as_json, show)


def verbatim(
    model: Annotated[str, typer.Option(help="Folder or hub id of a pretrained model.")],
    text: Annotated[Path, typer.Option(help="Text file of a book; passages of its first third are unlearned.")],
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/verbatim"),
    public: Annotated[Path | None, typer.Option(help="Text file that the attacker has as well, e.g. public information about the book.")] = None,
    words: Annotated[int, typer.Option(min=1, help="Words of a passage; half of them are the prompt.")] = 40,
    passages: Annotated[int, typer.Option(min=2, help="Passages to be forgotten, and as many that are kept and that no model reads.")] = 40,
    method: Annotated[str, typer.Option(help="Unlearning method; see `workbench methods`.")] = "npo",
    teach_steps: Annotated[int, typer.Option(min=1, help="Steps that teach the passages to the model.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of unlearning and attack.")] = 3,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """The verbatim experiment: do unlearned passages of a book come back word for word from texts that do not hold them?"""
    from figures.verbatim import verbatim as draw
    from workbench.experiments.claims import decide
    from workbench.experiments.verbatim import VerbatimSettings, run_verbatim, verbatim_table
    from workbench.report.report import save_figure

    settings = VerbatimSettings(
        model, str(text), None if public is None else str(public), words, passages, passages, passages, tuple(range(seeds)), teach_steps, method=method
    )
    run = run_verbatim(settings, out, fresh=fresh, workers=workers, announce=clock())
    figure = out / "figures" / "verbatim.png"
    save_figure(draw(run.results), figure)
    table = verbatim_table(run.results)
    (verdict,) = decide(run.results, run.items, scale=f"{Path(model).name}, {text.name}", ids=["verbatim-recovery"])

    def show() -> None:
        steps = [name for name in table.columns if name.endswith(" steps")]
        print_frame(table[["model", "relearned on", steps[0], steps[-1]]])  # the figure and --json have the steps between
        out_console.print(f"verbatim-recovery: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]; {figure}")

    emit({"folder": str(out), "figure": str(figure), "table": table.to_dict(orient="records"), "claims": [verdict.plain()]}, as_json, show)
