"""The four tables of a widely copied tutorial on RWKV, with correct formulas, measured here beside its own numbers.

    python -m experiments.tutorial_tables.run

1. Milliseconds a token by context, batch 1: RWKV-7, whose state has read the context, and a Transformer of equal size
   with a cache of that length, in the same loop.
2. Bytes of cache and state of a 7B model by context, in closed form; the state's is held against the arrays' shapes.
3. Quality of 124M and 1.5B models: not measured, since that needs their weights. What was published for RWKV-4 of these
   sizes is quoted.
4. Tokens a second by number of texts at once, each behind 512 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode_context import Decoder, RWKVColumn, TransformerColumn, bytes_of, initialized
from benchmarks.decode_context import measure as measure_contexts
from experiments import common
from rwkv_jax.bench.measure import cache_bytes, state_bytes
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import model_type

TUTORIAL: dict[str, Any] = {
    "latency_ms": {
        "contexts": [512, 2048, 8192, 32768, 131072],
        "Transformer": [8.2, 22.4, 89.7, 358.3, None],
        "RWKV": [10.1, 10.3, 10.5, 10.8, 11.2],
    },
    "memory_gb": {
        "contexts": [512, 2048, 8192, 32768, 131072],
        "Transformer": [0.5, 2.1, 8.4, 33.6, None],
        "RWKV": [0.2, 0.2, 0.2, 0.2, 0.2],
    },
    "tokens_per_second": {
        "batches": [1, 4, 16, 64],
        "Transformer": [45, 156, 498, 1520],
        "RWKV": [92, 285, 720, 1680],
    },
    "lambada_of_rwkv_124m": 43.8,
}
"""What it prints; None where it says out of memory."""

PUBLISHED = {
    "RWKV-4 169M": {"LAMBADA": 32.99, "LAMBADA perplexity": 29.33, "PIQA": 65.07, "HellaSwag": 32.26},
    "RWKV-4 1.5B": {"LAMBADA": 56.43, "LAMBADA perplexity": 7.04, "PIQA": 72.36, "HellaSwag": 52.48},
}
"""Zero-shot accuracy in percent of models of the Pile (arXiv 2305.13048, table of zero-shot results); quoted."""

SEVEN_B = ModelConfig(vocab_size=65536, num_layers=32, width=4096)
RWKV, TRANSFORMER = "RWKV-7", "Transformer"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models that are timed."""

    num_layers: int = 4
    width: int = 256
    head_dim: int = 64
    vocab_size: int = 8192
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 4, 16, 64)
    calls: int = 4
    """Of 8 tokens, in a repetition."""
    repetitions: int = 5


SMALL = Sizes()
SMALLEST = Sizes(
    num_layers=2, width=16, head_dim=8, vocab_size=11, contexts=(512,), batches=(1,), calls=1, repetitions=1
)


def latencies(config: ModelConfig, sizes: Sizes) -> dict[str, Any]:
    """Table 1."""
    columns = {
        RWKV: RWKVColumn(config, sizes.contexts),
        TRANSFORMER: TransformerColumn(config, sizes.contexts, sizes.calls),
    }
    found = measure_contexts(columns, sizes.contexts, sizes.calls, sizes.repetitions)
    return {
        name: {
            "ms": [1e3 * common.median(found[name, context]) for context in sizes.contexts],
            "ms_90th": [1e3 * float(np.quantile(found[name, context], 0.9)) for context in sizes.contexts],
            "bytes": [column.bytes_after(context) for context in sizes.contexts],
        }
        for name, column in columns.items()
    }


def memory(config: ModelConfig, contexts: Sequence[int]) -> dict[str, Any]:
    """Table 2: bytes of one text."""
    found: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        rwkv = dataclasses.replace(config, dtype=dtype)
        four = dataclasses.replace(rwkv, generation="4")
        shapes = jax.eval_shape(lambda rwkv=rwkv: model_type(rwkv).initial_block_state(rwkv, 1))
        if rwkv.num_layers * bytes_of(shapes) != state_bytes(rwkv):
            raise RuntimeError(f"{dtype}: the state's arrays are not those of the closed form")
        transformer = dataclasses.replace(rwkv.transformer_of_equal_size(contexts[-1]), dtype=dtype)
        found[dtype] = {
            TRANSFORMER: [cache_bytes(transformer, context) for context in contexts],
            RWKV: state_bytes(rwkv),
            "RWKV-4": state_bytes(four),
        }
    return found


def throughputs(config: ModelConfig, sizes: Sizes) -> dict[str, list[float]]:
    """Table 4: tokens a second by number of texts."""
    held = 512
    room = 8 * (sizes.calls + 1)
    configs = {RWKV: config, TRANSFORMER: config.transformer_of_equal_size(held + room)}
    decoders = {name: Decoder(initialized(each)) for name, each in configs.items()}

    def run(name: str, batch: int) -> Callable[[], float]:
        def seconds() -> float:
            state = decoders[name].initial_state(batch)
            if name == TRANSFORMER:
                state = tuple(part._replace(position=jnp.full_like(part.position, held)) for part in state)
            return decoders[name].seconds_per_token(state, sizes.calls, batch)

        return seconds

    found: dict[str, list[float]] = {name: [] for name in configs}
    for batch in sizes.batches:
        functions = {name: run(name, batch) for name in configs}
        times: dict[str, list[float]] = {name: [] for name in configs}
        for repetition in range(sizes.repetitions + 1):
            for name, seconds in functions.items():
                measured = seconds()
                if repetition:  # the first compiles
                    times[name].append(measured)
        for name, values in times.items():
            found[name].append(batch / common.median(values))
    return found


def measure(sizes: Sizes) -> common.Results:
    """The tables."""
    shape: dict[str, Any] = {"num_layers": sizes.num_layers, "width": sizes.width, "head_dim": sizes.head_dim}
    config = ModelConfig(vocab_size=sizes.vocab_size, **shape)
    common.progress("throughput")
    by_batch = throughputs(config, sizes)
    common.progress("latency")
    by_context = latencies(config, sizes)
    return {
        "latency": by_context,
        "memory_of_7b": memory(SEVEN_B, TUTORIAL["memory_gb"]["contexts"]),
        "quality": {"measured": None, "published": PUBLISHED},
        "tokens_per_second": by_batch,
        "tutorial": TUTORIAL,
    }


def claims(results: common.Results) -> common.Claims:
    """Flat, growing, and more texts at once write more."""
    rwkv, transformer = (results["latency"][name]["ms"] for name in (RWKV, TRANSFORMER))
    rates = results["tokens_per_second"][RWKV]
    return {
        "RWKV-7's time of a token differs by less than 15% between contexts": max(rwkv) < 1.15 * min(rwkv),
        "the Transformer's grows with every context": transformer == sorted(transformer),
        "RWKV-7 writes more tokens a second with 4 texts than with 1, and with 16 than with 4": rates[0]
        < rates[1]
        < rates[2],
    }


def draw(results: common.Results, path: Path) -> None:
    """Latency, memory and throughput; the tutorial's numbers dotted."""
    figure, axes = common.new_figure(3, width=3.8)
    told, sizes = results["tutorial"], results["sizes"]
    contexts = told["memory_gb"]["contexts"]
    for name, key in ((RWKV, "RWKV"), (TRANSFORMER, "Transformer")):
        color = common.COLORS[name]
        dotted = {"color": color, "ls": ":", "marker": "."}
        axes[0].plot(sizes["contexts"], results["latency"][name]["ms"], **common.style(name))
        axes[0].plot(contexts, [np.nan if y is None else y for y in told["latency_ms"][key]], **dotted)
        axes[1].plot(contexts, [np.nan if y is None else 1e9 * y for y in told["memory_gb"][key]], **dotted)
        axes[2].plot(sizes["batches"], results["tokens_per_second"][name], **common.style(name))
        axes[2].plot(told["tokens_per_second"]["batches"], told["tokens_per_second"][key], **dotted)
    for dtype, line in (("float32", "-"), ("bfloat16", "--")):
        row = results["memory_of_7b"][dtype]
        axes[1].plot(contexts, row[TRANSFORMER], color=common.COLORS[TRANSFORMER], ls=line, label=f"cache, {dtype}")
        axes[1].axhline(row[RWKV], color=common.COLORS[RWKV], ls=line, label=f"RWKV-7 state, {dtype}")
    axes[0].set(xscale="log", yscale="log", xlabel="tokens before", ylabel="ms a token")
    axes[0].set(title=f"{sizes['num_layers']} x {sizes['width']}; dotted: tutorial")
    axes[1].set(xscale="log", yscale="log", xlabel="tokens before", ylabel="bytes of a text", title="7B")
    axes[2].set(xscale="log", yscale="log", xlabel="texts at once", ylabel="tokens/s")
    axes[0].legend(fontsize=7)
    axes[1].legend(fontsize=7)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
