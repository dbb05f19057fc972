"""`rwkv doctor`: reports machine, devices and packages, and checks the WKV operators."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from rwkv_jax import host
from rwkv_jax.cli.machine import find_devices
from rwkv_jax.cli.program_cache import describe_program_cache
from rwkv_jax.config import GENERATIONS, ConfigError, ModelConfig

if TYPE_CHECKING:
    from rwkv_kernels.autotune import Tuning

NEEDED = ("rwkv-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose versions are printed."""

OPTIONAL = {
    "jax-cuda13-plugin": "NVIDIA GPUs, and `rwkv plan` for them",
    "libtpu": "TPUs, and `rwkv plan` for them",
    "huggingface-hub": "models by their names on the Hugging Face hub",
    "pyrwkv-tokenizer": "the tokenizer of World models",
    "tokenizers": "tokenizer.json of Hugging Face",
    "jinja2": "chat templates that come with a tokenizer",
    "llguidance": "texts that match a JSON schema, a regular expression or a grammar",
    "pyarrow": ".parquet, .arrow and .feather files",
    "tensorboardX": "TensorBoard logs",
    "wandb": "Weights & Biases logs",
}
"""Optional packages and the features that need them."""


class Check(NamedTuple):
    """Comparison of an operator with its definition in float64."""

    operator: str
    implementation: str
    what: str
    """`prompts`, `single tokens` or `as measured`."""
    error: float
    """|result - definition| / |definition| in the L2 norm, of y or of the state; infinite for NaN."""

    bound: float
    """Largest error of a right result."""

    @property
    def passes(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Report on this machine: devices, packages, which implementation of each operator runs and why, and its error."""

    def run(self) -> None:
        """Prints the report; exits with 1 if an operator is wrong.

        Raises:
          ConfigError: there is no device; raised after the rest of the report.
        """
        problem = None
        _tell(describe_platform())
        try:
            _tell(describe_devices())
        except ConfigError as error:
            problem = error
            print("devices: none")
        print(describe_program_cache())
        _tell(describe_measurements())
        _tell(describe_packages())
        if problem is not None:
            raise problem
        print("\noperators as training takes them, for prompts and single tokens of a model with 12 heads of 64")
        _tell(describe_operators())
        print("\noperators as the engine takes them, and with it generate, chat and bench")
        _tell(describe_engine())
        print("\nself-check: float32 against the definition in float64")
        checks = check_operators()
        for check in checks:
            verdict = "good" if check.passes else f"WRONG: at most {check.bound:.0e}"
            print(
                f"  {check.operator:<6} {check.implementation:<16} {check.what:<14} relative error {check.error:.1e}  "
                f"{verdict}"
            )
        if failed := list(dict.fromkeys(check.operator for check in checks if not check.passes)):
            sys.exit(
                f"rwkv: {', '.join(failed)}: wrong on this machine; report it with what is above, and try another "
                "version of jax meanwhile"
            )


def describe_platform() -> Iterator[str]:
    """Platform, processor and memory, one line each."""
    yield f"platform: {platform.platform()}, {platform.machine()}"
    yield f"processor: {host.processor()}; using {host.available_cores()} of {os.cpu_count()} cores"
    if (memory := host.memory()) is not None:
        yield f"memory: {_gibibytes(memory)}"


def describe_devices() -> Iterator[str]:
    """JAX's devices, one line each. Raises ConfigError if there is none on the requested platforms."""
    for device in find_devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {_gibibytes(limit)} for JAX" if limit else ""
        yield f"device {device.id}: {device.platform} ({device.device_kind}){memory}"


def describe_measurements() -> Iterator[str]:
    """What `rwkv tune` and runs have measured on this user's machines, one line each."""
    from rwkv_jax import autotune

    try:
        yield from autotune.describe(autotune.default_path())
    except autotune.TuningFileError as error:
        yield f"measured operators: {error}"


def describe_packages() -> Iterator[str]:
    """Versions, environment variables and optional packages, one line each."""
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
    """Which implementation training uses, and why not the others."""
    import rwkv_kernels

    for name in rwkv_kernels.OPERATORS:
        of_prompts, of_tokens = (rwkv_kernels.explain(name, _shape(name, time)) for time in (256, 1))
        yield f"{of_prompts}\n  single tokens    {of_tokens.chosen}"
        yield from (_taken(tuning) for tuning in _measured_here(name) if tuning.workload.gradients)


def describe_engine() -> Iterator[str]:
    """Which implementation the engine uses, without gradients, and why."""
    import jax

    import rwkv_kernels

    for name in rwkv_kernels.OPERATORS:
        named, reason = _prefill_choice(name)
        of_prompts, of_tokens = (named or rwkv_kernels.explain(name, _shape(name, time)).chosen for time in (256, 1))
        yield f"  {name:<6} prompts: {of_prompts}, single tokens: {of_tokens}; {reason}"
    for name in (*rwkv_kernels.OPERATORS, *rwkv_kernels.PARTS):
        taken = [] if jax.default_backend() == "cpu" else _measured_here(name)
        yield from (_taken(tuning) for tuning in taken if not tuning.workload.gradients)


def check_operators() -> list[Check]:
    """Runs every operator on a small problem, as training and the engine do, and compares it with float64.

    What was measured to be the fastest on this device is run with its own dtypes and sizes of a head as well.
    """
    import rwkv_kernels
    from rwkv_kernels import autotune

    checks = []
    for name, operator in rwkv_kernels.OPERATORS.items():
        named, _ = _prefill_choice(name)
        for what, num_steps in (("prompts", 80), ("single tokens", 1)):
            shape = (2, num_steps, 32, 1, 1) if name == "wkv4" else (2, num_steps, 2, 16, 16)
            workload = autotune.workload_here(name, shape, gradients=False)
            exact = autotune.exact_results(workload)
            chosen = rwkv_kernels.explain(name, shape).chosen
            for implementation in dict.fromkeys((chosen, named or chosen)):
                worst = autotune.worst_error(workload, operator.implementations[implementation], exact)
                checks.append(Check(name, implementation, what, worst.error, worst.bound))
    return checks + _check_measured()


def _check_measured() -> list[Check]:
    """One check for those measurements that ask for the same one."""
    import rwkv_kernels
    from rwkv_kernels import autotune

    checks = {}
    for name, known in (rwkv_kernels.OPERATORS | rwkv_kernels.PARTS).items():
        for tuning in _measured_here(name):
            workload, chosen = tuning.workload, tuning.chosen or ""
            problem = workload.problem
            same = name, chosen, problem.shape[3:], problem.dtype, workload.inputs, workload.gradients, workload.packed
            if same not in checks:
                exact = autotune.exact_results(workload)
                worst = autotune.worst_error(workload, known.implementations[chosen], exact)
                checks[same] = Check(name, chosen, "as measured", worst.error, worst.bound)
    return list(checks.values())


def _measured_here(operator: str) -> list[Tuning]:
    """Measurements on this device of an operator or a part, of which one that can run here is right."""
    import rwkv_kernels
    from rwkv_jax import autotune

    implementations = (rwkv_kernels.OPERATORS | rwkv_kernels.PARTS)[operator].implementations
    try:
        found = autotune.kept_here(autotune.default_path())
    except autotune.TuningFileError:  # which `describe_measurements` says
        return []
    return [
        tuning
        for tuning in found
        if tuning.workload.operator == operator
        and (chosen := implementations.get(tuning.chosen or "")) is not None
        and chosen.refuses(tuning.workload.problem) is None
    ]


def _taken(tuning: Tuning) -> str:
    """One line: what is taken for a workload, by measurement, and where."""
    import rwkv_kernels

    workload = tuning.workload
    where = ""
    if workload.operator in rwkv_kernels.OPERATORS and not workload.gradients:
        where = (
            f", for pieces of prompts of at least {workload.problem.shape[1]} tokens: not with a lower prefill_length"
        )
    elif workload.problem.platform == "cpu":
        where = ", in runs with --training.tune always"
    return f"  {workload}: {tuning.chosen}, as measured{where}"


def _prefill_choice(operator: str) -> tuple[str | None, str]:
    """What the engine uses for an operator's newest generation (None: what training uses), and why."""
    import jax

    from rwkv_jax.models.decoding import prefill_implementation

    newest = [name for name, spec in GENERATIONS.items() if spec.operator == operator][-1]
    return prefill_implementation(ModelConfig(newest), jax.default_backend())


def _shape(operator: str, time: int) -> tuple[int, ...]:
    """Of one text of a model with 12 heads of 64."""
    return (1, time, 768) if operator == "wkv4" else (1, time, 12, 64)


def _tell(lines: Iterator[str]) -> None:
    """Prints each line immediately: the next one may hang or fail."""
    for line in lines:
        print(line, flush=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
