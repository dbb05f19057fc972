"""Does RWKV-7 hear words as well as an LSTM and a Transformer of equal size, and what does listening cost?

    python -m experiments.listening.run          # needs espeak-ng

Utterances of one to four digits, spoken by voices of espeak-ng that were not trained on, in noise of several strengths.
All models read frames of 20 ms, none sees a later one, and all train with the same recipe, seed and data. Then each
listens to a frame at a time, after short and long sounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import common
from rwkv_jax.applications.audio.config import Audio, AudioConfig
from rwkv_jax.applications.audio.data import draw_examples, num_features
from rwkv_jax.applications.audio.model import AudioApplication
from rwkv_jax.cli.program_cache import programs_kept_in
from rwkv_jax.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
)

MODELS: dict[str, dict[str, Any]] = {
    "RWKV-7": {},
    "LSTM": {"architecture": "lstm"},
    "Transformer": {"architecture": "transformer"},
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run."""

    words: str = "digits"
    models: tuple[str, ...] = ("RWKV-7", "LSTM", "Transformer")
    num_layers: int = 3
    width: int = 96
    head_dim: int = 32
    num_examples: int = 8000
    num_held_out: int = 256
    num_frames: int = 160
    num_steps: int = 600
    learning_rate: float = 4e-3
    transformer_rate: float = 1.5e-3
    snr: tuple[float, ...] = (0.0, 5.0, 10.0, 20.0)
    heard: tuple[int, ...] = (50, 500, 5000)
    """Frames heard before the ones that are timed."""
    timed: int = 50


SMALL = Sizes()
SMALLEST = Sizes("tones", ("RWKV-7",), 2, 16, 8, 8, 8, 120, 2, snr=(10.0,), heard=(5, 10), timed=2)


def config_of(name: str, sizes: Sizes) -> AudioConfig:
    """A model's run; all have as many parameters as RWKV-7."""
    model = ModelConfig(vocab_size=16, num_layers=sizes.num_layers, width=sizes.width, head_dim=sizes.head_dim)
    own = MODELS[name]
    if own:
        room = {"context_length": max(sizes.heard) + sizes.timed} if name == "Transformer" else {}
        model = model.of_equal_size(own["architecture"], **room)
    rate = sizes.transformer_rate if name == "Transformer" else sizes.learning_rate
    return AudioConfig(
        model=model,
        audio=Audio(
            words=sizes.words,  # pyright: ignore[reportArgumentType]
            num_examples=sizes.num_examples,
            num_held_out=sizes.num_held_out,
        ),
        optimizer=OptimizerConfig(
            learning_rate=rate, final_learning_rate=rate / 40, warmup_steps=min(30, sizes.num_steps // 2)
        ),
        training=StepConfig(batch_size=16, sequence_length=sizes.num_frames, num_steps=sizes.num_steps),
        evaluation=EvaluationConfig(every=sizes.num_steps, batches=1, sample_prompts=()),
        checkpoint=CheckpointConfig(every=sizes.num_steps, keep=1),
        logging=LoggingConfig(every=min(20, sizes.num_steps)),
    )


def accuracies(config: AudioConfig, params: Any, sizes: Sizes) -> dict[str, float]:
    """Share of right words by signal-to-noise ratio."""
    application, found = AudioApplication(config), {}
    for snr in sizes.snr:
        audio = dataclasses.replace(config.audio, held_out_snr=snr)
        examples = draw_examples(audio, sizes.num_frames, held_out=True)
        found[f"{snr:g}"] = application.measure(params, examples, None)["word_accuracy"]
    return found


def listening_times(config: AudioConfig, params: Any, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of a frame, by frames heard before."""
    application = AudioApplication(config)
    graphdef, own = nnx.split(application.model(params))
    run = jax.jit(lambda own, frames, state: nnx.merge(graphdef, own)(frames, state))
    frames = np.random.default_rng(0).normal(size=(1, 1, num_features(config.audio.frontend))).astype(np.float32)
    found = {}
    for heard in sizes.heard:
        state = application.model(params).layers.initial_state(1)
        for _ in range(heard):
            _, state = run(own, frames, state)

        def listen(state: Any = state) -> None:
            for _ in range(sizes.timed):
                logits, state = run(own, frames, state)
            jax.block_until_ready(logits)

        listen()
        seconds = common.median([common.seconds_of(listen) for _ in range(3)])
        found[str(heard)] = 1e3 * seconds / sizes.timed
    return found


def measure(sizes: Sizes) -> common.Results:
    """Of each model its parameters, accuracies and times."""
    from rwkv_jax.training.loop import train

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, programs_kept_in(Path(folder) / "programs", min_seconds=0.2):
        for name in sizes.models:
            config = dataclasses.replace(config_of(name, sizes), run_dir=f"{folder}/{name}")
            with contextlib.redirect_stdout(io.StringIO()):
                params = train(config).state.params
            found[name] = {
                "parameters": sum(int(x.size) for x in jax.tree.leaves(params)),
                "word_accuracy": accuracies(config, params, sizes),
                "milliseconds": listening_times(config, params, sizes),
            }
            common.progress(f"{name}: {found[name]}")
    return {"models": found}


def claims(results: common.Results) -> common.Claims:
    """What was to be shown."""
    rows = results["models"]
    ours = rows["RWKV-7"]
    others = [row["word_accuracy"]["10"] for name, row in rows.items() if name != "RWKV-7"]
    times = list(ours["milliseconds"].values())
    return {
        "RWKV-7 hears 95% of the digits right at 10 dB": ours["word_accuracy"]["10"] >= 0.95,
        "no model of equal size hears more than 1% more of them": max(others) <= ours["word_accuracy"]["10"] + 0.01,
        "a frame after 5000 takes RWKV-7 no more than 1.5 times as long as one after 50": times[-1] <= 1.5 * times[0],
    }


def draw(results: common.Results, path: Path) -> None:
    """Accuracy by noise, time by frames heard."""
    figure, (heard, times) = common.new_figure(2, width=4.2)
    for name, row in results["models"].items():
        by_snr, by_heard = row["word_accuracy"], row["milliseconds"]
        heard.plot([float(snr) for snr in by_snr], [100 * x for x in by_snr.values()], **common.style(name))
        times.plot([int(frames) for frames in by_heard], list(by_heard.values()), **common.style(name))
    heard.set(xlabel="signal to noise, dB", ylabel="words right, %", title="Digits of unheard voices")
    times.set(xscale="log", xlabel="frames heard before", ylabel="ms a frame", title="Listening", ylim=(0, None))
    heard.legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
