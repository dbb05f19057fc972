"""What the journal writes to metrics.jsonl and the console, and when it gives the alarm."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from rwkv_jax.config import LoggingConfig
from rwkv_jax.evaluation.statistics import Estimate
from rwkv_jax.evaluation.tasks.base import Summary
from rwkv_jax.held_out import HeldOut
from rwkv_jax.training.reporting.console import Console
from rwkv_jax.training.reporting.metrics import MetricsWriter, read_metrics
from rwkv_jax.training.reporting.step_logger import NonFiniteError, StepLogger
from rwkv_jax.training.reporting.throughput import Throughput
from rwkv_jax.training.state import StepMetrics
from rwkv_jax.training.tasks import TaskResult

BYTES_PER_TOKEN = 2.0


class Desk:
    """A journal of 12 steps, its files and its console."""

    def __init__(self, run_dir: Path, every: int = 3, max_bad_steps: int = 3) -> None:
        self.output = io.StringIO()
        self.writer = MetricsWriter(run_dir, LoggingConfig())
        self.logger = StepLogger(
            num_steps=12,
            every=every,
            max_bad_steps=max_bad_steps,
            bytes_per_token=BYTES_PER_TOKEN,
            learning_rate=lambda step: 0.5**step,
            row_locations=lambda step: [f"token {100 * step}", f"token {100 * step + 7}"],
            console=Console(12, every=1, stream=self.output, interactive=False),
            writer=self.writer,
            throughput=Throughput(1),
        )

    def steps(self, losses: dict[int, float], *, wait: bool = False) -> None:
        for step, loss in losses.items():
            finite = math.isfinite(loss)
            self.logger.step(
                step, StepMetrics(jnp.float32(loss), jnp.float32(10 * step), jnp.asarray(finite)), wait=wait
            )

    @property
    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.writer.path)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    with desk.writer:
        yield desk


def test_a_step_is_written_down_when_the_next_one_is_taken(desk: Desk) -> None:
    desk.steps({0: 4.0, 1: 2.0, 2: 3.0})
    assert desk.records == []
    desk.steps({3: 1.0})
    assert [record["step"] for record in desk.records] == [3]


def test_waiting_writes_down_the_step_itself(desk: Desk) -> None:
    desk.steps({0: 4.0, 1: 2.0})
    desk.steps({2: 3.0}, wait=True)
    assert [record["step"] for record in desk.records] == [3]


def test_a_line_has_the_mean_loss_of_its_steps_and_the_figures_of_the_last(desk: Desk) -> None:
    desk.steps({0: 4.0, 1: 2.0, 2: 3.0, 3: 9.0, 4: 9.0, 5: 9.0}, wait=True)
    first, second = desk.records
    assert (first["loss"], second["loss"]) == (3.0, 9.0)
    assert first["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / BYTES_PER_TOKEN)
    assert first["gradient_norm"] == 20.0
    assert first["learning_rate"] == 0.25
    assert first["skipped_steps"] == 0


def test_the_last_step_is_written_even_off_the_interval(tmp_path: Path) -> None:
    desk = Desk(tmp_path, every=5)
    with desk.writer:
        desk.steps(dict.fromkeys(range(12), 1.0), wait=True)
        assert [record["step"] for record in desk.records] == [5, 10, 12]


def test_skipped_steps_are_counted_and_left_out_of_the_mean(desk: Desk) -> None:
    desk.steps({0: 4.0, 1: math.nan, 2: 2.0, 3: 1.0, 4: 1.0, 5: 1.0}, wait=True)
    first, second = desk.records
    assert (first["loss"], first["skipped_steps"]) == (3.0, 1)
    assert (second["loss"], second["skipped_steps"]) == (1.0, 0)
    assert "step 1: loss nan" in desk.output.getvalue()


def test_an_interval_without_a_good_step_has_no_loss(desk: Desk) -> None:
    desk.steps({0: math.nan, 1: math.inf}, wait=True)
    with pytest.raises(NonFiniteError):
        desk.steps({2: math.nan}, wait=True)
    record, stop = desk.records
    assert (record["loss"], record["skipped_steps"]) == (None, 3)
    assert (stop["kind"], stop["step"]) == ("stop", 3)


@pytest.mark.parametrize("wait", [False, True])
def test_alarm_after_as_many_bad_steps_in_a_row_names_their_batches(desk: Desk, wait: bool) -> None:
    desk.steps({0: 1.0, 1: math.nan, 2: math.nan, 3: 1.0, 4: math.nan, 5: math.inf})
    with pytest.raises(NonFiniteError) as error:
        # Without waiting, step 6 is looked at when step 7 is taken.
        desk.steps({6: math.nan} if wait else {6: math.nan, 7: 1.0}, wait=wait)
    message = str(error.value)
    assert "3 steps in a row" in message
    assert [line.strip() for line in message.splitlines()[1:]] == [
        "step 4: token 400; token 407",
        "step 5: token 500; token 507",
        "step 6: token 600; token 607",
    ]


def test_an_alarm_says_why_if_the_data_knows(desk: Desk) -> None:
    desk.logger.why_skipped = lambda step: "nobody was paid" if step > 3 else None
    desk.steps({1: 1.0, 4: math.nan, 5: math.nan})
    with pytest.raises(NonFiniteError, match=r"^3 steps in a row were skipped, since nobody was paid; nothing was"):
        desk.steps({6: math.nan}, wait=True)
    assert "step 5: loss nan, gradient norm 50.0: nobody was paid, step skipped" in desk.output.getvalue()


def test_evaluations_and_samples_are_written_and_shown(desk: Desk) -> None:
    desk.logger.held_out(6, HeldOut(1.5, 0.75))
    desk.logger.sample(6, "def", " f():")
    assert desk.records == [
        {"kind": "evaluation", "step": 6, "loss": 1.5, "bits_per_byte": 0.75},
        {"kind": "sample", "step": 6, "prompt": "def", "text": " f():"},
    ]
    assert "held-out loss 1.5000, 0.7500 bits/byte" in desk.output.getvalue()
    assert "def f():" in desk.output.getvalue()


def test_tasks_are_written_with_their_examples_and_what_was_cut(desk: Desk) -> None:
    accuracy = Estimate(0.25, 0.125, 0.0, 0.5, 4)
    for step, num_truncated in ((3, 0), (6, 3)):
        desk.logger.tasks(step, {"piqa": TaskResult(Summary({"acc": accuracy}, {}), 2, 8, num_truncated)})
    whole, cut = desk.records
    assert (whole["piqa.num_fewshot"], whole["piqa.num_truncated"], cut["piqa.num_truncated"]) == (2, 0, 3)
    assert "step 3: piqa acc 0.25 +- 0.12\n" in desk.output.getvalue()
    assert "step 6: piqa acc 0.25 +- 0.12, 3 of 8 requests were cut at their beginning\n" in desk.output.getvalue()
