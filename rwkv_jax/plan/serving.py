"""What a server of a model keeps on its device, in closed form: weights, slots and states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rwkv_jax.config import ModelConfig
from rwkv_jax.tables import format_table

_ITEM_BYTES = {"float64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "uint8": 1}
_GIB = 2**30
_LINK = 25e9  # bytes a second from the host, of PCIe 4.0 x16


class Format(NamedTuple):
    """A number format of weights, and what the model computes in then."""

    weight_bytes: int
    config: ModelConfig


def state_bytes(config: ModelConfig) -> int:
    """Bytes of one text's state with the logits after it: a `Snapshot`, as caches and stores keep it."""
    arrays = (array for layer in range(config.num_layers) for array in config.spec.layer_state(config, layer))
    of_state = sum(math.prod(array.shape) * _ITEM_BYTES[array.dtype] for array in arrays)
    return of_state + config.vocab_size * _ITEM_BYTES[config.parameter_dtype]


def slot_bytes(config: ModelConfig) -> int:
    """Bytes of a slot: its state, that before its last burst, and tables of the vocabulary for sampling.

    These are counts and biases in float32, and a byte for whether a token ends the text. The number of its adapter's
    place takes 4 bytes.
    """
    return 2 * state_bytes(config) + config.vocab_size * (4 + 4 + 1) + 4


def describe_server(formats: Mapping[str, Format], *, num_slots: int, prefix_bytes: int, memory: float | None) -> str:
    """A table with a line for each format.

    Args:
      formats: by name.
      memory: GiB of the device; None leaves out how many slots it would hold.
    """
    return "\n".join(_lines(formats, num_slots, prefix_bytes, memory))


def _lines(formats: Mapping[str, Format], num_slots: int, prefix_bytes: int, memory: float | None) -> Iterator[str]:
    config = next(iter(formats.values())).config
    yield (
        f"{config.title}, {config.num_layers} layers of width {config.width}, vocabulary {config.vocab_size}; "
        f"{num_slots} slots, a prefix cache of {_size(prefix_bytes)}\n"
    )
    rows = [["weights", "computed in", "bytes", "a state", "a slot", f"{num_slots} slots", "in all"]]
    if memory is not None:
        rows[0].append(f"slots in {memory:g} GiB")
    for name, (weights, own) in formats.items():
        slot = slot_bytes(own)
        total = weights + num_slots * slot + prefix_bytes
        cells = [name, own.dtype, *map(_size, (weights, state_bytes(own), slot, num_slots * slot, total))]
        if memory is not None:
            cells.append(str(max(0, int(memory * _GIB - weights - prefix_bytes) // slot)))
        rows.append(cells)
    yield format_table(rows, "<<" + ">" * (len(rows[0]) - 2))
    yield from _table_lines(formats)
    yield "\nA state is what the prefix cache, sessions and the store keep of a conversation. Not counted is what"
    yield "programs need while they run, mostly for a prefill; and a GPU leaves a part of its memory to its driver."


def _table_lines(formats: Mapping[str, Format]) -> Iterator[str]:
    """What tables by token take, and what fetching their rows from the host's memory costs; nothing without any."""
    for name, (_, config) in formats.items():
        numbers = config.num_layers * config.spec.table_row(config)
        if not numbers or name.startswith("--quantize"):
            continue
        size = _ITEM_BYTES[config.dtype if name.startswith("--dtype") else config.parameter_dtype]
        row = numbers * size
        yield (
            f"\nOf the weights {name}, {_size(config.vocab_size * row)} are tables by token. With --tables host they "
            f"stay in the\nhost's memory, and a token fetches {row / 1024:,.1f} KiB of it: "
            f"{row / _LINK * 1e6:.1f} us over a link of {_LINK / 1e9:g} GB/s, besides the callbacks."
        )


def _size(num_bytes: int) -> str:
    unit, name = (_GIB, "GiB") if num_bytes >= _GIB else (2**20, "MiB")
    return f"{num_bytes / unit:,.2f} {name}"
