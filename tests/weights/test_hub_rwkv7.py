"""Folders of the RWKV organization on the Hugging Face hub: there and back bit for bit, and what is not written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.chat.formats import g1_in_jinja
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer, WorldTokenizer, load_tokenizer
from rwkv_jax.inference.chat.choice import choose_template
from rwkv_jax.models import LanguageModel
from rwkv_jax.weights.hub_rwkv7 import PREFIXES
from rwkv_jax.weights.model_config import UNUSED
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.sources import open_weights
from rwkv_jax.weights.tensors import UnsafeFileError, WeightsError
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors, tensors_in
from tests.weights.rwkv7_folders import CANDIDATE, FIELDS, SEVEN, foreign, write_folder, zeros

WITH_UNUSED = dataclasses.replace(SEVEN, unused_value_residual=True)


# There and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("unused", ["absent", "zeros", "numbers", "negative zeros"])
@pytest.mark.parametrize("sharded", [False, True])
def test_official_to_it_to_official_is_bit_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, unused: str, sharded: bool
) -> None:
    """With the value residual of layer 0 that an official file has or has not."""
    tensors = random_tensors(SEVEN if unused == "absent" else WITH_UNUSED, dtype)
    for name in UNUSED if "zeros" in unused else ():
        tensors[name] = np.zeros_like(tensors[name])
    if unused == "negative zeros":
        tensors[UNUSED[1]] = -tensors[UNUSED[1]]
    write_torch_file(tmp_path / "official.pth", tensors)
    if sharded:
        monkeypatch.setattr(
            "rwkv_jax.weights.writing.write_sharded_safetensors",
            lambda folder, tensors, **options: write_sharded_safetensors(folder, tensors, 20_000, **options),
        )
    folder = tmp_path / "hub"
    convert(tmp_path / "official.pth", folder, layout="huggingface")
    assert (folder / "model.safetensors.index.json").is_file() == sharded
    name = "model.safetensors.index.json" if sharded else "model.safetensors"
    stored = dict(read_safetensors(folder / name))
    made_up = zeros(dtype=tensors["emb.weight"].dtype) if unused == "absent" else {}
    assert_same_bits(stored, foreign(tensors | made_up))
    assert json.loads((folder / "config.json").read_text()) == FIELDS | {"dtype": dtype}
    convert(folder, tmp_path / "again.pth")
    assert_same_bits(tensors_in(tmp_path / "again.pth"), tensors)
    convert(folder, tmp_path / "hub2", layout="huggingface")
    assert (tmp_path / "hub2" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert_same_bits(tensors_in(tmp_path / "hub2"), tensors)


@pytest.mark.parametrize("rest", ["float32", "bfloat16"])
def test_made_up_zeros_of_a_file_of_two_dtypes_are_dropped(tmp_path: Path, rest: str) -> None:
    """They have the dtype of w1, not that of w0."""
    tensors = random_tensors(SEVEN, rest)
    other = "bfloat16" if rest == "float32" else "float32"
    tensors["blocks.0.att.w0"] = tensors["blocks.0.att.w0"].astype(other)
    write_torch_file(tmp_path / "official.pth", tensors)
    convert(tmp_path / "official.pth", tmp_path / "hub", layout="huggingface")
    convert(tmp_path / "hub", tmp_path / "again.pth")
    assert_same_bits(tensors_in(tmp_path / "again.pth"), tensors)


@pytest.mark.parametrize("fields", [FIELDS, CANDIDATE, None], ids=["official", "candidate", "none"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("max_bytes", [10**9, 20_000])
def test_folders_of_others_are_read(tmp_path: Path, prefix: str, fields: dict[str, Any] | None, max_bytes: int) -> None:
    """Under both prefixes; layer 0's zeros are made up, and dropped."""
    tensors = random_tensors(SEVEN, "bfloat16")
    stored = foreign(tensors | zeros(dtype=tensors["emb.weight"].dtype), prefix)
    write_folder(tmp_path / "a", stored, fields, max_shard_bytes=max_bytes)
    assert_same_bits(tensors_in(tmp_path / "a"), tensors)
    convert(tmp_path / "a", tmp_path / "b", layout="huggingface")
    assert_same_bits(
        dict(read_safetensors(tmp_path / "b" / "model.safetensors")),
        foreign(tensors | zeros(dtype=tensors["emb.weight"].dtype)),
    )
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == FIELDS | {"dtype": "bfloat16"}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_files_of_torch_and_without_the_zeros_are_read(tmp_path: Path, prefix: str, wrapper: str) -> None:
    tensors = random_tensors(SEVEN)
    for name, held in (("a", tensors), ("b", tensors | zeros())):
        write_torch_file(tmp_path / f"{name}.pth", {wrapper + x: y for x, y in foreign(held, prefix).items()})
        opened = open_weights(tmp_path / f"{name}.pth", warn=False)
        assert opened.layout == "huggingface"
        assert_same_bits({name: opened.tensors[name] for name in opened.tensors}, tensors)


def test_a_model_is_loaded_and_saved(tmp_path: Path) -> None:
    tensors = random_tensors(SEVEN)
    write_folder(tmp_path / "a", foreign(tensors | zeros()))
    model = from_pretrained(tmp_path / "a")
    assert isinstance(model, LanguageModel)
    assert model.config == SEVEN
    save_pretrained(model, tmp_path / "b", layout="huggingface")
    assert_same_bits(tensors_in(tmp_path / "b"), tensors)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == FIELDS


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_tied_head(tmp_path: Path, prefix: str) -> None:
    """Is the embedding where a config.json says so; it is written as a head of its own."""
    tensors = random_tensors(SEVEN)
    tied = tensors | {"head.weight": tensors["emb.weight"]}
    stored = foreign(tensors | zeros(), prefix)
    del stored["head.weight"]
    write_folder(tmp_path / "a", stored, FIELDS | {"tie_word_embeddings": True})
    assert_same_bits(tensors_in(tmp_path / "a"), tied)
    convert(tmp_path / "a", tmp_path / "b", layout="huggingface")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_bits(tensors_in(tmp_path / "b"), tied)


def test_code_beside_it_is_not_run(tmp_path: Path) -> None:
    """Nor looked at: config.json may name a program for `transformers` to load."""
    names = {"AutoConfig": "evil.Rwkv7Config", "AutoModelForCausalLM": "evil.Rwkv7ForCausalLM"}
    tensors = random_tensors(SEVEN)
    folder = write_folder(tmp_path / "a", foreign(tensors | zeros()), FIELDS | {"auto_map": names})
    for name in ("evil.py", "modeling_rwkv7.py", "configuration_rwkv7.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert_same_bits(tensors_in(folder), tensors)
    assert not (tmp_path / "ran").exists()


# The tokenizer beside it


def test_world_is_written_for_transformers(tmp_path: Path) -> None:
    config = dataclasses.replace(SEVEN, vocab_size=2**16, num_layers=2)
    write_torch_file(tmp_path / "a.pth", random_tensors(config, "bfloat16"))
    convert(tmp_path / "a.pth", tmp_path / "b", layout="huggingface", tokenizer="world")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    weights = {"README.md", "config.json", "model.safetensors"}
    assert names - weights == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    model = json.loads((tmp_path / "b" / "tokenizer.json").read_text())["model"]
    assert (model["type"], len(model["vocab"])) == ("WordPiece", 2**16)
    assert isinstance(load_tokenizer(tmp_path / "b", 2**16), WorldTokenizer)
    convert(tmp_path / "b", tmp_path / "c", layout="huggingface")  # with the one beside it
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("vocab_size", "has_form"), [(257, True), (256, False)])
def test_tokenizers_with_and_without_such_a_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, vocab_size: int, has_form: bool
) -> None:
    """Bytes without a NUL have none, and stay ours, with a warning."""
    config = dataclasses.replace(SEVEN, vocab_size=vocab_size, num_layers=2)
    write_torch_file(tmp_path / "a.pth", random_tensors(config))
    tokenizer = ByteTokenizer(vocab_size)
    save_pretrained(from_pretrained(tmp_path / "a.pth"), tmp_path / "b", layout="huggingface", tokenizer=tokenizer)
    names = {path.name for path in (tmp_path / "b").iterdir()} - {"README.md", "config.json", "model.safetensors"}
    assert names == ({"tokenizer.json", "tokenizer_config.json"} if has_form else {"tokenizer.kind.json"})
    assert ("it is written in a form that only rwkv-jax reads" in caplog.text) is not has_form
    text = "\u65e5\u672c 1\n"
    assert load_tokenizer(tmp_path / "b", vocab_size).encode(text) == tokenizer.encode(text)


def test_a_chat_template_goes_with_the_weights(tmp_path: Path) -> None:
    """Of other people's; ours is what models without one have."""
    config = dataclasses.replace(SEVEN, vocab_size=257, num_layers=2)
    (tmp_path / "a").mkdir()
    write_torch_file(tmp_path / "a" / "a.pth", random_tensors(config))
    theirs = tmp_path / "a" / "tokenizer_config.json"
    theirs.write_text(json.dumps({"chat_template": "{{ messages[0].content }}\u00e9"}))
    for name, layout in (("b", "huggingface"), ("c", "official")):
        convert(tmp_path / "a" / "a.pth", tmp_path / name, layout=layout, tokenizer="bytes")
        text = (tmp_path / name / "chat_template.jinja").read_bytes().decode()
        assert text == "{{ messages[0].content }}\u00e9"
        template = choose_template(tmp_path / name, ByteTokenizer())
        assert template.render([{"role": "user", "content": "a"}]) == "a\u00e9"
    theirs.unlink()
    (tmp_path / "a" / "chat_template.jinja").write_text(g1_in_jinja(), encoding="utf-8")
    convert(tmp_path / "a" / "a.pth", tmp_path / "d")
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"README.md", "model.safetensors"}
    (tmp_path / "a" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: is not UTF-8 .*, or move it away to convert with"):
        convert(tmp_path / "a" / "a.pth", tmp_path / "e")
    assert not (tmp_path / "e").exists()
    convert(tmp_path / "a" / "a.pth", tmp_path / "e.pth")


# What is not written


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    tensors = random_tensors(SEVEN)
    tensors["blocks.2.ffn.value.weight"][0, 0] = 1e9
    write_torch_file(tmp_path / "a.pth", tensors)
    with pytest.raises(WeightsError, match=r"blocks\.2\.ffn\.value\.weight: has numbers too large for float16"):
        convert(tmp_path / "a.pth", tmp_path / "half", layout="huggingface", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    (tmp_path / "there").mkdir()
    with pytest.raises(WeightsError, match=r"there: exists already and is not overwritten"):
        convert(tmp_path / "a.pth", tmp_path / "there", layout="huggingface")
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    ("key", "target", "options", "message"),
    [
        ("7", "a.safetensors", {}, "the huggingface layout is a folder with a config.json; name a folder"),
        ("7", "a", {"with_unused": True}, r"with_unused = True: only RWKV-7 in the official layout has such tensors"),
        ("6", "a", {}, "huggingface has RWKV-7, not RWKV-6; write the official layout"),
        ("7a", "a", {}, "huggingface has RWKV-7, not RWKV-7a; write the official layout"),
    ],
)
def test_what_the_layout_has_no_place_for(
    tmp_path: Path, key: str, target: str, options: dict[str, Any], message: str
) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIGS[key]))
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "a.pth", tmp_path / target, layout="huggingface", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_it_is_read_on_a_mesh_and_packed(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", foreign(random_tensors(SEVEN) | zeros()))
    mesh = jax.make_mesh((1,), ("all",))
    assert from_pretrained(tmp_path / "a", mesh=mesh).config == SEVEN
    assert from_pretrained(tmp_path / "a", quantize="int8").config.dtype == "float32"


def test_shards_that_disagree_are_unsafe(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", foreign(random_tensors(SEVEN) | zeros()), max_shard_bytes=20_000)
    shards = sorted(folder.glob("*.safetensors"))
    twice = dict(read_safetensors(shards[0]))
    own = dict(read_safetensors(shards[1]))
    shards[1].unlink()
    name = next(iter(twice))
    write_safetensors(shards[1], own | {name: twice[name]})
    with pytest.raises(UnsafeFileError, match=rf"{shards[1].name}: the shard holds tensors that the index .* {name}"):
        from_pretrained(folder)
