"""Commands about attacks: ``workbench names``, ``keyword``, ``verbatim``, ``ladder``, ``suffix``, ``relearn``, ``predictors``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.console import Fresh, Json, Workers, clock, emit, out_console, print_frame


def names(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/names"),
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds, each with a model of its own.")
    ] = 5,
    method: Annotated[
        str, typer.Option(help="Unlearning method; see `workbench methods`.")
    ] = "npo",
    memorise_steps: Annotated[
        int, typer.Option(min=1, help="Steps in which the rows are memorised.")
    ] = 150,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """The names experiment: does an unlearned pair of names come back, the more often it was repeated?"""
    from workbench.experiments.claims import decide
    from workbench.experiments.names import NamesSettings, names_table, run_names
    from workbench.figures.names import names as draw
    from workbench.report.report import save_figure

    settings = NamesSettings(
        seeds=tuple(range(seeds)), method=method, memorise_steps=memorise_steps
    )
    run = run_names(out, settings, fresh=fresh, workers=workers, announce=clock())
    figure = out / "figures" / "names.png"
    save_figure(draw(run.results), figure)
    table = names_table(run.results)
    (verdict,) = decide(
        run.results, run.items, scale="names corpus, 0.3M parameters", ids=["names-repetitions"]
    )

    def show() -> None:
        print_frame(
            table[["repetitions", "base", "unlearned", "relearned", "null text", "published"]]
        )  # --json has every control
        out_console.print(
            f"names-repetitions: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]; {figure}"
        )

    emit(
        {
            "folder": str(out),
            "figure": str(figure),
            "table": table.to_dict(orient="records"),
            "claims": [verdict.plain()],
        },
        as_json,
        show,
    )


def ladder(
    run: Annotated[
        Path, typer.Option(help="A finished run on the built-in world, e.g. runs/demo.")
    ] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder for the ladder.")] = Path("runs/ladder"),
    methods: Annotated[
        str, typer.Option(help="Methods of that run, separated by commas; default all.")
    ] = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of every attack; default those of the run.")
    ] = None,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Attack a run's models with texts from gibberish to the forget set itself, and with adapters, SGD, bf16 weights and fewer texts."""
    from dataclasses import replace

    from workbench.attacks.relearn import at_steps
    from workbench.experiments.config import read_config
    from workbench.experiments.folder import CONFIG, read_results
    from workbench.experiments.ladder import ladder_table, run_ladder
    from workbench.figures.ladder import ladder as draw
    from workbench.report.report import save_figure

    read_results(run)
    own = read_config(run / CONFIG).attack
    attack = own if steps is None else replace(at_steps(steps, own.lr), batch_size=own.batch_size)
    found = run_ladder(
        run,
        out,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        attack=attack,
        fresh=fresh,
        workers=workers,
        announce=clock(),
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

    emit(
        {"folder": str(out), "figure": str(figure), "table": table.to_dict(orient="records")},
        as_json,
        show,
    )


def relearn(
    run: Annotated[
        Path, typer.Option(help="A finished run on the built-in world, e.g. runs/demo.")
    ] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder for the attack.")] = Path("runs/relearn"),
    methods: Annotated[
        str, typer.Option(help="Methods of that run, separated by commas; default all.")
    ] = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the attack; default those of the run.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Its AdamW rate; default the run's.")] = None,
    distance: Annotated[
        float | None,
        typer.Option(
            help="Scale every change of weights to this share of the base's length first; default: as they are."
        ),
    ] = None,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Attack a run's models once more, at another rate or for longer: relearning on the attacker's half of the forget set, and the null attack."""
    from dataclasses import replace

    from workbench.attacks.relearn import at_steps
    from workbench.errors import WorkbenchError
    from workbench.experiments.claims import decide
    from workbench.experiments.config import read_config
    from workbench.experiments.folder import CONFIG, read_results
    from workbench.experiments.reattack import CLAIMED, reattack_table, run_reattack
    from workbench.experiments.table import COLUMNS, join
    from workbench.figures.comparison import comparison as draw
    from workbench.report.report import save_figure

    if lr is not None and not 0 < lr < float("inf"):
        raise WorkbenchError(f"--lr is {lr}; give a positive rate, e.g. 1e-4")
    own_results, _ = read_results(run)
    config = read_config(run / CONFIG)
    attack = replace(config.attack, lr=lr or config.attack.lr)
    if steps is not None:
        attack = replace(attack, steps=steps, measure_at=at_steps(steps, attack.lr).measure_at)
    found = run_reattack(
        run,
        out,
        attack,
        distance=distance,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        fresh=fresh,
        workers=workers,
        announce=clock(),
    )
    replaced = (
        ("relearn",) if distance is None else ("relearn", "unlearn")
    )  # distances and budgets are the run's, unless the models were moved
    everything = join([own_results[~own_results["stage"].isin(replaced)], found.results], COLUMNS)
    figure = out / "figures" / "comparison.png"
    save_figure(draw(everything), figure)
    table = reattack_table(found.results)
    asked = [
        name for name in CLAIMED if distance is None or name != "distance-resists"
    ]  # at one distance there is nothing to correlate
    scale = f"{config.scale}, attack at {attack.lr:g}" + (
        f", distance {distance:g}" if distance else ""
    )
    verdicts = [
        verdict for verdict in decide(everything, found.items, scale=scale, ids=asked) if verdict.n
    ]

    def show() -> None:
        print_frame(
            table[["model", "before", *table.columns[-2:]]]
        )  # the figure and --json have the steps between
        for verdict in verdicts:
            out_console.print(
                f"{verdict.id}: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]"
            )
        out_console.print(f"figure: {figure}")

    emit(
        {
            "folder": str(out),
            "figure": str(figure),
            "table": table.to_dict(orient="records"),
            "claims": [v.plain() for v in verdicts],
        },
        as_json,
        show,
    )


def suffix(
    run: Annotated[
        Path, typer.Option(help="A finished run on the built-in world, e.g. runs/demo.")
    ] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder for the experiment.")] = Path("runs/suffix"),
    methods: Annotated[
        str, typer.Option(help="Methods of that run, separated by commas; default all.")
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="Steps of every search.")] = 50,
    candidates: Annotated[int, typer.Option(min=1, help="Swaps tried in a step.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a suffix.")] = 8,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Search adversarial suffixes for a run's models: do they bring forgotten answers back, and what is left of the accuracy on retain questions?"""
    from workbench.experiments.claims import decide
    from workbench.experiments.config import read_config
    from workbench.experiments.folder import CONFIG
    from workbench.experiments.suffix import CLAIMED, SuffixSettings, run_suffix, suffix_table
    from workbench.figures.suffix import suffix as draw
    from workbench.report.report import save_figure

    settings = SuffixSettings(length=length, steps=steps, candidates=candidates)
    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    found = run_suffix(
        run, out, settings, methods=chosen, fresh=fresh, workers=workers, announce=clock()
    )
    figure = out / "figures" / "suffix.png"
    save_figure(draw(found.results), figure)
    table = suffix_table(found.results)
    verdicts = decide(
        found.results, found.items, scale=read_config(run / CONFIG).scale, ids=CLAIMED
    )

    def show() -> None:
        for questions, part in table.groupby("questions", sort=False):
            out_console.print(f"[bold]{questions}[/bold]")
            print_frame(
                part.drop(columns=["questions", "beyond the control"])
            )  # for the width; --json has it
        for verdict in verdicts:
            effect = (
                f"{verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]"
                if verdict.n
                else verdict.reason
            )
            out_console.print(f"{verdict.id}: {verdict.verdict}, {effect}", markup=False)
        out_console.print(f"figure: {figure}")

    emit(
        {
            "folder": str(out),
            "figure": str(figure),
            "table": table.to_dict(orient="records"),
            "claims": [v.plain() for v in verdicts],
        },
        as_json,
        show,
    )


def predictors(
    run: Annotated[
        list[Path] | None, typer.Option(help="A finished run; repeatable. Default runs/demo.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the figure and the table; default the first run's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Which measure, taken before the attack, tells what the attack will win back? Rank correlations with intervals."""
    from workbench.experiments.predictors import predictor_table
    from workbench.experiments.predictors import predictors as correlate
    from workbench.experiments.table import write_parquet
    from workbench.figures.predictors import predictors as draw
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

    emit(
        {
            "figure": str(figure),
            "models": len(found.points),
            "table": table.to_dict(orient="records"),
        },
        as_json,
        show,
    )


def keyword(
    model: Annotated[str, typer.Option(help="Folder or hub id of a pretrained model.")],
    tofu: Annotated[Path, typer.Option(help="Folder of TOFU-format data.")],
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/keyword"),
    split: Annotated[str, typer.Option(help="Forget split.")] = "forget05",
    keywords: Annotated[
        str,
        typer.Option(
            help="What is withheld: titles (one book of every author) or names (those of every second author)."
        ),
    ] = "titles",
    method: Annotated[
        str, typer.Option(help="Unlearning method; see `workbench methods`.")
    ] = "npo",
    teach_steps: Annotated[
        int, typer.Option(min=1, help="Steps that teach the data to the model.")
    ] = 1200,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds of unlearning and attack.")
    ] = 3,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """The keyword experiment on TOFU-format data: do withheld book titles, or names, come back from texts that never mention them?"""
    from workbench.experiments.claims import decide
    from workbench.experiments.keyword import KeywordSettings, keyword_table, run_keyword
    from workbench.figures.keyword import keyword as draw
    from workbench.report.report import save_figure

    settings = KeywordSettings(
        model,
        str(tofu),
        split,
        keywords,
        seeds=tuple(range(seeds)),
        method=method,
        teach_steps=teach_steps,
    )
    run = run_keyword(settings, out, fresh=fresh, workers=workers, announce=clock())
    figure = out / "figures" / "keyword.png"
    save_figure(draw(run.results), figure)
    table = keyword_table(run.results)
    (verdict,) = decide(
        run.results,
        run.items,
        scale=f"{Path(model).name}, TOFU {split}, {keywords}",
        ids=["keyword-recovery"],
    )

    def show() -> None:
        steps = [name for name in table.columns if name.endswith(" steps")]
        print_frame(
            table[["model", "relearned on", steps[0], steps[-1]]]
        )  # the figure and --json have the steps between
        out_console.print(
            f"keyword-recovery: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]; {figure}"
        )

    emit(
        {
            "folder": str(out),
            "figure": str(figure),
            "table": table.to_dict(orient="records"),
            "claims": [verdict.plain()],
        },
        as_json,
        show,
    )


def verbatim(
    model: Annotated[str, typer.Option(help="Folder or hub id of a pretrained model.")],
    text: Annotated[
        Path, typer.Option(help="Text file of a book; passages of its first third are unlearned.")
    ],
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/verbatim"),
    public: Annotated[
        Path | None,
        typer.Option(
            help="Text file that the attacker has as well, e.g. public information about the book."
        ),
    ] = None,
    words: Annotated[
        int, typer.Option(min=1, help="Words of a passage; half of them are the prompt.")
    ] = 40,
    passages: Annotated[
        int,
        typer.Option(
            min=2,
            help="Passages to be forgotten, and as many that are kept and that no model reads.",
        ),
    ] = 40,
    method: Annotated[
        str, typer.Option(help="Unlearning method; see `workbench methods`.")
    ] = "npo",
    teach_steps: Annotated[
        int, typer.Option(min=1, help="Steps that teach the passages to the model.")
    ] = 300,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds of unlearning and attack.")
    ] = 3,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """The verbatim experiment: do unlearned passages of a book come back word for word from texts that do not hold them?"""
    from workbench.experiments.claims import decide
    from workbench.experiments.verbatim import VerbatimSettings, run_verbatim, verbatim_table
    from workbench.figures.verbatim import verbatim as draw
    from workbench.report.report import save_figure

    settings = VerbatimSettings(
        model,
        str(text),
        None if public is None else str(public),
        words,
        passages,
        passages,
        passages,
        tuple(range(seeds)),
        teach_steps,
        method=method,
    )
    run = run_verbatim(settings, out, fresh=fresh, workers=workers, announce=clock())
    figure = out / "figures" / "verbatim.png"
    save_figure(draw(run.results), figure)
    table = verbatim_table(run.results)
    (verdict,) = decide(
        run.results, run.items, scale=f"{Path(model).name}, {text.name}", ids=["verbatim-recovery"]
    )

    def show() -> None:
        steps = [name for name in table.columns if name.endswith(" steps")]
        print_frame(
            table[["model", "relearned on", steps[0], steps[-1]]]
        )  # the figure and --json have the steps between
        out_console.print(
            f"verbatim-recovery: {verdict.verdict}, {verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]; {figure}"
        )

    emit(
        {
            "folder": str(out),
            "figure": str(figure),
            "table": table.to_dict(orient="records"),
            "claims": [verdict.plain()],
        },
        as_json,
        show,
    )
