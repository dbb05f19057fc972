"""Draws a sequence of bases with a known entropy, and writes it as runs/bases/bases.npy with names beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

NAMES = ("A", "C", "G", "T")
DISTANCE = 6
"""Each base depends on the one before it and on the one so many before it."""


def chances(seed: int = 0) -> np.ndarray:
    """P(next | six before, one before): [4, 4, 4], sharp enough that there is something to learn."""
    return np.random.default_rng(seed).dirichlet(np.full(4, 0.5), size=(4, 4))


def draw(chance: np.ndarray, length: int, seed: int = 1) -> np.ndarray:
    """A sequence of so many bases, uint8; the first six are drawn evenly."""
    draws = np.random.default_rng(seed)
    bounds, points = np.cumsum(chance, axis=-1).tolist(), draws.random(length).tolist()
    found = draws.integers(0, 4, DISTANCE).tolist()
    for point in points[DISTANCE:]:
        first, second, third, _ = bounds[found[-DISTANCE]][found[-1]]
        found.append((point > first) + (point > second) + (point > third))
    return np.array(found, np.uint8)


def entropy(chance: np.ndarray) -> float:
    """Bits per base of the process: the mean over contexts of six, as often as they occur, of the next base's."""
    occurs = np.full((4,) * DISTANCE, 4.0**-DISTANCE)  # [x_{t-6}, ..., x_{t-1}]
    for _ in range(500):  # a base further on: the oldest is summed over, the next one drawn
        occurs = np.einsum("a...z,azn->...zn", occurs, chance)
    of_pair = np.einsum("abcdez->az", occurs)
    bits = -np.sum(chance * np.log2(np.maximum(chance, 1e-300)), axis=-1)
    return float(np.sum(of_pair * bits))


def main(folder: str = "runs/bases", length: int = 2_000_000) -> None:
    """Writes the sequence and prints what can be known about it."""
    path, chance = Path(folder), chances()
    path.mkdir(parents=True, exist_ok=True)
    np.save(path / "bases.npy", draw(chance, length))
    (path / "bases.txt").write_text("\n".join(NAMES) + "\n")
    print(f"{path / 'bases.npy'}: {length:,} bases of {entropy(chance):.4f} bits")


if __name__ == "__main__":
    main()
