"""Evaluation tasks of a run: when they run, what they find, and that they change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.models import abstract_model
from rwkv_jax.training.reporting.metrics import read_metrics
from tests.small_runs import assert_same_bits
from tests.train.in_process import Run, run, steps_of


def with_tasks(config: TrainConfig, *tasks: str, **settings: Any) -> TrainConfig:
    evaluation = dataclasses.replace(config.evaluation, tasks=tasks, **settings)
    return dataclasses.replace(config, evaluation=evaluation)


def test_tasks_are_logged_and_change_nothing(finished: Run, config: TrainConfig, tmp_path: Path) -> None:
    text = "def f3(x):\n    return x * 3 + 9\n" * 4
    (tmp_path / "code.txt").write_text(text)
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x"}) for i in range(5)]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    tasks = (f"compression={tmp_path / 'code.txt'}", f"lambada={tmp_path / 'words.jsonl'}")
    found = run(with_tasks(config, *tasks, task_every=4, task_items=3), tmp_path / "run")
    assert_same_bits(found.result.state, finished.result.state)
    assert steps_of(found.folder, "task") == [4, 8]
    record = [each for each in read_metrics(found.folder / "metrics.jsonl") if each["kind"] == "task"][-1]
    assert record["lambada.items"] == 3
    assert record["compression.items"] == 1
    assert record["compression.bits_per_byte_stderr"] is None
    assert record["lambada.perplexity_stderr"] >= 0
    assert f"step 8: compression bits_per_byte {record['compression.bits_per_byte']:.4g}" in found.output

    tokenizer = load_tokenizer(found.folder, config.model.vocab_size)
    ids = np.array([tokenizer.end_of_text, *tokenizer.encode(text)])
    model = nnx.merge(abstract_model(config.model)[0], found.result.state.params)
    logprobs = np.asarray(jax.nn.log_softmax(jax.jit(lambda tokens: model(tokens)[0][0])(ids[None, :-1])), np.float64)
    bits = -logprobs[range(len(ids) - 1), ids[1:]].sum() / math.log(2)
    assert record["compression.bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (("lambda=x",), "evaluation.tasks = 'lambda': no such task; did you mean lambada"),
        (("lambada=nowhere.jsonl",), "evaluation.tasks: lambada = 'nowhere.jsonl': no such file or folder"),
        (("lambada={folder}/words.jsonl",), "words.jsonl, line 1: text: must have a blank"),
    ],
)
def test_tasks_are_refused_before_anything_is_done(
    config: TrainConfig, tmp_path: Path, tasks: tuple[str, ...], message: str
) -> None:
    (tmp_path / "words.jsonl").write_text('{"text": "word"}')
    tasks = tuple(task.format(folder=tmp_path) for task in tasks)
    with pytest.raises(ConfigError) as error:
        run(with_tasks(config, *tasks), tmp_path / "run")
    assert message in str(error.value)
    assert str(error.value).startswith("evaluation.tasks")
    assert not (tmp_path / "run").exists()
