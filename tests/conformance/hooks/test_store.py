"""Rows on disk: what is read back is what was captured, whatever interrupted the writing, and
whatever is damaged is said.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy
from workbench.hooks import (
    Capture,
    CaptureError,
    Collect,
    Rows,
    Site,
    Store,
    StoredRows,
    custom,
    real_tokens,
    without_first,
)
from workbench.hooks import store as storing

ModelMaker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
Kept = dict[str, tuple[Tensor, Tensor]]

FIRST, SECOND = "blocks.0.hook_resid_post", "blocks.1.mlp.out.hook_in"
ACTIVATIONS = [FIRST, SECOND]  # of different widths
GRADIENTS = [
    "blocks.0.hook_resid_post_grad",
    "blocks.1.mlp.hook_out_grad",
    "blocks.1.hook_resid_post",
]
ABOUT = {"model": "tiny", "tokens": {"rule": "without_first", "lengths": (1, 2)}}
SMALL, LARGE = 1, 2**30


@pytest.fixture
def batches(make_batch: BatchMaker) -> list[Batch]:
    """Six batches with different numbers of rows."""
    return [
        make_batch(lengths, seed)
        for seed, lengths in enumerate([(7, 5), (4,), (6, 6, 3), (5,), (3, 8), (7,)])
    ]


def _pass(model: PreTrainedModel, batch: Batch, sites: Sequence[str], capture: Capture) -> None:
    if any(site.endswith("_grad") for site in sites):
        cross_entropy(model, batch).backward()
    else:
        capture.forward(batch.inputs)


def _run(
    model: PreTrainedModel,
    store: Store,
    batches: Sequence[Batch],
    sites: Sequence[str] = ACTIVATIONS,
    *others: Any,
    stop: BaseException | None = None,
) -> None:
    """Go on where the store ended; raise ``stop`` after the last batch."""
    with Capture(model, sites, store, *others, at=without_first) as capture:
        for batch in batches[store.passes :]:
            _pass(model, batch, sites, capture)
        if stop is not None:
            raise stop


def _expected(
    model: PreTrainedModel, batches: Sequence[Batch], sites: Sequence[str] = ACTIVATIONS
) -> Kept:
    """What an uninterrupted run delivers: values, and (pass, example, position)."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {site: [] for site in sites}

    def keep(site: Site, rows: Rows) -> None:
        found[site.name].append(
            (
                rows.values.clone(),
                torch.cat([torch.full((len(rows.where), 1), rows.number), rows.where], dim=1),
            )
        )

    with Capture(model, sites, keep, at=without_first) as capture:
        for batch in batches:
            _pass(model, batch, sites, capture)
    return {
        site: (torch.cat([values for values, _ in parts]), torch.cat([where for _, where in parts]))
        for site, parts in found.items()
    }


def _same(folder: Path, expected: Kept, passes: int | None = None) -> None:
    """The store holds the first ``passes`` passes of ``expected`` (all by default), byte for
    byte.
    """
    stored = StoredRows(folder)
    assert stored.names == list(expected)
    for site, (values, where) in expected.items():
        whole = where[:, 0] < (stored.passes if passes is None else passes)
        assert passes is not None or bool(whole.all()), f"{stored.passes} passes"
        assert stored[site].dtype == values.dtype
        assert stored.where(site).tolist() == where[whole].tolist()
        assert torch.equal(
            stored[site].contiguous().view(torch.uint8), values[whole].view(torch.uint8)
        )


@pytest.mark.parametrize("sites", [ACTIVATIONS, GRADIENTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_back_is_what_was_collected_bit_for_bit(
    dtype: torch.dtype,
    sites: list[str],
    llama: PreTrainedModel,
    batches: list[Batch],
    tmp_path: Path,
) -> None:
    model, rows = llama.to(dtype), Collect()
    _run(model, Store(tmp_path / "rows", ABOUT), batches, sites, rows)
    stored = StoredRows(tmp_path / "rows")
    assert stored.passes == len(batches)
    assert stored.about == json.loads(json.dumps(ABOUT))
    for site in sites:
        assert stored[site].dtype == dtype and len(stored[site]) > 30
        assert torch.equal(stored[site].view(torch.uint8), rows[site].view(torch.uint8))
    _same(tmp_path / "rows", _expected(model, batches, sites))


def test_where_says_pass_example_and_position(
    llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    _run(llama, Store(tmp_path), batches)
    by_hand = [
        [number, example, position]
        for number, batch in enumerate(batches)
        for example, length in enumerate(batch.attention_mask.sum(1).tolist())
        for position in range(1, length)
    ]
    for site in ACTIVATIONS:
        assert StoredRows(tmp_path).where(site).tolist() == by_hand


@pytest.mark.parametrize("sites", [ACTIVATIONS, GRADIENTS])
def test_many_small_shards_hold_the_same_as_one(
    sites: list[str], llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    expected = _expected(llama, batches, sites)
    for bytes_, fewest, most in ((SMALL, 6, 6), (3000, 2, 4), (LARGE, 1, 1)):
        _run(llama, Store(tmp_path / str(bytes_), shard_bytes=bytes_), batches, sites)
        _same(tmp_path / str(bytes_), expected)
        for site in sites:
            shards = list(StoredRows(tmp_path / str(bytes_)).shards(site))
            assert fewest <= len(shards) <= most
            assert all(len(values) == len(where) for values, where in shards)


def test_a_pass_that_selects_nothing_counts_and_holds_no_row(
    llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    for folder, masks in (("some", (True, False, True)), ("none", (False, False, False))):
        with Capture(llama, ACTIVATIONS, Store(tmp_path / folder, shard_bytes=SMALL)) as capture:
            for batch, chosen in zip(batches, masks, strict=False):
                capture.at(
                    real_tokens if chosen else custom(torch.zeros_like(batch.attention_mask).bool())
                )
                capture.forward(batch.inputs)
        stored = StoredRows(tmp_path / folder)
        assert stored.passes == 3
        assert stored[SECOND].shape == (12 + 15 if masks[0] else 0, 24)
        assert set(stored.where(SECOND)[:, 0].tolist()) == ({0, 2} if masks[0] else set())


def test_files_are_safetensors_and_json_and_values_are_memory_mapped(
    llama: PreTrainedModel, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(llama, Store(tmp_path, ABOUT), batches)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "index.json").read_text())["about"]["model"] == "tiny"
    shards = sorted(files - {tmp_path / "index.json"})
    assert [path.suffix for path in shards] == [".safetensors"] * len(ACTIVATIONS)
    for path in shards:
        data = path.read_bytes()
        assert {"values", "where"} <= json.loads(
            data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
        ).keys()
    for loader in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, loader, lambda *_: pytest.fail("something was unpickled"))
    ((values, _),) = StoredRows(tmp_path).shards(FIRST)
    before = values.clone()
    if Path("/proc/self/maps").exists():
        assert str(shards[0]) in Path("/proc/self/maps").read_text()
    values.zero_()  # writing to the mapped tensor must not reach the file
    assert torch.equal(StoredRows(tmp_path)[FIRST], before)


@pytest.mark.parametrize("sites", [ACTIVATIONS, GRADIENTS])
def test_no_more_than_a_shard_and_a_pass_is_held_in_memory(
    sites: list[str], llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    store = Store(tmp_path, shard_bytes=4000)
    largest, held = 0, [0]

    def watch(_site: Site, _rows: Rows) -> None:
        held.append(
            sum(
                tensor.nbytes
                for parts in store._waiting.values()
                for pair in parts.values()
                for tensor in pair
            )
        )

    for values, where in _expected(llama, batches, sites).values():
        per_row = values[0].nbytes + 3 * 4
        largest += int(where[:, 0].bincount().max()) * per_row
    _run(llama, store, batches * 4, sites, watch)
    assert 2000 < max(held) <= 4000 + largest
    assert store.passes == 4 * len(batches)
    assert not store._waiting


@pytest.mark.parametrize("shard_bytes", [SMALL, 2000, LARGE])
@pytest.mark.parametrize("stop", [ZeroDivisionError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("sites", [ACTIVATIONS, GRADIENTS])
def test_a_run_that_was_stopped_goes_on_and_holds_the_rows_of_one_that_was_not(
    sites: list[str],
    stop: BaseException,
    shard_bytes: int,
    llama: PreTrainedModel,
    batches: list[Batch],
    tmp_path: Path,
) -> None:
    expected = _expected(llama, batches, sites)
    for number, cut in enumerate([(0,), (1,), (4,), (6,), (2, 3, 3, 5)]):
        folder = tmp_path / str(number)
        for until in cut:
            with pytest.raises(type(stop)):
                _run(llama, Store(folder, ABOUT, shard_bytes), batches[:until], sites, stop=stop)
            assert Store(folder, ABOUT).passes == until
        _run(llama, Store(folder, ABOUT, shard_bytes), batches, sites)
        _same(folder, expected)
        assert len(StoredRows(folder).where(sites[0]).unique(dim=0)) == len(
            expected[sites[0]][1]
        )  # nothing twice


def test_one_open_store_takes_several_captures(
    llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    store = Store(tmp_path, shard_bytes=LARGE)
    for until in (2, 3, 6):
        _run(llama, store, batches[:until])
        _same(tmp_path, _expected(llama, batches), passes=until)


@contextmanager
def _block_that_raises(model: PreTrainedModel, error: BaseException) -> Iterator[None]:
    """The second block raises: the first site has fired by then, the second has not."""

    def explode(_module: nn.Module, _args: object) -> None:
        raise error

    handle = model.get_submodule("model.layers.1").register_forward_pre_hook(explode)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("shard_bytes", [SMALL, LARGE])
@pytest.mark.parametrize("error", [ZeroDivisionError("planted"), KeyboardInterrupt()])
def test_a_pass_cut_short_is_dropped(
    error: BaseException,
    shard_bytes: int,
    llama: PreTrainedModel,
    batches: list[Batch],
    tmp_path: Path,
) -> None:
    expected = _expected(llama, batches)
    with (
        pytest.raises(type(error)),
        Capture(
            llama, ACTIVATIONS, Store(tmp_path, ABOUT, shard_bytes), at=without_first
        ) as capture,
    ):
        for batch in batches[:3]:
            capture.forward(batch.inputs)
        with _block_that_raises(llama, error):
            capture.forward(batches[3].inputs)
    assert StoredRows(tmp_path).passes == 3
    _same(tmp_path, expected, passes=3)
    with Capture(
        llama, ACTIVATIONS, Store(tmp_path, ABOUT, shard_bytes), at=without_first
    ) as capture:
        with suppress(ZeroDivisionError, KeyboardInterrupt), _block_that_raises(llama, error):
            capture.forward(
                batches[5].inputs
            )  # caught inside the capture: the next pass takes its number, and none of its rows
        for batch in batches[3:]:
            capture.forward(batch.inputs)
    _same(tmp_path, expected)


def test_a_pass_without_its_gradients_is_dropped(
    llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    expected = _expected(llama, batches, GRADIENTS)
    with (
        pytest.raises(KeyboardInterrupt),
        Capture(llama, GRADIENTS, Store(tmp_path, shard_bytes=SMALL), at=without_first),
    ):
        cross_entropy(llama, batches[0]).backward()
        cross_entropy(llama, batches[1])
        raise KeyboardInterrupt
    _same(tmp_path, expected, passes=1)
    _run(llama, Store(tmp_path), batches, GRADIENTS)
    _same(tmp_path, expected)


@pytest.mark.parametrize("shard_bytes", [SMALL, 3000, LARGE])
def test_several_passes_before_one_backward_are_all_stored(
    shard_bytes: int, llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    # Autograd goes back through the last pass first, so the rows of an earlier pass come after
    # those of a later one.
    with Capture(llama, GRADIENTS, Store(tmp_path, shard_bytes=shard_bytes), at=without_first):
        for pair in (batches[:2], batches[2:4], batches[4:]):
            torch.stack([cross_entropy(llama, batch) for batch in pair]).sum().backward()
    _same(tmp_path, _expected(llama, batches, GRADIENTS))


@pytest.mark.parametrize("shard_bytes", [SMALL, LARGE])
def test_a_pass_that_the_capture_refuses_is_not_stored(
    shard_bytes: int, llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    # The module runs twice in the third pass, so its rows of that pass cannot be told apart.
    layer, calls = llama.get_submodule("model.layers.1"), []
    shared = nn.Linear(16, 16)
    layer.add_module("twice", shared)
    layer.register_forward_hook(
        lambda _m, _a, output: (
            calls.append(0),
            shared(shared(output) if len(calls) == 3 else output),
        )[1]
    )
    with (
        pytest.raises(CaptureError, match="2 times"),
        Capture(
            llama, "model.layers.1.twice:out", Store(tmp_path, ABOUT, shard_bytes), at=without_first
        ),
    ):
        with torch.no_grad():
            for batch in batches:
                llama(**batch.inputs)
    assert StoredRows(tmp_path).passes == 2


def test_a_store_goes_on_from_whatever_a_kill_leaves_behind(
    llama: PreTrainedModel, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy of the folder is taken around every file operation, and once more with what is being
    # written cut in half. Each copy is what a kill would have left.
    folder, snapshots = tmp_path / "rows", []

    def snapshot(moment: str) -> None:
        if not folder.exists():
            return
        for half in (False, True):
            copy = tmp_path / f"killed-{len(snapshots)}"
            shutil.copytree(folder, copy)
            parts = list(copy.rglob("*.part"))
            if half and not parts:
                shutil.rmtree(copy)
                return
            for part in parts if half else []:
                os.truncate(part, part.stat().st_size // 2)
            snapshots.append((copy, f"{moment}{', half written' if half else ''}"))

    def spied(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            target = next(
                (Path(arg).relative_to(folder) for arg in reversed(args) if isinstance(arg, Path)),
                "",
            )
            snapshot(f"before {name} {target}")
            result = original(*args, **kwargs)
            snapshot(f"after {name} {target}")
            return result

        return call

    with monkeypatch.context() as patched:
        patched.setattr("workbench.hooks.store.save_file", spied("saving", storing.save_file))
        patched.setattr(Path, "replace", spied("naming", Path.replace))
        _run(llama, Store(folder, ABOUT, SMALL), batches[:3])
    assert len(snapshots) > 20
    expected, problems = _expected(llama, batches[:3]), []
    for copy, moment in snapshots:
        try:
            _run(llama, Store(copy, ABOUT, SMALL), batches[:3])
            _same(copy, expected)
        except CaptureError as error:
            problems.append(f"{moment}: {error}")
    assert not problems, "\n".join(problems)


_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
_FULL_IN_SAFETENSORS = SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(
    ("operation", "error", "allowed"),
    [("save_file", error, count) for error in (_FULL, _FULL_IN_SAFETENSORS) for count in range(5)]
    + [("replace", _FULL, count) for count in range(7)],
)
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_space(
    operation: str,
    error: Exception,
    allowed: int,
    once: bool,
    llama: PreTrainedModel,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A pass is two shards and an index: two calls of save_file and three of replace. From some call
    # on, there is no space; or at that call alone.
    holder, folder, expected, calls = (
        storing if operation == "save_file" else Path,
        tmp_path / "rows",
        _expected(llama, batches),
        [],
    )
    original = getattr(holder, operation)

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == allowed + 1 or (len(calls) > allowed and not once):
            raise error
        return original(*args, **kwargs)

    with (
        monkeypatch.context() as patched,
        pytest.raises(CaptureError, match=r"No space left on device.*free some space") as caught,
    ):
        patched.setattr(holder, operation, full)
        _run(llama, Store(folder, ABOUT, SMALL), batches)
    assert str(folder) in str(caught.value)
    whole = allowed // (2 if operation == "save_file" else 3)
    if whole:
        assert StoredRows(folder).passes in (
            whole,
            whole + once,
        )  # on leaving, what is in memory is written where there is space again
        _same(folder, expected, StoredRows(folder).passes)
    _run(llama, Store(folder, ABOUT, SMALL), batches)
    _same(folder, expected)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_store_of_something_else_is_refused_and_nothing_is_lost(
    llama: PreTrainedModel, batches: list[Batch], make_model: ModelMaker, tmp_path: Path
) -> None:
    _run(llama, Store(tmp_path, ABOUT), batches[:2])
    before = _contents(tmp_path)
    for about in (None, {}, {**ABOUT, "model": "other"}, {"model": "tiny"}):
        with pytest.raises(CaptureError, match="tiny") as caught:
            Store(tmp_path, about)
        assert str(tmp_path) in str(caught.value)
    for sites in (
        [FIRST],
        [FIRST, SECOND, "hook_embed"],
        [FIRST, "blocks.1.hook_resid_post"],
        [SECOND, FIRST],
    ):
        with pytest.raises(CaptureError, match="holds the sites"):
            _run(llama, Store(tmp_path, ABOUT), batches, sites)
    for other in (
        make_model(hidden_size=24, head_dim=6),
        make_model().bfloat16(),
    ):  # the same names, but another width or another type
        with pytest.raises(CaptureError, match=FIRST):
            _run(other, Store(tmp_path, ABOUT, SMALL), batches)
    assert (
        sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in llama.modules()
        )
        == 0
    )
    listed = _contents(tmp_path)
    assert {name: listed[name] for name in before} == before
    _run(llama, Store(tmp_path, ABOUT), batches)
    _same(tmp_path, _expected(llama, batches))


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "0000/notes.txt",
        "model.safetensors",
        "data/00000.safetensors",
        "0000/deeper/00000.safetensors",
    ],
)
def test_a_folder_with_other_files_is_refused_and_left_alone(foreign: str, tmp_path: Path) -> None:
    (tmp_path / foreign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(CaptureError, match="no store") as caught:
        Store(tmp_path, ABOUT)
    assert str(tmp_path) in str(caught.value)
    assert _contents(tmp_path) == {str(tmp_path / foreign): b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("mine")
    for opened in (Store, StoredRows):
        with pytest.raises(CaptureError, match="rows"):
            opened(tmp_path / "rows")
    assert (tmp_path / "rows").read_text() == "mine"


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _alter,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ],
)
def test_a_damaged_shard_is_an_error_that_names_the_file(
    damage: Callable[[Path], None],
    number: int,
    llama: PreTrainedModel,
    batches: list[Batch],
    tmp_path: Path,
) -> None:
    _run(llama, Store(tmp_path, shard_bytes=SMALL), batches[:3])
    path = sorted(tmp_path.rglob("*.safetensors"))[3 + number]  # of the second site
    damage(path)
    for read in (
        lambda: StoredRows(tmp_path)[SECOND],
        lambda: StoredRows(tmp_path).where(SECOND),
        lambda: list(StoredRows(tmp_path).shards(SECOND)),
    ):
        with pytest.raises(CaptureError) as caught:
            read()
        assert str(path) in str(caught.value)
    assert len(StoredRows(tmp_path)[FIRST]) > 0  # the other site is whole


@pytest.mark.parametrize("entry", ["rows", "width", "dtype"])
def test_a_shard_that_does_not_fit_its_index_is_an_error_that_names_the_file(
    entry: str, llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    _run(llama, Store(tmp_path), batches[:3])
    index = storing._read_index(tmp_path)
    site = index["sites"][0]
    place, wrong = {"rows": (site["shards"][0], 5), "width": (site, 5), "dtype": (site, "float16")}[
        entry
    ]
    place[entry] = wrong
    storing._write_index(tmp_path, index)  # by a writer that is wrong
    with pytest.raises(CaptureError, match=r"00000\.safetensors"):
        _ = StoredRows(tmp_path)[FIRST]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 1',
        b"[]",
        b"7",
        b'{"format": 1, "about": {}, "passes": 0, "sites": []}',
        b'{"format": 2, "about": {}, "passes": 0, "sites": []}',
        b"{}",
        b'{"format": 1}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_index_is_an_error_that_names_the_file(
    content: bytes, llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    _run(llama, Store(tmp_path), batches[:1])
    (tmp_path / "index.json").write_bytes(content)
    for opened in (Store, lambda folder: StoredRows(folder)[FIRST]):
        with pytest.raises(CaptureError, match=r"index\.json"):
            opened(tmp_path)
    assert (tmp_path / "index.json").read_bytes() == content


def test_an_index_with_any_byte_changed_is_an_error_or_means_the_same(
    llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    _run(llama, Store(tmp_path, about={"model": "tiny"}), batches[:2])
    path = tmp_path / "index.json"
    content, expected = path.read_bytes(), storing._read_index(tmp_path)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 7)
        path.write_bytes(bytes(changed))
        try:
            found = storing._read_index(tmp_path)
        except CaptureError as caught:
            said = str(caught)
        else:
            said = "index.json" if found == expected else "another index"  # a blank for a blank
        assert "index.json" in said


def test_no_store_and_no_such_site_are_errors(
    llama: PreTrainedModel, batches: list[Batch], tmp_path: Path
) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CaptureError, match=r"index\.json"):
            StoredRows(folder)
    _run(llama, Store(tmp_path), batches[:1])
    stored = StoredRows(tmp_path)
    for read in (stored.__getitem__, stored.where, lambda name: list(stored.shards(name))):
        with pytest.raises(
            CaptureError, match=r"'blocks.0.hook_resid_pots'.*nearest: blocks\.0\.hook_resid_post"
        ):
            read("blocks.0.hook_resid_pots")
    assert FIRST in repr(stored)
