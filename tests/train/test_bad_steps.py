"""`train(config)` where the loss is not a number."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import CheckpointConfig, TrainConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokens.rows import Rows, TrainingRows, training_rows
from rwkv_jax.training.loss import TokenLosses, sum_losses
from rwkv_jax.training.objectives import next_token
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.reporting.step_logger import NonFiniteError
from tests.small_runs import names_in
from tests.train.in_process import restore, run

BAD_TOKEN = 7


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps whose loss, and so whose gradient, is not a number; to be filled by the test."""
    steps: set[int] = set()
    read_rows = TrainingRows.read

    def read(self: TrainingRows, step: int, rows: slice = slice(None)) -> Rows:
        found = read_rows(self, step, rows)
        return Rows(np.full_like(found.tokens, BAD_TOKEN)) if step in steps else found

    def losses(logits_of: Any, hidden: Any, targets: Any, *options: Any) -> TokenLosses:
        total = sum_losses(logits_of, hidden, targets, *options)
        return total._replace(nll=total.nll * jnp.where(jnp.all(targets == BAD_TOKEN), jnp.nan, 1))

    monkeypatch.setattr(TrainingRows, "read", read)
    monkeypatch.setattr(next_token, "sum_losses", losses)
    return steps


def test_bad_step_is_skipped_and_counted(config: TrainConfig, tmp_path: Path, bad_steps: set[int]) -> None:
    bad_steps |= {3, 4}
    every_step = dataclasses.replace(config, checkpoint=CheckpointConfig(every=1, keep=9), profile=None)
    done = run(every_step, tmp_path / "run")
    state = done.result.state
    assert (int(state.step), int(state.skipped_steps), int(state.bad_steps)) == (8, 2, 0)
    assert "step 3: loss nan" in done.output
    lines = [record for record in read_metrics(done.folder / "metrics.jsonl") if record["kind"] == "train"]
    assert {record["step"]: record["skipped_steps"] for record in lines} == {2: 0, 4: 1, 6: 1, 8: 0}
    assert all(record["loss"] is not None for record in lines)
    # Nothing is saved after a skipped step.
    assert names_in(done.folder / "checkpoints") == ["1", "2", "3", "6", "7", "8"]


@pytest.mark.parametrize("evaluate_every", [pytest.param(100, marks=pytest.mark.long), 7])
def test_too_many_bad_steps_in_a_row_end_the_run_which_goes_on_from_the_last_good_state(
    config: TrainConfig, tmp_path: Path, bad_steps: set[int], evaluate_every: int
) -> None:
    """Whether the last of them is looked at when the next step is taken, or at once since it is evaluated."""
    bad_steps |= {4, 5, 6, 7}
    bad = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, max_bad_steps=3),
        evaluation=dataclasses.replace(config.evaluation, every=evaluate_every),
        profile=None,
    )
    with pytest.raises(NonFiniteError) as error:
        run(bad, tmp_path / "run")
    corpus = prepare_corpus(config.data, 300, lambda line: None)
    rows = training_rows(corpus, order="windows", seed=config.seed, batch_size=4, sequence_length=32)
    for step in (4, 5, 6):
        assert f"step {step}: {'; '.join(rows.row_locations(step))}" in str(error.value)
    # The last good state is what is left, and what the run goes on from.
    assert names_in(tmp_path / "run" / "checkpoints") == ["4"]
    assert int(restore(bad, tmp_path / "run").skipped_steps) == 0
    bad_steps.clear()
    resumed = run(bad, tmp_path / "run")  # there is none from before step 4, so it is not passed over
    assert "the run gave up after step 7" in resumed.output
    assert "it goes on from step 4, before them" in resumed.output
    assert int(resumed.result.state.skipped_steps) == 0
    assert "stop" not in {record["kind"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")}
