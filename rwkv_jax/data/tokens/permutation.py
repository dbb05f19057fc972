"""Random permutations, evaluated at any position without storing them; keys are hashed from a name."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8
"""Rounds of the Feistel network: the number of keys of a permutation."""

# NumPy scalars made once: creating them in each call would cost as much as the arithmetic of a small batch.
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def random_words(name: str, count: int) -> np.ndarray:
    """`count` random uint64 numbers that depend only on the name.

    From a hash, since numpy's generators may change between versions.
    """
    words = b"".join(hashlib.blake2b(f"{name} {word}".encode(), digest_size=8).digest() for word in range(count))
    return np.frombuffer(words, "<u8").astype(np.uint64)


def permute(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Applies a random permutation of range(size) to positions; memory is proportional to len(positions).

    A Feistel network permutes a power of four. A value outside range(size) is permuted again until it falls inside
    (cycle walking), which terminates because the cycle started inside.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = positions.astype(np.uint64)
    outside, values = np.arange(len(result)), result
    while len(outside):
        left, right = values >> half, values & mask
        for key in keys[:ROUNDS]:
            left, right = right, left ^ (mix(right ^ key) & mask)
        values = (left << half) | right
        result[outside] = values
        walk_on = np.flatnonzero(values >= size)
        outside, values = outside[walk_on], values[walk_on]
    return result.astype(np.int64)


def shuffle_epochs(index: np.ndarray, size: int, name: str) -> np.ndarray:
    """Items of a set that is read again and again, each time in another order; [n] int64.

    Args:
      index: how many items were read before, [n] int64.
      size: of the set.
      name: of the order; epochs add their number.
    """
    epochs, positions = np.divmod(index, size)
    items = np.empty_like(positions)
    for epoch in np.unique(epochs):
        members = epochs == epoch
        items[members] = permute(positions[members], size, random_words(f"{name} {epoch}", ROUNDS))
    return items


def mix(values: np.ndarray) -> np.ndarray:
    """Scrambles an array of uint64 numbers in place (the finalizer of splitmix64); products wrap around."""
    values ^= values >> _SHIFTS[0]
    values *= _FACTORS[0]
    values ^= values >> _SHIFTS[1]
    values *= _FACTORS[1]
    values ^= values >> _SHIFTS[2]
    return values
