"""Rows of several segments, and rows of different lengths, that several tests share."""

from __future__ import annotations

import numpy as np

from rwkv_kernels.testing.cases import Shape

SHAPE = Shape(4, 70, 2, 8, 6)
LENGTHS = np.array([70, 0, 37, 16])
BOUNDS = ((0, 1, 2, 16, 32, 48, 64, 65), (0, 16, 17, 33, 47, 61, 65), (0, 14, 30, 44), (0,))
"""Where segments begin in each row: at the edges of every implementation's chunks and off them, some of one token."""
IDS = (7, -1, 7, 3)
"""Ids of successive segments, over and over: they come back, and restart the state when they do."""


def segment_ids() -> np.ndarray:
    ids = np.zeros((SHAPE.batch, SHAPE.time), np.int32)
    for row, starts in enumerate(BOUNDS):
        for number, start in enumerate(starts):
            ids[row, start:] = IDS[number % len(IDS)]
    return ids


UNPACKED = np.zeros((SHAPE.batch, SHAPE.time), np.int32)
FULL = np.full(SHAPE.batch, SHAPE.time)
PACKINGS = {
    "segments": {"segment_ids": segment_ids(), "lengths": FULL},
    "lengths": {"segment_ids": UNPACKED, "lengths": LENGTHS},
    "both": {"segment_ids": segment_ids(), "lengths": LENGTHS},
}
