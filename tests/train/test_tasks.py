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

from rwkv_jax.config import ConfigError, EvaluationConfig, TrainConfig
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.evaluation.tasks.plans import plan_tasks
from rwkv_jax.models import abstract_model
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.tasks import fingerprint, read_tasks
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
    assert (record["lambada.num_fewshot"], record["lambada.num_truncated"]) == (0, 0)
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


def test_examples_are_chosen_as_by_the_command(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x"}) for i in range(9)]
    (tmp_path / "words.jsonl").write_text("\n".join(lines[:3]))
    (tmp_path / "others.jsonl").write_text("\n".join(lines[3:]))
    files = {"lambada": tmp_path / "words.jsonl"}, {"lambada": tmp_path / "others.jsonl"}
    tasks, examples = (tuple(f"{name}={path}" for name, path in pairs.items()) for pairs in files)
    evaluation = EvaluationConfig(tasks=tasks, task_items=2, task_num_fewshot=2, task_examples=examples, task_seed=5)
    assert read_tasks(evaluation) == plan_tasks(files[0], num_fewshot=2, examples=files[1], limit=2, seed=5)
    other_seed = dataclasses.replace(evaluation, task_seed=6)
    assert fingerprint(read_tasks(other_seed)) != fingerprint(read_tasks(evaluation))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_num_fewshot": 3}, "evaluation.task_num_fewshot = 3: lambada has 3 examples to draw from; give more"),
        ({"task_examples": ("piqa=x",)}, "evaluation.task_examples = 'piqa': is not among the tasks lambada"),
        ({"task_examples": ("lambada=x",)}, "evaluation.task_examples = 'x': prompts of lambada have no examples"),
        ({"tasks": (), "task_examples": ("lambada=x",)}, "evaluation.tasks: there are none; give at least one"),
    ],
)
def test_impossible_examples_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"text": f"a {i}"}) for i in range(3)))
    given: dict[str, Any] = {"tasks": (f"lambada={tmp_path / 'words.jsonl'}",)} | settings
    with pytest.raises(ConfigError) as error:
        read_tasks(EvaluationConfig(**given))
    assert str(error.value).startswith(message)


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
