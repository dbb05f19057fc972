"""Thresholds are those that sorting finds, and draws never give what weighs nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.inference.sampling.selection import draw, first_largest, largest_floor

ROWS = np.array(
    [
        [3.0, -1.0, 2.0, 2.0, 0.0, -7.5],
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [-2.0, -3e38, -1e-20, -0.5, -0.25, -1.0],
        [1e-20, 3e38, 0.0, -1e-20, 5.0, -np.inf],
        [2.0, np.nextafter(np.float32(2), np.float32(0)), np.nextafter(np.float32(2), np.float32(3)), 1.0, 0.0, -2.0],
    ],
    np.float32,
)


@pytest.mark.parametrize("num_kept", range(1, 7))
def test_floors_of_counts_keep_as_many_as_sorting_does(num_kept: int) -> None:
    def at_least(floor: jax.Array) -> jax.Array:
        return jnp.sum(floor <= ROWS, axis=-1, dtype=jnp.float32)

    target = jnp.full(len(ROWS), float(num_kept))
    floor = largest_floor(at_least, target, -jnp.inf, jnp.asarray(ROWS.max(-1)), lambda floor: 1.0)
    last = np.sort(ROWS, axis=-1)[:, -num_kept]
    np.testing.assert_array_equal(np.asarray(floor)[:, None] <= ROWS, last[:, None] <= ROWS)


@pytest.mark.parametrize("part", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_floors_of_sums_keep_what_adding_up_does(part: float) -> None:
    weights = np.exp(np.random.default_rng(0).normal(0, 4, (20, 500))).astype(np.float32)
    weights /= weights.max(-1, keepdims=True)

    def at_least(floor: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights >= floor, weights, 0), axis=-1)

    floor = largest_floor(at_least, part * jnp.sum(weights, axis=-1), 0.0, 1.0, lambda floor: floor)
    for row, found in zip(weights.astype(np.float64), np.asarray(floor), strict=True):
        descending = np.sort(row)[::-1]
        num_kept = int(np.argmax(np.cumsum(descending) >= part * row.sum())) + 1
        assert (row >= found).sum() == num_kept


def test_without_enough_mass_everything_is_kept() -> None:
    floor = largest_floor(lambda floor: jnp.zeros(2), jnp.ones(2), -jnp.inf, 1.0, lambda floor: 0.0)
    assert floor.tolist() == [-np.inf, -np.inf]


def test_first_largest_is_argmax() -> None:
    np.testing.assert_array_equal(first_largest(jnp.asarray(ROWS)), ROWS.argmax(-1))
    assert first_largest(jnp.full((1, 3), -jnp.inf)).tolist() == [0]
    assert 0 <= int(first_largest(jnp.full((1, 3), jnp.nan))[0]) < 3  # an id, even of a model that has gone wrong


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_draws_never_give_what_weighs_nothing(size: int) -> None:
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    weights[: size // 2] = 0
    weights[-1:] = 0 if size > 2 else 1
    keys = jax.random.split(jax.random.key(0), 3000)
    tokens = np.asarray(jax.jit(draw)(jnp.broadcast_to(weights, (3000, size)), keys))
    assert (weights[tokens] > 0).all()
    assert len(set(tokens.tolist())) > min((weights > 0).sum() * 0.9, 50) - 1
