"""Users' own entries: by decorator, by file, in other processes, and when a run is opened again."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import typer
import yaml
from matplotlib.figure import Figure

from workbench import registry
from workbench.claims import claim, decide
from workbench.cli import COMMANDS_FROM_SETTINGS, app, main
from workbench.errors import WorkbenchError
from workbench.evaluation.statistics import Estimate
from workbench.figures import FIGURES, figure
from workbench.figures.style import colour, title
from workbench.registry import REGISTRIES
from workbench.report.report import draw_figures
from workbench.runner import COMMANDS, EXPERIMENTS, experiment
from workbench.runs.config import RunConfig, preset, write_config
from workbench.runs.pipeline import Run
from workbench.runs.probing import PROBES, probe
from workbench.unlearning.methods import METHODS, find_method, known_settings, method
from workbench.unlearning.objectives import Objective, negative_cross_entropy
from workbench.unlearning.recipe import EVERYTHING, Recipe

Tables = Callable[..., tuple[pd.DataFrame, pd.DataFrame]]

FILE = """
from workbench.attacks.attack import attack
from workbench.attacks.relearn import RelearnSettings, relearn
from workbench.evaluation.statistics import bootstrap
from workbench.claims import claim
from workbench.runs.probing import probe
from workbench.tables import fact_table
from workbench.figures import figure
from workbench.metrics import metric
from workbench.unlearning.methods import method
from workbench.unlearning.objectives import Objective, negative_cross_entropy, retain_cross_entropy
from workbench.unlearning.recipe import EVERYTHING, Recipe, Rows, Steps


@method("capped", title="Capped ascent", source="a file", colour="#123456", small={"lr": 3e-4})
def capped(model, seed, *, lr: float = 1e-5, steps: Steps = 3, batch_size: Rows = 8):
    terms = Objective(negative_cross_entropy, retain_cross_entropy)
    return Recipe(terms, EVERYTHING, steps, batch_size, lr)


@figure("price", caption="What every method of mine cost.")
def price(table):
    from matplotlib.figure import Figure

    drawn = Figure()
    rows = table[(table["metric"] == "displacement") & (table["stage"] == "unlearn")]
    if len(rows):
        drawn.add_subplot().bar(rows["method"], rows["value"])
    return drawn


metric("weight_size", title="size of the weights", meaning="L2 norm of all weights.")


@probe("weights", title="size of the weights")
def weights(model, setup, table, seed):
    table.add("weight_size", sum(float(p.square().sum()) for p in model.parameters()) ** 0.5)


@attack("gentle", title="gentle relearning")
def gentle(model, tokenizer, texts, seed):
    settings = RelearnSettings(steps=3, lr=1e-4, batch_size=4, measure_at=(0, 3))
    yield from relearn(model, tokenizer, texts, settings, seed=seed)


@claim("capped-forgets", statement="Mine forgets more than NPO.", statistic="recall after: NPO minus mine")
def capped_forgets(results, items):
    after = [fact_table(items, method=name, stage="gentle", arm="attack") for name in ("npo", "capped")]
    return bootstrap((after[0] - after[1]).to_numpy())
"""  # noqa: E501


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Registries as they were; what a test adds is its own."""
    for each in REGISTRIES.values():
        list(each)
    before = [(each, dict(each._entries), dict(each._added)) for each in REGISTRIES.values()]
    files = dict(registry._PLUGINS)
    yield
    for each, entries, added in before:
        each._entries, each._added = entries, added
    registry._PLUGINS.clear()
    registry._PLUGINS.update(files)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def _forget() -> None:
    """As in another process, which knows nothing of a user's file."""
    for each in REGISTRIES.values():
        for name in each.added():
            each._entries.pop(name), each._added.pop(name)
    registry._PLUGINS.clear()


def _build(model: object, seed: int, *, lr: float = 1e-5, steps: int = 3) -> Recipe:
    return Recipe(Objective(negative_cross_entropy), EVERYTHING, steps, 4, lr)


def test_a_decorated_function_is_a_method_like_any_other() -> None:
    method("mine", title="Mine", colour="#abcdef")(_build)
    assert "mine" in METHODS and find_method("mine").build is _build
    assert known_settings("mine") == {"lr": 1e-5, "steps": 3, "stop": "steps"}
    assert (title("mine"), colour("mine")) == ("Mine", "#abcdef")
    assert title("mine-sam") == "Mine+SAM"  # wrappers compose with it
    method("mine", title="Mine again")(_build)  # a cell that runs twice
    assert title("mine") == "Mine again"


@pytest.mark.parametrize("name", ["npo", "rmu-rna"])
def test_the_workbenchs_own_are_not_replaced(name: str) -> None:
    with pytest.raises(WorkbenchError, match=f"called '{name}' already"):
        method(name)(_build)


def test_a_file_adds_its_methods_once_and_is_known_by_its_hash(file: Path) -> None:
    plugin = registry.load_plugin(file)
    assert registry.load_plugin(file) == plugin and registry.plugins() == (plugin,)
    assert registry.source_of(METHODS["capped"]) == plugin
    file.write_text(FILE + "\n# changed\n", encoding="utf-8")
    with pytest.raises(WorkbenchError, match="not the one that the run was made with"):
        registry.load_plugin(file, plugin.sha256)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "adds nothing"),
        ("import nowhere_at_all", "cannot be imported: ModuleNotFoundError"),
        ("def broken(:", "cannot be imported: SyntaxError"),
        (FILE.replace('"capped"', '"npo"'), "already"),
    ],
)
def test_a_file_that_is_none_is_an_error_that_names_it(
    content: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(WorkbenchError, match=says):
        registry.load_plugin(path)
    with pytest.raises(WorkbenchError, match="no plug-in file"):
        registry.load_plugin(tmp_path / "nowhere.py")


def test_of_half_a_file_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text(FILE + "\nraise KeyError('late')\n", encoding="utf-8")
    with pytest.raises(WorkbenchError, match="cannot be imported: KeyError"):
        registry.load_plugin(path)
    assert "capped" not in METHODS and "price" not in FIGURES and "weights" not in PROBES


@pytest.mark.parametrize("name", ["base", "never-learned", "Never-Learned", "../x", "a b", ""])
def test_a_name_that_cannot_be_a_folder_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(WorkbenchError, match="name"):
        method(name)(_build)
    assert not METHODS.added()


@pytest.mark.parametrize("name", ["unlearn", "relearn", "budget", "subspaces", "triggers", "a/b"])
def test_a_probe_does_not_take_the_place_of_a_stage(name: str) -> None:
    with pytest.raises(WorkbenchError, match="name"):
        probe(name)(lambda model, setup, table, seed: None)


def test_a_failing_function_of_a_users_is_one_line_with_its_place(
    make_tables: Tables, tmp_path: Path
) -> None:
    results, items = make_tables()

    @figure("broken", caption="none")
    def broken(table: pd.DataFrame) -> Figure:
        raise ZeroDivisionError("mine")

    @claim("broken-claim", statement="s", statistic="s")
    def wrong(results: pd.DataFrame, items: pd.DataFrame) -> Estimate:
        raise ZeroDivisionError("mine")

    for call in (
        lambda: draw_figures(tmp_path, results, drawings={"broken": FIGURES["broken"]}),
        lambda: decide(results, items, scale="t", ids=["broken-claim"]),
    ):
        with pytest.raises(WorkbenchError, match=r"broken.*test_plugins\.py:\d+: ZeroDivision"):
            call()


def test_a_function_without_source_is_remembered_by_what_it_does() -> None:
    space: dict[str, object] = {"Recipe": Recipe}
    exec("def typed(model, seed, *, lr: float = 1e-5): return Recipe", space)
    method("typed")(space["typed"])  # type: ignore[arg-type]
    assert len(registry.source_of(METHODS["typed"]).sha256) == 64


def test_a_configuration_remembers_what_it_needs(file: Path) -> None:
    assert "plugins" not in RunConfig().plain()
    plugin = registry.load_plugin(file)
    config = preset("quick").model_copy(update={"methods": ("capped",), "settings": {}})
    text = write_config(config.with_plugins())
    fields = yaml.safe_load(text)
    assert fields["plugins"] == [{"file": plugin.file, "sha256": plugin.sha256}]
    _forget()
    again = RunConfig.model_validate(fields)  # another process
    assert "capped" in METHODS and write_config(again) == text
    file.write_text(FILE + "\n# changed\n", encoding="utf-8")
    registry._PLUGINS.clear()
    with pytest.raises(ValueError, match="SHA-256 differs"):
        RunConfig.model_validate(fields)


def test_a_function_of_a_notebook_is_remembered_by_its_source() -> None:
    method("mine")(_build)
    config = preset("quick").model_copy(update={"methods": ("mine",), "settings": {}})
    (source,) = config.with_plugins().plugins
    assert source.file == __name__ and len(source.sha256) == 64
    fields = yaml.safe_load(write_config(config.with_plugins()))
    assert RunConfig.model_validate(fields).methods == ("mine",)
    _forget()
    with pytest.raises(ValueError, match="define the same one again"):
        RunConfig.model_validate(fields)


@pytest.mark.slow
def test_a_plug_in_is_swept_with_two_workers_and_appears_everywhere(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["sweep", "--quick", "--methods", "capped,npo", "--seeds", "1", "--probe", "weights"]
    command += ["--attack", "gentle", "--attack", "relearn-lora"]
    options = ["--set", "npo.steps=3", "--out", str(out), "--workers", "2", "--json"]
    assert main([*command, "--plugin", str(file), *options]) == 0
    capsys.readouterr()
    table = pd.read_parquet(out / "results.parquet")
    assert {"capped", "npo"} <= set(table["method"].dropna())
    asked = table[(table["metric"] == "weight_size") & (table["stage"] == "weights")]
    assert set(asked["method"]) == {"capped", "npo", "base", "never-learned"}
    curves = pd.read_parquet(out / "curves.parquet")
    for name, steps in (("gentle", {0, 3}), ("relearn-lora", {0, 2, 5, 10, 20})):
        rows = curves[(curves["stage"] == name) & (curves["metric"] == "recall")]
        assert set(rows["method"]) == {"capped", "npo", "base", "never-learned"}
        assert set(rows["x"]) == steps and set(rows["arm"]) == {"attack", "null"}
        recovered = curves[(curves["stage"] == name) & (curves["metric"] == "recovery_recall")]
        assert set(recovered["arm"]) == {"minus-null", "minus-never-learned"}
        assert (out / "figures" / f"recovery-{name}.png").is_file()
        assert (out / "figures" / f"comparison-{name}.png").is_file()
    summary = (out / "report.html").read_text(encoding="utf-8")
    assert "after gentle relearning" in summary and "after relearning with LoRA" in summary
    assert "Another attack, gentle relearning." in summary
    assert "Capped ascent" in (out / "report.html").read_text(encoding="utf-8")
    assert "Mine forgets more than NPO." in (out / "report.html").read_text(encoding="utf-8")
    assert "What every method of mine cost." in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "figures" / "price.png").is_file()
    assert "Capped ascent" in (out / "figures" / "comparison.svg").read_text(encoding="utf-8")
    _forget()
    assert main(["relearn", "--run", str(out), "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["table"]
    assert "capped" in METHODS  # the run brought it
    capsys.readouterr()
    _forget()
    folders = [str(out), str(tmp_path / "again")]
    assert main(["claims", *folders, "--id", "capped-forgets", "--json"]) == 0
    (verdict,) = json.loads(capsys.readouterr().out)
    assert (verdict["id"], verdict["verdict"]) == ("capped-forgets", "inconclusive")  # one seed
    assert main(["claims", str(out), "--plugin"]) == 2
    assert "--plugin needs a file" in capsys.readouterr().err


def test_workers_are_given_what_they_lack() -> None:
    method("mine")(_build)
    entries = registry.added()
    _forget()
    assert "mine" not in METHODS
    registry.take(entries)
    assert METHODS["mine"].build is _build


def _package(folder: Path, code: str) -> None:
    (folder / "mine_package.py").write_text(code, encoding="utf-8")
    info = folder / "mine_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[workbench.methods]\nmine = mine_package\n")


def test_an_installed_packages_methods_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(METHODS, "_loaded", False)
    assert "capped" in METHODS and title("capped") == "Capped ascent"
    assert "npo" in METHODS


def test_a_package_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, "raise RuntimeError('no')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_package", raising=False)
    monkeypatch.setattr(METHODS, "_loaded", False)
    for _ in range(2):  # and not at the first look alone
        with pytest.raises(WorkbenchError, match="package mine_package cannot be loaded"):
            list(METHODS)


def _documented() -> str:
    """The experiment of docs/extending.md."""
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    (found,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "wb.Experiment(" in b]
    return str(found)


@pytest.mark.slow
def test_an_experiment_of_a_users_own_is_a_command_with_two_workers(
    quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(_documented())
    command = ["plain", "--plugin", str(file), "--run", str(quick_run.folder), "--out", str(out)]
    assert main([*command, "--rows", "32", "--workers", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["model"] for row in told["table"]} == {"npo", "cir", "base", "never-learned"}
    held = quick_run.items[
        (quick_run.items["stage"] == "unlearn") & (quick_run.items["split"] == "forget-heldout")
    ]
    want = held[held["method"] == "npo"]["correct"].mean()
    (row,) = [row for row in told["table"] if row["model"] == "npo"]
    assert row["plain"].startswith(f"{want:.2f} [")
    config = (out / "config.yaml").read_text()
    assert "rows: 32" in config and hashlib.sha256(file.read_bytes()).hexdigest() in config
    # as long as the file says the same, the same command finds everything done
    assert main([*command, "--rows", "32", "--workers", "1"]) == 0
    file.write_text(_documented() + "\n# changed\n")
    _forget()
    assert main([*command, "--rows", "32"]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_an_experiment_does_not_take_the_place_of_a_command() -> None:
    written = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(COMMANDS) == {*written, *COMMANDS_FROM_SETTINGS, "run"} - set(EXPERIMENTS)
    for name in ("demo", "claims", "names", "run"):
        with pytest.raises(WorkbenchError, match=name):
            experiment(replace(EXPERIMENTS["quantise"], name=name))


CELLS = """
import workbench as wb
from matplotlib.figure import Figure
from workbench.evaluation.statistics import bootstrap
from workbench.tables import fact_table

wb.metric("largest_weight", title="largest weight", meaning="Largest absolute weight.")


@wb.method("climb", title="Climb", colour="#123456", small={"lr": 3e-4})
def climb(model, seed, *, lr: float = 1e-5, steps: int = 3, batch_size: int = 8):
    from workbench.unlearning.objectives import negative_cross_entropy

    return wb.Recipe(wb.Objective(negative_cross_entropy), ("*",), steps, batch_size, lr)


@wb.probe("largest")
def largest(model, setup, table, seed):
    table.add("largest_weight", max(float(p.abs().max()) for p in model.parameters()))


@wb.attack("gentle", title="gentle relearning")
def gentle(model, tokenizer, texts, seed):
    settings = wb.RelearnSettings(steps=2, lr=1e-4, batch_size=4, measure_at=(0, 2))
    yield from wb.relearn(model, tokenizer, texts, settings, seed=seed)


@wb.figure("largest", caption="The largest weight of every model.")
def drawn(table):
    figure, rows = Figure(), wb.METRICS["largest_weight"].rows(table)
    if len(rows):
        figure.add_subplot().bar(rows["method"], rows["value"])
    return figure


@wb.claim("climb-forgets", statement="s", statistic="recall after: NPO minus mine")
def forgets(results, items):
    ends = [fact_table(items, method=n, stage="gentle", arm="attack", x=2) for n in ("npo", "climb")]
    return bootstrap((ends[0] - ends[1]).to_numpy())


run = wb.sweep(OUT, quick=True, methods=("climb", "npo"), seeds=1, probe=["largest"],
               attack=["gentle"], set=["npo.steps=3"], workers=2)
print(run.folder, sorted(set(run.results["stage"].dropna())), len(run.claims))
"""  # noqa: E501


@pytest.mark.full
def test_cells_of_a_notebook_do_all_of_it_with_two_workers(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = f"OUT = {str(out)!r}\n{CELLS}"
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'gentle'" in done.stdout and "'largest'" in done.stdout
    rows = pd.read_parquet(out / "results.parquet")
    measured = rows[rows["metric"] == "largest_weight"]
    assert set(measured["method"]) == {"climb", "npo", "base", "never-learned"}
    assert (out / "figures" / "largest.png").is_file()
    assert (out / "figures" / "recovery-gentle.png").is_file()
    verdicts = {each["id"]: each for each in json.loads((out / "claims.json").read_text())}
    assert verdicts["climb-forgets"]["verdict"] in ("inconclusive", "equivalent")
