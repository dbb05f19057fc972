"""What do 8 and 4 bits cost below an adapter, and does the adapter repair what rounding broke?

    python -m experiments.quantized_adapters.run

The base is that of `experiments.compressed`, which reads Python's sources and lines to copy. Its matrices are rounded
to each format, and LoRA is trained on top of each, for as many steps, on the sources of NumPy and on other such lines.
Beside the rounded base alone and the adapter trained over it (QLoRA) stand the float32 base's adapter moved onto it,
and the trained adapter merged and the matrices rounded again. In every row the same matrices are rounded: those of
layers, without low-rank maps, embedding and head.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from experiments import common
from experiments.compressed import run as compressed
from rwkv_jax import save_pretrained
from rwkv_jax.config import DataConfig, ModelConfig, TuningConfig
from rwkv_jax.config.tuning import TunedQuantization
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.models import abstract_model
from rwkv_jax.models.tuned import ADAPTER, at, grafted, merged_params, packed_matrices, replaced_at
from rwkv_jax.weights.quantized import pack, packed_matrix

FLOAT32 = "float32"
NUMPY = "numpy"
STAGES = {
    "base": "rounded, without an adapter",
    "tuned": "LoRA trained over it",
    "moved": "float32's LoRA over it",
    "again": "LoRA merged, rounded again",
}
BASE = dataclasses.replace(compressed.SMALL, num_rows=768, num_windows=96)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the base, its fine-tuning and the evaluation."""

    base: compressed.Sizes = BASE
    formats: tuple[TunedQuantization, ...] = ("int8", "int4")
    """Beside float32, with which they are compared."""
    text: str = NUMPY
    held_out: float = 0.02
    rank: int = 8
    num_steps: int = 120
    learning_rate: float = 4e-3


SMALL = Sizes()
SMALLEST = Sizes(compressed.SMALLEST, ("int4",), common.TINY, rank=2, num_steps=2)


def text_of(sizes: Sizes, folder: Path) -> DataConfig:
    """The text that is tuned on."""
    data = DataConfig(source=sizes.text, held_out=sizes.held_out, tokenizer="bytes")
    if sizes.text != NUMPY:
        return common.with_source(data, folder)
    package = importlib.util.find_spec("numpy")
    assert package is not None
    assert package.submodule_search_locations is not None
    source = package.submodule_search_locations[0]
    return common.with_source(dataclasses.replace(data, source=source, glob="**/*.py"), folder)


def tuned(sizes: Sizes, model: ModelConfig, tuning: TuningConfig, text: DataConfig, folder: Path) -> Any:
    """A run's parameters: base, rounded, and adapters."""
    base, lines = sizes.base, folder / "other_copies.txt"
    lines.write_text("".join(compressed.lines(base.count, base.num_lines // 4, seed=2)))
    config = common.train_config(
        model,
        num_steps=sizes.num_steps,
        batch_size=base.batch_size,
        sequence_length=4 * (base.count + 1),
        learning_rate=sizes.learning_rate,
        held_out=sizes.held_out,
    )
    data = dataclasses.replace(
        config.data, source=DataConfig.source, glob=text.glob, mixture=((text.source, 0.5), (str(lines), 0.5))
    )
    initial = str(folder / "base.safetensors")
    return common.train_run(dataclasses.replace(config, data=data, tuning=tuning, initial_weights=initial), folder)


def rounded_matrices(params: Any, tuning: TuningConfig, model: ModelConfig) -> Any:
    """Plain parameters with the matrices rounded that a base's are."""
    for path in packed_matrices(tuning, model):
        x = at(params, path)
        assert tuning.quantize is not None
        packed = packed_matrix(jax.tree.map(jnp.asarray, pack(np.asarray(x), tuning.quantize)), transposed=False)
        params = replaced_at(params, path, packed.dequantized().astype(x.dtype))
    return params


def unmerged_difference(params: Any, tuning: TuningConfig, model: ModelConfig, rows: NDArray) -> float:
    """The largest difference of logits with the adapter beside its matrices and merged into them, of the largest."""
    graphdef = abstract_model(dataclasses.replace(model, wkv_implementation="scan"))[0]
    tokens = jnp.asarray(rows)

    @jax.jit
    def logits(params: Any) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens).logits

    merged = logits(merged_params(params, tuning, model))
    apart = logits(grafted(params, tuning, model))
    return float(jnp.abs(apart - merged).max() / jnp.abs(merged).max())


def measure(sizes: Sizes) -> common.Results:
    """By format and stage: bits a byte of NumPy's sources and of lines, and the share of whole copies."""
    base = sizes.base
    model = ModelConfig(
        generation="7",
        vocab_size=common.NUM_BYTES,
        num_layers=base.num_layers,
        width=base.width,
        head_dim=base.head_dim,
    )
    names, found, differences = list[tuple[str, str]](), list[Any](), dict[str, float]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run, _ = compressed.trained(base, model, folder)
        common.progress(f"base: {run.losses[-1]:.4f} nats a byte")
        save_pretrained(common.model_of(model, run.params), folder / "base.safetensors")
        text = text_of(sizes, folder)
        held_out = prepare_corpus(text, model.vocab_size, lambda line: None).held_out
        assert held_out is not None
        first_adapter: Any = None
        for kind in (None, *sizes.formats):
            tuning = TuningConfig(adapter="lora", rank=sizes.rank, quantize=kind)
            run = tuned(sizes, model, tuning, text, folder)
            common.progress(f"{kind}: {run.losses[-1]:.4f} nats a byte")
            params = run.params
            nothing = jax.tree.map(jnp.zeros_like, params[ADAPTER])
            merged = merged_params(params, tuning, model)
            stages = {"base": merged_params(params | {ADAPTER: nothing}, tuning, model), "tuned": merged}
            if kind is None:
                first_adapter = params[ADAPTER]
            else:
                stages["moved"] = merged_params(params | {ADAPTER: first_adapter}, tuning, model)
                stages["again"] = rounded_matrices(merged, tuning, model)
                rows = np.asarray(held_out.tokens)[: base.window * 2].reshape(2, -1)
                differences[kind] = unmerged_difference(params, tuning, model, rows)
            names += [(kind or FLOAT32, stage) for stage in stages]
            found += list(stages.values())
    rows = scored(sizes, model, np.asarray(held_out.tokens), names, found)
    return {"parameters": model.num_parameters(), "rows": rows, "unmerged": differences}


def scored(
    sizes: Sizes, model: ModelConfig, held_out: NDArray, names: list[tuple[str, str]], all_params: list[Any]
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by format and stage; differences are from float32 on the same rows, alone or with its own adapter."""
    base = sizes.base
    num = min(base.num_windows, len(held_out) // (base.window + 1))
    windows = held_out[: num * (base.window + 1)].reshape(num, -1)
    encode = load_tokenizer("bytes", model.vocab_size).encode
    pairs = compressed.lines(base.count, 2 * base.num_rows, seed=1)  # a line before each that is scored
    asked = np.array([encode(one + two) for one, two in zip(pairs[::2], pairs[1::2], strict=True)])
    texts = compressed.score(model, all_params, windows, base.batch)
    length = 2 * (base.count + 1)
    own = [
        (losses[:, length - 1 :], right[:, length - 1 :])
        for losses, right in compressed.score(model, all_params, asked, base.batch)
    ]
    wrong = [1.0 - right[:, -base.count - 1 : -1].all(axis=1) for _, right in own]
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for at_row, (kind, stage) in enumerate(names):
        first = names.index((FLOAT32, "base" if stage == "base" else "tuned"))
        more = wrong[at_row] - wrong[first]
        rows.setdefault(kind, {})[stage] = {
            **compressed.compare("text", texts[first], texts[at_row]),
            **compressed.compare("lines", own[first], own[at_row]),
            "copies": float(1 - wrong[at_row].mean()),
            "copies_lost": float(more.mean()),
            "copies_lost_stderr": float(more.std() / base.num_rows**0.5),
        }
        common.progress(f"{kind}, {stage}: {common.rounded(rows[kind][stage])}")
    return rows


def claims(results: common.Results) -> common.Claims:
    """An adapter that was trained over 4 bits makes up for most of what they cost."""
    int4, int8 = results["rows"]["int4"], results["rows"]["int8"]
    alone, tuned, moved = int4["base"], int4["tuned"], int4["moved"]
    copies = results["rows"][FLOAT32]["base"]["copies"] > 0  # or there is nothing to lose
    return {
        "of the bits a byte that int4 costs alone, less than half is left below an adapter that was trained over it": (
            tuned["text_more"] < 0.5 * alone["text_more"]
        ),
        "of the copies that int4 loses alone, less than half is lost": (
            tuned["copies_lost"] < 0.5 * alone["copies_lost"] if copies else None
        ),
        "an adapter that was trained over int4 does better there than float32's": tuned["text_bits"]
        < moved["text_bits"],
        "int8 below an adapter costs less than 0.1% of the bits a byte": int8["tuned"]["text_more"] < 0.001,
        "merging changes no logit by more than 1e-5 of the largest": max(results["unmerged"].values()) < 1e-5,
    }


def draw(results: common.Results, path: Path) -> None:
    """What each format adds to the bits a byte, and what it loses of copies, stage by stage."""
    figure, axes = common.new_figure(2, width=4.6)
    kinds = [kind for kind in results["rows"] if kind != FLOAT32]
    colors = dict(zip(STAGES, ("#9a9a9a", "#1f6f5c", "#2878b5", "#b0453a"), strict=True))
    shown = (("text_more", "bits a byte of NumPy, more than float32, %"), ("copies_lost", "whole copies lost, %"))
    for each, (key, label) in zip(axes, shown, strict=True):
        for number, (stage, title) in enumerate(STAGES.items()):
            rows = [results["rows"][kind][stage] for kind in kinds]
            places = np.arange(len(kinds)) + 0.2 * (number - 1.5)
            errors = [196 * row[f"{key}_stderr"] for row in rows]
            values = [100 * row[key] for row in rows]
            each.bar(places, values, 0.2, yerr=errors, capsize=2, color=colors[stage], label=title)
        each.set_xticks(range(len(kinds)), kinds)
        each.axhline(0, color="#444444", lw=0.8)
        each.set_ylabel(label)
    axes[0].legend(fontsize=8, loc="upper left")
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
