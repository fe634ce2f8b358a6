"""Captured rows on disk: safetensors shards that are read memory-mapped, and an index that only
ever speaks of whole passes.

Layout of a store::

    index.json                 what was captured: sites, widths, dtypes, passes, shards with their
    size and SHA-256 0000/00000.safetensors     site 0, first shard: ``values`` [rows width] and
    ``where`` [rows 3] (pass, example, position)

The index is replaced in one step after its shards are complete, so a killed run leaves a store that
ends at a whole pass and goes on from there. Prefer reducing while the pass runs
(:class:`hooks.MomentsOf`) to storing: the residual stream of an 8B model in bf16 is 256 kB a token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.hooks.capture import Rows
from workbench.hooks.errors import CaptureError, unknown_site
from workbench.hooks.html import table
from workbench.hooks.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_FORMAT = 2


class Store:
    """A consumer that writes rows to ``folder``; open the same folder again to go on where it
    ended.

    >>> store = Store("activations", about={"model": "...", "tokens": "without_first"})                  # doctest: +SKIP
    >>> with Capture(model, "blocks.*.hook_resid_post", store, at=without_first) as capture:            # doctest: +SKIP
    ...     for batch in batches[store.passes:]:                                                        # passes that are already on disk
    ...         capture.forward(batch.inputs)

    Args:
        folder: new, or an earlier store of the same sites and the same ``about``.
        about: anything JSON can hold that says what the rows are (model, weights hash, tokenizer,
            token rule, data); a store is only continued where it is the same.
        shard_bytes: rows are kept in memory until about so many bytes have come together.

    Raises:
        CaptureError: the folder holds something else, or a store of other sites or another
            ``about``; the disk is full.
    """  # noqa: E501

    def __init__(
        self,
        folder: str | Path,
        about: Mapping[str, Any] | None = None,
        shard_bytes: int = 256 * 2**20,
    ) -> None:
        self.folder = Path(folder)
        self.about = json.loads(json.dumps(dict(about or {})))
        self.shard_bytes = shard_bytes
        self._index: dict[str, Any] = {
            "format": _FORMAT,
            "about": self.about,
            "passes": 0,
            "sites": [],
        }
        if (self.folder / "index.json").exists():
            self._index = _read_index(self.folder)
            if self._index["about"] != self.about:
                raise CaptureError(
                    f"{self.folder} holds rows of {self._index['about']}, not of {self.about}; "
                    "name another folder, or delete it"
                )
        elif self.folder.exists() and not _leftover(self.folder):
            raise CaptureError(f"{self.folder} holds files that are no store; name a new folder")
        self._waiting: dict[int, dict[str, list[Tensor]]] = {}  # pass -> site -> [values, where]
        self._bytes = 0
        self._first = 0
        self._newest = -1

    @property
    def passes(self) -> int:
        """How many whole passes are on disk: skip that many batches to go on."""
        return int(self._index["passes"])

    def begin(self, sites: Sequence[Site]) -> None:
        """Called by the capture on entry: the sites of a continued store must be the same."""
        names = [site.name for site in sites]
        stored_names = [entry["name"] for entry in self._index["sites"]]
        if not stored_names:
            self._index["sites"] = [
                {
                    "name": name,
                    "folder": f"{number:04d}",
                    "width": None,
                    "dtype": None,
                    "shards": [],
                }
                for number, name in enumerate(names)
            ]
        elif stored_names != names:
            raise CaptureError(
                f"{self.folder} holds the sites {', '.join(stored_names)}, not {', '.join(names)}; "
                "name another folder"
            )
        self._first = self.passes
        self._waiting.clear()
        self._bytes = 0
        self._newest = -1

    def __call__(self, site: Site, rows: Rows) -> None:
        """Take the rows of one site in one pass; write when enough whole passes have come
        together.
        """
        number = self._first + rows.number
        values = rows.values.cpu().contiguous()
        positions = torch.cat(
            [torch.full((len(rows.where), 1), number), rows.where.cpu()], dim=1
        ).int()
        self._waiting.setdefault(number, {})[site.name] = [values, positions]
        self._bytes += values.nbytes + positions.nbytes
        self._newest = max(
            self._newest, number
        )  # autograd delivers the last of several passes first
        if self._bytes >= self.shard_bytes:
            self._flush(before=self._newest)

    def drop(self, number: int) -> None:
        """Called by the capture for a pass that it refuses, or that was cut short: its rows do not
        count, and come again on resuming.
        """
        self._waiting.pop(self._first + number, None)
        self._bytes = sum(
            tensor.nbytes
            for sites in self._waiting.values()
            for pair in sites.values()
            for tensor in pair
        )

    def end(self, finished: bool) -> None:
        """Called by the capture on exit: write the whole passes that are left."""
        self._flush(before=self._newest + 1)
        self._waiting.clear()

    def _flush(self, before: int) -> None:
        """Write the whole passes before that number: the newest one may still be refused."""
        sites, ready = self._index["sites"], self.passes
        while ready < before and len(self._waiting.get(ready, {})) == len(sites):
            ready += 1
        if ready == self.passes:
            return
        numbers = range(self.passes, ready)
        index = json.loads(json.dumps(self._index))
        try:
            for entry in index["sites"]:
                parts = [self._waiting[number][entry["name"]] for number in numbers]
                values, positions = (torch.cat([part[side] for part in parts]) for side in (0, 1))
                dtype = str(values.dtype).removeprefix("torch.")
                if entry["width"] is not None and (entry["width"], entry["dtype"]) != (
                    values.shape[1],
                    dtype,
                ):
                    raise CaptureError(
                        f"{entry['name']} gave rows of width {values.shape[1]}, {dtype}; the store "
                        f"{self.folder} holds width {entry['width']}, {entry['dtype']}"
                    )
                entry.update(width=values.shape[1], dtype=dtype)
                entry["shards"].append(
                    _write_shard(
                        self.folder / entry["folder"] / f"{len(entry['shards']):05d}.safetensors",
                        values,
                        positions,
                    )
                )
            index["passes"] = ready
            _write_index(self.folder, index)
        except (OSError, SafetensorError) as error:
            raise CaptureError(
                f"cannot write to {self.folder}: {error}. What was written before is whole; free "
                "some space and run again to go on"
            ) from error
        self._index = index
        for number in numbers:
            self._bytes -= sum(
                tensor.nbytes for parts in self._waiting.pop(number).values() for tensor in parts
            )


def _leftover(folder: Path) -> bool:
    """Empty, or what a run leaves that was killed before its first index: nothing in there
    counts.
    """

    def shards(path: Path) -> bool:
        return (
            path.is_dir()
            and path.name.isdigit()
            and all(part.name.endswith((".safetensors", ".part")) for part in path.iterdir())
        )

    return folder.is_dir() and all(
        path.name == "index.part" or shards(path) for path in folder.iterdir()
    )


def _write_shard(path: Path, values: Tensor, where: Tensor) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({"values": values, "where": where}, part)
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = part.stat().st_size
    part.replace(path)
    return {"file": path.name, "rows": len(values), "bytes": size, "sha256": digest}


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    part = folder / "index.part"
    with part.open("w", encoding="utf-8") as file:
        json.dump(index | {"sha256": _digest(index)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / "index.json")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CaptureError(f"{folder} is no store of rows: it has no index.json") from error
    except (OSError, ValueError) as error:
        raise CaptureError(f"{path} cannot be read: {error}") from error
    if (
        not isinstance(index, dict)
        or index.get("format") != _FORMAT
        or not {"about", "passes", "sites"} <= set(index)
    ):
        raise CaptureError(
            f"{path} is not an index of format {_FORMAT}; was it damaged, or written by another "
            "version?"
        )
    if index.pop("sha256", None) != _digest(index):
        raise CaptureError(
            f"{path} is not as it was written (its hash differs); capture the rows again"
        )
    return index


class StoredRows:
    """The rows of a store, read shard by shard and memory-mapped: ``for rows in
    StoredRows(folder).shards(site)``.

    Every shard is checked against the index before its first row is given out: size, shapes, dtype
    and SHA-256.

    Args:
        folder: a store.

    Raises:
        CaptureError: no store is there; when reading, a shard is missing, truncated or altered.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._index = _read_index(self.folder)
        self._checked: set[Path] = set()

    @property
    def about(self) -> dict[str, Any]:
        """What the writer said about the rows."""
        return dict(self._index["about"])

    @property
    def passes(self) -> int:
        """Number of whole passes."""
        return int(self._index["passes"])

    @property
    def names(self) -> list[str]:
        """The sites, in the order of the capture."""
        return [entry["name"] for entry in self._index["sites"]]

    def __repr__(self) -> str:
        sites = ", ".join(
            f"{e['name']} [{sum(s['rows'] for s in e['shards'])}, {e['width']}] {e['dtype']}"
            for e in self._index["sites"][:3]
        )
        return (
            f"StoredRows({str(self.folder)!r}: {self.passes} passes; "
            f"{sites}{', …' if len(self.names) > 3 else ''})"
        )

    def _repr_html_(self) -> str:
        lines = (
            (
                e["name"],
                sum(s["rows"] for s in e["shards"]),
                e["width"],
                e["dtype"],
                len(e["shards"]),
            )
            for e in self._index["sites"]
        )
        return table(
            f"Rows of {self.passes} passes in {self.folder}",
            ("site", "rows", "width", "dtype", "shards"),
            lines,
        )

    def shards(
        self, name: str
    ) -> Iterator[tuple[Float[Tensor, "rows width"], Int[Tensor, "rows 3"]]]:
        """Shard after shard of one site, memory-mapped.

        Yields:
            ``values``, and ``where`` (pass, example, position) they stand.
        """
        entry = next((entry for entry in self._index["sites"] if entry["name"] == name), None)
        if entry is None:
            raise unknown_site(name, self.names)
        for shard in entry["shards"]:
            path = self.folder / entry["folder"] / shard["file"]
            self._check(path, shard)
            try:
                with safe_open(path, framework="pt") as file:
                    values, positions = file.get_tensor("values"), file.get_tensor("where")
            except (OSError, SafetensorError) as error:
                raise CaptureError(f"{path} cannot be read: {error}") from error
            shape = [shard["rows"], entry["width"]]
            if (
                list(values.shape) != shape
                or list(positions.shape) != [shard["rows"], 3]
                or str(values.dtype) != f"torch.{entry['dtype']}"
            ):
                raise CaptureError(
                    f"{path} holds {list(values.shape)} {values.dtype}, but the index says {shape} "
                    f"{entry['dtype']}"
                )
            yield values, positions

    def __getitem__(self, name: str) -> Float[Tensor, "rows width"]:
        """All rows of one site in memory."""
        return torch.cat([values for values, _ in self.shards(name)])

    def where(self, name: str) -> Int[Tensor, "rows 3"]:
        """Pass, example and position of all rows of one site."""
        return torch.cat([where for _, where in self.shards(name)])

    def _check(self, path: Path, shard: Mapping[str, Any]) -> None:
        if path in self._checked:
            return
        if not path.exists():
            raise CaptureError(f"{path} is missing, though the index lists it")
        if path.stat().st_size != shard["bytes"]:
            raise CaptureError(
                f"{path} has {path.stat().st_size} bytes, but the index says {shard['bytes']}: it "
                "was cut short or replaced"
            )
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                raise CaptureError(
                    f"{path} does not have the SHA-256 that the index says: it was altered after "
                    "writing"
                )
        self._checked.add(path)
