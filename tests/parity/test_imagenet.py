"""The rows of the 1000-way head that count on ImageNet-A and -R."""

import pytest

from openeva.data.imagenet_classes import subset_rows, wordnet_ids
from parity.golden import Case, cases

SETS = {"imagenet_a": "a", "imagenet_r": "r"}


@pytest.mark.parametrize("case", cases("load_report"), ids=str)
def test_rows_of_the_200_way_heads(case: Case) -> None:
    rows = case.json["head_row_indices"]
    assert set(SETS) <= set(rows)
    for name, subset in SETS.items():
        assert list(subset_rows(subset)) == rows[name]


def test_class_indices_are_positions_of_sorted_wordnet_ids() -> None:
    assert list(wordnet_ids()) == sorted(set(wordnet_ids()))
    assert len(wordnet_ids()) == 1000
    assert len(set(subset_rows("a")) & set(subset_rows("r"))) == 86  # the two sets' common classes (spec section 7)
