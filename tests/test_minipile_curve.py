"""Holding a run's metrics against the published losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minipile_curve import LOSSES, STEPS, mini_epochs
from rwkv_jax.cli import load_config
from rwkv_jax.training.schedule import learning_rate_schedule

ROOT = Path(__file__).parents[1]


def records(losses: tuple[float, ...], every: int = 10) -> list[dict[str, Any]]:
    """A run's records, their losses wavering about the mean of each mini-epoch."""
    config = load_config(ROOT / "configs" / "minipile.py")
    rate = learning_rate_schedule(config.optimizer, config.training.num_steps)
    found: list[dict[str, Any]] = []
    for index, loss in enumerate(losses):
        for i, step in enumerate(range(index * STEPS + every, (index + 1) * STEPS + 1, every)):
            learning_rate = float(rate(step - 1))  # pyright: ignore[reportArgumentType]
            figures = {"loss": loss + 0.1 * (-1) ** i, "learning_rate": learning_rate}
            found.append({"kind": "train", "step": step} | figures)
    return [{"kind": "evaluation", "step": 1}, *found]


def test_the_published_curve_is_right() -> None:
    found = list(mini_epochs(records(LOSSES[:2])))
    assert [epoch.loss for epoch in found] == pytest.approx(LOSSES[:2])
    assert all(epoch.is_right for epoch in found)


def test_a_loss_or_a_learning_rate_of_another_run_is_wrong() -> None:
    (epoch,) = mini_epochs(records((LOSSES[0] + 0.011,)))
    assert not epoch.is_right
    (epoch,) = mini_epochs(records(LOSSES[:1]))
    assert epoch.is_right
    assert not epoch._replace(learning_rate=6e-4).is_right


def test_an_unfinished_mini_epoch_is_left_out() -> None:
    assert len(list(mini_epochs(records(LOSSES[:2])[:-1]))) == 1
    assert list(mini_epochs([])) == []


def test_lines_that_span_mini_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"leave logging.every at 10"):
        list(mini_epochs([{"kind": "train", "step": STEPS + 1, "loss": 4.0, "learning_rate": 1e-4}]))
    twice = [{"kind": "train", "step": 10, "loss": 4.0, "learning_rate": 1e-4}] * 2
    with pytest.raises(ValueError, match="step 10 follows step 10"):
        list(mini_epochs(twice))


@pytest.mark.parametrize(("losses", "code"), [(LOSSES[:1], 0), ((4.5,), 1), ((), 1)])
def test_the_command(losses: tuple[float, ...], code: int, tmp_path: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records(losses))
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    command = [sys.executable, "-W", "error", "benchmarks/minipile_curve.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("| 0 | " in done.stdout) == bool(losses)
