"""`rwkv convert --resize-vocab`: rows of the embedding and the head added and cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors, tensors_in


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_added_as_the_mean_and_cut_again(tmp_path: Path, dtype: str) -> None:
    tensors = random_tensors(CONFIGS["7"], dtype)
    write_torch_file(tmp_path / "a.pth", tensors)
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", resize_vocab=40).vocab_size == 40
    found = tensors_in(tmp_path / "b.pth")
    for name in ("emb.weight", "head.weight"):
        mean = tensors[name].astype(np.float64).mean(axis=0).astype(tensors[name].dtype)
        assert found[name].shape == (40, 32)
        assert found[name][:29].tobytes() == tensors[name].tobytes()
        assert (found[name][29:] == mean).all()
    convert(tmp_path / "b.pth", tmp_path / "c.safetensors", resize_vocab=29)
    assert_same_bits(tensors_in(tmp_path / "c.safetensors"), tensors)


@pytest.mark.parametrize("size", [0, -1, 2**20 + 1, 2**63])
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, size: int) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIGS["7"]))
    with pytest.raises(WeightsError, match=rf"resize_vocab = {size}: must be from 1 to 1048576"):
        convert(tmp_path / "a.pth", tmp_path / "b.pth", resize_vocab=size)
    assert not (tmp_path / "b.pth").exists()
