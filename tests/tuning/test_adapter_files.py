"""Adapters in files: what peft and RWKV-PEFT wrote, what we write, hostile ones, and merging, against golden logits."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.models import LanguageModel
from rwkv_jax.tuning.adapter import Adapter, AdapterError
from rwkv_jax.tuning.files import open_adapter, save_adapter
from rwkv_jax.tuning.merge import check_adapters, merge_weights, merged_tensors
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.official import read_config
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import read_torch_file, write_torch_file
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors
from rwkv_jax.weights.tensors import WeightsError
from tests.golden import GOLDEN_DIR, QUICK, load_golden
from tests.weights.files import tensors_in

LORA = GOLDEN_DIR / "tuning" / "lora"
BASE = GOLDEN_DIR / "eval" / "base_v7_s0.safetensors"

THEIRS: dict[str, tuple[str, float | None]] = {
    "rwkvpeft_lora": ("rwkvpeft_lora_s0.pth", 12),
    "rwkvpeft_lora_ln": ("rwkvpeft_lora_ln_s0.pth", 12),
    "rwkvpeft_pissa": ("rwkvpeft_pissa_s0.pth", None),
    "rwkvpeft_bone": ("rwkvpeft_bone_s0.pth", None),
    "rwkvpeft_bat": ("rwkvpeft_bat_s0.pth", None),
    **{
        name: (f"{name}_s0", None)
        for name in ("hfpeft_lora", "hfpeft_rslora", "hfpeft_dora", "hfpeft_saved_modules", "hfpeft_miss", "hfpeft_bat")
    },
}
"""Each variant's file, and the alpha that it lacks."""


def opened(name: str) -> Adapter:
    file, alpha = THEIRS[name]
    return open_adapter(LORA / file, alpha=alpha)


@functools.cache
def logits_of_graph(graphdef: Any) -> Callable[[Any], Any]:
    tokens = load_golden("tuning/lora/lora_s0.npz")["tokens"]
    return jax.jit(lambda params: nnx.merge(graphdef, params)(tokens)[0], compiler_options=QUICK)


def off_by(name: str, model: LanguageModel) -> float:
    """Largest difference of a model's logits from golden ones."""
    golden = load_golden("tuning/lora/lora_s0.npz")
    logits = np.asarray(logits_of_graph(nnx.graphdef(model))(nnx.state(model, nnx.Param)))[:, golden["pos"]]
    whole = golden.get(f"{name}.logits")
    expected = golden[f"{name}.logits_at_pos"] if whole is None else whole[:, golden["pos"]]
    return float(np.abs(logits - expected).max())


@pytest.mark.parametrize("name", THEIRS)
def test_merged_logits_are_those_of_their_trainers(tmp_path: Path, name: str) -> None:
    with jax.enable_x64(True):
        merge_weights(BASE, [opened(name)], tmp_path / "m.safetensors", dtype="float64")
        assert off_by(name, from_pretrained(tmp_path / "m.safetensors")) < 1e-11


def test_merging_is_exact_in_float32(tmp_path: Path) -> None:
    merge_weights(BASE, [opened("hfpeft_lora")], tmp_path / "m.pth")
    found, parts = tensors_in(tmp_path / "m.pth"), opened("hfpeft_lora").parts["blocks.1.ffn.key"]
    low_rank = np.asarray(parts["lora_B"], np.float64) @ np.asarray(parts["lora_A"], np.float64)
    exact = np.float64(tensors_in(BASE)["blocks.1.ffn.key.weight"]) + 12 / 8 * low_rank
    np.testing.assert_array_equal(found["blocks.1.ffn.key.weight"], exact.astype(np.float32))
    assert {x.dtype for x in found.values()} == {np.dtype("float32")}
    assert off_by("hfpeft_lora", from_pretrained(tmp_path / "m.pth")) < 1e-5


def test_several_adapters_add_up_what_each_changes_times_its_weight() -> None:
    tensors = tensors_in(BASE)
    names = ("hfpeft_lora", "rwkvpeft_lora_ln", "hfpeft_dora", "hfpeft_bat")
    adapters, weights = [opened(name) for name in names], [0.5, -1.0, 1.0, 2.0]
    for tensor in ("blocks.1.att.key.weight", "blocks.0.ln1.weight", "emb.weight"):
        base = np.float64(tensors[tensor])
        alone = [np.float64(merged_tensors(tensors, [each], [1.0])[tensor]) for each in adapters]
        whole = merged_tensors(tensors, adapters, weights)[tensor]
        expected = base + sum(w * (x - base) for w, x in zip(weights, alone, strict=True))
        np.testing.assert_allclose(whole, expected, rtol=1e-14, atol=1e-15)


def written_and_read(adapter: Adapter, folder: Path, layout: str) -> Adapter:
    save_adapter(adapter, folder, read_config(tensors_in(BASE)), layout=layout, base="someone/base")
    return open_adapter(folder)


@pytest.mark.parametrize("layout", ["official", "flash-linear-attention", "huggingface"])
@pytest.mark.parametrize("name", [name for name in THEIRS if name != "rwkvpeft_bat"])
def test_what_we_write_is_what_was_read(tmp_path: Path, name: str, layout: str) -> None:
    first = dataclasses.replace(opened(name), base_digest="ab" * 32)
    again = written_and_read(first, tmp_path / "a", layout)
    assert (again.digest, again.base_digest, again.kind) == (first.digest, "ab" * 32, first.kind)
    with pytest.raises(AdapterError, match="exists already"):
        save_adapter(first, tmp_path / "a", read_config(tensors_in(BASE)))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"
    end = {"flash-linear-attention": "attn.r_proj"}.get(layout, "att.receptance")
    assert end in config["target_modules"]


def test_adapters_of_some_layers_name_their_modules_whole(tmp_path: Path) -> None:
    whole = opened("hfpeft_rslora")
    first = dataclasses.replace(whole, parts={name: x for name, x in whole.parts.items() if "blocks.1" in name})
    written_and_read(first, tmp_path / "a", "flash-linear-attention")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.1.attn.{x}_proj" for x in "korv"]
    assert config["rank_pattern"] == {r"model\.layers\.1\.attn\.k_proj": 4}
    assert config["alpha_pattern"] == {r"model\.layers\.1\.attn\.v_proj": 5}


@pytest.mark.parametrize(
    ("adapter", "layout", "message"),
    [
        (lambda: opened("rwkvpeft_bat"), "official", "kind = 'bat': peft's blocks are those of outputs"),
        (lambda: opened("hfpeft_lora"), "transformers", "layout = 'transformers': has no RWKV-7"),
        (lambda: Adapter("lora", {}, {}, {"blocks.0.att.x_r": np.ones((1, 1, 128))}), "official", "is no module"),
    ],
)
def test_what_peft_has_no_place_for(tmp_path: Path, adapter: Callable[[], Adapter], layout: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        save_adapter(adapter(), tmp_path / "a", read_config(tensors_in(BASE)), layout=layout)
    assert not (tmp_path / "a").exists()


# Broken and hostile files.


def changed_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def changed_tensors(folder: Path, change: Callable[[dict[str, NDArray]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: np.array(x) for name, x in read_safetensors(path).items()}
    change(tensors)
    path.unlink()
    write_safetensors(path, tensors)


KEY = "base_model.model.model.layers.0.attn.k_proj"

BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another rank": (lambda folder: changed_config(folder, r=9), "r = 9: .* has rank 8"),
    "no rank": (lambda folder: changed_config(folder, r=None), "r = None: must be a number above zero"),
    "alpha NaN": (lambda folder: changed_config(folder, lora_alpha=float("nan")), "lora_alpha = nan"),
    "another kind": (lambda folder: changed_config(folder, peft_type="LOHA"), "peft_type = 'LOHA'"),
    "PiSSA": (lambda folder: changed_config(folder, init_lora_weights="pissa_niter_4"), "taken out of the base"),
    "transposed": (lambda folder: changed_config(folder, fan_in_fan_out=True), "fan_in_fan_out = True: is not read"),
    "endless pattern": (lambda folder: changed_config(folder, rank_pattern={"(a+)+b": 4}), "pattern .* is not read"),
    "many wildcards": (
        lambda folder: changed_config(folder, rank_pattern={".*" * 15 + "X": 4}),
        "rank_pattern: the pattern .* is not read",
    ),
    "many alternatives": (
        lambda folder: changed_config(folder, alpha_pattern={"(.|.)" * 26 + "X": 4}),
        "alpha_pattern: the pattern .* is not read",
    ),
    "rank beside a pattern of its name": (
        lambda folder: changed_config(folder, r="x", rank_pattern={"r": 8}),
        "r = 'x': must be a number above zero",
    ),
    "alpha beside a pattern of its name": (
        lambda folder: changed_config(folder, lora_alpha="x", alpha_pattern={"lora_alpha": 8}),
        "lora_alpha = 'x': must be a number above zero",
    ),
    "alpha beyond floats": (
        lambda folder: changed_config(folder, lora_alpha=10**400),
        "lora_alpha = 1000.*: must be a number above zero",
    ),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "JSON cannot be understood"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has neither adapter_model"),
    "cut off": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x40" + bytes(7) + b"{"),
        "is not a whole safetensors file",
    ),
    "half": (
        lambda folder: changed_tensors(folder, lambda x: x.pop(f"{KEY}.lora_B.weight")),
        "blocks.0.att.key: lora_B is missing",
    ),
    "not finite": (
        lambda folder: changed_tensors(folder, lambda x: x[f"{KEY}.lora_B.weight"].fill(np.inf)),
        "lora_B: has numbers that are not finite",
    ),
    "unknown target": (
        lambda folder: changed_tensors(
            folder, lambda x: x.update({f"{KEY}2.lora_B.weight": x.pop(f"{KEY}.lora_B.weight")})
        ),
        "target 'model.layers.0.attn.k_proj2': is no matrix of RWKV",
    ),
    "low-rank map": (
        lambda folder: changed_tensors(
            folder,
            lambda x: x.update({KEY.replace("k_proj", "w_lora.lora.0.lora_A.weight"): x[f"{KEY}.lora_A.weight"]}),
        ),
        "low-rank maps and vectors are not adapted",
    ),
    "another prefix": (lambda folder: changed_tensors(folder, lambda x: x.update(a=np.ones(1))), "does not begin with"),
    "not an adapter's": (
        lambda folder: changed_tensors(folder, lambda x: x.update({"base_model.model.a": np.ones(1)})),
        "neither of an adapter nor of RWKV",
    ),
    "saved unannounced": (
        lambda folder: changed_tensors(
            folder, lambda x: x.update({"base_model.model.lm_head.weight": np.ones((300, 128), np.float32)})
        ),
        "modules_to_save = .*: and yet there are whole tensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_by_name(tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(LORA / "hfpeft_lora_s0", tmp_path / "a", copy_function=shutil.copyfile)
    folder.chmod(0o755)
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(WeightsError, match=message):
        open_adapter(folder)


def pth(path: Path, change: Callable[[dict[str, NDArray]], Any], of: str = "rwkvpeft_lora_s0.pth") -> Path:
    tensors = {name: np.array(x) for name, x in read_torch_file(LORA / of).tensors.items()}
    change(tensors)
    write_torch_file(path / "adapter.pth", tensors)
    return path / "adapter.pth"


def test_alpha_is_asked_for_where_it_is_missing_and_only_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"rwkvpeft_lora_s0.pth: adapter_alpha is missing: RWKV-PEFT's LoRA files"):
        open_adapter(LORA / "rwkvpeft_lora_s0.pth")
    for file in ("rwkvpeft_bone_s0.pth", "rwkvpeft_pissa_s0.pth", "hfpeft_lora_s0"):
        with pytest.raises(AdapterError, match=r"adapter_alpha = 12: .*leave it out"):
            open_adapter(LORA / file, alpha=12)
    with pytest.raises(AdapterError, match=r"adapter_init = 'init\.pth': kind = 'miss', which has none; leave it out"):
        open_adapter(LORA / "rwkvpeft_bone_s0.pth", init="init.pth")
    with pytest.raises(AdapterError, match=r"adapter_alpha = -1: must be a number above zero"):
        open_adapter(LORA / "rwkvpeft_lora_s0.pth", alpha=-1)
    with pytest.raises(WeightsError, match=r"adapter_alpha = 1: there is no adapter"):
        from_pretrained(BASE, adapter_alpha=1)


def test_broken_files_of_rwkv_peft(tmp_path: Path) -> None:
    half = pth(tmp_path / "half", lambda x: x.pop("blocks.0.att.key.lora_A"))
    with pytest.raises(AdapterError, match=r"blocks.0.att.key: lora_A is missing"):
        open_adapter(half, alpha=8)
    mixed = pth(tmp_path / "mixed", lambda x: x.update({"blocks.0.att.gate.disha": np.ones((4, 128), np.float32)}))
    with pytest.raises(AdapterError, match=r"kinds are mixed \(blocks.0.att.receptance is lora, blocks.0.att.gate is"):
        open_adapter(mixed, alpha=8)
    alone = pth(tmp_path / "pissa", lambda x: x.popitem(), of="rwkvpeft_pissa_init_s0.pth")
    with pytest.raises(AdapterError, match=r"init_lora_B is missing|must be|lacks|is missing"):
        open_adapter(LORA / "rwkvpeft_pissa_s0.pth", init=alone)
    for source, message in (
        ("https://a.b/c", "is a web address"),
        (tmp_path / "nothing", "there is no such file"),
        (tmp_path, "has no adapter_config.json"),
        ("", "name the folder of an adapter"),
    ):
        with pytest.raises(AdapterError, match=message):
            open_adapter(source)


def checked(adapter: Adapter, tensors: Mapping[str, NDArray], **options: Any) -> None:
    check_adapters([adapter], tensors, read_config(tensors), **options)


def test_an_adapter_of_another_base_is_refused() -> None:
    tensors = tensors_in(BASE)
    adapter = dataclasses.replace(opened("hfpeft_lora"), base_digest=weights_digest(tensors))
    checked(adapter, tensors)
    checked(adapter, {name: x.astype(np.float32) for name, x in tensors.items()})  # the same numbers
    other = tensors | {"head.weight": tensors["head.weight"] * 2}
    with pytest.raises(AdapterError, match=r"base_digest = [0-9a-f]{16}.*was trained on another base"):
        checked(adapter, other)
    checked(adapter, other, allow_other_base=True)
    narrow = dict(tensors)
    for i in (0, 1):
        narrow[f"blocks.{i}.ffn.key.weight"] = tensors[f"blocks.{i}.ffn.key.weight"][:256]
        narrow[f"blocks.{i}.ffn.value.weight"] = tensors[f"blocks.{i}.ffn.value.weight"][:, :256]
    with pytest.raises(AdapterError, match=r"blocks.0.ffn.key.lora_B is \[512, 8\], must be \[256, 8\]"):
        checked(adapter, narrow)


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("blocks.0.att.key", {"lora_A": (129, 128), "lora_B": (128, 129)}, "rank 129 is above the matrix"),
        ("blocks.7.att.key", {"lora_A": (1, 128), "lora_B": (128, 1)}, "the base has no such matrix"),
        ("emb", {"lora_A": (1, 128), "lora_B": (300, 1)}, "the base has no such matrix that can be adapted"),
    ],
)
def test_an_adapter_that_does_not_fit(name: str, parts: dict[str, tuple[int, int]], message: str) -> None:
    adapter = Adapter("lora", {name: {part: np.ones(shape) for part, shape in parts.items()}}, {name: 1.0})
    with pytest.raises(AdapterError, match=message):
        checked(adapter, tensors_in(BASE))


def test_quantized_bases_are_merged_only_if_that_is_said(tmp_path: Path) -> None:
    convert(BASE, tmp_path / "plain.safetensors", dtype="float32")
    save_pretrained(from_pretrained(tmp_path / "plain.safetensors", quantize="int8"), tmp_path / "int8.safetensors")
    adapter = opened("hfpeft_lora")
    with pytest.raises(AdapterError, match="its matrices are quantized"):
        merge_weights(tmp_path / "int8.safetensors", [adapter], tmp_path / "m.pth")
    merge_weights(tmp_path / "int8.safetensors", [adapter], tmp_path / "m.pth", dequantize=True)
    merged, original = (tensors_in(path)["head.weight"] for path in (tmp_path / "m.pth", BASE))
    assert np.abs(merged - np.float32(original)).max() > 1e-4
