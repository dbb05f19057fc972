"""Stores of states: what they have in common. A record is replaced as a whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from typing import Literal, NamedTuple, Protocol

Kind = Literal["state", "session"]
"""A state that a client made, or that of a named conversation after its last answered turn."""

_VERSION_BITS = 62  # fits a signed 64-bit integer


class StoreError(RuntimeError):
    """A store could not do what it was asked to."""


class ConflictError(StoreError):
    """The record is no longer the one that was read; nothing was stored."""


class TooLargeError(StoreError):
    """One record is larger than the whole store; nothing was stored."""


class UnavailableError(StoreError):
    """The store cannot be reached or written now; it may be later."""


@dataclasses.dataclass(frozen=True)
class StateRecord:
    """A state in a store."""

    data: bytes
    """A state file (`rwkv_jax.inference.state.state_file`)."""
    num_tokens: int
    """Tokens that it has read."""
    model: str
    """Digest of the model's parameters."""
    created: float
    """Unix time at which its text began to be kept."""
    kind: Kind = "state"
    version: int = 0
    """Another one after every `put`; 0 in a record that no store has returned."""


class StateInfo(NamedTuple):
    """A record without its data."""

    id: str
    kind: Kind
    num_tokens: int
    num_bytes: int
    """Of the data."""
    model: str
    created: float
    used: float
    """Unix time of the last `put` or `get`."""


class StateStore(Protocol):
    """Records by tenant and id. Thread-safe; a tenant sees only its own.

    Ids have been checked by the caller. Methods block; all of them raise UnavailableError.
    """

    def put(self, tenant: str, id: str, record: StateRecord, *, expected: int | None = None) -> int:
        """Stores a record durably, in place of an existing one, and returns its new version.

        Args:
          record: its version is not looked at.
          expected: the version that must be there, 0 for none; None for any.

        Raises:
          ConflictError: another version is there.
          TooLargeError: the record alone is larger than the store may be.
        """
        ...

    def get(self, tenant: str, id: str) -> StateRecord | None:
        """The record, which becomes the most recently used; None if there is none, or no longer."""
        ...

    def delete(self, tenant: str, id: str) -> bool:
        """Removes the record; whether there was one."""
        ...

    def list(self, tenant: str) -> list[StateInfo]:
        """The tenant's records, the most recently used first."""
        ...

    def close(self) -> None:
        """Ends the use of the store."""
        ...


def tenant_key(tenant: str) -> str:
    """By which stores know a tenant: a digest, since a tenant's name may be a secret."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:32]


def new_version() -> int:
    """A random version, so that a record made anew is never taken for a deleted one."""
    return secrets.randbits(_VERSION_BITS) + 1


def check_version(id: str, found: int, expected: int | None) -> None:
    """Raises ConflictError unless the version that is there, 0 for none, is the expected one."""
    if expected is not None and found != expected:
        raise conflict(id)


def conflict(id: str) -> ConflictError:
    """The error of a `put` that another one, or a removal, has preceded."""
    return ConflictError(
        f"{id}: was changed, removed or made by another request meanwhile; nothing was kept of this one"
    )
