"""Which sample comes when: a seeded endless order that needs no memory, so that 30 million samples resume at once.

sample number of the run -> (epoch, position) -> seeded permutation of the epoch -> (source, sample of it).

The permutation is a Feistel network over a grid of about `sqrt(n) x sqrt(n)` cells with modular addition, walked until
it lands below n (at most a few steps, since the grid is hardly larger than n). Nothing grows with the data set, any
position can be asked for at any time, and workers and ranks need no communication.
Paper: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), method 3 and cycle walking.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

_ROUNDS = 8
_STEP = 0x9E3779B97F4A7C15
_GOLDEN = np.uint64(_STEP)


def _mix(x: Keys) -> Keys:
    """The finaliser of splitmix64: every input bit changes every output bit with probability one half."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_of(*parts: int) -> int:
    """One 64-bit seed from several whole numbers; the order of the parts counts."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = _mix(state * np.uint64(3) + np.array([part & (2**64 - 1)], np.uint64) + _GOLDEN)
    return int(state[0])


def seeds_of(key: int, *numbers: Indices) -> Keys:
    """Many 64-bit seeds at once, from one key and one or more arrays of whole numbers."""
    state = np.array([key & (2**64 - 1)], np.uint64)
    for array in numbers:
        state = _mix(state * np.uint64(3) + array.astype(np.uint64) + _GOLDEN)
    return state


def permute(indices: Indices, n: int, keys: Keys) -> Indices:
    """Image of each index under the pseudo-random permutation of `range(n)` that its key names.

    Args:
        indices: Numbers in `[0, n)`.
        n: Size of the permuted range.
        keys: One 64-bit key per index; equal keys mean the same permutation.
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    result = _feistel(indices, rows, columns, keys)
    outside = np.flatnonzero(result >= n)
    while outside.size:
        result[outside] = _feistel(result[outside], rows, columns, keys[outside])
        outside = outside[result[outside] >= n]
    return result


def _feistel(indices: Indices, rows: int, columns: int, keys: Keys) -> Indices:
    row, column = (part.astype(np.uint64) for part in np.divmod(indices, columns))
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    for number in range(_ROUNDS):
        key = keys + np.uint64(_STEP * (number + 1) % 2**64)
        if number % 2:
            row = (row + _mix(key ^ _mix(column)) % num_rows) % num_rows
        else:
            column = (column + _mix(key ^ _mix(row + num_columns)) % num_columns) % num_columns
    return (row * num_columns + column).astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The endless order of samples of a weighted mixture.

    In an epoch, source i fills `round(weight_i * length_i)` of the positions. Its samples are dealt like cards: no
    sample comes a second time before all others of its source came once, also across epochs; so a sample of weight 0.5
    is seen every second epoch and one of weight 2 twice in every epoch.

    Attributes:
        lengths: Number of samples of each source.
        weights: How often a sample of each source is seen per epoch, on average.
        seed: Seed of all permutations.
        epoch_samples: Positions used per epoch; the default is all, fewer drop the last ones of the permutation.
    """

    lengths: Sequence[int]
    weights: Sequence[float]
    seed: int
    epoch_samples: int | None = None

    @property
    def counts(self) -> list[int]:
        """Positions that each source fills in an epoch."""
        return [max(1, round(weight * length)) for weight, length in zip(self.weights, self.lengths, strict=True)]

    def __len__(self) -> int:
        """Samples per epoch."""
        return sum(self.counts) if self.epoch_samples is None else self.epoch_samples

    def locate(self, numbers: Indices) -> tuple[Indices, Indices, Indices]:
        """Epoch, position in it, and index in the concatenated sources of samples given by their number in the run."""
        epochs, positions = np.divmod(numbers, len(self))
        counts = self.counts
        shuffled = permute(positions, sum(counts), seeds_of(seed_of(self.seed, 0), epochs))
        ends = np.cumsum(counts)
        which = np.searchsorted(ends, shuffled, side="right")
        index = np.empty_like(shuffled)
        starts = np.cumsum([0, *self.lengths])
        for number in np.unique(which).tolist():  # there may be thousands of sources: one per class
            length, count = self.lengths[number], counts[number]
            mine = np.flatnonzero(which == number)
            within = shuffled[mine] - (ends[number] - count)
            if count != length:
                passes, within = np.divmod(epochs[mine] * count + within, length)
                within = permute(within, length, seeds_of(seed_of(self.seed, number + 1), passes))
            index[mine] = starts[number] + within
        return epochs, positions, index
