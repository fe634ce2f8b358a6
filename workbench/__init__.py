"""The unlearning workbench: what did unlearning do inside a model, and will it survive?"""

import sys as _sys
from importlib.machinery import PathFinder as _PathFinder
from pathlib import Path as _Path

_TREE = _Path(__file__).resolve().parents[1]


class _TreeFinder:
    """Finds ``workbench.hooks`` and ``workbench.figures`` beside this folder, where they lie in a
    checkout; an installed package has them inside, and this finder is not there.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        parent, _, last = name.rpartition(".")
        if parent != "workbench" or last not in ("hooks", "figures"):
            return None
        spec = _PathFinder.find_spec(last, [str(_TREE)])
        if spec is None or spec.origin is None:
            return None
        from importlib.util import spec_from_file_location

        return spec_from_file_location(
            name, spec.origin, submodule_search_locations=spec.submodule_search_locations
        )


if (_TREE / "pyproject.toml").is_file() and (_TREE / "hooks" / "__init__.py").is_file():
    # first, or the finder of another checkout that is installed would answer
    _sys.meta_path.insert(0, _TreeFinder)  # type: ignore[arg-type]

_HOMES = {
    "ATTACKS": "workbench.attacks.attack",
    "CLAIMS": "workbench.claims",
    "Capture": "workbench.hooks",
    "EXPERIMENTS": "workbench.runner",
    "Example": "workbench.data.records",
    "Experiment": "workbench.runner",
    "FIGURES": "workbench.figures",
    "METHODS": "workbench.unlearning.methods",
    "METRICS": "workbench.metrics",
    "Objective": "workbench.unlearning.objectives",
    "PROBES": "workbench.runs.probing",
    "RelearnSettings": "workbench.attacks.relearn",
    "Recipe": "workbench.unlearning.recipe",
    "Subspace": "workbench.subspaces.subspace",
    "WorkbenchError": "workbench.errors",
    "attack": "workbench.attacks.attack",
    "claim": "workbench.claims",
    "experiment": "workbench.runner",
    "figure": "workbench.figures",
    "investigate": "workbench.experiments.investigate",
    "load_plugin": "workbench.registry",
    "method": "workbench.unlearning.methods",
    "metric": "workbench.metrics",
    "open_model": "workbench.models",
    "probe": "workbench.runs.probing",
    "read_examples": "workbench.data.readers",
    "read_results": "workbench.runs.folder",
    "relearn": "workbench.attacks.relearn",
    "run": "workbench.runner",
    "save_model": "workbench.models",
    "study": "workbench.studies",
    "sweep": "workbench.experiments.sweep",
}
__version__ = "0.2.0.dev0"
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name where it is first asked for: ``import workbench`` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
