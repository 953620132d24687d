"""Recipes: every mistake at once in words, exact round trips, overrides, inheritance."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from openeva.config import (
    Backbone,
    Config,
    ConfigError,
    Duration,
    Source,
    apply_overrides,
    dump_yaml,
    find_recipe,
    list_recipes,
    load_config,
    merge,
    parse_yaml,
    read_recipe,
    validate,
)


class Inner(Config):
    rate: float = Field(0.1, ge=0, lt=1)
    mode: Literal["off", "blocks"] = "off"
    note: str | None = None
    workers: int | Literal["auto"] = "auto"
    size: int | tuple[int, int] = 224


class Outer(Config):
    backbone: Backbone
    data: list[Source] = Field(default_factory=list)
    inner: Inner = Inner()
    length: Duration = Duration(1, "epochs")
    out: Path = Path("runs/x")


BACKBONE = {"name": "vit", "variant": "eva_ti_16", "image_size": 64}


def problems_of(content: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, content)
    assert str(caught.value).startswith(f"{len(caught.value.problems)} problem")
    return sorted(caught.value.problems)


def only_problem_of(**content: Any) -> str:
    (problem,) = problems_of({"backbone": BACKBONE, **content})
    return problem


# ---------------------------------------------------------------------------------------------- mistakes


def test_all_mistakes_of_a_recipe_come_in_one_message() -> None:
    problems = problems_of(
        {
            "backbone": {"name": "vit", "variant": "eva_gg_14"},
            "data": ["scenes", {"name": "image_foldr"}, {"name": "elpv", "splt": "val", "weight": -1}],
            "inner": {"rate": "fast", "moed": "off"},
            "length": "150",
            "lenght": "150 epochs",
        }
    )
    starts = [problem.split(": ")[0] for problem in problems]
    assert starts == [
        "backbone", "data.1", "data.2.splt", "data.2.weight", "inner.moed", "inner.rate", "lenght", "length",
    ]  # fmt: skip
    text = "\n".join(problems)
    for hint in ("'eva_g_14'", "'image_folder'", "'split'", "'mode'", "'length'", "'150 epochs'"):
        assert hint in text


def test_a_wrong_key_without_a_near_one_lists_the_valid_ones() -> None:
    assert only_problem_of(inner={"qqq": 1}) == "inner.qqq: unknown key; valid keys: mode, note, rate, size, workers"


class Off(Config):
    mode: Literal["off"] = "off"


class On(Config):
    mode: Literal["on"]
    strength: float = 1.0


class Switched(Config):
    switch: Annotated[Off | On, Field(discriminator="mode")] = Off()


def test_of_several_kinds_the_keys_of_the_chosen_one_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"switch\.qqq: unknown key; valid keys: mode, strength"):
        validate(Switched, {"switch": {"mode": "on", "qqq": 1}})
    with pytest.raises(ConfigError, match=r"switch\.strength: unknown key; valid keys: mode$"):
        validate(Switched, {"switch": {"mode": "off", "strength": 1}})


def test_a_missing_key_is_named_with_its_path() -> None:
    assert problems_of({"data": [{"name": "image_folder"}]}) == ["backbone: is required", "data.0.roots: is required"]


def test_a_plain_value_in_place_of_a_mapping_is_told_the_keys() -> None:
    assert only_problem_of(inner=3) == "inner: must be a mapping with keys of mode, note, rate, size, workers (got 3)"


def test_the_alternatives_of_one_value_are_one_problem() -> None:
    problem = only_problem_of(inner={"workers": "many"})
    assert problem.startswith("inner.workers: ")
    assert "integer" in problem
    assert "'auto'" in problem
    assert problem.endswith("(got 'many')")


def test_no_name_of_a_union_member_gets_into_a_path() -> None:
    paths = {p.split(": ")[0] for p in problems_of({"backbone": BACKBONE, "inner": {"size": [1, "x"]}})}
    assert paths == {"inner.size", "inner.size.1"}


@pytest.mark.parametrize("value", [3, {}, {"nam": "vit"}, {"name": None}, None])
def test_a_component_without_a_name_is_told_the_known_ones(value: Any) -> None:
    assert "backbone: a backbone needs a 'name': one of" in "\n".join(problems_of({"backbone": value}))


def test_a_module_without_a_config_is_no_component() -> None:
    assert problems_of({"backbone": {"name": "os.path"}}) == [
        "backbone: backbone 'os.path': the module has no class Config(ComponentConfig)"
    ]


def test_a_component_that_needs_a_missing_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_much.py").write_text("raise ImportError(\"needs foo: pip install 'openeva[foo]'\")")
    (tmp_path / "lab").mkdir()
    (tmp_path / "needs_much.py").rename(tmp_path / "lab" / "needs_much.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert problems_of({"backbone": "lab.needs_much"}) == ["backbone: needs foo: pip install 'openeva[foo]'"]


@pytest.mark.parametrize(
    "text", ["150", "epochs", "150 lightyears", "-1 epochs", "nan steps", "inf steps", "1 2 steps", 3]
)
def test_a_length_without_unit_or_sense_is_refused(text: Any) -> None:
    assert only_problem_of(length=text).startswith("length: a duration is")


# ---------------------------------------------------------------------------------------------- durations


@given(st.floats(0, 1e15), st.sampled_from(["steps", "epochs", "samples", "percent"]))
def test_a_duration_survives_its_text(value: float, unit: Any) -> None:
    assert Duration.parse(str(Duration(value, unit))) == Duration(value, unit)


def test_durations_become_steps() -> None:
    def steps(text: str, total: int | None = None) -> int:
        return Duration.parse(text).steps(steps_per_epoch=50, samples_per_step=32, total_steps=total)

    assert [steps("7 steps"), steps("3 epochs"), steps("1 epoch"), steps("0.5 epochs"), steps("320 samples")] == [
        7, 150, 50, 25, 10,
    ]  # fmt: skip
    assert steps("4.5e3 samples") == 141
    assert steps("10 percent", total=200) == 20
    with pytest.raises(ValueError, match="use steps, epochs or samples"):
        steps("10 percent")


# ---------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [("off", "off"), ("no", "no"), ("yes", "yes"), ("1e-3", 1e-3), ("1:30", "1:30"), ("2022-11-14", "2022-11-14"),
     ("true", True), ("-3", -3), ("0", 0), (".5", 0.5), ("-.inf", float("-inf")), ("1.0.3", "1.0.3"), ("null", None),
     ("[1, 2e2, a]", [1, 200.0, "a"])],
)  # fmt: skip
def test_words_are_words_and_numbers_are_numbers(text: str, value: Any) -> None:
    result = parse_yaml(text)
    assert result == value
    assert type(result) is type(value)


def test_a_key_that_stands_twice_is_an_error() -> None:
    with pytest.raises(yaml.YAMLError, match="'lr' stands here twice"):
        parse_yaml("optim:\n  lr: 1\n  lr: 2\n")


printable = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@given(
    note=st.none()
    | printable
    | st.sampled_from(["off", "1e5", "2022-11-14", "1:30", "~", "null", "0x10", "010", "=", ""]),
    rate=st.floats(0, 0.999),
    workers=st.integers(-(10**9), 10**9) | st.just("auto"),
    size=st.integers() | st.tuples(st.integers(), st.integers()),
    length=st.floats(0, 1e12),
    sources=st.lists(st.sampled_from(["scenes", "elpv"]), max_size=2),
)
def test_a_printed_config_reads_back_as_the_same_config(
    note: str | None, rate: float, workers: Any, size: Any, length: float, sources: list[str]
) -> None:
    config = Outer(
        backbone=BACKBONE, data=sources, length=Duration(length, "epochs"),
        inner=Inner(note=note, rate=rate, workers=workers, size=size),
    )  # fmt: skip
    text = dump_yaml(config)
    assert validate(Outer, parse_yaml(text)) == config
    assert yaml.safe_load(text) == parse_yaml(text), "other YAML readers must see the same"


# ---------------------------------------------------------------------------------------------- overrides


def test_overrides_reach_into_mappings_lists_and_components() -> None:
    content = {"data": [{"name": "elpv"}, "scenes"], "inner": {"rate": 0.1}}
    changed = apply_overrides(
        content, ["data.0.split=val", "data.1.weight=2", "data.2=elpv", "inner.rate=1e-3", "new.deep.key=[1, {a: b}]"]
    )
    assert changed == {
        "data": [{"name": "elpv", "split": "val"}, {"name": "scenes", "weight": 2}, "elpv"],
        "inner": {"rate": 1e-3},
        "new": {"deep": {"key": [1, {"a": "b"}]}},
    }
    assert content == {"data": [{"name": "elpv"}, "scenes"], "inner": {"rate": 0.1}}, "the given content was changed"


def test_a_value_may_hold_equals_signs_and_be_empty() -> None:
    assert apply_overrides({}, ["a.b=c=d", "e="]) == {"a": {"b": "c=d"}, "e": None}


@pytest.mark.parametrize(
    ("override", "why"),
    [("rate", "not of the form"), ("=1", "not of the form"), ("a..b=1", "not of the form"), ("a=[", "not valid YAML"),
     ("items.x=1", "items is a list; its items have numbers, 'x' is none"),
     ("items.5=1", "items has 2 items; give 0 to 2"),
     ("number.x=1", "number is the plain value 3 and has no keys")],
)  # fmt: skip
def test_a_wrong_override_says_what_is_wrong(override: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        apply_overrides({"items": [1, 2], "number": 3}, [override])


def test_mistakes_in_overrides_and_in_values_come_together(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("backbone: {name: vit, variant: eva_ti_16}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, str(file), ["nonsense", "inner.rate=2", "inner.moed=off"])
    assert [problem.split(":")[0].split(" ")[0] for problem in caught.value.problems] == [
        "override",
        "inner.rate",
        "inner.moed",
    ]
    assert "in mine" in str(caught.value)


# ---------------------------------------------------------------------------------------------- files


def test_a_recipe_builds_on_another_one(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: {x: 1, y: 2}\nc: {name: vit, width: 3}\nd: {name: hog, bins: 9}\ne: hog\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\na: {y: 5}\nc: {name: timm}\nd: {bins: 7}\ne: {bins: 3}\n")
    (tmp_path / "grandchild.yaml").write_text("extends: child.yaml\na: {z: 6}\n")
    assert read_recipe(tmp_path / "grandchild.yaml") == {
        "a": {"x": 1, "y": 5, "z": 6},
        "c": {"name": "timm"},  # another component: nothing of the old one stays
        "d": {"name": "hog", "bins": 7},
        "e": {"name": "hog", "bins": 3},
    }


def test_a_shipped_recipe_can_be_extended_by_name(tmp_path: Path) -> None:
    shipped = list_recipes()[0]
    (tmp_path / "mine.yaml").write_text(f"extends: {shipped}\nrun: {{seed: 7}}\n")
    expected = read_recipe(find_recipe(shipped))
    assert read_recipe(tmp_path / "mine.yaml") == {**expected, "run": {**expected["run"], "seed": 7}}


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        read_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"- 1\n- 2\n", "must hold a mapping"), (b"", "must hold a mapping"), (b"a: [1", "not valid YAML"),
     (b"a: 1\na: 2\n", "stands here twice"), (b"\xff\xfe\x00", "UTF-8|not valid YAML")],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=why) as caught:
        read_recipe(file)
    assert "odd.yaml" in str(caught.value)


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'demoo'; did you mean 'demo'\?"):
        find_recipe("demoo")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        find_recipe("nowhere.yaml")


values = st.recursive(
    st.integers() | st.text(max_size=3), lambda v: st.dictionaries(st.sampled_from("abc"), v, max_size=3)
)
mappings = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


@given(mappings, mappings)
def test_merging_keeps_every_key_and_the_upper_value_wins(below: dict[str, Any], above: dict[str, Any]) -> None:
    merged = merge(below, above)
    assert set(merged) == set(below) | set(above)
    assert merge(merged, above) == merged
    assert merge(below, {}) == below
    for key, value in above.items():
        if not isinstance(value, dict):
            assert merged[key] == value
