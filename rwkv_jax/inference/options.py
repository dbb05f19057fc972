"""The sizes of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rwkv_jax.checks import ConfigError, is_number, require_whole

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The sizes of an engine. What is compiled depends on the first four alone, never on what is asked for."""

    num_slots: int = 8
    """Texts that are held on the device at once; others wait."""
    batch_sizes: tuple[int, ...] | None = None
    """How many texts are written at once: the least of these that holds them. None is 1 and all slots."""
    prefill_length: int = 512
    """Tokens of a long prompt that are read at once."""
    short_prefill_length: int = 64
    """Tokens of short prompts, and of the ends of long ones, that are read at once."""
    burst_length: int = 8
    """Most tokens that the device writes on its own before the host sees them."""
    most_waiting: int = 1024
    """Texts that may wait for a slot; one more is refused."""
    prefix_bytes: int = 256 * _MIB
    """For the states of prompts, so that one that begins like another is read from there on; 0 keeps none."""
    fewest_prefix_tokens: int = 16
    """Shorter prompts are not kept."""
    session_bytes: int = 1024 * _MIB
    """For the states of named conversations; the least recently used go first."""
    session_idle_seconds: float = 3600.0
    """After which a named conversation is forgotten."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "prefill_length", "short_prefill_length", "burst_length", "most_waiting"):
            require_whole(name, getattr(self, name), 1)
        for name, least in (("prefix_bytes", 0), ("fewest_prefix_tokens", 1), ("session_bytes", 1)):
            require_whole(name, getattr(self, name), least)
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
        return tuple(sorted(set(self.batch_sizes or (1, self.num_slots))))
