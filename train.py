"""Trains a language model: build the data, build or restore the state, then step, evaluate, sample and save.

    python train.py configs/python_stdlib.py --training.num-steps 500
    python train.py --help

`train(config)` does the same from Python. The position in the data is the step, so a run that was stopped anywhere
goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rwkv_jax.cli import parse_train_config
from rwkv_jax.config import ConfigError, TrainConfig, to_dict
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.data.tokens.batches import evaluation_windows
from rwkv_jax.data.tokens.rows import training_rows
from rwkv_jax.evaluation.held_out import HeldOut, compressed_bits_per_byte, evaluate
from rwkv_jax.inference.sampling import SamplingParams
from rwkv_jax.parallel.coordination import SyncedStop, allgather_text, assert_same, run_on_first_process
from rwkv_jax.parallel.mesh import device_memory, make_mesh, mesh_shape
from rwkv_jax.parallel.placement import memory_table
from rwkv_jax.parallel.processes import LostProcessError, Processes, join
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.batch import batch_loader
from rwkv_jax.training.optimizer import learning_rate_schedule
from rwkv_jax.training.reporting.console import Console
from rwkv_jax.training.reporting.metrics import MetricsWriter, require_loggers
from rwkv_jax.training.reporting.plots import plot_losses
from rwkv_jax.training.reporting.profiling import StepProfiler
from rwkv_jax.training.reporting.step_logger import NonFiniteError, StepLogger
from rwkv_jax.training.reporting.throughput import Throughput
from rwkv_jax.training.sample import Sampler
from rwkv_jax.training.step import TrainFunctions, TrainState, abstract_state, initial_state, make_train_functions
from rwkv_jax.training.stopping import StopRequest
from rwkv_jax.weights.pretrained import check_initial_weights, initial_params

LONGEST_PREPARATION = 24 * 3600
"""Seconds that processes wait for each other to build a corpus, or to fetch and load weights."""


class TrainResult(NamedTuple):
    """How a run ended."""

    state: TrainState
    held_out: HeldOut | None
    """The last evaluation, over all held-out text; None without any, or if the run was asked to stop before its end."""


def train(config: TrainConfig, *, command: str = "train(config)") -> TrainResult:
    """Trains, or resumes, the run in `config.run_dir`; of a run of several processes, this one's part.

    Args:
      command: what resumes the run; shown when it is asked to stop.

    Raises:
      ConfigError: a setting that cannot work, before anything is computed or overwritten.
      NonFiniteError: `training.max_bad_steps` steps in a row were not finite; the last good state is saved.
      LostProcessError: another process of the run did not come.
    """
    with join(config.distributed) as processes:
        return train_together(config, processes, command)


def train_together(config: TrainConfig, processes: Processes, command: str) -> TrainResult:
    """`train` in one of the run's processes, which have joined."""
    training, evaluation, run_dir = config.training, config.evaluation, Path(config.run_dir)
    num_steps, seconds = training.num_steps, config.distributed.join_seconds
    assert_same(processes, ckpt.shared_settings(config), seconds=seconds)
    require_loggers(config.logging)
    saved_run = ckpt.prepare_run_dir(run_dir)
    memories = allgather_text(
        processes, "device memory", str(device_memory(jax.local_devices()[0]) or 0), seconds=seconds
    )
    mesh = make_mesh(config, jax.devices(), min(map(int, memories)) or None)
    trainer = make_train_functions(config, mesh)
    if saved_run is None and config.initial_weights is not None and config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.vocab_size)
        check_initial_weights(config.initial_weights, config.model, tokenizer)

    with contextlib.ExitStack() as stack:
        # Every process computes; the first one talks and writes, but for checkpoints, of which each writes its share.
        output = None if processes.is_first else stack.enter_context(Path(os.devnull).open("w"))
        console = Console(num_steps, every=config.logging.every, stream=output)

        # Data: every batch is a function of the step.
        prepare = functools.partial(prepare_corpus, config.data, config.model.vocab_size, console.print)
        corpus = run_on_first_process(processes, "corpus", prepare)
        rows = training_rows(
            corpus,
            order="streams" if training.carry_state else config.data.order,
            seed=config.seed,
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            magic_prime=config.data.magic_prime,
        )
        load = batch_loader(trainer, training, corpus.tokenizer.end_of_text)
        identity = ckpt.identity(config, corpus.fingerprint, corpus.tokenizer.fingerprint)
        assert_same(processes, identity, seconds=LONGEST_PREPARATION, subject="corpus")
        if saved_run is not None:
            ckpt.refuse_difference(saved_run["identity"], identity, str(run_dir))
        if processes.is_first:
            ckpt.write_run(run_dir, config, identity, corpus)

        stack.enter_context(console)
        stop = SyncedStop(stack.enter_context(StopRequest()).requested, processes)
        checkpoints = stack.enter_context(ckpt.Checkpoints(run_dir, config.checkpoint.keep, console.print, processes))
        profiler = stack.enter_context(StepProfiler(config.profile, run_dir / "profile", console.print))

        # Functions, each compiled once.
        train_step = jax.jit(trainer.train_step, donate_argnums=0)
        eval_step = jax.jit(trainer.eval_step)
        whole = trainer.state_shardings.step
        sample = Sampler(trainer.graphdef, config.model, corpus.tokenizer, results_on=whole).text
        sampling = SamplingParams(evaluation.sample_temperature, evaluation.sample_top_p)

        def held_out_loss(params: Any, num_batches: int | None = None) -> HeldOut | None:
            if corpus.held_out is None:
                return None
            shape = {"batch_size": training.batch_size, "sequence_length": training.sequence_length}
            windows = evaluation_windows(corpus.held_out.tokens, **shape, num_batches=num_batches)
            batches = (load(lambda some: tokens[some], mask=mask) for tokens, mask in windows)  # noqa: B023  used at once
            return evaluate(eval_step, params, batches, corpus.held_out)

        # State: what an earlier run left, or new.
        state = checkpoints.restore(abstract_state(trainer))
        console.print(describe(config, trainer, rows.num_tokens, None if state is None else int(state.step)))
        if state is None:
            state = initial_state(trainer, config.seed)
            if config.initial_weights is not None:
                params = initial_params(config.initial_weights, config.model, trainer.state_shardings.params)
                state = state._replace(params=params)
        first_step, best_loss = int(state.step), checkpoints.best_loss()
        assert_same(
            processes, {"step": first_step, "best": best_loss}, seconds=LONGEST_PREPARATION, subject="checkpoints"
        )
        if first_step > num_steps:
            raise ConfigError(f"training.num_steps = {num_steps}: the run has taken {first_step} steps; ask for more")

        writer = None
        if processes.is_first:
            writer = stack.enter_context(MetricsWriter(run_dir, config.logging, first_step, config=to_dict(config)))
        logger = StepLogger(
            num_steps=num_steps,
            every=config.logging.every,
            max_bad_steps=training.max_bad_steps,
            bytes_per_token=corpus.bytes_per_token,
            learning_rate=learning_rate_schedule(config.optimizer, num_steps),
            row_locations=rows.row_locations,
            console=console,
            writer=writer,
            throughput=Throughput(training.batch_size * training.sequence_length),
        )
        for step in range(first_step, num_steps):
            # Step.
            batch = load(functools.partial(rows.read, step), trains=True)
            profiler.before(step)
            state, metrics = train_step(state, batch)
            profiler.after(step, metrics)
            done, stopping = step + 1, stop.name()
            evaluates = done % evaluation.every == 0 or done == num_steps
            saves = done % config.checkpoint.every == 0 or done == num_steps or stopping is not None
            try:
                logger.step(step, metrics, wait=evaluates or saves)
            except NonFiniteError:
                checkpoints.save(state, done)
                raise

            # Evaluate and sample.
            if evaluates:
                with logger.throughput.pause():
                    held_out = held_out_loss(state.params, evaluation.batches)
                    if held_out is not None:
                        logger.held_out(done, held_out)
                        if held_out.loss < best_loss:
                            best_loss = held_out.loss
                            checkpoints.save_best(state, done, best_loss)
                    for seed, prompt in enumerate(prompts_after(done, config), start=done):
                        text = sample(state.params, prompt, evaluation.sample_tokens, sampling, seed)
                        logger.sample(done, prompt, text)

            # Save.
            if saves:
                with logger.throughput.pause():
                    checkpoints.save(state, done)
            if stopping:
                checkpoints.wait()
                console.print(f"{stopping}: saved after step {done}; resume with:  {command}")
                return TrainResult(state, None)

        # The last word: all held-out text, beside what compressors make of the same bytes.
        held_out = held_out_loss(state.params)
        if processes.is_first:
            if held_out is not None:
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


def describe(config: TrainConfig, trainer: TrainFunctions, num_tokens: int, resumed_step: int | None) -> str:
    """What is about to run, and on several devices what lies where."""
    model, training, mesh = config.model, config.training, trainer.split.mesh
    tokens_per_step = training.batch_size * training.sequence_length
    device = jax.devices()[0]
    begin = "starting" if resumed_step is None else f"resuming after step {resumed_step}"
    lines = [
        f"{model.architecture} {model.num_layers} x {model.width}, {model.num_parameters() / 1e6:.1f}M parameters, "
        f"{model.dtype}, on {1 if mesh is None else mesh.size} x {device.device_kind} ({device.platform})",
        f"{begin}: {training.num_steps} steps of {training.batch_size} x {training.sequence_length} tokens, "
        f"{training.num_steps * tokens_per_step / num_tokens:.2f} epochs of {num_tokens:,} tokens",
        f"run folder: {config.run_dir}",
    ]
    if mesh is not None:
        state = abstract_state(trainer)
        groups = {f"parameters: {name}": part for name, part in state.params.items()}
        groups |= {"optimizer": state.optimizer, "carried state": state.recurrent_state}
        lines += [f"mesh: {mesh_shape(mesh)}", memory_table(groups)]
    if idle := jax.device_count() - (1 if mesh is None else mesh.size):
        rows = training.batch_size // training.accumulation_steps
        lines.append(
            f"{idle} of {jax.device_count()} devices stay idle: no more can share {rows} rows at a time evenly "
            "(training.batch_size / training.accumulation_steps)"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    try:
        config = parse_train_config(sys.argv[1:])
        train(config, command=shlex.join(["python", *sys.argv]))
    except (ConfigError, NonFiniteError, LostProcessError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
