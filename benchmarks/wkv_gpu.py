"""Every operator on a GPU beside flash-linear-attention: time, error against float64, and the memory roofline.

    python benchmarks/wkv_gpu.py    # all shapes; beside torch and flash-linear-attention where they are installed
    python benchmarks/wkv_gpu.py --operators wkv7 --shapes 1x8192x12x64

For each operator, shape, dtype and implementation that can run: median milliseconds forward, and forward with backward;
the relative L2 errors of y and of the worst gradient against the float64 definition, on the first row and head; and
how much longer it takes than moving its arguments, results and gradients once through the device's memory, at the
bandwidth that a copy reaches in this run. Peers: flash-linear-attention's chunk_rwkv7, chunk_rwkv6 and
fused_recurrent_rwkv4, on the same numbers. Without a GPU a small shape runs on the CPU, so that the script itself stays
tested.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory of its own

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import rwkv_kernels
from rwkv_jax.cli.machine import describe_machine
from rwkv_kernels.testing.cases import Shape
from wkv_problems import Inputs, as_dtype, call, make_inputs, with_backward

SHAPES = (Shape(8, 4096, 64, 64, 64), Shape(1, 8192, 12, 64, 64), Shape(8, 1024, 12, 64, 64))
CPU_SHAPE = Shape(1, 256, 2, 64, 64)
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
PRECISIONS = ("full", "default", "fast")
PEER = "flash-linear-attention"

Results = dict[str, NDArray[np.float64]]


def milliseconds(run: Callable[[], Any], wait: Callable[[Any], Any], repetitions: int) -> float:
    """Median time of a call, from its launch until its results are there."""
    wait(run())
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        wait(run())
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    x = jnp.zeros(2**28 if jax.default_backend() == "gpu" else 2**24, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / (milliseconds(lambda: copy(x), jax.block_until_ready, 10) / 1e3)


def named(outputs: Any) -> dict[str, Any]:
    """y and the gradients of (y, state), gradients; WKV-4's final state is defined up to its exponent only."""
    (y, _), gradients = outputs
    leaves = jax.tree.leaves_with_path(gradients)
    return {"y": y} | {f"d{jax.tree_util.keystr(path, simple=True, separator='')}": x for path, x in leaves}


def corner(name: str, x: Any) -> Any:
    """What the first row and head have of an array, or None where rows or heads are summed."""
    x = np.asarray(x, np.float64)
    if x.ndim == 4:
        return x[:1, :1] if name.startswith("dstate") else x[:1, :, :1]
    return None


def reference(operator: str, inputs: Inputs) -> Results:
    """The float64 definition on the first row and head."""
    if operator == "wkv4":
        return {}
    with jax.enable_x64(True):
        part = {
            name: x[:1, :1] if name == "state" else x[:1, :, :1] if x.ndim == 4 else x[:1]
            for name, x in ((name, np.asarray(x, np.float64)) for name, x in inputs.items())
        }
        results = named(jax.jit(with_backward(call(operator, "scan")))(part))
        return {name: np.asarray(x) for name, x in results.items() if x.ndim == 4}


def errors(found: dict[str, Any], exact: Results) -> str:
    """Relative L2 errors of y and of the worst gradient, where there is a reference."""
    if not exact:
        return "- | -"
    each = {n: np.linalg.norm(corner(n, found[n]) - x) / np.linalg.norm(x) for n, x in exact.items()}
    worst = max((n for n in each if n != "y"), key=lambda n: each[n])
    return f"{each['y']:.0e} | {each[worst]:.0e} {worst}"


def size(tree: Any) -> int:
    """Bytes of a tree of arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure_ours(operator: str, implementation: str, inputs: Inputs, options: dict[str, Any], repetitions: int) -> Any:
    """Milliseconds forward and with backward, and the results."""
    forward = jax.jit(call(operator, implementation, **options)).lower(inputs).compile()
    both = jax.jit(with_backward(call(operator, implementation, **options))).lower(inputs).compile()
    times = [milliseconds(functools.partial(f, inputs), jax.block_until_ready, repetitions) for f in (forward, both)]
    return times, named(both(inputs))


def peer_call(operator: str) -> Callable[..., Any]:
    """flash-linear-attention's function in terms of our arguments; its states are [B, H, key, value]."""
    if operator == "wkv7":
        from fla.ops.rwkv7 import chunk_rwkv7  # pyright: ignore[reportMissingImports]

        return lambda r, log_w, k, v, a, b, state: chunk_rwkv7(
            r, log_w, k, v, a, b, scale=1.0, initial_state=state, output_final_state=True
        )
    if operator == "wkv6":
        from fla.ops.rwkv6 import chunk_rwkv6  # pyright: ignore[reportMissingImports]

        return lambda r, log_w, k, v, u, state: chunk_rwkv6(
            r, k, v, log_w, u, scale=1.0, initial_state=state, output_final_state=True
        )
    if operator == "wkv4":
        import torch  # pyright: ignore[reportMissingImports]
        from fla.ops.rwkv4 import fused_recurrent_rwkv4  # pyright: ignore[reportMissingImports]

        return lambda log_w, u, k, v, state: fused_recurrent_rwkv4(
            (-log_w).log(), u, k, v, torch.stack(state, 1)[:, :, None]
        )
    raise ImportError(f"it has no {operator}")


def measure_peer(operator: str, inputs: Inputs, repetitions: int) -> Any:
    """Milliseconds forward and with backward, and the results."""
    import torch  # pyright: ignore[reportMissingImports]

    function = peer_call(operator)

    def to_torch(name: str, x: Any) -> Any:
        dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
        tensor = torch.tensor(np.asarray(x, np.float32), device="cuda", dtype=dtype)
        is_matrix = name == "state" and tensor.ndim == 4
        return (tensor.transpose(-1, -2).contiguous() if is_matrix else tensor).requires_grad_()

    tensors = {
        n: tuple(to_torch(n, y) for y in x) if isinstance(x, tuple) else to_torch(n, x) for n, x in inputs.items()
    }
    leaves = {n: x for n, x in tensors.items() if not isinstance(x, tuple)}

    def both() -> Any:
        for x in leaves.values():
            x.grad = None
        y, state = function(**tensors)
        torch.autograd.backward((y, state), (y.detach(), state.detach()))
        return y

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    with torch.no_grad():
        forward_ms = milliseconds(lambda: function(**tensors), wait, repetitions)
    both_ms = milliseconds(both, wait, repetitions)
    results = {"y": both().detach().float().cpu().numpy()}
    for name, x in leaves.items():
        gradient = x.grad.float().cpu().numpy()
        results[f"d{name}"] = gradient.swapaxes(-1, -2) if name == "state" else gradient
    return (forward_ms, both_ms), results


def compare(operator: str, shape: Shape, dtype: str, repetitions: int, bytes_a_second: float) -> None:
    """Prints the rows of one operator at one shape and dtype."""
    inputs = as_dtype(make_inputs(operator, shape), DTYPES[dtype])
    exact = reference(operator, inputs)
    explanation = rwkv_kernels.explain(operator, tuple(shape))
    able = [name for name, refusal in explanation.refusals.items() if refusal is None]
    for name in able:
        is_kernel = name.startswith("pallas") and operator != "wkv4"
        for precision in PRECISIONS if is_kernel else (None,):
            options = {} if precision is None else {"precision": precision}
            try:
                (forward_ms, both_ms), results = measure_ours(operator, name, inputs, options, repetitions)
            except jax.errors.JaxRuntimeError as error:  # such as no memory for a scan's gradient
                print(
                    f"| {operator} | {shape} | {dtype} | {name} {precision or ''} | {str(error).splitlines()[0][:80]} |"
                )
                continue
            least = 1e3 * (2 * size(inputs) + size(results["y"])) / bytes_a_second
            print(
                f"| {operator} | {shape} | {dtype} | {name} {precision or ''} | {forward_ms:.2f} | {both_ms:.2f} "
                f"| {both_ms / least:.1f}x | {errors(results, exact)} |",
                flush=True,
            )
    if jax.default_backend() != "gpu":
        return
    try:
        (forward_ms, both_ms), results = measure_peer(operator, inputs, repetitions)
    except (ImportError, RuntimeError, AssertionError) as error:
        print(f"| {operator} | {shape} | {dtype} | {PEER} | {type(error).__name__}: {str(error)[:80]} |", flush=True)
        return
    print(
        f"| {operator} | {shape} | {dtype} | {PEER} | {forward_ms:.2f} | {both_ms:.2f} | | {errors(results, exact)} |",
        flush=True,
    )


def parse_shape(text: str) -> Shape:
    """BxTxHxN with values as long as keys."""
    batch, time_steps, heads, key_dim = map(int, text.split("x"))
    return Shape(batch, time_steps, heads, key_dim, key_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", default=list(rwkv_kernels.OPERATORS))
    parser.add_argument("--shapes", nargs="+", help="BxTxHxN, such as 8x4096x64x64")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    shapes = SHAPES
    if arguments.shapes:
        shapes = tuple(parse_shape(text) for text in arguments.shapes)
    elif jax.default_backend() != "gpu":
        shapes = (CPU_SHAPE,)
        print("no GPU here: the CPU part only, at a small shape")
    bytes_a_second = bandwidth()
    print(f"{describe_machine()}; a copy moves {bytes_a_second / 1e9:.0f} GB/s")
    columns = "operator|shape|inputs|implementation|forward ms|forward + backward ms|over the roofline|y|worst gradient"
    print(f"\n| {' | '.join(columns.split('|'))} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for operator in arguments.operators:
        for shape in shapes:
            for dtype in arguments.dtypes:
                compare(operator, shape, dtype, arguments.repetitions, bytes_a_second)


if __name__ == "__main__":
    main()
