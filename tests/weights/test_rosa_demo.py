"""The official demonstrations of RWKV-7 with ROSA: their names, and a head with a bias, which ours have not."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from rwkv_jax.weights.pretrained import from_pretrained
from rwkv_jax.weights.sources import open_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, logits_of, trained_like

CONFIG = CONFIGS["7-rosa"]
OUTER = {"emb": "e", "ln_out": "lno", "head": "o"}
PARTS = {"att": "rwkv{}", "rosa": "rosa{}", "ffn": "ffn{}", "ln1": "ln{}a", "ln2": "ln{}b", "ln3": "ln{}c"}


def demo_of(tensors: dict[str, NDArray]) -> dict[str, NDArray]:
    """Official tensors under a demonstration's names."""
    found = {}
    for name, x in tensors.items():
        first, *rest = name.split(".")
        if first == "blocks":
            layer, part, *rest = rest
            first = PARTS[part].format(int(layer) + 1)
        found[".".join([OUTER.get(first, first), *rest])] = x
    return found


def test_a_head_with_a_bias_is_one_without(tmp_path: Path) -> None:
    tensors = trained_like(CONFIG)
    bias = np.random.default_rng(0).standard_normal(len(tensors["head.weight"])).astype(np.float32)
    demo = demo_of(tensors)
    assert {"e.weight", "ln1a.bias", "rwkv3.w1", "rosa2.rosa_qkv.emb", "ffn1.x_k", "ln3c.weight", "o.weight"} <= set(
        demo
    )
    save_file(demo | {"o.bias": bias}, tmp_path / "demo.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    tokens = jnp.arange(24).reshape(2, 12) % 29
    with jax.enable_x64(True):
        found = from_pretrained(tmp_path / "demo.safetensors", dtype="float64")
        plain = from_pretrained(tmp_path / "plain.safetensors", dtype="float64")
        np.testing.assert_allclose(logits_of(found, tokens), logits_of(plain, tokens) + bias, rtol=0, atol=1e-12)
    assert open_weights(tmp_path / "demo.safetensors").layout == "rosa-demo"
    assert from_pretrained(tmp_path / "demo.safetensors").config.resolved() == CONFIG.resolved()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ln1d.weight": (32,)}, "beside a demonstration of ROSA are names that it has not: ln1d.weight"),
        ({"o.bias": (7,)}, "o.weight [29, 32], o.bias [7] and lno.bias do not go together"),
        (
            {"o.weight": (60, 32), "e.weight": (60, 32), "o.bias": (60,)},
            "the head, 60 ids of width 32, cannot do without",
        ),
    ],
)
def test_what_no_model_of_ours_has_is_refused(tmp_path: Path, change: dict[str, tuple[int, ...]], said: str) -> None:
    draws = np.random.default_rng(0)
    demo = demo_of(trained_like(CONFIG)) | {"o.bias": np.ones(29, np.float32)}
    demo |= {name: draws.standard_normal(shape).astype(np.float32) for name, shape in change.items()}
    save_file(demo, tmp_path / "demo.safetensors")
    with pytest.raises(WeightsError, match=re.escape(said)):
        from_pretrained(tmp_path / "demo.safetensors")
