"""Files that are either whole or absent: everything is written beside its place and renamed into it."""

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
    """The operating system's error number: of an OSError, or quoted in the text of a library's own exception (safetensors)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    quoted = re.search(r"os error (\d+)", str(error))
    return int(quoted[1]) if quoted else None


@contextmanager
def full_disk_is_an_error(target: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write (full disk, quota, size limit, permission, ...) into one clear line that names the folder."""
    try:
        yield
    except Exception as error:
        code = _code(error)
        if code in _FULL:
            raise WorkbenchError(
                f"the disk is full: could not write {target} ({os.strerror(code)}); free some space or choose another folder, then run the same command again"
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


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary)`` and rename the result to ``path``; on any error nothing is left behind.

    Raises:
        WorkbenchError: the disk is full or the folder cannot be written.
    """
    with full_disk_is_an_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        try:
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

    Raises:
        WorkbenchError: the disk is full or the folder cannot be written.
    """
    with full_disk_is_an_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            write(temporary)
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


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of one file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Mappings and sequences as the dicts and lists that YAML and JSON agree on; everything else as it is."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value


def key_of(value: Any, length: int = 16) -> str:
    """A short stable key of any JSON-like value: the same value gives the same key on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[
        :length
    ]
