"""Folders that pretend to be RWKV-7 of the Hugging Face hub, each refused by name, before anything is loaded or run."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax import from_pretrained
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors
from rwkv_jax.weights.summary import summarize
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import random_tensors
from tests.weights.rwkv7_folders import FIELDS, SEVEN, foreign, write_folder, zeros

INDEX, CONFIG = "model.safetensors.index.json", "config.json"

Tensors = dict[str, NDArray]


def of_config(fields: dict[str, Any]) -> Callable[[Path], None]:
    """Another config.json, which says this, too."""
    return lambda folder: rewrite(folder / CONFIG, json.dumps(FIELDS | fields))


def of_text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / name, content)


def rewrite(path: Path, content: str) -> None:
    path.write_text(content)


def of_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """An index that is changed in place."""

    def make(folder: Path) -> None:
        record = json.loads((folder / INDEX).read_text())
        change(record["weight_map"])
        (folder / INDEX).write_text(json.dumps(record))

    return make


def of_tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """One file in the place of shards, of changed tensors."""

    def make(folder: Path) -> None:
        tensors = dict(read_safetensors(folder / INDEX))
        for path in (folder / INDEX, *folder.glob("*.safetensors")):
            path.unlink()
        change(tensors)
        write_safetensors(folder / "model.safetensors", tensors)

    return make


def without(*parts: str) -> Callable[[Path], None]:
    """Without the tensors that have one of these in their names."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return of_tensors(change)


def with_tensors(**tensors: NDArray) -> Callable[[Path], None]:
    """With these besides, or in place of others; __ is a dot."""
    return of_tensors(lambda found: found.update({name.replace("__", "."): x for name, x in tensors.items()}))


def in_two_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = dict(read_safetensors(first))
    name = next(iter(tensors))
    own = dict(read_safetensors(second))
    second.unlink()
    write_safetensors(second, own | {name: tensors[name]})


def in_two_shards_without_an_index(folder: Path) -> None:
    in_two_shards(folder)
    (folder / INDEX).unlink()


def prefixes_in_two_shards(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    renamed = {name.replace("rwkv7.", "model."): x for name, x in read_safetensors(path).items()}
    path.unlink()
    write_safetensors(path, renamed)
    of_index(lambda shard_of: _rename(shard_of, path.name))(folder)


def _rename(shard_of: dict[str, str], shard: str) -> None:
    for name in [name for name, own in shard_of.items() if own == shard]:
        shard_of[name.replace("rwkv7.", "model.")] = shard_of.pop(name)


def both_prefixes(tensors: Tensors) -> None:
    tensors |= {f"model.{name.removeprefix('rwkv7.')}": x for name, x in tensors.items() if "blocks.0" in name}


def moved_layer(to: str) -> Callable[[Tensors], None]:
    """The last layer under another number."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "blocks.2." in name]:
            tensors[name.replace("blocks.2.", f"blocks.{to}.")] = tensors.pop(name)

    return change


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def huge_shape(folder: Path) -> None:
    """A tensor that claims to be larger than memory."""
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"shape":[32,32]', b'"shape":[99,99]', 1))


_ROW, _IN, _OUT = (zeros()[f"blocks.0.att.v{i}"] for i in range(3))

FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "both prefixes": (
        of_tensors(both_prefixes),
        r"some names begin with 'rwkv7\.' \(rwkv7\..*\) and 'model\.' \(model\..*\); the layout has one prefix",
    ),
    "a prefix in each shard": (prefixes_in_two_shards, r"the layout has one prefix, so these are two models in one"),
    "a path out of the folder": (
        of_index(lambda shard_of: shard_of.update({"rwkv7.emb.weight": "../a.safetensors"})),
        r"names the shard '\.\./a\.safetensors', which is no file beside it; nothing was read",
    ),
    "an absolute path": (
        of_index(lambda shard_of: shard_of.update({"rwkv7.emb.weight": "/etc/a.safetensors"})),
        r"names the shard '/etc/a\.safetensors', which is no file beside it; nothing was read",
    ),
    "a promise": (
        of_index(lambda shard_of: shard_of.update({"rwkv7.more": next(iter(shard_of.values()))})),
        r"the index promises tensors that the shard lacks: rwkv7\.more",
    ),
    "a tensor that the index leaves out": (
        of_index(lambda shard_of: shard_of.pop("head.weight")),
        r"the shard holds tensors that the index does not place there: head\.weight",
    ),
    "a tensor in two shards": (in_two_shards, r"the shard holds tensors that the index does not place there: "),
    "a tensor in two shards without an index": (in_two_shards_without_an_index, r"is also in model-00001"),
    "a shard missing": (without_a_shard, r"shards are missing beside it: model-00002-of-"),
    "a shard cut off": (cut_shard, r"is not a whole safetensors file"),
    "a header of 2^60 bytes": (huge_header, r"is not a whole safetensors file"),
    "a shape that is none": (huge_shape, r"is not a whole safetensors file"),
    "an index of a list": (of_text(INDEX, '{"weight_map": ["a.safetensors"]}'), "has no weight_map from names"),
    "an index with a name twice": (
        of_text(INDEX, '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
        "has names twice: a; readers would differ about it",
    ),
    "a config that is no object": (of_text(CONFIG, "[]"), r"config\.json: its JSON is no object"),
    "a config that is no JSON": (of_text(CONFIG, '{"model_type": '), r"config\.json: its JSON cannot be understood"),
    "a config that is deep": (of_text(CONFIG, "[" * 100_000), r"config\.json: its JSON cannot be understood"),
    "a config of megabytes": (
        of_text(CONFIG, json.dumps(FIELDS | {"more": "x" * 2**20})),
        r"config\.json: has more than 1048576 bytes, so it is no model's",
    ),
    "a config with a key twice": (
        of_text(CONFIG, json.dumps(FIELDS)[:-1] + ', "vocab_size": 30}'),
        r"config\.json: has names twice: vocab_size",
    ),
    "a number of 5000 digits": (
        of_text(CONFIG, json.dumps(FIELDS)[:-1] + ', "context_length": ' + "9" * 5000 + "}"),
        r"config\.json: its JSON cannot be understood",
    ),
    "another model": (of_config({"model_type": "llama"}), r"model_type = 'llama': the tensors are those of 'rwkv7'"),
    "no model": (of_config({"model_type": None}), r"model_type = None: the tensors are those of 'rwkv7'"),
    "RWKV-4": (of_config({"model_type": "rwkv"}), r"model_type = 'rwkv': the tensors are those of 'rwkv7'"),
    "another version": (
        of_config({"model_type": "rwkv", "architecture_version": "rwkv6"}),
        r"architecture_version = 'rwkv6': the tensors are those of 'rwkv7'",
    ),
    "another architecture": (
        of_config({"architectures": ["Rwkv7ForSequenceClassification"]}),
        r"architectures = \['Rwkv7ForSequenceClassification'\]: must be one of Rwkv7ForCausalLM",
    ),
    "an architecture that is no list": (of_config({"architectures": {"a": 1}}), r"architectures = \{'a': 1\}: must be"),
    "an architecture that cannot be hashed": (of_config({"architectures": [[]]}), r"architectures = \[\[\]\]: must be"),
    "a negative count": (of_config({"num_hidden_layers": -3}), r"num_hidden_layers = -3: must be a positive whole"),
    "a huge count": (
        of_config({"num_hidden_layers": 10**30}),
        r"num_hidden_layers = 10{30}: the tensors have layers up to blocks\.2",
    ),
    "a fraction": (of_config({"head_dim": 8.5}), r"head_dim = 8\.5: must be a positive whole number"),
    "a truth in place of a count": (of_config({"num_heads": True}), r"num_heads = True: must be a positive whole"),
    "a text in place of a count": (of_config({"vocab_size": "29"}), r"vocab_size = '29': must be a positive whole"),
    "two wrong sizes": (
        of_config({"vocab_size": 65536, "gate_low_rank_dim": 128}),
        r"vocab_size = 65536: emb\.weight is \[29, 32\]; gate_low_rank_dim = 128: blocks\.0\.att\.g1 is \[32, 7\]",
    ),
    "no room": (of_config({"context_length": 0}), r"context_length = 0: must be a positive whole number"),
    "another epsilon": (of_config({"norm_eps": 1e-6}), r"norm_eps = 1e-06: only 1e-05 is computed"),
    "no number": (of_text(CONFIG, json.dumps(FIELDS).replace("1e-05", "NaN")), r"norm_eps = nan: only 1e-05 is"),
    "norms without bias": (of_config({"norm_bias": False}), r"norm_bias = False: only True is computed"),
    "tables by token": (of_config({"use_deep_embed": True}), r"use_deep_embed = True: is not computed"),
    "quantized": (of_config({"quantization_config": {"bits": 4}}), r"quantization_config = \{'bits': 4\}: is not"),
    "tied and not": (
        of_config({"tie_word_embeddings": True}),
        r"tie_word_embeddings = True: there is a head\.weight, of which it cannot be told whether it is meant",
    ),
    "tied perhaps": (of_config({"tie_word_embeddings": "no"}), r"tie_word_embeddings = 'no': must be true or false"),
    "no head": (without("head.weight"), r"missing      head\.weight \[29, 32\]"),
    "no embedding": (without("emb.weight"), r"missing      emb\.weight"),
    "no layer 0": (without("blocks.0."), "of the layers 0 to 2, these are missing: 0;"),
    "a gap": (without("blocks.1."), "of the layers 0 to 2, these are missing: 1;"),
    "a layer that is far away": (
        of_tensors(moved_layer("999999999")),
        r"num_hidden_layers = 3: the tensors have layers up to blocks\.999999999",
    ),
    "a layer beyond numbers": (of_tensors(moved_layer("9" * 5000)), r"these names are of no known layout: 'rwkv7"),
    "a negative layer": (of_tensors(moved_layer("-1")), r"these names are of no known layout: rwkv7\.blocks\.-1\."),
    "a tensor of a fork": (
        with_tensors(rwkv7__blocks__0__att__evil=_ROW),
        r"these names are of no known layout: rwkv7\.blocks\.0\.att\.evil",
    ),
    "a name without prefix, too": (with_tensors(emb__weight=_ROW), r"these names are of no known layout: emb\.weight"),
    "zeros of odd shapes": (
        with_tensors(rwkv7__blocks__0__att__v1=np.zeros((32, 7), np.float32)),
        r"misshapen    blocks\.0\.att\.v1 is \[32, 7\], must be \[32, 6\]",
    ),
    "zeros of no shape": (
        with_tensors(rwkv7__blocks__0__att__v0=np.zeros((), np.float32)),
        r"misshapen    blocks\.0\.att\.v0 is \[\], must be \[1, 1, 32\]",
    ),
    "numbers of odd shapes": (
        with_tensors(rwkv7__blocks__0__att__v2=np.ones((32, 6), np.float32)),
        r"misshapen    blocks\.0\.att\.v2 is \[32, 6\], must be \[6, 32\]",
    ),
    "whole zeros": (
        with_tensors(
            **{f"rwkv7__{name.replace('.', '__')}": np.zeros(x.shape, np.int32) for name, x in zeros().items()}
        ),
        r"wrong dtype  blocks\.0\.att\.v0 is int32",
    ),
    "zeros in part": (without("blocks.0.att.v1", "blocks.0.att.v2"), r"missing      blocks\.0\.att\.v1 \[32, 6\]"),
    "zeros without the first": (without("blocks.0.att.v0"), r"not expected blocks\.0\.att\.v1 \[32, 6\]"),
    "a misshapen matrix": (
        with_tensors(rwkv7__blocks__2__ffn__key__weight=np.zeros((47, 32), np.float32)),
        r"misshapen    blocks\.2\.ffn\.key\.weight is \[47, 32\], must be \[48, 32\]",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is read; imports, and compiles what is compiled once, before memory is counted."""
    folder = tmp_path_factory.mktemp("good") / "good"
    write_folder(folder, foreign(random_tensors(SEVEN) | zeros()), max_shard_bytes=20_000)
    assert from_pretrained(folder).config == SEVEN
    return folder


@pytest.mark.parametrize(("change", "message"), FILES.values(), ids=FILES)
def test_it_is_refused_by_name(tmp_path: Path, good: Path, change: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    tracemalloc.start()
    with pytest.raises(WeightsError, match=message) as raised:
        from_pretrained(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert str(raised.value).startswith(str(folder))
    assert str(raised.value).count(str(folder)) == 1
    if re.search("config.json", str(raised.value)):  # `rwkv info` says the same without loading JAX
        with pytest.raises(WeightsError, match=message):
            summarize(next(folder.glob("*.index.json"), folder / "model.safetensors"))
