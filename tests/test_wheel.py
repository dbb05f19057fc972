"""What a wheel installs works by itself, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
from rwkv_jax import ModelConfig, TrainConfig
from rwkv_jax.config import DataConfig, EvaluationConfig, OptimizerConfig, StepConfig

def config():
    return TrainConfig(
        model=ModelConfig(generation="4", vocab_size=257, num_layers=2, width=32),
        data=DataConfig(source="text.txt", cache_dir="cache", tokenizer="bytes", held_out=0.0),
        optimizer=OptimizerConfig(warmup_steps=1),
        training=StepConfig(num_steps=3, batch_size=2, sequence_length=16),
        evaluation=EvaluationConfig(sample_prompts=()),
    )
"""
# One process for all, which loads JAX once.
COMMANDS = """
import importlib.resources, io, pkgutil, sys
import rwkv_jax, rwkv_kernels
from rwkv_jax import *
from rwkv_jax import cli
from rwkv_jax.chat.formats import g1_in_jinja
from rwkv_jax.serving.routes import page

assert page.assemble().content.count(b"<script>") > 5
assert "endgeneration" in g1_in_jinja()
for package in (rwkv_jax, rwkv_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            file = importlib.import_module(module.name).__file__
            assert file.startswith(sys.prefix), file
    assert importlib.resources.files(package).joinpath("py.typed").is_file()
print(rwkv_jax.__version__, all(callable(globals()[name]) for name in rwkv_jax.__all__ if name != "__version__"))
cli.main(["doctor"])
cli.main(["generate", "runs/default", "--prompt", "a", "--tokens", "3"])
sys.stdin = io.StringIO("hello\\n/quit\\n")
cli.main(["chat", "runs/default", "--tokens", "3"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, whose files are copied first: setuptools builds within the folder that it is given."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("rwkv_jax", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], str]:
    """Runs a program of an environment that holds the wheel, in a folder away from the checkout; gives its output.

    The environment finds what the wheel depends on in this one. Its .pth files are not read there, so that the
    checkout, which is installed here by one of them, is not found.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "venv" / "bin" / "python"), "install", "--quiet"]
    options = ["--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, str(wheel)], check=True)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 50)
    (folder / "config.py").write_text(CONFIG)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["XDG_CACHE_HOME"] = str(folder / "programs")

    def run(command: Sequence[str]) -> str:
        program = folder / "venv" / "bin" / command[0]
        done = subprocess.run(
            [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_an_installed_wheel_trains_and_runs_a_model(run: Callable[[Sequence[str]], str]) -> None:
    assert "losses: runs/default/loss.png" in run(["rwkv", "train", "config.py"])
    output = run(["python", "-c", textwrap.dedent(COMMANDS)])
    assert output.splitlines()[0] == "0.1.0 True"
    assert "rwkv-jax 0.1.0" in output


def test_an_installed_wheel_plans(run: Callable[[Sequence[str]], str]) -> None:
    assert "verdict: fits" in run(["rwkv", "plan", "config.py", "--topology", "cpu:2"])
