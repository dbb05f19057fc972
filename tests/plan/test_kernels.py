"""The formulas of kernels: bytes against the arrays that they get, FLOPs against the products that they compile to."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import rwkv_kernels
from rwkv_jax.plan.costs import product_flops
from rwkv_jax.plan.kernels import (
    CHUNKS,
    KERNELS,
    SPLIT_KERNELS,
    STAGES,
    TILE_KERNELS,
    TPU_KERNELS,
    TPU_SPLIT_KERNELS,
    Sizes,
    family_of,
    kernel_cost,
    map_columns,
    operator_costs,
    sizes_of,
    stages_of,
    work_of,
)
from rwkv_jax.plan.program import parse_module
from rwkv_kernels import dispatch
from rwkv_kernels.matmul import Form, Matmul
from rwkv_kernels.ops.wkv7.output_pallas_triton import wkv7_output_pallas_triton
from rwkv_kernels.ops.wkv7.step import PER_HEAD, PER_TOKEN
from rwkv_kernels.ops.wkv7.step_pallas_triton import wkv7_step_pallas_triton
from rwkv_kernels.pallas import interpreted_tiles
from rwkv_kernels.pallas.tiles import Tiles, is_stored
from tests.golden import QUICK

BATCH, TIME, HEADS, KEY_DIM, VALUE_DIM = 1, 256, 2, 16, 32
OPERATORS = ["wkv4", "wkv5", "wkv6", "wkv7"]


def arguments(operator: str, key_dim: int = KEY_DIM, value_dim: int = VALUE_DIM) -> tuple[Any, ...]:
    """An implementation's arguments in order: bfloat16, with decays in float32, and the state."""
    sizes = {"B": BATCH, "T": TIME, "H": HEADS, "N": key_dim, "M": value_dim, "C": 64}
    axes = rwkv_kernels.OPERATORS[operator].axes

    def array(letters: str, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([sizes[letter] for letter in letters if letter != " "], dtype)

    inputs = (array(letters, jnp.float32 if name == "log_w" else jnp.bfloat16) for name, letters in axes.items())
    state = (array("BC", jnp.float32),) * 3 if operator == "wkv4" else array("BHMN", jnp.float32)
    return *inputs, state


def differentiated(operator: str, implementation: str) -> Any:
    run = rwkv_kernels.OPERATORS[operator].implementations[implementation].run
    return differentiated_run(functools.partial(run, interpret=True))


def differentiated_run(run: Any) -> Any:
    def gradients(*given: Any) -> Any:
        outputs, pull_back = jax.vjp(run, *given)
        return pull_back(outputs)

    return gradients


def kernels(jaxpr: Any) -> Iterator[Any]:
    """Calls of kernels in a program, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for part in equation.params.values():
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                yield from kernels(inner)


def name_of(call: Any) -> str:
    return call.params["name"]


STATE = (BATCH, HEADS, VALUE_DIM, KEY_DIM)


def bytes_of(call: Any, of_rows: Collection[tuple[int, ...]] = (STATE,)) -> int:
    """Of all arrays of a call but those that rows and heads have once."""
    arrays = [x.aval for x in (*call.invars, *call.outvars) if TIME in x.aval.shape or x.aval.ndim >= 3]
    arrays = [x for x in arrays if x.shape not in of_rows and x.shape[:2] != (HEADS, 1)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def item_bytes_of(operator: str) -> dict[str, int]:
    axes = rwkv_kernels.OPERATORS[operator].axes
    return {name: 4 if name == "log_w" else 2 for name, letters in axes.items() if "T" in letters}


@pytest.mark.parametrize("operator", OPERATORS)
def test_bytes_are_those_of_the_arrays_that_kernels_read_and_write(operator: str) -> None:
    found = list(kernels(jax.make_jaxpr(differentiated(operator, KERNELS))(*arguments(operator)).jaxpr))
    sizes = Sizes(*((1, 1) if operator == "wkv4" else (KEY_DIM, VALUE_DIM)), CHUNKS[KERNELS][operator])
    token_heads = BATCH * TIME * (64 if operator == "wkv4" else HEADS)
    forward, backward = STAGES[KERNELS][operator]
    assert [name_of(call) for call in found] == [f"{operator}_{stage}" for stage in (*forward, *backward)]
    for call in found:
        cost = kernel_cost(name_of(call), sizes, item_bytes_of(operator))
        assert cost.bytes == pytest.approx(bytes_of(call) / token_heads, rel=0.01), name_of(call)


@pytest.mark.parametrize(
    ("operator", "implementation"), [("wkv5", KERNELS), ("wkv6", KERNELS), ("wkv7", KERNELS), ("wkv7", TPU_KERNELS)]
)
@pytest.mark.parametrize("goes_back", [False, True])
def test_products_are_those_of_the_compiled_kernels(operator: str, implementation: str, goes_back: bool) -> None:
    given = arguments(operator)
    run = differentiated(operator, implementation)
    if not goes_back:
        run = functools.partial(rwkv_kernels.OPERATORS[operator].implementations[implementation].run, interpret=True)
    compiled = jax.jit(run).lower(*given).compile(compiler_options=QUICK)
    found = sum(product_flops(parse_module(compiled.as_text() or "")).values()) / (BATCH * TIME * HEADS)
    forward, backward = operator_costs(implementation, operator, KEY_DIM, VALUE_DIM, item_bytes_of(operator))
    once = 0.04 if operator == "wkv5" else 1e-6  # what it computes before its loop over chunks
    expected = [*forward, *(backward if goes_back else ())]
    assert found == pytest.approx(sum(cost.products + cost.sums for cost in expected), rel=once)


def _dot(dtype: Any, x: Any, y: Any, form: Form) -> Any:
    """A product whose operands' dtype says which of a `Matmul`'s two it is."""
    contracted = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[form]
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(x.astype(dtype), y.astype(dtype), dimensions, preferred_element_type=jnp.float32)


TOLD_APART = Matmul(functools.partial(_dot, jnp.bfloat16), functools.partial(_dot, jnp.float32), own_derivatives=True)


def flops_of(jaxpr: Any, dtype: Any) -> int:
    """FLOPs of products whose operands have a dtype, in all turns of loops."""
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[0].aval.dtype == dtype:
            ((left,), _), _ = equation.params["dimension_numbers"]
            flops += 2 * equation.outvars[0].aval.size * equation.invars[0].aval.shape[left]
        turns = equation.params.get("length", 1)
        assert equation.primitive.name != "while", "its turns are not known"
        for part in equation.params.values():
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                flops += turns * flops_of(inner, dtype)
    return flops


@pytest.mark.parametrize(
    ("with_gradients", "key_dim", "value_dim"),
    [(False, KEY_DIM, VALUE_DIM), (True, KEY_DIM, VALUE_DIM), (True, 256, 128), (True, 16, 128), (True, 96, 48)],
)
@pytest.mark.parametrize(
    ("implementation", "operator"),
    [*((SPLIT_KERNELS, operator) for operator in CHUNKS[SPLIT_KERNELS]), (TPU_SPLIT_KERNELS, "wkv7")],
)
def test_split_kernels_multiply_and_move_what_is_declared(
    implementation: str, operator: str, with_gradients: bool, key_dim: int, value_dim: int
) -> None:
    run: Any = rwkv_kernels.OPERATORS[operator].implementations[implementation].run
    run = functools.partial(run, interpret=True, matmul=TOLD_APART)
    program = differentiated_run(run) if with_gradients else run
    found = list(kernels(jax.make_jaxpr(program)(*arguments(operator, key_dim, value_dim)).jaxpr))
    sizes, family = sizes_of(implementation, operator, key_dim, value_dim), family_of(implementation, operator)
    if implementation == SPLIT_KERNELS:  # heads are powers of two
        assert sizes[:2] == tuple(1 << (size - 1).bit_length() for size in (key_dim, value_dim))
    forward, backward = stages_of(implementation, operator, sizes.key_dim, sizes.value_dim)
    names = [name_of(call) for call in found]
    if with_gradients:
        assert names == [f"{family}_{stage}" for stage in (*forward, *backward)]
    for name, call in zip(names, found, strict=True):
        cost = kernel_cost(name, sizes, item_bytes_of(operator))
        programs = math.prod(call.params["grid_mapping"].grid)
        flops, sums = (programs * flops_of(call.params["jaxpr"], dtype) for dtype in (jnp.bfloat16, jnp.float32))
        token_heads = BATCH * TIME * HEADS
        assert (cost.products, cost.sums) == (flops / token_heads, sums / token_heads), name
        state = (BATCH, HEADS, sizes.value_dim, sizes.key_dim)
        assert cost.bytes == bytes_of(call, (state,)) / token_heads, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_kernels_of_tiles_multiply_and_move_what_is_declared(
    monkeypatch: pytest.MonkeyPatch, with_gradients: bool, dtype: Any
) -> None:
    """Their programs as interpreted: products of tiles and passes of exact ones, and planes of bfloat16."""
    found: list[tuple[float, float, float]] = []
    counted = [0, 0]
    call, product = interpreted_tiles.call, Tiles.product

    def counting(tiles: Any, *terms: Any, exact: bool = False) -> Any:
        counted[exact] += len(terms)
        return product(tiles, *terms, exact=exact)

    def spying(body: Any, parts: int, by_chunk: bool, sizes: Any, inputs: Any, outputs: Any) -> Any:
        counted[:] = 0, 0
        results = call(body, parts, by_chunk, sizes, inputs, outputs)
        chunks = 1 if by_chunk else sizes[2]
        arrays = [
            x.array for x in jax.tree.leaves((inputs, outputs), is_leaf=is_stored) if x.kind in ("time", "chunks")
        ]
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
        found.append((counted[False] / chunks, counted[True] / chunks, moved / (BATCH * TIME * HEADS)))
        return results

    monkeypatch.setattr(Tiles, "product", counting)
    monkeypatch.setattr(interpreted_tiles, "call", spying)
    *inputs, state = arguments("wkv7", 48, 32)
    inputs = [x if x.dtype == jnp.float32 else jax.ShapeDtypeStruct(x.shape, dtype) for x in inputs]
    run = functools.partial(rwkv_kernels.OPERATORS["wkv7"].implementations[TILE_KERNELS].run, interpret=True)
    jax.eval_shape(differentiated_run(run) if with_gradients else run, *inputs, state)

    sizes = sizes_of(TILE_KERNELS, "wkv7", 48, 32)
    assert sizes == Sizes(64, 64, 64)
    forward, backward = stages_of(TILE_KERNELS, "wkv7", 64, 64)
    names = (*forward, *backward) if with_gradients else ("factors", *forward[1:])
    of_a_product = 2 * 64**3 / 64
    items = {name: 4 if name == "log_w" else dtype.dtype.itemsize for name in item_bytes_of("wkv7")}
    expected = [kernel_cost(f"wkv7_tiles_{name}", sizes, items) for name in names]
    assert found == [(cost.products / of_a_product, cost.sums / of_a_product, cost.bytes) for cost in expected]


@pytest.mark.parametrize("operator", ["wkv6", "wkv7"])
def test_where_time_is_split_kernels_run_twice_in_float32(operator: str) -> None:
    kernel = rwkv_kernels.OPERATORS[operator].implementations[KERNELS].run
    interpreted = dispatch.Implementation(functools.partial(kernel, interpret=True), dispatch.anything)
    run = functools.partial(getattr(rwkv_kernels, operator), axis_name="time", implementation=interpreted)
    size = 16  # of keys and values: the sum of both needs no padding
    *inputs, _ = arguments(operator, size, size)
    specs = tuple(P(None, "time") if x.ndim == 4 else P() for x in inputs)
    mesh = AbstractMesh((2,), ("time",))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P(None, "time"), P()))
    found = list(kernels(jax.make_jaxpr(differentiated_run(sharded))(*inputs).jaxpr))
    in_float32, value_dims = dict.fromkeys(item_bytes_of(operator), 4), (map_columns(operator, size, size), size)
    expected = []
    for value_dim in value_dims:
        forward, backward = operator_costs(KERNELS, operator, size, value_dim, in_float32)
        expected += [cost.bytes for cost in (*forward, *backward)]
    of_rows = {(BATCH, HEADS, value_dim, size) for value_dim in value_dims}
    moved = [bytes_of(call, of_rows) / (BATCH * TIME // 2 * HEADS) for call in found]
    assert sorted(moved) == pytest.approx(sorted(expected), rel=0.01)


def test_kernels_around_the_operator_multiply_nothing_and_move_what_is_declared() -> None:
    size, tokens = 32, BATCH * TIME
    over_time = [jax.ShapeDtypeStruct((BATCH, TIME, HEADS, size), jnp.bfloat16)] * 5
    per_head = [jax.ShapeDtypeStruct((HEADS, size), jnp.float32)] * 3
    output = functools.partial(wkv7_output_pallas_triton, epsilon=1e-5, interpret=True)
    step = functools.partial(wkv7_step_pallas_triton, epsilon=1e-5, decay_scale=-0.5, interpret=True)
    of_token = dict.fromkeys((*PER_TOKEN, "v_first", "nu"), jax.ShapeDtypeStruct((tokens, HEADS, size), jnp.bfloat16))
    of_head = dict.fromkeys((*PER_HEAD, "v0"), per_head[0])
    state = jax.ShapeDtypeStruct((tokens, HEADS, size, size), jnp.float32)
    programs = (
        jax.make_jaxpr(differentiated_run(output))(*over_time, *per_head),
        jax.make_jaxpr(step)(of_token | of_head, state),
    )
    found = [call for program in programs for call in kernels(program.jaxpr)]
    assert [name_of(call) for call in found] == ["wkv7_output_forward", "wkv7_output_backward", "wkv7_step"]
    for call in found:
        cost = kernel_cost(name_of(call), Sizes(size, size, 16), dict.fromkeys(item_bytes_of("wkv7"), 2))
        assert (cost.products, cost.sums) == (0, 0)
        assert not any(flops_of(call.params["jaxpr"], dtype) for dtype in (jnp.bfloat16, jnp.float32))
        arrays = [x.aval for x in (*call.invars, *call.outvars) if tokens in x.aval.shape]
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
        assert cost.bytes == moved / (tokens * HEADS), name_of(call)


def test_work_is_known_by_a_kernels_whole_name() -> None:
    assert work_of("wkv7_split_factors", 32) is not None
    assert work_of("wkv7_factors", 32) is work_of("wkv7_split", 32) is work_of("wkv7_split_factor", 32) is None
    assert work_of("wkv7_tiles_factors", 64) is not None
    assert work_of("wkv7_tiles_forward", 64) is work_of("wkv5_split_forward", 64) is None
    with pytest.raises(KeyError, match="wkv7_of_tomorrow"):
        kernel_cost("wkv7_of_tomorrow", Sizes(64, 64, 16), item_bytes_of("wkv7"))
