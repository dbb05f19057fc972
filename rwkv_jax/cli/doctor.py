"""`rwkv doctor`: what this machine has, what would run on it, and whether it computes what it should."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_jax.cli.machine import processor

if TYPE_CHECKING:
    from rwkv_kernels.cases import Shape

NEEDED = ("rwkv-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose versions are told."""

OPTIONAL = {
    "jax-cuda13-plugin": "NVIDIA GPUs, and `rwkv plan` for them",
    "libtpu": "TPUs, and `rwkv plan` for them",
    "huggingface-hub": "models by their names on the Hugging Face hub",
    "pyrwkv-tokenizer": "the tokenizer of World models",
    "tokenizers": "tokenizer.json of Hugging Face",
    "pyarrow": ".parquet, .arrow and .feather files",
    "tensorboardX": "TensorBoard logs",
    "wandb": "Weights & Biases logs",
}
"""Packages that some things need, and what for."""

BOUND = 1e-4
"""Relative error of an operator in float32 beyond which something is broken; it is below 1e-5 on a CPU."""


class Check(NamedTuple):
    """An operator held against its definition in float64."""

    operator: str
    implementation: str
    error: float
    """|result - definition| / |definition| in the L2 norm; infinite for NaN."""

    @property
    def passes(self) -> bool:
        """Whether it computes what it should."""
        return self.error <= BOUND


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what this machine has, which implementation of each operator runs on it and why, and whether it is right."""

    def run(self) -> None:
        """Prints the report; exits with 1 if an operator computes what it should not."""
        print("\n".join(describe_system()))
        print("\noperators, for prompts and single tokens of a model with 12 heads of 64")
        print("\n".join(describe_operators()))
        print("\nself-check: float32 against the definition in float64")
        checks = check_operators()
        for check in checks:
            verdict = "good" if check.passes else f"WRONG: at most {BOUND:.0e}"
            print(f"  {check.operator:<6} {check.implementation:<16} relative error {check.error:.1e}  {verdict}")
        if failed := [check.operator for check in checks if not check.passes]:
            sys.exit(
                f"rwkv: {', '.join(failed)}: wrong on this machine; report it with what is above, and try another "
                "version of jax meanwhile"
            )


def describe_system() -> Iterator[str]:
    """Machine, devices, versions and optional packages, a line each."""
    import jax

    yield f"platform: {platform.platform()}, {platform.machine()}"
    yield f"processor: {processor()}; {_available_cores()} of {os.cpu_count()} cores are ours, and so many threads run"
    if hasattr(os, "sysconf"):
        yield f"memory: {_gibibytes(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}"
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {_gibibytes(limit)} for JAX" if limit else ""
        yield f"device {device.id}: {device.platform} ({device.device_kind}){memory}"
    yield f"python {platform.python_version()}"
    for name in NEEDED:
        yield f"{name} {_version(name) or 'not installed, but run from its folder'}"
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        if value := os.environ.get(name):
            yield f"{name}={value}"
    yield "\noptional packages:"
    for name, use in OPTIONAL.items():
        yield f"  {name:<18} {_version(name) or '-':<12} {use}"


def describe_operators() -> Iterator[str]:
    """Which implementation runs where, and why the others do not."""
    import rwkv_kernels

    for name in rwkv_kernels.OPERATORS:
        of_prompts, of_tokens = (
            rwkv_kernels.explain(name, (1, time, 768) if name == "wkv4" else (1, time, 12, 64)) for time in (256, 1)
        )
        yield f"{of_prompts}\n  single tokens    {of_tokens.chosen}"


def check_operators() -> list[Check]:
    """Runs every operator on a small problem, as it would run here, and in float64 by its definition."""
    import jax
    import numpy as np

    import rwkv_kernels
    from rwkv_kernels import wkv4, wkv5, wkv6, wkv7
    from rwkv_kernels.cases import Shape
    from rwkv_kernels.wkv4.cases import make_inputs as wkv4_inputs
    from rwkv_kernels.wkv5.cases import make_inputs as wkv5_inputs
    from rwkv_kernels.wkv6.cases import make_inputs as wkv6_inputs
    from rwkv_kernels.wkv7.cases import make_inputs as wkv7_inputs

    operators: Mapping[str, tuple[Callable[..., Any], Callable[[str, Shape], dict[str, Any]]]] = {
        "wkv4": (wkv4, wkv4_inputs),
        "wkv5": (wkv5, wkv5_inputs),
        "wkv6": (wkv6, wkv6_inputs),
        "wkv7": (wkv7, wkv7_inputs),
    }
    shape = Shape(batch=2, time=80, heads=2, key_dim=16, value_dim=16)
    checks = []
    for name, (operator, make_inputs) in operators.items():
        inputs = make_inputs("realistic", shape)
        half = (shape.batch, shape.time // 2)
        sizes = (*half, shape.heads * shape.key_dim) if name == "wkv4" else (*half, *shape[2:])
        with jax.enable_x64(True):
            expected = _in_two_calls(operator, inputs, "scan")
        found = _in_two_calls(operator, jax.tree.map(np.float32, inputs), None)
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        checks.append(Check(name, rwkv_kernels.explain(name, sizes).chosen, error if np.isfinite(error) else math.inf))
    return checks


def _in_two_calls(operator: Callable[..., Any], inputs: Mapping[str, Any], implementation: str | None) -> Any:
    """y [B, T, ...] of one half of the steps after the other, so that it shows what the state between them is."""
    import jax
    import numpy as np

    run = jax.jit(functools.partial(operator, implementation=implementation))
    time = inputs["v"].shape[1]
    state, ys = inputs["state"], []
    for steps in (slice(0, time // 2), slice(time // 2, time)):
        # Others are [H, N] or [C], the same at each step.
        over_time = {name: x[:, steps] for name, x in inputs.items() if name != "state" and x.ndim > 2}
        y, state = run(**(dict(inputs) | over_time | {"state": state}))
        ys.append(np.asarray(y))
    return np.concatenate(ys, axis=1)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
