"""Hugging Face's peft loads the folders that we write, and we load its own: `make test-peers`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.tuning.adapter import Adapter
from rwkv_jax.tuning.files import open_adapter, save_adapter
from rwkv_jax.tuning.merge import merged_tensors
from rwkv_jax.weights.layouts import to_layout
from rwkv_jax.weights.official import read_config
from rwkv_jax.weights.pretrained import convert
from tests.tuning.test_adapter_files import BASE, THEIRS, opened
from tests.weights.files import tensors_in

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"
FLA = "flash-linear-attention"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    convert(BASE, folder / "model", layout=FLA, dtype="float32")
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((3, 512)))
    return folder


def run_peer(base: Path, *arguments: object) -> None:
    assert PEER.is_file(), "make test-peers sets up the environment that this needs"
    program = [PEER, ROOT / "tests" / "tuning" / "peft_oracle.py", base / "model" / "model.safetensors"]
    command = [*map(str, program), str(base / "x.npy"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning: Found missing adapter keys" not in done.stderr


def assert_agree(base: Path, adapter: Adapter, theirs: dict[str, NDArray], **tolerance: Any) -> None:
    """Each module's outputs are those of our merged matrix."""
    x, tensors = np.load(base / "x.npy"), {name: x.astype(np.float64) for name, x in tensors_in(BASE).items()}
    ours = to_layout(dict(merged_tensors(tensors, [adapter], [1.0])), FLA)
    assert len(theirs) == 13
    for module, output in theirs.items():
        weight = ours[f"{module}.weight"]
        np.testing.assert_allclose(x[:, : weight.shape[1]] @ weight.T, output, err_msg=module, **tolerance)


def test_they_load_what_we_write(base: Path, tmp_path: Path) -> None:
    names = [name for name in THEIRS if name not in ("rwkvpeft_bat", "rwkvpeft_lora_ln")]
    for name in names:
        save_adapter(opened(name), tmp_path / name, read_config(tensors_in(BASE)), layout=FLA)
    run_peer(base, *(tmp_path / name for name in names))
    for name in names:
        theirs = dict(np.load(tmp_path / name / "theirs.npz"))
        assert_agree(base, opened(name), theirs, rtol=1e-9, atol=1e-9)


def test_we_load_what_they_write(base: Path, tmp_path: Path) -> None:
    run_peer(base, "--make", tmp_path)
    kinds = {"lora": "lora", "rslora": "rslora", "dora": "dora", "saved": "lora", "miss": "miss", "bat": "bat"}
    for name, kind in kinds.items():
        adapter = open_adapter(tmp_path / name)
        assert (adapter.kind, set(adapter.replaced)) == (kind, {"head.weight"} if name == "saved" else set())
        assert_agree(base, adapter, dict(np.load(tmp_path / name / "theirs.npz")), rtol=1e-9, atol=1e-9)
