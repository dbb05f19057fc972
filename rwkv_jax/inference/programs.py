"""What runs on the device: a fixed array of slots, each the state of one text, and the programs that change them.

A slot is one row of every array. Its `logits` are those after the last token that it has read, so writing is: choose a
token from them, then read it. Every token that comes out has therefore been read, the last one and a stop token too,
and a text can be left and taken up at any of them. No shape depends on the length of a text, of a prompt, or on how
many texts there are, so that the number of programs is known when the engine is built: three that make, fill and copy
slots, three shapes of reading, and one of writing for each batch size (two, where likeliest tokens are asked for).
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

from rwkv_jax.inference.sampling import Settings, choose, count, log_probabilities, top_log_probabilities
from rwkv_jax.models import LanguageModel

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
"""To what the bits of numbers of so many bytes are read; eight bytes as two words."""


class Slots(NamedTuple):
    """What is held of each text; S slots."""

    state: Any
    """The model's state of S rows."""
    logits: Array
    """[S, V] after the last token, in float32; in float64 of a float64 model."""
    occurrences: Array
    """float32 [S, V], as `sampling.count` counts them."""
    bias: Array
    """float32 [S, V], added to logits; -inf for tokens that must not be written."""
    stops: Array
    """bool [S, V], tokens that end a text."""


class Mark(NamedTuple):
    """State and logits of each slot before the last burst that it took part in, to which a reader may go back."""

    state: Any
    logits: Array


class Row(NamedTuple):
    """One slot's content that changes while it is written."""

    state: Any
    logits: Array
    occurrences: Array | NDArray[np.float32]


class Draw(NamedTuple):
    """How the rows of a burst are written; one entry a row."""

    settings: Settings
    seeds: NDArray[np.uint32]
    positions: NDArray[np.int32]
    """Tokens of the text before this burst: with the seed, what the keys of its draws are made of."""
    allowed: NDArray[np.int32]
    """Most tokens to write in this burst; 0 leaves a row untouched."""
    leader: NDArray[np.int32]
    """The row whose token this one reads: itself, or the one that it guides."""
    guide: NDArray[np.int32]
    """The row whose logits this one is steered away from: itself where nothing guides it."""
    guidance: NDArray[np.float32]
    """1 where nothing guides the row."""


class Burst(NamedTuple):
    """What some rows b have written in at most k steps; a row's first `counts` entries are its own."""

    counts: Array
    """int32 [b]."""
    tokens: Array
    """int32 [k, b]."""
    log_probabilities: Array
    """float32 [k, b]."""
    top_tokens: Array
    """int32 [k, b, n], n = num_top or, if that is less, V."""
    top_log_probabilities: Array
    """float32 [k, b, n]."""


class Programs:
    """The engine's compiled functions, of one model and one number of slots. Slots and marks are donated to them."""

    def __init__(
        self, model: LanguageModel, num_slots: int, burst_length: int, weights: NDArray[np.float32], mesh: Mesh | None
    ) -> None:
        """Compiles nothing yet.

        Args:
          burst_length: most tokens that a burst writes in each row.
          weights: [V], how much an occurrence of each token counts (`sampling.occurrence_weights`).
          mesh: over whose axes `data` and `fsdp` rows are split where their number allows; None is one device.
        """
        self.graphdef, self.params = nnx.split(model, nnx.Param)
        self.num_slots, self.burst_length = num_slots, burst_length
        self.vocab_size = model.config.vocab_size
        self._rows_axis = 1 if model.is_stacked else 0
        self._weights = weights
        self._logits_dtype = model.config.parameter_dtype
        if mesh is None:
            # Said outright: arrays that nobody has put anywhere and those that were put are arguments of two programs.
            device = next(iter(jax.tree.leaves(self.params)[0].devices()))
            whole = slots_on = mark_on = SingleDeviceSharding(device)
        else:
            whole = NamedSharding(mesh, PartitionSpec())
            slots_on, mark_on = (self._split_rows(x, mesh) for x in jax.eval_shape(self._make, self.params))
        self.make = jax.jit(self._make, out_shardings=(slots_on, mark_on))
        self._checksum = jax.jit(_checksum, out_shardings=whole)
        self.put = jax.jit(self._put, donate_argnums=0, out_shardings=slots_on)
        self.take = jax.jit(self._take, out_shardings=whole)
        self.read = jax.jit(self._read, donate_argnums=1, out_shardings=slots_on)
        self.write = jax.jit(
            self._write,
            static_argnames="num_top",
            donate_argnums=(1, 2),
            out_shardings=(slots_on, mark_on, whole),
        )

    def _model(self, params: Any) -> LanguageModel:
        return nnx.merge(self.graphdef, params)

    def _split_rows(self, tree: Any, mesh: Mesh) -> Any:
        axes = tuple(name for name in ("data", "fsdp") if mesh.shape.get(name, 1) > 1)
        parts = int(np.prod([mesh.shape[name] for name in axes], dtype=int))
        rows = PartitionSpec() if not axes or self.num_slots % parts else PartitionSpec(axes)
        stacked = PartitionSpec(None, *rows)
        on_rows, on_stacked = NamedSharding(mesh, rows), NamedSharding(mesh, stacked)
        split = jax.tree.map(lambda _: on_rows, tree)
        in_state = on_stacked if self._rows_axis == 1 else on_rows
        return split._replace(state=jax.tree.map(lambda _: in_state, tree.state))

    # Rows of the state, whose axis of rows comes after that of stacked layers.

    def _rows(self, state: Any, rows: Array) -> Any:
        return jax.tree.map(functools.partial(_taken, rows, self._rows_axis), state)

    def _with_rows(self, state: Any, rows: Array, new: Any) -> Any:
        return jax.tree.map(functools.partial(_put_back, rows, self._rows_axis), state, new)

    def _at(self, rows: Any) -> Any:
        return (slice(None), rows) if self._rows_axis == 1 else rows

    def checksum(self) -> bytes:
        """8 bytes that tell models of one shape apart, and prove nothing: of all parameters' bits, in order.

        A program for each shape of parameters: one for all of them takes XLA a minute to compile for 24 layers.
        """
        total = np.zeros(2, np.uint32)
        for of_leaf in jax.device_get([self._checksum(leaf) for leaf in jax.tree.leaves(self.params)]):
            total = total * np.uint32(0x01000193) + of_leaf
        return total.tobytes()

    # The programs.

    def _make(self, params: Any) -> tuple[Slots, Mark]:
        """Slots of texts that have not begun."""
        size, vocab = self.num_slots, self.vocab_size
        state = self._model(params).initial_state(size)
        logits = jnp.zeros((size, vocab), self._logits_dtype)
        zeros = jnp.zeros((size, vocab), jnp.float32)
        slots = Slots(state, logits, zeros, zeros, jnp.zeros((size, vocab), bool))
        return slots, Mark(jax.tree.map(jnp.copy, state), logits)

    def _put(self, slots: Slots, slot: Array, row: Row, bias: Array, stops: Array) -> Slots:
        """Begins or takes up a text in a slot."""
        state = jax.tree.map(lambda x, y: x.at[self._at(slot)].set(y), slots.state, row.state)
        return Slots(
            state,
            slots.logits.at[slot].set(row.logits),
            slots.occurrences.at[slot].set(row.occurrences),
            slots.bias.at[slot].set(bias),
            slots.stops.at[slot].set(stops),
        )

    def _take(self, state: Any, logits: Array, occurrences: Array, slot: Array) -> Row:
        """One row of slots, or of a mark."""
        return Row(jax.tree.map(lambda x: x[self._at(slot)], state), logits[slot], occurrences[slot])

    def _read(
        self, params: Any, slots: Slots, rows: Array | None, tokens: Array, lengths: Array, wants_logits: Array
    ) -> Slots:
        """Reads up to T tokens into each of r slots.

        Args:
          rows: int32 [r], slots; None is all of them in order.
          tokens: int32 [r, T], of which the first `lengths` [r] of a row are read; 0 leaves a slot untouched.
          wants_logits: whether any row ends here; logits are left as they were otherwise.
        """
        model = self._model(params)
        state = slots.state if rows is None else self._rows(slots.state, rows)
        logits = slots.logits if rows is None else _taken(rows, 0, slots.logits)
        hidden, state = model.hidden(tokens, state, lengths=lengths)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        logits = jax.lax.cond(
            wants_logits,
            lambda: jnp.where((lengths > 0)[:, None], model.logits(last).astype(self._logits_dtype), logits),
            lambda: logits,
        )
        if rows is None:
            return slots._replace(state=state, logits=logits)
        return slots._replace(
            state=self._with_rows(slots.state, rows, state), logits=_put_back(rows, 0, slots.logits, logits)
        )

    def _write(
        self,
        params: Any,
        slots: Slots,
        mark: Mark,
        rows: Array | None,
        draw: Draw,
        *,
        num_top: int,
    ) -> tuple[Slots, Mark, Burst]:
        """Writes tokens in b slots until each has written what it may, or a token that ends it.

        Args:
          rows: int32 [b], slots; None is all of them in order; S stands for no slot.
          num_top: likeliest tokens to report with each, all V if there are fewer; each number is a program of its own.
        """
        model = self._model(params)
        num_top = min(num_top, self.vocab_size)
        if rows is None:
            own = slots
            mark = Mark(
                *_where_rows(jnp.asarray(draw.allowed) > 0, (slots.state, slots.logits), tuple(mark), self._rows_axis)
            )
        else:
            row = {name: _taken(rows, 0, x) for name, x in slots._asdict().items() if name != "state"}
            own = Slots(self._rows(slots.state, rows), **row)
            # In a branch, which takes rows and not slots: fused with what reads them, XLA would copy the slots, twice.
            mark = jax.lax.cond(
                jnp.any(draw.allowed > 0),
                lambda mark: Mark(
                    self._with_rows(mark.state, rows, own.state), _put_back(rows, 0, mark.logits, own.logits)
                ),
                lambda mark: mark,
                mark,
            )
        num_rows = own.logits.shape[0]
        base_keys = jax.vmap(jax.random.key)(draw.seeds)
        burst = Burst(
            jnp.zeros((num_rows,), jnp.int32),
            jnp.zeros((self.burst_length, num_rows), jnp.int32),
            jnp.zeros((self.burst_length, num_rows), jnp.float32),
            jnp.zeros((self.burst_length, num_rows, num_top), jnp.int32),
            jnp.zeros((self.burst_length, num_rows, num_top), jnp.float32),
        )

        def goes_on(carry: tuple[Array, Array, Any, Array, Array, Burst]) -> Array:
            step, active, *_ = carry
            return (step < self.burst_length) & jnp.any(active)

        def advance(carry: tuple[Array, Array, Any, Array, Array, Burst]) -> tuple[Any, ...]:
            step, active, state, logits, occurrences, burst = carry
            steered = jax.lax.cond(
                jnp.any(draw.guidance != 1), functools.partial(_steer, draw), lambda logits: logits, logits
            ).astype(jnp.float32)
            keys = jax.vmap(jax.random.fold_in)(base_keys, draw.positions + burst.counts)
            tokens = choose(steered, occurrences, own.bias, draw.settings, keys)[draw.leader]
            top = top_log_probabilities(steered, num_top)
            burst = Burst(
                burst.counts + active,
                burst.tokens.at[step].set(tokens),
                burst.log_probabilities.at[step].set(log_probabilities(steered, tokens)),
                burst.top_tokens.at[step].set(top[1]),
                burst.top_log_probabilities.at[step].set(top[0]),
            )
            counted = count(occurrences, tokens, draw.settings, jnp.asarray(self._weights))
            occurrences = jnp.where(active[:, None], counted, occurrences)
            after, state = model(tokens[:, None], state, lengths=active.astype(jnp.int32))
            logits = jnp.where(active[:, None], after[:, 0].astype(self._logits_dtype), logits)
            ends = jnp.take_along_axis(own.stops, tokens[:, None], axis=1)[:, 0] | (burst.counts >= draw.allowed)
            return step + 1, active & ~ends, state, logits, occurrences, burst

        begin = (jnp.int32(0), draw.allowed > 0, own.state, own.logits, own.occurrences, burst)
        _, _, state, logits, occurrences, burst = jax.lax.while_loop(goes_on, advance, begin)
        if rows is None:
            return slots._replace(state=state, logits=logits, occurrences=occurrences), mark, burst
        return (
            slots._replace(
                state=self._with_rows(slots.state, rows, state),
                logits=_put_back(rows, 0, slots.logits, logits),
                occurrences=_put_back(rows, 0, slots.occurrences, occurrences),
            ),
            mark,
            burst,
        )


def _taken(rows: Array, axis: int, x: Array) -> Array:
    """Rows of an array, in this order."""
    if len(rows) == 1:
        return jax.lax.dynamic_slice_in_dim(x, rows[0], 1, axis)
    return jnp.take(x, rows, axis, mode="clip")


def _put_back(rows: Array, axis: int, x: Array, new: Array) -> Array:
    """The array with new rows; a row beyond the last is none. (A single row, always a real one, is put in place.)"""
    if len(rows) == 1:
        return jax.lax.dynamic_update_slice_in_dim(x, new, rows[0], axis)
    return x.at[(slice(None),) * axis + (rows,)].set(new, mode="drop")


def _checksum(parameter: Array) -> Array:
    """uint32 [2] of a parameter's bits."""
    is_whole = jnp.issubdtype(parameter.dtype, jnp.integer)
    unsigned = _UNSIGNED[parameter.dtype.itemsize]
    bits = parameter if is_whole else jax.lax.bitcast_convert_type(parameter, unsigned)
    words = bits.astype(jnp.uint32).reshape(-1)
    place = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jnp.stack([jnp.sum(words * place), jnp.sum(words * (place * place + 2))]).astype(jnp.uint32)


def _steer(draw: Draw, logits: Array) -> Array:
    """Classifier-free guidance: away from what another row says (arXiv 2306.17806, equation 7)."""
    guided = draw.guidance[:, None] * logits + (1 - draw.guidance[:, None]) * logits[draw.guide]
    return jnp.where((draw.guidance != 1)[:, None], guided, logits)


def _where_rows(condition: Array, x: Any, y: Any, rows_axis: int) -> Any:
    """The rows of (state, logits) x where the condition [S] holds, of y elsewhere."""

    def choose_rows(axis: int, x: Array, y: Array) -> Array:
        shape = [1] * x.ndim
        shape[axis] = -1
        return jnp.where(condition.reshape(shape), x, y)

    return tuple(
        jax.tree.map(functools.partial(choose_rows, axis), *pair)
        for axis, *pair in zip((rows_axis, 0), x, y, strict=True)
    )


def pad(values: Sequence[Any], size: int, filler: Any, dtype: Any) -> NDArray[Any]:
    """Values as an array of a fixed size."""
    padded = np.full(size, filler, dtype)
    padded[: len(values)] = values
    return padded
