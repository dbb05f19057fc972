"""Images: both tasks and both encoders learn, patches are where they should be, and a hidden one is not read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.applications.vision.config import Vision, VisionConfig
from rwkv_jax.applications.vision.data import make_examples
from rwkv_jax.applications.vision.model import VisionModel, patches_of
from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    from_dict,
    to_dict,
)
from rwkv_jax.held_out import Measured
from rwkv_jax.training.application import load_application
from rwkv_jax.training.loop import train

LINES = Vision(images="lines", size=8, patch=2, num_examples=96)
RWKV = ModelConfig(vocab_size=8, num_layers=2, width=32, head_dim=16)
VIT = ModelConfig(architecture="transformer", vocab_size=8, num_layers=2, width=32, head_dim=16, context_length=16)


def config(run_dir: str = "unused", **changes: Any) -> VisionConfig:
    """A run of a few seconds."""
    options: dict[str, Any] = {
        "run_dir": run_dir,
        "model": RWKV,
        "vision": LINES,
        "training": StepConfig(batch_size=32, sequence_length=16, num_steps=30),
        "optimizer": OptimizerConfig(learning_rate=6e-3, final_learning_rate=1e-3, warmup_steps=3),
        "evaluation": EvaluationConfig(every=30, sample_prompts=()),
        "checkpoint": CheckpointConfig(every=30),
        "logging": LoggingConfig(every=10),
    }
    return VisionConfig(**options | changes)


def trained(own: VisionConfig) -> Measured:
    """What a run's last evaluation says."""
    measured = train(own).measured
    assert measured is not None
    return measured


def random_model(own: VisionConfig) -> VisionModel:
    """A model with no zeros among its parameters."""
    application = own.load_application()
    leaves, structure = jax.tree.flatten(application.abstract[1])
    draws = np.random.default_rng(0)
    params = [jnp.asarray(0.1 * draws.normal(size=x.shape) + 0.1, x.dtype) for x in leaves]
    return application.model(structure.unflatten(params))


@pytest.mark.parametrize("model", [RWKV, VIT], ids=["rwkv", "vit"])
def test_lines_are_classified(model: ModelConfig, tmp_path: Path) -> None:
    measured = trained(config(str(tmp_path / "run"), model=model))
    assert measured.metrics["accuracy"] > 0.4  # chance is 0.25
    application, loaded = load_application(str(tmp_path / "run"))
    _, held_out = application.examples(print)
    assert held_out is not None
    logits = jax.jit(loaded)(held_out.arrays.image)
    right = np.mean(np.argmax(logits, axis=1) == held_out.arrays.label)
    assert right == pytest.approx(measured.metrics["accuracy"], abs=1e-6)


def test_patches_taken_out_are_filled_in(tmp_path: Path) -> None:
    vision = dataclasses.replace(LINES, task="masked", masked_share=0.25)
    measured = trained(config(str(tmp_path / "run"), model=VIT, vision=vision))
    assert measured.loss < 0.9 * measured.metrics["error_of_mean"]


@pytest.mark.parametrize("model", [RWKV, VIT], ids=["rwkv", "vit"])
def test_what_is_hidden_is_not_read_and_all_else_is_by_all(model: ModelConfig) -> None:
    vision = dataclasses.replace(LINES, task="masked")
    encoder = random_model(config(model=model, vision=vision))
    examples, _ = make_examples(vision)
    image, hidden = jnp.asarray(examples.arrays.image[:1]), jnp.asarray(examples.arrays.hidden[:1])
    read = jax.jit(lambda image: encoder.hidden(image, hidden))
    # How much each pixel moves the last patch, and how much the first.
    for patch in (-1, 0):
        gradient = jax.grad(lambda x, patch=patch: jnp.sum(read(x)[0, patch] ** 3))(image)
        moves = np.any(np.asarray(patches_of(gradient, 2)) != 0, axis=-1)[0]
        np.testing.assert_array_equal(moves, ~np.asarray(hidden[0]))


def test_patches_are_in_raster_order() -> None:
    image = np.arange(16.0).reshape(1, 4, 4, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(patches_of(jnp.asarray(image), 2)[0], expected)


def test_an_image_is_moved_and_keeps_its_class() -> None:
    examples, held_out = make_examples(LINES)
    rows = np.arange(8)
    moved = examples.rows(rows, lambda row: np.random.default_rng(row))
    np.testing.assert_array_equal(moved.label, examples.arrays.label[:8])
    assert np.any(moved.image != examples.arrays.image[:8])
    inner = moved.image[:, 1:-1, 1:-1]
    for image, original in zip(inner, examples.arrays.image[:8], strict=True):
        places = [original[y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
        assert any(np.array_equal(image, place) for place in places)
    assert held_out.augment is None


def test_digits_are_scikit_learns() -> None:
    pytest.importorskip("sklearn")
    training, held_out = make_examples(Vision())
    assert (len(training), len(held_out)) == (1438, 359)
    seen = {image.tobytes() for image in training.arrays.image}
    assert sum(image.tobytes() in seen for image in held_out.arrays.image) == 0
    assert training.arrays.image.max() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": Vision(patch=4)}, "training.sequence_length = 16: an image has 4 patches; set it to 4"),
        ({"model": ModelConfig(generation="7a", vocab_size=8, num_layers=2, width=64)}, "RWKV-7a's layers have more"),
    ],
)
def test_runs_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = config(**changes).load_application().abstract


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "vision.patch = 3: must divide vision.size = 8"),
        ({"size": 16}, "vision.size = 16: digits have 8 pixels a side"),
        ({"masked_share": 1.0}, "vision.masked_share = 1.0"),
        ({"shift": 8}, "vision.shift = 8"),
        ({"images": "lines", "num_examples": 1}, "vision.num_examples = 1: must be at least 2"),
        ({"task": "colors"}, "vision.task = 'colors'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Vision(**changes)


def test_config_survives_json() -> None:
    own = config(model=VIT)
    assert from_dict(to_dict(own)) == own
