"""The training loop: prepare the data, create or restore the state, then step, evaluate, sample and save.

A batch is a function of the step, so a stopped run resumes as if it had not been interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rwkv_jax import run_folder
from rwkv_jax.checkpoint_files import writing
from rwkv_jax.config import CROSS_ENTROPY, ConfigError, TrainConfig, from_dict, to_dict
from rwkv_jax.data.chat.mixture import MixedCorpus, MixedRows
from rwkv_jax.data.chat.rows import ChatRows
from rwkv_jax.data.chat.source import ChatCorpus
from rwkv_jax.data.numbers import number_tokenizer
from rwkv_jax.data.synthetic.source import SyntheticCorpus, SyntheticRows, task_of
from rwkv_jax.data.synthetic.task import Task, prompt_and_answer
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.evaluation.tasks.plans import Plan
from rwkv_jax.held_out import Answers, HeldOut, Measured, compressed_bits_per_byte
from rwkv_jax.parallel.coordination import (
    SyncedStop,
    allgather_text,
    assert_same,
    connect_devices,
    run_on_first_process,
)
from rwkv_jax.parallel.mesh import device_memory, make_mesh, mesh_shape
from rwkv_jax.parallel.placement import memory_table
from rwkv_jax.parallel.processes import Processes, join
from rwkv_jax.run_lock import lock_run
from rwkv_jax.training.best import LOSS, Best, sign_of
from rwkv_jax.training.checkpoints import Checkpoints, Restored
from rwkv_jax.training.examples import ApplicationCorpus
from rwkv_jax.training.functions import TrainFunctions, abstract_state, make_train_functions
from rwkv_jax.training.operator_choice import choose_operator, naming_operator, refuse_unable_here, with_choices
from rwkv_jax.training.own_rows import OwnCorpus, OwnRows
from rwkv_jax.training.reporting.console import Console
from rwkv_jax.training.reporting.metrics import MetricsWriter, last_stop, refuse_lost_checkpoints, require_loggers
from rwkv_jax.training.reporting.plots import plot_losses
from rwkv_jax.training.reporting.profiling import StepProfiler
from rwkv_jax.training.reporting.step_logger import StepLogger
from rwkv_jax.training.reporting.throughput import Throughput
from rwkv_jax.training.rollouts import RolloutRows
from rwkv_jax.training.run_data import AnyCorpus, AnyRows, held_out_evaluation, open_data, open_loader
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.sample import Sampler
from rwkv_jax.training.schedule import learning_rate_schedule, rate_notice
from rwkv_jax.training.state import TrainState
from rwkv_jax.training.steps import Steps, sample_prompts
from rwkv_jax.training.stopping import stop_requests
from rwkv_jax.training.stored_teacher import check_stored, known_teacher
from rwkv_jax.training.tasks import fingerprint, prepared_scorer, read_tasks
from rwkv_jax.training.teacher import check_teacher_tokenizer, described_teacher
from rwkv_jax.training.tuned import (
    base_digest,
    check_identity,
    described_tuning,
    first_state_digest,
    new_state,
    with_base,
)
from rwkv_jax.weights.pretrained import check_initial_weights
from rwkv_jax.weights.provenance import describe_maker

MAX_PREPARATION_SECONDS = 24 * 3600
"""How long processes wait for each other to build a corpus, or to download and load weights."""


class TrainResult(NamedTuple):
    """How a run ended."""

    state: TrainState
    held_out: HeldOut | None
    """The last evaluation, over all held-out text; None without held-out text or if the run was stopped early."""
    answers: Answers | None = None
    """The last evaluation of a synthetic task, in the place of `held_out`."""
    measured: Measured | None = None
    """The last evaluation of a run on preferences, rewards or an application's examples, in the place of `held_out`."""


def train(config: TrainConfig, *, restart: bool = False, command: str = "train(config)") -> TrainResult:
    """Trains or resumes the run in `config.run_dir`; with several processes, this process's share.

    Args:
      restart: set all that an existing run has left aside, in a folder of its own, and begin it again.
      command: shell command that resumes the run; printed when the run is stopped.

    Raises:
      ConfigError: an invalid setting, before anything is computed or overwritten.
      NonFiniteError: `training.max_bad_steps` steps in a row were skipped; the newest checkpoint is from before them.
      CheckpointError: a checkpoint cannot be read or written.
      LostProcessError: another process of the run did not arrive in time.
    """
    with join(config.distributed) as processes, contextlib.ExitStack() as stack:
        # Every process computes; the first one prints and writes, except for checkpoints, which all write together.
        output = None if processes.is_first else stack.enter_context(Path(os.devnull).open("w"))
        console = Console(config.training.num_steps, every=config.logging.every, stream=output)
        return _train(config, processes, console, stack, restart, command)


def _train(
    config: TrainConfig,
    processes: Processes,
    console: Console,
    stack: contextlib.ExitStack,
    restart: bool,
    command: str,
) -> TrainResult:
    """`train` in a process that has joined the others; the stack closes resources at the end."""
    training, num_steps, run_dir = config.training, config.training.num_steps, Path(config.run_dir)
    run = _prepare(config, processes, console, stack, restart)
    trainer, corpus, rows, load = run.trainer, run.corpus, run.rows, run.load

    stack.enter_context(console)
    stop = SyncedStop(stack.enter_context(stop_requests()), processes)
    connect_devices(processes, trainer.sharded.mesh, seconds=MAX_PREPARATION_SECONDS)
    checkpoints = stack.enter_context(Checkpoints(run_dir, config.checkpoint.keep, console.print, processes))
    profiler = stack.enter_context(StepProfiler(config.profile, run_dir / "profile", console.print))
    evaluate_held_out = held_out_evaluation(config, corpus, rows, trainer, load)
    sampler = scorer = None
    if trainer.application is None:
        sampler = Sampler(run.sampled, config.model, corpus.tokenizer, results_on=trainer.state_shardings.step)
        scorer = prepared_scorer(run.tasks, trainer, config, corpus.tokenizer, sampler)

    state, window, gave_up = _begin(config, run, checkpoints, processes, console)
    first_step, best = int(state.step), _best_so_far(config, run.tasks, checkpoints, int(state.step))
    found = {"step": first_step, "best": best.value}
    assert_same(processes, found, seconds=MAX_PREPARATION_SECONDS, subject="checkpoints")
    if first_step > num_steps:
        raise ConfigError(f"training.num_steps = {num_steps}: the run has taken {first_step} steps; ask for more")

    if run.saved is not None:  # whose file is replaced only once nothing can be refused any more
        if notice := rate_notice(from_dict(run.saved["config"]), config, first_step):
            console.print(notice)
        if processes.is_first:
            with writing(run_dir):
                made_with = describe_maker(config, run.saved)
                run_folder.write_run(run_dir, config, run.identity, corpus.tokenizer, run.choices, made_with)

    if processes.is_first and gave_up is not None and gave_up["step"] > first_step:
        console.print(
            f"the run gave up after step {gave_up['step']}, since steps in a row had been skipped; it goes on from "
            f"step {first_step}, before them"
        )
    writer = None
    if processes.is_first:
        writer = stack.enter_context(MetricsWriter(run_dir, config.logging, first_step, config=to_dict(config)))
        if isinstance(corpus, ChatCorpus | MixedCorpus) and first_step == training.first_step:
            writer.write("data", first_step, dataclasses.asdict(corpus.counts))
    steps = Steps(
        state,
        config,
        trainer,
        rows,
        load,
        train_step=naming_operator(jax.jit(trainer.train_step, donate_argnums=0), run.choices),
        evaluate_held_out=evaluate_held_out,
        sampler=sampler,
        tasks=run.tasks,
        scorer=scorer,
        best=best,
        checkpoints=checkpoints,
        profiler=profiler,
        logger=_make_logger(config, corpus, rows, console, writer, window),
        stop=stop,
        console=console,
        command=command,
    )
    del state  # or its arrays would be held beside those of the steps
    held_out, is_saved, is_stopped = steps.take(first_step)
    if is_stopped:
        return TrainResult(steps.state, None)

    is_any_taken = int(steps.state.skipped_steps) < num_steps - training.first_step
    if not is_saved:
        earlier = "the newest checkpoint is of an earlier one" if is_any_taken else "there is no checkpoint"
        console.print(f"the last step was skipped, so it is not saved; {earlier}")
    result = _result(steps.state, steps.evaluated(), held_out, evaluate_held_out)
    if isinstance(rows, OwnRows) and (summary := rows.summary()) is not None:
        console.print(summary)
    if processes.is_first and is_any_taken:  # otherwise there are no losses, and nothing to go on from
        _summarize(config, corpus, result, console)
    return result


class Prepared(NamedTuple):
    """A run before its first step: all that can be refused has been, and its folder and data are there."""

    trainer: TrainFunctions
    corpus: AnyCorpus
    rows: AnyRows
    load: Callable[..., Any]
    """Makes the batch of some rows, on the devices."""
    tasks: list[Plan]
    """Of evaluation."""
    saved: dict[str, Any] | None
    """What the folder says of the run that goes on; None for a new one."""
    identity: dict[str, Any]
    choices: Any
    """Of operators' implementations."""
    sampled: RunModel
    """The model that writes samples."""


def _prepare(
    config: TrainConfig, processes: Processes, console: Console, stack: contextlib.ExitStack, restart: bool
) -> Prepared:
    """Checks a run and opens its folder and data."""
    training, run_dir = config.training, Path(config.run_dir)

    # Checks: everything that can be rejected is rejected before any work is done.
    task = task_of(config)
    assert_same(processes, _shared_settings(config), seconds=config.distributed.join_seconds)
    require_loggers(config.logging)
    tasks = _read_tasks(config, processes)
    run_folder.prepare_run_dir(run_dir)
    if processes.is_first:
        stack.enter_context(lock_run(run_dir, console.print))
    saved = run_folder.prepare_run_dir(run_dir)  # again, now that no other run writes there
    trainer = make_train_functions(config, make_mesh(config, jax.devices(), _min_device_memory(config, processes)))
    refuse_unable_here(config, trainer.sharded.mesh)
    if config.initial_weights is not None and (saved is None or config.tuning.is_partial):
        check_initial_weights(config.initial_weights, config.model, _named_tokenizer(config, task))

    # Data.
    corpus, rows = open_data(config, task, trainer, processes, console)
    check_teacher_tokenizer(config, corpus.tokenizer)
    digests = (base_digest(config), first_state_digest(config), known_teacher(config))
    identity = run_folder.identity(config, corpus.fingerprint, corpus.tokenizer.fingerprint, *digests)
    assert_same(processes, identity, seconds=MAX_PREPARATION_SECONDS, subject="corpus")
    check_stored(config, identity, processes)  # before an old run would be moved
    if restart and saved is not None:  # which all have read, and all agree on everything else
        run_on_first_process(processes, "restart", functools.partial(run_folder.set_aside, run_dir, console.print))
        saved = None
    if saved is not None:
        check_identity(saved, identity, config)
        if processes.is_first:
            folder = run_dir / run_folder.CHECKPOINTS
            refuse_lost_checkpoints(run_dir, folder, training.first_step, config.checkpoint.every)
    load = open_loader(config, identity, corpus, rows, trainer, processes, console)
    choices = choose_operator(config, trainer.sharded.mesh, saved, processes, console.print)
    sampled = trainer.run_model  # single tokens are taken as the table has it
    if (chosen := with_choices(config, choices)) != config:
        trainer = make_train_functions(chosen, trainer.sharded.mesh)
        if isinstance(rows, OwnRows):
            rows.use(trainer)
    if saved is None and processes.is_first:
        with writing(run_dir):
            run_folder.write_run(run_dir, config, identity, corpus.tokenizer, choices, describe_maker(config, None))
    return Prepared(trainer, corpus, rows, load, tasks, saved, identity, choices, sampled)


def _begin(
    config: TrainConfig, run: Prepared, checkpoints: Checkpoints, processes: Processes, console: Console
) -> tuple[TrainState, Mapping[str, Any], dict[str, Any] | None]:
    """The state of the newest checkpoint, or a new one.

    Returns:
      The state, the sums of metrics since their last line, and how the run gave up if it did.
    """
    trainer, corpus, rows = run.trainer, run.corpus, run.rows
    ending = json.dumps(last_stop(Path(config.run_dir)) if processes.is_first else None)
    gave_up = json.loads(allgather_text(processes, "how the run ended", ending)[0])
    restored = checkpoints.restore(
        trainer.kept(abstract_state(trainer)), suspect=None if gave_up is None else gave_up["first"]
    )
    console.print(_describe(config, trainer, rows, None if restored is None else int(restored.state.step)))
    state, window = restored or Restored(new_state(config, trainer, corpus.tokenizer), {})
    if restored is not None:
        state = state._replace(params=with_base(config, trainer, state.params))
    if isinstance(rows, OwnRows):
        rows.prepare(state, processes, is_new=restored is None, report=console.print)
    return state, window, gave_up


def _read_tasks(config: TrainConfig, processes: Processes) -> list[Plan]:
    """The evaluation tasks that a config names, the same in all processes."""
    tasks = read_tasks(config.evaluation)
    _ = sign_of(config.evaluation, tasks)  # refuses a figure that there is not
    if tasks:
        asked = {"evaluation.tasks": fingerprint(tasks)}
        assert_same(processes, asked, seconds=MAX_PREPARATION_SECONDS, subject="evaluation tasks")
    return tasks


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting that the processes of one run must share, by field."""

    def flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        fields = {}
        for name, value in values.items():
            fields |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        return fields

    fields = flat(to_dict(config), "")
    for own in ("distributed.process_id", "data.cache_dir"):  # hosts may have separate disks
        del fields[own]
    return fields


def _min_device_memory(config: TrainConfig, processes: Processes) -> int | None:
    """Bytes of the smallest device's memory over all processes; None if a device does not report it."""
    own = str(device_memory(jax.local_devices()[0]) or 0)
    memories = allgather_text(processes, "device memory", own, seconds=config.distributed.join_seconds)
    return min(map(int, memories)) or None


def _named_tokenizer(config: TrainConfig, task: Task | None) -> Tokenizer:
    """The tokenizer of a run that starts from weights, which the config or its task names."""
    if task is not None:
        return task.tokenizer
    if config.data.is_numbers:
        return number_tokenizer(Path(config.data.source).expanduser(), config.model.vocab_size)
    assert config.data.tokenizer is not None  # as the config has checked
    return load_tokenizer(config.data.tokenizer, config.model.vocab_size)


def _make_logger(
    config: TrainConfig,
    corpus: AnyCorpus,
    rows: AnyRows,
    console: Console,
    writer: MetricsWriter | None,
    window: Mapping[str, Any],
) -> StepLogger:
    """What prints and writes each step's metrics; `window` has the sums of those since the last line."""
    training = config.training
    return StepLogger(
        num_steps=training.num_steps,
        every=config.logging.every,
        max_bad_steps=training.max_bad_steps,
        bytes_per_token=corpus.bytes_per_token if training.objective in CROSS_ENTROPY else None,
        learning_rate=learning_rate_schedule(config.optimizer, training.num_steps, training.first_step),
        row_locations=rows.row_locations,
        console=console,
        writer=writer,
        throughput=Throughput(
            rows.tokens_per_step if isinstance(rows, OwnRows) else training.batch_size * training.sequence_length
        ),
        resumed_window=window,
        why_skipped=rows.why_skipped if isinstance(rows, RolloutRows) else None,
    )


def _best_so_far(config: TrainConfig, tasks: list[Plan], checkpoints: Checkpoints, first_step: int) -> Best:
    """The best step of a run before it goes on from `first_step`, which stands for it if there is none to compare."""
    evaluation, value = config.evaluation, checkpoints.best_loss(config.evaluation.best_by)
    by_loss, step = evaluation.best_by == LOSS, checkpoints.best_step
    return Best(
        by=evaluation.best_by,
        sign=sign_of(evaluation, tasks),
        every=evaluation.every if by_loss else evaluation.task_every or evaluation.every,
        stop_after=evaluation.stop_after,
        value=value,
        step=first_step if step is None or math.isinf(value) else step,
    )


def _result(
    state: TrainState,
    weights: Any,
    last: HeldOut | Answers | Measured | None,
    evaluate_held_out: Callable[..., HeldOut | Answers | Measured | None],
) -> TrainResult:
    """How a run that has taken all its steps ends, given its weights and the evaluation after the last of these."""
    found = last if isinstance(last, Answers) else evaluate_held_out(weights, None)
    # The last step has drawn all answers of a synthetic task already.
    if isinstance(found, Answers):
        return TrainResult(state, None, found)
    return TrainResult(state, None, measured=found) if isinstance(found, Measured) else TrainResult(state, found)


def _describe(config: TrainConfig, trainer: TrainFunctions, rows: AnyRows, resumed_step: int | None) -> str:
    """What is about to run and, on several devices, the memory of each."""
    model, training, mesh = config.model, config.training, trainer.sharded.mesh
    tokens_per_step = training.batch_size * training.sequence_length
    device = jax.devices()[0]
    after = training.first_step if resumed_step is None else resumed_step
    begin = ("starting" if resumed_step is None else "resuming") + (f" after step {after}" if after else "")
    if isinstance(rows, SyntheticRows):
        data = f"drawn from {rows.task}"
    elif isinstance(rows, ChatRows | MixedRows | OwnRows):
        data = rows.describe(training.num_steps)
    else:
        data = f"{training.num_steps * tokens_per_step / rows.num_tokens:.2f} epochs of {rows.num_tokens:,} tokens"
    title, size = model.title, model.num_parameters()
    if trainer.application is not None:
        title = f"{trainer.application.config.application} of {title}"
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(trainer.params))
    lines = [
        f"{title} {model.num_layers} x {model.width}, {size / 1e6:.1f}M parameters, "
        f"{model.dtype}, on {1 if mesh is None else mesh.size} x {device.device_kind} ({device.platform})",
        f"{begin}: {training.num_steps} steps of {training.batch_size} x {training.sequence_length} tokens, {data}",
        *described_tuning(config, trainer),
        *described_teacher(config, trainer.teacher),
        f"run folder: {config.run_dir}",
    ]
    if mesh is not None:
        state = abstract_state(trainer)
        groups = {f"parameters: {name}": part for name, part in state.params.items()}
        groups |= {"optimizer": state.opt_state, "averages": state.ema, "carried state": state.recurrent_state}
        lines += [f"mesh: {mesh_shape(mesh)}", memory_table(groups)]
    if idle := jax.device_count() - (1 if mesh is None else mesh.size):
        rows_at_once = training.batch_size // training.accumulation_steps
        lines.append(
            f"{idle} of {jax.device_count()} devices stay idle: no more can share {rows_at_once} rows at a time evenly "
            "(training.batch_size / training.accumulation_steps)"
        )
    return "\n".join(lines)


def _summarize(config: TrainConfig, corpus: AnyCorpus, result: TrainResult, console: Console) -> None:
    """Prints the loss over all held-out text, compressors' results for comparison, and what to do next."""
    prompt: str | None = next(iter(sample_prompts(config)), "")
    if isinstance(corpus, SyntheticCorpus):
        task = corpus.task
        prompt = None if task.labels else prompt_and_answer(task, config.training.sequence_length)[0]
    elif isinstance(corpus, ChatCorpus | MixedCorpus):
        if result.held_out is not None:
            console.print(f"all held-out chats: {result.held_out.describe()}")
    elif isinstance(corpus, OwnCorpus):
        if result.measured is not None:
            console.print(f"all held-out data: {result.measured.describe()}")
        if isinstance(corpus, ApplicationCorpus):
            prompt = None
    elif (held_out := result.held_out) is not None:
        assert held_out.bits_per_byte is not None
        marks = {"this model": held_out.bits_per_byte} | compressed_bits_per_byte(corpus.held_out_bytes())
        listed = ", ".join(f"{name} {value:.3f}" for name, value in marks.items())
        console.print(f"all held-out text: loss {held_out.loss:.4f} nats; bits/byte: {listed}")
    with writing(Path(config.run_dir)):
        plot = plot_losses(Path(config.run_dir))
    sampling = "" if prompt is None else ", or sample with"
    console.print(f"losses: {plot}; go on with --training.num-steps above {config.training.num_steps}{sampling}")
    if prompt is not None:
        console.print(f"  {shlex.join(['rwkv', 'generate', config.run_dir, '--prompt', prompt])}")
