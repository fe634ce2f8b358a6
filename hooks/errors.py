"""Errors of the capture layer. Every message says what was asked for, what was seen, and what to
do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CaptureError(RuntimeError):
    """A site that does not exist, did not fire, or produced rows that nobody selected."""


def unknown_site(name: str, known: Iterable[str]) -> CaptureError:
    """The error for a site name that resolves to nothing; lists the nearest names that exist."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
    return CaptureError(
        f"unknown site {name!r}; nearest: {', '.join(near) or 'none'}. `workbench sites MODEL` "
        "lists every name of a model."
    )


def compiled_module(path: str, what: str) -> CaptureError:
    """The error for a hook inside a compiled module, where it would be skipped in silence once the
    module has run.
    """
    return CaptureError(
        f"{path or 'the model'} is compiled, so hooks on {what} inside it would be skipped in "
        "silence. Capture the model before torch.compile; or compile a copy and capture the "
        "original, whose parameters can be shared"
    )
