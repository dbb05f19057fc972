"""GGUF and ggmf files put together field by field: true ones, and such as no program writes.

`gguf_model(config)` and `ggmf_model(config)` are files that are read; a case changes one thing of them.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.ggml.names import ARCHITECTURES
from rwkv_jax.weights.layouts import to_rules
from tests.weights.files import random_tensors

F32 = 0
TEXT, ARRAY, BOOL, U32, FLOAT = 8, 9, 7, 4, 6


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return u64(len(content) if length is None else length) + content


def texts(values: list[str], count: int | None = None) -> bytes:
    """The value of an array of texts, with its type."""
    return u32(ARRAY) + u32(TEXT) + u64(len(values) if count is None else count) + b"".join(map(text, values))


def value(x: Any) -> bytes:
    """A value with its type; bytes are one already."""
    if isinstance(x, bytes):
        return x
    if isinstance(x, bool):
        return u32(BOOL) + bytes([x])
    if isinstance(x, str):
        return u32(TEXT) + text(x)
    return u32(FLOAT) + struct.pack("<f", x) if isinstance(x, float) else u32(U32) + u32(x)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file; what is None is as it should be."""

    name: str | bytes
    shape: tuple[int, ...]
    content: bytes
    kind: int = F32
    offset: int | None = None
    num_axes: int | None = None


@dataclasses.dataclass
class GGUF:
    """A GGUF file."""

    metadata: dict[str, Any]
    tensors: list[Entry]
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_keys: int | None = None
    keys: bytes = b""
    """Further keys and values, as bytes."""
    alignment: int = 32
    behind: bytes = b""

    def header(self) -> bytes:
        """All before the tensors' bytes."""
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.metadata) + bool(self.keys) if self.num_keys is None else self.num_keys
        content = self.magic + u32(self.version) + u64(num_tensors) + u64(num_keys)
        content += b"".join(text(key) + value(x) for key, x in self.metadata.items()) + self.keys
        offset = 0
        for entry in self.tensors:
            content += text(entry.name) + u32(len(entry.shape) if entry.num_axes is None else entry.num_axes)
            content += b"".join(map(u64, reversed(entry.shape)))
            content += u32(entry.kind) + u64(offset if entry.offset is None else entry.offset)
            offset += self.padded(len(entry.content))
        return content

    def padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    def bytes(self) -> bytes:
        header = self.header()
        content = [header.ljust(self.padded(len(header)), b"\0")]
        content += [entry.content.ljust(self.padded(len(entry.content)), b"\0") for entry in self.tensors]
        return b"".join(content) + self.behind

    def tensor(self, of: str, /, **changes: Any) -> GGUF:
        """With one tensor changed."""
        assert of in [entry.name for entry in self.tensors], of
        changed = [dataclasses.replace(x, **changes) if x.name == of else x for x in self.tensors]
        return dataclasses.replace(self, tensors=changed)

    def without(self, name: str) -> GGUF:
        """With one tensor less."""
        return dataclasses.replace(self, tensors=[entry for entry in self.tensors if entry.name != name])

    def told(self, **changes: Any) -> GGUF:
        """With changed metadata; __ stands for a dot, and None takes a key away."""
        metadata = self.metadata | {key.replace("__", "."): x for key, x in changes.items()}
        return dataclasses.replace(self, metadata={key: x for key, x in metadata.items() if x is not None})


def gguf_model(config: ModelConfig, tensors: Mapping[str, NDArray] | None = None) -> GGUF:
    """A model in float32, with random numbers unless some are given."""
    architecture = ARCHITECTURES[f"rwkv{config.generation}"]
    official = dict(random_tensors(config) if tensors is None else tensors)
    foreign = to_rules(official, architecture.rules(config.head_dim), "llama.cpp")
    metadata = {"general.architecture": architecture.name, **architecture.sizes(config)}
    entries = [Entry(name, x.shape, np.ascontiguousarray(x, "<f4").tobytes()) for name, x in foreign.items()]
    return GGUF(metadata, entries)


@dataclasses.dataclass(frozen=True)
class GGMFTensor:
    """A tensor of a ggmf file."""

    name: str | bytes
    shape: tuple[int, ...]
    content: bytes
    kind: int = F32
    num_axes: int | None = None
    length: int | None = None

    def bytes(self) -> bytes:
        name = self.name.encode() if isinstance(self.name, str) else self.name
        num_axes = len(self.shape) if self.num_axes is None else self.num_axes
        length = len(name) if self.length is None else self.length
        header = struct.pack("<3I", num_axes, length, self.kind)
        return header + b"".join(map(u32, reversed(self.shape))) + name + self.content


@dataclasses.dataclass
class GGMF:
    """A ggmf file."""

    vocab_size: int
    width: int
    num_layers: int
    tensors: list[GGMFTensor]
    version: int = 101
    kind: int = F32
    behind: bytes = b""

    def bytes(self) -> bytes:
        header = struct.pack("<4s5I", b"fmgg", self.version, self.vocab_size, self.width, self.num_layers, self.kind)
        return header + b"".join(tensor.bytes() for tensor in self.tensors) + self.behind

    def tensor(self, of: str, /, **changes: Any) -> GGMF:
        """With one tensor changed."""
        assert of in [entry.name for entry in self.tensors], of
        changed = [dataclasses.replace(x, **changes) if x.name == of else x for x in self.tensors]
        return dataclasses.replace(self, tensors=changed)


def ggmf_model(config: ModelConfig, tensors: Mapping[str, NDArray] | None = None) -> GGMF:
    """A model in float32 as rwkv.cpp's converter writes it."""
    official = dict(random_tensors(config) if tensors is None else tensors)
    held = {}
    for name, tensor in official.items():
        if ".att.x_" in name:
            if name.endswith("x_r"):
                prefix = name.removesuffix("r")
                held[f"{prefix}rwkvag"] = np.concatenate([official[prefix + x] for x in "rwkvag"])
        else:
            held[name] = _CHANGES[config.generation](name.split(".", 2)[-1], tensor)
    entries = [GGMFTensor(name, x.shape, np.ascontiguousarray(x, "<f4").tobytes()) for name, x in held.items()]
    return GGMF(config.vocab_size, config.width, config.num_layers, entries)


def _of_4(name: str, x: NDArray) -> NDArray:
    if name == "att.time_decay":
        return -np.exp(x)
    return x.squeeze() if ".time_" in name else x


def _of_5(name: str, x: NDArray) -> NDArray:
    x = x.squeeze() if ".time_" in name else x
    if name == "att.time_decay":
        x = np.exp(-np.exp(x))
    elif name == "att.time_first":
        x = np.exp(x)
    if name in ("att.time_decay", "att.time_first", "att.time_faaaa"):
        return x.reshape(*x.shape, *(1,) * (3 - x.ndim))
    return x


def _of_6(name: str, x: NDArray) -> NDArray:
    if name.endswith(("_w1", "_w2")):
        return x.swapaxes(-1, -2)
    x = x.squeeze() if ".time_" in name else x
    return (
        x.reshape(*x.shape, 1) if name == "att.time_faaaa" else x.reshape(4, -1, 1) if name == "att.time_decay" else x
    )


def _of_7(name: str, x: NDArray) -> NDArray:
    return x.T if name[-1] in "12" and name[:-1] in [f"att.{letter}" for letter in "wavg"] else x


_CHANGES: dict[str, Callable[[str, NDArray], NDArray]] = {
    "4": _of_4,
    "5.0": _of_5,
    "5.2": _of_5,
    "6": _of_6,
    "7": _of_7,
}
