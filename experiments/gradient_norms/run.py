"""Do gradients vanish or explode, by depth, by length, by generation, and without the layer norms?

python -m experiments.gradient_norms.run

Models at their initial values, with random matrices in place of those that begin as zeros: otherwise every block is the
identity, and depth means nothing. By depth: the norm of each block's gradient of the mean loss on random tokens. By
distance: the norm of the last token's loss differentiated by the vector of the token so far before it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import common
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel

NORMS = ("ln0", "ln1", "ln2")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and texts."""

    models: tuple[str, ...] = (*common.MODELS, "LSTM", "tanh RNN")
    depths: tuple[int, ...] = (2, 8, 24)
    width: int = 32
    head_dim: int = 16
    vocab_size: int = 64
    num_rows: int = 4
    length: int = 64
    """Tokens of the texts by which depths are compared."""
    distance: int = 1024
    """Longest distance to which the gradient is followed, in models of the least depth."""
    seeds: tuple[int, ...] = (0, 1, 2)


SMALL = Sizes()
SMALLEST = Sizes(models=("RWKV-4",), depths=(2,), width=8, head_dim=4, vocab_size=7, length=4, distance=4, seeds=(0,))


class Identity(nnx.Module):
    """In place of a norm."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x."""
        return x


def without_norms(model: LanguageModel) -> LanguageModel:
    """The same model without the layer norms before its branches, and without ln0 if it has one."""
    for block in (model.first_block, model.blocks):
        for name in NORMS:
            if hasattr(block, name):
                setattr(block, name, Identity())
    return model


def block_norms(model: LanguageModel) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, tokens [B, T + 1]) -> [L], the norm of each block's gradient."""
    graphdef, _ = nnx.split(model, nnx.Param)

    @jax.jit
    def norms(params: Any, tokens: jax.Array) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            log_probs = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[:, :-1]).logits)
            return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

        gradients = nnx.to_pure_dict(jax.grad(loss)(params))
        first = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients["first_block"]))
        others = sum(
            jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gradients["blocks"])
        )
        return jnp.sqrt(jnp.concatenate([jnp.reshape(first, 1), jnp.atleast_1d(others)]))

    return norms


def distance_norms(model: LanguageModel) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, tokens [1, T + 1]) -> [T]: the norm of d(loss of the last token) / d(the vector d tokens before)."""
    graphdef, _ = nnx.split(model, nnx.Param)

    @jax.jit
    def norms(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)

        def loss(vectors: jax.Array) -> jax.Array:
            logits = model(None, inputs_embeds=vectors).logits[0, -1]
            return -jax.nn.log_softmax(logits)[tokens[0, -1]]

        return jnp.linalg.norm(jax.grad(loss)(unit_vectors(model.emb(tokens[:, :-1])))[0], axis=-1)[::-1]

    return norms


def unit_vectors(x: jax.Array) -> jax.Array:
    """Vectors of the same direction with numbers of about 1: else ln0 would scale gradients by tiny embeddings."""
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))


def measure(sizes: Sizes) -> common.Results:
    """Norms by block and by distance; medians over seeds."""
    depth: dict[str, dict[str, Any]] = {}
    distance: dict[str, dict[str, list[float]]] = {}
    fields: dict[str, Any] = {"vocab_size": sizes.vocab_size, "width": sizes.width, "head_dim": sizes.head_dim}
    for name in sizes.models:
        config = ModelConfig(**common.ALL_MODELS[name], num_layers=sizes.depths[0], **fields)
        if config.spec.operator is not None:
            config = dataclasses.replace(config, wkv_implementation="scan")  # compiles fastest
        if config.sizes().context_length:
            config = dataclasses.replace(config, context_length=max(sizes.distance, sizes.length) + 1)
        rows = texts(sizes)
        for layers, title in itertools.product(sizes.depths, ("", ", no norms")):
            common.progress(f"{name}{title}, {layers} blocks")
            models = [common.randomized(dataclasses.replace(config, num_layers=layers), seed) for seed in sizes.seeds]
            models = [without_norms(model) for model in models] if title else models
            norms = block_norms(models[0])
            found = [norms(nnx.state(model, nnx.Param), row) for model, (row, _) in zip(models, rows, strict=True)]
            depth.setdefault(name + title, {})[str(layers)] = summary(np.asarray(found))
        models = [common.randomized(config, seed) for seed in sizes.seeds]
        norms = distance_norms(models[0])
        found = [norms(nnx.state(model, nnx.Param), far) for model, (_, far) in zip(models, rows, strict=True)]
        distance[name] = thinned(np.median(np.asarray(found), axis=0).tolist())
    return {"by_block": depth, "by_distance": distance}


def texts(sizes: Sizes) -> list[tuple[jax.Array, jax.Array]]:
    """Random tokens by seed: for depths [B, T + 1], and for distances [1, T + 1]."""
    rows = []
    for seed in sizes.seeds:
        rng = np.random.default_rng(seed)
        shapes = (sizes.num_rows, sizes.length + 1), (1, sizes.distance + 1)
        rows.append(tuple(jnp.asarray(rng.integers(0, sizes.vocab_size, shape, np.int32)) for shape in shapes))
    return rows


def summary(rows: np.ndarray) -> dict[str, Any]:
    """Of norms [seeds, L]: each block's median, and the largest ratio of two blocks' with one seed."""
    finite = bool(np.isfinite(rows).all())
    middle = np.median(rows, axis=0)
    return {
        "norms": middle,
        "finite": finite,
        "first_over_last": middle[0] / middle[-1],
        "middle_over_last": middle[len(middle) // 2] / middle[-1],
        "spread": float((rows.max(axis=1) / rows.min(axis=1)).max()) if finite else None,
    }


def thinned(norms: list[float]) -> dict[str, list[float]]:
    """At distances that double, the median over a few around each: single tokens differ."""
    distances = [0, *(2**power for power in range(len(norms).bit_length()) if 2**power < len(norms)), len(norms) - 1]
    distances = sorted(set(distances))
    windows = [norms[max(0, d - d // 8) : d + d // 8 + 1] for d in distances]
    return {"distance": distances, "norm": [float(np.median(window)) for window in windows]}


def claims(results: common.Results) -> common.Claims:
    """What features of depth must hold."""
    deepest = str(max(results["sizes"]["depths"]))
    by_block, by_distance = results["by_block"], results["by_distance"]
    rwkv = [by_block[name][deepest] for name in common.GENERATIONS if name in by_block]
    found: common.Claims = {
        f"RWKV, {deepest} blocks: gradients are finite": all(row["finite"] for row in rwkv),
        f"RWKV, {deepest} blocks: the middle block's gradient is 0.3 to 5 times the last one's": all(
            0.3 <= row["middle_over_last"] <= 5 for row in rwkv
        ),
        f"RWKV, {deepest} blocks: the first block's gradient is below 50 times the last one's": all(
            row["first_over_last"] < 50 for row in rwkv
        ),
    }
    if (tanh := by_distance.get("tanh RNN")) is not None:
        reached = {d: n for d, n in zip(tanh["distance"], tanh["norm"], strict=True) if d >= 256}
        found["tanh RNN: the gradient 256 tokens back is below 1e-6"] = reached[min(reached)] < 1e-6
    return found


def draw(results: common.Results, path: Path) -> None:
    """Norms by block, with and without norms, and by distance."""
    figure, axes = common.new_figure(3, width=4.0)
    deepest = str(max(results["sizes"]["depths"]))
    for name, rows in results["by_block"].items():
        base, _, removed = name.partition(", ")
        norms = np.asarray(rows[deepest]["norms"], float)
        axes[1 if removed else 0].plot(range(len(norms)), norms / norms[-1], **common.style(base))
    for panel, title in zip(axes, ("as initialized", "without ln0, ln1, ln2"), strict=False):
        panel.set(yscale="log", xlabel="block", ylabel="gradient norm / last block's", title=title)
    axes[0].legend(fontsize=7)
    for name, row in results["by_distance"].items():
        distance = np.asarray(row["distance"])
        axes[2].plot(np.maximum(distance, 0.5), np.asarray(row["norm"], float) + 1e-30, **common.style(name))
    axes[2].set(xscale="log", yscale="log", xlabel="tokens back", ylabel="|d last loss / d input|", ylim=(1e-12, None))
    axes[2].set(title=f"{results['sizes']['depths'][0]} blocks")
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
