"""Runs that learn from a teacher: what they keep, change, resume from and refuse."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from rwkv_jax import run_folder
from rwkv_jax.config import ConfigError, DistillationConfig, ModelConfig, ParallelConfig, StepConfig, TrainConfig
from rwkv_jax.training import stored_teacher
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.distillation_loss import top_k_of
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.run_model import TEACHER
from rwkv_jax.training.teacher import check_rows, read_teacher, teacher_digest
from rwkv_jax.weights.pretrained import convert, from_pretrained
from rwkv_jax.weights.tensors import WeightsError
from tests.small_runs import assert_same_bits, names_in
from tests.train.in_process import Run, content, other_tokenizer, restore, run
from tests.weights.hub_folders import QWEN3, write_hub_folder


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


@pytest.mark.long  # as every run does, tests/test_resume.py
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


def test_a_teacher_is_known_by_what_its_tensors_do_not_tell(tmp_path: Path) -> None:
    """Rotation and epsilon of a config.json; its room does not matter."""

    def digest(name: str, **fields: Any) -> str | None:
        write_hub_folder(tmp_path / name, QWEN3 | fields)
        return teacher_digest(
            TrainConfig(training=StepConfig(objective="distill"), distillation=DistillationConfig(str(tmp_path / name)))
        )

    digests = [digest("one"), digest("two", rope_theta=1e4), digest("three", rms_norm_eps=1e-5)]
    assert len(set(digests)) == 3
    assert digest("four", max_position_embeddings=128) == digests[0]


def test_a_teacher_of_the_hub_reads_rows_as_long_as_its_config_allows(tmp_path: Path) -> None:
    """Longer than inference has room for; but no longer."""
    write_hub_folder(tmp_path / "qwen", QWEN3 | {"max_position_embeddings": 32768})

    def read(length: int) -> Any:
        return read_teacher(
            TrainConfig(
                model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16),
                training=StepConfig(objective="distill", sequence_length=length),
                distillation=DistillationConfig(str(tmp_path / "qwen")),
            )
        )

    assert [read(length).config.context_length for length in (512, 8192, 32768)] == [4096, 8192, 32768]
    with pytest.raises(ConfigError, match=r"cannot read the run's rows: training.sequence_length = 32769.*32768"):
        read(32769)


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


@pytest.fixture(scope="module")
def storing(config: TrainConfig, finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that stores all of its teacher's tokens, three steps a file."""
    folder = tmp_path_factory.mktemp("storing")
    settings = DistillationConfig(str(finished.folder), temperature=2.0, top_k=300, stored=str(folder / "stored"))
    own = distilled(config, finished, settings)
    with mock.patch.object(stored_teacher, "_FILE_BYTES", 3 * 4 * 32 * (300 * 6 + 2)):
        return run(own, folder / "run")


def stored_in(storing: Run) -> Path:
    return Path(str(storing.config.distillation.stored))


def test_a_run_learns_from_what_is_stored_without_the_teacher(storing: Run, tmp_path: Path) -> None:
    assert names_in(stored_in(storing)) == ["00000000.npy", "00000001.npy", "00000002.npy", "teacher.json"]
    assert "the 300 most likely tokens of" in storing.output
    config, settings = storing.config, storing.config.distillation
    without = run(
        dataclasses.replace(config, distillation=dataclasses.replace(settings, teacher=None)), tmp_path / "run"
    )
    assert TEACHER not in without.result.state.params
    assert_same_bits(without.result.state, storing.result.state)
    # As from the teacher itself, but for the rounding of what is stored.
    present = dataclasses.replace(settings, stored=None, top_k=None)
    taught = run(dataclasses.replace(config, distillation=present), tmp_path / "taught")
    first, second = (
        [record["kl"] for record in read_metrics(each.folder / "metrics.jsonl") if record["kind"] == "train"]
        for each in (without, taught)
    )
    np.testing.assert_allclose(first, second, rtol=1e-3)


def test_what_is_stored_is_computed_in_the_micro_batches_of_a_step(storing: Run, finished: Run) -> None:
    config = storing.config
    teacher = read_teacher(
        dataclasses.replace(config, distillation=dataclasses.replace(config.distillation, stored=None))
    )
    assert teacher is not None
    tokens = np.random.default_rng(3).integers(0, 300, (4, 33)).astype(np.int32)
    batch, rows = make_batch(tokens, end_of_text=0), []

    def watched(scores: Any, *arguments: Any) -> Any:
        rows.append(len(scores))
        return top_k_of(scores, *arguments)

    def found(steps: int) -> Any:
        own = dataclasses.replace(config, training=dataclasses.replace(config.training, accumulation_steps=steps))
        predict = functools.partial(stored_teacher.predictions, own, teacher)
        return jax.jit(predict)(finished.result.state.params, batch)

    with mock.patch.object(stored_teacher, "top_k_of", watched):
        ids, log_p = found(2)
        assert set(rows) == {2 * 32}
        whole_ids, whole = found(1)
    assert np.mean(ids[..., 0] == whole_ids[..., 0]) > 0.98
    np.testing.assert_allclose(log_p[..., 0], whole[..., 0], rtol=2e-3)


def test_what_is_missing_is_computed_again_and_nothing_else(storing: Run, tmp_path: Path) -> None:
    """As after a kill: a file is either whole or not there."""
    folder = Path(shutil.copytree(stored_in(storing), tmp_path / "stored"))
    before = content(folder)
    kept = (folder / "00000000.npy").stat().st_mtime_ns
    (folder / "00000001.npy").unlink()
    settings = dataclasses.replace(storing.config.distillation, stored=str(folder))
    config = dataclasses.replace(storing.config, distillation=settings)
    alone = dataclasses.replace(config, distillation=dataclasses.replace(settings, teacher=None))
    with pytest.raises(ConfigError, match=r"00000001.npy: is missing.*; name the teacher, too"):
        run(alone, tmp_path / "run")
    shorter = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=5))
    assert "computing 1 files" in run(shorter, tmp_path / "run").output
    assert content(folder) == before
    assert (folder / "00000000.npy").stat().st_mtime_ns == kept
    (folder / "00000001.npy").write_bytes(before["00000001.npy"][:-5000])
    with pytest.raises(ConfigError, match=r"00000001.npy: cannot be read .*; delete it"):
        run(alone, tmp_path / "other")


def test_predictions_for_other_rows_or_of_another_teacher_are_refused(
    storing: Run, finished: Run, tmp_path: Path
) -> None:
    config, settings = storing.config, storing.config.distillation

    def refused(field: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=rf"holds predictions for another run.*(\n.*)*\n *{field} "):
            run(dataclasses.replace(config, **changes), tmp_path / "run")

    refused("distillation.temperature", distillation=dataclasses.replace(settings, temperature=1.0))
    refused("seed", seed=1)
    refused("model.dtype", model=dataclasses.replace(config.model, dtype="bfloat16"))
    refused("training.sequence_length", training=dataclasses.replace(config.training, sequence_length=16))
    convert(finished.folder, tmp_path / "rounded.safetensors", dtype="bfloat16")
    other = dataclasses.replace(settings, teacher=str(tmp_path / "rounded.safetensors"))
    refused("distillation.teacher", distillation=other)
    nothing = dataclasses.replace(settings, teacher=None, stored=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"distillation.stored = .*holds no predictions .*; name the teacher, too"):
        run(dataclasses.replace(config, distillation=nothing), tmp_path / "run")
    folder = Path(shutil.copytree(storing.folder, tmp_path / "begun"))
    before = names_in(folder)
    colder = dataclasses.replace(config, distillation=dataclasses.replace(settings, temperature=1.0))
    with pytest.raises(ConfigError, match="holds predictions for another run"):
        run(colder, folder, restart=True)
    assert names_in(folder) == before  # nothing was set aside
    whole = dataclasses.replace(settings, top_k=None)
    with pytest.raises(ConfigError, match=r"distillation.top_k = None: a whole distribution of each token is not"):
        dataclasses.replace(config, distillation=whole)
    carried = dataclasses.replace(config.training, carry_state=True)
    with pytest.raises(ConfigError, match=r"training.carry_state = True: rows that go on have all text before them"):
        dataclasses.replace(config, training=carried)
