from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openeva.data.sampler import Order, permute, seed_of, seeds_of


def keys(seed, n):
    return np.full(n, seed_of(seed), np.uint64)


@settings(max_examples=200)
@given(n=st.integers(1, 3000), seed=st.integers())
def test_permute_is_a_permutation(n, seed):
    result = permute(np.arange(n), n, keys(seed, n))
    assert (np.sort(result) == np.arange(n)).all()
    assert (result == permute(np.arange(n), n, keys(seed, n))).all()


def test_permute_answers_single_positions_of_huge_ranges():
    n = 30_000_001
    positions = np.array([0, 1, n // 2, n - 1])
    some = permute(positions, n, keys(0, 4))
    assert len(set(some.tolist())) == 4
    assert ((some >= 0) & (some < n)).all()
    assert permute(positions[2:3], n, keys(0, 1))[0] == some[2]


@pytest.mark.parametrize("n", [5, 64, 1000])
def test_permutations_are_uniform(n):
    """Every position holds every value about equally often, and neighbours are independent."""
    draws = 40_000
    many = seeds_of(1, np.arange(draws))
    first, second, last = (permute(np.full(draws, position), n, many) for position in (0, 1, n - 1))
    for values in (first, second, last):
        counts = np.bincount(values, minlength=n)
        chi_square = ((counts - draws / n) ** 2 / (draws / n)).sum()
        assert chi_square < (n - 1) + 5 * np.sqrt(2 * (n - 1))
    for values in (second, last):
        assert abs(np.corrcoef(first, values)[0, 1] + 1 / (n - 1)) < 0.025


def test_shuffle_has_no_structure():
    n = 10_000
    result = permute(np.arange(n), n, keys(7, n))
    assert abs(np.corrcoef(result[1:], result[:-1])[0, 1]) < 0.04
    assert abs(np.corrcoef(result, np.arange(n))[0, 1]) < 0.04
    assert 0 <= (result == np.arange(n)).sum() < 8


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_an_epoch_holds_every_sample_once(lengths, seed):
    order = Order(lengths, [1.0] * len(lengths), seed)
    n = sum(lengths)
    epochs, positions, index = order.locate(np.arange(3 * n))
    assert epochs.tolist() == [0] * n + [1] * n + [2] * n
    assert positions.tolist() == [*range(n)] * 3
    for epoch in range(3):
        assert sorted(index[epochs == epoch].tolist()) == [*range(n)]
    if n > 8:
        assert index[:n].tolist() != index[n : 2 * n].tolist()


def test_weights_are_times_per_epoch():
    order = Order([10, 20, 30], [1.0, 0.25, 2.0], seed=1)
    assert len(order) == 10 + 5 + 60
    _, _, index = order.locate(np.arange(4 * len(order)))
    times = Counter(index.tolist())
    assert {times[i] for i in range(10)} == {4}
    assert {times[i] for i in range(10, 30)} == {1}  # dealt like cards: all of them before one comes again
    assert {times[i] for i in range(30, 60)} == {8}


def test_dropped_samples_change_with_the_epoch():
    order = Order([10], [1.0], seed=0, epoch_samples=8)
    _, _, index = order.locate(np.arange(80))
    dropped = {tuple(sorted(set(range(10)) - set(index[i : i + 8].tolist()))) for i in range(0, 80, 8)}
    assert all(len(pair) == 2 for pair in dropped)
    assert len(dropped) > 3


def test_another_seed_is_another_order():
    first, second = (Order([100], [1.0], seed).locate(np.arange(100))[2].tolist() for seed in (0, 1))
    assert first != second


def test_seeds_differ_and_depend_on_all_parts():
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900
    many = seeds_of(5, np.repeat(np.arange(30), 30), np.tile(np.arange(30), 30))
    assert len(set(many.tolist())) == 900
    assert seed_of(-1) == seed_of(-1) != seed_of(1)
