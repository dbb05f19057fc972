"""The surrogate gradient of ROSA's layers: the published one, and what looking up again after each flip gives."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_kernels.rosa import Outputs, rosa_lookup, rosa_qkv, rosa_sequence, symbols_of
from rwkv_kernels.rosa.flips import Scores, of_lookup, surrogate
from rwkv_kernels.rosa.scan import empty_state
from tests.golden import load_golden, relative_error
from tests.kernels.rosa_definition import flips

GOLDEN = load_golden("rosa/rosa_s0.npz")


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_one_bit_of_a_sequence_has_the_published_gradient() -> None:
    given = {name[5:]: jnp.asarray(x) for name, x in GOLDEN.items() if name.startswith("bit1.")}
    tau = float(given["tau"])

    def layer(x: Any, one: Any, zero: Any) -> Any:
        return rosa_sequence(x, Outputs(one, zero, jnp.zeros(())), bits=1, tau=tau)

    out, pull = jax.vjp(jax.jit(layer), given["x"], given["emb1"], given["emb0"])
    np.testing.assert_array_equal(out, given["out"])
    for found, name in zip(pull(given["ct"]), ("gx", "gemb1", "gemb0"), strict=True):
        assert relative_error(found, given[name]) < 1e-12, name


def test_four_bits_of_a_sequence_and_layers_of_lookups_are_as_published() -> None:
    given = {name: jnp.asarray(x) for name, x in GOLDEN.items()}
    one, zero = given["bit4.emb1"], given["bit4.emb0"]
    out = rosa_sequence(given["bit4.x"], Outputs(one, zero, zero), bits=4)
    np.testing.assert_array_equal(out, given["bit4.out"])
    q, k, v, e = (given[f"qkvlayer.{name}"] for name in ("q", "k", "v", "emb"))
    for bits, none in ((1, -e), (4, jnp.zeros_like(e))):
        out, _ = rosa_qkv(q, k, v, Outputs(e, -e, none), bits=bits, window=q.shape[1])
        np.testing.assert_array_equal(out, given[f"qkvlayer.out_{bits}bit"])


def drawn(seed: int, bits: int, shape: tuple[int, int, int]) -> dict[str, NDArray]:
    """Symbols, of which few are frequent, so that matches are long."""
    draws = np.random.default_rng(seed)
    few = draws.integers(0, 2**bits, 3)
    return {name: few[draws.integers(0, 3, shape)] for name in "qkv"}


def scores_for(seed: int, bits: int, shape: tuple[int, int, int]) -> Scores:
    draws = np.random.default_rng(seed)
    return Scores(*(jnp.asarray(draws.standard_normal((*shape, bits))) for _ in range(3)))


@functools.partial(jax.jit, static_argnames="window")
def _history(arrays: Any, window: int) -> Any:
    return rosa_lookup(arrays["q"], arrays["k"], arrays["v"], window=window).state


CASES: dict[str, dict[str, Any]] = {
    "a text": {},
    "a window": {"window": 4},
    "packed texts": {"segment_ids": np.array([[0] * 6 + [1] * 7, [0] * 13])},
    "after a state": {"first": 5},
    "after a state, in a window": {"first": 6, "window": 3},
}


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_flips_are_found_without_looking_up_again(bits: int, case: str) -> None:
    options = dict(CASES[case])
    first, window = options.pop("first", 0), options.get("window")
    arrays = drawn(bits, bits, (2, 2, 13))
    scores = scores_for(1, bits, (2, 2, 13 - first))
    expected = flips(arrays, scores, first, **options)
    call = {name: jnp.asarray(x[:, :, first:], jnp.uint8) for name, x in arrays.items()}
    size = window or 13
    if first:
        state = _history({name: jnp.asarray(x[:, :, :first], jnp.uint8) for name, x in arrays.items()}, size)
    else:
        state = empty_state(2, 2, min(size, 13))
    found = jax.jit(of_lookup)(call["q"], call["k"], call["v"], state, scores, options.get("segment_ids"))
    for name, own in zip("qkv", found, strict=True):
        np.testing.assert_allclose(own, expected[name], atol=1e-12, err_msg=name)
        assert np.any(expected[name] != 0), name


def test_flips_of_four_bits_and_of_long_matches_are_found() -> None:
    arrays = drawn(5, 4, (1, 1, 12))
    arrays["q"][:] = arrays["k"][:] = 3  # each query goes on where the last one was found
    arrays["k"][0, 0, 5] = 2
    scores = scores_for(2, 4, (1, 1, 12))
    expected = flips(arrays, scores)
    symbols = (jnp.asarray(arrays[name], jnp.uint8) for name in "qkv")
    found = jax.jit(of_lookup)(*symbols, empty_state(1, 1, 12), scores)
    for name, own in zip("qkv", found, strict=True):
        np.testing.assert_allclose(own, expected[name], atol=1e-12, err_msg=name)


def test_the_gradient_of_a_layer_is_that_of_its_flips() -> None:
    draws = np.random.default_rng(0)
    q, k, v, ct = (jnp.asarray(draws.standard_normal((2, 11, 4))) for _ in range(4))
    e = jnp.asarray(draws.standard_normal((1, 1, 4)))
    lengths = jnp.array([11, 6])
    ct = jnp.where(jnp.arange(11)[None, :, None] < lengths[:, None, None], ct, jnp.nan)  # undefined there

    def layer(q: Any, k: Any, v: Any, e: Any) -> Any:
        out, _ = rosa_qkv(q, k, v, Outputs(e, -e, 0 * e), bits=2, window=11, lengths=lengths)
        return jnp.where(jnp.isnan(ct), 0, out)

    _, pull = jax.vjp(jax.jit(layer), q, k, v, e)
    *of_inputs, of_e = pull(jnp.nan_to_num(ct))
    arrays = {name: np.asarray(symbols_of(x, 2)) for name, x in zip("qkv", (q, k, v), strict=True)}
    expected, clean = {}, np.nan_to_num(np.asarray(ct))
    for row, length in enumerate(lengths.tolist()):
        own = {name: x[row : row + 1, :, :length] for name, x in arrays.items()}
        per_bit = jnp.asarray(clean * np.asarray(e))[row : row + 1, :length].reshape(1, length, 2, 2).swapaxes(1, 2)
        for name, x in flips(own, Scores(per_bit, -per_bit, 0 * per_bit)).items():
            changes = expected.setdefault(name, np.zeros((2, 11, 4)))
            changes[row, :length] = x.swapaxes(1, 2).reshape(length, 4)
    for found, (name, changes), x in zip(of_inputs, expected.items(), (q, k, v), strict=True):
        np.testing.assert_allclose(found, surrogate(x, jnp.asarray(changes), 1e-3), atol=1e-9, err_msg=name)
    out = layer(q, k, v, e)
    np.testing.assert_allclose(
        of_e, np.sum(clean * np.asarray(out) / np.asarray(e), axis=(0, 1))[None, None], atol=1e-9
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_in_half_precision_are_rounded_once(dtype: str) -> None:
    """In float16 what a bit changes may be too large where its gradient is not."""
    draws = np.random.default_rng(0)
    x = jnp.asarray([700.0, 1e-4, *draws.standard_normal(100)], dtype)
    changes = jnp.asarray([1e5, 0.01, *draws.standard_normal(100)], jnp.float32)
    exact = np.where(np.asarray(x > 0), -1, 1) * np.asarray(changes) / (2 * np.maximum(np.abs(np.float32(x)), 1e-3))
    found = surrogate(x, changes, 1e-3)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, jnp.asarray(exact.astype(np.float32), dtype))


def test_layers_that_cannot_be_are_refused() -> None:
    x = jnp.zeros((1, 3, 6))
    for bits, said in ((4, "C a multiple of bits = 4"), (9, "bits = 9: must lie from 1 to 8")):
        with pytest.raises(ValueError, match=re.escape(said)):
            rosa_qkv(x, x, x, Outputs(x, x, x), bits=bits, window=3)
        with pytest.raises(ValueError, match=re.escape(said)):
            rosa_sequence(x, Outputs(x, x, x), bits=bits)
