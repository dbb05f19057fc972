"""Runs that train adapters: what they change, keep, resume from and are loaded as."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import run_folder, tuning
from rwkv_jax.config import ConfigError, TrainConfig, TuningConfig
from rwkv_jax.models.tuned import ADAPTER
from rwkv_jax.training.functions import initial_state, make_train_functions
from rwkv_jax.training.partition import split_params
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.tuned import first_params
from rwkv_jax.weights.pretrained import convert, from_pretrained
from rwkv_jax.weights.tensors import WeightsError
from tests.small_runs import assert_same_bits
from tests.train.in_process import Run, restore, run


@pytest.fixture(scope="module")
def base(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    convert(finished.folder, path)
    return path


@pytest.fixture(scope="module")
def lora(config: TrainConfig, base: Path, finished: Run) -> TrainConfig:
    """LoRA with dropout on some matrices of one layer, and the norms."""
    return tuned(config, base, finished, TuningConfig("lora", 4, 8.0, 0.1, ("att.key", "ffn.*"), (1,), ("ln",)))


def tuned(config: TrainConfig, base: Path, finished: Run, own: TuningConfig) -> TrainConfig:
    data = dataclasses.replace(config.data, tokenizer=str(finished.folder))
    return dataclasses.replace(config, initial_weights=str(base), data=data, tuning=own, profile=None)


@pytest.fixture(scope="module")
def whole(lora: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(lora, tmp_path_factory.mktemp("tuned") / "run")


def test_only_what_is_trained_changes_and_is_kept(whole: Run, lora: TrainConfig, finished: Run) -> None:
    functions = make_train_functions(lora)
    state, before = whole.result.state, finished.result.state.params
    trained, frozen = split_params(state.params, functions.partition)
    assert_same_bits(frozen, split_params(before, functions.partition)[1])
    assert not np.array_equal(trained["ln_out"]["weight"], before["ln_out"]["weight"])
    low = trained[ADAPTER]["blocks"]["ffn"]["key"]["lora_B"]
    assert float(abs(low[0]).max()) > 0  # layer 1, the first of the stack
    moments = state.opt_state[1].mu
    assert jax.tree.structure(moments) == jax.tree.structure(trained)
    kept = restore(lora, whole.folder).params
    assert kept.keys() == {ADAPTER, "first_block", "blocks", "ln_out"}
    assert_same_bits(kept, functions.kept(state).params)
    size = sum(path.stat().st_size for path in (whole.folder / "checkpoints").rglob("*") if path.is_file())
    of_base = sum(path.stat().st_size for path in (finished.folder / "checkpoints").rglob("*") if path.is_file())
    assert size < of_base


def test_a_run_is_loaded_as_its_base_with_the_adapter(whole: Run, lora: TrainConfig) -> None:
    tokens, functions = jnp.arange(20)[None], make_train_functions(lora)
    logits = from_pretrained(whole.folder)(tokens).logits
    unmerged = functions.run_model.model(whole.result.state.params)(tokens).logits
    np.testing.assert_allclose(logits, unmerged, atol=1e-5)
    with_adapter = tuning.from_pretrained(lora.initial_weights or "", adapter=whole.folder)
    np.testing.assert_allclose(with_adapter(tokens).logits, logits, atol=1e-5)
    assert float(abs(logits - from_pretrained(lora.initial_weights or "")(tokens).logits).max()) > 1e-4


def test_a_run_goes_on_with_the_same_bits(whole: Run, lora: TrainConfig, tmp_path: Path) -> None:
    training = dataclasses.replace(lora.training, num_steps=4)
    run(dataclasses.replace(lora, training=training), tmp_path / "run")
    assert_same_bits(run(lora, tmp_path / "run").result.state, whole.result.state)


def test_another_base_is_refused_unless_allowed(whole: Run, lora: TrainConfig, finished: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    other = dataclasses.replace(lora, initial_weights=str(tmp_path / "other.safetensors"))
    assert other.initial_weights is not None
    convert(finished.folder, other.initial_weights, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"holds another run.*\n.*\n *tuning.base +[0-9a-f]{64} +[0-9a-f]{64}$"):
        run(other, folder)
    training = dataclasses.replace(other.training, num_steps=9)
    allowing = dataclasses.replace(other.tuning, allow_other_base=True)
    run(dataclasses.replace(other, tuning=allowing, training=training), folder)
    identity = json.loads((folder / run_folder.RUN_FILE).read_text())["identity"]
    assert identity["tuning.base"] != whole_identity(whole)["tuning.base"]
    fewer = dataclasses.replace(lora.tuning, targets=("att.key",))
    with pytest.raises(ConfigError, match=r"tuning.targets +att.key ffn.\* +att.key\n?$"):
        run(dataclasses.replace(lora, tuning=fewer), Path(shutil.copytree(whole.folder, tmp_path / "fewer")))


def whole_identity(whole: Run) -> dict[str, Any]:
    return run_folder.read_run_file(whole.folder)["identity"]


def test_a_run_whose_base_is_gone_or_another_is_not_loaded(whole: Run, finished: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    convert(finished.folder, tmp_path / "other.safetensors", dtype="bfloat16")
    for base, message in (("gone.pth", "whose base cannot be read: "), ("other.safetensors", "was trained on another")):
        content = json.loads((whole.folder / run_folder.RUN_FILE).read_text())
        content["config"]["initial_weights"] = str(tmp_path / base)
        del content["digest"]
        (folder / run_folder.RUN_FILE).write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=message):
            from_pretrained(folder)


@pytest.mark.parametrize("kind", ["lora", "miss"])
def test_the_first_logits_are_the_bits_of_the_base(kind: Any, config: TrainConfig, base: Path, finished: Run) -> None:
    first = tuned(config, base, finished, TuningConfig(kind, rank=4))
    functions = make_train_functions(first)
    params = first_params(first, functions)
    tokens = jnp.arange(20)[None]
    plain = {name: part for name, part in params.items() if name != ADAPTER}
    forward = jax.jit(lambda params: functions.run_model.model(params)(tokens).logits)
    of_base = make_train_functions(config).run_model
    np.testing.assert_array_equal(forward(params), jax.jit(lambda params: of_base.model(params)(tokens).logits)(plain))
    state = initial_state(functions, 0, params)
    assert state.params is params


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        TuningConfig("dora", rank=4, quantize="int4"),
        TuningConfig("pissa", rank=4, quantize="int8"),
        TuningConfig("bat", rank=8, quantize="bfloat16"),
        TuningConfig("rslora", rank=4, quantize="int8"),
        TuningConfig(also=("time",)),
    ],
    ids=["dora", "pissa", "bat", "rslora in bfloat16", "time"],
)
def test_every_kind_goes_on_and_is_loaded(
    kind: TuningConfig, config: TrainConfig, base: Path, finished: Run, tmp_path: Path
) -> None:
    own = tuned(config, base, finished, kind)
    bound = 1e-5
    if kind.adapter == "rslora":
        own, bound = dataclasses.replace(own, model=dataclasses.replace(own.model, dtype="bfloat16")), 0.05
    whole = run(own, tmp_path / "whole")
    run(dataclasses.replace(own, training=dataclasses.replace(own.training, num_steps=4)), tmp_path / "run")
    assert_same_bits(run(own, tmp_path / "run").result.state, whole.result.state)
    tokens = jnp.arange(20)[None]
    unmerged = make_train_functions(own).run_model.model(whole.result.state.params)(tokens).logits
    np.testing.assert_allclose(from_pretrained(tmp_path / "run")(tokens).logits, unmerged, atol=bound)


@pytest.mark.long
def test_tasks_carried_states_and_micro_batches(config: TrainConfig, base: Path, finished: Run, tmp_path: Path) -> None:
    """All of them in one run, which goes on with the same bits."""
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    x"}) for i in range(5)))
    tasks = (f"lambada={tmp_path / 'words.jsonl'}",)
    own = tuned(config, base, finished, TuningConfig("lora", rank=4, dropout=0.2))
    own = dataclasses.replace(
        own,
        training=dataclasses.replace(own.training, carry_state=True, accumulation_steps=2),
        evaluation=dataclasses.replace(own.evaluation, tasks=tasks, task_every=4),
    )
    whole = run(own, tmp_path / "whole")
    run(dataclasses.replace(own, training=dataclasses.replace(own.training, num_steps=4)), tmp_path / "run")
    assert_same_bits(run(own, tmp_path / "run").result.state, whole.result.state)
    found = [each for each in read_metrics(whole.folder / "metrics.jsonl") if each["kind"] == "task"]
    assert [each["step"] for each in found] == [4, 8]
    assert found[0]["lambada.perplexity"] != found[1]["lambada.perplexity"]
