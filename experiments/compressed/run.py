"""What do 8 and 4 bits cost that bits a byte hide?

    python -m experiments.compressed.run

A model of bytes learns Python's sources and, from lines such as `kcabdlen|kcabdlen`, to copy random letters. Then its
matrices are rounded to bfloat16, int8 and int4, as `from_pretrained(quantize=...)` holds them. Bits a byte are a mean
over a text, most of which any model predicts or none does. A copy is right if all of its letters are: errors add up.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from experiments import common
from rwkv_jax.config import DataConfig, ModelConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.models import abstract_model
from rwkv_jax.models.packed import PackedMatrix
from rwkv_jax.training.loss import token_losses
from rwkv_jax.weights.official import official_tensors
from rwkv_jax.weights.quantized import Quantization, packed_bytes, place_quantized_params

FORMATS: tuple[Quantization | None, ...] = (None, "bfloat16", "int8", "int4")
"""None is float32, with which the others are compared."""
LETTERS = "abcdefghijklmn"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of model, run and evaluation."""

    num_layers: int = 2
    width: int = 64
    head_dim: int = 32
    text: str = "python-stdlib"
    share: float = 0.75
    """Of training rows that are lines to copy."""
    count: int = 16
    """Letters of a copy."""
    num_lines: int = 40_000
    """To train on."""
    num_steps: int = 800
    batch_size: int = 24
    learning_rate: float = 4e-3
    held_out: float = 0.02
    num_rows: int = 2048
    """Copies in evaluation."""
    num_windows: int = 256
    window: int = 256
    """Bytes of a window of the text in evaluation."""
    batch: int = 256
    """Rows evaluated at a time."""


SMALL = Sizes()
SMALLEST = Sizes(
    2,
    32,
    16,
    common.TINY,
    count=2,
    num_lines=200,
    num_steps=2,
    batch_size=2,
    num_rows=4,
    num_windows=2,
    window=9,
    batch=2,
)


def lines(count: int, num: int, seed: int) -> list[str]:
    """Lines of random letters, a bar, and the same letters."""
    drawn = np.random.default_rng(seed).integers(0, len(LETTERS), (num, count))
    words = ["".join(LETTERS[letter] for letter in row) for row in drawn]
    return [f"{word}|{word}\n" for word in words]


def in_format(config: ModelConfig, params: Any, quantization: Quantization | None) -> Any:
    """Parameters with matrices rounded to what a format holds, in float32, in which all formats compute."""
    if quantization is None:
        return params

    def plain(x: Any) -> jax.Array:
        return x.dequantized() if isinstance(x, PackedMatrix) else x.astype(jnp.float32)

    held = place_quantized_params(official_tensors(config, params), config, quantization)
    return jax.tree.map(plain, held, is_leaf=lambda x: isinstance(x, PackedMatrix))


def trained(sizes: Sizes, config: ModelConfig, folder: Path) -> tuple[common.Run, NDArray]:
    """The run, and bytes of its text that it was not trained on, [n] tokens."""
    copies = folder / "copies.txt"
    copies.write_text("".join(lines(sizes.count, sizes.num_lines, seed=0)))
    text = common.with_source(DataConfig(source=sizes.text, held_out=sizes.held_out, tokenizer="bytes"), folder)
    run_config = common.train_config(
        config,
        num_steps=sizes.num_steps,
        batch_size=sizes.batch_size,
        sequence_length=4 * (sizes.count + 1),
        learning_rate=sizes.learning_rate,
        held_out=sizes.held_out,
    )
    mixture = ((text.source, 1 - sizes.share), (str(copies), sizes.share))
    data = dataclasses.replace(run_config.data, source=DataConfig.source, mixture=mixture)
    run = common.train_run(dataclasses.replace(run_config, data=data), folder)
    held_out = prepare_corpus(text, config.vocab_size, lambda line: None).held_out
    assert held_out is not None
    return run, np.asarray(held_out.tokens)


def score(config: ModelConfig, all_params: list[Any], rows: NDArray, batch: int) -> list[tuple[NDArray, NDArray]]:
    """Of each format: nats [n, T - 1] of tokens [n, T] behind those before, and whether each is the likeliest one."""
    config = dataclasses.replace(config, wkv_implementation="scan")  # compiles in less time than it would save
    graphdef = abstract_model(config)[0]

    @jax.jit
    def losses_and_right(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(tokens[:, :-1]).logits
        targets = tokens[:, 1:]
        losses, _ = token_losses(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        return losses.reshape(targets.shape), logits.argmax(axis=-1) == targets

    found = []
    for params in all_params:
        parts = [losses_and_right(params, jnp.asarray(rows[at : at + batch])) for at in range(0, len(rows), batch)]
        losses, right = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2))
        found.append((losses.astype(float), right))
    return found


def compare(name: str, before: tuple[NDArray, NDArray], after: tuple[NDArray, NDArray]) -> dict[str, float]:
    """Mean bits and their growth, with the standard error of differences between paired rows."""
    bits, first = (each[0].mean(axis=1) / math.log(2) for each in (after, before))
    error = float((bits - first).std() / math.sqrt(len(bits)))
    return {
        f"{name}_bits": float(bits.mean()),
        f"{name}_more": float(bits.mean() / first.mean() - 1),
        f"{name}_more_stderr": error / float(first.mean()),
    }


def measure(sizes: Sizes) -> common.Results:
    """By format: bytes of weights, bits a byte of text and of lines, and shares of letters and whole copies."""
    config = ModelConfig(
        generation="7",
        vocab_size=common.NUM_BYTES,
        num_layers=sizes.num_layers,
        width=sizes.width,
        head_dim=sizes.head_dim,
    )
    with tempfile.TemporaryDirectory() as folder:
        run, held_out = trained(sizes, config, Path(folder))
    common.progress(f"trained: {run.losses[-1]:.4f} nats a byte, {run.last_held_out} of what was held out")
    all_params = [in_format(config, run.params, name) for name in FORMATS]

    num = min(sizes.num_windows, len(held_out) // (sizes.window + 1))
    windows = held_out[: num * (sizes.window + 1)].reshape(num, -1)
    encode = load_tokenizer("bytes", config.vocab_size).encode
    pairs = lines(sizes.count, 2 * sizes.num_rows, seed=1)  # a line before each that is scored
    asked = np.array([encode(one + two) for one, two in zip(pairs[::2], pairs[1::2], strict=True)])
    texts = score(config, all_params, windows, sizes.batch)
    whole = score(config, all_params, asked, sizes.batch)
    length = 2 * (sizes.count + 1)
    own = [(losses[:, length - 1 :], right[:, length - 1 :]) for losses, right in whole]
    copied = [right[:, -sizes.count - 1 : -1] for _, right in own]  # the letters behind the bar

    rows = {}
    for at, name in enumerate(FORMATS):
        before, after = (copied[i].all(axis=1).astype(float) for i in (0, at))
        rows[name or "float32"] = {
            "bytes": 4 * config.num_parameters() if name is None else packed_bytes(config, name),
            **compare("text", texts[0], texts[at]),
            **compare("lines", own[0], own[at]),
            "letters": float(copied[at].mean()),
            "copies": float(after.mean()),
            "copies_lost": float((before - after).mean()),
            "copies_lost_stderr": float((before - after).std() / math.sqrt(len(before))),
        }
        common.progress(f"{name}: {rows[name or 'float32']}")
    return {"parameters": config.num_parameters(), "rows": rows}


def claims(results: common.Results) -> common.Claims:
    """Bits a byte hide what int4 costs; int8 costs nothing that shows."""
    first, int8, int4 = (results["rows"][name] for name in ("float32", "int8", "int4"))
    return {
        "int4 adds less than 2% to the bits a byte of text, and to those of the lines": max(
            int4["text_more"], int4["lines_more"]
        )
        < 0.02,
        "int4 loses 3 of 100 copies and more, by more than three standard errors": int4["copies_lost"]
        >= max(0.03, 3 * int4["copies_lost_stderr"]),
        "int4 makes at least a fifth more copies wrong": 1 - int4["copies"] >= 1.2 * (1 - first["copies"]),
        "int8 loses less than 1 of 100 copies": int8["copies_lost"] < 0.01,
    }


def draw(results: common.Results, path: Path) -> None:
    """What each format adds to the bits, and what it loses of copies, in percent on one scale."""
    figure, (axes,) = common.new_figure(1, width=6)
    names = list(results["rows"])[1:]
    shown = (
        ("text_more", "bits a byte of Python, more", "#8ecae6"),
        ("lines_more", "bits a byte of the lines, more", "#2878b5"),
        ("copies_lost", "whole copies lost", "#b0453a"),
    )
    for at, (key, label, color) in enumerate(shown):
        rows = [results["rows"][name] for name in names]
        places = np.arange(len(names)) + 0.27 * (at - 1)
        errors = [196 * row[f"{key}_stderr"] for row in rows]
        axes.bar(places, [100 * row[key] for row in rows], 0.27, yerr=errors, capsize=2, color=color, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.axhline(0, color="#444444", lw=0.8)
    axes.set_ylabel("against float32, %")
    axes.legend(fontsize=8, loc="upper left")
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
