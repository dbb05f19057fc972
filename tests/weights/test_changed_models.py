"""Files of models that others have changed: adapters merged or not, layers and widths and ids pruned."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax import from_pretrained
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import write_safetensors
from rwkv_jax.weights.sources import open_weights
from rwkv_jax.weights.summary import summarize, unusual
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, assert_same_bits, logits_of, random_tensors, tensors_in, trained_like

CONFIG = CONFIGS["7"]
TOKENS = np.arange(12)[None]
Tensors = dict[str, NDArray]


def test_merged_adapters_leave_some_layers_in_float32(tmp_path: Path) -> None:
    """As scripts merge that add B A in float32 to the matrices of some layers, which they write first."""
    rng = np.random.default_rng(0)
    tensors = random_tensors(CONFIG, "bfloat16")
    merged: Tensors = {}
    for name in ("blocks.1.att.key.weight", "blocks.2.ffn.value.weight"):
        rows, columns = tensors[name].shape
        change = rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns))
        merged[name] = (tensors[name].astype(np.float64) + 0.01 * change).astype(np.float32)
    merged |= {name: x for name, x in tensors.items() if name not in merged}
    write_torch_file(tmp_path / "merged.pth", merged)
    summary = summarize(tmp_path / "merged.pth")
    assert summary is not None
    assert "several dtypes; float32: blocks.1.att.key.weight, blocks.2.ffn.value.weight" in unusual(summary)
    write_torch_file(tmp_path / "wide.pth", {name: x.astype(np.float32) for name, x in merged.items()})
    found, expected = (logits_of(from_pretrained(tmp_path / f"{name}.pth"), TOKENS) for name in ("merged", "wide"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    convert(tmp_path / "merged.pth", tmp_path / "b.safetensors")
    assert_same_bits(tensors_in(tmp_path / "b.safetensors"), merged)


def _lora(layer: int) -> Tensors:
    name = f"blocks.{layer}.att.key"
    return {f"{name}.lora_A": np.ones((4, 32), np.float32), f"{name}.lora_B": np.ones((32, 4), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_lora(0), r"blocks\.0\.att\.key\.lora_A, .*lora_B are of an adapter that is not merged: rwkv merge"),
        (random_tensors(CONFIG) | _lora(2), r"blocks\.2\.att\.key\.lora_A, .* are of an adapter that is not merged"),
        ({"blocks.0.ffn.key.disha": np.ones((4, 48), np.float32)}, r"ffn\.key\.disha are of an adapter"),
        ({"base_model.model.head.lora_A.weight": np.ones((4, 32), np.float32)}, r"lora_A\.weight are of an adapter"),
        ({"blocks.0.att.time_state": np.ones((4, 8, 8), np.float32)}, "are a tuned state: name the model, and this"),
    ],
    ids=["lora", "lora beside its model", "bone", "peft", "state"],
)
def test_what_is_not_merged_is_named_with_what_merges_it(tmp_path: Path, tensors: Tensors, message: str) -> None:
    write_safetensors(tmp_path / "a.safetensors", tensors)
    for opens in (open_weights, summarize):
        with pytest.raises(WeightsError, match=message):
            opens(tmp_path / "a.safetensors")


def _renumbered(tensors: Tensors, layers: list[int]) -> Tensors:
    """With only these layers, numbered anew."""
    kept = {f"blocks.{old}.": f"blocks.{new}." for new, old in enumerate(layers)}
    outer = {name: x for name, x in tensors.items() if not name.startswith("blocks.")}
    return outer | {
        new + name.removeprefix(old): x
        for old, new in kept.items()
        for name, x in tensors.items()
        if name.startswith(old)
    }


def _narrow_ffn(tensors: Tensors, layers: str) -> Tensors:
    """Of which the feed-forward layers lack their last eight units."""

    def narrowed(name: str, x: NDArray) -> NDArray:
        if re.fullmatch(rf"blocks\.{layers}\.ffn\.key\.weight", name):
            return x[:-8]
        return x[:, :-8] if re.fullmatch(rf"blocks\.{layers}\.ffn\.value\.weight", name) else x

    return {name: narrowed(name, x) for name, x in tensors.items()}


def _cut_vocabulary(tensors: Tensors, *names: str) -> Tensors:
    return tensors | {name: tensors[name][:20] for name in names}


@pytest.mark.parametrize(
    ("prune", "sizes"),
    [
        (lambda x: _renumbered(x, [0, 2]), {"num_layers": 2}),
        (lambda x: _narrow_ffn(x, "[0-9]"), {"ffn_width": 40}),
        (lambda x: _cut_vocabulary(x, "emb.weight", "head.weight"), {"vocab_size": 20}),
    ],
    ids=["layers", "feed-forward units", "ids"],
)
def test_a_pruned_model_is_one_of_its_sizes(
    tmp_path: Path, prune: Callable[[Tensors], Tensors], sizes: dict[str, int]
) -> None:
    tensors = prune(trained_like(CONFIG))
    write_torch_file(tmp_path / "a.pth", tensors)
    model = from_pretrained(tmp_path / "a.pth")
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    assert np.isfinite(logits_of(model, TOKENS)).all()
    summary = summarize(tmp_path / "a.pth")
    assert summary is not None
    assert summary.is_regular
    convert(tmp_path / "a.pth", tmp_path / "b.pth")
    assert_same_bits(tensors_in(tmp_path / "b.pth"), tensors)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (
            lambda x: {name: tensor for name, tensor in x.items() if not name.startswith("blocks.1.")},
            r"of the layers 0 to 2, these are missing: 1; .* if they were pruned, number those that are left",
        ),
        (lambda x: _narrow_ffn(x, "1"), r"blocks\.1\.ffn\.key\.weight is \[40, 32\], must be \[48, 32\]"),
        (lambda x: _cut_vocabulary(x, "head.weight"), r"head\.weight is \[20, 32\], must be \[29, 32\]"),
    ],
    ids=["a gap", "one layer narrower", "the head alone"],
)
def test_what_is_pruned_unevenly_is_refused(tmp_path: Path, prune: Callable[[Tensors], Tensors], message: str) -> None:
    write_torch_file(tmp_path / "a.pth", prune(random_tensors(CONFIG)))
    with pytest.raises(WeightsError, match=message):
        from_pretrained(tmp_path / "a.pth")
