"""constraints/ and pyproject.toml agree: exact versions for each Python, within bounds that say what was tested."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*extras: str) -> list[Requirement]:
    """What the project needs with some extras, its own extras aside."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return [needed for needed in map(Requirement, lines) if needed.name != "rwkv-jax"]


def constraints(python: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / f"{python}.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in lines), "only NAME==VERSION"
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pairs}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_a_version_within_its_bounds(python: str) -> None:
    versions = constraints(python)
    for needed in requirements("test", "dev", "gguf", "grammar", "parquet", "serve", "tokenizers", "world", "zstd"):
        assert needed.name.lower() in versions, needed
        assert versions[needed.name.lower()] in needed.specifier, (needed, versions[needed.name.lower()])


def test_upper_bounds_are_the_first_release_that_was_not_tested() -> None:
    bounded = {}
    for needed in requirements():
        for bound in needed.specifier:
            if bound.operator == "<":
                bounded[needed.name] = Version(bound.version)
    assert set(bounded) == {"flax", "jax", "optax", "orbax-checkpoint"}
    for name, bound in bounded.items():
        newest = max(constraints(python)[name] for python in PYTHONS)
        assert bound.release == (newest.major, newest.minor + 1), (name, newest)


def test_each_supported_python_has_its_constraints() -> None:
    found = {path.stem for path in (ROOT / "constraints").glob("*.txt") if not path.stem.startswith("devices")}
    assert found == set(PYTHONS)
    assert ".".join(map(str, sys.version_info[:2])) in found
