"""The sizes of an engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from rwkv_jax.checks import ConfigError, is_number, require, require_whole, shown

_MIB = 2**20
_MAX_SIZE = 2**30  # of an axis of what is compiled
_MAX_SECONDS = 1e12


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The sizes of an engine. Only the first five and those of adapters determine what is compiled,
    never the requests."""

    num_slots: int = 8
    """Texts on the device at once; others are queued."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes of the decode programs: each burst uses the smallest that fits. None is 1 and all slots."""
    prefill_length: int = 512
    """Tokens of a long prompt per prefill call."""
    short_prefill_length: int = 64
    """Tokens of each short prompt, and of the ends of long ones, per prefill call."""
    burst_length: int = 8
    """Tokens generated on the device before they are copied to the host."""
    max_queue: int = 1024
    """Texts that may wait for a slot; further ones are rejected."""
    prefix_bytes: int = 256 * _MIB
    """Size of the prefix cache of prompt states; 0 disables it."""
    min_prefix_tokens: int = 16
    """Shorter prompts are not cached."""
    batch_invariant: bool = False
    """Whether a text's results are bit-identical alone and among others: every burst decodes all slots, short prompts
    are prefilled in batches only, and there is no prefix cache. Slower if few texts run."""
    session_bytes: int = 1024 * _MIB
    """Size of the store for named conversations; the least recently used are evicted first."""
    session_idle_seconds: float = 3600.0
    """Idle seconds after which a named conversation is dropped."""
    adapter_places: int = 0
    """Adapters that may be loaded at once; 0 is as many as the engine is given at first."""
    adapter_rank: int = 0
    """Largest rank of an adapter; 0 is that of those given."""
    tune: Literal["auto", "never"] = "auto"
    """Whether what is fastest by measurement is taken, and measured where it has not been, on one device
    (docs/autotune.md); `never` takes what has been measured nowhere: the tables' choices."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "prefill_length", "short_prefill_length", "burst_length"):
            require_whole(name, getattr(self, name), 1)
            require(getattr(self, name) <= _MAX_SIZE, name, getattr(self, name), f"must not exceed {_MAX_SIZE}")
            object.__setattr__(self, name, int(getattr(self, name)))
        bytes_and_more = (("max_queue", 1), ("prefix_bytes", 0), ("min_prefix_tokens", 1), ("session_bytes", 1))
        for name, minimum in (*bytes_and_more, ("adapter_places", 0), ("adapter_rank", 0)):
            require_whole(name, getattr(self, name), minimum)
            object.__setattr__(self, name, int(getattr(self, name)))
        if type(self.batch_invariant) is not bool:
            raise ConfigError(f"batch_invariant = {shown(self.batch_invariant)}: must be True or False")
        known = isinstance(self.tune, str) and self.tune in ("auto", "never")
        require(known, "tune", self.tune, "must be auto or never")
        idle = self.session_idle_seconds
        if not is_number(idle) or not (0 < idle <= _MAX_SECONDS or idle == math.inf):
            raise ConfigError(
                f"session_idle_seconds = {shown(idle)}: must be a positive number up to {_MAX_SECONDS:g}; math.inf for "
                "no limit"
            )
        if self.short_prefill_length > self.prefill_length:
            raise ConfigError(
                f"short_prefill_length = {self.short_prefill_length}: must not exceed prefill_length = "
                f"{self.prefill_length}"
            )
        if self.batch_sizes is None:
            return
        if not isinstance(self.batch_sizes, Sequence) or not self.batch_sizes:
            raise ConfigError(f"batch_sizes = {shown(self.batch_sizes)}: must be several whole numbers, or None")
        for size in self.batch_sizes:
            require_whole("batch_sizes", size, 1, self.num_slots)
        if self.batch_invariant and set(self.batch_sizes) != {self.num_slots}:
            raise ConfigError(
                f"batch_sizes = {self.batch_sizes}: with batch_invariant all slots are decoded at once; leave it out"
            )
        if self.num_slots not in self.batch_sizes:
            raise ConfigError(f"batch_sizes = {self.batch_sizes}: must have num_slots = {self.num_slots}, too")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        if self.batch_invariant:
            return (self.num_slots,)
        return tuple(sorted(set(self.batch_sizes or (1, self.num_slots))))
