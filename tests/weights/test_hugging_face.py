"""Folders of Llama and Qwen: what is read, how it is placed, and what is refused by name, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference import Engine, SamplingParams
from rwkv_jax.inference.engine.engine import EngineOptions
from rwkv_jax.models.packed import Int8Matrix
from rwkv_jax.weights import pretrained
from rwkv_jax.weights.hugging_face import MAX_CONTEXT, hub_ends, read_hub_config
from rwkv_jax.weights.official import named_tensors
from rwkv_jax.weights.pretrained import check_initial_weights, convert, find_tokenizer, initial_params
from rwkv_jax.weights.sources import find_weights, open_weights
from rwkv_jax.weights.tensors import BFLOAT16, WeightsError
from tests.golden import GOLDEN_DIR
from tests.models.parameters import random_params
from tests.small_runs import assert_same_bits
from tests.weights.hub_folders import LLAMA3, QWEN3, hub_names, write_hub_folder


def params_of(model: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("max_bytes", [None, 20_000])
@pytest.mark.parametrize("fields", [QWEN3, LLAMA3], ids=["qwen3", "llama3"])
def test_every_number_is_the_files(tmp_path: Path, fields: dict[str, Any], max_bytes: int | None, dtype: Any) -> None:
    theirs = write_hub_folder(tmp_path, fields, dtype=dtype, max_bytes=max_bytes)
    found = find_weights(tmp_path)
    assert found.name == ("model.safetensors" if max_bytes is None else "model.safetensors.index.json")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_bytes is not None)
    model = from_pretrained(tmp_path)
    names = hub_names(model.config)
    ours = named_tensors(model.config, params_of(model))
    assert {names[name] for name in ours} == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == dtype
        np.testing.assert_array_equal(x.view(np.uint8), theirs[names[name]].view(np.uint8), err_msg=name)
    assert model.config.dtype == ("float32" if dtype is np.float32 else "bfloat16")


def test_what_the_configs_say(tmp_path: Path) -> None:
    configs = {}
    for name, fields in (("qwen3", QWEN3), ("llama3", LLAMA3)):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        configs[name] = read_hub_config(tmp_path / "config.json")
    common: dict[str, Any] = {"architecture": "llama", "vocab_size": 300, "ffn_width": 40, "kv_heads": 2}
    assert configs["qwen3"] == ModelConfig(
        num_layers=2,
        width=24,
        head_dim=8,
        attention_heads=4,
        context_length=64,
        rotary_base=1e6,
        norm_epsilon=1e-6,
        qk_norm=True,
        tied_head=True,
        **common,
    )
    assert configs["llama3"] == ModelConfig(
        num_layers=3,
        width=32,
        head_dim=8,
        attention_heads=4,
        context_length=MAX_CONTEXT,
        rotary_base=5e5,
        rotary_scaling=(8, 1, 4, 64),
        norm_epsilon=1e-5,
        **common,
    )
    newer = {name: x for name, x in LLAMA3.items() if not name.startswith("rope")}
    newer["rope_parameters"] = LLAMA3["rope_scaling"] | {"rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    assert read_hub_config(tmp_path / "config.json") == configs["llama3"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mistral"}, "model_type = 'mistral': only llama, qwen2, qwen3 are read under these names"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn': only default and llama3"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic': only default and llama3"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope': only default and llama3"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only whole heads are rotated"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None: must be a positive number"),
    ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = True: is not computed"),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types has sliding_attention: only full_attention",
    ),
    ({"attention_bias": True, "mlp_bias": True}, "attention_bias = True: is not computed; mlp_bias = True: is not"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only silu is computed"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set: only unquantized files are read"),
    ({"num_attention_heads": "4"}, "num_attention_heads = '4': must be a positive whole number"),
    ({"hidden_size": None}, "hidden_size = None: must be a positive whole number"),
    ({"head_dim": None, "num_attention_heads": 5}, "num_attention_heads does not divide hidden_size, and there is no"),
    ({"num_key_value_heads": 3}, "describes a model that cannot be: model.kv_heads = 3: must divide the 4 heads"),
    ({"num_hidden_layers": 1}, "describes a model that cannot be: model.num_layers = 1"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda x: None if isinstance(x, dict) else x[:24])
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_hub_folder(tmp_path, QWEN3)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | change))
    with pytest.raises(WeightsError, match=re.escape(message)) as raised:
        from_pretrained(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))


def test_a_folder_without_its_config_is_refused(tmp_path: Path) -> None:
    write_hub_folder(tmp_path, QWEN3)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="its JSON is no object"):
        open_weights(find_weights(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"these tensors do not tell heads and positions, so put the config\.json"):
        open_weights(find_weights(tmp_path))


def test_all_wrong_tensors_are_listed(tmp_path: Path) -> None:
    layer = "model.layers.1."
    change = {
        f"{layer}self_attn.q_norm.weight": None,
        f"{layer}mlp.up_proj.weight": np.zeros((41, 24), np.float32),
        f"{layer}self_attn.q_proj.bias": np.zeros(32, np.float32),
    }
    write_hub_folder(tmp_path, QWEN3, change=change)
    with pytest.raises(WeightsError, match="these are not the tensors of a Llama model of 2 layers") as raised:
        from_pretrained(tmp_path)
    for line in (
        r"missing      blocks\.1\.att\.ln_query\.weight \[8\]",
        r"not expected blocks\.1\.att\.query\.bias \[32\]",
        r"misshapen    blocks\.1\.ffn\.key\.weight is \[41, 24\], must be \[40, 24\]",
    ):
        assert re.search(line, str(raised.value))


def test_a_copy_of_a_tied_head_and_old_frequencies_are_left_out(tmp_path: Path) -> None:
    change = {
        "lm_head.weight": np.zeros((300, 24), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    write_hub_folder(tmp_path, QWEN3, change=change)
    model = from_pretrained(tmp_path)
    assert model.head_weight is model.emb.weight[...] or np.array_equal(model.head_weight, model.emb.weight[...])
    write_hub_folder(tmp_path / "untied", QWEN3 | {"tie_word_embeddings": False}, change={"lm_head.weight": None})
    with pytest.raises(WeightsError, match=r"missing      head\.weight \[300, 24\]"):
        from_pretrained(tmp_path / "untied")


def test_options(tmp_path: Path) -> None:
    write_hub_folder(tmp_path, QWEN3, dtype=BFLOAT16)
    model = from_pretrained(tmp_path, dtype="float32", context_length=17)
    assert (model.config.dtype, model.config.context_length) == ("float32", 17)
    packed = from_pretrained(tmp_path, quantize="int8", context_length=17)
    assert isinstance(packed.emb.weight[...], Int8Matrix)
    tokens = np.arange(10)[None]
    both = [nnx.jit(lambda model, tokens: model(tokens)[0])(each, tokens) for each in (model, packed)]
    assert 0 < np.abs(both[0] - both[1]).max() < 0.1
    with pytest.raises(WeightsError, match="only RWKV's weights have official names; a Llama stays"):
        save_pretrained(model, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="only RWKV's weights have official names; a Llama stays"):
        convert(tmp_path, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="context_length = 17: RWKV-7 has no such size"):
        ModelConfig(context_length=17)


def test_a_run_of_a_llama_is_packed_as_a_folder_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are Transformers and hybrids, but no models with convolutions."""
    write_hub_folder(tmp_path / "hub", QWEN3)
    llama = from_pretrained(tmp_path / "hub")
    expected = from_pretrained(tmp_path / "hub", quantize="int8")

    def packed_run(config: ModelConfig, params: Any) -> Any:
        run = SimpleNamespace(config=SimpleNamespace(model=config), params=params)
        monkeypatch.setattr(pretrained, "load_run", lambda *arguments: run)
        monkeypatch.setattr(pretrained, "find_weights", lambda source, **pins: tmp_path)
        return pretrained.from_pretrained("run", quantize="int8")

    found = packed_run(llama.config, params_of(llama))
    assert_same_bits(params_of(found), params_of(expected))

    sizes: Any = {"vocab_size": 40, "num_layers": 4, "width": 32, "head_dim": 8}
    hybrid = ModelConfig(architecture="transformer", rwkv_layers=(1, 3), **sizes)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_params(hybrid))
    value = packed_run(hybrid, params).blocks_3_3.att.value.weight[...]
    whole = params["blocks_3_3"]["att"]["value"]["weight"]
    np.testing.assert_allclose(value.dequantized(), whole, rtol=0, atol=np.abs(whole).max() / 200)
    with pytest.raises(WeightsError, match=r"is a run of .*, whose matrices are not packed"):
        packed_run(ModelConfig(architecture="mamba2", **sizes), {})


def test_ends_of_texts(tmp_path: Path) -> None:
    assert hub_ends(tmp_path) is None
    for fields, ends in ((QWEN3, {256}), (LLAMA3, set()), (LLAMA3 | {"eos_token_id": [1, 2]}, {1, 2})):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert hub_ends(tmp_path) == ends
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert hub_ends(tmp_path) == {7, 8}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(WeightsError, match="eos_token_id = 'x': must be whole numbers"):
        hub_ends(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "rwkv7", "eos_token_id": 0}')
    assert hub_ends(tmp_path) is None


def test_runs_begin_with_them(tmp_path: Path) -> None:
    write_hub_folder(tmp_path, LLAMA3 | {"vocab_size": 257}, dtype=BFLOAT16)
    config = read_hub_config(tmp_path / "config.json")
    run = TrainConfig(
        model=config,
        initial_weights=str(tmp_path),
        data=DataConfig(tokenizer="bytes"),
        training=StepConfig(sequence_length=32),
    )
    check_initial_weights(tmp_path, run.model, ByteTokenizer(257))
    params = initial_params(tmp_path, run.model)
    model = from_pretrained(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, params, params_of(model))
    with pytest.raises(WeightsError, match=r"these weights are of another model: .*to start from them: ") as raised:
        check_initial_weights(
            tmp_path, ModelConfig(vocab_size=257, num_layers=3, width=32, head_dim=8), ByteTokenizer()
        )
    for flag in ("architecture llama", "kv-heads 2", "rotary-base 500000.0", "rotary-scaling 8.0 1.0 4.0 64.0"):
        assert f"--model.{flag}" in str(raised.value)
    assert "None there" not in str(raised.value)  # RWKV-7's own sizes are no longer asked for


@pytest.mark.parametrize("case", ["qwen3", "llama3"])
def test_texts_are_those_of_transformers(case: str) -> None:
    """Of folders that it has saved, begun and ended as their files say (tests/golden/llama/README.md)."""
    folder = GOLDEN_DIR / "llama" / case
    model = from_pretrained(folder, dtype="float32")
    tokenizer = find_tokenizer(find_weights(folder), model.config.vocab_size)
    assert tokenizer is not None
    with Engine(model, tokenizer, EngineOptions(num_slots=1)) as engine:
        for prompt, expected in json.loads((folder / "greedy.json").read_text()).items():
            assert engine.encode(prompt, begins=True) == expected["prompt_ids"]
            completion = engine.generate(prompt, max_tokens=32, sampling=SamplingParams.greedy())
            ids = [*completion.ids, *([completion.stop] if completion.stop is not None else [])]
            assert ids == expected["ids"]
            assert completion.text == expected["text"]
