"""YAML + `a.b=c` overrides -> typed config, with every mistake in one message.

recipe file -> `read_recipe` (plain mappings, `extends` merged) -> `apply_overrides` -> `validate` (pydantic) -> config.

Every component owns a `Config` (a `ComponentConfig`) beside its code; a field annotated with `component("target")`
accepts any mapping with a `name` and validates it by the `Config` of that file. Durations are strings with a unit:
"150 epochs".
"""

import copy
import difflib
import re
import typing
from collections import Counter
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
        head = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}" + (
            f" in {where}" if where else ""
        )
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


def component_config(kind: str, name: str) -> type[ComponentConfig]:
    """The `Config` class of a component.

    Raises:
        UnknownComponentError: No such component, or its module holds no `Config`.
        ImportError: A package that the component needs is missing.
    """
    config_class = getattr(component_module(kind, name), "Config", None)
    if not (isinstance(config_class, type) and issubclass(config_class, ComponentConfig)):
        raise UnknownComponentError(f"{kind} {name!r}: the module has no class Config(ComponentConfig)")
    return config_class


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
            kind = f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"
            raise PydanticCustomError(
                "component", "{kind} needs a 'name': one of {known}", {"kind": kind, "known": known}
            )
        try:
            config_class = component_config(self.kind, value["name"])
        except (UnknownComponentError, ImportError) as error:
            raise PydanticCustomError("component", "{text}", {"text": str(error)}) from None
        try:
            return config_class.model_validate(value)
        except ValidationError as error:
            raise PydanticCustomError("nested", "nested", {"problems": _problems(error, config_class, value)}) from None


def component(kind: str) -> _ComponentOf:
    """Annotation of a config field that takes any component of a kind (see `Target` below)."""
    return _ComponentOf(kind)


Task = Annotated[ComponentConfig, component("task")]
Target = Annotated[ComponentConfig, component("target")]
Eval = Annotated[ComponentConfig, component("eval")]
Backbone = Annotated[ComponentConfig, component("backbone")]
Source = Annotated[ComponentConfig, component("source")]

Unit = Literal["steps", "epochs", "samples", "percent"]


@dataclass(frozen=True)
class Duration:
    """A length with its unit, written "150 epochs", "2000 steps", "4.5e9 samples" or "10 percent" (of the run)."""

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
        value = float(self.value)
        return f"{int(value) if value.is_integer() else value} {self.unit}"

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


# ---------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML whose plain words are what they look like, and which does not let a second key overwrite a first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG]
        twice = next((key for key, number in Counter(keys).items() if number > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands here twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every word that YAML 1.1 or `_Loader` would take for something else."""


_MERGE_TAG = "tag:yaml.org,2002:merge"
_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_DIGITS = "-+.0123456789"
_SCALARS = {  # regular expression, and the characters that it may begin with; the first rule that fits wins
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"^[-+]?(?:0|[1-9][0-9]*)$", _DIGITS),
    "float": (rf"^{_NUMBER}$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", _DIGITS),
}
"""Numbers and booleans as in YAML 1.2: `off`, `no`, `1:30` and dates are words, `1e-3` is a number."""

_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[-1] not in {*_SCALARS, "timestamp"}]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))


def parse_yaml(text: str) -> Any:
    """Plain content of a YAML document: `off`, `no` and `1:30` are words, `1e-3` is a number, no key stands twice.

    Raises:
        yaml.YAMLError: Not valid YAML.
    """
    return yaml.load(text, _Loader)


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
    stems = [recipe.rsplit("/", 1)[-1] for recipe in known]
    first, second = (known, stems) if "/" in name else (stems, known)
    hint = did_you_mean(name, first) or did_you_mean(name, second)
    raise ConfigError([f"unknown recipe {name!r}{hint} (shipped: {', '.join(known)}; or give a path ending in .yaml)"])


def read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Plain content of a recipe file, with `extends: other` (a recipe name or a path beside the file) merged below it.

    Args:
        path: The file.
        children: Files that extend this one.

    Raises:
        ConfigError: Not readable, not YAML, not a mapping, or extending itself.
    """
    if path.resolve() in children:
        raise ConfigError([f"{path} extends itself, by way of {', '.join(child.name for child in children)}"])
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path} is not text in UTF-8"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path} is not valid YAML: {error}"]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"{path} must hold a mapping at its top level, not {type(content).__name__}"])
    parent = content.pop("extends", None)
    if parent is None:
        return content
    beside = path.parent / f"{parent}"
    below = beside if beside.is_file() else find_recipe(str(parent))
    return merge(read_recipe(below, (*children, path.resolve())), content)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings, `above` winning; a component with another `name` replaces the one below it whole."""
    result = copy.deepcopy(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, str) and isinstance(value, dict) and "name" not in value:
            old = {"name": old}  # a component without arguments, written short
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            result[key] = merge(old, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` (c is YAML; list items by number, the next free number appends) to plain recipe content.

    Returns:
        The changed copy.

    Raises:
        ConfigError: All overrides that are not of this form or whose path runs through a plain value.
    """
    content, problems = _overridden(content, overrides)
    if problems:
        raise ConfigError(problems)
    return content


def _overridden(content: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A copy with the overrides that can be applied, and what is wrong with the others."""
    content = copy.deepcopy(content)
    problems: list[str] = []
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            problems.append(f"override {text!r} is not of the form key.subkey=value")
            continue
        try:
            _set(content, keys, parse_yaml(value))
        except yaml.YAMLError:
            problems.append(f"override {text!r}: the value is not valid YAML")
        except ValueError as error:
            problems.append(f"override {text!r}: {error}")
    return content, problems


def _set(node: Any, path: list[str], value: Any) -> None:
    """Set the value at a path, making mappings on the way where there is nothing."""
    for depth, key in enumerate(path):
        here, last = ".".join(path[:depth]), depth == len(path) - 1
        if isinstance(node, list):
            place: Any = _list_index(node, key, here)
            if place == len(node):
                node.append(None)
        elif isinstance(node, dict):
            place = key
        else:
            raise ValueError(f"{here} is the plain value {node!r} and has no keys")
        if last:
            node[place] = value
            return
        child = node[place] if isinstance(node, list) else node.get(place)
        if child is None:
            child = {}
        elif isinstance(child, str):
            child = {"name": child}  # a component without arguments, written short
        node[place] = child
        node = child


def _list_index(items: list[Any], key: str, where: str) -> int:
    if not key.isdecimal():
        raise ValueError(f"{where} is a list; its items have numbers, {key!r} is none")
    if int(key) > len(items):
        raise ValueError(f"{where} has {len(items)} item{'s' if len(items) != 1 else ''}; give 0 to {len(items)}")
    return int(key)


ConfigType = TypeVar("ConfigType", bound=BaseModel)


def validate(config_class: type[ConfigType], content: dict[str, Any], where: str = "") -> ConfigType:
    """Typed config from plain content.

    Raises:
        ConfigError: Every wrong key, type and value at once, each with its dotted path and the nearest valid key.
    """
    return _validated(config_class, content, where, [])


def load_config(config_class: type[ConfigType], recipe: str, overrides: Sequence[str] = ()) -> ConfigType:
    """Read, override and validate a recipe (see `find_recipe` for how it may be named).

    Raises:
        ConfigError: Anything wrong with it.
    """
    path = find_recipe(recipe)
    content, problems = _overridden(read_recipe(path), overrides)
    return _validated(config_class, content, path.stem, problems)


def _validated(config_class: type[ConfigType], content: dict[str, Any], where: str, problems: list[str]) -> ConfigType:
    """Typed config, or all problems: the given ones and those that validation finds."""
    try:
        config = config_class.model_validate(content)
    except ValidationError as error:
        flat = _problems(error, config_class, content)
        raise ConfigError([*problems, *(f"{path}: {text}" if path else text for path, text in flat)], where) from None
    if problems:
        raise ConfigError(problems, where)
    return config


def dump_yaml(config: BaseModel) -> str:
    """The resolved config as YAML that loads back to the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


# ---------------------------------------------------------------------------------------------- error messages


def _problems(error: ValidationError, config_class: type[BaseModel], content: Any) -> list[tuple[str, str]]:
    """(dotted path, text) of every problem; what the members of a union say about one value becomes one problem."""
    texts: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for item in error.errors(include_url=False):
        loc = _written_path(item["loc"], content, keep_last=item["type"] == "missing")
        path = ".".join(loc)
        if item["type"] == "nested":
            for sub, text in item["ctx"]["problems"]:
                texts.setdefault(f"{path}.{sub}" if sub else path, []).append(text)
            continue
        texts.setdefault(path, []).append(_message(item, loc, config_class))
        got = item.get("input")
        # a wrong name is in its message already
        if item["type"] not in {"missing", "extra_forbidden", "component"} and isinstance(got, str | int | float):
            values[path] = f" (got {got!r})"
    return [(path, "; or ".join(dict.fromkeys(said)) + values.get(path, "")) for path, said in texts.items()]


def _message(item: Any, loc: list[str], config_class: type[BaseModel]) -> str:
    """What is wrong, in the words of a recipe instead of pydantic's."""
    kind = item["type"]
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        known = _keys_at(config_class, loc[:-1], item["loc"])
        close = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        return "unknown key; " + (f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(known)}")
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        known = _keys_at(config_class, loc, item["loc"])
        return "must be a mapping" + (f" with keys of {', '.join(known)}" if known else "")
    if kind == "path_type":
        return "input should be a path"
    if kind == "union_tag_invalid":
        tag, known = item["ctx"]["tag"], [tag.strip("'") for tag in item["ctx"]["expected_tags"].split(", ")]
        key = item["ctx"]["discriminator"].strip("'")
        return f"unknown {key} {tag!r}{did_you_mean(tag, known)} (known: {', '.join(known)})"
    text: str = item["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:] if text.startswith(("Input ", "List ", "Tuple ", "String ", "Value ")) else text


def _written_path(loc: tuple[Any, ...], content: Any, *, keep_last: bool) -> list[str]:
    """The path as it stands in the recipe: pydantic adds names of union members that nobody wrote."""
    path: list[str] = []
    for number, part in enumerate(loc):
        if isinstance(content, dict) and part in content:
            content = content[part]
        elif isinstance(content, list | tuple) and isinstance(part, int):
            content = content[part] if part < len(content) else None
        elif not (keep_last and number == len(loc) - 1):
            continue
        path.append(str(part))
    return path


def _keys_at(config_class: type[BaseModel], loc: list[str], tags: tuple[Any, ...]) -> list[str]:
    """Keys of the config at a path; of a union, those of the member that pydantic's path names by its tag."""
    current: Any = config_class
    for key in loc:
        field = getattr(current, "model_fields", {}).get(key)
        if field is None:
            continue
        options = [a for a in _flatten(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        tagged = [option for option in options if _tag_values(option) & set(tags)]
        current = (tagged or options or [current])[0]
    return sorted(getattr(current, "model_fields", {}))


def _tag_values(config_class: type[BaseModel]) -> set[Any]:
    literals = [f.annotation for f in config_class.model_fields.values() if typing.get_origin(f.annotation) is Literal]
    return {value for literal in literals for value in typing.get_args(literal)}


def _flatten(annotation: Any) -> list[Any]:
    args = typing.get_args(annotation)
    return [annotation] if not args else [leaf for a in args for leaf in _flatten(a)]
