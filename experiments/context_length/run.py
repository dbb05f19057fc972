"""Does a longer context lower the loss, and what happens beyond the length of training?

python -m experiments.context_length.run

Models trained on texts of T bytes read held-out texts of 4 T bytes, with the state carried. The loss of a byte is given
by the number of bytes before it.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import common
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.models import LanguageModel


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of models, runs and held-out texts."""

    models: tuple[str, ...] = ("RWKV-4", "RWKV-7", "Transformer")
    num_layers: int = 2
    width: int = 96
    head_dim: int = 32
    num_steps: int = 400
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 4e-3
    held_out: float = 0.02
    num_texts: int = 64
    """Held-out texts."""
    times_longer: int = 4
    source: str = "python-stdlib"
    rates: tuple[tuple[str, float], ...] = (("Transformer", 2e-3),)
    """Learning rates of models that want another one."""


SMALL = Sizes()
SMALLEST = Sizes(
    models=("RWKV-4",),
    width=8,
    head_dim=4,
    num_steps=2,
    batch_size=2,
    sequence_length=8,
    held_out=0.5,
    num_texts=2,
    source=common.TINY,
)


def losses_by_position(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """[B, T]: -log p of tokens [B, 1:], nats."""
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def losses(params: Any, tokens: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[:, :-1]).logits)
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]

    return np.concatenate([np.asarray(losses(params, jnp.asarray(row[None]))) for row in tokens])


def held_out_texts(config: Any, folder: Path, count: int, length: int) -> np.ndarray:
    """int32 [count, length + 1], spread over the held-out documents; each begins with the end of a text."""
    corpus = prepare_corpus(common.with_source(config.data, folder), config.model.vocab_size, lambda line: None)
    assert corpus.held_out is not None
    tokens = np.asarray(corpus.held_out.tokens)
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    rows = np.stack([tokens[start : start + length] for start in starts])
    return np.concatenate([np.full((count, 1), corpus.tokenizer.end_of_text), rows], axis=1).astype(np.int32)


def buckets(length: int) -> list[tuple[int, int]]:
    """Ranges of bytes before a byte: 0 to 8, 8 to 32, and on by factors of 4."""
    edges = [0, 8]
    while edges[-1] < length:
        edges.append(min(4 * edges[-1], length))
    return list(itertools.pairwise(edges))


def measure(sizes: Sizes) -> common.Results:
    """Mean loss of each model in each range."""
    length = sizes.times_longer * sizes.sequence_length
    trained = sizes.sequence_length
    ranges = [*buckets(trained), (trained, 2 * trained), (2 * trained, length)]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes.models:
            common.progress(name)
            shape: dict[str, Any] = {"num_layers": sizes.num_layers, "width": sizes.width, "head_dim": sizes.head_dim}
            model = ModelConfig(**common.ALL_MODELS[name], vocab_size=common.NUM_BYTES, **shape)
            if model.sizes().context_length:
                model = dataclasses.replace(model, context_length=length)
            config = common.train_config(
                model,
                num_steps=sizes.num_steps,
                batch_size=sizes.batch_size,
                sequence_length=sizes.sequence_length,
                learning_rate=dict(sizes.rates).get(name, sizes.learning_rate),
                source=sizes.source,
                held_out=sizes.held_out,
            )
            run = common.train_run(config, Path(folder))
            texts = held_out_texts(config, Path(folder), sizes.num_texts, length)
            losses = losses_by_position(common.model_of(model, run.params), texts)
            rows[name] = {
                "parameters": model.num_parameters(),
                "held_out": run.last_held_out,
                "loss": [losses[:, first:last].mean() for first, last in ranges],
                "error": [losses[:, first:last].mean(axis=1).std() / len(losses) ** 0.5 for first, last in ranges],
            }
    return {"ranges": ranges, "rows": rows}


def claims(results: common.Results) -> common.Claims:
    """Within the trained length every range is better than the first; beyond it, RWKV does not fall apart."""
    trained = sum(last <= results["sizes"]["sequence_length"] for _, last in results["ranges"])
    rows = results["rows"]
    return {
        "the loss behind the last trained range is 0.3 nats a byte below that of the first 8 bytes": all(
            row["loss"][trained - 1] < row["loss"][0] - 0.3 for row in rows.values()
        ),
        "RWKV's loss beyond the trained length is at most 10% above that of the last trained range": all(
            max(row["loss"][trained:]) < 1.1 * row["loss"][trained - 1]
            for name, row in rows.items()
            if name in common.GENERATIONS
        ),
    }


def draw(results: common.Results, path: Path) -> None:
    """Loss by bytes before."""
    figure, axes = common.new_figure(1, width=5.2)
    middles = [(max(first, 1) * last) ** 0.5 for first, last in results["ranges"]]
    for name, row in results["rows"].items():
        axes[0].errorbar(middles, row["loss"], row["error"], capsize=2, **common.style(name))
    axes[0].axvline(results["sizes"]["sequence_length"], color="#444444", lw=0.8, ls="--")
    axes[0].set(xscale="log", xlabel="bytes before (dashed: length of training)", ylabel="held-out loss, nats a byte")
    axes[0].legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
