"""Flags of sampling: presets, and what differs from them; flags of tuned states and adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from rwkv_jax.cli.flags import SamplingFlags, TunedFlags, WeightsFlags, _named, tokenizer_for
from rwkv_jax.config import ConfigError
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.tuning.adapter import Adapter, AdapterError
from rwkv_jax.tuning.pretrained_state import base_digest
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.official import official_tensors
from rwkv_jax.weights.pretrained import from_pretrained
from rwkv_jax.weights.safetensors import write_safetensors
from rwkv_jax.weights.sources import find_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.golden import GOLDEN_DIR
from tests.inference.models import CONFIGS, random_model


def test_presets() -> None:
    assert SamplingFlags().sampling() == SamplingParams(temperature=0.8, top_p=0.9)
    assert SamplingFlags("openai").sampling() == SamplingParams.openai()
    assert SamplingFlags("rwkv").sampling() == SamplingParams.rwkv()


def test_flags_override_a_preset() -> None:
    flags = SamplingFlags("rwkv", temperature=0.5, top_p=1, presence_penalty=0, penalize_prompt=True)
    expected = SamplingParams.rwkv(temperature=0.5, top_p=1, presence_penalty=0, penalize_prompt=True)
    assert flags.sampling() == expected
    assert SamplingFlags(temperature=0).sampling() == SamplingParams(temperature=0, top_p=0.9)


def test_every_flag_is_a_setting() -> None:
    settings = {field.name for field in dataclasses.fields(SamplingParams)}
    flags = {field.name for field in dataclasses.fields(SamplingFlags)} - {"preset"}
    assert flags == settings - {"order", "logit_bias", "banned"}


def test_values_that_cannot_work_are_named() -> None:
    with pytest.raises(ConfigError, match="typical_p = 0"):
        SamplingFlags(typical_p=0).sampling()


def test_a_named_tokenizer_begins_and_ends_texts_as_the_model_does() -> None:
    folder = GOLDEN_DIR / "llama" / "llama3"
    for named in (None, str(folder), str(folder / "tokenizer.json")):
        tokenizer, _ = tokenizer_for(find_weights(folder), named)
        assert tokenizer is not None
        assert (tokenizer.begin, tokenizer.ends) == ((276,), {277})


def test_a_tuned_state_is_opened_before_weights_are(tmp_path: Path) -> None:
    assert TunedFlags().arguments(WeightsFlags(str(tmp_path))) == {}
    with pytest.raises(ConfigError, match="there is no such file"):
        TunedFlags(tmp_path / "none.pth").arguments(WeightsFlags("weights.pth"))
    with pytest.raises(ConfigError, match="is for a tuned state or an adapter; name one with"):
        TunedFlags(allow_other_base=True).arguments(WeightsFlags("weights.pth"))


def test_a_path_of_an_adapter_may_have_the_sign_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _named("lr=1e-3") == ("lr", "1e-3")
    assert _named("runs/lr=1e-3") == ("lr=1e-3", "runs/lr=1e-3")
    assert _named("a=runs/lr=1e-3/run") == ("a", "runs/lr=1e-3/run")
    Path("lr=1e-3").mkdir()
    assert _named("lr=1e-3") == ("lr=1e-3", "lr=1e-3")


def test_adapters_are_held_against_the_source_and_not_its_rounded_numbers(tmp_path: Path) -> None:
    model = random_model(CONFIGS["7"])
    tensors = official_tensors(model.config, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    write_safetensors(tmp_path / "base.safetensors", tensors)
    parts = {"blocks.0.att.key": {"lora_A": np.ones((1, 16), np.float32), "lora_B": np.ones((16, 1), np.float32)}}
    own = Adapter("lora", parts, {"blocks.0.att.key": 1.0}, base_digest=weights_digest(tensors))
    rounded = from_pretrained(tmp_path / "base.safetensors", quantize="int8")
    with pytest.raises(WeightsError, match=r"matrices are packed, .*allow_other_base"):
        base_digest(rounded)
    checked = TunedFlags().checked({"a": own}, rounded, WeightsFlags(str(tmp_path / "base.safetensors")))
    assert checked["a"].base_digest is None
    assert checked["a"].digest == own.digest
    other = dataclasses.replace(own, base_digest="1" * 64)
    with pytest.raises(AdapterError, match="base_digest = 1111"):
        TunedFlags().checked({"a": other}, rounded, WeightsFlags(str(tmp_path / "base.safetensors")))
