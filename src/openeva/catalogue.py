"""What `openeva list` shows: recipes, model variants, released weights and components, each with a line about it.

recipe and component files -> their first comment or docstring line -> rows. Released weights are the table of
`checkpoints/pretrained.py`. Component files are read, not imported, so
that the list is quick, and complete where an optional package is missing.
"""

import ast
import fnmatch
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openeva.checkpoints.pretrained import PRETRAINED
from openeva.checkpoints.released import PretrainedWeights
from openeva.config import list_recipes, recipe_folder, validate
from openeva.registry import FOLDERS, component_module, component_names, did_you_mean

Table = tuple[str, list[str], list[tuple[str, ...]]]
"""Title, names of columns, rows."""
WEIGHTS_COLUMNS = ("weights", "task", "variant", "parameters", "pixels", "licence", "teacher", "top-1", "source")


@dataclass(frozen=True)
class Variant:
    """A named architecture of a backbone, or of a pair of towers ("clip")."""

    backbone: str
    name: str
    num_parameters: int
    dimensions: str


def table(section: str, pattern: str = "*") -> Table:
    """One of "recipes", "variants", "weights" (those that fit the pattern) and "components"."""
    if section == "recipes":
        return "Recipes", ["recipe", "what it does"], list(recipes())
    if section == "variants":
        rows = [(v.backbone, v.name, f"{v.num_parameters:,}", v.dimensions) for v in variants()]
        return "Model variants", ["backbone", "variant", "parameters", "dimensions"], list(rows)
    if section == "weights":
        return "Released weights", list(WEIGHTS_COLUMNS), [weights_row(entry) for entry in released(pattern)]
    return "Components", ["kind", "name", "what it is"], list(components())


def as_json(sections: Sequence[str], pattern: str = "*") -> dict[str, list[dict[str, Any]]]:
    """The same as plain values, with all that is known about weights."""
    found: dict[str, list[dict[str, Any]]] = {}
    for section in sections:
        if section == "weights":
            found[section] = [weights_facts(entry) for entry in released(pattern)]
        elif section == "variants":
            found[section] = [vars(variant) for variant in variants()]
        else:
            _, columns, rows = table(section)
            found[section] = [dict(zip(columns, row, strict=True)) for row in rows]
    return found


def recipes() -> list[tuple[str, str]]:
    """(name, first line of the header comment) of every shipped recipe."""
    return [(name, _first_comment(recipe_folder() / f"{name}.yaml")) for name in list_recipes()]


def components() -> list[tuple[str, str, str]]:
    """(kind, name, first line of the docstring) of every built-in component."""
    return [(kind, name, _first_docstring_line(kind, name)) for kind in FOLDERS for name in component_names(kind)]


def variants() -> list[Variant]:
    """Every entry of `VARIANTS` of every backbone, and every pair of towers, with its parameters at its own size."""
    import torch

    from openeva.heads.clip import CLIP_VARIANTS, ClipConfig, ClipModel

    found = []
    for name, values in CLIP_VARIANTS.items():
        with torch.device("meta"):
            pair = ClipModel(validate(ClipConfig, {"variant": name}, where=name))
        found.append(Variant("clip", name, sum(p.numel() for p in pair.parameters()), _dimensions(values)))
    for backbone in component_names("backbone"):
        if "VARIANTS" not in _top_level_names(_source("backbone", backbone)):
            continue
        module = component_module("backbone", backbone)
        for name, values in module.VARIANTS.items():
            with torch.device("meta"):
                model = module.Config(variant=name).build()
            found.append(Variant(backbone, name, sum(p.numel() for p in model.parameters()), _dimensions(values)))
    return sorted(found, key=lambda variant: (variant.backbone, variant.num_parameters))


def released(pattern: str = "*") -> list[PretrainedWeights]:
    """Released weights of which a name (the official, the variant's, other libraries') fits a wildcard or holds a word.

    Raises:
        ValueError: Nothing fits.
    """
    wildcard = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"

    def fits(*names: str) -> bool:
        return any(fnmatch.fnmatchcase(name.lower(), wildcard.lower()) for name in names)

    found = [entry for entry in PRETRAINED.values() if fits(*_names(entry))]
    if not found:
        raise ValueError(f"no released weights fit {pattern!r}{did_you_mean(pattern, list(PRETRAINED))}")
    return found


def _names(entry: PretrainedWeights) -> list[str]:
    others = [name for name in (entry.clip, entry.open_clip) if name is not None]
    return [entry.name, entry.variant, *entry.timm, *others]


def weights_row(entry: PretrainedWeights) -> tuple[str, ...]:
    """Cells of `WEIGHTS_COLUMNS`; a dash for what is not known or does not apply."""
    top1 = entry.published.get("imagenet_1k")
    return (
        entry.name,
        entry.task,
        entry.clip or entry.variant,
        "-" if entry.num_parameters is None else f"{entry.num_parameters:,}",
        str(entry.image_size),
        entry.licence or "-",
        entry.teacher,
        "-" if top1 is None else f"{top1.top1:g}",
        entry.repository or "not published",
    )


def weights_facts(entry: PretrainedWeights) -> dict[str, Any]:
    """All that is known, as plain values."""
    facts = {**vars(entry), "task": entry.task, "source": entry.source, "overrides": dict(entry.overrides)}
    facts["published"] = {name: vars(accuracy) for name, accuracy in entry.published.items()}
    return facts


def _dimensions(values: Mapping[str, Any]) -> str:
    """Keys and values; those of a tower in brackets."""
    texts = (f"{key} ({_dimensions(v)})" if isinstance(v, Mapping) else f"{key} {v}" for key, v in values.items())
    return ", ".join(texts)


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
