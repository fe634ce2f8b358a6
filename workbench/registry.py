"""The registries: methods, wrappers, attacks, probes, figures and claims by name.

Each is filled in the same four ways: by the workbench's own modules, by a decorator in a notebook
or a script, by the entry points of an installed package, and by a file given with ``--plugin``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import cloudpickle

from workbench.errors import WorkbenchError, unknown


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The identifier."""


Entry = TypeVar("Entry", bound=Named)


@dataclass(eq=False)
class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name; a mapping that fills itself at the first look.

    Attributes:
        kind: what an entry is called in messages.
        home: module that adds the workbench's own entries.
        group: entry points of installed packages; importing one adds its entries.
    """

    kind: str
    home: str
    group: str
    _entries: dict[str, Entry] = field(default_factory=dict, repr=False)
    _added: dict[str, Entry] = field(default_factory=dict, repr=False)
    _loaded: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        REGISTRIES[self.kind] = self

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the imports: they come back here
        try:
            importlib.import_module(self.home)
            for point in entry_points(group=self.group):
                self._load_point(point)
        except BaseException:
            self._loaded = False  # it stays an error, not one for the first look alone
            raise

    def _load_point(self, point: EntryPoint) -> None:
        try:
            loaded = point.load()
        except Exception as error:
            raise WorkbenchError(
                f"the {self.kind} {point.name!r} of the installed package {point.value} cannot be "
                f"loaded: {error!r}; mend or uninstall it"
            ) from error
        # a module whose decorators have added its entries, or an entry itself
        if hasattr(loaded, "name") and self._entries.get(loaded.name) is not loaded:
            self.add(loaded)

    def __getitem__(self, name: str) -> Entry:
        self._load()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._entries)

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def own(self, entries: Sequence[Entry]) -> None:
        """Add the workbench's own entries; called once, by :attr:`home`."""
        self._entries = {entry.name: entry for entry in entries} | self._entries

    def add(self, entry: Entry) -> None:
        """Add a user's entry. One of the user's own that has its name is replaced, as a cell that
        runs twice would have it.

        Raises:
            WorkbenchError: the workbench has an entry of this name, or it cannot name a file.
        """
        self._load()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry.name):
            raise WorkbenchError(
                f"{self.kind} {entry.name!r} needs a name of letters, digits, dots, dashes and "
                "underscores (it becomes a file or a folder)"
            )
        if entry.name in self._entries and entry.name not in self._added:
            raise WorkbenchError(
                f"there is a {self.kind} called {entry.name!r} already; give yours another name"
            )
        self._entries[entry.name] = self._added[entry.name] = entry

    def forget(self, names: Iterable[str]) -> None:
        """Take out entries of users' own."""
        for name in names:
            self._added.pop(name)
            self._entries.pop(name)

    @contextmanager
    def users(self, name: str) -> Iterator[None]:
        """Say in one line whose function it is that fails inside the block, where it is a user's
        own.

        Raises:
            WorkbenchError: something was raised, and the entry ``name`` did not come with the
                workbench.
        """
        try:
            yield
        except Exception as error:
            if name not in self._added or isinstance(error, WorkbenchError):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise WorkbenchError(
                f"the {self.kind} {name!r} failed at {place.filename}:{place.lineno}: {error!r}; "
                "mend it and run the same command again"
            ) from error

    def added(self) -> dict[str, Entry]:
        """What did not come with the workbench."""
        return dict(self._added)


REGISTRIES: dict[str, Registry[Any]] = {}
PLAIN = ("metric", "experiment")
"""Kinds that are added by a call, not by a decorator."""


@dataclass(frozen=True)
class Plugin:
    """A file whose entries a run uses.

    Attributes:
        file: its path.
        sha256: of its content.
    """

    file: str
    sha256: str


_PLUGINS: dict[str, Plugin] = {}


def load_plugin(path: str | Path, sha256: str = "") -> Plugin:
    """Import a file that adds entries to the registries.

    Args:
        path: a Python file.
        sha256: of the content that is expected, where a run remembers it.

    Raises:
        WorkbenchError: there is no such file, it cannot be imported, adds nothing, or is not the
            one expected.
    """
    file = Path(path)
    if not file.is_file():
        raise WorkbenchError(f"there is no plug-in file {file}")
    content = file.read_bytes()
    plugin = Plugin(str(file.resolve()), hashlib.sha256(content).hexdigest())
    if sha256 and plugin.sha256 != sha256:
        raise WorkbenchError(
            f"the plug-in {file} is not the one that the run was made with (its SHA-256 differs); "
            "give back that version, or start a run in another folder"
        )
    if _PLUGINS.get(plugin.file) == plugin:
        return plugin
    name = f"workbench_plugin_{plugin.sha256[:12]}"
    before = {kind: registry.added() for kind, registry in REGISTRIES.items()}
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise WorkbenchError(f"the plug-in {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # workers are sent what a plug-in adds; they have no module of this name
    cloudpickle.register_pickle_by_value(module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        for kind, registry in REGISTRIES.items():  # nothing of half a file stays
            registry.forget(set(registry.added()) - set(before.get(kind, {})))
        if isinstance(error, WorkbenchError):
            raise
        raise WorkbenchError(f"the plug-in {file} cannot be imported: {error!r}") from error
    if all(before.get(kind, {}) == registry.added() for kind, registry in REGISTRIES.items()):
        raise WorkbenchError(
            f"the plug-in {file} adds nothing; decorate a function with one of "
            f"{', '.join('@wb.' + kind for kind in REGISTRIES if kind not in PLAIN)}"
        )
    _PLUGINS[plugin.file] = plugin
    return plugin


def added() -> dict[str, dict[str, Any]]:
    """What users added to every registry, to be given to other processes."""
    return {kind: found for kind, registry in REGISTRIES.items() if (found := registry.added())}


def take(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Add what another process had; see :func:`added`."""
    for kind, found in entries.items():
        for entry in found.values():
            REGISTRIES[kind].add(entry)


def plugins() -> tuple[Plugin, ...]:
    """The plug-in files that were loaded."""
    return tuple(_PLUGINS.values())


def expect(source: Plugin) -> None:
    """Bring back what a run was made with: load the plug-in, or see that the cell has run again.

    Raises:
        WorkbenchError: it is not there, or is not what it was.
    """
    if source.file.endswith(".py"):
        if Plugin(source.file, source.sha256) not in _PLUGINS.values():
            print(f"loading the plug-in {source.file}, which the run names", file=sys.stderr)
        load_plugin(source.file, source.sha256)
        return
    users = [entry for registry in REGISTRIES.values() for entry in registry.added().values()]
    if source not in [source_of(entry) for entry in users]:
        raise WorkbenchError(
            f"the run was made with a function that was defined in {source.file} (SHA-256 of its "
            f"source {source.sha256[:12]}...); define the same one again first, or put it in a "
            "file for --plugin"
        )


def source_of(entry: object) -> Plugin:
    """Where a user's entry comes from: its plug-in, or the source of its functions (of a cell)."""
    values = (getattr(entry, each.name) for each in fields(entry))  # type: ignore[arg-type]
    functions = [value for value in values if inspect.isfunction(value)]
    for plugin in _PLUGINS.values():
        if any(f.__module__ == f"workbench_plugin_{plugin.sha256[:12]}" for f in functions):
            return plugin
    text = "".join(_source(function) for function in functions)
    file = functions[0].__module__ if functions else type(entry).__name__
    return Plugin(file, hashlib.sha256(text.encode()).hexdigest())


def _source(function: Any) -> str:
    """A function's source, or what it does where it was typed at a prompt and has none."""
    try:
        return inspect.getsource(function)
    except OSError:
        code = inspect.unwrap(function).__code__
        return f"{code.co_code.hex()} {code.co_names} {code.co_consts}"
