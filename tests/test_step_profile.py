"""benchmarks/step_profile.py gives each operation of a compiled program to its part, and counts no time twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from step_profile import names_of_operations, part_of, seconds_by_part


def test_operations_are_named_by_the_scopes_of_the_source() -> None:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        with jax.named_scope("time_mix"):
            return jnp.tanh(x @ w) + 1

    program = jax.jit(step).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile()
    text = program.as_text()
    assert text is not None
    names = set(names_of_operations(text).values())
    assert any(name.endswith("time_mix/dot_general") for name in names)
    assert {part_of(name) for name in names if "time_mix" in name} == {"time mixing"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(step)/jvp(time_mix)/wkv_operator/while/body/dot_general", "wkv operator"),
        ("jit(step)/transpose(jvp())/while/body/jit(dynamic_index_in_dim)/dynamic_slice", "layers' stacks"),
        ("jit(step)/transpose(jvp())/channel_mix/dot_general", "channel mixing"),
        ("jit(step)/sqrt", "optimizer and the rest"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_a_loop_is_not_counted_beside_what_it_runs() -> None:
    def event(operation: str, microseconds: float) -> dict[str, object]:
        return {"ph": "X", "dur": microseconds, "args": {"hlo_op": operation}}

    trace = {"traceEvents": [event("while.3", 9e6), event("dot.1", 1e6), event("add.2", 5e5), {"ph": "M"}]}
    names = {"dot.1": "jit(step)/time_mix/dot_general", "add.2": "jit(step)/add"}
    assert seconds_by_part(trace, names) == {
        ("time mixing", "products"): 1.0,
        ("optimizer and the rest", "the rest"): 0.5,
    }
