"""Imports run one way: kernels know only JAX, the config only the standard library, and no package looks back."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from flax import nnx

import rwkv_jax

ROOT = Path(__file__).parents[1]
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
    assert "rwkv_jax.inference.engine.engine.Engine" in imports("rwkv_jax.cli.generate")
    assert "rwkv_jax.inference.engine.engine" not in imports("rwkv_jax.cli.generate", top_level_only=True)


LEAVES = ("atomic", "checks", "file_kinds", "host", "json_object", "lazy", "tables", "versions")
"""Modules that know nothing of ours, which all others may import."""

EVALUATION_WITHOUT_ENGINE = tuple(f"evaluation.{name}" for name in ("requests", "encoding", "statistics", "tasks"))
"""What a run in training evaluates with: tasks know no model."""

RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "config": ((), ()),
    "autotune": (("config", "kernels", "parallel", "trying", "run_lock"), ("jax",)),
    "recipes": (("config",), ()),
    "chat": (("config",), ("jinja2",)),
    "data": (("chat", "config"), ("numpy", "pyarrow", "pyrwkv_tokenizer", "sentencepiece", "tokenizers", "zstandard")),
    "held_out": (("data",), ()),
    "models": (("config", "kernels"), ("jax", "flax", "numpy", "einops")),
    "parallel": (("config", "models", "kernels"), ("jax", "flax", "numpy")),
    "digests": ((), ("jax",)),
    "figures": ((), ("matplotlib",)),
    "checkpoint_files": (("digests",), ("jax", "orbax")),
    "run_folder": (("checkpoint_files", "config", "data", "models", "parallel"), ("jax", "orbax")),
    "run_lock": ((), ("filelock",)),
    "trying": (("run_lock",), ()),
    "weights": (
        ("config", "data", "models", "parallel", "run_folder"),
        ("jax", "flax", "numpy", "einops", "ml_dtypes", "safetensors", "huggingface_hub", "gguf", "yaml"),
    ),
    "tuning": (
        ("config", "models", "parallel", "run_folder", "weights"),
        ("jax", "flax", "numpy", "einops", "ml_dtypes"),
    ),
    "evaluation": (
        (
            "chat",
            "config",
            "data",
            "figures",
            "held_out",
            "inference",
            "models",
            "run_folder",
            "run_lock",
            "weights",
            "kernels",
        ),
        ("jax", "flax", "numpy", "einops", "lm_eval", "matplotlib", "tqdm"),
    ),
    "training": (
        # Samples of a run are drawn by the engine's pure functions, without the engine.
        (
            "autotune",
            "checkpoint_files",
            "config",
            "data",
            "digests",
            *EVALUATION_WITHOUT_ENGINE,
            "figures",
            "held_out",
            "models",
            "parallel",
            "run_folder",
            "run_lock",
            "tuning",
            "weights",
            "inference.sampling",
            "kernels",
        ),
        ("jax", "flax", "numpy", "einops", "matplotlib", "optax", "orbax", "rich"),
    ),
    "inference": (
        ("autotune", "chat", "config", "data", "models", "tuning", "weights", "kernels"),
        ("jax", "flax", "numpy", "einops", "llguidance", "safetensors"),
    ),
    "serving": (
        ("chat", "config", "data", "inference", "models", "parallel", "run_folder", "tuning", "weights"),
        (
            "jax",
            "numpy",
            "anyio",
            "fastapi",
            "prometheus_client",
            "pydantic",
            "ray",
            "redis",
            "sse_starlette",
            "starlette",
            "uvicorn",
        ),
    ),
    "applications": (
        ("config", "data", "figures", "models", "parallel", "training", "weights", "kernels"),
        ("jax", "flax", "numpy", "einops", "optax", "scipy"),
    ),
    "plan": (("config", "models", "parallel", "training", "kernels"), ("jax", "numpy", "rich")),
    "bench": (("config", "data", "models", "weights", "inference"), ("jax", "flax", "numpy")),
    "cli": (
        (
            "autotune",
            "bench",
            "chat",
            "config",
            "data",
            "evaluation",
            "inference",
            "models",
            "parallel",
            "plan",
            "run_folder",
            "serving",
            "training",
            "tuning",
            "weights",
            "kernels",
        ),
        ("jax", "flax", "numpy", "rich", "safetensors", "tyro"),
    ),
    "__main__": (("cli",), ()),
}
"""Of each package or module in rwkv_jax: the others that it may import, and what of other projects, besides JAX's."""

PARTS = sorted({module.split(".")[1] for module in FILES if module.startswith("rwkv_jax.")})


def test_every_package_has_a_rule() -> None:
    assert sorted(set(PARTS) - set(LEAVES)) == sorted(RULES)


@pytest.mark.parametrize("module", modules("rwkv_kernels"))
def test_kernels_know_nothing_but_jax_and_numpy(module: str) -> None:
    assert not foreign(module, "rwkv_kernels", "jax", "numpy")


@pytest.mark.parametrize("module", modules(*(f"rwkv_jax.{part}" for part in PARTS)))
def test_imports_run_one_way(module: str) -> None:
    part = module.split(".")[1]
    ours, others = RULES.get(part, ((), ()))
    packages = ["rwkv_kernels" if name == "kernels" else f"rwkv_jax.{name}" for name in (part, *LEAVES, *ours)]
    # `from rwkv_jax import x` asks for the package, which imports nothing by itself, and for rwkv_jax.x.
    assert not foreign(module, *packages, *others, "typing_extensions") - {"rwkv_jax"}


@pytest.mark.parametrize("module", modules("rwkv_jax.inference.sampling"))
def test_samples_of_a_run_do_not_load_the_engine(module: str) -> None:
    ours = [f"rwkv_jax.{name}" for name in ("inference.sampling", "data.tokenizers", *LEAVES)]
    assert not foreign(module, "jax", "numpy", "einops", "llguidance", *ours) - {"rwkv_jax"}


@pytest.mark.parametrize("module", modules(*(f"rwkv_jax.{name}" for name in EVALUATION_WITHOUT_ENGINE)))
def test_tasks_know_no_model(module: str) -> None:
    ours = [f"rwkv_jax.{name}" for name in (*EVALUATION_WITHOUT_ENGINE, "data", "held_out", *LEAVES)]
    assert not foreign(module, "numpy", "typing_extensions", *ours) - {"rwkv_jax"}


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


@pytest.mark.parametrize(
    "module",
    [
        "rwkv_jax",
        "rwkv_jax.config",
        "rwkv_jax.cli.command",
        "rwkv_jax.chat.formats",
        "rwkv_jax.serving.options",
        "rwkv_jax.weights, rwkv_jax.data",
        "rwkv_jax.weights.summary",
    ],
)
def test_what_help_and_errors_of_values_need_does_not_load_jax(module: str) -> None:
    program = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_takes_less_than_a_third_of_a_second() -> None:
    """Beyond the interpreter's own start; the best of some, since other tests run beside this one."""
    program = "import time; begin = time.perf_counter(); import rwkv_jax; print(time.perf_counter() - begin)"
    command = [sys.executable, "-c", program]
    times = [float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) for _ in range(3)]
    assert min(times) < 0.3


LAZY = [
    name for name, path in FILES.items() if path.name == "__init__.py" and "rwkv_jax.lazy.lazy_names" in imports(name)
]


@pytest.mark.parametrize("name", ["rwkv_jax", *(f"rwkv_jax.{part}" for part in PARTS if f"rwkv_jax.{part}" in LAZY)])
def test_every_name_of_a_lazy_package_is_there_and_shown(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__all__
    for public in package.__all__:
        assert getattr(package, public) is not None
    assert set(package.__all__) <= set(dir(package))
    # A module of the same name would take the place of what it is to give as soon as anyone imports it.
    assert not [public for public in package.__all__ if f"{name}.{public}" in FILES]
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing


def test_the_public_face() -> None:
    from rwkv_jax import (  # as a user asks for them
        RWKV4,
        RWKV5,
        RWKV6,
        RWKV7,
        ConfigError,
        Engine,
        ModelConfig,
        SamplingParams,
        TrainConfig,
        Transformer,
        from_pretrained,
        load_tokenizer,
        save_pretrained,
        train,
    )

    models = (RWKV4, RWKV5, RWKV6, RWKV7, Transformer)
    for kind in (*models, ConfigError, Engine, ModelConfig, SamplingParams, TrainConfig):
        assert isinstance(kind, type)
    for function in (from_pretrained, load_tokenizer, save_pretrained, train):
        assert inspect.isfunction(function)


def test_loading_weights_imports_nothing_that_trains(tmp_path: Path) -> None:
    from rwkv_jax import RWKV7, ModelConfig, save_pretrained

    model = RWKV7(ModelConfig(vocab_size=16, num_layers=2, width=16, head_dim=8), rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model.pth")
    # Flax itself imports optax, so what it has loaded before does not count.
    program = """
        import sys
        from flax import nnx
        before = set(sys.modules)
        from rwkv_jax import from_pretrained
        model = from_pretrained(sys.argv[1])
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new & {"optax", "orbax", "matplotlib", "tyro"}), "rwkv_jax.training" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "model.pth")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


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
