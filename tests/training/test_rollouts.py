"""Replies that a model in training draws, what they are worth, and runs of GRPO."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    GRPOConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.models import model_type
from rwkv_jax.training import loop
from rwkv_jax.training.continuations import Continuations
from rwkv_jax.training.loop import train
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.reporting.step_logger import NonFiniteError
from rwkv_jax.training.rewards import Reward, Rewarded, give_rewards, load_rewards
from rwkv_jax.training.rollouts import ROLLOUTS_FILE, usable_advantages
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.weights.pretrained import save_pretrained
from tests.small_runs import assert_same_bits, names_in

MODEL = ModelConfig("4", vocab_size=256, num_layers=2, width=16, ffn_width=32, wkv_implementation="scan")


def length(record: Mapping[str, Any], reply: str) -> float:
    del record
    return float(len(reply))


def moody(record: Mapping[str, Any], reply: str) -> Any:
    """Fails in some of the ways in which functions do."""
    if reply == "raises":
        raise RuntimeError("no idea")
    return {"nan": math.nan, "text": "1", "none": None, "infinite": math.inf}.get(reply, record["sum"])


def test_a_group_in_which_a_function_fails_is_skipped() -> None:
    rewards = [Reward("length", 1.0, length), Reward("moody", 0.5, moody)]
    for wrong in ("raises", "nan", "text", "none", "infinite"):
        found = give_rewards(rewards, [{"sum": 2}] * 4, ["a", wrong, "abc", "d"], 2)
        assert found.usable.tolist() == [False, False, True, True]
        assert np.isnan(found.values[1, 1])
        assert found.totals[2:].tolist() == [4.0, 2.0]
        (failure,) = found.failures
        assert failure.startswith("moody: ")
        assert repr(wrong) in failure


def test_rewards_may_be_any_numbers() -> None:
    for value in (True, np.bool_(True), np.float32(1), np.array(1), jnp.float32(1), jnp.array(True)):
        found = give_rewards([Reward("own", 1.0, lambda record, reply, value=value: value)], [{}] * 2, ["a", "b"], 2)
        assert found.usable.all(), found.failures
        assert found.totals.tolist() == [1.0, 1.0]


def test_advantages_are_among_usable_groups() -> None:
    values, usable = np.array([1.0, 2.0, np.nan, 9.0, 3.0, 7.0]), np.array([True, True, False, False, True, True])
    rewarded = Rewarded(values[:, None], values, usable, ())
    found = usable_advantages(rewarded, GRPOConfig(num_generations=2, scale="batch"))
    expected = np.array([-0.5, 0.5, 0, 0, -2, 2]) / (np.std([1.0, 2.0, 3.0, 7.0], ddof=1) + 1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    none = usable_advantages(rewarded._replace(usable=usable & False), GRPOConfig(num_generations=2))
    assert none.tolist() == [0.0] * 6


def test_functions_are_found_by_file_and_by_module(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def always(record, reply):\n    return 1.0\n\nwrong = 3\n")
    own, ours = load_rewards([(f"{path}:always", 2.0), ("tests.training.test_rollouts:length", 1.0)])
    assert (own.name, own.weight, own.function({}, "")) == ("always", 2.0, 1.0)
    assert ours.function is length
    for name, message in (
        (f"{path}:wrong", "has no function of this name"),
        (f"{tmp_path / 'none.py'}:always", r"cannot be loaded \(FileNotFoundError"),
        ("no_such_module:always", r"cannot be loaded \(ModuleNotFoundError"),
    ):
        with pytest.raises(ConfigError, match=rf"^grpo\.rewards = .*{message}"):
            load_rewards([(name, 1.0)])


def test_replies_are_those_of_each_prompt_alone() -> None:
    """Whatever its neighbors and its length; forks differ from each other, and end where they end."""
    model = model_type(MODEL)(MODEL, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda x: 3 * x, nnx.to_pure_dict(params))
    tokenizer = ByteTokenizer(256)
    draws = Continuations(RunModel(graphdef), MODEL, tokenizer, prompt_length=6, group_size=16, max_tokens=40)
    prompts = [np.array([0, *text], np.int32) for text in (b"ab", b"abcde", b"x")]
    together = draws.draw(params, prompts, 1)
    again = draws.draw(params, [prompts[0], prompts[2], prompts[1]], 1)
    np.testing.assert_array_equal(together.tokens[:16], again.tokens[:16])
    assert len({tuple(row) for row in together.tokens.tolist()}) > 5
    assert together.ended.any()
    for row in range(48):
        tokens, size = together.tokens[row], int(together.lengths[row])
        assert together.ended[row] == (0 in tokens[:size])
        if together.ended[row]:
            assert tokens[size - 1] == 0
            assert 0 not in together.ids(row)
            assert not tokens[size:].any()
        else:
            assert size == 40


REWARDS = """
def letters(record, reply):
    if record["prompt"] == "spoiled":
        raise RuntimeError("cannot say")
    return sum(character < "0" for character in reply) / max(len(reply), 1)
"""


def run_config(folder: Path) -> TrainConfig:
    """A run from random weights, in which one of eight prompts spoils its group."""
    save_pretrained(model_type(MODEL)(MODEL, rngs=nnx.Rngs(0)), folder / "base.safetensors")
    (folder / "rewards.py").write_text(REWARDS)
    prompts = [{"prompt": text} for text in ("spoiled", *"abcdefg")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return TrainConfig(
        run_dir=str(folder / "run"),
        model=MODEL,
        initial_weights=str(folder / "base.safetensors"),
        data=DataConfig(source=str(folder / "prompts.jsonl"), tokenizer="bytes", held_out=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-2, final_learning_rate=3e-2, warmup_steps=0, weight_decay=0),
        training=StepConfig(objective="grpo", num_steps=12, batch_size=32, sequence_length=20),
        grpo=GRPOConfig(
            rewards=((f"{folder / 'rewards.py'}:letters", 1.0),),
            num_generations=8,
            max_tokens=8,
            iterations=2,
            kl_weight=0.01,
            clip_high=0.28,
        ),
        evaluation=EvaluationConfig(every=12, batches=1, sample_prompts=()),
        checkpoint=CheckpointConfig(every=6),
        logging=LoggingConfig(every=2),
    )


@pytest.mark.long
def test_a_run_earns_more_and_goes_on_bit_by_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path)
    result = train(config)
    output = capsys.readouterr().out
    assert "1 of 4 groups skipped: letters: RuntimeError: cannot say; reply" in output
    assert "3 of 24 groups skipped" in output
    lines = [json.loads(line) for line in (tmp_path / "run" / ROLLOUTS_FILE).read_text().splitlines()]
    assert len(lines) == 6 * 32
    assert {line["skipped"] for line in lines if line["prompt"] == "spoiled"} == {True}
    rewards = [[line["reward"] for line in lines if line["step"] == step and not line["skipped"]] for step in (0, 10)]
    assert np.mean(rewards[1]) > np.mean(rewards[0]) + 0.05
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert all(record["kl"] > 0 for record in records)
    assert any(record["clipped"] > 0 for record in records)
    half = dataclasses.replace(config, run_dir=str(tmp_path / "half"))
    train(dataclasses.replace(half, training=dataclasses.replace(half.training, num_steps=6)))
    resumed = train(half)
    assert_same_bits(resumed.state.params, result.state.params)
    written = [(tmp_path / name / ROLLOUTS_FILE).read_text() for name in ("run", "half")]
    assert written[0] == written[1]


@pytest.mark.long
def test_a_run_that_is_stopped_amid_a_draw_finishes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And steps of which no group is usable are skipped and counted."""
    config = run_config(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("spoiled", "a")))
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, num_steps=4, batch_size=8),  # a prompt a draw
        evaluation=dataclasses.replace(config.evaluation, every=4),
    )
    with monkeypatch.context() as stopping:
        stopping.setattr(loop, "stop_requests", lambda: contextlib.nullcontext(lambda: "SIGTERM"))
        first = train(config).state
    assert (int(first.step), int(first.skipped_steps)) == (2, 0)
    assert names_in(tmp_path / "run" / "checkpoints") == ["2"]
    params = jax.tree.map(np.asarray, first.params)
    last = train(config).state
    assert (int(last.step), int(last.skipped_steps)) == (4, 2)
    assert_same_bits(last.params, params)


@pytest.mark.long
def test_a_run_that_learns_nothing_from_rewards_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "spoiled"}))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=4, batch_size=8))
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every=4))
    train(dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, every=4)))
    output = capsys.readouterr().out
    assert "no group of replies had finite rewards (grpo.rewards), step skipped" in output
    assert "the last step was skipped, so it is not saved; there is no checkpoint" in output
    assert "2 of 2 groups skipped" in output
    assert "nothing was learned from rewards: no step had a group of replies with finite rewards that differ" in output
    training = dataclasses.replace(config.training, max_bad_steps=2)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "stopped"), training=training)
    with pytest.raises(NonFiniteError, match=r"^2 steps in a row were skipped, since no group of replies had finite"):
        train(config)


@pytest.mark.parametrize(
    ("grpo", "training", "message"),
    [
        ({"rewards": ()}, {}, r"^grpo\.rewards = \(\): name at least one function"),
        ({"rewards": (("length", 1.0),)}, {}, r"^grpo\.rewards = 'length': must be FILE\.py:NAME"),
        ({"num_generations": 1}, {}, r"^grpo\.num_generations = 1: a reply is rewarded relative to others"),
        ({"num_generations": 3}, {}, r"^training\.batch_size = 32: must be a multiple of grpo\.num_generations = 3"),
        ({"max_tokens": 20}, {}, r"^grpo\.max_tokens = 20: must be less than training\.sequence_length = 20"),
        (
            {"rewards": (("a.py:same", 1.0), ("b.py:same", 1.0))},
            {},
            r"^grpo\.rewards = .*: functions are told apart by their names",
        ),
        (
            {"iterations": 2},
            {"num_steps": 11},
            r"^training\.num_steps = 11: must be a multiple of grpo\.iterations = 2",
        ),
        ({"iterations": 2}, {"first_step": 3}, r"^training\.first_step = 3: must be a multiple of grpo\.iterations"),
        ({"iterations": 5}, {}, r"^checkpoint\.every = 6: must be a multiple of grpo\.iterations = 5"),
        ({}, {"objective": "next_token"}, r"^grpo\.rewards = .*'next_token' does not read it"),
    ],
)
def test_settings_that_cannot_work_are_refused(grpo: Any, training: Any, message: str, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(
            config,
            grpo=dataclasses.replace(config.grpo, **grpo),
            training=dataclasses.replace(config.training, **training),
        )
