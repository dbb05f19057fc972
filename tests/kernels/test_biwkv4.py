"""Bidirectional WKV-4 against its sum, others' numbers, and itself: chunks, lengths, packing, extremes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_kernels.biwkv4 import biwkv4
from tests.golden import load_golden

GOLDEN = load_golden("vision/vision_s0.npz")
NAMES = ("w", "u", "k", "v")
WAYS: list[dict[str, Any]] = [
    {"implementation": "scan"},
    {"implementation": "chunked", "chunk_size": 5},
    {},
]


def value_and_gradients(inputs: list[NDArray], gy: NDArray, **options: Any) -> list[NDArray]:
    """y and the gradients of sum(y gy), in float64."""

    @jax.jit
    def run(*inputs: Any) -> Any:
        y, pull = jax.vjp(lambda *inputs: biwkv4(*inputs, **options), *inputs)
        return y, *pull(gy)

    with jax.enable_x64(True):
        return [np.asarray(x) for x in run(*map(jnp.asarray, inputs))]


def by_sum(w: NDArray, u: NDArray, k: NDArray, v: NDArray) -> NDArray:
    """The paper's equation, for one row [T, C]."""
    distance = np.abs(np.subtract.outer(np.arange(len(k)), np.arange(len(k))))[..., None]
    exponents = np.where(distance == 0, u, -(distance - 1) * w) + k[None]
    weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return np.sum(weights * v[None], axis=1) / np.sum(weights, axis=1)


def drawn(time: int, seed: int = 0) -> list[NDArray]:
    draws = np.random.default_rng(seed)
    w = np.array([-0.05, 0.0, 0.1, 2.0])
    return [w, draws.normal(size=4), *(draws.normal(size=(2, time, 4)) for _ in range(2))]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("case", range(5))
def test_numbers_of_others(case: int, way: dict[str, Any]) -> None:
    inputs = [GOLDEN[f"biwkv.{case}.{name}"] for name in NAMES]
    found = value_and_gradients(inputs, GOLDEN[f"biwkv.{case}.gy"], **way)
    for name, value in zip(("y", "gw", "gu", "gk", "gv"), found, strict=True):
        expected = GOLDEN[f"biwkv.{case}.paper.{name}"]
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-10 * np.abs(expected).max(), err_msg=name)


def test_lengths_and_packed_rows_are_rows_of_their_own() -> None:
    """Of values and gradients, with NaN where nothing is to be read."""
    w, u, k, v = drawn(11)
    gy = np.random.default_rng(1).normal(size=k.shape)
    segment_ids, lengths = np.array([[4] * 3 + [2] * 8, [1] * 6 + [9] * 5]), np.array([11, 8])
    k[1, 8:] = v[1, 8:] = np.nan
    found = value_and_gradients([w, u, k, v], gy, segment_ids=segment_ids, lengths=lengths, chunk_size=4)
    assert not any(np.any(x[1, 8:]) for x in (found[0], *found[3:]))
    sums = [np.zeros(4), np.zeros(4)]
    for row, own in ((0, slice(0, 3)), (0, slice(3, 11)), (1, slice(0, 6)), (1, slice(6, 8))):
        part = [x[row : row + 1, own] for x in (k, v, gy)]
        y, gw, gu, gk, gv = value_and_gradients([w, u, *part[:2]], part[2])
        np.testing.assert_allclose(y[0], by_sum(w, u, k[row, own], v[row, own]), rtol=1e-12)
        for whole, alone in zip((found[0], found[3], found[4]), (y, gk, gv), strict=True):
            np.testing.assert_allclose(whole[row, own], alone[0], rtol=1e-10, atol=1e-13)
        sums = [sums[0] + gw, sums[1] + gu]
    np.testing.assert_allclose(found[1:3], sums, rtol=1e-10, atol=1e-13)


def test_large_keys_and_one_patch_in_float32() -> None:
    w, u, k, v = drawn(20)
    k = 60 * np.sign(k)
    y = biwkv4(*(jnp.asarray(x, jnp.float32) for x in (w, u, k, v)))
    np.testing.assert_allclose(y[0], by_sum(w, u, k[0], v[0]), rtol=2e-5, atol=2e-5)
    one = biwkv4(*(jnp.asarray(x, jnp.bfloat16) for x in (w, u, k[:, :1], v[:, :1])))
    assert one.dtype == jnp.bfloat16
    np.testing.assert_array_equal(one, jnp.asarray(v[:, :1], jnp.bfloat16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "pallas"}, "implementation = 'pallas': must be one of scan, chunked"),
        ({"implementation": "scan", "chunk_size": 4}, "chunk_size = 4"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"lengths": np.array([3, 12])}, "lengths: values from 3 to 12"),
        ({"segment_ids": np.zeros((2, 3), int)}, "segment_ids"),
    ],
)
def test_what_cannot_be_computed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        biwkv4(*(jnp.asarray(x, jnp.float32) for x in drawn(11)), **options)


def test_other_shapes_are_refused() -> None:
    w, u, k, v = (jnp.asarray(x, jnp.float32) for x in drawn(3))
    with pytest.raises(ValueError, match="w: shape"):
        biwkv4(w[:3], u, k, v)
