"""`rwkv convert`: what it writes, and what it says."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from rwkv_jax import from_pretrained, run_folder
from rwkv_jax.cli.convert import Convert
from rwkv_jax.cli.merge import Merge
from rwkv_jax.models import LanguageModel
from rwkv_jax.weights import pretrained
from rwkv_jax.weights.layouts import LAYOUTS
from rwkv_jax.weights.quantized import Quantization
from tests.cli.commands import Command
from tests.weights.files import assert_same_bits, tensors_in


def params_of(model: LanguageModel) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("command", [Convert, Merge])
def test_all_layouts_are_choices(command: type) -> None:
    assert typing.get_args(inspect.get_annotations(command, eval_str=True)["layout"]) == LAYOUTS


def test_a_run_becomes_official_weights_and_says_so(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    printed = rwkv("convert", run_dir, tmp_path / "a", "--layout", "flash-linear-attention").out
    assert printed.startswith(f"{tmp_path / 'a'}: RWKV-7 2 x 32, ")
    assert printed.endswith("vocabulary 300, flash-linear-attention names\n")
    written = {"README.md", "config.json", "model.safetensors", "tokenizer.model"}
    assert written == {p.name for p in (tmp_path / "a").iterdir()}
    rwkv("convert", tmp_path / "a", tmp_path / "b.pth", "--dtype", "bfloat16")
    newest = run_folder.load_model(run_dir, "newest")
    ours = from_pretrained(tmp_path / "b.pth", dtype="float32")
    expected = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), newest.params)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(ours, nnx.Param)), expected)


def test_a_run_goes_back_to_the_official_trainer(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    rwkv("convert", run_dir, tmp_path / "a.pth")
    rwkv("convert", run_dir, tmp_path / "b.pth", "--layout", "official", "--with-unused")
    ours, theirs = (tensors_in(tmp_path / name) for name in ("a.pth", "b.pth"))
    assert theirs.keys() - ours.keys() == {f"blocks.0.att.v{i}" for i in range(3)}
    assert not any(theirs[name].any() for name in theirs.keys() - ours.keys())
    assert_same_bits({name: theirs[name] for name in ours}, ours)


def test_a_run_s_folder_has_a_card_with_its_license(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    rwkv("convert", run_dir, tmp_path / "a", "--license", "apache-2.0")
    rwkv("convert", run_dir, tmp_path / "b", "--quantize", "int8", "--license", "mit")
    for name, license in (("a", "apache-2.0"), ("b", "mit")):
        text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert f'license: "{license}"' in text
        assert "| made of | a run of rwkv train |" in text
        assert "| steps | 8 of 1,000 |" in text
        assert "| data | source.py |" in text
        assert str(run_dir.parent) not in text
    with pytest.raises(SystemExit, match=r"--license 'mit': only a folder has a model card, which states it"):
        rwkv("convert", run_dir, tmp_path / "c.pth", "--license", "mit")
    with pytest.raises(SystemExit, match=r"--license 'MIT': must be the hub's identifier"):
        rwkv("convert", run_dir, tmp_path / "c", "--license", "MIT", "--quantize", "int8")


@pytest.mark.parametrize("quantize", ["int8", "int4", "bfloat16"])
def test_matrices_in_fewer_bits(rwkv: Command, run_dir: Path, tmp_path: Path, quantize: Quantization) -> None:
    printed = rwkv("convert", run_dir, tmp_path / "folder", "--quantize", quantize).out
    assert printed.endswith(f"vocabulary 300, official names, matrices in {quantize}\n")
    assert {"README.md", "model.safetensors", "tokenizer.model"} == {p.name for p in (tmp_path / "folder").iterdir()}
    rwkv("convert", run_dir, tmp_path / "a.pth")
    rwkv("convert", tmp_path / "a.pth", tmp_path / "file.safetensors", "--quantize", quantize)
    expected = params_of(from_pretrained(run_dir, quantize=quantize))
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        jax.tree.map(np.testing.assert_array_equal, params_of(from_pretrained(path)), expected)


@pytest.mark.parametrize(
    ("target", "flags", "message"),
    [
        ("a.safetensors", ["--dtype", "float16"], "rwkv: --quantize 'int8': decides what tensors are in"),
        ("a", ["--layout", "flash-linear-attention"], "rwkv: --quantize 'int8': decides what tensors are in"),
        ("a", ["--with-unused"], r"decides what tensors are in.*; leave --dtype, --layout and --with-unused out"),
        (
            "a.pth",
            [],
            r"rwkv: --quantize 'int8': \.pth files have no place for packed matrices; name",
        ),
        ("there", [], "there: exists already and is not overwritten"),
        ("a.safetensors", ["--tokenizer", "world"], r"a\.safetensors: a tokenizer is written beside the weights"),
        ("a", ["--tokenizer", "world"], "a run has its own tokenizer; leave --tokenizer out"),
    ],
    ids=str,
)
def test_what_cannot_be_quantized_is_said_before_it_is_loaded(
    rwkv: Command,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    flags: list[str],
    message: str,
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("is loaded")

    monkeypatch.setattr(pretrained, "from_pretrained", load)
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit, match=message):
        rwkv("convert", run_dir, tmp_path / target, "--quantize", "int8", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_tokenizer_that_does_not_fit_is_said_before_weights_are_quantized(
    rwkv: Command, run_dir: Path, tmp_path: Path
) -> None:
    rwkv("convert", run_dir, tmp_path / "a.pth")
    with pytest.raises(SystemExit, match="--tokenizer 'bytes': does not match, it has 257 entries"):
        rwkv("convert", tmp_path / "a.pth", tmp_path / "b", "--quantize", "int8", "--tokenizer", "bytes")
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_done_is_said(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ((run_dir, tmp_path / "there"), "there: exists already and is not overwritten"),
        ((tmp_path / "nowhere.pth", tmp_path / "a"), r"nowhere\.pth: no such file or folder"),
        ((run_dir, tmp_path / "a", "--layout", "transformers"), "RWKV-7"),
    ):
        with pytest.raises(SystemExit, match=message):
            rwkv("convert", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
