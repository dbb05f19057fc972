"""The token shift of images against loops over patches."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import model_type
from rwkv_jax.models.grid import grid_shift, omni_shift, quad_shift
from tests.golden import load_golden

IMAGE = np.random.default_rng(0).normal(size=(2, 3, 4, 10)).astype(np.float32)


def neighbor(image: np.ndarray, y: int, x: int) -> np.ndarray:
    inside = 0 <= y < image.shape[1] and 0 <= x < image.shape[2]
    return image[:, y, x] if inside else np.zeros_like(image[:, 0, 0])


def test_quad_shift() -> None:
    """10 channels: groups end at int(2.5), 5, int(7.5) and 10; at share 0.2 the last two stay."""
    for share, ends in ((0.25, (0, 2, 5, 7, 10)), (0.2, (0, 2, 4, 6, 8))):
        found = quad_shift(jnp.asarray(IMAGE), share)
        for y in range(3):
            for x in range(4):
                expected = IMAGE[:, y, x].copy()
                for group, (dy, dx) in enumerate(((0, -1), (0, 1), (-1, 0), (1, 0))):
                    own = slice(ends[group], ends[group + 1])
                    expected[:, own] = neighbor(IMAGE, y + dy, x + dx)[:, own]
                np.testing.assert_array_equal(found[:, y, x], expected)


@pytest.mark.parametrize("case", range(4))
def test_quad_shift_of_vision_rwkv(case: int) -> None:
    golden = load_golden("vision/vision_s0.npz")
    x, y, hw, pixels, gamma = (golden[f"qshift.{case}.{name}"] for name in ("x", "y", "hw", "shift_pixel", "gamma"))
    image = jnp.asarray(x, jnp.float32).reshape(len(x), *hw, -1)
    found = quad_shift(image, float(gamma), int(pixels))
    np.testing.assert_array_equal(found.reshape(x.shape), np.asarray(y, np.float32))


def test_omni_shift() -> None:
    kernel = np.random.default_rng(1).normal(size=(3, 3, 10)).astype(np.float32)
    found = omni_shift(jnp.asarray(IMAGE), jnp.asarray(kernel))
    for y in range(3):
        for x in range(4):
            expected = sum(
                kernel[dy, dx] * neighbor(IMAGE, y + dy - 1, x + dx - 1) for dy in range(3) for dx in range(3)
            )
            np.testing.assert_allclose(found[:, y, x], expected, rtol=0, atol=1e-5)


def test_rows_are_images_in_raster_order() -> None:
    x = jnp.asarray(IMAGE.reshape(2, 12, 10))
    np.testing.assert_array_equal(grid_shift(x, (3, 4)), quad_shift(jnp.asarray(IMAGE)).reshape(2, 12, 10))


@pytest.mark.parametrize("generation", ["4", "5.2", "6", "7"])
def test_every_generation_shifts_on_a_grid(generation: str) -> None:
    """A patch then sees the one below it, which comes later in raster order."""
    config = ModelConfig(generation=generation, vocab_size=5, num_layers=2, width=16, head_dim=4)
    model = model_type(config)(config, rngs=nnx.Rngs(0), has_embedding=False, has_head=False)
    graphdef, params = nnx.split(model, nnx.Param)
    draws = np.random.default_rng(0)
    drawn = {path: x + 0.3 * draws.normal(size=x.shape).astype(np.float32) for path, x in flat(params)}
    model = nnx.merge(graphdef, unflat(params, drawn))
    x = draws.normal(size=(1, 12, 16)).astype(np.float32)
    changed = x.copy()
    changed[:, 5, :8] += 1  # row 1, column 1; of some channels, or the norm would take it away
    differs = {
        grid: np.max(np.abs(np.subtract(*(hidden(model, each, grid) for each in (changed, x)))), axis=(0, 2)) > 1e-4
        for grid in (None, (3, 4))
    }
    assert not np.any(differs[None][:5])
    assert differs[3, 4][1], "the patch above"


def hidden(model: Any, x: np.ndarray, grid: Any) -> np.ndarray:
    return np.asarray(model.hidden(None, inputs_embeds=x, grid=grid).hidden)


def flat(params: Any) -> list[tuple[Any, Any]]:
    return [(path, x[...]) for path, x in nnx.to_flat_state(params)]


def unflat(params: Any, values: dict[Any, Any]) -> Any:
    return nnx.from_flat_state([(path, x.replace(values[path])) for path, x in nnx.to_flat_state(params)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 5)}, "grid: 3 x 5 patches, and there are T = 12 tokens"),
        ({"grid": (3, 4), "lengths": np.array([3])}, "grid: every row is one whole image"),
        ({"grid": (3, 4), "segment_ids": np.zeros((1, 12), np.int32)}, "grid: every row is one whole image"),
    ],
)
def test_what_is_no_image_is_refused(options: dict[str, Any], message: str) -> None:
    config = ModelConfig(vocab_size=5, num_layers=2, width=16, head_dim=4)
    model = model_type(config)(config, rngs=nnx.Rngs(0), has_embedding=False, has_head=False)
    with pytest.raises(ValueError, match=message):
        model.hidden(None, inputs_embeds=jnp.zeros((1, 12, 16)), **options)
