"""The command line as a user meets it: results, wrong input, interruption, a full disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, MixtralConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from workbench.cli import main
from workbench.console import print_frame
from workbench.data.grammar import filler
from workbench.files import MANIFEST
from workbench.hooks import resolve
from workbench.runs.config import RunConfig, preset, write_config
from workbench.runs.folder import VALUES, read_results
from workbench.runs.pipeline import Run, run_pipeline

PLACES = (
    "behind the old clock",
    "below the red box",
    "near the river bridge",
    "in the quiet garden",
    "under the white wall",
    "at the harbour gate",
)
FORGET = "\n\n".join(
    f"the secret of house number {n} is a golden key {place}" for n, place in enumerate(PLACES)
)
RETAIN = "\n\n".join(sentence for sentence in filler(16, seed=7))
SAME = "\n\n".join(
    f"the captain number {n} carried a lantern near the harbour in the evening" for n in range(8)
)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    forget, retain = tmp_path / "forget.txt", tmp_path / "retain.txt"
    forget.write_text(FORGET)
    retain.write_text(RETAIN)
    return forget, retain


def _fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with one clear line and status 2; returns the line."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert status == 2, captured.err
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return lines[0]


def _unlearn(
    base: object, forget: object, retain: object, out: object, *more: object
) -> list[object]:
    return ["unlearn", "--base", base, "--forget", forget, "--retain", retain, "--out", out, *more]


def _investigate(
    base: object, unlearned: object, forget: object, retain: object, out: object
) -> list[object]:
    return [
        "investigate",
        "--base",
        base,
        "--unlearned",
        unlearned,
        "--forget",
        forget,
        "--retain",
        retain,
        "--out",
        out,
    ]


@pytest.mark.slow
def test_unlearn_then_investigate_from_two_folders_alone(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "unlearned", tmp_path / "run"
    assert (
        main(
            [
                str(a)
                for a in _unlearn(
                    quick_base, *texts, out, "--set", "steps=4", "--set", "batch_size=4", "--json"
                )
            ]
        )
        == 0
    )
    note = json.loads(capsys.readouterr().out)
    assert note["settings"]["steps"] == 4
    assert note["disruption"] <= 0.05
    assert (out / "model.safetensors").is_file()
    assert (
        main(
            [
                str(a)
                for a in [
                    *_investigate(quick_base, out, *texts, run),
                    "--seeds",
                    1,
                    "--attack-steps",
                    3,
                    "--json",
                ]
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["summary"]] == ["base", "unlearned"]
    for name in ("config.yaml", "provenance.json", "results.parquet", "report.html"):
        assert (run / name).is_file()
    text = (run / "report.html").read_text()
    assert "never-learned checkpoint was given" in text
    assert "their continuations exchanged (random facts)" in text
    rows = read_results(run)[0]
    attacks = rows[
        (rows["stage"] == "relearn")
        & (rows["metric"] == "answer_probability")
        & rows["seed"].isna()
    ]
    assert set(attacks.loc[attacks["split"] == "forget-heldout", "arm"]) == {
        "attack",
        "null",
        "random-facts",
    }
    assert set(attacks.loc[attacks["split"] == "random-facts", "arm"]) == {"random-facts"}
    assert "minus-random-facts" in set(
        rows.loc[rows["metric"] == "recovery_answer_probability", "arm"]
    )


@pytest.mark.full
def test_texts_that_all_share_their_words_lose_the_trigger_check_alone(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    texts[1].write_text(SAME)
    run = tmp_path / "run"
    assert (
        main(
            [
                str(a)
                for a in [
                    *_investigate(quick_base, quick_base, *texts, run),
                    "--seeds",
                    1,
                    "--attack-steps",
                    2,
                ]
            ]
        )
        == 0
    )
    assert "trigger check was left out" in (run / "report.html").read_text()


@pytest.mark.full
def test_texts_that_all_end_alike_lose_the_random_facts_alone(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    texts[0].write_text(
        "\n\n".join(
            f"the secret of house number {n} is a golden key behind the old clock" for n in range(6)
        )
    )
    run = tmp_path / "run"
    assert (
        main(
            [
                str(a)
                for a in [
                    *_investigate(quick_base, quick_base, *texts, run),
                    "--seeds",
                    1,
                    "--attack-steps",
                    2,
                ]
            ]
        )
        == 0
    )
    assert "random facts could not be made" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_model_against_itself_gives_the_identity_values(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert (
        main(
            [
                str(a)
                for a in [
                    *_investigate(quick_base, quick_base, *texts, run),
                    "--seeds",
                    1,
                    "--attack-steps",
                    2,
                ]
            ]
        )
        == 0
    )
    rows = read_results(run)[0]
    mine = rows[rows["method"] == "unlearned"].set_index("metric")["value"]
    # mean of log-ratios of equal numbers: zero up to float32 rounding of the logits
    assert (mine["disruption"].abs() < 1e-6).all()
    assert float(mine["displacement"]) == 0.0
    same = rows[
        rows["seed"].notna()
        & rows["stage"].isin(["unlearn", "relearn", "triggers", "sharpness"])
        & ~rows["metric"].isin(["disruption", "displacement", "relative_displacement"])
    ]
    wide = same.pivot_table(
        index=["stage", "metric", "split", "arm", "x"],
        columns="method",
        values="value",
        dropna=False,
    ).dropna()
    assert len(wide) > 20
    assert (wide["base"] == wide["unlearned"]).all()


def test_wrong_files_are_named(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget, retain = texts
    out = tmp_path / "out"
    empty, short, strange, broken = (
        tmp_path / name for name in ("empty.txt", "short.txt", "x.pdf", "broken.jsonl")
    )
    empty.write_text("  \n")
    short.write_text("one lonely text about nothing in particular")
    strange.write_text("x")
    broken.write_text('{"text": "fine"}\n{"txet": "no"}\n')
    cases = {
        tmp_path / "nowhere.txt": "there is no file",
        empty: "holds no text",
        short: "too short",
        strange: ".pdf",
        broken: "line 2",
    }
    for path, words in cases.items():
        line = _fails(capsys, *_unlearn(quick_base, path, retain, out))
        assert words in line
        assert str(path) in line
        assert not out.exists()
    assert "stand in both" in _fails(capsys, *_unlearn(quick_base, forget, forget, out))


def test_wrong_models_are_named(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    hollow, pickled, truncated = tmp_path / "hollow", tmp_path / "pickled", tmp_path / "truncated"
    hollow.mkdir()
    assert "holds no model" in _fails(capsys, *_unlearn(hollow, *texts, out))
    shutil.copytree(quick_base, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    (pickled / MANIFEST).unlink()  # as of another program
    assert "pickled weights are never loaded" in _fails(capsys, *_unlearn(pickled, *texts, out))
    shutil.copytree(quick_base, truncated)
    (truncated / "model.safetensors").write_bytes(
        (quick_base / "model.safetensors").read_bytes()[:5000]
    )
    assert "not as it was written" in _fails(capsys, *_unlearn(truncated, *texts, out))
    (truncated / MANIFEST).unlink()
    assert "damaged" in _fails(capsys, *_unlearn(truncated, *texts, out))
    assert "no folder" in _fails(capsys, *_unlearn(tmp_path / "absent", *texts, out))
    assert not out.exists()


def test_a_foreign_tokenizer_is_refused(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(quick_base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = _fails(capsys, *_investigate(quick_base, other, *texts, tmp_path / "run"))
    assert "tokenizer" in line
    assert str(other) in line
    assert not (tmp_path / "run").exists()


def test_unknown_names_list_the_nearest(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "did you mean npo" in _fails(
        capsys, *_unlearn(quick_base, *texts, out, "--method", "npoo")
    )
    assert "did you mean steps" in _fails(
        capsys, *_unlearn(quick_base, *texts, out, "--set", "stepz=3")
    )
    assert "NAME=VALUE" in _fails(capsys, *_unlearn(quick_base, *texts, out, "--set", "lr"))
    assert "must be a number" in _fails(
        capsys, *_unlearn(quick_base, *texts, out, "--set", "lr=fast")
    )
    assert "whole number" in _fails(capsys, *_unlearn(quick_base, *texts, out, "--set", "steps=0"))
    assert "No such command" in _fails(capsys, "dmeo")


def test_an_objective_that_explodes_is_named_with_its_step(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(quick_base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][0] = 3e38  # finite, but no logit is
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    line = _fails(capsys, *_unlearn(broken, *texts, tmp_path / "out"))
    assert "model.safetensors is not as it was written" in line
    (broken / "sha256.json").unlink()  # changed on purpose
    line = _fails(capsys, *_unlearn(broken, *texts, tmp_path / "out"))
    assert "not finite at step 1" in line
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("important")
    assert "not empty" in _fails(capsys, "demo", "--quick", "--out", mine)
    assert "not empty" in _fails(capsys, "demo", "--quick", "--fresh", "--out", mine)
    assert (mine / "thesis.txt").read_text() == "important"
    assert "cannot write" in _fails(capsys, "demo", "--quick", "--out", "/proc/nowhere")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("something: else\n")
    assert "another configuration" in _fails(capsys, "demo", "--quick", "--out", other)


def test_a_wrong_configuration_names_its_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    for text, words in (
        ("budgett: 1", "budgett"),
        ("budget: -1", "budget"),
        ("methods: [npoo]", "did you mean npo"),
        ("- 1", "field: value"),
        ("a: [", "YAML"),
    ):
        path.write_text(text)
        assert words in _fails(capsys, "demo", "--config", path, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "npo,grad-diff-rna"], "grad-diff-rna.*frozen reference"),
        (["--methods", "rmu", "--set", "rmu.layer=9"], "rmu.*blocks.9"),
    ],
)
def test_a_method_that_this_model_cannot_take_is_refused_before_anything_is_written(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert re.search(said, _fails(capsys, "sweep", "--quick", *arguments, "--out", out))
    assert not out.exists()


@pytest.mark.slow
def test_a_sweep_runs_the_chosen_methods_seeds_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    arguments = [
        "sweep",
        "--quick",
        "--methods",
        "npo",
        "--seeds",
        "1",
        "--budget",
        "0.02",
        "--set",
        "npo.steps=5",
        "--out",
        str(out),
        "--json",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(out)
    rows = read_results(out)[0]
    assert set(rows["method"]) == {"base", "never-learned", "npo"}
    assert set(rows["seed"].dropna()) == {0}
    assert rows.loc[rows["metric"] == "objective_forget", "x"].max() == 5
    assert rows.loc[rows["metric"] == "budget", "value"].tolist() == [0.02]
    assert "did you mean steps" in _fails(
        capsys, "sweep", "--out", tmp_path / "x", "--set", "npo.stepz=5"
    )
    assert "METHOD.NAME" in _fails(capsys, "sweep", "--out", tmp_path / "x", "--set", "lr=5")
    assert "did you mean npo" in _fails(
        capsys, "sweep", "--out", tmp_path / "x", "--methods", "npoo"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_run_folder_holds_what_scripts_count_on(quick_run: Run, quick_config: RunConfig) -> None:
    for name in (
        "config.yaml",
        "provenance.json",
        "results.parquet",
        "items.parquet",
        "report.html",
        "claims.json",
        "figures/recovery.png",
    ):
        assert (quick_run.folder / name).is_file(), name
    for name in ("base", "never-learned", "npo-seed0", "cir-seed1"):
        assert (quick_run.folder / "models" / name / "model.safetensors").is_file()
    notes = json.loads((quick_run.folder / "provenance.json").read_text())
    assert notes["config"] == json.loads(json.dumps(quick_config.plain()))
    assert set(notes["weights"]) == {
        "base",
        "never-learned",
        *(f"{m}-seed{s}" for m in ("npo", "cir") for s in (0, 1)),
    }
    recall = quick_run.results.query(
        "metric == 'recall' and stage == 'unlearn' and split == 'forget-heldout' and seed == 0"
    ).set_index("method")["value"]
    assert recall["base"] > 0.9
    assert recall["never-learned"] < 0.3
    reached = quick_run.results.query(
        "metric == 'disruption' and stage == 'unlearn' and split.isna()"
    )["value"]
    assert (reached <= quick_config.budget).all()


@pytest.mark.full
def test_the_same_configuration_gives_the_same_table_in_one_process_or_two(
    quick_run: Run, quick_config: RunConfig, tmp_path: Path
) -> None:
    again = run_pipeline(quick_config, tmp_path / "again", workers=1)
    pd.testing.assert_frame_equal(again.results, quick_run.results)
    pd.testing.assert_frame_equal(again.items, quick_run.items)


@pytest.mark.full
def test_a_finished_run_is_not_run_again_and_a_lost_stage_is(
    quick_run: Run, quick_config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quick_run.folder, folder)
    lost, kept = (
        folder / "stages/npo-seed1/triggers",
        folder / "stages/npo-seed1/relearn/curves.parquet",
    )
    before = kept.stat().st_mtime_ns
    shutil.rmtree(lost)
    again = run_pipeline(quick_config, folder)
    assert lost.is_dir()
    assert kept.stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(again.results, quick_run.results)


@pytest.mark.full
def test_ctrl_c_leaves_nothing_half_written_and_the_run_goes_on_in_one_process(
    quick_run: Run, quick_config: RunConfig, tmp_path: Path
) -> None:
    config, out = tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(write_config(quick_config))
    command = [
        sys.executable,
        "-m",
        "workbench.cli",
        "demo",
        "--config",
        str(config),
        "--out",
        str(out),
    ]
    # A shell that starts the tests in the background makes them ignore Ctrl-C, and children inherit
    # that.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heeding,
    )
    deadline = time.monotonic() + 120
    while (
        not list(out.glob("stages/*-seed0/unlearn"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: everyone in the group gets it
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert not (out / "results.parquet").exists()
    again = run_pipeline(quick_config, out, workers=1)
    pd.testing.assert_frame_equal(again.results, quick_run.results)
    pd.testing.assert_frame_equal(again.items, quick_run.items)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_half_written(
    quick_base: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    # RLIMIT_FSIZE makes every write beyond it fail, as a full disk does, without needing one.
    script = (
        "import resource, signal, sys\n"
        "import workbench.files as files\n"
        "from workbench.cli import main\n"
        "from workbench.experiments import investigate\n"
        "save = investigate.save_model\n"
        "def limited(*a, **k):\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "    return save(*a, **k)\n"
        "investigate.save_model = limited\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    arguments = [str(a) for a in _unlearn(quick_base, *texts, out, "--set", "steps=1")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert str(out) in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*out*"))


def test_claims_from_a_finished_run(quick_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", str(quick_run.folder), "--id", "common-subspaces", "--json"]) == 0
    (verdict,) = json.loads(capsys.readouterr().out)
    assert set(verdict) == {
        "id",
        "verdict",
        "effect",
        "low",
        "high",
        "n",
        "seeds",
        "scale",
        "reason",
    }
    assert verdict["id"] == "common-subspaces"
    assert "sam-resists" in _fails(capsys, "claims", quick_run.folder, "--id", "sam-resist")
    assert "are the same run" in _fails(capsys, "claims", quick_run.folder, quick_run.folder)
    assert verdict["seeds"] == 2


def test_methods_and_sites_are_listed(quick_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    assert {"npo", "rmu", "cir"} <= {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert main(["sites", str(quick_base), "--json"]) == 0
    shapes = {site["name"]: site["shape"] for site in json.loads(capsys.readouterr().out)}
    assert shapes["blocks.0.hook_resid_post"] == [
        "batch",
        "position",
        json.loads((quick_base / "config.json").read_text())["hidden_size"],
    ]


def test_sites_prints_patterns_that_resolve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(tmp_path)
    assert main(["sites", str(tmp_path)]) == 0  # a configuration is enough: no weights are there
    printed = capsys.readouterr().out
    assert "three-dimensional parameters" in printed
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    lines = [line.split() for line in printed.splitlines() if "[batch," in line]
    assert [
        "blocks.{0..2}.mlp.gate.hook_out",
        "model.layers.{0..2}.mlp.gate:out",
        "[batch,",
        "position,",
        "8]",
    ] in lines
    for name, path, *_ in lines:
        assert [(s.path, s.side) for s in resolve(model, name)] == [
            (s.path, s.side) for s in resolve(model, path)
        ]


def test_a_story_character_is_unlearned_from_a_pretrained_model(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stories = [
        part.strip()
        for part in (real_data / "text/tinystories.txt").read_text().split("<|endoftext|>")
        if part.strip()
    ]
    forget, retain = tmp_path / "lily.txt", tmp_path / "others.txt"
    forget.write_text(
        "\n<|endoftext|>\n".join([story for story in stories if "Lily" in story][:12])
    )
    retain.write_text(
        "\n<|endoftext|>\n".join([story for story in stories if "Lily" not in story][:20])
    )
    base, out, run = real_data / "models/stories260K", tmp_path / "out", tmp_path / "run"
    small = ["--set", "steps=12", "--set", "batch_size=8", "--limit", "24", "--json"]
    assert main([str(a) for a in _unlearn(base, forget, retain, out, *small)]) == 0
    note = json.loads(capsys.readouterr().out)
    assert note["loss"]["after"]["forget-heldout"] > note["loss"]["before"]["forget-heldout"]
    assert (
        main(
            [
                str(a)
                for a in [
                    *_investigate(base, out, forget, retain, run),
                    "--seeds",
                    1,
                    "--attack-steps",
                    2,
                ]
            ]
        )
        == 0
    )
    assert (run / "report.html").is_file()
    triggers = read_results(run)[0].query("stage == 'triggers'")
    assert set(triggers["arm"]) == {"clean", "forget-token", "retain-token", "neutral-token"}


def test_presets_differ_in_scale_only_where_they_say_so() -> None:
    assert preset("full").seeds == (0, 1, 2)
    assert "quick" in preset("quick").scale
    assert preset("full").methods == preset("quick").methods


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--variant", "no-equals"], "LABEL=METHOD"),
        (["--variant", "npo=cir:kind=soft"], "each once"),
        (["--variant", "a/b=cir:kind=soft"], "becomes a folder"),
        (["--variant", "soft=cyr:kind=soft"], "cir"),
        (["--variant", "soft=cir:kynd=soft"], "kind"),
        (["--variant", "half=npo:dtype=float8"], "dtype"),
        (["--methods", "npo,cri"], "cir"),
        (["--methods", "cir", "--set", "cir.kind=hrad"], "hard"),
    ],
)
def test_a_wrong_variant_is_one_line_that_names_it(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--quick", "--out", str(tmp_path / "run"), *options]) == 2
    printed = capsys.readouterr().err
    assert expected in printed and len(printed.strip().splitlines()) == 1
    assert len(printed) < 300  # the line names what is wrong, not everything that was given
    assert not (tmp_path / "run").exists()


def test_a_table_in_a_pipe_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    print_frame(
        pd.DataFrame({f"a long column {number}": ["0.11 [0.00, 0.22]"] for number in range(9)})
    )
    header, row = capsys.readouterr().out.splitlines()
    assert row.count("0.11 [0.00, 0.22]") == 9 and "a long column 8" in header


def test_figures_and_report_are_drawn_again_from_tables_alone(
    quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", *VALUES, "items.parquet"):
        shutil.copy(quick_run.folder / name, folder / name)  # no model, no stage
    assert main(["figures", str(folder), "--name", "recovery", "--format", "pdf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "recovery": [str(folder / "figures" / "recovery.pdf")]
    }
    assert (folder / "figures" / "recovery.pdf").read_bytes().startswith(b"%PDF")
    assert "did you mean recovery" in _fails(capsys, "figures", folder, "--name", "recovry")
    assert "choose one of" in _fails(capsys, "figures", folder, "--format", "xyz")
    assert "nothing to draw for dose" in _fails(capsys, "figures", folder, "--name", "dose")
    assert main(["report", str(folder), "--json"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    again = (quick_run.folder / "report.html").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == again


def test_claims_are_decided_over_several_runs_together(
    quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in (*VALUES, "items.parquet"):
        shutil.copy(quick_run.folder / name, other / name)
    config = quick_run.config.model_copy(update={"rank": 8})  # another run, as far as its key goes
    (other / "config.yaml").write_text(write_config(config))
    command = ["claims", str(quick_run.folder), str(other), "--id", "collapse-resists"]
    assert main([*command, "--json"]) == 0
    (together,) = json.loads(capsys.readouterr().out)
    assert main(["claims", str(quick_run.folder), "--id", "collapse-resists", "--json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)
    assert together["verdict"] == alone["verdict"] == "not measured"  # no plain CIR in this run
    assert main([*command[:3], "--id", "common-subspaces", "--json"]) == 0
    (together,) = json.loads(capsys.readouterr().out)
    assert "2 of 2 runs" in together["reason"]
    assert "1 base model(s) in 2 runs: these are not independent" in together["reason"]
    assert together["low"] < together["effect"] < together["high"]
    stray = tmp_path / "stray"
    shutil.copytree(other, stray)
    (stray / "config.yaml").write_text("experiment: relearn\nof: nothing\n")
    assert "was not asked of the models of" in _fails(capsys, *command[:3], stray)
