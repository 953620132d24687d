"""Every shipped recipe is valid, says what it is for, and names only things that exist."""

import re

import pytest

from openeva.catalogue import recipes
from openeva.config import dump_yaml, find_recipe, list_recipes, load_config, parse_yaml, validate
from openeva.evaluate import recipe_type
from openeva.train import Recipe

HEADER = ("Command:", "Paper:", "Expected:", "Cost:")
"""What the comment at the top of a recipe answers: how to run it, which row of the paper it is, the metric to expect
and where that number comes from, what it costs in hours of which device."""

every_recipe = pytest.mark.parametrize("name", list_recipes())


def header_of(name: str) -> list[str]:
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def test_there_are_recipes() -> None:
    assert "pretrain/demo" in list_recipes()


@every_recipe
def test_a_recipe_validates_and_its_printed_form_is_the_same_recipe(name: str) -> None:
    config = load_config(recipe_type(name), name)
    assert validate(recipe_type(name), parse_yaml(dump_yaml(config))) == config


@every_recipe
def test_a_recipe_has_a_header(name: str) -> None:
    title, *rest = header_of(name)
    assert len(title) > 20
    assert title.endswith(".")
    assert dict(recipes())[name] == title
    for word in HEADER:
        (line,) = [line for line in rest if line.startswith(word)]
        assert len(line.removeprefix(word).strip()) > 3, f"{word} says nothing"


@every_recipe
def test_the_command_in_the_header_names_this_recipe(name: str) -> None:
    header = " ".join(header_of(name))
    command = "train" if recipe_type(name) is Recipe else "evaluate"
    named = re.findall(rf"openeva {command} ([\w/]+)", header)
    assert named, f"the header has no `openeva {command} ...`"
    assert {find_recipe(found) for found in named} == {find_recipe(name)}


@every_recipe
def test_a_run_of_a_recipe_goes_below_runs(name: str) -> None:
    out = load_config(recipe_type(name), name).run.out
    assert out.parts[0] == "runs"
    assert len(out.parts) == 2
