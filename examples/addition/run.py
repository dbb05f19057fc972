"""Two-digit addition by rewards: a tiny model is shown sums in two formats, then rewarded for right ones in one format.

    python -m examples.addition.run                       # from the repository's folder

README.md says what it does and what was seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.addition.rewards import success
from rwkv_jax import Engine, SamplingParams, from_pretrained, load_tokenizer, train
from rwkv_jax.atomic import replace_file
from rwkv_jax.cli.program_cache import keep_programs
from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GRPOConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.run_folder import RUN_FILE

HERE = Path(__file__).parent
NUM_HELD_OUT = 800
"""Sums that no step of either run sees."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model, and of its two runs."""

    width: int = 128
    num_layers: int = 2
    shown_steps: int = 500
    """Steps on demonstrations, of 128 sums each."""
    rewarded_steps: int = 150
    """Steps on rewards, of 16 sums with 16 replies each."""


WHOLE = Sizes()
SMALLEST = Sizes(width=32, num_layers=2, shown_steps=2, rewarded_steps=2)


# Data.


def write_data(folder: Path) -> None:
    """Writes shown.jsonl, prompts.jsonl and held_out.jsonl: of all 8,100 sums, in an order of their own."""
    sums = list(itertools.product(range(10, 100), repeat=2))
    generator = random.Random(0)
    generator.shuffle(sums)
    records = [{"prompt": f"{a}+{b}=", "sum": a + b} for a, b in sums]
    # Who wrote the demonstrations did not agree on a format, so whoever imitates them succeeds in half of the cases.
    formats = [generator.choice(("{}", "[{}]")) for _ in records]
    shown = [
        {"prompt": each["prompt"], "completion": form.format(each["sum"])}
        for each, form in zip(records, formats, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "shown.jsonl", shown[NUM_HELD_OUT:])
    _write(folder / "prompts.jsonl", records[NUM_HELD_OUT:])
    _write(folder / "held_out.jsonl", records[:NUM_HELD_OUT])


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


# Runs.


def shown(folder: Path, sizes: Sizes) -> TrainConfig:
    """A model from its initial values learns what demonstrations reply."""
    return TrainConfig(
        run_dir=str(folder / "shown"),
        model=_model(sizes),
        data=DataConfig(
            source=str(folder / "shown.jsonl"),
            chat="completion",
            chat_format=str(HERE / "plain.jinja"),
            chat_rows="apart",
            tokenizer="bytes",
            held_out=0.02,
        ),
        # A schedule of twice the steps: the rate is still at its half when the run ends.
        optimizer=OptimizerConfig(
            learning_rate=4e-3,
            final_learning_rate=4e-4,
            schedule_steps=(2 * sizes.shown_steps,),
            warmup_steps=_warmup(sizes),
        ),
        training=StepConfig(num_steps=sizes.shown_steps, batch_size=128, sequence_length=12),
        evaluation=EvaluationConfig(every=250, sample_prompts=("34+57=",), sample_tokens=6),
        checkpoint=CheckpointConfig(every=500, keep=1),
        logging=LoggingConfig(every=50),
    )


def rewarded(folder: Path, sizes: Sizes) -> TrainConfig:
    """That model is rewarded for right sums in brackets."""
    return TrainConfig(
        run_dir=str(folder / "rewarded"),
        initial_weights=str(folder / "shown"),
        model=_model(sizes),
        data=DataConfig(source=str(folder / "prompts.jsonl"), tokenizer="bytes", held_out=0.02),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=_warmup(sizes), weight_decay=0.0
        ),
        # 7 tokens of a prompt with its end of text, and 6 of a reply with its own.
        training=StepConfig(objective="grpo", num_steps=sizes.rewarded_steps, batch_size=256, sequence_length=13),
        grpo=GRPOConfig(
            rewards=((f"{HERE / 'rewards.py'}:right", 1.0), (f"{HERE / 'rewards.py'}:formatted", 0.5)),
            num_generations=16,
            max_tokens=6,
        ),
        evaluation=EvaluationConfig(every=50, sample_prompts=("34+57=",), sample_tokens=6),
        checkpoint=CheckpointConfig(every=100, keep=1),
        logging=LoggingConfig(every=10),
    )


def _model(sizes: Sizes) -> ModelConfig:
    return ModelConfig(vocab_size=257, num_layers=sizes.num_layers, width=sizes.width, head_dim=32)


def _warmup(sizes: Sizes) -> int:
    return min(20, sizes.rewarded_steps - 1, sizes.shown_steps - 1)


# What a model replies to sums that it has not seen.


def shares_of_success(folder: Path, run_dir: Path) -> dict[str, float]:
    """Share of held-out sums whose reply is right and in brackets: the likeliest reply, and one drawn as it comes."""
    records = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    prompts: list[str] = [record["prompt"] for record in records]
    model = from_pretrained(str(run_dir))
    shares = {}
    with Engine(model, load_tokenizer("bytes", model.config.vocab_size)) as engine:
        for name, temperature in (("likeliest", 0.0), ("drawn", 1.0)):
            sampling = SamplingParams(temperature=temperature)
            replies = engine.generate(prompts, max_tokens=6, sampling=sampling)
            given = [success(record, reply.text) for record, reply in zip(records, replies, strict=True)]
            shares[name] = sum(given) / len(given)
    return shares


def run(folder: Path, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Both runs, each resumed if it has begun; shares of success after each, and minutes of those trained in one go."""
    write_data(folder)
    shares = {}
    for config in (shown(folder, sizes), rewarded(folder, sizes)):
        run_dir = Path(config.run_dir)
        is_new = not (run_dir / RUN_FILE).exists()
        began = time.perf_counter()
        ended = train(config)
        trained = time.perf_counter() - began
        if int(ended.state.step) < config.training.num_steps:
            sys.exit("stopped; the same command goes on")
        shares[run_dir.name] = shares_of_success(folder, run_dir) | ({"minutes": trained / 60} if is_new else {})
    return shares


def main() -> int:
    """The command: 0 if the claims hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/addition"))
    folder = parser.parse_args().folder
    keep_programs()
    shares = run(folder, WHOLE)
    print(json.dumps(shares, indent=2))
    claims = {
        "demonstrations leave success between 35% and 65%": 0.35 <= shares["shown"]["drawn"] <= 0.65,
        "rewards bring it to 95% and more, of likeliest replies and of drawn ones": min(
            shares["rewarded"]["likeliest"], shares["rewarded"]["drawn"]
        )
        >= 0.95,
    }
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO':<4} {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
