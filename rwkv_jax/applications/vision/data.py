"""Images to train on and to hold out: written digits, or lines made by a formula."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import numpy as np

from rwkv_jax.applications.vision.config import Vision
from rwkv_jax.config import ConfigError
from rwkv_jax.training.examples import Examples

LINES = ("across", "upright", "falling", "rising")


class ImageBatch(NamedTuple):
    """Images."""

    image: Any
    """float32 [B, Y, X, 1], zero for an empty pixel, about 2 for a full one."""
    label: Any
    """int32 [B]: the class."""
    hidden: Any
    """bool [B, T]: patches that are taken out; None unless the task is masked."""
    weight: Any
    """float32 [B]."""


def class_names(vision: Vision) -> tuple[str, ...]:
    """Names of the classes."""
    return tuple("0123456789") if vision.images == "digits" else LINES


def make_examples(vision: Vision) -> tuple[Examples, Examples]:
    """Images to train on, and those held out.

    Raises:
      ConfigError: scikit-learn, which has the digits, is not installed.
    """
    if vision.images == "digits":
        images, labels = _digits()
        # Every fifth one in an order drawn once: 1438 to train on, 359 held out.
        order = np.random.default_rng(0).permutation(len(images))
        is_held_out = np.arange(len(images)) % 5 == 4
        parts = [(images[order[own]], labels[order[own]]) for own in (~is_held_out, is_held_out)]
    else:
        parts = [
            _lines(vision, seed, count) for seed, count in ((1, vision.num_examples), (2, vision.num_examples // 2))
        ]
    draws = np.random.default_rng(3)
    training, held_out = (_batch(vision, images, labels, draws) for images, labels in parts)
    return Examples(training, "image", functools.partial(_augment, vision)), Examples(held_out, "image")


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ConfigError(
            "vision.images = 'digits': are scikit-learn's, which is not installed; "
            "pip install 'rwkv-jax[apps]', or take lines"
        ) from error
    found = datasets.load_digits()
    return found.images / 8.0, found.target


def _lines(vision: Vision, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A line through a point near the middle, and noise."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[: vision.size, : vision.size] - (vision.size - 1) / 2
    label = draws.integers(0, len(LINES), count)
    across = np.stack([y, x, (y - x) / 2**0.5, (y + x) / 2**0.5])[label]
    distance = np.abs(across - vision.size / 6 * draws.uniform(-1, 1, (count, 1, 1)))
    return 2.0 * (distance < 0.75) + 0.3 * draws.normal(size=distance.shape), label


def _batch(vision: Vision, images: np.ndarray, labels: np.ndarray, draws: np.random.Generator) -> ImageBatch:
    count = len(images)
    hidden = np.stack([_taken_out(vision, draws) for _ in range(count)]) if vision.task == "masked" else None
    image = images[..., None].astype(np.float32)
    return ImageBatch(image, labels.astype(np.int32), hidden, np.ones(count, np.float32))


def _taken_out(vision: Vision, draws: np.random.Generator) -> np.ndarray:
    """Which patches of an image are taken out, at least one: bool [T]."""
    patches = vision.grid[0] * vision.grid[1]
    return draws.permutation(patches) < max(1, round(vision.masked_share * patches))


def _augment(vision: Vision, row: ImageBatch, draws: np.random.Generator) -> ImageBatch:
    """An image moved by some pixels, what comes in being empty; other patches are taken out."""
    image, by = row.image, vision.shift
    if by:
        padded = np.pad(image, ((by, by), (by, by), (0, 0)))
        y, x = draws.integers(0, 2 * by + 1, 2)
        image = padded[y : y + vision.size, x : x + vision.size]
    return row._replace(image=image, hidden=None if row.hidden is None else _taken_out(vision, draws))
