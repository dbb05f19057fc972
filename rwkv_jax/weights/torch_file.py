"""PyTorch's .pth files of tensors, read and written without PyTorch, and read without unpickling.

Such a file is a zip of uncompressed entries. `NAME/data.pkl` is a pickle of the dict of tensors; each tensor is in it
as a reference to an entry `NAME/data/KEY`, which holds its numbers, with shape, strides and offset. A pickle is a
program that may call anything, and weights come from strangers: here a small machine understands the few steps that
dicts of tensors take, and refuses a file at the first step that is not one of them. The zip is checked as strictly, so
that each byte has one meaning at most and no file can claim more than it holds.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.weights.tensors import BFLOAT16, MappedTensors, UnsafeFileError, WeightsError, map_file, new_file

Plain: TypeAlias = "bool | int | float | str | list[Plain] | tuple[Plain, ...] | dict[str, Plain] | None"
"""A value that is not a tensor, all the way down."""

_STORAGES = {
    "BFloat16Storage": BFLOAT16,
    "HalfStorage": np.dtype("<f2"),
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "ShortStorage": np.dtype("<i2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "BoolStorage": np.dtype("?"),
}
_STORAGE_CLASSES = {f"torch.{name}": dtype for name, dtype in _STORAGES.items()} | {
    name: np.dtype("u1") for name in ("torch.UntypedStorage", "torch.storage.UntypedStorage")
}
# Of these torch has no typed storages: it writes bytes, and the dtype beside them.
_LATER_DTYPES = {f"torch.{name}": np.dtype(name).newbyteorder("<") for name in ("uint16", "uint32", "uint64")}

_ALLOWED = {
    "collections.OrderedDict",
    "builtins.set",
    "__builtin__.set",  # what protocol 2 calls the same
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    *_STORAGE_CLASSES,
    *_LATER_DTYPES,
}

_OPCODES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_NUMBERS = {"BININT": "<i", "BININT1": "<B", "BININT2": "<H", "BINFLOAT": ">d"}
_TEXTS = {"BINUNICODE": "<I", "SHORT_BINUNICODE": "<B", "BINUNICODE8": "<Q"}
_PUTS = {"BINPUT": "<B", "LONG_BINPUT": "<I"}
_GETS = {"BINGET": "<B", "LONG_BINGET": "<I"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

# A tensor takes about 30 steps and 100 bytes, so this is room for 30,000; and a step takes at most 100 bytes of memory,
# so no pickle takes more than 100 MB. Picklers put at most 2,000 values on the stack at once, and nest little.
_MAX_STEPS = 2**20
_MAX_STACK = 2**14
_MAX_MARKS = 1000
_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_DIRECTORY_BYTES = 64 * 2**20
_MAX_PLAIN_DEPTH = 16
_MAX_DIMENSIONS = 8
_MAX_KEY = 100
_MAX_REPEATS = 16  # of a file's bytes in its tensors: tied ones share bytes, and each is as large as both once copied

_WRAPPERS = ("module", "state_dict", "model")
_ALIGNMENT = 64
_ZIP64_BYTES = 2**30  # below where zipfile would begin with it by itself

_ANEW = "save the plain state dict anew, by torch.save or as .safetensors"
_AGAIN = "it is damaged or cut short: copy or download it again"


class TorchFile(NamedTuple):
    """What a .pth file holds."""

    tensors: MappedTensors
    """By name, in the order of the file."""
    values: dict[str, Plain]
    """What else stands beside the tensors; the files that the `rwkv` package converts have `_strategy` there."""


def read_torch_file(path: Path) -> TorchFile:
    """The tensors of a file by `torch.save`, memory-mapped: nothing is copied, and nothing in the file is run.

    The file is a dict of tensors or of parameters by name, in any of torch's formats since 1.6, of the dtypes bfloat16,
    float16, float32, float64, bool and the integers. A tensor has the strides that it was saved with, and tied ones
    share memory. Where no tensor is at the top, the dict named "module", "state_dict" or "model" there is taken, in
    which DeepSpeed and Lightning wrap theirs; the values beside that dict are checked to be plain and left out.
    Checksums are not compared, as torch does not: that would read the whole file.

    Raises:
      WeightsError: there is no such file, it cannot be read or is empty, or there are no tensors in it.
      UnsafeFileError: it is not such a file, it is damaged, or anything else is in it.
    """
    mapped = map_file(path)
    try:
        entries, prefix = _entries(mapped)
        tensors, values = _split(_Machine(mapped, entries, prefix).run(), entries[f"{prefix}/data.pkl"].size)
        if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_REPEATS * len(mapped):
            _refuse(f"its tensors would take more than {_MAX_REPEATS} times the file once copied")
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: {error}") from None
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors; name a file of weights")
    return TorchFile(MappedTensors(tensors, [mapped]), values)


def _refuse(what: str, remedy: str = _ANEW) -> NoReturn:
    raise UnsafeFileError(f"{what}; {remedy}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


# The zip

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_LISTED = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_SIZES_FOLLOW, _NAME_IS_UTF8 = 0x8, 0x800


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """Positions in the file: of the entry's own header, its content, and what comes next."""

    header: int
    start: int
    stop: int
    end: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def _entries(mapped: mmap.mmap) -> tuple[dict[str, _Entry], str]:
    """The entries of the zip by name, and the folder that all are in."""
    if mapped[:4] != b"PK\3\4":
        _refuse_format(mapped)
    directory, stop, count = _directory(mapped)
    position = directory
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        if position + _LISTED.size > stop:
            _refuse("the zip's directory ends within an entry", _AGAIN)
        listed = _LISTED.unpack_from(mapped, position)
        signature, _, _, flags, method, _, _, checksum, packed, size, *lengths, disk, _, _, header = listed
        if signature != b"PK\1\2":
            _refuse("the zip's directory is not a list of entries", _AGAIN)
        position += _LISTED.size
        end = position + sum(lengths)
        if end > stop:
            _refuse("the zip's directory ends within an entry", _AGAIN)
        raw, extra = mapped[position : position + lengths[0]], mapped[position + lengths[0] : end - lengths[2]]
        position = end
        name = _checked_name(raw)
        if name in entries:
            _refuse(f"the zip has two entries named {_shown(name)}")
        if name.split("/")[1:2] in (["constants.pkl"], ["code"]):
            _refuse(
                "is a TorchScript archive, which holds a program",
                "where torch is installed: torch.save(torch.jit.load(old).state_dict(), new)",
            )
        if flags & ~(_SIZES_FOLLOW | _NAME_IS_UTF8):
            _refuse(f"the zip's entry {_shown(name)} is encrypted or otherwise unusual (flags {flags:#x})")
        if method:
            _refuse(f"the zip's entry {_shown(name)} is compressed, which torch never does (a zip bomb, perhaps)")
        size, packed, header = _with_zip64(name, extra, [size, packed, header])
        if packed != size:
            _refuse(f"the zip's entry {_shown(name)} has {packed} bytes and claims {size}")
        if disk:
            _refuse(f"the zip's entry {_shown(name)} is on another disk: the zip is one part of several")
        entries[name] = _located(mapped, name, raw, flags, checksum, size, header)
    if position != stop:
        _refuse("the zip's directory is longer than its entries", _AGAIN)
    _check_overlaps(entries, directory)
    return entries, _checked_folder(mapped, entries)


def _refuse_format(mapped: mmap.mmap) -> NoReturn:
    if (mapped[:1] == b"\x80" and mapped[1:2] <= b"\5") or mapped[257:262] == b"ustar":
        _refuse(
            "is in the format of torch before 1.6, a bare pickle or tar, which only unpickling can read",
            "where torch is installed: torch.save(torch.load(old, weights_only=True), new)",
        )
    _refuse("is not a zip by torch.save", "name a .pth file of torch 1.6 or later")


def _directory(mapped: mmap.mmap) -> tuple[int, int, int]:
    """Where the directory starts and stops, and how many entries it lists."""
    end = len(mapped) - _END.size
    if end < 0 or mapped[end : end + 4] != b"PK\5\6":
        _refuse("does not end as a zip does", _AGAIN)
    _, disk, first_disk, *fields, comment = _END.unpack_from(mapped, end)
    stop, disks = end, [disk, first_disk]
    locator = end - _LOCATOR64.size
    if locator >= 0 and mapped[locator : locator + 4] == b"PK\6\7":
        _, locator_disk, stop, num_disks = _LOCATOR64.unpack_from(mapped, locator)
        if stop != locator - _END64.size or stop < 0 or mapped[stop : stop + 4] != b"PK\6\6":
            _refuse("the zip64 record is not where the zip says", _AGAIN)
        _, size64, _, _, disk64, first_disk64, *fields64 = _END64.unpack_from(mapped, stop)
        limits = (_MAX16, _MAX16, _MAX32, _MAX32)
        if size64 != _END64.size - 12 or any(
            short not in (long, limit) for short, long, limit in zip(fields, fields64, limits, strict=True)
        ):
            _refuse("the zip64 record contradicts the zip's end", _AGAIN)
        fields = fields64
        disks += [locator_disk, disk64, first_disk64, num_disks > 1]
    here, count, size, start = fields
    if any(disks) or here != count:
        _refuse("the zip is one part of several disks")
    if comment or start + size != stop:
        _refuse("the zip's directory is not where the zip says", _AGAIN)
    if size > _MAX_DIRECTORY_BYTES or count * _LISTED.size > size:
        _refuse(f"the zip claims {count} entries in a directory of {size} bytes", _AGAIN)
    return start, stop, count


def _checked_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        _refuse("the zip has an entry whose name is not UTF-8")
    # No entry is ever written out under its name here, but two programs must not see two different files in one.
    if any(part in ("", ".", "..") for part in name.split("/")) or any(c in name for c in "\\\0"):
        _refuse(f"the zip has an entry whose name is not a plain path: {_shown(name)}")
    return name


def _with_zip64(name: str, extra: bytes, fields: list[int]) -> list[int]:
    """[size, packed size, header position], taken from the zip64 field where they are too large for their own."""
    wide = [i for i, field in enumerate(fields) if field == _MAX32]
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        content = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1 and len(content) == 8 * len(wide):
            for i, (value,) in zip(wide, struct.iter_unpack("<Q", content), strict=True):
                fields[i] = value
            wide = []
    if wide or position != len(extra):
        _refuse(f"the zip64 field of entry {_shown(name)} does not match it", _AGAIN)
    return fields


def _located(mapped: mmap.mmap, name: str, raw: bytes, flags: int, checksum: int, size: int, header: int) -> _Entry:
    """The entry, once its own header says what the directory says."""
    if header + _LOCAL.size > len(mapped):
        _refuse(f"the zip's entry {_shown(name)} lies outside the file", _AGAIN)
    local = _LOCAL.unpack_from(mapped, header)
    signature, _, local_flags, method, _, _, local_checksum, packed, local_size, name_length, extra_length = local
    middle = header + _LOCAL.size + name_length
    start = middle + extra_length
    if start + size > len(mapped):
        _refuse(f"the zip's entry {_shown(name)} lies outside the file", _AGAIN)
    follow = bool(flags & _SIZES_FOLLOW)
    if _MAX32 in (packed, local_size):
        local_size, packed = _with_zip64(name, mapped[middle:start], [local_size, packed])
    same = packed == local_size == size and local_checksum == checksum
    same = same or (follow and packed == local_size == local_checksum == 0)  # torch writes them behind the content
    described = 0
    if follow:
        forms = [struct.pack("<4sI2Q", b"PK\7\x08", checksum, size, size)]
        if size < _MAX32:
            forms.append(struct.pack("<4s3I", b"PK\7\x08", checksum, size, size))
        tail = mapped[start + size : start + size + 24]
        described = max(len(form) if tail.startswith(form) else 0 for form in forms)
        same = same and described > 0
    if (
        not same
        or signature != b"PK\3\4"
        or mapped[header + _LOCAL.size : middle] != raw
        or (local_flags, method) != (flags, 0)
    ):
        _refuse(f"the zip's directory and its entry {_shown(name)} contradict each other", _AGAIN)
    return _Entry(header, start, start + size, start + size + described)


def _check_overlaps(entries: Mapping[str, _Entry], directory: int) -> None:
    free = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].header):
        if entry.header < free or entry.end > directory:
            _refuse(f"the zip's entry {_shown(name)} overlaps another or the directory")
        free = entry.end


def _checked_folder(mapped: mmap.mmap, entries: Mapping[str, _Entry]) -> str:
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1 or f"{min(folders)}/data.pkl" not in entries:
        _refuse("is a zip, but not one of tensors by torch.save: there is no NAME/data.pkl", "name a .pth file")
    (folder,) = folders
    order = entries.get(f"{folder}/byteorder")
    if order is not None and mapped[order.start : min(order.stop, order.start + 16)] != b"little":
        _refuse("was saved on a big-endian machine (its byteorder is not 'little')")
    size = entries[f"{folder}/data.pkl"].size
    if size > _MAX_PICKLE_BYTES:
        _refuse(f"its data.pkl has {size} bytes, more than any dict of tensors needs")
    return folder


# The pickle


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """What a pickle names: never looked up, only compared."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """The bytes of one entry."""

    key: str
    dtype: np.dtype[Any]
    start: int
    num_bytes: int


class _Machine:
    """Carries out the steps of one pickle, or refuses it."""

    def __init__(self, mapped: mmap.mmap, entries: Mapping[str, _Entry], prefix: str) -> None:
        entry = entries[f"{prefix}/data.pkl"]
        self._pickled, self._position = mapped[entry.start : entry.stop], 0
        self._mapped, self._entries, self._prefix = mapped, entries, prefix
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._storages: dict[str, _Storage] = {}

    def run(self) -> dict[str, Any]:
        """The dict that the pickle builds."""
        for _ in range(_MAX_STEPS):
            code = self._read(1)[0]
            name = _OPCODES.get(code)
            if name is None:
                _refuse(f"its pickle has an unknown step {code:#x}", _AGAIN)
            if name == "STOP":
                return self._result()
            self._step(name)
            if len(self._stack) > _MAX_STACK or len(self._marks) > _MAX_MARKS:
                _refuse("its pickle piles up more values than a dict of tensors needs")
        _refuse(f"its pickle has more than {_MAX_STEPS} steps")

    def _result(self) -> dict[str, Any]:
        state = self._pop("STOP")
        if self._stack or self._marks:
            _refuse("its pickle leaves values behind at STOP")
        if self._position != len(self._pickled):
            _refuse("its pickle goes on after STOP")
        if not isinstance(state, dict):
            _refuse(f"it holds a {_kind(state)}, not a dict of tensors")
        return state

    def _step(self, name: str) -> None:
        """Carries out one step; those that dicts of tensors have most come first."""
        stack = self._stack
        if name in _PUTS:
            self._memorise(self._number(_PUTS[name]))
        elif name in _NUMBERS:
            stack.append(self._number(_NUMBERS[name]))
        elif name in _GETS:
            index = self._number(_GETS[name])
            if index >= len(self._memo):
                _refuse(f"its pickle recalls value {index}, of {len(self._memo)} in its memo ({name})")
            stack.append(self._memo[index])
        elif name in _TEXTS:
            stack.append(self._text(self._number(_TEXTS[name])))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(reversed([self._pop(name) for _ in range(_TUPLES[name])])))
        else:
            self._rarer_step(name)

    def _rarer_step(self, name: str) -> None:
        stack = self._stack
        match name:
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                items = self._pop_to_mark(name)
                stack.append(tuple(items))
            case "BINPERSID":
                stack.append(self._storage(self._pop(name)))
            case "REDUCE":
                arguments, function = self._pop(name), self._pop(name)
                stack.append(self._call(function, arguments))
            case "GLOBAL":
                stack.append(_allowed(self._line(), self._line()))
            case "STACK_GLOBAL":
                attribute, module = self._pop(name), self._pop(name)
                if type(module) is not str or type(attribute) is not str:
                    _refuse("its pickle names something by other than text (STACK_GLOBAL)")
                stack.append(_allowed(module, attribute))
            case "MEMOIZE":
                self._memorise(len(self._memo))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":  # a set is read as a list: nothing is hashed that a stranger chose
                stack.append([])
            case "SETITEM":
                value, key = self._pop(name), self._pop(name)
                self._set_items(name, [key, value])
            case "SETITEMS":
                self._set_items(name, self._pop_to_mark(name))
            case "APPEND":
                self._append(name, [self._pop(name)])
            case "APPENDS" | "ADDITEMS":
                self._append(name, self._pop_to_mark(name))
            case "LONG1":
                stack.append(int.from_bytes(self._read(self._number("<B")), "little", signed=True))
            case "BUILD":
                # torch notes the versions of modules as an attribute of their state dict; nothing needs it.
                attributes = self._pop(name)
                if type(self._top(name)) is not OrderedDict or not (
                    isinstance(attributes, dict) and attributes.keys() <= {"_metadata"}
                ):
                    _refuse(f"its pickle sets the state of a {_kind(self._top(name))} (BUILD)")
            case "PROTO":
                if self._number("<B") > 5 or self._position != 2:
                    _refuse("its pickle is of an unknown protocol (PROTO)")
            case "FRAME":
                self._number("<Q")  # only tells how much to read at once
            case _:
                _refuse(f"its pickle has a step that no dict of tensors needs: {name}")

    # What the pickle's bytes say

    def _read(self, size: int) -> bytes:
        content = self._pickled[self._position : self._position + size]
        if len(content) != size:
            _refuse("its pickle ends too soon", _AGAIN)
        self._position += size
        return content

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._read(struct.calcsize(code)))[0]

    def _text(self, size: int) -> str:
        try:
            return self._read(size).decode("utf-8")
        except UnicodeDecodeError:
            _refuse("its pickle has text that is not UTF-8", _AGAIN)

    def _line(self) -> str:
        end = self._pickled.find(b"\n", self._position)
        if end < 0:
            _refuse("its pickle ends too soon", _AGAIN)
        text = self._text(end - self._position)
        self._position += 1
        return text

    # Stack and memo

    def _top(self, name: str) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            _refuse(f"its pickle takes a value where there is none ({name})")
        return self._stack[-1]

    def _pop(self, name: str) -> Any:
        value = self._top(name)
        del self._stack[-1]
        return value

    def _pop_to_mark(self, name: str) -> list[Any]:
        if not self._marks:
            _refuse(f"its pickle goes back to a mark that it never made ({name})")
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _memorise(self, index: int) -> None:
        # Picklers count up. That also makes the memo no longer than the pickle.
        if index > len(self._memo):
            _refuse(f"its pickle memorises value {index} when there are {len(self._memo)}")
        self._memo[index : index + 1] = [self._top("PUT")]

    def _set_items(self, name: str, items: list[Any]) -> None:
        target = self._top(name)
        if not isinstance(target, dict) or len(items) % 2:
            _refuse(f"its pickle gives items to a {_kind(target)} ({name})")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                _refuse(f"it has a dict with a {_kind(key)} for a key, not text")
            if key in target:
                _refuse(f"it has two values named {_shown(key)}")
            target[key] = value

    def _append(self, name: str, items: list[Any]) -> None:
        target = self._top(name)
        if not isinstance(target, list):
            _refuse(f"its pickle appends to a {_kind(target)} ({name})")
        target.extend(items)

    # What names and references mean

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.text if isinstance(function, _Name) else f"a {_kind(function)}"
        match name, arguments if type(arguments) is tuple else None:
            case "collections.OrderedDict", ():
                return OrderedDict()
            case (("builtins.set" | "__builtin__.set"), (list() as items,)):
                return items  # not a copy: a pickle may ask for any number of these
            case "torch.Size", (tuple() as shape,):
                return shape
            case "torch._utils._rebuild_parameter", (np.ndarray() as tensor, bool(), OrderedDict() as hooks) if (
                not hooks
            ):
                return tensor
            case (
                "torch._utils._rebuild_tensor_v2",
                (_Storage() as storage, offset, shape, strides, bool(), OrderedDict() as hooks),
            ) if not hooks:
                return self._tensor(storage, storage.dtype, offset, shape, strides)
            case (
                "torch._utils._rebuild_tensor_v3",
                (_Storage() as storage, offset, shape, strides, bool(), OrderedDict() as hooks, _Name(text=dtype)),
            ) if not hooks and storage.dtype.itemsize == 1 and dtype in _LATER_DTYPES:
                return self._tensor(storage, _LATER_DTYPES[dtype], offset, shape, strides)
        _refuse(f"its pickle calls {name} in a way that no plain tensor needs (REDUCE)")

    def _storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", _Name(text=kind), str() as key, str(), int() as count) if (
                kind in _STORAGE_CLASSES and len(key) <= _MAX_KEY and type(count) is int and 0 <= count < 2**63
            ):
                dtype = _STORAGE_CLASSES[kind]
            case _:
                _refuse("its pickle refers to something that is not a tensor's memory (BINPERSID)")
        entry = self._entries.get(f"{self._prefix}/data/{key}")
        if entry is None:
            _refuse(f"the memory {_shown(key)} of a tensor is not in the zip", _AGAIN)
        if count * dtype.itemsize > entry.size:
            _refuse(f"{count} elements of {kind} are claimed for the {entry.size} bytes of data/{key}")
        storage = _Storage(key, dtype, entry.start, count * dtype.itemsize)
        known = self._storages.setdefault(key, storage)
        if known != storage:
            _refuse(f"the memory data/{key} is claimed with two dtypes or sizes")
        return known

    def _tensor(self, storage: _Storage, dtype: np.dtype[Any], offset: Any, shape: Any, strides: Any) -> NDArray:
        where = f"a tensor in data/{storage.key}"
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            _refuse(f"{where} has a shape and strides that do not go together")
        if any(type(number) is not int or not 0 <= number < 2**63 for number in (offset, *shape, *strides)):
            _refuse(f"{where} has an offset, shape or stride that is not a whole number from 0 to 2^63")
        if len(shape) > _MAX_DIMENSIONS:
            _refuse(f"{where} has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}")
        count = storage.num_bytes // dtype.itemsize
        if 0 in shape:
            # NumPy multiplies the sizes that are not 0 even so.
            if offset > count or math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**62:
                _refuse(f"{where} is empty, but of an offset or a shape too large")
            empty = np.ndarray(shape, dtype)
            empty.flags.writeable = False
            return empty
        # Each stride must step over all that smaller ones reach: then no two elements share memory, and what a copy
        # takes is bounded by what the file has. Of size 1 any stride will do, and torch writes any.
        last = 0
        for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
            if stride <= last:
                _refuse(f"{where} repeats its own elements (expanded or overlapping strides)")
            last += stride * (size - 1)
        if offset + last >= count:
            _refuse(f"{where} reaches element {offset + last} of {count}")
        byte_strides = [
            stride * dtype.itemsize if size > 1 else dtype.itemsize for stride, size in zip(strides, shape, strict=True)
        ]
        return np.ndarray(shape, dtype, self._mapped, storage.start + offset * dtype.itemsize, byte_strides)


def _allowed(module: str, attribute: str) -> _Name:
    name = f"{module}.{attribute}"
    if name not in _ALLOWED:
        _refuse(f"its pickle names {_shown(name)}, which is no part of a plain dict of tensors")
    return _Name(name)


def _kind(value: Any) -> str:
    return {_Name: "name", _Storage: "tensor's memory", np.ndarray: "tensor"}.get(type(value), type(value).__name__)


def _split(state: dict[str, Any], limit: int) -> tuple[dict[str, NDArray], dict[str, Plain]]:
    """The tensors of a state dict, unwrapped if need be, and the other values beside them: `limit` of these at most."""
    if not _holds_tensors(state):
        wrappers = [name for name in _WRAPPERS if _holds_tensors(state.get(name))]
        if len(wrappers) > 1:
            _refuse(f"it has tensors in both {wrappers[0]!r} and {wrappers[1]!r}")
        if wrappers:
            _plain_values({name: value for name, value in state.items() if name != wrappers[0]}, limit)
            state = state[wrappers[0]]
    tensors = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    return tensors, _plain_values({name: value for name, value in state.items() if name not in tensors}, limit)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, np.ndarray) for item in value.values())


def _plain_values(values: dict[str, Any], limit: int) -> dict[str, Plain]:
    """Copies that share nothing: what a few steps nest a billion times is refused here, not where it is printed."""
    left = min(limit, _MAX_STEPS)

    def copied(value: Any, depth: int) -> Plain:
        nonlocal left
        left -= 1
        if depth > _MAX_PLAIN_DEPTH or left < 0:
            _refuse(f"the values beside its tensors are nested deeper than {_MAX_PLAIN_DEPTH} or too many")
        match value:
            case None | bool() | int() | float() | str():
                return value
            case list():
                return [copied(item, depth + 1) for item in value]
            case tuple():
                return tuple(copied(item, depth + 1) for item in value)
            case dict():
                return {name: copied(item, depth + 1) for name, item in value.items()}
        _refuse(f"it has a {_kind(value)} within the values beside its tensors")

    return {name: copied(value, 0) for name, value in values.items()}


# Writing


def write_torch_file(path: Path, tensors: Mapping[str, NDArray]) -> None:
    """Writes a file that `torch.load` of 1.13 and later reads, with `weights_only=True` and `mmap=True` too.

    It appears whole or not at all, and never in the place of another. Each tensor is asked for once and written before
    the next, so a mapping that makes them as they are asked for takes the memory of one. The same tensors give the same
    bytes. Tied tensors are written once for each name.

    Raises:
      WeightsError: the file exists or cannot be written, there are no tensors, or one has a dtype other than bfloat16,
        float16, float32, float64, bool, uint8, int8, int16, int32 and int64.
    """
    storages = {dtype.name: name for name, dtype in _STORAGES.items()}
    pickled = [b"\x80\x02}"]
    with new_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, content: bytes | memoryview) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # as on Linux, so that the bytes are the same on each system
            size = entry.file_size = len(content)
            zip64 = size > _ZIP64_BYTES
            header = _LOCAL.size + len(entry.filename.encode()) + (20 if zip64 else 0)
            padding = -(file.tell() + header + 4) % _ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            with archive.open(entry, "w", force_zip64=zip64) as target:
                target.write(content)

        for key, name in enumerate(tensors):
            tensor = tensors[name]
            storage = storages.get(tensor.dtype.name)
            if storage is None:
                raise WeightsError(
                    f"{path}: {name!r} is {tensor.dtype}, which not every torch can read; convert it to one of "
                    f"{', '.join(storages)}"
                )
            pickled.append(_pickled_tensor(path, name, storage, str(key), tensor.shape))
            flat = np.ascontiguousarray(tensor, _STORAGES[storage]).reshape(-1).view(np.uint8)
            write(f"data/{key}", flat.data)
            del tensor, flat
        if len(pickled) == 1:
            raise WeightsError(f"{path}: there are no tensors to write")
        write("data.pkl", b"".join([*pickled, b"."]))
        write("byteorder", b"little")
        write("version", b"3\n")


def _pickled_tensor(path: Path, name: str, storage: str, key: str, shape: tuple[int, ...]) -> bytes:
    """The steps that put one contiguous tensor into the dict."""
    try:
        text = _pickled_text(name)
    except UnicodeEncodeError as error:
        raise WeightsError(f"{path}: the name {name!r} cannot be written as UTF-8; rename the tensor") from error
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return b"".join(
        [
            text,
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _pickled_text("storage"),
            b"ctorch\n" + storage.encode() + b"\n",
            _pickled_text(key),
            _pickled_text("cpu"),
            *_pickled_integers((math.prod(shape),)),
            b"tQ",
            *_pickled_integers((0,)),
            b"(",
            *_pickled_integers(shape),
            b"t(",
            *_pickled_integers(strides),
            b"t\x89ccollections\nOrderedDict\n)RtRs",
        ]
    )


def _pickled_text(text: str) -> bytes:
    content = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(content)) + content


def _pickled_integers(numbers: tuple[int, ...]) -> Iterator[bytes]:
    for number in numbers:
        yield b"J" + struct.pack("<i", number) if number < 2**31 else b"\x8a\x08" + struct.pack("<q", number)
