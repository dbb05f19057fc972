"""Ours against llama.cpp, which runs the GGUF files that we write, and whose blocks we compute: `make test-peers`."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax import from_pretrained
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.weights.ggml.gguf_file import read_gguf
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from tests.weights.files import assert_same_bits, logits_of, tensors_in, trained_like

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"
PROGRAM = ROOT / "tests" / "weights" / "llama_cpp_oracle.py"

SEVEN = ModelConfig(generation="7", vocab_size=97, num_layers=3, width=128)
CONFIGS = {generation: dataclasses.replace(SEVEN, generation=generation) for generation in ("6", "7")}
NUM_TOKENS, NUM_GREEDY = 50, 64

TEXTS = [
    "The Eiffel tower is in the city of Paris.\n\nUser: hi\n\nAssistant:",
    "  leading   and trailing \t\r\n\n",
    "<s></s> [PAD65530] [0] \\x00 \\n '\"` \\' \\\\ {}%$",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628",
    "\U0001f469\u200d\U0001f467 e\u0301 \u00e9 \ufb01 \u2460 \x01\x7f \u0e44\u0e17\u0e22",
    "def f(x):\n    return x ** 2  # 1234567890\n",
]


def llama_cpp(*arguments: object) -> None:
    """Runs the program in its environment."""
    assert PEER.is_file(), "make test-peers sets up the environment that this needs"
    done = subprocess.run([str(PEER), str(PROGRAM), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def asked(folder: Path, model: Path, questions: dict[str, Any]) -> dict[str, NDArray]:
    """What llama.cpp answers."""
    np.savez(folder / "questions.npz", **questions)
    llama_cpp(model, folder / "questions.npz", folder / "answers.npz")
    return dict(np.load(folder / "answers.npz"))


def model_in(folder: Path, config: ModelConfig, dtype: str | None = None) -> Path:
    write_torch_file(folder / "a.pth", trained_like(config))
    convert(folder / "a.pth", folder / "a.gguf", dtype=dtype)
    return folder / "a.gguf"


@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-4), ("bfloat16", 0.1), ("float16", 0.02), ("q8_0", 0.2)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_gives_our_logits_and_greedy_texts(
    tmp_path: Path, config: ModelConfig, dtype: str | None, bound: float
) -> None:
    """In float32 to 1e-4. In fewer bits, llama.cpp rounds the inputs of products, too."""
    path = model_in(tmp_path, config, dtype)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, NUM_TOKENS)
    theirs = asked(tmp_path, path, {"tokens": tokens, "num_greedy": NUM_GREEDY})
    text = np.concatenate([tokens, theirs["greedy"]])
    logits = logits_of(from_pretrained(path, dtype="float32"), text[None])[0]
    assert logits.std() > 0.3
    np.testing.assert_allclose(theirs["logits"], logits[:NUM_TOKENS], rtol=0, atol=bound)
    np.testing.assert_allclose(theirs["at_once"], logits[NUM_TOKENS - 1], rtol=0, atol=bound)
    if dtype is None:
        assert logits[NUM_TOKENS - 1 : -1].argmax(-1).tolist() == theirs["greedy"].tolist()


# File types of llama.cpp by number, each with the kinds of blocks that its mixture has.
MIXTURES = {
    "q4_0": (2, {"q4_0", "q6_k"}),
    "q4_1": (3, {"q4_1", "q6_k"}),
    "q5_0": (8, {"q5_0", "q6_k"}),
    "q5_1": (9, {"q5_1", "q6_k"}),
    "q8_0": (7, {"q8_0"}),
    "q2_k": (10, {"q2_k", "q6_k"}),
    "q3_k_m": (12, {"q3_k", "q6_k"}),
    "q4_k_m": (15, {"q4_k", "q6_k"}),
    "q5_k_m": (17, {"q5_k", "q6_k"}),
}


@pytest.mark.parametrize(("file_type", "kinds"), MIXTURES.values(), ids=MIXTURES)
def test_the_numbers_of_its_blocks_are_those_that_it_computes(tmp_path: Path, file_type: int, kinds: set[str]) -> None:
    config = dataclasses.replace(SEVEN, width=256, num_layers=2)  # rows of whole blocks
    blocks, numbers = tmp_path / "blocks.gguf", tmp_path / "numbers.gguf"
    llama_cpp(model_in(tmp_path, config), blocks, file_type, numbers)
    assert kinds <= {tensor.type.name for tensor in read_gguf(blocks).tensors.values()}
    assert {tensor.type.name for tensor in read_gguf(numbers).tensors.values()} == {"f32"}
    assert_same_bits(tensors_in(blocks), tensors_in(numbers))
    exact, found = tensors_in(tmp_path / "a.gguf"), tensors_in(blocks)
    assert 0 < max(np.abs(found[name] - exact[name]).max() for name in exact) < 0.5


def test_its_tokenizer_gives_the_ids_of_ours(tmp_path: Path) -> None:
    config = dataclasses.replace(SEVEN, vocab_size=2**16, width=64, num_layers=2)
    write_torch_file(tmp_path / "a.pth", trained_like(config))
    convert(tmp_path / "a.pth", tmp_path / "a.gguf", tokenizer="world")
    theirs = asked(tmp_path, tmp_path / "a.gguf", {"tokens": [0], "num_greedy": 1, "texts": TEXTS})
    world = WorldTokenizer()
    assert theirs["ids"].tolist() == [token for text in TEXTS for token in [*world.encode(text), -1]]
    assert theirs["ends"].tolist() == [0, world.encode("\n\n")[0]]
