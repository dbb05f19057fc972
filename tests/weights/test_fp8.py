"""Files in 8-bit floating point, with scales and without."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.weights.fp8 import open_fp8
from rwkv_jax.weights.sources import open_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.weights import forged
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors

NAMES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float32": "F32"}
TENSORS = random_tensors(CONFIGS["7"])
KEY = "blocks.1.ffn.key.weight"
FP8 = {KEY: TENSORS[KEY].astype(ml_dtypes.float8_e4m3fn)}


def _save(path: Path, tensors: dict[str, NDArray]) -> None:
    header, content = {}, b""
    for name, x in tensors.items():
        begin, content = len(content), content + x.tobytes()
        header[name] = {"dtype": NAMES[x.dtype.name], "shape": x.shape, "data_offsets": [begin, len(content)]}
    start = json.dumps(header).encode()
    path.write_bytes(len(start).to_bytes(8, "little") + start + content)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("ending", ["", "_scale", "_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (48,), (48, 1), (1, 1)])
def test_files_are_read(tmp_path: Path, dtype: type, ending: str, shape: tuple[int, ...]) -> None:
    scale = np.random.default_rng(0).uniform(0.5, 2, shape).astype(np.float32)
    held = TENSORS | {KEY: TENSORS[KEY].astype(dtype)} | ({KEY + ending: scale} if ending else {})
    held |= {KEY.removesuffix("weight") + "input_scale": np.ones((), np.float32)}
    _save(tmp_path / "a.safetensors", held)
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights.tensors.keys() == TENSORS.keys()
    wide = TENSORS[KEY].astype(dtype).astype(np.float32)
    expected = (
        wide * np.broadcast_to(scale.reshape(-1, 1), (len(wide), 1) if scale.size > 1 else (1, 1)) if ending else wide
    )
    np.testing.assert_array_equal(weights.tensors[KEY], expected)
    assert weights.file.held_in(KEY) == np.dtype(dtype).name
    assert weights.model_config().num_layers == 3


def _save_torch(path: Path, tensors: dict[str, NDArray]) -> None:
    """As torch does: of these dtypes it has no typed memory, and writes bytes with the dtype beside them."""
    items, entries = b"", []
    for key, (name, x) in enumerate(tensors.items()):
        strides = tuple(stride // x.itemsize for stride in x.strides)
        if x.dtype.name.startswith("float8"):
            held = forged.memory(str(key), ("torch.storage", "UntypedStorage"), x.nbytes)
            parts = (held, forged.integer(0), forged.integers(x.shape), forged.integers(strides), b"\x89")
            dtype = forged.named("torch", x.dtype.name)
            made = forged.call("torch._utils", "_rebuild_tensor_v3", *parts, forged.HOOKS, dtype)
        else:
            made = forged.tensor(forged.memory(str(key), count=x.size), 0, x.shape, strides)
        items += forged.text(name) + made
        entries.append(forged.Entry(f"x/data/{key}", x.tobytes()))
    path.write_bytes(forged.torch_file(forged.state(items), *entries))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_files_by_torch_are_read(tmp_path: Path, dtype: type) -> None:
    scale = np.full(1, 0.5, np.float32)
    _save_torch(tmp_path / "a.pth", TENSORS | {KEY: TENSORS[KEY].astype(dtype), f"{KEY}_scale": scale})
    weights = open_weights(tmp_path / "a.pth")
    assert weights.file.held_in(KEY) == np.dtype(dtype).name
    expected = TENSORS | {KEY: TENSORS[KEY].astype(dtype).astype(np.float32) * scale}
    assert_same_bits(dict(weights.tensors), expected)


def test_another_dtype_of_eight_bits_by_torch_is_refused(tmp_path: Path) -> None:
    _save_torch(tmp_path / "a.pth", {"a": np.zeros((2, 2), ml_dtypes.float8_e4m3fnuz)})
    with pytest.raises(WeightsError, match=r"names 'torch\.float8_e4m3fnuz'"):
        open_weights(tmp_path / "a.pth")


def test_blocks_of_128() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 130)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (3, 2)).astype(np.float32)
    found = open_fp8({"w.weight": x, "w.weight_scale_inv": scale})
    assert found is not None
    assert list(found) == ["w.weight"]
    whole = np.kron(scale, np.ones((128, 128), np.float32))[:300, :130]
    np.testing.assert_array_equal(found["w.weight"], x.astype(np.float32) * whole)
    assert open_fp8(TENSORS) is None


@pytest.mark.parametrize(
    "scale",
    [
        np.ones(47, np.float32),
        np.ones(0, np.float32),
        np.ones((1, 32), np.float32),
        np.ones((2, 1), np.float32),
        np.broadcast_to(np.float32(1), (2**40, 1)),
        np.ones((48, 1, 1), np.float32),
    ],
    ids=str,
)
def test_scales_of_other_shapes_are_refused(scale: NDArray) -> None:
    with pytest.raises(WeightsError, match=rf"{KEY}_scale \[.*\] does not go with {KEY} \[48, 32\]"):
        open_fp8(FP8 | {f"{KEY}_scale": scale})


def test_other_scales_are_refused() -> None:
    with pytest.raises(WeightsError, match="is int32, scales must be float32"):
        open_fp8(FP8 | {f"{KEY}_scale": np.ones(1, np.int32)})
    with pytest.raises(WeightsError, match="is float8_e4m3fn, scales must be float32"):
        open_fp8(FP8 | {f"{KEY}_scale": np.ones(1, ml_dtypes.float8_e4m3fn)})
    with pytest.raises(WeightsError, match=f"{KEY} has two scales"):
        open_fp8(FP8 | {f"{KEY}_scale": np.ones(1, np.float32), f"{KEY}_scale_inv": np.ones(1, np.float32)})
    found = open_fp8(FP8 | {f"{KEY}_scale": np.full(1, np.nan, np.float32)})
    assert found is not None
    with pytest.raises(WeightsError, match=f"{KEY}_scale has numbers that are not finite"):
        found[KEY]


def test_a_scale_without_its_matrix_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "a.safetensors", TENSORS | FP8 | {"blocks.0.att.key.weight_scale": np.ones(1, np.float32)})
    with pytest.raises(WeightsError, match=r"no known layout: blocks\.0\.att\.key\.weight_scale"):
        open_weights(tmp_path / "a.safetensors")
