"""The README's Python, run as it stands but for the paths of models that only its reader has."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

from rwkv_jax import RWKV7, ModelConfig, save_pretrained
from tests.programs import compiled_quickly

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme") / "model.safetensors"
    config = ModelConfig(vocab_size=257, num_layers=2, width=32, head_dim=16)
    save_pretrained(RWKV7(config, rngs=nnx.Rngs(0)), path)
    return path


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=name, marks=() if name == "first screen" else pytest.mark.long)
        for name, block in zip(("first screen", "run", "library"), BLOCKS, strict=True)
    ],
)
def test_python_in_the_readme_runs(block: str, weights: Path) -> None:
    for name in ("runs/python_stdlib", "RWKV-x070-World-0.1B.pth"):
        block = block.replace(f'from_pretrained("{name}"', f'from_pretrained("{weights}"')
    block = re.sub(r'load_tokenizer\("[^"]+"', 'load_tokenizer("bytes"', block).replace(
        "max_tokens=200", "max_tokens=4"
    )
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), compiled_quickly():
        exec(compile(block, str(README), "exec"), names)
    assert names["y"].ndim == 4 if "wkv7" in names else names["engine"] is not None
