"""The sizes of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rwkv_jax.checks import ConfigError, is_number, require_whole

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The sizes of an engine. Only the first five determine what is compiled, never the requests."""

    num_slots: int = 8
    """Texts that are held on the device at once; others are queued."""
    batch_sizes: tuple[int, ...] | None = None
    """Rows of the decode programs: each burst takes the smallest that holds its texts. None is 1 and all slots."""
    prefill_length: int = 512
    """Tokens of a long prompt in one prefill call."""
    short_prefill_length: int = 64
    """Tokens of each short prompt, and of the ends of long ones, in one prefill call."""
    burst_length: int = 8
    """Tokens that the device generates before the host sees them."""
    max_queue: int = 1024
    """Texts that may wait for a slot; further ones are refused."""
    prefix_bytes: int = 256 * _MIB
    """Size of the cache for states of prompts, which prompts with the same prefix start from; 0 is no cache."""
    min_prefix_tokens: int = 16
    """Shorter prompts are not cached."""
    batch_invariant: bool = False
    """Whether a text's numbers are bit for bit the same alone and among others: every burst decodes all slots, short
    prompts are prefilled in batches only, and there is no prefix cache. Costs time where few texts run."""
    session_bytes: int = 1024 * _MIB
    """Size of the store for named conversations; the least recently used go first."""
    session_idle_seconds: float = 3600.0
    """After which a named conversation is forgotten."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "prefill_length", "short_prefill_length", "burst_length", "max_queue"):
            require_whole(name, getattr(self, name), 1)
        for name, minimum in (("prefix_bytes", 0), ("min_prefix_tokens", 1), ("session_bytes", 1)):
            require_whole(name, getattr(self, name), minimum)
        if type(self.batch_invariant) is not bool:
            raise ConfigError(f"batch_invariant = {self.batch_invariant!r}: must be True or False")
        if self.batch_invariant and self.batch_sizes is not None and set(self.batch_sizes) != {self.num_slots}:
            raise ConfigError(
                f"batch_sizes = {self.batch_sizes}: with batch_invariant all slots are decoded at once; leave it out"
            )
        idle = self.session_idle_seconds
        if not is_number(idle) or not idle > 0:
            raise ConfigError(f"session_idle_seconds = {idle!r}: must be a positive number; math.inf for no limit")
        if self.short_prefill_length > self.prefill_length:
            raise ConfigError(
                f"short_prefill_length = {self.short_prefill_length}: must not exceed prefill_length = "
                f"{self.prefill_length}"
            )
        if self.batch_sizes is None:
            return
        if not isinstance(self.batch_sizes, Sequence) or not self.batch_sizes:
            raise ConfigError(f"batch_sizes = {self.batch_sizes!r}: must be several whole numbers, or None")
        for size in self.batch_sizes:
            require_whole("batch_sizes", size, 1, self.num_slots)
        if self.num_slots not in self.batch_sizes:
            raise ConfigError(f"batch_sizes = {self.batch_sizes}: must have num_slots = {self.num_slots}, too")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        if self.batch_invariant:
            return (self.num_slots,)
        return tuple(sorted(set(self.batch_sizes or (1, self.num_slots))))
