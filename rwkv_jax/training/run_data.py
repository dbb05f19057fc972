"""A run's data, of whatever kind: what is opened, the rows of each step, and the evaluation on what is held out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from rwkv_jax.config import OF_TEXT, TrainConfig
from rwkv_jax.data.chat.mixture import MixedCorpus, MixedRows, mixed_rows, prepare_mixed
from rwkv_jax.data.chat.rows import ChatRows
from rwkv_jax.data.chat.source import ChatCorpus, chat_rows, held_out_rows, prepare_chats
from rwkv_jax.data.corpus import Corpus, prepare_corpus
from rwkv_jax.data.synthetic.source import SyntheticCorpus, SyntheticRows, synthetic_rows
from rwkv_jax.data.synthetic.task import Task
from rwkv_jax.data.tokens.batches import evaluation_windows
from rwkv_jax.data.tokens.rows import Rows, TrainingRows, training_rows
from rwkv_jax.data.tokens.token_file import TokenFile
from rwkv_jax.held_out import Answers, HeldOut, Measured, evaluate
from rwkv_jax.parallel.coordination import run_on_first_process
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.training.answers import answers_evaluation
from rwkv_jax.training.batch import Batch, batch_loader
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.own_rows import OwnCorpus, OwnRows, open_examples, open_own_rows
from rwkv_jax.training.reporting.console import Console
from rwkv_jax.training.stored_teacher import open_stored

AnyCorpus = Corpus | SyntheticCorpus | ChatCorpus | MixedCorpus | OwnCorpus
AnyRows = TrainingRows | SyntheticRows | ChatRows | MixedRows | OwnRows


def open_data(
    config: TrainConfig, task: Task | None, trainer: TrainFunctions, processes: Processes, console: Console
) -> tuple[AnyCorpus, AnyRows]:
    """The corpus, built by the first process, and the rows of each training step."""
    if trainer.application is not None:
        return open_examples(trainer.application, trainer, console.print)
    if task is not None:
        return SyntheticCorpus(task), synthetic_rows(task, config)
    if config.training.objective not in OF_TEXT:
        return open_own_rows(config, trainer, processes, console.print)
    if config.data.chat is not None and config.data.mixture:
        mixed = run_on_first_process(processes, "corpus", functools.partial(prepare_mixed, config, console.print))
        return mixed, mixed_rows(mixed, config)
    if config.data.chat is not None:
        chats = prepare_chats(config, console.print)
        return chats, chat_rows(chats, config)
    training = config.training
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
    return corpus, rows


def open_loader(
    config: TrainConfig,
    identity: Mapping[str, Any],
    corpus: AnyCorpus,
    rows: AnyRows,
    trainer: TrainFunctions,
    processes: Processes,
    console: Console,
) -> Callable[..., Batch]:
    """`batch_loader` of a run, with what is stored of a teacher.

    Raises:
      ConfigError: as `open_stored`.
    """
    make = functools.partial(
        batch_loader,
        trainer.tokens_sharding,
        trainer.rows_sharding,
        config.training,
        corpus.tokenizer.end_of_text,
        config.seed if config.tuning.dropout else None,
    )
    if isinstance(rows, OwnRows):
        return make()
    load = make()

    def read(step: int) -> Batch:
        return load(functools.partial(rows.read, step))

    stored = open_stored(config, identity, read, trainer.sharded.mesh, processes, console.print)
    return load if stored is None else make(stored.read)


def held_out_evaluation(
    config: TrainConfig, corpus: AnyCorpus, rows: AnyRows, trainer: TrainFunctions, load: Callable[..., Batch]
) -> Callable[[Any, int | None], HeldOut | Answers | Measured | None]:
    """Makes (params, number of batches or None for all) -> what is found; None without held-out data."""
    if isinstance(rows, OwnRows):
        return rows.evaluation()
    assert not isinstance(corpus, OwnCorpus)
    if isinstance(corpus, SyntheticCorpus):
        return answers_evaluation(config, corpus.task, trainer)
    eval_step = jax.jit(trainer.eval_step)
    if corpus.held_out is None:
        return lambda params, num_batches: None

    def of_chats(chats: Iterable[Rows], params: Any) -> HeldOut:
        return evaluate(eval_step, params, (load(rows.select) for rows in chats), None)

    def of_texts(texts: TokenFile, params: Any, num_batches: int | None) -> HeldOut:
        shape = {"batch_size": config.training.batch_size, "sequence_length": config.training.sequence_length}
        windows = evaluation_windows(texts.tokens, **shape, num_batches=num_batches, mask=texts.mask)
        return evaluate(eval_step, params, (load(rows.select) for rows in windows), texts)

    def evaluate_held_out(params: Any, num_batches: int | None) -> HeldOut:
        if isinstance(corpus, ChatCorpus):
            return of_chats(held_out_rows(corpus, config, num_batches), params)
        if isinstance(corpus, MixedCorpus):
            found = of_chats(corpus.held_out_chats(config, num_batches), params)
            texts = corpus.held_out_texts
            return found if texts is None else found._replace(texts=of_texts(texts, params, num_batches))
        assert corpus.held_out is not None  # as above
        return of_texts(corpus.held_out, params, num_batches)

    return evaluate_held_out
