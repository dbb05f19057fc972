"""ggmf files, the older ones of rwkv.cpp, are read as what they were made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax import from_pretrained
from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.sources import open_weights
from tests.weights.files import CONFIGS, assert_same_bits, logits_of, tensors_in, trained_like
from tests.weights.forged_ggml import GGMFTensor, ggmf_model

MODELS = {name: CONFIGS[name] for name in ("4", "5.0", "5.2", "6", "7", "7, from the trainer")}
COMPUTED = ("time_decay", "time_first")
"""What rwkv.cpp's converter takes exponentials of in RWKV-4 and 5."""


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_tensors_are_the_official_ones(tmp_path: Path, config: ModelConfig) -> None:
    tensors = trained_like(config)
    path = tmp_path / "model.bin"
    path.write_bytes(ggmf_model(config, tensors).bytes())
    opened = open_weights(path)
    assert opened.layout == "ggmf"
    assert opened.model_config() == config
    found = dict(opened.tensors)
    is_computed = config.generation in ("4", "5.0", "5.2")
    exact = {name: x for name, x in tensors.items() if not (is_computed and name.endswith(COMPUTED))}
    assert_same_bits({name: found[name] for name in exact}, exact)
    for name in tensors.keys() - exact.keys():
        assert found[name].shape == tensors[name].shape
        np.testing.assert_allclose(found[name], tensors[name], rtol=0, atol=2e-6)
    write_torch_file(tmp_path / "a.pth", tensors)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 30))
    theirs, ours = (logits_of(from_pretrained(each), tokens) for each in (path, tmp_path / "a.pth"))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)


def test_decays_of_one_and_nothing_are_finite(tmp_path: Path) -> None:
    """exp(-exp(w)) is 1 or 0 in float32 where |w| is large, and has no logarithm of one."""
    tensors = trained_like(CONFIGS["5.2"])
    tensors["blocks.1.att.time_decay"][0, :2] = (-25.0, 8.0)
    (tmp_path / "a.bin").write_bytes(ggmf_model(CONFIGS["5.2"], tensors).bytes())
    found = tensors_in(tmp_path / "a.bin")["blocks.1.att.time_decay"]
    assert np.exp(-np.exp(found[0, :2])).tolist() == [1, 0]
    assert np.isfinite(found).all()


def test_it_is_converted_into_an_official_file(tmp_path: Path) -> None:
    tensors = trained_like(CONFIGS["7"])
    (tmp_path / "a.bin").write_bytes(ggmf_model(CONFIGS["7"], tensors).bytes())
    convert(tmp_path / "a.bin", tmp_path / "b.safetensors")
    assert_same_bits(tensors_in(tmp_path / "b.safetensors"), tensors)


def test_matrices_in_float16_keep_their_dtype(tmp_path: Path) -> None:
    tensors = trained_like(CONFIGS["6"])
    file = ggmf_model(CONFIGS["6"], tensors)
    file.version = 100
    halves = {name: x.astype(np.float16) for name, x in tensors.items() if name.endswith("weight") and x.ndim == 2}
    file.tensors = [_held(tensor, halves) for tensor in file.tensors]
    (tmp_path / "a.bin").write_bytes(file.bytes())
    assert_same_bits(tensors_in(tmp_path / "a.bin"), tensors | halves)


def _held(tensor: GGMFTensor, halves: dict[str, NDArray]) -> GGMFTensor:
    name = str(tensor.name)
    if name not in halves:
        return tensor
    return dataclasses.replace(tensor, kind=1, content=halves[name].tobytes())


@pytest.mark.parametrize(("kind", "name"), [(2, "Q4_0"), (3, "Q4_1"), (7, "Q5_0"), (8, "Q5_1"), (9, "Q8_0")])
def test_blocks_are_computed(tmp_path: Path, kind: int, name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    tensors = trained_like(CONFIGS["7"])
    matrix = "blocks.1.att.key.weight"
    blocks = gguf.quantize(tensors[matrix], gguf.GGMLQuantizationType[name])
    file = ggmf_model(CONFIGS["7"], tensors).tensor(matrix, kind=kind, content=blocks.tobytes())
    (tmp_path / "a.bin").write_bytes(file.bytes())
    found = tensors_in(tmp_path / "a.bin")[matrix]
    np.testing.assert_array_equal(found, gguf.dequantize(blocks, gguf.GGMLQuantizationType[name]))
    assert 0 < np.abs(found - tensors[matrix]).max() < 0.1
