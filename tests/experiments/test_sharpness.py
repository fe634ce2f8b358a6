"""The landscape around a finished run's models: what the parts must agree on, whatever the
model.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench import runner
from workbench.cli import main
from workbench.errors import WorkbenchError
from workbench.experiments.sharpness import SharpnessSettings, sharpness_table
from workbench.figures import figures_of
from workbench.models import open_model
from workbench.runner import Result
from workbench.runs.landscape import module_of
from workbench.runs.pipeline import Run

SMALL = SharpnessSettings(
    radii=(0.1, 0.5),
    fixed=(0.003, 0.01),
    steps=2,
    noise=(0.01,),
    draws=2,
    probes=3,
    density_probes=1,
    density_steps=8,
    points=5,
    tolerance=0.1,
)


@pytest.fixture(scope="module")
def found(quick_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("sharpness") / "run"
    return runner.run("sharpness", out, SMALL, of=quick_run.folder, methods=["npo"], workers=1)


def _rows(found: Result, method: str = "npo", **where: object) -> pd.DataFrame:
    rows = found.results[(found.results["method"] == method) & found.results["seed"].notna()]
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows


def test_every_way_of_reading_the_loss_at_the_model_itself_gives_the_same(
    found: Result,
) -> None:
    split = "forget-heldout"
    centre = float(
        _rows(found, metric="slice_loss", arm="random", split=split, x=0.0)["value"].iloc[0]
    )
    assert float(
        _rows(found, metric="slice_loss", arm="descent", split=split, x=0.0)["value"].iloc[0]
    ) == pytest.approx(centre, rel=1e-5)
    assert float(
        _rows(found, metric="plane_loss", split=split, x=0.0, y=0.0)["value"].iloc[0]
    ) == pytest.approx(centre, rel=1e-5)
    assert float(
        _rows(found, metric="path_loss", split=split, x=0.0)["value"].iloc[0]
    ) == pytest.approx(centre, rel=1e-5)


def test_the_path_ends_where_the_plane_has_the_relearned_model(found: Result) -> None:
    path = _rows(found, metric="path_loss", split="forget-heldout").sort_values("x")
    corner = _rows(found, metric="plane_loss", split="forget-heldout", x=1.0, y=0.0)
    assert float(corner["value"].iloc[0]) == pytest.approx(float(path["value"].iloc[-1]), rel=1e-4)
    for metric, end in (("plane_along", 1), ("plane_towards", 0), ("plane_off", 0)):
        coordinates = _rows(found, metric=metric).sort_values("x")
        assert float(coordinates["value"].iloc[-1]) == pytest.approx(end, abs=1e-4)
    travelled = _rows(found, metric="path_travelled").sort_values("x")["value"].to_numpy()
    straight = _rows(found, metric="path_distance").sort_values("x")["value"].to_numpy()
    assert (np.diff(travelled) > 0).all()
    assert (travelled >= straight * (1 - 1e-6)).all()


def test_drops_grow_with_the_radius_and_are_none_of_the_base_s_in_displacements(
    found: Result,
) -> None:
    for arm in ("drop", "drop, one step", "drop, fixed radius", "adaptive drop", "rise"):
        values = (
            _rows(found, metric="drop", arm=arm, split="forget-attacked", seed=0)
            .sort_values("x")["value"]
            .to_numpy()
        )
        assert len(values) == 2
        assert values[1] >= values[0] >= 0
    more, one = (
        _rows(found, metric="drop", arm=arm, split="forget-attacked", seed=0)
        .sort_values("x")["value"]
        .to_numpy()
        for arm in ("drop", "drop, one step")
    )
    assert (more >= one).all()
    assert not len(_rows(found, "base", metric="drop", arm="drop"))
    assert len(_rows(found, "base", metric="drop", arm="rise"))
    assert set(_rows(found, metric="drop")["split"]) >= {
        "forget-attacked",
        "forget-heldout",
        "retain-neighbour",
        "novel",
    }


def test_the_modules_share_the_trace_among_them(found: Result, quick_run: Run) -> None:
    for arm in ("unlearned", "relearned"):
        modules = _rows(found, metric="module_eigenvalue", arm=arm, seed=0)
        trace = float(_rows(found, metric="trace", arm=arm, seed=0)["value"].iloc[0])
        assert float((modules["value"] * modules["n"].astype(float)).sum()) == pytest.approx(
            trace, rel=1e-6
        )
        weights = sum(
            parameter.numel()
            for parameter in open_model(quick_run.folder / "models" / "base").model.parameters()
        )
        assert int(modules["n"].sum()) == weights
        running = _rows(found, metric="running_trace", arm=arm, seed=0).sort_values("x")
        assert float(running["value"].iloc[-1]) == pytest.approx(trace)
    assert {"embed", "blocks.0.attn", "blocks.0.mlp", "blocks.0.norm", "norm"} <= set(
        _rows(found, metric="module_eigenvalue")["site"]
    )


def test_densities_share_a_grid_and_hold_one_spectrum_each(found: Result) -> None:
    curves = found.results[found.results["metric"] == "density"]
    grids = [sorted(group["x"]) for _, group in curves.groupby(["method", "seed", "arm"])]
    assert len(grids) == 6  # base, never-learned, npo; each before the attack and after it
    assert all(grid == grids[0] for grid in grids)
    linear = 1e-3 * float(
        found.results.loc[found.results["metric"] == "density_node", "x"].abs().max()
    )
    for _, curve in curves.groupby(["method", "seed", "arm"]):
        line = curve.sort_values("x")
        assert np.trapezoid(line["value"], np.arcsinh(line["x"] / linear)) == pytest.approx(
            1, abs=0.02
        )
    assert (found.results.loc[found.results["metric"] == "moment_error", "value"] < 1e-6).all()
    ritz = _rows(found, metric="ritz")
    top = ritz[ritz["arm"] == "top"].sort_values("x")["value"].to_numpy()
    bottom = ritz[ritz["arm"] == "bottom"].sort_values("x")["value"].to_numpy()
    assert (np.diff(top) >= -1e-9 * abs(top[-1])).all()  # Ritz values only move outwards
    assert (np.diff(bottom) <= 1e-9 * abs(bottom[-1])).all()


def test_controls_are_measured_once_and_later_seeds_lack_the_costly_parts(
    found: Result, quick_run: Run
) -> None:
    if len(quick_run.config.seeds) < 2:
        pytest.skip("the quick run has one seed")
    later = quick_run.config.seeds[1]
    assert not len(_rows(found, "base", seed=later))
    assert len(_rows(found, metric="trace", seed=later))
    assert not len(_rows(found, metric="plane_loss", seed=later))


def test_three_models_have_no_rank_correlation_and_the_figures_do_without(
    found: Result,
) -> None:
    assert not (found.results["metric"] == "recovery_correlation").any()
    table = sharpness_table(found.results)
    assert list(table["model"]) == ["base", "never-learned", "npo"]
    assert "trace" in found._repr_html_()
    for draw in [entry.draw for entry in figures_of("sharpness").values()]:
        figure = draw(found.results)
        assert figure.axes or figure.texts  # what cannot be drawn says so


def test_by_command(
    found: Result,
    quick_run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # the same settings: what was measured is kept
    given = ["--run", str(quick_run.folder), "--methods", "npo", "--out", str(found.folder)]
    for name, value in SMALL.model_dump(exclude_unset=True).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        given += [f"--{name.replace('_', '-')}", text]
    assert main(["sharpness", *given, "--workers", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in told["table"]] == ["base", "never-learned", "npo"]
    drawn = {path.stem for path in (found.folder / "figures").iterdir()}
    assert drawn == set(told["figures"]) == set(figures_of("sharpness")) - {"predictors"}
    with pytest.raises(WorkbenchError, match="nop"):
        runner.run("sharpness", tmp_path / "x", of=quick_run.folder, methods=["nop"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("model.layers.3.mlp.gate_proj.weight", "blocks.3.mlp"),
        ("model.layers.11.self_attn.q_proj.weight", "blocks.11.attn"),
        ("model.layers.0.input_layernorm.weight", "blocks.0.norm"),
        ("transformer.h.2.attn.c_attn.bias", "blocks.2.attn"),
        ("transformer.h.2.ln_1.weight", "blocks.2.norm"),
        ("gpt_neox.layers.5.attention.dense.weight", "blocks.5.attn"),
        ("gpt_neox.embed_in.weight", "embed"),
        ("gpt_neox.final_layer_norm.bias", "norm"),
        ("embed_out.weight", "unembed"),
        ("lm_head.weight", "unembed"),
        ("transformer.wte.weight", "embed"),
        ("transformer.ln_f.weight", "norm"),
    ],
)
def test_the_module_of_a_parameter(parameter: str, module: str) -> None:
    assert module_of(parameter) == module
