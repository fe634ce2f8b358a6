"""The command line: ``workbench demo``, ``sweep``, ``unlearn``, ``investigate``, ``names``, ``keyword``, ``verbatim``, ``ladder``, ``suffix``, ``triggers``, ``representation``, ``predictors``, ``claims``, ``methods``, ``sites``.

Results go to standard output (one JSON object with ``--json``), progress and logs to standard error. Exit status: 0 done, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table as RichTable

from workbench import attack_commands, diagnostic_commands, values
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

if TYPE_CHECKING:  # the heavy imports happen inside the commands, so that --help answers at once
    from workbench.experiments.config import RunConfig
    from workbench.hooks.sites import Site

app = typer.Typer(
    name="workbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What did unlearning do inside this model, and will it survive?",
    epilog="Every command takes --plugin FILE (repeatable): a Python file with methods, figures, claims or probes of your own.",
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
    from workbench.experiments.config import preset, read_config

    if config is not None and quick:
        raise WorkbenchError("give --quick or --config, not both")
    chosen = read_config(config) if config is not None else preset("quick" if quick else "full")
    _road(chosen, out, workers, fresh, as_json)


def _road(
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
    from workbench.experiments.road import run_road
    from workbench.report import summary_table

    start = time.monotonic()
    run = run_road(config, out, fresh=fresh, workers=workers, announce=clock())
    seconds = time.monotonic() - start

    choice = preferred(config.variants, run.results, run.items) if grid else None

    def show() -> None:
        _print_summary(summary_table(run.results))
        if choice is not None:
            print_frame(choice)
        out_console.print(f"report: {run.folder / 'report.html'}  ({seconds:.0f} s)")

    emit(
        {
            "folder": str(run.folder),
            "report": str(run.folder / "report.html"),
            "seconds": round(seconds, 1),
            "claims": [claim.plain() for claim in run.claims],
            **({} if choice is None else {"grid": choice.to_dict("records")}),
        },
        as_json,
        show,
    )


@app.command()
def sweep(
    out: Annotated[Path, typer.Option(help="Run folder.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas, or 'all', with the settings of the registry; default those of the demo with its own."
        ),
    ] = "",
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="LABEL=METHOD:NAME=VALUE,...",
            help="A method under another name, dtype=bfloat16 for its steps; repeatable.",
        ),
    ] = None,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation",
            help="Add the ablation of the collapsed update: components, side, statistics, kind, precision.",
        ),
    ] = False,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="Six settings of every method (three rates, scaled back to the budget or stopped "
            "at it) in the place of the methods, and which one the attack prefers.",
        ),
    ] = False,
    world: Annotated[
        int | None, typer.Option(min=0, help="Seed of the built-in world; default the demo's.")
    ] = None,
    tagged: Annotated[
        str | None,
        typer.Option(
            help="Whose names stand in the built-in world's speaker tags: surnames (default), or strangers."
        ),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Ask this of every model besides relearning; repeatable; default triggers and sharpness.",
        ),
    ] = None,
    relearning_only: Annotated[
        bool, typer.Option("--relearning-only", help="Leave the trigger and sharpness probes out.")
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds of unlearning and attack.")
    ] = 3,
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a language model into which the world is fine-tuned; default is one from scratch."
        ),
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="Text file that stands for general text; with --pretrained.")
    ] = None,
    training_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps that teach the world to the base and the never-learned control."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Disruption budget, in the unit of --budget-measure.")
    ] = None,
    budget_measure: Annotated[
        str,
        typer.Option(
            help="kl: mean KL to the base, nats per token; loss-rise: as a share of the base's loss."
        ),
    ] = "kl",
    budget_rings: Annotated[
        str,
        typer.Option(
            help="Retain sets that count, separated by commas: retain-neighbour, retain-far, general; default all."
        ),
    ] = "",
    as_trained: Annotated[
        bool,
        typer.Option(
            "--as-trained", help="Match no budget: every model is what its method made of it."
        ),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="METHOD.NAME=VALUE", help="Change a setting of a method; repeatable."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="On the quick world.")] = False,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Run chosen methods, seeds, settings and budget down the demo's road."""
    from workbench.experiments.ablation import collapse_ablation
    from workbench.experiments.config import preset, validated
    from workbench.experiments.grid import settings_grid
    from workbench.models import open_config
    from workbench.unlearning.methods import METHODS

    start = preset("quick" if quick else "full")
    model = start.plain()["model"]
    changes: dict[str, Any] = {
        "seeds": list(range(seeds)),
        "settings": {name: dict(values) for name, values in start.settings.items()},
    }
    if methods:
        changes["methods"] = (
            list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
        )
        # the demo's settings were chosen for its methods: beside methods whose settings were not,
        # they would have an advantage
        kept = changes["settings"] if quick else {}
        changes["settings"] = {n: v for n, v in kept.items() if n in changes["methods"]}
    if pretrained is not None:
        shown = Path(pretrained).name
        changes["scale"] = f"{shown}, {'small ' if quick else ''}built-in world fine-tuned in"
        model |= {
            "pretrained": str(Path(pretrained).resolve())
            if Path(pretrained).is_dir()
            else pretrained
        }
    if general is not None:
        model |= {"general": str(general.resolve())}
    if training_steps is not None:
        model |= {"steps": training_steps}
    if world is not None:
        model |= {"world": model["world"] | {"seed": world}}
    if tagged is not None:
        model |= {"world": model["world"] | {"tagged": tagged}}
    changes["model"] = model
    if budget is not None:
        changes["budget"] = budget
    elif budget_measure == "loss-rise":
        changes["budget"] = 0.001
    if as_trained:
        if budget is not None:
            raise WorkbenchError("--as-trained matches no budget; give it or --budget")
        changes["budget"] = None
    changes |= {
        "budget_measure": budget_measure,
        "budget_rings": [name.strip() for name in budget_rings.split(",") if name.strip()],
    }
    width = (
        int(open_config(pretrained).hidden_size) if pretrained is not None else start.model.width
    )
    named = (
        {label: variant.model_dump() for label, variant in collapse_ablation(width).items()}
        if ablation
        else {}
    )
    for text in variants or []:
        label, equals, rest = text.partition("=")
        if label in named:
            raise WorkbenchError(
                f"--variant {label} was given twice; every label names one variant"
            )
        method, _, overrides = rest.partition(":")
        if not equals or not label or not method:
            raise WorkbenchError(
                f"--variant {text!r} must read LABEL=METHOD:NAME=VALUE,..., e.g. soft-cir=cir:kind=soft"
            )
        own: dict[str, Any] = _settings(overrides.split(",") if overrides else [])
        named[label] = {
            "method": method,
            **({"dtype": own.pop("dtype")} if "dtype" in own else {}),
            "settings": own,
        }
    if named:
        changes["variants"] = named
        changes["methods"] = [*changes.get("methods", start.methods), *named]
    if grid:
        tried = settings_grid(changes.get("methods", start.methods))
        changes["variants"] = {name: variant.model_dump() for name, variant in tried.items()}
        changes["methods"] = list(tried)
    if probe and relearning_only:
        raise WorkbenchError("give --probe or --relearning-only, not both")
    if probe:
        changes["probes"] = probe
    if relearning_only:
        changes["probes"] = []
    for name, value in _settings(settings or []).items():
        method, dot, setting = name.partition(".")
        if not dot:
            raise WorkbenchError(
                f"--set {name}={value} must read METHOD.NAME=VALUE, e.g. --set npo.lr=1e-4"
            )
        changes["settings"].setdefault(method, {})[setting] = value
    config = validated(start.plain() | changes, "workbench sweep")
    _road(config, out, workers, fresh, as_json, grid=grid)


@app.command()
def claims(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="A finished run, and folders of what was asked of its models afterwards "
            "(triggers, sharpness, relearn); their stages take the place of the run's.",
        ),
    ],
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", metavar="ID", help="A claim to decide; repeatable; default all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Decide the claims of the literature on finished runs; nothing is trained."""
    from workbench.experiments.afterwards import read_runs
    from workbench.experiments.claims import CLAIMS, decide

    config, results, items = read_runs(runs)
    for name in ids or []:
        if name not in CLAIMS:
            raise unknown("claim", name, CLAIMS)
    verdicts = decide(results, items, scale=config.scale, ids=ids or None)

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
    from workbench.experiments.afterwards import drawings_of, read_runs
    from workbench.experiments.folder import read_results
    from workbench.figures import FIGURES
    from workbench.report.report import draw_figures

    kinds = [kind.strip() for kind in formats.split(",") if kind.strip()]
    for kind in kinds or [formats]:
        if kind not in ("svg", "pdf", "png"):
            raise unknown("format", kind, ("svg", "pdf", "png"))
    results = read_results(runs[0])[0] if len(runs) == 1 else read_runs(runs)[1]
    chosen = {name: FIGURES[name] for name in names} if names else drawings_of(runs)
    target = out or runs[-1] / "figures"
    drawn = draw_figures(target, results, drawings=chosen, formats=kinds)
    empty = [name for name in chosen if name not in drawn]
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
    """Write the report of a run again, from tables alone, with what was asked of its models since."""
    from workbench.experiments.afterwards import RUN, drawings_of, experiment_of, read_runs
    from workbench.experiments.claims import decide
    from workbench.experiments.road import trained_from
    from workbench.report import write_report

    config, results, items = read_runs(runs)
    (folder,) = (run for run in runs if experiment_of(run) == RUN)
    page = write_report(
        folder,
        results,
        items,
        decide(results, items, scale=config.scale),
        trained=trained_from(config.model),
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
            help="Disruption budget: KL to the base on retain texts, nats per token; 0 keeps the delta as trained."
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
        overrides=_settings(settings or []),
        max_tokens=max_tokens,
        limit=limit,
        columns=named_columns(columns),
        chat=chat,
    )

    def show() -> None:
        out_console.print(
            f"{out}: {note['method']}, alpha {note['alpha']:.3f}, disruption {note['disruption']:.4f}"
        )
        for split, before in note["loss"]["before"].items():
            out_console.print(
                f"  {split}: loss {before:.3f} -> {note['loss']['after'][split]:.3f} nats per token"
            )

    emit({"folder": str(out), **note}, as_json, show)


@app.command()
def investigate(
    base: Annotated[str, typer.Option(help="Folder or hub id of the model before unlearning.")],
    unlearned: Annotated[str, typer.Option(help="Folder or hub id of the model after unlearning.")],
    forget: Annotated[
        Path,
        typer.Option(
            help="Texts that were to be forgotten: .txt, or .jsonl with 'text' or 'question'/'answer'."
        ),
    ],
    retain: Annotated[Path, typer.Option(help="Texts that were to be kept.")],
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/investigation"),
    never_learned: Annotated[
        str | None, typer.Option(help="A model trained without the forget set, if there is one.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of attack seeds.")] = 3,
    attack_steps: Annotated[int, typer.Option(min=1, help="Steps of the relearning attack.")] = 30,
    attack_lr: Annotated[
        float | None,
        typer.Option(
            min=0, help="Its AdamW rate; default 2e-4 below 100 million parameters, 1e-5 above."
        ),
    ] = None,
    columns: Columns = "",
    chat: Chat = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Investigate what unlearning did, from two checkpoints and two text files."""
    from workbench.attacks.relearn import at_steps
    from workbench.experiments.investigate import InvestigateSettings
    from workbench.experiments.investigate import investigate as run_investigation
    from workbench.report import summary_table

    if attack_lr is not None:
        values.rate("--attack-lr", attack_lr)
    attack = None if attack_lr is None else at_steps(attack_steps, attack_lr)
    settings = InvestigateSettings(
        seeds=tuple(range(seeds)),
        attack=attack,
        attack_steps=attack_steps,
        columns=named_columns(columns),
        chat=chat,
    )
    found = run_investigation(
        base,
        unlearned,
        forget,
        retain,
        out,
        never_learned=never_learned,
        settings=settings,
        fresh=fresh,
        announce=clock(),
    )

    def show() -> None:
        _print_summary(summary_table(found.results))
        out_console.print(f"report: {out / 'report.html'}")

    emit(
        {
            "folder": str(out),
            "report": str(out / "report.html"),
            "summary": summary_table(found.results).to_dict(orient="records"),
        },
        as_json,
        show,
    )


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
            "METHOD-... stands for any method above, e.g. grad-diff-sam, adaptive-rmu-rna, npo-rna-sam."
        )

    emit([*listed, *around], as_json, show)


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
    """List the places in a model that can be tapped, in TransformerLens's names and the model's own, with the shape of what flows there."""
    from workbench.hooks.errors import CaptureError
    from workbench.hooks.families import family_of
    from workbench.hooks.outline import outline
    from workbench.models import open_config

    config = open_config(model)
    try:
        found = outline(config)
    except CaptureError as error:
        raise WorkbenchError(f"{model}: {error}") from error
    known = family_of(config)

    def show() -> None:
        lines = [("site", "by path", "shape")]
        lines += [
            (name, f"{path}:{side}", f"[batch, position, {width}]")
            for name, path, side, width in (_alike(found) if not every else map(_one, found))
        ]
        first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
        for line in lines:  # no table of rich's: a name must never be cut to fit the window
            print(f"{line[0]:<{first}}  {line[1]:<{second}}  {line[2]}")
        print(
            "A gradient adds _grad to the site (blocks.0.hook_resid_post_grad). Any other module can be tapped by its path: PATH:in, :out, :grad_in, :grad_out."
        )
        if known is None:
            print(
                f"{config.model_type} has no TransformerLens names here; its modules are listed by path."
            )
        if known is not None and known.experts:
            print(
                "Mixture of experts: the layer's input and output and the router can be tapped. The experts are one module with three-dimensional parameters; "
                "rows of a single expert pass through no module."
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
            for s, width in found
        ],
        as_json,
        show,
    )


def _one(entry: tuple[Site, int]) -> tuple[str, str, str, int]:
    site, width = entry
    return site.name, site.path, site.side, width


def _alike(found: Sequence[tuple[Site, int]]) -> Iterator[tuple[str, str, str, int]]:
    """One line for a site that all blocks have alike: its layers as a range, in the spelling that a pattern accepts."""
    groups: dict[tuple[str, str, int], list[Site]] = {}
    for site, width in found:
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


def _settings(pairs: Sequence[str]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise WorkbenchError(f"--set {pair!r} must read NAME=VALUE, e.g. --set lr=1e-4")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return found


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


for command in (
    attack_commands.names,
    attack_commands.keyword,
    attack_commands.verbatim,
    attack_commands.ladder,
    attack_commands.suffix,
    attack_commands.relearn,
    diagnostic_commands.triggers,
    diagnostic_commands.representation,
    diagnostic_commands.sharpness,
    attack_commands.predictors,
):
    app.command()(command)


def _terminated(number: int, _frame: object) -> None:
    """End like an interruption, so that workers and temporary files go."""
    raise SystemExit(128 + number)


def _without_plugins(arguments: Sequence[str]) -> list[str]:
    """Load every file that follows ``--plugin``, wherever it stands, and give back the rest: names of
    methods and figures must be known before a command looks at its options.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plugin", action="append", default=[])
    try:
        found, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise WorkbenchError("--plugin needs a file") from error
    if found.plugin:
        from workbench.registry import load_plugin

        for file in found.plugin:
            load_plugin(file)
    return rest


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
