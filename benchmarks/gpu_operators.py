"""Operators on a GPU: every kernel against float64, and times beside flash-linear-attention; parts of `wkv_gpu.py`."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import rwkv_kernels
from gpu_items import Item, Record, skipping
from rwkv_kernels import autotune
from rwkv_kernels.autotune import Workload
from rwkv_kernels.dispatch import Implementation
from rwkv_kernels.testing.cases import Shape

SHAPES = (Shape(8, 4096, 64, 64, 64), Shape(1, 8192, 12, 64, 64), Shape(8, 1024, 12, 64, 64))
SMALL_SHAPES = (Shape(1, 64, 2, 16, 16),)
"""Without a GPU."""

BOUNDS = {"full": autotune.BOUND, "default": 1e-3, "fast": 0.1}
"""Largest relative errors of right results, by precision; docs/errors.md has at most half of these."""

PEER = "flash-linear-attention"

Results = dict[str, NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    operators: tuple[str, ...]
    """And of `rwkv_kernels.PARTS`, which are only checked."""
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    repetitions: int
    on_gpu: bool

    def is_measured(self, name: str) -> bool:
        """Whether an implementation is one of the kernels, or without a GPU what stands for them."""
        return name.startswith("pallas") or (not self.on_gpu and name in ("chunked", "xla"))


def milliseconds(run: Callable[[], Any], repetitions: int, wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Median time of a call, from its launch until its results are there, after one that is not counted."""
    wait(run())
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        wait(run())
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


@functools.cache
def bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    x = jnp.zeros(2**28 if jax.default_backend() == "gpu" else 2**22, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / (milliseconds(lambda: copy(x), 10) / 1e3)


def with_precision(implementation: Implementation, precision: str | None) -> Implementation:
    """An implementation that multiplies matrices in a precision; None leaves it to the caller."""
    if precision is None:
        return implementation

    def run(*arrays: Any, **options: Any) -> Any:
        return implementation.run(*arrays, **options | {"precision": precision})

    return dataclasses.replace(implementation, run=run)


def _precisions(operator: str, name: str) -> tuple[str | None, ...]:
    """Those of a kernel with matrix products."""
    has_products = operator in ("wkv5", "wkv6", "wkv7") and name.startswith("pallas")
    return ("full", "default", "fast") if has_products else (None,)


# Correctness


def correctness(settings: Settings) -> list[Item]:
    """Every kernel on the small input of `rwkv_kernels.autotune`, one item for each of its programs."""
    items = []
    for operator, known in (rwkv_kernels.OPERATORS | rwkv_kernels.PARTS).items():
        if operator not in settings.operators:
            continue
        for name, implementation in known.implementations.items():
            workloads = list(_checked(operator, settings.on_gpu))
            if not settings.is_measured(name):
                continue
            if refusal := implementation.refuses(workloads[0].problem):
                items.append(skipping("correctness", f"{operator} {name}", refusal))
                continue
            for workload in workloads:
                for precision in _precisions(operator, name):
                    if precision in (None, "full") or (workload.inputs == "float32" and workload.gradients):
                        items.append(_check(workload, name, with_precision(implementation, precision), precision))
    return items


def _checked(operator: str, on_gpu: bool) -> Iterator[Workload]:
    """Training with packed rows, training in bfloat16, a prefill; of parts what they are for."""
    size = 64 if on_gpu else 8
    here = functools.partial(autotune.workload_here, operator)
    if operator == "wkv7_step":
        for dtype, of_head in (("bfloat16", size), ("float32", size), ("bfloat16", 2 * size)):
            yield here((64, 8, 4, of_head, of_head), dtype, gradients=False)
        return
    shape = (2, 80, 64, 1, 1) if operator == "wkv4" else (2, 80, 2, size, size)
    yield here(shape, "float32", packed=operator in rwkv_kernels.OPERATORS)
    yield here(shape, "bfloat16")
    if operator in rwkv_kernels.OPERATORS:
        yield here(shape, "bfloat16", gradients=False)


def _check(workload: Workload, name: str, implementation: Implementation, precision: str | None) -> Item:
    def prepare() -> Callable[[], Record]:
        worst = autotune.worst_error(workload, implementation, _exact(workload))
        bound = max(worst.bound, BOUNDS[precision or "full"])
        return lambda: {"right": worst.error <= bound, "error": worst.error, "of": worst.name, "bound": bound}

    of_head = f" N{workload.problem.shape[3]}"
    how = ("gradients" if workload.gradients else "forward") + (", packed" if workload.packed else "")
    return Item(
        "correctness", f"{workload.operator} {name}{of_head} {workload.inputs} {how} {precision or ''}".strip(), prepare
    )


_exact = functools.cache(autotune.exact_results)


# Times


def timings(settings: Settings) -> list[Item]:
    """Every kernel and `chunked`, forward and with gradients, at each shape; then the peer."""
    items = []
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            for operator in (name for name in settings.operators if name in rwkv_kernels.OPERATORS):
                items += _timings(operator, shape, dtype, settings)
    return items


def _timings(operator: str, shape: Shape, dtype: str, settings: Settings) -> list[Item]:
    channels = Shape(shape.batch, shape.time, shape.heads * shape.key_dim, 1, 1)
    workload = autotune.workload_here(operator, channels if operator == "wkv4" else shape, dtype)
    items = []
    for name, implementation in rwkv_kernels.OPERATORS[operator].implementations.items():
        if not settings.is_measured(name) and name != "chunked":  # `scan` would take all the time there is
            continue
        title = f"{operator} {name} {shape} {dtype}"
        if refusal := implementation.refuses(workload.problem):
            items.append(skipping("operators", title, refusal))
            continue
        for precision in _precisions(operator, name)[:2]:
            chosen = with_precision(implementation, precision)
            prepare = functools.partial(_prepare, workload, chosen, settings.repetitions)
            items.append(Item("operators", f"{title} {precision or ''}".strip(), prepare))
    title = f"{operator} {PEER} {shape} {dtype}"
    if not settings.on_gpu:
        return [*items, skipping("operators", title, "it needs a GPU")]
    return [*items, Item("operators", title, lambda: functools.partial(_time_peer, workload, settings.repetitions))]


def _prepare(workload: Workload, implementation: Implementation, repetitions: int) -> Callable[[], Record]:
    """Compiles both directions; rows have neither segments nor lengths, since the peer's have none."""
    inputs = jax.eval_shape(lambda: autotune.make_arguments(workload, Shape(*workload.problem.shape))[0])
    forward, both = (
        jax.jit(autotune.make_program(dataclasses.replace(workload, gradients=gradients), implementation))
        .lower(inputs, {})
        .compile()
        for gradients in (False, True)
    )

    def run() -> Record:
        held = _inputs(workload)
        forward_ms, both_ms = (milliseconds(lambda f=f: f(held, {}), repetitions) for f in (forward, both))
        results = both(held, {})
        least = 1e3 * (2 * _size(held) + _size(results["y"])) / bandwidth()
        times = {"forward_ms": forward_ms, "both_ms": both_ms, "over_the_roofline": both_ms / least}
        return times | _errors(results, _reference(workload))

    return run


@functools.lru_cache(maxsize=1)
def _inputs(workload: Workload) -> dict[str, Any]:
    """On the device, of one workload at a time."""
    return autotune.make_arguments(workload, Shape(*workload.problem.shape))[0]


def _size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _corner(name: str, x: Any) -> NDArray[np.float64] | None:
    """What the first row and head have of an array, or None where rows are summed or a state has parts."""
    if np.ndim(x) != 4:
        return None
    return np.asarray(x[:1, :1] if "state" in name else x[:1, :, :1], np.float64)


@functools.lru_cache(maxsize=1)
def _reference(workload: Workload) -> Results:
    """The float64 definition on the first row and head; nothing for WKV-4, which has channels."""
    if workload.operator == "wkv4":
        return {}
    with jax.enable_x64(True):
        part = {}
        for name, x in _inputs(workload).items():
            corner = _corner(name, x)
            part[name] = np.asarray(x[:1], np.float64) if corner is None else corner
        results = jax.jit(autotune.make_program(workload, "scan"))(part, {})
        return {name: np.asarray(x) for name, x in results.items() if x.ndim == 4}


def _errors(results: dict[str, Any], exact: Results) -> Record:
    """Relative errors of y and of the worst of the others, where there is a reference."""
    if not exact:
        return {}
    each = {}
    for name, x in exact.items():
        found = _corner(name, results[name])
        assert found is not None, name
        each[name] = autotune.relative_error(found, x)
    worst = max((name for name in each if name != "y"), key=lambda name: each[name])
    return {"error_y": each["y"], "worst_error": each[worst], "worst": worst}


# The peer


def _peer(operator: str) -> Callable[..., Any]:
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


def _time_peer(workload: Workload, repetitions: int) -> Record:
    """As `_prepare`'s; its kernels are compiled in its first call."""
    try:
        import torch  # pyright: ignore[reportMissingImports]

        function = _peer(workload.operator)
    except ImportError as error:
        return {"skipped": f"{PEER} is not here: {error}"}
    inputs = _inputs(workload)

    def to_torch(name: str, x: Any) -> Any:
        dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
        tensor = torch.tensor(np.asarray(x, np.float32), device="cuda", dtype=dtype)
        is_matrix = name == "state" and tensor.ndim == 4
        return (tensor.transpose(-1, -2).contiguous() if is_matrix else tensor).requires_grad_()

    tensors: dict[str, Any] = {
        name: tuple(to_torch(name, y) for y in x) if isinstance(x, tuple) else to_torch(name, x)
        for name, x in inputs.items()
    }
    leaves = {name: x for name, x in tensors.items() if not isinstance(x, tuple)}

    def both() -> Any:
        for x in leaves.values():
            x.grad = None
        y, state = function(**tensors)
        initial = tensors["state"]
        dstate = state.detach() if isinstance(initial, tuple) else initial.detach()
        torch.autograd.backward((y, state), (tensors["v"].detach().to(y.dtype), dstate.to(state.dtype)))
        return y

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    with torch.no_grad():
        forward_ms = milliseconds(lambda: function(**tensors), repetitions, wait)
    both_ms = milliseconds(both, repetitions, wait)
    results = {"y": both().detach().float().cpu().numpy()}
    for name, x in leaves.items():
        gradient = x.grad.float().cpu().numpy()
        results[f"d{name}"] = gradient.swapaxes(-1, -2) if name == "state" else gradient
    exact = {name: x for name, x in _reference(workload).items() if name in results}
    return {"forward_ms": forward_ms, "both_ms": both_ms} | _errors(results, exact)
