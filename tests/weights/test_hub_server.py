"""Publishing and pinning with huggingface_hub itself, against a hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.safetensors import write_safetensors
from tests.weights.files import CONFIGS, random_tensors
from tests.weights.hub_server import NAME, Hub, running

pytestmark = pytest.mark.long  # processes that load JAX; what the hub is asked is in test_push.py, too
ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "a1B2" * 9
_PROGRAM = """
import sys
from rwkv_jax.cli import main
for line in sys.argv[1:]:
    print("$", line)
    try:
        main(line.split())
    except SystemExit as end:
        print("exit:", end)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "a.safetensors", random_tensors(CONFIGS["7"]))
    convert(tmp_path / "a.safetensors", tmp_path / "model", license="apache-2.0")
    (tmp_path / "model" / ".env").write_text("SECRET=1")
    return tmp_path / "model"


def rwkv(hub: Hub, folder: Path, *lines: str) -> list[str]:
    """What commands print, one after the other in a process of their own that knows this hub alone."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder.parent / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *lines], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.split("$ ")[1:]


def test_what_is_pushed_is_fetched_by_its_commit(hub: Hub, folder: Path) -> None:
    first, again = rwkv(
        hub, folder, f"push {folder} {NAME} --private --revision v1", f"push {folder} {NAME} --private --revision v1"
    )
    assert f"made the repository {NAME}" in first
    assert "pushed; pinned: from_pretrained(" in again
    assert hub.is_private
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.commits[hub.branches["main"]].keys() == {".gitattributes"}
    pushed = hub.branches["v1"]
    sent = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".env"}
    assert hub.commits[pushed] == {".gitattributes": b"", **sent}
    later = hub.commit("v1", {"model.safetensors": b"another"})
    by_branch, by_commit, by_name, by_hash = rwkv(
        hub,
        folder,
        f"info {NAME} --revision v1",
        f"info {NAME} --revision {pushed} --verify",
        f"info {NAME} --revision nowhere",
        f"info {NAME} --revision {pushed} --sha256 {'0' * 64}",
    )
    assert "another" not in by_commit
    assert f"{NAME} on the Hugging Face hub, commit {pushed}" in by_commit
    assert "compared" in by_commit
    assert f"snapshots/{later}/model.safetensors: is not a whole safetensors file" in by_branch
    assert f"{NAME} at nowhere on the Hugging Face hub, which answered: " in by_name
    assert "was asked for; nothing was loaded" in by_hash


def test_a_commit_that_fails_leaves_nothing_of_it(hub: Hub, folder: Path) -> None:
    hub.fails_at_commit = True
    (failed,) = rwkv(hub, folder, f"push {folder} {NAME}")
    assert f"exit: rwkv: {NAME}: could not be pushed (" in failed
    assert f"nothing was uploaded; the repository {NAME} was made, and is empty. Mend it and push again" in failed
    assert hub.commits[hub.branches["main"]].keys() == {".gitattributes"}
