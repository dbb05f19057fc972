"""`rwkv push`: what it prints, and that a dry run asks nobody."""

from __future__ import annotations

import socket
from pathlib import Path

import huggingface_hub
import pytest

from rwkv_jax.cli import push as module
from rwkv_jax.weights import push as weights_push
from rwkv_jax.weights.card import CARD_FILE
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.safetensors import write_safetensors
from tests.cli.commands import Command
from tests.weights.files import CONFIGS, random_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "a.safetensors", random_tensors(CONFIGS["7"]))
    convert(tmp_path / "a.safetensors", tmp_path / "model", dtype="bfloat16")
    return tmp_path / "model"


def test_a_dry_run_says_all_and_asks_nobody(rwkv: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in ("HfApi", "get_token", "whoami"):
        monkeypatch.setattr(huggingface_hub, name, no_network)
    (folder / ".env").write_text("SECRET=1")
    arguments = ("push", folder, "owner/name", "--license", "apache-2.0", "--private", "--revision", "v1", "--dry-run")
    out = rwkv(*arguments).out
    size = (folder / "model.safetensors").stat().st_size
    for told in (
        "RWKV-7, 3 layers of width 32, official names",
        "to owner/name, branch v1, private; license apache-2.0",
        f"model.safetensors  {size:,}",
        "with the license put in",
        "not uploaded:\n  .env  neither weights nor what is known beside them",
        "nothing was uploaded (--dry-run)",
    ):
        assert told in out
    assert "license:" not in (folder / CARD_FILE).read_text().partition("# model")[0]


def test_what_is_refused_names_flags(rwkv: Command, folder: Path) -> None:
    for flags, message in (
        ((), r"README\.md: states no license, without which nobody may use what is published; give --license"),
        (("--license", "Apache"), r"--license 'Apache': must be the hub's identifier"),
        (("--license", "mit", "--revision", "a b"), r"--revision 'a b': must be a branch"),
    ):
        with pytest.raises(SystemExit, match=message):
            rwkv("push", folder, "owner/name", "--dry-run", *flags)
    with pytest.raises(SystemExit, match=r"repository = 'name': must be OWNER/NAME"):
        rwkv("push", folder, "name", "--license", "mit")


def test_what_was_pushed_can_be_pinned(rwkv: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.PushCommand.__doc__
    pushed: list[weights_push.Push] = []

    def push(plan: weights_push.Push, report: object) -> str:
        pushed.append(plan)
        return "d" * 40

    monkeypatch.setattr(weights_push, "push", push)
    out = rwkv("push", folder, "owner/name", "--license", "mit").out
    assert "for everybody to see, unless the repository is private; license mit" in out
    assert out.endswith(f'pushed; pinned: from_pretrained("owner/name", revision="{"d" * 40}")\n')
    assert [plan.license for plan in pushed] == ["mit"]
