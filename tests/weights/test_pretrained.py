"""Models from files and files from models: every format, every generation, bit for bit; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rwkv_jax
from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from rwkv_jax.models import model_type
from rwkv_jax.weights.layouts import to_layout
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.tensors import UnsafeFileError, WeightsError
from tests.golden import load_tiny, tiny_model
from tests.weights import forged
from tests.weights.files import CONFIGS, assert_same_bits, computed_in, logits_of, random_tensors, tensors_in

each_generation = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def test_the_package_has_the_two_functions() -> None:
    assert rwkv_jax.from_pretrained is from_pretrained
    with pytest.raises(AttributeError, match="has no attribute 'from_scratch'"):
        _ = rwkv_jax.from_scratch  # pyright: ignore[reportAttributeAccessIssue]


# There and back


@each_generation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["again.pth", "again.safetensors", "again"])
def test_official_to_ours_to_official_is_bit_exact(tmp_path: Path, config: ModelConfig, dtype: str, name: str) -> None:
    tensors = random_tensors(config, dtype)
    write_torch_file(tmp_path / "official.pth", tensors)
    model = from_pretrained(tmp_path / "official.pth")
    assert type(model) is model_type(config)
    assert model.config == computed_in(config, dtype)
    save_pretrained(model, tmp_path / name)
    assert_same_bits(tensors_in(tmp_path / name), tensors)


@pytest.mark.parametrize(
    ("key", "layout"), [("4", "transformers"), ("6", "flash-linear-attention"), ("7", "flash-linear-attention")]
)
def test_other_projects_layouts_are_read_and_written(tmp_path: Path, key: str, layout: str) -> None:
    tensors = random_tensors(CONFIGS[key], "bfloat16")
    write_sharded_safetensors(tmp_path / "theirs", to_layout(tensors, layout), max_shard_bytes=20_000)
    assert len(list((tmp_path / "theirs").iterdir())) > 2
    model = from_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "official.pth")
    assert_same_bits(tensors_in(tmp_path / "official.pth"), tensors)
    save_pretrained(model, tmp_path / "again", layout=layout)
    assert_same_bits(tensors_in(tmp_path / "again"), tensors)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"]) == (32, 29)


def test_convert_changes_nothing_but_the_format(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["7, from the trainer"], "bfloat16")
    write_torch_file(tmp_path / "a.pth", tensors)
    assert convert(tmp_path / "a.pth", tmp_path / "b.safetensors") == computed_in(
        CONFIGS["7, from the trainer"], "bfloat16"
    )
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "d.pth")
    assert_same_bits(tensors_in(tmp_path / "d.pth"), tensors)
    convert(tmp_path / "d.pth", tmp_path / "e.safetensors", dtype="float32")
    convert(tmp_path / "e.safetensors", tmp_path / "f.pth", dtype="bfloat16")
    assert_same_bits(tensors_in(tmp_path / "f.pth"), tensors)


def test_convert_brings_a_foreign_layout_into_our_order(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["6"])
    write_sharded_safetensors(tmp_path / "theirs", to_layout(tensors, "flash-linear-attention"))
    convert(tmp_path / "theirs", tmp_path / "a.pth")
    save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_with_unused_writes_what_the_official_trainer_loads(tmp_path: Path, dtype: str | None) -> None:
    tensors = random_tensors(CONFIGS["7"])
    write_torch_file(tmp_path / "a.pth", tensors)
    config = convert(tmp_path / "a.pth", tmp_path / "b.pth", dtype=dtype, with_unused=True)
    assert config.unused_value_residual
    found = tensors_in(tmp_path / "b.pth")
    # The shapes in which RWKV-LM makes them: a row, and two low-rank matrices.
    zeros = {"v0": (1, 1, 32), "v1": (32, 6), "v2": (6, 32)}
    zeros = {f"blocks.0.att.{name}": np.zeros(shape, np.float32) for name, shape in zeros.items()}
    assert_same_bits(found, {name: x.astype(dtype or x.dtype) for name, x in (tensors | zeros).items()})
    assert list(found) == list(random_tensors(CONFIGS["7, from the trainer"]))
    # What is there stays.
    trained = random_tensors(CONFIGS["7, from the trainer"])
    write_torch_file(tmp_path / "c.pth", trained)
    convert(tmp_path / "c.pth", tmp_path / "d.pth", with_unused=True)
    assert (tmp_path / "d.pth").read_bytes() == (tmp_path / "c.pth").read_bytes()


@pytest.mark.parametrize(("key", "layout"), [("6", "official"), ("4", "official"), ("7", "flash-linear-attention")])
def test_with_unused_is_of_the_official_rwkv7_only(tmp_path: Path, key: str, layout: str) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIGS[key]))
    with pytest.raises(WeightsError, match=f"with_unused = True: only RWKV-7 .* not RWKV-{key} in the {layout} layout"):
        convert(tmp_path / "a.pth", tmp_path / "b", layout=layout, with_unused=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_rounding_that_would_give_infinities_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["4"])
    tensors["blocks.1.ffn.key.weight"][3, 4] = 1e5
    write_torch_file(tmp_path / "a.pth", tensors)
    with pytest.raises(WeightsError, match=r"blocks\.1\.ffn\.key\.weight: has numbers too large for float16"):
        convert(tmp_path / "a.pth", tmp_path / "b.pth", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_the_prefix_of_deepspeed_is_taken_off(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["5.2"])
    write_torch_file(tmp_path / "a.pth", {f"_forward_module.{name}": x for name, x in tensors.items()})
    save_pretrained(from_pretrained(tmp_path / "a.pth"), tmp_path / "b.pth")
    assert_same_bits(tensors_in(tmp_path / "b.pth"), tensors)


# What is computed


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(("name", "bound"), [("4v0-660K", 3e-5), ("5v2-730K", 5e-5), ("6v0-1m", 5e-5)])
def test_trained_models_give_the_published_logits(name: str, bound: float, ending: str) -> None:
    golden = load_tiny(f"{name}.golden.npz")
    model = from_pretrained(tiny_model(f"{name}.{ending}"), dtype="float32")
    logits = logits_of(model, golden["tokens_p1"][None])[0]
    np.testing.assert_allclose(logits[golden["pos_p1"]], golden["logits64_p1"], rtol=0, atol=bound)


def test_a_dtype_decides_parameters_and_computation(tmp_path: Path) -> None:
    config = CONFIGS["7"]
    write_torch_file(tmp_path / "a.pth", random_tensors(config))
    tokens = np.arange(20)[None] % 29
    exact = from_pretrained(tmp_path / "a.pth")
    rounded = from_pretrained(tmp_path / "a.pth", dtype="bfloat16")
    assert exact.config.dtype == "float32"
    assert rounded.config.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(rounded, nnx.Param))} == {"bfloat16"}
    _, state = nnx.eval_shape(lambda model: model(jnp.asarray(tokens)), rounded)
    assert (state.att_shift.dtype, state.wkv.dtype) == ("bfloat16", "float32")
    error = logits_of(rounded, tokens) - logits_of(exact, tokens)
    assert 0 < np.abs(error).max() < 0.1 * logits_of(exact, tokens).std()


def test_float16_weights_are_computed_in_float32(tmp_path: Path) -> None:
    config = CONFIGS["6"]
    tensors = random_tensors(config, "float16")
    write_torch_file(tmp_path / "half.pth", tensors)
    write_torch_file(tmp_path / "single.pth", {name: x.astype(np.float32) for name, x in tensors.items()})
    tokens = np.arange(20)[None] % 29
    half, single = (logits_of(from_pretrained(tmp_path / f"{name}.pth"), tokens) for name in ("half", "single"))
    np.testing.assert_allclose(half, single, rtol=0, atol=5e-6)  # in float16 they would differ by 1e-3


def test_float64_is_refused_while_it_is_off(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIGS["4"]))
    with pytest.raises(WeightsError, match=r"a\.pth: .*: float64, which JAX has switched off"):
        from_pretrained(tmp_path / "a.pth", dtype="float64")
    with jax.enable_x64(True):
        model = from_pretrained(tmp_path / "a.pth", dtype="float64")
        assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {"float64"}


# Nothing is overwritten, nothing half written


@pytest.mark.parametrize("name", ["there.pth", "there.safetensors", "there"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIGS["4"]))
    model = from_pretrained(tmp_path / "a.pth")
    target = tmp_path / name
    target.write_text("precious")
    with pytest.raises(WeightsError, match=f"{name}: exists already and is not overwritten"):
        save_pretrained(model, target)
    assert target.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(dataclasses.replace(CONFIGS["4"], vocab_size=257)))
    model = from_pretrained(tmp_path / "a.pth")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rwkv_jax.weights.writing.save_tokenizer", fail)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "b", tokenizer=ByteTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_folder_that_came_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(dataclasses.replace(CONFIGS["4"], vocab_size=257)))
    model = from_pretrained(tmp_path / "a.pth")

    def come(*_: Any, **__: Any) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "model").write_text("precious")

    monkeypatch.setattr("rwkv_jax.weights.writing.save_tokenizer", come)
    with pytest.raises(WeightsError, match="b: exists already and is not overwritten"):
        save_pretrained(model, tmp_path / "b", tokenizer=ByteTokenizer())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.pth", "b", "model"]
    assert (tmp_path / "b" / "model").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.bin", {}, r"a\.bin: \.bin files are not written; name FILE\.pth"),
        ("a.pth", {"layout": "transformers"}, "the transformers layout is a folder with a config.json; name a folder"),
        ("a.BIN", {}, r"a\.BIN: \.bin files are not written"),
        ("https://x.org/a.pth", {}, r"^https:/x\.org/a\.pth: is a web address, not a path; name FILE\.pth, "),
        ("a", {"layout": "gguf"}, "layout = 'gguf': must be one of official, transformers, flash-linear-attention"),
        ("a", {"tokenizer": ByteTokenizer()}, "tokenizer: has 257 entries where the model has 29; use its own"),
        ("a", {"dtype": "int8"}, "dtype = 'int8': must be float32, bfloat16, float16 or float64"),
        ("a", {"layout": "flash-linear-attention"}, "RWKV-4"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    write_torch_file(tmp_path / "source.pth", random_tensors(CONFIGS["4"]))
    model = from_pretrained(tmp_path / "source.pth")
    with pytest.raises(WeightsError, match=message):
        save_pretrained(model, name if name.startswith("https:") else tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


# Wrong files


def test_a_file_that_does_not_fit_names_itself_and_all_that_is_wrong(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["6"])
    del tensors["blocks.1.ln1.weight"]
    tensors["blocks.2.att.value.weight"] = tensors["blocks.2.att.value.weight"][:-1]
    write_safetensors(tmp_path / "a.safetensors", tensors)
    for read in (from_pretrained, lambda path: convert(path, tmp_path / "b.pth")):
        with pytest.raises(WeightsError, match=r"(?s)a\.safetensors: these are not.*RWKV-6.*missing.*misshapen"):
            read(tmp_path / "a.safetensors")


def test_a_converted_file_of_the_rwkv_package_is_refused_with_the_reason(tmp_path: Path) -> None:
    pickled = forged.state(forged.GOOD + forged.text("_strategy") + forged.text("cpu fp32"))
    (tmp_path / "a.pth").write_bytes(forged.torch_file(pickled))
    with pytest.raises(
        WeightsError, match=r"a\.pth: .*converted by the rwkv package .*transposes matrices.*name the original"
    ):
        from_pretrained(tmp_path / "a.pth")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UnsafeFileError, match=r"a\.pth"):
        from_pretrained(tmp_path / "a.pth")


def test_a_model_that_was_changed_is_not_written(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIGS["6"]))
    model = from_pretrained(tmp_path / "a.pth")
    model.head.weight = nnx.Param(jnp.zeros((5, 32)))
    model.first_block.att.extra = nnx.Param(jnp.zeros(3))
    with pytest.raises(
        WeightsError, match=r"(?s)not expected blocks\.0\.att\.extra.*misshapen +head\.weight is \[5, 32\]"
    ):
        save_pretrained(model, tmp_path / "b.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_folders_of_a_target_are_made_and_endings_may_be_capitals(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["4"])
    write_torch_file(tmp_path / "a.pth", tensors)
    for name in ("b/c/d.PTH", "b/e/f.SafeTensors", "b/g/h"):
        save_pretrained(from_pretrained(tmp_path / "a.pth"), tmp_path / name)
        assert_same_bits(tensors_in(tmp_path / name), tensors)
    assert (tmp_path / "b/c/d.PTH").is_file()


@pytest.mark.parametrize("dtype", ["float16", "int8", jnp.bfloat16], ids=str)
def test_a_dtype_that_is_none_is_named_before_anything_is_read(dtype: Any) -> None:
    with pytest.raises(WeightsError, match=r"dtype = .*: must be None or one of float32, bfloat16, float64"):
        from_pretrained("nowhere.pth", dtype=dtype)


# Tokenizers


def test_a_tokenizer_is_saved_with_the_weights_and_found_again(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["4"], vocab_size=257)
    write_torch_file(tmp_path / "a.pth", random_tensors(config))
    save_pretrained(from_pretrained(tmp_path / "a.pth"), tmp_path / "b", tokenizer=ByteTokenizer())
    assert isinstance(load_tokenizer(tmp_path / "b", 257), ByteTokenizer)
    convert(tmp_path / "b", tmp_path / "c")
    assert isinstance(load_tokenizer(tmp_path / "c", 257), ByteTokenizer)
    convert(tmp_path / "a.pth", tmp_path / "d", tokenizer="bytes")
    assert isinstance(load_tokenizer(tmp_path / "d", 257), ByteTokenizer)
    convert(tmp_path / "d", tmp_path / "e.pth")  # a single file has no place for one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b", "c", "d", "e.pth"]


def test_a_tokenizer_beside_the_weights_matters_only_where_it_is_taken(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["4"], vocab_size=257)
    write_torch_file(tmp_path / "a.pth", random_tensors(config))
    convert(tmp_path / "a.pth", tmp_path / "b", tokenizer="bytes")
    (tmp_path / "b" / "tokenizer.json").write_text("no tokenizer")
    with pytest.raises(ConfigError):
        convert(tmp_path / "b", tmp_path / "c")
    convert(tmp_path / "b", tmp_path / "c.pth")
    convert(tmp_path / "b", tmp_path / "c", tokenizer="bytes")
    assert isinstance(load_tokenizer(tmp_path / "c", 257), ByteTokenizer)


def test_a_target_is_in_the_home_folder_where_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIGS["4"]))
    convert("~/a.pth", "~/b.pth")
    assert (tmp_path / "b.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()


def test_a_wrong_tokenizer_is_refused(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIGS["4"]))
    with pytest.raises(ConfigError, match=r"'world': does not match, it has 65536 entries .* vocab_size = 29"):
        convert(tmp_path / "a.pth", tmp_path / "b", tokenizer="world")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
