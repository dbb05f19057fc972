"""Every way to tune the same model on the same text: what it learns, what it forgets, what it takes.

    make train
    PYTHONPATH=. python benchmarks/tuning_kinds.py        # or --kinds lora dora --num-steps 150

Each is `configs/tune_lora.py` with another adapter, with a base in 8 or 4 bits, or with all weights and no adapter, for
fewer steps. Learned is the held-out loss of that run, of this project's documents; forgotten is what the same weights
then need for held-out files of the base's own corpus. Rates are the first that were tried, but for those of the kinds
that begin with large numbers (rslora's factor, all weights, PiSSA and Bat), which take a quarter of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from rwkv_jax import from_pretrained, train
from rwkv_jax.cli import load_config
from rwkv_jax.cli.program_cache import keep_programs
from rwkv_jax.config import DataConfig, EvaluationConfig, TrainConfig, TuningConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokens.batches import evaluation_windows
from rwkv_jax.held_out import bits_per_byte
from rwkv_jax.host import available_cores, processor
from rwkv_jax.models import LanguageModel
from rwkv_jax.tables import format_table

BASE = "runs/python_stdlib"

KINDS: dict[str, tuple[TuningConfig, float]] = {
    "all weights": (TuningConfig(), 1e-3),
    "lora": (TuningConfig(adapter="lora", rank=16), 4e-3),
    "lora, base int8": (TuningConfig(adapter="lora", rank=16, quantize="int8"), 4e-3),
    "lora, base int4": (TuningConfig(adapter="lora", rank=16, quantize="int4"), 4e-3),
    "rslora": (TuningConfig(adapter="rslora", rank=16), 1e-3),
    "dora": (TuningConfig(adapter="dora", rank=16), 4e-3),
    "pissa": (TuningConfig(adapter="pissa", rank=16), 1e-3),
    "miss": (TuningConfig(adapter="miss", rank=32), 4e-3),
    "bat": (TuningConfig(adapter="bat", rank=32), 1e-3),
}
"""Settings and highest learning rate; miss and bat with twice LoRA's rank have as many numbers."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tried."""

    kinds: tuple[str, ...] = tuple(KINDS)
    num_steps: int = 50
    sequence_length: int = 256
    folder: Path = Path("runs/tuning_kinds")
    """Of the runs, one a kind; one that is there is gone on with."""


def config_of(kind: str, options: Options) -> TrainConfig:
    """The run of a kind."""
    config = load_config(Path(__file__).parents[1] / "configs" / "tune_lora.py")
    tuning, rate = KINDS[kind]
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate, final_learning_rate=rate / 10)
    steps = {"num_steps": options.num_steps, "sequence_length": options.sequence_length}
    return dataclasses.replace(
        config,
        run_dir=str(options.folder / kind.replace(", ", "_").replace(" ", "_")),
        tuning=tuning,
        optimizer=dataclasses.replace(optimizer, weight_decay=0.0),
        training=dataclasses.replace(config.training, **steps),
        evaluation=EvaluationConfig(every=options.num_steps, sample_prompts=()),
        checkpoint=dataclasses.replace(config.checkpoint, every=options.num_steps, keep=1),
    )


@nnx.jit
def loss_sum(model: LanguageModel, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Nats of the tokens after the first of each row."""
    logits, _ = model(tokens[:, :-1])
    return jnp.sum(mask * optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def bits_of(model: LanguageModel, data: DataConfig, num_batches: int | None) -> float:
    """Bits a byte of held-out text of some data; None reads all of it."""
    corpus = prepare_corpus(data, model.config.vocab_size, lambda line: None)
    held_out = corpus.held_out
    assert held_out is not None
    total = count = 0.0
    for rows in evaluation_windows(held_out.tokens, batch_size=4, sequence_length=512, num_batches=num_batches):
        assert rows.mask is not None
        total += float(loss_sum(model, jnp.asarray(rows.tokens), jnp.asarray(rows.mask)))
        count += float(rows.mask.sum())
    return bits_per_byte(total / count, held_out.bytes_per_token)


def row_of(kind: str, options: Options) -> tuple[str, ...]:
    """A row of the table: trains, and measures what was loaded from the run."""
    config = config_of(kind, options)
    began, worked = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        state = train(config).state
    minutes, processor_minutes = (time.perf_counter() - began) / 60, (time.process_time() - worked) / 60
    trained = jax.tree.leaves(state.opt_state)
    moments = sum(leaf.size for leaf in trained if leaf.ndim)
    return (
        kind,
        f"{moments / 2e6:.2f} M",
        *measured(from_pretrained(config.run_dir), config.data),
        f"{minutes:.1f}",
        f"{processor_minutes:.1f}",
    )


def measured(model: LanguageModel, data: DataConfig) -> tuple[str, str]:
    """What a model has learned, and what it has not forgotten."""
    return f"{bits_of(model, data, None):.3f}", f"{bits_of(model, DataConfig(tokenizer=BASE), 16):.3f}"


def main() -> None:
    """The command."""
    options = tyro.cli(Options, description=__doc__)
    keep_programs()
    data = config_of(next(iter(KINDS)), options).data
    rows: list[tuple[str, ...]] = [("", "trained", "documents", "standard library", "minutes", "of a processor")]
    rows.append(("base", "", *measured(from_pretrained(BASE), data), "", ""))
    for kind in options.kinds:
        rows.append(row_of(kind, options))
        print(rows[-1], flush=True)
    print(f"{processor()}, {available_cores()} cores; bits a byte of held-out text")
    print(format_table(rows, "<>>>>>"))


if __name__ == "__main__":
    main()
