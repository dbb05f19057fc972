"""Error of the loss and of its gradients against float64, as two ways of computing them have it; for docs/errors.md.

    python benchmarks/loss_errors.py             # prints the table
    python benchmarks/loss_errors.py --write     # and puts it into docs/errors.md
    .venv-devices/bin/python benchmarks/loss_errors.py --costs h100:1x1 cpu:1    # compiles both ways, runs neither

Relative L2 errors of the sum that is minimized and of its gradients by hidden vectors and head, for the way that
computes the logits again in the backward pass (`training.loss.sum_losses`) and the fused one
(`training.fused_loss.fused_losses`). The reference gets the same inputs, rounded to the dtype, in float64; the head is
float32 as in training, and is cast to the compute dtype by both ways. Its gradient has no cast at its end.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from numpy.typing import NDArray

from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.models.layers import linear, wide_dtype
from rwkv_jax.plan.costs import memory_traffic
from rwkv_jax.plan.devices import Topology, parse_topology, prepare_compiler, topology_devices, unoptimized_on_cpu
from rwkv_jax.plan.program import parse_module
from rwkv_jax.plan.step_time import predict
from rwkv_jax.training.fused_loss import fused_losses
from rwkv_jax.training.loss import sum_losses

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
START, END = "<!-- loss: start -->", "<!-- loss: end -->"

TOKENS, WIDTH, VOCAB, CHUNK = 1000, 256, 4096, 128
"""The last chunk is a ragged one."""
L2WRAP = 1e-4
SPREADS = {"initial": 0.5, "trained": 3.0, "large logits": 12.0}
"""Standard deviation of a token's logits; targets are drawn from their softmax."""

Way = Literal["recomputed", "fused"]
Dtype = Literal["float32", "bfloat16"]


class Inputs(NamedTuple):
    """Arguments of a loss: hidden [1, n, C], head [V, C], targets and mask [1, n]."""

    hidden: Any
    head: Any
    targets: Any
    mask: Any


def make_inputs(spread: float, dtype: Dtype) -> Inputs:
    """Hidden vectors of unit variance, as a norm gives them, and a tenth of the tokens masked out."""
    draws = np.random.default_rng(0)
    hidden = draws.standard_normal((TOKENS, WIDTH))
    head = (draws.standard_normal((VOCAB, WIDTH)) * spread / WIDTH**0.5).astype(np.float32)
    hidden = np.asarray(jnp.asarray(hidden, dtype), np.float64)
    noise = draws.gumbel(size=(TOKENS, VOCAB))
    targets = np.argmax(hidden @ head.T.astype(np.float64) + noise, axis=-1)
    mask = (draws.random(TOKENS) < 0.9).astype(np.float32)
    return Inputs(hidden[None], head, targets[None], mask[None])


def loss(way: Way, inputs: Inputs, hidden: Array, head: Array, chunk: int = CHUNK) -> Array:
    """What is minimized, by one of the ways."""
    if way == "fused":
        return fused_losses(hidden, head, inputs.targets, inputs.mask, l2wrap=L2WRAP, chunk=chunk).minimized

    def logits(x: Array) -> Array:
        return linear(x, head, out_dtype=wide_dtype(x.dtype))

    sums = sum_losses(logits, hidden, inputs.targets, inputs.mask, chunk)
    return sums.nll + L2WRAP * sums.peak


def results(function: Callable[[Array, Array], Array], hidden: Array, head: Array) -> list[NDArray]:
    """The loss and its gradients by both arguments, in float64."""
    value, gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(hidden, head)
    return [np.asarray(x, np.float64) for x in (value, *gradients)]


def errors(way: Way, spread: float, dtype: Dtype) -> tuple[float, float, float]:
    """Relative errors of the loss and of both gradients."""
    inputs = make_inputs(spread, dtype)
    found = results(functools.partial(loss, way, inputs), jnp.asarray(inputs.hidden, dtype), jnp.asarray(inputs.head))
    with jax.enable_x64(True):
        rounded = np.asarray(jnp.asarray(inputs.head, dtype), np.float64)
        exact = results(functools.partial(loss, "recomputed", inputs), jnp.asarray(inputs.hidden), jnp.asarray(rounded))
    pairs = zip(found, exact, strict=True)
    value, dhidden, dhead = (float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)
    return value, dhidden, dhead


def table() -> list[str]:
    """The Markdown lines of the table."""
    lines = ["| way | dtype | " + " | ".join(SPREADS) + " |", "|---" * (len(SPREADS) + 2) + "|"]
    for dtype in get_args(Dtype):
        for way in get_args(Way):
            cells = [" / ".join(f"{x:.1e}" for x in errors(way, spread, dtype)) for spread in SPREADS.values()]
            lines.append(f"| {way} | {dtype} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


COST_TOKENS, COST_WIDTH, COST_VOCAB, COST_CHUNK = 30 * 4096, 768, 65536, 4096
"""Of one of eight devices in a step of RWKV-7 0.1B."""


def costs(topologies: list[str]) -> list[str]:
    """The Markdown lines of a table of what both ways take on devices that need not be present."""
    lines = ["| devices | way | products ms | traffic GiB | traffic ms | launches | temporary GiB |", "|---" * 7 + "|"]
    for text in topologies:
        topology = parse_topology(text)
        for way in get_args(Way):
            lines.append(f"| {text} | {way} | {' | '.join(cost_cells(way, topology))} |")
            print(lines[-1], flush=True)
    return lines


def cost_cells(way: Way, topology: Topology) -> list[str]:
    """Products, traffic, launches and temporary memory of a loss and its gradients, as compiled for one device."""
    where = SingleDeviceSharding(topology_devices(topology)[0])

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    tokens = array((1, COST_TOKENS), jnp.int32)
    hidden, head = array((1, COST_TOKENS, COST_WIDTH), jnp.bfloat16), array((COST_VOCAB, COST_WIDTH), jnp.float32)

    def run(hidden: Array, head: Array, targets: Array) -> Any:
        given = Inputs(hidden, head, targets, None)
        return jax.value_and_grad(functools.partial(loss, way, given, chunk=COST_CHUNK), argnums=(0, 1))(hidden, head)

    options = unoptimized_on_cpu() if topology.device.platform == "cpu" else None
    compiled = jax.jit(run).lower(hidden, head, tokens).compile(compiler_options=options)
    module = parse_module(compiled.as_text() or "")
    (found,) = predict(module, topology.device, 0.0, None)
    memory: Any = compiled.memory_analysis()
    return [
        f"{1e3 * found.products:.1f}",
        f"{memory_traffic(module) / 2**30:.0f}",
        f"{1e3 * found.traffic:.0f}",
        f"{found.launches:,}",
        f"{memory.temp_size_in_bytes / 2**30:.2f}",
    ]


HEADER = """## Loss

Relative L2 errors of cross-entropy with L2Wrap, summed over {tokens} tokens: the sum / its gradient by hidden vectors
/ by the head, against float64 on the same inputs. C = {width}, V = {vocab}, chunks of {chunk} tokens. `recomputed` is
what training computes by default, `fused` is `training.fused_loss`; columns differ in the spread of the logits.
Gradients by hidden vectors end in the dtype itself, which alone is 2e-3 in bfloat16. On a CPU the backward products of
`recomputed` are float32 with bfloat16, too; on a GPU they are TF32, which rounds operands by up to 5e-4. Its gradient
by the head is rounded to bfloat16 chunk by chunk; that of `fused` never is, but its operands are.

Made by `python benchmarks/loss_errors.py --write` on {machine}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/errors.md")
    parser.add_argument("--costs", nargs="+", metavar="TOPOLOGY", help="compile for these devices instead")
    arguments = parser.parse_args()
    if arguments.costs:
        prepare_compiler(parse_topology(arguments.costs[0]))
        print("\n".join(costs(arguments.costs)))
        return
    print(describe_machine())
    sizes = {"tokens": TOKENS, "width": WIDTH, "vocab": VOCAB, "chunk": CHUNK}
    lines = [*HEADER.format(**sizes, machine=describe_machine()).splitlines(), "", *table()]
    if arguments.write:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(START)
        DOCUMENT.write_text("\n".join([before + START, "", *lines, "", END + rest.split(END)[1]]), encoding="utf-8")


if __name__ == "__main__":
    main()
