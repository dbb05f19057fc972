"""Predicted steps: what an instruction takes, what is the operator's, and kernels in its stead."""

from __future__ import annotations

import dataclasses

import pytest
from jax.sharding import AbstractMesh

from rwkv_jax.config import ConfigError, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.config.model import IMPLEMENTATIONS
from rwkv_jax.parallel.mesh import AXES
from rwkv_jax.plan.devices import DEVICES, LAUNCH, Device, parse_topology
from rwkv_jax.plan.kernels import (
    KERNELS,
    SPLIT_KERNELS,
    Sizes,
    bfloat16_flops,
    kernel_cost,
    operator_costs,
    uncounted_kernels,
)
from rwkv_jax.plan.planner import Plan
from rwkv_jax.plan.program import parse_module
from rwkv_jax.plan.report import describe
from rwkv_jax.plan.run import as_planned_for, count_operator_calls, refuse_unable_there
from rwkv_jax.plan.step_time import OperatorCalls, predict
from rwkv_kernels.dispatch import Problem
from tests.plan.test_report import PLAN, PROGRAM

# A loop of 4 of the operator's, whose body has a product without a name, and two instructions outside it.
TEXT = """\
%body (c: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %c = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%c), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[8,8]{1,0}) tuple(%i, %y)
}

%condition (c.1: (s32[], f32[8,8])) -> pred[] {
  %c.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %less = pred[] custom-call(%c.1), custom_call_target="unknowable"
}

ENTRY %main (start: (s32[], f32[8,8])) -> f32[8,8] {
  %start = (s32[], f32[8,8]{1,0}) parameter(0)
  %loop = (s32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(step)/wkv_operator/while"}, backend_config={"known_trip_count":{"n":"4"}}
  %z = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %w = f32[8,8]{1,0} negate(%z)
  ROOT %v = f32[8,8]{1,0} all-reduce(%w), replica_groups={{0,1}}
}
"""  # noqa: E501
CALLS = OperatorCalls(
    "wkv7", "chunked", forwards=3, backwards=2, token_heads=1024.0, key_dim=8, value_dim=8, item_bytes=dict.fromkeys(
        ("r", "log_w", "k", "v", "a", "b"), 2
    )
)  # fmt: skip


def device(**changes: float) -> Device:
    """One whose bytes and FLOPs take a second each, for the numbers of the test to be seen."""
    simple = {"memory_bandwidth": 1.0, "float32_default": 1.0, "bfloat16": 1.0, "launch": 0.0} | changes
    return dataclasses.replace(DEVICES["h100"], **simple)


BYTES_OF_NEGATE, BYTES_OF_SUM, BYTES_OF_DOT, FLOPS = 2 * 256, 2 * 256, 3 * 256, 2 * 8**3


def test_an_instruction_takes_the_longest_of_its_three_times() -> None:
    module = parse_module(TEXT)
    (slow_products,) = predict(module, device(memory_bandwidth=1e3), 7.0, None)
    assert slow_products.seconds == pytest.approx(4 * FLOPS + BYTES_OF_NEGATE / 1e3 + 7)
    assert (slow_products.products, slow_products.launches) == (4 * FLOPS, 6)
    assert slow_products.traffic == pytest.approx((4 * BYTES_OF_DOT + BYTES_OF_NEGATE + BYTES_OF_SUM) / 1e3)
    (slow_memory,) = predict(module, device(float32_default=1e9), 0.0, None)
    assert slow_memory.seconds == pytest.approx(4 * BYTES_OF_DOT + BYTES_OF_NEGATE)
    (slow_launches,) = predict(module, device(launch=1e5), 0.0, None)
    assert slow_launches.seconds == 6e5


@pytest.mark.parametrize("implementation", [KERNELS, SPLIT_KERNELS])
def test_kernels_take_the_place_of_the_operators_instructions(implementation: str) -> None:
    found = device(float32_default=1e9, launch=1.0)
    compiled, *others = predict(parse_module(TEXT), found, 5.0, CALLS)
    assert (compiled.implementation, compiled.is_compiled) == ("chunked", True)
    (with_kernels,) = (x for x in others if x.implementation == implementation)
    assert not with_kernels.is_compiled
    forward, backward = operator_costs(implementation, "wkv7", 8, 8, CALLS.item_bytes)
    all_calls = [*forward * CALLS.forwards, *backward * CALLS.backwards]
    assert with_kernels.launches == 2 + len(all_calls)
    traffic = [CALLS.token_heads * one.bytes for one in all_calls]
    assert with_kernels.traffic == pytest.approx(sum(traffic) + BYTES_OF_NEGATE + BYTES_OF_SUM)
    products = [CALLS.token_heads * one.bfloat16_flops("full") for one in all_calls]
    assert with_kernels.products == pytest.approx(sum(products))
    assert with_kernels.seconds == pytest.approx(sum(map(max, traffic, products)) + BYTES_OF_NEGATE + 1 + 5)


def test_kernels_are_for_gpus_and_for_what_is_not_compiled_with_them() -> None:
    module = parse_module(TEXT)
    assert len(predict(module, DEVICES["v5p"], 0.0, CALLS)) == 1
    with_kernels = predict(module, DEVICES["h100"], 0.0, dataclasses.replace(CALLS, implementation=KERNELS))
    assert [x.implementation for x in with_kernels] == [KERNELS, SPLIT_KERNELS]


def test_where_time_is_split_the_map_of_a_shard_is_a_second_pass() -> None:
    module, found = parse_module(TEXT), device()
    once, twice = (
        predict(module, found, 0.0, dataclasses.replace(CALLS, map_value_dim=size))[1] for size in (0, CALLS.value_dim)
    )
    assert twice.launches == once.launches + CALLS.forwards + CALLS.backwards
    outside = BYTES_OF_NEGATE + BYTES_OF_SUM
    assert twice.traffic - outside == pytest.approx(2 * (once.traffic - outside))


OF_A_KERNEL = """\
ENTRY %main (r: bf16[2,32,3,8], s: f32[2,3,8,8]) -> f32[2,32,3,8] {
  %r = bf16[2,32,3,8]{3,2,1,0} parameter(0)
  %s = f32[2,3,8,8]{3,2,1,0} parameter(1)
  ROOT %y = f32[2,32,3,8]{3,2,1,0} custom-call(%r, %s), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/wkv7_forward/pallas_call"}
}
"""  # noqa: E501


def test_a_kernels_products_are_known_by_its_name() -> None:
    module = parse_module(OF_A_KERNEL)
    main = module.computations["main"]
    cost = kernel_cost("wkv7_forward", Sizes(8, 8, 16), CALLS.item_bytes)
    assert bfloat16_flops(main, main.instructions["y"]) == round(2 * 32 * 3 * cost.bfloat16_flops("full"))
    assert bfloat16_flops(main, main.instructions["r"]) == 0
    (found,) = predict(module, device(memory_bandwidth=1e9), 0.0, None)
    assert found.products == pytest.approx(2 * 32 * 3 * cost.bfloat16_flops("full"))


OF_THE_SPLIT_KERNELS = """\
ENTRY %main (r: bf16[2,64,3,8], s: f32[2,3,2,16,8]) -> f32[2,3,2,16,8] {
  %r = bf16[2,64,3,8]{3,2,1,0} parameter(0)
  %s = f32[2,3,2,16,8]{4,3,2,1,0} parameter(1)
  %f = (f32[2,3,2,8,8]{4,3,2,1,0}, f32[2,3,2,16,8]{4,3,2,1,0}, f32[2,64,3,8]{3,2,1,0}) custom-call(%r), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/wkv7_split_factors/pallas_call"}
  %c = (f32[2,3,2,16,8]{4,3,2,1,0}, f32[2,3,16,8]{3,2,1,0}) custom-call(%r), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/wkv7_split_cotangents/pallas_call"}
  ROOT %y = f32[2,64,3,16]{3,2,1,0} custom-call(%r, %s), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/wkv7_split_outputs/pallas_call"}
}
"""  # noqa: E501


@pytest.mark.parametrize(("name", "stage"), [("f", "factors"), ("c", "cotangents"), ("y", "outputs")])
def test_a_split_kernels_sizes_are_those_of_its_states(name: str, stage: str) -> None:
    main = parse_module(OF_THE_SPLIT_KERNELS).computations["main"]
    cost = kernel_cost(f"wkv7_split_{stage}", Sizes(8, 16, 32), CALLS.item_bytes)
    assert bfloat16_flops(main, main.instructions[name]) == round(2 * 64 * 3 * cost.bfloat16_flops("full"))


OF_A_TPU = """\
ENTRY %main (r: bf16[2,3,128,8], s: f32[2,3,16,8]) -> bf16[2,3,128,16] {
  %r = bf16[2,3,128,8]{3,2,1,0} parameter(0)
  %s = f32[2,3,16,8]{3,2,1,0} parameter(1)
  ROOT %y = bf16[2,3,128,16]{3,2,1,0} custom-call(%r, %s), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/wkv7_split_forward_saving_states"}
}
"""  # noqa: E501
OF_TILES = """\
ENTRY %main (r: bf16[1,2,128,3,64], s: bf16[3,2,3,2,64,64]) -> bf16[1,2,128,3,64] {
  %r = bf16[1,2,128,3,64]{4,3,2,1,0} parameter(0)
  %s = bf16[3,2,3,2,64,64]{5,4,3,2,1,0} parameter(1)
  ROOT %y = bf16[1,2,128,3,64]{4,3,2,1,0} custom-call(%r, %s), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/wkv7_tiles_outputs/mpmd_map"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("text", "name", "sizes"),
    [
        (OF_A_TPU, "wkv7_split_forward_saving_states", Sizes(8, 16, 64)),
        (OF_TILES, "wkv7_tiles_outputs", Sizes(64, 64, 64)),
    ],
    ids=["split on a TPU", "tiles"],
)
def test_sizes_of_other_implementations(text: str, name: str, sizes: Sizes) -> None:
    main = parse_module(text).computations["main"]
    cost = kernel_cost(name, sizes, CALLS.item_bytes)
    assert bfloat16_flops(main, main.instructions["y"]) == round(2 * 128 * 3 * cost.bfloat16_flops("full"))


@pytest.mark.parametrize(
    ("name", "uncounted"),
    [
        ("wkv7_of_tomorrow", True),
        ("wkv7_split_tomorrow", True),
        ("wkv7_forward", False),
        ("wkv7_output_backward", False),
        ("wkv7_step", False),
    ],
)
def test_kernels_whose_products_are_not_known_are_found(name: str, uncounted: bool) -> None:
    module = parse_module(OF_A_KERNEL.replace("wkv7_forward", name))
    assert uncounted_kernels(module) == ((name,) if uncounted else ())


def config(generation: str = "7", **training: object) -> TrainConfig:
    model = ModelConfig(generation, vocab_size=64, num_layers=3, width=64, head_dim=16, dtype="bfloat16")  # pyright: ignore
    return TrainConfig(model=model, training=StepConfig(batch_size=8, sequence_length=32, **training))  # pyright: ignore


def test_calls_of_the_operator() -> None:
    calls = count_operator_calls(config(), None)
    assert calls is not None
    assert (calls.operator, calls.implementation, calls.forwards, calls.backwards) == ("wkv7", "chunked", 3, 3)
    assert (calls.token_heads, calls.key_dim, calls.value_dim) == (8 * 32 * 4, 16, 16)
    assert calls.item_bytes == {"r": 2, "log_w": 4, "k": 2, "v": 2, "a": 2, "b": 2}
    assert calls.may_be_measured
    never = count_operator_calls(config(tune="never"), None)
    assert never == dataclasses.replace(calls, may_be_measured=False)
    more = count_operator_calls(config(remat="full", accumulation_steps=2), None)
    assert more is not None
    assert (more.forwards, more.backwards, more.token_heads) == (12, 6, 4 * 32 * 4)
    on_time = count_operator_calls(config(), AbstractMesh((2, 1, 2, 1), AXES))  # pyright: ignore[reportArgumentType]
    assert on_time == dataclasses.replace(
        calls,
        token_heads=calls.token_heads / 4,
        item_bytes=dict.fromkeys(calls.item_bytes, 4),
        map_value_dim=32,
        may_be_measured=False,
    )
    channels = count_operator_calls(config("4"), None)
    assert channels is not None
    assert (channels.token_heads, channels.key_dim, channels.item_bytes) == (8 * 32 * 64, 1, {"k": 2, "v": 2})
    transformer = ModelConfig(architecture="transformer", vocab_size=64, num_layers=3, width=64)
    assert count_operator_calls(dataclasses.replace(config(), model=transformer), None) is None


@pytest.mark.parametrize("field", IMPLEMENTATIONS)
def test_a_named_kernel_is_planned_as_if_on_its_device(field: str) -> None:
    named = dataclasses.replace(config(), model=dataclasses.replace(config().model, **{field: KERNELS}))
    problem = Problem("cpu", (1, 32, 4, 16, 16), "float32")
    there, elsewhere = (getattr(as_planned_for(named, x, "some chip").model, field) for x in ("cuda", "tpu"))
    assert there.refuses(problem) is None  # pyright: ignore
    assert elsewhere.refuses(problem) == "it needs an NVIDIA GPU, and this is tpu"  # pyright: ignore
    assert as_planned_for(config(), "cuda", "some chip") == config()


@pytest.mark.parametrize("field", IMPLEMENTATIONS)
def test_a_kernel_that_the_planned_device_cannot_run_is_refused(field: str) -> None:
    named = dataclasses.replace(config(), model=dataclasses.replace(config().model, **{field: KERNELS}))
    refuse_unable_there(named, None, parse_topology("h100:1x1"), "some chip")
    reason = "cannot run on v5p:2x2x1: it needs an NVIDIA GPU, and this is tpu; name .* there, or leave it out"
    with pytest.raises(ConfigError, match=f"^model.{field} = '{KERNELS}': {reason}"):
        refuse_unable_there(named, None, parse_topology("v5p:2x2x1"), "some chip")


def described(plan: Plan) -> str:
    module = parse_module(TEXT)
    estimates = predict(module, plan.device, 0.25, CALLS)
    return describe(dataclasses.replace(plan, program=dataclasses.replace(PROGRAM, estimates=estimates)))


def test_predicted_steps_in_words() -> None:
    words = described(PLAN).splitlines()
    (compiled,) = (line for line in words if line.startswith("chunked"))
    assert compiled.split() == ["chunked", "as", "compiled", "0", "0", "6", "250"]
    (kernels,) = (line for line in words if line.startswith(f"{KERNELS} "))
    assert kernels.split() == [KERNELS, "by", "formulas", "0", "0", "7", "250"]
    (split,) = (line for line in words if line.startswith(SPLIT_KERNELS))
    assert split.split() == [SPLIT_KERNELS, "by", "formulas", "0", "0", "15", "250"]
    assert any(f"a launch of {1e6 * LAUNCH:.1f} us" in line for line in words)
    on_tpu = described(dataclasses.replace(PLAN, device=DEVICES["v5p"]))
    assert "launch of" not in on_tpu
    assert KERNELS not in on_tpu
