"""GGUF files: what we write is what llama.cpp's own package reads, and comes back bit for bit."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.chat.formats import WORLD
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer, WorldTokenizer, train_sentencepiece
from rwkv_jax.weights.ggml import vocabulary
from rwkv_jax.weights.ggml.gguf_file import read_gguf
from rwkv_jax.weights.ggml.types import TYPES, dequantized
from rwkv_jax.weights.pretrained import convert, find_tokenizer
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.sources import find_weights, open_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import (
    CONFIGS,
    DTYPES,
    assert_same_bits,
    computed_in,
    logits_of,
    random_tensors,
    tensors_in,
    trained_like,
)
from tests.weights.forged_ggml import Entry, gguf_model

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

MODELS = {name: CONFIGS[name] for name in ("6", "7")}
WIDE = {name: dataclasses.replace(config, width=64, ffn_width=96, vocab_size=64) for name, config in MODELS.items()}
"""Whose rows are whole blocks of q8_0, but for the low-rank maps."""


def written(folder: Path, tensors: dict[str, NDArray], **changes: Any) -> Path:
    """A GGUF file of official tensors."""
    write_torch_file(folder / "a.pth", tensors)
    convert(folder / "a.pth", folder / "a.gguf", **changes)
    return folder / "a.gguf"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_official_to_gguf_and_back_is_exact(tmp_path: Path, config: ModelConfig, dtype: str) -> None:
    tensors = random_tensors(config, dtype)
    path = written(tmp_path, tensors)
    opened = open_weights(path)
    assert opened.layout == "gguf"
    assert_same_bits(dict(opened.tensors), tensors)
    assert opened.model_config() == computed_in(config, dtype)
    convert(path, tmp_path / "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()
    convert(path, tmp_path / "again.safetensors")
    assert_same_bits(tensors_in(tmp_path / "again.safetensors"), tensors)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_their_package_reads_what_llama_cpp_looks_for(tmp_path: Path, config: ModelConfig) -> None:
    reader = gguf.GGUFReader(written(tmp_path, random_tensors(config, "bfloat16")))
    architecture = f"rwkv{config.generation}"
    kind = gguf.MODEL_ARCH[architecture.upper()]
    told = {name: field.contents() for name, field in reader.fields.items()}
    sizes = config.resolved()
    assert told["general.architecture"] == architecture
    assert told["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    assert told[f"{architecture}.embedding_length"] == 32
    assert told[f"{architecture}.block_count"] == 3
    assert told[f"{architecture}.wkv.head_size"] == 8
    assert told[f"{architecture}.attention.layer_norm_epsilon"] == np.float32(1e-5)
    keys = gguf.Keys
    ranks = {
        keys.LLM.TIME_MIX_EXTRA_DIM: sizes.mix_rank,
        keys.LLM.TIME_DECAY_EXTRA_DIM: sizes.decay_rank,
    }
    if architecture == "rwkv7":
        ranks = {
            keys.Attention.DECAY_LORA_RANK: sizes.decay_rank,
            keys.Attention.ICLR_LORA_RANK: sizes.iclr_rank,
            keys.Attention.VALUE_RESIDUAL_MIX_LORA_RANK: sizes.value_rank,
            keys.Attention.GATE_LORA_RANK: sizes.gate_rank,
        }
    assert {key: told[key.format(arch=architecture)] for key in ranks} == ranks
    known = {gguf.TENSOR_NAMES[tensor].format(bid="N") for tensor in gguf.MODEL_TENSORS[kind]}
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert {re.sub(r"blk\.\d\.", "blk.N.", name).rpartition(".")[0] for name in found} <= known
    narrow = {name for name, tensor in found.items() if tensor.tensor_type == gguf.GGMLQuantizationType.BF16}
    # As in llama.cpp's converter: what its operations take in float32 only, and vectors, are in float32.
    assert not any(part in name for name in narrow for part in ("lerp", "_norm", "mix_w1", "mix_w2", "first", "decay"))
    assert {"token_embd.weight", "output.weight", "blk.2.time_mix_key.weight"} <= narrow
    assert all(found[name].tensor_type == gguf.GGMLQuantizationType.F32 for name in found.keys() - narrow)
    fused = found["blk.1.time_mix_lerp_fused.weight"]
    assert [int(size) for size in fused.shape] == [32, 1, 1, 5 if architecture == "rwkv6" else 6]


def test_the_unused_value_residual_is_left_out_and_can_be_asked_for(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["7, from the trainer"])
    path = written(tmp_path, tensors)
    kept = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(r"blocks\.0\.att\.v[012]", name)}
    assert_same_bits(tensors_in(path), kept)
    stored = read_gguf(path).tensors
    for i in range(3):  # of the rank that llama.cpp wants
        name = f"blk.0.time_mix_v{i}.weight"
        assert stored[name].shape == stored[f"blk.0.time_mix_a{i}.weight"].shape
        assert not stored[name].content.any()
    convert(path, tmp_path / "b.pth", with_unused=True)
    assert tensors_in(tmp_path / "b.pth").keys() == tensors.keys()


@pytest.mark.parametrize("config", WIDE.values(), ids=WIDE)
def test_q8_0_rounds_matrices_alone(tmp_path: Path, config: ModelConfig) -> None:
    tensors = trained_like(config)
    path = written(tmp_path, tensors, dtype="q8_0")
    stored = read_gguf(path).tensors
    kinds = {name: tensor.type.name for name, tensor in stored.items()}
    assert kinds["blk.1.time_mix_key.weight"] == kinds["output.weight"] == "q8_0"
    assert kinds["blk.1.attn_norm.weight"] == kinds["blk.1.time_mix_lerp_fused.weight"] == "f32"
    found = tensors_in(path)
    assert {str(tensor.dtype) for tensor in found.values()} == {"float32"}
    rounded = 0
    for name, tensor in tensors.items():
        if not np.array_equal(found[name], tensor):
            rounded += 1
            is_transposed = re.search(r"att\.[wavg][12]$", name) is not None
            exact, close = (x.T if is_transposed else x for x in (tensor, found[name]))
            blocks = np.abs(exact).reshape(-1, 32).max(-1, keepdims=True)
            error = np.abs(close - exact).reshape(-1, 32)
            assert (error <= blocks / 127 * 0.57).all(), name  # half a step, and the scale's in float16
    assert rounded == sum(
        kind == "q8_0" and not re.match(r"blk\.0\.time_mix_v\d", name) for name, kind in kinds.items()
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 40))
    write_torch_file(tmp_path / "b.pth", tensors)
    difference = logits_of(from_pretrained(path), tokens) - logits_of(from_pretrained(tmp_path / "b.pth"), tokens)
    assert 0 < np.abs(difference).max() < 0.2


def test_float64_is_rounded_to_blocks_and_float32(tmp_path: Path) -> None:
    tensors = trained_like(WIDE["6"])
    wanted = tensors_in(written(tmp_path, tensors, dtype="q8_0"))
    (tmp_path / "b").mkdir()
    wide = {name: x.astype(np.float64) for name, x in tensors.items()}
    assert_same_bits(tensors_in(written(tmp_path / "b", wide, dtype="q8_0")), wanted)
    wide["ln_out.bias"][0] = 1e39
    (tmp_path / "c").mkdir()
    with pytest.raises(WeightsError, match=r"ln_out\.bias: has numbers too large for float32"):
        written(tmp_path / "c", wide, dtype="q8_0")


def test_rows_that_are_no_blocks_stay_in_float32(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["7"], width=40, ffn_width=64)
    stored = read_gguf(written(tmp_path, random_tensors(config), dtype="q8_0")).tensors
    assert stored["blk.0.time_mix_key.weight"].type.name == "f32"
    assert stored["blk.0.channel_mix_value.weight"].type.name == "q8_0"


@pytest.mark.parametrize("kind", [kind for kind in TYPES.values() if kind.dtype is None], ids=lambda kind: kind.name)
def test_blocks_of_every_kind_are_computed_as_their_package_does(tmp_path: Path, kind: Any) -> None:
    config = dataclasses.replace(CONFIGS["7"], width=256, head_dim=64, vocab_size=8)
    blocks = np.random.default_rng(0).integers(0, 256, (8, kind.size), np.uint8)
    file = gguf_model(config).tensor(
        "output.weight",
        kind=next(number for number, each in TYPES.items() if each == kind),
        shape=(8, kind.block),
        content=blocks.tobytes(),
    )
    # Of a width that is one block; the file is of no model then.
    (tmp_path / "a.gguf").write_bytes(file.bytes())
    stored = read_gguf(tmp_path / "a.gguf").tensors["output.weight"]
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name.upper()])
    assert stored.shape == expected.shape
    np.testing.assert_array_equal(dequantized(stored), expected)


def test_float16_matrices_beside_float32_vectors_keep_their_dtypes(tmp_path: Path) -> None:
    """A file by llama.cpp's converter, which does not record a dtype."""
    tensors = random_tensors(CONFIGS["6"], "float16")
    path = written(tmp_path, tensors)
    reader = gguf.GGUFReader(path)
    file = gguf_model(CONFIGS["6"])
    kinds = {tensor.name: tensor for tensor in reader.tensors}
    file.tensors = [
        Entry(name, tensor.data.shape, tensor.data.tobytes(), int(tensor.tensor_type)) for name, tensor in kinds.items()
    ]
    (tmp_path / "theirs.gguf").write_bytes(file.bytes())
    found = tensors_in(tmp_path / "theirs.gguf")
    assert {name: str(found[name].dtype) for name in ("emb.weight", "ln_out.weight")} == {
        "emb.weight": "float16",
        "ln_out.weight": "float32",
    }
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert open_weights(tmp_path / "theirs.gguf").model_config().dtype == "float32"


def test_old_files_of_rwkv6_with_single_blends_are_read(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["6"])
    file = gguf_model(CONFIGS["6"], tensors)
    single = [
        Entry(f"blk.{i}.time_mix_lerp_{x}.weight", (32,), tensors[f"blocks.{i}.att.time_maa_{x}"].tobytes())
        for i in range(3)
        for x in "wkvrg"
    ]
    file.tensors = [entry for entry in file.tensors if "fused" not in str(entry.name)] + single
    (tmp_path / "a.gguf").write_bytes(file.bytes())
    assert_same_bits(tensors_in(tmp_path / "a.gguf"), tensors)


def test_layers_divided_by_powers_of_two_are_multiplied_again(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["6"])
    divided = {
        name: tensor / 2 ** int(name.split(".")[1]) if name.endswith(("output.weight", "ffn.value.weight")) else tensor
        for name, tensor in tensors.items()
    }
    file = gguf_model(CONFIGS["6"], divided).told(rwkv6__rescale_every_n_layers=1)
    (tmp_path / "a.gguf").write_bytes(file.bytes())
    assert_same_bits(tensors_in(tmp_path / "a.gguf"), tensors)


def test_a_model_in_memory_and_a_folder(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", trained_like(CONFIGS["7"]))
    model = from_pretrained(tmp_path / "a.pth")
    save_pretrained(model, tmp_path / "folder" / "a.gguf", dtype="float16")
    assert find_weights(tmp_path / "folder") == tmp_path / "folder" / "a.gguf"
    again = from_pretrained(tmp_path / "folder", dtype="float32")
    tokens = jnp.arange(20)[None]
    np.testing.assert_allclose(logits_of(again, tokens), logits_of(model, tokens), rtol=0, atol=1e-2)
    assert from_pretrained(tmp_path / "folder", quantize="int8").config.vocab_size == 29


def test_the_world_tokenizer_goes_in_and_comes_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(CONFIGS["7"], vocab_size=2**16, width=8, num_layers=2)
    path = written(tmp_path, random_tensors(config))
    assert "gets the World tokenizer, since the model has its 65536 ids" in caplog.text
    found = find_tokenizer(path, 2**16)
    assert isinstance(found, WorldTokenizer)
    file = read_gguf(path)
    listed = list(file.texts("tokenizer.ggml.tokens"))
    assert len(listed) == 2**16
    assert listed[1] == b"\\x00"
    assert listed[11] == b"\\n"
    assert b"<s>" not in (listed[0], listed[-1])  # a text of users, which would become that token
    assert {key: file.metadata[f"tokenizer.ggml.{key}"] for key in ("model", "bos_token_id", "eot_token_id")} == {
        "model": "rwkv",
        "bos_token_id": 0,
        "eot_token_id": 261,
    }
    convert(path, tmp_path / "folder")
    assert (tmp_path / "folder" / "tokenizer.kind.json").is_file()
    template = jinja2.Environment().from_string(str(file.metadata["tokenizer.chat_template"]))
    messages = [("system", "Be brief."), ("user", " Hi!\n"), ("assistant", "Hello."), ("user", "What is 1 < 2 '?")]
    listed = [{"role": role, "content": content} for role, content in messages]
    assert template.render(messages=listed, add_generation_prompt=True) == WORLD.render(listed)


@pytest.mark.parametrize("vocab_size", [256, 257])
def test_the_byte_tokenizer_goes_in_and_comes_out(tmp_path: Path, vocab_size: int) -> None:
    path = written(
        tmp_path, random_tensors(dataclasses.replace(CONFIGS["6"], vocab_size=vocab_size)), tokenizer="bytes"
    )
    found = find_tokenizer(path, vocab_size)
    assert isinstance(found, ByteTokenizer)
    assert found.vocab_size == vocab_size


def test_another_vocabulary_in_a_file_is_not_taken_for_one_of_ours(tmp_path: Path) -> None:
    path = written(tmp_path, random_tensors(dataclasses.replace(CONFIGS["6"], vocab_size=256)), tokenizer="bytes")
    content = path.read_bytes()
    assert content.count(b"\x01\0\0\0\0\0\0\0A") == 1
    path.write_bytes(content.replace(b"\x01\0\0\0\0\0\0\0A", b"\x01\0\0\0\0\0\0\0?"))
    assert find_tokenizer(path, 256) is None


def test_a_tokenizer_that_gguf_does_not_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(dataclasses.replace(CONFIGS["7"], vocab_size=300)))
    tokenizer = tmp_path / "tokenizer.model"
    train_sentencepiece(["the cat sat on the mat and the dog ran away quickly"] * 30, 300, tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer\.model cannot be put into GGUF, World and bytes can"):
        convert(tmp_path / "a.pth", tmp_path / "a.gguf", tokenizer=str(tokenizer))
    convert(tmp_path / "a.pth", tmp_path / "a.gguf")  # found, but not asked for
    assert "its tokenizer (tokenizer.model) cannot be put into GGUF" in caplog.text
    monkeypatch.setattr(vocabulary, "_WORLD_IDS", 300)  # nor is World's put in its place
    convert(tmp_path / "a.pth", tmp_path / "b.gguf")
    assert read_gguf(tmp_path / "b.gguf").metadata["tokenizer.ggml.model"] == "none"
    convert(tmp_path / "a.pth", tmp_path / "c.gguf", resize_vocab=310)
    assert "its tokenizer (tokenizer.model) does not fit 310 ids" in caplog.text
    assert read_gguf(tmp_path / "a.gguf").metadata["tokenizer.ggml.model"] == "none"
    assert read_gguf(tmp_path / "a.gguf").metadata["rwkv7.vocab_size"] == 300


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CONFIGS["5.2"], {}, r"hold RWKV-6 and 7, which llama\.cpp runs, not RWKV-5\.2"),
        (CONFIGS["4"], {}, "not RWKV-4"),
        (CONFIGS["7"], {"dtype": "float64"}, r"is float64, which llama\.cpp does not compute; give dtype float32"),
        (CONFIGS["7"], {"dtype": "q4_k"}, "dtype = 'q4_k': must be"),
        (CONFIGS["7"], {"layout": "flash-linear-attention"}, "have names of their own"),
    ],
    ids=str,
)
def test_what_gguf_cannot_hold_is_refused(tmp_path: Path, config: ModelConfig, changes: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        written(tmp_path, random_tensors(config), **changes)
    assert not (tmp_path / "a.gguf").exists()


def test_other_equations_and_packed_matrices_are_refused(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", trained_like(CONFIGS["7"]))
    model = from_pretrained(tmp_path / "a.pth")
    model.config = dataclasses.replace(model.config, negative_eigenvalues=True)
    with pytest.raises(WeightsError, match=r"negative_eigenvalues = True, which a \.gguf file cannot say"):
        save_pretrained(model, tmp_path / "b.gguf")
    packed = from_pretrained(tmp_path / "a.pth", quantize="int8")
    with pytest.raises(WeightsError, match="packed matrices are written as they are"):
        save_pretrained(packed, tmp_path / "b.gguf")


def test_nothing_is_overwritten_and_no_part_is_left(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["6"])
    tensors["blocks.2.att.key.weight"][3, 4] = np.inf
    with pytest.raises(WeightsError, match=r"blk\.2\.time_mix_key\.weight: has numbers too large for q8_0"):
        written(tmp_path, tensors, dtype="q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(WeightsError, match="exists already and is not overwritten"):
        convert(tmp_path / "a.pth", tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    tensors = random_tensors(WIDE["7"])
    path, blocks = written(plain, tensors), written(packed, tensors, dtype="q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_same_bits(tensors_in(path), tensors)  # plain numbers need none
    with pytest.raises(WeightsError, match=r'q8_0, the package gguf is missing: pip install "rwkv-jax\[gguf\]"'):
        tensors_in(blocks)
    with pytest.raises(WeightsError, match="the package gguf is missing"):
        convert(path, tmp_path / "c.gguf")
    assert not (tmp_path / "c.gguf").exists()


def test_a_file_that_llama_cpp_has_quantized_is_not_rounded_again(tmp_path: Path) -> None:
    """It keeps our record of the dtype, which the numbers of blocks do not have."""
    file = gguf_model(WIDE["7"]).told(rwkv_jax__dtype="bfloat16")
    matrix = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    blocks = gguf.quantize(matrix, gguf.GGMLQuantizationType.Q5_1)
    file = file.tensor("blk.1.time_mix_key.weight", kind=7, content=blocks.tobytes())
    (tmp_path / "a.gguf").write_bytes(file.bytes())
    found = tensors_in(tmp_path / "a.gguf")
    assert found["emb.weight"].dtype == np.float32
    np.testing.assert_array_equal(
        found["blocks.1.att.key.weight"], gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q5_1)
    )


def test_the_writer_of_the_package_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        written(tmp_path, random_tensors(dataclasses.replace(CONFIGS["6"], vocab_size=256)), tokenizer="bytes")
    assert not caplog.records
