"""Time and memory of reading T tokens, T from 10 to 100,000: which power of T do they grow with?

python -m experiments.runtime.run

Every model reads one text from its start in one compiled call and gives the logits of the next token; the Transformer
up to a length that takes seconds. Memory is what XLA plans for the call besides its arguments (temporary arrays and the
results), and for a training step with all gradients, which is compiled but not run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import common
from rwkv_jax.bench.random_model import random_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel

FITTED = 3
"""Lengths of the fit, the longest ones."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and texts."""

    models: tuple[str, ...] = tuple(common.ALL_MODELS)
    num_layers: int = 2
    width: int = 64
    head_dim: int = 32
    vocab_size: int = 64
    lengths: tuple[int, ...] = (10, 100, 1000, 10_000, 100_000)
    quadratic_lengths: tuple[int, ...] = (10, 100, 1000, 3000, 10_000, 30_000)
    """Of models whose state grows with the text."""
    trained_up_to: int = 10_000
    """Longest text whose training step is planned."""
    repetitions: int = 5


SMALL = Sizes()
SMALLEST = Sizes(
    models=("RWKV-4", "Transformer"),
    width=16,
    head_dim=8,
    lengths=(4, 8),
    quadratic_lengths=(4, 8),
    trained_up_to=4,
    repetitions=1,
)


def reader(model: LanguageModel) -> tuple[Callable[..., Any], Any]:
    """(params, tokens [1, T]) -> logits [1, V] after the last one, and the parameters."""
    graphdef, params = nnx.split(model, nnx.Param)

    def read(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.logits(model.hidden(tokens).hidden[:, -1])

    return read, params


def training_bytes(model: LanguageModel, tokens: jax.Array) -> int:
    """Temporary memory of a loss with all gradients."""
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens).logits)
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, :, None], axis=-1))

    return planned_bytes(jax.jit(jax.grad(loss)).lower(params, tokens).compile())


def planned_bytes(compiled: Any) -> int:
    """What XLA plans beside the arguments."""
    plan = compiled.memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes


def model_for(name: str, sizes: Sizes, length: int) -> LanguageModel:
    """A random model, with room for the text where it needs room."""
    fields: dict[str, Any] = {"vocab_size": sizes.vocab_size, "num_layers": sizes.num_layers}
    config = ModelConfig(**common.ALL_MODELS[name], **fields, width=sizes.width, head_dim=sizes.head_dim)
    return random_model(dataclasses.replace(config, context_length=length) if grows(name) else config)


def grows(name: str) -> bool:
    """Whether a model's state grows with the text."""
    return bool(ModelConfig(**common.ALL_MODELS[name]).sizes().context_length)


def measure(sizes: Sizes) -> common.Results:
    """Seconds and bytes of each model at each length, and the slopes of the longest ones."""
    rng = np.random.default_rng(0)
    lengths_of = {name: sizes.quadratic_lengths if grows(name) else sizes.lengths for name in sizes.models}
    rows: dict[str, dict[str, list[Any]]] = {
        name: {"length": list(lengths), "seconds": [], "bytes": [], "training_bytes": []}
        for name, lengths in lengths_of.items()
    }
    runs: dict[int, dict[str, Callable[[], Any]]] = {}
    for name, length in ((name, length) for name, lengths in lengths_of.items() for length in lengths):
        common.progress(f"{name}, {length} tokens")
        tokens = jnp.asarray(rng.integers(0, sizes.vocab_size, (1, length), np.int32))
        model = model_for(name, sizes, length)
        read, params = reader(model)
        compiled = jax.jit(read).lower(params, tokens).compile()
        run = functools.partial(compiled, params, tokens)
        runs.setdefault(length, {})[name] = run
        rows[name]["bytes"].append(planned_bytes(compiled))
        is_trained = length <= sizes.trained_up_to
        rows[name]["training_bytes"].append(training_bytes(model, tokens) if is_trained else None)
    for length in sorted(runs):
        repetitions = sizes.repetitions if length <= 10_000 else min(sizes.repetitions, 3)
        for name, seconds in common.time_in_turns(runs[length], repetitions).items():
            rows[name]["seconds"].append(common.median(seconds))
    slopes = {}
    for name, row in rows.items():
        fit = common.fit_power_law(row["length"][-FITTED:], row["seconds"][-FITTED:])
        slopes[name] = {"slope": fit.slope, "r_squared": fit.r_squared, "lengths": row["length"][-FITTED:]}
    return {"rows": rows, "slopes": slopes}


def claims(results: common.Results) -> common.Claims:
    """The slopes of the issue."""
    slopes = {name: fit["slope"] for name, fit in results["slopes"].items()}
    rwkv = [slope for name, slope in slopes.items() if name in common.GENERATIONS]
    others = [slope for name, slope in slopes.items() if name in common.BASELINES]
    quadratic = [slope for name, slope in slopes.items() if name in common.TRANSFORMER]
    return {
        "every RWKV's time grows with T to the power 0.9 to 1.1": all(0.9 <= slope <= 1.1 for slope in rwkv),
        "every other recurrence's time grows with T to the power 0.8 to 1.2": all(
            0.8 <= slope <= 1.2 for slope in others
        ),
        "attention's time grows with T to a power above 1.6": all(slope > 1.6 for slope in quadratic),
    }


def draw(results: common.Results, path: Path) -> None:
    """Time and memory by length."""
    figure, axes = common.new_figure(3, width=3.8)
    fields: dict[str, Any] = {
        "seconds": ("time of one text", "s"),
        "bytes": ("memory to read it", "bytes"),
        "training_bytes": ("memory of a training step", "bytes"),
    }
    for panel, (field, (title, unit)) in zip(axes, fields.items(), strict=True):
        for name, row in results["rows"].items():
            points = [(x, y) for x, y in zip(row["length"], row[field], strict=True) if y is not None]
            label = f"{name}: T^{results['slopes'][name]['slope']:.2f}"
            panel.plot(*zip(*points, strict=True), **common.style(name) | {"label": label})
        panel.set(xscale="log", yscale="log", xlabel="tokens T", ylabel=unit, title=title)
    axes[0].legend(fontsize=7)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
