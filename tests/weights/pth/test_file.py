"""A .pth file is read as its writer meant it, or refused; nothing in it runs, and none costs more than it holds."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import shlex
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rwkv_jax.weights.pth import file as pth_file
from rwkv_jax.weights.pth import pickle as pth_pickle
from rwkv_jax.weights.pth import zip as pth_zip
from rwkv_jax.weights.pth.file import read_torch_file, write_torch_file
from rwkv_jax.weights.safetensors import read_safetensors
from rwkv_jax.weights.tensors import BFLOAT16, UnsafeFileError, WeightsError
from tests.golden import tiny_model
from tests.weights import forged, hostile_files, hostile_pickles

_DTYPES = [BFLOAT16, *map(np.dtype, ("f2", "f4", "f8", "?", "u1", "i1", "i2", "i4", "i8"))]
_MIB = 2**20


def _assert_same(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()
        assert not found[name].flags.writeable


# Pickles as torch has them: the standard library writes them, of stand-ins that go by the names of torch


class _Called:
    """Is pickled as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


class _Memory:
    """Is pickled as a reference."""

    def __init__(self, *reference: object) -> None:
        self.reference = ("storage", *reference)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.reference if isinstance(obj, _Memory) else None


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Functions and classes that are pickled under names of torch, and cannot be used."""
    found: dict[str, Any] = {}
    for module in ("torch", "torch._utils", "torch.storage"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    setattr(sys.modules["torch"], "_utils", sys.modules["torch._utils"])  # noqa: B010
    setattr(sys.modules["torch"], "storage", sys.modules["torch.storage"])  # noqa: B010

    def stand_in(name: str) -> Any:
        if name not in found:
            module, _, attribute = name.rpartition(".")
            found[name] = type(attribute, (), {"__module__": module})
            setattr(sys.modules[module], attribute, found[name])
        return found[name]

    return stand_in


def _save(path: Path, state: object, protocol: int, memory: list[NDArray]) -> None:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(state)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", stream.getvalue())
        for key, content in enumerate(memory):
            archive.writestr(f"model/data/{key}", content.tobytes())
        archive.writestr("model/version", "3\n")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_writes_is_read(tmp_path: Path, torch: Callable[[str], Any], protocol: int) -> None:
    numbers = np.arange(60, dtype="f4")
    halves = np.arange(8, dtype="f2")
    longs = np.arange(2**16, 2**16 + 4, dtype=np.uint32)
    rebuild, later = torch("torch._utils._rebuild_tensor_v2"), torch("torch._utils._rebuild_tensor_v3")
    shared = _Memory(torch("torch.FloatStorage"), "0", "cuda:0", 60)
    own = _Memory(torch("torch.HalfStorage"), "1", "cpu", 8)
    untyped = _Memory(torch("torch.storage.UntypedStorage"), "2", "cpu", 16)

    def tensor(memory: _Memory, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> _Called:
        return _Called(rebuild, memory, offset, shape, strides, False, OrderedDict())

    state: dict[str, object] = OrderedDict(
        whole=tensor(shared, 0, (3, 4, 5), (20, 5, 1)),
        transposed=tensor(shared, 0, (5, 4, 3), (1, 5, 20)),
        part=tensor(shared, 21, (2, 3), (20, 2)),
        number=tensor(shared, 7, (), ()),
        empty=tensor(shared, 60, (0, 4), (4, 1)),
        row=tensor(shared, 0, (1, 5), (2**62, 1)),
        parameter=_Called(torch("torch._utils._rebuild_parameter"), tensor(own, 0, (8,), (1,)), True, OrderedDict()),
        later=_Called(later, untyped, 1, (3,), (1,), False, OrderedDict(), torch("torch.uint32")),
    )
    cube = numbers.reshape(3, 4, 5)
    expected = {
        "whole": cube,
        "transposed": cube.T,
        "part": np.stack([numbers[21:26:2], numbers[41:46:2]]),
        "number": numbers[7].reshape(()),
        "empty": np.zeros((0, 4), "f4"),
        "row": cube[0, :1],
        "parameter": halves,
        "later": longs[1:],
    }
    state_with_versions = OrderedDict(state)
    vars(state_with_versions)["_metadata"] = OrderedDict([("", {"version": 1})])
    memory = [numbers, halves, longs]

    _save(tmp_path / "flat.pth", dict(state), protocol, memory)
    _assert_same(read_torch_file(tmp_path / "flat.pth").tensors, expected)
    _save(tmp_path / "module.pth", state_with_versions, protocol, memory)
    found = read_torch_file(tmp_path / "module.pth")
    _assert_same(found.tensors, expected)
    assert found.values == {}
    assert np.shares_memory(found.tensors["whole"], found.tensors["transposed"])

    plain = {"a": [1, -(2**70), 2.5, None, True], "b": {"c": ("d", ())}, "e": 2**31}
    _save(tmp_path / "converted.pth", state | {"_strategy": "cpu fp32", "x": plain}, protocol, memory)
    found = read_torch_file(tmp_path / "converted.pth")
    _assert_same(found.tensors, expected)
    assert found.values == {"_strategy": "cpu fp32", "x": plain}

    beside = {"step": 7, "names": {"x"}, "shapes": _Called(torch("torch.Size"), (2, 3)), "x": plain, "nothing": None}
    for wrapper in ("module", "state_dict", "model"):
        path = tmp_path / f"{wrapper}.wrapped"
        _save(path, {**beside, wrapper: state_with_versions | {"_version": "0.7"}}, protocol, memory)
        found = read_torch_file(path)
        _assert_same(found.tensors, expected)
        assert found.values == {"_version": "0.7"}


@pytest.mark.parametrize("code", ["<4s3I", "<4sI2Q"], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("told", [False, True], ids=["zeros before", "sizes before"])
def test_sizes_behind_the_content_are_read(tmp_path: Path, code: str, told: bool) -> None:
    entry = forged.sizes_behind(forged.MEMORY, code)
    entry = entry._replace(local_claimed=None, local_checksum=None) if told else entry
    (tmp_path / "x.pth").write_bytes(forged.torch_file(forged.state(forged.GOOD), entry))
    found = read_torch_file(tmp_path / "x.pth").tensors
    _assert_same(found, {"w": forged.NUMBERS.reshape(2, 3)})


def test_thousands_of_tensors(tmp_path: Path, torch: Callable[[str], Any]) -> None:
    memory = _Memory(torch("torch.FloatStorage"), "0", "cpu", 3000)
    rebuild = torch("torch._utils._rebuild_tensor_v2")
    state = {f"w{i}": _Called(rebuild, memory, i, (1,), (1,), False, OrderedDict()) for i in range(3000)}
    numbers = np.arange(3000, dtype="f4")
    _save(tmp_path / "x.pth", state, 2, [numbers])
    found = read_torch_file(tmp_path / "x.pth").tensors
    np.testing.assert_array_equal(np.concatenate(list(found.values())), numbers)


@pytest.mark.parametrize("name", ["4v0-660K", "5v2-730K", "6v0-1m"])
def test_files_by_torch_equal_their_twins(name: str) -> None:
    path = tiny_model(f"{name}.pth")
    found, twins = read_torch_file(path), read_safetensors(path.with_suffix(".safetensors"))
    assert found.values == {}
    _assert_same({name: found.tensors[name] for name in sorted(found.tensors)}, {k: twins[k] for k in sorted(twins)})


# Written and read again


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_round_trip(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    bits = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, 6 * 35 * dtype.itemsize, np.uint8)
    tensor = bits.view(dtype).reshape(6, 7, 5)
    tensors = {
        "blocks.0.att.x": tensor,
        "transposed": tensor.T,
        "every other": tensor[::2, ::-3],
        "number": tensor[0, 0, 0].reshape(()),
        "empty": tensor[:, :0],
        "größe": np.broadcast_to(tensor[0], (3, 7, 5)),
        "other end first": tensor if dtype in (BFLOAT16, np.dtype("?")) else tensor.astype(dtype.newbyteorder(">")),
        "": tensor[0],
    }
    path = tmp_path / "x.pth"
    write_torch_file(path, tensors)
    found = read_torch_file(path)
    assert found.values == {}
    _assert_same(found.tensors, {name: np.asarray(value, dtype) for name, value in tensors.items()})
    assert all(tensor.ctypes.data % 64 == 0 for tensor in found.tensors.values() if tensor.size)
    again = tmp_path / "again.pth"
    write_torch_file(again, found.tensors)
    assert again.read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/byteorder") == b"little"
    found.tensors.drop_pages()
    _assert_same(found.tensors, {name: np.asarray(value, dtype) for name, value in tensors.items()})


def test_entries_for_large_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": np.arange(1000.0), "b": np.zeros(3)}
    monkeypatch.setattr(pth_file, "_ZIP64_BYTES", 100)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    write_torch_file(tmp_path / "x.pth", tensors)
    content = (tmp_path / "x.pth").read_bytes()
    assert b"PK\6\6" in content
    assert content.count(struct.pack("<2I2H", 2**32 - 1, 2**32 - 1, 14, 0)[:8]) == 4  # `a` and the pickle, twice
    _assert_same(read_torch_file(tmp_path / "x.pth").tensors, tensors)


def test_memory(tmp_path: Path) -> None:
    path, names, size = tmp_path / "x.pth", [f"w{i}" for i in range(16)], _MIB

    class Made(Mapping[str, NDArray]):
        def __iter__(self) -> Iterator[str]:
            return iter(names)

        def __len__(self) -> int:
            return len(names)

        def __getitem__(self, name: str) -> NDArray:
            return np.full(size, names.index(name), np.uint8)

    tracemalloc.start()
    write_torch_file(path, Made())
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = read_torch_file(path).tensors
    read = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert written < 1.5 * size
    assert read < 0.1 * size
    assert [int(tensor[-1]) for tensor in found.values()] == list(range(16))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.zeros(2), "b": np.zeros(2, "c8")}, "'b' is complex64, which .* convert it to one of bfloat16, float"),
        ({"a": np.zeros(2, "u2")}, "'a' is uint16, which"),
        ({"a": np.array(["x"])}, "'a' is <U1, which"),
        ({"\udc80": np.zeros(2)}, r"the name '\\udc80' cannot be written as UTF-8"),
        ({}, "there are no tensors to write"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, tensors: dict[str, NDArray], message: str) -> None:
    with pytest.raises(WeightsError, match=rf"x\.pth: {message}"):
        write_torch_file(tmp_path / "x.pth", tensors)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_text("precious")
    with pytest.raises(WeightsError, match="exists already and is not overwritten"):
        write_torch_file(path, {"a": np.zeros(3)})
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pth: cannot be read \(No such file or directory\); name a file"):
        read_torch_file(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match=r"cannot be read \(Is a directory\); name a file"):
        read_torch_file(tmp_path)


# Hostile files


def test_the_files_below_differ_from_one_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(forged.torch_file())
    _assert_same(read_torch_file(path).tensors, {"w": forged.NUMBERS.reshape(2, 3)})
    assert len(hostile_pickles.RUNNING) + len(hostile_pickles.PICKLES) + len(hostile_files.FILES) > 150


@pytest.mark.parametrize("name", hostile_pickles.RUNNING)
def test_nothing_runs(tmp_path: Path, name: str) -> None:
    build, message = hostile_pickles.RUNNING[name]
    canary = tmp_path / "canary"
    pickled = build(f"touch {shlex.quote(str(canary))}")

    class Victim(pickle.Unpickler):
        def persistent_load(self, pid: object) -> object:
            return pid

    with contextlib.suppress(Exception):  # what it fails at comes after what it ran
        Victim(io.BytesIO(pickled)).load()
    assert canary.exists(), "harmless even to the standard library: no test of anything"
    canary.unlink()

    path = tmp_path / "x.pth"
    path.write_bytes(forged.torch_file(pickled))
    with pytest.raises(UnsafeFileError, match=message):
        read_torch_file(path)
    assert not canary.exists()


def _refused(path: Path, content: bytes, message: str, memory: int) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as caught:
            read_torch_file(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert re.search(rf"^{path}: .*(?:{message}).*; \w", str(caught.value))
    assert len(str(caught.value)) < 300 + len(str(path))
    assert peak < memory + _MIB // 4


@pytest.mark.parametrize("name", hostile_pickles.PICKLES)
def test_hostile_pickles_are_refused(tmp_path: Path, name: str) -> None:
    build, message = hostile_pickles.PICKLES[name]
    pickled = build()
    big = [forged.Entry("x/data/big", bytes(400_000))] if name == "many times the same memory" else []
    _refused(tmp_path / "x.pth", forged.torch_file(pickled, *big), message, memory=100 * len(pickled))


@pytest.mark.parametrize("name", hostile_files.FILES)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    build, message = hostile_files.FILES[name]
    content = build()
    _refused(tmp_path / "x.pth", content, message, memory=4 * len(content))


def test_endless_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pth_pickle, "_MAX_STEPS", 10)
    _refused(tmp_path / "x.pth", forged.torch_file(), "more than 10 steps", memory=0)
    monkeypatch.setattr(pth_pickle, "_MAX_PICKLE_BYTES", 10)
    _refused(tmp_path / "x.pth", forged.torch_file(), r"data\.pkl has \d+ bytes, more than", memory=0)
    monkeypatch.setattr(pth_zip, "_MAX_DIRECTORY_BYTES", 10)
    _refused(tmp_path / "x.pth", forged.torch_file(), "in a directory of", memory=0)


def _valid(path: Path) -> bytes:
    if not path.exists():
        write_torch_file(
            path, {"w": np.arange(6, dtype="f4").reshape(2, 3), "n": np.array(3), "b": np.ones(3, BFLOAT16)}
        )
    return path.read_bytes()


_PICKLED = forged.state(
    forged.GOOD
    + forged.text("v")
    + forged.tensor(forged.memory(), 2, (3,), (1,))
    + forged.text("_strategy")
    + b"](K\1G?\xf0\0\0\0\0\0\0N\x88e"
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_gives_arrays(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["ours", "theirs", "pickle"]))
    content = {"ours": _valid(tmp_path / "valid.pth"), "theirs": forged.torch_file(), "pickle": _PICKLED}[kind]
    damaged = bytearray(content)
    # Most of a file is padding: half the changes fall where the pickle and the directory are.
    spots = [match.start() for match in re.finditer(rb"\x80\x02|PK|tQ|R", content)]
    places = st.integers(0, len(content) - 1) | st.builds(
        lambda spot, step: min(spot + step, len(content) - 1), st.sampled_from(spots), st.integers(0, 60)
    )
    for _ in range(data.draw(st.integers(0, 4), "changes")):
        damaged[data.draw(places)] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)), "size") :]
    path = tmp_path / "damaged.pth"
    path.write_bytes(forged.torch_file(bytes(damaged)) if kind == "pickle" else damaged)
    try:
        found = read_torch_file(path)
    except WeightsError:
        return
    for name, tensor in found.tensors.items():
        assert isinstance(name, str)
        assert isinstance(tensor, np.ndarray)
        assert tensor.dtype in _DTYPES or tensor.dtype.kind == "u"
        assert len(tensor.tobytes()) == tensor.nbytes <= 16 * path.stat().st_size


def test_no_shorter_file_is_read(tmp_path: Path) -> None:
    content = _valid(tmp_path / "valid.pth")
    for size in range(len(content)):
        path = tmp_path / "cut.pth"
        path.write_bytes(content[:size])
        with pytest.raises(WeightsError, match=r"cut\.pth: "):
            read_torch_file(path)
