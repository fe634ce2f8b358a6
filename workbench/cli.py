"""The command line. Commands on tables are written here; those with settings
(:data:`COMMANDS_FROM_SETTINGS`) are made from them (:mod:`workbench.commands`).

Results go to standard output (one JSON object with ``--json``), progress and logs to standard
error. Exit status: 0 done, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.main
from rich.markup import escape
from rich.table import Table as RichTable
from typer.core import TyperCommand, TyperGroup

from workbench import values
from workbench.console import (
    Chat,
    Columns,
    Fresh,
    Json,
    Workers,
    clock,
    emit,
    named_columns,
    out_console,
    print_frame,
    say,
)
from workbench.errors import WorkbenchError, unknown
from workbench.experiments import QUESTIONS

if TYPE_CHECKING:  # the heavy imports happen inside the commands, so that --help answers at once
    from workbench.experiments.investigate import InvestigateSettings
    from workbench.experiments.sweep import SweepSettings
    from workbench.hooks.sites import Site
    from workbench.runs.config import RunConfig
    from workbench.runs.pipeline import Run

COMMANDS_FROM_SETTINGS = {
    "sweep": "Methods at one price, on the built-in world or your own model, attacked and probed.",
    "investigate": "What did unlearning do? From two checkpoints and two text files.",
    **QUESTIONS,
}
"""Commands made from settings, with their lines in ``workbench --help``: what they are made of is
imported when one of them is asked for.
"""


class _Lazy(TyperCommand):
    """A command of :data:`COMMANDS_FROM_SETTINGS` or of a plug-in, before it is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name, help=COMMANDS_FROM_SETTINGS.get(name, "An experiment of a plug-in."))

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        return _built_command(str(self.name)).make_context(info_name, args, parent, **extra)


class _Commands(TyperGroup):
    """The commands written below, and those made from settings."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *COMMANDS_FROM_SETTINGS, *_of_plugins()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS_FROM_SETTINGS or cmd_name in _of_plugins():
            return _Lazy(cmd_name)
        return super().get_command(ctx, cmd_name)


def _of_plugins() -> list[str]:
    """Experiments that users added, where a plug-in has loaded them."""
    runner = sys.modules.get("workbench.runner")
    return [] if runner is None else list(runner.EXPERIMENTS.added())


def _built_command(name: str) -> Any:
    """The command itself."""
    from workbench.commands import command_of, folder_option, of_experiment
    from workbench.runner import EXPERIMENTS

    if name == "investigate":
        from workbench.experiments.investigate import InvestigateSettings

        out = folder_option("runs/investigation")
        function = command_of(
            name, InvestigateSettings, COMMANDS_FROM_SETTINGS[name], _investigate, [out]
        )
    elif name == "sweep":
        from workbench.experiments.sweep import SweepSettings

        out = folder_option("runs/sweep")
        function = command_of(name, SweepSettings, COMMANDS_FROM_SETTINGS[name], _sweep, [out])
    else:
        function = of_experiment(EXPERIMENTS[name])
    single = typer.Typer(add_completion=False)
    single.command(name)(function)
    return typer.main.get_command(single)


app = typer.Typer(
    name="workbench",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What did unlearning do inside this model, and will it survive?",
    epilog=(
        "Every command takes --plugin FILE (repeatable): a Python file with methods, figures, "
        "claims or probes of your own."
    ),
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smaller world, two seeds, fewer steps.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with fields to change; see config.yaml of any run."),
    ] = None,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train, unlearn, attack and probe a small model on this machine, and write a report."""
    from workbench.runs.config import preset, read_config

    if config is not None and quick:
        raise WorkbenchError("give --quick or --config, not both")
    chosen = read_config(config) if config is not None else preset("quick" if quick else "full")
    _pipeline(chosen, out, workers, fresh, as_json)


def _pipeline(
    config: RunConfig,
    out: Path,
    workers: int | None,
    fresh: bool,
    as_json: bool,
    *,
    grid: bool = False,
) -> None:
    """Run a configuration and print what came of it."""
    from workbench.experiments.grid import preferred
    from workbench.runs.pipeline import run_pipeline

    start = time.monotonic()
    finished_run = run_pipeline(config, out, fresh=fresh, workers=workers, announce=clock())
    choice = preferred(config.variants, finished_run.results, finished_run.items) if grid else None
    _print_run(finished_run, time.monotonic() - start, as_json, choice)


def _investigate(
    chosen: InvestigateSettings, out: Path, workers: int | None, fresh: bool, as_json: bool
) -> None:
    from workbench.experiments.investigate import investigate

    start = time.monotonic()
    found = investigate(out, chosen, fresh=fresh, workers=workers, announce=clock())
    _print_run(found, time.monotonic() - start, as_json)


def _print_run(finished_run: Run, seconds: float, as_json: bool, choice: Any = None) -> None:
    """Print what came of a run."""
    from workbench.report import summary_table

    summary, page = summary_table(finished_run.results), finished_run.folder / "report.html"

    def show() -> None:
        _print_summary(summary)
        if choice is not None:
            print_frame(choice)
        out_console.print(f"report: {page}  ({seconds:.0f} s)")

    emit(
        {
            "folder": str(finished_run.folder),
            "report": str(page),
            "seconds": round(seconds, 1),
            "summary": summary.to_dict(orient="records"),
            "claims": [claim.plain() for claim in finished_run.claims],
            **({} if choice is None else {"grid": choice.to_dict("records")}),
        },
        as_json,
        show,
    )


def _sweep(
    chosen: SweepSettings, out: Path, workers: int | None, fresh: bool, as_json: bool
) -> None:
    from workbench.experiments.sweep import sweep_config

    _pipeline(sweep_config(chosen), out, workers, fresh, as_json, grid=chosen.grid)


@app.command()
def claims(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Finished runs, and folders of what was asked of their models afterwards "
            "(triggers, sharpness, relearn), whose stages take the place of the run's. Several "
            "runs are decided together.",
        ),
    ],
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", metavar="ID", help="A claim to decide; repeatable; default all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Decide the claims of the literature on finished runs; nothing is trained."""
    from workbench.claims import CLAIMS, decide_over
    from workbench.files import key_of
    from workbench.runs.finished import read_several

    run_tables = read_several(runs)
    for name in ids or []:
        if name not in CLAIMS:
            raise unknown("claim", name, CLAIMS)
    tables = [(results, items, config.scale) for config, results, items in run_tables]
    bases = {key_of(config.plain()["model"]) for config, _, _ in run_tables}
    verdicts = decide_over(tables, ids=ids or None, bases=len(bases))

    def show() -> None:
        table = RichTable(
            "claim", "verdict", "effect [95 %]", "n", "statement", "beside it", box=None
        )
        for verdict in verdicts:
            effect = (
                f"{verdict.effect:+.3f} [{verdict.low:+.3f}, {verdict.high:+.3f}]"
                if verdict.n
                else "–"
            )
            statement = CLAIMS[verdict.id].statement
            cells = (verdict.id, verdict.verdict, effect, str(verdict.n), statement, verdict.reason)
            table.add_row(*map(escape, cells))
        out_console.print(table)

    emit([verdict.plain() for verdict in verdicts], as_json, show)


@app.command("figures")
def draw(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="A folder of any command, or a run with such folders."
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME", help="A figure; repeatable; default all there are."),
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="svg, pdf, png, by commas.")] = "png,svg",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; default figures/ in the last RUN.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw figures again, from tables alone."""
    from workbench.figures import FIGURES
    from workbench.report.report import draw_figures
    from workbench.runs.finished import drawings_of, read_runs
    from workbench.runs.folder import read_results

    kinds = [kind.strip() for kind in formats.split(",") if kind.strip()]
    for kind in kinds or [formats]:
        if kind not in ("svg", "pdf", "png"):
            raise unknown("format", kind, ("svg", "pdf", "png"))
    results = read_results(runs[0])[0] if len(runs) == 1 else read_runs(runs)[1]
    drawings = {name: FIGURES[name] for name in names} if names else drawings_of(runs)
    target = out or runs[-1] / "figures"
    drawn = draw_figures(target, results, drawings=drawings, formats=kinds)
    empty = [name for name in drawings if name not in drawn]
    if (names and empty) or not drawn:
        what = ", ".join(empty) or "any figure"
        raise WorkbenchError(f"nothing to draw for {what} in {', '.join(map(str, runs))}")

    def show() -> None:
        for files in drawn.values():
            for path in files:
                out_console.print(str(path))

    emit({name: [str(path) for path in files] for name, files in drawn.items()}, as_json, show)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="A finished run, and folders of what was asked of its models afterwards.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write the report of a run again, from tables alone, with what was asked of its models
    since.
    """
    from workbench.claims import decide
    from workbench.report import write_report
    from workbench.runs.finished import RUN, drawings_of, experiment_of, read_runs
    from workbench.runs.folder import PROVENANCE

    config, results, items = read_runs(runs)
    (folder,) = (run for run in runs if experiment_of(run) == RUN)
    record, said = folder / PROVENANCE, {}
    if record.is_file():
        said = json.loads(record.read_text(encoding="utf-8")).get("report", {})
    page = write_report(
        folder,
        results,
        items,
        decide(results, items, scale=config.scale),
        **said,
        drawings=drawings_of(runs),
    )
    emit({"report": str(page)}, as_json, lambda: out_console.print(f"report: {page}"))


@app.command()
def unlearn(
    base: Annotated[str, typer.Option(help="Folder or hub id of the model.")],
    forget: Annotated[
        Path,
        typer.Option(help="Texts to forget: .txt, or .jsonl with 'text' or 'question'/'answer'."),
    ],
    retain: Annotated[Path, typer.Option(help="Texts to keep.")],
    out: Annotated[Path, typer.Option(help="Folder for the unlearned checkpoint.")],
    method: Annotated[str, typer.Option(help="See `workbench methods`.")] = "npo",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Change a setting of the method; repeatable."
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            help=(
                "Disruption budget: KL to the base on retain texts, nats per token; 0 keeps the "
                "delta as trained."
            )
        ),
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=8, help="Texts are cut into pieces of this many tokens.")
    ] = 96,
    limit: Annotated[int, typer.Option(min=2, help="Pieces read per file.")] = 256,
    columns: Columns = "",
    chat: Chat = False,
    as_json: Json = False,
) -> None:
    """Unlearn a file from a model and save an ordinary Hugging Face folder."""
    from workbench.experiments.investigate import unlearn_checkpoint
    from workbench.experiments.sweep import settings_given

    values.number("--budget", budget, low=0)
    values.seed("--seed", seed)
    note = unlearn_checkpoint(
        base,
        method,
        forget,
        retain,
        out,
        seed=seed,
        budget=budget or None,
        overrides=settings_given(settings or [], "set"),
        max_tokens=max_tokens,
        limit=limit,
        columns=named_columns(columns),
        chat=chat,
    )

    def show() -> None:
        out_console.print(
            f"{out}: {note['method']}, alpha {note['alpha']:.3f}, disruption "
            f"{note['disruption']:.4f}"
        )
        for split, before in note["loss"]["before"].items():
            out_console.print(
                f"  {split}: loss {before:.3f} -> {note['loss']['after'][split]:.3f} nats per token"
            )

    emit({"folder": str(out), **note}, as_json, show)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the unlearning methods, what can be put around them, and their settings."""
    from workbench.unlearning.methods import METHODS, known_settings
    from workbench.unlearning.wrappers import WRAPPERS, settings_of

    listed: list[dict[str, Any]] = [
        {
            "name": m.name,
            "title": m.title,
            "source": m.source,
            "published": known_settings(m.name),
            "small_models": m.small,
        }
        for m in METHODS.values()
    ]
    around = [
        {
            "name": f"METHOD-{w.name}",
            "title": w.title,
            "source": w.source,
            "published": settings_of(w),
            "small_models": w.small,
        }
        for w in WRAPPERS.values()
    ]

    def show() -> None:
        table = RichTable("name", "source", "settings (published)", box=None)
        for entry in [*listed, *around]:
            table.add_row(
                str(entry["name"]),
                str(entry["source"]),
                ", ".join(f"{k}={v}" for k, v in entry["published"].items()),
            )
        out_console.print(table)
        out_console.print(
            "METHOD-... stands for any method above, e.g. grad-diff-sam, adaptive-rmu-rna, "
            "npo-rna-sam."
        )

    emit([*listed, *around], as_json, show)


@app.command()
def metrics(as_json: Json = False) -> None:
    """List the metrics that tables hold: what they mean, in which unit, along which axes."""
    from workbench.metrics import METRICS

    listed = [asdict(metric) for metric in METRICS.values()]

    def show() -> None:
        table = RichTable("metric", "meaning", "unit", box=None)
        for metric in METRICS.values():
            table.add_row(metric.name, escape(metric.meaning), metric.unit)
        out_console.print(table)

    emit(listed, as_json, show)


@app.command()
def sites(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id. Only its configuration is read, no weights.")
    ],
    every: Annotated[
        bool, typer.Option("--all", help="One line per block, where blocks are alike.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the places in a model that can be tapped, in TransformerLens's names and the model's
    own, with the shape of what flows there.
    """
    from workbench.hooks.errors import CaptureError
    from workbench.hooks.families import family_of
    from workbench.hooks.outline import outline
    from workbench.models import open_config

    config = open_config(model)
    try:
        model_outline = outline(config)
    except CaptureError as error:
        raise WorkbenchError(f"{model}: {error}") from error
    model_family = family_of(config)

    def show() -> None:
        lines = [("site", "by path", "shape")]
        lines += [
            (name, f"{path}:{side}", f"[batch, position, {width}]")
            for name, path, side, width in (
                _grouped_sites(model_outline) if not every else map(_one, model_outline)
            )
        ]
        first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
        for line in lines:  # no table of rich's: a name must never be cut to fit the window
            print(f"{line[0]:<{first}}  {line[1]:<{second}}  {line[2]}")
        print(
            "A gradient adds _grad to the site (blocks.0.hook_resid_post_grad). Any other module "
            "can be tapped by its path: PATH:in, :out, :grad_in, :grad_out."
        )
        if model_family is None:
            print(
                f"{config.model_type} has no TransformerLens names here; its modules are listed by "
                "path."
            )
        if model_family is not None and model_family.experts:
            print(
                "Mixture of experts: the layer's input and output and the router can be tapped. "
                "The experts are one module with three-dimensional parameters; rows of a single "
                "expert pass through no module."
            )

    emit(
        [
            {
                "name": s.name,
                "path": s.path,
                "side": s.side,
                "layer": s.layer,
                "shape": ["batch", "position", width],
            }
            for s, width in model_outline
        ],
        as_json,
        show,
    )


def _one(entry: tuple[Site, int]) -> tuple[str, str, str, int]:
    site, width = entry
    return site.name, site.path, site.side, width


def _grouped_sites(
    sites_and_counts: Sequence[tuple[Site, int]],
) -> Iterator[tuple[str, str, str, int]]:
    """One line for a site that all blocks have alike: its layers as a range, in the spelling that a
    pattern accepts.
    """
    groups: dict[tuple[str, str, int], list[Site]] = {}
    for site, width in sites_and_counts:
        name = (
            site.name.replace(f"blocks.{site.layer}.", "blocks.{}.", 1)
            if site.layer >= 0
            else site.name
        )
        groups.setdefault((name, site.side, width), []).append(site)
    for (name, side, width), sites in groups.items():
        first, last = sites[0].layer, sites[-1].layer
        if len(sites) > 1 and last - first + 1 == len(sites):
            layers = f"{{{first}..{last}}}"
            yield (
                name.replace("{}", layers, 1),
                sites[0].path.replace(f".{first}", f".{layers}", 1),
                side,
                width,
            )
        else:
            for site in sites:
                yield site.name, site.path, side, width


_SHORT = (
    "model",
    "disruption",
    "held-out forget, before attack",
    "after attack",
    "behind a forget-token",
)


def _print_summary(frame: Any) -> None:
    """The columns that fit a terminal; the report has them all."""
    print_frame(frame[[name for name in _SHORT if name in frame.columns]])


@app.command()
def predictors(
    runs: Annotated[
        list[Path] | None,
        typer.Option("--run", help="A finished run; repeatable. Default runs/demo."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the figure and the table; default the first run's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Which measure, taken before the attack, tells what the attack will win back? Rank
    correlations with intervals.
    """
    from workbench.experiments.predictors import predictor_table
    from workbench.experiments.predictors import predictors as correlate
    from workbench.figures.predictors import predictors as draw
    from workbench.report.report import save_figure
    from workbench.tables import write_parquet

    folders = runs or [Path("runs/demo")]
    correlations = correlate(folders)
    folder = out or folders[0]
    figure = folder / "figures" / "predictors.png"
    save_figure(draw(correlations.results), figure)
    write_parquet(correlations.results, folder / "predictors.parquet")
    write_parquet(correlations.points, folder / "predictor_points.parquet")
    table = predictor_table(correlations.results)

    def show() -> None:
        print_frame(table)
        out_console.print(f"{len(correlations.points)} models of {len(folders)} run(s); {figure}")

    emit(
        {
            "figure": str(figure),
            "models": len(correlations.points),
            "table": table.to_dict(orient="records"),
        },
        as_json,
        show,
    )


def _terminated(number: int, _frame: object) -> None:
    """End like an interruption, so that workers and temporary files go."""
    raise SystemExit(128 + number)


def _without_plugins(arguments: Sequence[str]) -> list[str]:
    """Load every file that follows ``--plugin``, wherever it stands, and give back the rest: names
    of methods and figures must be known before a command looks at its options.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plugin", action="append", default=[])
    try:
        options, remaining = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise WorkbenchError("--plugin needs a file") from error
    if options.plugin:
        from workbench.registry import load_plugin

        for file in options.plugin:
            load_plugin(file)
    return remaining


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    warnings.filterwarnings("ignore", category=UserWarning, module="joblib")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                signal.signal(number, _terminated)
    try:
        result = app(
            args=_without_plugins(sys.argv[1:] if arguments is None else arguments),
            prog_name="workbench",
            standalone_mode=False,
        )
    except WorkbenchError as error:
        say(f"error: {error}")
        return 2
    except (
        typer.TyperException
    ) as error:  # an unknown command or option, a missing or unreadable value
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:
            say(f"error: {' '.join(message.split())} (see `workbench --help`)")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except RuntimeError as error:
        errors = sys.modules.get(
            "workbench.hooks.errors"
        )  # imported only if a command got that far: importing it here would load torch for --help
        if errors is None or not isinstance(error, errors.CaptureError):
            raise
        say(f"error: {error}")
        return 2
    if result == 130:  # typer turns Ctrl-C into this status by itself
        say("interrupted; finished stages are kept, and the same command goes on from there")
    return result if isinstance(result, int) else 0


def run() -> None:
    """Entry point of the console command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
