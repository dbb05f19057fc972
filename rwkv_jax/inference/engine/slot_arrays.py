"""The slots on the device: which of them are free, and the compiled programs' calls that read and change them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.inference.engine.adapters import NONE, LoadedAdapter, require_loaded
from rwkv_jax.inference.engine.job import Job, PrefillCursor, decode_params
from rwkv_jax.inference.engine.programs import DecodeBurst, DecodeParams, Programs, SlotState, pad
from rwkv_jax.inference.engine.requests import MAX_TOP_LOGPROBS
from rwkv_jax.inference.engine.scoring import TokenScores
from rwkv_jax.inference.state.snapshot import Snapshot

_MIN_NEW = 1 / 4
"""Share of texts without a token at which a burst has one step, so that their first tokens do not wait for others."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of the compiled programs."""

    batch_sizes: tuple[int, ...]
    """Decode batch sizes, ascending; the last is the number of slots."""
    long: int
    """Tokens per long prefill of one prompt."""
    short: int
    """Tokens per prompt in a short prefill, of one or `short_rows` prompts."""
    short_rows: int
    """Prompts in a batched prefill; all slots in order if there are no more slots."""
    always_batched: bool = False
    """Whether even a single short piece uses a batched prefill, for identical rounding."""


class SlotArrays:
    """The arrays of all slots, which every call donates and replaces. Not thread-safe."""

    def __init__(self, programs: Programs, shapes: Shapes) -> None:
        """Allocates them."""
        self._programs, self._shapes = programs, shapes
        self.owner = programs.checksum().hex()
        """Checksum of the model's parameters, to recognize its snapshots."""
        self._allocate()
        self.empty_row = self.row(0)
        """The row of a text that has read nothing."""

    def begin_texts_with(self, state: Any) -> None:
        """Lets texts begin in another state than the empty one: a row's, without an axis of rows."""
        like = self.empty_row.state
        placed = jax.tree.map(lambda x, y: jax.device_put(x.astype(y.dtype), y.sharding), state, like)
        self.empty_row = self.empty_row._replace(state=placed)

    def _allocate(self) -> None:
        self.free = list(range(self.count))[::-1]
        """Slots without a text; the last is taken next."""
        self._slots, self._burst_start = self._programs.make(self._programs.params)
        self.is_broken = False
        """Whether a call failed, after which the arrays may be half donated."""

    def repair(self) -> None:
        """Allocates the slots anew after a failure."""
        if self.is_broken:
            self._allocate()

    @property
    def are_deleted(self) -> bool:
        """Whether a failed call has taken them along."""
        return any(x.is_deleted() for x in jax.tree.leaves(self._slots))

    def release(self) -> None:
        """Frees the memory."""
        for name in ("_slots", "_burst_start"):
            self.__dict__.pop(name, None)
        self.is_broken = True

    @property
    def count(self) -> int:
        """Number of slots."""
        return self._programs.num_slots

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._programs.vocab_size

    def row(self, slot: int) -> SlotState:
        """A copy of what a slot holds now."""
        return self._programs.take(self._slots.state, self._slots.logits, self._slots.occurrences, np.int32(slot))

    def _row_before_burst(self, slot: int) -> SlotState:
        """A copy of the state and logits from before a slot's last burst."""
        start = self._burst_start
        return self._programs.take(start.state, start.logits, self._slots.occurrences, np.int32(slot))

    @property
    def params(self) -> Any:
        """Parameters of the programs, with the adapters in their places; others of the same shapes may replace them."""
        return self._programs.params

    @params.setter
    def params(self, params: Any) -> None:
        self._programs.params = params

    def owner_of(self, adapter: LoadedAdapter | None) -> str:
        """What snapshots of texts with an adapter, or without, are recognized by."""
        return self.owner if adapter is None else f"{self.owner}+{adapter.digest}"

    def snapshot_of(self, cursor: PrefillCursor, num_tokens: int, *, before_burst: bool = False) -> Snapshot:
        """The state of a cursor's slot, for later: now, or before its last burst."""
        assert cursor.slot is not None
        row = self._row_before_burst(cursor.slot) if before_burst else cursor.saved or self.row(cursor.slot)
        return Snapshot(row.state, row.logits, num_tokens, self.owner_of(cursor.adapter))

    def put(self, slot: int, row: SlotState, bias: Any, stops: Any, adapter: LoadedAdapter | None = None) -> None:
        """Loads a text into a slot.

        Raises as `require_loaded`.
        """
        require_loaded(adapter)
        place = NONE if adapter is None else adapter.place
        # It may be on the host or other devices, if another engine with the same weights made it.
        row = jax.device_put(row, jax.tree.map(lambda x: x.sharding, self.empty_row))
        self._slots = self._programs.put(self._slots, np.int32(slot), row, bias, stops, np.int32(place))

    def wait(self) -> None:
        """Waits until the device has done what it was given."""
        jax.block_until_ready(self._slots)

    def prefill(
        self, pieces: Sequence[tuple[PrefillCursor, int]], length: int, *, alone: bool, wants_logits: bool
    ) -> None:
        """Prefills the next tokens of some prompts, and moves their cursors.

        Args:
          pieces: cursors with slots, and the number of tokens of each, at most `length`: one if `alone`, else at most
            `short_rows`.
          length: `long` or `short` of the shapes.
          wants_logits: whether any of them needs its logits now.
        """
        rows, tokens, lengths, _ = self._rows(pieces, length, alone=alone)
        self._slots = self._programs.prefill(
            self._programs.params, self._slots, rows, tokens, lengths, np.bool_(wants_logits)
        )
        for cursor, size in pieces:
            cursor.num_prefilled += size

    def score(
        self, pieces: Sequence[tuple[PrefillCursor, int]], length: int, *, alone: bool, num_top: int
    ) -> tuple[TokenScores, list[int]]:
        """Prefills as `prefill`, and scores all that is read.

        Returns:
          Scores, on the device, and the row of each piece in them.
        """
        rows, tokens, lengths, row_of_piece = self._rows(pieces, length, alone=alone)
        self._slots, scores = self._programs.score(
            self._programs.params, self._slots, rows, tokens, lengths, num_top=num_top
        )
        for cursor, size in pieces:
            cursor.num_prefilled += size
        return scores, row_of_piece

    def _rows(
        self, pieces: Sequence[tuple[PrefillCursor, int]], length: int, *, alone: bool
    ) -> tuple[NDArray[np.int32] | None, NDArray[np.int32], NDArray[np.int32], list[int]]:
        """Slots, tokens and lengths of the rows of a prefill, and the row of each piece."""
        num_rows = 1 if alone else self._shapes.short_rows
        rows = self._row_slots([cursor.slot for cursor, _ in pieces], num_rows)
        tokens = np.zeros((num_rows, length), np.int32)
        lengths = np.zeros(num_rows, np.int32)
        row_of_piece = []
        for i, (cursor, size) in enumerate(pieces):
            assert cursor.slot is not None
            row = cursor.slot if rows is None else i
            row_of_piece.append(row)
            tokens[row, :size] = cursor.ids[cursor.num_prefilled : cursor.num_prefilled + size]
            lengths[row] = size
        return rows, tokens, lengths, row_of_piece

    def _row_slots(self, slots: Sequence[int | None], num_rows: int) -> NDArray[np.int32] | None:
        """The slots of a call's rows, padded; None is all slots in order."""
        return None if num_rows == self.count else pad(slots, num_rows, self.count, np.int32)

    def prefilled(
        self, snapshot: Snapshot, ids: Sequence[int], adapter: LoadedAdapter | None, lender: Job | None
    ) -> Snapshot:
        """The state after some more tokens, which are prefilled in a free slot, or in one borrowed from a text.

        Args:
          adapter: of the snapshot's text.
          lender: the text with slot `slot_to_borrow`; None if that is free.
        """
        slot = self.slot_to_borrow
        lent = self.row(slot)
        zeros = np.zeros(self.vocab_size, np.float32)
        cursor = PrefillCursor(tuple(ids), slot=slot, adapter=adapter)
        self.put(slot, SlotState(snapshot.state, snapshot.logits, zeros), zeros, zeros > 0, adapter)
        while cursor.remaining:
            size = min(cursor.remaining, self._shapes.short)
            self.prefill([(cursor, size)], self._shapes.short, alone=True, wants_logits=size == cursor.remaining)
        state = self.snapshot_of(cursor, snapshot.num_tokens + len(ids))
        if lender is not None:
            tables = lender.tables()
            self.put(slot, lent, tables.bias, tables.stops, lender.request.adapter)
        return state

    @property
    def slot_to_borrow(self) -> int:
        """A free slot if there is one."""
        return self.free[-1] if self.free else 0

    def decode(
        self, jobs: Sequence[Job], num_top: int, on_masked: Callable[[dict[Job, int]], None]
    ) -> tuple[DecodeBurst, dict[int, int]]:
        """Decodes a burst of some texts, in the smallest batch that fits; of one token if any has a mask or many begin.

        Args:
          on_masked: is given the tokens of texts with a mask, while the device reads them.

        Returns:
          Its tokens, on the host, and the row of each slot in them.
        """
        num_used = sum(len(job.slots) for job in jobs)
        size = next(size for size in self._shapes.batch_sizes if size >= num_used)
        return self._decode(jobs, size, num_top, on_masked)

    def _decode(
        self,
        jobs: Sequence[Job],
        size: int,
        num_top: int,
        on_masked: Callable[[dict[Job, int]], None] = lambda tokens: None,
    ) -> tuple[DecodeBurst, dict[int, int]]:
        used = [slot for job in jobs for slot in job.slots]
        rows = self._row_slots(used, size)
        row_of_slot = {slot: slot if rows is None else row for row, slot in enumerate(used)}
        masked = {job: row_of_slot[job.slots[0]] for job in jobs if job.constraint}
        is_short = masked or sum(not job.num_generated for job in jobs) >= max(1, _MIN_NEW * len(jobs))
        params = decode_params(jobs, row_of_slot, size, 1 if is_short else self._programs.burst_length)
        bias, tokens = self._slots.bias, None
        if masked:
            tokens, narrow = self._choose_masked(rows, size, params, masked)
            self._slots = self._slots._replace(bias=narrow)
        self._slots, self._burst_start, burst = self._programs.decode(
            self._programs.params, self._slots, self._burst_start, rows, params, num_top=num_top
        )
        if masked:
            self._slots = self._slots._replace(bias=bias)
            chosen = jax.device_get(tokens)
            on_masked({job: int(chosen[row]) for job, row in masked.items()})
        return jax.device_get(burst), row_of_slot

    def _choose_masked(
        self, rows: NDArray[np.int32] | None, size: int, params: DecodeParams, masked: Mapping[Job, int]
    ) -> tuple[Array, Array]:
        """Tokens of texts with a mask, by their rows, and the bias with which `decode` chooses the same."""
        masks = np.full((size, -(-self.vocab_size // 32)), -1, np.int32)
        for job, row in masked.items():
            assert job.constraint is not None
            masks[row] = job.constraint.mask
        return self._programs.choose_masked(self._slots, rows, params, masks)

    def warm_up(self) -> None:
        """Compiles all programs, by calls that change no slot."""
        self.repair()
        if self.free:
            zeros = np.zeros(self.vocab_size, np.float32)
            self.put(self.free[-1], self.row(self.free[-1]), zeros, zeros > 0)
        for length, alone in ((self._shapes.long, True), (self._shapes.short, True), (self._shapes.short, False)):
            self.prefill([], length, alone=alone, wants_logits=False)
            for num_top in (0, MAX_TOP_LOGPROBS):
                self.score([], length, alone=alone, num_top=num_top)
        for size in self._shapes.batch_sizes:
            for num_top in (0, MAX_TOP_LOGPROBS):
                self._decode([], size, num_top)
            self._choose_masked(self._row_slots([], size), size, decode_params([], {}, size, 1), {})
