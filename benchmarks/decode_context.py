"""Time to decode a token after contexts of 512 to 128K tokens, and what is carried: RWKV-7 beside a Transformer.

    python benchmarks/decode_context.py
    python benchmarks/decode_context.py --contexts 512 2048 8192 --num-layers 6 --width 512

Both models have the same depth and width and as many parameters, random and in float32, and run in the same loop:
batch 1, layers unstacked, the state donated. RWKV-7 reads the whole context first. The Transformer's caches are made
up, of the length that the context would have and with room for no more than is timed: reading 128K tokens would take it
hours, and the values change no time. Models and contexts take turns; medians are quoted. The longest cache takes 10 GB
at 12 x 768. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from rwkv_jax.bench.measure import state_bytes
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel, model_type
from rwkv_jax.models.decoding import unstacked

TOKENS_PER_CALL = 8
CHUNK = 512
"""Tokens of a context that are read in one call."""

MOST_APART = 0.1
"""By which the times of a model whose state has a constant size may differ, as a share of the least."""


class Decoder:
    """A model as a loop that decodes, and reads contexts."""

    def __init__(self, model: LanguageModel) -> None:
        model = unstacked(model)
        graphdef, self._params = nnx.split(model, nnx.Param)
        self.config = model.config

        def step(params: Any, state: Any, tokens: Array) -> tuple[Any, Array]:
            model = nnx.merge(graphdef, params)
            hidden, state = model.hidden(tokens, state)
            return state, jnp.argmax(model.logits(hidden[:, -1]), axis=-1).astype(jnp.int32)

        def write(params: Any, state: Any, token: Array) -> tuple[Any, Array]:
            def body(_: Any, carry: tuple[Any, Array]) -> tuple[Any, Array]:
                return step(params, carry[0], carry[1][:, None])

            return jax.lax.fori_loop(0, TOKENS_PER_CALL, body, (state, token))

        self._read = jax.jit(step, donate_argnums=1)
        self._write = jax.jit(write, donate_argnums=1)
        self.initial_state = jax.jit(lambda batch_size=1: model.initial_state(batch_size), static_argnums=0)

    def read(self, state: Any, tokens: np.ndarray) -> Any:
        """The state after tokens [T], T a multiple of CHUNK, that follow on a state, which is donated."""
        for chunk in tokens.reshape(-1, 1, CHUNK):
            state, _ = self._read(self._params, state, chunk)
        return jax.block_until_ready(state)

    def seconds_per_token(self, state: Any, calls: int, batch_size: int = 1) -> float:
        """Of a token in each text after a state, which is donated."""
        state, token = self._write(self._params, state, jnp.zeros((batch_size,), jnp.int32))
        jax.block_until_ready(token)
        began = time.perf_counter()
        for _ in range(calls):
            state, token = self._write(self._params, state, token)
        jax.block_until_ready((state, token))
        return (time.perf_counter() - began) / (calls * TOKENS_PER_CALL)


def initialized(config: ModelConfig) -> LanguageModel:
    """A model with its initial parameters."""
    return nnx.jit(lambda: model_type(config)(config, rngs=nnx.Rngs(0)))()


def bytes_of(state: Any) -> int:
    """Of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def bytes_with_room_for(config: ModelConfig, positions: int) -> int:
    """Of a Transformer's state that holds so many positions, in closed form."""
    return state_bytes(dataclasses.replace(config, context_length=positions))


class RWKVColumn:
    """RWKV-7 after contexts that it has read."""

    def __init__(self, config: ModelConfig, contexts: Sequence[int]) -> None:
        self._decoder = Decoder(initialized(config))
        self.config = config
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, contexts[-1], np.int32)
        state = self._decoder.initial_state()
        self._states: dict[int, Any] = {}
        for before, context in itertools.pairwise([0, *contexts]):
            state = self._decoder.read(state, tokens[before:context])
            self._states[context] = jax.tree.map(jnp.copy, state)

    def bytes_after(self, context: int) -> int:
        """Of the state; an error if they are not what they must be."""
        found, expected = bytes_of(self._states[context]), state_bytes(self.config)
        if found != expected:
            raise RuntimeError(f"the state after {context} tokens has {found} bytes where {expected} are expected")
        return found

    def seconds_after(self, context: int, calls: int) -> float:
        """A token."""
        return self._decoder.seconds_per_token(jax.tree.map(jnp.copy, self._states[context]), calls)


class TransformerColumn:
    """A Transformer of equal size after contexts that are made up; one cache at a time."""

    def __init__(self, config: ModelConfig, contexts: Sequence[int], calls: int) -> None:
        room = TOKENS_PER_CALL * (calls + 1)
        model = initialized(config.transformer_of_equal_size(contexts[0] + room))
        graphdef, params = nnx.split(model, nnx.Param)
        self._decoders: dict[int, Decoder] = {}
        for context in contexts:
            # The length of a cache is no parameter: the models share theirs.
            model = nnx.merge(graphdef, params)
            model.config = dataclasses.replace(model.config, context_length=context + room)
            self._decoders[context] = Decoder(model)

    def bytes_after(self, context: int) -> int:
        """Of a cache of just this length."""
        config = self._decoders[context].config
        positions = config.sizes().context_length
        found = bytes_of(jax.eval_shape(self._decoders[context].initial_state))
        if found != (expected := bytes_with_room_for(config, positions)):
            raise RuntimeError(f"a cache of {positions} has {found} bytes, not {expected}")
        return bytes_with_room_for(config, context)

    def seconds_after(self, context: int, calls: int) -> float:
        """A token."""
        decoder = self._decoders[context]
        state = tuple(
            cache._replace(position=jnp.full_like(cache.position, context)) for cache in decoder.initial_state()
        )
        return decoder.seconds_per_token(state, calls)


Column = RWKVColumn | TransformerColumn


def measure(
    columns: dict[str, Column], contexts: Sequence[int], calls: int, repetitions: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds a token of each model after each context, a repetition each in turn."""
    found: dict[tuple[str, int], list[float]] = {}
    for repetition, context, name in itertools.product(range(repetitions + 1), contexts, columns):
        seconds = columns[name].seconds_after(context, calls)
        if repetition:  # the first compiles
            found.setdefault((name, context), []).append(seconds)
    return found


def report(columns: dict[str, Column], contexts: Sequence[int], found: dict[tuple[str, int], list[float]]) -> str:
    """The table, in Markdown, and how far each model's times are apart."""
    lines = [
        "| tokens before | " + " | ".join(f"{name}, ms a token | state" for name in columns) + " |",
        "|---" * (1 + 2 * len(columns)) + "|",
    ]
    for context in contexts:
        cells = [f"{context:,}"]
        for name, column in columns.items():
            times = [1e3 * seconds for seconds in found[name, context]]
            cells.append(f"**{statistics.median(times):.1f}** ({min(times):.1f} - {max(times):.1f})")
            cells.append(f"{column.bytes_after(context) / 1e6:,.2f} MB")
        lines.append("| " + " | ".join(cells) + " |")
    for name in columns:
        medians = [statistics.median(found[name, context]) for context in contexts]
        apart = max(medians) / min(medians) - 1
        verdict = "yes" if apart <= MOST_APART else "NO"
        lines.append(
            f"\n{name}: the slowest median is {apart:.1%} above the fastest; within {MOST_APART:.0%}: {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_contexts = [512, 2048, 8192, 32768, 131072]
    parser.add_argument("--contexts", type=int, nargs="+", default=default_contexts, help="multiples of 512")
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--models", nargs="+", choices=["RWKV-7", "Transformer"], default=["RWKV-7", "Transformer"])
    parser.add_argument("--calls", type=int, default=4, help=f"timed, of {TOKENS_PER_CALL} tokens each")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    contexts = sorted(set(arguments.contexts))
    if any(context % CHUNK for context in contexts):
        parser.error(f"--contexts: must be multiples of {CHUNK}")
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    print(describe_machine())
    print(
        f"{config.num_layers} x {config.width}, vocabulary {config.vocab_size}, float32, batch 1; medians of "
        f"{arguments.repetitions} repetitions in turn\n",
        flush=True,
    )
    columns: dict[str, Column] = {}
    if "RWKV-7" in arguments.models:
        columns["RWKV-7"] = RWKVColumn(config, contexts)
    if "Transformer" in arguments.models:
        columns["Transformer"] = TransformerColumn(config, contexts, arguments.calls)
    print(report(columns, contexts, measure(columns, contexts, arguments.calls, arguments.repetitions)))


if __name__ == "__main__":
    main()
