"""Component name -> module file, with suggestions for near misses.

A component's name in a recipe is the name of its file: `target: {name: features}` is `openeva/targets/features.py`, and
the class `Config` in it validates the rest of the mapping and builds the component. There is no list to edit. A dotted
name (`my_lab.hog2`) is imported as it is, so that components can live outside this package.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType

FOLDERS = {
    "task": "openeva.tasks",
    "target": "openeva.targets",
    "eval": "openeva.evals",
    "backbone": "openeva.backbones",
    "source": "openeva.data.sources",
}
"""Kind of component -> package that holds one file per component (and `base.py`, the contract)."""


class UnknownComponentError(ValueError):
    """A recipe names a component that does not exist."""


def component_names(kind: str) -> list[str]:
    """Names of all built-in components of a kind, sorted.

    Raises:
        KeyError: `kind` is not one of `FOLDERS`.
    """
    package = importlib.import_module(FOLDERS[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")


def component_module(kind: str, name: str) -> ModuleType:
    """Import the module of a component.

    Raises:
        UnknownComponentError: No such file; the message lists the near misses and all known names.
    """
    known = component_names(kind)
    if name in known:
        return importlib.import_module(f"{FOLDERS[kind]}.{name}")
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UnknownComponentError(
                f"{kind} {name!r}: cannot import {error.name!r}; is it on PYTHONPATH?"
            ) from None
    raise UnknownComponentError(f"unknown {kind} {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")


def did_you_mean(word: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
