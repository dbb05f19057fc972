"""States as clients and stores have them: the bytes of a state file, or base64 of these."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math

import jax

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.inference.state.state_file import Identity, decode_snapshot, encode_snapshot
from rwkv_jax.inference.state.tuned import tuned_snapshot
from rwkv_jax.serving.errors import APIError
from rwkv_jax.tuning.state_files import is_tuned, parse_tuned_state

_HEADER_BYTES = 2**20  # names, checksums and whatever else a file begins or ends with


def max_file_bytes(identity: Identity) -> int:
    """Size up to which a file is looked at: a state's numbers in float64, or what is around them, are within it."""
    numbers = sum(math.prod(like.shape) for like in jax.tree.leaves((identity.state, identity.logits)))
    return 8 * numbers + _HEADER_BYTES


def encode(snapshot: Snapshot, engine: Engine, adapter: str | None = None) -> bytes:
    """The state file of a state. Raises StateError if it could not be loaded again, such as for NaN."""
    return encode_snapshot(snapshot, engine.identity_of(adapter))


def decode(content: bytes, engine: Engine, name: str = "state", adapter: str | None = None) -> Snapshot:
    """The state in the bytes of a file.

    Args:
      content: a state file, or the official file of a tuned state (`rwkv_jax.tuning.state_files`), which has read
        no token yet.
      name: what messages call it.
      adapter: name of the adapter whose state it has to be; None for the model alone.

    Raises:
      APIError: 413, it is larger than a state of this model can be; nothing in it has been looked at.
      StateError: it is of another model, by each difference, or damaged.
      UnsafeFileError: it is neither.
    """
    limit = max_file_bytes(engine.identity)
    if len(content) > limit:
        raise too_large(name, limit)
    tuned = parse_tuned_state(content, name)
    if is_tuned(tuned.tensors):
        snapshot = tuned_snapshot(tuned, engine, name)
    else:
        snapshot = decode_snapshot(content, engine.identity_of(adapter), name=name)
    return dataclasses.replace(snapshot, owner=engine.adapters.owner_of(adapter))


def decode_base64(text: str, engine: Engine, name: str = "state", adapter: str | None = None) -> Snapshot:
    """As `decode`, of base64 text. Raises APIError, status 400, for text that is none."""
    limit = max_file_bytes(engine.identity)
    if len(text) > 4 * math.ceil(limit / 3):
        raise too_large(name, limit)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise APIError(400, f"{name}: is neither an id nor base64 of a state file ({error})", param=name) from error
    return decode(content, engine, name, adapter)


def encode_base64(content: bytes) -> str:
    """As JSON has it."""
    return base64.b64encode(content).decode()


def too_large(name: str, limit: int) -> APIError:
    """The answer to a state that is not looked at."""
    return APIError(413, f"{name}: is larger than {limit} bytes, which no state of this model is", param=name)
