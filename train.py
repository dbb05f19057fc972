"""Trains a language model: build the data, build or restore the state, then step, evaluate, sample and save.

    python train.py configs/python_stdlib.py --training.num-steps 500
    python train.py --help

`train(config)` does the same from Python. The position in the data is the step, so a run that was stopped anywhere
goes on as if it had not been.
"""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from rwkv_jax.cli import parse_train_config
from rwkv_jax.config import ConfigError, TrainConfig, to_dict
from rwkv_jax.data.batches import batch_at, check_corpus_fits, evaluation_windows, indices_at
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.evaluation.held_out import HeldOut, compressed_bits_per_byte, evaluate
from rwkv_jax.inference.generate import Generator
from rwkv_jax.inference.sampling import Sampling
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.console import Console
from rwkv_jax.training.journal import Journal, NonFiniteError
from rwkv_jax.training.metrics import MetricsWriter, require_loggers
from rwkv_jax.training.optimizer import learning_rate_schedule
from rwkv_jax.training.plots import plot_losses
from rwkv_jax.training.profiling import StepProfiler
from rwkv_jax.training.step import TrainState, make_trainer
from rwkv_jax.training.stopping import StopRequest
from rwkv_jax.training.throughput import Throughput
from rwkv_jax.weights.pretrained import check_initial_weights, initial_params


class TrainResult(NamedTuple):
    """How a run ended."""

    state: TrainState
    held_out: HeldOut | None
    """The last evaluation, over all held-out text; None if the run was asked to stop before its end."""


def train(config: TrainConfig, *, command: str = "train(config)") -> TrainResult:
    """Trains, or resumes, the run in `config.run_dir`.

    Args:
      command: what resumes the run; shown when it is asked to stop.

    Raises:
      ConfigError: a setting that cannot work, before anything is computed or overwritten.
      NonFiniteError: `training.max_bad_steps` steps in a row were not finite; the last good state is saved.
    """
    training, evaluation, run_dir = config.training, config.evaluation, Path(config.run_dir)
    num_steps = training.num_steps
    require_loggers(config.logging)
    saved_run = ckpt.prepare_run_dir(run_dir)
    if saved_run is None and config.initial_weights is not None and config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.vocab_size)
        check_initial_weights(config.initial_weights, config.model, tokenizer)
    console = Console(num_steps, every=config.logging.every)

    # Data: every batch is a function of the step.
    shape = {"batch_size": training.batch_size, "sequence_length": training.sequence_length}
    corpus = prepare_corpus(config.data, config.model.vocab_size, console.print)
    check_corpus_fits(corpus.train.num_tokens, **shape)
    batch = functools.partial(batch_at, corpus.train.tokens, seed=config.seed, **shape)
    rows = functools.partial(indices_at, corpus.train.num_tokens, seed=config.seed, **shape)
    windows = functools.partial(evaluation_windows, corpus.held_out.tokens, **shape)
    identity = ckpt.identity(config, corpus.fingerprint, corpus.tokenizer.fingerprint)
    if saved_run is not None:
        ckpt.refuse_difference(saved_run["identity"], identity, str(run_dir))
    ckpt.write_run(run_dir, config, identity, corpus)

    with (
        console,
        StopRequest() as stop,
        ckpt.Checkpoints(run_dir, config.checkpoint.keep, console.print) as checkpoints,
        StepProfiler(config.profile, run_dir / "profile", console.print) as profiler,
    ):
        # Functions, each compiled once.
        trainer = make_trainer(config)
        train_step = jax.jit(trainer.train_step, donate_argnums=0)
        eval_step = jax.jit(trainer.eval_step)
        generate = Generator(trainer.graphdef, config.model, corpus.tokenizer).generate
        sampling = Sampling(evaluation.sample_temperature, evaluation.sample_top_p)

        # State: what an earlier run left, or new.
        like = ckpt.abstract_state(trainer, config.seed)
        state = checkpoints.restore(like)
        console.print(describe(config, corpus.train.num_tokens, None if state is None else int(state.step)))
        if state is None:
            state = jax.jit(trainer.init, out_shardings=ckpt.shardings(like))(jax.random.key(config.seed))
            if config.initial_weights is not None:
                state = state._replace(params=initial_params(config.initial_weights, config.model))
        first_step, best_loss = int(state.step), checkpoints.best_loss()
        if first_step > num_steps:
            raise ConfigError(f"training.num_steps = {num_steps}: the run has taken {first_step} steps; ask for more")

        with MetricsWriter(run_dir, config.logging, first_step, config=to_dict(config)) as writer:
            journal = Journal(
                num_steps=num_steps,
                every=config.logging.every,
                max_bad_steps=training.max_bad_steps,
                bytes_per_token=corpus.train.bytes_per_token,
                learning_rate=learning_rate_schedule(config.optimizer, num_steps),
                batch_starts=lambda step: rows(step=step).starts.tolist(),
                console=console,
                writer=writer,
                throughput=Throughput(training.batch_size * training.sequence_length),
            )
            for step in range(first_step, num_steps):
                # Step.
                tokens = batch(step=step)
                profiler.before(step)
                state, metrics = train_step(state, tokens)
                profiler.after(step, metrics)
                done, stopping = step + 1, stop.name
                evaluates = done % evaluation.every == 0 or done == num_steps
                saves = done % config.checkpoint.every == 0 or done == num_steps or stopping is not None
                try:
                    journal.step(step, metrics, wait=evaluates or saves)
                except NonFiniteError:
                    checkpoints.save(state, done)
                    raise

                # Evaluate and sample.
                if evaluates:
                    with journal.throughput.pause():
                        some = windows(num_batches=evaluation.batches)
                        held_out = evaluate(eval_step, state.params, some, corpus.held_out)
                        journal.held_out(done, held_out)
                        if held_out.loss < best_loss:
                            best_loss = held_out.loss
                            checkpoints.save_best(state, done, best_loss)
                        for seed, prompt in enumerate(prompts_after(done, config), start=done):
                            text = generate(state.params, prompt, evaluation.sample_tokens, sampling, seed)
                            journal.sample(done, prompt, text)

                # Save.
                if saves:
                    with journal.throughput.pause():
                        checkpoints.save(state, done)
                if stopping:
                    checkpoints.wait()
                    console.print(f"{stopping}: saved after step {done}; resume with:  {command}")
                    return TrainResult(state, None)

        # The last word: all held-out text, beside what compressors make of the same bytes.
        held_out = evaluate(eval_step, state.params, windows(), corpus.held_out)
        marks = {"this model": held_out.bits_per_byte} | compressed_bits_per_byte(corpus.held_out_bytes())
        listed = ", ".join(f"{name} {value:.3f}" for name, value in marks.items())
        console.print(f"all held-out text: loss {held_out.loss:.4f} nats; bits/byte: {listed}")
        console.print(
            f"losses: {plot_losses(run_dir)}; go on with --training.num-steps above {num_steps}, or sample with"
        )
        prompt = next(iter(evaluation.sample_prompts), "")
        console.print(f"  {shlex.join(['rwkv', 'generate', config.run_dir, '--prompt', prompt])}")
        return TrainResult(state, held_out)


def prompts_after(step: int, config: TrainConfig) -> tuple[str, ...]:
    """The prompts to sample after a step: in turn at each evaluation, all of them at the end."""
    prompts = config.evaluation.sample_prompts
    if step == config.training.num_steps:
        return prompts
    return prompts[step // config.evaluation.every % len(prompts) :][:1] if prompts else ()


def describe(config: TrainConfig, num_tokens: int, resumed_step: int | None) -> str:
    """What is about to run, in three lines."""
    model, training = config.model, config.training
    tokens_per_step = training.batch_size * training.sequence_length
    device = jax.devices()[0]
    begin = "starting" if resumed_step is None else f"resuming after step {resumed_step}"
    return (
        f"RWKV-{model.generation} {model.num_layers} x {model.width}, {model.num_parameters() / 1e6:.1f}M parameters, "
        f"{model.dtype}, on {device.device_kind} ({device.platform})\n"
        f"{begin}: {training.num_steps} steps of {training.batch_size} x {training.sequence_length} tokens, "
        f"{training.num_steps * tokens_per_step / num_tokens:.2f} epochs of {num_tokens:,} tokens\n"
        f"run folder: {config.run_dir}"
    )


def main() -> None:
    """The command line."""
    try:
        config = parse_train_config(sys.argv[1:])
        train(config, command=shlex.join(["python", *sys.argv]))
    except (ConfigError, NonFiniteError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
