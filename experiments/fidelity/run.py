"""Is it the same model elsewhere? Logits of ours beside the official package's, transformers' and llama.cpp's.

    python -m experiments.fidelity.run --rwkv-python PATH --llama-python PATH --transformers-python PATH

Each PATH is an interpreter of an environment of its own: benchmarks/peers_rwkv.py and peers_llama.py say how to make
the first two, the third has torch and transformers. One that is not given leaves its rows out, and the JSON says so.
Every row is one random model, written by us in the peer's own format, which the peer reads as its users would; tokens
are random. Compared are the logits after each token, read one at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from experiments import common
from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.bench.random_model import RandomTensors
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel
from rwkv_jax.weights.pth.file import write_torch_file

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-3
"""In float32, for logits of deviation about 1."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A pair that is compared."""

    peer: str
    model: str
    """A key of GENERATIONS."""
    what: str
    """How the peer computes."""


RWKV, LLAMA, TRANSFORMERS = "rwkv", "llama", "transformers"
PACKAGES = {RWKV: "rwkv", LLAMA: "llama_cpp_python", TRANSFORMERS: "transformers"}
ROWS = (
    Row("ours", "RWKV-4", "float32, from the file, all tokens at once"),
    Row("ours", "RWKV-7", "float32, from the file, all tokens at once"),
    *(Row(RWKV, model, "float32") for model in common.GENERATIONS),
    Row(LLAMA, "RWKV-7", "f32"),
    Row(LLAMA, "RWKV-7", "q8_0"),
    Row(TRANSFORMERS, "RWKV-4", "float32"),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and the text."""

    models: tuple[str, ...] = tuple(common.GENERATIONS)
    num_layers: int = 4
    width: int = 256
    head_dim: int = 64
    vocab_size: int = 512
    num_tokens: int = 64


SMALL = Sizes()
SMALLEST = Sizes(models=("RWKV-4",), num_layers=2, width=64, vocab_size=11, num_tokens=5)


def ours_at_once(path: Path, tokens: NDArray) -> NDArray:
    """[T, V] by the model read from a file, all tokens in one call."""
    return np.asarray(from_pretrained(path)(jnp.asarray(tokens[None])).logits[0])


def ours_one_by_one(model: LanguageModel, tokens: NDArray) -> NDArray:
    """[T, V] by a call for each token."""
    import jax
    from flax import nnx

    graphdef, params = nnx.split(model, nnx.Param)
    step = jax.jit(lambda params, token, state: tuple(nnx.merge(graphdef, params)(token, state)))
    state, rows = model.initial_state(1), []
    for token in tokens:
        logits, state = step(params, jnp.full((1, 1), token, jnp.int32), state)
        rows.append(np.asarray(logits[0, 0]))
    return np.stack(rows)


def official(python: str, config: ModelConfig, folder: Path) -> NDArray:
    """By the `rwkv` package from our .pth file, one token a call."""
    program = ROOT / "tests" / "weights" / "pip_oracle.py"
    files = [str(folder / name) for name in ("model.pth", "tokens.npy", "theirs.npz", "again.pth")]
    subprocess.run([python, str(program), config.generation[0], *files], check=True, capture_output=True)
    return np.load(files[2])["logits_one_by_one"]


TRANSFORMERS_PROGRAM = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens, state, rows = numpy.load(sys.argv[2]), None, []
with torch.no_grad():
    for token in tokens.tolist():
        out = model(torch.tensor([[token]]), state=state, use_cache=True)
        state = out.state
        rows.append(out.logits[0, -1].numpy())
numpy.save(sys.argv[3], numpy.stack(rows))
"""


def transformers(python: str, folder: Path) -> NDArray:
    """By transformers from our folder in its layout, one token a call."""
    save_pretrained(from_pretrained(folder / "model.pth"), folder / "hub", layout="transformers")
    files = [str(folder / name) for name in ("hub", "tokens.npy", "transformers.npy")]
    subprocess.run([python, "-c", TRANSFORMERS_PROGRAM, *files], check=True, capture_output=True)
    return np.load(files[2])


@contextlib.contextmanager
def benchmarks_importable() -> Iterator[None]:
    """The programs of peers and their driver, which stand in benchmarks/."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def llama(python: str, precision: str, config: ModelConfig, folder: Path) -> NDArray:
    """By llama.cpp from our GGUF file, one token a call."""
    with benchmarks_importable():
        from decode_cpu import write_for_llama
        from peers_processes import PeerProcess
        from peers_protocol import Job, Request

    if not (folder / "model.gguf").exists():
        write_for_llama(folder / "model.pth", config)
    tokens = folder / "tokens.npy"
    length = len(np.load(tokens))
    job = Job(str(folder / "model.pth"), precision, 1, length, threads=1, scratch=str(folder))
    process = PeerProcess(python, "peers_llama.py", dataclasses.asdict(job), folder / "llama.log", {})
    try:
        process.answer()
        output = folder / f"{precision}.npz"
        process.ask(dataclasses.asdict(Request("check", str(tokens), 1, length, str(output))))
    finally:
        process.close()
    return np.load(output)["decode"]


def compare(found: NDArray, expected: NDArray) -> dict[str, float]:
    """How far logits [T, V] are from ours."""
    difference = found.astype(float) - expected
    return {
        "largest": float(np.abs(difference).max()),
        "share_of_deviation": float(np.sqrt(np.mean(difference**2)) / expected.std()),
        "same_choice": float(np.mean(found.argmax(-1) == expected.argmax(-1))),
    }


def measure(sizes: Sizes, pythons: Mapping[str, str] | None = None) -> common.Results:
    """Differences of each row from ours in float32; a row says so if its peer's interpreter is not among `pythons`."""
    pythons = pythons or {}
    shape: dict[str, Any] = {"vocab_size": sizes.vocab_size, "num_layers": sizes.num_layers, "width": sizes.width}
    tokens = np.random.default_rng(0).integers(0, sizes.vocab_size, sizes.num_tokens).astype(np.int32)
    rows = []
    for name in sizes.models:
        config = ModelConfig(**common.GENERATIONS[name], **shape, head_dim=sizes.head_dim)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            np.save(folder / "tokens.npy", tokens)
            write_torch_file(folder / "model.pth", RandomTensors(config))
            expected = ours_one_by_one(from_pretrained(folder / "model.pth"), tokens)
            for row in (row for row in ROWS if row.model == name):
                common.progress(f"{row.peer}, {row.model}, {row.what}")
                found = logits_by(row, config, folder, pythons, tokens)
                about = {"peer": row.peer, "model": row.model, "form": row.what}
                rows.append(about | ({"not_run": True} if found is None else compare(found, expected)))
    return {"rows": rows, "versions": versions(pythons)}


def logits_by(
    row: Row, config: ModelConfig, folder: Path, pythons: Mapping[str, str], tokens: NDArray
) -> NDArray | None:
    """[T, V] by a row's peer; None if its interpreter is not given."""
    if row.peer == "ours":
        return ours_at_once(folder / "model.pth", tokens)
    if row.peer not in pythons:
        return None
    if row.peer == RWKV:
        return official(pythons[RWKV], config, folder)
    if row.peer == TRANSFORMERS:
        return transformers(pythons[TRANSFORMERS], folder)
    return llama(pythons[LLAMA], {"f32": "float32"}.get(row.what, row.what), config, folder)


def versions(pythons: Mapping[str, str]) -> dict[str, str]:
    """Of the peers' packages."""
    command = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return {
        peer: subprocess.run([python, "-c", command, PACKAGES[peer]], capture_output=True, text=True).stdout.strip()
        for peer, python in pythons.items()
    }


def claims(results: common.Results) -> common.Claims:
    """Every float32 row is the same model; not shown while a row was not run."""
    exact = [row.get("largest") for row in results["rows"] if row["form"] != "q8_0"]
    q8_0 = [row.get("share_of_deviation") for row in results["rows"] if row["form"] == "q8_0"]
    return {
        f"logits of every float32 row are ours to {TOLERANCE}": common.all_hold(
            None if value is None else value < TOLERANCE for value in exact
        ),
        "llama.cpp's q8_0 is within 5% of a deviation of our float32": common.all_hold(
            None if value is None else value < 0.05 for value in q8_0
        ),
    }


def refusal(results: common.Results, pythons: Mapping[str, str]) -> str | None:
    """Why a run with these interpreters must not replace results: they have more measured rows."""
    before = sum("largest" in row for row in results["rows"])
    after = sum(row.peer == "ours" or row.peer in pythons for row in ROWS)
    if after >= before:
        return None
    return f"results.json has {before} measured rows and would have {after}: name the peers' interpreters, or --out"


def draw(results: common.Results, path: Path) -> None:
    """A bar for each row: the largest difference of a logit."""
    figure, axes = common.new_figure(1, width=6.6, height=3.4)
    rows = [row for row in results["rows"] if "largest" in row]
    axes[0].barh(
        range(len(rows)), [row["largest"] for row in rows], color=[common.COLORS[row["model"]] for row in rows]
    )
    axes[0].set_yticks(range(len(rows)), [f"{row['peer']}, {row['model']}, {row['form']}" for row in rows], fontsize=7)
    axes[0].axvline(TOLERANCE, color="#444444", lw=0.8)
    axes[0].set(xscale="log", xlabel="largest difference of a logit from ours")
    axes[0].invert_yaxis()
    common.save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    for name in PACKAGES:
        parser.add_argument(f"--{name}-python")
    given, sys.argv[1:] = parser.parse_known_args()
    found = {name: path for name in PACKAGES if (path := getattr(given, f"{name}_python"))}
    measured = functools.partial(measure, pythons=found)
    refused = functools.partial(refusal, pythons=found)
    common.main(measured, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims, refusal=refused)
