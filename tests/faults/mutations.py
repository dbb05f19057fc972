"""Seeded faults in the bytes of a file: what disks, copies, editors and strangers do to one."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

_DEEP = "a value nested 100,000 deep"
_OTHER_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 1e308, 2**31, 2**64, 10**30, "", "x", "0", "\ud800", "é", "a" * 5000),
    *([], {}, [[[]]], {"a": {"b": []}}, [1, "x", None], _DEEP),
]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    start, size = _place(content, rng), rng.choice([1, 4, 16])
    fill = rng.choice([rng.randbytes(size), b"\0" * size, b"\xff" * size])
    return content[:start] + fill + content[start + size :]


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([0, 1, _place(content, rng), len(content) - 1])]


def _insert(content: bytes, rng: random.Random) -> bytes:
    place = rng.choice([_place(content, rng), len(content)])
    return content[:place] + rng.randbytes(rng.choice([1, 8, 100])) + content[place:]


def _delete(content: bytes, rng: random.Random) -> bytes:
    start = _place(content, rng)
    return content[:start] + content[start + rng.choice([1, 8, 100]) :]


def _duplicate(content: bytes, rng: random.Random) -> bytes:
    start, stop = sorted([_place(content, rng), _place(content, rng)])
    return content[:stop] + content[start:stop] + content[stop:]


def _swap_blocks(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice([1, 16, max(1, len(content) // 8)])
    first, second = sorted(rng.randrange(max(1, len(content) - size)) for _ in range(2))
    if second < first + size:
        return _flip(content, rng)
    middle = content[first + size : second]
    return b"".join(
        [
            content[:first],
            content[second : second + size],
            middle,
            content[first : first + size],
            content[second + size :],
        ]
    )


def _place(content: bytes, rng: random.Random) -> int:
    """A position; those near the start, where formats have their headers, as often as all others."""
    return rng.randrange(max(1, rng.choice([min(len(content), 256), len(content)])))


BYTES: dict[str, Mutation] = {
    "flip": _flip,
    "overwrite": _overwrite,
    "truncate": _truncate,
    "insert": _insert,
    "delete": _delete,
    "duplicate": _duplicate,
    "swap blocks": _swap_blocks,
}
"""Faults that know no format."""


def _change_json(content: bytes, rng: random.Random) -> bytes:
    """Replaces a value by one of another type or by that of its neighbor, or takes it out or renames it."""
    root = json.loads(content)
    parents = list(_containers(root))
    parent = rng.choice(parents)
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    match rng.choice(["other type", "other type", "neighbor", "missing", "renamed", "nested"]):
        case "other type":
            parent[key] = copy.deepcopy(rng.choice(_OTHER_VALUES))
        case "neighbor":
            parent[key] = copy.deepcopy(parent[rng.choice(list(parent) if isinstance(parent, dict) else [0])])
        case "missing":
            del parent[key]
        case "renamed" if isinstance(parent, dict):
            parent[rng.choice(["x", f"{key}x", ""])] = parent.pop(key)
        case _:
            parent[key] = [parent[key]]
    return json.dumps(root).replace(json.dumps(_DEEP), "[" * 100_000 + "]" * 100_000).encode()


def _containers(value: Any) -> Iterator[Any]:
    """The objects and arrays in which something can be changed."""
    if isinstance(value, dict | list) and value:
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def _change_header(content: bytes, rng: random.Random) -> bytes:
    """A change of the JSON in a safetensors file, whose length is told before it."""
    stop = 8 + int.from_bytes(content[:8], "little")
    header = _change_json(content[8:stop], rng)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[stop:]


JSON: dict[str, Mutation] = {"json": _change_json}
"""Faults of a file that is JSON."""

SAFETENSORS: dict[str, Mutation] = {"header": _change_header}
"""Faults of a safetensors file."""


def mutated(
    content: bytes, count: int, seed: int, own: dict[str, Mutation] | None = None
) -> Iterator[tuple[str, bytes]]:
    """The name of a fault and the faulty bytes, `count` times; the same ones for the same seed.

    Args:
      own: faults of the file's format, which make up a third.
    """
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        known = own if own and number % 3 == 0 else BYTES
        name = list(known)[number % len(known)] if known is BYTES else rng.choice(list(known))
        yield f"{name} {number}", known[name](content, rng)
