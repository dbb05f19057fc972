"""Huge pages: which environment asks for them, and a process that begins anew in it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from rwkv_jax.host import huge_page_environment, huge_page_setting

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


def test_a_process_begins_anew_once_with_the_same_arguments() -> None:
    program = (
        "import os, sys; from rwkv_jax.host import restart_with_huge_pages; print('begins', flush=True);"
        "restart_with_huge_pages(); print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", program, "--a flag", "x"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = huge_page_environment(environment, huge_page_setting(), platform.libc_ver())
    *begins, last = result.stdout.splitlines()
    assert begins == ["begins"] * (1 if expected is None else 2)
    assert last == f"{None if expected is None else expected['GLIBC_TUNABLES']} ['--a flag', 'x']"
