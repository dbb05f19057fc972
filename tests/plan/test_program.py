"""Reading compiled programs: types, calls and trip counts, in the words of three compilers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax.plan.program import Array, parse_arrays, parse_module
from tests.plan.hlo_texts import text_of


def test_types_with_layouts_tuples_and_memory_spaces() -> None:
    text = "(f32[2,3]{1,0:T(8,128)}, (bf16[4]{0:T(1024)(128)(2,1)S(1)}, /*index=2*/pred[]), s32[<=5,2]{1,0})"
    expected = (Array("f32", (2, 3)), Array("bf16", (4,), 1), Array("pred", ()), Array("s32", (5, 2)))
    assert parse_arrays(text) == expected


@pytest.mark.parametrize(
    ("dtype", "size"), [("f32", 24), ("bf16", 12), ("pred", 6), ("s4", 3), ("f8e4m3fn", 6), ("c64", 48), ("u64", 48)]
)
def test_bytes_of_a_dtype(dtype: str, size: int) -> None:
    assert Array(dtype, (2, 3)).bytes == size


def test_instructions() -> None:
    module = parse_module(text_of("cpu"))
    main = module.computations[module.entry]
    loop = main.instructions["loop"]
    assert loop.opcode == "while"
    assert loop.results == (Array("s32", ()), Array("f32", (8, 4)))
    assert loop.operands == ("start",)
    assert loop.called("body") == ("outer",)
    assert main.root == "product"
    dot = module.computations["fused"].instructions["dot.1"]
    assert dot.attribute("lhs_contracting_dims") == "1"
    assert dot.attribute("lhs_batch_dims") is None
    assert module.computations["fused"].operand_arrays(dot) == (Array("f32", (8, 4)), Array("f32", (4, 2)))


def test_loops_within_loops_multiply() -> None:
    module = parse_module(text_of("cpu"))
    assert dict(module.executions) == {"main": 1, "fused": 1, "outer": 5, "condition": 20, "inner": 15}
    assert module.unknown_loops == ()


def test_fusions_are_known() -> None:
    assert parse_module(text_of("cpu")).fused == {"fused"}
    assert parse_module(text_of("tpu")).fused == {"start", "beside", "compared", "advanced"}


def test_trip_count_from_the_condition_the_step_and_the_first_value() -> None:
    text = text_of("tpu")
    assert parse_module(text).executions["body"] == 7 - 1
    step = "%step = s32[]{:T(128)} constant(1)"
    assert step in text
    by_fours = parse_module(text.replace(step, step.replace("(1)", "(4)")))
    assert by_fours.executions["body"] == 2  # at 1 and at 5
    assert by_fours.unknown_loops == by_fours.chosen_loops == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("constant(7)", "parameter(1)"),
        ("copy(%one)", "negate(%one)"),
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} parameter(3)"),
        ("%step = s32[]{:T(128)} constant(1)", "%step = s32[]{:T(128)} constant(0)"),
        ("%step = s32[]{:T(128)} constant(1)", "%step = s32[]{:T(128)} constant(-1)"),
        ("add(%k, %step)", "multiply(%k, %step)"),
        ("add(%k, %step)", "add(%k, %k)"),
        ("tuple(%shard, %next, %left, %right)", "tuple(%shard, %i, %left, %right)"),
        (
            "ROOT %again",
            "%made = (s32[]) custom-call(%c)\n  ROOT %unused = s32[] get-tuple-element(%made), index=0\n  %again",
        ),
    ],
)
def test_a_loop_that_cannot_be_counted_is_named_and_counted_once(old: str, new: str) -> None:
    text = text_of("tpu")
    assert old in text
    module = parse_module(text.replace(old, new))
    assert module.unknown_loops == ("loop",)
    assert module.executions["body"] == 1


def test_a_loop_whose_turns_the_data_choose_has_the_larger_number_and_the_other_the_rest() -> None:
    module = parse_module(text_of("chosen"))
    assert (module.executions["faster"], module.executions["slower"]) == (4, 0)
    assert (module.chosen_loops, module.unknown_loops) == (("first", "second"), ())
    # A compiler may as well ask the opposite question.
    inverted = text_of("chosen").replace("direction=GE", "direction=LT").replace("%all, %none", "%none, %all")
    assert parse_module(inverted).executions == module.executions


@pytest.mark.parametrize(
    ("old", "new", "unknown"),
    [
        ("%none = s32[] constant(0)", "%none = s32[] custom-call(%w)", ("first", "second")),
        ("tuple(%next, %state, %end.1)", "tuple(%next, %state, %next)", ("first",)),  # a limit that moves
    ],
)
def test_what_the_data_choose_between_must_be_numbers(old: str, new: str, unknown: tuple[str, ...]) -> None:
    text = text_of("chosen")
    assert old in text
    assert parse_module(text.replace(old, new)).unknown_loops == unknown


@pytest.mark.parametrize(
    ("opcode", "callee", "times"),
    [
        ("async-start", "calls=%f", 1),
        ("fusion-start", "kind=kLoop, calls=%f", 1),
        ("call-start", "to_apply=%f", 1),
        ("all-reduce-start", "to_apply=%f", 0),  # the sum, which is no program of its own
    ],
)
def test_what_starts_asynchronously_runs(opcode: str, callee: str, times: int) -> None:
    text = f"""\
%f (x: f32[]) -> f32[] {{
  ROOT %x = f32[] parameter(0)
}}

ENTRY %main (a: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %begun = ((f32[]), f32[]) {opcode}(%a), {callee}
  ROOT %ended = f32[] {opcode.removesuffix("start")}done(%begun)
}}
"""
    module = parse_module(text)
    assert module.executions.get("f", 0) == times
    assert ("f" in module.fused) == (opcode == "fusion-start")


def test_async_starts_calls_and_all_branches_run() -> None:
    text = """\
%f (x: f32[]) -> f32[] {
  ROOT %x = f32[] parameter(0)
}

ENTRY %main (a: f32[], p: pred[]) -> f32[] {
  %a = f32[] parameter(0)
  %p = pred[] parameter(1)
  %begun = ((f32[]), f32[]) async-start(%a), calls=%f
  %ended = f32[] async-done(%begun)
  %called = f32[] call(%ended), to_apply=%f
  %sum = f32[] reduce(%called, %a), dimensions={}, to_apply=%f
  ROOT %either = f32[] conditional(%p, %called, %sum), branch_computations={%f, %f}
}
"""
    assert dict(parse_module(text).executions) == {"main": 1, "f": 4}


@pytest.mark.parametrize(
    "text", ["", "nothing of the kind", "%f (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        parse_module(text)


def test_a_line_that_makes_no_sense_is_named() -> None:
    with pytest.raises(ValueError, match=r"instruction product: no opcode"):
        parse_module(text_of("cpu").replace("fusion(%y, %w)", "?"))
    with pytest.raises(ValueError, match="never closes"):
        parse_module(text_of("cpu").replace("fusion(%y, %w),", "fusion(%y, %w,"))


def test_a_real_program() -> None:
    def step(x: jax.Array) -> jax.Array:
        def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(x), None

        def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.scan(inner, x, length=7)[0], None

        return jax.lax.scan(outer, x, length=11)[0]

    module = parse_module(jax.jit(step).lower(jnp.zeros((64, 64))).compile().as_text() or "")
    sines = sum(times for _, instruction, times in module.running() if instruction.opcode == "sine")
    assert sines == 77
    assert module.unknown_loops == ()


def test_every_text_is_read_to_its_end() -> None:
    for text in map(text_of, ("cpu", "gpu", "tpu", "chosen")):
        module = parse_module(text)
        assert sum(len(x.instructions) for x in module.computations.values()) == text.count(" = ")
