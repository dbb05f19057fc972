"""Where compiled programs are kept, and that a second start finds them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from rwkv_jax.cli.program_cache import MIN_COMPILE_SECONDS, default_folder, describe_program_cache, keep_programs
from rwkv_jax.host import instruction_sets

REPOSITORY = Path(__file__).parents[2]


def setting(name: str) -> Any:
    return getattr(jax.config, name)


@pytest.fixture
def as_at_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """JAX's settings as they are before anyone has changed them, and the user's own folder for caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: setting(name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    yield tmp_path / "caches"
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_in_the_users_cache() -> None:
    assert default_folder({"XDG_CACHE_HOME": "/caches"}) == Path("/caches/rwkv-jax/programs") / instruction_sets()
    expected = Path("~/.cache/rwkv-jax/programs").expanduser() / instruction_sets()
    assert default_folder({}) == default_folder({"XDG_CACHE_HOME": "relative"}) == expected


def test_programs_are_kept_there(as_at_start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_programs()
    folder = as_at_start / "rwkv-jax" / "programs" / instruction_sets()
    assert setting("jax_compilation_cache_dir") == str(folder)
    assert setting("jax_persistent_cache_min_compile_time_secs") == MIN_COMPILE_SECONDS
    assert list(folder.iterdir()) == []
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    keep_programs()
    assert setting("jax_persistent_cache_min_compile_time_secs") == 0
    assert capsys.readouterr() == ("", "")


def test_a_person_is_told_of_a_new_folder(
    as_at_start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    keep_programs()
    assert (
        f"; {as_at_start}/rwkv-jax/programs/{instruction_sets()} keeps what was compiled for later ones"
        in capsys.readouterr().err
    )
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value"), [("jax_compilation_cache_dir", "/chosen"), ("jax_enable_compilation_cache", False)]
)
def test_what_the_user_has_set_stays(as_at_start: Path, name: str, value: object) -> None:
    jax.config.update(name, value)
    before = setting("jax_compilation_cache_dir")
    keep_programs()
    assert setting("jax_compilation_cache_dir") == before
    assert not as_at_start.exists()


def test_a_folder_that_cannot_be_written_is_no_error(as_at_start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_at_start.write_text("a file")
    keep_programs()
    assert setting("jax_compilation_cache_dir") is None
    error = capsys.readouterr().err
    assert error.startswith(
        f"rwkv: {as_at_start}/rwkv-jax/programs/{instruction_sets()}: cannot be written (Not a directory), so that each"
    )
    assert error.count("\n") == 1


def test_doctor_says_which_folder_it_is(as_at_start: Path) -> None:
    assert describe_program_cache().endswith(
        f"generate, chat and bench keep them in {as_at_start}/rwkv-jax/programs/{instruction_sets()}"
    )
    jax.config.update("jax_compilation_cache_dir", "/chosen")
    assert describe_program_cache() == "compiled programs: kept in /chosen, by JAX_COMPILATION_CACHE_DIR"
    jax.config.update("jax_enable_compilation_cache", False)
    assert describe_program_cache() == "compiled programs: not kept, by JAX_ENABLE_COMPILATION_CACHE"


@pytest.mark.long
def test_a_second_start_compiles_less(tmp_path: Path) -> None:
    shape = ("--random", "6x64", "--vocab-size", "50", "--contexts", "64", "--tokens", "8", "--repetitions", "1")
    command = [sys.executable, "-m", "rwkv_jax", "bench", "latency", *shape, "--json"]
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_EXPLAIN_CACHE_MISSES": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # however fast this machine is
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start() -> str:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    first = start()
    kept = list((tmp_path / "rwkv-jax" / "programs").rglob("*-cache"))
    assert kept
    second = start()
    for path in kept:
        name = path.name.partition("-")[0]
        assert second.count(f"MISS for '{name}'") < first.count(f"MISS for '{name}'")
