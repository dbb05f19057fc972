"""A terminal that knows ASCII only: what a run prints does not end it, what it cannot read is refused at the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import Workplace, read_log

CONFIG = """
from rwkv_jax.config import *

def config():
    return TrainConfig(
        model=ModelConfig(vocab_size=300, num_layers=2, width=16, head_dim=16),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, held_out=0.2),
        optimizer=OptimizerConfig(warmup_steps=0),
        training=StepConfig(num_steps=2, batch_size=2, sequence_length=16),
        evaluation=EvaluationConfig(every=1, batches=1, sample_tokens=4, sample_prompts=("caf\\u00e9 \\u65e5",)),
    )
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}


@pytest.mark.long
def test_prompts_that_the_terminal_lacks_are_printed_with_escapes_or_refused_at_the_start(tmp_path: Path) -> None:
    place, run_dir = Workplace(tmp_path, tmp_path / "programs", CONFIG), tmp_path / "run"
    place.environment |= ASCII
    printed = place.finish(place.command(run_dir), run_dir)
    assert printed.count("\ncaf\\xe9 \\u65e5") == 2

    other = tmp_path / "other"
    refused = place.start(place.command(other, "--evaluation.sample-prompts", "caf\u00e9"), other)
    assert refused.wait(60) not in (None, 0)
    assert "evaluation.sample_prompts = ('caf\\udcc3\\udca9',): is not UTF-8" in " ".join(read_log(other).split())
    assert not other.exists()
