"""What `openeva list` shows: recipes, model variants and components, each with a line about it.

recipe and component files -> their first comment or docstring line -> rows. Component files are read, not imported, so
that the list is quick, and complete where an optional package is missing.
"""

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from openeva.config import list_recipes, recipe_folder
from openeva.registry import FOLDERS, component_module, component_names


@dataclass(frozen=True)
class Variant:
    """A named architecture of a backbone."""

    backbone: str
    name: str
    num_parameters: int
    dimensions: str


def recipes() -> list[tuple[str, str]]:
    """(name, first line of the header comment) of every shipped recipe."""
    return [(name, _first_comment(recipe_folder() / f"{name}.yaml")) for name in list_recipes()]


def components() -> list[tuple[str, str, str]]:
    """(kind, name, first line of the docstring) of every built-in component."""
    return [(kind, name, _first_docstring_line(kind, name)) for kind in FOLDERS for name in component_names(kind)]


def variants() -> list[Variant]:
    """Every entry of `VARIANTS` of every backbone, with the parameters that it has at its default image size."""
    import torch

    found = []
    for backbone in component_names("backbone"):
        if "VARIANTS" not in _top_level_names(_source("backbone", backbone)):
            continue
        module = component_module("backbone", backbone)
        for name, values in module.VARIANTS.items():
            with torch.device("meta"):
                model = module.Config(variant=name).build()
            dimensions = ", ".join(f"{key} {value}" for key, value in values.items())
            found.append(Variant(backbone, name, sum(p.numel() for p in model.parameters()), dimensions))
    return sorted(found, key=lambda variant: (variant.backbone, variant.num_parameters))


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def _source(kind: str, name: str) -> ast.Module:
    spec = importlib.util.find_spec(f"{FOLDERS[kind]}.{name}")
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _first_docstring_line(kind: str, name: str) -> str:
    return (ast.get_docstring(_source(kind, name)) or "").partition("\n")[0]


def _top_level_names(module: ast.Module) -> set[str]:
    targets = [
        target
        for node in module.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return {target.id for target in targets if isinstance(target, ast.Name)}
