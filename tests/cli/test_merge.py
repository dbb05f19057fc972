"""`rwkv merge`, and `--adapter` of the commands that generate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.cli import main
from rwkv_jax.tuning.adapter import Adapter
from rwkv_jax.tuning.files import open_adapter, save_adapter
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.official import read_config
from tests.cli.commands import Command
from tests.evaluation.piqa_file import write_piqa
from tests.weights.files import tensors_in


@pytest.fixture(scope="module")
def base(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights with its tokenizer, and adapters beside it: `a` of that base and `b` of another one."""
    folder = tmp_path_factory.mktemp("base")
    main(["convert", str(run_dir), str(folder / "model")])
    tensors = tensors_in(folder / "model")
    config = read_config(tensors)
    shape = tensors["blocks.1.ffn.value.weight"].shape
    draws = np.random.default_rng(0)
    low, up = (draws.standard_normal(size, np.float32) for size in ((2, shape[1]), (shape[0], 2)))
    adapter = Adapter(
        "lora",
        {"blocks.1.ffn.value": {"lora_A": low, "lora_B": up}},
        {"blocks.1.ffn.value": 1.5},
        {},
        weights_digest(tensors),
    )
    save_adapter(adapter, folder / "a", config)
    save_adapter(dataclasses.replace(adapter, base_digest="0" * 64), folder / "b", config)
    return folder


def test_merge_writes_what_convert_writes(rwkv: Command, base: Path, tmp_path: Path) -> None:
    printed = rwkv("merge", base / "model", base / "a", tmp_path / "m", "--weights", "2").out
    assert printed == f"{tmp_path / 'm'}: RWKV-7 2 x 32 in float32, with {base / 'a'} (lora, 1 matrices)\n"
    assert {path.name for path in (tmp_path / "m").iterdir()} == {path.name for path in (base / "model").iterdir()}
    merged, tensors = tensors_in(tmp_path / "m"), tensors_in(base / "model")
    changed = {name for name in tensors if (merged[name] != tensors[name]).any()}
    assert changed == {"blocks.1.ffn.value.weight"}
    difference = merged["blocks.1.ffn.value.weight"] - tensors["blocks.1.ffn.value.weight"]
    parts = open_adapter(base / "a").parts["blocks.1.ffn.value"]
    np.testing.assert_allclose(difference, 2 * 1.5 * parts["lora_B"] @ parts["lora_A"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "m"), "merge: needs BASE, at least one ADAPTER, and OUT"),
        (("model", "a", "a"), "a: exists already and is not overwritten"),
        (("model", "b", "m"), r"base_digest = 0000000000000000\.\.\.: the adapter was trained on another base"),
        (
            ("model", "a", "m", "--weights", "1", "2"),
            r"--weights \[1.0, 2.0\]: must be a number for each of 1",
        ),
        (("model", "a", "m", "--adapter-alpha", "8"), "--adapter-alpha 8.0: .* says that itself; leave it out"),
        (("model", "nothing", "m"), "adapter = 'nothing': there is no such file or folder"),
    ],
)
def test_merge_refuses(monkeypatch: pytest.MonkeyPatch, base: Path, arguments: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(base)
    with pytest.raises(SystemExit, match=message):
        main(["merge", *arguments])
    assert not Path("m").exists()


def test_generate_with_an_adapter_is_the_merged_model(rwkv: Command, base: Path, tmp_path: Path) -> None:
    options = ("--prompt", "def", "--tokens", "12", "--temperature", "0")
    rwkv("merge", base / "model", base / "a", tmp_path / "m")
    merged = rwkv("generate", tmp_path / "m", *options).out
    assert rwkv("generate", base / "model", "--adapter", base / "a", *options).out == merged
    assert (
        rwkv("generate", base / "model", "--adapter", f"x={base / 'b'}", "--allow-other-base", *options).out == merged
    )
    assert rwkv("generate", base / "model", *options).out != merged


@pytest.mark.long
def test_evaluate_with_an_adapter_is_the_merged_model(rwkv: Command, base: Path, tmp_path: Path) -> None:
    options = ("--tasks", f"piqa={write_piqa(tmp_path / 'valid.jsonl')}", "--limit", "3", "--tune", "never", "--json")
    rwkv("merge", base / "model", base / "a", tmp_path / "m")
    adapted = json.loads(rwkv("evaluate", base / "model", "--adapter", base / "a", *options).out)
    merged = json.loads(rwkv("evaluate", tmp_path / "m", *options).out)
    assert adapted["tasks"][0]["metrics"] == merged["tasks"][0]["metrics"]
    assert adapted["model"]["hash"] != merged["model"]["hash"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "model", "--adapter", "a", "x=a"), "adapter: 2 are given; give one, or merge them"),
        (("generate", "model", "--adapter", "b"), "the adapter was trained on another base"),
        (("generate", "model", "--adapter-alpha", "3"), "--adapter-alpha 3.0: there is no --adapter; give one"),
        (("chat", "model", "--adapter", "nothing"), "there is no such file or folder"),
        (("serve", "model", "--adapter", "model=a"), "--adapter 'model': is the model's name; give another"),
        (("serve", "model", "--adapter", "a", "a"), "--adapter 'a': another one is called a; give it a name"),
    ],
)
def test_adapters_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, base: Path, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(base)
    with pytest.raises(SystemExit, match=message):
        main(list(arguments))


def test_a_read_adapter_is_that_of_the_folder(base: Path) -> None:
    adapter = open_adapter(base / "a")
    assert (adapter.kind, adapter.scales) == ("lora", {"blocks.1.ffn.value": 1.5})
