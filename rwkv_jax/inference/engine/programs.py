"""Compiled prefill and decode programs over a fixed array of slots.

A slot is one row of every array. Its `logits` follow the last token read, so decoding is: choose a token from them,
then read it. Every generated token has therefore been read, including the last one and a stop token, so a text can be
continued after any of them. No shape depends on the length of a text or prompt or on the number of texts, so the number
of programs is fixed when the engine is built: three that create, fill and copy slots, three prefill shapes, the same
three for texts that are scored, and one decode program per batch size (two of both, if top logprobs are requested).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from numpy.typing import NDArray

from rwkv_jax.autotune import PREFILL_STEPS
from rwkv_jax.inference.engine.adapters import NONE, with_rows, without_places
from rwkv_jax.inference.engine.scoring import TokenScores, score_tokens
from rwkv_jax.inference.sampling.choose import Settings, choose, count, logprobs, top_logprobs
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import with_implementation

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
"""Unsigned type of each item size; eight bytes are read as two words."""


class Slots(NamedTuple):
    """Device arrays of all texts; S slots."""

    state: Any
    """The model's state of S rows."""
    logits: Array
    """[S, V] after the last token, float32, or float64 in a float64 model."""
    occurrences: Array
    """float32 [S, V], counted by `sampling.count`."""
    bias: Array
    """float32 [S, V], added to logits; -inf for banned tokens."""
    stops: Array
    """bool [S, V], tokens that end a text."""
    adapter: Array
    """int32 [S], place of the text's adapter, or `adapters.NONE`."""


class BurstStart(NamedTuple):
    """State and logits of each slot before its last burst, from which earlier tokens' states are recomputed."""

    state: Any
    logits: Array


class SlotState(NamedTuple):
    """The fields of one slot that change while its text is generated."""

    state: Any
    logits: Array
    occurrences: Array | NDArray[np.float32]


class DecodeParams(NamedTuple):
    """How the rows of a burst are decoded; one entry per row."""

    settings: Settings
    seeds: NDArray[np.uint32]
    positions: NDArray[np.int32]
    """Tokens of the text before this burst; random keys are derived from it and the seed."""
    max_tokens: NDArray[np.int32]
    """Maximum tokens to generate in this burst; 0 leaves a row unchanged."""
    token_row: NDArray[np.int32]
    """The row whose tokens this one reads: itself, or for a negative prompt the guided row."""
    negative_row: NDArray[np.int32]
    """The row of the negative prompt; itself without guidance."""
    guidance_scale: NDArray[np.float32]
    """1 without guidance."""


class DecodeBurst(NamedTuple):
    """Tokens that b rows generated in at most k steps; the first `counts` entries of each row are valid."""

    counts: Array
    """int32 [b]."""
    tokens: Array
    """int32 [k, b]."""
    logprobs: Array
    """float32 [k, b]."""
    top_tokens: Array
    """int32 [k, b, n], n = min(num_top, V)."""
    top_logprobs: Array
    """float32 [k, b, n]."""


class Programs:
    """The engine's compiled functions for one model and number of slots. They donate slots and burst starts."""

    def __init__(
        self,
        model: LanguageModel,
        num_slots: int,
        burst_length: int,
        weights: NDArray[np.float32],
        mesh: Mesh | None,
        prefill_implementation: str | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          burst_length: maximum tokens per row and burst.
          weights: [V], weight of an occurrence of each token (`sampling.occurrence_weights`).
          mesh: rows are split over its axes `data` and `fsdp` if these divide their number; None is one device.
          prefill_implementation: of the WKV operator, in prefills of at least `PREFILL_STEPS` tokens, for which it was
            measured; None is the model's.
        """
        self.graphdef, self.params = nnx.split(model, nnx.Param)
        self._prefill_graphdef, _ = nnx.split(with_implementation(model, prefill_implementation), nnx.Param)
        self.num_slots, self.burst_length = num_slots, burst_length
        self.vocab_size = model.config.vocab_size
        self._rows_axis = 1 if model.is_stacked else 0
        self._weights = weights
        self._logits_dtype = model.config.parameter_dtype
        if mesh is None:
            # Explicit, since jit compiles separately for committed and uncommitted arrays.
            device = next(iter(jax.tree.leaves(self.params)[0].devices()))
            replicated = slots_on = start_on = bias_on = SingleDeviceSharding(device)
        else:
            replicated = NamedSharding(mesh, PartitionSpec())
            slots_on, start_on = (self._split_rows(x, mesh) for x in jax.eval_shape(self._make, self.params))
            bias_on = slots_on.bias
        self.make = jax.jit(self._make, out_shardings=(slots_on, start_on))
        self._checksum = jax.jit(_checksum, out_shardings=replicated)
        self.put = jax.jit(self._put, donate_argnums=0, out_shardings=slots_on)
        self.take = jax.jit(self._take, out_shardings=replicated)
        self.prefill = jax.jit(self._prefill, donate_argnums=1, out_shardings=slots_on)
        self.score = jax.jit(
            self._score, static_argnames="num_top", donate_argnums=1, out_shardings=(slots_on, replicated)
        )
        self.decode = jax.jit(
            self._decode,
            static_argnames="num_top",
            donate_argnums=(1, 2),
            out_shardings=(slots_on, start_on, replicated),
        )
        self.choose_masked = jax.jit(self._choose_masked, out_shardings=(replicated, bias_on))

    def _model(self, params: Any, adapters: Array) -> LanguageModel:
        return nnx.merge(self.graphdef, with_rows(params, adapters))

    def _prefill_model(self, params: Any, slots: Slots, rows: Array | None, length: int) -> LanguageModel:
        adapters = slots.adapter if rows is None else _take_rows(rows, 0, slots.adapter)
        graphdef = self._prefill_graphdef if length >= PREFILL_STEPS else self.graphdef
        return nnx.merge(graphdef, with_rows(params, adapters))

    def _split_rows(self, tree: Any, mesh: Mesh) -> Any:
        axes = tuple(name for name in ("data", "fsdp") if mesh.shape.get(name, 1) > 1)
        parts = int(np.prod([mesh.shape[name] for name in axes], dtype=int))
        rows = PartitionSpec() if not axes or self.num_slots % parts else PartitionSpec(axes)
        stacked = PartitionSpec(None, *rows)
        on_rows, on_stacked = NamedSharding(mesh, rows), NamedSharding(mesh, stacked)
        split = jax.tree.map(lambda _: on_rows, tree)
        in_state = on_stacked if self._rows_axis == 1 else on_rows
        return split._replace(state=jax.tree.map(lambda _: in_state, tree.state))

    # Rows of a state: axis 1 if layers are stacked, else axis 0.

    def _at(self, rows: Any) -> Any:
        return (slice(None), rows) if self._rows_axis == 1 else rows

    def _gather(self, x: Any, rows: Array | None) -> Any:
        """Rows of slots or of a burst start; None is all of them."""
        if rows is None:
            return x
        taken = {name: _take_rows(rows, 0, of) for name, of in x._asdict().items() if name != "state"}
        state = jax.tree.map(functools.partial(_take_rows, rows, self._rows_axis), x.state)
        return type(x)(state=state, **taken)

    def _scatter(self, x: Any, rows: Array | None, **new: Any) -> Any:
        """Slots or a burst start with some fields' rows replaced; None is all rows."""
        if rows is None:
            return x._replace(**new)
        for name, values in new.items():
            set_rows = functools.partial(_set_rows, rows, self._rows_axis if name == "state" else 0)
            new[name] = jax.tree.map(set_rows, getattr(x, name), values)
        return x._replace(**new)

    def checksum(self) -> bytes:
        """8-byte checksum of the bits of all parameters but places, to distinguish models (not cryptographic).

        One program per parameter shape: a single one takes XLA a minute to compile for 24 layers.
        """
        total = np.zeros(2, np.uint32)
        for of_leaf in jax.device_get([self._checksum(leaf) for leaf in jax.tree.leaves(without_places(self.params))]):
            total = total * np.uint32(0x01000193) + of_leaf
        return total.tobytes()

    # The programs.

    def _make(self, params: Any) -> tuple[Slots, BurstStart]:
        """Empty slots."""
        size, vocab = self.num_slots, self.vocab_size
        state = nnx.merge(self.graphdef, params).initial_state(size)
        logits = jnp.zeros((size, vocab), self._logits_dtype)
        zeros = jnp.zeros((size, vocab), jnp.float32)
        slots = Slots(state, logits, zeros, zeros, jnp.zeros((size, vocab), bool), jnp.full(size, NONE, jnp.int32))
        return slots, BurstStart(jax.tree.map(jnp.copy, state), logits)

    def _put(self, slots: Slots, slot: Array, row: SlotState, bias: Array, stops: Array, adapter: Array) -> Slots:
        """Loads a text into a slot."""
        state = jax.tree.map(lambda x, y: x.at[self._at(slot)].set(y), slots.state, row.state)
        return Slots(
            state,
            slots.logits.at[slot].set(row.logits),
            slots.occurrences.at[slot].set(row.occurrences),
            slots.bias.at[slot].set(bias),
            slots.stops.at[slot].set(stops),
            slots.adapter.at[slot].set(adapter),
        )

    def _take(self, state: Any, logits: Array, occurrences: Array, slot: Array) -> SlotState:
        """Copies one row out of the slots, or out of the burst starts."""
        return SlotState(jax.tree.map(lambda x: x[self._at(slot)], state), logits[slot], occurrences[slot])

    def _prefill(
        self, params: Any, slots: Slots, rows: Array | None, tokens: Array, lengths: Array, wants_logits: Array
    ) -> Slots:
        """Prefills up to T tokens in each of r slots.

        Args:
          rows: int32 [r], slots; None is all of them in order.
          tokens: int32 [r, T], of which each row's first `lengths` [r] are valid; 0 leaves a slot unchanged.
          wants_logits: whether any row needs its logits now; otherwise none are updated.
        """
        model = self._prefill_model(params, slots, rows, tokens.shape[1])
        own = self._gather(BurstStart(slots.state, slots.logits), rows)
        hidden, state = model.hidden(tokens, own.state, lengths=lengths)
        last = _last(hidden, lengths)
        logits = jax.lax.cond(
            wants_logits,
            lambda: jnp.where((lengths > 0)[:, None], model.logits(last).astype(self._logits_dtype), own.logits),
            lambda: own.logits,
        )
        return self._scatter(slots, rows, state=state, logits=logits)

    def _score(
        self, params: Any, slots: Slots, rows: Array | None, tokens: Array, lengths: Array, *, num_top: int
    ) -> tuple[Slots, TokenScores]:
        """Prefills as `_prefill`, and scores every token that it reads.

        Args:
          num_top: number of most likely tokens to report, at most V; each value compiles a program.
        """
        model = self._prefill_model(params, slots, rows, tokens.shape[1])
        own = self._gather(BurstStart(slots.state, slots.logits), rows)
        hidden, state = model.hidden(tokens, own.state, lengths=lengths)
        num_top = min(num_top, self.vocab_size)
        scores = score_tokens(model.logits, hidden, own.logits, tokens, lengths, num_top)
        logits = model.logits(_last(hidden, lengths)).astype(self._logits_dtype)
        logits = jnp.where((lengths > 0)[:, None], logits, own.logits)
        return self._scatter(slots, rows, state=state, logits=logits), scores

    def _decode(
        self,
        params: Any,
        slots: Slots,
        burst_start: BurstStart,
        rows: Array | None,
        decode: DecodeParams,
        *,
        num_top: int,
    ) -> tuple[Slots, BurstStart, DecodeBurst]:
        """Generates tokens in b slots until each has `max_tokens` or a token that ends it.

        Args:
          rows: int32 [b], slots; None is all of them in order; S is a padding row.
          num_top: number of most likely tokens to report, at most V; each value compiles a program.
        """
        num_top = min(num_top, self.vocab_size)
        own = self._gather(slots, rows)
        model = self._model(params, own.adapter)
        burst_start = self._start_burst(burst_start, rows, own, decode)
        num_rows = own.logits.shape[0]
        base_keys = jax.vmap(jax.random.key)(decode.seeds)
        burst = DecodeBurst(
            jnp.zeros((num_rows,), jnp.int32),
            jnp.zeros((self.burst_length, num_rows), jnp.int32),
            jnp.zeros((self.burst_length, num_rows), jnp.float32),
            jnp.zeros((self.burst_length, num_rows, num_top), jnp.int32),
            jnp.zeros((self.burst_length, num_rows, num_top), jnp.float32),
        )

        def is_unfinished(carry: tuple[Array, Array, Any, Array, Array, DecodeBurst]) -> Array:
            step, active, *_ = carry
            return (step < self.burst_length) & jnp.any(active)

        def advance(carry: tuple[Array, Array, Any, Array, Array, DecodeBurst]) -> tuple[Any, ...]:
            step, active, state, logits, occurrences, burst = carry
            keys = jax.vmap(jax.random.fold_in)(base_keys, decode.positions + burst.counts)
            tokens, guided = _choose(decode, logits, occurrences, own.bias, keys)
            top = top_logprobs(guided, num_top)
            burst = DecodeBurst(
                burst.counts + active.astype(jnp.int32),
                burst.tokens.at[step].set(tokens),
                burst.logprobs.at[step].set(logprobs(guided, tokens)),
                burst.top_tokens.at[step].set(top[1]),
                burst.top_logprobs.at[step].set(top[0]),
            )
            counted = count(occurrences, tokens, decode.settings, jnp.asarray(self._weights))
            occurrences = jnp.where(active[:, None], counted, occurrences)
            after, state = model(tokens[:, None], state, lengths=active.astype(jnp.int32))
            logits = jnp.where(active[:, None], after[:, 0].astype(self._logits_dtype), logits)
            ends = jnp.take_along_axis(own.stops, tokens[:, None], axis=1)[:, 0] | (burst.counts >= decode.max_tokens)
            return step + 1, active & ~ends, state, logits, occurrences, burst

        begin = (jnp.int32(0), decode.max_tokens > 0, own.state, own.logits, own.occurrences, burst)
        _, _, state, logits, occurrences, burst = jax.lax.while_loop(is_unfinished, advance, begin)
        return self._scatter(slots, rows, state=state, logits=logits, occurrences=occurrences), burst_start, burst

    def _choose_masked(
        self, slots: Slots, rows: Array | None, decode: DecodeParams, masks: Array
    ) -> tuple[Array, Array]:
        """Chooses the next token of each row from a mask, ahead of `decode`, which then reads it in its own time.

        Args:
          masks: int32 [b, ceil(V / 32)], of which bit v % 32 of word v // 32 says whether token v may be chosen; a row
            without a zero is not masked.

        Returns:
          Tokens, int32 [b], -1 where the bias bans all that the mask allows; and a bias [S, V] with which `decode` can
          choose nothing else in masked rows.
        """
        own = self._gather(slots, rows)
        allowed = _unpacked(masks, self.vocab_size)
        keys = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(decode.seeds), decode.positions)
        masked_bias = jnp.where(allowed, own.bias, -jnp.inf)
        tokens, _ = _choose(decode, own.logits, own.occurrences, masked_bias, keys)
        tokens = jnp.where(jnp.any(masked_bias > -jnp.inf, axis=-1), tokens, -1)
        is_chosen = jnp.arange(self.vocab_size, dtype=jnp.int32) == tokens[:, None]
        bias = jnp.where(is_chosen | jnp.all(allowed, axis=-1, keepdims=True), own.bias, -jnp.inf)
        return tokens, self._scatter(slots, rows, bias=bias).bias

    def _start_burst(self, start: BurstStart, rows: Array | None, own: Slots, decode: DecodeParams) -> BurstStart:
        """Updates burst starts for the rows that this burst decodes."""
        if rows is None:
            active = jnp.asarray(decode.max_tokens) > 0
            choose_rows = functools.partial(_where_rows, active)
            state = jax.tree.map(functools.partial(choose_rows, self._rows_axis), own.state, start.state)
            return BurstStart(state, choose_rows(0, own.logits, start.logits))
        # In a branch: otherwise XLA fuses this with the rows' readers and copies all slots twice.
        return jax.lax.cond(
            jnp.any(decode.max_tokens > 0),
            lambda start: self._scatter(start, rows, state=own.state, logits=own.logits),
            lambda start: start,
            start,
        )


def _last(hidden: Array, lengths: Array) -> Array:
    """[r, C] of hidden [r, T, C]: the last valid one of each row; of an empty row, the first."""
    return jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def _take_rows(rows: Array, axis: int, x: Array) -> Array:
    """Rows of an array along an axis."""
    if len(rows) == 1:
        return jax.lax.dynamic_slice_in_dim(x, rows[0], 1, axis)
    return jnp.take(x, rows, axis, mode="clip")


def _set_rows(rows: Array, axis: int, x: Array, new: Array) -> Array:
    """Replaces rows of an array; rows beyond the last are dropped (a single row is always valid)."""
    if len(rows) == 1:
        return jax.lax.dynamic_update_slice_in_dim(x, new, rows[0], axis)
    return x.at[(slice(None),) * axis + (rows,)].set(new, mode="drop")


def _checksum(parameter: Array) -> Array:
    """uint32 [2] of a parameter's bits."""
    is_integer = jnp.issubdtype(parameter.dtype, jnp.integer)
    unsigned = _UNSIGNED[parameter.dtype.itemsize]
    bits = parameter if is_integer else jax.lax.bitcast_convert_type(parameter, unsigned)
    words = bits.astype(jnp.uint32).reshape(-1)
    place = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jnp.stack([jnp.sum(words * place), jnp.sum(words * (place * place + 2))]).astype(jnp.uint32)


def _choose(decode: DecodeParams, logits: Array, occurrences: Array, bias: Array, keys: Array) -> tuple[Array, Array]:
    """The next token of each row, int32 [b], and the logits after guidance, float32 [b, V]."""
    guided = jax.lax.cond(
        jnp.any(decode.guidance_scale != 1), functools.partial(_guide, decode), lambda logits: logits, logits
    ).astype(jnp.float32)
    return choose(guided, occurrences, bias, decode.settings, keys)[decode.token_row], guided


def _unpacked(masks: Array, size: int) -> Array:
    """bool [b, size] of the bits of int32 [b, ceil(size / 32)]."""
    bits = (masks[..., None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return bits.reshape(len(masks), -1)[:, :size] != 0


def _guide(decode: DecodeParams, logits: Array) -> Array:
    """Classifier-free guidance, away from the negative prompt's row (arXiv 2306.17806, equation 7)."""
    scale = decode.guidance_scale[:, None].astype(logits.dtype)
    return jnp.where(scale != 1, scale * logits + (1 - scale) * logits[decode.negative_row], logits)


def _where_rows(condition: Array, axis: int, x: Array, y: Array) -> Array:
    """Rows of x along an axis where the condition [S] holds, else of y."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return jnp.where(condition.reshape(shape), x, y)


def pad(values: Sequence[Any], size: int, filler: Any, dtype: Any) -> NDArray[Any]:
    """Values as an array of a fixed size, padded at the end."""
    padded = np.full(size, filler, dtype)
    padded[: len(values)] = values
    return padded
