"""Runs that learn from a teacher: what they keep, change, resume from and refuse."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax import run_folder
from rwkv_jax.config import ConfigError, DistillationConfig, ModelConfig, ParallelConfig, StepConfig, TrainConfig
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.run_model import TEACHER
from rwkv_jax.training.teacher import check_rows
from rwkv_jax.weights.pretrained import convert, from_pretrained
from rwkv_jax.weights.tensors import WeightsError
from tests.small_runs import assert_same_bits
from tests.train.in_process import Run, other_tokenizer, restore, run


@pytest.fixture(scope="module")
def own(config: TrainConfig, finished: Run) -> TrainConfig:
    """A narrower student of a run."""
    return distilled(config, finished, DistillationConfig(str(finished.folder), temperature=2.0, ce_weight=0.1))


def distilled(config: TrainConfig, finished: Run, distillation: DistillationConfig, **model: Any) -> TrainConfig:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **{"width": 16, "head_dim": 8, **model}),
        data=dataclasses.replace(config.data, tokenizer=str(finished.folder)),
        training=dataclasses.replace(config.training, objective="distill"),
        distillation=distillation,
        profile=None,
    )


@pytest.fixture(scope="module")
def whole(own: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(own, tmp_path_factory.mktemp("distilled") / "run")


def test_the_teacher_stays_and_is_in_no_checkpoint(whole: Run, own: TrainConfig, finished: Run) -> None:
    params = whole.result.state.params
    assert_same_bits(params[TEACHER], finished.result.state.params)
    kept = restore(own, whole.folder)
    assert kept.params.keys() == params.keys() - {TEACHER}
    assert TEACHER not in str(whole.result.state.opt_state)
    assert f"teacher, frozen: {finished.folder}, RWKV-7 2 x 32" in whole.output
    model = from_pretrained(whole.folder)
    assert model.config.width == 16
    records = read_metrics(whole.folder / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    assert steps[-1]["kl"] < steps[0]["kl"]
    for record in steps:
        assert record["minimized"] == pytest.approx(4 * record["kl"] + 0.1 * record["loss"], rel=1e-5)
        assert 0 <= record["agreement"] <= 1
    evaluated = [record for record in records if record["kind"] == "evaluation"]
    assert evaluated[-1]["bits_per_byte"] > 0  # the student's cross-entropy, as in any run


def test_a_run_goes_on_with_the_same_bits(whole: Run, own: TrainConfig, tmp_path: Path) -> None:
    run(dataclasses.replace(own, training=dataclasses.replace(own.training, num_steps=4)), tmp_path / "run")
    assert_same_bits(run(own, tmp_path / "run").result.state, whole.result.state)


def test_another_teacher_is_refused_wherever_it_lies(
    whole: Run, own: TrainConfig, finished: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    convert(finished.folder, tmp_path / "rounded.safetensors", dtype="bfloat16")
    other = dataclasses.replace(own.distillation, teacher=str(tmp_path / "rounded.safetensors"))
    pattern = r"holds another run.*\n.*\n *distillation.teacher +[0-9a-f]{64} +[0-9a-f]{64}$"
    with pytest.raises(ConfigError, match=pattern):
        run(dataclasses.replace(own, distillation=other), folder)
    convert(finished.folder, tmp_path / "moved.pth")
    same = dataclasses.replace(own.distillation, teacher=str(tmp_path / "moved.pth"))
    training = dataclasses.replace(own.training, num_steps=9)
    assert int(run(dataclasses.replace(own, distillation=same, training=training), folder).result.state.step) == 9


def test_teachers_that_cannot_teach_are_refused_by_name(config: TrainConfig, finished: Run, tmp_path: Path) -> None:
    there = DistillationConfig(str(finished.folder))
    own = distilled(config, finished, there)
    with pytest.raises(ConfigError, match=r"distillation.teacher = None: training.objective = 'distill' learns from"):
        distilled(config, finished, DistillationConfig())
    with pytest.raises(ConfigError, match=r"distillation.teacher = .*training.objective = 'next_token' does not read"):
        dataclasses.replace(own, training=config.training)
    data, model = dataclasses.replace(own.data, tokenizer="bytes"), dataclasses.replace(own.model, vocab_size=257)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 300, and the run one of 257.*take the teacher's"):
        run(dataclasses.replace(own, data=data, model=model), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"was trained with the tokenizer that lies beside it.*--data.tokenizer"):
        run(other_tokenizer(own, tmp_path), tmp_path / "run")
    with pytest.raises(WeightsError, match="no such"):
        run(distilled(config, finished, DistillationConfig(str(tmp_path / "nothing.pth"))), tmp_path / "run")
    assert not (tmp_path / "run" / run_folder.RUN_FILE).exists()


def test_a_transformer_teaches_rows_of_its_length_alone() -> None:
    """It is refused what its own run would be refused."""
    teacher = ModelConfig(architecture="transformer", vocab_size=300, num_layers=2, width=32, head_dim=16)
    own = dataclasses.replace(teacher, architecture="rwkv")
    check_rows(teacher, TrainConfig(model=own))
    longer = StepConfig(sequence_length=4096)
    with pytest.raises(ConfigError, match=r"cannot read the run's rows: training.sequence_length = 4096.*2048"):
        check_rows(teacher, TrainConfig(model=own, training=longer))
    with pytest.raises(ConfigError, match=r"cannot read the run's rows: training.carry_state = True: a Transformer's"):
        check_rows(teacher, TrainConfig(model=own, training=StepConfig(carry_state=True)))
    with pytest.raises(ConfigError, match=r"cannot read the run's rows: parallel.sequence = 2"):
        check_rows(teacher, TrainConfig(model=own, parallel=ParallelConfig(sequence=2)))
    padded = dataclasses.replace(own, vocab_size=320)
    with pytest.raises(ConfigError, match=r"parallel.tensor = 2: the teacher's vocabulary has 300 rows and .* = 320"):
        check_rows(teacher, TrainConfig(model=padded, parallel=ParallelConfig(tensor=2)))
