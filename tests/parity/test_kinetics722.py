"""The lists and labels of Kinetics-722 against those of the official notebook."""

from typing import get_args

import pytest
from torchvision.models._meta import _KINETICS400_CATEGORIES

from openeva.data.kinetics722 import Merged, merge
from openeva.data.kinetics_classes import ALIASES, NUM_CLASSES, SETS, SetName, canonical, merge_classes, table_of
from parity.golden import Case, cases


def merged(case: Case) -> Merged:
    tree = case.json["tree"]
    assert set(tree) == set(get_args(SetName))
    tables = {key: {split: table_of(f"{key}/{split}", tree[key][split]) for split in tree[key]} for key in SETS}
    return merge(tables)


@pytest.mark.parametrize("case", cases("k722_lists"), ids=str)
def test_lists_of_the_official_notebook(case: Case) -> None:
    made = merged(case)
    assert made.classes.names == case.json["classes_union"]
    assert {f"k722_to_{key}_mapping.npy": made.classes.mapping[key] for key in SETS} == case.json["mapping"]
    assert {f"{name}_raw.txt": list(one.lines()) for name, one in made.lists.items()} == case.json["lists"]


def names_in_place(case: Case) -> list[str]:
    """All names of K-722: those of K-400, which torchvision has, in their places, and made-up ones between them."""
    name_of = dict(zip(case.json["mapping"]["400"], map(canonical, _KINETICS400_CATEGORIES), strict=True))
    names: list[str] = []
    for label in range(NUM_CLASSES["k722"]):
        last = next(name_of[place] for place in range(label, -1, -1) if place in name_of)
        names.append(name_of.get(label, f"{last} !{label:03}"))  # after its neighbour, before what begins like it
    return names


@pytest.mark.parametrize("case", cases("k722_class_maps"), ids=str)
def test_labels_of_all_722_classes(case: Case) -> None:
    assert case.json["aliases"] == ALIASES
    names = names_in_place(case)
    mapping = {key: case.json["mapping"][key[1:]] for key in SETS}
    folders = {key: {names[label] for label in mapping[key]} for key in SETS}
    folders["k400"] = set(_KINETICS400_CATEGORIES)  # two of them under names that only K-400 has
    american = "passing American football (not in game)"
    folders["k600"] = folders["k600"] - {american} | {"passing american football (not in game)"}
    assert len(set().union(*folders.values())) == 725  # without the aliases
    overlaps = [len(folders[one] & folders[other]) for one, other in (SETS[:2], SETS[::2], SETS[1:])]
    assert overlaps == [368, 378, 596]

    made = merge_classes(folders)
    assert made.names == names == sorted(names)
    assert made.mapping == mapping
    assert [len(made.own_names[key]) for key in SETS] == [NUM_CLASSES[key] for key in SETS] == [400, 600, 700]
    assert made.own_names["k400"] == list(_KINETICS400_CATEGORIES)  # a label of K-400 means the same as elsewhere
    assert "passing american football (not in game)" in made.own_names["k600"]
