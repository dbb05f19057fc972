"""API keys: what a file may say, and that keys are neither kept nor printed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.serving.keys import ApiKeys, read_keys

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef!"


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def read(folder: Path, text: str) -> ApiKeys:
    keys, warnings = read_keys(keys_file(folder, text))
    assert warnings == []
    return keys


def test_plain_and_hashed_keys_have_tenants(tmp_path: Path) -> None:
    hashed = hashlib.sha256(BOB.encode()).hexdigest()
    keys = read(tmp_path, f"# who may\n\nalice:{ALICE}\nbob:sha256:{hashed}\nalice:another-key-of-alice\n")
    assert [keys.tenant(key) for key in (ALICE, BOB, "another-key-of-alice")] == ["alice", "bob", "alice"]
    assert keys.tenants == {"alice", "bob"}
    for wrong in ("", ALICE[:-1], ALICE + "x", hashed, f"sha256:{hashed}", "\udcff"):
        assert keys.tenant(wrong) is None
    assert ALICE not in repr(vars(keys))


def test_a_key_may_have_colons(tmp_path: Path) -> None:
    assert read(tmp_path, "a:b:c:d:0123456789abc").tenant("b:c:d:0123456789abc") == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys"),
        ("# only a comment", "has no keys"),
        ("hunter-0123456789abcdef", "line 1: must be NAME:KEY"),
        (f"alice:{ALICE}\na b:hunter-0123456789abcdef", "line 2: the name"),
        ("alice:hunter", "at least 16"),
        ("alice:hunter 0123456789abcdef", "without spaces"),
        ("alice:sha256:123", "64 hexadecimal digits"),
        (f"alice:{ALICE}\nbob:{ALICE}", "line 2: bob has the key of alice"),
    ],
)
def test_a_wrong_line_is_named_and_its_key_is_not(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    assert "hunter" not in str(caught.value)
    assert ALICE not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"alice:\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_keys(tmp_path / "latin")


def test_a_file_that_others_may_read_is_warned_of(tmp_path: Path) -> None:
    _, (warning,) = read_keys(keys_file(tmp_path, f"alice:{ALICE}", 0o644))
    assert "0644" in warning
    assert "chmod 600" in warning
