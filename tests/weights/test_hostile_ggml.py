"""Hostile GGUF and ggmf files are refused by name, before anything is allocated by what they claim."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_jax import from_pretrained
from rwkv_jax.weights.sources import open_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors
from tests.weights.forged_ggml import ggmf_model, gguf_model
from tests.weights.hostile_ggml import GGMF_FILES, GGUF_FILES, SEVEN

FILES = {f"gguf, {name}": case for name, case in GGUF_FILES.items()} | {
    f"ggmf, {name}": case for name, case in GGMF_FILES.items()
}


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports, and compiles what is compiled once, before memory is counted."""
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    path.write_bytes(SEVEN.bytes())
    open_weights(path)


@pytest.mark.parametrize(("make", "message"), FILES.values(), ids=FILES)
def test_it_is_refused_by_name(tmp_path: Path, make: Callable[[], bytes], message: str) -> None:
    path = tmp_path / "hostile.bin"
    path.write_bytes(make())
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(WeightsError, match=message) as error:
        from_pretrained(path)
    took = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).count(str(path)) == 1
    assert peak < 2**23
    assert took < 5


@pytest.mark.parametrize("generation", ["6", "7"])
@pytest.mark.parametrize("version", [2, 3])
def test_the_file_that_they_change_is_read(tmp_path: Path, generation: str, version: int) -> None:
    tensors = random_tensors(CONFIGS[generation])
    file = gguf_model(CONFIGS[generation], tensors)
    file.version = version
    (tmp_path / "a.gguf").write_bytes(file.bytes())
    assert_same_bits(dict(open_weights(tmp_path / "a.gguf").tensors), tensors)


def test_another_alignment_and_unpadded_ends_are_read(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["7"])
    file = gguf_model(CONFIGS["7"], tensors).told(general__alignment=256)
    file.alignment = 256
    content = file.bytes()
    (tmp_path / "a.gguf").write_bytes(content[: len(content) - 256 + len(file.tensors[-1].content) % 256 or None])
    assert_same_bits(dict(open_weights(tmp_path / "a.gguf").tensors), tensors)


def test_the_ggmf_that_they_change_is_read(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["7"])
    (tmp_path / "a.bin").write_bytes(ggmf_model(CONFIGS["7"], tensors).bytes())
    assert_same_bits(dict(open_weights(tmp_path / "a.bin").tensors), tensors)
