"""A step on a mesh is a step on one device: loss, gradients, carried states and initial values."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from rwkv_jax.config.generations import OTHER_ARCHITECTURES
from rwkv_jax.config.generations.baseline import BaselineSpec
from tests.fake_devices import run_on_fake_devices

BOUNDS = {"float64": 1e-12, "float32": 1e-6}

MIXED = ("data2.fsdp2.tensor2", "fsdp2.sequence2.tensor2")
"""Every axis, and every pair of axes that have to do with each other."""
EACH = tuple(f"{axis}{size}" for axis in ("data", "fsdp", "sequence", "tensor") for size in (2, 4, 8))
BASELINES = [name for name, spec in OTHER_ARCHITECTURES.items() if isinstance(spec, BaselineSpec)]
FURTHER = (*EACH, "data2.sequence4", "data4.tensor2", "data2.fsdp2.sequence2", "data2.sequence2.tensor2")


def run_on_eight_devices(program: str, *arguments: str) -> Any:
    """What a program of this folder prints as JSON, in a process with eight fake devices."""
    return run_on_fake_devices(8, f"tests.parallel.{program}", *arguments)


@functools.cache
def errors(generation: str, dtype: str, meshes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Of every mesh, from one process."""
    return run_on_eight_devices("meshes", *(f"{generation}:{dtype}:{mesh}" for mesh in meshes))


def assert_equal_to_one_device(generation: str, dtype: str, meshes: tuple[str, ...]) -> None:
    found = errors(generation, dtype, meshes)
    assert len(found) == len(meshes)
    for case, by_result in found.items():
        assert by_result.keys() >= {"loss", "gradients", "recurrent_state", "worst gradient"}
        if dtype == "float32":  # in which a parameter may have a gradient that is all rounding
            del by_result["worst gradient"]
        assert max(by_result.values()) <= BOUNDS[dtype], (case, by_result)


@pytest.mark.long
@pytest.mark.parametrize("generation", ["7", "4", "6"])
def test_mixed_meshes_change_nothing(generation: str) -> None:
    assert_equal_to_one_device(generation, "float64", MIXED)


def test_a_mesh_that_splits_time_changes_nothing() -> None:
    """What a Transformer's below does not have: the time axis, states that are carried, and heads of an operator; and
    LoRA on it, with dropout."""
    assert_equal_to_one_device("7", "float64", (*MIXED[1:], f"{MIXED[1]}:lora"))


@pytest.mark.long
def test_meshes_change_nothing_of_adapters() -> None:
    kinds = ("dora", "pissa", "miss", "bat")
    assert_equal_to_one_device("7", "float64", tuple(f"{mesh}:{kind}" for kind in kinds for mesh in MIXED))
    assert_equal_to_one_device("7", "float32", (f"{MIXED[0]}:packed",))


@pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=pytest.mark.long) for name in ("7", "4", "5.0", "5.2", "6")]
)
def test_recomputation_masks_and_rows_of_their_own_change_nothing(generation: str) -> None:
    assert_equal_to_one_device(generation, "float64", (f"{MIXED[0]}:other",))


def test_meshes_change_nothing_of_a_transformer() -> None:
    """With the mean over all tokens that count, of which devices and micro-batches have very different numbers."""
    assert_equal_to_one_device(
        "transformer", "float64", (f"{MIXED[0]}:other", f"{MIXED[0]}:fused", f"{MIXED[0]}:chats")
    )


@pytest.mark.long  # whose parts a hybrid has, too
def test_meshes_change_nothing_of_a_llama() -> None:
    """Whose heads share keys and values, and whose embedding is its head, in the fused loss, too."""
    assert_equal_to_one_device("llama", "float64", (MIXED[0], f"{MIXED[0]}:fused"))


@pytest.mark.parametrize("name", ["hybrid", pytest.param("converted", marks=pytest.mark.long)])
def test_meshes_change_nothing_where_time_mixing_takes_the_place_of_attention(name: str) -> None:
    """Some layers, whose heads and values are split like those of attention; or all of them, whose time is split."""
    assert_equal_to_one_device(name, "float64", MIXED[:1] if name == "hybrid" else (*MIXED, f"{MIXED[0]}:other"))


@pytest.mark.long  # the attention of RWKV-7b, below, has tables, too
@pytest.mark.parametrize("generation", ["7a", "8-rc00"])
def test_meshes_change_nothing_of_tables_by_token(generation: str) -> None:
    """Which are split over ids, also where time is, whose tokens' vectors each device has for its own."""
    assert_equal_to_one_device(generation, "float64", MIXED)


def test_meshes_change_nothing_of_attention_beside_time_mixing() -> None:
    """Which every shard of tensors computes whole; what is added to all keys has a gradient near zero, all rounding."""
    for by_result in errors("7b", "float64", (f"{MIXED[0]}:other", f"{MIXED[0]}:fused")).values():
        assert by_result.pop("worst gradient") <= 1e-9
        assert max(by_result.values()) <= BOUNDS["float64"]


def test_meshes_change_nothing_of_lookups() -> None:
    """Which each device's rows and symbols ask the host about."""
    assert_equal_to_one_device("8-rosa", "float64", (f"{MIXED[0]}:other:host",))


@pytest.mark.long
def test_meshes_change_nothing_of_lookups_with_states_and_beside_time_mixing() -> None:
    """Whose states are carried over packed rows."""
    assert_equal_to_one_device("8-rosa", "float64", MIXED[:1])
    assert_equal_to_one_device("7-rosa", "float64", (MIXED[0], "tensor8:other"))


@pytest.mark.long  # its resumption and its loss have tests
def test_meshes_change_nothing_of_a_student() -> None:
    """Whose teacher has other sizes, and whose vocabulary is split as the teacher's is."""
    mesh = MIXED[0]
    assert_equal_to_one_device("transformer", "float64", (f"{mesh}:other:distill", f"{mesh}:other:topk"))


@pytest.mark.long
def test_meshes_change_nothing_of_a_student_whose_teacher_is_of_another_kind() -> None:
    """Both models' states are carried, in micro-batches, on a mesh that splits time too."""
    cases = tuple(f"{mesh}:{option}" for mesh in MIXED for option in ("distill", "topk"))
    assert_equal_to_one_device("7", "float64", cases)


@pytest.mark.long
def test_a_mesh_stores_of_a_teacher_what_one_device_does() -> None:
    """In micro-batches, of which one device has none, with the vocabulary or the time split."""
    assert_equal_to_one_device("7", "float64", tuple(f"{mesh}:chats:stored" for mesh in MIXED))


@pytest.mark.long
def test_a_mesh_changes_nothing_of_alignment() -> None:
    """In float64, but for what is reported in float32; of rows of several documents, of which some tokens count."""
    assert run_on_eight_devices("alignment") < 1e-6


@pytest.mark.long
def test_the_mean_is_over_what_counts_on_all_devices() -> None:
    assert_equal_to_one_device("7", "float64", tuple(f"{mesh}:chats" for mesh in MIXED))


@pytest.mark.long
@pytest.mark.parametrize("generation", ["7", "5.2"])
def test_meshes_change_nothing_of_a_tuned_state(generation: str) -> None:
    """All rows read it, and all devices that split rows or time; heads are split."""
    meshes = ("data2.sequence2.tensor2:other:state", "data2.fsdp2.tensor2:other:state")
    assert_equal_to_one_device(generation, "float64", meshes)


@pytest.mark.long
def test_rows_of_several_documents_change_nothing_of_a_transformer() -> None:
    assert_equal_to_one_device("transformer", "float64", MIXED[:1])


def test_gathered_weights_add_up_their_gradients_in_float32() -> None:
    """Thousands of equal tokens: a sum in bfloat16 would stand still at 256."""
    assert run_on_eight_devices("gathering") == {"2": 3000.0, "5": 5192.0}


@pytest.mark.long
@pytest.mark.parametrize("generation", ["4", "5.0", "5.2", "6", "7"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_no_mesh_changes_anything(generation: str, dtype: str) -> None:
    assert_equal_to_one_device(generation, dtype, MIXED + FURTHER)


@pytest.mark.long
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ["transformer", "llama"])
def test_no_mesh_changes_anything_of_attention(name: str, dtype: str) -> None:
    assert_equal_to_one_device(
        name, dtype, tuple(m for m in MIXED + FURTHER if "sequence" not in m and (name, m) != ("llama", "tensor8"))
    )


@pytest.mark.long
@pytest.mark.parametrize("name", BASELINES)
def test_meshes_of_rows_and_weights_change_nothing_of_a_baseline(name: str) -> None:
    assert_equal_to_one_device(name, "float64", ("data2.fsdp4", "fsdp2:other"))


@pytest.mark.long
@pytest.mark.parametrize("generation", ["7", "4", "5.2", "6", "transformer", "llama", "hybrid"])
def test_initial_values_are_the_same_bits_on_every_mesh(generation: str) -> None:
    found = run_on_eight_devices("initial_values", generation)
    assert found.keys() == {"data2.fsdp2.tensor2", "fsdp4.sequence2"}
    for mesh, report in found.items():
        assert report["different"] == [], mesh
        assert report["largest_share"] <= 1 / 2, mesh
