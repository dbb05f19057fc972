"""Interprets the pickle in a .pth file with a machine that can only build dicts of tensors.

A pickle is a program that may call anything. The machine knows the few steps that such dicts take and refuses a pickle
at the first step that is not one of them. It looks up no name and calls nothing: a name is text to be compared with a
short list, and a tensor becomes a view of the bytes of a zip's entry once its offset, shape and strides are found to
stay within them. It trusts `zip` that entries lie within the file, and the pickle for nothing: its size, its
steps and its stack are bounded, so none takes more time and memory than that of a large model. What it builds may nest
and share without end, though: whoever walks through it must count.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.checks import shown
from rwkv_jax.weights.fp8 import FLOAT8
from rwkv_jax.weights.pth.rejection import AGAIN, reject
from rwkv_jax.weights.pth.zip import Entry
from rwkv_jax.weights.tensors import BFLOAT16

STORAGES: dict[str, np.dtype[Any]] = {
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
"""The dtypes that have classes of memory in torch, by the names of these."""

_STORAGE_CLASSES = {f"torch.{name}": dtype for name, dtype in STORAGES.items()} | {
    name: np.dtype("u1") for name in ("torch.UntypedStorage", "torch.storage.UntypedStorage")
}
# Of these torch has no typed storages: it writes bytes, and the dtype beside them.
_LATER_DTYPES = {f"torch.{name}": np.dtype(name).newbyteorder("<") for name in ("uint16", "uint32", "uint64")}
_LATER_DTYPES |= {f"torch.{dtype.name}": dtype for dtype in FLOAT8.values()}

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
_MAX_DIMENSIONS = 8
_MAX_KEY = 100


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


def read_pickle(mapped: mmap.mmap, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The dict that the entry `data.pkl` builds: tensors are read-only views of the file, all else is as it was built.

    Raises:
      UnsafeFileError: the pickle takes a step, names a thing or claims memory that no dict of tensors needs.
    """
    return _Machine(mapped, entries).run()


def kind_of(value: Any) -> str:
    """What a value out of `read_pickle` is, for a message."""
    return {_Name: "name", _Storage: "tensor's memory", np.ndarray: "tensor"}.get(type(value), type(value).__name__)


class _Machine:
    """Carries out the steps of one pickle, or refuses it."""

    def __init__(self, mapped: mmap.mmap, entries: Mapping[str, Entry]) -> None:
        entry = entries["data.pkl"]
        if entry.size > _MAX_PICKLE_BYTES:
            reject(f"its data.pkl has {entry.size} bytes, more than any dict of tensors needs")
        self._pickled, self._position = mapped[entry.start : entry.stop], 0
        self._mapped, self._entries = mapped, entries
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
                reject(f"its pickle has an unknown step {code:#x}", AGAIN)
            if name == "STOP":
                return self._result()
            self._step(name)
            if len(self._stack) > _MAX_STACK or len(self._marks) > _MAX_MARKS:
                reject("its pickle piles up more values than a dict of tensors needs")
        reject(f"its pickle has more than {_MAX_STEPS} steps")

    def _result(self) -> dict[str, Any]:
        state = self._pop("STOP")
        if self._stack or self._marks:
            reject("its pickle leaves values behind at STOP")
        if self._position != len(self._pickled):
            reject("its pickle goes on after STOP")
        if not isinstance(state, dict):
            reject(f"it holds a {kind_of(state)}, not a dict of tensors")
        return state

    def _step(self, name: str) -> None:
        """Carries out one step; those that dicts of tensors have most come first."""
        stack = self._stack
        if name in _PUTS:
            self._memorize(self._number(_PUTS[name]))
        elif name in _NUMBERS:
            stack.append(self._number(_NUMBERS[name]))
        elif name in _GETS:
            index = self._number(_GETS[name])
            if index >= len(self._memo):
                reject(f"its pickle recalls value {index}, of {len(self._memo)} in its memo ({name})")
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
                    reject("its pickle names something by other than text (STACK_GLOBAL)")
                stack.append(_allowed(module, attribute))
            case "MEMOIZE":
                self._memorize(len(self._memo))
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
                    reject(f"its pickle sets the state of a {kind_of(self._top(name))} (BUILD)")
            case "PROTO":
                if self._number("<B") > 5 or self._position != 2:
                    reject("its pickle is of an unknown protocol (PROTO)")
            case "FRAME":
                self._number("<Q")  # only tells how much to read at once
            case _:
                reject(f"its pickle has a step that no dict of tensors needs: {name}")

    # What the pickle's bytes say

    def _read(self, size: int) -> bytes:
        content = self._pickled[self._position : self._position + size]
        if len(content) != size:
            reject("its pickle ends too soon", AGAIN)
        self._position += size
        return content

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._read(struct.calcsize(code)))[0]

    def _text(self, size: int) -> str:
        try:
            return self._read(size).decode("utf-8")
        except UnicodeDecodeError:
            reject("its pickle has text that is not UTF-8", AGAIN)

    def _line(self) -> str:
        end = self._pickled.find(b"\n", self._position)
        if end < 0:
            reject("its pickle ends too soon", AGAIN)
        text = self._text(end - self._position)
        self._position += 1
        return text

    # Stack and memo

    def _top(self, name: str) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            reject(f"its pickle takes a value where there is none ({name})")
        return self._stack[-1]

    def _pop(self, name: str) -> Any:
        value = self._top(name)
        del self._stack[-1]
        return value

    def _pop_to_mark(self, name: str) -> list[Any]:
        if not self._marks:
            reject(f"its pickle goes back to a mark that it never made ({name})")
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _memorize(self, index: int) -> None:
        # Picklers count up. That also makes the memo no longer than the pickle.
        if index > len(self._memo):
            reject(f"its pickle memorizes value {index} when there are {len(self._memo)}")
        self._memo[index : index + 1] = [self._top("PUT")]

    def _set_items(self, name: str, items: list[Any]) -> None:
        target = self._top(name)
        if not isinstance(target, dict) or len(items) % 2:
            reject(f"its pickle gives items to a {kind_of(target)} ({name})")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                reject(f"it has a dict with a {kind_of(key)} for a key, not text")
            if key in target:
                reject(f"it has two values named {shown(key)}")
            target[key] = value

    def _append(self, name: str, items: list[Any]) -> None:
        target = self._top(name)
        if not isinstance(target, list):
            reject(f"its pickle appends to a {kind_of(target)} ({name})")
        target.extend(items)

    # What names and references mean

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.text if isinstance(function, _Name) else f"a {kind_of(function)}"
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
        reject(f"its pickle calls {name} in a way that no plain tensor needs (REDUCE)")

    def _storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", _Name(text=kind), str() as key, str(), int() as count) if (
                kind in _STORAGE_CLASSES and len(key) <= _MAX_KEY and type(count) is int and 0 <= count < 2**63
            ):
                dtype = _STORAGE_CLASSES[kind]
            case _:
                reject("its pickle refers to something that is not a tensor's memory (BINPERSID)")
        entry = self._entries.get(f"data/{key}")
        if entry is None:
            reject(f"the memory {shown(key)} of a tensor is not in the zip", AGAIN)
        if count * dtype.itemsize > entry.size:
            reject(f"{count} elements of {kind} are claimed for the {entry.size} bytes of data/{key}")
        storage = _Storage(key, dtype, entry.start, count * dtype.itemsize)
        known = self._storages.setdefault(key, storage)
        if known != storage:
            reject(f"the memory data/{key} is claimed with two dtypes or sizes")
        return known

    def _tensor(self, storage: _Storage, dtype: np.dtype[Any], offset: Any, shape: Any, strides: Any) -> NDArray:
        where = f"a tensor in data/{storage.key}"
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            reject(f"{where} has a shape and strides that do not go together")
        if any(type(number) is not int or not 0 <= number < 2**63 for number in (offset, *shape, *strides)):
            reject(f"{where} has an offset, shape or stride that is not a whole number from 0 to 2^63")
        if len(shape) > _MAX_DIMENSIONS:
            reject(f"{where} has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}")
        count = storage.num_bytes // dtype.itemsize
        if 0 in shape:
            # NumPy multiplies the sizes that are not 0 even so.
            if offset > count or math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**62:
                reject(f"{where} is empty, but of an offset or a shape too large")
            empty = np.ndarray(shape, dtype)
            empty.flags.writeable = False
            return empty
        # Each stride must step over all that smaller ones reach: then no two elements share memory, and what a copy
        # takes is bounded by what the file has. Of size 1 any stride will do, and torch writes any.
        last = 0
        for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
            if stride <= last:
                reject(f"{where} repeats its own elements (expanded or overlapping strides)")
            last += stride * (size - 1)
        if offset + last >= count:
            reject(f"{where} reaches element {offset + last} of {count}")
        byte_strides = [
            stride * dtype.itemsize if size > 1 else dtype.itemsize for stride, size in zip(strides, shape, strict=True)
        ]
        return np.ndarray(shape, dtype, self._mapped, storage.start + offset * dtype.itemsize, byte_strides)


def _allowed(module: str, attribute: str) -> _Name:
    name = f"{module}.{attribute}"
    if name not in _ALLOWED:
        reject(f"its pickle names {shown(name)}, which is no part of a plain dict of tensors")
    return _Name(name)
