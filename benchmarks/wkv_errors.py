"""Error of every operator, implementation, precision and dtype against the float64 definition; makes docs/errors.md.

    python benchmarks/wkv_errors.py             # prints the tables
    python benchmarks/wkv_errors.py --write     # and writes them into docs/errors.md
    python benchmarks/wkv_errors.py --write --only wkv7-pallas_triton     # all other rows stay as they are

Relative L2 errors of y, of the final state and of the worst gradient (every input and the initial state, with random
cotangents of y and of the final state). Kernels run in interpret mode; what their precisions mean on a device is
emulated: operands are split and rounded as tensor cores round them, products are added up in float32. With bfloat16
inputs the reference gets the rounded inputs, and y and gradients include the rounding of the result, 2e-3 by itself.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import rwkv_kernels
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.plan.devices import unoptimized_on_cpu
from rwkv_kernels import dispatch
from rwkv_kernels.matmul import emulated_matmul
from rwkv_kernels.precision import Precision
from rwkv_kernels.testing.cases import Shape
from wkv_problems import Inputs, as_dtype, call, make_inputs

SHAPE = Shape(1, 128, 2, 64, 64)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ONE_TOKEN, ONE_TOKEN_SEGMENTS = "T = 1", "one-token segments"
DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
LOSS = "<!-- loss: start -->"
"""Where the part of loss_errors.py begins, which is the last one."""

Case = tuple[str, Shape, dict[str, Any]]
"""Name of the inputs, sizes, and options of the call."""


def cases(operator: str) -> dict[str, Case]:
    """The columns of an operator's table."""
    names = __import__(f"rwkv_kernels.ops.{operator}.cases", fromlist=["CASES"]).CASES
    columns: dict[str, Case] = {name: (name, SHAPE, {}) for name in names}
    columns[ONE_TOKEN] = ("realistic", SHAPE._replace(time=1), {})
    columns[ONE_TOKEN_SEGMENTS] = ("realistic", SHAPE, {"segment_ids": jnp.arange(SHAPE.time)[None]})
    return columns


def rows(operator: str) -> dict[tuple[str, str], Any]:
    """(implementation, precision) -> what to pass as `implementation`."""
    table: dict[tuple[str, str], Any] = {}
    for name, implementation in rwkv_kernels.OPERATORS[operator].implementations.items():
        if not name.startswith("pallas"):
            table[name, "float32"] = name
            continue
        run = functools.partial(implementation.run, interpret=True)
        if "precision" not in inspect.signature(getattr(rwkv_kernels, operator)).parameters:
            table[name, "float32"] = dispatch.Implementation(run, dispatch.anything)  # nothing to multiply
            continue
        for precision in get_args(Precision):
            table[name, precision] = dispatch.Implementation(_at(run, precision), dispatch.anything)
    return table


def _at(run: Callable[..., Any], own: Precision) -> Callable[..., Any]:
    """An implementation at a precision, whatever the operator asks for: some kernels take no `matmul`, but its name."""

    def at(*arguments: Any, precision: Precision, **options: Any) -> Any:
        del precision
        return run(*arguments, precision=own, matmul=emulated_matmul(own), **options)

    return at


def results(function: Callable[[Inputs], Any], inputs: Inputs, cotangents: Any) -> dict[str, Any]:
    """y, the final state's parts and all gradients, by name."""
    (y, state), pull_back = jax.vjp(function, inputs)
    gradients = pull_back(cotangents)[0]
    named = {"y": y} | {f"state{i}": x for i, x in enumerate(jax.tree.leaves(state))}
    leaves = jax.tree.leaves_with_path(gradients)
    return named | {f"d{jax.tree_util.keystr(path, simple=True, separator='')}": x for path, x in leaves}


def make_cotangents(operator: str, inputs: Inputs, options: dict[str, Any]) -> Any:
    """Random cotangents of y and of the final state, which float32 holds exactly."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(call(operator, "scan", **options), inputs)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32).astype(np.float64), shapes)


@functools.cache
def compiled(operator: str, implementation: Any, options: tuple[str, ...]) -> Callable[..., dict[str, Any]]:
    """(inputs, cotangents, values of options) -> results. Kernels, which no user runs so, are compiled quickly."""

    def run(inputs: Inputs, cotangents: Any, *values: Any) -> dict[str, Any]:
        given = dict(zip(options, values, strict=True))
        return results(call(operator, implementation, **given), inputs, cotangents)

    is_kernel = isinstance(implementation, dispatch.Implementation)
    return jax.jit(run, compiler_options=unoptimized_on_cpu() if is_kernel else None)


def relative_error(x: NDArray, reference: NDArray) -> float:
    """|x - reference| / |reference| in L2; |x| where the reference is zero."""
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(np.asarray(x, np.float64) - reference)) / (norm or 1.0)


def measure(operator: str, implementation: Any, case: Case, dtype: Any) -> tuple[float, float, float, str]:
    """Errors of y, of the final state and of the worst gradient, and which that is."""
    name, shape, options = case
    exact_inputs = make_inputs(operator, shape, name)
    with jax.enable_x64(True):
        cotangents = make_cotangents(operator, exact_inputs, options)
    inputs = as_dtype(exact_inputs, dtype)
    given = (jnp.asarray(cotangents[0], dtype), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), cotangents[1]))
    run = compiled(operator, implementation, tuple(options))
    found = {n: np.asarray(x, np.float64) for n, x in run(inputs, given, *options.values()).items()}
    with jax.enable_x64(True):
        rounded = jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, given))
        reference = compiled(operator, "scan", tuple(options))(*rounded, *options.values())
        reference = {n: np.asarray(x) for n, x in reference.items()}
    errors = {n: relative_error(found[n], reference[n]) for n in found}
    worst = max((n for n in errors if n.startswith("d")), key=lambda n: errors[n])
    state = max(error for n, error in errors.items() if n.startswith("state"))
    return errors["y"], state, errors[worst], worst


def written_rows() -> dict[tuple[str, ...], str]:
    """The rows of the document, by operator, implementation, precision and dtype of the inputs."""
    found: dict[tuple[str, ...], str] = {}
    operator = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            operator = line.removeprefix("## ")
        elif line.startswith("| "):
            found[operator, *(cell.strip() for cell in line.split("|")[1:4])] = line
    return found


def table(operator: str, kept: dict[tuple[str, ...], str]) -> list[str]:
    """The Markdown lines of one operator, of which some need not be made again."""
    columns = cases(operator)
    lines = [f"## {operator}", "", "| implementation | precision | inputs | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for (name, precision), implementation in rows(operator).items():
        for dtype_name, dtype in DTYPES.items():
            if (key := (operator, name, precision, dtype_name)) in kept:
                lines.append(kept[key])
                continue
            cells = []
            for case in columns.values():
                y, state, gradient, which = measure(operator, implementation, case, dtype)
                cells.append(f"{y:.0e} / {state:.0e} / {gradient:.0e} {which}")
            lines.append(f"| {name} | {precision} | {dtype_name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return [*lines, ""]


HEADER = """# Errors

Relative L2 errors against the definition (`scan`) in float64: y / final state / worst gradient and which one it is.
Inputs are the named cases of `kernels/rwkv_kernels/ops/wkv*/cases.py` at {shape}. Kernels were interpreted on
a CPU with the products of their precision emulated: operands rounded as tensor cores round them (`full` is bfloat16 six
times, `default` three times, `fast` once), sums in float32; XLA compiled them without optimizations, which shifts
errors near 1e-7. XLA forms have one precision on a CPU, float32. With bfloat16 inputs y and the gradients are rounded
to bfloat16 at the end, which alone is 2e-3; the state is not. Where the truth is exactly zero, as the gradient of a
decay that only ever meets an empty state (one-token segments), the error is absolute.

A row of `scan` that is worse than the others is no accident: where decays are near 1 it rounds e^(log w) at every step,
the same way each time, while the chunked forms add up logarithms.

Made by `python benchmarks/wkv_errors.py --write`:
"""
MACHINES = "| machine | rows |"


def machines(machine: str, made: set[str]) -> list[str]:
    """The table of which rows were made where, with those that were made on this machine now."""
    before = DOCUMENT.read_text(encoding="utf-8").partition(f"{MACHINES}\n|---|---|\n")[2].partition("\n\n")[0]
    found = {cells[1].strip(): cells[2].strip().split(", ") for cells in (x.split("|") for x in before.splitlines())}
    kept = {name: [row for row in names if row not in made] for name, names in found.items()}
    kept[machine] = sorted({*kept.get(machine, ()), *made})
    return [MACHINES, "|---|---|", *(f"| {name} | {', '.join(rows)} |" for name, rows in kept.items() if rows), ""]


def main() -> None:
    every = [f"{name}-{row}" for name, x in rwkv_kernels.OPERATORS.items() for row in x.implementations]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=every,
        help="all other rows stay as docs/errors.md has them",
    )
    parser.add_argument("--write", action="store_true", help="write docs/errors.md")
    arguments = parser.parse_args()
    print(describe_machine())
    sizes = " ".join(f"{letter}{size}" for letter, size in zip("BTHNM", SHAPE, strict=True))
    kept = {key: line for key, line in written_rows().items() if f"{key[0]}-{key[1]}" not in (arguments.only or every)}
    made = set(every) - {f"{key[0]}-{key[1]}" for key in kept}
    lines = [*HEADER.format(shape=sizes).splitlines(), "", *machines(describe_machine(), made)]
    for operator in rwkv_kernels.OPERATORS:
        lines += table(operator, kept)
    if arguments.write:
        lines.append(LOSS + DOCUMENT.read_text(encoding="utf-8").split(LOSS)[1])  # of another script
        DOCUMENT.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
