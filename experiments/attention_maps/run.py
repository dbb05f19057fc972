"""Where does a trained copier read? The attention map that a recurrence amounts to, beside softmax attention's.

    python -m experiments.attention_maps.run

Models learn to copy random symbols behind a mark. Every operator's output is A v with some A[t, i], the effective
attention (`rwkv_jax.evaluation.inspect`). To write symbol j of the answer the model must read where symbol j stood: for
each layer and head, how often is |A[t, i]| largest there, among the symbols of the question? Beside it stands what a
map cannot miss: how often the model's symbol j changes when symbol i of the question is another one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from experiments import common
from rwkv_jax.config import ModelConfig
from rwkv_jax.evaluation.inspect import attention_map, record
from rwkv_jax.models import LanguageModel

FIRST_SYMBOL = 3
"""Ids 0, 1 and 2 are the end of a text, the blank and the mark."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of models and runs."""

    models: tuple[str, ...] = ("RWKV-6", "RWKV-7", "Transformer")
    num_layers: int = 2
    width: int = 64
    head_dim: int = 32
    num_symbols: int = 14
    count: int = 12
    """Symbols to copy."""
    num_steps: int = 800
    batch_size: int = 32
    learning_rate: float = 4e-3
    rates: tuple[tuple[str, float], ...] = (("Transformer", 2e-3),)
    num_texts: int = 32


SMALL = Sizes()
SMALLEST = Sizes(
    models=("RWKV-4",), width=8, head_dim=4, num_symbols=4, count=3, num_steps=2, batch_size=2, num_texts=1
)


def copies(sizes: Sizes) -> NDArray:
    """int32 [B, 2 n + 1]: end of text, n symbols, the mark, and all but the last of them again."""
    rng = np.random.default_rng(0)
    symbols = FIRST_SYMBOL + rng.integers(0, sizes.num_symbols, (sizes.num_texts, sizes.count))
    begin, mark = (np.full((sizes.num_texts, 1), sign) for sign in (0, 2))
    return np.concatenate([begin, symbols, mark, symbols[:, :-1]], axis=1).astype(np.int32)


def maps_of(model: LanguageModel, tokens: NDArray) -> list[NDArray]:
    """|A| [B, H, answers, symbols of the question] of each layer."""
    count = tokens.shape[1] // 2
    recordings = record(model, jnp.asarray(tokens))
    return [np.abs(attention_map(recording))[:, :, count + 1 :, 1 : count + 1] for recording in recordings]


def effects(model: LanguageModel, tokens: NDArray, num_symbols: int) -> NDArray:
    """[answers, symbols of the question]: share of texts whose answer changes when that symbol is another one."""
    graphdef, params = nnx.split(model, nnx.Param)
    count = tokens.shape[1] // 2

    @jax.jit
    def answers(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.argmax(nnx.merge(graphdef, params)(tokens).logits[:, count + 1 :], axis=-1)

    before, changes = np.asarray(answers(params, tokens)), []
    for place in range(1, count + 1):
        changed = tokens.copy()
        changed[:, place] = FIRST_SYMBOL + (changed[:, place] - FIRST_SYMBOL + 1) % num_symbols
        changes.append((np.asarray(answers(params, changed)) != before).mean(axis=0))
    return np.stack(changes, axis=-1)


def measure(sizes: Sizes) -> common.Results:
    """Of each copier: accuracy, how often each head looks at the copied symbol, the best one's map, and the effects."""
    rows: dict[str, Any] = {}
    length = 2 * sizes.count + 1
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes.models:
            shape: dict[str, Any] = {"num_layers": sizes.num_layers, "width": sizes.width, "head_dim": sizes.head_dim}
            model = ModelConfig(**common.ALL_MODELS[name], vocab_size=FIRST_SYMBOL + sizes.num_symbols, **shape)
            if model.sizes().context_length:
                model = dataclasses.replace(model, context_length=length)
            config = common.synthetic_config(
                model,
                f"synthetic:copying(num_symbols={sizes.num_symbols}, count={sizes.count})",
                num_steps=sizes.num_steps,
                batch_size=sizes.batch_size,
                sequence_length=length,
                learning_rate=dict(sizes.rates).get(name, sizes.learning_rate),
            )
            run = common.train_run(config, Path(folder))
            copier, tokens = common.model_of(model, run.params), copies(sizes)
            maps, changed = maps_of(copier, tokens), effects(copier, tokens, sizes.num_symbols)
            hits = [(found.argmax(-1) == np.arange(sizes.count)).mean(axis=(0, 2)) for found in maps]  # [H] by layer
            layer, head = max(
                ((layer, int(head)) for layer, row in enumerate(hits) for head in range(len(row))),
                key=lambda place: hits[place[0]][place[1]],
            )
            shown = maps[layer][0, head]
            rows[name] = {
                "accuracy": run.answers["accuracy"],
                "hits": hits,
                "best": {"layer": layer, "head": head, "hits": hits[layer][head]},
                "effects": changed,
                "map": shown / np.maximum(shown.sum(axis=-1, keepdims=True), 1e-30),
            }
            common.progress(f"{name}: right {run.answers['accuracy']:.3f}, looks there {hits[layer][head]:.3f}")
    return {"rows": rows, "chance": 1 / sizes.count}


def claims(results: common.Results) -> common.Claims:
    """Every copier reads the symbol that it copies, and none behind it; a head shows it.

    (Later answers may change, too: the text that the model has written until then says the old symbol, so a copier that
    finds its place by what is written finds it no more.)
    """
    found: common.Claims = {}
    for name, row in results["rows"].items():
        changed = np.array(row["effects"])
        before = np.triu(np.ones(changed.shape, bool), 1)
        found[f"{name}: another symbol i changes answer i in 90% of the texts, and those before it in at most 5%"] = (
            bool(np.diag(changed).mean() >= 0.9 and changed[before].mean() <= 0.05)
        )
        found[f"{name}: some head's largest weight is at the copied symbol in 90% of the answers"] = (
            row["best"]["hits"] >= 0.9
        )
    return found


def draw(results: common.Results, path: Path) -> None:
    """By model: the effects, and below the best head's map of one text."""
    rows = results["rows"]
    figure, axes = common.new_figure(2 * len(rows), width=2.6, height=3.0)
    for index, (name, row) in enumerate(rows.items()):
        best = row["best"]
        shown = {
            f"{name}: what changes it": row["effects"],
            f"layer {best['layer']}: {100 * best['hits']:.0f}% there": row["map"],
        }
        for panel, (title, values) in zip(axes[2 * index :], shown.items(), strict=False):
            panel.grid(visible=False)
            panel.imshow(values, cmap="viridis", vmin=0, aspect="equal")
            panel.set_title(title, fontsize=9)
            panel.set(xlabel="symbol of the question")
    axes[0].set(ylabel="symbol of the answer")
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
