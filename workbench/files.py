"""Files that are either whole or absent: everything is written beside its place and renamed into
it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def _code(error: Exception) -> int | None:
    """The operating system's error number: of an OSError, or quoted in the text of a library's own
    exception (safetensors).
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    quoted = re.search(r"os error (\d+)", str(error))
    return int(quoted[1]) if quoted else None


@contextmanager
def full_disk_is_an_error(target: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write (full disk, quota, size limit, permission, ...)
    into one clear line that names the folder.
    """
    try:
        yield
    except Exception as error:
        code = _code(error)
        if code in _FULL:
            raise WorkbenchError(
                f"the disk is full: could not write {target} ({os.strerror(code)}); free some "
                "space or choose another folder, then run the same command again"
            ) from error
        if code in _DENIED:
            raise WorkbenchError(
                f"not allowed to write {target}; choose a folder that you may write to"
            ) from error
        if isinstance(error, OSError):
            raise WorkbenchError(
                f"cannot write {target}: {error.strerror or error}; choose another folder"
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def alive(pid: int) -> bool:
    """Is there a process of this number?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sweep(folder: Path, prefix: str) -> None:
    """Remove what killed processes left half-written: ``<prefix><pid>.…`` of processes that are
    gone.
    """
    for path in folder.glob(f"{prefix}*"):
        pid = path.name.removeprefix(prefix).partition(".")[0]
        if pid.isdecimal() and not alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )


def _beside(path: Path) -> str:
    """The prefix of this process's temporary files for ``path``; leftovers of dead ones go."""
    sweep(path.parent, f".{path.name}.")
    return f".{path.name}.{os.getpid()}."


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary)`` and rename the result to ``path``; on any error nothing is left
    behind.

    Raises:
        WorkbenchError: the disk is full or the folder cannot be written.
    """
    with full_disk_is_an_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_beside(path), suffix=path.suffix)
        temporary = Path(name)
        try:
            os.close(handle)
            write(temporary)
            temporary.chmod(
                0o666 & ~_umask()
            )  # mkstemp makes private files; a result is as readable as any other file of the user
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary folder)`` and rename the result to ``path``, replacing what was there.
    The hashes of its files go into :data:`MANIFEST` inside.

    Raises:
        WorkbenchError: the disk is full or the folder cannot be written.
    """
    with full_disk_is_an_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_beside(path)))
        try:
            write(temporary)
            _write_manifest(temporary)
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                old = temporary.with_name(temporary.name + ".old")
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


MANIFEST = "sha256.json"
"""In every folder written by :func:`write_folder`: file -> SHA-256."""


def _write_manifest(folder: Path) -> None:
    hashes = {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str:
    """What is wrong with a folder that :func:`write_folder` wrote, in words; nothing where it is as
    it was written. Files that were added are nobody's business.
    """
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {folder / str(name): str(digest) for name, digest in hashes.items()}
    except (OSError, ValueError, AttributeError):
        return f"{folder / MANIFEST} is missing or damaged"
    for path, digest in files.items():
        if not path.is_file():
            return f"{path} is missing"
        if known_hash(path) != digest:
            return f"{path} is not as it was written (its SHA-256 differs)"
    return ""


_HASHES: dict[tuple[str, int, int], str] = {}


def known_hash(path: Path) -> str:
    """SHA-256 of a file, computed once a process for one size and time of change."""
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key not in _HASHES:
        _HASHES[key] = sha256(path)
    return _HASHES[key]


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """Mappings and sequences as the dicts and lists that YAML and JSON agree on; everything else as
    it is.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value


def key_of(value: Any, length: int = 16) -> str:
    """A short stable key of any JSON-like value: the same value gives the same key on every
    machine.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[
        :length
    ]
