"""Digests see every bit, and not how an array lies on its devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.digests import digest_tree
from tests.kernels.test_sharding import run_on_four_devices

MULTIPLIERS = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))
DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")


def by_hand(x: NDArray) -> str:
    """The definition, number by number in Python's integers."""
    words = np.ascontiguousarray(x).reshape(-1).view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))
    sums = []
    for of_words, of_positions in MULTIPLIERS:
        total = 0
        for position, word in enumerate(words.tolist()):
            h = (word * of_words + position * of_positions) % 2**32
            for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                h = (h ^ (h >> shift)) * multiplier % 2**32
            total += h ^ (h >> 16)
        sums.append(f"{total % 2**32:08x}")
    return f"{x.dtype}[{','.join(map(str, x.shape))}] {''.join(sums)}"


def example(dtype: str, shape: tuple[int, ...] = (3, 5, 2)) -> jax.Array:
    return jnp.asarray(10 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_that_of_its_definition(dtype: str) -> None:
    x = example(dtype)
    assert digest_tree({"x": x}) == {"x": by_hand(np.asarray(x))}


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_numbers_of_eight_bytes_are_two_words(float64: None, dtype: str) -> None:
    x = example(dtype)
    assert digest_tree({"x": x}) == {"x": by_hand(np.asarray(x))}


def test_paths_are_those_of_the_tree() -> None:
    assert list(digest_tree({"a": {"b": jnp.ones(2)}, "c": (jnp.ones(()), jnp.zeros((0, 3)))})) == ["a.b", "c.0", "c.1"]


def test_every_bit_counts() -> None:
    x = np.asarray(example("float32", (2, 3)))
    seen = {digest_tree({"x": jnp.asarray(x)})["x"]}
    for bit in range(8 * x.nbytes):
        changed = bytearray(x.tobytes())
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(digest_tree({"x": jnp.asarray(np.frombuffer(changed, np.float32).reshape(x.shape))})["x"])
    assert len(seen) == 1 + 8 * x.nbytes


def test_order_shape_and_dtype_count() -> None:
    x = example("float32", (4, 6))
    others = [x, x[::-1], x[:, ::-1], x.T, x.reshape(6, 4), x.reshape(-1), jax.lax.bitcast_convert_type(x, jnp.int32)]
    assert len({digest_tree({"x": other})["x"] for other in others}) == len(others)


def test_where_an_array_lies_does_not_count() -> None:
    found = run_on_four_devices("tests.sharded_digests")
    assert len(found) == 5
    assert len(set(found)) == 1
