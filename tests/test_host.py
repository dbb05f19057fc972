"""Huge pages: which environment asks for them, and a process that begins anew in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_jax.host import huge_page_environment

MADVISE, GLIBC = "always [madvise] never\n", ("glibc", "2.36")


def test_what_is_set_already_is_kept() -> None:
    environment = {"HOME": "/home/user", "GLIBC_TUNABLES": "glibc.malloc.check=0"}
    expected = environment | {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.hugetlb=1"}
    assert huge_page_environment(environment, MADVISE, GLIBC) == expected
    assert huge_page_environment({}, MADVISE, GLIBC) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("environment", "setting", "libc"),
    [
        pytest.param({}, "[always] madvise never\n", GLIBC, id="they come unasked"),
        pytest.param({}, "always madvise [never]\n", GLIBC, id="the system has none"),
        pytest.param({}, MADVISE, ("glibc", "2.34"), id="too old"),
        pytest.param({}, MADVISE, ("", ""), id="another libc"),
        pytest.param({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, MADVISE, GLIBC, id="not wanted"),
        pytest.param({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, MADVISE, GLIBC, id="done"),
    ],
)
def test_where_nothing_would_change(environment: dict[str, str], setting: str, libc: tuple[str, str]) -> None:
    assert huge_page_environment(environment, setting, libc) is None


PROGRAM = """
import os, sys
from rwkv_jax import host
host.huge_page_setting = lambda: "always [madvise] never"
host.platform.libc_ver = lambda: ("glibc", "2.36")
print("begins", sys.argv[1:], flush=True)
if "forget" in sys.argv:
    os.environ.pop("GLIBC_TUNABLES", None)
host.restart_with_huge_pages({name})
print(os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such pages")
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("sys.argv[0]", "--a flag", ["begins", "begins", "glibc.malloc.hugetlb=1"]),
        pytest.param("sys.argv[0]", "forget", ["begins", "begins", "None"], id="the environment loses the setting"),
        pytest.param("'train.py'", "x", ["begins", "None"], id="Python was started to run another file"),
    ],
)
def test_a_process_begins_anew_once_with_the_same_arguments(
    name: str, arguments: str, expected: list[str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(name=name))
    removed = ("GLIBC_TUNABLES", "RWKV_JAX_RESTARTED")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    command = [sys.executable, str(program), arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"{line} {[arguments]}" if line == "begins" else line for line in expected]
