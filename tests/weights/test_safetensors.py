"""safetensors files: read without copies, written as the library would, refused when they are not what they claim."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rwkv_jax.weights.content_hash import CONTENT, FORMAT
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.tensors import BFLOAT16, UnsafeFileError, WeightsError
from tests.golden import tiny_model

_NUMPY_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


def _tensors() -> dict[str, NDArray]:
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray] = {f"{dtype}.é": rng.integers(0, 100, (3, 5)).astype(dtype) for dtype in _NUMPY_DTYPES}
    return tensors | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float16)}


def _assert_same(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        np.testing.assert_array_equal(found[name], tensor, strict=True)


def _raw(path: Path, header: object, data: bytes = b"") -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "x.safetensors", metadata={"format": "np"})
    _assert_same(read_safetensors(tmp_path / "x.safetensors"), _tensors())


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, _tensors(), {"b": "é", "a": "1"})
    _assert_same(load_file(path), _tensors())
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("checksums")).keys() == {*_tensors(), "__metadata__"}
    assert metadata == {"b": "é", "a": "1"}


def test_bfloat16_goes_out_and_in(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors: dict[str, NDArray] = {"odd": np.ones(3, np.uint8), "w": np.arange(12).astype(BFLOAT16).reshape(3, 4)}
    write_safetensors(path, tensors)
    with safe_open(path, framework="numpy") as file:
        assert file.get_slice("w").get_dtype() == "BF16"
    _assert_same(read_safetensors(path), tensors)


@pytest.mark.parametrize("length", range(1, 9))
def test_all_tensors_are_aligned(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    sizes = {"odd": np.ones(3, np.uint8), "half": np.ones(3, BFLOAT16), "single": np.ones(3, np.float32)}
    write_safetensors(path, sizes | {"d" * length: np.ones(3)})  # headers of every length
    assert all(tensor.flags.aligned for tensor in read_safetensors(path).values())


def test_nothing_is_copied_and_nothing_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {f"w{i}": np.zeros(2**20, np.float32) for i in range(8)})
    tracemalloc.start()
    found = read_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert sum(tensor.nbytes for tensor in found.values()) == 8 * 2**22
    with pytest.raises(ValueError, match="read-only"):
        found["w0"][0] = 1
    found.drop_pages()
    assert not found["w7"].any()


class _Counted(Mapping[str, NDArray]):
    """Tensors that are made when they are asked for."""

    def __getitem__(self, name: str) -> NDArray:
        return np.full(2**20, int(name), np.float32)

    def __iter__(self) -> Iterator[str]:
        return map(str, range(len(self)))

    def __len__(self) -> int:
        return 8


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    write_sharded_safetensors(tmp_path, _Counted(), max_shard_bytes=2**24)
    assert tracemalloc.get_traced_memory()[1] < 1.5 * 2**22
    tracemalloc.stop()
    found = read_safetensors(tmp_path / "model.safetensors.index.json")
    assert [int(found[str(i)][-1]) for i in range(8)] == list(range(8))


def test_views_and_foreign_byte_orders_are_written_as_they_read(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path / "x.safetensors", {"t": matrix.T, "big": matrix.astype(">f4"), "step": matrix[:, ::2]})
    found = read_safetensors(tmp_path / "x.safetensors")
    _assert_same(found, {"t": matrix.T, "big": matrix, "step": matrix[:, ::2]})


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name, metadata in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        write_safetensors(tmp_path / name, _tensors(), metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    content = np.arange(3, dtype="<f4")
    header = {"a": _entry([1], 0, 1, "U8"), "b": _entry([3], 1, 13)}
    path = _raw(tmp_path / "x.safetensors", header, b"\7" + content.tobytes())
    _assert_same(read_safetensors(path), {"a": np.array([7], np.uint8), "b": content})


def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros(2)})
    before = path.read_bytes()
    with pytest.raises(WeightsError, match=r"x.safetensors: exists already and is not overwritten"):
        write_safetensors(path, {"a": np.ones(2)})
    with pytest.raises(WeightsError, match=r"the tensor 'b' has dtype complex128, which is not written"):
        write_safetensors(tmp_path / "y.safetensors", {"a": np.ones(2), "b": np.ones(2, complex)})
    with pytest.raises(WeightsError, match=r"no tensor can be named '__metadata__'"):
        write_safetensors(tmp_path / "y.safetensors", {"__metadata__": np.ones(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class _Failing(_Counted):
    """Fails at the last tensor's second reading."""

    def __init__(self) -> None:
        self.times_asked = 0

    def __getitem__(self, name: str) -> NDArray:
        self.times_asked += name == "7"
        if self.times_asked == 2:
            raise OSError("gone")
        return np.zeros(4, np.float32)


def test_a_failure_leaves_no_shards(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        write_sharded_safetensors(tmp_path, _Failing(), max_shard_bytes=16)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_changes_is_noticed(tmp_path: Path) -> None:
    class Changing(_Failing):
        def __getitem__(self, name: str) -> NDArray:
            self.times_asked += name == "7"
            return np.zeros(4 * max(1, self.times_asked), np.float32)

    with pytest.raises(WeightsError, match=r"the tensor '7' changed while it was written; start again"):
        write_safetensors(tmp_path / "x.safetensors", Changing())
    assert list(tmp_path.iterdir()) == []


def test_shards(tmp_path: Path) -> None:
    tensors: dict[str, NDArray] = {f"w{i}": np.full(100 * (1 + 9 * (i == 2)), i, np.float32) for i in range(6)}
    index = write_sharded_safetensors(tmp_path / "new" / "model", tensors, 1000, {"format": "pt"})
    assert sorted(path.name for path in index.parent.iterdir()) == [
        *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
        "model.safetensors.index.json",
    ]
    record = json.loads(index.read_text())
    assert record["metadata"]["total_size"] == 6000
    assert {place: name for name, place in record["weight_map"].items()} == {
        "model-00001-of-00004.safetensors": "w1",
        "model-00002-of-00004.safetensors": "w2",  # larger than a shard may be
        "model-00003-of-00004.safetensors": "w4",
        "model-00004-of-00004.safetensors": "w5",
    }
    found = read_safetensors(index)
    _assert_same(found, tensors)
    assert list(found) == list(tensors)
    with safe_open(index.with_name("model-00003-of-00004.safetensors"), framework="numpy") as file:
        assert file.metadata().keys() == {"format", "checksums", FORMAT, CONTENT}
    with pytest.raises(WeightsError, match=r"model.safetensors.index.json: exists already and is not overwritten"):
        write_sharded_safetensors(index.parent, {"a": np.zeros(1)})


def test_what_fits_in_one_shard_is_one_file(tmp_path: Path) -> None:
    path = write_sharded_safetensors(tmp_path, _tensors())
    assert list(tmp_path.iterdir()) == [path] == [tmp_path / "model.safetensors"]
    _assert_same(read_safetensors(path), _tensors())
    with pytest.raises(WeightsError, match=r"model.safetensors: exists already"):
        write_sharded_safetensors(tmp_path, _tensors(), 1)
    with pytest.raises(WeightsError, match=r"max_shard_bytes = 0: must be 1 or more"):
        write_sharded_safetensors(tmp_path / "other", _tensors(), 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"file: cannot be made \(File exists\); name another folder"):
        write_sharded_safetensors(tmp_path / "file", _tensors())


_U8 = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"abc", "is not a whole safetensors file .*too small", id="short"),
        pytest.param(b"\xff" * 8 + b"{}", "is not a whole safetensors file .*too large", id="endless-header"),
        pytest.param((50).to_bytes(8, "little") + b"{}", "invalid header length", id="header-beyond-the-file"),
        pytest.param((b"[1, 2]", b""), "invalid JSON in header", id="no-object"),
        pytest.param((b'{"a":', b""), "invalid JSON in header", id="cut-header"),
        pytest.param((b"\xff{}", b""), "is not a whole safetensors file", id="not-utf-8"),
        pytest.param((b'{"a":' + _U8 + b',"a":' + _U8 + b"}", b"1"), "has names twice: a;", id="name-twice"),
        pytest.param((b'{"\\u0061":' + _U8 + b',"a":' + _U8 + b"}", b"1"), "names twice: a;", id="escaped-name-twice"),
        pytest.param((b'{"a":' + _U8[:-1] + b',"dtype":"I8"}}', b"1"), "duplicate field", id="field-twice"),
        pytest.param(({"a": _entry([1], 0, 4), "b": _entry([1], 2, 6)}, b"123456"), "invalid offset", id="overlap"),
        pytest.param(({"a": _entry([1], 0, 4), "b": _entry([1], 0, 4)}, b"1234"), "invalid offset", id="shared-bytes"),
        pytest.param(({"a": _entry([1], 0, 4), "b": _entry([1], 6, 10)}, bytes(10)), "invalid offset", id="gap"),
        pytest.param(({"a": _entry([2], 0, 8)}, b"1234"), "file not fully covered", id="beyond-the-end"),
        pytest.param(({"a": _entry([1], 0, 4)}, b"12345678"), "file not fully covered", id="trailing-bytes"),
        pytest.param(({"a": _entry([3], 0, 4)}, b"1234"), "invalid shape", id="wrong-size"),
        pytest.param(({"a": _entry([-1], 0, 4)}, b"1234"), "expected usize", id="negative"),
        pytest.param(({"a": _entry([2**62, 8], 0, 4)}, b"1234"), "overflow", id="overflowing-size"),
        pytest.param(({"a": _entry([1], 4, 0)}, b"1234"), "invalid offset", id="backwards"),
        pytest.param(({"a": _entry([1], 0, 4, "X9")}, b"1234"), "unknown variant", id="unknown-dtype"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes | tuple[object, bytes], message: str) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        _raw(path, *content)
    with pytest.raises(UnsafeFileError, match=rf"x\.safetensors: .*{message}"):
        read_safetensors(path)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("F8_E8M0", 1), ("BOOL", 1), ("C64", 8)])
def test_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: str, num_bytes: int) -> None:
    path = _raw(tmp_path / "x.safetensors", {"w": _entry([1], 0, num_bytes, dtype)}, bytes(num_bytes))
    with pytest.raises(WeightsError, match=rf"the tensor 'w' has dtype {dtype}, which is not read; convert it to one"):
        read_safetensors(path)


@pytest.mark.parametrize("shape", [[1] * 65, [0, 2**63], [0, 2**62, 4]], ids=["65 axes", "2^63", "2^62 times 4"])
def test_shapes_that_cannot_be_are_refused(tmp_path: Path, shape: list[int]) -> None:
    num_bytes = 0 if 0 in shape else 1
    header = json.dumps({"w": {"dtype": "U8", "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
    with pytest.raises(UnsafeFileError, match=r"x\.safetensors: "):
        read_safetensors(path)


def test_names_that_no_reader_takes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x\.safetensors: the name '\\udc80' cannot be written as UTF-8"):
        write_safetensors(tmp_path / "x.safetensors", {"\udc80": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_stays(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "on a disk that is not there")
    with pytest.raises(WeightsError, match="exists already and is not overwritten"):
        write_safetensors(tmp_path / "x.safetensors", {"w": np.zeros(3)})
    assert (tmp_path / "x.safetensors").is_symlink()


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.safetensors.index.json"):
        with pytest.raises(WeightsError, match=rf"{name}: cannot be read \(No such file"):
            read_safetensors(tmp_path / name)
        (tmp_path / name).touch()
        with pytest.raises(WeightsError, match=rf"{name}: cannot be read \(it is empty\)"):
            read_safetensors(tmp_path / name)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return write_sharded_safetensors(tmp_path / "model", {"a": np.zeros(4), "b": np.ones(4)}, 32)


@pytest.mark.parametrize(
    "place",
    ["../x.safetensors", "/x.safetensors", "y/x.safetensors", "..\\x.safetensors", "C:x.safetensors", "..", "x"],
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, index: Path, place: str) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"b": np.ones(4)})
    record = json.loads(index.read_text())
    record["weight_map"]["b"] = place
    index.write_text(json.dumps(record))
    with pytest.raises(UnsafeFileError, match="which is no file beside it; nothing was read"):
        read_safetensors(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"a": "x", "a": "y"}}', "has names twice: a"),
        ('{"weight_map": ["x"]}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("[]", "its JSON is no object"),
        ('{"weight_map"', "its JSON cannot be understood"),
        ("[" * 100000, "its JSON cannot be understood"),
        ("9" * 10000, "its JSON cannot be understood"),
    ],
)
def test_a_malformed_index_is_refused(index: Path, content: str, message: str) -> None:
    index.write_text(content)
    with pytest.raises(UnsafeFileError, match=rf"model.safetensors.index.json: {message}"):
        read_safetensors(index)


def test_an_index_must_agree_with_its_shards(index: Path) -> None:
    record = json.loads(index.read_text())
    for change, message in (
        ({"c": "model-00002-of-00002.safetensors"}, "the index promises tensors that the shard lacks: c;"),
        ({"b": "model-00001-of-00002.safetensors"}, "the index promises tensors that the shard lacks: b;"),
    ):
        index.write_text(json.dumps({"weight_map": record["weight_map"] | change}))
        with pytest.raises(UnsafeFileError, match=message):
            read_safetensors(index)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert list(read_safetensors(index)) == ["a"]  # a shard that no index names is nobody's
    index.with_name("model-00001-of-00002.safetensors").unlink()
    write_safetensors(index.with_name("model-00001-of-00002.safetensors"), {"a": np.zeros(1), "z": np.zeros(1)})
    with pytest.raises(UnsafeFileError, match="the shard holds tensors that the index does not place there: z;"):
        read_safetensors(index)


def test_missing_shards_are_named(index: Path) -> None:
    index.with_name("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"shards are missing beside it: model-00002-of-00002.safetensors; get them"):
        read_safetensors(index)


def test_an_endless_index_is_not_read(index: Path) -> None:
    with index.open("r+b") as file:
        file.truncate(10**9)
    with pytest.raises(UnsafeFileError, match="an index of 1000000000 bytes is none of a model"):
        read_safetensors(index)


def test_shards_may_be_links(tmp_path: Path, index: Path) -> None:
    for number, path in enumerate(sorted(index.parent.glob("*.safetensors"))):
        path.rename(tmp_path / f"blob{number}")
        path.symlink_to(tmp_path / f"blob{number}")
    _assert_same(read_safetensors(index), {"a": np.zeros(4), "b": np.ones(4)})


def test_the_golden_files_are_read() -> None:
    found = read_safetensors(tiny_model("6v0-1m.safetensors"))
    assert found["emb.weight"].shape == (256, 64)
    assert found["emb.weight"].dtype == BFLOAT16
