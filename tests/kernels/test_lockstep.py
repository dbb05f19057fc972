"""Several calls of a function, operation by operation, give what each gives by itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rwkv_kernels.matmul import interpreted_matmul
from rwkv_kernels.pallas.lockstep import in_lockstep

MATMUL = interpreted_matmul("full")
"""Its products have derivatives of their own."""
WEIGHTS = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


def with_loops_branches_and_rules(x: Array, others: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
    x = jax.nn.relu(MATMUL.nn(x, jnp.asarray(WEIGHTS)))  # a custom jvp
    x = lax.fori_loop(0, 3, lambda index, x: x * 0.5 + index, x)
    largest, smallest = jnp.max(x), others["y"]
    x = lax.cond(others["flag"], lambda x: MATMUL.tn(x, x), lambda x: x + 1.0, x)
    return x, {"sum": MATMUL.nt(x, smallest) + largest, "same": smallest}


def test_each_call_gives_what_it_gives_by_itself() -> None:
    rng = np.random.default_rng(1)
    calls = [
        (
            jnp.asarray(rng.standard_normal((4, 4)), jnp.float32),
            {"y": jnp.asarray(rng.standard_normal((4, 4)), jnp.float32), "flag": jnp.asarray(flag), "none": None},
        )
        for flag in (True, False)
    ]
    jax.tree.map(
        np.testing.assert_array_equal,
        in_lockstep(with_loops_branches_and_rules, calls),
        [with_loops_branches_and_rules(*call) for call in calls],
    )


def test_an_operation_of_one_call_is_next_to_that_of_the_other() -> None:
    def chain(x: Array) -> Array:
        return MATMUL.nn(jnp.exp(MATMUL.nn(x, x)), jnp.tanh(x))

    x = jnp.ones((4, 4))
    names = [
        equation.primitive.name
        for equation in jax.make_jaxpr(lambda x, y: in_lockstep(chain, [(x,), (y,)]))(x, x).jaxpr.eqns
    ]
    assert names == [name for name in ("dot_general", "exp", "tanh", "dot_general") for _ in range(2)]


def test_a_derivative_written_by_hand_may_have_products_with_rules() -> None:
    def chain(x: Array) -> Array:
        return MATMUL.nn(x, MATMUL.tn(x, x))

    def backward(x: Array, dy: Array) -> tuple[Array, Array]:
        y, pull_back = jax.vjp(chain, x)
        return y, MATMUL.nn(pull_back(dy)[0], x)

    calls = [(jnp.full((4, 4), size), jnp.eye(4)) for size in (0.5, 2.0)]
    text = str(jax.make_jaxpr(lambda *calls: in_lockstep(backward, calls))(*calls))
    assert "custom" not in text
    jax.tree.map(np.testing.assert_array_equal, in_lockstep(backward, calls), [backward(*call) for call in calls])
