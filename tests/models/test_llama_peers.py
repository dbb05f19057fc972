"""transformers, run again, gives the numbers in tests/golden/llama: `make test-peers`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.golden import GOLDEN_DIR, assert_close, load_golden
from tests.models.test_llama_golden import CASES

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"


def test_the_golden_numbers_are_what_transformers_gives(tmp_path: Path) -> None:
    assert PEER.is_file(), "make test-peers sets up the environment that this needs"
    command = [str(PEER), str(ROOT / "tests" / "models" / "llama_oracle.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        with np.load(tmp_path / f"{case}.npz") as file:
            assert_close(dict(file), load_golden(f"llama/{case}.npz"), 1e-6)
    for folder in ("qwen3", "llama3"):
        for name in ("greedy.json", "tokenizer.json"):
            assert (tmp_path / folder / name).read_bytes() == (GOLDEN_DIR / "llama" / folder / name).read_bytes()
    found, expected = ({path.name for path in folder.iterdir()} for folder in (tmp_path, GOLDEN_DIR / "llama"))
    assert found == expected - {"README.md"}
