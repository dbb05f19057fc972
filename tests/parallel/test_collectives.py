"""What devices tell each other in a step, counted in the compiled program."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.test_sharded_model import run_on_eight_devices


def collectives(*cases: str) -> dict[str, dict[str, Any]]:
    return run_on_eight_devices("collectives", *cases)


def assert_no_growth(mesh: str) -> dict[str, Any]:
    found = collectives(f"{mesh}:32", f"{mesh}:64")
    short, long = found[f"{mesh}:32"], found[f"{mesh}:64"]
    assert short == long
    assert short
    return short


@pytest.mark.long
def test_nothing_grows_with_the_length() -> None:
    """Gradients are added up, weights gathered; along the sequence a state's map and one token a row travel."""
    found = assert_no_growth("data2.fsdp2.sequence2")
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["data4", "fsdp4", "sequence4", "data2.fsdp2"])
def test_nothing_grows_with_the_length_on_any_such_mesh(mesh: str) -> None:
    assert_no_growth(mesh)


def test_heads_split_over_devices_cost_two_sums_a_layer_each_way() -> None:
    """Of the residual stream, after time mixing and after channel mixing; it is what Megatron's split costs."""
    (found,) = collectives("tensor2:32").values()
    assert found.keys() == {"all-reduce"}
    number, size = found["all-reduce"]
    layers, stream = 3, 16 * 32 * 32 * 4  # B T C in float32
    # Beside four a layer: the embedding's vectors, the head's gradient, and [B T] or less.
    assert 4 * layers + 2 <= number <= 4 * layers + 8
    assert (4 * layers + 2) * stream <= size < (4 * layers + 3) * stream
