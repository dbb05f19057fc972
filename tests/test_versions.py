"""What computes, and of which commit it is: of a clone only, not of the repository that an environment lies in."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import rwkv_jax
from rwkv_jax import versions as module
from rwkv_jax.versions import commit_of, versions


def test_versions_are_those_of_what_is_installed() -> None:
    found = versions()
    assert found["rwkv-jax"] == rwkv_jax.__version__
    assert {"python", "jax", "jaxlib", "flax", "numpy"} <= found.keys()
    assert all(found.values())


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_the_commit_is_that_of_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=x", "-c", "user.email=x@x.org"]
        return subprocess.run(
            ["git", *names, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    assert commit_of(tmp_path) is None  # nothing is committed yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "beside").write_text("nobody has added it")
    assert commit_of(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == f"{commit} and changes"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as within a hook of another repository
    assert commit_of(tmp_path) == f"{commit} and changes"
    (tmp_path / "site-packages").mkdir()
    assert commit_of(tmp_path / "site-packages") is None


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    assert commit_of(tmp_path) is None

    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", missing)
    assert commit_of(tmp_path) is None
