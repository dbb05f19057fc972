"""Imports run one way: kernels know only JAX, the config only the standard library, and no package looks back."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest

import rwkv_jax
import rwkv_jax.cli
import rwkv_jax.inference

ROOT = Path(__file__).parents[1]
COMMANDS = ("rwkv_jax.cli", "rwkv_jax.__main__")
# They know the standard library only.
BELOW_ALL = ("rwkv_jax.atomic", "rwkv_jax.checks", "rwkv_jax.file_kinds", "rwkv_jax.tables")
PACKAGES = {"rwkv_kernels": ROOT / "kernels" / "rwkv_kernels", "rwkv_jax": ROOT / "rwkv_jax"}


def module_name(path: Path) -> str:
    """kernels/rwkv_kernels/ops/wkv7/api.py -> rwkv_kernels.ops.wkv7.api."""
    package = next(folder for folder in PACKAGES.values() if path.is_relative_to(folder))
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))}


def imported(module: str, statement: ast.stmt) -> set[str]:
    """Absolute names that an import statement in `module` asks for; `from x import y` asks for x and maybe for x.y."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    if not isinstance(statement, ast.ImportFrom):
        return set()
    base = statement.module or ""
    if statement.level:
        is_package = FILES[module].name == "__init__.py"
        parents = module.split(".")[: -statement.level + is_package or None]
        base = ".".join([*parents, base]) if base else ".".join(parents)
    return {base} | {f"{base}.{alias.name}" for alias in statement.names}


@functools.cache
def imports(module: str, top_level_only: bool = False) -> frozenset[str]:
    """Everything that a module imports, wherever in it; names such as jax.numpy or rwkv_jax.config."""
    tree = ast.parse(FILES[module].read_text())
    statements = tree.body if top_level_only else [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return frozenset().union(*(imported(module, statement) for statement in statements))


def is_under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def foreign(module: str, *allowed: str) -> set[str]:
    """What a module imports besides the standard library and `allowed`."""
    return {
        name
        for name in imports(module)
        if name.partition(".")[0] not in sys.stdlib_module_names and not is_under(name, *allowed)
    }


def modules(*packages: str) -> list[str]:
    found = [module for module in FILES if is_under(module, *packages)]
    assert found, packages
    return found


def test_the_walk_sees_imports() -> None:
    assert {"jax", "rwkv_kernels.dispatch"} <= imports("rwkv_kernels.ops.wkv7.api")
    assert "numpy" in imports("rwkv_kernels.arguments")
    assert "rwkv_kernels.wkv7" in imports("rwkv_jax.models.rwkv7")
    # Within a function, too.
    assert "rwkv_jax.inference.engine.Engine" in imports("rwkv_jax.cli.generate")
    assert "rwkv_jax.inference.engine" not in imports("rwkv_jax.cli.generate", top_level_only=True)


@pytest.mark.parametrize("module", modules("rwkv_kernels"))
def test_kernels_know_nothing_but_jax_and_numpy(module: str) -> None:
    assert not foreign(module, "rwkv_kernels", "jax", "numpy")


@pytest.mark.parametrize("module", modules("rwkv_jax.config", *BELOW_ALL))
def test_the_config_needs_the_standard_library_only(module: str) -> None:
    assert not foreign(module, "rwkv_jax.config", *BELOW_ALL)


@pytest.mark.parametrize("module", modules("rwkv_jax"))
def test_nothing_in_the_package_imports_runs_tests_or_benchmarks(module: str) -> None:
    assert not [name for name in imports(module) if is_under(name, "train", "configs", "tests", "benchmarks")]


@pytest.mark.parametrize("module", modules("rwkv_jax.models"))
def test_models_know_the_config_and_the_kernels(module: str) -> None:
    assert not foreign(module, *BELOW_ALL, "rwkv_jax.config", "rwkv_jax.models", "rwkv_kernels", "jax", "flax", "numpy")


@pytest.mark.parametrize("module", modules("rwkv_jax.data"))
def test_data_knows_no_model_and_no_jax(module: str) -> None:
    ours = {name for name in imports(module) if is_under(name, "rwkv_jax")}
    assert not {name for name in ours if not is_under(name, *BELOW_ALL, "rwkv_jax.config", "rwkv_jax.data")}
    assert not [name for name in imports(module) if is_under(name, "jax", "flax", "optax", "rwkv_kernels")]


@pytest.mark.parametrize("module", modules("rwkv_jax.parallel"))
def test_parallel_knows_models_and_nothing_that_trains_or_runs_them(module: str) -> None:
    ours = {name for name in imports(module) if is_under(name, "rwkv_jax")}
    allowed = (*BELOW_ALL, "rwkv_jax.config", "rwkv_jax.models", "rwkv_jax.parallel")
    assert not {name for name in ours if not is_under(name, *allowed)}


@pytest.mark.parametrize("module", [name for name in modules("rwkv_jax") if not is_under(name, *COMMANDS)])
def test_only_commands_know_commands(module: str) -> None:
    assert not [name for name in imports(module) if is_under(name, "rwkv_jax.cli")]


@pytest.mark.parametrize("module", modules("rwkv_jax.training", "rwkv_jax.weights", "rwkv_jax.evaluation"))
def test_what_trains_and_stores_does_not_know_what_runs(module: str) -> None:
    allowed = ("rwkv_jax.inference.sampling",) if is_under(module, "rwkv_jax.training") else ()  # samples of a run
    assert not [n for n in imports(module) if is_under(n, "rwkv_jax.inference") and not is_under(n, *allowed)]


def test_the_folder_of_kernels_is_no_package() -> None:
    # An importable `kernels` would shadow the package of that name which transformers looks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def runs_first(module: str) -> set[str]:
    """Modules of ours that must have run before `module` can."""
    names = imports(module, top_level_only=True)
    # `from package import submodule` asks of the package only that it has begun to run.
    submodules = {name for name in names if name in FILES and name.rpartition(".")[0] in names}
    paths = {name.rpartition(".")[0] for name in submodules}
    attributes = {name.rpartition(".")[0] for name in names if name not in FILES}
    found = {name for name in names if name in FILES and (name not in paths or name in attributes)}
    # Importing a.b.c runs a and a.b first, unless they are already running because of this very module.
    ancestors = {".".join(name.split(".")[:depth]) for name in found for depth in range(1, name.count(".") + 1)}
    return (found | {name for name in ancestors if not is_under(module, name)}) - {module}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: runs_first(module) for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", ["rwkv_jax", "rwkv_jax.config", "rwkv_jax.cli.command", "rwkv_jax.inference.chat"])
def test_what_help_and_errors_of_values_need_does_not_load_jax(module: str) -> None:
    program = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("package", [rwkv_jax, rwkv_jax.inference, rwkv_jax.cli], ids=lambda package: package.__name__)
def test_every_name_of_a_lazy_package_is_there(package: types.ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_the_version_is_that_of_the_package_or_says_that_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    installed = {"rwkv-jax": "1.2.3"}
    assert rwkv_jax.__version__ == "1.2.3"
    installed = {}
    assert rwkv_jax.__version__ == "0+unknown"
