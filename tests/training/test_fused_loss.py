"""The fused loss against the plain one, and what its program multiplies and holds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_jax.models.layers import linear, wide_dtype
from rwkv_jax.training.fused_loss import FusedLosses, fused_losses
from rwkv_jax.training.loss import sum_losses
from tests.golden import assert_close

BATCH, TIME, WIDTH, VOCAB = 2, 7, 5, 11
L2WRAP = 0.3
TOKENS = BATCH * TIME


def arguments(dtype: str, masked: bool) -> dict[str, Any]:
    draws = np.random.default_rng(1)
    return {
        "hidden": jnp.asarray(draws.standard_normal((BATCH, TIME, WIDTH)), dtype),
        "head": jnp.asarray(draws.standard_normal((VOCAB, WIDTH)), wide_dtype(jnp.dtype(dtype))),
        "targets": jnp.asarray(draws.integers(0, VOCAB, (BATCH, TIME))),
        "mask": jnp.asarray(draws.integers(0, 2, (BATCH, TIME))) if masked else None,
    }


def fused(hidden: Array, head: Array, targets: Array, mask: Array | None, chunk: int | None) -> FusedLosses:
    return fused_losses(hidden, head, targets, mask, l2wrap=L2WRAP, chunk=chunk)


def plain(hidden: Array, head: Array, targets: Array, mask: Array | None, chunk: int | None) -> FusedLosses:
    sums = sum_losses(lambda x: linear(x, head, out_dtype=wide_dtype(x.dtype)), hidden, targets, mask, chunk)
    return FusedLosses(sums.nll + L2WRAP * sums.peak, sums.nll)


def differentiated(function: Any, given: dict[str, Any], chunk: int | None, factor: float = 1.0) -> dict[str, Array]:
    """Both sums, and the gradients of a multiple of what is minimized."""

    def run(hidden: Array, head: Array) -> tuple[Array, FusedLosses]:
        losses = function(hidden, head, given["targets"], given["mask"], chunk)
        return factor * losses.minimized, losses

    (_, losses), (dhidden, dhead) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(
        given["hidden"], given["head"]
    )
    return losses._asdict() | {"dhidden": dhidden, "dhead": dhead}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 4, 13, 14, 100])
def test_losses_and_gradients_are_those_of_the_plain_loss(float64: None, masked: bool, chunk: int | None) -> None:
    given = arguments("float64", masked)
    expected = differentiated(plain, given, None, factor=-2.5)
    assert_close(differentiated(fused, given, chunk, factor=-2.5), expected, 1e-13)


def test_without_gradients_the_sums_are_the_same(float64: None) -> None:
    given = arguments("float64", masked=True)
    found = jax.jit(functools.partial(fused, chunk=4))(**given)
    expected = plain(**given, chunk=None)
    assert_close(found._asdict(), expected._asdict(), 1e-13)


def test_a_target_outside_the_vocabulary_is_no_number() -> None:
    given = arguments("float32", masked=False)
    given["targets"] = given["targets"].at[0, 0].set(VOCAB)
    found = differentiated(fused, given, 4)
    assert np.isnan(found["minimized"])
    assert np.isnan(found["nll"])


def test_the_reported_sum_has_no_gradient() -> None:
    given = arguments("float32", masked=False)
    gradient = jax.grad(lambda x: fused(x, given["head"], given["targets"], None, 4).nll)(given["hidden"])
    assert not np.any(gradient)


def products(jaxpr: Any) -> Iterator[Any]:
    """Every matrix product of a program, within loops and calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        parts = itertools.chain.from_iterable(
            x if isinstance(x, list | tuple) else [x] for x in equation.params.values()
        )
        for part in parts:
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_products_of_the_compute_dtype_summed_in_float32(dtype: str) -> None:
    given = arguments(dtype, masked=True)
    run = functools.partial(differentiated, fused, chunk=2)
    found = list(products(jax.make_jaxpr(run)(given).jaxpr))
    assert [x.outvars[0].aval.shape for x in found] == [(2, VOCAB), (VOCAB, WIDTH), (2, WIDTH)]
    assert {operand.aval.dtype.name for x in found for operand in x.invars} == {dtype}
    assert {x.outvars[0].aval.dtype.name for x in found} == {"float32"}


def test_no_more_logits_are_held_than_a_chunk_has() -> None:
    given = arguments("bfloat16", masked=True)
    text = str(jax.make_jaxpr(functools.partial(differentiated, fused, chunk=2))(given))
    assert f"f32[2,{VOCAB}]" in text
    for shape in (f"[{TOKENS},{VOCAB}]", f"[{TOKENS // 2},2,{VOCAB}]"):
        assert shape not in text


def test_gradients_in_bfloat16_are_as_good_as_their_operands() -> None:
    given = arguments("bfloat16", masked=False)
    found = differentiated(fused, given, 4)
    with jax.enable_x64(True):
        exact = {
            "hidden": jnp.asarray(np.asarray(given["hidden"], np.float64)),
            "head": jnp.asarray(np.asarray(given["head"].astype(jnp.bfloat16), np.float64)),
        }
        expected = differentiated(plain, given | exact, None)
    assert_close(
        {name: found[name] for name in ("minimized", "nll")}, {k: expected[k] for k in ("minimized", "nll")}, 1e-6
    )
    assert_close(
        {name: found[name] for name in ("dhidden", "dhead")}, {k: expected[k] for k in ("dhidden", "dhead")}, 5e-3
    )
    assert found["dhead"].dtype == jnp.float32
