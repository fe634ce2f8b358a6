"""The world fine-tuned into a pretrained model: its general text, its place in the cache, its
training, and wrong input on the command line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from workbench import builtin, cli
from workbench.builtin import (
    GENERAL_TOKENS,
    BuiltinConfig,
    builtin_folder,
    builtin_model,
    train_builtin,
    world_of,
)
from workbench.cli import main
from workbench.data.batches import Batch
from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.data.world import WorldConfig, build_world
from workbench.errors import WorkbenchError
from workbench.files import MANIFEST, sha256
from workbench.models import open_model, open_tokenizer, save_model
from workbench.progress import quiet
from workbench.runs.config import RunConfig

WORLD = WorldConfig(forget_people=4, neighbour_people=3, islands=2, filler_train=40, filler_test=10)
# Every document says its own word over and over, so that a piece tells which document it is from.
TOPICS = tuple(
    f"{first}{second}o" for first in "bdfglmnprst" for second in ("a", "e", "i", "ou", "ai", "ea")
)


def _documents(count: int, words: int = 100) -> str:
    return "\n\n".join(" ".join([TOPICS[number]] * words) for number in range(count))


def _tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer((*TOPICS, *build_world(WORLD).vocabulary))


@pytest.fixture(scope="module")
def pretrained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, folder = _tokenizer(), tmp_path_factory.mktemp("hub") / "pretrained"
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        save_model(LlamaForCausalLM(shape), tokenizer, folder)
    return folder


@pytest.fixture
def pretrained(pretrained_once: Path, tmp_path: Path) -> Path:
    """The folder of a tiny random model; a copy that a test may change."""
    return Path(shutil.copytree(pretrained_once, tmp_path / "pretrained"))


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """A text of 60 documents of two pieces each."""
    path = tmp_path / "general.txt"
    path.write_text(_documents(60))
    return path


@pytest.fixture
def config(pretrained: Path, general: Path) -> BuiltinConfig:
    return BuiltinConfig(
        world=WORLD,
        pretrained=str(pretrained),
        general=str(general),
        steps=1,
        batch_size=4,
        lr=1e-3,
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("WORKBENCH_CACHE", str(folder))
    return folder


# --- general text in the place of filler ----------------------------------------------------------


def _topics(pieces: Iterable[Example]) -> set[str]:
    return {word for piece in pieces for word in piece.text.split()}


def test_pieces_of_the_file_take_the_place_of_filler(config: BuiltinConfig, general: Path) -> None:
    world, tokenizer = world_of(config), _tokenizer()
    test, train = world.record.retain["general"], world.filler_train
    assert world.record.general == "general"
    assert len(test) == WORLD.filler_test
    # A document that ends in the test pieces costs the training text at most its one other piece.
    assert WORLD.filler_train - WORLD.filler_test <= len(train) <= WORLD.filler_train
    documents = [" ".join(part.split()) for part in general.read_text().split("\n\n")]
    for piece in (*test, *train):
        assert any(piece.text in document for document in documents)
        assert piece.answer is None and piece.subject is None and piece.item
        assert 8 <= len(tokenizer(piece.text)["input_ids"]) <= GENERAL_TOKENS
    assert len({piece.item for piece in (*test, *train)}) == len(test) + len(train)


def test_test_pieces_and_training_pieces_share_no_document(
    config: BuiltinConfig, general: Path
) -> None:
    for count, words in ((60, 100), (12, 400), (5, 1000), (60, 20)):
        general.write_text(_documents(count, words))
        world = world_of(config)
        tested, trained = _topics(world.record.retain["general"]), _topics(world.filler_train)
        assert tested and trained and not tested & trained


def test_documents_may_be_separated_by_their_mark_or_by_json(
    config: BuiltinConfig, general: Path
) -> None:
    documents = general.read_text().split("\n\n")
    marked, lines = general.with_name("marked.txt"), general.with_name("lines.jsonl")
    mark = "\n<|endoftext|>\n"
    marked.write_text(mark.join(documents))
    lines.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    for path in (marked, lines):
        world, plain = world_of(replace(config, general=str(path))), world_of(config)
        assert [piece.text for piece in world.filler_train] == [
            piece.text for piece in plain.filler_train
        ]
        assert world.record.retain["general"] == plain.record.retain["general"]
    marked.write_text(mark.join(document.replace(" ", "\n\n", 1) for document in documents))
    kept = world_of(replace(config, general=str(marked))).filler_train
    assert len(kept) == len(plain.filler_train)
    assert any("\n\n" in piece.text for piece in kept)  # byte for byte, and no end of a document


def test_the_facts_are_those_of_the_world_without_general_text(config: BuiltinConfig) -> None:
    world, plain = world_of(config), build_world(WORLD)
    assert world_of(replace(config, general=None)) == plain == world_of(BuiltinConfig(world=WORLD))
    ours, theirs = world.record, plain.record
    assert (ours.forget_attacked, ours.forget_heldout) == (
        theirs.forget_attacked,
        theirs.forget_heldout,
    )
    assert list(ours.retain) == list(theirs.retain) == ["retain-neighbour", "retain-far", "general"]
    assert [ours.retain[name] for name in ("retain-neighbour", "retain-far")] == [
        theirs.retain[name] for name in ("retain-neighbour", "retain-far")
    ]
    assert (ours.forget_tokens, ours.retain_tokens, world.surnames) == (
        theirs.forget_tokens,
        theirs.retain_tokens,
        plain.surnames,
    )
    filler = {example.text for example in (*plain.filler_train, *theirs.retain["general"])}
    assert not filler & {example.text for example in (*world.filler_train, *ours.retain["general"])}


def test_the_same_file_gives_the_same_pieces(config: BuiltinConfig) -> None:
    assert world_of(config) == world_of(config)


@pytest.mark.parametrize(("documents", "words"), [(1, 20), (4, 30), (10, 60), (5, 100), (1, 5000)])
def test_a_file_without_enough_text_for_both_sides_is_named(
    documents: int, words: int, config: BuiltinConfig, general: Path
) -> None:
    # Ten pieces are for testing alone; the last case has enough pieces and only one document.
    general.write_text(_documents(documents, words))
    with pytest.raises(WorkbenchError) as caught:
        world_of(config)
    assert str(general) in str(caught.value) and "\n" not in str(caught.value)
    if words < 5000:
        assert "too short" in str(caught.value)


def test_one_piece_more_than_the_test_set_is_enough(config: BuiltinConfig, general: Path) -> None:
    general.write_text(_documents(WORLD.filler_test + 1, 60))
    world = world_of(config)
    assert len(world.filler_train) == 1 and len(world.record.retain["general"]) == WORLD.filler_test


def test_questions_are_no_general_text(config: BuiltinConfig, general: Path) -> None:
    path = general.with_suffix(".jsonl")
    path.write_text(
        "\n".join(
            json.dumps({"question": f"what is {topic}", "answer": topic}) for topic in TOPICS[:60]
        )
    )
    with pytest.raises(WorkbenchError, match="running text"):
        world_of(replace(config, general=str(path)))


def test_a_missing_or_wrong_file_is_named(config: BuiltinConfig, general: Path) -> None:
    general.unlink()
    with pytest.raises(WorkbenchError, match="there is no file") as caught:
        world_of(config)
    assert str(general) in str(caught.value)
    general.write_text(" \n\n ")
    with pytest.raises(WorkbenchError, match="holds no text"):
        world_of(config)


def test_a_missing_model_is_named(config: BuiltinConfig, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="no folder") as caught:
        world_of(replace(config, pretrained=str(tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_general_text_needs_a_pretrained_model(general: Path) -> None:
    with pytest.raises(ValueError, match="pretrained") as caught:
        BuiltinConfig(world=WORLD, general=str(general))
    assert str(general) in str(caught.value)


# --- the place in the cache -----------------------------------------------------------------------


def _nudge_weight(pretrained: Path, general: Path) -> None:
    weights = load_file(pretrained / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, pretrained / "model.safetensors", metadata={"format": "pt"})


def _nudge_text(pretrained: Path, general: Path) -> None:
    general.write_text(general.read_text().replace(TOPICS[0], TOPICS[1], 1))


def _nudge_tokenizer(pretrained: Path, general: Path) -> None:
    described = json.loads((pretrained / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (pretrained / "tokenizer.json").write_text(json.dumps(described))


def _nudge_shape(pretrained: Path, general: Path) -> None:
    described = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps(described | {"rms_norm_eps": 1e-2}))


@pytest.mark.parametrize(
    "nudge",
    [_nudge_weight, _nudge_text, _nudge_tokenizer, _nudge_shape],
    ids=["weights", "text", "tokenizer", "configuration"],
)
def test_the_key_changes_with_everything_that_shapes_the_weights(
    nudge: Callable[[Path, Path], None],
    config: BuiltinConfig,
    pretrained: Path,
    general: Path,
    cache: Path,
) -> None:
    before = [builtin_folder(config, with_forget=side) for side in (True, False)]
    assert len(set(before)) == 2 and all(cache in folder.parents for folder in before)
    nudge(pretrained, general)
    after = [builtin_folder(config, with_forget=side) for side in (True, False)]
    assert not set(before) & set(after)


def test_the_key_is_the_same_for_the_same_files(
    config: BuiltinConfig, pretrained: Path, general: Path, cache: Path
) -> None:
    before = builtin_folder(config, with_forget=True)
    general.write_bytes(general.read_bytes())
    (pretrained / "README.md").write_text("a model card shapes nothing")
    assert builtin_folder(config, with_forget=True) == before
    assert builtin_folder(replace(config, general=None), with_forget=True) != before


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_forget", [True, False])
def test_training_starts_at_the_pretrained_weights_with_their_tokenizer(
    with_forget: bool, config: BuiltinConfig, pretrained: Path
) -> None:
    files = {path.name: sha256(path) for path in pretrained.iterdir()}
    model, tokenizer = train_builtin(
        config, world_of(config), with_forget=with_forget, progress=quiet
    )
    start = dict(open_model(pretrained).model.named_parameters())
    # AdamW's first step moves no weight further than the rate, which is a fiftieth of its peak;
    # weight decay takes a hundredth of the rate times the weight.
    rate = config.lr / 50
    moved = {name: (value - start[name]).detach().abs() for name, value in model.named_parameters()}
    for name, distance in moved.items():
        assert bool((distance <= rate * (1 + 0.01 * start[name].abs()) + 2e-7).all()), name
    assert max(float(distance.max()) for distance in moved.values()) > 0.9 * rate
    assert (
        model.config.hidden_size == 32
        and model.config.num_hidden_layers == 2
        and not model.training
    )
    assert (
        tokenizer.get_vocab()
        == open_tokenizer(pretrained).get_vocab()
        != build_tokenizer(build_world(WORLD).vocabulary).get_vocab()
    )
    assert {path.name: sha256(path) for path in pretrained.iterdir()} == files


def test_training_reads_general_text(
    config: BuiltinConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Example] = []
    encode = builtin.encode

    def noted(
        tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **options: object
    ) -> Batch:
        seen.extend(examples)
        return encode(tokenizer, examples, **options)

    monkeypatch.setattr(builtin, "encode", noted)
    world = world_of(config)
    train_builtin(replace(config, steps=3, batch_size=32), world, with_forget=True, progress=quiet)
    tests, trained = (
        {piece.text for piece in pieces}
        for pieces in (world.record.retain["general"], world.filler_train)
    )
    running = [example.text.split(" asks : ")[-1] for example in seen if example.answer is None]
    assert len(seen) == 96 and len(running) > 10
    assert set(running) <= trained and not set(running) & tests


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_decided_by_its_seed(
    dropout: float, config: BuiltinConfig, pretrained: Path
) -> None:
    described = json.loads((pretrained / "config.json").read_text())
    (pretrained / MANIFEST).unlink()
    (pretrained / "config.json").write_text(json.dumps(described | {"attention_dropout": dropout}))
    world, found = world_of(config), []
    for state in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)  # whatever the caller drew before
            found.append(
                train_builtin(replace(config, steps=2), world, with_forget=True, progress=quiet)[
                    0
                ].state_dict()
            )
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_model_that_learned_too_little_is_an_error_and_not_kept(
    config: BuiltinConfig, cache: Path
) -> None:
    for side, name in ((True, "base"), (False, "never-learned control")):
        with pytest.raises(
            WorkbenchError, match=f"the {name} learned too little .*raise steps \\(now 1\\)"
        ):
            builtin_model(config, with_forget=side, progress=quiet)
        assert not builtin_folder(config, with_forget=side).exists()


@pytest.mark.slow
def test_a_model_that_knows_the_world_is_kept_and_found_again(
    quick_base: Path, quick_config: RunConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(quick_config.model, pretrained=str(quick_base), steps=1, batch_size=2, lr=1e-8)
    folder = builtin_model(config, progress=quiet)
    assert folder == builtin_folder(config, with_forget=True) and cache in folder.parents
    note = json.loads((folder / "workbench.json").read_text())
    assert (
        note["config"]["pretrained"] == str(quick_base)
        and note["config"]["general"] is None
        and note["with_forget"]
    )
    assert min(note["recall"].values()) >= 0.9
    made, start = open_model(folder), open_model(quick_base)
    for name, value in made.model.named_parameters():
        torch.testing.assert_close(value, start.model.get_parameter(name), rtol=0, atol=1e-6)
    assert made.tokenizer.get_vocab() == start.tokenizer.get_vocab()
    monkeypatch.setattr(
        builtin, "train_builtin", lambda *_, **__: pytest.fail("it was trained again")
    )
    assert builtin_model(config, progress=quiet) == folder


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--general", "GENERAL"], ["pretrained", "GENERAL"]),
        (["--general", "MISSING"], ["MISSING"]),
        (["--budget-measure", "nonsense"], ["nonsense", "kl", "loss-rise"]),
        (["--budget-sets", "nonsense"], ["nonsense", "retain-neighbour", "retain-far", "general"]),
        (
            ["--budget-sets", "general,nonsense"],
            ["nonsense", "retain-neighbour", "retain-far", "general"],
        ),
        (["--pretrained", "MISSING"], ["MISSING"]),
        (["--pretrained", "MISSING", "--general", "GENERAL"], ["MISSING"]),
        (["--pretrained", "MODEL", "--general", "MISSING"], ["MISSING"]),
        (["--pretrained", "MODEL", "--general", "SHORT"], ["SHORT", "too short"]),
    ],
)
def test_wrong_input_of_a_sweep_is_one_line_and_trains_nothing(
    options: list[str], words: list[str], pretrained: Path, general: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str],  # noqa: E501
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was about to be trained")

    monkeypatch.setattr(builtin, "train_builtin", refuse)
    short, out = tmp_path / "short.txt", tmp_path / "run"
    short.write_text("one lonely text about nothing in particular")
    places = {
        "GENERAL": general,
        "MISSING": tmp_path / "missing.txt",
        "MODEL": pretrained,
        "SHORT": short,
    }
    given = [str(places.get(option, option)) for option in options]
    status = main(
        [
            "sweep",
            "--quick",
            "--methods",
            "npo",
            "--seeds",
            "1",
            "--workers",
            "1",
            "--out",
            str(out),
            *given,
        ]
    )
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert status == 2 and printed.out == "" and "Traceback" not in printed.err
    assert len(lines) == 1, printed.err
    for word in words:
        assert str(places.get(word, word)) in lines[0]
    assert len(lines[0]) < 300 + len(
        str(tmp_path)
    )  # the line names what is wrong, not everything that was given
    assert not out.exists() and not cache.exists()


def test_a_sweep_hands_on_what_it_was_given(
    pretrained: Path, general: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(cli, "_pipeline", lambda config, *_, **__: seen.append(config))
    monkeypatch.chdir(tmp_path)
    plain = ["sweep", "--quick", "--out", "run"]
    chosen = [
        "--pretrained",
        "pretrained",
        "--general",
        "general.txt",
        "--training-steps",
        "7",
        "--world",
        "3",
        "--tagged",
        "strangers",
    ]
    assert main(plain) == main([*plain, *chosen]) == 0
    before, after = (config.model for config in seen)
    # Absolute, so that the run can be taken up again from anywhere; everything else as it was.
    assert after == replace(
        before,
        pretrained=str(pretrained),
        general=str(general),
        steps=7,
        world=replace(before.world, seed=3, tagged="strangers"),
    )
    assert "pretrained" in seen[1].scale and seen[1].key != seen[0].key


@pytest.mark.parametrize(
    ("options", "budget", "measure", "sets"),
    [
        ([], 0.05, "kl", ()),
        (["--budget-measure", "loss-rise"], 0.001, "loss-rise", ()),
        (["--budget-measure", "loss-rise", "--budget", "0.02"], 0.02, "loss-rise", ()),
        (["--budget-sets", "general, retain-far"], 0.05, "kl", ("general", "retain-far")),
    ],
)
def test_a_sweep_hands_on_its_budget(
    options: list[str],
    budget: float,
    measure: str,
    sets: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(cli, "_pipeline", lambda config, *_, **__: seen.append(config))
    assert main(["sweep", "--quick", "--out", str(tmp_path / "run"), *options]) == 0
    assert (seen[0].budget, seen[0].budget_measure, seen[0].budget_sets) == (
        budget,
        measure,
        sets,
    )
