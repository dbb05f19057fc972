"""A run's steps: each trains, and after some of them it evaluates, samples and saves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from rwkv_jax.config import EvaluationConfig, TrainConfig
from rwkv_jax.evaluation.tasks.plans import Plan
from rwkv_jax.held_out import Answers, HeldOut, Measured
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.parallel.coordination import SyncedStop
from rwkv_jax.training.best import LOSS, Best
from rwkv_jax.training.checkpoints import Checkpoints
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.own_rows import OwnRows
from rwkv_jax.training.reporting.console import Console
from rwkv_jax.training.reporting.profiling import StepProfiler
from rwkv_jax.training.reporting.step_logger import StepLogger
from rwkv_jax.training.run_data import AnyRows
from rwkv_jax.training.sample import Sampler
from rwkv_jax.training.state import StepMetrics, TrainState
from rwkv_jax.training.task_scorer import TaskScorer
from rwkv_jax.training.tasks import evaluate_tasks, runs_tasks

Found = HeldOut | Answers | Measured | None
"""What an evaluation finds; None without held-out data."""


class Taken(NamedTuple):
    """How the steps ended."""

    held_out: Found
    """The last evaluation; None if there was none."""
    is_saved: bool
    """Whether the last checkpoint that was due has been saved."""
    is_stopped: bool = False
    """Whether a signal has ended them."""


@dataclasses.dataclass(eq=False)
class Steps:
    """A run's state, and what its steps are taken with."""

    state: TrainState
    """Of the last step; replaced by the next one, which has its memory."""
    config: TrainConfig
    trainer: TrainFunctions
    rows: AnyRows
    load: Callable[..., Any]
    """Makes the batch of some rows, on the devices."""
    train_step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
    """Compiled; the state is donated."""
    evaluate_held_out: Callable[[Any, int | None], Found]
    """(params, number of batches or None for all) -> what is found."""
    sampler: Sampler | None
    """None in an application's run, which writes no text."""
    tasks: list[Plan]
    scorer: TaskScorer | None
    """Of `tasks`; None in an application's run."""
    best: Best
    checkpoints: Checkpoints
    profiler: StepProfiler
    logger: StepLogger
    stop: SyncedStop
    console: Console
    command: str
    """Resumes the run; printed when a signal ends it."""

    def take(self, first_step: int) -> Taken:
        """Takes the steps from `first_step` on, until the last one, an early end or a signal."""
        config, best, logger = self.config, self.best, self.logger
        evaluation, num_steps, iterations = config.evaluation, config.training.num_steps, config.grpo.iterations
        save_due, held_out = False, None
        for step in range(first_step, num_steps):
            if best.ends(step) and step % iterations == 0:
                ends = f"none was better since step {best.step} (evaluation.stop_after); the run ends"
                self.console.print(f"step {step}: {ends}")
                break
            metrics = self._step(step)
            done, stopping = step + 1, self.stop.name()
            if is_amid_draw := done % iterations != 0:  # whose replies are in no checkpoint
                stopping = None
            evaluates = done % evaluation.every == 0 or done == num_steps
            asks_tasks = runs_tasks(evaluation, done, num_steps)
            save_due |= done % config.checkpoint.every == 0 or done == num_steps or stopping is not None
            logger.step(step, metrics, wait=evaluates or asks_tasks or save_due)
            if evaluates:
                held_out = self._evaluate(done)
            if asks_tasks:
                self._ask_tasks(done)
            save_due |= best.ends(done)

            # Nothing after a step that was skipped: it might push out the last good checkpoint.
            if save_due and not logger.is_bad and not is_amid_draw:
                with logger.throughput.pause():
                    self.checkpoints.save(self.trainer.kept(self.state), done, logger.metrics_window)
                save_due = False
            if stopping:
                self.checkpoints.wait()
                saved = f"saved after step {done}" if not save_due else f"step {done} was skipped, so it is not saved"
                self.console.print(f"{stopping}: {saved}; resume with:  {self.command}")
                return Taken(held_out, not save_due, is_stopped=True)
        return Taken(held_out, not save_due)

    def evaluated(self) -> Any:
        """The parameters that are evaluated: the averages if the config says so."""
        return self.trainer.averaged_params(self.state) if self.config.evaluation.ema else self.state.params

    def _step(self, step: int) -> StepMetrics:
        if isinstance(self.rows, OwnRows):
            batch = self.rows.load(step, self.state.params)
        else:
            batch = self.load(functools.partial(self.rows.read, step), trains=True, step=step)
        self.profiler.before(step)
        self.state, metrics = self.train_step(self.state, batch)
        self.profiler.after(step, metrics)
        return metrics

    def _evaluate(self, done: int) -> Found:
        """Evaluates held-out data and writes samples."""
        with self.logger.throughput.pause():
            weights = self.evaluated()
            if (found := self.evaluate_held_out(weights, self.config.evaluation.batches)) is not None:
                self.logger.held_out(done, found)
                if self.best.by == LOSS and not self.logger.is_bad and self.best.takes(done, found.loss):
                    self.checkpoints.save_best(self.trainer.kept(self.state), done, self.best.value)
            self._write_samples(weights, done)
        return found

    def _ask_tasks(self, done: int) -> None:
        """Evaluates the tasks."""
        assert self.scorer is not None  # or there would be no tasks
        with self.logger.throughput.pause():
            results = evaluate_tasks(self.tasks, self.scorer, self.evaluated())
            self.logger.tasks(done, results)
            value = self.best.of_tasks(results)
            if value is not None and not self.logger.is_bad and self.best.takes(done, value):
                self.checkpoints.save_best(self.trainer.kept(self.state), done, self.best.value, self.best.by)

    def _write_samples(self, params: Any, done: int) -> None:
        """Samples after a step, each with a seed of its own."""
        evaluation = self.config.evaluation
        sampling = SamplingParams(evaluation.sample_temperature, evaluation.sample_top_p)
        for seed, prompt in enumerate(_prompts_after(done, self.config), start=done):
            assert self.sampler is not None  # or there would be no prompts
            text = self.sampler.text(params, prompt, evaluation.sample_tokens, sampling, seed)
            self.logger.sample(done, prompt, text)


def sample_prompts(config: TrainConfig) -> tuple[str, ...]:
    """The prompts of a run's samples: none of a synthetic task; where none are named, numbers begin with nothing."""
    prompts = config.evaluation.sample_prompts
    if config.data.is_numbers and prompts == EvaluationConfig.sample_prompts:
        return ("",)
    return () if config.data.is_synthetic else prompts


def _prompts_after(step: int, config: TrainConfig) -> tuple[str, ...]:
    """The prompts to sample after a step: one per evaluation, in turn, and all at the end."""
    prompts = sample_prompts(config)
    if step == config.training.num_steps:
        return prompts
    return prompts[step // config.evaluation.every % len(prompts) :][:1] if prompts else ()
