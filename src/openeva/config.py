"""YAML + `a.b=c` overrides -> typed config, with every mistake in one message.

recipe file -> `read_recipe` (plain mappings, `extends` merged) -> `apply_overrides` -> `validate` (pydantic) -> typed config.

Every component owns a `Config` (a `ComponentConfig`) beside its code; a field annotated `Component("target")` accepts any
mapping with a `name` and validates it by the `Config` of that file. Durations are strings with a unit: "150 epochs".
"""

import copy
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from openeva.registry import UnknownComponentError, component_module, component_names, did_you_mean


class ConfigError(Exception):
    """All problems of a recipe, one per line; the command line shows it without a traceback and exits with status 2."""

    def __init__(self, problems: Sequence[str], where: str = "") -> None:
        self.problems = list(problems)
        head = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}" + (f" in {where}" if where else "")
        super().__init__("\n".join([head + ":", *(f"  - {p}" for p in self.problems)]))


class Config(BaseModel):
    """Base of all configs: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, ser_json_inf_nan="strings")


class ComponentConfig(Config):
    """Base of the `Config` class in a component's file; `name` is the file's name (or a dotted module)."""

    name: str

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Make the component. Each kind of component documents its arguments in its `base.py`."""
        raise NotImplementedError(f"{type(self).__module__}.Config has no build()")


class _ComponentOf:
    """Annotation that validates a mapping by the `Config` of the component that its `name` points to."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.model_dump(mode="json")),
        )

    def _validate(self, value: Any) -> ComponentConfig:
        if isinstance(value, ComponentConfig):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            known = ", ".join(component_names(self.kind))
            raise PydanticCustomError(
                "component_name", "a {kind} needs a 'name': one of {known}", {"kind": self.kind, "known": known}
            )
        try:
            config_class = component_module(self.kind, value["name"]).Config
        except UnknownComponentError as error:
            raise PydanticCustomError("component_name", "{text}", {"text": str(error)}) from None
        try:
            return config_class.model_validate(value)
        except ValidationError as error:
            raise PydanticCustomError("nested", "nested", {"problems": _problems(error, config_class, value)}) from None


def component(kind: str) -> _ComponentOf:
    """Annotate a config field as "any component of this kind": `target: Annotated[ComponentConfig, component("target")]`."""
    return _ComponentOf(kind)


Task = Annotated[ComponentConfig, component("task")]
Target = Annotated[ComponentConfig, component("target")]
Eval = Annotated[ComponentConfig, component("eval")]
Backbone = Annotated[ComponentConfig, component("backbone")]
Source = Annotated[ComponentConfig, component("source")]

Unit = Literal["steps", "epochs", "samples", "percent"]


@dataclass(frozen=True)
class Duration:
    """A length of training with its unit, written "150 epochs", "2000 steps", "4.5e9 samples" or "10 percent" (of the run)."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: Any) -> "Duration":
        """Read "150 epochs".

        Raises:
            ValueError: Not a number followed by a unit.
        """
        if isinstance(text, Duration):
            return text
        words = str(text).split()
        units = get_args(Unit)
        try:
            value = float(words[0])
            unit = next(u for u in units if words[1] in (u, u.removesuffix("s")))
        except (IndexError, ValueError, StopIteration):
            raise ValueError(f"a duration is a number and a unit ({', '.join(units)}), as in '150 epochs'") from None
        if len(words) != 2 or not 0 <= value < float("inf"):
            raise ValueError("a duration is one non-negative number and one unit, as in '150 epochs'")
        return cls(value, unit)

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"

    def steps(self, *, steps_per_epoch: int, samples_per_step: int, total_steps: int | None = None) -> int:
        """This duration in optimizer steps, rounded to the nearest.

        Raises:
            ValueError: The unit is percent and no total is known.
        """
        if self.unit == "steps":
            return round(self.value)
        if self.unit == "epochs":
            return round(self.value * steps_per_epoch)
        if self.unit == "samples":
            return round(self.value / samples_per_step)
        if total_steps is None:
            raise ValueError("the length of the run itself cannot be given in percent; use steps, epochs or samples")
        return round(self.value / 100 * total_steps)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


# ---------------------------------------------------------------------------------------------- reading recipes


def recipe_folder() -> Path:
    """Folder of the shipped recipes: beside the installed package, or the repository's `recipes/` in a checkout."""
    here = Path(__file__).parent
    installed = here / "recipes"
    return installed if installed.is_dir() else here.parents[1] / "recipes"


def list_recipes() -> list[str]:
    """Names of the shipped recipes, such as `pretrain/demo`."""
    folder = recipe_folder()
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """File of a recipe given as a path, as `pretrain/demo`, or as `demo` where only one folder has it.

    Raises:
        ConfigError: No such recipe; the message suggests the nearest one.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise ConfigError([f"recipe file {name} does not exist"])
    known = list_recipes()
    matches = [r for r in known if r == name or r.endswith("/" + name)]
    if len(matches) == 1:
        return recipe_folder() / f"{matches[0]}.yaml"
    if matches:
        raise ConfigError([f"recipe {name!r} is ambiguous: {', '.join(matches)}"])
    hint = did_you_mean(name, known) or did_you_mean(name, [r.rsplit("/", 1)[-1] for r in known])
    raise ConfigError([f"unknown recipe {name!r}{hint} (shipped: {', '.join(known)}; or give a path ending in .yaml)"])


def read_recipe(path: Path) -> dict[str, Any]:
    """Plain content of a recipe file, with `extends: other` (a recipe name or a path beside the file) merged below it.

    Raises:
        ConfigError: Not readable, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path} is not valid YAML: {error}"]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"{path} must hold a mapping at its top level, not {type(content).__name__}"])
    parent = content.pop("extends", None)
    if parent is None:
        return content
    beside = path.parent / f"{parent}"
    return merge(read_recipe(beside if beside.is_file() else find_recipe(str(parent))), content)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings, `above` winning; a component with another `name` replaces the one below it whole."""
    result = copy.deepcopy(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            result[key] = merge(old, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` (c is YAML; list items by number) to plain recipe content and return the changed copy.

    Raises:
        ConfigError: All overrides that are not of this form or whose path runs through a plain value.
    """
    content = copy.deepcopy(content)
    problems: list[str] = []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            problems.append(f"override {text!r} is not of the form key.subkey=value")
            continue
        try:
            _set(content, path.split("."), yaml.safe_load(value))
        except yaml.YAMLError:
            problems.append(f"override {text!r}: the value is not valid YAML")
        except (TypeError, IndexError, ValueError) as error:
            problems.append(f"override {text!r}: {error}")
    if problems:
        raise ConfigError(problems)
    return content


def _set(node: Any, path: list[str], value: Any) -> None:
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            index = int(key)
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            raise TypeError(f"{'.'.join(path[:depth])} is the plain value {node!r} and has no keys")


ConfigType = TypeVar("ConfigType", bound=BaseModel)


def validate(config_class: type[ConfigType], content: dict[str, Any], where: str = "") -> ConfigType:
    """Typed config from plain content.

    Raises:
        ConfigError: Every wrong key, type and value at once, each with its dotted path and the nearest valid key.
    """
    try:
        return config_class.model_validate(content)
    except ValidationError as error:
        flat = _problems(error, config_class, content)
        raise ConfigError([f"{path}: {text}" if path else text for path, text in flat], where) from None


def load_config(config_class: type[ConfigType], recipe: str, overrides: Sequence[str] = ()) -> ConfigType:
    """Read, override and validate a recipe (see `find_recipe` for how it may be named).

    Raises:
        ConfigError: Anything wrong with it.
    """
    path = find_recipe(recipe)
    return validate(config_class, apply_overrides(read_recipe(path), overrides), where=path.stem)


def dump_yaml(config: BaseModel) -> str:
    """The resolved config as YAML that loads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


# ---------------------------------------------------------------------------------------------- error messages


def _problems(error: ValidationError, config_class: type[BaseModel], content: Any) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    for item in error.errors(include_url=False):
        loc = [str(part) for part in item["loc"] if not _is_union_tag(part)]
        path = ".".join(loc)
        if item["type"] == "nested":
            problems += [(f"{path}.{sub}" if sub else path, text) for sub, text in item["ctx"]["problems"]]
        elif item["type"] == "extra_forbidden":
            known = _keys_at(config_class, loc[:-1])
            close = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(known)}"
            problems.append((path, f"unknown key; {hint}"))
        elif item["type"] == "missing":
            problems.append((path, "is required"))
        else:
            text = item["msg"].removeprefix("Value error, ")
            got = item.get("input")
            shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | type(None)) else ""
            problems.append((path, text[0].lower() + text[1:] + shown))
    return problems


def _is_union_tag(part: Any) -> bool:
    """Pydantic adds type names such as `tuple[int, int]` or `list[...]` to the path of a union member; users never wrote them."""
    return isinstance(part, str) and ("[" in part or part in {"int", "float", "str", "bool", "Duration"})


def _keys_at(config_class: type[BaseModel], loc: list[str]) -> list[str]:
    current: Any = config_class
    for key in loc:
        field = getattr(current, "model_fields", {}).get(key)
        if field is None:
            continue
        options = [a for a in _flatten(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        current = options[0] if options else current
    return sorted(getattr(current, "model_fields", {}))


def _flatten(annotation: Any) -> list[Any]:
    args = typing.get_args(annotation)
    return [annotation] if not args else [leaf for a in args for leaf in _flatten(a)]
