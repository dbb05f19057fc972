"""Weights loaded onto a mesh: split, on every device, and the same numbers."""

from __future__ import annotations

import pytest

from tests.kernels.test_sharding import run_on_four_devices


@pytest.mark.long
def test_a_file_is_placed_shard_by_shard() -> None:
    report = run_on_four_devices("tests.weights.placed")
    assert report["devices"] == 4
    shards = report["shards"]
    assert shards["blocks.att.key.weight"] == [[2, 8, 32]]
    assert shards["first_block.ffn.value.weight"] == [[8, 48]]
    assert shards["emb.weight"] == [[29, 8]]  # four devices do not divide 29 rows, but 32 columns
    assert shards["blocks.att.time_maa_w2"] == [[2, 5, 3, 32]]
    assert shards["ln_out.weight"] == [[32]]
    assert report["error"] < 1e-5
    assert report["error_again"] == 0
    assert report["error_as_trained"] < 1e-5
    assert report["partitions_as_trained"]["blocks.att.key.weight"] == [None, None, "fsdp"]
    assert report["partitions_as_trained"]["blocks.ffn.value.weight"][:2] == [None, "fsdp"]
