"""A run that tunes the state of a finished one: what it trains, how it goes on, and where its state is taken."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import from_pretrained, run_folder
from rwkv_jax.cli import main
from rwkv_jax.cli.flags import TunedFlags, WeightsFlags
from rwkv_jax.config import ConfigError, TrainConfig, TuningConfig
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.training.functions import make_train_functions
from rwkv_jax.training.tuned import first_params
from rwkv_jax.tuning import load_initial_state, save_tuned_state
from rwkv_jax.tuning.adapter import Adapter, AdapterError
from rwkv_jax.tuning.pretrained import digest_of_source
from rwkv_jax.tuning.pretrained_state import open_tuned_state
from rwkv_jax.tuning.state_files import TunedStateError
from tests.evaluation.piqa_file import write_piqa
from tests.small_runs import assert_same_bits
from tests.train.in_process import Run, restore, run


def tuning_of(config: TrainConfig, base: Path, **tuning: Any) -> TrainConfig:
    return dataclasses.replace(
        config,
        initial_weights=str(base),
        data=dataclasses.replace(config.data, tokenizer=str(base)),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0, final_learning_rate=1.0),
        training=dataclasses.replace(config.training, reset_at_documents=False),
        evaluation=dataclasses.replace(config.evaluation, every=8, sample_prompts=("def",)),
        tuning=TuningConfig(state=True, **tuning),
        profile=None,
    )


@pytest.fixture(scope="module")
def tuned(config: TrainConfig, finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    averaged = dataclasses.replace(config, training=dataclasses.replace(config.training, ema_decay=0.5))
    return run(tuning_of(averaged, finished.folder), tmp_path_factory.mktemp("tuned") / "run")


def test_the_state_alone_is_trained_and_kept(tuned: Run, finished: Run) -> None:
    state, base = tuned.result.state, run_folder.load_model(finished.folder, "newest").params
    assert_same_bits({name: part for name, part in state.params.items() if name != "initial_state"}, base)
    kept = restore(tuned.config, tuned.folder)
    assert kept.params.keys() == {"initial_state"}
    moments = next(part.mu for part in kept.opt_state if hasattr(part, "mu"))
    assert jax.tree.structure(moments) == jax.tree.structure({"initial_state": state.params["initial_state"]})
    assert all(np.any(x) for x in jax.tree.leaves(state.params["initial_state"]))
    assert "worse; 3e-4 has helped" in tuned.output  # a rate that is known to destroy models which have learned more


def test_a_run_that_is_resumed_is_the_same_run(tuned: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned.folder, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "8")
    again = run(tuned.config, folder)
    assert "resuming after step 4" in again.output
    assert_same_bits(restore(tuned.config, tuned.folder), restore(tuned.config, folder))


def test_its_folder_is_a_state_for_the_base_and_for_no_other(tuned: Run, finished: Run, tmp_path: Path) -> None:
    model = from_pretrained(finished.folder)
    trained = tuned.result.state.params["initial_state"]
    state = load_initial_state(tuned.folder, model, batch_size=2)
    np.testing.assert_array_equal(state.wkv[0, 1], trained["first_block"]["wkv"])
    np.testing.assert_array_equal(state.wkv[1:, 0], trained["blocks"]["wkv"])
    other = from_pretrained(finished.folder)
    other.head.weight[...] = other.head.weight[...] * 2
    with pytest.raises(TunedStateError, match="was trained with another base"):
        load_initial_state(tuned.folder, other)
    load_initial_state(tuned.folder, other, allow_other_base=True)
    with pytest.raises(TunedStateError, match="is a run that tunes no state"):
        load_initial_state(finished.folder, model)


def test_the_commands_take_its_own_state_for_the_run_itself(tuned: Run, finished: Run) -> None:
    own = TunedFlags().arguments(WeightsFlags(str(tuned.folder)), is_server=True)
    assert own["initial_state"].base_digest is None
    assert not own["allow_other_base"]  # clients' states are of the run's own model
    assert TunedFlags().arguments(WeightsFlags(str(finished.folder))) == {}


def with_other_best(folder: Path, target: Path) -> Path:
    """A copy of a run whose best checkpoint is that of step 4."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / run_folder.BEST, ignore_errors=True)
    shutil.copytree(target / run_folder.CHECKPOINTS / "4", target / run_folder.BEST / "4")
    return target


def test_the_state_is_that_of_the_checkpoint(tuned: Run, tmp_path: Path) -> None:
    folder = with_other_best(tuned.folder, tmp_path / "run")
    found = []
    places: list[tuple[Literal["newest", "best"], bool]] = [("newest", False), ("best", False), ("newest", True)]
    for which, ema in places:
        state = TunedFlags().arguments(WeightsFlags(str(folder), which, ema))["initial_state"]
        params = run_folder.load_model(folder, which, ema=ema).params
        np.testing.assert_array_equal(
            state.tensors["blocks.0.att.time_state"], params["initial_state"]["first_block"]["wkv"]
        )
        found.append(state.tensors["blocks.0.att.time_state"])
    assert all((found[0] != other).any() for other in found[1:])


def test_an_adapter_is_held_against_the_checkpoint(finished: Run, tmp_path: Path) -> None:
    folder = with_other_best(finished.folder, tmp_path / "run")
    best = WeightsFlags(str(folder), "best")
    adapter = Adapter("lora", {}, {}, {"ln_out.weight": np.ones(32)}, digest_of_source(folder, "best"))
    model = from_pretrained(folder)  # whose shapes alone are looked at
    TunedFlags().checked({"a": adapter}, model, best)
    with pytest.raises(AdapterError, match="was trained on another base"):
        TunedFlags().checked({"a": adapter}, model, dataclasses.replace(best, checkpoint="newest"))


def test_a_first_state_of_another_base_is_refused_unless_told(
    config: TrainConfig, finished: Run, tuned: Run, tmp_path: Path
) -> None:
    file = tmp_path / "other.safetensors"
    save_tuned_state(file, tuned.result.state.params["initial_state"], base_digest="0" * 64)
    own = tuning_of(config, finished.folder, initial_state=str(file))
    with pytest.raises(TunedStateError, match=r"tuning.initial_state: was trained with another base"):
        first_params(own, make_train_functions(own))
    own = tuning_of(config, finished.folder, initial_state=str(file), allow_other_base=True)
    first_params(own, make_train_functions(own))


def test_convert_says_that_the_state_is_left_out(
    tuned: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", str(tuned.folder), str(tmp_path / "out.pth")])
    assert f"{tuned.folder}: its tuned state is not in {tmp_path / 'out.pth'}; write it" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_is_evaluated_with_its_state(
    tuned: Run, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--tasks", f"piqa={write_piqa(tmp_path / 'valid.jsonl')}", "--limit", "3", "--tune", "never"]
    folder = tmp_path / "out"
    found = []
    for arguments in (
        [str(tuned.folder), "--output", str(folder)],
        [str(finished.folder), "--state", str(tuned.folder)],
    ):
        capsys.readouterr()
        main(["evaluate", *arguments, *task, "--json"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["model"]["initial_state"] == found[1]["model"]["initial_state"]
    assert found[0]["tasks"][0]["metrics"] == found[1]["tasks"][0]["metrics"]
    with pytest.raises(SystemExit, match="is of another evaluation: model was 'state "):
        main(["evaluate", str(finished.folder), "--output", str(folder), *task])


@pytest.mark.long
def test_an_engine_begins_every_text_with_it(tuned: Run, finished: Run) -> None:
    model, tokenizer = from_pretrained(finished.folder), run_folder.load_run_tokenizer(finished.folder)
    ids = [tokenizer.end_of_text, *tokenizer.encode("def f0")]
    options = EngineOptions(num_slots=2, tune="never")
    with Engine(model, tokenizer, options, initial_state=tuned.folder) as engine:
        (score,) = engine.score(ids[:1], ids[1:])
    state = load_initial_state(tuned.folder, model)
    logits, _ = model(jnp.array([ids]), state)
    expected = jax.nn.log_softmax(logits[0, :-1])[np.arange(len(ids) - 1), np.array(ids[1:])]
    np.testing.assert_allclose(score.logprob, expected.sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"reset_at_documents": True}}, "would begin with zeros, not in the tuned state"),
        ({"training": {"carry_state": True, "reset_at_documents": False}}, "training.carry_state"),
        ({"model": {"generation": "4", "head_dim": 16}}, "no matrix for each head"),
    ],
)
def test_what_cannot_be_tuned_is_refused(config: TrainConfig, changes: Any, message: str) -> None:
    own = tuning_of(config, Path("base"))
    parts = {name: dataclasses.replace(getattr(own, name), **values) for name, values in changes.items()}
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(own, **parts)


@pytest.mark.long
def test_a_state_is_trained_on_from_a_prompt_or_from_a_file(
    config: TrainConfig, finished: Run, tuned: Run, tmp_path: Path
) -> None:
    prompt = "def f0(x):\n    return x"
    model, tokenizer = from_pretrained(finished.folder), run_folder.load_run_tokenizer(finished.folder)
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    _, expected = model(jnp.array([ids]))
    # At a rate of almost zero the state stays what it began with.
    still = tuning_of(config, finished.folder, initial_prompt=prompt, state_rate=1e-9)
    read = load_initial_state(run(still, tmp_path / "prompt").folder, model)
    with pytest.raises(TunedStateError, match=r"ema = True: .* has no averages of its state"):
        open_tuned_state(tmp_path / "prompt", ema=True)
    np.testing.assert_allclose(read.wkv, expected.wkv, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(read.att_shift, expected.att_shift, rtol=1e-4, atol=1e-6)
    with Engine(model, tokenizer, EngineOptions(num_slots=1, tune="never")) as engine:
        session = engine.session()
        session.append(ids)
        session.save(tmp_path / "text.safetensors")
    own = tuning_of(config, finished.folder, initial_state=str(tmp_path / "text.safetensors"), state_rate=1e-9)
    read = load_initial_state(run(own, tmp_path / "text").folder, model)
    np.testing.assert_allclose(read.wkv, expected.wkv, rtol=1e-4, atol=1e-6)
    own = tuning_of(config, finished.folder, initial_state=str(tuned.folder), state_rate=1e-9)
    read = load_initial_state(run(own, tmp_path / "state").folder, model)
    np.testing.assert_allclose(read.wkv, load_initial_state(tuned.folder, model).wkv, rtol=1e-4, atol=1e-6)
