"""A run on a synthetic task is the same on a mesh and with several processes, each of which draws its own rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import Machines, Workplace, read_figures

CONFIG = """
from rwkv_jax.config import *

def config():
    return TrainConfig(
        model=ModelConfig(vocab_size=24, num_layers=2, width=32, head_dim=16),
        data=DataConfig(source="synthetic:word_problem(items=3)"),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=3),
        training=StepConfig(num_steps=8, batch_size=8, sequence_length=16),
        evaluation=EvaluationConfig(every=8, batches=2, lengths=(24,)),
        checkpoint=CheckpointConfig(every=8),
        logging=LoggingConfig(every=1),
    )
"""

MESHES = [
    Machines(("--parallel.data", "2", "--parallel.sequence", "2", "--parallel.tensor", "2"), devices=8),
    Machines(("--parallel.fsdp", "2"), devices=1, processes=2),
]


@pytest.mark.long
def test_losses_and_answers_are_those_of_one_device(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = Workplace(tmp_path, tmp_path_factory.getbasetemp() / "programs", CONFIG)
    place.finish_on(Machines(), tmp_path / "alone")
    expected = read_figures(tmp_path / "alone")
    assert [record["kind"] for record in expected] == ["train"] * 8 + ["evaluation"]
    assert 0 < expected[-1]["accuracy"] < 1
    for number, machines in enumerate(MESHES):
        place.finish_on(machines, tmp_path / f"mesh{number}")
        found = read_figures(tmp_path / f"mesh{number}")
        # What rounding does to Adam's steps; another order of the rows would make a difference of more than 1e-2.
        assert [record["loss"] for record in found] == pytest.approx([r["loss"] for r in expected], rel=1e-4)
        for name in ("accuracy", "whole_accuracy", "chance", "length_24.accuracy"):
            assert found[-1][name] == pytest.approx(expected[-1][name], abs=0.01)
