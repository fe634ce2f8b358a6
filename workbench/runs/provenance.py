"""Where a result comes from: configuration, versions, revision, machine, hashes of data and
weights.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from workbench.data.records import Example
from workbench.files import key_of

_PACKAGES = (
    "unlearning-workbench",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "pyarrow",
    "matplotlib",
)


def _revision() -> str:
    """The git revision of the code, with ``-dirty`` where files differ from it; empty outside a
    checkout.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        revision = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
        return revision + ("-dirty" if dirty.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def data_hash(examples: Iterable[Example]) -> str:
    """A key of the texts, their answers and their order."""
    return key_of(
        [(example.text, example.answer, example.subject, example.item) for example in examples]
    )


def provenance(
    config: Mapping[str, Any], *, data: Mapping[str, str], weights: Mapping[str, str]
) -> dict[str, Any]:
    """The record written beside a result.

    Args:
        config: plain values.
        data: name to :func:`data_hash`.
        weights: model name to hash of its safetensors.
    """
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "config_key": key_of(dict(config)),
        "revision": _revision(),
        "versions": {"python": platform.python_version()}
        | {name: version for name in _PACKAGES if (version := _version(name))},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "data": dict(data),
        "weights": dict(weights),
    }
