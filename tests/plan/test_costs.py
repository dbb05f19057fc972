"""What compiled programs compute and send, by hand and as counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax.plan.costs import (
    Collective,
    CollectiveKind,
    find_collectives,
    memory_traffic,
    product_flops,
)
from rwkv_jax.plan.program import parse_module
from tests.plan.hlo_texts import text_of

PAIRS = ((0, 1), (2, 3))
FOURS = ((0, 2, 4, 6), (1, 3, 5, 7))


def test_a_collective_in_loops_counts_as_often_as_they_run() -> None:
    (found,) = find_collectives(parse_module(text_of("cpu")), 4)
    assert found == Collective("all-reduce", PAIRS, bytes=8 * 4 * 4, executions=15)


def test_a_start_and_its_end_are_one_and_one_device_is_none() -> None:
    gather, permute = find_collectives(parse_module(text_of("gpu")), 8)
    assert gather == Collective("all-gather", FOURS, bytes=(16 + 8) * 16 * 2, executions=1)
    assert permute == Collective("collective-permute", ((0, 2), (2, 4), (4, 6)), bytes=32, executions=1)


def test_a_collective_beside_products_counts_where_it_starts() -> None:
    (found,) = find_collectives(parse_module(text_of("tpu")), 4)
    assert found == Collective("all-gather", ((0, 1, 2, 3),), bytes=8 * 8 * 2, executions=6)


@pytest.mark.parametrize("opcode", ["ragged-all-to-all", "ragged-all-to-all-start", "collective-broadcast", "send"])
def test_a_collective_that_is_not_known_is_refused(opcode: str) -> None:
    text = text_of("cpu").replace("all-reduce(%x)", f"{opcode}(%x)")
    with pytest.raises(ValueError, match=f"reduced: what a {opcode} sends is not known"):
        find_collectives(parse_module(text), 4)


def test_what_goes_to_the_host_is_no_collective() -> None:
    text = text_of("cpu").replace("all-reduce(%x), ", "send(%x), is_host_transfer=true, ")
    assert find_collectives(parse_module(text), 4) == ()


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 750),
        ("reduce-scatter", 750),
        ("all-reduce", 1500),
        ("all-to-all", 750),
        ("collective-permute", 1000),
    ],
)
def test_ring_formulas(kind: CollectiveKind, sent: int) -> None:
    assert Collective(kind, FOURS, bytes=100, executions=10).sent_bytes == sent


def test_products_in_the_words_of_each_compiler() -> None:
    assert product_flops(parse_module(text_of("cpu"))) == {"float32 default": 2 * 8 * 4 * 2}
    assert product_flops(parse_module(text_of("gpu"))) == {"bfloat16": 2 * 16**3, "float32 highest": 2 * 16**3}
    text = text_of("gpu").replace('["HIGHEST","HIGHEST"]', '["DEFAULT","DEFAULT"]')
    assert product_flops(parse_module(text)) == {"bfloat16": 2 * 16**3, "float32 default": 2 * 16**3}
    # Three products [4, 8] x [8, 6], six times; the window of size 3 meets each of the three once.
    assert product_flops(parse_module(text_of("tpu"))) == {"bfloat16": 6 * 3 * 2 * 4 * 8 * 6}


def test_precision_decides_which_peak_applies() -> None:
    contracted = "rhs_contracting_dims={0}"
    text = text_of("cpu").replace(contracted, f"{contracted}, operand_precision={{highest,highest}}")
    assert set(product_flops(parse_module(text))) == {"float32 highest"}


def test_a_convolution_with_padding_counts_what_it_reads() -> None:
    text = """\
ENTRY %main (x: f32[5,2,3], k: f32[3,3,4]) -> f32[5,2,4] {
  %x = f32[5,2,3] parameter(0)
  %k = f32[3,3,4] parameter(1)
  ROOT %y = f32[5,2,4] convolution(%x, %k), window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf
}
"""
    assert product_flops(parse_module(text)) == {"float32 default": 2 * 2 * 3 * 4 * (5 * 3 - 2)}
    with pytest.raises(ValueError, match="no dim_labels"):
        product_flops(parse_module(text.replace("dim_labels", "labels")))


def test_products_of_a_real_program_with_recomputation() -> None:
    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(jnp.tanh(x @ weight) @ weight), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((6, 32, 32)), jnp.zeros((16, 32))).compile()
    # A layer: two products forward, the first again (the second is needed by nobody), two for each going back.
    expected = 6 * (2 + 2 + 4) * 2 * 16 * 32 * 32
    assert sum(product_flops(parse_module(compiled.as_text() or "")).values()) == expected
    # What XLA says itself has a loop's body once.
    analysis = compiled.cost_analysis()
    assert analysis is not None
    assert analysis["flops"] < expected / 3


def test_traffic_of_a_real_program() -> None:
    def scale(x: jax.Array) -> jax.Array:
        return 2 * jnp.sin(x) + 1

    compiled = jax.jit(scale).lower(jnp.zeros((100, 100))).compile()
    assert memory_traffic(parse_module(compiled.as_text() or "")) == 2 * 40000


def test_traffic_of_a_loop_over_slices() -> None:
    def total(xs: jax.Array) -> jax.Array:
        def add(sum_: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return sum_ + x, jnp.cos(sum_)

        return jax.lax.scan(add, jnp.zeros((1000,)), xs)[1]

    traffic = memory_traffic(parse_module(jax.jit(total).lower(jnp.zeros((50, 1000))).compile().as_text() or ""))
    # Each of 50 runs: reads a slice and the sum, writes the sum, and its cosine into a slice; some are copied besides.
    least = 50 * 4 * 4000
    assert least <= traffic < 3 * least
    assert traffic < 50 * 50 * 4000 / 5  # not the whole array each time


def test_traffic_leaves_out_memory_on_the_chip() -> None:
    text = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0:T(128)S(1)} negate(%x)
  ROOT %z = f32[8]{0} negate(%y)
}
"""
    assert memory_traffic(parse_module(text)) == 2 * 32


def test_traffic_of_fusions_that_read_and_write_slices() -> None:
    text = """\
%fused (big: f32[100,8], i: s32[], out: bf16[8,100], small: f32[8]) -> (bf16[100,8], f32[8]) {
  %big = f32[100,8] parameter(0)
  %i = s32[] parameter(1)
  %out = bf16[8,100] parameter(2)
  %small = f32[8] parameter(3)
  %seen = f32[1,100,8] bitcast(%big)
  %zero = s32[] constant(0)
  %row = f32[1,1,8] dynamic-slice(%seen, %zero, %i, %zero), dynamic_slice_sizes={1,1,8}
  %flat = f32[8] bitcast(%row)
  %sum = f32[8] add(%flat, %small)
  %new = bf16[8,1] convert(%sum)
  %updated = bf16[8,100] dynamic-update-slice(%out, %new, %zero, %i)
  %turned = bf16[100,8] bitcast(%updated)
  ROOT %both = (bf16[100,8], f32[8]) tuple(%turned, %sum)
}

ENTRY %main (big: f32[100,8], i: s32[], out: bf16[8,100], small: f32[8]) -> (bf16[100,8], f32[8]) {
  %big = f32[100,8] parameter(0)
  %i = s32[] parameter(1)
  %out = bf16[8,100] parameter(2)
  %small = f32[8] parameter(3)
  ROOT %all = (bf16[100,8], f32[8]) fusion(%big, %i, %out, %small), kind=kLoop, calls=%fused
}
"""
    row, index, small, new_row, sum_ = 8 * 4, 4, 8 * 4, 8 * 2, 8 * 4
    assert memory_traffic(parse_module(text)) == row + index + small + new_row + sum_
