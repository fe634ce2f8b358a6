"""Commands made from settings: every field is an option, and its value is checked in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from workbench.claims import Verdict
from workbench.console import Fresh, Json, Workers, clock, emit, out_console, print_frame
from workbench.errors import WorkbenchError
from workbench.runner import Experiment, Result, run
from workbench.runs.settings import Settings, read_fields, validated

_KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "", tuple: "LIST", dict: "TEXT"}
NOT_SETTINGS = ("experiment", "of", "plugin")
"""Fields of a finished folder's config.yaml that are no settings."""


def _bare(kind: Any) -> Any:
    """The type of a field without ``None`` and annotations."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    inner = [each for each in get_args(kind) if each is not type(None)]
    if type(None) in get_args(kind) and len(inner) == 1:
        return _bare(inner[0])
    return kind


def _metavar(kind: Any) -> str:
    bare = _bare(kind)
    if get_origin(bare) is Literal:
        return "|".join(map(str, get_args(bare)))
    return _KINDS.get(get_origin(bare) or bare, "TEXT")


def _shown(field: FieldInfo) -> str | bool:
    default = field.default
    if default is None or default is PydanticUndefined or default in ((), False):
        return False
    if isinstance(default, tuple | list):
        return ",".join(map(str, default))
    return False if isinstance(default, dict) else str(default)


def options_of(settings: type[Settings]) -> list[inspect.Parameter]:
    """The options of a command: one for every field, as text that the settings check; flags for
    bools.
    """
    parameters = []
    for name, field in settings.model_fields.items():
        dashed = "--" + name.replace("_", "-")
        about = field.description or name
        if field.is_required():
            about += " [required]"
        if get_origin(_bare(field.annotation)) is list:
            option = typer.Option(dashed, help=about, metavar="TEXT", show_default=False)
            kind: Any = Annotated[list[str] | None, option]
        elif _bare(field.annotation) is bool:
            flag = typer.Option(f"{dashed}/--no-{dashed[2:]}", help=about, show_default=False)
            kind = Annotated[bool | None, flag]
        else:
            option = typer.Option(
                dashed, help=about, metavar=_metavar(field.annotation), show_default=_shown(field)
            )
            kind = Annotated[str | None, option]
        parameter = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind
        )
        parameters.append(parameter)
    return parameters


Config = Annotated[
    Path | None,
    typer.Option(help="YAML file with the same fields; options given beside it win."),
]


def fields_given(
    config: Path | None, options: Mapping[str, Any], settings: type[Settings]
) -> dict[str, Any]:
    """The fields of a file and of the command line together."""
    read = {} if config is None else read_fields(config)
    # a finished folder's own config.yaml, whose seeds are those of the run that was asked
    own_fields = {name for name in NOT_SETTINGS if name in read}
    if own_fields and "seeds" not in settings.model_fields:
        own_fields.add("seeds")
    own_settings = {name: value for name, value in read.items() if name not in own_fields}
    return own_settings | {
        name: value for name, value in options.items() if value not in (None, [])
    }


def command_of(
    name: str,
    settings: type[Settings],
    about: str,
    work: Callable[..., None],
    own: list[inspect.Parameter],
) -> Callable[..., None]:
    """A function with the signature that typer reads.

    Args:
        name: of the command.
        settings: whose fields become options.
        about: its help.
        work: called with ``chosen`` (the settings) and what ``own`` describes.
        own: options besides the fields.
    """

    def command(**given: Any) -> None:
        fields = {key: given.pop(key) for key in settings.model_fields}
        merged = fields_given(given.pop("config"), fields, settings)
        lost = [key for key, field in settings.model_fields.items() if field.is_required()]
        for key in lost:
            if key not in merged:
                raise WorkbenchError(f"workbench {name} needs --{key.replace('_', '-')}")
        work(chosen=validated(settings, merged, f"workbench {name}", options=True), **given)

    common = [
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config
        ),
        inspect.Parameter(
            "workers", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Workers
        ),
        inspect.Parameter("fresh", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Fresh),
        inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json
        ),
    ]
    command.__signature__ = inspect.Signature([*own, *options_of(settings), *common])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    command.__doc__, command.__name__ = about, name
    return command


def folder_option(default: str) -> inspect.Parameter:
    """``--out``."""
    kind = Annotated[Path, typer.Option(help="Its folder.")]
    return inspect.Parameter(
        "out", inspect.Parameter.KEYWORD_ONLY, default=Path(default), annotation=kind
    )


def of_experiment(entry: Experiment[Any]) -> Callable[..., None]:
    """The command of an experiment."""

    def work(
        chosen: Settings,
        out: Path,
        workers: int | None,
        fresh: bool,
        as_json: bool,
        run_folder: Path | None = None,
    ) -> None:
        result = run(
            entry, out, chosen, of=run_folder, fresh=fresh, workers=workers, announce=clock()
        )
        emit(result.plain(), as_json, lambda: show(result))

    parameters = [folder_option(f"runs/{entry.name}")]
    if entry.needs_run:
        about = "A finished run: a demo, a sweep, an investigation."
        kind = Annotated[Path, typer.Option("--run", help=about)]
        default = Path("runs/demo")
        parameters.insert(
            0,
            inspect.Parameter(
                "run_folder", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            ),
        )
    return command_of(entry.name, entry.settings, entry.question, work, parameters)


def say_verdicts(claims: tuple[Verdict, ...]) -> None:
    """One line a claim."""
    for verdict in claims:
        effect = f"{verdict.effect:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]"
        said = verdict.reason if verdict.verdict == "not measured" else effect
        out_console.print(f"{verdict.id}: {verdict.verdict}, {said}")


def show(found: Result) -> None:
    """The table, in parts where it is long, the verdicts, and where the figures are."""
    table, entry = found.table, found.experiment
    printed = table if entry.shown is None or not len(table) else entry.shown(table)
    if entry.by is None or entry.by not in printed:
        print_frame(printed)
    else:
        for value, part in printed.groupby(entry.by, sort=False):
            out_console.print(str(value), style="bold")
            print_frame(part.drop(columns=entry.by))
    say_verdicts(found.claims)
    out_console.print(f"figures: {found.folder / 'figures'}")
